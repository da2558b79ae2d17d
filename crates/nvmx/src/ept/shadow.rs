//! How is a shadow EPT composed from L1's EPT and EPT01, and kept within what a TLB may hold?
//!
//! Shadow tables are shared between roots as L1 shares its tables: a table is found by the L1 page
//! it shadows, its level and its role. Nothing of EPT12 is write-protected. Growth is found by EPT
//! violation. A shadow entry is a pure function of one L1 entry and of EPT01, so that composing it
//! again and comparing with what stands there says all a snapshot could; and most entries differ
//! from L1's by the same bits, so that not even this is needed to see that L1 changed nothing.
//!
//! What may be stale, and how long? A processor caches mappings of an EP4TA only while it runs L2 on
//! it, and keeps them until an INVEPT there. So an entry may be used by a root, on a processor, if
//! it was composed while the root was in use on that processor and no INVEPT has come since. When a
//! root comes into use, entries that fail this are composed anew, and only those:
//!
//! - after an INVEPT of L1, all that the root reaches. Not at the INVEPT itself: L1 may invalidate
//!   first and change its tables then, since nothing is cached before its next VM entry;
//! - else, the tables that got entries while the root was not in use, by another root that shares
//!   them or on another processor;
//! - a table that was there already and is linked into a root, since the root had nothing cached
//!   through it.
//!
//! Where nothing was composed since, which is the rule when L2 switches among warm roots, this is
//! one comparison.

mod ept01;
mod fill;
mod reclaim;
mod renew;

use super::compose::{EMPTY, set_flags};
use super::pool::{Pool, Table, TableId, TableKey, bits, mix};
use super::role::Role;
use super::walk::{Walk, WalkRules, index, qualification, walk, wanted};
use crate::host::{Host, HostError, HostResult, InvEpt};
use crate::shootdown::{Place, Request, Shootdown};
use alloc::sync::Arc;
use alloc::vec::Vec;
use hashbrown::HashTable;
use vmx_defs::ept::{EptEntry, EptPermissions, EptViolation, Eptp, memory_type};
use vmx_defs::{Hpa, L1Gpa, L2Gpa};

/// A fill takes at most three tables below the root and two for a split page.
const FRAMES_PER_FILL: usize = 5;

/// How often a walk starts again because L1 changed an entry while its flags were being set. After
/// that L2 runs on and meets the violation again.
const WALK_RETRIES: u32 = 8;

/// What became of an EPT violation or misconfiguration of L2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// The shadow EPT now maps the address: L2 goes on.
    Filled,
    /// L1's own tables deny the access: this is the qualification that L1 gets.
    Violation(EptViolation),
    /// L1's own tables are misconfigured.
    Misconfiguration,
    /// L1's tables allow the access to this address, but EPT01 denies it: L0's own memory, or a page
    /// whose writes are tracked.
    Hidden(L1Gpa),
}

/// Counts of what the shadow MMU did, for the counters of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShadowCounters {
    /// EPT violations answered by composing entries.
    pub fills: u64,
    /// Shadow entries composed.
    pub entries: u64,
    /// Roots built.
    pub roots_built: u64,
    /// Roots given up.
    pub roots_dropped: u64,
    /// INVEPT instructions executed by the engine.
    pub invepts: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct RootId(u32);

#[derive(Clone, Copy, Debug)]
struct Root {
    eptp12: Eptp,
    table: TableId,
    eptp02: Eptp,
    used: u64,
}

/// What the shadow MMU knows of a processor.
#[derive(Clone, Debug)]
struct Processor {
    /// The root that L2 runs on, while it does.
    root: Option<RootId>,
    /// When L1 last executed an all-context INVEPT on it.
    invalidated: u64,
    /// For each root, when it was last in use here; [`NEVER`] after an INVEPT.
    last_use: Vec<u64>,
}

impl Processor {
    fn new(roots: usize) -> Self {
        Self { root: None, invalidated: NEVER, last_use: alloc::vec![NEVER; roots] }
    }

    /// Stamps a use of the root.
    #[inline]
    fn used(&mut self, id: RootId, stamp: u64) {
        if let Some(last_use) = self.last_use.get_mut(id.0 as usize) {
            *last_use = stamp;
        }
    }
}

