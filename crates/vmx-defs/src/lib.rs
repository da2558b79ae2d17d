//! What exists in Intel VT-x: address spaces, VMCS fields, controls, capability MSRs, exits, EPT
//! entries and the #VE information area.
//!
//! This crate holds names, layouts and the rules that are properties of one value alone (is this an
//! EPTP that a processor would accept?). It has no behaviour, no state and no `unsafe`, and every
//! other crate of the project stands on it.
//!
//! All citations are to the *Intel 64 and IA-32 Architectures Software Developer's Manual*
//! ("SDM"), edition 325384-083 (2024), by section title, since its chapter numbers move.
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod addr;
pub mod controls;
pub mod ept;
pub mod event;
pub mod exit;
pub mod field;
pub mod msr;
pub mod ve;
pub mod vmfail;

pub use addr::{Gva, Hpa, L1Gpa, L2Gpa};
pub use controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
pub use ept::{EptEntry, EptPermissions, Eptp};
pub use exit::ExitReason;
pub use field::Field;
pub use vmfail::VmInstructionError;
