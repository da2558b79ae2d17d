//! The conformance suite: every case of the library, or those that `only=` names.
#![cfg_attr(image, no_std, no_main)]

use nvmx_guests::{cases, multiboot, suite};

fn conformance(info: &'static multiboot::Info) -> bool {
    suite::run(info, cases::ALL)
}

nvmx_guests::entry_point!(conformance);
