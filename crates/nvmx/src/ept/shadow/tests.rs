//! Is the shadow EPT what L1's EPT and EPT01 say, never more, and does no frame get lost?

use super::super::walk::shift;
use super::*;
use crate::caps::tests::rich_caps;
use crate::host::{Frames, L1Memory};
use crate::testing::TestHost;
use alloc::vec::Vec;
use vmx_defs::ept::EptEntryClass;

const R: u64 = 1;
const W: u64 = 2;
const X: u64 = 4;
const RWX: u64 = 7;
/// Write-back, in a leaf.
const WB: u64 = 6 << 3;
const LARGE: u64 = 1 << 7;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;

const READ: EptViolation = EptViolation::new().with_read(true);
const WRITE: EptViolation = EptViolation::new().with_write(true);
const FETCH: EptViolation = EptViolation::new().with_fetch(true);

/// First frame of the pool.
const POOL: u64 = 0x4000_0000;

/// What an address is mapped to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mapped {
    pub(super) hpa: u64,
    pub(super) rights: u64,
    /// Bits 6:3 of the leaf.
    pub(super) kind: u64,
    pub(super) level: u8,
}

/// L1 with its EPT in memory, and the shadow.
pub(super) struct Bed {
    pub(super) host: TestHost,
    pub(super) shadow: Shadow,
    /// Next L1 page that holds no table yet.
    next: u64,
}

/// The real address of L1's `gpa`.
fn real(gpa: u64) -> u64 {
    TestHost::HPA_OF_L1 + gpa
}

pub(super) fn rules() -> WalkRules {
    let caps = rich_caps();
    WalkRules { caps: caps.ept_vpid, physical_width: caps.physical_width }
}

impl Bed {
    fn new() -> Self {
        Self::with(64, 16, 2)
    }

    pub(super) fn with(frames: u32, roots: u32, processors: usize) -> Self {
        let shadow = Shadow::new(rules(), Hpa::new(POOL), frames, roots, processors);
        Self { host: TestHost::new(0x20_0000), shadow, next: 0x1000 }
    }

    /// A page of L1 for a table, all zeros.
    fn page(&mut self) -> u64 {
        let page = self.next;
        self.next += 0x1000;
        page
    }

    /// An EPTP of an empty PML4 table.
    fn eptp(&mut self, accessed_dirty: bool) -> Eptp {
        let page = self.page();
        eptp(page, accessed_dirty)
    }

    pub(super) fn put(&mut self, table: u64, index: usize, entry: u64) {
        self.host.ram.write_u64(L1Gpa::new(table + 8 * index as u64), entry);
    }

    pub(super) fn get(&mut self, table: u64, index: usize) -> u64 {
        self.host.ram.read_u64(L1Gpa::new(table + 8 * index as u64))
    }

    /// The L1 table of `level` on the way to `gpa`, with RWX ways made where there are none.
    fn table(&mut self, eptp: Eptp, gpa: u64, level: u8) -> u64 {
        let mut table = eptp.table();
        for above in (level + 1..=4).rev() {
            let at = index(L2Gpa::new(gpa), above);
            let mut entry = self.get(table, at);
            if entry & RWX == 0 {
                entry = self.page() | RWX;
                self.put(table, at, entry);
            }
            table = entry & 0xf_ffff_ffff_f000;
        }
        table
    }

    /// Sets the leaf of `level` for `gpa` in L1's EPT.
    fn map(&mut self, eptp: Eptp, gpa: u64, level: u8, entry: u64) {
        let table = self.table(eptp, gpa, level);
        let large = if level > 1 { LARGE } else { 0 };
        self.put(table, index(L2Gpa::new(gpa), level), entry | large);
    }

    pub(super) fn switch(&mut self, processor: usize, eptp: Eptp) -> Eptp {
        let mut hint = RootHint::default();
        let eptp02 =
            self.shadow.switch(&mut self.host, processor, eptp, &mut hint).unwrap().unwrap();
        self.shadow.enter(processor);
        self.shadow.flush_if_behind(&mut self.host, processor).unwrap();
        eptp02
    }

    /// What the processor would find in the shadow EPT; with A/D it sets the flags there.
    pub(super) fn look(&mut self, eptp02: Eptp, gpa: u64) -> Option<Mapped> {
        let mut table = Hpa::new(eptp02.table());
        let mut rights = RWX;
        for level in (1..=4).rev() {
            let at = index(L2Gpa::new(gpa), level);
            let entry = self.host.load(table, at);
            if entry & RWX == 0 {
                assert_eq!(entry, EMPTY, "an entry that maps nothing suppresses #VE");
                return None;
            }
            let class = EptEntry::from(entry).classify(level, rules().caps, 52);
            rights &= entry;
            match class {
                EptEntryClass::Table => {
                    if eptp02.accessed_dirty() {
                        self.host.store(table, at, entry | A);
                    }
                    table = Hpa::new(EptEntry::from(entry).address());
                }
                EptEntryClass::Page => {
                    let offset = gpa & ((1 << shift(level)) - 1) & !0xfff;
                    return Some(Mapped {
                        hpa: EptEntry::from(entry).address() + offset,
                        rights,
                        kind: entry & 0x78,
                        level,
                    });
                }
                other => panic!("{entry:#x} at level {level} is {other:?}"),
            }
        }
        unreachable!()
    }

    pub(super) fn root02(&self, processor: usize) -> Eptp {
        self.shadow.current(processor).unwrap().eptp02
    }

