//! What do an EPT pointer and the entries of EPT paging structures mean?
//!
//! SDM Vol. 3C, "Extended-Page-Table Pointer (EPTP)" and "The Extended Page Table Mechanism
//! (EPT)". Only values are judged here; walking tables is the business of whoever owns the memory.

use crate::msr::EptVpidCap;
use bitfield_struct::bitfield;
use bitflags::bitflags;

/// Memory types as EPT entries and MTRRs encode them.
pub mod memory_type {
    /// Uncacheable.
    pub const UC: u8 = 0;
    /// Write combining.
    pub const WC: u8 = 1;
    /// Write through.
    pub const WT: u8 = 4;
    /// Write protected.
    pub const WP: u8 = 5;
    /// Write back.
    pub const WB: u8 = 6;

    /// Whether the 3-bit encoding is one that an EPT leaf may have (2, 3 and 7 are reserved).
    #[inline]
    pub const fn is_valid(kind: u8) -> bool {
        matches!(kind, UC | WC | WT | WP | WB)
    }
}

/// Bits 11:0 and the address of an EPT pointer, as the EPTP field and each EPTP-list entry hold it.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Eptp {
    /// Memory type of the EPT paging structures: 0 (UC) or 6 (WB).
    #[bits(3)]
    pub memory_type: u8,
    /// Page-walk length minus 1.
    #[bits(3)]
    pub walk_length_minus_1: u8,
    /// Accessed and dirty flags are enabled; also makes guest page walks count as writes.
    pub accessed_dirty: bool,
    /// Access rights for supervisor shadow-stack pages are enforced.
    pub supervisor_shadow_stack: bool,
    #[bits(4)]
    pub reserved: u8,
    /// Bits 51:12: page frame of the EPT PML4 table. This is EP4TA, the tag of cached mappings.
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    pub reserved_high: u16,
}

impl Eptp {
    /// The physical address of the EPT PML4 table (bits 51:12 in place).
    #[inline]
    pub const fn table(self) -> u64 {
        self.frame() << 12
    }

    /// Whether a processor with these EPT capabilities and physical-address width accepts the
    /// EPTP, at VM entry and equally in VMFUNC leaf 0 (SDM Vol. 3C, "VM-Execution Control Fields"
    /// under "Checks on VMX Controls", and "EPTP Switching").
    #[inline]
    pub const fn is_valid(self, caps: EptVpidCap, physical_width: u8) -> bool {
        let memory_type = match self.memory_type() {
            memory_type::UC => caps.contains(EptVpidCap::MEMORY_TYPE_UC),
            memory_type::WB => caps.contains(EptVpidCap::MEMORY_TYPE_WB),
            _ => false,
        };
        let walk = match self.walk_length_minus_1() {
            3 => caps.contains(EptVpidCap::WALK_LENGTH_4),
            4 => caps.contains(EptVpidCap::WALK_LENGTH_5),
            _ => false,
        };
        let flags = (!self.accessed_dirty() || caps.contains(EptVpidCap::ACCESSED_DIRTY))
            && (!self.supervisor_shadow_stack()
                || caps.contains(EptVpidCap::SUPERVISOR_SHADOW_STACK));
        let width = physical_width >= 52 || self.table() >> physical_width == 0;
        memory_type && walk && flags && width && self.reserved() == 0 && self.reserved_high() == 0
    }
}

bitflags! {
    /// Access rights of an EPT entry (bits 2:0), and equally the accesses of an exit qualification.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
    pub struct EptPermissions: u8 {
        /// Read.
        const READ = 1 << 0;
        /// Write.
        const WRITE = 1 << 1;
        /// Instruction fetch (supervisor, where mode-based execute control is on).
        const EXECUTE = 1 << 2;
    }
}

/// An entry of an EPT paging structure, at any level.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EptEntry {
    /// Reads are allowed.
    pub read: bool,
    /// Writes are allowed.
    pub write: bool,
    /// Instruction fetches are allowed.
    pub execute: bool,
    /// Memory type (leaf entries only).
    #[bits(3)]
    pub memory_type: u8,
    /// The guest's PAT is ignored (leaf entries only).
    pub ignore_pat: bool,
    /// The entry maps a page (levels 2 and 3).
    pub large: bool,
    /// Accessed, where the EPTP enables it.
    pub accessed: bool,
    /// Dirty (leaf entries), where the EPTP enables it.
    pub dirty: bool,
    /// Fetches in user mode are allowed, where mode-based execute control is on.
    pub user_execute: bool,
    #[bits(1)]
    __: u8,
    /// Bits 51:12: frame of the next table or of the page; low bits are reserved in large pages.
    #[bits(40)]
    pub frame: u64,
    #[bits(11)]
    __: u16,
    /// Suppress #VE (bit 63).
    pub suppress_ve: bool,
}

/// Whether an entry of an EPT paging structure is a way on, the end of the walk, or neither.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EptEntryClass {
    /// Bits 2:0 are 0 (and bit 10, where it has a meaning): nothing is mapped.
    NotPresent,
    /// A setting that the architecture reserves: EPT misconfiguration.
    Misconfigured,
    /// Points to a table of the next lower level.
    Table,
    /// Maps a page.
    Page,
}

impl EptEntry {
    /// Access rights of this entry alone.
    #[inline]
    pub const fn permissions(self) -> EptPermissions {
        EptPermissions::from_bits_truncate(self.into_bits() as u8 & 7)
    }

    /// Whether bits 2:0 are not all 0.
    #[inline]
    pub const fn is_present(self) -> bool {
        self.into_bits() & 7 != 0
    }

    /// The address that the entry holds (bits 51:12 in place).
    #[inline]
    pub const fn address(self) -> u64 {
        self.frame() << 12
    }

