//! Answers: does each of the 512 entries of a table go its own way, whatever an L0 made of all of them
//! at once?
//!
//! SDM Vol. 3C, "EPT Violations" and "Accessed and Dirty Flags for EPT": what is true of one entry
//! says nothing of the next one.

use vmx_defs::Field;

use super::*;
use crate::vmx::{
    ept::{ACCESSED, DIRTY},
    invept_single, vmcs,
};

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.neighbours.rights", run: |ctx| rights(ctx, false) },
    Case { name: "ept.neighbours.rights.accessed_dirty", run: |ctx| rights(ctx, true) },
    Case { name: "ept.neighbours.granted", run: granted },
    Case { name: "ept.neighbours.misconfigured", run: misconfigured },
    Case { name: "ept.neighbours.edited", run: |ctx| edited(ctx, false) },
    Case { name: "ept.neighbours.edited.accessed_dirty", run: |ctx| edited(ctx, true) },
    Case { name: "ept.neighbours.flags", run: |ctx| flags(ctx, false) },
    Case { name: "ept.neighbours.flags.2m", run: |ctx| flags(ctx, true) },
    Case { name: "ept.neighbours.flags.cleared", run: flags_cleared },
    Case { name: "ept.neighbours.directory", run: directory },
];

/// L2 and a table of 512 entries for its window. Each page begins with code, and its second word is
/// its number.
struct Table {
    stage: Stage,
    table: Page,
    /// Addresses of the pages.
    pages: Page,
    eptp: u64,
}

const NUMBER: u64 = 0x7AB1_0000;

impl Table {
    fn new(ctx: &mut Ctx<'_>, ad: bool) -> Result<Self, Stop> {
        let stage = Stage::new(ctx, Size::K4)?;
        if ad && !stage.vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
            skip!("no accessed and dirty flags for EPT");
        }
        let eptp = stage.vm.ept.eptp(ad);
        vmcs::write(Field::EPT_POINTER, eptp);
        let (table, pages) = (stage.leaf.table, ctx.arena.page());
        stage.leaf.set(0);
        for number in 0..512 {
            let page = ctx.arena.page();
            page.put(0, VMCALL.bytes);
            page.write(1, NUMBER + number as u64);
            pages.write(number, page.address());
        }
        Ok(Self { stage, table, pages, eptp })
    }

    /// The entry that shows page `number` with these permissions.
    fn entry(&self, number: usize, permissions: u64) -> u64 {
        self.pages.read(number) | LEAF & !7 | permissions
    }

    /// L2's access to entry `at`, which shows page `number`; the exit, if there is one.
    fn access(&mut self, at: usize, number: usize, access: Access) -> Result<Option<Exit>, Stop> {
        let address = WINDOW + at as u64 * 0x1000;
        let page = Page::at(self.pages.read(number));
        let vm = &mut self.stage.vm;
        let done = match access {
            Access::Read => vm
                .load(address + 8)
                .map(|read| (read == NUMBER + number as u64).then_some(()).ok_or(read)),
            Access::Write => {
                page.write(2, 0);
                vm.store(address + 16, 0x3317).map(|()| {
                    let found = page.read(2);
                    (found == 0x3317).then_some(()).ok_or(found)
                })
            }
            Access::Fetch => vm.fetch(address).map(|()| Ok(())),
        };
        match done {
            Ok(Ok(())) => Ok(None),
            Ok(Err(found)) => crate::fail!("{access:?} through entry {at} found {found:#x}"),
            Err(Outcome::Exit(exit)) => {
                ensure_eq!(exit.gpa & !0xFFF, address, "guest-physical address");
                Ok(Some(exit))
            }
            Err(other) => Err(other.into()),
        }
    }

    /// The access must end as an entry with these permissions has it.
    fn expect(&mut self, at: usize, number: usize, access: Access, permissions: u64) -> Verdict {
        let exit = self.access(at, number, access)?;
        let denied = exit.map(|exit| (exit.reason, exit.qualification & 0x1BF));
        let expected = (permissions & access.bit() == 0)
            .then_some((ExitReason::EPT_VIOLATION, access.bit() | permissions << 3 | 0x180));
        ensure_eq!(denied, expected, "{access:?} through entry {at}, permissions {permissions:#x}");
        Ok(())
    }

    fn permissions(&self, number: u64) -> u64 {
        let execute_only = self.stage.vmx.caps.ept.contains(EptVpidCap::EXECUTE_ONLY);
        [0, 1, 3, 5, 7, if execute_only { 4 } else { 0 }][number as usize % 6]
    }
}

