//! What does the compiler expect a C runtime to provide? Memory functions, the unwinder's symbol
//! and a panic handler: here, for the freestanding image only.

use core::arch::asm;
use core::panic::PanicInfo;

/// Ends the machine on a bug of L0, with one line that says where.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line) = info.location().map_or(("?", 0), |place| (place.file(), place.line()));
    crate::console::fail(format_args!("panic at {file}:{line}: {}", info.message()))
}

/// Named by the prebuilt `core` and `alloc`; never called, since panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller promises both ranges valid and disjoint; the direction flag is clear by
    // the ABI.
    unsafe {
        // Words first: an emulator counts an instruction for each repetition.
        asm!("rep movsq", "mov rcx, {tail}", "rep movsb", tail = in(reg) len % 8,
             inout("rcx") len / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: forward copying never overwrites a byte before it is read, since `to` lies
        // before `from` or behind its end.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: `len` is not 0 here (the difference above is below it), so that both last bytes
    // exist; the direction flag is restored.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") to.add(len - 1) => _,
             inout("rsi") from.add(len - 1) => _, options(nostack));
    }
    to
}

/// C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller promises the range valid.
    unsafe {
        let word = u64::from(byte as u8) * 0x0101_0101_0101_0101;
        asm!("rep stosq", "mov rcx, {tail}", "rep stosb", tail = in(reg) len % 8,
             inout("rcx") len / 8 => _, inout("rdi") to => _, in("rax") word,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    let mut start = 0;
    while start + 8 <= len {
        // SAFETY: the caller promises both ranges valid for `len` bytes.
        let (l, r) = unsafe {
            (
                left.add(start).cast::<u64>().read_unaligned(),
                right.add(start).cast::<u64>().read_unaligned(),
            )
        };
        if l != r {
            break;
        }
        start += 8;
    }
    for i in start..len {
        // SAFETY: the caller promises both ranges valid for `len` bytes. Volatile, so that the
        // loop is not turned into a call of this very function.
        let (l, r) = unsafe { (left.add(i).read_volatile(), right.add(i).read_volatile()) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

/// C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, len) }
}

/// C's `strlen`.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: the caller promises a terminating zero byte.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
