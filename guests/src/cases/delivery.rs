//! Answers: does every injected event reach L2's handler with the right frame, in both of L2's
//! modes, and can one whose delivery exited be injected again?
//!
//! SDM Vol. 3C, "Event Injection" in "VM Entries" and "Information for VM Exits That Occur During
//! Event Delivery". What each kind of event does by itself is in
//! [`behaviour`](super::behaviour::delivery).

use vmx_defs::{
    ExitReason, Field, L2Gpa,
    event::{Interruptibility, IntrInfo, kind, vector},
};
use x86_64::registers::control::Cr2;

use crate::{
    ensure_eq, gdt,
    memory::{PAGE, Page},
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Exit, Mode, Op, Outcome, Paging, Vm, Vmx, paging::WINDOW, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "delivery.interrupt", run: |ctx| interrupt(ctx, Mode::Long) },
    Case { name: "delivery.interrupt.pae", run: |ctx| interrupt(ctx, Mode::Pae) },
    Case { name: "delivery.nmi", run: nmi },
    Case { name: "delivery.exceptions", run: |ctx| exceptions(ctx, Mode::Long) },
    Case { name: "delivery.exceptions.pae", run: |ctx| exceptions(ctx, Mode::Pae) },
    Case { name: "delivery.handler_returns", run: handler_returns },
    Case { name: "delivery.wakes_hlt", run: wakes_hlt },
    Case { name: "delivery.fails.no_gate", run: no_gate },
    Case { name: "delivery.ept_violation.injected_again", run: ept_violation_stack },
    Case { name: "delivery.page_fault.exits", run: page_fault_exit },
];

/// An L2 with an IDT of 256 interrupt gates whose handlers VMCALL, and no exception exiting.
struct Handled {
    vm: Vm,
    handlers: Page,
}

/// Distance of the handlers.
const HANDLER: u64 = 8;
/// VMCALL, and IRETQ for those who go on after it.
const HANDLER_CODE: &[u8] = &[0x0F, 0x01, 0xC1, 0x48, 0xCF];

impl Handled {
    fn new(ctx: &mut Ctx<'_>, vmx: &Vmx, mode: Mode) -> Result<Self, Stop> {
        let vm = Vm::new(ctx, vmx, mode)?;
        let (idt, handlers) = (ctx.arena.page(), ctx.arena.page());
        for vector in 0..256_u64 {
            handlers.put((vector * HANDLER) as usize, HANDLER_CODE);
            let target = handlers.address() + vector * HANDLER;
            let code = if mode == Mode::Long { gdt::CODE64 } else { gdt::CODE32 };
            let gate = target & 0xFFFF
                | u64::from(code) << 16
                | 0x8E << 40
                | (target >> 16 & 0xFFFF) << 48;
            if mode == Mode::Long {
                idt.write(2 * vector as usize, gate);
                idt.write(2 * vector as usize + 1, target >> 32);
            } else {
                idt.write(vector as usize, gate);
            }
        }
        vmcs::write(Field::GUEST_IDTR_BASE, idt.address());
        let gate = if mode == Mode::Long { 16 } else { 8 };
        vmcs::write(Field::GUEST_IDTR_LIMIT, 256 * gate - 1);
        vmcs::write(Field::EXCEPTION_BITMAP, 0);
        Ok(Self { vm, handlers })
    }

    fn handler(&self, vector: u8) -> u64 {
        self.handlers.address() + u64::from(vector) * HANDLER
    }

    /// Injects while L2 is about to execute VMCALL; the result is the exit.
    fn inject(&mut self, event: Event) -> Outcome {
        event.write();
        vmcs::write(Field::GUEST_RIP, Op::Nothing.address(self.vm.paging.mode));
        self.vm.run()
    }

