//! Is the source in order? Formatting, clippy and the documentation, none with a warning.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// Makes the command of one check.
type Check = fn(&Workspace) -> Command;

/// What is checked, each by the name of its section.
pub(crate) const CHECKS: [(&str, Check); 3] =
    [("formatting", formatting), ("clippy", clippy), ("documentation", documentation)];

/// Checks everything, and stops at the first thing that is not in order.
pub(crate) fn lint(workspace: &Workspace) -> Result<()> {
    for (name, command) in CHECKS {
        println!("== {name}");
        check(&mut command(workspace))?;
    }
    Ok(())
}

/// Runs one check.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = command.status().context("cannot run cargo")?;
    ensure!(status.success(), "failed: {command:?}");
    Ok(())
}

fn formatting(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["fmt", "--all", "--check"]);
    cargo
}

fn clippy(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    cargo
}

fn documentation(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    cargo.env("RUSTDOCFLAGS", "-D warnings");
    cargo
}
