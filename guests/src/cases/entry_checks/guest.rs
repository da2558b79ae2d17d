//! Answers: does VM entry fail where the guest's registers, other than segments, are wrong?
//!
//! SDM Vol. 3C, "Checks on Guest Control Registers, Debug Registers, and MSRs", "Checks on Guest
//! Descriptor-Table Registers", "Checks on Guest RIP, RFLAGS, and SSP" and "Checks on Guest
//! Page-Directory-Pointer-Table Entries".

use vmx_defs::{
    EntryCtls, Field, ProcCtls2,
    event::{kind, vector},
    exit::entry_failure,
    msr,
};

use super::{Clear, EFER_RESERVED, Expect, Set, To, Trial, bad_pats, beyond_width, not_canonical};
use crate::{
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{Mode, rdmsr, vm::PDPTES, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.guest.cr0_fixed", run: cr0_fixed },
    Case { name: "entry.guest.cr0_fixed.unrestricted", run: cr0_fixed_unrestricted },
    Case { name: "entry.guest.cr4_fixed", run: cr4_fixed },
    Case { name: "entry.guest.paging_without_protection", run: paging_without_protection },
    Case { name: "entry.guest.ia32e_without_paging", run: ia32e_without_paging },
    Case { name: "entry.guest.ia32e_without_pae", run: ia32e_without_pae },
    Case { name: "entry.guest.pcide_outside_ia32e", run: pcide },
    Case { name: "entry.guest.cr3_width", run: cr3_width },
    Case { name: "entry.guest.debugctl", run: debugctl },
    Case { name: "entry.guest.dr7", run: dr7 },
    Case { name: "entry.guest.sysenter_canonical", run: sysenter },
    Case { name: "entry.guest.pat", run: pat },
    Case { name: "entry.guest.efer", run: efer },
    Case { name: "entry.guest.efer.pae", run: efer_pae },
    Case { name: "entry.guest.descriptor_tables", run: descriptor_tables },
    Case { name: "entry.guest.rip.32_bit", run: rip_32 },
    Case { name: "entry.guest.rip.compatibility_mode", run: rip_compatibility },
    Case { name: "entry.guest.rip.canonical", run: rip_canonical },
    Case { name: "entry.guest.rflags_reserved", run: rflags_reserved },
    Case { name: "entry.guest.rflags_vm", run: rflags_vm },
    Case { name: "entry.guest.rflags_vm.real_mode", run: rflags_vm_real },
    Case { name: "entry.guest.rflags_if", run: rflags_if },
    Case { name: "entry.guest.pdptes", run: pdptes },
    Case { name: "entry.guest.pdptes.without_ept", run: pdptes_without_ept },
];

const BAD: Expect = Expect::Guest(entry_failure::DEFAULT);
const PE: u64 = 1;
const PG: u64 = 1 << 31;
const PAE: u64 = 1 << 5;
const PCIDE: u64 = 1 << 17;

fn unrestricted(ctx: &mut Ctx<'_>, mode: Mode) -> Result<Trial, Stop> {
    let mut trial = Trial::new(ctx, mode)?;
    if !trial.vmx.caps.has2(ProcCtls2::UNRESTRICTED_GUEST) {
        skip!("unrestricted guest not offered");
    }
    trial.base(&[Set(Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into())]);
    Ok(trial)
}

/// An L2 whose entries load these, or the case is skipped.
fn loading(ctx: &mut Ctx<'_>, mode: Mode, controls: EntryCtls) -> Result<Trial, Stop> {
    let mut trial = Trial::new(ctx, mode)?;
    if trial.vmx.caps.entry.may_be_1 & controls.bits() != controls.bits() {
        skip!("VM-entry controls {controls:?} not offered");
    }
    trial.base(&[Set(Field::ENTRY_CTLS, controls.bits().into())]);
    Ok(trial)
}

fn not_loading(controls: EntryCtls) -> super::Edit {
    Clear(Field::ENTRY_CTLS, controls.bits().into())
}

fn cr0_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_clear(Field::GUEST_CR0, rdmsr(msr::VMX_CR0_FIXED0), BAD)?;
    trial.each_set(Field::GUEST_CR0, !rdmsr(msr::VMX_CR0_FIXED1), BAD)
}

