//! Answers: does each of two VMCSs keep its own settings when L1 runs their L2s in turn, changes
//! fields between entries, and clears and reloads them?
//!
//! SDM Vol. 3C, "Organization of VMCS Data" and "Software Use of Virtual-Machine Control
//! Structures". An L0 that writes only what changed since the last entry goes wrong here first.

use vmx_defs::{
    EntryCtls, ExitCtls, ExitReason, Field, L2Gpa, PinCtls, ProcCtls, ProcCtls2, event::vector,
};

use super::{Control, Stage};
use crate::{
    ensure, ensure_eq, l2_code,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{self, Mode, Vm, paging::WINDOW, snippet::Idt, vm::instructions, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "alternate.ports", run: ports },
    Case { name: "alternate.msr_bitmaps", run: msr_bitmaps },
    Case { name: "alternate.msr_areas", run: msr_areas },
    Case { name: "alternate.tsc_offsets", run: tsc_offsets },
    Case { name: "alternate.exception_bitmaps", run: exception_bitmaps },
    Case { name: "alternate.cr0_masks", run: cr0_masks },
    Case { name: "alternate.cr3_and_epts", run: cr3_and_epts },
    Case { name: "alternate.tpr_shadows", run: tpr_shadows },
    Case { name: "alternate.apic_pages", run: apic_pages },
    Case { name: "alternate.preemption_timers", run: timers },
    Case { name: "alternate.pats", run: pats },
    Case { name: "alternate.modes", run: modes },
    Case { name: "alternate.segments", run: segments },
    Case { name: "alternate.idts", run: idts },
    Case { name: "alternate.controls_toggled", run: toggled },
    Case { name: "alternate.host_state", run: host_state },
    Case { name: "alternate.after_failures", run: after_failures },
];

l2_code! {
    nothing: "";
    in_al: "in al, dx";
    read_msr: "rdmsr", "shl rdx, 32", "or rax, rdx";
    rdtsc: "rdtsc", "shl rdx, 32", "or rax, rdx";
    ud2: "ud2";
    read_cr0: "mov rax, cr0";
    read_cr8: "mov rax, cr8";
    load: "mov rax, [rbx]";
    wait: "2: dec rcx", "jnz 2b";
    read_fs: "mov rax, fs:[rbx]";
    pause: "pause";
    wbinvd: "wbinvd";
}

const LSTAR: u64 = 0xC000_0082;
const ROUNDS: u64 = 6;

/// Two L2s. In [`turn`](Self::turn) each has its turn, the second round after a VMCLEAR of both.
struct Pair {
    stages: [Stage; 2],
}

impl Pair {
    fn new(ctx: &mut Ctx<'_>) -> Result<Self, Stop> {
        let first = Stage::new(ctx)?;
        let second = Stage { vmx: first.vmx, vm: Vm::new(ctx, &first.vmx, Mode::Long)? };
        Ok(Self { stages: [first, second] })
    }

    /// Sets each up with its VMCS current.
    fn prepare(
        &mut self,
        mut set: impl FnMut(&mut Stage, u64) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        for (number, stage) in self.stages.iter_mut().enumerate() {
            stage.vm.make_current()?;
            set(stage, number as u64)?;
        }
        Ok(())
    }

    /// Checks each in turn, several times.
    fn turn(
        &mut self,
        mut check: impl FnMut(&mut Stage, u64, u64) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        for round in 0..ROUNDS {
            if round == 1 {
                for stage in &mut self.stages {
                    ensure_eq!(vmx::vmclear(stage.vm.vmcs), Ok(()), "VMCLEAR");
                    stage.vm.launched = false;
                }
            }
            for (number, stage) in self.stages.iter_mut().enumerate() {
                stage.vm.make_current()?;
                check(stage, number as u64, round)?;
            }
        }
        Ok(())
    }
}

/// One with I/O bitmaps, one that exits for each port.
fn ports(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|stage, number| {
        stage.vm.registers.rdx = 0x80;
        if number == 0 {
            stage.set(Control::Proc(ProcCtls::IO_BITMAPS))?;
            vmcs::write(Field::IO_BITMAP_A, ctx.arena.page().address());
            vmcs::write(Field::IO_BITMAP_B, ctx.arena.page().address());
            return Ok(());
        }
        stage.set(Control::Proc(ProcCtls::UNCONDITIONAL_IO_EXITING))
    })?;
    pair.turn(|stage, number, _| {
        if number == 0 {
            return stage.passes(in_al());
        }
        stage.intercepted(in_al(), ExitReason::IO_INSTRUCTION, 1)?;
        Ok(())
    })
}

