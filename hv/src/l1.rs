//! How does L1 come into its memory? The image that GRUB loaded as our first module is recognised
//! by its content, its segments are put where it is linked, and the information it expects is built
//! for it, without a trace of us but a reserved area in the memory map.

use alloc::vec::Vec;
use core::fmt;

use crate::multiboot::{self, HeaderError, Segment};
use crate::phys::{MemoryMap, PAGE, Span, copy_physical, direct};

/// A module of L0, moved to the top of memory.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    /// Where its bytes are.
    pub(crate) bytes: Span,
    /// Its string.
    pub(crate) string: Vec<u8>,
}

/// How L1 starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// Initial RIP.
    pub(crate) entry: u32,
    /// Initial RBX: physical address of the multiboot information.
    pub(crate) information: u32,
}

/// Why there is no L1 to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoadError {
    /// No module was given.
    NoImage,
    /// The image is a Linux kernel.
    Linux,
    /// The image is no multiboot kernel, or one that cannot be met.
    Header(HeaderError),
    /// A segment does not lie in L1's RAM.
    SegmentOutsideRam(Span),
    /// A segment lies where the images themselves wait.
    SegmentTooHigh(Span),
    /// The entry point lies in no segment.
    EntryOutside(u64),
    /// No free place for the modules or the information.
    NoRoom(u64),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoImage => f.write_str("no L1 image: give it as the first module2"),
            Self::Linux => f.write_str("the L1 image is a Linux bzImage: not supported yet"),
            Self::Header(error) => write!(f, "the L1 image {error}"),
            Self::SegmentOutsideRam(span) => write!(
                f,
                "the L1 image wants {:#x}..{:#x}, which is not RAM of L1",
                span.start, span.end
            ),
            Self::SegmentTooHigh(span) => write!(
                f,
                "the L1 image wants {:#x}..{:#x}, where the modules wait to be placed",
                span.start, span.end
            ),
            Self::EntryOutside(entry) => {
                write!(f, "the L1 image begins at {entry:#x}, in none of its segments")
            }
            Self::NoRoom(len) => write!(f, "no room for {len} bytes of modules in L1's memory"),
        }
    }
}

/// Whether `image` is a Linux kernel (Linux "boot protocol": boot flag and header magic).
fn is_linux(image: &[u8]) -> bool {
    image.get(0x1FE..0x200) == Some(&[0x55, 0xAA]) && image.get(0x202..0x206) == Some(b"HdrS")
}

/// Copies all modules to one place at the top of RAM, page-aligned and in order, so that L1's
/// segments can go where they must. Returns that place.
///
/// # Errors
/// [`LoadError::NoRoom`].
///
/// # Safety
/// Nothing lives in L1's RAM but the modules.
pub(crate) unsafe fn stage(modules: &mut [Module], map: &MemoryMap) -> Result<Span, LoadError> {
    let pages = |module: &Module| module.bytes.len().next_multiple_of(PAGE);
    let total = modules.iter().map(pages).sum();
    let mut avoid: Vec<Span> = modules.iter().map(|module| module.bytes).collect();
    avoid.push(crate::region::own());
    // Above 4 GiB L1 could not reach what stays there.
    let place = map.highest_place(total, PAGE, 1 << 32, &avoid).ok_or(LoadError::NoRoom(total))?;
    let mut to = place.start;
    for module in modules {
        // SAFETY: the place is RAM, clear of every module; the caller promises the rest.
        unsafe { copy_physical(module.bytes, to) };
        let step = pages(module);
        module.bytes = Span { start: to, end: to + module.bytes.len() };
        to += step;
    }
    Ok(place)
}

