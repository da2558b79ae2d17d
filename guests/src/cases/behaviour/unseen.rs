//! Answers: does what an L0 does on its own account stay unseen by L2?
//!
//! An L0 with shadow EPT has exits that L1 knows nothing of: the first access to a page that L1 has
//! mapped, VMFUNC where it is emulated, MSRs that it stands in for. Each of these cases puts L2 in a
//! state that such an exit could spoil. On the bare machine none of these exits exist.

use vmx_defs::{ExitReason, Field, L2Gpa, PinCtls, ProcCtls, ProcCtls2, event::vector, msr};
use x86_64::registers::control::Cr2;

use super::{Control, Stage};
use crate::{
    ensure, ensure_eq, gdt, l2_code,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        self, Mode, Outcome, Vm, Vmx,
        ept::Slot,
        paging::{USER_RW, WINDOW},
        rdmsr,
        snippet::Idt,
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "unseen.fill.injected_exception", run: |ctx| injected(ctx, 0x8000_0B0D, 0) },
    Case { name: "unseen.fill.injected_interrupt", run: |ctx| injected(ctx, 0x8000_0041, 0) },
    Case { name: "unseen.fill.injected_nmi", run: |ctx| injected(ctx, 0x8000_0202, 0) },
    Case { name: "unseen.fill.injected_int_n", run: |ctx| injected(ctx, 0x8000_0480, 2) },
    Case { name: "unseen.fill.injected_int3", run: |ctx| injected(ctx, 0x8000_0603, 1) },
    Case { name: "unseen.fill.injected_int1", run: |ctx| injected(ctx, 0x8000_0501, 1) },
    Case { name: "unseen.fill.own_ud", run: |ctx| own(ctx, ud2(), vector::UD, 0) },
    Case { name: "unseen.fill.own_gp", run: |ctx| own(ctx, load(), vector::GP, 0) },
    Case { name: "unseen.fill.own_int_n", run: |ctx| own(ctx, int_80(), 0x80, 2) },
    Case { name: "unseen.fill.own_int3", run: |ctx| own(ctx, int3(), 3, 1) },
    Case { name: "unseen.fill.own_page_fault", run: own_page_fault },
    Case { name: "unseen.fill.virtual_nmi_iret", run: nmi_iret },
    Case { name: "unseen.fill.string_move", run: string_move },
    Case { name: "unseen.fill.across_pages", run: across_pages },
    Case { name: "unseen.fill.locked", run: locked },
    Case { name: "unseen.fill.page_walk", run: page_walk },
    Case { name: "unseen.fill.registers", run: registers },
    Case { name: "unseen.fill.xmm", run: xmm },
    Case { name: "unseen.fill.single_step", run: fill_single_step },
    Case { name: "unseen.fill.single_step.reflected", run: reflected_single_step },
    Case { name: "unseen.fill.interrupt_window", run: fill_window },
    Case { name: "unseen.vmfunc.single_step", run: vmfunc_single_step },
    Case { name: "unseen.vmfunc.ends_sti_blocking", run: vmfunc_sti },
    Case { name: "unseen.vmfunc.registers", run: vmfunc_registers },
    Case { name: "unseen.msr.vmx_capabilities", run: vmx_msrs },
    Case { name: "unseen.msr.apic_base_and_feature_control", run: other_msrs },
    Case { name: "unseen.exit_information", run: exit_information },
    Case { name: "unseen.no_ept.4level", run: |ctx| no_ept(ctx, Mode::Long) },
    Case { name: "unseen.no_ept.pae", run: |ctx| no_ept(ctx, Mode::Pae) },
    Case { name: "unseen.no_ept.pdptes_loaded_at_entry", run: no_ept_pdptes },
    Case { name: "unseen.no_ept.bad_pdptes", run: no_ept_bad_pdptes },
    Case { name: "unseen.no_ept.vpid", run: no_ept_vpid },
];

