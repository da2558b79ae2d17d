//! Can an L1 use up what L0 has, or keep a guest from going on?
//!
//! EPTPs, EPT tables, VMCSs and VPIDs by the hundred, on one to three processors and a host that has
//! little of everything. Quotas are kept at each step, whatever is thrown out is there again when it
//! is needed, the least recently used goes first, and in the end nothing is missing.

use std::collections::BTreeMap;

use nvmx::VmfuncMode;
use nvmx_testkit::seeds;
use nvmx_testkit::walks::{Rules, Walked, walk};
use nvmx_testkit::{Nest, NestConfig, caps};
use vmx_defs::ept::Eptp;
use vmx_defs::{Field, L1Gpa, L2Gpa};
use vmx_model::program::{GuestMode, Setup, VmSetup};
use vmx_model::retention::Rng;
use vmx_model::{
    Action, ModelCaps, Operation, Outcome, Platform, Retention, Session, Step, layout,
};

/// L1's tables: as many of each level, from this page on.
const TABLES: u64 = 256;
const OF_EACH_LEVEL: u64 = 96;
/// Pages for VMCSs.
const REGIONS: u64 = TABLES + 4 * OF_EACH_LEVEL;
const REGION_COUNT: u64 = 200;
/// Pages for data.
const DATA: u64 = REGIONS + REGION_COUNT;
const DATA_PAGES: u64 = 16;
/// Roots of tables that map nothing.
const EMPTY: u64 = DATA + DATA_PAGES;
const EMPTY_COUNT: u64 = 24;
/// Entries of each table in use.
const INDEXES: u64 = 4;
/// Exits to L0 for one access of a guest without paging: a violation for each table that has to be
/// thrown out again, and those that wait for another processor.
const EXITS_FOR_AN_ACCESS: u64 = 40;

fn table(level: u64, number: u64) -> u64 {
    (TABLES + (4 - level) * OF_EACH_LEVEL + number) << 12
}

fn eptp(page: u64, variant: u64) -> Eptp {
    let kind = if variant & 1 != 0 { 0 } else { 6 };
    Eptp::from(page << 12 | (variant >> 1 & 1) << 6 | 3 << 3 | kind)
}

/// One of 384 EPTPs.
fn any_eptp(rng: &mut Rng) -> Eptp {
    eptp(table(4, rng.below(OF_EACH_LEVEL)) >> 12, rng.below(4))
}

fn address(rng: &mut Rng) -> u64 {
    let at = |rng: &mut Rng| rng.below(INDEXES);
    at(rng) << 30 | at(rng) << 21 | at(rng) << 12 | rng.below(512) << 3
}

struct Flood<'a> {
    session: Session<'a, Nest>,
    config: &'a NestConfig,
    rules: Rules,
    rng: Rng,
    processors: usize,
    eptps: Vec<Eptp>,
    /// What L1 has written to the VMCS in each region.
    written: BTreeMap<u64, u64>,
    most_exits: u64,
    most_tables: usize,
}

impl<'a> Flood<'a> {
    fn new(
        nest: &'a mut Nest,
        config: &'a NestConfig,
        caps: &'a ModelCaps,
        seed: u64,
        processors: usize,
    ) -> Self {
        let rules = Rules::from(caps);
        let vm = VmSetup { mode: GuestMode::Unpaged, vpid: 1, ..VmSetup::default() };
        let setup = Setup { processors, vms: [vm.clone(), vm], ..Setup::default() };
        let mut flood = Self {
            session: Session::new(nest, caps, &setup),
            config,
            rules,
            rng: Rng::new(seed),
            processors,
            eptps: vec![eptp(TABLES, 0); processors],
            written: BTreeMap::new(),
            most_exits: 0,
            most_tables: 0,
        };
        flood.fill_tables();
        for processor in 0..processors {
            flood.set(processor, Field::EPT_POINTER, eptp(TABLES, 0).into_bits());
        }
        flood
    }

    fn poke(&mut self, at: u64, value: u64) {
        self.session.platform().poke(L1Gpa::new(at), value);
    }

