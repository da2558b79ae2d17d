//! What does a guest see in each model-specific register, and which of them does it reach itself?
//!
//! Nearly all are the guest's own: read and written without an exit. The rest, told by `policy`
//! below, is what VMX capability reporting, memory types or L0's own safety hang on. The same
//! answers serve L1's RDMSR and WRMSR, and the MSR areas and bitmaps of its VMCSs.

use nvmx::caps::Caps;
use nvmx::host::MsrFault;
use vmx_defs::{Field, msr as number};

use crate::apic;
use crate::host::Host;
use crate::msr;
use crate::mtrr;

/// Bytes of the MSR bitmap.
pub(crate) const BITMAP_BYTES: usize = 4096;

/// Registers that only this file names.
mod index {
    pub(super) const MICROCODE_TRIGGER: u32 = 0x79;
    /// Where the trace hub's registers are in physical memory (MSR_TRACE_HUB_STH_ACPIBAR_BASE).
    pub(super) const TRACE_HUB: u32 = 0x80;
    pub(super) const SGX_HASH: core::ops::RangeInclusive<u32> = 0x8C..=0x8F;
    pub(super) const SMM_MONITOR: u32 = 0x9B;
    pub(super) const SMBASE: u32 = 0x9E;
    pub(super) const SMRR: core::ops::RangeInclusive<u32> = 0x1F2..=0x1F3;
    pub(super) const MISC_ENABLE: u32 = 0x1A0;
    pub(super) const PEBS_ENABLE: u32 = 0x3F1;
    pub(super) const DEBUG_STORE: u32 = 0x600;
    pub(super) const TRACE: core::ops::RangeInclusive<u32> = 0x560..=0x58F;
    pub(super) const CET: core::ops::RangeInclusive<u32> = 0x6A0..=0x6A8;
    pub(super) const PROTECTION_KEYS: u32 = 0x6E1;
    pub(super) const XSS: u32 = 0xDA0;
    /// IA32_USER_MSR_CTL.
    pub(super) const USER_MSR: u32 = 0x1C;
    /// IA32_VMX_PROCBASED_CTLS3 and IA32_VMX_EXIT_CTLS2: of neither is anything offered.
    pub(super) const VMX_NEWER: core::ops::RangeInclusive<u32> = 0x492..=0x493;
    pub(super) const FRED: core::ops::RangeInclusive<u32> = 0x1CC..=0x1D4;
}

/// IA32_MISC_ENABLE: no execute-disable.
const XD_DISABLE: u64 = 1 << 34;
/// State components of hidden features that XCR0 governs: protection keys.
pub(crate) const HIDDEN_XCR0: u64 = 1 << 9;
/// The same of IA32_XSS: processor trace, PASID, CET, user interrupts.
pub(crate) const HIDDEN_XSTATE: u64 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14;

/// How a guest reaches a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// Directly; a VMCS field or the register itself holds the value.
    Own,
    /// L0 answers reads and writes.
    Answered,
    /// Reads directly, L0 answers writes.
    ReadOwn,
    /// It does not exist.
    Hidden,
}

fn policy(register: u32) -> Policy {
    match register {
        number::FEATURE_CONTROL | number::APIC_BASE | mtrr::CAPABILITIES | index::MISC_ENABLE => {
            Policy::Answered
        }
        number::VMX_BASIC..=number::VMX_VMFUNC => Policy::Answered,
        // Features that reach physical memory past EPT, or act on L0 too.
        index::MICROCODE_TRIGGER
        | index::TRACE_HUB
        | index::SMM_MONITOR
        | index::SMBASE
        | index::PEBS_ENABLE
        | index::DEBUG_STORE
        | index::USER_MSR
        | index::PROTECTION_KEYS => Policy::Hidden,
        _ if index::SGX_HASH.contains(&register)
            || index::SMRR.contains(&register)
            || index::TRACE.contains(&register)
            || index::CET.contains(&register)
            || index::VMX_NEWER.contains(&register)
            || index::FRED.contains(&register) =>
        {
            Policy::Hidden
        }
        index::XSS | apic::X2APIC_ICR => Policy::ReadOwn,
        _ if mtrr::is_mtrr(register) => Policy::ReadOwn,
        // Outside of what the bitmap covers every access exits.
        0..=0x1FFF | 0xC000_0000..=0xC000_1FFF => Policy::Own,
        _ => Policy::Answered,
    }
}

