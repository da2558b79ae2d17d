//! Answers: which accesses to I/O ports and MSRs exit, and with what information?
//!
//! SDM Vol. 3C, "I/O-Bitmap Addresses", "MSR-Bitmap Address", "Instructions That Cause VM Exits
//! Conditionally", "Exit Qualification for I/O Instructions" and "Information for VM Exits Due to
//! Instruction Execution" (INS and OUTS).

use vmx_defs::{ExitReason, Field, ProcCtls, event::vector, exit::IoAccess, msr};

use super::{Control, Stage, instruction_information};
use crate::{
    ensure_eq, gdt, l2_code,
    memory::Page,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::vmcs,
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "behaviour.io.unconditional", run: unconditional },
    Case { name: "behaviour.io.off", run: io_off },
    Case { name: "behaviour.io.string", run: string },
    Case { name: "behaviour.io.privilege_first", run: privilege_first },
    Case { name: "behaviour.io.bitmap_a", run: |ctx| bitmap(ctx, 0x0080, 0x0081) },
    Case { name: "behaviour.io.bitmap_a.edge", run: |ctx| bitmap(ctx, 0x7FFF, 0x7FFE) },
    Case { name: "behaviour.io.bitmap_b", run: |ctx| bitmap(ctx, 0x8000, 0x8001) },
    Case { name: "behaviour.io.bitmap_b.edge", run: |ctx| bitmap(ctx, 0xFFFF, 0xFFFE) },
    Case { name: "behaviour.io.bitmap.every_byte", run: every_byte },
    Case { name: "behaviour.io.bitmap.across_both", run: across },
    Case { name: "behaviour.io.bitmap.wraps", run: wraps },
    Case { name: "behaviour.io.bitmap.over_unconditional", run: over_unconditional },
    Case { name: "behaviour.msr.no_bitmap", run: msr_off },
    Case { name: "behaviour.msr.read_low", run: |ctx| msr_bit(ctx, 0x0174, 0x0175, false) },
    Case { name: "behaviour.msr.read_high", run: |ctx| msr_bit(ctx, LSTAR, STAR, false) },
    Case { name: "behaviour.msr.write_low", run: |ctx| msr_bit(ctx, 0x0174, 0x0175, true) },
    Case { name: "behaviour.msr.write_high", run: |ctx| msr_bit(ctx, LSTAR, STAR, true) },
    Case { name: "behaviour.msr.edges", run: msr_edges },
    Case { name: "behaviour.msr.out_of_range", run: msr_out_of_range },
    Case { name: "behaviour.msr.upper_half_of_rcx", run: msr_rcx },
    Case { name: "behaviour.msr.privilege_first", run: msr_privilege },
    Case { name: "behaviour.msr.fs_base", run: msr_fs_base },
    Case { name: "behaviour.msr.other_bitmap", run: msr_other_bitmap },
];

l2_code! {
    in_al: "in al, dx";
    in_ax: "in ax, dx";
    in_eax: "in eax, dx";
    in_al_imm: "in al, 0x80";
    out_al: "out dx, al";
    out_ax: "out dx, ax";
    out_eax: "out dx, eax";
    out_imm: "out 0x80, eax";
    insb: "insb";
    // OUTSD from FS with a 32-bit address: 64 67 6F.
    outsd: ".byte 0x64, 0x67, 0x6F";
    rep_insw: "rep insw";
    rdmsr: "rdmsr";
    wrmsr: "wrmsr";
}

const STAR: u64 = 0xC000_0081;
const LSTAR: u64 = 0xC000_0082;

/// A port that nothing listens at: the diagnostic one.
const QUIET: u64 = 0x80;

fn unconditional_stage(ctx: &mut Ctx<'_>) -> Result<Stage, Stop> {
    let stage = Stage::new(ctx)?;
    stage.clear(Control::Proc(ProcCtls::IO_BITMAPS))?;
    stage.set(Control::Proc(ProcCtls::UNCONDITIONAL_IO_EXITING))?;
    Ok(stage)
}

