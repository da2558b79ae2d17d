//! What is L1 offered?
//!
//! L1 is a hypervisor on a processor of our making: its capability MSRs say what that processor can
//! do, and everything they say is implemented here. Offered is what the hardware has *and* this
//! engine has (`policy`, below); everything else reads as absent, and the VMCS fields that go with
//! it do not exist (SDM Vol. 3D, Appendix A, "VMX Capability Reporting Facility").

use core::fmt;
use vmx_defs::Field;
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::ept::memory_type;
use vmx_defs::field::FIELDS;
use vmx_defs::msr::{self, Allowed, EptVpidCap, FeatureControl, VmxBasic, VmxMisc};

/// Revision identifier of VMCS regions that L1 prepares for us: the format is ours, and not that of
/// the processor below. Bit 31 is 0 as the architecture demands.
pub const REVISION: u32 = u32::from_be_bytes(*b"nvmx");

/// Size in bytes of L1's VMXON and VMCS regions.
pub const REGION_SIZE: u16 = 4096;

/// Greatest number of entries that an MSR area may have: the recommended maximum that L1 reads in
/// IA32_VMX_MISC (bits 27:25 are 0; SDM Vol. 3D, "Miscellaneous Data").
pub const MSR_AREA_MAX: u32 = 512;

/// Controls that are 1 where software knows nothing of the TRUE capability MSRs, the *default1*
/// class (SDM Vol. 3D, "Reserved Controls and Default Settings").
pub mod default1 {
    /// Pin-based controls: bits 1, 2 and 4.
    pub const PIN: u32 = 0x0000_0016;
    /// Primary processor-based controls: bits 1, 6:4, 8, 16:13 and 26.
    pub const PROC: u32 = 0x0401_e172;
    /// VM-exit controls: bits 8:0, 10, 11, 13, 14, 16 and 17.
    pub const EXIT: u32 = 0x0003_6dff;
    /// VM-entry controls: bits 8:0 and 12.
    pub const ENTRY: u32 = 0x0000_11ff;
}

/// What this engine implements.
mod policy {
    use super::*;

    pub(super) const PIN: PinCtls = PinCtls::EXTERNAL_INTERRUPT_EXITING
        .union(PinCtls::NMI_EXITING)
        .union(PinCtls::VIRTUAL_NMIS)
        .union(PinCtls::PREEMPTION_TIMER);

    pub(super) const PROC: ProcCtls = ProcCtls::INTERRUPT_WINDOW_EXITING
        .union(ProcCtls::TSC_OFFSETTING)
        .union(ProcCtls::HLT_EXITING)
        .union(ProcCtls::INVLPG_EXITING)
        .union(ProcCtls::MWAIT_EXITING)
        .union(ProcCtls::RDPMC_EXITING)
        .union(ProcCtls::RDTSC_EXITING)
        .union(ProcCtls::CR3_LOAD_EXITING)
        .union(ProcCtls::CR3_STORE_EXITING)
        .union(ProcCtls::CR8_LOAD_EXITING)
        .union(ProcCtls::CR8_STORE_EXITING)
        .union(ProcCtls::TPR_SHADOW)
        .union(ProcCtls::NMI_WINDOW_EXITING)
        .union(ProcCtls::MOV_DR_EXITING)
        .union(ProcCtls::UNCONDITIONAL_IO_EXITING)
        .union(ProcCtls::IO_BITMAPS)
        .union(ProcCtls::MSR_BITMAPS)
        .union(ProcCtls::MONITOR_EXITING)
        .union(ProcCtls::PAUSE_EXITING)
        .union(ProcCtls::SECONDARY_CONTROLS);

    pub(super) const PROC2: ProcCtls2 = ProcCtls2::VIRTUALIZE_APIC_ACCESSES
        .union(ProcCtls2::EPT)
        .union(ProcCtls2::DESCRIPTOR_TABLE_EXITING)
        .union(ProcCtls2::RDTSCP)
        .union(ProcCtls2::VPID)
        .union(ProcCtls2::WBINVD_EXITING)
        .union(ProcCtls2::UNRESTRICTED_GUEST)
        .union(ProcCtls2::PAUSE_LOOP_EXITING)
        .union(ProcCtls2::RDRAND_EXITING)
        .union(ProcCtls2::INVPCID)
        .union(ProcCtls2::VM_FUNCTIONS)
        .union(ProcCtls2::RDSEED_EXITING)
        .union(ProcCtls2::XSAVES)
        .union(ProcCtls2::TSC_SCALING);

    pub(super) const EXIT: ExitCtls = ExitCtls::SAVE_DEBUG_CONTROLS
        .union(ExitCtls::HOST_ADDRESS_SPACE_SIZE)
        .union(ExitCtls::ACK_INTERRUPT)
        .union(ExitCtls::SAVE_PAT)
        .union(ExitCtls::LOAD_PAT)
        .union(ExitCtls::SAVE_EFER)
        .union(ExitCtls::LOAD_EFER)
        .union(ExitCtls::SAVE_PREEMPTION_TIMER);

