//! What do the tables of an EPT say, read as a processor without caches would read them?
//!
//! The oracle for shadow translation. It follows from the definitions of entries alone, and from the
//! history of L1's tables: a [`History`] knows which values a word has had since when, so that a
//! mapping of the shadow can be held against everything that a processor might have cached.

use std::collections::BTreeMap;

use nvmx::host::L1Mapping;
use vmx_defs::ept::{EptEntry, EptEntryClass, Eptp};
use vmx_defs::msr::EptVpidCap;
use vmx_defs::{EptPermissions, Hpa, L1Gpa, L2Gpa};
use vmx_model::{Memory, ModelCaps};

/// Memory type and ignore-PAT of a leaf.
const KIND: u64 = 0x78;

/// Accessed flag.
const ACCESSED: u64 = 1 << 8;
/// Accessed and dirty flags.
const FLAGS: u64 = ACCESSED | 1 << 9;

/// How a processor judges entries.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// EPT capabilities.
    pub caps: EptVpidCap,
    /// Physical-address width in bits.
    pub physical_width: u8,
}

impl From<&ModelCaps> for Rules {
    fn from(caps: &ModelCaps) -> Self {
        Self { caps: caps.ept_vpid, physical_width: caps.physical_width }
    }
}

/// Log2 of what an entry of a table of `level` covers.
const fn shift(level: u8) -> u32 {
    3 + 9 * level as u32
}

const fn index(address: u64, level: u8) -> u64 {
    address >> shift(level) & 511
}

/// A page that an EPT maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// Its first address.
    pub from: u64,
    /// Log2 of its size.
    pub shift: u32,
    /// Where it leads.
    pub to: u64,
    /// The rights of the whole walk.
    pub rights: EptPermissions,
    /// Memory type and ignore-PAT, in place.
    pub kind: u64,
}

/// How a walk of L1's EPT ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Walked {
    /// Nothing is mapped there.
    NotPresent,
    /// An entry is misconfigured.
    Misconfigured,
    /// A page, and the entries that were used, where they stand.
    Page(Page, Vec<(L1Gpa, EptEntry)>),
}

/// Walks L1's EPT for an address.
pub fn walk(read: impl Fn(L1Gpa) -> u64, rules: Rules, eptp: Eptp, gpa: L2Gpa) -> Walked {
    let gpa = gpa.as_u64();
    if gpa >> 48 != 0 {
        return Walked::NotPresent;
    }
    let mut table = eptp.table();
    let mut rights = EptPermissions::all();
    let mut used = Vec::new();
    for level in (1..=4).rev() {
        let at = L1Gpa::new(table | index(gpa, level) << 3);
        let entry = EptEntry::from(read(at));
        match entry.classify(level, rules.caps, rules.physical_width) {
            EptEntryClass::NotPresent => return Walked::NotPresent,
            EptEntryClass::Misconfigured => return Walked::Misconfigured,
            class => {
                rights &= entry.permissions();
                used.push((at, entry));
                if class == EptEntryClass::Page {
                    let size = shift(level);
                    let page = Page {
                        from: gpa >> size << size,
                        shift: size,
                        to: entry.address(),
                        rights,
                        kind: entry.into_bits() & KIND,
                    };
                    return Walked::Page(page, used);
                }
            }
        }
        table = entry.address();
    }
    Walked::Misconfigured
}

/// All pages that an EPT of the processor maps, and the frames of its tables.
///
/// # Panics
/// Where an entry is misconfigured, or tables go round in a circle: the processor would not find
/// that in an EPT of L0's.
pub fn pages(memory: &Memory, rules: Rules, eptp: Eptp) -> (Vec<Page>, Vec<Hpa>) {
    let (mut found, mut frames) = (Vec::new(), Vec::new());
    collect(memory, rules, eptp.table(), 4, 0, EptPermissions::all(), &mut found, &mut frames);
    (found, frames)
}

#[expect(clippy::too_many_arguments, reason = "a recursion over one table")]
fn collect(
    memory: &Memory,
    rules: Rules,
    table: u64,
    level: u8,
    from: u64,
    rights: EptPermissions,
    found: &mut Vec<Page>,
    frames: &mut Vec<Hpa>,
) {
    frames.push(Hpa::new(table));
    for number in 0..512 {
        let entry = EptEntry::from(memory.read_u64(Hpa::new(table + number * 8)));
        let from = from | number << shift(level);
        let rights = rights & entry.permissions();
        match entry.classify(level, rules.caps, rules.physical_width) {
            EptEntryClass::NotPresent => {}
            EptEntryClass::Misconfigured => panic!("EPT02 has {entry:x?} at level {level}"),
            EptEntryClass::Page => found.push(Page {
                from,
                shift: shift(level),
                to: entry.address(),
                rights,
                kind: entry.into_bits() & KIND,
            }),
            EptEntryClass::Table => {
                collect(memory, rules, entry.address(), level - 1, from, rights, found, frames);
            }
        }
    }
}

