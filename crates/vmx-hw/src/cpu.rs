//! How does the engine reach the VMX instructions of the processor it runs on?
//!
//! Through a [`Cpu`], a token that says "this processor is in VMX root operation": it can't leave
//! the processor it was made on, and it turns the failure of an instruction into the engine's
//! [`HostError`] that names the operand. It also counts what it does, for the host's counters.

use crate::instructions as hw;
use core::arch::asm;
use core::marker::PhantomData;
use nvmx::host::{HostError, HostResult, InvEpt, InvVpid, Vmx};
use vmx_defs::{Field, Gva, Hpa};

/// INVEPT and INVVPID types (SDM Vol. 3C, "INVEPT—Invalidate Translations Derived from EPT" and
/// "INVVPID—Invalidate Translations Based on VPID").
mod kind {
    pub(super) const INVEPT_SINGLE: u64 = 1;
    pub(super) const INVEPT_ALL: u64 = 2;
    pub(super) const INVVPID_ADDRESS: u64 = 0;
    pub(super) const INVVPID_SINGLE: u64 = 1;
    pub(super) const INVVPID_ALL: u64 = 2;
    pub(super) const INVVPID_RETAIN_GLOBALS: u64 = 3;
}

/// The processor that runs this code, in VMX root operation.
///
/// Neither `Send` nor `Sync`: what is current on one processor is not on another.
#[derive(Debug)]
pub struct Cpu {
    vmreads: u64,
    vmwrites: u64,
    vmptrlds: u64,
    invepts: u64,
    invvpids: u64,
    /// A raw pointer is neither `Send` nor `Sync`, and so is nothing that holds one.
    bound_to_processor: PhantomData<*mut ()>,
}

impl Cpu {
    /// The token of the processor that calls, with all counters 0.
    ///
    /// # Safety
    /// As long as the token lives, its processor must be in VMX root operation whenever a method is
    /// called; no other code may rely on which VMCS is current there across such a call; and what
    /// the caller writes to a VMCS must be sound once that VMCS is entered (memory that it names,
    /// the host state that an exit loads). The regions given to [`Self::vmptrld`] and
    /// [`Self::vmclear`] must be 4-KByte frames that belong to the processor's VMX use alone, with
    /// the revision identifier in place.
    pub const unsafe fn new() -> Self {
        Self {
            vmreads: 0,
            vmwrites: 0,
            vmptrlds: 0,
            invepts: 0,
            invvpids: 0,
            bound_to_processor: PhantomData,
        }
    }

    /// VMREADs executed through this token.
    #[inline]
    pub const fn vmreads(&self) -> u64 {
        self.vmreads
    }

    /// VMWRITEs executed through this token.
    #[inline]
    pub const fn vmwrites(&self) -> u64 {
        self.vmwrites
    }

    /// VMPTRLDs executed through this token.
    #[inline]
    pub const fn vmptrlds(&self) -> u64 {
        self.vmptrlds
    }

    /// INVEPTs executed through this token.
    #[inline]
    pub const fn invepts(&self) -> u64 {
        self.invepts
    }

    /// INVVPIDs executed through this token.
    #[inline]
    pub const fn invvpids(&self) -> u64 {
        self.invvpids
    }

    /// VMREAD from the current VMCS.
    ///
    /// # Errors
    /// [`HostError::VmRead`].
    #[inline]
    pub fn vmread(&mut self, field: Field) -> HostResult<u64> {
        self.vmreads = self.vmreads.wrapping_add(1);
        // SAFETY: `new`'s promise: the processor is in VMX root operation.
        unsafe { hw::vmread(field) }.map_err(|_| HostError::VmRead(field))
    }

    /// VMWRITE to the current VMCS.
    ///
    /// # Errors
    /// [`HostError::VmWrite`].
    #[inline]
    pub fn vmwrite(&mut self, field: Field, value: u64) -> HostResult {
        self.vmwrites = self.vmwrites.wrapping_add(1);
        // SAFETY: `new`'s promise: root operation, and values that are sound once entered with.
        unsafe { hw::vmwrite(field, value) }.map_err(|_| HostError::VmWrite(field))
    }

