//! Answers: are MSRs loaded and stored at VM entry and exit, and which entries make VM entry fail?
//!
//! SDM Vol. 3C, "Loading MSRs" in "VM Entries", "Saving MSRs" and "Loading MSRs" in "VM Exits", and
//! "VM-Entry Failures During or After Loading Guest State".

use vmx_defs::{ExitReason, Field, ProcCtls, msr};

use super::{Expect, Set, To, Trial, not_canonical};
use crate::{
    ensure_eq,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Mode, Op, rdmsr, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.msr_load.fs_gs_base", run: fs_gs_base },
    Case { name: "entry.msr_load.reserved_bits", run: reserved_bits },
    Case { name: "entry.msr_load.x2apic", run: x2apic },
    Case { name: "entry.msr_load.smm", run: smm },
    Case { name: "entry.msr_load.efer", run: efer },
    Case { name: "entry.msr_load.bad_value", run: bad_value },
    Case { name: "entry.msr_load.entry_number", run: entry_number },
    Case { name: "entry.msr_load.loads", run: loads },
    Case { name: "exit.msr_store", run: exit_store },
    Case { name: "exit.msr_load", run: exit_load },
];

/// IA32_LSTAR, which no field of the VMCS holds.
const LSTAR: u32 = 0xC000_0082;
/// IA32_CSTAR, as that.
const CSTAR: u32 = 0xC000_0083;
/// IA32_KERNEL_GS_BASE, as that.
const KERNEL_GS_BASE: u32 = 0xC000_0102;

/// Writes entry `index` of an MSR area.
fn put(area: Page, index: usize, msr: u64, value: u64) {
    area.write(2 * index, msr);
    area.write(2 * index + 1, value);
}

/// An L2 with a VM-entry MSR-load area of one page, and that page.
fn with_area(ctx: &mut Ctx<'_>) -> Result<(Trial, Page), Stop> {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let area = ctx.arena.page();
    trial.base(&[To(Field::ENTRY_MSR_LOAD_ADDR, area.address())]);
    Ok((trial, area))
}

/// The only entry of the area must make VM entry fail.
fn refused(trial: &mut Trial, area: Page, name: &str, msr: u64, value: u64) -> Verdict {
    put(area, 0, msr, value);
    trial.row(name, &[To(Field::ENTRY_MSR_LOAD_COUNT, 1)], Expect::Msr(1))
}

fn fs_gs_base(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    for msr in [msr::FS_BASE, msr::GS_BASE] {
        refused(&mut trial, area, "FS or GS base", msr.into(), 0)?;
    }
    Ok(())
}

/// Bits 63:32 of an entry's first half are reserved.
fn reserved_bits(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    let value = rdmsr(LSTAR);
    for bit in 32..64 {
        refused(&mut trial, area, "reserved bit", u64::from(LSTAR) | 1 << bit, value)?;
    }
    Ok(())
}

/// MSRs 800H to 8FFH while the local APIC is in x2APIC mode; elsewhere they can't be written at all.
fn x2apic(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    for msr in [0x800, 0x808, 0x80B, 0x830, 0x83F, 0x8FF] {
        refused(&mut trial, area, "x2APIC MSR", msr, 0)?;
    }
    Ok(())
}

/// IA32_SMM_MONITOR_CTL can be written in system-management mode only.
fn smm(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    refused(&mut trial, area, "IA32_SMM_MONITOR_CTL", 0x9B, 0)
}

/// What WRMSR of IA32_EFER would refuse: reserved bits, and a change of LME while paging is on.
fn efer(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    let good = rdmsr(msr::EFER);
    for bit in [1, 7, 9, 16, 31, 32, 63] {
        refused(&mut trial, area, "EFER bit", msr::EFER.into(), good | 1 << bit)?;
    }
    refused(&mut trial, area, "EFER.LME", msr::EFER.into(), good & !(1 << 8))?;
    put(area, 0, msr::EFER.into(), good);
    trial.row("the same EFER", &[To(Field::ENTRY_MSR_LOAD_COUNT, 1)], Expect::Enters)
}

fn bad_value(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    for msr in [LSTAR, CSTAR, KERNEL_GS_BASE, msr::SYSENTER_ESP, msr::SYSENTER_EIP] {
        refused(&mut trial, area, "not canonical", msr.into(), not_canonical())?;
    }
    refused(&mut trial, area, "reserved memory type", msr::PAT.into(), 2)?;
    refused(&mut trial, area, "a read-only MSR", msr::VMX_BASIC.into(), 0)
}

