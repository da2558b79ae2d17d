//! Answers: does L1 find the plain processor it would have without an L0?
//!
//! Each case is about something that an L0 has to stand in for: control-register bits that VMX
//! fixes, CPUID bits that mirror them, MSRs that govern VMX, XSETBV, the local APIC's base.

use core::{
    arch::{asm, x86_64::__cpuid},
    hint::black_box,
};

use vmx_defs::msr::{self, VmxBasic};
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};

use crate::{
    ensure, ensure_eq,
    machine::{change_cr0, change_cr4},
    skip,
    suite::{Case, Ctx, Verdict},
    traps::{Fault, catch},
    vmx::{self, Vmx, rdmsr, wrmsr},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "environment.cr4.vmxe", run: vmxe },
    Case { name: "environment.cr4.bits", run: cr4_bits },
    Case { name: "environment.cr4.reserved", run: cr4_reserved },
    Case { name: "environment.cr0.bits", run: cr0_bits },
    Case { name: "environment.cr0.invalid", run: cr0_invalid },
    Case { name: "environment.cr0.in_vmx", run: cr0_in_vmx },
    Case { name: "environment.cpuid.osxsave", run: osxsave },
    Case { name: "environment.cpuid.vmx", run: cpuid_vmx },
    Case { name: "environment.xsetbv", run: xsetbv },
    Case { name: "environment.msr.vmx_capabilities", run: capabilities },
    Case { name: "environment.msr.feature_control", run: feature_control },
    Case { name: "environment.msr.efer", run: efer },
    Case { name: "environment.msr.pat", run: pat },
    Case { name: "environment.msr.apic_base", run: apic_base },
    Case { name: "environment.msr.mtrr", run: mtrr },
    Case { name: "environment.msr.not_canonical", run: not_canonical },
    Case { name: "environment.debug_registers", run: debug_registers },
    Case { name: "environment.single_step.cpuid", run: single_step },
    Case { name: "environment.vectors", run: vectors },
    Case { name: "environment.cr2", run: cr2 },
    Case { name: "environment.xmm", run: xmm },
];

fn gp(result: Result<(), Fault>) -> Option<(u64, u64)> {
    result.err().map(|fault| (fault.vector, fault.error_code))
}

const GP: Option<(u64, u64)> = Some((13, 0));

/// WRMSR; a fault is the error.
fn write_msr(index: u32, value: u64) -> Result<(), Fault> {
    // SAFETY: the cases write values that this program can run with, or that are refused.
    catch(|| unsafe { wrmsr(index, value) })
}

fn vmxe(_: &mut Ctx<'_>) -> Verdict {
    if !vmx::supported() {
        skip!("no VMX");
    }
    for _ in 0..2 {
        change_cr4(Cr4Flags::empty(), Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS);
        let clear = Cr4::read_raw();
        change_cr4(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS, Cr4Flags::empty());
        let set = Cr4::read_raw();
        ensure_eq!(set ^ clear, 1 << 13, "CR4 with VMXE and without, but for that bit");
        ensure_eq!(clear >> 13 & 1, 0, "VMXE");
    }
    Ok(())
}

/// Bits that no code of this program depends on go on and off, alone.
fn cr4_bits(_: &mut Ctx<'_>) -> Verdict {
    let before = Cr4::read_raw();
    for flag in [
        Cr4Flags::TIMESTAMP_DISABLE,
        Cr4Flags::DEBUGGING_EXTENSIONS,
        Cr4Flags::PAGE_GLOBAL,
        Cr4Flags::PERFORMANCE_MONITOR_COUNTER,
    ] {
        change_cr4(flag, Cr4Flags::empty());
        ensure_eq!(Cr4::read_raw(), before | flag.bits(), "CR4 with {flag:?}");
        change_cr4(Cr4Flags::empty(), flag);
        ensure_eq!(Cr4::read_raw(), before & !flag.bits(), "CR4 without {flag:?}");
    }
    Ok(())
}

