//! Answers: what can this processor's VMX do, and how is VMX operation entered and left?
//!
//! SDM Vol. 3C, "Discovering Support for VMX" and "Enabling and Entering VMX Operation".

mod enter;
pub mod ept;
mod existence;
pub mod exit;
pub mod paging;
pub mod program;
pub mod raw;
pub mod snippet;
pub mod views;
pub mod vm;
pub mod vmcs;

use core::arch::x86_64::{__cpuid, __cpuid_count};

use arrayvec::ArrayVec;
use vmx_defs::{
    ExitReason, Hpa, ProcCtls2,
    msr::{self, Allowed, EptVpidCap, FeatureControl, VmxBasic, VmxMisc},
};
use vmx_hw::VmxResult;
use x86_64::registers::{
    control::{Cr0, Cr4, Cr4Flags},
    model_specific::Msr,
};

pub use self::{
    ept::Ept,
    exit::{Exit, Outcome},
    paging::{Mode, Paging},
    program::Op,
    vm::Vm,
};
use crate::{
    memory::Page,
    single::Single,
    skip,
    suite::{Ctx, Stop},
    traps::catch,
};

/// Reads an MSR; one that does not exist is a #GP, which fails the case.
pub fn rdmsr(index: u32) -> u64 {
    // SAFETY: reading an MSR has no effect on memory; a fault is caught.
    unsafe { Msr::new(index).read() }
}

/// Writes an MSR; a refusal is a #GP, which fails the case.
///
/// # Safety
/// The value must not take away what this program runs on.
pub unsafe fn wrmsr(index: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe { Msr::new(index).write(value) }
}

/// Whether CPUID says that the processor has VMX (leaf 1, ECX bit 5).
pub fn supported() -> bool {
    __cpuid(1).ecx & 1 << 5 != 0
}

/// The hypervisor below by its CPUID signature, if it has one.
pub fn l0_signature() -> Option<[u8; 12]> {
    if __cpuid(1).ecx & 1 << 31 == 0 {
        return None;
    }
    let leaf = __cpuid(0x4000_0000);
    let mut text = [0; 12];
    for (part, register) in text.chunks_exact_mut(4).zip([leaf.ebx, leaf.ecx, leaf.edx]) {
        part.copy_from_slice(&register.to_le_bytes());
    }
    Some(text)
}

/// Whether nvmx is the hypervisor below, with counters of the layout that this program knows.
fn has_l0_counters() -> bool {
    l0_signature().is_some_and(|text| text == *b"nvmxnvmxnvmx") && __cpuid(0x4000_0001).eax == 1
}

/// How often L2 has exited to nvmx for this basic reason, if nvmx is the hypervisor below and has
/// counters of the layout that this program knows (version 1: leaf 4000_0003H, the reason in ECX,
/// L2's count in ECX and EDX).
pub fn l0_exits_of_l2(reason: ExitReason) -> Option<u64> {
    if !has_l0_counters() {
        return None;
    }
    let leaf = __cpuid_count(0x4000_0003, reason.bits());
    Some(u64::from(leaf.edx) << 32 | u64::from(leaf.ecx))
}

/// The two totals that nvmx has in a sub-leaf of leaf 4000_0002H, on the same conditions.
pub fn l0_total(sub_leaf: u32) -> Option<(u64, u64)> {
    if !has_l0_counters() {
        return None;
    }
    let leaf = __cpuid_count(0x4000_0002, sub_leaf);
    let word = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
    Some((word(leaf.eax, leaf.ebx), word(leaf.ecx, leaf.edx)))
}

/// The capability MSRs, TRUE ones where they exist.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// IA32_VMX_BASIC.
    pub basic: VmxBasic,
    /// IA32_VMX_MISC.
    pub misc: VmxMisc,
    /// Pin-based controls.
    pub pin: Allowed,
    /// Primary processor-based controls.
    pub proc: Allowed,
    /// Secondary processor-based controls; nothing allowed where they don't exist.
    pub proc2: Allowed,
    /// VM-exit controls.
    pub exit: Allowed,
    /// VM-entry controls.
    pub entry: Allowed,
    /// EPT and VPID capabilities; empty where neither exists.
    pub ept: EptVpidCap,
    /// VM functions that may be enabled; 0 where there are none.
    pub vmfunc: u64,
    /// Physical-address width in bits.
    pub width: u8,
}