/// Every permission beside every other.
fn rights(ctx: &mut Ctx<'_>, ad: bool) -> Verdict {
    let mut table = Table::new(ctx, ad)?;
    let mut dice = Dice(1);
    let mut permissions = [0_u8; 512];
    for (at, kind) in permissions.iter_mut().enumerate() {
        *kind = table.permissions(dice.below(6)) as u8;
        table.table.write(at, table.entry(at, u64::from(*kind)));
    }
    for _ in 0..3 * 512 {
        let (at, access) = (dice.below(512) as usize, ACCESSES[dice.below(3) as usize]);
        table.expect(at, at, access, u64::from(permissions[at]))?;
    }
    Ok(())
}

/// Entries become present, one by one, beside one that was used before: no invalidation is needed.
fn granted(ctx: &mut Ctx<'_>) -> Verdict {
    let mut table = Table::new(ctx, false)?;
    let mut dice = Dice(2);
    table.table.write(0, table.entry(0, 7));
    table.expect(0, 0, Access::Read, 7)?;
    for step in 1..512 {
        let at = step * 205 % 512;
        if dice.below(2) == 0 {
            table.expect(at, at, Access::Read, 0)?;
        }
        table.table.write(at, table.entry(at, 7));
        table.expect(at, at, ACCESSES[dice.below(3) as usize], 7)?;
    }
    Ok(())
}

/// Wrong entries beside right ones.
fn misconfigured(ctx: &mut Ctx<'_>) -> Verdict {
    let mut table = Table::new(ctx, false)?;
    let mut dice = Dice(3);
    let is_wrong = |at: usize| at % 3 == 1;
    for at in 0..512 {
        let wrong = [2, 6][at / 3 % 2];
        let entry = if is_wrong(at) { table.entry(at, wrong) } else { table.entry(at, 7) };
        table.table.write(at, if at % 6 == 4 { table.entry(at, 7) | 1 << 51 } else { entry });
    }
    for _ in 0..512 {
        let (at, access) = (dice.below(512) as usize, ACCESSES[dice.below(3) as usize]);
        let reason = table.access(at, at, access)?.map(|exit| exit.reason);
        let expected = is_wrong(at).then_some(ExitReason::EPT_MISCONFIGURATION);
        ensure_eq!(reason, expected, "{access:?} through entry {at}");
    }
    Ok(())
}

/// Entries change, some of them used and some not, and INVEPT makes all of that seen.
fn edited(ctx: &mut Ctx<'_>, ad: bool) -> Verdict {
    let mut table = Table::new(ctx, ad)?;
    let mut dice = Dice(4);
    let mut state = [(0_usize, 7_u64); 512];
    for (at, state) in state.iter_mut().enumerate() {
        state.0 = at;
        table.table.write(at, table.entry(at, 7));
    }
    for round in 0..8 {
        let changes = [1, 2, 16, 100, 512][round % 5];
        for _ in 0..changes {
            let at = dice.below(512) as usize;
            state[at] = (dice.below(512) as usize, table.permissions(dice.below(8)));
            table.table.write(at, table.entry(state[at].0, state[at].1));
        }
        invept_single(table.eptp)?;
        for _ in 0..200 {
            let (at, access) = (dice.below(512) as usize, ACCESSES[dice.below(3) as usize]);
            let (number, permissions) = state[at];
            table.expect(at, number, access, permissions)?;
        }
    }
    Ok(())
}

