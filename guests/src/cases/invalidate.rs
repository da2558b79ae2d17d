//! Answers: what do INVEPT and INVVPID accept, and does what they invalidate take effect?
//!
//! SDM Vol. 3D, "INVEPT—Invalidate Translations Derived from EPT" and "INVVPID—Invalidate
//! Translations Based on VPID"; Vol. 3C, "Operations that Invalidate Cached Mappings".

use vmx_defs::{ExitReason, Field, L2Gpa, ept::Eptp, msr::EptVpidCap};
use vmx_hw::{VmFail, VmxResult};

use crate::{
    ensure, ensure_eq,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        self, Ept, Mode, Op, Outcome, Vm, Vmx,
        ept::{ACCESSED, AD, DIRTY, LARGE, LEAF, TABLE},
        paging::{USER_RW, WINDOW},
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "invept.single", run: invept_single },
    Case { name: "invept.all", run: invept_all },
    Case { name: "invept.unsupported_type", run: invept_types },
    Case { name: "invept.unsupported_type.upper_half", run: invept_wide_types },
    Case { name: "invept.each_eptp_bit", run: invept_bits },
    Case { name: "invept.reserved", run: invept_reserved },
    Case { name: "invept.without_current", run: invept_no_current },
    Case { name: "invvpid.address", run: |ctx| invvpid_succeeds(ctx, ADDRESS) },
    Case { name: "invvpid.single", run: |ctx| invvpid_succeeds(ctx, SINGLE) },
    Case { name: "invvpid.all", run: |ctx| invvpid_succeeds(ctx, ALL) },
    Case { name: "invvpid.retain_globals", run: |ctx| invvpid_succeeds(ctx, GLOBALS) },
    Case { name: "invvpid.unsupported_type", run: invvpid_types },
    Case { name: "invvpid.unsupported_type.upper_half", run: invvpid_wide_types },
    Case { name: "invvpid.reserved", run: invvpid_reserved },
    Case { name: "invvpid.vpid_zero", run: invvpid_zero },
    Case { name: "invvpid.not_canonical", run: invvpid_canonical },
    Case { name: "invvpid.without_current", run: invvpid_no_current },
    Case { name: "invept.seen.repointed_4k", run: |ctx| repointed(ctx, 1) },
    Case { name: "invept.seen.repointed_2m", run: |ctx| repointed(ctx, 2) },
    Case { name: "invept.seen.repointed_by_all", run: repointed_all },
    Case { name: "invept.seen.unmapped", run: unmapped },
    Case { name: "invept.seen.unmapped_above", run: unmapped_above },
    Case { name: "invept.seen.split_and_joined", run: split },
    Case { name: "invept.seen.table_moved", run: table_moved },
    Case { name: "invept.seen.many", run: many },
    Case { name: "invept.seen.shared_table", run: shared_table },
    Case { name: "invept.seen.with_vpid", run: with_vpid },
    Case { name: "invept.seen.same_ep4ta.flags_on", run: |ctx| same_ep4ta(ctx, 0, AD) },
    Case { name: "invept.seen.same_ep4ta.flags_off", run: |ctx| same_ep4ta(ctx, AD, 0) },
    Case { name: "invept.seen.same_ep4ta.memory_type", run: |ctx| same_ep4ta(ctx, 0, 6) },
    Case { name: "invept.seen.same_ep4ta.both", run: |ctx| same_ep4ta(ctx, AD, 6) },
    Case { name: "invept.seen.accessed_dirty_2m", run: accessed_dirty },
    Case { name: "invept.neighbours_stay", run: neighbours },
    Case { name: "invvpid.seen.address", run: |ctx| remapped(ctx, ADDRESS) },
    Case { name: "invvpid.seen.single", run: |ctx| remapped(ctx, SINGLE) },
    Case { name: "invvpid.seen.all", run: |ctx| remapped(ctx, ALL) },
    Case { name: "invvpid.seen.retain_globals", run: |ctx| remapped(ctx, GLOBALS) },
    Case { name: "invvpid.seen.another_vpid", run: another_vpid },
    Case { name: "vpid.off.entry_invalidates", run: vpid_off },
    Case { name: "vpid.two_guests", run: two_guests },
];

const ADDRESS: u64 = 0;
const SINGLE: u64 = 1;
const ALL: u64 = 2;
const GLOBALS: u64 = 3;

