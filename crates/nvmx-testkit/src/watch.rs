//! Does the engine keep to what it was given and to a bounded amount of work, and what if somebody
//! writes to L1's memory while it reads?
//!
//! A [`crate::Nest`] looks at each call that the engine makes to its host: which frames and VMCSs it
//! names, and how many calls one exit takes. Before L2 runs it looks at vmcs02: no address there may
//! lead to memory of L0's but to what is made for L2. A [`Tamper`] is another processor of L1, or a
//! device, that changes words just after, or just before, the engine has read them.

use std::cell::{Cell, RefCell};

use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::controls::{EntryCtls, ExitCtls, ProcCtls, ProcCtls2};
use vmx_defs::{Field, Hpa};
use vmx_model::Memory;
use vmx_model::retention::Rng;
use vmx_model::vmcs::Vmcs;

use crate::frames::{self, Use};

/// Calls to the host that one exit may take, besides those for its tables: the fields of a VMCS, a
/// VMCS that makes room for another in the cache, and three MSR areas of 512 entries.
const CALLS: u64 = 8_192;
/// Calls for each frame of the pool: a table that is composed anew takes a few for each entry.
const CALLS_FOR_A_FRAME: u64 = 4 * 512;

/// Who else writes to L1's memory.
#[derive(Clone, Debug)]
pub struct Tamper {
    rng: Rng,
    odds: u64,
}

impl Tamper {
    /// Changes one word in `odds` that the engine reads.
    pub fn new(seed: u64, odds: u64) -> Self {
        Self { rng: Rng::new(seed), odds }
    }

    /// The new value of a word, if it gets one.
    fn instead(&mut self, value: u64) -> Option<u64> {
        if !self.rng.one_in(self.odds) {
            return None;
        }
        Some(match self.rng.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => self.rng.next(),
            3 => value ^ 7,
            4 => value ^ self.rng.below(512) << 12,
            5 => value ^ 3 << 8,
            _ => value ^ 1 << self.rng.below(64),
        })
    }
}

/// What is watched on a machine.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Frames of the pool.
    frames: u32,
    processors: usize,
    /// Calls since the exit.
    calls: Cell<u64>,
    most_calls: Cell<u64>,
    tamper: RefCell<Option<Tamper>>,
}

impl Watch {
    pub(crate) fn new(frames: u32, processors: usize) -> Self {
        let (calls, most_calls, tamper) = Default::default();
        Self { frames, processors, calls, most_calls, tamper }
    }

    pub(crate) fn set_tamper(&self, tamper: Option<Tamper>) {
        *self.tamper.borrow_mut() = tamper;
    }

    /// An exit is about to be handled.
    pub(crate) fn exit(&self) {
        self.calls.set(0);
    }

    /// The greatest number of calls that an exit has taken.
    pub(crate) fn most_calls(&self) -> u64 {
        self.most_calls.get()
    }

    /// The engine calls its host.
    #[inline]
    pub(crate) fn call(&self) {
        let calls = self.calls.get() + 1;
        self.calls.set(calls);
        self.most_calls.set(self.most_calls.get().max(calls));
        let limit = CALLS + CALLS_FOR_A_FRAME * u64::from(self.frames);
        assert!(calls <= limit, "one exit takes more than {limit} calls to the host");
    }

    /// Whether somebody writes to L1's memory.
    #[inline]
    pub(crate) fn tampers(&self) -> bool {
        self.tamper.borrow().is_some()
    }

    /// What stands in the place of a word that the engine reads.
    pub(crate) fn instead(&self, value: u64) -> Option<u64> {
        self.tamper.borrow_mut().as_mut()?.instead(value)
    }

    /// The engine names a frame.
    #[inline]
    pub(crate) fn frame(&self, frame: Hpa) {
        assert!(self.is_pool(frame) || self.is_own(frame), "{frame:?} was not given to the engine");
    }

    fn is_pool(&self, frame: Hpa) -> bool {
        let size = u64::from(self.frames) * PAGE_SIZE;
        (frames::POOL.as_u64()..frames::POOL.as_u64() + size).contains(&frame.as_u64())
    }

    /// Whether a shadow table has this entry.
    fn is_in_pool(&self, memory: &Memory, value: u64) -> bool {
        let words = u64::from(self.frames) * PAGE_SIZE / 8;
        (0..words).any(|word| memory.read_u64(Hpa::new(frames::POOL.as_u64() + 8 * word)) == value)
    }

    fn is_own(&self, frame: Hpa) -> bool {
        (0..self.processors).any(|processor| {
            [Use::MsrBitmap02, Use::Scratch]
                .iter()
                .any(|what| frames::own(processor, *what) == frame)
        })
    }

