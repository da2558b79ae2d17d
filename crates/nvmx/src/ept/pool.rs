//! Which frames hold shadow tables, which are free, and when may a freed one be used again?
//!
//! A frame that leaves a shadow EPT may still be known to a processor's paging-structure caches
//! (SDM Vol. 3C, "Caching Translation Information"), so it waits as *pending* until an all-context
//! INVEPT has run on every processor that was in L2 when it left ([`crate::shootdown`]).

use super::role::Role;
use crate::shootdown::{Place, Request, Shootdown};
use alloc::vec::Vec;
use hashbrown::HashTable;
use vmx_defs::{Hpa, L1Gpa};

/// Number of a table in the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TableId(pub(super) u32);

/// What a shadow table is the shadow of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TableKey {
    /// The L1 table's page; for a split page, the page's first byte.
    pub(super) l1: L1Gpa,
    /// 4 is the PML4 table, 1 the page table.
    pub(super) level: u8,
    /// What else decides the table's content.
    pub(super) role: Role,
}

impl TableKey {
    fn hash(self) -> u64 {
        mix(self.l1.as_u64() ^ u64::from(self.level) << 1 ^ u64::from(self.role.bits()) << 52)
    }
}

/// Spreads a key over 64 bits (Fibonacci hashing; the table takes its index from the low bits and
/// its tag from the high ones, so both are mixed).
#[inline]
pub(super) fn mix(key: u64) -> u64 {
    let spread = (key ^ key >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    spread ^ spread >> 32
}

/// Bookkeeping of one table.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// What it is the shadow of.
    pub(super) key: TableKey,
    /// Number of shadow entries and roots that point here.
    pub(super) references: u32,
    /// Stamp of the last re-read that visited it.
    pub(super) visited: u64,
    /// When it last got an entry.
    pub(super) changed: u64,
    /// More than one way has led here: several entries point to it or to a table above it. Stays
    /// set for as long as the table lives.
    pub(super) shared: bool,
    /// One bit for each entry that is not empty.
    pub(super) live: [u64; 8],
    /// One bit for each entry that maps a page and differs from the L1 entry it was composed from by
    /// `difference`, bit for bit. With EPT01 one to one, as it mostly is, these are all that have
    /// the same rights and flags.
    ///
    /// Together they stand for a snapshot of the L1 table: where L1's entry, XOR `difference`, is
    /// still what stands in the shadow, L1 has not changed it.
    pub(super) alike: [u64; 8],
    /// What `alike` is about; any value while that is empty.
    pub(super) difference: u64,
}

impl Table {
    const fn new(key: TableKey) -> Self {
        Self {
            key,
            references: 0,
            visited: 0,
            changed: 0,
            shared: false,
            live: [0; 8],
            alike: [0; 8],
            difference: 0,
        }
    }

    /// Entry `at`, which maps a page, holds `value`, composed from L1's `entry`.
    #[inline]
    pub(super) fn note_page(&mut self, at: usize, entry: u64, value: u64) {
        let difference = entry ^ value;
        if self.alike == [0; 8] {
            self.difference = difference;
        }
        if let Some(word) = self.alike.get_mut(at / 64) {
            let bit = 1 << (at % 64);
            if difference == self.difference { *word |= bit } else { *word &= !bit }
        }
    }
}

/// The pool of shadow tables: a contiguous range of frames, a table each.
#[derive(Debug)]
pub(super) struct Pool {
    base: Hpa,
    tables: Vec<Table>,
    index: HashTable<u32>,
    free: Vec<u32>,
    /// Frames that wait for a flush, with the request for it, if it was made.
    pending: Vec<(u32, Option<Request>)>,
}

const NO_KEY: TableKey = TableKey { l1: L1Gpa::new(u64::MAX), level: 0, role: Role::NONE };

impl Pool {
    pub(super) fn new(base: Hpa, frames: u32) -> Self {
        let empty = Table::new(NO_KEY);
        let count = frames as usize;
        let mut free = Vec::with_capacity(count);
        free.extend((0..frames).rev());
        Self {
            base,
            tables: alloc::vec![empty; count],
            // Twice: a table that is never more than half full never grows.
            index: HashTable::with_capacity(2 * count),
            free,
            pending: Vec::with_capacity(count),
        }
    }

    /// Number of frames in all.
    pub(super) fn capacity(&self) -> usize {
        self.tables.len()
    }

    /// Number of frames that can be taken at once.
    pub(super) fn available(&self) -> usize {
        self.free.len()
    }

    /// Number of frames that wait for a flush.
    pub(super) fn waiting(&self) -> usize {
        self.pending.len()
    }

    /// Address of the table's frame.
    #[inline]
    pub(super) fn hpa(&self, id: TableId) -> Hpa {
        Hpa::new(self.base.as_u64() + u64::from(id.0) * 4096)
    }

    /// The table at `hpa`, an address that [`Self::hpa`] gave.
    #[inline]
    pub(super) fn id(&self, hpa: Hpa) -> Option<TableId> {
        let id = hpa.as_u64().checked_sub(self.base.as_u64())? >> 12;
        (id < self.tables.len() as u64).then_some(TableId(id as u32))
    }

    #[inline]
    pub(super) fn get(&self, id: TableId) -> Option<&Table> {
        self.tables.get(id.0 as usize)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: TableId) -> Option<&mut Table> {
        self.tables.get_mut(id.0 as usize)
    }

