//! Answers: what follows when a structure of L1 lies where memory reads as ones?
//!
//! Ones are what the processor finds there, so each answer follows from the structure's format:
//! SDM Vol. 3C, "EPT Misconfigurations", "EPTP Switching", "I/O-Bitmap Addresses", "MSR-Bitmap
//! Address", "Loading MSRs", "Virtualizing CR8-Based TPR Accesses", "Virtualizing Memory-Mapped
//! APIC Accesses" and "Checks on Guest Non-Register State".

use vmx_defs::{
    ExitReason, Field, Hpa, L2Gpa, ProcCtls, ProcCtls2, event::vector, exit::entry_failure, msr,
};
use vmx_hw::{VmFail, VmxResult};

use super::Void;
use crate::{
    cases::behaviour::{Control, Stage},
    ensure, ensure_eq, l2_code,
    memory::{PAGE, PAGE_2M},
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    traps::catch,
    vmx::{
        self, Mode, Op, Outcome, Vm, Vmx,
        ept::{LARGE, LEAF},
        paging::{USER_RW, WINDOW},
        raw::{self, Code, Flags, Operands},
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "hostile.ones.read", run: read },
    Case { name: "hostile.ones.write", run: write },
    Case { name: "hostile.ones.local_apic", run: local_apic },
    Case { name: "hostile.ones.vmxon", run: vmxon },
    Case { name: "hostile.ones.vmptrld", run: vmptrld },
    Case { name: "hostile.ones.vmclear", run: vmclear },
    Case { name: "hostile.ones.operand", run: operand },
    Case { name: "hostile.ones.operand.stored", run: stored },
    Case { name: "hostile.ones.eptp", run: eptp },
    Case { name: "hostile.ones.ept_table", run: ept_table },
    Case { name: "hostile.ones.eptp_list", run: eptp_list },
    Case { name: "hostile.ones.eptp_in_list", run: eptp_in_list },
    Case { name: "hostile.ones.io_bitmaps", run: io_bitmaps },
    Case { name: "hostile.ones.msr_bitmap", run: msr_bitmap },
    Case { name: "hostile.ones.entry_msr_load", run: entry_msr_load },
    Case { name: "hostile.ones.areas_without_entries", run: empty_areas },
    Case { name: "hostile.ones.virtual_apic", run: virtual_apic },
    Case { name: "hostile.ones.virtual_apic.threshold", run: virtual_apic_threshold },
    Case { name: "hostile.ones.apic_access.read", run: |ctx| apic_access(ctx, load(), 0) },
    Case { name: "hostile.ones.apic_access.write", run: |ctx| apic_access(ctx, store(), 1) },
    Case { name: "hostile.ones.ve_information", run: ve_information },
    Case { name: "hostile.ones.vmcs_link_pointer", run: link_pointer },
    Case { name: "hostile.ones.l2.4k", run: |ctx| l2_access(ctx, 1) },
    Case { name: "hostile.ones.l2.2m", run: |ctx| l2_access(ctx, 2) },
    Case { name: "hostile.ones.l2.1g", run: |ctx| l2_access(ctx, 3) },
    Case { name: "hostile.ones.l2.delivered", run: l2_delivered },
    Case { name: "hostile.ones.l2.page_table", run: l2_page_table },
    Case { name: "hostile.ones.l2.pdptes", run: l2_pdptes },
    Case { name: "hostile.ones.l2.granted_late", run: l2_granted_late },
    Case { name: "hostile.ones.l2.without_ept", run: without_ept },
];

l2_code! {
    nothing: "";
    load: "mov rax, [rbx]";
    store: "mov [rbx], rax";
    in_al: "in al, dx";
    rdmsr: "rdmsr";
    wrmsr: "wrmsr";
    read_cr8: "mov rax, cr8";
    write_cr8: "mov cr8, rax";
}

