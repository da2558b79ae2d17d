//! Does an L1 that gets everything wrong get the same answers as from the processor itself?
//!
//! Wrong values in every field, VMX instructions with operands of any kind, bitmaps and MSR areas of
//! any content, one at a time, so that each meets its own check. Every VMfail with its number, every
//! entry failure with its qualification, every exit and fault is compared with the bare machine's.

use nvmx_testkit::compare::transparent;
use nvmx_testkit::{NestConfig, caps, seeds};
use vmx_defs::field::FIELDS;
use vmx_defs::{Field, msr};
use vmx_model::generate::{Profile, generate, shrink};
use vmx_model::retention::Rng;
use vmx_model::{Action, ModelCaps, Operation, Program, Retention, Setup, Step, layout};

/// A page for MSR areas.
const AREA: u64 = 300 << 12;
/// A page without RAM.
const NOTHING: u64 = (layout::PAGES as u64) << 12;

struct Writer<'a> {
    rng: Rng,
    caps: &'a ModelCaps,
    setup: &'a Setup,
    steps: Vec<Step>,
    vm: usize,
    retention: Retention,
}

impl Writer<'_> {
    fn push(&mut self, action: Action) {
        self.steps.push(Step { processor: 0, action });
    }

    fn number(&mut self) -> u64 {
        let rng = &mut self.rng;
        let page = rng.below(layout::PAGES as u64) << 12;
        match rng.below(16) {
            0 => 0,
            1 => u64::MAX,
            2 => rng.next(),
            3 | 4 => 1 << rng.below(64),
            5 => !(1 << rng.below(64)),
            6 => page | rng.below(4096),
            7 => page,
            8 => NOTHING,
            9 => (1 << 40) - 0x1000,
            10 => 1 << 40 | page,
            11 => layout::eptp(rng.below(4) as usize, rng.one_in(2)) ^ 1 << rng.below(16),
            12 => rng.below(1 << 10),
            13 => 0xffff_8000_0000_0000 | rng.below(1 << 32),
            14 => 0x0000_8000_0000_0000 | rng.below(1 << 32),
            _ => rng.below(1 << 32),
        }
    }

    /// What the field has when L1 begins.
    fn good(&self, wanted: Field) -> u64 {
        let fields = layout::vmcs_fields(self.caps, self.setup, 0, self.vm);
        fields.iter().rev().find(|(field, _)| *field == wanted).map_or(0, |(_, value)| *value)
    }

    fn step(&mut self) {
        match self.rng.below(8) {
            0..=3 => self.field(),
            4 | 5 => self.instruction(),
            6 => self.area(),
            _ => self.bitmap(),
        }
    }

    /// One field, or two, are wrong at an entry.
    fn field(&mut self) {
        let mut wrong = Vec::new();
        for _ in 0..1 + self.rng.below(2) {
            let (field, _) = FIELDS[self.rng.below(FIELDS.len() as u64) as usize];
            // L1 may go on with what it has cached of its own paging.
            if field == Field::HOST_CR3 && self.retention != Retention::Nothing {
                continue;
            }
            let good = self.good(field);
            let value =
                if self.rng.one_in(2) { good ^ 1 << self.rng.below(32) } else { self.number() };
            // Next to where L1 runs, a failed entry would look like one that did nothing.
            let value = if field == Field::HOST_RIP { value | 1 << 20 } else { value };
            // L1 would not live to read what it has got.
            let host = field.kind() == vmx_defs::field::Kind::Host;
            let fatal = host && !matches!(field, Field::HOST_FS_BASE | Field::HOST_GS_BASE);
            self.push(Action::SetField(field, value));
            wrong.push((field, good));
            if fatal {
                break;
            }
        }
        // A VPID keeps what the guest has cached of a CR3 that L1 changes.
        self.forget();
        self.push(Action::Enter);
        let at = (layout::DATA + self.rng.below(layout::DATA_PAGES)) << 12;
        self.push(Action::Guest(Operation::Load { at, size: 8 }));
        self.push(Action::Leave);
        for (field, good) in wrong {
            self.push(Action::SetField(field, good));
        }
        self.forget();
    }

    /// Nothing is cached.
    fn forget(&mut self) {
        self.push(Action::Invept { kind: 2, eptp: 0 });
        self.push(Action::Invvpid { kind: 2, vpid: 0, address: 0 });
    }

    fn instruction(&mut self) {
        let mut at = layout::operands(0) + 0x80;
        let value = self.number();
        self.push(Action::Write { at, value });
        let second = if self.rng.one_in(2) { 0 } else { self.number() };
        self.push(Action::Write { at: at + 8, value: second });
        if self.rng.one_in(8) {
            at = self.rng.pick(&[
                NOTHING,
                0x8000_0000_0000,
                0x5000_0000,
                layout::L1_WINDOW + 0x7ffc,
            ]);
        }
        let mut encoding = self.number();
        if !self.rng.one_in(3) {
            encoding &= 0x7fff;
        }
        let kind = self.rng.pick(&[0, 1, 1, 2, 3, 4, u64::MAX]);
        let operation = match self.rng.below(14) {
            0 => Operation::Vmxon { operand: at },
            1 | 2 => Operation::Vmclear { operand: at },
            3 | 4 => Operation::Vmptrld { operand: at },
            5 => Operation::Vmptrst { operand: at },
            6 => Operation::Vmread { encoding },
            7 => Operation::VmreadMemory { encoding, operand: at },
            8 | 9 => Operation::Invvpid { kind, descriptor: at },
            10 => Operation::Vmcall,
            11 => Operation::VmwriteMemory {
                encoding: Field::EXCEPTION_BITMAP.encoding().into(),
                operand: at,
            },
            _ => Operation::Invept { kind, descriptor: at },
        };
        self.push(Action::L1(operation));
        // A region of another revision.
        if self.rng.one_in(4) {
            let vm = 1 - self.vm;
            let region = layout::vmcs(0, vm);
            let operand = layout::operands(0) + 0x80;
            self.push(Action::Write { at: operand, value: region });
            self.push(Action::L1(Operation::Vmclear { operand }));
            let revision = u64::from(self.caps.basic.revision());
            let wrong = revision ^ 1 << self.rng.below(32);
            self.push(Action::Write { at: region, value: wrong });
            self.push(Action::L1(Operation::Vmptrld { operand }));
            self.push(Action::Write { at: region, value: revision });
        }
        self.push(Action::Switch(self.vm));
    }

    fn area(&mut self) {
        let (count, at) = self.rng.pick(&[
            (Field::ENTRY_MSR_LOAD_COUNT, Field::ENTRY_MSR_LOAD_ADDR),
            (Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_STORE_ADDR),
            (Field::EXIT_MSR_LOAD_COUNT, Field::EXIT_MSR_LOAD_ADDR),
        ]);
        let entries = 1 + self.rng.below(4);
        let place = if self.rng.one_in(8) { self.number() } else { AREA };
        // A failure at an exit is the end of L1.
        let entry = count == Field::ENTRY_MSR_LOAD_COUNT;
        for number in 0..entries {
            let safe = [msr::SYSENTER_EIP, msr::SYSENTER_ESP, msr::SYSENTER_CS, 0xc000_0082];
            let any = [
                msr::PAT,
                msr::FS_BASE,
                msr::GS_BASE,
                msr::VMX_BASIC,
                msr::FEATURE_CONTROL,
                0x79,
                0x9b,
                0x808,
                0x1234,
                u32::MAX,
            ];
            let index = if entry && self.rng.one_in(3) {
                u64::from(self.rng.pick(&any)) | if self.rng.one_in(4) { 1 << 32 } else { 0 }
            } else {
                self.rng.pick(&safe).into()
            };
            let value = if entry { self.number() } else { 0x1000 + number };
            self.push(Action::Write { at: AREA + 16 * number, value: index });
            self.push(Action::Write { at: AREA + 16 * number + 8, value });
        }
        let place = if entry { place } else { AREA };
        self.push(Action::SetField(at, place));
        self.push(Action::SetField(count, entries));
        self.push(Action::Enter);
        self.push(Action::Leave);
        self.push(Action::SetField(count, 0));
    }

    fn bitmap(&mut self) {
        let value = self.number();
        let offset = 8 * self.rng.pick(&[0, 2, 14, 128, 129, 130, 132, 256, 270, 386, 388]);
        let at = layout::MSR_BITMAP + offset;
        self.push(Action::Write { at, value });
        let indexes = [msr::SYSENTER_EIP, 0xc000_0081, 0xc000_0082, msr::FS_BASE, msr::VMX_BASIC];
        let index = self.rng.pick(&indexes);
        self.push(Action::Guest(Operation::Rdmsr(index)));
        let value = self.number();
        self.push(Action::Guest(Operation::Wrmsr { index, value }));
        self.push(Action::Leave);
    }
}