    /// L2 must stand at its handler of `vector`, by a VMCALL.
    fn at_handler(&self, outcome: Outcome, vector: u8) -> Result<Exit, Stop> {
        let exit = outcome.exit()?;
        if exit.reason != ExitReason::VMCALL {
            return Err(outcome.into());
        }
        ensure_eq!(exit.rip, self.handler(vector), "handler of vector {vector}");
        let vectoring = vmcs::read(Field::IDT_VECTORING_INFO) >> 31;
        ensure_eq!(vectoring, 0, "IDT-vectoring valid bit after vector {vector}");
        Ok(exit)
    }

    /// The word number `index` from the top of L2's stack.
    fn pushed(&self, index: u64) -> u64 {
        let rsp = vmcs::read(Field::GUEST_RSP);
        let size = if self.vm.paging.mode == Mode::Long { 8 } else { 4 };
        let at = rsp + index * size;
        let page = Page::at(at & !(PAGE - 1));
        let offset = (at & (PAGE - 1)) as usize;
        if size == 8 { page.read(offset / 8) } else { page.read32(offset / 4).into() }
    }
}

/// An event to inject.
#[derive(Clone, Copy)]
struct Event {
    kind: u8,
    vector: u8,
    code: Option<u32>,
    length: u32,
}

impl Event {
    const fn new(kind: u8, vector: u8) -> Self {
        Self { kind, vector, code: None, length: 0 }
    }

    /// A hardware exception, with an error code where it has one.
    fn exception(vector: u8) -> Self {
        let code = vector::has_error_code(vector).then_some(0x50 + u32::from(vector));
        Self { code, ..Self::new(kind::HARDWARE_EXCEPTION, vector) }
    }

    fn info(self) -> u32 {
        IntrInfo::new()
            .with_vector(self.vector)
            .with_kind(self.kind)
            .with_has_error_code(self.code.is_some())
            .with_valid(true)
            .into()
    }

    fn write(self) {
        vmcs::write(Field::ENTRY_INTR_INFO, self.info().into());
        vmcs::write(Field::ENTRY_EXCEPTION_ERROR, self.code.unwrap_or(0).into());
        vmcs::write(Field::ENTRY_INSTRUCTION_LEN, self.length.into());
    }
}

/// What delivery pushed: RIP, CS and RFLAGS, and in 64-bit mode RSP and SS, after an error code.
fn expect_frame(l2: &Handled, event: Event, rip: u64, rflags: u64, rsp: u64) -> Verdict {
    let long = l2.vm.paging.mode == Mode::Long;
    let code = if long { gdt::CODE64 } else { gdt::CODE32 };
    let first = u64::from(event.code.is_some());
    if let Some(error) = event.code {
        ensure_eq!(l2.pushed(0), error.into(), "error code of vector {}", event.vector);
    }
    ensure_eq!(l2.pushed(first), rip, "RIP pushed for vector {}", event.vector);
    ensure_eq!(l2.pushed(first + 1), code.into(), "CS pushed for vector {}", event.vector);
    // RF is set in the image that faults push.
    let flags = l2.pushed(first + 2) & !(1 << 16);
    ensure_eq!(flags, rflags, "RFLAGS pushed for vector {}", event.vector);
    if long {
        ensure_eq!(l2.pushed(first + 3), rsp, "RSP pushed for vector {}", event.vector);
        ensure_eq!(l2.pushed(first + 4), gdt::DATA.into(), "SS pushed for {}", event.vector);
    }
    Ok(())
}

const IF: u64 = 1 << 9;

fn interrupt(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut l2 = Handled::new(ctx, &vmx, mode)?;
    let rsp = vmcs::read(Field::GUEST_RSP);
    for vector in [0, 13, 14, 31, 32, 0x80, 255] {
        vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
        vmcs::write(Field::GUEST_RSP, rsp);
        let event = Event::new(kind::EXTERNAL, vector);
        let outcome = l2.inject(event);
        l2.at_handler(outcome, vector)?;
        expect_frame(&l2, event, Op::Nothing.address(mode), 2 | IF, rsp)?;
        ensure_eq!(vmcs::read(Field::GUEST_RFLAGS) & IF, 0, "IF in the handler");
        ensure_eq!(vmcs::read(Field::ENTRY_INTR_INFO) >> 31, 0, "valid bit after the entry");
    }
    Ok(())
}

