//! How does a native L1 get its strings exactly as written, if GRUB would change them?
//!
//! GRUB's loaders put a backslash before each quote and each backslash. Under nvmx L0 takes these
//! backslashes away again. On the bare machine nobody stands between GRUB and L1, so for such
//! strings (and only for them) xtask boots a copy of L1 that begins with a few instructions of
//! ours, behind its last segment: they undo GRUB's quoting in place and go on to L1's own entry.
//! L1 finds the machine as the Multiboot specification says, and nothing else is changed.

use anyhow::{Context, Result, bail, ensure};

/// Whether GRUB hands this string over changed.
pub(crate) fn changed_by_grub(text: &str) -> bool {
    text.contains(['\\', '\'', '"'])
}

/// Undoes GRUB's quoting in the command line and in the strings of all modules.
///
/// On entry EBX points at the multiboot information, EAX has the loader's magic number, and there
/// is no stack. ECX is 0 while the command line is worked on, then the next module's entry; EDX
/// counts the modules left.
const UNQUOTE: [u8; 56] = [
    0xFC, //                         cld
    0x31, 0xC9, //                   xor ecx, ecx
    0xF6, 0x03, 0x04, //             test byte [ebx], 4        is there a command line?
    0x74, 0x10, //                   jz next
    0x8B, 0x73, 0x10, //             mov esi, [ebx + 16]
    //                       unquote:
    0x89, 0xF7, //                   mov edi, esi
    //                       character:
    0xAC, //                         lodsb
    0x3C, 0x5C, //                   cmp al, '\'
    0x75, 0x01, //                   jne keep
    0xAC, //                         lodsb
    //                       keep:
    0xAA, //                         stosb
    0x84, 0xC0, //                   test al, al
    0x75, 0xF5, //                   jnz character
    //                       next:
    0x85, 0xC9, //                   test ecx, ecx
    0x75, 0x0E, //                   jnz module
    0x31, 0xD2, //                   xor edx, edx
    0x41, //                         inc ecx
    0xF6, 0x03, 0x08, //             test byte [ebx], 8        are there modules?
    0x74, 0x06, //                   jz module
    0x8B, 0x53, 0x14, //             mov edx, [ebx + 20]
    0x8B, 0x4B, 0x18, //             mov ecx, [ebx + 24]
    //                       module:
    0x83, 0xEA, 0x01, //             sub edx, 1
    0x72, 0x08, //                   jb done
    0x8B, 0x71, 0x08, //             mov esi, [ecx + 8]
    0x83, 0xC1, 0x10, //             add ecx, 16
    0xEB, 0xD4, //                   jmp unquote
    //                       done:
    0xB8, //                         mov eax, the loader's magic number: `unquote_and_enter`
];

/// EAX at the entry of a multiboot kernel.
const LOADER_MAGIC: u32 = 0x2BAD_B002;

/// Where a multiboot header begins.
const HEADER_MAGIC: u32 = 0x1BAD_B002;

/// How far into the file it may lie.
const HEADER_SEARCH: usize = 8192;

/// The header has the addresses where to load the file.
const ADDRESS_FIELDS: u32 = 1 << 16;

/// The whole code, which goes on at `entry`.
fn unquote_and_enter(entry: u32) -> Vec<u8> {
    let mut code = UNQUOTE.to_vec();
    code.extend(LOADER_MAGIC.to_le_bytes());
    code.push(0xB9); //              mov ecx, entry
    code.extend(entry.to_le_bytes());
    code.extend([0xFF, 0xE1]); //    jmp ecx
    code
}

/// A copy of the multiboot kernel `image` that undoes GRUB's quoting before it begins.
pub(crate) fn with_unquoting(image: &[u8]) -> Result<Vec<u8>> {
    let mut image = Image(image.to_vec());
    let (header, flags) = image.header().context("L1 has no multiboot header")?;
    if flags & ADDRESS_FIELDS != 0 {
        image.extend_by_address_fields(header)?;
    } else if image.0.starts_with(b"\x7FELF") {
        image.extend_elf()?;
    } else {
        bail!("L1 has neither the multiboot header's address fields nor is it an ELF file");
    }
    Ok(image.0)
}

/// A kernel's file while it is changed.
struct Image(Vec<u8>);

