//! Which MSRs are there, and which accesses of a guest to them exit?
//!
//! SDM Vol. 4 for the registers; Vol. 3C, "MSR-Bitmap Address". An MSR that is not here raises
//! #GP(0), as does a value that the register does not take.

use vmx_defs::controls::ProcCtls;
use vmx_defs::{Field, Hpa, msr};

use crate::addr::is_canonical;
use crate::caps::LINEAR_WIDTH;
use crate::memory::Memory;
use crate::processor::Processor;
use crate::registers::{cr0, efer, segment};

const TSC: u32 = 0x10;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const FMASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;

/// Whether each of the eight entries of an IA32_PAT value has a memory type that exists.
pub(crate) fn is_valid_pat(pat: u64) -> bool {
    pat.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4 | 5 | 6 | 7))
}

impl Processor {
    /// RDMSR: `None` is #GP(0).
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        let regs = &self.regs;
        Some(match index {
            TSC => self.tsc,
            msr::FEATURE_CONTROL => self.feature_control,
            msr::SYSENTER_CS => regs.sysenter_cs,
            msr::SYSENTER_ESP => regs.sysenter_esp,
            msr::SYSENTER_EIP => regs.sysenter_eip,
            msr::DEBUGCTL => regs.debugctl,
            msr::PAT => regs.pat,
            msr::EFER => regs.efer,
            STAR..=FMASK => regs.syscall[(index - STAR) as usize],
            msr::FS_BASE => regs.segments[segment::FS].base,
            msr::GS_BASE => regs.segments[segment::GS].base,
            KERNEL_GS_BASE => regs.kernel_gs_base,
            TSC_AUX => regs.tsc_aux,
            _ => return self.caps.msr(index),
        })
    }

    /// WRMSR: `false` is #GP(0).
    pub fn write_msr(&mut self, index: u32, value: u64) -> bool {
        let canonical = is_canonical(value, LINEAR_WIDTH);
        let regs = &mut self.regs;
        let (register, fits) = match index {
            msr::SYSENTER_CS => (&mut regs.sysenter_cs, value >> 32 == 0),
            msr::SYSENTER_ESP => (&mut regs.sysenter_esp, canonical),
            msr::SYSENTER_EIP => (&mut regs.sysenter_eip, canonical),
            msr::DEBUGCTL => (&mut regs.debugctl, value & !self.caps.debugctl == 0),
            msr::PAT => (&mut regs.pat, is_valid_pat(value)),
            msr::EFER => return self.write_efer(value),
            STAR => (&mut regs.syscall[0], true),
            LSTAR => (&mut regs.syscall[1], canonical),
            CSTAR => (&mut regs.syscall[2], canonical),
            FMASK => (&mut regs.syscall[3], value >> 32 == 0),
            msr::FS_BASE => (&mut regs.segments[segment::FS].base, canonical),
            msr::GS_BASE => (&mut regs.segments[segment::GS].base, canonical),
            KERNEL_GS_BASE => (&mut regs.kernel_gs_base, canonical),
            TSC_AUX => (&mut regs.tsc_aux, value >> 32 == 0),
            _ => return false,
        };
        if fits {
            *register = value;
        }
        fits
    }

    /// IA32_EFER: LMA is not written, LME not changed while paging is on.
    fn write_efer(&mut self, value: u64) -> bool {
        let changed = value ^ self.regs.efer;
        let paging = self.regs.cr0 & cr0::PG != 0;
        if value & !self.caps.efer != 0 || paging && changed & efer::LME != 0 {
            return false;
        }
        self.regs.efer = value & !efer::LMA | self.regs.efer & efer::LMA;
        true
    }

    /// Whether RDMSR or WRMSR of the guest exits.
    pub(crate) fn msr_exits(&self, memory: &Memory, index: u32, write: bool) -> bool {
        let Some(vmcs) = self.guest_vmcs() else { return false };
        if !vmcs.proc().contains(ProcCtls::MSR_BITMAPS) {
            return true;
        }
        let half = match index {
            0..=0x1fff => 0,
            0xc000_0000..=0xc000_1fff => 0x400,
            _ => return true,
        };
        let offset = half + if write { 0x800 } else { 0 } + u64::from(index & 0x1fff) / 8;
        let byte = memory.read_u8(Hpa::new(vmcs.get(Field::MSR_BITMAP) + offset));
        byte >> (index & 7) & 1 != 0
    }

    /// Whether IN or OUT of the guest exits (SDM Vol. 3C, "I/O-Bitmap Addresses").
    pub(crate) fn io_exits(&self, memory: &Memory, port: u16, size: u8) -> bool {
        let Some(vmcs) = self.guest_vmcs() else { return false };
        if !vmcs.proc().contains(ProcCtls::IO_BITMAPS) {
            return vmcs.proc().contains(ProcCtls::UNCONDITIONAL_IO_EXITING);
        }
        (0..u32::from(size)).any(|byte| {
            // An access that wraps around the end of the ports exits.
            let port = u32::from(port) + byte;
            let bitmap = match port {
                0..=0x7fff => vmcs.get(Field::IO_BITMAP_A),
                0x8000..=0xffff => vmcs.get(Field::IO_BITMAP_B),
                _ => return true,
            };
            let at = bitmap + u64::from(port & 0x7fff) / 8;
            memory.read_u8(Hpa::new(at)) >> (port & 7) & 1 != 0
        })
    }
}
