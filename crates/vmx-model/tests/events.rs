//! How are events delivered, intercepted, converted and injected?

mod stage;

use stage::*;
use vmx_defs::event::IntrInfo;
use vmx_defs::{ExitReason, Field, ProcCtls, ve};
use vmx_model::program::{GuestMode, Setup};
use vmx_model::registers::gpr;
use vmx_model::{Action, Machine, ModelCaps, Operation, Outcome, Retention, Session, layout};

const LOAD: Operation = Operation::Load { at: DATA, size: 8 };
const UNMAPPED: u64 = DATA + 0x9000;

fn stage(config: &Setup, case: impl FnOnce(&mut Session<'_, Machine>)) {
    let caps = ModelCaps::default();
    let mut machine = machine(Retention::Everything);
    case(&mut Session::new(&mut machine, &caps, config));
}

fn modes() -> [Setup; 3] {
    [GuestMode::Long, GuestMode::Pae, GuestMode::Bits32].map(|mode| setup(mode, 1))
}

fn with_exceptions(bitmap: u32) -> Setup {
    let mut config = setup(GuestMode::Long, 1);
    config.vms[0].exceptions = bitmap;
    config
}

fn with_ve(suppress: bool) -> Setup {
    Setup { ve: true, suppress_ve: suppress, ..setup(GuestMode::Long, 1) }
}

/// Where the guest's stack page is in memory.
const STACK: u64 = layout::guest_structure(layout::guest::STACK);

#[test]
fn a_page_fault_pushes_its_frame_and_sets_cr2() {
    for config in modes() {
        stage(&config, |session| {
            let fault = session.fault_of(Operation::Load { at: UNMAPPED, size: 8 });
            assert_eq!((fault.vector, fault.error_code, fault.cr2), (14, Some(0), Some(UNMAPPED)));
            assert_eq!(session.done(Operation::MovFromCr { register: 2 }), UNMAPPED);
            let rip = session.field(Field::GUEST_RIP) - 3 - 3;
            if config.vms[0].mode == GuestMode::Long {
                let frame = [0, 1, 2, 3, 4, 5].map(|n| session.word(STACK + 0x600 - 48 + 8 * n));
                let rsp = (layout::guest::STACK << 12) + 0x600;
                assert_eq!(frame, [0, rip, 8, 0x1_0002, rsp, 0x10]);
            } else {
                let frame = [0, 1].map(|n| session.word(STACK + 0x600 - 16 + 8 * n));
                assert_eq!(frame, [rip << 32, 0x1_0002 << 32 | 8]);
            }
        });
    }
}

#[test]
fn page_fault_error_codes() {
    stage(&setup(GuestMode::Long, 1), |session| {
        let entry = layout::guest_structure(layout::guest::LONG + 3) + 8 * layout::DATA;
        let code = |session: &mut Session<'_, Machine>, value, operation| {
            session.write(entry, value);
            session.fault_of(operation).error_code
        };
        let page = layout::DATA << 12;
        let store = Operation::Store { at: DATA, size: 8, value: 1 };
        let fetch = Operation::Fetch { at: DATA };
        assert_eq!(code(session, 0, store), Some(2));
        assert_eq!(code(session, page | 5, store), Some(3));
        assert_eq!(code(session, page | 7 | 1 << 63, fetch), Some(0x11));
        assert_eq!(code(session, page | 7 | 1 << 45, LOAD), Some(9));
        session.done(Operation::SetPrivilege(3));
        assert_eq!(code(session, page | 3, LOAD), Some(5));
        assert_eq!(code(session, page | 5, store), Some(7));
    });
}

