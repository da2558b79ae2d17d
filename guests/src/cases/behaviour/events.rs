//! Answers: when do interrupts, NMIs, windows and the VMX-preemption timer exit from L2, and what
//! does the time-stamp counter show there?
//!
//! SDM Vol. 3C, "Pin-Based VM-Execution Controls", "Other Causes of VM Exits", "Event Blocking",
//! "VMX-Preemption Timer", "Interrupt-Window Exiting and Virtual-Interrupt Delivery",
//! "NMI-Window Exiting", "Treatment of NMIs" and "Time-Stamp Counter Offsetting and Scaling".

use vmx_defs::{
    ExitCtls, ExitReason, Field, PinCtls, ProcCtls, ProcCtls2,
    event::{Interruptibility, activity},
};

use super::{Control, Stage};
use crate::{
    ensure, ensure_eq, l2_code,
    local_apic::{ICR, LocalApic, NMI_COMMAND, SEEN_AT, unblock_nmis},
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Exit, snippet::Idt, vm::instructions, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.external_interrupt.exits", run: interrupt_exits },
    Case { name: "behaviour.external_interrupt.acknowledged", run: interrupt_acknowledged },
    Case { name: "behaviour.external_interrupt.not_exiting", run: interrupt_delivered },
    Case { name: "behaviour.external_interrupt.if_clear", run: interrupt_if_clear },
    Case { name: "behaviour.external_interrupt.in_loop", run: interrupt_in_loop },
    Case {
        name: "behaviour.external_interrupt.wakes_hlt",
        run: |ctx| interrupt_wakes_hlt(ctx, false),
    },
    Case {
        name: "behaviour.external_interrupt.wakes_hlt.saved_activity",
        run: |ctx| interrupt_wakes_hlt(ctx, true),
    },
    Case { name: "behaviour.external_interrupt.blocked_by_sti", run: interrupt_sti },
    Case { name: "behaviour.nmi.exits", run: |ctx| nmi_exits(ctx, false) },
    Case { name: "behaviour.nmi.exits.saved_blocking", run: |ctx| nmi_exits(ctx, true) },
    Case { name: "behaviour.nmi.not_exiting", run: nmi_delivered },
    Case { name: "behaviour.nmi.virtual_blocking", run: virtual_nmi },
    Case { name: "behaviour.nmi_window.open", run: nmi_window_open },
    Case { name: "behaviour.nmi_window.after_iret", run: nmi_window_iret },
    Case { name: "behaviour.interrupt_window.open", run: window_open },
    Case { name: "behaviour.interrupt_window.opens", run: window_opens },
    Case { name: "behaviour.interrupt_window.mov_ss", run: window_mov_ss },
    Case { name: "behaviour.preemption_timer.zero", run: timer_zero },
    Case { name: "behaviour.preemption_timer.counts", run: timer_counts },
    Case { name: "behaviour.preemption_timer.save", run: timer_save },
    Case { name: "behaviour.preemption_timer.hlt", run: timer_hlt },
    Case { name: "behaviour.activity.hlt.injection_wakes", run: hlt_injection },
    Case { name: "behaviour.activity.hlt.saved", run: hlt_saved },
    Case { name: "behaviour.activity.shutdown.saved", run: shutdown_saved },
    Case { name: "behaviour.activity.shutdown.nmi_wakes", run: shutdown_nmi },
    Case { name: "behaviour.tsc_offset", run: tsc_offset },
    Case { name: "behaviour.tsc_offset.msr", run: tsc_offset_msr },
    Case { name: "behaviour.tsc_scaling", run: tsc_scaling },
];

l2_code! {
    nothing: "";
    wait: "2: dec rcx", "jnz 2b";
    sti_hlt: "sti", "hlt";
    hlt: "hlt";
    sti_nops: "sti", "nop", "nop", "nop";
    mov_ss_nops: "mov ss, ecx", "nop", "nop", "nop";
    // EAX to [RBX]: an NMI comes at the latest after a few instructions.
    send: "mov [rbx], eax", "mov ecx, 1000", "2: dec ecx", "jnz 2b";
    rdtsc: "rdtsc";
    rdtscp: "rdtscp";
    rdmsr: "rdmsr";
}

const IF: u64 = 1 << 9;
/// An interrupt vector that no exception has.
const VECTOR: u8 = 0x41;
/// How many times round [`wait`], so that a wrong processor ends the case, too.
const LONG: u64 = 20_000_000;

