//! Is the shadow EPT the composition of L1's EPT and EPT01, and never more than that?
//!
//! Random tables of L1 on a host with leaves of all sizes and hidden pages, which it changes. Where nothing stale can
//! be cached, every access has one right outcome, which a walk of the tables gives; and whatever is
//! cached, what the processor could use of EPT02 is something that L1's tables have said since the
//! last INVEPT that was due.

use std::collections::BTreeMap;

use nvmx_testkit::seeds;
use nvmx_testkit::walks::{History, Rules, Walked, pages, walk};
use nvmx_testkit::{Leaves, Nest, NestConfig, caps};
use vmx_defs::ept::{EptEntry, Eptp};
use vmx_defs::event::vector;
use vmx_defs::{EptPermissions, ExitReason, Field, L1Gpa, L2Gpa};
use vmx_model::program::{GuestMode, Setup, VmSetup};
use vmx_model::retention::Rng;
use vmx_model::{Action, Operation, Outcome, Platform, Retention, Session, Step, VmxMode, layout};

/// L1's pages that may be tables of any level, though each is mostly of one ([`level`]).
const TABLES: u64 = 256;
const TABLE_PAGES: u64 = 8;
/// The entries of a table in use. No large page takes one of these addresses to L1's own structures,
/// which are below the tables.
const INDEXES: [u64; 8] = [0, 1, 2, 3, 256, 257, 258, 300];
/// Pages of L1 for data, and beyond.
const DATA: u64 = 300;
const DATA_PAGES: u64 = 8;
/// Among them, two that L0 hides.
const HIDDEN: [u64; 2] = [DATA + 6, 517];
/// Tables of L1 that never change: the way to the paging structures of a guest that pages, in the
/// second entry of each root; and these structures, which map 512 GBytes one to one.
const FIXED: u64 = 280;
/// Where such a guest has them.
const GUEST_CR3: u64 = 1 << 39;
/// EPTPs that L1 uses: roots at two tables, in all variants.
const EPTPS: u64 = 6;

fn eptp(number: u64) -> Eptp {
    let frame = TABLES + number % 2;
    let kind = if number == 5 { 0 } else { 6 };
    Eptp::from(frame << 12 | ((number / 2) & 1) << 6 | 3 << 3 | kind)
}

/// The level that a table page mostly is of.
fn level(page: u64) -> u64 {
    4 - (page - TABLES) / 2
}

/// An entry for a table page.
fn entry(rng: &mut Rng, page: u64) -> u64 {
    const WB: u64 = 6 << 3;
    const LARGE: u64 = 1 << 7;
    let rights = rng.pick(&[7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 1, 3, 4, 5, 5, 3, 2, 0]);
    let flags = rng.pick(&[0, 0, 0x100, 0x300, 0x300]);
    let table = (TABLES + rng.below(TABLE_PAGES)) << 12;
    let data = (DATA + rng.below(DATA_PAGES)) << 12;
    let data = if rng.one_in(4) { table } else { data };
    let level = if rng.one_in(24) { 1 + rng.below(4) } else { level(page) };
    let large = rng.pick(&[0, 0x20_0000, 0x20_0000, 0x4000_0000]) | WB | LARGE;
    let target = match rng.below(64) {
        0..=53 if level == 1 => data | rng.pick(&[WB, WB, WB | 1 << 6, 0, 1 << 3, 4 << 3, 5 << 3]),
        0..=53 if (2..4).contains(&level) && rng.one_in(4) => large,
        0..=53 => (TABLES + 2 * (5 - level) + rng.below(2)) << 12,
        54..=56 => table,
        57 => table | WB,
        58 => data | WB,
        59 => HIDDEN[0] << 12 | WB,
        60 => large,
        61 => rng.pick(&[0, 0x20_0000]) | rng.pick(&[WB, 0, 4 << 3]) | LARGE,
        // Behind all RAM; the last address.
        62 => rng.pick(&[0x40_0000, 0xff_ffff_f000]) | WB,
        // Reserved: an address bit, a memory type, bits in the address of a large page.
        _ => rng.pick(&[
            1 << 45,
            data | 2 << 3,
            data | 3 << 3,
            data | 7 << 3,
            data | LARGE | WB,
            0x20_1000 | LARGE | WB,
            table | 1 << 7,
            table | 1 << 3,
        ]),
    };
    let ignored = rng.pick(&[0, 0, 0, 1 << 63, 1 << 11, 1 << 10, 1 << 52]);
    rights | flags | target | ignored
}