/// An injected NMI blocks NMIs, as one that arrives.
fn nmi(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut l2 = Handled::new(ctx, &vmx, Mode::Long)?;
    let rsp = vmcs::read(Field::GUEST_RSP);
    let event = Event::new(kind::NMI, vector::NMI);
    let outcome = l2.inject(event);
    l2.at_handler(outcome, vector::NMI)?;
    expect_frame(&l2, event, Op::Nothing.address(Mode::Long), 2, rsp)?;
    let blocking = vmcs::read(Field::GUEST_INTERRUPTIBILITY);
    ensure_eq!(blocking, Interruptibility::NMI.bits().into(), "interruptibility in the handler");
    // The handler's IRET ends it.
    let exit = Exit::read();
    let after = l2.vm.resume_after(&exit).exit()?;
    ensure_eq!(after.rip, Op::Nothing.address(Mode::Long), "RIP after the handler");
    ensure_eq!(vmcs::read(Field::GUEST_INTERRUPTIBILITY), 0, "interruptibility after the handler");
    Ok(())
}

fn exceptions(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut l2 = Handled::new(ctx, &vmx, mode)?;
    let rsp = vmcs::read(Field::GUEST_RSP);
    // Whether they exit when L2 raises them does not count.
    for bitmap in [0, 0xFFFF_FFFF] {
        vmcs::write(Field::EXCEPTION_BITMAP, bitmap);
        for vector in [0, 1, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19] {
            vmcs::write(Field::GUEST_RSP, rsp);
            let event = Event::exception(vector);
            let outcome = l2.inject(event);
            l2.at_handler(outcome, vector)?;
            expect_frame(&l2, event, Op::Nothing.address(mode), 2, rsp)?;
        }
    }
    Ok(())
}

fn handler_returns(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut l2 = Handled::new(ctx, &vmx, Mode::Long)?;
    let rsp = vmcs::read(Field::GUEST_RSP);
    for round in 0..3 {
        let outcome = l2.inject(Event::exception(vector::UD));
        let exit = l2.at_handler(outcome, vector::UD)?;
        let after = l2.vm.resume_after(&exit).exit()?;
        ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason, round {round}");
        ensure_eq!(after.rip, Op::Nothing.address(Mode::Long), "RIP, round {round}");
        ensure_eq!(vmcs::read(Field::GUEST_RSP), rsp, "RSP, round {round}");
    }
    Ok(())
}

/// An event injected into a halted L2 is delivered, and its handler returns after the HLT.
fn wakes_hlt(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    if !vmx.caps.misc.activity_hlt() {
        crate::skip!("activity state HLT not supported");
    }
    let mut l2 = Handled::new(ctx, &vmx, Mode::Long)?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    vmcs::write(Field::GUEST_ACTIVITY, 1);
    let outcome = l2.inject(Event::new(kind::EXTERNAL, 0x40));
    l2.at_handler(outcome, 0x40)?;
    ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), 0, "activity state in the handler");
    Ok(())
}

/// A vector beyond the IDT is #GP with that vector, the IDT flag, and EXT unless software caused it.
fn no_gate(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut l2 = Handled::new(ctx, &vmx, Mode::Long)?;
    vmcs::write(Field::GUEST_IDTR_LIMIT, 32 * 16 - 1);
    vmcs::write(Field::EXCEPTION_BITMAP, 1 << vector::GP);
    vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
    for (event, external) in [
        (Event::new(kind::EXTERNAL, 0x40), 1),
        (Event { length: 2, ..Event::new(kind::SOFTWARE_INTERRUPT, 0x40) }, 0),
    ] {
        let exit = l2.inject(event).exit()?;
        ensure_eq!(exit.exception(), Some(vector::GP), "vector of the exit");
        ensure_eq!(u32::from(exit.interruption), 0x8000_0B0D, "interruption information");
        let error = vmcs::read(Field::EXIT_INTR_ERROR);
        ensure_eq!(error, 0x40 << 3 | 2 | external, "error code");
        let vectoring = vmcs::read(Field::IDT_VECTORING_INFO) as u32;
        ensure_eq!(vectoring, event.info(), "IDT-vectoring information");
        ensure_eq!(exit.rip, Op::Nothing.address(Mode::Long), "RIP");
        if event.kind == kind::SOFTWARE_INTERRUPT {
            ensure_eq!(exit.length, 2, "instruction length");
        }
    }
    Ok(())
}