/// L2 with interrupts enabled and external-interrupt exiting.
fn with_interrupts(ctx: &mut Ctx<'_>) -> Result<(Stage, LocalApic), Stop> {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Pin(PinCtls::EXTERNAL_INTERRUPT_EXITING))?;
    stage.clear(Control::Exit(ExitCtls::ACK_INTERRUPT))?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    stage.vm.registers.rcx = 1000;
    Ok((stage, LocalApic::new()?))
}

/// Acknowledges the pending interrupt by an exit that does, and ends it.
fn drain(stage: &mut Stage, apic: LocalApic, vector: u8) -> Verdict {
    stage.set(Control::Exit(ExitCtls::ACK_INTERRUPT))?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    vmcs::write(Field::GUEST_INTERRUPTIBILITY, 0);
    stage.vm.registers.rcx = 1000;
    let exit = stage.exit_from(wait())?;
    ensure_eq!(exit.reason, ExitReason::EXTERNAL_INTERRUPT, "exit reason");
    ensure_eq!(
        u32::from(exit.interruption),
        1 << 31 | u32::from(vector),
        "VM-exit interruption information"
    );
    apic.end_of_interrupt();
    // Nothing more is pending.
    stage.vm.registers.rcx = 1000;
    stage.passes(wait())
}

fn interrupt_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, apic) = with_interrupts(ctx)?;
    apic.interrupt(VECTOR);
    for _ in 0..2 {
        let exit = stage.exit_from(wait())?;
        ensure_eq!(exit.reason, ExitReason::EXTERNAL_INTERRUPT, "exit reason");
        ensure_eq!(exit.rip, wait(), "RIP");
        ensure_eq!(exit.interruption.valid(), false, "interruption information is valid");
        ensure_eq!(exit.qualification, 0, "exit qualification");
    }
    drain(&mut stage, apic, VECTOR)
}

fn interrupt_acknowledged(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, apic) = with_interrupts(ctx)?;
    // The one of higher priority comes first.
    for vector in [VECTOR, 0xE3] {
        apic.interrupt(vector);
    }
    drain_two(&mut stage, apic)
}

fn drain_two(stage: &mut Stage, apic: LocalApic) -> Verdict {
    stage.set(Control::Exit(ExitCtls::ACK_INTERRUPT))?;
    let exit = stage.exit_from(wait())?;
    ensure_eq!(exit.reason, ExitReason::EXTERNAL_INTERRUPT, "exit reason");
    ensure_eq!(u32::from(exit.interruption), 0x8000_00E3, "interruption information");
    // The other one waits for the end of this one.
    stage.vm.registers.rcx = 1000;
    stage.passes(wait())?;
    apic.end_of_interrupt();
    drain(stage, apic, VECTOR)
}

fn interrupt_delivered(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.clear(Control::Pin(PinCtls::EXTERNAL_INTERRUPT_EXITING))?;
    let idt = Idt::new(ctx.arena);
    idt.install();
    let apic = LocalApic::new()?;
    apic.interrupt(VECTOR);
    // Not while IF is 0.
    stage.vm.registers.rcx = 1000;
    stage.passes(wait())?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    stage.vm.registers.rcx = 1000;
    let exit = stage.exit_from(wait())?;
    ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
    ensure_eq!(exit.rip, idt.handler(VECTOR), "RIP: the handler");
    apic.end_of_interrupt();
    let after = stage.vm.resume_after(&exit).exit()?;
    ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason after IRET");
    ensure!(after.rip != exit.rip, "still in the handler");
    Ok(())
}

/// With the control, RFLAGS.IF does not block.
fn interrupt_if_clear(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, apic) = with_interrupts(ctx)?;
    vmcs::write(Field::GUEST_RFLAGS, 2);
    apic.interrupt(VECTOR);
    stage.vm.registers.rcx = 1000;
    let exit = stage.exit_from(wait())?;
    drain(&mut stage, apic, VECTOR)?;
    ensure_eq!(exit.reason, ExitReason::EXTERNAL_INTERRUPT, "exit reason with IF clear");
    Ok(())
}

