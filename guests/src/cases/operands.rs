//! Answers: does each form of memory operand of the VMX instructions name the memory it should, and
//! does each fault of one reach L1 as the architecture says?
//!
//! Under an L0 these instructions exit, and the operand is found from the VM-exit instruction
//! information; every form of it is tried here, and pages that only L1's page tables know. SDM Vol.
//! 3D, "VMX Instruction Reference", Vol. 3C, "Information for VM Exits Due to Instruction
//! Execution", and Vol. 3A, "Paging", "Access Rights" and "Page-Fault Exceptions".

use core::arch::asm;

use vmx_defs::{ExitReason, Field, msr};
use x86_64::registers::control::{Cr0Flags, Cr3};

use crate::{
    ensure_eq, machine,
    memory::Page,
    suite::{Case, Ctx, Stop, Verdict},
    traps::Fault,
    vmx::{
        self, Mode, Vm, Vmx,
        raw::{self, Code, Flags, Operands, Raw},
        vmcs, wrmsr,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "operand.base", run: |ctx| form(ctx, "base", &[0x0F, 0xC7, 0x37], 0, 0) },
    Case {
        name: "operand.displacement.8",
        run: |ctx| form(ctx, "disp8", &[0x0F, 0xC7, 0x77, 0xE0], 0x20, 0),
    },
    Case {
        name: "operand.displacement.32",
        run: |ctx| form(ctx, "disp32", &[0x0F, 0xC7, 0xB7, 0x00, 0x10, 0xFF, 0xFF], 0xF000, 0),
    },
    Case {
        name: "operand.index.1",
        run: |ctx| form(ctx, "[rdi + rcx]", &[0x0F, 0xC7, 0x34, 0x0F], 0x123, 0x123),
    },
    Case {
        name: "operand.index.2",
        run: |ctx| form(ctx, "[rdi + rcx * 2]", &[0x0F, 0xC7, 0x34, 0x4F], 0x200, 0x100),
    },
    Case {
        name: "operand.index.4",
        run: |ctx| form(ctx, "[rdi + rcx * 4 + 8]", &[0x0F, 0xC7, 0x74, 0x8F, 8], 0x48, 0x10),
    },
    Case {
        name: "operand.index.8",
        run: |ctx| form(ctx, "[rdi + rcx * 8]", &[0x0F, 0xC7, 0x34, 0xCF], 0x8000, 0x1000),
    },
    Case {
        name: "operand.index.negative",
        run: |ctx| {
            form(ctx, "[rdi + rcx * 8]", &[0x0F, 0xC7, 0x34, 0xCF], 0_u64.wrapping_sub(64), !7)
        },
    },
    Case {
        name: "operand.index_without_base",
        // [rcx * 8 + 0x10]: RCX is the address by 8 in this case.
        run: |ctx| index_only(ctx, &[0x0F, 0xC7, 0x34, 0xCD, 0x10, 0, 0, 0]),
    },
    Case { name: "operand.absolute", run: absolute },
    Case { name: "operand.rip_relative", run: rip_relative },
    Case {
        name: "operand.base.r12",
        // push r12; mov r12, rdi; vmptrld [r12 + 0x18]; pop r12
        run: |ctx| {
            let code =
                [0x41, 0x54, 0x49, 0x89, 0xFC, 0x41, 0x0F, 0xC7, 0x74, 0x24, 0x18, 0x41, 0x5C];
            form(ctx, "[r12 + 18H]", &code, 0x18, 0)
        },
    },
    Case {
        name: "operand.base.r13_index_r14",
        // push r13; push r14; mov r13, rdi; mov r14, rcx; vmptrld [r13 + r14 * 4]; pop; pop
        run: |ctx| {
            let code = [
                0x41, 0x55, 0x41, 0x56, 0x49, 0x89, 0xFD, 0x49, 0x89, 0xCE, 0x43, 0x0F, 0xC7, 0x74,
                0xB5, 0x00, 0x41, 0x5E, 0x41, 0x5D,
            ];
            form(ctx, "[r13 + r14 * 4]", &code, 0x400, 0x100)
        },
    },
    Case { name: "operand.base.rsp", run: stack_operand },
    Case { name: "operand.segment.fs", run: |ctx| segment(ctx, 0x64, msr::FS_BASE) },
    Case { name: "operand.segment.gs", run: |ctx| segment(ctx, 0x65, msr::GS_BASE) },
    Case { name: "operand.segment.ignored", run: segment_ignored },
    Case { name: "operand.address_size_32", run: address_size },
    Case { name: "operand.address_size_32.wraps", run: address_size_wraps },
    Case { name: "operand.register.high", run: high_registers },
    Case { name: "operand.pages.small", run: small_pages },
    Case { name: "operand.pages.accessed_and_dirty", run: accessed_dirty },
    Case { name: "operand.crosses.vmptrld", run: |ctx| crosses(ctx, &raw::VMPTRLD) },
    Case { name: "operand.crosses.vmptrst", run: |ctx| crosses(ctx, &raw::VMPTRST) },
    Case { name: "operand.crosses.vmread", run: |ctx| crosses(ctx, &raw::VMREAD_MEMORY) },
    Case { name: "operand.crosses.vmwrite", run: |ctx| crosses(ctx, &raw::VMWRITE_MEMORY) },
    Case { name: "operand.crosses.invept", run: |ctx| crosses(ctx, &raw::INVEPT) },
    Case { name: "operand.crosses.invvpid", run: |ctx| crosses(ctx, &raw::INVVPID) },
    Case { name: "operand.pf.first_page", run: pf_first },
    Case { name: "operand.pf.second_page", run: pf_second },
    Case { name: "operand.pf.each_level", run: pf_levels },
    Case { name: "operand.pf.read_only", run: pf_read_only },
    Case { name: "operand.pf.reserved_bit", run: pf_reserved },
    Case { name: "operand.gp.vmptrld", run: |ctx| not_canonical(ctx, &raw::VMPTRLD) },
    Case { name: "operand.gp.vmclear", run: |ctx| not_canonical(ctx, &raw::VMCLEAR) },
    Case { name: "operand.gp.vmptrst", run: |ctx| not_canonical(ctx, &raw::VMPTRST) },
    Case { name: "operand.gp.vmread", run: |ctx| not_canonical(ctx, &raw::VMREAD_MEMORY) },
    Case { name: "operand.gp.vmwrite", run: |ctx| not_canonical(ctx, &raw::VMWRITE_MEMORY) },
    Case { name: "operand.gp.invept", run: |ctx| not_canonical(ctx, &raw::INVEPT) },
    Case { name: "operand.gp.invvpid", run: |ctx| not_canonical(ctx, &raw::INVVPID) },
    Case { name: "operand.gp.crosses_canonical", run: crosses_canonical },
    Case { name: "operand.gp.fs_base", run: fs_not_canonical },
    Case { name: "operand.ss.vmptrld", run: ss_fault },
    Case { name: "operand.pf.invept", run: |ctx| pf_of(ctx, &raw::INVEPT) },
    Case { name: "operand.pf.invvpid", run: |ctx| pf_of(ctx, &raw::INVVPID) },
    Case { name: "operand.l2.rip_relative", run: l2_rip_relative },
    Case { name: "operand.l2.segment_and_size", run: l2_segment },
];