/// Flags are set in the entries that were used, and in no other.
fn flags(ctx: &mut Ctx<'_>, large: bool) -> Verdict {
    let mut table = Table::new(ctx, true)?;
    let mut dice = Dice(5);
    if large {
        // The window's linear pages are spread over 512 large pages of one directory.
        if !table.stage.vmx.caps.ept.contains(EptVpidCap::PAGE_2M) {
            skip!("no 2-MiB pages in EPT");
        }
        let gib = 2 << 30;
        let directory = table.stage.vm.ept.slot(ctx.arena, L2Gpa::new(gib), 2).table;
        for at in 0..512_u64 {
            let page = table.pages.read(at as usize);
            directory.write(at as usize, page & !0x1F_FFFF | LEAF | LARGE);
            let gpa = gib + (at << 21) + (page & 0x1F_F000);
            table.stage.vm.paging.window.write(at as usize, gpa | crate::vmx::paging::USER_RW);
        }
        table.table = directory;
    } else {
        for at in 0..512 {
            table.table.write(at, table.entry(at, 7));
        }
    }
    let mut expected = [0_u64; 512];
    for _ in 0..300 {
        let (at, access) = (dice.below(512) as usize, ACCESSES[dice.below(3) as usize]);
        let exit = if large {
            // Another guest-physical address than the window's.
            let address = WINDOW + at as u64 * 0x1000 + 8;
            match access {
                Access::Read => table.stage.vm.load(address).err(),
                Access::Write => table.stage.vm.store(address, NUMBER + at as u64).err(),
                Access::Fetch => table.stage.vm.fetch(address - 8).err(),
            }
        } else {
            table.access(at, at, access)?.map(Outcome::Exit)
        };
        if let Some(outcome) = exit {
            return Err(outcome.into());
        }
        expected[at] |= if access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
    }
    for (at, expected) in expected.into_iter().enumerate() {
        ensure_eq!(table.table.read(at) & (ACCESSED | DIRTY), expected, "flags of entry {at}");
    }
    Ok(())
}

/// Flags that L1 cleared, of some of many entries in use, come back with the next access only.
fn flags_cleared(ctx: &mut Ctx<'_>) -> Verdict {
    let mut table = Table::new(ctx, true)?;
    let mut dice = Dice(6);
    for at in 0..512 {
        table.table.write(at, table.entry(at, 7) | ACCESSED | DIRTY);
    }
    let mut expected = [ACCESSED | DIRTY; 512];
    for round in 0..6 {
        for _ in 0..[3, 60, 600][round % 3] {
            let at = dice.below(512) as usize;
            let cleared = [ACCESSED, DIRTY, ACCESSED | DIRTY][dice.below(3) as usize];
            expected[at] &= !cleared;
            table.table.write(at, table.table.read(at) & !cleared);
        }
        invept_single(table.eptp)?;
        for _ in 0..150 {
            let (at, access) = (dice.below(512) as usize, ACCESSES[dice.below(3) as usize]);
            table.expect(at, at, access, 7)?;
            expected[at] |= if access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
        }
        for (at, expected) in expected.into_iter().enumerate() {
            let found = table.table.read(at) & (ACCESSED | DIRTY);
            ensure_eq!(found, expected, "flags of entry {at} in round {round}");
        }
    }
    Ok(())
}

/// Entries of a page directory: tables, large pages and nothing, beside each other.
fn directory(ctx: &mut Ctx<'_>) -> Verdict {
    let mut table = Table::new(ctx, false)?;
    if !table.stage.vmx.caps.ept.contains(EptVpidCap::PAGE_2M) {
        skip!("no 2-MiB pages in EPT");
    }
    let mut dice = Dice(7);
    let gib = 2 << 30;
    let directory = table.stage.vm.ept.slot(ctx.arena, L2Gpa::new(gib), 2).table;
    for round in 0..4 {
        let mut kinds = [0_u8; 512];
        for at in 0..512_u64 {
            let page = table.pages.read(at as usize);
            let within = page >> 12 & 511;
            kinds[at as usize] = dice.below(3) as u8;
            let entry = match kinds[at as usize] {
                0 => 0,
                1 => page & !0x1F_FFFF | LEAF | LARGE,
                _ => {
                    let below = ctx.arena.page();
                    below.write(within as usize, page | LEAF);
                    below.address() | crate::vmx::ept::TABLE
                }
            };
            directory.write(at as usize, entry);
            let gpa = gib + (at << 21) + (within << 12);
            table.stage.vm.paging.window.write(at as usize, gpa | crate::vmx::paging::USER_RW);
        }
        invept_single(table.eptp)?;
        for _ in 0..300 {
            let at = dice.below(512) as usize;
            let address = WINDOW + at as u64 * 0x1000 + 8;
            match table.stage.vm.load(address) {
                Ok(read) => {
                    ensure_eq!(read, NUMBER + at as u64, "what L2 reads through entry {at}");
                    ensure_eq!(kinds[at] != 0, true, "entry {at} is present, round {round}");
                }
                Err(Outcome::Exit(exit)) if exit.reason == ExitReason::EPT_VIOLATION => {
                    ensure_eq!(kinds[at], 0, "kind of entry {at}, round {round}");
                    ensure_eq!(exit.qualification & 0x1BF, 0x181, "qualification");
                }
                Err(other) => return Err(other.into()),
            }
        }
    }
    Ok(())
}
