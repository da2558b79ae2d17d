//! Answers: which exceptions exit, how does VM entry inject events, and what does an exit say that
//! interrupts the delivery of one?
//!
//! SDM Vol. 3C, "Exception Bitmap", "Event Injection", "Vectored-Event Injection", "Injection of
//! VM Exits for Events", "Information for VM Exits Due to Vectored Events" and "Information for VM
//! Exits That Occur During Event Delivery".

use core::arch::asm;

use vmx_defs::{ExitReason, Field, L2Gpa, ept::EptViolation, event::vector};
use x86_64::registers::control::Cr2;

use super::Stage;
use crate::{
    ensure_eq, gdt, l2_code,
    memory::Page,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Exit, Outcome, ept::LEAF, paging::WINDOW, snippet::Idt, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.exception.de", run: |ctx| exception(ctx, divide(), 0x8000_0300, 0) },
    Case { name: "behaviour.exception.bp", run: |ctx| exception(ctx, int3(), 0x8000_0603, 1) },
    Case { name: "behaviour.exception.int1", run: |ctx| exception(ctx, int1(), 0x8000_0501, 1) },
    Case { name: "behaviour.exception.ud", run: |ctx| exception(ctx, ud2(), 0x8000_0306, 0) },
    Case { name: "behaviour.exception.nm", run: |ctx| exception(ctx, fpu(), 0x8000_0307, 0) },
    Case { name: "behaviour.exception.ss", run: |ctx| exception(ctx, stack(), 0x8000_0B0C, 0) },
    Case { name: "behaviour.exception.gp", run: |ctx| exception(ctx, load(), 0x8000_0B0D, 0) },
    Case { name: "behaviour.exception.int_n_never_exits", run: int_n },
    Case { name: "behaviour.exception.page_fault", run: page_fault },
    Case { name: "behaviour.exception.page_fault.mask_and_match", run: mask_and_match },
    Case { name: "behaviour.exception.single_step", run: single_step },
    Case { name: "behaviour.exception.pending_debug", run: pending_debug },
    Case { name: "behaviour.exception.double_fault", run: double_fault },
    Case { name: "behaviour.exception.triple_fault", run: triple_fault },
    Case {
        name: "behaviour.inject.interrupt",
        run: |ctx| inject(ctx, &Event { info: 0x8000_0041, error: None, length: 0 }),
    },
    Case {
        name: "behaviour.inject.exception",
        run: |ctx| inject(ctx, &Event { info: 0x8000_0306, error: None, length: 0 }),
    },
    Case { name: "behaviour.inject.exception.error_code", run: |ctx| inject(ctx, &GENERAL) },
    Case { name: "behaviour.inject.software_interrupt", run: |ctx| inject(ctx, &SOFTWARE) },
    Case {
        name: "behaviour.inject.int1",
        run: |ctx| inject(ctx, &Event { info: 0x8000_0501, error: None, length: 1 }),
    },
    Case {
        name: "behaviour.inject.int3",
        run: |ctx| inject(ctx, &Event { info: 0x8000_0603, error: None, length: 1 }),
    },
    Case {
        name: "behaviour.inject.longest",
        run: |ctx| inject(ctx, &Event { info: 0x8000_0480, error: None, length: 15 }),
    },
    Case { name: "behaviour.inject.zero_length", run: zero_length },
    Case { name: "behaviour.inject.page_fault", run: inject_page_fault },
    Case { name: "behaviour.inject.ignores_exception_bitmap", run: ignores_bitmap },
    Case { name: "behaviour.inject.from_user", run: from_user },
    Case { name: "behaviour.inject.privilege", run: privilege },
    Case { name: "behaviour.inject.cancelled", run: cancelled },
    Case { name: "behaviour.vectoring.stack.exception", run: |ctx| on_stack(ctx, &GENERAL) },
    Case {
        name: "behaviour.vectoring.stack.interrupt",
        run: |ctx| on_stack(ctx, &Event { info: 0x8000_0041, error: None, length: 0 }),
    },
    Case {
        name: "behaviour.vectoring.stack.nmi",
        run: |ctx| on_stack(ctx, &Event { info: 0x8000_0202, error: None, length: 0 }),
    },
    Case {
        name: "behaviour.vectoring.stack.software_interrupt",
        run: |ctx| on_stack(ctx, &SOFTWARE),
    },
    Case { name: "behaviour.vectoring.idt", run: on_idt },
    Case { name: "behaviour.vectoring.handler", run: on_handler },
    Case { name: "behaviour.vectoring.misconfiguration", run: on_misconfigured },
    Case { name: "behaviour.vectoring.own.ud", run: |ctx| own_event(ctx, ud2(), 0x8000_0306, 0) },
    Case {
        name: "behaviour.vectoring.own.int_n",
        run: |ctx| own_event(ctx, int_80(), 0x8000_0480, 2),
    },
    Case {
        name: "behaviour.vectoring.own.int3",
        run: |ctx| own_event(ctx, int3(), 0x8000_0603, 1),
    },
    Case { name: "behaviour.vectoring.own.gp", run: |ctx| own_event(ctx, load(), 0x8000_0B0D, 0) },
];

