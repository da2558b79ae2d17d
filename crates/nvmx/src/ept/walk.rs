//! What does L1's EPT say about an address of L2?
//!
//! The walk of EPT12 (SDM Vol. 3C, "EPT Translation Mechanism"), on one copy of each entry.

use crate::host::L1Memory;
use vmx_defs::ept::{EptEntry, EptEntryClass, EptPermissions, EptViolation, Eptp};
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{L1Gpa, L2Gpa};

/// What a processor with these capabilities makes of EPT entries.
#[derive(Clone, Copy, Debug)]
pub struct WalkRules {
    /// EPT capabilities that L1 is offered.
    pub caps: EptVpidCap,
    /// Physical-address width in bits.
    pub physical_width: u8,
}

/// One entry met on a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Step {
    /// Where the entry stands.
    pub at: L1Gpa,
    /// The copy that was judged.
    pub entry: EptEntry,
}

/// The entries of a walk, from level 4 down.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Path {
    steps: [Step; 4],
    len: u8,
}

impl Path {
    fn push(&mut self, step: Step) {
        if let Some(slot) = self.steps.get_mut(usize::from(self.len)) {
            *slot = step;
            self.len += 1;
        }
    }

    /// The entries, the one of the PML4 table first.
    pub fn steps(&self) -> &[Step] {
        self.steps.get(..usize::from(self.len)).unwrap_or(&[])
    }

    /// The entries, to be changed.
    pub(super) fn steps_mut(&mut self) -> &mut [Step] {
        self.steps.get_mut(..usize::from(self.len)).unwrap_or(&mut [])
    }

    /// Where L1's tables take `gpa`, on a path that ends in a page.
    pub fn target(&self, gpa: L2Gpa) -> L1Gpa {
        let level = 5u8.saturating_sub(self.len);
        let within = (1u64 << shift(level)) - 1;
        let page = self.steps().last().map_or(0, |leaf| leaf.entry.address());
        L1Gpa::new(page & !within | gpa.as_u64() & within)
    }

    /// Rights along the path: the AND of all entries, so none where one is not present.
    pub fn permissions(&self) -> EptPermissions {
        self.steps().iter().fold(EptPermissions::all(), |all, step| all & step.entry.permissions())
    }
}

/// How a walk ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Walk {
    /// An entry on the path is not present: EPT violation, whatever the access.
    NotPresent(Path),
    /// An entry on the path is misconfigured.
    Misconfigured(Path),
    /// The last entry maps a page. Whether its rights suffice is not decided yet.
    Page(Path),
}

/// The index into a table of `level` that an address selects.
#[inline]
pub(super) fn index(gpa: L2Gpa, level: u8) -> usize {
    (gpa.as_u64() >> shift(level)) as usize & 511
}

/// Log2 of the size in bytes that an entry of a table of `level` covers.
#[inline]
pub(super) fn shift(level: u8) -> u32 {
    3 + 9 * u32::from(level)
}

/// Walks EPT12 for `gpa`. Bits of `gpa` beyond 48 are the caller's to refuse.
pub fn walk(memory: &mut impl L1Memory, rules: WalkRules, eptp: Eptp, gpa: L2Gpa) -> Walk {
    let mut table = eptp.table();
    let mut path = Path::default();
    let mut level = 4;
    loop {
        let at = L1Gpa::new(table | (index(gpa, level) as u64) << 3);
        let entry = EptEntry::from(memory.read_u64(at));
        path.push(Step { at, entry });
        match entry.classify(level, rules.caps, rules.physical_width) {
            EptEntryClass::NotPresent => return Walk::NotPresent(path),
            EptEntryClass::Misconfigured => return Walk::Misconfigured(path),
            EptEntryClass::Page => return Walk::Page(path),
            EptEntryClass::Table => table = entry.address(),
        }
        level -= 1;
        if level == 0 {
            // A level-1 entry is never classified as a table.
            return Walk::Misconfigured(path);
        }
    }
}

/// The access that the hardware reported, as rights that the path must have. With accessed and
/// dirty flags a paging-structure access counts as a write too (SDM Vol. 3C, "EPT Violations").
pub(crate) fn wanted(qualification: EptViolation, accessed_dirty: bool) -> EptPermissions {
    let mut wanted = EptPermissions::from_bits_truncate(qualification.into_bits() as u8 & 7);
    if accessed_dirty && qualification.linear_valid() && !qualification.translated() {
        wanted |= EptPermissions::READ | EptPermissions::WRITE;
    }
    wanted
}

/// The qualification that L1 gets: the access from the hardware, the rights from L1's own tables.
pub(super) fn qualification(
    hardware: EptViolation,
    rights: EptPermissions,
    accessed_dirty: bool,
) -> EptViolation {
    let wanted = wanted(hardware, accessed_dirty);
    hardware
        .with_read(wanted.contains(EptPermissions::READ))
        .with_write(wanted.contains(EptPermissions::WRITE))
        .with_fetch(wanted.contains(EptPermissions::EXECUTE))
        .with_readable(rights.contains(EptPermissions::READ))
        .with_writable(rights.contains(EptPermissions::WRITE))
        .with_executable(rights.contains(EptPermissions::EXECUTE))
        .with_user_executable(false)
}