#[test]
fn intercepted_page_faults() {
    stage(&with_exceptions(1 << 14), |session| {
        let load = Operation::Load { at: UNMAPPED, size: 8 };
        assert_eq!(session.exit_of(load), ExitReason::EXCEPTION_OR_NMI);
        assert_eq!(session.field(Field::EXIT_QUALIFICATION), UNMAPPED);
        let information = IntrInfo::exception(14, true);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), u32::from(information).into());
        assert_eq!(session.field(Field::EXIT_INTR_ERROR), 0);
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 0);
        assert_eq!(session.done(Operation::MovFromCr { register: 2 }), 0, "CR2 stays");
        // Mask and match choose by the error code, and turn the bit around where they differ.
        session.act(Action::SetField(Field::PF_ERROR_MASK, 2));
        session.act(Action::SetField(Field::PF_ERROR_MATCH, 2));
        assert_eq!(session.fault_of(load).vector, 14);
        let store = Operation::Store { at: UNMAPPED, size: 8, value: 0 };
        assert_eq!(session.exit_of(store), ExitReason::EXCEPTION_OR_NMI);
        session.act(Action::SetField(Field::EXCEPTION_BITMAP, 0));
        assert_eq!(session.exit_of(load), ExitReason::EXCEPTION_OR_NMI);
        assert_eq!(session.fault_of(store).vector, 14);
    });
}

#[test]
fn software_events() {
    stage(&with_exceptions(1 << 3), |session| {
        assert_eq!(session.exit_of(Operation::Int3), ExitReason::EXCEPTION_OR_NMI);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), 1 << 31 | 6 << 8 | 3);
        assert_eq!(session.field(Field::EXIT_INSTRUCTION_LEN), 1);
        let rip = session.field(Field::GUEST_RIP);
        assert_eq!(session.fault_of(Operation::Int(3)).vector, 3, "INT 3 is no exception");
        assert_eq!(session.field(Field::GUEST_RIP), rip + 2 + 3);
        // The return address is that of the next instruction.
        assert_eq!(session.word(STACK + 0x600 - 40), rip + 2);
    });
}

#[test]
fn an_ept_violation_of_a_push_is_told_with_the_event() {
    stage(&setup(GuestMode::Long, 1), |session| {
        session.write(leaf(0, layout::guest::STACK), STACK | 6 << 3 | 1);
        assert_eq!(session.exit_of(Operation::Ud2), ExitReason::EPT_VIOLATION);
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 1 << 31 | 3 << 8 | 6);
        let load = Operation::Load { at: UNMAPPED, size: 8 };
        assert_eq!(session.exit_of(load), ExitReason::EPT_VIOLATION);
        let information = 1 << 31 | 1 << 11 | 3 << 8 | 14;
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), information);
        assert_eq!(session.exit_of(Operation::Int(0x80)), ExitReason::EPT_VIOLATION);
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 1 << 31 | 4 << 8 | 0x80);
        assert_eq!(session.field(Field::EXIT_INSTRUCTION_LEN), 2);
        // L1 grants the page and injects the event again.
        session.write(leaf(0, layout::guest::STACK), STACK | layout::EPT_LEAF);
        let rip = session.field(Field::GUEST_RIP);
        session.act(Action::SetField(Field::ENTRY_INTR_INFO, 1 << 31 | 4 << 8 | 0x80));
        session.act(Action::SetField(Field::ENTRY_INSTRUCTION_LEN, 2));
        let entered = session.enter(0);
        assert!(matches!(entered, Some(Outcome::Entered(Some(event))) if event.vector == 0x80));
        assert_eq!(session.field(Field::GUEST_RIP), rip + 2 + 3);
        assert_eq!(session.field(Field::ENTRY_INTR_INFO), 4 << 8 | 0x80, "injected once");
    });
}

