//! Answers: in which modes other than paged 64-bit mode does L2 run, and what is saved of a change?
//!
//! SDM Vol. 3C, "Unrestricted Guests", "Saving Control Registers, Debug Registers, and MSRs" (the
//! "IA-32e mode guest" control), and "Task switches" under "Other Causes of VM Exits" with "Exit
//! Qualification for Task Switches".

use vmx_defs::{EntryCtls, ExitReason, Field, ProcCtls2};

use super::{Control, Stage};
use crate::{
    ensure_eq, gdt,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Exit, Mode, Vm, Vmx, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.unrestricted.real_mode", run: real_mode },
    Case { name: "behaviour.unrestricted.real_mode.interrupt", run: real_interrupt },
    Case { name: "behaviour.unrestricted.real_to_protected", run: real_to_protected },
    Case { name: "behaviour.unrestricted.no_paging", run: no_paging },
    Case { name: "behaviour.unrestricted.to_ia32e", run: to_ia32e },
    Case { name: "behaviour.unrestricted.needed", run: unrestricted_needed },
    Case { name: "behaviour.compatibility_mode", run: compatibility },
    Case {
        name: "behaviour.task_switch.call",
        // CALL 0040:00000000
        run: |ctx| task_switch(ctx, &[0x9A, 0, 0, 0, 0, 0x40, 0], 7, 0),
    },
    Case {
        name: "behaviour.task_switch.jmp",
        run: |ctx| task_switch(ctx, &[0xEA, 0, 0, 0, 0, 0x40, 0], 7, 2),
    },
    Case { name: "behaviour.task_switch.iret", run: |ctx| task_switch(ctx, &[0xCF], 1, 1) },
    Case { name: "behaviour.task_switch.int_n", run: |ctx| task_switch(ctx, &[0xCD, 0x30], 2, 3) },
];

const PE: u64 = 1;
const PG: u64 = 1 << 31;
const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];

/// A page that begins with this code and VMCALL.
fn code(ctx: &mut Ctx<'_>, bytes: &[u8]) -> Page {
    let page = ctx.arena.page();
    page.put(0, bytes);
    page.put(bytes.len(), &VMCALL);
    page
}

/// L2 with paging off, all segments based at 0 with 32-bit code.
fn unpaged(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::UNRESTRICTED_GUEST))?;
    stage.clear(Control::Entry(EntryCtls::IA32E_MODE_GUEST))?;
    vmcs::change(Field::GUEST_CR0, 0, PG);
    vmcs::change(Field::GUEST_EFER, 0, 0x500);
    vmcs::write(Field::GUEST_CS_SELECTOR, gdt::CODE32.into());
    vmcs::write(Field::GUEST_CS_AR, 0xC09B);
    Ok(stage)
}

const SEGMENTS: [[Field; 4]; 6] = [
    [Field::GUEST_CS_SELECTOR, Field::GUEST_CS_BASE, Field::GUEST_CS_LIMIT, Field::GUEST_CS_AR],
    [Field::GUEST_SS_SELECTOR, Field::GUEST_SS_BASE, Field::GUEST_SS_LIMIT, Field::GUEST_SS_AR],
    [Field::GUEST_DS_SELECTOR, Field::GUEST_DS_BASE, Field::GUEST_DS_LIMIT, Field::GUEST_DS_AR],
    [Field::GUEST_ES_SELECTOR, Field::GUEST_ES_BASE, Field::GUEST_ES_LIMIT, Field::GUEST_ES_AR],
    [Field::GUEST_FS_SELECTOR, Field::GUEST_FS_BASE, Field::GUEST_FS_LIMIT, Field::GUEST_FS_AR],
    [Field::GUEST_GS_SELECTOR, Field::GUEST_GS_BASE, Field::GUEST_GS_LIMIT, Field::GUEST_GS_AR],
];

/// L2 in real mode; CS is based at `page`, DS and the others at `data`.
fn real(ctx: &mut Ctx<'_>, page: Page, data: Page) -> Result<Stage, Stop> {
    let stage = unpaged(ctx)?;
    vmcs::change(Field::GUEST_CR0, 0, PE);
    for (number, [selector, base, limit, rights]) in SEGMENTS.into_iter().enumerate() {
        let at = if number == 0 { page } else { data }.address();
        vmcs::write(selector, at >> 4 & 0xFFFF);
        vmcs::write(base, at);
        vmcs::write(limit, 0xFFFF);
        vmcs::write(rights, if number == 0 { 0x9B } else { 0x93 });
    }
    vmcs::write(Field::GUEST_RSP, 0x1000);
    Ok(stage)
}

