//! Answers: do L2s on two processors, which share tables, flags or an L0's memory, keep out of each
//! other's way?
//!
//! SDM Vol. 3C, "Accessed and Dirty Flags for EPT", "Information That May Be Cached" (tags are those
//! of one logical processor).

use core::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::{
    cases::ept::{
        many::{Crowd, Tables},
        types::Range,
    },
    vmx::{Mode, Vm, ept::DIRTY, vmcs},
};

pub(super) const CASES: &[Case] = &[
    Case { name: "smp.shared.eptp", run: |ctx| both(ctx, Sharing::Eptp) },
    Case { name: "smp.shared.tables", run: |ctx| both(ctx, Sharing::Tables) },
    Case { name: "smp.shared.tables.one_flagged", run: |ctx| both(ctx, Sharing::TablesOneFlagged) },
    Case { name: "smp.shared.many_pages", run: |ctx| many_pages(ctx, false) },
    Case { name: "smp.shared.many_pages.accessed_dirty", run: |ctx| many_pages(ctx, true) },
    Case { name: "smp.shared.vpid_number", run: vpid_number },
    Case { name: "smp.flags.updates_not_lost.4k", run: |ctx| updates(ctx, false) },
    Case { name: "smp.flags.updates_not_lost.2m", run: |ctx| updates(ctx, true) },
    Case { name: "smp.memory_types", run: memory_types },
    Case { name: "smp.reclaim.roots", run: reclaim_roots },
    Case { name: "smp.reclaim.tables", run: |ctx| reclaim_tables(ctx, 20_000) },
    Case { name: "smp.reclaim.tables.without_interrupts", run: |ctx| reclaim_tables(ctx, 0) },
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// The whole EPT.
    Eptp,
    /// All but the EPT PML4 tables.
    Tables,
    /// The same, and the other processor's has accessed and dirty flags.
    TablesOneFlagged,
}

/// L2s on both processors on the same tables, which change.
fn both(ctx: &mut Ctx<'_>, sharing: Sharing) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let flagged = sharing == Sharing::TablesOneFlagged;
    if flagged {
        need(&vmx, EptVpidCap::ACCESSED_DIRTY)?;
    }
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Watch)?;
    let turns = Turns::new(ctx, &runner, Place::Level(1));
    let remote_eptp = runner.vm.ept.eptp(flagged);
    vmcs::write(Field::EPT_POINTER, remote_eptp);
    runner.invalidate = Invalidate::Ept(1, remote_eptp);
    runner.ready()?;

    let mut own = Vm::new(ctx, &vmx, Mode::Long)?;
    own.ept = runner.vm.ept;
    if sharing != Sharing::Eptp {
        own.ept.root = ctx.arena.page();
        for index in 0..2 {
            own.ept.root.write(index, runner.vm.ept.root.read(index));
        }
    }
    let eptp = own.ept.eptp(false);
    vmcs::write(Field::EPT_POINTER, eptp);
    show(&own, FAR);
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        ensure_eq!(own.load(WINDOW)?, 0, "what L2 reads here at first");
        for round in 1..=ROUNDS {
            turns.turn(round);
            // Now one is the first to see it, now the other.
            if round % 2 == 0 {
                remote.shoot_down(round)?;
            }
            ensure!(Invalidate::Ept(1, eptp).execute(), "INVEPT on the first processor");
            ensure_eq!(own.load(WINDOW)?, round, "what L2 reads here");
            own.store(WINDOW + 8, round)?;
            if round % 2 == 1 {
                remote.shoot_down(round)?;
            }
            turns.take_away(round);
            remote.went_round()?;
            let page = turns.pages[(round % 2) as usize];
            ensure_eq!(page.read(1), round, "what L2 wrote here");
            // L2 here writes without flags, the other one reads with them.
            let flags = turns.slot.get() & (ACCESSED | DIRTY);
            let expected = if flagged { ACCESSED } else { 0 };
            ensure_eq!(flags, expected, "flags in round {round}");
        }
        Ok(())
    })
}