    pub(super) const ENTRY: EntryCtls = EntryCtls::LOAD_DEBUG_CONTROLS
        .union(EntryCtls::IA32E_MODE_GUEST)
        .union(EntryCtls::LOAD_PAT)
        .union(EntryCtls::LOAD_EFER);

    pub(super) const EPT: EptVpidCap = EptVpidCap::EXECUTE_ONLY
        .union(EptVpidCap::WALK_LENGTH_4)
        .union(EptVpidCap::MEMORY_TYPE_UC)
        .union(EptVpidCap::MEMORY_TYPE_WB)
        .union(EptVpidCap::PAGE_2M)
        .union(EptVpidCap::PAGE_1G)
        .union(EptVpidCap::INVEPT)
        .union(EptVpidCap::ACCESSED_DIRTY)
        .union(EptVpidCap::INVEPT_SINGLE)
        .union(EptVpidCap::INVEPT_ALL);

    pub(super) const VPID: EptVpidCap = EptVpidCap::INVVPID
        .union(EptVpidCap::INVVPID_ADDRESS)
        .union(EptVpidCap::INVVPID_SINGLE)
        .union(EptVpidCap::INVVPID_ALL)
        .union(EptVpidCap::INVVPID_RETAIN_GLOBALS);

    /// CR4 bits that no state hangs on which the engine would have to switch: VME to OSXMMEXCPT
    /// (10:0), UMIP, VMXE, FSGSBASE, PCIDE, OSXSAVE, SMEP and SMAP. LA57 is added where the
    /// linear-address width says so. SMXE, PKE, CET, UINTR, LASS and PKS are not there: SMX is
    /// hidden, the walk of L1's page tables ([`crate::paging`]) knows neither keys nor LASS, and the
    /// others come with VMCS state that is not offered.
    pub(super) const CR4: u64 =
        0x7ff | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 21;
}

/// CR4.LA57.
const CR4_LA57: u64 = 1 << 12;

/// What the processor below reports. The host reads it once.
#[derive(Clone, Debug)]
pub struct HardwareCaps {
    /// The capability MSRs from IA32_VMX_BASIC on; 0 where one does not exist. See [`Self::read_msrs`].
    pub msrs: [u64; msr::VMX_CAPABILITY_COUNT],
    /// Physical-address width in bits: CPUID.80000008H:EAX\[7:0\].
    pub physical_width: u8,
    /// Linear-address width in bits: CPUID.80000008H:EAX\[15:8\], 48 or 57.
    pub linear_width: u8,
    /// Bits of IA32_EFER that are not reserved: of SCE (0), LME (8), LMA (10) and NXE (11), those
    /// whose features CPUID reports.
    pub efer: u64,
    /// Bits of IA32_DEBUGCTL that are not reserved: at least LBR (0) and BTF (1). Bit 2 (bus-lock
    /// detection) where CPUID.(7,0):ECX\[24\] is set, bit 15 (RTM) where CPUID.(7,0):EBX\[11\] is.
    pub debugctl: u64,
    /// Enclaves exist: CPUID.(7,0):EBX\[2\] (SGX), as L1 sees it.
    pub sgx: bool,
}

impl HardwareCaps {
    /// Reads the capability MSRs that exist, in an order in which each one's existence is known
    /// from those before it (SDM Vol. 3D, Appendix A).
    pub fn read_msrs(mut rdmsr: impl FnMut(u32) -> u64) -> [u64; msr::VMX_CAPABILITY_COUNT] {
        let mut msrs = [0; msr::VMX_CAPABILITY_COUNT];
        let (mut true_controls, mut proc, mut proc2) =
            (false, ProcCtls::empty(), ProcCtls2::empty());
        for (index, value) in (msr::VMX_BASIC..).zip(msrs.iter_mut()) {
            let exists = match index {
                msr::VMX_PROCBASED_CTLS2 => proc.contains(ProcCtls::SECONDARY_CONTROLS),
                msr::VMX_EPT_VPID_CAP => proc2.intersects(ProcCtls2::EPT.union(ProcCtls2::VPID)),
                msr::VMX_TRUE_PINBASED_CTLS..=msr::VMX_TRUE_ENTRY_CTLS => true_controls,
                msr::VMX_VMFUNC => proc2.contains(ProcCtls2::VM_FUNCTIONS),
                _ => true,
            };
            if !exists {
                continue;
            }
            *value = rdmsr(index);
            let may_be_1 = Allowed::from_msr(*value).may_be_1;
            match index {
                msr::VMX_BASIC => true_controls = VmxBasic::from(*value).true_controls(),
                msr::VMX_PROCBASED_CTLS => proc = ProcCtls::from_bits_retain(may_be_1),
                msr::VMX_PROCBASED_CTLS2 => proc2 = ProcCtls2::from_bits_retain(may_be_1),
                _ => {}
            }
        }
        msrs
    }

