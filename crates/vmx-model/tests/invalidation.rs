//! Which operation of L1 or the guest makes which stale mapping unusable, and which must leave it?
//!
//! Four stale mappings are prepared behind everyone's back; after one operation, the adversarial
//! policy still uses each unless the SDM says that it had to go. This is the table of "Operations
//! that Invalidate Cached Mappings" as software can see it.

mod stage;

use stage::*;
use vmx_defs::{ExitReason, Field};
use vmx_model::program::GuestMode;
use vmx_model::registers::cr4;
use vmx_model::{Action, Machine, ModelCaps, Operation, Outcome, Retention, Session, layout};

/// Something that a session is led to do.
type Led = fn(&mut Session<'_, Machine>);

/// What has become stale.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stale {
    /// A combined translation: the guest changed its page-table entry.
    Combined,
    /// A combined and a guest-physical translation: L1 changed the EPT leaf.
    GuestPhysical,
    /// A combined paging-structure-cache entry: the guest changed its page-directory entry.
    CombinedTable,
    /// A guest-physical paging-structure-cache entry: L1 changed the EPT page-directory entry.
    GuestTable,
}

use Stale::{Combined, CombinedTable, GuestPhysical, GuestTable};

const ALL: [Stale; 4] = [Combined, GuestPhysical, CombinedTable, GuestTable];

const PT: u64 = layout::guest::LONG + 3;

/// Makes `stale` stale. Returns the address to read, and what it reads as stale and as fresh.
fn prepare(session: &mut Session<'_, Machine>, stale: Stale) -> (u64, u64, u64) {
    assert_eq!(session.load(DATA), mark(0, 0));
    match stale {
        Combined => {
            let entry = layout::guest_structure(PT) + 8 * layout::DATA;
            session.write(entry, (layout::DATA + 1) << 12 | layout::PWU);
            // Its guest-physical page has been used, so that nothing else is in question.
            (DATA, mark(0, 0), mark(0, 1))
        }
        GuestPhysical => {
            session.write(leaf(0, layout::DATA), layout::guest_data(2, 0) | layout::EPT_LEAF);
            (DATA, mark(0, 0), mark(2, 0))
        }
        CombinedTable => {
            // Another page of the same 2-MByte region. The other page table turns data by one.
            let entry = layout::guest_structure(layout::guest::LONG + 2);
            session.write(entry, (layout::guest::LONG_2 + 3) << 12 | layout::PWU);
            (DATA + 0x1000, mark(0, 1), mark(0, 2))
        }
        GuestTable => {
            session.write(layout::ept_table(0, 2), layout::ept_table(2, 1) | 7);
            (DATA + 0x1000, mark(0, 1), mark(2, 1))
        }
    }
}

