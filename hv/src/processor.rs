//! What does each processor own in L0? Its descriptor tables, its task state with a stack for each
//! way an exception can come, and the flags other parts of L0 leave for it. GS points at it.

use alloc::boxed::Box;
use alloc::vec;
use core::arch::asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering, compiler_fence};

use crate::trap;
use crate::vcpu::Vcpu;
use crate::world::{self, Event};

/// Selector of L0's 64-bit code.
pub(crate) const CODE: u16 = 0x08;
/// Selector of L0's data.
pub(crate) const DATA: u16 = 0x10;
/// Selector of the task state.
pub(crate) const TASK: u16 = 0x18;

/// Bytes of a stack that an interrupt-stack-table entry points at.
const TRAP_STACK: usize = 8 * 1024;
const TRAP_STACKS: usize = 4;

/// The 64-bit task-state segment (SDM "64-bit Mode TSS"): only its interrupt stack table is used.
#[repr(C, packed(4))]
#[derive(Clone, Copy, Debug)]
struct TaskState {
    reserved0: u32,
    rsp: [u64; 3],
    reserved1: u64,
    ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

/// States of a processor as far as INIT is concerned.
mod reset {
    /// It runs L1, and INIT would reset it.
    pub(super) const POSSIBLE: u32 = 0;
    /// INIT was sent and has not yet taken effect.
    pub(super) const REQUESTED: u32 = 1;
    /// It waits for a startup interrupt: INIT is blocked.
    pub(super) const WAITING: u32 = 2;
    /// L1 is in VMX operation there: INIT is blocked until it leaves.
    pub(super) const BLOCKED: u32 = 3;
    /// As [`BLOCKED`], and INIT was sent.
    pub(super) const BLOCKED_PENDING: u32 = 4;
}

/// What one processor owns. The assembly reaches the first fields through GS.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Processor {
    /// An NMI came since the exit path last looked for what NMIs tell of. At GS:0.
    attention: AtomicU32,
    /// The next entry is a VMLAUNCH. At GS:4.
    launch: AtomicU32,
    /// Why the exit path was taken, if not for an exit. At GS:8.
    event: AtomicU32,
    /// An NMI that came while L0 ran is owed to L1.
    nmi_owed: AtomicU32,
    /// What the exit path works on. At GS:16.
    vcpu: AtomicPtr<Vcpu>,
    /// Which processor this is, counting from 0 in the order they were started.
    pub(crate) index: u32,
    /// Identifier of its local APIC.
    pub(crate) identifier: u32,
    /// What INIT means for it now, of [`reset`].
    reset: AtomicU32,
    /// The next NMI is a kick of another processor's.
    kicked: AtomicU32,
    descriptors: [u64; 5],
    task: TaskState,
}

/// Layout that LGDT and LIDT read.
#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