/// Where a root was found last, for the next look-up of the same place in L1's memory. May be stale
/// or name nothing: it is verified at each use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RootHint(RootId);

impl Default for RootHint {
    fn default() -> Self {
        Self(RootId(u32::MAX))
    }
}

/// The stamp of a root that has nothing it may use without composing it anew.
const NEVER: u64 = 0;

/// The shadow MMU of one virtual machine: all of its roots and tables.
#[derive(Debug)]
pub struct Shadow {
    rules: WalkRules,
    pool: Pool,
    roots: Vec<Option<Root>>,
    free_roots: Vec<u32>,
    root_index: HashTable<u32>,
    processors: Vec<Processor>,
    /// Counts the events that are put in order: uses of roots and compositions.
    clock: u64,
    /// When an entry was last composed that others than the root in use may reach.
    last_change: u64,
    counters: ShadowCounters,
    /// Which processors have flushed since what.
    shootdown: Arc<Shootdown>,
}

impl Shadow {
    /// A shadow MMU on the `frames` frames from `base` on, which no guest can reach and which hold
    /// nothing else, with at most `roots` roots, for `processors` processors.
    pub fn new(rules: WalkRules, base: Hpa, frames: u32, roots: u32, processors: usize) -> Self {
        let count = roots as usize;
        Self {
            rules,
            pool: Pool::new(base, frames),
            roots: alloc::vec![None; count],
            free_roots: (0..roots).rev().collect(),
            // Twice: a table that is never more than half full never grows.
            root_index: HashTable::with_capacity(2 * count),
            processors: alloc::vec![Processor::new(count); processors],
            clock: NEVER,
            last_change: NEVER,
            counters: ShadowCounters::default(),
            shootdown: Arc::new(Shootdown::new(processors)),
        }
    }

    /// What was done so far.
    pub fn counters(&self) -> ShadowCounters {
        self.counters
    }

    /// Number of table frames in use, and of roots.
    pub fn usage(&self) -> (usize, usize) {
        let tables = self.pool.capacity() - self.pool.available() - self.pool.waiting();
        (tables, self.roots.len() - self.free_roots.len())
    }

    fn root(&self, id: RootId) -> Option<Root> {
        self.roots.get(id.0 as usize).copied().flatten()
    }

    #[inline]
    fn find_root(&self, eptp: Eptp) -> Option<RootId> {
        let same = |id: &u32| {
            self.roots
                .get(*id as usize)
                .is_some_and(|root| root.as_ref().is_some_and(|root| root.eptp12 == eptp))
        };
        self.root_index.find(mix(eptp.into_bits()), same).map(|id| RootId(*id))
    }

    fn current(&self, processor: usize) -> Option<Root> {
        self.processors.get(processor)?.root.and_then(|id| self.root(id))
    }

    /// Whether the hint names the root of this very EPTP, so that the EPTP needs no validation: a
    /// root is only ever built for a valid one.
    #[inline]
    pub(crate) fn confirms(&self, hint: RootHint, eptp: Eptp) -> bool {
        matches!(self.roots.get(hint.0.0 as usize), Some(Some(root)) if root.eptp12 == eptp)
    }

    /// The one place where a processor comes to run on another root: L1's VM entry and L2's VMFUNC
    /// both end here (S1). Finds the root of this EPTP value, which must be valid, or begins one;
    /// discards none (S2). Returns the EPTP for the processor, and leaves in `hint` where the root
    /// was found; `None` where a new root has to wait until other processors have let go of frames,
    /// so that the guest has to try again.
    ///
    /// # Errors
    /// [`HostError`] of the flush that a reclaim may need.
    #[inline(always)]
    pub fn switch(
        &mut self,
        host: &mut impl Host,
        processor: usize,
        eptp: Eptp,
        hint: &mut RootHint,
    ) -> HostResult<Option<Eptp>> {
        if !self.confirms(*hint, eptp) {
            let id = match self.find_root(eptp) {
                Some(id) => id,
                None => match self.build_root(host, processor, eptp)? {
                    Some(id) => id,
                    None => return Ok(None),
                },
            };
            *hint = RootHint(id);
        }
        let id = hint.0;
        self.clock += 1;
        let clock = self.clock;
        let Some(Some(root)) = self.roots.get_mut(id.0 as usize) else {
            return Err(HostError::WrongState);
        };
        root.used = clock;
        let (table, eptp02) = (root.table, root.eptp02);
        let state = self.processors.get_mut(processor).ok_or(HostError::WrongState)?;
        let before = state.root.replace(id);
        if before != Some(id) {
            if let Some(before) = before {
                state.used(before, clock);
            }
            let last_use = state.last_use.get(id.0 as usize).copied().unwrap_or(NEVER);
            let since = if last_use <= state.invalidated { NEVER } else { last_use };
            if since == NEVER || self.last_change > since {
                self.renew(host, table, since);
            }
        }
        Ok(Some(eptp02))
    }