fn interrupt_in_loop(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, apic) = with_interrupts(ctx)?;
    stage.set(Control::Exit(ExitCtls::ACK_INTERRUPT))?;
    apic.start_timer(VECTOR, 1_000_000);
    stage.vm.registers.rcx = LONG;
    let exit = stage.exit_from(wait())?;
    ensure_eq!(exit.reason, ExitReason::EXTERNAL_INTERRUPT, "exit reason");
    ensure_eq!(exit.interruption.vector(), VECTOR, "vector");
    let left = stage.vm.registers.rcx;
    ensure!(left > 0 && left < LONG, "{left} rounds left");
    apic.end_of_interrupt();
    // L2 goes on where it was.
    let after = stage.vm.run().exit()?;
    ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason at the end of the loop");
    Ok(())
}

fn interrupt_wakes_hlt(ctx: &mut Ctx<'_>, saved: bool) -> Verdict {
    let (mut stage, apic) = with_interrupts(ctx)?;
    stage.clear(Control::Proc(ProcCtls::HLT_EXITING))?;
    stage.set(Control::Exit(ExitCtls::ACK_INTERRUPT))?;
    apic.start_timer(VECTOR, 1_000_000);
    let exit = stage.exit_from(sti_hlt())?;
    ensure_eq!(exit.reason, ExitReason::EXTERNAL_INTERRUPT, "exit reason");
    ensure_eq!(exit.rip, sti_hlt() + 2, "RIP: after HLT");
    apic.end_of_interrupt();
    if saved {
        // It becomes active only after the exit ("Architectural State Before a VM Exit").
        ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), activity::HLT.into(), "activity state");
    }
    // The activity state is L1's to change.
    vmcs::write(Field::GUEST_ACTIVITY, activity::ACTIVE.into());
    let after = stage.vm.run().exit()?;
    ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason after HLT");
    Ok(())
}

/// Blocking by STI does not keep an exit away for longer than one instruction.
fn interrupt_sti(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, apic) = with_interrupts(ctx)?;
    vmcs::write(Field::GUEST_INTERRUPTIBILITY, Interruptibility::STI.bits().into());
    apic.interrupt(VECTOR);
    let exit = stage.exit_from(sti_nops() + 1)?;
    ensure_eq!(exit.reason, ExitReason::EXTERNAL_INTERRUPT, "exit reason");
    ensure!(exit.rip <= sti_nops() + 2, "RIP {:#x}: too late", exit.rip);
    drain(&mut stage, apic, VECTOR)
}

/// L2 set up to send itself an NMI with [`send`].
fn with_nmi(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let mut stage = Stage::new(ctx)?;
    LocalApic::new()?.show(ctx, &stage.vm.ept);
    stage.vm.registers.rbx = SEEN_AT + ICR;
    stage.vm.registers.rax = NMI_COMMAND;
    Ok(stage)
}

fn nmi_exits(ctx: &mut Ctx<'_>, saved: bool) -> Verdict {
    let mut stage = with_nmi(ctx)?;
    stage.set(Control::Pin(PinCtls::NMI_EXITING))?;
    for _ in 0..3 {
        let exit = stage.exit_from(send())?;
        unblock_nmis();
        ensure_eq!(exit.reason, ExitReason::EXCEPTION_OR_NMI, "exit reason");
        ensure_eq!(u32::from(exit.interruption), 0x8000_0202, "interruption information");
        ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO) >> 31 & 1, 0, "IDT-vectoring");
        if saved {
            // NMIs are blocked only after the exit ("Architectural State Before a VM Exit").
            let blocking = vmcs::read(Field::GUEST_INTERRUPTIBILITY);
            ensure_eq!(blocking & 8, 0, "blocking by NMI in L2");
        }
        vmcs::write(Field::GUEST_INTERRUPTIBILITY, 0);
    }
    Ok(())
}

fn nmi_delivered(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_nmi(ctx)?;
    stage.clear(Control::Pin(PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS))?;
    let idt = Idt::new(ctx.arena);
    idt.install();
    let exit = stage.exit_from(send())?;
    let blocking = vmcs::read(Field::GUEST_INTERRUPTIBILITY);
    unblock_nmis();
    ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
    ensure_eq!(exit.rip, idt.handler(2), "RIP: the handler");
    ensure_eq!(blocking & 8, 8, "blocking by NMI in the handler");
    let after = stage.vm.resume_after(&exit).exit()?;
    ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason after IRET");
    let blocking = vmcs::read(Field::GUEST_INTERRUPTIBILITY);
    ensure_eq!(blocking & 8, 0, "blocking by NMI after IRET");
    Ok(())
}

