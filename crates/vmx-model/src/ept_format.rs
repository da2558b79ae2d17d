//! Which EPT pointers and EPT entries does the processor accept?
//!
//! Written out from the tables of formats in SDM Vol. 3C, "The Extended Page Table Mechanism (EPT)",
//! and not taken from `vmx-defs`, whose functions are what a hypervisor judges by: a mistake there
//! would be one of the hypervisor and of its oracle alike. The test holds the two against each other.

use vmx_defs::msr::EptVpidCap;

use crate::caps::ModelCaps;

/// What an entry of an EPT paging structure is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EntryFormat {
    NotPresent,
    Misconfigured,
    Table,
    Page,
}

/// Bits `high` to `low`.
const fn bits(high: u8, low: u8) -> u64 {
    if high < low { 0 } else { (u64::MAX >> (63 - high)) & (u64::MAX << low) }
}

impl ModelCaps {
    /// Whether VM entry, VMFUNC and INVEPT take this EPTP (SDM Vol. 3C, "VM-Execution Control
    /// Fields" under "Checks on VMX Controls").
    pub(crate) fn accepts_eptp(&self, eptp: u64) -> bool {
        let mut reserved = bits(11, 8) | bits(63, self.physical_width);
        for (bit, capability) in
            [(6, EptVpidCap::ACCESSED_DIRTY), (7, EptVpidCap::SUPERVISOR_SHADOW_STACK)]
        {
            if !self.ept_vpid.contains(capability) {
                reserved |= 1 << bit;
            }
        }
        // Memory type and walk length, each one less than what it says.
        let kind = match eptp & bits(2, 0) {
            0 => EptVpidCap::MEMORY_TYPE_UC,
            6 => EptVpidCap::MEMORY_TYPE_WB,
            _ => return false,
        };
        let length = match (eptp & bits(5, 3)) >> 3 {
            3 => EptVpidCap::WALK_LENGTH_4,
            4 => EptVpidCap::WALK_LENGTH_5,
            _ => return false,
        };
        eptp & reserved == 0 && self.ept_vpid.contains(kind | length)
    }

    /// What an entry of a table of `level` is: 4 for the EPT PML4 table, 1 for an EPT page table
    /// ("EPT Misconfigurations"). Mode-based execute control is not implemented.
    #[inline]
    pub(crate) fn ept_entry_format(&self, entry: u64, level: u8) -> EntryFormat {
        const READ: u64 = 1;
        const WRITE: u64 = 2;
        if entry & bits(2, 0) == 0 {
            return EntryFormat::NotPresent;
        }
        let is_page = level == 1 || level < 4 && entry >> 7 & 1 != 0;
        let reserved = match (level, is_page) {
            (1, _) => 0,
            (2, true) if self.ept_vpid.contains(EptVpidCap::PAGE_2M) => bits(20, 12),
            (3, true) if self.ept_vpid.contains(EptVpidCap::PAGE_1G) => bits(29, 12),
            (2 | 3, true) => return EntryFormat::Misconfigured,
            (4, _) => bits(7, 3),
            _ => bits(6, 3),
        };
        let reserved = reserved | bits(51, self.physical_width);
        let unreadable = entry & READ == 0
            && (entry & WRITE != 0 || !self.ept_vpid.contains(EptVpidCap::EXECUTE_ONLY));
        let no_such_type = is_page && matches!(entry >> 3 & 7, 2 | 3 | 7);
        if entry & reserved != 0 || unreadable || no_such_type {
            EntryFormat::Misconfigured
        } else if is_page {
            EntryFormat::Page
        } else {
            EntryFormat::Table
        }
    }
}

#[cfg(test)]
mod tests {
    use vmx_defs::ept::{EptEntry, EptEntryClass, Eptp};

    use super::*;

    /// Each capability that matters, there and not there, with some widths.
    fn processors() -> impl Iterator<Item = ModelCaps> {
        let optional = [
            EptVpidCap::EXECUTE_ONLY,
            EptVpidCap::PAGE_2M,
            EptVpidCap::PAGE_1G,
            EptVpidCap::ACCESSED_DIRTY,
            EptVpidCap::MEMORY_TYPE_UC,
            EptVpidCap::SUPERVISOR_SHADOW_STACK,
        ];
        (0..1u32 << optional.len()).flat_map(move |chosen| {
            [36, 40, 52].map(|physical_width| {
                let mut caps = ModelCaps { physical_width, ..ModelCaps::default() };
                for (number, capability) in optional.into_iter().enumerate() {
                    caps.ept_vpid.set(capability, chosen >> number & 1 != 0);
                }
                caps
            })
        })
    }

    /// All values of the low bits, with none or one of the others.
    fn values(low: u8) -> impl Iterator<Item = u64> {
        let high = std::iter::once(0).chain((low..64).map(|bit| 1 << bit));
        high.flat_map(move |high| (0..1 << low).map(move |low| high | low))
    }

    #[test]
    fn entries_are_judged_as_the_definitions_say() {
        for caps in processors() {
            for entry in values(8) {
                for level in 1..=4 {
                    let ours = caps.ept_entry_format(entry, level);
                    let theirs =
                        EptEntry::from(entry).classify(level, caps.ept_vpid, caps.physical_width);
                    let same = match ours {
                        EntryFormat::NotPresent => EptEntryClass::NotPresent,
                        EntryFormat::Misconfigured => EptEntryClass::Misconfigured,
                        EntryFormat::Table => EptEntryClass::Table,
                        EntryFormat::Page => EptEntryClass::Page,
                    };
                    assert_eq!(same, theirs, "{entry:#x} at level {level}, {caps:?}");
                }
            }
        }
    }

    #[test]
    fn eptps_are_judged_as_the_definitions_say() {
        for caps in processors() {
            for eptp in values(9) {
                let theirs = Eptp::from(eptp).is_valid(caps.ept_vpid, caps.physical_width);
                assert_eq!(caps.accepts_eptp(eptp), theirs, "{eptp:#x}, {caps:?}");
            }
        }
    }
}
