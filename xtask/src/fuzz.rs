//! Does a long run of random programs find anything? `cargo xtask fuzz`, which builds and runs the
//! program of that name in `crates/nvmx-testkit` with optimisation.

use std::{convert::Infallible, ffi::OsString, os::unix::process::CommandExt};

use anyhow::{Context, Result};

use crate::workspace::Workspace;

/// Becomes the fuzzer, so that its end is ours.
pub(crate) fn fuzz(workspace: &Workspace, arguments: &[OsString]) -> Result<Infallible> {
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--release", "--package=nvmx-testkit", "--bin=fuzz", "--"]);
    Err(cargo.args(arguments).exec()).context("cannot run cargo")
}
