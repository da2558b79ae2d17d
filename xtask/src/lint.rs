//! Is the source in order? Formatting, clippy and the documentation, none with a warning.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{images, workspace::Workspace};

/// Makes the command of one check.
type Check = fn(&Workspace) -> Command;

/// What is checked, each by the name of its section.
pub(crate) const CHECKS: [(&str, Check); 4] = [
    ("formatting", formatting),
    ("clippy", clippy),
    ("clippy on the images", images_clippy),
    ("documentation", documentation),
];

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

/// The images' own code is compiled only with the images' flags.
fn images_clippy(workspace: &Workspace) -> Command {
    let mut cargo = images::cargo(workspace, "clippy");
    cargo.args(["--quiet", "--", "-D", "warnings"]);
    cargo
}

fn documentation(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["doc", "--quiet", "--workspace", "--no-deps"]);
    cargo.env("RUSTDOCFLAGS", "-D warnings");
    cargo
}
