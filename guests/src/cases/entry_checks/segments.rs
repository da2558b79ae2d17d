//! Answers: does VM entry fail where the guest's segment registers are wrong?
//!
//! SDM Vol. 3C, "Checks on Guest Segment Registers".

use vmx_defs::{Field, ProcCtls2, exit::entry_failure};

use super::{Clear, Expect, Set, To, Trial, not_canonical};
use crate::{
    skip,
    suite::{Case, Ctx, Verdict},
    vmx::{Mode, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.guest.tr_selector", run: tr_selector },
    Case { name: "entry.guest.ldtr_selector", run: ldtr_selector },
    Case { name: "entry.guest.ss_rpl", run: ss_rpl },
    Case { name: "entry.guest.bases_canonical", run: bases_canonical },
    Case { name: "entry.guest.bases_32_bit", run: bases_32_bit },
    Case { name: "entry.guest.cs_type", run: cs_type },
    Case { name: "entry.guest.cs_type.unrestricted", run: cs_type_unrestricted },
    Case { name: "entry.guest.cs_dpl", run: cs_dpl },
    Case { name: "entry.guest.cs_rights", run: |ctx| rights(ctx, &CS) },
    Case { name: "entry.guest.cs_long_and_big", run: cs_long_and_big },
    Case { name: "entry.guest.ss_type", run: ss_type },
    Case { name: "entry.guest.ss_dpl", run: ss_dpl },
    Case { name: "entry.guest.ss_dpl.real_mode", run: ss_dpl_real },
    Case { name: "entry.guest.ss_rights", run: |ctx| rights(ctx, &SS) },
    Case { name: "entry.guest.data_type", run: data_type },
    Case { name: "entry.guest.data_dpl", run: data_dpl },
    Case { name: "entry.guest.data_dpl.code", run: data_dpl_code },
    Case { name: "entry.guest.data_rights", run: data_rights },
    Case { name: "entry.guest.unusable", run: unusable },
    Case { name: "entry.guest.tr_type", run: tr_type },
    Case { name: "entry.guest.tr_rights", run: tr_rights },
    Case { name: "entry.guest.ldtr_type", run: ldtr_type },
    Case { name: "entry.guest.ldtr_rights", run: ldtr_rights },
    Case { name: "entry.guest.virtual_8086", run: virtual_8086 },
];

const BAD: Expect = Expect::Guest(entry_failure::DEFAULT);

/// The four fields of a segment register.
struct Segment {
    name: &'static str,
    selector: Field,
    base: Field,
    limit: Field,
    rights: Field,
}

macro_rules! segments {
    ($($name:ident: $selector:ident, $base:ident, $limit:ident, $rights:ident;)*) => {
        $(const $name: Segment = Segment {
            name: stringify!($name),
            selector: Field::$selector,
            base: Field::$base,
            limit: Field::$limit,
            rights: Field::$rights,
        };)*
    };
}

segments! {
    ES: GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_AR;
    CS: GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_AR;
    SS: GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_AR;
    DS: GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_AR;
    FS: GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_AR;
    GS: GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_AR;
    LDTR: GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_AR;
    TR: GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_AR;
}

/// Those that hold neither code nor the stack.
const DATA: [Segment; 4] = [DS, ES, FS, GS];

const S: u64 = 1 << 4;
const P: u64 = 1 << 7;
const L: u64 = 1 << 13;
const DB: u64 = 1 << 14;
const G: u64 = 1 << 15;
const UNUSABLE: u64 = 1 << 16;
/// Bits 11:8 and 31:17.
const RESERVED: u64 = 0xFFFE_0F00;
/// TI of a selector.
const TI: u64 = 1 << 2;

fn dpl(level: u64) -> u64 {
    level << 5
}

/// The edit that gives a register another type.
fn with_type(segment: &Segment, kind: u64) -> super::Edit {
    To(segment.rights, vmcs::read(segment.rights) & !0xF | kind)
}

/// An LDTR that may be used, since the one of [`Vm`](crate::vmx::Vm) may not.
fn usable_ldtr(trial: &mut Trial) {
    trial.base(&[
        To(LDTR.selector, 0x30),
        To(LDTR.rights, P | 2),
        To(LDTR.limit, 0xFFF),
        To(LDTR.base, 0x1000),
    ]);
}

fn tr_selector(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("TI set", &[Set(TR.selector, TI)], BAD)
}

fn ldtr_selector(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("TI set, unusable", &[Set(LDTR.selector, TI)], Expect::Enters)?;
    usable_ldtr(&mut trial);
    trial.row("a good LDTR", &[], Expect::Enters)?;
    trial.row("TI set", &[Set(LDTR.selector, TI)], BAD)
}

/// The RPLs of SS and CS are equal, unless the guest is unrestricted.
fn ss_rpl(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for rpl in 1..4 {
        trial.row("RPL of SS", &[Set(SS.selector, rpl)], BAD)?;
        trial.row("RPL of CS", &[Set(CS.selector, rpl)], BAD)?;
    }
    trial.row("TI of SS", &[Set(SS.selector, TI)], Expect::Enters)?;
    if trial.vmx.caps.has2(ProcCtls2::UNRESTRICTED_GUEST) {
        let unrestricted = Set(Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into());
        let edits = [unrestricted, Set(SS.selector, 3)];
        trial.row("RPL of SS, unrestricted", &edits, Expect::Enters)?;
    }
    Ok(())
}

fn bases_canonical(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let first = not_canonical();
    usable_ldtr(&mut trial);
    for segment in [TR, FS, GS, LDTR] {
        for bad in [first, 1 << 63, !first, first << 1] {
            trial.row(segment.name, &[To(segment.base, bad)], BAD)?;
        }
        for good in [first - 1, !(first - 1)] {
            trial.row(segment.name, &[To(segment.base, good)], Expect::Enters)?;
        }
    }
    // Only LDTR's may be anything while the register is unusable.
    for segment in [FS, GS] {
        let edits = [To(segment.base, first), Set(segment.rights, UNUSABLE)];
        trial.row("unusable FS or GS", &edits, BAD)?;
    }
    let edits = [To(LDTR.base, first), Set(LDTR.rights, UNUSABLE)];
    trial.row("unusable LDTR", &edits, Expect::Enters)
}

fn bases_32_bit(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for segment in [CS, SS, DS, ES] {
        trial.each_set(segment.base, 0xFFFF_FFFF_0000_0000, BAD)?;
    }
    for segment in [SS, DS, ES] {
        let edits = [To(segment.base, 1 << 32), Set(segment.rights, UNUSABLE)];
        trial.row("unusable", &edits, Expect::Enters)?;
    }
    Ok(())
}

fn cs_type(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for kind in 0..16 {
        let expected = if matches!(kind, 9 | 11 | 13 | 15) { Expect::Enters } else { BAD };
        let edits = [with_type(&CS, kind)];
        trial.row("type of CS", &edits, expected)?;
    }
    Ok(())
}

/// An unrestricted guest may have a data segment in CS.
fn cs_type_unrestricted(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    if !trial.vmx.caps.has2(ProcCtls2::UNRESTRICTED_GUEST) {
        skip!("unrestricted guest not offered");
    }
    trial.base(&[Set(Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into())]);
    for kind in 0..16 {
        let expected = if matches!(kind, 3 | 9 | 11 | 13 | 15) { Expect::Enters } else { BAD };
        let edits = [with_type(&CS, kind)];
        trial.row("type of CS", &edits, expected)?;
    }
    for level in 1..4 {
        let edits = [with_type(&CS, 3), Set(SS.rights, dpl(level))];
        trial.row("DPL of SS with data in CS", &edits, BAD)?;
        let rights = vmcs::read(CS.rights) & !0xF | 3 | dpl(level);
        trial.row("DPL of data in CS", &[To(CS.rights, rights)], BAD)?;
    }
    Ok(())
}

/// Non-conforming code has SS's DPL, conforming code no higher one.
fn cs_dpl(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for kind in [9, 11, 13, 15] {
        for level in 1..4 {
            let rights = vmcs::read(CS.rights) & !0xF | kind | dpl(level);
            trial.row("DPL of CS above SS's", &[To(CS.rights, rights)], BAD)?;
        }
    }
    // At CPL 3: SS and CS with RPL 3.
    for (kind, level, expected) in [
        (11, 3, Expect::Enters),
        (11, 0, BAD),
        (11, 2, BAD),
        (15, 0, Expect::Enters),
        (15, 3, Expect::Enters),
    ] {
        let rights = vmcs::read(CS.rights) & !0xF | kind | dpl(level);
        let edits = [
            Set(SS.selector, 3),
            Set(CS.selector, 3),
            Set(SS.rights, dpl(3)),
            To(CS.rights, rights),
        ];
        trial.row("DPL of CS at CPL 3", &edits, expected)?;
    }
    Ok(())
}

/// What CS, SS, DS, ES, FS and GS have in common: S, P, reserved bits and G.
fn rights_of(trial: &mut Trial, segment: &Segment) -> Verdict {
    trial.row(segment.name, &[Clear(segment.rights, S)], BAD)?;
    common_rights(trial, segment)
}

/// What all registers have in common: P, reserved bits and G.
fn common_rights(trial: &mut Trial, segment: &Segment) -> Verdict {
    trial.row(segment.name, &[Clear(segment.rights, P)], BAD)?;
    trial.each_set(segment.rights, RESERVED, BAD)?;
    for (granular, limit, expected) in [
        (true, 0xFFFF_FFFF, Expect::Enters),
        (true, 0xFFF, Expect::Enters),
        (true, 0xFFFF_FFFE, BAD),
        (true, 0xFFFF_F7FF, BAD),
        (true, 0xFFFF_F000, BAD),
        (true, 0, BAD),
        (false, 0xF_FFFF, Expect::Enters),
        (false, 0xF_FFFE, Expect::Enters),
        (false, 0x10_0000, BAD),
        (false, 0x8000_0FFF, BAD),
        (false, 0xFFFF_FFFF, BAD),
    ] {
        let g = if granular { Set(segment.rights, G) } else { Clear(segment.rights, G) };
        trial.row(segment.name, &[g, To(segment.limit, limit)], expected)?;
    }
    Ok(())
}

fn rights(ctx: &mut Ctx<'_>, segment: &Segment) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    rights_of(&mut trial, segment)
}

fn cs_long_and_big(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("L and D/B", &[Set(CS.rights, L | DB)], BAD)?;
    trial.row("L alone", &[], Expect::Enters)
}

fn ss_type(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for kind in 0..16 {
        let expected = if matches!(kind, 3 | 7) { Expect::Enters } else { BAD };
        let edits = [with_type(&SS, kind)];
        trial.row("type of SS", &edits, expected)?;
    }
    Ok(())
}

/// SS's DPL is its RPL.
fn ss_dpl(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for level in 1..4 {
        trial.row("DPL of SS", &[Set(SS.rights, dpl(level))], BAD)?;
        let edits = [Set(SS.selector, level), Set(CS.selector, level)];
        trial.row("RPL of SS and CS", &edits, BAD)?;
    }
    Ok(())
}

/// In real-address mode SS's DPL is 0, though it need not be its RPL.
fn ss_dpl_real(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    if !trial.vmx.caps.has2(ProcCtls2::UNRESTRICTED_GUEST) {
        skip!("unrestricted guest not offered");
    }
    trial.base(&[
        Set(Field::PROC_CTLS2, ProcCtls2::UNRESTRICTED_GUEST.bits().into()),
        Clear(Field::GUEST_CR0, 1 << 31 | 1),
    ]);
    trial.row("DPL 0", &[Set(SS.selector, 3)], Expect::Enters)?;
    for level in 1..4 {
        let edits = [
            Set(SS.rights, dpl(level)),
            Set(CS.rights, dpl(level)),
            Set(SS.selector, level),
            Set(CS.selector, level),
        ];
        trial.row("DPL above 0", &edits, BAD)?;
    }
    Ok(())
}

/// Accessed, and readable if it is code.
fn data_type(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for segment in &DATA {
        for kind in 0..16 {
            let good = matches!(kind, 1 | 3 | 5 | 7 | 11 | 15);
            let expected = if good { Expect::Enters } else { BAD };
            let edits = [with_type(segment, kind)];
            trial.row(segment.name, &edits, expected)?;
        }
    }
    Ok(())
}

/// DPL is no lower than RPL.
fn data_dpl(ctx: &mut Ctx<'_>) -> Verdict {
    data_levels(
        ctx,
        &[
            (3, 0, 1, BAD),
            (3, 2, 3, BAD),
            (7, 0, 3, BAD),
            (3, 3, 3, Expect::Enters),
            (3, 3, 0, Expect::Enters),
            (15, 0, 3, Expect::Enters),
        ],
    )
}

/// Code that is not conforming is no exception.
fn data_dpl_code(ctx: &mut Ctx<'_>) -> Verdict {
    data_levels(ctx, &[(11, 3, 3, Expect::Enters), (11, 0, 3, BAD), (11, 2, 3, BAD)])
}

/// Rows of type, DPL and RPL for each of DS, ES, FS and GS.
fn data_levels(ctx: &mut Ctx<'_>, rows: &[(u64, u64, u64, Expect)]) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for segment in &DATA {
        for &(kind, level, rpl, expected) in rows {
            let rights = vmcs::read(segment.rights) & !0xF | kind | dpl(level);
            let edits = [Set(segment.selector, rpl), To(segment.rights, rights)];
            trial.row(segment.name, &edits, expected)?;
        }
    }
    Ok(())
}

