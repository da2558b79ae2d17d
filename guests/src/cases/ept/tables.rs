//! Answers: how are accesses reported that L2's paging structures need on each of their levels, and
//! those that lie in two pages?
//!
//! SDM Vol. 3C, "Exit Qualification for EPT Violations" and "Accessed and Dirty Flags for EPT".

use vmx_defs::Field;

use super::*;
use crate::{
    l2_code,
    vmx::{
        ept::{ACCESSED, DIRTY},
        invept_single,
        paging::USER_RW,
        vm::PDPTES,
        vmcs,
    },
};

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.walk.each_level.pdpt", run: |ctx| each_level(ctx, 1) },
    Case { name: "ept.walk.each_level.page_directory", run: |ctx| each_level(ctx, 2) },
    Case { name: "ept.walk.each_level.page_table", run: |ctx| each_level(ctx, 3) },
    Case { name: "ept.walk.each_level.pml4", run: pml4 },
    Case { name: "ept.walk.each_level.flags", run: flags },
    Case { name: "ept.walk.pae.page_directory", run: |ctx| pae(ctx, true) },
    Case { name: "ept.walk.pae.page_table", run: |ctx| pae(ctx, false) },
    Case { name: "ept.across.read", run: |ctx| across(ctx, Access::Read) },
    Case { name: "ept.across.write", run: |ctx| across(ctx, Access::Write) },
    Case { name: "ept.across.fetch", run: |ctx| across(ctx, Access::Fetch) },
    Case { name: "ept.across.locked", run: locked },
];

l2_code! {
    load: "mov rax, [rbx]";
    lock_add: "lock add [rbx], rax";
}

/// What L2 reads, at the end of its own tables.
const OWN: u64 = 1 << 39;

/// L2 whose tables for [`OWN`] are guest-physical pages of their own, from the PML4 table on.
struct Own {
    stage: Stage,
    tables: [Page; 4],
    /// The EPT entries that map them, and the page at last.
    slots: [Slot; 5],
}

/// Guest-physical address of the table number `number`, or of the page.
const fn gpa(number: usize) -> u64 {
    (4 + number as u64) << 30 | 0x5000
}

impl Own {
    fn new(ctx: &mut Ctx<'_>) -> Result<Self, Stop> {
        let stage = Stage::new(ctx, Size::K4)?;
        let tables = [(); 4].map(|()| ctx.arena.page());
        let pages = [tables[0], tables[1], tables[2], tables[3], stage.page];
        let mut slots = [stage.leaf; 5];
        for (number, page) in pages.into_iter().enumerate() {
            slots[number] = stage.vm.map(ctx, L2Gpa::new(gpa(number)), page);
        }
        for (number, table) in tables.into_iter().enumerate() {
            table.write(0, gpa(number + 1) | USER_RW);
        }
        // The first entry of the PML4 table leads to L2's code; the second one to these.
        tables[0].write(0, stage.vm.paging.root.read(0));
        tables[0].write(1, gpa(1) | USER_RW);
        vmcs::write(Field::GUEST_CR3, gpa(0));
        Ok(Self { stage, tables, slots })
    }

    fn load(&mut self) -> Result<u64, Outcome> {
        self.stage.vm.registers.rbx = OWN + 8;
        self.stage.vm.exec_at(load())?;
        Ok(self.stage.vm.registers.rax)
    }

    fn loads(&mut self) -> Verdict {
        ensure_eq!(self.load()?, VALUE, "what L2 reads");
        Ok(())
    }

    /// The walk must be stopped at table `number`; bits 2:0 of the qualification.
    fn stopped(&mut self, number: usize, permissions: u64) -> Result<u64, Stop> {
        let exit = match self.load() {
            Err(outcome) => outcome.exit()?,
            Ok(value) => crate::fail!("L2 reads {value:#x}"),
        };
        ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
        ensure_eq!((exit.gpa, exit.gla), (gpa(number), OWN + 8), "addresses");
        let expected = permissions << 3 | 1 << 7;
        ensure_eq!(exit.qualification & 0x1B8, expected, "qualification but for the access");
        Ok(exit.qualification & 7)
    }
}

