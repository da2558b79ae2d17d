//! The L1 test hypervisor.
#![no_std]
