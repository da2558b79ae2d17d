//! How is a program run, and what of it can L1 see?
//!
//! A [`Session`] plays L1 on any [`Platform`]: it sets up VMX operation, enters the guest, reads every
//! exit field that is defined for the exit, passes instructions that exited, and writes down all
//! that L1 and its guest could observe. Two platforms that are the same machine give the same
//! [`Trace`].

use vmx_defs::event::{IntrInfo, kind, vector};
use vmx_defs::field::{FIELDS, Kind};
use vmx_defs::{ExitReason, Field, L1Gpa};

use crate::caps::ModelCaps;
use crate::layout;
use crate::machine::Platform;
use crate::operation::Operation;
use crate::processor::Outcome;
use crate::program::{Action, Program, Setup, Step};
use crate::registers::rflags;

/// Something that software could observe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Seen {
    /// An operation and what became of it.
    Operation {
        /// Index of the step; `None` before the first.
        step: Option<usize>,
        /// The processor.
        processor: usize,
        /// What was executed.
        operation: Operation,
        /// What became of it.
        outcome: Outcome,
    },
    /// What L1 reads from the VMCS after a VM exit.
    Exit {
        /// The processor.
        processor: usize,
        /// Fields that the exit defines, with their values.
        fields: Vec<(Field, u64)>,
    },
    /// A VM-instruction error that L1 reads after VMfailValid.
    Error(u64),
    /// A word of memory at the end.
    Memory(L1Gpa, u64),
}

/// All that was observed, in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Trace {
    /// The observations.
    pub seen: Vec<Seen>,
    /// Operations that the guest executed.
    pub guest_operations: u64,
    /// Loads, stores and fetches among them.
    pub guest_accesses: u64,
}

impl Trace {
    /// The first observation that differs from another trace's, with its position.
    pub fn difference<'a>(
        &'a self,
        other: &'a Self,
    ) -> Option<(usize, Option<&'a Seen>, Option<&'a Seen>)> {
        let length = self.seen.len().max(other.seen.len());
        (0..length)
            .map(|at| (at, self.seen.get(at), other.seen.get(at)))
            .find(|(_, ours, theirs)| ours != theirs)
    }

    /// The results of the guest's loads, in order: a convenience for tests.
    pub fn loads(&self) -> Vec<u64> {
        let load = |seen: &Seen| match seen {
            Seen::Operation {
                operation: Operation::Load { .. },
                outcome: Outcome::Completed { value, .. },
                ..
            } => Some(*value),
            _ => None,
        };
        self.seen.iter().filter_map(load).collect()
    }
}

/// What the runner knows of a processor.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    in_guest: bool,
    vm: usize,
    launched: [bool; layout::VMS],
    stopped: bool,
}

/// An L1 at work on a platform. [`run`] has it carry out a program; a test may lead it by hand.
#[derive(Debug)]
pub struct Session<'a, P> {
    platform: &'a mut P,
    caps: &'a ModelCaps,
    setup: Setup,
    places: Vec<Place>,
    step: Option<usize>,
    /// How many fields of [`FIELDS`] have been looked at as the rest of a VMCS.
    turn: usize,
    trace: Trace,
}

/// Runs a program on a platform whose memory is zero and whose processors have the registers of
/// [`layout::l1_registers`]. `caps` is what L1 is offered.
pub fn run(platform: &mut impl Platform, caps: &ModelCaps, program: &Program) -> Trace {
    let mut session = Session::new(platform, caps, &program.setup);
    for (number, step) in program.steps.iter().enumerate() {
        session.step = Some(number);
        session.carry_out(step);
    }
    session.finish()
}

impl<'a, P: Platform> Session<'a, P> {
    /// Fills memory and brings each processor into VMX operation, with a complete VMCS for each
    /// guest; that of the first is current.
    pub fn new(platform: &'a mut P, caps: &'a ModelCaps, setup: &Setup) -> Self {
        layout::initialise(platform, caps, setup);
        let mut session = Self {
            platform,
            caps,
            setup: setup.clone(),
            places: vec![Place::default(); setup.processors],
            step: None,
            turn: 0,
            trace: Trace::default(),
        };
        for processor in 0..setup.processors {
            session.start(processor);
        }
        session
    }

    /// The platform.
    pub fn platform(&mut self) -> &mut P {
        self.platform
    }

    /// Whether the guest runs on a processor.
    pub fn in_guest(&self, processor: usize) -> bool {
        self.places[processor].in_guest
    }
}

