//! Which VMCS fields exist, and what is each one's encoding, width and kind?
//!
//! One table, from which names, constants and look-ups follow (SDM Vol. 3C, "VMCS Component
//! Encoding" and Appendix B, "Field Encoding in VMCS").

use core::fmt;

/// Width of a VMCS field (bits 14:13 of its encoding).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    /// 16 bits.
    W16,
    /// 64 bits; bits 63:32 can also be accessed alone, through the encoding with bit 0 set.
    W64,
    /// 32 bits.
    W32,
    /// 64 bits on processors with Intel 64 architecture, accessed as 32 outside 64-bit mode.
    Natural,
}

impl Width {
    /// The bits of a 64-bit value that a field of this width keeps.
    #[inline]
    pub const fn mask(self) -> u64 {
        match self {
            Width::W16 => 0xffff,
            Width::W32 => 0xffff_ffff,
            Width::W64 | Width::Natural => u64::MAX,
        }
    }
}

/// Kind of a VMCS field (bits 11:10 of its encoding).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A VM-execution, VM-exit or VM-entry control field.
    Control,
    /// VM-exit information; written by VMWRITE only where IA32_VMX_MISC bit 29 is set.
    ReadOnly,
    /// Guest state.
    Guest,
    /// Host state.
    Host,
}

/// Number of slots that [`Field::slot`] can name.
pub const SLOTS: usize = 512;

/// A VMCS field that exists in the architecture, named by its full-access encoding.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Field(u32);

impl Field {
    /// The field with this encoding, if it is in [`FIELDS`]. The *high* encoding of a 64-bit field
    /// is not a field of its own; see [`Component::decode`].
    #[inline]
    pub const fn from_encoding(encoding: u32) -> Option<Self> {
        // Bits 31:15 and 12 are reserved and must be 0; indexes above 31 are not used by any field
        // of the table, and the slot could not hold them.
        if encoding & !0x6c3e != 0 {
            return None;
        }
        let field = Self(encoding);
        let slot = field.slot();
        #[allow(clippy::indexing_slicing, reason = "slot() / 64 < 8 by its mask; const context")]
        if EXISTS[slot / 64] & 1 << (slot % 64) != 0 { Some(field) } else { None }
    }

    /// The encoding as VMREAD and VMWRITE take it.
    #[inline]
    pub const fn encoding(self) -> u32 {
        self.0
    }

    /// Width of the field.
    #[inline]
    pub const fn width(self) -> Width {
        match self.0 >> 13 & 3 {
            0 => Width::W16,
            1 => Width::W64,
            2 => Width::W32,
            _ => Width::Natural,
        }
    }

    /// Kind of the field.
    #[inline]
    pub const fn kind(self) -> Kind {
        match self.0 >> 10 & 3 {
            0 => Kind::Control,
            1 => Kind::ReadOnly,
            2 => Kind::Guest,
            _ => Kind::Host,
        }
    }

    /// The index part (bits 9:1) of the encoding.
    #[inline]
    pub const fn index(self) -> u32 {
        self.0 >> 1 & 0x1ff
    }

    /// A number below [`SLOTS`] that is different for each field: kind, width and index packed.
    /// Where a table of all fields is kept, this is the position in it, without a search.
    #[inline]
    pub const fn slot(self) -> usize {
        ((self.0 >> 10 & 3) << 7 | (self.0 >> 13 & 3) << 5 | (self.0 >> 1 & 31)) as usize
    }

    /// The field that has this [`Self::slot`], if there is one.
    #[inline]
    pub const fn from_slot(slot: usize) -> Option<Self> {
        if slot >= SLOTS {
            return None;
        }
        let slot = slot as u32;
        Self::from_encoding((slot >> 7 & 3) << 10 | (slot >> 5 & 3) << 13 | (slot & 31) << 1)
    }

    /// Name of the field, as in the SDM's Appendix B.
    pub fn name(self) -> &'static str {
        FIELDS.iter().find(|(field, _)| *field == self).map_or("unknown field", |(_, name)| name)
    }
}

