//! Which MSR accesses of L2 exit, and whose exit is it?
//!
//! The processor runs L2 with a bitmap of ours: an access passes without an exit only where L0 and
//! L1 both let it. L1's bitmap is memory that L1 may change between exits, and reading all of it at
//! each VM entry would cost thousands of instructions; so only the words of MSRs that systems touch
//! often are merged, and for all others the exit is taken and L1's bit looked up then.

use crate::host::{Host, L1Memory};
use vmx_defs::controls::ProcCtls;
use vmx_defs::{Field, Hpa, L1Gpa};

use crate::vmcs12::Vmcs12;

/// First MSR of the bitmaps' high range.
const HIGH: u32 = 0xc000_0000;
/// Number of MSRs in each range.
const RANGE: u32 = 0x2000;
/// Position in a bitmap page of the write half, in 8-byte words.
const WRITE_WORDS: usize = 256;
/// Position of the high range within a half, in 8-byte words.
const HIGH_WORDS: usize = 128;

/// The words, within a half, that are merged: those of the time-stamp counter, SYSENTER, PAT, the
/// TSC deadline, x2APIC, EFER and SYSCALL, the segment bases and TSC_AUX.
const MERGED: [usize; 7] = [
    0x010 / 64,
    0x174 / 64,
    0x277 / 64,
    0x6e0 / 64,
    0x800 / 64,
    HIGH_WORDS + 0x80 / 64,
    HIGH_WORDS + 0x100 / 64,
];

/// The bitmap that one processor runs L2 with.
#[derive(Clone, Debug)]
pub(crate) struct MsrBitmap {
    page: Hpa,
    /// For each merged word, the bits that L0 lets pass: reads, then writes.
    pass: [[u64; 2]; MERGED.len()],
    /// What the page holds.
    merged: [[u64; 2]; MERGED.len()],
}

impl MsrBitmap {
    /// A bitmap in the page at `page`, with every access exiting.
    pub(crate) fn new(host: &mut impl Host, page: Hpa) -> Self {
        host.fill(page, u64::MAX);
        let mut pass = [[0; 2]; MERGED.len()];
        for (words, number) in pass.iter_mut().zip(MERGED) {
            for bit in 0..64 {
                let index = msr_at(number) + bit;
                words[0] |= u64::from(host.may_pass_read(index)) << bit;
                words[1] |= u64::from(host.may_pass_write(index)) << bit;
            }
        }
        Self { page, pass, merged: [[u64::MAX; 2]; MERGED.len()] }
    }

    /// The address for vmcs02.
    pub(crate) fn page(&self) -> Hpa {
        self.page
    }

    /// Merges L1's bitmap of `vmcs` into the page, for a VM entry.
    pub(crate) fn merge(&mut self, host: &mut impl Host, vmcs: &Vmcs12) {
        let bitmap = vmcs
            .proc()
            .contains(ProcCtls::MSR_BITMAPS)
            .then(|| L1Gpa::new(vmcs.get(Field::MSR_BITMAP)));
        for ((pass, merged), number) in self.pass.iter().zip(&mut self.merged).zip(MERGED) {
            for (half, (pass, merged)) in pass.iter().zip(merged).enumerate() {
                let word = number + half * WRITE_WORDS;
                let l1 = match bitmap.and_then(|page| page.checked_add(8 * word as u64)) {
                    Some(at) if *pass != 0 => host.read_u64(at),
                    _ => u64::MAX,
                };
                let wanted = !pass | l1;
                if *merged != wanted {
                    *merged = wanted;
                    host.store(self.page, word, wanted);
                }
            }
        }
    }
}

/// The MSR whose bit is bit 0 of word `number` of a half.
fn msr_at(number: usize) -> u32 {
    match number.checked_sub(HIGH_WORDS) {
        Some(high) => HIGH + 64 * high as u32,
        None => 64 * number as u32,
    }
}

/// Whether L1 wants the exit of an RDMSR or WRMSR of `index` by L2 (SDM Vol. 3C, "MSR-Bitmap
/// Address"): without bitmaps always, outside their ranges always, else as its bit says now.
pub(crate) fn l1_intercepts(
    memory: &mut impl L1Memory,
    vmcs: &Vmcs12,
    index: u32,
    write: bool,
) -> bool {
    if !vmcs.proc().contains(ProcCtls::MSR_BITMAPS) {
        return true;
    }
    let (number, offset) = match (index, index.wrapping_sub(HIGH)) {
        (low, _) if low < RANGE => (0, low),
        (_, high) if high < RANGE => (HIGH_WORDS, high),
        _ => return true,
    };
    let word = number + offset as usize / 64 + usize::from(write) * WRITE_WORDS;
    let bitmap = L1Gpa::new(vmcs.get(Field::MSR_BITMAP));
    match bitmap.checked_add(8 * word as u64) {
        Some(at) => memory.read_u64(at) >> (offset % 64) & 1 != 0,
        None => true,
    }
}
