//! Answers: can an L2 be started, scripted and stopped at all, in each mode?

use vmx_defs::{ExitReason, Field, L2Gpa};

use crate::{
    ensure_eq,
    suite::{Case, Ctx, Verdict},
    vmx::{
        Exit, Mode, Op, Outcome, Vm, Vmx,
        paging::{Paging, WINDOW},
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "l2.vmcall.4level", run: |ctx| vmcall(ctx, Mode::Long) },
    Case { name: "l2.vmcall.pae", run: |ctx| vmcall(ctx, Mode::Pae) },
    Case { name: "l2.load_store.4level", run: |ctx| load_store(ctx, Mode::Long) },
    Case { name: "l2.load_store.pae", run: |ctx| load_store(ctx, Mode::Pae) },
    Case { name: "l2.fetch.4level", run: |ctx| fetch(ctx, Mode::Long) },
    Case { name: "l2.fetch.pae", run: |ctx| fetch(ctx, Mode::Pae) },
    Case { name: "l2.cpuid.exits", run: cpuid },
    Case { name: "l2.ud.exits", run: ud },
    Case { name: "l2.cr3", run: cr3 },
    Case { name: "l2.registers", run: registers },
];

fn vmcall(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, mode)?;
    let start = Op::Nothing.address(mode);
    for round in 0..3 {
        let exit = vm.run().exit()?;
        ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason, round {round}");
        ensure_eq!(exit.rip, start, "RIP, round {round}");
        ensure_eq!(exit.length, 3, "instruction length, round {round}");
        ensure_eq!(exit.qualification, 0, "qualification, round {round}");
        vmcs::write(Field::GUEST_RIP, start);
    }
    Ok(())
}

fn load_store(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, mode)?;
    let page = ctx.arena.page();
    vm.map(ctx, L2Gpa::new(WINDOW), page);
    page.write(0, 0x1234_5678);
    ensure_eq!(vm.load(WINDOW)?, 0x1234_5678, "what L2 reads");
    vm.store(WINDOW + 8, 0x8765_4321)?;
    ensure_eq!(page.read(1), 0x8765_4321, "what L2 wrote");
    let exit = match vm.load(Paging::window_address(1)) {
        Err(Outcome::Exit(exit)) => exit,
        other => crate::fail!("read of an unmapped page: {other:?}"),
    };
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "read of an unmapped page");
    ensure_eq!(exit.gpa, WINDOW + 0x1000, "guest-physical address");
    Ok(())
}

fn fetch(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, mode)?;
    let page = ctx.arena.page();
    page.put(0x10, VMCALL);
    vm.map(ctx, L2Gpa::new(WINDOW), page);
    vm.fetch(WINDOW + 0x10)?;
    ensure_eq!(vmcs::read(Field::GUEST_RIP), WINDOW + 0x10, "where the VMCALL was");
    Ok(())
}

/// The instruction VMCALL.
pub const VMCALL: &[u8] = &[0x0F, 0x01, 0xC1];

fn expect_exit(result: Result<(), Outcome>) -> Result<Exit, crate::suite::Stop> {
    match result {
        Err(outcome) => outcome.exit(),
        Ok(()) => crate::fail!("no exit"),
    }
}

fn cpuid(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let exit = expect_exit(vm.exec(Op::Cpuid))?;
    ensure_eq!(exit.reason, ExitReason::CPUID, "exit reason");
    ensure_eq!(exit.length, 2, "instruction length");
    let after = vm.resume_after(&exit).exit()?;
    ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason after it");
    Ok(())
}

fn ud(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let exit = expect_exit(vm.exec(Op::Ud2))?;
    ensure_eq!(exit.exception(), Some(6), "vector");
    ensure_eq!(u32::from(exit.interruption), 0x8000_0306, "interruption information");
    ensure_eq!(exit.rip, Op::Ud2.address(Mode::Long), "RIP");
    Ok(())
}

fn cr3(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let other = Paging::new(ctx.arena, Mode::Long);
    // CR3-load exiting is a default1 control: without the TRUE MSRs it can't be off.
    match vm.load_cr3(other.cr3) {
        Ok(()) => ensure_eq!(vmcs::read(Field::GUEST_CR3), other.cr3, "guest CR3"),
        Err(outcome) => {
            let exit = outcome.exit()?;
            ensure_eq!(exit.reason, ExitReason::CR_ACCESS, "exit reason");
            ensure_eq!(vmx.caps.basic.true_controls(), false, "CR3-load exiting is forced");
        }
    }
    Ok(())
}

fn registers(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let number = |index: u64| 0x1111_0000_2222_0000 + index;
    let registers = &mut vm.registers;
    for (index, register) in [
        &mut registers.rax,
        &mut registers.rcx,
        &mut registers.rdx,
        &mut registers.rbx,
        &mut registers.rbp,
        &mut registers.rsi,
        &mut registers.rdi,
    ]
    .into_iter()
    .enumerate()
    {
        *register = number(index as u64);
    }
    for (index, register) in registers.r8.iter_mut().enumerate() {
        *register = number(8 + index as u64);
    }
    vm.exec(Op::Nothing)?;
    let r = vm.registers;
    for (index, value) in [r.rax, r.rcx, r.rdx, r.rbx, r.rbp, r.rsi, r.rdi].into_iter().enumerate()
    {
        ensure_eq!(value, number(index as u64), "register {index}");
    }
    for (index, value) in r.r8.into_iter().enumerate() {
        ensure_eq!(value, number(8 + index as u64), "register {}", 8 + index);
    }
    Ok(())
}
