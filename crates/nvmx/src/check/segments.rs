//! Are the guest's segment registers ones that VM entry accepts?
//!
//! SDM Vol. 3C, "Checks on Guest Segment Registers".

use super::guest::GuestFailure as F;
use super::{CR0_PE, is_canonical, require};
use crate::caps::Caps;
use crate::vmcs12::Vmcs12;
use vmx_defs::Field;
use vmx_defs::controls::{EntryCtls, ProcCtls2};

/// A segment register of the guest-state area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Segment {
    /// ES.
    Es,
    /// CS.
    Cs,
    /// SS.
    Ss,
    /// DS.
    Ds,
    /// FS.
    Fs,
    /// GS.
    Gs,
    /// LDTR.
    Ldtr,
    /// TR.
    Tr,
}

impl Segment {
    /// The six that hold code and data.
    pub const CODE_AND_DATA: [Self; 6] =
        [Self::Cs, Self::Ss, Self::Ds, Self::Es, Self::Fs, Self::Gs];

    /// The selector field.
    #[inline]
    pub const fn selector(self) -> Field {
        match self {
            Self::Es => Field::GUEST_ES_SELECTOR,
            Self::Cs => Field::GUEST_CS_SELECTOR,
            Self::Ss => Field::GUEST_SS_SELECTOR,
            Self::Ds => Field::GUEST_DS_SELECTOR,
            Self::Fs => Field::GUEST_FS_SELECTOR,
            Self::Gs => Field::GUEST_GS_SELECTOR,
            Self::Ldtr => Field::GUEST_LDTR_SELECTOR,
            Self::Tr => Field::GUEST_TR_SELECTOR,
        }
    }

    /// The base field.
    #[inline]
    pub const fn base(self) -> Field {
        match self {
            Self::Es => Field::GUEST_ES_BASE,
            Self::Cs => Field::GUEST_CS_BASE,
            Self::Ss => Field::GUEST_SS_BASE,
            Self::Ds => Field::GUEST_DS_BASE,
            Self::Fs => Field::GUEST_FS_BASE,
            Self::Gs => Field::GUEST_GS_BASE,
            Self::Ldtr => Field::GUEST_LDTR_BASE,
            Self::Tr => Field::GUEST_TR_BASE,
        }
    }

    /// The limit field.
    #[inline]
    pub const fn limit(self) -> Field {
        match self {
            Self::Es => Field::GUEST_ES_LIMIT,
            Self::Cs => Field::GUEST_CS_LIMIT,
            Self::Ss => Field::GUEST_SS_LIMIT,
            Self::Ds => Field::GUEST_DS_LIMIT,
            Self::Fs => Field::GUEST_FS_LIMIT,
            Self::Gs => Field::GUEST_GS_LIMIT,
            Self::Ldtr => Field::GUEST_LDTR_LIMIT,
            Self::Tr => Field::GUEST_TR_LIMIT,
        }
    }

    /// The access-rights field.
    #[inline]
    pub const fn access_rights(self) -> Field {
        match self {
            Self::Es => Field::GUEST_ES_AR,
            Self::Cs => Field::GUEST_CS_AR,
            Self::Ss => Field::GUEST_SS_AR,
            Self::Ds => Field::GUEST_DS_AR,
            Self::Fs => Field::GUEST_FS_AR,
            Self::Gs => Field::GUEST_GS_AR,
            Self::Ldtr => Field::GUEST_LDTR_AR,
            Self::Tr => Field::GUEST_TR_AR,
        }
    }
}

/// Access rights in the format of the guest-state area (SDM Vol. 3C, "Guest Register State").
#[derive(Clone, Copy)]
pub(super) struct AccessRights(u32);

impl AccessRights {
    const RESERVED: u32 = 0xfffe_0f00;

    pub(super) fn of(vmcs: &Vmcs12, segment: Segment) -> Self {
        Self(vmcs.get32(segment.access_rights()))
    }

    const fn kind(self) -> u32 {
        self.0 & 0xf
    }

    /// S: code or data, not a system segment.
    const fn code_or_data(self) -> bool {
        self.0 & 1 << 4 != 0
    }