impl Processor {
    /// Makes processor `index`'s tables and stacks, which live for ever.
    pub(crate) fn new(index: u32, identifier: u32) -> &'static mut Self {
        let mut ist = [0; 7];
        for entry in ist.iter_mut().take(TRAP_STACKS) {
            let stack = Box::leak(vec![0_u128; TRAP_STACK / 16].into_boxed_slice());
            *entry = stack.as_ptr_range().end as u64;
        }
        let task = TaskState {
            reserved0: 0,
            rsp: [0; 3],
            reserved1: 0,
            ist,
            reserved2: 0,
            reserved3: 0,
            io_map: size_of::<TaskState>() as u16,
        };
        let processor = Box::leak(Box::new(Self {
            attention: AtomicU32::new(0),
            launch: AtomicU32::new(0),
            event: AtomicU32::new(0),
            nmi_owed: AtomicU32::new(0),
            vcpu: AtomicPtr::new(core::ptr::null_mut()),
            index,
            identifier,
            reset: AtomicU32::new(reset::POSSIBLE),
            kicked: AtomicU32::new(0),
            descriptors: [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0, 0],
            task,
        }));
        let base = &raw const processor.task as u64;
        // An available 64-bit TSS: type 9, present.
        processor.descriptors[3] = (size_of::<TaskState>() as u64 - 1)
            | (base & 0x00FF_FFFF) << 16
            | 0x89 << 40
            | (base >> 24 & 0xFF) << 56;
        processor.descriptors[4] = base >> 32;
        processor
    }

    /// The structure of the processor that runs this.
    pub(crate) fn current() -> &'static Self {
        // SAFETY: `load` put the address of a structure that lives for ever there, and every VM
        // exit restores it.
        unsafe { &*(crate::msr::read(crate::msr::GS_BASE) as *const Self) }
    }

    /// What the exit path of the processor that runs this works on.
    pub(crate) fn current_vcpu() -> *mut Vcpu {
        let vcpu;
        // SAFETY: GS holds the structure's address (see `current`), and the field is at 16.
        unsafe {
            asm!("mov {}, gs:[16]", out(reg) vcpu, options(nostack, readonly, preserves_flags));
        }
        vcpu
    }

    /// Says what the exit path works on from now on.
    pub(crate) fn set_vcpu(&self, vcpu: *mut Vcpu) {
        self.vcpu.store(vcpu, Ordering::Relaxed);
    }

    /// Says whether the next entry is a VMLAUNCH.
    pub(crate) fn set_launch(&self, launch: bool) {
        self.launch.store(u32::from(launch), Ordering::Relaxed);
    }

    /// Why the exit path was taken.
    pub(crate) fn take_event(&self) -> Event {
        match self.event.load(Ordering::Relaxed) {
            0 => Event::Exit,
            event => {
                self.event.store(0, Ordering::Relaxed);
                if event == world::RETRY { Event::Retry } else { Event::EntryFailed }
            }
        }
    }

    /// Linear address of the descriptor table.
    pub(crate) fn gdt_base(&self) -> u64 {
        self.descriptors.as_ptr() as u64
    }

    /// Linear address of the task state.
    pub(crate) fn task_base(&self) -> u64 {
        &raw const self.task as u64
    }

    /// Loads the tables, and GS with this structure's address.
    ///
    /// # Safety
    /// On the processor that owns the structure, once.
    pub(crate) unsafe fn load(&'static self) {
        let gdt = TablePointer {
            limit: (size_of_val(&self.descriptors) - 1) as u16,
            base: self.gdt_base(),
        };
        let idt = TablePointer { limit: trap::IDT_LIMIT, base: trap::idt_base() };
        // SAFETY: the tables live for ever, the code descriptor describes the running code, and
        // each gate's stack is in the task state.
        unsafe {
            asm!(
                "lgdt [{gdt}]",
                "push {code}",
                "lea {scratch}, [rip + 2f]",
                "push {scratch}",
                "retfq",
                "2:",
                "mov ds, {data:e}",
                "mov es, {data:e}",
                "mov ss, {data:e}",
                "mov fs, {zero:e}",
                "mov gs, {zero:e}",
                "ltr {task:x}",
                "lidt [{idt}]",
                gdt = in(reg) &raw const gdt,
                idt = in(reg) &raw const idt,
                code = in(reg) u64::from(CODE),
                data = in(reg) u32::from(DATA),
                zero = in(reg) 0_u32,
                task = in(reg) TASK,
                scratch = out(reg) _,
            );
        }
        // SAFETY: L0 uses GS for nothing else.
        unsafe { crate::msr::write(crate::msr::GS_BASE, &raw const *self as u64) };
    }

    /// Sends it INIT; whether it has to be kicked to see it.
    pub(crate) fn request_reset(&self) -> bool {
        use reset::{BLOCKED, BLOCKED_PENDING, POSSIBLE, REQUESTED};
        let swap = |from, to| {
            self.reset.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        swap(BLOCKED, BLOCKED_PENDING);
        swap(POSSIBLE, REQUESTED)
    }

    /// Whether an INIT has not yet taken effect.
    pub(crate) fn reset_requested(&self) -> bool {
        self.reset.load(Ordering::SeqCst) == reset::REQUESTED
    }

    /// Whether it waits for a startup interrupt.
    pub(crate) fn is_waiting(&self) -> bool {
        self.reset.load(Ordering::SeqCst) == reset::WAITING
    }

    /// Says that the processor waits for a startup interrupt, or no longer.
    pub(crate) fn set_waiting(&self, waiting: bool) {
        let state = if waiting { reset::WAITING } else { reset::POSSIBLE };
        self.reset.store(state, Ordering::SeqCst);
    }

    /// Says that L1 entered VMX operation on the processor, or left it: a pending INIT then is a
    /// request again.
    pub(crate) fn set_init_blocked(&self, blocked: bool) {
        use reset::{BLOCKED, BLOCKED_PENDING, POSSIBLE, REQUESTED};
        let swap = |from, to| {
            let _ = self.reset.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
        };
        if blocked {
            swap(POSSIBLE, BLOCKED);
            swap(REQUESTED, BLOCKED_PENDING);
        } else {
            swap(BLOCKED, POSSIBLE);
            swap(BLOCKED_PENDING, REQUESTED);
        }
    }

    /// An NMI came, in the guest or while L0 ran. It is L1's unless it is a kick.
    pub(crate) fn take_nmi(&self) {
        if self.kicked.swap(0, Ordering::SeqCst) == 0 {
            self.nmi_owed.store(1, Ordering::SeqCst);
        }
        self.attention.store(1, Ordering::SeqCst);
    }

    /// Says that the next NMI is a kick.
    pub(crate) fn expect_kick(&self) {
        self.kicked.store(1, Ordering::SeqCst);
    }

    /// From here on a new NMI makes the exit path look again before a guest is entered.
    pub(crate) fn begin_looking(&self) {
        // Only this processor's own NMI handler sets the flag: program order is enough, but the
        // compiler has to keep to it. A look before the store would miss what an NMI between tells.
        self.attention.store(0, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// Whether an NMI is owed to L1.
    pub(crate) fn owes_nmi(&self) -> bool {
        self.nmi_owed.load(Ordering::SeqCst) != 0
    }

    /// The owed NMI was injected. Another that came meanwhile is the same one: NMIs are not counted.
    pub(crate) fn forget_owed_nmi(&self) {
        self.nmi_owed.store(0, Ordering::SeqCst);
    }
}

const _: () = {
    assert!(core::mem::offset_of!(Processor, attention) == 0);
    assert!(core::mem::offset_of!(Processor, launch) == 4);
    assert!(core::mem::offset_of!(Processor, event) == 8);
    assert!(core::mem::offset_of!(Processor, vcpu) == 16);
};
