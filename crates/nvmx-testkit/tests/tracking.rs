//! Does L1 notice that its pages are moved about and watched, and does L0 miss a write?
//!
//! The programs of the transparency tests, on a host that cannot leave L1's memory alone: before any
//! operation, of any processor, it moves a page to another frame, splits a large page, takes an
//! unused one away, or has itself told of writes to a table, the EPTP list, a VMCS, data. The trace
//! has to be that of the bare machine. A frame that L1 no longer has gets other content once the
//! shootdown is complete, so that a processor which still uses it is found out; and a tracked page
//! that has changed must have been told of.

use std::collections::BTreeMap;

use nvmx::Request;
use nvmx_testkit::compare::on_bare;
use nvmx_testkit::{Nest, NestConfig, caps, seeds};
use vmx_defs::{EptPermissions, ExitReason, Field, Hpa, L1Gpa, ProcCtls};
use vmx_model::generate::{Invalidation, Profile, generate, shrink};
use vmx_model::program::{Setup, VmSetup};
use vmx_model::retention::Rng;
use vmx_model::{
    Action, Operation, Outcome, Platform, Program, Retention, Session, Step, layout, run,
};

/// Pages that no program uses, two of them in one large page with others that are used.
const UNUSED: [u64; 4] = [300, 301, 600, 1001];

/// A page that L0 is to be told of.
struct Watched {
    /// The shootdown that it waits for.
    request: Request,
    /// Its content and the number of writes, once that is complete.
    seen: Option<(Vec<u64>, u64)>,
}

/// A nest with a host that is never still.
struct Restless {
    nest: Nest,
    rng: Rng,
    /// The host acts before one in so many operations.
    odds: u64,
    watched: BTreeMap<u64, Watched>,
    hidden: BTreeMap<u64, Hpa>,
    counts: Counts,
}

/// What has been done.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    moved: u64,
    tracked: u64,
    /// Tracked pages that a guest wrote to, so that it was let through.
    let_through: u64,
    /// Writes of the engine's to tracked pages.
    told: u64,
}

impl Restless {
    fn new(nest: Nest, seed: u64, odds: u64) -> Self {
        let (watched, hidden, counts) = Default::default();
        Self { nest, rng: Rng::new(seed ^ 0x7e57_1e55), odds, watched, hidden, counts }
    }

    /// A page that matters.
    fn page(&mut self, processors: usize) -> L1Gpa {
        let rng = &mut self.rng;
        let processor = rng.below(processors as u64) as usize;
        let view = rng.below(layout::VIEWS as u64) as usize;
        L1Gpa::new(match rng.below(16) {
            0 => rng.below(12) << 12,
            1 => layout::EPTP_LIST,
            2 => layout::MSR_BITMAP,
            3 => layout::vmcs(processor, rng.below(2) as usize),
            4 => layout::operands(processor) - 0x1000,
            5 => layout::operands(processor),
            6 => layout::L1_DATA + (rng.below(8) << 12),
            7 | 8 => layout::guest_structure(layout::guest::LONG + rng.below(16)),
            9 => layout::LARGE + (rng.below(6) << 12),
            10..=12 => layout::guest_data(view, rng.below(layout::DATA_PAGES)),
            13 => layout::OTHER_PT,
            _ => layout::ept_table(view, 1 + rng.below(4) as u8),
        })
    }

    /// The host acts, on some processor.
    fn act(&mut self) {
        let processors = self.nest.machine().processors.len();
        let processor = self.rng.below(processors as u64) as usize;
        let page = self.page(processors);
        match self.rng.below(10) {
            0..=3 => {
                // A page that is watched stays so.
                self.nest.move_page(processor, page);
                self.counts.moved += 1;
            }
            4..=6 => self.track(processor, page),
            7 => {
                let Some(page) = self.watched.keys().next().copied() else { return };
                self.watched.remove(&page);
                self.nest.untrack(processor, L1Gpa::new(page));
            }
            8 => {
                let unused = self.rng.pick(&UNUSED);
                let page = L1Gpa::new(unused << 12);
                match self.hidden.remove(&unused) {
                    Some(frame) => self.nest.show(processor, page, frame),
                    None => {
                        let frame = self.nest.hide(processor, page);
                        self.hidden.insert(unused, frame);
                    }
                }
            }
            _ => {
                // Nothing but a leaf of its own.
                let rights = self.nest.translate(page).permissions;
                self.nest.set_rights(processor, page, rights);
            }
        }
    }

