//! The benchmark: what a VMFUNC switch, a VM exit and nested paging cost, in instructions.
//!
//! `suite=vmfunc` or `suite=mmu` on the command line selects one suite; else all run.
#![cfg_attr(image, no_std, no_main)]

use nvmx_guests::{
    fail, measure, multiboot, println,
    suite::{self, Ctx, Verdict},
    vmx::Vmx,
};

/// Switches of one measurement.
const SWITCHES: u64 = 4096;
/// VMCALLs of one measurement.
const TRIPS: u64 = 1000;

fn measurements(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    match suite::option(&ctx.info.command_line, "suite") {
        "vmfunc" => vmfunc(ctx, &vmx),
        "mmu" => measure::mmu::run(ctx, &vmx),
        "" => {
            vmfunc(ctx, &vmx)?;
            measure::mmu::run(ctx, &vmx)
        }
        other => fail!("no suite {other}"),
    }
}

fn vmfunc(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Verdict {
    for count in [2, 64, 512] {
        let (mut vm, views) = measure::with_views(ctx, vmx, count)?;
        let cost = measure::switch_and_load(&mut vm, &views, SWITCHES)?;
        println!("bench: switch_{count} {cost}");
    }
    let (mut vm, _) = measure::with_views(ctx, vmx, 2)?;
    let cost = measure::vmcall_round_trip(&mut vm, TRIPS)?;
    println!("bench: vmcall_round_trip {cost}");
    Ok(())
}

fn bench(info: &'static multiboot::Info) -> bool {
    suite::run_program(info, "bench", measurements)
}

nvmx_guests::entry_point!(bench);
