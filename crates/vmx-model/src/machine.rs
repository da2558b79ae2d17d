//! What runs a program: several processors on one memory, bare or with a hypervisor in between?
//!
//! A [`Platform`] is what software of L1 believes to be its machine. [`Machine`] is the bare one.
//! A hypervisor under test, on a model of its own, is another; the same program has to give the same
//! trace on both.

use vmx_defs::{Hpa, L1Gpa};

use crate::caps::ModelCaps;
use crate::memory::Memory;
use crate::operation::Operation;
use crate::processor::{Outcome, Processor};
use crate::registers::Registers;
use crate::retention::Retention;

/// The machine that L1 runs on.
pub trait Platform {
    /// Executes one operation of whatever software runs on a processor, L1 or its guest.
    fn execute(&mut self, processor: usize, operation: &Operation) -> Outcome;

    /// Reads 8 bytes of what L1 calls physical memory, without any effect; `at` is aligned.
    fn peek(&mut self, at: L1Gpa) -> u64;

    /// Writes 8 bytes of what L1 calls physical memory, before L1 runs; `at` is aligned.
    fn poke(&mut self, at: L1Gpa, value: u64);
}

/// The bare machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// RAM.
    pub memory: Memory,
    /// The processors.
    pub processors: Vec<Processor>,
}

impl Machine {
    /// A machine with `pages` pages of zeros and a processor for each set of registers. With a
    /// random policy, each processor draws from a seed of its own.
    pub fn new(
        caps: &ModelCaps,
        retention: Retention,
        pages: usize,
        registers: impl IntoIterator<Item = Registers>,
    ) -> Self {
        let processors = (0..)
            .zip(registers)
            .map(|(number, registers)| {
                let retention = match retention {
                    Retention::Random(seed) => Retention::Random(seed ^ number << 32),
                    other => other,
                };
                Processor::new(caps.clone(), retention, registers)
            })
            .collect();
        Self { memory: Memory::new(pages), processors }
    }
}

impl Platform for Machine {
    fn execute(&mut self, processor: usize, operation: &Operation) -> Outcome {
        self.processors[processor].execute(&mut self.memory, operation)
    }

    fn peek(&mut self, at: L1Gpa) -> u64 {
        self.memory.read_u64(Hpa::new(at.as_u64()))
    }

    fn poke(&mut self, at: L1Gpa, value: u64) {
        self.memory.write_u64(Hpa::new(at.as_u64()), value);
    }
}
