//! Whose is an exit of L2, and how does L1 get the ones that are its own?
//!
//! L0 wants few exits of L2 for itself: those of the shadow EPT, of MSRs that it keeps, and of
//! VMFUNC. All others happen because L1 asked for them, or always. An exit that L1 gets saves L2's
//! state into vmcs12 and loads L1's from there (SDM Vol. 3C, "VM Exits").

use crate::cache::VmcsId;
use crate::check::pdpte_is_valid;
use crate::engine::{Handled, Nested, Processor};
use crate::enter::{EFER_LME, PDPTES, read_pdptes, split_timer};
use crate::ept::{Resolution, wanted};
use crate::host::{Host, HostError, HostResult, MsrFault};
use crate::inject::{self, Exception, Outcome};
use crate::insn::{is_64_bit, register};
use crate::paging::{CR0_PE, CR0_PG, CR4_PAE, EFER_LMA};
use crate::regs::{Gprs, RAX, RCX, RDX};
use crate::vmcs12::Vmcs12;
use crate::{msr_area, msr_bitmap};
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls2};
use vmx_defs::ept::EptViolation;
use vmx_defs::event::{Interruptibility, IntrInfo, activity, kind, vector};
use vmx_defs::exit::{CrAccess, ENTRY_FAILURE};
use vmx_defs::{EptPermissions, ExitReason, Field, L1Gpa, L2Gpa};

/// Offset of the VMX-abort indicator in a VMCS region.
const ABORT_INDICATOR: u64 = 4;

/// VMX-abort indicators (SDM Vol. 3C, "VMX Aborts").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Abort {
    SavingMsrs = 1,
    HostPdptes = 2,
    LoadingMsrs = 4,
}

/// What L1 is told of an exit, where it is not what the hardware reported.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitInfo {
    /// The exit-reason field.
    reason: u32,
    qualification: u64,
    interruption: IntrInfo,
    error_code: u32,
    /// Whether IDT-vectoring information is the hardware's; else there is none.
    in_delivery: bool,
    /// The fields that are not above come from the hardware; else they are not changed.
    from_hardware: bool,
}

impl ExitInfo {
    /// A VM-entry failure, which leaves the other exit-information fields as they are.
    pub(crate) fn entry_failure(reason: ExitReason, qualification: u64) -> Self {
        Self {
            reason: reason.bits() | ENTRY_FAILURE,
            qualification,
            interruption: IntrInfo::new(),
            error_code: 0,
            in_delivery: false,
            from_hardware: false,
        }
    }

    /// The exit of the hardware, with another reason or qualification.
    fn instead(reason: ExitReason, qualification: u64) -> Self {
        Self {
            reason: reason.bits(),
            qualification,
            interruption: IntrInfo::new(),
            error_code: 0,
            in_delivery: true,
            from_hardware: true,
        }
    }

    /// A triple fault that an exception raised by L0 has brought about in L2. As for a double fault,
    /// the event that was being delivered has led to the exit itself, which so is none during event
    /// delivery (SDM Vol. 3C, "Information for VM Exits During Event Delivery").
    fn triple_fault() -> Self {
        Self { in_delivery: false, ..Self::instead(ExitReason::TRIPLE_FAULT, 0) }
    }

    /// An exit due to an event that the processor did not report as one of L2's.
    pub(crate) fn event(reason: ExitReason, interruption: IntrInfo) -> Self {
        Self { interruption, in_delivery: false, ..Self::instead(reason, 0) }
    }

    /// An exit due to an exception that L0 raised in L2.
    fn exception(exception: Exception) -> Self {
        let interruption = IntrInfo::exception(exception.vector, exception.error_code.is_some());
        Self {
            interruption,
            error_code: exception.error_code.unwrap_or(0),
            in_delivery: exception.vector != vector::DF,
            ..Self::instead(ExitReason::EXCEPTION_OR_NMI, 0)
        }
    }
}