/// Entries of a table that L2s on both processors use change, any of them, a few at a time; each page
/// tells how new it is, and L2 looks at all of them all the time.
fn many_pages(ctx: &mut Ctx<'_>, ad: bool) -> Verdict {
    const PAGES: usize = 128;
    let (vmx, other) = machine(ctx)?;
    need(&vmx, if ad { EptVpidCap::ACCESSED_DIRTY } else { EptVpidCap::INVEPT })?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Scan)?;
    let table = runner.vm.ept.slot(ctx.arena, L2Gpa::new(WINDOW), 1).table;
    // Two pages for each entry take turns.
    let pages = [(); 2].map(|()| {
        let list = ctx.arena.page();
        for number in 0..PAGES {
            list.write(number, ctx.arena.page().address());
        }
        list
    });
    for number in 0..PAGES {
        table.write(number, pages[0].read(number) | LEAF);
    }
    let eptp = runner.vm.ept.eptp(ad);
    vmcs::write(Field::EPT_POINTER, eptp);
    runner.invalidate = Invalidate::Ept(1, eptp);
    runner.vm.registers.r8[1] = PAGES as u64;
    let board = runner.board;
    runner.ready()?;

    let mut own = Vm::new(ctx, &vmx, Mode::Long)?;
    own.ept.root = ctx.arena.page();
    own.ept.root.write(0, runner.vm.ept.root.read(0));
    let own_eptp = own.ept.eptp(false);
    vmcs::write(Field::EPT_POINTER, own_eptp);
    let mut shown = [0_usize; PAGES];
    let mut age = [0_u64; PAGES];
    let mut seed = 7_u64;
    let mut any = |limit: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 40) as usize % limit
    };
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        for round in 1..=ROUNDS / 2 {
            let mut changed: arrayvec::ArrayVec<usize, 16> = arrayvec::ArrayVec::new();
            for _ in 0..[1, 2, 5, 16][round as usize % 4] {
                let number = any(PAGES);
                if !changed.contains(&number) {
                    changed.push(number);
                }
            }
            for &number in &changed {
                shown[number] ^= 1;
                let page = pages[shown[number]].read(number);
                Page::at(page).write(0, round);
                table.write(number, page | LEAF);
            }
            let first = round % 2 == 0;
            if first {
                remote.shoot_down(round)?;
            }
            ensure!(Invalidate::Ept(1, own_eptp).execute(), "INVEPT on the first processor");
            for &number in &changed {
                age[number] = round;
            }
            for number in (0..4).map(|_| any(PAGES)).chain(changed.iter().copied()) {
                let read = own.load(WINDOW + number as u64 * 0x1000)?;
                ensure_eq!(read, age[number], "what L2 reads here in page {number}");
            }
            if !first {
                remote.shoot_down(round)?;
            }
            // From now on nobody may see the old ones, which are less than anything.
            for &number in &changed {
                board.write(number + 1, round);
                Page::at(pages[shown[number] ^ 1].read(number)).write(0, 0);
            }
            remote.went_round()?;
            if ad {
                let marked = (0..PAGES).all(|number| table.read(number) & ACCESSED != 0);
                ensure!(marked, "accessed flags in round {round}");
            }
        }
        Ok(())
    })
}

/// Both use one VPID's number, for L2s with other page tables.
fn vpid_number(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Watch)?;
    runner.vm.enable_vpid(&vmx, 5)?;
    runner.invalidate = Invalidate::Nothing;
    let page = ctx.arena.page();
    page.write(0, 0);
    runner.vm.paging.window.write(0, page.address() | USER_RW);
    runner.ready()?;
    let mut own = Vm::new(ctx, &vmx, Mode::Long)?;
    own.enable_vpid(&vmx, 5)?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    beside(other, &mut runner, |remote| {
        for round in 1..=ROUNDS {
            let page = pages[(round % 2) as usize];
            page.write(0, POISON + round);
            own.paging.window.write(0, page.address() | USER_RW);
            ensure!(Invalidate::Vpid(1, 5, 0).execute(), "INVVPID");
            ensure_eq!(own.load(WINDOW)?, POISON + round, "what L2 reads here");
            remote.went_round()?;
        }
        Ok(())
    })
}