/// After `operation`, exactly the mappings in `gone` must be unusable.
fn check(what: &str, vpid: u16, gone: &[Stale], operation: impl Fn(&mut Session<'_, Machine>)) {
    let caps = ModelCaps::default();
    for stale in ALL {
        let mut machine = machine(Retention::Everything);
        let mut config = setup(GuestMode::Long, vpid);
        config.vms[0].cr4 = cr4::PCIDE;
        let mut session = Session::new(&mut machine, &caps, &config);
        let (at, old, new) = prepare(&mut session, stale);
        operation(&mut session);
        let expected = if gone.contains(&stale) { new } else { old };
        assert_eq!(session.load(at), expected, "{what}, VPID {vpid}, {stale:?}");
    }
}

/// Combined mappings of the current VPID and PCID go, guest-physical ones stay.
const LINEAR: &[Stale] = &[Combined, CombinedTable];

#[test]
fn nothing_is_forgotten_for_no_reason() {
    check("nothing", 1, &[], |_| {});
    check("nothing", 0, &[], |_| {});
    check("CPUID, handled by L1", 1, &[], |session| {
        session.exit_of(Operation::Cpuid { leaf: 0, subleaf: 0 });
    });
    check("another guest", 1, &[], |session| {
        session.act(Action::Switch(1));
        session.act(Action::SetField(Field::VPID, 2));
        session.act(Action::SetField(Field::EPT_POINTER, layout::eptp(2, false)));
        session.load(DATA);
        session.act(Action::Switch(0));
    });
    check("VMXOFF and VMXON", 1, &[], |session| {
        session.leave(0);
        let vmcs = session.operand(0, &[layout::vmcs(0, 0)]);
        session.l1(0, Operation::Vmclear { operand: vmcs });
        session.l1(0, Operation::Vmxoff);
        let vmxon = session.operand(0, &[layout::vmxon(0)]);
        session.l1(0, Operation::Vmxon { operand: vmxon });
        session.act(Action::Clear);
    });
}

#[test]
fn transitions_without_vpid() {
    check("VM exit and entry", 0, LINEAR, |session| session.leave(0));
}

#[test]
fn eptp_switches() {
    for view in [0, 2] {
        check("VMFUNC", 1, &[], |session| {
            session.switch(view);
            session.switch(0);
        });
        check("VMFUNC", 0, LINEAR, |session| {
            session.switch(view);
            session.switch(0);
        });
    }
    check("VMFUNC that is refused", 0, LINEAR, |session| {
        // It exits, and the exit invalidates as exits without VPID do.
        session.exit_of(Operation::Vmfunc { rax: 0, rcx: 512 });
    });
}

#[test]
fn operations_of_the_guest() {
    let cr3 = layout::guest_cr3(GuestMode::Long)[0];
    let mov_cr3 = |value| Operation::MovToCr { register: 3, value };
    for vpid in [0, 1] {
        check("INVLPG", vpid, LINEAR, |session| {
            session.done(Operation::Invlpg { at: DATA });
        });
        check("INVLPG elsewhere", vpid, &[CombinedTable], |session| {
            session.done(Operation::Invlpg { at: 0x12_3456_7000 });
        });
        check("MOV to CR3", vpid, LINEAR, |session| {
            session.done(mov_cr3(cr3));
        });
        check("MOV to CR3, bit 63", vpid, &[], |session| {
            session.done(mov_cr3(cr3 | 1 << 63));
        });
        check("MOV to CR3, another PCID", vpid, &[], |session| {
            session.done(mov_cr3(cr3 | 5));
            session.done(mov_cr3(cr3 | 1 << 63));
        });
        let invpcid = |kind, pcid, address| {
            move |session: &mut Session<'_, Machine>| {
                session.act(Action::Invpcid { kind, pcid, address });
            }
        };
        check("INVPCID 0", vpid, LINEAR, invpcid(0, 0, DATA));
        check("INVPCID 0, another PCID", vpid, &[], invpcid(0, 5, DATA));
        check("INVPCID 1", vpid, LINEAR, invpcid(1, 0, 0));
        check("INVPCID 1, another PCID", vpid, &[], invpcid(1, 5, 0));
        check("INVPCID 2", vpid, LINEAR, invpcid(2, 0, 0));
        check("INVPCID 3", vpid, LINEAR, invpcid(3, 0, 0));
        check("CR4.PGE", vpid, LINEAR, |session| {
            let value = cr4::PAE | cr4::PCIDE;
            session.done(Operation::MovToCr { register: 4, value });
        });
    }
}

#[test]
fn invept() {
    let invept = |kind, eptp| {
        move |session: &mut Session<'_, Machine>| session.act(Action::Invept { kind, eptp })
    };
    check("INVEPT 1", 1, &ALL, invept(1, layout::eptp(0, false)));
    // The EP4TA is what counts.
    check("INVEPT 1, A/D", 1, &ALL, invept(1, layout::eptp(0, true)));
    check("INVEPT 1, another", 1, &[], invept(1, layout::eptp(2, false)));
    check("INVEPT 2", 1, &ALL, invept(2, 0));
    check("INVEPT 2", 0, &ALL, invept(2, 0));
    check("INVEPT 0", 1, &[], invept(0, layout::eptp(0, false)));
}