impl Nested {
    /// Handles an exit of L2, whose VMCS is current; `reason` is its exit-reason field.
    ///
    /// # Errors
    /// [`HostError`]: a bug of the engine or its host; the machine can't go on.
    #[inline]
    pub fn l2_exit(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &mut Gprs,
        reason: ExitReason,
    ) -> HostResult<Handled> {
        if reason == ExitReason::VMFUNC {
            processor.launched = true;
            return self.vmfunc(processor, host, gprs);
        }
        if reason.is_entry_failure() {
            // The hardware refused what the checks let through. L1 gets the failure, which is what
            // it would have got without us.
            return self.refused(processor, host, reason);
        }
        processor.launched = true;
        let id = processor.current.ok_or(HostError::WrongState)?.id;
        let has_ept = self.vmcss.get(id).ok_or(HostError::WrongState)?.has_ept();
        match reason.basic() {
            ExitReason::EPT_VIOLATION if has_ept => self.ept_violation(processor, host, false),
            ExitReason::EPT_MISCONFIGURATION if has_ept => {
                self.ept_violation(processor, host, true)
            }
            // L2 runs on EPT01.
            ExitReason::EPT_VIOLATION => {
                let gpa = L2Gpa::new(host.vmread(Field::GUEST_PHYSICAL_ADDRESS)?);
                let hardware = EptViolation::from(host.vmread(Field::EXIT_QUALIFICATION)?);
                self.hidden(processor, host, gpa.without_ept(), hardware)
            }
            ExitReason::PREEMPTION_TIMER => self.preemption_timer(processor, host),
            ExitReason::RDMSR => self.rdmsr(processor, host, gprs),
            ExitReason::WRMSR => self.wrmsr(processor, host, gprs),
            ExitReason::CR_ACCESS => self.control_register(processor, host, gprs),
            _ => self.reflect(processor, host, None),
        }
    }

    /// The time that the processor counted down is over. It was L1's, unless there is a rest of that,
    /// or L1 has no timer running: then L2 goes on.
    fn preemption_timer(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
    ) -> HostResult<Handled> {
        let vmcs = self.vmcs12(processor).ok_or(HostError::WrongState)?;
        if processor.timer_rest == 0 {
            let own = self.stint().is_some() && !vmcs.pin().contains(PinCtls::PREEMPTION_TIMER);
            return if own { Ok(Handled::Enter) } else { self.reflect(processor, host, None) };
        }
        let (now, rest) = split_timer(Some(processor.timer_rest), self.stint());
        processor.timer_rest = rest;
        host.vmwrite(Field::PREEMPTION_TIMER, now.unwrap_or(0))?;
        Ok(Handled::Enter)
    }

    /// An EPT violation, or a misconfiguration: the shadow EPT has none but through a change of
    /// L1's tables that the walk will find.
    fn ept_violation(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        misconfiguration: bool,
    ) -> HostResult<Handled> {
        let gpa = L2Gpa::new(host.vmread(Field::GUEST_PHYSICAL_ADDRESS)?);
        let hardware = if misconfiguration {
            EptViolation::new().with_read(true)
        } else {
            EptViolation::from(host.vmread(Field::EXIT_QUALIFICATION)?)
        };
        match self.shadow.violation(host, processor.number, gpa, hardware)? {
            Resolution::Filled => {
                inject::retry(host, hardware.nmi_unblocking())?;
                Ok(Handled::Enter)
            }
            Resolution::Violation(told) => {
                // L1 is not offered advanced information for EPT violations.
                let told = told
                    .with_user_linear(false)
                    .with_linear_writable(false)
                    .with_linear_execute_disabled(false);
                let info = ExitInfo::instead(ExitReason::EPT_VIOLATION, told.into_bits());
                self.reflect(processor, host, Some(info))
            }
            Resolution::Misconfiguration => {
                let info = ExitInfo::instead(ExitReason::EPT_MISCONFIGURATION, 0);
                self.reflect(processor, host, Some(info))
            }
            Resolution::Hidden(gpa) => self.hidden(processor, host, gpa, hardware),
        }
    }

