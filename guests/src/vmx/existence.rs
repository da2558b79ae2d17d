//! Answers: which VMCS fields has this processor?
//!
//! SDM Vol. 3D, Appendix B, "Field Encoding in VMCS", in the notes to its tables: many fields exist
//! only where a control that uses them may be 1.

use arrayvec::ArrayVec;
use vmx_defs::{
    EntryCtls, ExitCtls, Field, PinCtls, ProcCtls, ProcCtls2, VmFuncCtls,
    field::{FIELDS, Kind},
};

use super::Caps;

/// "Load IA32_RTIT_CTL" among the VM-entry controls.
const LOAD_RTIT_CTL: u32 = 1 << 18;
/// "Clear IA32_RTIT_CTL" among the VM-exit controls.
const CLEAR_RTIT_CTL: u32 = 1 << 25;

impl Caps {
    /// Whether `field` exists.
    pub fn has_field(&self, field: Field) -> bool {
        let pin = |bits: PinCtls| self.pin.may_be_1 & bits.bits() != 0;
        let proc = |bits: ProcCtls| self.proc.may_be_1 & bits.bits() != 0;
        let entry = |bits: EntryCtls| self.entry.may_be_1 & bits.bits() != 0;
        let exit = |bits: ExitCtls| self.exit.may_be_1 & bits.bits() != 0;
        let proc2 = |bits: ProcCtls2| self.has2(bits);
        match field {
            Field::VPID => proc2(ProcCtls2::VPID),
            Field::POSTED_INTERRUPT_VECTOR | Field::POSTED_INTERRUPT_DESC_ADDR => {
                pin(PinCtls::POSTED_INTERRUPTS)
            }
            Field::EPTP_INDEX | Field::VE_INFORMATION_ADDR => proc2(ProcCtls2::EPT_VIOLATION_VE),
            Field::GUEST_INTERRUPT_STATUS
            | Field::EOI_EXIT_BITMAP_0
            | Field::EOI_EXIT_BITMAP_1
            | Field::EOI_EXIT_BITMAP_2
            | Field::EOI_EXIT_BITMAP_3 => proc2(ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY),
            Field::PML_INDEX | Field::PML_ADDRESS => proc2(ProcCtls2::PML),
            Field::MSR_BITMAP => proc(ProcCtls::MSR_BITMAPS),
            Field::VIRTUAL_APIC_ADDR | Field::TPR_THRESHOLD => proc(ProcCtls::TPR_SHADOW),
            Field::APIC_ACCESS_ADDR => proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES),
            Field::VM_FUNCTION_CONTROLS => proc2(ProcCtls2::VM_FUNCTIONS),
            Field::EPTP_LIST_ADDRESS => self.vmfunc & VmFuncCtls::EPTP_SWITCHING.bits() != 0,
            Field::EPT_POINTER
            | Field::GUEST_PHYSICAL_ADDRESS
            | Field::GUEST_PDPTE0
            | Field::GUEST_PDPTE1
            | Field::GUEST_PDPTE2
            | Field::GUEST_PDPTE3 => proc2(ProcCtls2::EPT),
            Field::VMREAD_BITMAP | Field::VMWRITE_BITMAP => proc2(ProcCtls2::VMCS_SHADOWING),
            Field::XSS_EXITING_BITMAP => proc2(ProcCtls2::XSAVES),
            Field::ENCLS_EXITING_BITMAP => proc2(ProcCtls2::ENCLS_EXITING),
            Field::SPP_TABLE_POINTER => proc2(ProcCtls2::SUB_PAGE_WRITE),
            Field::TSC_MULTIPLIER => proc2(ProcCtls2::TSC_SCALING),
            Field::PLE_GAP | Field::PLE_WINDOW => proc2(ProcCtls2::PAUSE_LOOP_EXITING),
            Field::PROC_CTLS2 => proc(ProcCtls::SECONDARY_CONTROLS),
            Field::PREEMPTION_TIMER => pin(PinCtls::PREEMPTION_TIMER),
            Field::GUEST_PAT => entry(EntryCtls::LOAD_PAT) || exit(ExitCtls::SAVE_PAT),
            Field::GUEST_EFER => entry(EntryCtls::LOAD_EFER) || exit(ExitCtls::SAVE_EFER),
            Field::GUEST_PERF_GLOBAL_CTRL => entry(EntryCtls::LOAD_PERF_GLOBAL_CTRL),
            Field::GUEST_BNDCFGS => entry(EntryCtls::LOAD_BNDCFGS) || exit(ExitCtls::CLEAR_BNDCFGS),
            Field::GUEST_RTIT_CTL => {
                self.entry.may_be_1 & LOAD_RTIT_CTL != 0 || self.exit.may_be_1 & CLEAR_RTIT_CTL != 0
            }
            Field::HOST_PAT => exit(ExitCtls::LOAD_PAT),
            Field::HOST_EFER => exit(ExitCtls::LOAD_EFER),
            Field::HOST_PERF_GLOBAL_CTRL => exit(ExitCtls::LOAD_PERF_GLOBAL_CTRL),
            Field::CR3_TARGET0 => self.misc.cr3_targets() > 0,
            Field::CR3_TARGET1 => self.misc.cr3_targets() > 1,
            Field::CR3_TARGET2 => self.misc.cr3_targets() > 2,
            Field::CR3_TARGET3 => self.misc.cr3_targets() > 3,
            _ => true,
        }
    }

    /// The fields that exist and are of this kind.
    pub fn fields_of(&self, kind: Kind) -> ArrayVec<Field, 96> {
        let all = FIELDS.iter().map(|&(field, _)| field);
        all.filter(|&field| field.kind() == kind && self.has_field(field)).collect()
    }
}
