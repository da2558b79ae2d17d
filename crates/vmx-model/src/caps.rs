//! What can this processor do?
//!
//! A [`ModelCaps`] is what the capability MSRs report (SDM Vol. 3D, Appendix A, "VMX Capability
//! Reporting Facility") and what CPUID says that matters to VMX. It can be set to any subset of what
//! the model implements, so that a model can be made the same machine as a hypervisor offers to its
//! guest.

use vmx_defs::Field;
use vmx_defs::controls::{EntryCtls, ExitCtls, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls};
use vmx_defs::ept::memory_type;
use vmx_defs::field::FIELDS;
use vmx_defs::msr::{self, Allowed, EptVpidCap, VmxBasic, VmxMisc};

/// Controls of the *default1* class (SDM Vol. 3D, "Reserved Controls and Default Settings").
mod default1 {
    pub(super) const PIN: u32 = 0x0000_0016;
    pub(super) const PROC: u32 = 0x0401_e172;
    pub(super) const EXIT: u32 = 0x0003_6dff;
    pub(super) const ENTRY: u32 = 0x0000_11ff;
}

/// What the model implements.
mod implemented {
    use super::*;

    pub(super) const PIN: PinCtls = PinCtls::EXTERNAL_INTERRUPT_EXITING
        .union(PinCtls::NMI_EXITING)
        .union(PinCtls::VIRTUAL_NMIS);

    pub(super) const PROC: ProcCtls = ProcCtls::INTERRUPT_WINDOW_EXITING
        .union(ProcCtls::TSC_OFFSETTING)
        .union(ProcCtls::HLT_EXITING)
        .union(ProcCtls::INVLPG_EXITING)
        .union(ProcCtls::RDTSC_EXITING)
        .union(ProcCtls::CR3_LOAD_EXITING)
        .union(ProcCtls::CR3_STORE_EXITING)
        .union(ProcCtls::CR8_LOAD_EXITING)
        .union(ProcCtls::CR8_STORE_EXITING)
        .union(ProcCtls::NMI_WINDOW_EXITING)
        .union(ProcCtls::MOV_DR_EXITING)
        .union(ProcCtls::UNCONDITIONAL_IO_EXITING)
        .union(ProcCtls::IO_BITMAPS)
        .union(ProcCtls::MSR_BITMAPS)
        .union(ProcCtls::PAUSE_EXITING)
        .union(ProcCtls::SECONDARY_CONTROLS)
        // Instructions that the model has not, so that nothing can show what the control does.
        .union(ProcCtls::MWAIT_EXITING)
        .union(ProcCtls::MONITOR_EXITING)
        .union(ProcCtls::RDPMC_EXITING);

    pub(super) const PROC2: ProcCtls2 = ProcCtls2::EPT
        .union(ProcCtls2::RDTSCP)
        .union(ProcCtls2::VPID)
        .union(ProcCtls2::WBINVD_EXITING)
        .union(ProcCtls2::UNRESTRICTED_GUEST)
        .union(ProcCtls2::INVPCID)
        .union(ProcCtls2::VM_FUNCTIONS)
        .union(ProcCtls2::EPT_VIOLATION_VE)
        // As above.
        .union(ProcCtls2::DESCRIPTOR_TABLE_EXITING)
        .union(ProcCtls2::RDRAND_EXITING)
        .union(ProcCtls2::RDSEED_EXITING)
        .union(ProcCtls2::PAUSE_LOOP_EXITING)
        .union(ProcCtls2::XSAVES);

    pub(super) const EXIT: ExitCtls = ExitCtls::SAVE_DEBUG_CONTROLS
        .union(ExitCtls::HOST_ADDRESS_SPACE_SIZE)
        .union(ExitCtls::ACK_INTERRUPT)
        .union(ExitCtls::SAVE_PAT)
        .union(ExitCtls::LOAD_PAT)
        .union(ExitCtls::SAVE_EFER)
        .union(ExitCtls::LOAD_EFER);

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
        .union(EptVpidCap::ADVANCED_EXIT_INFO)
        .union(EptVpidCap::INVEPT_SINGLE)
        .union(EptVpidCap::INVEPT_ALL)
        .union(EptVpidCap::INVVPID)
        .union(EptVpidCap::INVVPID_ADDRESS)
        .union(EptVpidCap::INVVPID_SINGLE)
        .union(EptVpidCap::INVVPID_ALL)
        .union(EptVpidCap::INVVPID_RETAIN_GLOBALS);

