//! Does each exit of L2 reach whom it belongs to, and does L1 get all that the SDM says?

use super::*;
use crate::host::{InvVpid, L1Memory};
use crate::paging::RFLAGS_RF;
use crate::regs::RAX;
use crate::testing::rig::{
    EPT, EXIT_LOAD, EXIT_STORE, End, HOST_RIP, MSR_BITMAP, PAGING, Rig, VMCS, values, vmcs01,
    vmcs02,
};
use vmx_defs::controls::{ProcCtls, ProcCtls2};
use vmx_defs::field::{FIELDS, Kind};
use vmx_defs::msr;

const SWAP: u32 = 0xc000_0102;
/// A page of L1 that tests hide.
const HIDDEN: u64 = 0x8_0000;

/// Readable, writable, executable, write-back.
const RWX: u64 = 7 | 6 << 3;

/// L2 runs with these fields of its VMCS.
fn running_with(writes: &[(Field, u64)]) -> Rig {
    let mut rig = Rig::ready();
    for (field, value) in writes {
        assert_eq!(rig.vmwrite(0, *field, *value), End::Succeed, "{field:?}");
    }
    assert_eq!(rig.launch(0), End::Entered);
    rig
}

fn control(field: Field, set: u32, clear: u32) -> (Field, u64) {
    (field, values().get(field) & !u64::from(clear) | u64::from(set))
}

fn set_l2(rig: &mut Rig, field: Field, value: u64) {
    rig.host.current = vmcs02(0);
    rig.host.set(field, value);
}

fn injected(rig: &Rig) -> Option<IntrInfo> {
    let info = IntrInfo::from(rig.l2(0, Field::ENTRY_INTR_INFO) as u32);
    info.valid().then_some(info)
}

#[test]
fn exits_that_l1_asked_for_or_that_are_unconditional_are_l1s() {
    for number in 0..=68 {
        let reason = ExitReason::from_bits(number);
        if matches!(
            reason,
            ExitReason::RDMSR
                | ExitReason::WRMSR
                | ExitReason::VMFUNC
                | ExitReason::EPT_VIOLATION
                | ExitReason::EPT_MISCONFIGURATION
        ) {
            continue;
        }
        let mut rig = Rig::running();
        for (n, field) in EXIT_FIELDS.into_iter().enumerate() {
            set_l2(&mut rig, field, 0x1_0000 + n as u64);
        }
        assert_eq!(rig.exit(0, reason, 0x1234), End::Exited, "{reason:?}");
        for (n, field) in EXIT_FIELDS.into_iter().enumerate() {
            let expected = match field {
                Field::EXIT_REASON => number.into(),
                Field::EXIT_QUALIFICATION => 0x1234,
                _ => 0x1_0000 + n as u64,
            };
            assert_eq!(rig.vmread(0, field), expected, "{field:?}");
        }
    }
}

#[test]
fn all_of_l2s_state_is_saved() {
    let mut rig = running_with(&[control(
        Field::EXIT_CTLS,
        (ExitCtls::SAVE_DEBUG_CONTROLS | ExitCtls::SAVE_PAT | ExitCtls::SAVE_EFER).bits(),
        0,
    )]);
    let mut fields = rig.nested.plain_guest.clone();
    fields.extend([Field::GUEST_DR7, Field::GUEST_DEBUGCTL, Field::GUEST_PAT, Field::GUEST_EFER]);
    let kept = [Field::GUEST_CR0, Field::GUEST_CR4, Field::GUEST_EFER];
    for (n, field) in fields.iter().enumerate() {
        if !kept.contains(field) {
            set_l2(&mut rig, *field, 0x100 + n as u64);
        }
    }
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    for (n, field) in fields.iter().enumerate() {
        let expected = if kept.contains(field) { values().get(*field) } else { 0x100 + n as u64 };
        assert_eq!(rig.vmread(0, *field), expected, "{field:?}");
    }
}

#[test]
fn state_that_no_control_saves_stays_as_l1_wrote_it() {
    let off = ExitCtls::SAVE_DEBUG_CONTROLS.bits();
    let mut rig = running_with(&[control(Field::EXIT_CTLS, 0, off)]);
    let fields = [Field::GUEST_DR7, Field::GUEST_DEBUGCTL, Field::GUEST_PAT];
    for field in fields {
        set_l2(&mut rig, field, 0x77);
    }
    set_l2(&mut rig, Field::GUEST_EFER, 0x500);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    for field in fields.into_iter().chain([Field::GUEST_EFER]) {
        assert_eq!(rig.vmread(0, field), values().get(field), "{field:?}");
    }
    // L1's processor keeps what VMCS12 does not load for it: here it loads PAT and EFER.
    assert_eq!(rig.l1(0, Field::GUEST_PAT), values().get(Field::HOST_PAT));
    let off = (ExitCtls::LOAD_PAT | ExitCtls::LOAD_EFER).bits();
    let mut rig = running_with(&[control(Field::EXIT_CTLS, 0, off)]);
    set_l2(&mut rig, Field::GUEST_PAT, 0x0101_0101_0101_0101);
    set_l2(&mut rig, Field::GUEST_EFER, 0x801);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.l1(0, Field::GUEST_PAT), 0x0101_0101_0101_0101);
    assert_eq!(rig.l1(0, Field::GUEST_EFER), 0xd01, "LMA and LME as the host's mode says");
}