fn with_flags(own: &Stage) -> Result<u64, Stop> {
    if !own.vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
        skip!("no accessed and dirty flags for EPT");
    }
    let eptp = own.vm.ept.eptp(true);
    vmcs::write(Field::EPT_POINTER, eptp);
    Ok(eptp)
}

/// A table of L2 that is absent, then read-only without and with flags.
fn each_level(ctx: &mut Ctx<'_>, number: usize) -> Verdict {
    let mut own = Own::new(ctx)?;
    let (slot, eptp) = (own.slots[number], own.stage.vm.ept.eptp(false));
    let full = slot.get();
    slot.set(0);
    ensure_eq!(own.stopped(number, 0)?, 1, "access");
    slot.set(full);
    own.loads()?;
    // All of L2's accessed flags are set: nothing is written.
    slot.set(full & !2);
    invept_single(eptp)?;
    own.loads()?;
    // With flags for EPT each access to a table is a write.
    let eptp = with_flags(&own.stage)?;
    invept_single(eptp)?;
    ensure_eq!(own.stopped(number, 5)? & 2, 2, "write bit of the qualification");
    ensure_eq!(slot.get() & DIRTY, 0, "dirty flag of what was denied");
    slot.set(full);
    own.loads()?;
    // Executing is not what walks do.
    slot.set(full & !4);
    invept_single(eptp)?;
    own.loads()
}

/// Without its PML4 table L2 can't fetch its first instruction.
fn pml4(ctx: &mut Ctx<'_>) -> Verdict {
    let mut own = Own::new(ctx)?;
    let full = own.slots[0].get();
    own.slots[0].set(0);
    let exit = match own.load() {
        Err(outcome) => outcome.exit()?,
        Ok(value) => crate::fail!("L2 reads {value:#x}"),
    };
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!((exit.gpa, exit.gla), (gpa(0), load()), "addresses");
    ensure_eq!(exit.qualification & 0x1BF, 0x81, "qualification");
    own.slots[0].set(full);
    own.loads()
}

/// A read makes all tables dirty, and the page accessed only.
fn flags(ctx: &mut Ctx<'_>) -> Verdict {
    let mut own = Own::new(ctx)?;
    let eptp = with_flags(&own.stage)?;
    for round in 0..3 {
        own.loads()?;
        for (number, slot) in own.slots.into_iter().enumerate() {
            let expected = if number < 4 { ACCESSED | DIRTY } else { ACCESSED };
            let found = slot.get() & (ACCESSED | DIRTY);
            ensure_eq!(found, expected, "flags of table {number} in round {round}");
            slot.set(slot.get() & !(ACCESSED | DIRTY));
        }
        invept_single(eptp)?;
    }
    let marked = own.tables.into_iter().all(|table| table.read(0) & 1 << 5 != 0);
    crate::ensure!(marked, "accessed flags in L2's own tables");
    Ok(())
}

/// The same with PAE paging, whose uppermost tables are page directories.
fn pae(ctx: &mut Ctx<'_>, directory: bool) -> Verdict {
    const DIRECTORY: u64 = WINDOW + 0x10_0000;
    const TABLE: u64 = WINDOW + 0x10_1000;
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Pae)?;
    let page = ctx.arena.page();
    page.write(0, 0x5EED);
    vm.map(ctx, L2Gpa::new(WINDOW), page);
    let paging = vm.paging;
    let slots = [
        vm.map(ctx, L2Gpa::new(DIRECTORY), paging.window_directory),
        vm.map(ctx, L2Gpa::new(TABLE), paging.window),
    ];
    paging.window_directory.write(0, TABLE | USER_RW);
    paging.root.write(1, DIRECTORY | 1);
    vmcs::write(PDPTES[1], DIRECTORY | 1);
    let (slot, at) = if directory { (slots[0], DIRECTORY) } else { (slots[1], TABLE) };
    for _ in 0..3 {
        ensure_eq!(vm.load(WINDOW)?, 0x5EED, "what L2 reads");
        let full = slot.get();
        slot.set(0);
        invept_single(vm.ept.eptp(false))?;
        let exit = match vm.load(WINDOW) {
            Err(outcome) => outcome.exit()?,
            Ok(value) => crate::fail!("L2 reads {value:#x}"),
        };
        ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
        ensure_eq!((exit.gpa, exit.gla), (at, WINDOW), "addresses");
        ensure_eq!(exit.qualification & 0x1BF, 0x81, "qualification");
        slot.set(full);
    }
    Ok(())
}

