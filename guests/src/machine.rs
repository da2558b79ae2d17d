//! Answers: which processor state may a case change, and how is it put back?

use x86_64::{
    instructions::port::Port,
    registers::{
        control::{Cr0, Cr0Flags, Cr3, Cr3Flags, Cr4, Cr4Flags},
        model_specific::Msr,
    },
};

use crate::{gdt, traps, vmx};

const IA32_EFER: u32 = 0xC000_0080;

/// The control registers and EFER as they stood, to be put back after a case.
pub struct State {
    cr0: u64,
    cr3: (x86_64::structures::paging::PhysFrame, Cr3Flags),
    cr4: u64,
    efer: u64,
}

impl State {
    /// Reads it.
    pub fn save() -> Self {
        Self {
            cr0: Cr0::read_raw(),
            cr3: Cr3::read(),
            cr4: Cr4::read_raw(),
            // SAFETY: EFER exists wherever 64-bit mode does.
            efer: unsafe { Msr::new(IA32_EFER).read() },
        }
    }

    /// Puts it back, after leaving VMX operation.
    pub fn restore(&self) {
        vmx::leave();
        // SAFETY: these are the values that the program ran with before the case.
        unsafe {
            Msr::new(IA32_EFER).write(self.efer);
            Cr3::write(self.cr3.0, self.cr3.1);
            Cr0::write_raw(self.cr0);
            Cr4::write_raw(self.cr4);
        }
        gdt::load();
        traps::load();
    }
}

/// Masks the legacy interrupt controllers: this program awaits nothing from them, and an L2 that
/// runs with RFLAGS.IF set must not get what the firmware's timer has left.
pub fn mask_interrupts() {
    for controller in [0x21_u16, 0xA1] {
        // SAFETY: the mask registers of the two controllers, which every PC has.
        unsafe { Port::<u8>::new(controller).write(0xFF) };
    }
}

/// Whether this is Bochs without a hypervisor between: CPUID says that there is none, and the ACPI
/// tables name their maker.
///
/// Only for cases that end Bochs instead of failing: those report the deviation without running.
pub fn is_bare_bochs() -> bool {
    // The signature, a checksum byte, then the maker.
    let maker = |at: u64| read_bytes(at) == *b"RSD PTR " && read_bytes(at + 8)[1..7] == *b"BOCHS ";
    vmx::l0_signature().is_none() && (0xE_0000..0x10_0000).step_by(16).any(maker)
}

fn read_bytes(address: u64) -> [u8; 8] {
    // SAFETY: the BIOS area is mapped, and reading it has no effect.
    unsafe { (address as *const [u8; 8]).read_volatile() }
}

/// Sets and clears bits of CR0 and CR4, leaving the others.
pub fn change_cr0(set: Cr0Flags, clear: Cr0Flags) {
    // SAFETY: the callers change bits that paging and this program's code do not depend on.
    unsafe { Cr0::write_raw((Cr0::read_raw() | set.bits()) & !clear.bits()) }
}

/// As [`change_cr0`], for CR4.
pub fn change_cr4(set: Cr4Flags, clear: Cr4Flags) {
    // SAFETY: as for CR0.
    unsafe { Cr4::write_raw((Cr4::read_raw() | set.bits()) & !clear.bits()) }
}
