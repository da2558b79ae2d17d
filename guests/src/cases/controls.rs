//! Answers: do the capability MSRs agree with themselves, and is each control bit held to them?
//!
//! SDM Vol. 3D, Appendix A, "VMX Capability Reporting Facility"; Vol. 3C, "VMX-Fixed Bits" in
//! "Restrictions on VMX Operation" and "Checks on VMX Controls".

use vmx_defs::{
    EntryCtls, ExitCtls, Field, PinCtls, ProcCtls, ProcCtls2,
    msr::{self, Allowed, EptVpidCap, FeatureControl},
};
use x86_64::registers::control::{Cr0, Cr4};

use super::entry_checks::{Clear, Edit, Expect, Set, To, Trial};
use crate::{
    ensure, ensure_eq, skip,
    suite::{Case, Ctx, Verdict},
    traps::catch,
    vmx::{self, Caps, Mode, Vmx, rdmsr, vmcs, wrmsr},
};

/// The cases on the capability MSRs.
pub const CAPABILITIES: &[Case] = &[
    Case { name: "caps.readable", run: readable },
    Case { name: "caps.read_only", run: read_only },
    Case { name: "caps.basic", run: basic },
    Case { name: "caps.pin", run: |_| plain_and_true(&PIN) },
    Case { name: "caps.proc", run: |_| plain_and_true(&PROC) },
    Case { name: "caps.exit", run: |_| plain_and_true(&EXIT) },
    Case { name: "caps.entry", run: |_| plain_and_true(&ENTRY) },
    Case { name: "caps.proc2", run: proc2 },
    Case { name: "caps.misc", run: misc },
    Case { name: "caps.cr_fixed", run: cr_fixed },
    Case { name: "caps.cr0_mov", run: cr0_mov },
    Case { name: "caps.cr4_mov", run: cr4_mov },
    Case { name: "caps.ept_vpid", run: ept_vpid },
    Case { name: "caps.feature_control", run: feature_control },
];

/// The cases on the control bits.
pub const CONTROLS: &[Case] = &[
    Case { name: "controls.pin.must_be_1", run: |ctx| must_be_1(ctx, &PIN) },
    Case { name: "controls.pin.may_not_be_1", run: |ctx| may_not_be_1(ctx, &PIN) },
    Case { name: "controls.pin.allowed", run: |ctx| allowed(ctx, &PIN) },
    Case { name: "controls.proc.must_be_1", run: |ctx| must_be_1(ctx, &PROC) },
    Case { name: "controls.proc.may_not_be_1", run: |ctx| may_not_be_1(ctx, &PROC) },
    Case { name: "controls.proc.allowed", run: |ctx| allowed(ctx, &PROC) },
    Case { name: "controls.proc2.may_not_be_1", run: |ctx| may_not_be_1(ctx, &PROC2) },
    Case { name: "controls.proc2.allowed", run: |ctx| allowed(ctx, &PROC2) },
    Case { name: "controls.exit.must_be_1", run: |ctx| must_be_1(ctx, &EXIT) },
    Case { name: "controls.exit.may_not_be_1", run: |ctx| may_not_be_1(ctx, &EXIT) },
    Case { name: "controls.exit.allowed", run: |ctx| allowed(ctx, &EXIT) },
    Case { name: "controls.entry.must_be_1", run: |ctx| must_be_1(ctx, &ENTRY) },
    Case { name: "controls.entry.may_not_be_1", run: |ctx| may_not_be_1(ctx, &ENTRY) },
    Case { name: "controls.entry.allowed", run: |ctx| allowed(ctx, &ENTRY) },
    Case { name: "controls.entry.smm", run: entry_smm },
];

/// One set of controls.
struct Controls {
    field: Field,
    plain: u32,
    exact: u32,
    /// Bits that are 1 where software knows nothing of the TRUE MSRs (Vol. 3D, "Reserved Controls
    /// and Default Settings").
    default1: u32,
    allowed: fn(&Caps) -> Allowed,
    /// What has to be changed with this bit, and how far the VM entry then gets; `None` for a bit
    /// that is not tried.
    plan: fn(u32) -> Option<(Prerequisites, Expect)>,
}

type Prerequisites = arrayvec::ArrayVec<Edit, 6>;