fn data_rights(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    DATA.iter().try_for_each(|segment| rights_of(&mut trial, segment))
}

/// A register that is unusable may hold anything else, but for SS's DPL.
fn unusable(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for segment in &DATA {
        let edits = [To(segment.rights, UNUSABLE), To(segment.limit, 0x1234_5678)];
        trial.row(segment.name, &edits, Expect::Enters)?;
        let edits = [To(segment.rights, UNUSABLE | S | 0xA), Set(segment.selector, 3)];
        trial.row(segment.name, &edits, Expect::Enters)?;
    }
    trial.row("SS", &[To(SS.rights, UNUSABLE), To(SS.limit, 1)], Expect::Enters)?;
    trial.row("DPL of an unusable SS", &[To(SS.rights, UNUSABLE | dpl(3))], BAD)?;
    let edits = [To(LDTR.rights, UNUSABLE | S | 0xF), To(LDTR.limit, 0x1234_5678)];
    trial.row("LDTR", &edits, Expect::Enters)
}

/// A busy TSS: 64-bit in IA-32e mode, 16-bit or 32-bit elsewhere.
fn tr_type(ctx: &mut Ctx<'_>) -> Verdict {
    for mode in [Mode::Long, Mode::Pae] {
        let mut trial = Trial::new(ctx, mode)?;
        for kind in 0..16 {
            let good = kind == 11 || kind == 3 && mode == Mode::Pae;
            let expected = if good { Expect::Enters } else { BAD };
            let edits = [with_type(&TR, kind)];
            trial.row("type of TR", &edits, expected)?;
        }
        crate::vmx::leave();
    }
    Ok(())
}

