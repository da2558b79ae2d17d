//! What did L1 ask?
//!
//! Decoding of L1's VMX instructions, as VM exits report them: may L1 execute the instruction in
//! the mode and at the privilege level it is in, where is the operand, and what is in it? The
//! faults are those of the instructions' operation sections (SDM Vol. 3C, "VMX Instruction
//! Reference"); the operand's description is that of "Instruction-Information Field" and of the
//! exit qualification for these instructions ("Information for VM Exits Due to Instruction
//! Execution").
//!
//! Order matters to L1: [`Instruction::check`] comes first, then the register operands, then the
//! memory operand, as far as the instruction's operation gets. Memory is read once, all of it, and
//! written only when all pages that the operand touches are known to be writable.

use crate::host::{HostResult, L1Memory, Vmx};
use crate::inject::Fault;
use crate::paging::{
    Access, AddressSizes, CR0_PE, CR4_VMXE, EFER_LMA, Paging, RFLAGS_VM, is_canonical, linear_width,
};
use crate::regs::{Gprs, RSP};
use crate::vmcs12::Vmcs12;
use vmx_defs::exit::InstructionInfo;
use vmx_defs::{ExitReason, Field, Gva, L1Gpa};

/// A VMX instruction of L1 that exits to L0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Instruction {
    /// INVEPT.
    Invept,
    /// INVVPID.
    Invvpid,
    /// VMCALL.
    Vmcall,
    /// VMCLEAR.
    Vmclear,
    /// VMLAUNCH.
    Vmlaunch,
    /// VMPTRLD.
    Vmptrld,
    /// VMPTRST.
    Vmptrst,
    /// VMREAD.
    Vmread,
    /// VMRESUME.
    Vmresume,
    /// VMWRITE.
    Vmwrite,
    /// VMXOFF.
    Vmxoff,
    /// VMXON.
    Vmxon,
}

/// The mode that L1 executes a VMX instruction in: one of the two where it may.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Protected mode without IA-32e mode: register operands have 32 bits.
    Protected,
    /// 64-bit mode.
    Long64,
}

impl Mode {
    /// The bits of a register operand that count.
    #[inline]
    pub const fn operand_mask(self) -> u64 {
        match self {
            Mode::Protected => 0xffff_ffff,
            Mode::Long64 => u64::MAX,
        }
    }
}

/// Bits of access-rights fields (SDM Vol. 3C, "Guest Register State", "Format of Access Rights").
mod access_rights {
    pub(super) const TYPE_WRITABLE_OR_READABLE: u64 = 1 << 1;
    pub(super) const TYPE_EXPAND_DOWN: u64 = 1 << 2;
    pub(super) const TYPE_CODE: u64 = 1 << 3;
    pub(super) const CODE_OR_DATA: u64 = 1 << 4;
    pub(super) const PRESENT: u64 = 1 << 7;
    /// CS.L.
    pub(super) const LONG: u64 = 1 << 13;
    /// D/B.
    pub(super) const BIG: u64 = 1 << 14;
    pub(super) const UNUSABLE: u64 = 1 << 16;

    /// DPL, which in SS is the CPL.
    pub(super) const fn dpl(rights: u64) -> u8 {
        (rights >> 5 & 3) as u8
    }
}

impl Instruction {
    /// The instruction that a VM exit reports, if it is one of them. VMFUNC is not: in VMX root
    /// operation, where L1 believes to be, it is #UD.
    pub fn from_exit(reason: ExitReason) -> Option<Self> {
        Some(match reason.basic() {
            ExitReason::INVEPT => Self::Invept,
            ExitReason::INVVPID => Self::Invvpid,
            ExitReason::VMCALL => Self::Vmcall,
            ExitReason::VMCLEAR => Self::Vmclear,
            ExitReason::VMLAUNCH => Self::Vmlaunch,
            ExitReason::VMPTRLD => Self::Vmptrld,
            ExitReason::VMPTRST => Self::Vmptrst,
            ExitReason::VMREAD => Self::Vmread,
            ExitReason::VMRESUME => Self::Vmresume,
            ExitReason::VMWRITE => Self::Vmwrite,
            ExitReason::VMXOFF => Self::Vmxoff,
            ExitReason::VMXON => Self::Vmxon,
            _ => return None,
        })
    }

