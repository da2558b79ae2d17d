//! Can an L1 that does whatever it likes, at any moment, hurt L0?
//!
//! Arbitrary bytes in every structure that is L1's, changed between any two steps, and in half of
//! the cases also while the engine reads them. The engine and its host must not panic, do a bounded
//! amount of work for each exit, and name no frame that is not theirs; the processor must accept
//! every vmcs02; and nothing of L0's may be seen or changed.

use nvmx::VmfuncMode;
use nvmx_testkit::seeds;
use nvmx_testkit::walks::{Rules, pages};
use nvmx_testkit::watch::{Canary, Tamper};
use nvmx_testkit::{Leaves, Nest, NestConfig, caps};
use vmx_defs::field::FIELDS;
use vmx_defs::{EptPermissions, ExitReason, Field, L1Gpa, VmInstructionError, msr};
use vmx_model::generate::{Profile, generate};
use vmx_model::registers::rflags;
use vmx_model::retention::Rng;
use vmx_model::{
    Action, Operation, Outcome, Platform, Program, Retention, Session, Step, VmxMode, layout,
};

/// A page for MSR areas.
const AREA: u64 = 300 << 12;
/// A page that L0 hides.
const HIDDEN: u64 = 301 << 12;
/// End of L1's RAM.
const RAM_END: u64 = (layout::PAGES as u64) << 12;

/// A number that is wrong in some way, or right.
fn number(rng: &mut Rng) -> u64 {
    let page = rng.below(layout::PAGES as u64) << 12;
    match rng.below(20) {
        0 => 0,
        1 => u64::MAX,
        2 => rng.next(),
        3 => 1 << rng.below(64),
        4 => !(1 << rng.below(64)),
        5 => page | rng.below(4096),
        6 => page,
        7 => HIDDEN,
        8 => RAM_END - 0x1000,
        9 => RAM_END,
        10 => (1 << 40) - 0x1000,
        11 => 1 << 40 | page,
        12 => 1 << 63 | page,
        // Where L0 and the shadow tables would be, were L1's addresses the machine's.
        13 => rng.pick(&[0x1_0000, 0x1_1000, 0x10_0000, 0x100_0000, 0x100_1000, 1 << 30]),
        14 => layout::eptp(rng.below(4) as usize, rng.one_in(2)) ^ 1 << rng.below(16),
        15 => layout::guest_structure(0x10 + rng.below(16)),
        16 => layout::ept_table(rng.below(4) as usize, 1 + rng.below(4) as u8) | 7 | 6 << 3,
        17 => rng.below(1 << 10),
        18 => 0xffff_8000_0000_0000 | rng.below(1 << 32),
        _ => rng.below(1 << 32),
    }
}

/// The pages of L1 that mean something to a hypervisor below it.
fn structure(rng: &mut Rng, processors: usize) -> u64 {
    let processor = rng.below(processors as u64) as usize;
    let view = rng.below(layout::VIEWS as u64) as usize;
    match rng.below(12) {
        0 => layout::MSR_BITMAP,
        1 => layout::IO_BITMAP + (rng.below(2) << 12),
        2 => layout::EPTP_LIST,
        3 => layout::vmxon(processor),
        4 | 5 => layout::vmcs(processor, rng.below(2) as usize),
        6 => AREA,
        7 => layout::guest_structure(layout::guest::LONG + rng.below(16)),
        8 => layout::L1_WINDOW_PT,
        _ => layout::ept_table(view, 1 + rng.below(4) as u8),
    }
}

/// How to make good what was done.
enum Undo {
    Field { processor: usize, field: Field, value: u64 },
    Word { at: u64, value: u64 },
}

struct Attack<'a> {
    session: Session<'a, Nest>,
    rng: Rng,
    rules: Rules,
    program: Program,
    undo: Vec<Undo>,
    canary: Canary,
}

