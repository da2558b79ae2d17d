//! The demonstration: L2 switches between views of one guest-physical page by VMFUNC.
#![cfg_attr(image, no_std, no_main)]

use nvmx_guests::{
    ensure, measure, multiboot, println,
    suite::{self, Ctx, Verdict},
    vmx::{Op, Vmx, paging::WINDOW, views::Views},
};

const VIEWS: usize = 5;
const SWITCHES: u64 = 4000;

fn views(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let (mut vm, views) = measure::with_views(ctx, &vmx, VIEWS)?;
    let mut all_right = true;
    for view in 0..VIEWS {
        vm.registers.rax = 0;
        vm.registers.rcx = view as u64;
        vm.registers.rbx = WINDOW;
        vm.exec(Op::VmfuncLoad)?;
        let (read, expected) = (vm.registers.rdx, Views::value(view));
        println!("demo: view {view} read {read:#x} expected {expected:#x}");
        all_right &= read == expected;
    }
    ensure!(all_right, "a view shows a wrong page");
    let cost = measure::switch_and_load(&mut vm, &views, SWITCHES)?;
    println!("demo: switch_instructions {cost}");
    Ok(())
}

fn demo(info: &'static multiboot::Info) -> bool {
    suite::run_program(info, "demo", views)
}

nvmx_guests::entry_point!(demo);