impl fmt::Debug for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#06x})", self.name(), self.0)
    }
}

/// What an operand of VMREAD or VMWRITE names: a field, whole or its upper half.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Component {
    /// The field.
    pub field: Field,
    /// Whether the access type (bit 0 of the encoding) is *high*: bits 63:32 of a 64-bit field.
    pub high: bool,
}

impl Component {
    /// Decodes the 64-bit register operand of VMREAD or VMWRITE. `None` where no field of the
    /// architecture has this encoding, or a high access is asked of a field that is not 64 bits
    /// wide (SDM Vol. 3C, "VMCS Component Encoding").
    #[inline]
    pub const fn decode(operand: u64) -> Option<Self> {
        if operand >> 32 != 0 {
            return None;
        }
        let high = operand & 1 != 0;
        match Field::from_encoding(operand as u32 & !1) {
            Some(field) if !high || matches!(field.width(), Width::W64) => {
                Some(Self { field, high })
            }
            _ => None,
        }
    }
}

const fn exists() -> [u64; SLOTS / 64] {
    let mut map = [0; SLOTS / 64];
    let mut i = 0;
    #[allow(clippy::indexing_slicing, reason = "evaluated at compile time")]
    while i < FIELDS.len() {
        let slot = FIELDS[i].0.slot();
        assert!(map[slot / 64] & 1 << (slot % 64) == 0, "two fields share a slot");
        map[slot / 64] |= 1 << (slot % 64);
        i += 1;
    }
    map
}

static EXISTS: [u64; SLOTS / 64] = const { exists() };

macro_rules! fields {
    ($($name:ident = $encoding:literal, $text:literal;)*) => {
        impl Field {
            $(
                #[doc = concat!($text, " (", stringify!($encoding), ").")]
                pub const $name: Field = Field($encoding);
            )*
        }

        /// Every field of the table with its SDM name, in order of encoding.
        pub const FIELDS: &[(Field, &str)] = &[$((Field($encoding), $text)),*];
    };
}

