//! What happens at a VM exit?
//!
//! Most of what L1 does never comes here. What does is either a few instructions that the processor
//! always hands over, or a register that L0 answers for, or one of L1's VMX instructions: those,
//! and L2's exits, are the engine's.

use nvmx::Gprs;
use nvmx::engine::Handled;
use nvmx::host::{HostError, HostResult, L1Memory, Msrs, Vmx};
use nvmx::inject::{self, Exception, Fault, Outcome};
use nvmx::regs::{RAX, RBX, RCX, RDX};
use vmx_defs::ept::EptViolation;
use vmx_defs::event::{Interruptibility, IntrInfo, kind, vector};
use vmx_defs::exit::CrAccess;
use vmx_defs::{EptPermissions, ExitReason, Field, L1Gpa, PinCtls, ProcCtls, ProcCtls2};

use crate::apic::{self, LocalApic, PageWrite};
use crate::console::fail;
use crate::counters::Level;
use crate::guest_cpuid::{self, Mirrored};
use crate::guest_cr;
use crate::host::Host;
use crate::processor::Processor;
use crate::say;
use crate::smp;
use crate::vcpu::Vcpu;
use crate::world;

/// Called at every exit, on the processor's own stack.
pub(crate) unsafe extern "C" fn handle(gprs: *mut Gprs) {
    // SAFETY: the assembly passes the registers it has just saved; the structure is this
    // processor's own, and only this function, which does not nest, borrows it.
    let (gprs, vcpu) = unsafe { (&mut *gprs, &mut *Processor::current_vcpu()) };
    if let Err(error) = vcpu.exited(gprs) {
        broken(vcpu, error);
    }
}

/// The processor refused what L0 is sure it supports.
fn broken(vcpu: &mut Vcpu, error: HostError) -> ! {
    let reason = vcpu.host.vmread(Field::EXIT_REASON).unwrap_or(0);
    fail(format_args!("{error:?} at exit reason {reason:#x}"))
}

/// Where L1 goes on after an exit.
enum Next {
    /// Behind the instruction that exited.
    Following,
    /// Where the guest state says.
    Same,
    /// In the handler of a fault.
    Fault(Fault),
}

impl Vcpu {
    fn exited(&mut self, gprs: &mut Gprs) -> HostResult {
        match self.processor.take_event() {
            world::Event::Exit => {
                let reason = ExitReason::from_bits(self.host.vmread(Field::EXIT_REASON)? as u32);
                if self.processor.index != 0 {
                    self.clear_blocking_by_smi()?;
                }
                if self.engine.runs_l2() {
                    self.l2_exited(gprs, reason)?;
                } else {
                    self.l1_exited(gprs, reason)?;
                }
            }
            world::Event::Retry => {}
            world::Event::EntryFailed => self.entry_failed(gprs)?,
        }
        if self.host.memory_types_changed {
            self.follow_memory_types();
        }
        self.processor.begin_looking();
        if self.engine.is_behind() {
            let nested = &self.host.machine.nested;
            nested.lock().catch_up(&mut self.engine, &mut self.host)?;
        }
        if self.engine.runs_l2() && self.processor.owes_nmi() {
            self.pass_owed_nmi_on(gprs)?;
        }
        if self.engine.runs_l2() {
            // INIT for L1 waits until it runs again, which its own interrupts bring about.
            self.processor.set_launch(self.engine.needs_launch());
            return Ok(());
        }
        if self.processor.reset_requested() {
            self.reset(gprs)?;
        }
        if self.processor.owes_nmi() {
            self.pass_owed_nmi()?;
        }
        // L1's own VMCS is launched for good at the start.
        self.processor.set_launch(false);
        Ok(())
    }

    /// A processor that was in the wait-for-SIPI state once goes on to report blocking by SMI in
    /// Bochs, and refuses it at the next entry. On others the bit is never set: L0 is not in SMM.
    fn clear_blocking_by_smi(&mut self) -> HostResult {
        let state = self.host.vmread(Field::GUEST_INTERRUPTIBILITY)?;
        let smi = u64::from(Interruptibility::SMI.bits());
        if state & smi != 0 {
            self.host.vmwrite(Field::GUEST_INTERRUPTIBILITY, state & !smi)?;
        }
        Ok(())
    }

