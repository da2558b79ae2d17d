//! Does VM entry accept the guest-state area?
//!
//! SDM Vol. 3C, "Checks on the Guest State Area".

use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::controls::{EntryCtls, PinCtls, ProcCtls2};
use vmx_defs::event::{Interruptibility, IntrInfo, activity, kind, vector};
use vmx_defs::exit::entry_failure;
use vmx_defs::{Field, Hpa};

use super::{Requirement, Subject, fixed, must};
use crate::exit::{PDPTE_FIELDS, SEGMENT_FIELDS};
use crate::msrs::is_valid_pat;
use crate::paging::is_valid_pdpte;
use crate::registers::{Segment, cr0, cr4, efer, rflags, segment};

/// A check of guest state that failed: VM exit with reason 33.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct GuestFailure {
    pub(crate) requirement: Requirement,
    /// The exit qualification.
    pub(crate) qualification: u64,
}

impl From<Requirement> for GuestFailure {
    fn from(requirement: Requirement) -> Self {
        Self { requirement, qualification: entry_failure::DEFAULT }
    }
}

type Checked = Result<(), Requirement>;

/// "Checks on the Guest State Area". Returns the PDPTEs for a guest with PAE paging.
pub(crate) fn guest_state(s: &Subject<'_>) -> Result<Option<[u64; 4]>, GuestFailure> {
    registers(s)?;
    segments(s)?;
    tables_and_rip(s)?;
    non_register(s)?;
    link_pointer(s)?;
    pdptes(s)
}

fn ia32e(s: &Subject<'_>) -> bool {
    s.vmcs.entry().contains(EntryCtls::IA32E_MODE_GUEST)
}

fn unrestricted(s: &Subject<'_>) -> bool {
    s.vmcs.proc2().contains(ProcCtls2::UNRESTRICTED_GUEST)
}

fn injected(s: &Subject<'_>) -> Option<IntrInfo> {
    Some(IntrInfo::from(s.vmcs.get32(Field::ENTRY_INTR_INFO))).filter(|info| info.valid())
}

/// "Checks on Guest Control Registers, Debug Registers, and MSRs".
fn registers(s: &Subject<'_>) -> Checked {
    let (guest_cr0, guest_cr4) = (s.get(Field::GUEST_CR0), s.get(Field::GUEST_CR4));
    let free = if unrestricted(s) { cr0::PE | cr0::PG } else { 0 };
    must(fixed(guest_cr0, s.caps.cr0_fixed0 & !free, s.caps.cr0_fixed1), "CR0")?;
    must(guest_cr0 & cr0::PG == 0 || guest_cr0 & cr0::PE != 0, "CR0.PG without CR0.PE")?;
    must(fixed(guest_cr4, s.caps.cr4_fixed0, s.caps.cr4_fixed1), "CR4")?;
    let entry = s.vmcs.entry();
    if entry.contains(EntryCtls::LOAD_DEBUG_CONTROLS) {
        must(s.get(Field::GUEST_DEBUGCTL) & !s.caps.debugctl == 0, "IA32_DEBUGCTL")?;
        must(s.get(Field::GUEST_DR7) >> 32 == 0, "DR7")?;
    }
    if ia32e(s) {
        must(guest_cr0 & cr0::PG != 0, "IA-32e mode without paging")?;
        must(guest_cr4 & cr4::PAE != 0, "IA-32e mode without PAE")?;
    } else {
        must(guest_cr4 & cr4::PCIDE == 0, "PCIDs outside IA-32e mode")?;
    }
    must(s.fits(Hpa::new(s.get(Field::GUEST_CR3))), "CR3")?;
    s.canonical(Field::GUEST_SYSENTER_ESP, "IA32_SYSENTER_ESP")?;
    s.canonical(Field::GUEST_SYSENTER_EIP, "IA32_SYSENTER_EIP")?;
    if entry.contains(EntryCtls::LOAD_PAT) {
        must(is_valid_pat(s.get(Field::GUEST_PAT)), "IA32_PAT")?;
    }
    if entry.contains(EntryCtls::LOAD_EFER) {
        let value = s.get(Field::GUEST_EFER);
        let lma = value & efer::LMA != 0;
        must(value & !s.caps.efer == 0, "IA32_EFER")?;
        must(lma == ia32e(s), "IA32_EFER.LMA")?;
        let paging = guest_cr0 & cr0::PG != 0;
        must(!paging || lma == (value & efer::LME != 0), "IA32_EFER.LME")?;
    }
    Ok(())
}

