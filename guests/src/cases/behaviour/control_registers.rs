//! Answers: what do L2's accesses to CR0, CR3, CR4, CR8 and the debug registers do under the
//! guest/host masks, read shadows, CR3-target values, the TPR shadow and the exiting controls?
//!
//! SDM Vol. 3C, "Changes to Instruction Behavior in VMX Non-Root Operation", "Guest/Host Masks and
//! Read Shadows for CR0 and CR4", "CR3-Target Controls", "Virtualizing CR8-Based TPR Accesses",
//! "Exit Qualification for Control-Register Accesses" and "... for MOV DR".

use vmx_defs::{ExitReason, Field, ProcCtls, ProcCtls2, event::vector, exit::CrAccess, msr};

use super::{Control, Stage};
use crate::{
    ensure_eq, l2_code,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Mode, Outcome, paging::Paging, rdmsr, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.cr0.read_shadow", run: cr0_shadow },
    Case { name: "behaviour.cr0.write", run: cr0_write },
    Case { name: "behaviour.cr0.fixed_bits", run: cr0_fixed },
    Case { name: "behaviour.cr0.clts", run: clts_cases },
    Case { name: "behaviour.cr0.lmsw", run: lmsw_cases },
    Case { name: "behaviour.cr0.lmsw.memory", run: lmsw_from_memory },
    Case { name: "behaviour.cr4.read_shadow", run: cr4_shadow },
    Case { name: "behaviour.cr4.write", run: cr4_write },
    Case { name: "behaviour.cr4.fixed_bits", run: cr4_fixed },
    Case { name: "behaviour.cr3.load", run: cr3_load },
    Case { name: "behaviour.cr3.load.targets", run: cr3_targets },
    Case { name: "behaviour.cr3.store", run: cr3_store },
    Case { name: "behaviour.cr8.load", run: cr8_load },
    Case { name: "behaviour.cr8.store", run: cr8_store },
    Case { name: "behaviour.tpr_shadow", run: tpr_shadow },
    Case { name: "behaviour.tpr_shadow.threshold", run: tpr_threshold },
    Case { name: "behaviour.tpr_shadow.threshold.at_entry", run: threshold_at_entry },
    Case { name: "behaviour.tpr_shadow.threshold.checked", run: threshold_checked },
    Case { name: "behaviour.tpr_shadow.exits_first", run: tpr_exits_first },
    Case { name: "behaviour.mov_dr", run: mov_dr },
    Case { name: "behaviour.mov_dr.aliases", run: mov_dr_alias },
    Case { name: "behaviour.mov_dr.ud_first", run: mov_dr_ud_first },
];

l2_code! {
    read_cr0: "mov rax, cr0";
    smsw_ecx: "smsw ecx";
    write_cr0: "mov cr0, rdx";
    clts: "clts";
    lmsw: "lmsw si";
    lmsw_memory: "lmsw word ptr [rdi + 0x20]";
    read_cr4: "mov r8, cr4";
    write_cr4: "mov cr4, r8";
    read_cr3: "mov r9, cr3";
    write_cr3: "mov cr3, r9";
    read_cr8: "mov r10, cr8";
    write_cr8: "mov cr8, rbx";
    write_dr0: "mov dr0, rcx";
    read_dr3: "mov rsi, dr3";
    read_dr7: "mov r11, dr7";
    read_dr6: "mov rax, dr6";
    // MOV from DR4, which assemblers know but compilers' ones may not: 0F 21 E0.
    read_dr4: ".byte 0x0F, 0x21, 0xE0";
}

const MP: u64 = 1 << 1;
const TS: u64 = 1 << 3;
const NE: u64 = 1 << 5;
const AM: u64 = 1 << 18;
const VMXE: u64 = 1 << 13;
const DE: u64 = 1 << 3;
const PCE: u64 = 1 << 8;

fn expect_cr(
    stage: &mut Stage,
    start: u64,
    length: u64,
    register: u8,
    access: u8,
    gpr: u8,
) -> Result<CrAccess, Stop> {
    let exit = stage.intercepted(start, ExitReason::CR_ACCESS, length)?;
    let access_found = CrAccess::from(exit.qualification);
    ensure_eq!(
        (access_found.register(), access_found.access(), access_found.gpr()),
        (register, access, gpr),
        "register, kind of access and general register"
    );
    Ok(access_found)
}

