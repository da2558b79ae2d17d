//! What happens when L1 writes CR0, CR4 or XCR0 in a way that concerns L0?
//!
//! L0 owns CR0.NE and CR4.VMXE, which the processor demands while L0 runs, and the bits of CR4 whose
//! features are hidden; while L1 is in VMX operation also the bits that are fixed then. L1 sees its
//! own values in the read shadows. A write that changes an owned bit exits, and is done here as the
//! processor would have done it, other bits included.

use nvmx::host::{HostResult, InvVpid, L1Memory, Vmx};
use nvmx::inject::Fault;
use nvmx::paging::{CR0_PE, CR0_PG, CR4_LA57, CR4_PAE, CR4_VMXE, EFER_LMA};
use vmx_defs::exit::CrAccess;
use vmx_defs::{EntryCtls, Field, L1Gpa};

use crate::guest_msr::HIDDEN_XCR0;
use crate::host::Host;
use crate::msr;
use crate::vcpu::VPID01;

const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR4_PGE: u64 = 1 << 7;
const CR4_PCIDE: u64 = 1 << 17;
const EFER_LME: u64 = 1 << 8;
/// CR0 bits that are not reserved: PE to NE, WP, AM, NW, CD, PG.
const CR0_DEFINED: u64 = 0xE005_003F;
/// Access-rights bit of CS: 64-bit code.
const AR_LONG: u64 = 1 << 13;

/// What a write comes to.
pub(crate) type Outcome = HostResult<Result<(), Fault>>;

const GP: Fault = Fault::Gp(0);

/// Bits of CR0 and CR4 that L0 owns while L1 is, or is not, in VMX operation.
pub(crate) fn masks(host: &Host, in_vmx_operation: bool) -> (u64, u64) {
    let caps = &host.machine.caps;
    let (cr0, cr4) = (CR0_NE, CR4_VMXE | !caps.cr4_fixed1);
    if in_vmx_operation { (cr0 | caps.cr0_fixed0, cr4 | caps.cr4_fixed0) } else { (cr0, cr4) }
}

/// Takes the masks that go with L1's VMX operation. The shadows must hold L1's values of every bit
/// that a mask may gain.
pub(crate) fn set_masks(host: &mut Host, in_vmx_operation: bool) -> HostResult {
    let (cr0, cr4) = (l1_cr0(host)?, l1_cr4(host)?);
    let (mask0, mask4) = masks(host, in_vmx_operation);
    host.vmwrite(Field::CR0_SHADOW, cr0)?;
    host.vmwrite(Field::CR4_SHADOW, cr4)?;
    host.vmwrite(Field::CR0_MASK, mask0)?;
    host.vmwrite(Field::CR4_MASK, mask4)
}

/// CR0 as L1 sees it.
pub(crate) fn l1_cr0(host: &mut Host) -> HostResult<u64> {
    let mask = host.vmread(Field::CR0_MASK)?;
    Ok(host.vmread(Field::GUEST_CR0)? & !mask | host.vmread(Field::CR0_SHADOW)? & mask)
}

/// CR4 as L1 sees it.
pub(crate) fn l1_cr4(host: &mut Host) -> HostResult<u64> {
    let mask = host.vmread(Field::CR4_MASK)?;
    Ok(host.vmread(Field::GUEST_CR4)? & !mask | host.vmread(Field::CR4_SHADOW)? & mask)
}

/// A control-register exit of L1.
pub(crate) fn access(
    host: &mut Host,
    gprs: &nvmx::Gprs,
    access: CrAccess,
    in_vmx_operation: bool,
) -> Outcome {
    let value = |host: &mut Host| {
        let value = nvmx::insn::register(host, gprs, access.gpr())?;
        Ok(if nvmx::insn::is_64_bit(host)? { value } else { value & 0xFFFF_FFFF })
    };
    match (access.access(), access.register()) {
        (0, 0) => {
            let value = value(host)?;
            write_cr0(host, value, in_vmx_operation)
        }
        (0, 4) => {
            let value = value(host)?;
            write_cr4(host, value, in_vmx_operation)
        }
        // CLTS, which exits only where TS is owned.
        (2, _) => {
            let value = l1_cr0(host)? & !(1 << 3);
            write_cr0(host, value, in_vmx_operation)
        }
        // LMSW sets PE, MP, EM and TS; it can't clear PE.
        (3, _) => {
            let old = l1_cr0(host)?;
            let source = u64::from(access.lmsw_source());
            let value = old & !0xE | source & 0xF | old & CR0_PE;
            write_cr0(host, value, in_vmx_operation)
        }
        // Reads never exit, nor does CR3 or CR8 without its control.
        _ => Ok(Err(Fault::Ud)),
    }
}

