//! Answers: which cases are there? A file adds itself here.

use crate::suite::Case;

pub mod behaviour;
pub mod controls;
pub mod delivery;
pub mod entry_checks;
pub mod environment;
pub mod ept;
pub mod fields;
pub mod harness;
pub mod hostile;
pub mod instructions;
pub mod intercepts;
pub mod invalidate;
pub mod l2;
pub mod no_ept;
pub mod operands;
pub mod seed;
pub mod smp;
pub mod vpids;

/// Every case of one processor, file by file, in the order they run.
pub const ALL: &[&[Case]] = &[
    harness::CASES,
    instructions::CASES,
    fields::CASES,
    controls::CAPABILITIES,
    controls::CONTROLS,
    entry_checks::controls::CASES,
    entry_checks::inject::CASES,
    entry_checks::host::CASES,
    entry_checks::guest::CASES,
    entry_checks::segments::CASES,
    entry_checks::state::CASES,
    entry_checks::msr_areas::CASES,
    entry_checks::failure::CASES,
    delivery::CASES,
    l2::CASES,
    intercepts::CASES,
    ept::MATRIX,
    ept::PERMISSIONS,
    ept::LEVELS,
    ept::LARGE_PAGES,
    ept::NEIGHBOURS,
    ept::MISCONFIGURATIONS,
    ept::AD,
    ept::WALK,
    ept::TABLES,
    ept::TYPES,
    ept::RANDOM,
    ept::MANY,
    seed::S1,
    seed::S2,
    seed::S3,
    seed::S4,
    seed::S5,
    seed::S6,
    seed::S7,
    seed::S8,
    seed::S9,
    seed::SINGLE,
    environment::CASES,
    operands::CASES,
    invalidate::CASES,
    vpids::CASES,
    no_ept::CASES,
    hostile::ones::CASES,
    hostile::addresses::CASES,
    hostile::loops::CASES,
    hostile::regions::CASES,
    behaviour::instructions::CASES,
    behaviour::control_registers::CASES,
    behaviour::state::CASES,
    behaviour::bitmaps::CASES,
    behaviour::events::CASES,
    behaviour::delivery::CASES,
    behaviour::apic_access::CASES,
    behaviour::modes::CASES,
    behaviour::alternate::CASES,
    behaviour::unseen::CASES,
];

/// Every case that needs more than one processor.
pub const SEVERAL: &[&[Case]] = &[smp::CASES, smp::SHARED, smp::MOVES, smp::NMIS];
