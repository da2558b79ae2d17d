//! Answers: which page tables does L2 run with?
//!
//! The same map in each mode: the first GiB one to one with 2-MiB pages (code, stack and tables),
//! and a window of 2 MiB at [`WINDOW`], one to one with 4-KiB pages, whose entries cases change.

use x86_64::structures::paging::PageTableFlags as Flags;

use crate::memory::{Arena, PAGE, Page};

/// Linear and guest-physical address of the window of 512 small pages.
pub const WINDOW: u64 = 1 << 30;

/// Entry bits: present, writable, accessible at CPL 3, accessed and dirty (so that a walk writes
/// nothing).
pub const USER_RW: u64 = 0x67;

/// Which paging L2 uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 64-bit mode, 4-level paging.
    Long,
    /// 32-bit protected mode, PAE paging.
    Pae,
}

/// L2's page tables.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// Which kind.
    pub mode: Mode,
    /// The value for CR3: the PML4 table, or the four PDPTEs.
    pub cr3: u64,
    /// The table that CR3 points to.
    pub root: Page,
    /// The page directory of the GiB that holds the window.
    pub window_directory: Page,
    /// The page table of the window.
    pub window: Page,
}

impl Paging {
    /// Builds them.
    pub fn new(arena: &mut Arena, mode: Mode) -> Self {
        let (low, window_directory, window) = (arena.page(), arena.page(), arena.page());
        let large = Flags::HUGE_PAGE.bits() | USER_RW;
        for index in 0..512 {
            low.write(index, (index as u64) << 21 | large);
            window.write(index, (WINDOW + index as u64 * PAGE) | USER_RW);
        }
        window_directory.write(0, window.address() | USER_RW);
        let root = arena.page();
        match mode {
            Mode::Long => {
                let pointers = arena.page();
                pointers.write(0, low.address() | USER_RW);
                pointers.write(1, window_directory.address() | USER_RW);
                root.write(0, pointers.address() | USER_RW);
            }
            Mode::Pae => {
                // In PDPTEs, the bits that mean writable and user elsewhere are reserved.
                root.write(0, low.address() | 1);
                root.write(1, window_directory.address() | 1);
            }
        }
        Self { mode, cr3: root.address(), root, window_directory, window }
    }

    /// Page number `page` of the window as a linear address.
    pub fn window_address(page: u64) -> u64 {
        WINDOW + page * PAGE
    }
}
