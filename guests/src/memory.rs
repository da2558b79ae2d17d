//! Answers: where do pages come from?
//!
//! From the RAM above the image, below 1 GiB, one after the other. The harness marks the place
//! before each case and goes back to it afterwards, so that a case may take what it likes.

use core::ptr;

use crate::multiboot::{Info, Ram};

/// Size of a page.
pub const PAGE: u64 = 4096;
/// Size of a large page.
pub const PAGE_2M: u64 = 1 << 21;
/// The program uses no RAM from here on: L2's identity map ends here.
pub const TOP: u64 = 1 << 30;

unsafe extern "C" {
    #[cfg(image)]
    static __image_end: u8;
}

#[cfg(image)]
fn image_end() -> u64 {
    &raw const __image_end as u64
}

#[cfg(not(image))]
fn image_end() -> u64 {
    0
}

/// A 4-KiB page of RAM that belongs to this program. Copies name the same page.
///
/// Reads and writes are volatile: the processor, an L0 and L2 see and change these pages too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page(u64);

impl Page {
    /// The page at `address`, which came from [`address`](Self::address): from an entry of a table
    /// that this program filled.
    pub fn at(address: u64) -> Self {
        assert!(address.is_multiple_of(PAGE) && address >= image_end() && address < TOP);
        Self(address)
    }

    /// Its physical address, which is also its linear address.
    pub const fn address(self) -> u64 {
        self.0
    }

    fn word(self, index: usize) -> *mut u64 {
        assert!(index < 512, "word {index} of a page");
        (self.0 as *mut u64).wrapping_add(index)
    }

    /// Reads the 64-bit word number `index`, below 512.
    pub fn read(self, index: usize) -> u64 {
        // SAFETY: pages come from the arena: RAM, mapped, and no Rust object lies there.
        unsafe { self.word(index).read_volatile() }
    }

    /// Writes the 64-bit word number `index`, below 512.
    pub fn write(self, index: usize, value: u64) {
        // SAFETY: as for `read`.
        unsafe { self.word(index).write_volatile(value) }
    }

    /// Writes the 32-bit word number `index`, below 1024.
    pub fn write32(self, index: usize, value: u32) {
        assert!(index < 1024, "half-word {index} of a page");
        // SAFETY: as for `read`.
        unsafe { (self.0 as *mut u32).wrapping_add(index).write_volatile(value) }
    }

    /// Reads the 32-bit word number `index`, below 1024.
    pub fn read32(self, index: usize) -> u32 {
        assert!(index < 1024, "half-word {index} of a page");
        // SAFETY: as for `read`.
        unsafe { (self.0 as *const u32).wrapping_add(index).read_volatile() }
    }

    /// Writes all 512 words.
    pub fn fill(self, value: u64) {
        for index in 0..512 {
            self.write(index, value);
        }
    }

    /// Copies `bytes` to the offset `at`; what would go beyond the page is a panic.
    pub fn put(self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= PAGE as usize, "code beyond its page");
        for (index, &byte) in bytes.iter().enumerate() {
            // SAFETY: as for `read`; the range was checked.
            unsafe { (self.0 as *mut u8).wrapping_add(at + index).write_volatile(byte) }
        }
    }
}

/// The free RAM.
pub struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// The largest range of the memory map above the image and the modules, below [`TOP`].
    pub fn new(info: &Info) -> Self {
        let floor = image_end().max(info.modules_end).next_multiple_of(PAGE);
        let clip = |ram: &Ram| Self {
            next: ram.start.next_multiple_of(PAGE).max(floor),
            end: ram.end.min(TOP) & !(PAGE - 1),
        };
        info.ram.iter().map(clip).max_by_key(Self::free).unwrap_or(Self { next: floor, end: floor })
    }

    /// Bytes left.
    pub fn free(&self) -> u64 {
        self.end.saturating_sub(self.next)
    }

    /// The place to go back to with [`reset`](Self::reset).
    pub fn mark(&self) -> u64 {
        self.next
    }

    /// Gives back every page taken since `mark`, zeroed: tables of one case are empty when the
    /// next one begins, so that an L0 that remembers too much fails the cases about that alone.
    pub fn reset(&mut self, mark: u64) {
        // SAFETY: what was taken since then is RAM of this program, and is given back.
        unsafe { ptr::write_bytes(mark as *mut u64, 0, (self.next - mark) as usize / 8) };
        self.next = mark;
    }

    /// Gives back every page taken since `mark`, as they are.
    pub fn rewind(&mut self, mark: u64) {
        self.next = mark;
    }

    /// A page of zeros. Out of pages is a panic, which fails the case.
    pub fn page(&mut self) -> Page {
        Page(self.take(PAGE, PAGE))
    }

    /// A naturally aligned 2-MiB block of zeros, as its first page.
    pub fn block_2m(&mut self) -> Page {
        Page(self.take(PAGE_2M, PAGE_2M))
    }

    fn take(&mut self, bytes: u64, align: u64) -> u64 {
        let at = self.next.next_multiple_of(align);
        assert!(at + bytes <= self.end, "out of memory");
        self.next = at + bytes;
        // SAFETY: free RAM of this program, mapped, above the image; nothing points there.
        unsafe { ptr::write_bytes(at as *mut u64, 0, bytes as usize / 8) };
        at
    }
}
