//! Answers: is VM entry refused where fields that controls make meaningful are wrong?
//!
//! SDM Vol. 3C, "VM-Execution Control Fields", "VM-Exit Control Fields" and "VM-Entry Control
//! Fields" in "Checks on VMX Controls". The settings of the control bits themselves are tested in
//! [`crate::cases::controls`].

use vmx_defs::{Eptp, ExitCtls, Field, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};

use super::{Clear, Expect, Set, To, Trial, beyond_width};
use crate::{
    skip,
    suite::{Case, Ctx, Verdict},
    vmx::{Mode, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.controls.cr3_targets", run: cr3_targets },
    Case { name: "entry.controls.io_bitmaps", run: io_bitmaps },
    Case { name: "entry.controls.msr_bitmap", run: msr_bitmap },
    Case { name: "entry.controls.virtual_apic", run: virtual_apic },
    Case { name: "entry.controls.tpr_threshold", run: tpr_threshold },
    Case { name: "entry.controls.apic.without_tpr_shadow", run: without_tpr_shadow },
    Case { name: "entry.controls.virtual_nmis", run: virtual_nmis },
    Case { name: "entry.controls.apic_access", run: apic_access },
    Case { name: "entry.controls.apic.x2apic_and_accesses", run: x2apic_and_apic_access },
    Case { name: "entry.controls.apic.virtual_interrupts", run: virtual_interrupts },
    Case { name: "entry.controls.apic.posted_interrupts", run: posted_interrupts },
    Case { name: "entry.controls.vpid_zero", run: vpid_zero },
    Case { name: "entry.controls.eptp", run: eptp },
    Case { name: "entry.controls.unrestricted_without_ept", run: unrestricted_without_ept },
    Case { name: "entry.controls.ept.pml", run: pml },
    Case { name: "entry.controls.ept.mode_based_execute", run: mode_based_execute },
    Case { name: "entry.controls.vmfunc", run: vmfunc },
    Case { name: "entry.controls.shadowing", run: shadowing },
    Case { name: "entry.controls.ept.ve", run: ve },
    Case { name: "entry.controls.preemption_timer_save", run: preemption_timer_save },
    Case { name: "entry.controls.msr_areas", run: msr_areas },
    Case { name: "entry.controls.secondary_inactive", run: secondary_inactive },
    Case { name: "entry.controls.unused_fields", run: unused_fields },
];

fn proc(controls: ProcCtls) -> super::Edit {
    Set(Field::PROC_CTLS, controls.bits().into())
}

fn proc2(controls: ProcCtls2) -> super::Edit {
    Set(Field::PROC_CTLS2, controls.bits().into())
}

fn no_proc2(controls: ProcCtls2) -> super::Edit {
    Clear(Field::PROC_CTLS2, controls.bits().into())
}

/// An L2 with these secondary controls offered (not yet set).
fn with2(ctx: &mut Ctx<'_>, controls: ProcCtls2) -> Result<Trial, crate::suite::Stop> {
    let trial = Trial::new(ctx, Mode::Long)?;
    if !trial.vmx.caps.has2(controls) {
        skip!("secondary controls {controls:?} not offered");
    }
    Ok(trial)
}

/// An L2 with a TPR shadow.
fn with_shadow(ctx: &mut Ctx<'_>) -> Result<Trial, crate::suite::Stop> {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.enable_proc(ProcCtls::TPR_SHADOW)?;
    Ok(trial)
}

fn cr3_targets(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let most = u64::from(trial.vmx.caps.misc.cr3_targets());
    for count in 0..=most {
        trial.row("a supported count", &[To(Field::CR3_TARGET_COUNT, count)], Expect::Enters)?;
    }
    for count in [most + 1, most + 256, 0x8000_0000, 0xFFFF_FFFF] {
        trial.row("too many", &[To(Field::CR3_TARGET_COUNT, count)], Expect::Controls)?;
    }
    Ok(())
}

fn io_bitmaps(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.enable_proc(ProcCtls::IO_BITMAPS)?;
    trial.row("good bitmaps", &[], Expect::Enters)?;
    trial.page_address(Field::IO_BITMAP_A)?;
    trial.page_address(Field::IO_BITMAP_B)
}

fn msr_bitmap(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.enable_proc(ProcCtls::MSR_BITMAPS)?;
    trial.row("a good bitmap", &[], Expect::Enters)?;
    trial.page_address(Field::MSR_BITMAP)
}

fn virtual_apic(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with_shadow(ctx)?;
    trial.row("a good page", &[], Expect::Enters)?;
    trial.page_address(Field::VIRTUAL_APIC_ADDR)
}

/// Bits 31:4 are 0, and bits 3:0 not above bits 7:4 of VTPR.
fn tpr_threshold(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with_shadow(ctx)?;
    let page = crate::memory::Page::at(vmcs::read(Field::VIRTUAL_APIC_ADDR));
    trial.each_set(Field::TPR_THRESHOLD, 0xFFFF_FFF0, Expect::Controls)?;
    for (vtpr, threshold, expected) in [
        (0x0F, 1, Expect::Controls),
        (0x10, 1, Expect::Enters),
        (0x10, 2, Expect::Controls),
        (0x8F, 8, Expect::Enters),
        (0x8F, 9, Expect::Controls),
        (0xF0, 0xF, Expect::Enters),
        (0xEF, 0xF, Expect::Controls),
    ] {
        page.write32(0x80 / 4, vtpr);
        trial.row("the threshold", &[To(Field::TPR_THRESHOLD, threshold)], expected)?;
    }
    page.write32(0x80 / 4, 0);
    if trial.vmx.caps.has2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES) {
        let edits = [proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES), To(Field::TPR_THRESHOLD, 0xF)];
        trial.row("not compared with virtualized APIC accesses", &edits, Expect::Enters)?;
    }
    Ok(())
}