fn read_segments(s: &Subject<'_>) -> [Segment; 8] {
    SEGMENT_FIELDS.map(|[selector, base, limit, rights]| Segment {
        selector: s.get(selector) as u16,
        base: s.get(base),
        limit: s.get(limit) as u32,
        rights: s.get(rights) as u32,
    })
}

/// Bits of access rights that the rules name.
trait Rights {
    fn kind(&self) -> u32;
    fn usable(&self) -> bool;
    fn rpl(&self) -> u8;
    /// S, P, the reserved bits and G, as each usable register has to have them.
    fn well_formed(&self, code_or_data: bool) -> bool;
}

impl Rights for Segment {
    fn kind(&self) -> u32 {
        self.rights & 0xf
    }

    fn usable(&self) -> bool {
        self.rights & Segment::UNUSABLE == 0
    }

    fn rpl(&self) -> u8 {
        self.selector as u8 & 3
    }

    fn well_formed(&self, code_or_data: bool) -> bool {
        let granular = self.rights >> 15 & 1 != 0;
        let byte_limit = self.limit & 0xfff != 0xfff;
        let high_limit = self.limit >> 20 != 0;
        (self.rights >> 4 & 1 != 0) == code_or_data
            && self.rights >> 7 & 1 != 0
            && self.rights & 0xfffe_0f00 == 0
            && !(granular && byte_limit)
            && (granular || !high_limit)
    }
}

/// "Checks on Guest Segment Registers".
fn segments(s: &Subject<'_>) -> Checked {
    let all = read_segments(s);
    let (cs, ss) = (&all[segment::CS], &all[segment::SS]);
    let (ldtr, tr) = (&all[segment::LDTR], &all[segment::TR]);
    let virtual_8086 = s.get(Field::GUEST_RFLAGS) & rflags::VM != 0;
    must(tr.selector & 4 == 0, "TR selector")?;
    must(!ldtr.usable() || ldtr.selector & 4 == 0, "LDTR selector")?;
    must(virtual_8086 || unrestricted(s) || ss.rpl() == cs.rpl(), "SS and CS selectors")?;
    for (number, field) in [
        (segment::TR, Field::GUEST_TR_BASE),
        (segment::FS, Field::GUEST_FS_BASE),
        (segment::GS, Field::GUEST_GS_BASE),
        (segment::LDTR, Field::GUEST_LDTR_BASE),
    ] {
        if number != segment::LDTR || ldtr.usable() {
            s.canonical(field, "segment base")?;
        }
    }
    if virtual_8086 {
        for segment in &all[..6] {
            must(segment.base == u64::from(segment.selector) << 4, "virtual-8086 base")?;
            must(segment.limit == 0xffff, "virtual-8086 limit")?;
            must(segment.rights == 0xf3, "virtual-8086 access rights")?;
        }
    } else {
        protected_segments(s, &all)?;
    }
    must(tr.usable(), "TR unusable")?;
    must(tr.kind() == 11 || tr.kind() == 3 && !ia32e(s), "TR type")?;
    must(tr.well_formed(false), "TR access rights")?;
    if ldtr.usable() {
        must(ldtr.kind() == 2, "LDTR type")?;
        must(ldtr.well_formed(false), "LDTR access rights")?;
    }
    Ok(())
}