impl<P: Platform> Session<'_, P> {
    fn execute(&mut self, processor: usize, operation: Operation) -> Outcome {
        let outcome = self.platform.execute(processor, &operation);
        let place = &mut self.places[processor];
        if place.in_guest {
            self.trace.guest_operations += 1;
            self.trace.guest_accesses += u64::from(operation.is_access());
        }
        match outcome {
            Outcome::Exit(_) => place.in_guest = false,
            Outcome::Entered(_) => place.in_guest = true,
            Outcome::Stopped => place.stopped = true,
            _ => {}
        }
        let step = self.step;
        // Time is no one's promise.
        let outcome = match (operation, outcome) {
            (Operation::Rdtsc | Operation::Rdtscp, Outcome::Completed { flags, .. }) => {
                Outcome::Completed { value: 0, flags }
            }
            _ => outcome,
        };
        self.trace.seen.push(Seen::Operation { step, processor, operation, outcome });
        outcome
    }

    /// L1, which runs, executes an operation, and reads the error where it failed.
    pub fn l1(&mut self, processor: usize, operation: Operation) -> Outcome {
        let outcome = self.execute(processor, operation);
        if let Outcome::Completed { flags, .. } = outcome
            && flags & rflags::ZF != 0
        {
            let error = self.read_field(processor, Field::VM_INSTRUCTION_ERROR);
            self.trace.seen.push(Seen::Error(error));
        }
        outcome
    }

    /// VMREAD that is not written down; 0 where it fails. L1 runs.
    pub fn read_field(&mut self, processor: usize, field: Field) -> u64 {
        let operation = Operation::Vmread { encoding: field.encoding().into() };
        match self.platform.execute(processor, &operation) {
            Outcome::Completed { value, flags: 0 } => value,
            _ => 0,
        }
    }

    /// VMWRITE that is not written down. L1 runs.
    pub fn write_field(&mut self, processor: usize, field: Field, value: u64) {
        let operation = Operation::Vmwrite { encoding: field.encoding().into(), value };
        self.platform.execute(processor, &operation);
    }

    /// Puts the operand of an instruction of L1 into memory, and returns its address. L1 runs.
    pub fn operand(&mut self, processor: usize, values: &[u64]) -> u64 {
        let at = layout::operands(processor);
        for (offset, value) in (0..).step_by(8).zip(values) {
            let store = Operation::Store { at: at + offset, size: 8, value: *value };
            self.platform.execute(processor, &store);
        }
        at
    }

    /// VMXON, and a complete VMCS for each guest; that of the first is current.
    fn start(&mut self, processor: usize) {
        let operand = self.operand(processor, &[layout::vmxon(processor)]);
        self.l1(processor, Operation::Vmxon { operand });
        for vm in (0..layout::VMS).rev() {
            let operand = self.operand(processor, &[layout::vmcs(processor, vm)]);
            self.l1(processor, Operation::Vmclear { operand });
            self.l1(processor, Operation::Vmptrld { operand });
            for (field, value) in layout::vmcs_fields(self.caps, &self.setup, processor, vm) {
                self.write_field(processor, field, value);
            }
        }
    }

    /// Carries out a step.
    pub fn carry_out(&mut self, step: &Step) {
        let processor = step.processor;
        if processor >= self.places.len() || self.places[processor].stopped {
            return;
        }
        match step.action {
            Action::Guest(operation) => {
                self.guest(processor, operation);
            }
            Action::Invpcid { kind, pcid, address } => {
                let at = layout::GUEST_OPERANDS;
                let low = u64::from(pcid);
                self.guest(processor, Operation::Store { at, size: 8, value: low });
                self.guest(processor, Operation::Store { at: at + 8, size: 8, value: address });
                self.guest(processor, Operation::Invpcid { kind, descriptor: at });
            }
            Action::Enter => {
                self.enter(processor);
            }
            Action::Leave => self.leave(processor),
            action => {
                self.leave(processor);
                if !self.places[processor].in_guest && !self.places[processor].stopped {
                    self.l1_action(processor, action);
                }
            }
        }
    }

    fn l1_action(&mut self, processor: usize, action: Action) {
        match action {
            Action::L1(operation) => {
                if !matches!(operation, Operation::Vmlaunch | Operation::Vmresume) {
                    self.l1(processor, operation);
                }
            }
            Action::Write { at, value } => {
                self.l1(processor, Operation::Store { at, size: 8, value });
            }
            Action::SetField(field, value) => {
                let encoding = field.encoding().into();
                self.l1(processor, Operation::Vmwrite { encoding, value });
            }
            Action::Switch(vm) => {
                let vm = vm % layout::VMS;
                let operand = self.operand(processor, &[layout::vmcs(processor, vm)]);
                self.l1(processor, Operation::Vmptrld { operand });
                self.places[processor].vm = vm;
            }
            Action::Clear => {
                let vm = self.places[processor].vm;
                let operand = self.operand(processor, &[layout::vmcs(processor, vm)]);
                self.l1(processor, Operation::Vmclear { operand });
                self.l1(processor, Operation::Vmptrld { operand });
                self.places[processor].launched[vm] = false;
            }
            Action::Invept { kind, eptp } => {
                let descriptor = self.operand(processor, &[eptp, 0]);
                self.l1(processor, Operation::Invept { kind, descriptor });
            }
            Action::Invvpid { kind, vpid, address } => {
                let descriptor = self.operand(processor, &[vpid.into(), address]);
                self.l1(processor, Operation::Invvpid { kind, descriptor });
            }
            Action::Guest(_) | Action::Invpcid { .. } | Action::Enter | Action::Leave => {}
        }
    }

    /// The guest executes an operation, after a VM entry where it does not run. Where the entry
    /// fails, its outcome is the one returned.
    pub fn guest(&mut self, processor: usize, operation: Operation) -> Outcome {
        let entry = self.enter(processor);
        if !self.places[processor].in_guest {
            return entry.unwrap_or(Outcome::Stopped);
        }
        let outcome = self.execute(processor, operation);
        self.after(processor, outcome);
        outcome
    }

    /// Enters the guest, unless it runs.
    pub fn enter(&mut self, processor: usize) -> Option<Outcome> {
        let place = &self.places[processor];
        if place.in_guest || place.stopped {
            return None;
        }
        let vm = place.vm;
        let entry = if place.launched[vm] { Operation::Vmresume } else { Operation::Vmlaunch };
        let outcome = self.l1(processor, entry);
        let entered = match outcome {
            Outcome::Entered(_) => true,
            Outcome::Exit(reason) => !reason.is_entry_failure(),
            _ => false,
        };
        self.places[processor].launched[vm] |= entered;
        self.after(processor, outcome);
        Some(outcome)
    }

    /// VMCALL of the guest, until it has left.
    pub fn leave(&mut self, processor: usize) {
        const ATTEMPTS: usize = 4;
        for _ in 0..ATTEMPTS {
            if !self.places[processor].in_guest {
                return;
            }
            let outcome = self.execute(processor, Operation::Vmcall);
            self.after(processor, outcome);
        }
    }

    /// L1 after an exit: reads what the exit defines, and passes an instruction that exited.
    fn after(&mut self, processor: usize, outcome: Outcome) {
        let Outcome::Exit(_) = outcome else { return };
        let reason = ExitReason::from_bits(self.read_field(processor, Field::EXIT_REASON) as u32);
        let mut fields = vec![(Field::EXIT_REASON, reason.bits().into())];
        let mut wanted = defined(reason);
        if !reason.is_entry_failure() {
            wanted.extend(STATE);
        }
        for field in wanted {
            if !self.caps.supports(field) {
                continue;
            }
            let mut value = self.read_field(processor, field);
            if field == Field::GUEST_RFLAGS
                && (reason == ExitReason::TRIPLE_FAULT || is_double_fault(&fields))
            {
                // What shutdown would leave in RF is no one's to say, nor whether the image of a
                // double fault has what the first fault would have pushed. The guest goes on without.
                value &= !rflags::RF;
                self.write_field(processor, field, value);
            }
            fields.push((field, value));
            self.dependent(processor, field, value, &mut fields);
        }
        for _ in 0..REST {
            let (field, _) = FIELDS[self.turn % FIELDS.len()];
            self.turn += 1;
            let is_kept = field.kind() != Kind::ReadOnly && !STATE.contains(&field);
            if is_kept && self.caps.supports(field) {
                fields.push((field, self.read_field(processor, field)));
            }
        }
        self.trace.seen.push(Seen::Exit { processor, fields });
        if is_instruction(reason) {
            let length = self.read_field(processor, Field::EXIT_INSTRUCTION_LEN);
            let rip = self.read_field(processor, Field::GUEST_RIP);
            self.write_field(processor, Field::GUEST_RIP, rip.wrapping_add(length));
        }
    }

    /// Fields that another one says are defined.
    fn dependent(
        &mut self,
        processor: usize,
        field: Field,
        value: u64,
        fields: &mut Vec<(Field, u64)>,
    ) {
        let also = match field {
            Field::EXIT_INTR_INFO if has_code(value) => Field::EXIT_INTR_ERROR,
            Field::IDT_VECTORING_INFO if has_code(value) => Field::IDT_VECTORING_ERROR,
            // Bit 7 of an EPT violation's qualification.
            Field::EXIT_QUALIFICATION
                if fields[0].1 == u64::from(ExitReason::EPT_VIOLATION.bits())
                    && value & 1 << 7 != 0 =>
            {
                Field::GUEST_LINEAR_ADDRESS
            }
            _ => return,
        };
        let value = self.read_field(processor, also);
        fields.push((also, value));
    }

    /// What was seen, with memory at the end: tables with their flags, and data.
    pub fn finish(mut self) -> Trace {
        self.step = None;
        for page in layout::visible_pages(&self.setup) {
            for offset in (0..0x1000).step_by(8) {
                let at = L1Gpa::new(page + offset);
                let value = self.platform.peek(at);
                if value != 0 {
                    self.trace.seen.push(Seen::Memory(at, value));
                }
            }
        }
        self.trace
    }
}

