//! What becomes of an instruction that was stopped: an exception delivered through the IDT, a #VE,
//! or a VM exit?
//!
//! SDM Vol. 3A, "Interrupt and Exception Handling"; Vol. 3C, "Changes to Instruction Behavior in VMX
//! Non-Root Operation", "Virtualization Exceptions" and "Information for VM Exits That Occur During
//! Event Delivery". Delivery reads the gate and the TSS and pushes the frame; the handler is taken
//! to return at once, and the interrupted instruction with RF set to have been executed, so that RIP,
//! RSP and the other flags stay (see the module on processors). Code segment descriptors are not
//! read.

use vmx_defs::controls::{PinCtls, ProcCtls, ProcCtls2};
use vmx_defs::event::{Interruptibility, activity, kind, vector};
use vmx_defs::{ExitReason, Field, Hpa, ve};

use crate::memory::Memory;
use crate::paging::Access;
use crate::processor::{Delivered, Outcome, Processor, VmxMode};
use crate::registers::{cr0, gpr, rflags, segment};
use crate::stop::{Event, Exception, ExitInfo, Flow, Stop, Violation, fault};

/// What a gate of the IDT may be: interrupt and trap gates of 32 or 64 bits.
const INTERRUPT_GATE: u64 = 0xe;
const TRAP_GATE: u64 = 0xf;

/// How a second exception combines with the event that was being delivered (SDM Vol. 3A, "Interrupt
/// 8—Double Fault Exception (#DF)").
enum Combined {
    Second,
    DoubleFault,
    TripleFault,
}

fn combine(first: &Event, second: u8) -> Combined {
    let contributory = |number| {
        matches!(number, 0 | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP)
    };
    let page_fault = |number| matches!(number, vector::PF | vector::VE);
    let faults = contributory(second) || page_fault(second);
    if first.info.kind() != kind::HARDWARE_EXCEPTION {
        return Combined::Second;
    }
    match first.info.vector() {
        vector::DF if faults => Combined::TripleFault,
        number if contributory(number) && contributory(second) => Combined::DoubleFault,
        number if page_fault(number) && faults => Combined::DoubleFault,
        _ => Combined::Second,
    }
}

impl Processor {
    /// Carries out what an instruction of `length` bytes was stopped by.
    pub(crate) fn resolve(&mut self, memory: &mut Memory, stop: Stop, length: u32) -> Outcome {
        let mut stop = stop;
        loop {
            let event = match stop {
                Stop::Exit(info) => return self.vm_exit(memory, info),
                Stop::Misconfiguration(gpa) => {
                    let info = ExitInfo::new(ExitReason::EPT_MISCONFIGURATION);
                    return self.vm_exit(memory, ExitInfo { gpa: Some(gpa), ..info });
                }
                Stop::Violation(violation) => {
                    if !self.converts(memory, &violation) {
                        return self.vm_exit(memory, violation_exit(&violation));
                    }
                    self.store_ve_information(memory, &violation);
                    stop = Exception::VE.into();
                    continue;
                }
                Stop::Software(event) => {
                    if self.exits_on(event.info.vector(), 0)
                        && event.info.kind() != kind::SOFTWARE_INTERRUPT
                    {
                        let info = ExitInfo::new(ExitReason::EXCEPTION_OR_NMI);
                        let info =
                            ExitInfo { interruption: Some(event), length: Some(length), ..info };
                        return self.vm_exit(memory, info);
                    }
                    event
                }
                Stop::Exception(exception) => match self.raise(exception) {
                    Ok(event) => event,
                    Err(Some(info)) => return self.vm_exit(memory, info),
                    Err(None) => {
                        self.delivering = None;
                        self.activity = activity::SHUTDOWN;
                        return Outcome::Stopped;
                    }
                },
            };
            match self.deliver(memory, event) {
                Ok(delivered) => {
                    if event.is_software() {
                        // The handler returns to the next instruction.
                        self.regs.rip = self.next_rip(event.length);
                    }
                    return Outcome::Delivered(delivered);
                }
                Err(next) => stop = next,
            }
        }
    }