l2_code! {
    nothing: "";
    ud2: "ud2";
    int3: "int3";
    int_80: "int 0x80";
    load: "mov rax, [rbx]";
    iret: "iretq";
    movs: "rep movsb";
    store_across: "mov [rbx], rax";
    lock_add: "lock add [rbx], rax", "lock cmpxchg [rbx + 8], rcx";
    // Everything but RSP changes, then memory, then all of it is compared.
    keep:
        "mov cr2, rax",
        "mov dr0, rax",
        "stc", "std",
        "mov rdx, [rbx]",
        "pushfq", "pop r8", "cld",
        "mov r9, cr2",
        "mov r10, dr0";
    keep_xmm:
        "movups xmm0, [rdi]",
        "movups xmm7, [rdi + 16]",
        "movups xmm15, [rdi + 32]",
        "mov rdx, [rbx]",
        "movups [rdi + 64], xmm0",
        "movups [rdi + 80], xmm7",
        "movups [rdi + 96], xmm15";
    vmfunc: "vmfunc", "nop", "nop";
    load_nops: "mov rax, [rbx]", "nop", "nop";
    sti_vmfunc: "sti", "vmfunc", "nop", "nop";
    sti_load: "sti", "mov rax, [rbx]", "nop", "nop";
    read_msr: "rdmsr", "shl rdx, 32", "or rax, rdx";
    wrmsr: "wrmsr";
    cpuid: "cpuid";
}

const NOT_CANONICAL: u64 = 0x4000_0000_0000_0000;
const IF: u64 = 1 << 9;
const TF: u64 = 1 << 8;

/// Pages that L1 has mapped and L2 has never touched, each with EPT tables of its own, so that each
/// is a new thing to an L0. They are the window's linear pages from 16 on.
struct Fresh {
    next: u64,
}

impl Fresh {
    fn new() -> Self {
        Self { next: 0 }
    }

    /// Shows `page` to L2 at a linear address of its own.
    fn show(&mut self, ctx: &mut Ctx<'_>, vm: &Vm, page: Page) -> u64 {
        self.next += 1;
        // Each in a 2-MiB range of its own.
        let gpa = WINDOW + self.next * 0x20_0000;
        vm.map(ctx, L2Gpa::new(gpa), page);
        let number = 16 + self.next;
        vm.paging.window.write(number as usize, gpa | USER_RW);
        WINDOW + number * 0x1000
    }
}

/// L2 whose stack, IDT and handlers are fresh pages.
struct Delivery {
    stage: Stage,
    stack: Page,
    rsp: u64,
    handlers: u64,
}

fn delivery(ctx: &mut Ctx<'_>) -> Result<Delivery, Stop> {
    let stage = Stage::new(ctx)?;
    let mut fresh = Fresh::new();
    let idt = Idt::new(ctx.arena);
    let handlers = Page::at(idt.handler(0) & !0xFFF);
    let stack = ctx.arena.page();
    let rsp = fresh.show(ctx, &stage.vm, stack) + 0x800;
    let gates = fresh.show(ctx, &stage.vm, idt.gates());
    let code = fresh.show(ctx, &stage.vm, handlers);
    // The gates lead to where L2 sees the handlers.
    for number in 0..256 {
        let target = code + number * 16;
        let word = idt.gates().read(number as usize * 2);
        let address = (target & 0xFFFF) | (target >> 16 & 0xFFFF) << 48;
        idt.gates().write(number as usize * 2, word & !0xFFFF_0000_0000_FFFF | address);
        idt.gates().write(number as usize * 2 + 1, target >> 32);
    }
    vmcs::write(Field::GUEST_RSP, rsp);
    vmcs::write(Field::GUEST_IDTR_BASE, gates);
    vmcs::write(Field::GUEST_IDTR_LIMIT, 0xFFF);
    vmcs::write(Field::EXCEPTION_BITMAP, 0);
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    Ok(Delivery { stage, stack, rsp, handlers: code })
}

