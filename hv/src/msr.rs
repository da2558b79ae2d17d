//! How does L0 read and write model-specific registers, its own and those of L1's that may not
//! exist on this processor?

/// GS base.
pub(crate) const GS_BASE: u32 = 0xC000_0101;

#[cfg(freestanding)]
core::arch::global_asm!(
    r#"
    .text
    .global nvmx_rdmsr, nvmx_wrmsr, nvmx_xsetbv
    .global nvmx_rdmsr_instruction, nvmx_wrmsr_instruction, nvmx_xsetbv_instruction
    .global nvmx_fault_landing
    nvmx_rdmsr:
        mov ecx, edi
    nvmx_rdmsr_instruction:
        rdmsr
        shl rdx, 32
        or rax, rdx
        mov [rsi], rax
        mov eax, 1
        ret
    nvmx_wrmsr:
        mov ecx, edi
        mov eax, esi
        mov rdx, rsi
        shr rdx, 32
    nvmx_wrmsr_instruction:
        wrmsr
        mov eax, 1
        ret
    nvmx_xsetbv:
        mov ecx, edi
        mov eax, esi
        mov rdx, rsi
        shr rdx, 32
    nvmx_xsetbv_instruction:
        xsetbv
        mov eax, 1
        ret
    // Nothing was pushed since the call: the caller sees 0.
    nvmx_fault_landing:
        xor eax, eax
        ret
    "#
);

unsafe extern "C" {
    fn nvmx_rdmsr(index: u32, value: *mut u64) -> u32;
    fn nvmx_wrmsr(index: u32, value: u64) -> u32;
    fn nvmx_xsetbv(index: u32, value: u64) -> u32;
}

/// The register or the value raises #GP on this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MsrFault;

/// RDMSR that may fault.
pub(crate) fn try_read(index: u32) -> Result<u64, MsrFault> {
    let mut value = 0;
    // SAFETY: a fault of the instruction is caught, and reading an MSR harms nothing L0 relies on.
    if unsafe { nvmx_rdmsr(index, &mut value) } != 0 { Ok(value) } else { Err(MsrFault) }
}

/// WRMSR that may fault.
///
/// # Safety
/// The value must leave L0's own execution as it is: not EFER, STAR, the FS or GS base and the like,
/// unless with a value that L0 can run with.
pub(crate) unsafe fn try_write(index: u32, value: u64) -> Result<(), MsrFault> {
    // SAFETY: as the caller promises; a fault is caught.
    if unsafe { nvmx_wrmsr(index, value) } != 0 { Ok(()) } else { Err(MsrFault) }
}

/// XSETBV that may fault.
pub(crate) fn try_xsetbv(index: u32, value: u64) -> Result<(), MsrFault> {
    // SAFETY: L0 uses no state that XCR0 governs but SSE's, which can be used without it; a fault
    // is caught.
    if unsafe { nvmx_xsetbv(index, value) } != 0 { Ok(()) } else { Err(MsrFault) }
}

/// RDMSR of a register that every 64-bit processor has.
///
/// # Panics
/// If it does not exist after all.
pub(crate) fn read(index: u32) -> u64 {
    match try_read(index) {
        Ok(value) => value,
        Err(MsrFault) => panic!("MSR {index:#x} cannot be read"),
    }
}

/// WRMSR of a register of L0's own, with a value that the processor takes.
///
/// # Panics
/// If the processor refuses it.
///
/// # Safety
/// As [`try_write`].
pub(crate) unsafe fn write(index: u32, value: u64) {
    // SAFETY: as the caller promises.
    if unsafe { try_write(index, value) }.is_err() {
        panic!("MSR {index:#x} refuses {value:#x}")
    }
}
