//! Answers: does each VMX instruction succeed where it should, and fail in each way it can?
//!
//! SDM Vol. 3D, "VMX Instruction Reference", and Vol. 3C, "VM-Instruction Error Numbers".

use vmx_defs::{Field, VmInstructionError};
use x86_64::registers::control::{Cr0Flags, Cr4Flags};

use crate::{
    ensure, ensure_eq, machine,
    memory::Page,
    skip,
    suite::{Case, Ctx, Stop, Verdict},
    vmx::{
        self, Caps, Mode, Vm, Vmx,
        raw::{self, Code, Flags, Operands, Raw},
        vmcs,
    },
};

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case { name: "vmxon.success", run: vmxon_success },
    Case { name: "vmxon.again_after_vmxoff", run: vmxon_twice },
    Case { name: "vmxon.misaligned", run: |ctx| vmxon_fails(ctx, |page, _| page.address() | 8) },
    Case {
        name: "vmxon.misaligned.top_bit",
        run: |ctx| vmxon_fails(ctx, |page, _| page.address() | 0x800),
    },
    Case {
        name: "vmxon.beyond_width",
        run: |ctx| vmxon_fails(ctx, |page, width| page.address() | 1 << width),
    },
    Case {
        name: "vmxon.beyond_width.bit_63",
        run: |ctx| vmxon_fails(ctx, |page, _| page.address() | 1 << 63),
    },
    Case { name: "vmxon.revision", run: vmxon_revision },
    Case { name: "vmxon.revision.bit_31", run: vmxon_bit_31 },
    Case { name: "vmxon.in_root", run: vmxon_in_root },
    Case { name: "vmxon.in_root.current", run: vmxon_in_root_current },
    Case { name: "vmxon.ud.vmxe_clear", run: vmxon_vmxe },
    Case { name: "vmxon.gp.ne_clear", run: vmxon_ne },
    Case { name: "vmxon.gp.cpl3", run: vmxon_cpl3 },
    Case { name: "vmxon.pf.operand", run: |ctx| outside_pf(ctx, &raw::VMXON) },
    Case { name: "root.cr0_ne_fixed", run: ne_fixed },
    Case { name: "root.cr4_vmxe_fixed", run: vmxe_fixed },
    Case { name: "outside.ud.vmxoff", run: |ctx| outside_ud(ctx, &raw::VMXOFF) },
    Case { name: "outside.ud.vmclear", run: |ctx| outside_ud(ctx, &raw::VMCLEAR) },
    Case { name: "outside.ud.vmptrld", run: |ctx| outside_ud(ctx, &raw::VMPTRLD) },
    Case { name: "outside.ud.vmptrst", run: |ctx| outside_ud(ctx, &raw::VMPTRST) },
    Case { name: "outside.ud.vmread", run: |ctx| outside_ud(ctx, &raw::VMREAD) },
    Case { name: "outside.ud.vmwrite", run: |ctx| outside_ud(ctx, &raw::VMWRITE) },
    Case { name: "outside.ud.vmlaunch", run: |ctx| outside_ud(ctx, &raw::VMLAUNCH) },
    Case { name: "outside.ud.vmresume", run: |ctx| outside_ud(ctx, &raw::VMRESUME) },
    Case { name: "outside.ud.vmcall", run: |ctx| outside_ud(ctx, &raw::VMCALL) },
    Case { name: "outside.ud.invept", run: |ctx| outside_ud(ctx, &raw::INVEPT) },
    Case { name: "outside.ud.invvpid", run: |ctx| outside_ud(ctx, &raw::INVVPID) },
    Case { name: "outside.ud.vmfunc", run: |ctx| outside_ud(ctx, &raw::VMFUNC) },
    Case { name: "root.ud.vmfunc", run: vmfunc_in_root },
    Case { name: "cpl3.gp.vmxon", run: |ctx| cpl3_gp(ctx, &raw::VMXON) },
    Case { name: "cpl3.gp.vmxoff", run: |ctx| cpl3_gp(ctx, &raw::VMXOFF) },
    Case { name: "cpl3.gp.vmclear", run: |ctx| cpl3_gp(ctx, &raw::VMCLEAR) },
    Case { name: "cpl3.gp.vmptrld", run: |ctx| cpl3_gp(ctx, &raw::VMPTRLD) },
    Case { name: "cpl3.gp.vmptrst", run: |ctx| cpl3_gp(ctx, &raw::VMPTRST) },
    Case { name: "cpl3.gp.vmread", run: |ctx| cpl3_gp(ctx, &raw::VMREAD) },
    Case { name: "cpl3.gp.vmwrite", run: |ctx| cpl3_gp(ctx, &raw::VMWRITE) },
    Case { name: "cpl3.gp.vmlaunch", run: |ctx| cpl3_gp(ctx, &raw::VMLAUNCH) },
    Case { name: "cpl3.gp.vmresume", run: |ctx| cpl3_gp(ctx, &raw::VMRESUME) },
    Case { name: "cpl3.gp.vmcall", run: |ctx| cpl3_gp(ctx, &raw::VMCALL) },
    Case { name: "cpl3.gp.invept", run: |ctx| cpl3_gp(ctx, &raw::INVEPT) },
    Case { name: "cpl3.gp.invvpid", run: |ctx| cpl3_gp(ctx, &raw::INVVPID) },
    Case { name: "vmxoff.success", run: vmxoff_success },
    Case { name: "vmclear.success", run: vmclear_success },
    Case { name: "vmclear.current", run: vmclear_current },
    Case { name: "vmclear.other", run: vmclear_other },
    Case { name: "vmclear.any_revision", run: vmclear_any_revision },
    Case {
        name: "vmclear.misaligned",
        run: |ctx| pointer_fails(ctx, &raw::VMCLEAR, |_, page, _| page.address() | 1),
    },
    Case {
        name: "vmclear.beyond_width",
        run: |ctx| pointer_fails(ctx, &raw::VMCLEAR, |_, page, width| page.address() | 1 << width),
    },
    Case {
        name: "vmclear.vmxon_pointer",
        run: |ctx| pointer_fails(ctx, &raw::VMCLEAR, |vmxon, _, _| vmxon.address()),
    },
    Case { name: "vmclear.pf.operand", run: |ctx| root_pf(ctx, &raw::VMCLEAR) },
    Case { name: "vmclear.gp.operand", run: |ctx| root_gp(ctx, &raw::VMCLEAR) },
    Case { name: "vmptrld.success", run: vmptrld_success },
    Case {
        name: "vmptrld.misaligned",
        run: |ctx| pointer_fails(ctx, &raw::VMPTRLD, |_, page, _| page.address() | 1),
    },
    Case {
        name: "vmptrld.beyond_width",
        run: |ctx| pointer_fails(ctx, &raw::VMPTRLD, |_, page, width| page.address() | 1 << width),
    },
    Case {
        name: "vmptrld.vmxon_pointer",
        run: |ctx| pointer_fails(ctx, &raw::VMPTRLD, |vmxon, _, _| vmxon.address()),
    },
    Case {
        name: "vmptrld.revision",
        run: |ctx| {
            pointer_fails(ctx, &raw::VMPTRLD, |_, page, _| {
                page.write32(0, page.read32(0) ^ 0x10);
                page.address()
            })
        },
    },
    Case { name: "vmptrld.shadow_indicator", run: vmptrld_shadow },
    Case { name: "vmptrld.pf.operand", run: |ctx| root_pf(ctx, &raw::VMPTRLD) },
    Case { name: "vmptrld.gp.operand", run: |ctx| root_gp(ctx, &raw::VMPTRLD) },
    Case { name: "vmptrst.success", run: vmptrst_success },
    Case { name: "vmptrst.pf.operand", run: |ctx| root_pf(ctx, &raw::VMPTRST) },
    Case { name: "vmptrst.gp.operand", run: |ctx| root_gp(ctx, &raw::VMPTRST) },
    Case { name: "vmread.success", run: vmread_success },
    Case { name: "vmread.memory", run: vmread_memory },
    Case { name: "vmread.high", run: vmread_high },
    Case { name: "vmread.no_current", run: |ctx| no_current(ctx, &raw::VMREAD) },
    Case { name: "vmread.unsupported", run: |ctx| unsupported(ctx, &raw::VMREAD, 0x6C3E) },
    Case { name: "vmread.unsupported.bit_12", run: |ctx| unsupported(ctx, &raw::VMREAD, 0x781E) },
    Case {
        name: "vmread.unsupported.bits_63_32",
        run: |ctx| unsupported(ctx, &raw::VMREAD, 0x1_0000_681E),
    },
    Case {
        name: "vmread.unsupported.high_of_natural",
        run: |ctx| unsupported(ctx, &raw::VMREAD, 0x681F),
    },
    Case { name: "vmread.pf.operand", run: |ctx| root_pf(ctx, &raw::VMREAD_MEMORY) },
    Case { name: "vmwrite.success", run: vmwrite_success },
    Case { name: "vmwrite.memory", run: vmwrite_memory },
    Case { name: "vmwrite.high", run: vmwrite_high },
    Case { name: "vmwrite.no_current", run: |ctx| no_current(ctx, &raw::VMWRITE) },
    Case { name: "vmwrite.read_only", run: vmwrite_read_only },
    Case { name: "vmwrite.unsupported", run: |ctx| unsupported(ctx, &raw::VMWRITE, 0x6C3E) },
    Case {
        name: "vmwrite.unsupported.bits_63_32",
        run: |ctx| unsupported(ctx, &raw::VMWRITE, 0x1_0000_681E),
    },
    Case { name: "vmwrite.pf.operand", run: |ctx| root_pf(ctx, &raw::VMWRITE_MEMORY) },
    Case { name: "vmlaunch.no_current", run: |ctx| no_current(ctx, &raw::VMLAUNCH) },
    Case { name: "vmlaunch.not_clear", run: vmlaunch_not_clear },
    Case { name: "vmlaunch.after_vmclear", run: vmlaunch_after_vmclear },
    Case { name: "vmlaunch.blocked_by_mov_ss", run: vmlaunch_mov_ss },
    Case { name: "vmlaunch.controls", run: vmlaunch_controls },
    Case { name: "vmlaunch.host_state", run: vmlaunch_host_state },
    Case { name: "vmlaunch.guest_state", run: vmlaunch_guest_state },
    Case { name: "vmresume.no_current", run: |ctx| no_current(ctx, &raw::VMRESUME) },
    Case { name: "vmresume.not_launched", run: vmresume_not_launched },
    Case { name: "vmresume.controls", run: vmresume_controls },
    Case { name: "vmcall.in_root", run: vmcall_in_root },
    Case { name: "vmcall.in_root.no_current", run: vmcall_no_current },
    Case { name: "error_field.kept_by_success", run: error_kept },
];

