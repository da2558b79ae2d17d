//! Does VM entry accept this VMCS?
//!
//! SDM Vol. 3C, "Checks on VMX Controls and Host-State Area" and "Checking and Loading Guest State".
//! Written from the manual and independently of the engine's own checks, since the two shall find
//! each other's mistakes. A check that fails is named by a short text, for people; software sees
//! the kind only.

mod guest;

use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::event::{IntrInfo, kind, vector};
use vmx_defs::{Field, Hpa};

use crate::addr::is_canonical;
use crate::caps::{LINEAR_WIDTH, ModelCaps};
use crate::memory::Memory;
use crate::msrs::is_valid_pat;
use crate::registers::{cr0, cr4, efer};
use crate::vmcs::Vmcs;

pub(crate) use guest::guest_state;

/// The requirement that does not hold.
pub(crate) type Requirement = &'static str;

/// A requirement, by name.
#[inline]
pub(crate) fn must(holds: bool, requirement: Requirement) -> Result<(), Requirement> {
    if holds { Ok(()) } else { Err(requirement) }
}

/// What the checks of one VM entry look at.
pub(crate) struct Subject<'a> {
    pub(crate) vmcs: &'a Vmcs,
    pub(crate) caps: &'a ModelCaps,
    pub(crate) memory: &'a Memory,
    /// The current-VMCS pointer.
    pub(crate) region: Hpa,
    /// IA32_EFER.LMA as the entry is executed.
    pub(crate) lma: bool,
}

impl Subject<'_> {
    fn get(&self, field: Field) -> u64 {
        self.vmcs.get(field)
    }

    /// A 4-KByte aligned address within the physical-address width.
    fn page(&self, field: Field, requirement: Requirement) -> Result<(), Requirement> {
        let address = Hpa::new(self.get(field));
        must(address.is_aligned(PAGE_SIZE) && self.fits(address), requirement)
    }

    fn fits(&self, address: Hpa) -> bool {
        address.fits(self.caps.physical_width)
    }

    fn canonical(&self, field: Field, requirement: Requirement) -> Result<(), Requirement> {
        must(is_canonical(self.get(field), LINEAR_WIDTH), requirement)
    }
}

/// "Checks on VMX Controls": a failure is VMfailValid with error 7.
pub(crate) fn controls(s: &Subject<'_>) -> Result<(), Requirement> {
    let (vmcs, caps) = (s.vmcs, s.caps);
    let (pin, proc, proc2) = (vmcs.pin(), vmcs.proc(), vmcs.proc2());
    let (exit, entry) = (vmcs.exit(), vmcs.entry());
    must(caps.pin.permits(pin.bits()), "pin-based controls")?;
    must(caps.proc.permits(proc.bits()), "primary processor-based controls")?;
    if proc.contains(ProcCtls::SECONDARY_CONTROLS) {
        must(caps.proc2.permits(proc2.bits()), "secondary processor-based controls")?;
    }
    must(caps.exit.permits(exit.bits()), "VM-exit controls")?;
    must(caps.entry.permits(entry.bits()), "VM-entry controls")?;
    let smm = EntryCtls::ENTRY_TO_SMM | EntryCtls::DEACTIVATE_DUAL_MONITOR;
    must(!entry.intersects(smm), "entry to SMM from outside SMM")?;

    let targets = s.get(Field::CR3_TARGET_COUNT);
    must(targets <= caps.misc.cr3_targets().into(), "CR3-target count")?;
    if proc.contains(ProcCtls::IO_BITMAPS) {
        s.page(Field::IO_BITMAP_A, "I/O bitmap A")?;
        s.page(Field::IO_BITMAP_B, "I/O bitmap B")?;
    }
    if proc.contains(ProcCtls::MSR_BITMAPS) {
        s.page(Field::MSR_BITMAP, "MSR bitmaps")?;
    }
    let virtual_nmis = pin.contains(PinCtls::VIRTUAL_NMIS);
    must(!virtual_nmis || pin.contains(PinCtls::NMI_EXITING), "virtual NMIs need NMI exiting")?;
    let window = proc.contains(ProcCtls::NMI_WINDOW_EXITING);
    must(!window || virtual_nmis, "NMI-window exiting needs virtual NMIs")?;
    must(!proc2.contains(ProcCtls2::VPID) || s.get(Field::VPID) != 0, "VPID 0000H")?;

    let ept = vmcs.eptp();
    if let Some(eptp) = ept {
        must(caps.accepts_eptp(eptp.into_bits()), "EPT pointer")?;
    }
    let unrestricted = proc2.contains(ProcCtls2::UNRESTRICTED_GUEST);
    must(!unrestricted || ept.is_some(), "unrestricted guest needs EPT")?;
    let functions = vmcs.vm_functions();
    must(functions.difference(caps.vm_functions).is_empty(), "VM-function controls")?;
    if functions.contains(VmFuncCtls::EPTP_SWITCHING) {
        must(ept.is_some(), "EPTP switching needs EPT")?;
        s.page(Field::EPTP_LIST_ADDRESS, "EPTP list")?;
    }
    if proc2.contains(ProcCtls2::EPT_VIOLATION_VE) {
        s.page(Field::VE_INFORMATION_ADDR, "virtualization-exception information")?;
    }
    for (count, address) in [
        (Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_STORE_ADDR),
        (Field::EXIT_MSR_LOAD_COUNT, Field::EXIT_MSR_LOAD_ADDR),
        (Field::ENTRY_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_ADDR),
    ] {
        msr_area(s, s.get(count), s.get(address))?;
    }
    injection(s)
}

