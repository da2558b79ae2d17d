//! Which shadow entries lead to memory that EPT01 is about to map differently?

use super::super::compose::EMPTY;
use super::super::pool::{TableId, bits};
use super::super::walk::shift;
use super::Shadow;
use crate::host::Host;
use vmx_defs::L1Gpa;
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::ept::EptEntry;

/// Contiguous pieces of host memory that are told apart; where there are more, every page is taken
/// for one of them.
const PIECES: usize = 16;

/// Host memory that a block of L1's addresses leads to.
#[derive(Clone, Copy, Debug)]
struct Targets {
    /// First byte, and the one after the last.
    pieces: [(u64, u64); PIECES],
    len: usize,
    all: bool,
}

impl Targets {
    /// Where EPT01 takes the `pages` pages from `start` on.
    fn of(host: &mut impl Host, start: L1Gpa, pages: u64) -> Self {
        let mut targets = Self { pieces: [(0, 0); PIECES], len: 0, all: false };
        let mut at = start.page();
        let end = at.as_u64().saturating_add(pages.saturating_mul(PAGE_SIZE));
        while at.as_u64() < end && !targets.all {
            let mapping = host.translate(at);
            // From here to the end of the leaf.
            let size = 1_u64 << (mapping.size_shift & 63);
            let len = (size - (at.as_u64() & (size - 1))).min(end - at.as_u64());
            targets.add(mapping.hpa.as_u64(), len);
            match at.checked_add(len) {
                Some(next) => at = next,
                None => break,
            }
        }
        targets
    }

    fn add(&mut self, first: u64, len: u64) {
        let end = first.saturating_add(len);
        let known = self.pieces.get_mut(..self.len).unwrap_or(&mut []);
        if known.iter().any(|piece| piece.0 <= first && end <= piece.1) {
            return;
        }
        if let Some(before) = known.iter_mut().find(|piece| piece.1 == first) {
            before.1 = end;
            return;
        }
        match self.pieces.get_mut(self.len) {
            Some(piece) => {
                *piece = (first, end);
                self.len += 1;
            }
            None => self.all = true,
        }
    }

    fn touch(&self, first: u64, end: u64) -> bool {
        let pieces = self.pieces.get(..self.len).unwrap_or(&[]);
        self.all || pieces.iter().any(|piece| piece.0 < end && first < piece.1)
    }
}

impl Shadow {
    /// Drops every entry that maps a page, of any size, some of which lies where EPT01 takes the
    /// `pages` pages of L1 from `start` on. To be called while EPT01 still is as it was; the tables
    /// know nothing of L1's addresses, but host memory that several of them lead to only costs a
    /// fill more. Entries that point to tables stay: what a large page was split into is looked
    /// through like any table.
    ///
    /// Goes once through all entries of the pool.
    pub fn forget_pages(&mut self, host: &mut impl Host, start: L1Gpa, pages: u64) {
        let targets = Targets::of(host, start, pages);
        for number in 0..self.pool.capacity() {
            let id = TableId(number as u32);
            let Some(table) = self.pool.get(id) else { continue };
            // A table that was given up has nothing live.
            let (level, live) = (table.key.level, table.live);
            if level > 3 {
                continue;
            }
            let hpa = self.pool.hpa(id);
            for at in bits(live) {
                let value = host.load(hpa, at);
                let first = EptEntry::from(value).address();
                if self.child(level, value).is_none()
                    && targets.touch(first, first.saturating_add(1 << shift(level)))
                {
                    self.set(host, id, at, level, EMPTY);
                }
            }
        }
    }
}
