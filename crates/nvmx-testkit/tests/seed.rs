//! Does an L1 on the engine find the rules S1 to S9 of EPTP switching kept?
//!
//! Each test is a rule, whatever the processor below keeps in its caches, with VPIDs and without,
//! with accessed and dirty flags and without, for guests with 4-level and with PAE paging. The tests
//! named after a rule fail where the engine breaks it: `cargo xtask mutants` shows so.

mod stage;

use nvmx_testkit::{Leaves, NestConfig};
use stage::*;
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{ExitReason, Field};
use vmx_model::program::{GuestMode, Setup};
use vmx_model::registers::cr4;
use vmx_model::{Action, Operation, Outcome, Retention, layout};

/// Accessed and dirty flags of an EPT entry.
const FLAGS: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 8;
/// Page table of the guest's 4-level paging.
const PT: u64 = layout::guest::LONG + 3;

/// The guests that every rule holds for: paging, VPID, accessed and dirty flags.
fn guests() -> impl Iterator<Item = Setup> {
    let modes = [GuestMode::Long, GuestMode::Pae];
    let all = modes.into_iter().flat_map(|mode| [0, 1].map(|vpid| (mode, vpid)));
    all.flat_map(|(mode, vpid)| {
        [[false; 4], [true; 4], [false, true, true, false]]
            .map(|accessed_dirty| Setup { accessed_dirty, ..setup(mode, vpid) })
    })
}

/// Runs a case under each policy, for each guest, on a host that maps L1 by one large page and on one
/// that has its pages all over the place.
fn everywhere(case: impl Fn(&mut L1<'_>, &Setup)) {
    for leaves in [Leaves::Huge, Leaves::Scattered(1)] {
        let host = NestConfig { leaves, ..NestConfig::default() };
        for retention in POLICIES {
            for setup in guests() {
                on_host(&host, retention, &setup, |l1| case(l1, &setup));
            }
        }
    }
}

fn eptp(setup: &Setup, view: usize) -> u64 {
    layout::eptp(view, setup.accessed_dirty[view])
}

#[test]
fn s1_vmfunc_and_vm_entry_change_to_the_same_roots() {
    everywhere(|l1, setup| {
        for number in [2, 0, 3, 1, 2, 511, 4] {
            let view = number as usize % layout::VIEWS;
            l1.switch(number);
            assert_eq!(l1.load(DATA + 0x6000), mark(view, 6));
            // The same by VM entry.
            l1.set(Field::EPT_POINTER, eptp(setup, 0));
            assert_eq!(l1.load(DATA + 0x6000), mark(0, 6));
        }
        // Each EPTP has one root, whichever way it was come to.
        assert_eq!(l1.platform().engine().shadow_usage().1, layout::VIEWS);
        // Where the VM entry follows at once, no root but the one it names is used.
        l1.switch(2);
        l1.leave(0);
        assert_eq!(l1.load(DATA + 0x6000), mark(2, 6));
        l1.set(Field::EPT_POINTER, eptp(setup, 1));
        assert_eq!(l1.load(DATA + 0x6000), mark(1, 6));
    });
}

#[test]
fn s2_a_switch_reuses_roots_and_discards_none() {
    everywhere(|l1, _| {
        let visit = |l1: &mut L1<'_>| {
            for view in [0, 2, 1, 3] {
                l1.switch(view);
                assert_eq!(l1.load(DATA + 0x6000), mark(view as usize, 6));
            }
        };
        visit(l1);
        let before = l1.platform().engine().shadow_counters();
        for _ in 0..3 {
            visit(l1);
        }
        let after = l1.platform().engine().shadow_counters();
        assert_eq!(after, before, "nothing built, filled, dropped or invalidated");
    });
}

/// The flags of the last-level entry of a page of the guest.
fn flags(l1: &mut L1<'_>, view: usize, page: u64) -> u64 {
    l1.word(leaf(view, page)) & FLAGS
}

