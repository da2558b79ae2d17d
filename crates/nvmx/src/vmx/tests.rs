//! Does each VMX instruction of L1 end as the SDM says, with its flags, its error and its RIP?

use super::*;
use crate::host::{InvEpt, L1Memory};
use crate::testing::rig::{End, OPERAND, Rig, VMCS, VMXON, eptp12, values, vmcs01};
use alloc::vec::Vec;
use vmx_defs::event::vector;
use vmx_defs::field::{FIELDS, Width};

const UD: End = End::Fault(vector::UD);
const GP: End = End::Fault(vector::GP);
const OTHER: u64 = VMCS + 0x1000;

/// In VMX operation, without a current VMCS.
fn rooted() -> Rig {
    let mut rig = Rig::one();
    rig.put_revision(VMXON);
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), End::Succeed);
    rig
}

fn fail(error: VmInstructionError) -> End {
    End::Fail(error)
}

const ALL: [ExitReason; 12] = [
    ExitReason::INVEPT,
    ExitReason::INVVPID,
    ExitReason::VMCALL,
    ExitReason::VMCLEAR,
    ExitReason::VMLAUNCH,
    ExitReason::VMPTRLD,
    ExitReason::VMPTRST,
    ExitReason::VMREAD,
    ExitReason::VMRESUME,
    ExitReason::VMWRITE,
    ExitReason::VMXOFF,
    ExitReason::VMXON,
];

#[test]
fn outside_of_vmx_operation_all_but_vmxon_are_undefined() {
    let mut rig = Rig::one();
    for reason in ALL.into_iter().filter(|reason| *reason != ExitReason::VMXON) {
        assert_eq!(rig.exec(0, reason, true), UD, "{reason:?}");
    }
    rig.put_revision(VMXON);
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), End::Succeed);
    assert_eq!(rig.exec(0, ExitReason::VMXOFF, false), End::Succeed);
    assert_eq!(rig.exec(0, ExitReason::VMXOFF, false), UD);
    let reason = ExitReason::CPUID;
    let handled = rig.nested.l1_exit(&mut rig.cpus[0], &mut rig.host, &mut rig.gprs, reason);
    assert_eq!(handled, Ok(Handled::NotMine));
}

#[test]
fn vmxon_wants_privilege_fixed_bits_an_aligned_region_and_our_revision() {
    for bit in [0, 5, 31] {
        let mut rig = Rig::one();
        rig.put_revision(VMXON);
        // As L1 sees CR0, not as it is.
        rig.host.set(Field::CR0_MASK, 1 << bit);
        rig.host.set(Field::CR0_SHADOW, 0);
        assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), GP, "CR0 bit {bit}");
    }
    let mut rig = Rig::one();
    rig.put_revision(VMXON);
    rig.host.set(Field::CR4_MASK, 1 << 13);
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), UD, "CR4.VMXE");
    rig.host.set(Field::CR4_MASK, 1 << 14);
    rig.host.set(Field::CR4_SHADOW, 1 << 14);
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), GP, "CR4.SMXE");
    rig.host.set(Field::CR4_MASK, 0);
    rig.host.set(Field::GUEST_SS_AR, 0xc0f3);
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), GP);
    rig.host.set(Field::GUEST_SS_AR, 0xc093);

    for region in [VMXON + 8, 1 << 40 | VMXON, u64::MAX, 1 << 63] {
        assert_eq!(rig.pointer(0, ExitReason::VMXON, region), End::FailInvalid, "{region:#x}");
    }
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON + 0x1000), End::FailInvalid, "revision");
    let revision = rig.nested.caps().basic.revision() | 1 << 31;
    rig.host.ram.write(L1Gpa::new(VMXON), &revision.to_le_bytes());
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), End::FailInvalid, "bit 31");
    rig.host.ram.hidden.push(VMXON..VMXON + 0x1000);
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), End::FailInvalid, "hidden");
    assert!(!rig.cpus[0].in_vmx_operation());
}

#[test]
fn vmxon_in_root_operation_fails_before_it_looks_at_its_operand() {
    let mut rig = rooted();
    assert_eq!(rig.pointer(0, ExitReason::VMXON, 1), End::FailInvalid, "no current VMCS");
    let mut rig = Rig::ready();
    assert_eq!(rig.pointer(0, ExitReason::VMXON, 1), fail(VmInstructionError::VmxonInRoot));
}

