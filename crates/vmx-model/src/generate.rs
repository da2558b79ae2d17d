//! Which programs are worth running?
//!
//! Random ones, biased towards what makes caches matter: accesses to few pages, edits of the tables
//! behind them with and without the invalidation that would be due, switches between views, guests
//! and processors. Most programs are *tame*: what they do is what a hypervisor might. A *wild* one
//! puts random values where an L1 could. A program follows from its seed alone.

mod rarer;
mod stories;

use vmx_defs::Field;
use vmx_defs::controls::ProcCtls;

use crate::layout::{self, DATA, DATA_PAGES, EPT_LEAF, PWU, VIEWS, guest};
use crate::operation::Operation;
use crate::program::{Action, GuestMode, Program, Setup, Step, VmSetup};
use crate::registers::cr4;
use crate::retention::Rng;

/// What programs may contain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Profile {
    /// Number of steps.
    pub steps: usize,
    /// Greatest number of processors.
    pub processors: usize,
    /// Random values in structures and fields, too.
    pub wild: bool,
    /// EPT-violation #VE may be on.
    pub ve: bool,
    /// Guests without EPT, too.
    pub without_ept: bool,
    /// Accesses that follow each other, at most: 1 or more.
    pub accesses: u64,
    /// What has little to do with translation, too: other registers and instructions, MSR areas.
    pub rarer: bool,
    /// What follows an edit of a table.
    pub invalidation: Invalidation,
}

/// What L1 does about mappings that an edit has made stale.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invalidation {
    /// Something, now and then, which may or may not be what is due: stale mappings are used.
    Careless,
    /// Everything is invalidated on every processor: no stale mapping is used, and all policies give
    /// the same trace.
    Everything,
    /// What the SDM asks for and little more, on every processor, by one of the operations that
    /// suffice: again no stale mapping is used. This is what finds an operation that invalidates too
    /// little.
    Sufficient,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            steps: 60,
            processors: 1,
            wild: false,
            ve: true,
            without_ept: true,
            accesses: 4,
            rarer: false,
            invalidation: Invalidation::Careless,
        }
    }
}

/// The program of a seed.
pub fn generate(seed: u64, profile: &Profile) -> Program {
    let mut rng = Rng::new(seed);
    let setup = setup(&mut rng, profile);
    let vms = vec![0; setup.processors];
    let mut generator = Generator { rng, profile, setup: &setup, vms, steps: Vec::new() };
    let mut processor = 0;
    while generator.steps.len() < profile.steps {
        if setup.processors > 1 && generator.rng.one_in(8) {
            processor = generator.rng.below(setup.processors as u64) as usize;
        }
        generator.group(processor);
    }
    let steps = generator.steps;
    Program { setup, steps }
}

fn setup(rng: &mut Rng, profile: &Profile) -> Setup {
    let modes = [GuestMode::Long, GuestMode::Long, GuestMode::Pae, GuestMode::Bits32];
    let vm = |rng: &mut Rng| {
        let mut mode = rng.pick(&modes);
        let view = if profile.without_ept && rng.one_in(8) {
            None
        } else {
            if rng.one_in(8) {
                mode = GuestMode::Unpaged;
            }
            Some(rng.below(VIEWS as u64) as usize)
        };
        let pcid = if mode == GuestMode::Long && rng.one_in(2) { cr4::PCIDE } else { 0 };
        let mut exits = ProcCtls::empty();
        for (control, odds) in [
            (ProcCtls::INVLPG_EXITING, 8),
            (ProcCtls::CR3_LOAD_EXITING, 8),
            (ProcCtls::HLT_EXITING, 1),
            (ProcCtls::UNCONDITIONAL_IO_EXITING, 2),
        ] {
            exits.set(control, rng.one_in(odds));
        }
        let exceptions = if rng.one_in(3) { 1 << 14 } else { 0 };
        let vpid = rng.below(3) as u16;
        VmSetup { mode, vpid, view, exceptions, exits, cr4: pcid }
    };
    Setup {
        processors: 1 + rng.below(profile.processors.max(1) as u64) as usize,
        vms: [vm(rng), vm(rng)],
        accessed_dirty: std::array::from_fn(|_| rng.one_in(2)),
        ve: profile.ve && rng.one_in(3),
        suppress_ve: rng.one_in(2),
    }
}

