//! Which MSRs report or govern VMX, and how are their values laid out?
//!
//! SDM Vol. 3D, Appendix A, "VMX Capability Reporting Facility"; Vol. 4 for the others.

use bitfield_struct::bitfield;
use bitflags::bitflags;

/// IA32_FEATURE_CONTROL.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// IA32_VMX_BASIC, the first capability MSR.
pub const VMX_BASIC: u32 = 0x480;
/// IA32_VMX_PINBASED_CTLS.
pub const VMX_PINBASED_CTLS: u32 = 0x481;
/// IA32_VMX_PROCBASED_CTLS.
pub const VMX_PROCBASED_CTLS: u32 = 0x482;
/// IA32_VMX_EXIT_CTLS.
pub const VMX_EXIT_CTLS: u32 = 0x483;
/// IA32_VMX_ENTRY_CTLS.
pub const VMX_ENTRY_CTLS: u32 = 0x484;
/// IA32_VMX_MISC.
pub const VMX_MISC: u32 = 0x485;
/// IA32_VMX_CR0_FIXED0.
pub const VMX_CR0_FIXED0: u32 = 0x486;
/// IA32_VMX_CR0_FIXED1.
pub const VMX_CR0_FIXED1: u32 = 0x487;
/// IA32_VMX_CR4_FIXED0.
pub const VMX_CR4_FIXED0: u32 = 0x488;
/// IA32_VMX_CR4_FIXED1.
pub const VMX_CR4_FIXED1: u32 = 0x489;
/// IA32_VMX_VMCS_ENUM.
pub const VMX_VMCS_ENUM: u32 = 0x48a;
/// IA32_VMX_PROCBASED_CTLS2.
pub const VMX_PROCBASED_CTLS2: u32 = 0x48b;
/// IA32_VMX_EPT_VPID_CAP.
pub const VMX_EPT_VPID_CAP: u32 = 0x48c;
/// IA32_VMX_TRUE_PINBASED_CTLS.
pub const VMX_TRUE_PINBASED_CTLS: u32 = 0x48d;
/// IA32_VMX_TRUE_PROCBASED_CTLS.
pub const VMX_TRUE_PROCBASED_CTLS: u32 = 0x48e;
/// IA32_VMX_TRUE_EXIT_CTLS.
pub const VMX_TRUE_EXIT_CTLS: u32 = 0x48f;
/// IA32_VMX_TRUE_ENTRY_CTLS.
pub const VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
/// IA32_VMX_VMFUNC, the last capability MSR that this project knows.
pub const VMX_VMFUNC: u32 = 0x491;

/// Number of capability MSRs from [`VMX_BASIC`] to [`VMX_VMFUNC`].
pub const VMX_CAPABILITY_COUNT: usize = (VMX_VMFUNC - VMX_BASIC + 1) as usize;

/// IA32_APIC_BASE.
pub const APIC_BASE: u32 = 0x1b;
/// IA32_SYSENTER_CS.
pub const SYSENTER_CS: u32 = 0x174;
/// IA32_SYSENTER_ESP.
pub const SYSENTER_ESP: u32 = 0x175;
/// IA32_SYSENTER_EIP.
pub const SYSENTER_EIP: u32 = 0x176;
/// IA32_DEBUGCTL.
pub const DEBUGCTL: u32 = 0x1d9;
/// IA32_PAT.
pub const PAT: u32 = 0x277;
/// IA32_EFER.
pub const EFER: u32 = 0xc000_0080;
/// IA32_FS_BASE.
pub const FS_BASE: u32 = 0xc000_0100;
/// IA32_GS_BASE.
pub const GS_BASE: u32 = 0xc000_0101;

bitflags! {
    /// IA32_FEATURE_CONTROL (SDM Vol. 3C, "Enabling and Entering VMX Operation").
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct FeatureControl: u64 {
        /// The MSR can't be written until reset; VMXON needs it.
        const LOCK = 1 << 0;
        /// VMXON is allowed in SMX operation.
        const VMXON_INSIDE_SMX = 1 << 1;
        /// VMXON is allowed outside SMX operation.
        const VMXON_OUTSIDE_SMX = 1 << 2;
    }
}

/// IA32_VMX_BASIC.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct VmxBasic {
    /// VMCS revision identifier; bit 31 of the MSR is always 0.
    #[bits(31)]
    pub revision: u32,
    __: bool,
    /// Size in bytes of the VMXON region and of each VMCS region, at most 4096.
    #[bits(13)]
    pub region_size: u16,
    #[bits(3)]
    __: u8,
    /// Set where the addresses of VMX structures are limited to 32 bits.
    pub width_32: bool,
    /// Dual-monitor treatment of SMIs is supported.
    pub dual_monitor: bool,
    /// Memory type for the VMCS and what it points to: 0 is UC, 6 is WB.
    #[bits(4)]
    pub memory_type: u8,
    /// INS and OUTS exits report instruction information.
    pub ins_outs_info: bool,
    /// The TRUE capability MSRs exist: default1 controls may be 0.
    pub true_controls: bool,
    /// Hardware exceptions can be delivered by VM entry with or without an error code.
    pub any_error_code: bool,
    #[bits(7)]
    __: u8,
}

