//! Answers: what do the controls and areas that switch MSRs and debug registers between L1 and L2
//! do?
//!
//! SDM Vol. 3C, "Loading Guest Control Registers, Debug Registers, and MSRs", "Loading MSRs" (at VM
//! entry and at VM exit), "Saving MSRs", "Saving Control Registers, Debug Registers, and MSRs",
//! "VM-Entry Controls" and "VM-Exit Controls".

use core::arch::asm;

use vmx_defs::{EntryCtls, ExitCtls, Field, ProcCtls, msr};

use super::{Control, Stage};
use crate::{
    ensure_eq, l2_code,
    memory::Page,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Outcome, rdmsr, vmcs, wrmsr},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.efer", run: efer },
    Case { name: "behaviour.pat.load_at_entry", run: pat_entry },
    Case { name: "behaviour.pat.save_and_load_at_exit", run: pat_exit },
    Case { name: "behaviour.dr7.load", run: dr7_load },
    Case { name: "behaviour.dr7.save", run: dr7_save },
    Case { name: "behaviour.debugctl", run: debugctl },
    Case { name: "behaviour.sysenter", run: sysenter },
    Case { name: "behaviour.segment_bases", run: bases },
    Case { name: "behaviour.msr_area.entry_load", run: entry_load },
    Case { name: "behaviour.msr_area.exit_store", run: exit_store },
    Case { name: "behaviour.msr_area.exit_load", run: exit_load },
    Case { name: "behaviour.msr_area.exit_store_and_load", run: exit_store_load },
    Case { name: "behaviour.msr_area.entry_load.in_order", run: entry_order },
    Case {
        name: "behaviour.msr_area.entry_load.fs_base",
        run: |ctx| entry_load_fails(ctx, &[(msr::FS_BASE.into(), 0)], 1),
    },
    Case {
        name: "behaviour.msr_area.entry_load.gs_base",
        run: |ctx| entry_load_fails(ctx, &[(LSTAR, 0x1000), (msr::GS_BASE.into(), 0)], 2),
    },
    Case {
        name: "behaviour.msr_area.entry_load.x2apic",
        run: |ctx| entry_load_fails(ctx, &[(0x808, 0)], 1),
    },
    Case {
        name: "behaviour.msr_area.entry_load.reserved",
        run: |ctx| entry_load_fails(ctx, &[(LSTAR, 0), (LSTAR, 0), (LSTAR | 1 << 32, 0)], 3),
    },
    Case {
        name: "behaviour.msr_area.entry_load.value",
        run: |ctx| entry_load_fails(ctx, &[(LSTAR, 1 << 63), (LSTAR, 0)], 1),
    },
    Case {
        name: "behaviour.msr_area.entry_load.smm_monitor",
        run: |ctx| entry_load_fails(ctx, &[(0x9B, 0)], 1),
    },
    Case { name: "behaviour.msr_area.addresses", run: area_addresses },
];

l2_code! {
    nothing: "";
    read_msr: "rdmsr", "shl rdx, 32", "or rax, rdx";
    write_msr: "mov rdx, rax", "shr rdx, 32", "wrmsr";
    read_dr7: "mov rax, dr7";
    write_dr7: "mov dr7, rax";
    set_bases: "wrfsbase rax", "wrgsbase rcx";
}

const STAR: u64 = 0xC000_0081;
const LSTAR: u64 = 0xC000_0082;
const KERNEL_GS_BASE: u64 = 0xC000_0102;

/// L2 with MSR bitmaps that let every MSR through.
fn open(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::MSR_BITMAPS))?;
    vmcs::write(Field::MSR_BITMAP, ctx.arena.page().address());
    Ok(stage)
}

/// L2 reads an MSR.
fn read(stage: &mut Stage, index: u64) -> Result<u64, Stop> {
    stage.vm.registers.rcx = index;
    stage.passes(read_msr())?;
    Ok(stage.vm.registers.rax)
}

/// L2 writes an MSR.
fn write(stage: &mut Stage, index: u64, value: u64) -> Verdict {
    stage.vm.registers.rcx = index;
    stage.vm.registers.rax = value;
    stage.passes(write_msr())
}

