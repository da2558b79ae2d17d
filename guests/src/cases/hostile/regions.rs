//! Answers: what happens when L1 writes to a VMCS region that it must not touch?
//!
//! Software that does so gets undefined behaviour (SDM Vol. 3C, "Software Access to the
//! Virtual-Machine Control Structure"), but its own: VM entry still checks what it uses, and other
//! VMCSs are not concerned. So these cases ask for an outcome that some VMCS could have led to, and
//! for the next VMCS to work.

use vmx_defs::{ExitReason, Field};
use vmx_hw::VmFail;

use crate::{
    ensure, ensure_eq,
    memory::Page,
    suite::{Case, Ctx, Verdict},
    vmx::{self, Mode, Op, Outcome, Vm, Vmx, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "hostile.region.before_launch.zeros", run: |ctx| rewritten(ctx, false, 0) },
    Case { name: "hostile.region.before_launch.ones", run: |ctx| rewritten(ctx, false, !0) },
    Case {
        name: "hostile.region.before_launch.pattern",
        run: |ctx| rewritten(ctx, false, 0x5A5A_A5A5_1234_8001),
    },
    Case { name: "hostile.region.launched.zeros", run: |ctx| rewritten(ctx, true, 0) },
    Case { name: "hostile.region.launched.ones", run: |ctx| rewritten(ctx, true, !0) },
    Case {
        name: "hostile.region.launched.pattern",
        run: |ctx| rewritten(ctx, true, 0x5A5A_A5A5_1234_8001),
    },
    Case { name: "hostile.region.cleared_and_rewritten", run: cleared },
    Case { name: "hostile.region.revision_rewritten", run: revision },
    Case { name: "hostile.region.not_current", run: not_current },
    Case { name: "hostile.region.vmxon_region_rewritten", run: vmxon_region },
    Case { name: "hostile.region.is_ept_table", run: is_ept_table },
    Case { name: "hostile.region.many", run: many },
];

/// Writes all of a region but its revision identifier.
fn overwrite(region: Page, value: u64) {
    region.write32(1, value as u32);
    for word in 1..512 {
        region.write(word, value);
    }
}

/// An outcome that VM entry with some contents of the VMCS has.
fn plausible(outcome: Outcome) -> Verdict {
    match outcome {
        Outcome::Exit(exit) => {
            let reason = exit.reason;
            let ran = reason == ExitReason::VMCALL;
            let failed = reason.is_entry_failure() && matches!(reason.basic().bits(), 33 | 34);
            ensure!(ran || failed, "exit for {reason:?}");
        }
        Outcome::VmFail(VmFail::Valid, error) => {
            ensure!(matches!(error, 4 | 5 | 7 | 8), "VMfailValid with error {error}");
        }
        Outcome::VmFail(VmFail::Invalid, _) => crate::fail!("VMfailInvalid"),
    }
    Ok(())
}

/// Both another VMCS and this region, set up anew, work.
fn recovers(ctx: &mut Ctx<'_>, vmx: &Vmx, region: Page) -> Verdict {
    let mut other = Vm::new(ctx, vmx, Mode::Long)?;
    other.exec(Op::Nothing)?;
    ensure_eq!(vmx::vmclear(region), Ok(()), "VMCLEAR of the rewritten region");
    region.fill(0);
    region.write32(0, vmx.caps.basic.revision());
    let mut again = Vm::over(ctx, vmx, Mode::Long, region)?;
    again.exec(Op::Nothing)?;
    other.make_current()?;
    other.exec(Op::Nothing)?;
    Ok(())
}

/// The region of the current VMCS is rewritten before VMLAUNCH or VMRESUME.
fn rewritten(ctx: &mut Ctx<'_>, launched: bool, value: u64) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    if launched {
        vm.exec(Op::Nothing)?;
    }
    overwrite(vm.vmcs, value);
    plausible(vm.run())?;
    recovers(ctx, &vmx, vm.vmcs)
}