/// What the words of L1's tables have been.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Counts the moments.
    now: u64,
    /// The present value of each word that is followed.
    words: BTreeMap<u64, u64>,
    /// Past values, each with the last moment at which it stood.
    past: BTreeMap<u64, Vec<(u64, u64)>>,
}

impl History {
    /// Follows the words at these addresses.
    pub fn follow(&mut self, read: impl Fn(L1Gpa) -> u64, at: impl IntoIterator<Item = u64>) {
        self.words.extend(at.into_iter().map(|at| (at, read(L1Gpa::new(at)))));
    }

    /// The present moment.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// A moment has passed: sees what has changed in it.
    pub fn see(&mut self, read: impl Fn(L1Gpa) -> u64) {
        for (at, value) in &mut self.words {
            let new = read(L1Gpa::new(*at));
            if new != *value {
                let past = self.past.entry(*at).or_default();
                past.push((*value, self.now));
                // A guest that writes to the tables it runs on uses an entry, which sets its flags,
                // before it overwrites it.
                if (*value ^ new) & !FLAGS != 0 && *value & FLAGS != FLAGS {
                    past.push((*value | ACCESSED, self.now));
                    past.push((*value | FLAGS, self.now));
                }
                *value = new;
            }
        }
        self.now += 1;
    }

    /// The values that a word has had since a moment. Words that are not followed are what they are.
    fn values(&self, read: &impl Fn(L1Gpa) -> u64, at: u64, since: u64) -> Vec<u64> {
        let mut values = vec![read(L1Gpa::new(at))];
        for (value, until) in self.past.get(&at).into_iter().flatten() {
            if *until >= since && !values.contains(value) {
                values.push(*value);
            }
        }
        values
    }

    /// Whether a processor that forgot everything at `since` may have this page of a shadow cached:
    /// L1's tables have led there with these rights, and EPT01 does now.
    pub fn explains(
        &self,
        read: &impl Fn(L1Gpa) -> u64,
        translate: &impl Fn(L1Gpa) -> L1Mapping,
        rules: Rules,
        eptp: Eptp,
        shadow: &Page,
        since: u64,
    ) -> bool {
        let query = Query { history: self, read, translate, rules, eptp, shadow, since };
        query.table(eptp.table(), 4, EptPermissions::all())
    }
}

struct Query<'a, R, T> {
    history: &'a History,
    read: &'a R,
    translate: &'a T,
    rules: Rules,
    eptp: Eptp,
    shadow: &'a Page,
    since: u64,
}

impl<R: Fn(L1Gpa) -> u64, T: Fn(L1Gpa) -> L1Mapping> Query<'_, R, T> {
    fn table(&self, table: u64, level: u8, rights: EptPermissions) -> bool {
        let at = table | index(self.shadow.from, level) << 3;
        let values = self.history.values(self.read, at, self.since);
        values.into_iter().any(|value| {
            let entry = EptEntry::from(value);
            let rights = rights & entry.permissions();
            match entry.classify(level, self.rules.caps, self.rules.physical_width) {
                EptEntryClass::Table => {
                    level > 1
                        && self.marked(entry)
                        && self.table(entry.address(), level - 1, rights)
                }
                EptEntryClass::Page => self.page(entry, level, rights),
                _ => false,
            }
        })
    }

    /// With accessed and dirty flags, an entry is used only once its accessed flag is set.
    fn marked(&self, entry: EptEntry) -> bool {
        !self.eptp.accessed_dirty() || entry.accessed()
    }

    fn page(&self, entry: EptEntry, level: u8, mut rights: EptPermissions) -> bool {
        if self.eptp.accessed_dirty() && !entry.dirty() {
            rights -= EptPermissions::WRITE;
        }
        let within = self.shadow.from & ((1 << shift(level)) - 1);
        let target = (self.translate)(L1Gpa::new(entry.address() | within));
        self.marked(entry)
            && self.shadow.shift <= shift(level).min(target.size_shift.into())
            && self.shadow.to == target.hpa.as_u64()
            && (rights & target.permissions).contains(self.shadow.rights)
            && self.shadow.kind == entry.into_bits() & KIND
    }
}