/// Whether an entry is not the one that leads to the guest's paging structures.
fn is_free(table: u64, index: u64) -> bool {
    level(table) != 4 || index != 1
}

/// An address of the guest, the same to it as a linear and as a physical one. It is never that of a
/// root's second entry.
fn address(rng: &mut Rng, paged: bool) -> u64 {
    let pointer = if paged { rng.pick(&INDEXES) } else { rng.below(4) };
    let directory = rng.pick(&[0, 0, 1, 256]);
    let page = rng.pick(&[256, 257, 258, 300]);
    pointer << 30 | directory << 21 | page << 12 | rng.pick(&[0, 16, 0x7f8, 0xff8])
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write(u64),
    Fetch,
}

impl Kind {
    fn wanted(self) -> EptPermissions {
        match self {
            Self::Read => EptPermissions::READ,
            Self::Write(_) => EptPermissions::WRITE,
            Self::Fetch => EptPermissions::EXECUTE,
        }
    }
}

struct Scene<'a> {
    session: Session<'a, Nest>,
    rng: Rng,
    rules: Rules,
    history: History,
    /// The EPTP in use, and the one that the next VM entry uses.
    eptps: Vec<Eptp>,
    /// Since when a processor has kept what it cached of an EP4TA.
    since: BTreeMap<(usize, u64), u64>,
    /// Whether some processor may have something stale cached.
    stale: bool,
    /// The guests page, and so can reach more than 4 GBytes.
    paged: bool,
    counts: Counts,
}

/// What has been seen.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Accesses that had one right outcome, by what that was.
    completed: u64,
    violations: u64,
    misconfigurations: u64,
    hidden: u64,
    /// Pages of EPT02.
    pages: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.completed += other.completed;
        self.violations += other.violations;
        self.misconfigurations += other.misconfigurations;
        self.hidden += other.hidden;
        self.pages += other.pages;
    }
}

fn read(nest: &Nest) -> impl Fn(L1Gpa) -> u64 {
    |at| nest.machine().memory.read_u64(nest.translate(at).hpa)
}

