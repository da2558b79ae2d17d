//! Answers: what does a switch do to cached translations of linear addresses, and to PDPTEs?

use core::arch::x86_64::__cpuid;

use super::*;
use crate::{
    ensure,
    vmx::{Op, paging::USER_RW, vm::PDPTES},
};

/// Entry of the window's page table that maps its first page to the second page's address.
const TO_OTHER: u64 = OTHER_ADDRESS | USER_RW;
const TO_OWN: u64 = WINDOW | USER_RW;

/// L2 reads the window's first page, maps it elsewhere without INVLPG, switches to `view` and reads
/// it again, all without an exit. Returns both values.
fn edit_and_switch(stage: &mut Stage, entry: u64, view: usize) -> Result<(u64, u64), Outcome> {
    let registers = &mut stage.vm.registers;
    registers.rax = 0;
    registers.rcx = view as u64;
    registers.rbx = WINDOW;
    registers.rsi = stage.vm.paging.window.address();
    registers.rdi = entry;
    stage.vm.exec(Op::EditVmfuncLoad)?;
    let registers = &stage.vm.registers;
    Ok(match stage.vm.paging.mode {
        Mode::Long => (registers.rdx, registers.r8[0]),
        Mode::Pae => (registers.rdx & 0xFFFF_FFFF, registers.rbp & 0xFFFF_FFFF),
    })
}

/// S4: with VPID disabled a switch, also to the EPTP in use, drops combined mappings; with VPID
/// enabled it may keep them, and INVLPG drops them.
pub(super) fn invalidates(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    let mut current = 0;
    for view in stage.sample() {
        // To the same EPTP, then to the next one.
        for target in [current, view] {
            let (before, after) = edit_and_switch(&mut stage, TO_OTHER, target)?;
            ensure_eq!(before, Views::value(current), "first read, before view {target}");
            if setting.vpid {
                let own = Views::value(target);
                let stale = Views::value(current);
                ensure!(
                    [OTHER, own, stale].contains(&after),
                    "read {after:#x} in view {target}, which was never there"
                );
            } else {
                ensure_eq!(after, OTHER, "second read, in view {target}");
            }
            stage.vm.registers.rbx = WINDOW;
            stage.vm.exec(Op::Invlpg)?;
            ensure_eq!(stage.vm.load(WINDOW)?, OTHER, "read after INVLPG, view {target}");
            stage.vm.paging.window.write(0, TO_OWN);
            stage.vm.registers.rbx = WINDOW;
            stage.vm.exec(Op::Invlpg)?;
            stage.expect_view(target)?;
            current = target;
        }
    }
    // Back to a view whose mappings were cached before: all EP4TAs are concerned.
    if !setting.vpid {
        stage.switch(0)?;
        stage.expect_view(0)?;
        let (_, after) = edit_and_switch(&mut stage, TO_OTHER, setting.views - 1)?;
        ensure_eq!(after, OTHER, "read in the other view");
        stage.switch(0)?;
        ensure_eq!(stage.vm.load(WINDOW)?, OTHER, "read in the view that cached the old entry");
    }
    ensure_eq!(stage.other.read(0), OTHER, "the second page");
    Ok(())
}

const PLAIN: Setting = Setting { vpid: false, ad: false, mode: Mode::Long, views: 2 };

/// S4: for all PCIDs, not only the current one.
pub(super) fn invalidates_all_pcids(ctx: &mut Ctx<'_>) -> Verdict {
    const PCIDE: u64 = 1 << 17;
    const KEEP: u64 = 1 << 63;
    if __cpuid(1).ecx & 1 << 17 == 0 {
        skip!("no PCIDs");
    }
    let mut stage = Stage::new(ctx, PLAIN)?;
    if !stage.vmx.caps.basic.true_controls() {
        skip!("CR3-load exiting can't be off");
    }
    let cr3 = stage.vm.paging.cr3;
    vmcs::change(Field::GUEST_CR4, PCIDE, 0);
    stage.vm.load_cr3(cr3 | 1)?;
    stage.expect_view(0)?;
    stage.vm.load_cr3(cr3 | 2 | KEEP)?;
    let (before, after) = edit_and_switch(&mut stage, TO_OTHER, 0)?;
    ensure_eq!(before, Views::value(0), "read with PCID 2 before the switch");
    ensure_eq!(after, OTHER, "read with PCID 2 after the switch");
    stage.vm.load_cr3(cr3 | 1 | KEEP)?;
    ensure_eq!(stage.vm.load(WINDOW)?, OTHER, "read with PCID 1 after the switch");
    Ok(())
}