fn program(seed: u64, caps: &ModelCaps, retention: Retention) -> Program {
    let mut program = generate(seed, &Profile { ve: false, ..Profile::default() });
    let rng = Rng::new(seed ^ 0xa4_53e2);
    let steps = Vec::new();
    let mut writer = Writer { rng, caps, setup: &program.setup, steps, vm: 0, retention };
    for _ in 0..12 {
        writer.step();
    }
    program.steps = writer.steps;
    program
}

fn check(seed: u64) {
    let config = NestConfig { frames: 64, ..NestConfig::random(seed) };
    let caps = caps::bare_caps(&config.hardware);
    let retention = match seed % 3 {
        0 => Retention::Nothing,
        1 => Retention::Everything,
        _ => Retention::Random(seed),
    };
    let program = program(seed, &caps, retention);
    let fails = |program: &Program| transparent(program, retention, &config).is_err();
    if fails(&program) {
        let small = shrink(&program, fails);
        for step in &small.steps {
            println!("    {:x?}", step.action);
        }
        panic!("{:?} {:x?}", small.setup, transparent(&small, retention, &config));
    }
}

#[test]
fn a_mistake_of_l1_has_the_answer_of_the_processor() {
    seeds::each("answers", 4000, check);
}

/// Seed 100 of the above: the guest writes an MSR that it may not, and L1 wants to know.
#[test]
fn an_exit_due_to_a_fault_that_l0_finds_saves_rf() {
    let program = Program {
        steps: [
            Action::SetField(Field::EXCEPTION_BITMAP, 1 << vmx_defs::event::vector::GP),
            Action::Guest(Operation::Wrmsr { index: msr::VMX_BASIC, value: 0 }),
        ]
        .map(|action| Step { processor: 0, action })
        .to_vec(),
        ..Program::default()
    };
    let result = transparent(&program, Retention::Everything, &NestConfig::default());
    assert!(result.is_ok(), "{result:x?}");
}