/// The memory operand of an instruction that takes an address.
fn operand(ctx: &mut Ctx<'_>, address: u64) -> Operands {
    let page = ctx.arena.page();
    page.write(0, address);
    Operands { rdi: page.address(), ..Operands::default() }
}

/// Executes an instruction at CPL 0; a fault fails the case.
fn flags(ctx: &mut Ctx<'_>, raw: &Raw, operands: Operands) -> Result<Flags, Stop> {
    match Code::new(ctx, raw).run(operands) {
        Ok((flags, _)) => Ok(flags),
        Err(fault) => crate::fail!("{}: {fault:x?}", raw.name),
    }
}

/// Expects VMfailValid with this number, of an instruction that takes an address or nothing.
fn expect_error(
    ctx: &mut Ctx<'_>,
    raw: &Raw,
    operands: Operands,
    error: VmInstructionError,
) -> Verdict {
    ensure_eq!(flags(ctx, raw, operands)?, Flags::FailValid, "flags of {}", raw.name);
    let number = vmcs::read(Field::VM_INSTRUCTION_ERROR);
    ensure_eq!(number, u64::from(error.number()), "error of {}", raw.name);
    Ok(())
}

/// A VMXON region, with what VMXON needs set up around it.
fn vmxon_region(ctx: &mut Ctx<'_>) -> Result<(Page, Caps), Stop> {
    vmx::prepare()?;
    let caps = Caps::read();
    let page = ctx.arena.page();
    page.write32(0, caps.basic.revision());
    Ok((page, caps))
}

