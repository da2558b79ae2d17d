//! The conformance suite: every case of one processor, or with `cpus=N` on the command line those of
//! several, or what `only=` names of them.
#![cfg_attr(image, no_std, no_main)]

use nvmx_guests::{cases, multiboot, suite};

fn conformance(info: &'static multiboot::Info) -> bool {
    let several = !suite::option(&info.command_line, "cpus").is_empty();
    suite::run(info, if several { cases::SEVERAL } else { cases::ALL })
}

nvmx_guests::entry_point!(conformance);
