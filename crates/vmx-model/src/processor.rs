//! What is a logical processor, and how does software that runs on it, or a hypervisor below that
//! software, use it?
//!
//! A [`Processor`] has registers, active VMCSs and caches, and executes one abstract
//! [`Operation`] at a time with [`Processor::execute`]: there is no machine code. It serves both as
//! the bare machine on which a hypervisor runs as root software, and as the hardware below a
//! hypervisor under test, for which the methods of [`Processor::root`] are the VMX instructions with
//! register operands.
//!
//! There are no handlers either: an event that is delivered reads the IDT and pushes its frame, and
//! the processor goes on as if the handler had executed IRET at once.

use vmx_defs::ept::Eptp;
use vmx_defs::event::{Interruptibility, activity};
use vmx_defs::{ExitReason, Hpa};

use crate::caches::{Caches, Space};
use crate::caps::ModelCaps;
use crate::checked::{Chooser, Context};
use crate::memory::Memory;
use crate::operation::Operation;
use crate::registers::{Registers, rflags};
use crate::retention::Retention;
use crate::stop::{Event, ExitInfo};
use crate::vmcs::Vmcs;

/// Where a processor stands towards VMX.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmxMode {
    /// Not in VMX operation.
    Off,
    /// VMX root operation.
    Root,
    /// VMX non-root operation: a guest runs.
    NonRoot,
}

/// An event that was delivered through the IDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Delivered {
    /// Vector.
    pub vector: u8,
    /// Error code, where one was pushed.
    pub error_code: Option<u32>,
    /// CR2 afterwards, for a page fault.
    pub cr2: Option<u64>,
}

/// What became of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It completed. `value` is its result where it has one (see [`Operation::value`]), else 0;
    /// `flags` are CF and ZF after a VMX instruction, else 0.
    Completed {
        /// The result.
        value: u64,
        /// CF (bit 0) and ZF (bit 6).
        flags: u64,
    },
    /// An event was delivered in its place (or, for INT *n*, by it).
    Delivered(Delivered),
    /// VM exit: the processor is in root operation now. A failed VM entry that loaded guest state
    /// is one, too.
    Exit(ExitReason),
    /// VM entry: the processor is in non-root operation now, and has delivered the event that was
    /// injected.
    Entered(Option<Delivered>),
    /// The processor is in shutdown or waits for an interrupt that does not come: nothing was
    /// executed.
    Stopped,
}

/// A logical processor.
#[derive(Clone, Debug)]
pub struct Processor {
    /// The registers.
    pub regs: Registers,
    pub(crate) caps: ModelCaps,
    pub(crate) mode: VmxMode,
    /// The VMXON region, in VMX operation.
    pub(crate) vmxon: Option<Hpa>,
    pub(crate) active: Vec<(Hpa, Vmcs)>,
    /// Index into `active`.
    pub(crate) current: Option<usize>,
    pub(crate) caches: Caches,
    /// Blocking by STI and MOV SS.
    pub(crate) blocking: Interruptibility,
    pub(crate) nmi_blocked: bool,
    pub(crate) virtual_nmi_blocked: bool,
    /// Activity state.
    pub(crate) activity: u32,
    pub(crate) pending_debug: u64,
    /// An NMI waits to be taken.
    pub(crate) pending_nmi: bool,
    /// An external interrupt waits to be taken.
    pub(crate) pending_interrupt: Option<u8>,
    /// The event that is being delivered through the IDT.
    pub(crate) delivering: Option<Event>,
    pub(crate) feature_control: u64,
    /// Makes the processor use what it may have cached instead of what it has.
    pub(crate) chooser: Option<Box<Chooser>>,
    /// With a chooser: what translation has depended on, and since when.
    pub(crate) contexts: Vec<(u64, Context)>,
    /// Time-stamp counter: one tick an operation.
    pub(crate) tsc: u64,
}

impl Processor {
    /// A processor outside VMX operation with these registers. IA32_FEATURE_CONTROL is locked with
    /// VMXON allowed.
    pub fn new(caps: ModelCaps, retention: Retention, regs: Registers) -> Self {
        Self {
            regs,
            caps,
            mode: VmxMode::Off,
            vmxon: None,
            active: Vec::new(),
            current: None,
            caches: Caches::new(retention),
            blocking: Interruptibility::empty(),
            nmi_blocked: false,
            virtual_nmi_blocked: false,
            activity: activity::ACTIVE,
            pending_debug: 0,
            pending_nmi: false,
            pending_interrupt: None,
            delivering: None,
            feature_control: 5,
            chooser: None,
            contexts: Vec::new(),
            tsc: 0,
        }
    }

    /// What the processor can do.
    pub fn caps(&self) -> &ModelCaps {
        &self.caps
    }