fn unconditional(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = unconditional_stage(ctx)?;
    // Upper bits of RDX do not count.
    stage.vm.registers.rdx = 0x1_1234;
    stage.vm.registers.rax = 0x5555_5555;
    let by_dx = IoAccess::new().with_port(0x1234);
    let immediate = IoAccess::new().with_port(0x80).with_immediate(true);
    for (code, length, expected) in [
        (in_al(), 1, by_dx.with_is_in(true)),
        (in_ax(), 2, by_dx.with_is_in(true).with_size_minus_1(1)),
        (in_eax(), 1, by_dx.with_is_in(true).with_size_minus_1(3)),
        (in_al_imm(), 2, immediate.with_is_in(true)),
        (out_al(), 1, by_dx),
        (out_ax(), 2, by_dx.with_size_minus_1(1)),
        (out_eax(), 1, by_dx.with_size_minus_1(3)),
        (out_imm(), 2, immediate.with_size_minus_1(3)),
    ] {
        let exit = stage.intercepted(code, ExitReason::IO_INSTRUCTION, length)?;
        ensure_eq!(exit.qualification, u64::from(expected), "exit qualification");
        ensure_eq!(stage.vm.registers.rax, 0x5555_5555, "RAX after the exit");
    }
    Ok(())
}

fn io_off(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.clear(Control::Proc(ProcCtls::IO_BITMAPS | ProcCtls::UNCONDITIONAL_IO_EXITING))?;
    stage.vm.registers.rdx = QUIET;
    for code in [out_al(), in_al(), out_imm(), in_al_imm()] {
        stage.passes(code)?;
    }
    Ok(())
}

fn string(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = unconditional_stage(ctx)?;
    if !stage.vmx.caps.basic.ins_outs_info() {
        crate::skip!("no instruction information for INS and OUTS");
    }
    let page = ctx.arena.page();
    page.fill(0x7777);
    vmcs::write(Field::GUEST_FS_BASE, 0x3000);
    stage.vm.registers.rdx = QUIET;
    stage.vm.registers.rdi = page.address();
    stage.vm.registers.rsi = page.address();
    stage.vm.registers.rcx = 3;
    let port = IoAccess::new().with_port(QUIET as u16).with_string(true);
    let address_size = |info: u32| info >> 7 & 7;
    let exit = stage.intercepted(insb(), ExitReason::IO_INSTRUCTION, 1)?;
    ensure_eq!(exit.qualification, u64::from(port.with_is_in(true)), "INSB");
    ensure_eq!(exit.gla, page.address(), "guest-linear address of INSB");
    ensure_eq!(address_size(instruction_information()), 2, "address size of INSB");
    let exit = stage.intercepted(rep_insw(), ExitReason::IO_INSTRUCTION, 3)?;
    let expected = port.with_is_in(true).with_rep(true).with_size_minus_1(1);
    ensure_eq!(exit.qualification, u64::from(expected), "REP INSW");
    ensure_eq!(exit.gla, page.address(), "guest-linear address of REP INSW");
    ensure_eq!(stage.vm.registers.rcx, 3, "RCX after the exit");
    let exit = stage.intercepted(outsd(), ExitReason::IO_INSTRUCTION, 3)?;
    ensure_eq!(exit.qualification, u64::from(port.with_size_minus_1(3)), "OUTSD");
    ensure_eq!(exit.gla, page.address() + 0x3000, "guest-linear address of OUTSD");
    let info = instruction_information();
    ensure_eq!((address_size(info), info >> 15 & 7), (1, 4), "address size, segment of OUTSD");
    ensure_eq!(page.read(0), 0x7777, "memory operand");
    Ok(())
}

/// L2 at CPL 3, with IOPL 0.
fn to_user(ctx: &mut Ctx<'_>) {
    vmcs::write(Field::GUEST_RSP, ctx.arena.page().address() + 0x800);
    vmcs::write(Field::GUEST_CS_SELECTOR, gdt::USER_CODE64.into());
    vmcs::write(Field::GUEST_CS_AR, 0xA0FB);
    vmcs::write(Field::GUEST_SS_SELECTOR, gdt::USER_DATA.into());
    vmcs::write(Field::GUEST_SS_AR, 0xC0F3);
}

/// The I/O permission check comes before the exit.
fn privilege_first(ctx: &mut Ctx<'_>) -> Verdict {
    const IOPL_3: u64 = 3 << 12;
    let mut stage = unconditional_stage(ctx)?;
    to_user(ctx);
    stage.vm.registers.rdx = QUIET;
    stage.raises(out_al(), vector::GP)?;
    vmcs::write(Field::GUEST_RFLAGS, 2 | IOPL_3);
    stage.intercepted(out_al(), ExitReason::IO_INSTRUCTION, 1)?;
    Ok(())
}

/// L2 with empty I/O bitmaps A and B.
fn with_bitmaps(ctx: &mut Ctx<'_>) -> Result<(Stage, [Page; 2]), Stop> {
    let stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::IO_BITMAPS))?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    vmcs::write(Field::IO_BITMAP_A, pages[0].address());
    vmcs::write(Field::IO_BITMAP_B, pages[1].address());
    Ok((stage, pages))
}

