//! Is the guest-state area one that VM entry accepts?
//!
//! SDM Vol. 3C, "Checks on the Guest State Area" in "Checking and Loading Guest State"; the segment
//! registers have a file of their own.

use super::segments::{AccessRights, Segment, segments};
use super::{
    CR0_PE, CR0_PG, CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_LME, has_fixed_bits, is_canonical,
    is_valid_pat, require,
};
use crate::caps::{Caps, REVISION};
use crate::vmcs12::Vmcs12;
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::controls::{EntryCtls, PinCtls, ProcCtls2};
use vmx_defs::event::{Interruptibility, IntrInfo, activity, kind, vector};
use vmx_defs::{Field, L1Gpa};

/// The requirement on the guest-state area that a VMCS does not meet: a VM exit with reason 33.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestFailure {
    /// CR0 has a bit with a value that VMX operation does not support (PE and PG are free for an
    /// unrestricted guest).
    Cr0,
    /// CR0.PG without CR0.PE.
    PagingWithoutProtection,
    /// CR4 has a bit with a value that VMX operation does not support.
    Cr4,
    /// IA32_DEBUGCTL has a reserved bit.
    DebugCtl,
    /// "IA-32e mode guest" without CR0.PG.
    Ia32eWithoutPaging,
    /// "IA-32e mode guest" without CR4.PAE.
    Ia32eWithoutPae,
    /// CR4.PCIDE without "IA-32e mode guest".
    Pcide,
    /// CR3 has a bit beyond the physical-address width.
    Cr3,
    /// DR7 has a bit of its upper half set.
    Dr7,
    /// IA32_SYSENTER_ESP is not canonical.
    SysenterEsp,
    /// IA32_SYSENTER_EIP is not canonical.
    SysenterEip,
    /// IA32_PAT has an entry with a reserved memory type.
    Pat,
    /// IA32_EFER has a reserved bit.
    EferReserved,
    /// IA32_EFER.LMA is not equal to "IA-32e mode guest".
    EferLma,
    /// IA32_EFER.LME is not equal to LMA although CR0.PG is set.
    EferLme,
    /// The TR selector has TI set.
    TrTableIndicator,
    /// The LDTR selector has TI set.
    LdtrTableIndicator,
    /// The RPLs of SS and CS differ, in a guest that is not unrestricted.
    SsRpl,
    /// A base is not canonical, or has a bit above 31 (CS, SS, DS, ES).
    SegmentBase(Segment),
    /// A virtual-8086 base is not 16 times the selector.
    Virtual8086Base(Segment),
    /// A virtual-8086 limit is not FFFFH.
    Virtual8086Limit(Segment),
    /// Virtual-8086 access rights are not F3H.
    Virtual8086AccessRights(Segment),
    /// The type does not fit the register.
    SegmentType(Segment),
    /// S is 0 in a code or data segment.
    SegmentNotCodeOrData(Segment),
    /// S is 1 in TR or LDTR.
    SegmentNotSystem(Segment),
    /// P is 0 in a segment that is usable.
    SegmentNotPresent(Segment),
    /// A reserved bit of the access rights is set.
    SegmentReserved(Segment),
    /// G does not go with the limit.
    SegmentGranularity(Segment),
    /// The DPL does not go with the RPL, the other DPLs or the mode.
    SegmentPrivilege(Segment),
    /// CS has both L and D/B set in an IA-32e mode guest.
    CsDefaultAndLong,
    /// TR is marked unusable.
    TrUnusable,
    /// The GDTR base is not canonical.
    GdtrBase,
    /// The IDTR base is not canonical.
    IdtrBase,
    /// The GDTR limit is above FFFFH.
    GdtrLimit,
    /// The IDTR limit is above FFFFH.
    IdtrLimit,
    /// RIP is above 4 GiB outside 64-bit mode.
    RipHigh,
    /// RIP is not canonical in 64-bit mode.
    RipCanonical,
    /// RFLAGS has a reserved bit set, or bit 1 clear.
    RflagsReserved,
    /// RFLAGS.VM in IA-32e mode or in real-address mode.
    RflagsVirtual8086,
    /// An external interrupt is injected while RFLAGS.IF is 0.
    RflagsInterruptFlag,
    /// The activity state does not exist or is not supported.
    ActivityState,
    /// HLT state with SS.DPL not 0.
    HltPrivilege,
    /// An activity state that is not active with blocking by STI or by MOV SS.
    ActivityBlocked,
    /// The event to inject can't be delivered in the activity state.
    ActivityInjection,
    /// A reserved bit of the interruptibility state is set.
    InterruptibilityReserved,
    /// Blocking both by STI and by MOV SS.
    StiAndMovSs,
    /// Blocking by STI while RFLAGS.IF is 0.
    StiWithoutInterruptFlag,
    /// An external interrupt is injected despite blocking by STI or MOV SS.
    InterruptBlocked,
    /// An NMI is injected despite blocking by MOV SS.
    NmiBlockedByMovSs,
    /// An NMI is injected despite blocking by STI. Processors may require this or not; we do.
    NmiBlockedBySti,
    /// Blocking by SMI outside SMM.
    SmiOutsideSmm,
    /// A virtual NMI is injected despite blocking by NMI.
    VirtualNmiBlocked,
    /// Enclave interruption with blocking by MOV SS, or without SGX.
    EnclaveInterruption,
    /// A reserved bit of the pending debug exceptions is set.
    PendingDebugReserved,
    /// The pending single step does not go with RFLAGS.TF and IA32_DEBUGCTL.BTF.
    PendingDebugSingleStep,
    /// A pending debug exception of a transactional region is malformed or impossible.
    PendingDebugRtm,
    /// The VMCS link pointer is not a page address within the physical-address width.
    LinkAddress,
    /// The VMCS link pointer points to something without our revision identifier, or to a shadow
    /// VMCS.
    LinkRevision,
    /// The VMCS link pointer points to the current VMCS.
    LinkIsCurrent,
    /// A PDPTE of a PAE guest has a reserved bit set.
    Pdpte,
}