    /// VMLAUNCH or VMRESUME failed: for L2 it is L1's failure that no check of ours found.
    fn entry_failed(&mut self, gprs: &mut Gprs) -> HostResult {
        if self.engine.runs_l2() {
            let handled =
                self.host.machine.nested.lock().entry_refused(&mut self.engine, &mut self.host)?;
            return self.conclude(handled, gprs);
        }
        let error = self.host.vmread(Field::VM_INSTRUCTION_ERROR)?;
        fail(format_args!("L1 can't be entered: VM-instruction error {error}"))
    }

    /// An exit of L2, which is the engine's.
    fn l2_exited(&mut self, gprs: &mut Gprs, reason: ExitReason) -> HostResult {
        self.counters.exit(Level::L2, reason.basic().bits());
        if self.host.machine.options.log_exits {
            self.log(Level::L2, reason)?;
        }
        let handled = self.host.machine.nested.lock().l2_exit(
            &mut self.engine,
            &mut self.host,
            gprs,
            reason,
        )?;
        self.conclude(handled, gprs)?;
        if self.host.machine.is_smp && !self.engine.runs_l2() && self.nmis_blocked()? {
            // The processor blocks NMIs since L2 got one, or exited for it. L1's blocking is
            // virtual, and its IRET ends that alone.
            unblock_nmi();
        }
        Ok(())
    }

    /// Whether the guest whose VMCS is current has blocking by NMI.
    fn nmis_blocked(&mut self) -> HostResult<bool> {
        let state = self.host.vmread(Field::GUEST_INTERRUPTIBILITY)?;
        Ok(state & u64::from(Interruptibility::NMI.bits()) != 0)
    }

    /// What the engine leaves to do.
    fn conclude(&mut self, handled: Handled, gprs: &mut Gprs) -> HostResult {
        match handled {
            Handled::Enter => Ok(()),
            // The guest state says so: the processor waits for INIT, the others go on.
            Handled::Shutdown if self.host.machine.is_smp && smp::can_shut_down() => Ok(()),
            Handled::Shutdown => {
                self.end(ExitReason::TRIPLE_FAULT, "L1's only processor shut down by a VMX abort")
            }
            Handled::TrackedWrite(at) => self.write_tracked(gprs, at),
            Handled::NotMine => {
                let reason = self.host.vmread(Field::EXIT_REASON)? as u32;
                self.end(ExitReason::from_bits(reason), "nobody handles an exit")
            }
        }
    }

    fn log(&mut self, level: Level, reason: ExitReason) -> HostResult {
        let rip = self.host.vmread(Field::GUEST_RIP)?;
        let qualification = self.host.vmread(Field::EXIT_QUALIFICATION)?;
        say!(
            "{level:?} exit {} ({}) at {rip:#x}, qualification {qualification:#x}",
            reason.basic().bits(),
            reason.name()
        );
        Ok(())
    }

