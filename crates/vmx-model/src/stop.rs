//! What can keep an instruction from completing?
//!
//! Instructions return early with a [`Stop`]; the one place that runs them turns it into an event
//! delivered through the IDT, a #VE, or a VM exit.

use vmx_defs::ept::EptViolation;
use vmx_defs::event::{IntrInfo, kind, vector};
use vmx_defs::{ExitReason, Gva};

use crate::addr::Gpa;
use crate::registers::rflags;

/// An exception, with its error code where the vector has one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Exception {
    pub(crate) vector: u8,
    pub(crate) error_code: Option<u32>,
    /// The linear address of a page fault.
    pub(crate) address: Option<Gva>,
}

impl Exception {
    pub(crate) const UD: Self = Self::new(vector::UD, None);
    pub(crate) const GP: Self = Self::new(vector::GP, Some(0));
    pub(crate) const VE: Self = Self::new(vector::VE, None);
    pub(crate) const DF: Self = Self::new(vector::DF, Some(0));

    pub(crate) const fn new(vector: u8, error_code: Option<u32>) -> Self {
        Self { vector, error_code, address: None }
    }
}

/// An event on its way through the IDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Event {
    /// Vector, type and whether there is an error code, in the format of the VMCS.
    pub(crate) info: IntrInfo,
    pub(crate) error_code: u32,
    /// Length of the instruction, for software events.
    pub(crate) length: u32,
    /// Bit 0 (EXT) of the error codes of faults that the delivery meets.
    pub(crate) external: bool,
    /// VM entry injected it.
    pub(crate) injected: bool,
}

impl Event {
    pub(crate) fn exception(exception: Exception) -> Self {
        Self {
            info: IntrInfo::exception(exception.vector, exception.error_code.is_some()),
            error_code: exception.error_code.unwrap_or(0),
            length: 0,
            external: true,
            injected: false,
        }
    }

    pub(crate) fn of_kind(kind: u8, vector: u8) -> Self {
        let info = IntrInfo::new().with_vector(vector).with_kind(kind).with_valid(true);
        Self { info, error_code: 0, length: 0, external: true, injected: false }
    }

    /// INT *n*, INT3 or INTO, and INT1, of this length.
    pub(crate) fn software(kind: u8, vector: u8, length: u32) -> Self {
        Self { length, external: false, ..Self::of_kind(kind, vector) }
    }

    /// RFLAGS as the event pushes it: RF is set for faults, and clear for what comes after an
    /// instruction (SDM Vol. 3B, "Instruction-Breakpoint Exception Condition"). VM entry pushes what
    /// it has loaded.
    pub(crate) fn flags(&self, flags: u64) -> u64 {
        // #DB is raised as a trap here, #DF is an abort.
        let fault = self.info.kind() == kind::HARDWARE_EXCEPTION
            && !matches!(self.info.vector(), vector::DB | vector::DF);
        match (self.injected, fault) {
            (false, true) => flags | rflags::RF,
            (false, false) if self.is_software() => flags & !rflags::RF,
            _ => flags,
        }
    }

    /// Whether the instruction length is part of the event.
    pub(crate) fn is_software(&self) -> bool {
        matches!(
            self.info.kind(),
            kind::SOFTWARE_INTERRUPT
                | kind::SOFTWARE_EXCEPTION
                | kind::PRIVILEGED_SOFTWARE_EXCEPTION
        )
    }
}

/// An EPT violation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Violation {
    pub(crate) gpa: Gpa,
    pub(crate) gva: Option<Gva>,
    pub(crate) qualification: EptViolation,
    /// Bit 63 of the entry that decides whether it is convertible.
    pub(crate) suppress_ve: bool,
}

/// What a VM exit reports. A field that is `None` is undefined for the exit: the VMCS keeps what it
/// has there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitInfo {
    pub(crate) reason: ExitReason,
    pub(crate) qualification: u64,
    pub(crate) interruption: Option<Event>,
    pub(crate) length: Option<u32>,
    pub(crate) instruction_info: Option<u32>,
    pub(crate) gva: Option<Gva>,
    pub(crate) gpa: Option<Gpa>,
}

impl ExitInfo {
    pub(crate) const fn new(reason: ExitReason) -> Self {
        Self {
            reason,
            qualification: 0,
            interruption: None,
            length: None,
            instruction_info: None,
            gva: None,
            gpa: None,
        }
    }

    pub(crate) const fn qualified(reason: ExitReason, qualification: u64) -> Self {
        Self { qualification, ..Self::new(reason) }
    }
}

/// Why an instruction does not complete.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stop {
    /// It raises an exception.
    Exception(Exception),
    /// It is INT *n*, INT3 or INT1: RIP is already past it where the event is delivered.
    Software(Event),
    /// An access met an EPT violation.
    Violation(Violation),
    /// An access met an EPT misconfiguration.
    Misconfiguration(Gpa),
    /// It causes a VM exit.
    Exit(ExitInfo),
}

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

/// Shorthand for what may stop.
pub(crate) type Flow<T = ()> = Result<T, Stop>;

/// A VM exit due to the instruction: for `?`.
pub(crate) fn exit<T>(info: ExitInfo) -> Flow<T> {
    Err(Stop::Exit(info))
}

/// An exception: for `?`.
pub(crate) fn fault<T>(exception: Exception) -> Flow<T> {
    Err(Stop::Exception(exception))
}
