//! Answers: which instructions always exit from L2, with what information, and with what host state?
//!
//! SDM Vol. 3C, "Instructions That Cause VM Exits Unconditionally", "Information for VM Exits Due to
//! Instruction Execution" and "Loading Host State".

use core::arch::asm;

use vmx_defs::{ExitReason, Field, exit::InstructionInfo};
use x86_64::{
    instructions::tables::{sgdt, sidt},
    registers::control::{Cr0, Cr4},
};

use crate::{
    ensure_eq, gdt,
    suite::{Case, Ctx, Verdict},
    traps,
    vmx::{
        Exit, Mode, Op, Outcome, Vm, Vmx,
        raw::{self, Code, Raw},
        rdmsr, vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "l2.exits.vmxon", run: |ctx| exits(ctx, &raw::VMXON, Shape::Memory) },
    Case { name: "l2.exits.vmxoff", run: |ctx| exits(ctx, &raw::VMXOFF, Shape::None) },
    Case { name: "l2.exits.vmclear", run: |ctx| exits(ctx, &raw::VMCLEAR, Shape::Memory) },
    Case { name: "l2.exits.vmptrld", run: |ctx| exits(ctx, &raw::VMPTRLD, Shape::Memory) },
    Case { name: "l2.exits.vmptrst", run: |ctx| exits(ctx, &raw::VMPTRST, Shape::Memory) },
    Case { name: "l2.exits.vmread", run: |ctx| exits(ctx, &raw::VMREAD, Shape::Registers) },
    Case {
        name: "l2.exits.vmread.memory",
        run: |ctx| exits(ctx, &raw::VMREAD_MEMORY, Shape::MemoryAndRegister),
    },
    Case { name: "l2.exits.vmwrite", run: |ctx| exits(ctx, &raw::VMWRITE, Shape::Registers) },
    Case {
        name: "l2.exits.vmwrite.memory",
        run: |ctx| exits(ctx, &raw::VMWRITE_MEMORY, Shape::MemoryAndRegister),
    },
    Case { name: "l2.exits.vmlaunch", run: |ctx| exits(ctx, &raw::VMLAUNCH, Shape::None) },
    Case { name: "l2.exits.vmresume", run: |ctx| exits(ctx, &raw::VMRESUME, Shape::None) },
    Case { name: "l2.exits.vmcall", run: |ctx| exits(ctx, &raw::VMCALL, Shape::None) },
    Case { name: "l2.exits.invept", run: |ctx| exits(ctx, &raw::INVEPT, Shape::MemoryAndRegister) },
    Case {
        name: "l2.exits.invvpid",
        run: |ctx| exits(ctx, &raw::INVVPID, Shape::MemoryAndRegister),
    },
    Case { name: "l2.exits.cpuid", run: |ctx| exits(ctx, &raw::CPUID, Shape::None) },
    Case { name: "l2.exits.invd", run: |ctx| exits(ctx, &raw::INVD, Shape::None) },
    Case { name: "l2.exits.xsetbv", run: xsetbv },
    Case { name: "l2.exits.displacement", run: displacement },
    Case { name: "exit.host_state", run: host_state },
    Case { name: "exit.host_state.pae_guest", run: host_state_pae },
    Case { name: "exit.rflags_and_dr7", run: rflags_dr7 },
    Case { name: "exit.entry_info_invalidated", run: injection_cleared },
];

/// Which operands the instruction information describes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    None,
    Memory,
    Registers,
    MemoryAndRegister,
}

fn exit_of(vm: &mut Vm, code: &Code) -> Result<Exit, crate::suite::Stop> {
    match vm.exec_at(code.address()) {
        // For the case of VMCALL itself.
        Ok(_) => Ok(Exit::read()),
        Err(outcome) => outcome.exit(),
    }
}