const PIN: Controls = Controls {
    field: Field::PIN_CTLS,
    plain: msr::VMX_PINBASED_CTLS,
    exact: msr::VMX_TRUE_PINBASED_CTLS,
    default1: 0x16,
    allowed: |caps| caps.pin,
    plan: plan_pin,
};

const PROC: Controls = Controls {
    field: Field::PROC_CTLS,
    plain: msr::VMX_PROCBASED_CTLS,
    exact: msr::VMX_TRUE_PROCBASED_CTLS,
    default1: 0x0401_E172,
    allowed: |caps| caps.proc,
    plan: plan_proc,
};

const PROC2: Controls = Controls {
    field: Field::PROC_CTLS2,
    plain: msr::VMX_PROCBASED_CTLS2,
    exact: msr::VMX_PROCBASED_CTLS2,
    default1: 0,
    allowed: |caps| caps.proc2,
    plan: plan_proc2,
};

const EXIT: Controls = Controls {
    field: Field::EXIT_CTLS,
    plain: msr::VMX_EXIT_CTLS,
    exact: msr::VMX_TRUE_EXIT_CTLS,
    default1: 0x0003_6DFF,
    allowed: |caps| caps.exit,
    plan: plan_exit,
};

const ENTRY: Controls = Controls {
    field: Field::ENTRY_CTLS,
    plain: msr::VMX_ENTRY_CTLS,
    exact: msr::VMX_TRUE_ENTRY_CTLS,
    default1: 0x0000_11FF,
    allowed: |caps| caps.entry,
    plan: plan_entry,
};

fn needs(edits: &[Edit], expected: Expect) -> Option<(Prerequisites, Expect)> {
    Some((edits.iter().copied().collect(), expected))
}

fn pin(bits: PinCtls) -> Edit {
    Set(Field::PIN_CTLS, bits.bits().into())
}

fn proc(bits: ProcCtls) -> Edit {
    Set(Field::PROC_CTLS, bits.bits().into())
}

fn proc_2(bits: ProcCtls2) -> Edit {
    Set(Field::PROC_CTLS2, bits.bits().into())
}

fn plan_pin(bit: u32) -> Option<(Prerequisites, Expect)> {
    match PinCtls::from_bits_retain(bit) {
        PinCtls::EXTERNAL_INTERRUPT_EXITING | PinCtls::NMI_EXITING | PinCtls::PREEMPTION_TIMER => {
            needs(&[], Expect::Enters)
        }
        PinCtls::VIRTUAL_NMIS => needs(&[pin(PinCtls::NMI_EXITING)], Expect::Enters),
        PinCtls::POSTED_INTERRUPTS => needs(
            &[
                pin(PinCtls::EXTERNAL_INTERRUPT_EXITING),
                proc(ProcCtls::TPR_SHADOW),
                proc_2(ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY),
                Set(Field::EXIT_CTLS, ExitCtls::ACK_INTERRUPT.bits().into()),
            ],
            Expect::Enters,
        ),
        _ => None,
    }
}

fn plan_proc(bit: u32) -> Option<(Prerequisites, Expect)> {
    match ProcCtls::from_bits_retain(bit) {
        ProcCtls::NMI_WINDOW_EXITING => {
            needs(&[pin(PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS)], Expect::Enters)
        }
        ProcCtls::INTERRUPT_WINDOW_EXITING
        | ProcCtls::TSC_OFFSETTING
        | ProcCtls::HLT_EXITING
        | ProcCtls::INVLPG_EXITING
        | ProcCtls::MWAIT_EXITING
        | ProcCtls::RDPMC_EXITING
        | ProcCtls::RDTSC_EXITING
        | ProcCtls::CR3_LOAD_EXITING
        | ProcCtls::CR3_STORE_EXITING
        | ProcCtls::CR8_LOAD_EXITING
        | ProcCtls::CR8_STORE_EXITING
        | ProcCtls::TPR_SHADOW
        | ProcCtls::MOV_DR_EXITING
        | ProcCtls::UNCONDITIONAL_IO_EXITING
        | ProcCtls::IO_BITMAPS
        | ProcCtls::MONITOR_TRAP_FLAG
        | ProcCtls::MSR_BITMAPS
        | ProcCtls::MONITOR_EXITING
        | ProcCtls::PAUSE_EXITING
        | ProcCtls::SECONDARY_CONTROLS => needs(&[], Expect::Enters),
        // Tertiary controls and newer ones.
        _ => None,
    }
}