fn set(index: u64, value: u64) {
    // SAFETY: the MSRs of this file are for SYSCALL, SWAPGS and upper page attributes, none of
    // which this program uses.
    unsafe { wrmsr(index as u32, value) };
}

fn get(index: u64) -> u64 {
    rdmsr(index as u32)
}

fn efer(ctx: &mut Ctx<'_>) -> Verdict {
    const SCE: u64 = 1;
    let mut stage = open(ctx)?;
    let own = rdmsr(msr::EFER);
    stage.set(Control::Entry(EntryCtls::LOAD_EFER))?;
    stage.set(Control::Exit(ExitCtls::SAVE_EFER | ExitCtls::LOAD_EFER))?;
    let efer = u64::from(msr::EFER);
    // Loaded at entry.
    vmcs::write(Field::GUEST_EFER, own ^ SCE);
    ensure_eq!(read(&mut stage, efer)?, own ^ SCE, "EFER as L2 reads it");
    ensure_eq!(rdmsr(msr::EFER), own, "EFER of L1 after the exit");
    // Saved at exit.
    write(&mut stage, efer, own & !SCE)?;
    ensure_eq!(vmcs::read(Field::GUEST_EFER), own & !SCE, "guest EFER, saved");
    write(&mut stage, efer, own | SCE)?;
    ensure_eq!(vmcs::read(Field::GUEST_EFER), own | SCE, "guest EFER, saved");
    // Not saved.
    stage.clear(Control::Exit(ExitCtls::SAVE_EFER))?;
    vmcs::write(Field::GUEST_EFER, own & !SCE);
    write(&mut stage, efer, own | SCE)?;
    ensure_eq!(vmcs::read(Field::GUEST_EFER), own & !SCE, "guest EFER, not saved");
    // Loaded from the host field, or not at all.
    vmcs::write(Field::HOST_EFER, own ^ SCE);
    stage.passes(nothing())?;
    ensure_eq!(rdmsr(msr::EFER), own ^ SCE, "EFER of L1 from the host field");
    stage.clear(Control::Exit(ExitCtls::LOAD_EFER))?;
    for value in [own | SCE, own & !SCE] {
        write(&mut stage, efer, value)?;
        ensure_eq!(rdmsr(msr::EFER), value, "EFER of L1, not loaded");
    }
    Ok(())
}

/// Two values that differ from each other in the entries that this program does not use.
const PAT_A: u64 = 0x0001_0406_0007_0406;
const PAT_B: u64 = 0x0606_0406_0007_0406;

fn pat_entry(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    let pat = u64::from(msr::PAT);
    let own = get(pat);
    stage.clear(Control::Exit(ExitCtls::LOAD_PAT | ExitCtls::SAVE_PAT))?;
    stage.clear(Control::Entry(EntryCtls::LOAD_PAT))?;
    vmcs::write(Field::GUEST_PAT, PAT_A);
    ensure_eq!(read(&mut stage, pat)?, own, "PAT in L2, not loaded");
    stage.set(Control::Entry(EntryCtls::LOAD_PAT))?;
    ensure_eq!(read(&mut stage, pat)?, PAT_A, "PAT in L2, loaded");
    // What L2 has stays where the exit does not load it.
    ensure_eq!(get(pat), PAT_A, "PAT in L1 after the exit");
    set(pat, own);
    Ok(())
}

fn pat_exit(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    let pat = u64::from(msr::PAT);
    let own = get(pat);
    stage.set(Control::Exit(ExitCtls::LOAD_PAT | ExitCtls::SAVE_PAT))?;
    vmcs::write(Field::HOST_PAT, own);
    vmcs::write(Field::GUEST_PAT, PAT_A);
    write(&mut stage, pat, PAT_B)?;
    ensure_eq!(vmcs::read(Field::GUEST_PAT), PAT_B, "guest PAT, saved");
    ensure_eq!(get(pat), own, "PAT in L1, loaded");
    stage.clear(Control::Exit(ExitCtls::SAVE_PAT))?;
    write(&mut stage, pat, PAT_A)?;
    ensure_eq!(vmcs::read(Field::GUEST_PAT), PAT_B, "guest PAT, not saved");
    vmcs::write(Field::HOST_PAT, PAT_B);
    stage.passes(nothing())?;
    ensure_eq!(get(pat), PAT_B, "PAT in L1 from the host field");
    set(pat, own);
    Ok(())
}

