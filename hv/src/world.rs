//! How does a processor go into a guest and come back?
//!
//! One stack a processor, whose top is the host RSP of every VMCS: an exit begins there, saves the
//! guest's general registers and XMM0 to XMM15 (the prebuilt `core` uses them; nothing of L0 uses
//! wider ones), calls [`crate::exit::handle`], restores and enters again. Nothing of L0 lives on
//! the stack from one exit to the next.

#[cfg(freestanding)]
core::arch::global_asm!(
    r#"
    .text
    .balign 16
    .global nvmx_vm_exit, nvmx_first_entry
    .global nvmx_entry_check, nvmx_entry_instruction, nvmx_entry_retry

    // An NMI came after the last look at the flag: nothing was entered, look again.
    nvmx_entry_retry:
        mov dword ptr gs:[8], {retry}
        jmp nvmx_vm_exit
    nvmx_entry_failed:
        mov dword ptr gs:[8], {entry_failed}
    // The host RIP of every VMCS. The order of the pushes is that of `nvmx::Gprs`.
    nvmx_vm_exit:
        push r15
        push r14
        push r13
        push r12
        push r11
        push r10
        push r9
        push r8
        push rdi
        push rsi
        push rbp
        push 0
        push rbx
        push rdx
        push rcx
        push rax
        sub rsp, 256
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps [rsp + \n * 16], xmm\n
        .endr
        lea rdi, [rsp + 256]
        cld
        call {handle}
    nvmx_enter:
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps xmm\n, [rsp + \n * 16]
        .endr
        add rsp, 256
        pop rax
        pop rcx
        pop rdx
        pop rbx
        add rsp, 8
        pop rbp
        pop rsi
        pop rdi
        pop r8
        pop r9
        pop r10
        pop r11
        pop r12
        pop r13
        pop r14
        pop r15
    nvmx_entry_check:
        cmp dword ptr gs:[0], 0
        jne nvmx_entry_retry
        cmp dword ptr gs:[4], 0
        jne nvmx_entry_instruction
        vmresume
        // The guest's registers are still in place.
        jmp nvmx_entry_failed
    nvmx_entry_instruction:
        vmlaunch
        jmp nvmx_entry_failed

    // RDI: the guest's first general registers. RSI: the top of the stack.
    nvmx_first_entry:
        lea rsp, [rsi - 384]
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        pxor xmm\n, xmm\n
        movaps [rsp + \n * 16], xmm\n
        .endr
        mov rsi, rdi
        lea rdi, [rsp + 256]
        mov ecx, 16
        cld
        rep movsq
        jmp nvmx_enter
    "#,
    handle = sym crate::exit::handle,
    retry = const RETRY,
    entry_failed = const ENTRY_FAILED,
);

/// Why the exit path is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A VM exit.
    Exit,
    /// An NMI came before the guest was entered: nothing has happened.
    Retry,
    /// The guest was not entered: the instruction failed.
    EntryFailed,
}

/// [`Event::Retry`] as the assembly leaves it at GS:8.
pub(crate) const RETRY: u32 = 1;
/// [`Event::EntryFailed`] as the assembly leaves it at GS:8.
pub(crate) const ENTRY_FAILED: u32 = 2;

unsafe extern "C" {
    static nvmx_vm_exit: u8;
    fn nvmx_first_entry(registers: *const nvmx::Gprs, stack_top: u64) -> !;
}

/// The host RIP of every VMCS.
pub(crate) fn exit_address() -> u64 {
    (&raw const nvmx_vm_exit) as u64
}

/// Enters the guest of the current VMCS for the first time and never comes back here.
///
/// # Safety
/// The current VMCS is complete and clear, its host RSP is `stack_top`, 16-byte aligned, and
/// nothing that is still needed lives on that stack.
pub(crate) unsafe fn first_entry(registers: &nvmx::Gprs, stack_top: u64) -> ! {
    // SAFETY: as the caller promises.
    unsafe { nvmx_first_entry(registers, stack_top) }
}