l2_code! {
    nothing: "";
    divide: "xor ecx, ecx", "div ecx";
    int3: "int3";
    int1: ".byte 0xF1";
    ud2: "ud2";
    fpu: "fnop";
    stack: "mov rax, [rbp]";
    load: "mov rax, [rbx]";
    store: "mov [rbx], rax";
    int_80: "int 0x80";
    nops: "nop", "nop";
}

const NOT_CANONICAL: u64 = 0x4000_0000_0000_0000;
/// A linear address that L2's page tables do not map.
const UNMAPPED: u64 = 0x8000_0000;
const IF: u64 = 1 << 9;
const TF: u64 = 1 << 8;
const TS: u64 = 1 << 3;

/// An event as VM entry takes it.
struct Event {
    info: u64,
    error: Option<u64>,
    length: u64,
}

const GENERAL: Event = Event { info: 0x8000_0B0D, error: Some(0x1234), length: 0 };
const SOFTWARE: Event = Event { info: 0x8000_0480, error: None, length: 2 };

impl Event {
    fn vector(&self) -> u8 {
        self.info as u8
    }

    fn write(&self) {
        vmcs::write(Field::ENTRY_INTR_INFO, self.info);
        vmcs::write(Field::ENTRY_EXCEPTION_ERROR, self.error.unwrap_or(0));
        vmcs::write(Field::ENTRY_INSTRUCTION_LEN, self.length);
    }
}

/// L2 with the handlers of an IDT, and no exception exiting.
fn with_idt(ctx: &mut Ctx<'_>) -> Result<(Stage, Idt), Stop> {
    let mut stage = Stage::new(ctx)?;
    let idt = Idt::new(ctx.arena);
    idt.install();
    vmcs::write(Field::EXCEPTION_BITMAP, 0);
    stage.vm.registers.rbx = NOT_CANONICAL;
    stage.vm.registers.rbp = NOT_CANONICAL;
    Ok((stage, idt))
}

fn handled(exit: &Exit, idt: &Idt, vector: u8) -> Verdict {
    ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
    ensure_eq!(exit.rip, idt.handler(vector), "RIP: the handler");
    let vectoring = vmcs::read(Field::IDT_VECTORING_INFO);
    ensure_eq!(vectoring >> 31 & 1, 0, "IDT-vectoring information is valid");
    Ok(())
}

/// Words from the stack pointer of L2 on, which lies in a page of this program.
fn frame<const WORDS: usize>() -> [u64; WORDS] {
    let rsp = vmcs::read(Field::GUEST_RSP);
    let page = Page::at(rsp & !0xFFF);
    let mut words = [0; WORDS];
    for (index, word) in words.iter_mut().enumerate() {
        *word = page.read((rsp & 0xFFF) as usize / 8 + index);
    }
    words
}