#[test]
fn s3_accessed_and_dirty_flags_follow_the_eptp_at_once() {
    for (retention, vpid) in POLICIES.into_iter().flat_map(|policy| [(policy, 0), (policy, 1)]) {
        let setup =
            Setup { accessed_dirty: [false, false, true, false], ..setup(GuestMode::Long, vpid) };
        on(retention, &setup, |l1| {
            l1.store(DATA, 1);
            assert_eq!(flags(l1, 0, layout::DATA), 0);
            l1.switch(2);
            l1.load(DATA);
            assert_eq!(flags(l1, 2, layout::DATA), ACCESSED);
            // Entries above the last have it too, those of other pages do not.
            for level in 2..=4 {
                assert_ne!(l1.word(layout::ept_table(2, level)) & ACCESSED, 0, "level {level}");
            }
            assert_eq!(flags(l1, 2, layout::DATA + 1), 0);
            assert_eq!(l1.word(layout::ept_table(2, 3) + 8) & FLAGS, 0);
            l1.load(DATA + 0x1000);
            assert_eq!(flags(l1, 2, layout::DATA + 1), ACCESSED);
            l1.store(DATA, 1);
            assert_eq!(flags(l1, 2, layout::DATA), FLAGS);
            // Back where there are none.
            l1.switch(0);
            l1.store(DATA + 0x2000, 1);
            assert_eq!(flags(l1, 0, layout::DATA + 2), 0);
            assert_eq!(flags(l1, 2, layout::DATA + 2), 0);
            // And on again, for a page that is mapped without.
            l1.switch(2);
            l1.load(DATA + 0x2000);
            assert_eq!(flags(l1, 2, layout::DATA + 2), ACCESSED);
        });
    }
}

#[test]
fn s3_the_flag_alone_makes_another_root() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 1), |l1| {
            l1.write(layout::EPTP_LIST + 8 * 9, layout::eptp(0, true));
            assert_eq!(l1.load(DATA), mark(0, 0));
            assert_eq!(flags(l1, 0, layout::DATA), 0);
            // The same tables, but what was cached without flags may be used on: it has to go.
            l1.switch(9);
            l1.invept(layout::eptp(0, false));
            assert_eq!(l1.load(DATA), mark(0, 0));
            assert_eq!(flags(l1, 0, layout::DATA), ACCESSED);
            l1.store(DATA, 1);
            assert_eq!(flags(l1, 0, layout::DATA), FLAGS);
            // And off.
            l1.write(leaf(0, layout::DATA), layout::guest_data(0, 0) | layout::EPT_LEAF);
            l1.switch(0);
            l1.invept(layout::eptp(0, true));
            l1.store(DATA, 1);
            assert_eq!(flags(l1, 0, layout::DATA), 0);
        });
    }
}

#[test]
fn s3_accesses_to_paging_structures_count_as_writes() {
    for retention in POLICIES {
        let setup =
            Setup { accessed_dirty: [false, false, true, false], ..setup(GuestMode::Long, 1) };
        // Whether or not the first access to such a page is a mere load of the guest.
        for load_first in [false, true] {
            on(retention, &setup, |l1| {
                // Not the tables that the load itself is translated by. Their own accessed flags are
                // set once this is done, so that walks write nothing there any more.
                let second = layout::guest::LONG_2 << 12;
                let load_cr3 = |value| Operation::MovToCr { register: 3, value };
                l1.done(load_cr3(second));
                l1.load(DATA);
                l1.done(load_cr3(layout::guest::LONG << 12));
                l1.switch(2);
                if load_first {
                    l1.load(second);
                    assert_eq!(flags(l1, 2, layout::guest::LONG_2), ACCESSED);
                }
                l1.done(load_cr3(second));
                l1.load(DATA);
                for page in layout::guest::LONG_2..layout::guest::LONG_2 + 4 {
                    assert_eq!(flags(l1, 2, page), FLAGS, "{page:#x}");
                    assert_eq!(flags(l1, 0, page), 0);
                }
            });
        }
    }
}