fn without_tpr_shadow(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let offered: [ProcCtls2; 3] = [
        ProcCtls2::VIRTUALIZE_X2APIC,
        ProcCtls2::APIC_REGISTER_VIRTUALIZATION,
        ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY,
    ];
    if !offered.iter().any(|&control| trial.vmx.caps.has2(control)) {
        skip!("no APIC virtualization offered");
    }
    trial.base(&[Set(Field::PIN_CTLS, PinCtls::EXTERNAL_INTERRUPT_EXITING.bits().into())]);
    for control in offered {
        if trial.vmx.caps.has2(control) {
            trial.row("without TPR shadow", &[proc2(control)], Expect::Controls)?;
            let edits = [proc2(control), proc(ProcCtls::TPR_SHADOW)];
            trial.row("with TPR shadow", &edits, Expect::Enters)?;
        }
    }
    Ok(())
}

fn virtual_nmis(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let (nmi, virtual_nmis) = (PinCtls::NMI_EXITING.bits(), PinCtls::VIRTUAL_NMIS.bits());
    if trial.vmx.caps.pin.may_be_1 & (nmi | virtual_nmis) != nmi | virtual_nmis {
        skip!("virtual NMIs not offered");
    }
    let pin = |bits: u32| Set(Field::PIN_CTLS, bits.into());
    let window = proc(ProcCtls::NMI_WINDOW_EXITING);
    trial.row("virtual NMIs without NMI exiting", &[pin(virtual_nmis)], Expect::Controls)?;
    trial.row("both", &[pin(nmi | virtual_nmis)], Expect::Enters)?;
    trial.row("NMI exiting alone", &[pin(nmi)], Expect::Enters)?;
    trial.row("NMI window without virtual NMIs", &[pin(nmi), window], Expect::Controls)?;
    trial.row("NMI window without either", &[window], Expect::Controls)?;
    trial.row("all three", &[pin(nmi | virtual_nmis), window], Expect::Enters)
}

fn apic_access(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::VIRTUALIZE_APIC_ACCESSES)?;
    trial.base(&[proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES)]);
    trial.row("a good page", &[], Expect::Enters)?;
    trial.page_address(Field::APIC_ACCESS_ADDR)
}

fn x2apic_and_apic_access(ctx: &mut Ctx<'_>) -> Verdict {
    let both = ProcCtls2::VIRTUALIZE_X2APIC | ProcCtls2::VIRTUALIZE_APIC_ACCESSES;
    let mut trial = with2(ctx, both)?;
    trial.enable_proc(ProcCtls::TPR_SHADOW)?;
    trial.row("both", &[proc2(both)], Expect::Controls)
}

fn virtual_interrupts(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY)?;
    trial.enable_proc(ProcCtls::TPR_SHADOW)?;
    let exiting = PinCtls::EXTERNAL_INTERRUPT_EXITING.bits().into();
    let delivery = proc2(ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY);
    let edits = [delivery, Clear(Field::PIN_CTLS, exiting)];
    trial.row("without external-interrupt exiting", &edits, Expect::Controls)?;
    let edits = [delivery, Set(Field::PIN_CTLS, exiting)];
    trial.row("with external-interrupt exiting", &edits, Expect::Enters)
}