    /// L2 touched what EPT01 denies. Where L1 has put its APIC-access page there, the access is one to
    /// that page, which needs no memory behind it. A write to a page whose writes are tracked is the
    /// host's. All else is what L0 hides, which can only be read: #GP(0), as for L1.
    fn hidden(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gpa: L1Gpa,
        hardware: EptViolation,
    ) -> HostResult<Handled> {
        let vmcs = self.vmcs12(processor).ok_or(HostError::WrongState)?;
        if vmcs.proc2().contains(ProcCtls2::VIRTUALIZE_APIC_ACCESSES)
            && gpa.page().as_u64() == vmcs.get(Field::APIC_ACCESS_ADDR)
        {
            let vectoring = IntrInfo::from(host.vmread(Field::IDT_VECTORING_INFO)? as u32);
            let qualification = apic_access(gpa, hardware, vectoring.valid());
            let info = ExitInfo::instead(ExitReason::APIC_ACCESS, qualification);
            return self.reflect(processor, host, Some(info));
        }
        let flags = vmcs.has_ept() && vmcs.eptp().accessed_dirty();
        let missing = wanted(hardware, flags) - host.translate(gpa).permissions;
        if missing.is_empty() {
            // EPT01 has come to allow it; the processor did not know yet.
            inject::retry(host, hardware.nmi_unblocking())?;
            return Ok(Handled::Enter);
        }
        if missing == EptPermissions::WRITE
            && let Some(handled) = self.tracked_write(gpa)
        {
            return Ok(handled);
        }
        self.raise(processor, host, Exception::new(vector::GP))
    }

    /// The host can't carry out the write of [`Handled::TrackedWrite`], nor let it through: L2 gets
    /// #GP(0), as it does in memory that L0 hides.
    ///
    /// # Errors
    /// As for [`Self::l2_exit`].
    pub fn refuse_write(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
    ) -> HostResult<Handled> {
        self.raise(processor, host, Exception::new(vector::GP))
    }

    /// Raises an exception in L2, or gives L1 the exit that its exception bitmap asks for.
    fn raise(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        exception: Exception,
    ) -> HostResult<Handled> {
        let vectoring = IntrInfo::from(host.vmread(Field::IDT_VECTORING_INFO)? as u32);
        let vmcs = self.vmcs12(processor).ok_or(HostError::WrongState)?;
        match inject::combine(vectoring, exception) {
            Outcome::TripleFault => self.reflect(processor, host, Some(ExitInfo::triple_fault())),
            // None of the exceptions raised is a page fault, whose bit the error code could invert.
            Outcome::Exception(exception)
                if vmcs.get(Field::EXCEPTION_BITMAP) >> (exception.vector & 31) & 1 != 0 =>
            {
                inject::set_resume_flag(host, exception)?;
                // Real-address mode has no error codes (SDM Vol. 3C, "Information for VM Exits Due
                // to Vectored Events").
                let protected = host.vmread(Field::GUEST_CR0)? & CR0_PE != 0;
                let error_code = exception.error_code.filter(|_| protected);
                let exception = Exception { error_code, ..exception };
                self.reflect(processor, host, Some(ExitInfo::exception(exception)))
            }
            Outcome::Exception(_) => {
                inject::raise(host, vectoring, exception)?;
                Ok(Handled::Enter)
            }
        }
    }

    fn rdmsr(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &mut Gprs,
    ) -> HostResult<Handled> {
        let index = gprs.get(RCX) as u32;
        let vmcs = self.vmcs12(processor).ok_or(HostError::WrongState)?;
        if msr_bitmap::l1_intercepts(host, vmcs, index, false) {
            return self.reflect(processor, host, None);
        }
        match host.read_msr(index) {
            Ok(value) => {
                gprs.set(RAX, value & 0xffff_ffff);
                gprs.set(RDX, value >> 32);
                inject::advance_rip(host)?;
                Ok(Handled::Enter)
            }
            Err(MsrFault) => self.raise(processor, host, Exception::new(vector::GP)),
        }
    }