/// The exception at `code` is delivered with the bit of the exception bitmap clear, and exits with
/// it set.
fn exception(ctx: &mut Ctx<'_>, code: u64, info: u32, length: u64) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    let number = info as u8;
    if number == vector::NM {
        vmcs::change(Field::GUEST_CR0, TS, 0);
    }
    let rsp = vmcs::read(Field::GUEST_RSP);
    for bitmap in [0, !(1 << number) & 0xFFFF_FFFF] {
        vmcs::write(Field::GUEST_RSP, rsp);
        vmcs::write(Field::EXCEPTION_BITMAP, bitmap);
        let exit = stage.exit_from(code)?;
        handled(&exit, &idt, number)?;
    }
    let at = if number == 0 { code + 2 } else { code };
    for bitmap in [1 << number, 0xFFFF_FFFF] {
        vmcs::write(Field::GUEST_RSP, rsp);
        vmcs::write(Field::EXCEPTION_BITMAP, bitmap);
        let exit = stage.exit_from(code)?;
        ensure_eq!(exit.reason, ExitReason::EXCEPTION_OR_NMI, "exit reason");
        ensure_eq!(u32::from(exit.interruption), info, "interruption information");
        ensure_eq!(exit.rip, at, "RIP");
        ensure_eq!(vmcs::read(Field::GUEST_RSP), rsp, "RSP");
        if length != 0 {
            ensure_eq!(exit.length, length, "instruction length");
        }
        if info & 1 << 11 != 0 {
            ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code");
        }
        ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO) >> 31 & 1, 0, "IDT-vectoring");
    }
    Ok(())
}

/// INT n is no exception, whatever its vector.
fn int_n(ctx: &mut Ctx<'_>) -> Verdict {
    const INT_13: [u8; 5] = [0xCD, 13, 0x0F, 0x01, 0xC1];
    let (mut stage, idt) = with_idt(ctx)?;
    let code = ctx.arena.page();
    code.put(0, &INT_13);
    vmcs::write(Field::EXCEPTION_BITMAP, 0xFFFF_FFFF);
    let exit = stage.exit_from(code.address())?;
    handled(&exit, &idt, 13)?;
    let [rip, cs] = frame();
    ensure_eq!((rip, cs), (code.address() + 2, gdt::CODE64.into()), "frame: no error code");
    Ok(())
}

fn set_cr2(value: u64) {
    // SAFETY: CR2 only records the address of page faults.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack)) };
}

fn page_fault(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    stage.vm.registers.rbx = UNMAPPED + 0x123;
    vmcs::write(Field::EXCEPTION_BITMAP, 1 << vector::PF);
    for (code, error) in [(load(), 0), (store(), 2)] {
        set_cr2(0x5555);
        let exit = stage.raises(code, vector::PF)?;
        ensure_eq!(u32::from(exit.interruption), 0x8000_0B0E, "interruption information");
        ensure_eq!(exit.qualification, UNMAPPED + 0x123, "exit qualification: the address");
        ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), error, "error code");
        ensure_eq!(Cr2::read_raw(), 0x5555, "CR2, which the exit leaves alone");
    }
    // Delivered, it sets CR2, which exits and entries do not switch.
    vmcs::write(Field::EXCEPTION_BITMAP, 0);
    let exit = stage.exit_from(store())?;
    ensure_eq!(Cr2::read_raw(), UNMAPPED + 0x123, "CR2");
    handled(&exit, &idt, vector::PF)?;
    let [error, rip] = frame();
    ensure_eq!((error, rip), (2, store()), "error code and RIP in the frame");
    Ok(())
}