    fn track(&mut self, processor: usize, page: L1Gpa) {
        if let Ok(request) = self.nest.track(processor, page) {
            self.counts.tracked += 1;
            // Sooner or later; nobody is to rely on it before.
            if !self.rng.one_in(3) {
                self.nest.complete(request);
            }
            self.watched.insert(page.as_u64(), Watched { request, seen: None });
            self.look();
        }
    }

    /// Has a page changed of which nobody has told?
    fn look(&mut self) {
        let Self { nest, watched, counts, .. } = self;
        watched.retain(|page, watched| {
            let page = L1Gpa::new(*page);
            if !nest.tracks(page) {
                // A guest's write was let through.
                counts.let_through += 1;
                return false;
            }
            let Some(writes) = nest.writes(page) else { panic!("{page:?} is written unseen") };
            let content = nest.content(page);
            match &watched.seen {
                Some((before, told)) if *told == writes => {
                    assert!(*before == content, "{page:?} has changed, and nobody was told");
                }
                Some((_, told)) => counts.told += writes - told,
                None if !nest.is_complete(watched.request) => return true,
                None => {}
            }
            watched.seen = Some((content, writes));
            true
        });
    }
}

impl Platform for Restless {
    fn execute(&mut self, processor: usize, operation: &Operation) -> Outcome {
        if self.rng.one_in(self.odds) {
            self.act();
        }
        self.look();
        let outcome = self.nest.execute(processor, operation);
        self.look();
        outcome
    }

    fn peek(&mut self, at: L1Gpa) -> u64 {
        self.nest.peek(at)
    }

    fn poke(&mut self, at: L1Gpa, value: u64) {
        self.nest.poke(at, value);
    }
}

fn restless(seed: u64, program: &Program, retention: Retention) -> Result<Counts, String> {
    let config = NestConfig { frames: 256, moves: None, ..NestConfig::random(seed) };
    let caps = caps::bare_caps(&config.hardware);
    let bare = on_bare(program, Retention::Nothing, &caps);
    let nest = Nest::new(&config, retention, program.setup.processors);
    let mut restless = Restless::new(nest, seed, 1 + seed % 40);
    let trace = run(&mut restless, &caps, program);
    match bare.difference(&trace) {
        Some(difference) => Err(format!("{difference:x?}")),
        None => Ok(restless.counts),
    }
}

fn check(seed: u64, processors: usize) -> Counts {
    let invalidation =
        if seed.is_multiple_of(2) { Invalidation::Everything } else { Invalidation::Sufficient };
    let profile = Profile { processors, invalidation, ve: false, ..Profile::default() };
    let program = generate(seed, &profile);
    let retention = match seed % 4 {
        0 => Retention::Nothing,
        1 => Retention::Random(seed),
        _ => Retention::Everything,
    };
    match restless(seed, &program, retention) {
        Ok(counts) => counts,
        Err(_) => {
            let small = shrink(&program, |program| restless(seed, program, retention).is_err());
            for step in &small.steps {
                println!("    {}: {:x?}", step.processor, step.action);
            }
            panic!("{:?} {:?}", small.setup, restless(seed, &small, retention));
        }
    }
}

fn all(property: &str, count: u64, processors: usize) {
    let mut sum = Counts::default();
    seeds::each(property, count, |seed| {
        let counts = check(seed, processors);
        sum.moved += counts.moved;
        sum.tracked += counts.tracked;
        sum.let_through += counts.let_through;
        sum.told += counts.told;
    });
    println!("{sum:?}");
}

#[test]
fn l1_notices_nothing_and_l0_misses_nothing() {
    all("tracking", 1000, 1);
}

#[test]
fn nor_with_several_processors() {
    all("tracking on several processors", 1000, 3);
}

/// Where the guest of a processor sees L1's first data page of the first view: through EPT, or on EPT01
/// with L1's own page tables.
fn guest(session: &mut Session<'_, Nest>, processor: usize, without_ept: bool) -> u64 {
    if !without_ept {
        return layout::DATA << 12;
    }
    let action = Action::SetField(Field::GUEST_CR3, layout::L1_CR3);
    session.carry_out(&Step { processor, action });
    layout::guest_data(0, 0)
}

fn setup(without_ept: bool) -> Setup {
    let view = if without_ept { None } else { Some(0) };
    let vm = VmSetup { view, ..VmSetup::default() };
    Setup { processors: 2, vms: [vm.clone(), vm], ..Setup::default() }
}

