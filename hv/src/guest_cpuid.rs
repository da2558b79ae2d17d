//! What does CPUID tell L1?
//!
//! The processor's own answer, without the features that are hidden, with L1's state in the bits
//! that mirror it (CPUID executed here shows L0's), and with L0's signature and counters in leaves
//! of their own.

use core::arch::x86_64::{__cpuid, __cpuid_count};

use vmx_defs::ProcCtls2;

use crate::counters::{LAYOUT, REASONS};
use crate::guest_msr::{HIDDEN_XCR0, HIDDEN_XSTATE};
use crate::host::Host;
use crate::vcpu::Vcpu;

/// First leaf of L0.
const SIGNATURE: u32 = 0x4000_0000;
const SIZES: u32 = 0x4000_0001;
const TOTALS: u32 = 0x4000_0002;
const REASONS_LEAF: u32 = 0x4000_0003;
/// The leaves reserved for hypervisors.
const LAST_RESERVED: u32 = 0x4000_FFFF;

/// EAX, EBX, ECX, EDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Answer {
    /// EAX.
    pub(crate) eax: u32,
    /// EBX.
    pub(crate) ebx: u32,
    /// ECX.
    pub(crate) ecx: u32,
    /// EDX.
    pub(crate) edx: u32,
}

/// What of L1's state CPUID mirrors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mirrored {
    /// CR4 as L1 has it.
    pub(crate) cr4: u64,
    /// Secondary controls that L1 runs with.
    pub(crate) controls: ProcCtls2,
}

const CR4_OSXSAVE: u64 = 1 << 18;
const APIC_ENABLE: u64 = 1 << 11;

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !(1 << bit) | u32::from(on) << bit;
}

fn clear(word: &mut u32, bits: &[u32]) {
    for bit in bits {
        *word &= !(1 << bit);
    }
}

/// Whether `leaf` is one of L0's own, which [`own_leaf`] answers.
pub(crate) fn is_own(leaf: u32) -> bool {
    (SIGNATURE..=LAST_RESERVED).contains(&leaf)
}

/// The answer to CPUID with this EAX and ECX, but for L0's own leaves.
pub(crate) fn answer(host: &Host, mirrored: Mirrored, leaf: u32, subleaf: u32) -> Answer {
    let real = __cpuid_count(leaf, subleaf);
    let mut answer = Answer { eax: real.eax, ebx: real.ebx, ecx: real.ecx, edx: real.edx };
    let last = if leaf & 0x8000_0000 != 0 { __cpuid(0x8000_0000).eax } else { __cpuid(0).eax };
    if leaf > last {
        // The processor answers as for its last basic leaf.
        return self::answer(host, mirrored, __cpuid(0).eax, subleaf);
    }
    hide(leaf, subleaf, &mut answer);
    let controls = mirrored.controls;
    match leaf {
        1 => {
            set(&mut answer.ecx, 27, mirrored.cr4 & CR4_OSXSAVE != 0);
            set(&mut answer.ecx, 31, true);
            // The APIC flag follows IA32_APIC_BASE.
            let apic = answer.edx & 1 << 9 != 0 && host.apic_base & APIC_ENABLE != 0;
            set(&mut answer.edx, 9, apic);
        }
        7 if subleaf == 0 => {
            if !controls.contains(ProcCtls2::INVPCID) {
                clear(&mut answer.ebx, &[10]);
            }
            if !controls.contains(ProcCtls2::USER_WAIT_PAUSE) {
                clear(&mut answer.ecx, &[5]);
            }
        }
        // Without the control there is no XSAVES.
        0xD if subleaf == 1 && !controls.contains(ProcCtls2::XSAVES) => {
            clear(&mut answer.eax, &[3]);
        }
        0x8000_0001 if !controls.contains(ProcCtls2::RDTSCP) => {
            clear(&mut answer.edx, &[27]);
        }
        0x8000_0008 => {
            let width = u32::from(host.machine.caps.physical_width);
            answer.eax = answer.eax & !0xFF | width;
        }
        _ => {}
    }
    answer
}