/// Bit 14 counts as it is where the error code matches under the mask, else inverted.
fn mask_and_match(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    stage.vm.registers.rbx = UNMAPPED;
    let rsp = vmcs::read(Field::GUEST_RSP);
    for (mask, wanted) in [(0, 0), (2, 2), (2, 0), (0, 2), (3, 1), (7, 0), (!0, 2)] {
        for bit in [0, 1_u64] {
            for (code, error) in [(load(), 0_u64), (store(), 2)] {
                vmcs::write(Field::PF_ERROR_MASK, mask);
                vmcs::write(Field::PF_ERROR_MATCH, wanted);
                vmcs::write(Field::EXCEPTION_BITMAP, bit << vector::PF);
                vmcs::write(Field::GUEST_RSP, rsp);
                let exit = stage.exit_from(code)?;
                let matches = error & mask == wanted;
                if matches == (bit == 1) {
                    ensure_eq!(
                        exit.exception(),
                        Some(vector::PF),
                        "mask {mask:#x}, match {wanted:#x}, bit {bit}, error code {error}"
                    );
                } else {
                    handled(&exit, &idt, vector::PF)?;
                }
            }
        }
    }
    Ok(())
}

/// The qualification has what DR6 would get; DR6 itself and RFLAGS are as they were.
fn single_step(ctx: &mut Ctx<'_>) -> Verdict {
    const BS: u64 = 1 << 14;
    let mut stage = Stage::new(ctx)?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | TF);
    let exit = stage.exit_from(nops())?;
    ensure_eq!(u32::from(exit.interruption), 0x8000_0301, "interruption information");
    ensure_eq!(exit.qualification, BS, "exit qualification");
    ensure_eq!(exit.rip, nops() + 1, "RIP");
    ensure_eq!(vmcs::read(Field::GUEST_RFLAGS), 2 | TF, "RFLAGS");
    let dr6: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, dr6", out(reg) dr6, options(nomem, nostack)) };
    ensure_eq!(dr6 & BS, 0, "BS in DR6");
    Ok(())
}

/// A debug exception that is pending at VM entry comes before L2's first instruction.
fn pending_debug(ctx: &mut Ctx<'_>) -> Verdict {
    const BS: u64 = 1 << 14;
    let mut stage = Stage::new(ctx)?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | TF);
    vmcs::write(Field::GUEST_PENDING_DEBUG, BS);
    let exit = stage.exit_from(nops())?;
    ensure_eq!(exit.exception(), Some(vector::DB), "vector");
    ensure_eq!(exit.qualification, BS, "exit qualification");
    ensure_eq!(exit.rip, nops(), "RIP");
    ensure_eq!(vmcs::read(Field::GUEST_PENDING_DEBUG), 0, "pending debug exceptions after it");
    Ok(())
}

fn double_fault(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    vmcs::write(Field::GUEST_IDTR_LIMIT, 0);
    vmcs::write(Field::EXCEPTION_BITMAP, 1 << vector::DF);
    // #GP at the delivery of #GP.
    stage.vm.registers.rbx = NOT_CANONICAL;
    let exit = stage.exit_from(load())?;
    ensure_eq!(exit.reason, ExitReason::EXCEPTION_OR_NMI, "exit reason");
    ensure_eq!(u32::from(exit.interruption), 0x8000_0B08, "interruption information");
    ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code");
    // The exit is the event's own, and not one during event delivery.
    ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO) >> 31 & 1, 0, "IDT-vectoring");
    ensure_eq!(exit.rip, load(), "RIP");
    Ok(())
}

fn triple_fault(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    vmcs::write(Field::GUEST_IDTR_LIMIT, 0);
    vmcs::write(Field::EXCEPTION_BITMAP, 0);
    for _ in 0..2 {
        let exit = stage.exit_from(ud2())?;
        ensure_eq!(exit.reason, ExitReason::TRIPLE_FAULT, "exit reason");
        ensure_eq!(exit.qualification, 0, "exit qualification");
        ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), 0, "activity state");
    }
    stage.passes(nothing())
}

