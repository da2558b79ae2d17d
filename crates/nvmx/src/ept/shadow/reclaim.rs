//! Which roots and tables go when frames are short?

use super::super::compose::EMPTY;
use super::super::pool::{TableId, bits, mix};
use super::{RootHint, RootId, Shadow};
use crate::host::{Host, HostResult, InvEpt};
use vmx_defs::Eptp;

impl Shadow {
    /// Makes sure that `count` frames can be taken, by giving up what was least recently used.
    /// `false` where all frames wait for another processor.
    pub(super) fn reserve(
        &mut self,
        host: &mut impl Host,
        processor: usize,
        count: usize,
    ) -> HostResult<bool> {
        if self.pool.available() >= count {
            return Ok(true);
        }
        self.reclaim(host, processor, count)
    }

    #[cold]
    fn reclaim(
        &mut self,
        host: &mut impl Host,
        processor: usize,
        count: usize,
    ) -> HostResult<bool> {
        // An eighth of the pool at a time, so that the flush is paid for by many fills.
        let goal = count.max(self.pool.capacity() / 8);
        while self.pool.available() + self.pool.waiting() < goal && self.drop_oldest(host) {}
        if self.pool.available() + self.pool.waiting() < count {
            // Only the roots that run are left: empty them. Their processors fill them again.
            for number in 0..self.processors.len() {
                let Some(root) = self.current(number) else { continue };
                self.empty(host, root.table);
            }
        }
        self.free_released(host, processor)?;
        Ok(self.pool.available() >= count)
    }

    /// Has the frames that were given up flushed out of all caches, and frees those that are.
    fn free_released(&mut self, host: &mut impl Host, processor: usize) -> HostResult {
        self.pool.ask_flush(&self.shootdown);
        // This processor needs them now. That it has flushed is for its next entry to note, since
        // there may be more to do for another's request than this.
        self.counters.invepts += 1;
        host.invept(InvEpt::All)?;
        self.pool.collect(&self.shootdown, processor);
        Ok(())
    }

    /// Gives up the least recently used root that no processor runs on; `false` if there is none.
    pub(super) fn drop_oldest(&mut self, host: &mut impl Host) -> bool {
        let running = |id| self.processors.iter().any(|processor| processor.root == Some(id));
        let oldest = self
            .roots
            .iter()
            .enumerate()
            .filter_map(|(number, root)| root.map(|root| (RootId(number as u32), root.used)))
            .filter(|(id, _)| !running(*id))
            .min_by_key(|(_, used)| *used);
        match oldest {
            Some((id, _)) => {
                self.drop_root(host, id);
                true
            }
            None => false,
        }
    }

    fn drop_root(&mut self, host: &mut impl Host, id: RootId) {
        let Some(root) = self.roots.get_mut(id.0 as usize).and_then(Option::take) else { return };
        let hash = mix(root.eptp12.into_bits());
        if let Ok(entry) = self.root_index.find_entry(hash, |other| *other == id.0) {
            entry.remove();
        }
        self.free_roots.push(id.0);
        self.release(host, root.table);
        self.counters.roots_dropped += 1;
    }

    /// As [`Self::switch`], but as a hypervisor without a root cache does it: nothing that was
    /// composed before is left, but what other processors run on. To measure against.
    ///
    /// # Errors
    /// [`crate::HostError::InvEpt`].
    #[cold]
    pub fn switch_anew(
        &mut self,
        host: &mut impl Host,
        processor: usize,
        eptp: Eptp,
        hint: &mut RootHint,
    ) -> HostResult<Option<Eptp>> {
        if let Some(root) = self.current(processor).filter(|root| root.eptp12 == eptp) {
            self.empty(host, root.table);
        }
        while self.drop_oldest(host) {}
        // The root that L2 runs on stays until there is a new one: it may have to try again.
        let found = self.switch(host, processor, eptp, hint)?;
        if found.is_some() {
            self.drop_unused(host, processor)?;
        }
        Ok(found)
    }

    /// Gives up every root that no processor runs on.
    pub(super) fn drop_unused(&mut self, host: &mut impl Host, processor: usize) -> HostResult {
        while self.drop_oldest(host) {}
        self.free_released(host, processor)
    }

    /// Takes everything out of a root.
    fn empty(&mut self, host: &mut impl Host, root: TableId) {
        let live = self.pool.get(root).map_or([0; 8], |table| table.live);
        for at in bits(live) {
            self.set(host, root, at, 4, EMPTY);
        }
    }
}