    /// VME to OSXMMEXCPT, UMIP, VMXE, FSGSBASE, PCIDE, OSXSAVE, SMEP and SMAP.
    pub(super) const CR4: u64 =
        0x7ff | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 21;
}

/// The abilities of a processor. The sets of controls are those of the TRUE capability MSRs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModelCaps {
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
    /// Physical-address width in bits, 32 to 52.
    pub physical_width: u8,
    /// Bits of IA32_EFER that are not reserved.
    pub efer: u64,
    /// Bits of IA32_DEBUGCTL that are not reserved.
    pub debugctl: u64,
}

/// The model has one linear-address width: 5-level paging is not implemented.
pub const LINEAR_WIDTH: u8 = 48;

const fn settings(default1: u32, free: u32, implemented: u32) -> Allowed {
    Allowed { must_be_1: default1 & !free, may_be_1: default1 | implemented }
}

impl Default for ModelCaps {
    /// All that the model implements, but for advanced exit information for EPT violations, which
    /// few processors have.
    fn default() -> Self {
        let cr3_exits = ProcCtls::CR3_LOAD_EXITING.union(ProcCtls::CR3_STORE_EXITING).bits();
        Self {
            basic: VmxBasic::new()
                .with_revision(u32::from_le_bytes(*b"modl"))
                .with_region_size(4096)
                .with_memory_type(memory_type::WB)
                .with_ins_outs_info(true)
                .with_true_controls(true),
            pin: settings(default1::PIN, 0, implemented::PIN.bits()),
            proc: settings(default1::PROC, cr3_exits, implemented::PROC.bits()),
            proc2: settings(0, 0, implemented::PROC2.bits()),
            exit: settings(
                default1::EXIT,
                ExitCtls::SAVE_DEBUG_CONTROLS.bits(),
                implemented::EXIT.bits(),
            ),
            entry: settings(
                default1::ENTRY,
                EntryCtls::LOAD_DEBUG_CONTROLS.bits(),
                implemented::ENTRY.bits(),
            ),
            misc: VmxMisc::new()
                .with_stores_lma(true)
                .with_activity_hlt(true)
                .with_activity_shutdown(true)
                .with_cr3_targets(4)
                .with_vmwrite_any(true)
                .with_zero_length_injection(true),
            cr0_fixed0: 0x8000_0021,
            cr0_fixed1: 0xffff_ffff,
            cr4_fixed0: 1 << 13,
            cr4_fixed1: implemented::CR4,
            ept_vpid: implemented::EPT - EptVpidCap::ADVANCED_EXIT_INFO,
            vm_functions: VmFuncCtls::EPTP_SWITCHING,
            physical_width: 40,
            efer: 0xd01,
            debugctl: 3,
        }
    }
}

/// A set of abilities asks for one that the model has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotImplemented {
    /// Which part of [`ModelCaps`].
    pub part: &'static str,
    /// The bits too many (or, of CR0 and CR4, wrong).
    pub bits: u64,
}

impl ModelCaps {
    /// Whether the model implements all of this.
    ///
    /// # Errors
    /// The first part that goes beyond it.
    pub fn check(&self) -> Result<(), NotImplemented> {
        let beyond = |set: Allowed, default1: u32, implemented: u32| {
            u64::from(set.may_be_1 & !(default1 | implemented))
        };
        let parts = [
            ("pin", beyond(self.pin, default1::PIN, implemented::PIN.bits())),
            ("proc", beyond(self.proc, default1::PROC, implemented::PROC.bits())),
            ("proc2", beyond(self.proc2, 0, implemented::PROC2.bits())),
            ("exit", beyond(self.exit, default1::EXIT, implemented::EXIT.bits())),
            ("entry", beyond(self.entry, default1::ENTRY, implemented::ENTRY.bits())),
            ("ept_vpid", self.ept_vpid.difference(implemented::EPT).bits()),
            ("vm_functions", self.vm_functions.difference(VmFuncCtls::EPTP_SWITCHING).bits()),
            ("cr4_fixed1", self.cr4_fixed1 & !implemented::CR4),
            ("efer", self.efer & !0xd01),
            ("physical_width", u64::from(!(32..=52).contains(&self.physical_width))),
        ];
        match parts.into_iter().find(|(_, bits)| *bits != 0) {
            Some((part, bits)) => Err(NotImplemented { part, bits }),
            None => Ok(()),
        }
    }

