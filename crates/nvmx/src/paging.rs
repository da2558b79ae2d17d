//! Where in L1's physical memory is a linear address of L1?
//!
//! The walk of L1's own page tables that the processor would do for a supervisor-mode data access
//! of L1 (the operand of a VMX instruction, which runs at CPL 0 only), with the faults it would
//! raise and the accessed and dirty flags it would set (SDM Vol. 3A, chapter "Paging").
//!
//! We require that L1 is offered neither protection keys nor linear-address masking nor
//! linear-address-space separation: the walk knows none of them.

use crate::host::{HostResult, L1Memory, Vmx};
use vmx_defs::{Field, Gva, L1Gpa};

/// CR0.PE.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.WP.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PSE.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.LA57.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;
/// CR4.SMAP.
pub const CR4_SMAP: u64 = 1 << 21;
/// IA32_EFER.LMA.
pub const EFER_LMA: u64 = 1 << 10;
/// IA32_EFER.NXE.
pub const EFER_NXE: u64 = 1 << 11;
/// RFLAGS.TF.
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.RF.
pub const RFLAGS_RF: u64 = 1 << 16;
/// RFLAGS.VM.
pub const RFLAGS_VM: u64 = 1 << 17;
/// RFLAGS.AC.
pub const RFLAGS_AC: u64 = 1 << 18;

/// Bits of page-table entries, the same in all formats.
mod entry {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const PAGE_SIZE: u64 = 1 << 7;
    pub(super) const EXECUTE_DISABLE: u64 = 1 << 63;
    /// Bits 51:12.
    pub(super) const FRAME: u64 = 0x000f_ffff_ffff_f000;
}

/// Bits of a page fault's error code (SDM Vol. 3A, "Page-Fault Exceptions").
pub mod error_code {
    /// The fault was a protection violation, not an entry that is not present.
    pub const PRESENT: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// A reserved bit was set in a present entry.
    pub const RESERVED: u32 = 1 << 3;
}

/// How often a walk starts again because another processor of L1 changed an entry in between.
const ATTEMPTS: u32 = 8;

/// What CPUID tells L1 about address translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressSizes {
    /// Physical-address width in bits (MAXPHYADDR).
    pub physical_width: u8,
    /// 1-GByte pages exist (`CPUID.80000001H:EDX[26]`).
    pub gigabyte_pages: bool,
}

/// What a data access wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To read.
    Read,
    /// To write.
    Write,
}

/// A page fault, as L1 gets it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// The error code, of [`error_code`]'s bits.
    pub error: u32,
    /// The linear address, for CR2.
    pub address: Gva,
}

/// Why a linear address has no physical one now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Untranslated {
    /// The access raises #PF.
    Fault(PageFault),
    /// Other processors of L1 kept changing the entries on the way. Nothing has happened yet, so
    /// L1 shall execute its instruction again, as if it had been slow to begin: the work for one
    /// exit stays bounded.
    Raced,
}

/// The registers that the translation depends on (SDM Vol. 3A, "Paging Modes and Control Bits").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paging {
    /// CR0 as it acts.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4 as it acts.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// The PDPTE registers; they count with PAE paging only.
    pub pdptes: [u64; 4],
    /// Widths.
    pub sizes: AddressSizes,
}

/// The shape of the tables that a paging mode walks.
struct Format {
    /// The table that the walk begins with.
    root: u64,
    /// Number of levels to walk from it.
    levels: u8,
    /// Entries are 8 bytes, else 4.
    wide: bool,
    /// Bits that are reserved in every present entry.
    reserved: u64,
}

/// An entry that a walk used.
#[derive(Clone, Copy, Default)]
struct Used {
    at: L1Gpa,
    entry: u64,
}

/// Bits `high`:`low` set; none where `high` is below `low`.
const fn bits(high: u8, low: u8) -> u64 {
    if high < low { 0 } else { (u64::MAX >> (63 - high)) & (u64::MAX << low) }
}