    /// L2 on `processor` accesses `gpa`: what the engine says, if the shadow denies it.
    pub(super) fn access(
        &mut self,
        processor: usize,
        gpa: u64,
        access: EptViolation,
    ) -> Option<Resolution> {
        let root = self.root02(processor);
        let needed = u64::from(wanted(access, root.accessed_dirty()).bits());
        let found = self.look(root, gpa).map_or(0, |mapped| mapped.rights);
        if found & needed == needed {
            return None;
        }
        let access = access
            .with_readable(found & R != 0)
            .with_writable(found & W != 0)
            .with_executable(found & X != 0);
        let answer =
            self.shadow.violation(&mut self.host, processor, L2Gpa::new(gpa), access).unwrap();
        self.shadow.check(&self.host);
        Some(answer)
    }

    fn filled(&mut self, processor: usize, gpa: u64, access: EptViolation) -> Mapped {
        assert_eq!(self.access(processor, gpa, access), Some(Resolution::Filled), "{gpa:#x}");
        self.look(self.root02(processor), gpa).unwrap()
    }

    /// L2 on processor 0 exits, L1 executes INVEPT and enters L2 again.
    pub(super) fn invept(&mut self, scope: Option<Eptp>) {
        let root = self.shadow.current(0).map(|root| root.eptp12);
        self.shadow.leave(0);
        self.shadow.invalidate(&mut self.host, 0, scope).unwrap();
        if let Some(root) = root {
            self.switch(0, root);
        }
        self.shadow.check(&self.host);
    }
}

pub(super) fn eptp(page: u64, accessed_dirty: bool) -> Eptp {
    Eptp::from(page | 3 << 3 | 6).with_accessed_dirty(accessed_dirty)
}

#[test]
fn s2_each_eptp_value_has_a_root_that_no_switch_discards() {
    let mut bed = Bed::with(4096, 600, 1);
    let eptps: Vec<_> = (0..128)
        .flat_map(|n| [false, true].map(|flags| eptp(0x1000 * n, flags)))
        .flat_map(|eptp| [eptp, eptp.with_memory_type(memory_type::UC)])
        .collect();
    let roots: Vec<_> = eptps.iter().map(|eptp| bed.switch(0, *eptp)).collect();
    assert_eq!(bed.shadow.usage(), (512, 512));
    for _ in 0..3 {
        for (eptp, root) in eptps.iter().zip(&roots) {
            assert_eq!(bed.switch(0, *eptp), *root);
            assert_eq!(root.accessed_dirty(), eptp.accessed_dirty());
            assert_eq!(root.memory_type(), memory_type::WB);
        }
    }
    for (n, root) in roots.iter().enumerate() {
        assert_eq!(roots.iter().position(|other| other == root), Some(n), "shared by two values");
    }
    assert_eq!(bed.shadow.counters().roots_built, 512);
    assert_eq!(bed.shadow.counters().roots_dropped, 0);
    assert!(bed.host.invepts.is_empty());
    bed.shadow.check(&bed.host);
}

#[test]
fn s2_s6_what_was_filled_survives_switches_of_this_and_of_other_roots() {
    let mut bed = Bed::new();
    let views: Vec<_> = (0..5).map(|n| (bed.eptp(n % 2 == 1), 0x10_0000 + 0x1000 * n)).collect();
    for (eptp, page) in &views {
        bed.map(*eptp, 0x5000, 1, page | RWX | WB);
        bed.switch(0, *eptp);
        assert_eq!(bed.filled(0, 0x5000, READ).hpa, real(*page));
    }
    let fills = bed.shadow.counters().fills;
    for (eptp, page) in views.iter().chain(views.iter().rev()) {
        let root = bed.switch(0, *eptp);
        assert_eq!(bed.look(root, 0x5000).unwrap().hpa, real(*page));
        bed.shadow.leave(0);
    }
    assert_eq!(bed.shadow.counters().fills, fills);
    assert!(bed.host.invepts.is_empty());
}

#[test]
fn s3_accessed_and_dirty_rules_follow_bit_6_of_the_eptp() {
    let mut bed = Bed::new();
    let plain = bed.eptp(false);
    bed.map(plain, 0x5000, 1, 0x10_0000 | RWX | WB);
    let pt = bed.table(plain, 0, 1);
    bed.switch(0, plain);
    assert_eq!(bed.filled(0, 0x5000, WRITE).rights, RWX);
    assert_eq!(bed.get(pt, 5), 0x10_0000 | RWX | WB, "no flags without bit 6");

    let flagged = plain.with_accessed_dirty(true);
    bed.switch(0, flagged);
    assert_eq!(bed.filled(0, 0x5000, READ).rights, R | X, "not dirty, so not writable");
    assert_eq!(bed.get(pt, 5), 0x10_0000 | RWX | WB | A);
    for level in 2..=4 {
        let table = bed.table(plain, 0, level);
        assert_eq!(bed.get(table, 0) & (A | D), A, "level {level}");
    }
    assert_eq!(bed.filled(0, 0x5000, WRITE).rights, RWX);
    assert_eq!(bed.get(pt, 5), 0x10_0000 | RWX | WB | A | D);
    // And back: the plain root has what it had.
    bed.switch(0, plain);
    assert_eq!(bed.access(0, 0x5000, WRITE), None);
}