    /// Value of the capability MSR `index`, if it exists.
    pub fn msr(&self, index: u32) -> Option<u64> {
        // Without TRUE in their names, the MSRs report the default1 class as fixed.
        let plain = |set: Allowed, default1: u32| {
            Allowed { must_be_1: set.must_be_1 | default1, ..set }.to_msr()
        };
        let secondary = self.has_proc(ProcCtls::SECONDARY_CONTROLS);
        let ept_or_vpid = self.has_proc2(ProcCtls2::EPT) || self.has_proc2(ProcCtls2::VPID);
        Some(match index {
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
            msr::VMX_VMCS_ENUM => {
                let fields = FIELDS.iter().map(|(field, _)| *field);
                let highest = fields.filter(|field| self.supports(*field)).map(Field::index).max();
                u64::from(highest.unwrap_or(0)) << 1
            }
            msr::VMX_PROCBASED_CTLS2 if secondary => self.proc2.to_msr(),
            msr::VMX_EPT_VPID_CAP if secondary && ept_or_vpid => self.ept_vpid.bits(),
            msr::VMX_TRUE_PINBASED_CTLS => self.pin.to_msr(),
            msr::VMX_TRUE_PROCBASED_CTLS => self.proc.to_msr(),
            msr::VMX_TRUE_EXIT_CTLS => self.exit.to_msr(),
            msr::VMX_TRUE_ENTRY_CTLS => self.entry.to_msr(),
            msr::VMX_VMFUNC if self.has_proc2(ProcCtls2::VM_FUNCTIONS) => self.vm_functions.bits(),
            _ => return None,
        })
    }

    /// Whether this primary control can be 1.
    pub fn has_proc(&self, control: ProcCtls) -> bool {
        self.proc.may_be_1 & control.bits() == control.bits()
    }

    /// Whether this secondary control can be 1.
    pub fn has_proc2(&self, control: ProcCtls2) -> bool {
        self.has_proc(ProcCtls::SECONDARY_CONTROLS)
            && self.proc2.may_be_1 & control.bits() == control.bits()
    }

