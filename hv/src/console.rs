//! How does L0 speak, and how does it end the machine?
//!
//! Lines go to COM1, each beginning `nvmx: `. L1 owns that port: L0 never changes its settings
//! after the start, and waits for it a bounded time only (a driver crate waits for ever, which an
//! L1 that turned the port into loopback could use to stop L0).

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

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
    if ENABLED.load(Ordering::Relaxed) {
        let _line = LINE.lock();
        // `Com1` never reports an error.
        let _ = writeln!(Com1, "nvmx: {text}");
    }
}

/// As [`say`], for a processor that dies: whoever holds the line may never give it back.
pub(crate) fn force_say(text: fmt::Arguments<'_>) {
    if ENABLED.load(Ordering::Relaxed) {
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
pub(crate) fn end_machine_failed() -> ! {
    drain();
    for byte in *b"Shutdown" {
        // SAFETY: no device of a PC but Bochs's listens on this port.
        unsafe { Port::<u8>::new(SHUTDOWN_PORT).write(byte) };
    }
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}

/// Says why, and ends the machine as failed.
pub(crate) fn fail(text: fmt::Arguments<'_>) -> ! {
    force_say(text);
    end_machine_failed()
}