#[test]
fn tables_that_l1_shares_between_eptps_are_shadowed_once() {
    let mut bed = Bed::new();
    let first = bed.eptp(false);
    bed.map(first, 0x5000, 1, 0x10_0000 | RWX | WB);
    bed.switch(0, first);
    bed.filled(0, 0x5000, READ);
    assert_eq!(bed.shadow.usage(), (4, 1));
    // A second view with a PML4 and a PDPT of its own, and the same page directory.
    let second = bed.eptp(false);
    let directory = bed.table(first, 0, 2);
    let pdpt = bed.table(second, 0, 3);
    bed.put(pdpt, 0, directory | R);
    bed.switch(0, second);
    assert_eq!(bed.filled(0, 0x5000, READ).rights, R, "its own way is read-only");
    assert_eq!(bed.shadow.usage(), (6, 2));
    // A/D is another role: nothing is shared.
    bed.switch(0, second.with_accessed_dirty(true));
    bed.filled(0, 0x5000, READ);
    assert_eq!(bed.shadow.usage(), (10, 3));
    // One re-read through either root renews the shared tables.
    bed.map(first, 0x5000, 1, 0x11_0000 | RWX | WB);
    bed.invept(Some(second));
    bed.switch(0, second);
    let root = bed.switch(0, first);
    assert_eq!(bed.look(root, 0x5000).unwrap().hpa, real(0x11_0000));
    bed.shadow.leave(0);
    bed.shadow.drop_unused(&mut bed.host, 0).unwrap();
    assert_eq!(bed.shadow.usage(), (0, 0));
    assert_eq!(bed.shadow.pool.available(), 64);
}

#[test]
fn a_fault_fills_around() {
    let mut bed = Bed::new();
    let eptp = bed.eptp(false);
    for n in 0..512 {
        let entry = if n % 7 == 0 { 0 } else { (0x10_0000 + 0x1000 * n) | RWX | WB };
        bed.map(eptp, 0x1000 * n, 1, entry);
    }
    let root = bed.switch(0, eptp);
    bed.filled(0, 0x9000, READ);
    for n in 0..512 {
        let expected = (n % 7 != 0).then(|| real(0x10_0000 + 0x1000 * n));
        assert_eq!(bed.look(root, 0x1000 * n).map(|mapped| mapped.hpa), expected);
    }
    assert_eq!(bed.shadow.counters().fills, 1);
    // In a table that is there already: the window around, and nothing that holds something.
    bed.map(eptp, 0x7000, 1, 0x1_0000 | RWX | WB);
    bed.map(eptp, 0xe000, 1, 0x2_0000 | RWX | WB);
    bed.map(eptp, 0x1_5000, 1, 0x3_0000 | RWX | WB);
    bed.map(eptp, 0x1000, 1, 0x4_0000 | RWX | WB);
    bed.filled(0, 0x7000, READ);
    assert_eq!(bed.look(root, 0xe000).unwrap().hpa, real(0x2_0000));
    assert_eq!(bed.look(root, 0x1_5000), None, "outside of the window");
    assert_eq!(bed.look(root, 0x1000).unwrap().hpa, real(0x10_1000), "a TLB may keep it");
}

#[test]
fn with_accessed_and_dirty_flags_only_flagged_neighbours_are_filled() {
    let mut bed = Bed::new();
    let eptp = bed.eptp(true);
    bed.map(eptp, 0x5000, 1, 0x10_0000 | RWX | WB);
    bed.map(eptp, 0x6000, 1, 0x10_1000 | RWX | WB);
    bed.map(eptp, 0x7000, 1, 0x10_2000 | RWX | WB | A);
    bed.map(eptp, 0x8000, 1, 0x10_3000 | RWX | WB | A | D);
    bed.map(eptp, 0x9000, 1, 0x10_4000 | RWX | WB | D);
    let root = bed.switch(0, eptp);
    bed.filled(0, 0x5000, READ);
    let rights = |bed: &mut Bed, gpa| bed.look(root, gpa).map_or(0, |mapped| mapped.rights);
    assert_eq!(rights(&mut bed, 0x6000), 0);
    assert_eq!(rights(&mut bed, 0x7000), R | X);
    assert_eq!(rights(&mut bed, 0x8000), RWX);
    assert_eq!(rights(&mut bed, 0x9000), 0);
    // What L1 clears is a reduction, taken at INVEPT.
    bed.map(eptp, 0x8000, 1, 0x10_3000 | RWX | WB | A);
    bed.map(eptp, 0x7000, 1, 0x10_2000 | RWX | WB);
    assert_eq!(rights(&mut bed, 0x8000), RWX);
    bed.invept(Some(eptp));
    assert_eq!(rights(&mut bed, 0x8000), R | X);
    assert_eq!(rights(&mut bed, 0x7000), 0);
    let pd = bed.table(eptp, 0, 2);
    let entry = bed.get(pd, 0);
    bed.put(pd, 0, entry & !A);
    bed.invept(Some(eptp));
    assert_eq!(rights(&mut bed, 0x5000), 0);
    bed.filled(0, 0x5000, READ);
    assert_eq!(bed.get(pd, 0), entry, "set again by the next use");
}