/// A load of a word.
const fn load(at: u64) -> Operation {
    Operation::Load { at, size: 8 }
}

/// What an action has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Changed {
    /// An entry of an EPT structure.
    Ept,
    /// An entry of the EPTP list, which is not cached.
    List,
    /// What the linear addresses of guests mean.
    Guest,
    /// What this linear address of L1 means.
    L1(u64),
}

struct Generator<'a> {
    rng: Rng,
    profile: &'a Profile,
    setup: &'a Setup,
    /// The guest whose VMCS is current on each processor.
    vms: Vec<usize>,
    steps: Vec<Step>,
}

impl Generator<'_> {
    fn push(&mut self, processor: usize, action: Action) {
        self.steps.push(Step { processor, action });
    }

    /// A few steps that belong together.
    fn group(&mut self, processor: usize) {
        if self.profile.rarer && self.rng.one_in(5) {
            return self.rarer(processor);
        }
        match self.rng.below(21) {
            0..=8 => {
                for _ in 0..1 + self.rng.below(self.profile.accesses) {
                    let operation = self.access();
                    self.push(processor, Action::Guest(operation));
                }
            }
            9..=11 => {
                // Upper halves are ignored.
                let mut upper =
                    |odds| if self.rng.one_in(odds) { self.rng.next() << 32 } else { 0 };
                let (rax, rcx) = (upper(12), upper(6));
                let rcx = rcx | self.list_index();
                let rax = rax | if self.rng.one_in(12) { self.rng.below(70) } else { 0 };
                self.push(processor, Action::Guest(Operation::Vmfunc { rax, rcx }));
            }
            12 | 13 => self.guest_control(processor),
            14..=16 => self.edit(processor),
            17 => self.guest_edit(processor),
            18 => self.l1(processor),
            19 => self.story(processor),
            _ if self.profile.wild => self.wild(processor),
            _ => self.l1(processor),
        }
    }

    fn vm(&self, processor: usize) -> &VmSetup {
        &self.setup.vms[self.vms[processor]]
    }

    fn list_index(&mut self) -> u64 {
        match self.rng.below(12) {
            0 => 500 + self.rng.below(24),
            _ => self.rng.below(8),
        }
    }

    /// A linear address of the guest.
    fn address(&mut self) -> u64 {
        let offset = self.rng.below(2) * 8;
        match self.rng.below(16) {
            0 => layout::LARGE + (self.rng.below(3) << 12) * 5 + offset,
            1 => layout::FRAGMENTED + ((DATA + self.rng.below(DATA_PAGES)) << 12) + offset,
            2 => layout::HUGE + layout::guest_data(0, self.rng.below(2)) + offset,
            // Across two pages.
            3 => ((DATA + 1 + self.rng.below(DATA_PAGES - 1)) << 12) - 4,
            4 => (DATA + DATA_PAGES + self.rng.below(2)) << 12,
            _ => (DATA + self.rng.below(DATA_PAGES)) << 12 | offset,
        }
    }

    fn access(&mut self) -> Operation {
        let at = self.address();
        let size = self.rng.pick(&[8, 8, 8, 4, 1]);
        match self.rng.below(8) {
            0 | 1 => Operation::Store { at, size, value: self.rng.next() },
            2 => Operation::Fetch { at },
            _ => Operation::Load { at, size },
        }
    }

    /// The guest changes its registers or its caches.
    fn guest_control(&mut self, processor: usize) {
        let VmSetup { mode, cr4: own, .. } = *self.vm(processor);
        let cr3s = layout::guest_cr3(mode);
        let long = mode == GuestMode::Long;
        let operation = match self.rng.below(12) {
            0..=3 => {
                let pcids = own & cr4::PCIDE != 0;
                let pcid = if pcids { self.rng.below(2) | self.rng.below(2) << 63 } else { 0 };
                let value = self.rng.pick(cr3s) | pcid;
                Operation::MovToCr { register: 3, value }
            }
            4 => {
                let at = self.address();
                Operation::Invlpg { at }
            }
            5 => {
                let kind = self.rng.below(4);
                let pcid = self.rng.below(2) as u16;
                let address = self.address();
                return self.push(processor, Action::Invpcid { kind, pcid, address });
            }
            6 => {
                let toggled = self.rng.pick(&[cr4::PGE, cr4::PGE, 0]);
                let base = match mode {
                    GuestMode::Long | GuestMode::Pae => cr4::PAE,
                    GuestMode::Bits32 => cr4::PSE,
                    GuestMode::Unpaged => 0,
                };
                Operation::MovToCr { register: 4, value: base | own | cr4::PGE ^ toggled }
            }
            7 => Operation::MovFromCr { register: self.rng.pick(&[0, 2, 3, 4]) },
            8 => Operation::SetPrivilege(if self.rng.one_in(2) { 3 } else { 0 }),
            9 => Operation::Cpuid { leaf: 0, subleaf: 0 },
            10 => self.rng.pick(&[
                Operation::Rdmsr(vmx_defs::msr::EFER),
                Operation::Rdmsr(vmx_defs::msr::FS_BASE),
                Operation::Rdmsr(0x1234),
                Operation::Int3,
                Operation::Int(0x80),
                Operation::Ud2,
                Operation::Vmread { encoding: 0 },
                Operation::Hlt,
            ]),
            _ if long => Operation::MovFromCr { register: 3 },
            _ => Operation::Vmcall,
        };
        self.push(processor, Action::Guest(operation));
        // Global translations outlive a change of CR3.
        if matches!(operation, Operation::MovToCr { .. }) {
            self.after_change(processor, Changed::Guest);
        }
    }

    /// A word that translation depends on gets another value, and perhaps an invalidation follows.
    fn edit(&mut self, processor: usize) {
        let view = self.rng.below(VIEWS as u64) as usize;
        let mut changed = Changed::Ept;
        // What the edit is about, to be read before and after it.
        let mut read = None;
        let (at, value) = match self.rng.below(12) {
            0..=4 => {
                let number = self.rng.below(DATA_PAGES);
                read = Some(Action::Guest(load((DATA + number) << 12)));
                let at = layout::ept_table(view, 1) + 8 * (DATA + number);
                let frame = layout::guest_data(
                    self.rng.below(VIEWS as u64) as usize,
                    self.rng.below(DATA_PAGES),
                );
                (at, self.ept_entry(frame, EPT_LEAF))
            }
            5 => {
                // A page of the guest's own structures.
                let page = guest::LONG + self.rng.below(13);
                let at = layout::ept_table(view, 1) + 8 * page;
                let mut frame = layout::guest_structure(page);
                if page == guest::LONG + 3 && self.rng.one_in(2) {
                    frame = layout::OTHER_PT;
                }
                (at, self.ept_entry(frame, EPT_LEAF))
            }
            6 => {
                let other = self.rng.below(VIEWS as u64) as usize;
                let at = layout::ept_table(view, 2);
                (at, self.ept_entry(layout::ept_table(other, 1), 7))
            }
            7 => {
                let at = layout::ept_table(view, 2) + 8;
                (at, self.ept_entry(layout::LARGE, EPT_LEAF | 1 << 7))
            }
            8 => {
                // Two EPTPs that differ in this flag alone share what is cached.
                let other = !self.is_exact() && self.rng.one_in(2);
                let flags = self.setup.accessed_dirty[view] ^ other;
                changed = Changed::List;
                // Or behind the list, where no entry is.
                let index = if self.rng.one_in(8) { 512 } else { 0 } + self.rng.below(8);
                (layout::EPTP_LIST + 8 * index, layout::eptp(view, flags))
            }
            9 | 10 => {
                let table = self.rng.pick(&[guest::LONG + 3, guest::LONG_2 + 3, guest::PAE + 2]);
                let number = self.rng.below(DATA_PAGES);
                let at = layout::guest_structure(table) + 8 * (DATA + number);
                read = Some(Action::Guest(load((DATA + number) << 12)));
                changed = Changed::Guest;
                (at, self.guest_entry())
            }
            _ => {
                let number = self.rng.below(4);
                let at = layout::L1_WINDOW_PT + 8 * number;
                let linear = layout::L1_WINDOW + (number << 12);
                read = Some(Action::L1(load(linear)));
                changed = Changed::L1(linear);
                (at, (layout::L1_DATA + (self.rng.below(8) << 12)) | 3)
            }
        };
        let read = read.filter(|_| !self.rng.one_in(3));
        if let Some(read) = read {
            self.push(processor, read);
        }
        self.push(processor, Action::Write { at, value });
        if self.is_exact() {
            self.after_change(processor, changed);
        } else if self.rng.one_in(2) {
            self.invalidate(processor, view);
        }
        if let Some(read) = read {
            self.push(processor, read);
        }
    }

    /// The guest changes its own page table, and invalidates by itself.
    fn guest_edit(&mut self, processor: usize) {
        let VmSetup { mode, vpid, exits, .. } = *self.vm(processor);
        let (table, size) = match mode {
            GuestMode::Long => (self.rng.pick(&[guest::LONG + 3, guest::LONG_2 + 3]), 8),
            GuestMode::Pae => (guest::PAE + 2, 8),
            GuestMode::Bits32 => (guest::BITS32 + 1, 4),
            GuestMode::Unpaged => return,
        };
        let number = DATA + self.rng.below(DATA_PAGES);
        let read = Action::Guest(load(number << 12));
        let value = self.guest_entry();
        let at = (table << 12) + u64::from(size) * number;
        self.push(processor, Action::Guest(Operation::SetPrivilege(0)));
        self.push(processor, read);
        self.push(processor, Action::Guest(Operation::Store { at, size, value }));
        // Without a VPID, a switch of EPTP forgets as much (S4).
        let by_switch = vpid == 0 && self.rng.one_in(2);
        let address = number << 12;
        let action = if by_switch {
            Action::Guest(Operation::Vmfunc { rax: 0, rcx: self.rng.below(8) })
        } else if vpid != 0 && self.apart() && self.rng.one_in(2) {
            // L1 does it for its guest.
            Action::Invvpid { kind: 0, vpid, address }
        } else {
            Action::Guest(Operation::Invlpg { at: address })
        };
        self.push(processor, action);
        // Where that exits, or does not complete, L1 has to do it.
        let intercepted =
            exits.contains(ProcCtls::INVLPG_EXITING) || self.vm(processor).view.is_none();
        if intercepted {
            self.after_change(processor, Changed::Guest);
        }
        self.push(processor, read);
        self.after_change(processor, Changed::Guest);
    }

    fn is_exact(&self) -> bool {
        self.profile.invalidation != Invalidation::Careless
    }

    /// Sees to it that nothing stale is left of what changed, where the profile says so.
    fn after_change(&mut self, processor: usize, changed: Changed) {
        match self.profile.invalidation {
            Invalidation::Careless => {}
            Invalidation::Everything => self.invalidate_everywhere(processor),
            Invalidation::Sufficient => {
                for processor in self.from(processor) {
                    self.invalidate_enough(processor, changed);
                }
            }
        }
    }

    /// All processors, the current one first.
    fn from(&self, processor: usize) -> Vec<usize> {
        let others = (0..self.setup.processors).filter(|other| *other != processor);
        std::iter::once(processor).chain(others).collect()
    }

    /// One of the ways to leave nothing stale on a processor.
    fn invalidate_enough(&mut self, processor: usize, changed: Changed) {
        match changed {
            Changed::List => {}
            Changed::Ept if self.rng.one_in(2) => {
                self.push(processor, Action::Invept { kind: 2, eptp: 0 });
            }
            Changed::Ept => {
                // Views share tables. Any EPTP with the same EP4TA will do.
                let first = self.rng.below(VIEWS as u64) as usize;
                for view in (0..VIEWS).map(|number| (first + number) % VIEWS) {
                    let eptp = layout::eptp(view, self.rng.one_in(2));
                    self.push(processor, Action::Invept { kind: 1, eptp });
                }
            }
            // VPID 0000H, which INVVPID does not reach, goes at each transition.
            Changed::Guest => match self.rng.below(3) {
                0 => {
                    let action = Action::Invvpid { kind: 2, vpid: 0, address: 0 };
                    self.push(processor, action);
                }
                _ => {
                    for vpid in [1, 2] {
                        let action = Action::Invvpid { kind: 1, vpid, address: 0 };
                        self.push(processor, action);
                    }
                }
            },
            // Without a VPID, VM entry and exit forget what root operation has cached, too.
            // An entry has to succeed for that.
            Changed::L1(_)
                if self.vm(processor).vpid == 0 && !self.profile.rarer && self.rng.one_in(2) =>
            {
                self.push(processor, Action::Enter);
                self.push(processor, Action::Leave);
            }
            Changed::L1(at) => {
                let operation = if self.rng.one_in(2) {
                    Operation::Invlpg { at }
                } else {
                    Operation::MovToCr { register: 3, value: layout::L1_CR3 }
                };
                self.push(processor, Action::L1(operation));
            }
        }
    }

    /// Whether no two guests ever have the same VPID.
    fn apart(&self) -> bool {
        let [first, second] = &self.setup.vms;
        first.vpid != second.vpid && self.profile.invalidation == Invalidation::Sufficient
    }

    fn ept_entry(&mut self, frame: u64, full: u64) -> u64 {
        let suppress = self.rng.below(2) << 63;
        let entry = match self.rng.below(10) {
            0 => 0,
            1 => frame | full & !2,
            2 => frame | full & !4,
            3 => frame | full & !6,
            4 => frame | full & !3,
            // Accessed and dirty already.
            5 => frame | full | 3 << 8,
            6 => frame | full | 1 << 8,
            7 if self.profile.wild => frame | full & !1,
            _ => frame | full,
        };
        entry | suppress
    }

    fn guest_entry(&mut self) -> u64 {
        let frame = (DATA + self.rng.below(DATA_PAGES)) << 12;
        match self.rng.below(8) {
            0 => 0,
            1 => frame | PWU & !2,
            2 => frame | PWU & !4,
            3 => frame | PWU | 3 << 5,
            4 => frame | PWU | 1 << 8,
            5 => frame | PWU | 1 << 63,
            _ => frame | PWU,
        }
    }

    /// An invalidation that may be the one that is due.
    fn invalidate(&mut self, processor: usize, view: usize) {
        let eptp = layout::eptp(view, self.setup.accessed_dirty[view]);
        let vpid = self.rng.below(3) as u16;
        let address = self.address();
        let action = match self.rng.below(6) {
            0..=2 => Action::Invept { kind: 1, eptp },
            3 => Action::Invept { kind: 2, eptp: 0 },
            4 => Action::Invvpid { kind: self.rng.below(4), vpid, address },
            _ => Action::Invvpid { kind: 1, vpid: 1 + self.rng.below(2) as u16, address },
        };
        self.push(processor, action);
    }

    /// Nothing stale is left on any processor: INVEPT of all contexts, INVVPID of all, and for L1's
    /// own mappings MOV to CR3. VPID 0000H, which INVVPID does not reach, goes at the next VM entry.
    fn invalidate_everywhere(&mut self, processor: usize) {
        for processor in self.from(processor) {
            self.push(processor, Action::Invept { kind: 2, eptp: 0 });
            self.push(processor, Action::Invvpid { kind: 2, vpid: 0, address: 0 });
            let reload = Operation::MovToCr { register: 3, value: layout::L1_CR3 };
            self.push(processor, Action::L1(reload));
        }
    }

    /// L1 does something else.
    fn l1(&mut self, processor: usize) {
        let view = self.rng.below(VIEWS as u64) as usize;
        let window = layout::L1_WINDOW + (self.rng.below(4) << 12);
        let action = match self.rng.below(10) {
            0..=2 => Action::L1(Operation::Load { at: window, size: 8 }),
            3 => Action::L1(Operation::Invlpg { at: window }),
            4 => {
                let flags = self.setup.accessed_dirty[view];
                Action::SetField(Field::EPT_POINTER, layout::eptp(view, flags))
            }
            5 => {
                let vm = self.rng.below(2) as usize;
                self.vms[processor] = vm;
                Action::Switch(vm)
            }
            6 if !self.apart() => Action::SetField(Field::VPID, 1 + self.rng.below(2)),
            7 => Action::Clear,
            8 => Action::L1(Operation::MovToCr { register: 3, value: layout::L1_CR3 }),
            _ => {
                // The busy word of the #VE area.
                Action::Write { at: layout::ve_area(processor), value: 0 }
            }
        };
        self.push(processor, action);
        // Two guests may come to share a VPID.
        if matches!(action, Action::Switch(_) | Action::SetField(Field::VPID, _)) && !self.apart() {
            self.after_change(processor, Changed::Guest);
        }
    }

    /// L1 is hostile.
    fn wild(&mut self, processor: usize) {
        let mut value = match self.rng.below(3) {
            0 => self.rng.next(),
            1 => self.rng.next() & 0x3f_ffff,
            _ => 1 << self.rng.below(64),
        };
        if layout::is_vmcs(value) {
            // How a processor stores a VMCS is its own affair.
            value ^= layout::L1_DATA;
        }
        let fields = vmx_defs::field::FIELDS;
        let action = match self.rng.below(8) {
            0 | 1 => {
                let table = layout::ept_table(
                    self.rng.below(VIEWS as u64) as usize,
                    1 + self.rng.below(4) as u8,
                );
                Action::Write { at: table + 8 * self.rng.below(0x30), value }
            }
            2 => Action::Write { at: layout::EPTP_LIST + 8 * self.rng.below(8), value },
            3 => {
                let table = layout::guest_structure(guest::LONG + self.rng.below(13));
                Action::Write { at: table + 8 * self.rng.below(0x30), value }
            }
            4 | 5 => {
                Action::SetField(fields[self.rng.below(fields.len() as u64) as usize].0, value)
            }
            6 => Action::Invept { kind: self.rng.below(4), eptp: value },
            _ => Action::Invvpid { kind: self.rng.below(5), vpid: value as u16, address: value },
        };
        self.push(processor, action);
        if self.is_exact() {
            // It may have been anything.
            self.invalidate_everywhere(processor);
        }
    }
}

