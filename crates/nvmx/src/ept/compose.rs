//! What is the shadow of one entry of L1's EPT, and which flags does L1's entry get for it?

use super::walk::{Path, shift};
use crate::host::L1Memory;
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
        if entry == step.entry {
            continue;
        }
        let old = step.entry.into_bits();
        if memory.compare_exchange_u64(step.at, old, entry.into_bits()) != old {
            return None;
        }
        step.entry = entry;
    }
    Some(set)
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
    let mut rights = entry.permissions();
    if flags && !entry.dirty() {
        rights -= EptPermissions::WRITE;
    }
    let mapping = memory.translate(page);
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
