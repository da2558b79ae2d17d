//! What happens when an exception or an NMI comes while L0 itself runs?
//!
//! Every gate has a stack of its own kind (the prebuilt `core` may use the red zone). An NMI is
//! recorded and owed to L1. A fault at an instruction that is allowed to fault (an MSR access on
//! L1's behalf) goes on at its landing. Everything else is a bug of ours and ends the machine.

use core::fmt::Write;

use spin::Once;

use crate::console;
use crate::processor::{CODE, Processor};

const VECTORS: usize = 32;
/// The limit of the interrupt descriptor table.
pub(crate) const IDT_LIMIT: u16 = (VECTORS * 16 - 1) as u16;

const NMI: u64 = 2;
const DOUBLE_FAULT: u64 = 8;
const MACHINE_CHECK: u64 = 18;

/// The interrupted state, as the assembly below saves it.
#[repr(C)]
#[derive(Debug)]
struct TrapFrame {
    xmm: [u128; 16],
    /// R15 down to R8, RDI, RSI, RBP, RBX, RDX, RCX, RAX.
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
    ss: u64,
}

#[cfg(freestanding)]
core::arch::global_asm!(
    r#"
    .text
    .balign 16
    .global nvmx_trap_stubs
    nvmx_trap_stubs:
    .set vector, 0
    .rept 32
        .balign 16
        .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
        .else
            push 0
        .endif
        push vector
        jmp trap_common
        .set vector, vector + 1
    .endr

    trap_common:
        push rax
        push rcx
        push rdx
        push rbx
        push rbp
        push rsi
        push rdi
        push r8
        push r9
        push r10
        push r11
        push r12
        push r13
        push r14
        push r15
        sub rsp, 256
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps [rsp + \n * 16], xmm\n
        .endr
        cld
        mov rdi, rsp
        call {trapped}
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps xmm\n, [rsp + \n * 16]
        .endr
        add rsp, 256
        pop r15
        pop r14
        pop r13
        pop r12
        pop r11
        pop r10
        pop r9
        pop r8
        pop rdi
        pop rsi
        pop rbp
        pop rbx
        pop rdx
        pop rcx
        pop rax
        add rsp, 16
        iretq
    "#,
    trapped = sym trapped,
);

unsafe extern "C" {
    static nvmx_trap_stubs: u8;
    static nvmx_rdmsr_instruction: u8;
    static nvmx_wrmsr_instruction: u8;
    static nvmx_xsetbv_instruction: u8;
    static nvmx_fault_landing: u8;
    static nvmx_entry_check: u8;
    static nvmx_entry_instruction: u8;
    static nvmx_entry_retry: u8;
}

static IDT: Once<[[u64; 2]; VECTORS]> = Once::new();

/// Linear address of the interrupt descriptor table, the same for all processors.
pub(crate) fn idt_base() -> u64 {
    let table = IDT.call_once(|| {
        let stubs = (&raw const nvmx_trap_stubs) as u64;
        core::array::from_fn(|vector| {
            let stub = stubs + vector as u64 * 16;
            let ist = match vector as u64 {
                NMI => 2,
                DOUBLE_FAULT => 3,
                MACHINE_CHECK => 4,
                _ => 1,
            };
            // An interrupt gate, present (SDM "64-Bit Mode IDT").
            let low = stub & 0xFFFF
                | u64::from(CODE) << 16
                | ist << 32
                | 0x8E00 << 32
                | (stub >> 16 & 0xFFFF) << 48;
            [low, stub >> 32]
        })
    });
    table.as_ptr() as u64
}

fn is_allowed_to_fault(rip: u64) -> bool {
    rip == (&raw const nvmx_rdmsr_instruction) as u64
        || rip == (&raw const nvmx_wrmsr_instruction) as u64
        || rip == (&raw const nvmx_xsetbv_instruction) as u64
}

/// Called by every gate.
unsafe extern "C" fn trapped(frame: *mut TrapFrame) {
    // SAFETY: the assembly passes the frame that it has just built, on this gate's own stack.
    let frame = unsafe { &mut *frame };
    if frame.vector == NMI {
        Processor::current().take_nmi();
        // Between the last look at the flag and the entry to the guest: look again.
        let check = (&raw const nvmx_entry_check) as u64;
        let entry = (&raw const nvmx_entry_instruction) as u64;
        if (check..=entry).contains(&frame.rip) {
            frame.rip = (&raw const nvmx_entry_retry) as u64;
        }
        return;
    }
    // General protection is what RDMSR, WRMSR and XSETBV raise.
    if frame.vector == 13 && is_allowed_to_fault(frame.rip) {
        frame.rip = (&raw const nvmx_fault_landing) as u64;
        return;
    }
    let mut text = arrayvec::ArrayString::<256>::new();
    let _ = write!(
        text,
        "L0 fault: vector {} error {:#x} at {:#x}, CR2 {:#x}, RSP {:#x}",
        frame.vector,
        frame.error,
        frame.rip,
        x86_64::registers::control::Cr2::read_raw(),
        frame.rsp,
    );
    console::fail(format_args!("{text}"))
}
