//! Do page tables that are composed whole follow L1 at INVEPT, and is nothing composed that L1 did
//! not change?

use super::tests::{Bed, eptp};
use super::*;
use alloc::vec::Vec;
use proptest::prelude::*;

const ROOT: u64 = 0x1_0000;
const PAGE_TABLE: u64 = ROOT + 0x3000;
const READ: EptViolation = EptViolation::new().with_read(true);
const WRITE: EptViolation = EptViolation::new().with_write(true);
const ENTRIES: usize = 512;

/// A page that L0 hides.
const HIDDEN: u64 = 0x80_1000;

fn gpa(at: usize) -> u64 {
    (at as u64) << 12
}

/// One EPT, whose only page table is at [`PAGE_TABLE`]; EPT01 has pages of up to 2^`leaf_shift` bytes.
fn bed(flags: bool, leaf_shift: u8, entries: &[u64]) -> (Bed, Eptp) {
    let mut bed = Bed::with(64, 4, 1);
    bed.host.ram.hidden.push(HIDDEN..HIDDEN + 0x1000);
    bed.host.ram.leaf_shift = leaf_shift;
    for level in 0..3 {
        bed.put(ROOT + 0x1000 * level, 0, (ROOT + 0x1000 * (level + 1)) | 7);
    }
    for (at, entry) in entries.iter().enumerate() {
        bed.put(PAGE_TABLE, at, *entry);
    }
    let eptp = eptp(ROOT, flags);
    bed.switch(0, eptp);
    (bed, eptp)
}

/// Pages on both sides of a border of 2-MByte blocks.
fn page(number: usize) -> u64 {
    0x5f_0000 + (number as u64 % 0x100) * 0x1000
}

/// Entries that a hypervisor may have: most alike, some absent, some denied, some hidden.
fn entry() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![6 => Just(0x300u64), 1 => Just(0x100), 1 => Just(0)];
    let rights = prop_oneof![20 => Just(7u64), 1 => Just(1), 1 => Just(5), 1 => Just(2)];
    let kind = prop_oneof![20 => Just(6u64 << 3), 1 => Just(0), 1 => Just(2 << 3)];
    let target = prop_oneof![30 => (0..0x100usize).prop_map(page), 1 => Just(HIDDEN)];
    prop_oneof![
        1 => Just(0),
        12 => (flags, rights, kind, target).prop_map(|(a, b, c, d)| a | b | c | d),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_invept_makes_the_shadow_what_a_fresh_one_would_be(
        flags: bool,
        leaf_shift in prop_oneof![Just(12), Just(21)],
        entries in proptest::collection::vec(entry(), ENTRIES),
        touched in proptest::collection::vec((0..ENTRIES, any::<bool>()), 1..40),
        edits in proptest::collection::vec((0..ENTRIES, entry()), 0..12),
    ) {
        let (mut bed, eptp) = bed(flags, leaf_shift, &entries);
        let root = bed.root02(0);
        for (at, write) in touched {
            bed.access(0, gpa(at), if write { WRITE } else { READ });
        }
        for round in 0..2 {
            // What was composed, from what, and what L1 then makes of it.
            let composed: Vec<_> = (0..ENTRIES).map(|at| bed.look(root, gpa(at))).collect();
            let before: Vec<_> = (0..ENTRIES).map(|at| bed.get(PAGE_TABLE, at)).collect();
            for (at, entry) in edits.iter().skip(round) {
                bed.put(PAGE_TABLE, *at, *entry);
            }
            let count = bed.shadow.counters().entries;
            bed.invept(Some(eptp));
            let mut changed = 0;
            for at in 0..ENTRIES {
                let now = bed.look(root, gpa(at));
                let entry = bed.get(PAGE_TABLE, at);
                if entry == before[at] {
                    prop_assert_eq!(now, composed[at], "entry {} was not changed", at);
                    continue;
                }
                changed += 1;
                // Composed anew, or nothing: never more than a fresh shadow would have.
                let Some(mapped) = now else { continue };
                let (mut fresh, _) = self::bed(flags, leaf_shift, &[]);
                fresh.put(PAGE_TABLE, at, entry);
                fresh.access(0, gpa(at), READ);
                prop_assert_eq!(fresh.get(PAGE_TABLE, at), entry, "accessed already");
                let fresh_root = fresh.root02(0);
                prop_assert_eq!(Some(mapped), fresh.look(fresh_root, gpa(at)));
            }
            prop_assert!(bed.shadow.counters().entries - count <= changed);
        }
    }
}

#[test]
fn what_l1_did_not_change_is_not_composed_again() {
    for (flags, leaf_shift) in [(false, 12), (true, 12), (false, 21), (true, 21)] {
        let entries: Vec<_> = (0..ENTRIES).map(|at| page(at * 77) | 0x337).collect();
        let (mut bed, eptp) = bed(flags, leaf_shift, &entries);
        let root = bed.root02(0);
        assert_eq!(bed.access(0, gpa(300), WRITE), Some(Resolution::Filled));
        let all = |bed: &mut Bed| -> Vec<_> {
            (0..ENTRIES).map(|at| bed.look(root, gpa(at)).map(|mapped| mapped.hpa)).collect()
        };
        let composed = all(&mut bed);
        assert!(composed.iter().all(Option::is_some), "a fresh table is composed whole");

        let count = bed.shadow.counters();
        bed.invept(Some(eptp));
        bed.invept(None);
        assert_eq!(bed.shadow.counters().entries, count.entries);
        assert_eq!(all(&mut bed), composed);

        for (round, at) in [0, 7, 8, 63, 64, 300, 511, 300].into_iter().enumerate() {
            let count = bed.shadow.counters();
            bed.put(PAGE_TABLE, at, page(0xe0 + round) | 0x337);
            bed.invept(Some(eptp));
            assert_eq!(bed.shadow.counters().entries, count.entries + 1, "entry {at}");
            assert_eq!(bed.shadow.counters().fills, count.fills);
            assert_ne!(all(&mut bed)[at], composed[at]);
        }
        // Taken away, and given back: found by a violation of its own.
        bed.put(PAGE_TABLE, 9, 0);
        bed.invept(Some(eptp));
        assert_eq!(bed.look(root, gpa(9)), None);
        assert_eq!(all(&mut bed)[10], composed[10]);
        bed.put(PAGE_TABLE, 9, entries[9]);
        assert_eq!(bed.access(0, gpa(9), READ), Some(Resolution::Filled));
        let count = bed.shadow.counters();
        bed.invept(Some(eptp));
        assert_eq!(bed.shadow.counters().entries, count.entries);
    }
}
