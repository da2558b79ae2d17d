//! Which memory is L0's own, and who gets what of it?
//!
//! One range at the top of the RAM below 4 GiB, aligned to 2M: first the copy of the image, then
//! page tables and other single frames, the heap, and last the pool of frames for the engine's
//! tables. L1's memory map ends below it.

use core::sync::atomic::{AtomicU64, Ordering};

use talc::TalcLock;
use talc::source::Manual;

use crate::phys::{MemoryMap, PAGE, PAGE_2M, Span, direct};

#[cfg_attr(freestanding, global_allocator)]
static HEAP: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

static START: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// L0's range; empty before it is chosen.
pub(crate) fn own() -> Span {
    Span { start: START.load(Ordering::Relaxed), end: END.load(Ordering::Relaxed) }
}

/// Bytes that L0 takes on a machine with `ram` bytes: enough for the shadow tables of a guest
/// hypervisor that maps a good part of them with 4K pages.
fn size_for(ram: u64) -> u64 {
    let size = (ram / 16).clamp(16 << 20, 32 << 20).max(ram / 64).min(1 << 30);
    size.next_multiple_of(PAGE_2M)
}

/// What is still to be given away of L0's range.
#[derive(Debug)]
pub(crate) struct Region {
    span: Span,
    next: u64,
}

impl Region {
    /// Chooses L0's range: as high as possible below 4 GiB, clear of `avoid`. The first 2M are set
    /// aside for the image.
    pub(crate) fn choose(map: &MemoryMap, avoid: &[Span]) -> Option<Self> {
        let ram = map.ram().map(Span::len).sum();
        let span = map.highest_place(size_for(ram), PAGE_2M, 1 << 32, avoid)?;
        START.store(span.start, Ordering::Relaxed);
        END.store(span.end, Ordering::Relaxed);
        Some(Self { span, next: span.start + PAGE_2M })
    }

    /// The frames that the image is copied to.
    pub(crate) fn image(&self) -> Span {
        Span { start: self.span.start, end: self.span.start + PAGE_2M }
    }

    /// Takes `count` zeroed frames in a row; their physical address.
    ///
    /// # Panics
    /// If the range is used up, which [`size_for`] rules out for what the boot takes.
    pub(crate) fn take_frames(&mut self, count: u64) -> u64 {
        let start = self.next;
        assert!(count * PAGE <= self.span.end - start, "L0's memory is used up");
        self.next = start + count * PAGE;
        // SAFETY: the frames are RAM, chosen free, within the direct map, and given away once.
        unsafe { direct::<u8>(start).write_bytes(0, (count * PAGE) as usize) };
        start
    }

    /// Gives the heap its memory: an eighth of the range.
    pub(crate) fn start_heap(&mut self) {
        let len = self.span.len() / 8;
        let start = self.take_frames(len / PAGE);
        // SAFETY: the frames were just taken and belong to nobody else.
        let claimed = unsafe { HEAP.lock().claim(direct(start), len as usize) };
        assert!(claimed.is_some(), "the heap refused its memory");
    }

    /// All that is left: the engine's pool.
    pub(crate) fn take_rest(self) -> Span {
        Span { start: self.next, end: self.span.end }
    }
}