/// VMX operation with a current VMCS.
fn root(ctx: &mut Ctx<'_>) -> Result<Vmx, Stop> {
    let vmx = Vmx::on(ctx)?;
    let region = vmx.region(ctx);
    ensure_eq!(vmx::vmclear(region), Ok(()), "VMCLEAR");
    ensure_eq!(vmx::vmptrld(region), Ok(()), "VMPTRLD");
    Ok(vmx)
}

fn need(vmx: &Vmx, caps: EptVpidCap) -> Verdict {
    if !vmx.caps.ept.contains(caps) {
        skip!("{caps:?} not offered");
    }
    Ok(())
}

fn invept(kind: u64, descriptor: [u64; 2]) -> VmxResult {
    // SAFETY: drops cached translations only.
    unsafe { vmx_hw::invept(kind, descriptor) }
}

fn invvpid(kind: u64, descriptor: [u64; 2]) -> VmxResult {
    // SAFETY: drops cached translations only.
    unsafe { vmx_hw::invvpid(kind, descriptor) }
}

/// VMfailValid with "invalid operand to INVEPT/INVVPID".
fn expect_refused(result: VmxResult, what: core::fmt::Arguments<'_>) -> Verdict {
    ensure_eq!(result, Err(VmFail::Valid), "{what}");
    ensure_eq!(vmcs::read(Field::VM_INSTRUCTION_ERROR), 28, "error of {what}");
    // The next one must write the number again.
    // SAFETY: a VMWRITE that fails: the encoding names no field.
    let other = unsafe { vmx_hw::vmwrite_raw(0x6C3E, 0) };
    ensure_eq!(other, Err(VmFail::Valid), "VMWRITE of no field");
    Ok(())
}

fn invept_single(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVEPT | EptVpidCap::INVEPT_SINGLE)?;
    let ept = Ept::empty(ctx.arena);
    ensure_eq!(invept(1, [ept.eptp(false), 0]), Ok(()), "INVEPT of an EPTP never used");
    if vmx.caps.ept.contains(EptVpidCap::ACCESSED_DIRTY) {
        ensure_eq!(invept(1, [ept.eptp(true), 0]), Ok(()), "INVEPT of an EPTP with flags");
    }
    Ok(())
}

fn invept_all(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVEPT | EptVpidCap::INVEPT_ALL)?;
    // The EPTP of the descriptor does not matter.
    for eptp in [0, 0x1234_5678_9ABC_DEF0, !0] {
        ensure_eq!(invept(2, [eptp, 0]), Ok(()), "INVEPT of all contexts, EPTP {eptp:#x}");
    }
    Ok(())
}

fn invept_types(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVEPT)?;
    let eptp = Ept::empty(ctx.arena).eptp(false);
    for kind in [0, 3, 4, 0x100, 1 << 31, !0] {
        expect_refused(invept(kind, [eptp, 0]), format_args!("INVEPT of type {kind:#x}"))?;
    }
    Ok(())
}

/// In 64-bit mode the type is a 64-bit operand.
fn invept_wide_types(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVEPT)?;
    let eptp = Ept::empty(ctx.arena).eptp(false);
    for kind in [1 << 32 | 1, 1 << 32 | 2, 1 << 63 | 1] {
        expect_refused(invept(kind, [eptp, 0]), format_args!("INVEPT of type {kind:#x}"))?;
    }
    Ok(())
}

/// A single-context INVEPT refuses what VM entry refuses in the EPT-pointer field.
fn invept_bits(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVEPT | EptVpidCap::INVEPT_SINGLE)?;
    let good = Ept::empty(ctx.arena).eptp(false);
    for bit in 0..64 {
        let eptp = good ^ 1 << bit;
        if Eptp::from(eptp).is_valid(vmx.caps.ept, vmx.caps.width) {
            ensure_eq!(invept(1, [eptp, 0]), Ok(()), "INVEPT, bit {bit} of the EPTP flipped");
        } else {
            let what = format_args!("INVEPT, bit {bit} of the EPTP flipped");
            expect_refused(invept(1, [eptp, 0]), what)?;
        }
    }
    Ok(())
}

