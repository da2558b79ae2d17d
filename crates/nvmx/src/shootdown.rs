//! When can no processor use a translation any more that L0 has taken away?
//!
//! A processor may go on using what it has cached of a table (SDM Vol. 3C, "Caching Translation
//! Information") until it executes INVEPT, which nobody can do for it. So whoever takes something
//! away makes a [`Request`], and may rely on it only once the request is complete: every processor
//! whose [`Place`] matters has executed an all-context INVEPT since, or is not in a guest and will
//! execute one before it enters one. A [`Shootdown`] knows which; it is shared without a lock.
//!
//! # The protocol
//!
//! Whoever takes something away:
//! 1. changes the tables, so that no walk finds the old translation any more;
//! 2. [`Shootdown::request`];
//! 3. makes the processors of [`Shootdown::pending`] exit, or waits until they do;
//! 4. relies on the change once [`Shootdown::is_complete`]. It must not wait while it holds a lock
//!    that a processor needs on its way to a guest.
//!
//! Each processor, on its way to a guest:
//! 1. says where it goes ([`Shootdown::go`]), if it was elsewhere;
//! 2. looks whether there is a request that it has not flushed for, and if so flushes, and only then
//!    notes that it has ([`Shootdown::flush_if_behind`]).
//!
//! The embedding hypervisor has one more duty, between the last look and the VM entry: a request that
//! comes there finds the processor pending, which is right, but the interrupt or NMI that is to make
//! it exit must not be lost. Either it is held until the guest runs (interrupts are, with IF = 0 in
//! root operation), or its handler makes the processor look again before it enters.
//!
//! # Why it holds
//!
//! A processor that notes request N has read N, or later, from `wanted` before its INVEPT: it
//! synchronizes with the request, and so walks tables only that are changed already. `done` is
//! written after the INVEPT: who reads N there knows the old translation gone.
//!
//! A processor that is not in a guest is passed over. That is safe because of two fences: the
//! processor writes its place, then reads `wanted`; the requester writes `wanted`, then reads places.
//! One of them sees the other's write: the requester that the processor is on its way, or the
//! processor that it has to flush. `tests/shootdown.rs` checks this in every order of events.

use alloc::boxed::Box;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

/// What a processor may use translations of, in ascending order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Place {
    /// It is in no guest, and looks whether it is behind before it enters one: it has not begun, or
    /// waits for a startup interrupt.
    Outside,
    /// It runs, or is about to run, a guest on EPT01: L1, or L2 that has no EPT.
    Ept01,
    /// It runs, or is about to run, L2 on a shadow EPT. Nothing of EPT01 is gone from its caches.
    Shadow,
}

/// A number that grows with each request; before the first it is the default.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Request(u64);

/// What one processor says. On a cache line of its own, which only it writes.
#[derive(Debug)]
#[repr(align(64))]
struct Slot {
    /// The last request that it has flushed for.
    done: AtomicU64,
    /// Its [`Place`].
    place: AtomicU8,
}

/// The requests of a virtual machine, and how far its processors are.
#[derive(Debug)]
pub struct Shootdown {
    /// The last request.
    wanted: AtomicU64,
    slots: Box<[Slot]>,
    /// Whether the two fences are there; tests leave them out to see that they are needed.
    #[cfg(loom)]
    fences: bool,
}

impl Shootdown {
    /// For this many processors, each of which is [`Place::Outside`] until it says otherwise.
    pub fn new(processors: usize) -> Self {
        let slot = |_| Slot { done: AtomicU64::new(0), place: AtomicU8::new(Place::Outside as u8) };
        Self {
            wanted: AtomicU64::new(0),
            slots: (0..processors).map(slot).collect(),
            #[cfg(loom)]
            fences: true,
        }
    }

    /// One that lacks what makes it right, for a test that has to fail.
    #[cfg(loom)]
    pub fn without_fences(processors: usize) -> Self {
        Self { fences: false, ..Self::new(processors) }
    }

    fn fence(&self) {
        #[cfg(loom)]
        if !self.fences {
            return;
        }
        fence(Ordering::SeqCst);
    }

    /// Asks every processor to flush. What it shall forget has been taken from the tables before.
    pub fn request(&self) -> Request {
        let before = self.wanted.fetch_add(1, Ordering::AcqRel);
        self.fence();
        Request(before + 1)
    }