#[test]
fn s3_a_flag_that_l1_cleared_is_set_again_after_invept() {
    for retention in POLICIES {
        let setup = Setup { accessed_dirty: [true; 4], ..setup(GuestMode::Long, 1) };
        on(retention, &setup, |l1| {
            l1.switch(2);
            l1.store(DATA, 1);
            let entries: Vec<u64> = [4, 3, 2].map(|level| layout::ept_table(2, level)).to_vec();
            for at in entries.into_iter().chain([leaf(2, layout::DATA)]) {
                let entry = l1.word(at);
                l1.write(at, entry & !FLAGS);
                l1.invept(layout::eptp(2, true));
                l1.load(DATA);
                assert_eq!(l1.word(at) & FLAGS, ACCESSED, "{at:#x}");
            }
            l1.store(DATA, 1);
            assert_eq!(flags(l1, 2, layout::DATA), FLAGS);
        });
    }
}

/// Makes the guest's page table, which is cached, map its first data page to its second. (Of that
/// page the guest-physical mapping is not in question.) Views keep the page table at one place, but
/// for the second one.
fn turn_the_first_page(l1: &mut L1<'_>) {
    let entry = layout::guest_structure(PT) + 8 * layout::DATA;
    l1.write(entry, (layout::DATA + 1) << 12 | layout::PWU);
}

#[test]
fn s4_without_vpid_every_switch_drops_combined_mappings() {
    for retention in POLICIES {
        // Also a switch to the EPTP in use does.
        for (vpid, view) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
            on(retention, &setup(GuestMode::Long, vpid), |l1| {
                assert_eq!(l1.load(DATA), mark(0, 0));
                turn_the_first_page(l1);
                if retention == Retention::Everything {
                    assert_eq!(l1.load(DATA), mark(0, 0), "stale, and used");
                }
                l1.switch(view);
                l1.switch(0);
                let seen = l1.load(DATA);
                if vpid == 0 {
                    assert_eq!(seen, mark(0, 1), "by way of view {view}");
                } else if retention == Retention::Everything {
                    assert_eq!(seen, mark(0, 0), "no switch drops a mapping of a VPID");
                }
            });
        }
    }
}

#[test]
fn s4_a_switch_to_the_eptp_in_use_counts() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 0), |l1| {
            assert_eq!(l1.load(DATA), mark(0, 0));
            turn_the_first_page(l1);
            l1.switch(0);
            assert_eq!(l1.load(DATA), mark(0, 1));
        });
    }
}

#[test]
fn s4_all_pcids_all_ep4tas_and_globals_go() {
    let mut setup = setup(GuestMode::Long, 0);
    setup.vms[0].cr4 = cr4::PCIDE;
    for retention in POLICIES {
        on(retention, &setup, |l1| {
            let cr3 = layout::guest_cr3(GuestMode::Long)[0];
            let load_cr3 =
                |pcid: u64| Operation::MovToCr { register: 3, value: cr3 | pcid | 1 << 63 };
            l1.switch(2);
            l1.done(load_cr3(5));
            assert_eq!(l1.load(DATA), mark(2, 0));
            // By way of another view and another PCID, the switch from which is the one in question.
            l1.switch(0);
            l1.done(load_cr3(0));
            assert_eq!(l1.load(DATA), mark(0, 0));
            turn_the_first_page(l1);
            // A global page, too.
            let last = layout::DATA_PAGES - 1;
            assert_eq!(l1.load(DATA + (last << 12)), mark(0, last));
            let entry = layout::guest_structure(PT) + 8 * (layout::DATA + last);
            l1.write(entry, (layout::DATA + 1) << 12 | layout::PWU);
            l1.switch(0);
            assert_eq!(l1.load(DATA), mark(0, 1));
            assert_eq!(l1.load(DATA + (last << 12)), mark(0, 1));
            l1.done(load_cr3(5));
            l1.switch(2);
            assert_eq!(l1.load(DATA), mark(2, 1));
        });
    }
}