#[test]
fn the_mode_of_l2_is_saved_in_the_entry_controls() {
    let mut rig = Rig::running();
    set_l2(&mut rig, Field::GUEST_EFER, 0x801);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    let ia32e = u64::from(EntryCtls::IA32E_MODE_GUEST.bits());
    assert_eq!(rig.vmread(0, Field::ENTRY_CTLS), values().get(Field::ENTRY_CTLS) & !ia32e);
}

#[test]
fn l2_runs_for_so_long_only_and_l1s_timer_goes_on_over_that() {
    let timer = PinCtls::PREEMPTION_TIMER.bits();
    let exits = |rig: &mut Rig| rig.exit(0, ExitReason::PREEMPTION_TIMER, 0);
    // L1 has no timer: the exit is L0's, and the processor loads the value again.
    let mut rig = Rig::ready();
    rig.nested.config.stint = Some(500);
    assert_eq!(rig.launch(0), End::Entered);
    assert_eq!(rig.l2(0, Field::PIN_CTLS) & u64::from(timer), timer.into());
    assert_eq!(rig.l2(0, Field::PREEMPTION_TIMER), 500);
    let save = u64::from(ExitCtls::SAVE_PREEMPTION_TIMER.bits());
    assert_eq!(rig.l2(0, Field::EXIT_CTLS) & save, 0);
    assert_eq!(exits(&mut rig), End::Entered);

    // L1's own: shorter, and longer.
    for (value, counted) in [(0, &[0][..]), (499, &[499]), (500, &[500]), (1200, &[500, 500, 200])]
    {
        let mut rig = Rig::ready();
        rig.nested.config.stint = Some(500);
        for (field, set) in [(Field::PIN_CTLS, timer), (Field::EXIT_CTLS, save as u32)] {
            let (field, value) = control(field, set, 0);
            rig.vmwrite(0, field, value);
        }
        rig.vmwrite(0, Field::PREEMPTION_TIMER, value);
        assert_eq!(rig.launch(0), End::Entered);
        // Another exit in the first stint: what is left, whoever counts it.
        assert_eq!(rig.l2(0, Field::PREEMPTION_TIMER), counted[0]);
        set_l2(&mut rig, Field::PREEMPTION_TIMER, counted[0] / 2);
        assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
        let left = value - counted[0] + counted[0] / 2;
        assert_eq!(rig.vmread(0, Field::PREEMPTION_TIMER), left);
        rig.vmwrite(0, Field::PREEMPTION_TIMER, value);
        assert_eq!(rig.resume(0), End::Entered);
        for (number, part) in counted.iter().enumerate() {
            assert_eq!(rig.l2(0, Field::PREEMPTION_TIMER), *part);
            set_l2(&mut rig, Field::PREEMPTION_TIMER, 0);
            let last = number + 1 == counted.len();
            assert_eq!(exits(&mut rig), if last { End::Exited } else { End::Entered });
        }
        assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::PREEMPTION_TIMER.bits().into());
        assert_eq!(rig.vmread(0, Field::PREEMPTION_TIMER), 0);
    }
}

#[test]
fn the_preemption_timer_and_the_pdptes_are_saved_where_they_are_in_use() {
    for save in [false, true] {
        let mut rig = Rig::ready();
        rig.vmwrite(0, Field::PREEMPTION_TIMER, 1000);
        let (field, value) = control(Field::PIN_CTLS, PinCtls::PREEMPTION_TIMER.bits(), 0);
        rig.vmwrite(0, field, value);
        if save {
            let set = ExitCtls::SAVE_PREEMPTION_TIMER.bits();
            let (field, value) = control(Field::EXIT_CTLS, set, 0);
            rig.vmwrite(0, field, value);
        }
        assert_eq!(rig.launch(0), End::Entered);
        assert_eq!(rig.l2(0, Field::PREEMPTION_TIMER), 1000);
        set_l2(&mut rig, Field::PREEMPTION_TIMER, 400);
        assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
        let kept = if save { 400 } else { 1000 };
        assert_eq!(rig.vmread(0, Field::PREEMPTION_TIMER), kept);
        assert_eq!(rig.resume(0), End::Entered);
        assert_eq!(rig.l2(0, Field::PREEMPTION_TIMER), kept);
    }
    for (efer, pae) in [(0x801, true), (0xd01, false)] {
        let mut rig = Rig::ready();
        rig.vmwrite(0, Field::GUEST_PDPTE1, 0x5001);
        assert_eq!(rig.launch(0), End::Entered);
        set_l2(&mut rig, Field::GUEST_EFER, efer);
        set_l2(&mut rig, Field::GUEST_PDPTE1, 0x7001);
        assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
        assert_eq!(rig.vmread(0, Field::GUEST_PDPTE1), if pae { 0x7001 } else { 0x5001 });
    }
}