fn real_mode(ctx: &mut Ctx<'_>) -> Verdict {
    // mov ax, 0x1234; add ax, [0x10]; mov [0x12], ax
    let page = code(ctx, &[0xB8, 0x34, 0x12, 0x03, 0x06, 0x10, 0x00, 0xA3, 0x12, 0x00]);
    let data = ctx.arena.page();
    data.write(2, 0x1111);
    let mut stage = real(ctx, page, data)?;
    let exit = stage.exit_from(0)?;
    ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
    ensure_eq!((exit.rip, exit.length), (10, 3), "RIP and instruction length");
    ensure_eq!(stage.vm.registers.rax as u16, 0x2345, "AX");
    ensure_eq!(data.read(2), 0x2345_1111, "what L2 wrote");
    ensure_eq!(vmcs::read(Field::GUEST_CR0) & (PE | PG), 0, "CR0.PE and CR0.PG");
    Ok(())
}

/// INT in real mode goes through the table at IDTR's base: four bytes a vector.
fn real_interrupt(ctx: &mut Ctx<'_>) -> Verdict {
    // int 0x21
    let page = ctx.arena.block_2m();
    page.put(0, &[0xCD, 0x21]);
    let data = ctx.arena.page();
    let table = ctx.arena.page();
    // To 0000:0500, where the identity map has what the firmware left: the fetch is not awaited.
    table.write32(0x21, 0x0000_0500);
    let mut stage = real(ctx, page, data)?;
    vmcs::write(Field::GUEST_IDTR_BASE, table.address());
    vmcs::write(Field::GUEST_IDTR_LIMIT, 0x3FF);
    // The first 2 MiB can't be fetched from.
    let slot = stage.vm.ept.slot(ctx.arena, vmx_defs::L2Gpa::new(0), 2);
    slot.set(slot.get() & !4);
    let exit = stage.exit_from(0)?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!((exit.gpa, exit.rip), (0x500, 0x500), "guest-physical address and RIP");
    ensure_eq!(vmcs::read(Field::GUEST_CS_BASE), 0, "CS base");
    ensure_eq!(vmcs::read(Field::GUEST_RSP) & 0xFFFF, 0x1000 - 6, "SP");
    let frame = [data.read(511) >> 16 & 0xFFFF, data.read(511) >> 32 & 0xFFFF];
    ensure_eq!(frame, [2, page.address() >> 4 & 0xFFFF], "IP and CS in the frame");
    Ok(())
}

fn real_to_protected(ctx: &mut Ctx<'_>) -> Verdict {
    // mov eax, cr0; or al, 1; mov cr0, eax
    let page = code(ctx, &[0x0F, 0x20, 0xC0, 0x0C, 0x01, 0x0F, 0x22, 0xC0]);
    let data = ctx.arena.page();
    let mut stage = real(ctx, page, data)?;
    let exit = stage.exit_from(0)?;
    ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
    ensure_eq!(vmcs::read(Field::GUEST_CR0) & (PE | PG), PE, "CR0.PE and CR0.PG");
    ensure_eq!(vmcs::read(Field::GUEST_CS_BASE), page.address(), "CS base");
    Ok(())
}

fn no_paging(ctx: &mut Ctx<'_>) -> Verdict {
    // mov eax, [ebx]; add eax, 1; mov [ebx + 4], eax
    let page = code(ctx, &[0x8B, 0x03, 0x83, 0xC0, 0x01, 0x89, 0x43, 0x04]);
    let data = ctx.arena.page();
    data.write(0, 0x1234_5677);
    let mut stage = unpaged(ctx)?;
    stage.vm.registers.rbx = data.address();
    stage.passes(page.address())?;
    ensure_eq!(data.read(0), 0x1234_5678_1234_5677, "what L2 wrote");
    Ok(())
}

/// L2 enables paging with EFER.LME set: the exit saves IA-32e mode in the VM-entry controls.
fn to_ia32e(ctx: &mut Ctx<'_>) -> Verdict {
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    // mov cr0, eax
    let page = code(ctx, &[0x0F, 0x22, 0xC0]);
    let mut stage = unpaged(ctx)?;
    if !stage.vmx.caps.misc.stores_lma() {
        skip!("exits do not save IA-32e mode");
    }
    let ia32e = u64::from(EntryCtls::IA32E_MODE_GUEST.bits());
    vmcs::change(Field::GUEST_EFER, LME, 0);
    stage.vm.registers.rax = vmcs::read(Field::GUEST_CR0) | PG;
    stage.passes(page.address())?;
    ensure_eq!(vmcs::read(Field::ENTRY_CTLS) & ia32e, ia32e, "IA-32e mode guest");
    ensure_eq!(vmcs::read(Field::GUEST_EFER) & (LME | LMA), LME | LMA, "guest EFER");
    ensure_eq!(vmcs::read(Field::GUEST_CR0) & PG, PG, "CR0.PG");
    // And back.
    stage.vm.registers.rax = vmcs::read(Field::GUEST_CR0) & !PG;
    stage.passes(page.address())?;
    ensure_eq!(vmcs::read(Field::ENTRY_CTLS) & ia32e, 0, "IA-32e mode guest");
    ensure_eq!(vmcs::read(Field::GUEST_EFER) & (LME | LMA), LME, "guest EFER");
    Ok(())
}

