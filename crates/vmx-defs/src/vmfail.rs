//! Why did a VMX instruction fail?
//!
//! SDM Vol. 3C, "VM-Instruction Error Numbers".

/// A VM-instruction error number, as VMfailValid stores it in the VM-instruction error field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum VmInstructionError {
    /// VMCALL executed in VMX root operation.
    VmcallInRoot = 1,
    /// VMCLEAR with invalid physical address.
    VmclearAddress = 2,
    /// VMCLEAR with VMXON pointer.
    VmclearVmxonPointer = 3,
    /// VMLAUNCH with non-clear VMCS.
    VmlaunchNotClear = 4,
    /// VMRESUME with non-launched VMCS.
    VmresumeNotLaunched = 5,
    /// VMRESUME after VMXOFF.
    VmresumeAfterVmxoff = 6,
    /// VM entry with invalid control field(s).
    EntryControls = 7,
    /// VM entry with invalid host-state field(s).
    EntryHostState = 8,
    /// VMPTRLD with invalid physical address.
    VmptrldAddress = 9,
    /// VMPTRLD with VMXON pointer.
    VmptrldVmxonPointer = 10,
    /// VMPTRLD with incorrect VMCS revision identifier.
    VmptrldRevision = 11,
    /// VMREAD or VMWRITE from/to unsupported VMCS component.
    UnsupportedComponent = 12,
    /// VMWRITE to read-only VMCS component.
    ReadOnlyComponent = 13,
    /// VMXON executed in VMX root operation.
    VmxonInRoot = 15,
    /// VM entry with invalid executive-VMCS pointer.
    EntryExecutiveVmcs = 16,
    /// VM entry with non-launched executive VMCS.
    EntryExecutiveNotLaunched = 17,
    /// VM entry with executive-VMCS pointer not VMXON pointer.
    EntryExecutiveNotVmxon = 18,
    /// VMCALL with non-clear VMCS.
    VmcallNotClear = 19,
    /// VMCALL with invalid VM-exit control fields.
    VmcallExitControls = 20,
    /// VMCALL with incorrect MSEG revision identifier.
    VmcallMsegRevision = 22,
    /// VMXOFF under dual-monitor treatment of SMIs and SMM.
    VmxoffDualMonitor = 23,
    /// VMCALL with invalid SMM-monitor features.
    VmcallSmmFeatures = 24,
    /// VM entry with invalid VM-execution control fields in executive VMCS.
    EntryExecutiveControls = 25,
    /// VM entry with events blocked by MOV SS.
    EntryBlockedByMovSs = 26,
    /// Invalid operand to INVEPT/INVVPID.
    InvalidInvalidation = 28,
}

impl VmInstructionError {
    /// The number that the VM-instruction error field holds.
    #[inline]
    pub const fn number(self) -> u32 {
        self as u32
    }
}