fn exits(ctx: &mut Ctx<'_>, raw: &Raw, shape: Shape) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let code = Code::l2(ctx, raw);
    let page = ctx.arena.page();
    page.fill(0x7777);
    vm.registers.rdi = page.address();
    vm.registers.rcx = Field::GUEST_RIP.encoding().into();
    vm.registers.rax = 0x5555;
    let exit = exit_of(&mut vm, &code)?;
    ensure_eq!(exit.reason, raw.reason, "exit reason");
    ensure_eq!(exit.rip, code.address(), "RIP");
    ensure_eq!(exit.length, raw.bytes.len() as u64, "instruction length");
    // Without a displacement it is 0, but with a register operand Bochs stores what its decoder left
    // there, which may be 0: not even a known deviation can be asserted.
    if shape != Shape::Registers {
        ensure_eq!(exit.qualification, 0, "exit qualification");
    }
    ensure_eq!(vm.registers.rax, 0x5555, "RAX");
    ensure_eq!(page.read(0), 0x7777, "memory operand");
    let info = InstructionInfo::from(vmcs::read(Field::EXIT_INSTRUCTION_INFO) as u32);
    const RAX: u8 = 0;
    const RCX: u8 = 1;
    const RDI: u8 = 7;
    const DS: u8 = 3;
    if matches!(shape, Shape::Memory | Shape::MemoryAndRegister) {
        ensure_eq!(info.address_size(), 2, "address size");
        ensure_eq!(info.is_register(), false, "memory operand");
        ensure_eq!(info.segment(), DS, "segment");
        ensure_eq!(info.index_invalid(), true, "no index register");
        ensure_eq!((info.base_invalid(), info.base()), (false, RDI), "base register");
    }
    if shape == Shape::Registers {
        ensure_eq!((info.is_register(), info.reg1()), (true, RAX), "first register");
    }
    if matches!(shape, Shape::Registers | Shape::MemoryAndRegister) {
        ensure_eq!(info.reg2(), RCX, "second register");
    }
    // L1 may go on after it.
    let after = vm.resume_after(&exit).exit()?;
    ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason after it");
    ensure_eq!(after.rip, code.address() + exit.length, "RIP after it");
    Ok(())
}

fn xsetbv(ctx: &mut Ctx<'_>) -> Verdict {
    const OSXSAVE: u64 = 1 << 18;
    if core::arch::x86_64::__cpuid(1).ecx & 1 << 26 == 0 {
        crate::skip!("no XSAVE");
    }
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    vmcs::change(Field::GUEST_CR4, OSXSAVE, 0);
    let code = Code::l2(ctx, &raw::XSETBV);
    vm.registers.rax = 1;
    let exit = exit_of(&mut vm, &code)?;
    ensure_eq!(exit.reason, ExitReason::XSETBV, "exit reason");
    ensure_eq!(exit.length, 3, "instruction length");
    // Without CR4.OSXSAVE it is #UD.
    vmcs::change(Field::GUEST_CR4, 0, OSXSAVE);
    let exit = exit_of(&mut vm, &code)?;
    ensure_eq!(exit.exception(), Some(6), "vector without CR4.OSXSAVE");
    Ok(())
}

/// The displacement of the memory operand is the exit qualification.
fn displacement(ctx: &mut Ctx<'_>) -> Verdict {
    const VMPTRLD_SCALED: Raw = Raw {
        name: "VMPTRLD [RDI + RCX * 4 - 0x234]",
        bytes: &[0x0F, 0xC7, 0xB4, 0x8F, 0xCC, 0xFD, 0xFF, 0xFF],
        reason: ExitReason::VMPTRLD,
    };
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let code = Code::l2(ctx, &VMPTRLD_SCALED);
    let exit = exit_of(&mut vm, &code)?;
    ensure_eq!(exit.reason, ExitReason::VMPTRLD, "exit reason");
    ensure_eq!(exit.length, 8, "instruction length");
    ensure_eq!(exit.qualification as i64, -0x234, "exit qualification");
    let info = InstructionInfo::from(vmcs::read(Field::EXIT_INSTRUCTION_INFO) as u32);
    ensure_eq!(info.scaling(), 2, "scaling");
    ensure_eq!((info.index_invalid(), info.index()), (false, 1), "index register");
    ensure_eq!((info.base_invalid(), info.base()), (false, 7), "base register");
    Ok(())
}

