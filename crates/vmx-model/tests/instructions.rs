//! What do the VMX instructions answer, and what exits?

mod stage;

use stage::*;
use vmx_defs::exit::{CrAccess, InstructionInfo};
use vmx_defs::{ExitReason, Field, Hpa, ProcCtls, VmInstructionError as E};
use vmx_model::program::GuestMode;
use vmx_model::registers::{cr0, cr4};
use vmx_model::vmx::VmxFailure;
use vmx_model::{
    Action, Machine, ModelCaps, Operation, Outcome, Processor, Retention, Session, VmxMode, layout,
};

const CF: u64 = 1;
const ZF: u64 = 1 << 6;

fn stage(case: impl FnOnce(&mut Session<'_, Machine>)) {
    let caps = ModelCaps::default();
    let mut machine = machine(Retention::Everything);
    case(&mut Session::new(&mut machine, &caps, &setup(GuestMode::Long, 1)));
}

fn flags(session: &mut Session<'_, Machine>, operation: Operation) -> u64 {
    match session.l1(0, operation) {
        Outcome::Completed { flags, .. } => flags,
        other => panic!("{operation:?}: {other:?}"),
    }
}

fn fails(session: &mut Session<'_, Machine>, operation: Operation, error: E) {
    assert_eq!(flags(session, operation), ZF, "{operation:?}");
    let number = session.read_field(0, Field::VM_INSTRUCTION_ERROR);
    assert_eq!(number, error.number().into(), "{operation:?}");
}

#[test]
fn regions() {
    stage(|session| {
        let vmxon = layout::vmxon(0);
        let wide = 1 << 40;
        for (region, vmclear, vmptrld) in [
            (vmxon, E::VmclearVmxonPointer, E::VmptrldVmxonPointer),
            (vmxon + 8, E::VmclearAddress, E::VmptrldAddress),
            (wide, E::VmclearAddress, E::VmptrldAddress),
        ] {
            let operand = session.operand(0, &[region]);
            fails(session, Operation::Vmclear { operand }, vmclear);
            fails(session, Operation::Vmptrld { operand }, vmptrld);
        }
        let operand = session.operand(0, &[layout::L1_DATA]);
        fails(session, Operation::Vmptrld { operand }, E::VmptrldRevision);
        fails(session, Operation::Vmxon { operand }, E::VmxonInRoot);
        fails(session, Operation::Vmcall, E::VmcallInRoot);
        let at = layout::operands(0);
        assert_eq!(flags(session, Operation::Vmptrst { operand: at }), 0);
        assert_eq!(session.word(at), layout::vmcs(0, 0));
    });
}

#[test]
fn launch_states() {
    stage(|session| {
        fails(session, Operation::Vmresume, E::VmresumeNotLaunched);
        session.load(DATA);
        session.leave(0);
        fails(session, Operation::Vmlaunch, E::VmlaunchNotClear);
        session.act(Action::Clear);
        fails(session, Operation::Vmresume, E::VmresumeNotLaunched);
        // The data has been to memory and back.
        assert_eq!(session.load(DATA), mark(0, 0));
    });
}

#[test]
fn without_a_current_vmcs() {
    stage(|session| {
        let operand = session.operand(0, &[layout::vmcs(0, 0)]);
        assert_eq!(flags(session, Operation::Vmclear { operand }), 0);
        let encoding = Field::GUEST_RIP.encoding().into();
        for operation in [
            Operation::Vmread { encoding },
            Operation::Vmwrite { encoding, value: 0 },
            Operation::Vmlaunch,
            Operation::Vmresume,
            Operation::Vmcall,
            Operation::Invept { kind: 7, descriptor: operand },
        ] {
            assert_eq!(flags(session, operation), CF, "{operation:?}");
        }
        flags(session, Operation::Vmptrst { operand });
        assert_eq!(session.word(operand), u64::MAX);
    });
}

#[test]
fn fields() {
    stage(|session| {
        let high = |field: Field| u64::from(field.encoding()) | 1;
        let tsc = Field::TSC_OFFSET;
        session.write_field(0, tsc, 0x1111_2222_3333_4444);
        let read = Operation::Vmread { encoding: high(tsc) };
        assert_eq!(session.l1(0, read), Outcome::Completed { value: 0x1111_2222, flags: 0 });
        flags(session, Operation::Vmwrite { encoding: high(tsc), value: 0xabcd });
        assert_eq!(session.read_field(0, tsc), 0xabcd_3333_4444);
        for encoding in [high(Field::VPID), 0x1_0000, 1 << 32, Field::PML_INDEX.encoding().into()] {
            fails(session, Operation::Vmread { encoding }, E::UnsupportedComponent);
            fails(session, Operation::Vmwrite { encoding, value: 0 }, E::UnsupportedComponent);
        }
        // To and from memory.
        let operand = layout::operands(0);
        let encoding = tsc.encoding().into();
        flags(session, Operation::VmreadMemory { encoding, operand });
        assert_eq!(session.word(operand), 0xabcd_3333_4444);
        session.write(operand, 5);
        flags(session, Operation::VmwriteMemory { encoding, operand });
        assert_eq!(session.read_field(0, tsc), 5);
    });
    let mut caps = ModelCaps::default();
    caps.misc.set_vmwrite_any(false);
    let mut machine = machine_with(Retention::Nothing, &caps, 1);
    let mut session = Session::new(&mut machine, &caps, &setup(GuestMode::Long, 1));
    let encoding = Field::EXIT_REASON.encoding().into();
    fails(&mut session, Operation::Vmwrite { encoding, value: 0 }, E::ReadOnlyComponent);
}

#[test]
fn invalidation_operands() {
    stage(|session| {
        let good = layout::eptp(0, false);
        for (kind, low, high) in
            [(0, good, 0), (3, good, 0), (1, good | 1 << 7, 0), (1, good, 1), (2, 0, 1), (1, 0, 0)]
        {
            let descriptor = session.operand(0, &[low, high]);
            fails(session, Operation::Invept { kind, descriptor }, E::InvalidInvalidation);
        }
        for (kind, low, high) in [
            (4, 1, 0),
            (0, 0, 0),
            (1, 0, 0),
            (3, 0, 0),
            (1, 1 << 16 | 1, 0),
            (0, 1, 0x8000_0000_0000),
        ] {
            let descriptor = session.operand(0, &[low, high]);
            fails(session, Operation::Invvpid { kind, descriptor }, E::InvalidInvalidation);
        }
        for (kind, low) in [(0, 1), (1, 1), (2, 0), (3, 1)] {
            let descriptor = session.operand(0, &[low, 0]);
            assert_eq!(flags(session, Operation::Invvpid { kind, descriptor }), 0);
        }
    });
}

#[test]
fn every_vmx_instruction_of_a_guest_exits() {
    let operand = 0x1238;
    let memory = InstructionInfo::new()
        .with_address_size(2)
        .with_segment(3)
        .with_index_invalid(true)
        .with_base(3);
    let register = InstructionInfo::new().with_is_register(true).with_reg2(1);
    let rows: [(Operation, ExitReason, Option<InstructionInfo>); 14] = [
        (Operation::Vmcall, ExitReason::VMCALL, None),
        (Operation::Vmlaunch, ExitReason::VMLAUNCH, None),
        (Operation::Vmresume, ExitReason::VMRESUME, None),
        (Operation::Vmxoff, ExitReason::VMXOFF, None),
        (Operation::Vmxon { operand }, ExitReason::VMXON, Some(memory)),
        (Operation::Vmclear { operand }, ExitReason::VMCLEAR, Some(memory)),
        (Operation::Vmptrld { operand }, ExitReason::VMPTRLD, Some(memory)),
        (Operation::Vmptrst { operand }, ExitReason::VMPTRST, Some(memory)),
        (Operation::Vmread { encoding: 0 }, ExitReason::VMREAD, Some(register)),
        (Operation::Vmwrite { encoding: 0, value: 1 }, ExitReason::VMWRITE, Some(register)),
        (
            Operation::VmreadMemory { encoding: 0, operand },
            ExitReason::VMREAD,
            Some(memory.with_reg2(1)),
        ),
        (
            Operation::VmwriteMemory { encoding: 0, operand },
            ExitReason::VMWRITE,
            Some(memory.with_reg2(1)),
        ),
        (
            Operation::Invept { kind: 1, descriptor: operand },
            ExitReason::INVEPT,
            Some(memory.with_reg2(1)),
        ),
        (
            Operation::Invvpid { kind: 1, descriptor: operand },
            ExitReason::INVVPID,
            Some(memory.with_reg2(1)),
        ),
    ];
    stage(|session| {
        for level in [0, 3] {
            session.done(Operation::SetPrivilege(level));
            for (operation, reason, information) in rows {
                assert_eq!(session.exit_of(operation), reason);
                let length = session.field(Field::EXIT_INSTRUCTION_LEN);
                assert_eq!(length, operation.length().into());
                let Some(information) = information else { continue };
                let told = session.field(Field::EXIT_INSTRUCTION_INFO);
                assert_eq!(told, u32::from(information).into(), "{operation:?}");
                let displacement = session.field(Field::EXIT_QUALIFICATION);
                if !information.is_register() {
                    // The operand is where base and displacement say.
                    let base = session.platform().processors[0].regs.gprs[3];
                    assert_eq!(base.wrapping_add(displacement), operand);
                }
            }
            session.act(Action::SetField(Field::GUEST_SS_AR, 0xc093));
        }
    });
}

#[test]
fn faults_of_root_software() {
    let caps = ModelCaps::default();
    let vector = |outcome| match outcome {
        Outcome::Delivered(event) => event.vector,
        other => panic!("{other:?}"),
    };
    stage(|session| {
        session.l1(0, Operation::SetPrivilege(3));
        assert_eq!(vector(session.l1(0, Operation::Vmxoff)), 13);
        session.l1(0, Operation::SetPrivilege(0));
        let operand = 0x8000_0000_0000;
        assert_eq!(vector(session.l1(0, Operation::Vmclear { operand })), 13);
        let operand = 0x7fff_0000_0000;
        assert_eq!(vector(session.l1(0, Operation::Vmclear { operand })), 14);
        assert_eq!(flags(session, Operation::Vmxoff), 0);
        assert_eq!(vector(session.l1(0, Operation::Vmcall)), 6);
    });
    let mut machine = machine(Retention::Nothing);
    let Machine { memory, processors } = &mut machine;
    let processor = machine_session(&caps, memory, &mut processors[0]);
    processor.regs.cr4 &= !cr4::VMXE;
    let vmxon = Operation::Vmxon { operand: layout::operands(0) };
    assert_eq!(vector(processor.execute(memory, &vmxon)), 6);
    processor.regs.cr4 |= cr4::VMXE;
    processor.regs.cr0 &= !cr0::NE;
    assert_eq!(vector(processor.execute(memory, &vmxon)), 13);
}

/// The processor alone, with memory as L1 begins with.
fn machine_session<'a>(
    caps: &ModelCaps,
    memory: &mut vmx_model::Memory,
    processor: &'a mut Processor,
) -> &'a mut Processor {
    let mut fresh = machine(Retention::Nothing);
    layout::initialise(&mut fresh, caps, &setup(GuestMode::Long, 1));
    *memory = fresh.memory;
    processor
}

