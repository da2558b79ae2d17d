//! How do the other processors come under L0, and how do they become L1's?
//!
//! Each is started once, on a page below 1 MiB that is borrowed for it, and enters VMX operation.
//! Then it waits in its VMCS for the startup interrupt that L1 will send: that one is real, and an
//! exit. INIT never is, since a processor in VMX operation must not get it: L1's INIT is a request
//! that the target finds when it is kicked.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use arrayvec::ArrayVec;
use spin::Mutex;
use vmx_defs::msr::{VMX_MISC, VmxMisc};
use x86_64::instructions::port::Port;

use crate::apic::LocalApic;
use crate::console::fail;
use crate::machine::Machine;
use crate::madt::MAX_PROCESSORS;
use crate::msr;
use crate::paging;
use crate::phys::{PAGE, direct};
use crate::processor::Processor;
use crate::region::Region;
use crate::vcpu::{self, Vcpu, VmxFrames};

#[cfg(freestanding)]
core::arch::global_asm!(
    r#"
    .section .rodata.trampoline, "a"
    .balign 16
    .global nvmx_trampoline, nvmx_trampoline_end
    // The startup interrupt begins here, at offset 0 of a segment of its own. The data stand at
    // fixed offsets (see `offset`): an operand can't name two labels.
    .code16
    nvmx_trampoline:
        jmp 1f
    .org nvmx_trampoline + 8
        .quad 0                         // CR3
        .quad 0                         // stack
        .quad 0                         // entry
        .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF
        .short 31                       // GDT pointer
        .long 0
    .org nvmx_trampoline + 80
    1:  cli
        cld
        mov ax, cs
        mov ds, ax
        movzx ebx, ax
        shl ebx, 4
        lgdtd [64]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        // A far jump to 32-bit code; the first processor fills in the address.
        jmp 2f
    .org nvmx_trampoline + 126
    2:  .byte 0x66, 0xEA
        .long 0
        .short 8
    .org nvmx_trampoline + 144
    .code32
        mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        lea esp, [ebx + 4096]
        mov eax, 0x620                  // PAE, OSFXSR, OSXMMEXCPT
        mov cr4, eax
        mov eax, [ebx + 8]
        mov cr3, eax
        mov ecx, 0xC0000080
        rdmsr
        or eax, 0x900                   // LME, NXE
        wrmsr
        mov eax, 0x80010033             // PG, WP, NE, ET, MP, PE; caches on
        mov cr0, eax
        lea eax, [ebx + 256]
        push 0x18
        push eax
        retf
    .org nvmx_trampoline + 256
    .code64
        mov ebx, ebx
        mov rsp, [rbx + 16]
        mov rax, [rbx + 24]
        xor ebp, ebp
        call rax
        ud2
    nvmx_trampoline_end:
    "#
);

unsafe extern "C" {
    static nvmx_trampoline: u8;
    static nvmx_trampoline_end: u8;
}

/// Offsets in the trampoline, as the assembly has them.
mod offset {
    pub(super) const CR3: u64 = 8;
    pub(super) const STACK: u64 = 16;
    pub(super) const ENTRY: u64 = 24;
    pub(super) const GDT: u64 = 32;
    /// The address in the GDT pointer.
    pub(super) const GDT_BASE: u64 = 66;
    /// The address in the far jump.
    pub(super) const FAR: u64 = 128;
    pub(super) const PROTECTED: u64 = 144;
}

/// Bytes of another processor's stack.
const STACK: u64 = 64 * 1024;
/// Writes to port 80H, a microsecond each on a PC, for 10 milliseconds.
const INIT_DELAY: u32 = 10_000;
/// The same for the 200 microseconds between two startup interrupts.
const STARTUP_DELAY: u32 = 200;
/// And for the second that a processor may take to come up.
const START_PATIENCE: u32 = 1_000_000;
/// Looks at a request before its target is taken for lost.
const RESET_PATIENCE: u32 = 100_000_000;

/// What another processor is given.
#[derive(Debug)]
pub(crate) struct OtherProcessor {
    identifier: u32,
    frames: VmxFrames,
    stack_top: u64,
}