    /// L2 is about to run on a processor with this VMCS.
    pub(crate) fn before_l2(&self, processor: usize, vmcs: &Vmcs) {
        let get = |field| vmcs.get(field);
        assert!(vmcs.proc().contains(ProcCtls::MSR_BITMAPS | ProcCtls::SECONDARY_CONTROLS));
        assert!(vmcs.proc2().contains(ProcCtls2::EPT | ProcCtls2::VPID));
        assert!(vmcs.exit().contains(ExitCtls::HOST_ADDRESS_SPACE_SIZE | ExitCtls::LOAD_EFER));
        assert!(vmcs.entry().contains(EntryCtls::LOAD_EFER | EntryCtls::LOAD_PAT));
        assert!(get(Field::VPID) > 1, "the VPID of L0's or L1's");
        let bitmap = frames::own(processor, Use::MsrBitmap02).as_u64();
        assert_eq!(get(Field::MSR_BITMAP), bitmap);
        let table = vmcs.eptp().map_or(0, |eptp| eptp.table());
        assert!(self.is_pool(Hpa::new(table)) || table == frames::EPT01, "EPTP {table:#x}");
        assert_eq!(get(Field::VMCS_LINK_POINTER), u64::MAX);
        for count in
            [Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_COUNT]
        {
            assert_eq!(get(count), 0, "{count:?}");
        }
        if vmcs.proc().contains(ProcCtls::IO_BITMAPS) {
            for field in [Field::IO_BITMAP_A, Field::IO_BITMAP_B] {
                let page = Hpa::new(get(field));
                let fits = page == frames::ONES || frames::is_l1(page);
                assert!(fits && page.is_aligned(PAGE_SIZE), "{field:?} is {page:?}");
            }
        }
    }
}

/// A pattern in L0's memory that nobody may change, and that no guest may see.
#[derive(Debug)]
pub struct Canary {
    words: Vec<Hpa>,
}

/// The high bits of each word of the pattern.
const PATTERN: u64 = 0xca9a_27b1_0000_0000;
const PATTERN_BITS: u64 = 0xffff_ffff_0000_0000;

impl Canary {
    /// Paints what L0 does not use of the memory around what it does.
    pub fn paint(nest: &mut crate::Nest, frames: u32) -> Self {
        let end = frames::POOL.as_u64() + u64::from(frames) * PAGE_SIZE;
        let around = [
            0..frames::ONES.as_u64(),
            frames::MSR_BITMAP.as_u64() + PAGE_SIZE..0x8_0000,
            frames::POOL.as_u64() - 16 * PAGE_SIZE..frames::POOL.as_u64(),
            end..end + 16 * PAGE_SIZE,
        ];
        let memory = &mut nest.machine_mut().memory;
        let mut words = Vec::new();
        for page in around.into_iter().flat_map(|range| range.step_by(PAGE_SIZE as usize)) {
            let used = (0..4).any(|processor| {
                use Use::{MsrBitmap02, Scratch, Vmcs01, Vmcs02, Vmxon};
                [Vmxon, Vmcs01, Vmcs02, MsrBitmap02, Scratch]
                    .iter()
                    .any(|what| frames::own(processor, *what).as_u64() == page)
            });
            if used {
                continue;
            }
            for at in (page..page + PAGE_SIZE).step_by(8).map(Hpa::new) {
                memory.write_u64(at, PATTERN | at.as_u64());
                words.push(at);
            }
        }
        Self { words }
    }

    /// Whether a value is of the pattern, or an address that only L0 knows, or an entry of a shadow
    /// table.
    pub fn betrays(nest: &crate::Nest, value: u64) -> bool {
        // What an entry that points to a table has beside the address and the rights. Others may
        // flip bits until a word of L1's looks like one; but is it one?
        let shadow = 1 << 63 | 1 << 8;
        let is_pointer = value & !0x000f_ffff_ffff_f007 == shadow && value & 7 != 0;
        value & PATTERN_BITS == PATTERN
            || value == crate::vmcs01::HOST_RIP
            || is_pointer && nest.watch.is_in_pool(&nest.machine().memory, value)
    }

    /// Looks at all of L0's pattern and of L1's memory.
    ///
    /// # Panics
    /// Where the one was written, or the other holds something of L0's.
    pub fn check(&self, nest: &crate::Nest) {
        let memory = &nest.machine().memory;
        for at in &self.words {
            assert_eq!(memory.read_u64(*at), PATTERN | at.as_u64(), "L0's {at:?} was written");
        }
        for at in (frames::L1_RAM..memory.size()).step_by(8).map(Hpa::new) {
            let value = memory.read_u64(at);
            assert!(!Self::betrays(nest, value), "L1's memory has {value:#x} at {at:?}");
        }
    }
}
