//! How are entries that may be stale brought up to date, and what may stay as it is?

use super::super::compose::{Composed, EMPTY, compose, pointer};
use super::super::pool::{Table, TableId, TableKey};
use super::Shadow;
use crate::host::{ENTRIES, Host};
use vmx_defs::L1Gpa;
use vmx_defs::ept::{EptEntry, EptEntryClass};

/// How many bytes from byte `from` on are all ones.
fn eights_set(words: &[u64; 8], from: usize) -> usize {
    let mut run = 0;
    let mut rest = from % 8;
    for word in words.iter().skip(from / 8) {
        let ones = (word >> (8 * rest)).trailing_ones() as usize / 8;
        run += ones;
        if ones + rest != 8 {
            break;
        }
        rest = 0;
    }
    run
}

impl Shadow {
    /// Composes anew what is reachable from `table` in tables that changed after `since`.
    #[cold]
    pub(super) fn renew(&mut self, host: &mut impl Host, table: TableId, since: u64) {
        self.clock += 1;
        self.renew_below(host, table, since, self.clock);
    }

    /// A table that several parents share is visited once in a pass.
    fn renew_below(&mut self, host: &mut impl Host, id: TableId, since: u64, pass: u64) {
        let Some(table) = self.pool.get_mut(id) else { return };
        if table.visited == pass {
            return;
        }
        table.visited = pass;
        let Table { key, changed, .. } = *table;
        // What a large page is split into was composed from EPT01 and its own role alone.
        if key.role.split_attributes().is_some() {
            return;
        }
        let stale = changed > since;
        if !stale && key.level == 1 {
            return;
        }
        let hpa = self.pool.hpa(id);
        for (number, mut word) in self.to_renew(host, id, stale).into_iter().enumerate() {
            while word != 0 {
                let at = 64 * number + word.trailing_zeros() as usize;
                word &= word - 1;
                let mut value = host.load(hpa, at);
                if stale {
                    value = self.renew_entry(host, id, key, at, value);
                }
                if let Some(child) = self.child(key.level, value) {
                    self.renew_below(host, child, since, pass);
                }
            }
        }
    }

    /// Composes one entry anew, which now is `old`, and returns what it has become.
    fn renew_entry(
        &mut self,
        host: &mut impl Host,
        id: TableId,
        key: TableKey,
        at: usize,
        old: u64,
    ) -> u64 {
        let (entry, new) = self.compose_entry(host, key, at, old);
        if new != old {
            self.set(host, id, at, key.level, new);
        }
        if new != EMPTY
            && self.child(key.level, new).is_none()
            && let Some(table) = self.pool.get_mut(id)
        {
            table.note_page(at, entry.into_bits(), new);
        }
        new
    }

    /// The entries of a table that a pass has to look at: those that point to tables, and if the
    /// table is stale, those whose L1 entries may have changed.
    fn to_renew(&self, host: &mut impl Host, id: TableId, stale: bool) -> [u64; 8] {
        let Some(table) = self.pool.get(id) else { return [0; 8] };
        let (mut words, hpa) = (table.live, self.pool.hpa(id));
        if table.alike == [0; 8] {
            return words;
        }
        if !stale {
            for (word, alike) in words.iter_mut().zip(table.alike) {
                *word &= !alike;
            }
            return words;
        }
        // Runs of entries that are alike, by the eight; what is between them is looked at singly.
        let mut eight = 0;
        while eight < ENTRIES / 8 {
            let run = eights_set(&table.alike, eight);
            let Some(gpa) = table.key.l1.checked_add(64 * eight as u64) else { break };
            let same = match run {
                0 => 0,
                run => host.differ_by(gpa, hpa, 8 * eight, run, table.difference).min(run),
            };
            if same == ENTRIES / 8 {
                return [0; 8];
            }
            for number in eight..eight + same {
                if let Some(word) = words.get_mut(number / 8) {
                    *word &= !(0xff << (8 * (number % 8)));
                }
            }
            eight += same + 1;
        }
        words
    }

    /// L1's entry `at` of the table of `key`, and its shadow, which now is `old`: as L1's entry is
    /// now, but pointing only to the table that it points to already.
    pub(super) fn compose_entry(
        &self,
        host: &mut impl Host,
        key: TableKey,
        at: usize,
        old: u64,
    ) -> (EptEntry, u64) {
        if key.role.split_attributes().is_some() {
            // Composed from EPT01 and its own role alone.
            return (EptEntry::new(), old);
        }
        let Some(gpa) = key.l1.checked_add(8 * at as u64) else { return (EptEntry::new(), EMPTY) };
        let entry = EptEntry::from(host.read_u64(gpa));
        let value = match entry.classify(key.level, self.rules.caps, self.rules.physical_width) {
            EptEntryClass::NotPresent | EptEntryClass::Misconfigured => EMPTY,
            EptEntryClass::Table => self.compose_pointer(key, old, entry),
            EptEntryClass::Page => self.compose_page(host, key, old, entry),
        };
        (entry, value)
    }

    /// The fresh value of an entry that L1 has pointing to a table: the old shadow table with L1's
    /// rights, if it is still the one.
    fn compose_pointer(&self, parent: TableKey, old: u64, entry: EptEntry) -> u64 {
        let wanted = TableKey {
            l1: L1Gpa::new(entry.address()),
            level: parent.level - 1,
            role: parent.role.child(),
        };
        match self.child(parent.level, old) {
            Some(child) if self.pool.get(child).is_some_and(|table| table.key == wanted) => {
                let flags = parent.role.accessed_dirty();
                if flags && !entry.accessed() {
                    EMPTY
                } else {
                    pointer(self.pool.hpa(child), entry.permissions())
                }
            }
            _ => EMPTY,
        }
    }

    /// The fresh value of an entry that L1 has mapping a page: a page, or the old split table if it
    /// is still the right one.
    fn compose_page(
        &self,
        host: &mut impl Host,
        parent: TableKey,
        old: u64,
        entry: EptEntry,
    ) -> u64 {
        let page = L1Gpa::new(entry.address());
        match compose(host, entry, page, parent.level, parent.role.accessed_dirty()) {
            Composed::Entry(value) => value,
            Composed::Split(whole) => {
                let wanted =
                    TableKey { l1: page, level: parent.level - 1, role: parent.role.split(whole) };
                let same = |child: &TableId| {
                    self.pool.get(*child).is_some_and(|table| table.key == wanted)
                };
                if self.child(parent.level, old).as_ref().is_some_and(same) { old } else { EMPTY }
            }
        }
    }
}
