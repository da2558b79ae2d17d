//! Answers: does each of many VPIDs keep its own translations, and each INVVPID drop what it must?
//!
//! SDM Vol. 3C, "Caching Translation Information" and "Operations that Invalidate Cached Mappings";
//! Vol. 2, "INVVPID—Invalidate Translations Based on VPID". What may stay cached may also be gone: a
//! case about that takes both answers.

use vmx_defs::{Field, L2Gpa, msr::EptVpidCap};

use crate::{
    ensure, ensure_eq,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        Mode, Op, Vm, Vmx,
        paging::{Paging, USER_RW, WINDOW},
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "vpid.many", run: many },
    Case { name: "vpid.many.edited.address", run: |ctx| edited(ctx, ADDRESS) },
    Case { name: "vpid.many.edited.single", run: |ctx| edited(ctx, SINGLE) },
    Case { name: "vpid.many.edited.all", run: |ctx| edited(ctx, ALL) },
    Case { name: "vpid.many.edited.retain_globals", run: |ctx| edited(ctx, GLOBALS) },
    Case { name: "vpid.many.and_none", run: and_none },
    Case { name: "vpid.many.epts", run: epts },
    Case { name: "invvpid.globals.may_stay", run: globals },
    Case { name: "invvpid.address.others_may_stay", run: other_addresses },
    Case { name: "invvpid.address.each_page", run: each_page },
    Case { name: "invvpid.large_page", run: large_page },
];

const ADDRESS: u64 = 0;
const SINGLE: u64 = 1;
const ALL: u64 = 2;
const GLOBALS: u64 = 3;

/// VPIDs in use in turn.
const COUNT: usize = 100;

fn cap(kind: u64) -> EptVpidCap {
    EptVpidCap::INVVPID
        | [
            EptVpidCap::INVVPID_ADDRESS,
            EptVpidCap::INVVPID_SINGLE,
            EptVpidCap::INVVPID_ALL,
            EptVpidCap::INVVPID_RETAIN_GLOBALS,
        ][kind as usize]
}

fn invvpid(kind: u64, vpid: u64, address: u64) -> Verdict {
    // SAFETY: drops cached translations only.
    let result = unsafe { vmx_hw::invvpid(kind, [vpid, address]) };
    ensure_eq!(result, Ok(()), "INVVPID of type {kind} for VPID {vpid:#x}");
    Ok(())
}

/// L2 that changes its VPID and its page tables from entry to entry.
struct Guests {
    vmx: Vmx,
    vm: Vm,
    /// CR3 and the page table of the window, for each.
    cr3: Page,
    windows: Page,
    /// Two pages that each can have in its window.
    data: [Page; 2],
}

impl Guests {
    fn new(ctx: &mut Ctx<'_>) -> Result<Self, Stop> {
        let vmx = Vmx::on(ctx)?;
        if !vmx.caps.ept.contains(cap(SINGLE) | cap(ALL)) {
            skip!("no INVVPID of one or all contexts");
        }
        let vm = Vm::new(ctx, &vmx, Mode::Long)?;
        let (cr3, windows) = (ctx.arena.page(), ctx.arena.page());
        let data = [ctx.arena.page(), ctx.arena.page()];
        let guests = Self { vmx, vm, cr3, windows, data };
        for number in 0..COUNT {
            let paging = Paging::new(ctx.arena, Mode::Long);
            guests.cr3.write(number, paging.cr3);
            guests.windows.write(number, paging.window.address());
            for (which, data) in guests.data.into_iter().enumerate() {
                let page = ctx.arena.page();
                page.write(0, Self::value(number, which));
                data.write(number, page.address());
            }
            guests.show(number, 0, 0);
        }
        Ok(guests)
    }

    fn value(number: usize, which: usize) -> u64 {
        (which as u64 + 1) << 32 | number as u64
    }

    fn vpid(number: usize) -> u16 {
        (number as u16).wrapping_mul(653) + 1
    }

    /// Page number `number` of its window is one of its two pages.
    fn show(&self, number: usize, which: usize, flags: u64) {
        let table = Page::at(self.windows.read(number));
        table.write(0, self.data[which].read(number) | USER_RW | flags);
    }

