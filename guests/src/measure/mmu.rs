//! Answers: how many instructions a page does nested paging cost, and what does a view take?
//!
//! Each figure is the whole of what L1 sees: VM entry, everything that happens while L2 touches the
//! 512 pages of one EPT page table in turn, and the exit, over 512.

use core::fmt;

use vmx_defs::{ExitReason, Field, L2Gpa, msr::EptVpidCap};

use super::{switch_and_load, with_views};
use crate::{
    ensure, ensure_eq, l2_code,
    memory::{PAGE, Page},
    println, skip,
    suite::{Ctx, Stop, Verdict},
    vmx::{
        Ept, Mode, Op, Vm, Vmx,
        ept::{ACCESSED, DIRTY, LEAF},
        exit_reason, l0_total,
        paging::WINDOW,
        vm::instructions,
        vmcs,
    },
};

l2_code! {
    /// RBP += the first word of each page from RBX + RDI + 3 pages down to RBX, four in a turn, so
    /// that the loop itself counts little.
    read_pages:
        "2: add rbp, [rbx + rdi + 0x3000]",
        "add rbp, [rbx + rdi + 0x2000]",
        "add rbp, [rbx + rdi + 0x1000]",
        "add rbp, [rbx + rdi]",
        "sub rdi, 0x4000",
        "jns 2b";
    /// The first word of each page from RBX + RDI down to RBX becomes its distance from RBX, plus 1.
    write_pages: "2: lea rax, [rdi + 1]", "mov [rbx + rdi], rax", "sub rdi, 0x1000", "jns 2b";
}

/// Pages that one EPT page table maps.
const PAGES: usize = 512;

/// INVEPTs of one measurement.
const ROUNDS: usize = 8;

/// Views whose tables are counted.
const VIEWS: usize = 512;

/// Sub-leaves of nvmx's totals: fills and entries composed; roots built and given up; tables and
/// roots in use.
const FILLS: u32 = 6;
const ROOTS: u32 = 7;
const USAGE: u32 = 8;

/// Instructions a page, to a tenth.
struct APage {
    total: u64,
    times: usize,
}

impl fmt::Display for APage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = super::mean(10 * self.total, (self.times * PAGES) as u64);
        write!(out, "{}.{}", tenths / 10, tenths % 10)
    }
}

/// L2 and the pages it is given, through an EPT that changes from one measurement to the next.
struct Stage {
    vm: Vm,
    /// Addresses of the pages, which are neither in order nor where L2 sees them. Above the first
    /// 2 MiB, whose memory types differ by 4-KiB page, as RAM for guests is.
    data: Page,
}

/// An EPT of which L2 has not used anything yet.
struct Fresh {
    eptp: u64,
    /// The page table.
    leaf: Page,
}

