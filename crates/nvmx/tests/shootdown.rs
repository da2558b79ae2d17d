//! Does the shootdown protocol hold in every order of events that the memory model allows?
//!
//! Run by `cargo xtask test`, with loom: `RUSTFLAGS="--cfg loom" cargo test -p nvmx --release --test
//! shootdown`. Each processor has a TLB: a copy of the table's entry, which only its flush drops.
//! What stands in a frame is written without any lock when the frame is used again, so that loom
//! objects if a processor may still read it.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use nvmx::{Place, Shootdown};
use std::sync::Arc;

/// An entry that maps nothing.
const EMPTY: u64 = u64::MAX;
/// What a frame of the first table holds, and what it holds in its next life.
const OLD: u64 = 1;
const NEW: u64 = 2;

/// What a step of the protocol is replaced by, to see that the test can fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// No fence between a processor's place and its look, nor between a request and its look.
    NoFences,
    /// A processor looks whether it is behind, and says only then where it goes.
    PlaceAfterLook,
    /// A processor enters the guest without a look.
    NoLook,
    /// The request is made while the old translation is still in the table.
    RequestBeforeChange,
    /// Nobody waits for the processors that are pending.
    NoWait,
    /// A change of EPT01 waits for the processors only that run on a shadow EPT.
    WaitForShadowOnly,
}

/// The memory that all share.
struct Machine {
    shootdown: Shootdown,
    fault: Fault,
    /// The entry: the number of a frame, or [`EMPTY`].
    entry: AtomicU64,
    frames: [UnsafeCell<u64>; 2],
    /// Set by who made the change, once it relies on it.
    relied_on: AtomicU64,
}

// SAFETY: the frames are what the protocol under test guards; loom finds every access that is not.
unsafe impl Sync for Machine {}

impl Machine {
    fn new(processors: usize, fault: Fault) -> Arc<Self> {
        let shootdown = match fault {
            Fault::NoFences => Shootdown::without_fences(processors),
            _ => Shootdown::new(processors),
        };
        Arc::new(Self {
            shootdown,
            fault,
            entry: AtomicU64::new(0),
            frames: [UnsafeCell::new(OLD), UnsafeCell::new(NEW)],
            relied_on: AtomicU64::new(0),
        })
    }

    /// Takes the old translation away in favour of `to`; whether that may be relied on now.
    fn change(&self, to: u64, least: Place) -> bool {
        let store = || self.entry.store(to, Ordering::Relaxed);
        if self.fault != Fault::RequestBeforeChange {
            store();
        }
        let request = self.shootdown.request();
        if self.fault == Fault::RequestBeforeChange {
            store();
        }
        let least = if self.fault == Fault::WaitForShadowOnly { Place::Shadow } else { least };
        self.fault == Fault::NoWait || self.shootdown.is_complete(request, least, None)
    }
}

/// One processor.
struct Processor {
    machine: Arc<Machine>,
    number: usize,
    /// The entry as it was cached.
    tlb: Option<u64>,
}

impl Processor {
    fn new(machine: &Arc<Machine>, number: usize) -> Self {
        Self { machine: machine.clone(), number, tlb: None }
    }

    fn look(&mut self) {
        let tlb = &mut self.tlb;
        let shootdown = &self.machine.shootdown;
        if self.machine.fault != Fault::NoLook {
            let flush = || {
                *tlb = None;
                Ok::<(), ()>(())
            };
            let _ = shootdown.flush_if_behind(self.number, flush).unwrap();
        }
    }

    /// A VM entry from `from`: to another place, or to the same after an exit.
    fn enter(&mut self, place: Place) {
        if self.machine.fault == Fault::PlaceAfterLook {
            self.look();
            self.machine.shootdown.go(self.number, place);
        } else {
            self.machine.shootdown.go(self.number, place);
            self.look();
        }
    }

    /// The guest uses its translation, which may be as old as the TLB is.
    fn run(&mut self) {
        let relied_on = self.machine.relied_on.load(Ordering::Acquire);
        let entry = &self.machine.entry;
        // A walk; what is not present is not cached.
        let cached = self.tlb.unwrap_or_else(|| entry.load(Ordering::Relaxed));
        if cached == EMPTY {
            return;
        }
        self.tlb = Some(cached);
        let frame = &self.machine.frames[cached as usize];
        // SAFETY: as for `Sync`.
        let found = frame.with(|value| unsafe { *value });
        assert_eq!(found, if cached == 0 { OLD } else { NEW }, "a frame of another life");
        assert!(relied_on == 0 || cached != 0, "a stale translation");
    }

    /// An exit that leads to another place than before.
    fn leave(&mut self, place: Place) {
        self.machine.shootdown.go(self.number, place);
    }
}

/// A frame leaves the shadow EPT and is used again, while a processor enters L2 and leaves it, with
/// an exit to L0 between.
fn frames_are_used_again(fault: Fault) {
    loom::model(move || {
        let machine = Machine::new(1, fault);
        let mut cpu = Processor::new(&machine, 0);
        // It has run L2 before.
        cpu.enter(Place::Shadow);
        cpu.run();
        cpu.leave(Place::Ept01);
        let runs = thread::spawn(move || {
            cpu.enter(Place::Shadow);
            cpu.run();
            cpu.enter(Place::Shadow);
            cpu.run();
            cpu.leave(Place::Ept01);
            cpu.enter(Place::Shadow);
            cpu.run();
        });
        if machine.change(EMPTY, Place::Shadow) {
            // SAFETY: as for `Sync`.
            machine.frames[0].with_mut(|value| unsafe { *value = NEW });
        }
        runs.join().unwrap();
    });
}