/// L2 with virtual NMIs and the handlers of an IDT.
fn with_virtual_nmis(ctx: &mut Ctx<'_>) -> Result<(Stage, Idt), Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Pin(PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS))?;
    let idt = Idt::new(ctx.arena);
    idt.install();
    vmcs::write(Field::EXCEPTION_BITMAP, 0);
    Ok((stage, idt))
}

/// L1 injects an NMI; L2 stops in its handler.
fn inject_nmi(stage: &mut Stage, idt: &Idt) -> Result<Exit, Stop> {
    vmcs::write(Field::ENTRY_INTR_INFO, 0x8000_0202);
    let exit = stage.exit_from(nothing())?;
    ensure_eq!((exit.reason, exit.rip), (ExitReason::VMCALL, idt.handler(2)), "the handler");
    Ok(exit)
}

fn virtual_nmi(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_virtual_nmis(ctx)?;
    let exit = inject_nmi(&mut stage, &idt)?;
    let blocking = vmcs::read(Field::GUEST_INTERRUPTIBILITY);
    ensure_eq!(blocking & 8, 8, "virtual-NMI blocking in the handler");
    let after = stage.vm.resume_after(&exit).exit()?;
    ensure_eq!((after.reason, after.rip), (ExitReason::VMCALL, nothing()), "after IRET");
    let blocking = vmcs::read(Field::GUEST_INTERRUPTIBILITY);
    ensure_eq!(blocking & 8, 0, "virtual-NMI blocking after IRET");
    Ok(())
}

fn nmi_window_open(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, _) = with_virtual_nmis(ctx)?;
    stage.set(Control::Proc(ProcCtls::NMI_WINDOW_EXITING))?;
    for _ in 0..2 {
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.reason, ExitReason::NMI_WINDOW, "exit reason");
        ensure_eq!(exit.rip, nothing(), "RIP");
    }
    stage.clear(Control::Proc(ProcCtls::NMI_WINDOW_EXITING))?;
    stage.passes(nothing())
}

fn nmi_window_iret(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_virtual_nmis(ctx)?;
    let exit = inject_nmi(&mut stage, &idt)?;
    stage.set(Control::Proc(ProcCtls::NMI_WINDOW_EXITING))?;
    let after = stage.vm.resume_after(&exit).exit()?;
    ensure_eq!(after.reason, ExitReason::NMI_WINDOW, "exit reason");
    ensure_eq!(after.rip, nothing(), "RIP: what the NMI had interrupted");
    Ok(())
}

fn with_window(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::INTERRUPT_WINDOW_EXITING))?;
    Ok(stage)
}

fn window_open(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_window(ctx)?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    for _ in 0..2 {
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.reason, ExitReason::INTERRUPT_WINDOW, "exit reason");
        ensure_eq!((exit.rip, exit.qualification), (nothing(), 0), "RIP, qualification");
    }
    vmcs::write(Field::GUEST_RFLAGS, 2);
    stage.passes(nothing())
}

/// STI blocks for one more instruction; the window opens after that.
fn window_opens(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_window(ctx)?;
    let exit = stage.exit_from(sti_nops())?;
    ensure_eq!(exit.reason, ExitReason::INTERRUPT_WINDOW, "exit reason");
    ensure_eq!(exit.rip, sti_nops() + 2, "RIP: after STI and one instruction");
    // As does blocking by STI at VM entry.
    vmcs::write(Field::GUEST_INTERRUPTIBILITY, Interruptibility::STI.bits().into());
    let exit = stage.exit_from(sti_nops() + 1)?;
    ensure_eq!(exit.reason, ExitReason::INTERRUPT_WINDOW, "exit reason");
    ensure_eq!(exit.rip, sti_nops() + 2, "RIP: after one instruction");
    Ok(())
}

fn window_mov_ss(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_window(ctx)?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    vmcs::write(Field::GUEST_INTERRUPTIBILITY, Interruptibility::MOV_SS.bits().into());
    stage.vm.registers.rcx = crate::gdt::DATA.into();
    // Blocking by MOV SS at VM entry, and at once again by the first instruction.
    let exit = stage.exit_from(mov_ss_nops())?;
    ensure_eq!(exit.reason, ExitReason::INTERRUPT_WINDOW, "exit reason");
    let nops = exit.rip - mov_ss_nops();
    ensure!((2..=3).contains(&nops), "RIP: {nops} bytes further");
    Ok(())
}

fn with_timer(ctx: &mut Ctx<'_>, value: u64) -> Result<Stage, Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Pin(PinCtls::PREEMPTION_TIMER))?;
    vmcs::write(Field::PREEMPTION_TIMER, value);
    Ok(stage)
}