fn set_dr7(value: u64) {
    // SAFETY: the values enable no breakpoint.
    unsafe { asm!("mov dr7, {}", in(reg) value, options(nostack)) };
}

fn dr7_load(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Entry(EntryCtls::LOAD_DEBUG_CONTROLS);
    stage.set(control)?;
    // Conditions of breakpoints that are not enabled.
    vmcs::write(Field::GUEST_DR7, 0x0003_0400);
    stage.passes(read_dr7())?;
    ensure_eq!(stage.vm.registers.rax, 0x0003_0400, "DR7 in L2, loaded");
    stage.clear(control)?;
    set_dr7(0x000C_0400);
    stage.passes(read_dr7())?;
    ensure_eq!(stage.vm.registers.rax, 0x000C_0400, "DR7 in L2, not loaded");
    Ok(())
}

fn dr7_save(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Entry(EntryCtls::LOAD_DEBUG_CONTROLS))?;
    let control = Control::Exit(ExitCtls::SAVE_DEBUG_CONTROLS);
    stage.set(control)?;
    stage.vm.registers.rax = 0x0003_0400;
    stage.passes(write_dr7())?;
    ensure_eq!(vmcs::read(Field::GUEST_DR7), 0x0003_0400, "guest DR7, saved");
    stage.clear(control)?;
    stage.vm.registers.rax = 0x000C_0400;
    stage.passes(write_dr7())?;
    ensure_eq!(vmcs::read(Field::GUEST_DR7), 0x0003_0400, "guest DR7, not saved");
    Ok(())
}

/// IA32_DEBUGCTL is 0 after every exit; L2's value is loaded and saved with DR7.
fn debugctl(ctx: &mut Ctx<'_>) -> Verdict {
    const BTF: u64 = 1 << 1;
    let mut stage = open(ctx)?;
    let debugctl = u64::from(msr::DEBUGCTL);
    stage.set(Control::Entry(EntryCtls::LOAD_DEBUG_CONTROLS))?;
    stage.set(Control::Exit(ExitCtls::SAVE_DEBUG_CONTROLS))?;
    vmcs::write(Field::GUEST_DEBUGCTL, BTF);
    ensure_eq!(read(&mut stage, debugctl)?, BTF, "IA32_DEBUGCTL in L2");
    ensure_eq!(get(debugctl), 0, "IA32_DEBUGCTL in L1 after the exit");
    ensure_eq!(vmcs::read(Field::GUEST_DEBUGCTL), BTF, "guest IA32_DEBUGCTL");
    write(&mut stage, debugctl, 0)?;
    ensure_eq!(vmcs::read(Field::GUEST_DEBUGCTL), 0, "guest IA32_DEBUGCTL, saved");
    Ok(())
}

fn sysenter(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    for (index, guest, host) in [
        (msr::SYSENTER_CS, Field::GUEST_SYSENTER_CS, Field::HOST_SYSENTER_CS),
        (msr::SYSENTER_ESP, Field::GUEST_SYSENTER_ESP, Field::HOST_SYSENTER_ESP),
        (msr::SYSENTER_EIP, Field::GUEST_SYSENTER_EIP, Field::HOST_SYSENTER_EIP),
    ] {
        vmcs::write(guest, 0x18);
        vmcs::write(host, 0x28);
        ensure_eq!(read(&mut stage, index.into())?, 0x18, "MSR {index:#x} in L2");
        ensure_eq!(rdmsr(index), 0x28, "MSR {index:#x} in L1");
        write(&mut stage, index.into(), 0x38)?;
        ensure_eq!(vmcs::read(guest), 0x38, "{guest:?}");
        ensure_eq!(rdmsr(index), 0x28, "MSR {index:#x} in L1");
    }
    Ok(())
}

