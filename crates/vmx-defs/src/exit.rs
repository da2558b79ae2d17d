//! Why did a VM exit happen?
//!
//! SDM Vol. 3D, Appendix C, "VMX Basic Exit Reasons", and Vol. 3C, "Information About VM Exits".

use bitfield_struct::bitfield;
use core::fmt;

/// The exit-reason field: a basic reason in bits 15:0, and flags above.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct ExitReason(u32);

/// Bit 31 of the exit reason: the VM entry failed, and no guest instruction ran.
pub const ENTRY_FAILURE: u32 = 1 << 31;

macro_rules! reasons {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        impl ExitReason {
            $(
                #[doc = $text]
                pub const $name: ExitReason = ExitReason($number);
            )*

            /// Name of the basic reason, or `"unknown"`.
            pub const fn name(self) -> &'static str {
                match self.0 & 0xffff {
                    $($number => stringify!($name),)*
                    _ => "unknown",
                }
            }
        }
    };
}

impl ExitReason {
    /// The reason as the VMCS field holds it.
    #[inline]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The field's value.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The basic reason: bits 15:0 alone.
    #[inline]
    pub const fn basic(self) -> Self {
        Self(self.0 & 0xffff)
    }

    /// Whether the exit is a VM-entry failure (bit 31).
    #[inline]
    pub const fn is_entry_failure(self) -> bool {
        self.0 & ENTRY_FAILURE != 0
    }
}

impl fmt::Debug for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#x})", self.name(), self.0)
    }
}

reasons! {
    EXCEPTION_OR_NMI = 0, "Exception or non-maskable interrupt.";
    EXTERNAL_INTERRUPT = 1, "External interrupt.";
    TRIPLE_FAULT = 2, "Triple fault.";
    INIT_SIGNAL = 3, "INIT signal.";
    STARTUP_IPI = 4, "Start-up IPI.";
    IO_SMI = 5, "I/O system-management interrupt.";
    OTHER_SMI = 6, "Other system-management interrupt.";
    INTERRUPT_WINDOW = 7, "Interrupt window.";
    NMI_WINDOW = 8, "NMI window.";
    TASK_SWITCH = 9, "Task switch.";
    CPUID = 10, "CPUID.";
    GETSEC = 11, "GETSEC.";
    HLT = 12, "HLT.";
    INVD = 13, "INVD.";
    INVLPG = 14, "INVLPG.";
    RDPMC = 15, "RDPMC.";
    RDTSC = 16, "RDTSC.";
    RSM = 17, "RSM.";
    VMCALL = 18, "VMCALL.";
    VMCLEAR = 19, "VMCLEAR.";
    VMLAUNCH = 20, "VMLAUNCH.";
    VMPTRLD = 21, "VMPTRLD.";
    VMPTRST = 22, "VMPTRST.";
    VMREAD = 23, "VMREAD.";
    VMRESUME = 24, "VMRESUME.";
    VMWRITE = 25, "VMWRITE.";
    VMXOFF = 26, "VMXOFF.";
    VMXON = 27, "VMXON.";
    CR_ACCESS = 28, "Control-register access.";
    MOV_DR = 29, "MOV DR.";
    IO_INSTRUCTION = 30, "I/O instruction.";
    RDMSR = 31, "RDMSR.";
    WRMSR = 32, "WRMSR.";
    ENTRY_GUEST_STATE = 33, "VM-entry failure due to invalid guest state.";
    ENTRY_MSR_LOADING = 34, "VM-entry failure due to MSR loading.";
    MWAIT = 36, "MWAIT.";
    MONITOR_TRAP_FLAG = 37, "Monitor trap flag.";
    MONITOR = 39, "MONITOR.";
    PAUSE = 40, "PAUSE.";
    ENTRY_MACHINE_CHECK = 41, "VM-entry failure due to machine-check event.";
    TPR_BELOW_THRESHOLD = 43, "TPR below threshold.";
    APIC_ACCESS = 44, "APIC access.";
    VIRTUALIZED_EOI = 45, "Virtualized EOI.";
    GDTR_IDTR_ACCESS = 46, "Access to GDTR or IDTR.";
    LDTR_TR_ACCESS = 47, "Access to LDTR or TR.";
    EPT_VIOLATION = 48, "EPT violation.";
    EPT_MISCONFIGURATION = 49, "EPT misconfiguration.";
    INVEPT = 50, "INVEPT.";
    RDTSCP = 51, "RDTSCP.";
    PREEMPTION_TIMER = 52, "VMX-preemption timer expired.";
    INVVPID = 53, "INVVPID.";
    WBINVD = 54, "WBINVD or WBNOINVD.";
    XSETBV = 55, "XSETBV.";
    APIC_WRITE = 56, "APIC write.";
    RDRAND = 57, "RDRAND.";
    INVPCID = 58, "INVPCID.";
    VMFUNC = 59, "VMFUNC.";
    ENCLS = 60, "ENCLS.";
    RDSEED = 61, "RDSEED.";
    PML_FULL = 62, "Page-modification log full.";
    XSAVES = 63, "XSAVES.";
    XRSTORS = 64, "XRSTORS.";
    UMWAIT = 67, "UMWAIT.";
    TPAUSE = 68, "TPAUSE.";
    SEAMCALL = 76, "SEAMCALL.";
    TDCALL = 77, "TDCALL.";
}