    /// Whether L1, whose VMCS is current, may execute the instruction at all: the #UD and #GP(0)
    /// that come before anything else. `in_vmx_operation` says whether L1 has executed VMXON.
    ///
    /// VMXON outside of VMX operation has further conditions for #GP(0) (fixed bits of CR0 and CR4,
    /// IA32_FEATURE_CONTROL), which are the caller's, since they depend on what L1 is offered.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn check(
        self,
        host: &mut impl Vmx,
        in_vmx_operation: bool,
    ) -> HostResult<Result<Mode, Fault>> {
        // In IA-32e mode CR0.PE is 1 and RFLAGS.VM is 0.
        let mode = if host.vmread(Field::GUEST_EFER)? & EFER_LMA != 0 {
            if host.vmread(Field::GUEST_CS_AR)? & access_rights::LONG == 0 {
                return Ok(Err(Fault::Ud));
            }
            Mode::Long64
        } else {
            if host.vmread(Field::GUEST_CR0)? & CR0_PE == 0
                || host.vmread(Field::GUEST_RFLAGS)? & RFLAGS_VM != 0
            {
                return Ok(Err(Fault::Ud));
            }
            Mode::Protected
        };
        if !in_vmx_operation {
            if self != Self::Vmxon {
                return Ok(Err(Fault::Ud));
            }
            // As L1 reads it: the register itself has CR4.VMXE set, since L0 is in VMX operation.
            let cr4 = Vmcs12::read_shadowed(
                host.vmread(Field::GUEST_CR4)?,
                host.vmread(Field::CR4_MASK)?,
                host.vmread(Field::CR4_SHADOW)?,
            );
            if cr4 & CR4_VMXE == 0 {
                return Ok(Err(Fault::Ud));
            }
        }
        if access_rights::dpl(host.vmread(Field::GUEST_SS_AR)?) > 0 {
            return Ok(Err(Fault::Gp(0)));
        }
        Ok(Ok(mode))
    }
}

/// Whether the guest whose VMCS is current is in 64-bit mode.
///
/// # Errors
/// [`crate::HostError::VmRead`].
pub fn is_64_bit(host: &mut impl Vmx) -> HostResult<bool> {
    Ok(host.vmread(Field::GUEST_EFER)? & EFER_LMA != 0
        && host.vmread(Field::GUEST_CS_AR)? & access_rights::LONG != 0)
}

/// Value of a general register of the guest whose VMCS is current, RSP included.
///
/// # Errors
/// [`crate::HostError::VmRead`].
#[inline]
pub fn register(host: &mut impl Vmx, gprs: &Gprs, number: u8) -> HostResult<u64> {
    match number & 15 {
        RSP => host.vmread(Field::GUEST_RSP),
        number => Ok(gprs.get(number)),
    }
}

/// Sets a general register of the guest whose VMCS is current, RSP included.
///
/// # Errors
/// [`crate::HostError::VmWrite`].
#[inline]
pub fn set_register(host: &mut impl Vmx, gprs: &mut Gprs, number: u8, value: u64) -> HostResult {
    match number & 15 {
        RSP => host.vmwrite(Field::GUEST_RSP, value),
        number => {
            gprs.set(number, value);
            Ok(())
        }
    }
}

/// The operands of a VMX instruction that exited, for an L1 that may execute it in `mode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operands {
    /// The mode of L1.
    pub mode: Mode,
    /// The VM-exit instruction information.
    pub info: InstructionInfo,
    /// What CPUID tells L1 about addresses.
    pub sizes: AddressSizes,
}

/// Operand of INVEPT or INVVPID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Invalidation {
    /// The type, from the register operand: 64 bits in 64-bit mode, else 32.
    pub kind: u64,
    /// The descriptor: bits 63:0, then bits 127:64.
    pub descriptor: [u64; 2],
}

/// Takes the value out of a `HostResult<Result<T, Fault>>`, or returns from the function.
macro_rules! or_fault {
    ($value:expr) => {
        match $value {
            Ok(value) => value,
            Err(fault) => return Ok(Err(fault)),
        }
    };
}