#[test]
fn l1_goes_on_with_its_host_state() {
    let mut rig = running_with(&[
        (Field::HOST_ES_SELECTOR, 0),
        (Field::HOST_SS_SELECTOR, 0x10),
        (Field::HOST_DS_SELECTOR, 0x18),
        (Field::HOST_FS_SELECTOR, 0x20),
        (Field::HOST_GS_SELECTOR, 0),
        (Field::HOST_FS_BASE, 0x1111),
        (Field::HOST_GS_BASE, 0xffff_8000_0000_2222),
        (Field::HOST_TR_BASE, 0x3333),
        (Field::HOST_GDTR_BASE, 0x4444),
        (Field::HOST_IDTR_BASE, 0x5555),
        (Field::HOST_SYSENTER_CS, 0x66),
        (Field::HOST_SYSENTER_ESP, 0x7777),
        (Field::HOST_SYSENTER_EIP, 0x8888),
        (Field::HOST_RSP, 0x9999),
    ]);
    rig.host.current = vmcs01(0);
    // CD, NW, ET and the reserved bits of CR0 stay; all else comes from the field.
    rig.host.set(Field::GUEST_CR0, 0xe000_0013);
    rig.host.set(Field::GUEST_INTERRUPTIBILITY, 1);
    rig.host.set(Field::GUEST_PENDING_DEBUG, 0x4000);
    rig.host.set(Field::GUEST_DEBUGCTL, 3);
    rig.host.set(Field::ENTRY_INTR_INFO, 0x8000_0003);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    for (field, value) in [
        (Field::GUEST_RIP, HOST_RIP),
        (Field::GUEST_RSP, 0x9999),
        (Field::GUEST_RFLAGS, 2),
        (Field::GUEST_CR0, 0xe000_0033),
        (Field::CR0_SHADOW, 0xe000_0033),
        (Field::GUEST_CR3, PAGING),
        (Field::GUEST_CR4, 0x2020),
        (Field::CR4_SHADOW, 0x2020),
        (Field::GUEST_DR7, 0x400),
        (Field::GUEST_DEBUGCTL, 0),
        (Field::GUEST_EFER, 0xd01),
        (Field::GUEST_PAT, 0x0007_0406_0007_0406),
        (Field::GUEST_SYSENTER_CS, 0x66),
        (Field::GUEST_SYSENTER_ESP, 0x7777),
        (Field::GUEST_SYSENTER_EIP, 0x8888),
        (Field::GUEST_CS_SELECTOR, 0x08),
        (Field::GUEST_CS_BASE, 0),
        (Field::GUEST_CS_LIMIT, 0xffff_ffff),
        (Field::GUEST_CS_AR, 0xa09b),
        (Field::GUEST_ES_SELECTOR, 0),
        (Field::GUEST_ES_AR, 0x1_c093),
        (Field::GUEST_SS_SELECTOR, 0x10),
        (Field::GUEST_SS_AR, 0xc093),
        (Field::GUEST_DS_SELECTOR, 0x18),
        (Field::GUEST_DS_BASE, 0),
        (Field::GUEST_FS_SELECTOR, 0x20),
        (Field::GUEST_FS_BASE, 0x1111),
        (Field::GUEST_GS_SELECTOR, 0),
        (Field::GUEST_GS_BASE, 0xffff_8000_0000_2222),
        (Field::GUEST_GS_AR, 0x1_c093),
        (Field::GUEST_TR_SELECTOR, 0x18),
        (Field::GUEST_TR_BASE, 0x3333),
        (Field::GUEST_TR_LIMIT, 0x67),
        (Field::GUEST_TR_AR, 0x8b),
        (Field::GUEST_LDTR_SELECTOR, 0),
        (Field::GUEST_LDTR_AR, 0x1_0000),
        (Field::GUEST_GDTR_BASE, 0x4444),
        (Field::GUEST_GDTR_LIMIT, 0xffff),
        (Field::GUEST_IDTR_BASE, 0x5555),
        (Field::GUEST_IDTR_LIMIT, 0xffff),
        (Field::GUEST_INTERRUPTIBILITY, 0),
        (Field::GUEST_ACTIVITY, 0),
        (Field::GUEST_PENDING_DEBUG, 0),
    ] {
        assert_eq!(rig.l1(0, field), value, "{field:?}");
    }
}