    /// An exit of L1.
    fn l1_exited(&mut self, gprs: &mut Gprs, reason: ExitReason) -> HostResult {
        self.counters.exit(Level::L1, reason.basic().bits());
        if self.host.machine.options.log_exits {
            self.log(Level::L1, reason)?;
        }
        if reason.is_entry_failure() {
            self.end(reason, "L1 can't be entered");
        }
        let next = match reason.basic() {
            ExitReason::CPUID => self.cpuid(gprs)?,
            ExitReason::RDMSR => self.rdmsr(gprs),
            ExitReason::WRMSR => self.wrmsr(gprs),
            ExitReason::CR_ACCESS => self.control_register(gprs)?,
            ExitReason::XSETBV => {
                let value = u64::from(gprs.get(RDX) as u32) << 32 | u64::from(gprs.get(RAX) as u32);
                guest_cr::xsetbv(gprs.get(RCX) as u32, value).into()
            }
            // INVD would lose what L0 and others have written: it is done as WBINVD.
            ExitReason::INVD => {
                write_back_caches();
                Next::Following
            }
            // SMX and SGX are hidden; to call the TDX module, which CPUID does not tell of, exits
            // wherever the processor knows the instruction.
            ExitReason::GETSEC | ExitReason::ENCLS | ExitReason::SEAMCALL | ExitReason::TDCALL => {
                Next::Fault(Fault::Ud)
            }
            ExitReason::EXCEPTION_OR_NMI => {
                // Only NMIs exit.
                unblock_nmi();
                self.processor.take_nmi();
                Next::Same
            }
            ExitReason::STARTUP_IPI => {
                // While it waited, NMIs were blocked too: in Bochs until an IRET.
                unblock_nmi();
                let vector = self.host.vmread(Field::EXIT_QUALIFICATION)? as u8;
                self.start_at(vector)?;
                Next::Same
            }
            ExitReason::EPT_VIOLATION => return self.ept_violation(gprs),
            ExitReason::TASK_SWITCH => {
                self.task_switch()?;
                Next::Same
            }
            ExitReason::NMI_WINDOW => {
                self.want_nmi_window(false)?;
                Next::Same
            }
            ExitReason::PREEMPTION_TIMER => Next::Same,
            ExitReason::TRIPLE_FAULT => self.end(reason, "L1 shut down by a triple fault"),
            ExitReason::INIT_SIGNAL => self.end(reason, "L1 was reset by INIT"),
            _ => return self.vmx_instruction(gprs, reason),
        };
        match next {
            Next::Following => inject::advance_rip(&mut self.host),
            Next::Same => Ok(()),
            Next::Fault(fault) => inject::deliver(&mut self.host, fault),
        }
    }

    /// One of L1's VMX instructions.
    fn vmx_instruction(&mut self, gprs: &mut Gprs, reason: ExitReason) -> HostResult {
        let was = self.engine.in_vmx_operation();
        let handled = self.host.machine.nested.lock().l1_exit(
            &mut self.engine,
            &mut self.host,
            gprs,
            reason,
        )?;
        if handled == Handled::NotMine {
            self.end(reason, "L1 exited for a reason that was not asked for");
        }
        let is = self.engine.in_vmx_operation();
        if was != is {
            guest_cr::set_masks(&mut self.host, is)?;
            self.processor.set_init_blocked(is);
        }
        self.conclude(handled, gprs)
    }

    /// Ends the machine, since L1 can't go on.
    fn end(&mut self, reason: ExitReason, why: &str) -> ! {
        let mut read = |field| self.host.vmread(field).unwrap_or(0);
        let rip = read(Field::GUEST_RIP);
        let qualification = read(Field::EXIT_QUALIFICATION);
        let physical = read(Field::GUEST_PHYSICAL_ADDRESS);
        fail(format_args!(
            "{why}: exit {:#x} at {rip:#x}, qualification {qualification:#x}, guest-physical \
             {physical:#x}, CR0 {:#x}, CR3 {:#x}, CR4 {:#x}",
            reason.bits(),
            read(Field::GUEST_CR0),
            read(Field::GUEST_CR3),
            read(Field::GUEST_CR4),
        ))
    }

    fn cpuid(&mut self, gprs: &mut Gprs) -> HostResult<Next> {
        let (leaf, subleaf) = (gprs.get(RAX) as u32, gprs.get(RCX) as u32);
        let answer = if guest_cpuid::is_own(leaf) {
            guest_cpuid::own_leaf(self, leaf, subleaf)
        } else {
            let mirrored = Mirrored {
                cr4: self.host.vmread(Field::GUEST_CR4)?,
                controls: ProcCtls2::from_bits_retain(self.host.vmread(Field::PROC_CTLS2)? as u32),
            };
            guest_cpuid::answer(&self.host, mirrored, leaf, subleaf)
        };
        gprs.set(RAX, u64::from(answer.eax));
        gprs.set(RBX, u64::from(answer.ebx));
        gprs.set(RCX, u64::from(answer.ecx));
        gprs.set(RDX, u64::from(answer.edx));
        Ok(Next::Following)
    }

    fn rdmsr(&mut self, gprs: &mut Gprs) -> Next {
        match self.host.read_msr(gprs.get(RCX) as u32) {
            Ok(value) => {
                gprs.set(RAX, value & 0xFFFF_FFFF);
                gprs.set(RDX, value >> 32);
                Next::Following
            }
            Err(_) => Next::Fault(Fault::Gp(0)),
        }
    }

