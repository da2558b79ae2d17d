//! Under random edits of EPT12, accesses, switches and INVEPTs on two processors: does each root
//! translate only as a processor might that caches what it could have read?
//!
//! The oracle knows when each processor ran on each EP4TA, and what each entry of L1 was when. An
//! entry may be used as it was at some moment that lies in such a time and after the last INVEPT
//! there; and as it is now.

use super::super::walk::shift;
use super::tests::{Bed, Mapped, eptp, rules};
use super::*;
use crate::host::L1Memory;
use crate::testing::{Event, Remapped};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use proptest::prelude::*;
use vmx_defs::ept::EptEntryClass;

const PROCESSORS: usize = 2;
/// L1's pages from [`TABLES`] on that may be tables of any level.
const PAGES: u64 = 6;
const TABLES: u64 = 0x1_0000;
/// The indexes in use. The last is outside of the fill window of the others.
const INDEXES: [usize; 3] = [0, 1, 17];
/// A page that L0 hides.
const HIDDEN: u64 = 0x1_8000;

#[derive(Clone, Debug)]
enum Op {
    Edit {
        page: u64,
        index: usize,
        entry: u64,
    },
    /// VM entry, or VMFUNC if the processor runs.
    Switch {
        processor: usize,
        eptp: usize,
    },
    /// As `Switch`, with every other root dropped before.
    Reload {
        processor: usize,
        eptp: usize,
    },
    Access {
        processor: usize,
        gpa: u64,
        kind: u64,
        walk: bool,
    },
    /// L0 changes what EPT01 makes of a range.
    Ept01 {
        range: usize,
        to: Change,
    },
    /// L2 exits, if it runs, and L1 executes INVEPT.
    InvEpt {
        processor: usize,
        eptp: Option<usize>,
    },
}

/// What EPT01 makes of a range of L1's addresses.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// As everywhere, all rights.
    Plain,
    /// These rights.
    Rights(EptPermissions),
    /// Other memory, with all rights.
    Moved,
    /// A page of ones.
    Hidden,
}

/// Ranges that EPT01 changes for: first address and pages. Only the first can be hidden: the others
/// have tables of L1.
const RANGES: [(u64, u64); 7] = [
    (0x5_0000, 1),
    (0x6_1000, 1),
    (TABLES + 0x2000, 1),
    (TABLES, 16),
    (0, 512),
    (0x20_0000, 1),
    (0x20_0000, 512),
];

fn change() -> impl Strategy<Value = Change> {
    let rights = [1, 3, 5, 0].map(EptPermissions::from_bits_truncate);
    prop_oneof![
        3 => Just(Change::Plain),
        3 => proptest::sample::select(rights.to_vec()).prop_map(Change::Rights),
        2 => Just(Change::Moved),
        1 => Just(Change::Hidden),
    ]
}

/// As the hypervisor does it: what was composed goes, EPT01 changes, everyone is asked to flush.
fn change_ept01(bed: &mut Bed, (start, pages): (u64, u64), to: Change) {
    bed.shadow.forget_pages(&mut bed.host, L1Gpa::new(start), pages);
    let ram = &mut bed.host.ram;
    let range = start..start + 0x1000 * pages;
    ram.hidden.retain(|hidden| *hidden != range);
    // What lies within the range is gone; what only overlaps counts outside of it.
    ram.remapped.retain(|one| one.range.start < range.start || range.end < one.range.end);
    let plain = crate::testing::TestHost::HPA_OF_L1;
    let (offset, rights) = match to {
        Change::Plain => (plain, EptPermissions::all()),
        Change::Rights(rights) => (plain, rights),
        Change::Moved => (3 * plain, EptPermissions::all()),
        Change::Hidden => {
            if start == RANGES[0].0 {
                ram.hidden.push(range);
            }
            (plain, EptPermissions::all())
        }
    };
    let overlaps =
        |one: &Remapped| one.range.start < start + 0x1000 * pages && start < one.range.end;
    if (offset, rights) != (plain, EptPermissions::all()) || ram.remapped.iter().any(overlaps) {
        let range = start..start + 0x1000 * pages;
        ram.remapped.insert(0, Remapped { range, offset, rights });
    }
    bed.shadow.shootdown().request();
}

