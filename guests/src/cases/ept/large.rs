//! Answers: do large pages show what they must where what lies below them is not of one piece, and
//! when they become tables and tables become large pages?
//!
//! SDM Vol. 3C, "EPT Translation Mechanism". The first MiB has memory types by small ranges, the local
//! APIC's page is a device, and an L0 may keep memory of its own from L1: none of that shows in the
//! size of a page that L1 maps.

use vmx_defs::{Field, msr};

use super::{levels::Far, *};
use crate::{
    ensure, l2_code,
    vmx::{
        ept::{ACCESSED, DIRTY, TABLE},
        paging::USER_RW,
        vmcs,
    },
};

pub(super) const CASES: &[Case] = &[
    Case { name: "ept.large.low_memory.2m", run: |ctx| low_memory(ctx, 2, false) },
    Case { name: "ept.large.low_memory.1g", run: |ctx| low_memory(ctx, 3, false) },
    Case { name: "ept.large.low_memory.2m.accessed_dirty", run: |ctx| low_memory(ctx, 2, true) },
    Case { name: "ept.large.low_memory.1g.accessed_dirty", run: |ctx| low_memory(ctx, 3, true) },
    Case { name: "ept.large.local_apic.2m", run: |ctx| local_apic(ctx, 2) },
    Case { name: "ept.large.local_apic.1g", run: |ctx| local_apic(ctx, 3) },
    Case { name: "ept.large.1g.split_and_joined", run: split_1g },
    Case { name: "ept.large.1g.rights", run: rights_1g },
];

l2_code! {
    load_32: "mov eax, [rbx]";
}

/// L2 and a large page of it at 2 GiB that maps memory from `address` on.
fn stage(ctx: &mut Ctx<'_>, level: u8, address: u64, kind: u64) -> Result<Stage, Stop> {
    const GIB: u64 = 2 << 30;
    let mut stage = Stage::new(ctx, Size::K4)?;
    let need = if level == 2 { EptVpidCap::PAGE_2M } else { EptVpidCap::PAGE_1G };
    if !stage.vmx.caps.ept.contains(need) {
        skip!("no pages of this size in EPT");
    }
    let size = 1_u64 << (3 + 9 * u32::from(level));
    let base = address & !(size - 1);
    let entry = base | LEAF & !0x38 | kind << 3 | LARGE;
    stage.leaf = stage.vm.ept.map(ctx.arena, L2Gpa::new(GIB), level, entry);
    // The window shows the 512 pages from `address` on.
    for page in 0..512 {
        let gpa = GIB + (address - base) + page as u64 * 0x1000;
        stage.vm.paging.window.write(page, gpa | USER_RW);
    }
    Ok(stage)
}

/// What L1 reads there.
fn own(address: u64) -> u64 {
    // SAFETY: RAM or ROM below 4 GiB, which the boot tables map; reading has no effect.
    unsafe { (address as *const u64).read_volatile() }
}

/// The first 2 MiB: every page is what it is for L1, and a write goes where it must.
fn low_memory(ctx: &mut Ctx<'_>, level: u8, ad: bool) -> Verdict {
    /// A page below 1 MiB that nobody uses.
    const FREE: u64 = 0x9000;
    const LOWEST: u64 = 0x1000;
    let mut stage = stage(ctx, level, 0, 6)?;
    if ad && !stage.vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
        skip!("no accessed and dirty flags for EPT");
    }
    let eptp = stage.vm.ept.eptp(ad);
    vmcs::write(Field::EPT_POINTER, eptp);
    let with = |flags: u64| if ad { flags } else { 0 };
    // The clock that the BIOS keeps is in page 0, the display's memory from A0000H to BFFFFH.
    for at in (LOWEST..1 << 21).step_by(0x1000).filter(|at| !(0xA_0000..0xC_0000).contains(at)) {
        ensure_eq!(stage.vm.load(WINDOW + at + 0x10)?, own(at + 0x10), "what L2 reads at {at:#x}");
    }
    let found = stage.leaf.get() & (ACCESSED | DIRTY);
    ensure_eq!(found, with(ACCESSED), "flags after reads");
    let before = own(FREE);
    for round in 0..3 {
        stage.vm.store(WINDOW + FREE, 0x10_0000 + round)?;
        ensure_eq!(own(FREE), 0x10_0000 + round, "what L2 wrote");
        let found = stage.leaf.get() & (ACCESSED | DIRTY);
        ensure_eq!(found, with(ACCESSED | DIRTY), "flags after a write");
        stage.leaf.set(stage.leaf.get() & !(ACCESSED | DIRTY));
        crate::vmx::invept_single(eptp)?;
        // Another piece of the same page.
        let at = 0xF_0000 + round * 0x1000;
        ensure_eq!(stage.vm.load(WINDOW + at)?, own(at), "what L2 reads at {at:#x}");
        let found = stage.leaf.get() & (ACCESSED | DIRTY);
        ensure_eq!(found, with(ACCESSED), "flags after a read of another piece");
    }
    stage.vm.store(WINDOW + FREE, before)?;
    // Read-only, it is so in every piece.
    stage.leaf.set(stage.leaf.get() & !2);
    crate::vmx::invept_single(eptp)?;
    for at in [LOWEST, FREE, 0x7_F000, 0x10_0000, 0x1F_F000] {
        ensure_eq!(stage.vm.load(WINDOW + at)?, own(at), "what L2 reads at {at:#x}");
        let exit = match stage.vm.store(WINDOW + at, 0) {
            Err(outcome) => outcome.exit()?,
            Ok(()) => crate::fail!("L2 wrote at {at:#x}"),
        };
        ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
        ensure_eq!(exit.qualification & 0x1BF, 0x1AA, "qualification");
    }
    Ok(())
}

