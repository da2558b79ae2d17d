//! Would a processor enter a guest with this VMCS, and if not, because of which requirement?
//!
//! SDM Vol. 3C, chapter "VM Entries": "Checks on VMX Controls and Host-State Area" and "Checking and
//! Loading Guest State". [`controls`] and [`host_state`] come first, in either order; their failures
//! are VMfailValid with error 7 or 8. [`guest_state`] comes after both; its failures are VM exits
//! with reason 33 and the exit qualification that the failure names.
//!
//! All rules that the features of [`Caps`](crate::caps::Caps) need are here, whether or not the
//! processor below would find the fault too: vmcs02 is not vmcs12. Everything is a function of
//! values. What has to be read from L1's memory for a rule, the caller reads once and passes on;
//! where to read it, or that nothing is to be read, [`vtpr_to_read`], [`link_to_read`] and
//! [`pdptes_to_read`] say.

mod controls;
mod guest;
mod host;
mod segments;
#[cfg(test)]
pub(crate) mod tests;

pub use controls::{ControlFailure, MsrArea, controls, vtpr_to_read};
pub use guest::{
    GuestFailure, GuestInputs, guest_state, instruction_pointer, link_to_read, pae_paging,
    pdpte_is_valid, pdptes_to_read,
};
pub use host::{HostFailure, host_state};
pub use segments::Segment;

/// CR0.PE.
const CR0_PE: u64 = 1 << 0;
/// CR0.PG.
const CR0_PG: u64 = 1 << 31;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// CR4.LA57.
const CR4_LA57: u64 = 1 << 12;
/// CR4.PCIDE.
const CR4_PCIDE: u64 = 1 << 17;
/// IA32_EFER.LME.
const EFER_LME: u64 = 1 << 8;
/// IA32_EFER.LMA.
const EFER_LMA: u64 = 1 << 10;

/// A requirement that stands or falls: the failure it is named by, if it falls.
#[inline]
fn require<F>(holds: bool, failure: F) -> Result<(), F> {
    if holds { Ok(()) } else { Err(failure) }
}

/// Whether bits 63:`width - 1` are all equal (SDM Vol. 1, "Canonical Addressing").
#[inline]
const fn is_canonical(address: u64, width: u8) -> bool {
    let spare = 64u32.saturating_sub(width as u32);
    ((address << spare) as i64 >> spare) as u64 == address
}

/// Whether each of the eight entries of an IA32_PAT value has a memory type that exists: 0 (UC), 1
/// (WC), 4 (WT), 5 (WP), 6 (WB) or 7 (UC-).
#[inline]
fn is_valid_pat(pat: u64) -> bool {
    pat.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

/// Whether a control register has the bits that VMX operation fixes (SDM Vol. 3D, "VMX-Fixed Bits
/// in CR0" and "VMX-Fixed Bits in CR4").
#[inline]
const fn has_fixed_bits(value: u64, fixed0: u64, fixed1: u64) -> bool {
    value & fixed0 == fixed0 && value & !fixed1 == 0
}
