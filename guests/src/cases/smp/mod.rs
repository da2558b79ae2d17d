//! Answers: do several processors that run L2s see what one of them changed, once they have
//! invalidated, and nothing wrong before?
//!
//! SDM Vol. 3C, "Guidelines for Use of the INVEPT Instruction" and "Guidelines for Use of the INVVPID
//! Instruction": both act on the processor that executes them, so that a hypervisor interrupts the
//! others and has them do the same; Vol. 3A, "Propagation of Paging-Structure Changes to Multiple
//! Processors". The L1 on the first processor changes what L2 on another one runs on, hundreds of
//! times, and takes the old pages away as soon as nobody may see them.

mod moves;
mod nmis;
mod runner;
mod shared;

use vmx_defs::{Field, L2Gpa, msr::EptVpidCap};

use self::runner::{Invalidate, Orders, Program, Remote, Runner, beside, show};
use crate::{
    ensure, ensure_eq,
    memory::Page,
    skip,
    smp::Other,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        Vmx,
        ept::{ACCESSED, LARGE, LEAF, Slot, TABLE, index},
        paging::{USER_RW, WINDOW},
        views::Views,
        vmcs,
    },
};

/// What one processor changes and another one sees.
pub const CASES: &[Case] = &[
    Case { name: "smp.invept.leaf", run: |ctx| invept(ctx, Place::Level(1), PLAIN) },
    Case {
        name: "smp.invept.page_directory_entry",
        run: |ctx| invept(ctx, Place::Level(2), PLAIN),
    },
    Case { name: "smp.invept.pdpt_entry", run: |ctx| invept(ctx, Place::Level(3), PLAIN) },
    Case { name: "smp.invept.pml4_entry", run: |ctx| invept(ctx, Place::Level(4), PLAIN) },
    Case { name: "smp.invept.2m", run: |ctx| invept(ctx, Place::Large, PLAIN) },
    Case { name: "smp.invept.split_and_joined", run: |ctx| invept(ctx, Place::Split, PLAIN) },
    Case {
        name: "smp.invept.all_contexts",
        run: |ctx| invept(ctx, Place::Level(1), Setting { all: true, ..PLAIN }),
    },
    Case {
        name: "smp.invept.accessed_dirty",
        run: |ctx| invept(ctx, Place::Level(1), Setting { ad: true, ..PLAIN }),
    },
    Case {
        name: "smp.invept.accessed_dirty.2m",
        run: |ctx| invept(ctx, Place::Large, Setting { ad: true, ..PLAIN }),
    },
    Case {
        name: "smp.invept.with_vpid",
        run: |ctx| invept(ctx, Place::Level(1), Setting { vpid: true, ..PLAIN }),
    },
    Case { name: "smp.invept.each_processor", run: each_processor },
    Case { name: "smp.invept.write_taken_away", run: write_taken_away },
    Case { name: "smp.violation.granted", run: granted },
    Case { name: "smp.violation.granted.accessed_dirty", run: granted_flagged },
    Case { name: "smp.invvpid.address", run: |ctx| invvpid(ctx, 0) },
    Case { name: "smp.invvpid.single", run: |ctx| invvpid(ctx, 1) },
    Case { name: "smp.invvpid.all", run: |ctx| invvpid(ctx, 2) },
    Case { name: "smp.invvpid.retain_globals", run: |ctx| invvpid(ctx, 3) },
    Case { name: "smp.list.edited", run: |ctx| list_edited(ctx, false) },
    Case { name: "smp.list.edited.with_vpid", run: |ctx| list_edited(ctx, true) },
];

/// What several processors use together.
pub const SHARED: &[Case] = shared::CASES;
/// What goes from one processor to another.
pub const MOVES: &[Case] = moves::CASES;
/// What NMIs do.
pub const NMIS: &[Case] = nmis::CASES;

/// Changes in one case.
const ROUNDS: u64 = 200;
/// What nobody may read any more.
const POISON: u64 = 0xDEAD_0000_0000_0000;
/// A guest-physical address with an EPT PML4 entry of its own.
const FAR: u64 = 1 << 39;