    fn wrmsr(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &mut Gprs,
    ) -> HostResult<Handled> {
        let index = gprs.get(RCX) as u32;
        let vmcs = self.vmcs12(processor).ok_or(HostError::WrongState)?;
        if msr_bitmap::l1_intercepts(host, vmcs, index, true) {
            return self.reflect(processor, host, None);
        }
        let value = gprs.get(RAX) & 0xffff_ffff | gprs.get(RDX) << 32;
        match host.write_msr(index, value) {
            Ok(()) => {
                inject::advance_rip(host)?;
                Ok(Handled::Enter)
            }
            Err(MsrFault) => self.raise(processor, host, Exception::new(vector::GP)),
        }
    }

    /// An exit for a control register: L1's, but for MOV to CR4 of bits that L1 does not want and is
    /// not offered. They are reserved (SDM Vol. 2B, "MOV—Move to/from Control Registers").
    fn control_register(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &Gprs,
    ) -> HostResult<Handled> {
        const MOV_TO: u8 = 0;
        let access = CrAccess::from(host.vmread(Field::EXIT_QUALIFICATION)?);
        if (access.access(), access.register()) == (MOV_TO, 4) {
            let value = register(host, gprs, access.gpr())?;
            let value = if is_64_bit(host)? { value } else { value & 0xffff_ffff };
            let vmcs = self.vmcs12(processor).ok_or(HostError::WrongState)?;
            if (value ^ vmcs.get(Field::CR4_SHADOW)) & vmcs.get(Field::CR4_MASK) == 0 {
                return self.raise(processor, host, Exception::new(vector::GP));
            }
        }
        self.reflect(processor, host, None)
    }

    /// The hardware refused vmcs02. The guest state there is what vmcs12 says, so nothing is saved.
    #[cold]
    fn refused(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        reason: ExitReason,
    ) -> HostResult<Handled> {
        let id = processor.current.ok_or(HostError::WrongState)?.id;
        let qualification = host.vmread(Field::EXIT_QUALIFICATION)?;
        let info = ExitInfo::entry_failure(reason.basic(), qualification);
        host.vmptrld(processor.vmcs01)?;
        processor.known = false;
        processor.merged = 0;
        self.stop_l2(processor);
        self.fail_entry(processor, host, id, info)
    }

    pub(crate) fn stop_l2(&mut self, processor: &mut Processor) {
        processor.running = false;
        self.shadow.leave(processor.number);
        if let Some(page) = self.virtual_apics.get_mut(processor.number) {
            *page = None;
        }
    }

    /// A VM entry of L1 that got past its controls and failed: an exit that saves nothing of L2.
    /// vmcs01 is current.
    pub(crate) fn fail_entry(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        id: VmcsId,
        info: ExitInfo,
    ) -> HostResult<Handled> {
        self.stop_l2(processor);
        let pat = host.vmread(Field::GUEST_PAT)?;
        let efer = host.vmread(Field::GUEST_EFER)?;
        let vmcs = self.vmcss.get_mut(id).ok_or(HostError::WrongState)?;
        vmcs.set(Field::EXIT_REASON, info.reason.into());
        vmcs.set(Field::EXIT_QUALIFICATION, info.qualification);
        // Blocking by NMI is as it was: L1's own, since L2 did not run.
        let blocked =
            Interruptibility::from_bits_retain(host.vmread(Field::GUEST_INTERRUPTIBILITY)? as u32)
                & Interruptibility::NMI;
        let has_vpid = vmcs.has_vpid();
        processor.vpids.leave(host, has_vpid)?;
        let kept = Kept { pat, efer, blocked };
        let loaded = load_host_state(vmcs, host, kept, self.config.caps.physical_width)?;
        finish(processor, host, loaded)
    }