    /// Decides on an exception: the event to deliver, the VM exit it causes, or (`None`) shutdown.
    fn raise(&mut self, exception: Exception) -> Result<Event, Option<ExitInfo>> {
        let mut exception = exception;
        if let Some(first) = self.delivering {
            match combine(&first, exception.vector) {
                Combined::Second => {}
                Combined::DoubleFault => {
                    exception = Exception::DF;
                    // A double fault that exits did so directly, not during event delivery.
                    self.delivering = None;
                }
                Combined::TripleFault => {
                    self.delivering = None;
                    let in_guest = self.mode == VmxMode::NonRoot;
                    return Err(in_guest.then(|| ExitInfo::new(ExitReason::TRIPLE_FAULT)));
                }
            }
        }
        if self.regs.cr0 & cr0::PE == 0 {
            // There are none in real-address mode, neither on the stack nor in a VMCS (SDM Vol. 3C,
            // "Information for VM Exits Due to Vectored Events").
            exception.error_code = None;
        }
        if self.exits_on(exception.vector, exception.error_code.unwrap_or(0)) {
            let address = exception.address.map_or(0, |address| address.as_u64());
            let info = ExitInfo::qualified(ExitReason::EXCEPTION_OR_NMI, address);
            let event = Event::exception(exception);
            return Err(Some(ExitInfo { interruption: Some(event), ..info }));
        }
        if let Some(address) = exception.address {
            self.regs.cr2 = address.as_u64();
        }
        Ok(Event::exception(exception))
    }

    /// Whether an exception of the guest exits (SDM Vol. 3C, "Exception Bitmap").
    fn exits_on(&self, vector: u8, code: u32) -> bool {
        let Some(vmcs) = self.guest_vmcs() else { return false };
        let bit = vmcs.get32(Field::EXCEPTION_BITMAP) >> (vector & 31) & 1 != 0;
        if vector != vector::PF {
            return bit;
        }
        let matches = code & vmcs.get32(Field::PF_ERROR_MASK) == vmcs.get32(Field::PF_ERROR_MATCH);
        bit == matches
    }

    /// Delivers an event through the IDT. While that goes on, [`Processor::delivering`] says so.
    pub(crate) fn deliver(&mut self, memory: &mut Memory, event: Event) -> Flow<Delivered> {
        self.delivering = Some(event);
        let nmi = event.info.kind() == kind::NMI;
        if nmi {
            self.set_nmi_blocking(true);
        }
        if self.regs.cr0 & cr0::PE == 0 {
            self.deliver_real(memory, event)?;
        } else {
            self.deliver_protected(memory, event)?;
        }
        self.delivering = None;
        self.regs.rflags &= !rflags::RF;
        self.blocking = Interruptibility::empty();
        self.activity = activity::ACTIVE;
        if nmi {
            // The handler's IRET.
            self.set_nmi_blocking(false);
        }
        let vector = event.info.vector();
        let page_fault = event.info.kind() == kind::HARDWARE_EXCEPTION && vector == vector::PF;
        Ok(Delivered {
            vector,
            error_code: event.info.has_error_code().then_some(event.error_code),
            cr2: page_fault.then_some(self.regs.cr2),
        })
    }

    fn set_nmi_blocking(&mut self, blocked: bool) {
        let virtual_nmis =
            self.guest_vmcs().is_some_and(|vmcs| vmcs.pin().contains(PinCtls::VIRTUAL_NMIS));
        if virtual_nmis {
            self.virtual_nmi_blocked = blocked;
        } else {
            self.nmi_blocked = blocked;
        }
    }