    fn fill_tables(&mut self) {
        for level in 1..=4 {
            for number in 0..OF_EACH_LEVEL {
                for index in 0..INDEXES {
                    let value = if level > 1 {
                        table(level - 1, self.rng.below(OF_EACH_LEVEL)) | 7
                    } else {
                        (DATA + self.rng.below(DATA_PAGES)) << 12 | 7 | 6 << 3
                    };
                    self.poke(table(level, number) + 8 * index, value);
                }
            }
        }
        for page in DATA..DATA + DATA_PAGES {
            for offset in (0..0x1000).step_by(8) {
                self.poke(page << 12 | offset, layout::mark(page << 12 | offset));
            }
        }
    }

    fn act(&mut self, processor: usize, action: Action) {
        self.session.carry_out(&Step { processor, action });
    }

    fn set(&mut self, processor: usize, field: Field, value: u64) {
        self.act(processor, Action::SetField(field, value));
    }

    fn step(&mut self) {
        let processor = self.rng.below(self.processors as u64) as usize;
        match self.rng.below(12) {
            0 | 1 => self.view(processor),
            2 => {
                let number = self.rng.below(512);
                let eptp = any_eptp(&mut self.rng);
                self.switch(processor, number, eptp);
            }
            3 => self.vmcs(processor),
            4 => {
                let vpid = 1 + self.rng.below(0xffff);
                self.set(processor, Field::VPID, vpid);
            }
            5 if self.rng.one_in(4) => {
                let (kind, eptp) = (1 + self.rng.below(2), any_eptp(&mut self.rng).into_bits());
                self.act(processor, Action::Invept { kind, eptp });
            }
            _ => {
                for _ in 0..4 {
                    self.load(processor);
                }
            }
        }
        self.check();
    }

    fn view(&mut self, processor: usize) {
        let eptp = any_eptp(&mut self.rng);
        self.set(processor, Field::EPT_POINTER, eptp.into_bits());
        self.eptps[processor] = eptp;
    }

    fn switch(&mut self, processor: usize, number: u64, eptp: Eptp) {
        self.poke(layout::EPTP_LIST + 8 * number, eptp.into_bits());
        self.act(processor, Action::Enter);
        self.counted(processor, Operation::Vmfunc { rax: 0, rcx: number });
        self.eptps[processor] = eptp;
    }

    /// An operation of the guest, which runs, that has to complete.
    fn counted(&mut self, processor: usize, operation: Operation) -> u64 {
        assert!(self.session.in_guest(processor));
        let before = self.session.platform().exits();
        let outcome = self.session.guest(processor, operation);
        let Outcome::Completed { value, .. } = outcome else {
            panic!("{operation:x?}: {outcome:?}");
        };
        let exits = self.session.platform().exits() - before;
        self.most_exits = self.most_exits.max(exits);
        assert!(exits <= EXITS_FOR_AN_ACCESS, "{exits} exits for {operation:x?}");
        value
    }

    /// Tables never change: there is one right answer.
    fn load(&mut self, processor: usize) {
        let gpa = address(&mut self.rng);
        self.act(processor, Action::Enter);
        let nest = &*self.session.platform();
        let read = |at| nest.machine().memory.read_u64(nest.translate(at).hpa);
        let walked = walk(read, self.rules, self.eptps[processor], L2Gpa::new(gpa));
        let Walked::Page(page, _) = walked else { panic!("{gpa:#x} is not mapped") };
        let value = self.counted(processor, Operation::Load { at: gpa, size: 8 });
        assert_eq!(value, layout::mark(page.to | gpa & 0xfff));
    }

    /// Another VMCS, one of many, for a moment: it has what was last written to it.
    fn vmcs(&mut self, processor: usize) {
        for _ in 0..1 + self.rng.below(4) {
            let region = (REGIONS + self.rng.below(REGION_COUNT)) << 12;
            self.session.leave(processor);
            let operand = layout::operands(processor) + 0x80;
            self.poke(operand, region);
            if !self.written.contains_key(&region) {
                let revision = self.session.platform().engine().caps().basic.revision();
                self.poke(region, revision.into());
                self.act(processor, Action::L1(Operation::Vmclear { operand }));
            }
            let loaded = self.session.l1(processor, Operation::Vmptrld { operand });
            assert_eq!(loaded, Outcome::Completed { value: 0, flags: 0 });
            if let Some(value) = self.written.get(&region) {
                assert_eq!(self.session.read_field(processor, Field::GUEST_RIP), *value);
            }
            let value = self.rng.next();
            self.set(processor, Field::GUEST_RIP, value);
            self.written.insert(region, value);
            if self.rng.one_in(4) {
                self.act(processor, Action::L1(Operation::Vmclear { operand }));
            }
        }
        self.act(processor, Action::Switch(0));
    }