/// At the end of a case: an L2 of its own runs as ever.
fn goes_on(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Verdict {
    let mut vm = Vm::new(ctx, vmx, Mode::Long)?;
    let page = ctx.arena.page();
    vm.map(ctx, L2Gpa::new(WINDOW), page);
    vm.store(WINDOW, 0x600D)?;
    ensure_eq!(page.read(0), 0x600D, "what another L2 wrote");
    Ok(())
}

fn stage(ctx: &mut Ctx<'_>) -> Result<(Stage, Void), Stop> {
    let void = Void::find(ctx)?;
    Ok((Stage::new(ctx)?, void))
}

fn read(ctx: &mut Ctx<'_>) -> Verdict {
    let void = Void::find(ctx)?;
    for offset in (0..PAGE_2M).step_by(0x3_0008) {
        ensure_eq!(void.read(offset), !0, "what L1 reads at {:#x}", void.start + offset);
    }
    Ok(())
}

fn write(ctx: &mut Ctx<'_>) -> Verdict {
    let void = Void::find(ctx)?;
    for offset in [0, 0x1008, PAGE_2M - 8] {
        let fault = catch(|| void.write(offset, 0x1234)).err();
        let found = fault.map(|fault| (fault.vector, fault.error_code));
        let expected = void.guarded.then_some((u64::from(vector::GP), 0));
        ensure_eq!(found, expected, "fault of L1's write at {:#x}", void.start + offset);
        ensure_eq!(void.read(offset), !0, "what L1 reads after it");
    }
    Ok(())
}

/// The registers of the local APIC would hide what is in memory there: nvmx does not let them move.
fn local_apic(ctx: &mut Ctx<'_>) -> Verdict {
    let void = Void::find(ctx)?;
    let base = vmx::rdmsr(msr::APIC_BASE);
    let flags = base & (PAGE - 1);
    // SAFETY: nothing lies there but what is no RAM, and the registers go back at once.
    let result = catch(|| unsafe { vmx::wrmsr(msr::APIC_BASE, void.start | flags) });
    if result.is_ok() {
        // SAFETY: where they were before.
        unsafe { vmx::wrmsr(msr::APIC_BASE, base) };
    }
    let fault = result.err().map(|fault| (fault.vector, fault.error_code));
    let expected = void.guarded.then_some((u64::from(vector::GP), 0));
    ensure_eq!(fault, expected, "fault of moving the local APIC to {:#x}", void.start);
    ensure_eq!(vmx::rdmsr(msr::APIC_BASE), base, "IA32_APIC_BASE");
    ensure_eq!(void.read(0x20), !0, "what L1 reads there");
    let vmx = Vmx::on(ctx)?;
    goes_on(ctx, &vmx)
}

fn vmxon(ctx: &mut Ctx<'_>) -> Verdict {
    let void = Void::find(ctx)?;
    vmx::prepare()?;
    // SAFETY: the region is no RAM, and its revision identifier is not the processor's.
    let result = unsafe { vmx_hw::vmxon(Hpa::new(void.start)) };
    ensure_eq!(result, Err(VmFail::Invalid), "VMXON");
    let vmx = Vmx::on(ctx)?;
    goes_on(ctx, &vmx)
}

fn pointer(instruction: unsafe fn(Hpa) -> VmxResult, address: u64) -> VmxResult {
    // SAFETY: VMPTRLD fails; VMCLEAR writes to what is no RAM.
    unsafe { instruction(Hpa::new(address)) }
}

fn vmptrld(ctx: &mut Ctx<'_>) -> Verdict {
    let (stage, void) = stage(ctx)?;
    for offset in [0, 0x1000, PAGE_2M - 0x1000] {
        let result = pointer(vmx_hw::vmptrld, void.start + offset);
        ensure_eq!(result, Err(VmFail::Valid), "VMPTRLD");
        ensure_eq!(vmcs::read(Field::VM_INSTRUCTION_ERROR), 11, "error: the revision");
    }
    goes_on(ctx, &stage.vmx)
}

fn vmclear(ctx: &mut Ctx<'_>) -> Verdict {
    let (stage, void) = stage(ctx)?;
    for offset in [0, 0x1000, PAGE_2M - 0x1000] {
        ensure_eq!(pointer(vmx_hw::vmclear, void.start + offset), Ok(()), "VMCLEAR");
        ensure_eq!(void.read(offset), !0, "what L1 reads there");
    }
    goes_on(ctx, &stage.vmx)
}

/// The memory operand itself.
fn operand(ctx: &mut Ctx<'_>) -> Verdict {
    let (stage, void) = stage(ctx)?;
    let run = |code: Code, rcx| {
        let operands = Operands { rdi: void.start, rcx, rax: 0 };
        match code.run(operands) {
            Ok((flags, _)) => Ok::<Flags, Stop>(flags),
            Err(fault) => crate::fail!("{fault:x?}"),
        }
    };
    let error = || vmcs::read(Field::VM_INSTRUCTION_ERROR);
    let code = Code::new(ctx, &raw::VMPTRLD);
    ensure_eq!((run(code, 0)?, error()), (Flags::FailValid, 9), "VMPTRLD of the address of ones");
    let code = Code::new(ctx, &raw::VMCLEAR);
    ensure_eq!((run(code, 0)?, error()), (Flags::FailValid, 2), "VMCLEAR of the address of ones");
    let code = Code::new(ctx, &raw::VMWRITE_MEMORY);
    let field = Field::GUEST_RSP;
    ensure_eq!(run(code, field.encoding().into())?, Flags::Succeed, "VMWRITE of ones");
    ensure_eq!(vmcs::read(field), !0, "the field");
    if stage.vmx.caps.ept.contains(vmx_defs::msr::EptVpidCap::INVVPID_SINGLE) {
        let code = Code::new(ctx, &raw::INVVPID);
        ensure_eq!((run(code, 1)?, error()), (Flags::FailValid, 28), "INVVPID, all bits ones");
    }
    goes_on(ctx, &stage.vmx)
}

/// VMPTRST and VMREAD to such memory: dropped, or #GP(0) where writes are guarded.
fn stored(ctx: &mut Ctx<'_>) -> Verdict {
    let (stage, void) = stage(ctx)?;
    for raw in [&raw::VMPTRST, &raw::VMREAD_MEMORY] {
        let code = Code::new(ctx, raw);
        let rcx = Field::GUEST_RSP.encoding().into();
        match code.run(Operands { rdi: void.start, rcx, rax: 0 }) {
            Ok((flags, _)) => ensure_eq!(flags, Flags::Succeed, "{}", raw.name),
            Err(fault) => {
                let found = (fault.vector, fault.error_code, void.guarded);
                ensure_eq!(found, (u64::from(vector::GP), 0, true), "fault of {}", raw.name);
            }
        }
        ensure_eq!(void.read(0), !0, "what L1 reads there");
    }
    goes_on(ctx, &stage.vmx)
}

fn eptp(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    let good = vmcs::read(Field::EPT_POINTER);
    for offset in [0, 0x1000, PAGE_2M - 0x1000] {
        vmcs::write(Field::EPT_POINTER, (void.start + offset) | good & 0xFFF);
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.reason, ExitReason::EPT_MISCONFIGURATION, "exit reason");
        ensure_eq!(exit.rip, nothing(), "RIP");
    }
    vmcs::write(Field::EPT_POINTER, good);
    stage.passes(nothing())?;
    goes_on(ctx, &stage.vmx)
}