fn plan_proc2(bit: u32) -> Option<(Prerequisites, Expect)> {
    match ProcCtls2::from_bits_retain(bit) {
        ProcCtls2::VIRTUALIZE_X2APIC | ProcCtls2::APIC_REGISTER_VIRTUALIZATION => {
            needs(&[proc(ProcCtls::TPR_SHADOW)], Expect::Enters)
        }
        ProcCtls2::VIRTUAL_INTERRUPT_DELIVERY => needs(
            &[proc(ProcCtls::TPR_SHADOW), pin(PinCtls::EXTERNAL_INTERRUPT_EXITING)],
            Expect::Enters,
        ),
        ProcCtls2::VIRTUALIZE_APIC_ACCESSES
        | ProcCtls2::EPT
        | ProcCtls2::DESCRIPTOR_TABLE_EXITING
        | ProcCtls2::RDTSCP
        | ProcCtls2::VPID
        | ProcCtls2::WBINVD_EXITING
        | ProcCtls2::UNRESTRICTED_GUEST
        | ProcCtls2::PAUSE_LOOP_EXITING
        | ProcCtls2::RDRAND_EXITING
        | ProcCtls2::INVPCID
        | ProcCtls2::VM_FUNCTIONS
        | ProcCtls2::VMCS_SHADOWING
        | ProcCtls2::ENCLS_EXITING
        | ProcCtls2::RDSEED_EXITING
        | ProcCtls2::PML
        | ProcCtls2::EPT_VIOLATION_VE
        | ProcCtls2::CONCEAL_VMX_FROM_PT
        | ProcCtls2::XSAVES
        | ProcCtls2::MODE_BASED_EXECUTE
        | ProcCtls2::TSC_SCALING
        | ProcCtls2::USER_WAIT_PAUSE => needs(&[], Expect::Enters),
        _ => None,
    }
}

fn plan_exit(bit: u32) -> Option<(Prerequisites, Expect)> {
    match ExitCtls::from_bits_retain(bit) {
        // This program is in 64-bit mode.
        ExitCtls::HOST_ADDRESS_SPACE_SIZE => needs(&[], Expect::ControlsOrHost),
        ExitCtls::SAVE_PREEMPTION_TIMER => needs(&[pin(PinCtls::PREEMPTION_TIMER)], Expect::Enters),
        ExitCtls::SAVE_DEBUG_CONTROLS
        | ExitCtls::LOAD_PERF_GLOBAL_CTRL
        | ExitCtls::ACK_INTERRUPT
        | ExitCtls::SAVE_PAT
        | ExitCtls::LOAD_PAT
        | ExitCtls::SAVE_EFER
        | ExitCtls::LOAD_EFER
        | ExitCtls::CLEAR_BNDCFGS
        | ExitCtls::CONCEAL_VMX_FROM_PT => needs(&[], Expect::Enters),
        _ => None,
    }
}

fn plan_entry(bit: u32) -> Option<(Prerequisites, Expect)> {
    match EntryCtls::from_bits_retain(bit) {
        // The guest's EFER says otherwise.
        EntryCtls::IA32E_MODE_GUEST => needs(&[], Expect::Guest(0)),
        EntryCtls::LOAD_DEBUG_CONTROLS
        | EntryCtls::LOAD_PERF_GLOBAL_CTRL
        | EntryCtls::LOAD_PAT
        | EntryCtls::LOAD_EFER
        | EntryCtls::LOAD_BNDCFGS
        | EntryCtls::CONCEAL_VMX_FROM_PT => needs(&[], Expect::Enters),
        // Those of system-management mode have a case of their own.
        _ => None,
    }
}

/// Each control that must be 1, cleared; and all together.
fn must_be_1(ctx: &mut Ctx<'_>, controls: &Controls) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let must = u64::from((controls.allowed)(&trial.vmx.caps).must_be_1);
    trial.each_clear(controls.field, must, Expect::Controls)?;
    if must != 0 {
        trial.row("all that must be 1", &[Clear(controls.field, must)], Expect::Controls)?;
    }
    Ok(())
}

