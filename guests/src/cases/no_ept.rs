//! Answers: can L1 virtualize L2's memory without EPT, by page tables of its own making?
//!
//! SDM Vol. 3C, "Instructions That Cause VM Exits Conditionally" (MOV CR3, INVLPG), "Changes to
//! Instruction Behavior in VMX Non-Root Operation", "Loading Page-Directory-Pointer-Table Entries";
//! what used to be chapter "Memory Virtualization". L2's CR3 then names tables by L1's own physical
//! addresses.

use vmx_defs::{ExitReason, Field, L2Gpa, ProcCtls, ProcCtls2, event::vector, exit::CrAccess};

use crate::{
    ensure_eq,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        Exit, Mode, Op, Outcome, Vm, Vmx,
        paging::{Paging, USER_RW, WINDOW},
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "no_ept.shadow_paging", run: |ctx| shadow_paging(ctx, false) },
    Case { name: "no_ept.shadow_paging.with_vpid", run: |ctx| shadow_paging(ctx, true) },
    Case { name: "no_ept.page_fault.each_access", run: page_faults },
    Case { name: "no_ept.guest_flags", run: guest_flags },
    Case { name: "no_ept.pae.mov_cr3", run: pae_mov_cr3 },
    Case { name: "no_ept.pae.mov_cr3.reserved", run: pae_mov_cr3_reserved },
    Case { name: "no_ept.alternate.one_vmcs", run: |ctx| alternate_one(ctx, Mode::Long) },
    Case { name: "no_ept.alternate.one_vmcs.pae", run: |ctx| alternate_one(ctx, Mode::Pae) },
    Case { name: "no_ept.alternate.two_vmcss", run: |ctx| alternate_two(ctx, false) },
    Case { name: "no_ept.alternate.two_vmcss.with_vpid", run: |ctx| alternate_two(ctx, true) },
];

const EPT: u32 = ProcCtls2::EPT.bits();

/// L2 without EPT, all of whose MOV to CR3 and INVLPG exit if `exits`.
fn l2(ctx: &mut Ctx<'_>, mode: Mode, exits: bool) -> Result<(Vmx, Vm), Stop> {
    let vmx = Vmx::on(ctx)?;
    let vm = Vm::new(ctx, &vmx, mode)?;
    if !vmx.caps.basic.true_controls() {
        skip!("CR3-load exiting can't be off");
    }
    vmcs::change(Field::PROC_CTLS2, 0, EPT.into());
    if exits {
        let controls = ProcCtls::CR3_LOAD_EXITING | ProcCtls::INVLPG_EXITING;
        vmcs::change(Field::PROC_CTLS, controls.bits().into(), 0);
    }
    Ok((vmx, vm))
}

/// Spaces and pages of the L2 that L1 makes page tables for.
const SPACES: usize = 3;
const PAGES: usize = 24;

/// An L1 with shadow page tables. What L2 believes its tables are is a list of pages for each space.
struct Shadow {
    vm: Vm,
    vpid: Option<u16>,
    /// What L2's tables say: addresses of pages, or 0.
    said: [Page; SPACES],
    /// What the processor walks.
    walked: [Paging; SPACES],
    space: usize,
    faults: u32,
}

impl Shadow {
    /// L2's value of CR3 for a space; no table is there.
    fn cr3(space: usize) -> u64 {
        0x7000_0000 + (space as u64) * 0x1000
    }

    fn invalidate(&self, address: u64) -> Verdict {
        let Some(vpid) = self.vpid else { return Ok(()) };
        // SAFETY: drops cached translations only.
        let result = unsafe { vmx_hw::invvpid(0, [vpid.into(), address]) };
        ensure_eq!(result, Ok(()), "INVVPID of an address");
        Ok(())
    }