/// An MSR area. More entries than IA32_VMX_MISC recommends is undefined; here it is refused.
fn msr_area(s: &Subject<'_>, count: u64, address: u64) -> Result<(), Requirement> {
    if count == 0 {
        return Ok(());
    }
    let limit = 512 * (u64::from(s.caps.misc.msr_list_size()) + 1);
    let last = Hpa::new(address).checked_add(count * 16 - 1);
    must(Hpa::new(address).is_aligned(16), "MSR area alignment")?;
    must(last.is_some_and(|last| s.fits(last)), "MSR area beyond the address width")?;
    must(count <= limit, "MSR area length")
}

/// "VM-Entry Control Fields", event injection.
fn injection(s: &Subject<'_>) -> Result<(), Requirement> {
    let info = IntrInfo::from(s.vmcs.get32(Field::ENTRY_INTR_INFO));
    if !info.valid() {
        return Ok(());
    }
    let number = info.vector();
    let software = match info.kind() {
        kind::EXTERNAL => false,
        kind::NMI => {
            must(number == vector::NMI, "vector of an NMI")?;
            false
        }
        kind::HARDWARE_EXCEPTION => {
            must(number <= 31, "vector of a hardware exception")?;
            false
        }
        kind::SOFTWARE_INTERRUPT
        | kind::SOFTWARE_EXCEPTION
        | kind::PRIVILEGED_SOFTWARE_EXCEPTION => true,
        // Without a monitor trap flag there is no "other event".
        _ => return Err("event type"),
    };
    let unrestricted = s.vmcs.proc2().contains(ProcCtls2::UNRESTRICTED_GUEST);
    let real = unrestricted && s.get(Field::GUEST_CR0) & cr0::PE == 0;
    let exception = info.kind() == kind::HARDWARE_EXCEPTION;
    // Control protection has a code only on processors that accept any (IA32_VMX_BASIC bit 56).
    let pushes = matches!(number, 8 | 10..=14 | 17);
    let expected = if real || !exception {
        Some(false)
    } else if s.caps.basic.any_error_code() {
        None
    } else {
        Some(pushes)
    };
    must(expected.is_none_or(|code| code == info.has_error_code()), "delivery of an error code")?;
    must(info.reserved() == 0 && !info.nmi_unblocking(), "reserved bits of the event")?;
    if info.has_error_code() {
        must(s.get(Field::ENTRY_EXCEPTION_ERROR) >> 15 == 0, "error code")?;
    }
    if software {
        let length = s.get(Field::ENTRY_INSTRUCTION_LEN);
        let zero = length == 0 && s.caps.misc.zero_length_injection();
        must(zero || (1..=15).contains(&length), "instruction length")?;
    }
    Ok(())
}