fn protected_segments(s: &Subject<'_>, all: &[Segment; 8]) -> Checked {
    let (cs, ss) = (&all[segment::CS], &all[segment::SS]);
    let unrestricted = unrestricted(s);
    must(cs.base >> 32 == 0, "CS base")?;
    for number in [segment::ES, segment::SS, segment::DS] {
        must(!all[number].usable() || all[number].base >> 32 == 0, "segment base")?;
    }
    let cs_type = matches!(cs.kind(), 9 | 11 | 13 | 15) || unrestricted && cs.kind() == 3;
    must(cs_type, "CS type")?;
    must(cs.well_formed(true), "CS access rights")?;
    must(!(ia32e(s) && cs.rights & Segment::LONG != 0 && cs.rights & Segment::BIG != 0), "CS.D")?;
    if ss.usable() {
        must(matches!(ss.kind(), 3 | 7), "SS type")?;
        must(ss.well_formed(true), "SS access rights")?;
    }
    for number in [segment::ES, segment::DS, segment::FS, segment::GS] {
        let data = &all[number];
        if !data.usable() {
            continue;
        }
        let readable = data.kind() & 8 == 0 || data.kind() & 2 != 0;
        must(data.kind() & 1 != 0 && readable, "data segment type")?;
        must(data.well_formed(true), "data segment access rights")?;
        let privileged = unrestricted || data.kind() >= 12 || data.dpl() >= data.rpl();
        must(privileged, "data segment DPL")?;
    }
    match cs.kind() {
        3 => must(cs.dpl() == 0, "CS DPL")?,
        9 | 11 => must(cs.dpl() == ss.dpl(), "CS DPL")?,
        _ => must(cs.dpl() <= ss.dpl(), "CS DPL")?,
    }
    must(unrestricted || ss.dpl() == ss.rpl(), "SS DPL")?;
    let real = s.get(Field::GUEST_CR0) & cr0::PE == 0;
    must(!(real || cs.kind() == 3) || ss.dpl() == 0, "SS DPL in real-address mode")
}

/// "Checks on Guest Descriptor-Table Registers" and "Checks on Guest RIP, RFLAGS, and SSP".
fn tables_and_rip(s: &Subject<'_>) -> Checked {
    s.canonical(Field::GUEST_GDTR_BASE, "GDTR base")?;
    s.canonical(Field::GUEST_IDTR_BASE, "IDTR base")?;
    must(s.get(Field::GUEST_GDTR_LIMIT) >> 16 == 0, "GDTR limit")?;
    must(s.get(Field::GUEST_IDTR_LIMIT) >> 16 == 0, "IDTR limit")?;
    if ia32e(s) && s.get(Field::GUEST_CS_AR) & u64::from(Segment::LONG) != 0 {
        s.canonical(Field::GUEST_RIP, "RIP")?;
    } else {
        must(s.get(Field::GUEST_RIP) >> 32 == 0, "RIP")?;
    }
    let flags = s.get(Field::GUEST_RFLAGS);
    let reserved = !0x003f_ffff | 1 << 15 | 1 << 5 | 1 << 3;
    must(flags & reserved == 0 && flags & rflags::FIXED != 0, "RFLAGS")?;
    let protected = s.get(Field::GUEST_CR0) & cr0::PE != 0;
    must(flags & rflags::VM == 0 || !ia32e(s) && protected, "RFLAGS.VM")?;
    let interrupt = injected(s).is_some_and(|info| info.kind() == kind::EXTERNAL);
    must(!interrupt || flags & rflags::IF != 0, "RFLAGS.IF for the interrupt")
}

