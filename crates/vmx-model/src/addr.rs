//! Which address does a guest of the modelled processor call physical?
//!
//! The processor knows one guest at a time. Whether that guest is a hypervisor (L1) or the guest of
//! one (L2) is for whoever programs the processor to say, so the type here is neither `L1Gpa` nor
//! `L2Gpa`.

use core::fmt;
use vmx_defs::Hpa;

/// Guest-physical address: what EPT translates to an [`Hpa`]. Where EPT is not in use it *is* one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(u64);

impl Gpa {
    /// The address `addr`, in bytes.
    #[inline]
    pub const fn new(addr: u64) -> Self {
        Self(addr)
    }

    /// The address as a number of bytes.
    #[inline]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The address on the bus where EPT is not in use.
    #[inline]
    pub const fn without_ept(self) -> Hpa {
        Hpa::new(self.0)
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

/// Whether bits 63:`width - 1` are all equal (SDM Vol. 1, "Canonical Addressing").
#[inline]
pub(crate) const fn is_canonical(address: u64, width: u8) -> bool {
    let shift = 64 - width as u32;
    ((address << shift) as i64 >> shift) as u64 == address
}
