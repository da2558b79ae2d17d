//! Answers: does VM entry fail where the guest's non-register state is wrong?
//!
//! SDM Vol. 3C, "Checks on Guest Non-Register State".

use vmx_defs::{
    Field, PinCtls, ProcCtls2,
    event::{Interruptibility, activity, kind, vector},
    exit::entry_failure,
};

use super::{Clear, Edit, Expect, Set, To, Trial, beyond_width};
use crate::{
    memory::Page,
    skip,
    suite::{Case, Ctx, Verdict},
    vmx::{Mode, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.guest.activity", run: activity_state },
    Case { name: "entry.guest.activity.unsupported", run: activity_unsupported },
    Case { name: "entry.guest.activity.hlt_dpl", run: hlt_dpl },
    Case { name: "entry.guest.activity.blocked", run: activity_blocked },
    Case { name: "entry.guest.activity.injection.hlt", run: injection_in_hlt },
    Case { name: "entry.guest.activity.injection.shutdown", run: injection_in_shutdown },
    Case { name: "entry.guest.activity.injection.wait_for_sipi", run: injection_in_wait },
    Case { name: "entry.guest.interruptibility.reserved", run: reserved },
    Case { name: "entry.guest.interruptibility.sti", run: sti },
    Case { name: "entry.guest.interruptibility.smi", run: smi },
    Case { name: "entry.guest.interruptibility.interrupt", run: interrupt },
    Case { name: "entry.guest.interruptibility.nmi", run: nmi },
    Case { name: "entry.guest.interruptibility.nmi_and_sti", run: nmi_and_sti },
    Case { name: "entry.guest.interruptibility.virtual_nmi", run: virtual_nmi },
    Case { name: "entry.guest.interruptibility.enclave", run: enclave },
    Case { name: "entry.guest.pending_debug.reserved", run: pending_reserved },
    Case { name: "entry.guest.pending_debug.reserved.upper", run: pending_reserved_upper },
    Case { name: "entry.guest.pending_debug.single_step", run: pending_single_step },
    Case { name: "entry.guest.pending_debug.rtm", run: pending_rtm },
    Case { name: "entry.guest.link_pointer.address", run: link_address },
    Case { name: "entry.guest.link_pointer.revision", run: link_revision },
    Case { name: "entry.guest.link_pointer.shadow", run: link_shadow },
    Case { name: "entry.guest.link_pointer.current", run: link_current },
];

const BAD: Expect = Expect::Guest(entry_failure::DEFAULT);
const STI: u64 = Interruptibility::STI.bits() as u64;
const MOV_SS: u64 = Interruptibility::MOV_SS.bits() as u64;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;

fn state(activity: u32) -> Edit {
    To(Field::GUEST_ACTIVITY, activity.into())
}

fn blocking(bits: u64) -> Edit {
    To(Field::GUEST_INTERRUPTIBILITY, bits)
}

fn event(kind: u8, vector: u8) -> Edit {
    let code = kind == kind::HARDWARE_EXCEPTION && matches!(vector, 8 | 10..=14 | 17);
    let info = 1 << 31 | u64::from(code) << 11 | u64::from(kind) << 8 | u64::from(vector);
    To(Field::ENTRY_INTR_INFO, info)
}

/// An L2 that takes interrupts.
fn interruptible(ctx: &mut Ctx<'_>) -> Result<Trial, crate::suite::Stop> {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.base(&[
        To(Field::GUEST_RFLAGS, 2 | IF),
        To(Field::ENTRY_EXCEPTION_ERROR, 0),
        To(Field::ENTRY_INSTRUCTION_LEN, 1),
    ]);
    Ok(trial)
}

fn activity_state(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for bad in [4, 5, 8, 0x10, 0x100, 0x8000_0000, 0xFFFF_FFFF] {
        trial.row("a state that does not exist", &[state(bad)], BAD)?;
    }
    trial.row("active", &[state(activity::ACTIVE)], Expect::Enters)
}

/// States that IA32_VMX_MISC does not report; those that it does are not entered, for nothing might
/// end them.
fn activity_unsupported(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let misc = trial.vmx.caps.misc;
    for (supported, kind) in [
        (misc.activity_hlt(), activity::HLT),
        (misc.activity_shutdown(), activity::SHUTDOWN),
        (misc.activity_wait_sipi(), activity::WAIT_FOR_SIPI),
    ] {
        if !supported {
            trial.row("an unsupported state", &[state(kind)], BAD)?;
        }
    }
    Ok(())
}

