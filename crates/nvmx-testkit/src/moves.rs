//! What may L0 do with L1's memory while L1 runs?
//!
//! Move a page to another place of the machine, and see every write to a page: both change EPT01,
//! and L1 must not notice. Each change is made while all processors are stopped, and is relied on as
//! soon as they go on.

use nvmx::host::{HostResult, Vmx};
use nvmx::{HardwareWrites, inject};
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::ept::EptViolation;
use vmx_defs::{Field, Hpa, L1Gpa};
use vmx_model::layout;

use crate::frames;
use crate::nest::Nest;

const WORDS: u64 = PAGE_SIZE / 8;

impl Nest {
    /// Moves a page of L1, or tracks the writes to one, or looks what has become of that.
    pub(crate) fn disturb_memory(&mut self) {
        self.check_tracked();
        match self.draw(3) {
            0 => self.begin_to_track(),
            _ => self.swap_pages(),
        }
    }

    /// A page of L1's RAM: mostly one that is used.
    fn draw_page(&mut self) -> L1Gpa {
        const USED: u64 = 224;
        let all = layout::PAGES as u64;
        let number = match self.draw(8) {
            0 => self.draw(all),
            1 => layout::LARGE / PAGE_SIZE,
            _ => self.draw(USED),
        };
        let page = L1Gpa::new(number * PAGE_SIZE);
        // What L0 hides from L1 is not L1's, and stays.
        if self.translate(page).hpa.page() == frames::ONES { L1Gpa::new(0) } else { page }
    }

    /// Two pages of L1 change places in the machine.
    fn swap_pages(&mut self) {
        let pages = [self.draw_page(), self.draw_page()];
        if pages[0] == pages[1] || pages.iter().any(|page| self.tracked.contains(*page)) {
            return;
        }
        self.with_all_stopped(|nest| {
            let places = pages.map(|page| nest.translate(page).hpa);
            let memory = &mut nest.machine_mut().memory;
            for word in 0..WORDS {
                let [first, second] = places.map(|place| Hpa::new(place.as_u64() + 8 * word));
                let kept = memory.read_u64(first);
                memory.write_u64(first, memory.read_u64(second));
                memory.write_u64(second, kept);
            }
            for (page, place) in [(pages[0], places[1]), (pages[1], places[0])] {
                let (nested, mut host) = nest.engine_and_host(0);
                host.watch.exit();
                nested.change_ept01(&mut host, page, 1, |host| {
                    host.ept01.move_page(&mut host.machine.memory, page, place);
                });
            }
        });
    }

    /// L0 wants to see the next write to a page. One page at a time is enough.
    fn begin_to_track(&mut self) {
        let page = self.draw_page();
        if self.snapshot.is_some() {
            return;
        }
        let mut request = None;
        self.with_all_stopped(|nest| {
            let (nested, mut host) = nest.engine_and_host(0);
            host.watch.exit();
            let tracked = nested.track(&mut host, page, HardwareWrites::Pass, |host| {
                host.ept01.set_writable(&mut host.machine.memory, page, false);
                Ok::<(), ()>(())
            });
            match tracked {
                Ok(made) => request = Some(made),
                Err(error) => panic!("{page:?} can't be tracked: {error:?}"),
            }
            nest.snapshot = Some((page, nest.content(page)));
        });
        assert!(request.is_some_and(|request| self.is_complete(request)), "somebody is behind");
    }

    /// A page that has been tracked is as it was, or a write has been seen.
    pub(crate) fn check_tracked(&self) {
        if let Some((page, words)) = &self.snapshot
            && self.tracked.writes(*page) == Some(0)
        {
            assert_eq!(self.content(*page), *words, "a write to {page:?} was not seen");
        }
    }

    /// A guest wants to write to the page that is tracked: that ends it.
    pub(crate) fn let_write(&mut self, processor: usize, at: L1Gpa) -> HostResult {
        self.check_tracked();
        self.tracked.about_to_write(at, 1);
        let page = at.page();
        let (nested, mut host) = self.engine_and_host(processor);
        nested.untrack(&mut host, page, |host| {
            host.ept01.set_writable(&mut host.machine.memory, page, true);
        });
        let told = EptViolation::from(host.vmread(Field::EXIT_QUALIFICATION)?);
        inject::retry(&mut host, told.nmi_unblocking())?;
        self.snapshot = None;
        Ok(())
    }
}
