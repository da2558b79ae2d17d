//! Answers: which accesses does an EPT entry allow, and what does the exit say of the others?

use super::*;

macro_rules! row {
    ($permissions_name:literal, $permissions:literal) => {
        [
            row!(@ $permissions_name, $permissions, "read", Read, "4k", K4),
            row!(@ $permissions_name, $permissions, "write", Write, "4k", K4),
            row!(@ $permissions_name, $permissions, "fetch", Fetch, "4k", K4),
            row!(@ $permissions_name, $permissions, "read", Read, "2m", M2),
            row!(@ $permissions_name, $permissions, "write", Write, "2m", M2),
            row!(@ $permissions_name, $permissions, "fetch", Fetch, "2m", M2),
        ]
    };
    (@ $permissions_name:literal, $permissions:literal, $access_name:literal, $access:ident,
     $size_name:literal, $size:ident) => {
        Case {
            name: concat!(
                "ept.matrix.", $permissions_name, ".", $access_name, ".", $size_name
            ),
            run: |ctx| matrix(ctx, $permissions, Access::$access, Size::$size),
        }
    };
}

pub(super) const MATRIX: &[Case] =
    [row!("none", 0), row!("r", 1), row!("rw", 3), row!("rx", 5), row!("x", 4), row!("rwx", 7)]
        .as_flattened();

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.upper.pml4e.write", run: |ctx| upper(ctx, 4, 5, Access::Write) },
    Case { name: "ept.upper.pdpte.write", run: |ctx| upper(ctx, 3, 5, Access::Write) },
    Case { name: "ept.upper.pde.write", run: |ctx| upper(ctx, 2, 5, Access::Write) },
    Case { name: "ept.upper.pdpte.fetch", run: |ctx| upper(ctx, 3, 3, Access::Fetch) },
    Case { name: "ept.upper.pde.fetch", run: |ctx| upper(ctx, 2, 3, Access::Fetch) },
    Case { name: "ept.upper.pdpte.not_present", run: |ctx| upper(ctx, 3, 0, Access::Read) },
    Case { name: "ept.upper.pde.not_present", run: |ctx| upper(ctx, 2, 0, Access::Read) },
    Case { name: "ept.upper.intersection", run: intersection },
    Case { name: "ept.not_present.other_bits_ignored", run: not_present_bits },
    Case { name: "ept.violation.then_granted", run: then_granted },
    Case { name: "ept.violation.then_repointed", run: then_repointed },
    Case { name: "ept.reduction.seen_after_invept", run: reduction },
    Case { name: "ept.reduction.between_invept_and_entry", run: reduction_late },
    Case { name: "ept.reduction.between_vmxon_and_entry", run: reduction_vmxon },
    Case { name: "ept.1g_page", run: page_1g },
];

fn matrix(ctx: &mut Ctx<'_>, permissions: u64, access: Access, size: Size) -> Verdict {
    let mut stage = Stage::new(ctx, size)?;
    if permissions == 4 && !stage.vmx.caps.ept.contains(EptVpidCap::EXECUTE_ONLY) {
        skip!("no execute-only translations");
    }
    let full = stage.leaf.get();
    stage.leaf.set(full & !7 | permissions);
    if permissions & access.bit() != 0 {
        return stage.allowed(access);
    }
    stage.denied(access, permissions)?;
    // Granted, it goes through: a violation drops what is cached for the address.
    stage.leaf.set(full);
    stage.allowed(access)
}

fn upper(ctx: &mut Ctx<'_>, level: u8, permissions: u64, access: Access) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(TARGET), level);
    let full = slot.get();
    slot.set(full & !7 | permissions);
    stage.denied(access, permissions)?;
    slot.set(full);
    stage.allowed(access)
}

/// The permissions reported are those of all levels together.
fn intersection(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    let gpa = L2Gpa::new(TARGET);
    for (level, permissions) in [(3, 5), (2, 3), (1, 7)] {
        let slot = stage.vm.ept.slot(ctx.arena, gpa, level);
        slot.set(slot.get() & !7 | permissions);
    }
    stage.allowed(Access::Read)?;
    stage.denied(Access::Write, 1)?;
    stage.denied(Access::Fetch, 1)
}

/// An entry whose bits 2:0 are 0 is not present, whatever the others are.
fn not_present_bits(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    stage.leaf.set(0xFFFF_FFFF_FFFF_F3F8);
    stage.denied(Access::Read, 0)?;
    let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(TARGET), 2);
    slot.set(0xFFFF_FFFF_FFFF_F3F8);
    stage.denied(Access::Write, 0)
}

