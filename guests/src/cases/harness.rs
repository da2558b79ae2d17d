//! Answers: does the harness itself work, before it judges anything else?

use core::arch::asm;

use crate::{
    ensure_eq,
    suite::{Case, Ctx, Verdict},
    traps::catch,
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "harness.catch.ud", run: catch_ud },
    Case { name: "harness.catch.gp", run: catch_gp },
    Case { name: "harness.catch.pf", run: catch_pf },
    Case { name: "harness.pages.zeroed", run: pages_zeroed },
];

fn catch_ud(_: &mut Ctx<'_>) -> Verdict {
    // SAFETY: the fault is caught.
    let fault = catch(|| unsafe { asm!("ud2", options(nostack)) }).err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(6), "vector of UD2");
    Ok(())
}

fn catch_gp(_: &mut Ctx<'_>) -> Verdict {
    // SAFETY: the fault is caught.
    let fault = catch(|| unsafe {
        asm!("mov {0}, [{1}]", out(reg) _, in(reg) 0x8000_0000_0000_0000_u64, options(nostack));
    })
    .err();
    ensure_eq!(fault.map(|f| (f.vector, f.error_code)), Some((13, 0)), "non-canonical read");
    Ok(())
}

fn catch_pf(_: &mut Ctx<'_>) -> Verdict {
    let address = 0x70_0000_0000_u64;
    // SAFETY: the fault is caught.
    let fault = catch(|| unsafe {
        asm!("mov [{0}], {0}", in(reg) address, options(nostack));
    })
    .err();
    ensure_eq!(
        fault.map(|f| (f.vector, f.error_code, f.cr2)),
        Some((14, 2, address)),
        "write to an unmapped page"
    );
    Ok(())
}

fn pages_zeroed(ctx: &mut Ctx<'_>) -> Verdict {
    let page = ctx.arena.page();
    let clean = (0..512).all(|index| page.read(index) == 0);
    page.fill(!0);
    ensure_eq!(clean, true, "a new page is zero");
    Ok(())
}