use GuestFailure as F;

impl GuestFailure {
    /// The exit qualification (SDM Vol. 3C, "VM-Entry Failures During or After Loading Guest
    /// State").
    #[inline]
    pub const fn qualification(self) -> u64 {
        match self {
            Self::Pdpte => 2,
            Self::NmiBlockedBySti => 3,
            Self::LinkAddress | Self::LinkRevision | Self::LinkIsCurrent => 4,
            _ => 0,
        }
    }
}

/// What the checks need that is not in the VMCS: copies that the caller took of L1's memory.
#[derive(Clone, Copy, Debug)]
pub struct GuestInputs {
    /// The current-VMCS pointer of L1's processor.
    pub current_vmcs: L1Gpa,
    /// The first 4 bytes at the address that [`link_to_read`] names; 0 where it names none.
    pub link_revision: u32,
    /// The 32 bytes at the address that [`pdptes_to_read`] names; any where it names none. These
    /// are the PDPTEs L2 must then be run with.
    pub pdptes: [u64; 4],
}

/// Where the VMCS link pointer points, if it is not the "none" of all ones and is an address that
/// may be followed.
#[inline]
pub fn link_to_read(vmcs: &Vmcs12, caps: &Caps) -> Option<L1Gpa> {
    let link = vmcs.get(Field::VMCS_LINK_POINTER);
    let address = L1Gpa::new(link);
    let follow =
        link != u64::MAX && address.is_aligned(PAGE_SIZE) && address.fits(caps.physical_width);
    follow.then_some(address)
}

/// Whether the guest will use PAE paging.
#[inline]
pub fn pae_paging(vmcs: &Vmcs12) -> bool {
    vmcs.get(Field::GUEST_CR0) & CR0_PG != 0
        && vmcs.get(Field::GUEST_CR4) & CR4_PAE != 0
        && !vmcs.entry_ctls().contains(EntryCtls::IA32E_MODE_GUEST)
}

/// Where the guest's PDPTEs are in L1's memory, for PAE paging without EPT. With EPT they are in the
/// VMCS.
#[inline]
pub fn pdptes_to_read(vmcs: &Vmcs12) -> Option<L1Gpa> {
    let table = vmcs.get(Field::GUEST_CR3) & 0xffff_ffe0;
    (pae_paging(vmcs) && !vmcs.has_ept()).then_some(L1Gpa::new(table))
}