    fn wrmsr(&mut self, gprs: &mut Gprs) -> Next {
        let value = u64::from(gprs.get(RDX) as u32) << 32 | u64::from(gprs.get(RAX) as u32);
        match self.host.write_msr(gprs.get(RCX) as u32, value) {
            Ok(()) => Next::Following,
            Err(_) => Next::Fault(Fault::Gp(0)),
        }
    }

    fn control_register(&mut self, gprs: &mut Gprs) -> HostResult<Next> {
        let access = CrAccess::from(self.host.vmread(Field::EXIT_QUALIFICATION)?);
        Ok(guest_cr::access(&mut self.host, gprs, access, self.engine.in_vmx_operation())?.into())
    }

    /// L1 did what EPT01 forbids, or did when the processor looked.
    fn ept_violation(&mut self, gprs: &mut Gprs) -> HostResult {
        let at = L1Gpa::new(self.host.vmread(Field::GUEST_PHYSICAL_ADDRESS)?);
        let access = EptViolation::from(self.host.vmread(Field::EXIT_QUALIFICATION)?);
        // EPT01 has no accessed and dirty flags: a page walk counts as what it does.
        let wanted = EptPermissions::from_bits_truncate(access.into_bits() as u8 & 7);
        let missing = wanted - self.host.translate(at).permissions;
        if missing.is_empty() {
            return inject::retry(&mut self.host, access.nmi_unblocking());
        }
        if missing == EptPermissions::WRITE && self.host.machine.tracked.contains(at) {
            return self.write_tracked(gprs, at);
        }
        // All else is to write or execute L0's own memory.
        self.raise(Exception::new(vector::GP))
    }

    /// L1 or L2, whichever runs, writes to a page of L1 that is tracked.
    fn write_tracked(&mut self, gprs: &mut Gprs, at: L1Gpa) -> HostResult {
        let access = EptViolation::from(self.host.vmread(Field::EXIT_QUALIFICATION)?);
        let machine = self.host.machine;
        if at.page().as_u64() != LocalApic::page() {
            // Who wanted to know finds it counted, and the page no longer tracked.
            machine.tracked.about_to_write(at, 1);
            let allow = |_: &mut Host| machine.ept01.lock().allow_writes(at.page().as_u64());
            machine.nested.lock().untrack(&mut self.host, at, allow);
            return inject::retry(&mut self.host, access.nmi_unblocking());
        }
        let vectoring = IntrInfo::from(self.host.vmread(Field::IDT_VECTORING_INFO)? as u32);
        // Neither is an event's frame pushed to registers, nor are they page tables.
        if !vectoring.valid() && access.linear_valid() && access.translated() {
            let space = machine.nested.lock().guest_space(&self.engine);
            let (host, offset) = (&mut self.host, at.page_offset());
            match apic::write_page(host, gprs, self.processor, offset, space)? {
                PageWrite::Done => return Ok(()),
                PageWrite::Refused => {}
            }
        }
        if self.engine.runs_l2() {
            let mut nested = machine.nested.lock();
            let handled = nested.refuse_write(&mut self.engine, &mut self.host)?;
            drop(nested);
            return self.conclude(handled, gprs);
        }
        self.raise(Exception::new(vector::GP))
    }

    /// INIT has come: L1's processor waits for its startup interrupt.
    fn reset(&mut self, gprs: &mut Gprs) -> HostResult {
        self.host.machine.nested.lock().reset_processor(&mut self.engine);
        self.processor.forget_owed_nmi();
        self.want_nmi_window(false)?;
        self.set_reset_state(gprs)
    }

    /// L1 switches tasks in hardware, which the processor leaves to software in a guest. L0 has no
    /// use for it: L1 gets #GP, as if the descriptor were bad.
    fn task_switch(&mut self) -> HostResult {
        let selector = self.host.vmread(Field::EXIT_QUALIFICATION)? as u32 & 0xFFFC;
        self.raise(Exception { error_code: Some(selector), ..Exception::new(vector::GP) })
    }