/// PE and PG are free, all else is not; and not in IA-32e mode.
fn cr0_fixed_unrestricted(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = unrestricted(ctx, Mode::Pae)?;
    let fixed = rdmsr(msr::VMX_CR0_FIXED0) & !(PE | PG);
    trial.each_clear(Field::GUEST_CR0, fixed, BAD)?;
    trial.each_set(Field::GUEST_CR0, !rdmsr(msr::VMX_CR0_FIXED1), BAD)?;
    trial.row("without paging", &[Clear(Field::GUEST_CR0, PG)], Expect::Enters)?;
    trial.row("in real-address mode", &[Clear(Field::GUEST_CR0, PG | PE)], Expect::Enters)
}

fn cr4_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_clear(Field::GUEST_CR4, rdmsr(msr::VMX_CR4_FIXED0), BAD)?;
    trial.each_set(Field::GUEST_CR4, !rdmsr(msr::VMX_CR4_FIXED1), BAD)
}

fn paging_without_protection(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = unrestricted(ctx, Mode::Pae)?;
    trial.row("PG without PE", &[Clear(Field::GUEST_CR0, PE)], BAD)
}

fn ia32e_without_paging(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = unrestricted(ctx, Mode::Long)?;
    trial.row("IA-32e mode without PG", &[Clear(Field::GUEST_CR0, PG)], BAD)
}

fn ia32e_without_pae(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("IA-32e mode without PAE", &[Clear(Field::GUEST_CR4, PAE)], BAD)
}

fn pcide(ctx: &mut Ctx<'_>) -> Verdict {
    if rdmsr(msr::VMX_CR4_FIXED1) & PCIDE == 0 {
        skip!("CR4.PCIDE not supported");
    }
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    trial.row("PCIDE outside IA-32e mode", &[Set(Field::GUEST_CR4, PCIDE)], BAD)?;
    crate::vmx::leave();
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("PCIDE in IA-32e mode", &[Set(Field::GUEST_CR4, PCIDE)], Expect::Enters)
}

fn cr3_width(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let wide = beyond_width(&trial.vmx);
    trial.each_set(Field::GUEST_CR3, wide, BAD)
}

fn debugctl(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = loading(ctx, Mode::Long, EntryCtls::LOAD_DEBUG_CONTROLS)?;
    trial.row("zero", &[To(Field::GUEST_DEBUGCTL, 0)], Expect::Enters)?;
    // Bits 5:3 and 63:16 are reserved on every processor.
    trial.each_set(Field::GUEST_DEBUGCTL, 0xFFFF_FFFF_FFFF_0038, BAD)
}

fn dr7(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = loading(ctx, Mode::Long, EntryCtls::LOAD_DEBUG_CONTROLS)?;
    trial.each_set(Field::GUEST_DR7, 0xFFFF_FFFF_0000_0000, BAD)?;
    trial.row("no upper bit", &[To(Field::GUEST_DR7, 0x400)], Expect::Enters)?;
    if trial.vmx.caps.entry.must_be_1 & EntryCtls::LOAD_DEBUG_CONTROLS.bits() == 0 {
        let edits =
            [not_loading(EntryCtls::LOAD_DEBUG_CONTROLS), To(Field::GUEST_DR7, u64::MAX << 32)];
        trial.row("not loaded", &edits, Expect::Enters)?;
    }
    Ok(())
}

