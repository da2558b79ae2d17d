//! Answers: does every access through tables that change at random end as a walk of them says?
//!
//! A few tables of each level point at each other in any way, with any rights, now and then wrong,
//! under several EPTPs with and without accessed and dirty flags. After each batch of changes all is
//! invalidated; then the outcome of each access follows from the tables alone (SDM Vol. 3C, "EPT
//! Translation Mechanism"), flags included.

use arrayvec::ArrayVec;
use vmx_defs::Field;

use super::*;
use crate::vmx::{
    ept::{ACCESSED, DIRTY, TABLE},
    paging::USER_RW,
    vmcs,
};

macro_rules! case {
    ($name:literal, $seed:literal) => {
        Case { name: concat!("ept.random.", $name), run: |ctx| random(ctx, $seed) }
    };
}

pub(super) const CASES: &[Case] =
    &[case!("1", 1), case!("2", 2), case!("3", 3), case!("4", 4), case!("5", 5), case!("6", 6)];

const BATCHES: u64 = 40;
const ACCESSES_EACH: u64 = 30;

/// The entries that a table has, at each level but the highest.
const INDEXES: [usize; 4] = [0, 1, 7, 511];
const ROOTS: usize = 6;
/// Tables of levels 1 to 3.
const TABLES: [usize; 3] = [6, 4, 3];
const SMALL: usize = 12;
const FLAGS: u64 = ACCESSED | DIRTY;

/// How a walk ends.
struct Walk {
    /// The entries used, the highest first.
    path: ArrayVec<Slot, 4>,
    /// The rights of all of them; `None` where one is wrong.
    rights: Option<u64>,
    /// Where the page is.
    page: u64,
}

struct World {
    stage: Stage,
    dice: Dice,
    roots: ArrayVec<Page, ROOTS>,
    eptps: ArrayVec<u64, ROOTS>,
    tables: [ArrayVec<Page, 6>; 3],
    small: ArrayVec<Page, SMALL>,
    large: [Page; 2],
    rights: ArrayVec<u64, 6>,
}

/// Guest-physical address number `number`, of 64.
fn gpa(number: usize) -> u64 {
    let index = |shift: usize| INDEXES[number >> shift & 3] as u64;
    1 << 39 | index(4) << 30 | index(2) << 21 | index(0) << 12
}

impl World {
    fn new(ctx: &mut Ctx<'_>, seed: u64) -> Result<Self, Stop> {
        let stage = Stage::new(ctx, Size::K4)?;
        let caps = stage.vmx.caps;
        let needed = EptVpidCap::PAGE_2M | EptVpidCap::INVEPT | EptVpidCap::INVEPT_ALL;
        if caps.width < 40 || !caps.ept.contains(needed | EptVpidCap::ACCESSED_DIRTY) {
            skip!("no 2-MiB pages, INVEPT, or flags, or fewer than 40 address bits");
        }
        let list = ctx.arena.page();
        stage.vm.enable_eptp_switching(&stage.vmx, list)?;
        let mut world = Self {
            dice: Dice(seed),
            roots: (0..ROOTS).map(|_| ctx.arena.page()).collect(),
            eptps: ArrayVec::new(),
            tables: TABLES.map(|count| (0..count).map(|_| ctx.arena.page()).collect()),
            small: (0..SMALL).map(|_| ctx.arena.page()).collect(),
            large: [ctx.arena.block_2m(), ctx.arena.block_2m()],
            rights: [7, 7, 5, 3, 1, 0].into_iter().collect(),
            stage,
        };
        if caps.ept.contains(EptVpidCap::EXECUTE_ONLY) {
            world.rights[5] = 4;
        }
        for (number, root) in world.roots.iter().enumerate() {
            root.write(0, world.stage.vm.ept.root.read(0));
            let flags = if number % 2 == 0 { 0 } else { crate::vmx::ept::AD };
            let eptp = root.address() | crate::vmx::ept::EPTP_FLAGS | flags;
            world.eptps.push(eptp);
            list.write(number, eptp);
        }
        let blocks = world.large.into_iter().flat_map(|block| {
            INDEXES.into_iter().map(move |index| Page::at(block.address() + index as u64 * 0x1000))
        });
        for page in world.small.iter().copied().chain(blocks) {
            page.write(1, page.address());
            page.put(0x20, VMCALL.bytes);
        }
        for number in 0..64 {
            world.stage.vm.paging.window.write(number, gpa(number) | USER_RW);
        }
        for root in 0..ROOTS {
            let slot = Slot { table: world.roots[root], index: 1 };
            slot.set(world.entry(4));
        }
        for level in 1..=3_u8 {
            for table in 0..TABLES[usize::from(level) - 1] {
                for index in INDEXES {
                    let table = world.tables[usize::from(level) - 1][table];
                    table.write(index, world.entry(level));
                }
            }
        }
        Ok(world)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.dice.below(limit as u64) as usize
    }

    /// Any entry for a table of `level`.
    fn entry(&mut self, level: u8) -> u64 {
        let rights = match self.below(24) {
            0 => 0,
            1 => 2,
            2 => 6,
            other if level == 1 || other > 16 => {
                let choice = self.below(6);
                self.rights[choice]
            }
            _ => 7,
        };
        let flags = [0, ACCESSED, FLAGS, 0][self.below(4)];
        let leaf = LEAF & !7;
        let rest = match level {
            1 => {
                let choice = self.below(SMALL);
                self.small[choice].address() | leaf
            }
            2 if self.below(3) == 0 => {
                let choice = self.below(2);
                self.large[choice].address() | leaf | LARGE
            }
            _ => {
                let lower = usize::from(level) - 2;
                let choice = self.below(TABLES[lower]);
                self.tables[lower][choice].address() | TABLE & !7
            }
        };
        // The dirty flag is one of pages only.
        let flags = if level == 1 || rest & LARGE != 0 { flags } else { flags & ACCESSED };
        rest | rights | flags
    }

