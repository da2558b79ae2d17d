//! Does each requirement of VM entry find the VMCS that breaks it, and let the others pass?

use super::*;
use crate::layout;
use crate::machine::Machine;
use crate::program::{GuestMode, Setup, VmSetup};
use crate::retention::Retention;
use vmx_defs::exit::entry_failure;

/// Which group of checks refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refusal {
    Controls,
    Host,
    Guest(u64),
}

use Refusal::{Controls, Guest, Host};

fn memory() -> Memory {
    let caps = ModelCaps::default();
    let mut machine = Machine::new(&caps, Retention::Nothing, layout::PAGES, []);
    layout::initialise(&mut machine, &caps, &Setup::default());
    machine.memory
}

fn vmcs(mode: GuestMode) -> Vmcs {
    let caps = ModelCaps::default();
    let vm = VmSetup { mode, ..VmSetup::default() };
    let setup = Setup { vms: [vm.clone(), vm], ve: true, ..Setup::default() };
    let mut vmcs = Vmcs::default();
    for (field, value) in layout::vmcs_fields(&caps, &setup, 0, 0) {
        vmcs.set(field, value);
    }
    // Everything that a check may look at is in use.
    vmcs.set(Field::PIN_CTLS, vmcs.get(Field::PIN_CTLS) | 1 << 5);
    vmcs.set(Field::PROC_CTLS, vmcs.get(Field::PROC_CTLS) | 1 << 25);
    vmcs.set(Field::ENTRY_CTLS, vmcs.get(Field::ENTRY_CTLS) | 1 << 2);
    vmcs
}

fn verdict(vmcs: &Vmcs, memory: &Memory) -> Option<Refusal> {
    let caps = ModelCaps::default();
    let region = Hpa::new(layout::vmcs(0, 0));
    let subject = Subject { vmcs, caps: &caps, memory, region, lma: true };
    if controls(&subject).is_err() {
        return Some(Controls);
    }
    if host_state(&subject).is_err() {
        return Some(Host);
    }
    guest_state(&subject).err().map(|failure| Guest(failure.qualification))
}

fn check(mode: GuestMode, changes: &[(Field, u64)], expected: Option<Refusal>, memory: &Memory) {
    let mut vmcs = vmcs(mode);
    for (field, bits) in changes {
        vmcs.set(*field, vmcs.get(*field) ^ bits);
    }
    assert_eq!(verdict(&vmcs, memory), expected, "{mode:?}, flipped {changes:x?}");
}

const WIDE: u64 = 1 << 40;
const NOT_CANONICAL: u64 = 1 << 47;
const INJECT: Field = Field::ENTRY_INTR_INFO;

#[test]
fn the_base_is_accepted_in_each_mode() {
    let memory = memory();
    for mode in [GuestMode::Long, GuestMode::Pae, GuestMode::Bits32, GuestMode::Unpaged] {
        check(mode, &[], None, &memory);
    }
}

