//! After which operation of L1 or its guest must a mapping be gone that L1's or the guest's tables no
//! longer have?
//!
//! The table of SDM Vol. 3C, "Operations that Invalidate Cached Mappings", for an L1 on the engine:
//! a mapping is used, its entry is changed behind everyone's back, and after the operation the guest
//! must see the change, whatever the processor below keeps. (That it may see the old value before is
//! what the model's own tests show.)

mod stage;

use stage::*;
use vmx_defs::{ExitReason, Field};
use vmx_model::program::GuestMode;
use vmx_model::registers::cr4;
use vmx_model::{Action, Operation, Outcome, Step, layout};

/// Something that an L1 is led to do.
type Led = fn(&mut L1<'_>);

/// What has become stale.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stale {
    /// A combined translation: the guest changed its page-table entry.
    Combined,
    /// The same of a global page.
    Global,
    /// A combined paging-structure-cache entry: the guest changed its page-directory entry.
    CombinedTable,
    /// A combined and a guest-physical translation: L1 changed the EPT leaf.
    GuestPhysical,
    /// A guest-physical translation of a 2-MByte page.
    Large,
    /// A guest-physical paging-structure-cache entry: L1 changed an EPT entry of this level.
    GuestTable(u8),
}

use Stale::{Combined, CombinedTable, Global, GuestPhysical, GuestTable, Large};

/// What depends on the guest's linear addresses.
const LINEAR: &[Stale] = &[Combined, Global, CombinedTable];
/// What depends on L1's EPT.
const PHYSICAL: &[Stale] = &[GuestPhysical, Large, GuestTable(2), GuestTable(3), GuestTable(4)];

/// Page table of the guest's 4-level paging.
const PT: u64 = layout::guest::LONG + 3;
/// The last data page, which is global.
const LAST: u64 = layout::DATA_PAGES - 1;

/// Makes `stale` stale in the view `view`, which is in use. Returns the address to read, and what it
/// reads as fresh.
fn prepare(l1: &mut L1<'_>, stale: Stale, view: usize) -> (u64, u64) {
    assert_eq!(l1.load(DATA), mark(view, 0));
    assert_eq!(l1.load(DATA + (LAST << 12)), mark(view, LAST));
    l1.load(layout::LARGE);
    let guest_entry = |number| layout::guest_structure(PT) + 8 * (layout::DATA + number);
    let ept_entry = |level: u8, gpa: u64| {
        layout::ept_table(view, level) + 8 * (gpa >> (3 + 9 * u32::from(level)) & 511)
    };
    match stale {
        Combined => {
            l1.write(guest_entry(0), (layout::DATA + 1) << 12 | layout::PWU);
            (DATA, mark(view, 1))
        }
        Global => {
            l1.write(guest_entry(LAST), (layout::DATA + 1) << 12 | layout::PWU);
            (DATA + (LAST << 12), mark(view, 1))
        }
        CombinedTable => {
            // Another page of the same 2-MByte region. The other page table turns data by one.
            let entry = layout::guest_structure(layout::guest::LONG + 2);
            l1.write(entry, (layout::guest::LONG_2 + 3) << 12 | layout::PWU);
            (DATA + 0x1000, mark(view, 2))
        }
        GuestPhysical => {
            l1.write(leaf(view, layout::DATA), layout::guest_data(1, 0) | layout::EPT_LEAF);
            (DATA, mark(1, 0))
        }
        Large => {
            // In its place the first 2 MBytes, where L1's own structures are.
            let at = ept_entry(2, layout::LARGE);
            l1.write(at, layout::EPT_LEAF | 1 << 7);
            (layout::LARGE + layout::L1_DATA, layout::mark(layout::L1_DATA))
        }
        GuestTable(level) => {
            // The other view's table below, where data is other data. (The second view has another
            // page table of the guest, too.)
            let other = 2 - view;
            l1.write(ept_entry(level, 0), layout::ept_table(other, level - 1) | 7);
            (DATA + 0x1000, mark(other, 1))
        }
    }
}

