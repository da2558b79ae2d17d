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

mod apic;
mod boot;
mod console;
mod counters;
mod ept01;
mod exit;
mod guest_cpuid;
mod guest_cr;
mod guest_msr;
mod handover;
mod host;
mod l1;
#[cfg(freestanding)]
mod lang;
mod machine;
mod madt;
mod msr;
mod mtrr;
mod multiboot;
mod options;
mod paging;
mod phys;
mod processor;
mod region;
mod smp;
mod trap;
mod vcpu;
mod world;

use alloc::vec::Vec;
use core::arch::x86_64::{__cpuid, __cpuid_count};

use arrayvec::ArrayVec;
use nvmx::caps::{Caps, HardwareCaps};
use nvmx::engine::{self, Config, Nested};
use nvmx::paging::AddressSizes;
use vmx_defs::Hpa;
use vmx_defs::msr::{self as number, EptVpidCap, VmxMisc};

use crate::apic::LocalApic;
use crate::console::fail;
use crate::ept01::Ept01;
use crate::handover::Handover;
use crate::machine::Machine;
use crate::options::{Options, VmfuncMode};
use crate::phys::{PAGE, Span, direct};
use crate::region::Region;
use crate::vcpu::Vcpu;

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

/// A module's string as it was written: GRUB puts a backslash before quotes and backslashes.
fn as_written(string: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(string.len());
    let mut bytes = string.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let escaped = bytes.next_if(|next| byte == b'\\' && matches!(next, b'\\' | b'\'' | b'"'));
        text.push(escaped.unwrap_or(byte));
    }
    text
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

    let mut avoid: ArrayVec<Span, { handover::MAX_MODULES + 2 }> = ArrayVec::new();
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
            string: as_written(unsafe { bytes_at(module.string) }),
        })
        .collect();

    // Firmware puts tables into reserved memory, too.
    let end_of_map = handover.map.end_of_ram().max(1 << 32);
    // SAFETY: called once, here.
    unsafe { paging::move_image(&mut region, end_of_map) };
    let processor = processor::Processor::new(0, LocalApic::current().identifier());
    // SAFETY: this is the first processor.
    unsafe { processor.load() };

    let identifiers = match madt::processors(handover.acpi, end_of_map) {
        Ok(identifiers) => identifiers,
        Err(madt::TooMany) => fail(format_args!("more than 32 processors")),
    };
    if identifiers.is_empty() && may_have_others() {
        // L1 could find them in another way, and start them without L0.
        fail(format_args!("ACPI does not say which processors there are (no MADT)"));
    }

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
    if let Err(error) = vcpu::check_available() {
        fail(format_args!("{error}"));
    }
    let hardware = hardware_caps();
    let caps = match Caps::offered(&hardware) {
        Ok(caps) => caps,
        Err(missing) => fail(format_args!("the processor lacks {missing}")),
    };
    let others = smp::plan(&mut region, &identifiers);
    let is_smp = !others.is_empty();
    if is_smp && !smp::can_wait() {
        fail(format_args!("the processor can't wait for startup interrupts in a guest"));
    }
    let ept01 = Ept01::new(&mut region, hardware.physical_width, has_1g_ept_pages(&hardware));
    let start_page = handover.map.highest_place(PAGE, PAGE, START_PAGE_LIMIT, &[]);
    if let Some(page) = start_page {
        paging::map_start_page(&mut region, page.start);
    }
    let frames = vcpu::take_frames(&mut region);
    let pool = region.take_rest();
    let sizes = AddressSizes {
        physical_width: caps.physical_width,
        gigabyte_pages: __cpuid(0x8000_0001).edx & 1 << 26 != 0,
    };
    let nested = Nested::new(Config {
        sizes,
        caps,
        frames: Hpa::new(pool.start),
        frame_count: u32::try_from(pool.len() / PAGE).unwrap_or(u32::MAX),
        roots: ROOTS,
        processors: others.len() + 1,
        vmcs_cache: VMCS_CACHE,
        vmfunc: match options.vmfunc {
            VmfuncMode::Exitless | VmfuncMode::Emulated => engine::VmfuncMode::Emulated,
            VmfuncMode::Reload => engine::VmfuncMode::Reload,
        },
        ept01: ept01.eptp(),
        stint: is_smp.then(|| stint(&hardware)),
    });
    let machine =
        Machine::install(Machine::new(options, &map, nested, hardware, ept01, sizes, is_smp));
    smp::register(processor);
    if is_smp {
        apic::prepare_decoder();
        let Some(page) = start_page else { fail(format_args!("no RAM below 1 MiB")) };
        // SAFETY: once, here; the page is RAM and mapped to itself, and what L1 has there comes
        // back.
        unsafe { smp::start(machine, others, page.start) };
    }
    if let Some(page) = start_page {
        paging::unmap_start_page(page.start);
    }
    let stack_top = paging::boot_stack_top();
    // SAFETY: this is the first processor, and this function never returns to its stack.
    let mut vcpu = match unsafe { Vcpu::new(machine, processor, frames, stack_top) } {
        Ok(vcpu) => vcpu,
        Err(error) => fail(format_args!("{error}")),
    };
    drop(modules);
    if is_smp {
        vcpu.track_local_apic();
        say!("{} processors", smp::count());
    }
    say!("L1 starts at {:#x}", start.entry);
    // SAFETY: as above; vmcs01 is current.
    unsafe { vcpu.start_multiboot(start, stack_top) }
}