/// An entry of each upper level that leads there.
fn ept_table(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    let page = ctx.arena.page();
    page.write(0, 0x600D);
    stage.vm.map(ctx, L2Gpa::new(WINDOW), page);
    for level in [2, 3] {
        stage.vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), 1, page.address() | LEAF);
        ensure_eq!(stage.vm.load(WINDOW)?, 0x600D, "what L2 reads");
        let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(WINDOW), level);
        let entry = slot.get();
        slot.set(void.start | entry & 0xFFF);
        vmx::invept_single(vmcs::read(Field::EPT_POINTER))?;
        stage.vm.registers.rbx = WINDOW;
        let exit = stage.exit_from(load())?;
        ensure_eq!(exit.reason, ExitReason::EPT_MISCONFIGURATION, "exit reason, level {level}");
        ensure_eq!(exit.gpa, WINDOW, "guest-physical address");
        slot.set(entry);
        vmx::invept_single(vmcs::read(Field::EPT_POINTER))?;
    }
    ensure_eq!(stage.vm.load(WINDOW)?, 0x600D, "what L2 reads at last");
    Ok(())
}

fn need_switching(stage: &Stage) -> Verdict {
    if !stage.vmx.caps.eptp_switching() {
        skip!("EPTP switching not offered");
    }
    Ok(())
}

