//! Answers: how does another processor run L2 while the case, on the first one, changes what L2 runs
//! on?
//!
//! Another processor's L1 is a small one: at each external interrupt it invalidates as it was told,
//! says that it has, and goes on; an EPT violation it reports and waits until it may go on. L2 loops:
//! it reads a number, which must be at least what was announced and at most one more, and counts.

use core::{
    hint::spin_loop,
    sync::atomic::{AtomicU64, Ordering},
};

use vmx_defs::{ExitCtls, ExitReason, Field, Hpa, PinCtls, msr::EptVpidCap};
use x86_64::registers::control::{Cr4, Cr4Flags};

use crate::{
    ensure_eq, fail, l2_code,
    local_apic::LocalApic,
    memory::Page,
    skip,
    smp::{self, Other},
    suite::{Ctx, Stop, Verdict},
    vmx::{
        self, Exit, Mode, Outcome, Vm, Vmx,
        paging::{USER_RW, WINDOW},
        vmcs,
    },
};

l2_code! {
    /// Reads at RBX until a value is less than R9 or more than R9 + 1; counts at RSI.
    watch:
        "2: mov rax, [rbx]", "mov rdx, rax", "sub rdx, r9", "cmp rdx, 1", "ja 3f",
        "inc qword ptr [rsi]", "jmp 2b", "3:";
    /// The same after VMFUNC to view 0 and to view 1, with R9 read at RSI + 8 before.
    watch_views:
        "2: mov r9, [rsi + 8]", "xor eax, eax", "xor ecx, ecx", "vmfunc", "inc ecx", "vmfunc",
        "mov rax, [rbx]", "mov rdx, rax", "sub rdx, r9", "cmp rdx, 1", "ja 3f",
        "inc qword ptr [rsi]", "jmp 2b", "3:";
    /// Writes a number that grows at RBX, and the last one written at RSI.
    fill: "2: inc rax", "mov [rbx], rax", "mov [rsi], rax", "jmp 2b";
    /// Reads one page after the other from RBX on, R9 of them, again and again; counts turns at RSI.
    sweep:
        "4: mov rdi, rbx", "mov rcx, r9", "2: mov rax, [rdi]", "add rdi, 0x1000", "dec rcx",
        "jnz 2b", "inc qword ptr [rsi]", "jmp 4b";
    /// Reads one page after the other from RBX on, R9 of them, again and again, each of which must not
    /// be less than the number of its own at RSI + 8, read before; counts turns at RSI.
    scan:
        "4: xor ecx, ecx", "mov rdi, rbx", "2: mov rdx, [rsi + rcx * 8 + 8]", "mov rax, [rdi]",
        "cmp rax, rdx", "jb 3f", "add rdi, 0x1000", "inc ecx", "cmp rcx, r9", "jb 2b",
        "inc qword ptr [rsi]", "jmp 4b", "3:";
    /// Switches to view 0, 1, ... R9 - 1 by VMFUNC and reads at RBX each time what must be R10 plus the
    /// view's number; counts turns at RSI.
    rotate:
        "4: xor ecx, ecx", "2: xor eax, eax", "vmfunc", "mov rax, [rbx]", "sub rax, r10",
        "cmp rax, rcx", "jne 3f", "inc ecx", "cmp rcx, r9", "jb 2b", "inc qword ptr [rsi]",
        "jmp 4b", "3:";
}

/// What another processor's L2 does, until it finds something wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Program {
    /// Reads one address.
    Watch,
    /// Switches between two views and reads in the second one.
    WatchViews,
    /// Writes one address.
    Fill,
    /// Reads many pages.
    Sweep,
    /// Reads many pages and compares.
    Scan,
    /// Switches through many views.
    Rotate,
}

impl Program {
    fn start(self) -> u64 {
        match self {
            Self::Watch => watch(),
            Self::WatchViews => watch_views(),
            Self::Fill => fill(),
            Self::Sweep => sweep(),
            Self::Scan => scan(),
            Self::Rotate => rotate(),
        }
    }
}

/// What L1 does on another processor at each interrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Invalidate {
    /// Nothing.
    Nothing,
    /// INVEPT of this type for this EPTP.
    Ept(u64, u64),
    /// INVVPID of this type for this VPID and address.
    Vpid(u64, u64, u64),
}

impl Invalidate {
    /// Does it; whether that succeeded.
    pub(super) fn execute(self) -> bool {
        // SAFETY: these drop cached translations only.
        unsafe {
            match self {
                Self::Nothing => true,
                Self::Ept(kind, eptp) => vmx_hw::invept(kind, [eptp, 0]).is_ok(),
                Self::Vpid(kind, vpid, address) => vmx_hw::invvpid(kind, [vpid, address]).is_ok(),
            }
        }
    }
}