/// IA32_VMX_MISC.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct VmxMisc {
    /// The preemption timer counts down when bit *n* of the TSC changes.
    #[bits(5)]
    pub preemption_timer_rate: u8,
    /// VM exits store IA32_EFER.LMA into "IA-32e mode guest".
    pub stores_lma: bool,
    /// Activity state HLT is supported.
    pub activity_hlt: bool,
    /// Activity state shutdown is supported.
    pub activity_shutdown: bool,
    /// Activity state wait-for-SIPI is supported.
    pub activity_wait_sipi: bool,
    #[bits(5)]
    __: u8,
    /// Processor trace can be used in VMX operation.
    pub pt_in_vmx: bool,
    /// RDMSR in SMM can read IA32_SMBASE.
    pub smbase_msr: bool,
    /// Number of CR3-target values, at most 4 today.
    #[bits(9)]
    pub cr3_targets: u16,
    /// Recommended greatest MSR list length is 512 * (value + 1).
    #[bits(3)]
    pub msr_list_size: u8,
    /// Bit 2 of IA32_SMM_MONITOR_CTL can be set.
    pub smm_monitor_ctl: bool,
    /// VMWRITE can write any supported field, read-only ones too.
    pub vmwrite_any: bool,
    /// Event injection with an instruction length of 0 is allowed.
    pub zero_length_injection: bool,
    __: bool,
    /// MSEG revision identifier.
    pub mseg_revision: u32,
}

/// Which settings a 32-bit set of controls may have: a capability MSR's value.
///
/// SDM Vol. 3D, "Pin-Based VM-Execution Controls" and the sections after it: bit X of the low half
/// set means control X must be 1; bit X of the high half clear means control X must be 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// Controls that must be 1 (allowed 0-settings, MSR bits 31:0).
    pub must_be_1: u32,
    /// Controls that may be 1 (allowed 1-settings, MSR bits 63:32).
    pub may_be_1: u32,
}

impl Allowed {
    /// Splits a capability MSR's value.
    #[inline]
    pub const fn from_msr(value: u64) -> Self {
        Self { must_be_1: value as u32, may_be_1: (value >> 32) as u32 }
    }

    /// The capability MSR's value.
    #[inline]
    pub const fn to_msr(self) -> u64 {
        (self.may_be_1 as u64) << 32 | self.must_be_1 as u64
    }

    /// Whether the setting `controls` is allowed.
    #[inline]
    pub const fn permits(self, controls: u32) -> bool {
        controls & self.must_be_1 == self.must_be_1 && controls & !self.may_be_1 == 0
    }

    /// The closest allowed setting to `wanted`: what must be 1 added, what can't be 1 removed.
    #[inline]
    pub const fn adjust(self, wanted: u32) -> u32 {
        wanted & self.may_be_1 | self.must_be_1
    }
}

bitflags! {
    /// IA32_VMX_EPT_VPID_CAP (SDM Vol. 3D, "VPID and EPT Capabilities").
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct EptVpidCap: u64 {
        /// Execute-only translations.
        const EXECUTE_ONLY = 1 << 0;
        /// Page-walk length of 4.
        const WALK_LENGTH_4 = 1 << 6;
        /// Page-walk length of 5.
        const WALK_LENGTH_5 = 1 << 7;
        /// EPT structures may be uncacheable.
        const MEMORY_TYPE_UC = 1 << 8;
        /// EPT structures may be write-back.
        const MEMORY_TYPE_WB = 1 << 14;
        /// 2-MByte pages.
        const PAGE_2M = 1 << 16;
        /// 1-GByte pages.
        const PAGE_1G = 1 << 17;
        /// INVEPT instruction.
        const INVEPT = 1 << 20;
        /// Accessed and dirty flags.
        const ACCESSED_DIRTY = 1 << 21;
        /// Advanced VM-exit information for EPT violations.
        const ADVANCED_EXIT_INFO = 1 << 22;
        /// Supervisor shadow-stack control.
        const SUPERVISOR_SHADOW_STACK = 1 << 23;
        /// Single-context INVEPT.
        const INVEPT_SINGLE = 1 << 25;
        /// All-context INVEPT.
        const INVEPT_ALL = 1 << 26;
        /// INVVPID instruction.
        const INVVPID = 1 << 32;
        /// Individual-address INVVPID.
        const INVVPID_ADDRESS = 1 << 40;
        /// Single-context INVVPID.
        const INVVPID_SINGLE = 1 << 41;
        /// All-context INVVPID.
        const INVVPID_ALL = 1 << 42;
        /// Single-context-retaining-globals INVVPID.
        const INVVPID_RETAIN_GLOBALS = 1 << 43;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_follows_both_halves() {
        let allowed = Allowed { must_be_1: 0b0011, may_be_1: 0b0111 };
        assert!(allowed.permits(0b0011) && allowed.permits(0b0111));
        assert!(!allowed.permits(0b0001) && !allowed.permits(0b1011));
        assert_eq!(allowed.adjust(0b1100), 0b0111);
        assert_eq!(Allowed::from_msr(allowed.to_msr()), allowed);
    }

    #[test]
    fn vmx_basic_bits_stand_where_the_manual_puts_them() {
        let basic = VmxBasic::new()
            .with_revision(0x2b)
            .with_region_size(4096)
            .with_memory_type(6)
            .with_ins_outs_info(true)
            .with_true_controls(true);
        assert_eq!(u64::from(basic), 0x2b | 4096 << 32 | 6 << 50 | 1 << 54 | 1 << 55);
        let misc =
            VmxMisc::new().with_cr3_targets(4).with_activity_hlt(true).with_vmwrite_any(true);
        assert_eq!(u64::from(misc), 4 << 16 | 1 << 6 | 1 << 29);
    }
}