    /// Gives L1 the exit: that of the hardware, or `info` in its place. vmcs02 is current, then
    /// vmcs01.
    pub(crate) fn reflect(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        info: Option<ExitInfo>,
    ) -> HostResult<Handled> {
        let id = processor.current.ok_or(HostError::WrongState)?.id;
        let vmcs = self.vmcss.get_mut(id).ok_or(HostError::WrongState)?;

        for field in EXIT_FIELDS {
            let value = host.vmread(field)?;
            vmcs.keep(field, value);
        }
        if let Some(info) = info {
            debug_assert!(info.from_hardware, "entry failures save no state");
            vmcs.set(Field::EXIT_REASON, info.reason.into());
            vmcs.set(Field::EXIT_QUALIFICATION, info.qualification);
            vmcs.set(Field::EXIT_INTR_INFO, u32::from(info.interruption).into());
            if info.interruption.has_error_code() {
                vmcs.set(Field::EXIT_INTR_ERROR, info.error_code.into());
            }
            if !info.in_delivery {
                vmcs.set(Field::IDT_VECTORING_INFO, 0);
            }
        }
        // An event is injected once (SDM Vol. 3C, "Recording VM-Exit Information and Updating
        // VM-entry Control Fields").
        let injection = vmcs.get(Field::ENTRY_INTR_INFO) & 0x7fff_ffff;
        vmcs.set(Field::ENTRY_INTR_INFO, injection);

        for field in &self.plain_guest {
            let value = host.vmread(*field)?;
            vmcs.keep(*field, value);
        }
        let rest = core::mem::take(&mut processor.timer_rest);
        let kept = save_switched_state(vmcs, host, &mut processor.values, rest)?;

        processor.counters.reflected += 1;
        let area = L1Gpa::new(vmcs.get(Field::EXIT_MSR_STORE_ADDR));
        let stored = msr_area::store(host, area, vmcs.get32(Field::EXIT_MSR_STORE_COUNT));

        host.vmptrld(processor.vmcs01)?;
        let has_vpid = vmcs.has_vpid();
        processor.vpids.leave(host, has_vpid)?;
        let loaded = match stored {
            Ok(()) => load_host_state(vmcs, host, kept, self.config.caps.physical_width)?,
            Err(_) => Err(Abort::SavingMsrs),
        };
        self.stop_l2(processor);
        finish(processor, host, loaded)
    }
}

/// Exit qualification of an access to the APIC-access page (SDM Vol. 3C, "Exit Qualification for
/// APIC-Access VM Exits from Linear Accesses and Guest-Physical Accesses"), for an access that an
/// EPT violation described.
fn apic_access(gpa: L1Gpa, access: EptViolation, in_delivery: bool) -> u64 {
    let kind = match (access.translated(), in_delivery) {
        (true, true) => 3,
        (true, false) if access.fetch() => 2,
        (true, false) => u64::from(access.write()),
        (false, true) => return 10 << 12,
        (false, false) => return 15 << 12,
    };
    gpa.page_offset() | kind << 12
}

/// The fields that describe an exit.
const EXIT_FIELDS: [Field; 10] = [
    Field::EXIT_REASON,
    Field::EXIT_QUALIFICATION,
    Field::EXIT_INTR_INFO,
    Field::EXIT_INTR_ERROR,
    Field::IDT_VECTORING_INFO,
    Field::IDT_VECTORING_ERROR,
    Field::EXIT_INSTRUCTION_LEN,
    Field::EXIT_INSTRUCTION_INFO,
    Field::GUEST_LINEAR_ADDRESS,
    Field::GUEST_PHYSICAL_ADDRESS,
];

/// What L1's processor keeps of L2's, where vmcs12 does not load it.
#[derive(Clone, Copy, Debug)]
struct Kept {
    pat: u64,
    efer: u64,
    /// Blocking by NMI, which an exit does not change.
    blocked: Interruptibility,
}

