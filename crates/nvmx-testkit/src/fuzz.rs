//! Does it hold for long? Random cases on all processors of this computer, for as long as one likes.
//!
//! Case *n* of a run follows from the run's seed and *n* alone, and is named by a seed of its own
//! ([`Case::of_seed`]), with which it can be run again by itself.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmx_model::Retention;
use vmx_model::generate::{Invalidation, Profile};
use vmx_model::retention::Rng;

use crate::compare::{Case, Ran, Report};
use crate::config::NestConfig;

/// How long a progress line is waited for.
const PROGRESS: Duration = Duration::from_secs(15);

impl Case {
    /// The case that a seed names: program, policy and host.
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x00F0_22ED);
        let invalidation = match rng.below(16) {
            0 => Invalidation::Careless,
            1..=7 => Invalidation::Everything,
            _ => Invalidation::Sufficient,
        };
        let careless = invalidation == Invalidation::Careless;
        let steps = if careless { 20 + rng.below(40) } else { rng.pick(&[40, 100, 300, 1000]) };
        let profile = Profile {
            steps: steps as usize,
            processors: 1 + rng.below(3) as usize,
            wild: rng.one_in(4),
            ve: false,
            without_ept: rng.one_in(2),
            accesses: rng.pick(&[2, 4, 16, 40]),
            rarer: rng.one_in(3),
            invalidation,
        };
        let retention = match rng.below(8) {
            0..=3 => Retention::Everything,
            4..=6 => Retention::Random(rng.next()),
            _ => Retention::Nothing,
        };
        let mut config = NestConfig::varied(rng.next());
        if invalidation == Invalidation::Sufficient {
            config = config.invalidating();
        }
        Self { seed, profile, retention, config }
    }
}

/// What is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The seed of the run.
    pub seed: u64,
    /// For how long.
    pub time: Duration,
    /// On how many threads.
    pub threads: usize,
}

/// What has been run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// Programs.
    pub programs: u64,
    /// What they ran.
    pub ran: Ran,
    /// How long it took.
    pub time: Duration,
}

impl Sum {
    fn a_minute(&self, count: u64) -> u64 {
        (count as f64 * 60.0 / self.time.as_secs_f64().max(1e-3)) as u64
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { programs, ran, time } = self;
        write!(
            f,
            "{programs} programs ({} not exact, {} given up), {} steps, {} L2 operations, {} L2 memory operations \
             ({} a minute), {} exits to L0 in {:.0} s",
            ran.inexact,
            ran.given_up,
            ran.steps,
            ran.guest_operations,
            ran.guest_accesses,
            self.a_minute(ran.guest_accesses),
            ran.exits,
            time.as_secs_f64()
        )
    }
}

/// Runs cases until the time is up or one has failed. `progress` is told now and then.
///
/// # Errors
/// The first failure.
pub fn fuzz(plan: Plan, progress: impl Fn(&Sum) + Sync) -> (Sum, Option<Box<Report>>) {
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let state = Mutex::new((Sum::default(), None::<Box<Report>>, Instant::now()));
    let work = || {
        while started.elapsed() < plan.time {
            let seed = seed_of(plan.seed, next.fetch_add(1, Ordering::Relaxed));
            let result = Case::of_seed(seed).check();
            let Ok(mut state) = state.lock() else { return };
            let (sum, failure, told) = &mut *state;
            sum.time = started.elapsed();
            match result {
                Ok(ran) => {
                    sum.programs += 1;
                    sum.ran.add(ran);
                }
                Err(report) => {
                    failure.get_or_insert(report);
                }
            }
            if failure.is_some() {
                return;
            }
            if told.elapsed() >= PROGRESS {
                *told = Instant::now();
                progress(sum);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..plan.threads {
            scope.spawn(work);
        }
    });
    let (sum, failure, _) = state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    (sum, failure)
}

/// The seed of case `number` of a run. Runs of neighbouring seeds have no case in common.
fn seed_of(run: u64, number: u64) -> u64 {
    Rng::new(Rng::new(run).next() ^ number).next()
}
