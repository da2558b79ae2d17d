//! Can L1 tell that there is an engine between it and the processor?
//!
//! The same program runs on the bare machine that L1 believes in and on a [`Nest`]. Where L1
//! invalidates all that its edits make stale, the two traces have to be equal, whatever the caches
//! keep. Where it does not, each answer of the nest has to be one that some processor could give:
//! [`vmx_model::Checked`] computes them all.

use std::cell::Cell;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use vmx_defs::L1Gpa;
use vmx_model::checked::Disallowed;
use vmx_model::generate::{Invalidation, Profile, generate, shrink};
use vmx_model::{Checked, Machine, ModelCaps, Program, Retention, Seen, Trace, layout, run};

use crate::caps::bare_caps;
use crate::config::NestConfig;
use crate::nest::Nest;

/// A program and what it runs on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Case {
    /// The seed of the program.
    pub seed: u64,
    /// What the program may contain.
    pub profile: Profile,
    /// What the caches of the processors below keep.
    pub retention: Retention,
    /// The host.
    pub config: NestConfig,
}

/// The first observation that is not the same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Its number.
    pub at: usize,
    /// What the bare machine shows.
    pub bare: Option<Seen>,
    /// What the nest shows.
    pub nest: Option<Seen>,
}

/// How a nest has shown itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The traces differ.
    Differs(Box<Difference>),
    /// No processor does this.
    Disallowed(Box<Disallowed>),
    /// A word of memory is not as the allowed executions leave it.
    Memory {
        /// Its address.
        at: L1Gpa,
        /// What is there.
        is: u64,
        /// What ought to be there.
        ought: u64,
    },
    /// L0, the engine or the model has panicked.
    Panicked(String),
}

/// What a case that holds has run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ran {
    /// Steps of the program.
    pub steps: u64,
    /// Operations that L2 executed in the nest.
    pub guest_operations: u64,
    /// Loads, stores and fetches among them.
    pub guest_accesses: u64,
    /// Exits to L0.
    pub exits: u64,
    /// Programs that left something stale though they were meant not to.
    pub inexact: u64,
    /// Programs whose allowed answers were too many to be computed to the end.
    pub given_up: u64,
}

impl Case {
    /// The program.
    pub fn program(&self) -> Program {
        generate(self.seed, &self.profile)
    }

    /// Runs the case.
    ///
    /// # Errors
    /// How the nest has shown itself.
    pub fn run(&self) -> Result<Ran, Failure> {
        self.try_program(&self.program())
    }

    /// Runs another program in place of its own.
    ///
    /// # Errors
    /// How the nest has shown itself.
    pub fn try_program(&self, program: &Program) -> Result<Ran, Failure> {
        let result = catch(|| {
            if self.profile.invalidation == Invalidation::Careless {
                allowed(program, self.retention, &self.config)
            } else {
                transparent(program, self.retention, &self.config)
            }
        });
        result.unwrap_or_else(|message| Err(Failure::Panicked(message)))
    }

    /// Runs the case, and makes a failure's program as small as it can be.
    ///
    /// # Errors
    /// The report.
    pub fn check(&self) -> Result<Ran, Box<Report>> {
        let program = self.program();
        self.try_program(&program).map_err(|failure| Box::new(self.report(&program, failure)))
    }

    fn report(&self, program: &Program, failure: Failure) -> Report {
        // Without an invalidation that was there for a reason, a program is another one: where the
        // allowed answers can tell, they do.
        let disallowed = |candidate: &Program| {
            catch(|| allowed(candidate, self.retention, &self.config))
                .map_or(true, |ran| ran.is_err())
        };
        let can_tell = disallowed(program);
        let program = shrink(program, |candidate| {
            self.try_program(candidate).is_err() && (!can_tell || disallowed(candidate))
        });
        let failure = self.try_program(&program).err().unwrap_or(failure);
        Report { case: self.clone(), program, failure }
    }
}

/// Runs cases until the first that fails.
///
/// # Panics
/// With the report of that one.
pub fn hold(cases: impl IntoIterator<Item = Case>) -> Ran {
    let mut sum = Ran::default();
    for case in cases {
        match case.check() {
            Ok(ran) => sum.add(ran),
            Err(report) => panic!("{report}"),
        }
    }
    sum
}

