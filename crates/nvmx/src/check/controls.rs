//! Are the VM-execution, VM-exit and VM-entry control fields ones that VM entry accepts?
//!
//! SDM Vol. 3C, "Checks on VMX Controls".

use super::{CR0_PE, require};
use crate::caps::{Caps, MSR_AREA_MAX};
use crate::vmcs12::Vmcs12;
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::controls::{ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::event::{IntrInfo, kind, vector};
use vmx_defs::{Field, L1Gpa};

/// One of the three lists of MSRs that a VMCS points to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrArea {
    /// VM-exit MSR-store area.
    ExitStore,
    /// VM-exit MSR-load area.
    ExitLoad,
    /// VM-entry MSR-load area.
    EntryLoad,
}

impl MsrArea {
    /// All three.
    pub const ALL: [Self; 3] = [Self::ExitStore, Self::ExitLoad, Self::EntryLoad];

    /// The fields that hold the number of entries and the address.
    #[inline]
    pub const fn fields(self) -> (Field, Field) {
        match self {
            Self::ExitStore => (Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_STORE_ADDR),
            Self::ExitLoad => (Field::EXIT_MSR_LOAD_COUNT, Field::EXIT_MSR_LOAD_ADDR),
            Self::EntryLoad => (Field::ENTRY_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_ADDR),
        }
    }
}

/// The requirement on control fields that a VMCS does not meet: VMfailValid with error 7.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ControlFailure {
    /// A pin-based control has a setting that its capability MSR does not allow.
    PinControls,
    /// A primary processor-based control has a setting that is not allowed.
    ProcControls,
    /// A secondary processor-based control has a setting that is not allowed.
    SecondaryControls,
    /// A VM-exit control has a setting that is not allowed.
    ExitControls,
    /// A VM-entry control has a setting that is not allowed; "entry to SMM" and "deactivate
    /// dual-monitor treatment" are never allowed.
    EntryControls,
    /// More CR3-target values than IA32_VMX_MISC reports.
    Cr3TargetCount,
    /// The address of I/O bitmap A is unaligned or too wide.
    IoBitmapA,
    /// The address of I/O bitmap B is unaligned or too wide.
    IoBitmapB,
    /// The address of the MSR bitmaps is unaligned or too wide.
    MsrBitmap,
    /// The address of the virtual-APIC page is unaligned or too wide.
    VirtualApicPage,
    /// Bits 31:4 of the TPR threshold are not 0.
    TprThresholdReserved,
    /// The TPR threshold is greater than bits 7:4 of VTPR.
    TprThresholdAboveVtpr,
    /// Virtual NMIs without NMI exiting.
    VirtualNmisWithoutNmiExiting,
    /// NMI-window exiting without virtual NMIs.
    NmiWindowWithoutVirtualNmis,
    /// The address of the APIC-access page is unaligned or too wide.
    ApicAccessPage,
    /// VPID 0000H.
    VpidZero,
    /// The EPT pointer has a reserved bit, memory type, walk length or flag that is not supported.
    EptPointer,
    /// Unrestricted guest without EPT.
    UnrestrictedGuestWithoutEpt,
    /// A VM function is enabled that does not exist.
    VmFunctionReserved,
    /// EPTP switching without EPT.
    EptpSwitchingWithoutEpt,
    /// The EPTP-list address is unaligned or too wide.
    EptpList,
    /// TSC scaling with a multiplier of 0. The SDM names no such rule, but processors are known to
    /// refuse it, so we do.
    TscMultiplierZero,
    /// Save VMX-preemption timer value without the timer.
    SaveTimerWithoutTimer,
    /// The address of an MSR area is not 16-byte aligned.
    MsrAreaUnaligned(MsrArea),
    /// An MSR area begins or ends beyond the physical-address width.
    MsrAreaBeyondWidth(MsrArea),
    /// An MSR area has more than [`MSR_AREA_MAX`] entries. Architecturally undefined; we refuse.
    MsrAreaTooLong(MsrArea),
    /// The event type to inject is reserved, or is "other event" where there is no monitor trap
    /// flag.
    InjectionType,
    /// The vector to inject does not fit its type.
    InjectionVector,
    /// An error code is to be delivered with an event that has none.
    InjectionErrorCodeUnexpected,
    /// No error code is to be delivered with an exception that has one.
    InjectionErrorCodeMissing,
    /// A reserved bit of the VM-entry interruption-information field is not 0.
    InjectionReserved,
    /// The VM-entry exception error code has bits that no error code has.
    InjectionErrorCodeReserved,
    /// The VM-entry instruction length is out of range for a software event.
    InjectionLength,
}

use ControlFailure as F;