    #[cold]
    fn build_root(
        &mut self,
        host: &mut impl Host,
        processor: usize,
        eptp: Eptp,
    ) -> HostResult<Option<RootId>> {
        if self.free_roots.is_empty() {
            self.drop_oldest(host);
        }
        if !self.reserve(host, processor, 1)? {
            return Ok(None);
        }
        let key = TableKey { l1: L1Gpa::new(eptp.table()), level: 4, role: Role::root(eptp) };
        let table = self.pool.take(key).ok_or(HostError::OutOfFrames)?;
        host.fill(self.pool.hpa(table), EMPTY);
        self.retain(table);
        let id = self.free_roots.pop().ok_or(HostError::OutOfFrames)?;
        // Structures are ours and write-back; bit 6 is L1's, since it makes guest page walks count
        // as writes.
        let eptp02 = Eptp::new()
            .with_memory_type(memory_type::WB)
            .with_walk_length_minus_1(3)
            .with_accessed_dirty(eptp.accessed_dirty())
            .with_frame(self.pool.hpa(table).as_u64() >> 12);
        if let Some(slot) = self.roots.get_mut(id as usize) {
            *slot = Some(Root { eptp12: eptp, table, eptp02, used: self.clock });
        }
        let roots = &self.roots;
        let rehash = |id: &u32| match roots.get(*id as usize) {
            Some(Some(root)) => mix(root.eptp12.into_bits()),
            _ => 0,
        };
        self.root_index.insert_unique(mix(eptp.into_bits()), id, rehash);
        // An empty root has nothing stale.
        self.clock += 1;
        let clock = self.clock;
        for processor in &mut self.processors {
            processor.used(RootId(id), clock);
        }
        self.counters.roots_built += 1;
        Ok(Some(RootId(id)))
    }

    /// Which processors have flushed since what was taken away.
    pub fn shootdown(&self) -> &Arc<Shootdown> {
        &self.shootdown
    }

    /// The processor is about to run L2 on the root that [`Self::switch`] found, having run L1.
    /// [`Self::flush_if_behind`] must follow.
    #[inline]
    pub fn enter(&mut self, processor: usize) {
        self.shootdown.go(processor, Place::Shadow);
    }

    /// To be called before each VM entry, after all else: flushes if this was asked for since it
    /// last did. Returns the last request, for which it now has.
    ///
    /// # Errors
    /// [`HostError::InvEpt`].
    #[inline]
    pub fn flush_if_behind(
        &mut self,
        host: &mut impl Host,
        processor: usize,
    ) -> HostResult<Request> {
        let counters = &mut self.counters;
        self.shootdown.flush_if_behind(processor, || {
            counters.invepts += 1;
            host.invept(InvEpt::All)
        })
    }

    /// The processor runs L2 no longer: its root may be reclaimed.
    #[inline]
    pub fn leave(&mut self, processor: usize) {
        let Some(state) = self.processors.get_mut(processor) else { return };
        if let Some(id) = state.root.take() {
            self.clock += 1;
            state.used(id, self.clock);
            self.shootdown.go(processor, Place::Ept01);
        }
    }

