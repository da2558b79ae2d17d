//! Answers: what does compiled Rust expect of its surroundings, where there is no libc?
//!
//! Only in the image: the five memory functions (the prebuilt `compiler_builtins` of a Linux
//! target leaves them to libc), the personality symbol that the prebuilt `core` names, and the
//! panic handler.

use core::{arch::asm, panic::PanicInfo};

/// Copies `count` bytes that do not overlap.
///
/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // Eight bytes at a time: an emulator counts, and executes, each repetition.
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        asm!(
            "rep movsq",
            "mov rcx, {rest}",
            "rep movsb",
            rest = in(reg) count % 8,
            inout("rcx") count / 8 => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Copies `count` bytes that may overlap.
///
/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: a forward copy never overwrites what it has still to read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller vouches for both ranges; DF is cleared again.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _,
            options(nostack)
        );
    }
    to
}

/// Fills `count` bytes.
///
/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range.
    unsafe {
        asm!(
            "rep stosq",
            "mov rcx, {rest}",
            "rep stosb",
            rest = in(reg) count % 8,
            inout("rcx") count / 8 => _,
            inout("rdi") to => _,
            in("rax") u64::from(value as u8) * 0x0101_0101_0101_0101,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Compares `count` bytes.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller vouches for both ranges; volatile keeps the compiler from turning
        // the loop into a call of this very function.
        let (a, b) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// Tells whether `count` bytes differ.
///
/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: same contract.
    unsafe { memcmp(left, right, count) }
}

/// Named by the prebuilt `core`, never called: the image aborts on panic.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    crate::traps::on_panic(info)
}