fn expect_vmfunc_exit(result: Result<(), Outcome>) -> Verdict {
    let exit = match result {
        Err(outcome) => outcome.exit()?,
        Ok(()) => crate::fail!("the switch succeeds"),
    };
    ensure_eq!(exit.reason, ExitReason::VMFUNC, "exit reason");
    Ok(())
}

fn eptp_list(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    need_switching(&stage)?;
    let list = ctx.arena.page();
    stage.vm.enable_eptp_switching(&stage.vmx, list)?;
    vmcs::write(Field::EPTP_LIST_ADDRESS, void.start);
    for index in [0, 1, 511] {
        expect_vmfunc_exit(stage.vm.vmfunc(0, index))?;
    }
    list.write(1, vmcs::read(Field::EPT_POINTER));
    vmcs::write(Field::EPTP_LIST_ADDRESS, list.address());
    stage.vm.vmfunc(0, 1)?;
    goes_on(ctx, &stage.vmx)
}

/// A valid EPTP whose table lies there: the switch succeeds, and the next access finds it.
fn eptp_in_list(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    need_switching(&stage)?;
    let list = ctx.arena.page();
    let good = vmcs::read(Field::EPT_POINTER);
    list.write(3, void.start | good & 0xFFF);
    stage.vm.enable_eptp_switching(&stage.vmx, list)?;
    stage.vm.registers.rax = 0;
    stage.vm.registers.rcx = 3;
    let start = Op::Vmfunc.address(Mode::Long);
    let exit = stage.exit_from(start)?;
    ensure_eq!(exit.reason, ExitReason::EPT_MISCONFIGURATION, "exit reason");
    ensure_eq!(exit.rip, start + 3, "RIP: after VMFUNC");
    ensure_eq!(vmcs::read(Field::EPT_POINTER), list.read(3), "EPT pointer");
    vmcs::write(Field::EPT_POINTER, good);
    goes_on(ctx, &stage.vmx)
}

fn io_bitmaps(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    stage.set(Control::Proc(ProcCtls::IO_BITMAPS))?;
    vmcs::write(Field::IO_BITMAP_A, void.start);
    vmcs::write(Field::IO_BITMAP_B, void.start + 0x1000);
    for port in [0, 0x80, 0x7FFF, 0x8000, 0xFFFF] {
        stage.vm.registers.rdx = port;
        let exit = stage.intercepted(in_al(), ExitReason::IO_INSTRUCTION, 1)?;
        ensure_eq!(exit.qualification >> 16, port, "port");
    }
    // One of them there, the other a page of zeros.
    vmcs::write(Field::IO_BITMAP_A, ctx.arena.page().address());
    stage.vm.registers.rdx = 0x80;
    stage.passes(in_al())?;
    goes_on(ctx, &stage.vmx)
}

fn msr_bitmap(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    stage.set(Control::Proc(ProcCtls::MSR_BITMAPS))?;
    vmcs::write(Field::MSR_BITMAP, void.start);
    for index in [0x10, 0x174, 0x1FFF, 0xC000_0082, 0xC000_1FFF] {
        stage.vm.registers.rcx = index;
        stage.intercepted(rdmsr(), ExitReason::RDMSR, 2)?;
        stage.intercepted(wrmsr(), ExitReason::WRMSR, 2)?;
    }
    goes_on(ctx, &stage.vmx)
}

fn entry_msr_load(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    vmcs::write(Field::ENTRY_MSR_LOAD_ADDR, void.start);
    for count in [1, 2, 200] {
        vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, count);
        let exit = stage.exit_from(nothing())?;
        ensure_eq!(exit.reason.bits(), 1 << 31 | 34, "exit reason");
        ensure_eq!(exit.qualification, 1, "exit qualification: the first entry");
    }
    vmcs::write(Field::ENTRY_MSR_LOAD_COUNT, 0);
    stage.passes(nothing())?;
    goes_on(ctx, &stage.vmx)
}

/// With a count of 0 the addresses do not matter. (Exits that meet ones are VMX aborts.)
fn empty_areas(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    for field in [Field::ENTRY_MSR_LOAD_ADDR, Field::EXIT_MSR_STORE_ADDR, Field::EXIT_MSR_LOAD_ADDR]
    {
        vmcs::write(field, void.start);
    }
    stage.passes(nothing())
}