/// L2 must be in the handler, with one frame on its stack.
fn delivered(d: &Delivery, vector: u8, error: Option<u64>, rip: u64) -> Verdict {
    let exit = vmx::Exit::read();
    ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
    // One NOP before the handler's VMCALL.
    ensure_eq!(exit.rip, d.handlers + u64::from(vector) * 16 + 1, "RIP: the handler");
    let words = 5 + u64::from(error.is_some());
    ensure_eq!(vmcs::read(Field::GUEST_RSP), d.rsp - words * 8, "RSP: one frame");
    let at = 0x800 / 8 - words as usize;
    if let Some(error) = error {
        ensure_eq!(d.stack.read(at), error, "error code in the frame");
    }
    let at = 0x800 / 8 - 5;
    let found = [d.stack.read(at), d.stack.read(at + 1), d.stack.read(at + 3)];
    ensure_eq!(found, [rip, gdt::CODE64.into(), d.rsp], "RIP, CS and RSP in the frame");
    ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO) >> 31 & 1, 0, "IDT-vectoring");
    Ok(())
}

fn injected(ctx: &mut Ctx<'_>, info: u64, length: u64) -> Verdict {
    let mut d = delivery(ctx)?;
    let error = (info & 1 << 11 != 0).then_some(0x1234);
    vmcs::write(Field::ENTRY_INTR_INFO, info);
    vmcs::write(Field::ENTRY_EXCEPTION_ERROR, error.unwrap_or(0));
    vmcs::write(Field::ENTRY_INSTRUCTION_LEN, length);
    d.stage.exit_from(nothing())?;
    delivered(&d, info as u8, error, nothing() + length)
}

fn own(ctx: &mut Ctx<'_>, code: u64, vector: u8, length: u64) -> Verdict {
    let mut d = delivery(ctx)?;
    d.stage.vm.registers.rbx = NOT_CANONICAL;
    d.stage.exit_from(code)?;
    delivered(&d, vector, (vector == 13).then_some(0), code + length)
}

/// A page fault sets CR2 once; the delivery that follows leaves it.
fn own_page_fault(ctx: &mut Ctx<'_>) -> Verdict {
    const UNMAPPED: u64 = 0x8000_0000;
    let mut d = delivery(ctx)?;
    d.stage.vm.registers.rbx = UNMAPPED;
    d.stage.exit_from(load())?;
    ensure_eq!(Cr2::read_raw(), UNMAPPED, "CR2");
    delivered(&d, vector::PF, Some(0), load())
}

/// An IRET that ends virtual-NMI blocking and reads its frame from a fresh page.
fn nmi_iret(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Pin(PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS))?;
    let stack = ctx.arena.page();
    let rsp = Fresh::new().show(ctx, &stage.vm, stack) + 0x800;
    for (word, value) in
        [nothing(), gdt::CODE64.into(), 2, rsp, gdt::DATA.into()].into_iter().enumerate()
    {
        stack.write(0x100 + word, value);
    }
    vmcs::write(Field::GUEST_RSP, rsp);
    vmcs::write(Field::GUEST_INTERRUPTIBILITY, 8);
    let exit = stage.exit_from(iret())?;
    ensure_eq!((exit.reason, exit.rip), (ExitReason::VMCALL, nothing()), "after IRET");
    ensure_eq!(vmcs::read(Field::GUEST_INTERRUPTIBILITY) & 8, 0, "virtual-NMI blocking");
    Ok(())
}

fn string_move(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let mut fresh = Fresh::new();
    let from = [ctx.arena.page(), ctx.arena.page()];
    let to = [ctx.arena.page(), ctx.arena.page()];
    for word in 0..512 {
        from[0].write(word, word as u64);
        from[1].write(word, !(word as u64));
    }
    let source = fresh.show(ctx, &stage.vm, from[0]);
    fresh.show(ctx, &stage.vm, from[1]);
    let target = fresh.show(ctx, &stage.vm, to[0]);
    fresh.show(ctx, &stage.vm, to[1]);
    let registers = &mut stage.vm.registers;
    (registers.rsi, registers.rdi, registers.rcx) = (source, target, 0x2000);
    stage.passes(movs())?;
    for word in 0..512 {
        let found = [to[0].read(word), to[1].read(word)];
        ensure_eq!(found, [word as u64, !(word as u64)], "words {word} of the copy");
    }
    ensure_eq!(stage.vm.registers.rcx, 0, "RCX");
    Ok(())
}