impl Paging {
    /// Reads the registers of the guest whose VMCS is current.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn read(host: &mut impl Vmx, sizes: AddressSizes) -> HostResult<Self> {
        let mut paging = Self {
            cr0: host.vmread(Field::GUEST_CR0)?,
            cr3: host.vmread(Field::GUEST_CR3)?,
            cr4: host.vmread(Field::GUEST_CR4)?,
            efer: host.vmread(Field::GUEST_EFER)?,
            rflags: host.vmread(Field::GUEST_RFLAGS)?,
            pdptes: [0; 4],
            sizes,
        };
        if paging.is_pae() {
            paging.pdptes = [
                host.vmread(Field::GUEST_PDPTE0)?,
                host.vmread(Field::GUEST_PDPTE1)?,
                host.vmread(Field::GUEST_PDPTE2)?,
                host.vmread(Field::GUEST_PDPTE3)?,
            ];
        }
        Ok(paging)
    }

    /// Whether PAE paging is in use, so that the PDPTE registers count.
    #[inline]
    pub const fn is_pae(&self) -> bool {
        self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && self.efer & EFER_LMA == 0
    }

    /// Number of bits that a canonical address of 64-bit mode may differ in: 48, or 57 with 5-level
    /// paging.
    #[inline]
    pub const fn linear_width(&self) -> u8 {
        linear_width(self.cr4)
    }

    /// The physical address behind `address`, for an explicit supervisor-mode data access. Sets the
    /// accessed flags on the way, and for a write the dirty flag, in L1's tables; on a fault none
    /// (the architecture leaves open whether the walk that faults sets accessed flags).
    ///
    /// `address` is canonical in 64-bit mode and has at most 32 bits elsewhere.
    ///
    /// # Errors
    /// [`Untranslated`].
    pub fn translate(
        &self,
        memory: &mut impl L1Memory,
        address: Gva,
        access: Access,
    ) -> Result<L1Gpa, Untranslated> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(L1Gpa::new(address.as_u64()));
        }
        for _ in 0..ATTEMPTS {
            match self.walk(memory, address, access) {
                Err(Untranslated::Raced) => {}
                done => return done,
            }
        }
        Err(Untranslated::Raced)
    }

    /// One walk; [`Untranslated::Raced`] when an entry changed before its flags could be set.
    fn walk(
        &self,
        memory: &mut impl L1Memory,
        address: Gva,
        access: Access,
    ) -> Result<L1Gpa, Untranslated> {
        let linear = address.as_u64();
        let write = if access == Access::Write { error_code::WRITE } else { 0 };
        let fault = |error| Err(Untranslated::Fault(PageFault { error: error | write, address }));

        let Some(format) = self.format(linear) else {
            return fault(0);
        };
        let mut path = [Used::default(); 5];
        let mut table = format.root;
        let (mut writable, mut user) = (true, true);
        let mut found = None;
        for (used, level) in path.iter_mut().zip((1..=format.levels).rev()) {
            let (shift, at) = format.locate(table, linear, level);
            let entry = format.load(memory, at);
            if entry & entry::PRESENT == 0 {
                return fault(0);
            }
            let leaf = level == 1 || self.is_large(entry, level, &format);
            if entry & (format.reserved | self.reserved(level, leaf, &format)) != 0 {
                return fault(error_code::PRESENT | error_code::RESERVED);
            }
            writable &= entry & entry::WRITABLE != 0;
            user &= entry & entry::USER != 0;
            *used = Used { at, entry };
            if leaf {
                let offset = linear & !(u64::MAX << shift);
                found = Some((L1Gpa::new(format.page(entry, shift) | offset), level));
                break;
            }
            table = entry & entry::FRAME;
        }
        let Some((gpa, last_level)) = found else {
            // Level 1 is always a leaf, so that the loop ends with one.
            return Err(Untranslated::Raced);
        };

        // SDM Vol. 3A, "Determination of Access Rights", explicit supervisor-mode data accesses.
        let smap_denies = user && self.cr4 & CR4_SMAP != 0 && self.rflags & RFLAGS_AC == 0;
        let write_denied = access == Access::Write && !writable && self.cr0 & CR0_WP != 0;
        if smap_denies || write_denied {
            return fault(error_code::PRESENT);
        }

        // SDM Vol. 3A, "Accessed and Dirty Flags". From the root on, so that the dirty flag of the
        // page comes last, when nothing above has changed.
        for (used, level) in path.iter().zip((last_level..=format.levels).rev()) {
            let dirty = level == last_level && access == Access::Write;
            let flags = entry::ACCESSED | if dirty { entry::DIRTY } else { 0 };
            if used.entry & flags != flags && !format.set(memory, *used, flags) {
                return Err(Untranslated::Raced);
            }
        }
        Ok(gpa)
    }

    /// The tables of the mode in use. `None` where PAE paging's PDPTE for `linear` is not present.
    fn format(&self, linear: u64) -> Option<Format> {
        if self.cr4 & CR4_PAE == 0 && self.efer & EFER_LMA == 0 {
            let root = self.cr3 & 0xffff_f000;
            return Some(Format { root, levels: 2, wide: false, reserved: 0 });
        }
        let width = self.sizes.physical_width;
        let no_execute = if self.efer & EFER_NXE == 0 { entry::EXECUTE_DISABLE } else { 0 };
        if self.efer & EFER_LMA == 0 {
            // The reserved bits of a PDPTE were checked when the register was loaded.
            let pdpte = self.pdptes.get((linear >> 30 & 3) as usize)?;
            return (pdpte & entry::PRESENT != 0).then(|| Format {
                root: pdpte & entry::FRAME,
                levels: 2,
                wide: true,
                reserved: bits(62, width) | no_execute,
            });
        }
        Some(Format {
            root: self.cr3 & entry::FRAME,
            levels: if self.cr4 & CR4_LA57 != 0 { 5 } else { 4 },
            wide: true,
            reserved: bits(51, width) | no_execute,
        })
    }

    /// Whether an entry above level 1 maps a page.
    fn is_large(&self, entry: u64, level: u8, format: &Format) -> bool {
        entry & entry::PAGE_SIZE != 0
            && match level {
                2 => format.wide || self.cr4 & CR4_PSE != 0,
                3 => self.sizes.gigabyte_pages,
                _ => false,
            }
    }

    /// The bits that are reserved at this level, besides those of the format.
    fn reserved(&self, level: u8, leaf: bool, format: &Format) -> u64 {
        match (level, leaf) {
            // 4-MByte pages: with PSE-36, bits 20:13 hold the address's bits 39:32, as far as the
            // processor has them; bit 21 is always reserved.
            (2, true) if !format.wide => {
                bits(21, self.sizes.physical_width.clamp(32, 40).saturating_sub(19))
            }
            (2, true) => bits(20, 13),
            (3, true) => bits(29, 13),
            // Not a page: bit 7 is reserved where 1-GByte pages do not exist, and in the PML4E and
            // PML5E always.
            (3..=5, false) => entry::PAGE_SIZE,
            _ => 0,
        }
    }
}