fn hlt_dpl(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    if !trial.vmx.caps.misc.activity_hlt() {
        skip!("activity state HLT not supported");
    }
    for level in 1..4 {
        let edits = [
            state(activity::HLT),
            Set(Field::GUEST_SS_AR, level << 5),
            Set(Field::GUEST_CS_AR, level << 5),
            Set(Field::GUEST_SS_SELECTOR, level),
            Set(Field::GUEST_CS_SELECTOR, level),
        ];
        trial.row("HLT above CPL 0", &edits, BAD)?;
        trial.row("active above CPL 0", &edits[1..], Expect::Enters)?;
    }
    Ok(())
}

fn activity_blocked(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    let misc = trial.vmx.caps.misc;
    for (supported, kind) in [
        (misc.activity_hlt(), activity::HLT),
        (misc.activity_shutdown(), activity::SHUTDOWN),
        (misc.activity_wait_sipi(), activity::WAIT_FOR_SIPI),
    ] {
        if supported {
            trial.row("blocking by STI", &[state(kind), blocking(STI)], BAD)?;
            trial.row("blocking by MOV SS", &[state(kind), blocking(MOV_SS)], BAD)?;
        }
    }
    trial.row("active, blocking by STI", &[blocking(STI)], Expect::Enters)?;
    trial.row("active, blocking by MOV SS", &[blocking(MOV_SS)], Expect::Enters)
}

/// HLT ends with interrupts, NMIs, machine checks and debug exceptions.
fn injection_in_hlt(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    if !trial.vmx.caps.misc.activity_hlt() {
        skip!("activity state HLT not supported");
    }
    for (kind, vector, expected) in [
        (kind::EXTERNAL, 32, Expect::Enters),
        (kind::NMI, vector::NMI, Expect::Enters),
        (kind::HARDWARE_EXCEPTION, vector::DB, Expect::Enters),
        (kind::HARDWARE_EXCEPTION, vector::MC, Expect::Enters),
        (kind::HARDWARE_EXCEPTION, vector::UD, BAD),
        (kind::HARDWARE_EXCEPTION, vector::GP, BAD),
        (kind::SOFTWARE_INTERRUPT, 0x80, BAD),
        (kind::SOFTWARE_EXCEPTION, vector::BP, BAD),
        (kind::PRIVILEGED_SOFTWARE_EXCEPTION, vector::DB, BAD),
    ] {
        let edits = [state(activity::HLT), event(kind, vector)];
        trial.row("injection in HLT", &edits, expected)?;
    }
    Ok(())
}

/// Shutdown ends with NMIs and machine checks.
fn injection_in_shutdown(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    if !trial.vmx.caps.misc.activity_shutdown() {
        skip!("activity state shutdown not supported");
    }
    for (kind, vector, expected) in [
        (kind::NMI, vector::NMI, Expect::Enters),
        (kind::HARDWARE_EXCEPTION, vector::MC, Expect::Enters),
        (kind::EXTERNAL, 32, BAD),
        (kind::HARDWARE_EXCEPTION, vector::DB, BAD),
        (kind::HARDWARE_EXCEPTION, vector::UD, BAD),
        (kind::SOFTWARE_INTERRUPT, 0x80, BAD),
    ] {
        let edits = [state(activity::SHUTDOWN), event(kind, vector)];
        trial.row("injection in shutdown", &edits, expected)?;
    }
    Ok(())
}

/// Nothing may be injected into a processor that waits for a startup IPI.
fn injection_in_wait(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    for (kind, vector) in [
        (kind::NMI, vector::NMI),
        (kind::HARDWARE_EXCEPTION, vector::MC),
        (kind::EXTERNAL, 32),
        (kind::SOFTWARE_INTERRUPT, 0x80),
    ] {
        let edits = [state(activity::WAIT_FOR_SIPI), event(kind, vector)];
        trial.row("injection in wait-for-SIPI", &edits, BAD)?;
    }
    Ok(())
}

fn reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_set(Field::GUEST_INTERRUPTIBILITY, 0xFFFF_FFE0, BAD)
}