/// A write that lies in two pages, the second of which is fresh: all of it or nothing.
fn across_pages(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let mut fresh = Fresh::new();
    let pages = [ctx.arena.page(), ctx.arena.page()];
    fresh.show(ctx, &stage.vm, pages[0]);
    let second = fresh.show(ctx, &stage.vm, pages[1]);
    stage.vm.registers.rbx = second - 4;
    stage.vm.registers.rax = 0x1122_3344_5566_7788;
    stage.passes(store_across())?;
    let found = (pages[0].read32(1023), pages[1].read32(0));
    ensure_eq!(found, (0x5566_7788, 0x1122_3344), "both halves");
    // The second one not mapped: an EPT violation there, and nothing written to the first.
    let Slot { table, index } = stage.vm.ept.slot(ctx.arena, L2Gpa::new(WINDOW + 2 * 0x20_0000), 1);
    table.write(index, 0);
    vmx::invept_single(vmcs::read(Field::EPT_POINTER))?;
    stage.vm.registers.rax = 0;
    let exit = stage.exit_from(store_across())?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa, WINDOW + 2 * 0x20_0000, "guest-physical address");
    ensure_eq!(pages[0].read32(1023), 0x5566_7788, "the first page");
    Ok(())
}

fn locked(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let page = ctx.arena.page();
    page.write(0, 0x100);
    page.write(1, 0x23);
    stage.vm.registers.rbx = Fresh::new().show(ctx, &stage.vm, page);
    stage.vm.registers.rax = 0x23;
    stage.vm.registers.rcx = 0x77;
    stage.passes(lock_add())?;
    ensure_eq!((page.read(0), page.read(1)), (0x123, 0x77), "sum, and what was exchanged");
    Ok(())
}

/// L2's own page tables are fresh pages at each level.
fn page_walk(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let tables = [(); 4].map(|()| ctx.arena.page());
    let page = ctx.arena.page();
    page.write(0, 0x600D);
    // Guest-physical pages in a GiB of their own each.
    let gpa = |number: u64| (4 + number) << 30 | 0x5000;
    for (number, table) in tables.into_iter().enumerate() {
        stage.vm.map(ctx, L2Gpa::new(gpa(number as u64)), table);
        table.write(0, gpa(number as u64 + 1) | USER_RW);
    }
    stage.vm.map(ctx, L2Gpa::new(gpa(4)), page);
    // The first entry of the PML4 table is L2's own; the second one leads to these.
    tables[0].write(0, stage.vm.paging.root.read(0));
    tables[0].write(1, gpa(1) | USER_RW);
    vmcs::write(Field::GUEST_CR3, gpa(0));
    stage.vm.registers.rbx = 1 << 39;
    stage.passes(load())?;
    ensure_eq!(stage.vm.registers.rax, 0x600D, "what L2 reads");
    let marked = tables.into_iter().skip(1).all(|table| table.read(0) & 1 << 5 != 0);
    ensure!(marked, "accessed flags in L2's tables");
    Ok(())
}

fn registers(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let page = ctx.arena.page();
    page.write(0, 0x600D);
    stage.vm.registers.rbx = Fresh::new().show(ctx, &stage.vm, page);
    stage.vm.registers.rax = 0x1234_5678_0000;
    stage.vm.registers.rsi = 0x5111;
    stage.vm.registers.rdi = 0x5222;
    stage.vm.registers.rbp = 0x5333;
    stage.vm.registers.r8[7] = 0x5444;
    stage.passes(keep())?;
    let r = &stage.vm.registers;
    ensure_eq!(r.rdx, 0x600D, "what L2 reads");
    ensure_eq!((r.rax, r.rsi, r.rdi, r.rbp), (0x1234_5678_0000, 0x5111, 0x5222, 0x5333), "regs");
    ensure_eq!(r.r8[7], 0x5444, "R15");
    ensure_eq!(r.r8[0] & 0x401, 0x401, "CF and DF");
    ensure_eq!((r.r8[1], r.r8[2]), (r.rax, r.rax), "CR2 and DR0");
    Ok(())
}