/// What is changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The entry of this level, where 1 maps a 4-KiB page.
    Level(u8),
    /// One that maps a 2-MiB page.
    Large,
    /// One that maps a 2-MiB page and becomes one for a table.
    Split,
}

#[derive(Clone, Copy)]
struct Setting {
    ad: bool,
    vpid: bool,
    /// INVEPT of all contexts.
    all: bool,
}

const PLAIN: Setting = Setting { ad: false, vpid: false, all: false };

fn need(vmx: &Vmx, caps: EptVpidCap) -> Verdict {
    if !vmx.caps.ept.contains(caps) {
        skip!("{caps:?} not offered");
    }
    Ok(())
}

/// VMX operation on the first processor, where there is another one.
fn machine(ctx: &mut Ctx<'_>) -> Result<(Vmx, Other), Stop> {
    let other = Other::first(ctx)?;
    let vmx = Vmx::on(ctx)?;
    need(&vmx, EptVpidCap::INVEPT | EptVpidCap::INVEPT_SINGLE | EptVpidCap::INVEPT_ALL)?;
    if vmx.caps.width < 40 {
        skip!("physical addresses have fewer than 40 bits");
    }
    Ok((vmx, other))
}

/// An entry of `level` that leads to `page` at [`FAR`].
fn lead(ctx: &mut Ctx<'_>, level: u8, page: Page) -> u64 {
    if level == 1 {
        return page.address() | LEAF;
    }
    let table = ctx.arena.page();
    let below = lead(ctx, level - 1, page);
    table.write(index(L2Gpa::new(FAR), level - 1), below);
    table.address() | TABLE
}

/// Two ways to map [`FAR`] that take turns.
struct Turns {
    slot: Slot,
    entries: [u64; 2],
    pages: [Page; 2],
}

impl Turns {
    fn new(ctx: &mut Ctx<'_>, runner: &Runner<'_>, place: Place) -> Self {
        let level = match place {
            Place::Level(level) => level,
            Place::Large | Place::Split => 2,
        };
        let slot = runner.vm.ept.slot(ctx.arena, L2Gpa::new(FAR), level);
        let large = |ctx: &mut Ctx<'_>| {
            let block = ctx.arena.block_2m();
            (block.address() | LEAF | LARGE, block)
        };
        let small = |ctx: &mut Ctx<'_>| {
            let page = ctx.arena.page();
            (lead(ctx, level, page), page)
        };
        let (first, second) = match place {
            Place::Level(_) => (small(ctx), small(ctx)),
            Place::Large => (large(ctx), large(ctx)),
            Place::Split => (large(ctx), small(ctx)),
        };
        slot.set(first.0);
        show(&runner.vm, FAR);
        Self { slot, entries: [first.0, second.0], pages: [first.1, second.1] }
    }

    /// From now on the number is `round`, in the page that was not mapped.
    fn turn(&self, round: u64) {
        let next = (round % 2) as usize;
        self.pages[next].write(0, round);
        self.slot.set(self.entries[next]);
    }

    /// The page that is no longer mapped.
    fn take_away(&self, round: u64) {
        self.pages[1 - (round % 2) as usize].write(0, POISON);
    }
}

fn invept(ctx: &mut Ctx<'_>, place: Place, setting: Setting) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    if place == Place::Large || place == Place::Split {
        need(&vmx, EptVpidCap::PAGE_2M)?;
    }
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Watch)?;
    if setting.ad {
        need(&vmx, EptVpidCap::ACCESSED_DIRTY)?;
    }
    let eptp = runner.vm.ept.eptp(setting.ad);
    vmcs::write(Field::EPT_POINTER, eptp);
    if setting.vpid {
        runner.vm.enable_vpid(&vmx, 9)?;
    }
    runner.invalidate = Invalidate::Ept(if setting.all { 2 } else { 1 }, eptp);
    let turns = Turns::new(ctx, &runner, place);
    let own = runner.invalidate;
    runner.ready()?;
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        for round in 1..=ROUNDS {
            turns.turn(round);
            ensure!(own.execute(), "INVEPT on the first processor");
            remote.shoot_down(round)?;
            turns.take_away(round);
            remote.went_round()?;
            if setting.ad {
                ensure!(turns.slot.get() & ACCESSED != 0, "accessed flag in round {round}");
            }
        }
        Ok(())
    })
}