/// EPT01 changes, while a processor runs L1, then L2, then waits for a startup interrupt.
fn ept01_changes(fault: Fault) {
    loom::model(move || {
        let machine = Machine::new(1, fault);
        let mut cpu = Processor::new(&machine, 0);
        cpu.enter(Place::Ept01);
        cpu.run();
        let runs = thread::spawn(move || {
            cpu.run();
            cpu.enter(Place::Shadow);
            cpu.run();
            cpu.leave(Place::Outside);
            cpu.enter(Place::Ept01);
            cpu.run();
        });
        if machine.change(1, Place::Ept01) {
            machine.relied_on.store(1, Ordering::Release);
        }
        runs.join().unwrap();
    });
}

/// Two processors run; one of them takes a frame away in between, needs it at once, and flushes
/// before its own next entry only.
fn of_two_processors_one_acts(fault: Fault) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let machine = Machine::new(2, fault);
        let mut acts = Processor::new(&machine, 0);
        let mut other = Processor::new(&machine, 1);
        acts.enter(Place::Shadow);
        acts.run();
        let runs = thread::spawn(move || {
            other.enter(Place::Shadow);
            other.run();
            other.enter(Place::Shadow);
            other.run();
            other.leave(Place::Ept01);
        });
        machine.entry.store(EMPTY, Ordering::Relaxed);
        let request = machine.shootdown.request();
        let done = machine.shootdown.is_complete(request, Place::Shadow, Some(0));
        if done || fault == Fault::NoWait {
            // SAFETY: as for `Sync`.
            machine.frames[0].with_mut(|value| unsafe { *value = NEW });
        }
        acts.enter(Place::Shadow);
        acts.run();
        runs.join().unwrap();
    });
}

/// Two processors run, and enter and leave L2 as they like, while a third takes a frame away.
fn two_run_while_a_third_acts(fault: Fault) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let machine = Machine::new(2, fault);
        let mut threads = Vec::new();
        for number in 0..2 {
            let mut cpu = Processor::new(&machine, number);
            cpu.enter(Place::Shadow);
            cpu.run();
            threads.push(thread::spawn(move || {
                cpu.enter(Place::Shadow);
                cpu.run();
                cpu.leave(Place::Ept01);
                cpu.enter(Place::Shadow);
                cpu.run();
            }));
        }
        if machine.change(EMPTY, Place::Shadow) {
            // SAFETY: as for `Sync`.
            machine.frames[0].with_mut(|value| unsafe { *value = NEW });
        }
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// Two requests by two processors, each of which runs a guest in between.
fn two_act_at_once(fault: Fault) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let machine = Machine::new(2, fault);
        let mut cpus = [0, 1].map(|number| Processor::new(&machine, number));
        for cpu in &mut cpus {
            cpu.enter(Place::Ept01);
            cpu.run();
        }
        let [first, second] = cpus;
        let act = |mut cpu: Processor, own: usize| {
            move || {
                let machine = cpu.machine.clone();
                cpu.run();
                machine.entry.store(1, Ordering::Relaxed);
                let request = machine.shootdown.request();
                cpu.enter(Place::Shadow);
                cpu.run();
                let complete = machine.shootdown.is_complete(request, Place::Ept01, Some(own));
                if complete || machine.fault == Fault::NoWait {
                    machine.relied_on.store(1, Ordering::Release);
                }
                cpu.run();
            }
        };
        let other = thread::spawn(act(second, 1));
        act(first, 0)();
        other.join().unwrap();
    });
}

#[test]
fn a_frame_is_used_again_only_once_no_tlb_leads_to_it() {
    frames_are_used_again(Fault::None);
}

#[test]
fn a_change_of_ept01_that_is_complete_is_seen_by_all() {
    ept01_changes(Fault::None);
}

#[test]
fn a_processor_that_acts_needs_to_flush_at_its_next_entry_only() {
    of_two_processors_one_acts(Fault::None);
}

#[test]
fn all_who_run_have_to_flush() {
    two_run_while_a_third_acts(Fault::None);
}

#[test]
fn requests_of_several_processors_do_not_hide_each_other() {
    two_act_at_once(Fault::None);
}

/// Each of these breaks one step, and must be found.
macro_rules! must_be_found {
    ($($name:ident: $model:ident, $fault:ident, $why:literal;)*) => {$(
        #[test]
        #[should_panic(expected = $why)]
        fn $name() {
            $model(Fault::$fault);
        }
    )*};
}

must_be_found! {
    without_fences_a_frame_is_reused_early:
        frames_are_used_again, NoFences, "Causality violation";
    without_fences_a_change_is_relied_on_early: ept01_changes, NoFences, "a stale translation";
    a_place_told_after_the_look_is_too_late:
        frames_are_used_again, PlaceAfterLook, "Causality violation";
    a_place_told_after_the_look_is_too_late_for_ept01:
        ept01_changes, PlaceAfterLook, "a stale translation";
    a_processor_that_does_not_look_uses_a_frame_of_another:
        frames_are_used_again, NoLook, "Causality violation";
    one_that_acts_and_does_not_look_is_found_too:
        of_two_processors_one_acts, NoLook, "a frame of another life";
    a_request_made_too_early_is_none:
        frames_are_used_again, RequestBeforeChange, "Causality violation";
    a_frame_that_does_not_wait_is_reused_early: frames_are_used_again, NoWait, "Causality violation";
    one_that_acts_alone_has_to_wait_for_the_other:
        of_two_processors_one_acts, NoWait, "Causality violation";
    of_two_one_that_tells_its_place_late_is_found:
        two_run_while_a_third_acts, PlaceAfterLook, "Causality violation";
    two_that_do_not_wait_are_found: two_act_at_once, NoWait, "a stale translation";
    ept01_concerns_processors_in_l1_too: ept01_changes, WaitForShadowOnly, "a stale translation";
}