/// After `operation`, the mappings of `gone` must be unusable.
fn check(what: &str, vpid: u16, gone: &[Stale], operation: impl Fn(&mut L1<'_>)) {
    for retention in POLICIES {
        for flags in [false, true] {
            for stale in gone {
                let mut setup = setup(GuestMode::Long, vpid);
                setup.accessed_dirty = [flags; layout::VIEWS];
                setup.vms[0].cr4 = cr4::PCIDE;
                on(retention, &setup, |l1| {
                    let (at, fresh) = prepare(l1, *stale, 0);
                    operation(l1);
                    let seen = l1.load(at);
                    assert_eq!(seen, fresh, "{what}, VPID {vpid}, {stale:?}, {retention:?}");
                });
            }
        }
    }
}

fn invept(kind: u64, eptp: u64) -> impl Fn(&mut L1<'_>) {
    move |l1| l1.act(Action::Invept { kind, eptp })
}

fn invvpid(kind: u64, vpid: u16, address: u64) -> impl Fn(&mut L1<'_>) {
    move |l1| l1.act(Action::Invvpid { kind, vpid, address })
}

#[test]
fn invept_of_one_context() {
    for vpid in [0, 1] {
        check("INVEPT 1", vpid, PHYSICAL, invept(1, layout::eptp(0, false)));
        // The EP4TA is what counts, and no other bit.
        check("INVEPT 1, A/D", vpid, PHYSICAL, invept(1, layout::eptp(0, true)));
        check("INVEPT 1, uncached", vpid, PHYSICAL, invept(1, layout::eptp(0, false) & !7));
        check("INVEPT 1", vpid, LINEAR, invept(1, layout::eptp(0, false)));
    }
}

#[test]
fn invept_of_all_contexts() {
    for vpid in [0, 1] {
        check("INVEPT 2", vpid, PHYSICAL, invept(2, 0));
        check("INVEPT 2", vpid, LINEAR, invept(2, 0));
    }
}

#[test]
fn invept_of_a_view_that_is_not_in_use() {
    for retention in POLICIES {
        for (kind, stale) in
            [1, 2].into_iter().flat_map(|kind| PHYSICAL.iter().map(move |s| (kind, *s)))
        {
            on(retention, &setup(GuestMode::Long, 1), |l1| {
                l1.switch(2);
                let (at, fresh) = prepare(l1, stale, 2);
                for view in [1, 0] {
                    l1.switch(view);
                    l1.load(DATA);
                }
                l1.act(Action::Invept { kind, eptp: layout::eptp(2, false) });
                // Another one runs first.
                l1.load(DATA);
                l1.switch(2);
                assert_eq!(l1.load(at), fresh, "type {kind}, {stale:?}, {retention:?}");
            });
        }
    }
}

#[test]
fn invept_reaches_all_eptps_with_equal_bits_51_12() {
    let values = [0, 1].map(|flags| layout::eptp(0, flags != 0));
    for retention in POLICIES {
        for (used, named, kind) in
            [(0, 1, 1), (1, 0, 1), (0, 0, 1), (1, 1, 1), (0, 1, 2), (1, 0, 2)]
        {
            on(retention, &setup(GuestMode::Long, 1), |l1| {
                for number in [0, 1] {
                    l1.write(layout::EPTP_LIST + 8 * (9 + number as u64), values[number]);
                }
                l1.switch(9 + used as u64);
                assert_eq!(l1.load(DATA), mark(0, 0));
                // The same EP4TA once more, as the other EPTP.
                l1.switch(10 - used as u64);
                assert_eq!(l1.load(DATA), mark(0, 0));
                let other = layout::guest_data(1, 0) | layout::EPT_LEAF;
                l1.write(leaf(0, layout::DATA), other);
                l1.act(Action::Invept { kind, eptp: values[named] });
                l1.switch(9 + used as u64);
                assert_eq!(l1.load(DATA), mark(1, 0), "{used} {named} {kind} {retention:?}");
            });
        }
    }
}

#[test]
fn invvpid_of_each_type() {
    check("INVVPID 0", 1, &[Combined, CombinedTable], invvpid(0, 1, DATA));
    check("INVVPID 0, global", 1, &[Global], invvpid(0, 1, DATA + (LAST << 12)));
    check("INVVPID 1", 1, LINEAR, invvpid(1, 1, 0));
    check("INVVPID 2", 1, LINEAR, invvpid(2, 0, 0));
    check("INVVPID 3", 1, &[Combined, CombinedTable], invvpid(3, 1, 0));
    check("INVVPID 3, by INVLPG", 1, &[Global], |l1| {
        l1.done(Operation::Invlpg { at: DATA + (LAST << 12) });
    });
}

#[test]
fn invvpid_of_all_contexts_reaches_every_vpid() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 1), |l1| {
            for vpid in 1..=8 {
                l1.set(Field::VPID, vpid);
                assert_eq!(l1.load(DATA), mark(0, 0));
            }
            let entry = layout::guest_structure(PT) + 8 * layout::DATA;
            l1.write(entry, (layout::DATA + 1) << 12 | layout::PWU);
            l1.act(Action::Invvpid { kind: 2, vpid: 0, address: 0 });
            for vpid in 1..=8 {
                l1.set(Field::VPID, vpid);
                assert_eq!(l1.load(DATA), mark(0, 1), "VPID {vpid}, {retention:?}");
            }
        });
    }
}