/// Saves the state of L2 that vmcs12's exit controls select (SDM Vol. 3C, "Saving Guest State"),
/// from vmcs02, which is current.
fn save_switched_state<H: Host>(
    vmcs: &mut Vmcs12,
    host: &mut H,
    values: &mut Vmcs12,
    timer_rest: u64,
) -> HostResult<Kept> {
    let exit = vmcs.exit_ctls();
    let mut save = |vmcs: &mut Vmcs12, host: &mut H, field, wanted| {
        let value = host.vmread(field)?;
        values.set(field, value);
        if wanted {
            vmcs.set(field, value);
        }
        HostResult::Ok(value)
    };
    let debug = exit.contains(ExitCtls::SAVE_DEBUG_CONTROLS);
    save(vmcs, host, Field::GUEST_DR7, debug)?;
    save(vmcs, host, Field::GUEST_DEBUGCTL, debug)?;
    let pat = save(vmcs, host, Field::GUEST_PAT, exit.contains(ExitCtls::SAVE_PAT))?;
    let efer = save(vmcs, host, Field::GUEST_EFER, exit.contains(ExitCtls::SAVE_EFER))?;
    if vmcs.pin().contains(PinCtls::PREEMPTION_TIMER) {
        let wanted = exit.contains(ExitCtls::SAVE_PREEMPTION_TIMER);
        let counted = save(vmcs, host, Field::PREEMPTION_TIMER, false)?;
        if wanted {
            vmcs.set(Field::PREEMPTION_TIMER, counted + timer_rest);
        }
    }
    let pae = vmcs.get(Field::GUEST_CR0) & CR0_PG != 0
        && vmcs.get(Field::GUEST_CR4) & CR4_PAE != 0
        && efer & EFER_LMA == 0;
    if pae {
        let wanted = vmcs.has_ept();
        for field in PDPTES {
            save(vmcs, host, field, wanted)?;
        }
    }
    let mut entry = vmcs.entry_ctls();
    entry.set(EntryCtls::IA32E_MODE_GUEST, efer & EFER_LMA != 0);
    vmcs.set(Field::ENTRY_CTLS, entry.bits().into());

    // With virtual NMIs the guest's blocking is of virtual ones; else it is the processor's, and an
    // NMI that exits sets it (SDM Vol. 3C, "Updating Non-Register State").
    let interruptibility =
        Interruptibility::from_bits_retain(vmcs.get32(Field::GUEST_INTERRUPTIBILITY));
    let mut blocked = Interruptibility::empty();
    if !vmcs.pin().contains(PinCtls::VIRTUAL_NMIS) {
        blocked = interruptibility & Interruptibility::NMI;
    }
    let interruption = IntrInfo::from(vmcs.get32(Field::EXIT_INTR_INFO));
    if vmcs.get32(Field::EXIT_REASON) == ExitReason::EXCEPTION_OR_NMI.bits()
        && interruption.kind() == kind::NMI
    {
        blocked = Interruptibility::NMI;
    }
    Ok(Kept { pat, efer, blocked })
}

/// Access rights that an exit gives L1's segment registers (SDM Vol. 3C, "Loading Host Segment and
/// Descriptor-Table Registers").
mod rights {
    /// 64-bit code.
    pub(super) const CODE64: u64 = 0xa09b;
    /// 32-bit code.
    pub(super) const CODE32: u64 = 0xc09b;
    /// Read-write data.
    pub(super) const DATA: u64 = 0xc093;
    /// Unusable, the rest as it would be.
    pub(super) const UNUSABLE: u64 = 1 << 16;
    /// Busy TSS.
    pub(super) const TSS: u64 = 0x8b;
}

/// Bits of CR0 that an exit leaves as they are: ET, NW, CD and the reserved ones.
const CR0_NOT_LOADED: u64 = 0xffff_ffff_0000_0000 | 0x6000_0000 | 0x1ff8_0000 | 1 << 17 | 0xffd0;
/// CR4.PCIDE.
const CR4_PCIDE: u64 = 1 << 17;

