//! What is L1 told where its EPT denies or is misconfigured, and what is nobody told where only the
//! shadow did not have an entry yet?

mod stage;

use nvmx_testkit::{Leaves, NestConfig};
use stage::*;
use vmx_defs::{ExitReason, Field, L1Gpa};
use vmx_model::program::GuestMode;
use vmx_model::{Operation, Outcome, Retention, layout};

const STORE: Operation = Operation::Store { at: DATA, size: 8, value: 1 };

/// Bits 7 and 8 of an EPT violation's qualification: the linear address is valid, and this is its
/// translation.
const TRANSLATED: u64 = 3 << 7;

/// Runs a case under each policy, on hosts that map L1 by pages of every size, with accessed and
/// dirty flags and without.
fn everywhere(case: impl Fn(&mut L1<'_>, bool)) {
    for retention in POLICIES {
        for leaves in [Leaves::Huge, Leaves::Small, Leaves::Scattered(3)] {
            for flags in [false, true] {
                let host = NestConfig { leaves, ..NestConfig::default() };
                let mut setup = setup(GuestMode::Long, 1);
                setup.accessed_dirty = [flags; layout::VIEWS];
                on_host(&host, retention, &setup, |l1| case(l1, flags));
            }
        }
    }
}

/// The entry of a level that translates an address in the first view.
fn entry_at(level: u8, gpa: u64) -> u64 {
    layout::ept_table(0, level) + 8 * (gpa >> (3 + 9 * u32::from(level)) & 511)
}

#[test]
fn the_rights_of_a_leaf_decide_and_are_told() {
    for (level, gpa) in [(1, DATA), (2, layout::LARGE), (3, layout::HUGE + layout::L1_DATA)] {
        for rights in [0, 1, 3, 4, 5, 7] {
            everywhere(|l1, _| {
                let at = entry_at(level, gpa);
                let entry = l1.word(at) & !7 | rights;
                l1.write(at, entry);
                for (bit, access) in [
                    (1, Operation::Load { at: gpa, size: 4 }),
                    (4, Operation::Fetch { at: gpa }),
                    (2, Operation::Store { at: gpa, size: 4, value: 1 }),
                    (1, Operation::Load { at: gpa, size: 4 }),
                ] {
                    let outcome = l1.guest(0, access);
                    if rights & bit != 0 {
                        let done = matches!(outcome, Outcome::Completed { .. });
                        assert!(done, "{rights} {access:x?}: {outcome:x?}");
                        continue;
                    }
                    assert_eq!(outcome, Outcome::Exit(ExitReason::EPT_VIOLATION));
                    let told = l1.field(Field::EXIT_QUALIFICATION);
                    assert_eq!(told, bit | rights << 3 | TRANSLATED, "level {level} {access:x?}");
                    assert_eq!(l1.field(Field::GUEST_PHYSICAL_ADDRESS), gpa);
                    assert_eq!(l1.field(Field::GUEST_LINEAR_ADDRESS), gpa);
                }
            });
        }
    }
}

#[test]
fn rights_are_those_of_the_whole_walk() {
    for level in 2..=4 {
        everywhere(|l1, flags| {
            // The flags of the guest's own tables have to be set before those are read-only.
            l1.store(DATA, 1);
            l1.load(DATA + 0x1000);
            // The first view is in use already, the third is not.
            for view in [0, 2] {
                let at = layout::ept_table(view, level) + (entry_at(level, DATA) & 0xfff);
                let entry = l1.word(at);
                l1.write(at, entry & !2);
            }
            l1.invept(layout::eptp(0, flags));
            for view in [0, 2] {
                l1.set(Field::EPT_POINTER, layout::eptp(view, flags));
                if !flags {
                    // Else the guest's walk writes, and does not get there.
                    l1.load(DATA + 0x1000);
                }
                let outcome = l1.guest(0, STORE);
                let violation = Outcome::Exit(ExitReason::EPT_VIOLATION);
                assert_eq!(outcome, violation, "level {level}, view {view}");
                assert_eq!(l1.field(Field::EXIT_QUALIFICATION) >> 3 & 7, 5);
            }
        });
    }
}

#[test]
fn rights_are_told_from_l1s_tables_and_not_from_the_shadow() {
    everywhere(|l1, flags| {
        // Never used before; and used, when the shadow of a page with a clear dirty flag is
        // read-only.
        for page in [0, 1] {
            let entry = layout::guest_data(0, page) | 6 << 3 | 3 | if flags { 1 << 8 } else { 0 };
            l1.write(leaf(0, layout::DATA + page), entry);
        }
        for page in [0, 1] {
            let address = DATA + (page << 12);
            if page == 1 {
                l1.load(address);
            }
            let fetch = Operation::Fetch { at: address };
            assert_eq!(l1.exit_of(fetch), ExitReason::EPT_VIOLATION);
            assert_eq!(l1.field(Field::EXIT_QUALIFICATION), 4 | 3 << 3 | TRANSLATED);
        }
    });
}

#[test]
fn what_l1s_tables_allow_is_nobodys_violation() {
    everywhere(|l1, flags| {
        // More rights need no INVEPT: the processor that still has the fewer may cause one violation,
        // which makes it forget them.
        let rights = |rights| layout::guest_data(0, 0) | 6 << 3 | rights;
        l1.write(leaf(0, layout::DATA), rights(1));
        l1.load(DATA);
        l1.write(leaf(0, layout::DATA), rights(3));
        if l1.guest(0, STORE) == Outcome::Exit(ExitReason::EPT_VIOLATION) {
            l1.done(STORE);
        }
        let dirty = if flags { 3 << 8 } else { 0 };
        assert_eq!(l1.word(leaf(0, layout::DATA)), rights(3) | dirty);
        // A dirty flag that is clear is no reason for one.
        l1.load(DATA + 0x1000);
        l1.store(DATA + 0x1000, 1);
    });
}

#[test]
fn execute_only_pages_can_be_executed() {
    everywhere(|l1, _| {
        l1.write(leaf(0, layout::DATA), layout::guest_data(0, 0) | 6 << 3 | 4);
        let fetch = Operation::Fetch { at: DATA };
        l1.done(fetch);
        let load = Operation::Load { at: DATA, size: 8 };
        assert_eq!(l1.exit_of(load), ExitReason::EPT_VIOLATION);
        l1.done(fetch);
    });
}

#[test]
fn misconfigurations_are_told() {
    let changes: [fn(u64) -> u64; 7] = [
        |entry| entry & !7 | 2,
        |entry| entry & !7 | 6,
        |entry| entry & !0x38 | 2 << 3,
        |entry| entry & !0x38 | 3 << 3,
        |entry| entry & !0x38 | 7 << 3,
        |entry| entry | 1 << 40,
        |entry| entry | 1 << 51,
    ];
    for change in changes {
        everywhere(|l1, _| {
            let entry = l1.word(leaf(0, layout::DATA)) | 3 << 8;
            l1.write(leaf(0, layout::DATA), change(entry));
            // Its neighbour, which may bring it in.
            l1.load(DATA + 0x1000);
            for access in
                [Operation::Load { at: DATA, size: 8 }, STORE, Operation::Fetch { at: DATA }]
            {
                assert_eq!(l1.exit_of(access), ExitReason::EPT_MISCONFIGURATION);
                assert_eq!(l1.field(Field::GUEST_PHYSICAL_ADDRESS), DATA);
            }
        });
    }
}

/// Where L0 hides a page, the guest reads ones and can't write.
#[test]
fn rights_of_ept01_hold_for_the_guest() {
    let hidden = layout::guest_data(0, 0);
    for leaves in [Leaves::Huge, Leaves::Large, Leaves::Small] {
        let host = NestConfig { leaves, hidden: vec![L1Gpa::new(hidden)], ..NestConfig::default() };
        for retention in POLICIES {
            on_host(&host, retention, &setup(GuestMode::Long, 1), |l1| {
                // By a page of its own, and by a large one around it.
                for address in [DATA, layout::HUGE + hidden] {
                    assert_eq!(l1.load(address), u64::MAX);
                    let store = Operation::Store { at: address, size: 8, value: 1 };
                    assert_eq!(l1.fault_of(store).vector, 13);
                    assert_eq!(l1.load(address), u64::MAX);
                }
                assert_eq!(l1.load(layout::HUGE + hidden + 0x1000), mark(0, 1));
            });
        }
    }
}

/// An event whose delivery meets pages that only the shadow does not have yet is delivered all the
/// same, once.
#[test]
fn an_event_is_delivered_through_a_cold_shadow() {
    const EXTERNAL: u64 = 1 << 31 | 0x40;
    for retention in [Retention::Everything, Retention::Nothing] {
        on(retention, &setup(GuestMode::Long, 1), |l1| {
            l1.set(Field::GUEST_RFLAGS, 0x202);
            l1.set(Field::ENTRY_INTR_INFO, EXTERNAL);
            let entered = l1.enter(0);
            let delivered =
                matches!(entered, Some(Outcome::Entered(Some(event))) if event.vector == 0x40);
            assert!(delivered, "{entered:x?}");
            assert_eq!(l1.field(Field::ENTRY_INTR_INFO), 0x40, "injected once");
            let entered = l1.enter(0);
            assert_eq!(entered, Some(Outcome::Entered(None)));
        });
    }
}

/// And where L1's tables have none of them, L1 is told with which event.
#[test]
fn a_violation_of_a_delivery_is_told_with_the_event() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 1), |l1| {
            let stack = layout::guest_structure(layout::guest::STACK);
            l1.load(DATA);
            l1.write(leaf(0, layout::guest::STACK), stack | 6 << 3 | 1);
            l1.invept(layout::eptp(0, false));
            assert_eq!(l1.exit_of(Operation::Ud2), ExitReason::EPT_VIOLATION);
            assert_eq!(l1.field(Field::IDT_VECTORING_INFO), 1 << 31 | 3 << 8 | 6);
            l1.write(leaf(0, layout::guest::STACK), stack | layout::EPT_LEAF);
            assert_eq!(l1.fault_of(Operation::Ud2).vector, 6);
        });
    }
}