fn sti(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    trial.row("STI and MOV SS", &[blocking(STI | MOV_SS)], BAD)?;
    trial.row("STI, IF set", &[blocking(STI)], Expect::Enters)?;
    trial.row("STI, IF clear", &[blocking(STI), Clear(Field::GUEST_RFLAGS, IF)], BAD)?;
    let edits = [blocking(MOV_SS), Clear(Field::GUEST_RFLAGS, IF)];
    trial.row("MOV SS, IF clear", &edits, Expect::Enters)
}

/// Blocking by SMI outside system-management mode.
fn smi(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("SMI", &[blocking(Interruptibility::SMI.bits().into())], BAD)
}

fn interrupt(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    let interrupt = event(kind::EXTERNAL, 32);
    trial.row("blocked by STI", &[blocking(STI), interrupt], BAD)?;
    trial.row("blocked by MOV SS", &[blocking(MOV_SS), interrupt], BAD)?;
    trial.row("not blocked", &[interrupt], Expect::Enters)?;
    let nmi = Interruptibility::NMI.bits().into();
    trial.row("NMIs blocked", &[blocking(nmi), interrupt], Expect::Enters)?;
    let exception = event(kind::HARDWARE_EXCEPTION, vector::UD);
    trial.row("exception after STI", &[blocking(STI), exception], Expect::Enters)?;
    trial.row("exception after MOV SS", &[blocking(MOV_SS), exception], Expect::Enters)
}

fn nmi(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    let nmi = event(kind::NMI, vector::NMI);
    trial.row("blocked by MOV SS", &[blocking(MOV_SS), nmi], BAD)?;
    trial.row("not blocked", &[nmi], Expect::Enters)
}

/// Processors may or may not refuse an NMI after STI.
fn nmi_and_sti(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    let edits = [blocking(STI), event(kind::NMI, vector::NMI)];
    let expected = Expect::GuestOrEnters(entry_failure::NMI_INJECTION);
    trial.row("blocked by STI", &edits, expected)
}

fn virtual_nmi(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = interruptible(ctx)?;
    let pin = PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS;
    if trial.vmx.caps.pin.may_be_1 & pin.bits() != pin.bits() {
        skip!("virtual NMIs not offered");
    }
    let blocked = blocking(Interruptibility::NMI.bits().into());
    trial.base(&[Set(Field::PIN_CTLS, pin.bits().into())]);
    trial.row("blocked virtual NMI", &[blocked, event(kind::NMI, vector::NMI)], BAD)?;
    trial.row("no NMI", &[blocked], Expect::Enters)?;
    trial.row("not blocked", &[event(kind::NMI, vector::NMI)], Expect::Enters)
}

fn enclave(ctx: &mut Ctx<'_>) -> Verdict {
    let sgx = core::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 2 != 0;
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let enclave = u64::from(Interruptibility::ENCLAVE.bits());
    trial.row("enclave and MOV SS", &[blocking(enclave | MOV_SS)], BAD)?;
    if !sgx {
        trial.row("no enclaves", &[blocking(enclave)], BAD)?;
    }
    Ok(())
}

fn pending(bits: u64) -> Edit {
    To(Field::GUEST_PENDING_DEBUG, bits)
}

/// BS: a single step is pending.
const BS: u64 = 1 << 14;
/// An enabled breakpoint was met.
const ENABLED_BREAKPOINT: u64 = 1 << 12;

/// Bits 10:4, 13, 15 and 31:17. Bit 11 means bus-lock detection on newer processors.
fn pending_reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let reserved = 0x7F0 | 1 << 13 | 1 << 15 | 0xFFFE_0000;
    trial.each_set(Field::GUEST_PENDING_DEBUG, reserved, BAD)?;
    let edits = [pending(ENABLED_BREAKPOINT | 0xF)];
    trial.row("breakpoints", &edits, Expect::Enters)
}

/// Bits 63:32.
fn pending_reserved_upper(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_set(Field::GUEST_PENDING_DEBUG, 0xFFFF_FFFF_0000_0000, BAD)
}