fn cr4_reserved(_: &mut Ctx<'_>) -> Verdict {
    let before = Cr4::read_raw();
    for bit in [15, 26, 31, 32, 63] {
        // SAFETY: a reserved bit: the write faults.
        let result = catch(|| unsafe { Cr4::write_raw(before | 1 << bit) });
        ensure_eq!(gp(result), GP, "fault of setting bit {bit} of CR4");
        ensure_eq!(Cr4::read_raw(), before, "CR4 after it");
    }
    // PAE can't be cleared in IA-32e mode.
    // SAFETY: the write faults.
    let result = catch(|| unsafe { Cr4::write_raw(before & !(1 << 5)) });
    ensure_eq!(gp(result), GP, "fault of clearing CR4.PAE");
    Ok(())
}

fn cr0_bits(_: &mut Ctx<'_>) -> Verdict {
    let before = Cr0::read_raw();
    for flag in [
        Cr0Flags::MONITOR_COPROCESSOR,
        Cr0Flags::NUMERIC_ERROR,
        Cr0Flags::WRITE_PROTECT,
        Cr0Flags::ALIGNMENT_MASK,
    ] {
        change_cr0(flag, Cr0Flags::empty());
        ensure_eq!(Cr0::read_raw(), before | flag.bits(), "CR0 with {flag:?}");
        change_cr0(Cr0Flags::empty(), flag);
        ensure_eq!(Cr0::read_raw(), before & !flag.bits(), "CR0 without {flag:?}");
        change_cr0(Cr0Flags::from_bits_truncate(before & flag.bits()), Cr0Flags::empty());
    }
    Ok(())
}

fn cr0_invalid(_: &mut Ctx<'_>) -> Verdict {
    const PE: u64 = 1;
    const NW: u64 = 1 << 29;
    const CD: u64 = 1 << 30;
    let before = Cr0::read_raw();
    for (value, what) in [
        (before & !PE, "PG without PE"),
        (before & !CD | NW, "NW without CD"),
        (before | 1 << 32, "bit 32"),
    ] {
        // SAFETY: an invalid value: the write faults.
        let result = catch(|| unsafe { Cr0::write_raw(value) });
        ensure_eq!(gp(result), GP, "fault of CR0 with {what}");
        ensure_eq!(Cr0::read_raw(), before, "CR0 after it");
    }
    Ok(())
}

/// In VMX operation the fixed bits can't be changed, and others can.
fn cr0_in_vmx(ctx: &mut Ctx<'_>) -> Verdict {
    Vmx::on(ctx)?;
    let before = Cr0::read_raw();
    change_cr0(Cr0Flags::ALIGNMENT_MASK, Cr0Flags::empty());
    ensure_eq!(Cr0::read_raw(), before | 1 << 18, "CR0 with AM");
    for bit in [0, 5, 31] {
        // SAFETY: the write faults.
        let result = catch(|| unsafe { Cr0::write_raw(before & !(1 << bit)) });
        ensure_eq!(gp(result), GP, "fault of clearing bit {bit} of CR0");
    }
    Ok(())
}

fn osxsave(_: &mut Ctx<'_>) -> Verdict {
    const XSAVE: u32 = 1 << 26;
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & XSAVE == 0 {
        skip!("no XSAVE");
    }
    for _ in 0..2 {
        change_cr4(Cr4Flags::OSXSAVE, Cr4Flags::empty());
        ensure_eq!(__cpuid(1).ecx & OSXSAVE, OSXSAVE, "CPUID.OSXSAVE with CR4.OSXSAVE");
        change_cr4(Cr4Flags::empty(), Cr4Flags::OSXSAVE);
        ensure_eq!(__cpuid(1).ecx & OSXSAVE, 0, "CPUID.OSXSAVE without CR4.OSXSAVE");
    }
    Ok(())
}

