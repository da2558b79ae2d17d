//! Answers: what do L2's accesses to the APIC-access page do?
//!
//! SDM Vol. 3C, "Virtualizing Memory-Mapped APIC Accesses" and "Exit Qualification for APIC-Access
//! VM Exits". There is no case for instruction fetches: one from that page ends Bochs.

use vmx_defs::{ExitReason, Field, L2Gpa, ProcCtls, ProcCtls2};

use super::{Control, Stage};
use crate::{
    ensure_eq, l2_code,
    memory::Page,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Exit, paging::WINDOW, snippet::Idt, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.apic_access.read", run: |ctx| access(ctx, load(), 0) },
    Case { name: "behaviour.apic_access.write", run: |ctx| access(ctx, store(), 1) },
    Case { name: "behaviour.apic_access.event_delivery", run: event_delivery },
    Case { name: "behaviour.apic_access.off", run: off },
    Case { name: "behaviour.apic_access.other_page", run: other_page },
    Case { name: "behaviour.apic_access.tpr", run: tpr },
    Case { name: "behaviour.apic_access.tpr.threshold", run: tpr_threshold },
];

l2_code! {
    load: "mov eax, [rbx]";
    store: "mov [rbx], eax";
    nothing: "";
}

const CONTROL: Control = Control::Proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES);

/// L2 that sees the APIC-access page at [`WINDOW`].
fn with_page(ctx: &mut Ctx<'_>) -> Result<(Stage, Page), Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(CONTROL)?;
    let page = ctx.arena.page();
    page.fill(0x7777_7777_7777_7777);
    vmcs::write(Field::APIC_ACCESS_ADDR, page.address());
    stage.vm.map(ctx, L2Gpa::new(WINDOW), page);
    Ok((stage, page))
}

/// Offset in bits 11:0, type of access in bits 15:12.
fn expect(exit: &Exit, kind: u64, offset: u64) -> Verdict {
    ensure_eq!(exit.reason, ExitReason::APIC_ACCESS, "exit reason");
    ensure_eq!(exit.qualification & 0xFFFF, kind << 12 | offset, "exit qualification");
    Ok(())
}

fn access(ctx: &mut Ctx<'_>, code: u64, kind: u64) -> Verdict {
    let (mut stage, page) = with_page(ctx)?;
    for offset in [0, 0x20, 0x80, 0x300, 0xFF0] {
        stage.vm.registers.rbx = WINDOW + offset;
        stage.vm.registers.rax = 0x5555;
        let exit = stage.exit_from(code)?;
        expect(&exit, kind, offset)?;
        ensure_eq!(exit.rip, code, "RIP");
        ensure_eq!(stage.vm.registers.rax, 0x5555, "RAX");
        ensure_eq!(page.read(offset as usize / 8), 0x7777_7777_7777_7777, "the page");
    }
    Ok(())
}

/// A stack on the page: the access is one during event delivery.
fn event_delivery(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, _) = with_page(ctx)?;
    Idt::new(ctx.arena).install();
    vmcs::write(Field::GUEST_RSP, WINDOW + 0x800);
    vmcs::write(Field::ENTRY_INTR_INFO, 0x8000_0306);
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason, ExitReason::APIC_ACCESS, "exit reason");
    ensure_eq!(exit.qualification >> 12 & 0xF, 3, "type of access");
    ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO), 0x8000_0306, "IDT-vectoring");
    Ok(())
}

fn off(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_page(ctx)?;
    stage.vm.registers.rbx = WINDOW + 0x80;
    for _ in 0..2 {
        stage.clear(CONTROL)?;
        stage.vm.registers.rax = 0x1234;
        stage.passes(store())?;
        ensure_eq!(page.read32(0x20), 0x1234, "the page");
        stage.set(CONTROL)?;
        expect(&stage.exit_from(store())?, 1, 0x80)?;
    }
    Ok(())
}

/// Another address in the field is another APIC-access page from the next entry on.
fn other_page(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_page(ctx)?;
    let other = ctx.arena.page();
    stage.vm.map(ctx, L2Gpa::new(WINDOW + 0x1000), other);
    for (field, exits, passes) in [(page, 0, 0x1000), (other, 0x1000, 0), (page, 0, 0x1000)] {
        vmcs::write(Field::APIC_ACCESS_ADDR, field.address());
        // The mapping that the processor has for the former page may stay until INVEPT.
        crate::vmx::invept_single(vmcs::read(Field::EPT_POINTER))?;
        stage.vm.registers.rbx = WINDOW + exits;
        expect(&stage.exit_from(load())?, 0, 0)?;
        stage.vm.registers.rbx = WINDOW + passes;
        stage.passes(load())?;
    }
    Ok(())
}

/// With the TPR shadow, the TPR at offset 80H is the virtual one.
fn tpr(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_page(ctx)?;
    stage.set(Control::Proc(ProcCtls::TPR_SHADOW))?;
    let virtual_page = ctx.arena.page();
    vmcs::write(Field::VIRTUAL_APIC_ADDR, virtual_page.address());
    vmcs::write(Field::TPR_THRESHOLD, 0);
    virtual_page.write32(0x20, 0x42);
    stage.vm.registers.rbx = WINDOW + 0x80;
    stage.passes(load())?;
    ensure_eq!(stage.vm.registers.rax, 0x42, "TPR as L2 reads it");
    stage.vm.registers.rax = 0x63;
    stage.passes(store())?;
    ensure_eq!(virtual_page.read32(0x20), 0x63, "virtual TPR");
    ensure_eq!(page.read(0x10), 0x7777_7777_7777_7777, "the APIC-access page");
    // Other registers exit as before.
    stage.vm.registers.rbx = WINDOW + 0x20;
    expect(&stage.exit_from(load())?, 0, 0x20)?;
    stage.vm.registers.rbx = WINDOW + 0xB0;
    expect(&stage.exit_from(store())?, 1, 0xB0)
}

fn tpr_threshold(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, _) = with_page(ctx)?;
    stage.set(Control::Proc(ProcCtls::TPR_SHADOW))?;
    let virtual_page = ctx.arena.page();
    virtual_page.write32(0x20, 0xF0);
    vmcs::write(Field::VIRTUAL_APIC_ADDR, virtual_page.address());
    vmcs::write(Field::TPR_THRESHOLD, 5);
    stage.vm.registers.rbx = WINDOW + 0x80;
    stage.vm.registers.rax = 0x50;
    stage.passes(store())?;
    stage.vm.registers.rax = 0x4F;
    let exit = stage.exit_from(store())?;
    ensure_eq!(exit.reason, ExitReason::TPR_BELOW_THRESHOLD, "exit reason");
    ensure_eq!(exit.rip, store() + 2, "RIP: after the instruction");
    ensure_eq!(virtual_page.read32(0x20), 0x4F, "virtual TPR");
    Ok(())
}