impl Scene<'_> {
    fn nest(&mut self) -> &mut Nest {
        self.session.platform()
    }

    fn word(&mut self, at: L1Gpa) -> u64 {
        self.nest().peek(at)
    }

    fn act(&mut self, processor: usize, action: Action) {
        self.session.carry_out(&Step { processor, action });
    }

    fn step(&mut self) {
        let processor = self.rng.below(self.eptps.len() as u64) as usize;
        match self.rng.below(16) {
            0 | 1 => self.edit(),
            2 | 3 => self.switch(processor),
            4 => self.invalidate(processor),
            5 => self.change_ept01(processor),
            _ => {
                if self.stale && !self.rng.one_in(3) {
                    self.invalidate_all();
                }
                self.access(processor);
            }
        }
        self.check_shadow();
    }

    /// Fills the tables that never change. Their flags are set already.
    fn fix(&mut self) {
        const FLAGS: u64 = 3 << 8;
        const LEAF: u64 = 7 | 6 << 3 | FLAGS;
        let mut poke = |page: u64, index: u64, value| {
            self.session.platform().poke(L1Gpa::new(page << 12 | index << 3), value);
        };
        for root in [TABLES, TABLES + 1] {
            poke(root, 1, FIXED << 12 | 7 | FLAGS);
        }
        poke(FIXED, 0, (FIXED + 1) << 12 | 7 | FLAGS);
        poke(FIXED + 1, 0, (FIXED + 2) << 12 | 7 | FLAGS);
        poke(FIXED + 2, 0, (FIXED + 3) << 12 | LEAF);
        poke(FIXED + 2, 1, (FIXED + 4) << 12 | LEAF);
        // Present, writable, accessed, dirty; pages of 1 GByte.
        poke(FIXED + 3, 0, GUEST_CR3 | 1 << 12 | 0x63);
        for index in 0..512 {
            poke(FIXED + 4, index, index << 30 | 0xe3);
        }
    }

    /// L1 changes an entry, on whatever processor.
    fn edit(&mut self) {
        let table = TABLES + self.rng.below(TABLE_PAGES);
        let index = self.rng.pick(&INDEXES);
        if !is_free(table, index) {
            return;
        }
        let at = L1Gpa::new(table << 12 | index << 3);
        let value = entry(&mut self.rng, table);
        self.nest().poke(at, value);
        self.stale = true;
        self.see();
    }

    /// L0 moves a page, or changes what may be done with one: with effect at once, on all processors.
    fn change_ept01(&mut self, processor: usize) {
        let data = L1Gpa::new((DATA + self.rng.below(DATA_PAGES)) << 12);
        let table = L1Gpa::new((TABLES + self.rng.below(TABLE_PAGES)) << 12);
        let large = L1Gpa::new((512 + self.rng.pick(&[256, 257, 258])) << 12);
        match self.rng.below(8) {
            0 => self.nest().move_page(processor, data),
            1 => self.nest().move_page(processor, table),
            2 => self.nest().move_page(processor, large),
            _ => {
                let page = self.rng.pick(&[data, large]);
                let rights = EptPermissions::from_bits_truncate(self.rng.pick(&[7, 7, 1, 3, 5]));
                if !HIDDEN.contains(&(page.as_u64() >> 12)) {
                    self.nest().set_rights(processor, page, rights);
                }
            }
        }
    }

    fn see(&mut self) {
        let Self { session, history, .. } = self;
        let nest = &*session.platform();
        history.see(read(nest));
    }

    fn invalidate(&mut self, processor: usize) {
        if self.rng.one_in(2) {
            self.act(processor, Action::Invept { kind: 2, eptp: 0 });
            self.since.retain(|(other, _), _| *other != processor);
        } else {
            let eptp = eptp(self.rng.below(EPTPS));
            self.act(processor, Action::Invept { kind: 1, eptp: eptp.into_bits() });
            self.since.remove(&(processor, eptp.table()));
        }
        self.see();
    }

    fn invalidate_all(&mut self) {
        for processor in 0..self.eptps.len() {
            self.act(processor, Action::Invept { kind: 2, eptp: 0 });
        }
        self.since.clear();
        self.stale = false;
        self.see();
    }

    fn switch(&mut self, processor: usize) {
        let number = self.rng.below(EPTPS);
        if self.rng.one_in(2) {
            self.enter(processor);
            let outcome = self.session.guest(processor, Operation::Vmfunc { rax: 0, rcx: number });
            assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
            let now = self.history.now();
            self.since.entry((processor, eptp(number).table())).or_insert(now);
        } else {
            self.act(processor, Action::SetField(Field::EPT_POINTER, eptp(number).into_bits()));
        }
        self.eptps[processor] = eptp(number);
        self.see();
    }

    fn enter(&mut self, processor: usize) {
        self.act(processor, Action::Enter);
        assert!(self.session.in_guest(processor));
        let (table, now) = (self.eptps[processor].table(), self.history.now());
        self.since.entry((processor, table)).or_insert(now);
    }

    fn access(&mut self, processor: usize) {
        let gpa = address(&mut self.rng, self.paged);
        let kind = match self.rng.below(4) {
            0 => Kind::Write(if self.rng.one_in(2) {
                entry(&mut self.rng, TABLES + 4)
            } else {
                self.rng.next()
            }),
            1 => Kind::Fetch,
            _ => Kind::Read,
        };
        self.enter(processor);
        let operation = match kind {
            Kind::Read => Operation::Load { at: gpa, size: 8 },
            Kind::Write(value) => Operation::Store { at: gpa, size: 8, value },
            Kind::Fetch => Operation::Fetch { at: gpa },
        };
        if self.stale {
            self.session.guest(processor, operation);
        } else {
            self.exact(processor, gpa, kind, operation);
        }
        self.see();
    }

    /// The one right outcome.
    fn exact(&mut self, processor: usize, gpa: u64, kind: Kind, operation: Operation) {
        let (rules, eptp) = (self.rules, self.eptps[processor]);
        let nest = &*self.session.platform();
        let walked = walk(read(nest), rules, eptp, L2Gpa::new(gpa));
        let wanted = kind.wanted();
        let (page, used) = match walked {
            Walked::Page(page, used) if page.rights.contains(wanted) => (page, used),
            Walked::Misconfigured => {
                let outcome = self.session.guest(processor, operation);
                assert_eq!(outcome, Outcome::Exit(ExitReason::EPT_MISCONFIGURATION), "{gpa:#x}");
                assert_eq!(self.field(processor, Field::GUEST_PHYSICAL_ADDRESS), gpa);
                self.counts.misconfigurations += 1;
                return;
            }
            denied => {
                let rights = match denied {
                    Walked::Page(page, _) => page.rights,
                    _ => EptPermissions::empty(),
                };
                let outcome = self.session.guest(processor, operation);
                assert_eq!(outcome, Outcome::Exit(ExitReason::EPT_VIOLATION), "{gpa:#x} {kind:?}");
                let expected = u64::from(wanted.bits() | rights.bits() << 3) | 3 << 7;
                assert_eq!(self.field(processor, Field::EXIT_QUALIFICATION), expected);
                assert_eq!(self.field(processor, Field::GUEST_PHYSICAL_ADDRESS), gpa);
                assert_eq!(self.field(processor, Field::GUEST_LINEAR_ADDRESS), gpa);
                self.counts.violations += 1;
                return;
            }
        };
        let target = L1Gpa::new(page.to + (gpa - page.from));
        let mapping = nest.translate(target);
        let mark = |number: usize, entry: EptEntry| {
            let dirty = wanted == EptPermissions::WRITE && number + 1 == used.len();
            let flags = eptp.accessed_dirty();
            entry
                .with_accessed(entry.accessed() || flags)
                .with_dirty(entry.dirty() || flags && dirty)
                .into_bits()
        };
        // The guest may read the very entry that its access marks.
        let own = used.iter().position(|(at, _)| *at == target);
        let before = match own {
            Some(number) => mark(number, used[number].1),
            None => nest.machine().memory.read_u64(mapping.hpa),
        };
        let outcome = self.session.guest(processor, operation);
        if mapping.permissions.contains(wanted) {
            let Outcome::Completed { value, .. } = outcome else {
                panic!("{operation:x?} to {target:?}: {outcome:?}");
            };
            let after = self.nest().machine().memory.read_u64(mapping.hpa);
            let exists = mapping.hpa.as_u64() < self.nest().machine().memory.size();
            match kind {
                Kind::Read => assert_eq!(value, before, "{target:?}"),
                Kind::Fetch => assert_eq!(value, before & 0xff, "{target:?}"),
                Kind::Write(new) if exists => assert_eq!(after, new, "{target:?}"),
                Kind::Write(_) => {}
            }
            self.counts.completed += 1;
        } else {
            let general_protection = 1 << 31 | 1 << 11 | 3 << 8 | u64::from(vector::GP);
            assert_eq!(outcome, Outcome::Exit(ExitReason::EXCEPTION_OR_NMI));
            assert_eq!(self.field(processor, Field::EXIT_INTR_INFO), general_protection);
            self.counts.hidden += 1;
        }
        let in_table = (TABLES..TABLES + TABLE_PAGES).contains(&(target.as_u64() >> 12));
        if wanted == EptPermissions::WRITE && in_table {
            self.stale = true;
            return;
        }
        let marked: Vec<_> = used
            .iter()
            .enumerate()
            .map(|(number, (at, entry))| (*at, mark(number, *entry)))
            .collect();
        for (at, value) in marked {
            assert_eq!(self.word(at), value, "flags at {at:?}");
        }
    }

    fn field(&mut self, processor: usize, field: Field) -> u64 {
        self.session.read_field(processor, field)
    }

    /// What the processors could use of EPT02.
    fn check_shadow(&mut self) {
        let Self { session, rules, history, eptps, since, counts, .. } = self;
        let nest = &*session.platform();
        let machine = nest.machine();
        let translate = |at| nest.translate(at);
        for (number, processor) in machine.processors.iter().enumerate() {
            if processor.mode() != VmxMode::NonRoot || !nest.engine_processor(number).runs_l2() {
                continue;
            }
            let eptp = eptps[number];
            let Some(eptp02) = processor.vmcs().and_then(|vmcs| vmcs.eptp()) else {
                panic!("L2 runs without EPT");
            };
            let since = since[&(number, eptp.table())];
            let moment = history.now();
            for page in pages(&machine.memory, *rules, eptp02).0 {
                // Of the many that a large page is split into, some at a time.
                let number = page.from >> 12;
                let named = page.shift > 12 || INDEXES.contains(&(number & 511));
                if !named && (number + moment) % 16 != 0 {
                    continue;
                }
                let explained =
                    history.explains(&read(nest), &translate, *rules, eptp, &page, since);
                assert!(explained, "processor {number} may use {page:x?} of {eptp:x?}");
                counts.pages += 1;
            }
        }
    }
}