fn canonical(trial: &mut Trial, field: Field) -> Verdict {
    let first = not_canonical();
    for bad in [first, first | 0x1234, 1 << 63, !first, u64::MAX >> 1, first << 1] {
        trial.row(field.name(), &[To(field, bad)], BAD)?;
    }
    for good in [first - 1, !(first - 1)] {
        trial.row(field.name(), &[To(field, good)], Expect::Enters)?;
    }
    Ok(())
}

fn sysenter(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    canonical(&mut trial, Field::GUEST_SYSENTER_ESP)?;
    canonical(&mut trial, Field::GUEST_SYSENTER_EIP)
}

fn pat(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = loading(ctx, Mode::Long, EntryCtls::LOAD_PAT)?;
    trial.row("a good PAT", &[], Expect::Enters)?;
    for bad in bad_pats() {
        trial.row("a reserved memory type", &[To(Field::GUEST_PAT, bad)], BAD)?;
    }
    let edits = [not_loading(EntryCtls::LOAD_PAT), To(Field::GUEST_PAT, u64::MAX)];
    trial.row("not loaded", &edits, Expect::Enters)
}

fn efer(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = loading(ctx, Mode::Long, EntryCtls::LOAD_EFER)?;
    trial.each_set(Field::GUEST_EFER, EFER_RESERVED, BAD)?;
    trial.row("LMA clear", &[Clear(Field::GUEST_EFER, 1 << 10)], BAD)?;
    trial.row("LME clear", &[Clear(Field::GUEST_EFER, 1 << 8)], BAD)?;
    trial.row("both clear", &[Clear(Field::GUEST_EFER, 0x500)], BAD)?;
    let edits = [not_loading(EntryCtls::LOAD_EFER), To(Field::GUEST_EFER, u64::MAX)];
    trial.row("not loaded", &edits, Expect::Enters)
}

fn efer_pae(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = loading(ctx, Mode::Pae, EntryCtls::LOAD_EFER)?;
    trial.row("LMA set", &[Set(Field::GUEST_EFER, 1 << 10)], BAD)?;
    trial.row("LME set", &[Set(Field::GUEST_EFER, 1 << 8)], BAD)?;
    trial.row("both set", &[Set(Field::GUEST_EFER, 0x500)], BAD)?;
    trial.row("neither", &[], Expect::Enters)?;
    if trial.vmx.caps.has2(ProcCtls2::UNRESTRICTED_GUEST) {
        let edits = [
            Set(Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into()),
            Clear(Field::GUEST_CR0, PG),
            Set(Field::GUEST_EFER, 1 << 8),
        ];
        trial.row("LME alone without paging", &edits, Expect::Enters)?;
    }
    Ok(())
}

fn descriptor_tables(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for base in [Field::GUEST_GDTR_BASE, Field::GUEST_IDTR_BASE] {
        canonical(&mut trial, base)?;
    }
    for limit in [Field::GUEST_GDTR_LIMIT, Field::GUEST_IDTR_LIMIT] {
        trial.each_set(limit, 0xFFFF_0000, BAD)?;
        trial.row(limit.name(), &[To(limit, 0xFFFF)], Expect::Enters)?;
    }
    Ok(())
}

fn rip_32(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    trial.each_set(Field::GUEST_RIP, 0xFFFF_FFFF_0000_0000, BAD)
}

fn rip_compatibility(ctx: &mut Ctx<'_>) -> Verdict {
    const L: u64 = 1 << 13;
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.base(&[Clear(Field::GUEST_CS_AR, L)]);
    trial.each_set(Field::GUEST_RIP, 0xFFFF_FFFF_0000_0000, BAD)
}

fn rip_canonical(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let rip = vmcs::read(Field::GUEST_RIP);
    for bad in [not_canonical() | rip, 1 << 63 | rip, u64::MAX >> 1] {
        trial.row("RIP", &[To(Field::GUEST_RIP, bad)], BAD)?;
    }
    Ok(())
}

