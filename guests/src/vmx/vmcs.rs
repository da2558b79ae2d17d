//! Answers: how are fields of the current VMCS read and written by a case that expects success?

use vmx_defs::Field;

/// Reads a field; VMfail is a panic, which fails the case.
#[track_caller]
#[inline(always)]
pub fn read(field: Field) -> u64 {
    // SAFETY: a #UD outside VMX operation is caught.
    match unsafe { vmx_hw::vmread(field) } {
        Ok(value) => value,
        Err(fail) => panic!("VMREAD of {field:?}: {fail:?}"),
    }
}

/// Writes a field; VMfail is a panic, which fails the case.
#[track_caller]
#[inline(always)]
pub fn write(field: Field, value: u64) {
    // SAFETY: the fields describe an L2 that this program made; host state is its own.
    if let Err(fail) = unsafe { vmx_hw::vmwrite(field, value) } {
        panic!("VMWRITE of {field:?}: {fail:?}");
    }
}

/// Sets and clears bits of a field.
#[track_caller]
pub fn change(field: Field, set: u64, clear: u64) {
    write(field, (read(field) | set) & !clear);
}