/// MOV to CR0 (SDM "MOV—Move to/from Control Registers" and "Control Registers").
fn write_cr0(host: &mut Host, value: u64, in_vmx_operation: bool) -> Outcome {
    let old = l1_cr0(host)?;
    let cr4 = l1_cr4(host)?;
    let efer = host.vmread(Field::GUEST_EFER)?;
    if value >> 32 != 0 {
        return Ok(Err(GP));
    }
    // Reserved bits are ignored, ET is 1.
    let new = value & CR0_DEFINED | CR0_ET;
    let caps = &host.machine.caps;
    if in_vmx_operation
        && (new & caps.cr0_fixed0 != caps.cr0_fixed0 || new & !caps.cr0_fixed1 & CR0_DEFINED != 0)
    {
        return Ok(Err(GP));
    }
    let code_is_long = host.vmread(Field::GUEST_CS_AR)? & AR_LONG != 0;
    let starts_paging = new & CR0_PG != 0 && old & CR0_PG == 0;
    let stops_paging = new & CR0_PG == 0 && old & CR0_PG != 0;
    let long = efer & EFER_LME != 0;
    if (new & CR0_PG != 0 && new & CR0_PE == 0)
        || (new & CR0_NW != 0 && new & CR0_CD == 0)
        || (starts_paging && long && (cr4 & CR4_PAE == 0 || code_is_long))
        || (stops_paging && cr4 & CR4_PCIDE != 0)
        || (stops_paging && efer & EFER_LMA != 0 && code_is_long)
    {
        return Ok(Err(GP));
    }
    let new_efer = if new & CR0_PG != 0 && long { efer | EFER_LMA } else { efer & !EFER_LMA };
    // CR0.PG, CD and NW reload the PDPTEs under PAE paging.
    let pae = new & CR0_PG != 0 && cr4 & CR4_PAE != 0 && new_efer & EFER_LMA == 0;
    if pae && (new ^ old) & (CR0_PG | CR0_CD | CR0_NW) != 0 && !load_pdptes(host)? {
        return Ok(Err(GP));
    }
    if new_efer != efer {
        host.vmwrite(Field::GUEST_EFER, new_efer)?;
        let mut entry = EntryCtls::from_bits_retain(host.vmread(Field::ENTRY_CTLS)? as u32);
        entry.set(EntryCtls::IA32E_MODE_GUEST, new_efer & EFER_LMA != 0);
        host.vmwrite(Field::ENTRY_CTLS, u64::from(entry.bits()))?;
    }
    host.vmwrite(Field::CR0_SHADOW, new)?;
    host.vmwrite(Field::GUEST_CR0, new | CR0_NE)?;
    if (new ^ old) & CR0_PG != 0 {
        host.invvpid(InvVpid::Single(VPID01))?;
    }
    Ok(Ok(()))
}

/// MOV to CR4.
fn write_cr4(host: &mut Host, new: u64, in_vmx_operation: bool) -> Outcome {
    let old = l1_cr4(host)?;
    let efer = host.vmread(Field::GUEST_EFER)?;
    let caps = &host.machine.caps;
    let fixed0 = if in_vmx_operation { caps.cr4_fixed0 } else { 0 };
    if new & !caps.cr4_fixed1 != 0 || new & fixed0 != fixed0 {
        return Ok(Err(GP));
    }
    let long = efer & EFER_LMA != 0;
    let cr3 = host.vmread(Field::GUEST_CR3)?;
    if (long && (new & CR4_PAE == 0 || (new ^ old) & CR4_LA57 != 0))
        || (new & CR4_PCIDE != 0 && old & CR4_PCIDE == 0 && (!long || cr3 & 0xFFF != 0))
        || (new & CR4_PCIDE != 0 && !long)
    {
        return Ok(Err(GP));
    }
    // PAE, PGE, PSE and SMEP reload the PDPTEs under PAE paging.
    let paging = host.vmread(Field::GUEST_CR0)? & CR0_PG != 0;
    let flushes = 1 << 4 | CR4_PAE | CR4_PGE | CR4_PCIDE | 1 << 20 | 1 << 21 | 1 << 22;
    if paging && !long && new & CR4_PAE != 0 && (new ^ old) & flushes != 0 && !load_pdptes(host)? {
        return Ok(Err(GP));
    }
    host.vmwrite(Field::CR4_SHADOW, new)?;
    host.vmwrite(Field::GUEST_CR4, new | CR4_VMXE)?;
    if (new ^ old) & flushes != 0 {
        host.invvpid(InvVpid::Single(VPID01))?;
    }
    Ok(Ok(()))
}

/// Loads the four page-directory-pointer-table entries as MOV to CR3 does under PAE paging; says
/// whether they are valid (SDM "PDPTE Registers").
fn load_pdptes(host: &mut Host) -> HostResult<bool> {
    let cr3 = host.vmread(Field::GUEST_CR3)? & 0xFFFF_FFE0;
    let reserved = 0x1E6 | !((1_u64 << host.machine.hardware.physical_width.min(52)) - 1);
    let mut entries = [0; 4];
    for (index, entry) in entries.iter_mut().enumerate() {
        *entry = host.read_u64(L1Gpa::new(cr3 + index as u64 * 8));
        if *entry & 1 != 0 && *entry & reserved != 0 {
            return Ok(false);
        }
    }
    let fields =
        [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3];
    for (field, entry) in fields.into_iter().zip(entries) {
        host.vmwrite(field, entry)?;
    }
    Ok(true)
}

/// XSETBV of L1: only XCR0 exists, and the processor checks the value as L1's.
pub(crate) fn xsetbv(register: u32, value: u64) -> Result<(), Fault> {
    // XCR0 bit 0 (x87) is always set, what is hidden never; the rest of the checks is the
    // instruction's own.
    if register != 0 || value & 1 == 0 || value & HIDDEN_XCR0 != 0 {
        return Err(GP);
    }
    msr::try_xsetbv(register, value).map_err(|msr::MsrFault| GP)
}
