//! The benchmark: what a switch and an exit cost, in instructions.
#![cfg_attr(image, no_std, no_main)]

use nvmx_guests::multiboot;

fn program(_: &'static multiboot::Info) -> bool {
    false
}

nvmx_guests::entry_point!(program);
