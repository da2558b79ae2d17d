//! What do L1's VMX instructions do?
//!
//! SDM Vol. 3C, "VMX Instruction Reference". Each instruction ends in one of the [`Verdict`]s; the
//! flags, the VM-instruction error and RIP follow from it in one place.

use crate::engine::{Current, Handled, Nested, Processor};
use crate::enter::Entry;
use crate::host::{Host, HostError, HostResult, InvVpid, L1Memory};
use crate::inject::{self, Fault};
use crate::insn::{Instruction, Mode, Operands};
use crate::paging::is_canonical;
use crate::regs::Gprs;
use crate::vmcs12::LaunchState;
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::ept::Eptp;
use vmx_defs::event::Interruptibility;
use vmx_defs::field::{Component, Kind};
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{ExitReason, Field, Gva, L1Gpa, VmInstructionError};

/// How a VMX instruction of L1 ends.
enum Verdict {
    /// VMsucceed.
    Succeed,
    /// VMfail: VMfailValid with this number where there is a current VMCS, else VMfailInvalid.
    Fail(VmInstructionError),
    /// VMfailInvalid, whether or not there is a current VMCS.
    FailInvalid,
    /// The instruction is not executed.
    Fault(Fault),
    /// VM entry or exit: RIP and the flags are already what they shall be.
    Entered(Handled),
}

use Verdict::{Fail, FailInvalid, Succeed};

/// The flags that a VMX instruction sets and clears: CF, PF, AF, ZF, SF, OF.
const ARITHMETIC_FLAGS: u64 = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 11;
const CF: u64 = 1;
const ZF: u64 = 1 << 6;

/// What VMPTRST stores where there is no current VMCS.
const NO_VMCS: u64 = u64::MAX;

/// Takes a value that the guest's own state yields, or ends the instruction with its fault.
macro_rules! guest {
    ($value:expr) => {
        match $value {
            Ok(value) => value,
            Err(fault) => return Ok(Verdict::Fault(fault)),
        }
    };
}

impl Nested {
    /// Handles an exit of L1, whose VMCS is current, if it is due to a VMX instruction.
    ///
    /// # Errors
    /// [`HostError`]: a bug of the engine or its host; the machine can't go on.
    pub fn l1_exit(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &mut Gprs,
        reason: ExitReason,
    ) -> HostResult<Handled> {
        let Some(instruction) = Instruction::from_exit(reason) else {
            return Ok(Handled::NotMine);
        };
        let verdict = match instruction.check(host, processor.in_vmx_operation())? {
            Ok(mode) => self.execute(processor, host, gprs, instruction, mode)?,
            Err(fault) => Verdict::Fault(fault),
        };
        self.conclude(processor, host, verdict)
    }

