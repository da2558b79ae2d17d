//! Where do L1's physical addresses really lead? To themselves, all over the physical address
//! space, with the memory types of the MTRRs, but for L0's own range: there L1 reads a page of ones.
//!
//! The tables are built at once, with the largest pages that types and L0's borders allow. When L1
//! changes an MTRR a second set is built and then put under the same root, so that a processor never
//! walks a table that changes under it, and the EPT pointer is always the same. A set is filled anew
//! only once no processor can have cached anything of it ([`nvmx::shootdown`]).
//!
//! Write access to single pages comes and goes in place ([`Ept01::deny_writes`]): a large page is
//! split into a complete table first, whose pointer then replaces it in one store; so does the entry
//! with the other rights.

use arrayvec::ArrayVec;
use vmx_defs::ept::memory_type::{UC, WB, is_valid};
use vmx_defs::{EptPermissions, Eptp, Hpa, L1Gpa};

use nvmx::host::L1Mapping;
use nvmx::shootdown::{Place, Request, Shootdown};
use nvmx::tracking::TRACKED_PAGES;

use crate::mtrr::Mtrrs;
use crate::phys::{PAGE, PAGE_1G, PAGE_2M, Span, direct};
use crate::region::Region;

const READ: u64 = 1;
const WRITE: u64 = 2;
const ALL: u64 = 7;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// Frames of one set for directories and tables below 1G pages: each border of a variable range
/// needs two at most, and there are two borders each of at most 32 ranges; the fixed ranges,
/// L0's own and each page that can't be written need two each.
const SPLIT_FRAMES: u64 = 2 * 2 * 32 + 8 + 2 * TRACKED_PAGES as u64;
/// Greatest physical-address width that EPT01 covers, and L1 is told of: four levels translate 48
/// bits; without 1G pages a directory is needed for each GiB, which is bounded to 512 GiB.
pub(crate) const fn greatest_width(has_1g_pages: bool) -> u8 {
    if has_1g_pages { 48 } else { 39 }
}

/// A large page can't be split now: the frames for it may still be in some processor's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Busy;

/// One of the two sets of tables.
#[derive(Debug)]
struct Tables {
    frames: Span,
    next: u64,
}

impl Tables {
    /// A zeroed frame, or `None` when the set is used up.
    fn take(&mut self) -> Option<u64> {
        if self.next >= self.frames.end {
            return None;
        }
        let frame = self.next;
        self.next += PAGE;
        // SAFETY: the set's frames are L0's own, within the direct map, and no processor walks
        // them while they are being filled.
        unsafe { direct::<u8>(frame).write_bytes(0, PAGE as usize) };
        Some(frame)
    }
}

/// EPT01.
#[derive(Debug)]
pub(crate) struct Ept01 {
    /// Bits of a guest-physical address that are mapped.
    width: u8,
    has_1g_pages: bool,
    own: Span,
    /// Pages that L1 may read and execute but not write.
    denied: ArrayVec<u64, TRACKED_PAGES>,
    /// The page of ones.
    ones: u64,
    /// A table that maps every page to `ones`, read-only: all of L0's range uses it.
    ones_table: u64,
    root: u64,
    /// Everything below the root, twice.
    sets: [Tables; 2],
    current: usize,
    /// Asks for the last set that left the root to be forgotten.
    left: Option<Request>,
    mtrrs: Mtrrs,
}

fn store(table: u64, index: u64, entry: u64) {
    // SAFETY: `table` is a frame of L0's for these tables; `index` is below 512.
    unsafe { direct::<u64>(table + index * 8).write_volatile(entry) };
}

fn load(table: u64, index: u64) -> u64 {
    // SAFETY: as in `store`.
    unsafe { direct::<u64>(table + index * 8).read_volatile() }
}

impl Ept01 {
    /// Builds the tables for a processor with `width` physical-address bits. The frames for both
    /// sets come out of `region`.
    pub(crate) fn new(region: &mut Region, width: u8, has_1g_pages: bool) -> Self {
        let ones = region.take_frames(1);
        // SAFETY: the frame was just taken.
        unsafe { direct::<u8>(ones).write_bytes(0xFF, PAGE as usize) };
        let ones_table = region.take_frames(1);
        let root = region.take_frames(1);
        for index in 0..512 {
            store(ones_table, index, ones | READ | u64::from(WB) << 3);
        }
        let directories = if has_1g_pages { 0 } else { 1 << width.saturating_sub(30) };
        let count = (1 << width.saturating_sub(39)) + directories + SPLIT_FRAMES;
        let mut set = || {
            let start = region.take_frames(count);
            Tables { frames: Span { start, end: start + count * PAGE }, next: start }
        };
        let mut ept = Self {
            width,
            has_1g_pages,
            own: crate::region::own(),
            denied: ArrayVec::new(),
            ones,
            ones_table,
            root,
            sets: [set(), set()],
            current: 1,
            left: None,
            mtrrs: Mtrrs::read(width),
        };
        ept.build();
        ept
    }

    /// The EPT pointer: write-back tables of four levels.
    pub(crate) fn eptp(&self) -> Eptp {
        Eptp::from(self.root | u64::from(WB) | 3 << 3)
    }

    /// Reads the MTRRs again, and builds the tables anew if they have changed. Returns `false`
    /// where that has to wait: a processor other than `own`, which calls, may still walk the set
    /// that would be filled.
    pub(crate) fn follow_mtrrs(&mut self, shootdown: &Shootdown, own: usize) -> bool {
        let mtrrs = Mtrrs::read(self.width);
        if mtrrs == self.mtrrs {
            return true;
        }
        if !self.may_build(shootdown, own) {
            return false;
        }
        self.mtrrs = mtrrs;
        self.build();
        self.left = Some(shootdown.request());
        true
    }

