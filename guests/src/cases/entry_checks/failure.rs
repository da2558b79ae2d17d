//! Answers: what else does a VM entry do that fails, and which failure comes first?
//!
//! SDM Vol. 3C, "Basic VM-Entry Checks", "VM-Entry Failures During or After Loading Guest State" and
//! "VM-Exit Information Fields".

use vmx_defs::{Field, field::Kind};

use super::{Clear, Expect, To, Trial};
use crate::{
    ensure_eq,
    suite::{Case, Ctx, Verdict},
    vmx::{Mode, Op, vmclear, vmcs, vmptrld},
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "entry.failure.order", run: order },
    Case { name: "entry.failure.information_kept", run: information_kept },
    Case { name: "entry.failure.injection_kept", run: injection_kept },
    Case { name: "entry.failure.stores_nothing", run: stores_nothing },
    Case { name: "entry.failure.launch_state", run: launch_state },
    Case { name: "entry.failure.fields_kept", run: fields_kept },
];

fn bad_control() -> super::Edit {
    To(Field::CR3_TARGET_COUNT, 0xFFFF)
}

fn bad_host() -> super::Edit {
    To(Field::HOST_TR_SELECTOR, 0)
}

fn bad_guest() -> super::Edit {
    To(Field::GUEST_RFLAGS, 0)
}

/// Controls and host state are checked before guest state, and that before MSRs are loaded.
fn order(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let area = ctx.arena.page();
    area.write(0, vmx_defs::msr::FS_BASE.into());
    let bad_msr = To(Field::ENTRY_MSR_LOAD_COUNT, 1);
    trial.base(&[To(Field::ENTRY_MSR_LOAD_ADDR, area.address())]);
    let all = [bad_control(), bad_host(), bad_guest(), bad_msr];
    trial.row("all", &all, Expect::ControlsOrHost)?;
    trial.row("controls and guest", &[bad_control(), bad_guest()], Expect::Controls)?;
    trial.row("host and guest", &[bad_host(), bad_guest()], Expect::Host)?;
    trial.row("host and MSR", &[bad_host(), bad_msr], Expect::Host)?;
    trial.row("guest and MSR", &[bad_guest(), bad_msr], Expect::Guest(0))?;
    trial.row("MSR", &[bad_msr], Expect::Msr(1))
}

/// VMfail writes the VM-instruction error only, a failure with an exit only reason and qualification.
fn information_kept(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    // An exit that fills some of them.
    let _ = trial.vm.exec(Op::Ud2);
    let fields = trial.vmx.caps.fields_of(Kind::ReadOnly);
    for (edit, exits) in [(bad_control(), false), (bad_host(), false), (bad_guest(), true)] {
        let before = fields.clone().into_iter().map(|field| (field, vmcs::read(field)));
        let before: arrayvec::ArrayVec<_, 96> = before.collect();
        let good = vmcs::read(edit.field());
        edit.apply();
        let _ = trial.vm.run();
        vmcs::write(edit.field(), good);
        for (field, value) in before {
            let written = if exits {
                matches!(field, Field::EXIT_REASON | Field::EXIT_QUALIFICATION)
            } else {
                field == Field::VM_INSTRUCTION_ERROR
            };
            if !written {
                ensure_eq!(vmcs::read(field), value, "{field:?} after {:?}", edit.field());
            }
        }
    }
    Ok(())
}

/// The event that was to be injected stays valid in the field.
fn injection_kept(ctx: &mut Ctx<'_>) -> Verdict {
    const UD: u64 = 0x8000_0306;
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for edit in [bad_control(), bad_host(), bad_guest()] {
        let good = vmcs::read(edit.field());
        vmcs::write(Field::ENTRY_INTR_INFO, UD);
        edit.apply();
        let _ = trial.vm.run();
        ensure_eq!(vmcs::read(Field::ENTRY_INTR_INFO), UD, "after {:?}", edit.field());
        vmcs::write(edit.field(), good);
    }
    let exit = trial.vm.run().exit()?;
    ensure_eq!(exit.reason.is_entry_failure(), false, "mended VM entry fails");
    ensure_eq!(vmcs::read(Field::ENTRY_INTR_INFO), UD & !(1 << 31), "after the VM entry");
    Ok(())
}

/// No MSR is saved in the VM-exit MSR-store area.
fn stores_nothing(ctx: &mut Ctx<'_>) -> Verdict {
    const SYSENTER_CS: u64 = vmx_defs::msr::SYSENTER_CS as u64;
    let mut trial = Trial::new(ctx, Mode::Long)?;
    let store = ctx.arena.page();
    store.write(0, SYSENTER_CS);
    store.write(1, 0x7777_7777);
    trial.base(&[
        To(Field::EXIT_MSR_STORE_COUNT, 1),
        To(Field::EXIT_MSR_STORE_ADDR, store.address()),
        To(Field::GUEST_SYSENTER_CS, 0x1234),
    ]);
    for edit in [bad_control(), bad_host(), bad_guest()] {
        let good = vmcs::read(edit.field());
        edit.apply();
        let _ = trial.vm.run();
        vmcs::write(edit.field(), good);
        ensure_eq!(store.read(1), 0x7777_7777, "stored value after {:?}", edit.field());
    }
    trial.vm.exec(Op::Nothing)?;
    ensure_eq!(store.read(1), 0x1234, "stored value after an exit");
    Ok(())
}

/// A failure leaves the launch state as it was.
fn launch_state(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    for launched in [false, true] {
        for edit in [bad_control(), bad_host(), bad_guest()] {
            ensure_eq!(vmclear(trial.vm.vmcs), Ok(()), "VMCLEAR");
            ensure_eq!(vmptrld(trial.vm.vmcs), Ok(()), "VMPTRLD");
            trial.vm.launched = false;
            if launched {
                trial.vm.exec(Op::Nothing)?;
            }
            let good = vmcs::read(edit.field());
            edit.apply();
            let _ = trial.vm.run();
            vmcs::write(edit.field(), good);
            // VMLAUNCH or VMRESUME as before the failure.
            trial.vm.exec(Op::Nothing)?;
        }
    }
    Ok(())
}

/// No field outside the read-only ones changes.
fn fields_kept(ctx: &mut Ctx<'_>) -> Verdict {
    let mut trial = Trial::new(ctx, Mode::Long)?;
    trial.vm.exec(Op::Nothing)?;
    for edit in [bad_control(), bad_host(), bad_guest(), Clear(Field::GUEST_TR_AR, 1 << 7)] {
        let good = vmcs::read(edit.field());
        edit.apply();
        for kind in [Kind::Control, Kind::Guest, Kind::Host] {
            let fields = trial.vmx.caps.fields_of(kind);
            let before: arrayvec::ArrayVec<_, 96> = fields.into_iter().map(vmcs::read).collect();
            let _ = trial.vm.run();
            for (field, value) in trial.vmx.caps.fields_of(kind).into_iter().zip(before) {
                // The entry path itself writes host RSP.
                if field != Field::HOST_RSP {
                    ensure_eq!(vmcs::read(field), value, "{field:?} after {:?}", edit.field());
                }
            }
        }
        vmcs::write(edit.field(), good);
    }
    Ok(())
}