/// Injects an event at [`nothing`]; it must be delivered with the frame that belongs to it.
fn inject(ctx: &mut Ctx<'_>, event: &Event) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    let rsp = vmcs::read(Field::GUEST_RSP);
    for _ in 0..2 {
        vmcs::write(Field::GUEST_RSP, rsp);
        vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
        event.write();
        let exit = stage.exit_from(nothing())?;
        handled(&exit, &idt, event.vector())?;
        expect_frame(event, nothing(), rsp)?;
        ensure_eq!(vmcs::read(Field::ENTRY_INTR_INFO) >> 31 & 1, 0, "entry field's valid bit");
        ensure_eq!(vmcs::read(Field::GUEST_RFLAGS) & IF, 0, "IF in the handler");
    }
    // Nothing is injected again.
    vmcs::write(Field::GUEST_RSP, rsp);
    stage.passes(nothing())
}

/// The frame of the event, delivered at `rip` with IF set and this stack pointer.
fn expect_frame(event: &Event, rip: u64, rsp: u64) -> Verdict {
    let words = if let Some(error) = event.error {
        let [found, words @ ..] = frame::<6>();
        ensure_eq!(found, error, "error code in the frame");
        words
    } else {
        frame::<5>()
    };
    let expected = [rip + event.length, gdt::CODE64.into(), 2 | IF, rsp, gdt::DATA.into()];
    ensure_eq!(words, expected, "RIP, CS, RFLAGS, RSP and SS in the frame");
    Ok(())
}

fn zero_length(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    let event = Event { length: 0, ..SOFTWARE };
    event.write();
    vmcs::write(Field::GUEST_RIP, nothing());
    if stage.vmx.caps.misc.zero_length_injection() {
        let exit = stage.vm.run().exit()?;
        handled(&exit, &idt, event.vector())?;
        ensure_eq!(frame(), [nothing()], "RIP in the frame");
        return Ok(());
    }
    let expected = Outcome::VmFail(vmx_hw::VmFail::Valid, 7);
    ensure_eq!(stage.vm.run(), expected, "VM entry with instruction length 0");
    Ok(())
}

/// An injected page fault does not set CR2.
fn inject_page_fault(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    set_cr2(0x7777);
    Event { info: 0x8000_0B0E, error: Some(7), length: 0 }.write();
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(Cr2::read_raw(), 0x7777, "CR2");
    handled(&exit, &idt, vector::PF)?;
    ensure_eq!(frame(), [7, nothing()], "error code and RIP in the frame");
    Ok(())
}

/// Injected exceptions do not exit, whatever the exception bitmap says.
fn ignores_bitmap(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    vmcs::write(Field::EXCEPTION_BITMAP, 0xFFFF_FFFF);
    GENERAL.write();
    let exit = stage.exit_from(nothing())?;
    handled(&exit, &idt, vector::GP)
}

fn to_user(ctx: &mut Ctx<'_>) -> u64 {
    let rsp = ctx.arena.page().address() + 0x800;
    vmcs::write(Field::GUEST_RSP, rsp);
    vmcs::write(Field::GUEST_CS_SELECTOR, gdt::USER_CODE64.into());
    vmcs::write(Field::GUEST_CS_AR, 0xA0FB);
    vmcs::write(Field::GUEST_SS_SELECTOR, gdt::USER_DATA.into());
    vmcs::write(Field::GUEST_SS_BASE, 0);
    vmcs::write(Field::GUEST_SS_LIMIT, 0xFFFF_FFFF);
    vmcs::write(Field::GUEST_SS_AR, 0xC0F3);
    rsp
}

/// A TSS for L2, with this stack for CPL 0.
fn with_task(ctx: &mut Ctx<'_>) -> u64 {
    let (task, stack) = (ctx.arena.page(), ctx.arena.page().address() + 0x1000);
    // RSP0 stands at offset 4.
    task.write32(1, stack as u32);
    vmcs::write(Field::GUEST_TR_BASE, task.address());
    stack
}

