//! What is the shadow of one entry of L1's EPT, and which flags does L1's entry get for it?

use super::walk::{Path, Step, shift};
use crate::host::{L1Mapping, L1Memory};
use vmx_defs::ept::{EptEntry, EptPermissions};
use vmx_defs::{Hpa, L1Gpa};

/// An empty shadow entry: nothing is mapped, and #VE is suppressed, since L1 has not said that it
/// wants one (SDM Vol. 3C, "Convertible EPT Violations").
pub(super) const EMPTY: u64 = 1 << 63;

/// Accessed flag. With bit 6 of the EPTP the processor would set A and D in the shadow, where they
/// mean nothing: set from the start they cost it no locked access, and stay as composed.
const ACCESSED: u64 = 1 << 8;

/// Dirty flag.
const DIRTY: u64 = 1 << 9;

/// The shadow of an entry that maps a page.
pub(super) enum Composed {
    /// The value for this level.
    Entry(u64),
    /// EPT01 does not map the whole page alike: this entry, at a smaller size.
    Split(EptEntry),
}

/// Bits of an entry that no walk looks at, whatever is offered to L1: software's own, 56:52 and 11,
/// and the flags.
const NOT_WALKED: u64 = 0x1F << 52 | 1 << 11 | ACCESSED | DIRTY;

/// How often setting a flag starts again because another processor changed such bits of the entry.
const FLAG_RETRIES: u32 = 64;

/// Sets the accessed flags along a path and the dirty flag of its leaf in L1's memory, each in one
/// locked access (SDM Vol. 3C, "Accessed and Dirty Flags for EPT"). Returns the path as it now
/// stands, or `None` where L1 changed an entry meanwhile.
pub(super) fn set_flags(memory: &mut impl L1Memory, path: &Path, write: bool) -> Option<Path> {
    let mut set = *path;
    let count = path.steps().len();
    for (number, step) in set.steps_mut().iter_mut().enumerate() {
        let leaf = number + 1 == count;
        let mut entry = step.entry.with_accessed(true);
        if leaf && write {
            entry.set_dirty(true);
        }
        step.entry = add_flags(memory, *step, entry.into_bits())?;
    }
    Some(set)
}

/// Gives one entry the flags that `wanted` has more; returns it as it now stands. L1 may keep on
/// changing bits of its own beside them: that must not keep L2 from going on, as it would not on a
/// processor.
fn add_flags(memory: &mut impl L1Memory, step: Step, wanted: u64) -> Option<EptEntry> {
    let mut old = step.entry.into_bits();
    let flags = wanted & !old;
    for _ in 0..FLAG_RETRIES {
        let new = old | flags;
        if new == old {
            return Some(EptEntry::from(old));
        }
        let found = memory.compare_exchange_u64(step.at, old, new);
        if found == old {
            return Some(EptEntry::from(new));
        }
        if (found ^ old) & !NOT_WALKED != 0 {
            return None;
        }
        old = found;
    }
    None
}

/// A shadow entry that points to a table.
#[inline]
pub(super) fn pointer(table: Hpa, rights: EptPermissions) -> u64 {
    EMPTY | table.as_u64() | ACCESSED | u64::from(rights.bits())
}

/// The shadow of an L1 entry that maps a page of `level`, at L1 address `page`: rights of both
/// EPTs, memory type and ignore-PAT of EPT12. With accessed and dirty flags, an entry whose
/// accessed flag is clear maps nothing yet, and one whose dirty flag is clear is not writable yet.
#[inline]
pub(super) fn compose(
    memory: &mut impl L1Memory,
    entry: EptEntry,
    page: L1Gpa,
    level: u8,
    flags: bool,
) -> Composed {
    if flags && !entry.accessed() {
        return Composed::Entry(EMPTY);
    }
    compose_with(memory.translate(page), entry, level, flags)
}

/// As [`compose`], with EPT01's translation of the page; the accessed flag is not looked at.
#[inline]
pub(super) fn compose_with(
    mapping: L1Mapping,
    entry: EptEntry,
    level: u8,
    flags: bool,
) -> Composed {
    let mut rights = entry.permissions();
    if flags && !entry.dirty() {
        rights -= EptPermissions::WRITE;
    }
    // Bits 6:3: memory type and ignore-PAT.
    let kind = entry.into_bits() & 0x78;
    if u32::from(mapping.size_shift) < shift(level) {
        return Composed::Split(EptEntry::from(kind | u64::from(rights.bits())));
    }
    rights &= mapping.permissions;
    if rights.is_empty() {
        return Composed::Entry(EMPTY);
    }
    let large = u64::from(level > 1) << 7;
    let flags = ACCESSED | DIRTY;
    Composed::Entry(EMPTY | mapping.hpa.as_u64() | flags | large | kind | u64::from(rights.bits()))
}

/// A 4-KByte page that was composed, for others that differ from it by their addresses only, within
/// the block that one leaf of EPT01 maps: that leaf is contiguous, and has one set of rights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Template {
    entry: u64,
    /// The shadow entry less L1's, modulo 2^64.
    offset: u64,
    /// Address bits within the block.
    within: u64,
}

impl Template {
    /// Of L1's `entry`, composed to `value` with this translation of its page.
    pub(super) fn new(mapping: L1Mapping, entry: u64, value: u64) -> Self {
        let within = ((1_u64 << (mapping.size_shift & 63)) - 1) & !0xfff;
        Self { entry, offset: value.wrapping_sub(entry), within }
    }

    /// The shadow of `entry`, if the template says what it is.
    #[inline]
    pub(super) fn apply(&self, entry: u64) -> Option<u64> {
        ((entry ^ self.entry) & !self.within == 0).then(|| entry.wrapping_add(self.offset))
    }
}
