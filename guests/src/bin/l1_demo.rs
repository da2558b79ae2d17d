//! The demonstration: L2 switches between views of one guest-physical page.
#![cfg_attr(image, no_std, no_main)]

use nvmx_guests::multiboot;

fn program(_: &'static multiboot::Info) -> bool {
    false
}

nvmx_guests::entry_point!(program);