/// A startup interrupt begins below this address.
const START_PAGE_LIMIT: u64 = 0xA_0000;
/// Shadow roots that are kept: a full list of L1's for each of two VMCSs.
const ROOTS: u32 = 1024;
/// Time-stamp counts that L2 may run without an exit on a machine with several processors: some
/// milliseconds, which is how long another may have to wait for frames.
const STINT: u32 = 1 << 23;

/// The same in units of the VMX-preemption timer (SDM "VMX-Preemption Timer").
fn stint(hardware: &HardwareCaps) -> u32 {
    let rate = VmxMisc::from(hardware.msr(number::VMX_MISC)).preemption_timer_rate();
    (STINT >> rate).max(1)
}

/// VMCSs of L1 that are kept out of its memory.
const VMCS_CACHE: usize = 64;

/// Whether CPUID leaves room for other processors in this package: HTT, and the number of
/// identifiers reserved for them.
fn may_have_others() -> bool {
    let leaf = __cpuid(1);
    leaf.edx & 1 << 28 != 0 && leaf.ebx >> 16 & 0xFF > 1
}

fn has_1g_ept_pages(hardware: &HardwareCaps) -> bool {
    EptVpidCap::from_bits_retain(hardware.msr(number::VMX_EPT_VPID_CAP))
        .contains(EptVpidCap::PAGE_1G)
}

/// What this processor reports of VMX, and of what VM entries check.
fn hardware_caps() -> HardwareCaps {
    let sizes = __cpuid(0x8000_0008).eax;
    let extended = __cpuid(0x8000_0001).edx;
    let has_leaf_7 = __cpuid(0).eax >= 7;
    let structured = __cpuid_count(7, 0);
    let bit = |word: u32, from: u32, to: u32| u64::from(word >> from & 1) << to;
    let mut hardware = HardwareCaps {
        msrs: HardwareCaps::read_msrs(msr::read),
        physical_width: sizes as u8,
        linear_width: (sizes >> 8) as u8,
        // SCE with SYSCALL, LME and LMA with 64-bit mode, NXE with execute-disable.
        efer: bit(extended, 11, 0)
            | bit(extended, 29, 8)
            | bit(extended, 29, 10)
            | bit(extended, 20, 11),
        debugctl: 3 | if has_leaf_7 {
            bit(structured.ecx, 24, 2) | bit(structured.ebx, 11, 15)
        } else {
            0
        },
        // Hidden.
        sgx: false,
    };
    let greatest = ept01::greatest_width(has_1g_ept_pages(&hardware));
    hardware.physical_width = hardware.physical_width.min(greatest);
    hardware
}
