//! Does the bare model obey the rules S1 to S9 of EPTP switching?

mod stage;

use stage::*;
use vmx_defs::{ExitReason, Field};
use vmx_model::program::{GuestMode, Setup};
use vmx_model::{
    Action, Machine, ModelCaps, Operation, Retention, Session, layout, registers::cr4,
};

const POLICIES: [Retention; 3] = [Retention::Everything, Retention::Random(1), Retention::Nothing];

/// Runs a case under each policy, with VPIDs and without.
fn everywhere(case: impl Fn(&mut Session<'_, Machine>, bool)) {
    let caps = ModelCaps::default();
    for retention in POLICIES {
        for vpid in [0, 1] {
            let mut machine = machine(retention);
            let config = setup(GuestMode::Long, vpid);
            case(&mut Session::new(&mut machine, &caps, &config), vpid != 0);
        }
    }
}

fn adversary(config: &Setup, case: impl FnOnce(&mut Session<'_, Machine>)) {
    let caps = ModelCaps::default();
    let mut machine = machine(Retention::Everything);
    case(&mut Session::new(&mut machine, &caps, config));
}

#[test]
fn s1_switches_to_the_entry_named_by_ecx() {
    everywhere(|session, _| {
        for view in [2, 0, 3, 2] {
            session.switch(view);
            assert_eq!(session.load(DATA), mark(view as usize, 0));
            // The same by VM entry.
            session.act(Action::SetField(Field::EPT_POINTER, layout::eptp(0, false)));
            assert_eq!(session.load(DATA), mark(0, 0));
        }
    });
}

#[test]
fn s2_a_switch_discards_nothing_of_any_view() {
    adversary(&setup(GuestMode::Long, 1), |session| {
        session.load(DATA);
        session.switch(2);
        session.load(DATA);
        let before = session.platform().processors[0].caches().len();
        for view in [0, 2, 0, 2] {
            session.switch(view);
        }
        assert_eq!(session.platform().processors[0].caches().len(), before);
        // What is cached is used, whatever the tables say now.
        session.write(leaf(2, layout::DATA), 0);
        assert_eq!(session.load(DATA), mark(2, 0));
    });
}

#[test]
fn s3_accessed_and_dirty_flags_follow_the_eptp() {
    let flags =
        |session: &mut Session<'_, Machine>, view| session.word(leaf(view, layout::DATA)) >> 8 & 3;
    let caps = ModelCaps::default();
    for vpid in [0, 1] {
        let mut config = setup(GuestMode::Long, vpid);
        config.accessed_dirty = [false, false, true, false];
        let mut machine = machine(Retention::Everything);
        let session = &mut Session::new(&mut machine, &caps, &config);
        session.store(DATA, 1);
        assert_eq!(flags(session, 0), 0);
        session.switch(2);
        session.load(DATA);
        assert_eq!(flags(session, 2), 1);
        session.store(DATA, 1);
        assert_eq!(flags(session, 2), 3);
        // Accesses to paging structures count as writes.
        assert_eq!(session.word(leaf(2, layout::guest::LONG)) >> 8 & 3, 3);
        assert_eq!(session.word(leaf(0, layout::guest::LONG)) >> 8 & 3, 0);
    }
}

#[test]
fn s4_without_vpid_every_switch_drops_combined_mappings_of_vpid_0() {
    for (vpid, view) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
        adversary(&setup(GuestMode::Long, vpid), |session| {
            assert_eq!(session.load(DATA), mark(0, 0));
            // The guest's own page table now says otherwise; the combined mapping is stale. (The
            // guest-physical mapping of its data page is not.)
            let entry = layout::guest_structure(layout::guest::LONG + 3) + 8 * layout::DATA;
            let other = (layout::DATA + 1) << 12 | layout::PWU;
            session.write(entry, other);
            assert_eq!(session.load(DATA), mark(0, 0), "stale, and used");
            // Also a switch to the EPTP already in use invalidates.
            session.switch(view);
            session.switch(0);
            let expected = if vpid == 0 { mark(0, 1) } else { mark(0, 0) };
            assert_eq!(session.load(DATA), expected, "VPID {vpid} by way of view {view}");
        });
    }
}

#[test]
fn s4_guest_physical_mappings_stay() {
    adversary(&setup(GuestMode::Long, 0), |session| {
        assert_eq!(session.load(DATA), mark(0, 0));
        session.write(leaf(0, layout::DATA), layout::guest_data(2, 0) | layout::EPT_LEAF);
        session.switch(0);
        assert_eq!(session.load(DATA), mark(0, 0));
        session.act(Action::Invept { kind: 1, eptp: layout::eptp(0, false) });
        assert_eq!(session.load(DATA), mark(2, 0));
    });
}

#[test]
fn s4_all_pcids_go() {
    let mut config = setup(GuestMode::Long, 0);
    config.vms[0].cr4 = cr4::PCIDE;
    adversary(&config, |session| {
        let cr3 = layout::guest_cr3(GuestMode::Long)[0];
        let load_cr3 = |pcid: u64| Operation::MovToCr { register: 3, value: cr3 | pcid | 1 << 63 };
        session.done(load_cr3(5));
        session.load(DATA);
        session.done(load_cr3(0));
        let entry = layout::guest_structure(layout::guest::LONG + 3) + 8 * layout::DATA;
        session.write(entry, (layout::DATA + 1) << 12 | layout::PWU);
        session.switch(0);
        session.done(load_cr3(5));
        assert_eq!(session.load(DATA), mark(0, 1));
    });
}

#[test]
fn s5_pdptes_are_not_loaded_by_a_switch() {
    for vpid in [0, 1] {
        adversary(&setup(GuestMode::Pae, vpid), |session| {
            assert_eq!(session.load(DATA), mark(0, 0));
            // The PDPTEs in memory are gone, in all views.
            session.write(layout::guest_structure(layout::guest::PAE), 0);
            for view in [2, 0, 2] {
                session.switch(view);
                assert_eq!(session.load(DATA), mark(view as usize, 0));
            }
            assert_ne!(session.field(Field::GUEST_PDPTE0), 0);
            // MOV to CR3 loads them.
            let value = layout::guest_cr3(GuestMode::Pae)[0];
            session.done(Operation::MovToCr { register: 3, value });
            // Nothing is mapped any more, the IDT neither.
            let load = Operation::Load { at: DATA + 0x9000, size: 8 };
            assert_eq!(session.exit_of(load), ExitReason::TRIPLE_FAULT);
        });
    }
}

#[test]
fn s6_linear_mappings_of_l1_survive_a_switch() {
    adversary(&setup(GuestMode::Long, 1), |session| {
        let read = |session: &mut Session<'_, Machine>| {
            session.leave(0);
            match session.l1(0, Operation::Load { at: layout::L1_WINDOW, size: 8 }) {
                vmx_model::Outcome::Completed { value, .. } => value,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(read(session), layout::mark(layout::L1_DATA));
        session.write(layout::L1_WINDOW_PT, (layout::L1_DATA + 0x1000) | 3);
        session.switch(2);
        session.switch(0);
        assert_eq!(read(session), layout::mark(layout::L1_DATA), "stale, and kept");
    });
    // Without VPID the VM entry and the exit drop what VPID 0000H has, L1's own with it.
    adversary(&setup(GuestMode::Long, 0), |session| {
        session.l1(0, Operation::Load { at: layout::L1_WINDOW, size: 8 });
        session.write(layout::L1_WINDOW_PT, (layout::L1_DATA + 0x1000) | 3);
        session.switch(2);
        session.leave(0);
        let seen = session.l1(0, Operation::Load { at: layout::L1_WINDOW, size: 8 });
        let value = layout::mark(layout::L1_DATA + 0x1000);
        assert_eq!(seen, vmx_model::Outcome::Completed { value, flags: 0 });
    });
}

fn refused(session: &mut Session<'_, Machine>, rax: u64, rcx: u64) {
    let (eptp, index) = (session.field(Field::EPT_POINTER), session.field(Field::EPTP_INDEX));
    session.enter(0);
    let rip = session.platform().processors[0].regs.rip;
    assert_eq!(session.exit_of(Operation::Vmfunc { rax, rcx }), ExitReason::VMFUNC);
    assert_eq!(session.field(Field::EXIT_QUALIFICATION), 0);
    assert_eq!(session.field(Field::EXIT_INSTRUCTION_LEN), 3);
    // The session has passed the instruction.
    assert_eq!(session.field(Field::GUEST_RIP), rip + 3);
    assert_eq!(session.field(Field::EPT_POINTER), eptp);
    assert_eq!(session.field(Field::EPTP_INDEX), index);
}

#[test]
fn s7_what_is_refused_exits_and_changes_nothing() {
    everywhere(|session, _| {
        for rcx in [512, 513, 0x8000_0000, 0xffff_ffff, 0x1_0000_0200] {
            refused(session, 0, rcx);
        }
        for rax in 1..64 {
            refused(session, rax, 0);
        }
        let good = layout::eptp(2, false);
        for bit in [0, 3, 7, 11, 40, 63] {
            session.write(layout::EPTP_LIST + 16, good ^ 1 << bit);
            refused(session, 0, 2);
        }
        session.write(layout::EPTP_LIST + 16, good);
        // Upper halves are ignored, and no privilege is needed.
        session.done(Operation::SetPrivilege(3));
        session.done(Operation::Vmfunc { rax: 7 << 32, rcx: 9 << 32 | 2 });
        assert_eq!(session.load(DATA), mark(2, 0));
        session.act(Action::SetField(Field::VM_FUNCTION_CONTROLS, 0));
        refused(session, 0, 2);
        for rax in [64, 65, 0xffff_ffff, 64 | 5 << 32] {
            assert_eq!(session.fault_of(Operation::Vmfunc { rax, rcx: 0 }).vector, 6);
        }
    });
}

#[test]
fn s7_vmfunc_is_undefined_where_it_is_off() {
    everywhere(|session, _| {
        let proc2 = session.field(Field::PROC_CTLS2);
        session.act(Action::SetField(Field::PROC_CTLS2, proc2 & !(1 << 13)));
        assert_eq!(session.fault_of(Operation::Vmfunc { rax: 0, rcx: 0 }).vector, 6);
        session.leave(0);
        // In root operation it is undefined always.
        let outcome = session.l1(0, Operation::Vmfunc { rax: 0, rcx: 0 });
        assert!(matches!(outcome, vmx_model::Outcome::Delivered(d) if d.vector == 6));
    });
}

#[test]
fn s8_l1_reads_the_entry_bit_for_bit_and_the_index() {
    everywhere(|session, _| {
        for index in [2, 511, 3, 6, 0] {
            session.switch(index);
            let entry = session.word(layout::EPTP_LIST + 8 * index);
            assert_eq!(session.field(Field::EPT_POINTER), entry);
            assert_eq!(session.field(Field::EPTP_INDEX), index);
        }
        // The same EPTP at another index.
        session.switch(2);
        session.switch(6);
        assert_eq!(session.field(Field::EPTP_INDEX), 6);
    });
}

#[test]
fn s9_the_list_is_read_at_each_switch() {
    everywhere(|session, _| {
        for view in [2, 0, 3, 2] {
            session.write(layout::EPTP_LIST + 8 * 9, layout::eptp(view, false));
            session.switch(9);
            assert_eq!(session.load(DATA), mark(view, 0));
        }
    });
}