impl Caps {
    /// Reads them. Needs [`supported`].
    pub fn read() -> Self {
        let basic = VmxBasic::from(rdmsr(msr::VMX_BASIC));
        let allowed = |plain: u32, truthful: u32| {
            Allowed::from_msr(rdmsr(if basic.true_controls() { truthful } else { plain }))
        };
        let proc = allowed(msr::VMX_PROCBASED_CTLS, msr::VMX_TRUE_PROCBASED_CTLS);
        let proc2 = if proc.may_be_1 & 1 << 31 != 0 {
            Allowed::from_msr(rdmsr(msr::VMX_PROCBASED_CTLS2))
        } else {
            Allowed { must_be_1: 0, may_be_1: 0 }
        };
        let has = |bits: ProcCtls2| proc2.may_be_1 & bits.bits() != 0;
        let ept = if has(ProcCtls2::EPT.union(ProcCtls2::VPID)) {
            EptVpidCap::from_bits_retain(rdmsr(msr::VMX_EPT_VPID_CAP))
        } else {
            EptVpidCap::empty()
        };
        let vmfunc = if has(ProcCtls2::VM_FUNCTIONS) { rdmsr(msr::VMX_VMFUNC) } else { 0 };
        Self {
            basic,
            misc: VmxMisc::from(rdmsr(msr::VMX_MISC)),
            pin: allowed(msr::VMX_PINBASED_CTLS, msr::VMX_TRUE_PINBASED_CTLS),
            proc,
            proc2,
            exit: allowed(msr::VMX_EXIT_CTLS, msr::VMX_TRUE_EXIT_CTLS),
            entry: allowed(msr::VMX_ENTRY_CTLS, msr::VMX_TRUE_ENTRY_CTLS),
            ept,
            vmfunc,
            width: __cpuid_count(0x8000_0008, 0).eax as u8,
        }
    }

    /// Whether these secondary controls may all be set.
    pub fn has2(&self, bits: ProcCtls2) -> bool {
        self.proc2.may_be_1 & bits.bits() == bits.bits()
    }

    /// Whether EPTP switching by VMFUNC is offered.
    pub fn eptp_switching(&self) -> bool {
        self.has2(ProcCtls2::EPT | ProcCtls2::VM_FUNCTIONS) && self.vmfunc & 1 != 0
    }
}

/// Regions that a processor may hold in its caches, to be VMCLEARed before their pages are reused.
static REGIONS: Single<ArrayVec<u64, 256>> = Single::new(ArrayVec::new_const());

/// VMX root operation, as a case uses it. The harness leaves it after the case.
#[derive(Clone, Copy)]
pub struct Vmx {
    /// The capabilities.
    pub caps: Caps,
    /// The VMXON region.
    pub vmxon_region: Page,
}

/// CR0 and CR4 become what VMX operation needs; IA32_FEATURE_CONTROL allows VMXON.
///
/// Skips the case where the machine has no VMX or its firmware has switched it off.
pub fn prepare() -> Result<(), Stop> {
    if !supported() {
        skip!("no VMX");
    }
    let wanted = FeatureControl::LOCK | FeatureControl::VMXON_OUTSIDE_SMX;
    let control = rdmsr(msr::FEATURE_CONTROL);
    if control & FeatureControl::LOCK.bits() == 0 {
        // SAFETY: only allows VMXON.
        unsafe { wrmsr(msr::FEATURE_CONTROL, control | wanted.bits()) };
    } else if control & wanted.bits() != wanted.bits() {
        skip!("VMX is switched off in IA32_FEATURE_CONTROL ({control:#x})");
    }
    let fix = |value: u64, fixed0: u32, fixed1: u32| (value | rdmsr(fixed0)) & rdmsr(fixed1);
    // SAFETY: the fixed bits of VMX operation are PE, PG and NE in CR0 and VMXE in CR4, which this
    // program's 64-bit code runs well with; nothing it needs is cleared.
    unsafe {
        Cr0::write_raw(fix(Cr0::read_raw(), msr::VMX_CR0_FIXED0, msr::VMX_CR0_FIXED1));
        Cr4::write_raw(fix(Cr4::read_raw(), msr::VMX_CR4_FIXED0, msr::VMX_CR4_FIXED1));
    }
    Ok(())
}