    /// Whether no processor but `own`, which calls, may still walk the set that is not in use.
    fn may_build(&self, shootdown: &Shootdown, own: usize) -> bool {
        self.left.is_none_or(|left| shootdown.is_complete(left, Place::Ept01, Some(own)))
    }

    /// Takes write access to the page at `page` away from L1. It is L1's, and mapped.
    ///
    /// # Errors
    /// [`Busy`].
    pub(crate) fn deny_writes(
        &mut self,
        page: u64,
        shootdown: &Shootdown,
        own: usize,
    ) -> Result<(), Busy> {
        self.denied.try_push(page).map_err(|_| Busy)?;
        if self.set_rights(page, ALL & !WRITE) {
            return Ok(());
        }
        // Earlier pages have used up what there is to split with; a new set splits for these only.
        if !self.may_build(shootdown, own) {
            self.denied.pop();
            return Err(Busy);
        }
        self.build();
        self.left = Some(shootdown.request());
        Ok(())
    }

    /// Gives L1 back the write access that [`Self::deny_writes`] took.
    pub(crate) fn allow_writes(&mut self, page: u64) {
        self.denied.retain(|denied| *denied != page);
        // The page's own entry is there since.
        self.set_rights(page, ALL);
    }

    /// Gives L1 the rights of one 4-KByte page anew. `false` where a large page would have to be
    /// split and there is no frame for it.
    fn set_rights(&mut self, page: u64, rights: u64) -> bool {
        let mut table = self.root;
        for shift in [39, 30, 21] {
            let index = page >> shift & 511;
            let entry = load(table, index);
            if shift != 39 && entry & LARGE != 0 {
                let Some(below) = self.sets[self.current].take() else { return false };
                let part = 1_u64 << (shift - 9);
                // Of the same type and rights; a page of 4 KBytes has no bit that says its size.
                let same = if part == PAGE { entry & !LARGE } else { entry };
                for n in 0..512 {
                    store(below, n, same + n * part);
                }
                store(table, index, below | ALL);
                table = below;
            } else {
                table = entry & ADDRESS;
            }
        }
        let index = page >> 12 & 511;
        store(table, index, load(table, index) & !ALL | rights);
        true
    }

    /// Fills the set that is not in use, and puts it under the root.
    fn build(&mut self) {
        let other = self.current ^ 1;
        self.sets[other].next = self.sets[other].frames.start;
        let regions = 1_u64 << self.width.saturating_sub(39);
        // The first frames of a set are the tables that the root points at.
        let first = self.sets[other].next;
        for _ in 0..regions {
            let _ = self.sets[other].take();
        }
        for region in 0..regions {
            for index in 0..512 {
                let physical = (region << 9 | index) << 30;
                if physical < 1 << self.width {
                    self.map(other, first + region * PAGE, index, physical, PAGE_1G);
                }
            }
        }
        for region in 0..regions {
            store(self.root, region, (first + region * PAGE) | ALL);
        }
        self.current = other;
    }

    /// Maps `size` bytes from `physical` on by entry `index` of `table`, splitting where it must.
    fn map(&mut self, set: usize, table: u64, index: u64, physical: u64, size: u64) {
        let span = Span { start: physical, end: physical + size };
        if size == PAGE_2M && self.own.contains(span) {
            store(table, index, self.ones_table | ALL);
            return;
        }
        let mut kind = self.mtrrs.kind_of(span);
        let may_be_leaf = size != PAGE_1G || self.has_1g_pages;
        let denied = self.denied.iter().any(|page| span.start <= *page && *page < span.end);
        if !may_be_leaf || span.overlaps(self.own) || (denied && size != PAGE) {
            kind = None;
        }
        if kind.is_none()
            && size != PAGE
            && let Some(next) = self.sets[set].take()
        {
            store(table, index, next | ALL);
            let part = size / 512;
            for n in 0..512 {
                self.map(set, next, n, physical + n * part, part);
            }
            return;
        }
        // A page of several types can't be; if the frames ran out, uncached is always right, but
        // nothing may reach L0's range.
        if span.overlaps(self.own) {
            return;
        }
        let kind = kind.filter(|kind| is_valid(*kind)).unwrap_or(UC);
        let large = if size == PAGE { 0 } else { LARGE };
        let rights = if denied { ALL & !WRITE } else { ALL };
        store(table, index, physical | rights | large | u64::from(kind) << 3);
    }

    /// EPT01's translation of `gpa`: total, the page of ones where nothing is mapped.
    pub(crate) fn translate(&self, gpa: L1Gpa) -> L1Mapping {
        let address = gpa.as_u64();
        let ones = L1Mapping {
            hpa: Hpa::new(self.ones | address & (PAGE - 1)),
            permissions: EptPermissions::READ,
            memory_type: WB,
            size_shift: 12,
        };
        if !gpa.fits(self.width) {
            return ones;
        }
        let mut table = self.root;
        for shift in [39, 30, 21, 12] {
            let entry = load(table, address >> shift & 511);
            if entry & ALL == 0 {
                break;
            }
            if shift == 12 || entry & LARGE != 0 {
                let offset = address & ((1 << shift) - 1);
                return L1Mapping {
                    hpa: Hpa::new((entry & ADDRESS & !((1 << shift) - 1)) | offset),
                    permissions: EptPermissions::from_bits_truncate((entry & ALL) as u8),
                    memory_type: (entry >> 3 & 7) as u8,
                    size_shift: shift,
                };
            }
            table = entry & ADDRESS;
        }
        ones
    }
}
