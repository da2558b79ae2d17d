//! Answers: do the controls that make single instructions exit do so, with the right information?
//!
//! SDM Vol. 3C, "Instructions That Cause VM Exits Conditionally", "Changes to Instruction Behavior
//! in VMX Non-Root Operation" and "Information for VM Exits Due to Instruction Execution".

use core::arch::x86_64::{__cpuid, __cpuid_count};

use vmx_defs::{ExitReason, Field, ProcCtls, ProcCtls2, event::vector, exit::InstructionInfo};

use super::{Control, Stage, instruction_information};
use crate::{
    ensure, ensure_eq, gdt, l2_code, skip,
    suite::{Case, Ctx, Verdict},
    vmx::vmcs,
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.hlt", run: hlt_exits },
    Case { name: "behaviour.invlpg", run: invlpg_exits },
    Case { name: "behaviour.mwait", run: mwait_exits },
    Case { name: "behaviour.monitor", run: monitor_exits },
    Case { name: "behaviour.rdpmc", run: rdpmc_exits },
    Case { name: "behaviour.rdtsc", run: rdtsc_exits },
    Case { name: "behaviour.rdtscp.exits", run: rdtscp_exits },
    Case { name: "behaviour.rdtscp.enabled", run: rdtscp_enabled },
    Case { name: "behaviour.pause", run: pause_exits },
    Case { name: "behaviour.pause_loop", run: pause_loop },
    Case { name: "behaviour.wbinvd", run: wbinvd_exits },
    Case {
        name: "behaviour.rdrand",
        run: |ctx| rdrand_exits(ctx, &[(rdrand32(), (9, 1), 4), (rdrand64(), (6, 2), 4)]),
    },
    Case {
        name: "behaviour.rdrand.16bit",
        run: |ctx| rdrand_exits(ctx, &[(rdrand16(), (1, 0), 4)]),
    },
    Case {
        name: "behaviour.rdseed",
        run: |ctx| rdseed_exits(ctx, &[(rdseed32(), (9, 1), 4), (rdseed64(), (6, 2), 4)]),
    },
    Case {
        name: "behaviour.rdseed.16bit",
        run: |ctx| rdseed_exits(ctx, &[(rdseed16(), (1, 0), 4)]),
    },
    Case { name: "behaviour.invpcid.enabled", run: invpcid_enabled },
    Case { name: "behaviour.invpcid.exits", run: invpcid_exits },
    Case { name: "behaviour.xsaves", run: xsaves },
    Case { name: "behaviour.descriptor_table.gdtr_idtr", run: gdtr_idtr },
    Case { name: "behaviour.descriptor_table.ldtr_tr", run: ldtr_tr },
    Case { name: "behaviour.descriptor_table.off", run: descriptor_off },
    Case { name: "behaviour.secondary_off", run: secondary_off },
    Case { name: "behaviour.fault_before_exit", run: fault_before_exit },
    Case { name: "behaviour.invd", run: |ctx| unconditional(ctx, invd(), ExitReason::INVD, 2) },
    Case { name: "behaviour.cpuid", run: |ctx| unconditional(ctx, cpuid(), ExitReason::CPUID, 2) },
    Case { name: "behaviour.cpuid.prefixed", run: cpuid_prefixed },
];

l2_code! {
    hlt: "hlt";
    invlpg: "invlpg [rbx + 0x10]";
    mwait: "mwait";
    monitor: "mov rax, rbx", "monitor";
    rdpmc: "rdpmc";
    rdtsc: "rdtsc";
    rdtscp: "rdtscp";
    pause: "pause";
    pauses: "2: pause", "dec ecx", "jnz 2b";
    wbinvd: "wbinvd";
    rdrand16: "rdrand cx";
    rdrand32: "rdrand r9d";
    rdrand64: "rdrand rsi";
    rdseed16: "rdseed cx";
    rdseed32: "rdseed r9d";
    rdseed64: "rdseed rsi";
    invpcid: "invpcid rcx, [rdi + rdx * 2 + 0x40]";
    xsaves_code: "xsaves [rdi]";
    xrstors_code: "xrstors [rdi]";
    sgdt: "sgdt [rdi + 8]";
    sidt: "sidt [rdi + rcx * 4]";
    lgdt: "lgdt [r8]";
    lidt: "lidt [rsi - 0x20]";
    sldt: "sldt eax";
    str: "str word ptr [rdi]";
    lldt: "lldt cx";
    ltr: "ltr word ptr [r12 + 0x7]";
    invd: "invd";
    cpuid: "cpuid";
    prefixed_cpuid: ".byte 0x26, 0x66, 0x48", "cpuid";
}