#[test]
fn without_a_current_vmcs_what_needs_one_fails_invalid() {
    let mut rig = rooted();
    for reason in [
        ExitReason::VMREAD,
        ExitReason::VMWRITE,
        ExitReason::VMLAUNCH,
        ExitReason::VMRESUME,
        ExitReason::VMCALL,
    ] {
        assert_eq!(rig.exec(0, reason, true), End::FailInvalid, "{reason:?}");
    }
    // Also where the failure has a number.
    for (reason, region) in [(ExitReason::VMCLEAR, 1), (ExitReason::VMPTRLD, VMXON)] {
        assert_eq!(rig.pointer(0, reason, region), End::FailInvalid);
    }
    assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 0, 0, 0), End::FailInvalid);
    rig.host.ram.write_u64(L1Gpa::new(OPERAND), 7);
    assert_eq!(rig.exec(0, ExitReason::VMPTRST, false), End::Succeed);
    assert_eq!(rig.host.ram.read_u64(L1Gpa::new(OPERAND)), u64::MAX);
}

#[test]
fn vmclear_and_vmptrld_check_their_region() {
    let mut rig = Rig::ready();
    for bad in [VMCS + 1, VMCS + 0x800, 1 << 40, VMCS | 1 << 52, u64::MAX] {
        let end = rig.pointer(0, ExitReason::VMCLEAR, bad);
        assert_eq!(end, fail(VmInstructionError::VmclearAddress), "{bad:#x}");
        let end = rig.pointer(0, ExitReason::VMPTRLD, bad);
        assert_eq!(end, fail(VmInstructionError::VmptrldAddress), "{bad:#x}");
    }
    let end = rig.pointer(0, ExitReason::VMCLEAR, VMXON);
    assert_eq!(end, fail(VmInstructionError::VmclearVmxonPointer));
    let end = rig.pointer(0, ExitReason::VMPTRLD, VMXON);
    assert_eq!(end, fail(VmInstructionError::VmptrldVmxonPointer));
    let wrong = fail(VmInstructionError::VmptrldRevision);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, OTHER), wrong);
    let shadow = rig.nested.caps().basic.revision() | 1 << 31;
    rig.host.ram.write(L1Gpa::new(OTHER), &shadow.to_le_bytes());
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, OTHER), wrong, "a shadow VMCS");
    rig.host.ram.hidden.push(OTHER..OTHER + 0x1000);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, OTHER), wrong, "hidden memory");
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, 0xff_ffff_f000), wrong, "past RAM");
    // VMCLEAR does not look at the revision, and writes nothing that it must not.
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, OTHER), End::Succeed);
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, 0xff_ffff_f000), End::Succeed);
    // None of these changed the current VMCS.
    assert_eq!(rig.exec(0, ExitReason::VMPTRST, false), End::Succeed);
    assert_eq!(rig.host.ram.read_u64(L1Gpa::new(OPERAND)), VMCS);
}

#[test]
fn a_memory_operand_on_a_page_that_is_not_there_faults() {
    let mut rig = Rig::ready();
    // Nothing but the first GByte is mapped.
    rig.host.set(Field::GUEST_DS_BASE, 0);
    for reason in [
        ExitReason::VMPTRLD,
        ExitReason::VMPTRST,
        ExitReason::VMCLEAR,
        ExitReason::VMREAD,
        ExitReason::VMWRITE,
    ] {
        rig.gprs.set(crate::regs::RAX, Field::GUEST_RIP.encoding().into());
        rig.host.set(Field::GUEST_CR3, 0x2_0000);
        assert_eq!(rig.exec(0, reason, false), End::Fault(vector::PF), "{reason:?}");
        assert_eq!(rig.host.cr2, Gva::new(OPERAND));
    }
}

#[test]
fn vmclear_of_the_current_vmcs_leaves_none_current() {
    let mut rig = Rig::ready();
    rig.put_revision(OTHER);
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, OTHER), End::Succeed);
    assert_eq!(rig.vmread(0, Field::HOST_RIP), values().get(Field::HOST_RIP));
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, VMCS), End::Succeed);
    assert_eq!(rig.vmread_encoding(0, 0x6c16).0, End::FailInvalid);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS), End::Succeed);
    assert_eq!(rig.vmread(0, Field::HOST_RIP), values().get(Field::HOST_RIP), "data is kept");
}