/// Bits 127:64 of the descriptor must be zero.
fn invept_reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVEPT | EptVpidCap::INVEPT_SINGLE)?;
    let eptp = Ept::empty(ctx.arena).eptp(false);
    for high in [1, 1 << 31, 1 << 32, 1 << 63, !0] {
        expect_refused(invept(1, [eptp, high]), format_args!("INVEPT, bits 127:64 {high:#x}"))?;
    }
    Ok(())
}

/// Without a current VMCS the failure is VMfailInvalid.
fn invept_no_current(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    need(&vmx, EptVpidCap::INVEPT | EptVpidCap::INVEPT_ALL)?;
    ensure_eq!(invept(9, [0, 0]), Err(VmFail::Invalid), "INVEPT of type 9");
    ensure_eq!(invept(2, [0, 0]), Ok(()), "INVEPT of all contexts");
    Ok(())
}

fn type_cap(kind: u64) -> EptVpidCap {
    EptVpidCap::INVVPID
        | match kind {
            ADDRESS => EptVpidCap::INVVPID_ADDRESS,
            SINGLE => EptVpidCap::INVVPID_SINGLE,
            ALL => EptVpidCap::INVVPID_ALL,
            _ => EptVpidCap::INVVPID_RETAIN_GLOBALS,
        }
}

fn invvpid_succeeds(ctx: &mut Ctx<'_>, kind: u64) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, type_cap(kind))?;
    for vpid in [1, 0x1234, 0xFFFF] {
        for address in [0, WINDOW, 0x7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000] {
            ensure_eq!(invvpid(kind, [vpid, address]), Ok(()), "INVVPID of VPID {vpid:#x}");
        }
    }
    Ok(())
}

fn invvpid_types(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVVPID)?;
    for kind in [4, 5, 0x100, 1 << 31, !0] {
        expect_refused(invvpid(kind, [1, 0]), format_args!("INVVPID of type {kind:#x}"))?;
    }
    for kind in [ADDRESS, SINGLE, ALL, GLOBALS] {
        if !vmx.caps.ept.contains(type_cap(kind)) {
            expect_refused(invvpid(kind, [1, 0]), format_args!("INVVPID of type {kind:#x}"))?;
        }
    }
    Ok(())
}

/// In 64-bit mode the type is a 64-bit operand.
fn invvpid_wide_types(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVVPID)?;
    for kind in [1 << 32, 1 << 32 | 1, 1 << 63 | 2] {
        expect_refused(invvpid(kind, [1, 0]), format_args!("INVVPID of type {kind:#x}"))?;
    }
    Ok(())
}

/// Bits 63:16 of the descriptor must be zero, whatever the type.
fn invvpid_reserved(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVVPID)?;
    for kind in [ADDRESS, SINGLE, ALL, GLOBALS] {
        if !vmx.caps.ept.contains(type_cap(kind)) {
            continue;
        }
        for bit in 16..64 {
            let what = format_args!("INVVPID of type {kind}, bit {bit} of the descriptor set");
            expect_refused(invvpid(kind, [1 | 1 << bit, 0]), what)?;
        }
    }
    Ok(())
}

/// VPID 0000H can't be named; a type that names none ignores it.
fn invvpid_zero(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, EptVpidCap::INVVPID)?;
    for kind in [ADDRESS, SINGLE, GLOBALS] {
        if vmx.caps.ept.contains(type_cap(kind)) {
            expect_refused(invvpid(kind, [0, 0]), format_args!("INVVPID, type {kind}, VPID 0"))?;
        }
    }
    if vmx.caps.ept.contains(type_cap(ALL)) {
        ensure_eq!(invvpid(ALL, [0, 0]), Ok(()), "INVVPID of all contexts, VPID 0");
    }
    Ok(())
}

fn invvpid_canonical(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = root(ctx)?;
    need(&vmx, type_cap(ADDRESS))?;
    for address in [1 << 47, 1 << 62, 0xFFFF_7FFF_FFFF_FFFF] {
        let what = format_args!("INVVPID of address {address:#x}");
        expect_refused(invvpid(ADDRESS, [1, address]), what)?;
        // The other types have no address.
        for kind in [SINGLE, ALL, GLOBALS] {
            if vmx.caps.ept.contains(type_cap(kind)) {
                ensure_eq!(invvpid(kind, [1, address]), Ok(()), "INVVPID of type {kind}");
            }
        }
    }
    Ok(())
}

