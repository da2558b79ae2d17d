//! Answers: does each structure that L1 names by a physical address get the architectural answer
//! when the address, or what is there, is hostile?
//!
//! The addresses are of three kinds: memory that reads as ones (L0's own memory under an L0 that
//! hides it, else a place without RAM), addresses that are not aligned, and addresses beyond the
//! processor's width. Then come EPTs that lead back to themselves, and VMCS regions that L1
//! rewrites. Each case ends with an L2 that runs as ever.

pub mod addresses;
pub mod loops;
pub mod ones;
pub mod regions;

use crate::{
    memory::PAGE_2M,
    skip,
    suite::{Ctx, Stop},
    vmx,
};

/// Memory that reads as ones.
#[derive(Clone, Copy, Debug)]
pub struct Void {
    /// Its first byte, aligned to 2 MiB; it is 2 MiB long.
    pub start: u64,
    /// It is the own memory of nvmx: writes raise #GP(0). Elsewhere they are dropped.
    pub guarded: bool,
}

const FOUR_GIB: u64 = 1 << 32;

impl Void {
    /// Below 4 GiB, where this program's page tables reach. Under nvmx that is the L0's own memory:
    /// the last range of the memory map below 4 GiB that is no RAM, follows RAM and has 2 MiB.
    /// Elsewhere it lies after all that the memory map has there.
    pub fn find(ctx: &Ctx<'_>) -> Result<Self, Stop> {
        let info = ctx.info;
        let own = info.other.iter().rev().find(|range| {
            range.end <= FOUR_GIB
                && range.end.saturating_sub(range.start) >= PAGE_2M
                && info.ram.iter().any(|ram| ram.end == range.start)
        });
        let guarded = vmx::l0_signature() == Some(*b"nvmxnvmxnvmx");
        let void = match own {
            Some(range) if guarded => {
                Self { start: range.start.next_multiple_of(PAGE_2M), guarded }
            }
            _ if guarded => crate::fail!("nvmx shows no memory of its own below 4 GiB"),
            _ => {
                let mapped = info.ram.iter().chain(&info.other);
                let low = mapped.map(|range| range.end).filter(|&end| end < FOUR_GIB - (1 << 30));
                let top = low.max().unwrap_or(0);
                Self { start: (top + PAGE_2M).next_multiple_of(PAGE_2M), guarded }
            }
        };
        for offset in [0, 8, 0xFF8, 0x1000, PAGE_2M - 8] {
            if void.read(offset) != !0 {
                skip!("{:#x} does not read as ones", void.start + offset);
            }
        }
        Ok(void)
    }

    /// Reads 8 bytes at this offset.
    pub fn read(self, offset: u64) -> u64 {
        // SAFETY: the low 4 GiB are mapped; no Rust object lies at a place without RAM.
        unsafe { ((self.start + offset) as *const u64).read_volatile() }
    }

    /// Writes 8 bytes at this offset; a fault is for the caller to catch.
    pub fn write(self, offset: u64, value: u64) {
        // SAFETY: as for `read`; the write is dropped or faults.
        unsafe { ((self.start + offset) as *mut u64).write_volatile(value) }
    }
}
