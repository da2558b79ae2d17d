//! Is what a platform did one of the things that the architecture allows?
//!
//! Where software leaves a stale mapping, a processor may use it or not, and no two machines need
//! give the same trace. [`Checked`] follows another platform, operation by operation, and knows at
//! each one *every* answer that a processor could give: an entry of a paging structure may have been
//! cached at any time since the last operation that must have invalidated it, also by a processor
//! that ran ahead of its program, so each of the values that it has had since then may be used. An
//! answer that is none of these is a failure, and so is a word of memory that no allowed answer
//! leaves like this.
//!
//! The set is computed for each access from the history of the words in memory and the log of
//! invalidations. It may be too large in one way: values of several entries of one walk are combined
//! freely, though not all of them need have stood at the same time.

use std::collections::BTreeSet;
use std::rc::Rc;

use rustc_hash::FxHashMap;
use vmx_defs::ept::{EptEntry, Eptp};
use vmx_defs::{Field, Gva, Hpa, L1Gpa};

use crate::addr::Gpa;
use crate::caches::Space;
use crate::caps::ModelCaps;
use crate::machine::Platform;
use crate::memory::Memory;
use crate::operation::Operation;
use crate::paging::Mode;
use crate::processor::{Outcome, Processor};
use crate::registers::{Registers, cr0, cr4, rflags};
use crate::retention::Retention;

/// Choices that an execution makes: those planned, then the first of each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Chooser {
    plan: Vec<usize>,
    /// What was chosen, and of how many.
    taken: Vec<(usize, usize)>,
    /// The choices contradict each other: no processor does this.
    impossible: bool,
    /// Words of memory as they are known to be afterwards.
    known: Rc<FxHashMap<usize, u64>>,
    /// Indices of the words that were read as entries of tables.
    read: Vec<usize>,
    /// A value was used that only a global translation can still hold.
    needs_global: bool,
}

impl Chooser {
    fn choose(&mut self, count: usize) -> usize {
        if self.impossible {
            // Whatever comes now makes it no better.
            return 0;
        }
        let chosen = self.plan.get(self.taken.len()).copied().unwrap_or(0);
        self.taken.push((chosen, count));
        chosen
    }

    /// The plan after this one, in order; `None` after the last.
    fn next_plan(mut self) -> Option<Vec<usize>> {
        while let Some((chosen, count)) = self.taken.pop() {
            if chosen + 1 < count {
                let mut plan: Vec<_> = self.taken.iter().map(|(chosen, _)| *chosen).collect();
                plan.push(chosen + 1);
                return Some(plan);
            }
        }
        None
    }
}

/// Since when a value may be cached: as a translation of its own address space, or as a global one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Horizon {
    own: u64,
    global: u64,
}

impl Processor {
    /// Since when entries of paging structures may be cached for a linear address.
    pub(crate) fn linear_horizon(&self, space: Space, gva: Gva) -> Horizon {
        if self.chooser.is_none() {
            return Horizon { own: 0, global: 0 };
        }
        let own = self.caches.since(space, gva, false);
        Horizon { own, global: self.caches.since(space, gva, true).min(own) }
    }

    /// Since when entries of EPT may be cached for a guest-physical address: as a guest-physical
    /// mapping, or in the combined mapping of the linear address that is translated.
    pub(crate) fn ept_horizon(&self, eptp: Eptp, gpa: Gpa, linear: Option<Gva>) -> u64 {
        if self.chooser.is_none() {
            return 0;
        }
        let guest = self.caches.since_guest(eptp.table(), gpa, u64::MAX);
        let Some(gva) = linear else { return guest };
        // A combined mapping may have been made, when it could first be, of a guest-physical one.
        let horizon = self.linear_horizon(self.space(), gva);
        self.caches.since_guest(eptp.table(), gpa, horizon.own.min(horizon.global))
    }

    /// A flag is about to be set in an entry, to this value.
    pub(crate) fn judge_mark(&mut self, at: Hpa, value: u64) {
        if let Some(chooser) = &mut self.chooser {
            let shift = (at.as_u64() & 4) * 8;
            let known = chooser.known.get(&((at.as_u64() >> 3) as usize));
            let wrong = known.is_some_and(|known| (value << shift) & !known & MARKS << shift != 0);
            chooser.impossible |= wrong;
        }
    }