#[test]
fn every_encoding_is_a_field_or_fails() {
    let mut rig = Rig::ready();
    let caps = rig.nested.caps().clone();
    let supported = |encoding: u64| {
        Component::decode(encoding).filter(|component| caps.supports(component.field))
    };
    for encoding in (0..0x8000).chain((15..64).map(|bit| 1 << bit | 0x681e)) {
        let (end, value) = rig.vmread_encoding(0, encoding);
        let written = rig.vmwrite_encoding(0, encoding, 0);
        if supported(encoding).is_some() {
            assert_eq!((end, written), (End::Succeed, End::Succeed), "{encoding:#x}");
        } else {
            let unsupported = fail(VmInstructionError::UnsupportedComponent);
            assert_eq!((end, written), (unsupported, unsupported), "{encoding:#x}");
            assert_eq!(value, 0x5a5a, "nothing is stored");
        }
    }
}

#[test]
fn fields_keep_as_many_bits_as_they_have() {
    let mut rig = Rig::ready();
    for (field, _) in FIELDS {
        if !rig.nested.caps().supports(*field) {
            continue;
        }
        let value = 0xfedc_ba98_7654_3210 ^ u64::from(field.encoding());
        assert_eq!(rig.vmwrite(0, *field, value), End::Succeed);
        assert_eq!(rig.vmread(0, *field), value & field.width().mask(), "{field:?}");
        if field.width() == Width::W64 {
            let high = u64::from(field.encoding()) | 1;
            assert_eq!(rig.vmread_encoding(0, high), (End::Succeed, value >> 32));
            assert_eq!(rig.vmwrite_encoding(0, high, 0xaaaa_aaaa_1234_5678), End::Succeed);
            assert_eq!(rig.vmread(0, *field), value & 0xffff_ffff | 0x1234_5678 << 32);
        }
    }
}

#[test]
fn in_protected_mode_operands_have_32_bits() {
    let mut rig = Rig::ready();
    let field = Field::TSC_OFFSET;
    rig.vmwrite(0, field, u64::MAX);
    rig.host.set(Field::GUEST_EFER, 0);
    rig.host.set(Field::GUEST_CR0, 0x31);
    assert_eq!(rig.vmread_encoding(0, 0x2010), (End::Succeed, 0xffff_ffff));
    assert_eq!(rig.vmread_encoding(0, 0x5_0000_2011), (End::Succeed, 0xffff_ffff));
    assert_eq!(rig.vmwrite_encoding(0, 0x5_0000_2010, 0x1_0000_0007), End::Succeed);
    rig.host.set(Field::GUEST_CR0, 0x8000_0033);
    rig.host.set(Field::GUEST_EFER, 0xd01);
    assert_eq!(rig.vmread(0, field), 7, "the upper half is cleared");
}

#[test]
fn read_only_fields_need_the_capability() {
    let mut rig = Rig::ready();
    rig.nested.config.caps.misc.set_vmwrite_any(false);
    for (field, _) in FIELDS.iter().filter(|(field, _)| field.kind() == Kind::ReadOnly) {
        let expected = if rig.nested.caps().supports(*field) {
            VmInstructionError::ReadOnlyComponent
        } else {
            VmInstructionError::UnsupportedComponent
        };
        assert_eq!(rig.vmwrite(0, *field, 1), fail(expected), "{field:?}");
    }
}

#[test]
fn vm_entry_follows_the_launch_state() {
    let mut rig = Rig::ready();
    assert_eq!(rig.resume(0), fail(VmInstructionError::VmresumeNotLaunched));
    assert_eq!(rig.launch(0), End::Entered);
    assert!(rig.cpus[0].needs_launch());
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.launch(0), fail(VmInstructionError::VmlaunchNotClear));
    assert_eq!(rig.resume(0), End::Entered);
    assert!(!rig.cpus[0].needs_launch());
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    // The state stays while the VMCS is not current; VMCLEAR resets it.
    rig.put_revision(OTHER);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, OTHER), End::Succeed);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS), End::Succeed);
    assert_eq!(rig.resume(0), End::Entered);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, VMCS), End::Succeed);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS), End::Succeed);
    assert_eq!(rig.resume(0), fail(VmInstructionError::VmresumeNotLaunched));
    assert_eq!(rig.launch(0), End::Entered);
}

#[test]
fn blocking_by_mov_ss_comes_before_the_launch_state() {
    let mut rig = Rig::ready();
    rig.host.set(Field::GUEST_INTERRUPTIBILITY, 2);
    assert_eq!(rig.resume(0), fail(VmInstructionError::EntryBlockedByMovSs));
    assert_eq!(rig.l1(0, Field::GUEST_INTERRUPTIBILITY), 0, "the instruction is over");
    rig.host.set(Field::GUEST_INTERRUPTIBILITY, 1);
    assert_eq!(rig.launch(0), End::Entered, "blocking by STI does not matter");
}