fn posted_interrupts(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY)?;
    if trial.vmx.caps.pin.may_be_1 & PinCtls::POSTED_INTERRUPTS.bits() == 0 {
        skip!("posted interrupts not offered");
    }
    trial.enable_proc(ProcCtls::TPR_SHADOW)?;
    let pin = PinCtls::POSTED_INTERRUPTS | PinCtls::EXTERNAL_INTERRUPT_EXITING;
    trial.base(&[
        Set(Field::PIN_CTLS, pin.bits().into()),
        proc2(ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY),
        Set(Field::EXIT_CTLS, ExitCtls::ACK_INTERRUPT.bits().into()),
    ]);
    trial.row("good posted interrupts", &[], Expect::Enters)?;
    let edits = [no_proc2(ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY)];
    trial.row("without virtual-interrupt delivery", &edits, Expect::Controls)?;
    let edits = [Clear(Field::EXIT_CTLS, ExitCtls::ACK_INTERRUPT.bits().into())];
    trial.row("without acknowledge on exit", &edits, Expect::Controls)?;
    trial.each_set(Field::POSTED_INTERRUPT_VECTOR, 0xFF00, Expect::Controls)?;
    trial.each_set(Field::POSTED_INTERRUPT_DESC_ADDR, 0x3F, Expect::Controls)?;
    let wide = beyond_width(&trial.vmx);
    trial.each_set(Field::POSTED_INTERRUPT_DESC_ADDR, wide, Expect::Controls)
}

fn vpid_zero(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::VPID)?;
    trial.base(&[proc2(ProcCtls2::VPID)]);
    trial.row("VPID 0", &[To(Field::VPID, 0)], Expect::Controls)?;
    for vpid in [1, 0x8000, 0xFFFF] {
        trial.row("another VPID", &[To(Field::VPID, vpid)], Expect::Enters)?;
    }
    trial.row("without VPID", &[To(Field::VPID, 0), no_proc2(ProcCtls2::VPID)], Expect::Enters)
}

fn eptp(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let good = vmcs::read(Field::EPT_POINTER);
    let caps = trial.vmx.caps;
    let valid = |eptp: u64| Eptp::from(eptp).is_valid(caps.ept, caps.width);
    // Bits 11:0 in every combination; those that change the table are not run with.
    for low in 0..0x1000 {
        let eptp = good & !0xFFF | low;
        let other_walk = low >> 3 & 7 != good >> 3 & 7;
        if !valid(eptp) {
            // Every invalid memory type and walk length, and every other bit alone.
            if low & 0xFC0 == 0 || (low & 0x3F == good & 0x3F && (low >> 6).is_power_of_two()) {
                trial.row("EPTP", &[To(Field::EPT_POINTER, eptp)], Expect::Controls)?;
            }
        } else if !other_walk {
            trial.row("a valid EPTP", &[To(Field::EPT_POINTER, eptp)], Expect::Enters)?;
        }
    }
    let wide = beyond_width(&trial.vmx);
    trial.each_set(Field::EPT_POINTER, wide, Expect::Controls)
}

fn unrestricted_without_ept(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::UNRESTRICTED_GUEST)?;
    let edits = [proc2(ProcCtls2::UNRESTRICTED_GUEST)];
    trial.row("with EPT", &edits, Expect::Enters)?;
    let edits = [proc2(ProcCtls2::UNRESTRICTED_GUEST), no_proc2(ProcCtls2::EPT)];
    trial.row("without EPT", &edits, Expect::Controls)
}

fn pml(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::PML)?;
    trial.row(
        "without EPT",
        &[proc2(ProcCtls2::PML), no_proc2(ProcCtls2::EPT)],
        Expect::Controls,
    )?;
    trial.base(&[proc2(ProcCtls2::PML)]);
    trial.row("a good log", &[], Expect::Enters)?;
    trial.page_address(Field::PML_ADDRESS)
}

fn mode_based_execute(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::MODE_BASED_EXECUTE)?;
    let edits = [proc2(ProcCtls2::MODE_BASED_EXECUTE), no_proc2(ProcCtls2::EPT)];
    trial.row("without EPT", &edits, Expect::Controls)
}

fn vmfunc(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::VM_FUNCTIONS)?;
    let offered = trial.vmx.caps.vmfunc;
    let list = ctx.arena.page();
    trial.base(&[proc2(ProcCtls2::VM_FUNCTIONS)]);
    trial.row("no function", &[], Expect::Enters)?;
    trial.each_set(Field::VM_FUNCTION_CONTROLS, !offered, Expect::Controls)?;
    if trial.vmx.caps.eptp_switching() {
        trial.base(&[
            To(Field::EPTP_LIST_ADDRESS, list.address()),
            To(Field::VM_FUNCTION_CONTROLS, VmFuncCtls::EPTP_SWITCHING.bits()),
        ]);
        trial.row("EPTP switching", &[], Expect::Enters)?;
        trial.row("without EPT", &[no_proc2(ProcCtls2::EPT)], Expect::Controls)?;
        trial.page_address(Field::EPTP_LIST_ADDRESS)?;
        let edits = [no_proc2(ProcCtls2::VM_FUNCTIONS), To(Field::EPTP_LIST_ADDRESS, u64::MAX)];
        trial.row("without VM functions", &edits, Expect::Enters)?;
    }
    Ok(())
}