fn unconditional(ctx: &mut Ctx<'_>, code: u64, reason: ExitReason, length: u64) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    for _ in 0..2 {
        let exit = stage.intercepted(code, reason, length)?;
        ensure_eq!(exit.qualification, 0, "exit qualification");
    }
    Ok(())
}

/// Prefixes that mean nothing are part of the instruction.
fn cpuid_prefixed(ctx: &mut Ctx<'_>) -> Verdict {
    unconditional(ctx, prefixed_cpuid(), ExitReason::CPUID, 5)
}

fn hlt_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::HLT_EXITING))?;
    let exit = stage.intercepted(hlt(), ExitReason::HLT, 1)?;
    ensure_eq!(exit.qualification, 0, "exit qualification");
    ensure_eq!(vmcs::read(Field::GUEST_ACTIVITY), 0, "activity state");
    let after = stage.vm.resume_after(&exit).exit()?;
    ensure_eq!(after.reason, ExitReason::VMCALL, "exit reason after it");
    Ok(())
}

fn invlpg_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::INVLPG_EXITING);
    for base in [0x1234, 0x7FFF_8765_4000, 0xFFFF_8000_0000_1000] {
        stage.vm.registers.rbx = base;
        let exit = stage.both_ways(control, invlpg(), ExitReason::INVLPG, 4)?;
        ensure_eq!(exit.qualification, base + 0x10, "exit qualification: the linear address");
    }
    Ok(())
}

fn has_monitor() -> bool {
    __cpuid(1).ecx & 1 << 3 != 0
}

fn mwait_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    if !has_monitor() {
        skip!("no MONITOR and MWAIT");
    }
    // Without an armed monitor MWAIT does not wait.
    let control = Control::Proc(ProcCtls::MWAIT_EXITING);
    let exit = stage.both_ways(control, mwait(), ExitReason::MWAIT, 3)?;
    ensure_eq!(exit.qualification, 0, "exit qualification: monitor not armed");
    Ok(())
}

fn monitor_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    if !has_monitor() {
        skip!("no MONITOR and MWAIT");
    }
    stage.vm.registers.rbx = ctx.arena.page().address();
    let control = Control::Proc(ProcCtls::MONITOR_EXITING);
    stage.clear(control)?;
    stage.passes(monitor())?;
    stage.set(control)?;
    let exit = stage.exit_from(monitor())?;
    ensure_eq!(exit.reason, ExitReason::MONITOR, "exit reason");
    ensure_eq!((exit.rip, exit.length), (monitor() + 3, 3), "RIP and instruction length");
    ensure_eq!(exit.qualification, 0, "exit qualification");
    Ok(())
}

fn rdpmc_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.vm.registers.rcx = 0;
    let control = Control::Proc(ProcCtls::RDPMC_EXITING);
    stage.set(control)?;
    let exit = stage.intercepted(rdpmc(), ExitReason::RDPMC, 2)?;
    ensure_eq!(exit.qualification, 0, "exit qualification");
    // Counter 0 exists where CPUID reports counters.
    if __cpuid(0).eax >= 10 && __cpuid(10).eax & 0xFF != 0 {
        stage.both_ways(control, rdpmc(), ExitReason::RDPMC, 2)?;
    }
    Ok(())
}

fn rdtsc_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::RDTSC_EXITING);
    let exit = stage.both_ways(control, rdtsc(), ExitReason::RDTSC, 2)?;
    ensure_eq!(exit.qualification, 0, "exit qualification");
    Ok(())
}

fn rdtscp_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::RDTSCP))?;
    let control = Control::Proc(ProcCtls::RDTSC_EXITING);
    let exit = stage.both_ways(control, rdtscp(), ExitReason::RDTSCP, 3)?;
    ensure_eq!(exit.qualification, 0, "exit qualification");
    Ok(())
}

/// Without "enable RDTSCP", RDTSCP is #UD even where RDTSC exits.
fn rdtscp_enabled(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let enable = Control::Proc2(ProcCtls2::RDTSCP);
    stage.set(enable)?;
    stage.clear(Control::Proc(ProcCtls::RDTSC_EXITING))?;
    stage.passes(rdtscp())?;
    stage.clear(enable)?;
    stage.raises(rdtscp(), vector::UD)?;
    stage.set(Control::Proc(ProcCtls::RDTSC_EXITING))?;
    stage.raises(rdtscp(), vector::UD)?;
    Ok(())
}

