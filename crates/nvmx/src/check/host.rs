//! Is the host-state area one that VM entry accepts?
//!
//! SDM Vol. 3C, "Checks on Host-State Area". Host state is what L1 will run with after the exit, so
//! L0 loads it too: a value that passes here must be one that the processor can be given.

use super::{
    CR4_LA57, CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_LME, has_fixed_bits, is_canonical, is_valid_pat,
    require,
};
use crate::caps::Caps;
use crate::vmcs12::Vmcs12;
use vmx_defs::controls::{EntryCtls, ExitCtls};
use vmx_defs::{Field, L1Gpa};

/// The requirement on the host-state area that a VMCS does not meet: VMfailValid with error 8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostFailure {
    /// CR0 has a bit with a value that VMX operation does not support.
    Cr0,
    /// CR4 has a bit with a value that VMX operation does not support.
    Cr4,
    /// CR3 has a bit beyond the physical-address width.
    Cr3,
    /// IA32_SYSENTER_ESP is not canonical.
    SysenterEsp,
    /// IA32_SYSENTER_EIP is not canonical.
    SysenterEip,
    /// IA32_PAT has an entry with a reserved memory type.
    Pat,
    /// IA32_EFER has a reserved bit.
    EferReserved,
    /// IA32_EFER.LMA is not equal to "host address-space size".
    EferLma,
    /// IA32_EFER.LME is not equal to "host address-space size".
    EferLme,
    /// The ES selector has an RPL or TI that is not 0.
    EsSelector,
    /// The CS selector has an RPL or TI that is not 0.
    CsSelector,
    /// The SS selector has an RPL or TI that is not 0.
    SsSelector,
    /// The DS selector has an RPL or TI that is not 0.
    DsSelector,
    /// The FS selector has an RPL or TI that is not 0.
    FsSelector,
    /// The GS selector has an RPL or TI that is not 0.
    GsSelector,
    /// The TR selector has an RPL or TI that is not 0.
    TrSelector,
    /// The CS selector is 0000H.
    CsNull,
    /// The TR selector is 0000H.
    TrNull,
    /// The SS selector is 0000H for a 32-bit host.
    SsNull,
    /// The FS base is not canonical.
    FsBase,
    /// The GS base is not canonical.
    GsBase,
    /// The TR base is not canonical.
    TrBase,
    /// The GDTR base is not canonical.
    GdtrBase,
    /// The IDTR base is not canonical.
    IdtrBase,
    /// "IA-32e mode guest" with an L1 that is not in IA-32e mode, or with a 32-bit host.
    Ia32eGuest,
    /// "Host address-space size" is not equal to IA32_EFER.LMA of L1 at the time of entry.
    AddressSpaceSize,
    /// CR4.PCIDE is set for a 32-bit host.
    Pcide,
    /// CR4.PAE is clear for a 64-bit host.
    Pae,
    /// RIP is above 4 GiB for a 32-bit host.
    RipHigh,
    /// RIP is not canonical for a 64-bit host.
    RipCanonical,
}

use HostFailure as F;

/// Checks the host-state area. `l1_lma` is IA32_EFER.LMA of L1 as it executes VMLAUNCH or VMRESUME.
///
/// # Errors
/// The first requirement that is not met.
pub fn host_state(vmcs: &Vmcs12, caps: &Caps, l1_lma: bool) -> Result<(), HostFailure> {
    address_space_size(vmcs, l1_lma)?;
    registers(vmcs, caps)?;
    segments(vmcs, caps)?;
    by_size(vmcs)
}

fn is_64bit_host(vmcs: &Vmcs12) -> bool {
    vmcs.exit_ctls().contains(ExitCtls::HOST_ADDRESS_SPACE_SIZE)
}

/// "Checks Related to Address-Space Size", the part on the controls.
fn address_space_size(vmcs: &Vmcs12, l1_lma: bool) -> Result<(), F> {
    let guest = vmcs.entry_ctls().contains(EntryCtls::IA32E_MODE_GUEST);
    require(is_64bit_host(vmcs) == l1_lma, F::AddressSpaceSize)?;
    require(!guest || l1_lma, F::Ia32eGuest)
}