/// With the value 0, L2 executes nothing.
fn timer_zero(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_timer(ctx, 0)?;
    for _ in 0..2 {
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.reason, ExitReason::PREEMPTION_TIMER, "exit reason");
        ensure_eq!((exit.rip, exit.qualification), (nothing(), 0), "RIP, qualification");
    }
    Ok(())
}

fn timer_counts(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_timer(ctx, 1000)?;
    stage.vm.registers.rcx = LONG;
    let exit = stage.exit_from(wait())?;
    ensure_eq!(exit.reason, ExitReason::PREEMPTION_TIMER, "exit reason");
    let first = LONG - stage.vm.registers.rcx;
    ensure!(first < LONG, "L2 ran to the end");
    // It begins anew at each entry, and does not fire without the control.
    vmcs::write(Field::PREEMPTION_TIMER, 1_000_000);
    stage.vm.registers.rcx = LONG;
    stage.exit_from(wait())?;
    let second = LONG - stage.vm.registers.rcx;
    ensure!(second > first * 100, "{first} rounds in 1000 ticks, {second} in a million");
    stage.clear(Control::Pin(PinCtls::PREEMPTION_TIMER))?;
    vmcs::write(Field::PREEMPTION_TIMER, 0);
    stage.passes(nothing())
}

fn timer_save(ctx: &mut Ctx<'_>) -> Verdict {
    const START: u64 = 0x4000_0000;
    let mut stage = with_timer(ctx, START)?;
    let control = Control::Exit(ExitCtls::SAVE_PREEMPTION_TIMER);
    stage.clear(control)?;
    stage.vm.registers.rcx = 100_000;
    stage.passes(wait())?;
    ensure_eq!(vmcs::read(Field::PREEMPTION_TIMER), START, "the value, not saved");
    stage.set(control)?;
    stage.vm.registers.rcx = 100_000;
    stage.passes(wait())?;
    let left = vmcs::read(Field::PREEMPTION_TIMER);
    ensure!(left < START && left > 0, "{left:#x} saved of {START:#x}");
    // Zero is saved where the timer has expired.
    vmcs::write(Field::PREEMPTION_TIMER, 10);
    stage.vm.registers.rcx = LONG;
    let exit = stage.exit_from(wait())?;
    ensure_eq!(exit.reason, ExitReason::PREEMPTION_TIMER, "exit reason");
    ensure_eq!(vmcs::read(Field::PREEMPTION_TIMER), 0, "the value after it expired");
    Ok(())
}

fn timer_hlt(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_timer(ctx, 5000)?;
    stage.clear(Control::Proc(ProcCtls::HLT_EXITING))?;
    let exit = stage.exit_from(hlt())?;
    ensure_eq!(exit.reason, ExitReason::PREEMPTION_TIMER, "exit reason");
    ensure_eq!(exit.rip, hlt() + 1, "RIP: after HLT");
    ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), activity::HLT.into(), "activity state");
    Ok(())
}

fn need_hlt(stage: &Stage) -> Verdict {
    if !stage.vmx.caps.misc.activity_hlt() {
        skip!("no activity state HLT");
    }
    Ok(())
}

/// An injected event leaves the HLT state that L1 set.
fn hlt_injection(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_virtual_nmis(ctx)?;
    need_hlt(&stage)?;
    vmcs::write(Field::GUEST_ACTIVITY, activity::HLT.into());
    inject_nmi(&mut stage, &idt)?;
    ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), 0, "activity state in the handler");
    Ok(())
}

/// L2 entered in the HLT state executes nothing; an exit saves that state.
fn hlt_saved(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_timer(ctx, 5000)?;
    need_hlt(&stage)?;
    stage.clear(Control::Proc(ProcCtls::HLT_EXITING))?;
    for _ in 0..2 {
        vmcs::write(Field::GUEST_ACTIVITY, activity::HLT.into());
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.reason, ExitReason::PREEMPTION_TIMER, "exit reason");
        ensure_eq!(exit.rip, nothing(), "RIP");
        ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), activity::HLT.into(), "activity state");
    }
    vmcs::write(Field::GUEST_ACTIVITY, activity::ACTIVE.into());
    vmcs::write(Field::PREEMPTION_TIMER, 1 << 30);
    stage.passes(nothing())
}