/// The same in VMX operation and outside, and with each setting of CR4.VMXE.
fn cpuid_vmx(ctx: &mut Ctx<'_>) -> Verdict {
    const VMX: u32 = 1 << 5;
    if !vmx::supported() {
        skip!("no VMX");
    }
    change_cr4(Cr4Flags::empty(), Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS);
    let before = __cpuid(1).ecx;
    Vmx::on(ctx)?;
    let inside = __cpuid(1).ecx;
    ensure_eq!(inside & VMX, VMX, "CPUID.VMX");
    ensure_eq!(inside, before, "leaf 1, ECX");
    Ok(())
}

fn set_xcr0(index: u32, value: u64) -> Result<(), Fault> {
    // SAFETY: the cases set x87 and SSE state, or values that are refused.
    catch(|| unsafe {
        asm!(
            "xsetbv",
            in("ecx") index,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            options(nostack),
        );
    })
}

fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register; CR4.OSXSAVE is set by the callers.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

fn xsetbv(_: &mut Ctx<'_>) -> Verdict {
    if __cpuid(1).ecx & 1 << 26 == 0 {
        skip!("no XSAVE");
    }
    change_cr4(Cr4Flags::empty(), Cr4Flags::OSXSAVE);
    let without = set_xcr0(0, 1).err().map(|fault| fault.vector);
    ensure_eq!(without, Some(6), "fault of XSETBV without CR4.OSXSAVE");
    change_cr4(Cr4Flags::OSXSAVE, Cr4Flags::empty());
    let before = xcr0();
    for value in [3, 1] {
        ensure_eq!(set_xcr0(0, value), Ok(()), "XSETBV of {value}");
        ensure_eq!(xcr0(), value, "XCR0");
    }
    for (index, value, what) in [
        (0, 2, "SSE state without x87 state"),
        (0, 0, "nothing"),
        (0, 5, "AVX state without SSE state"),
        (0, 1 | 1 << 62, "bit 62"),
        (0, 3 | 1 << 63, "bit 63"),
        (1, 1, "XCR1"),
        (0x8000_0000, 1, "XCR 80000000H"),
    ] {
        ensure_eq!(gp(set_xcr0(index, value)), GP, "fault of XSETBV of {what}");
        ensure_eq!(xcr0(), 1, "XCR0 after XSETBV of {what}");
    }
    ensure_eq!(set_xcr0(0, before), Ok(()), "XSETBV of what was there");
    Ok(())
}

fn capabilities(_: &mut Ctx<'_>) -> Verdict {
    if !vmx::supported() {
        skip!("no VMX");
    }
    let basic = VmxBasic::from(rdmsr(msr::VMX_BASIC));
    let last = if basic.true_controls() { msr::VMX_TRUE_ENTRY_CTLS } else { msr::VMX_VMCS_ENUM };
    for index in msr::VMX_BASIC..=last {
        let value = rdmsr(index);
        ensure_eq!(gp(write_msr(index, value)), GP, "fault of a write to MSR {index:#x}");
        ensure_eq!(rdmsr(index), value, "MSR {index:#x} after it");
    }
    Ok(())
}

fn feature_control(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    let value = rdmsr(msr::FEATURE_CONTROL);
    ensure_eq!(value & 5, 5, "locked, and VMXON allowed outside SMX operation");
    for bits in [0, 1, value, value ^ 4, value ^ 2] {
        ensure_eq!(gp(write_msr(msr::FEATURE_CONTROL, bits)), GP, "fault of writing {bits:#x}");
    }
    ensure_eq!(rdmsr(msr::FEATURE_CONTROL), value, "IA32_FEATURE_CONTROL");
    Ok(())
}