fn eptps() -> [Eptp; 5] {
    [
        eptp(TABLES, false),
        eptp(TABLES, true),
        eptp(TABLES, false).with_memory_type(memory_type::UC),
        eptp(TABLES + 0x1000, false),
        eptp(TABLES + 0x1000, true),
    ]
}

fn gpas() -> impl Iterator<Item = u64> {
    let way = (0..8).map(|n: u64| (n >> 2) << 39 | (n >> 1 & 1) << 30 | (n & 1) << 21);
    way.flat_map(|way| INDEXES.map(|at| way | (at as u64) << 12))
}

fn entry() -> impl Strategy<Value = u64> {
    let rights =
        prop_oneof![6 => Just(7u64), 1 => Just(1), 1 => Just(3), 1 => Just(4), 1 => Just(5)];
    let flags = prop_oneof![2 => Just(0u64), 1 => Just(0x100), 2 => Just(0x300)];
    let target = prop_oneof![
        8 => (0..PAGES).prop_map(|page| TABLES | page << 12),
        3 => (0..PAGES).prop_map(|page| TABLES | page << 12 | 6 << 3),
        3 => prop_oneof![Just(0x5_0000u64), Just(0x6_1000), Just(HIDDEN)].prop_map(|page| page | 6 << 3),
        1 => Just(0x5_0000),
        2 => Just(6 << 3 | 1 << 7),
        1 => Just(0x20_0000 | 1 << 7),
        1 => Just(1 << 45),
    ];
    prop_oneof![
        1 => Just(0),
        8 => (rights, flags, target).prop_map(|(rights, flags, target)| rights | flags | target),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let processor = || 0..PROCESSORS;
    let index = proptest::sample::select(&INDEXES[..]);
    let gpa = proptest::sample::select(gpas().collect::<Vec<_>>());
    prop_oneof![
        8 => (0..PAGES, index, entry())
            .prop_map(|(page, index, entry)| Op::Edit { page, index, entry }),
        4 => (processor(), 0..5usize)
            .prop_map(|(processor, eptp)| Op::Switch { processor, eptp }),
        1 => (processor(), 0..5usize)
            .prop_map(|(processor, eptp)| Op::Reload { processor, eptp }),
        12 => (processor(), gpa, 0..3u64, any::<bool>())
            .prop_map(|(processor, gpa, kind, walk)| Op::Access { processor, gpa, kind, walk }),
        3 => (processor(), proptest::option::of(0..5usize))
            .prop_map(|(processor, eptp)| Op::InvEpt { processor, eptp }),
        2 => (0..RANGES.len(), change()).prop_map(|(range, to)| Op::Ept01 { range, to }),
    ]
}

/// An entry of L1 as it was until some time.
struct Past {
    at: u64,
    value: u64,
    from: usize,
    until: usize,
}

/// A time in which a processor ran on an EP4TA.
struct Use {
    processor: usize,
    table: u64,
    from: usize,
    until: usize,
}

struct Oracle {
    now: usize,
    past: Vec<Past>,
    current: Vec<(u64, u64, usize)>,
    uses: Vec<Use>,
    running: [Option<Eptp>; PROCESSORS],
    hints: [[RootHint; 3]; PROCESSORS],
    /// When an EPT violation of (processor, EP4TA, gpa) was last reflected.
    reflected: Vec<(usize, u64, u64, usize)>,
    /// Frames that a processor may know.
    known: [BTreeSet<u64>; PROCESSORS],
    /// Those of them that have begun a new life.
    reborn: [BTreeSet<u64>; PROCESSORS],
}

impl Oracle {
    fn new(bed: &mut Bed) -> Self {
        let slots =
            (0..PAGES).flat_map(|page| INDEXES.map(|at| TABLES + 0x1000 * page + 8 * at as u64));
        let mut read = |at| bed.host.ram.read_u64(L1Gpa::new(at));
        Self {
            now: 0,
            past: Vec::new(),
            current: slots.map(|at| (at, read(at), 0)).collect(),
            uses: Vec::new(),
            running: [None; PROCESSORS],
            hints: Default::default(),
            reflected: Vec::new(),
            known: Default::default(),
            reborn: Default::default(),
        }
    }

    /// Notes what L1's entries have become.
    fn see(&mut self, bed: &mut Bed) {
        for (at, value, from) in &mut self.current {
            let fresh = bed.host.ram.read_u64(L1Gpa::new(*at));
            if fresh != *value {
                self.past.push(Past { at: *at, value: *value, from: *from, until: self.now });
                (*value, *from) = (fresh, self.now);
            }
        }
    }

    fn run(&mut self, processor: usize, eptp: Option<Eptp>) {
        self.running[processor] = eptp;
    }

    /// Time passes; processors that run use what they run on.
    fn tick(&mut self) {
        self.now += 1;
        for (processor, eptp) in self.running.iter().enumerate() {
            if let Some(eptp) = eptp {
                let table = eptp.table();
                self.uses.push(Use { processor, table, from: self.now - 1, until: self.now });
            }
        }
    }

    /// What the entry at `at` may be taken for.
    fn values(&self, at: u64, processor: usize, table: u64, gpa: u64) -> Vec<u64> {
        let floor = self
            .reflected
            .iter()
            .filter(|seen| (seen.0, seen.1, seen.2) == (processor, table, gpa))
            .map(|seen| seen.3)
            .max()
            .unwrap_or(0);
        let used = |past: &&Past| {
            self.uses.iter().any(|one| {
                (one.processor, one.table) == (processor, table)
                    && one.until.min(past.until) > one.from.max(past.from).max(floor)
            })
        };
        let past = self.past.iter().filter(|past| past.at == at).filter(used);
        let mut values: Vec<_> = past.map(|past| past.value).collect();
        values.extend(self.current.iter().filter(|slot| slot.0 == at).map(|slot| slot.1));
        values
    }

    /// Whether a processor may have come to `mapped` from the table at `table`, with the rights
    /// above it.
    #[allow(clippy::too_many_arguments, reason = "the state of a recursive walk")]
    fn explains(
        &self,
        bed: &mut Bed,
        mapped: Mapped,
        processor: usize,
        eptp: Eptp,
        gpa: u64,
        (table, level, above): (u64, u8, u64),
    ) -> bool {
        let at = table + 8 * index(L2Gpa::new(gpa), level) as u64;
        self.values(at, processor, eptp.table(), gpa).into_iter().any(|value| {
            let entry = EptEntry::from(value);
            if eptp.accessed_dirty() && !entry.accessed() {
                return false;
            }
            let rights = above & value;
            match entry.classify(level, rules().caps, rules().physical_width) {
                EptEntryClass::Table => {
                    let below = (entry.address(), level - 1, rights);
                    self.explains(bed, mapped, processor, eptp, gpa, below)
                }
                EptEntryClass::Page => {
                    let page = L1Gpa::new(entry.address() + (gpa & ((1 << shift(level)) - 1)));
                    let real = bed.host.translate(page);
                    let mut most = rights & u64::from(real.permissions.bits());
                    if eptp.accessed_dirty() && !entry.dirty() {
                        most &= !2;
                    }
                    mapped.hpa == real.hpa.as_u64()
                        && mapped.kind == value & 0x78
                        && mapped.rights & !most == 0
                }
                EptEntryClass::NotPresent | EptEntryClass::Misconfigured => false,
            }
        })
    }

    /// Each running processor's translations, all of them.
    fn check_translations(&self, bed: &mut Bed) {
        for (processor, eptp) in self.running.iter().enumerate() {
            let Some(eptp) = *eptp else { continue };
            for gpa in gpas() {
                let Some(mapped) = bed.look(bed.root02(processor), gpa) else { continue };
                let top = (eptp.table(), 4, 7);
                assert!(
                    self.explains(bed, mapped, processor, eptp, gpa, top),
                    "processor {processor} on {eptp:?}: {gpa:#x} is {mapped:x?}"
                );
            }
        }
    }

    /// No frame begins a new life while a processor that runs may know its old one; `acting` has
    /// until its next VM entry.
    fn check_frames(&mut self, bed: &mut Bed, acting: usize) {
        for event in core::mem::take(&mut bed.host.events) {
            match event {
                Event::InvEpt(InvEpt::All) => {
                    self.known[acting].clear();
                    self.reborn[acting].clear();
                }
                Event::InvEpt(InvEpt::Single(_)) => {}
                Event::Fill(frame) => {
                    for (processor, known) in self.known.iter().enumerate() {
                        if known.contains(&frame.as_u64()) {
                            let runs = self.running[processor].is_some() && processor != acting;
                            assert!(!runs, "processor {processor} may know {frame:?}");
                            self.reborn[processor].insert(frame.as_u64());
                        }
                    }
                }
            }
        }
        for (processor, eptp) in self.running.iter().enumerate() {
            if eptp.is_some() {
                assert!(self.reborn[processor].is_empty(), "entered with {:x?}", self.reborn);
                let mut frames = alloc::vec![bed.root02(processor).table()];
                while let Some(frame) = frames.pop() {
                    if self.known[processor].insert(frame) || frame == bed.root02(processor).table()
                    {
                        frames.extend(bed.shadow.children(&bed.host, frame));
                    }
                }
            }
        }
    }
}

/// What L1's EPT says now: rights, or how the walk failed.
fn walk_now(bed: &mut Bed, eptp: Eptp, gpa: u64) -> Result<(u64, u64), Resolution> {
    let mut table = eptp.table();
    let mut rights = 7;
    for level in (1..=4).rev() {
        let value = bed.get(table, index(L2Gpa::new(gpa), level));
        let entry = EptEntry::from(value);
        rights &= value;
        match entry.classify(level, rules().caps, rules().physical_width) {
            EptEntryClass::Table => table = entry.address(),
            EptEntryClass::Page => {
                return Ok((rights, entry.address() + (gpa & ((1 << shift(level)) - 1))));
            }
            EptEntryClass::NotPresent => return Ok((0, 0)),
            EptEntryClass::Misconfigured => break,
        }
    }
    Err(Resolution::Misconfiguration)
}

fn switch(bed: &mut Bed, oracle: &mut Oracle, processor: usize, eptp: Eptp) {
    // As L1 has it that moves EPTPs about in its list: a hint may be of another EPTP, and stale.
    let hint = &mut oracle.hints[processor][oracle.now % 3];
    if bed.shadow.switch(&mut bed.host, processor, eptp, hint).unwrap().is_none() {
        return;
    }
    bed.shadow.enter(processor);
    bed.shadow.flush_if_behind(&mut bed.host, processor).unwrap();
    oracle.run(processor, Some(eptp));
}

fn access(bed: &mut Bed, oracle: &mut Oracle, processor: usize, gpa: u64, access: EptViolation) {
    let Some(eptp) = oracle.running[processor] else { return };
    let needed = u64::from(wanted(access, eptp.accessed_dirty()).bits());
    let says = walk_now(bed, eptp, gpa);
    let Some(answer) = bed.access(processor, gpa, access) else { return };
    bed.shadow.flush_if_behind(&mut bed.host, processor).unwrap();
    match (answer, says) {
        (Resolution::Filled, Ok((rights, _))) => assert_eq!(rights & needed, needed),
        (Resolution::Violation(told), Ok((rights, _))) => {
            assert_ne!(rights & needed, needed);
            assert_eq!(u64::from(told) >> 3 & 7, rights);
            assert_eq!(u64::from(told) & 7, needed);
        }
        (Resolution::Hidden(_), Ok((rights, page))) => {
            assert_eq!(rights & needed, needed);
            let real = bed.host.translate(L1Gpa::new(page)).permissions;
            assert_ne!(u64::from(real.bits()) & needed, needed);
        }
        (answer, says) => assert_eq!(Err(answer), says),
    }
    if matches!(answer, Resolution::Violation(_)) {
        oracle.reflected.push((processor, eptp.table(), gpa, oracle.now));
    }
}

fn run(processors: usize, frames: u32, leaf_shift: u8, start: Vec<u64>, ops: Vec<Op>) {
    let mut bed = Bed::with(frames, 4, processors);
    bed.host.ram.leaf_shift = leaf_shift;
    bed.host.ram.hidden.push(HIDDEN..HIDDEN + 0x1000);
    for (number, entry) in start.into_iter().enumerate() {
        let page = TABLES + 0x1000 * (number / INDEXES.len()) as u64;
        bed.put(page, INDEXES[number % INDEXES.len()], entry);
    }
    let mut oracle = Oracle::new(&mut bed);
    for op in ops {
        let mut acting = 0;
        match op {
            Op::Edit { page, index, entry } => bed.put(TABLES + 0x1000 * page, index, entry),
            Op::Switch { processor, eptp } => {
                let processor = processor % processors;
                acting = processor;
                switch(&mut bed, &mut oracle, processor, eptps()[eptp]);
            }
            Op::Reload { processor, eptp } => {
                let processor = processor % processors;
                acting = processor;
                let (eptp, hint) = (eptps()[eptp], &mut RootHint::default());
                let found = bed.shadow.switch_anew(&mut bed.host, processor, eptp, hint).unwrap();
                if found.is_some() {
                    bed.shadow.enter(processor);
                    oracle.run(processor, Some(eptp));
                }
                bed.shadow.flush_if_behind(&mut bed.host, processor).unwrap();
            }
            Op::Access { processor, gpa, kind, walk } => {
                let processor = processor % processors;
                acting = processor;
                let kind = EptViolation::from(1 << kind);
                let kind = if walk && !kind.fetch() { kind.with_linear_valid(true) } else { kind };
                access(&mut bed, &mut oracle, processor, gpa, kind);
            }
            Op::Ept01 { range, to } => change_ept01(&mut bed, RANGES[range], to),
            Op::InvEpt { processor, eptp } => {
                let processor = processor % processors;
                acting = processor;
                bed.shadow.leave(processor);
                oracle.run(processor, None);
                let eptp = eptp.map(|eptp| eptps()[eptp]);
                bed.shadow.invalidate(&mut bed.host, processor, eptp).unwrap();
                let table = eptp.map(Eptp::table);
                oracle.uses.retain(|one| {
                    one.processor != processor || table.is_some_and(|table| table != one.table)
                });
            }
        }
        oracle.see(&mut bed);
        bed.shadow.check(&bed.host);
        oracle.check_frames(&mut bed, acting);
        oracle.check_translations(&mut bed);
        oracle.tick();
    }
    for processor in 0..processors {
        bed.shadow.leave(processor);
    }
    bed.shadow.drop_unused(&mut bed.host, 0).unwrap();
    assert_eq!(bed.shadow.usage(), (0, 0));
    assert_eq!(bed.shadow.pool.available(), frames as usize);
}

impl Shadow {
    /// The frames that the table in `frame` points to.
    fn children(&self, host: &crate::testing::TestHost, frame: u64) -> Vec<u64> {
        use crate::host::Frames;
        let id = self.pool.id(Hpa::new(frame)).unwrap();
        let table = self.pool.get(id).unwrap();
        bits(table.live)
            .filter_map(|at| self.child(table.key.level, host.load(Hpa::new(frame), at)))
            .map(|child| self.pool.hpa(child).as_u64())
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn translations_are_what_a_tlb_might_hold(
        leaf_shift in prop_oneof![Just(12u8), Just(21)],
        processors in 1..=PROCESSORS,
        start in proptest::collection::vec(entry(), PAGES as usize * INDEXES.len()),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        run(processors, 96, leaf_shift, start, ops);
    }

    #[test]
    fn so_they_are_where_frames_are_short(
        processors in 1..=PROCESSORS,
        start in proptest::collection::vec(entry(), PAGES as usize * INDEXES.len()),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        run(processors, 16, 21, start, ops);
    }
}
