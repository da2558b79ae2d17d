//! What else may software do, that translation does not hang on? Other registers, instructions that
//! exit, events that L1 injects, MSRs by instruction and by area, and L1's own privileged
//! instructions.

use vmx_defs::event::{IntrInfo, kind, vector};
use vmx_defs::field::{FIELDS, Kind};
use vmx_defs::{Field, msr};

use super::{Changed, Generator};
use crate::layout;
use crate::operation::Operation;
use crate::program::{Action, GuestMode, VmSetup};
use crate::registers::{cr0, cr4, rflags};

/// MSRs that a guest may well have for itself.
const OWN_MSRS: [u32; 7] = [
    msr::FS_BASE,
    msr::GS_BASE,
    msr::SYSENTER_EIP,
    0xc000_0081,
    0xc000_0082,
    0xc000_0102,
    0xc000_0103,
];

/// Other MSRs, of which some do not exist.
const OTHER_MSRS: [u32; 10] = [
    msr::EFER,
    msr::PAT,
    msr::DEBUGCTL,
    msr::SYSENTER_CS,
    msr::FEATURE_CONTROL,
    msr::VMX_BASIC,
    msr::VMX_EPT_VPID_CAP,
    msr::VMX_VMFUNC,
    0x1234,
    0x4000_0000,
];

/// Where L1 keeps MSR areas: in the last page of its window.
const AREA: u64 = layout::L1_DATA + 0x7800;