/// From CPL 3 the handler runs at CPL 0, on the stack of the TSS.
fn from_user(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    let stack = with_task(ctx);
    let rsp = to_user(ctx);
    GENERAL.write();
    let exit = stage.exit_from(nothing())?;
    handled(&exit, &idt, vector::GP)?;
    ensure_eq!(vmcs::read(Field::GUEST_RSP), stack - 48, "RSP in the handler");
    let [error, words @ ..] = frame::<6>();
    ensure_eq!(error, 0x1234, "error code in the frame");
    let expected = [nothing(), gdt::USER_CODE64.into(), 2, rsp, gdt::USER_DATA.into()];
    ensure_eq!(words, expected, "RIP, CS, RFLAGS, RSP and SS in the frame");
    ensure_eq!(vmcs::read(Field::GUEST_CS_SELECTOR), gdt::CODE64.into(), "CS");
    Ok(())
}

/// Of injected events, software interrupts alone are checked against the gate's DPL.
fn privilege(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    with_task(ctx);
    // DPL 0 in the gate of vector 80H.
    let word = idt.gates().read(0x80 * 2);
    idt.gates().write(0x80 * 2, word & !(3 << 45));
    to_user(ctx);
    SOFTWARE.write();
    let exit = stage.exit_from(nothing())?;
    handled(&exit, &idt, vector::GP)?;
    ensure_eq!(frame(), [0x80 * 8 + 2, nothing()], "error code and RIP in the frame");
    to_user(ctx);
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    Event { info: 0x8000_0080, error: None, length: 0 }.write();
    let exit = stage.exit_from(nothing())?;
    handled(&exit, &idt, 0x80)
}

/// A VM entry that fails leaves the event in its field; L1 may still cancel it.
fn cancelled(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    GENERAL.write();
    vmcs::write(Field::GUEST_RFLAGS, 0);
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason.bits(), 1 << 31 | 33, "exit reason");
    ensure_eq!(vmcs::read(Field::ENTRY_INTR_INFO), GENERAL.info, "entry field");
    vmcs::write(Field::GUEST_RFLAGS, 2);
    let exit = stage.exit_from(nothing())?;
    handled(&exit, &idt, vector::GP)
}

/// What the VMCS says of the event whose delivery was interrupted.
fn expect_vectoring(event: &Event) -> Verdict {
    let info = vmcs::read(Field::IDT_VECTORING_INFO);
    ensure_eq!(info, event.info, "IDT-vectoring information");
    if let Some(error) = event.error {
        ensure_eq!(vmcs::read(Field::IDT_VECTORING_ERROR), error, "IDT-vectoring error code");
    }
    if event.length != 0 {
        let length = vmcs::read(Field::EXIT_INSTRUCTION_LEN);
        ensure_eq!(length, event.length, "instruction length");
    }
    ensure_eq!(vmcs::read(Field::ENTRY_INTR_INFO) >> 31 & 1, 0, "entry field's valid bit");
    Ok(())
}

/// Guest-physical and linear address of a stack page that the EPT does not map at first.
const STACK: u64 = WINDOW + 0x3000;

/// Expects an EPT violation by a write to the stack at [`STACK`], during delivery.
fn expect_stack_violation(exit: &Exit, code: u64) -> Verdict {
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa & !0xFFF, STACK, "page of the guest-physical address");
    ensure_eq!(exit.gla, exit.gpa, "guest-linear address");
    let access = EptViolation::from(exit.qualification);
    ensure_eq!((access.write(), access.fetch()), (true, false), "write, fetch");
    ensure_eq!((access.linear_valid(), access.translated()), (true, true), "linear address");
    ensure_eq!((access.readable(), access.writable()), (false, false), "permissions");
    ensure_eq!(exit.rip, code, "RIP");
    ensure_eq!(vmcs::read(Field::GUEST_RSP), STACK + 0x800, "RSP");
    Ok(())
}

