//! Which virtual addresses does L0 run with? The image's own window, each part with its own rights,
//! mapped to frames at the top of memory; and the direct map. This file builds these tables and
//! moves the image over to them.

use core::arch::{asm, x86_64::__cpuid};
use core::sync::atomic::{AtomicU64, Ordering};

use crate::phys::{DIRECT_MAP, PAGE, PAGE_1G, PAGE_2M, direct};
use crate::region::Region;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// Where the parts of the image begin and end.
#[derive(Clone, Copy, Debug)]
struct Image {
    start: u64,
    text_end: u64,
    rodata_end: u64,
    end: u64,
    stack_guard: u64,
    stack_top: u64,
}

#[cfg(freestanding)]
fn image() -> Image {
    unsafe extern "C" {
        static nvmx_image_start: u8;
        static nvmx_text_end: u8;
        static nvmx_rodata_end: u8;
        static nvmx_image_end: u8;
        static nvmx_boot_stack_guard: u8;
        static nvmx_boot_stack_top: u8;
    }
    Image {
        start: (&raw const nvmx_image_start) as u64,
        text_end: (&raw const nvmx_text_end) as u64,
        rodata_end: (&raw const nvmx_rodata_end) as u64,
        end: (&raw const nvmx_image_end) as u64,
        stack_guard: (&raw const nvmx_boot_stack_guard) as u64,
        stack_top: (&raw const nvmx_boot_stack_top) as u64,
    }
}

/// A host check has no image: an empty one.
#[cfg(not(freestanding))]
fn image() -> Image {
    Image {
        start: PAGE_2M,
        text_end: PAGE_2M,
        rodata_end: PAGE_2M,
        end: PAGE_2M,
        stack_guard: PAGE_2M,
        stack_top: PAGE_2M,
    }
}

/// The top of the stack that the first processor runs on; it moved with the image.
pub(crate) fn boot_stack_top() -> u64 {
    image().stack_top
}

/// Where GRUB put the image.
pub(crate) fn image_as_loaded() -> crate::phys::Span {
    let image = image();
    crate::phys::Span { start: image.start, end: image.end }
}

/// The table that entry `index` of the table at `table` points to, made if there is none.
fn next_table(region: &mut Region, table: u64, index: u64) -> u64 {
    let entry = direct::<u64>(table + index * 8);
    // SAFETY: `table` is a frame that the region gave for these tables, `index` is below 512.
    let value = unsafe { entry.read() };
    if value & PRESENT != 0 {
        return value & ADDRESS;
    }
    let new = region.take_frames(1);
    // SAFETY: as above.
    unsafe { entry.write(new | PRESENT | WRITE) };
    new
}

fn set_entry(table: u64, index: u64, value: u64) {
    // SAFETY: `table` is a frame that the region gave for these tables, `index` is below 512.
    unsafe { direct::<u64>(table + index * 8).write(value) };
}

fn has_1g_pages() -> bool {
    __cpuid(0x8000_0001).edx & 1 << 26 != 0
}

/// Builds the final tables: the image's window onto `region.image()`, and a direct map that ends at
/// `end` or above. Returns the value for CR3.
fn build(region: &mut Region, end: u64) -> u64 {
    let root = region.take_frames(1);
    let image = image();
    let frames = region.image().start;
    let mut page = image.start;
    while page < image.end {
        let rights = if page == image.stack_guard {
            0
        } else if page < image.text_end {
            PRESENT
        } else if page < image.rodata_end {
            PRESENT | NO_EXECUTE
        } else {
            PRESENT | WRITE | NO_EXECUTE
        };
        let pdpt = next_table(region, root, page >> 39 & 511);
        let directory = next_table(region, pdpt, page >> 30 & 511);
        let table = next_table(region, directory, page >> 21 & 511);
        set_entry(table, page >> 12 & 511, (frames + (page - image.start)) | rights);
        page += PAGE;
    }

    let rights = PRESENT | WRITE | LARGE | NO_EXECUTE;
    let large = has_1g_pages();
    let end = end.next_multiple_of(PAGE_1G);
    let mut physical = 0;
    while physical < end {
        let at = DIRECT_MAP + physical;
        let pdpt = next_table(region, root, at >> 39 & 511);
        // The lowest 4 GiB mix memory types: a page that crosses types is best avoided there.
        if large && physical >= 1 << 32 {
            set_entry(pdpt, at >> 30 & 511, physical | rights);
            physical += PAGE_1G;
        } else {
            let directory = next_table(region, pdpt, at >> 30 & 511);
            set_entry(directory, at >> 21 & 511, physical | rights);
            physical += PAGE_2M;
        }
    }
    root
}

/// The value of CR3 that every processor runs L0 with.
static ROOT: AtomicU64 = AtomicU64::new(0);

/// The physical address of the final tables, which lies below 4 GiB as all of L0's memory does.
pub(crate) fn root() -> u64 {
    ROOT.load(Ordering::Relaxed)
}

/// Maps the page at `page`, below 1 MiB, to itself, executable: a processor that starts there turns
/// on paging while it runs on it.
pub(crate) fn map_start_page(region: &mut Region, page: u64) {
    let pdpt = next_table(region, root(), 0);
    let directory = next_table(region, pdpt, 0);
    let table = next_table(region, directory, 0);
    set_entry(table, page >> 12 & 511, page | PRESENT | WRITE);
}

/// Takes the mapping of [`map_start_page`] away again.
pub(crate) fn unmap_start_page(page: u64) {
    let entry = |table: u64, index: u64| {
        // SAFETY: the tables were made by `map_start_page`.
        unsafe { direct::<u64>(table + index * 8).read() & ADDRESS }
    };
    let table = entry(entry(entry(root(), 0), 0), 0);
    set_entry(table, page >> 12 & 511, 0);
    x86_64::instructions::tlb::flush_all();
}

/// Copies the running image to its frames in `region` and goes on there, on the final tables.
///
/// # Safety
/// Once, on the boot tables, on the first processor; `region` is RAM within the direct map.
pub(crate) unsafe fn move_image(region: &mut Region, end: u64) {
    let root = build(region, end);
    ROOT.store(root, Ordering::Relaxed);
    let image = image();
    let to = direct::<u8>(region.image().start);
    // SAFETY: both ranges are mapped and as long as the image. Copy and switch are one block, so
    // that no write to the stack or to a static falls between them and is lost; the new tables map
    // the running code and stack at the same addresses, with the same contents.
    unsafe {
        asm!(
            "rep movsb",
            "mov cr3, {root}",
            root = in(reg) root,
            inout("rsi") image.start => _,
            inout("rdi") to => _,
            inout("rcx") image.end - image.start => _,
            options(nostack, preserves_flags),
        );
    }
}