impl Generator<'_> {
    /// A few of those steps.
    pub(super) fn rarer(&mut self, processor: usize) {
        match self.rng.below(4) {
            0 | 1 => self.guest_rarer(processor),
            2 => self.l1_rarer(processor),
            _ => self.field(processor),
        }
    }

    fn msr(&mut self) -> u32 {
        if self.rng.one_in(2) { self.rng.pick(&OWN_MSRS) } else { self.rng.pick(&OTHER_MSRS) }
    }

    /// A value for an MSR, mostly one that it takes.
    fn msr_value(&mut self) -> u64 {
        match self.rng.below(6) {
            0 => self.rng.next(),
            1 => 0x0007_0406_0007_0406,
            2 => 0xffff_8000_0000_0000 | self.rng.below(1 << 40),
            3 => 0xd00,
            _ => self.rng.below(1 << 20),
        }
    }

    /// CR0 with some bits that neither translation nor VMX operation minds.
    fn cr0(&mut self, paged: bool) -> u64 {
        let mut value = cr0::PE | cr0::ET | cr0::NE;
        if paged {
            value |= cr0::PG;
        }
        for bits in [cr0::WP, cr0::TS, 1 << 18, cr0::CD, cr0::CD | cr0::NW, 1 << 1] {
            if self.rng.one_in(2) {
                value |= bits;
            }
        }
        if self.rng.one_in(8) { value ^ 1 << self.rng.below(33) } else { value }
    }

    /// An instruction that a guest or L1 may execute.
    fn instruction(&mut self) -> Operation {
        let operand = layout::GUEST_OPERANDS;
        let at = layout::DATA << 12;
        match self.rng.below(20) {
            0..=2 => Operation::Rdmsr(self.msr()),
            3..=5 => Operation::Wrmsr { index: self.msr(), value: self.msr_value() },
            6 => Operation::Cpuid {
                leaf: self.rng.pick(&[1, 7, 0x4000_0000, 0x8000_0001, 0x8000_0008]),
                subleaf: 0,
            },
            7 => Operation::In { port: 0x60, size: self.rng.pick(&[1, 2, 4]) },
            8 => Operation::Out { port: 0xffff, size: self.rng.pick(&[1, 2, 4]), value: 5 },
            9 => Operation::MovToCr { register: 8, value: self.rng.below(18) },
            10 => Operation::MovFromCr { register: self.rng.pick(&[0, 2, 4, 8]) },
            11 => self.rng.pick(&[Operation::Int3, Operation::Int(0x21), Operation::Ud2]),
            12 => self.rng.pick(&[Operation::Invd, Operation::Wbinvd, Operation::Xsetbv]),
            13 => self.rng.pick(&[Operation::Pause, Operation::Rdtsc, Operation::Rdtscp]),
            14 => self.rng.pick(&[
                Operation::MovFromDr7,
                Operation::MovToDr7(0x401),
                Operation::MovToDr7(1 << 33),
            ]),
            15 => Operation::Clts,
            16 => Operation::SetFlags(rflags::IF | self.rng.next() & rflags::ARITHMETIC),
            17 => Operation::SetFlags(self.rng.next() & (rflags::AC | rflags::ARITHMETIC)),
            18 => {
                let encoding = self.field_to_read().encoding().into();
                let odd = self.encoding();
                self.rng.pick(&[
                    Operation::Vmread { encoding },
                    Operation::VmreadMemory { encoding, operand },
                    Operation::VmwriteMemory { encoding: 0x440c, operand },
                    Operation::Vmread { encoding: odd },
                ])
            }
            _ => self.rng.pick(&[
                Operation::Vmptrst { operand },
                Operation::Vmptrld { operand },
                Operation::Invept { kind: 1, descriptor: operand },
                Operation::Invvpid { kind: 1, descriptor: operand },
                Operation::Vmxoff,
                Operation::Vmclear { operand: at },
                Operation::Vmlaunch,
            ]),
        }
    }

    /// A field whose value is defined at all times, as those that exits write are not.
    fn field_to_read(&mut self) -> Field {
        let field = self.rng.pick(FIELDS).0;
        match field.kind() {
            Kind::Control | Kind::Host => field,
            _ => Field::GUEST_CS_BASE,
        }
    }

    /// Something like an encoding, but of no field that exits write.
    fn encoding(&mut self) -> u64 {
        const KIND: u64 = 3 << 10;
        (self.rng.next() & 0x1_7fff & !KIND) | self.rng.pick(&[0, KIND])
    }

    /// The guest does something else.
    fn guest_rarer(&mut self, processor: usize) {
        let VmSetup { mode, cr4: own, .. } = *self.vm(processor);
        let operation = match self.rng.below(8) {
            0 => {
                let paged = mode != GuestMode::Unpaged;
                Operation::MovToCr { register: 0, value: self.cr0(paged) }
            }
            1 => {
                let base = match mode {
                    GuestMode::Long | GuestMode::Pae => cr4::PAE,
                    GuestMode::Bits32 => cr4::PSE,
                    GuestMode::Unpaged => 0,
                };
                let more = self.rng.pick(&[cr4::SMEP, cr4::SMAP, 1 << 11, 1 << 9, 1 << 12]);
                Operation::MovToCr { register: 4, value: base | own | cr4::PGE | more }
            }
            _ => self.instruction(),
        };
        self.push(processor, Action::Guest(operation));
        if matches!(operation, Operation::MovToCr { .. }) {
            self.after_change(processor, Changed::Guest);
        }
    }

    /// L1 executes instructions of its own.
    fn l1_rarer(&mut self, processor: usize) {
        let window = layout::L1_WINDOW + (self.rng.below(4) << 12) + 8 * self.rng.below(4);
        let operand = layout::operands(processor) + 0x40;
        let operation = match self.rng.below(12) {
            0 => Operation::Store { at: window, size: 8, value: self.rng.next() },
            1 => Operation::Fetch { at: window },
            2 => Operation::MovToCr { register: 0, value: self.cr0(true) },
            3 => {
                let more = self.rng.pick(&[cr4::PGE, cr4::PCIDE, cr4::SMEP, 1 << 18, 1 << 12]);
                let vmxe = if self.rng.one_in(8) { 0 } else { cr4::VMXE };
                Operation::MovToCr { register: 4, value: cr4::PAE | vmxe | more }
            }
            4 => {
                let encoding = self.field_to_read().encoding().into();
                Operation::VmreadMemory { encoding, operand: window }
            }
            5 => Operation::VmwriteMemory {
                encoding: Field::EXCEPTION_BITMAP.encoding().into(),
                operand: window,
            },
            6 => Operation::Vmptrst { operand: window },
            7 => {
                // A VMCS that may or may not be current loses its launch state.
                let vm = self.rng.below(layout::VMS as u64) as usize;
                let value = layout::vmcs(processor, vm);
                self.push(processor, Action::Write { at: operand, value });
                let clear = self.rng.one_in(2);
                if clear { Operation::Vmclear { operand } } else { Operation::Vmptrst { operand } }
            }
            8 => return self.l1_as_user(processor),
            _ => match self.instruction() {
                // All that leaves L1 without a way on.
                Operation::Vmptrld { .. } | Operation::Vmclear { .. } | Operation::Vmxoff => {
                    Operation::Vmptrst { operand }
                }
                other => other,
            },
        };
        self.push(processor, Action::L1(operation));
    }

    /// Where L1 has no privilege, VMX instructions fault.
    fn l1_as_user(&mut self, processor: usize) {
        let operand = layout::operands(processor);
        let operation = self.rng.pick(&[
            Operation::Vmptrst { operand },
            Operation::Vmread { encoding: 0x6400 },
            Operation::Rdmsr(msr::EFER),
            Operation::Xsetbv,
            Operation::Load { at: layout::L1_WINDOW, size: 8 },
        ]);
        self.push(processor, Action::L1(Operation::SetPrivilege(3)));
        self.push(processor, Action::L1(operation));
        self.push(processor, Action::L1(Operation::SetPrivilege(0)));
    }

    /// L1 writes a field that has little to do with translation, and enters.
    fn field(&mut self, processor: usize) {
        let mode = self.vm(processor).mode;
        let paged = mode != GuestMode::Unpaged;
        let (field, value) = match self.rng.below(16) {
            0..=3 => return self.inject(processor),
            4 => (Field::CR0_MASK, self.rng.next() & 0xe005_003f),
            5 => (Field::CR0_SHADOW, self.rng.next() & 0xe005_003f),
            6 => (Field::CR4_MASK, cr4::VMXE | self.rng.next() & 0x7ff),
            7 => (Field::CR4_SHADOW, self.rng.next() & 0x7ff),
            8 => {
                let cr3 = self.rng.pick(layout::guest_cr3(mode));
                self.push(processor, Action::SetField(Field::CR3_TARGET0, cr3));
                (Field::CR3_TARGET_COUNT, self.rng.below(4))
            }
            9 => (Field::EXCEPTION_BITMAP, self.rng.next() & 0x7_7fff),
            10 => {
                let mask = self.rng.below(0x20);
                self.push(processor, Action::SetField(Field::PF_ERROR_MASK, mask));
                (Field::PF_ERROR_MATCH, self.rng.below(0x20) & mask)
            }
            11 => (Field::GUEST_INTERRUPTIBILITY, self.rng.pick(&[0, 0, 2, 8])),
            12 => return self.msr_area(processor),
            13 => (Field::GUEST_CR0, self.cr0(paged)),
            14 => {
                let more = self.rng.pick(&[0, cr4::SMEP, 1 << 11]);
                // What L1 has cached for one PCID is not gone with another.
                let pcid = if self.is_exact() { 0 } else { self.rng.below(2) };
                self.push(processor, Action::SetField(Field::HOST_CR3, layout::L1_CR3 | pcid));
                (Field::HOST_CR4, cr4::PAE | cr4::VMXE | cr4::PGE | cr4::PCIDE | more)
            }
            _ => self.rng.pick(&[
                (Field::HOST_FS_BASE, 0x7000_0000),
                (Field::HOST_PAT, 0x0606_0606_0606_0606),
                (Field::HOST_SYSENTER_EIP, 0x1234),
                (Field::GUEST_GS_BASE, 0x1000),
                (Field::GUEST_ACTIVITY, 0),
                (Field::TSC_OFFSET, 0x1_0000_0000),
                (Field::MSR_BITMAP, layout::MSR_BITMAP),
                (Field::MSR_BITMAP, layout::L1_DATA),
                (Field::IO_BITMAP_A, layout::L1_DATA),
            ]),
        };
        self.push(processor, Action::SetField(field, value));
        self.after_change(processor, Changed::Guest);
        self.push(processor, Action::Enter);
    }

    /// L1 has an event delivered on the next entry (SDM Vol. 3C, "VM-Entry Controls for Event
    /// Injection").
    fn inject(&mut self, processor: usize) {
        let (event, number) = self.rng.pick(&[
            (kind::HARDWARE_EXCEPTION, vector::PF),
            (kind::HARDWARE_EXCEPTION, vector::GP),
            (kind::HARDWARE_EXCEPTION, vector::UD),
            (kind::HARDWARE_EXCEPTION, vector::DF),
            (kind::SOFTWARE_INTERRUPT, 0x80),
            (kind::SOFTWARE_EXCEPTION, vector::BP),
            (kind::EXTERNAL, 0x31),
            (kind::NMI, vector::NMI),
        ]);
        let code = event == kind::HARDWARE_EXCEPTION && vector::has_error_code(number);
        let info = IntrInfo::new()
            .with_vector(number)
            .with_kind(event)
            .with_has_error_code(code)
            .with_valid(true);
        for (field, value) in [
            (Field::ENTRY_EXCEPTION_ERROR, self.rng.below(16)),
            (Field::ENTRY_INSTRUCTION_LEN, 1 + self.rng.below(3)),
            (Field::ENTRY_INTR_INFO, u32::from(info).into()),
        ] {
            self.push(processor, Action::SetField(field, value));
        }
        self.push(processor, Action::Enter);
    }

    /// L1 has MSRs loaded or stored at transitions.
    fn msr_area(&mut self, processor: usize) {
        let (address, count) = self.rng.pick(&[
            (Field::ENTRY_MSR_LOAD_ADDR, Field::ENTRY_MSR_LOAD_COUNT),
            (Field::EXIT_MSR_STORE_ADDR, Field::EXIT_MSR_STORE_COUNT),
            (Field::EXIT_MSR_LOAD_ADDR, Field::EXIT_MSR_LOAD_COUNT),
        ]);
        let len = self.rng.below(3);
        for entry in 0..len {
            let index = if self.rng.one_in(8) { self.msr() } else { self.rng.pick(&OWN_MSRS) };
            let at = AREA + 16 * entry;
            self.push(processor, Action::Write { at, value: index.into() });
            let value = self.rng.below(1 << 20);
            self.push(processor, Action::Write { at: at + 8, value });
        }
        self.push(processor, Action::SetField(address, AREA));
        self.push(processor, Action::SetField(count, len));
        self.push(processor, Action::Enter);
    }
}
