//! What happens at a VM exit?
//!
//! Most of what L1 does never comes here. What does is either a few instructions that the processor
//! always hands over, or a register that L0 answers for, or one of L1's VMX instructions: those,
//! and L2's exits, are the engine's.

use nvmx::Gprs;
use nvmx::host::{HostError, HostResult, InvEpt, Msrs, Vmx};
use nvmx::inject::{self, Exception, Fault, Outcome};
use nvmx::regs::{RAX, RBX, RCX, RDX};
use vmx_defs::event::{Interruptibility, IntrInfo, kind, vector};
use vmx_defs::exit::CrAccess;
use vmx_defs::{ExitReason, Field, ProcCtls2};

use crate::console::fail;
use crate::counters::Level;
use crate::guest_cpuid::{self, Mirrored};
use crate::guest_cr;
use crate::phys::Span;
use crate::processor::Processor;
use crate::say;
use crate::vcpu::Vcpu;

/// Called at every exit, on the processor's own stack.
pub(crate) unsafe extern "C" fn handle(gprs: *mut Gprs) {
    // SAFETY: the assembly passes the registers it has just saved; the structure is this
    // processor's own, and only this function, which does not nest, borrows it.
    let (gprs, vcpu) = unsafe { (&mut *gprs, &mut *Processor::current_vcpu()) };
    if let Err(error) = vcpu.exited(gprs) {
        broken(vcpu, error);
    }
}

/// Called when VMLAUNCH or VMRESUME failed: a bug of ours.
pub(crate) extern "C" fn entry_failed() -> ! {
    // SAFETY: as in `handle`; nothing of the structure is borrowed while a guest is entered.
    let vcpu = unsafe { &mut *Processor::current_vcpu() };
    let error = vcpu.host.vmread(Field::VM_INSTRUCTION_ERROR).unwrap_or(0);
    fail(format_args!("VM entry failed with VM-instruction error {error}"))
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
        self.processor.set_launch(false);
        if !self.processor.take_retry() {
            let reason = ExitReason::from_bits(self.host.vmread(Field::EXIT_REASON)? as u32);
            self.counters.exit(Level::L1, reason.basic().bits());
            if self.host.machine.options.log_exits {
                self.log(Level::L1, reason)?;
            }
            self.l1_exited(gprs, reason)?;
        }
        if core::mem::take(&mut self.host.memory_types_changed) {
            self.follow_memory_types()?;
        }
        self.pass_owed_nmi()
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
        if reason.is_entry_failure() {
            self.end(reason, "VM entry failed");
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
            // SMX and SGX are hidden.
            ExitReason::GETSEC | ExitReason::ENCLS => Next::Fault(Fault::Ud),
            ExitReason::EPT_VIOLATION => {
                self.ept_violation(reason)?;
                Next::Same
            }
            ExitReason::TASK_SWITCH => {
                self.task_switch()?;
                Next::Same
            }
            ExitReason::NMI_WINDOW | ExitReason::PREEMPTION_TIMER => Next::Same,
            ExitReason::TRIPLE_FAULT => self.end(reason, "L1 shut down by a triple fault"),
            ExitReason::INIT_SIGNAL => self.end(reason, "L1 was reset by INIT"),
            _ => self.end(reason, "L1 exited for a reason that was not asked for"),
        };
        match next {
            Next::Following => inject::advance_rip(&mut self.host),
            Next::Same => Ok(()),
            Next::Fault(fault) => inject::deliver(&mut self.host, fault),
        }
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
        let mirrored = Mirrored {
            cr4: self.host.vmread(Field::GUEST_CR4)?,
            controls: ProcCtls2::from_bits_retain(self.host.vmread(Field::PROC_CTLS2)? as u32),
        };
        let (leaf, subleaf) = (gprs.get(RAX) as u32, gprs.get(RCX) as u32);
        let answer = guest_cpuid::answer(&self.host, &self.counters, mirrored, leaf, subleaf);
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
        Ok(guest_cr::access(&mut self.host, gprs, access, false)?.into())
    }

    /// L1 did what EPT01 forbids: all it forbids is to write or execute L0's own memory.
    fn ept_violation(&mut self, reason: ExitReason) -> HostResult {
        let physical = self.host.vmread(Field::GUEST_PHYSICAL_ADDRESS)?;
        if !self.host.machine.own.contains(Span { start: physical, end: physical + 1 }) {
            self.end(reason, "L1 left the physical address space");
        }
        self.raise(Exception::new(vector::GP))
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

    /// EPT01's leaves carry the memory types of the MTRRs, which L1 has changed.
    fn follow_memory_types(&mut self) -> HostResult {
        let mut ept01 = self.host.machine.ept01.lock();
        if ept01.follow_mtrrs() {
            let eptp = ept01.eptp();
            drop(ept01);
            self.host.vmwrite(Field::EPT_POINTER, eptp.into_bits())?;
            self.host.invept(InvEpt::All)?;
        }
        Ok(())
    }

    /// An NMI that came while L0 ran was L1's.
    fn pass_owed_nmi(&mut self) -> HostResult {
        if !self.processor.owes_nmi() {
            return Ok(());
        }
        let pending = IntrInfo::from(self.host.vmread(Field::ENTRY_INTR_INFO)? as u32);
        let blocked = Interruptibility::from_bits_retain(
            self.host.vmread(Field::GUEST_INTERRUPTIBILITY)? as u32,
        )
        .intersects(Interruptibility::NMI | Interruptibility::MOV_SS | Interruptibility::STI);
        if pending.valid() || blocked {
            // Not now: at the next exit.
            self.processor.postpone_owed_nmi();
            return Ok(());
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

fn write_back_caches() {
    // SAFETY: WBINVD changes no data.
    unsafe { core::arch::asm!("wbinvd", options(nostack, preserves_flags)) };
}
