//! Answers: what do the entries of all four levels allow together, and which of their bits matter?
//!
//! SDM Vol. 3C, "EPT Violations", "EPT Misconfigurations" and "Prioritization of EPT
//! Misconfigurations and EPT Violations".

use super::*;
use crate::vmx::{
    ept::{TABLE, index},
    paging::USER_RW,
};

macro_rules! product {
    ($name:literal, $permissions:literal) => {
        Case { name: concat!("ept.product.pml4e_", $name), run: |ctx| product(ctx, $permissions) }
    };
}

pub(super) const CASES: &[Case] = &[
    product!("none", 0),
    product!("r", 1),
    product!("rw", 3),
    product!("rx", 5),
    product!("x", 4),
    product!("rwx", 7),
    Case { name: "ept.each_bit.pml4e", run: |ctx| each_bit(ctx, 4, 1) },
    Case { name: "ept.each_bit.pdpte", run: |ctx| each_bit(ctx, 3, 1) },
    Case { name: "ept.each_bit.pde", run: |ctx| each_bit(ctx, 2, 1) },
    Case { name: "ept.each_bit.pte", run: |ctx| each_bit(ctx, 1, 1) },
    Case { name: "ept.each_bit.2m", run: |ctx| each_bit(ctx, 2, 2) },
    Case { name: "ept.each_bit.1g", run: |ctx| each_bit(ctx, 3, 3) },
    Case { name: "ept.each_bit.1g.bit_12", run: bit_12 },
    Case { name: "ept.priority.misconfigured_below_denied", run: below_denied },
    Case { name: "ept.priority.misconfigured_above_absent", run: above_absent },
    Case { name: "ept.priority.misconfigured_below_absent", run: below_absent },
    Case { name: "ept.violation.then_repointed.pde", run: |ctx| repointed(ctx, 2) },
    Case { name: "ept.violation.then_repointed.pdpte", run: |ctx| repointed(ctx, 3) },
    Case { name: "ept.violation.then_repointed.pml4e", run: |ctx| repointed(ctx, 4) },
    Case { name: "ept.highest_page", run: highest_page },
    Case { name: "ept.beyond_width.by_guest_entry", run: beyond_width },
];

/// Permissions that may stand in an entry.
const VALID: [u64; 6] = [0, 1, 3, 5, 4, 7];

/// L2 and one address of it whose tables, on all four levels, are its own.
pub(super) struct Far {
    pub(super) stage: Stage,
    /// The guest-physical address, less what lies in the page.
    pub(super) gpa: u64,
}

impl Far {
    /// With a page of the size that entries of the level `lowest` map.
    pub(super) fn new(ctx: &mut Ctx<'_>, lowest: u8) -> Result<Self, Stop> {
        let stage = Stage::new(ctx, Size::K4)?;
        let need = [EptVpidCap::empty(), EptVpidCap::PAGE_2M, EptVpidCap::PAGE_1G];
        if !stage.vmx.caps.ept.contains(need[usize::from(lowest) - 1]) {
            skip!("no pages of this size in EPT");
        }
        if stage.vmx.caps.width < 40 {
            skip!("physical addresses have fewer than 40 bits");
        }
        let mut far = Self { gpa: 1 << 39, stage };
        let entry = match lowest {
            1 => far.stage.page.address() | LEAF,
            2 => {
                let block = ctx.arena.block_2m();
                far.stage.page = Page::at(block.address() + 0x5000);
                block.address() | LEAF | LARGE
            }
            _ => LEAF | LARGE,
        };
        if lowest == 3 {
            far.gpa += far.stage.page.address();
        } else if lowest == 2 {
            far.gpa += 0x5000;
        }
        far.stage.page.write(1, VALUE);
        far.stage.page.put(0x20, VMCALL.bytes);
        far.stage.leaf = far.stage.vm.ept.map(ctx.arena, L2Gpa::new(far.gpa), lowest, entry);
        // What L2 sees at TARGET.
        far.stage.vm.paging.window.write(5, far.gpa | USER_RW);
        Ok(far)
    }

    pub(super) fn slot(&self, ctx: &mut Ctx<'_>, level: u8) -> Slot {
        self.stage.vm.ept.slot(ctx.arena, L2Gpa::new(self.gpa), level)
    }

    /// As [`Stage::access`]; what does not go through must be at this page.
    pub(super) fn access(&mut self, access: Access) -> Result<Option<Exit>, Stop> {
        let exit = self.stage.access(access)?.err();
        if let Some(exit) = exit {
            ensure_eq!(exit.gpa & !0xFFF, self.gpa, "guest-physical address of {access:?}");
        }
        Ok(exit)
    }