#[test]
fn instructions_by_value_for_a_hypervisor_below() {
    let caps = ModelCaps::default();
    let mut machine = machine(Retention::Everything);
    let Machine { memory, processors } = &mut machine;
    let processor = machine_session(&caps, memory, &mut processors[0]);
    let (vmxon, region) = (Hpa::new(layout::vmxon(0)), Hpa::new(layout::vmcs(0, 0)));
    processor.enter_root(vmxon);
    let mut root = processor.root(memory);
    assert_eq!(root.vmread(Field::GUEST_RIP), Err(VmxFailure::Invalid));
    assert_eq!(root.vmptrld(vmxon), Err(VmxFailure::Error(E::VmptrldVmxonPointer)));
    assert_eq!(root.vmclear(region), Ok(()));
    assert_eq!(root.vmptrld(region), Ok(()));
    for (field, value) in layout::vmcs_fields(&caps, &setup(GuestMode::Long, 1), 0, 0) {
        assert_eq!(root.vmwrite(field, value), Ok(()));
    }
    assert_eq!(root.vmresume(), Err(VmxFailure::Error(E::VmresumeNotLaunched)));
    assert_eq!(root.vmread(Field::VM_INSTRUCTION_ERROR), Ok(5));
    assert_eq!(root.invept(2, [0, 0]), Ok(()));
    assert_eq!(root.invvpid(1, [0, 0]), Err(VmxFailure::Error(E::InvalidInvalidation)));
    assert_eq!(root.vmlaunch(), Ok(Outcome::Entered(None)));
    assert_eq!(processor.mode(), VmxMode::NonRoot);
    let outcome = processor.execute(memory, &Operation::Load { at: DATA, size: 8 });
    assert_eq!(outcome, Outcome::Completed { value: mark(0, 0), flags: 0 });
    let outcome = processor.execute(memory, &Operation::Vmcall);
    assert_eq!(outcome, Outcome::Exit(ExitReason::VMCALL));
    assert_eq!(processor.root(memory).vmread(Field::EXIT_INSTRUCTION_LEN), Ok(3));
}