fn with_virtual_apic(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let (stage, void) = stage(ctx)?;
    stage.set(Control::Proc(ProcCtls::TPR_SHADOW))?;
    stage.clear(Control::Proc(ProcCtls::CR8_LOAD_EXITING | ProcCtls::CR8_STORE_EXITING))?;
    vmcs::write(Field::VIRTUAL_APIC_ADDR, void.start);
    vmcs::write(Field::TPR_THRESHOLD, 0);
    Ok(stage)
}

fn virtual_apic(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_virtual_apic(ctx)?;
    stage.passes(read_cr8())?;
    ensure_eq!(stage.vm.registers.rax, 15, "CR8: bits 7:4 of the ones");
    stage.vm.registers.rax = 3;
    stage.passes(write_cr8())?;
    stage.passes(read_cr8())?;
    let found = stage.vm.registers.rax;
    ensure!(found == 15 || found == 3, "CR8 after it was written: {found:#x}");
    ensure_eq!(Void::find(ctx)?.read(0x80), !0, "what L1 reads there");
    goes_on(ctx, &stage.vmx)
}

fn virtual_apic_threshold(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = with_virtual_apic(ctx)?;
    vmcs::write(Field::TPR_THRESHOLD, 15);
    stage.passes(nothing())?;
    goes_on(ctx, &stage.vmx)
}

fn apic_access(ctx: &mut Ctx<'_>, code: u64, kind: u64) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES))?;
    vmcs::write(Field::APIC_ACCESS_ADDR, void.start);
    stage.vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), 1, void.start | LEAF);
    stage.vm.registers.rbx = WINDOW + 0x20;
    let exit = stage.exit_from(code)?;
    ensure_eq!(exit.reason, ExitReason::APIC_ACCESS, "exit reason");
    ensure_eq!(exit.qualification & 0xFFFF, kind << 12 | 0x20, "exit qualification");
    goes_on(ctx, &stage.vmx)
}

/// The busy word of ones keeps every #VE away: the EPT violation exits.
fn ve_information(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::EPT_VIOLATION_VE))?;
    vmcs::write(Field::VE_INFORMATION_ADDR, void.start);
    vmcs::write(Field::EXCEPTION_BITMAP, 0);
    stage.vm.registers.rbx = WINDOW;
    let exit = stage.exit_from(load())?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa, WINDOW, "guest-physical address");
    goes_on(ctx, &stage.vmx)
}

fn link_pointer(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    vmcs::write(Field::VMCS_LINK_POINTER, void.start);
    let exit = stage.exit_from(nothing())?;
    ensure_eq!(exit.reason.bits(), 1 << 31 | 33, "exit reason");
    ensure_eq!(exit.qualification, entry_failure::VMCS_LINK_POINTER, "exit qualification");
    vmcs::write(Field::VMCS_LINK_POINTER, !0);
    stage.passes(nothing())?;
    goes_on(ctx, &stage.vmx)
}

/// L2's write where it reads ones: dropped, or #GP(0) in L2 where writes are guarded.
fn l2_writes(stage: &mut Stage, void: Void, address: u64) -> Verdict {
    stage.vm.registers.rbx = address;
    stage.vm.registers.rax = 0x1234;
    if void.guarded {
        let exit = stage.raises(store(), vector::GP)?;
        ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code at {:#x}", exit.rip);
    } else {
        stage.passes(store())?;
    }
    Ok(())
}

/// L2's accesses through a leaf of this level that covers it.
fn l2_access(ctx: &mut Ctx<'_>, level: u8) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    let caps = stage.vmx.caps.ept;
    let (base, flags) = match level {
        1 => (void.start + 0x3000, LEAF),
        2 => (void.start, LEAF | LARGE),
        _ => (void.start & !((1 << 30) - 1), LEAF | LARGE),
    };
    if level == 3 && !caps.contains(vmx_defs::msr::EptVpidCap::PAGE_1G) {
        skip!("no 1-GiB pages in EPT");
    }
    // The guest-physical GiB of the window, at the same place in it as the leaf's address.
    let size = 12 + 9 * (u64::from(level) - 1);
    stage.vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), level, base | flags);
    let place = if level == 3 { void.start - base } else { 0 };
    ensure!(place < 1 << size, "the leaf covers it");
    for offset in [0, 0x10, 0xFF8] {
        // By way of the window's second page.
        stage.vm.paging.window.write(1, (WINDOW + place) | USER_RW);
        let address = WINDOW + 0x1000 + offset;
        ensure_eq!(stage.vm.load(address)?, !0, "what L2 reads");
        l2_writes(&mut stage, void, address)?;
        ensure_eq!(stage.vm.load(address)?, !0, "what L2 reads after its write");
    }
    // With the leaf read-only, the write is L1's business.
    let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(WINDOW), level);
    slot.set(slot.get() & !2);
    vmx::invept_single(vmcs::read(Field::EPT_POINTER))?;
    stage.vm.registers.rbx = WINDOW + 0x1008;
    let exit = stage.exit_from(store())?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason of a write, read-only leaf");
    ensure_eq!(exit.qualification & 0x3F, 2 | 5 << 3, "access and permissions");
    goes_on(ctx, &stage.vmx)
}

