//! Answers: does each control that the capability MSRs offer do what it says?
//!
//! For every bit of the pin-based, processor-based, exit and entry controls there is a case that
//! sees L2 behave otherwise with it than without it. A control that is not offered skips its cases.

pub mod alternate;
pub mod apic_access;
pub mod bitmaps;
pub mod control_registers;
pub mod delivery;
pub mod events;
pub mod instructions;
pub mod modes;
pub mod state;
pub mod unseen;

use vmx_defs::{
    EntryCtls, ExitCtls, ExitReason, Field, PinCtls, ProcCtls, ProcCtls2,
    msr::{Allowed, EptVpidCap},
};

use crate::{
    ensure_eq, skip,
    suite::{Ctx, Stop, Verdict},
    vmx::{Exit, Mode, Vm, Vmx, vmcs},
};

/// A control by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Control {
    /// Pin-based.
    Pin(PinCtls),
    /// Primary processor-based.
    Proc(ProcCtls),
    /// Secondary processor-based.
    Proc2(ProcCtls2),
    /// VM-exit.
    Exit(ExitCtls),
    /// VM-entry.
    Entry(EntryCtls),
}

impl Control {
    fn place(self, vmx: &Vmx) -> (Field, u32, Allowed) {
        let caps = &vmx.caps;
        match self {
            Self::Pin(bits) => (Field::PIN_CTLS, bits.bits(), caps.pin),
            Self::Proc(bits) => (Field::PROC_CTLS, bits.bits(), caps.proc),
            Self::Proc2(bits) => (Field::PROC_CTLS2, bits.bits(), caps.proc2),
            Self::Exit(bits) => (Field::EXIT_CTLS, bits.bits(), caps.exit),
            Self::Entry(bits) => (Field::ENTRY_CTLS, bits.bits(), caps.entry),
        }
    }
}

/// L2 in 64-bit mode, ready to run.
pub struct Stage {
    /// VMX operation.
    pub vmx: Vmx,
    /// L2, whose VMCS is current.
    pub vm: Vm,
}

impl Stage {
    /// Enters VMX operation and sets L2 up.
    pub fn new(ctx: &mut Ctx<'_>) -> Result<Self, Stop> {
        let vmx = Vmx::on(ctx)?;
        let vm = Vm::new(ctx, &vmx, Mode::Long)?;
        Ok(Self { vmx, vm })
    }

    /// Sets controls, or skips the case.
    pub fn set(&self, control: Control) -> Verdict {
        let (field, bits, allowed) = control.place(&self.vmx);
        if allowed.may_be_1 & bits != bits {
            skip!("{control:?} not offered");
        }
        vmcs::change(field, bits.into(), 0);
        Ok(())
    }

    /// Clears controls, or skips the case where they can't be 0.
    pub fn clear(&self, control: Control) -> Verdict {
        let (field, bits, allowed) = control.place(&self.vmx);
        if allowed.must_be_1 & bits != 0 {
            skip!("{control:?} can't be 0");
        }
        vmcs::change(field, 0, bits.into());
        Ok(())
    }

    /// Skips the case without these EPT and VPID capabilities.
    pub fn need(&self, caps: EptVpidCap) -> Verdict {
        if !self.vmx.caps.ept.contains(caps) {
            skip!("{caps:?} not offered");
        }
        Ok(())
    }

    /// L2 executes from `start`; the next exit, whatever it is.
    pub fn exit_from(&mut self, start: u64) -> Result<Exit, Stop> {
        vmcs::write(Field::GUEST_RIP, start);
        self.vm.run().exit()
    }

    /// L2 executes from `start`; the exit must be for this reason, at `start`, with this length.
    pub fn intercepted(
        &mut self,
        start: u64,
        reason: ExitReason,
        length: u64,
    ) -> Result<Exit, Stop> {
        let exit = self.exit_from(start)?;
        ensure_eq!(exit.reason, reason, "exit reason");
        ensure_eq!(exit.rip, start, "RIP");
        ensure_eq!(exit.length, length, "instruction length");
        Ok(exit)
    }

    /// L2 executes from `start` up to its VMCALL, which comes next.
    pub fn passes(&mut self, start: u64) -> Verdict {
        self.vm.exec_at(start)?;
        Ok(())
    }

    /// L2 executes from `start`, where it must raise this exception, which exits.
    pub fn raises(&mut self, start: u64, vector: u8) -> Result<Exit, Stop> {
        let exit = self.exit_from(start)?;
        ensure_eq!(exit.exception(), Some(vector), "vector (exit reason {:?})", exit.reason);
        ensure_eq!(exit.rip, start, "RIP");
        Ok(exit)
    }

    /// Without `control` the code at `start` runs to its VMCALL; with it, it exits at once.
    pub fn both_ways(
        &mut self,
        control: Control,
        start: u64,
        reason: ExitReason,
        length: u64,
    ) -> Result<Exit, Stop> {
        self.clear(control)?;
        self.passes(start)?;
        self.set(control)?;
        let exit = self.intercepted(start, reason, length)?;
        self.clear(control)?;
        self.passes(start)?;
        self.set(control)?;
        ensure_eq!(self.intercepted(start, reason, length)?, exit, "the same exit again");
        Ok(exit)
    }
}

/// The VM-exit instruction-information field.
pub fn instruction_information() -> u32 {
    vmcs::read(Field::EXIT_INSTRUCTION_INFO) as u32
}
