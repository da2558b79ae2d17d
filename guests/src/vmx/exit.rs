//! Answers: how did a VM entry end?

use vmx_defs::{ExitReason, Field, event::IntrInfo};
use vmx_hw::VmFail;

use super::vmcs;
use crate::suite::{Stop, reason};

/// A VM exit, with the information fields that most cases look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exit {
    /// Exit reason.
    pub reason: ExitReason,
    /// Exit qualification.
    pub qualification: u64,
    /// Guest RIP.
    pub rip: u64,
    /// VM-exit instruction length; has a meaning only for some reasons.
    pub length: u64,
    /// Guest-physical address; has a meaning only for EPT violations and misconfigurations.
    pub gpa: u64,
    /// Guest-linear address; has a meaning only for some reasons.
    pub gla: u64,
    /// VM-exit interruption information.
    pub interruption: IntrInfo,
}

impl Exit {
    /// Reads it from the current VMCS.
    pub fn read() -> Self {
        Self {
            reason: super::exit_reason(),
            qualification: vmcs::read(Field::EXIT_QUALIFICATION),
            rip: vmcs::read(Field::GUEST_RIP),
            length: vmcs::read(Field::EXIT_INSTRUCTION_LEN),
            gpa: vmcs::read(Field::GUEST_PHYSICAL_ADDRESS),
            gla: vmcs::read(Field::GUEST_LINEAR_ADDRESS),
            interruption: IntrInfo::from(vmcs::read(Field::EXIT_INTR_INFO) as u32),
        }
    }

    /// The vector, if the exit is due to an exception.
    pub fn exception(&self) -> Option<u8> {
        (self.reason == ExitReason::EXCEPTION_OR_NMI && self.interruption.valid())
            .then(|| self.interruption.vector())
    }
}

/// What a VM entry led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A VM exit, from L2 or instead of it (VM-entry failure).
    Exit(Exit),
    /// VMLAUNCH or VMRESUME failed; the number is the VM-instruction error field's (0 if invalid).
    VmFail(VmFail, u64),
}

impl Outcome {
    /// The exit; anything else fails the case.
    pub fn exit(self) -> Result<Exit, Stop> {
        match self {
            Self::Exit(exit) => Ok(exit),
            Self::VmFail(..) => Err(self.into()),
        }
    }
}

impl From<Outcome> for Stop {
    /// An outcome that a case did not expect fails it.
    fn from(outcome: Outcome) -> Self {
        Stop::Failed(match outcome {
            Outcome::Exit(exit) => reason(format_args!(
                "unexpected exit {:?}, qualification {:#x}, RIP {:#x}, GPA {:#x}, GLA {:#x}, \
                 event {:#x}",
                exit.reason,
                exit.qualification,
                exit.rip,
                exit.gpa,
                exit.gla,
                u32::from(exit.interruption)
            )),
            Outcome::VmFail(fail, error) => {
                reason(format_args!("VM entry failed: VMfail{fail:?}, error {error}"))
            }
        })
    }
}
