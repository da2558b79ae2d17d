//! What does a multiboot (version 1) kernel ask for, and what does it expect to find?
//!
//! The header and the segments are read from the image, the information structure is written for
//! it: "Multiboot Specification version 0.6.96", whose names are used here.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use elf::ElfBytes;
use elf::abi::PT_LOAD;
use elf::endian::LittleEndian;

use crate::phys::{AREA_RAM, MemoryMap, Span};

const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// The header lies in the first bytes of the image, this many.
const HEADER_SEARCH: usize = 8192;
/// EAX at the kernel's entry.
pub(crate) const BOOTLOADER_MAGIC: u32 = 0x2BAD_B002;

/// Header flag: align modules on pages. We always do.
const PAGE_ALIGN: u32 = 1 << 0;
/// Header flag: pass memory sizes and map. We always do.
const MEMORY_INFO: u32 = 1 << 1;
/// Header flag: set a video mode.
const VIDEO_MODE: u32 = 1 << 2;
/// Header flag: load as the address fields of the header say.
const ADDRESS_FIELDS: u32 = 1 << 16;
/// A loader that doesn't know one of these flags must refuse the image.
const MANDATORY: u32 = 0xFFFF;

const ENTRY_ALIGN: u64 = 8;
const INFORMATION_SIZE: u64 = 120;
const LOADER_NAME: &[u8] = b"nvmx-hv";

/// What keeps an image from being loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// No multiboot header in the first 8192 bytes.
    NoHeader,
    /// The header wants a video mode set.
    VideoMode,
    /// The header has mandatory flags that version 1 does not define.
    UnknownFlags(u32),
    /// The address fields contradict each other or the image.
    AddressFields,
    /// Neither address fields nor a readable ELF file for x86.
    NotElf,
    /// The ELF file has nothing to load.
    NothingToLoad,
    /// A segment's bytes lie outside the file, or exceed its size in memory.
    Segment(u64),
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHeader => f.write_str("has no multiboot header and is no Linux bzImage"),
            Self::VideoMode => f.write_str("wants a video mode (multiboot header flag 2)"),
            Self::UnknownFlags(flags) => {
                write!(f, "has mandatory multiboot header flags that are unknown: {flags:#x}")
            }
            Self::AddressFields => f.write_str("has a multiboot header with bad address fields"),
            Self::NotElf => f.write_str(
                "has a multiboot header, but neither address fields nor an x86 ELF executable",
            ),
            Self::NothingToLoad => f.write_str("is an ELF file without a segment to load"),
            Self::Segment(at) => write!(f, "has a bad ELF segment for {at:#x}"),
        }
    }
}

/// A part of the image that goes to memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Bytes of the image, within it, and at most as many as `to` has.
    pub(crate) from: Range<usize>,
    /// Where they go; zeros follow to the end.
    pub(crate) to: Span,
}

/// What is to be done to load an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Every segment, none empty.
    pub(crate) segments: Vec<Segment>,
    /// Physical address of the entry point.
    pub(crate) entry: u64,
}

