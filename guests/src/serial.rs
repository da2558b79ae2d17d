//! Answers: where does the output go?
//!
//! To COM1, polled. (The crate `uart_16550` would do; what is needed of it are these few lines,
//! without its abstraction over port and memory access.)

use core::fmt;

use x86_64::instructions::port::Port;

const COM1: u16 = 0x3F8;

/// Sets COM1 to 115200 baud, 8N1, FIFOs on, interrupts off.
pub fn init() {
    for (offset, value) in
        [(1, 0x00_u8), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0xC7), (4, 0x03)]
    {
        // SAFETY: COM1 belongs to this program; its registers touch no memory.
        unsafe { Port::<u8>::new(COM1 + offset).write(value) };
    }
}

/// Writes one byte, waiting for room, but not for ever (a machine may have no COM1).
fn write_byte(byte: u8) {
    for _ in 0..100_000 {
        // SAFETY: reading the line status register has no effect on memory.
        let status: u8 = unsafe { Port::new(COM1 + 5).read() };
        if status & 0x20 != 0 {
            break;
        }
    }
    // SAFETY: as above.
    unsafe { Port::new(COM1).write(byte) };
}

/// Waits until the last byte has left, but not for ever.
pub fn flush() {
    for _ in 0..1_000_000 {
        // SAFETY: as above.
        let status: u8 = unsafe { Port::new(COM1 + 5).read() };
        if status & 0x40 != 0 {
            break;
        }
    }
}

/// COM1 as a text writer; a newline is sent as it is.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(write_byte);
        Ok(())
    }
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::serial::Serial, format_args!($($arg)*));
        let _ = core::fmt::Write::write_str(&mut $crate::serial::Serial, "\n");
    }};
}