    pub(super) const fn dpl(self) -> u64 {
        (self.0 >> 5 & 3) as u64
    }

    const fn present(self) -> bool {
        self.0 & 1 << 7 != 0
    }

    /// L: 64-bit code.
    pub(super) const fn long(self) -> bool {
        self.0 & 1 << 13 != 0
    }

    /// D/B.
    const fn default_big(self) -> bool {
        self.0 & 1 << 14 != 0
    }

    /// Whether G goes with the limit.
    const fn fits(self, limit: u32) -> bool {
        let granular = self.0 & 1 << 15 != 0;
        if granular { limit & 0xfff == 0xfff } else { limit & 0xfff0_0000 == 0 }
    }

    const fn usable(self) -> bool {
        self.0 & 1 << 16 == 0
    }
}

/// Type of an accessed read/write data segment: CS has it in real-address mode.
const READ_WRITE_ACCESSED: u32 = 3;

/// Checks all eight registers. `virtual_8086` is RFLAGS.VM of the guest.
pub(super) fn segments(vmcs: &Vmcs12, caps: &Caps, virtual_8086: bool) -> Result<(), F> {
    require(vmcs.get(Segment::Tr.selector()) & 4 == 0, F::TrTableIndicator)?;
    bases_canonical(vmcs, caps)?;
    if virtual_8086 {
        for segment in Segment::CODE_AND_DATA {
            virtual_8086_segment(vmcs, segment)?;
        }
    } else {
        let unrestricted = vmcs.proc2().contains(ProcCtls2::UNRESTRICTED_GUEST);
        let rpl = |segment: Segment| vmcs.get(segment.selector()) & 3;
        require(unrestricted || rpl(Segment::Ss) == rpl(Segment::Cs), F::SsRpl)?;
        for segment in Segment::CODE_AND_DATA {
            code_or_data(vmcs, segment, unrestricted)?;
        }
        privilege(vmcs, unrestricted)?;
    }
    task_register(vmcs)?;
    local_table(vmcs)
}

/// "Base-address fields", for the registers whose whole 64 bits count.
fn bases_canonical(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    for segment in [Segment::Tr, Segment::Fs, Segment::Gs, Segment::Ldtr] {
        // Of these only LDTR need not be canonical while unusable.
        let counts = segment != Segment::Ldtr || AccessRights::of(vmcs, segment).usable();
        let canonical = is_canonical(vmcs.get(segment.base()), caps.linear_width);
        require(!counts || canonical, F::SegmentBase(segment))?;
    }
    Ok(())
}

fn virtual_8086_segment(vmcs: &Vmcs12, segment: Segment) -> Result<(), F> {
    let base = vmcs.get(segment.selector()) << 4;
    require(vmcs.get(segment.base()) == base, F::Virtual8086Base(segment))?;
    require(vmcs.get(segment.limit()) == 0xffff, F::Virtual8086Limit(segment))?;
    require(vmcs.get(segment.access_rights()) == 0xf3, F::Virtual8086AccessRights(segment))
}

/// The rules on one register alone.
fn code_or_data(vmcs: &Vmcs12, segment: Segment, unrestricted: bool) -> Result<(), F> {
    let rights = AccessRights::of(vmcs, segment);
    if segment != Segment::Cs && !rights.usable() {
        return Ok(());
    }
    if matches!(segment, Segment::Cs | Segment::Ss | Segment::Ds | Segment::Es) {
        require(vmcs.get(segment.base()) >> 32 == 0, F::SegmentBase(segment))?;
    }
    let kind = rights.kind();
    let kind_fits = match segment {
        // Accessed code, of any of the four kinds.
        Segment::Cs => kind & 9 == 9 || unrestricted && kind == READ_WRITE_ACCESSED,
        // Accessed read/write data, expanding up or down.
        Segment::Ss => kind == 3 || kind == 7,
        // Accessed; if code, readable.
        _ => kind & 1 != 0 && (kind & 8 == 0 || kind & 2 != 0),
    };
    require(kind_fits, F::SegmentType(segment))?;
    require(rights.code_or_data(), F::SegmentNotCodeOrData(segment))?;
    require(rights.present(), F::SegmentNotPresent(segment))?;
    require(rights.0 & AccessRights::RESERVED == 0, F::SegmentReserved(segment))?;
    require(rights.fits(vmcs.get32(segment.limit())), F::SegmentGranularity(segment))?;
    if segment == Segment::Cs {
        let long_guest = vmcs.entry_ctls().contains(EntryCtls::IA32E_MODE_GUEST);
        let both = long_guest && rights.long() && rights.default_big();
        require(!both, F::CsDefaultAndLong)?;
    }
    Ok(())
}