    /// An entry of a paging structure: the present one, or one that may be cached.
    pub(crate) fn table_entry(
        &mut self,
        memory: &Memory,
        at: Hpa,
        size: u8,
        horizon: Horizon,
    ) -> u64 {
        const ACCESSED: u64 = 1 << 5;
        let present = memory.read_sized(at, size);
        let Some(chooser) = &mut self.chooser else { return present };
        chooser.read.push((at.as_u64() >> 3) as usize);
        // What is cached is present and accessed.
        let cacheable = |value: &u64| value & 1 != 0 && value & ACCESSED != 0;
        let mut values = memory.past_values(at, size, horizon.global);
        values.retain(cacheable);
        match chooser.choose(values.len() + 1).checked_sub(1) {
            None => present,
            Some(index) => {
                let value = values[index];
                chooser.needs_global |= !memory.past_values(at, size, horizon.own).contains(&value);
                value
            }
        }
    }

    /// An entry of EPT: the present one, or one that may be cached.
    pub(crate) fn ept_entry(
        &mut self,
        memory: &Memory,
        at: Hpa,
        flags: bool,
        since: u64,
    ) -> EptEntry {
        let present = EptEntry::from(memory.read_u64(at));
        let Some(chooser) = &mut self.chooser else { return present };
        chooser.read.push((at.as_u64() >> 3) as usize);
        let mut values = memory.past_values(at, 8, since);
        values.retain(|value| {
            let entry = EptEntry::from(*value);
            entry.is_present() && (!flags || entry.accessed())
        });
        match chooser.choose(values.len() + 1).checked_sub(1) {
            None => present,
            Some(index) => EptEntry::from(values[index]),
        }
    }

    /// Where `wrong`, the choices made so far are not ones that a processor can make.
    pub(crate) fn refuse_choice(&mut self, wrong: bool) {
        if let Some(chooser) = &mut self.chooser {
            chooser.impossible |= wrong;
        }
    }

    /// A walk has come to its last entry, which is global or not.
    pub(crate) fn judge_global(&mut self, global: bool) {
        if let Some(chooser) = &mut self.chooser {
            chooser.impossible |= std::mem::take(&mut chooser.needs_global) && !global;
        }
    }

    /// The registers that a translation may have been cached with, if they are not the present
    /// ones: those of another CR3, say, that had the same PCID.
    pub(crate) fn past_context(&mut self, space: Space, horizon: Horizon) -> Option<Context> {
        let now = Context::of(self);
        let chooser = self.chooser.as_mut()?;
        let mut choices: Vec<(bool, Context)> = Vec::new();
        let ends = self.contexts.iter().skip(1).map(|(from, _)| *from).chain([u64::MAX]);
        for ((_, context), end) in self.contexts.iter().zip(ends) {
            let tags = context.space.vpid == space.vpid && context.space.ept == space.ept;
            if !tags || !context.paging || end <= horizon.global || context.walks_like(&now) {
                continue;
            }
            let needs_global = context.space.pcid != space.pcid || end <= horizon.own;
            if !choices.contains(&(needs_global, *context)) {
                choices.push((needs_global, *context));
            }
        }
        let (needs_global, context) = choices[chooser.choose(choices.len() + 1).checked_sub(1)?];
        chooser.needs_global |= needs_global;
        Some(context)
    }

