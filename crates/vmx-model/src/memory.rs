//! What is behind a physical address?
//!
//! RAM from address 0 on, shared by all processors of a machine. Nothing is beyond it: reads give
//! ones, writes are swallowed, as on a bus where no device answers. Accesses of 4 and 8 bytes that
//! are aligned are single, which is all the atomicity a model without threads needs.

use rustc_hash::FxHashMap;
use vmx_defs::Hpa;
use vmx_defs::addr::PAGE_SIZE;

/// RAM.
#[derive(Clone, Debug)]
pub struct Memory {
    words: Vec<u64>,
    record: Option<Box<Record>>,
}

/// What was written, for whoever asks which values a processor may have read.
#[derive(Clone, Debug, Default)]
struct Record {
    /// Index and old value of each word written since the last [`Memory::take_back`].
    journal: Vec<(usize, u64)>,
    /// For each word, its old values with the time until which each stood.
    history: FxHashMap<usize, Vec<(u64, u64)>>,
    /// How often writes were taken back: a measure of the work done.
    trials: u64,
}

impl Memory {
    /// `pages` pages of zeros.
    pub fn new(pages: usize) -> Self {
        Self { words: vec![0; pages * (PAGE_SIZE as usize / 8)], record: None }
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
        let index = (at.as_u64() >> 3) as usize;
        if let Some(word) = self.words.get_mut(index) {
            if let Some(record) = &mut self.record {
                record.journal.push((index, *word));
            }
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

    /// Begins to keep a record of writes.
    pub(crate) fn keep_record(&mut self) {
        self.record = Some(Box::default());
    }

    /// Takes back all writes since the last time: the index and the new value of each word that
    /// they changed.
    pub(crate) fn take_back(&mut self) -> FxHashMap<usize, u64> {
        let mut changed = FxHashMap::default();
        let Some(record) = &mut self.record else { return changed };
        record.trials += 1;
        for (index, old) in record.journal.drain(..).rev() {
            changed.entry(index).or_insert(self.words[index]);
            self.words[index] = old;
        }
        changed.retain(|index, new| self.words[*index] != *new);
        changed
    }

    /// How often writes have been taken back.
    pub(crate) fn trials(&self) -> u64 {
        self.record.as_ref().map_or(0, |record| record.trials)
    }

    /// How much has been written, for [`Self::take_back_to`].
    pub(crate) fn mark(&self) -> usize {
        self.record.as_ref().map_or(0, |record| record.journal.len())
    }

    /// Takes back all writes since a mark, as [`Self::take_back`] does.
    pub(crate) fn take_back_to(&mut self, mark: usize) -> FxHashMap<usize, u64> {
        let Some(record) = &mut self.record else { return FxHashMap::default() };
        let before = record.journal.drain(..mark).collect();
        let changed = self.take_back();
        if let Some(record) = &mut self.record {
            record.journal = before;
        }
        changed
    }

    /// Changes words for good, at a time.
    pub(crate) fn commit(&mut self, now: u64, changed: &FxHashMap<usize, u64>) {
        let Some(record) = &mut self.record else { return };
        for (index, new) in changed {
            record.history.entry(*index).or_default().push((now, self.words[*index]));
            self.words[*index] = *new;
        }
    }

    /// The word of this index; ones beyond RAM, where tables may lie, too.
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words.get(index).copied().unwrap_or(u64::MAX)
    }

    /// The values that the `size` bytes (4 or 8, aligned) had after `since`, the present one not
    /// among them, each once.
    pub(crate) fn past_values(&self, at: Hpa, size: u8, since: u64) -> Vec<u64> {
        let index = (at.as_u64() >> 3) as usize;
        let part = |word: u64| {
            if size == 4 { word >> ((at.as_u64() & 4) * 8) & 0xffff_ffff } else { word }
        };
        let Some(past) = self.record.as_ref().and_then(|record| record.history.get(&index)) else {
            return Vec::new();
        };
        let present = part(self.read_u64(at));
        let mut values = Vec::new();
        for (until, value) in past {
            let value = part(*value);
            if *until > since && value != present && !values.contains(&value) {
                values.push(value);
            }
        }
        values
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