#[test]
fn permissions_are_the_and_of_the_whole_walk() {
    for level in 1..=4u8 {
        for rights in [0, R, R | W, X, R | X, RWX] {
            for (access, needed) in [(READ, R), (WRITE, W), (FETCH, X)] {
                let mut bed = Bed::new();
                let eptp = bed.eptp(false);
                bed.map(eptp, 0x5000, 1, 0x10_0000 | RWX | WB);
                let table = bed.table(eptp, 0x5000, level);
                let at = index(L2Gpa::new(0x5000), level);
                let entry = bed.get(table, at);
                bed.put(table, at, entry & !RWX | rights);
                bed.switch(0, eptp);
                let answer = bed.access(0, 0x5000, access);
                if rights & needed != 0 {
                    assert_eq!(answer, Some(Resolution::Filled));
                    assert_eq!(bed.look(bed.root02(0), 0x5000).unwrap().rights, rights);
                } else {
                    let told = access
                        .with_readable(rights & R != 0)
                        .with_writable(rights & W != 0)
                        .with_executable(rights & X != 0);
                    assert_eq!(answer, Some(Resolution::Violation(told)), "{level} {rights}");
                }
            }
        }
    }
}

#[test]
fn misconfigurations_at_each_level() {
    for level in 1..=4u8 {
        for bad in [W, W | X, RWX | 1 << 40, RWX | 1 << 51] {
            let mut bed = Bed::new();
            let eptp = bed.eptp(false);
            bed.map(eptp, 0x5000, 1, 0x10_0000 | RWX | WB);
            let table = bed.table(eptp, 0x5000, level);
            let at = index(L2Gpa::new(0x5000), level);
            let entry = bed.get(table, at);
            bed.switch(0, eptp);
            bed.put(table, at, entry & !RWX | bad);
            assert_eq!(bed.access(0, 0x5000, READ), Some(Resolution::Misconfiguration));
            assert_eq!(bed.shadow.usage().0, 1, "nothing is composed");
            bed.put(table, at, entry);
            bed.filled(0, 0x5000, READ);
            // And found by INVEPT where something is composed already.
            bed.put(table, at, entry & !RWX | bad);
            bed.invept(None);
            assert_eq!(bed.access(0, 0x5000, READ), Some(Resolution::Misconfiguration));
        }
    }
    let mut bed = Bed::new();
    let eptp = bed.eptp(false);
    bed.map(eptp, 0, 2, 0x1000 | RWX | WB);
    bed.map(eptp, 0x8000_0000, 3, 0x20_0000 | RWX | WB);
    bed.map(eptp, 0x4000_0000, 1, 0x1000 | RWX | 2 << 3);
    bed.switch(0, eptp);
    for gpa in [0, 0x8000_0000, 0x4000_0000] {
        assert_eq!(bed.access(0, gpa, READ), Some(Resolution::Misconfiguration));
    }
}

#[test]
fn memory_type_and_ignore_pat_come_from_l1s_leaf() {
    let mut bed = Bed::new();
    let eptp = bed.eptp(false);
    for (n, kind) in [0, 1, 4, 5, 6, 6 | 8].into_iter().enumerate() {
        bed.map(eptp, 0x1000 * n as u64, 1, 0x10_0000 | RWX | kind << 3);
    }
    let root = bed.switch(0, eptp);
    bed.filled(0, 0, READ);
    for (n, kind) in [0, 1, 4, 5, 6, 6 | 8].into_iter().enumerate() {
        assert_eq!(bed.look(root, 0x1000 * n as u64).unwrap().kind, kind << 3);
    }
}

#[test]
fn large_pages_stay_large_where_ept01_has_them_so() {
    for (leaf_shift, level, expected) in
        [(30, 3, 3), (30, 2, 2), (21, 3, 2), (21, 2, 2), (12, 2, 1), (12, 3, 1)]
    {
        let mut bed = Bed::new();
        bed.host.ram.leaf_shift = leaf_shift;
        let eptp = bed.eptp(false);
        bed.map(eptp, 0x4000_0000, level, 0x8000_0000 | R | X | WB);
        bed.switch(0, eptp);
        let mapped = bed.filled(0, 0x4001_2000, FETCH);
        assert_eq!(mapped.hpa, real(0x8001_2000));
        assert_eq!((mapped.rights, mapped.level), (R | X, expected));
        assert_eq!(mapped.kind, WB);
        bed.invept(None);
        assert_eq!(bed.look(bed.root02(0), 0x4001_2000), Some(mapped), "INVEPT keeps it");
    }
}

#[test]
fn a_large_page_over_hidden_memory_is_split() {
    for level in [2, 3] {
        let mut bed = Bed::new();
        bed.host.ram.leaf_shift = 30;
        bed.host.ram.hidden.push(0x8001_0000..0x8001_8000);
        let eptp = bed.eptp(false);
        bed.map(eptp, 0x4000_0000, level, 0x8000_0000 | RWX | WB);
        let root = bed.switch(0, eptp);
        assert_eq!(bed.filled(0, 0x4001_8000, WRITE).hpa, real(0x8001_8000));
        assert_eq!(bed.access(0, 0x4000_f000, WRITE), None, "filled around");
        assert_eq!(bed.access(0, 0x4001_0000, READ), None, "ones, read-only");
        assert_eq!(bed.look(root, 0x4001_0000).unwrap().hpa, TestHost::ONES);
        assert_eq!(bed.look(root, 0x4001_0000).unwrap().rights, R);
        assert_eq!(
            bed.access(0, 0x4001_7000, WRITE),
            Some(Resolution::Hidden(L1Gpa::new(0x8001_7000)))
        );
        assert_eq!(
            bed.access(0, 0x4001_7000, FETCH),
            Some(Resolution::Hidden(L1Gpa::new(0x8001_7000)))
        );
        if level == 3 {
            let clear = bed.filled(0, 0x4020_0000, WRITE);
            assert_eq!((clear.hpa, clear.level), (real(0x8020_0000), 2));
        }
        // The same page by another EPTP: the split tables are shared; other rights are not.
        let tables = bed.shadow.usage().0;
        let second = bed.eptp(false);
        bed.map(second, 0, level, 0x8000_0000 | RWX | WB);
        bed.switch(0, second);
        bed.filled(0, 0x1_8000, WRITE);
        assert_eq!(bed.shadow.usage().0, tables + 4 - usize::from(level) + 1);
        bed.map(second, 0, level, 0x8000_0000 | R | WB);
        bed.invept(Some(second));
        assert!(matches!(bed.access(0, 0x1_8000, WRITE), Some(Resolution::Violation(_))));
        assert_eq!(bed.filled(0, 0x1_8000, READ).rights, R);
        bed.switch(0, eptp);
        assert_eq!(bed.access(0, 0x4001_8000, WRITE), None);
    }
}