/// VMX operation, and two VMCS regions of which the first is current.
fn two_regions(ctx: &mut Ctx<'_>) -> Result<(Vmx, [Page; 2]), Stop> {
    let vmx = Vmx::on(ctx)?;
    let regions = [vmx.region(ctx), vmx.region(ctx)];
    for region in regions {
        ensure_eq!(vmx::vmclear(region), Ok(()), "VMCLEAR");
    }
    ensure_eq!(vmx::vmptrld(regions[0]), Ok(()), "VMPTRLD");
    Ok((vmx, regions))
}

/// The current-VMCS pointer, by a VMPTRST with the plainest operand.
fn current() -> u64 {
    // SAFETY: the cases are in VMX operation here.
    unsafe { vmx_hw::vmptrst() }.as_u64()
}

fn raw_of(name: &'static str, bytes: &'static [u8]) -> Raw {
    Raw { name, bytes, reason: ExitReason::VMPTRLD }
}

/// A page of code: these bytes, then RET.
fn page_of(ctx: &mut Ctx<'_>, bytes: &[u8]) -> Code {
    // `Code` wants static bytes; what differs from case to case is put over them.
    const ROOM: Raw = Raw { name: "", bytes: &[0x90; 32], reason: ExitReason::VMPTRLD };
    let code = Code::new(ctx, &ROOM);
    let page = Page::at(code.address());
    page.put(32 - bytes.len(), bytes);
    code
}