fn word(image: &[u8], offset: usize) -> Option<u32> {
    let bytes = image.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Finds the header: its offset and flags.
fn find_header(image: &[u8]) -> Option<(usize, u32)> {
    (0..HEADER_SEARCH.min(image.len())).step_by(4).find_map(|offset| {
        let flags = word(image, offset + 4)?;
        let checksum = word(image, offset + 8)?;
        // All of the header lies in the searched part.
        (word(image, offset)? == HEADER_MAGIC
            && offset + 12 <= HEADER_SEARCH
            && HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0)
            .then_some((offset, flags))
    })
}

/// Reads the header of `image` and says what to load.
///
/// # Errors
/// See [`HeaderError`].
pub(crate) fn plan(image: &[u8]) -> Result<Plan, HeaderError> {
    let (offset, flags) = find_header(image).ok_or(HeaderError::NoHeader)?;
    if flags & VIDEO_MODE != 0 {
        return Err(HeaderError::VideoMode);
    }
    let unknown = flags & MANDATORY & !(PAGE_ALIGN | MEMORY_INFO);
    if unknown != 0 {
        return Err(HeaderError::UnknownFlags(unknown));
    }
    if flags & ADDRESS_FIELDS != 0 {
        plan_address_fields(image, offset).ok_or(HeaderError::AddressFields)
    } else {
        plan_elf(image)
    }
}

/// "The address fields of the Multiboot header". `None` where they make no sense.
fn plan_address_fields(image: &[u8], offset: usize) -> Option<Plan> {
    let [header, load, load_end, bss_end, entry] = [
        word(image, offset + 12)?,
        word(image, offset + 16)?,
        word(image, offset + 20)?,
        word(image, offset + 24)?,
        word(image, offset + 28)?,
    ];
    let from = offset.checked_sub(header.checked_sub(load)? as usize)?;
    // 0 means: to the end of the file; no uninitialised data.
    let len = if load_end == 0 { image.len() - from } else { load_end.checked_sub(load)? as usize };
    let from = from..from.checked_add(len)?;
    image.get(from.clone())?;
    let loaded_end = u64::from(load) + len as u64;
    let end = if bss_end == 0 { loaded_end } else { u64::from(bss_end) };
    if end < loaded_end || end == u64::from(load) {
        return None;
    }
    let to = Span { start: u64::from(load), end };
    Some(Plan { segments: alloc::vec![Segment { from, to }], entry: u64::from(entry) })
}

fn plan_elf(image: &[u8]) -> Result<Plan, HeaderError> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(image).map_err(|_| HeaderError::NotElf)?;
    if !matches!(file.ehdr.e_machine, elf::abi::EM_386 | elf::abi::EM_X86_64) {
        return Err(HeaderError::NotElf);
    }
    let mut entry = file.ehdr.e_entry;
    let mut found = false;
    let mut segments = Vec::new();
    let headers = file.segments().ok_or(HeaderError::NothingToLoad)?;
    for header in headers.iter().filter(|h| h.p_type == PT_LOAD && h.p_memsz != 0) {
        let bad = HeaderError::Segment(header.p_paddr);
        let start = usize::try_from(header.p_offset).map_err(|_| bad)?;
        let end = usize::try_from(header.p_filesz)
            .ok()
            .and_then(|len| start.checked_add(len))
            .ok_or(bad)?;
        let to = Span::sized(header.p_paddr, header.p_memsz).ok_or(bad)?;
        if header.p_filesz > header.p_memsz || image.get(start..end).is_none() {
            return Err(bad);
        }
        // The entry point is a virtual address; paging is off at the entry.
        let inside = file.ehdr.e_entry.wrapping_sub(header.p_vaddr);
        if !found && inside < header.p_memsz {
            entry = to.start + inside;
            found = true;
        }
        segments.push(Segment { from: start..end, to });
    }
    if segments.is_empty() {
        return Err(HeaderError::NothingToLoad);
    }
    Ok(Plan { segments, entry })
}

/// Bytes that [`information`] makes of the same arguments.
pub(crate) fn information_len(
    command_line: &[u8],
    modules: &[(Span, &[u8])],
    map: &MemoryMap,
) -> u64 {
    information(0, command_line, modules, map).len() as u64
}

/// Kilobytes of RAM from address 0, and from 1 MiB, up to the first hole.
fn memory_sizes(map: &MemoryMap) -> (u32, u32) {
    let from = |start: u64| {
        let mut end = start;
        // Adjacent areas of the map count as one.
        while let Some(area) = map.ram().find(|ram| ram.start <= end && end < ram.end) {
            end = area.end;
        }
        u32::try_from((end - start) / 1024).unwrap_or(u32::MAX)
    };
    (from(0).min(640), from(1 << 20))
}

/// The "Boot information format" with everything it points at, to be put at physical address `at`.
pub(crate) fn information(
    at: u32,
    command_line: &[u8],
    modules: &[(Span, &[u8])],
    map: &MemoryMap,
) -> Vec<u8> {
    let mut bytes = alloc::vec![0; INFORMATION_SIZE as usize];
    let address = |bytes: &Vec<u8>| at + bytes.len() as u32;
    let text = |bytes: &mut Vec<u8>, text: &[u8]| {
        let place = address(bytes);
        bytes.extend_from_slice(text);
        bytes.push(0);
        place
    };
    let command_line = text(&mut bytes, command_line);
    let loader_name = text(&mut bytes, LOADER_NAME);
    let strings: Vec<u32> = modules.iter().map(|(_, string)| text(&mut bytes, string)).collect();

    let align = |bytes: &mut Vec<u8>| {
        bytes.resize(bytes.len().next_multiple_of(ENTRY_ALIGN as usize), 0);
    };
    align(&mut bytes);
    let module_list = address(&bytes);
    for ((span, _), string) in modules.iter().zip(strings) {
        for value in [span.start as u32, span.end as u32, string, 0] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    }
    align(&mut bytes);
    let map_list = address(&bytes);
    for area in map.areas() {
        // The size field does not count itself.
        bytes.extend_from_slice(&20_u32.to_le_bytes());
        bytes.extend_from_slice(&area.span.start.to_le_bytes());
        bytes.extend_from_slice(&area.span.len().to_le_bytes());
        bytes.extend_from_slice(&area.kind.to_le_bytes());
    }
    let map_len = address(&bytes) - map_list;

    let (lower, upper) = memory_sizes(map);
    // Memory sizes, command line, modules, memory map, boot loader name.
    let flags = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    for (offset, value) in [
        (0, flags),
        (4, lower),
        (8, upper),
        (16, command_line),
        (20, modules.len() as u32),
        (24, module_list),
        (44, map_len),
        (48, map_list),
        (64, loader_name),
    ] {
        if let Some(field) = bytes.get_mut(offset..offset + 4) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

const _: () = assert!(AREA_RAM == 1, "the information uses the map's numbers as they are");