/// VMX operation with a current VMCS.
fn with_current(ctx: &mut Ctx<'_>) -> Result<(Vmx, Page), Stop> {
    let vmx = Vmx::on(ctx)?;
    let page = vmx.region(ctx);
    ensure_eq!(vmx::vmclear(page), Ok(()), "VMCLEAR");
    ensure_eq!(vmx::vmptrld(page), Ok(()), "VMPTRLD");
    Ok((vmx, page))
}

/// The current-VMCS pointer by VMPTRST.
fn current(ctx: &mut Ctx<'_>) -> Result<u64, Stop> {
    let page = ctx.arena.page();
    let operands = Operands { rdi: page.address(), ..Operands::default() };
    ensure_eq!(flags(ctx, &raw::VMPTRST, operands)?, Flags::Succeed, "VMPTRST");
    Ok(page.read(0))
}

fn vmxon_success(ctx: &mut Ctx<'_>) -> Verdict {
    let (page, _) = vmxon_region(ctx)?;
    let operands = operand(ctx, page.address());
    ensure_eq!(flags(ctx, &raw::VMXON, operands)?, Flags::Succeed, "VMXON");
    ensure_eq!(current(ctx)?, !0, "current-VMCS pointer after VMXON");
    Ok(())
}

fn vmxon_twice(ctx: &mut Ctx<'_>) -> Verdict {
    let (page, _) = vmxon_region(ctx)?;
    let operands = operand(ctx, page.address());
    for round in 0..2 {
        ensure_eq!(flags(ctx, &raw::VMXON, operands)?, Flags::Succeed, "VMXON {round}");
        ensure_eq!(flags(ctx, &raw::VMXOFF, operands)?, Flags::Succeed, "VMXOFF {round}");
    }
    Ok(())
}