fn succeeds(code: Code, operands: Operands, what: &str) -> Verdict {
    match code.run(operands) {
        Ok((flags, _)) => ensure_eq!(flags, Flags::Succeed, "{what}"),
        Err(fault) => crate::fail!("{what}: {fault:x?}"),
    }
    Ok(())
}

/// VMPTRLD of the second region by `bytes`, with the operand at RDI + `offset` and RCX = `rcx`.
fn form(ctx: &mut Ctx<'_>, name: &'static str, bytes: &[u8], offset: u64, rcx: u64) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let code = page_of(ctx, bytes);
    let slot = ctx.arena.page();
    slot.write(7, regions[1].address());
    // What the forms give: RDI plus the displacement and the index.
    let displacement = match name {
        "disp8" => 0_u64.wrapping_sub(0x20),
        "disp32" => 0_u64.wrapping_sub(0xF000),
        _ => offset,
    };
    let rdi = (slot.address() + 7 * 8).wrapping_sub(displacement);
    succeeds(code, Operands { rdi, rcx, ..Operands::default() }, name)?;
    ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    Ok(())
}

fn index_only(ctx: &mut Ctx<'_>, bytes: &[u8]) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let code = page_of(ctx, bytes);
    let slot = ctx.arena.page();
    slot.write(7, regions[1].address());
    let rcx = (slot.address() + 7 * 8 - 0x10) / 8;
    succeeds(code, Operands { rdi: !0, rcx, ..Operands::default() }, "[rcx * 8 + 10H]")?;
    ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    Ok(())
}

/// Neither base nor index: a displacement of 32 bits, sign-extended.
fn absolute(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let slot = ctx.arena.page();
    slot.write(7, regions[1].address());
    let mut bytes = [0x0F, 0xC7, 0x34, 0x25, 0, 0, 0, 0];
    bytes[4..].copy_from_slice(&(slot.address() as u32 + 56).to_le_bytes());
    let code = page_of(ctx, &bytes);
    succeeds(code, Operands { rdi: !0, rcx: !0, rax: !0 }, "[disp32]")?;
    ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    Ok(())
}

fn rip_relative(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    // vmptrld [rip + 0x100 - 32]: the code ends at offset 32 of its page.
    let code = page_of(ctx, &[0x0F, 0xC7, 0x35, 0xE0, 0, 0, 0]);
    Page::at(code.address()).write(0x100 / 8, regions[1].address());
    succeeds(code, Operands { rdi: !0, rcx: !0, rax: !0 }, "[rip + disp32]")?;
    ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    Ok(())
}

fn stack_operand(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    // push rdi; vmptrld [rsp]; lea rsp, [rsp + 8]
    let code = page_of(ctx, &[0x57, 0x0F, 0xC7, 0x34, 0x24, 0x48, 0x8D, 0x64, 0x24, 0x08]);
    let operands = Operands { rdi: regions[1].address(), ..Operands::default() };
    succeeds(code, operands, "[rsp]")?;
    ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    Ok(())
}

fn segment(ctx: &mut Ctx<'_>, prefix: u8, base: u32) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let code = page_of(ctx, &[prefix, 0x0F, 0xC7, 0x77, 0x10]);
    let slot = ctx.arena.page();
    slot.write(7, regions[1].address());
    // Above and below: the sum wraps at 2^64 and may come from either side.
    for value in [0x1234_5000, 0xFFFF_FFFF_8000_0000] {
        ensure_eq!(vmx::vmptrld(regions[0]), Ok(()), "VMPTRLD");
        // SAFETY: this program uses neither FS nor GS.
        unsafe { wrmsr(base, value) };
        let rdi = (slot.address() + 56 - 0x10).wrapping_sub(value);
        let result = code.run(Operands { rdi, ..Operands::default() });
        // SAFETY: as before.
        unsafe { wrmsr(base, 0) };
        ensure_eq!(result.map(|(flags, _)| flags), Ok(Flags::Succeed), "base {value:#x}");
        ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    }
    Ok(())
}