impl Attack<'_> {
    fn processor(&mut self) -> usize {
        self.rng.below(self.program.setup.processors as u64) as usize
    }

    fn l1(&mut self, processor: usize, operation: Operation) {
        self.session.carry_out(&Step { processor, action: Action::L1(operation) });
    }

    fn step(&mut self, number: usize) {
        match self.rng.below(20) {
            0..=2 => self.field(),
            3..=6 => self.bytes(),
            7 => self.instruction(),
            8 => self.area(),
            9..=12 => self.make_good(),
            13..=16 => {
                for _ in 0..1 + self.rng.below(4) {
                    self.guest();
                }
            }
            17 => {
                let processor = self.processor();
                self.session.enter(processor);
            }
            _ => {
                let step = self.program.steps[number % self.program.steps.len()];
                self.session.carry_out(&step);
            }
        }
        self.check();
    }

    /// L1 writes a field.
    fn field(&mut self) {
        let processor = self.processor();
        let (field, _) = FIELDS[self.rng.below(FIELDS.len() as u64) as usize];
        self.session.leave(processor);
        if self.session.in_guest(processor) {
            return;
        }
        let value = self.session.read_field(processor, field);
        let wrong = if self.rng.one_in(3) {
            value ^ 1 << self.rng.below(64)
        } else {
            number(&mut self.rng)
        };
        self.session.write_field(processor, field, wrong);
        // Few VM entries survive more than one.
        if self.rng.one_in(3) {
            self.session.enter(processor);
            self.session.leave(processor);
            if !self.session.in_guest(processor) {
                self.session.write_field(processor, field, value);
            }
        } else {
            self.undo.push(Undo::Field { processor, field, value });
        }
    }

    /// Somebody writes to a structure.
    fn bytes(&mut self) {
        let page = structure(&mut self.rng, self.program.setup.processors);
        let offset =
            8 * if self.rng.one_in(2) { self.rng.below(0x30) } else { self.rng.below(512) };
        self.word(page + offset);
        if self.rng.one_in(16) {
            for offset in (0..0x1000).step_by(8) {
                self.word(page + offset);
            }
        }
    }

    fn word(&mut self, at: u64) {
        let wrong = number(&mut self.rng);
        let value = self.session.platform().peek(L1Gpa::new(at));
        self.session.platform().poke(L1Gpa::new(at), wrong);
        self.undo.push(Undo::Word { at, value });
    }

    /// Puts some of it right, so that L2 runs now and then.
    fn make_good(&mut self) {
        let count = self.rng.below(1 + self.undo.len() as u64);
        for _ in 0..count {
            let number = self.rng.below(self.undo.len() as u64) as usize;
            match self.undo.swap_remove(number) {
                Undo::Word { at, value } => self.session.platform().poke(L1Gpa::new(at), value),
                Undo::Field { processor, field, value } => {
                    self.session.leave(processor);
                    if !self.session.in_guest(processor) {
                        self.session.write_field(processor, field, value);
                    }
                }
            }
        }
    }

    /// A VMX instruction with operands of any kind.
    fn instruction(&mut self) {
        let processor = self.processor();
        let mut at = layout::operands(processor);
        let mut value = number(&mut self.rng);
        if self.rng.one_in(3) {
            // A region of this processor, or of another one.
            let (owner, vm) = (self.processor(), self.rng.below(2) as usize);
            value = self.rng.pick(&[layout::vmcs(owner, vm), layout::vmxon(owner)]);
        }
        self.session.platform().poke(L1Gpa::new(at), value);
        let second = if self.rng.one_in(2) { 0 } else { number(&mut self.rng) };
        self.session.platform().poke(L1Gpa::new(at + 8), second);
        if self.rng.one_in(8) {
            at = number(&mut self.rng);
        }
        let encoding = number(&mut self.rng) & self.rng.pick(&[0x7fff, u64::MAX]);
        let kind = self.rng.pick(&[0, 1, 1, 2, 3, 4, u64::MAX]);
        let operation = match self.rng.below(14) {
            0 => Operation::Vmxon { operand: at },
            1 | 2 => Operation::Vmclear { operand: at },
            3 | 4 => Operation::Vmptrld { operand: at },
            5 => Operation::Vmptrst { operand: at },
            6 => Operation::Vmread { encoding },
            7 => Operation::VmreadMemory { encoding, operand: at },
            8 => Operation::Vmwrite { encoding, value },
            9 => Operation::VmwriteMemory { encoding, operand: at },
            10 => Operation::Invvpid { kind, descriptor: at },
            11 => Operation::Vmcall,
            12 => Operation::Cpuid { leaf: 0, subleaf: 0 },
            _ => Operation::Invept { kind, descriptor: at },
        };
        self.l1(processor, operation);
        if self.rng.one_in(24) {
            self.l1(processor, Operation::Vmxoff);
        }
        // The VMCS that the rest of the program is about.
        for operand in [layout::vmxon(processor), layout::vmcs(processor, 0)] {
            let revision = self.session.platform().engine().caps().basic.revision();
            self.session.platform().poke(L1Gpa::new(operand), revision.into());
            let at = layout::operands(processor);
            self.session.platform().poke(L1Gpa::new(at), operand);
            if operand == layout::vmxon(processor) {
                self.l1(processor, Operation::Vmxon { operand: at });
            } else {
                self.session.carry_out(&Step { processor, action: Action::Switch(0) });
            }
        }
    }

    /// An MSR area.
    fn area(&mut self) {
        let processor = self.processor();
        let (count, at) = self.rng.pick(&[
            (Field::ENTRY_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_ADDR),
            (Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_STORE_ADDR),
            (Field::EXIT_MSR_LOAD_COUNT, Field::EXIT_MSR_LOAD_ADDR),
        ]);
        let entries = match self.rng.below(4) {
            0 => number(&mut self.rng),
            1 => self.rng.pick(&[511, 512, 513, 0xffff_ffff]),
            _ => 1 + self.rng.below(4),
        };
        let place = if self.rng.one_in(4) { number(&mut self.rng) } else { AREA };
        // Few L1s survive an exit whose MSRs can't be stored or loaded.
        let good = count != Field::ENTRY_MSR_LOAD_COUNT && !self.rng.one_in(4);
        for entry in 0..256 {
            let index = if good {
                u64::from(msr::SYSENTER_EIP)
            } else {
                self.rng.pick(&[
                    msr::EFER.into(),
                    msr::PAT.into(),
                    msr::FS_BASE.into(),
                    msr::VMX_BASIC.into(),
                    msr::FEATURE_CONTROL.into(),
                    0x79,
                    0x808,
                    0x9e,
                    0x1234,
                    u64::MAX,
                    msr::SYSENTER_CS.into(),
                ])
            };
            let value = if good { 0x1000 } else { number(&mut self.rng) };
            self.session.platform().poke(L1Gpa::new(AREA + 16 * entry), index);
            self.session.platform().poke(L1Gpa::new(AREA + 16 * entry + 8), value);
        }
        let (entries, place) = if good { (entries.min(200), AREA) } else { (entries, place) };
        for (field, value) in [(at, place), (count, entries)] {
            self.session.carry_out(&Step { processor, action: Action::SetField(field, value) });
        }
        self.session.enter(processor);
        self.session.leave(processor);
        let action = Action::SetField(count, 0);
        self.session.carry_out(&Step { processor, action });
    }

    /// L2 does something.
    fn guest(&mut self) {
        let processor = self.processor();
        let at = match self.rng.below(4) {
            0 => number(&mut self.rng),
            _ => (layout::DATA + self.rng.below(layout::DATA_PAGES)) << 12,
        };
        let value = number(&mut self.rng);
        let index = self.rng.pick(&[
            msr::EFER,
            msr::PAT,
            msr::FS_BASE,
            msr::DEBUGCTL,
            msr::VMX_BASIC,
            msr::FEATURE_CONTROL,
            0x10,
            0x1234,
            0x808,
            0xc000_1fff,
        ]);
        let operation = match self.rng.below(24) {
            0..=4 => Operation::Load { at, size: 8 },
            5..=7 => Operation::Store { at, size: 8, value },
            8 => Operation::Fetch { at },
            9..=12 => Operation::Vmfunc { rax: 0, rcx: self.rng.below(512) },
            13 => Operation::Vmfunc { rax: number(&mut self.rng), rcx: value },
            14 => Operation::MovToCr { register: self.rng.pick(&[0, 3, 4]), value },
            15 => Operation::Rdmsr(index),
            16 => Operation::Wrmsr { index, value },
            17 => Operation::In { port: value as u16, size: 4 },
            18 => Operation::Int(value as u8),
            19 => Operation::SetFlags(value),
            20 => Operation::Invlpg { at },
            21 => Operation::Invpcid { kind: self.rng.below(5), descriptor: at },
            22 => Operation::MovFromCr { register: 3 },
            _ => Operation::Cpuid { leaf: 1, subleaf: 0 },
        };
        self.session.guest(processor, operation);
    }

    /// What L2 could use leads to L1's memory alone, and no register tells of L0.
    fn check(&mut self) {
        let nest = &*self.session.platform();
        let machine = nest.machine();
        for (number, processor) in machine.processors.iter().enumerate() {
            for value in processor.regs.gprs {
                assert!(!Canary::betrays(nest, value), "processor {number} holds {value:#x}");
            }
            if processor.mode() != VmxMode::NonRoot {
                continue;
            }
            let Some(eptp) = processor.vmcs().and_then(|vmcs| vmcs.eptp()) else {
                panic!("a guest without EPT");
            };
            if !nest.engine_processor(number).runs_l2() || nest.is_ept01(eptp) {
                continue;
            }
            for page in pages(&machine.memory, self.rules, eptp).0 {
                let write = page.rights.contains(EptPermissions::WRITE);
                assert!(nest.is_guests(page.to, write), "{page:x?}");
            }
        }
    }

    /// What L1 can read of its VMCSs.
    fn read_all(&mut self) {
        for processor in 0..self.program.setup.processors {
            self.session.leave(processor);
            if self.session.in_guest(processor) {
                continue;
            }
            for (field, name) in FIELDS {
                let value = self.session.read_field(processor, *field);
                let nest = &*self.session.platform();
                assert!(!Canary::betrays(nest, value), "L1 reads {value:#x} in {name}");
            }
        }
        self.canary.check(self.session.platform());
    }
}