#[test]
fn operations_of_the_guest() {
    let cr3 = layout::guest_cr3(GuestMode::Long)[0];
    for vpid in [0, 1] {
        check("INVLPG", vpid, &[Combined, CombinedTable], |l1| {
            l1.done(Operation::Invlpg { at: DATA });
        });
        check("MOV to CR3", vpid, &[Combined, CombinedTable], |l1| {
            l1.done(Operation::MovToCr { register: 3, value: cr3 });
        });
        check("CR4.PGE", vpid, LINEAR, |l1| {
            let value = cr4::PAE | cr4::PCIDE;
            l1.done(Operation::MovToCr { register: 4, value });
        });
        check("INVPCID 2", vpid, LINEAR, |l1| {
            l1.act(Action::Invpcid { kind: 2, pcid: 0, address: 0 });
        });
    }
}

#[test]
fn transitions_without_vpid() {
    check("VM exit and entry", 0, LINEAR, |l1| l1.leave(0));
    check("VMFUNC", 0, LINEAR, |l1| {
        l1.switch(2);
        l1.switch(0);
    });
}

/// Two address spaces that differ in their VPIDs alone.
#[test]
fn vpids_are_kept_apart() {
    let mut setup = setup(GuestMode::Long, 1);
    setup.vms[1].vpid = 2;
    for retention in POLICIES {
        on(retention, &setup, |l1| {
            l1.act(Action::Switch(1));
            l1.set(Field::GUEST_CR3, layout::guest_cr3(GuestMode::Long)[1]);
            for _ in 0..3 {
                l1.act(Action::Switch(0));
                assert_eq!(l1.load(DATA), mark(0, 0));
                l1.act(Action::Switch(1));
                assert_eq!(l1.load(DATA), mark(0, 1));
            }
            // One without a VPID is yet another.
            let proc2 = l1.field(Field::PROC_CTLS2);
            l1.set(Field::PROC_CTLS2, proc2 & !(1 << 5));
            l1.set(Field::GUEST_CR3, layout::guest_cr3(GuestMode::Long)[0]);
            assert_eq!(l1.load(DATA), mark(0, 0));
            l1.set(Field::PROC_CTLS2, proc2);
            l1.set(Field::GUEST_CR3, layout::guest_cr3(GuestMode::Long)[1]);
            assert_eq!(l1.load(DATA), mark(0, 1));
        });
    }
}

/// As before, with more VPIDs than any pool has.
#[test]
fn more_vpids_than_there_are_in_the_pool_are_kept_apart() {
    const COUNT: u64 = 100;
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 1), |l1| {
            for round in 0..2 {
                for vpid in 1..=COUNT {
                    // Not the address space of whichever VPID was before in a pool of any even size.
                    let space = vpid.count_ones() as usize % 2;
                    l1.set(Field::VPID, vpid);
                    l1.set(Field::GUEST_CR3, layout::guest_cr3(GuestMode::Long)[space]);
                    let seen = l1.load(DATA);
                    assert_eq!(seen, mark(0, space as u64), "{round} {vpid} {retention:?}");
                }
            }
        });
    }
}

/// An EPT violation that L1 gets makes the processor forget what it was caused by: L1 may grant the
/// page, and elsewhere, without INVEPT (SDM Vol. 3C, "Operations that Invalidate Cached Mappings").
#[test]
fn an_ept_violation_forgets_its_own_cause() {
    for retention in POLICIES {
        for vpid in [0, 1] {
            on(retention, &setup(GuestMode::Long, vpid), |l1| {
                let data = layout::guest_data(0, 0);
                l1.write(leaf(0, layout::DATA), data | layout::EPT_LEAF & !2);
                assert_eq!(l1.load(DATA), mark(0, 0));
                let store = Operation::Store { at: DATA + 8, size: 8, value: 7 };
                assert_eq!(l1.exit_of(store), ExitReason::EPT_VIOLATION);
                let other = layout::guest_data(1, 0);
                l1.write(leaf(0, layout::DATA), other | layout::EPT_LEAF & !2);
                assert_eq!(l1.load(DATA), mark(1, 0), "{retention:?}");
                assert_eq!(l1.exit_of(store), ExitReason::EPT_VIOLATION);
                l1.write(leaf(0, layout::DATA), other | layout::EPT_LEAF);
                l1.done(store);
                assert_eq!(l1.word(other + 8), 7);
            });
        }
    }
}