/// The stack is not mapped: an EPT violation, after which L1 maps it and injects again.
fn on_stack(ctx: &mut Ctx<'_>, event: &Event) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    vmcs::write(Field::GUEST_RSP, STACK + 0x800);
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    event.write();
    let exit = stage.exit_from(nothing())?;
    expect_stack_violation(&exit, nothing())?;
    expect_vectoring(event)?;
    let page = ctx.arena.page();
    stage.vm.map(ctx, L2Gpa::new(STACK), page);
    // Some processors show blocking by NMI here already; the injection needs it clear.
    vmcs::write(Field::GUEST_INTERRUPTIBILITY, 0);
    event.write();
    let exit = stage.vm.run().exit()?;
    handled(&exit, &idt, event.vector())?;
    let rsp = vmcs::read(Field::GUEST_RSP);
    let word = (rsp & 0xFFF) as usize / 8 + usize::from(event.error.is_some());
    ensure_eq!(page.read(word), nothing() + event.length, "RIP in the frame");
    Ok(())
}

/// The IDT is not mapped: an EPT violation by a read.
fn on_idt(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    vmcs::write(Field::GUEST_IDTR_BASE, STACK);
    GENERAL.write();
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa & !0xF, STACK + 13 * 16, "guest-physical address: the gate");
    let access = EptViolation::from(exit.qualification);
    ensure_eq!((access.read(), access.write(), access.fetch()), (true, false, false), "access");
    expect_vectoring(&GENERAL)?;
    stage.vm.map(ctx, L2Gpa::new(STACK), idt.gates());
    GENERAL.write();
    let exit = stage.vm.run().exit()?;
    handled(&exit, &idt, vector::GP)
}

/// The handler is not mapped: its fetch comes after the delivery, which is complete.
fn on_handler(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    let gates = idt.gates();
    let word = gates.read(26);
    gates.write(26, word & !0xFFFF_0000_0000_FFFF | STACK & 0xFFFF | (STACK >> 16) << 48);
    GENERAL.write();
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!((exit.gpa, exit.rip), (STACK, STACK), "guest-physical address and RIP");
    ensure_eq!(EptViolation::from(exit.qualification).fetch(), true, "fetch");
    ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO) >> 31 & 1, 0, "IDT-vectoring");
    ensure_eq!(frame(), [0x1234, nothing()], "error code and RIP in the frame");
    Ok(())
}

fn on_misconfigured(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, _) = with_idt(ctx)?;
    let page = ctx.arena.page();
    // Writable and not readable.
    stage.vm.ept.map(ctx.arena, L2Gpa::new(STACK), 1, page.address() | LEAF & !7 | 2);
    vmcs::write(Field::GUEST_RSP, STACK + 0x800);
    GENERAL.write();
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason, ExitReason::EPT_MISCONFIGURATION, "exit reason");
    ensure_eq!(exit.gpa & !0xFFF, STACK, "page of the guest-physical address");
    expect_vectoring(&GENERAL)
}

/// The same for events that L2 raises itself.
fn own_event(ctx: &mut Ctx<'_>, code: u64, info: u64, length: u64) -> Verdict {
    let (mut stage, idt) = with_idt(ctx)?;
    vmcs::write(Field::GUEST_RSP, STACK + 0x800);
    let exit = stage.exit_from(code)?;
    expect_stack_violation(&exit, code)?;
    let event = Event { info, error: (info & 1 << 11 != 0).then_some(0), length };
    expect_vectoring(&event)?;
    // L1 maps the stack and lets L2 execute the instruction again.
    let page = ctx.arena.page();
    stage.vm.map(ctx, L2Gpa::new(STACK), page);
    let exit = stage.vm.run().exit()?;
    handled(&exit, &idt, event.vector())
}