fn vmxon_fails(ctx: &mut Ctx<'_>, address: fn(Page, u8) -> u64) -> Verdict {
    let (page, caps) = vmxon_region(ctx)?;
    let operands = operand(ctx, address(page, caps.width));
    ensure_eq!(flags(ctx, &raw::VMXON, operands)?, Flags::FailInvalid, "VMXON");
    let fault = Code::new(ctx, &raw::VMPTRST).run(operands).err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(6), "VMPTRST after VMXON failed");
    Ok(())
}

fn vmxon_revision(ctx: &mut Ctx<'_>) -> Verdict {
    let (page, caps) = vmxon_region(ctx)?;
    page.write32(0, caps.basic.revision() ^ 1);
    let operands = operand(ctx, page.address());
    ensure_eq!(flags(ctx, &raw::VMXON, operands)?, Flags::FailInvalid, "VMXON");
    Ok(())
}

fn vmxon_bit_31(ctx: &mut Ctx<'_>) -> Verdict {
    let (page, caps) = vmxon_region(ctx)?;
    page.write32(0, caps.basic.revision() | 1 << 31);
    let operands = operand(ctx, page.address());
    ensure_eq!(flags(ctx, &raw::VMXON, operands)?, Flags::FailInvalid, "VMXON");
    Ok(())
}

fn vmxon_in_root(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let operands = operand(ctx, vmx.vmxon_region.address());
    ensure_eq!(flags(ctx, &raw::VMXON, operands)?, Flags::FailInvalid, "VMXON");
    Ok(())
}

fn vmxon_in_root_current(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, page) = with_current(ctx)?;
    let operands = operand(ctx, vmx.vmxon_region.address());
    expect_error(ctx, &raw::VMXON, operands, VmInstructionError::VmxonInRoot)?;
    ensure_eq!(current(ctx)?, page.address(), "current-VMCS pointer");
    Ok(())
}

fn vmxon_vmxe(ctx: &mut Ctx<'_>) -> Verdict {
    let (page, _) = vmxon_region(ctx)?;
    machine::change_cr4(Cr4Flags::empty(), Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS);
    let operands = operand(ctx, page.address());
    let fault = Code::new(ctx, &raw::VMXON).run(operands).err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(6), "VMXON with CR4.VMXE clear");
    Ok(())
}

fn vmxon_ne(ctx: &mut Ctx<'_>) -> Verdict {
    let (page, _) = vmxon_region(ctx)?;
    machine::change_cr0(Cr0Flags::empty(), Cr0Flags::NUMERIC_ERROR);
    let operands = operand(ctx, page.address());
    let fault = Code::new(ctx, &raw::VMXON).run(operands).err();
    ensure_eq!(
        fault.map(|fault| (fault.vector, fault.error_code)),
        Some((13, 0)),
        "VMXON with CR0.NE clear"
    );
    Ok(())
}

fn vmxon_cpl3(ctx: &mut Ctx<'_>) -> Verdict {
    let (page, _) = vmxon_region(ctx)?;
    let operands = operand(ctx, page.address());
    let fault = Code::user(ctx, &raw::VMXON).run_user(ctx, operands);
    ensure_eq!(
        fault.map(|fault| (fault.vector, fault.error_code)),
        Some((13, 0)),
        "VMXON at CPL 3 outside VMX operation"
    );
    Ok(())
}

/// An address that this program maps nothing at.
const UNMAPPED: u64 = 0x40_0000_0000;
/// An address that is not canonical.
const NOT_CANONICAL: u64 = 0x4000_0000_0000_0000;

fn expect_pf(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    let operands =
        Operands { rdi: UNMAPPED, rcx: Field::GUEST_RIP.encoding().into(), ..Operands::default() };
    let Some(fault) = Code::new(ctx, raw).run(operands).err() else {
        crate::fail!("{} of unmapped memory does not fault", raw.name);
    };
    let writes = matches!(raw.name, "VMPTRST" | "VMREAD_MEMORY");
    ensure_eq!(fault.vector, 14, "vector");
    ensure_eq!(fault.error_code, if writes { 2 } else { 0 }, "error code");
    ensure_eq!(fault.cr2, UNMAPPED, "CR2");
    Ok(())
}

fn outside_pf(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    vmx::prepare()?;
    expect_pf(ctx, raw)
}

fn root_pf(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    with_current(ctx)?;
    expect_pf(ctx, raw)
}

fn root_gp(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    with_current(ctx)?;
    let operands = Operands { rdi: NOT_CANONICAL, ..Operands::default() };
    let fault = Code::new(ctx, raw).run(operands).err();
    ensure_eq!(
        fault.map(|fault| (fault.vector, fault.error_code)),
        Some((13, 0)),
        "{} of a non-canonical address",
        raw.name
    );
    Ok(())
}

