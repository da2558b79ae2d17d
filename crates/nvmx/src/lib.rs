//! Nested VT-x: the engine that lets a guest be a hypervisor.
//!
//! A hypervisor on bare VT-x (L0) embeds this library, hands it the VM exits that concern nested
//! virtualization, and implements the traits of [`host`]. The engine keeps L1's VMCSs ([`vmcs12`]),
//! builds the one that the processor runs L2 with, folds L1's EPT into shadow EPT, routes
//! L2's exits, and emulates VMFUNC.
//!
//! Nothing in it panics on any input of a guest; it has no `unsafe` and needs `alloc` only when a
//! virtual machine is created.
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

extern crate alloc;

mod cache;
pub mod caps;
pub mod check;
pub mod engine;
mod enter;
pub mod ept;
mod exit;
pub mod guest_memory;
pub mod host;
pub mod inject;
pub mod insn;
mod msr_area;
mod msr_bitmap;
mod nmi;
pub mod paging;
pub mod regs;
pub mod shootdown;
#[cfg(test)]
pub mod testing;
pub mod tlb;
pub mod tracking;
pub mod vmcs12;
mod vmfunc;
mod vmx;

pub use engine::{Config, Handled, Nested, Processor, VmfuncMode};
pub use host::{Host, HostError, HostResult};
pub use regs::Gprs;
pub use shootdown::{Place, Request, Shootdown};
pub use tracking::{HardwareWrites, TrackError, Tracked};