    /// Answers an EPT violation or misconfiguration that L2 met on the shadow EPT.
    ///
    /// # Errors
    /// [`HostError::WrongState`] where the processor runs on no root; those of INVEPT.
    pub fn violation(
        &mut self,
        host: &mut impl Host,
        processor: usize,
        gpa: L2Gpa,
        hardware: EptViolation,
    ) -> HostResult<Resolution> {
        let root = self.current(processor).ok_or(HostError::WrongState)?;
        let flags = root.eptp12.accessed_dirty();
        let wanted = wanted(hardware, flags);
        if !gpa.fits(48) {
            // A 4-level EPT translates 48 bits.
            let none = EptPermissions::empty();
            return Ok(Resolution::Violation(qualification(hardware, none, flags)));
        }
        for _ in 0..WALK_RETRIES {
            let path = match walk(host, self.rules, root.eptp12, gpa) {
                Walk::Page(path) if path.permissions().contains(wanted) => path,
                Walk::Page(path) | Walk::NotPresent(path) => {
                    self.forget(host, root.eptp12, gpa)?;
                    let told = qualification(hardware, path.permissions(), flags);
                    return Ok(Resolution::Violation(told));
                }
                Walk::Misconfigured(_) => {
                    self.forget(host, root.eptp12, gpa)?;
                    return Ok(Resolution::Misconfiguration);
                }
            };
            let write = wanted.contains(EptPermissions::WRITE);
            let Some(path) = (if flags { set_flags(host, &path, write) } else { Some(path) })
            else {
                continue;
            };
            if !self.reserve(host, processor, FRAMES_PER_FILL)? {
                // Every frame waits for another processor's flush. L2 meets the violation again.
                return Ok(Resolution::Filled);
            }
            self.counters.fills += 1;
            let rights = self.fill(host, root.table, &path, gpa)?;
            return Ok(if rights.contains(wanted) {
                Resolution::Filled
            } else {
                Resolution::Hidden(path.target(gpa))
            });
        }
        Ok(Resolution::Filled)
    }

    /// Stores an entry, counts the reference of a new pointer, gives up that of the old one, and
    /// keeps `live` right.
    fn set(&mut self, host: &mut impl Host, table: TableId, at: usize, level: u8, value: u64) {
        let hpa = self.pool.hpa(table);
        let old = host.load(hpa, at);
        if old == value {
            return;
        }
        host.store(hpa, at, value);
        if value != EMPTY {
            self.counters.entries += 1;
            self.note_change(table);
        }
        if let Some(table) = self.pool.get_mut(table)
            && let (Some(live), Some(alike)) =
                (table.live.get_mut(at / 64), table.alike.get_mut(at / 64))
        {
            let bit = 1 << (at % 64);
            if value == EMPTY {
                *live &= !bit
            } else {
                *live |= bit
            }
            *alike &= !bit;
        }
        let (new, old) = (self.child(level, value), self.child(level, old));
        if new == old {
            return;
        }
        if let Some(child) = new {
            self.retain(child);
            let shared = |id| self.pool.get(id).is_some_and(|table: &Table| table.shared);
            if shared(table) || self.pool.get(child).is_some_and(|child| child.references > 1) {
                self.share(host, child);
            }
        }
        if let Some(child) = old {
            self.release(host, child);
        }
    }

    /// Stamps a table and all below it as changed.
    fn note_link(&mut self, host: &mut impl Host, id: TableId, stamp: u64) {
        let Some(table) = self.pool.get_mut(id) else { return };
        if table.changed == stamp {
            return;
        }
        table.changed = stamp;
        let (level, live) = (table.key.level, table.live);
        if level > 1 {
            let hpa = self.pool.hpa(id);
            for at in bits(live) {
                if let Some(child) = self.child(level, host.load(hpa, at)) {
                    self.note_link(host, child, stamp);
                }
            }
        }
    }

    /// A table got an entry that roots not in use now can't have cached, nor other processors. That
    /// matters to them if they reach the table.
    fn note_change(&mut self, id: TableId) {
        self.clock += 1;
        let alone = self.processors.len() == 1;
        if let Some(table) = self.pool.get_mut(id) {
            table.changed = self.clock;
            if table.shared || !alone {
                self.last_change = self.clock;
            }
        }
    }

    /// A table, and what it reaches, can be reached on more than one way from now on.
    fn share(&mut self, host: &mut impl Host, id: TableId) {
        let Some(table) = self.pool.get_mut(id) else { return };
        if table.shared {
            return;
        }
        table.shared = true;
        let (level, live) = (table.key.level, table.live);
        if level > 1 {
            let hpa = self.pool.hpa(id);
            for at in bits(live) {
                if let Some(child) = self.child(level, host.load(hpa, at)) {
                    self.share(host, child);
                }
            }
        }
    }