    /// L2 number `number` is next.
    fn select(&self, number: usize) -> Verdict {
        self.vm.enable_vpid(&self.vmx, Self::vpid(number))?;
        vmcs::write(Field::GUEST_CR3, self.cr3.read(number));
        Ok(())
    }

    fn expect(&mut self, number: usize, which: usize) -> Verdict {
        self.select(number)?;
        let read = self.vm.load(WINDOW)?;
        ensure_eq!(read, Self::value(number, which), "what L2 number {number} reads");
        Ok(())
    }
}

/// In turn, forwards, backwards, and in an order of strides.
fn many(ctx: &mut Ctx<'_>) -> Verdict {
    let mut guests = Guests::new(ctx)?;
    for number in (0..COUNT).chain((0..COUNT).rev()).chain((0..COUNT).map(|n| n * 37 % COUNT)) {
        guests.expect(number, 0)?;
    }
    Ok(())
}

/// Page tables change, and each L2 is invalidated; a type that names no VPID does for all.
fn edited(ctx: &mut Ctx<'_>, kind: u64) -> Verdict {
    let mut guests = Guests::new(ctx)?;
    if !guests.vmx.caps.ept.contains(cap(kind)) {
        skip!("{:?} not offered", cap(kind));
    }
    for round in 0..4 {
        let which = (round + 1) % 2;
        for number in 0..COUNT {
            guests.expect(number, round % 2)?;
        }
        for number in 0..COUNT {
            guests.show(number, which, 0);
            if kind != ALL {
                invvpid(kind, Guests::vpid(number).into(), WINDOW)?;
            }
        }
        if kind == ALL {
            invvpid(ALL, 0, 0)?;
        }
        for number in 0..COUNT {
            guests.expect(number * 37 % COUNT, which)?;
        }
    }
    Ok(())
}

/// Entries without VPID between them drop what is theirs only, and always.
fn and_none(ctx: &mut Ctx<'_>) -> Verdict {
    let mut guests = Guests::new(ctx)?;
    let vpid = vmx_defs::ProcCtls2::VPID.bits().into();
    for round in 0..2 {
        for number in 1..COUNT {
            guests.expect(number, 0)?;
            vmcs::change(Field::PROC_CTLS2, 0, vpid);
            vmcs::write(Field::GUEST_CR3, guests.cr3.read(0));
            let which = (number + round) % 2;
            guests.show(0, which, 0);
            let read = guests.vm.load(WINDOW)?;
            ensure_eq!(read, Guests::value(0, which), "what L2 without VPID reads");
        }
    }
    Ok(())
}

/// One VPID and page table, and many EPTs: combined mappings are tagged by both.
fn epts(ctx: &mut Ctx<'_>) -> Verdict {
    let mut guests = Guests::new(ctx)?;
    guests.select(0)?;
    let table = Page::at(guests.windows.read(0));
    table.write(0, WINDOW | USER_RW);
    let eptps = ctx.arena.page();
    for number in 0..COUNT {
        let ept = guests.vm.ept.fork(ctx.arena);
        let page = Page::at(guests.data[0].read(number));
        ept.map(ctx.arena, L2Gpa::new(WINDOW), 1, page.address() | crate::vmx::ept::LEAF);
        eptps.write(number, ept.eptp(false));
    }
    for number in (0..COUNT).chain((0..COUNT).rev()) {
        vmcs::write(Field::EPT_POINTER, eptps.read(number));
        let read = guests.vm.load(WINDOW)?;
        ensure_eq!(read, Guests::value(number, 0), "what L2 reads through EPT {number}");
    }
    Ok(())
}