/// The one that is being started.
static STARTING: Mutex<Option<(&'static Machine, OtherProcessor, u32)>> = Mutex::new(None);
/// Twice the number of the last processor that is up, or 1 less while it is on its way.
static STARTED: AtomicU32 = AtomicU32::new(0);
type Targets = ArrayVec<&'static Processor, MAX_PROCESSORS>;

static ALL: Mutex<Targets> = Mutex::new(Targets::new_const());

/// Makes a processor known to the others.
pub(crate) fn register(processor: &'static Processor) {
    ALL.lock().push(processor);
}

/// Takes memory for the processors with these identifiers, this one's left out.
pub(crate) fn plan(region: &mut Region, identifiers: &[u32]) -> Vec<OtherProcessor> {
    let own = LocalApic::current().identifier();
    identifiers
        .iter()
        .filter(|identifier| **identifier != own)
        .map(|&identifier| OtherProcessor {
            identifier,
            frames: vcpu::take_frames(region),
            stack_top: direct::<u8>(region.take_frames(STACK / PAGE) + STACK) as u64,
        })
        .collect()
}

/// Starts `others`, one by one, on the borrowed page at `page`, which afterwards is as it was.
///
/// # Safety
/// Once, on the first processor; `page` is RAM below 1 MiB that the final tables map to itself.
pub(crate) unsafe fn start(machine: &'static Machine, others: Vec<OtherProcessor>, page: u64) {
    let start = (&raw const nvmx_trampoline) as u64;
    let len = (&raw const nvmx_trampoline_end) as u64 - start;
    let mut kept = alloc::vec![0_u8; PAGE as usize];
    // SAFETY: the page is RAM, seen through the direct map, that nobody runs on or uses; the
    // trampoline fits it, and the fields are where the offsets say.
    unsafe {
        direct::<u8>(page).copy_to_nonoverlapping(kept.as_mut_ptr(), kept.len());
        direct::<u8>(page).copy_from_nonoverlapping(&raw const nvmx_trampoline, len as usize);
        let word = |at: u64, value: u64| direct::<u32>(page + at).write_unaligned(value as u32);
        word(offset::FAR, page + offset::PROTECTED);
        word(offset::GDT_BASE, page + offset::GDT);
        direct::<u64>(page + offset::CR3).write_volatile(paging::root());
        direct::<u64>(page + offset::ENTRY).write_volatile(start_of_other as *const () as u64);
    }
    let apic = LocalApic::current();
    for (number, other) in others.into_iter().enumerate() {
        let identifier = other.identifier;
        // SAFETY: as above.
        unsafe {
            direct::<u64>(page + offset::STACK).write_volatile(other.stack_top);
        }
        let number = number as u32 + 1;
        *STARTING.lock() = Some((machine, other, number));
        apic.send_init(identifier);
        delay(INIT_DELAY, || false);
        for _ in 0..2 {
            apic.send_startup(identifier, (page >> 12) as u8);
            // A second one for a processor that is up already would be taken for L1's.
            if delay(STARTUP_DELAY, || STARTED.load(Ordering::Acquire) >= 2 * number - 1) {
                break;
            }
        }
        if !delay(START_PATIENCE, || STARTED.load(Ordering::Acquire) == 2 * number) {
            // L1 could start it without L0.
            fail(format_args!("the processor with APIC identifier {identifier} does not start"));
        }
    }
    // SAFETY: as above; all processors have left the page.
    unsafe { direct::<u8>(page).copy_from_nonoverlapping(kept.as_ptr(), kept.len()) };
}

/// Waits `count` microseconds or until `done`; whether it was.
fn delay(count: u32, done: impl Fn() -> bool) -> bool {
    for _ in 0..count {
        if done() {
            return true;
        }
        // SAFETY: port 80H shows codes of the firmware's self test: a write only takes its time.
        unsafe { Port::<u8>::new(0x80).write(0) };
    }
    done()
}

/// The first Rust code of another processor, on its own stack.
extern "C" fn start_of_other() -> ! {
    let Some((machine, other, number)) = STARTING.lock().take() else {
        fail(format_args!("a processor started that was not asked to"))
    };
    STARTED.store(2 * number - 1, Ordering::Release);
    let processor = Processor::new(number, other.identifier);
    // SAFETY: on the processor itself, once.
    unsafe { processor.load() };
    register(processor);
    // SAFETY: as above; frames and stack were taken for this processor, and this function does not
    // return to the stack.
    let vcpu = match unsafe { Vcpu::new(machine, processor, other.frames, other.stack_top) } {
        Ok(vcpu) => vcpu,
        Err(error) => fail(format_args!("processor {number}: {error}")),
    };
    STARTED.store(2 * number, Ordering::Release);
    // SAFETY: as above; vmcs01 is current.
    unsafe { vcpu.start_waiting(other.stack_top) }
}

/// Number of processors that L0 has taken.
pub(crate) fn count() -> usize {
    ALL.lock().len()
}

/// The processors but `own` that `is_target` names.
fn others(own: &Processor, is_target: impl Fn(&Processor) -> bool) -> Targets {
    ALL.lock()
        .iter()
        .copied()
        .filter(|processor| processor.index != own.index && is_target(processor))
        .collect()
}

/// A startup interrupt for every processor but `own` that `is_target` names and that waits for one;
/// one by one, since in Bochs a broadcast ends with the first that leaves a guest for it.
pub(crate) fn start_waiting(own: &Processor, vector: u8, is_target: impl Fn(&Processor) -> bool) {
    let apic = LocalApic::current();
    for target in others(own, is_target) {
        if target.is_waiting() {
            apic.send_startup(target.identifier, vector);
        }
    }
}

/// INIT for every processor but `own` that `is_target` names, and waits until it has taken effect.
pub(crate) fn reset_others(own: &Processor, is_target: impl Fn(&Processor) -> bool) {
    let apic = LocalApic::current();
    for target in others(own, is_target) {
        if !target.request_reset() {
            continue;
        }
        target.expect_kick();
        apic.kick(target.identifier);
        for _ in 0..RESET_PATIENCE {
            // Two processors may reset each other: the own request is found at the next entry.
            if !target.reset_requested() || own.reset_requested() {
                break;
            }
            core::hint::spin_loop();
        }
    }
}

/// The signature that EDX holds after INIT: that of CPUID leaf 1.
pub(crate) fn signature() -> u64 {
    u64::from(core::arch::x86_64::__cpuid(1).eax)
}

/// Whether a guest can wait for a startup interrupt.
pub(crate) fn can_wait() -> bool {
    VmxMisc::from(msr::read(VMX_MISC)).activity_wait_sipi()
}

/// Whether a guest can be in shutdown.
pub(crate) fn can_shut_down() -> bool {
    VmxMisc::from(msr::read(VMX_MISC)).activity_shutdown()
}