fn msr_bitmaps(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|stage, number| {
        stage.set(Control::Proc(ProcCtls::MSR_BITMAPS))?;
        let page = ctx.arena.page();
        page.fill(if number == 0 { 0 } else { !0 });
        vmcs::write(Field::MSR_BITMAP, page.address());
        stage.vm.registers.rcx = LSTAR;
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        stage.vm.registers.rcx = LSTAR;
        // From the fourth round on they have changed places, without a VMWRITE.
        if round == 3 {
            let page = crate::memory::Page::at(vmcs::read(Field::MSR_BITMAP));
            page.fill(!page.read(0));
        }
        if (number == 0) == (round < 3) {
            return stage.passes(read_msr());
        }
        stage.intercepted(read_msr(), ExitReason::RDMSR, 2)?;
        Ok(())
    })
}

fn msr_areas(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|stage, number| {
        stage.set(Control::Proc(ProcCtls::MSR_BITMAPS))?;
        vmcs::write(Field::MSR_BITMAP, ctx.arena.page().address());
        let area = ctx.arena.page();
        area.write(0, LSTAR);
        area.write(1, 0x1000 + number);
        vmcs::write(Field::ENTRY_MSR_LOAD_ADDR, area.address());
        vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, 1);
        Ok(())
    })?;
    pair.turn(|stage, number, _| {
        stage.vm.registers.rcx = LSTAR;
        stage.passes(read_msr())?;
        ensure_eq!(stage.vm.registers.rax, 0x1000 + number, "IA32_LSTAR of L2 {number}");
        Ok(())
    })
}

fn tsc_offsets(ctx: &mut Ctx<'_>) -> Verdict {
    const APART: u64 = 1 << 50;
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|stage, number| {
        stage.clear(Control::Proc(ProcCtls::RDTSC_EXITING))?;
        stage.set(Control::Proc(ProcCtls::TSC_OFFSETTING))?;
        vmcs::write(Field::TSC_OFFSET, (number + 1) * APART);
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        if round == 4 {
            vmcs::write(Field::TSC_OFFSET, (number + 3) * APART);
        }
        let offset = (number + if round < 4 { 1 } else { 3 }) * APART;
        let before = instructions();
        stage.passes(rdtsc())?;
        let (read, after) = (stage.vm.registers.rax, instructions());
        ensure!(
            (before + offset..=after + offset).contains(&read),
            "L2 {number} reads {read:#x}, L1 {before:#x} and {after:#x}"
        );
        Ok(())
    })
}

fn exception_bitmaps(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    let idt = Idt::new(ctx.arena);
    pair.prepare(|_, number| {
        idt.install();
        vmcs::write(Field::EXCEPTION_BITMAP, number << vector::UD);
        Ok(())
    })?;
    let stacks: [u64; 2] = core::array::from_fn(|_| ctx.arena.page().address() + 0x800);
    pair.turn(|stage, number, _| {
        vmcs::write(Field::GUEST_RSP, stacks[number as usize]);
        if number == 1 {
            stage.raises(ud2(), vector::UD)?;
            return Ok(());
        }
        let exit = stage.exit_from(ud2())?;
        ensure_eq!((exit.reason, exit.rip), (ExitReason::VMCALL, idt.handler(6)), "the handler");
        Ok(())
    })
}

fn cr0_masks(ctx: &mut Ctx<'_>) -> Verdict {
    const TS: u64 = 1 << 3;
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|_, number| {
        vmcs::change(Field::GUEST_CR0, 0, TS);
        vmcs::write(Field::CR0_MASK, number * TS);
        vmcs::write(Field::CR0_SHADOW, TS);
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        if round == 3 {
            vmcs::write(Field::CR0_SHADOW, 0);
        }
        stage.passes(read_cr0())?;
        let shown = if round < 3 { number * TS } else { 0 };
        ensure_eq!(stage.vm.registers.rax & TS, shown, "CR0.TS in L2 {number}");
        Ok(())
    })
}

/// Each L2 has its page at the same address, one by its page tables, the other by its EPT.
fn cr3_and_epts(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|stage, number| {
        let page = ctx.arena.page();
        page.write(0, 0x700 + number);
        if number == 0 {
            stage.vm.paging.window.write(0, page.address() | 7);
        } else {
            stage.vm.map(ctx, L2Gpa::new(WINDOW), page);
        }
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        // VPIDs are switched on half-way.
        if round == 3 {
            stage.vm.enable_vpid(&stage.vmx, number as u16 + 1)?;
        }
        ensure_eq!(stage.vm.load(WINDOW)?, 0x700 + number, "what L2 {number} reads");
        Ok(())
    })
}