/// Sets the bit of a port and clears all others.
fn only(pages: [Page; 2], port: u64) {
    for page in pages {
        page.fill(0);
    }
    let bit = (port & 0x7FFF) as usize;
    pages[usize::from(port > 0x7FFF)].write(bit / 64, 1 << (bit % 64));
}

fn bitmap(ctx: &mut Ctx<'_>, port: u64, other: u64) -> Verdict {
    let (mut stage, pages) = with_bitmaps(ctx)?;
    stage.vm.registers.rdx = port;
    for code in [in_al(), out_al()] {
        // A bit that L1 changes counts from the next entry on.
        for _ in 0..2 {
            only(pages, port);
            let exit = stage.intercepted(code, ExitReason::IO_INSTRUCTION, 1)?;
            ensure_eq!(exit.qualification >> 16, port, "port");
            only(pages, other);
            stage.passes(code)?;
        }
    }
    stage.vm.registers.rdx = other;
    stage.intercepted(in_al(), ExitReason::IO_INSTRUCTION, 1)?;
    Ok(())
}

/// An access of several bytes exits if the bit of any of its ports is set.
fn every_byte(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, pages) = with_bitmaps(ctx)?;
    stage.vm.registers.rdx = QUIET;
    for port in QUIET - 1..=QUIET + 4 {
        only(pages, port);
        for (code, length, size) in [(in_al(), 1, 1), (in_ax(), 2, 2), (in_eax(), 1, 4)] {
            if (QUIET..QUIET + size).contains(&port) {
                stage.intercepted(code, ExitReason::IO_INSTRUCTION, length)?;
            } else {
                stage.passes(code)?;
            }
        }
    }
    Ok(())
}

/// Ports 7FFEH to 8001H: two bits of each bitmap.
fn across(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, pages) = with_bitmaps(ctx)?;
    stage.vm.registers.rdx = 0x7FFE;
    for port in 0x7FFD..=0x8002 {
        only(pages, port);
        if (0x7FFE..0x8002).contains(&port) {
            let exit = stage.intercepted(in_eax(), ExitReason::IO_INSTRUCTION, 1)?;
            ensure_eq!(exit.qualification >> 16, 0x7FFE, "port");
        } else {
            stage.passes(in_eax())?;
        }
    }
    Ok(())
}

/// An access that goes beyond port FFFFH always exits.
fn wraps(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, _) = with_bitmaps(ctx)?;
    for port in [0xFFFD, 0xFFFE, 0xFFFF] {
        stage.vm.registers.rdx = port;
        let exit = stage.intercepted(in_eax(), ExitReason::IO_INSTRUCTION, 1)?;
        ensure_eq!(exit.qualification >> 16, port, "port");
    }
    stage.vm.registers.rdx = 0xFFFC;
    stage.passes(in_eax())?;
    stage.vm.registers.rdx = 0xFFFF;
    stage.intercepted(in_ax(), ExitReason::IO_INSTRUCTION, 2)?;
    stage.passes(in_al())
}

/// With I/O bitmaps, "unconditional I/O exiting" has no effect.
fn over_unconditional(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, pages) = with_bitmaps(ctx)?;
    stage.set(Control::Proc(ProcCtls::UNCONDITIONAL_IO_EXITING))?;
    stage.vm.registers.rdx = QUIET;
    stage.passes(out_al())?;
    only(pages, QUIET);
    stage.intercepted(out_al(), ExitReason::IO_INSTRUCTION, 1)?;
    Ok(())
}

fn msr_off(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx)?;
    stage.clear(Control::Proc(ProcCtls::MSR_BITMAPS))?;
    for index in [0x10, 0x174, 0x1FFF, LSTAR, 0xC000_1FFF, 0x4000_0000, 0xFFFF_FFFF] {
        stage.vm.registers.rcx = index;
        let exit = stage.intercepted(rdmsr(), ExitReason::RDMSR, 2)?;
        ensure_eq!(exit.qualification, 0, "exit qualification");
        stage.intercepted(wrmsr(), ExitReason::WRMSR, 2)?;
    }
    Ok(())
}

/// L2 with an MSR bitmap that lets all through.
fn with_msr_bitmap(ctx: &mut Ctx<'_>) -> Result<(Stage, Page), Stop> {
    let mut stage = Stage::new(ctx)?;
    stage.set(Control::Proc(ProcCtls::MSR_BITMAPS))?;
    let page = ctx.arena.page();
    vmcs::write(Field::MSR_BITMAP, page.address());
    stage.vm.registers.rax = 0;
    stage.vm.registers.rdx = 0;
    Ok((stage, page))
}