    /// Carries out a walk of EPT in every way that is possible, and chooses among those that end
    /// differently: most choices inside it make no difference.
    pub(crate) fn choose_walk<T: Copy + PartialEq>(
        &mut self,
        memory: &mut Memory,
        walk: impl Fn(&mut Self, &mut Memory) -> T,
    ) -> T {
        let outer = self.chooser.take();
        let known = outer.as_ref().map(|outer| Rc::clone(&outer.known)).unwrap_or_default();
        // A flag that is set stays set, for as long as the operation goes on.
        let fits = |changed: &FxHashMap<usize, u64>| {
            changed
                .iter()
                .all(|(index, value)| known.get(index).is_none_or(|known| value & !known == 0))
        };
        let mark = memory.mark();
        let mut ends: Vec<(T, FxHashMap<usize, u64>)> = Vec::new();
        let mut plan = Some(Vec::new());
        let mut last = None;
        let mut read = Vec::new();
        while let Some(planned) = plan {
            self.chooser = Some(Box::new(Chooser { plan: planned, ..Chooser::default() }));
            let end = (walk(self, memory), memory.take_back_to(mark));
            let chooser = self.chooser.take().map(|chooser| *chooser).unwrap_or_default();
            read.extend(chooser.read.iter().copied());
            last = Some(end.0);
            if !chooser.impossible && fits(&end.1) && !ends.contains(&end) {
                ends.push(end);
            }
            plan = chooser.next_plan();
        }
        self.chooser = outer;
        if let Some(chooser) = &mut self.chooser {
            chooser.read.extend(read);
        }
        let chosen = match &mut self.chooser {
            Some(chooser) if ends.len() > 1 => chooser.choose(ends.len()),
            _ => 0,
        };
        match (ends.get(chosen), last) {
            (Some((end, changed)), _) => {
                for (index, value) in changed {
                    memory.write_u64(Hpa::new(*index as u64 * 8), *value);
                }
                *end
            }
            (None, Some(last)) => {
                self.refuse_choice(true);
                last
            }
            (None, None) => unreachable!("the first plan is tried always"),
        }
    }

    /// How many entries of an EPT walk, from the top, need not be marked although the EPTP enables
    /// flags: those that a mapping may come from that was cached, with the same EP4TA, under an EPTP
    /// that does not.
    pub(crate) fn unmarked(&mut self, eptp: Eptp, since: u64) -> usize {
        let Some(chooser) = &mut self.chooser else { return 0 };
        let ends = self.contexts.iter().skip(1).map(|(from, _)| *from).chain([u64::MAX]);
        let was_off = self.contexts.iter().zip(ends).any(|((_, context), end)| {
            end > since && context.space.ept == Some(eptp.table()) && !context.ept_flags
        });
        if eptp.accessed_dirty() && was_off { chooser.choose(5) } else { 0 }
    }

    /// Writes down the present context, after an operation.
    fn note_context(&mut self, now: u64) {
        let context = Context::of(self);
        if self.contexts.last().is_none_or(|(_, last)| *last != context) {
            self.contexts.push((now, context));
        }
    }
}

/// The registers that a walk depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Context {
    pub(crate) space: Space,
    ept_flags: bool,
    paging: bool,
    pub(crate) mode: Mode,
    pub(crate) cr3: u64,
    pub(crate) pdptes: [u64; 4],
    pub(crate) globals: bool,
}

impl Context {
    fn of(processor: &Processor) -> Self {
        let regs = &processor.regs;
        Self {
            space: processor.space(),
            ept_flags: processor.eptp().is_some_and(|eptp| eptp.accessed_dirty()),
            paging: regs.cr0 & cr0::PG != 0,
            mode: processor.paging_mode(),
            cr3: regs.cr3 & !0xfff,
            pdptes: regs.pdptes,
            globals: regs.cr4 & cr4::PGE != 0,
        }
    }

    /// Whether a walk in both goes the same way.
    fn walks_like(&self, other: &Self) -> bool {
        let roots = if self.mode == Mode::Pae {
            self.pdptes == other.pdptes
        } else {
            self.cr3 == other.cr3
        };
        self.mode == other.mode && roots && self.globals == other.globals
    }
}

/// What was not allowed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disallowed {
    /// Number of the operation, counted from 1.
    pub number: u64,
    /// The processor.
    pub processor: usize,
    /// What it executed.
    pub operation: Operation,
    /// What the platform said became of it.
    pub outcome: Outcome,
    /// What might have become of it.
    pub allowed: Vec<Outcome>,
    /// A word of memory that no allowed execution leaves as it is, with its value.
    pub word: Option<(L1Gpa, u64)>,
}