    /// The hardware's VMLAUNCH or VMRESUME on vmcs02 failed before any state was loaded: a vmcs02
    /// that the checks should not have let through. L1 gets the failure as its own. vmcs02 is
    /// current; afterwards vmcs01 is.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn entry_refused(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
    ) -> HostResult<Handled> {
        let number = host.vmread(Field::VM_INSTRUCTION_ERROR)? as u32;
        let error = if number == VmInstructionError::EntryHostState.number() {
            VmInstructionError::EntryHostState
        } else {
            VmInstructionError::EntryControls
        };
        host.vmptrld(processor.vmcs01)?;
        processor.known = false;
        processor.merged = 0;
        self.stop_l2(processor);
        self.conclude(processor, host, Fail(error))
    }

    fn conclude(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        verdict: Verdict,
    ) -> HostResult<Handled> {
        let flag = match verdict {
            Succeed => 0,
            FailInvalid => CF,
            Fail(error) => {
                match processor.current.and_then(|current| self.vmcss.get_mut(current.id)) {
                    Some(vmcs) => {
                        vmcs.set(Field::VM_INSTRUCTION_ERROR, error.number().into());
                        ZF
                    }
                    None => CF,
                }
            }
            Verdict::Fault(fault) => {
                inject::deliver(host, fault)?;
                return Ok(Handled::Enter);
            }
            Verdict::Entered(handled) => return Ok(handled),
        };
        inject::advance_rip(host)?;
        let rflags = host.vmread(Field::GUEST_RFLAGS)?;
        let wanted = rflags & !ARITHMETIC_FLAGS | flag;
        if wanted != rflags {
            host.vmwrite(Field::GUEST_RFLAGS, wanted)?;
        }
        Ok(Handled::Enter)
    }

    fn execute(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &mut Gprs,
        instruction: Instruction,
        mode: Mode,
    ) -> HostResult<Verdict> {
        let decode = |host: &mut _| Operands::decode(host, mode, self.config.sizes);
        match instruction {
            Instruction::Vmread => {
                let operands = decode(host)?;
                self.vmread(processor, host, gprs, operands)
            }
            Instruction::Vmwrite => {
                let operands = decode(host)?;
                self.vmwrite(processor, host, gprs, operands)
            }
            Instruction::Vmlaunch => self.vm_entry(processor, host, LaunchState::Clear),
            Instruction::Vmresume => self.vm_entry(processor, host, LaunchState::Launched),
            Instruction::Vmxon => {
                if processor.in_vmx_operation() {
                    return Ok(Fail(VmInstructionError::VmxonInRoot));
                }
                guest!(self.may_vmxon(host)?);
                let operands = decode(host)?;
                let region = guest!(operands.pointer(host, gprs)?);
                Ok(self.vmxon(processor, host, region))
            }
            Instruction::Vmxoff => {
                self.drop_current(processor);
                processor.vmxon = None;
                Ok(Succeed)
            }
            Instruction::Vmclear => {
                let operands = decode(host)?;
                let region = guest!(operands.pointer(host, gprs)?);
                Ok(self.vmclear(processor, host, region))
            }
            Instruction::Vmptrld => {
                let operands = decode(host)?;
                let region = guest!(operands.pointer(host, gprs)?);
                Ok(self.vmptrld(processor, host, region))
            }
            Instruction::Vmptrst => {
                let operands = decode(host)?;
                let pointer = processor.current.map_or(NO_VMCS, |current| current.region.as_u64());
                guest!(operands.store_pointer(host, gprs, pointer)?);
                Ok(Succeed)
            }
            Instruction::Invept => {
                let operands = decode(host)?;
                self.invept(processor, host, gprs, operands)
            }
            Instruction::Invvpid => {
                let operands = decode(host)?;
                self.invvpid(processor, host, gprs, operands)
            }
            // Dual-monitor treatment is not offered.
            Instruction::Vmcall => Ok(Fail(VmInstructionError::VmcallInRoot)),
        }
    }

    /// The conditions of VMXON that depend on what L1 is offered: fixed bits of CR0 and CR4 as L1
    /// sees them. IA32_FEATURE_CONTROL is locked with VMXON allowed, and A20 is not emulated.
    fn may_vmxon(&self, host: &mut impl Host) -> HostResult<Result<(), Fault>> {
        let caps = &self.config.caps;
        let mut seen = |register, mask, shadow| {
            let register = host.vmread(register)?;
            let mask = host.vmread(mask)?;
            let shadow = host.vmread(shadow)?;
            HostResult::Ok(crate::vmcs12::Vmcs12::read_shadowed(register, mask, shadow))
        };
        let cr0 = seen(Field::GUEST_CR0, Field::CR0_MASK, Field::CR0_SHADOW)?;
        let cr4 = seen(Field::GUEST_CR4, Field::CR4_MASK, Field::CR4_SHADOW)?;
        let fixed =
            |value, fixed0: u64, fixed1: u64| value & fixed0 == fixed0 && value & !fixed1 == 0;
        let good = fixed(cr0, caps.cr0_fixed0, caps.cr0_fixed1)
            && fixed(cr4, caps.cr4_fixed0, caps.cr4_fixed1);
        Ok(if good { Ok(()) } else { Err(Fault::Gp(0)) })
    }

    /// Whether `region` may be the address of a VMCS or VMXON region.
    fn is_region(&self, region: L1Gpa) -> bool {
        region.is_aligned(PAGE_SIZE) && region.fits(self.config.caps.physical_width)
    }

    /// Whether the first 4 bytes at `region` are our revision identifier, with bit 31 clear: shadow
    /// VMCSs are not offered.
    fn has_revision(&self, host: &mut impl L1Memory, region: L1Gpa) -> bool {
        let mut revision = [0; 4];
        host.read(region, &mut revision);
        u32::from_le_bytes(revision) == self.config.caps.basic.revision()
    }

    fn vmxon(&mut self, processor: &mut Processor, host: &mut impl Host, region: L1Gpa) -> Verdict {
        if !self.is_region(region) || !self.has_revision(host, region) {
            return FailInvalid;
        }
        processor.vmxon = Some(region);
        self.drop_current(processor);
        Succeed
    }

    fn vmclear(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        region: L1Gpa,
    ) -> Verdict {
        if !self.is_region(region) {
            return Fail(VmInstructionError::VmclearAddress);
        }
        if processor.vmxon == Some(region) {
            return Fail(VmInstructionError::VmclearVmxonPointer);
        }
        if processor.current.is_some_and(|current| current.region == region) {
            self.drop_current(processor);
        }
        self.vmcss.clear(host, region);
        Succeed
    }

    fn vmptrld(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        region: L1Gpa,
    ) -> Verdict {
        if !self.is_region(region) {
            return Fail(VmInstructionError::VmptrldAddress);
        }
        if processor.vmxon == Some(region) {
            return Fail(VmInstructionError::VmptrldVmxonPointer);
        }
        if !self.has_revision(host, region) {
            return Fail(VmInstructionError::VmptrldRevision);
        }
        if processor.current.is_some_and(|current| current.region == region) {
            return Succeed;
        }
        // First the new one: where there is none, nothing changes. The cache has more slots than
        // there are processors, so that one is free.
        match self.vmcss.acquire(host, region) {
            Some(id) => {
                self.drop_current(processor);
                processor.current = Some(Current { region, id });
                Succeed
            }
            None => Fail(VmInstructionError::VmptrldAddress),
        }
    }

    fn vmread(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &mut Gprs,
        operands: Operands,
    ) -> HostResult<Verdict> {
        let Some(vmcs) = self.vmcs12(processor) else { return Ok(FailInvalid) };
        let Some(component) = self.component(operands.encoding(host, gprs)?) else {
            return Ok(Fail(VmInstructionError::UnsupportedComponent));
        };
        let value = vmcs.get(component.field);
        let value = if component.high { value >> 32 } else { value };
        guest!(operands.store(host, gprs, value)?);
        Ok(Succeed)
    }

    fn vmwrite(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &Gprs,
        operands: Operands,
    ) -> HostResult<Verdict> {
        let Some(current) = processor.current else { return Ok(FailInvalid) };
        let value = guest!(operands.source(host, gprs)?);
        let Some(component) = self.component(operands.encoding(host, gprs)?) else {
            return Ok(Fail(VmInstructionError::UnsupportedComponent));
        };
        let field = component.field;
        if field.kind() == Kind::ReadOnly && !self.config.caps.misc.vmwrite_any() {
            return Ok(Fail(VmInstructionError::ReadOnlyComponent));
        }
        let vmcs = self.vmcss.get_mut(current.id).ok_or(HostError::WrongState)?;
        let value = if component.high {
            vmcs.get(field) & 0xffff_ffff | value << 32
        } else {
            // A full write outside of 64-bit mode has only the low half, and clears the other.
            value
        };
        vmcs.write(field, value);
        Ok(Succeed)
    }

    /// The field that an encoding names, if L1 is offered it.
    fn component(&self, encoding: u64) -> Option<Component> {
        Component::decode(encoding).filter(|component| self.config.caps.supports(component.field))
    }

    fn vm_entry(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        wanted: LaunchState,
    ) -> HostResult<Verdict> {
        let Some(current) = processor.current else { return Ok(FailInvalid) };
        let vmcs = self.vmcss.get(current.id).ok_or(HostError::WrongState)?;
        let blocked =
            Interruptibility::from_bits_retain(host.vmread(Field::GUEST_INTERRUPTIBILITY)? as u32);
        if blocked.contains(Interruptibility::MOV_SS) {
            return Ok(Fail(VmInstructionError::EntryBlockedByMovSs));
        }
        if vmcs.launch_state != wanted {
            return Ok(Fail(match wanted {
                LaunchState::Clear => VmInstructionError::VmlaunchNotClear,
                LaunchState::Launched => VmInstructionError::VmresumeNotLaunched,
            }));
        }
        Ok(match self.enter(processor, host, current.id, current.region)? {
            Entry::Done(handled) => Verdict::Entered(handled),
            Entry::Fail(error) => Fail(error),
        })
    }

    fn invept(
        &mut self,
        processor: &Processor,
        host: &mut impl Host,
        gprs: &Gprs,
        operands: Operands,
    ) -> HostResult<Verdict> {
        const SINGLE: u64 = 1;
        const ALL: u64 = 2;
        let invalid = Ok(Fail(VmInstructionError::InvalidInvalidation));
        let caps = &self.config.caps;
        let needed = match operands.invalidation_kind(host, gprs)? {
            SINGLE => EptVpidCap::INVEPT_SINGLE,
            ALL => EptVpidCap::INVEPT_ALL,
            _ => return invalid,
        };
        if !caps.ept_vpid.contains(needed) {
            return invalid;
        }
        let operand = guest!(operands.invalidation(host, gprs)?);
        let [eptp, reserved] = operand.descriptor;
        let eptp = Eptp::from(eptp);
        if reserved != 0 {
            return invalid;
        }
        if operand.kind == SINGLE {
            // The EPTP must be one that VM entry would accept.
            if !eptp.is_valid(caps.ept_vpid, caps.physical_width) {
                return invalid;
            }
            self.shadow.invalidate(host, processor.number, Some(eptp))?;
        } else {
            self.shadow.invalidate(host, processor.number, None)?;
        }
        Ok(Succeed)
    }

    fn invvpid(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &Gprs,
        operands: Operands,
    ) -> HostResult<Verdict> {
        const ADDRESS: u64 = 0;
        const SINGLE: u64 = 1;
        const ALL: u64 = 2;
        const RETAIN_GLOBALS: u64 = 3;
        let invalid = Ok(Fail(VmInstructionError::InvalidInvalidation));
        let caps = &self.config.caps;
        let needed = match operands.invalidation_kind(host, gprs)? {
            ADDRESS => EptVpidCap::INVVPID_ADDRESS,
            SINGLE => EptVpidCap::INVVPID_SINGLE,
            ALL => EptVpidCap::INVVPID_ALL,
            RETAIN_GLOBALS => EptVpidCap::INVVPID_RETAIN_GLOBALS,
            _ => return invalid,
        };
        if !caps.ept_vpid.contains(needed) {
            return invalid;
        }
        let operand = guest!(operands.invalidation(host, gprs)?);
        let [low, address] = operand.descriptor;
        let vpid = low as u16;
        if low >> 16 != 0 || vpid == 0 && operand.kind != ALL {
            return invalid;
        }
        let scope = match operand.kind {
            ADDRESS => {
                if !is_canonical(address, caps.linear_width) {
                    return invalid;
                }
                InvVpid::Address(vpid, Gva::new(address))
            }
            SINGLE => InvVpid::Single(vpid),
            RETAIN_GLOBALS => InvVpid::RetainGlobals(vpid),
            _ => InvVpid::All,
        };
        processor.vpids.invalidate(host, scope)?;
        Ok(Succeed)
    }
}

#[cfg(test)]
mod tests;