#[test]
fn an_nmi_that_exits_blocks_nmis_and_other_exits_leave_blocking_alone() {
    let nmi = IntrInfo::new().with_vector(2).with_kind(kind::NMI).with_valid(true);
    let virtual_nmis = (PinCtls::VIRTUAL_NMIS.bits(), ProcCtls::NMI_WINDOW_EXITING.bits());
    for (has_virtual, info, blocked, expected) in [
        (true, Some(nmi), 0, 8),
        (true, None, 8, 0),
        (false, Some(nmi), 0, 8),
        (false, None, 8, 8),
        (false, None, 0, 0),
    ] {
        let (pin, proc) = if has_virtual { (0, 0) } else { virtual_nmis };
        let mut rig =
            running_with(&[control(Field::PIN_CTLS, 0, pin), control(Field::PROC_CTLS, 0, proc)]);
        set_l2(&mut rig, Field::GUEST_INTERRUPTIBILITY, blocked);
        set_l2(&mut rig, Field::EXIT_INTR_INFO, info.map_or(0, |info| u32::from(info).into()));
        let reason = match info {
            Some(_) => ExitReason::EXCEPTION_OR_NMI,
            None => ExitReason::CPUID,
        };
        assert_eq!(rig.exit(0, reason, 0), End::Exited);
        assert_eq!(rig.l1(0, Field::GUEST_INTERRUPTIBILITY), expected);
    }
}

#[test]
fn a_32_bit_l1_gets_32_bit_code_and_its_pdptes() {
    let pae_l1 = |pdpte: u64| {
        let mut rig = Rig::ready();
        // L1 is in PAE paging, L2 too; L1 reaches its memory through the same addresses.
        for (field, value) in [
            control(Field::EXIT_CTLS, 0, ExitCtls::HOST_ADDRESS_SPACE_SIZE.bits()),
            control(Field::ENTRY_CTLS, 0, EntryCtls::IA32E_MODE_GUEST.bits()),
            (Field::HOST_EFER, 0x801),
            (Field::HOST_CR3, 0x2_0fe0),
            (Field::HOST_FS_BASE, 0),
            (Field::HOST_SS_SELECTOR, 0x10),
            (Field::GUEST_EFER, 0x801),
            (Field::GUEST_RIP, 0x1000),
            (Field::GUEST_CS_AR, 0xc09b),
        ] {
            assert_eq!(rig.vmwrite(0, field, value), End::Succeed);
        }
        for n in 0..4 {
            let value = if n == 3 { pdpte } else { 0x7001 + 0x1000 * n };
            rig.host.ram.write_u64(L1Gpa::new(0x2_0fe0 + 8 * n), value);
        }
        rig.host.set(Field::GUEST_EFER, 0x801);
        rig.host.set(Field::GUEST_CR0, 0x31);
        assert_eq!(rig.launch(0), End::Entered);
        rig
    };
    let mut rig = pae_l1(0);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.l1(0, Field::GUEST_CS_AR), 0xc09b);
    assert_eq!(rig.l1(0, Field::GUEST_EFER), 0x801);
    assert_eq!(rig.l1(0, Field::ENTRY_CTLS) & 0x200, 0);
    assert_eq!(PDPTES.map(|field| rig.l1(0, field)), [0x7001, 0x8001, 0x9001, 0]);
    let mut rig = pae_l1(0x1e6 | 1);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Shutdown);
    assert_eq!(abort(&mut rig), 2);
}

/// The VMX-abort indicator of the VMCS.
fn abort(rig: &mut Rig) -> u32 {
    let mut bytes = [0; 4];
    rig.host.ram.read(L1Gpa::new(VMCS + 4), &mut bytes);
    assert_eq!(rig.l1(0, Field::GUEST_ACTIVITY), activity::SHUTDOWN.into());
    u32::from_le_bytes(bytes)
}

#[test]
fn msr_areas_are_stored_and_loaded_at_an_exit() {
    let mut rig = Rig::ready();
    rig.host.ram.write_u64(L1Gpa::new(EXIT_STORE), SWAP.into());
    rig.host.ram.write_u64(L1Gpa::new(EXIT_STORE + 16), msr::PAT.into());
    rig.host.ram.write_u64(L1Gpa::new(EXIT_LOAD), SWAP.into());
    rig.host.ram.write_u64(L1Gpa::new(EXIT_LOAD + 8), 0x1234);
    rig.vmwrite(0, Field::EXIT_MSR_STORE_COUNT, 2);
    rig.vmwrite(0, Field::EXIT_MSR_LOAD_COUNT, 1);
    assert_eq!(rig.launch(0), End::Entered);
    rig.host.msrs.insert(SWAP, 0x77);
    set_l2(&mut rig, Field::GUEST_PAT, 0x0404_0404_0404_0404);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.host.ram.read_u64(L1Gpa::new(EXIT_STORE + 8)), 0x77);
    let pat = rig.host.ram.read_u64(L1Gpa::new(EXIT_STORE + 24));
    assert_eq!(pat, 0x0404_0404_0404_0404, "L2's, not L1's");
    assert_eq!(rig.host.msrs[&SWAP], 0x1234);
}