    /// Value of capability MSR `index`, 0 where it does not exist.
    #[inline]
    pub fn msr(&self, index: u32) -> u64 {
        index
            .checked_sub(msr::VMX_BASIC)
            .and_then(|offset| self.msrs.get(offset as usize))
            .copied()
            .unwrap_or(0)
    }

    fn allowed(&self, index: u32) -> Allowed {
        Allowed::from_msr(self.msr(index))
    }
}

/// Something that L0 itself can't do without, whatever L1 wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum MissingFeature {
    /// The TRUE capability MSRs.
    TrueControls,
    /// VMX structures above 4 GiB (IA32_VMX_BASIC bit 48 is set).
    WideAddresses,
    /// Write-back memory for the VMCS.
    WriteBackVmcs,
    /// NMI exiting and virtual NMIs.
    VirtualNmis,
    /// Use MSR bitmaps.
    MsrBitmaps,
    /// Activate secondary controls.
    SecondaryControls,
    /// Enable EPT.
    Ept,
    /// Enable VPID.
    Vpid,
    /// Unrestricted guest.
    UnrestrictedGuest,
    /// Host address-space size and IA-32e mode guest.
    LongMode,
    /// Save and load of IA32_EFER at VM exit, load at VM entry.
    EferSwitch,
    /// Save and load of IA32_PAT at VM exit, load at VM entry.
    PatSwitch,
    /// EPT paging structures of 4 levels in write-back memory.
    FourLevelEpt,
    /// 2-MByte pages in EPT.
    LargePages,
    /// INVEPT, single-context and all-context.
    InvEpt,
    /// INVVPID, single-context and all-context.
    InvVpid,
}

impl fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TrueControls => "TRUE capability MSRs",
            Self::WideAddresses => "VMX structures above 4 GiB",
            Self::WriteBackVmcs => "VMCS in write-back memory",
            Self::VirtualNmis => "virtual NMIs",
            Self::MsrBitmaps => "MSR bitmaps",
            Self::SecondaryControls => "secondary processor-based controls",
            Self::Ept => "EPT",
            Self::Vpid => "VPID",
            Self::UnrestrictedGuest => "unrestricted guest",
            Self::LongMode => "64-bit host and guest",
            Self::EferSwitch => "load and save of IA32_EFER",
            Self::PatSwitch => "load and save of IA32_PAT",
            Self::FourLevelEpt => "4-level write-back EPT",
            Self::LargePages => "2-MByte EPT pages",
            Self::InvEpt => "INVEPT single-context and all-context",
            Self::InvVpid => "INVVPID single-context and all-context",
        })
    }
}

/// What L1 is offered. The control sets are those of the TRUE capability MSRs.
#[derive(Clone, Debug)]
pub struct Caps {
    /// IA32_VMX_BASIC.
    pub basic: VmxBasic,
    /// Pin-based controls.
    pub pin: Allowed,
    /// Primary processor-based controls.
    pub proc: Allowed,
    /// Secondary processor-based controls.
    pub proc2: Allowed,
    /// VM-exit controls.
    pub exit: Allowed,
    /// VM-entry controls.
    pub entry: Allowed,
    /// IA32_VMX_MISC.
    pub misc: VmxMisc,
    /// Bits of CR0 that must be 1 in VMX operation.
    pub cr0_fixed0: u64,
    /// Bits of CR0 that may be 1 in VMX operation.
    pub cr0_fixed1: u64,
    /// Bits of CR4 that must be 1 in VMX operation.
    pub cr4_fixed0: u64,
    /// Bits of CR4 that may be 1 in VMX operation.
    pub cr4_fixed1: u64,
    /// EPT and VPID capabilities.
    pub ept_vpid: EptVpidCap,
    /// VM functions that may be enabled.
    pub vm_functions: VmFuncCtls,
    /// Physical-address width in bits, at most 52.
    pub physical_width: u8,
    /// Linear-address width in bits: 48 or 57.
    pub linear_width: u8,
    /// Bits of IA32_EFER that are not reserved.
    pub efer: u64,
    /// Bits of IA32_DEBUGCTL that are not reserved.
    pub debugctl: u64,
    /// Enclaves exist.
    pub sgx: bool,
}

/// What remains of a set of controls of the hardware. Bits that the hardware wants to be 1 stay so,
/// since vmcs02 must have them; the default1 bits may always be 1.
const fn narrow(hardware: Allowed, policy: u32, default1: u32) -> Allowed {
    Allowed {
        must_be_1: hardware.must_be_1,
        may_be_1: hardware.may_be_1 & (policy | default1) | hardware.must_be_1,
    }
}

/// The same set, but `controls` can no longer be 1 (where the hardware permits 0).
const fn without(allowed: Allowed, controls: u32) -> Allowed {
    Allowed { may_be_1: allowed.may_be_1 & (!controls | allowed.must_be_1), ..allowed }
}