fn tpr_shadows(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    pair.prepare(|stage, number| {
        stage.clear(Control::Proc(ProcCtls::CR8_STORE_EXITING))?;
        stage.set(Control::Proc(ProcCtls::TPR_SHADOW))?;
        vmcs::write(Field::VIRTUAL_APIC_ADDR, pages[number as usize].address());
        vmcs::write(Field::TPR_THRESHOLD, 0);
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        // The second one does without in the last rounds, and sees the machine's CR8, which is 0.
        if round == 4 && number == 1 {
            stage.clear(Control::Proc(ProcCtls::TPR_SHADOW))?;
        }
        pages[number as usize].write32(0x20, ((round + number * 3) << 4) as u32);
        stage.passes(read_cr8())?;
        let expected = if round >= 4 && number == 1 { 0 } else { round + number * 3 };
        ensure_eq!(stage.vm.registers.rax, expected, "CR8 of L2 {number} in round {round}");
        Ok(())
    })
}

/// The page that is the APIC-access page of one is plain memory for the other.
fn apic_pages(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    let page = ctx.arena.page();
    page.write(0, 0x5555);
    pair.prepare(|stage, number| {
        stage.vm.map(ctx, L2Gpa::new(WINDOW), page);
        stage.vm.registers.rbx = WINDOW;
        if number == 1 {
            vmcs::write(Field::APIC_ACCESS_ADDR, page.address());
            return stage.set(Control::Proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES));
        }
        Ok(())
    })?;
    pair.turn(|stage, number, _| {
        stage.vm.registers.rbx = WINDOW;
        let exit = stage.exit_from(load())?;
        let expected = [ExitReason::VMCALL, ExitReason::APIC_ACCESS][number as usize];
        ensure_eq!(exit.reason, expected, "exit reason of L2 {number}");
        Ok(())
    })
}

fn timers(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|stage, number| {
        if number == 1 {
            stage.set(Control::Pin(PinCtls::PREEMPTION_TIMER))?;
            vmcs::write(Field::PREEMPTION_TIMER, 500);
        }
        Ok(())
    })?;
    pair.turn(|stage, number, _| {
        stage.vm.registers.rcx = 100_000;
        let exit = stage.exit_from(wait())?;
        let expected = [ExitReason::VMCALL, ExitReason::PREEMPTION_TIMER][number as usize];
        ensure_eq!(exit.reason, expected, "exit reason of L2 {number}");
        ensure_eq!(vmcs::read(Field::PREEMPTION_TIMER), number * 500, "the timer's value");
        Ok(())
    })
}

fn pats(ctx: &mut Ctx<'_>) -> Verdict {
    const VALUES: [u64; 2] = [0x0001_0406_0007_0406, 0x0606_0406_0007_0406];
    let pat = u64::from(vmx_defs::msr::PAT);
    let own = vmx::rdmsr(pat as u32);
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|stage, number| {
        stage.set(Control::Proc(ProcCtls::MSR_BITMAPS))?;
        vmcs::write(Field::MSR_BITMAP, ctx.arena.page().address());
        stage.set(Control::Entry(EntryCtls::LOAD_PAT))?;
        stage.set(Control::Exit(ExitCtls::LOAD_PAT))?;
        vmcs::write(Field::GUEST_PAT, VALUES[number as usize]);
        vmcs::write(Field::HOST_PAT, own);
        Ok(())
    })?;
    pair.turn(|stage, number, _| {
        stage.vm.registers.rcx = pat;
        stage.passes(read_msr())?;
        ensure_eq!(stage.vm.registers.rax, VALUES[number as usize], "PAT of L2 {number}");
        ensure_eq!(vmx::rdmsr(pat as u32), own, "PAT of L1");
        Ok(())
    })
}

/// One in 64-bit mode, one with PAE paging.
fn modes(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.stages[1].vm = Vm::new(ctx, &pair.stages[0].vmx, Mode::Pae)?;
    pair.prepare(|stage, number| {
        let page = ctx.arena.page();
        page.write(0, 0x700 + number);
        stage.vm.map(ctx, L2Gpa::new(WINDOW), page);
        Ok(())
    })?;
    pair.turn(|stage, number, _| {
        stage.vm.registers.rax = !0;
        let read = stage.vm.load(WINDOW)?;
        ensure_eq!(read, 0x700 + number, "what L2 {number} reads");
        ensure_eq!(stage.vm.registers.rax, read, "RAX");
        let efer = vmcs::read(Field::GUEST_EFER) & 0x400;
        ensure_eq!(efer, if number == 0 { 0x400 } else { 0 }, "EFER.LMA of L2 {number}");
        Ok(())
    })
}