fn xmm(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let (values, page) = (ctx.arena.page(), ctx.arena.page());
    for word in 0..6 {
        values.write(word, 0x1111_2222_3333_4444 * (word as u64 + 1));
    }
    stage.vm.registers.rdi = values.address();
    stage.vm.registers.rbx = Fresh::new().show(ctx, &stage.vm, page);
    stage.passes(keep_xmm())?;
    for word in 0..6 {
        ensure_eq!(values.read(word + 8), values.read(word), "half {word} of the XMM registers");
    }
    Ok(())
}

fn expect_step(stage: &mut Stage, code: u64, after: u64) -> Verdict {
    vmcs::write(Field::GUEST_RFLAGS, 2 | TF);
    let exit = stage.exit_from(code)?;
    ensure_eq!(exit.exception(), Some(vector::DB), "vector (exit reason {:?})", exit.reason);
    ensure_eq!(exit.rip, code + after, "RIP: after one instruction");
    ensure_eq!(exit.qualification, 1 << 14, "exit qualification: BS");
    Ok(())
}

/// A trap after the instruction whose access was the first.
fn fill_single_step(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let page = ctx.arena.page();
    stage.vm.registers.rbx = Fresh::new().show(ctx, &stage.vm, page);
    expect_step(&mut stage, load_nops(), 3)
}

/// The same with the violation reflected to L1, which maps the page: as for any fault, no trap is
/// pending, because the instruction has not been executed.
fn reflected_single_step(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.vm.registers.rbx = WINDOW;
    vmcs::write(Field::GUEST_RFLAGS, 2 | TF);
    let exit = stage.exit_from(load_nops())?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(vmcs::read(Field::GUEST_PENDING_DEBUG), 0, "pending debug exceptions");
    let page = ctx.arena.page();
    stage.vm.map(ctx, L2Gpa::new(WINDOW), page);
    expect_step(&mut stage, load_nops(), 3)
}

/// Blocking by STI lasts for the instruction whose access was the first, and no longer.
fn fill_window(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::INTERRUPT_WINDOW_EXITING))?;
    let page = ctx.arena.page();
    stage.vm.registers.rbx = Fresh::new().show(ctx, &stage.vm, page);
    let exit = stage.exit_from(sti_load())?;
    ensure_eq!(exit.reason, ExitReason::INTERRUPT_WINDOW, "exit reason");
    ensure_eq!(exit.rip, sti_load() + 4, "RIP: after STI and the load");
    Ok(())
}

/// L2 that may switch to its own EPTP by VMFUNC.
fn with_vmfunc(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let mut stage = Stage::new(ctx)?;
    if !stage.vmx.caps.eptp_switching() {
        skip!("EPTP switching not offered");
    }
    let list = ctx.arena.page();
    list.write(0, vmcs::read(Field::EPT_POINTER));
    stage.vm.enable_eptp_switching(&stage.vmx, list)?;
    stage.vm.registers.rax = 0;
    stage.vm.registers.rcx = 0;
    Ok(stage)
}

fn vmfunc_single_step(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_vmfunc(ctx)?;
    expect_step(&mut stage, vmfunc(), 3)
}

fn vmfunc_sti(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_vmfunc(ctx)?;
    stage.set(Control::Proc(ProcCtls::INTERRUPT_WINDOW_EXITING))?;
    let exit = stage.exit_from(sti_vmfunc())?;
    ensure_eq!(exit.reason, ExitReason::INTERRUPT_WINDOW, "exit reason");
    ensure_eq!(exit.rip, sti_vmfunc() + 4, "RIP: after STI and VMFUNC");
    Ok(())
}

