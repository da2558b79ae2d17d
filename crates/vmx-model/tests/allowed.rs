//! Does the set of allowed answers hold what processors do, and nothing else?

mod stage;

use vmx_defs::L1Gpa;
use vmx_model::checked::Disallowed;
use vmx_model::generate::{Invalidation, Profile, generate, shrink};
use vmx_model::{
    Checked, Machine, ModelCaps, Operation, Outcome, Platform, Program, Retention, layout, run,
};

fn machine(program: &Program, retention: Retention) -> Machine {
    let processors = (0..program.setup.processors).map(layout::l1_registers);
    Machine::new(&ModelCaps::default(), retention, layout::PAGES, processors)
}

fn failure<P: Platform>(program: &Program, platform: P) -> Option<Disallowed> {
    let caps = ModelCaps::default();
    let processors = (0..program.setup.processors).map(layout::l1_registers);
    let mut checked = Checked::new(platform, &caps, layout::PAGES, processors);
    run(&mut checked, &caps, program);
    checked.failure().cloned()
}

/// Whatever a processor keeps, and however carelessly it is programmed, it stays in the set.
#[test]
fn processors_of_every_policy_are_allowed() {
    for invalidation in [Invalidation::Careless, Invalidation::Sufficient] {
        let profile = Profile { processors: 2, invalidation, ..Profile::default() };
        for seed in 0..150 {
            let program = generate(seed, &profile);
            for retention in [Retention::Everything, Retention::Random(seed), Retention::Nothing] {
                let fails = |program: &Program| failure(program, machine(program, retention));
                if fails(&program).is_some() {
                    let small = shrink(&program, |program| fails(program).is_some());
                    panic!("seed {seed}, {retention:?}\n{small:x?}\n{:#x?}", fails(&small));
                }
            }
        }
    }
}

/// A machine whose processors forget nothing at an operation that ought to make them.
struct Forgetful {
    machine: Machine,
    ignored: fn(&Operation) -> bool,
}

impl Platform for Forgetful {
    fn execute(&mut self, processor: usize, operation: &Operation) -> Outcome {
        let caches = self.machine.processors[processor].caches().clone();
        let outcome = self.machine.execute(processor, operation);
        if (self.ignored)(operation) {
            *self.machine.processors[processor].caches_mut() = caches;
        }
        outcome
    }

    fn peek(&mut self, at: L1Gpa) -> u64 {
        self.machine.peek(at)
    }

    fn poke(&mut self, at: L1Gpa, value: u64) {
        self.machine.poke(at, value);
    }
}

/// How many of some programs find the machine out.
fn found(ignored: fn(&Operation) -> bool) -> usize {
    let profile = Profile { invalidation: Invalidation::Sufficient, ..Profile::default() };
    (0..200)
        .filter(|seed| {
            let program = generate(*seed, &profile);
            let machine = machine(&program, Retention::Everything);
            failure(&program, Forgetful { machine, ignored }).is_some()
        })
        .count()
}

#[test]
fn a_machine_that_forgets_too_little_is_found_out() {
    assert_eq!(found(|_| false), 0);
    assert!(found(|operation| matches!(operation, Operation::Invept { .. })) > 5);
    assert!(found(|operation| matches!(operation, Operation::Invvpid { .. })) > 2);
    assert!(found(|operation| matches!(operation, Operation::Invlpg { .. })) > 2);
    assert!(found(|operation| matches!(operation, Operation::Vmfunc { .. })) > 0);
    assert!(found(|operation| matches!(operation, Operation::MovToCr { .. })) > 0);
}