fn invvpid_no_current(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    need(&vmx, type_cap(ALL))?;
    ensure_eq!(invvpid(9, [1, 0]), Err(VmFail::Invalid), "INVVPID of type 9");
    ensure_eq!(invvpid(ALL, [1, 0]), Ok(()), "INVVPID of all contexts");
    Ok(())
}

/// A page that begins with `value`.
fn page(ctx: &mut Ctx<'_>, value: u64) -> Page {
    let page = ctx.arena.page();
    page.write(0, value);
    page
}

fn l2(ctx: &mut Ctx<'_>) -> Result<(Vmx, Vm), Stop> {
    let vmx = Vmx::on(ctx)?;
    need(&vmx, EptVpidCap::INVEPT)?;
    let vm = Vm::new(ctx, &vmx, Mode::Long)?;
    Ok((vmx, vm))
}

fn reads(vm: &mut Vm, address: u64, value: u64) -> Verdict {
    ensure_eq!(vm.load(address)?, value, "what L2 reads at {address:#x}");
    Ok(())
}

fn violates(result: Result<u64, Outcome>, gpa: u64) -> Verdict {
    let exit = match result {
        Err(outcome) => outcome.exit()?,
        Ok(value) => crate::fail!("L2 reads {value:#x} where nothing is mapped"),
    };
    ensure_eq!(exit.reason, ExitReason::EPT_VIOLATION, "exit reason");
    ensure_eq!(exit.gpa, gpa, "guest-physical address");
    ensure_eq!(exit.qualification & 0x3F, 1, "access and permissions");
    Ok(())
}

fn repointed(ctx: &mut Ctx<'_>, level: u8) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    let eptp = vm.ept.eptp(false);
    let (pages, flags) = if level == 2 {
        need(&vmx, EptVpidCap::PAGE_2M)?;
        ([ctx.arena.block_2m(), ctx.arena.block_2m()], LEAF | LARGE)
    } else {
        ([ctx.arena.page(), ctx.arena.page()], LEAF)
    };
    for (index, page) in pages.into_iter().enumerate() {
        page.write(3, 0xA000 + index as u64);
    }
    let slot = vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), level, pages[0].address() | flags);
    for round in 0..4 {
        let index = round % 2;
        slot.set(pages[index].address() | flags);
        vmx::invept_single(eptp)?;
        reads(&mut vm, WINDOW + 24, 0xA000 + index as u64)?;
        vm.store(WINDOW + 0x100, round as u64)?;
        ensure_eq!(pages[index].read(0x20), round as u64, "what L2 wrote in round {round}");
    }
    Ok(())
}

fn repointed_all(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    need(&vmx, EptVpidCap::INVEPT_ALL)?;
    let pages = [page(ctx, 1), page(ctx, 2), page(ctx, 3)];
    let slot = vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    for page in [1, 2, 0, 2] {
        slot.set(pages[page].address() | LEAF);
        ensure_eq!(invept(2, [0, 0]), Ok(()), "INVEPT of all contexts");
        reads(&mut vm, WINDOW, page as u64 + 1)?;
    }
    Ok(())
}

fn unmapped(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let eptp = vm.ept.eptp(false);
    let page = page(ctx, 7);
    let slot = vm.map(ctx, L2Gpa::new(WINDOW), page);
    for _ in 0..3 {
        reads(&mut vm, WINDOW, 7)?;
        slot.set(0);
        vmx::invept_single(eptp)?;
        violates(vm.load(WINDOW), WINDOW)?;
        // Growth needs no INVEPT after the violation.
        slot.set(page.address() | LEAF);
    }
    Ok(())
}

/// An entry of each upper level removed, and put back.
fn unmapped_above(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    if vmx.caps.width < 40 {
        skip!("physical addresses have fewer than 40 bits");
    }
    let eptp = vm.ept.eptp(false);
    let page = page(ctx, 7);
    // A gpa with a PML4 entry of its own, seen at the window's second page.
    let gpa = 1 << 39;
    vm.map(ctx, L2Gpa::new(gpa), page);
    vm.paging.window.write(1, gpa | USER_RW);
    for level in [2, 3, 4, 2] {
        reads(&mut vm, WINDOW + 0x1000, 7)?;
        let slot = vm.ept.slot(ctx.arena, L2Gpa::new(gpa), level);
        let entry = slot.get();
        slot.set(0);
        vmx::invept_single(eptp)?;
        violates(vm.load(WINDOW + 0x1000), gpa)?;
        slot.set(entry);
    }
    reads(&mut vm, WINDOW + 0x1000, 7)
}