impl Image {
    /// A little-endian number of `size` bytes.
    fn get(&self, at: usize, size: usize) -> Result<u64> {
        let bytes = at.checked_add(size).and_then(|end| self.0.get(at..end));
        let bytes = bytes.context("L1's file is too short for its own headers")?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn put(&mut self, at: usize, size: usize, number: u64) -> Result<()> {
        let bytes = at.checked_add(size).and_then(|end| self.0.get_mut(at..end));
        let bytes = bytes.context("L1's file is too short for its own headers")?;
        bytes.copy_from_slice(&number.to_le_bytes()[..size]);
        Ok(())
    }

    /// Offset and flags of the multiboot header.
    fn header(&self) -> Option<(usize, u32)> {
        let word = |at: usize| u32::try_from(self.get(at, 4).ok()?).ok();
        (0..HEADER_SEARCH.min(self.0.len())).step_by(4).find_map(|at| {
            let (magic, flags, checksum) = (word(at)?, word(at + 4)?, word(at + 8)?);
            let sum = magic.wrapping_add(flags).wrapping_add(checksum);
            (magic == HEADER_MAGIC && sum == 0).then_some((at, flags))
        })
    }

    /// Puts the code behind what the header's address fields load.
    fn extend_by_address_fields(&mut self, header: usize) -> Result<()> {
        const BAD: &str = "L1's multiboot header has bad address fields";
        let field = |n: usize| header + 12 + 4 * n;
        let [header_at, load, load_end, bss_end, entry] = [
            self.get(field(0), 4)?,
            self.get(field(1), 4)?,
            self.get(field(2), 4)?,
            self.get(field(3), 4)?,
            self.get(field(4), 4)?,
        ];
        let start = header_at.checked_sub(load).context(BAD)?;
        let start = header.checked_sub(usize::try_from(start)?).context(BAD)?;
        let loaded = match load_end {
            0 => self.0.len() - start,
            end => usize::try_from(end.checked_sub(load).context(BAD)?)?,
        };
        let size = usize::try_from(bss_end.saturating_sub(load))?.max(loaded);
        let mut part = self.0.get(start..start + loaded).context(BAD)?.to_vec();
        let at = append(&mut part, size, u32::try_from(entry)?);
        let end = load + part.len() as u64;
        self.0.truncate(start);
        self.0.extend(part);
        self.put(field(2), 4, end)?;
        self.put(field(3), 4, end)?;
        self.put(field(4), 4, load + at as u64)
    }

    /// Puts the code behind the segment that ends highest.
    fn extend_elf(&mut self) -> Result<()> {
        const PT_LOAD: u64 = 1;
        // Where the fields of both classes lie, and the size of an address.
        let long = self.get(4, 1)? == 2;
        let word = if long { 8 } else { 4 };
        let (phoff, phentsize, phnum) = if long { (32, 54, 56) } else { (28, 42, 44) };
        let (offset, vaddr, paddr, filesz, memsz) =
            if long { (8, 16, 24, 32, 40) } else { (4, 8, 12, 16, 20) };

        let table = usize::try_from(self.get(phoff, word)?)?;
        let (stride, count) = (self.get(phentsize, 2)?, self.get(phnum, 2)?);
        let entry = self.get(24, word)?;
        let mut highest: Option<(u64, usize)> = None;
        let mut physical_entry = None;
        for n in 0..count {
            let at = table + usize::try_from(n * stride)?;
            if self.get(at, 4)? != PT_LOAD {
                continue;
            }
            let (virt, phys) = (self.get(at + vaddr, word)?, self.get(at + paddr, word)?);
            let size = self.get(at + memsz, word)?;
            if virt <= entry && entry - virt < size {
                physical_entry = Some(entry - virt + phys);
            }
            let end = phys.checked_add(size).context("L1 has a bad ELF segment")?;
            if size > 0 && highest.is_none_or(|(other, _)| other < end) {
                highest = Some((end, at));
            }
        }
        let (_, segment) = highest.context("L1 is an ELF file without a segment to load")?;
        let physical_entry = physical_entry.context("L1's entry lies in none of its segments")?;

        let from = usize::try_from(self.get(segment + offset, word)?)?;
        let stored = usize::try_from(self.get(segment + filesz, word)?)?;
        let size = usize::try_from(self.get(segment + memsz, word)?)?;
        ensure!(stored <= size, "L1 has a bad ELF segment");
        let part = from.checked_add(stored).and_then(|end| self.0.get(from..end));
        let mut part = part.context("L1 has a bad ELF segment")?.to_vec();
        let at = append(&mut part, size, u32::try_from(physical_entry)?);
        self.put(segment + offset, word, self.0.len() as u64)?;
        self.put(segment + filesz, word, part.len() as u64)?;
        self.put(segment + memsz, word, part.len() as u64)?;
        let virt = self.get(segment + vaddr, word)?;
        self.put(24, word, virt + at as u64)?;
        self.0.extend(part);
        Ok(())
    }
}

/// Fills `part` with zeros to its size in memory and puts the code behind; tells where.
fn append(part: &mut Vec<u8>, size: usize, entry: u32) -> usize {
    part.resize(size.next_multiple_of(16), 0);
    let at = part.len();
    part.extend(unquote_and_enter(entry));
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 32-bit ELF file with one segment, linked 1 GiB above where it is loaded.
    fn elf() -> Vec<u8> {
        let mut image = Image(vec![0; 256]);
        image.0[..5].copy_from_slice(b"\x7FELF\x01");
        for (at, size, number) in [
            (24, 4, 0x4010_0010), // e_entry
            (28, 4, 52),          // e_phoff
            (42, 2, 32),          // e_phentsize
            (44, 2, 1),           // e_phnum
            (52, 4, 1),           // PT_LOAD
            (56, 4, 128),         // p_offset
            (60, 4, 0x4010_0000), // p_vaddr
            (64, 4, 0x10_0000),   // p_paddr
            (68, 4, 64),          // p_filesz
            (72, 4, 100),         // p_memsz
            (128, 4, u64::from(HEADER_MAGIC)),
            (136, 4, u64::from(0_u32.wrapping_sub(HEADER_MAGIC))),
            (150, 1, 0xAB),
        ] {
            image.put(at, size, number).expect("within the file");
        }
        image.0
    }

    #[test]
    fn an_elf_file_keeps_its_bytes_and_enters_the_code() {
        let image = Image(with_unquoting(&elf()).expect("well-formed"));
        let number = |at, size| image.get(at, size).expect("within the file");
        assert_eq!(number(56, 4), 256, "the segment's bytes are at the file's old end");
        assert_eq!(number(24, 4), 0x4010_0000 + 112, "the code follows 100 bytes, aligned");
        let segment = &image.0[256..];
        assert_eq!(number(68, 4), segment.len() as u64);
        assert_eq!(number(72, 4), segment.len() as u64);
        assert_eq!(segment[22], 0xAB);
        assert!(segment[64..112].iter().all(|byte| *byte == 0));
        assert_eq!(segment[112..], unquote_and_enter(0x10_0010));
    }

    #[test]
    fn address_fields_are_moved_behind_the_code() {
        let mut image = Image(vec![0; 100]);
        let flags = ADDRESS_FIELDS;
        let checksum = 0_u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        let header = [HEADER_MAGIC, flags, checksum, 0x10_0008, 0x10_0000, 0, 0x10_0080, 0x10_0040];
        for (n, word) in header.into_iter().enumerate() {
            image.put(8 + 4 * n, 4, u64::from(word)).expect("within the file");
        }
        let image = Image(with_unquoting(&image.0).expect("well-formed"));
        let field = |n: usize| image.get(20 + 4 * n, 4).expect("within the file");
        assert_eq!(field(2), 0x10_0000 + image.0.len() as u64);
        assert_eq!(field(3), field(2));
        assert_eq!(field(4), 0x10_0080);
        assert_eq!(image.0[128..], unquote_and_enter(0x10_0040));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(with_unquoting(b"no kernel").is_err());
        let mut elf = elf();
        elf[68..72].copy_from_slice(&[0xFF; 4]);
        assert!(with_unquoting(&elf).is_err());
    }

    #[test]
    fn only_quotes_and_backslashes_are_changed_by_grub() {
        assert!(!changed_by_grub("a  $b;{c}"));
        assert!(["it's", "\"a\"", "a\\b"].iter().all(|text| changed_by_grub(text)));
    }
}