impl Caps {
    /// What L1 is offered on this hardware.
    ///
    /// # Errors
    /// What L0 itself needs and the hardware has not.
    pub fn offered(hardware: &HardwareCaps) -> Result<Self, MissingFeature> {
        let hw_basic = VmxBasic::from(hardware.msr(msr::VMX_BASIC));
        require(hw_basic.true_controls(), MissingFeature::TrueControls)?;
        require(!hw_basic.width_32(), MissingFeature::WideAddresses)?;
        require(hw_basic.memory_type() == memory_type::WB, MissingFeature::WriteBackVmcs)?;

        let hw_ept = EptVpidCap::from_bits_truncate(hardware.msr(msr::VMX_EPT_VPID_CAP));
        let hw_misc = VmxMisc::from(hardware.msr(msr::VMX_MISC));
        let linear_width = if hardware.linear_width == 57 { 57 } else { 48 };
        let la57 = if linear_width == 57 { CR4_LA57 } else { 0 };

        let mut caps = Self {
            basic: VmxBasic::new()
                .with_revision(REVISION)
                .with_region_size(REGION_SIZE)
                .with_memory_type(memory_type::WB)
                .with_ins_outs_info(hw_basic.ins_outs_info())
                .with_true_controls(true)
                .with_any_error_code(hw_basic.any_error_code()),
            pin: narrow(
                hardware.allowed(msr::VMX_TRUE_PINBASED_CTLS),
                policy::PIN.bits(),
                default1::PIN,
            ),
            proc: narrow(
                hardware.allowed(msr::VMX_TRUE_PROCBASED_CTLS),
                policy::PROC.bits(),
                default1::PROC,
            ),
            proc2: narrow(hardware.allowed(msr::VMX_PROCBASED_CTLS2), policy::PROC2.bits(), 0),
            exit: narrow(
                hardware.allowed(msr::VMX_TRUE_EXIT_CTLS),
                policy::EXIT.bits(),
                default1::EXIT,
            ),
            entry: narrow(
                hardware.allowed(msr::VMX_TRUE_ENTRY_CTLS),
                policy::ENTRY.bits(),
                default1::ENTRY,
            ),
            misc: VmxMisc::new()
                .with_preemption_timer_rate(hw_misc.preemption_timer_rate())
                .with_stores_lma(hw_misc.stores_lma())
                .with_activity_hlt(hw_misc.activity_hlt())
                .with_activity_shutdown(hw_misc.activity_shutdown())
                .with_cr3_targets(hw_misc.cr3_targets().min(4))
                .with_vmwrite_any(hw_misc.vmwrite_any())
                .with_zero_length_injection(hw_misc.zero_length_injection()),
            cr0_fixed0: hardware.msr(msr::VMX_CR0_FIXED0),
            cr0_fixed1: hardware.msr(msr::VMX_CR0_FIXED1),
            cr4_fixed0: hardware.msr(msr::VMX_CR4_FIXED0),
            cr4_fixed1: hardware.msr(msr::VMX_CR4_FIXED1) & (policy::CR4 | la57)
                | hardware.msr(msr::VMX_CR4_FIXED0),
            ept_vpid: hw_ept & (policy::EPT | policy::VPID),
            vm_functions: VmFuncCtls::EPTP_SWITCHING,
            physical_width: hardware.physical_width.min(52),
            linear_width,
            efer: hardware.efer,
            debugctl: hardware.debugctl,
            sgx: hardware.sgx,
        };

        caps.require_own_needs()?;
        caps.drop_orphans();
        Ok(caps)
    }

    /// What L0 runs L1 itself with.
    fn require_own_needs(&self) -> Result<(), MissingFeature> {
        use MissingFeature as M;
        let nmis = PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS;
        require(self.may_pin(nmis), M::VirtualNmis)?;
        require(self.may_proc(ProcCtls::MSR_BITMAPS), M::MsrBitmaps)?;
        require(self.may_proc(ProcCtls::SECONDARY_CONTROLS), M::SecondaryControls)?;
        require(self.may_proc2(ProcCtls2::EPT), M::Ept)?;
        require(self.may_proc2(ProcCtls2::VPID), M::Vpid)?;
        require(self.may_proc2(ProcCtls2::UNRESTRICTED_GUEST), M::UnrestrictedGuest)?;
        let long = self.may_exit(ExitCtls::HOST_ADDRESS_SPACE_SIZE)
            && self.may_entry(EntryCtls::IA32E_MODE_GUEST);
        require(long, M::LongMode)?;
        let efer = self.may_exit(ExitCtls::SAVE_EFER | ExitCtls::LOAD_EFER)
            && self.may_entry(EntryCtls::LOAD_EFER);
        require(efer, M::EferSwitch)?;
        let pat = self.may_exit(ExitCtls::SAVE_PAT | ExitCtls::LOAD_PAT)
            && self.may_entry(EntryCtls::LOAD_PAT);
        require(pat, M::PatSwitch)?;
        let ept = |wanted| self.ept_vpid.contains(wanted);
        require(ept(EptVpidCap::WALK_LENGTH_4 | EptVpidCap::MEMORY_TYPE_WB), M::FourLevelEpt)?;
        require(ept(EptVpidCap::PAGE_2M), M::LargePages)?;
        let invept = EptVpidCap::INVEPT | EptVpidCap::INVEPT_SINGLE | EptVpidCap::INVEPT_ALL;
        require(ept(invept), M::InvEpt)?;
        let invvpid = EptVpidCap::INVVPID | EptVpidCap::INVVPID_SINGLE | EptVpidCap::INVVPID_ALL;
        require(ept(invvpid), M::InvVpid)
    }