fn outside_ud(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    vmx::prepare()?;
    let page = ctx.arena.page();
    let operands = operand(ctx, page.address());
    let fault = Code::new(ctx, raw).run(operands).err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(6), "{} outside VMX operation", raw.name);
    let fault = Code::user(ctx, raw).run_user(ctx, operands);
    ensure_eq!(fault.map(|fault| fault.vector), Some(6), "{} outside, at CPL 3", raw.name);
    Ok(())
}

fn vmfunc_in_root(ctx: &mut Ctx<'_>) -> Verdict {
    with_current(ctx)?;
    let fault = Code::new(ctx, &raw::VMFUNC).run(Operands::default()).err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(6), "VMFUNC in VMX root operation");
    Ok(())
}

fn cpl3_gp(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    let (vmx, page) = with_current(ctx)?;
    let needs_ept = matches!(raw.name, "INVEPT" | "INVVPID");
    if needs_ept && vmx.caps.ept.is_empty() {
        skip!("no EPT and no VPID");
    }
    let operands = operand(ctx, page.address());
    let fault = Code::user(ctx, raw).run_user(ctx, operands);
    ensure_eq!(
        fault.map(|fault| (fault.vector, fault.error_code)),
        Some((13, 0)),
        "{} at CPL 3",
        raw.name
    );
    ensure_eq!(current(ctx)?, page.address(), "current-VMCS pointer");
    Ok(())
}

fn ne_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    Vmx::on(ctx)?;
    let fault = crate::traps::catch(|| {
        machine::change_cr0(Cr0Flags::empty(), Cr0Flags::NUMERIC_ERROR);
    })
    .err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(13), "clearing CR0.NE in VMX operation");
    Ok(())
}

fn vmxe_fixed(ctx: &mut Ctx<'_>) -> Verdict {
    Vmx::on(ctx)?;
    let fault = crate::traps::catch(|| {
        machine::change_cr4(Cr4Flags::empty(), Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS);
    })
    .err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(13), "clearing CR4.VMXE in VMX operation");
    Ok(())
}

fn vmxoff_success(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, page) = with_current(ctx)?;
    ensure_eq!(vmx::vmclear(page), Ok(()), "VMCLEAR");
    let none = Operands::default();
    ensure_eq!(flags(ctx, &raw::VMXOFF, none)?, Flags::Succeed, "VMXOFF");
    let fault = Code::new(ctx, &raw::VMXOFF).run(none).err();
    ensure_eq!(fault.map(|fault| fault.vector), Some(6), "VMXOFF after VMXOFF");
    machine::change_cr4(Cr4Flags::empty(), Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS);
    machine::change_cr0(Cr0Flags::empty(), Cr0Flags::NUMERIC_ERROR);
    Ok(())
}

fn vmclear_success(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let page = vmx.region(ctx);
    let operands = operand(ctx, page.address());
    for round in 0..2 {
        ensure_eq!(flags(ctx, &raw::VMCLEAR, operands)?, Flags::Succeed, "VMCLEAR {round}");
        ensure_eq!(current(ctx)?, !0, "current-VMCS pointer");
    }
    Ok(())
}

fn vmclear_current(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, page) = with_current(ctx)?;
    vmcs::write(Field::GUEST_RIP, 0x1234_5678);
    let operands = operand(ctx, page.address());
    ensure_eq!(flags(ctx, &raw::VMCLEAR, operands)?, Flags::Succeed, "VMCLEAR");
    ensure_eq!(current(ctx)?, !0, "current-VMCS pointer");
    ensure_eq!(vmx::vmptrld(page), Ok(()), "VMPTRLD");
    ensure_eq!(vmcs::read(Field::GUEST_RIP), 0x1234_5678, "field written before VMCLEAR");
    Ok(())
}

fn vmclear_other(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, page) = with_current(ctx)?;
    let other = vmx.region(ctx);
    let operands = operand(ctx, other.address());
    ensure_eq!(flags(ctx, &raw::VMCLEAR, operands)?, Flags::Succeed, "VMCLEAR");
    ensure_eq!(current(ctx)?, page.address(), "current-VMCS pointer");
    Ok(())
}

fn vmclear_any_revision(ctx: &mut Ctx<'_>) -> Verdict {
    Vmx::on(ctx)?;
    let page = ctx.arena.page();
    page.write32(0, 0x7777_7777);
    let operands = operand(ctx, page.address());
    ensure_eq!(flags(ctx, &raw::VMCLEAR, operands)?, Flags::Succeed, "VMCLEAR");
    ensure_eq!(page.read32(0), 0x7777_7777, "revision identifier");
    Ok(())
}