fields! {
    VPID = 0x0000, "Virtual-processor identifier";
    POSTED_INTERRUPT_VECTOR = 0x0002, "Posted-interrupt notification vector";
    EPTP_INDEX = 0x0004, "EPTP index";
    GUEST_ES_SELECTOR = 0x0800, "Guest ES selector";
    GUEST_CS_SELECTOR = 0x0802, "Guest CS selector";
    GUEST_SS_SELECTOR = 0x0804, "Guest SS selector";
    GUEST_DS_SELECTOR = 0x0806, "Guest DS selector";
    GUEST_FS_SELECTOR = 0x0808, "Guest FS selector";
    GUEST_GS_SELECTOR = 0x080a, "Guest GS selector";
    GUEST_LDTR_SELECTOR = 0x080c, "Guest LDTR selector";
    GUEST_TR_SELECTOR = 0x080e, "Guest TR selector";
    GUEST_INTERRUPT_STATUS = 0x0810, "Guest interrupt status";
    PML_INDEX = 0x0812, "PML index";
    HOST_ES_SELECTOR = 0x0c00, "Host ES selector";
    HOST_CS_SELECTOR = 0x0c02, "Host CS selector";
    HOST_SS_SELECTOR = 0x0c04, "Host SS selector";
    HOST_DS_SELECTOR = 0x0c06, "Host DS selector";
    HOST_FS_SELECTOR = 0x0c08, "Host FS selector";
    HOST_GS_SELECTOR = 0x0c0a, "Host GS selector";
    HOST_TR_SELECTOR = 0x0c0c, "Host TR selector";
    IO_BITMAP_A = 0x2000, "Address of I/O bitmap A";
    IO_BITMAP_B = 0x2002, "Address of I/O bitmap B";
    MSR_BITMAP = 0x2004, "Address of MSR bitmaps";
    EXIT_MSR_STORE_ADDR = 0x2006, "VM-exit MSR-store address";
    EXIT_MSR_LOAD_ADDR = 0x2008, "VM-exit MSR-load address";
    ENTRY_MSR_LOAD_ADDR = 0x200a, "VM-entry MSR-load address";
    EXECUTIVE_VMCS_POINTER = 0x200c, "Executive-VMCS pointer";
    PML_ADDRESS = 0x200e, "PML address";
    TSC_OFFSET = 0x2010, "TSC offset";
    VIRTUAL_APIC_ADDR = 0x2012, "Virtual-APIC address";
    APIC_ACCESS_ADDR = 0x2014, "APIC-access address";
    POSTED_INTERRUPT_DESC_ADDR = 0x2016, "Posted-interrupt descriptor address";
    VM_FUNCTION_CONTROLS = 0x2018, "VM-function controls";
    EPT_POINTER = 0x201a, "EPT pointer";
    EOI_EXIT_BITMAP_0 = 0x201c, "EOI-exit bitmap 0";
    EOI_EXIT_BITMAP_1 = 0x201e, "EOI-exit bitmap 1";
    EOI_EXIT_BITMAP_2 = 0x2020, "EOI-exit bitmap 2";
    EOI_EXIT_BITMAP_3 = 0x2022, "EOI-exit bitmap 3";
    EPTP_LIST_ADDRESS = 0x2024, "EPTP-list address";
    VMREAD_BITMAP = 0x2026, "VMREAD-bitmap address";
    VMWRITE_BITMAP = 0x2028, "VMWRITE-bitmap address";
    VE_INFORMATION_ADDR = 0x202a, "Virtualization-exception information address";
    XSS_EXITING_BITMAP = 0x202c, "XSS-exiting bitmap";
    ENCLS_EXITING_BITMAP = 0x202e, "ENCLS-exiting bitmap";
    SPP_TABLE_POINTER = 0x2030, "Sub-page-permission-table pointer";
    TSC_MULTIPLIER = 0x2032, "TSC multiplier";
    GUEST_PHYSICAL_ADDRESS = 0x2400, "Guest-physical address";
    VMCS_LINK_POINTER = 0x2800, "VMCS link pointer";
    GUEST_DEBUGCTL = 0x2802, "Guest IA32_DEBUGCTL";
    GUEST_PAT = 0x2804, "Guest IA32_PAT";
    GUEST_EFER = 0x2806, "Guest IA32_EFER";
    GUEST_PERF_GLOBAL_CTRL = 0x2808, "Guest IA32_PERF_GLOBAL_CTRL";
    GUEST_PDPTE0 = 0x280a, "Guest PDPTE0";
    GUEST_PDPTE1 = 0x280c, "Guest PDPTE1";
    GUEST_PDPTE2 = 0x280e, "Guest PDPTE2";
    GUEST_PDPTE3 = 0x2810, "Guest PDPTE3";
    GUEST_BNDCFGS = 0x2812, "Guest IA32_BNDCFGS";
    GUEST_RTIT_CTL = 0x2814, "Guest IA32_RTIT_CTL";
    HOST_PAT = 0x2c00, "Host IA32_PAT";
    HOST_EFER = 0x2c02, "Host IA32_EFER";
    HOST_PERF_GLOBAL_CTRL = 0x2c04, "Host IA32_PERF_GLOBAL_CTRL";
    PIN_CTLS = 0x4000, "Pin-based VM-execution controls";
    PROC_CTLS = 0x4002, "Primary processor-based VM-execution controls";
    EXCEPTION_BITMAP = 0x4004, "Exception bitmap";
    PF_ERROR_MASK = 0x4006, "Page-fault error-code mask";
    PF_ERROR_MATCH = 0x4008, "Page-fault error-code match";
    CR3_TARGET_COUNT = 0x400a, "CR3-target count";
    EXIT_CTLS = 0x400c, "Primary VM-exit controls";
    EXIT_MSR_STORE_COUNT = 0x400e, "VM-exit MSR-store count";
    EXIT_MSR_LOAD_COUNT = 0x4010, "VM-exit MSR-load count";
    ENTRY_CTLS = 0x4012, "VM-entry controls";
    ENTRY_MSR_LOAD_COUNT = 0x4014, "VM-entry MSR-load count";
    ENTRY_INTR_INFO = 0x4016, "VM-entry interruption-information field";
    ENTRY_EXCEPTION_ERROR = 0x4018, "VM-entry exception error code";
    ENTRY_INSTRUCTION_LEN = 0x401a, "VM-entry instruction length";
    TPR_THRESHOLD = 0x401c, "TPR threshold";
    PROC_CTLS2 = 0x401e, "Secondary processor-based VM-execution controls";
    PLE_GAP = 0x4020, "PLE_Gap";
    PLE_WINDOW = 0x4022, "PLE_Window";
    VM_INSTRUCTION_ERROR = 0x4400, "VM-instruction error";
    EXIT_REASON = 0x4402, "Exit reason";
    EXIT_INTR_INFO = 0x4404, "VM-exit interruption information";
    EXIT_INTR_ERROR = 0x4406, "VM-exit interruption error code";
    IDT_VECTORING_INFO = 0x4408, "IDT-vectoring information field";
    IDT_VECTORING_ERROR = 0x440a, "IDT-vectoring error code";
    EXIT_INSTRUCTION_LEN = 0x440c, "VM-exit instruction length";
    EXIT_INSTRUCTION_INFO = 0x440e, "VM-exit instruction information";
    GUEST_ES_LIMIT = 0x4800, "Guest ES limit";
    GUEST_CS_LIMIT = 0x4802, "Guest CS limit";
    GUEST_SS_LIMIT = 0x4804, "Guest SS limit";
    GUEST_DS_LIMIT = 0x4806, "Guest DS limit";
    GUEST_FS_LIMIT = 0x4808, "Guest FS limit";
    GUEST_GS_LIMIT = 0x480a, "Guest GS limit";
    GUEST_LDTR_LIMIT = 0x480c, "Guest LDTR limit";
    GUEST_TR_LIMIT = 0x480e, "Guest TR limit";
    GUEST_GDTR_LIMIT = 0x4810, "Guest GDTR limit";
    GUEST_IDTR_LIMIT = 0x4812, "Guest IDTR limit";
    GUEST_ES_AR = 0x4814, "Guest ES access rights";
    GUEST_CS_AR = 0x4816, "Guest CS access rights";
    GUEST_SS_AR = 0x4818, "Guest SS access rights";
    GUEST_DS_AR = 0x481a, "Guest DS access rights";
    GUEST_FS_AR = 0x481c, "Guest FS access rights";
    GUEST_GS_AR = 0x481e, "Guest GS access rights";
    GUEST_LDTR_AR = 0x4820, "Guest LDTR access rights";
    GUEST_TR_AR = 0x4822, "Guest TR access rights";
    GUEST_INTERRUPTIBILITY = 0x4824, "Guest interruptibility state";
    GUEST_ACTIVITY = 0x4826, "Guest activity state";
    GUEST_SMBASE = 0x4828, "Guest SMBASE";
    GUEST_SYSENTER_CS = 0x482a, "Guest IA32_SYSENTER_CS";
    PREEMPTION_TIMER = 0x482e, "VMX-preemption timer value";
    HOST_SYSENTER_CS = 0x4c00, "Host IA32_SYSENTER_CS";
    CR0_MASK = 0x6000, "CR0 guest/host mask";
    CR4_MASK = 0x6002, "CR4 guest/host mask";
    CR0_SHADOW = 0x6004, "CR0 read shadow";
    CR4_SHADOW = 0x6006, "CR4 read shadow";
    CR3_TARGET0 = 0x6008, "CR3-target value 0";
    CR3_TARGET1 = 0x600a, "CR3-target value 1";
    CR3_TARGET2 = 0x600c, "CR3-target value 2";
    CR3_TARGET3 = 0x600e, "CR3-target value 3";
    EXIT_QUALIFICATION = 0x6400, "Exit qualification";
    IO_RCX = 0x6402, "I/O RCX";
    IO_RSI = 0x6404, "I/O RSI";
    IO_RDI = 0x6406, "I/O RDI";
    IO_RIP = 0x6408, "I/O RIP";
    GUEST_LINEAR_ADDRESS = 0x640a, "Guest-linear address";
    GUEST_CR0 = 0x6800, "Guest CR0";
    GUEST_CR3 = 0x6802, "Guest CR3";
    GUEST_CR4 = 0x6804, "Guest CR4";
    GUEST_ES_BASE = 0x6806, "Guest ES base";
    GUEST_CS_BASE = 0x6808, "Guest CS base";
    GUEST_SS_BASE = 0x680a, "Guest SS base";
    GUEST_DS_BASE = 0x680c, "Guest DS base";
    GUEST_FS_BASE = 0x680e, "Guest FS base";
    GUEST_GS_BASE = 0x6810, "Guest GS base";
    GUEST_LDTR_BASE = 0x6812, "Guest LDTR base";
    GUEST_TR_BASE = 0x6814, "Guest TR base";
    GUEST_GDTR_BASE = 0x6816, "Guest GDTR base";
    GUEST_IDTR_BASE = 0x6818, "Guest IDTR base";
    GUEST_DR7 = 0x681a, "Guest DR7";
    GUEST_RSP = 0x681c, "Guest RSP";
    GUEST_RIP = 0x681e, "Guest RIP";
    GUEST_RFLAGS = 0x6820, "Guest RFLAGS";
    GUEST_PENDING_DEBUG = 0x6822, "Guest pending debug exceptions";
    GUEST_SYSENTER_ESP = 0x6824, "Guest IA32_SYSENTER_ESP";
    GUEST_SYSENTER_EIP = 0x6826, "Guest IA32_SYSENTER_EIP";
    HOST_CR0 = 0x6c00, "Host CR0";
    HOST_CR3 = 0x6c02, "Host CR3";
    HOST_CR4 = 0x6c04, "Host CR4";
    HOST_FS_BASE = 0x6c06, "Host FS base";
    HOST_GS_BASE = 0x6c08, "Host GS base";
    HOST_TR_BASE = 0x6c0a, "Host TR base";
    HOST_GDTR_BASE = 0x6c0c, "Host GDTR base";
    HOST_IDTR_BASE = 0x6c0e, "Host IDTR base";
    HOST_SYSENTER_ESP = 0x6c10, "Host IA32_SYSENTER_ESP";
    HOST_SYSENTER_EIP = 0x6c12, "Host IA32_SYSENTER_EIP";
    HOST_RSP = 0x6c14, "Host RSP";
    HOST_RIP = 0x6c16, "Host RIP";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_unique_and_encodings_ascend_within_the_table() {
        for (field, _) in FIELDS {
            assert!(field.slot() < SLOTS);
            assert_eq!(Field::from_encoding(field.encoding()), Some(*field));
            assert_eq!(Field::from_slot(field.slot()), Some(*field));
            assert_eq!(field.encoding() & 1, 0, "full access");
        }
        assert_eq!((0..SLOTS + 9).filter_map(Field::from_slot).count(), FIELDS.len());
        assert!(FIELDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn every_other_encoding_is_refused() {
        let known = |e: u32| FIELDS.iter().any(|(field, _)| field.encoding() == e);
        for encoding in 0..0x2_0000 {
            assert_eq!(Field::from_encoding(encoding).is_some(), known(encoding), "{encoding:#x}");
        }
        for bit in 15..32 {
            assert_eq!(Field::from_encoding(Field::GUEST_RIP.encoding() | 1 << bit), None);
        }
    }

    #[test]
    fn high_access_is_for_64_bit_fields_only() {
        for (field, _) in FIELDS {
            let high = Component::decode(u64::from(field.encoding()) | 1);
            assert_eq!(high.is_some(), field.width() == Width::W64, "{field:?}");
            assert_eq!(Component::decode(u64::from(field.encoding()) | 1 << 32), None);
        }
    }
}
