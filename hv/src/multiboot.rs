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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phys::Area;
    use alloc::vec;

    fn header(flags: u32, fields: &[u32]) -> Vec<u8> {
        let checksum = 0_u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        let words = [HEADER_MAGIC, flags, checksum];
        words.iter().chain(fields).flat_map(|word| word.to_le_bytes()).collect()
    }

    fn address_image(fields: [u32; 5]) -> Result<Plan, HeaderError> {
        let mut image = header(ADDRESS_FIELDS | 3, &fields);
        image.resize(64, 0xF4);
        plan(&image)
    }

    /// A little-endian ELF32 file with one segment.
    fn elf32(entry: u32, segment: [u32; 5]) -> Vec<u8> {
        let [offset, virtual_address, physical_address, file_size, memory_size] = segment;
        let mut file = vec![0x7F, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for half in [2_u16, elf::abi::EM_386] {
            file.extend(half.to_le_bytes());
        }
        for word in [1, entry, 52, 0, 0] {
            file.extend(word.to_le_bytes());
        }
        for half in [52_u16, 32, 1, 40, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let segment =
            [PT_LOAD, offset, virtual_address, physical_address, file_size, memory_size, 7, 4096];
        for word in segment {
            file.extend(word.to_le_bytes());
        }
        file.extend(header(3, &[]));
        file.resize(256, 0x90);
        file
    }

    #[test]
    fn the_header_must_lie_aligned_in_the_first_8192_bytes_with_its_sum() {
        let at = |offset: usize| {
            let mut image = vec![0; offset];
            image.extend(header(1 << 2, &[]));
            plan(&image)
        };
        assert_eq!(at(8), Err(HeaderError::VideoMode));
        assert_eq!(at(8192 - 12), Err(HeaderError::VideoMode));
        assert_eq!(at(8192 - 8), Err(HeaderError::NoHeader));
        assert_eq!(at(2), Err(HeaderError::NoHeader));
        let mut wrong_sum = header(3, &[]);
        wrong_sum[8] ^= 1;
        assert_eq!(plan(&wrong_sum), Err(HeaderError::NoHeader));
        assert_eq!(plan(&[]), Err(HeaderError::NoHeader));
    }

    #[test]
    fn unknown_mandatory_flags_are_refused_and_optional_ones_ignored() {
        for bit in 3..16 {
            assert_eq!(plan(&header(1 << bit, &[])), Err(HeaderError::UnknownFlags(1 << bit)));
        }
        for bit in 17..32 {
            assert_eq!(plan(&header(1 << bit | 3, &[])), Err(HeaderError::NotElf));
        }
    }

    #[test]
    fn address_fields_say_what_goes_where() {
        let whole = address_image([0x20_0000, 0x20_0000, 0, 0, 0x20_0020]).unwrap();
        let to = Span { start: 0x20_0000, end: 0x20_0040 };
        assert_eq!(whole.segments, [Segment { from: 0..64, to }]);
        assert_eq!(whole.entry, 0x20_0020);
        let part = address_image([0x20_0000, 0x20_0000, 0x20_0030, 0x30_0000, 0x20_0020]).unwrap();
        let to = Span { start: 0x20_0000, end: 0x30_0000 };
        assert_eq!(part.segments, [Segment { from: 0..0x30, to }]);
        for bad in [
            // Header before the load address, load end before it, past the file, BSS end before.
            [0x10_0000, 0x20_0000, 0, 0, 0],
            [0x20_0000, 0x20_0000, 0x10_0000, 0, 0],
            [0x20_0000, 0x20_0000, 0x20_0041, 0, 0],
            [0x20_0000, 0x20_0000, 0, 0x20_0010, 0],
            [u32::MAX, 0, 0, 0, 0],
        ] {
            assert_eq!(address_image(bad), Err(HeaderError::AddressFields), "{bad:x?}");
        }
    }

    #[test]
    fn elf_segments_go_to_their_physical_addresses_and_so_does_the_entry() {
        let plan = plan(&elf32(0xC010_0010, [0, 0xC010_0000, 0x10_0000, 256, 4096])).unwrap();
        let to = Span { start: 0x10_0000, end: 0x10_1000 };
        assert_eq!(plan.segments, [Segment { from: 0..256, to }]);
        assert_eq!(plan.entry, 0x10_0010);
    }

    #[test]
    fn elf_segments_outside_the_file_are_refused() {
        for segment in [
            [0, 0, 0x10_0000, 257, 4096],
            [0, 0, 0x10_0000, 256, 255],
            [u32::MAX, 0, 0x10_0000, 1, 1],
        ] {
            assert_eq!(plan(&elf32(0, segment)), Err(HeaderError::Segment(0x10_0000)));
        }
        assert_eq!(plan(&elf32(0, [0, 0, 0, 0, 0])), Err(HeaderError::NothingToLoad));
        let mut arm = elf32(0, [0, 0, 0x10_0000, 256, 4096]);
        arm[18] = 40;
        assert_eq!(plan(&arm), Err(HeaderError::NotElf));
    }

    #[test]
    fn the_information_points_at_what_it_says() {
        let mut map = MemoryMap::default();
        for (start, end, kind) in
            [(0, 0x9_F000, 1), (0x10_0000, 0x800_0000, 1), (0x800_0000, 0xA00_0000, 2)]
        {
            map.push(Area { span: Span { start, end }, kind });
        }
        let modules: [(Span, &[u8]); 2] = [
            (Span { start: 0x20_0000, end: 0x20_0005 }, b"one  two"),
            (Span { start: 0x20_1000, end: 0x20_1000 }, b""),
        ];
        let at = 0x30_0000_u32;
        let bytes = information(at, b"a \"b\"", &modules, &map);
        assert_eq!(bytes.len() as u64, information_len(b"a \"b\"", &modules, &map));
        let word = |offset: u32| super::word(&bytes, offset as usize).unwrap();
        let text = |address: u32| {
            let rest = &bytes[(address - at) as usize..];
            &rest[..rest.iter().position(|byte| *byte == 0).unwrap()]
        };
        assert_eq!(word(0), 0x24D);
        assert_eq!((word(4), word(8)), (636, 127 * 1024));
        assert_eq!(text(word(16)), b"a \"b\"");
        assert_eq!(text(word(64)), LOADER_NAME);
        assert_eq!(word(20), 2);
        let list = word(24) - at;
        assert_eq!((word(list), word(list + 4)), (0x20_0000, 0x20_0005));
        assert_eq!(text(word(list + 8)), b"one  two");
        assert_eq!(text(word(list + 24)), b"");
        assert_eq!(word(44), 3 * 24);
        let list = word(48) - at;
        assert_eq!((word(list), word(list + 24 + 4), word(list + 2 * 24 + 20)), (20, 0x10_0000, 2));
    }
}