impl Ran {
    /// Adds another's counts.
    pub fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.guest_operations += other.guest_operations;
        self.guest_accesses += other.guest_accesses;
        self.exits += other.exits;
        self.inexact += other.inexact;
        self.given_up += other.given_up;
    }

    fn of(program: &Program, trace: &Trace, nest: &Nest) -> Self {
        Self {
            steps: program.steps.len() as u64,
            guest_operations: trace.guest_operations,
            guest_accesses: trace.guest_accesses,
            exits: nest.exits(),
            inexact: 0,
            given_up: 0,
        }
    }
}

/// A failure, with all that is needed to see it again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// The case.
    pub case: Case,
    /// The smallest program found that fails.
    pub program: Program,
    /// How it fails.
    pub failure: Failure,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { seed, profile, retention, config } = &self.case;
        writeln!(f, "seed {seed}, {retention:?}")?;
        writeln!(f, "{profile:?}")?;
        writeln!(f, "{config}")?;
        writeln!(f, "shrunk to: {:?}", self.program.setup)?;
        for step in &self.program.steps {
            writeln!(f, "    {}: {:x?}", step.processor, step.action)?;
        }
        write!(f, "{:x?}", self.failure)
    }
}

/// Runs a program on the bare machine that L1 believes in.
pub fn on_bare(program: &Program, retention: Retention, caps: &ModelCaps) -> Trace {
    let registers = (0..program.setup.processors).map(layout::l1_registers);
    let mut machine = Machine::new(caps, retention, layout::PAGES, registers);
    run(&mut machine, caps, program)
}

/// Runs a program on a nest, of which this is left.
pub fn on_nest(program: &Program, retention: Retention, config: &NestConfig) -> (Trace, Nest) {
    let mut nest = Nest::new(config, retention, program.setup.processors);
    let trace = run(&mut nest, &bare_caps(&config.hardware), program);
    (trace, nest)
}

/// Whether a program that leaves nothing stale has the same trace on the nest as on the bare
/// machine. One that does leave something (in the end it is the bare machine that tells, where what
/// its caches keep shows) is judged as [`allowed`] does.
///
/// # Errors
/// The first difference.
pub fn transparent(
    program: &Program,
    retention: Retention,
    config: &NestConfig,
) -> Result<Ran, Failure> {
    let caps = bare_caps(&config.hardware);
    let bare = on_bare(program, Retention::Nothing, &caps);
    let nest = catch(|| on_nest(program, retention, config));
    let (trace, nest) = nest.map_err(Failure::Panicked)?;
    match bare.difference(&trace) {
        Some(_) if bare != on_bare(program, Retention::Everything, &caps) => {
            let ran = allowed(program, retention, config)?;
            Ok(Ran { inexact: 1, ..ran })
        }
        Some((at, bare, nest)) => {
            let (bare, nest) = (bare.cloned(), nest.cloned());
            Err(Failure::Differs(Box::new(Difference { at, bare, nest })))
        }
        None => Ok(Ran::of(program, &trace, &nest)),
    }
}

/// Whether all that a program sees on the nest is what some processor may do.
///
/// # Errors
/// What none does.
pub fn allowed(
    program: &Program,
    retention: Retention,
    config: &NestConfig,
) -> Result<Ran, Failure> {
    let caps = bare_caps(&config.hardware);
    let nest = Nest::new(config, retention, program.setup.processors);
    let registers = (0..program.setup.processors).map(layout::l1_registers);
    let mut checked = Checked::new(nest, &caps, layout::PAGES, registers);
    let trace = run(&mut checked, &caps, program);
    if let Some(disallowed) = checked.failure() {
        return Err(Failure::Disallowed(Box::new(disallowed.clone())));
    }
    if checked.gave_up() {
        let ran = Ran::of(program, &trace, &checked.into_inner());
        return Ok(Ran { given_up: 1, ..ran });
    }
    if let Some((at, is, ought)) = layout::visible_pages(&program.setup)
        .into_iter()
        .find_map(|page| checked.difference(L1Gpa::new(page)))
    {
        return Err(Failure::Memory { at, is, ought });
    }
    Ok(Ran::of(program, &trace, &checked.into_inner()))
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs something that may panic; the message of a panic is returned and not printed.
fn catch<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let inner = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                inner(info);
            }
        }));
    });
    let was = QUIET.replace(true);
    // What is borrowed is dropped after a panic.
    let result = panic::catch_unwind(AssertUnwindSafe(body));
    QUIET.set(was);
    result.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
    })
}