/// The qualification is the number of the entry, counted from 1; those before it were loaded, and
/// the rest was not.
fn entry_number(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    let before = rdmsr(LSTAR);
    for bad in 0..8_usize {
        for index in 0..8_usize {
            put(area, index, LSTAR.into(), 0x1_0000 + index as u64);
        }
        put(area, bad, msr::FS_BASE.into(), 0);
        let edits = [To(Field::ENTRY_MSR_LOAD_COUNT, 8)];
        trial.row("a bad entry", &edits, Expect::Msr(bad as u64 + 1))?;
        let expected = if bad == 0 { before } else { 0x1_0000 + bad as u64 - 1 };
        ensure_eq!(rdmsr(LSTAR), expected, "IA32_LSTAR after entry {bad} failed");
        // SAFETY: nothing uses SYSCALL.
        unsafe { crate::vmx::wrmsr(LSTAR, before) };
    }
    Ok(())
}

/// What L2 reads in an MSR, without exiting.
fn l2_reads(trial: &mut Trial, msr: u32) -> Result<u64, Stop> {
    trial.vm.registers.rcx = msr.into();
    trial.vm.exec(Op::Rdmsr)?;
    let r = trial.vm.registers;
    Ok(r.rdx << 32 | r.rax & 0xFFFF_FFFF)
}

fn loads(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    let msrs = [LSTAR, CSTAR, KERNEL_GS_BASE];
    let before = msrs.map(rdmsr);
    if trial.vmx.caps.proc.may_be_1 & ProcCtls::MSR_BITMAPS.bits() == 0 {
        skip!("no MSR bitmaps");
    }
    trial.base(&[Set(Field::PROC_CTLS, ProcCtls::MSR_BITMAPS.bits().into())]);
    for round in 1..4_u64 {
        for (index, msr) in msrs.into_iter().enumerate() {
            put(area, index, msr.into(), round << 16 | index as u64);
        }
        vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, 3);
        for (index, msr) in msrs.into_iter().enumerate() {
            let value = l2_reads(&mut trial, msr)?;
            ensure_eq!(value, round << 16 | index as u64, "MSR {msr:#x} in L2");
            ensure_eq!(rdmsr(msr), value, "MSR {msr:#x} after the exit");
        }
    }
    for (msr, value) in msrs.into_iter().zip(before) {
        // SAFETY: the value that it had.
        unsafe { crate::vmx::wrmsr(msr, value) };
    }
    Ok(())
}

/// An exit stores the guest's values in the area, and leaves the entries' first halves alone.
fn exit_store(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    let store = ctx.arena.page();
    let before = [LSTAR, CSTAR].map(rdmsr);
    put(area, 0, LSTAR.into(), 0x1234_5678);
    put(area, 1, CSTAR.into(), 0x8765_4321);
    put(store, 0, CSTAR.into(), 0);
    put(store, 1, LSTAR.into(), 0);
    put(store, 2, LSTAR.into(), 0x7777);
    trial.base(&[
        To(Field::ENTRY_MSR_LOAD_COUNT, 2),
        To(Field::EXIT_MSR_STORE_COUNT, 2),
        To(Field::EXIT_MSR_STORE_ADDR, store.address()),
    ]);
    trial.vm.exec(Op::Nothing)?;
    ensure_eq!((store.read(0), store.read(1)), (CSTAR.into(), 0x8765_4321), "first entry");
    ensure_eq!((store.read(2), store.read(3)), (LSTAR.into(), 0x1234_5678), "second entry");
    ensure_eq!((store.read(4), store.read(5)), (LSTAR.into(), 0x7777), "beyond the count");
    for (msr, value) in [LSTAR, CSTAR].into_iter().zip(before) {
        // SAFETY: the value that it had.
        unsafe { crate::vmx::wrmsr(msr, value) };
    }
    Ok(())
}

/// An exit loads the host's values from the area, and so does a VM entry that fails.
fn exit_load(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut trial, area) = with_area(ctx)?;
    let load = ctx.arena.page();
    let before = [LSTAR, CSTAR].map(rdmsr);
    put(area, 0, LSTAR.into(), 0x1111);
    put(area, 1, CSTAR.into(), 0x2222);
    put(load, 0, LSTAR.into(), 0x3333);
    trial.base(&[
        To(Field::ENTRY_MSR_LOAD_COUNT, 2),
        To(Field::EXIT_MSR_LOAD_COUNT, 1),
        To(Field::EXIT_MSR_LOAD_ADDR, load.address()),
    ]);
    trial.vm.exec(Op::Nothing)?;
    ensure_eq!((rdmsr(LSTAR), rdmsr(CSTAR)), (0x3333, 0x2222), "IA32_LSTAR and CSTAR");
    put(load, 0, LSTAR.into(), 0x4444);
    vmcs::write(Field::GUEST_RFLAGS, 0);
    let exit = trial.vm.run().exit()?;
    ensure_eq!(exit.reason.basic(), ExitReason::ENTRY_GUEST_STATE, "exit reason");
    ensure_eq!((rdmsr(LSTAR), rdmsr(CSTAR)), (0x4444, 0x2222), "after a VM-entry failure");
    for (msr, value) in [LSTAR, CSTAR].into_iter().zip(before) {
        // SAFETY: the value that it had.
        unsafe { crate::vmx::wrmsr(msr, value) };
    }
    Ok(())
}
