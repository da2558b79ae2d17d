//! Answers: how does a case have another processor of the machine do something?
//!
//! The first case that asks starts all others, once; they wait for jobs ever after (SDM Vol. 3A,
//! "Multiple-Processor (MP) Initialization" and "Typical BSP Initialization Sequence"). A job is a
//! function and what it works on, which belongs to the other processor until it is done. Jobs keep
//! off whatever is the first processor's alone: they print nothing, take no pages and end no case;
//! what they find goes back in what they work on. An exception in a job ends the machine.

use core::{
    arch::global_asm,
    hint::spin_loop,
    mem::transmute,
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use arrayvec::ArrayVec;
use vmx_defs::Field;
use x86_64::{
    PrivilegeLevel, VirtAddr,
    instructions::{
        port::Port,
        tables::{lgdt, lidt, load_tss, sgdt, sidt},
    },
    structures::{DescriptorTablePointer, gdt::SegmentSelector, tss::TaskStateSegment},
};

use crate::{
    fail, gdt,
    local_apic::LocalApic,
    power,
    single::Single,
    skip,
    suite::{self, Ctx, Stop},
    vmx::{Vm, vmcs},
};

/// How many other processors a case gets at most.
pub const MOST: usize = 3;

/// The vector of [`Other::interrupt`].
pub const VECTOR: u8 = 0x41;

/// Looks at a condition before it is taken for lost.
const PATIENCE: u32 = 100_000_000;

/// Where started processors begin: RAM below 1 MiB that firmware and boot loader are done with.
const STUB: u64 = 0x8000;

global_asm!(
    r#"
.section .rodata.smp_stub, "a"
.balign 16
.code16
smp_stub:
    cli
    cld
    mov ax, cs
    mov ds, ax
    lgdtd [64]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA            /* a far jump with a 32-bit offset */
    .long smp_protected
    .short 0x18
.org smp_stub + 64
    .short 63                   /* limit of the GDT, then its base */
    .long 0
smp_stub_end:

.text
.code32
smp_protected:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, [{start}]
    mov eax, 0x620              /* PAE, OSFXSR, OSXMMEXCPT */
    mov cr4, eax
    mov eax, [{start} + 16]
    mov cr3, eax
    mov ecx, 0xC0000080         /* IA32_EFER */
    rdmsr
    or eax, 0x900               /* LME, NXE */
    wrmsr
    mov eax, 0x80010033         /* PG, WP, NE, ET, MP, PE; caches on */
    mov cr0, eax
    push 0x08
    mov eax, offset smp_long
    push eax
    retf
.code64
smp_long:
    xor eax, eax
    mov fs, eax
    mov gs, eax
    fninit
    mov rsp, [rip + {start}]
    mov rdi, [rip + {start} + 8]
    xor ebp, ebp
    call {entry}
    ud2

/* Any exception: what is on the stack, and CR2 */
.balign 16
smp_trap:
    cld
    mov rdi, rsp
    and rsp, -16
    call {trap}
    ud2
"#,
    start = sym START,
    entry = sym entry,
    trap = sym on_trap,
);

unsafe extern "C" {
    static smp_stub: u8;
    static smp_stub_end: u8;
    static smp_trap: u8;
}

/// Stack pointer, number and CR3 of the processor that is being started.
static START: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

mod state {
    /// Has not come up.
    pub(super) const ABSENT: u32 = 0;
    /// Waits for a job.
    pub(super) const IDLE: u32 = 1;
    /// Works on one.
    pub(super) const BUSY: u32 = 2;
}

/// What the first processor and another one tell each other.
struct Mailbox {
    state: AtomicU32,
    /// A `fn(*mut u8)`.
    job: AtomicU64,
    data: AtomicU64,
}

static MAILBOXES: [Mailbox; MOST] = [const {
    Mailbox {
        state: AtomicU32::new(state::ABSENT),
        job: AtomicU64::new(0),
        data: AtomicU64::new(0),
    }
}; MOST];

const STACK: usize = 32 * 1024;

/// What each processor has of its own.
#[repr(C, align(16))]
struct Own {
    stack: [u8; STACK],
    gdt: [u64; 8],
    task: TaskStateSegment,
}

static OWN: [Single<Own>; MOST] =
    [const { Single::new(Own { stack: [0; STACK], gdt: [0; 8], task: TaskStateSegment::new() }) };
        MOST];

const VECTORS: usize = 32;

/// Their IDT: every exception leads to one place.
static GATES: Single<[[u64; 2]; VECTORS]> = Single::new([[0; 2]; VECTORS]);

/// The others, once they were started.
static OTHERS: Single<Option<ArrayVec<Other, MOST>>> = Single::new(None);

/// Another processor of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Other {
    /// Which one, counting from 0.
    pub number: usize,
    /// Its APIC identifier.
    identifier: u32,
    apic: LocalApic,
}