/// In 64-bit mode the other segments' prefixes mean nothing.
fn segment_ignored(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let slot = ctx.arena.page();
    slot.write(0, regions[1].address());
    for prefix in [0x26, 0x2E, 0x36, 0x3E] {
        let code = page_of(ctx, &[prefix, 0x0F, 0xC7, 0x37]);
        ensure_eq!(vmx::vmptrld(regions[0]), Ok(()), "VMPTRLD");
        let operands = Operands { rdi: slot.address(), ..Operands::default() };
        succeeds(code, operands, "with the prefix of a segment")?;
        ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    }
    Ok(())
}

fn address_size(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    // vmptrld [edi + ecx * 2 + 8]
    let code = page_of(ctx, &[0x67, 0x0F, 0xC7, 0x74, 0x4F, 0x08]);
    let slot = ctx.arena.page();
    slot.write(7, regions[1].address());
    let operands = Operands {
        rdi: (slot.address() + 56 - 8 - 0x200) | 0x1234_0000_0000_0000,
        rcx: 0x100 | 0xFF << 32,
        ..Operands::default()
    };
    succeeds(code, operands, "[edi + ecx * 2 + 8]")?;
    ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    Ok(())
}

/// A sum of 32-bit parts wraps at 4 GiB.
fn address_size_wraps(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    // vmptrld [edi + ecx]
    let code = page_of(ctx, &[0x67, 0x0F, 0xC7, 0x34, 0x0F]);
    let slot = ctx.arena.page();
    slot.write(7, regions[1].address());
    let operands =
        Operands { rdi: slot.address() + 56 + 0x1000, rcx: 0xFFFF_F000, ..Operands::default() };
    succeeds(code, operands, "[edi + ecx]")?;
    ensure_eq!(current(), regions[1].address(), "current-VMCS pointer");
    Ok(())
}

/// VMREAD and VMWRITE with R8 to R15, and VMREAD to memory that such a register names.
fn high_registers(ctx: &mut Ctx<'_>) -> Verdict {
    two_regions(ctx)?;
    let (encoding, value) = (u64::from(Field::GUEST_RSP.encoding()), 0x1122_3344_5566_7788_u64);
    let slot = ctx.arena.page();
    let (read, r15): (u64, u64);
    // SAFETY: the VMCS current is never entered; the memory operand is a page of this case.
    unsafe {
        asm!(
            "vmwrite r9, r14",
            "vmread r15, r9",
            "vmread [r11 + 8], r9",
            "vmwrite r9, [r11]",
            "vmread r10, r9",
            in("r9") encoding,
            in("r14") value,
            out("r15") r15,
            in("r11") slot.address(),
            out("r10") read,
        );
    }
    ensure_eq!(r15, value, "VMREAD to R15 of what VMWRITE had from R14");
    ensure_eq!(slot.read(1), value, "VMREAD to [R11 + 8]");
    ensure_eq!(read, 0, "VMREAD to R10 of what VMWRITE had from [R11]");
    Ok(())
}

/// Where [`Lens`] maps pages in this hypervisor's own address space.
const LENS: u64 = 1 << 39;

/// Page tables of L1 with some small pages more, at [`LENS`]. The harness puts CR3 back.
struct Lens {
    /// PML4, page-directory-pointer table, page directory, page table.
    tables: [Page; 4],
}

const RW: u64 = 3;

impl Lens {
    fn new(ctx: &mut Ctx<'_>) -> Self {
        let tables = [(); 4].map(|()| ctx.arena.page());
        let (frame, flags) = Cr3::read();
        let own = frame.start_address().as_u64();
        for index in 0..256 {
            // SAFETY: the page tables in use are mapped one to one, and only read here.
            let entry = unsafe { ((own + index * 8) as *const u64).read_volatile() };
            tables[0].write(index as usize, entry);
        }
        tables[0].write(1, tables[1].address() | RW);
        tables[1].write(0, tables[2].address() | RW);
        tables[2].write(0, tables[3].address() | RW);
        let lens = Self { tables };
        // SAFETY: the new tables map all that the old ones do.
        unsafe { Cr3::write_raw(frame_of(lens.tables[0]), flags.bits() as u16) };
        lens
    }