/// A 2-MiB page becomes 512 small ones that lie elsewhere, and a large one again.
fn split(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    need(&vmx, EptVpidCap::PAGE_2M)?;
    let eptp = vm.ept.eptp(false);
    let (block, table) = (ctx.arena.block_2m(), ctx.arena.page());
    let own = page(ctx, 0x5A11);
    block.write(0, 0xB16);
    for index in 0..512_u64 {
        table.write(index as usize, (block.address() + (511 - index) * 0x1000) | LEAF);
    }
    table.write(5, own.address() | LEAF);
    let slot = vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), 2, block.address() | LEAF | LARGE);
    for _ in 0..3 {
        reads(&mut vm, WINDOW, 0xB16)?;
        reads(&mut vm, WINDOW + 511 * 0x1000, 0)?;
        reads(&mut vm, WINDOW + 5 * 0x1000, 0)?;
        slot.set(table.address() | TABLE);
        vmx::invept_single(eptp)?;
        reads(&mut vm, WINDOW, 0)?;
        reads(&mut vm, WINDOW + 511 * 0x1000, 0xB16)?;
        reads(&mut vm, WINDOW + 5 * 0x1000, 0x5A11)?;
        slot.set(block.address() | LEAF | LARGE);
        vmx::invept_single(eptp)?;
    }
    Ok(())
}

/// A page directory replaced by another.
fn table_moved(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let eptp = vm.ept.eptp(false);
    let pages = [page(ctx, 1), page(ctx, 2)];
    vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    let upper = vm.ept.slot(ctx.arena, L2Gpa::new(WINDOW), 3);
    let first = upper.get();
    let (directory, table) = (ctx.arena.page(), ctx.arena.page());
    table.write(0, pages[1].address() | LEAF);
    directory.write(0, table.address() | TABLE);
    for round in 0..4 {
        let (entry, value) =
            if round % 2 == 0 { (first, 1) } else { (directory.address() | TABLE, 2) };
        upper.set(entry);
        vmx::invept_single(eptp)?;
        reads(&mut vm, WINDOW, value)?;
    }
    Ok(())
}

/// Many entries of one table changed under one INVEPT.
fn many(ctx: &mut Ctx<'_>) -> Verdict {
    const PAGES: u64 = 64;
    let (_, mut vm) = l2(ctx)?;
    let eptp = vm.ept.eptp(false);
    let pages: [Page; PAGES as usize] =
        core::array::from_fn(|index| page(ctx, 0x100 + index as u64));
    for round in 0..3 {
        for index in 0..PAGES {
            // Every third entry is absent, others rotate.
            let entry = if (index + round) % 3 == 0 {
                0
            } else {
                pages[((index * 5 + round) % PAGES) as usize].address() | LEAF
            };
            vm.ept.map(ctx.arena, L2Gpa::new(WINDOW + index * 0x1000), 1, entry);
        }
        vmx::invept_single(eptp)?;
        for index in 0..PAGES {
            let address = WINDOW + index * 0x1000;
            if (index + round) % 3 == 0 {
                violates(vm.load(address), address)?;
            } else {
                reads(&mut vm, address, 0x100 + (index * 5 + round) % PAGES)?;
            }
        }
    }
    Ok(())
}

/// Two EPTPs share a table: a change in it is seen in both, each after its own INVEPT.
fn shared_table(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let first = vm.ept;
    let pages = [page(ctx, 1), page(ctx, 2)];
    let slot = vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    let second = first.fork(ctx.arena);
    let upper = first.slot(ctx.arena, L2Gpa::new(WINDOW), 3).get();
    second.slot(ctx.arena, L2Gpa::new(WINDOW), 3).set(upper);
    for round in 0..4_usize {
        slot.set(pages[round % 2].address() | LEAF);
        for ept in [first, second] {
            vmx::invept_single(ept.eptp(false))?;
        }
        for ept in [first, second, first] {
            vmcs::write(Field::EPT_POINTER, ept.eptp(false));
            reads(&mut vm, WINDOW, round as u64 % 2 + 1)?;
        }
    }
    Ok(())
}

