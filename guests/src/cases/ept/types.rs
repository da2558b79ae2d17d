//! Answers: does L2's memory stay what it is when L1 gives ranges of its own memory other types?
//!
//! SDM Vol. 3A, "Memory Type Range Registers (MTRRs)"; Vol. 3C, "EPT and Memory Typing". With EPT the
//! MTRRs have no say in L2's types, but an L0 follows them in tables of its own, below L1's large
//! pages.

use core::arch::x86_64::__cpuid;

use vmx_defs::{Field, ProcCtls2};

use super::*;
use crate::{
    ensure,
    memory::PAGE_2M,
    vmx::{
        ept::{ACCESSED, DIRTY},
        paging::USER_RW,
        rdmsr,
        views::Views,
        vmcs, wrmsr,
    },
};

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.types.mtrr.2m", run: |ctx| under_large(ctx, 2, false) },
    Case { name: "ept.types.mtrr.2m.accessed_dirty", run: |ctx| under_large(ctx, 2, true) },
    Case { name: "ept.types.mtrr.1g", run: |ctx| under_large(ctx, 3, false) },
    Case { name: "ept.types.mtrr.1g.accessed_dirty", run: |ctx| under_large(ctx, 3, true) },
    Case { name: "ept.types.mtrr.no_ept", run: without_ept },
    Case { name: "ept.types.mtrr.views", run: under_views },
    Case { name: "ept.types.large", run: large },
];

const VALID: u64 = 1 << 11;
const WRITE_THROUGH: u64 = 4;

/// A variable range of the MTRRs that was free.
#[derive(Clone, Copy)]
pub struct Range {
    base: u32,
    before: (u64, u64),
}

impl Range {
    /// Finds one, or skips the case.
    pub fn free() -> Result<Self, Stop> {
        const CAPABILITIES: u32 = 0xFE;
        const FIRST: u32 = 0x200;
        if __cpuid(1).edx & 1 << 12 == 0 {
            skip!("no MTRRs");
        }
        let count = rdmsr(CAPABILITIES) as u32 & 0xFF;
        let bases = (0..count).map(|number| FIRST + 2 * number);
        match bases.into_iter().find(|base| rdmsr(base + 1) & VALID == 0) {
            Some(base) => Ok(Self { base, before: (rdmsr(base), rdmsr(base + 1)) }),
            None => skip!("no free variable range"),
        }
    }

    /// Makes `size` bytes from `address` on write-through. Both are powers of two or multiples.
    pub fn set(self, address: u64, size: u64) {
        let all = (1_u64 << (__cpuid(0x8000_0008).eax & 0xFF)) - 1;
        // SAFETY: the type of memory does not change what it holds. Caches stay coherent between
        // write-back and write-through.
        unsafe {
            wrmsr(self.base, address | WRITE_THROUGH);
            wrmsr(self.base + 1, all & !(size - 1) | VALID);
        }
    }

    /// As it was.
    pub fn clear(self) {
        // SAFETY: as above.
        unsafe {
            wrmsr(self.base + 1, self.before.1);
            wrmsr(self.base, self.before.0);
        }
    }
}

