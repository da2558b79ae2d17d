//! What exists in Intel VT-x.
#![no_std]
#![forbid(unsafe_code)]