fn need_shutdown(stage: &Stage) -> Verdict {
    if !stage.vmx.caps.misc.activity_shutdown() {
        skip!("no activity state shutdown");
    }
    Ok(())
}

/// In shutdown L2 executes nothing; the timer's exit saves that state.
fn shutdown_saved(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_timer(ctx, 5000)?;
    need_shutdown(&stage)?;
    vmcs::write(Field::GUEST_ACTIVITY, activity::SHUTDOWN.into());
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason, ExitReason::PREEMPTION_TIMER, "exit reason");
    ensure_eq!(exit.rip, nothing(), "RIP");
    let state = vmcs::read(Field::GUEST_ACTIVITY);
    ensure_eq!(state, activity::SHUTDOWN.into(), "activity state");
    vmcs::write(Field::GUEST_ACTIVITY, activity::ACTIVE.into());
    vmcs::write(Field::PREEMPTION_TIMER, 1 << 30);
    stage.passes(nothing())
}

fn shutdown_nmi(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_virtual_nmis(ctx)?;
    need_shutdown(&stage)?;
    vmcs::write(Field::GUEST_ACTIVITY, activity::SHUTDOWN.into());
    inject_nmi(&mut stage, &idt)?;
    ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), 0, "activity state in the handler");
    Ok(())
}

/// What L2 reads of the time-stamp counter lies between L1's readings before and after it, once
/// these went through `convert`.
fn between(stage: &mut Stage, code: u64, convert: impl Fn(u64) -> u64) -> Verdict {
    for _ in 0..3 {
        let before = instructions();
        stage.vm.registers.rcx = 0x10;
        stage.passes(code)?;
        let after = instructions();
        let registers = &stage.vm.registers;
        let read = registers.rdx << 32 | registers.rax & 0xFFFF_FFFF;
        // Modulo 2^64.
        let (length, place) =
            (convert(after).wrapping_sub(convert(before)), read.wrapping_sub(convert(before)));
        ensure!(place <= length, "L2 reads {read:#x}, L1 {before:#x} and {after:#x}");
    }
    Ok(())
}

fn tsc_offset(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.clear(Control::Proc(ProcCtls::RDTSC_EXITING))?;
    let control = Control::Proc(ProcCtls::TSC_OFFSETTING);
    for offset in [0, 0x1234_5678_9ABC, 0x8000_0000_0000_0000, !0xFFFF] {
        vmcs::write(Field::TSC_OFFSET, offset);
        stage.clear(control)?;
        between(&mut stage, rdtsc(), |tsc| tsc)?;
        stage.set(control)?;
        between(&mut stage, rdtsc(), |tsc| tsc.wrapping_add(offset))?;
    }
    stage.set(Control::Proc2(ProcCtls2::RDTSCP))?;
    between(&mut stage, rdtscp(), |tsc| tsc.wrapping_add(!0xFFFF))
}

/// RDMSR of IA32_TIME_STAMP_COUNTER shows the offset, too.
fn tsc_offset_msr(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::MSR_BITMAPS | ProcCtls::TSC_OFFSETTING))?;
    vmcs::write(Field::MSR_BITMAP, ctx.arena.page().address());
    vmcs::write(Field::TSC_OFFSET, 0x1234_5678_9ABC);
    between(&mut stage, rdmsr(), |tsc| tsc.wrapping_add(0x1234_5678_9ABC))
}

fn tsc_scaling(ctx: &mut Ctx<'_>) -> Verdict {
    const ONE: u64 = 1 << 48;
    let mut stage = Stage::new(ctx)?;
    stage.clear(Control::Proc(ProcCtls::RDTSC_EXITING))?;
    stage.set(Control::Proc2(ProcCtls2::TSC_SCALING))?;
    stage.set(Control::Proc(ProcCtls::TSC_OFFSETTING))?;
    for (multiplier, offset) in [(ONE, 0), (2 * ONE, 0), (ONE / 2, 0x1_0000), (3 * ONE, !0xFFF)] {
        vmcs::write(Field::TSC_MULTIPLIER, multiplier);
        vmcs::write(Field::TSC_OFFSET, offset);
        between(&mut stage, rdtsc(), |tsc| {
            let product = (u128::from(tsc) * u128::from(multiplier)) >> 48;
            (product as u64).wrapping_add(offset)
        })?;
    }
    // Without TSC offsetting it has no effect.
    stage.clear(Control::Proc(ProcCtls::TSC_OFFSETTING))?;
    between(&mut stage, rdtsc(), |tsc| tsc)
}