/// Loads L1's state from vmcs12's host-state area into vmcs01, which is current (SDM Vol. 3C,
/// "Loading Host State").
fn load_host_state(
    vmcs: &Vmcs12,
    host: &mut impl Host,
    kept: Kept,
    physical_width: u8,
) -> HostResult<Result<(), Abort>> {
    let exit = vmcs.exit_ctls();
    let long = exit.contains(ExitCtls::HOST_ADDRESS_SPACE_SIZE);

    let cr0 = host.vmread(Field::GUEST_CR0)? & CR0_NOT_LOADED
        | vmcs.get(Field::HOST_CR0) & !CR0_NOT_LOADED;
    let cr3 = vmcs.get(Field::HOST_CR3);
    let cr4 = match vmcs.get(Field::HOST_CR4) {
        cr4 if long => cr4 | CR4_PAE,
        cr4 => cr4 & !CR4_PCIDE,
    };
    let mut put = |field, value| host.vmwrite(field, value);
    put(Field::GUEST_CR0, cr0)?;
    put(Field::CR0_SHADOW, cr0)?;
    put(Field::GUEST_CR3, cr3)?;
    put(Field::GUEST_CR4, cr4)?;
    put(Field::CR4_SHADOW, cr4)?;
    put(Field::GUEST_DR7, 0x400)?;
    put(Field::GUEST_DEBUGCTL, 0)?;
    put(Field::GUEST_SYSENTER_CS, vmcs.get(Field::HOST_SYSENTER_CS))?;
    put(Field::GUEST_SYSENTER_ESP, vmcs.get(Field::HOST_SYSENTER_ESP))?;
    put(Field::GUEST_SYSENTER_EIP, vmcs.get(Field::HOST_SYSENTER_EIP))?;
    let pat = if exit.contains(ExitCtls::LOAD_PAT) { vmcs.get(Field::HOST_PAT) } else { kept.pat };
    put(Field::GUEST_PAT, pat)?;
    let efer = if exit.contains(ExitCtls::LOAD_EFER) {
        vmcs.get(Field::HOST_EFER)
    } else {
        let mode = EFER_LMA | EFER_LME;
        kept.efer & !mode | if long { mode } else { 0 }
    };
    put(Field::GUEST_EFER, efer)?;

    for (selector, from, base, limit, access, base_from) in SEGMENTS {
        let value = vmcs.get(from);
        put(selector, value)?;
        put(base, base_from.map_or(0, |from| vmcs.get(from)))?;
        put(limit, 0xffff_ffff)?;
        let unusable = if value == 0 { rights::UNUSABLE } else { 0 };
        put(access, rights::DATA | unusable)?;
    }
    put(Field::GUEST_CS_SELECTOR, vmcs.get(Field::HOST_CS_SELECTOR))?;
    put(Field::GUEST_CS_BASE, 0)?;
    put(Field::GUEST_CS_LIMIT, 0xffff_ffff)?;
    put(Field::GUEST_CS_AR, if long { rights::CODE64 } else { rights::CODE32 })?;
    put(Field::GUEST_TR_SELECTOR, vmcs.get(Field::HOST_TR_SELECTOR))?;
    put(Field::GUEST_TR_BASE, vmcs.get(Field::HOST_TR_BASE))?;
    put(Field::GUEST_TR_LIMIT, 0x67)?;
    put(Field::GUEST_TR_AR, rights::TSS)?;
    put(Field::GUEST_LDTR_SELECTOR, 0)?;
    put(Field::GUEST_LDTR_AR, rights::UNUSABLE)?;
    put(Field::GUEST_GDTR_BASE, vmcs.get(Field::HOST_GDTR_BASE))?;
    put(Field::GUEST_GDTR_LIMIT, 0xffff)?;
    put(Field::GUEST_IDTR_BASE, vmcs.get(Field::HOST_IDTR_BASE))?;
    put(Field::GUEST_IDTR_LIMIT, 0xffff)?;

    put(Field::GUEST_RIP, vmcs.get(Field::HOST_RIP))?;
    put(Field::GUEST_RSP, vmcs.get(Field::HOST_RSP))?;
    put(Field::GUEST_RFLAGS, 2)?;
    put(Field::GUEST_INTERRUPTIBILITY, kept.blocked.bits().into())?;
    put(Field::GUEST_ACTIVITY, activity::ACTIVE.into())?;
    put(Field::GUEST_PENDING_DEBUG, 0)?;
    put(Field::ENTRY_INTR_INFO, 0)?;
    let mut entry = EntryCtls::from_bits_retain(host.vmread(Field::ENTRY_CTLS)? as u32);
    entry.set(EntryCtls::IA32E_MODE_GUEST, long);
    host.vmwrite(Field::ENTRY_CTLS, entry.bits().into())?;

    if !long && cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 {
        let pdptes = read_pdptes(host, L1Gpa::new(cr3 & 0xffff_ffe0));
        if !pdptes.iter().all(|pdpte| pdpte_is_valid(*pdpte, physical_width)) {
            return Ok(Err(Abort::HostPdptes));
        }
        for (field, pdpte) in PDPTES.into_iter().zip(pdptes) {
            host.vmwrite(field, pdpte)?;
        }
    }
    let area = L1Gpa::new(vmcs.get(Field::EXIT_MSR_LOAD_ADDR));
    let loaded = msr_area::load(host, area, vmcs.get32(Field::EXIT_MSR_LOAD_COUNT));
    Ok(loaded.map_err(|_| Abort::LoadingMsrs))
}

