//! Do random programs come to what they are there to show?
//!
//! A comparison shows nothing where L2 never ran, nothing was cached and nothing stale. So it is
//! counted here, with bounds well below what the generator gives, how many programs have what the
//! properties of `transparency.rs` are about.

use nvmx_testkit::NestConfig;
use nvmx_testkit::caps::bare_caps;
use nvmx_testkit::compare::{on_bare, on_nest};
use vmx_defs::ExitReason;
use vmx_model::generate::{Invalidation, Profile, generate};
use vmx_model::{Action, ModelCaps, Operation, Outcome, Program, Retention, Seen, Trace};

/// Programs of each kind.
const PROGRAMS: u64 = 200;

fn caps() -> ModelCaps {
    bare_caps(&ModelCaps::default())
}

/// How many outcomes of a program are like this.
fn outcomes(trace: &Trace, wanted: impl Fn(&Operation, &Outcome) -> bool) -> u64 {
    let is_wanted = |seen: &&Seen| match seen {
        Seen::Operation { operation, outcome, .. } => wanted(operation, outcome),
        _ => false,
    };
    trace.seen.iter().filter(is_wanted).count() as u64
}

/// Whether a program shows what the caches keep.
fn shows_staleness(program: &Program) -> bool {
    let trace = |retention| on_bare(program, retention, &caps());
    trace(Retention::Nothing) != trace(Retention::Everything)
}

/// A program without some of its actions.
fn without(program: &Program, what: impl Fn(&Action) -> bool) -> Program {
    let mut program = program.clone();
    program.steps.retain(|step| !what(&step.action));
    program
}

#[test]
fn l2_switches_faults_and_exits_and_nothing_stops_early() {
    let profile = Profile { invalidation: Invalidation::Sufficient, ..Profile::default() };
    let (mut accesses, mut switches, mut refused, mut violations) = (0, 0, 0, 0);
    let (mut faults, mut stops) = (0, 0);
    for seed in 0..PROGRAMS {
        let program = generate(seed, &profile);
        let (trace, _) = on_nest(&program, Retention::Everything, &NestConfig::default());
        let count = |wanted: fn(&Operation, &Outcome) -> bool| outcomes(&trace, wanted);
        accesses += trace.guest_accesses;
        let is_switch = |operation: &Operation| matches!(operation, Operation::Vmfunc { .. });
        switches += outcomes(&trace, |operation, outcome| {
            is_switch(operation) && matches!(outcome, Outcome::Completed { .. })
        });
        refused += count(|_, outcome| *outcome == Outcome::Exit(ExitReason::VMFUNC));
        violations += count(|_, outcome| *outcome == Outcome::Exit(ExitReason::EPT_VIOLATION));
        faults += count(|_, outcome| matches!(outcome, Outcome::Delivered(_)));
        stops += count(|_, outcome| *outcome == Outcome::Stopped);
    }
    println!("{accesses} {switches} {refused} {violations} {faults} {stops}");
    assert!(accesses >= 20 * PROGRAMS, "{accesses} accesses of L2");
    assert!(switches >= PROGRAMS, "{switches} switches");
    assert!(refused >= PROGRAMS / 5, "{refused} switches refused");
    assert!(violations >= PROGRAMS / 2, "{violations} EPT violations for L1");
    assert!(faults >= PROGRAMS / 2, "{faults} faults");
    assert!(stops <= PROGRAMS / 20, "{stops} processors stopped");
}

/// The exact programs are exact, and what they invalidate would otherwise be used.
#[test]
fn every_kind_of_invalidation_is_needed() {
    let profile = Profile { invalidation: Invalidation::Sufficient, ..Profile::default() };
    let (mut inexact, mut invepts, mut invvpids, mut own) = (0, 0, 0, 0);
    for seed in 0..PROGRAMS {
        let program = generate(seed, &profile);
        let shows =
            |what: fn(&Action) -> bool| u64::from(shows_staleness(&without(&program, what)));
        inexact += shows(|_| false);
        invepts += shows(|action| matches!(action, Action::Invept { .. }));
        invvpids += shows(|action| matches!(action, Action::Invvpid { .. }));
        own += shows(|action| {
            matches!(action, Action::L1(Operation::Invlpg { .. } | Operation::MovToCr { .. }))
        });
    }
    println!("{inexact} {invepts} {invvpids} {own}");
    assert!(inexact <= PROGRAMS / 100, "{inexact} programs show something stale");
    assert!(invepts >= PROGRAMS / 4, "INVEPT matters in {invepts} programs");
    assert!(invvpids >= PROGRAMS / 20, "INVVPID matters in {invvpids} programs");
    assert!(own >= PROGRAMS / 20, "L1's own invalidations matter in {own} programs");
}

/// A careless L1 sees stale mappings, on the bare machine and on the engine.
#[test]
fn what_is_stale_is_used() {
    let profile = Profile { processors: 3, ..Profile::default() };
    let (mut bare, mut nest) = (0, 0);
    for seed in 0..PROGRAMS {
        let program = generate(seed, &profile);
        let fresh = on_bare(&program, Retention::Nothing, &caps());
        let config = NestConfig::random(seed);
        bare += u64::from(fresh != on_bare(&program, Retention::Everything, &caps()));
        nest += u64::from(fresh != on_nest(&program, Retention::Everything, &config).0);
    }
    println!("{bare} {nest}");
    assert!(bare >= PROGRAMS / 4, "{bare} programs on the bare machine");
    assert!(nest >= PROGRAMS / 4, "{nest} programs on the engine");
}

/// A host that has little throws roots and tables away while their users run.
#[test]
fn what_is_scarce_is_reclaimed() {
    let profile =
        Profile { invalidation: Invalidation::Sufficient, processors: 3, ..Profile::default() };
    let (mut programs, mut requests) = (0, 0);
    for seed in 0..PROGRAMS {
        let program = generate(seed, &profile);
        let (_, nest) = on_nest(&program, Retention::Everything, &NestConfig::scarce());
        programs += u64::from(nest.engine().shadow_counters().roots_dropped > 0);
        requests += u64::from(nest.engine().shootdown().last() != Default::default());
    }
    println!("{programs} {requests}");
    assert!(programs >= PROGRAMS / 4, "roots are dropped in {programs} programs");
    assert!(requests >= PROGRAMS / 4, "processors have to flush in {requests} programs");
}