/// Exit qualifications of a VM-entry failure due to invalid guest state.
pub mod entry_failure {
    /// Nothing more is known.
    pub const DEFAULT: u64 = 0;
    /// Loading the PDPTEs failed.
    pub const PDPTE: u64 = 2;
    /// An NMI can't be injected: the guest state blocks by STI.
    pub const NMI_INJECTION: u64 = 3;
    /// The VMCS link pointer is bad.
    pub const VMCS_LINK_POINTER: u64 = 4;
}

/// Exit qualification of a control-register access (SDM Vol. 3C, "Exit Qualification for
/// Control-Register Accesses").
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct CrAccess {
    /// Number of the control register.
    #[bits(4)]
    pub register: u8,
    /// 0 is MOV to CR, 1 MOV from CR, 2 CLTS, 3 LMSW.
    #[bits(2)]
    pub access: u8,
    /// LMSW's operand is in memory.
    pub lmsw_memory: bool,
    __: bool,
    /// The general register of MOV CR.
    #[bits(4)]
    pub gpr: u8,
    #[bits(4)]
    __: u8,
    /// LMSW's source data.
    pub lmsw_source: u16,
    __: u32,
}

/// Exit qualification of an I/O instruction.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct IoAccess {
    /// Size in bytes minus 1: 0, 1 or 3.
    #[bits(3)]
    pub size_minus_1: u8,
    /// IN, else OUT.
    pub is_in: bool,
    /// INS or OUTS.
    pub string: bool,
    /// REP prefixed.
    pub rep: bool,
    /// The port is an immediate operand, else DX.
    pub immediate: bool,
    #[bits(9)]
    __: u16,
    /// The port.
    pub port: u16,
    __: u32,
}

/// The VM-exit instruction-information field, for VMX instructions (SDM Vol. 3C, "Information for
/// VM Exits Due to Instruction Execution", the formats of VMCLEAR ..., VMREAD and VMWRITE, INVEPT
/// ...: they agree wherever they are defined).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InstructionInfo {
    /// Scaling of the index register: 1 shifted by this.
    #[bits(2)]
    pub scaling: u8,
    __: bool,
    /// Reg1, the register operand of VMREAD and VMWRITE that `is_register` selects.
    #[bits(4)]
    pub reg1: u8,
    /// 0 is 16-bit, 1 is 32-bit, 2 is 64-bit addressing.
    #[bits(3)]
    pub address_size: u8,
    /// The operand is Reg1, not memory (VMREAD and VMWRITE).
    pub is_register: bool,
    #[bits(4)]
    __: u8,
    /// Segment register: 0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS.
    #[bits(3)]
    pub segment: u8,
    /// Index register, unless `index_invalid`.
    #[bits(4)]
    pub index: u8,
    /// There is no index register.
    pub index_invalid: bool,
    /// Base register, unless `base_invalid`.
    #[bits(4)]
    pub base: u8,
    /// There is no base register.
    pub base_invalid: bool,
    /// Reg2: the encoding's register of VMREAD and VMWRITE, the type's of INVEPT and INVVPID.
    #[bits(4)]
    pub reg2: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_split_into_basic_and_flags() {
        let reason = ExitReason::from_bits(ENTRY_FAILURE | 33);
        assert!(reason.is_entry_failure());
        assert_eq!(reason.basic(), ExitReason::ENTRY_GUEST_STATE);
        assert_eq!(ExitReason::VMFUNC.name(), "VMFUNC");
    }

    #[test]
    fn instruction_information_bits_stand_where_the_manual_puts_them() {
        let info = InstructionInfo::new()
            .with_scaling(3)
            .with_reg1(0xf)
            .with_address_size(2)
            .with_segment(3)
            .with_index(5)
            .with_base(4)
            .with_reg2(9);
        assert_eq!(u32::from(info), 3 | 0xf << 3 | 2 << 7 | 3 << 15 | 5 << 18 | 4 << 23 | 9 << 28);
        assert_eq!(u32::from(InstructionInfo::new().with_is_register(true)), 1 << 10);
        assert_eq!(u32::from(InstructionInfo::new().with_index_invalid(true)), 1 << 22);
        assert_eq!(u32::from(InstructionInfo::new().with_base_invalid(true)), 1 << 27);
    }
}