/// L1 changes other bits of an entry, with locked instructions, while its flags are being set for
/// another processor's L2: both changes stay.
fn updates(ctx: &mut Ctx<'_>, large: bool) -> Verdict {
    const ONE: u64 = 1 << 52;
    const COUNTER: u64 = 0x7F << 52;
    let (vmx, other) = machine(ctx)?;
    need(&vmx, EptVpidCap::ACCESSED_DIRTY | EptVpidCap::PAGE_2M)?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Fill)?;
    let eptp = runner.vm.ept.eptp(true);
    vmcs::write(Field::EPT_POINTER, eptp);
    runner.invalidate = Invalidate::Ept(1, eptp);
    let gpa = L2Gpa::new(WINDOW);
    let slot = if large {
        let entry = ctx.arena.block_2m().address() | LEAF | LARGE;
        runner.vm.ept.map(ctx.arena, gpa, 2, entry)
    } else {
        let page = ctx.arena.page();
        runner.vm.map(ctx, gpa, page)
    };
    let address = slot.table.address() + slot.index as u64 * 8;
    // SAFETY: the entry is a word of a page of this case, which all others change atomically.
    let entry = unsafe { AtomicU64::from_ptr(address as *mut u64) };
    runner.ready()?;
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        let mut counted = 0_u64;
        for round in 1..=ROUNDS {
            entry.fetch_and(!(ACCESSED | DIRTY), Ordering::SeqCst);
            remote.order(round);
            // Until the flags are there, and a little longer.
            let mut tries = 0_u32;
            let mut after = 0;
            while after < 8 {
                // Now and then, as software would: who sets flags by software has to find the time.
                for _ in 0..500 {
                    core::hint::spin_loop();
                }
                counted += 1;
                let old = entry.fetch_add(ONE, Ordering::SeqCst);
                let number = (counted - 1) % 128;
                ensure_eq!((old & COUNTER) >> 52, number, "L1's own bits in round {round}");
                if old & COUNTER == COUNTER {
                    // Bit 59 is the first one of what is not L1's.
                    entry.fetch_sub(128 * ONE, Ordering::SeqCst);
                }
                if old & (ACCESSED | DIRTY) == ACCESSED | DIRTY {
                    after += 1;
                }
                tries += 1;
                ensure!(tries < 50_000, "the flags are not set in round {round}");
            }
        }
        Ok(())
    })
}

/// L1 changes its MTRRs on one processor while another one's L2 runs on memory that this concerns, and
/// changes L2's EPT in between.
fn memory_types(ctx: &mut Ctx<'_>) -> Verdict {
    let range = Range::free()?;
    let (vmx, other) = machine(ctx)?;
    need(&vmx, EptVpidCap::PAGE_2M)?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Watch)?;
    let turns = Turns::new(ctx, &runner, Place::Large);
    let eptp = runner.vm.ept.eptp(false);
    runner.invalidate = Invalidate::Ept(1, eptp);
    runner.ready()?;
    let result = beside(other, &mut runner, |remote| {
        remote.went_round()?;
        for round in 1..=ROUNDS / 4 {
            let page = turns.pages[round as usize % 2].address();
            match round % 3 {
                0 => range.clear(),
                _ => range.set(page + (round & 1) * 0x1000, 0x1000),
            }
            turns.turn(round);
            remote.shoot_down(round)?;
            turns.take_away(round);
            remote.went_round()?;
        }
        Ok(())
    });
    range.clear();
    result
}

/// One processor's L2 switches among views while another one's goes through more roots than an L0
/// may want to keep.
fn reclaim_roots(ctx: &mut Ctx<'_>) -> Verdict {
    const VIEWS: usize = 64;
    let (vmx, other) = machine(ctx)?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Rotate)?;
    let views = Views::new(ctx, &runner.vm.ept, VIEWS, |_| false);
    vmcs::write(Field::EPT_POINTER, views.eptp(0));
    runner.vm.enable_eptp_switching(&vmx, views.list)?;
    runner.vm.registers.r8[1] = VIEWS as u64;
    runner.vm.registers.r8[2] = Views::value(0);
    runner.ready()?;
    let mut crowd = Crowd::new(ctx, &vmx)?;
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        crowd.visit_all()?;
        remote.went_round()
    })
}

/// The same with more tables than an L0 may want to keep. The other one's L1 gets interrupts of its
/// timer each so many ticks, if not 0; else its L2 never exits.
fn reclaim_tables(ctx: &mut Ctx<'_>, ticks: u32) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Watch)?;
    let turns = Turns::new(ctx, &runner, Place::Level(1));
    runner.ticks = ticks;
    runner.ready()?;
    let mut tables = Tables::new(ctx, &vmx)?;
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        for round in 1..=16 {
            turns.turn(round);
            remote.shoot_down(round)?;
            turns.take_away(round);
            tables.read_part(round as usize - 1, 16)?;
            remote.went_round()?;
        }
        Ok(())
    })
}