    /// VMPTRLD: makes the VMCS at `region` current.
    ///
    /// # Errors
    /// [`HostError::VmPtrLd`].
    #[inline]
    pub fn vmptrld(&mut self, region: Hpa) -> HostResult {
        self.vmptrlds = self.vmptrlds.wrapping_add(1);
        // SAFETY: `new`'s promise: root operation, and a region for the processor's use alone.
        unsafe { hw::vmptrld(region) }.map_err(|_| HostError::VmPtrLd(region))
    }

    /// VMCLEAR: writes the VMCS at `region` back to memory and sets its launch state to clear.
    ///
    /// # Errors
    /// [`HostError::VmClear`].
    #[inline]
    pub fn vmclear(&mut self, region: Hpa) -> HostResult {
        // SAFETY: `new`'s promise: root operation, and a region for the processor's use alone.
        unsafe { hw::vmclear(region) }.map_err(|_| HostError::VmClear(region))
    }

    /// INVEPT on this processor.
    ///
    /// # Errors
    /// [`HostError::InvEpt`].
    #[inline]
    pub fn invept(&mut self, scope: InvEpt) -> HostResult {
        self.invepts = self.invepts.wrapping_add(1);
        let (kind, eptp) = match scope {
            InvEpt::Single(eptp) => (kind::INVEPT_SINGLE, eptp.into_bits()),
            InvEpt::All => (kind::INVEPT_ALL, 0),
        };
        // SAFETY: `new`'s promise: the processor is in VMX root operation.
        unsafe { hw::invept(kind, [eptp, 0]) }.map_err(|_| HostError::InvEpt)
    }

    /// INVVPID on this processor.
    ///
    /// # Errors
    /// [`HostError::InvVpid`], also for VPID 0000H where the type names one, and for a linear
    /// address that is not canonical.
    #[inline(always)]
    pub fn invvpid(&mut self, scope: InvVpid) -> HostResult {
        self.invvpids = self.invvpids.wrapping_add(1);
        let (kind, vpid, address) = match scope {
            InvVpid::Address(vpid, address) => (kind::INVVPID_ADDRESS, vpid, address.as_u64()),
            InvVpid::Single(vpid) => (kind::INVVPID_SINGLE, vpid, 0),
            InvVpid::All => (kind::INVVPID_ALL, 0, 0),
            InvVpid::RetainGlobals(vpid) => (kind::INVVPID_RETAIN_GLOBALS, vpid, 0),
        };
        // SAFETY: `new`'s promise: the processor is in VMX root operation.
        unsafe { hw::invvpid(kind, [u64::from(vpid), address]) }.map_err(|_| HostError::InvVpid)
    }

    /// Sets CR2.
    #[inline]
    pub fn write_cr2(&mut self, address: Gva) {
        // SAFETY: CR2 is only a record of the last page fault's address; root operation implies
        // CPL 0 here, since the VMX instructions need it too.
        unsafe { asm!("mov cr2, {}", in(reg) address.as_u64(), options(nomem, nostack)) };
    }
}

impl Vmx for Cpu {
    #[inline]
    fn vmread(&mut self, field: Field) -> HostResult<u64> {
        Cpu::vmread(self, field)
    }

    #[inline]
    fn vmwrite(&mut self, field: Field, value: u64) -> HostResult {
        Cpu::vmwrite(self, field, value)
    }

    #[inline]
    fn vmptrld(&mut self, region: Hpa) -> HostResult {
        Cpu::vmptrld(self, region)
    }

    #[inline]
    fn invept(&mut self, scope: InvEpt) -> HostResult {
        Cpu::invept(self, scope)
    }

    // A caller knows the type, and most of this falls away.
    #[inline(always)]
    fn invvpid(&mut self, scope: InvVpid) -> HostResult {
        Cpu::invvpid(self, scope)
    }

    #[inline]
    fn write_cr2(&mut self, address: Gva) {
        Cpu::write_cr2(self, address);
    }
}