/// Each control that may not be 1, set; and all together.
fn may_not_be_1(ctx: &mut Ctx<'_>, controls: &Controls) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let not = u64::from(!(controls.allowed)(&trial.vmx.caps).may_be_1);
    trial.each_set(controls.field, not, Expect::Controls)?;
    if not != 0 {
        trial.row("all that may not be 1", &[Set(controls.field, not)], Expect::Controls)?;
    }
    Ok(())
}

/// Each control that is free, changed, with what it needs beside it.
fn allowed(ctx: &mut Ctx<'_>, controls: &Controls) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let caps = trial.vmx.caps;
    let allowed = (controls.allowed)(&caps);
    let value = vmcs::read(controls.field);
    for number in 0..32 {
        let bit = 1_u32 << number;
        if allowed.must_be_1 & bit != 0 || allowed.may_be_1 & bit == 0 {
            continue;
        }
        let Some((mut edits, expected)) = (controls.plan)(bit) else {
            continue;
        };
        let wide = u64::from(bit);
        edits.push(if value & wide == 0 {
            Set(controls.field, wide)
        } else {
            Clear(controls.field, wide)
        });
        let mut name = arrayvec::ArrayString::<80>::new();
        // A name that does not fit is cut short.
        let _ = core::fmt::Write::write_fmt(
            &mut name,
            format_args!("bit {number} of {} changed", controls.field.name()),
        );
        trial.row(&name, &edits, expected)?;
    }
    Ok(())
}

/// Outside system-management mode no VM entry can return to it, and there is no dual-monitor
/// treatment to end.
fn entry_smm(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let bits = EntryCtls::ENTRY_TO_SMM | EntryCtls::DEACTIVATE_DUAL_MONITOR;
    trial.each_set(Field::ENTRY_CTLS, bits.bits().into(), Expect::Controls)?;
    let edits = [To(Field::EXECUTIVE_VMCS_POINTER, 0), Set(Field::ENTRY_CTLS, bits.bits().into())];
    trial.row("both", &edits, Expect::Controls)
}

/// The capability MSRs that exist, in order.
fn existing() -> impl Iterator<Item = u32> {
    let caps = Caps::read();
    (msr::VMX_BASIC..=msr::VMX_VMFUNC).filter(move |&index| match index {
        msr::VMX_PROCBASED_CTLS2 => caps.proc.may_be_1 & ProcCtls::SECONDARY_CONTROLS.bits() != 0,
        msr::VMX_EPT_VPID_CAP => caps.has2(ProcCtls2::EPT) || caps.has2(ProcCtls2::VPID),
        msr::VMX_TRUE_PINBASED_CTLS..=msr::VMX_TRUE_ENTRY_CTLS => caps.basic.true_controls(),
        msr::VMX_VMFUNC => caps.has2(ProcCtls2::VM_FUNCTIONS),
        _ => true,
    })
}

fn readable(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    for index in existing() {
        let first = catch(|| rdmsr(index));
        ensure!(first.is_ok(), "RDMSR of {index:#x} faults: {first:?}");
        ensure_eq!(catch(|| rdmsr(index)), first, "MSR {index:#x} read again");
    }
    Ok(())
}

fn read_only(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    for index in existing() {
        let before = rdmsr(index);
        for value in [before, 0, u64::MAX] {
            // SAFETY: the MSR says what the processor can do; writing it is to fault.
            let fault = catch(|| unsafe { wrmsr(index, value) }).err();
            let fault = fault.map(|fault| (fault.vector, fault.error_code));
            ensure_eq!(fault, Some((13, 0)), "WRMSR of {index:#x}");
        }
        ensure_eq!(rdmsr(index), before, "MSR {index:#x}");
    }
    Ok(())
}

fn basic(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    let basic = Caps::read().basic;
    let value = u64::from(basic);
    ensure_eq!(value >> 31 & 1, 0, "bit 31 of IA32_VMX_BASIC");
    ensure_eq!(value >> 45 & 7, 0, "bits 47:45 of IA32_VMX_BASIC");
    ensure!((1..=4096).contains(&basic.region_size()), "region size {}", basic.region_size());
    ensure!(matches!(basic.memory_type(), 0 | 6), "memory type {}", basic.memory_type());
    // Processors with Intel 64 architecture do not limit the addresses.
    ensure_eq!(basic.width_32(), false, "32-bit limit of addresses");
    Ok(())
}