/// The same through a table in between, and for every EPTP with these bits 51:12.
#[test]
fn an_ept_violation_forgets_its_path_in_every_root_of_the_ep4ta() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 1), |l1| {
            l1.write(layout::EPTP_LIST + 8 * 9, layout::eptp(0, true));
            let data = layout::guest_data(0, 0);
            l1.write(leaf(0, layout::DATA), data | (layout::EPT_LEAF & !2) | 3 << 8);
            assert_eq!(l1.load(DATA), mark(0, 0));
            l1.switch(9);
            assert_eq!(l1.load(DATA), mark(0, 0));
            let store = Operation::Store { at: DATA + 8, size: 8, value: 7 };
            assert_eq!(l1.exit_of(store), ExitReason::EPT_VIOLATION);
            // The table of the third view in place of its own: all on the path may change.
            l1.write(layout::ept_table(0, 2), layout::ept_table(2, 1) | 7);
            l1.switch(0);
            assert_eq!(l1.load(DATA), mark(2, 0), "{retention:?}");
            l1.switch(9);
            assert_eq!(l1.load(DATA), mark(2, 0), "{retention:?}");
        });
    }
}

/// What L1 adds needs no invalidation.
#[test]
fn what_was_not_there_is_not_cached() {
    for retention in POLICIES {
        for level in 1..=4 {
            on(retention, &setup(GuestMode::Long, 1), |l1| {
                let gpa = if level == 1 { DATA } else { layout::LARGE };
                let at =
                    layout::ept_table(2, level) + 8 * (gpa >> (3 + 9 * u32::from(level)) & 511);
                let entry = l1.word(at);
                if level < 3 {
                    l1.switch(2);
                }
                l1.write(at, 0);
                if level < 3 {
                    // Other pages of the same table are there, this one is not.
                    l1.load(DATA + 0x1000);
                    let load = Operation::Load { at: gpa, size: 8 };
                    assert_eq!(l1.exit_of(load), ExitReason::EPT_VIOLATION);
                    l1.write(at, entry);
                } else {
                    l1.write(at, entry);
                    l1.switch(2);
                }
                l1.load(gpa);
                assert_eq!(l1.load(DATA), mark(2, 0));
            });
        }
    }
}

/// Two views that share tables have nothing cached of each other: what one has used, the other finds
/// as L1's tables are when it comes there itself.
#[test]
fn a_view_has_nothing_cached_of_another_that_shares_its_tables() {
    for retention in POLICIES {
        for flags in [false, true] {
            let mut setup = setup(GuestMode::Long, 1);
            setup.accessed_dirty = [flags; layout::VIEWS];
            let repoint = |l1: &mut L1<'_>, page: u64, view: usize| {
                let entry = layout::guest_data(view, page) | layout::EPT_LEAF | 3 << 8;
                l1.write(leaf(0, layout::DATA + page), entry);
            };
            // A view that was never in use before.
            on(retention, &setup, |l1| {
                assert_eq!(l1.load(DATA), mark(0, 0));
                repoint(l1, 0, 1);
                l1.switch(3);
                assert_eq!(l1.load(DATA + 0x1000), mark(0, 1));
                assert_eq!(l1.load(DATA), mark(1, 0), "{retention:?}");
            });
            // One that was, and where this page was not mapped then.
            on(retention, &setup, |l1| {
                l1.write(leaf(0, layout::DATA), 0);
                for view in [0, 3] {
                    l1.switch(view);
                    l1.load(DATA + 0x1000);
                }
                repoint(l1, 0, 1);
                assert_eq!(l1.load(DATA), mark(1, 0));
                repoint(l1, 0, 2);
                l1.switch(0);
                assert_eq!(l1.load(DATA), mark(2, 0), "{retention:?}");
            });
        }
    }
}

/// The guest of each processor.
fn load_on(l1: &mut L1<'_>, processor: usize, at: u64) -> u64 {
    match l1.guest(processor, Operation::Load { at, size: 8 }) {
        Outcome::Completed { value, .. } => value,
        other => panic!("{other:x?}"),
    }
}