#[test]
fn msr_areas_that_can_not_be_carried_out_end_in_a_vmx_abort() {
    for (area, count, heads, indicator) in [
        (EXIT_STORE, Field::EXIT_MSR_STORE_COUNT, &[0x1234, 0x9e, 0x801, 0x10 | 1 << 40][..], 1),
        (EXIT_LOAD, Field::EXIT_MSR_LOAD_COUNT, &[0x1234, 0xc000_0100, 0x801, 0x10 | 1 << 33], 4),
    ] {
        for head in heads {
            let mut rig = Rig::ready();
            rig.host.ram.write_u64(L1Gpa::new(area), *head);
            rig.vmwrite(0, count, 1);
            assert_eq!(rig.launch(0), End::Entered);
            assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Shutdown, "{head:#x}");
            assert_eq!(abort(&mut rig), indicator);
            assert!(!rig.cpus[0].runs_l2());
        }
    }
}

#[test]
fn msr_accesses_exit_to_l1_as_its_bitmap_says() {
    let bit = |write: bool, index: u32| {
        let half = if write { 2048 } else { 0 };
        let range = if index >= 0xc000_0000 { 1024 } else { 0 };
        let offset = index & 0x1fff;
        (MSR_BITMAP + half + range + u64::from(offset / 64 * 8), offset % 64)
    };
    for index in [0, 0x10, 0x1fff, 0xc000_0000, SWAP, 0xc000_1fff] {
        for write in [false, true] {
            for wanted in [false, true] {
                let mut rig = Rig::running();
                rig.host.msrs.insert(index, 0x1_0000_0005);
                let (at, bit) = bit(write, index);
                // All others the other way round.
                let fill = if wanted { 0 } else { u64::MAX };
                for word in (MSR_BITMAP..MSR_BITMAP + 0x1000).step_by(8) {
                    rig.host.ram.write_u64(L1Gpa::new(word), fill);
                }
                rig.host.ram.write_u64(L1Gpa::new(at), fill ^ 1 << bit);
                rig.gprs.set(RCX, 0xffff_ffff_0000_0000 | u64::from(index));
                rig.gprs.set(RAX, 0x7777_7777_0000_0009);
                rig.gprs.set(RDX, 0x7777_7777_0000_0002);
                set_l2(&mut rig, Field::EXIT_INSTRUCTION_LEN, 2);
                let rip = rig.l2(0, Field::GUEST_RIP);
                let reason = if write { ExitReason::WRMSR } else { ExitReason::RDMSR };
                let end = rig.exit(0, reason, 0);
                if wanted {
                    assert_eq!(end, End::Exited, "{index:#x}");
                    continue;
                }
                assert_eq!(end, End::Entered, "{index:#x}");
                assert_eq!(rig.l2(0, Field::GUEST_RIP), rip + 2);
                if write {
                    assert_eq!(rig.host.msrs[&index], 0x2_0000_0009);
                } else {
                    assert_eq!((rig.gprs.get(RAX), rig.gprs.get(RDX)), (5, 1));
                }
            }
        }
    }
}

#[test]
fn msr_accesses_outside_of_the_bitmaps_or_without_them_are_l1s() {
    for index in [0x2000, 0x4000_0000, 0xbfff_ffff, 0xc000_2000, 0xffff_ffff] {
        let mut rig = Rig::running();
        rig.gprs.set(RCX, index);
        assert_eq!(rig.exit(0, ExitReason::RDMSR, 0), End::Exited, "{index:#x}");
    }
    let off = ProcCtls::MSR_BITMAPS.bits();
    let mut rig = running_with(&[control(Field::PROC_CTLS, 0, off)]);
    rig.gprs.set(RCX, 0x10);
    assert_eq!(rig.exit(0, ExitReason::WRMSR, 0), End::Exited);
}

#[test]
fn an_msr_that_l0_keeps_and_does_not_have_is_gp() {
    let mut rig = Rig::running();
    rig.gprs.set(RCX, 0x1234);
    for reason in [ExitReason::RDMSR, ExitReason::WRMSR] {
        set_l2(&mut rig, Field::ENTRY_INTR_INFO, 0);
        assert_eq!(rig.exit(0, reason, 0), End::Entered);
        let info = injected(&rig).unwrap();
        assert_eq!((info.vector(), info.has_error_code()), (vector::GP, true));
    }
    // ... or L1's exit, where its exception bitmap asks for #GP.
    let mut rig = running_with(&[(Field::EXCEPTION_BITMAP, 1 << vector::GP)]);
    rig.gprs.set(RCX, 0x1234);
    assert_eq!(rig.exit(0, ExitReason::RDMSR, 0), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::EXCEPTION_OR_NMI.bits().into());
    let told = IntrInfo::from(rig.vmread(0, Field::EXIT_INTR_INFO) as u32);
    assert_eq!(told, IntrInfo::exception(vector::GP, true));
    assert_eq!(rig.vmread(0, Field::EXIT_INTR_ERROR), 0);
    // As the fault would have pushed it.
    assert_ne!(rig.vmread(0, Field::GUEST_RFLAGS) & RFLAGS_RF, 0);
}