/// EPTPs that differ in other bits than the table's address share what is cached: INVEPT of one is
/// INVEPT of the other. The bits are flipped in the EPTP without flags and with write-back tables.
fn same_ep4ta(ctx: &mut Ctx<'_>, runs: u64, invalidates: u64) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    need(&vmx, EptVpidCap::INVEPT_SINGLE)?;
    if (runs | invalidates) & AD != 0 {
        need(&vmx, EptVpidCap::ACCESSED_DIRTY)?;
    }
    if (runs | invalidates) & 6 != 0 {
        need(&vmx, EptVpidCap::MEMORY_TYPE_UC)?;
    }
    let eptp = vm.ept.eptp(false);
    let (runs, invalidates) = (eptp ^ runs, eptp ^ invalidates);
    let pages = [page(ctx, 0), page(ctx, 1)];
    let slot = vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    for round in 0..8_usize {
        let (shown, next) = (round % 2, (round + 1) % 2);
        // In half of the rounds the one that invalidates has been used, too.
        if round / 2 % 2 == 1 {
            vmcs::write(Field::EPT_POINTER, invalidates);
            reads(&mut vm, WINDOW, shown as u64)?;
            ensure_eq!(invept(1, [runs, 0]), Ok(()), "INVEPT between");
        }
        vmcs::write(Field::EPT_POINTER, runs);
        reads(&mut vm, WINDOW, shown as u64)?;
        if runs & AD != 0 {
            ensure_eq!(slot.get() & ACCESSED, ACCESSED, "accessed flag in round {round}");
        }
        slot.set(pages[next].address() | LEAF);
        ensure_eq!(invept(1, [invalidates, 0]), Ok(()), "INVEPT");
        reads(&mut vm, WINDOW, next as u64)?;
        ensure_eq!(vmcs::read(Field::EPT_POINTER), runs, "EPT pointer");
    }
    Ok(())
}

/// INVEPT concerns all VPIDs.
fn with_vpid(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    let eptp = vm.ept.eptp(false);
    let pages = [page(ctx, 1), page(ctx, 2)];
    let slot = vm.map(ctx, L2Gpa::new(WINDOW), pages[0]);
    for round in 0..4_usize {
        for vpid in [1, 7, 0xFFFF] {
            vm.enable_vpid(&vmx, vpid)?;
            reads(&mut vm, WINDOW, round as u64 % 2 + 1)?;
        }
        slot.set(pages[(round + 1) % 2].address() | LEAF);
        vmx::invept_single(eptp)?;
    }
    Ok(())
}

/// Flags of a large page that L1 cleared are set again, also where the page was mapped before.
fn accessed_dirty(ctx: &mut Ctx<'_>) -> Verdict {
    const FLAGS: u64 = ACCESSED | DIRTY;
    let (vmx, mut vm) = l2(ctx)?;
    need(&vmx, EptVpidCap::ACCESSED_DIRTY | EptVpidCap::PAGE_2M)?;
    let eptp = vm.ept.eptp(true);
    vmcs::write(Field::EPT_POINTER, eptp);
    let block = ctx.arena.block_2m();
    let slot = vm.ept.map(ctx.arena, L2Gpa::new(WINDOW), 2, block.address() | LEAF | LARGE);
    let upper = vm.ept.slot(ctx.arena, L2Gpa::new(WINDOW), 3);
    for round in 0..3 {
        vm.store(WINDOW + 0x1000 * round, round)?;
        ensure_eq!(slot.get() & FLAGS, FLAGS, "flags after write {round}");
        slot.set(slot.get() & !FLAGS);
        upper.set(upper.get() & !ACCESSED);
        vmx::invept_single(eptp)?;
        reads(&mut vm, WINDOW + 0x2000, if round == 2 { 2 } else { 0 })?;
        ensure_eq!(slot.get() & FLAGS, ACCESSED, "flags after read {round}");
        ensure_eq!(upper.get() & ACCESSED, ACCESSED, "the flag above after read {round}");
        // The write that follows the read makes it dirty without another INVEPT.
        vm.store(WINDOW + 0x3000, round)?;
        ensure_eq!(slot.get() & FLAGS, FLAGS, "flags after the write that follows {round}");
        slot.set(slot.get() & !FLAGS);
        vmx::invept_single(eptp)?;
    }
    Ok(())
}