/// S4: global pages too.
pub(super) fn invalidates_globals(ctx: &mut Ctx<'_>) -> Verdict {
    const PGE: u64 = 1 << 7;
    const GLOBAL: u64 = 1 << 8;
    let mut stage = Stage::new(ctx, PLAIN)?;
    vmcs::change(Field::GUEST_CR4, PGE, 0);
    stage.vm.paging.window.write(0, TO_OWN | GLOBAL);
    for target in [0, 1] {
        stage.vm.paging.window.write(0, TO_OWN | GLOBAL);
        let (before, after) = edit_and_switch(&mut stage, TO_OTHER | GLOBAL, target)?;
        ensure_eq!(before, Views::value(0), "read before the switch to {target}");
        ensure_eq!(after, OTHER, "read after the switch to {target}");
    }
    Ok(())
}

/// Where the page-directory-pointer table lies when views differ in it: page 8 of the window.
const PDPT: u64 = WINDOW + 0x8000;

/// Gives each view its own page-directory-pointer table at [`PDPT`]: in odd views the window's
/// first page is the second one. L2 runs with that of view 0.
fn split_pdpt(ctx: &mut Ctx<'_>, stage: &mut Stage) -> (Page, [u64; 2]) {
    let paging = stage.vm.paging;
    let (directory, window) = (ctx.arena.page(), ctx.arena.page());
    for index in 0..512 {
        window.write(index, paging.window.read(index));
    }
    window.write(0, TO_OTHER);
    directory.write(0, window.address() | USER_RW);
    let entries = [paging.window_directory.address() | 1, directory.address() | 1];
    let tables = entries.map(|entry| {
        let table = ctx.arena.page();
        table.write(0, paging.root.read(0));
        table.write(1, entry);
        table
    });
    for view in 0..stage.views.count {
        stage.views.leaf(view).table.write(8, tables[view % 2].address() | LEAF);
    }
    vmcs::write(Field::GUEST_CR3, PDPT);
    vmcs::write(Field::GUEST_PDPTE1, entries[0]);
    (tables[0], entries)
}

/// S5: PDPTEs stay through switches until MOV to CR3 loads them through the current view.
pub(super) fn keeps_pdptes(ctx: &mut Ctx<'_>, setting: Setting) -> Verdict {
    let mut stage = Stage::new(ctx, setting)?;
    if !stage.vmx.caps.basic.true_controls() {
        skip!("CR3-load exiting can't be off");
    }
    let (_, entries) = split_pdpt(ctx, &mut stage);
    let low = stage.vm.paging.root.read(0);
    let mut loaded = 0;
    stage.expect_view(0)?;
    for view in stage.sample() {
        stage.vm.registers.rax = 0;
        stage.vm.registers.rcx = view as u64;
        stage.vm.registers.rbx = WINDOW;
        stage.vm.exec(Op::VmfuncLoad)?;
        let read = stage.vm.registers.rdx & 0xFFFF_FFFF;
        let expected = if loaded == 0 { Views::value(view) } else { OTHER };
        ensure_eq!(read, expected, "read in view {view} with the PDPTEs of before");
        for (field, expected) in PDPTES.into_iter().zip([low, entries[loaded], 0, 0]) {
            ensure_eq!(vmcs::read(field), expected, "{field:?} in view {view}");
        }
        ensure_eq!(vmcs::read(Field::GUEST_CR3), PDPT, "guest CR3");
        if view % 3 == 1 || view == stage.views.count - 1 {
            stage.vm.load_cr3(PDPT)?;
            loaded = view % 2;
            let expected = if loaded == 0 { Views::value(view) } else { OTHER };
            ensure_eq!(stage.vm.load(WINDOW)?, expected, "read in view {view}, CR3 loaded");
            ensure_eq!(vmcs::read(Field::GUEST_PDPTE1), entries[loaded], "PDPTE1, CR3 loaded");
        }
    }
    Ok(())
}

/// S5: the address in CR3 is not translated by the switch, only by what loads the PDPTEs.
pub(super) fn pdpt_not_translated(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Setting { mode: Mode::Pae, ..PLAIN })?;
    if !stage.vmx.caps.basic.true_controls() {
        skip!("CR3-load exiting can't be off");
    }
    split_pdpt(ctx, &mut stage);
    stage.views.leaf(1).table.write(8, 0);
    stage.switch(1)?;
    stage.expect_view(1)?;
    let exit = exit_of(stage.vm.load_cr3(PDPT))?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason of MOV to CR3");
    ensure_eq!(exit.gpa, PDPT, "guest-physical address");
    // Neither translated nor a linear address: bit 7 is clear for the loading of PDPTEs by MOV CR.
    ensure_eq!(exit.qualification & 0x1FF, 1, "qualification");
    stage.switch(0)?;
    stage.vm.load_cr3(PDPT)?;
    stage.expect_view(0)
}