#[test]
fn bits_of_cr4_that_l1_is_not_offered_are_reserved_in_l2() {
    const PCE: u64 = 1 << 8;
    const CET: u64 = 1 << 23;
    // MOV from RCX to CR4.
    const MOV: u64 = 4 | 1 << 8;
    let shadow = (Field::CR4_SHADOW, CET | PCE);
    let mut rig = running_with(&[(Field::CR4_MASK, PCE), shadow]);
    assert_eq!(rig.l2(0, Field::CR4_MASK), !rig.nested.config.caps.cr4_fixed1 | PCE);
    assert_eq!(rig.l2(0, Field::CR4_SHADOW), PCE, "L2 reads 0 in what is hidden");
    let real = rig.l2(0, Field::GUEST_CR4);
    rig.gprs.set(RCX, real | PCE | CET);
    assert_eq!(rig.exit(0, ExitReason::CR_ACCESS, MOV), End::Entered);
    assert_eq!(injected(&rig), Some(IntrInfo::exception(vector::GP, true)));
    assert_eq!(rig.l2(0, Field::GUEST_CR4), real);
    rig.gprs.set(RCX, real | CET);
    assert_eq!(rig.exit(0, ExitReason::CR_ACCESS, MOV), End::Exited, "L1 wants PCE");
    assert_eq!(rig.vmread(0, Field::CR4_MASK), PCE);
    // Alone, each of the two fields brings the other along.
    assert_eq!(rig.vmwrite(0, Field::CR4_MASK, PCE | CET), End::Succeed);
    assert_eq!(rig.resume(0), End::Entered);
    assert_eq!(rig.l2(0, Field::CR4_SHADOW), PCE | CET);
}

#[test]
fn ept_violations_are_filled_or_l1s() {
    let mut rig = Rig::running();
    rig.map(EPT, 0x5000, 0x4_5000, RWX);
    assert_eq!(rig.violation(0, 0x5000, 1), End::Entered);
    assert_eq!(rig.nested.shadow_counters().fills, 1);
    rig.map(EPT, 0x6000, 0x4_5000, 1 | 6 << 3);
    set_l2(&mut rig, Field::GUEST_LINEAR_ADDRESS, 0x1234_5678);
    // A write through a linear address; the hardware's rights are those of the shadow.
    assert_eq!(rig.violation(0, 0x6123, 2 | 0x38 | 0x180), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::EPT_VIOLATION.bits().into());
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 2 | 8 | 0x180);
    assert_eq!(rig.vmread(0, Field::GUEST_PHYSICAL_ADDRESS), 0x6123);
    assert_eq!(rig.vmread(0, Field::GUEST_LINEAR_ADDRESS), 0x1234_5678);
    rig.map(EPT, 0x6000, 0x4_5000, 2 | 6 << 3);
    assert_eq!(rig.resume(0), End::Entered);
    assert_eq!(rig.violation(0, 0x6000, 1), End::Exited);
    let reason = rig.vmread(0, Field::EXIT_REASON);
    assert_eq!(reason, ExitReason::EPT_MISCONFIGURATION.bits().into());
    assert_eq!(rig.vmread(0, Field::GUEST_PHYSICAL_ADDRESS), 0x6000);
}

#[test]
fn an_event_that_a_filled_violation_interrupted_is_delivered_again() {
    let events = [
        IntrInfo::exception(vector::GP, true),
        IntrInfo::new().with_vector(0x30).with_kind(kind::EXTERNAL).with_valid(true),
        IntrInfo::new().with_vector(0x80).with_kind(kind::SOFTWARE_INTERRUPT).with_valid(true),
        IntrInfo::new().with_vector(2).with_kind(kind::NMI).with_valid(true),
    ];
    for event in events {
        let mut rig = Rig::running();
        rig.map(EPT, 0x5000, 0x4_5000, RWX);
        set_l2(&mut rig, Field::GUEST_INTERRUPTIBILITY, 8);
        // Bit 12 is undefined there.
        let vectoring = event.with_nmi_unblocking(true);
        set_l2(&mut rig, Field::IDT_VECTORING_INFO, u32::from(vectoring).into());
        set_l2(&mut rig, Field::IDT_VECTORING_ERROR, 0x10);
        set_l2(&mut rig, Field::EXIT_INSTRUCTION_LEN, 2);
        assert_eq!(rig.violation(0, 0x5000, 2), End::Entered);
        assert_eq!(injected(&rig), Some(event));
        if event.has_error_code() {
            assert_eq!(rig.l2(0, Field::ENTRY_EXCEPTION_ERROR), 0x10);
        }
        if event.kind() == kind::SOFTWARE_INTERRUPT {
            assert_eq!(rig.l2(0, Field::ENTRY_INSTRUCTION_LEN), 2);
        }
        let blocked = if event.kind() == kind::NMI { 0 } else { 8 };
        assert_eq!(rig.l2(0, Field::GUEST_INTERRUPTIBILITY), blocked);

        // Reflected, L1 gets to know of it instead.
        assert_eq!(rig.violation(0, 0x6000, 2), End::Exited);
        assert_eq!(rig.vmread(0, Field::IDT_VECTORING_INFO), u32::from(vectoring).into());
        assert_eq!(rig.vmread(0, Field::IDT_VECTORING_ERROR), 0x10);
    }
}