impl Operands {
    /// The operands of the instruction that the last VM exit reports.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn decode(host: &mut impl Vmx, mode: Mode, sizes: AddressSizes) -> HostResult<Self> {
        let info = InstructionInfo::from(host.vmread(Field::EXIT_INSTRUCTION_INFO)? as u32);
        Ok(Self { mode, info, sizes })
    }

    /// The m64 operand of VMCLEAR, VMPTRLD and VMXON: a physical address.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn pointer(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &Gprs,
    ) -> HostResult<Result<L1Gpa, Fault>> {
        let bytes = or_fault!(self.read_memory::<8>(host, gprs)?);
        Ok(Ok(L1Gpa::new(u64::from_le_bytes(bytes))))
    }

    /// Stores the m64 operand of VMPTRST.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn store_pointer(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &Gprs,
        value: u64,
    ) -> HostResult<Result<(), Fault>> {
        self.write_memory(host, gprs, value.to_le_bytes())
    }

    /// The register operand of VMREAD and VMWRITE that holds the encoding of a field: 64 bits in
    /// 64-bit mode, else 32.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn encoding(&self, host: &mut impl Vmx, gprs: &Gprs) -> HostResult<u64> {
        Ok(register(host, gprs, self.info.reg2())? & self.mode.operand_mask())
    }

    /// The value that VMWRITE shall write: a register or memory operand of 64 bits in 64-bit mode,
    /// else of 32.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn source(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &Gprs,
    ) -> HostResult<Result<u64, Fault>> {
        if self.info.is_register() {
            return Ok(Ok(register(host, gprs, self.info.reg1())? & self.mode.operand_mask()));
        }
        Ok(Ok(match self.mode {
            Mode::Protected => u32::from_le_bytes(or_fault!(self.read_memory(host, gprs)?)).into(),
            Mode::Long64 => u64::from_le_bytes(or_fault!(self.read_memory(host, gprs)?)),
        }))
    }

    /// Stores what VMREAD has read: into a register or memory operand of 64 bits in 64-bit mode,
    /// else of 32, of which the value keeps the low ones.
    ///
    /// # Errors
    /// [`crate::HostError`] of VMREAD or VMWRITE.
    pub fn store(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &mut Gprs,
        value: u64,
    ) -> HostResult<Result<(), Fault>> {
        let value = value & self.mode.operand_mask();
        if self.info.is_register() {
            return set_register(host, gprs, self.info.reg1(), value).map(Ok);
        }
        match self.mode {
            Mode::Protected => self.write_memory(host, gprs, (value as u32).to_le_bytes()),
            Mode::Long64 => self.write_memory(host, gprs, value.to_le_bytes()),
        }
    }

    /// The type that INVEPT or INVVPID names in its register operand.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn invalidation_kind(&self, host: &mut impl Vmx, gprs: &Gprs) -> HostResult<u64> {
        self.encoding(host, gprs)
    }

    /// Both operands of INVEPT or INVVPID. An unsupported type is VMfail before the descriptor is
    /// read: see [`Self::invalidation_kind`].
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn invalidation(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &Gprs,
    ) -> HostResult<Result<Invalidation, Fault>> {
        let kind = self.invalidation_kind(host, gprs)?;
        let bytes = u128::from_le_bytes(or_fault!(self.read_memory::<16>(host, gprs)?));
        Ok(Ok(Invalidation { kind, descriptor: [bytes as u64, (bytes >> 64) as u64] }))
    }

    /// Reads all of a memory operand, once.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn read_memory<const SIZE: usize>(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &Gprs,
    ) -> HostResult<Result<[u8; SIZE], Fault>> {
        let pages = or_fault!(self.pages(host, gprs, SIZE, Access::Read)?);
        let mut bytes = [0; SIZE];
        if let Some((head, tail)) = bytes.split_at_mut_checked(pages.head) {
            host.read(pages.first, head);
            if !tail.is_empty() {
                host.read(pages.second, tail);
            }
        }
        Ok(Ok(bytes))
    }

    /// Writes all of a memory operand, or on a fault nothing.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn write_memory<const SIZE: usize>(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &Gprs,
        bytes: [u8; SIZE],
    ) -> HostResult<Result<(), Fault>> {
        let pages = or_fault!(self.pages(host, gprs, SIZE, Access::Write)?);
        if let Some((head, tail)) = bytes.split_at_checked(pages.head) {
            host.write(pages.first, head);
            if !tail.is_empty() {
                host.write(pages.second, tail);
            }
        }
        Ok(Ok(()))
    }

    /// The linear address of a memory operand of `size` bytes, 1 or more.
    ///
    /// # Errors
    /// [`crate::HostError::VmRead`].
    pub fn linear_address(
        &self,
        host: &mut impl Vmx,
        gprs: &Gprs,
        size: usize,
        access: Access,
    ) -> HostResult<Result<Gva, Fault>> {
        let info = self.info;
        // The exit qualification is the displacement, sign-extended; with RIP-relative addressing
        // the next instruction's address is already in it.
        let mut offset = host.vmread(Field::EXIT_QUALIFICATION)?;
        if !info.base_invalid() {
            offset = offset.wrapping_add(register(host, gprs, info.base())?);
        }
        if !info.index_invalid() {
            let index = register(host, gprs, info.index())?;
            offset = offset.wrapping_add(index << info.scaling());
        }
        offset &= match info.address_size() {
            0 => 0xffff,
            1 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let last = size.saturating_sub(1) as u64;
        match self.mode {
            Mode::Long64 => long_address(host, info.segment(), offset, last),
            Mode::Protected => {
                protected_address(host, info.segment(), offset & 0xffff_ffff, last, access)
            }
        }
    }

    /// Where the bytes of a memory operand are in L1's physical memory: in one page or in two.
    fn pages(
        &self,
        host: &mut (impl Vmx + L1Memory),
        gprs: &Gprs,
        size: usize,
        access: Access,
    ) -> HostResult<Result<Pages, Fault>> {
        let start = or_fault!(self.linear_address(host, gprs, size, access)?);
        let paging = Paging::read(host, self.sizes)?;
        let room = vmx_defs::addr::PAGE_SIZE.saturating_sub(start.page_offset()) as usize;
        let head = size.min(room);
        let first = or_fault!(paging.translate(host, start, access).map_err(Fault::from));
        let second = if head < size {
            // Linear addresses wrap around at the end of the mode's address space.
            let mask = self.mode.operand_mask();
            let next = Gva::new(start.as_u64().wrapping_add(head as u64) & mask);
            or_fault!(paging.translate(host, next, access).map_err(Fault::from))
        } else {
            first
        };
        Ok(Ok(Pages { first, head, second }))
    }
}