/// "Checks on Guest Non-Register State", but for the VMCS link pointer.
fn non_register(s: &Subject<'_>) -> Result<(), GuestFailure> {
    let state = s.vmcs.get32(Field::GUEST_ACTIVITY);
    let misc = &s.caps.misc;
    let exists = match state {
        activity::ACTIVE => true,
        activity::HLT => misc.activity_hlt(),
        activity::SHUTDOWN => misc.activity_shutdown(),
        activity::WAIT_FOR_SIPI => misc.activity_wait_sipi(),
        _ => false,
    };
    must(exists, "activity state")?;
    let dpl = s.get(Field::GUEST_SS_AR) >> 5 & 3;
    must(state != activity::HLT || dpl == 0, "HLT at a CPL above 0")?;

    let blocking = Interruptibility::from_bits_retain(s.vmcs.get32(Field::GUEST_INTERRUPTIBILITY));
    let sti = blocking.contains(Interruptibility::STI);
    let mov_ss = blocking.contains(Interruptibility::MOV_SS);
    must(state == activity::ACTIVE || !sti && !mov_ss, "activity state with blocking")?;
    if let Some(info) = injected(s) {
        let (event, number) = (info.kind(), info.vector());
        let machine_check = event == kind::HARDWARE_EXCEPTION && number == vector::MC;
        let debug = event == kind::HARDWARE_EXCEPTION && number == vector::DB;
        let possible = match state {
            activity::ACTIVE => true,
            activity::HLT => {
                event == kind::EXTERNAL || event == kind::NMI || machine_check || debug
            }
            activity::SHUTDOWN => event == kind::NMI || machine_check,
            _ => false,
        };
        must(possible, "event in this activity state")?;
    }

    // There is no SGX here, so that enclave interruption is reserved; and no SMM.
    must(blocking.bits() & !0xf == 0, "interruptibility state")?;
    must(!(sti && mov_ss), "blocking by STI and by MOV SS")?;
    let flags = s.get(Field::GUEST_RFLAGS);
    must(!sti || flags & rflags::IF != 0, "blocking by STI without IF")?;
    must(!blocking.contains(Interruptibility::SMI), "blocking by SMI outside SMM")?;
    match injected(s).map(|info| info.kind()) {
        Some(kind::EXTERNAL) => must(!sti && !mov_ss, "interrupt with blocking")?,
        Some(kind::NMI) => {
            must(!mov_ss, "NMI with blocking by MOV SS")?;
            if sti {
                // Processors differ in whether they check this; this one does.
                let requirement = "NMI with blocking by STI";
                let qualification = entry_failure::NMI_INJECTION;
                return Err(GuestFailure { requirement, qualification });
            }
            let virtual_nmis = s.vmcs.pin().contains(PinCtls::VIRTUAL_NMIS);
            let blocked = virtual_nmis && blocking.contains(Interruptibility::NMI);
            must(!blocked, "virtual NMI with blocking by NMI")?;
        }
        _ => {}
    }

    let pending = s.get(Field::GUEST_PENDING_DEBUG);
    must(pending & !0x500f == 0, "pending debug exceptions")?;
    if sti || mov_ss || state == activity::HLT {
        let btf = s.get(Field::GUEST_DEBUGCTL) & 2 != 0;
        let stepping = flags & rflags::TF != 0 && !btf;
        must((pending >> 14 & 1 != 0) == stepping, "pending single step")?;
    }
    Ok(())
}

/// The VMCS link pointer. There is no VMCS shadowing, so that it has to point to an ordinary VMCS.
fn link_pointer(s: &Subject<'_>) -> Result<(), GuestFailure> {
    let link = s.get(Field::VMCS_LINK_POINTER);
    if link == u64::MAX {
        return Ok(());
    }
    let at = Hpa::new(link);
    let qualification = entry_failure::VMCS_LINK_POINTER;
    let good = at.is_aligned(PAGE_SIZE)
        && s.fits(at)
        && at != s.region
        && s.memory.read_u32(at) == s.caps.basic.revision();
    if good {
        Ok(())
    } else {
        Err(GuestFailure { requirement: "VMCS link pointer", qualification })
    }
}

/// "Checks on Guest Page-Directory-Pointer-Table Entries".
fn pdptes(s: &Subject<'_>) -> Result<Option<[u64; 4]>, GuestFailure> {
    let paging = s.get(Field::GUEST_CR0) & cr0::PG != 0;
    if !paging || s.get(Field::GUEST_CR4) & cr4::PAE == 0 || ia32e(s) {
        return Ok(None);
    }
    let entries = if s.vmcs.eptp().is_some() {
        PDPTE_FIELDS.map(|field| s.get(field))
    } else {
        let table = s.get(Field::GUEST_CR3) & 0xffff_ffe0;
        [0, 8, 16, 24].map(|offset| s.memory.read_u64(Hpa::new(table + offset)))
    };
    if entries.iter().all(|entry| is_valid_pdpte(*entry, s.caps.physical_width)) {
        Ok(Some(entries))
    } else {
        let qualification = entry_failure::PDPTE;
        Err(GuestFailure { requirement: "PDPTEs", qualification })
    }
}
