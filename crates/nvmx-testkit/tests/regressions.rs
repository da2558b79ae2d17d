//! What has random programs found, and does it stay mended?
//!
//! Programs as they were shrunk, each run under every policy of the caches and on hosts of several
//! kinds. The names say what was wrong.

use nvmx_testkit::{Case, Leaves, NestConfig};
use vmx_defs::Field;
use vmx_defs::event::vector;
use vmx_defs::msr::EptVpidCap;
use vmx_model::generate::{Invalidation, Profile};
use vmx_model::program::{GuestMode, VmSetup};

use vmx_model::{Action, Operation, Program, Retention, Setup, Step, layout};

/// A load of 8 bytes by the guest.
const fn load(at: u64) -> Action {
    Action::Guest(Operation::Load { at, size: 8 })
}

const fn switch(view: u64) -> Action {
    Action::Guest(Operation::Vmfunc { rax: 0, rcx: view })
}

/// The actions on the first processor.
fn program(setup: Setup, actions: &[Action]) -> Program {
    let step = |action: &Action| Step { processor: 0, action: *action };
    Program { setup, steps: actions.iter().map(step).collect() }
}

/// The program holds, be its L1 one that invalidates enough or not.
fn holds(invalidation: Invalidation, program: &Program) {
    let profile = Profile { invalidation, ..Profile::default() };
    for config in [NestConfig::default(), NestConfig::random(1), NestConfig::random(2)] {
        for retention in [Retention::Everything, Retention::Random(1), Retention::Nothing] {
            let case = Case { seed: 0, profile, retention, config: config.clone() };
            if let Err(failure) = case.try_program(program) {
                panic!("{retention:?} {config}\n{program:#x?}\n{failure:#x?}");
            }
        }
    }
}

#[test]
fn a_page_fault_of_an_operand_leaves_nothing_cached_for_its_address() {
    // L1's tables are gone after the exit, but not from its TLB.
    let program = program(
        Setup::default(),
        &[
            Action::SetField(Field::HOST_CR3, 0x20),
            load(0x2_1008),
            Action::Invept { kind: 1, eptp: 0x5_401e },
            Action::Invept { kind: 1, eptp: 0x5_805e },
        ],
    );
    holds(Invalidation::Careless, &program);
}

#[test]
fn an_exit_due_to_a_fault_that_l0_raised_saves_rf() {
    let guest = VmSetup { exceptions: 1 << vector::GP, ..VmSetup::default() };
    let setup = Setup { vms: [guest, VmSetup::default()], ..Setup::default() };
    let program = program(setup, &[Action::Guest(Operation::Rdmsr(0x1234))]);
    holds(Invalidation::Sufficient, &program);
}

#[test]
fn flags_set_on_a_stale_path_that_no_value_tells_of_are_allowed() {
    let setup = Setup {
        vms: [VmSetup { view: Some(2), ..VmSetup::default() }, VmSetup::default()],
        suppress_ve: false,
        ..Setup::default()
    };
    let program = program(
        setup,
        &[
            Action::Guest(Operation::Fetch { at: 0x2_2000 }),
            switch(5),
            load(0x2_1000),
            switch(2),
            // The third view's page table becomes the second's.
            Action::Write { at: 0x5_a000, value: 1 << 63 | 0x5_7007 },
            load(0x2_1ffc),
        ],
    );
    holds(Invalidation::Careless, &program);
}

#[test]
fn an_entry_that_has_to_wait_for_frames_is_tried_again() {
    // All frames are the other processor's, until it exits.
    let setup = Setup { processors: 2, ..Setup::default() };
    let mut steps = Vec::new();
    for (processor, views) in [(0, &[5, 0, 2, 3][..]), (1, &[1, 0])] {
        for view in views {
            for action in [switch(*view), load(0x20_5008), load(0x2_2000)] {
                steps.push(Step { processor, action });
            }
        }
        steps.push(Step { processor: 0, action: Action::Leave });
    }
    steps.push(Step { processor: 0, action: load(0x2_8000) });
    let program = Program { setup, steps };
    let profile = Profile { invalidation: Invalidation::Sufficient, ..Profile::default() };
    for leaves in [Leaves::Small, Leaves::Huge] {
        let config = NestConfig { leaves, ..NestConfig::scarce() };
        let case = Case { seed: 0, profile, retention: Retention::Everything, config };
        assert!(case.try_program(&program).is_ok());
    }
}

#[test]
fn advanced_information_of_the_processor_is_not_told_to_l1() {
    let mut config = NestConfig::default();
    config.hardware.ept_vpid |= EptVpidCap::ADVANCED_EXIT_INFO;
    let entry = layout::ept_table(0, 1) + 8 * 0x25;
    let actions = [Action::Write { at: entry, value: 0 }, load(0x2_5000)];
    let program = program(Setup::default(), &actions);
    let profile = Profile { invalidation: Invalidation::Sufficient, ..Profile::default() };
    let case = Case { seed: 0, profile, retention: Retention::Nothing, config };
    if let Err(failure) = case.try_program(&program) {
        panic!("{failure:#x?}");
    }
}

#[test]
fn a_fault_in_real_mode_has_no_error_code_when_it_is_delivered_again_or_exits() {
    const PROTECTED: u64 = 1;
    for exceptions in [0, 1 << vector::GP] {
        let mode = GuestMode::Unpaged;
        let guest = VmSetup { mode, exceptions, vpid: 0, view: Some(3), ..VmSetup::default() };
        let setup = Setup { vms: [guest, VmSetup::default()], ..Setup::default() };
        let real = Operation::MovToCr { register: 0, value: 0x6001_003a & !PROTECTED };
        // A value with reserved bits, of a register that L0 keeps to itself, and of one that it does
        // not.
        for index in [0xc000_0080, 0x1234] {
            let wrong = Operation::Wrmsr { index, value: 0x4_a86a };
            let actions = [real, wrong, wrong].map(Action::Guest);
            holds(Invalidation::Sufficient, &program(setup.clone(), &actions));
        }
    }
}

#[test]
fn tables_beyond_ram_have_entries_of_ones() {
    let program = program(
        Setup::default(),
        &[
            Action::SetField(Field::HOST_CR3, 1 << 32),
            load(0x2_1ffc),
            Action::Write { at: 0x5_3118, value: 0xb_7033 },
        ],
    );
    holds(Invalidation::Careless, &program);
}

#[test]
fn time_does_not_show_in_what_a_failed_vmread_leaves_alone() {
    let actions = [
        Action::Guest(Operation::Vmfunc { rax: 0, rcx: 5 }),
        Action::L1(Operation::Rdtsc),
        Action::L1(Operation::Vmread { encoding: 0x1_3ed9 }),
    ];
    holds(Invalidation::Everything, &program(Setup::default(), &actions));
}
