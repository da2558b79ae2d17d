//! Answers: how does this hypervisor build its EPT?

use vmx_defs::{EptEntry, L2Gpa, ept::memory_type, msr::EptVpidCap};

use crate::memory::{Arena, Page};

/// Read, write and execute.
pub const RWX: u64 = 7;
/// Bits of an entry that points to a table and allows everything.
pub const TABLE: u64 = RWX;
/// Bits of an entry that maps a page: everything allowed, write-back.
pub const LEAF: u64 = RWX | (memory_type::WB as u64) << 3;
/// Bit 7: the entry maps a large page.
pub const LARGE: u64 = 1 << 7;
/// Bit 8: accessed.
pub const ACCESSED: u64 = 1 << 8;
/// Bit 9: dirty.
pub const DIRTY: u64 = 1 << 9;
/// Bit 63: suppress #VE.
pub const SUPPRESS_VE: u64 = 1 << 63;
/// Bit 6 of an EPTP: accessed and dirty flags are enabled.
pub const AD: u64 = 1 << 6;
/// Bits 5:0 of an EPTP: write-back tables, four levels.
pub const EPTP_FLAGS: u64 = memory_type::WB as u64 | 3 << 3;

/// Place of one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// The table.
    pub table: Page,
    /// Which of its 512 entries.
    pub index: usize,
}

impl Slot {
    /// Reads the entry.
    pub fn get(self) -> u64 {
        self.table.read(self.index)
    }

    /// Writes the entry.
    pub fn set(self, entry: u64) {
        self.table.write(self.index, entry);
    }
}

/// A 4-level EPT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ept {
    /// The EPT PML4 table.
    pub root: Page,
}

/// Index of `gpa` in a table of `level` (4 is the EPT PML4 table).
pub fn index(gpa: L2Gpa, level: u8) -> usize {
    (gpa.as_u64() >> (12 + 9 * (u64::from(level) - 1))) as usize & 511
}

impl Ept {
    /// One that maps nothing.
    pub fn empty(arena: &mut Arena) -> Self {
        Self { root: arena.page() }
    }

    /// One that maps the first GiB one to one with 2-MiB pages (4-KiB pages where the processor
    /// has no larger ones), and nothing else.
    pub fn identity(arena: &mut Arena, caps: EptVpidCap) -> Self {
        let ept = Self::empty(arena);
        for block in 0..512_u64 {
            let at = block << 21;
            if caps.contains(EptVpidCap::PAGE_2M) {
                ept.map(arena, L2Gpa::new(at), 2, at | LEAF | LARGE);
            } else {
                for page in 0..512 {
                    let at = at + (page << 12);
                    ept.map(arena, L2Gpa::new(at), 1, at | LEAF);
                }
            }
        }
        ept
    }

    /// A new root over the same tables for the first GiB as `self`, and nothing else.
    pub fn fork(&self, arena: &mut Arena) -> Self {
        let fork = Self::empty(arena);
        let low = self.slot(arena, L2Gpa::new(0), 3).get();
        fork.slot(arena, L2Gpa::new(0), 3).set(low);
        fork
    }

    /// The entry for `gpa` in the table of `level`, making the tables above it as needed.
    pub fn slot(&self, arena: &mut Arena, gpa: L2Gpa, level: u8) -> Slot {
        let mut slot = Slot { table: self.root, index: index(gpa, 4) };
        for below in (level..4).rev() {
            let entry = EptEntry::from(slot.get());
            let table = if entry.is_present() {
                assert!(!entry.large(), "{gpa:?} is mapped by a larger page");
                Page::at(entry.address())
            } else {
                let table = arena.page();
                slot.set(table.address() | TABLE);
                table
            };
            slot = Slot { table, index: index(gpa, below) };
        }
        slot
    }

    /// Sets the entry for `gpa` in the table of `level` to `entry`, whatever that is.
    pub fn map(&self, arena: &mut Arena, gpa: L2Gpa, level: u8, entry: u64) -> Slot {
        let slot = self.slot(arena, gpa, level);
        slot.set(entry);
        slot
    }

    /// Its EPTP, with or without accessed and dirty flags.
    pub fn eptp(&self, ad: bool) -> u64 {
        self.root.address() | EPTP_FLAGS | if ad { AD } else { 0 }
    }
}