/// After VMCLEAR the region is plain memory; what L1 puts there is a VMCS of unknown contents.
fn cleared(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    for value in [0, !0, 0x5A5A_A5A5_1234_8001, 0x0000_0001_0000_0001] {
        let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
        vm.exec(Op::Nothing)?;
        ensure_eq!(vmx::vmclear(vm.vmcs), Ok(()), "VMCLEAR");
        overwrite(vm.vmcs, value);
        vm.make_current()?;
        // Its fields can be read, whatever they are, and written.
        vmcs::read(Field::GUEST_RIP);
        vmcs::write(Field::GUEST_RSP, 0x1234);
        ensure_eq!(vmcs::read(Field::GUEST_RSP), 0x1234, "a field that was written");
        vm.launched = false;
        plausible(vm.run())?;
        let region = vm.vmcs;
        let mut again = Vm::over(ctx, &vmx, Mode::Long, region)?;
        again.exec(Op::Nothing)?;
        recovers(ctx, &vmx, region)?;
    }
    Ok(())
}

/// The revision identifier is read by VMPTRLD.
fn revision(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    vm.exec(Op::Nothing)?;
    let other = vmx.region(ctx);
    ensure_eq!(vmx::vmclear(vm.vmcs), Ok(()), "VMCLEAR");
    ensure_eq!(vmx::vmclear(other), Ok(()), "VMCLEAR of another region");
    ensure_eq!(vmx::vmptrld(other), Ok(()), "VMPTRLD of another region");
    let good = vm.vmcs.read32(0);
    vm.vmcs.write32(0, good ^ 1);
    ensure_eq!(vmx::vmptrld(vm.vmcs), Err(VmFail::Valid), "VMPTRLD");
    ensure_eq!(vmcs::read(Field::VM_INSTRUCTION_ERROR), 11, "error");
    vm.vmcs.write32(0, good);
    vm.make_current()?;
    vm.launched = false;
    vm.exec(Op::Nothing)?;
    recovers(ctx, &vmx, vm.vmcs)
}

/// A VMCS that is active and not current.
fn not_current(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut first = Vm::new(ctx, &vmx, Mode::Long)?;
    first.exec(Op::Nothing)?;
    let mut second = Vm::new(ctx, &vmx, Mode::Long)?;
    second.exec(Op::Nothing)?;
    overwrite(first.vmcs, !0);
    second.exec(Op::Nothing)?;
    first.make_current()?;
    plausible(first.run())?;
    second.make_current()?;
    second.exec(Op::Nothing)?;
    recovers(ctx, &vmx, first.vmcs)
}

fn vmxon_region(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    for value in [0, !0] {
        vmx.vmxon_region.fill(value);
        vm.exec(Op::Nothing)?;
    }
    Ok(())
}

/// A region that is also the root of the EPT: VM entry fails, or L2 has what the bits say.
fn is_ept_table(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let flags = vmcs::read(Field::EPT_POINTER) & 0xFFF;
    vmcs::write(Field::EPT_POINTER, vm.vmcs.address() | flags);
    let exit = match vm.run() {
        Outcome::Exit(exit) => exit,
        other => return plausible(other),
    };
    let ept = [ExitReason::EPT_MISCONFIGURATION, ExitReason::EPT_VIOLATION];
    ensure!(ept.contains(&exit.reason), "exit for {:?}", exit.reason);
    recovers(ctx, &vmx, vm.vmcs)
}

/// More VMCSs than an L0 may keep apart, each launched once and run again.
fn many(ctx: &mut Ctx<'_>) -> Verdict {
    const COUNT: usize = 40;
    let vmx = Vmx::on(ctx)?;
    let mut first: [Option<Vm>; COUNT] = [const { None }; COUNT];
    for (index, place) in first.iter_mut().enumerate() {
        let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
        vm.registers.rbp = index as u64;
        vm.exec(Op::Nothing)?;
        *place = Some(vm);
    }
    for round in 0..2 {
        for (index, vm) in first.iter_mut().flatten().enumerate() {
            vm.make_current()?;
            vm.exec(Op::Nothing)?;
            ensure_eq!(vm.registers.rbp, index as u64, "a register in round {round}");
            let rsp = vmcs::read(Field::GUEST_RSP);
            ensure!(rsp > 0x10_0000, "guest RSP {rsp:#x}");
        }
    }
    Ok(())
}