/// All other processors run L2s on one EPT.
fn each_processor(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, _) = machine(ctx)?;
    let others = Other::all(ctx)?;
    let orders: [Orders; crate::smp::MOST] = Default::default();
    let mut runners: arrayvec::ArrayVec<Runner<'_>, { crate::smp::MOST }> =
        arrayvec::ArrayVec::new();
    for (number, _) in others.iter().enumerate() {
        let mut runner = Runner::new(ctx, &vmx, &orders[number], Program::Watch)?;
        if let Some(first) = runners.first() {
            runner.vm.ept = first.vm.ept;
        }
        let eptp = runner.vm.ept.eptp(false);
        vmcs::write(Field::EPT_POINTER, eptp);
        runner.invalidate = Invalidate::Ept(1, eptp);
        show(&runner.vm, FAR);
        runner.ready()?;
        runners.push(runner);
    }
    let turns = Turns::new(ctx, &runners[0], Place::Level(1));
    run_all(&others, &mut runners, &mut |remotes| {
        for remote in remotes {
            remote.went_round()?;
        }
        for round in 1..=ROUNDS {
            turns.turn(round);
            for remote in remotes {
                remote.shoot_down(round)?;
            }
            turns.take_away(round);
            for remote in remotes {
                remote.went_round()?;
            }
        }
        Ok(())
    })
}

type Remotes<'a> = arrayvec::ArrayVec<Remote<'a>, { crate::smp::MOST }>;