fn efer(_: &mut Ctx<'_>) -> Verdict {
    const SCE: u64 = 1;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    let value = rdmsr(msr::EFER);
    ensure_eq!(value & (LME | LMA), LME | LMA, "LME and LMA");
    for bits in [value ^ SCE, value] {
        ensure_eq!(write_msr(msr::EFER, bits), Ok(()), "write of {bits:#x}");
        ensure_eq!(rdmsr(msr::EFER), bits, "IA32_EFER");
    }
    // LME can't change while paging is on; reserved bits can't be set.
    for bits in [value & !LME, value | 1 << 1, value | 1 << 63] {
        ensure_eq!(gp(write_msr(msr::EFER, bits)), GP, "fault of writing {bits:#x}");
        ensure_eq!(rdmsr(msr::EFER), value, "IA32_EFER");
    }
    Ok(())
}

fn pat(_: &mut Ctx<'_>) -> Verdict {
    let value = rdmsr(msr::PAT);
    for bits in [value & !(0xFF << 56) | 1 << 56, value] {
        ensure_eq!(write_msr(msr::PAT, bits), Ok(()), "write of {bits:#x}");
        ensure_eq!(rdmsr(msr::PAT), bits, "IA32_PAT");
    }
    for kind in [2_u64, 3, 8, 0xFF] {
        let bits = value & !(0xFF << 56) | kind << 56;
        ensure_eq!(gp(write_msr(msr::PAT, bits)), GP, "fault of memory type {kind}");
    }
    ensure_eq!(rdmsr(msr::PAT), value, "IA32_PAT after them");
    Ok(())
}

/// Reserved bits are refused, and the transition that the architecture forbids.
fn apic_base(_: &mut Ctx<'_>) -> Verdict {
    const X2APIC: u64 = 1 << 10;
    const ENABLED: u64 = 1 << 11;
    let value = rdmsr(msr::APIC_BASE);
    ensure_eq!(value & ENABLED, ENABLED, "the local APIC is enabled");
    ensure_eq!(write_msr(msr::APIC_BASE, value), Ok(()), "write of what is there");
    for bits in [value | 1, value | 1 << 9, value | 1 << 63, value & !ENABLED | X2APIC] {
        ensure_eq!(gp(write_msr(msr::APIC_BASE, bits)), GP, "fault of writing {bits:#x}");
    }
    ensure_eq!(rdmsr(msr::APIC_BASE), value, "IA32_APIC_BASE");
    Ok(())
}

/// A memory type of its own for a page, in a variable range, on and off: memory stays what it is.
fn mtrr(ctx: &mut Ctx<'_>) -> Verdict {
    const CAPABILITIES: u32 = 0xFE;
    const FIRST: u32 = 0x200;
    const VALID: u64 = 1 << 11;
    const WRITE_THROUGH: u64 = 4;
    if __cpuid(1).edx & 1 << 12 == 0 {
        skip!("no MTRRs");
    }
    let count = rdmsr(CAPABILITIES) as u32 & 0xFF;
    let Some(mask) = (0..count).map(|n| FIRST + 2 * n + 1).find(|mask| rdmsr(*mask) & VALID == 0)
    else {
        skip!("no free variable range");
    };
    let (base, page) = (mask - 1, ctx.arena.page());
    let before = (rdmsr(base), rdmsr(mask));
    let all = (1_u64 << (__cpuid(0x8000_0008).eax & 0xFF)) - 1;
    let range = (page.address() | WRITE_THROUGH, all & !0xFFF | VALID);
    for round in 0..4 {
        page.write(0, round);
        ensure_eq!(write_msr(base, range.0), Ok(()), "write of the base");
        ensure_eq!(write_msr(mask, range.1), Ok(()), "write of the mask");
        ensure_eq!((rdmsr(base), rdmsr(mask)), range, "the variable range");
        ensure_eq!(page.read(0), round, "the page with a type of its own");
        page.write(1, round);
        ensure_eq!(write_msr(mask, before.1), Ok(()), "write of the old mask");
        ensure_eq!(write_msr(base, before.0), Ok(()), "write of the old base");
        ensure_eq!((page.read(0), page.read(1)), (round, round), "the page after it");
    }
    ensure_eq!(gp(write_msr(base, page.address() | 2)), GP, "fault of a reserved type");
    ensure_eq!(gp(write_msr(mask, 1 << 10)), GP, "fault of a reserved bit of the mask");
    ensure_eq!(gp(write_msr(CAPABILITIES, 0)), GP, "fault of a write to IA32_MTRRCAP");
    ensure_eq!((rdmsr(base), rdmsr(mask)), before, "the variable range at the end");
    Ok(())
}