#[test]
fn flags_of_a_split_large_page_are_those_of_its_one_entry() {
    let mut bed = Bed::new();
    bed.host.ram.leaf_shift = 21;
    bed.host.ram.hidden.push(0x8001_0000..0x8001_8000);
    let eptp = bed.eptp(true);
    bed.map(eptp, 0, 2, 0x8000_0000 | RWX | WB);
    let pd = bed.table(eptp, 0, 2);
    bed.switch(0, eptp);
    assert_eq!(bed.filled(0, 0x3000, READ).rights, R | X);
    assert_eq!(bed.get(pd, 0) & (A | D), A);
    assert_eq!(bed.filled(0, 0x4000, WRITE).rights, RWX);
    assert_eq!(bed.get(pd, 0) & (A | D), A | D);
    assert_eq!(bed.access(0, 0x3000, WRITE), None, "one dirty flag for all of it");
    let entry = bed.get(pd, 0);
    bed.put(pd, 0, entry & !D);
    bed.invept(None);
    assert_eq!(bed.filled(0, 0x3000, WRITE).rights, RWX);
    assert_eq!(bed.get(pd, 0), entry);
}

#[test]
fn hidden_4k_pages_never_show() {
    let mut bed = Bed::new();
    bed.host.ram.hidden.push(0x1_0000..0x1_1000);
    for flags in [false, true] {
        let eptp = bed.eptp(flags);
        bed.map(eptp, 0x5000, 1, 0x1_0000 | RWX | WB);
        bed.map(eptp, 0x6000, 1, 0x1_0000 | X | WB);
        let root = bed.switch(0, eptp);
        assert_eq!(bed.access(0, 0x5000, WRITE), Some(Resolution::Hidden(L1Gpa::new(0x1_0000))));
        assert_eq!(bed.access(0, 0x6000, FETCH), Some(Resolution::Hidden(L1Gpa::new(0x1_0000))));
        assert_eq!(bed.look(root, 0x6000), None);
        assert!(bed.look(root, 0x5000).is_none_or(|mapped| mapped.rights == R));
        bed.access(0, 0x5000, READ);
        assert_eq!(bed.look(root, 0x5000).unwrap().hpa, TestHost::ONES);
    }
}

#[test]
fn an_ept_in_hidden_memory_or_past_ram_is_misconfigured_and_a_loop_ends() {
    let mut bed = Bed::new();
    bed.host.ram.hidden.push(0x1_0000..0x1_1000);
    for page in [0x1_0000, 0xff_ffff_f000] {
        bed.switch(0, eptp(page, true));
        assert_eq!(bed.access(0, 0, READ), Some(Resolution::Misconfiguration));
    }
    // The PML4 table is its own PDPT, page directory and page table.
    let looped = bed.eptp(false);
    bed.put(looped.table(), 0, looped.table() | RWX | WB);
    bed.switch(0, looped);
    assert_eq!(bed.access(0, 0, READ), Some(Resolution::Misconfiguration), "bits 5:3");
    bed.put(looped.table(), 0, looped.table() | RWX);
    let mapped = bed.filled(0, 0, WRITE);
    assert_eq!((mapped.hpa, mapped.kind), (real(looped.table()), 0));
    bed.invept(None);
    assert_eq!(bed.look(bed.root02(0), 0), Some(mapped));
}

#[test]
fn addresses_beyond_48_bits_are_violations() {
    let mut bed = Bed::new();
    let eptp = bed.eptp(true);
    bed.switch(0, eptp);
    for bit in 48..64 {
        let gpa = L2Gpa::new(1 << bit);
        let answer = bed.shadow.violation(&mut bed.host, 0, gpa, WRITE).unwrap();
        assert_eq!(answer, Resolution::Violation(WRITE));
    }
    assert!(bed.host.ram.reads.is_empty());
}

