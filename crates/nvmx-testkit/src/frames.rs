//! What is where in the host's physical memory?
//!
//! L0's own memory is low, L1's RAM begins at 1 GByte, and nothing else exists: an address of one
//! space that is taken for one of the other leads nowhere, or to a page that tells.

use vmx_defs::Hpa;
use vmx_defs::addr::PAGE_SIZE;
use vmx_model::layout;

/// A page of ones: what L1 reads where L0 hides something.
pub(crate) const ONES: Hpa = Hpa::new(0x8000);
/// L1's MSR bitmap, the same for all processors.
pub(crate) const MSR_BITMAP: Hpa = Hpa::new(0x9000);
/// Frames of the processors.
const PROCESSORS: u64 = 0x1_0000;
/// EPT01.
pub(crate) const EPT01: u64 = 0x10_0000;
/// The pool of shadow tables.
pub(crate) const POOL: Hpa = Hpa::new(0x100_0000);
/// Frames that L1's pages may be moved to.
const SPARE: std::ops::Range<u64> = 0x3000_0000..0x3004_0000;
/// The first byte of L1's RAM.
pub(crate) const L1_RAM: u64 = 1 << 30;
/// An address behind everything, for parts of L1's address space that have no place of their own.
pub(crate) const NOWHERE: u64 = 2 << 30;

/// Pages of the machine.
pub(crate) const PAGES: usize = (L1_RAM / PAGE_SIZE) as usize + layout::PAGES;

/// The frames that L1's pages may be moved to.
pub(crate) fn spare() -> Vec<Hpa> {
    SPARE.step_by(PAGE_SIZE as usize).map(Hpa::new).collect()
}

/// Whether an address is in a frame that may be L1's.
pub(crate) fn is_l1(hpa: Hpa) -> bool {
    hpa.as_u64() >= L1_RAM || SPARE.contains(&hpa.as_u64())
}

/// What a frame of a processor is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Use {
    Vmxon,
    Vmcs01,
    Vmcs02,
    MsrBitmap02,
    Scratch,
}

/// A frame of one processor.
pub(crate) const fn own(processor: usize, what: Use) -> Hpa {
    Hpa::new(PROCESSORS + 0x8000 * processor as u64 + PAGE_SIZE * what as u64)
}