fn cr0_shadow(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR0) & !(TS | AM);
    vmcs::write(Field::GUEST_CR0, real | AM);
    stage.passes(read_cr0())?;
    ensure_eq!(stage.vm.registers.rax, real | AM, "CR0 with an empty mask");
    vmcs::write(Field::CR0_MASK, TS | AM | NE);
    vmcs::write(Field::CR0_SHADOW, TS);
    stage.passes(read_cr0())?;
    let expected = real & !NE | TS;
    ensure_eq!(stage.vm.registers.rax, expected, "CR0 with TS, AM and NE masked");
    stage.passes(smsw_ecx())?;
    ensure_eq!(stage.vm.registers.rcx as u16, expected as u16, "SMSW");
    ensure_eq!(vmcs::read(Field::GUEST_CR0), real | AM, "guest CR0");
    Ok(())
}

fn cr0_write(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR0) & !(TS | AM | MP);
    vmcs::write(Field::GUEST_CR0, real);
    // TS belongs to L1, which shows it set; L2 may change AM and MP.
    vmcs::write(Field::CR0_MASK, TS);
    vmcs::write(Field::CR0_SHADOW, TS);
    stage.vm.registers.rdx = real | TS | AM;
    stage.passes(write_cr0())?;
    ensure_eq!(vmcs::read(Field::GUEST_CR0), real | AM, "guest CR0: only AM is new");
    stage.vm.registers.rdx = real | MP;
    expect_cr(&mut stage, write_cr0(), 3, 0, 0, 2)?;
    ensure_eq!(vmcs::read(Field::GUEST_CR0), real | AM, "guest CR0 after the exit");
    vmcs::write(Field::CR0_SHADOW, 0);
    stage.passes(write_cr0())?;
    ensure_eq!(vmcs::read(Field::GUEST_CR0), real | MP, "guest CR0 with another shadow");
    Ok(())
}

/// Bits that VMX operation fixes can't be changed by L2 even where the mask leaves them to it,
/// and with the mask they can't be reached.
fn cr0_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR0);
    stage.vm.registers.rdx = real & !NE;
    let exit = stage.raises(write_cr0(), vector::GP)?;
    ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code at {:#x}", exit.rip);
    vmcs::write(Field::CR0_MASK, NE);
    vmcs::write(Field::CR0_SHADOW, 0);
    stage.passes(write_cr0())?;
    ensure_eq!(vmcs::read(Field::GUEST_CR0), real, "guest CR0, NE masked");
    Ok(())
}

fn clts_cases(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR0) | TS;
    for (mask, shadow, after, exits) in [
        (0, 0, real & !TS, false),
        (0, TS, real & !TS, false),
        (TS, 0, real, false),
        (TS, TS, real, true),
    ] {
        vmcs::write(Field::GUEST_CR0, real);
        vmcs::write(Field::CR0_MASK, mask);
        vmcs::write(Field::CR0_SHADOW, shadow);
        if exits {
            let access = expect_cr(&mut stage, clts(), 2, 0, 2, 0)?;
            ensure_eq!(u64::from(access), 2 << 4, "exit qualification");
        } else {
            stage.passes(clts())?;
        }
        ensure_eq!(vmcs::read(Field::GUEST_CR0), after, "guest CR0, {mask:#x} {shadow:#x}");
    }
    Ok(())
}

fn lmsw_cases(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR0) & !(TS | MP | 0x4);
    // Mask, shadow, source: guest CR0 after it, or an exit.
    for (mask, shadow, source, after) in [
        (0, 0, 0xA_u64, Some(real | TS | MP)),
        // LMSW can't clear PE, masked or not.
        (0, 0, 0, Some(real)),
        (1, 1, 0, Some(real)),
        (1, 0, 1, None),
        (TS, TS, 0x9, Some(real)),
        (TS, 0, 0x9, None),
        (TS, TS, 0x3, None),
        (NE, 0, 0x3, Some(real | MP)),
    ] {
        vmcs::write(Field::GUEST_CR0, real);
        vmcs::write(Field::CR0_MASK, mask);
        vmcs::write(Field::CR0_SHADOW, shadow);
        stage.vm.registers.rsi = source | 0xABC0;
        match after {
            Some(after) => {
                stage.passes(lmsw())?;
                ensure_eq!(vmcs::read(Field::GUEST_CR0), after, "guest CR0, source {source:#x}");
            }
            None => {
                let access = expect_cr(&mut stage, lmsw(), 3, 0, 3, 0)?;
                ensure_eq!(access.lmsw_memory(), false, "register operand");
                ensure_eq!(u64::from(access.lmsw_source()), source | 0xABC0, "source data");
                ensure_eq!(vmcs::read(Field::GUEST_CR0), real, "guest CR0 after the exit");
            }
        }
    }
    Ok(())
}