/// What the first processor and another one tell each other.
#[derive(Default)]
pub(super) struct Orders {
    /// Not 0: the other one is to end.
    stop: AtomicU64,
    /// The lowest number that L2 may read after the next interrupt.
    lowest: AtomicU64,
    /// What `lowest` was at the last interrupt that was taken, once that took effect.
    seen: AtomicU64,
    /// EPT violations so far.
    violations: AtomicU64,
    /// Address and qualification of the last one.
    gpa: AtomicU64,
    qualification: AtomicU64,
    /// How many of them L2 may go on after.
    granted: AtomicU64,
}

impl Orders {
    /// EPT violations so far.
    pub(super) fn violations(&self) -> u64 {
        self.violations.load(Ordering::Acquire)
    }

    /// Guest-physical address and qualification of the last violation.
    pub(super) fn violation(&self) -> (u64, u64) {
        (self.gpa.load(Ordering::Relaxed), self.qualification.load(Ordering::Relaxed))
    }

    /// L2 may go on after every violation so far.
    pub(super) fn grant(&self) {
        self.granted.store(self.violations(), Ordering::Release);
    }

    fn must_stop(&self) -> bool {
        self.stop.load(Ordering::Acquire) != 0
    }
}

/// L2 for another processor.
pub(super) struct Runner<'a> {
    /// L2. Its VMCS is current on the first processor until [`ready`](Self::ready).
    pub(super) vm: Vm,
    /// Where L2 counts: memory that it sees at its own address.
    pub(super) board: Page,
    /// What is done at interrupts.
    pub(super) invalidate: Invalidate,
    /// The orders.
    pub(super) orders: &'a Orders,
    /// Ticks between two interrupts of the processor's own timer, which is off if 0.
    pub(super) ticks: u32,
    program: Program,
    apic: LocalApic,
    operation: Operation,
    /// The exit that ended it, unless it was told to end.
    end: Option<Outcome>,
}

impl<'a> Runner<'a> {
    /// L2 in 64-bit mode that will do `program` at [`WINDOW`], from a VMCS that is current here.
    pub(super) fn new(
        ctx: &mut Ctx<'_>,
        vmx: &Vmx,
        orders: &'a Orders,
        program: Program,
    ) -> Result<Self, Stop> {
        let mut vm = Vm::new(ctx, vmx, Mode::Long)?;
        let board = ctx.arena.page();
        let (pin, exit) = (PinCtls::EXTERNAL_INTERRUPT_EXITING, ExitCtls::ACK_INTERRUPT);
        if vmx.caps.pin.may_be_1 & pin.bits() == 0 || vmx.caps.exit.may_be_1 & exit.bits() == 0 {
            skip!("no external-interrupt exiting with acknowledgement");
        }
        vmcs::change(Field::PIN_CTLS, pin.bits().into(), 0);
        vmcs::change(Field::EXIT_CTLS, exit.bits().into(), 0);
        vmcs::write(Field::GUEST_RFLAGS, 0x202);
        vmcs::write(Field::GUEST_RIP, program.start());
        vm.registers.rbx = WINDOW;
        vm.registers.rsi = board.address();
        let operation = Operation::new(ctx, vmx);
        let invalidate = Invalidate::Ept(1, vmcs::read(Field::EPT_POINTER));
        let apic = LocalApic::new()?;
        Ok(Self { vm, board, invalidate, orders, ticks: 0, program, apic, operation, end: None })
    }

    /// Gives the VMCS away.
    pub(super) fn ready(&self) -> Verdict {
        ensure_eq!(vmx::vmclear(self.vm.vmcs), Ok(()), "VMCLEAR");
        Ok(())
    }

    /// How often L2 went round its loop.
    pub(super) fn count(board: Page) -> u64 {
        board.read(0)
    }

    /// The job.
    fn run(&mut self) {
        if !self.operation.enter() || vmx::vmptrld(self.vm.vmcs).is_err() {
            self.end = Some(Outcome::VmFail(vmx_hw::VmFail::Invalid, 0));
            return;
        }
        smp::take_over(&mut self.vm);
        self.start_timer();
        self.end = loop {
            match self.vm.run() {
                Outcome::Exit(exit) if exit.reason == ExitReason::EXTERNAL_INTERRUPT => {
                    self.apic.end_of_interrupt();
                    self.start_timer();
                    if self.orders.must_stop() {
                        break None;
                    }
                    let lowest = self.orders.lowest.load(Ordering::Acquire);
                    if !self.invalidate.execute() {
                        break Some(Outcome::Exit(exit));
                    }
                    self.vm.registers.r8[1] = lowest.max(self.vm.registers.r8[1]);
                    // What L2 had read and not yet looked at was right when it did.
                    vmcs::write(Field::GUEST_RIP, self.program.start());
                    self.orders.seen.store(lowest, Ordering::Release);
                }
                Outcome::Exit(exit) if exit.reason == ExitReason::EPT_VIOLATION => {
                    if !self.report(&exit) {
                        break None;
                    }
                }
                other => break Some(other),
            }
        };
        self.apic.stop_timer();
        let _ = vmx::vmclear(self.vm.vmcs);
        self.operation.leave();
    }