/// A page that was tracked is like any other afterwards.
#[test]
fn after_tracking_a_write_exits_no_more() {
    for without_ept in [false, true] {
        let config = NestConfig::default();
        let caps = caps::bare_caps(&config.hardware);
        let mut nest = Nest::new(&config, Retention::Everything, 2);
        let mut session = Session::new(&mut nest, &caps, &setup(without_ept));
        let page = L1Gpa::new(layout::guest_data(0, 0));
        let linear = guest(&mut session, 1, without_ept);
        let exits = |session: &mut Session<'_, Nest>, operation| {
            let before = session.platform().exits();
            let outcome = session.platform().execute(1, &operation);
            assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
            session.platform().exits() - before
        };
        for (in_guest, at, value) in [(false, page.as_u64(), 5), (true, linear, 6)] {
            if in_guest {
                session.carry_out(&Step { processor: 1, action: Action::Enter });
            }
            assert_eq!(session.in_guest(1), in_guest);
            let store = Operation::Store { at, size: 8, value };
            exits(&mut session, store);
            assert_eq!(exits(&mut session, store), 0, "the processor knows the way");
            let request = session.platform().track(0, page);
            let Ok(request) = request else { panic!("{request:?}") };
            session.platform().complete(request);
            assert_eq!(session.platform().writes(page), Some(0));
            let before = session.platform().content(page);
            assert!(exits(&mut session, store) > 0, "L0 has to be told");
            assert!(!session.platform().tracks(page), "and lets the write through");
            exits(&mut session, store);
            assert_eq!(exits(&mut session, store), 0, "{store:x?}");
            assert_eq!(before[1..], session.platform().content(page)[1..]);
            assert_eq!(session.platform().content(page)[0], value);
        }
    }
}

/// What L0 takes away is gone once the shootdown is complete, also for a processor that has cached
/// all it can, and runs L2 on EPT01.
#[test]
fn after_the_shootdown_nobody_uses_the_old_translation() {
    for without_ept in [false, true] {
        let config = NestConfig::default();
        let caps = caps::bare_caps(&config.hardware);
        let mut nest = Nest::new(&config, Retention::Everything, 2);
        let mut session = Session::new(&mut nest, &caps, &setup(without_ept));
        let page = L1Gpa::new(layout::guest_data(0, 0));
        let load = Operation::Load { at: guest(&mut session, 1, without_ept), size: 8 };
        let mark = Outcome::Completed { value: layout::mark(page.as_u64()), flags: 0 };
        assert_eq!(session.guest(1, load), mark);
        session.platform().move_page(0, page);
        assert_eq!(session.guest(1, load), mark, "the old frame has other content by now");
        let frame = session.platform().hide(0, page);
        assert_eq!(session.guest(1, load), Outcome::Completed { value: u64::MAX, flags: 0 });
        session.platform().show(0, page, frame);
        assert_eq!(session.guest(1, load), mark);
        session.platform().set_rights(0, page, EptPermissions::READ);
        assert_eq!(session.guest(1, load), mark);
    }
}

/// Where L0 moves a page that is a part of a larger one, the larger one goes.
#[test]
fn a_part_of_a_large_page_can_be_moved() {
    let config = NestConfig::default();
    let caps = caps::bare_caps(&config.hardware);
    let mut nest = Nest::new(&config, Retention::Everything, 2);
    let mut session = Session::new(&mut nest, &caps, &setup(false));
    let page = layout::LARGE + 0x5000;
    let load = Operation::Load { at: page, size: 8 };
    let mark = Outcome::Completed { value: layout::mark(page), flags: 0 };
    assert_eq!(session.guest(1, load), mark);
    session.platform().move_page(0, L1Gpa::new(page));
    assert_eq!(session.guest(1, load), mark, "the old frame has other content by now");
}

/// The processor finds the I/O bitmaps of a VMCS that runs where L1 has them now.
#[test]
fn io_bitmaps_are_found_where_they_have_been_moved_to() {
    // Moved while the guest runs, or while L1 does.
    for in_guest in [true, false] {
        let config = NestConfig::default();
        let caps = caps::bare_caps(&config.hardware);
        let mut nest = Nest::new(&config, Retention::Everything, 2);
        let mut setup = setup(false);
        for vm in &mut setup.vms {
            vm.exits = ProcCtls::IO_BITMAPS;
        }
        let mut session = Session::new(&mut nest, &caps, &setup);
        let input = Operation::In { port: 0, size: 1 };
        let free = Outcome::Completed { value: 0xff, flags: 0 };
        let bitmap = L1Gpa::new(layout::IO_BITMAP);
        assert_eq!(session.guest(1, input), free);
        if !in_guest {
            session.leave(1);
        }
        session.platform().move_page(0, bitmap);
        assert_eq!(session.guest(1, input), free, "the old frame has other content by now");
        session.platform().poke(bitmap, 1);
        assert_eq!(session.guest(1, input), Outcome::Exit(ExitReason::IO_INSTRUCTION));
    }
}