    /// Sets the entry of page number `index`.
    fn set(&self, index: usize, entry: u64) {
        self.tables[3].write(index, entry);
        self.flush();
    }

    fn flush(&self) {
        x86_64::instructions::tlb::flush_all();
    }

    /// Address of page number `index`.
    fn at(index: u64) -> u64 {
        LENS + index * 0x1000
    }
}

fn frame_of(page: Page) -> x86_64::structures::paging::PhysFrame {
    x86_64::structures::paging::PhysFrame::containing_address(x86_64::PhysAddr::new(page.address()))
}

fn small_pages(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let lens = Lens::new(ctx);
    let slots = [ctx.arena.page(), ctx.arena.page()];
    for (index, slot) in slots.into_iter().enumerate() {
        slot.write(511, regions[index].address());
        lens.set(index, slot.address() | RW);
    }
    let code = Code::new(ctx, &raw::VMPTRLD);
    for index in [1, 0, 1] {
        let rdi = Lens::at(index) + 511 * 8;
        succeeds(code, Operands { rdi, ..Operands::default() }, "VMPTRLD")?;
        ensure_eq!(current(), regions[index as usize].address(), "current-VMCS pointer");
    }
    // The same address, another page.
    lens.set(1, slots[0].address() | RW);
    let rdi = Lens::at(1) + 511 * 8;
    succeeds(code, Operands { rdi, ..Operands::default() }, "VMPTRLD")?;
    ensure_eq!(current(), regions[0].address(), "current-VMCS pointer");
    Ok(())
}

/// An operand's page is marked accessed, and dirty when it is written.
fn accessed_dirty(ctx: &mut Ctx<'_>) -> Verdict {
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    let (_, regions) = two_regions(ctx)?;
    let lens = Lens::new(ctx);
    let slot = ctx.arena.page();
    slot.write(0, regions[1].address());
    for (raw, expected) in [(&raw::VMPTRLD, ACCESSED), (&raw::VMPTRST, ACCESSED | DIRTY)] {
        lens.set(0, slot.address() | RW);
        let code = Code::new(ctx, raw);
        succeeds(code, Operands { rdi: Lens::at(0), ..Operands::default() }, raw.name)?;
        let flags = lens.tables[3].read(0) & (ACCESSED | DIRTY);
        ensure_eq!(flags, expected, "A and D of the operand's page after {}", raw.name);
        ensure_eq!(lens.tables[2].read(0) & ACCESSED, ACCESSED, "A of the entry above");
    }
    Ok(())
}

/// Two pages of the [`Lens`] that lie apart in memory, and an address 4 bytes before their border.
fn border(ctx: &mut Ctx<'_>) -> (Lens, [Page; 2], u64) {
    let lens = Lens::new(ctx);
    let first = ctx.arena.page();
    ctx.arena.page();
    let second = ctx.arena.page();
    lens.set(0, second.address() | RW);
    lens.set(1, first.address() | RW);
    (lens, [second, first], Lens::at(1) - 4)
}

/// An operand that begins 4 bytes before a border of pages.
fn crosses(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    let (vmx, regions) = two_regions(ctx)?;
    let (_lens, [low, high], address) = border(ctx);
    let code = Code::new(ctx, raw);
    let value = match raw.name {
        "VMPTRLD" => regions[1].address(),
        "INVEPT" => vmx::Ept::empty(ctx.arena).eptp(false),
        "INVVPID" => 1,
        _ => 0x1122_3344_5566_7788,
    };
    if raw.name == "VMREAD_MEMORY" {
        vmcs::write(Field::GUEST_RSP, value);
    } else {
        low.write32(1023, value as u32);
        high.write32(0, (value >> 32) as u32);
    }
    let type_or_field = match raw.name {
        "INVEPT" | "INVVPID" => 1,
        _ => Field::GUEST_RSP.encoding().into(),
    };
    if raw.name == "INVEPT" && vmx.caps.ept.is_empty() || raw.name == "INVVPID" && !has_vpid(&vmx) {
        crate::skip!("no {}", raw.name);
    }
    let operands = Operands { rdi: address, rcx: type_or_field, ..Operands::default() };
    succeeds(code, operands, raw.name)?;
    let stored = u64::from(low.read32(1023)) | u64::from(high.read32(0)) << 32;
    match raw.name {
        "VMPTRLD" => ensure_eq!(current(), value, "current-VMCS pointer"),
        "VMPTRST" => ensure_eq!(stored, regions[0].address(), "stored pointer"),
        "VMREAD_MEMORY" => ensure_eq!(stored, value, "stored field"),
        "VMWRITE_MEMORY" => ensure_eq!(vmcs::read(Field::GUEST_RSP), value, "field"),
        _ => {}
    }
    Ok(())
}

