//! Answers: which accessed and dirty flags does an access set in L1's EPT?

use vmx_defs::Field;

use super::*;
use crate::vmx::{
    ept::{ACCESSED, DIRTY},
    vmcs,
};

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.ad.read.4k", run: |ctx| sets(ctx, Size::K4, Access::Read) },
    Case { name: "ept.ad.write.4k", run: |ctx| sets(ctx, Size::K4, Access::Write) },
    Case { name: "ept.ad.fetch.4k", run: |ctx| sets(ctx, Size::K4, Access::Fetch) },
    Case { name: "ept.ad.read.2m", run: |ctx| sets(ctx, Size::M2, Access::Read) },
    Case { name: "ept.ad.write.2m", run: |ctx| sets(ctx, Size::M2, Access::Write) },
    Case { name: "ept.ad.fetch.2m", run: |ctx| sets(ctx, Size::M2, Access::Fetch) },
    Case { name: "ept.ad.off", run: off },
    Case { name: "ept.ad.read_then_write", run: read_then_write },
    Case { name: "ept.ad.denied_write_not_dirty", run: denied_not_dirty },
    Case { name: "ept.ad.cleared_set_again_after_invept", run: cleared },
];

/// L2 with accessed and dirty flags enabled.
fn stage(ctx: &mut Ctx<'_>, size: Size) -> Result<Stage, Stop> {
    let stage = Stage::new(ctx, size)?;
    if !stage.vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
        skip!("no accessed and dirty flags for EPT");
    }
    vmcs::write(Field::EPT_POINTER, stage.vm.ept.eptp(true));
    Ok(stage)
}

/// The flags of each level's entry for [`TARGET`], the leaf first.
fn flags(ctx: &mut Ctx<'_>, stage: &Stage, size: Size) -> [u64; 4] {
    let lowest = if size == Size::K4 { 1 } else { 2 };
    let mut found = [0; 4];
    for level in lowest..=4 {
        let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(TARGET), level);
        found[usize::from(level - lowest)] = slot.get() & (ACCESSED | DIRTY);
    }
    found
}

fn sets(ctx: &mut Ctx<'_>, size: Size, access: Access) -> Verdict {
    let mut stage = stage(ctx, size)?;
    let leaf = stage.leaf;
    ensure_eq!(leaf.get() & (ACCESSED | DIRTY), 0, "flags before");
    stage.allowed(access)?;
    let leaf = if access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
    let top = if size == Size::K4 { ACCESSED } else { 0 };
    let expected = [leaf, ACCESSED, ACCESSED, top];
    ensure_eq!(flags(ctx, &stage, size), expected, "flags after {access:?}");
    Ok(())
}

/// Without the EPTP's bit 6 nothing is set.
fn off(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    for access in [Access::Read, Access::Write, Access::Fetch] {
        stage.allowed(access)?;
    }
    ensure_eq!(flags(ctx, &stage, Size::K4), [0; 4], "flags");
    Ok(())
}

fn read_then_write(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = stage(ctx, Size::K4)?;
    stage.allowed(Access::Read)?;
    ensure_eq!(stage.leaf.get() & (ACCESSED | DIRTY), ACCESSED, "flags after the read");
    stage.allowed(Access::Write)?;
    ensure_eq!(stage.leaf.get() & (ACCESSED | DIRTY), ACCESSED | DIRTY, "after the write");
    Ok(())
}

/// A write that is denied makes nothing dirty.
fn denied_not_dirty(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = stage(ctx, Size::K4)?;
    stage.leaf.set(stage.leaf.get() & !2);
    stage.denied(Access::Write, 5)?;
    ensure_eq!(stage.leaf.get() & DIRTY, 0, "dirty flag after a denied write");
    Ok(())
}

/// Flags that L1 cleared are set again by the next access after INVEPT.
fn cleared(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = stage(ctx, Size::K4)?;
    for round in 0..3 {
        stage.allowed(Access::Write)?;
        let found = stage.leaf.get() & (ACCESSED | DIRTY);
        ensure_eq!(found, ACCESSED | DIRTY, "flags after write {round}");
        stage.leaf.set(stage.leaf.get() & !(ACCESSED | DIRTY));
        crate::vmx::invept_single(stage.vm.ept.eptp(true))?;
        stage.allowed(Access::Read)?;
        let found = stage.leaf.get() & (ACCESSED | DIRTY);
        ensure_eq!(found, ACCESSED, "flags after read {round}");
    }
    Ok(())
}