/// "Checks on Host Control Registers, MSRs, and SSP".
fn registers(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    let (cr0, cr4) = (vmcs.get(Field::HOST_CR0), vmcs.get(Field::HOST_CR4));
    require(has_fixed_bits(cr0, caps.cr0_fixed0, caps.cr0_fixed1), F::Cr0)?;
    require(has_fixed_bits(cr4, caps.cr4_fixed0, caps.cr4_fixed1), F::Cr4)?;
    require(L1Gpa::new(vmcs.get(Field::HOST_CR3)).fits(caps.physical_width), F::Cr3)?;
    canonical(vmcs, caps, Field::HOST_SYSENTER_ESP, F::SysenterEsp)?;
    canonical(vmcs, caps, Field::HOST_SYSENTER_EIP, F::SysenterEip)?;

    let exit = vmcs.exit_ctls();
    if exit.contains(ExitCtls::LOAD_PAT) {
        require(is_valid_pat(vmcs.get(Field::HOST_PAT)), F::Pat)?;
    }
    if exit.contains(ExitCtls::LOAD_EFER) {
        let efer = vmcs.get(Field::HOST_EFER);
        require(efer & !caps.efer == 0, F::EferReserved)?;
        require((efer & EFER_LMA != 0) == is_64bit_host(vmcs), F::EferLma)?;
        require((efer & EFER_LME != 0) == is_64bit_host(vmcs), F::EferLme)?;
    }
    Ok(())
}

/// "Checks on Host Segment and Descriptor-Table Registers".
fn segments(vmcs: &Vmcs12, caps: &Caps) -> Result<(), F> {
    for (field, failure) in [
        (Field::HOST_ES_SELECTOR, F::EsSelector),
        (Field::HOST_CS_SELECTOR, F::CsSelector),
        (Field::HOST_SS_SELECTOR, F::SsSelector),
        (Field::HOST_DS_SELECTOR, F::DsSelector),
        (Field::HOST_FS_SELECTOR, F::FsSelector),
        (Field::HOST_GS_SELECTOR, F::GsSelector),
        (Field::HOST_TR_SELECTOR, F::TrSelector),
    ] {
        require(vmcs.get(field) & 7 == 0, failure)?;
    }
    require(vmcs.get(Field::HOST_CS_SELECTOR) != 0, F::CsNull)?;
    require(vmcs.get(Field::HOST_TR_SELECTOR) != 0, F::TrNull)?;
    require(is_64bit_host(vmcs) || vmcs.get(Field::HOST_SS_SELECTOR) != 0, F::SsNull)?;
    canonical(vmcs, caps, Field::HOST_FS_BASE, F::FsBase)?;
    canonical(vmcs, caps, Field::HOST_GS_BASE, F::GsBase)?;
    canonical(vmcs, caps, Field::HOST_GDTR_BASE, F::GdtrBase)?;
    canonical(vmcs, caps, Field::HOST_IDTR_BASE, F::IdtrBase)?;
    canonical(vmcs, caps, Field::HOST_TR_BASE, F::TrBase)
}

/// "Checks Related to Address-Space Size", the part on host state.
fn by_size(vmcs: &Vmcs12) -> Result<(), F> {
    let (cr4, rip) = (vmcs.get(Field::HOST_CR4), vmcs.get(Field::HOST_RIP));
    if is_64bit_host(vmcs) {
        require(cr4 & CR4_PAE != 0, F::Pae)?;
        // The instruction pointer is judged by the paging that the exit establishes.
        let width = if cr4 & CR4_LA57 != 0 { 57 } else { 48 };
        require(is_canonical(rip, width), F::RipCanonical)
    } else {
        require(cr4 & CR4_PCIDE == 0, F::Pcide)?;
        require(rip >> 32 == 0, F::RipHigh)
    }
}

/// Bases and MSRs are judged by the widest linear address that the processor has, whatever paging
/// the exit establishes.
fn canonical(vmcs: &Vmcs12, caps: &Caps, field: Field, failure: F) -> Result<(), F> {
    require(is_canonical(vmcs.get(field), caps.linear_width), failure)
}
