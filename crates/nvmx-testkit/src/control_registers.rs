//! What does L0 do when L1 writes a bit of CR0 or CR4 that L0 owns?
//!
//! L0 owns CR0.NE and CR4.VMXE, which the processor demands while L0 runs, the bits of CR4 whose
//! features are hidden, and while L1 is in VMX operation the bits that are fixed then. A write that
//! changes one exits, and is done here as the processor would have done it, other bits included
//! (SDM Vol. 2B, "MOV—Move to/from Control Registers").

use nvmx::Gprs;
use nvmx::host::{HostResult, InvVpid, L1Memory, Vmx};
use nvmx::inject::Fault;
use nvmx::tlb::VPID01;
use vmx_defs::exit::CrAccess;
use vmx_defs::{EntryCtls, Field, L1Gpa};
use vmx_model::registers::{Segment, cr0, cr4, efer};

use crate::host::Host;

const GP: Fault = Fault::Gp(0);

/// What a write comes to.
type Outcome = HostResult<Result<(), Fault>>;

impl Host<'_> {
    /// Takes the masks that go with L1's VMX operation. The shadows must hold L1's values of every
    /// bit that a mask may gain.
    pub(crate) fn set_masks(&mut self, in_vmx_operation: bool) -> HostResult {
        let (value0, value4) = (self.l1_cr0()?, self.l1_cr4()?);
        let caps = &self.offer.caps;
        let (mut mask0, mut mask4) = (cr0::NE, cr4::VMXE | !caps.cr4_fixed1);
        if in_vmx_operation {
            (mask0, mask4) = (mask0 | caps.cr0_fixed0, mask4 | caps.cr4_fixed0);
        }
        self.vmwrite(Field::CR0_SHADOW, value0)?;
        self.vmwrite(Field::CR4_SHADOW, value4)?;
        self.vmwrite(Field::CR0_MASK, mask0)?;
        self.vmwrite(Field::CR4_MASK, mask4)
    }

    fn l1_cr0(&mut self) -> HostResult<u64> {
        let mask = self.vmread(Field::CR0_MASK)?;
        Ok(self.vmread(Field::GUEST_CR0)? & !mask | self.vmread(Field::CR0_SHADOW)? & mask)
    }

    fn l1_cr4(&mut self) -> HostResult<u64> {
        let mask = self.vmread(Field::CR4_MASK)?;
        Ok(self.vmread(Field::GUEST_CR4)? & !mask | self.vmread(Field::CR4_SHADOW)? & mask)
    }

    /// A control-register exit of L1.
    pub(crate) fn control_register(&mut self, gprs: &Gprs, in_vmx_operation: bool) -> Outcome {
        let access = CrAccess::from(self.vmread(Field::EXIT_QUALIFICATION)?);
        let mut value = nvmx::insn::register(self, gprs, access.gpr())?;
        if !nvmx::insn::is_64_bit(self)? {
            value &= 0xffff_ffff;
        }
        match (access.access(), access.register()) {
            (0, 0) => self.write_cr0(value, in_vmx_operation),
            (0, 4) => self.write_cr4(value, in_vmx_operation),
            // Nothing else of control registers is intercepted.
            _ => Ok(Err(Fault::Ud)),
        }
    }

    fn write_cr0(&mut self, value: u64, in_vmx_operation: bool) -> Outcome {
        if value >> 32 != 0 {
            return Ok(Err(GP));
        }
        let new = value & cr0::DEFINED | cr0::ET;
        let (old, extension) = (self.l1_cr0()?, self.l1_cr4()?);
        let mode = self.vmread(Field::GUEST_EFER)?;
        let caps = &self.offer.caps;
        let fixed =
            new & caps.cr0_fixed0 == caps.cr0_fixed0 && new & !caps.cr0_fixed1 & cr0::DEFINED == 0;
        let code_is_long = self.vmread(Field::GUEST_CS_AR)? & u64::from(Segment::LONG) != 0;
        let has = |bits: u64| new & bits != 0;
        let starts = has(cr0::PG) && old & cr0::PG == 0;
        let stops = !has(cr0::PG) && old & cr0::PG != 0;
        let long = mode & efer::LME != 0;
        if (in_vmx_operation && !fixed)
            || (has(cr0::PG) && !has(cr0::PE))
            || (has(cr0::NW) && !has(cr0::CD))
            || (starts && long && (extension & cr4::PAE == 0 || code_is_long))
            || (stops && extension & cr4::PCIDE != 0)
            || (stops && mode & efer::LMA != 0 && code_is_long)
        {
            return Ok(Err(GP));
        }
        let new_mode = if has(cr0::PG) && long { mode | efer::LMA } else { mode & !efer::LMA };
        let pae = has(cr0::PG) && extension & cr4::PAE != 0 && new_mode & efer::LMA == 0;
        let reloads = (new ^ old) & (cr0::PG | cr0::CD | cr0::NW) != 0;
        if pae && reloads && !self.load_pdptes()? {
            return Ok(Err(GP));
        }
        if new_mode != mode {
            self.vmwrite(Field::GUEST_EFER, new_mode)?;
            let mut entry = EntryCtls::from_bits_retain(self.vmread(Field::ENTRY_CTLS)? as u32);
            entry.set(EntryCtls::IA32E_MODE_GUEST, new_mode & efer::LMA != 0);
            self.vmwrite(Field::ENTRY_CTLS, entry.bits().into())?;
        }
        self.vmwrite(Field::CR0_SHADOW, new)?;
        self.vmwrite(Field::GUEST_CR0, new | cr0::NE)?;
        if starts || stops {
            self.invvpid(InvVpid::Single(VPID01))?;
        }
        Ok(Ok(()))
    }

    fn write_cr4(&mut self, new: u64, in_vmx_operation: bool) -> Outcome {
        const FLUSHING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        let old = self.l1_cr4()?;
        let long = self.vmread(Field::GUEST_EFER)? & efer::LMA != 0;
        let root = self.vmread(Field::GUEST_CR3)?;
        let caps = &self.offer.caps;
        let fixed0 = if in_vmx_operation { caps.cr4_fixed0 } else { 0 };
        let sets_pcide = new & !old & cr4::PCIDE != 0;
        if new & !caps.cr4_fixed1 != 0
            || new & fixed0 != fixed0
            || (long && new & cr4::PAE == 0)
            || (sets_pcide && root & 0xfff != 0)
            || (new & cr4::PCIDE != 0 && !long)
        {
            return Ok(Err(GP));
        }
        let paging = self.vmread(Field::GUEST_CR0)? & cr0::PG != 0;
        let flushes = (new ^ old) & FLUSHING != 0;
        if paging && !long && new & cr4::PAE != 0 && flushes && !self.load_pdptes()? {
            return Ok(Err(GP));
        }
        self.vmwrite(Field::CR4_SHADOW, new)?;
        self.vmwrite(Field::GUEST_CR4, new | cr4::VMXE)?;
        if flushes {
            self.invvpid(InvVpid::Single(VPID01))?;
        }
        Ok(Ok(()))
    }

    /// Loads the four page-directory-pointer-table entries; says whether they are valid (SDM Vol.
    /// 3A, "PDPTE Registers").
    fn load_pdptes(&mut self) -> HostResult<bool> {
        let fields =
            [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3];
        let table = self.vmread(Field::GUEST_CR3)? & 0xffff_ffe0;
        let reserved = 0x1e6 | !((1 << self.offer.caps.physical_width) - 1);
        let entries: [u64; 4] =
            std::array::from_fn(|number| self.read_u64(L1Gpa::new(table + 8 * number as u64)));
        if entries.iter().any(|entry| entry & 1 != 0 && entry & reserved != 0) {
            return Ok(false);
        }
        for (field, entry) in fields.into_iter().zip(entries) {
            self.vmwrite(field, entry)?;
        }
        Ok(true)
    }
}