#[test]
fn s4_guest_physical_mappings_stay() {
    on(Retention::Everything, &setup(GuestMode::Long, 0), |l1| {
        assert_eq!(l1.load(DATA), mark(0, 0));
        l1.write(leaf(0, layout::DATA), layout::guest_data(2, 0) | layout::EPT_LEAF);
        for view in [0, 2, 0] {
            l1.switch(view);
        }
        assert_eq!(l1.load(DATA), mark(0, 0), "stale, and kept");
        l1.invept(layout::eptp(0, false));
        assert_eq!(l1.load(DATA), mark(2, 0));
    });
}

#[test]
fn s4_transitions_without_vpid_drop_what_vpid_0000h_has() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 0), |l1| {
            assert_eq!(l1.load(DATA), mark(0, 0));
            turn_the_first_page(l1);
            // The entry, and the exit before it.
            l1.leave(0);
            assert_eq!(l1.load(DATA), mark(0, 1));
            // Also a VMFUNC that is refused exits.
            let entry = layout::guest_structure(PT) + 8 * layout::DATA;
            l1.write(entry, (layout::DATA + 2) << 12 | layout::PWU);
            assert_eq!(l1.exit_of(Operation::Vmfunc { rax: 0, rcx: 512 }), ExitReason::VMFUNC);
            assert_eq!(l1.load(DATA), mark(0, 2));
        });
    }
}

#[test]
fn s5_pdptes_are_not_loaded_by_a_switch() {
    for (retention, vpid) in POLICIES.into_iter().flat_map(|policy| [(policy, 0), (policy, 1)]) {
        on(retention, &setup(GuestMode::Pae, vpid), |l1| {
            assert_eq!(l1.load(DATA), mark(0, 0));
            // The PDPTEs in memory are gone, in all views.
            l1.write(layout::guest_structure(layout::guest::PAE), 0);
            for view in [2, 0, 2] {
                l1.switch(view);
                assert_eq!(l1.load(DATA), mark(view as usize, 0));
            }
            // Nor by the VM exit, nor by the entry: the fields hold them.
            assert_ne!(l1.field(Field::GUEST_PDPTE0), 0);
            assert_eq!(l1.load(DATA), mark(2, 0));
            // MOV to CR3 loads them.
            let value = layout::guest_cr3(GuestMode::Pae)[0];
            l1.done(Operation::MovToCr { register: 3, value });
            // Nothing is mapped any more, the IDT neither.
            let load = Operation::Load { at: DATA + 0x7000, size: 8 };
            assert_eq!(l1.exit_of(load), ExitReason::TRIPLE_FAULT);
        });
    }
}

#[test]
fn s5_pdptes_that_the_guest_loaded_are_kept_over_exits_and_switches() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Pae, 1), |l1| {
            // The second address space has the tables of the first gigabyte in the second, too.
            let value = layout::guest_cr3(GuestMode::Pae)[1];
            let from = layout::guest_structure(layout::guest::PAE);
            let entry = l1.word(from);
            l1.write(from + 32, entry);
            l1.done(Operation::MovToCr { register: 3, value });
            l1.write(from + 32, 0);
            l1.write(from + 40, 0);
            for view in [2, 0] {
                l1.switch(view);
                assert_eq!(l1.load(DATA), mark(view as usize, 0));
                assert_eq!(l1.load((1 << 30) + DATA), mark(view as usize, 0));
                assert_eq!(l1.field(Field::GUEST_PDPTE0), entry);
                assert_ne!(l1.field(Field::GUEST_PDPTE1), 0);
            }
        });
    }
}

#[test]
fn s5_without_ept_a_vm_entry_loads_pdptes_from_memory() {
    let mut setup = setup(GuestMode::Pae, 1);
    setup.vms[0].view = None;
    for retention in POLICIES {
        on(retention, &setup, |l1| {
            // Guest-physical is L1-physical now.
            let (tables, directory) = (layout::L1_DATA, layout::L1_DATA + 0x1000);
            l1.write(directory, 1 << 7 | layout::PWU);
            l1.write(tables, directory | 1);
            l1.set(Field::GUEST_CR3, tables);
            l1.set(Field::GUEST_PDPTE0, 0);
            assert_eq!(l1.load(layout::guest_data(0, 3)), mark(0, 3));
        });
    }
}

