//! The engine on the model, with an L1 that a test leads by hand.
#![allow(dead_code, reason = "each test crate uses a part")]

use nvmx_testkit::caps::bare_caps;
use nvmx_testkit::{Nest, NestConfig};
use vmx_defs::{ExitReason, Field, L1Gpa};
use vmx_model::program::{GuestMode, Setup, VmSetup};
use vmx_model::{
    Action, Delivered, ModelCaps, Operation, Outcome, Platform, Retention, Session, Step, layout,
};

/// Linear address of the guest's first data page.
pub(crate) const DATA: u64 = layout::DATA << 12;

/// What the hardware below may keep.
pub(crate) const POLICIES: [Retention; 4] =
    [Retention::Everything, Retention::Random(1), Retention::Random(2), Retention::Nothing];

/// An L1 on the engine.
pub(crate) type L1<'a> = Session<'a, Nest>;

pub(crate) fn offered() -> ModelCaps {
    bare_caps(&ModelCaps::default())
}

/// One guest in both VMCSs, with VPID `vpid`.
pub(crate) fn setup(mode: GuestMode, vpid: u16) -> Setup {
    let vm = VmSetup { mode, vpid, ..VmSetup::default() };
    Setup { vms: [vm.clone(), vm], ..Setup::default() }
}

/// Runs a case on the engine.
pub(crate) fn on(retention: Retention, setup: &Setup, case: impl FnOnce(&mut L1<'_>)) {
    on_host(&NestConfig::default(), retention, setup, case);
}

/// The same on another host.
pub(crate) fn on_host(
    host: &NestConfig,
    retention: Retention,
    setup: &Setup,
    case: impl FnOnce(&mut L1<'_>),
) {
    let caps = offered();
    let mut nest = Nest::new(host, retention, setup.processors);
    case(&mut Session::new(&mut nest, &caps, setup));
}

/// What the guest's data page `number` begins with in a view.
pub(crate) fn mark(view: usize, number: u64) -> u64 {
    layout::mark(layout::guest_data(view, number))
}

/// Where the last-level EPT entry of a guest-physical page of a view is.
pub(crate) fn leaf(view: usize, gpa_page: u64) -> u64 {
    layout::ept_table(view, 1) + 8 * gpa_page
}

/// What a test does with an L1.
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
    fn set(&mut self, field: Field, value: u64);
    fn invept(&mut self, eptp: u64);
}

impl Hand for L1<'_> {
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

    /// Another processor of L1 writes: the guest goes on, and no VM exit comes between.
    fn write(&mut self, at: u64, value: u64) {
        self.platform().poke(L1Gpa::new(at), value);
    }

    fn word(&mut self, at: u64) -> u64 {
        self.platform().peek(L1Gpa::new(at))
    }

    fn field(&mut self, field: Field) -> u64 {
        self.leave(0);
        self.read_field(0, field)
    }

    fn set(&mut self, field: Field, value: u64) {
        self.act(Action::SetField(field, value));
    }

    fn invept(&mut self, eptp: u64) {
        self.act(Action::Invept { kind: 1, eptp });
    }
}
