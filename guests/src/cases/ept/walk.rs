//! Answers: how are accesses to L2's own paging structures translated and reported?
//!
//! SDM Vol. 3C, "Exit Qualification for EPT Violations": bit 8 is clear for them; and "Accessed and
//! Dirty Flags for EPT": with those enabled such accesses are treated as writes.

use vmx_defs::Field;

use super::*;
use crate::vmx::{
    ept::{ACCESSED, DIRTY},
    paging::USER_RW,
    vmcs,
};

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.walk.not_present", run: not_present },
    Case { name: "ept.walk.read_only", run: read_only },
    Case { name: "ept.walk.read_only.sets_accessed", run: sets_accessed },
    Case { name: "ept.walk.read_only.sets_dirty", run: sets_dirty },
    Case { name: "ept.walk.misconfigured", run: misconfigured },
    Case { name: "ept.walk.ad.is_write", run: ad_is_write },
    Case { name: "ept.walk.ad.makes_dirty", run: ad_makes_dirty },
];

/// Guest-physical address of the window's page table in these cases.
const TABLE: u64 = WINDOW + 0x10_0000;
/// Guest-physical address of the entry of the page that holds [`TARGET`].
const ENTRY: u64 = TABLE + 5 * 8;
/// Accessed and dirty, in L2's own entries.
const OWN_ACCESSED: u64 = 1 << 5;
const OWN_DIRTY: u64 = 1 << 6;

/// L2 whose page table for the window lies at [`TABLE`]; the slot is the EPT entry that maps it.
fn stage(ctx: &mut Ctx<'_>) -> Result<(Stage, Slot), Stop> {
    let stage = Stage::new(ctx, Size::K4)?;
    let paging = stage.vm.paging;
    let slot = stage.vm.map(ctx, L2Gpa::new(TABLE), paging.window);
    paging.window_directory.write(0, TABLE | USER_RW);
    Ok((stage, slot))
}

/// L2's access must end in an EPT violation at its page-table entry.
fn walk_denied(stage: &mut Stage, access: Access, permissions: u64) -> Result<u64, Stop> {
    let Err(exit) = stage.access(access)? else {
        crate::fail!("{access:?} went through");
    };
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa, ENTRY, "guest-physical address");
    ensure_eq!(exit.gla, TARGET, "guest-linear address");
    // Linear address valid, but not its translation.
    let expected = permissions << 3 | 1 << 7;
    ensure_eq!(exit.qualification & 0x1B8, expected, "qualification but for the access");
    Ok(exit.qualification & 7)
}

fn not_present(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, slot) = stage(ctx)?;
    let full = slot.get();
    slot.set(0);
    ensure_eq!(walk_denied(&mut stage, Access::Read, 0)?, 1, "access");
    ensure_eq!(walk_denied(&mut stage, Access::Write, 0)?, 1, "access");
    slot.set(full);
    stage.allowed(Access::Read)
}

/// A walk that has no flag to set reads only.
fn read_only(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, slot) = stage(ctx)?;
    slot.set(slot.get() & !7 | 1);
    for access in [Access::Read, Access::Write, Access::Fetch] {
        stage.allowed(access)?;
    }
    Ok(())
}

/// Setting an accessed flag in L2's entry is a write.
fn sets_accessed(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, slot) = stage(ctx)?;
    let full = slot.get();
    let window = stage.vm.paging.window;
    window.write(5, window.read(5) & !(OWN_ACCESSED | OWN_DIRTY));
    slot.set(full & !7 | 1);
    let access = walk_denied(&mut stage, Access::Read, 1)?;
    ensure_eq!(access & 2, 2, "write bit of the qualification");
    ensure_eq!(window.read(5) & OWN_ACCESSED, 0, "L2's accessed flag");
    slot.set(full);
    stage.allowed(Access::Read)?;
    ensure_eq!(window.read(5) & OWN_ACCESSED, OWN_ACCESSED, "L2's accessed flag, granted");
    Ok(())
}

/// So is setting a dirty flag.
fn sets_dirty(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, slot) = stage(ctx)?;
    let full = slot.get();
    let window = stage.vm.paging.window;
    window.write(5, window.read(5) & !OWN_DIRTY);
    slot.set(full & !7 | 1);
    stage.allowed(Access::Read)?;
    let access = walk_denied(&mut stage, Access::Write, 1)?;
    ensure_eq!(access & 2, 2, "write bit of the qualification");
    slot.set(full);
    stage.allowed(Access::Write)?;
    ensure_eq!(window.read(5) & OWN_DIRTY, OWN_DIRTY, "L2's dirty flag, granted");
    Ok(())
}

fn misconfigured(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, slot) = stage(ctx)?;
    slot.set(slot.get() & !7 | 2);
    let exit = stage.access(Access::Read)?.err();
    let found = exit.map(|exit| (exit.reason, exit.gpa));
    ensure_eq!(found, Some((ExitReason::EPT_MISCONFIGURATION, ENTRY)), "exit");
    Ok(())
}

fn with_flags(stage: &Stage) -> Verdict {
    if !stage.vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
        skip!("no accessed and dirty flags for EPT");
    }
    vmcs::write(Field::EPT_POINTER, stage.vm.ept.eptp(true));
    Ok(())
}

/// With accessed and dirty flags for EPT, every access to a paging-structure entry of L2 is a
/// write, and is reported as a read and a write.
fn ad_is_write(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, slot) = stage(ctx)?;
    with_flags(&stage)?;
    slot.set(slot.get() & !7 | 1);
    ensure_eq!(walk_denied(&mut stage, Access::Read, 1)?, 3, "access");
    Ok(())
}

fn ad_makes_dirty(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, slot) = stage(ctx)?;
    with_flags(&stage)?;
    stage.allowed(Access::Read)?;
    let found = slot.get() & (ACCESSED | DIRTY);
    ensure_eq!(found, ACCESSED | DIRTY, "flags of the page that holds L2's page table");
    ensure_eq!(stage.leaf.get() & (ACCESSED | DIRTY), ACCESSED, "flags of the page read");
    Ok(())
}
