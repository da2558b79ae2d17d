//! What does L0 do to L1's memory behind its back?
//!
//! It moves pages to other frames, changes what may be done with them, and has itself told of writes.
//! All through [`nvmx::Nested::change_ept01`] and tracking, followed by a shootdown: the processors
//! that may still use the old translation are made to exit.

use nvmx::tracking::{HardwareWrites, TrackError};
use nvmx::{Place, Request};
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::{EptPermissions, Hpa, L1Gpa};

use crate::frames;
use crate::host::Host;
use crate::nest::Nest;

/// What stands in a frame that is not L1's any more.
const GONE: u64 = 0xdead_dead_dead_dead;

/// All rights.
const ALL: EptPermissions =
    EptPermissions::READ.union(EptPermissions::WRITE).union(EptPermissions::EXECUTE);

impl Nest {
    /// Changes EPT01 for one page, on a processor that is in L0 for it while others run.
    fn change(
        &mut self,
        processor: usize,
        page: L1Gpa,
        change: impl FnOnce(&mut Host<'_>),
    ) -> Request {
        self.with_stopped(processor..processor + 1, |nest| {
            let (nested, mut host) = nest.engine_and_host(processor);
            host.watch.exit();
            nested.change_ept01(&mut host, page, 1, change).1
        })
    }

    /// Makes every processor exit that may still use what was taken away.
    ///
    /// # Panics
    /// Where one is pending even then.
    pub fn complete(&mut self, request: Request) {
        let shootdown = self.engine().shootdown().clone();
        let pending: Vec<_> = shootdown.pending(request, Place::Ept01, None).collect();
        for processor in pending {
            self.kick(processor);
        }
        assert!(shootdown.is_complete(request, Place::Ept01, None));
    }

    /// Whether nobody can use any more what was taken away.
    pub fn is_complete(&self, request: Request) -> bool {
        self.engine().shootdown().is_complete(request, Place::Ept01, None)
    }

    /// Moves a page of L1 to another frame. What was its own has other content afterwards.
    pub fn move_page(&mut self, processor: usize, page: L1Gpa) {
        let page = page.page();
        let old = self.translate(page);
        if !frames::is_l1(old.hpa) || self.spare.is_empty() {
            return;
        }
        let new = self.spare.remove(0);
        let request = self.change(processor, page, |host| {
            let memory = &mut host.machine.memory;
            for offset in (0..PAGE_SIZE).step_by(8) {
                let value = memory.read_u64(Hpa::new(old.hpa.as_u64() + offset));
                memory.write_u64(Hpa::new(new.as_u64() + offset), value);
            }
            host.ept01.remap(memory, page, new, old.permissions);
        });
        self.complete(request);
        for offset in (0..PAGE_SIZE).step_by(8) {
            self.machine_mut().memory.write_u64(Hpa::new(old.hpa.as_u64() + offset), GONE);
        }
        self.spare.push(old.hpa);
    }

    /// Changes what may be done with a page of L1, which has a frame; gives it leaves of its own.
    pub fn set_rights(&mut self, processor: usize, page: L1Gpa, rights: EptPermissions) {
        let page = page.page();
        let old = self.translate(page);
        let request = self.change(processor, page, |host| {
            host.ept01.remap(&mut host.machine.memory, page, old.hpa, rights);
        });
        self.complete(request);
    }

    /// Takes a page away from L1, which reads ones there from now on. Returns its frame.
    pub fn hide(&mut self, processor: usize, page: L1Gpa) -> Hpa {
        let page = page.page();
        let old = self.translate(page);
        let request = self.change(processor, page, |host| {
            let memory = &mut host.machine.memory;
            host.ept01.remap(memory, page, frames::ONES, EptPermissions::READ);
        });
        self.complete(request);
        old.hpa
    }

    /// Gives L1 a page again.
    pub fn show(&mut self, processor: usize, page: L1Gpa, frame: Hpa) {
        let page = page.page();
        let request = self.change(processor, page, |host| {
            host.ept01.remap(&mut host.machine.memory, page, frame, ALL);
        });
        self.complete(request);
    }

    /// Has L0 told of every write to a page, from the completion of the request on. The first one that
    /// a guest tries ends it, and gets through.
    ///
    /// # Errors
    /// [`TrackError`].
    pub fn track(&mut self, processor: usize, page: L1Gpa) -> Result<Request, TrackError<()>> {
        let page = page.page();
        self.with_stopped(processor..processor + 1, |nest| {
            let (nested, mut host) = nest.engine_and_host(processor);
            host.watch.exit();
            nested.track(&mut host, page, HardwareWrites::Pass, |host| {
                host.ept01.set_writable(&mut host.machine.memory, page, false);
                Ok(())
            })
        })
    }

    /// Ends it.
    pub fn untrack(&mut self, processor: usize, page: L1Gpa) -> Option<Request> {
        let page = page.page();
        self.with_stopped(processor..processor + 1, |nest| {
            let (nested, mut host) = nest.engine_and_host(processor);
            nested.untrack(&mut host, page, |host| {
                host.ept01.set_writable(&mut host.machine.memory, page, true);
            })
        })
    }

    /// Whether writes to a page are told.
    pub fn tracks(&self, page: L1Gpa) -> bool {
        self.tracked.contains(page)
    }

    /// Writes to a tracked page so far.
    pub fn writes(&self, page: L1Gpa) -> Option<u64> {
        self.tracked.writes(page)
    }

    /// What L1 has in a page.
    pub fn content(&self, page: L1Gpa) -> Vec<u64> {
        let frame = self.translate(page.page()).hpa.as_u64();
        let words = (0..PAGE_SIZE).step_by(8);
        words.map(|offset| self.machine().memory.read_u64(Hpa::new(frame + offset))).collect()
    }
}
