//! The L1 test hypervisor: a library for programs that boot as Multiboot kernels, use VMX, and run
//! alike on the bare machine and as a guest of any L0.
//!
//! Three programs are built from it: `l1-conformance` (the cases in [`cases`]), `l1-bench` and
//! `l1-demo`. On a host build the library compiles but the programs only say that they are
//! images.
#![no_std]

pub mod boot;
pub mod cases;
pub mod gdt;
pub mod local_apic;
pub mod machine;
pub mod measure;
pub mod memory;
pub mod multiboot;
pub mod power;
#[cfg(image)]
mod runtime;
pub mod serial;
pub mod single;
pub mod smp;
pub mod suite;
pub mod traps;
pub mod vmx;