#[test]
fn an_iret_that_met_a_filled_violation_blocks_nmis_again() {
    let mut rig = Rig::running();
    rig.map(EPT, 0x5000, 0x4_5000, RWX);
    assert_eq!(rig.violation(0, 0x5000, 1 | 1 << 12), End::Entered);
    assert_eq!(rig.l2(0, Field::GUEST_INTERRUPTIBILITY), 8);
    // One that L1 gets is L1's to repair.
    set_l2(&mut rig, Field::GUEST_INTERRUPTIBILITY, 0);
    assert_eq!(rig.violation(0, 0x6000, 1 | 1 << 12), End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 1 | 1 << 12);
    assert_eq!(rig.vmread(0, Field::GUEST_INTERRUPTIBILITY), 0);
}

#[test]
fn a_write_to_what_l0_hides_is_gp_in_l2() {
    let run = |bitmap: u64, vectoring: u32| {
        let mut rig = running_with(&[(Field::EXCEPTION_BITMAP, bitmap)]);
        rig.host.ram.hidden.push(HIDDEN..HIDDEN + 0x1000);
        rig.map(EPT, 0x5000, HIDDEN, RWX);
        set_l2(&mut rig, Field::IDT_VECTORING_INFO, vectoring.into());
        let end = rig.violation(0, 0x5000, 2);
        (rig, end)
    };
    let (rig, end) = run(0, 0);
    assert_eq!((end, injected(&rig)), (End::Entered, Some(IntrInfo::exception(vector::GP, true))));
    let (mut rig, end) = run(1 << vector::GP, 0);
    assert_eq!(end, End::Exited);
    let told = rig.vmread(0, Field::EXIT_INTR_INFO) as u32;
    assert_eq!(IntrInfo::from(told), IntrInfo::exception(vector::GP, true));
    assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 0);
    // During the delivery of a contributory exception: #DF.
    let gp = IntrInfo::exception(vector::GP, true);
    let (rig, end) = run(1 << vector::GP, gp.into());
    assert_eq!((end, injected(&rig)), (End::Entered, Some(IntrInfo::exception(vector::DF, true))));
    // An exit due to #DF or a triple fault is none during event delivery; one due to another is.
    let (mut rig, end) = run(1 << vector::DF, gp.into());
    assert_eq!(end, End::Exited);
    assert_eq!(rig.vmread(0, Field::IDT_VECTORING_INFO), 0);
    let interrupt = IntrInfo::new().with_vector(0x30).with_valid(true);
    let (mut rig, end) = run(1 << vector::GP, interrupt.into());
    assert_eq!(end, End::Exited);
    assert_eq!(rig.vmread(0, Field::IDT_VECTORING_INFO), u32::from(interrupt).into());
    // During that of #DF: a triple fault, which L1 always gets.
    let (mut rig, end) = run(0, IntrInfo::exception(vector::DF, true).into());
    assert_eq!(end, End::Exited);
    assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::TRIPLE_FAULT.bits().into());
    assert_eq!(rig.vmread(0, Field::IDT_VECTORING_INFO), 0);
}

#[test]
fn an_apic_access_page_in_hidden_memory_exits_as_one_elsewhere_would() {
    let apic = ProcCtls2::VIRTUALIZE_APIC_ACCESSES.bits();
    // Reads, writes, fetches, by linear address (bits 8:7) or not, and during event delivery.
    for (access, delivery, expected) in [
        (2 | 0x180, false, 1 << 12),
        (2 | 0x180, true, 3 << 12),
        (4 | 0x180, false, 2 << 12),
        (2, false, 15 << 12),
        (2 | 0x80, false, 15 << 12),
        (2, true, 10 << 12),
    ] {
        let mut rig =
            running_with(&[control(Field::PROC_CTLS2, apic, 0), (Field::APIC_ACCESS_ADDR, HIDDEN)]);
        rig.host.ram.hidden.push(HIDDEN..HIDDEN + 0x2000);
        rig.map(EPT, 0x5000, HIDDEN, RWX);
        rig.map(EPT, 0x6000, HIDDEN + 0x1000, RWX);
        // A neighbour is hidden memory like any.
        assert_eq!(rig.violation(0, 0x6080, access), End::Entered);
        assert!(injected(&rig).is_some());
        let event = IntrInfo::new().with_vector(0x30).with_valid(delivery);
        set_l2(&mut rig, Field::IDT_VECTORING_INFO, u32::from(event).into());
        assert_eq!(rig.violation(0, 0x5080, access), End::Exited);
        assert_eq!(rig.vmread(0, Field::EXIT_REASON), ExitReason::APIC_ACCESS.bits().into());
        let told = rig.vmread(0, Field::EXIT_QUALIFICATION);
        assert_eq!(told & !0xfff, expected, "{access:#x}");
        // The offset is undefined for guest-physical accesses.
        assert!(expected >= 10 << 12 || told & 0xfff == 0x80);
    }
}

