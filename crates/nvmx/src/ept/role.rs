//! What decides the content of a shadow table besides the L1 table it is composed from?

use vmx_defs::ept::{EptEntry, Eptp};

/// The role of a shadow table, packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Role(u16);

const ACCESSED_DIRTY: u16 = 1 << 0;
const SPLIT: u16 = 1 << 1;
/// Bits 8:2: bits 6:0 of the large page's entry (rights, memory type, ignore-PAT).
const SPLIT_SHIFT: u16 = 2;
/// Bits 11:9: the EPTP's memory type, of a PML4 table only: each EPTP value has its own root.
const EPTP_SHIFT: u16 = 9;

impl Role {
    /// The role that no live table has.
    pub(super) const NONE: Self = Self(u16::MAX);

    /// Role of the PML4 table of a root.
    pub(super) fn root(eptp: Eptp) -> Self {
        Self(u16::from(eptp.accessed_dirty()) | u16::from(eptp.memory_type()) << EPTP_SHIFT)
    }

    /// Role of a table that a table of this role points to.
    pub(super) fn child(self) -> Self {
        Self(self.0 & ACCESSED_DIRTY)
    }

    /// Role of the table that a large page is split into: `entry` is the composed entry that could
    /// not be used at its own size.
    pub(super) fn split(self, entry: EptEntry) -> Self {
        Self(self.0 & ACCESSED_DIRTY | SPLIT | ((entry.into_bits() & 0x7f) as u16) << SPLIT_SHIFT)
    }

    /// Whether L1's accessed and dirty flags are in use.
    #[inline]
    pub(super) fn accessed_dirty(self) -> bool {
        self.0 & ACCESSED_DIRTY != 0
    }

    /// Bits 6:0 of the large page's entry, if this is the role of a split page's table.
    #[inline]
    pub(super) fn split_attributes(self) -> Option<u64> {
        (self.0 & SPLIT != 0).then_some(u64::from(self.0 >> SPLIT_SHIFT & 0x7f))
    }

    /// The packed value, for hashing.
    #[inline]
    pub(super) fn bits(self) -> u16 {
        self.0
    }
}