#[test]
fn the_qualification_keeps_the_access_and_takes_the_rights_from_l1() {
    let mut bed = Bed::new();
    for flags in [false, true] {
        let eptp = bed.eptp(flags);
        bed.map(eptp, 0x5000, 1, 0x10_0000 | R | WB);
        bed.switch(0, eptp);
        // A paging-structure access: the hardware may report it as the write that it counts as.
        for hardware in [READ.with_write(true), if flags { WRITE } else { WRITE.with_read(true) }] {
            let hardware = hardware.with_linear_valid(true).with_nmi_unblocking(true);
            let told = hardware.with_read(true).with_write(true).with_readable(true);
            let answer = bed.shadow.violation(&mut bed.host, 0, L2Gpa::new(0x5000), hardware);
            assert_eq!(answer, Ok(Resolution::Violation(told)));
        }
        // A read of a paging structure that may be read counts as a write with A/D.
        let walk = READ.with_linear_valid(true);
        let answer = bed.shadow.violation(&mut bed.host, 0, L2Gpa::new(0x5000), walk).unwrap();
        let told = walk.with_write(true).with_readable(true);
        assert_eq!(answer, if flags { Resolution::Violation(told) } else { Resolution::Filled });
        // The load of a PDPTE (no linear address) does not, nor the access itself.
        for read in [READ, walk.with_translated(true)] {
            let answer = bed.shadow.violation(&mut bed.host, 0, L2Gpa::new(0x5000), read);
            assert_eq!(answer, Ok(Resolution::Filled));
        }
    }
}

#[test]
fn flags_are_set_atomically_and_a_change_in_between_is_seen() {
    let mut bed = Bed::new();
    let eptp = bed.eptp(true);
    bed.map(eptp, 0x5000, 1, 0x10_0000 | RWX | WB);
    let pt = L1Gpa::new(bed.table(eptp, 0, 1) + 8 * 5);
    bed.switch(0, eptp);
    // Another processor of L1 repoints the leaf just before its flags are set.
    let pml4 = L1Gpa::new(eptp.table());
    let untouched = bed.get(eptp.table(), 0);
    bed.host.ram.interference = alloc::vec![
        (pml4, untouched),
        (L1Gpa::new(0), 0),
        (L1Gpa::new(0), 0),
        (pt, 0x11_0000 | RWX | WB),
    ];
    let mapped = bed.filled(0, 0x5000, WRITE);
    assert_eq!(mapped.hpa, real(0x11_0000));
    assert_eq!(bed.host.ram.read_u64(pt), 0x11_0000 | RWX | WB | A | D);
    assert!(bed.host.ram.interference.is_empty());
    // Taken away altogether: L1 gets the violation, and no flag.
    bed.map(eptp, 0x6000, 1, 0x10_0000 | RWX | WB);
    let other = L1Gpa::new(pt.as_u64() + 8);
    bed.host.ram.interference = alloc::vec![(other, 0)];
    assert!(matches!(bed.access(0, 0x6000, READ), Some(Resolution::Violation(_))));
    assert_eq!(bed.host.ram.read_u64(other), 0);
    // Changed for ever: the work is bounded, L2 meets the violation again.
    bed.map(eptp, 0x7000, 1, 0x10_0000 | RWX | WB);
    let third = L1Gpa::new(pt.as_u64() + 16);
    bed.host.ram.interference =
        (0..100).map(|n| (third, 0x10_0000 | ((n % 2 + 1) << 12) | RWX | WB)).collect();
    assert_eq!(bed.access(0, 0x7000, READ), Some(Resolution::Filled));
    assert!(bed.host.ram.interference.len() > 100 - 10);
    assert_eq!(bed.look(bed.root02(0), 0x7000), None);
}

#[test]
fn flags_are_set_beside_bits_of_software_that_change_all_the_time() {
    let mut bed = Bed::new();
    let eptp = bed.eptp(true);
    bed.map(eptp, 0x5000, 1, 0x10_0000 | RWX | WB);
    let pt = L1Gpa::new(bed.table(eptp, 0, 1) + 8 * 5);
    bed.switch(0, eptp);
    // The three upper levels, then the leaf thirty times.
    bed.host.ram.interference = alloc::vec![(L1Gpa::new(0), 0); 3];
    let counts = (1..=30).map(|n| (pt, 0x10_0000 | RWX | WB | n << 52));
    bed.host.ram.interference.extend(counts);
    let mapped = bed.filled(0, 0x5000, WRITE);
    assert_eq!(mapped.hpa, real(0x10_0000));
    assert_eq!(bed.host.ram.read_u64(pt), 0x10_0000 | RWX | WB | A | D | 30 << 52);
    assert!(bed.host.ram.interference.is_empty());
}

#[test]
fn invept_keeps_what_is_unchanged_and_takes_only_what_differs() {
    for flags in [false, true] {
        let mut bed = Bed::new();
        let eptp = bed.eptp(flags);
        for n in 0..64 {
            bed.map(eptp, 0x1000 * n, 1, (0x10_0000 + 0x1000 * n) | RWX | WB | A | D);
        }
        let root = bed.switch(0, eptp);
        bed.filled(0, 0, WRITE);
        let before = bed.shadow.counters();
        bed.invept(Some(eptp));
        assert_eq!(bed.shadow.counters().entries, before.entries, "A/D {flags}");
        assert_eq!(bed.host.invepts, [InvEpt::Single(root)]);
        bed.map(eptp, 0x3000, 1, 0);
        bed.map(eptp, 0x4000, 1, 0x1_0000 | R | WB | A);
        bed.map(eptp, 0x5000, 1, 0x10_5000 | R | X | WB | A);
        bed.invept(None);
        assert_eq!(bed.host.invepts, [InvEpt::Single(root), InvEpt::All]);
        assert_eq!(bed.shadow.counters().entries, before.entries + 2);
        assert_eq!(bed.look(root, 0x3000), None);
        assert_eq!(bed.look(root, 0x4000).unwrap().hpa, real(0x1_0000));
        assert_eq!(bed.look(root, 0x5000).unwrap().rights, R | X);
        assert_eq!(bed.look(root, 0x6000).unwrap().hpa, real(0x10_6000));
        assert_eq!(bed.shadow.counters().fills, before.fills);
    }
}

