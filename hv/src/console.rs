//! How does L0 speak, and how does it end the machine?
//!
//! Lines go to COM1, each beginning `nvmx: `. L1 owns that port: L0 never changes its settings
//! after the start, and waits for it a bounded time only (a driver crate waits for ever, which an
//! L1 that turned the port into loopback could use to stop L0).

use core::arch::x86_64::__cpuid;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use spin::Mutex;
use x86_64::instructions::port::Port;

const COM1: u16 = 0x3F8;
/// Polls of the line status before a byte is given up: far longer than a byte at 9600 baud takes.
const PATIENCE: u32 = 1_000_000;
/// The port on which Bochs listens for a request to end.
const SHUTDOWN_PORT: u16 = 0x8900;

static ENABLED: AtomicBool = AtomicBool::new(true);
static LINE: Mutex<()> = Mutex::new(());

struct Com1;

impl Com1 {
    fn byte(byte: u8) {
        let mut status: Port<u8> = Port::new(COM1 + 5);
        let mut data: Port<u8> = Port::new(COM1);
        for _ in 0..PATIENCE {
            // SAFETY: reading the line status of the PC's first serial port changes only its error
            // flags.
            if unsafe { status.read() } & 0x20 != 0 {
                break;
            }
        }
        // SAFETY: a write to the data port sends the byte.
        unsafe { data.write(byte) };
    }
}

impl Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                Self::byte(b'\r');
            }
            Self::byte(byte);
        }
        Ok(())
    }
}

/// Sets COM1 to 115200 baud, 8 bits, no parity, no interrupts. Once, before L1 runs.
pub(crate) fn init() {
    for (offset, value) in
        [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0xC7), (4, 0x03)]
    {
        // SAFETY: the registers of the first serial port, which nobody uses yet.
        unsafe { Port::<u8>::new(COM1 + offset).write(value) };
    }
}

/// Obeys `console=off`.
pub(crate) fn set_enabled(enabled: bool) {
    ENABLED.store(enabled, Ordering::Relaxed);
}

/// Writes one line, `nvmx: ` before it. Use `say!`.
pub(crate) fn say(text: fmt::Arguments<'_>) {
    if ENABLED.load(Ordering::Relaxed) && ENDING.load(Ordering::Relaxed) == 0 {
        let _line = LINE.lock();
        // `Com1` never reports an error.
        let _ = writeln!(Com1, "nvmx: {text}");
    }
}

/// Writes one line on COM1, formatted as `format!` does.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => { $crate::console::say(format_args!($($argument)*)) };
}

/// Waits until the last byte has left the port, or never will.
fn drain() {
    let mut status: Port<u8> = Port::new(COM1 + 5);
    for _ in 0..PATIENCE {
        // SAFETY: as in `Com1::byte`.
        if unsafe { status.read() } & 0x40 != 0 {
            return;
        }
    }
}

/// Ends the machine as failed: an emulator exits with a failure, a real machine stops here.
fn end_machine_failed() -> ! {
    drain();
    for byte in *b"Shutdown" {
        // SAFETY: no device of a PC but Bochs's listens on this port.
        unsafe { Port::<u8>::new(SHUTDOWN_PORT).write(byte) };
    }
    stop()
}

/// Who ends the machine: 1 more than its APIC identifier, 0 while nobody does.
static ENDING: AtomicU32 = AtomicU32::new(0);

/// Says why, and ends the machine as failed. Of several processors that fail at once the first one
/// speaks.
pub(crate) fn fail(text: fmt::Arguments<'_>) -> ! {
    let own = (__cpuid(1).ebx >> 24) + 1;
    match ENDING.compare_exchange(0, own, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) if ENABLED.load(Ordering::Relaxed) => {
            // Without the line's lock: whoever holds it may never give it back. `Com1` never
            // reports an error.
            let _ = writeln!(Com1, "nvmx: {text}");
        }
        Ok(_) => {}
        // A fault on the way here.
        Err(other) if other == own => {}
        Err(_) => stop(),
    }
    end_machine_failed()
}

fn stop() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}