#[test]
fn flips_of_controls() {
    let memory = memory();
    for change in [
        (Field::PIN_CTLS, 1 << 1),
        (Field::PIN_CTLS, 1 << 7),
        (Field::PROC_CTLS, 1 << 1),
        (Field::PROC_CTLS, 1 << 27),
        (Field::PROC_CTLS2, 1 << 17),
        (Field::EXIT_CTLS, 1 << 0),
        (Field::EXIT_CTLS, 1 << 22),
        (Field::ENTRY_CTLS, 1 << 10),
        (Field::ENTRY_CTLS, 1 << 1),
        (Field::CR3_TARGET_COUNT, 5),
        (Field::IO_BITMAP_A, 8),
        (Field::IO_BITMAP_B, WIDE),
        (Field::MSR_BITMAP, 1),
        (Field::PIN_CTLS, 1 << 3),
        (Field::VPID, 1),
        (Field::EPT_POINTER, 1),
        (Field::EPT_POINTER, 1 << 3),
        (Field::EPT_POINTER, 1 << 7),
        (Field::EPT_POINTER, 1 << 11),
        (Field::EPT_POINTER, WIDE),
        (Field::VM_FUNCTION_CONTROLS, 2),
        (Field::VM_FUNCTION_CONTROLS, 1 << 63),
        (Field::EPTP_LIST_ADDRESS, 8),
        (Field::EPTP_LIST_ADDRESS, WIDE),
        (Field::VE_INFORMATION_ADDR, 1),
        (Field::VE_INFORMATION_ADDR, WIDE),
        (INJECT, 1 << 31 | 1 << 8),
        (INJECT, 1 << 31 | 7 << 8),
        (INJECT, 1 << 31 | 2 << 8 | 3),
        (INJECT, 1 << 31 | 3 << 8 | 32),
        (INJECT, 1 << 31 | 3 << 8 | 13),
        (INJECT, 1 << 31 | 1 << 11 | 3 << 8 | 6),
        (INJECT, 1 << 31 | 1 << 12 | 3 << 8 | 6),
    ] {
        check(GuestMode::Long, &[change], Some(Controls), &memory);
    }
    for fine in [
        (Field::EPT_POINTER, 1 << 6),
        (INJECT, 1 << 31 | 3 << 8 | 6),
        (INJECT, 1 << 31 | 1 << 11 | 3 << 8 | 14),
        (INJECT, 1 << 31 | 4 << 8 | 0x80),
        (Field::CR3_TARGET_COUNT, 4),
    ] {
        check(GuestMode::Long, &[fine], None, &memory);
    }
    let area = [(Field::EXIT_MSR_LOAD_COUNT, 1), (Field::EXIT_MSR_LOAD_ADDR, WIDE - 16)];
    check(GuestMode::Long, &area, None, &memory);
    for area in [
        [(Field::EXIT_MSR_LOAD_COUNT, 2), (Field::EXIT_MSR_LOAD_ADDR, WIDE - 16)],
        [(Field::ENTRY_MSR_LOAD_COUNT, 1), (Field::ENTRY_MSR_LOAD_ADDR, 8)],
        [(Field::EXIT_MSR_STORE_COUNT, 513), (Field::EXIT_MSR_STORE_ADDR, 0)],
        [(INJECT, 1 << 31 | 4 << 8), (Field::ENTRY_INSTRUCTION_LEN, 16)],
        [(INJECT, 1 << 31 | 1 << 11 | 3 << 8 | 14), (Field::ENTRY_EXCEPTION_ERROR, 1 << 15)],
        // Unrestricted guest, or EPTP switching, without EPT.
        [(Field::PROC_CTLS2, 1 << 1 | 1 << 13), (Field::PROC_CTLS2, 1 << 7)],
        [(Field::PROC_CTLS2, 1 << 1), (Field::EPT_POINTER, 0)],
    ] {
        check(GuestMode::Long, &area, Some(Controls), &memory);
    }
}

#[test]
fn flips_of_host_state() {
    let memory = memory();
    for change in [
        (Field::HOST_CR0, 1),
        (Field::HOST_CR0, 1 << 32),
        (Field::HOST_CR4, 1 << 13),
        (Field::HOST_CR4, 1 << 5),
        (Field::HOST_CR4, 1 << 23),
        (Field::HOST_CR3, WIDE),
        (Field::HOST_SYSENTER_ESP, NOT_CANONICAL),
        (Field::HOST_SYSENTER_EIP, NOT_CANONICAL),
        (Field::HOST_PAT, 2 << 56),
        (Field::HOST_EFER, 1 << 8),
        (Field::HOST_EFER, 1 << 10),
        (Field::HOST_EFER, 1 << 12),
        (Field::HOST_CS_SELECTOR, 8),
        (Field::HOST_CS_SELECTOR, 1),
        (Field::HOST_SS_SELECTOR, 4),
        (Field::HOST_TR_SELECTOR, 0x18),
        (Field::HOST_FS_BASE, NOT_CANONICAL),
        (Field::HOST_TR_BASE, NOT_CANONICAL),
        (Field::HOST_GDTR_BASE, NOT_CANONICAL),
        (Field::HOST_RIP, NOT_CANONICAL),
        (Field::EXIT_CTLS, 1 << 9),
    ] {
        check(GuestMode::Long, &[change], Some(Host), &memory);
    }
    check(GuestMode::Long, &[(Field::HOST_SS_SELECTOR, 0x10)], None, &memory);
}