/// Entries that L1 did not change go on as they were: no violation reaches L1 for them.
fn neighbours(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let eptp = vm.ept.eptp(false);
    let pages: [Page; 8] = core::array::from_fn(|index| page(ctx, index as u64 + 1));
    for (index, page) in pages.into_iter().enumerate() {
        vm.map(ctx, L2Gpa::new(WINDOW + index as u64 * 0x1000), page);
    }
    for reduced in 0..8_u64 {
        let at = WINDOW + reduced * 0x1000;
        let page = pages[reduced as usize];
        vm.ept.map(ctx.arena, L2Gpa::new(at), 1, page.address() | LEAF & !2);
        vmx::invept_single(eptp)?;
        for index in 0..8_u64 {
            let address = WINDOW + index * 0x1000;
            reads(&mut vm, address, index + 1)?;
            let outcome = vm.store(address + 8, index);
            ensure_eq!(outcome.is_ok(), index > reduced, "write to page {index} of 8");
        }
    }
    Ok(())
}

/// L2 reads at [`WINDOW`] what its own table maps there.
fn map_window(vm: &Vm, page: Page, flags: u64) {
    vm.paging.window.write(0, page.address() | USER_RW | flags);
}

/// L1 changes L2's page table and executes INVVPID: L2 sees the new mapping.
fn remapped(ctx: &mut Ctx<'_>, kind: u64) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    need(&vmx, type_cap(kind))?;
    let pages = [page(ctx, 1), page(ctx, 2)];
    vm.enable_vpid(&vmx, 5)?;
    for round in 0..4_usize {
        map_window(&vm, pages[round % 2], 0);
        ensure_eq!(invvpid(kind, [5, WINDOW]), Ok(()), "INVVPID of type {kind}");
        reads(&mut vm, WINDOW, round as u64 % 2 + 1)?;
    }
    Ok(())
}

/// What L2 may see after an INVVPID for another VPID: the old mapping or the new one.
fn another_vpid(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, mut vm) = l2(ctx)?;
    need(&vmx, type_cap(SINGLE))?;
    let pages = [page(ctx, 1), page(ctx, 2)];
    vm.enable_vpid(&vmx, 5)?;
    map_window(&vm, pages[0], 0);
    reads(&mut vm, WINDOW, 1)?;
    map_window(&vm, pages[1], 0);
    ensure_eq!(invvpid(SINGLE, [6, 0]), Ok(()), "INVVPID of VPID 6");
    let seen = vm.load(WINDOW)?;
    ensure!(seen == 1 || seen == 2, "L2 reads {seen:#x}, which was never there");
    // L2's own INVLPG brings the new one.
    vm.registers.rbx = WINDOW;
    vm.exec(Op::Invlpg)?;
    reads(&mut vm, WINDOW, 2)
}

/// Without VPID, each VM entry drops what was cached: no INVVPID is needed.
fn vpid_off(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, mut vm) = l2(ctx)?;
    let pages = [page(ctx, 1), page(ctx, 2)];
    for round in 0..4_usize {
        // Global pages, too.
        vmcs::change(Field::GUEST_CR4, 1 << 7, 0);
        map_window(&vm, pages[round % 2], (round as u64 & 2) << 7);
        reads(&mut vm, WINDOW, round as u64 % 2 + 1)?;
    }
    Ok(())
}

/// Two L2s with VPIDs of their own, entered in turn, each with its own page tables and EPT.
fn two_guests(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, mut first) = l2(ctx)?;
    first.enable_vpid(&vmx, 1)?;
    let mut second = Vm::new(ctx, &vmx, Mode::Long)?;
    second.enable_vpid(&vmx, 2)?;
    let pages = [page(ctx, 1), page(ctx, 2), page(ctx, 3), page(ctx, 4)];
    map_window(&first, pages[0], 0);
    second.map(ctx, L2Gpa::new(WINDOW), pages[1]);
    for round in 0..4 {
        for (vm, value) in [(&mut first, 1), (&mut second, 2)] {
            vm.make_current()?;
            reads(vm, WINDOW, value + if round >= 2 { 2 } else { 0 })?;
        }
        if round == 1 {
            map_window(&first, pages[2], 0);
            ensure_eq!(invvpid(SINGLE, [1, 0]), Ok(()), "INVVPID of VPID 1");
            second.map(ctx, L2Gpa::new(WINDOW), pages[3]);
            vmx::invept_single(second.ept.eptp(false))?;
        }
    }
    Ok(())
}
