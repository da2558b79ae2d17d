//! What do the VMX instructions do?
//!
//! SDM Vol. 3C, "VMX Instruction Reference" and "VM Functions". In a guest all of them exit but
//! VMFUNC. The methods of [`Processor::root`] are the same instructions with their operands given
//! directly, for a hypervisor below the software under test.

use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::controls::{EPTP_LIST_LEN, ProcCtls2, VmFuncCtls};
use vmx_defs::ept::Eptp;
use vmx_defs::event::Interruptibility;
use vmx_defs::field::{Component, Kind as FieldKind};
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{ExitReason, Field, Gva, Hpa, VmInstructionError};

use crate::addr::is_canonical;
use crate::caps::LINEAR_WIDTH;
use crate::checks::fixed;
use crate::instructions::vmx_flags;
use crate::memory::Memory;
use crate::operation::Operation;
use crate::paging::Kind;
use crate::processor::{Outcome, Processor, VmxMode};
use crate::registers::{Segment, cr0, cr4, gpr, rflags, segment};
use crate::stop::{Exception, Flow, exit, fault};
use crate::vmcs::Vmcs;

/// How a VMX instruction fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmxFailure {
    /// VMfailInvalid.
    Invalid,
    /// VMfail with this number: VMfailValid where there is a current VMCS, else VMfailInvalid.
    Error(VmInstructionError),
}

impl From<VmInstructionError> for VmxFailure {
    fn from(error: VmInstructionError) -> Self {
        Self::Error(error)
    }
}

/// How a VMX instruction ends, unless it faults or exits.
pub type VmxResult<T = ()> = Result<T, VmxFailure>;

/// Bits 11:0 and 63:48 that a descriptor of INVVPID must not have are above the VPID.
const VPID_BITS: u32 = 16;

/// VMX instructions of root software, by value.
///
/// They may be called in root operation only.
#[derive(Debug)]
pub struct Root<'a> {
    processor: &'a mut Processor,
    memory: &'a mut Memory,
}

impl Processor {
    /// The VMX instructions for a hypervisor that this processor runs in root operation.
    ///
    /// # Panics
    /// Where the processor is not in root operation: a bug of the caller.
    pub fn root<'a>(&'a mut self, memory: &'a mut Memory) -> Root<'a> {
        assert_eq!(self.mode, VmxMode::Root, "the hypervisor runs in root operation");
        Root { processor: self, memory }
    }

    /// Goes into VMX operation, with a region that has the revision identifier.
    pub fn enter_root(&mut self, region: Hpa) {
        self.mode = VmxMode::Root;
        self.vmxon = Some(region);
        self.current = None;
        self.regs.cr4 |= cr4::VMXE;
    }

    /// Whether `region` may be the address of a VMCS or VMXON region.
    fn is_region(&self, region: Hpa) -> bool {
        region.is_aligned(PAGE_SIZE) && region.fits(self.caps.physical_width)
    }

    fn has_revision(&self, memory: &Memory, region: Hpa) -> bool {
        memory.read_u32(region) == self.caps.basic.revision()
    }

    fn vmxon_region(&mut self, memory: &Memory, region: Hpa) -> VmxResult {
        if !self.is_region(region) || !self.has_revision(memory, region) {
            return Err(VmxFailure::Invalid);
        }
        self.enter_root(region);
        Ok(())
    }

    fn vmclear_region(&mut self, memory: &mut Memory, region: Hpa) -> VmxResult {
        if !self.is_region(region) {
            return Err(VmInstructionError::VmclearAddress.into());
        }
        if self.vmxon == Some(region) {
            return Err(VmInstructionError::VmclearVmxonPointer.into());
        }
        match self.active.iter().position(|(active, _)| *active == region) {
            Some(index) => {
                let (_, mut vmcs) = self.active.swap_remove(index);
                vmcs.launched = false;
                vmcs.store(memory, region);
                self.current = match self.current {
                    Some(current) if current == index => None,
                    Some(current) if current == self.active.len() => Some(index),
                    other => other,
                };
            }
            None => Vmcs::clear_in_memory(memory, region),
        }
        Ok(())
    }