#[test]
fn invept_of_one_ep4ta_covers_every_eptp_value_that_has_it_and_no_other() {
    let mut bed = Bed::new();
    let base = bed.eptp(false);
    let other = bed.eptp(false);
    let values = Shadow::siblings(base);
    bed.map(base, 0x5000, 1, 0x10_0000 | RWX | WB | A | D);
    bed.map(other, 0x5000, 1, 0x10_0000 | RWX | WB);
    for eptp in values.into_iter().chain([other]) {
        bed.switch(0, eptp);
        bed.filled(0, 0x5000, READ);
    }
    bed.map(base, 0x5000, 1, 0);
    bed.map(other, 0x5000, 1, 0);
    bed.invept(Some(values[3]));
    for eptp in values {
        let root = bed.switch(0, eptp);
        assert_eq!(bed.look(root, 0x5000), None);
        assert!(bed.host.invepts.contains(&InvEpt::Single(root)));
    }
    let root = bed.switch(0, other);
    assert!(bed.look(root, 0x5000).is_some(), "may be stale, and is not worth the work");
    assert!(!bed.host.invepts.contains(&InvEpt::Single(root)));
    bed.invept(None);
    assert_eq!(bed.look(root, 0x5000), None);
}

#[test]
fn invept_follows_what_became_of_a_table() {
    let mut bed = Bed::new();
    let eptp = bed.eptp(false);
    bed.host.ram.leaf_shift = 21;
    bed.map(eptp, 0x5000, 1, 0x10_0000 | RWX | WB);
    let pd = bed.table(eptp, 0, 2);
    let root = bed.switch(0, eptp);
    bed.filled(0, 0x5000, READ);
    let to_table = bed.get(pd, 0);
    // Table to large page, to another table, to nothing.
    bed.put(pd, 0, 0x20_0000 | RWX | WB | LARGE);
    bed.invept(None);
    let mapped = bed.look(root, 0x5000).unwrap();
    assert_eq!((mapped.hpa, mapped.level), (real(0x20_5000), 2));
    bed.put(pd, 0, to_table);
    bed.invept(None);
    assert_eq!(bed.look(root, 0x5000), None);
    bed.filled(0, 0x5000, READ);
    let page = bed.page();
    bed.put(pd, 0, page | RWX);
    bed.invept(None);
    assert_eq!(bed.look(root, 0x5000), None);
    bed.put(page, 5, 0x11_0000 | RWX | WB);
    assert_eq!(bed.filled(0, 0x5000, READ).hpa, real(0x11_0000));
    bed.put(pd, 0, 0);
    bed.invept(None);
    assert_eq!(bed.look(root, 0x5000), None);
    assert_eq!(bed.shadow.usage().0, 3);
}

#[test]
fn a_reflected_violation_is_forgotten_in_every_sibling_root() {
    let mut bed = Bed::new();
    let base = bed.eptp(false);
    let values = Shadow::siblings(base);
    bed.map(base, 0x5000, 1, 0x10_0000 | R | WB | A);
    let roots: Vec<_> = values
        .into_iter()
        .map(|eptp| {
            let root = bed.switch(0, eptp);
            bed.filled(0, 0x5000, READ);
            root
        })
        .collect();
    bed.switch(0, values[1]);
    assert!(matches!(bed.access(0, 0x5000, WRITE), Some(Resolution::Violation(_))));
    for root in &roots {
        assert_eq!(bed.look(*root, 0x5000), None);
        assert_eq!(bed.host.invepts.contains(&InvEpt::Single(*root)), *root != roots[1]);
    }
    // L1 repoints it without INVEPT; the next read sees that.
    bed.map(base, 0x5000, 1, 0x11_0000 | R | WB);
    assert_eq!(bed.filled(0, 0x5000, READ).hpa, real(0x11_0000));
}

#[test]
fn a_reflected_violation_forgets_the_whole_way_down() {
    let mut bed = Bed::new();
    let (first, second) = (bed.eptp(false), bed.eptp(false));
    bed.map(first, 0x6000, 1, 0x10_0000 | RWX | WB);
    let shared = bed.table(first, 0, 1);
    let (pd1, pd2) = (bed.table(first, 0, 2), bed.table(second, 0, 2));
    bed.put(pd2, 0, shared | RWX);
    bed.switch(0, first);
    bed.filled(0, 0x6000, READ);
    // L1 takes the page table out of the first view; L2 meets it at an address not yet filled.
    bed.put(pd1, 0, 0);
    assert!(matches!(bed.access(0, 0x5000, READ), Some(Resolution::Violation(_))));
    // It puts another one there without INVEPT. Meanwhile the second view fills the old table.
    let renewed = bed.page();
    bed.put(renewed, 5, 0x11_0000 | RWX | WB);
    bed.put(pd1, 0, renewed | RWX);
    bed.put(shared, 5, 0x12_0000 | RWX | WB);
    bed.switch(1, second);
    assert_eq!(bed.filled(1, 0x5000, READ).hpa, real(0x12_0000));
    assert_eq!(bed.filled(0, 0x5000, READ).hpa, real(0x11_0000), "not through the old table");
}