/// The rules on DPLs.
fn privilege(vmcs: &Vmcs12, unrestricted: bool) -> Result<(), F> {
    let (cs, ss) = (AccessRights::of(vmcs, Segment::Cs), AccessRights::of(vmcs, Segment::Ss));
    let real = vmcs.get(Field::GUEST_CR0) & CR0_PE == 0;
    // SS.DPL is the CPL: it counts even where SS is unusable.
    if !unrestricted {
        let rpl = vmcs.get(Segment::Ss.selector()) & 3;
        require(ss.dpl() == rpl, F::SegmentPrivilege(Segment::Ss))?;
    }
    if real || cs.kind() == READ_WRITE_ACCESSED {
        require(ss.dpl() == 0, F::SegmentPrivilege(Segment::Ss))?;
    }
    let cs_fits = match cs.kind() {
        READ_WRITE_ACCESSED => cs.dpl() == 0,
        // Not conforming.
        9 | 11 => cs.dpl() == ss.dpl(),
        _ => cs.dpl() <= ss.dpl(),
    };
    require(cs_fits, F::SegmentPrivilege(Segment::Cs))?;
    if unrestricted {
        return Ok(());
    }
    for segment in [Segment::Ds, Segment::Es, Segment::Fs, Segment::Gs] {
        let rights = AccessRights::of(vmcs, segment);
        // Conforming code (12 to 15) may be used from any privilege level.
        let counts = rights.usable() && rights.kind() < 12;
        let rpl = vmcs.get(segment.selector()) & 3;
        require(!counts || rights.dpl() >= rpl, F::SegmentPrivilege(segment))?;
    }
    Ok(())
}

fn task_register(vmcs: &Vmcs12) -> Result<(), F> {
    const BUSY_16: u32 = 3;
    const BUSY_32_OR_64: u32 = 11;
    let rights = AccessRights::of(vmcs, Segment::Tr);
    let long_guest = vmcs.entry_ctls().contains(EntryCtls::IA32E_MODE_GUEST);
    let kind = rights.kind();
    let kind_fits = kind == BUSY_32_OR_64 || kind == BUSY_16 && !long_guest;
    require(rights.usable(), F::TrUnusable)?;
    require(kind_fits, F::SegmentType(Segment::Tr))?;
    system_segment(vmcs, Segment::Tr)
}

fn local_table(vmcs: &Vmcs12) -> Result<(), F> {
    const LDT: u32 = 2;
    let rights = AccessRights::of(vmcs, Segment::Ldtr);
    if !rights.usable() {
        return Ok(());
    }
    require(vmcs.get(Segment::Ldtr.selector()) & 4 == 0, F::LdtrTableIndicator)?;
    require(rights.kind() == LDT, F::SegmentType(Segment::Ldtr))?;
    system_segment(vmcs, Segment::Ldtr)
}

/// What TR and LDTR have in common.
fn system_segment(vmcs: &Vmcs12, segment: Segment) -> Result<(), F> {
    let rights = AccessRights::of(vmcs, segment);
    require(!rights.code_or_data(), F::SegmentNotSystem(segment))?;
    require(rights.present(), F::SegmentNotPresent(segment))?;
    require(rights.0 & AccessRights::RESERVED == 0, F::SegmentReserved(segment))?;
    require(rights.fits(vmcs.get32(segment.limit())), F::SegmentGranularity(segment))
}