fn invept_on(l1: &mut L1<'_>, processor: usize, kind: u64, eptp: u64) {
    l1.carry_out(&Step { processor, action: Action::Invept { kind, eptp } });
}

/// A shootdown: L1 changes an entry, and each processor invalidates.
#[test]
fn each_processor_invalidates_for_itself() {
    for retention in POLICIES {
        for kind in [1, 2] {
            for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
                let mut setup = setup(GuestMode::Long, 1);
                setup.processors = 3;
                on(retention, &setup, |l1| {
                    for processor in order {
                        assert_eq!(load_on(l1, processor, DATA), mark(0, 0));
                    }
                    l1.write(leaf(0, layout::DATA), layout::guest_data(1, 0) | layout::EPT_LEAF);
                    for processor in order {
                        invept_on(l1, processor, kind, layout::eptp(0, false));
                        assert_eq!(load_on(l1, processor, DATA), mark(1, 0), "{retention:?}");
                    }
                    for processor in order {
                        assert_eq!(load_on(l1, processor, DATA), mark(1, 0), "{retention:?}");
                    }
                });
            }
        }
    }
}

/// A processor has nothing cached of what only another one has used.
#[test]
fn a_processor_has_nothing_cached_of_what_another_has_used() {
    for retention in POLICIES {
        let mut setup = setup(GuestMode::Long, 1);
        setup.processors = 2;
        let of = |view| layout::guest_data(view, 0) | layout::EPT_LEAF;
        // A view that it has used, but for this page.
        on(retention, &setup, |l1| {
            l1.write(leaf(0, layout::DATA), 0);
            for processor in [0, 1] {
                load_on(l1, processor, DATA + 0x1000);
            }
            l1.leave(0);
            l1.write(leaf(0, layout::DATA), of(1));
            assert_eq!(load_on(l1, 1, DATA), mark(1, 0));
            l1.write(leaf(0, layout::DATA), of(2));
            assert_eq!(load_on(l1, 0, DATA), mark(2, 0), "{retention:?}");
        });
        // A table that the first view has used before: the other processor comes to it by the fourth
        // view, too, while this one is away.
        on(retention, &setup, |l1| {
            let enter = |l1: &mut L1<'_>, processor: usize, view: usize| {
                let action = Action::SetField(Field::EPT_POINTER, layout::eptp(view, false));
                l1.carry_out(&Step { processor, action });
            };
            assert_eq!(load_on(l1, 1, DATA), mark(0, 0));
            l1.write(layout::ept_table(3, 4), 0);
            enter(l1, 0, 3);
            let load = Operation::Load { at: DATA, size: 8 };
            assert_eq!(l1.guest(0, load), Outcome::Exit(ExitReason::EPT_VIOLATION));
            l1.write(layout::ept_table(3, 4), layout::ept_table(0, 3) | 7);
            enter(l1, 1, 3);
            assert_eq!(load_on(l1, 1, DATA + 0x1000), mark(0, 1));
            l1.write(leaf(0, layout::DATA), of(2));
            assert_eq!(load_on(l1, 0, DATA), mark(2, 0), "{retention:?}");
        });
    }
}

/// Root operation uses VPID 0000H.
#[test]
fn linear_mappings_of_l1() {
    let cases: [(&str, u16, Led); 4] = [
        ("a guest without VPID", 0, |l1| {
            l1.load(DATA);
        }),
        ("an entry that fails, without VPID", 0, |l1| {
            l1.set(Field::GUEST_RFLAGS, 0);
            let failed = l1.enter(0).unwrap();
            assert!(matches!(failed, Outcome::Exit(reason) if reason.is_entry_failure()));
        }),
        ("INVLPG of L1", 1, |l1| {
            l1.l1(0, Operation::Invlpg { at: layout::L1_WINDOW });
        }),
        ("MOV to CR3 of L1", 1, |l1| {
            l1.l1(0, Operation::MovToCr { register: 3, value: layout::L1_CR3 });
        }),
    ];
    for (what, vpid, operation) in cases {
        for retention in POLICIES {
            on(retention, &setup(GuestMode::Long, vpid), |l1| {
                let load = Operation::Load { at: layout::L1_WINDOW, size: 8 };
                l1.l1(0, load);
                l1.write(layout::L1_WINDOW_PT, (layout::L1_DATA + 0x3000) | 3);
                operation(l1);
                l1.leave(0);
                let value = layout::mark(layout::L1_DATA + 0x3000);
                assert_eq!(l1.l1(0, load), Outcome::Completed { value, flags: 0 }, "{what}");
            });
        }
    }
}