/// L2 and a second page behind the one at [`TARGET`].
fn two_pages(ctx: &mut Ctx<'_>) -> Result<(Stage, [Page; 2], [Slot; 2]), Stop> {
    let stage = Stage::new(ctx, Size::K4)?;
    let second = ctx.arena.page();
    let slot = stage.vm.map(ctx, L2Gpa::new(WINDOW + 0x6000), second);
    let (pages, slots) = ([stage.page, second], [stage.leaf, slot]);
    Ok((stage, pages, slots))
}

/// An access that lies in two pages, one of which denies it: nothing happens in the other.
fn across(ctx: &mut Ctx<'_>, access: Access) -> Verdict {
    let (mut stage, pages, slots) = two_pages(ctx)?;
    let eptp = stage.vm.ept.eptp(false);
    pages[0].write32(1023, 0x1111_1111);
    pages[1].write32(0, 0x2222_2222);
    let code = WINDOW + 0x5FFF;
    if access == Access::Fetch {
        // VMCALL: its first byte in one page, the others in the next.
        pages[0].put(0xFFF, &VMCALL.bytes[..1]);
        pages[1].put(0, &VMCALL.bytes[1..]);
    }
    let go = |vm: &mut Vm| match access {
        Access::Read => vm.load(WINDOW + 0x5FFC),
        Access::Write => vm.store(WINDOW + 0x5FFC, 0x4444_4444_3333_3333).map(|()| 0),
        Access::Fetch => vm.fetch(code).map(|()| 0),
    };
    let full = slots.map(Slot::get);
    for denying in [1, 0, 1] {
        let permissions = if access == Access::Read { 0 } else { 7 & !access.bit() };
        slots[denying].set(full[denying] & !7 | permissions);
        invept_single(eptp)?;
        let exit = match go(&mut stage.vm) {
            Err(outcome) => outcome.exit()?,
            Ok(_) => crate::fail!("{access:?} went through"),
        };
        ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
        let page = WINDOW + [0x5000, 0x6000][denying];
        ensure_eq!(exit.gpa & !0xFFF, page, "page that denied it");
        let expected = access.bit() | permissions << 3 | 0x180;
        ensure_eq!(exit.qualification & 0x1BF, expected, "qualification");
        if access != Access::Fetch {
            let found = (pages[0].read32(1023), pages[1].read32(0));
            ensure_eq!(found, (0x1111_1111, 0x2222_2222), "both halves, untouched");
        }
        slots[denying].set(full[denying]);
        invept_single(eptp)?;
    }
    let read = go(&mut stage.vm)?;
    let found = (pages[0].read32(1023), pages[1].read32(0));
    match access {
        Access::Read => ensure_eq!(read, 0x2222_2222_1111_1111, "what L2 reads"),
        Access::Write => ensure_eq!(found, (0x3333_3333, 0x4444_4444), "both halves"),
        Access::Fetch => ensure_eq!(vmcs::read(Field::GUEST_RIP), code, "where the VMCALL was"),
    }
    Ok(())
}

/// A locked addition in two pages needs to write both.
fn locked(ctx: &mut Ctx<'_>) -> Verdict {
    let (mut stage, pages, slots) = two_pages(ctx)?;
    pages[0].write32(1023, 0xFFFF_FFFF);
    stage.vm.registers.rbx = WINDOW + 0x5FFC;
    stage.vm.registers.rax = 1;
    let full = slots[1].get();
    slots[1].set(full & !2);
    vmcs::write(Field::GUEST_RIP, lock_add());
    let exit = stage.vm.run().exit()?;
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa, WINDOW + 0x6000, "guest-physical address");
    ensure_eq!(exit.qualification & 2, 2, "write bit of the qualification");
    ensure_eq!(pages[0].read32(1023), 0xFFFF_FFFF, "the first half, untouched");
    slots[1].set(full);
    stage.vm.exec_at(lock_add())?;
    ensure_eq!((pages[0].read32(1023), pages[1].read32(0)), (0, 1), "the sum");
    Ok(())
}