    /// The table of this key, if there is one.
    pub(super) fn find(&self, key: TableKey) -> Option<TableId> {
        let same = |id: &u32| self.tables.get(*id as usize).is_some_and(|table| table.key == key);
        self.index.find(key.hash(), same).map(|id| TableId(*id))
    }

    /// Takes a free frame for the table of `key`, which must not exist yet. Its entries are not
    /// cleared.
    pub(super) fn take(&mut self, key: TableKey) -> Option<TableId> {
        let id = self.free.pop()?;
        let table = self.tables.get_mut(id as usize)?;
        *table = Table::new(key);
        let tables = &self.tables;
        let rehash = |id: &u32| tables.get(*id as usize).map_or(0, |table| table.key.hash());
        self.index.insert_unique(key.hash(), id, rehash);
        Some(TableId(id))
    }

    /// Gives a table up. Its frame waits for a flush.
    pub(super) fn release(&mut self, id: TableId) {
        let Some(table) = self.tables.get_mut(id.0 as usize) else { return };
        let hash = table.key.hash();
        table.key = NO_KEY;
        table.live = [0; 8];
        table.alike = [0; 8];
        if let Ok(entry) = self.index.find_entry(hash, |other| *other == id.0) {
            entry.remove();
        }
        self.pending.push((id.0, None));
    }

    /// Asks every processor to flush, if there are frames for which nobody has. Nothing points to
    /// them any more.
    pub(super) fn ask_flush(&mut self, shootdown: &Shootdown) {
        let mut made = None;
        for (_, request) in &mut self.pending {
            if request.is_none() {
                *request = Some(*made.get_or_insert_with(|| shootdown.request()));
            }
        }
    }

    /// Frees the frames that no processor but `acting` can still know, which is not in L2 now.
    pub(super) fn collect(&mut self, shootdown: &Shootdown, acting: usize) {
        let free = &mut self.free;
        let mut last = None;
        self.pending.retain(|(id, request)| {
            let Some(request) = *request else { return true };
            // Frames of one request follow each other.
            let ripe = match last {
                Some((same, ripe)) if same == request => ripe,
                _ => shootdown.is_complete(request, Place::Shadow, Some(acting)),
            };
            last = Some((request, ripe));
            if ripe {
                free.push(*id);
            }
            !ripe
        });
    }
}

/// The numbers of the bits that are set, from 0 to 511.
pub(super) fn bits(words: [u64; 8]) -> impl Iterator<Item = usize> {
    words.into_iter().enumerate().flat_map(|(number, mut word)| {
        core::iter::from_fn(move || {
            let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
            word &= word - 1;
            Some(number * 64 + bit)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> TableKey {
        TableKey { l1: L1Gpa::new(n << 12), level: 1, role: Role::NONE.child() }
    }

    #[test]
    fn a_released_frame_waits_until_every_running_processor_has_flushed() {
        let shootdown = Shootdown::new(2);
        shootdown.go(1, Place::Shadow);
        let flush = || shootdown.flush_if_behind(1, || Ok::<(), ()>(())).unwrap();
        let mut pool = Pool::new(Hpa::new(0x10_0000), 2);
        let first = pool.take(key(1)).unwrap();
        let second = pool.take(key(2)).unwrap();
        assert_eq!(pool.take(key(3)), None);
        assert_eq!(pool.find(key(1)), Some(first));
        shootdown.request();
        pool.release(first);
        assert_eq!(pool.find(key(1)), None);
        flush();
        pool.collect(&shootdown, 0);
        assert_eq!(pool.available(), 0, "what was asked before it left does not count");
        pool.ask_flush(&shootdown);
        pool.release(second);
        pool.collect(&shootdown, 0);
        assert_eq!(pool.available(), 0, "the other processor has not flushed");
        flush();
        pool.collect(&shootdown, 0);
        assert_eq!((pool.available(), pool.waiting()), (1, 1), "for the second nobody has asked");
        assert_eq!(pool.id(pool.hpa(second)), Some(second));
        assert_eq!(pool.id(Hpa::new(0xf_f000)), None);
        assert_eq!(pool.id(Hpa::new(0x10_2000)), None);
    }

    #[test]
    fn every_frame_comes_back_and_no_key_is_lost() {
        let shootdown = Shootdown::new(1);
        let mut pool = Pool::new(Hpa::new(0x10_0000), 64);
        for round in 0..10 {
            let ids: alloc::vec::Vec<_> =
                (0..64).map(|n| pool.take(key(round * 64 + n)).unwrap()).collect();
            for (n, id) in ids.iter().enumerate() {
                assert_eq!(pool.find(key(round * 64 + n as u64)), Some(*id));
            }
            for id in ids {
                pool.release(id);
            }
            assert_eq!(pool.waiting(), 64);
            pool.ask_flush(&shootdown);
            pool.collect(&shootdown, 0);
            assert_eq!(pool.available(), pool.capacity());
        }
    }

    #[test]
    fn the_index_never_grows_and_so_never_allocates() {
        let shootdown = Shootdown::new(1);
        let mut pool = Pool::new(Hpa::new(0x10_0000), 97);
        let room = pool.index.capacity();
        for round in 0..1000 {
            let ids: alloc::vec::Vec<_> =
                (0..97 - round % 3).map(|n| pool.take(key(round * 131 + n)).unwrap()).collect();
            for id in ids {
                pool.release(id);
            }
            pool.ask_flush(&shootdown);
            pool.collect(&shootdown, 0);
            assert_eq!(pool.index.capacity(), room);
        }
    }
}