impl Stage {
    fn new(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Result<Self, Stop> {
        let mut vm = Vm::new(ctx, vmx, Mode::Long)?;
        let (data, block) = (ctx.arena.page(), ctx.arena.block_2m());
        for index in 0..PAGES {
            data.write(index * 205 % PAGES, block.address() + index as u64 * PAGE);
        }
        // The VMCS is launched and L0 knows L2's controls; the pages have not been touched.
        vm.exec(Op::Nothing)?;
        Ok(Self { vm, data })
    }

    fn page(&self, index: usize) -> Page {
        Page::at(self.data.read(index))
    }

    /// Makes a new EPT the current one: new tables on the way to the pages, those for the first
    /// GiB, where L2's code is, shared with all others.
    fn fresh(&mut self, ctx: &mut Ctx<'_>, ad: bool) -> Fresh {
        let ept: Ept = self.vm.ept.fork(ctx.arena);
        let leaf = ept.slot(ctx.arena, L2Gpa::new(WINDOW), 1).table;
        for index in 0..PAGES {
            leaf.write(index, self.data.read(index) | LEAF);
        }
        let eptp = ept.eptp(ad);
        vmcs::write(Field::EPT_POINTER, eptp);
        Fresh { eptp, leaf }
    }

    /// What `before` and L2's run of the code at `start` cost together; the code touches `step` pages
    /// a turn.
    fn cost(
        &mut self,
        start: u64,
        step: usize,
        before: impl FnOnce() -> Verdict,
    ) -> Result<u64, Stop> {
        self.vm.registers.rbx = WINDOW;
        self.vm.registers.rbp = 0;
        self.vm.registers.rdi = (PAGES - step) as u64 * PAGE;
        vmcs::write(Field::GUEST_RIP, start);
        let started = instructions();
        before()?;
        let entered = self.vm.enter();
        let cost = instructions() - started;
        ensure_eq!(entered, 0, "VM entry");
        ensure_eq!(exit_reason(), ExitReason::VMCALL, "exit reason");
        Ok(cost)
    }

    /// The cost of reading every page, after `before`; what L2 read is checked.
    fn read(&mut self, before: impl FnOnce() -> Verdict) -> Result<u64, Stop> {
        for index in 0..PAGES {
            self.page(index).write(0, 0x1_0000 + index as u64);
        }
        let cost = self.cost(read_pages(), 4, before)?;
        let sum: u64 = (0..PAGES as u64).map(|index| 0x1_0000 + index).sum();
        ensure_eq!(self.vm.registers.rbp, sum, "sum of what L2 read");
        Ok(cost)
    }

    /// The cost of writing every page; what is in them afterwards is checked.
    fn write(&mut self) -> Result<u64, Stop> {
        let cost = self.cost(write_pages(), 1, || Ok(()))?;
        for index in 0..PAGES {
            let written = index as u64 * PAGE + 1;
            ensure_eq!(self.page(index).read(0), written, "what L2 wrote to page {index}");
        }
        Ok(cost)
    }
}

impl Fresh {
    /// Fails unless every leaf has these of the accessed and dirty flags.
    fn check_flags(&self, flags: u64) -> Verdict {
        for index in 0..PAGES {
            let found = self.leaf.read(index) & (ACCESSED | DIRTY);
            ensure_eq!(found, flags, "flags of leaf {index}");
        }
        Ok(())
    }
}

fn invept(kind: u64, eptp: u64) -> Verdict {
    // SAFETY: drops cached translations only.
    ensure_eq!(unsafe { vmx_hw::invept(kind, [eptp, 0]) }, Ok(()), "INVEPT");
    Ok(())
}

/// Prints every figure.
pub fn run(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Verdict {
    let needed = EptVpidCap::ACCESSED_DIRTY | EptVpidCap::INVEPT | EptVpidCap::INVEPT_SINGLE;
    if !vmx.caps.ept.contains(needed) {
        skip!("no accessed and dirty flags, or no single-context INVEPT");
    }
    let mut stage = Stage::new(ctx, vmx)?;
    let mut seen = l0_total(FILLS);
    let mut print = |name: &str, total, times| {
        println!("bench: {name} {}", APage { total, times });
        if let (Some(before), Some(now)) = (seen, l0_total(FILLS)) {
            let (fills, entries) = (now.0 - before.0, now.1 - before.1);
            println!("mmu: {name}: {fills} EPT violations, {entries} entries composed");
        }
        seen = l0_total(FILLS);
    };

    let read = stage.fresh(ctx, false);
    print("first_read_4k", stage.read(|| Ok(()))?, 1);
    print("write_after_read_4k", stage.write()?, 1);
    read.check_flags(0)?;
    stage.fresh(ctx, false);
    print("first_write_4k", stage.write()?, 1);
    let flagged = stage.fresh(ctx, true);
    print("first_read_4k_ad", stage.read(|| Ok(()))?, 1);
    flagged.check_flags(ACCESSED)?;
    let flagged = stage.fresh(ctx, true);
    print("first_write_4k_ad", stage.write()?, 1);
    flagged.check_flags(ACCESSED | DIRTY)?;

    let mapped = stage.fresh(ctx, false);
    stage.read(|| Ok(()))?;
    print("reread_after_invept", reread(&mut stage, &mapped, None)?, ROUNDS);
    let spare = ctx.arena.page();
    print("reread_after_one_change", reread(&mut stage, &mapped, Some(spare))?, ROUNDS);

    if let Some(pages) = shadow_pages(ctx, vmx)? {
        // Rounded up: no view may look smaller than it is.
        let hundredths = (100 * pages).div_ceil(VIEWS as u64);
        let (whole, part) = (hundredths / 100, hundredths % 100);
        println!("bench: shadow_pages_per_view {whole}.{part:02}");
    }
    Ok(())
}

/// INVEPT of the EPT, then reading all its pages: the cost of all rounds. With `spare`, one entry is
/// made to map another page before each; nvmx may compose that entry again, and none besides.
fn reread(stage: &mut Stage, mapped: &Fresh, mut spare: Option<Page>) -> Result<u64, Stop> {
    const SINGLE: u64 = 1;
    let mut cost = 0;
    for round in 0..ROUNDS {
        if let Some(page) = &mut spare {
            let index = (round * 131 + 7) % PAGES;
            let old = stage.page(index);
            mapped.leaf.write(index, page.address() | LEAF);
            stage.data.write(index, page.address());
            *page = old;
        }
        let before = l0_total(FILLS);
        cost += stage.read(|| invept(SINGLE, mapped.eptp))?;
        if let (Some(before), Some(after)) = (before, l0_total(FILLS)) {
            let (fills, entries) = (after.0 - before.0, after.1 - before.1);
            let changes = u64::from(spare.is_some());
            ensure!(fills <= changes, "{fills} EPT violations after {changes} changes");
            ensure_eq!(entries, changes, "entries composed");
        }
    }
    Ok(cost)
}

/// How many pages nvmx needs for the tables of 512 views that share all but the path to one page, or
/// `None` on another L0 or none.
fn shadow_pages(ctx: &mut Ctx<'_>, vmx: &Vmx) -> Result<Option<u64>, Stop> {
    let (mut vm, views) = with_views(ctx, vmx, VIEWS)?;
    let (Some(before), Some(roots)) = (l0_total(USAGE), l0_total(ROOTS)) else { return Ok(None) };
    switch_and_load(&mut vm, &views, VIEWS as u64)?;
    let (Some(after), Some(roots_after)) = (l0_total(USAGE), l0_total(ROOTS)) else {
        return Ok(None);
    };
    ensure_eq!(roots_after.0 - roots.0, VIEWS as u64, "roots built");
    ensure_eq!(roots_after.1, roots.1, "roots given up");
    Ok(Some(after.0 - before.0))
}