#[test]
fn entry_checks_fail_with_their_number_and_change_nothing() {
    for (field, value, error) in [
        (Field::CR3_TARGET_COUNT, 5, VmInstructionError::EntryControls),
        (Field::EPT_POINTER, 0, VmInstructionError::EntryControls),
        (Field::HOST_CR0, 0, VmInstructionError::EntryHostState),
        (Field::HOST_TR_SELECTOR, 0, VmInstructionError::EntryHostState),
    ] {
        let mut rig = Rig::ready();
        let good = rig.vmread(0, field);
        rig.vmwrite(0, field, value);
        assert_eq!(rig.launch(0), fail(error));
        assert_eq!(rig.vmread(0, Field::VM_INSTRUCTION_ERROR), error.number().into());
        rig.vmwrite(0, field, good);
        assert_eq!(rig.launch(0), End::Entered, "still clear");
    }
}

#[test]
fn a_refusal_of_the_hardware_is_a_failure_of_l1s_own() {
    for (number, error) in [
        (7, VmInstructionError::EntryControls),
        (8, VmInstructionError::EntryHostState),
        (3, VmInstructionError::EntryControls),
    ] {
        let mut rig = Rig::running();
        rig.host.set(Field::VM_INSTRUCTION_ERROR, number);
        let handled = rig.nested.entry_refused(&mut rig.cpus[0], &mut rig.host).unwrap();
        assert_eq!(rig.end(0, handled), fail(error));
        // All of vmcs02 is written again.
        rig.host.regions.get_mut(&crate::testing::rig::vmcs02(0)).unwrap()
            [Field::GUEST_CR3.slot()] = 0;
        rig.resume(0);
        assert_eq!(rig.l2(0, Field::GUEST_CR3), values().get(Field::GUEST_CR3));
    }
}

#[test]
fn vmxoff_and_vmcall() {
    let mut rig = Rig::ready();
    assert_eq!(rig.exec(0, ExitReason::VMCALL, false), fail(VmInstructionError::VmcallInRoot));
    assert_eq!(rig.exec(0, ExitReason::VMXOFF, false), End::Succeed);
    assert!(!rig.cpus[0].in_vmx_operation());
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), End::Succeed);
    assert_eq!(rig.vmread_encoding(0, 0x681e).0, End::FailInvalid);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS), End::Succeed);
    assert_eq!(rig.vmread(0, Field::GUEST_RIP), values().get(Field::GUEST_RIP));
}

#[test]
fn invept_checks_its_operands() {
    let mut rig = Rig::ready();
    let invalid = fail(VmInstructionError::InvalidInvalidation);
    let good = eptp12().into_bits();
    for kind in [0, 3, 4, 1 << 32 | 1, u64::MAX] {
        assert_eq!(rig.invalidate(0, ExitReason::INVEPT, kind, good, 0), invalid, "{kind:#x}");
    }
    for bad in [0, good | 1 << 40, good & !0x38, good | 1 << 8, good & !7 | 1] {
        assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 1, bad, 0), invalid, "{bad:#x}");
        assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 2, bad, 0), End::Succeed, "ignored");
    }
    assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 1, good, 1), invalid);
    assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 2, good, 1 << 63), invalid);
    rig.host.invepts.clear();
    assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 1, good, 0), End::Succeed);
    assert!(rig.host.invepts.is_empty(), "no root has it");
    assert_eq!(rig.launch(0), End::Entered);
    let eptp02 = Eptp::from(rig.l2(0, Field::EPT_POINTER));
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    for alike in [good, good | 1 << 6, good & !7] {
        rig.host.invepts.clear();
        assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 1, alike, 0), End::Succeed);
        assert_eq!(rig.host.invepts, [InvEpt::Single(eptp02)], "{alike:#x}");
    }
    rig.host.invepts.clear();
    assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 1, good + 0x1000, 0), End::Succeed);
    assert!(rig.host.invepts.is_empty());
    assert_eq!(rig.invalidate(0, ExitReason::INVEPT, 2, 0, 0), End::Succeed);
    assert_eq!(rig.host.invepts, [InvEpt::All]);
}