/// Where the byte is that the TPR threshold is compared with (VTPR, in the virtual-APIC page), if
/// there is a rule that compares and the page is where a page may be.
#[inline]
pub fn vtpr_to_read(vmcs: &Vmcs12, caps: &Caps) -> Option<L1Gpa> {
    const VTPR: u64 = 0x80;
    if compares_tpr(vmcs) && is_page(vmcs, caps, Field::VIRTUAL_APIC_ADDR) {
        L1Gpa::new(vmcs.get(Field::VIRTUAL_APIC_ADDR)).checked_add(VTPR)
    } else {
        None
    }
}

/// Checks the control fields. `vtpr` is the byte that [`vtpr_to_read`] names, or 0 where it names
/// none.
///
/// # Errors
/// The first requirement that is not met.
pub fn controls(vmcs: &Vmcs12, caps: &Caps, vtpr: u8) -> Result<(), ControlFailure> {
    execution(vmcs, caps, vtpr)?;
    exit_and_entry(vmcs, caps)?;
    injection(vmcs, caps)
}

fn compares_tpr(vmcs: &Vmcs12) -> bool {
    vmcs.proc().contains(ProcCtls::TPR_SHADOW)
        && !vmcs.proc2().contains(ProcCtls2::VIRTUALIZE_APIC_ACCESSES)
}

/// Whether `field` holds a 4-KByte aligned address within the physical-address width.
fn is_page(vmcs: &Vmcs12, caps: &Caps, field: Field) -> bool {
    let address = L1Gpa::new(vmcs.get(field));
    address.is_aligned(PAGE_SIZE) && address.fits(caps.physical_width)
}

/// "VM-Execution Control Fields".
fn execution(vmcs: &Vmcs12, caps: &Caps, vtpr: u8) -> Result<(), F> {
    let (pin, proc, proc2) = (vmcs.pin(), vmcs.proc(), vmcs.proc2());
    require(caps.pin.permits(pin.bits()), F::PinControls)?;
    require(caps.proc.permits(proc.bits()), F::ProcControls)?;
    if proc.contains(ProcCtls::SECONDARY_CONTROLS) {
        require(caps.proc2.permits(proc2.bits()), F::SecondaryControls)?;
    }
    let targets = vmcs.get32(Field::CR3_TARGET_COUNT);
    require(targets <= u32::from(caps.misc.cr3_targets()), F::Cr3TargetCount)?;

    if proc.contains(ProcCtls::IO_BITMAPS) {
        require(is_page(vmcs, caps, Field::IO_BITMAP_A), F::IoBitmapA)?;
        require(is_page(vmcs, caps, Field::IO_BITMAP_B), F::IoBitmapB)?;
    }
    if proc.contains(ProcCtls::MSR_BITMAPS) {
        require(is_page(vmcs, caps, Field::MSR_BITMAP), F::MsrBitmap)?;
    }

    if proc.contains(ProcCtls::TPR_SHADOW) {
        require(is_page(vmcs, caps, Field::VIRTUAL_APIC_ADDR), F::VirtualApicPage)?;
        let threshold = vmcs.get32(Field::TPR_THRESHOLD);
        require(threshold & !0xf == 0, F::TprThresholdReserved)?;
        if compares_tpr(vmcs) {
            require(threshold <= u32::from(vtpr >> 4), F::TprThresholdAboveVtpr)?;
        }
    }

    if !pin.contains(PinCtls::NMI_EXITING) {
        require(!pin.contains(PinCtls::VIRTUAL_NMIS), F::VirtualNmisWithoutNmiExiting)?;
    }
    if !pin.contains(PinCtls::VIRTUAL_NMIS) {
        let window = proc.contains(ProcCtls::NMI_WINDOW_EXITING);
        require(!window, F::NmiWindowWithoutVirtualNmis)?;
    }

    if proc2.contains(ProcCtls2::VIRTUALIZE_APIC_ACCESSES) {
        require(is_page(vmcs, caps, Field::APIC_ACCESS_ADDR), F::ApicAccessPage)?;
    }
    if proc2.contains(ProcCtls2::VPID) {
        require(vmcs.get(Field::VPID) != 0, F::VpidZero)?;
    }
    if proc2.contains(ProcCtls2::EPT) {
        require(vmcs.eptp().is_valid(caps.ept_vpid, caps.physical_width), F::EptPointer)?;
    } else {
        let unrestricted = proc2.contains(ProcCtls2::UNRESTRICTED_GUEST);
        require(!unrestricted, F::UnrestrictedGuestWithoutEpt)?;
    }

    let functions = vmcs.vm_functions();
    require(functions.difference(caps.vm_functions).is_empty(), F::VmFunctionReserved)?;
    if functions.contains(VmFuncCtls::EPTP_SWITCHING) {
        require(proc2.contains(ProcCtls2::EPT), F::EptpSwitchingWithoutEpt)?;
        require(is_page(vmcs, caps, Field::EPTP_LIST_ADDRESS), F::EptpList)?;
    }
    if proc2.contains(ProcCtls2::TSC_SCALING) {
        require(vmcs.get(Field::TSC_MULTIPLIER) != 0, F::TscMultiplierZero)?;
    }
    Ok(())
}