    /// L2 must be denied it; the permissions reported are these.
    fn denied(&mut self, access: Access, permissions: u64) -> Verdict {
        let Some(exit) = self.access(access)? else {
            crate::fail!("{access:?} went through permissions {permissions:#x}");
        };
        ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason of {access:?}");
        let expected = access.bit() | permissions << 3 | 0x180;
        ensure_eq!(exit.qualification & 0x1BF, expected, "qualification of {access:?}");
        Ok(())
    }

    fn allowed(&mut self, access: Access) -> Verdict {
        match self.access(access)? {
            None => Ok(()),
            Some(exit) => Err(Outcome::Exit(exit).into()),
        }
    }

    fn misconfigured(&mut self, access: Access) -> Verdict {
        let reason = self.access(access)?.map(|exit| exit.reason);
        ensure_eq!(reason, Some(ExitReason::EPT_MISCONFIGURATION), "exit reason of {access:?}");
        Ok(())
    }

    fn invept(&self) -> Verdict {
        crate::vmx::invept_single(self.stage.vm.ept.eptp(false))
    }
}

/// Every combination of permissions at the other three levels.
fn product(ctx: &mut Ctx<'_>, top: u64) -> Verdict {
    let mut far = Far::new(ctx, 1)?;
    let execute_only = far.stage.vmx.caps.ept.contains(EptVpidCap::EXECUTE_ONLY);
    if top == 4 && !execute_only {
        skip!("no execute-only translations");
    }
    let slots: [Slot; 4] = core::array::from_fn(|level| far.slot(ctx, level as u8 + 1));
    let full = slots.map(Slot::get);
    let set = |level: usize, permissions: u64| slots[level].set(full[level] & !7 | permissions);
    let valid = || VALID.into_iter().filter(|&permissions| permissions != 4 || execute_only);
    set(3, top);
    for pdpte in valid() {
        set(2, pdpte);
        for pde in valid() {
            set(1, pde);
            for pte in valid() {
                set(0, pte);
                far.invept()?;
                let all = top & pdpte & pde & pte;
                for access in [Access::Read, Access::Write, Access::Fetch] {
                    let result = if all & access.bit() != 0 {
                        far.allowed(access)
                    } else {
                        far.denied(access, all)
                    };
                    if let Err(stop) = result {
                        crate::println!("guest: PDPTE {pdpte:#x} PDE {pde:#x} PTE {pte:#x}");
                        return Err(stop);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Whether bit `bit`, flipped in an entry of `level` that allows everything and is write-back if it
/// maps a page, makes it a wrong one.
fn is_wrong(level: u8, maps: bool, bit: u32, width: u32, caps: EptVpidCap) -> bool {
    let address = match (level, maps) {
        (2, true) => 12..21,
        (3, true) => 12..30,
        _ => 0..0,
    };
    match bit {
        // Write without read.
        0 => true,
        // Memory types 7 and 2, where 6 was; 4 exists.
        3 | 5 if maps => true,
        4 if maps => false,
        3..=6 if !maps => true,
        // A page where none of this size is; a table where a page was.
        7 if level == 4 => true,
        7 if level == 3 && !maps => !caps.contains(EptVpidCap::PAGE_1G),
        _ => address.contains(&bit) || (width..52).contains(&bit),
    }
}

/// Each bit of an entry flipped, but for those of the address and the one that says what it is.
fn each_bit(ctx: &mut Ctx<'_>, level: u8, lowest: u8) -> Verdict {
    let mut far = Far::new(ctx, lowest)?;
    let (caps, width) = (far.stage.vmx.caps.ept, u32::from(far.stage.vmx.caps.width));
    let maps = level == lowest;
    let slot = far.slot(ctx, level);
    let good = slot.get();
    for bit in 0..64 {
        let shift = if maps { 3 + 9 * u32::from(level) } else { 12 };
        // Bit 12 of a large page has a case of its own.
        if (shift..width).contains(&bit)
            || bit == 7 && level != 4 && level != 1
            || bit == 12 && maps
        {
            continue;
        }
        slot.set(good ^ 1 << bit);
        far.invept()?;
        for access in [Access::Read, Access::Write, Access::Fetch] {
            let rights = (good ^ 1 << bit) & 7;
            let result = if is_wrong(level, maps, bit, width, caps) {
                far.misconfigured(access)
            } else if rights & access.bit() == 0 {
                far.denied(access, rights)
            } else {
                far.allowed(access)
            };
            if let Err(stop) = result {
                crate::println!("guest: bit {bit} of {good:#x} flipped");
                return Err(stop);
            }
        }
    }
    Ok(())
}

fn bit_12(ctx: &mut Ctx<'_>) -> Verdict {
    let mut far = Far::new(ctx, 3)?;
    let slot = far.slot(ctx, 3);
    slot.set(slot.get() | 1 << 12);
    far.misconfigured(Access::Read)
}

/// The walk goes on through an entry that denies the access: what it meets then counts first.
fn below_denied(ctx: &mut Ctx<'_>) -> Verdict {
    let mut far = Far::new(ctx, 1)?;
    let (pde, pte) = (far.slot(ctx, 2), far.slot(ctx, 1));
    pde.set(pde.get() & !2);
    pte.set(pte.get() & !7 | 2);
    far.misconfigured(Access::Write)?;
    far.misconfigured(Access::Read)?;
    pte.set(pte.get() | 7);
    far.invept()?;
    far.denied(Access::Write, 5)
}

fn above_absent(ctx: &mut Ctx<'_>) -> Verdict {
    let mut far = Far::new(ctx, 1)?;
    let (pdpte, pte) = (far.slot(ctx, 3), far.slot(ctx, 1));
    let good = pdpte.get();
    pte.set(0);
    pdpte.set(good | 1 << 4);
    far.misconfigured(Access::Read)?;
    pdpte.set(good);
    far.invept()?;
    far.denied(Access::Read, 0)
}

fn below_absent(ctx: &mut Ctx<'_>) -> Verdict {
    let mut far = Far::new(ctx, 1)?;
    let (pde, pte) = (far.slot(ctx, 2), far.slot(ctx, 1));
    let good = pde.get();
    pte.set(pte.get() & !7 | 6);
    pde.set(good & !7);
    far.denied(Access::Read, 0)?;
    pde.set(good);
    far.misconfigured(Access::Read)
}

/// A violation drops what was cached on the whole way: any entry on it may be pointed elsewhere then,
/// without INVEPT.
fn repointed(ctx: &mut Ctx<'_>, level: u8) -> Verdict {
    let mut far = Far::new(ctx, 1)?;
    let slot = far.slot(ctx, level);
    let (first, pte) = (slot.get(), far.stage.leaf);
    let second = far.stage.page;
    // Another way to a copy, from this level down.
    let copy = ctx.arena.page();
    copy.write(1, 0xC0B1);
    copy.put(0x20, VMCALL.bytes);
    let mut entry = copy.address() | LEAF;
    for below in 1..level {
        let table = ctx.arena.page();
        table.write(index(L2Gpa::new(far.gpa), below), entry);
        entry = table.address() | TABLE;
    }
    let full = pte.get();
    for _ in 0..3 {
        far.stage.page = second;
        pte.set(full & !2);
        far.invept()?;
        far.allowed(Access::Read)?;
        far.denied(Access::Write, 5)?;
        slot.set(entry);
        ensure_eq!(far.stage.vm.load(TARGET)?, 0xC0B1, "what L2 reads at the new page");
        far.stage.page = copy;
        far.stage.vm.store(TARGET, 0xC0B1)?;
        slot.set(first);
        pte.set(full);
    }
    Ok(())
}

/// The last page that a physical address can name.
fn highest_page(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    let gpa = (1_u64 << stage.vmx.caps.width.min(48)) - 0x1000;
    stage.vm.paging.window.write(5, gpa | USER_RW);
    let Err(exit) = stage.access(Access::Read)? else {
        crate::fail!("L2 reads where nothing is mapped");
    };
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa, gpa + 8, "guest-physical address");
    stage.leaf = stage.vm.ept.map(ctx.arena, L2Gpa::new(gpa), 1, stage.page.address() | LEAF);
    for access in [Access::Read, Access::Write, Access::Fetch] {
        stage.allowed(access)?;
    }
    Ok(())
}

/// Address bits beyond the width are reserved in L2's own entries: a page fault, not L1's affair.
fn beyond_width(ctx: &mut Ctx<'_>) -> Verdict {
    let mut stage = Stage::new(ctx, Size::K4)?;
    for bit in stage.vmx.caps.width..52 {
        stage.vm.paging.window.write(5, (WINDOW + 0x5000) | 1 << bit | USER_RW);
        let Err(exit) = stage.access(Access::Read)? else {
            crate::fail!("L2 reads through an entry with bit {bit}");
        };
        ensure_eq!(exit.exception(), Some(14), "vector (exit reason {:?})", exit.reason);
        ensure_eq!(exit.qualification, TARGET, "address of the page fault");
        let code = crate::vmx::vmcs::read(vmx_defs::Field::EXIT_INTR_ERROR);
        ensure_eq!(code, 9, "error code: present, reserved bit");
    }
    Ok(())
}