    /// The table that an entry of a table of `level` points to.
    fn child(&self, level: u8, value: u64) -> Option<TableId> {
        let entry = EptEntry::from(value);
        if level == 1 || !entry.is_present() || entry.large() {
            return None;
        }
        self.pool.id(Hpa::new(entry.address()))
    }

    fn role(&self, table: TableId) -> Role {
        self.pool.get(table).map_or(Role::NONE, |table| table.key.role)
    }

    fn retain(&mut self, table: TableId) {
        if let Some(table) = self.pool.get_mut(table) {
            table.references += 1;
        }
    }

    /// Takes one reference off a table. With the last one it goes, and so do the references of its
    /// entries; the recursion is as deep as an EPT.
    fn release(&mut self, host: &mut impl Host, id: TableId) {
        let Some(table) = self.pool.get_mut(id) else { return };
        table.references = table.references.saturating_sub(1);
        if table.references != 0 {
            return;
        }
        let (level, live) = (table.key.level, table.live);
        if level > 1 {
            let hpa = self.pool.hpa(id);
            for at in bits(live) {
                if let Some(child) = self.child(level, host.load(hpa, at)) {
                    self.release(host, child);
                }
            }
        }
        self.pool.release(id);
    }

    /// The EPTP values that share `eptp`'s EP4TA and may have roots: what else a valid EPTP can
    /// vary is its memory type and bit 6.
    fn siblings(eptp: Eptp) -> [Eptp; 4] {
        let of = |kind, flags| eptp.with_memory_type(kind).with_accessed_dirty(flags);
        [
            of(memory_type::WB, false),
            of(memory_type::WB, true),
            of(memory_type::UC, false),
            of(memory_type::UC, true),
        ]
    }

    /// Drops what is composed for one address, in every root of that EP4TA: L1 is told of a
    /// violation there, may repoint the entry without INVEPT, and L2's next access must see it
    /// (SDM Vol. 3C, "Operations that Invalidate Cached Mappings": an EPT violation invalidates the
    /// mappings of its address). The processor itself has done so for the current root.
    fn forget(&mut self, host: &mut impl Host, current: Eptp, gpa: L2Gpa) -> HostResult {
        for eptp in Self::siblings(current) {
            let Some(root) = self.find_root(eptp).and_then(|id| self.root(id)) else { continue };
            let mut table = root.table;
            for level in (1..=4).rev() {
                let at = index(gpa, level);
                let old = host.load(self.pool.hpa(table), at);
                let Some(key) = self.pool.get(table).map(|table| table.key) else { break };
                // A table that L1's entry no longer names must go now: another root that shares it
                // might fill the entry below.
                let way = match self.child(level, old) {
                    Some(_) => self.compose_entry(host, key, at, old).1,
                    None => EMPTY,
                };
                let next = self.child(level, way);
                self.set(host, table, at, level, if next.is_some() { way } else { EMPTY });
                match next {
                    Some(child) => table = child,
                    None => break,
                }
            }
            if eptp != current {
                self.counters.invepts += 1;
                host.invept(InvEpt::Single(root.eptp02))?;
            }
        }
        Ok(())
    }

    /// L1 executed INVEPT on a processor: for one EP4TA (any EPTP that has it), or for all. The
    /// roots concerned are composed anew when they next come into use there.
    ///
    /// # Errors
    /// [`HostError::InvEpt`].
    pub fn invalidate(
        &mut self,
        host: &mut impl Host,
        processor: usize,
        scope: Option<Eptp>,
    ) -> HostResult {
        match scope {
            Some(eptp) => {
                for eptp in Self::siblings(eptp) {
                    let Some(id) = self.find_root(eptp) else { continue };
                    let Some(root) = self.root(id) else { continue };
                    if let Some(state) = self.processors.get_mut(processor) {
                        state.used(id, NEVER);
                    }
                    self.counters.invepts += 1;
                    host.invept(InvEpt::Single(root.eptp02))?;
                }
            }
            None => {
                self.clock += 1;
                let state = self.processors.get_mut(processor).ok_or(HostError::WrongState)?;
                state.invalidated = self.clock;
                self.counters.invepts += 1;
                host.invept(InvEpt::All)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod invariants;

#[cfg(test)]
mod tests;

#[cfg(test)]
mod random;

#[cfg(test)]
mod whole;