    fn vmptrld_region(&mut self, memory: &Memory, region: Hpa) -> VmxResult {
        if !self.is_region(region) {
            return Err(VmInstructionError::VmptrldAddress.into());
        }
        if self.vmxon == Some(region) {
            return Err(VmInstructionError::VmptrldVmxonPointer.into());
        }
        if !self.has_revision(memory, region) {
            return Err(VmInstructionError::VmptrldRevision.into());
        }
        let index = self.active.iter().position(|(active, _)| *active == region);
        self.current = Some(index.unwrap_or_else(|| {
            self.active.push((region, Vmcs::load(memory, region)));
            self.active.len() - 1
        }));
        Ok(())
    }

    fn component(&self, encoding: u64) -> VmxResult<Component> {
        Component::decode(encoding)
            .filter(|component| self.caps.supports(component.field))
            .ok_or(VmInstructionError::UnsupportedComponent.into())
    }

    fn vmread_field(&self, encoding: u64) -> VmxResult<u64> {
        let vmcs = self.vmcs().ok_or(VmxFailure::Invalid)?;
        let component = self.component(encoding)?;
        let value = vmcs.get(component.field);
        Ok(if component.high { value >> 32 } else { value })
    }

    fn vmwrite_field(&mut self, encoding: u64, value: u64) -> VmxResult {
        let vmcs = self.vmcs().ok_or(VmxFailure::Invalid)?;
        let component = self.component(encoding)?;
        let field = component.field;
        if field.kind() == FieldKind::ReadOnly && !self.caps.misc.vmwrite_any() {
            return Err(VmInstructionError::ReadOnlyComponent.into());
        }
        let value =
            if component.high { vmcs.get(field) & 0xffff_ffff | value << 32 } else { value };
        if let Some(vmcs) = self.vmcs_mut() {
            vmcs.set(field, value);
        }
        Ok(())
    }

    fn launch(&mut self, memory: &mut Memory, launch: bool) -> VmxResult<Outcome> {
        let vmcs = self.vmcs().ok_or(VmxFailure::Invalid)?;
        if self.blocking.contains(Interruptibility::MOV_SS) {
            return Err(VmInstructionError::EntryBlockedByMovSs.into());
        }
        if launch && vmcs.launched {
            return Err(VmInstructionError::VmlaunchNotClear.into());
        }
        if !launch && !vmcs.launched {
            return Err(VmInstructionError::VmresumeNotLaunched.into());
        }
        Ok(self.vm_entry(memory)?)
    }

    /// Whether this type of INVEPT or INVVPID exists.
    fn has_type(&self, kind: u64, types: &[EptVpidCap]) -> bool {
        usize::try_from(kind)
            .ok()
            .and_then(|kind| types.get(kind))
            .is_some_and(|needed| !needed.is_empty() && self.caps.ept_vpid.contains(*needed))
    }

    fn invept_descriptor(&mut self, kind: u64, descriptor: [u64; 2]) -> VmxResult {
        const SINGLE: u64 = 1;
        let [eptp, reserved] = descriptor;
        let invalid = VmInstructionError::InvalidInvalidation;
        if !self.has_invept_type(kind) || reserved != 0 {
            return Err(invalid.into());
        }
        if kind == SINGLE {
            if !self.caps.accepts_eptp(eptp) {
                return Err(invalid.into());
            }
            self.caches.invept_single(Eptp::from(eptp).table());
        } else {
            self.caches.invept_all();
        }
        Ok(())
    }

    fn has_invept_type(&self, kind: u64) -> bool {
        let types = [EptVpidCap::empty(), EptVpidCap::INVEPT_SINGLE, EptVpidCap::INVEPT_ALL];
        self.has_type(kind, &types)
    }

    fn has_invvpid_type(&self, kind: u64) -> bool {
        let types = [
            EptVpidCap::INVVPID_ADDRESS,
            EptVpidCap::INVVPID_SINGLE,
            EptVpidCap::INVVPID_ALL,
            EptVpidCap::INVVPID_RETAIN_GLOBALS,
        ];
        self.has_type(kind, &types)
    }