    fn start_timer(&self) {
        if self.ticks != 0 {
            self.apic.start_timer(smp::VECTOR, self.ticks);
        }
    }

    /// Tells of an EPT violation and waits; whether L2 is to go on.
    fn report(&self, exit: &Exit) -> bool {
        let orders = self.orders;
        orders.gpa.store(exit.gpa, Ordering::Relaxed);
        orders.qualification.store(exit.qualification, Ordering::Relaxed);
        let number = orders.violations.fetch_add(1, Ordering::AcqRel) + 1;
        while orders.granted.load(Ordering::Acquire) < number {
            if orders.must_stop() {
                return false;
            }
            spin_loop();
        }
        true
    }

    fn verdict(&self) -> Verdict {
        let registers = &self.vm.registers;
        match self.end {
            None => Ok(()),
            Some(Outcome::Exit(exit)) if exit.reason == ExitReason::VMCALL => {
                fail!(
                    "L2 of another processor read {:#x}, R9 {:#x}",
                    registers.rax,
                    registers.r8[1]
                )
            }
            Some(other) => Err(other.into()),
        }
    }
}

/// Another processor with L2 on it, as the first one sees it.
#[derive(Clone, Copy)]
pub(super) struct Remote<'a> {
    other: Other,
    orders: &'a Orders,
    board: Page,
}

impl Remote<'_> {
    /// Waits until `done`, or fails.
    pub(super) fn wait(&self, what: &str, done: impl Fn() -> bool) -> Verdict {
        for _ in 0..20_000_000 {
            if done() {
                return Ok(());
            }
            if !self.other.is_busy() {
                fail!("another processor's L2 ended before {what}");
            }
            spin_loop();
        }
        fail!("{what} did not come");
    }

    /// Waits until L2 has gone round its loop, whole, since now.
    pub(super) fn went_round(&self) -> Verdict {
        let before = Runner::count(self.board);
        self.wait("two turns of L2", || Runner::count(self.board) >= before + 2)
    }

    /// Interrupts it: it is to invalidate and then to read at least `lowest`.
    pub(super) fn order(&self, lowest: u64) {
        self.orders.lowest.store(lowest, Ordering::Release);
        self.other.interrupt();
    }

    /// The same, and waits until it has.
    pub(super) fn shoot_down(&self, lowest: u64) -> Verdict {
        self.order(lowest);
        self.wait("an invalidation", || self.orders.seen.load(Ordering::Acquire) == lowest)
    }
}

/// Runs `runner` on `other` while `body` goes on here, then ends it.
pub(super) fn beside<R>(
    other: Other,
    runner: &mut Runner<'_>,
    body: impl FnOnce(Remote<'_>) -> Result<R, Stop>,
) -> Result<R, Stop> {
    let remote = Remote { other, orders: runner.orders, board: runner.board };
    let result = other.run(Runner::run, runner, || {
        let result = body(remote);
        remote.orders.stop.store(1, Ordering::Release);
        other.interrupt();
        result
    });
    runner.verdict()?;
    result
}

/// VMX operation on another processor.
#[derive(Clone, Copy)]
pub(super) struct Operation {
    region: Page,
    caps: EptVpidCap,
}

impl Operation {
    /// What it needs.
    pub(super) fn new(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Self {
        let region = ctx.arena.page();
        region.write32(0, vmx.caps.basic.revision());
        Self { region, caps: vmx.caps.ept }
    }

    /// Enters it, with nothing cached; whether that succeeded.
    pub(super) fn enter(&self) -> bool {
        const ALL: u64 = 2;
        // A job that failed may have left the processor in it.
        self.leave();
        if vmx::prepare().is_err() {
            return false;
        }
        // SAFETY: the region was made for this; the others drop cached translations only.
        unsafe {
            if vmx_hw::vmxon(Hpa::new(self.region.address())).is_err() {
                Cr4::write_raw(Cr4::read_raw() & !Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits());
                return false;
            }
            (!self.caps.contains(EptVpidCap::INVEPT | EptVpidCap::INVEPT_ALL)
                || vmx_hw::invept(ALL, [0; 2]).is_ok())
                && (!self.caps.contains(EptVpidCap::INVVPID | EptVpidCap::INVVPID_ALL)
                    || vmx_hw::invvpid(ALL, [0; 2]).is_ok())
        }
    }

    /// Leaves it, if the processor is in it.
    pub(super) fn leave(&self) {
        if Cr4::read().contains(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS) {
            // SAFETY: CR4.VMXE is set in VMX operation only; no VMCS is of use afterwards.
            unsafe {
                let _ = vmx_hw::vmxoff();
                Cr4::write_raw(Cr4::read_raw() & !Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits());
            }
        }
    }
}

/// Makes the first page of L2's window that guest-physical page.
pub(super) fn show(vm: &Vm, gpa: u64) {
    vm.paging.window.write(0, gpa | USER_RW);
}