fn lmsw_from_memory(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let page = ctx.arena.page();
    page.write(4, 0x1239);
    stage.vm.registers.rdi = page.address();
    vmcs::write(Field::CR0_MASK, TS);
    let exit = stage.intercepted(lmsw_memory(), ExitReason::CR_ACCESS, 4)?;
    let access = CrAccess::from(exit.qualification);
    ensure_eq!((access.register(), access.access()), (0, 3), "LMSW");
    ensure_eq!((access.lmsw_memory(), access.lmsw_source()), (true, 0x1239), "operand");
    ensure_eq!(exit.gla, page.address() + 0x20, "guest-linear address");
    Ok(())
}

fn cr4_shadow(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR4);
    stage.passes(read_cr4())?;
    ensure_eq!(stage.vm.registers.r8[0], real, "CR4 with an empty mask");
    vmcs::write(Field::CR4_MASK, VMXE | PCE);
    vmcs::write(Field::CR4_SHADOW, PCE);
    stage.passes(read_cr4())?;
    ensure_eq!(stage.vm.registers.r8[0], real & !VMXE | PCE, "CR4 with VMXE and PCE masked");
    ensure_eq!(vmcs::read(Field::GUEST_CR4), real, "guest CR4");
    Ok(())
}

fn cr4_write(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR4) & !(DE | PCE);
    vmcs::write(Field::GUEST_CR4, real);
    vmcs::write(Field::CR4_MASK, VMXE);
    vmcs::write(Field::CR4_SHADOW, 0);
    stage.vm.registers.r8[0] = real & !VMXE | DE;
    stage.passes(write_cr4())?;
    ensure_eq!(vmcs::read(Field::GUEST_CR4), real | DE, "guest CR4: only DE is new");
    stage.vm.registers.r8[0] = real | VMXE;
    expect_cr(&mut stage, write_cr4(), 4, 4, 0, 8)?;
    ensure_eq!(vmcs::read(Field::GUEST_CR4), real | DE, "guest CR4 after the exit");
    Ok(())
}

fn cr4_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let real = vmcs::read(Field::GUEST_CR4);
    stage.vm.registers.r8[0] = real & !VMXE;
    stage.raises(write_cr4(), vector::GP)?;
    let allowed = rdmsr(msr::VMX_CR4_FIXED1);
    for bit in (0..64).filter(|bit| allowed & 1 << bit == 0) {
        vmcs::write(Field::CR4_SHADOW, 1 << bit);
        stage.vm.registers.r8[0] = real | 1 << bit;
        stage.raises(write_cr4(), vector::GP)?;
        stage.passes(read_cr4())?;
        ensure_eq!(stage.vm.registers.r8[0], real, "what L2 reads, with bit {bit} in the shadow");
    }
    ensure_eq!(vmcs::read(Field::GUEST_CR4), real, "guest CR4");
    Ok(())
}

fn cr3_load(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::CR3_LOAD_EXITING);
    let own = stage.vm.paging.cr3;
    let other = Paging::new(ctx.arena, Mode::Long).cr3;
    stage.set(control)?;
    stage.vm.registers.r8[1] = other;
    expect_cr(&mut stage, write_cr3(), 4, 3, 0, 9)?;
    ensure_eq!(vmcs::read(Field::GUEST_CR3), own, "guest CR3 after the exit");
    stage.clear(control)?;
    stage.passes(write_cr3())?;
    ensure_eq!(vmcs::read(Field::GUEST_CR3), other, "guest CR3");
    Ok(())
}

fn cr3_targets(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let most = usize::from(stage.vmx.caps.misc.cr3_targets()).min(4);
    if most == 0 {
        skip!("no CR3-target values");
    }
    stage.set(Control::Proc(ProcCtls::CR3_LOAD_EXITING))?;
    let fields = [Field::CR3_TARGET0, Field::CR3_TARGET1, Field::CR3_TARGET2, Field::CR3_TARGET3];
    let own = stage.vm.paging.cr3;
    let targets = [(); 4].map(|()| Paging::new(ctx.arena, Mode::Long).cr3);
    for (field, target) in fields.into_iter().zip(targets).take(most) {
        vmcs::write(field, target);
    }
    for count in 0..=most {
        vmcs::write(Field::CR3_TARGET_COUNT, count as u64);
        for (index, target) in targets.into_iter().enumerate().take(most) {
            vmcs::write(Field::GUEST_CR3, own);
            stage.vm.registers.r8[1] = target;
            if index < count {
                stage.passes(write_cr3())?;
                ensure_eq!(vmcs::read(Field::GUEST_CR3), target, "guest CR3, target {index}");
            } else {
                expect_cr(&mut stage, write_cr3(), 4, 3, 0, 9)?;
                ensure_eq!(vmcs::read(Field::GUEST_CR3), own, "guest CR3, no target {index}");
            }
        }
    }
    // The target values are full ones: a difference in bit 3 exits.
    stage.vm.registers.r8[1] = targets[0] | 8;
    expect_cr(&mut stage, write_cr3(), 4, 3, 0, 9)?;
    Ok(())
}