/// The plain MSR forces the default1 class where the TRUE one may not; otherwise they agree.
fn plain_and_true(controls: &Controls) -> Verdict {
    vmx::prepare()?;
    let plain = Allowed::from_msr(rdmsr(controls.plain));
    ensure_eq!(plain.must_be_1 & !plain.may_be_1, 0, "must be 1 but may not be 1");
    let default1 = controls.default1;
    ensure_eq!(plain.must_be_1 & default1, default1, "default1 class of {:#x}", controls.plain);
    ensure_eq!(plain.must_be_1 & !default1, 0, "must be 1 beyond the default1 class");
    if !Caps::read().basic.true_controls() {
        skip!("no TRUE capability MSRs");
    }
    let exact = Allowed::from_msr(rdmsr(controls.exact));
    ensure_eq!(exact.must_be_1 & !exact.may_be_1, 0, "TRUE: must be 1 but may not be 1");
    ensure_eq!(exact.must_be_1 & !plain.must_be_1, 0, "must be 1 in the TRUE MSR alone");
    ensure_eq!(exact.may_be_1, plain.may_be_1, "allowed 1-settings of both MSRs");
    Ok(())
}

fn proc2(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    let caps = Caps::read();
    if caps.proc.may_be_1 & ProcCtls::SECONDARY_CONTROLS.bits() == 0 {
        skip!("no secondary controls");
    }
    ensure_eq!(caps.proc2.must_be_1, 0, "secondary controls that must be 1");
    let without_ept = ProcCtls2::UNRESTRICTED_GUEST | ProcCtls2::PML;
    if !caps.has2(ProcCtls2::EPT) {
        let useless = caps.proc2.may_be_1 & without_ept.bits();
        ensure_eq!(useless, 0, "secondary controls that need EPT");
    }
    if caps.has2(ProcCtls2::VM_FUNCTIONS) {
        ensure!(caps.vmfunc != 0, "VM functions, but none");
    }
    Ok(())
}

fn misc(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    let caps = Caps::read();
    let misc = caps.misc;
    ensure!(misc.cr3_targets() <= 256, "{} CR3-target values", misc.cr3_targets());
    ensure_eq!(u64::from(misc) >> 9 & 0x1F, 0, "bits 13:9 of IA32_VMX_MISC");
    ensure_eq!(u64::from(misc) >> 31 & 1, 0, "bit 31 of IA32_VMX_MISC");
    if caps.has2(ProcCtls2::UNRESTRICTED_GUEST) {
        ensure!(misc.stores_lma(), "unrestricted guest, but bit 5 of IA32_VMX_MISC is clear");
    }
    Ok(())
}

const FIXED: [(u32, u32); 2] =
    [(msr::VMX_CR0_FIXED0, msr::VMX_CR0_FIXED1), (msr::VMX_CR4_FIXED0, msr::VMX_CR4_FIXED1)];

/// PE, NE and PG of CR0.
const CR0_FIXED: u64 = 1 | 1 << 5 | 1 << 31;
/// VMXE of CR4.
const CR4_FIXED: u64 = 1 << 13;

/// No bit is fixed to both values; PE, NE, PG and VMXE are fixed to 1; and so are the registers.
fn cr_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    Vmx::on(ctx)?;
    let registers = [(Cr0::read_raw(), CR0_FIXED), (Cr4::read_raw(), CR4_FIXED)];
    for ((fixed0, fixed1), (value, wanted)) in FIXED.into_iter().zip(registers) {
        let (zero, one) = (rdmsr(fixed0), rdmsr(fixed1));
        ensure_eq!(zero & !one, 0, "bits fixed to 0 and to 1 in {fixed0:#x}");
        ensure_eq!(zero & wanted, wanted, "bits that are always fixed to 1 in {fixed0:#x}");
        ensure_eq!(value & zero, zero, "register against {fixed0:#x}");
        ensure_eq!(value & !one, 0, "register against {fixed1:#x}");
    }
    Ok(())
}