/// Whether MOV to CR3 would accept a PDPTE: not present, or no reserved bit set (SDM Vol. 3A, "PDPTE
/// Registers").
#[inline]
pub const fn pdpte_is_valid(pdpte: u64, physical_width: u8) -> bool {
    const LOW_RESERVED: u64 = 0x1e6;
    let high_clear = physical_width >= 64 || pdpte >> physical_width == 0;
    pdpte & 1 == 0 || pdpte & LOW_RESERVED == 0 && high_clear
}

/// Checks the guest-state area.
///
/// # Errors
/// The first requirement that is not met.
pub fn guest_state(vmcs: &Vmcs12, caps: &Caps, inputs: &GuestInputs) -> Result<(), GuestFailure> {
    control_registers(vmcs, caps)?;
    msrs(vmcs, caps)?;
    let rflags = flags(vmcs)?;
    segments(vmcs, caps, rflags & RFLAGS_VM != 0)?;
    descriptor_tables(vmcs, caps)?;
    instruction_pointer(vmcs, caps)?;
    activity_state(vmcs, caps)?;
    interruptibility(vmcs, caps)?;
    pending_debug(vmcs, caps)?;
    link_pointer(vmcs, caps, inputs)?;
    pdptes(vmcs, caps, inputs)
}

const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_VM: u64 = 1 << 17;

fn is_ia32e(vmcs: &Vmcs12) -> bool {
    vmcs.entry_ctls().contains(EntryCtls::IA32E_MODE_GUEST)
}

fn injected(vmcs: &Vmcs12) -> Option<IntrInfo> {
    let info = IntrInfo::from(vmcs.get32(Field::ENTRY_INTR_INFO));
    info.valid().then_some(info)
}

fn interruptibility_of(vmcs: &Vmcs12) -> Interruptibility {
    Interruptibility::from_bits_retain(vmcs.get32(Field::GUEST_INTERRUPTIBILITY))
}

/// "Checks on Guest Control Registers, Debug Registers, and MSRs", registers.
fn control_registers(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let (cr0, cr4) = (vmcs.get(Field::GUEST_CR0), vmcs.get(Field::GUEST_CR4));
    let free =
        if vmcs.proc2().contains(ProcCtls2::UNRESTRICTED_GUEST) { CR0_PE | CR0_PG } else { 0 };
    require(has_fixed_bits(cr0, caps.cr0_fixed0 & !free, caps.cr0_fixed1 | free), F::Cr0)?;
    require(cr0 & CR0_PG == 0 || cr0 & CR0_PE != 0, F::PagingWithoutProtection)?;
    require(has_fixed_bits(cr4, caps.cr4_fixed0, caps.cr4_fixed1), F::Cr4)?;
    if is_ia32e(vmcs) {
        require(cr0 & CR0_PG != 0, F::Ia32eWithoutPaging)?;
        require(cr4 & CR4_PAE != 0, F::Ia32eWithoutPae)?;
    } else {
        require(cr4 & CR4_PCIDE == 0, F::Pcide)?;
    }
    require(L1Gpa::new(vmcs.get(Field::GUEST_CR3)).fits(caps.physical_width), F::Cr3)
}

/// "Checks on Guest Control Registers, Debug Registers, and MSRs", the rest.
fn msrs(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let entry = vmcs.entry_ctls();
    if entry.contains(EntryCtls::LOAD_DEBUG_CONTROLS) {
        require(vmcs.get(Field::GUEST_DEBUGCTL) & !caps.debugctl == 0, F::DebugCtl)?;
        require(vmcs.get(Field::GUEST_DR7) >> 32 == 0, F::Dr7)?;
    }
    let canonical = |field| is_canonical(vmcs.get(field), caps.linear_width);
    require(canonical(Field::GUEST_SYSENTER_ESP), F::SysenterEsp)?;
    require(canonical(Field::GUEST_SYSENTER_EIP), F::SysenterEip)?;
    if entry.contains(EntryCtls::LOAD_PAT) {
        require(is_valid_pat(vmcs.get(Field::GUEST_PAT)), F::Pat)?;
    }
    if entry.contains(EntryCtls::LOAD_EFER) {
        let efer = vmcs.get(Field::GUEST_EFER);
        let (lma, lme) = (efer & EFER_LMA != 0, efer & EFER_LME != 0);
        let paging = vmcs.get(Field::GUEST_CR0) & CR0_PG != 0;
        require(efer & !caps.efer == 0, F::EferReserved)?;
        require(lma == is_ia32e(vmcs), F::EferLma)?;
        require(!paging || lma == lme, F::EferLme)?;
    }
    Ok(())
}