#[test]
fn flips_of_guest_state() {
    let memory = memory();
    let plain = Some(Guest(entry_failure::DEFAULT));
    for change in [
        (Field::GUEST_CR0, 1),
        (Field::GUEST_CR0, 1 << 31),
        (Field::GUEST_CR0, 1 << 32),
        (Field::GUEST_CR4, 1 << 5),
        (Field::GUEST_CR4, 1 << 13),
        (Field::GUEST_CR4, 1 << 23),
        (Field::GUEST_CR3, WIDE),
        (Field::GUEST_DEBUGCTL, 1 << 6),
        (Field::GUEST_DR7, 1 << 32),
        (Field::GUEST_SYSENTER_EIP, NOT_CANONICAL),
        (Field::GUEST_PAT, 2 << 56),
        (Field::GUEST_EFER, 1 << 8),
        (Field::GUEST_EFER, 1 << 10),
        (Field::GUEST_EFER, 1 << 63),
        (Field::GUEST_TR_SELECTOR, 4),
        (Field::GUEST_SS_SELECTOR, 3),
        (Field::GUEST_FS_BASE, NOT_CANONICAL),
        (Field::GUEST_CS_BASE, 1 << 32),
        (Field::GUEST_DS_BASE, 1 << 32),
        (Field::GUEST_CS_AR, 1),
        (Field::GUEST_CS_AR, 1 << 4),
        (Field::GUEST_CS_AR, 1 << 5),
        (Field::GUEST_CS_AR, 1 << 7),
        (Field::GUEST_CS_AR, 1 << 8),
        (Field::GUEST_CS_AR, 1 << 14),
        (Field::GUEST_CS_AR, 1 << 15),
        (Field::GUEST_SS_AR, 8),
        (Field::GUEST_SS_AR, 1 << 5),
        (Field::GUEST_DS_AR, 1),
        (Field::GUEST_DS_LIMIT, 1),
        (Field::GUEST_TR_AR, 1 << 16),
        (Field::GUEST_TR_AR, 1 << 1),
        (Field::GUEST_TR_LIMIT, 1 << 20),
        (Field::GUEST_LDTR_AR, 1 << 16),
        (Field::GUEST_GDTR_BASE, NOT_CANONICAL),
        (Field::GUEST_IDTR_LIMIT, 1 << 16),
        (Field::GUEST_RIP, NOT_CANONICAL),
        (Field::GUEST_RFLAGS, 2),
        (Field::GUEST_RFLAGS, 1 << 15),
        (Field::GUEST_RFLAGS, 1 << 17),
        (Field::GUEST_ACTIVITY, 3),
        (Field::GUEST_ACTIVITY, 4),
        (Field::GUEST_INTERRUPTIBILITY, 1),
        (Field::GUEST_INTERRUPTIBILITY, 3),
        (Field::GUEST_INTERRUPTIBILITY, 4),
        (Field::GUEST_INTERRUPTIBILITY, 1 << 5),
        (Field::GUEST_PENDING_DEBUG, 1 << 4),
        (INJECT, 1 << 31 | 0x30),
    ] {
        check(GuestMode::Long, &[change], plain, &memory);
    }
    let interrupt = 1 << 31 | 0x30;
    let flag = (Field::GUEST_RFLAGS, 1 << 9);
    check(GuestMode::Long, &[(INJECT, interrupt), flag], None, &memory);
    for changes in [
        [(INJECT, interrupt), flag, (Field::GUEST_INTERRUPTIBILITY, 1)],
        [(INJECT, 1 << 31 | 3 << 8 | 6), (Field::GUEST_ACTIVITY, 1), flag],
        [(INJECT, 1 << 31 | 2 << 8 | 2), (Field::GUEST_INTERRUPTIBILITY, 2), flag],
        [(INJECT, 1 << 31 | 2 << 8 | 2), (Field::GUEST_INTERRUPTIBILITY, 8), flag],
        [(Field::GUEST_ACTIVITY, 1), (Field::GUEST_PENDING_DEBUG, 1 << 14), flag],
    ] {
        check(GuestMode::Long, &changes, plain, &memory);
    }
    let nmi = [(INJECT, 1 << 31 | 2 << 8 | 2), (Field::GUEST_INTERRUPTIBILITY, 1), flag];
    check(GuestMode::Long, &nmi, Some(Guest(entry_failure::NMI_INJECTION)), &memory);
}

#[test]
fn link_pointer_and_pdptes() {
    let memory = memory();
    let link = Some(Guest(entry_failure::VMCS_LINK_POINTER));
    for (pointer, expected) in [
        (layout::vmcs(0, 1), None),
        (layout::vmcs(0, 0), link),
        (layout::L1_DATA, link),
        (layout::vmcs(0, 1) + 1, link),
        (WIDE, link),
    ] {
        check(GuestMode::Long, &[(Field::VMCS_LINK_POINTER, !pointer)], expected, &memory);
    }
    let pdptes = Some(Guest(entry_failure::PDPTE));
    for bit in [1, 2, 5, 6, 7, 8, 40, 63] {
        check(GuestMode::Pae, &[(Field::GUEST_PDPTE0, 1 << bit)], pdptes, &memory);
        check(GuestMode::Pae, &[(Field::GUEST_PDPTE3, 1 << bit)], None, &memory);
        check(GuestMode::Long, &[(Field::GUEST_PDPTE0, 1 << bit)], None, &memory);
    }
}