    /// Changes an entry: as a whole, its rights, or its flags.
    fn edit(&mut self) {
        let level = [1, 1, 1, 2, 2, 3, 4][self.below(7)];
        let slot = if level == 4 {
            let root = self.below(ROOTS);
            Slot { table: self.roots[root], index: 1 }
        } else {
            let number = usize::from(level) - 1;
            let table = self.below(TABLES[number]);
            Slot { table: self.tables[number][table], index: INDEXES[self.below(4)] }
        };
        match self.below(3) {
            0 => slot.set(slot.get() & !FLAGS),
            1 => {
                let choice = self.below(6);
                slot.set(slot.get() & !7 | self.rights[choice]);
            }
            _ => slot.set(self.entry(level)),
        }
    }

    fn walk(&self, root: usize, gpa: u64) -> Walk {
        let mut walk = Walk { path: ArrayVec::new(), rights: Some(7), page: 0 };
        let mut table = self.roots[root];
        for level in (1..=4_u8).rev() {
            let slot = Slot { table, index: crate::vmx::ept::index(L2Gpa::new(gpa), level) };
            let entry = slot.get();
            walk.path.push(slot);
            match entry & 7 {
                2 | 6 => {
                    walk.rights = None;
                    return walk;
                }
                0 => {
                    walk.rights = Some(0);
                    return walk;
                }
                rights => walk.rights = walk.rights.map(|all| all & rights),
            }
            let address = entry & 0xFF_FFFF_F000;
            if level == 1 {
                walk.page = address;
            } else if entry & LARGE != 0 {
                walk.page = address | gpa & 0x1F_F000;
                return walk;
            } else {
                table = Page::at(address);
            }
        }
        walk
    }

    /// One access, which must end as the walk says, and set the flags that it must.
    fn step(&mut self) -> Verdict {
        let (root, number) = (self.below(ROOTS), self.below(64));
        let access = ACCESSES[self.below(3)];
        let flagged = root % 2 == 1;
        if self.below(2) == 0 {
            self.stage.vm.vmfunc(0, root as u64)?;
            ensure_eq!(vmcs::read(Field::EPT_POINTER), self.eptps[root], "EPT pointer");
        } else {
            vmcs::write(Field::EPT_POINTER, self.eptps[root]);
        }
        let walk = self.walk(root, gpa(number));
        let before: ArrayVec<u64, 4> = walk.path.iter().map(|slot| slot.get()).collect();
        let address = WINDOW + number as u64 * 0x1000;
        let vm = &mut self.stage.vm;
        let result = match access {
            Access::Read => vm.load(address + 8).map(|read| read == walk.page),
            Access::Write => vm.store(address + 16, number as u64 + 1).map(|()| {
                let page = Page::at(walk.page);
                let right = page.read(2) == number as u64 + 1;
                page.write(2, 0);
                right
            }),
            Access::Fetch => vm.fetch(address + 0x20).map(|()| true),
        };
        let found = match result {
            Ok(right) => {
                ensure_eq!(right, true, "{access:?} was of the page at {:#x}", walk.page);
                None
            }
            Err(Outcome::Exit(exit)) => {
                ensure_eq!(exit.gpa & !0xFFF, gpa(number), "guest-physical address");
                let violation = exit.reason == ExitReason::EPT_VIOLATION;
                Some((exit.reason, if violation { exit.qualification & 0x1BF } else { 0 }))
            }
            Err(other) => return Err(other.into()),
        };
        let expected = match walk.rights {
            None => Some((ExitReason::EPT_MISCONFIGURATION, 0)),
            Some(rights) if rights & access.bit() == 0 => {
                Some((ExitReason::EPT_VIOLATION, access.bit() | rights << 3 | 0x180))
            }
            Some(_) => None,
        };
        ensure_eq!(found, expected, "{access:?} at {:#x} through root {root}", gpa(number));
        for (level, (slot, before)) in walk.path.iter().zip(before).enumerate() {
            let leaf = level + 1 == walk.path.len();
            let mut after = before;
            if flagged {
                after |= ACCESSED;
                if leaf && access == Access::Write {
                    after |= DIRTY;
                }
            }
            // Where the access was denied, entries above may have been marked as used, or not.
            let entry = slot.get();
            let either = expected.is_some() && entry & !ACCESSED == before & !ACCESSED;
            if !either || !flagged {
                let wanted = if expected.is_some() { before } else { after };
                ensure_eq!(entry, wanted, "entry {level} of the way after {access:?}");
            }
        }
        Ok(())
    }
}

fn random(ctx: &mut Ctx<'_>, seed: u64) -> Verdict {
    let mut world = World::new(ctx, seed)?;
    for batch in 0..BATCHES {
        for _ in 0..[1, 3, 10, 30][batch as usize % 4] {
            world.edit();
        }
        let eptp = world.eptps[0];
        if world.below(2) == 0 {
            for eptp in world.eptps.clone() {
                crate::vmx::invept_single(eptp)?;
            }
        } else {
            // SAFETY: drops cached translations only.
            let result = unsafe { vmx_hw::invept(2, [eptp, 0]) };
            ensure_eq!(result, Ok(()), "INVEPT of all contexts");
        }
        if batch == BATCHES / 2 {
            world.stage.vm.enable_vpid(&world.stage.vmx, 3)?;
        }
        for step in 0..ACCESSES_EACH {
            if let Err(stop) = world.step() {
                crate::println!("guest: batch {batch}, step {step}");
                return Err(stop);
            }
        }
    }
    Ok(())
}