/// Guest state and controls that L1 reads after every exit.
const STATE: [Field; 18] = [
    Field::GUEST_RIP,
    Field::GUEST_RSP,
    Field::GUEST_RFLAGS,
    Field::GUEST_CR0,
    Field::GUEST_CR3,
    Field::GUEST_CR4,
    Field::GUEST_EFER,
    Field::GUEST_CS_SELECTOR,
    Field::GUEST_SS_AR,
    Field::GUEST_INTERRUPTIBILITY,
    Field::GUEST_ACTIVITY,
    Field::ENTRY_INTR_INFO,
    Field::ENTRY_CTLS,
    Field::EPT_POINTER,
    Field::EPTP_INDEX,
    Field::GUEST_PDPTE0,
    Field::GUEST_PDPTE1,
    Field::IDT_VECTORING_INFO,
];

/// So many of the other fields of the VMCS does L1 look at after an exit, in turn: what no exit
/// changes has to be there still, and the rest of the guest's state be saved.
const REST: usize = 5;

/// Whether the exit, of which these fields have been read, is due to a double fault.
fn is_double_fault(fields: &[(Field, u64)]) -> bool {
    fields.iter().any(|(field, value)| {
        let information = IntrInfo::from(*value as u32);
        *field == Field::EXIT_INTR_INFO
            && information.valid()
            && information.kind() == kind::HARDWARE_EXCEPTION
            && information.vector() == vector::DF
    })
}