    /// Where it stands towards VMX.
    #[inline]
    pub fn mode(&self) -> VmxMode {
        self.mode
    }

    /// What it has cached.
    pub fn caches(&self) -> &Caches {
        &self.caches
    }

    /// What it has cached, to be invalidated by a test.
    pub fn caches_mut(&mut self) -> &mut Caches {
        &mut self.caches
    }

    /// Activity state (of [`activity`]).
    pub fn activity(&self) -> u32 {
        self.activity
    }

    /// The current VMCS.
    #[inline]
    pub fn vmcs(&self) -> Option<&Vmcs> {
        self.active.get(self.current?).map(|(_, vmcs)| vmcs)
    }

    #[inline]
    pub(crate) fn vmcs_mut(&mut self) -> Option<&mut Vmcs> {
        let index = self.current?;
        self.active.get_mut(index).map(|(_, vmcs)| vmcs)
    }

    /// The VMCS of the guest that runs.
    #[inline]
    pub(crate) fn guest_vmcs(&self) -> Option<&Vmcs> {
        if self.mode == VmxMode::NonRoot { self.vmcs() } else { None }
    }

    /// The current-VMCS pointer.
    pub fn current_region(&self) -> Option<Hpa> {
        self.active.get(self.current?).map(|(region, _)| *region)
    }

    /// An NMI arrives. It is taken before the next operation, unless blocked.
    pub fn signal_nmi(&mut self) {
        self.pending_nmi = true;
    }

    /// An external interrupt arrives. It is taken before the next operation, unless masked.
    pub fn signal_interrupt(&mut self, vector: u8) {
        self.pending_interrupt = Some(vector);
    }

    /// An exit of the guest that runs, which is the hypervisor's own business: say, for a timer.
    ///
    /// # Panics
    /// Where no guest runs.
    pub fn exit_to_hypervisor(&mut self, memory: &mut Memory) {
        assert_eq!(self.mode, VmxMode::NonRoot, "only a guest can exit");
        self.vm_exit(memory, ExitInfo::new(ExitReason::PREEMPTION_TIMER));
    }

    /// Whether two processors are in the same state, the log of invalidations included.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.regs == other.regs
            && self.mode == other.mode
            && self.vmxon == other.vmxon
            && self.active == other.active
            && self.current == other.current
            && self.blocking == other.blocking
            && self.nmi_blocked == other.nmi_blocked
            && self.virtual_nmi_blocked == other.virtual_nmi_blocked
            && self.activity == other.activity
            && self.contexts == other.contexts
            && self.caches.has_same_log(&other.caches)
    }

    /// The EPTP in use.
    #[inline]
    pub(crate) fn eptp(&self) -> Option<Eptp> {
        self.guest_vmcs()?.eptp()
    }

    /// The tags of the linear mappings in use, or with EPT of the combined ones.
    #[inline]
    pub(crate) fn space(&self) -> Space {
        let (vpid, ept) = match self.guest_vmcs() {
            Some(vmcs) => (vmcs.vpid(), vmcs.eptp().map(Eptp::table)),
            None => (0, None),
        };
        Space { vpid, pcid: self.regs.pcid(), ept }
    }

    /// Executes one operation, or takes an event that waits in its place.
    pub fn execute(&mut self, memory: &mut Memory, operation: &Operation) -> Outcome {
        if self.activity == activity::SHUTDOWN || self.activity == activity::WAIT_FOR_SIPI {
            return Outcome::Stopped;
        }
        self.caches.between_instructions();
        self.tsc += 1;
        if let Some(outcome) = self.take_event(memory) {
            return outcome;
        }
        if self.activity == activity::HLT {
            return Outcome::Stopped;
        }
        let blocking = self.blocking;
        operation.load_registers(&mut self.regs.gprs);
        match self.dispatch(memory, operation) {
            Ok(Some(outcome)) => outcome,
            Ok(None) => {
                // STI and MOV SS block for one instruction.
                self.blocking.remove(blocking);
                self.regs.rip = self.next_rip(operation.length());
                self.regs.rflags &= !rflags::RF;
                let flags = if operation.is_vmx() {
                    self.regs.rflags & (rflags::CF | rflags::ZF)
                } else {
                    0
                };
                Outcome::Completed { value: operation.value(&self.regs.gprs), flags }
            }
            Err(stop) => self.resolve(memory, stop, operation.length()),
        }
    }

    /// RIP after an instruction of `length` bytes.
    #[inline]
    pub(crate) fn next_rip(&self, length: u32) -> u64 {
        let next = self.regs.rip.wrapping_add(length.into());
        if self.regs.is_64bit() { next } else { next & 0xffff_ffff }
    }
}
