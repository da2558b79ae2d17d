//! The thin L0: boots from GRUB at the top of memory and runs a hypervisor, L1, on the whole
//! machine.
//!
//! `boot` comes up, `handover` reads what GRUB left, `region` takes L0's memory, `paging` moves the
//! image there, `l1` loads L1.
#![no_std]
#![cfg_attr(freestanding, no_main)]
// A check on the host compiles everything but the entry, so that nothing is reached from it.
#![cfg_attr(not(freestanding), allow(dead_code, unused_imports))]

extern crate alloc;
#[cfg(not(freestanding))]
extern crate std;

mod boot;
mod console;
mod exit;
mod handover;
mod l1;
#[cfg(freestanding)]
mod lang;
mod msr;
mod multiboot;
mod options;
mod paging;
mod phys;
mod processor;
mod region;
mod trap;
mod world;

use alloc::vec::Vec;

use crate::console::fail;
use crate::handover::Handover;
use crate::options::{Options, VmfuncMode};
use crate::phys::{Span, direct};
use crate::region::Region;

/// The image is for a bare machine.
#[cfg(not(freestanding))]
fn main() {
    std::eprintln!("nvmx-hv is a kernel: build it with `cargo xtask build` and boot it with GRUB");
}

/// The bytes of boot information at `span`.
///
/// # Safety
/// The direct map reaches `span`, and nothing writes to it while the slice is used.
unsafe fn bytes_at(span: Span) -> &'static [u8] {
    // SAFETY: as the caller promises.
    unsafe { core::slice::from_raw_parts(direct::<u8>(span.start), span.len() as usize) }
}

/// The first Rust code: `information` is the physical address of GRUB's boot information.
extern "C" fn start_of_rust(information: u32) -> ! {
    console::init();
    // SAFETY: GRUB passed this address, and the boot tables map the lowest 4 GiB.
    let handover = match unsafe { Handover::read(information) } {
        Ok(handover) => handover,
        Err(error) => fail(format_args!("{error}")),
    };
    // SAFETY: the information is still where GRUB put it.
    let command_line = unsafe { bytes_at(handover.command_line) };
    let options = match Options::parse(core::str::from_utf8(command_line).unwrap_or_default()) {
        Ok(options) => options,
        Err(error) => fail(format_args!("{error}")),
    };
    console::set_enabled(options.console);
    say!("nvmx {}", env!("CARGO_PKG_VERSION"));

    let mut avoid: Vec2 = Vec2::new();
    avoid.push(handover.information);
    avoid.push(paging::image_as_loaded());
    avoid.extend(handover.modules.iter().map(|module| module.bytes));
    let Some(mut region) = Region::choose(&handover.map, &avoid) else {
        fail(format_args!("not enough RAM below 4 GiB"))
    };
    region.start_heap();
    let mut modules: Vec<l1::Module> = handover
        .modules
        .iter()
        .map(|module| l1::Module {
            bytes: module.bytes,
            // SAFETY: the information is still where GRUB put it.
            string: unsafe { bytes_at(module.string) }.to_vec(),
        })
        .collect();

    // SAFETY: called once, here.
    unsafe { paging::move_image(&mut region, handover.map.end_of_ram()) };
    let processor = processor::Processor::new(0);
    // SAFETY: this is the first processor.
    unsafe { processor.load() };

    let own = region::own();
    let map = handover.map.without(own);
    // SAFETY: image, strings and heap are in L0's own memory now.
    let start =
        unsafe { l1::stage(&mut modules, &map).and_then(|at| l1::load(&modules, at, &map)) };
    let start = match start {
        Ok(start) => start,
        Err(error) => fail(format_args!("{error}")),
    };
    say!("own memory {:#x}..{:#x}", own.start, own.end);
    if options.vmfunc == VmfuncMode::Exitless {
        say!("vmfunc=exitless is not there yet: emulated");
    }
    drop(modules);
    fail(format_args!("L1 at {:#x} {:#x}", start.entry, start.information))
}
/// Space for what the heap isn't there for yet.
type Vec2 = arrayvec::ArrayVec<Span, { handover::MAX_MODULES + 2 }>;