/// The events whose delivery is interrupted.
fn interrupted() -> [Event; 6] {
    [
        Event::new(kind::EXTERNAL, 0x40),
        Event::exception(vector::GP),
        Event::exception(vector::UD),
        Event { length: 2, ..Event::new(kind::SOFTWARE_INTERRUPT, 0x80) },
        Event { length: 1, ..Event::new(kind::SOFTWARE_EXCEPTION, vector::BP) },
        Event { length: 1, ..Event::new(kind::PRIVILEGED_SOFTWARE_EXCEPTION, vector::DB) },
    ]
}

/// The exit must tell the event, as it was to be delivered.
fn expect_vectoring(exit: &Exit, event: Event, rip: u64) -> Verdict {
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason of vector {}", event.vector);
    let vectoring = vmcs::read(Field::IDT_VECTORING_INFO) as u32;
    ensure_eq!(vectoring, event.info(), "IDT-vectoring information");
    if let Some(code) = event.code {
        ensure_eq!(vmcs::read(Field::IDT_VECTORING_ERROR), code.into(), "IDT-vectoring error code");
    }
    if event.length != 0 {
        ensure_eq!(exit.length, event.length.into(), "instruction length of {}", event.vector);
    }
    ensure_eq!(exit.rip, rip, "RIP of vector {}", event.vector);
    Ok(())
}

/// Delivery that meets an EPT violation exits with the event, which can be injected again.
fn ept_violation_stack(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut l2 = Handled::new(ctx, &vmx, Mode::Long)?;
    let start = Op::Nothing.address(Mode::Long);
    for (number, event) in interrupted().into_iter().enumerate() {
        let page = WINDOW + number as u64 * PAGE;
        let rsp = page + 0x800;
        vmcs::write(Field::GUEST_RFLAGS, 2 | IF);
        vmcs::write(Field::GUEST_RSP, rsp);
        let exit = l2.inject(event).exit()?;
        expect_vectoring(&exit, event, start)?;
        ensure_eq!(exit.gpa & !(PAGE - 1), page, "guest-physical address");
        ensure_eq!(vmcs::read(Field::GUEST_RSP), rsp, "RSP");
        ensure_eq!(vmcs::read(Field::GUEST_RFLAGS), 2 | IF, "RFLAGS");
        let stack = ctx.arena.page();
        l2.vm.map(ctx, L2Gpa::new(page), stack);
        let outcome = l2.inject(event);
        l2.at_handler(outcome, event.vector)?;
    }
    Ok(())
}

/// The address of a page fault that exits is the qualification; CR2 is left alone.
fn page_fault_exit(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut l2 = Handled::new(ctx, &vmx, Mode::Long)?;
    vmcs::write(Field::EXCEPTION_BITMAP, 1 << vector::PF);
    l2.vm.paging.window.write(5, 0);
    let before = 0x0BAD_0000_u64;
    for address in [Paging::window_address(5) + 0x123, 0x7F_FFFF_0000, 0xFFFF_8000_0000_0010] {
        // SAFETY: a register that only page faults use.
        unsafe { core::arch::asm!("mov cr2, {}", in(reg) before, options(nostack)) };
        let exit = match l2.vm.load(address) {
            Err(outcome) => outcome.exit()?,
            Ok(value) => crate::fail!("L2 reads {value:#x} at {address:#x}"),
        };
        ensure_eq!(exit.exception(), Some(vector::PF), "vector of the exit");
        ensure_eq!(exit.qualification, address, "exit qualification");
        ensure_eq!(Cr2::read_raw(), before, "CR2");
    }
    Ok(())
}