/// Whether a guest may read `register` without an exit.
pub(crate) fn may_pass_read(register: u32) -> bool {
    matches!(policy(register), Policy::Own | Policy::ReadOwn)
}

/// Whether a guest may write `register` without an exit.
pub(crate) fn may_pass_write(register: u32) -> bool {
    policy(register) == Policy::Own
}

/// Fills L1's MSR bitmap (SDM "MSR-Bitmap Address").
pub(crate) fn fill_bitmap(bitmap: &mut [u8; BITMAP_BYTES]) {
    for (base, offset) in [(0, 0), (0xC000_0000, 1024)] {
        for low in 0..0x2000_u32 {
            let (byte, bit) = (offset + low as usize / 8, 1 << (low % 8));
            if !may_pass_read(base + low) {
                bitmap[byte] |= bit;
            }
            if !may_pass_write(base + low) {
                bitmap[byte + 2048] |= bit;
            }
        }
    }
}

/// The VMCS field that holds a guest's value of `register`.
fn field_of(register: u32) -> Option<Field> {
    Some(match register {
        number::EFER => Field::GUEST_EFER,
        number::PAT => Field::GUEST_PAT,
        number::DEBUGCTL => Field::GUEST_DEBUGCTL,
        number::SYSENTER_CS => Field::GUEST_SYSENTER_CS,
        number::SYSENTER_ESP => Field::GUEST_SYSENTER_ESP,
        number::SYSENTER_EIP => Field::GUEST_SYSENTER_EIP,
        number::FS_BASE => Field::GUEST_FS_BASE,
        number::GS_BASE => Field::GUEST_GS_BASE,
        _ => return None,
    })
}

/// RDMSR of the guest whose VMCS is current.
pub(crate) fn read(host: &mut Host, register: u32) -> Result<u64, MsrFault> {
    if let Some(field) = field_of(register) {
        return host.cpu.vmread(field).map_err(|_| MsrFault);
    }
    match register {
        number::FEATURE_CONTROL => Ok(Caps::feature_control()),
        number::VMX_BASIC..=number::VMX_VMFUNC => {
            host.machine.caps.read_msr(register).ok_or(MsrFault)
        }
        number::APIC_BASE => Ok(host.apic_base),
        // No system-management range registers (bit 11).
        mtrr::CAPABILITIES => read_real(register).map(|value| value & !(1 << 11)),
        // Branch trace storage and precise sampling are "unavailable" (bits 11, 12).
        index::MISC_ENABLE => read_real(register).map(|value| value | 3 << 11),
        _ if policy(register) == Policy::Hidden => Err(MsrFault),
        _ => read_real(register),
    }
}

/// WRMSR of the guest whose VMCS is current.
pub(crate) fn write(host: &mut Host, register: u32, value: u64) -> Result<(), MsrFault> {
    if let Some(field) = field_of(register) {
        let value = checked_field_value(host, register, value)?;
        return host.cpu.vmwrite(field, value).map_err(|_| MsrFault);
    }
    match register {
        // Locked, as it reads; the capability MSRs are read-only.
        number::FEATURE_CONTROL | number::VMX_BASIC..=number::VMX_VMFUNC | mtrr::CAPABILITIES => {
            Err(MsrFault)
        }
        number::APIC_BASE => write_apic_base(host, value),
        // L0's own tables use execute-disable.
        index::MISC_ENABLE if value & XD_DISABLE != 0 => Err(MsrFault),
        index::MISC_ENABLE => write_real(register, value),
        apic::X2APIC_ICR => apic::write_x2apic_icr(value).map_err(|_| MsrFault),
        // XRSTORS would load the registers of what is hidden.
        index::XSS if value & HIDDEN_XSTATE != 0 => Err(MsrFault),
        _ if policy(register) == Policy::Hidden => Err(MsrFault),
        _ if mtrr::is_mtrr(register) => {
            write_real(register, value)?;
            host.memory_types_changed = true;
            Ok(())
        }
        // What every processor lacks: an emulator may ignore an access that must fault.
        0..=0x1FFF | 0xC000_0000..=0xC000_1FFF => write_real(register, value),
        _ => Err(MsrFault),
    }
}