/// Takes the features that L1 is not offered out of the processor's answer.
fn hide(leaf: u32, subleaf: u32, answer: &mut Answer) {
    match leaf {
        1 => {
            // DTES64, CPL-qualified debug store, SMX, PDCM.
            clear(&mut answer.ecx, &[2, 4, 6, 15]);
            // DS.
            clear(&mut answer.edx, &[21]);
        }
        7 if subleaf == 0 => {
            // SGX, Intel PT.
            clear(&mut answer.ebx, &[2, 25]);
            // Protection keys (PKU, OSPKE), CET shadow stacks, key locker, enqueue stores, SGX
            // launch, supervisor keys.
            clear(&mut answer.ecx, &[3, 4, 7, 23, 29, 30, 31]);
            // User interrupts, PCONFIG, CET branch tracking.
            clear(&mut answer.edx, &[5, 18, 20]);
        }
        7 if subleaf == 1 => {
            // Linear-address space separation, FRED, LKGS, NMI-source reporting, linear-address
            // masking, MSR lists.
            clear(&mut answer.eax, &[6, 17, 18, 20, 26, 27]);
            // User MSRs, CET supervisor shadow stacks.
            clear(&mut answer.edx, &[15, 18]);
        }
        // State components of what is hidden.
        0xD if subleaf == 0 => {
            answer.eax &= !(HIDDEN_XCR0 as u32);
            answer.edx &= !((HIDDEN_XCR0 >> 32) as u32);
        }
        0xD if subleaf == 1 => {
            answer.ecx &= !(HIDDEN_XSTATE as u32);
            answer.edx &= !((HIDDEN_XSTATE >> 32) as u32);
        }
        0xD if subleaf < 32 && (HIDDEN_XSTATE | HIDDEN_XCR0) & 1 << subleaf != 0 => {
            *answer = Answer::default();
        }
        // Enumeration of SGX, Intel PT, key locker and PCONFIG.
        0x12 | 0x14 | 0x19 | 0x1B => *answer = Answer::default(),
        _ => {}
    }
}

/// L0's own leaves: signature and counters, as `docs/counters.md` describes.
pub(crate) fn own_leaf(vcpu: &Vcpu, leaf: u32, subleaf: u32) -> Answer {
    let pair = |(first, second): (u64, u64)| Answer {
        eax: first as u32,
        ebx: (first >> 32) as u32,
        ecx: second as u32,
        edx: (second >> 32) as u32,
    };
    match leaf {
        SIGNATURE => {
            let word = u32::from_le_bytes(*b"nvmx");
            Answer { eax: REASONS_LEAF, ebx: word, ecx: word, edx: word }
        }
        SIZES => Answer { eax: LAYOUT, ebx: TOTAL_PAIRS, ecx: REASONS as u32, edx: 0 },
        TOTALS => pair(total(vcpu, subleaf)),
        REASONS_LEAF => pair(vcpu.counters.exits(subleaf)),
        _ => Answer::default(),
    }
}

/// Number of sub-leaves with totals.
const TOTAL_PAIRS: u32 = 9;

fn total(vcpu: &Vcpu, subleaf: u32) -> (u64, u64) {
    let cpu = &vcpu.host.cpu;
    let engine = vcpu.engine.counters();
    let nested = vcpu.host.machine.nested.lock();
    let shadow = nested.shadow_counters();
    match subleaf {
        0 => vcpu.counters.all_exits(),
        1 => (cpu.vmreads(), cpu.vmwrites()),
        2 => (cpu.invepts(), cpu.invvpids()),
        3 => (cpu.vmptrlds(), vcpu.engine.vpid_flushes()),
        4 => (engine.entries, engine.reflected),
        // No switch is exitless yet.
        5 => (engine.switches, 0),
        6 => (shadow.fills, shadow.entries),
        7 => (shadow.roots_built, shadow.roots_dropped),
        8 => {
            let (tables, roots) = nested.shadow_usage();
            (tables as u64, roots as u64)
        }
        _ => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn all_after(leaf: u32, subleaf: u32) -> Answer {
        let ones = u32::MAX;
        let mut answer = Answer { eax: ones, ebx: ones, ecx: ones, edx: ones };
        hide(leaf, subleaf, &mut answer);
        answer
    }

    fn hidden(word: u32) -> Vec<u32> {
        (0..32).filter(|bit| word & 1 << bit == 0).collect()
    }

    #[test]
    fn features_that_are_not_offered_are_not_reported() {
        let leaf_1 = all_after(1, 0);
        assert_eq!(hidden(leaf_1.ecx), [2, 4, 6, 15]);
        assert_eq!(hidden(leaf_1.edx), [21]);
        let leaf_7 = all_after(7, 0);
        assert_eq!(hidden(leaf_7.ebx), [2, 25]);
        assert_eq!(hidden(leaf_7.ecx), [3, 4, 7, 23, 29, 30, 31]);
        assert_eq!(hidden(leaf_7.edx), [5, 18, 20]);
        let leaf_7_1 = all_after(7, 1);
        assert_eq!(hidden(leaf_7_1.eax), [6, 17, 18, 20, 26, 27]);
        assert_eq!(hidden(leaf_7_1.edx), [15, 18]);
        assert_eq!(all_after(7, 2).edx, u32::MAX);
    }

    #[test]
    fn hidden_state_components_have_no_place() {
        assert_eq!(hidden(all_after(0xD, 0).eax), [9]);
        assert_eq!(hidden(all_after(0xD, 1).ecx), [8, 10, 11, 12, 14]);
        for component in 2..63 {
            let known = all_after(0xD, component) != Answer::default();
            assert_eq!(known, ![8, 9, 10, 11, 12, 14].contains(&component), "{component}");
        }
        for leaf in [0x12, 0x14, 0x19, 0x1B] {
            assert_eq!(all_after(leaf, 0), Answer::default(), "leaf {leaf:#x}");
        }
    }
}
