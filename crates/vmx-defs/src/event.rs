//! How are events described: injected by VM entry, met at a VM exit, blocked in a guest?
//!
//! SDM Vol. 3C, "VM-Entry Controls for Event Injection", "Information for VM Exits Due to Vectored
//! Events", "Information for VM Exits That Occur During Event Delivery", "Guest Non-Register State".

use bitfield_struct::bitfield;
use bitflags::bitflags;

/// Event types of [`IntrInfo`] (bits 10:8).
pub mod kind {
    /// External interrupt.
    pub const EXTERNAL: u8 = 0;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// Hardware exception.
    pub const HARDWARE_EXCEPTION: u8 = 3;
    /// Software interrupt (INT *n*).
    pub const SOFTWARE_INTERRUPT: u8 = 4;
    /// Privileged software exception (INT1).
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u8 = 5;
    /// Software exception (INT3, INTO).
    pub const SOFTWARE_EXCEPTION: u8 = 6;
    /// Other event: the pending MTF exit.
    pub const OTHER: u8 = 7;
}

/// Exception vectors.
pub mod vector {
    /// Debug exception.
    pub const DB: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// Breakpoint.
    pub const BP: u8 = 3;
    /// Overflow.
    pub const OF: u8 = 4;
    /// Invalid opcode.
    pub const UD: u8 = 6;
    /// Device not available.
    pub const NM: u8 = 7;
    /// Double fault.
    pub const DF: u8 = 8;
    /// Invalid TSS.
    pub const TS: u8 = 10;
    /// Segment not present.
    pub const NP: u8 = 11;
    /// Stack fault.
    pub const SS: u8 = 12;
    /// General protection.
    pub const GP: u8 = 13;
    /// Page fault.
    pub const PF: u8 = 14;
    /// Alignment check.
    pub const AC: u8 = 17;
    /// Machine check.
    pub const MC: u8 = 18;
    /// Virtualization exception.
    pub const VE: u8 = 20;
    /// Control protection.
    pub const CP: u8 = 21;

    /// Whether the hardware exception `vector` pushes an error code in protected mode.
    pub const fn has_error_code(vector: u8) -> bool {
        matches!(vector, DF | TS | NP | SS | GP | PF | AC | CP)
    }
}

/// The interruption-information format: VM-entry interruption information, VM-exit interruption
/// information and IDT-vectoring information differ only in bits 12 and above.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IntrInfo {
    /// Vector of the event.
    pub vector: u8,
    /// Event type, of [`kind`].
    #[bits(3)]
    pub kind: u8,
    /// An error code is delivered, or was.
    pub has_error_code: bool,
    /// NMI unblocking due to IRET (VM-exit interruption information only).
    pub nmi_unblocking: bool,
    #[bits(18)]
    pub reserved: u32,
    /// The field holds an event.
    pub valid: bool,
}

impl IntrInfo {
    /// A hardware exception that VM entry is to deliver, with or without an error code.
    #[inline]
    pub const fn exception(vector: u8, error_code: bool) -> Self {
        Self::new()
            .with_vector(vector)
            .with_kind(kind::HARDWARE_EXCEPTION)
            .with_has_error_code(error_code)
            .with_valid(true)
    }
}

bitflags! {
    /// Guest interruptibility state.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Interruptibility: u32 {
        /// Blocking by STI.
        const STI = 1 << 0;
        /// Blocking by MOV SS.
        const MOV_SS = 1 << 1;
        /// Blocking by SMI.
        const SMI = 1 << 2;
        /// Blocking by NMI.
        const NMI = 1 << 3;
        /// Enclave interruption.
        const ENCLAVE = 1 << 4;
        const _ = !0;
    }
}

/// Guest activity states.
pub mod activity {
    /// Executing instructions.
    pub const ACTIVE: u32 = 0;
    /// Halted by HLT.
    pub const HLT: u32 = 1;
    /// In shutdown.
    pub const SHUTDOWN: u32 = 2;
    /// Waiting for a startup IPI.
    pub const WAIT_FOR_SIPI: u32 = 3;
}
