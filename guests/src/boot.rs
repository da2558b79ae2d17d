//! Answers: how does the processor get from the boot loader's 32-bit entry to Rust?
//!
//! The loader (GRUB's `multiboot`, or an L0 that follows the Multiboot specification, version 1)
//! enters `_start` in 32-bit protected mode without paging. The entry keeps the two registers of
//! the specification, enables SSE (the prebuilt `core` uses it), maps the low 4 GiB one to one
//! with 2-MiB pages, enters 64-bit mode and calls `guest_entry`.

use core::arch::global_asm;

use crate::{gdt, machine, multiboot, power, serial, single::Single, traps};

global_asm!(
    r#"
.section .multiboot, "a"
.balign 8
    .long 0x1BADB002            /* magic */
    .long 0x00000003            /* modules page-aligned; memory information wanted */
    .long -(0x1BADB002 + 0x00000003)

.section .data.boot_tables, "aw"
.balign 4096
boot_pml4:
    .quad boot_pdpt + 0x7
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x0007
    .quad boot_pd + 0x1007
    .quad boot_pd + 0x2007
    .quad boot_pd + 0x3007
    .fill 508, 8, 0
boot_pd:
    .set .Lframe, 0
    .rept 2048
    .quad .Lframe + 0x87        /* present, writable, CPL 3 too, 2 MiB */
    .set .Lframe, .Lframe + 0x200000
    .endr

boot_gdt:
    .quad 0
    .quad 0x00AF9A000000FFFF    /* 64-bit code */
    .quad 0x00CF92000000FFFF    /* data */
boot_gdt_end:
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt

.section .bss.boot_stack, "aw", @nobits
.balign 4096
boot_stack:
    .skip 256 * 1024
boot_stack_top:

.section .text.boot, "ax"
.code32
.global _start
_start:
    cli
    cld
    mov esp, offset boot_stack_top
    mov edi, eax                /* the loader's magic */
    mov esi, ebx                /* the boot information */

    mov eax, cr4
    or eax, 0x620               /* PAE, OSFXSR, OSXMMEXCPT */
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xC0000080         /* IA32_EFER */
    rdmsr
    or eax, 0x900               /* LME, NXE */
    wrmsr
    mov eax, cr0
    and eax, 0xFFFFFFFB         /* no FPU emulation */
    or eax, 0x80010022          /* PG, WP, NE, MP */
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    push 0x08
    mov eax, offset boot_long
    push eax
    retf

.code64
boot_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    fninit
    mov edi, edi
    mov esi, esi
    mov esp, offset boot_stack_top
    xor ebp, ebp
    call {entry}
    ud2
"#,
    entry = sym guest_entry,
);

/// What the image runs once the machine is set up. Returns whether it passed.
pub type Main = fn(&'static multiboot::Info) -> bool;

unsafe extern "Rust" {
    /// Defined by each image through [`entry_point!`](crate::entry_point).
    safe fn nvmx_guest_main(info: &'static multiboot::Info) -> bool;
}

/// Makes `$main`, a [`Main`], the program of this image. On a host build, where the binary is an
/// ordinary program that can't run a hypervisor, it defines a `main` that says so.
#[macro_export]
macro_rules! entry_point {
    ($main:path) => {
        #[cfg(image)]
        #[unsafe(no_mangle)]
        fn nvmx_guest_main(info: &'static $crate::multiboot::Info) -> bool {
            let main: $crate::boot::Main = $main;
            main(info)
        }

        #[cfg(not(image))]
        fn main() {
            let _main: $crate::boot::Main = $main;
            eprintln!("a freestanding image: build it with `cargo xtask build`");
            std::process::exit(2);
        }
    };
}

static INFO: Single<multiboot::Info> = Single::new(multiboot::Info::EMPTY);

extern "C" fn guest_entry(magic: u32, information: u32) -> ! {
    serial::init();
    machine::mask_interrupts();
    gdt::load();
    traps::load();
    // SAFETY: runs once, before anything else can hold a reference to INFO.
    let info = unsafe { &mut *INFO.get() };
    if let Err(problem) = multiboot::read(magic, information, info) {
        crate::println!("guest: {problem}");
        power::end(false);
    }
    let passed = nvmx_guest_main(info);
    power::end(passed)
}