    /// Hides what can't be used because the feature it belongs to is not there.
    fn drop_orphans(&mut self) {
        if !self.may_pin(PinCtls::PREEMPTION_TIMER) {
            self.exit = without(self.exit, ExitCtls::SAVE_PREEMPTION_TIMER.bits());
            self.misc.set_preemption_timer_rate(0);
        }
        if !self.may_proc2(ProcCtls2::VM_FUNCTIONS) {
            self.vm_functions = VmFuncCtls::empty();
        }
    }

    /// The value that L1 reads in MSR `index`; `None` where the MSR does not exist for it, and
    /// RDMSR raises #GP(0). All capability MSRs are read-only.
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        // Of the default1 class only the TRUE MSRs say what may be 0.
        let plain = |allowed: Allowed, default1: u32| {
            Allowed {
                must_be_1: allowed.must_be_1 | default1,
                may_be_1: allowed.may_be_1 | default1,
            }
            .to_msr()
        };
        let value = match index {
            msr::VMX_BASIC => self.basic.into(),
            msr::VMX_PINBASED_CTLS => plain(self.pin, default1::PIN),
            msr::VMX_PROCBASED_CTLS => plain(self.proc, default1::PROC),
            msr::VMX_EXIT_CTLS => plain(self.exit, default1::EXIT),
            msr::VMX_ENTRY_CTLS => plain(self.entry, default1::ENTRY),
            msr::VMX_MISC => self.misc.into(),
            msr::VMX_CR0_FIXED0 => self.cr0_fixed0,
            msr::VMX_CR0_FIXED1 => self.cr0_fixed1,
            msr::VMX_CR4_FIXED0 => self.cr4_fixed0,
            msr::VMX_CR4_FIXED1 => self.cr4_fixed1,
            msr::VMX_VMCS_ENUM => self.vmcs_enum(),
            msr::VMX_PROCBASED_CTLS2 => self.proc2.to_msr(),
            msr::VMX_EPT_VPID_CAP => self.ept_vpid.bits(),
            msr::VMX_TRUE_PINBASED_CTLS => self.pin.to_msr(),
            msr::VMX_TRUE_PROCBASED_CTLS => self.proc.to_msr(),
            msr::VMX_TRUE_EXIT_CTLS => self.exit.to_msr(),
            msr::VMX_TRUE_ENTRY_CTLS => self.entry.to_msr(),
            msr::VMX_VMFUNC if self.may_proc2(ProcCtls2::VM_FUNCTIONS) => self.vm_functions.bits(),
            _ => return None,
        };
        Some(value)
    }

    /// The value of IA32_FEATURE_CONTROL that L1 reads: locked, with VMXON allowed outside SMX
    /// operation only, since SMX is hidden (SDM Vol. 3C, "Enabling and Entering VMX Operation").
    pub const fn feature_control() -> u64 {
        FeatureControl::LOCK.union(FeatureControl::VMXON_OUTSIDE_SMX).bits()
    }

    /// IA32_VMX_VMCS_ENUM: bits 9:1 are the highest index of any field that exists (SDM Vol. 3D,
    /// "VMCS Enumeration").
    pub fn vmcs_enum(&self) -> u64 {
        let indexes = FIELDS.iter().filter(|(field, _)| self.supports(*field));
        u64::from(indexes.map(|(field, _)| field.index()).max().unwrap_or(0)) << 1
    }

    /// Whether `field` exists in L1's VMCSs: many do only where the control they serve may be 1
    /// (SDM Vol. 3D, Appendix B, "Field Encoding in VMCS", in the notes to its tables).
    pub fn supports(&self, field: Field) -> bool {
        match field {
            Field::VPID => self.may_proc2(ProcCtls2::VPID),
            Field::POSTED_INTERRUPT_VECTOR | Field::POSTED_INTERRUPT_DESC_ADDR => {
                self.may_pin(PinCtls::POSTED_INTERRUPTS)
            }
            Field::EPTP_INDEX | Field::VE_INFORMATION_ADDR => {
                self.may_proc2(ProcCtls2::EPT_VIOLATION_VE)
            }
            Field::GUEST_INTERRUPT_STATUS
            | Field::EOI_EXIT_BITMAP_0
            | Field::EOI_EXIT_BITMAP_1
            | Field::EOI_EXIT_BITMAP_2
            | Field::EOI_EXIT_BITMAP_3 => self.may_proc2(ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY),
            Field::PML_INDEX | Field::PML_ADDRESS => self.may_proc2(ProcCtls2::PML),
            Field::MSR_BITMAP => self.may_proc(ProcCtls::MSR_BITMAPS),
            Field::VIRTUAL_APIC_ADDR | Field::TPR_THRESHOLD => self.may_proc(ProcCtls::TPR_SHADOW),
            Field::APIC_ACCESS_ADDR => self.may_proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES),
            Field::VM_FUNCTION_CONTROLS => self.may_proc2(ProcCtls2::VM_FUNCTIONS),
            Field::EPTP_LIST_ADDRESS => self.vm_functions.contains(VmFuncCtls::EPTP_SWITCHING),
            Field::EPT_POINTER
            | Field::GUEST_PHYSICAL_ADDRESS
            | Field::GUEST_PDPTE0
            | Field::GUEST_PDPTE1
            | Field::GUEST_PDPTE2
            | Field::GUEST_PDPTE3 => self.may_proc2(ProcCtls2::EPT),
            Field::VMREAD_BITMAP | Field::VMWRITE_BITMAP => {
                self.may_proc2(ProcCtls2::VMCS_SHADOWING)
            }
            Field::XSS_EXITING_BITMAP => self.may_proc2(ProcCtls2::XSAVES),
            Field::ENCLS_EXITING_BITMAP => self.may_proc2(ProcCtls2::ENCLS_EXITING),
            Field::SPP_TABLE_POINTER => self.may_proc2(ProcCtls2::SUB_PAGE_WRITE),
            Field::TSC_MULTIPLIER => self.may_proc2(ProcCtls2::TSC_SCALING),
            Field::PLE_GAP | Field::PLE_WINDOW => self.may_proc2(ProcCtls2::PAUSE_LOOP_EXITING),
            Field::PROC_CTLS2 => self.may_proc(ProcCtls::SECONDARY_CONTROLS),
            Field::PREEMPTION_TIMER => self.may_pin(PinCtls::PREEMPTION_TIMER),
            Field::GUEST_PAT => {
                self.may_entry(EntryCtls::LOAD_PAT) || self.may_exit(ExitCtls::SAVE_PAT)
            }
            Field::GUEST_EFER => {
                self.may_entry(EntryCtls::LOAD_EFER) || self.may_exit(ExitCtls::SAVE_EFER)
            }
            Field::GUEST_PERF_GLOBAL_CTRL => self.may_entry(EntryCtls::LOAD_PERF_GLOBAL_CTRL),
            Field::GUEST_BNDCFGS => {
                self.may_entry(EntryCtls::LOAD_BNDCFGS) || self.may_exit(ExitCtls::CLEAR_BNDCFGS)
            }
            // Its controls (load IA32_RTIT_CTL, clear IA32_RTIT_CTL) have no name here: never
            // offered.
            Field::GUEST_RTIT_CTL => false,
            Field::HOST_PAT => self.may_exit(ExitCtls::LOAD_PAT),
            Field::HOST_EFER => self.may_exit(ExitCtls::LOAD_EFER),
            Field::HOST_PERF_GLOBAL_CTRL => self.may_exit(ExitCtls::LOAD_PERF_GLOBAL_CTRL),
            Field::CR3_TARGET0 => self.misc.cr3_targets() > 0,
            Field::CR3_TARGET1 => self.misc.cr3_targets() > 1,
            Field::CR3_TARGET2 => self.misc.cr3_targets() > 2,
            Field::CR3_TARGET3 => self.misc.cr3_targets() > 3,
            _ => true,
        }
    }

    /// Whether all of these pin-based controls may be 1.
    #[inline]
    pub const fn may_pin(&self, controls: PinCtls) -> bool {
        self.pin.may_be_1 & controls.bits() == controls.bits()
    }

    /// Whether all of these primary processor-based controls may be 1.
    #[inline]
    pub const fn may_proc(&self, controls: ProcCtls) -> bool {
        self.proc.may_be_1 & controls.bits() == controls.bits()
    }

    /// Whether all of these secondary processor-based controls may be 1.
    #[inline]
    pub const fn may_proc2(&self, controls: ProcCtls2) -> bool {
        self.proc2.may_be_1 & controls.bits() == controls.bits()
    }

    /// Whether all of these VM-exit controls may be 1.
    #[inline]
    pub const fn may_exit(&self, controls: ExitCtls) -> bool {
        self.exit.may_be_1 & controls.bits() == controls.bits()
    }

    /// Whether all of these VM-entry controls may be 1.
    #[inline]
    pub const fn may_entry(&self, controls: EntryCtls) -> bool {
        self.entry.may_be_1 & controls.bits() == controls.bits()
    }
}

