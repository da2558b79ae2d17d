//! Answers: what does L2 see through an EPT whose tables lead back to themselves?
//!
//! Nothing in the architecture forbids it: each level takes the table it is given as its own (SDM
//! Vol. 3C, "EPT Translation Mechanism"). A table that is its own child maps itself at the end.

use vmx_defs::{ExitReason, L2Gpa, msr::EptVpidCap};

use crate::{
    ensure, ensure_eq,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        self, Mode, Vm, Vmx,
        ept::{ACCESSED, DIRTY, LEAF, Slot, TABLE},
        paging::{USER_RW, WINDOW},
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "hostile.loop.pml4", run: pml4 },
    Case { name: "hostile.loop.pml4.other_ways", run: pml4_other_ways },
    Case { name: "hostile.loop.pdpt", run: |ctx| own_child(ctx, 3) },
    Case { name: "hostile.loop.page_directory", run: |ctx| own_child(ctx, 2) },
    Case { name: "hostile.loop.page_table", run: |ctx| own_child(ctx, 1) },
    Case { name: "hostile.loop.to_the_root", run: to_the_root },
    Case { name: "hostile.loop.accessed_dirty", run: accessed_dirty },
    Case { name: "hostile.loop.l2_rewrites_ept", run: rewrites },
    Case { name: "hostile.loop.everything", run: everything },
];

fn l2(ctx: &mut Ctx<'_>) -> Result<(Vmx, Vm), Stop> {
    let vmx = Vmx::on(ctx)?;
    let vm = Vm::new(ctx, &vmx, Mode::Long)?;
    Ok((vmx, vm))
}

/// Makes page `number` of the window's linear addresses that guest-physical page.
fn show(vm: &Vm, number: usize, gpa: u64) -> u64 {
    vm.paging.window.write(number, gpa | USER_RW);
    WINDOW + number as u64 * 0x1000
}

/// The guest-physical address with these indexes, from the EPT PML4 table on.
fn gpa(indexes: [u64; 4]) -> u64 {
    indexes.into_iter().fold(0, |address, index| address << 9 | index) << 12
}

/// The EPT PML4 entry 1 leads to the EPT PML4 table.
fn with_loop(ctx: &mut Ctx<'_>) -> Result<(Vm, Page), Stop> {
    let (vmx, vm) = l2(ctx)?;
    if vmx.caps.width < 40 {
        skip!("physical addresses have fewer than 40 bits");
    }
    let root = vm.ept.root;
    root.write(1, root.address() | TABLE);
    Ok((vm, root))
}

fn pml4(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut vm, root) = with_loop(ctx)?;
    let at = show(&vm, 1, gpa([1, 1, 1, 1]));
    ensure_eq!(vm.load(at)?, root.read(0), "entry 0 as L2 reads it");
    ensure_eq!(vm.load(at + 8)?, root.address() | TABLE, "entry 1 as L2 reads it");
    // A change by L2 is one of L1's memory.
    vm.store(at + 0xFF8, 0x7700)?;
    ensure_eq!(root.read(511), 0x7700, "entry 511");
    // Other entries of the table are not present.
    let elsewhere = show(&vm, 2, gpa([1, 1, 1, 2]));
    vm.registers.rbx = elsewhere;
    let exit = match vm.load(elsewhere) {
        Err(outcome) => outcome.exit()?,
        Ok(value) => crate::fail!("L2 reads {value:#x} through an entry of 0"),
    };
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa, gpa([1, 1, 1, 2]), "guest-physical address");
    Ok(())
}

/// Through the loop once, twice or three times, and then down the other tables.
fn pml4_other_ways(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut vm, root) = with_loop(ctx)?;
    let table = |entry: u64| Page::at(entry & 0xF_FFFF_FFFF_F000);
    let page = ctx.arena.page();
    page.write(0, 0x600D);
    vm.map(ctx, L2Gpa::new(WINDOW), page);
    let pdpt = table(root.read(0));
    let directory = table(pdpt.read(1));
    let leaves = table(directory.read(0));
    // Three times: the page that entry 0 leads to, which is the page-directory-pointer table.
    let at = show(&vm, 1, gpa([1, 1, 1, 0]));
    ensure_eq!(vm.load(at + 8)?, pdpt.read(1), "the page-directory-pointer table");
    // Twice, then entry 1 of that: the window's page directory.
    let at = show(&vm, 2, gpa([1, 1, 0, 1]));
    ensure_eq!(vm.load(at)?, directory.read(0), "the page directory");
    // Once, then the page directory as a page table: the window's page table.
    let at = show(&vm, 3, gpa([1, 0, 1, 0]));
    ensure_eq!(vm.load(at)?, leaves.read(0), "the page table");
    // Not at all.
    ensure_eq!(vm.load(WINDOW)?, 0x600D, "the page");
    Ok(())
}

