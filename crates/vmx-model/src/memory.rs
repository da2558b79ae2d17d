//! What is behind a physical address?
//!
//! RAM from address 0 on, shared by all processors of a machine. Nothing is beyond it: reads give
//! ones, writes are swallowed, as on a bus where no device answers. Accesses of 4 and 8 bytes that
//! are aligned are single, which is all the atomicity a model without threads needs.

use vmx_defs::Hpa;
use vmx_defs::addr::PAGE_SIZE;

/// RAM.
#[derive(Clone, Debug)]
pub struct Memory {
    words: Vec<u64>,
}

impl Memory {
    /// `pages` pages of zeros.
    pub fn new(pages: usize) -> Self {
        Self { words: vec![0; pages * (PAGE_SIZE as usize / 8)] }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// Reads the aligned 8 bytes that `at` lies in.
    #[inline]
    pub fn read_u64(&self, at: Hpa) -> u64 {
        self.words.get((at.as_u64() >> 3) as usize).copied().unwrap_or(u64::MAX)
    }

    /// Writes the aligned 8 bytes that `at` lies in.
    #[inline]
    pub fn write_u64(&mut self, at: Hpa, value: u64) {
        if let Some(word) = self.words.get_mut((at.as_u64() >> 3) as usize) {
            *word = value;
        }
    }

    /// Reads the aligned 4 bytes that `at` lies in.
    #[inline]
    pub fn read_u32(&self, at: Hpa) -> u32 {
        (self.read_u64(at) >> ((at.as_u64() & 4) * 8)) as u32
    }

    /// Writes the aligned 4 bytes that `at` lies in.
    #[inline]
    pub fn write_u32(&mut self, at: Hpa, value: u32) {
        let shift = (at.as_u64() & 4) * 8;
        let word = self.read_u64(at) & !(0xffff_ffff << shift) | u64::from(value) << shift;
        self.write_u64(at, word);
    }

    /// Reads a byte.
    #[inline]
    pub fn read_u8(&self, at: Hpa) -> u8 {
        (self.read_u64(at) >> ((at.as_u64() & 7) * 8)) as u8
    }

    /// Writes a byte.
    #[inline]
    pub fn write_u8(&mut self, at: Hpa, value: u8) {
        let shift = (at.as_u64() & 7) * 8;
        let word = self.read_u64(at) & !(0xff << shift) | u64::from(value) << shift;
        self.write_u64(at, word);
    }

    /// Reads `size` bytes, at most 8, of any alignment; the rest of the value is 0.
    #[inline]
    pub fn read_sized(&self, at: Hpa, size: u8) -> u64 {
        let offset = at.as_u64() & 7;
        if size == 8 && offset == 0 {
            return self.read_u64(at);
        }
        let low = self.read_u64(at) >> (offset * 8);
        let mask = if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 };
        if offset + u64::from(size) <= 8 {
            low & mask
        } else {
            let next = Hpa::new((at.as_u64() | 7).wrapping_add(1));
            (low | self.read_u64(next) << (64 - offset * 8)) & mask
        }
    }

    /// Writes the low `size` bytes, at most 8, of any alignment.
    #[inline]
    pub fn write_sized(&mut self, at: Hpa, size: u8, value: u64) {
        if size == 8 && at.is_aligned(8) {
            return self.write_u64(at, value);
        }
        for byte in 0..u64::from(size) {
            self.write_u8(Hpa::new(at.as_u64().wrapping_add(byte)), (value >> (byte * 8)) as u8);
        }
    }

    /// Copies from memory, with any alignment.
    pub fn read(&self, at: Hpa, buffer: &mut [u8]) {
        for (offset, byte) in (0..).zip(buffer) {
            *byte = self.read_u8(Hpa::new(at.as_u64().wrapping_add(offset)));
        }
    }

    /// Copies to memory, with any alignment.
    pub fn write(&mut self, at: Hpa, bytes: &[u8]) {
        for (offset, byte) in (0..).zip(bytes) {
            self.write_u8(Hpa::new(at.as_u64().wrapping_add(offset)), *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_alignments_agree_with_bytes() {
        let mut memory = Memory::new(1);
        let bytes: Vec<u8> = (1..=64).collect();
        memory.write(Hpa::new(0x100), &bytes);
        for offset in 0..32u64 {
            let at = Hpa::new(0x100 + offset);
            for size in [1u8, 2, 4, 8] {
                let mut buffer = [0; 8];
                memory.read(at, &mut buffer[..usize::from(size)]);
                assert_eq!(memory.read_sized(at, size), u64::from_le_bytes(buffer));
            }
        }
        memory.write_sized(Hpa::new(0x106), 4, 0xaabb_ccdd);
        assert_eq!(memory.read_sized(Hpa::new(0x106), 4), 0xaabb_ccdd);
        assert_eq!(memory.read_u8(Hpa::new(0x105)), 6);
        assert_eq!(memory.read_u8(Hpa::new(0x10a)), 11);
        memory.write_u32(Hpa::new(0x104), 7);
        assert_eq!((memory.read_u32(Hpa::new(0x104)), memory.read_u8(Hpa::new(0x103))), (7, 4));
    }

    #[test]
    fn nothing_is_beyond() {
        let mut memory = Memory::new(1);
        memory.write_u64(Hpa::new(0x1000), 5);
        assert_eq!(memory.read_u64(Hpa::new(0x1000)), u64::MAX);
        assert_eq!(memory.read_u64(Hpa::new(u64::MAX)), u64::MAX);
        assert_eq!(memory.read_sized(Hpa::new(0xffc), 8), 0xffff_ffff_0000_0000);
    }
}