#[test]
fn invvpid() {
    let invvpid = |kind, vpid, address| {
        move |session: &mut Session<'_, Machine>| {
            session.act(Action::Invvpid { kind, vpid, address });
        }
    };
    check("INVVPID 0", 1, LINEAR, invvpid(0, 1, DATA));
    check("INVVPID 0, another page of the region", 1, &[CombinedTable], |session| {
        session.act(Action::Invvpid { kind: 0, vpid: 1, address: DATA + 0x8000 });
    });
    check("INVVPID 0, another VPID", 1, &[], invvpid(0, 2, DATA));
    check("INVVPID 1", 1, LINEAR, invvpid(1, 1, 0));
    check("INVVPID 1, another", 1, &[], invvpid(1, 2, 0));
    check("INVVPID 2", 1, LINEAR, invvpid(2, 0, 0));
    check("INVVPID 3", 1, LINEAR, invvpid(3, 1, 0));
    check("INVVPID 1 of VPID 0000H", 1, &[], invvpid(1, 0, 0));
}

#[test]
fn globals_outlive_cr3_and_invvpid_3() {
    let caps = ModelCaps::default();
    let global = layout::DATA + layout::DATA_PAGES - 1;
    let operations: [(&str, bool, Led); 5] = [
        ("MOV to CR3", true, |session| {
            let value = layout::guest_cr3(GuestMode::Long)[0];
            session.done(Operation::MovToCr { register: 3, value });
        }),
        ("INVVPID 3", true, |session| {
            session.act(Action::Invvpid { kind: 3, vpid: 1, address: 0 });
        }),
        ("INVPCID 3", true, |session| {
            session.act(Action::Invpcid { kind: 3, pcid: 0, address: 0 });
        }),
        ("INVPCID 2", false, |session| {
            session.act(Action::Invpcid { kind: 2, pcid: 0, address: 0 });
        }),
        ("INVLPG", false, |session| {
            session.done(Operation::Invlpg { at: (layout::DATA + layout::DATA_PAGES - 1) << 12 });
        }),
    ];
    for (what, kept, operation) in operations {
        let mut machine = machine(Retention::Everything);
        let mut session = Session::new(&mut machine, &caps, &setup(GuestMode::Long, 1));
        let number = layout::DATA_PAGES - 1;
        assert_eq!(session.load(global << 12), mark(0, number));
        let entry = layout::guest_structure(PT) + 8 * global;
        session.write(entry, (layout::DATA) << 12 | layout::PWU);
        operation(&mut session);
        let expected = if kept { mark(0, number) } else { mark(0, 0) };
        assert_eq!(session.load(global << 12), expected, "{what}");
    }
}

/// An EPT violation makes the processor forget what it was caused by: L1 may grant the page without
/// INVEPT, and the guest's next access sees it.
#[test]
fn an_ept_violation_forgets_its_own_cause() {
    let caps = ModelCaps::default();
    for vpid in [0, 1] {
        let mut machine = machine(Retention::Everything);
        let mut session = Session::new(&mut machine, &caps, &setup(GuestMode::Long, vpid));
        let data = layout::guest_data(0, 0);
        session.write(leaf(0, layout::DATA), data | layout::EPT_LEAF & !2);
        assert_eq!(session.load(DATA), mark(0, 0));
        // Granted by now, but the processor still knows the page as read-only: a spurious violation,
        // as the architecture allows, and once only.
        let other = layout::guest_data(2, 0);
        session.write(leaf(0, layout::DATA), other | layout::EPT_LEAF);
        let store = Operation::Store { at: DATA + 8, size: 8, value: 7 };
        assert_eq!(session.exit_of(store), ExitReason::EPT_VIOLATION);
        session.done(store);
        assert_eq!(session.word(other + 8), 7);
        assert_eq!(session.load(DATA), mark(2, 0), "and reads see the new page");
    }
}

