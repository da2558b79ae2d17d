//! Answers: what does VM entry say of addresses that are not aligned or beyond the processor's
//! width, and of structures past the end of RAM?
//!
//! SDM Vol. 3C, "Checks on VMX Controls" and "Checks on Guest Non-Register State".

use vmx_defs::{ExitReason, Field, ProcCtls, ProcCtls2, exit::entry_failure};
use vmx_hw::VmFail;

use crate::{
    cases::behaviour::{Control, Stage},
    ensure_eq, l2_code, skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Outcome, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "hostile.address.io_bitmap_a", run: |ctx| refused(ctx, IO_A) },
    Case { name: "hostile.address.io_bitmap_b", run: |ctx| refused(ctx, IO_B) },
    Case { name: "hostile.address.msr_bitmap", run: |ctx| refused(ctx, MSR) },
    Case { name: "hostile.address.virtual_apic", run: |ctx| refused(ctx, VIRTUAL_APIC) },
    Case { name: "hostile.address.apic_access", run: |ctx| refused(ctx, APIC_ACCESS) },
    Case { name: "hostile.address.eptp_list", run: |ctx| refused(ctx, EPTP_LIST) },
    Case { name: "hostile.address.ve_information", run: |ctx| refused(ctx, VE) },
    Case { name: "hostile.address.vmcs_link_pointer", run: link_pointer },
    Case { name: "hostile.address.eptp", run: eptp },
    Case { name: "hostile.past_ram.structures", run: past_ram },
    Case { name: "hostile.past_ram.eptp", run: past_ram_eptp },
];

l2_code! {
    nothing: "";
    in_al: "in al, dx";
    rdmsr: "rdmsr";
}

/// An address field that must be page-aligned, and the control that makes it count.
type Named = (Field, Control);

const IO_A: Named = (Field::IO_BITMAP_A, Control::Proc(ProcCtls::IO_BITMAPS));
const IO_B: Named = (Field::IO_BITMAP_B, Control::Proc(ProcCtls::IO_BITMAPS));
const MSR: Named = (Field::MSR_BITMAP, Control::Proc(ProcCtls::MSR_BITMAPS));
const VIRTUAL_APIC: Named = (Field::VIRTUAL_APIC_ADDR, Control::Proc(ProcCtls::TPR_SHADOW));
const APIC_ACCESS: Named =
    (Field::APIC_ACCESS_ADDR, Control::Proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES));
const EPTP_LIST: Named = (Field::EPTP_LIST_ADDRESS, Control::Proc2(ProcCtls2::VM_FUNCTIONS));
const VE: Named = (Field::VE_INFORMATION_ADDR, Control::Proc2(ProcCtls2::EPT_VIOLATION_VE));

/// Gives every field of a control a page, so that the one under test alone is wrong.
fn prepare(ctx: &mut Ctx<'_>, stage: &Stage, (field, control): Named) -> Result<u64, Stop> {
    stage.set(control)?;
    if control == Control::Proc(ProcCtls::IO_BITMAPS) {
        vmcs::write(Field::IO_BITMAP_A, ctx.arena.page().address());
        vmcs::write(Field::IO_BITMAP_B, ctx.arena.page().address());
    }
    if field == Field::VIRTUAL_APIC_ADDR {
        vmcs::write(Field::TPR_THRESHOLD, 0);
    }
    if field == Field::EPTP_LIST_ADDRESS {
        if !stage.vmx.caps.eptp_switching() {
            skip!("EPTP switching not offered");
        }
        vmcs::write(Field::VM_FUNCTION_CONTROLS, 1);
    }
    Ok(ctx.arena.page().address())
}

/// Each low bit and each bit beyond the width makes VMfailValid 7; without the control, nothing.
fn refused(ctx: &mut Ctx<'_>, named: Named) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let width = u32::from(stage.vmx.caps.width);
    let good = prepare(ctx, &stage, named)?;
    let (field, control) = named;
    for bit in (0..12).chain(width..64) {
        vmcs::write(field, good | 1 << bit);
        vmcs::write(Field::GUEST_RIP, nothing());
        let expected = Outcome::VmFail(VmFail::Valid, 7);
        ensure_eq!(stage.vm.run(), expected, "VM entry with bit {bit} of {field:?}");
    }
    vmcs::write(field, good);
    stage.passes(nothing())?;
    stage.clear(control)?;
    vmcs::write(field, !0);
    stage.passes(nothing())
}

fn link_pointer(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let width = u32::from(stage.vmx.caps.width);
    let good = ctx.arena.page();
    good.write32(0, stage.vmx.caps.basic.revision());
    for bit in (0..12).chain(width..64) {
        vmcs::write(Field::VMCS_LINK_POINTER, good.address() | 1 << bit);
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.reason.bits(), 1 << 31 | 33, "exit reason with bit {bit}");
        ensure_eq!(exit.qualification, entry_failure::VMCS_LINK_POINTER, "qualification");
    }
    vmcs::write(Field::VMCS_LINK_POINTER, !0);
    stage.passes(nothing())
}

fn eptp(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let width = u32::from(stage.vmx.caps.width);
    let good = vmcs::read(Field::EPT_POINTER);
    for bit in (8..12).chain(width..64) {
        vmcs::write(Field::EPT_POINTER, good | 1 << bit);
        let expected = Outcome::VmFail(VmFail::Valid, 7);
        ensure_eq!(stage.vm.run(), expected, "VM entry with bit {bit} of the EPTP");
    }
    vmcs::write(Field::EPT_POINTER, good);
    stage.passes(nothing())
}

/// The last page that the physical-address width allows.
fn last_page(stage: &Stage) -> u64 {
    (1 << stage.vmx.caps.width) - 0x1000
}

/// Bitmaps and areas at an address of no RAM are accepted; what is read there are ones.
fn past_ram(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let last = last_page(&stage);
    stage.set(Control::Proc(ProcCtls::IO_BITMAPS | ProcCtls::MSR_BITMAPS))?;
    for field in [Field::IO_BITMAP_A, Field::IO_BITMAP_B, Field::MSR_BITMAP] {
        vmcs::write(field, last);
    }
    stage.vm.registers.rdx = 0x80;
    stage.intercepted(in_al(), ExitReason::IO_INSTRUCTION, 1)?;
    stage.vm.registers.rcx = 0x174;
    stage.intercepted(rdmsr(), ExitReason::RDMSR, 2)?;
    vmcs::write(Field::ENTRY_MSR_LOAD_ADDR, last + 0x1000 - 16);
    vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, 1);
    let exit = stage.exit_from(nothing())?;
    ensure_eq!((exit.reason.bits(), exit.qualification), (1 << 31 | 34, 1), "MSR loading");
    vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, 2);
    let expected = Outcome::VmFail(VmFail::Valid, 7);
    ensure_eq!(stage.vm.run(), expected, "VM entry with an area that ends beyond the width");
    vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, 0);
    stage.passes(nothing())
}

fn past_ram_eptp(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let good = vmcs::read(Field::EPT_POINTER);
    vmcs::write(Field::EPT_POINTER, last_page(&stage) | good & 0xFFF);
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason, ExitReason::EPT_MISCONFIGURATION, "exit reason");
    vmcs::write(Field::EPT_POINTER, good);
    stage.passes(nothing())
}