fn rflags_reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_clear(Field::GUEST_RFLAGS, 1 << 1, BAD)?;
    trial.each_set(Field::GUEST_RFLAGS, !0x3F_FFFF | 1 << 15 | 1 << 5 | 1 << 3, BAD)?;
    // CF to OF, IOPL, NT, AC and ID.
    let edits = [Set(Field::GUEST_RFLAGS, 0x8D5 | 3 << 12 | 1 << 14 | 1 << 18 | 1 << 21)];
    trial.row("bits that are not reserved", &edits, Expect::Enters)
}

const VM: u64 = 1 << 17;

fn rflags_vm(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("VM in IA-32e mode", &[Set(Field::GUEST_RFLAGS, VM)], BAD)
}

fn rflags_vm_real(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = unrestricted(ctx, Mode::Pae)?;
    let edits = [Set(Field::GUEST_RFLAGS, VM), Clear(Field::GUEST_CR0, PG | PE)];
    trial.row("VM in real-address mode", &edits, BAD)
}

/// An external interrupt can be injected with IF set only.
fn rflags_if(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let info = |kind: u8, vector: u8| {
        To(Field::ENTRY_INTR_INFO, 1 << 31 | u64::from(kind) << 8 | u64::from(vector))
    };
    for vector in [0, 32, 255] {
        trial.row("interrupt, IF clear", &[info(kind::EXTERNAL, vector)], BAD)?;
        let edits = [info(kind::EXTERNAL, vector), To(Field::GUEST_RFLAGS, 0x202)];
        trial.row("interrupt, IF set", &edits, Expect::Enters)?;
    }
    trial.row("NMI, IF clear", &[info(kind::NMI, vector::NMI)], Expect::Enters)?;
    trial.row("exception, IF clear", &[info(kind::HARDWARE_EXCEPTION, 6)], Expect::Enters)
}

/// Reserved bits of a present PDPTE: 2:1 and 8:5; the upper ones depend on the width.
const PDPTE_RESERVED: u64 = 0x1E6;

fn pdptes(ctx: &mut Ctx<'_>) -> Verdict {
    const BAD: Expect = Expect::Guest(entry_failure::PDPTE);
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    let wide = beyond_width(&trial.vmx);
    for field in &PDPTES[..2] {
        trial.each_set(*field, PDPTE_RESERVED, BAD)?;
        trial.each_set(*field, wide, BAD)?;
    }
    for field in &PDPTES[2..] {
        trial.row(field.name(), &[To(*field, 1 | 1 << 1)], BAD)?;
        trial.row(field.name(), &[To(*field, 1 | 1 << 63)], BAD)?;
        trial.row("not present", &[To(*field, !1)], Expect::Enters)?;
    }
    crate::vmx::leave();
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let edits = [To(PDPTES[0], u64::MAX), To(PDPTES[3], u64::MAX)];
    trial.row("without PAE paging", &edits, Expect::Enters)
}

/// Without EPT the processor reads the PDPTEs from the table that CR3 points to.
fn pdptes_without_ept(ctx: &mut Ctx<'_>) -> Verdict {
    const BAD: Expect = Expect::Guest(entry_failure::PDPTE);
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    trial.base(&[Clear(Field::PROC_CTLS2, ProcCtls2::EPT.bits().into())]);
    let fields = PDPTES.map(|field| To(field, u64::MAX));
    trial.row("the fields do not count", &fields, Expect::Enters)?;
    let table = trial.vm.paging.root;
    for (index, bit) in [(0, 1), (0, 2), (1, 5), (1, 8), (0, 63), (1, 52)] {
        let good = table.read(index);
        table.write(index, good | 1 << bit);
        let outcome = trial.vm.run();
        table.write(index, good);
        super::judge("PDPTE in memory", outcome, BAD)?;
        trial.row("PDPTE mended", &[], Expect::Enters)?;
    }
    table.write(3, !1);
    trial.row("an entry that is not present", &[], Expect::Enters)
}