fn set_proc(session: &mut Session<'_, Machine>, control: ProcCtls) {
    let proc = session.field(Field::PROC_CTLS);
    session.act(Action::SetField(Field::PROC_CTLS, proc | u64::from(control.bits())));
}

#[test]
fn control_registers() {
    stage(|session| {
        // A bit of the mask reads as in the shadow, and exits when written otherwise.
        session.act(Action::SetField(Field::CR0_MASK, cr0::TS | cr0::WP));
        session.act(Action::SetField(Field::CR0_SHADOW, cr0::TS));
        let seen = session.done(Operation::MovFromCr { register: 0 });
        assert_eq!(seen & (cr0::TS | cr0::WP), cr0::TS);
        session.done(Operation::MovToCr { register: 0, value: seen | 2 });
        assert_eq!(session.field(Field::GUEST_CR0) & (cr0::WP | 2), cr0::WP | 2);
        let change = Operation::MovToCr { register: 0, value: seen | cr0::WP };
        assert_eq!(session.exit_of(change), ExitReason::CR_ACCESS);
        assert_eq!(session.field(Field::EXIT_QUALIFICATION), 0);
        assert_eq!(session.exit_of(Operation::Clts), ExitReason::CR_ACCESS);
        assert_eq!(session.field(Field::EXIT_QUALIFICATION), 2 << 4);
        session.act(Action::SetField(Field::CR0_SHADOW, 0));
        session.done(Operation::Clts);

        set_proc(session, ProcCtls::CR3_LOAD_EXITING | ProcCtls::CR3_STORE_EXITING);
        session.act(Action::SetField(Field::CR3_TARGET_COUNT, 1));
        session.act(Action::SetField(Field::CR3_TARGET0, 0x14000));
        session.done(Operation::MovToCr { register: 3, value: 0x14000 });
        let load = Operation::MovToCr { register: 3, value: 0x10000 };
        assert_eq!(session.exit_of(load), ExitReason::CR_ACCESS);
        assert_eq!(session.field(Field::EXIT_QUALIFICATION), 3);
        let store = Operation::MovFromCr { register: 3 };
        assert_eq!(session.exit_of(store), ExitReason::CR_ACCESS);
        let access = CrAccess::new().with_register(3).with_access(1);
        assert_eq!(session.field(Field::EXIT_QUALIFICATION), access.into_bits());

        let clear_pae = Operation::MovToCr { register: 4, value: cr4::PGE };
        assert_eq!(session.fault_of(clear_pae).vector, 13);
        let vmxe = Operation::MovToCr { register: 4, value: cr4::PAE | cr4::VMXE };
        assert_eq!(session.exit_of(vmxe), ExitReason::CR_ACCESS);
    });
}