#[test]
fn a_page_fault_forgets_its_own_cause() {
    let caps = ModelCaps::default();
    let mut machine = machine(Retention::Everything);
    let mut session = Session::new(&mut machine, &caps, &setup(GuestMode::Long, 1));
    let entry = layout::guest_structure(PT) + 8 * layout::DATA;
    session.write(entry, layout::DATA << 12 | 1);
    assert_eq!(session.load(DATA), mark(0, 0));
    session.write(entry, layout::DATA << 12 | layout::PWU);
    let store = Operation::Store { at: DATA, size: 8, value: 7 };
    let fault = session.fault_of(store);
    assert_eq!((fault.vector, fault.error_code, fault.cr2), (14, Some(3), Some(DATA)));
    session.done(store);
}

/// Root operation uses VPID 0000H: transitions without VPID drop L1's own linear mappings, and
/// INVEPT and INVVPID of other VPIDs do not.
#[test]
fn linear_mappings_of_l1() {
    let caps = ModelCaps::default();
    let cases: [(&str, u16, bool, Led); 7] = [
        ("a guest with a VPID", 1, false, |session| {
            session.load(DATA);
        }),
        ("a guest without", 0, true, |session| {
            session.load(DATA);
        }),
        ("INVEPT", 1, false, |session| session.act(Action::Invept { kind: 2, eptp: 0 })),
        ("INVVPID 2", 1, false, |session| {
            session.act(Action::Invvpid { kind: 2, vpid: 0, address: 0 });
        }),
        ("INVLPG of the guest", 1, false, |session| {
            session.done(Operation::Invlpg { at: layout::L1_WINDOW });
        }),
        ("INVLPG of L1", 1, true, |session| {
            session.l1(0, Operation::Invlpg { at: layout::L1_WINDOW });
        }),
        ("MOV to CR3 of L1", 1, true, |session| {
            session.l1(0, Operation::MovToCr { register: 3, value: layout::L1_CR3 });
        }),
    ];
    for (what, vpid, gone, operation) in cases {
        let mut machine = machine(Retention::Everything);
        let mut session = Session::new(&mut machine, &caps, &setup(GuestMode::Long, vpid));
        let load = Operation::Load { at: layout::L1_WINDOW, size: 8 };
        session.l1(0, load);
        session.write(layout::L1_WINDOW_PT, (layout::L1_DATA + 0x3000) | 3);
        operation(&mut session);
        session.leave(0);
        let page = if gone { layout::L1_DATA + 0x3000 } else { layout::L1_DATA };
        let value = layout::mark(page);
        assert_eq!(session.l1(0, load), Outcome::Completed { value, flags: 0 }, "{what}");
    }
}

/// What one processor invalidates, another keeps.
#[test]
fn processors_have_caches_of_their_own() {
    let caps = ModelCaps::default();
    let mut config = setup(GuestMode::Long, 1);
    config.processors = 2;
    let mut machine = machine_with(Retention::Everything, &caps, 2);
    let mut session = Session::new(&mut machine, &caps, &config);
    let load = Operation::Load { at: DATA, size: 8 };
    let value = |outcome| match outcome {
        Outcome::Completed { value, .. } => value,
        other => panic!("{other:?}"),
    };
    for processor in 0..2 {
        assert_eq!(value(session.guest(processor, load)), mark(0, 0));
    }
    session.write(leaf(0, layout::DATA), layout::guest_data(2, 0) | layout::EPT_LEAF);
    session.act(Action::Invept { kind: 2, eptp: 0 });
    assert_eq!(value(session.guest(0, load)), mark(2, 0));
    assert_eq!(value(session.guest(1, load)), mark(0, 0));
}