/// The smallest program that can be made of a failing one by leaving out steps and simplifying what
/// it runs on, as long as `fails` says that it still fails.
pub fn shrink(program: &Program, mut fails: impl FnMut(&Program) -> bool) -> Program {
    let mut best = program.clone();
    let mut changed = true;
    while changed {
        changed = false;
        let mut chunk = best.steps.len().div_ceil(2);
        while chunk > 0 {
            let mut start = 0;
            while start < best.steps.len() {
                let mut candidate = best.clone();
                let end = (start + chunk).min(candidate.steps.len());
                candidate.steps.drain(start..end);
                if fails(&candidate) {
                    best = candidate;
                    changed = true;
                } else {
                    start += chunk;
                }
            }
            chunk /= 2;
        }
        for candidate in simpler(&best) {
            if candidate != best && fails(&candidate) {
                best = candidate;
                changed = true;
                break;
            }
        }
    }
    best
}

/// The same program with one thing simpler.
fn simpler(program: &Program) -> Vec<Program> {
    let mut all = Vec::new();
    let mut with = |change: &dyn Fn(&mut Program)| {
        let mut candidate = program.clone();
        change(&mut candidate);
        all.push(candidate);
    };
    with(&|program| {
        program.setup.processors = 1;
        program.steps.iter_mut().for_each(|step| step.processor = 0);
    });
    with(&|program| program.setup.vms[1] = VmSetup::default());
    with(&|program| program.setup.ve = false);
    with(&|program| program.setup.accessed_dirty = [false; VIEWS]);
    for vm in 0..layout::VMS {
        with(&|program| program.setup.vms[vm].exits = ProcCtls::empty());
        with(&|program| program.setup.vms[vm].exceptions = 0);
        with(&|program| program.setup.vms[vm].cr4 = 0);
        with(&|program| program.setup.vms[vm].mode = GuestMode::Long);
    }
    all
}