/// "Checks on Host-State Area": a failure is VMfailValid with error 8.
pub(crate) fn host_state(s: &Subject<'_>) -> Result<(), Requirement> {
    let (exit, entry) = (s.vmcs.exit(), s.vmcs.entry());
    let long = exit.contains(ExitCtls::HOST_ADDRESS_SPACE_SIZE);
    let (host_cr0, host_cr4) = (s.get(Field::HOST_CR0), s.get(Field::HOST_CR4));
    must(fixed(host_cr0, s.caps.cr0_fixed0, s.caps.cr0_fixed1), "host CR0")?;
    must(fixed(host_cr4, s.caps.cr4_fixed0, s.caps.cr4_fixed1), "host CR4")?;
    must(s.fits(Hpa::new(s.get(Field::HOST_CR3))), "host CR3")?;
    s.canonical(Field::HOST_SYSENTER_ESP, "host IA32_SYSENTER_ESP")?;
    s.canonical(Field::HOST_SYSENTER_EIP, "host IA32_SYSENTER_EIP")?;
    if exit.contains(ExitCtls::LOAD_PAT) {
        must(is_valid_pat(s.get(Field::HOST_PAT)), "host IA32_PAT")?;
    }
    if exit.contains(ExitCtls::LOAD_EFER) {
        let value = s.get(Field::HOST_EFER);
        must(value & !s.caps.efer == 0, "host IA32_EFER")?;
        must((value & efer::LMA != 0) == long, "host IA32_EFER.LMA")?;
        must((value & efer::LME != 0) == long, "host IA32_EFER.LME")?;
    }
    let selectors = [
        Field::HOST_ES_SELECTOR,
        Field::HOST_CS_SELECTOR,
        Field::HOST_SS_SELECTOR,
        Field::HOST_DS_SELECTOR,
        Field::HOST_FS_SELECTOR,
        Field::HOST_GS_SELECTOR,
        Field::HOST_TR_SELECTOR,
    ];
    must(selectors.iter().all(|field| s.get(*field) & 7 == 0), "host selector RPL or TI")?;
    must(s.get(Field::HOST_CS_SELECTOR) != 0, "host CS")?;
    must(s.get(Field::HOST_TR_SELECTOR) != 0, "host TR")?;
    must(long || s.get(Field::HOST_SS_SELECTOR) != 0, "host SS")?;
    for field in [
        Field::HOST_FS_BASE,
        Field::HOST_GS_BASE,
        Field::HOST_TR_BASE,
        Field::HOST_GDTR_BASE,
        Field::HOST_IDTR_BASE,
    ] {
        s.canonical(field, "host base")?;
    }
    must(long == s.lma, "host address-space size")?;
    must(s.lma || !entry.contains(EntryCtls::IA32E_MODE_GUEST), "IA-32e guest of a 32-bit host")?;
    let rip = s.get(Field::HOST_RIP);
    if long {
        must(host_cr4 & cr4::PAE != 0, "host CR4.PAE")?;
        s.canonical(Field::HOST_RIP, "host RIP")
    } else {
        must(host_cr4 & cr4::PCIDE == 0, "host CR4.PCIDE")?;
        must(rip >> 32 == 0, "host RIP")
    }
}

/// Whether a control register has the bits that VMX operation fixes.
pub(crate) const fn fixed(value: u64, fixed0: u64, fixed1: u64) -> bool {
    value & fixed0 == fixed0 && value & !fixed1 == 0
}

#[cfg(test)]
mod tests;
