//! Answers: what happens when this hypervisor itself faults?
//!
//! [`catch`] runs a closure and gives back a [`Fault`] if it raised an exception (or panicked):
//! instruction tests need that (VMXON in a wrong mode is #UD or #GP), and the harness puts each
//! case in one, so that a fault fails only its case. The closure's frames are dropped without
//! running destructors, so nothing in this program may rely on them.

use core::{
    arch::{asm, global_asm},
    mem::ManuallyDrop,
    panic::PanicInfo,
    ptr,
};

use arrayvec::ArrayString;
use x86_64::{
    VirtAddr, instructions::tables::lidt, registers::control::Cr2,
    structures::DescriptorTablePointer,
};

use crate::{gdt, power, single::Single, smp};

/// An exception that [`catch`] caught.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The vector; [`Fault::PANIC`] if it was a panic of this program instead.
    pub vector: u64,
    /// The error code, 0 for exceptions that have none.
    pub error_code: u64,
    /// CR2 at the time.
    pub cr2: u64,
    /// Where it happened.
    pub rip: u64,
}

impl Fault {
    /// Stands for a panic in [`Fault::vector`]; its text is [`panic_text`].
    pub const PANIC: u64 = 0x100;
}

global_asm!(
    r#"
.macro stub_plain vector
    .balign 16
    push 0
    push \vector
    jmp trap_entry
.endm
.macro stub_code vector
    .balign 16
    push \vector
    jmp trap_entry
.endm

.text
.balign 16
trap_stubs:
    .set .Lvector, 0
    .rept 32
    .if (.Lvector == 8) || (.Lvector == 10) || (.Lvector == 11) || (.Lvector == 12) || (.Lvector == 13) || (.Lvector == 14) || (.Lvector == 17) || (.Lvector == 21) || (.Lvector == 29) || (.Lvector == 30)
    stub_code .Lvector
    .else
    stub_plain .Lvector
    .endif
    .set .Lvector, .Lvector + 1
    .endr

.balign 16
trap_entry:
    cld
    mov rdi, rsp                /* vector, error code, RIP, CS, RFLAGS, RSP, SS */
    and rsp, -16
    call {on_trap}
    ud2

/* fn(landing: *mut u64, run: extern "C" fn(*mut u8), data: *mut u8) -> u64: 1 if it did not end */
.balign 16
trap_catch:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rdi], rsp
    mov rdi, rdx
    sub rsp, 8
    call rsi
    add rsp, 8
    xor eax, eax
    jmp 2f
/* fn(landing: u64) -> !: leaves every frame above that landing */
trap_land:
    mov rsp, rdi
    mov eax, 1
2:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
"#,
    on_trap = sym on_trap,
);

unsafe extern "C" {
    static trap_stubs: u8;
    fn trap_catch(landing: *mut u64, run: extern "C" fn(*mut u8), data: *mut u8) -> u64;
    fn trap_land(landing: u64) -> !;
}

const VECTORS: usize = 32;

#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Gate(u64, u64);
static GATES: Single<[Gate; VECTORS]> = Single::new([Gate(0, 0); VECTORS]);

/// Stack pointer of the innermost [`catch`], 0 if there is none.
static LANDING: Single<u64> = Single::new(0);
static CAUGHT: Single<Fault> = Single::new(Fault { vector: 0, error_code: 0, cr2: 0, rip: 0 });
static PANIC_TEXT: Single<ArrayString<200>> = Single::new(ArrayString::new_const());

/// Address of the IDT.
pub fn table_base() -> u64 {
    GATES.get() as u64
}

/// Fills and loads the IDT.
pub fn load() {
    // SAFETY: runs at boot while no reference to GATES is held. Each gate points to one of the
    // 32 stubs, which lie 16 bytes apart; the DF stack exists once the TSS is loaded.
    unsafe {
        let gates = &mut *GATES.get();
        let stubs = &raw const trap_stubs as u64;
        for (vector, gate) in gates.iter_mut().enumerate() {
            let target = stubs + vector as u64 * 16;
            let stack = if vector == 8 { u64::from(gdt::DOUBLE_FAULT_STACK) } else { 0 };
            gate.0 = (target & 0xFFFF)
                | u64::from(gdt::CODE64) << 16
                | stack << 32
                | 0x8E << 40
                | (target >> 16 & 0xFFFF) << 48;
            gate.1 = target >> 32;
        }
        lidt(&DescriptorTablePointer {
            limit: (VECTORS * 16 - 1) as u16,
            base: VirtAddr::new(table_base()),
        });
    }
}