fn not_canonical(_: &mut Ctx<'_>) -> Verdict {
    for index in
        [msr::SYSENTER_ESP, msr::SYSENTER_EIP, msr::FS_BASE, msr::GS_BASE, 0xC000_0082, 0xC000_0102]
    {
        let before = rdmsr(index);
        let result = write_msr(index, 0x1234_0000_0000_0000);
        ensure_eq!(gp(result), GP, "fault of a write to MSR {index:#x}");
        ensure_eq!(rdmsr(index), before, "MSR {index:#x}");
    }
    Ok(())
}

/// They keep what is written across instructions that exit.
fn debug_registers(_: &mut Ctx<'_>) -> Verdict {
    let (d0, d1, d2, d3, d6, d7): (u64, u64, u64, u64, u64, u64);
    // SAFETY: addresses of breakpoints that DR7 does not enable.
    unsafe {
        asm!(
            "mov dr0, {value}",
            "inc {value}",
            "mov dr1, {value}",
            "inc {value}",
            "mov dr2, {value}",
            "inc {value}",
            "mov dr3, {value}",
            "mov {value}, 0x30400",
            "mov dr7, {value}",
            value = inout(reg) 0x1000_u64 => _,
        );
    }
    black_box(__cpuid(0));
    // SAFETY: reads registers, and puts DR7 back.
    unsafe {
        asm!(
            "mov {d0}, dr0", "mov {d1}, dr1", "mov {d2}, dr2", "mov {d3}, dr3",
            "mov {d6}, dr6", "mov {d7}, dr7", "mov dr7, {plain}",
            d0 = out(reg) d0, d1 = out(reg) d1, d2 = out(reg) d2, d3 = out(reg) d3,
            d6 = out(reg) d6, d7 = out(reg) d7, plain = in(reg) 0x400_u64,
        );
    }
    ensure_eq!([d0, d1, d2, d3], [0x1000, 0x1001, 0x1002, 0x1003], "DR0 to DR3");
    ensure_eq!(d6 & 0xFFFF_0FF0, 0xFFFF_0FF0, "the bits of DR6 that are 1");
    ensure_eq!(d7, 0x3_0400, "DR7");
    Ok(())
}

/// With RFLAGS.TF, an instruction that an L0 emulates traps as any other.
fn single_step(_: &mut Ctx<'_>) -> Verdict {
    // SAFETY: the trap after CPUID is caught.
    let fault = catch(|| unsafe {
        asm!(
            "mov r8, rbx",
            "pushfq",
            "or dword ptr [rsp], 0x100",
            "popfq",
            "cpuid",
            "mov rbx, r8",
            "nop",
            out("r8") _,
            inout("eax") 0 => _,
            out("ecx") _,
            out("edx") _,
        );
    })
    .err();
    let Some(fault) = fault else { crate::fail!("no trap") };
    ensure_eq!(fault.vector, 1, "vector");
    // SAFETY: the bytes before the trap's address are this function's code.
    let before = unsafe { core::slice::from_raw_parts((fault.rip - 2) as *const u8, 2) };
    ensure_eq!([before[0], before[1]], [0x0F, 0xA2], "the instruction before the trap: CPUID");
    let dr6: u64;
    // SAFETY: reads DR6 and clears its BS.
    unsafe {
        asm!(
            "mov {dr6}, dr6",
            "mov dr6, {plain}",
            dr6 = out(reg) dr6,
            plain = in(reg) 0xFFFF_0FF0_u64,
        );
    }
    ensure_eq!(dr6 >> 14 & 1, 1, "BS in DR6");
    Ok(())
}