/// VMFUNC changes no register and no flag.
fn vmfunc_registers(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_vmfunc(ctx)?;
    let registers = &mut stage.vm.registers;
    registers.rdx = 0x5111;
    registers.rbx = 0x5222;
    registers.r8 = [0x5333; 8];
    vmcs::write(Field::GUEST_RFLAGS, 2 | 0x8D5);
    stage.passes(vmfunc())?;
    let r = &stage.vm.registers;
    ensure_eq!((r.rax, r.rcx, r.rdx, r.rbx), (0, 0, 0x5111, 0x5222), "registers");
    ensure_eq!(r.r8, [0x5333; 8], "R8 to R15");
    ensure_eq!(vmcs::read(Field::GUEST_RFLAGS), 2 | 0x8D5, "RFLAGS");
    Ok(())
}

/// L2 with MSR bitmaps that let every MSR through.
fn open(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::MSR_BITMAPS))?;
    vmcs::write(Field::MSR_BITMAP, ctx.arena.page().address());
    Ok(stage)
}

fn same_msr(stage: &mut Stage, index: u32) -> Verdict {
    stage.vm.registers.rcx = index.into();
    stage.passes(read_msr())?;
    ensure_eq!(stage.vm.registers.rax, rdmsr(index), "MSR {index:#x} as L2 reads it");
    Ok(())
}

/// What L1 lets through, L2 reads as L1 does, and may write as little.
fn vmx_msrs(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    for index in msr::VMX_BASIC..=msr::VMX_PROCBASED_CTLS2 {
        same_msr(&mut stage, index)?;
        stage.vm.registers.rax = 0;
        stage.vm.registers.rdx = 0;
        stage.raises(wrmsr(), vector::GP)?;
        ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code, MSR {index:#x}");
    }
    Ok(())
}

fn other_msrs(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    for index in [msr::FEATURE_CONTROL, msr::APIC_BASE, msr::PAT] {
        same_msr(&mut stage, index)?;
    }
    let value = rdmsr(msr::FEATURE_CONTROL);
    stage.vm.registers.rcx = msr::FEATURE_CONTROL.into();
    stage.vm.registers.rax = value ^ 4;
    stage.vm.registers.rdx = 0;
    stage.raises(wrmsr(), vector::GP)?;
    // What is there may be written to IA32_APIC_BASE.
    let value = rdmsr(msr::APIC_BASE);
    stage.vm.registers.rcx = msr::APIC_BASE.into();
    stage.vm.registers.rax = value;
    stage.vm.registers.rdx = value >> 32;
    stage.passes(wrmsr())?;
    ensure_eq!(rdmsr(msr::APIC_BASE), value, "IA32_APIC_BASE");
    Ok(())
}

/// Information of an exit before does not stay: the valid bits are clear, the qualification 0.
fn exit_information(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let clean = |what: &str| {
        let interruption = vmcs::read(Field::EXIT_INTR_INFO) >> 31 & 1;
        let vectoring = vmcs::read(Field::IDT_VECTORING_INFO) >> 31 & 1;
        ensure_eq!((interruption, vectoring), (0, 0), "valid bits after {what}");
        ensure_eq!(vmcs::read(Field::EXIT_QUALIFICATION), 0, "qualification after {what}");
        Ok::<(), Stop>(())
    };
    for _ in 0..2 {
        // An exception during delivery of another, then a plain exit.
        vmcs::write(Field::ENTRY_INTR_INFO, 0x8000_0306);
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.exception(), Some(vector::GP), "vector");
        ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO), 0x8000_0306, "IDT-vectoring");
        stage.intercepted(cpuid(), ExitReason::CPUID, 2)?;
        clean("CPUID")?;
        // An EPT violation, then a plain exit.
        stage.vm.registers.rbx = WINDOW;
        let exit = stage.exit_from(load())?;
        ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
        ensure_eq!(exit.interruption.valid(), false, "interruption information");
        stage.passes(nothing())?;
        clean("VMCALL")?;
    }
    Ok(())
}