fn tr_rights(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("S set", &[Set(TR.rights, S)], BAD)?;
    trial.row("unusable", &[Set(TR.rights, UNUSABLE)], BAD)?;
    common_rights(&mut trial, &TR)
}

fn ldtr_type(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    usable_ldtr(&mut trial);
    for kind in 0..16 {
        let expected = if kind == 2 { Expect::Enters } else { BAD };
        let edits = [with_type(&LDTR, kind)];
        trial.row("type of LDTR", &edits, expected)?;
    }
    Ok(())
}

fn ldtr_rights(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    usable_ldtr(&mut trial);
    trial.row("S set", &[Set(LDTR.rights, S)], BAD)?;
    common_rights(&mut trial, &LDTR)
}

/// In virtual-8086 mode base, limit and access rights follow from the selector.
fn virtual_8086(ctx: &mut Ctx<'_>) -> Verdict {
    const VM: u64 = 1 << 17;
    let mut trial = Trial::new(ctx, Mode::Pae)?;
    let all = [CS, SS, DS, ES, FS, GS];
    for segment in &all {
        trial.base(&[
            To(segment.selector, 0x1234),
            To(segment.base, 0x12340),
            To(segment.limit, 0xFFFF),
            To(segment.rights, 0xF3),
        ]);
    }
    trial.base(&[Set(Field::GUEST_RFLAGS, VM)]);
    trial.row("virtual-8086 mode", &[], Expect::Enters)?;
    for segment in &all {
        for base in [0x12350, 0, 0x1_0001_2340] {
            trial.row(segment.name, &[To(segment.base, base)], BAD)?;
        }
        for limit in [0xFFFE, 0xF_FFFF, 0] {
            trial.row(segment.name, &[To(segment.limit, limit)], BAD)?;
        }
        for rights in [0xF2, 0xFB, 0x93, 0x73, 0x80F3, 0x1_00F3] {
            trial.row(segment.name, &[To(segment.rights, rights)], BAD)?;
        }
    }
    Ok(())
}