impl Other {
    /// All other processors, at most [`MOST`], started if they are not yet. Skips the case unless
    /// `cpus=` on the command line says that there are some.
    pub fn all(ctx: &Ctx<'_>) -> Result<ArrayVec<Self, MOST>, Stop> {
        // SAFETY: only the first processor comes here, and no reference is live.
        let others = unsafe { &mut *OTHERS.get() };
        let found = match others {
            Some(found) => found.clone(),
            None => others.insert(start_all(ctx)?).clone(),
        };
        if found.is_empty() {
            skip!("one processor, as the command line has it");
        }
        Ok(found)
    }

    /// One of them.
    pub fn first(ctx: &Ctx<'_>) -> Result<Self, Stop> {
        Ok(Self::all(ctx)?[0])
    }

    fn mailbox(self) -> &'static Mailbox {
        &MAILBOXES[self.number]
    }

    /// Whether it works on a job.
    pub fn is_busy(self) -> bool {
        self.mailbox().state.load(Ordering::Acquire) == state::BUSY
    }

    /// Sends it an interrupt with [`VECTOR`].
    pub fn interrupt(self) {
        const ASSERT: u32 = 1 << 14;
        self.apic.command(self.identifier, ASSERT | u32::from(VECTOR));
    }

    /// Has it do `job` with `data`; this processor does `meanwhile`, whose result is returned after
    /// the job's end. Whatever the job needs for its end, `meanwhile` must bring about.
    pub fn run<T: Send, R>(
        self,
        job: fn(&mut T),
        data: &mut T,
        meanwhile: impl FnOnce() -> R,
    ) -> R {
        let mailbox = self.mailbox();
        assert!(!self.is_busy(), "processor {} works on another job", self.number);
        mailbox.job.store(job as *const () as u64, Ordering::Relaxed);
        mailbox.data.store(ptr::from_mut(data) as u64, Ordering::Relaxed);
        mailbox.state.store(state::BUSY, Ordering::Release);
        let result = meanwhile();
        for _ in 0..PATIENCE {
            if !self.is_busy() {
                return result;
            }
            spin_loop();
        }
        // What it works on is about to go: nothing can follow.
        crate::println!("guest: processor {} does not come back", self.number + 1);
        power::end(false)
    }
}

/// Makes the tables of the processor that runs this those of `vm`'s host state. Its VMCS is current.
pub fn take_over(vm: &mut Vm) {
    let table = sgdt().base.as_u64();
    let descriptor = usize::from(gdt::TSS >> 3);
    // SAFETY: the GDT of this program has a TSS descriptor of two words there.
    let [low, high] = unsafe { *(table as *const [u64; 2]).byte_add(descriptor * 8) };
    let task = low >> 16 & 0xFF_FFFF | low >> 56 << 24 | high << 32;
    vmcs::write(Field::HOST_TR_BASE, task);
    vmcs::write(Field::HOST_GDTR_BASE, table);
    vmcs::write(Field::HOST_IDTR_BASE, sidt().base.as_u64());
    vm.launched = false;
}

/// Whether the processor that runs this is not the first one.
pub fn is_other() -> bool {
    sidt().base.as_u64() == GATES.get() as u64
}

/// Starts the other processors, one after the other. Their APIC identifiers are those below the
/// number of processors.
fn start_all(ctx: &Ctx<'_>) -> Result<ArrayVec<Other, MOST>, Stop> {
    let mut found = ArrayVec::new();
    let count = suite::option(&ctx.info.command_line, "cpus").parse().unwrap_or(1);
    if count < 2 {
        return Ok(found);
    }
    let apic = LocalApic::new()?;
    fill_gates();
    for identifier in (0..count).filter(|identifier| *identifier != apic.identifier()) {
        if found.is_full() {
            break;
        }
        let other = Other { number: found.len(), identifier, apic };
        // SAFETY: the processor has not been started, so nobody uses its number's tables.
        unsafe { prepare(other.number) };
        if !start(other) {
            fail!("the processor with APIC identifier {identifier} does not start");
        }
        found.push(other);
    }
    Ok(found)
}

