//! Answers: how does the processor get into L2 and back?

use core::{arch::global_asm, mem::offset_of};

use super::vm::Registers;

global_asm!(
    r#"
.text
/* fn(registers: *mut Registers, launched: u64) -> u64: 0 after an exit, else CF + 2 * ZF */
.balign 16
vmx_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rdi
    cmp rsp, [rdi + {host_rsp}]
    je 2f
    mov eax, 0x6C14                     /* host RSP: a VMWRITE only when it changes */
    vmwrite rax, rsp
    mov [rdi + {host_rsp}], rsp
2:
    test rsi, rsi
    mov rax, [rdi + {rax}]
    mov rcx, [rdi + {rcx}]
    mov rdx, [rdi + {rdx}]
    mov rbx, [rdi + {rbx}]
    mov rbp, [rdi + {rbp}]
    mov rsi, [rdi + {rsi}]
    mov r8,  [rdi + {r8}]
    mov r9,  [rdi + {r8} + 8]
    mov r10, [rdi + {r8} + 16]
    mov r11, [rdi + {r8} + 24]
    mov r12, [rdi + {r8} + 32]
    mov r13, [rdi + {r8} + 40]
    mov r14, [rdi + {r8} + 48]
    mov r15, [rdi + {r8} + 56]
    mov rdi, [rdi + {rdi}]
    jne 3f
    vmlaunch
    jmp 4f
3:
    vmresume
4:
    setc al
    setz cl
    movzx eax, al
    movzx ecx, cl
    lea eax, [rax + rcx * 2]
    add rsp, 8
    jmp 5f

.balign 16
vmx_exit:
    push rdi
    mov rdi, [rsp + 8]
    mov [rdi + {rax}], rax
    mov [rdi + {rcx}], rcx
    mov [rdi + {rdx}], rdx
    mov [rdi + {rbx}], rbx
    mov [rdi + {rbp}], rbp
    mov [rdi + {rsi}], rsi
    mov [rdi + {r8}], r8
    mov [rdi + {r8} + 8], r9
    mov [rdi + {r8} + 16], r10
    mov [rdi + {r8} + 24], r11
    mov [rdi + {r8} + 32], r12
    mov [rdi + {r8} + 40], r13
    mov [rdi + {r8} + 48], r14
    mov [rdi + {r8} + 56], r15
    pop [rdi + {rdi}]
    add rsp, 8
    xor eax, eax
5:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"#,
    host_rsp = const offset_of!(Registers, host_rsp),
    rax = const offset_of!(Registers, rax),
    rcx = const offset_of!(Registers, rcx),
    rdx = const offset_of!(Registers, rdx),
    rbx = const offset_of!(Registers, rbx),
    rbp = const offset_of!(Registers, rbp),
    rsi = const offset_of!(Registers, rsi),
    rdi = const offset_of!(Registers, rdi),
    r8 = const offset_of!(Registers, r8),
);

unsafe extern "C" {
    fn vmx_enter(registers: *mut Registers, launched: u64) -> u64;
    fn vmx_exit();
}

/// The host-RIP field's value: where an exit arrives.
pub(super) fn exit_address() -> u64 {
    vmx_exit as *const () as u64
}

/// VMLAUNCH, or VMRESUME if `launched`, with L2's registers from and to `registers`. Returns 0
/// after an exit, else the instruction's CF and 2 for its ZF.
///
/// # Safety
/// The current VMCS has this program's host state with [`exit_address`] as RIP, and L2 can't change
/// this program's memory in a way that Rust's rules forbid.
pub(super) unsafe fn enter(registers: &mut Registers, launched: bool) -> u64 {
    // SAFETY: the registers outlive the call; the rest is the caller's promise.
    unsafe { vmx_enter(registers, u64::from(launched)) }
}
