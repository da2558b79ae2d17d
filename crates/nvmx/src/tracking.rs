//! Which pages of L1's memory does L0 want to see every write to, and was there one?
//!
//! A tracked page is one that EPT01 lets L1 read and execute, but not write ([`Nested::track`]):
//! a write exits, from L1 and from L2, on any processor. EPT12's own rights are kept, so that L1 sees
//! nothing of it. Exact once the request that `track` returns is complete.
//!
//! What writes to L1's memory, and how it is seen:
//!
//! - an instruction of L1, or its delivery of an event, or the processor setting A and D flags in
//!   L1's guest page tables: an EPT violation of L1, which is the host's. It asks
//!   [`Tracked::contains`]. Where EPT01 allows the access by then, the processor had a stale
//!   translation, and the guest simply tries again;
//! - the same of L2, where EPT12 allows it: [`Handled::TrackedWrite`]. With accessed and dirty flags
//!   for EPT each step of a guest page walk counts as a write (SDM Vol. 3C, "Accessed and Dirty Flags
//!   for EPT"), also one that only reads;
//! - the engine, on L1's behalf: VMREAD and VMPTRST to memory, VMCLEAR and a VMCS that leaves the
//!   cache, MSR areas, the VMX-abort indicator, A and D flags of EPT12 and those of L1's page tables
//!   on the way to an operand. All of them go through [`L1Memory`](crate::host::L1Memory), whose
//!   implementation calls [`Tracked::about_to_write`];
//! - the processor itself, to the virtual-APIC page of the VMCS that runs: no exit tells. See
//!   [`HardwareWrites`]. vmcs02 names no other page of L1 that is written: the page-modification log,
//!   the #VE area and posted interrupts are not offered;
//! - devices: they pass EPT01 by, and are not seen.

use crate::engine::{Handled, Nested};
use crate::host::Host;
use crate::shootdown::Request;
use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmx_defs::{EptPermissions, L1Gpa};

/// How many pages can be tracked at once.
pub const TRACKED_PAGES: usize = 16;

/// What is done where L1 makes a tracked page the virtual-APIC page of a VMCS, which the processor
/// writes without an exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HardwareWrites {
    /// The processor gets the page. [`Tracked::writes`] knows no number from then on, and to begin
    /// tracking is refused while such a VMCS runs: right for memory.
    Pass,
    /// The processor gets a page of L0's instead, as for memory that L0 hides: right for registers of
    /// a device.
    Redirect,
}

/// Why a page is not tracked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrackError<E> {
    /// As many pages are tracked as can be.
    Full,
    /// It is tracked already.
    Twice,
    /// L1 can't write it anyway.
    NotWritable,
    /// It is the virtual-APIC page of a VMCS that runs.
    WrittenByHardware,
    /// EPT01 could not be changed.
    Host(E),
}

/// A place for a tracked page.
#[derive(Debug)]
struct Slot {
    /// The page's address, or [`NONE`].
    page: AtomicU64,
    redirects: AtomicBool,
    /// The processor has got the page to write to.
    unseen: AtomicBool,
    writes: AtomicU64,
}

/// No page.
const NONE: u64 = u64::MAX;

/// The tracked pages of a virtual machine. Shared without a lock: changes are made by [`Nested`], and
/// a page is in here before the first write to it exits.
#[derive(Debug)]
pub struct Tracked {
    slots: Box<[Slot]>,
    count: AtomicU64,
}

impl Tracked {
    pub(crate) fn new() -> Self {
        let slot = |_| Slot {
            page: AtomicU64::new(NONE),
            redirects: AtomicBool::new(false),
            unseen: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        };
        Self { slots: (0..TRACKED_PAGES).map(slot).collect(), count: AtomicU64::new(0) }
    }