#[test]
fn double_and_triple_faults() {
    stage(&with_exceptions(1 << 8), |session| {
        // The page fault's gate is not present: #NP while a page fault is delivered.
        let gate = layout::guest_structure(layout::guest::IDT) + 14 * 16;
        let good = session.word(gate);
        session.write(gate, good & !(1 << 47));
        let load = Operation::Load { at: UNMAPPED, size: 8 };
        assert_eq!(session.exit_of(load), ExitReason::EXCEPTION_OR_NMI);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), 1 << 31 | 1 << 11 | 3 << 8 | 8);
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 0, "exits directly");
        session.act(Action::SetField(Field::EXCEPTION_BITMAP, 0));
        let fault = session.fault_of(load);
        assert_eq!((fault.vector, fault.error_code), (8, Some(0)));
        // Without any stack, a double fault is a triple fault.
        session.act(Action::SetField(Field::GUEST_RSP, UNMAPPED + 0x800));
        assert_eq!(session.exit_of(Operation::Ud2), ExitReason::TRIPLE_FAULT);
        // A benign first event and a page fault are taken one after the other.
        session.act(Action::SetField(Field::EXCEPTION_BITMAP, 1 << 14));
        assert_eq!(session.exit_of(Operation::Ud2), ExitReason::EXCEPTION_OR_NMI);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), 1 << 31 | 1 << 11 | 3 << 8 | 14);
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 1 << 31 | 3 << 8 | 6);
    });
}

#[test]
fn a_stack_switch_reads_the_tss() {
    stage(&setup(GuestMode::Long, 1), |session| {
        session.done(Operation::SetPrivilege(3));
        session.fault_of(Operation::Ud2);
        let frame = [0, 1, 2, 3, 4].map(|n| session.word(STACK + 0x700 - 40 + 8 * n));
        assert_eq!(frame[1..], [0xb, 0x1_0002, (layout::guest::STACK << 12) + 0x600, 0x13]);
    });
}

fn ve_word(session: &mut Session<'_, Machine>, offset: u64) -> u64 {
    session.word(layout::ve_area(0) + offset)
}

#[test]
fn an_ept_violation_becomes_a_virtualization_exception() {
    for flags in [false, true] {
        stage(&with_ve(false), |session| {
            session.act(Action::SetField(Field::EPT_POINTER, layout::eptp(0, flags)));
            session.write(leaf(2, layout::DATA), 0);
            session.switch(2);
            assert_eq!(session.fault_of(LOAD).vector, 20);
            assert_eq!(ve_word(session, ve::EXIT_REASON), 48 | 0xffff_ffff << 32);
            assert_eq!(ve_word(session, ve::EXIT_QUALIFICATION), 1 | 3 << 7);
            assert_eq!(ve_word(session, ve::GUEST_LINEAR_ADDRESS), DATA);
            assert_eq!(ve_word(session, ve::GUEST_PHYSICAL_ADDRESS), DATA);
            assert_eq!(ve_word(session, ve::EPTP_INDEX) & 0xffff, 2);
            // While the area is busy, violations exit.
            assert_eq!(session.exit_of(LOAD), ExitReason::EPT_VIOLATION);
            session.write(layout::ve_area(0), 48);
            assert_eq!(session.fault_of(LOAD).vector, 20);
            session.write(layout::ve_area(0), 0);
            // Bit 20 of the exception bitmap; the area is written all the same.
            session.act(Action::SetField(Field::EXCEPTION_BITMAP, 1 << 20));
            assert_eq!(session.exit_of(LOAD), ExitReason::EXCEPTION_OR_NMI);
            assert_eq!(session.field(Field::EXIT_INTR_INFO), 1 << 31 | 3 << 8 | 20);
            assert_eq!(ve_word(session, ve::EXIT_REASON), 48 | 0xffff_ffff << 32);
        });
    }
}

#[test]
fn one_entry_decides_whether_ve_is_suppressed() {
    const SUPPRESS: u64 = 1 << 63;
    let store = Operation::Store { at: DATA, size: 8, value: 1 };
    stage(&with_ve(true), |session| {
        let data = layout::guest_data(0, 0);
        let read_only = data | layout::EPT_LEAF & !2;
        let clear = |session: &mut Session<'_, Machine>| session.write(layout::ve_area(0), 0);
        // The leaf, where all entries are present.
        session.write(leaf(0, layout::DATA), read_only | SUPPRESS);
        assert_eq!(session.exit_of(store), ExitReason::EPT_VIOLATION);
        session.write(leaf(0, layout::DATA), read_only);
        assert_eq!(session.fault_of(store).vector, 20);
        clear(session);
        // The entry that is not present; those above it have no say.
        session.write(leaf(0, layout::DATA), SUPPRESS);
        assert_eq!(session.exit_of(store), ExitReason::EPT_VIOLATION);
        session.write(leaf(0, layout::DATA), 0);
        let directory = layout::ept_table(0, 2);
        let table = session.word(directory);
        session.write(directory, table | SUPPRESS);
        assert_eq!(session.fault_of(store).vector, 20);
        clear(session);
    });
}