/// "Checks on Guest RIP, RFLAGS, and SSP", RFLAGS.
fn flags(vmcs: &Vmcs12) -> Result<u64, F> {
    // Bits 63:22, 15, 5 and 3 are 0, bit 1 is 1.
    const RESERVED: u64 = !0x3f_ffff | 1 << 15 | 1 << 5 | 1 << 3;
    let rflags = vmcs.get(Field::GUEST_RFLAGS);
    require(rflags & RESERVED == 0 && rflags & 2 != 0, F::RflagsReserved)?;
    let real = vmcs.get(Field::GUEST_CR0) & CR0_PE == 0;
    require(rflags & RFLAGS_VM == 0 || !is_ia32e(vmcs) && !real, F::RflagsVirtual8086)?;
    let interrupt = injected(vmcs).is_some_and(|event| event.kind() == kind::EXTERNAL);
    require(!interrupt || rflags & RFLAGS_IF != 0, F::RflagsInterruptFlag)?;
    Ok(rflags)
}

/// "Checks on Guest Descriptor-Table Registers".
fn descriptor_tables(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let canonical = |field| is_canonical(vmcs.get(field), caps.linear_width);
    require(canonical(Field::GUEST_GDTR_BASE), F::GdtrBase)?;
    require(canonical(Field::GUEST_IDTR_BASE), F::IdtrBase)?;
    require(vmcs.get(Field::GUEST_GDTR_LIMIT) <= 0xffff, F::GdtrLimit)?;
    require(vmcs.get(Field::GUEST_IDTR_LIMIT) <= 0xffff, F::IdtrLimit)
}

/// "Checks on Guest RIP, RFLAGS, and SSP", RIP: all that is to check where the rest of the
/// guest-state area was checked before, or saved by the processor, and only RIP and RSP are new.
///
/// # Errors
/// The first requirement that is not met.
pub fn instruction_pointer(vmcs: &Vmcs12, caps: &Caps) -> Result<(), GuestFailure> {
    let rip = vmcs.get(Field::GUEST_RIP);
    if is_ia32e(vmcs) && AccessRights::of(vmcs, Segment::Cs).long() {
        // The width is the processor's, not that of the paging mode.
        require(is_canonical(rip, caps.linear_width), F::RipCanonical)
    } else {
        require(rip >> 32 == 0, F::RipHigh)
    }
}

/// "Checks on Guest Non-Register State", activity state.
fn activity_state(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let state = vmcs.get32(Field::GUEST_ACTIVITY);
    let supported = match state {
        activity::ACTIVE => true,
        activity::HLT => caps.misc.activity_hlt(),
        activity::SHUTDOWN => caps.misc.activity_shutdown(),
        activity::WAIT_FOR_SIPI => caps.misc.activity_wait_sipi(),
        _ => false,
    };
    require(supported, F::ActivityState)?;
    if state == activity::HLT {
        require(AccessRights::of(vmcs, Segment::Ss).dpl() == 0, F::HltPrivilege)?;
    }
    let blocked =
        interruptibility_of(vmcs).intersects(Interruptibility::STI | Interruptibility::MOV_SS);
    require(state == activity::ACTIVE || !blocked, F::ActivityBlocked)?;

    let Some(event) = injected(vmcs) else {
        return Ok(());
    };
    let machine_check = (kind::HARDWARE_EXCEPTION, vector::MC);
    let deliverable = match (state, (event.kind(), event.vector())) {
        (activity::ACTIVE, _) => true,
        (activity::HLT, (kind::EXTERNAL | kind::NMI, _)) => true,
        (activity::HLT, what) => {
            what == machine_check || what == (kind::HARDWARE_EXCEPTION, vector::DB)
        }
        (activity::SHUTDOWN, what) => what == machine_check || what.0 == kind::NMI,
        _ => false,
    };
    require(deliverable, F::ActivityInjection)
}