/// An entry of the table of `level` that leads to the table itself: with the same index from there
/// on, L2 sees the table.
fn own_child(ctx: &mut Ctx<'_>, level: u8) -> Verdict {
    const INDEX: u64 = 9;
    let (_, mut vm) = l2(ctx)?;
    // The page table of the window must be there for its own entry to be in it.
    let page = ctx.arena.page();
    vm.map(ctx, L2Gpa::new(WINDOW), page);
    let indexes = match level {
        3 => [0, INDEX, INDEX, INDEX],
        2 => [0, 1, INDEX, INDEX],
        _ => [0, 1, 0, INDEX],
    };
    let Slot { table, index } = vm.ept.slot(ctx.arena, L2Gpa::new(gpa(indexes)), level);
    let entry = table.address() | if level == 1 { LEAF } else { TABLE };
    table.write(index, entry);
    let at = show(&vm, 1, gpa(indexes));
    ensure_eq!(vm.load(at + INDEX * 8)?, entry, "the entry as L2 reads it");
    vm.store(at + 0xFF8, 0x7700)?;
    ensure_eq!(table.read(511), 0x7700, "entry 511");
    Ok(())
}

/// An entry of the lowest table leads to the root, as a page.
fn to_the_root(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let root = vm.ept.root;
    vm.map(ctx, L2Gpa::new(WINDOW), root);
    ensure_eq!(vm.load(WINDOW)?, root.read(0), "entry 0 as L2 reads it");
    Ok(())
}

fn accessed_dirty(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut vm, root) = with_loop(ctx)?;
    if !vmx::Caps::read().ept.contains(EptVpidCap::ACCESSED_DIRTY) {
        skip!("no accessed and dirty flags for EPT");
    }
    vmcs::write(vmx_defs::Field::EPT_POINTER, vm.ept.eptp(true));
    let at = show(&vm, 1, gpa([1, 1, 1, 1]));
    let expected = root.address() | TABLE | ACCESSED;
    ensure_eq!(vm.load(at + 8)?, expected, "entry 1 as L2 reads it");
    ensure_eq!(root.read(1), expected, "entry 1");
    vm.store(at + 0xFF8, 0)?;
    ensure_eq!(root.read(1), expected | DIRTY, "entry 1 after L2's write");
    Ok(())
}

/// L2 changes the entries that it runs on, and sees the change once L1 has executed INVEPT.
fn rewrites(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    for (number, page) in pages.into_iter().enumerate() {
        page.write(0, number as u64);
    }
    let Slot { table, .. } = vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    // The page table is the window's page 3.
    table.write(3, table.address() | LEAF);
    for round in 0..4_u64 {
        ensure_eq!(vm.load(WINDOW)?, round % 2, "what L2 reads");
        let next = pages[(round as usize + 1) % 2];
        vm.store(WINDOW + 0x3000, next.address() | LEAF)?;
        ensure_eq!(table.read(0), next.address() | LEAF, "the entry");
        vmx::invept_single(vm.ept.eptp(false))?;
    }
    // What was not present needs no INVEPT.
    vm.store(WINDOW + 0x3000 + 8, pages[1].address() | LEAF)?;
    ensure_eq!(vm.load(WINDOW + 0x1000)?, 1, "what L2 reads of the page it has mapped");
    Ok(())
}

/// A root whose every entry leads to itself: one page maps all of the address space to itself.
fn everything(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let good = vm.ept.eptp(false);
    let root = ctx.arena.page();
    root.fill(root.address() | LEAF & !0x38);
    vmcs::write(vmx_defs::Field::EPT_POINTER, root.address() | good & 0xFFF);
    // L2's page tables are the root now, too: every linear address is translated by it, and what
    // L2 fetches are its entries, the first byte being #UD in 64-bit mode. But L2's walk marks
    // them accessed by bit 5, which is reserved in entries that lead to an EPT table.
    let exit = match vm.exec(vmx::Op::Nothing) {
        Err(outcome) => outcome.exit()?,
        Ok(()) => crate::fail!("L2 executed its program"),
    };
    let marked = exit.reason == ExitReason::EPT_MISCONFIGURATION && root.read(0) & 1 << 5 != 0;
    ensure!(marked || exit.exception().is_some(), "exit for {:?}", exit.reason);
    vmcs::write(vmx_defs::Field::EPT_POINTER, good);
    vm.exec(vmx::Op::Nothing)?;
    Ok(())
}