fn has_vpid(vmx: &Vmx) -> bool {
    vmx.caps.ept.contains(vmx_defs::msr::EptVpidCap::INVVPID_SINGLE)
}

fn faults(code: Code, operands: Operands, what: &str) -> Result<Fault, Stop> {
    match code.run(operands) {
        Err(fault) => Ok(fault),
        Ok((flags, _)) => crate::fail!("{what} does not fault: {flags:?}"),
    }
}

fn expect_pf(code: Code, rdi: u64, error: u64, cr2: u64, what: &str) -> Verdict {
    let rcx = Field::GUEST_RSP.encoding().into();
    let fault = faults(code, Operands { rdi, rcx, ..Operands::default() }, what)?;
    ensure_eq!(fault.vector, 14, "vector of {what}");
    ensure_eq!((fault.error_code, fault.cr2), (error, cr2), "error code and CR2 of {what}");
    ensure_eq!(fault.rip, code.address(), "RIP of {what}");
    Ok(())
}

/// The first page of a crossing operand is missing: CR2 is the operand's address.
fn pf_first(ctx: &mut Ctx<'_>) -> Verdict {
    two_regions(ctx)?;
    let (lens, _, address) = border(ctx);
    lens.set(0, 0);
    for (raw, error) in [
        (&raw::VMPTRLD, 0),
        (&raw::VMPTRST, 2),
        (&raw::VMREAD_MEMORY, 2),
        (&raw::VMWRITE_MEMORY, 0),
    ] {
        let code = Code::new(ctx, raw);
        expect_pf(code, address, error, address, raw.name)?;
    }
    Ok(())
}

/// The second is missing: CR2 is its first byte, and nothing was written to the first.
fn pf_second(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let (lens, [low, _], address) = border(ctx);
    lens.set(1, 0);
    low.fill(0x7777_7777_7777_7777);
    for (raw, error) in [
        (&raw::VMPTRLD, 0),
        (&raw::VMPTRST, 2),
        (&raw::VMREAD_MEMORY, 2),
        (&raw::VMWRITE_MEMORY, 0),
    ] {
        let code = Code::new(ctx, raw);
        expect_pf(code, address, error, Lens::at(1), raw.name)?;
        ensure_eq!(low.read(511), 0x7777_7777_7777_7777, "the first page after {}", raw.name);
    }
    ensure_eq!(current(), regions[0].address(), "current-VMCS pointer");
    Ok(())
}

/// The walk ends at each level where an entry is not present.
fn pf_levels(ctx: &mut Ctx<'_>) -> Verdict {
    two_regions(ctx)?;
    let lens = Lens::new(ctx);
    let slot = ctx.arena.page();
    lens.set(5, slot.address() | RW);
    let code = Code::new(ctx, &raw::VMPTRST);
    for (level, index) in [(0, 1), (1, 0), (2, 0), (3, 5)] {
        let entry = lens.tables[level].read(index);
        lens.tables[level].write(index, 0);
        lens.flush();
        expect_pf(code, Lens::at(5), 2, Lens::at(5), "VMPTRST")?;
        lens.tables[level].write(index, entry);
        lens.flush();
        succeeds(code, Operands { rdi: Lens::at(5), ..Operands::default() }, "VMPTRST")?;
    }
    Ok(())
}