fn config(seed: u64, reload: bool) -> NestConfig {
    let leaves = match seed % 3 {
        0 => Leaves::Huge,
        1 => Leaves::Small,
        _ => Leaves::Scattered(seed),
    };
    let vmfunc = if reload { VmfuncMode::Reload } else { VmfuncMode::Emulated };
    let hidden = vec![L1Gpa::new(HIDDEN)];
    // Enough for any one instruction.
    let frames = 48 + 8 * (seed % 8) as u32;
    NestConfig { leaves, hidden, frames, vmfunc, ..NestConfig::random(seed) }
}

fn attack(seed: u64, processors: usize, steps: usize) -> Did {
    // To throw all roots away is for one processor only.
    let config = config(seed, processors == 1 && seed % 8 == 7);
    let caps = caps::bare_caps(&config.hardware);
    let profile = Profile { processors, wild: true, ve: false, ..Profile::default() };
    let program = generate(seed, &profile);
    let mut rng = Rng::new(seed ^ 0x4057_11e5);
    let retention = rng.pick(&[Retention::Nothing, Retention::Everything, Retention::Random(seed)]);
    let mut nest = Nest::new(&config, retention, program.setup.processors);
    let canary = Canary::paint(&mut nest, config.frames);
    let session = Session::new(&mut nest, &caps, &program.setup);
    let rules = Rules::from(&caps);
    let undo = Vec::new();
    let mut attack = Attack { session, rng, rules, program, undo, canary };
    if attack.rng.one_in(2) {
        let odds = attack.rng.pick(&[4, 20, 100]);
        attack.session.platform().set_tamper(Some(Tamper::new(seed, odds)));
    }
    for number in 0..steps {
        attack.step(number);
    }
    attack.read_all();
    let mut did = Did { calls: nest.most_calls(), exits: nest.exits(), ..Did::default() };
    did.fills = nest.engine().shadow_counters().fills;
    for number in 0..nest.machine().processors.len() {
        let counters = nest.engine_processor(number).counters();
        did.entries += counters.entries;
        did.reflected += counters.reflected;
        did.switches += counters.switches;
    }
    did
}