/// While something delays debug exceptions, BS goes with RFLAGS.TF and IA32_DEBUGCTL.BTF.
fn pending_single_step(ctx: &mut Ctx<'_>) -> Verdict {
    const BTF: u64 = 1 << 1;
    let mut trial = interruptible(ctx)?;
    for delay in [blocking(STI), blocking(MOV_SS), state(activity::HLT)] {
        let halted = matches!(delay, To(Field::GUEST_ACTIVITY, _));
        if halted && !trial.vmx.caps.misc.activity_hlt() {
            continue;
        }
        let tf = Set(Field::GUEST_RFLAGS, TF);
        let btf = To(Field::GUEST_DEBUGCTL, BTF);
        trial.row("TF without BS", &[delay, tf, pending(0)], BAD)?;
        trial.row("BS without TF", &[delay, pending(BS)], BAD)?;
        trial.row("BS with BTF", &[delay, tf, btf, pending(BS)], BAD)?;
        // What wakes a processor that enters in HLT is another question.
        if !halted {
            trial.row("TF with BS", &[delay, tf, pending(BS)], Expect::Enters)?;
            trial.row("TF and BTF without BS", &[delay, tf, btf], Expect::Enters)?;
        }
    }
    Ok(())
}

/// Bit 16 (RTM) comes with bit 12 alone, never after MOV SS, and where there is RTM.
fn pending_rtm(ctx: &mut Ctx<'_>) -> Verdict {
    const RTM: u64 = 1 << 16;
    let has_rtm = core::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 11 != 0;
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("without bit 12", &[pending(RTM)], BAD)?;
    trial.row("with another bit", &[pending(RTM | ENABLED_BREAKPOINT | 1)], BAD)?;
    trial.row("with BS", &[pending(RTM | ENABLED_BREAKPOINT | BS)], BAD)?;
    let edits = [pending(RTM | ENABLED_BREAKPOINT), blocking(MOV_SS)];
    trial.row("after MOV SS", &edits, BAD)?;
    if !has_rtm {
        trial.row("no RTM", &[pending(RTM | ENABLED_BREAKPOINT)], BAD)?;
    }
    Ok(())
}

const BAD_LINK: Expect = Expect::Guest(entry_failure::VMCS_LINK_POINTER);

fn link(address: u64) -> Edit {
    To(Field::VMCS_LINK_POINTER, address)
}

/// A page with this revision identifier.
fn region(ctx: &mut Ctx<'_>, revision: u32) -> Page {
    let page = ctx.arena.page();
    page.write32(0, revision);
    page
}

fn link_address(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let page = region(ctx, trial.vmx.caps.basic.revision()).address();
    trial.base(&[link(page)]);
    trial.row("a good region", &[], Expect::Enters)?;
    let wide = beyond_width(&trial.vmx);
    trial.each_set(Field::VMCS_LINK_POINTER, 0xFFF | wide, BAD_LINK)?;
    trial.row("none", &[link(u64::MAX)], Expect::Enters)?;
    trial.row("almost none", &[link(u64::MAX - 1)], BAD_LINK)?;
    trial.row("none in 32 bits", &[link(0xFFFF_FFFF)], BAD_LINK)
}

fn link_revision(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let revision = trial.vmx.caps.basic.revision();
    for bit in 0..31 {
        let page = region(ctx, revision ^ 1 << bit);
        trial.row("another revision", &[link(page.address())], BAD_LINK)?;
    }
    let page = region(ctx, revision);
    trial.row("the revision", &[link(page.address())], Expect::Enters)
}

/// The shadow-VMCS indicator is equal to the control "VMCS shadowing".
fn link_shadow(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let revision = trial.vmx.caps.basic.revision();
    let (plain, shadow) = (region(ctx, revision), region(ctx, revision | 1 << 31));
    trial.row("a shadow VMCS without shadowing", &[link(shadow.address())], BAD_LINK)?;
    if trial.vmx.caps.has2(ProcCtls2::VMCS_SHADOWING) {
        trial.base(&[Set(Field::PROC_CTLS2, ProcCtls2::VMCS_SHADOWING.bits().into())]);
        trial.row("a plain VMCS with shadowing", &[link(plain.address())], BAD_LINK)?;
        trial.row("a shadow VMCS with shadowing", &[link(shadow.address())], Expect::Enters)?;
    }
    Ok(())
}

fn link_current(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let current = trial.vm.vmcs.address();
    trial.row("the current VMCS", &[link(current)], BAD_LINK)?;
    let vmxon = trial.vmx.vmxon_region.address();
    let good = vmcs::read(Field::VMCS_LINK_POINTER);
    trial.row("none again", &[link(good)], Expect::Enters)?;
    // The VMXON region is no VMCS, but the check is on address and revision only.
    trial.row("the VMXON region", &[link(vmxon)], Expect::Enters)
}