#[test]
fn l2_reads_ones_where_l0_hides() {
    let mut rig = Rig::running();
    rig.host.ram.hidden.push(HIDDEN..HIDDEN + 0x1000);
    rig.map(EPT, 0x5000, HIDDEN, RWX);
    assert_eq!(rig.violation(0, 0x5000, 1), End::Entered);
    assert_eq!(injected(&rig), None);
}

#[test]
fn an_entry_that_the_hardware_refuses_late_is_l1s_failure() {
    for reason in [ExitReason::ENTRY_GUEST_STATE, ExitReason::ENTRY_MACHINE_CHECK] {
        let mut rig = Rig::running();
        set_l2(&mut rig, Field::GUEST_RSP, 0x7777);
        let failed = ExitReason::from_bits(reason.bits() | ENTRY_FAILURE);
        assert_eq!(rig.exit(0, failed, 4), End::Exited);
        assert_eq!(rig.vmread(0, Field::EXIT_REASON), u64::from(failed.bits()));
        assert_eq!(rig.vmread(0, Field::EXIT_QUALIFICATION), 4);
        assert_eq!(rig.vmread(0, Field::GUEST_RSP), values().get(Field::GUEST_RSP));
        assert!(rig.cpus[0].needs_launch());
        assert_eq!(rig.resume(0), End::Entered);
        assert_eq!(rig.l2(0, Field::GUEST_RSP), values().get(Field::GUEST_RSP));
    }
}

#[test]
fn vpid_0000h_is_flushed_at_each_transition_and_others_never() {
    let mut rig = Rig::ready();
    let (field, value) = control(Field::PROC_CTLS2, 0, ProcCtls2::VPID.bits());
    rig.vmwrite(0, field, value);
    rig.vmwrite(0, Field::VPID, 0);
    rig.host.invvpids.clear();
    assert_eq!(rig.launch(0), End::Entered);
    let vpid02 = rig.l2(0, Field::VPID) as u16;
    assert_ne!(vpid02, 0);
    assert_eq!(rig.host.invvpids, [InvVpid::Single(vpid02)]);
    rig.host.invvpids.clear();
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.host.invvpids, [InvVpid::Single(crate::tlb::VPID01)]);
    // An exit that L0 keeps is no transition that L1 sees.
    assert_eq!(rig.resume(0), End::Entered);
    rig.host.invvpids.clear();
    rig.map(EPT, 0x5000, 0x4_5000, RWX);
    assert_eq!(rig.violation(0, 0x5000, 1), End::Entered);
    assert!(rig.host.invvpids.is_empty());

    let mut rig = Rig::running();
    for _ in 0..3 {
        rig.host.invvpids.clear();
        assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
        assert_eq!(rig.resume(0), End::Entered);
        assert!(rig.host.invvpids.is_empty());
    }
    // A VM entry that fails late is a transition too.
    let mut rig = Rig::ready();
    rig.vmwrite(0, field, value);
    rig.vmwrite(0, Field::GUEST_RFLAGS, 0);
    rig.host.invvpids.clear();
    assert_eq!(rig.launch(0), End::Exited);
    assert_eq!(rig.host.invvpids, [InvVpid::Single(crate::tlb::VPID01)]);
}

#[test]
fn no_exit_of_l2_in_any_state_brings_the_engine_down() {
    use proptest::prelude::*;
    let strategy = (
        0..70u32,
        any::<bool>(),
        any::<u64>(),
        proptest::collection::vec((0..FIELDS.len(), any::<u64>()), 0..12),
        proptest::array::uniform4(any::<u64>()),
    );
    proptest!(|((number, failed, qualification, fields, gprs) in strategy)| {
        let mut rig = Rig::running();
        for (field, value) in fields {
            let field = FIELDS[field].0;
            // What L1 or L2 can bring about: state of L2 and what the processor reports of an exit.
            if matches!(field.kind(), Kind::Guest | Kind::ReadOnly) {
                set_l2(&mut rig, field, value);
            }
        }
        for (number, value) in gprs.into_iter().enumerate() {
            rig.gprs.set(number as u8, value);
        }
        let reason = ExitReason::from_bits(number | if failed { ENTRY_FAILURE } else { 0 });
        rig.exit(0, reason, qualification);
    });
}