    fn invvpid_descriptor(&mut self, kind: u64, descriptor: [u64; 2]) -> VmxResult {
        const ADDRESS: u64 = 0;
        const SINGLE: u64 = 1;
        const ALL: u64 = 2;
        let [low, address] = descriptor;
        let vpid = low as u16;
        let bad = !self.has_invvpid_type(kind)
            || low >> VPID_BITS != 0
            || kind != ALL && vpid == 0
            || kind == ADDRESS && !is_canonical(address, LINEAR_WIDTH);
        if bad {
            return Err(VmInstructionError::InvalidInvalidation.into());
        }
        match kind {
            ADDRESS => self.caches.invvpid_address(vpid, Gva::new(address)),
            SINGLE => self.caches.invvpid_single(vpid),
            ALL => self.caches.invvpid_all(),
            _ => self.caches.invvpid_retaining_globals(vpid),
        }
        Ok(())
    }

    /// What an instruction ends with: sets the flags and the VM-instruction error.
    fn conclude(&mut self, result: VmxResult) {
        let flag = match result {
            Ok(()) => 0,
            Err(VmxFailure::Error(error)) => match self.vmcs_mut() {
                Some(vmcs) => {
                    vmcs.set(Field::VM_INSTRUCTION_ERROR, error.number().into());
                    rflags::ZF
                }
                None => rflags::CF,
            },
            Err(VmxFailure::Invalid) => rflags::CF,
        };
        self.regs.rflags = vmx_flags(self.regs.rflags, flag);
    }

    /// A VMX instruction of the software that runs.
    pub(crate) fn vmx_instruction(
        &mut self,
        memory: &mut Memory,
        operation: &Operation,
    ) -> Flow<Option<Outcome>> {
        if let Operation::Vmfunc { rax, rcx } = *operation {
            self.vmfunc(memory, operation, rax as u32, rcx as u32)?;
            return Ok(None);
        }
        self.vmx_faults(operation)?;
        let result = match *operation {
            Operation::Vmxon { operand } => self.vmxon_instruction(memory, operand)?,
            Operation::Vmxoff => {
                self.mode = VmxMode::Off;
                self.vmxon = None;
                self.current = None;
                Ok(())
            }
            Operation::Vmclear { operand } => {
                let region = Hpa::new(self.read_operand(memory, operand, 8)?);
                self.vmclear_region(memory, region)
            }
            Operation::Vmptrld { operand } => {
                let region = Hpa::new(self.read_operand(memory, operand, 8)?);
                self.vmptrld_region(memory, region)
            }
            Operation::Vmptrst { operand } => {
                let region = self.current_region().map_or(u64::MAX, Hpa::as_u64);
                self.write_operand(memory, operand, 8, region)?;
                Ok(())
            }
            Operation::Vmread { encoding } => {
                let read = self.vmread_field(self.operand(encoding));
                read.map(|value| self.regs.gprs[gpr::RAX] = self.operand(value))
            }
            Operation::VmreadMemory { encoding, operand } => {
                match self.vmread_field(self.operand(encoding)) {
                    Ok(value) => {
                        self.write_operand(memory, operand, self.operand_size(), value)?;
                        Ok(())
                    }
                    Err(failure) => Err(failure),
                }
            }
            Operation::Vmwrite { encoding, value } => {
                self.vmwrite_field(self.operand(encoding), self.operand(value))
            }
            Operation::VmwriteMemory { encoding, operand } => {
                if self.current.is_none() {
                    Err(VmxFailure::Invalid)
                } else {
                    let value = self.read_operand(memory, operand, self.operand_size())?;
                    self.vmwrite_field(self.operand(encoding), value)
                }
            }
            Operation::Vmlaunch | Operation::Vmresume => {
                match self.launch(memory, *operation == Operation::Vmlaunch) {
                    Ok(outcome) => return Ok(Some(outcome)),
                    Err(failure) => Err(failure),
                }
            }
            Operation::Invept { kind, descriptor } => {
                let kind = self.operand(kind);
                if self.has_invept_type(kind) {
                    let descriptor = self.read_descriptor(memory, descriptor)?;
                    self.invept_descriptor(kind, descriptor)
                } else {
                    Err(VmInstructionError::InvalidInvalidation.into())
                }
            }
            Operation::Invvpid { kind, descriptor } => {
                let kind = self.operand(kind);
                if self.has_invvpid_type(kind) {
                    let descriptor = self.read_descriptor(memory, descriptor)?;
                    self.invvpid_descriptor(kind, descriptor)
                } else {
                    Err(VmInstructionError::InvalidInvalidation.into())
                }
            }
            Operation::Vmcall => Err(VmInstructionError::VmcallInRoot.into()),
            _ => unreachable!("all other operations are dispatched elsewhere"),
        };
        self.conclude(result);
        Ok(None)
    }