impl Format {
    /// Log2 of what an entry of `level` maps, and where in `table` the one for `linear` is.
    fn locate(&self, table: u64, linear: u64, level: u8) -> (u8, L1Gpa) {
        let above = level.saturating_sub(1);
        let (shift, offset) = if self.wide {
            let shift = 12 + 9 * above;
            (shift, (linear >> shift & 0x1ff) * 8)
        } else {
            let shift = 12 + 10 * above;
            (shift, (linear >> shift & 0x3ff) * 4)
        };
        (shift, L1Gpa::new(table | offset))
    }

    fn load(&self, memory: &mut impl L1Memory, at: L1Gpa) -> u64 {
        if self.wide {
            return memory.read_u64(at);
        }
        let pair = memory.read_u64(L1Gpa::new(at.as_u64() & !7));
        if at.is_aligned(8) { pair & 0xffff_ffff } else { pair >> 32 }
    }

    /// Sets flags of an entry, unless it is another one by now.
    fn set(&self, memory: &mut impl L1Memory, used: Used, flags: u64) -> bool {
        let (old, new) = (used.entry, used.entry | flags);
        if self.wide {
            memory.compare_exchange_u64(used.at, old, new) == old
        } else {
            u64::from(memory.compare_exchange_u32(used.at, old as u32, new as u32)) == old
        }
    }

