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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHost;
    use crate::testing::rig::{MSR_BITMAP, values};

    const PAGE: Hpa = Hpa::new(0x7000_0000);

    /// Whether the processor exits for an access.
    fn exits(host: &TestHost, index: u32, write: bool) -> bool {
        use crate::host::Frames;
        let high = if index >= HIGH { HIGH_WORDS } else { 0 };
        let half = if write { WRITE_WORDS } else { 0 };
        let word = high + half + (index & 0x1fff) as usize / 64;
        host.load(PAGE, word) >> (index % 64) & 1 != 0
    }

    fn l1_wants(host: &mut TestHost, index: u32, write: bool, wanted: bool) {
        let high = if index >= HIGH { 1024 } else { 0 };
        let half = if write { 2048 } else { 0 };
        let at = MSR_BITMAP + high + half + u64::from((index & 0x1fff) / 64 * 8);
        let old = host.read_u64(L1Gpa::new(at));
        let bit = 1 << (index % 64);
        host.write_u64(L1Gpa::new(at), if wanted { old | bit } else { old & !bit });
    }

    const OFTEN: [u32; 14] = [
        0x10,
        0x174,
        0x175,
        0x176,
        0x277,
        0x6e0,
        0x808,
        0x80b,
        0x830,
        0xc000_0080,
        0xc000_0081,
        0xc000_0100,
        0xc000_0102,
        0xc000_0103,
    ];

    #[test]
    fn an_access_passes_only_where_l0_and_l1_let_it() {
        for l0 in [false, true] {
            for l1 in [false, true] {
                for index in OFTEN {
                    let mut host = TestHost::new(0x1_0000);
                    if l0 {
                        host.msrs.insert(index, 0);
                    }
                    for word in (MSR_BITMAP..MSR_BITMAP + 0x1000).step_by(8) {
                        host.write_u64(L1Gpa::new(word), u64::MAX);
                    }
                    let mut bitmap = MsrBitmap::new(&mut host, PAGE);
                    for write in [false, true] {
                        l1_wants(&mut host, index, write, !l1);
                    }
                    bitmap.merge(&mut host, &values());
                    for write in [false, true] {
                        assert_eq!(exits(&host, index, write), !(l0 && l1), "{index:#x}");
                        assert_eq!(l1_intercepts(&mut host, &values(), index, write), !l1);
                        assert!(exits(&host, index ^ 1, write), "L0 lets its neighbour pass");
                    }
                }
            }
        }
    }

    #[test]
    fn reads_and_writes_are_judged_apart_and_changes_take_effect_at_the_next_entry() {
        let mut host = TestHost::new(0x1_0000);
        host.msrs.insert(0x10, 0);
        let mut bitmap = MsrBitmap::new(&mut host, PAGE);
        assert!(exits(&host, 0x10, false) && exits(&host, 0x10, true), "before any entry");
        for (read, write) in [(false, true), (true, false), (true, true), (false, false)] {
            l1_wants(&mut host, 0x10, false, read);
            l1_wants(&mut host, 0x10, true, write);
            bitmap.merge(&mut host, &values());
            assert_eq!((exits(&host, 0x10, false), exits(&host, 0x10, true)), (read, write));
        }
        // L1 switches its bitmaps off: every access exits, and is its own.
        let mut without = values();
        without.set(Field::PROC_CTLS, 0);
        bitmap.merge(&mut host, &without);
        assert!(exits(&host, 0x10, false) && exits(&host, 0x10, true));
        assert!(l1_intercepts(&mut host, &without, 0x10, false));
        bitmap.merge(&mut host, &values());
        assert!(!exits(&host, 0x10, false));
    }

    #[test]
    fn what_is_not_merged_always_exits() {
        let mut host = TestHost::new(0x1_0000);
        for index in [0x1a0, 0x48, 0xc000_1000, 0x1fff] {
            host.msrs.insert(index, 0);
        }
        let mut bitmap = MsrBitmap::new(&mut host, PAGE);
        bitmap.merge(&mut host, &values());
        for index in [0x1a0, 0x48, 0xc000_1000, 0x1fff] {
            assert!(exits(&host, index, false) && exits(&host, index, true));
        }
    }
}
