//! Answers: which settings of an EPT entry are reserved, at which level?
//!
//! SDM Vol. 3C, "EPT Misconfigurations".

use super::*;

macro_rules! case {
    ($name:literal, $size:ident, $level:literal, $change:expr) => {
        Case {
            name: concat!("ept.misconfiguration.", $name),
            run: |ctx| misconfigured(ctx, Size::$size, $level, $change),
        }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("write_only.pml4e", K4, 4, |entry, _| entry & !7 | 2),
    case!("write_only.pdpte", K4, 3, |entry, _| entry & !7 | 2),
    case!("write_only.pde", K4, 2, |entry, _| entry & !7 | 2),
    case!("write_only.pte", K4, 1, |entry, _| entry & !7 | 2),
    case!("write_only.2m", M2, 2, |entry, _| entry & !7 | 2),
    case!("write_execute.pml4e", K4, 4, |entry, _| entry & !7 | 6),
    case!("write_execute.pdpte", K4, 3, |entry, _| entry & !7 | 6),
    case!("write_execute.pde", K4, 2, |entry, _| entry & !7 | 6),
    case!("write_execute.pte", K4, 1, |entry, _| entry & !7 | 6),
    case!("write_execute.2m", M2, 2, |entry, _| entry & !7 | 6),
    case!("beyond_width.pml4e", K4, 4, |entry, width| entry | 1 << width),
    case!("beyond_width.pdpte", K4, 3, |entry, width| entry | 1 << width),
    case!("beyond_width.pde", K4, 2, |entry, width| entry | 1 << width),
    case!("beyond_width.pte", K4, 1, |entry, width| entry | 1 << width),
    case!("beyond_width.2m", M2, 2, |entry, width| entry | 1 << width),
    case!("bit_51.pte", K4, 1, |entry, _| entry | 1 << 51),
    case!("reserved.pml4e.bit_3", K4, 4, |entry, _| entry | 1 << 3),
    case!("reserved.pml4e.bit_7", K4, 4, |entry, _| entry | 1 << 7),
    case!("reserved.pdpte.bit_3", K4, 3, |entry, _| entry | 1 << 3),
    case!("reserved.pdpte.bit_6", K4, 3, |entry, _| entry | 1 << 6),
    case!("reserved.pde.bit_3", K4, 2, |entry, _| entry | 1 << 3),
    case!("reserved.pde.bit_6", K4, 2, |entry, _| entry | 1 << 6),
    case!("address.2m.bit_12", M2, 2, |entry, _| entry | 1 << 12),
    case!("address.2m.bit_20", M2, 2, |entry, _| entry | 1 << 20),
    case!("memory_type_2.pte", K4, 1, |entry, _| memory_type(entry, 2)),
    case!("memory_type_3.pte", K4, 1, |entry, _| memory_type(entry, 3)),
    case!("memory_type_7.pte", K4, 1, |entry, _| memory_type(entry, 7)),
    case!("memory_type_2.2m", M2, 2, |entry, _| memory_type(entry, 2)),
    case!("memory_type_7.2m", M2, 2, |entry, _| memory_type(entry, 7)),
    Case { name: "ept.misconfiguration.execute_only", run: execute_only },
    Case { name: "ept.memory_types.valid", run: valid_types },
    Case { name: "ept.ignored_bits", run: ignored_bits },
];

fn memory_type(entry: u64, kind: u64) -> u64 {
    entry & !(7 << 3) | kind << 3
}

/// The change of the entry of `level` must give an EPT misconfiguration for every access, and
/// taken back must allow them. `change` gets the physical-address width, too.
fn misconfigured(ctx: &mut Ctx<'_>, size: Size, level: u8, change: fn(u64, u8) -> u64) -> Verdict {
    let mut stage = Stage::new(ctx, size)?;
    let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(TARGET), level);
    // An entry of the first level above code that L2 runs would stop L2 before its access.
    let target = if level == 4 { None } else { Some(TARGET) };
    let good = slot.get();
    slot.set(change(good, stage.vmx.caps.width));
    for access in [Access::Read, Access::Write, Access::Fetch] {
        let Err(exit) = stage.access(access)? else {
            crate::fail!("{access:?} went through the entry {:#x}", slot.get());
        };
        ensure_eq!(exit.reason, ExitReason::EPT_MISCONFIGURATION, "exit reason of {access:?}");
        if let Some(target) = target {
            let address = if access == Access::Fetch { CODE } else { target };
            ensure_eq!(exit.gpa & !0xFFF, address & !0xFFF, "guest-physical address");
        }
    }
    slot.set(good);
    crate::vmx::invept_single(stage.vm.ept.eptp(false))?;
    for access in [Access::Read, Access::Write, Access::Fetch] {
        stage.allowed(access)?;
    }
    Ok(())
}

/// Execute-only is reserved where it is not offered, and only there.
fn execute_only(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    stage.leaf.set(stage.leaf.get() & !7 | 4);
    if stage.vmx.caps.ept.contains(EptVpidCap::EXECUTE_ONLY) {
        stage.allowed(Access::Fetch)?;
        return stage.denied(Access::Read, 4);
    }
    let exit = stage.access(Access::Fetch)?.err();
    let reason = exit.map(|exit| exit.reason);
    ensure_eq!(reason, Some(ExitReason::EPT_MISCONFIGURATION), "exit reason");
    Ok(())
}

fn valid_types(ctx: &mut Ctx<'_>) -> Verdict {
    for kind in [0, 1, 4, 5, 6] {
        let mut stage = Stage::new(ctx, Size::K4)?;
        stage.leaf.set(memory_type(stage.leaf.get(), kind));
        for access in [Access::Read, Access::Write, Access::Fetch] {
            stage.allowed(access)?;
        }
        crate::vmx::leave();
    }
    Ok(())
}

/// Bits that are ignored may be set: 11 and 61:52 (62:52 where no feature uses them), and bits 9:8
/// without accessed and dirty flags.
fn ignored_bits(ctx: &mut Ctx<'_>) -> Verdict {
    const IGNORED: u64 = 1 << 11 | 0xFF << 52 | 3 << 8;
    let mut stage = Stage::new(ctx, Size::K4)?;
    for level in 1..=4 {
        let slot = stage.vm.ept.slot(ctx.arena, L2Gpa::new(TARGET), level);
        slot.set(slot.get() | IGNORED);
    }
    for access in [Access::Read, Access::Write, Access::Fetch] {
        stage.allowed(access)?;
    }
    Ok(())
}
