//! What does each VMX instruction do, and how does it say that it failed?

use core::arch::asm;
use vmx_defs::{Field, Hpa};

/// How a VMX instruction failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmFail {
    /// CF was set: there is no current VMCS to put an error number into.
    Invalid,
    /// ZF was set: the current VMCS's VM-instruction error field says why.
    Valid,
}

/// What a VMX instruction returns.
pub type VmxResult<T = ()> = Result<T, VmFail>;

#[inline(always)]
fn verdict(cf: u8, zf: u8) -> VmxResult {
    if cf != 0 {
        Err(VmFail::Invalid)
    } else if zf != 0 {
        Err(VmFail::Valid)
    } else {
        Ok(())
    }
}

macro_rules! pointer_instruction {
    ($(#[$doc:meta])* $name:ident, $mnemonic:literal) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// As the instruction's flags say.
        ///
        /// # Safety
        /// The processor must be where the instruction does not fault (or the caller catches the
        /// fault), and `region` must be memory that the caller gives to the processor.
        #[inline(always)]
        pub unsafe fn $name(region: Hpa) -> VmxResult {
            let operand = region.as_u64();
            let (cf, zf): (u8, u8);
            // SAFETY: the operand is a local variable; the rest is the caller's promise.
            unsafe {
                asm!(
                    concat!($mnemonic, " qword ptr [{}]"),
                    "setc {}",
                    "setz {}",
                    in(reg) &raw const operand,
                    out(reg_byte) cf,
                    out(reg_byte) zf,
                );
            }
            verdict(cf, zf)
        }
    };
}

pointer_instruction! {
    /// VMXON: enters VMX operation with the VMXON region at `region`.
    vmxon, "vmxon"
}
pointer_instruction! {
    /// VMCLEAR: writes the VMCS at `region` back to memory and sets its launch state to clear.
    vmclear, "vmclear"
}
pointer_instruction! {
    /// VMPTRLD: makes the VMCS at `region` current.
    vmptrld, "vmptrld"
}

/// VMXOFF: leaves VMX operation.
///
/// # Errors
/// As the instruction's flags say.
///
/// # Safety
/// The processor must be in VMX root operation, or the caller catches the #UD.
#[inline(always)]
pub unsafe fn vmxoff() -> VmxResult {
    let (cf, zf): (u8, u8);
    // SAFETY: no memory operand; the rest is the caller's promise.
    unsafe { asm!("vmxoff", "setc {}", "setz {}", out(reg_byte) cf, out(reg_byte) zf) };
    verdict(cf, zf)
}

/// VMPTRST: the address of the current VMCS, or all ones where there is none.
///
/// # Safety
/// The processor must be in VMX root operation, or the caller catches the #UD.
#[inline(always)]
pub unsafe fn vmptrst() -> Hpa {
    let mut pointer = 0u64;
    // SAFETY: the operand is a local variable; the rest is the caller's promise.
    unsafe { asm!("vmptrst qword ptr [{}]", in(reg) &raw mut pointer) };
    Hpa::new(pointer)
}

/// How a VMREAD or VMWRITE failed, of which one condition was asked: it is CF where there is no
/// current VMCS (SDM Vol. 3C, "Conventions").
///
/// # Safety
/// As [`vmptrst`].
#[cold]
unsafe fn why() -> VmFail {
    // SAFETY: the caller's promise is the same.
    let current = unsafe { vmptrst() };
    if current == Hpa::new(u64::MAX) { VmFail::Invalid } else { VmFail::Valid }
}

/// VMREAD of a raw encoding, for tests of encodings that no [`Field`] has.
///
/// # Errors
/// As the instruction's flags say.
///
/// # Safety
/// The processor must be in VMX operation, or the caller catches the #UD.
#[inline(always)]
pub unsafe fn vmread_raw(encoding: u64) -> VmxResult<u64> {
    let value: u64;
    let failed: u8;
    // SAFETY: register operands only; the rest is the caller's promise.
    unsafe {
        asm!(
            "vmread {value}, {encoding}",
            "setbe {failed}",
            encoding = in(reg) encoding,
            value = lateout(reg) value,
            failed = lateout(reg_byte) failed,
            // The VMCS is no memory that Rust knows of.
            options(nomem, nostack),
        );
    }
    // SAFETY: where VMREAD did not fault, VMPTRST does not either.
    if failed == 0 { Ok(value) } else { Err(unsafe { why() }) }
}

/// VMREAD: the value of a field of the current VMCS.
///
/// # Errors
/// As the instruction's flags say.
///
/// # Safety
/// The processor must be in VMX operation, or the caller catches the #UD.
#[inline(always)]
pub unsafe fn vmread(field: Field) -> VmxResult<u64> {
    // SAFETY: the caller's promise is the same.
    unsafe { vmread_raw(u64::from(field.encoding())) }
}

/// VMWRITE of a raw encoding, for tests of encodings that no [`Field`] has.
///
/// # Errors
/// As the instruction's flags say.
///
/// # Safety
/// The processor must be in VMX operation (or the caller catches the #UD), and what the field then
/// makes the processor do must be sound.
#[inline(always)]
pub unsafe fn vmwrite_raw(encoding: u64, value: u64) -> VmxResult {
    // SAFETY: register operands only; the rest is the caller's promise.
    unsafe {
        asm!(
            "vmwrite {encoding}, {value}",
            "jbe {failed}",
            encoding = in(reg) encoding,
            value = in(reg) value,
            // SAFETY: where VMWRITE did not fault, VMPTRST does not either.
            failed = label { return Err(unsafe { why() }) },
            // The VMCS is no memory that Rust knows of.
            options(nomem, nostack),
        );
    }
    Ok(())
}

/// VMWRITE: sets a field of the current VMCS.
///
/// # Errors
/// As the instruction's flags say.
///
/// # Safety
/// As [`vmwrite_raw`].
#[inline(always)]
pub unsafe fn vmwrite(field: Field, value: u64) -> VmxResult {
    // SAFETY: the caller's promise is the same.
    unsafe { vmwrite_raw(u64::from(field.encoding()), value) }
}

/// INVEPT with any type and descriptor: bits 63:0 of the descriptor are an EPTP, the rest is
/// reserved.
///
/// # Errors
/// As the instruction's flags say.
///
/// # Safety
/// The processor must be in VMX root operation, or the caller catches the fault.
#[inline(always)]
pub unsafe fn invept(kind: u64, descriptor: [u64; 2]) -> VmxResult {
    let (cf, zf): (u8, u8);
    // SAFETY: the descriptor is a local variable; dropping cached translations changes no memory.
    unsafe {
        asm!(
            "invept {}, xmmword ptr [{}]",
            "setc {}",
            "setz {}",
            in(reg) kind,
            in(reg) &raw const descriptor,
            out(reg_byte) cf,
            out(reg_byte) zf,
        );
    }
    verdict(cf, zf)
}

/// INVVPID with any type and descriptor: bits 15:0 of the descriptor are a VPID, bits 127:64 a
/// linear address, the rest is reserved.
///
/// # Errors
/// As the instruction's flags say.
///
/// # Safety
/// The processor must be in VMX root operation, or the caller catches the fault.
#[inline(always)]
pub unsafe fn invvpid(kind: u64, descriptor: [u64; 2]) -> VmxResult {
    let (cf, zf): (u8, u8);
    // SAFETY: the descriptor is a local variable; dropping cached translations changes no memory.
    unsafe {
        asm!(
            "invvpid {}, xmmword ptr [{}]",
            "setc {}",
            "setz {}",
            in(reg) kind,
            in(reg) &raw const descriptor,
            out(reg_byte) cf,
            out(reg_byte) zf,
        );
    }
    verdict(cf, zf)
}