fn has_code(information: u64) -> bool {
    let information = IntrInfo::from(information as u32);
    information.valid() && information.has_error_code()
}

/// Whether an exit is due to an instruction that L1 emulates as doing nothing.
fn is_instruction(reason: ExitReason) -> bool {
    !reason.is_entry_failure()
        && matches!(reason.bits(), 10..=28 | 29..=32 | 36 | 39 | 40 | 46 | 47 | 50 | 51 | 53..=55 | 57..=61)
}

/// The exit-information fields that an exit defines, besides those that others imply (SDM Vol. 3C,
/// "VM-Exit Information Fields").
fn defined(reason: ExitReason) -> Vec<Field> {
    let mut fields = vec![Field::EXIT_QUALIFICATION, Field::EXIT_INTR_INFO];
    if reason.is_entry_failure() {
        fields.pop();
        return fields;
    }
    if is_instruction(reason) {
        fields.push(Field::EXIT_INSTRUCTION_LEN);
    }
    match reason {
        ExitReason::EPT_VIOLATION => fields.push(Field::GUEST_PHYSICAL_ADDRESS),
        ExitReason::EPT_MISCONFIGURATION => {
            // The qualification is undefined.
            fields.remove(0);
            fields.push(Field::GUEST_PHYSICAL_ADDRESS);
        }
        ExitReason::VMREAD
        | ExitReason::VMWRITE
        | ExitReason::VMCLEAR
        | ExitReason::VMPTRLD
        | ExitReason::VMPTRST
        | ExitReason::VMXON
        | ExitReason::INVEPT
        | ExitReason::INVVPID
        | ExitReason::INVPCID => fields.push(Field::EXIT_INSTRUCTION_INFO),
        _ => {}
    }
    fields
}