    /// The faults and exits that come before operands.
    fn vmx_faults(&self, operation: &Operation) -> Flow {
        let vmxon = matches!(operation, Operation::Vmxon { .. });
        if self.mode == VmxMode::Off && !vmxon {
            return fault(Exception::UD);
        }
        if self.mode == VmxMode::NonRoot {
            let reason = match operation {
                Operation::Vmxon { .. } => ExitReason::VMXON,
                Operation::Vmxoff => ExitReason::VMXOFF,
                Operation::Vmclear { .. } => ExitReason::VMCLEAR,
                Operation::Vmptrld { .. } => ExitReason::VMPTRLD,
                Operation::Vmptrst { .. } => ExitReason::VMPTRST,
                Operation::Vmread { .. } | Operation::VmreadMemory { .. } => ExitReason::VMREAD,
                Operation::Vmwrite { .. } | Operation::VmwriteMemory { .. } => ExitReason::VMWRITE,
                Operation::Vmlaunch => ExitReason::VMLAUNCH,
                Operation::Vmresume => ExitReason::VMRESUME,
                Operation::Invept { .. } => ExitReason::INVEPT,
                Operation::Invvpid { .. } => ExitReason::INVVPID,
                _ => ExitReason::VMCALL,
            };
            return exit(self.instruction_exit(operation, reason));
        }
        let compatibility = self.regs.is_ia32e() && !self.regs.is_64bit();
        let real = self.regs.cr0 & cr0::PE == 0 || self.regs.rflags & rflags::VM != 0;
        if real || compatibility || vmxon && self.regs.cr4 & cr4::VMXE == 0 {
            return fault(Exception::UD);
        }
        self.privileged()
    }

    fn vmxon_instruction(&mut self, memory: &mut Memory, operand: u64) -> Flow<VmxResult> {
        const LOCKED_AND_OUTSIDE_SMX: u64 = 5;
        if self.mode == VmxMode::Root {
            return Ok(Err(VmInstructionError::VmxonInRoot.into()));
        }
        let caps = &self.caps;
        let enabled = self.feature_control & LOCKED_AND_OUTSIDE_SMX == LOCKED_AND_OUTSIDE_SMX;
        let cr0_fits = fixed(self.regs.cr0, caps.cr0_fixed0, caps.cr0_fixed1);
        let cr4_fits = fixed(self.regs.cr4, caps.cr4_fixed0, caps.cr4_fixed1);
        if !enabled || !cr0_fits || !cr4_fits {
            return fault(Exception::GP);
        }
        let region = Hpa::new(self.read_operand(memory, operand, 8)?);
        Ok(self.vmxon_region(memory, region))
    }

    /// The bits of a register operand that count.
    fn operand(&self, value: u64) -> u64 {
        if self.regs.is_64bit() { value } else { value & 0xffff_ffff }
    }

    fn operand_size(&self) -> u8 {
        if self.regs.is_64bit() { 8 } else { 4 }
    }

    /// The linear address of a memory operand, in DS.
    fn operand_address(&self, offset: u64, write: bool) -> Flow<u64> {
        if self.regs.is_64bit() {
            return Ok(offset);
        }
        let data = &self.regs.segments[segment::DS];
        let readable = data.rights & 8 == 0 || data.rights & 2 != 0;
        let writable = data.rights & 0xa == 2;
        if data.rights & Segment::UNUSABLE != 0 || !readable || write && !writable {
            return fault(Exception::GP);
        }
        Ok(data.base.wrapping_add(offset & 0xffff_ffff) & 0xffff_ffff)
    }

    fn read_operand(&mut self, memory: &mut Memory, offset: u64, size: u8) -> Flow<u64> {
        let at = self.operand_address(offset, false)?;
        let access = self.access(Kind::Read);
        self.read_linear(memory, at, size, access)
    }

    fn write_operand(&mut self, memory: &mut Memory, offset: u64, size: u8, value: u64) -> Flow {
        let at = self.operand_address(offset, true)?;
        let access = self.access(Kind::Write);
        self.write_linear(memory, at, size, value, access)
    }