    /// Serves L2's exits until its VMCALL.
    fn run(&mut self, op: Op) -> Result<(), Outcome> {
        vmcs::write(Field::GUEST_RIP, op.address(Mode::Long));
        loop {
            let outcome = self.vm.run();
            let Outcome::Exit(exit) = outcome else { return Err(outcome) };
            match exit.reason {
                ExitReason::VMCALL => return Ok(()),
                ExitReason::CR_ACCESS => self.load_cr3(&exit).map_err(|()| outcome)?,
                ExitReason::INVLPG => {
                    let entry = self.entry(exit.qualification).ok_or(outcome)?;
                    self.walked[self.space].window.write(entry, 0);
                    self.invalidate(exit.qualification).map_err(|_| outcome)?;
                    vmcs::write(Field::GUEST_RIP, exit.rip + exit.length);
                }
                ExitReason::EXCEPTION_OR_NMI if exit.exception() == Some(vector::PF) => {
                    let entry = self.entry(exit.qualification).ok_or(outcome)?;
                    let page = self.said[self.space].read(entry);
                    if page == 0 {
                        return Err(outcome);
                    }
                    self.faults += 1;
                    self.walked[self.space].window.write(entry, page | USER_RW);
                }
                _ => return Err(outcome),
            }
        }
    }

    /// The entry of the window's tables for an address.
    fn entry(&self, address: u64) -> Option<usize> {
        (WINDOW..WINDOW + 0x20_0000).contains(&address).then(|| ((address - WINDOW) >> 12) as usize)
    }

    /// L2's MOV to CR3 from RAX.
    fn load_cr3(&mut self, exit: &Exit) -> Result<(), ()> {
        let access = CrAccess::from(exit.qualification);
        if (access.register(), access.access(), access.gpr()) != (3, 0, 0) {
            return Err(());
        }
        let value = self.vm.registers.rax;
        self.space = (0..SPACES).find(|space| Self::cr3(*space) == value).ok_or(())?;
        vmcs::write(Field::GUEST_CR3, self.walked[self.space].cr3);
        if let Some(vpid) = self.vpid {
            // SAFETY: drops cached translations only.
            unsafe { vmx_hw::invvpid(1, [vpid.into(), 0]) }.map_err(|_| ())?;
        }
        vmcs::write(Field::GUEST_RIP, exit.rip + exit.length);
        Ok(())
    }
}

fn shadow_paging(ctx: &mut Ctx<'_>, vpid: bool) -> Verdict {
    let (vmx, vm) = l2(ctx, Mode::Long, true)?;
    let vpid = vpid.then_some(6);
    if let Some(vpid) = vpid {
        use vmx_defs::msr::EptVpidCap;
        let needed = EptVpidCap::INVVPID | EptVpidCap::INVVPID_ADDRESS | EptVpidCap::INVVPID_SINGLE;
        if !vmx.caps.ept.contains(needed) {
            skip!("{needed:?} not offered");
        }
        vm.enable_vpid(&vmx, vpid)?;
    }
    let walked = core::array::from_fn(|_| {
        let paging = Paging::new(ctx.arena, Mode::Long);
        paging.window.fill(0);
        paging
    });
    let said = core::array::from_fn(|_| ctx.arena.page());
    let mut shadow = Shadow { vm, vpid, said, walked, space: 0, faults: 0 };
    let pages: [Page; 48] = core::array::from_fn(|number| {
        let page = ctx.arena.page();
        page.write(0, 0x9A6E_0000 + number as u64);
        page
    });
    let number =
        |space: usize, page: usize, change: usize| (space * 17 + page * 5 + change * 7) % 48;
    for space in 0..SPACES {
        for page in 0..PAGES {
            shadow.said[space].write(page, pages[number(space, page, 0)].address());
        }
    }
    vmcs::write(Field::GUEST_CR3, shadow.walked[0].cr3);
    let mut changes = [[0_usize; PAGES]; SPACES];
    for step in 0..200_usize {
        let (space, page) = (step * 7 % SPACES, step * 11 % PAGES);
        if shadow.space != space {
            shadow.vm.registers.rax = Shadow::cr3(space);
            shadow.run(Op::LoadCr3)?;
        }
        if step % 3 == 0 {
            // L2 changes its table and says so.
            changes[space][page] += 1;
            let shown = number(space, page, changes[space][page]);
            shadow.said[space].write(page, pages[shown].address());
            shadow.vm.registers.rbx = WINDOW + page as u64 * 0x1000;
            shadow.run(Op::Invlpg)?;
        }
        let address = WINDOW + page as u64 * 0x1000;
        let shown = pages[number(space, page, changes[space][page])];
        shadow.vm.registers.rbx = address;
        shadow.run(Op::Load)?;
        ensure_eq!(shadow.vm.registers.rax, shown.read(0), "what L2 reads in step {step}");
        shadow.vm.registers.rbx = address + 8;
        shadow.vm.registers.rax = step as u64;
        shadow.run(Op::Store)?;
        ensure_eq!(shown.read(1), step as u64, "what L2 wrote in step {step}");
    }
    ensure_eq!(shadow.faults > 50, true, "page faults served");
    // What L2's tables do not have is L2's own affair.
    shadow.said[shadow.space].write(PAGES, 0);
    shadow.vm.registers.rbx = WINDOW + PAGES as u64 * 0x1000;
    let exit = match shadow.run(Op::Load) {
        Err(outcome) => outcome.exit()?,
        Ok(()) => crate::fail!("L2 reads what nothing maps"),
    };
    ensure_eq!(exit.exception(), Some(vector::PF), "vector");
    Ok(())
}