/// "VM-Exit Control Fields" and "VM-Entry Control Fields", event injection excepted.
fn exit_and_entry(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let exit = vmcs.exit_ctls();
    require(caps.exit.permits(exit.bits()), F::ExitControls)?;
    if !vmcs.pin().contains(PinCtls::PREEMPTION_TIMER) {
        let save = exit.contains(ExitCtls::SAVE_PREEMPTION_TIMER);
        require(!save, F::SaveTimerWithoutTimer)?;
    }
    require(caps.entry.permits(vmcs.entry_ctls().bits()), F::EntryControls)?;
    MsrArea::ALL.iter().try_for_each(|area| msr_area(vmcs, caps, *area))
}

fn msr_area(vmcs: &Vmcs12, caps: &Caps, area: MsrArea) -> Result<(), F> {
    const ENTRY_SIZE: u64 = 16;
    let (count, address) = area.fields();
    let (count, address) = (vmcs.get32(count), L1Gpa::new(vmcs.get(address)));
    if count == 0 {
        return Ok(());
    }
    require(address.is_aligned(ENTRY_SIZE), F::MsrAreaUnaligned(area))?;
    let last = address.checked_add(u64::from(count) * ENTRY_SIZE - 1);
    let fits = last.is_some_and(|last| last.fits(caps.physical_width));
    require(fits, F::MsrAreaBeyondWidth(area))?;
    require(count <= MSR_AREA_MAX, F::MsrAreaTooLong(area))
}

/// "VM-Entry Control Fields", the part on event injection.
fn injection(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let info = IntrInfo::from(vmcs.get32(Field::ENTRY_INTR_INFO));
    if !info.valid() {
        return Ok(());
    }
    // There is no monitor trap flag, whose pending exit is what "other event" means.
    let fits = match info.kind() {
        kind::EXTERNAL
        | kind::SOFTWARE_INTERRUPT
        | kind::PRIVILEGED_SOFTWARE_EXCEPTION
        | kind::SOFTWARE_EXCEPTION => true,
        kind::NMI => info.vector() == vector::NMI,
        kind::HARDWARE_EXCEPTION => info.vector() < 32,
        _ => return Err(F::InjectionType),
    };
    require(fits, F::InjectionVector)?;

    // In real-address mode nothing is pushed with an exception; only an unrestricted guest can be
    // in it (without, VM entry fails later for its CR0).
    let protected = vmcs.get(Field::GUEST_CR0) & CR0_PE != 0
        || !vmcs.proc2().contains(ProcCtls2::UNRESTRICTED_GUEST);
    let exception = info.kind() == kind::HARDWARE_EXCEPTION && protected;
    // Which vectors have an error code is asked only where IA32_VMX_BASIC bit 56 is 0, and such
    // processors have no control protection.
    let has_code = vector::has_error_code(info.vector()) && info.vector() != vector::CP;
    let any = caps.basic.any_error_code();
    if info.has_error_code() {
        require(exception && (any || has_code), F::InjectionErrorCodeUnexpected)?;
    } else {
        require(!exception || any || !has_code, F::InjectionErrorCodeMissing)?;
    }
    require(info.reserved() == 0 && !info.nmi_unblocking(), F::InjectionReserved)?;
    if info.has_error_code() {
        // Bit 15 is the SGX flag of page faults.
        let reserved = if caps.sgx { 0xffff_0000 } else { 0xffff_8000 };
        let code = vmcs.get32(Field::ENTRY_EXCEPTION_ERROR);
        require(code & reserved == 0, F::InjectionErrorCodeReserved)?;
    }

    let software = matches!(
        info.kind(),
        kind::SOFTWARE_INTERRUPT | kind::PRIVILEGED_SOFTWARE_EXCEPTION | kind::SOFTWARE_EXCEPTION
    );
    if software {
        let shortest = u32::from(!caps.misc.zero_length_injection());
        let length = vmcs.get32(Field::ENTRY_INSTRUCTION_LEN);
        require((shortest..=15).contains(&length), F::InjectionLength)?;
    }
    Ok(())
}
