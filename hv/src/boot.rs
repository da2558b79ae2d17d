//! How does the processor come from GRUB's 32-bit hand-over to 64-bit Rust?
//!
//! The assembly here holds the multiboot2 header, checks for a 64-bit processor, builds the first
//! page tables (4 GiB identity, and the same again at the direct map's address), enables SSE before
//! any Rust runs (the prebuilt `core` uses it), and calls `start_of_rust`.

#[cfg(freestanding)]
core::arch::global_asm!(
    r#"
    .section .boot.header, "a"
    .balign 8
    mb2_header:
        .long 0xE85250D6, 0, mb2_header_end - mb2_header
        .long -(0xE85250D6 + 0 + (mb2_header_end - mb2_header))
        .short 0, 0
        .long 8
    mb2_header_end:

    .section .boot.text, "ax"
    .code32
    .global nvmx_start32
    nvmx_start32:
        cli
        cld
        mov esp, offset nvmx_boot_stack_top
        mov esi, offset text_not_multiboot2
        cmp eax, 0x36D76289
        jne boot_fail
        mov edi, ebx                    // multiboot2 information, kept to the end

        mov eax, 0x80000000
        cpuid
        mov esi, offset text_not_64bit
        cmp eax, 0x80000001
        jb boot_fail
        mov eax, 0x80000001
        cpuid
        bt edx, 29                      // long mode
        jnc boot_fail
        bt edx, 20                      // execute-disable
        jnc boot_fail

        // PML4[0] and PML4[256] -> one PDPT -> four directories of 2M pages.
        mov eax, offset boot_pdpt + 3
        mov dword ptr [boot_pml4], eax
        mov dword ptr [boot_pml4 + 256 * 8], eax
        mov eax, offset boot_pd + 3
        mov ecx, 0
    1:  mov dword ptr [boot_pdpt + ecx * 8], eax
        add eax, 4096
        inc ecx
        cmp ecx, 4
        jb 1b
        mov ecx, 0
        mov eax, 0x83
    2:  mov dword ptr [boot_pd + ecx * 8], eax
        add eax, 0x200000
        inc ecx
        cmp ecx, 2048
        jb 2b

        mov eax, cr4
        or eax, 0x620                   // PAE, OSFXSR, OSXMMEXCPT
        mov cr4, eax
        mov eax, offset boot_pml4
        mov cr3, eax
        mov ecx, 0xC0000080
        rdmsr
        or eax, 0x900                   // LME, NXE
        wrmsr
        mov eax, cr0
        and eax, 0x9FFFFFF3             // no CD, NW, EM, TS
        or eax, 0x80010022              // PG, WP, NE, MP
        mov cr0, eax
        lgdt [boot_gdt_pointer]
        push 8
        mov eax, offset boot_start64
        push eax
        retf

    // ESI: text ending in NUL. Printed on COM1 as the firmware left it, then the machine ends.
    boot_fail:
        mov dx, 0x3F8
    3:  lodsb
        test al, al
        jz 4f
        out dx, al
        jmp 3b
    4:  mov esi, offset text_shutdown
        mov dx, 0x8900
    5:  lodsb
        test al, al
        jz 6f
        out dx, al
        jmp 5b
    6:  cli
        hlt
        jmp 6b

    .code64
    boot_start64:
        xor eax, eax
        mov ds, eax
        mov es, eax
        mov ss, eax
        mov fs, eax
        mov gs, eax
        lea rsp, [nvmx_boot_stack_top]
        mov edi, edi
        xor ebp, ebp
        call {start}
        ud2

    .section .rodata.boot, "a"
    text_not_multiboot2: .asciz "nvmx: not started by a multiboot2 loader\r\n"
    text_not_64bit: .asciz "nvmx: the processor has no 64-bit mode with execute-disable\r\n"
    text_shutdown: .asciz "Shutdown"
    .balign 8
    boot_gdt: .quad 0, 0x00AF9A000000FFFF
    boot_gdt_pointer: .short 15
        .long boot_gdt

    .section .bss.boot, "aw", @nobits
    .balign 4096
    boot_pml4: .skip 4096
    boot_pdpt: .skip 4096
    boot_pd: .skip 4 * 4096
    .global nvmx_boot_stack_guard, nvmx_boot_stack_top
    nvmx_boot_stack_guard: .skip 4096
    .skip {stack}
    nvmx_boot_stack_top:
    "#,
    start = sym crate::start_of_rust,
    stack = const BOOT_STACK,
);

/// Bytes of the stack that the first processor boots on.
#[cfg(freestanding)]
const BOOT_STACK: usize = 128 * 1024;