fn run(seed: u64, config: &NestConfig, processors: usize, steps: usize) -> Counts {
    let mut rng = Rng::new(seed);
    let retention = match rng.below(3) {
        0 => Retention::Nothing,
        1 => Retention::Everything,
        _ => Retention::Random(seed),
    };
    let caps = caps::bare_caps(&config.hardware);
    let paged = rng.one_in(2);
    let vm = VmSetup {
        mode: if paged { GuestMode::Long } else { GuestMode::Unpaged },
        vpid: rng.below(2) as u16,
        exceptions: 1 << vector::GP,
        ..VmSetup::default()
    };
    let setup = Setup { processors, vms: [vm.clone(), vm], ..Setup::default() };
    let mut nest = Nest::new(config, retention, processors);
    let session = Session::new(&mut nest, &caps, &setup);
    let mut scene = Scene {
        session,
        rng,
        rules: Rules::from(&caps),
        history: History::default(),
        eptps: vec![eptp(0); processors],
        since: BTreeMap::new(),
        stale: true,
        paged,
        counts: Counts::default(),
    };
    scene.fix();
    for number in DATA..DATA + DATA_PAGES {
        for offset in [0, 16, 0x7f8, 0xff8] {
            let at = number << 12 | offset;
            scene.nest().poke(L1Gpa::new(at), layout::mark(at));
        }
    }
    for number in 0..EPTPS {
        let at = layout::EPTP_LIST + 8 * number;
        scene.nest().poke(L1Gpa::new(at), eptp(number).into_bits());
    }
    let words: Vec<u64> = (TABLES..TABLES + TABLE_PAGES)
        .flat_map(|table| (0..512).map(move |number| table << 12 | number << 3))
        .collect();
    for table in TABLES..TABLES + TABLE_PAGES {
        for number in INDEXES.into_iter().filter(|number| is_free(table, *number)) {
            let value = entry(&mut scene.rng, table);
            scene.nest().poke(L1Gpa::new(table << 12 | number << 3), value);
        }
    }
    {
        let Scene { session, history, .. } = &mut scene;
        history.follow(read(session.platform()), words);
    }
    for processor in 0..processors {
        scene.act(processor, Action::SetField(Field::EPT_POINTER, eptp(0).into_bits()));
        if paged {
            scene.act(processor, Action::SetField(Field::GUEST_CR3, GUEST_CR3));
        }
    }
    for _ in 0..steps {
        scene.step();
    }
    scene.counts
}

fn config(seed: u64) -> NestConfig {
    let leaves = match seed % 4 {
        0 => Leaves::Huge,
        1 => Leaves::Large,
        2 => Leaves::Small,
        _ => Leaves::Scattered(seed),
    };
    let hidden = HIDDEN.map(|page| L1Gpa::new(page << 12)).to_vec();
    NestConfig { leaves, hidden, moves: None, ..NestConfig::random(seed) }
}

#[test]
fn an_access_has_the_outcome_of_the_two_dimensional_walk() {
    let mut sum = Counts::default();
    seeds::each("walk", 1500, |seed| sum.add(run(seed, &config(seed), 1, 60)));
    println!("{sum:?}");
}

#[test]
fn so_it_has_on_several_processors() {
    seeds::each("walk on several processors", 700, |seed| {
        // Where frames are short, a processor may have to wait for an exit of another's guest.
        let config = NestConfig { frames: 256, ..config(seed) };
        run(seed, &config, 2 + (seed / 4 % 2) as usize, 60);
    });
}
