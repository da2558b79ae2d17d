//! Answers: what did the boot loader say?
//!
//! The Multiboot (version 1) information, copied out at once, because the program later uses all
//! memory. Everything is read once and bounded: a wrong structure gives an error, not a hang.
//! (The crate `multiboot` wants a memory-mapping trait and leaves bounds to it; these are the
//! four fields that are needed.)

use arrayvec::{ArrayString, ArrayVec};

/// A range of the memory map: RAM that is free to use, or what is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ram {
    /// Its first byte.
    pub start: u64,
    /// The byte after its last.
    pub end: u64,
}

/// Longest command line that is kept.
pub const COMMAND_LINE: usize = 1024;

/// What the loader said.
pub struct Info {
    /// The command line as the loader gave it.
    pub command_line: ArrayString<COMMAND_LINE>,
    /// The RAM of the memory map, in its order.
    pub ram: ArrayVec<Ram, 32>,
    /// What the memory map lists and is not RAM, in its order.
    pub other: ArrayVec<Ram, 32>,
    /// End of the highest module, 0 if there is none.
    pub modules_end: u64,
}

impl Info {
    /// Nothing said.
    pub const EMPTY: Self = Self {
        command_line: ArrayString::new_const(),
        ram: ArrayVec::new_const(),
        other: ArrayVec::new_const(),
        modules_end: 0,
    };
}

const MAGIC: u32 = 0x2BAD_B002;
const FLAG_COMMAND_LINE: u32 = 1 << 2;
const FLAG_MODULES: u32 = 1 << 3;
const FLAG_MEMORY_MAP: u32 = 1 << 6;
const TYPE_RAM: u32 = 1;

fn read32(address: u64) -> u32 {
    // SAFETY: the low 4 GiB are mapped, and the loader's structures lie there; a read of any
    // other place there yields a wrong value, which the callers bound, but no fault.
    unsafe { (address as *const u32).read_unaligned() }
}

fn read64(address: u64) -> u64 {
    u64::from(read32(address)) | u64::from(read32(address + 4)) << 32
}

fn read8(address: u64) -> u8 {
    // SAFETY: as for `read32`.
    unsafe { (address as *const u8).read() }
}

/// Fills `info` from the structure at `information`; the error says what is wrong with it.
pub fn read(magic: u32, information: u32, info: &mut Info) -> Result<(), &'static str> {
    if magic != MAGIC {
        return Err("not started by a Multiboot loader");
    }
    let base = u64::from(information);
    let flags = read32(base);
    if flags & FLAG_COMMAND_LINE != 0 {
        let text = u64::from(read32(base + 16));
        for at in 0..COMMAND_LINE as u64 {
            match read8(text + at) {
                0 => break,
                byte @ 0x20..0x7F => info.command_line.push(char::from(byte)),
                _ => info.command_line.push('?'),
            }
        }
    }
    if flags & FLAG_MODULES != 0 {
        let count = read32(base + 20).min(64);
        let list = u64::from(read32(base + 24));
        for index in 0..u64::from(count) {
            info.modules_end = info.modules_end.max(read32(list + index * 16 + 4).into());
        }
    }
    if flags & FLAG_MEMORY_MAP == 0 {
        return Err("the loader gave no memory map");
    }
    let length = u64::from(read32(base + 44)).min(64 * 1024);
    let map = u64::from(read32(base + 48));
    let mut at = 0;
    while at + 24 <= length {
        let entry = map + at;
        // The size field does not count itself.
        at += u64::from(read32(entry)) + 4;
        let (start, bytes) = (read64(entry + 4), read64(entry + 12));
        let range = Ram { start, end: start.saturating_add(bytes) };
        let list = if read32(entry + 20) == TYPE_RAM { &mut info.ram } else { &mut info.other };
        if list.try_push(range).is_err() {
            break;
        }
    }
    Ok(())
}
