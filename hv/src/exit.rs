//! What happens at a VM exit?

use nvmx::Gprs;

/// Called at every exit, on the processor's own stack.
pub(crate) unsafe extern "C" fn handle(_registers: *mut Gprs) {}

/// Called when VMLAUNCH or VMRESUME failed: a bug of ours.
pub(crate) extern "C" fn entry_failed() -> ! {
    crate::console::fail(format_args!("VM entry failed"))
}