fn without_ept(ctx: &mut Ctx<'_>, mode: Mode) -> Result<(Vmx, Vm), Stop> {
    let vmx = Vmx::on(ctx)?;
    let vm = Vm::new(ctx, &vmx, mode)?;
    vmcs::change(Field::PROC_CTLS2, 0, ProcCtls2::EPT.bits().into());
    // What the EPT would say does not count.
    vmcs::write(Field::EPT_POINTER, !0);
    if !vmx.caps.basic.true_controls() {
        skip!("CR3-load exiting can't be off");
    }
    Ok((vmx, vm))
}

fn no_ept(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let (_, mut vm) = without_ept(ctx, mode)?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    for round in 0..4_u64 {
        let page = pages[round as usize % 2];
        page.write(0, 0x700 + round);
        // No VPID either: each entry drops what was cached.
        vm.paging.window.write(0, page.address() | USER_RW);
        ensure_eq!(vm.load(WINDOW)?, 0x700 + round, "what L2 reads in round {round}");
        vm.store(WINDOW + 8, round)?;
        ensure_eq!(page.read(1) as u32, round as u32, "what L2 wrote in round {round}");
    }
    // L2's own page faults are not L1's.
    let exit = match vm.load(0x8000_0000) {
        Err(outcome) => outcome.exit()?,
        Ok(_) => crate::fail!("L2 reads what nothing maps"),
    };
    ensure_eq!(exit.exception(), Some(vector::PF), "vector");
    // MOV to CR3 and INVLPG work.
    let cr3 = vm.paging.cr3;
    vm.load_cr3(cr3)?;
    vm.registers.rbx = WINDOW;
    vm.exec(vmx::Op::Invlpg)?;
    ensure_eq!(vm.load(WINDOW)?, 0x703, "what L2 reads at last");
    Ok(())
}

/// Without EPT, VM entry loads the PDPTEs from memory, whatever the fields have.
fn no_ept_pdptes(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = without_ept(ctx, Mode::Pae)?;
    let (directory, table, page) = (ctx.arena.page(), ctx.arena.page(), ctx.arena.page());
    page.write(0, 0x600D);
    table.write(0, page.address() | USER_RW);
    directory.write(0, table.address() | USER_RW);
    let own = vm.paging.root.read(1);
    let other = ctx.arena.page();
    other.write(0, 0xBAD);
    vm.paging.window.write(0, other.address() | USER_RW);
    for field in vmx::vm::PDPTES {
        vmcs::write(field, !0);
    }
    for round in 0..4 {
        let (entry, expected) =
            if round % 2 == 0 { (own, 0xBAD) } else { (directory.address() | 1, 0x600D) };
        vm.paging.root.write(1, entry);
        ensure_eq!(vm.load(WINDOW)?, expected, "what L2 reads in round {round}");
    }
    Ok(())
}

fn no_ept_bad_pdptes(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = without_ept(ctx, Mode::Pae)?;
    let own = vm.paging.root.read(1);
    for bad in [own | 2, own | 1 << 5, 1 | 1 << 63] {
        vm.paging.root.write(1, bad);
        let exit = match vm.run() {
            Outcome::Exit(exit) => exit,
            other => return Err(other.into()),
        };
        ensure_eq!(exit.reason.bits(), 1 << 31 | 33, "exit reason with PDPTE {bad:#x}");
        ensure_eq!(exit.qualification, 2, "exit qualification: the PDPTEs");
    }
    // Not present, the other bits do not matter.
    vm.paging.root.write(3, !1);
    vm.paging.root.write(1, own);
    vm.exec(vmx::Op::Nothing)?;
    Ok(())
}

fn no_ept_vpid(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, mut vm) = without_ept(ctx, Mode::Long)?;
    vm.enable_vpid(&vmx, 3)?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    for (number, page) in pages.into_iter().enumerate() {
        page.write(0, number as u64);
        vm.paging.window.write(number, page.address() | USER_RW);
    }
    for round in 0..4_u64 {
        ensure_eq!(vm.load(WINDOW + (round % 2) * 0x1000)?, round % 2, "what L2 reads");
    }
    Ok(())
}