#[test]
fn no_virtualization_exception_during_delivery_or_when_off() {
    stage(&with_ve(false), |session| {
        session.write(leaf(0, layout::guest::STACK), 0);
        assert_eq!(session.exit_of(Operation::Ud2), ExitReason::EPT_VIOLATION);
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 1 << 31 | 3 << 8 | 6);
        assert_eq!(ve_word(session, 0), 0);
    });
    stage(&Setup { suppress_ve: false, ..setup(GuestMode::Long, 1) }, |session| {
        session.write(leaf(0, layout::DATA), 0);
        assert_eq!(session.exit_of(LOAD), ExitReason::EPT_VIOLATION);
    });
}

#[test]
fn injected_events() {
    for config in modes() {
        stage(&config, |session| {
            session.leave(0);
            session.act(Action::SetField(Field::ENTRY_INTR_INFO, 1 << 31 | 1 << 11 | 3 << 8 | 13));
            session.act(Action::SetField(Field::ENTRY_EXCEPTION_ERROR, 0x18));
            let Some(Outcome::Entered(Some(event))) = session.enter(0) else { panic!() };
            assert_eq!((event.vector, event.error_code), (13, Some(0x18)));
        });
    }
    // An injected exception does not exit by the exception bitmap, but its delivery may.
    stage(&with_exceptions(u32::MAX), |session| {
        session.leave(0);
        session.act(Action::SetField(Field::ENTRY_INTR_INFO, 1 << 31 | 3 << 8 | 6));
        assert!(matches!(session.enter(0), Some(Outcome::Entered(Some(_)))));
        session.leave(0);
        session.write(leaf(0, layout::guest::IDT), 0);
        session.act(Action::Invept { kind: 2, eptp: 0 });
        session.act(Action::SetField(Field::ENTRY_INTR_INFO, 1 << 31 | 3 << 8 | 6));
        assert_eq!(session.enter(0), Some(Outcome::Exit(ExitReason::EPT_VIOLATION)));
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 1 << 31 | 3 << 8 | 6);
    });
}

#[test]
fn nmis_and_their_window() {
    stage(&setup(GuestMode::Long, 1), |session| {
        session.load(DATA);
        session.platform().processors[0].signal_nmi();
        assert_eq!(session.exit_of(LOAD), ExitReason::EXCEPTION_OR_NMI);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), 1 << 31 | 2 << 8 | 2);
        // Blocked until a guest unblocks: the VM entry does, without blocking in its state.
        session.platform().processors[0].signal_nmi();
        assert!(matches!(
            session.l1(0, Operation::MovFromCr { register: 0 }),
            Outcome::Completed { .. }
        ));
        assert_eq!(session.exit_of(LOAD), ExitReason::EXCEPTION_OR_NMI);
        // NMI-window exiting, with virtual NMIs.
        let pin = session.field(Field::PIN_CTLS);
        let proc = session.field(Field::PROC_CTLS);
        let window = u64::from(ProcCtls::NMI_WINDOW_EXITING.bits());
        session.act(Action::SetField(Field::PIN_CTLS, pin | 1 << 5));
        session.act(Action::SetField(Field::PROC_CTLS, proc | window));
        session.act(Action::SetField(Field::GUEST_INTERRUPTIBILITY, 8));
        session.load(DATA);
        session.act(Action::SetField(Field::GUEST_INTERRUPTIBILITY, 0));
        assert_eq!(session.exit_of(LOAD), ExitReason::NMI_WINDOW);
    });
}

