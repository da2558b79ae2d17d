//! A bare machine with an L1 that a test leads by hand.
#![allow(dead_code, reason = "each test crate uses a part")]

use vmx_defs::{ExitReason, Field, Hpa};
use vmx_model::program::{GuestMode, Setup, VmSetup};
use vmx_model::{
    Action, Delivered, Machine, ModelCaps, Operation, Outcome, Retention, Session, Step, layout,
};

/// Linear address of the guest's first data page.
pub(crate) const DATA: u64 = layout::DATA << 12;

pub(crate) fn machine(retention: Retention) -> Machine {
    machine_with(retention, &ModelCaps::default(), 1)
}

pub(crate) fn machine_with(retention: Retention, caps: &ModelCaps, processors: usize) -> Machine {
    Machine::new(caps, retention, layout::PAGES, (0..processors).map(layout::l1_registers))
}

/// One guest in both VMCSs, with VPID `vpid`.
pub(crate) fn setup(mode: GuestMode, vpid: u16) -> Setup {
    let vm = VmSetup { mode, vpid, ..VmSetup::default() };
    Setup { vms: [vm.clone(), vm], ..Setup::default() }
}

/// What the guest's data page `number` begins with in a view.
pub(crate) fn mark(view: usize, number: u64) -> u64 {
    layout::mark(layout::guest_data(view, number))
}

/// Where the last-level EPT entry of a guest-physical page of a view is.
pub(crate) fn leaf(view: usize, gpa_page: u64) -> u64 {
    layout::ept_table(view, 1) + 8 * gpa_page
}

pub(crate) trait Hand {
    fn load(&mut self, at: u64) -> u64;
    fn store(&mut self, at: u64, value: u64);
    fn exit_of(&mut self, operation: Operation) -> ExitReason;
    fn fault_of(&mut self, operation: Operation) -> Delivered;
    fn done(&mut self, operation: Operation) -> u64;
    fn switch(&mut self, index: u64);
    fn act(&mut self, action: Action);
    fn write(&mut self, at: u64, value: u64);
    fn word(&mut self, at: u64) -> u64;
    fn field(&mut self, field: Field) -> u64;
}

impl Hand for Session<'_, Machine> {
    fn load(&mut self, at: u64) -> u64 {
        self.done(Operation::Load { at, size: 8 })
    }

    fn store(&mut self, at: u64, value: u64) {
        self.done(Operation::Store { at, size: 8, value });
    }

    fn exit_of(&mut self, operation: Operation) -> ExitReason {
        match self.guest(0, operation) {
            Outcome::Exit(reason) => reason,
            other => panic!("{operation:x?}: {other:x?}"),
        }
    }

    fn fault_of(&mut self, operation: Operation) -> Delivered {
        match self.guest(0, operation) {
            Outcome::Delivered(delivered) => delivered,
            other => panic!("{operation:x?}: {other:x?}"),
        }
    }

    fn done(&mut self, operation: Operation) -> u64 {
        match self.guest(0, operation) {
            Outcome::Completed { value, .. } => value,
            other => panic!("{operation:x?}: {other:x?}"),
        }
    }

    fn switch(&mut self, index: u64) {
        self.done(Operation::Vmfunc { rax: 0, rcx: index });
    }

    fn act(&mut self, action: Action) {
        self.carry_out(&Step { processor: 0, action });
    }

    /// Behind the guest's back: no VM exit is needed.
    fn write(&mut self, at: u64, value: u64) {
        self.platform().memory.write_u64(Hpa::new(at), value);
    }

    fn word(&mut self, at: u64) -> u64 {
        self.platform().memory.read_u64(Hpa::new(at))
    }

    fn field(&mut self, field: Field) -> u64 {
        self.leave(0);
        self.read_field(0, field)
    }
}