/// What the cases have come to.
#[derive(Clone, Copy, Debug, Default)]
struct Did {
    /// Greatest number of calls to the host for one exit.
    calls: u64,
    exits: u64,
    fills: u64,
    /// VM entries that succeeded, exits that L1 got, EPTP switches.
    entries: u64,
    reflected: u64,
    switches: u64,
}

impl Did {
    fn add(&mut self, other: Self) {
        self.calls = self.calls.max(other.calls);
        self.exits += other.exits;
        self.fills += other.fills;
        self.entries += other.entries;
        self.reflected += other.reflected;
        self.switches += other.switches;
    }
}

#[test]
fn no_l1_hurts_l0() {
    let mut did = Did::default();
    seeds::each("hostile", 2200, |seed| did.add(attack(seed, 1, 60)));
    println!("{did:?}");
}

#[test]
fn nor_do_several_of_its_processors() {
    let mut did = Did::default();
    seeds::each("hostile on several processors", 1100, |seed| did.add(attack(seed, 3, 60)));
    println!("{did:?}");
}

/// MSR areas that are good for as long as there is memory, and counts that ask for all of it.
#[test]
fn huge_msr_areas_are_refused_and_large_ones_carried_out() {
    const FIRST: u64 = 310 << 12;
    let areas = [
        (Field::ENTRY_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_ADDR),
        (Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_STORE_ADDR),
        (Field::EXIT_MSR_LOAD_COUNT, Field::EXIT_MSR_LOAD_ADDR),
    ];
    let config = NestConfig { frames: 16, ..NestConfig::default() };
    let caps = caps::bare_caps(&config.hardware);
    let mut nest = Nest::new(&config, Retention::Everything, 1);
    let mut session = Session::new(&mut nest, &caps, &Program::default().setup);
    for entry in (FIRST..RAM_END).step_by(16) {
        session.platform().poke(L1Gpa::new(entry), msr::SYSENTER_EIP.into());
    }
    for (count, at) in areas {
        for (entries, entered) in [(512, true), (513, false), (u32::MAX, false), (0, true)] {
            for (field, value) in [(at, FIRST), (count, entries.into())] {
                session.carry_out(&Step { processor: 0, action: Action::SetField(field, value) });
            }
            let outcome = session.guest(0, Operation::Vmcall);
            if entered {
                assert_eq!(outcome, Outcome::Exit(ExitReason::VMCALL), "{count:?} {entries}");
            } else {
                assert_eq!(outcome, Outcome::Completed { value: 0, flags: rflags::ZF });
                let error = session.read_field(0, Field::VM_INSTRUCTION_ERROR);
                assert_eq!(error, VmInstructionError::EntryControls.number().into());
            }
        }
    }
    assert!(nest.most_calls() < 4_000, "{} calls", nest.most_calls());
}