fn cr3_store(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::CR3_STORE_EXITING);
    stage.set(control)?;
    stage.vm.registers.r8[1] = 0x5555;
    expect_cr(&mut stage, read_cr3(), 4, 3, 1, 9)?;
    ensure_eq!(stage.vm.registers.r8[1], 0x5555, "R9 after the exit");
    stage.clear(control)?;
    stage.passes(read_cr3())?;
    ensure_eq!(stage.vm.registers.r8[1], stage.vm.paging.cr3, "CR3 as L2 reads it");
    Ok(())
}

/// Puts CR8 of the machine back to 0 when the case ends well.
fn with_cr8_zero(stage: &mut Stage) -> Verdict {
    stage.vm.registers.rbx = 0;
    stage.passes(write_cr8())
}

fn cr8_load(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::CR8_LOAD_EXITING);
    stage.set(control)?;
    stage.vm.registers.rbx = 5;
    expect_cr(&mut stage, write_cr8(), 4, 8, 0, 3)?;
    stage.clear(control)?;
    stage.passes(write_cr8())?;
    stage.passes(read_cr8())?;
    ensure_eq!(stage.vm.registers.r8[2], 5, "CR8 as L2 reads it");
    with_cr8_zero(&mut stage)
}

fn cr8_store(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::CR8_STORE_EXITING);
    stage.set(control)?;
    stage.vm.registers.r8[2] = 0x5555;
    expect_cr(&mut stage, read_cr8(), 4, 8, 1, 10)?;
    ensure_eq!(stage.vm.registers.r8[2], 0x5555, "R10 after the exit");
    stage.clear(control)?;
    stage.passes(read_cr8())?;
    ensure_eq!(stage.vm.registers.r8[2], 0, "CR8 as L2 reads it");
    Ok(())
}

/// The word of the virtual-APIC page that holds the virtual TPR.
const VTPR: usize = 0x80 / 4;

fn with_tpr_shadow(ctx: &mut Ctx<'_>) -> Result<(Stage, Page), Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::TPR_SHADOW))?;
    stage.clear(Control::Proc(ProcCtls::CR8_LOAD_EXITING | ProcCtls::CR8_STORE_EXITING))?;
    let page = ctx.arena.page();
    vmcs::write(Field::VIRTUAL_APIC_ADDR, page.address());
    vmcs::write(Field::TPR_THRESHOLD, 0);
    Ok((stage, page))
}

fn tpr_shadow(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_tpr_shadow(ctx)?;
    page.write32(VTPR, 0x7F);
    stage.passes(read_cr8())?;
    ensure_eq!(stage.vm.registers.r8[2], 7, "CR8: bits 7:4 of VTPR");
    for value in [0, 1, 9, 15] {
        stage.vm.registers.rbx = value;
        stage.passes(write_cr8())?;
        ensure_eq!(u64::from(page.read32(VTPR)), value << 4, "VTPR");
        stage.passes(read_cr8())?;
        ensure_eq!(stage.vm.registers.r8[2], value, "CR8 as L2 reads it");
    }
    // The machine's own TPR is not concerned.
    let cr8: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, cr8", out(reg) cr8, options(nomem, nostack)) };
    ensure_eq!(cr8, 0, "CR8 of L1");
    Ok(())
}

/// The exit comes after the instruction, which is completed.
fn tpr_threshold(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_tpr_shadow(ctx)?;
    for (threshold, value, exits) in
        [(5, 5, false), (5, 6, false), (5, 4, true), (15, 14, true), (0, 0, false), (1, 0, true)]
    {
        page.write32(VTPR, 0xF0);
        vmcs::write(Field::TPR_THRESHOLD, threshold);
        stage.vm.registers.rbx = value;
        let exit = stage.exit_from(write_cr8())?;
        let expected = if exits { ExitReason::TPR_BELOW_THRESHOLD } else { ExitReason::VMCALL };
        ensure_eq!(exit.reason, expected, "exit reason of {value} with threshold {threshold}");
        ensure_eq!(exit.rip, write_cr8() + 4, "RIP");
        ensure_eq!(u64::from(page.read32(VTPR)), value << 4, "VTPR");
    }
    Ok(())
}