#[test]
fn invvpid_checks_its_operands_and_flushes_the_vpid_that_stands_for_it() {
    let mut rig = Rig::ready();
    let invalid = fail(VmInstructionError::InvalidInvalidation);
    for kind in [4, 5, 1 << 32, u64::MAX] {
        assert_eq!(rig.invalidate(0, ExitReason::INVVPID, kind, 1, 0), invalid);
    }
    for kind in 0..4 {
        for bit in [16, 31, 32, 63] {
            let end = rig.invalidate(0, ExitReason::INVVPID, kind, 1 | 1 << bit, 0);
            assert_eq!(end, invalid, "reserved bit {bit}");
        }
        let expected = if kind == 2 { End::Succeed } else { invalid };
        assert_eq!(rig.invalidate(0, ExitReason::INVVPID, kind, 0, 0), expected, "VPID 0000H");
        let expected = if kind == 0 { invalid } else { End::Succeed };
        let end = rig.invalidate(0, ExitReason::INVVPID, kind, 1, 1 << 47);
        assert_eq!(end, expected, "not canonical");
    }
    // VPID 1 has nothing cached before its first use.
    assert!(rig.host.invvpids.is_empty());
    assert_eq!(rig.launch(0), End::Entered);
    let vpid02 = rig.l2(0, Field::VPID) as u16;
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    rig.host.invvpids.clear();
    for (kind, flush) in [
        (0, InvVpid::Address(vpid02, Gva::new(0x7fff_ffff_f123))),
        (1, InvVpid::Single(vpid02)),
        (2, InvVpid::Single(vpid02)),
        (3, InvVpid::RetainGlobals(vpid02)),
    ] {
        let end = rig.invalidate(0, ExitReason::INVVPID, kind, 1, 0x7fff_ffff_f123);
        assert_eq!(end, End::Succeed);
        assert_eq!(rig.host.invvpids, [flush]);
        rig.host.invvpids.clear();
        let end = rig.invalidate(0, ExitReason::INVVPID, kind, 2, 0);
        assert_eq!(end, End::Succeed);
        assert_eq!(rig.host.invvpids.len(), usize::from(kind == 2), "VPID 2 is not in use");
        rig.host.invvpids.clear();
    }
}

#[test]
fn invalidations_that_are_not_offered_fail() {
    for (reason, kind, missing) in [
        (ExitReason::INVEPT, 1, EptVpidCap::INVEPT_SINGLE),
        (ExitReason::INVEPT, 2, EptVpidCap::INVEPT_ALL),
        (ExitReason::INVVPID, 0, EptVpidCap::INVVPID_ADDRESS),
        (ExitReason::INVVPID, 1, EptVpidCap::INVVPID_SINGLE),
        (ExitReason::INVVPID, 2, EptVpidCap::INVVPID_ALL),
        (ExitReason::INVVPID, 3, EptVpidCap::INVVPID_RETAIN_GLOBALS),
    ] {
        let mut rig = Rig::ready();
        let low = if reason == ExitReason::INVEPT { eptp12().into_bits() } else { 1 };
        assert_eq!(rig.invalidate(0, reason, kind, low, 0), End::Succeed);
        rig.nested.config.caps.ept_vpid -= missing;
        let invalid = fail(VmInstructionError::InvalidInvalidation);
        assert_eq!(rig.invalidate(0, reason, kind, low, 0), invalid);
        // Before the descriptor is read.
        rig.host.set(Field::GUEST_CR3, 0x2_0000);
        assert_eq!(rig.invalidate(0, reason, kind, low, 0), invalid);
    }
}

#[test]
fn any_number_of_vmcss_keep_their_values_and_launch_states() {
    let mut rig = Rig::ready();
    let regions: Vec<u64> = (0..20).map(|n| VMCS + 0x1000 * n).collect();
    for (n, region) in regions.iter().enumerate() {
        rig.put_revision(*region);
        assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, *region), End::Succeed);
        assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, *region), End::Succeed);
        rig.write_all(0, &values());
        rig.vmwrite(0, Field::GUEST_RSP, n as u64);
        if n % 2 == 1 {
            assert_eq!(rig.launch(0), End::Entered);
            assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
        }
    }
    for (n, region) in regions.iter().enumerate().rev() {
        assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, *region), End::Succeed);
        assert_eq!(rig.vmread(0, Field::GUEST_RSP), n as u64);
        assert_eq!(rig.vmread(0, Field::HOST_RIP), values().get(Field::HOST_RIP));
        let end = if n % 2 == 1 { rig.resume(0) } else { rig.launch(0) };
        assert_eq!(end, End::Entered);
        assert_eq!(rig.l2(0, Field::GUEST_RSP), n as u64);
        assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    }
}