    /// The processors that may still use what was taken away before the request, `acting` left out,
    /// which calls and so is in no guest now. `least` is [`Place::Shadow`] where only shadow tables
    /// lost something, and [`Place::Ept01`] where EPT01 did.
    pub fn pending(
        &self,
        request: Request,
        least: Place,
        acting: Option<usize>,
    ) -> impl Iterator<Item = usize> {
        self.slots.iter().enumerate().filter_map(move |(number, slot)| {
            // The place first: a processor that was elsewhere then flushes before it comes back.
            let honours = slot.place.load(Ordering::Acquire) < least as u8
                || slot.done.load(Ordering::Acquire) >= request.0
                || Some(number) == acting;
            (!honours).then_some(number)
        })
    }

    /// Whether no processor is [`Self::pending`].
    pub fn is_complete(&self, request: Request, least: Place, acting: Option<usize>) -> bool {
        self.pending(request, least, acting).next().is_none()
    }

    /// The last request. A processor that has flushed for it is up to date.
    #[inline]
    pub fn last(&self) -> Request {
        Request(self.wanted.load(Ordering::Acquire))
    }

    /// Has `flush` execute an all-context INVEPT, if the processor that calls has not done so since
    /// the last request, and notes that it did. Returns the request that it now has flushed for.
    ///
    /// # Errors
    /// Those of `flush`; nothing is noted then.
    #[inline]
    pub fn flush_if_behind<E>(
        &self,
        processor: usize,
        flush: impl FnOnce() -> Result<(), E>,
    ) -> Result<Request, E> {
        // Before the flush: a request that comes later is not honoured by it.
        let wanted = self.last();
        let slot = self.slots.get(processor);
        if slot.is_none_or(|slot| slot.done.load(Ordering::Relaxed) != wanted.0) {
            flush()?;
            if let Some(slot) = slot {
                slot.done.store(wanted.0, Ordering::Release);
            }
        }
        Ok(wanted)
    }

    /// The processor that calls says where it goes, or what it has left. On the way to a guest the
    /// look whether it is behind must follow.
    pub fn go(&self, processor: usize, place: Place) {
        let Some(slot) = self.slots.get(processor) else { return };
        let before = slot.place.load(Ordering::Relaxed);
        slot.place.store(place as u8, Ordering::Release);
        if before < place as u8 {
            self.fence();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn flush(shootdown: &Shootdown, processor: usize) -> bool {
        let mut done = false;
        let flushed = shootdown.flush_if_behind(processor, || {
            done = true;
            Ok::<(), ()>(())
        });
        assert_eq!(flushed, Ok(shootdown.last()));
        done
    }

    fn pending(shootdown: &Shootdown, request: Request, least: Place) -> Vec<usize> {
        let pending: Vec<_> = shootdown.pending(request, least, None).collect();
        assert_eq!(shootdown.is_complete(request, least, None), pending.is_empty());
        pending
    }

    #[test]
    fn a_request_is_complete_once_all_whom_it_concerns_have_flushed() {
        let all = Shootdown::new(4);
        all.go(1, Place::Ept01);
        all.go(2, Place::Shadow);
        all.go(3, Place::Shadow);
        let request = all.request();
        assert_eq!(pending(&all, request, Place::Shadow), [2, 3]);
        assert_eq!(pending(&all, request, Place::Ept01), [1, 2, 3]);
        assert!(flush(&all, 2) && !flush(&all, 2));
        assert_eq!(pending(&all, request, Place::Ept01), [1, 3]);
        all.go(3, Place::Ept01);
        assert_eq!(pending(&all, request, Place::Shadow), []);
        assert_eq!(pending(&all, request, Place::Ept01), [1, 3]);
        assert_eq!(all.pending(request, Place::Ept01, Some(1)).collect::<Vec<_>>(), [3]);
        all.go(3, Place::Outside);
        assert!(flush(&all, 1));
        assert_eq!(pending(&all, request, Place::Ept01), []);
        // Those who were elsewhere still have to.
        assert!(flush(&all, 0) && flush(&all, 3) && !flush(&all, 0));
    }

    #[test]
    fn a_later_request_is_not_honoured_by_an_earlier_flush() {
        let all = Shootdown::new(1);
        all.go(0, Place::Ept01);
        let first = all.request();
        let mut second = None;
        all.flush_if_behind(0, || {
            second = Some(all.request());
            Ok::<(), ()>(())
        })
        .unwrap();
        assert!(all.is_complete(first, Place::Ept01, None));
        assert_eq!(pending(&all, second.unwrap(), Place::Ept01), [0]);
        assert_eq!(all.flush_if_behind(0, || Err(7)), Err(7));
        assert!(flush(&all, 0), "a flush that failed is none");
    }
}
