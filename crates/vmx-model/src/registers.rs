//! Which registers does a processor have?
//!
//! Those that VM entry and exit load and save, those that translate addresses, and the MSRs that
//! software of a hypervisor touches.

/// Numbers of general registers.
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
}

/// Bits of CR0.
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1 << 0;
    /// Task switched.
    pub const TS: u64 = 1 << 3;
    /// Extension type: always 1.
    pub const ET: u64 = 1 << 4;
    /// Numeric error.
    pub const NE: u64 = 1 << 5;
    /// Write protect.
    pub const WP: u64 = 1 << 16;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
    /// Bits that can be changed at all.
    pub const DEFINED: u64 = 0xe005_003f;
}

/// Bits of CR4.
pub mod cr4 {
    /// Page-size extensions.
    pub const PSE: u64 = 1 << 4;
    /// Physical-address extension.
    pub const PAE: u64 = 1 << 5;
    /// Page-global enable.
    pub const PGE: u64 = 1 << 7;
    /// VMX enable.
    pub const VMXE: u64 = 1 << 13;
    /// PCID enable.
    pub const PCIDE: u64 = 1 << 17;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
}

/// Bits of IA32_EFER.
pub mod efer {
    /// IA-32e mode enable.
    pub const LME: u64 = 1 << 8;
    /// IA-32e mode active.
    pub const LMA: u64 = 1 << 10;
    /// Execute-disable enable.
    pub const NXE: u64 = 1 << 11;
}

/// Bits of RFLAGS.
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Always 1.
    pub const FIXED: u64 = 1 << 1;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Trap.
    pub const TF: u64 = 1 << 8;
    /// Interrupt enable.
    pub const IF: u64 = 1 << 9;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check.
    pub const AC: u64 = 1 << 18;
    /// CF, PF, AF, ZF, SF and OF.
    pub const ARITHMETIC: u64 = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 11;
}

/// A segment register in the format of the guest-state area (SDM Vol. 3C, "Guest Register State").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Access rights.
    pub rights: u32,
}

impl Segment {
    /// D/B.
    pub const BIG: u32 = 1 << 14;
    /// L: 64-bit code.
    pub const LONG: u32 = 1 << 13;
    /// The register holds no segment.
    pub const UNUSABLE: u32 = 1 << 16;

    /// DPL; in SS it is the CPL.
    pub const fn dpl(&self) -> u8 {
        (self.rights >> 5 & 3) as u8
    }
}

/// Positions in [`Registers::segments`], as instruction information numbers them.
pub mod segment {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
    /// LDTR.
    pub const LDTR: usize = 6;
    /// TR.
    pub const TR: usize = 7;
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DescriptorTable {
    /// Base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
}

/// The registers of a processor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registers {
    /// General registers, RSP included; see [`gpr`].
    pub gprs: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// DR7.
    pub dr7: u64,
    /// The PDPTE registers of PAE paging.
    pub pdptes: [u64; 4],
    /// ES, CS, SS, DS, FS, GS, LDTR and TR; see [`segment`].
    pub segments: [Segment; 8],
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_STAR, IA32_LSTAR, IA32_CSTAR, IA32_FMASK.
    pub syscall: [u64; 4],
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
}

impl Registers {
    /// As after a boot into 64-bit mode at CPL 0, with 4-level paging from `cr3` and interrupts off.
    pub fn long_mode(cr3: u64) -> Self {
        let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
        let code = Segment { selector: 8, rights: 0xa09b, ..data };
        let task = Segment { selector: 0x18, base: 0, limit: 0x67, rights: 0x8b };
        let none = Segment { rights: Segment::UNUSABLE, ..Segment::default() };
        Self {
            gprs: [0; 16],
            rip: 0x1000,
            rflags: rflags::FIXED,
            cr0: cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG,
            cr2: 0,
            cr3,
            cr4: cr4::PAE,
            cr8: 0,
            dr7: 0x400,
            pdptes: [0; 4],
            segments: [data, code, data, data, data, data, none, task],
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            efer: efer::LME | efer::LMA | efer::NXE,
            pat: 0x0007_0406_0007_0406,
            debugctl: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            syscall: [0; 4],
            kernel_gs_base: 0,
            tsc_aux: 0,
        }
    }

    /// Current privilege level.
    #[inline]
    pub const fn cpl(&self) -> u8 {
        self.segments[segment::SS].dpl()
    }

    /// Whether the processor is in IA-32e mode.
    #[inline]
    pub const fn is_ia32e(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether the processor is in 64-bit mode.
    #[inline]
    pub const fn is_64bit(&self) -> bool {
        self.is_ia32e() && self.segments[segment::CS].rights & Segment::LONG != 0
    }

    /// Whether PAE paging is in use, so that the PDPTE registers count.
    #[inline]
    pub const fn is_pae(&self) -> bool {
        self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && !self.is_ia32e()
    }

    /// The PCID in use (SDM Vol. 3A, "Process-Context Identifiers (PCIDs)").
    #[inline]
    pub const fn pcid(&self) -> u16 {
        if self.cr4 & cr4::PCIDE != 0 { self.cr3 as u16 & 0xfff } else { 0 }
    }
}
