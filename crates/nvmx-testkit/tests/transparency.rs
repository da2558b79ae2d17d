//! Is a nest the machine that L1 believes in?
//!
//! Random programs on hosts of every kind. A failure prints a program of few steps, and is kept as a
//! test of its own in `regressions.rs`.

use nvmx_testkit::compare::hold;
use nvmx_testkit::{Case, NestConfig};
use vmx_model::Retention;
use vmx_model::generate::{Invalidation, Profile};

const EXACT: [Invalidation; 2] = [Invalidation::Everything, Invalidation::Sufficient];

/// Cases of `seeds` under every policy of the caches.
fn cases(
    seeds: std::ops::Range<u64>,
    profile: Profile,
    config: impl Fn(u64) -> NestConfig,
) -> impl Iterator<Item = Case> {
    seeds.flat_map(move |seed| {
        let config = config(seed);
        [Retention::Everything, Retention::Random(seed), Retention::Nothing].map(|retention| Case {
            seed,
            profile,
            retention,
            config: config.clone(),
        })
    })
}

#[test]
fn an_l1_that_invalidates_enough_sees_the_bare_machine() {
    for invalidation in EXACT {
        let profile = Profile { invalidation, ..Profile::default() };
        hold(cases(0..700, profile, |_| NestConfig::default()));
    }
}

#[test]
fn on_several_processors_too() {
    for invalidation in EXACT {
        let profile = Profile { invalidation, processors: 3, steps: 100, ..Profile::default() };
        hold(cases(0..400, profile, NestConfig::random));
    }
}

#[test]
fn a_host_that_is_short_of_everything_is_no_different() {
    for invalidation in EXACT {
        let profile = Profile { invalidation, processors: 2, ..Profile::default() };
        hold(cases(1000..1400, profile, |_| NestConfig::scarce()));
    }
}

#[test]
fn a_host_that_interrupts_all_the_time_is_no_different() {
    for invalidation in EXACT {
        let profile = Profile { invalidation, processors: 2, ..Profile::default() };
        let config = |seed| NestConfig { kicks: Some((2, seed)), ..NestConfig::random(seed) };
        hold(cases(2000..2200, profile, config));
    }
}

#[test]
fn a_host_that_moves_l1s_memory_is_no_different() {
    for invalidation in EXACT {
        let profile = Profile { invalidation, processors: 3, wild: true, ..Profile::default() };
        let config = |seed| NestConfig { moves: Some((3, seed)), ..NestConfig::random(seed) };
        hold(cases(4000..4200, profile, config));
    }
    let profile = Profile { processors: 2, ..Profile::default() };
    let config = |seed| NestConfig { moves: Some((5, seed)), ..NestConfig::random(seed) };
    hold(cases(4200..4300, profile, config));
}

#[test]
fn a_hostile_l1_sees_the_bare_machine() {
    for invalidation in EXACT {
        let profile =
            Profile { invalidation, processors: 2, wild: true, steps: 150, ..Profile::default() };
        hold(cases(3000..3400, profile, NestConfig::random));
    }
}

#[test]
fn a_careless_l1_sees_what_some_processor_does() {
    let profile = Profile { processors: 3, ..Profile::default() };
    hold(cases(0..200, profile, NestConfig::random));
    hold(cases(200..300, Profile { wild: true, ..profile }, NestConfig::random));
}

#[test]
fn registers_events_and_instructions_are_those_of_the_bare_machine() {
    for invalidation in EXACT {
        let profile =
            Profile { invalidation, processors: 2, rarer: true, steps: 120, ..Profile::default() };
        hold(cases(5000..5400, profile, NestConfig::random));
    }
}

#[test]
fn on_processors_of_every_kind() {
    for invalidation in EXACT {
        let profile =
            Profile { invalidation, processors: 2, wild: true, rarer: true, ..Profile::default() };
        let sufficient = invalidation == Invalidation::Sufficient;
        let config = |seed| {
            let config = NestConfig::varied(seed);
            if sufficient { config.invalidating() } else { config }
        };
        hold(cases(6000..6400, profile, config));
    }
}

#[test]
fn the_cases_of_the_fuzzer() {
    hold((0..1500).map(Case::of_seed));
}