    fn check(&mut self) {
        let (tables, roots) = self.session.platform().engine().shadow_usage();
        self.most_tables = self.most_tables.max(tables);
        assert!(tables <= self.config.frames as usize, "{tables} tables");
        assert!(roots <= self.config.roots as usize + self.processors, "{roots} roots");
        assert!(tables >= roots);
    }

    /// L1 uses nothing but roots that map nothing, until all others have made room for them.
    fn tear_down(&mut self) {
        for processor in 0..self.processors {
            self.session.leave(processor);
        }
        let roots = u64::from(self.config.roots) + self.processors as u64;
        assert!(roots <= 4 * EMPTY_COUNT);
        for number in 0..roots {
            let eptp = eptp(EMPTY + number / 4, number % 4);
            self.set(0, Field::EPT_POINTER, eptp.into_bits());
            self.act(0, Action::Enter);
            assert!(self.session.in_guest(0));
            self.check();
        }
        self.session.leave(0);
        let (tables, left) = self.session.platform().engine().shadow_usage();
        assert_eq!((tables, left), (roots as usize, roots as usize), "a table for each root");
    }
}

fn flood(seed: u64, processors: usize) -> (u64, usize) {
    let mut rng = Rng::new(seed ^ 0xf_100d);
    let config = NestConfig {
        frames: rng.pick(&[32, 48, 64, 96]),
        roots: rng.pick(&[6, 8, 12]),
        moves: None,
        ..NestConfig::random(seed)
    };
    let retention = rng.pick(&[Retention::Nothing, Retention::Everything, Retention::Random(seed)]);
    let mut nest = Nest::new(&config, retention, processors);
    let caps = caps::bare_caps(&config.hardware);
    let mut flood = Flood::new(&mut nest, &config, &caps, seed, processors);
    for _ in 0..60 {
        flood.step();
    }
    flood.tear_down();
    // All frames are there still: new tables take them up to the last few, for which a fill would
    // have to make room first.
    let before = std::mem::take(&mut flood.most_tables);
    for _ in 0..60 {
        flood.view(0);
        for _ in 0..30 {
            flood.load(0);
        }
        flood.check();
    }
    let most = flood.most_tables;
    assert!(most + 12 >= config.frames as usize, "{most} of {} frames, {before}", config.frames);
    flood.tear_down();
    (flood.most_exits, before.max(most))
}

#[test]
fn floods_leave_the_pool_whole_and_every_guest_goes_on() {
    let (mut exits, mut tables) = (0, 0);
    seeds::each("quota", 600, |seed| {
        let (most_exits, most_tables) = flood(seed, 1 + seed as usize % 3);
        exits = exits.max(most_exits);
        tables = tables.max(most_tables);
    });
    println!("at most {exits} exits for an access, {tables} tables");
}

/// A root in use between any two others survives them all, with its tables.
#[test]
fn a_hot_root_survives_a_flood() {
    seeds::each("hot root", 40, |seed| {
        let config = NestConfig { frames: 64, roots: 2 + seed as u32 % 4, ..NestConfig::default() };
        let mut nest = Nest::new(&config, Retention::Nothing, 1);
        let caps = caps::bare_caps(&config.hardware);
        let mut flood = Flood::new(&mut nest, &config, &caps, seed, 1);
        let hot = eptp(TABLES, 0);
        let addresses: Vec<u64> = (0..3).map(|number| number << 12).collect();
        flood.act(0, Action::Enter);
        let touch = |flood: &mut Flood<'_>| {
            for at in &addresses {
                flood.counted(0, Operation::Load { at: *at, size: 8 });
            }
        };
        touch(&mut flood);
        let counters = |flood: &mut Flood<'_>| flood.session.platform().engine().shadow_counters();
        let first = counters(&mut flood);
        let others = (1..OF_EACH_LEVEL).flat_map(|number| (0..4).map(move |kind| (number, kind)));
        for (count, (number, kind)) in (1..).zip(others) {
            let other = eptp(table(4, number) >> 12, kind);
            flood.switch(0, number, other);
            // Exactly one root is new.
            assert_eq!(counters(&mut flood).roots_built, first.roots_built + count);
            let at = address(&mut flood.rng);
            flood.counted(0, Operation::Load { at, size: 8 });
            // Not at once again: a root that another one follows is not thrown out for being in use.
            if count % 2 == 0 {
                continue;
            }
            flood.switch(0, 0, hot);
            let before = counters(&mut flood).fills;
            touch(&mut flood);
            assert_eq!(counters(&mut flood).fills, before, "the hot root's tables are there");
            flood.check();
        }
    });
}

