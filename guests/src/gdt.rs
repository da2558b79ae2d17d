//! Answers: which segments does this hypervisor run with?
//!
//! A GDT with 64-bit code, data, 32-bit code (for L2 programs) and the user-level ones, and a
//! TSS, which VM exits need: the host's TR selector must not be null ("Checks on Host Segment and
//! Descriptor-Table Registers").

use core::arch::asm;

use x86_64::{
    PrivilegeLevel, VirtAddr,
    instructions::tables::{lgdt, load_tss},
    registers::segmentation::{CS, DS, ES, SS, Segment},
    structures::{DescriptorTablePointer, gdt::SegmentSelector, tss::TaskStateSegment},
};

use crate::single::Single;

/// Selector of the 64-bit code segment.
pub const CODE64: u16 = 0x08;
/// Selector of the flat data segment.
pub const DATA: u16 = 0x10;
/// Selector of the flat 32-bit code segment.
pub const CODE32: u16 = 0x18;
/// Selector of the user-level data segment.
pub const USER_DATA: u16 = 0x23;
/// Selector of the user-level 64-bit code segment.
pub const USER_CODE64: u16 = 0x2B;
/// Selector of the task state segment.
pub const TSS: u16 = 0x30;

/// Number of the interrupt stack table's entry that #DF uses.
pub const DOUBLE_FAULT_STACK: u8 = 1;

const ENTRIES: usize = 8;
const STACK_SIZE: usize = 16 * 1024;

static TABLE: Single<[u64; ENTRIES]> = Single::new([
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00CF_9B00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x00AF_FB00_0000_FFFF,
    0,
    0,
]);

static TASK: Single<TaskStateSegment> = Single::new(TaskStateSegment::new());

#[repr(align(16))]
struct Stack(#[expect(dead_code, reason = "only its address is used")] [u8; STACK_SIZE]);
static FAULT_STACK: Single<Stack> = Single::new(Stack([0; STACK_SIZE]));
static RING0_STACK: Single<Stack> = Single::new(Stack([0; STACK_SIZE]));

fn top(stack: &'static Single<Stack>) -> VirtAddr {
    VirtAddr::new(stack.get() as u64 + STACK_SIZE as u64)
}

/// Address of the GDT, as VMCS host and guest state want it.
pub fn table_base() -> u64 {
    TABLE.get() as u64
}

/// Limit of the GDT.
pub const fn table_limit() -> u32 {
    (ENTRIES * 8 - 1) as u32
}

/// Address of the TSS.
pub fn task_base() -> u64 {
    TASK.get() as u64
}

/// Loads the GDT, the segment registers and TR.
pub fn load() {
    // SAFETY: runs once at boot (and again only with the same contents), while no reference to
    // the statics is held; the descriptors are flat, so code and stack stay where they are.
    unsafe {
        let task = &mut *TASK.get();
        task.interrupt_stack_table[usize::from(DOUBLE_FAULT_STACK) - 1] = top(&FAULT_STACK);
        task.privilege_stack_table[0] = top(&RING0_STACK);
        let (base, limit) = (task_base(), size_of::<TaskStateSegment>() as u64 - 1);
        let table = &mut *TABLE.get();
        table[6] = limit | (base & 0xFF_FFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56;
        table[7] = base >> 32;
        lgdt(&DescriptorTablePointer {
            limit: table_limit() as u16,
            base: VirtAddr::new(table_base()),
        });
        CS::set_reg(SegmentSelector(CODE64));
        for data in [DS::set_reg, ES::set_reg, SS::set_reg] {
            data(SegmentSelector(DATA));
        }
        asm!("lldt {0:x}", in(reg) 0_u16, options(nostack, preserves_flags));
        load_tss(SegmentSelector::new(TSS >> 3, PrivilegeLevel::Ring0));
    }
}