    /// The first address of the page that a leaf entry maps.
    fn page(&self, entry: u64, shift: u8) -> u64 {
        let high = if !self.wide && shift > 12 { (entry >> 13 & 0xff) << 32 } else { 0 };
        entry & entry::FRAME & (u64::MAX << shift) | high
    }
}

/// As [`Paging::linear_width`], from CR4 alone.
#[inline]
pub const fn linear_width(cr4: u64) -> u8 {
    if cr4 & CR4_LA57 != 0 { 57 } else { 48 }
}

/// Whether the address is canonical for linear addresses of `width` bits: all bits from
/// `width - 1` on are equal (SDM Vol. 1, "Canonical Addressing").
#[inline]
pub const fn is_canonical(address: u64, width: u8) -> bool {
    let unused = 64u8.saturating_sub(width) as u32 & 63;
    ((address << unused) as i64 >> unused) as u64 == address
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;
    use alloc::vec;
    use alloc::vec::Vec;

    const SIZES: AddressSizes = AddressSizes { physical_width: 40, gigabyte_pages: true };
    /// Tables of the tests: the root, and one table for each level below it.
    const TABLES: [u64; 5] = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000];
    const PAGE: u64 = 0x7_c000_0000;
    const P: u64 = entry::PRESENT;
    const W: u64 = entry::WRITABLE;
    const U: u64 = entry::USER;
    const A: u64 = entry::ACCESSED;
    const D: u64 = entry::DIRTY;
    const PS: u64 = entry::PAGE_SIZE;

    /// A paging mode, a linear address in it, and where the entry of each level is for it.
    struct Case {
        name: &'static str,
        paging: Paging,
        linear: u64,
        /// From the root down: address of the entry.
        at: Vec<u64>,
        /// Log2 of the page of each entry.
        shift: Vec<u8>,
        wide: bool,
        /// Physical address of a page that fits the format.
        page: u64,
    }

    impl Case {
        fn set(&self, ram: &mut Ram, level: usize, value: u64) {
            if self.wide {
                ram.write_u64(L1Gpa::new(self.at[level]), value);
            } else {
                ram.write(L1Gpa::new(self.at[level]), &(value as u32).to_le_bytes());
            }
        }

        fn get(&self, ram: &mut Ram, level: usize) -> u64 {
            let mut bytes = [0; 8];
            let size = if self.wide { 8 } else { 4 };
            ram.read(L1Gpa::new(self.at[level]), &mut bytes[..size]);
            u64::from_le_bytes(bytes)
        }

        /// Fills the walk down to the page at depth `last`, each entry with `flags`.
        fn build(&self, last: usize, flags: u64) -> Ram {
            let mut ram = Ram::new(0x8000);
            for level in 0..last {
                self.set(&mut ram, level, TABLES[level + 1] | flags);
            }
            let large = if last + 1 == self.at.len() { 0 } else { PS };
            self.set(&mut ram, last, self.page | flags | large);
            ram
        }

        fn leaf_depths(&self) -> Vec<usize> {
            let all = self.at.len();
            match (self.name, all) {
                ("32-bit" | "PAE", _) => vec![0, 1],
                (_, all) => vec![all - 3, all - 2, all - 1],
            }
        }

        fn translate(&self, ram: &mut Ram, access: Access) -> Result<L1Gpa, Untranslated> {
            self.paging.translate(ram, Gva::new(self.linear), access)
        }
    }

    fn base(cr4: u64, efer: u64) -> Paging {
        Paging {
            cr0: CR0_PE | CR0_PG | CR0_WP,
            cr3: TABLES[0],
            cr4,
            efer,
            rflags: 2,
            pdptes: [0, 0, TABLES[0] | P, 0],
            sizes: SIZES,
        }
    }

    fn cases() -> Vec<Case> {
        let long = |name, cr4, linear: u64, levels: usize| Case {
            name,
            paging: Paging { pdptes: [0; 4], ..base(cr4 | CR4_PAE, EFER_LMA | EFER_NXE) },
            linear,
            at: (0..levels)
                .map(|i| TABLES[i] + (linear >> (12 + 9 * (levels - 1 - i)) & 0x1ff) * 8)
                .collect(),
            shift: (0..levels).map(|i| (12 + 9 * (levels - 1 - i)) as u8).collect(),
            wide: true,
            page: PAGE,
        };
        let linear = 0xb765_4321;
        vec![
            Case {
                name: "32-bit",
                paging: base(CR4_PSE, 0),
                linear,
                at: vec![TABLES[0] + (linear >> 22) * 4, TABLES[1] + (linear >> 12 & 0x3ff) * 4],
                shift: vec![22, 12],
                wide: false,
                page: 0xc000_0000,
            },
            Case {
                name: "PAE",
                paging: base(CR4_PAE, EFER_NXE),
                linear,
                at: vec![
                    TABLES[0] + (linear >> 21 & 0x1ff) * 8,
                    TABLES[1] + (linear >> 12 & 0x1ff) * 8,
                ],
                shift: vec![21, 12],
                wide: true,
                page: PAGE,
            },
            long("4-level", 0, 0xffff_9234_5678_9abc, 4),
            long("5-level", CR4_LA57, 0xff12_3456_789a_bcde, 5),
        ]
    }

    fn fault(case: &Case, error: u32) -> Result<L1Gpa, Untranslated> {
        Err(Untranslated::Fault(PageFault { error, address: Gva::new(case.linear) }))
    }

    #[test]
    fn without_paging_linear_is_physical() {
        let paging = Paging { cr0: CR0_PE, ..base(CR4_PAE, 0) };
        let gpa = paging.translate(&mut Ram::new(0), Gva::new(0x1234_5678), Access::Write);
        assert_eq!(gpa, Ok(L1Gpa::new(0x1234_5678)));
    }

    #[test]
    fn every_mode_and_page_size_translates_and_sets_accessed_and_dirty() {
        for case in cases() {
            for last in case.leaf_depths() {
                for access in [Access::Read, Access::Write] {
                    let mut ram = case.build(last, P | W);
                    let offset = case.linear & ((1 << case.shift[last]) - 1);
                    let expected = L1Gpa::new(case.page | offset);
                    let gpa = case.translate(&mut ram, access);
                    assert_eq!(gpa, Ok(expected), "{} {last}", case.name);
                    for level in 0..=last {
                        let flags = case.get(&mut ram, level) & (A | D);
                        let dirty = if access == Access::Write && level == last { D } else { 0 };
                        assert_eq!(flags, A | dirty, "{} {last} {level}", case.name);
                    }
                    let before = ram.bytes.clone();
                    assert_eq!(case.translate(&mut ram, access), Ok(expected));
                    assert_eq!(ram.bytes, before, "flags that are set are not written again");
                }
            }
        }
    }

    #[test]
    fn an_absent_entry_at_any_level_is_a_fault_without_the_present_bit() {
        for case in cases() {
            let last = case.at.len() - 1;
            for level in 0..=last {
                let mut ram = case.build(last, P | W);
                // All other bits set: they do not count.
                case.set(&mut ram, level, !P);
                let before = ram.bytes.clone();
                assert_eq!(case.translate(&mut ram, Access::Read), fault(&case, 0));
                assert_eq!(case.translate(&mut ram, Access::Write), fault(&case, 2));
                assert_eq!(ram.bytes, before);
            }
        }
    }

    #[test]
    fn access_rights_of_all_entries_combine() {
        // One level at a time with each combination, the others with all rights; and all levels.
        for case in cases() {
            for last in case.leaf_depths() {
                for (level, rights) in (0..=last).flat_map(|l| [0, W, U, W | U].map(|r| (l, r))) {
                    for setting in 0..8 {
                        let (wp, smap, ac) = (setting & 1 != 0, setting & 2 != 0, setting & 4 != 0);
                        let mut case = Case { paging: case.paging, ..cases_like(&case) };
                        case.paging.cr0 = CR0_PE | CR0_PG | if wp { CR0_WP } else { 0 };
                        case.paging.cr4 |= if smap { CR4_SMAP } else { 0 };
                        case.paging.rflags = if ac { RFLAGS_AC } else { 0 };
                        let mut ram = case.build(last, P | W | U);
                        let old = case.get(&mut ram, level);
                        case.set(&mut ram, level, old & !(W | U) | rights);
                        let user = rights & U != 0;
                        let smap_denies = user && smap && !ac;
                        let read = case.translate(&mut ram, Access::Read);
                        if smap_denies {
                            assert_eq!(read, fault(&case, 1));
                        } else {
                            assert!(read.is_ok());
                        }
                        let write = case.translate(&mut ram, Access::Write);
                        if smap_denies || (rights & W == 0 && wp) {
                            assert_eq!(write, fault(&case, 3), "{} {level}", case.name);
                            assert_eq!(case.get(&mut ram, last) & D, 0);
                        } else {
                            assert!(write.is_ok());
                        }
                    }
                }
            }
        }
    }

    fn cases_like(case: &Case) -> Case {
        cases().into_iter().find(|other| other.name == case.name).unwrap()
    }

    #[test]
    fn reserved_bits_one_by_one() {
        for case in cases() {
            for last in case.leaf_depths() {
                for level in 0..=last {
                    for bit in 7..if case.wide { 64 } else { 32 } {
                        let mut ram = case.build(last, P | W);
                        let old = case.get(&mut ram, level);
                        if bit == 7 && (level == last || case.leaf_depths().contains(&level)) {
                            continue;
                        }
                        if level != last && (12..40).contains(&bit) {
                            // Part of the next table's address.
                            continue;
                        }
                        case.set(&mut ram, level, old | 1 << bit);
                        let leaf = level == last;
                        let shift = case.shift[level];
                        let reserved = match case.name {
                            "32-bit" => leaf && shift == 22 && bit == 21,
                            _ if leaf && (13..shift).contains(&bit) => true,
                            "PAE" => (40..63).contains(&bit),
                            _ => (40..52).contains(&bit) || bit == 7,
                        };
                        let result = case.translate(&mut ram, Access::Read);
                        let text = (case.name, last, level, bit);
                        assert_eq!(result == fault(&case, 9), reserved, "{text:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn execute_disable_is_reserved_unless_enabled() {
        for mut case in cases().into_iter().filter(|case| case.wide) {
            let last = case.at.len() - 1;
            let mut ram = case.build(last, P | W | entry::EXECUTE_DISABLE);
            assert!(case.translate(&mut ram, Access::Read).is_ok());
            case.paging.efer &= !EFER_NXE;
            assert_eq!(case.translate(&mut ram, Access::Write), fault(&case, 11));
        }
    }

    #[test]
    fn page_size_bits_depend_on_what_is_enabled() {
        let mut all = cases();
        let case = &mut all[0];
        case.paging.cr4 = 0;
        let mut ram = case.build(1, P | W);
        let old = case.get(&mut ram, 0);
        case.set(&mut ram, 0, old | PS);
        let offset = case.linear & 0xfff;
        let gpa = case.translate(&mut ram, Access::Read);
        assert_eq!(gpa, Ok(L1Gpa::new(case.page | offset)), "CR4.PSE=0: bit 7 is ignored");

        let case = &mut all[2];
        case.paging.sizes.gigabyte_pages = false;
        let mut ram = case.build(1, P | W);
        assert_eq!(case.translate(&mut ram, Access::Read), fault(case, 9));
    }

    #[test]
    fn pse_36_reaches_40_bits_and_no_further_than_the_processor() {
        let mut case = cases().remove(0);
        let mut ram = case.build(0, P | W);
        case.set(&mut ram, 0, 0xc000_0000 | 0xff << 13 | PS | P);
        let offset = case.linear & 0x3f_ffff;
        let gpa = case.translate(&mut ram, Access::Read);
        assert_eq!(gpa, Ok(L1Gpa::new(0xff_c000_0000 | offset)));
        case.paging.sizes.physical_width = 36;
        assert_eq!(case.translate(&mut ram, Access::Read), fault(&case, 9));
        case.set(&mut ram, 0, 0xc000_0000 | 0x0f << 13 | PS | P);
        assert!(case.translate(&mut ram, Access::Read).is_ok());
    }

    #[test]
    fn pae_uses_the_pdpte_registers_not_memory() {
        let mut case = cases().remove(1);
        let mut ram = case.build(1, P | W);
        case.paging.cr3 = 0x7fe0;
        assert!(case.translate(&mut ram, Access::Read).is_ok());
        case.paging.pdptes[2] = 0;
        assert_eq!(case.translate(&mut ram, Access::Write), fault(&case, 2));
    }

    #[test]
    fn an_entry_changed_by_another_processor_is_read_again() {
        for case in cases() {
            let last = case.at.len() - 1;
            let mut ram = case.build(last, P | W);
            // 8 bytes are stored; the neighbour of a 4-byte entry is not used.
            let at = case.at[last] & !7;
            let shift = if case.at[last] & 4 != 0 { 32 } else { 0 };
            ram.interference = vec![(L1Gpa::new(at), ((case.page + 0x1000) | P | W) << shift)];
            let gpa = case.translate(&mut ram, Access::Write);
            let expected = case.page + 0x1000 + (case.linear & 0xfff);
            assert_eq!(gpa, Ok(L1Gpa::new(expected)), "{}", case.name);
            let last_entry = case.get(&mut ram, last);
            assert_eq!(last_entry & (A | D), A | D);
        }
    }

    #[test]
    fn a_race_without_end_is_given_up() {
        let case = cases().remove(2);
        let mut ram = case.build(3, P | W);
        ram.interference = (1..1000)
            .map(|i| (L1Gpa::new(case.at[0]), TABLES[1] | P | W | i << 52 & 0x7ff << 52))
            .collect();
        assert_eq!(case.translate(&mut ram, Access::Write), Err(Untranslated::Raced));
    }

    #[test]
    fn tables_outside_of_ram_read_as_ones_and_fault() {
        for case in cases().into_iter().filter(|case| case.wide) {
            let mut paging = case.paging;
            paging.cr3 = 0x40_0000;
            paging.pdptes[2] = 0x40_0001;
            let result = paging.translate(&mut Ram::new(0), Gva::new(case.linear), Access::Read);
            assert_eq!(result, fault(&case, 9));
        }
    }

    #[test]
    fn canonical_addresses() {
        for (address, width, canonical) in [
            (0, 48, true),
            (0x7fff_ffff_ffff, 48, true),
            (0x8000_0000_0000, 48, false),
            (0xffff_7fff_ffff_ffff, 48, false),
            (0xffff_8000_0000_0000, 48, true),
            (u64::MAX, 48, true),
            (0x8000_0000_0000, 57, true),
            (0xff_ffff_ffff_ffff, 57, true),
            (0x100_0000_0000_0000, 57, false),
            (0xff00_0000_0000_0000, 57, true),
        ] {
            assert_eq!(is_canonical(address, width), canonical, "{address:#x} {width}");
        }
    }
}