fn require(condition: bool, missing: MissingFeature) -> Result<(), MissingFeature> {
    if condition { Ok(()) } else { Err(missing) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A processor with everything that has a name, and some that has not.
    pub(crate) fn rich_hardware() -> HardwareCaps {
        let controls = |must_be_1: u32, may_be_1: u32| Allowed { must_be_1, may_be_1 }.to_msr();
        HardwareCaps {
            msrs: [
                VmxBasic::new()
                    .with_revision(0x2b)
                    .with_region_size(4096)
                    .with_dual_monitor(true)
                    .with_memory_type(memory_type::WB)
                    .with_ins_outs_info(true)
                    .with_true_controls(true)
                    .into(),
                controls(default1::PIN, 0xff),
                controls(default1::PROC, 0xfff9_fffe),
                controls(default1::EXIT, 0x01ff_ffff),
                controls(default1::ENTRY, 0x0003_ffff),
                VmxMisc::new()
                    .with_preemption_timer_rate(5)
                    .with_stores_lma(true)
                    .with_activity_hlt(true)
                    .with_activity_shutdown(true)
                    .with_activity_wait_sipi(true)
                    .with_pt_in_vmx(true)
                    .with_cr3_targets(4)
                    .with_vmwrite_any(true)
                    .with_zero_length_injection(true)
                    .with_mseg_revision(1)
                    .into(),
                0x8000_0021,
                0xffff_ffff,
                0x2000,
                0x03f7_7fff,
                0x2e,
                controls(0, 0x07df_ffff),
                0x0f01_0673_4141,
                controls(default1::PIN, 0xff),
                controls(default1::PROC & !0x1_8000, 0xfff9_fffe),
                controls(default1::EXIT & !4, 0x01ff_ffff),
                controls(default1::ENTRY & !4, 0x0003_ffff),
                1,
            ],
            physical_width: 40,
            linear_width: 48,
            efer: 0xd01,
            debugctl: 0x03 | 1 << 2 | 1 << 15,
            sgx: false,
        }
    }

    /// What [`rich_hardware`] lets us offer.
    pub(crate) fn rich_caps() -> Caps {
        Caps::offered(&rich_hardware()).unwrap()
    }

    #[test]
    fn nothing_is_offered_that_the_hardware_lacks_or_the_policy_hides() {
        let (hw, caps) = (rich_hardware(), rich_caps());
        for (mine, index, named) in [
            (caps.pin, msr::VMX_TRUE_PINBASED_CTLS, policy::PIN.bits() | default1::PIN),
            (caps.proc, msr::VMX_TRUE_PROCBASED_CTLS, policy::PROC.bits() | default1::PROC),
            (caps.proc2, msr::VMX_PROCBASED_CTLS2, policy::PROC2.bits()),
            (caps.exit, msr::VMX_TRUE_EXIT_CTLS, policy::EXIT.bits() | default1::EXIT),
            (caps.entry, msr::VMX_TRUE_ENTRY_CTLS, policy::ENTRY.bits() | default1::ENTRY),
        ] {
            assert_eq!(mine.may_be_1 & !hw.allowed(index).may_be_1, 0);
            assert_eq!(mine.may_be_1 & !named, 0);
            assert_eq!(mine.must_be_1 & !mine.may_be_1, 0);
        }
        for hidden in [
            ProcCtls2::VIRTUALIZE_X2APIC,
            ProcCtls2::VMCS_SHADOWING,
            ProcCtls2::EPT_VIOLATION_VE,
            ProcCtls2::PML,
            ProcCtls2::MODE_BASED_EXECUTE,
        ] {
            assert!(!caps.may_proc2(hidden));
        }
        assert!(!caps.may_proc(ProcCtls::MONITOR_TRAP_FLAG));
        assert!(!caps.may_entry(EntryCtls::LOAD_PERF_GLOBAL_CTRL));
        assert!(!caps.misc.activity_wait_sipi() && !caps.misc.pt_in_vmx());
        assert!(!caps.basic.dual_monitor());
        assert_eq!(REVISION >> 31, 0);
        let hidden = 1 << 12 | 1 << 14 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25 | 1 << 27;
        assert_eq!(caps.cr4_fixed1 & hidden, 0, "LA57, SMXE, PKE, CET, PKS, UINTR, LASS");
    }

    #[test]
    fn what_the_hardware_lacks_is_absent_or_an_error() {
        let with = |index: u32, clear: u64| {
            let mut hw = rich_hardware();
            hw.msrs[(index - msr::VMX_BASIC) as usize] &= !clear;
            Caps::offered(&hw)
        };
        let high = |bits: u32| u64::from(bits) << 32;
        for (index, clear, missing) in [
            (msr::VMX_BASIC, 1 << 55, MissingFeature::TrueControls),
            (msr::VMX_BASIC, 6 << 50, MissingFeature::WriteBackVmcs),
            (msr::VMX_TRUE_PINBASED_CTLS, high(1 << 5), MissingFeature::VirtualNmis),
            (msr::VMX_TRUE_PROCBASED_CTLS, high(1 << 28), MissingFeature::MsrBitmaps),
            (msr::VMX_TRUE_PROCBASED_CTLS, high(1 << 31), MissingFeature::SecondaryControls),
            (msr::VMX_PROCBASED_CTLS2, high(1 << 1), MissingFeature::Ept),
            (msr::VMX_PROCBASED_CTLS2, high(1 << 5), MissingFeature::Vpid),
            (msr::VMX_PROCBASED_CTLS2, high(1 << 7), MissingFeature::UnrestrictedGuest),
            (msr::VMX_TRUE_EXIT_CTLS, high(1 << 9), MissingFeature::LongMode),
            (msr::VMX_TRUE_ENTRY_CTLS, high(1 << 15), MissingFeature::EferSwitch),
            (msr::VMX_TRUE_EXIT_CTLS, high(1 << 18), MissingFeature::PatSwitch),
            (msr::VMX_EPT_VPID_CAP, 1 << 6, MissingFeature::FourLevelEpt),
            (msr::VMX_EPT_VPID_CAP, 1 << 16, MissingFeature::LargePages),
            (msr::VMX_EPT_VPID_CAP, 1 << 25, MissingFeature::InvEpt),
            (msr::VMX_EPT_VPID_CAP, 1 << 41, MissingFeature::InvVpid),
        ] {
            assert_eq!(with(index, clear).err(), Some(missing));
        }
        let caps = with(msr::VMX_PROCBASED_CTLS2, high(1 << 13)).unwrap();
        assert_eq!(caps.read_msr(msr::VMX_VMFUNC), None);
        assert!(!caps.supports(Field::VM_FUNCTION_CONTROLS));
        assert!(!caps.supports(Field::EPTP_LIST_ADDRESS));
        let caps = with(msr::VMX_TRUE_PINBASED_CTLS, high(1 << 6)).unwrap();
        assert!(!caps.may_exit(ExitCtls::SAVE_PREEMPTION_TIMER));
        assert!(!caps.supports(Field::PREEMPTION_TIMER));
    }

    #[test]
    fn plain_msrs_force_the_default1_class() {
        let caps = rich_caps();
        for (plain, exact, default1) in [
            (msr::VMX_PINBASED_CTLS, msr::VMX_TRUE_PINBASED_CTLS, default1::PIN),
            (msr::VMX_PROCBASED_CTLS, msr::VMX_TRUE_PROCBASED_CTLS, default1::PROC),
            (msr::VMX_EXIT_CTLS, msr::VMX_TRUE_EXIT_CTLS, default1::EXIT),
            (msr::VMX_ENTRY_CTLS, msr::VMX_TRUE_ENTRY_CTLS, default1::ENTRY),
        ] {
            let plain = Allowed::from_msr(caps.read_msr(plain).unwrap());
            let exact = Allowed::from_msr(caps.read_msr(exact).unwrap());
            assert_eq!(plain.must_be_1, exact.must_be_1 | default1);
            assert_eq!(plain.may_be_1, exact.may_be_1);
        }
        let cr3 = ProcCtls::CR3_LOAD_EXITING | ProcCtls::CR3_STORE_EXITING;
        assert_eq!(caps.proc.must_be_1 & cr3.bits(), 0);
        assert_eq!(caps.read_msr(msr::VMX_BASIC - 1), None);
        assert_eq!(caps.read_msr(msr::VMX_VMFUNC + 1), None);
        assert_eq!(Caps::feature_control(), 5);
    }

    #[test]
    fn fields_follow_their_controls() {
        let caps = rich_caps();
        let absent = [
            Field::POSTED_INTERRUPT_VECTOR,
            Field::EPTP_INDEX,
            Field::GUEST_INTERRUPT_STATUS,
            Field::PML_INDEX,
            Field::PML_ADDRESS,
            Field::POSTED_INTERRUPT_DESC_ADDR,
            Field::EOI_EXIT_BITMAP_0,
            Field::EOI_EXIT_BITMAP_1,
            Field::EOI_EXIT_BITMAP_2,
            Field::EOI_EXIT_BITMAP_3,
            Field::VMREAD_BITMAP,
            Field::VMWRITE_BITMAP,
            Field::VE_INFORMATION_ADDR,
            Field::ENCLS_EXITING_BITMAP,
            Field::SPP_TABLE_POINTER,
            Field::GUEST_PERF_GLOBAL_CTRL,
            Field::GUEST_BNDCFGS,
            Field::GUEST_RTIT_CTL,
            Field::HOST_PERF_GLOBAL_CTRL,
        ];
        for (field, _) in FIELDS {
            assert_eq!(caps.supports(*field), !absent.contains(field), "{field:?}");
        }
        // TSC multiplier, 2032H, has the highest index: 19H.
        assert_eq!(caps.vmcs_enum(), 0x32);
    }

    #[test]
    fn only_msrs_that_exist_are_read() {
        let hw = rich_hardware();
        assert_eq!(HardwareCaps::read_msrs(|index| hw.msr(index)), hw.msrs);
        // An old processor: no TRUE MSRs, no secondary controls, and #GP on all the rest.
        let old = HardwareCaps::read_msrs(|index| match index {
            msr::VMX_BASIC => 1,
            msr::VMX_PROCBASED_CTLS => u64::from(!(1u32 << 31)) << 32,
            msr::VMX_PINBASED_CTLS..=msr::VMX_VMCS_ENUM => 0,
            _ => panic!("MSR {index:#x} does not exist"),
        });
        assert_eq!(old[0], 1);
    }
}