#[test]
fn a_vmcs_in_the_cache_is_not_changed_by_writes_to_its_region() {
    let mut rig = Rig::ready();
    for at in (8..4096).step_by(8) {
        rig.host.ram.write_u64(L1Gpa::new(VMCS + at), 0x1234_5678_9abc_def0);
    }
    assert_eq!(rig.vmread(0, Field::HOST_RIP), values().get(Field::HOST_RIP));
    assert_eq!(rig.launch(0), End::Entered);
}

#[test]
fn a_vmcs_that_was_rewritten_while_out_of_the_cache_is_checked_like_any() {
    for fill in [0, 1, 0x1234_5678_9abc_def0, u64::MAX] {
        let mut rig = Rig::ready();
        for n in 1..6 {
            rig.put_revision(VMCS + 0x1000 * n);
            assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS + 0x1000 * n), End::Succeed);
        }
        for at in (8..4096).step_by(8) {
            rig.host.ram.write_u64(L1Gpa::new(VMCS + at), fill);
        }
        assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS), End::Succeed);
        for (field, _) in FIELDS {
            if rig.nested.caps().supports(*field) {
                assert_eq!(rig.vmread(0, *field), fill & field.width().mask());
            }
        }
        let end = if fill == 1 { rig.resume(0) } else { rig.launch(0) };
        assert_eq!(end, fail(VmInstructionError::EntryControls));
        // And overwritten with good values, it is as good as any.
        rig.write_all(0, &values());
        let end = if fill == 1 { rig.resume(0) } else { rig.launch(0) };
        assert_eq!(end, End::Entered);
    }
}

#[test]
fn vmclear_writes_back_and_the_vmcs_can_move_to_another_processor() {
    let mut rig = Rig::with(2, crate::VmfuncMode::Emulated);
    rig.make_ready(0, VMCS);
    rig.make_ready(1, OTHER);
    assert_eq!(rig.launch(0), End::Entered);
    assert_eq!(rig.exit(0, ExitReason::CPUID, 0), End::Exited);
    // While it is current on one, it can't be loaded on another.
    let refused = rig.pointer(1, ExitReason::VMPTRLD, VMCS);
    assert_eq!(refused, fail(VmInstructionError::VmptrldAddress));
    assert_eq!(rig.exec(1, ExitReason::VMPTRST, false), End::Succeed);
    assert_eq!(rig.host.ram.read_u64(L1Gpa::new(OPERAND)), OTHER);
    rig.vmwrite(0, Field::GUEST_RSP, 0x1234);
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, VMCS), End::Succeed);
    assert_eq!(rig.pointer(1, ExitReason::VMPTRLD, VMCS), End::Succeed);
    assert_eq!(rig.vmread(1, Field::GUEST_RSP), 0x1234);
    assert_eq!(rig.launch(1), End::Entered);
    assert_eq!(rig.host.current, crate::testing::rig::vmcs02(1));
    // VMCLEAR by another processor than the one that runs it leaves that one what it has.
    assert_eq!(rig.pointer(0, ExitReason::VMCLEAR, VMCS), End::Succeed);
    rig.host.current = crate::testing::rig::vmcs02(1);
    assert_eq!(rig.exit(1, ExitReason::CPUID, 0), End::Exited);
    assert_eq!(rig.vmread(1, Field::GUEST_RSP), 0x1234);
}

#[test]
fn init_leaves_vmx_operation_and_the_data_of_the_vmcs() {
    let mut rig = Rig::ready();
    rig.vmwrite(0, Field::GUEST_RSP, 0x1234);
    rig.nested.reset_processor(&mut rig.cpus[0]);
    assert_eq!(rig.exec(0, ExitReason::VMREAD, true), UD);
    assert_eq!(rig.pointer(0, ExitReason::VMXON, VMXON), End::Succeed);
    assert_eq!(rig.vmread_encoding(0, 0x681c).0, End::FailInvalid);
    assert_eq!(rig.pointer(0, ExitReason::VMPTRLD, VMCS), End::Succeed);
    assert_eq!(rig.vmread(0, Field::GUEST_RSP), 0x1234);
    assert_eq!(rig.host.current, vmcs01(0));
}