/// For each data segment: selector of L1, where it comes from, base, limit, access rights, and where
/// the base comes from.
const SEGMENTS: [(Field, Field, Field, Field, Field, Option<Field>); 5] = [
    (
        Field::GUEST_ES_SELECTOR,
        Field::HOST_ES_SELECTOR,
        Field::GUEST_ES_BASE,
        Field::GUEST_ES_LIMIT,
        Field::GUEST_ES_AR,
        None,
    ),
    (
        Field::GUEST_SS_SELECTOR,
        Field::HOST_SS_SELECTOR,
        Field::GUEST_SS_BASE,
        Field::GUEST_SS_LIMIT,
        Field::GUEST_SS_AR,
        None,
    ),
    (
        Field::GUEST_DS_SELECTOR,
        Field::HOST_DS_SELECTOR,
        Field::GUEST_DS_BASE,
        Field::GUEST_DS_LIMIT,
        Field::GUEST_DS_AR,
        None,
    ),
    (
        Field::GUEST_FS_SELECTOR,
        Field::HOST_FS_SELECTOR,
        Field::GUEST_FS_BASE,
        Field::GUEST_FS_LIMIT,
        Field::GUEST_FS_AR,
        Some(Field::HOST_FS_BASE),
    ),
    (
        Field::GUEST_GS_SELECTOR,
        Field::HOST_GS_SELECTOR,
        Field::GUEST_GS_BASE,
        Field::GUEST_GS_LIMIT,
        Field::GUEST_GS_AR,
        Some(Field::HOST_GS_BASE),
    ),
];

/// Ends an exit to L1. A VMX abort leaves its indicator in the VMCS region and the processor in
/// shutdown (SDM Vol. 3C, "VMX Aborts").
fn finish(
    processor: &mut Processor,
    host: &mut impl Host,
    loaded: Result<(), Abort>,
) -> HostResult<Handled> {
    match loaded {
        Ok(()) => Ok(Handled::Enter),
        Err(abort) => {
            let region = processor.current.ok_or(HostError::WrongState)?.region;
            if let Some(at) = region.checked_add(ABORT_INDICATOR) {
                host.write(at, &(abort as u32).to_le_bytes());
            }
            host.vmwrite(Field::GUEST_ACTIVITY, activity::SHUTDOWN.into())?;
            Ok(Handled::Shutdown)
        }
    }
}

#[cfg(test)]
mod tests;