fn bases(ctx: &mut Ctx<'_>) -> Verdict {
    const FSGSBASE: u64 = 1 << 16;
    let mut stage = open(ctx)?;
    vmcs::write(Field::GUEST_FS_BASE, 0x1111_0000);
    vmcs::write(Field::GUEST_GS_BASE, 0xFFFF_8000_2222_0000);
    ensure_eq!(read(&mut stage, msr::FS_BASE.into())?, 0x1111_0000, "FS base in L2");
    ensure_eq!(read(&mut stage, msr::GS_BASE.into())?, 0xFFFF_8000_2222_0000, "GS base in L2");
    write(&mut stage, msr::FS_BASE.into(), 0x3333_0000)?;
    ensure_eq!(vmcs::read(Field::GUEST_FS_BASE), 0x3333_0000, "guest FS base");
    if core::arch::x86_64::__cpuid_count(7, 0).ebx & 1 != 0 {
        vmcs::change(Field::GUEST_CR4, FSGSBASE, 0);
        stage.vm.registers.rax = 0x4444_0000;
        stage.vm.registers.rcx = 0x5555_0000;
        stage.passes(set_bases())?;
        ensure_eq!(vmcs::read(Field::GUEST_FS_BASE), 0x4444_0000, "FS base by WRFSBASE");
        ensure_eq!(vmcs::read(Field::GUEST_GS_BASE), 0x5555_0000, "GS base by WRGSBASE");
    }
    Ok(())
}

/// An MSR area of these entries.
fn area(ctx: &mut Ctx<'_>, entries: &[(u64, u64)]) -> Page {
    let page = ctx.arena.page();
    for (number, &(index, value)) in entries.iter().enumerate() {
        page.write(number * 2, index);
        page.write(number * 2 + 1, value);
    }
    page
}

fn entry_load(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    for index in [STAR, LSTAR, KERNEL_GS_BASE] {
        set(index, 0x1000);
    }
    let page = area(ctx, &[(STAR, 0x2000), (KERNEL_GS_BASE, 0xFFFF_FFFF_8000_0000)]);
    vmcs::write(Field::ENTRY_MSR_LOAD_ADDR, page.address());
    for (count, star, kernel) in
        [(0, 0x1000, 0x1000), (1, 0x2000, 0x1000), (2, 0x2000, 0xFFFF_FFFF_8000_0000)]
    {
        set(STAR, 0x1000);
        vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, count);
        ensure_eq!(read(&mut stage, STAR)?, star, "IA32_STAR in L2, {count} entries");
        ensure_eq!(read(&mut stage, KERNEL_GS_BASE)?, kernel, "kernel GS base, {count} entries");
        ensure_eq!(read(&mut stage, LSTAR)?, 0x1000, "IA32_LSTAR in L2");
    }
    // The area is read at each entry.
    page.write(1, 0x3000);
    ensure_eq!(read(&mut stage, STAR)?, 0x3000, "IA32_STAR in L2, another value");
    ensure_eq!(get(STAR), 0x3000, "IA32_STAR in L1, which no exit loads");
    Ok(())
}

fn entry_order(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    let page = area(ctx, &[(LSTAR, 0x2000), (STAR, 0x7000), (LSTAR, 0x3000), (LSTAR, 0x4000)]);
    // Not at the start of a page, but 16-byte aligned.
    let offset = ctx.arena.page();
    for word in 0..8 {
        offset.write(word + 2, page.read(word));
    }
    vmcs::write(Field::ENTRY_MSR_LOAD_ADDR, offset.address() + 16);
    for (count, expected) in [(1, 0x2000), (2, 0x2000), (3, 0x3000), (4, 0x4000)] {
        vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, count);
        ensure_eq!(read(&mut stage, LSTAR)?, expected, "IA32_LSTAR, {count} entries");
    }
    Ok(())
}

fn exit_store(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    // What was there does not matter.
    let page = area(ctx, &[(STAR, !0), (LSTAR, !0), (KERNEL_GS_BASE, !0)]);
    vmcs::write(Field::EXIT_MSR_STORE_ADDR, page.address());
    vmcs::write(Field::EXIT_MSR_STORE_COUNT, 2);
    write(&mut stage, STAR, 0x1234)?;
    write(&mut stage, LSTAR, 0x7FFF_0000_5678)?;
    ensure_eq!((page.read(0), page.read(1)), (STAR, 0x1234), "first entry");
    ensure_eq!((page.read(2), page.read(3)), (LSTAR, 0x7FFF_0000_5678), "second entry");
    ensure_eq!(page.read(5), !0, "third entry, beyond the count");
    Ok(())
}