/// Exceptions of L1 come to its handlers as they are.
fn vectors(_: &mut Ctx<'_>) -> Verdict {
    type Raise = fn();
    let kinds: [(Raise, u64, u64); 4] = [
        // SAFETY: each raises an exception, which is caught.
        (|| unsafe { asm!("ud2") }, 6, 0),
        // SAFETY: as above.
        (|| unsafe { asm!("int3") }, 3, 0),
        // SAFETY: as above; the selector is beyond the GDT.
        (|| unsafe { asm!("mov ds, {0:e}", in(reg) 0x1230) }, 13, 0x1230),
        // SAFETY: as above.
        (|| unsafe { asm!("div {0:e}", in(reg) 0, out("eax") _, out("edx") _) }, 0, 0),
    ];
    for (raise, vector, error) in kinds {
        let fault = catch(raise).err();
        let found = fault.map(|fault| (fault.vector, fault.error_code));
        ensure_eq!(found, Some((vector, error)), "vector and error code");
    }
    Ok(())
}

/// CR2 stays what L1 wrote across instructions that exit.
fn cr2(_: &mut Ctx<'_>) -> Verdict {
    for value in [0x1234_5678_9ABC, !0, 0] {
        let read: u64;
        // SAFETY: CR2 only records the address of page faults.
        unsafe {
            asm!(
                "mov r8, rbx",
                "mov cr2, {value}",
                "cpuid",
                "mov {read}, cr2",
                "mov rbx, r8",
                value = in(reg) value,
                read = out(reg) read,
                out("r8") _,
                inout("eax") 0 => _,
                out("ecx") _,
                out("edx") _,
            );
        }
        ensure_eq!(read, value, "CR2 after CPUID");
    }
    Ok(())
}

/// The SSE registers are L1's, whatever an L0 does meanwhile.
fn xmm(ctx: &mut Ctx<'_>) -> Verdict {
    let page = ctx.arena.page();
    for word in 0..32 {
        page.write(word, 0x0101_0101_0101_0101 * word as u64 + 7);
    }
    // SAFETY: loads and stores of a page of this case.
    unsafe {
        asm!(
            "mov r8, rbx",
            "movups xmm0, [rdi]", "movups xmm1, [rdi + 16]", "movups xmm2, [rdi + 32]",
            "movups xmm3, [rdi + 48]", "movups xmm4, [rdi + 64]", "movups xmm5, [rdi + 80]",
            "movups xmm6, [rdi + 96]", "movups xmm7, [rdi + 112]", "movups xmm8, [rdi + 128]",
            "movups xmm9, [rdi + 144]", "movups xmm10, [rdi + 160]", "movups xmm11, [rdi + 176]",
            "movups xmm12, [rdi + 192]", "movups xmm13, [rdi + 208]", "movups xmm14, [rdi + 224]",
            "movups xmm15, [rdi + 240]",
            "cpuid",
            "add rdi, 256",
            "movups [rdi], xmm0", "movups [rdi + 16], xmm1", "movups [rdi + 32], xmm2",
            "movups [rdi + 48], xmm3", "movups [rdi + 64], xmm4", "movups [rdi + 80], xmm5",
            "movups [rdi + 96], xmm6", "movups [rdi + 112], xmm7", "movups [rdi + 128], xmm8",
            "movups [rdi + 144], xmm9", "movups [rdi + 160], xmm10", "movups [rdi + 176], xmm11",
            "movups [rdi + 192], xmm12", "movups [rdi + 208], xmm13", "movups [rdi + 224], xmm14",
            "movups [rdi + 240], xmm15",
            "mov rbx, r8",
            inout("rdi") page.address() => _,
            inout("eax") 0 => _, out("ecx") _, out("edx") _, out("r8") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
            out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
            out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _,
            out("xmm15") _,
        );
    }
    for word in 0..32 {
        ensure!(page.read(word) == page.read(word + 32), "half {word} of the XMM registers");
    }
    Ok(())
}