/// The physical places of an operand.
struct Pages {
    /// Of its first byte.
    first: L1Gpa,
    /// How many bytes are in the first page.
    head: usize,
    /// Of the rest.
    second: L1Gpa,
}

/// Numbers of segment registers in the instruction information.
mod segment {
    pub(super) const SS: u8 = 2;
    pub(super) const FS: u8 = 4;
    pub(super) const GS: u8 = 5;
}

fn segment_fault(segment: u8) -> Fault {
    if segment == segment::SS { Fault::Ss(0) } else { Fault::Gp(0) }
}

/// 64-bit mode: no segment but FS and GS has a base, none a limit; the address of each byte must be
/// canonical (SDM Vol. 1, "Segmentation in 64-Bit Mode", "Canonical Addressing").
fn long_address(
    host: &mut impl Vmx,
    segment: u8,
    offset: u64,
    last: u64,
) -> HostResult<Result<Gva, Fault>> {
    let base = match segment {
        segment::FS => host.vmread(Field::GUEST_FS_BASE)?,
        segment::GS => host.vmread(Field::GUEST_GS_BASE)?,
        _ => 0,
    };
    let start = base.wrapping_add(offset);
    let width = linear_width(host.vmread(Field::GUEST_CR4)?);
    if is_canonical(start, width) && is_canonical(start.wrapping_add(last), width) {
        Ok(Ok(Gva::new(start)))
    } else {
        Ok(Err(segment_fault(segment)))
    }
}

/// Protected mode: type and limit of the segment (SDM Vol. 3A, "Limit Checking", "Type Checking").
fn protected_address(
    host: &mut impl Vmx,
    segment: u8,
    offset: u64,
    last: u64,
    access: Access,
) -> HostResult<Result<Gva, Fault>> {
    let (rights, limit, base) = match segment {
        0 => (Field::GUEST_ES_AR, Field::GUEST_ES_LIMIT, Field::GUEST_ES_BASE),
        1 => (Field::GUEST_CS_AR, Field::GUEST_CS_LIMIT, Field::GUEST_CS_BASE),
        segment::SS => (Field::GUEST_SS_AR, Field::GUEST_SS_LIMIT, Field::GUEST_SS_BASE),
        segment::FS => (Field::GUEST_FS_AR, Field::GUEST_FS_LIMIT, Field::GUEST_FS_BASE),
        segment::GS => (Field::GUEST_GS_AR, Field::GUEST_GS_LIMIT, Field::GUEST_GS_BASE),
        _ => (Field::GUEST_DS_AR, Field::GUEST_DS_LIMIT, Field::GUEST_DS_BASE),
    };
    let rights = host.vmread(rights)?;
    let limit = host.vmread(limit)? & 0xffff_ffff;
    let base = host.vmread(base)?;
    if segment_allows(rights, limit, offset, last, access) {
        Ok(Ok(Gva::new(base.wrapping_add(offset) & 0xffff_ffff)))
    } else {
        Ok(Err(segment_fault(segment)))
    }
}

/// Whether a segment with these access rights and this limit (in bytes) lets `access` at the bytes
/// from `offset` to `offset + last`. An access that wraps around the end of a 4-GByte segment is
/// refused, which the architecture leaves to the implementation.
fn segment_allows(rights: u64, limit: u64, offset: u64, last: u64, access: Access) -> bool {
    use access_rights::*;

    if rights & UNUSABLE != 0 || rights & PRESENT == 0 || rights & CODE_OR_DATA == 0 {
        return false;
    }
    let code = rights & TYPE_CODE != 0;
    // One bit: in data segments "writable" (all are readable), in code segments "readable".
    let bit = rights & TYPE_WRITABLE_OR_READABLE != 0;
    let type_allows = match access {
        Access::Read => !code || bit,
        Access::Write => !code && bit,
    };
    let end = offset.saturating_add(last);
    let limit_allows = if !code && rights & TYPE_EXPAND_DOWN != 0 {
        let top = if rights & BIG != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit && end <= top
    } else {
        end <= limit
    };
    type_allows && limit_allows
}

#[cfg(test)]
mod tests;
