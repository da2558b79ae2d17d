//! Answers: how many instructions does a switch, an exit or a page cost?
//!
//! By the time-stamp counter, which counts instructions in Bochs; on a real processor the figures
//! are its ticks.

pub mod mmu;

use vmx_defs::{ExitReason, Field};

use crate::{
    ensure, ensure_eq,
    suite::{Ctx, Stop},
    vmx::{Mode, Op, Vm, Vmx, paging::WINDOW, views::Views, vm::instructions, vmcs},
};

/// Adds L2 with `count` views in its EPTP list, running in view 0.
pub fn with_views(ctx: &mut Ctx<'_>, vmx: &Vmx, count: usize) -> Result<(Vm, Views), Stop> {
    let vm = Vm::new(ctx, vmx, Mode::Long)?;
    let views = Views::new(ctx, &vm.ept, count, |_| false);
    vmcs::write(Field::EPT_POINTER, views.eptp(0));
    vm.enable_eptp_switching(vmx, views.list)?;
    Ok((vm, views))
}

fn mean(total: u64, of: u64) -> u64 {
    (total + of / 2) / of
}

/// Mean cost of a VMFUNC switch and one load from the page that differs, in rotation over all views,
/// after a rotation that warms up. Checks by a sum that each load saw its view.
pub fn switch_and_load(vm: &mut Vm, views: &Views, switches: u64) -> Result<u64, Stop> {
    let count = views.count as u64;
    let rotations = switches.div_ceil(count);
    let mut cost = 0;
    for rotations in [1, rotations] {
        let switches = rotations * count;
        vm.registers.rbx = WINDOW;
        vm.registers.rbp = 0;
        if count.is_power_of_two() {
            vm.registers.rcx = switches << 32;
            vm.registers.rsi = 1_u64.wrapping_sub(1 << 32);
            vm.registers.rdi = (!0 << 32) | (count - 1);
            vm.exec(Op::Measure)?;
        } else {
            vm.registers.rsi = count - 1;
            vm.registers.rdi = rotations;
            vm.exec(Op::MeasureAny)?;
        }
        let sum: u64 = (0..views.count).map(Views::value).sum();
        ensure_eq!(vm.registers.rbp, sum * rotations, "sum of what L2 read");
        cost = mean(vm.registers.rax, switches);
    }
    Ok(cost)
}

/// Mean cost of a VMCALL from L2 that L1 handles: exit reason read, RIP advanced by the instruction
/// length, L2 resumed.
pub fn vmcall_round_trip(vm: &mut Vm, trips: u64) -> Result<u64, Stop> {
    let mut cost = 0;
    for trips in [16, trips] {
        vm.registers.rdi = trips;
        vmcs::write(Field::GUEST_RIP, Op::Vmcalls.address(Mode::Long));
        let entered = vm.run().exit()?;
        ensure_eq!(entered.reason, ExitReason::VMCALL, "exit reason");
        let start = instructions();
        for _ in 0..trips {
            // The first of these is the exit that was met above.
            let reason = crate::vmx::exit_reason();
            ensure!(reason == ExitReason::VMCALL, "exit reason {reason:?}");
            let rip = vmcs::read(Field::GUEST_RIP);
            let length = vmcs::read(Field::EXIT_INSTRUCTION_LEN);
            vmcs::write(Field::GUEST_RIP, rip + length);
            ensure!(vm.enter() == 0, "VM entry failed");
        }
        cost = mean(instructions() - start, trips);
        ensure_eq!(vm.registers.rdi, 0, "VMCALLs that L2 has left");
    }
    Ok(cost)
}