    /// The 16 bytes of a descriptor.
    fn read_descriptor(&mut self, memory: &mut Memory, offset: u64) -> Flow<[u64; 2]> {
        let low = self.read_operand(memory, offset, 8)?;
        let high = self.read_operand(memory, offset.wrapping_add(8), 8)?;
        Ok([low, high])
    }

    /// VMFUNC (SDM Vol. 3C, "VM Functions" and "EPTP Switching"). There is no check of the CPL.
    fn vmfunc(&mut self, memory: &mut Memory, operation: &Operation, eax: u32, ecx: u32) -> Flow {
        const FUNCTIONS: u32 = 64;
        let Some(vmcs) = self.guest_vmcs() else { return fault(Exception::UD) };
        if !vmcs.proc2().contains(ProcCtls2::VM_FUNCTIONS) || eax >= FUNCTIONS {
            return fault(Exception::UD);
        }
        let refused = exit(self.instruction_exit(operation, ExitReason::VMFUNC));
        if eax != 0 || !vmcs.vm_functions().contains(VmFuncCtls::EPTP_SWITCHING) {
            return refused;
        }
        if ecx >= EPTP_LIST_LEN {
            return refused;
        }
        let list = vmcs.get(Field::EPTP_LIST_ADDRESS);
        let entry = memory.read_u64(Hpa::new(list + u64::from(ecx) * 8));
        if !self.caps.accepts_eptp(entry) {
            return refused;
        }
        let vpid = vmcs.proc2().contains(ProcCtls2::VPID);
        let indexed = self.caps.has_proc2(ProcCtls2::EPT_VIOLATION_VE);
        if let Some(vmcs) = self.vmcs_mut() {
            vmcs.set(Field::EPT_POINTER, entry);
            if indexed {
                vmcs.set(Field::EPTP_INDEX, ecx.into());
            }
        }
        // PDPTE registers stay (S5), and with VPIDs everything that is cached (S4).
        if !vpid {
            self.caches.eptp_switch_without_vpid();
        }
        Ok(())
    }
}

impl Root<'_> {
    /// VMCLEAR.
    ///
    /// # Errors
    /// VMfail.
    pub fn vmclear(&mut self, region: Hpa) -> VmxResult {
        self.processor.vmclear_region(self.memory, region)
    }

    /// VMPTRLD.
    ///
    /// # Errors
    /// VMfail.
    pub fn vmptrld(&mut self, region: Hpa) -> VmxResult {
        self.processor.vmptrld_region(self.memory, region)
    }

    /// VMREAD.
    ///
    /// # Errors
    /// VMfail.
    pub fn vmread(&mut self, field: Field) -> VmxResult<u64> {
        self.processor.vmread_field(field.encoding().into())
    }

    /// VMWRITE.
    ///
    /// # Errors
    /// VMfail.
    pub fn vmwrite(&mut self, field: Field, value: u64) -> VmxResult {
        self.processor.vmwrite_field(field.encoding().into(), value)
    }

    /// VMLAUNCH.
    ///
    /// # Errors
    /// VMfail; a number is in the VM-instruction error field, too.
    pub fn vmlaunch(&mut self) -> VmxResult<Outcome> {
        self.enter(true)
    }

    /// VMRESUME.
    ///
    /// # Errors
    /// As for VMLAUNCH.
    pub fn vmresume(&mut self) -> VmxResult<Outcome> {
        self.enter(false)
    }

    fn enter(&mut self, launch: bool) -> VmxResult<Outcome> {
        let entered = self.processor.launch(self.memory, launch);
        if let Err(failure) = entered {
            self.processor.conclude(Err(failure));
        }
        entered
    }

    /// INVEPT, with its type and the two halves of its descriptor.
    ///
    /// # Errors
    /// VMfail.
    pub fn invept(&mut self, kind: u64, descriptor: [u64; 2]) -> VmxResult {
        self.processor.invept_descriptor(kind, descriptor)
    }

    /// INVVPID, with its type and the two halves of its descriptor.
    ///
    /// # Errors
    /// VMfail.
    pub fn invvpid(&mut self, kind: u64, descriptor: [u64; 2]) -> VmxResult {
        self.processor.invvpid_descriptor(kind, descriptor)
    }
}
