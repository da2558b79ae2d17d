//! What is a program?
//!
//! A machine to run on and a sequence of steps, each of L1 or of its guest on one processor. Steps
//! are made to make sense wherever they stand, so that any subset of a program's steps is a program:
//! a step of the guest where L1 runs is preceded by a VM entry, a step of L1 where the guest runs by
//! a VMCALL of the guest.

use vmx_defs::Field;
use vmx_defs::controls::ProcCtls;

use crate::layout::{VIEWS, VMS};
use crate::operation::Operation;

/// How a guest pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestMode {
    /// 4-level paging, 64-bit mode.
    Long,
    /// PAE paging.
    Pae,
    /// 32-bit paging.
    Bits32,
    /// None; needs EPT and an unrestricted guest.
    Unpaged,
}

/// A guest of L1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmSetup {
    /// How it pages at first.
    pub mode: GuestMode,
    /// Its VPID; 0 is "enable VPID" 0.
    pub vpid: u16,
    /// The EPT that it begins with; `None` is without EPT.
    pub view: Option<usize>,
    /// Exception bitmap.
    pub exceptions: u32,
    /// Exits that L1 asks for besides.
    pub exits: ProcCtls,
    /// Bits of CR4 besides those that the mode needs.
    pub cr4: u64,
}

impl Default for VmSetup {
    /// A guest in 64-bit mode with VPID 1 and the first view.
    fn default() -> Self {
        Self {
            mode: GuestMode::Long,
            vpid: 1,
            view: Some(0),
            exceptions: 0,
            exits: ProcCtls::empty(),
            cr4: 0,
        }
    }
}

/// What a program runs on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setup {
    /// Number of processors.
    pub processors: usize,
    /// The guests. Each processor has a VMCS of its own for each.
    pub vms: [VmSetup; VMS],
    /// Accessed and dirty flags in the EPTP of each view.
    pub accessed_dirty: [bool; VIEWS],
    /// EPT-violation #VE, where it is offered.
    pub ve: bool,
    /// Bit 63 of the last-level entries of EPT at first.
    pub suppress_ve: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            processors: 1,
            vms: Default::default(),
            accessed_dirty: [false; VIEWS],
            ve: false,
            suppress_ve: true,
        }
    }
}

/// What a step does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// The guest executes an operation.
    Guest(Operation),
    /// L1 executes an operation.
    L1(Operation),
    /// L1 writes 8 bytes of its physical memory, through its identity mapping.
    Write {
        /// Where.
        at: u64,
        /// What.
        value: u64,
    },
    /// L1 writes a field of the current VMCS.
    SetField(Field, u64),
    /// L1 makes the VMCS of another of its guests current.
    Switch(usize),
    /// L1 clears the current VMCS and makes it current again.
    Clear,
    /// L1 executes INVEPT.
    Invept {
        /// The type.
        kind: u64,
        /// The EPTP of the descriptor.
        eptp: u64,
    },
    /// L1 executes INVVPID.
    Invvpid {
        /// The type.
        kind: u64,
        /// The VPID of the descriptor.
        vpid: u16,
        /// The linear address of the descriptor.
        address: u64,
    },
    /// The guest executes INVPCID.
    Invpcid {
        /// The type.
        kind: u64,
        /// The PCID of the descriptor.
        pcid: u16,
        /// The linear address of the descriptor.
        address: u64,
    },
    /// L1 enters its guest, or does nothing where that runs.
    Enter,
    /// An L1 that runs leaves nothing; a guest that runs executes VMCALL.
    Leave,
}

/// One step on one processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// The processor's number.
    pub processor: usize,
    /// What it does.
    pub action: Action,
}

/// A program.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Program {
    /// What it runs on.
    pub setup: Setup,
    /// What it does.
    pub steps: Vec<Step>,
}
