//! With which VMCS does L0 run L1?

use nvmx::tlb::VPID01;
use vmx_defs::msr::Allowed;
use vmx_defs::{EntryCtls, Eptp, ExitCtls, Field, PinCtls, ProcCtls, ProcCtls2};
use vmx_model::ModelCaps;
use vmx_model::registers::{Registers, gpr};

use crate::frames;

/// Where L0's exit handler would be.
pub(crate) const HOST_RIP: u64 = 0xffff_8000_0000_1234;

/// The fields of vmcs01 for an L1 that begins with these registers. All others are zero.
pub(crate) fn fields(hardware: &ModelCaps, l1: &Registers, ept01: Eptp) -> Vec<(Field, u64)> {
    let mut fields = controls(hardware, ept01);
    fields.extend(host_state(l1));
    fields.extend(guest_state(l1));
    fields
}

fn controls(hardware: &ModelCaps, ept01: Eptp) -> Vec<(Field, u64)> {
    let adjust = |set: Allowed, bits: u32| u64::from(set.adjust(bits));
    let pin = PinCtls::NMI_EXITING;
    let proc = ProcCtls::SECONDARY_CONTROLS | ProcCtls::MSR_BITMAPS;
    let proc2 = ProcCtls2::EPT
        | ProcCtls2::VPID
        | ProcCtls2::UNRESTRICTED_GUEST
        | ProcCtls2::INVPCID
        | ProcCtls2::RDTSCP
        | ProcCtls2::XSAVES;
    let exit = ExitCtls::SAVE_DEBUG_CONTROLS
        | ExitCtls::HOST_ADDRESS_SPACE_SIZE
        | ExitCtls::SAVE_PAT
        | ExitCtls::LOAD_PAT
        | ExitCtls::SAVE_EFER
        | ExitCtls::LOAD_EFER;
    let entry = EntryCtls::IA32E_MODE_GUEST
        | EntryCtls::LOAD_DEBUG_CONTROLS
        | EntryCtls::LOAD_PAT
        | EntryCtls::LOAD_EFER;
    vec![
        (Field::PIN_CTLS, adjust(hardware.pin, pin.bits())),
        (Field::PROC_CTLS, adjust(hardware.proc, proc.bits())),
        (Field::PROC_CTLS2, adjust(hardware.proc2, proc2.bits())),
        (Field::EXIT_CTLS, adjust(hardware.exit, exit.bits())),
        (Field::ENTRY_CTLS, adjust(hardware.entry, entry.bits())),
        (Field::VPID, VPID01.into()),
        (Field::EPT_POINTER, ept01.into_bits()),
        (Field::MSR_BITMAP, frames::MSR_BITMAP.as_u64()),
        (Field::VMCS_LINK_POINTER, u64::MAX),
    ]
}

/// What L0 runs with, which no program sees: L1's own registers do, but for addresses.
fn host_state(l1: &Registers) -> Vec<(Field, u64)> {
    vec![
        (Field::HOST_CR0, l1.cr0),
        (Field::HOST_CR3, 0),
        (Field::HOST_CR4, l1.cr4),
        (Field::HOST_CS_SELECTOR, 0x8),
        (Field::HOST_SS_SELECTOR, 0x10),
        (Field::HOST_TR_SELECTOR, 0x18),
        (Field::HOST_EFER, l1.efer),
        (Field::HOST_PAT, l1.pat),
        (Field::HOST_RIP, HOST_RIP),
        (Field::HOST_RSP, 0xffff_8000_0000_0000),
    ]
}

fn guest_state(l1: &Registers) -> Vec<(Field, u64)> {
    let mut fields = vec![
        (Field::GUEST_CR0, l1.cr0),
        (Field::GUEST_CR3, l1.cr3),
        (Field::GUEST_CR4, l1.cr4),
        (Field::CR0_SHADOW, l1.cr0),
        (Field::CR4_SHADOW, l1.cr4),
        (Field::GUEST_DR7, 0x400),
        (Field::GUEST_EFER, l1.efer),
        (Field::GUEST_PAT, l1.pat),
        (Field::GUEST_RIP, l1.rip),
        (Field::GUEST_RSP, l1.gprs[gpr::RSP]),
        (Field::GUEST_RFLAGS, l1.rflags),
        (Field::GUEST_IDTR_BASE, l1.idtr.base),
        (Field::GUEST_IDTR_LIMIT, l1.idtr.limit.into()),
    ];
    // The fields of the eight segments follow each other in the order ES to TR.
    for (number, segment) in (0..).zip(&l1.segments) {
        let values = [
            (Field::GUEST_ES_SELECTOR, segment.selector.into()),
            (Field::GUEST_ES_BASE, segment.base),
            (Field::GUEST_ES_LIMIT, segment.limit.into()),
            (Field::GUEST_ES_AR, segment.rights.into()),
        ];
        for (first, value) in values {
            let field = Field::from_encoding(first.encoding() + 2 * number);
            fields.extend(field.map(|field| (field, value)));
        }
    }
    fields
}