impl Vmx {
    /// Enters VMX operation.
    pub fn on(ctx: &mut Ctx<'_>) -> Result<Self, Stop> {
        prepare()?;
        let caps = Caps::read();
        let vmxon_region = ctx.arena.page();
        vmxon_region.write32(0, caps.basic.revision());
        // SAFETY: the region is a fresh page, given to the processor.
        let entered = unsafe { vmx_hw::vmxon(Hpa::new(vmxon_region.address())) };
        crate::ensure_eq!(entered, Ok(()), "VMXON");
        forget_translations(&caps)?;
        Ok(Self { caps, vmxon_region })
    }

    /// A fresh page with the VMCS revision identifier, VMCLEARed before it is reused.
    pub fn region(&self, ctx: &mut Ctx<'_>) -> Page {
        let page = ctx.arena.page();
        page.write32(0, self.caps.basic.revision());
        note_region(page);
        page
    }
}

/// Drops all that is cached of EPT and by VPID: earlier cases used the same pages and VPIDs for other
/// things, and neither VMXOFF nor VMXON drops anything (SDM Vol. 3C, "Guidelines for Use of the
/// INVEPT Instruction", "Guidelines for Use of the INVVPID Instruction").
fn forget_translations(caps: &Caps) -> Result<(), Stop> {
    const ALL_CONTEXTS: u64 = 2;
    if caps.ept.contains(EptVpidCap::INVEPT | EptVpidCap::INVEPT_ALL) {
        // SAFETY: drops cached translations only.
        let result = unsafe { vmx_hw::invept(ALL_CONTEXTS, [0; 2]) };
        crate::ensure_eq!(result, Ok(()), "INVEPT of all contexts");
    }
    if caps.ept.contains(EptVpidCap::INVVPID | EptVpidCap::INVVPID_ALL) {
        // SAFETY: as above.
        let result = unsafe { vmx_hw::invvpid(ALL_CONTEXTS, [0; 2]) };
        crate::ensure_eq!(result, Ok(()), "INVVPID of all contexts");
    }
    Ok(())
}

/// Has `page` VMCLEARed after the case, because VMPTRLD may have given it to the processor.
pub fn note_region(page: Page) {
    // SAFETY: no other reference to REGIONS is live.
    let regions = unsafe { &mut *REGIONS.get() };
    assert!(regions.try_push(page.address()).is_ok(), "more regions than the harness notes");
}

/// VMPTRLD.
pub fn vmptrld(page: Page) -> VmxResult {
    // SAFETY: the page was given to the processor by whoever made it a region.
    unsafe { vmx_hw::vmptrld(Hpa::new(page.address())) }
}

/// VMCLEAR.
pub fn vmclear(page: Page) -> VmxResult {
    // SAFETY: as for `vmptrld`.
    unsafe { vmx_hw::vmclear(Hpa::new(page.address())) }
}

/// INVEPT, single-context for this EPTP where the processor has that, else all-context; VMfail and
/// an INVEPT without types fail the case.
pub fn invept_single(eptp: u64) -> Result<(), Stop> {
    let caps = Caps::read().ept;
    let kind = if caps.contains(EptVpidCap::INVEPT_SINGLE) { 1 } else { 2 };
    // SAFETY: drops cached translations only.
    let result = unsafe { vmx_hw::invept(kind, [eptp, 0]) };
    crate::ensure_eq!(result, Ok(()), "INVEPT type {kind}");
    Ok(())
}

/// The exit-reason field as an [`ExitReason`].
pub fn exit_reason() -> ExitReason {
    ExitReason::from_bits(vmcs::read(vmx_defs::Field::EXIT_REASON) as u32)
}

/// Leaves VMX operation, if the processor is in it, with every noted region cleared.
pub fn leave() {
    // SAFETY: no other reference to REGIONS is live.
    let regions = unsafe { &mut *REGIONS.get() };
    if Cr4::read().contains(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS) {
        for &region in regions.iter() {
            // Outside VMX operation this is #UD, which is caught; nothing is to be done then.
            // SAFETY: the region belonged to the case that ended.
            let _ = catch(|| unsafe { vmx_hw::vmclear(Hpa::new(region)) });
        }
        // SAFETY: a #UD outside VMX operation is caught.
        let _ = catch(|| unsafe { vmx_hw::vmxoff() });
    }
    regions.clear();
}