/// With "virtualize APIC accesses" a threshold above the TPR is met right after the VM entry.
fn threshold_at_entry(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_tpr_shadow(ctx)?;
    stage.set(Control::Proc2(ProcCtls2::VIRTUALIZE_APIC_ACCESSES))?;
    vmcs::write(Field::APIC_ACCESS_ADDR, ctx.arena.page().address());
    page.write32(VTPR, 0x30);
    vmcs::write(Field::TPR_THRESHOLD, 4);
    let exit = stage.exit_from(read_cr8())?;
    ensure_eq!(exit.reason, ExitReason::TPR_BELOW_THRESHOLD, "exit reason");
    ensure_eq!(exit.rip, read_cr8(), "RIP");
    vmcs::write(Field::TPR_THRESHOLD, 3);
    stage.passes(read_cr8())
}

/// Without it, such a threshold is an invalid control field.
fn threshold_checked(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_tpr_shadow(ctx)?;
    page.write32(VTPR, 0x30);
    for (threshold, valid) in [(3, true), (4, false), (2, true), (0x10, false), (0x100, false)] {
        vmcs::write(Field::TPR_THRESHOLD, threshold);
        vmcs::write(Field::GUEST_RIP, read_cr8());
        match stage.vm.run() {
            Outcome::Exit(_) if valid => {}
            Outcome::VmFail(_, 7) if !valid => {}
            other => crate::fail!("threshold {threshold:#x}, VTPR 30H: {other:?}"),
        }
    }
    Ok(())
}

/// The CR8 exiting controls come before the TPR shadow.
fn tpr_exits_first(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_tpr_shadow(ctx)?;
    stage.set(Control::Proc(ProcCtls::CR8_LOAD_EXITING | ProcCtls::CR8_STORE_EXITING))?;
    page.write32(VTPR, 0x30);
    stage.vm.registers.rbx = 5;
    expect_cr(&mut stage, write_cr8(), 4, 8, 0, 3)?;
    ensure_eq!(page.read32(VTPR), 0x30, "VTPR");
    expect_cr(&mut stage, read_cr8(), 4, 8, 1, 10)?;
    // Values with bits 63:4 are #GP before any of it.
    stage.clear(Control::Proc(ProcCtls::CR8_LOAD_EXITING))?;
    stage.vm.registers.rbx = 0x10;
    stage.raises(write_cr8(), vector::GP)?;
    Ok(())
}

fn mov_dr(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    let control = Control::Proc(ProcCtls::MOV_DR_EXITING);
    stage.vm.registers.rcx = 0x1234;
    // Code, length, debug register, from it, general register.
    for (code, length, register, from, gpr) in [
        (write_dr0(), 3, 0_u64, 0_u64, 1_u64),
        (read_dr3(), 3, 3, 1, 6),
        (read_dr6(), 3, 6, 1, 0),
        (read_dr7(), 4, 7, 1, 11),
    ] {
        stage.set(control)?;
        let exit = stage.intercepted(code, ExitReason::MOV_DR, length)?;
        ensure_eq!(exit.qualification, register | from << 4 | gpr << 8, "qualification");
        stage.clear(control)?;
        stage.passes(code)?;
    }
    let dr0: u64;
    // SAFETY: reads a register; DR0 to DR3 are not switched by VM exits.
    unsafe { core::arch::asm!("mov {}, dr0", out(reg) dr0, options(nomem, nostack)) };
    ensure_eq!(dr0, 0x1234, "DR0 in L1");
    ensure_eq!(stage.vm.registers.r8[3], 0x400, "DR7 as L2 reads it");
    Ok(())
}

/// DR4 is DR6 without CR4.DE, and #UD with it.
fn mov_dr_alias(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    vmcs::change(Field::GUEST_CR4, 0, DE);
    stage.clear(Control::Proc(ProcCtls::MOV_DR_EXITING))?;
    stage.passes(read_dr6())?;
    let dr6 = stage.vm.registers.rax;
    stage.passes(read_dr4())?;
    ensure_eq!(stage.vm.registers.rax, dr6, "DR4");
    vmcs::change(Field::GUEST_CR4, DE, 0);
    stage.raises(read_dr4(), vector::UD)?;
    Ok(())
}

/// An invalid opcode comes before the exit ("Relative Priority of Faults and VM Exits").
fn mov_dr_ud_first(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    vmcs::change(Field::GUEST_CR4, DE, 0);
    stage.set(Control::Proc(ProcCtls::MOV_DR_EXITING))?;
    stage.raises(read_dr4(), vector::UD)?;
    Ok(())
}