fn pause_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::PAUSE_EXITING);
    let exit = stage.both_ways(control, pause(), ExitReason::PAUSE, 2)?;
    ensure_eq!(exit.qualification, 0, "exit qualification");
    Ok(())
}

fn pause_loop(ctx: &mut Ctx<'_>) -> Verdict {
    const PAUSES: u64 = 20_000;
    let mut stage = Stage::new(ctx)?;
    stage.clear(Control::Proc(ProcCtls::PAUSE_EXITING))?;
    stage.set(Control::Proc2(ProcCtls2::PAUSE_LOOP_EXITING))?;
    vmcs::write(Field::PLE_GAP, 1 << 20);
    vmcs::write(Field::PLE_WINDOW, 1000);
    stage.vm.registers.rcx = PAUSES;
    let exit = stage.exit_from(pauses())?;
    ensure_eq!(exit.reason, ExitReason::PAUSE, "exit reason");
    ensure_eq!((exit.rip, exit.length), (pauses(), 2), "RIP and instruction length");
    let left = stage.vm.registers.rcx;
    ensure!(left > 0 && left < PAUSES, "{left} of {PAUSES} PAUSEs were left at the exit");
    // At CPL 0 only; and one PAUSE is no loop.
    stage.passes(pause())?;
    stage.clear(Control::Proc2(ProcCtls2::PAUSE_LOOP_EXITING))?;
    stage.vm.registers.rcx = PAUSES;
    stage.passes(pauses())
}

fn wbinvd_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc2(ProcCtls2::WBINVD_EXITING);
    let exit = stage.both_ways(control, wbinvd(), ExitReason::WBINVD, 2)?;
    ensure_eq!(exit.qualification, 0, "exit qualification");
    Ok(())
}

/// The destination register (bits 6:3) and operand size (bits 12:11) of RDRAND and RDSEED.
fn destination() -> (u32, u32) {
    let info = instruction_information();
    (info >> 3 & 15, info >> 11 & 3)
}

/// One form of RDRAND or RDSEED: code, then destination register, operand size and length.
type Form = (u64, (u32, u32), u64);

fn random(ctx: &mut Ctx<'_>, control: Control, reason: ExitReason, forms: &[Form]) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    for &(code, expected, length) in forms {
        let before = 0x5555_5555_5555_5555;
        stage.vm.registers.rsi = before;
        stage.set(control)?;
        stage.intercepted(code, reason, length)?;
        ensure_eq!(destination(), expected, "destination and operand size");
        ensure_eq!(stage.vm.registers.rsi, before, "RSI after the exit");
        stage.clear(control)?;
        stage.passes(code)?;
    }
    Ok(())
}

fn rdrand_exits(ctx: &mut Ctx<'_>, forms: &[Form]) -> Verdict {
    if __cpuid(1).ecx & 1 << 30 == 0 {
        skip!("no RDRAND");
    }
    random(ctx, Control::Proc2(ProcCtls2::RDRAND_EXITING), ExitReason::RDRAND, forms)
}

fn rdseed_exits(ctx: &mut Ctx<'_>, forms: &[Form]) -> Verdict {
    if __cpuid_count(7, 0).ebx & 1 << 18 == 0 {
        skip!("no RDSEED");
    }
    random(ctx, Control::Proc2(ProcCtls2::RDSEED_EXITING), ExitReason::RDSEED, forms)
}

fn invpcid_stage(ctx: &mut Ctx<'_>) -> Result<Stage, crate::suite::Stop> {
    if __cpuid_count(7, 0).ebx & 1 << 10 == 0 {
        skip!("no INVPCID");
    }
    let mut stage = Stage::new(ctx)?;
    // Type 2: all contexts, globals included; the descriptor is zero.
    stage.vm.registers.rcx = 2;
    stage.vm.registers.rdi = ctx.arena.page().address();
    stage.vm.registers.rdx = 0x10;
    Ok(stage)
}

fn invpcid_enabled(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = invpcid_stage(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::INVPCID))?;
    stage.clear(Control::Proc(ProcCtls::INVLPG_EXITING))?;
    stage.passes(invpcid())?;
    stage.clear(Control::Proc2(ProcCtls2::INVPCID))?;
    stage.raises(invpcid(), vector::UD)?;
    stage.set(Control::Proc(ProcCtls::INVLPG_EXITING))?;
    stage.raises(invpcid(), vector::UD)?;
    Ok(())
}