/// "Checks on Guest Non-Register State", interruptibility state.
fn interruptibility(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let state = interruptibility_of(vmcs);
    require(state.bits() & !0x1f == 0, F::InterruptibilityReserved)?;
    let sti = state.contains(Interruptibility::STI);
    let mov_ss = state.contains(Interruptibility::MOV_SS);
    require(!(sti && mov_ss), F::StiAndMovSs)?;
    require(!sti || vmcs.get(Field::GUEST_RFLAGS) & RFLAGS_IF != 0, F::StiWithoutInterruptFlag)?;
    // L1 is never in SMM as far as it can see, nor can it enter a guest that is.
    require(!state.contains(Interruptibility::SMI), F::SmiOutsideSmm)?;
    if state.contains(Interruptibility::ENCLAVE) {
        require(caps.sgx && !mov_ss, F::EnclaveInterruption)?;
    }
    match injected(vmcs).map(|event| event.kind()) {
        Some(kind::EXTERNAL) => require(!sti && !mov_ss, F::InterruptBlocked),
        Some(kind::NMI) => {
            require(!mov_ss, F::NmiBlockedByMovSs)?;
            require(!sti, F::NmiBlockedBySti)?;
            let blocked =
                vmcs.pin().contains(PinCtls::VIRTUAL_NMIS) && state.contains(Interruptibility::NMI);
            require(!blocked, F::VirtualNmiBlocked)
        }
        _ => Ok(()),
    }
}

/// "Checks on Guest Non-Register State", pending debug exceptions.
fn pending_debug(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    const BREAKPOINTS: u64 = 0xf;
    const BUS_LOCK: u64 = 1 << 11;
    const ENABLED_BREAKPOINT: u64 = 1 << 12;
    const SINGLE_STEP: u64 = 1 << 14;
    const RTM: u64 = 1 << 16;
    const DEBUGCTL_BTF: u64 = 1 << 1;
    const DEBUGCTL_BUS_LOCK: u64 = 1 << 2;
    const DEBUGCTL_RTM: u64 = 1 << 15;

    let pending = vmcs.get(Field::GUEST_PENDING_DEBUG);
    let mut known = BREAKPOINTS | ENABLED_BREAKPOINT | SINGLE_STEP | RTM;
    if caps.debugctl & DEBUGCTL_BUS_LOCK != 0 {
        known |= BUS_LOCK;
    }
    require(pending & !known == 0, F::PendingDebugReserved)?;

    let state = interruptibility_of(vmcs);
    let blocked = state.intersects(Interruptibility::STI | Interruptibility::MOV_SS)
        || vmcs.get32(Field::GUEST_ACTIVITY) == activity::HLT;
    if blocked {
        // Single-stepping delivers its #DB right after an instruction unless something holds it
        // back: with such blocking, it is pending exactly if single-stepping is on.
        let stepping = vmcs.get(Field::GUEST_RFLAGS) & RFLAGS_TF != 0
            && vmcs.get(Field::GUEST_DEBUGCTL) & DEBUGCTL_BTF == 0;
        require((pending & SINGLE_STEP != 0) == stepping, F::PendingDebugSingleStep)?;
    }
    if pending & RTM != 0 {
        let alone = pending == RTM | ENABLED_BREAKPOINT;
        let possible =
            caps.debugctl & DEBUGCTL_RTM != 0 && !state.contains(Interruptibility::MOV_SS);
        require(alone && possible, F::PendingDebugRtm)?;
    }
    Ok(())
}

/// "Checks on Guest Non-Register State", VMCS link pointer. VMCS shadowing is not offered, so that
/// what it points to is never used; the rules hold all the same.
fn link_pointer(vmcs: &Vmcs12, caps: &Caps, inputs: &GuestInputs) -> Result<(), F> {
    if vmcs.get(Field::VMCS_LINK_POINTER) == u64::MAX {
        return Ok(());
    }
    let link = link_to_read(vmcs, caps).ok_or(F::LinkAddress)?;
    require(link != inputs.current_vmcs, F::LinkIsCurrent)?;
    // Bit 31 has to be equal to "VMCS shadowing", which is 0.
    require(inputs.link_revision == REVISION, F::LinkRevision)
}

/// "Checks on Guest Page-Directory-Pointer-Table Entries".
fn pdptes(vmcs: &Vmcs12, caps: &Caps, inputs: &GuestInputs) -> Result<(), F> {
    if !pae_paging(vmcs) {
        return Ok(());
    }
    let entries = if vmcs.has_ept() {
        [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3]
            .map(|field| vmcs.get(field))
    } else {
        inputs.pdptes
    };
    let valid = entries.iter().all(|entry| pdpte_is_valid(*entry, caps.physical_width));
    require(valid, F::Pdpte)
}
