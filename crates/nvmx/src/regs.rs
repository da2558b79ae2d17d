//! Which values do a guest's general registers hold?

/// The general registers that no VMCS field holds, in the order of their encoding. Slot 4 (RSP) is
/// in the VMCS and not used here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Gprs {
    /// RAX, RCX, RDX, RBX, (RSP), RBP, RSI, RDI, R8 to R15.
    pub values: [u64; 16],
}

/// Number of RAX in instruction encodings and in [`Gprs`].
pub const RAX: u8 = 0;
/// Number of RCX.
pub const RCX: u8 = 1;
/// Number of RDX.
pub const RDX: u8 = 2;
/// Number of RBX.
pub const RBX: u8 = 3;
/// Number of RSP, which [`Gprs`] does not hold.
pub const RSP: u8 = 4;

impl Gprs {
    /// Value of register `number` (bits 3:0 count), RSP excepted: the VMCS holds that one.
    #[inline]
    pub fn get(&self, number: u8) -> u64 {
        self.values.get(usize::from(number & 15)).copied().unwrap_or(0)
    }

    /// Sets register `number` (bits 3:0 count), RSP excepted.
    #[inline]
    pub fn set(&mut self, number: u8, value: u64) {
        if let Some(register) = self.values.get_mut(usize::from(number & 15)) {
            *register = value;
        }
    }
}