/// What L1 itself reads through its window.
fn window(l1: &mut L1<'_>) -> u64 {
    l1.leave(0);
    match l1.l1(0, Operation::Load { at: layout::L1_WINDOW, size: 8 }) {
        Outcome::Completed { value, .. } => value,
        other => panic!("{other:?}"),
    }
}

#[test]
fn s6_the_mappings_of_l1_survive_a_switch() {
    on(Retention::Everything, &setup(GuestMode::Long, 1), |l1| {
        assert_eq!(window(l1), layout::mark(layout::L1_DATA));
        l1.write(layout::L1_WINDOW_PT, (layout::L1_DATA + 0x1000) | 3);
        l1.switch(2);
        l1.switch(0);
        assert_eq!(window(l1), layout::mark(layout::L1_DATA), "stale, and kept");
    });
}

#[test]
fn s6_without_vpid_the_exit_drops_what_l1_has() {
    for retention in POLICIES {
        on(retention, &setup(GuestMode::Long, 0), |l1| {
            window(l1);
            l1.write(layout::L1_WINDOW_PT, (layout::L1_DATA + 0x1000) | 3);
            l1.switch(2);
            assert_eq!(window(l1), layout::mark(layout::L1_DATA + 0x1000));
        });
    }
}

#[test]
fn s6_the_roots_of_other_eptps_survive() {
    on(Retention::Everything, &setup(GuestMode::Long, 1), |l1| {
        for view in [1, 2, 0] {
            l1.switch(view);
            l1.load(DATA);
        }
        // What is cached of a view is used after others were, whatever its tables say now.
        l1.write(leaf(2, layout::DATA), 0);
        l1.switch(2);
        assert_eq!(l1.load(DATA), mark(2, 0));
        // Invalidations of one do not reach another.
        l1.invept(layout::eptp(1, false));
        assert_eq!(l1.load(DATA), mark(2, 0));
    });
}

fn refused(l1: &mut L1<'_>, rax: u64, rcx: u64) {
    let (eptp, index) = (l1.field(Field::EPT_POINTER), l1.field(Field::EPTP_INDEX));
    let rip = l1.field(Field::GUEST_RIP);
    assert_eq!(l1.exit_of(Operation::Vmfunc { rax, rcx }), ExitReason::VMFUNC, "{rax:x} {rcx:x}");
    assert_eq!(l1.field(Field::EXIT_QUALIFICATION), 0);
    assert_eq!(l1.field(Field::EXIT_INSTRUCTION_LEN), 3);
    // The session has passed the instruction.
    assert_eq!(l1.field(Field::GUEST_RIP), rip + 3);
    assert_eq!(l1.field(Field::EPT_POINTER), eptp);
    assert_eq!(l1.field(Field::EPTP_INDEX), index);
}

#[test]
fn s7_what_is_refused_exits_and_changes_nothing() {
    everywhere(|l1, setup| {
        // What stands behind the list would do as an entry.
        l1.write(layout::EPTP_LIST + 0x1000, eptp(setup, 2));
        for rcx in [512, 513, 0x8000_0000, 0xffff_ffff, 0x1_0000_0200] {
            refused(l1, 0, rcx);
        }
        for rax in 1..64 {
            refused(l1, rax, 0);
        }
        let at = layout::EPTP_LIST + 16;
        let good = eptp(setup, 2);
        // Memory type, walk length, reserved, beyond the width.
        for bit in [0, 3, 7, 11, 51, 63] {
            l1.write(at, good ^ 1 << bit);
            refused(l1, 0, 2);
            assert_eq!(l1.load(DATA + 0x6000), mark(0, 6));
        }
        l1.write(at, good);
        l1.set(Field::VM_FUNCTION_CONTROLS, 0);
        refused(l1, 0, 2);
        for rax in [64, 65, 0xffff_ffff, 64 | 5 << 32] {
            assert_eq!(l1.fault_of(Operation::Vmfunc { rax, rcx: 0 }).vector, 6);
        }
    });
}