/// What retains globals drops the others; a single-context INVVPID drops all.
fn globals(ctx: &mut Ctx<'_>) -> Verdict {
    const PGE: u64 = 1 << 7;
    const GLOBAL: u64 = 1 << 8;
    let mut guests = Guests::new(ctx)?;
    if !guests.vmx.caps.ept.contains(cap(GLOBALS)) {
        skip!("{:?} not offered", cap(GLOBALS));
    }
    vmcs::change(Field::GUEST_CR4, PGE, 0);
    guests.show(3, 0, GLOBAL);
    guests.expect(3, 0)?;
    guests.show(3, 1, GLOBAL);
    invvpid(GLOBALS, Guests::vpid(3).into(), 0)?;
    let read = guests.vm.load(WINDOW)?;
    let either = [Guests::value(3, 0), Guests::value(3, 1)].contains(&read);
    ensure!(either, "L2 reads {read:#x}, which was never there");
    invvpid(SINGLE, Guests::vpid(3).into(), 0)?;
    guests.expect(3, 1)?;
    // Global or not, the address is dropped where it is named.
    if guests.vmx.caps.ept.contains(cap(ADDRESS)) {
        guests.show(3, 0, GLOBAL);
        invvpid(ADDRESS, Guests::vpid(3).into(), WINDOW)?;
        guests.expect(3, 0)?;
    }
    Ok(())
}

/// An INVVPID of one address need not drop another, which its own INVVPID or INVLPG drops.
fn other_addresses(ctx: &mut Ctx<'_>) -> Verdict {
    let mut guests = Guests::new(ctx)?;
    if !guests.vmx.caps.ept.contains(cap(ADDRESS)) {
        skip!("{:?} not offered", cap(ADDRESS));
    }
    for by_guest in [false, true] {
        guests.expect(5, 0)?;
        guests.show(5, 1, 0);
        invvpid(ADDRESS, Guests::vpid(5).into(), WINDOW + 0x1000)?;
        let read = guests.vm.load(WINDOW)?;
        let either = [Guests::value(5, 0), Guests::value(5, 1)].contains(&read);
        ensure!(either, "L2 reads {read:#x}, which was never there");
        if by_guest {
            guests.vm.registers.rbx = WINDOW + 0xFFF;
            guests.vm.exec(Op::Invlpg)?;
        } else {
            invvpid(ADDRESS, Guests::vpid(5).into(), WINDOW + 0xFFF)?;
        }
        guests.expect(5, 1)?;
        guests.show(5, 0, 0);
        invvpid(SINGLE, Guests::vpid(5).into(), 0)?;
    }
    Ok(())
}

/// One address after the other, of many.
fn each_page(ctx: &mut Ctx<'_>) -> Verdict {
    const PAGES: usize = 64;
    let mut guests = Guests::new(ctx)?;
    if !guests.vmx.caps.ept.contains(cap(ADDRESS)) {
        skip!("{:?} not offered", cap(ADDRESS));
    }
    guests.select(1)?;
    let table = Page::at(guests.windows.read(1));
    for round in 0..3 {
        for page in 0..PAGES {
            let shown = (page * 5 + round * 7) % COUNT;
            table.write(page, guests.data[0].read(shown) | USER_RW);
            let address = WINDOW + page as u64 * 0x1000;
            invvpid(ADDRESS, Guests::vpid(1).into(), address)?;
            let read = guests.vm.load(address)?;
            ensure_eq!(read, Guests::value(shown, 0), "what L2 reads in page {page}");
        }
    }
    Ok(())
}

/// Any address within a large page names all of it.
fn large_page(ctx: &mut Ctx<'_>) -> Verdict {
    const LARGE: u64 = 1 << 7;
    let mut guests = Guests::new(ctx)?;
    if !guests.vmx.caps.ept.contains(cap(ADDRESS)) {
        skip!("{:?} not offered", cap(ADDRESS));
    }
    let blocks = [ctx.arena.block_2m(), ctx.arena.block_2m()];
    guests.vm.enable_vpid(&guests.vmx, 9)?;
    let directory = guests.vm.paging.window_directory;
    for round in 0..4 {
        let block = blocks[round % 2];
        Page::at(block.address() + 0x7000).write(0, 0xB10C + round as u64);
        directory.write(0, block.address() | LARGE | USER_RW);
        invvpid(ADDRESS, 9, WINDOW + 0x1F_0000)?;
        let read = guests.vm.load(WINDOW + 0x7000)?;
        ensure_eq!(read, 0xB10C + round as u64, "what L2 reads in round {round}");
    }
    Ok(())
}