/// Rights may be granted one after the other without INVEPT.
fn then_granted(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    let full = stage.leaf.get();
    stage.leaf.set(0);
    stage.denied(Access::Read, 0)?;
    stage.leaf.set(full & !7 | 1);
    stage.allowed(Access::Read)?;
    stage.denied(Access::Write, 1)?;
    stage.leaf.set(full & !7 | 3);
    stage.allowed(Access::Write)?;
    stage.denied(Access::Fetch, 3)?;
    stage.leaf.set(full);
    stage.allowed(Access::Fetch)
}

/// After an EPT violation the entry may be pointed elsewhere without INVEPT: the violation has
/// dropped what was cached for the address.
fn then_repointed(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    let full = stage.leaf.get();
    let copy = ctx.arena.page();
    copy.write(1, 0xC0B1);
    stage.leaf.set(full & !7 | 1);
    stage.allowed(Access::Read)?;
    stage.denied(Access::Write, 1)?;
    stage.leaf.set(copy.address() | LEAF);
    ensure_eq!(stage.vm.load(TARGET)?, 0xC0B1, "what L2 reads at the new page");
    stage.vm.store(TARGET, 0xC0B2)?;
    ensure_eq!(copy.read(1), 0xC0B2, "the new page");
    ensure_eq!(stage.page.read(1), VALUE, "the old page");
    Ok(())
}

/// Rights that are taken away are gone after INVEPT.
fn reduction(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    let eptp = stage.vm.ept.eptp(false);
    let full = stage.leaf.get();
    for permissions in [3, 1, 0] {
        stage.allowed(Access::Read)?;
        stage.leaf.set(full & !7 | permissions);
        crate::vmx::invept_single(eptp)?;
        let access = if permissions == 3 {
            Access::Fetch
        } else if permissions == 1 {
            Access::Write
        } else {
            Access::Read
        };
        stage.denied(access, permissions)?;
    }
    Ok(())
}

/// Nothing is cached in VMX root operation ("Creating and Using Cached Translation Information"):
/// what changes after INVEPT and before the next VM entry needs no other INVEPT.
fn reduction_late(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    let eptp = stage.vm.ept.eptp(false);
    let full = stage.leaf.get();
    for permissions in [3, 1, 0] {
        for access in [Access::Read, Access::Write, Access::Fetch] {
            stage.leaf.set(full);
            stage.allowed(access)?;
            crate::vmx::invept_single(eptp)?;
            stage.leaf.set(full & !7 | permissions);
            if permissions & access.bit() == 0 {
                stage.denied(access, permissions)?;
            } else {
                stage.allowed(access)?;
            }
            stage.leaf.set(full);
            stage.allowed(access)?;
        }
    }
    // The entry of an upper level, pointed to another table.
    let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(TARGET), 2);
    let (table, page) = (ctx.arena.page(), ctx.arena.page());
    page.write(1, 0xC0B1);
    table.write(5, page.address() | LEAF);
    stage.allowed(Access::Read)?;
    crate::vmx::invept_single(eptp)?;
    slot.set(table.address() | crate::vmx::ept::TABLE);
    ensure_eq!(stage.vm.load(TARGET)?, 0xC0B1, "what L2 reads through the new table");
    Ok(())
}

/// The same with the INVEPT of all contexts that a hypervisor does when it starts, and an EPT whose
/// tables lie where others lay before.
fn reduction_vmxon(ctx: &mut Ctx<'_>) -> Verdict {
    let mark = ctx.arena.mark();
    for full in [true, false, true] {
        let mut stage = Stage::new(ctx, Size::K4)?;
        if full {
            for access in [Access::Read, Access::Write, Access::Fetch] {
                stage.allowed(access)?;
            }
        } else {
            stage.leaf.set(stage.leaf.get() & !7 | 1);
            stage.allowed(Access::Read)?;
            stage.denied(Access::Write, 1)?;
        }
        crate::vmx::leave();
        ctx.arena.rewind(mark);
    }
    Ok(())
}

fn page_1g(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    if !stage.vmx.caps.ept.contains(EptVpidCap::PAGE_1G) {
        skip!("no 1-GiB pages in EPT");
    }
    // The GiB of the window becomes the first GiB of memory again.
    stage.vm.ept.slot(ctx.arena, L2Gpa::new(TARGET), 3).set(LEAF | LARGE);
    let page = ctx.arena.page();
    page.write(2, VALUE);
    let paging = stage.vm.paging;
    paging.window.write(7, (WINDOW + page.address()) | crate::vmx::paging::USER_RW);
    let read = stage.vm.load(WINDOW + 0x7010)?;
    ensure_eq!(read, VALUE, "what L2 reads through the 1-GiB page");
    stage.vm.store(WINDOW + 0x7018, 0x99)?;
    ensure_eq!(page.read(3), 0x99, "what L2 wrote through the 1-GiB page");
    Ok(())
}