/// A platform that is watched.
#[derive(Debug)]
pub struct Checked<P> {
    inner: P,
    memory: Memory,
    /// For each processor, all the states that it may be in.
    states: Vec<Vec<Processor>>,
    /// Indices of all words that were read as entries of tables, or look like present ones from the
    /// start: a platform may mark entries on a way that no execution need have gone.
    entries: BTreeSet<usize>,
    now: u64,
    failure: Option<Disallowed>,
}

/// The accessed and dirty flags of paging structures.
const MARKS: u64 = 3 << 5;

/// Flags that may be found set in an entry without an access that needs them: accessed flags, which
/// a processor may set ahead of its program, and the dirty flag of EPT, which a hypervisor may set
/// for a write that its processor tried through a stale mapping, and which does then not take place
/// there. Software that looks at the flags takes one too many for a write.
const AHEAD: [u64; 4] = [1 << 8, 1 << 9, 3 << 8, 1 << 5];

/// Executions that are tried of one operation, at most.
const EXECUTIONS: usize = 4_000;

/// Executions and walks that are tried of one program, at most, which takes seconds. Few programs
/// need a tenth; some would need millions of times as many.
const TRIALS: u64 = 60_000;

impl<P: Platform> Checked<P> {
    /// Watches a platform that has memory of `pages` pages of zeros, and processors with these
    /// abilities and registers.
    pub fn new(
        inner: P,
        caps: &ModelCaps,
        pages: usize,
        registers: impl IntoIterator<Item = Registers>,
    ) -> Self {
        let mut memory = Memory::new(pages);
        memory.keep_record();
        let state = |registers| vec![Processor::new(caps.clone(), Retention::Nothing, registers)];
        let states = registers.into_iter().map(state).collect();
        Self { inner, memory, states, entries: BTreeSet::new(), now: 0, failure: None }
    }

    /// The first thing that was not allowed.
    pub fn failure(&self) -> Option<&Disallowed> {
        self.failure.as_ref()
    }

    /// The first word of a page that is not as the allowed executions left it: its address, what is
    /// there, and what ought to be. Not for pages that hold a VMCS.
    pub fn difference(&mut self, page: L1Gpa) -> Option<(L1Gpa, u64, u64)> {
        let start = page.page().as_u64();
        (start..start + 0x1000).step_by(8).map(L1Gpa::new).find_map(|at| {
            let (is, ought) = (self.inner.peek(at), self.memory.read_u64(Hpa::new(at.as_u64())));
            (is != ought).then_some((at, is, ought))
        })
    }

    /// Whether there was too much to try: what came after that has not been judged.
    pub fn gave_up(&self) -> bool {
        self.memory.trials() > TRIALS
    }

    /// The platform.
    pub fn into_inner(self) -> P {
        self.inner
    }