    /// Classifies an entry of a table of `level` (4 is the EPT PML4 table, 1 the EPT page table) on
    /// a processor with these EPT capabilities and physical-address width (SDM Vol. 3C, "EPT
    /// Misconfigurations", and the tables of entry formats).
    #[inline]
    pub const fn classify(self, level: u8, caps: EptVpidCap, physical_width: u8) -> EptEntryClass {
        let bits = self.into_bits();
        match bits & 7 {
            0 => return EptEntryClass::NotPresent,
            // Write without read, with or without execute.
            2 | 6 => return EptEntryClass::Misconfigured,
            4 if !caps.contains(EptVpidCap::EXECUTE_ONLY) => return EptEntryClass::Misconfigured,
            _ => {}
        }
        if physical_width < 52 && self.address() >> physical_width != 0 {
            return EptEntryClass::Misconfigured;
        }
        let page = match level {
            1 => true,
            2 if self.large() => {
                if !caps.contains(EptVpidCap::PAGE_2M) || bits & 0x1f_f000 != 0 {
                    return EptEntryClass::Misconfigured;
                }
                true
            }
            3 if self.large() => {
                if !caps.contains(EptVpidCap::PAGE_1G) || bits & 0x3fff_f000 != 0 {
                    return EptEntryClass::Misconfigured;
                }
                true
            }
            _ => false,
        };
        if page {
            if memory_type::is_valid(self.memory_type()) {
                EptEntryClass::Page
            } else {
                EptEntryClass::Misconfigured
            }
        } else {
            // Bits 7:3 are reserved where the entry points to a table: bit 7 distinguishes pages at
            // levels 2 and 3, and at level 4 there are none.
            if bits & 0xf8 != 0 { EptEntryClass::Misconfigured } else { EptEntryClass::Table }
        }
    }
}

/// Exit qualification of an EPT violation (SDM Vol. 3C, "Exit Qualification for EPT Violations").
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EptViolation {
    /// The access was a data read.
    pub read: bool,
    /// The access was a data write.
    pub write: bool,
    /// The access was an instruction fetch.
    pub fetch: bool,
    /// The guest-physical address was readable.
    pub readable: bool,
    /// The guest-physical address was writable.
    pub writable: bool,
    /// The guest-physical address was executable.
    pub executable: bool,
    /// ... for user-mode linear addresses, with mode-based execute control.
    pub user_executable: bool,
    /// The guest-linear address field is valid.
    pub linear_valid: bool,
    /// The access was to the translation of a linear address, not to a paging structure on the way.
    pub translated: bool,
    /// Advanced information: the linear address is a user-mode one.
    pub user_linear: bool,
    /// Advanced information: the page is writable by paging.
    pub linear_writable: bool,
    /// Advanced information: the page is execute-disabled by paging.
    pub linear_execute_disabled: bool,
    /// NMI unblocking due to IRET.
    pub nmi_unblocking: bool,
    /// Shadow-stack access.
    pub shadow_stack: bool,
    #[bits(50)]
    __: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: EptVpidCap = EptVpidCap::EXECUTE_ONLY
        .union(EptVpidCap::WALK_LENGTH_4)
        .union(EptVpidCap::MEMORY_TYPE_WB)
        .union(EptVpidCap::PAGE_2M)
        .union(EptVpidCap::PAGE_1G)
        .union(EptVpidCap::ACCESSED_DIRTY);

    #[test]
    fn eptp_validity_bit_by_bit() {
        let good = Eptp::from(0x1234_5000 | 3 << 3 | 6);
        assert!(good.is_valid(CAPS, 40));
        assert_eq!(good.table(), 0x1234_5000);
        for bit in 0..64 {
            let flipped = Eptp::from(u64::from(good) ^ 1 << bit);
            let expected = matches!(bit, 6 | 12..=39);
            assert_eq!(flipped.is_valid(CAPS, 40), expected, "bit {bit}");
        }
        assert!(!good.with_accessed_dirty(true).is_valid(CAPS - EptVpidCap::ACCESSED_DIRTY, 40));
    }

    #[test]
    fn entry_classes() {
        let class = |bits: u64, level| EptEntry::from(bits).classify(level, CAPS, 40);
        assert_eq!(class(0x1000, 1), EptEntryClass::NotPresent);
        for level in 1..=4 {
            assert_eq!(class(2, level), EptEntryClass::Misconfigured);
            assert_eq!(class(6, level), EptEntryClass::Misconfigured);
            assert_eq!(class(7 | 1 << 40, level), EptEntryClass::Misconfigured);
        }
        assert_eq!(class(0x1007 | 6 << 3, 1), EptEntryClass::Page);
        assert_eq!(class(0x1007 | 2 << 3, 1), EptEntryClass::Misconfigured);
        assert_eq!(class(0x1007, 2), EptEntryClass::Table);
        assert_eq!(class(0x1007 | 1 << 3, 2), EptEntryClass::Misconfigured);
        assert_eq!(class(0x20_0087 | 6 << 3, 2), EptEntryClass::Page);
        assert_eq!(class(0x20_1087 | 6 << 3, 2), EptEntryClass::Misconfigured);
        assert_eq!(class(0x4000_0087 | 6 << 3, 3), EptEntryClass::Page);
        assert_eq!(class(0x4020_0087 | 6 << 3, 3), EptEntryClass::Misconfigured);
        assert_eq!(class(0x1087, 4), EptEntryClass::Misconfigured);
        let no_x = EptEntry::from(4).classify(1, CAPS - EptVpidCap::EXECUTE_ONLY, 40);
        assert_eq!(no_x, EptEntryClass::Misconfigured);
    }
}