/// VMCLEAR or VMPTRLD must fail with the address that `address` makes of the VMXON region, another
/// region and the physical-address width: VMfailInvalid, and VMfailValid where a VMCS is current.
fn pointer_fails(ctx: &mut Ctx<'_>, raw: &Raw, address: fn(Page, Page, u8) -> u64) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let page = ctx.arena.page();
    page.write32(0, vmx.caps.basic.revision());
    let address = address(vmx.vmxon_region, page, vmx.caps.width);
    let operands = operand(ctx, address);
    ensure_eq!(flags(ctx, raw, operands)?, Flags::FailInvalid, "without a current VMCS");
    let current_page = vmx.region(ctx);
    ensure_eq!(vmx::vmclear(current_page), Ok(()), "VMCLEAR");
    ensure_eq!(vmx::vmptrld(current_page), Ok(()), "VMPTRLD");
    let clear = raw.name == "VMCLEAR";
    let error = if address == vmx.vmxon_region.address() {
        if clear {
            VmInstructionError::VmclearVmxonPointer
        } else {
            VmInstructionError::VmptrldVmxonPointer
        }
    } else if address == page.address() {
        VmInstructionError::VmptrldRevision
    } else if clear {
        VmInstructionError::VmclearAddress
    } else {
        VmInstructionError::VmptrldAddress
    };
    expect_error(ctx, raw, operands, error)?;
    ensure_eq!(current(ctx)?, current_page.address(), "current-VMCS pointer");
    Ok(())
}

fn vmptrld_success(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let pages = [vmx.region(ctx), vmx.region(ctx), vmx.region(ctx)];
    for page in pages {
        ensure_eq!(vmx::vmclear(page), Ok(()), "VMCLEAR");
    }
    for round in 0..3 {
        for (index, page) in pages.into_iter().enumerate() {
            let operands = operand(ctx, page.address());
            ensure_eq!(flags(ctx, &raw::VMPTRLD, operands)?, Flags::Succeed, "VMPTRLD");
            ensure_eq!(current(ctx)?, page.address(), "current-VMCS pointer");
            if round > 0 {
                let kept = vmcs::read(Field::GUEST_RSP);
                ensure_eq!(kept, 0x1000 * index as u64 + round - 1, "field of VMCS {index}");
            }
            vmcs::write(Field::GUEST_RSP, 0x1000 * index as u64 + round);
        }
    }
    Ok(())
}

fn vmptrld_shadow(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, page) = with_current(ctx)?;
    let other = ctx.arena.page();
    other.write32(0, vmx.caps.basic.revision() | 1 << 31);
    vmx::note_region(other);
    let operands = operand(ctx, other.address());
    if vmx.caps.has2(vmx_defs::ProcCtls2::VMCS_SHADOWING) {
        ensure_eq!(flags(ctx, &raw::VMPTRLD, operands)?, Flags::Succeed, "VMPTRLD");
        ensure_eq!(current(ctx)?, other.address(), "current-VMCS pointer");
    } else {
        expect_error(ctx, &raw::VMPTRLD, operands, VmInstructionError::VmptrldRevision)?;
        ensure_eq!(current(ctx)?, page.address(), "current-VMCS pointer");
    }
    Ok(())
}

fn vmptrst_success(ctx: &mut Ctx<'_>) -> Verdict {
    let (_, page) = with_current(ctx)?;
    ensure_eq!(current(ctx)?, page.address(), "current-VMCS pointer");
    Ok(())
}

fn vmread_success(ctx: &mut Ctx<'_>) -> Verdict {
    with_current(ctx)?;
    vmcs::write(Field::GUEST_RIP, 0x8765_4321_1234_5678);
    let operands = Operands { rcx: 0x681E, rax: 0x5555, ..Operands::default() };
    let result = Code::new(ctx, &raw::VMREAD).run(operands);
    ensure_eq!(result, Ok((Flags::Succeed, 0x8765_4321_1234_5678)), "VMREAD, 64 bits");
    // Narrower fields are zero-extended.
    vmcs::write(Field::GUEST_ES_SELECTOR, 0x18);
    let operands = Operands { rcx: 0x0800, rax: !0, ..Operands::default() };
    let result = Code::new(ctx, &raw::VMREAD).run(operands);
    ensure_eq!(result, Ok((Flags::Succeed, 0x18)), "VMREAD, 16 bits");
    Ok(())
}

fn vmread_memory(ctx: &mut Ctx<'_>) -> Verdict {
    with_current(ctx)?;
    vmcs::write(Field::EXCEPTION_BITMAP, 0xDEAD_BEEF);
    let page = ctx.arena.page();
    page.fill(!0);
    let operands = Operands { rdi: page.address() + 8, rcx: 0x4004, ..Operands::default() };
    ensure_eq!(flags(ctx, &raw::VMREAD_MEMORY, operands)?, Flags::Succeed, "VMREAD");
    ensure_eq!(page.read(1), 0xDEAD_BEEF, "memory operand");
    ensure_eq!((page.read(0), page.read(2)), (!0, !0), "memory around it");
    Ok(())
}