fn invpcid_exits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = invpcid_stage(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::INVPCID))?;
    let control = Control::Proc(ProcCtls::INVLPG_EXITING);
    let exit = stage.both_ways(control, invpcid(), ExitReason::INVPCID, 7)?;
    ensure_eq!(exit.qualification, 0x40, "exit qualification: the displacement");
    let info = InstructionInfo::from(instruction_information());
    ensure_eq!((info.index(), info.index_invalid(), info.scaling()), (2, false, 1), "index");
    ensure_eq!((info.base(), info.base_invalid()), (7, false), "base");
    ensure_eq!((info.address_size(), info.segment()), (2, 3), "address size and segment");
    ensure_eq!(info.reg2(), 1, "the type's register");
    Ok(())
}

fn xsaves(ctx: &mut Ctx<'_>) -> Verdict {
    const OSXSAVE: u64 = 1 << 18;
    if __cpuid(1).ecx & 1 << 26 == 0 || __cpuid_count(0xD, 1).eax & 1 << 3 == 0 {
        skip!("no XSAVES");
    }
    let mut stage = Stage::new(ctx)?;
    let enable = Control::Proc2(ProcCtls2::XSAVES);
    stage.set(enable)?;
    vmcs::change(Field::GUEST_CR4, OSXSAVE, 0);
    vmcs::write(Field::XSS_EXITING_BITMAP, 0);
    let area = ctx.arena.page();
    stage.vm.registers.rdi = area.address();
    // x87 state only.
    stage.vm.registers.rax = 1;
    stage.passes(xsaves_code())?;
    ensure_eq!(area.read(65) >> 63, 1, "XCOMP_BV says compacted");
    stage.passes(xrstors_code())?;
    stage.clear(enable)?;
    stage.raises(xsaves_code(), vector::UD)?;
    stage.raises(xrstors_code(), vector::UD)?;
    // With a bit of the bitmap that IA32_XSS and EDX:EAX do not have together, no exit.
    stage.set(enable)?;
    vmcs::write(Field::XSS_EXITING_BITMAP, !0);
    stage.passes(xsaves_code())
}

fn gdtr_idtr(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::DESCRIPTOR_TABLE_EXITING))?;
    let page = ctx.arena.page();
    page.fill(0x7777);
    let registers = &mut stage.vm.registers;
    (registers.rdi, registers.rsi, registers.rcx) = (page.address(), page.address() + 0x20, 4);
    registers.r8 = [page.address(); 8];
    // Code, length, displacement, index, base, which of SGDT, SIDT, LGDT and LIDT.
    for (code, length, displacement, index, base, which) in [
        (sgdt(), 4, 8_i64, None, 7, 0),
        (sidt(), 4, 0, Some((1, 2)), 7, 1),
        (lgdt(), 4, 0, None, 8, 2),
        (lidt(), 4, -0x20, None, 6, 3),
    ] {
        let exit = stage.intercepted(code, ExitReason::GDTR_IDTR_ACCESS, length)?;
        ensure_eq!(exit.qualification as i64, displacement, "exit qualification of {which}");
        let bits = instruction_information();
        let info = InstructionInfo::from(bits);
        ensure_eq!(bits >> 28 & 3, which, "instruction identity");
        ensure_eq!((info.base(), info.base_invalid()), (base, false), "base of {which}");
        ensure_eq!(info.index_invalid(), index.is_none(), "index invalid of {which}");
        if let Some(index) = index {
            ensure_eq!((info.index(), info.scaling()), index, "index and scaling of {which}");
        }
        ensure_eq!((info.address_size(), info.segment()), (2, 3), "size and segment of {which}");
        ensure_eq!(page.read(1), 0x7777, "memory operand");
    }
    Ok(())
}