/// The same with the exception delivered in L2.
fn l2_delivered(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    let idt = vmx::snippet::Idt::new(ctx.arena);
    idt.install();
    vmcs::write(Field::EXCEPTION_BITMAP, 0);
    stage.vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), 1, void.start | LEAF);
    stage.vm.registers.rbx = WINDOW;
    let exit = stage.exit_from(store())?;
    ensure_eq!(exit.reason, ExitReason::VMCALL, "exit reason");
    let expected = if void.guarded { idt.handler(vector::GP) } else { store() + 3 };
    ensure_eq!(exit.rip, expected, "RIP");
    ensure_eq!(void.read(0), !0, "what L1 reads there");
    Ok(())
}

/// A page table of L2 there: its entries have reserved bits set.
fn l2_page_table(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    stage.vm.ept.map(ctx.arena, L2Gpa::new(WINDOW + 0x5000), 1, void.start | LEAF);
    stage.vm.paging.window_directory.write(0, (WINDOW + 0x5000) | USER_RW);
    stage.vm.registers.rbx = WINDOW;
    let exit = stage.raises(load(), vector::PF)?;
    ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 9, "error code: reserved bits");
    ensure_eq!(exit.qualification, WINDOW, "exit qualification: the address");
    goes_on(ctx, &stage.vmx)
}

/// MOV to CR3 with PAE paging loads PDPTEs of ones: #GP(0).
fn l2_pdptes(ctx: &mut Ctx<'_>) -> Verdict {
    let void = Void::find(ctx)?;
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Pae)?;
    vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), 1, void.start | LEAF);
    let exit = match vm.load_cr3(WINDOW) {
        Err(outcome) => outcome.exit()?,
        Ok(()) => crate::fail!("MOV to CR3 succeeds"),
    };
    ensure_eq!(exit.exception(), Some(vector::GP), "vector (exit reason {:?})", exit.reason);
    ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code");
    goes_on(ctx, &vmx)
}

/// A leaf that led to RAM is turned there, and back.
fn l2_granted_late(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    let page = ctx.arena.page();
    let slot = stage.vm.map(ctx, L2Gpa::new(WINDOW), page);
    for round in 0..3 {
        stage.vm.store(WINDOW, round)?;
        slot.set(void.start | LEAF);
        vmx::invept_single(vmcs::read(Field::EPT_POINTER))?;
        ensure_eq!(stage.vm.load(WINDOW)?, !0, "what L2 reads");
        l2_writes(&mut stage, void, WINDOW)?;
        slot.set(page.address() | LEAF);
        vmx::invept_single(vmcs::read(Field::EPT_POINTER))?;
        ensure_eq!(stage.vm.load(WINDOW)?, round, "what L2 reads of the page");
    }
    Ok(())
}

/// Without EPT, L2's physical addresses are L1's.
fn without_ept(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, void) = stage(ctx)?;
    stage.clear(Control::Proc2(ProcCtls2::EPT))?;
    stage.vm.paging.window.write(0, void.start | USER_RW);
    ensure_eq!(stage.vm.load(WINDOW)?, !0, "what L2 reads");
    l2_writes(&mut stage, void, WINDOW + 8)?;
    ensure_eq!(stage.vm.load(WINDOW + 8)?, !0, "what L2 reads after its write");
    Ok(())
}
