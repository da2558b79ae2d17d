//! How does an EPT violation make the shadow EPT grow, and what comes in besides the address that
//! was missing?

use super::super::compose::{Composed, EMPTY, Template, compose, compose_with, pointer};
use super::super::pool::{TableId, TableKey};
use super::super::role::Role;
use super::super::walk::{Path, Step, index, shift};
use super::{NEVER, Shadow};
use crate::host::{ENTRIES, Host, HostError, HostResult};
use vmx_defs::ept::{EptEntry, EptEntryClass, EptPermissions};
use vmx_defs::{L1Gpa, L2Gpa};

/// Entries composed around a faulting one in a table that was there already. A fresh table is
/// composed whole. A divisor of 64.
const WINDOW: usize = 16;

impl Shadow {
    /// Composes the entries of `path` into the tables below `table`; returns the rights that the
    /// leaf got there. The caller has reserved the frames.
    pub(super) fn fill(
        &mut self,
        host: &mut impl Host,
        mut table: TableId,
        path: &Path,
        gpa: L2Gpa,
    ) -> HostResult<EptPermissions> {
        let mut level = 4;
        let mut role = self.role(table);
        let Some((leaf, ways)) = path.steps().split_last() else {
            return Err(HostError::WrongState);
        };
        let mut fresh = false;
        for step in ways {
            role = role.child();
            let key = TableKey { l1: L1Gpa::new(step.entry.address()), level: level - 1, role };
            (table, fresh) =
                self.link(host, table, index(gpa, level), key, step.entry.permissions(), level)?;
            level -= 1;
        }
        if level == 1 {
            self.fill_around(host, table, *leaf, fresh, role);
        }
        let mut entry = leaf.entry;
        let mut page = L1Gpa::new(entry.address());
        loop {
            let at = index(gpa, level);
            match compose(host, entry, page, level, role.accessed_dirty()) {
                Composed::Entry(value) => {
                    self.set(host, table, at, level, value);
                    // What a large page is split into is no shadow of an L1 entry of its own.
                    if value != EMPTY
                        && role.split_attributes().is_none()
                        && let Some(table) = self.pool.get_mut(table)
                    {
                        table.note_page(at, entry.into_bits(), value);
                    }
                    return Ok(EptEntry::from(value).permissions());
                }
                Composed::Split(whole) => {
                    role = role.split(whole);
                    let key = TableKey { l1: page, level: level - 1, role };
                    (table, fresh) =
                        self.link(host, table, at, key, EptPermissions::all(), level)?;
                    level -= 1;
                    let within = (index(gpa, level) as u64) << shift(level);
                    if fresh && level == 1 {
                        self.fill_split(host, table, page, whole);
                    }
                    page = L1Gpa::new(page.as_u64() | within);
                    // Flags were judged for the page as a whole.
                    entry = whole.with_accessed(true).with_dirty(true);
                }
            }
        }
    }

    /// Composes the neighbours of a leaf entry: of a fresh table all, else a window. Entries that
    /// hold something are left alone: a TLB may keep them.
    fn fill_around(
        &mut self,
        host: &mut impl Host,
        table: TableId,
        leaf: Step,
        fresh: bool,
        role: Role,
    ) {
        let own = (leaf.at.page_offset() >> 3) as usize;
        let (first, end, len) = if fresh {
            (0, ENTRIES, 64)
        } else {
            let start = own / WINDOW * WINDOW;
            (start, start + WINDOW, WINDOW)
        };
        let (caps, width) = (self.rules.caps, self.rules.physical_width);
        let flags = role.accessed_dirty();
        let hpa = self.pool.hpa(table);
        let Some(state) = self.pool.get_mut(table) else { return };
        let mut difference = (state.alike != [0; 8]).then_some(state.difference);
        let mut composed = 0;
        let mut template: Option<Template> = None;
        let mut room = [0; 64];
        for first in (first..end).step_by(64) {
            let (Some(gpa), Some(entries), Some(live), Some(alike)) = (
                leaf.at.page().checked_add(8 * first as u64),
                room.get_mut(..len),
                state.live.get_mut(first / 64),
                state.alike.get_mut(first / 64),
            ) else {
                return;
            };
            host.read_entries(gpa, entries);
            let in_word = first % 64;
            let mut missing = !*live >> in_word & (u64::MAX >> (64 - len));
            if own / len == first / len {
                missing &= !(1 << (own % len));
            }
            while missing != 0 {
                let at = missing.trailing_zeros() as usize;
                missing &= missing - 1;
                let Some(entry) = entries.get(at).copied().map(EptEntry::from) else { break };
                if flags && !entry.accessed() {
                    continue;
                }
                let entry_bits = entry.into_bits();
                let value = match template.and_then(|template| template.apply(entry_bits)) {
                    Some(value) => value,
                    None => {
                        if entry.classify(1, caps, width) != EptEntryClass::Page {
                            continue;
                        }
                        let mapping = host.translate(L1Gpa::new(entry.address()));
                        match compose_with(mapping, entry, 1, flags) {
                            Composed::Entry(EMPTY) | Composed::Split(_) => continue,
                            Composed::Entry(value) => {
                                if mapping.size_shift > 12 {
                                    template = Some(Template::new(mapping, entry_bits, value));
                                }
                                value
                            }
                        }
                    }
                };
                host.store(hpa, first + at, value);
                let bit = 1 << (in_word + at);
                *live |= bit;
                composed += 1;
                let differs = entry_bits ^ value;
                if *difference.get_or_insert(differs) == differs {
                    *alike |= bit;
                }
            }
        }
        if let Some(difference) = difference {
            state.difference = difference;
        }
        if composed != 0 {
            self.counters.entries += composed;
            self.note_change(table);
        }
    }

    /// Composes all entries of a split page's lowest table.
    fn fill_split(&mut self, host: &mut impl Host, table: TableId, page: L1Gpa, whole: EptEntry) {
        let entry = whole.with_accessed(true).with_dirty(true);
        for at in 0..ENTRIES {
            let Some(page) = page.checked_add((at as u64) << 12) else { return };
            if let Composed::Entry(value) = compose(host, entry, page, 1, false) {
                self.set(host, table, at, 1, value);
            }
        }
    }

    /// Makes entry `at` of `table` point to the table of `key`, which is found or begun. Returns
    /// that table, and whether it was begun.
    fn link(
        &mut self,
        host: &mut impl Host,
        table: TableId,
        at: usize,
        key: TableKey,
        rights: EptPermissions,
        level: u8,
    ) -> HostResult<(TableId, bool)> {
        let old = host.load(self.pool.hpa(table), at);
        let before = self.child(level, old);
        // The way is there, as a rule: no need to look for the table.
        let there = before.filter(|id| self.pool.get(*id).is_some_and(|table| table.key == key));
        let (child, fresh) = match there.or_else(|| self.pool.find(key)) {
            Some(child) => (child, false),
            None => {
                let child = self.pool.take(key).ok_or(HostError::OutOfFrames)?;
                host.fill(self.pool.hpa(child), EMPTY);
                (child, true)
            }
        };
        let value = pointer(self.pool.hpa(child), rights);
        if old != value {
            self.set(host, table, at, level, value);
            if !fresh && before != Some(child) {
                self.renew(host, child, NEVER);
                if self.processors.len() > 1 {
                    // Composed long ago perhaps, but new to this root: also for the other
                    // processors, whether they have used the root before or will.
                    self.clock += 1;
                    self.last_change = self.clock;
                    self.note_link(host, child, self.clock);
                }
            }
        }
        Ok((child, fresh))
    }
}
