//! Answers: how does a case have L2 execute instructions that only this case needs?
//!
//! [`l2_code!`](crate::l2_code) turns assembly into a function that gives its address; each piece
//! ends in a VMCALL of its own. [`Idt`] gives L2 an interrupt-descriptor table whose handlers tell
//! by their RIP which vector was delivered.

use vmx_defs::Field;

use super::vmcs;
use crate::{
    gdt,
    memory::{Arena, Page},
};

/// Defines functions that give the addresses of pieces of 64-bit code for L2; VMCALL is appended.
#[macro_export]
macro_rules! l2_code {
    ($($(#[$doc:meta])* $name:ident: $($line:literal),+;)*) => {$(
        $(#[$doc])*
        fn $name() -> u64 {
            #[unsafe(naked)]
            extern "C" fn code() {
                core::arch::naked_asm!($($line,)+ "vmcall")
            }
            code as *const () as u64
        }
    )*};
}

/// An interrupt-descriptor table of 64-bit interrupt gates for L2.
#[derive(Clone, Copy)]
pub struct Idt {
    gates: Page,
    handlers: Page,
}

impl Idt {
    /// All 256 gates, open to CPL 3. Each handler is NOP, VMCALL and IRETQ: Bochs saves the RIP of
    /// before an NMI if the handler's first instruction exits.
    pub fn new(arena: &mut Arena) -> Self {
        let idt = Self { gates: arena.page(), handlers: arena.page() };
        for vector in 0..=255_u8 {
            let (at, target) = (usize::from(vector) * 16, idt.handler(vector) - 1);
            idt.handlers.put(at, &[0x90, 0x0F, 0x01, 0xC1, 0x48, 0xCF]);
            let gate = (target & 0xFFFF)
                | u64::from(gdt::CODE64) << 16
                | 0xEE << 40
                | (target >> 16 & 0xFFFF) << 48;
            idt.gates.write(at / 8, gate);
            idt.gates.write(at / 8 + 1, target >> 32);
        }
        idt
    }

    /// Where the VMCALL of this vector's handler is.
    pub fn handler(&self, vector: u8) -> u64 {
        self.handlers.address() + u64::from(vector) * 16 + 1
    }

    /// The page of gates, 16 bytes each.
    pub fn gates(&self) -> Page {
        self.gates
    }

    /// Gives it to L2 of the current VMCS.
    pub fn install(&self) {
        vmcs::write(Field::GUEST_IDTR_BASE, self.gates.address());
        vmcs::write(Field::GUEST_IDTR_LIMIT, 0xFFF);
    }
}