    /// Protected mode and IA-32e mode.
    fn deliver_protected(&mut self, memory: &mut Memory, event: Event) -> Flow {
        let long = self.regs.is_ia32e();
        let vector = event.info.vector();
        let selector = u32::from(vector) << 3 | 2 | u32::from(event.external);
        let size = if long { 16 } else { 8 };
        let at = u64::from(vector) * size;
        if at + size - 1 > u64::from(self.regs.idtr.limit) {
            return fault(Exception::new(vector::GP, Some(selector)));
        }
        let base = self.regs.idtr.base.wrapping_add(at);
        let gate = self.read_linear(memory, base, 8, Access::SYSTEM_READ)?;
        if long {
            self.read_linear(memory, base.wrapping_add(8), 8, Access::SYSTEM_READ)?;
        }
        let kind = gate >> 40 & 0x1f;
        if kind != INTERRUPT_GATE && kind != TRAP_GATE {
            return fault(Exception::new(vector::GP, Some(selector)));
        }
        if gate >> 47 & 1 == 0 {
            return fault(Exception::new(vector::NP, Some(selector)));
        }

        let inner = self.regs.cpl() > 0;
        let task = self.regs.segments[segment::TR].base.wrapping_add(4);
        let rsp = self.regs.gprs[gpr::RSP];
        let width: u8 = if long { 8 } else { 4 };
        let mut top = match (inner, long) {
            (true, _) => self.read_linear(memory, task, width, Access::SYSTEM_READ)?,
            (false, true) => rsp,
            (false, false) => self.regs.segments[segment::SS].base.wrapping_add(rsp & 0xffff_ffff),
        };
        if long {
            top &= !15;
        }
        let selectors = self.regs.segments.map(|segment| u64::from(segment.selector));
        let rip = self.return_address(&event);
        let frame = [
            (inner || long).then_some(selectors[segment::SS]),
            (inner || long).then_some(rsp),
            Some(event.flags(self.regs.rflags)),
            Some(selectors[segment::CS]),
            Some(rip),
            event.info.has_error_code().then_some(event.error_code.into()),
        ];
        for value in frame.into_iter().flatten() {
            top = top.wrapping_sub(width.into());
            self.write_linear(memory, top, width, value, Access::PUSH)?;
        }
        Ok(())
    }

    /// Real-address mode: a table of far pointers, a frame of three words.
    fn deliver_real(&mut self, memory: &mut Memory, event: Event) -> Flow {
        let at = u64::from(event.info.vector()) * 4;
        if at + 3 > u64::from(self.regs.idtr.limit) {
            return fault(Exception::new(vector::GP, None));
        }
        let base = self.regs.idtr.base.wrapping_add(at);
        self.read_linear(memory, base, 4, Access::SYSTEM_READ)?;
        let mut pointer = self.regs.gprs[gpr::RSP];
        let cs = u64::from(self.regs.segments[segment::CS].selector);
        for value in [event.flags(self.regs.rflags), cs, self.return_address(&event)] {
            pointer = pointer.wrapping_sub(2) & 0xffff;
            let stack = self.regs.segments[segment::SS].base.wrapping_add(pointer);
            self.write_linear(memory, stack, 2, value, Access::PUSH)?;
        }
        Ok(())
    }

    /// RIP as it is pushed: past the instruction, for software events.
    fn return_address(&self, event: &Event) -> u64 {
        if event.is_software() { self.next_rip(event.length) } else { self.regs.rip }
    }

    /// Takes an event that waits, if nothing blocks it; also the exits of the window controls (SDM
    /// Vol. 3C, "Other Causes of VM Exits").
    pub(crate) fn take_event(&mut self, memory: &mut Memory) -> Option<Outcome> {
        let guest = self.guest_vmcs().map(|vmcs| (vmcs.pin(), vmcs.proc()));
        let virtual_nmis = guest.is_some_and(|(pin, _)| pin.contains(PinCtls::VIRTUAL_NMIS));
        let blocked = !self.blocking.is_empty();
        // With NMI exiting, an NMI exits unless NMIs are blocked; virtual ones block nothing else.
        if self.pending_nmi
            && !self.nmi_blocked
            && !self.blocking.contains(Interruptibility::MOV_SS)
        {
            self.pending_nmi = false;
            let event = Event::of_kind(kind::NMI, vector::NMI);
            if guest.is_some_and(|(pin, _)| pin.contains(PinCtls::NMI_EXITING)) {
                let info = ExitInfo::new(ExitReason::EXCEPTION_OR_NMI);
                return Some(self.vm_exit(memory, ExitInfo { interruption: Some(event), ..info }));
            }
            return Some(self.deliver_or_resolve(memory, event));
        }
        if let Some((_, proc)) = guest {
            let open = !self.virtual_nmi_blocked && !blocked;
            if proc.contains(ProcCtls::NMI_WINDOW_EXITING) && virtual_nmis && open {
                return Some(self.vm_exit(memory, ExitInfo::new(ExitReason::NMI_WINDOW)));
            }
        }
        let unmasked = self.regs.rflags & rflags::IF != 0 && !blocked;
        if let Some(number) = self.pending_interrupt {
            let exits =
                guest.is_some_and(|(pin, _)| pin.contains(PinCtls::EXTERNAL_INTERRUPT_EXITING));
            if exits {
                return Some(self.exit_on_interrupt(memory, number));
            }
            if unmasked {
                self.pending_interrupt = None;
                return Some(
                    self.deliver_or_resolve(memory, Event::of_kind(kind::EXTERNAL, number)),
                );
            }
        }
        let window =
            guest.is_some_and(|(_, proc)| proc.contains(ProcCtls::INTERRUPT_WINDOW_EXITING));
        if window && unmasked {
            return Some(self.vm_exit(memory, ExitInfo::new(ExitReason::INTERRUPT_WINDOW)));
        }
        None
    }