/// Loads L1: `modules` as [`stage`] left them, `map` as L1 is to see it.
///
/// # Errors
/// See [`LoadError`].
///
/// # Safety
/// Nothing lives in L1's RAM but the modules at `staged`, and the direct map reaches all of it.
pub(crate) unsafe fn load(
    modules: &[Module],
    staged: Span,
    map: &MemoryMap,
) -> Result<Start, LoadError> {
    let (image_module, modules) = modules.split_first().ok_or(LoadError::NoImage)?;
    // SAFETY: the staged copy is RAM in the direct map; no segment is written over it (checked
    // below), so that it stays as it is while the slice lives.
    let image = unsafe {
        core::slice::from_raw_parts(
            direct::<u8>(image_module.bytes.start),
            image_module.bytes.len() as usize,
        )
    };
    let mut plan = match multiboot::plan(image) {
        Ok(plan) => plan,
        Err(_) if is_linux(image) => return Err(LoadError::Linux),
        Err(error) => return Err(LoadError::Header(error)),
    };

    plan.segments.retain_mut(|segment| !lies_in_rom(segment, map));
    for segment in &plan.segments {
        if !map.ram().any(|ram| ram.contains(segment.to)) {
            return Err(LoadError::SegmentOutsideRam(segment.to));
        }
        if segment.to.overlaps(staged) {
            return Err(LoadError::SegmentTooHigh(segment.to));
        }
    }
    let entry = plan.entry;
    if !plan.segments.iter().any(|s| (s.to.start..s.to.end).contains(&entry)) {
        return Err(LoadError::EntryOutside(entry));
    }
    let entry = u32::try_from(entry).map_err(|_| LoadError::EntryOutside(entry))?;
    for segment in &plan.segments {
        // SAFETY: the target was checked to be L1's RAM, clear of what is staged.
        unsafe { put(segment, image) };
    }

    // Modules and information follow the last segment, as boot loaders do; a kernel that maps only
    // its own surroundings finds them.
    let mut avoid: Vec<Span> = plan.segments.iter().map(|segment| segment.to).collect();
    avoid.push(staged);
    let end = plan.segments.iter().map(|s| s.to.end).max().unwrap_or(0).max(1 << 20);
    let place = |len: u64, avoid: &[Span]| {
        map.lowest_place(len, end, 1 << 32, avoid)
            .or_else(|| map.lowest_place(len, 1 << 20, 1 << 32, avoid))
    };
    let mut placed = Vec::with_capacity(modules.len());
    for module in modules {
        let bytes = match place(module.bytes.len(), &avoid) {
            Some(bytes) => {
                // SAFETY: the place is free RAM of L1.
                unsafe { copy_physical(module.bytes, bytes.start) };
                bytes
            }
            // What is staged is L1's RAM, page-aligned and clear of its segments: it may stay.
            None => module.bytes,
        };
        avoid.push(bytes);
        placed.push((bytes, module.string.as_slice()));
    }

    let len = multiboot::information_len(&image_module.string, &placed, map);
    let at = place(len, &avoid).ok_or(LoadError::NoRoom(len))?;
    let information = multiboot::information(at.start as u32, &image_module.string, &placed, map);
    // SAFETY: the place is free RAM of L1 and as long as the information.
    unsafe {
        direct::<u8>(at.start).copy_from_nonoverlapping(information.as_ptr(), information.len());
    }
    Ok(Start { entry, information: at.start as u32 })
}

/// Below this address the PC has ROM too.
const LOW_MEMORY: u64 = 1 << 20;

/// Whether `segment` lies in the ROM below 1 MiB; one that only begins there loses that part.
///
/// A kernel linked at 1 MiB often has its ELF header in a segment of the page below, and boot
/// loaders write that to where nothing keeps it. Nobody misses it, and neither do we.
fn lies_in_rom(segment: &mut Segment, map: &MemoryMap) -> bool {
    let low = Span { start: segment.to.start, end: segment.to.end.min(LOW_MEMORY) };
    if low.is_empty() || map.ram().any(|ram| ram.overlaps(low)) {
        return false;
    }
    let dropped = (low.len() as usize).min(segment.from.len());
    segment.from.start += dropped;
    segment.to.start = low.end;
    segment.to.is_empty()
}

/// Writes a segment to memory: its bytes, and zeros behind them.
///
/// # Safety
/// `segment.to` is RAM of L1 that nothing of L0 lives in, clear of `image`.
unsafe fn put(segment: &Segment, image: &[u8]) {
    let bytes = image.get(segment.from.clone()).unwrap_or_default();
    let to = direct::<u8>(segment.to.start);
    // SAFETY: as the caller promises; `multiboot::plan` makes no segment with more bytes than room.
    unsafe {
        to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        to.add(bytes.len()).write_bytes(0, segment.to.len() as usize - bytes.len());
    }
}
