//! Answers: how does a case cause interrupts and NMIs?
//!
//! By the local APIC in xAPIC mode (SDM Vol. 3A, "Advanced Programmable Interrupt Controller
//! (APIC)"). Those of the legacy controllers are masked since boot: nothing else is to come.

use core::arch::asm;

use vmx_defs::{L2Gpa, msr};

use crate::{
    skip,
    suite::{Ctx, Stop},
    vmx::{Ept, ept::RWX, paging::WINDOW, rdmsr},
};

/// Where L2 sees the registers, once [`LocalApic::show`] has mapped them.
pub const SEEN_AT: u64 = WINDOW + 0x1F_F000;

/// Offset of the low half of the interrupt command register.
pub const ICR: u64 = 0x300;

const ID: u64 = 0x20;
const TPR: u64 = 0x80;
const EOI: u64 = 0xB0;
const SPURIOUS: u64 = 0xF0;
const ICR_HIGH: u64 = 0x310;
const TIMER: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3E0;

/// The local APIC of the processor that uses this.
#[derive(Clone, Copy, Debug)]
pub struct LocalApic {
    base: u64,
}

impl LocalApic {
    /// Enables it, with nothing pending but what a case causes. Skips the case without one.
    pub fn new() -> Result<Self, Stop> {
        const X2APIC: u64 = 1 << 10;
        const ENABLED: u64 = 1 << 11;
        let register = rdmsr(msr::APIC_BASE);
        if register & (ENABLED | X2APIC) != ENABLED {
            skip!("no local APIC in xAPIC mode (IA32_APIC_BASE {register:#x})");
        }
        let apic = Self { base: register & 0xF_FFFF_F000 };
        apic.write(SPURIOUS, 0x1FF);
        apic.write(TPR, 0);
        apic.stop_timer();
        // A case that failed may have left interrupts in service.
        for _ in 0..16 {
            apic.end_of_interrupt();
        }
        Ok(apic)
    }

    fn write(self, offset: u64, value: u32) {
        // SAFETY: a register of the local APIC, which is mapped with the low 4 GiB.
        unsafe { ((self.base + offset) as *mut u32).write_volatile(value) }
    }

    fn read(self, offset: u64) -> u32 {
        // SAFETY: as for `write`.
        unsafe { ((self.base + offset) as *const u32).read_volatile() }
    }

    /// Sends this processor an interrupt. It stays pending while RFLAGS.IF is 0, as in L1 always.
    pub fn interrupt(self, vector: u8) {
        const SELF: u32 = 1 << 18;
        self.write(ICR, SELF | 1 << 14 | u32::from(vector));
    }

    /// Its identifier.
    pub fn identifier(self) -> u32 {
        self.read(ID) >> 24
    }

    /// Sends this interrupt command to the processor with that identifier.
    pub fn command(self, identifier: u32, command: u32) {
        const PENDING: u32 = 1 << 12;
        self.write(ICR_HIGH, identifier << 24);
        self.write(ICR, command);
        while self.read(ICR) & PENDING != 0 {
            core::hint::spin_loop();
        }
    }

    /// Starts the timer, once, with this vector after `count` of its ticks.
    pub fn start_timer(self, vector: u8, count: u32) {
        const BY_ONE: u32 = 0xB;
        self.write(TIMER_DIVIDE, BY_ONE);
        self.write(TIMER, vector.into());
        self.write(TIMER_COUNT, count);
    }

    /// Stops the timer.
    pub fn stop_timer(self) {
        const MASKED: u32 = 1 << 16;
        self.write(TIMER, MASKED);
        self.write(TIMER_COUNT, 0);
    }

    /// Ends the interrupt that was acknowledged last.
    pub fn end_of_interrupt(self) {
        self.write(EOI, 0);
    }

    /// Maps the registers for L2 at [`SEEN_AT`] and prepares them so that L2, by writing
    /// [`NMI_COMMAND`] to [`ICR`], sends this processor an NMI.
    pub fn show(self, ctx: &mut Ctx<'_>, ept: &Ept) {
        self.write(ICR_HIGH, self.read(ID) & 0xFF00_0000);
        ept.map(ctx.arena, L2Gpa::new(SEEN_AT), 1, self.base | RWX);
    }
}

/// What the interrupt command register takes for an NMI to the processor of its upper half.
pub const NMI_COMMAND: u64 = 0x4400;

/// Ends this processor's blocking by NMI, which an NMI exit begins and IRET ends.
pub fn unblock_nmis() {
    // SAFETY: an IRET to the next instruction, with the same segments, stack and flags.
    unsafe {
        asm!(
            "mov {stack}, rsp",
            "mov {segment:e}, ss",
            "push {segment}",
            "push {stack}",
            "pushfq",
            "mov {segment:e}, cs",
            "push {segment}",
            "lea {stack}, [rip + 2f]",
            "push {stack}",
            "iretq",
            "2:",
            stack = out(reg) _,
            segment = out(reg) _,
        );
    }
}