fn ldtr_tr(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::DESCRIPTOR_TABLE_EXITING))?;
    let page = ctx.arena.page();
    page.fill(0x7777);
    stage.vm.registers.rdi = page.address();
    stage.vm.registers.rax = 0x5555;
    stage.vm.registers.rcx = 0;
    stage.vm.registers.r8 = [page.address(); 8];
    // Code, length, displacement, register or base, which of SLDT, STR, LLDT and LTR.
    for (code, length, displacement, register, base, which) in [
        (sldt(), 3, 0, Some(0), None, 0),
        (str(), 3, 0, None, Some(7), 1),
        (lldt(), 3, 0, Some(1), None, 2),
        (ltr(), 6, 7, None, Some(12), 3),
    ] {
        let exit = stage.intercepted(code, ExitReason::LDTR_TR_ACCESS, length)?;
        // With a register operand it is 0, but Bochs stores what its decoder left there.
        if register.is_none() {
            ensure_eq!(exit.qualification, displacement, "exit qualification of {which}");
        }
        let bits = instruction_information();
        let info = InstructionInfo::from(bits);
        ensure_eq!(bits >> 28 & 3, which, "instruction identity");
        ensure_eq!(info.is_register(), register.is_some(), "register operand of {which}");
        if let Some(register) = register {
            ensure_eq!(info.reg1(), register, "register of {which}");
        }
        if let Some(base) = base {
            ensure_eq!((info.base(), info.base_invalid()), (base, false), "base of {which}");
            ensure_eq!((info.address_size(), info.segment()), (2, 3), "size, segment of {which}");
        }
        ensure_eq!(page.read(0), 0x7777, "memory operand");
        ensure_eq!(stage.vm.registers.rax, 0x5555, "register operand");
    }
    Ok(())
}

fn descriptor_off(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.clear(Control::Proc2(ProcCtls2::DESCRIPTOR_TABLE_EXITING))?;
    let page = ctx.arena.page();
    stage.vm.registers.rdi = page.address();
    stage.vm.registers.rcx = 0;
    stage.passes(sgdt())?;
    let limit = u64::from(gdt::table_limit());
    ensure_eq!(page.read(1), limit | gdt::table_base() << 16, "what SGDT stored");
    stage.passes(sldt())?;
    stage.passes(str())?;
    ensure_eq!(page.read(0) as u16, gdt::TSS, "what STR stored");
    stage.passes(lldt())?;
    ensure_eq!(vmcs::read(Field::GUEST_LDTR_AR) >> 16 & 1, 1, "LDTR unusable after LLDT of 0");
    page.write(2, 0x0FFF | 0x1234_5000 << 16);
    stage.vm.registers.r8[0] = page.address() + 16;
    stage.passes(lgdt())?;
    ensure_eq!(vmcs::read(Field::GUEST_GDTR_BASE), 0x1234_5000, "GDTR base");
    ensure_eq!(vmcs::read(Field::GUEST_GDTR_LIMIT), 0x0FFF, "GDTR limit");
    Ok(())
}

/// Without "activate secondary controls" the secondary controls count as 0.
fn secondary_off(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::WBINVD_EXITING))?;
    stage.intercepted(wbinvd(), ExitReason::WBINVD, 2)?;
    stage.clear(Control::Proc(ProcCtls::SECONDARY_CONTROLS))?;
    // EPT is off now, too: L2-physical addresses are L1's, which the tables map alike.
    stage.passes(wbinvd())?;
    stage.set(Control::Proc(ProcCtls::SECONDARY_CONTROLS))?;
    stage.intercepted(wbinvd(), ExitReason::WBINVD, 2)?;
    Ok(())
}

/// Faults that come before the exit: privilege, and CR4 bits ("Relative Priority of Faults and VM
/// Exits").
fn fault_before_exit(ctx: &mut Ctx<'_>) -> Verdict {
    const TSD: u64 = 1 << 2;
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::HLT_EXITING | ProcCtls::RDTSC_EXITING))?;
    let user = ctx.arena.page().address() + 0x800;
    vmcs::write(Field::GUEST_RSP, user);
    for (selector, rights, value) in [
        (Field::GUEST_CS_SELECTOR, Field::GUEST_CS_AR, (gdt::USER_CODE64, 0xA0FB)),
        (Field::GUEST_SS_SELECTOR, Field::GUEST_SS_AR, (gdt::USER_DATA, 0xC0F3)),
    ] {
        vmcs::write(selector, value.0.into());
        vmcs::write(rights, value.1);
    }
    for code in [hlt(), invd(), wbinvd()] {
        let exit = stage.raises(code, vector::GP)?;
        ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code at {:#x}", exit.rip);
    }
    stage.intercepted(rdtsc(), ExitReason::RDTSC, 2)?;
    vmcs::change(Field::GUEST_CR4, TSD, 0);
    stage.raises(rdtsc(), vector::GP)?;
    // CPUID exits at any privilege level.
    stage.intercepted(cpuid(), ExitReason::CPUID, 2)?;
    Ok(())
}
