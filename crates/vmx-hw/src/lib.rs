//! The VMX instructions.
#![no_std]