#[test]
fn msr_and_io_bitmaps() {
    stage(|session| {
        let star = 0xc000_0081;
        session.done(Operation::Wrmsr { index: star, value: 0x1234_5678_9abc });
        assert_eq!(session.done(Operation::Rdmsr(star)), 0x1234_5678_9abc);
        assert_eq!(session.fault_of(Operation::Rdmsr(0x1fff)).vector, 13);
        // Beyond the bitmaps' ranges every access exits.
        assert_eq!(session.exit_of(Operation::Rdmsr(0x2000)), ExitReason::RDMSR);
        let word = layout::MSR_BITMAP + 0x400 + 0x80 / 8;
        session.write(word, 2);
        assert_eq!(session.exit_of(Operation::Rdmsr(star)), ExitReason::RDMSR);
        session.done(Operation::Wrmsr { index: star, value: 1 });
        session.write(word + 0x800, 2);
        let write = Operation::Wrmsr { index: star, value: 1 };
        assert_eq!(session.exit_of(write), ExitReason::WRMSR);

        let read = |port, size| Operation::In { port, size };
        assert_eq!(session.done(read(0x60, 2)), 0xffff);
        set_proc(session, ProcCtls::IO_BITMAPS);
        session.done(read(0x60, 1));
        session.write(layout::IO_BITMAP + 8, 1 << (0x62 - 64));
        session.done(read(0x60, 2));
        assert_eq!(session.exit_of(read(0x60, 4)), ExitReason::IO_INSTRUCTION);
        assert_eq!(session.field(Field::EXIT_QUALIFICATION), 3 | 1 << 3 | 0x60 << 16);
        let out = Operation::Out { port: 0x62, size: 1, value: 1 };
        assert_eq!(session.exit_of(out), ExitReason::IO_INSTRUCTION);
        assert_eq!(session.exit_of(read(0xffff, 2)), ExitReason::IO_INSTRUCTION);
    });
}

