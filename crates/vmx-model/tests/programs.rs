//! Do random programs run to their end, alike whenever they are run, and fast?

use std::time::Instant;

use vmx_model::generate::{Invalidation, Profile, generate, shrink};
use vmx_model::{Action, Machine, ModelCaps, Operation, Program, Retention, Trace, layout, run};

fn trace(program: &Program, retention: Retention) -> Trace {
    let caps = ModelCaps::default();
    let processors = (0..program.setup.processors).map(layout::l1_registers);
    let mut machine = Machine::new(&caps, retention, layout::PAGES, processors);
    run(&mut machine, &caps, program)
}

#[test]
fn a_trace_follows_from_program_and_seed() {
    let profile = Profile { processors: 3, wild: true, ..Profile::default() };
    for seed in 0..200 {
        let program = generate(seed, &profile);
        assert_eq!(program, generate(seed, &profile));
        for retention in [Retention::Everything, Retention::Random(seed), Retention::Nothing] {
            assert_eq!(trace(&program, retention), trace(&program, retention), "seed {seed}");
        }
    }
}

#[test]
fn wild_programs_end() {
    let profile = Profile { steps: 200, processors: 2, wild: true, ..Profile::default() };
    for seed in 0..1000 {
        trace(&generate(seed, &profile), Retention::Everything);
    }
}

/// Where every edit is followed by enough invalidation, nothing stale can be seen, and what a
/// processor keeps must not show. This is what finds a cache that is invalidated too little, or used
/// with the wrong tags.
#[test]
fn a_program_that_invalidates_enough_sees_no_caches() {
    for invalidation in [Invalidation::Everything, Invalidation::Sufficient] {
        for seed in 0..1500 {
            let rarer = seed % 3 == 0;
            let profile = Profile { processors: 2, invalidation, rarer, ..Profile::default() };
            let program = generate(seed, &profile);
            let plain = trace(&program, Retention::Nothing);
            for retention in [Retention::Everything, Retention::Random(seed)] {
                let differs = |program: &Program| {
                    trace(program, Retention::Nothing)
                        .difference(&trace(program, retention))
                        .is_some()
                };
                if plain.difference(&trace(&program, retention)).is_some() {
                    let small = shrink(&program, differs);
                    let (a, b) = (trace(&small, Retention::Nothing), trace(&small, retention));
                    let difference = a.difference(&b);
                    panic!("seed {seed}, {retention:?}\n{small:#x?}\n{difference:#x?}");
                }
            }
        }
    }
}

/// The other way round: without invalidation, caches do show.
#[test]
fn a_program_that_does_not_invalidate_sees_caches() {
    let profile = Profile::default();
    let differ = (0..300).filter(|seed| {
        let program = generate(*seed, &profile);
        trace(&program, Retention::Nothing) != trace(&program, Retention::Everything)
    });
    let differ = differ.count();
    assert!(differ > 30, "{differ}");
}

#[test]
fn shrinking_finds_the_step_that_matters() {
    let mut program = generate(1, &Profile { processors: 3, ..Profile::default() });
    program.steps[30].action = Action::Guest(Operation::Ud2);
    let small = shrink(&program, |program| {
        program.steps.iter().any(|step| step.action == Action::Guest(Operation::Ud2))
    });
    assert_eq!(small.steps.len(), 1);
    assert_eq!(small.setup.processors, 1);
}

/// Run with `--release -- --ignored --nocapture` for the figure.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let profile = Profile { steps: 10_000, ..Profile::default() };
    for retention in [Retention::Everything, Retention::Random(1), Retention::Nothing] {
        let start = Instant::now();
        let mut operations = 0;
        for seed in 0..50 {
            operations += trace(&generate(seed, &profile), retention).guest_operations;
        }
        let minute = operations as f64 / start.elapsed().as_secs_f64() * 60.0;
        println!("{retention:?}: {:.1} million operations of the guest a minute", minute / 1e6);
    }
}
