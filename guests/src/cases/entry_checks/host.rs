//! Answers: is VM entry refused where the host-state area is wrong?
//!
//! SDM Vol. 3C, "Checks on Host Control Registers, MSRs, and SSP", "Checks on Host Segment and
//! Descriptor-Table Registers" and "Checks Related to Address-Space Size".

use vmx_defs::{ExitCtls, Field, msr};

use super::{Clear, EFER_RESERVED, Expect, Set, To, Trial, bad_pats, beyond_width, not_canonical};
use crate::{
    skip,
    suite::{Case, Ctx, Verdict},
    vmx::{Mode, rdmsr, vmcs},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.host.cr0_fixed", run: cr0_fixed },
    Case { name: "entry.host.cr4_fixed", run: cr4_fixed },
    Case { name: "entry.host.cr3_width", run: cr3_width },
    Case { name: "entry.host.sysenter_canonical", run: sysenter },
    Case { name: "entry.host.pat", run: pat },
    Case { name: "entry.host.efer", run: efer },
    Case { name: "entry.host.selectors", run: selectors },
    Case { name: "entry.host.null_selectors", run: null_selectors },
    Case { name: "entry.host.bases_canonical", run: bases },
    Case { name: "entry.host.rip_canonical", run: rip },
    Case { name: "entry.host.address_space_size", run: address_space_size },
    Case { name: "entry.host.pae", run: pae },
];

fn cr0_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_clear(Field::HOST_CR0, rdmsr(msr::VMX_CR0_FIXED0), Expect::Host)?;
    trial.each_set(Field::HOST_CR0, !rdmsr(msr::VMX_CR0_FIXED1), Expect::Host)
}

fn cr4_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_clear(Field::HOST_CR4, rdmsr(msr::VMX_CR4_FIXED0), Expect::Host)?;
    trial.each_set(Field::HOST_CR4, !rdmsr(msr::VMX_CR4_FIXED1), Expect::Host)
}

fn cr3_width(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let wide = beyond_width(&trial.vmx);
    trial.each_set(Field::HOST_CR3, wide, Expect::Host)
}

/// The values that a canonical field must not have, and some that it may.
fn canonical(trial: &mut Trial, field: Field) -> Verdict {
    let first = not_canonical();
    for bad in [first, first | 0x1234, 1 << 63, !first, u64::MAX >> 1, first << 1] {
        trial.row(field.name(), &[To(field, bad)], Expect::Host)?;
    }
    Ok(())
}

fn sysenter(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for field in [Field::HOST_SYSENTER_ESP, Field::HOST_SYSENTER_EIP] {
        canonical(&mut trial, field)?;
        for good in [not_canonical() - 1, !(not_canonical() - 1)] {
            trial.row(field.name(), &[To(field, good)], Expect::Enters)?;
        }
    }
    Ok(())
}

fn pat(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let load = ExitCtls::LOAD_PAT.bits();
    if trial.vmx.caps.exit.may_be_1 & load == 0 {
        skip!("load of IA32_PAT at VM exit not offered");
    }
    for bad in bad_pats() {
        let edits = [Set(Field::EXIT_CTLS, load.into()), To(Field::HOST_PAT, bad)];
        trial.row("a reserved memory type", &edits, Expect::Host)?;
    }
    trial.row("not loaded", &[To(Field::HOST_PAT, u64::MAX)], Expect::Enters)?;
    trial.row("loaded", &[Set(Field::EXIT_CTLS, load.into())], Expect::Enters)
}

fn efer(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.each_set(Field::HOST_EFER, EFER_RESERVED, Expect::Host)?;
    trial.row("LMA clear", &[Clear(Field::HOST_EFER, 1 << 10)], Expect::Host)?;
    trial.row("LME clear", &[Clear(Field::HOST_EFER, 1 << 8)], Expect::Host)?;
    trial.row("both clear", &[Clear(Field::HOST_EFER, 0x500)], Expect::Host)?;
    let load = ExitCtls::LOAD_EFER.bits().into();
    let edits = [Clear(Field::EXIT_CTLS, load), To(Field::HOST_EFER, u64::MAX)];
    trial.row("not loaded", &edits, Expect::Enters)
}

const SELECTORS: [Field; 7] = [
    Field::HOST_ES_SELECTOR,
    Field::HOST_CS_SELECTOR,
    Field::HOST_SS_SELECTOR,
    Field::HOST_DS_SELECTOR,
    Field::HOST_FS_SELECTOR,
    Field::HOST_GS_SELECTOR,
    Field::HOST_TR_SELECTOR,
];

/// RPL and TI are 0.
fn selectors(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for field in SELECTORS {
        trial.each_set(field, 7, Expect::Host)?;
    }
    Ok(())
}

/// CS and TR are not null; the others may be, SS for a 64-bit host only.
fn null_selectors(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for field in SELECTORS {
        let needed = matches!(field, Field::HOST_CS_SELECTOR | Field::HOST_TR_SELECTOR);
        let expected = if needed { Expect::Host } else { Expect::Enters };
        trial.row(field.name(), &[To(field, 0)], expected)?;
    }
    Ok(())
}

fn bases(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for field in [
        Field::HOST_FS_BASE,
        Field::HOST_GS_BASE,
        Field::HOST_GDTR_BASE,
        Field::HOST_IDTR_BASE,
        Field::HOST_TR_BASE,
    ] {
        canonical(&mut trial, field)?;
    }
    Ok(())
}

fn rip(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    canonical(&mut trial, Field::HOST_RIP)
}

/// A hypervisor in 64-bit mode needs "host address-space size".
fn address_space_size(ctx: &mut Ctx<'_>) -> Verdict {
    for mode in [Mode::Long, Mode::Pae] {
        let mut trial = Trial::new(ctx, mode)?;
        let size = ExitCtls::HOST_ADDRESS_SPACE_SIZE.bits().into();
        trial.row("32-bit host", &[Clear(Field::EXIT_CTLS, size)], Expect::ControlsOrHost)?;
        let efer = vmcs::read(Field::HOST_EFER) & !0x500;
        let edits = [Clear(Field::EXIT_CTLS, size), To(Field::HOST_EFER, efer)];
        trial.row("32-bit host with its EFER", &edits, Expect::ControlsOrHost)?;
        crate::vmx::leave();
    }
    Ok(())
}

fn pae(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.row("CR4.PAE clear", &[Clear(Field::HOST_CR4, 1 << 5)], Expect::ControlsOrHost)
}
