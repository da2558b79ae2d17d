//! A software VMX processor: what does a machine do whose caches forget nothing that they may keep?
//!
//! The independent oracle of this project. It knows `vmx-defs` and the manual, never the engine. A
//! [`Machine`] is a pure function of its program and seed: logical processors on
//! one memory, each with the caches of SDM Vol. 3C, "Caching Translation Information", under a
//! [`Retention`] policy. Under the adversarial policy a cached mapping lives
//! until an operation that the SDM lists invalidates it, so that a hypervisor that forgets a flush
//! is found out, as no emulator and few real processors would.
//!
//! Citations are to the edition that `vmx-defs` names.
#![forbid(unsafe_code)]

pub mod addr;
pub mod caches;
pub mod caps;
pub mod checked;
mod checks;
mod entry;
mod ept;
mod ept_format;
mod events;
mod exit;
pub mod generate;
mod instructions;
pub mod layout;
pub mod machine;
pub mod memory;
mod msrs;
pub mod operation;
mod paging;
pub mod processor;
pub mod program;
pub mod registers;
pub mod retention;
pub mod run;
mod stop;
pub mod vmcs;
pub mod vmx;

pub use addr::Gpa;
pub use caps::ModelCaps;
pub use checked::Checked;
pub use machine::{Machine, Platform};
pub use memory::Memory;
pub use operation::Operation;
pub use processor::{Delivered, Outcome, Processor, VmxMode};
pub use program::{Action, Program, Setup, Step};
pub use registers::Registers;
pub use retention::Retention;
pub use run::{Seen, Session, Trace, run};