    /// Raises an exception on an exit that may have cut short an event's delivery.
    fn raise(&mut self, exception: Exception) -> HostResult {
        let vectoring = IntrInfo::from(self.host.vmread(Field::IDT_VECTORING_INFO)? as u32);
        match inject::raise(&mut self.host, vectoring, exception)? {
            Outcome::Exception(_) => Ok(()),
            Outcome::TripleFault => self.end(ExitReason::TRIPLE_FAULT, "L1 shut down"),
        }
    }

    /// EPT01's leaves carry the memory types of the MTRRs, which L1 has changed. Where another
    /// processor has not exited since the last change, they follow at a later exit of this one.
    fn follow_memory_types(&mut self) {
        let own = self.processor.index as usize;
        let followed = self.host.machine.ept01.lock().follow_mtrrs(self.shootdown, own);
        self.host.memory_types_changed = !followed;
    }

    /// An NMI that came while L0 ran for L2 is L1's or L2's, as L1 has it. What can't be done now is
    /// tried at the next exit.
    fn pass_owed_nmi_on(&mut self, gprs: &mut Gprs) -> HostResult {
        let machine = self.host.machine;
        let handled = machine.nested.lock().nmi(&mut self.engine, &mut self.host)?;
        let Some(handled) = handled else { return Ok(()) };
        self.processor.forget_owed_nmi();
        self.conclude(handled, gprs)
    }

    /// Has L1 exit as soon as it can be given an NMI, or not. Only virtual NMIs have such a window.
    fn want_nmi_window(&mut self, wanted: bool) -> HostResult {
        let pin = PinCtls::from_bits_retain(self.host.vmread(Field::PIN_CTLS)? as u32);
        if !pin.contains(PinCtls::VIRTUAL_NMIS) {
            return Ok(());
        }
        let mut proc = ProcCtls::from_bits_retain(self.host.vmread(Field::PROC_CTLS)? as u32);
        proc.set(ProcCtls::NMI_WINDOW_EXITING, wanted);
        self.host.vmwrite(Field::PROC_CTLS, u64::from(proc.bits()))
    }

    /// An NMI that came while L0 ran was L1's.
    fn pass_owed_nmi(&mut self) -> HostResult {
        let pending = IntrInfo::from(self.host.vmread(Field::ENTRY_INTR_INFO)? as u32);
        let state = Interruptibility::from_bits_retain(
            self.host.vmread(Field::GUEST_INTERRUPTIBILITY)? as u32,
        );
        if pending.valid() || state.intersects(Interruptibility::NMI | Interruptibility::MOV_SS) {
            // Not now: at the exit of the window, or at any other before it.
            return self.want_nmi_window(true);
        }
        if state.contains(Interruptibility::STI) {
            // A processor may take NMIs there, but VM entry may refuse to inject one.
            let state = (state - Interruptibility::STI).bits();
            self.host.vmwrite(Field::GUEST_INTERRUPTIBILITY, u64::from(state))?;
        }
        self.processor.forget_owed_nmi();
        let nmi = IntrInfo::new().with_vector(vector::NMI).with_kind(kind::NMI).with_valid(true);
        self.host.vmwrite(Field::ENTRY_INTR_INFO, u64::from(nmi.into_bits()))
    }
}

impl From<Result<(), Fault>> for Next {
    fn from(result: Result<(), Fault>) -> Self {
        match result {
            Ok(()) => Self::Following,
            Err(fault) => Self::Fault(fault),
        }
    }
}

/// After an exit due to an NMI the processor blocks NMIs until an IRET.
fn unblock_nmi() {
    // SAFETY: returns to the next instruction with the same stack, segments and flags.
    unsafe {
        core::arch::asm!(
            "mov {stack}, rsp",
            "mov {segment:e}, ss",
            "push {segment}",
            "push {stack}",
            "pushfq",
            "mov {segment:e}, cs",
            "push {segment}",
            "lea {stack}, [rip + 2f]",
            "push {stack}",
            "iretq",
            "2:",
            stack = out(reg) _,
            segment = out(reg) _,
        );
    }
}

fn write_back_caches() {
    // SAFETY: WBINVD changes no data.
    unsafe { core::arch::asm!("wbinvd", options(nostack, preserves_flags)) };
}