    #[inline]
    fn find(&self, gpa: L1Gpa) -> Option<&Slot> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let page = gpa.page().as_u64();
        self.slots.iter().find(|slot| slot.page.load(Ordering::Acquire) == page)
    }

    /// Whether the page of `gpa` is tracked.
    #[inline]
    pub fn contains(&self, gpa: L1Gpa) -> bool {
        self.find(gpa).is_some()
    }

    /// To be called by the host before it writes `len` bytes of L1's memory from `gpa` on: for the
    /// engine, and where it lets a write through that a guest tried.
    #[inline]
    pub fn about_to_write(&self, gpa: L1Gpa, len: usize) {
        if self.count.load(Ordering::Acquire) == 0 || len == 0 {
            return;
        }
        let (first, last) = (gpa, gpa.checked_add(len as u64 - 1).unwrap_or(gpa));
        for slot in &self.slots {
            let page = slot.page.load(Ordering::Acquire);
            if first.page().as_u64() <= page && page <= last.as_u64() {
                slot.writes.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// How many writes to the page there were, or may have been, since it is tracked. `None` where
    /// nobody counts: it is not tracked, or the processor may have written it unseen.
    pub fn writes(&self, gpa: L1Gpa) -> Option<u64> {
        let slot = self.find(gpa).filter(|slot| !slot.unseen.load(Ordering::Acquire))?;
        Some(slot.writes.load(Ordering::Acquire))
    }

    /// The processor is to get the page as virtual-APIC page: whether it does.
    pub(crate) fn passes_to_hardware(&self, gpa: L1Gpa) -> bool {
        match self.find(gpa) {
            Some(slot) if !slot.redirects.load(Ordering::Acquire) => {
                slot.unseen.store(true, Ordering::Release);
                true
            }
            _ => false,
        }
    }

    /// Begins tracking. Only one at a time.
    fn add(&self, page: L1Gpa, hardware: HardwareWrites) -> bool {
        let free = |slot: &&Slot| slot.page.load(Ordering::Relaxed) == NONE;
        let Some(slot) = self.slots.iter().find(free) else { return false };
        slot.redirects.store(hardware == HardwareWrites::Redirect, Ordering::Relaxed);
        slot.unseen.store(false, Ordering::Relaxed);
        slot.writes.store(0, Ordering::Relaxed);
        slot.page.store(page.as_u64(), Ordering::Release);
        self.count.fetch_add(1, Ordering::AcqRel);
        true
    }

    /// Ends it; whether the page was tracked.
    fn remove(&self, page: L1Gpa) -> bool {
        let Some(slot) = self.find(page) else { return false };
        slot.page.store(NONE, Ordering::Release);
        self.count.fetch_sub(1, Ordering::AcqRel);
        true
    }
}

impl Nested {
    /// The pages that are tracked. The host keeps this where it can look at it without a lock.
    pub fn tracked(&self) -> &alloc::sync::Arc<Tracked> {
        &self.tracked
    }

    /// Changes EPT01 for the `pages` 4-KByte pages of L1 from `start` on, by `change`, and has all
    /// that was made of it follow: shadow entries (dropped, and composed again when they are
    /// needed), and the pages of L1 that vmcs02 names by their real address, on each processor
    /// before it enters L2 again. A processor may use the old translation until it does: the change
    /// can be relied on once the request that is returned is complete, with
    /// [`Place::Ept01`](crate::Place).
    ///
    /// The EPT pointer of EPT01 stays as it is. A processor may be walking the tables: each step of
    /// the change must leave them whole.
    ///
    /// Costs one look at each entry of the pool, and at each leaf of EPT01 in the range.
    pub fn change_ept01<H: Host, R>(
        &mut self,
        host: &mut H,
        start: L1Gpa,
        pages: u64,
        change: impl FnOnce(&mut H) -> R,
    ) -> (R, Request) {
        self.shadow.forget_pages(host, start, pages);
        let result = change(host);
        self.ept01_changes += 1;
        (result, self.shadow.shootdown().request())
    }

    /// Has writes to `page` exit, of L1 and of L2, on every processor: from the completion of the
    /// request on that this returns. `deny` takes write access to the page, and only that, away in
    /// EPT01.
    ///
    /// # Errors
    /// [`TrackError`]; nothing has changed then, as far as `deny` has changed nothing.
    pub fn track<H: Host, E>(
        &mut self,
        host: &mut H,
        page: L1Gpa,
        hardware: HardwareWrites,
        deny: impl FnOnce(&mut H) -> Result<(), E>,
    ) -> Result<Request, TrackError<E>> {
        let page = page.page();
        if self.tracked.contains(page) {
            return Err(TrackError::Twice);
        }
        if !host.translate(page).permissions.contains(EptPermissions::WRITE) {
            return Err(TrackError::NotWritable);
        }
        if hardware == HardwareWrites::Pass && self.virtual_apics.contains(&Some(page)) {
            return Err(TrackError::WrittenByHardware);
        }
        // Before the first write exits, so that the host knows what it is.
        if !self.tracked.add(page, hardware) {
            return Err(TrackError::Full);
        }
        let (denied, request) = self.change_ept01(host, page, 1, deny);
        match denied {
            Ok(()) => Ok(request),
            Err(error) => {
                self.tracked.remove(page);
                Err(TrackError::Host(error))
            }
        }
    }

    /// Lets writes to `page` through again; `allow` gives write access back in EPT01. Does nothing
    /// where the page is not tracked. A processor that still has the old translation exits once
    /// more, and finds the access allowed: nobody has to wait for the request.
    pub fn untrack<H: Host>(
        &mut self,
        host: &mut H,
        page: L1Gpa,
        allow: impl FnOnce(&mut H),
    ) -> Option<Request> {
        let page = page.page();
        if !self.tracked.contains(page) {
            return None;
        }
        let ((), request) = self.change_ept01(host, page, 1, allow);
        self.tracked.remove(page);
        Some(request)
    }

    /// A write of L2 to `gpa` that EPT12 allows and EPT01 does not, and nothing else is wrong with:
    /// what becomes of it, if the page is tracked.
    pub(crate) fn tracked_write(&self, gpa: L1Gpa) -> Option<Handled> {
        self.tracked.contains(gpa).then_some(Handled::TrackedWrite(gpa))
    }
}

#[cfg(test)]
mod tests;
