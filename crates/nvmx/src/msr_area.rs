//! How are the MSR areas of VM entry and VM exit carried out?
//!
//! SDM Vol. 3C, "Loading MSRs" (on entry and on exit) and "Saving MSRs". The areas are L1 memory:
//! each entry is copied once.

use crate::caps::MSR_AREA_MAX;
use crate::host::{Host, L1Memory, MsrFault};
use vmx_defs::L1Gpa;
use vmx_defs::msr;

/// The entry that could not be carried out, counted from 1, as the exit qualification of a VM-entry
/// failure due to MSR loading gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct BadEntry(pub(crate) u64);

/// IA32_SMM_MONITOR_CTL, which only SMM may write.
const SMM_MONITOR_CTL: u32 = 0x9b;
/// IA32_SMBASE, readable in SMM only.
const SMBASE: u32 = 0x9e;
/// IA32_BIOS_UPDT_TRIG: microcode updates are not loaded through MSR areas.
const BIOS_UPDT_TRIG: u32 = 0x79;
/// Bits 31:8 of the x2APIC MSRs.
const X2APIC: u32 = 0x8;

fn entry(memory: &mut impl L1Memory, area: L1Gpa, number: u32) -> (L1Gpa, u32, u32, u64) {
    // Areas past the end of the address space are refused by the entry checks; saturation is for
    // the compiler.
    let at = L1Gpa::new(area.as_u64().saturating_add(16 * u64::from(number)));
    let head = memory.read_u64(at);
    let data = L1Gpa::new(at.as_u64().saturating_add(8));
    (data, head as u32, (head >> 32) as u32, memory.read_u64(data))
}

/// Loads `count` MSRs from `area` into the guest whose VMCS is current. FS and GS bases and
/// whatever the guest itself could not write with WRMSR are refused.
pub(crate) fn load(host: &mut impl Host, area: L1Gpa, count: u32) -> Result<(), BadEntry> {
    for number in 0..count {
        let bad = BadEntry(u64::from(number) + 1);
        if number >= MSR_AREA_MAX {
            return Err(bad);
        }
        let (_, index, reserved, value) = entry(host, area, number);
        let refused = reserved != 0
            || matches!(index, msr::FS_BASE | msr::GS_BASE | SMM_MONITOR_CTL | BIOS_UPDT_TRIG)
            || index >> 8 == X2APIC;
        if refused || host.write_msr(index, value) == Err(MsrFault) {
            return Err(bad);
        }
    }
    Ok(())
}

/// Stores `count` MSRs of the guest whose VMCS is current to `area`.
pub(crate) fn store(host: &mut impl Host, area: L1Gpa, count: u32) -> Result<(), BadEntry> {
    for number in 0..count {
        let bad = BadEntry(u64::from(number) + 1);
        if number >= MSR_AREA_MAX {
            return Err(bad);
        }
        let (data, index, reserved, _) = entry(host, area, number);
        if reserved != 0 || index == SMBASE || index >> 8 == X2APIC {
            return Err(bad);
        }
        match host.read_msr(index) {
            Ok(value) => host.write_u64(data, value),
            Err(MsrFault) => return Err(bad),
        }
    }
    Ok(())
}