#[test]
fn a_table_that_another_processor_linked_into_a_root_is_composed_anew_there() {
    let mut bed = Bed::new();
    bed.host.ram.leaf_shift = 21;
    let first = bed.eptp(false);
    bed.map(first, 0, 2, RWX | WB);
    bed.switch(0, first);
    bed.filled(0, 0x5000, READ);
    // A second root comes to share the tables, on processor 0 only.
    let second = first.with_memory_type(memory_type::UC);
    bed.switch(0, second);
    bed.filled(0, 0x5000, READ);
    // Processor 1 has never run on this EP4TA: it can have nothing cached.
    bed.map(first, 0, 2, 0x20_0000 | RWX | WB);
    let root = bed.switch(1, second);
    assert!(bed.look(root, 0x5000).is_none_or(|mapped| mapped.hpa == real(0x20_5000)));
}

#[test]
fn roots_are_reclaimed_oldest_first_and_never_one_that_runs() {
    let mut bed = Bed::with(256, 4, 2);
    let eptps: Vec<_> = (0..6).map(|_| bed.eptp(false)).collect();
    bed.switch(1, eptps[0]);
    for eptp in &eptps[1..4] {
        bed.switch(0, *eptp);
    }
    bed.switch(0, eptps[1]);
    // All four are taken: 0 and 1 run, 2 is older than 3.
    bed.switch(0, eptps[4]);
    assert!(bed.shadow.find_root(eptps[2]).is_none());
    for kept in [0, 1, 3, 4] {
        assert!(bed.shadow.find_root(eptps[kept]).is_some(), "{kept}");
    }
    bed.switch(0, eptps[5]);
    assert!(bed.shadow.find_root(eptps[3]).is_none());
    bed.shadow.check(&bed.host);
}

#[test]
fn a_small_pool_serves_a_large_ept_frame_by_frame() {
    let mut bed = Bed::with(16, 4, 1);
    let eptp = bed.eptp(false);
    for n in 0..64u64 {
        bed.map(eptp, n << 21, 1, (0x10_0000 + 0x1000 * n) | RWX | WB);
    }
    bed.switch(0, eptp);
    for round in 0..3 {
        for n in 0..64u64 {
            if let Some(answer) = bed.access(0, n << 21, READ) {
                assert_eq!(answer, Resolution::Filled);
            }
            let mapped = bed.look(bed.root02(0), n << 21).unwrap();
            assert_eq!(mapped.hpa, real(0x10_0000 + 0x1000 * n), "round {round}");
        }
    }
    assert_eq!(bed.shadow.counters().roots_built, 1);
    bed.shadow.leave(0);
    bed.shadow.drop_unused(&mut bed.host, 0).unwrap();
    assert_eq!(bed.shadow.pool.available(), 16);
}

#[test]
fn a_processor_waits_for_frames_that_others_hold_and_gets_them() {
    let mut bed = Bed::with(16, 32, 2);
    let eptps: Vec<_> = (0..20).map(|_| bed.eptp(false)).collect();
    bed.map(eptps[0], 0, 1, 0x10_0000 | RWX | WB);
    bed.switch(0, eptps[0]);
    bed.filled(0, 0, READ);
    // What processor 1 gives up, processor 0 may know, until it exits and flushes.
    let waits = eptps[1..].iter().position(|eptp| {
        bed.shadow.switch(&mut bed.host, 1, *eptp, &mut RootHint::default()).unwrap().is_none()
    });
    let next = eptps[1 + waits.unwrap()];
    assert_eq!(bed.shadow.switch(&mut bed.host, 1, next, &mut RootHint::default()), Ok(None));
    bed.shadow.check(&bed.host);
    assert_eq!(bed.access(0, 0, READ), None);
    bed.shadow.flush_if_behind(&mut bed.host, 0).unwrap();
    bed.switch(1, next);
    bed.shadow.check(&bed.host);
}

#[test]
fn a_switch_without_a_cache_gives_frames_back_and_spares_what_others_run_on() {
    let mut bed = Bed::with(64, 16, 2);
    let eptps: Vec<_> = (0..4).map(|_| bed.eptp(false)).collect();
    for eptp in &eptps {
        bed.map(*eptp, 0x5000, 1, 0x10_0000 | RWX | WB);
        bed.switch(0, *eptp);
        bed.filled(0, 0x5000, READ);
    }
    bed.switch(1, eptps[2]);
    let anew = |bed: &mut Bed, eptp| {
        let hint = &mut RootHint::default();
        let found = bed.shadow.switch_anew(&mut bed.host, 0, eptp, hint).unwrap();
        bed.shadow.check(&bed.host);
        found
    };
    assert!(anew(&mut bed, eptps[0]).is_some());
    assert_eq!(bed.shadow.usage(), (5, 2));
    assert_eq!(bed.access(1, 0x5000, READ), None);
    assert_eq!(bed.shadow.pool.available(), 64 - 17, "processor 1 has not flushed");
    bed.shadow.leave(1);
    bed.filled(0, 0x5000, READ);
    assert!(anew(&mut bed, eptps[0]).is_some());
    assert_eq!(bed.shadow.usage(), (1, 1), "the same is begun anew too");
    assert_eq!(bed.shadow.pool.available(), 63);
    bed.shadow.leave(0);
    bed.shadow.drop_unused(&mut bed.host, 0).unwrap();
    assert_eq!(bed.shadow.usage(), (0, 0));
    assert_eq!(bed.shadow.pool.available(), 64);
    bed.shadow.check(&bed.host);
}