/// A write to a read-only page faults with CR0.WP, and is done without.
fn pf_read_only(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, regions) = two_regions(ctx)?;
    let lens = Lens::new(ctx);
    let slot = ctx.arena.page();
    let code = Code::new(ctx, &raw::VMPTRST);
    lens.set(0, slot.address() | 1);
    expect_pf(code, Lens::at(0), 3, Lens::at(0), "VMPTRST")?;
    // Read-only in an upper entry is the same.
    lens.set(0, slot.address() | RW);
    let entry = lens.tables[1].read(0);
    lens.tables[1].write(0, entry & !2);
    lens.flush();
    expect_pf(code, Lens::at(0), 3, Lens::at(0), "VMPTRST")?;
    ensure_eq!(slot.read(0), 0, "the page");
    machine::change_cr0(Cr0Flags::empty(), Cr0Flags::WRITE_PROTECT);
    succeeds(code, Operands { rdi: Lens::at(0), ..Operands::default() }, "VMPTRST")?;
    ensure_eq!(slot.read(0), regions[0].address(), "the page, without CR0.WP");
    machine::change_cr0(Cr0Flags::WRITE_PROTECT, Cr0Flags::empty());
    Ok(())
}

fn pf_reserved(ctx: &mut Ctx<'_>) -> Verdict {
    const RESERVED: u64 = 1 << 3;
    let (vmx, _) = two_regions(ctx)?;
    if vmx.caps.width >= 52 {
        crate::skip!("no reserved address bits");
    }
    let lens = Lens::new(ctx);
    let slot = ctx.arena.page();
    lens.set(0, slot.address() | RW | 1 << 51);
    let code = Code::new(ctx, &raw::VMPTRST);
    expect_pf(code, Lens::at(0), RESERVED | 1 | 2, Lens::at(0), "VMPTRST")?;
    let code = Code::new(ctx, &raw::VMPTRLD);
    expect_pf(code, Lens::at(0), RESERVED | 1, Lens::at(0), "VMPTRLD")
}

const NOT_CANONICAL: u64 = 0x4000_0000_0000_0000;

fn expect_fault(code: Code, operands: Operands, vector: u64, what: &str) -> Verdict {
    let fault = faults(code, operands, what)?;
    ensure_eq!((fault.vector, fault.error_code), (vector, 0), "vector and error code of {what}");
    ensure_eq!(fault.rip, code.address(), "RIP of {what}");
    Ok(())
}

fn need(vmx: &Vmx, raw: &Raw) -> Verdict {
    let caps = vmx.caps.ept;
    let missing = match raw.name {
        "INVEPT" => !caps.contains(vmx_defs::msr::EptVpidCap::INVEPT),
        "INVVPID" => !caps.contains(vmx_defs::msr::EptVpidCap::INVVPID),
        _ => false,
    };
    if missing {
        crate::skip!("no {}", raw.name);
    }
    Ok(())
}

fn not_canonical(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    let (vmx, regions) = two_regions(ctx)?;
    need(&vmx, raw)?;
    let code = Code::new(ctx, raw);
    let rcx = if matches!(raw.name, "INVEPT" | "INVVPID") { 2 } else { 0x681C };
    for rdi in [NOT_CANONICAL, 0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_F000] {
        expect_fault(code, Operands { rdi, rcx, rax: 0 }, 13, raw.name)?;
    }
    ensure_eq!(current(), regions[0].address(), "current-VMCS pointer");
    Ok(())
}

/// An operand whose last bytes alone are not canonical.
fn crosses_canonical(ctx: &mut Ctx<'_>) -> Verdict {
    two_regions(ctx)?;
    for raw in [&raw::VMPTRLD, &raw::VMPTRST] {
        let code = Code::new(ctx, raw);
        let operands = Operands { rdi: 0x0000_7FFF_FFFF_FFFC, ..Operands::default() };
        expect_fault(code, operands, 13, raw.name)?;
    }
    Ok(())
}