fn vmread_high(ctx: &mut Ctx<'_>) -> Verdict {
    with_current(ctx)?;
    vmcs::write(Field::VMCS_LINK_POINTER, 0x8765_4321_1234_5678);
    let operands = Operands { rcx: 0x2801, ..Operands::default() };
    let result = Code::new(ctx, &raw::VMREAD).run(operands);
    ensure_eq!(result, Ok((Flags::Succeed, 0x8765_4321)), "VMREAD of the upper half");
    Ok(())
}

fn no_current(ctx: &mut Ctx<'_>, raw: &Raw) -> Verdict {
    Vmx::on(ctx)?;
    let operands = Operands { rcx: 0x681E, ..Operands::default() };
    ensure_eq!(flags(ctx, raw, operands)?, Flags::FailInvalid, "{}", raw.name);
    Ok(())
}

fn unsupported(ctx: &mut Ctx<'_>, raw: &Raw, encoding: u64) -> Verdict {
    with_current(ctx)?;
    let operands = Operands { rcx: encoding, rax: 0x5555, ..Operands::default() };
    let result = Code::new(ctx, raw).run(operands);
    ensure_eq!(result, Ok((Flags::FailValid, 0x5555)), "{} of {encoding:#x}", raw.name);
    let number = vmcs::read(Field::VM_INSTRUCTION_ERROR);
    ensure_eq!(number, VmInstructionError::UnsupportedComponent.number().into(), "error");
    Ok(())
}

fn vmwrite_success(ctx: &mut Ctx<'_>) -> Verdict {
    with_current(ctx)?;
    let operands = Operands { rcx: 0x681C, rax: 0x1122_3344_5566_7788, ..Operands::default() };
    ensure_eq!(flags(ctx, &raw::VMWRITE, operands)?, Flags::Succeed, "VMWRITE");
    ensure_eq!(vmcs::read(Field::GUEST_RSP), 0x1122_3344_5566_7788, "guest RSP");
    // Bits beyond the field's width are dropped.
    let operands = Operands { rcx: 0x0800, rax: 0x1122_3344_5566_7788, ..Operands::default() };
    ensure_eq!(flags(ctx, &raw::VMWRITE, operands)?, Flags::Succeed, "VMWRITE, 16 bits");
    ensure_eq!(vmcs::read(Field::GUEST_ES_SELECTOR), 0x7788, "guest ES selector");
    Ok(())
}

fn vmwrite_memory(ctx: &mut Ctx<'_>) -> Verdict {
    with_current(ctx)?;
    let page = ctx.arena.page();
    page.write(1, 0x8877_6655_4433_2211);
    let operands = Operands { rdi: page.address() + 8, rcx: 0x681C, ..Operands::default() };
    ensure_eq!(flags(ctx, &raw::VMWRITE_MEMORY, operands)?, Flags::Succeed, "VMWRITE");
    ensure_eq!(vmcs::read(Field::GUEST_RSP), 0x8877_6655_4433_2211, "guest RSP");
    Ok(())
}

fn vmwrite_high(ctx: &mut Ctx<'_>) -> Verdict {
    with_current(ctx)?;
    vmcs::write(Field::VMCS_LINK_POINTER, 0x1111_2222_3333_4444);
    let operands = Operands { rcx: 0x2801, rax: 0x9999_AAAA_BBBB_CCCC, ..Operands::default() };
    ensure_eq!(flags(ctx, &raw::VMWRITE, operands)?, Flags::Succeed, "VMWRITE");
    ensure_eq!(vmcs::read(Field::VMCS_LINK_POINTER), 0xBBBB_CCCC_3333_4444, "whole field");
    Ok(())
}

fn vmwrite_read_only(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, _) = with_current(ctx)?;
    let field = Field::EXIT_QUALIFICATION.encoding().into();
    let operands = Operands { rcx: field, rax: 0x77, ..Operands::default() };
    if vmx.caps.misc.vmwrite_any() {
        ensure_eq!(flags(ctx, &raw::VMWRITE, operands)?, Flags::Succeed, "VMWRITE");
        ensure_eq!(vmcs::read(Field::EXIT_QUALIFICATION), 0x77, "exit qualification");
        Ok(())
    } else {
        expect_error(ctx, &raw::VMWRITE, operands, VmInstructionError::ReadOnlyComponent)
    }
}

fn vmlaunch_not_clear(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    vm.exec(vmx::Op::Nothing)?;
    let none = Operands::default();
    expect_error(ctx, &raw::VMLAUNCH, none, VmInstructionError::VmlaunchNotClear)?;
    vm.exec(vmx::Op::Nothing)?;
    Ok(())
}