/// A large page, small parts of which change their types.
fn under_large(ctx: &mut Ctx<'_>, level: u8, ad: bool) -> Verdict {
    const GIB: u64 = 2 << 30;
    let range = Range::free()?;
    let mut stage = Stage::new(ctx, Size::K4)?;
    let need = if level == 2 { EptVpidCap::PAGE_2M } else { EptVpidCap::PAGE_1G };
    if !stage.vmx.caps.ept.contains(need)
        || ad && !stage.vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY)
    {
        skip!("no pages of this size in EPT, or no flags");
    }
    let block = ctx.arena.block_2m();
    let base = if level == 2 { block.address() } else { 0 };
    stage.leaf = stage.vm.ept.map(ctx.arena, L2Gpa::new(GIB), level, base | LEAF | LARGE);
    let eptp = stage.vm.ept.eptp(ad);
    vmcs::write(Field::EPT_POINTER, eptp);
    for page in 0..512 {
        let gpa = GIB + (block.address() - base) + page as u64 * 0x1000;
        stage.vm.paging.window.write(page, gpa | USER_RW);
    }
    let page = |number: u64| Page::at(block.address() + number * 0x1000);
    for (round, (first, pages)) in
        [(8, 1), (0, 512), (511, 1), (16, 16), (0, 0), (256, 256), (8, 8)].into_iter().enumerate()
    {
        // The range changes while L2 has all of the page mapped.
        if pages == 0 {
            range.clear();
        } else {
            range.set(page(first).address(), pages * 0x1000);
        }
        for number in [0, 7, 8, 9, 15, 16, 31, 255, 256, 510, 511] {
            let at = WINDOW + number * 0x1000;
            let value = (round as u64) << 32 | number;
            page(number).write(4, value);
            ensure_eq!(stage.vm.load(at + 32)?, value, "what L2 reads in page {number}");
            stage.vm.store(at + 40, value)?;
            ensure_eq!(page(number).read(5), value, "what L2 wrote to page {number}");
        }
        let found = stage.leaf.get() & (ACCESSED | DIRTY);
        ensure_eq!(found, if ad { ACCESSED | DIRTY } else { 0 }, "flags in round {round}");
        // Read-only for once.
        stage.leaf.set(stage.leaf.get() & !2);
        crate::vmx::invept_single(eptp)?;
        for number in [0, 8, 511] {
            let outcome = stage.vm.store(WINDOW + number * 0x1000, 0);
            ensure!(outcome.is_err(), "L2 wrote to page {number} in round {round}");
        }
        stage.leaf.set(stage.leaf.get() | 2);
    }
    range.clear();
    Ok(())
}

/// L2 without EPT.
fn without_ept(ctx: &mut Ctx<'_>) -> Verdict {
    let range = Range::free()?;
    let mut stage = Stage::new(ctx, Size::K4)?;
    if !stage.vmx.caps.basic.true_controls() {
        skip!("CR3-load exiting can't be off");
    }
    vmcs::change(Field::PROC_CTLS2, 0, ProcCtls2::EPT.bits().into());
    let block = ctx.arena.block_2m();
    for page in 0..512 {
        let address = block.address() + page as u64 * 0x1000;
        stage.vm.paging.window.write(page, address | USER_RW);
    }
    for round in 0..6_u64 {
        match round % 3 {
            0 => range.set(block.address() + round * 0x1000, 0x1000),
            1 => range.set(block.address(), PAGE_2M),
            _ => range.clear(),
        }
        for number in [0, 1, 3, 200, 511] {
            let page = Page::at(block.address() + number * 0x1000);
            page.write(0, round << 16 | number);
            let read = stage.vm.load(WINDOW + number * 0x1000)?;
            ensure_eq!(read, round << 16 | number, "what L2 reads in page {number}");
        }
    }
    range.clear();
    Ok(())
}

/// Views of which L2 has used all, and goes on to.
fn under_views(ctx: &mut Ctx<'_>) -> Verdict {
    const VIEWS: usize = 64;
    let range = Range::free()?;
    let mut stage = Stage::new(ctx, Size::K4)?;
    let views = Views::new(ctx, &stage.vm.ept, VIEWS, |view| view % 2 == 1);
    if !stage.vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
        skip!("no accessed and dirty flags for EPT");
    }
    vmcs::write(Field::EPT_POINTER, views.eptp(0));
    stage.vm.enable_eptp_switching(&stage.vmx, views.list)?;
    for round in 0..4 {
        for view in 0..VIEWS {
            stage.vm.vmfunc(0, view as u64)?;
            ensure_eq!(stage.vm.load(WINDOW)?, Views::value(view), "what L2 reads in view {view}");
            if view % 16 == 5 {
                // A page of this view, or of one that comes, or of none.
                let page = views.data((view + round) % VIEWS);
                range.set(page.address(), 0x1000);
            }
        }
        range.clear();
    }
    Ok(())
}

/// Every type of a large page, and the bit that ignores the PAT.
fn large(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::M2)?;
    for kind in [0, 1, 4, 5, 6] {
        for ignore_pat in [0, 1 << 6] {
            stage.leaf.set(stage.leaf.get() & !0x78 | kind << 3 | ignore_pat);
            crate::vmx::invept_single(stage.vm.ept.eptp(false))?;
            for access in ACCESSES {
                stage.allowed(access)?;
            }
        }
    }
    Ok(())
}
