//! Answers: which cases are there? A file adds itself here.

use crate::suite::Case;

pub mod harness;
pub mod l2;

/// Every case, file by file, in the order they run.
pub const ALL: &[&[Case]] = &[harness::CASES, l2::CASES];
