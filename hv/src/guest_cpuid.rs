//! What does CPUID tell L1?
//!
//! The processor's own answer, without the features that are hidden, with L1's state in the bits
//! that mirror it (CPUID executed here shows L0's), and with L0's signature and counters in leaves
//! of their own.

use core::arch::x86_64::{__cpuid, __cpuid_count};

use vmx_defs::ProcCtls2;

use crate::counters::{LAYOUT, REASONS};
use crate::guest_msr::HIDDEN_XSTATE;
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
const CR4_PKE: u64 = 1 << 22;
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
    match leaf {
        1 => {
            // DTES64, SMX, PDCM.
            clear(&mut answer.ecx, &[2, 6, 15]);
            set(&mut answer.ecx, 27, mirrored.cr4 & CR4_OSXSAVE != 0);
            set(&mut answer.ecx, 31, true);
            // DS. The APIC flag follows IA32_APIC_BASE.
            clear(&mut answer.edx, &[21]);
            let apic = answer.edx & 1 << 9 != 0 && host.apic_base & APIC_ENABLE != 0;
            set(&mut answer.edx, 9, apic);
        }
        7 if subleaf == 0 => {
            // SGX, Intel PT.
            clear(&mut answer.ebx, &[2, 25]);
            if !mirrored.controls.contains(ProcCtls2::INVPCID) {
                clear(&mut answer.ebx, &[10]);
            }
            // OSPKE.
            set(&mut answer.ecx, 4, mirrored.cr4 & CR4_PKE != 0);
            // CET shadow stacks, key locker, enqueue stores, SGX launch, supervisor keys.
            clear(&mut answer.ecx, &[7, 23, 29, 30, 31]);
            if !mirrored.controls.contains(ProcCtls2::USER_WAIT_PAUSE) {
                clear(&mut answer.ecx, &[5]);
            }
            // User interrupts, PCONFIG, CET branch tracking.
            clear(&mut answer.edx, &[5, 18, 20]);
        }
        7 if subleaf == 1 => {
            // FRED, LKGS, NMI-source reporting, linear-address masking.
            clear(&mut answer.eax, &[17, 18, 20, 26]);
        }
        // XSAVES state components of what is hidden (PT, PASID, CET, user interrupts) are not
        // supported in XSS; without the control there is no XSAVES.
        0xD if subleaf == 1 => {
            if !mirrored.controls.contains(ProcCtls2::XSAVES) {
                clear(&mut answer.eax, &[3]);
            }
            answer.ecx &= !(HIDDEN_XSTATE as u32);
        }
        0xD if subleaf < 32 && HIDDEN_XSTATE & 1 << subleaf != 0 => answer = Answer::default(),
        // SGX and Intel PT enumeration.
        0x12 | 0x14 => answer = Answer::default(),
        0x8000_0001 if !mirrored.controls.contains(ProcCtls2::RDTSCP) => {
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