#[test]
fn s7_an_entry_that_was_valid_is_judged_again() {
    everywhere(|l1, setup| {
        let at = layout::EPTP_LIST + 16;
        l1.switch(2);
        l1.switch(0);
        l1.write(at, eptp(setup, 2) | 1 << 7);
        refused(l1, 0, 2);
    });
}

#[test]
fn s7_upper_halves_and_privilege_do_not_count() {
    everywhere(|l1, _| {
        l1.load(DATA);
        l1.done(Operation::SetPrivilege(3));
        l1.done(Operation::Vmfunc { rax: 7 << 32, rcx: 9 << 32 | 2 });
        assert_eq!(l1.load(DATA + 0x6000), mark(2, 6));
        l1.done(Operation::Vmfunc { rax: 0, rcx: 1 << 63 | 1 });
        assert_eq!(l1.load(DATA + 0x6000), mark(1, 6));
    });
}

#[test]
fn s7_vmfunc_is_undefined_where_it_is_off() {
    everywhere(|l1, _| {
        let proc2 = l1.field(Field::PROC_CTLS2);
        l1.set(Field::PROC_CTLS2, proc2 & !(1 << 13));
        assert_eq!(l1.fault_of(Operation::Vmfunc { rax: 0, rcx: 0 }).vector, 6);
        l1.leave(0);
        // In root operation it is undefined always.
        let outcome = l1.l1(0, Operation::Vmfunc { rax: 0, rcx: 0 });
        assert!(matches!(outcome, Outcome::Delivered(delivered) if delivered.vector == 6));
    });
}

#[test]
fn s8_l1_reads_the_entry_bit_for_bit_and_the_index() {
    let caps = offered();
    let uncached = caps.ept_vpid.contains(EptVpidCap::MEMORY_TYPE_UC);
    everywhere(|l1, setup| {
        let mut last = 0;
        for index in [2, 511, 3, 6, 0, 2, 6] {
            l1.switch(index);
            let entry = l1.word(layout::EPTP_LIST + 8 * index);
            assert_eq!(l1.field(Field::EPT_POINTER), entry);
            if caps.supports(Field::EPTP_INDEX) {
                assert_eq!(l1.field(Field::EPTP_INDEX), index);
            }
            last = index;
        }
        // Values that differ in what is no address. The field follows each.
        for flags in [false, true] {
            let mut values = vec![layout::eptp(2, flags)];
            if uncached {
                values.push(layout::eptp(2, flags) & !7);
            }
            for value in values {
                l1.write(layout::EPTP_LIST + 8 * 77, value);
                l1.switch(77);
                assert_eq!(l1.field(Field::EPT_POINTER), value);
                assert_eq!(l1.load(DATA + 0x6000), mark(2, 6));
            }
        }
        // A VM entry with another one does not touch the index.
        l1.switch(last);
        l1.set(Field::EPT_POINTER, eptp(setup, 1));
        l1.load(DATA);
        if caps.supports(Field::EPTP_INDEX) {
            assert_eq!(l1.field(Field::EPTP_INDEX), last);
        }
        assert_eq!(l1.field(Field::EPT_POINTER), eptp(setup, 1));
    });
}

#[test]
fn s9_the_list_is_read_at_each_switch() {
    everywhere(|l1, setup| {
        for view in [2, 0, 3, 1, 2] {
            l1.write(layout::EPTP_LIST + 8 * 9, eptp(setup, view));
            l1.switch(9);
            assert_eq!(l1.load(DATA + 0x6000), mark(view, 6));
            // Written by L1's own program, which is an exit and an entry.
            let other = (view + 1) % layout::VIEWS;
            let value = eptp(setup, other);
            l1.act(Action::Write { at: layout::EPTP_LIST + 8 * 9, value });
            l1.switch(9);
            assert_eq!(l1.load(DATA + 0x6000), mark(other, 6));
        }
    });
}
