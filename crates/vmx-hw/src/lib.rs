//! The VMX instructions of the processor.
//!
//! The only VMX assembly of the project that is not an entry path: each instruction with CF and ZF
//! captured in the same asm block, so that the compiler can't put anything between the instruction
//! and its verdict (SDM Vol. 3C, "Conventions" of the VMX instruction reference: VMsucceed,
//! VMfailInvalid, VMfailValid).
#![no_std]

#[cfg(feature = "engine")]
mod cpu;
mod instructions;

#[cfg(feature = "engine")]
pub use cpu::Cpu;
pub use instructions::*;