fn fs_not_canonical(ctx: &mut Ctx<'_>) -> Verdict {
    two_regions(ctx)?;
    let code = page_of(ctx, &[0x64, 0x0F, 0xC7, 0x37]);
    // SAFETY: this program does not use FS.
    unsafe { wrmsr(msr::FS_BASE, 0x7FFF_FFFF_F000) };
    let result = code.run(Operands { rdi: 0x1000, ..Operands::default() });
    // SAFETY: as before.
    unsafe { wrmsr(msr::FS_BASE, 0) };
    let fault = result.err().map(|fault| (fault.vector, fault.error_code));
    ensure_eq!(fault, Some((13, 0)), "vector and error code");
    Ok(())
}

/// With RSP as the base the segment is SS, and the fault #SS.
fn ss_fault(ctx: &mut Ctx<'_>) -> Verdict {
    two_regions(ctx)?;
    let base_rsp = raw_of("VMPTRLD [rsp + rdi]", &[0x0F, 0xC7, 0x34, 0x3C]);
    let code = Code::new(ctx, &base_rsp);
    let operands = Operands { rdi: NOT_CANONICAL, ..Operands::default() };
    expect_fault(code, operands, 12, base_rsp.name)?;
    // Not with an FS override.
    let overridden = raw_of("VMPTRLD fs:[rsp + rdi]", &[0x64, 0x0F, 0xC7, 0x34, 0x3C]);
    let code = Code::new(ctx, &overridden);
    expect_fault(code, operands, 13, overridden.name)?;
    let stored = raw_of("VMPTRST [rsp + rdi]", &[0x0F, 0xC7, 0x3C, 0x3C]);
    let code = Code::new(ctx, &stored);
    expect_fault(code, operands, 12, stored.name)
}

/// The descriptor of INVEPT and INVVPID: #PF on either page of one that crosses.
fn pf_of(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    let (vmx, _) = two_regions(ctx)?;
    need(&vmx, raw)?;
    let (lens, [low, _], address) = border(ctx);
    let code = Code::new(ctx, raw);
    lens.set(1, 0);
    let pf = |rdi: u64, cr2: u64| {
        let fault = faults(code, Operands { rdi, rcx: 2, rax: 0 }, raw.name)?;
        ensure_eq!(
            (fault.vector, fault.error_code, fault.cr2),
            (14, 0, cr2),
            "vector, error code and CR2"
        );
        Ok::<(), Stop>(())
    };
    pf(address, Lens::at(1))?;
    lens.set(1, low.address() | RW);
    lens.set(0, 0);
    pf(address, address)
}

fn l2_rip_relative(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    // vmptrld [rip - 0x10]
    let relative = raw_of("VMPTRLD [rip - 10H]", &[0x0F, 0xC7, 0x35, 0xF0, 0xFF, 0xFF, 0xFF]);
    let code = Code::l2(ctx, &relative);
    vmcs::write(Field::GUEST_RIP, code.address());
    let exit = vm.run().exit()?;
    ensure_eq!((exit.reason, exit.length), (ExitReason::VMPTRLD, 7), "exit reason and length");
    ensure_eq!(exit.qualification, code.address() + 7 - 0x10, "exit qualification: the address");
    let info =
        vmx_defs::exit::InstructionInfo::from(vmcs::read(Field::EXIT_INSTRUCTION_INFO) as u32);
    ensure_eq!((info.base_invalid(), info.index_invalid()), (true, true), "base and index");
    Ok(())
}

fn l2_segment(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    // vmclear gs:[r13d + r8d * 8 + 0x40]
    let long = raw_of(
        "VMCLEAR gs:[r13d + r8d * 8 + 40H]",
        &[0x65, 0x67, 0x66, 0x43, 0x0F, 0xC7, 0x74, 0xC5, 0x40],
    );
    let code = Code::l2(ctx, &long);
    vmcs::write(Field::GUEST_RIP, code.address());
    let exit = vm.run().exit()?;
    ensure_eq!((exit.reason, exit.length), (ExitReason::VMCLEAR, 9), "exit reason and length");
    ensure_eq!(exit.qualification, 0x40, "exit qualification: the displacement");
    let info =
        vmx_defs::exit::InstructionInfo::from(vmcs::read(Field::EXIT_INSTRUCTION_INFO) as u32);
    ensure_eq!((info.address_size(), info.segment()), (1, 5), "address size and segment");
    ensure_eq!((info.base(), info.index(), info.scaling()), (13, 8, 3), "base, index, scaling");
    Ok(())
}