#[repr(C)]
struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

extern "C" fn on_trap(frame: &Frame) -> ! {
    let fault = Fault {
        vector: frame.vector,
        error_code: frame.error_code,
        cr2: Cr2::read_raw(),
        rip: frame.rip,
    };
    give_up(fault)
}

/// Ends the innermost [`catch`] with `fault`; with none, ends the machine.
fn give_up(fault: Fault) -> ! {
    // SAFETY: LANDING and CAUGHT are only used here and in `catch`, which is not running now.
    unsafe {
        let landing = *LANDING.get();
        if landing != 0 {
            *CAUGHT.get() = fault;
            trap_land(landing);
        }
    }
    if fault.vector == Fault::PANIC {
        crate::println!("guest: panic: {}", panic_text());
    } else {
        crate::println!(
            "guest: exception {} (error code {:#x}) at {:#x}, CR2 {:#x}",
            fault.vector,
            fault.error_code,
            fault.rip,
            fault.cr2
        );
    }
    power::end(false)
}

/// What the last panic said.
pub fn panic_text() -> &'static str {
    // SAFETY: written only by a panic, after which the reader runs.
    unsafe { (*PANIC_TEXT.get()).as_str() }
}

/// What the image's panic handler does: a panic is a fault of its case.
pub fn on_panic(info: &PanicInfo<'_>) -> ! {
    if smp::is_other() {
        smp::on_panic(info);
    }
    // SAFETY: no reader of PANIC_TEXT is running.
    let text = unsafe { &mut *PANIC_TEXT.get() };
    text.clear();
    // A text that does not fit is cut short.
    let _ = core::fmt::Write::write_fmt(text, format_args!("{}", info.message()));
    if let Some(place) = info.location() {
        let _ =
            core::fmt::Write::write_fmt(text, format_args!(" ({}:{})", place.file(), place.line()));
    }
    give_up(Fault { vector: Fault::PANIC, error_code: 0, cr2: 0, rip: 0 })
}

struct Closure<F, R> {
    run: ManuallyDrop<F>,
    result: Option<R>,
}

extern "C" fn call<F: FnOnce() -> R, R>(data: *mut u8) {
    // SAFETY: `catch` passes its own `Closure<F, R>`, and calls once.
    unsafe {
        let closure = &mut *data.cast::<Closure<F, R>>();
        let run = ManuallyDrop::take(&mut closure.run);
        closure.result = Some(run());
    }
}

/// Runs `run`; an exception or a panic in it ends it and is the error.
///
/// The flags that the closure changed in CR0, CR4 or MSRs stay changed.
pub fn catch<F: FnOnce() -> R, R>(run: F) -> Result<R, Fault> {
    let mut closure = Closure { run: ManuallyDrop::new(run), result: None };
    // SAFETY: `trap_catch` stores its stack pointer in LANDING, which stays valid until it
    // returns; the outer landing is put back at once. The fault path jumps over frames of
    // `run` only, whose destructors this program does not rely on. The pointer to the closure is
    // volatile to the compiler because it escapes into `trap_catch`.
    unsafe {
        let outer = *LANDING.get();
        let data = (&raw mut closure).cast::<u8>();
        let failed = trap_catch(LANDING.get(), call::<F, R>, data);
        ptr::write_volatile(LANDING.get(), outer);
        if failed != 0 {
            // A fault may come while string instructions run backwards or with AC set.
            asm!("cld", options(nostack));
            return Err(*CAUGHT.get());
        }
    }
    closure.result.ok_or(Fault { vector: Fault::PANIC, error_code: 0, cr2: 0, rip: 0 })
}