/// The local APIC's registers within a large page.
fn local_apic(ctx: &mut Ctx<'_>, level: u8) -> Verdict {
    const VERSION: u64 = 0x30;
    let register = crate::vmx::rdmsr(msr::APIC_BASE);
    if register & 0xC00 != 0x800 {
        skip!("no local APIC in xAPIC mode (IA32_APIC_BASE {register:#x})");
    }
    let base = register & 0xF_FFFF_F000;
    let mut stage = stage(ctx, level, base, 0)?;
    // SAFETY: a register of the local APIC that can only be read, mapped with the low 4 GiB.
    let version = unsafe { ((base + VERSION) as *const u32).read_volatile() };
    ensure!(version != 0 && version != !0, "the local APIC's version is {version:#x}");
    stage.vm.registers.rbx = WINDOW + VERSION;
    stage.vm.exec_at(load_32())?;
    ensure_eq!(stage.vm.registers.rax, version.into(), "the version as L2 reads it");
    Ok(())
}

/// A 1-GiB page, tables of 2-MiB pages and of small pages take turns.
fn split_1g(ctx: &mut Ctx<'_>) -> Verdict {
    let mut far = Far::new(ctx, 3)?;
    let caps = far.stage.vmx.caps.ept;
    if !caps.contains(EptVpidCap::PAGE_2M) {
        skip!("no 2-MiB pages in EPT");
    }
    let slot = far.slot(ctx, 3);
    let whole = slot.get();
    let page = far.stage.page.address();
    let (block, within) = ((page >> 21) as usize & 511, (page >> 12) as usize & 511);
    // The same memory by 2-MiB pages, but for the one that holds the page.
    let directory = ctx.arena.page();
    for index in 0..512_u64 {
        directory.write(index as usize, index << 21 | LEAF | LARGE);
    }
    let other_block = ctx.arena.block_2m();
    let (other, table) = (ctx.arena.page(), ctx.arena.page());
    Page::at(other_block.address() + within as u64 * 0x1000).write(1, 0xB10C);
    other.write(1, 0x5A11);
    table.write(within, other.address() | LEAF);
    let eptp = far.stage.vm.ept.eptp(false);
    for _ in 0..3 {
        for (upper, lower, value) in [
            (whole, 0, VALUE),
            (directory.address() | TABLE, (block as u64) << 21 | LEAF | LARGE, VALUE),
            (directory.address() | TABLE, other_block.address() | LEAF | LARGE, 0xB10C),
            (directory.address() | TABLE, table.address() | TABLE, 0x5A11),
        ] {
            directory.write(block, lower);
            slot.set(upper);
            crate::vmx::invept_single(eptp)?;
            ensure_eq!(far.stage.vm.load(TARGET)?, value, "what L2 reads");
        }
    }
    Ok(())
}

/// Every permission of a 1-GiB page.
fn rights_1g(ctx: &mut Ctx<'_>) -> Verdict {
    let mut far = Far::new(ctx, 3)?;
    let execute_only = far.stage.vmx.caps.ept.contains(EptVpidCap::EXECUTE_ONLY);
    let slot = far.slot(ctx, 3);
    let full = slot.get();
    for permissions in [0, 1, 3, 5, 7, 4, 0, 7] {
        if permissions == 4 && !execute_only {
            continue;
        }
        slot.set(full & !7 | permissions);
        crate::vmx::invept_single(far.stage.vm.ept.eptp(false))?;
        for access in [Access::Read, Access::Write, Access::Fetch] {
            let exit = far.access(access)?;
            let found = exit.map(|exit| (exit.reason, exit.qualification & 0x1BF));
            let expected = (permissions & access.bit() == 0)
                .then_some((ExitReason::EPT_VIOLATION, access.bit() | permissions << 3 | 0x180));
            ensure_eq!(found, expected, "{access:?} with permissions {permissions:#x}");
        }
    }
    Ok(())
}