/// Runs each on a processor, with `body` beside all of them.
fn run_all(
    others: &[Other],
    runners: &mut [Runner<'_>],
    body: &mut dyn FnMut(&[Remote<'_>]) -> Verdict,
) -> Verdict {
    fn nest<'a>(
        others: &[Other],
        runners: &mut [Runner<'_>],
        remotes: &Remotes<'a>,
        body: &mut dyn FnMut(&[Remote<'_>]) -> Verdict,
    ) -> Verdict {
        let (Some((other, others)), Some((runner, runners))) =
            (others.split_first(), runners.split_first_mut())
        else {
            return body(remotes);
        };
        beside(*other, runner, |remote| {
            let mut more: Remotes<'_> = remotes.clone();
            more.push(remote);
            nest(others, runners, &more, body)
        })
    }
    nest(others, runners, &Remotes::new(), body)
}

/// A page becomes read-only: after the invalidation nothing is written to it any more.
fn write_taken_away(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Fill)?;
    let page = ctx.arena.page();
    let slot = runner.vm.map(ctx, L2Gpa::new(WINDOW), page);
    let full = slot.get();
    runner.ready()?;
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        for round in 1..=ROUNDS / 2 {
            let violations = orders.violations();
            slot.set(full & !2);
            // L2 may be on its way into the violation that follows, and there meets the interrupt
            // later: nobody waits for that.
            remote.order(round);
            remote.wait("an EPT violation", || orders.violations() > violations)?;
            let (gpa, qualification) = orders.violation();
            ensure_eq!(gpa, WINDOW, "guest-physical address");
            ensure_eq!(qualification & 0x1BF, 0x1AA, "qualification");
            let last = page.read(0);
            for _ in 0..20 {
                core::hint::spin_loop();
            }
            ensure_eq!(page.read(0), last, "the page after its write permission was taken away");
            slot.set(full);
            orders.grant();
            remote.wait("a write", || page.read(0) != last)?;
        }
        Ok(())
    })
}

/// Pages that another processor's L2 asks for by EPT violations: a grant needs no invalidation.
fn granted(ctx: &mut Ctx<'_>) -> Verdict {
    serve(ctx, false)
}

fn granted_flagged(ctx: &mut Ctx<'_>) -> Verdict {
    serve(ctx, true)
}

fn serve(ctx: &mut Ctx<'_>, ad: bool) -> Verdict {
    const PAGES: u64 = 300;
    let (vmx, other) = machine(ctx)?;
    if ad {
        need(&vmx, EptVpidCap::ACCESSED_DIRTY)?;
    }
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Sweep)?;
    runner.vm.registers.r8[1] = PAGES;
    vmcs::write(Field::EPT_POINTER, runner.vm.ept.eptp(ad));
    let table = runner.vm.ept.slot(ctx.arena, L2Gpa::new(WINDOW), 1).table;
    let page = ctx.arena.page();
    runner.ready()?;
    beside(other, &mut runner, |remote| {
        for number in 0..PAGES {
            remote.wait("an EPT violation", || orders.violations() > number)?;
            let (gpa, qualification) = orders.violation();
            ensure_eq!(gpa, WINDOW + number * 0x1000, "guest-physical address");
            ensure_eq!(qualification & 0x1BF, 0x181, "qualification");
            table.write(number as usize, page.address() | LEAF);
            orders.grant();
        }
        remote.went_round()?;
        ensure_eq!(orders.violations(), PAGES, "EPT violations");
        let expected = if ad { ACCESSED } else { 0 };
        for number in 0..512 {
            let flags = table.read(number) & (3 << 8);
            let expected = if number < PAGES as usize { expected } else { 0 };
            ensure_eq!(flags, expected, "flags of page {number}");
        }
        Ok(())
    })
}

/// L2's own page table is changed under it.
fn invvpid(ctx: &mut Ctx<'_>, kind: u64) -> Verdict {
    const VPID: u64 = 7;
    let (vmx, other) = machine(ctx)?;
    need(
        &vmx,
        EptVpidCap::INVVPID
            | [
                EptVpidCap::INVVPID_ADDRESS,
                EptVpidCap::INVVPID_SINGLE,
                EptVpidCap::INVVPID_ALL,
                EptVpidCap::INVVPID_RETAIN_GLOBALS,
            ][kind as usize],
    )?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::Watch)?;
    runner.vm.enable_vpid(&vmx, VPID as u16)?;
    runner.invalidate = Invalidate::Vpid(kind, VPID, WINDOW);
    let pages = [ctx.arena.page(), ctx.arena.page()];
    let window = runner.vm.paging.window;
    window.write(0, pages[0].address() | USER_RW);
    runner.ready()?;
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        for round in 1..=ROUNDS {
            let next = (round % 2) as usize;
            pages[next].write(0, round);
            window.write(0, pages[next].address() | USER_RW);
            remote.shoot_down(round)?;
            pages[1 - next].write(0, POISON);
            remote.went_round()?;
        }
        Ok(())
    })
}

/// Another processor's L2 switches by VMFUNC through a list that is changed: it is read at each
/// switch, and no invalidation is needed.
fn list_edited(ctx: &mut Ctx<'_>, vpid: bool) -> Verdict {
    let (vmx, other) = machine(ctx)?;
    let orders = Orders::default();
    let mut runner = Runner::new(ctx, &vmx, &orders, Program::WatchViews)?;
    let views = Views::new(ctx, &runner.vm.ept, 4, |_| false);
    vmcs::write(Field::EPT_POINTER, views.eptp(0));
    runner.vm.enable_eptp_switching(&vmx, views.list)?;
    if vpid {
        runner.vm.enable_vpid(&vmx, 3)?;
    }
    let eptps: [u64; 4] = core::array::from_fn(|view| views.eptp(view));
    let board = runner.board;
    // Entry 1 is the one that changes, among views 1 to 3.
    for view in 0..4 {
        views.data(view).write(0, POISON);
    }
    views.data(1).write(0, 0);
    runner.ready()?;
    beside(other, &mut runner, |remote| {
        remote.went_round()?;
        for round in 1..=2 * ROUNDS {
            let (old, next) = (1 + (round as usize - 1) % 3, 1 + round as usize % 3);
            views.data(next).write(0, round);
            views.list.write(1, eptps[next]);
            // What L2 reads here before a switch, it must not fall behind after it.
            board.write(1, round);
            remote.went_round()?;
            views.data(old).write(0, POISON);
        }
        Ok(())
    })
}
