//! The nested VT-x engine.
#![no_std]
#![forbid(unsafe_code)]