/// Word and bit of an MSR in the bitmap.
fn msr_place(index: u64, write: bool) -> (usize, u64) {
    let part = if write { 256 } else { 0 } + if index >= 0xC000_0000 { 128 } else { 0 };
    let bit = (index & 0x1FFF) as usize;
    (part + bit / 64, 1 << (bit % 64))
}

fn msr_bit(ctx: &mut Ctx<'_>, index: u64, other: u64, write: bool) -> Verdict {
    let (mut stage, page) = with_msr_bitmap(ctx)?;
    let (code, reason) =
        if write { (wrmsr(), ExitReason::WRMSR) } else { (rdmsr(), ExitReason::RDMSR) };
    let opposite = if write { rdmsr() } else { wrmsr() };
    let (word, bit) = msr_place(index, write);
    for _ in 0..2 {
        // A bit that L1 changes counts from the next entry on.
        page.fill(0);
        stage.vm.registers.rcx = index;
        stage.passes(code)?;
        page.write(word, bit);
        stage.intercepted(code, reason, 2)?;
        stage.passes(opposite)?;
        stage.vm.registers.rcx = other;
        stage.passes(code)?;
        // All bits but this one.
        page.fill(!0);
        page.write(word, !bit);
        stage.intercepted(code, reason, 2)?;
        stage.vm.registers.rcx = index;
        stage.passes(code)?;
    }
    Ok(())
}

fn msr_edges(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_msr_bitmap(ctx)?;
    for index in [0, 0x1FFF, 0xC000_0000, 0xC000_1FFF] {
        for (write, code, reason) in
            [(false, rdmsr(), ExitReason::RDMSR), (true, wrmsr(), ExitReason::WRMSR)]
        {
            let (word, bit) = msr_place(index, write);
            page.fill(0);
            page.write(word, bit);
            stage.vm.registers.rcx = index;
            stage.intercepted(code, reason, 2)?;
        }
    }
    Ok(())
}

/// MSRs that the bitmap has no bit for always exit.
fn msr_out_of_range(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, _) = with_msr_bitmap(ctx)?;
    for index in
        [0x2000, 0x8000_0000, 0x4000_0000, 0xBFFF_FFFF, 0xC000_2000, 0xC001_0000, 0xFFFF_FFFF]
    {
        stage.vm.registers.rcx = index;
        stage.intercepted(rdmsr(), ExitReason::RDMSR, 2)?;
        stage.intercepted(wrmsr(), ExitReason::WRMSR, 2)?;
    }
    Ok(())
}

fn msr_rcx(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_msr_bitmap(ctx)?;
    let (word, bit) = msr_place(LSTAR, false);
    stage.vm.registers.rcx = LSTAR | 0x1234_5678 << 32;
    stage.passes(rdmsr())?;
    page.write(word, bit);
    stage.intercepted(rdmsr(), ExitReason::RDMSR, 2)?;
    Ok(())
}

/// RDMSR and WRMSR at CPL 3 are #GP before any exit.
fn msr_privilege(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_msr_bitmap(ctx)?;
    page.fill(!0);
    to_user(ctx);
    stage.vm.registers.rcx = LSTAR;
    stage.raises(rdmsr(), vector::GP)?;
    stage.raises(wrmsr(), vector::GP)?;
    Ok(())
}

/// MSRs that are VMCS fields follow the bitmap as any other.
fn msr_fs_base(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_msr_bitmap(ctx)?;
    let index = u64::from(msr::FS_BASE);
    stage.vm.registers.rcx = index;
    stage.vm.registers.rax = 0x1234_5000;
    stage.vm.registers.rdx = 0xFFFF_8000;
    stage.passes(wrmsr())?;
    ensure_eq!(vmcs::read(Field::GUEST_FS_BASE), 0xFFFF_8000_1234_5000, "guest FS base");
    // A value that is not canonical is #GP in L2.
    stage.vm.registers.rdx = 0x1234_0000;
    stage.raises(wrmsr(), vector::GP)?;
    let (word, bit) = msr_place(index, true);
    page.write(word, bit);
    stage.intercepted(wrmsr(), ExitReason::WRMSR, 2)?;
    Ok(())
}

/// Another address in the field is another bitmap at the next entry.
fn msr_other_bitmap(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, page) = with_msr_bitmap(ctx)?;
    let full = ctx.arena.page();
    full.fill(!0);
    stage.vm.registers.rcx = LSTAR;
    for _ in 0..2 {
        vmcs::write(Field::MSR_BITMAP, full.address());
        stage.intercepted(rdmsr(), ExitReason::RDMSR, 2)?;
        vmcs::write(Field::MSR_BITMAP, page.address());
        stage.passes(rdmsr())?;
    }
    Ok(())
}