/// The error code that L1 gets of a page fault says what was done and what was wrong.
fn page_faults(ctx: &mut Ctx<'_>) -> Verdict {
    const READ_ONLY: u64 = USER_RW & !2;
    const NO_EXECUTE: u64 = 1 << 63;
    let (_, mut vm) = l2(ctx, Mode::Long, false)?;
    let page = ctx.arena.page();
    // CR0.WP is set, as L1's, and the entries are those of user pages: no SMEP, no SMAP.
    for (entry, op, code) in [
        (0, Op::Load, 0),
        (0, Op::Store, 2),
        (0, Op::Fetch, 0x10),
        (page.address() | READ_ONLY, Op::Store, 3),
        (page.address() | USER_RW | NO_EXECUTE, Op::Fetch, 0x11),
        (page.address() | USER_RW | 1 << 51, Op::Load, 9),
    ] {
        vm.paging.window.write(0, entry);
        vm.registers.rbx = WINDOW + 0x18;
        let exit = match vm.exec(op) {
            Err(outcome) => outcome.exit()?,
            Ok(()) => crate::fail!("{op:?} went through {entry:#x}"),
        };
        ensure_eq!(exit.exception(), Some(vector::PF), "vector of {op:?}, {:?}", exit.reason);
        ensure_eq!(exit.qualification, WINDOW + 0x18, "address of {op:?}");
        let found = vmcs::read(Field::EXIT_INTR_ERROR);
        ensure_eq!(found, code, "error code of {op:?} through {entry:#x}");
    }
    Ok(())
}

/// The processor sets the flags in the tables that L2's CR3 names.
fn guest_flags(ctx: &mut Ctx<'_>) -> Verdict {
    const PRESENT: u64 = 7;
    let (_, mut vm) = l2(ctx, Mode::Long, false)?;
    let page = ctx.arena.page();
    for round in 0..3 {
        vm.paging.window.write(0, page.address() | PRESENT);
        vm.load(WINDOW)?;
        let found = vm.paging.window.read(0) & 0x60;
        ensure_eq!(found, 0x20, "flags after a read in round {round}");
        vm.store(WINDOW, round)?;
        let found = vm.paging.window.read(0) & 0x60;
        ensure_eq!(found, 0x60, "flags after a write in round {round}");
    }
    Ok(())
}

/// A second map for PAE paging, in which the window shows `page`.
fn pae_map(ctx: &mut Ctx<'_>, page: Page) -> Paging {
    let paging = Paging::new(ctx.arena, Mode::Pae);
    paging.window.write(0, page.address() | USER_RW);
    paging
}

/// MOV to CR3 loads the PDPTEs from L1's memory.
fn pae_mov_cr3(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx, Mode::Pae, false)?;
    let pages = [ctx.arena.page(), ctx.arena.page()];
    let maps = pages.map(|page| pae_map(ctx, page));
    pages[0].write(0, 0x700);
    pages[1].write(0, 0x701);
    for round in 0..6_usize {
        let which = round % 2;
        vm.load_cr3(maps[which].cr3)?;
        ensure_eq!(vmcs::read(Field::GUEST_CR3), maps[which].cr3, "guest CR3");
        ensure_eq!(vm.load(WINDOW)?, 0x700 + which as u64, "what L2 reads in round {round}");
        // The tables change places, which the next VM entry sees.
        if round == 3 {
            let (first, second) = (maps[0].root.read(1), maps[1].root.read(1));
            maps[0].root.write(1, second);
            maps[1].root.write(1, first);
            ensure_eq!(vm.load(WINDOW)?, 0x700, "what L2 reads after the change");
            maps[0].root.write(1, first);
            maps[1].root.write(1, second);
        }
    }
    Ok(())
}