fn read_real(register: u32) -> Result<u64, MsrFault> {
    msr::try_read(register).map_err(|_| MsrFault)
}

fn write_real(register: u32, value: u64) -> Result<(), MsrFault> {
    // SAFETY: registers that L0's execution hangs on are VMCS fields, answered or hidden above; the
    // rest is the guest's own already, reached here by its MSR areas.
    unsafe { msr::try_write(register, value) }.map_err(|_| MsrFault)
}

/// EFER.LME and LMA.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Checks a value as WRMSR does; returns what the field must hold.
fn checked_field_value(host: &mut Host, register: u32, value: u64) -> Result<u64, MsrFault> {
    let width = host.machine.hardware.linear_width;
    let ok = match register {
        number::EFER => {
            let old = host.cpu.vmread(Field::GUEST_EFER).map_err(|_| MsrFault)?;
            let cr0 = host.cpu.vmread(Field::GUEST_CR0).map_err(|_| MsrFault)?;
            let paging = cr0 & nvmx::paging::CR0_PG != 0;
            if value & !host.machine.caps.efer != 0 || (paging && (value ^ old) & EFER_LME != 0) {
                return Err(MsrFault);
            }
            // LMA is the processor's to write.
            return Ok(value & !EFER_LMA | old & EFER_LMA);
        }
        number::PAT => value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)),
        number::DEBUGCTL => value & !host.machine.caps.debugctl == 0,
        number::SYSENTER_CS => value >> 32 == 0,
        _ => nvmx::paging::is_canonical(value, width),
    };
    if ok { Ok(value) } else { Err(MsrFault) }
}

/// IA32_APIC_BASE: enable x2APIC mode, and enable the APIC.
const APIC_EXTD: u64 = 1 << 10;
const APIC_ENABLE: u64 = 1 << 11;
const APIC_BSP: u64 = 1 << 8;

/// SDM "x2APIC State Transitions", and the reserved bits of the register. To move the page is
/// refused, which is our policy.
///
/// A disabled APIC is only L1's to see: the real one stays as it was until it is enabled in another
/// mode (emulators keep an APIC off for good once it was).
fn write_apic_base(host: &mut Host, value: u64) -> Result<(), MsrFault> {
    let width = host.machine.hardware.physical_width;
    let has_x2apic = core::arch::x86_64::__cpuid(1).ecx & 1 << 21 != 0;
    let allowed = APIC_BSP
        | APIC_ENABLE
        | if has_x2apic { APIC_EXTD } else { 0 }
        | ((1_u64 << width) - 1) & !0xFFF;
    let mode = |value: u64| (value & APIC_ENABLE != 0, value & APIC_EXTD != 0);
    let legal = value & !allowed == 0
        && match (mode(host.apic_base), mode(value)) {
            (_, (false, true)) => false,
            // The page stays where it is. The processor looks for its registers before it looks
            // for memory, so that anywhere else they could cover memory of L0's, or the page that
            // L0 watches with several processors.
            _ if (value ^ host.apic_base) >> 12 != 0 => false,
            // Out of x2APIC mode only through disabled; into it only from xAPIC mode.
            ((true, true), (true, false)) | ((false, _), (true, true)) => false,
            _ => true,
        };
    if !legal {
        return Err(MsrFault);
    }
    if value & APIC_ENABLE != 0 {
        let real = read_real(number::APIC_BASE)?;
        if real & APIC_EXTD != 0 && value & APIC_EXTD == 0 {
            write_real(number::APIC_BASE, real & !(APIC_ENABLE | APIC_EXTD))?;
        }
        if real != value {
            write_real(number::APIC_BASE, value)?;
        }
    }
    host.apic_base = value;
    Ok(())
}