fn shadowing(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::VMCS_SHADOWING)?;
    trial.base(&[proc2(ProcCtls2::VMCS_SHADOWING)]);
    trial.row("good bitmaps", &[], Expect::Enters)?;
    trial.page_address(Field::VMREAD_BITMAP)?;
    trial.page_address(Field::VMWRITE_BITMAP)
}

fn ve(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = with2(ctx, ProcCtls2::EPT_VIOLATION_VE)?;
    trial.base(&[proc2(ProcCtls2::EPT_VIOLATION_VE)]);
    trial.row("a good area", &[], Expect::Enters)?;
    trial.page_address(Field::VE_INFORMATION_ADDR)
}

fn preemption_timer_save(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let (timer, save) = (PinCtls::PREEMPTION_TIMER, ExitCtls::SAVE_PREEMPTION_TIMER);
    let caps = trial.vmx.caps;
    if caps.pin.may_be_1 & timer.bits() == 0 || caps.exit.may_be_1 & save.bits() == 0 {
        skip!("no VMX-preemption timer to save");
    }
    let save = Set(Field::EXIT_CTLS, save.bits().into());
    trial.row("save without timer", &[save], Expect::Controls)?;
    let timer = Set(Field::PIN_CTLS, timer.bits().into());
    trial.row("both", &[save, timer], Expect::Enters)?;
    trial.row("timer alone", &[timer], Expect::Enters)
}

/// Each area is 16-byte aligned, and its first and last byte within the physical-address width,
/// unless it has no entries.
fn msr_areas(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let top = 1_u64 << trial.vmx.caps.width;
    for (count, address) in [
        (Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_STORE_ADDR),
        (Field::EXIT_MSR_LOAD_COUNT, Field::EXIT_MSR_LOAD_ADDR),
        (Field::ENTRY_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_ADDR),
    ] {
        let page = ctx.arena.page().address();
        for bit in 0..4 {
            let edits = [To(count, 1), To(address, page | 1 << bit)];
            trial.row(address.name(), &edits, Expect::Controls)?;
        }
        for (entries, at) in [(1, top), (2, top - 16), (16, top - 128), (1, 1 << 63), (1, !15)] {
            let edits = [To(count, entries), To(address, at)];
            trial.row(address.name(), &edits, Expect::Controls)?;
        }
        for at in [0, 1, top, u64::MAX] {
            let edits = [To(count, 0), To(address, at)];
            trial.row("an area without entries", &edits, Expect::Enters)?;
        }
    }
    Ok(())
}

/// Without "activate secondary controls" the secondary controls are all taken as 0.
fn secondary_inactive(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    if trial.vmx.caps.proc.must_be_1 & ProcCtls::SECONDARY_CONTROLS.bits() != 0 {
        skip!("secondary controls are always active");
    }
    let inactive = Clear(Field::PROC_CTLS, ProcCtls::SECONDARY_CONTROLS.bits().into());
    trial.row("no EPT", &[inactive], Expect::Enters)?;
    let edits = [inactive, To(Field::PROC_CTLS2, 0xFFFF_FFFF), To(Field::EPT_POINTER, u64::MAX)];
    trial.row("controls that are not allowed", &edits, Expect::Enters)
}

/// Fields of controls that are 0 may hold anything.
fn unused_fields(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for field in [
        Field::IO_BITMAP_A,
        Field::IO_BITMAP_B,
        Field::MSR_BITMAP,
        Field::VIRTUAL_APIC_ADDR,
        Field::TPR_THRESHOLD,
        Field::APIC_ACCESS_ADDR,
        Field::VPID,
        Field::VM_FUNCTION_CONTROLS,
        Field::EPTP_LIST_ADDRESS,
        Field::PML_ADDRESS,
        Field::VMREAD_BITMAP,
        Field::VMWRITE_BITMAP,
        Field::VE_INFORMATION_ADDR,
        Field::TSC_MULTIPLIER,
        Field::EXIT_MSR_STORE_ADDR,
        Field::EXIT_MSR_LOAD_ADDR,
        Field::ENTRY_MSR_LOAD_ADDR,
        Field::EXECUTIVE_VMCS_POINTER,
        Field::ENTRY_EXCEPTION_ERROR,
        Field::ENTRY_INSTRUCTION_LEN,
        Field::PF_ERROR_MASK,
        Field::PF_ERROR_MATCH,
        Field::CR3_TARGET0,
        Field::CR3_TARGET3,
    ] {
        if trial.vmx.caps.has_field(field) {
            for value in [u64::MAX, 0] {
                trial.row(field.name(), &[To(field, value)], Expect::Enters)?;
            }
        }
    }
    Ok(())
}