fn vmlaunch_after_vmclear(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    for _ in 0..3 {
        vm.exec(vmx::Op::Nothing)?;
        ensure!(vm.launched, "not launched");
        ensure_eq!(vmx::vmclear(vm.vmcs), Ok(()), "VMCLEAR");
        vm.make_current()?;
        vm.launched = false;
    }
    Ok(())
}

fn vmlaunch_mov_ss(ctx: &mut Ctx<'_>) -> Verdict {
    const MOV_SS_VMLAUNCH: Raw = Raw {
        name: "MOV SS; VMLAUNCH",
        // mov ss, ecx; vmlaunch
        bytes: &[0x8E, 0xD1, 0x0F, 0x01, 0xC2],
        reason: vmx_defs::ExitReason::VMLAUNCH,
    };
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let operands = Operands { rcx: crate::gdt::DATA.into(), ..Operands::default() };
    expect_error(ctx, &MOV_SS_VMLAUNCH, operands, VmInstructionError::EntryBlockedByMovSs)?;
    vm.exec(vmx::Op::Nothing)?;
    Ok(())
}

/// Breaks the VMCS, expects this VMfailValid, mends it and enters.
fn entry_fails(
    ctx: &mut Ctx<'_>,
    field: Field,
    bad: u64,
    error: VmInstructionError,
    resume: bool,
) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    if resume {
        vm.exec(vmx::Op::Nothing)?;
    }
    let good = vmcs::read(field);
    vmcs::write(field, bad);
    let outcome = vm.run();
    let expected = vmx::Outcome::VmFail(vmx_hw::VmFail::Valid, error.number().into());
    ensure_eq!(outcome, expected, "VM entry with {field:?} {bad:#x}");
    vmcs::write(field, good);
    vm.exec(vmx::Op::Nothing)?;
    Ok(())
}

fn vmlaunch_controls(ctx: &mut Ctx<'_>) -> Verdict {
    entry_fails(ctx, Field::EPT_POINTER, 0, VmInstructionError::EntryControls, false)
}

fn vmresume_controls(ctx: &mut Ctx<'_>) -> Verdict {
    entry_fails(ctx, Field::EPT_POINTER, 0, VmInstructionError::EntryControls, true)
}

fn vmlaunch_host_state(ctx: &mut Ctx<'_>) -> Verdict {
    entry_fails(ctx, Field::HOST_TR_SELECTOR, 0, VmInstructionError::EntryHostState, false)
}

fn vmlaunch_guest_state(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    vmcs::write(Field::GUEST_RFLAGS, 0);
    let exit = vm.run().exit()?;
    ensure_eq!(exit.reason.bits(), 1 << 31 | 33, "exit reason");
    ensure_eq!(exit.qualification, 0, "exit qualification");
    // The VMCS is not launched by an entry that fails so.
    let none = Operands::default();
    expect_error(ctx, &raw::VMRESUME, none, VmInstructionError::VmresumeNotLaunched)?;
    vmcs::write(Field::GUEST_RFLAGS, 2);
    vm.exec(vmx::Op::Nothing)?;
    Ok(())
}

fn vmresume_not_launched(ctx: &mut Ctx<'_>) -> Verdict {
    let vmx = Vmx::on(ctx)?;
    let mut vm = Vm::new(ctx, &vmx, Mode::Long)?;
    let none = Operands::default();
    expect_error(ctx, &raw::VMRESUME, none, VmInstructionError::VmresumeNotLaunched)?;
    vm.exec(vmx::Op::Nothing)?;
    Ok(())
}

/// Bochs ends itself at VMCALL in VMX root operation.
const ENDS_BOCHS: &str = "not executed: VMCALL in VMX root operation ends Bochs";

fn vmcall_no_current(ctx: &mut Ctx<'_>) -> Verdict {
    ensure!(!machine::is_bare_bochs(), "{ENDS_BOCHS}");
    no_current(ctx, &raw::VMCALL)
}

fn vmcall_in_root(ctx: &mut Ctx<'_>) -> Verdict {
    ensure!(!machine::is_bare_bochs(), "{ENDS_BOCHS}");
    with_current(ctx)?;
    expect_error(ctx, &raw::VMCALL, Operands::default(), VmInstructionError::VmcallInRoot)
}

/// VMsucceed leaves the VM-instruction error field alone.
fn error_kept(ctx: &mut Ctx<'_>) -> Verdict {
    let (vmx, _) = with_current(ctx)?;
    let operands = operand(ctx, vmx.vmxon_region.address());
    expect_error(ctx, &raw::VMXON, operands, VmInstructionError::VmxonInRoot)?;
    vmcs::write(Field::GUEST_RIP, 1);
    ensure_eq!(vmcs::read(Field::GUEST_RIP), 1, "guest RIP");
    ensure_eq!(vmcs::read(Field::VM_INSTRUCTION_ERROR), 15, "VM-instruction error");
    Ok(())
}
