//! How is a virtualization exception (#VE) described to the guest?
//!
//! SDM Vol. 3C, "Virtualization-Exception Information".

/// Offset of the exit reason (32 bits; 48, EPT violation) in the information area.
pub const EXIT_REASON: u64 = 0;
/// Offset of the busy word (32 bits): FFFFFFFFH while the guest has not cleared it.
pub const BUSY: u64 = 4;
/// Offset of the exit qualification (64 bits).
pub const EXIT_QUALIFICATION: u64 = 8;
/// Offset of the guest-linear address (64 bits).
pub const GUEST_LINEAR_ADDRESS: u64 = 16;
/// Offset of the guest-physical address (64 bits).
pub const GUEST_PHYSICAL_ADDRESS: u64 = 24;
/// Offset of the EPTP index (16 bits).
pub const EPTP_INDEX: u64 = 32;
/// Value of the busy word that keeps further #VEs away.
pub const BUSY_VALUE: u32 = 0xffff_ffff;