    fn follow(&mut self, number: usize, operation: &Operation, outcome: Outcome) {
        self.now += 1;
        let mut allowed = Vec::new();
        let mut candidates: Vec<(Processor, FxHashMap<usize, u64>)> = Vec::new();
        // Words that the platform, or some execution, changes, as the platform left them.
        let mut known: Rc<FxHashMap<usize, u64>> = Rc::default();
        for index in &self.entries {
            let value = self.inner.peek(L1Gpa::new(*index as u64 * 8));
            if value != self.memory.word(*index) {
                Rc::make_mut(&mut known).insert(*index, value);
            }
        }
        let mut word = None;
        // Only a VM exit leaves something to be seen later than the outcome.
        let hides = matches!(outcome, Outcome::Exit(_) | Outcome::Stopped);
        for state in &self.states[number] {
            let mut plan = Some(Vec::new());
            if self.gave_up() {
                return;
            }
            let mut executions = 0;
            while let Some(planned) = plan
                && executions < EXECUTIONS
                && self.memory.trials() <= TRIALS
            {
                executions += 1;
                let mut processor = state.clone();
                processor.caches.set_time(self.now);
                let chooser =
                    Chooser { plan: planned, known: Rc::clone(&known), ..Chooser::default() };
                processor.chooser = Some(Box::new(chooser));
                let ended = processor.execute(&mut self.memory, operation);
                let changed = self.memory.take_back();
                processor.note_context(self.now);
                let chooser = processor.chooser.take().map(|chooser| *chooser).unwrap_or_default();
                let mut grown = false;
                // How a processor stores a VMCS is its own affair.
                let clears = matches!(operation, Operation::Vmclear { .. });
                for index in changed.keys().filter(|_| !clears) {
                    if !known.contains_key(index) {
                        let value = self.inner.peek(L1Gpa::new(*index as u64 * 8));
                        Rc::make_mut(&mut known).insert(*index, value);
                        grown = true;
                    }
                }
                for index in &chooser.read {
                    if self.entries.insert(*index) {
                        let value = self.inner.peek(L1Gpa::new(*index as u64 * 8));
                        if value != self.memory.word(*index) {
                            grown |= Rc::make_mut(&mut known).insert(*index, value).is_none();
                        }
                    }
                }
                if !chooser.impossible {
                    if !allowed.contains(&ended) {
                        allowed.push(ended);
                    }
                    if is_same(operation, ended, outcome) {
                        candidates.push((processor, changed));
                        if !hides && self.fits(&known, &mut candidates, &mut word) {
                            break;
                        }
                    }
                }
                // What is known prunes choices: plans made with less mean something else.
                plan = if grown { Some(Vec::new()) } else { chooser.next_plan() };
            }
        }
        if self.gave_up() {
            return;
        }
        self.fits(&known, &mut candidates, &mut word);
        let Some((_, changed)) = candidates.first() else {
            self.failure = Some(Disallowed {
                number: self.now,
                processor: number,
                operation: *operation,
                outcome,
                allowed,
                word,
            });
            return;
        };
        self.memory.commit(self.now, changed);
        let states = &mut self.states[number];
        states.clear();
        for (processor, _) in candidates {
            if !states.iter().any(|other| other.is_same(&processor)) {
                states.push(processor);
            }
        }
    }

    /// Keeps the candidates that leave memory as the platform did; whether the last one does.
    fn fits(
        &self,
        known: &FxHashMap<usize, u64>,
        candidates: &mut Vec<(Processor, FxHashMap<usize, u64>)>,
        word: &mut Option<(L1Gpa, u64)>,
    ) -> bool {
        let mut last = false;
        candidates.retain_mut(|(_, changed)| {
            let wrong = known.iter().find(|(index, value)| {
                let ours = changed.get(*index).copied().unwrap_or(self.memory.word(**index));
                let ahead = self.entries.contains(*index)
                    && AHEAD.into_iter().any(|flags| ours | flags == **value);
                if ours != **value && ahead {
                    changed.insert(**index, **value);
                }
                ours != **value && !ahead
            });
            if let Some((index, value)) = wrong {
                *word = Some((L1Gpa::new(*index as u64 * 8), *value));
            }
            last = wrong.is_none();
            last
        });
        last
    }
}

/// Whether two outcomes are the same to software, which time and RF after a triple fault are not.
fn is_same(operation: &Operation, ours: Outcome, theirs: Outcome) -> bool {
    if ours == theirs {
        return true;
    }
    let (Outcome::Completed { value, flags }, Outcome::Completed { value: other, flags: seen }) =
        (ours, theirs)
    else {
        return false;
    };
    flags == seen
        && match operation {
            Operation::Rdtsc | Operation::Rdtscp => true,
            Operation::Vmread { encoding }
                if *encoding == Field::GUEST_RFLAGS.encoding().into() =>
            {
                (value ^ other) & !rflags::RF == 0
            }
            _ => false,
        }
}

impl<P: Platform> Platform for Checked<P> {
    fn execute(&mut self, processor: usize, operation: &Operation) -> Outcome {
        let outcome = self.inner.execute(processor, operation);
        if self.failure.is_none() && !self.gave_up() {
            self.follow(processor, operation, outcome);
        }
        outcome
    }

    fn peek(&mut self, at: L1Gpa) -> u64 {
        self.inner.peek(at)
    }

    fn poke(&mut self, at: L1Gpa, value: u64) {
        self.inner.poke(at, value);
        self.memory.write_u64(Hpa::new(at.as_u64()), value);
        let changed = self.memory.take_back();
        self.memory.commit(self.now, &changed);
        if value & 1 != 0 {
            self.entries.insert((at.as_u64() >> 3) as usize);
        }
    }
}