fn pae_mov_cr3_reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx, Mode::Pae, false)?;
    let (own, other) = (vm.paging.cr3, Paging::new(ctx.arena, Mode::Pae));
    let good = other.root.read(2);
    for bad in [1 | 2, 1 | 1 << 8, 1 | 1 << 63] {
        other.root.write(2, bad);
        let exit = match vm.load_cr3(other.cr3) {
            Err(outcome) => outcome.exit()?,
            Ok(()) => crate::fail!("MOV to CR3 with PDPTE {bad:#x}"),
        };
        ensure_eq!(exit.exception(), Some(vector::GP), "vector with PDPTE {bad:#x}");
        ensure_eq!(vmcs::read(Field::EXIT_INTR_ERROR), 0, "error code");
        ensure_eq!(vmcs::read(Field::GUEST_CR3), own, "guest CR3");
    }
    other.root.write(2, good);
    vm.load_cr3(other.cr3)?;
    Ok(())
}

/// One VMCS with EPT, then without, and so on: the window is one page by L2's tables alone, another
/// by the EPT.
fn alternate_one(ctx: &mut Ctx<'_>, mode: Mode) -> Verdict {
    let (_, mut vm) = l2(ctx, mode, false)?;
    let (own, mapped) = (ctx.arena.page(), ctx.arena.page());
    own.write(0, 0x0E7);
    mapped.write(0, 0xE97);
    vm.paging.window.write(0, own.address() | USER_RW);
    // The page that L2's table names is another one through the EPT: out of its first GiB.
    let gpa = WINDOW + 0x4000;
    vm.map(ctx, L2Gpa::new(gpa), mapped);
    for round in 0..10 {
        let with = round % 3 != 0;
        let (set, clear) = if with { (EPT, 0) } else { (0, EPT) };
        vmcs::change(Field::PROC_CTLS2, set.into(), clear.into());
        let entry = if with { gpa } else { own.address() };
        vm.paging.window.write(0, entry | USER_RW);
        if mode == Mode::Pae {
            vm.load_pdptes();
        }
        let expected = if with { 0xE97 } else { 0x0E7 };
        ensure_eq!(vm.load(WINDOW)?, expected, "what L2 reads in round {round}");
        vm.store(WINDOW + 8, round)?;
        let page = if with { mapped } else { own };
        ensure_eq!(page.read(1) & 0xFFFF_FFFF, round, "what L2 wrote in round {round}");
        if with {
            let exit = match vm.load(WINDOW + 0x1000) {
                Err(outcome) => outcome.exit()?,
                Ok(_) => crate::fail!("L2 reads what its EPT does not map"),
            };
            ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
        }
    }
    Ok(())
}

/// An L2 with EPT and one without, in turn, also with the one's tables used by the other.
fn alternate_two(ctx: &mut Ctx<'_>, vpid: bool) -> Verdict {
    let (vmx, mut without) = l2(ctx, Mode::Long, false)?;
    let mut with = Vm::new(ctx, &vmx, Mode::Long)?;
    if vpid {
        with.enable_vpid(&vmx, 1)?;
        without.make_current()?;
        without.enable_vpid(&vmx, 2)?;
    }
    let (own, mapped) = (ctx.arena.page(), ctx.arena.page());
    without.paging.window.write(0, own.address() | USER_RW);
    with.map(ctx, L2Gpa::new(WINDOW), mapped);
    for round in 0..12 {
        own.write(0, 0x100 + round);
        mapped.write(0, 0x200 + round);
        without.make_current()?;
        ensure_eq!(without.load(WINDOW)?, 0x100 + round, "what L2 without EPT reads");
        without.store(WINDOW + 8, round)?;
        with.make_current()?;
        ensure_eq!(with.load(WINDOW)?, 0x200 + round, "what L2 with EPT reads");
        with.store(WINDOW + 8, !round)?;
        ensure_eq!((own.read(1), mapped.read(1)), (round, !round), "what both wrote");
    }
    Ok(())
}