    /// An external interrupt exits. Unless the exit acknowledges it, it goes on waiting.
    fn exit_on_interrupt(&mut self, memory: &mut Memory, number: u8) -> Outcome {
        let acknowledges = self
            .guest_vmcs()
            .is_some_and(|vmcs| vmcs.exit().contains(vmx_defs::ExitCtls::ACK_INTERRUPT));
        let mut info = ExitInfo::new(ExitReason::EXTERNAL_INTERRUPT);
        if acknowledges {
            self.pending_interrupt = None;
            info.interruption = Some(Event::of_kind(kind::EXTERNAL, number));
        }
        self.vm_exit(memory, info)
    }

    /// Delivers an event, or resolves what stops the delivery.
    pub(crate) fn deliver_or_resolve(&mut self, memory: &mut Memory, event: Event) -> Outcome {
        match self.deliver(memory, event) {
            Ok(delivered) => Outcome::Delivered(delivered),
            Err(stop) => self.resolve(memory, stop, 0),
        }
    }

    /// Whether an EPT violation becomes a #VE (SDM Vol. 3C, "Convertible EPT Violations" and
    /// "Virtualization Exceptions").
    fn converts(&self, memory: &Memory, violation: &Violation) -> bool {
        let Some(vmcs) = self.guest_vmcs() else { return false };
        let area = vmcs.get(Field::VE_INFORMATION_ADDR);
        vmcs.proc2().contains(ProcCtls2::EPT_VIOLATION_VE)
            && !violation.suppress_ve
            && self.regs.cr0 & cr0::PE != 0
            && self.delivering.is_none()
            && memory.read_u32(Hpa::new(area + ve::BUSY)) == 0
    }

    /// SDM Vol. 3C, "Virtualization-Exception Information".
    fn store_ve_information(&self, memory: &mut Memory, violation: &Violation) {
        let Some(vmcs) = self.guest_vmcs() else { return };
        let area = vmcs.get(Field::VE_INFORMATION_ADDR);
        let at = |offset| Hpa::new(area + offset);
        let linear = violation.gva.map_or(0, |gva| gva.as_u64());
        memory.write_u32(at(ve::EXIT_REASON), ExitReason::EPT_VIOLATION.bits());
        memory.write_u32(at(ve::BUSY), ve::BUSY_VALUE);
        memory.write_u64(at(ve::EXIT_QUALIFICATION), violation.qualification.into_bits());
        memory.write_u64(at(ve::GUEST_LINEAR_ADDRESS), linear);
        memory.write_u64(at(ve::GUEST_PHYSICAL_ADDRESS), violation.gpa.as_u64());
        memory.write_sized(at(ve::EPTP_INDEX), 2, vmcs.get(Field::EPTP_INDEX));
    }
}

/// The VM exit of an EPT violation.
fn violation_exit(violation: &Violation) -> ExitInfo {
    let qualification = violation.qualification.into_bits();
    ExitInfo {
        gva: violation.gva,
        gpa: Some(violation.gpa),
        ..ExitInfo::qualified(ExitReason::EPT_VIOLATION, qualification)
    }
}

/// The interruption-information format of an event, for the VMCS.
pub(crate) fn information(event: &Event) -> u64 {
    event.info.into_bits().into()
}