fn exit_load(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    let page = area(ctx, &[(STAR, 0x5000), (LSTAR, 0x6000)]);
    vmcs::write(Field::EXIT_MSR_LOAD_ADDR, page.address());
    set(LSTAR, 0x1000);
    vmcs::write(Field::EXIT_MSR_LOAD_COUNT, 1);
    write(&mut stage, STAR, 0x1234)?;
    ensure_eq!((get(STAR), get(LSTAR)), (0x5000, 0x1000), "STAR and LSTAR in L1, one entry");
    vmcs::write(Field::EXIT_MSR_LOAD_COUNT, 2);
    write(&mut stage, LSTAR, 0x1234)?;
    ensure_eq!((get(STAR), get(LSTAR)), (0x5000, 0x6000), "STAR and LSTAR in L1, two entries");
    Ok(())
}

/// All three areas at once, as a hypervisor uses them: the entry's is the exit's store area.
fn exit_store_load(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    let guest = area(ctx, &[(STAR, 0x1), (LSTAR, 0x2)]);
    let host = area(ctx, &[(STAR, 0x10), (LSTAR, 0x20)]);
    vmcs::write(Field::ENTRY_MSR_LOAD_ADDR, guest.address());
    vmcs::write(Field::EXIT_MSR_STORE_ADDR, guest.address());
    vmcs::write(Field::EXIT_MSR_LOAD_ADDR, host.address());
    for count in
        [Field::ENTRY_MSR_LOAD_COUNT, Field::EXIT_MSR_STORE_COUNT, Field::EXIT_MSR_LOAD_COUNT]
    {
        vmcs::write(count, 2);
    }
    for round in 0..4 {
        ensure_eq!(read(&mut stage, STAR)?, round * 3 + 1, "IA32_STAR in L2");
        ensure_eq!(read(&mut stage, LSTAR)?, round * 3 + 2, "IA32_LSTAR in L2");
        ensure_eq!((get(STAR), get(LSTAR)), (0x10, 0x20), "STAR and LSTAR in L1");
        write(&mut stage, STAR, round * 3 + 4)?;
        write(&mut stage, LSTAR, round * 3 + 5)?;
    }
    Ok(())
}

/// The entry fails at this entry of the area (counted from 1), and L2 does not run.
fn entry_load_fails(ctx: &mut Ctx<'_>, entries: &[(u64, u64)], bad: u64) -> Verdict {
    let mut stage = open(ctx)?;
    let page = area(ctx, entries);
    vmcs::write(Field::ENTRY_MSR_LOAD_ADDR, page.address());
    vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, entries.len() as u64);
    vmcs::write(Field::GUEST_RIP, nothing());
    let exit = stage.vm.run().exit()?;
    ensure_eq!(exit.reason.bits(), 1 << 31 | 34, "exit reason");
    ensure_eq!(exit.qualification, bad, "exit qualification: the number of the entry");
    ensure_eq!(exit.rip, nothing(), "RIP");
    vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, bad - 1);
    stage.passes(nothing())
}

/// Bits 3:0 of an area's address must be 0, and it must lie within the physical-address width.
fn area_addresses(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = open(ctx)?;
    let width = stage.vmx.caps.width;
    let page = area(ctx, &[(STAR, 0)]);
    for (address, count) in [
        (Field::ENTRY_MSR_LOAD_ADDR, Field::ENTRY_MSR_LOAD_COUNT),
        (Field::EXIT_MSR_STORE_ADDR, Field::EXIT_MSR_STORE_COUNT),
        (Field::EXIT_MSR_LOAD_ADDR, Field::EXIT_MSR_LOAD_COUNT),
    ] {
        let top = (1_u64 << width) - 16;
        for (value, entries) in
            [(page.address() | 1, 1), (page.address() | 8, 1), (1 << width, 1), (top, 2)]
        {
            vmcs::write(address, value);
            vmcs::write(count, entries);
            let outcome = stage.vm.run();
            ensure_eq!(
                outcome,
                Outcome::VmFail(vmx_hw::VmFail::Valid, 7),
                "VM entry with {address:?} {value:#x}"
            );
            // Without entries the address does not matter.
            vmcs::write(count, 0);
            stage.passes(nothing())?;
        }
    }
    Ok(())
}