/// Without the control, paging can't be off: not at VM entry, and not by MOV to CR0.
fn unrestricted_needed(ctx: &mut Ctx<'_>) -> Verdict {
    let page = code(ctx, &[]);
    let mut stage = unpaged(ctx)?;
    stage.passes(page.address())?;
    stage.clear(Control::Proc2(ProcCtls2::UNRESTRICTED_GUEST))?;
    let exit = stage.exit_from(page.address())?;
    ensure_eq!(exit.reason.bits(), 1 << 31 | 33, "exit reason");
    Ok(())
}

fn compatibility(ctx: &mut Ctx<'_>) -> Verdict {
    // mov eax, [ebx + 4]; inc eax (in 64-bit mode a prefix)
    let page = code(ctx, &[0x8B, 0x43, 0x04, 0x40]);
    let data = ctx.arena.page();
    data.write(0, 0x1234_5678 << 32);
    let mut stage = Stage::new(ctx)?;
    vmcs::write(Field::GUEST_CS_SELECTOR, gdt::CODE32.into());
    vmcs::write(Field::GUEST_CS_AR, 0xC09B);
    stage.vm.registers.rbx = data.address();
    stage.passes(page.address())?;
    ensure_eq!(stage.vm.registers.rax, 0x1234_5679, "EAX");
    Ok(())
}

/// Task switches always exit. The TSS descriptor is at 40H of a GDT of L2's own.
fn task_switch(ctx: &mut Ctx<'_>, bytes: &[u8], length: u64, source: u64) -> Verdict {
    const NT: u64 = 1 << 14;
    const IRET: u64 = 1;
    const GATE: u64 = 3;
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Pae)?;
    let (table, task, gates) = (ctx.arena.page(), ctx.arena.page(), ctx.arena.page());
    for (number, bits) in
        [(1, 0x00CF_9B00_0000_FFFF), (2, 0x00CF_9300_0000_FFFF), (3, 0x00CF_9B00_0000_FFFF)]
    {
        table.write(number, bits);
    }
    // A 32-bit TSS: available, but busy for IRET, which goes back to it.
    let kind = if source == IRET { 0x8B } else { 0x89 };
    let base = task.address();
    let bits = 0x67 | (base & 0xFF_FFFF) << 16 | kind << 40 | (base >> 24 & 0xFF) << 56;
    table.write(8, bits);
    vmcs::write(Field::GUEST_GDTR_BASE, table.address());
    vmcs::write(Field::GUEST_GDTR_LIMIT, 0x47);
    // The current task's link leads to it.
    let current = ctx.arena.page();
    current.write(0, 0x40);
    vmcs::write(Field::GUEST_TR_BASE, current.address());
    if source == IRET {
        vmcs::write(Field::GUEST_RFLAGS, 2 | NT);
    }
    // A task gate.
    gates.write(0x30, 0x0040 << 16 | 0xE5 << 40);
    vmcs::write(Field::GUEST_IDTR_BASE, gates.address());
    vmcs::write(Field::GUEST_IDTR_LIMIT, 0x7FF);
    let page = code(ctx, bytes);
    vmcs::write(Field::GUEST_RIP, page.address());
    let exit: Exit = vm.run().exit()?;
    ensure_eq!(exit.reason, ExitReason::TASK_SWITCH, "exit reason");
    ensure_eq!(exit.qualification, source << 30 | 0x40, "exit qualification");
    ensure_eq!((exit.rip, exit.length), (page.address(), length), "RIP, instruction length");
    let vectoring = vmcs::read(Field::IDT_VECTORING_INFO);
    if source == GATE {
        ensure_eq!(vectoring, 0x8000_0430, "IDT-vectoring information");
    } else {
        ensure_eq!(vectoring >> 31 & 1, 0, "IDT-vectoring information is valid");
    }
    Ok(())
}