    /// Whether the VMCS has the field (SDM Vol. 3D, Appendix B, "Field Encoding in VMCS", the notes
    /// on which control a field exists with).
    pub fn supports(&self, field: Field) -> bool {
        let pin = |control: PinCtls| self.pin.may_be_1 & control.bits() != 0;
        let exit = |control: ExitCtls| self.exit.may_be_1 & control.bits() != 0;
        let entry = |control: EntryCtls| self.entry.may_be_1 & control.bits() != 0;
        let targets = self.misc.cr3_targets();
        match field {
            Field::VPID => self.has_proc2(ProcCtls2::VPID),
            Field::EPT_POINTER
            | Field::GUEST_PHYSICAL_ADDRESS
            | Field::GUEST_PDPTE0
            | Field::GUEST_PDPTE1
            | Field::GUEST_PDPTE2
            | Field::GUEST_PDPTE3 => self.has_proc2(ProcCtls2::EPT),
            Field::EPTP_INDEX | Field::VE_INFORMATION_ADDR => {
                self.has_proc2(ProcCtls2::EPT_VIOLATION_VE)
            }
            Field::VM_FUNCTION_CONTROLS => self.has_proc2(ProcCtls2::VM_FUNCTIONS),
            Field::EPTP_LIST_ADDRESS => {
                self.has_proc2(ProcCtls2::VM_FUNCTIONS)
                    && self.vm_functions.contains(VmFuncCtls::EPTP_SWITCHING)
            }
            Field::PROC_CTLS2 => self.has_proc(ProcCtls::SECONDARY_CONTROLS),
            Field::MSR_BITMAP => self.has_proc(ProcCtls::MSR_BITMAPS),
            Field::VIRTUAL_APIC_ADDR | Field::TPR_THRESHOLD => self.has_proc(ProcCtls::TPR_SHADOW),
            Field::APIC_ACCESS_ADDR => self.has_proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES),
            Field::PLE_GAP | Field::PLE_WINDOW => self.has_proc2(ProcCtls2::PAUSE_LOOP_EXITING),
            Field::XSS_EXITING_BITMAP => self.has_proc2(ProcCtls2::XSAVES),
            Field::TSC_MULTIPLIER => self.has_proc2(ProcCtls2::TSC_SCALING),
            Field::VMREAD_BITMAP | Field::VMWRITE_BITMAP => {
                self.has_proc2(ProcCtls2::VMCS_SHADOWING)
            }
            Field::PML_ADDRESS | Field::PML_INDEX => self.has_proc2(ProcCtls2::PML),
            Field::ENCLS_EXITING_BITMAP => self.has_proc2(ProcCtls2::ENCLS_EXITING),
            Field::SPP_TABLE_POINTER => self.has_proc2(ProcCtls2::SUB_PAGE_WRITE),
            Field::GUEST_INTERRUPT_STATUS
            | Field::EOI_EXIT_BITMAP_0
            | Field::EOI_EXIT_BITMAP_1
            | Field::EOI_EXIT_BITMAP_2
            | Field::EOI_EXIT_BITMAP_3 => self.has_proc2(ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY),
            Field::POSTED_INTERRUPT_VECTOR | Field::POSTED_INTERRUPT_DESC_ADDR => {
                pin(PinCtls::POSTED_INTERRUPTS)
            }
            Field::PREEMPTION_TIMER => pin(PinCtls::PREEMPTION_TIMER),
            Field::GUEST_PAT => entry(EntryCtls::LOAD_PAT) || exit(ExitCtls::SAVE_PAT),
            Field::GUEST_EFER => entry(EntryCtls::LOAD_EFER) || exit(ExitCtls::SAVE_EFER),
            Field::HOST_PAT => exit(ExitCtls::LOAD_PAT),
            Field::HOST_EFER => exit(ExitCtls::LOAD_EFER),
            Field::GUEST_PERF_GLOBAL_CTRL => entry(EntryCtls::LOAD_PERF_GLOBAL_CTRL),
            Field::HOST_PERF_GLOBAL_CTRL => exit(ExitCtls::LOAD_PERF_GLOBAL_CTRL),
            Field::GUEST_BNDCFGS => entry(EntryCtls::LOAD_BNDCFGS) || exit(ExitCtls::CLEAR_BNDCFGS),
            Field::GUEST_RTIT_CTL => false,
            Field::CR3_TARGET0 => targets > 0,
            Field::CR3_TARGET1 => targets > 1,
            Field::CR3_TARGET2 => targets > 2,
            Field::CR3_TARGET3 => targets > 3,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_implemented_and_more_is_not() {
        let caps = ModelCaps::default();
        assert_eq!(caps.check(), Ok(()));
        let mut more = caps.clone();
        more.proc2.may_be_1 |= ProcCtls2::PML.bits();
        let bits = ProcCtls2::PML.bits().into();
        assert_eq!(more.check(), Err(NotImplemented { part: "proc2", bits }));
    }

    #[test]
    fn fields_come_with_their_controls() {
        let mut caps = ModelCaps::default();
        assert!(caps.supports(Field::EPTP_INDEX) && !caps.supports(Field::PML_INDEX));
        caps.proc2.may_be_1 &= !ProcCtls2::EPT_VIOLATION_VE.bits();
        assert!(!caps.supports(Field::EPTP_INDEX));
        assert_eq!(caps.msr(msr::VMX_VMCS_ENUM).map(|value| value & 1), Some(0));
        caps.proc.may_be_1 &= !ProcCtls::SECONDARY_CONTROLS.bits();
        assert_eq!(caps.msr(msr::VMX_PROCBASED_CTLS2), None);
        assert_eq!(caps.msr(msr::VMX_EPT_VPID_CAP), None);
        assert!(!caps.supports(Field::EPT_POINTER));
    }
}