fn segments(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    let page = ctx.arena.page();
    for word in 0..16 {
        page.write(word, word as u64);
    }
    pair.prepare(|stage, number| {
        vmcs::write(Field::GUEST_FS_BASE, page.address() + number * 8);
        stage.vm.registers.rbx = 0x10;
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        if round == 2 {
            vmcs::write(Field::GUEST_FS_BASE, page.address() + number * 8 + 0x20);
        }
        stage.vm.registers.rbx = 0x10;
        stage.passes(read_fs())?;
        let expected = 2 + number + if round < 2 { 0 } else { 4 };
        ensure_eq!(stage.vm.registers.rax, expected, "what L2 {number} reads at FS");
        Ok(())
    })
}

fn idts(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    let idts = [Idt::new(ctx.arena), Idt::new(ctx.arena)];
    let stacks: [u64; 2] = core::array::from_fn(|_| ctx.arena.page().address() + 0x800);
    pair.prepare(|_, number| {
        idts[number as usize].install();
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        vmcs::write(Field::GUEST_RSP, stacks[number as usize]);
        // An event for one of them only.
        if number == round % 2 {
            vmcs::write(Field::ENTRY_INTR_INFO, 0x8000_0300 + round);
            let exit = stage.exit_from(nothing())?;
            let handler = idts[number as usize].handler(round as u8);
            ensure_eq!((exit.reason, exit.rip), (ExitReason::VMCALL, handler), "the handler");
            return Ok(());
        }
        stage.passes(nothing())
    })
}

/// Controls that change from entry to entry of one VMCS.
fn toggled(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.turn(|stage, number, round| {
        let pause_exits = (round + number) % 2 == 0;
        let wbinvd_exits = round % 3 == number;
        for (on, control) in [
            (pause_exits, Control::Proc(ProcCtls::PAUSE_EXITING)),
            (wbinvd_exits, Control::Proc2(ProcCtls2::WBINVD_EXITING)),
        ] {
            if on {
                stage.set(control)?;
            } else {
                stage.clear(control)?;
            }
        }
        for (on, code, reason) in [
            (pause_exits, pause(), ExitReason::PAUSE),
            (wbinvd_exits, wbinvd(), ExitReason::WBINVD),
        ] {
            if on {
                stage.intercepted(code, reason, 2)?;
            } else {
                stage.passes(code)?;
            }
        }
        Ok(())
    })
}

fn host_state(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.prepare(|_, number| {
        vmcs::write(Field::HOST_FS_BASE, 0x1000 * (number + 1));
        vmcs::write(Field::HOST_SYSENTER_EIP, 0x2000 * (number + 1));
        Ok(())
    })?;
    pair.turn(|stage, number, round| {
        if round == 4 {
            vmcs::write(Field::HOST_FS_BASE, 0x5000 * (number + 1));
        }
        stage.passes(nothing())?;
        let step = if round < 4 { 0x1000 } else { 0x5000 };
        let base = vmx::rdmsr(vmx_defs::msr::FS_BASE);
        ensure_eq!(base, step * (number + 1), "FS base of L1 after L2 {number}");
        let entry = vmx::rdmsr(vmx_defs::msr::SYSENTER_EIP);
        ensure_eq!(entry, 0x2000 * (number + 1), "IA32_SYSENTER_EIP of L1 after L2 {number}");
        Ok(())
    })
}

/// Each kind of VM-entry failure between entries that succeed.
fn after_failures(ctx: &mut Ctx<'_>) -> Verdict {
    let mut pair = Pair::new(ctx)?;
    pair.turn(|stage, number, round| {
        stage.passes(nothing())?;
        let (field, bad) = match (round + number) % 4 {
            0 => (Field::EPT_POINTER, 0),
            1 => (Field::HOST_CR3, !0),
            2 => (Field::GUEST_RFLAGS, 0),
            _ => (Field::VMCS_LINK_POINTER, 1),
        };
        let good = vmcs::read(field);
        vmcs::write(field, bad);
        vmcs::write(Field::GUEST_RIP, nothing());
        let outcome = stage.vm.run();
        let failed = match outcome {
            vmx::Outcome::VmFail(_, error) => matches!(error, 7 | 8),
            vmx::Outcome::Exit(exit) => exit.reason.is_entry_failure(),
        };
        ensure!(failed, "VM entry with {field:?} {bad:#x}: {outcome:?}");
        vmcs::write(field, good);
        stage.passes(nothing())
    })
}