/// Where every switch throws all roots away, nothing is left behind.
#[test]
fn nothing_is_left_of_roots_that_are_thrown_away() {
    seeds::each("reload", 40, |seed| {
        let config = NestConfig { frames: 64, vmfunc: VmfuncMode::Reload, ..NestConfig::default() };
        let mut nest = Nest::new(&config, Retention::Everything, 1);
        let caps = caps::bare_caps(&config.hardware);
        let mut flood = Flood::new(&mut nest, &config, &caps, seed, 1);
        for number in 0..40 {
            let eptp = any_eptp(&mut flood.rng);
            flood.switch(0, number, eptp);
            assert_eq!(flood.session.platform().engine().shadow_usage(), (1, 1));
            for _ in 0..6 {
                flood.load(0);
            }
        }
    });
}

/// A guest whose access needs as many tables at once as one of the model's can: two pages whose
/// paging structures have no table of EPT in common, and a processor that caches nothing.
fn far_apart(frames: u32) {
    let config = NestConfig { frames, ..NestConfig::default() };
    let caps = caps::bare_caps(&config.hardware);
    let mut nest = Nest::new(&config, Retention::Nothing, 1);
    let mut session = Session::new(&mut nest, &caps, &Setup::default());
    let mut poke = |at: u64, value: u64| session.platform().poke(L1Gpa::new(at), value);
    // Nine pages of the guest, each in a gigabyte of its own, with tables of its own.
    const PLACES: u64 = 9;
    let root = TABLES << 12;
    let gpa = |place: u64| (place & 1) << 39 | place << 30;
    let page = |place: u64| (DATA + place) << 12;
    for place in 0..PLACES {
        let of = |level: u64| (TABLES + 3 + 2 * place + level) << 12;
        let pointers = (TABLES + 1 + (place & 1)) << 12;
        poke(root + 8 * (place & 1), pointers | 7);
        poke(pointers + 8 * place, of(0) | 7);
        poke(of(0), of(1) | 7);
        poke(of(1), page(place) | 7 | 6 << 3);
    }
    // The PML4 table, and a PDPT, a page directory, a page table and a page on each side of a
    // boundary of 512 GBytes.
    let user = layout::PWU | 1 << 5;
    for (side, index) in [(0, 511), (1, 0)] {
        let first = 1 + 4 * side;
        poke(page(0) + 8 * side, gpa(first) | user);
        for step in 0..3 {
            let dirty = if step == 2 { 1 << 6 } else { 0 };
            poke(page(first + step) + 8 * index, gpa(first + step + 1) | user | dirty);
        }
    }
    let store = Operation::Store { at: (1 << 39) - 4, size: 8, value: 0x1122_3344_5566_7788 };
    for (field, value) in
        [(Field::EPT_POINTER, eptp(TABLES, 0).into_bits()), (Field::GUEST_CR3, gpa(0))]
    {
        session.carry_out(&Step { processor: 0, action: Action::SetField(field, value) });
    }
    let outcome = session.guest(0, store);
    assert!(matches!(outcome, Outcome::Completed { .. }), "{frames} frames: {outcome:?}");
    let mut peek = |at| session.platform().peek(L1Gpa::new(at));
    assert_eq!(peek(page(4) + 0xff8) >> 32, 0x5566_7788);
    assert_eq!(peek(page(8)) & 0xffff_ffff, 0x1122_3344);
}

/// The least number of frames is for the tables of one fill, not for all that an instruction needs at
/// once: with fewer than those, L2 exits for ever, and the host has to have chosen that.
#[test]
fn frames_for_all_tables_of_an_access_are_enough_and_fewer_are_not() {
    // The root, two tables below it, two for each of nine pages, and room for a fill.
    for frames in 1 + 2 + 2 * 9 + 5..64 {
        far_apart(frames);
    }
    let starved = std::panic::catch_unwind(|| far_apart(16));
    let message = starved.err().and_then(|payload| payload.downcast::<String>().ok());
    assert!(message.is_some_and(|message| message.starts_with("no progress")));
}