/// In VMX operation, MOV to CR0 that changes a fixed bit is #GP.
fn cr0_mov(ctx: &mut Ctx<'_>) -> Verdict {
    Vmx::on(ctx)?;
    let (zero, one) = (rdmsr(msr::VMX_CR0_FIXED0), rdmsr(msr::VMX_CR0_FIXED1));
    let value = Cr0::read_raw();
    for bit in (0..64).map(|bit| 1_u64 << bit) {
        let changed = if zero & bit != 0 { value & !bit } else { value | bit };
        // Upper bits are refused in any case; reserved lower ones that are not fixed are ignored.
        if zero & bit != 0 || one & bit == 0 {
            // SAFETY: the write is to fault; a fault is caught.
            let fault = catch(|| unsafe { Cr0::write_raw(changed) }).err();
            ensure_eq!(fault.map(|fault| fault.vector), Some(13), "MOV of {changed:#x} to CR0");
            ensure_eq!(Cr0::read_raw(), value, "CR0");
        }
    }
    Ok(())
}

/// The same of CR4.
fn cr4_mov(ctx: &mut Ctx<'_>) -> Verdict {
    Vmx::on(ctx)?;
    let (zero, one) = (rdmsr(msr::VMX_CR4_FIXED0), rdmsr(msr::VMX_CR4_FIXED1));
    let value = Cr4::read_raw();
    for bit in (0..64).map(|bit| 1_u64 << bit) {
        let changed = if zero & bit != 0 { value & !bit } else { value | bit };
        if zero & bit != 0 || one & bit == 0 {
            // SAFETY: the write is to fault; a fault is caught.
            let fault = catch(|| unsafe { Cr4::write_raw(changed) }).err();
            ensure_eq!(fault.map(|fault| fault.vector), Some(13), "MOV of {changed:#x} to CR4");
            ensure_eq!(Cr4::read_raw(), value, "CR4");
        }
    }
    Ok(())
}

fn ept_vpid(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    let caps = Caps::read();
    if caps.has2(ProcCtls2::EPT) {
        let walks = EptVpidCap::WALK_LENGTH_4 | EptVpidCap::WALK_LENGTH_5;
        let types = EptVpidCap::MEMORY_TYPE_UC | EptVpidCap::MEMORY_TYPE_WB;
        ensure!(caps.ept.intersects(walks), "no page-walk length");
        ensure!(caps.ept.intersects(types), "no memory type for EPT structures");
        if caps.ept.contains(EptVpidCap::INVEPT) {
            let kinds = EptVpidCap::INVEPT_SINGLE | EptVpidCap::INVEPT_ALL;
            ensure!(caps.ept.intersects(kinds), "INVEPT without types");
        }
    }
    if caps.has2(ProcCtls2::VPID) && caps.ept.contains(EptVpidCap::INVVPID) {
        let kinds = EptVpidCap::INVVPID_ADDRESS
            | EptVpidCap::INVVPID_SINGLE
            | EptVpidCap::INVVPID_ALL
            | EptVpidCap::INVVPID_RETAIN_GLOBALS;
        ensure!(caps.ept.intersects(kinds), "INVVPID without types");
    }
    Ok(())
}

/// Locked with VMXON allowed, and a locked one refuses every write.
fn feature_control(_: &mut Ctx<'_>) -> Verdict {
    vmx::prepare()?;
    let value = rdmsr(msr::FEATURE_CONTROL);
    let wanted = FeatureControl::LOCK | FeatureControl::VMXON_OUTSIDE_SMX;
    ensure_eq!(value & wanted.bits(), wanted.bits(), "IA32_FEATURE_CONTROL");
    for write in [value, 0, wanted.bits(), value | 1 << 1, value & !1] {
        // SAFETY: the write is to fault; a fault is caught.
        let fault = catch(|| unsafe { wrmsr(msr::FEATURE_CONTROL, write) }).err();
        let fault = fault.map(|fault| (fault.vector, fault.error_code));
        ensure_eq!(fault, Some((13, 0)), "WRMSR of {write:#x}");
    }
    ensure_eq!(rdmsr(msr::FEATURE_CONTROL), value, "IA32_FEATURE_CONTROL");
    Ok(())
}