#[test]
fn conditional_exits() {
    let rows = [
        (Operation::Hlt, ProcCtls::HLT_EXITING, ExitReason::HLT),
        (Operation::Invlpg { at: DATA }, ProcCtls::INVLPG_EXITING, ExitReason::INVLPG),
        (
            Operation::Invpcid { kind: 2, descriptor: DATA },
            ProcCtls::INVLPG_EXITING,
            ExitReason::INVPCID,
        ),
        (Operation::Rdtsc, ProcCtls::RDTSC_EXITING, ExitReason::RDTSC),
        (Operation::Rdtscp, ProcCtls::RDTSC_EXITING, ExitReason::RDTSCP),
        (Operation::Pause, ProcCtls::PAUSE_EXITING, ExitReason::PAUSE),
        (Operation::MovToDr7(0), ProcCtls::MOV_DR_EXITING, ExitReason::MOV_DR),
        (
            Operation::In { port: 1, size: 1 },
            ProcCtls::UNCONDITIONAL_IO_EXITING,
            ExitReason::IO_INSTRUCTION,
        ),
    ];
    for (operation, control, reason) in rows {
        stage(|session| {
            set_proc(session, control);
            assert_eq!(session.exit_of(operation), reason);
            if reason == ExitReason::INVLPG {
                assert_eq!(session.field(Field::EXIT_QUALIFICATION), DATA);
            }
        });
    }
    stage(|session| {
        assert_eq!(session.exit_of(Operation::Invd), ExitReason::INVD);
        session.done(Operation::Wbinvd);
        let proc2 = session.field(Field::PROC_CTLS2);
        session.act(Action::SetField(Field::PROC_CTLS2, proc2 & !(1 << 12 | 1 << 3) | 1 << 6));
        assert_eq!(session.exit_of(Operation::Wbinvd), ExitReason::WBINVD);
        let invpcid = Operation::Invpcid { kind: 2, descriptor: DATA };
        assert_eq!(session.fault_of(invpcid).vector, 6);
        assert_eq!(session.fault_of(Operation::Rdtscp).vector, 6);
    });
}

#[test]
fn msr_areas() {
    stage(|session| {
        let area = layout::L1_DATA;
        let star = 0xc000_0081;
        session.write(area, star);
        session.write(area + 8, 0x5555);
        session.write(area + 16, star);
        session.write(area + 32, star);
        session.write(area + 40, 0x6666);
        for (count, address, at) in [
            (Field::ENTRY_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_ADDR, area),
            (Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_STORE_ADDR, area + 16),
            (Field::EXIT_MSR_LOAD_COUNT, Field::EXIT_MSR_LOAD_ADDR, area + 32),
        ] {
            session.act(Action::SetField(count, 1));
            session.act(Action::SetField(address, at));
        }
        assert_eq!(session.done(Operation::Rdmsr(star as u32)), 0x5555);
        session.leave(0);
        assert_eq!(session.word(area + 24), 0x5555);
        let read = session.l1(0, Operation::Rdmsr(star as u32));
        assert_eq!(read, Outcome::Completed { value: 0x6666, flags: 0 });
        // An entry that can't be loaded.
        session.write(area, 0xc000_0100);
        let reason = session.exit_of(Operation::Pause);
        assert_eq!(reason.bits(), 1 << 31 | 34);
        assert_eq!(session.field(Field::EXIT_QUALIFICATION), 1);
        session.write(area, star);
        session.write(area + 32, 1 << 32);
        // A VMX abort.
        session.enter(0);
        assert_eq!(session.guest(0, Operation::Vmcall), Outcome::Stopped);
        assert_eq!(session.word(layout::vmcs(0, 0)) >> 32, 4);
    });
}