fn fill_gates() {
    // SAFETY: no other processor runs yet, and no reference is live.
    let gates = unsafe { &mut *GATES.get() };
    let target = &raw const smp_trap as u64;
    for gate in gates.iter_mut() {
        gate[0] = (target & 0xFFFF)
            | u64::from(gdt::CODE64) << 16
            | 0x8E << 40
            | (target >> 16 & 0xFFFF) << 48;
        gate[1] = target >> 32;
    }
}

/// Fills the tables of processor `number`, and the page where it begins.
///
/// # Safety
/// It must not run yet.
unsafe fn prepare(number: usize) {
    // SAFETY: the caller's promise, and the GDT of the first processor is not being changed. The
    // stub is a few bytes of this image, and its page is RAM that nobody uses.
    unsafe {
        let own = &mut *OWN[number].get();
        own.gdt = *(gdt::table_base() as *const [u64; 8]);
        let (base, limit) = (&raw const own.task as u64, size_of::<TaskStateSegment>() as u64 - 1);
        own.gdt[6] = limit | (base & 0xFF_FFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56;
        own.gdt[7] = base >> 32;
        let stack = own.stack.as_ptr_range().end as u64 & !15;
        START[0].store(stack, Ordering::SeqCst);
        START[1].store(number as u64, Ordering::SeqCst);
        let tables = x86_64::registers::control::Cr3::read_raw().0.start_address().as_u64();
        START[2].store(tables, Ordering::SeqCst);
        let stub = &raw const smp_stub;
        let length = &raw const smp_stub_end as usize - stub as usize;
        ptr::copy_nonoverlapping(stub, STUB as *mut u8, length);
        ((STUB + 66) as *mut u32).write_unaligned(own.gdt.as_ptr() as u64 as u32);
    }
}

/// INIT, then a startup interrupt, and a second one if the first has no effect; whether it came.
fn start(other: Other) -> bool {
    const INIT: u32 = 0x4500;
    const STARTUP: u32 = 0x4600;
    let came = || other.mailbox().state.load(Ordering::Acquire) != state::ABSENT;
    other.apic.command(other.identifier, INIT);
    microseconds(10_000, || false);
    for patience in [200, 1_000_000] {
        other.apic.command(other.identifier, STARTUP | (STUB >> 12) as u32);
        if microseconds(patience, came) {
            return true;
        }
    }
    false
}

/// Waits so long or until `done`; whether it was.
fn microseconds(count: u32, done: impl Fn() -> bool) -> bool {
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
extern "C" fn entry(number: u64) -> ! {
    let mailbox = &MAILBOXES[number as usize];
    // SAFETY: the tables are this processor's own and filled; the descriptors are flat.
    unsafe {
        let own = OWN[number as usize].get();
        let limit = |bytes: usize| (bytes - 1) as u16;
        lgdt(&DescriptorTablePointer {
            limit: limit(64),
            base: VirtAddr::new(&raw const (*own).gdt as u64),
        });
        load_tss(SegmentSelector::new(gdt::TSS >> 3, PrivilegeLevel::Ring0));
        lidt(&DescriptorTablePointer {
            limit: limit(VECTORS * 16),
            base: VirtAddr::new(GATES.get() as u64),
        });
    }
    // Enabled, so that it takes interrupts.
    if LocalApic::new().is_err() {
        power::end(false);
    }
    loop {
        mailbox.state.store(state::IDLE, Ordering::Release);
        while mailbox.state.load(Ordering::Acquire) != state::BUSY {
            spin_loop();
        }
        let data = mailbox.data.load(Ordering::Relaxed) as *mut u8;
        // SAFETY: `run` stored a `fn(&mut T)` and a reference to its T, which stays alive and
        // unused elsewhere until the state changes.
        unsafe {
            let job: fn(*mut u8) = transmute(mailbox.job.load(Ordering::Relaxed));
            job(data);
        }
    }
}

extern "C" fn on_trap(stack: &[u64; 4]) -> ! {
    let cr2 = x86_64::registers::control::Cr2::read_raw();
    crate::println!("guest: exception on another processor: stack {stack:#x?}, CR2 {cr2:#x}");
    power::end(false)
}

/// What a panic of a job does.
pub fn on_panic(info: &core::panic::PanicInfo<'_>) -> ! {
    crate::println!("guest: on another processor: {info}");
    power::end(false)
}