fn check_host(vm: &mut Vm) -> Verdict {
    let (cr0, cr4, efer) = (Cr0::read_raw(), Cr4::read_raw(), rdmsr(vmx_defs::msr::EFER));
    vm.exec(Op::Nothing)?;
    ensure_eq!(Cr0::read_raw(), cr0, "CR0");
    ensure_eq!(Cr4::read_raw(), cr4, "CR4");
    ensure_eq!(rdmsr(vmx_defs::msr::EFER), efer, "IA32_EFER");
    let (gdtr, idtr) = (sgdt(), sidt());
    ensure_eq!((gdtr.base.as_u64(), gdtr.limit), (gdt::table_base(), 0xFFFF), "GDTR");
    ensure_eq!((idtr.base.as_u64(), idtr.limit), (traps::table_base(), 0xFFFF), "IDTR");
    let (cs, ss, ds, tr, ldtr): (u16, u16, u16, u16, u16);
    // SAFETY: reads selectors.
    unsafe {
        asm!(
            "mov {cs:x}, cs",
            "mov {ss:x}, ss",
            "mov {ds:x}, ds",
            "str {tr:x}",
            "sldt {ldtr:x}",
            cs = out(reg) cs,
            ss = out(reg) ss,
            ds = out(reg) ds,
            tr = out(reg) tr,
            ldtr = out(reg) ldtr,
            options(nostack, preserves_flags),
        );
    }
    let expected = (gdt::CODE64, gdt::DATA, gdt::DATA, gdt::TSS, 0);
    ensure_eq!((cs, ss, ds, tr, ldtr), expected, "CS, SS, DS, TR and LDTR");
    ensure_eq!(rdmsr(vmx_defs::msr::FS_BASE), 0x1234_0000, "FS base");
    ensure_eq!(rdmsr(vmx_defs::msr::GS_BASE), 0xFFFF_8000_1234_0000, "GS base");
    ensure_eq!(rdmsr(vmx_defs::msr::SYSENTER_EIP), 0x5678_0000, "IA32_SYSENTER_EIP");
    Ok(())
}

fn host_state(ctx: &mut Ctx<'_>) -> Verdict {
    host_state_of(ctx, Mode::Long)
}

fn host_state_pae(ctx: &mut Ctx<'_>) -> Verdict {
    host_state_of(ctx, Mode::Pae)
}

fn host_state_of(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, mode)?;
    vmcs::write(Field::HOST_FS_BASE, 0x1234_0000);
    vmcs::write(Field::HOST_GS_BASE, 0xFFFF_8000_1234_0000);
    vmcs::write(Field::HOST_SYSENTER_EIP, 0x5678_0000);
    for _ in 0..2 {
        check_host(&mut vm)?;
    }
    Ok(())
}

/// An exit clears RFLAGS but for bit 1, and sets DR7 to 400H.
fn rflags_dr7(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    // SAFETY: sets breakpoint conditions of no enabled breakpoint.
    unsafe { asm!("mov dr7, {}", in(reg) 0x0001_0400_u64, options(nostack)) };
    vmcs::write(Field::GUEST_RFLAGS, 0x2 | 0x8D5);
    vm.exec(Op::Nothing)?;
    let dr7: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, dr7", out(reg) dr7, options(nostack)) };
    ensure_eq!(dr7, 0x400, "DR7 after an exit");
    ensure_eq!(vmcs::read(Field::GUEST_RFLAGS), 0x2 | 0x8D5, "guest RFLAGS");
    Ok(())
}

/// An exit clears the valid bit of the VM-entry interruption information.
fn injection_cleared(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    // #UD whose delivery fails at once: L2 has no IDT, so it is a #GP, which exits.
    vmcs::write(Field::ENTRY_INTR_INFO, 0x8000_0306);
    let exit = match vm.run() {
        Outcome::Exit(exit) => exit,
        other => return Err(other.into()),
    };
    ensure_eq!(exit.exception(), Some(13), "vector");
    ensure_eq!(vmcs::read(Field::IDT_VECTORING_INFO) as u32, 0x8000_0306, "IDT-vectoring");
    ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 6 * 8 + 2 + 1, "error code");
    ensure_eq!(vmcs::read(Field::ENTRY_INTR_INFO) as u32 >> 31, 0, "valid bit");
    Ok(())
}