#[test]
fn interrupts_wake_and_wait() {
    stage(&setup(GuestMode::Long, 1), |session| {
        let processor = |session: &mut Session<'_, Machine>| {
            session.platform().processors[0].signal_interrupt(0x30);
        };
        session.load(DATA);
        processor(session);
        session.load(DATA);
        session.done(Operation::SetFlags(1 << 9));
        assert_eq!(session.fault_of(LOAD).vector, 0x30);
        session.done(Operation::Hlt);
        processor(session);
        assert_eq!(session.fault_of(LOAD).vector, 0x30);
        session.load(DATA);
        let proc = session.field(Field::PROC_CTLS);
        session.act(Action::SetField(Field::PROC_CTLS, proc | 1 << 2));
        assert_eq!(session.exit_of(LOAD), ExitReason::INTERRUPT_WINDOW);
        session.act(Action::SetField(Field::PROC_CTLS, proc));
        let pin = session.field(Field::PIN_CTLS);
        session.act(Action::SetField(Field::PIN_CTLS, pin | 1));
        session.load(DATA);
        processor(session);
        assert_eq!(session.exit_of(LOAD), ExitReason::EXTERNAL_INTERRUPT);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), 0);
        // It was not acknowledged, and exits again.
        assert_eq!(session.exit_of(LOAD), ExitReason::EXTERNAL_INTERRUPT);
        let exit = session.field(Field::EXIT_CTLS);
        session.act(Action::SetField(Field::EXIT_CTLS, exit | 1 << 15));
        assert_eq!(session.exit_of(LOAD), ExitReason::EXTERNAL_INTERRUPT);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), 1 << 31 | 0x30);
        session.load(DATA);
    });
}

#[test]
fn real_mode_pushes_three_words() {
    stage(&setup(GuestMode::Unpaged, 1), |session| {
        session.leave(0);
        for [selector, base, limit, rights] in [
            [
                Field::GUEST_CS_SELECTOR,
                Field::GUEST_CS_BASE,
                Field::GUEST_CS_LIMIT,
                Field::GUEST_CS_AR,
            ],
            [
                Field::GUEST_SS_SELECTOR,
                Field::GUEST_SS_BASE,
                Field::GUEST_SS_LIMIT,
                Field::GUEST_SS_AR,
            ],
        ] {
            session.act(Action::SetField(selector, 0x1e00));
            session.act(Action::SetField(base, 0x1e000));
            session.act(Action::SetField(limit, 0xffff));
            session.act(Action::SetField(rights, 0x93));
        }
        let cr0 = session.field(Field::GUEST_CR0);
        session.act(Action::SetField(Field::GUEST_CR0, cr0 & !1));
        session.act(Action::SetField(Field::GUEST_RSP, 0x600));
        session.act(Action::SetField(Field::GUEST_RIP, 0x40));
        assert_eq!(session.fault_of(Operation::Ud2).vector, 6);
        assert_eq!(session.word(STACK + 0x5f8) >> 16, 0x2_1e00_0040);
        assert_eq!(session.platform().processors[0].regs.gprs[gpr::RSP], 0x600);
        // No event has an error code: what is delivered, what exits, and what an exit interrupts.
        let protected = Operation::Rdmsr(0x1234);
        let fault = session.fault_of(protected);
        assert_eq!((fault.vector, fault.error_code), (13, None));
        session.act(Action::SetField(Field::EXCEPTION_BITMAP, 1 << 13));
        assert_eq!(session.exit_of(protected), ExitReason::EXCEPTION_OR_NMI);
        assert_eq!(session.field(Field::EXIT_INTR_INFO), 1 << 31 | 3 << 8 | 13);
        session.act(Action::SetField(Field::EXCEPTION_BITMAP, 0));
        session.act(Action::Write { at: leaf(0, 0x1e), value: 0 });
        session.act(Action::Invept { kind: 2, eptp: 0 });
        assert_eq!(session.exit_of(protected), ExitReason::EPT_VIOLATION);
        assert_eq!(session.field(Field::IDT_VECTORING_INFO), 1 << 31 | 3 << 8 | 13);
    });
}
