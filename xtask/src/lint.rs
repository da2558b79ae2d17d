//! Is the source in order? Formatting, clippy and the documentation, none with a warning.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{
    images::{self, Package},
    workspace::Workspace,
};

/// Makes the command of one check.
type Check = fn(&Workspace) -> Command;

/// What is checked, each by the name of its section.
pub(crate) const CHECKS: [(&str, Check); 5] = [
    ("formatting", formatting),
    ("clippy", clippy),
    ("clippy on L0's image", |workspace| image_clippy(workspace, images::L0)),
    ("clippy on the L1 images", |workspace| image_clippy(workspace, images::L1S)),
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
    let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    ensure!(status.success(), "cargo {} failed", arguments.join(" "));
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
fn image_clippy(workspace: &Workspace, package: Package) -> Command {
    let mut cargo = images::cargo(workspace, "clippy", package);
    cargo.args(["--quiet", "--", "-D", "warnings"]);
    cargo
}

fn documentation(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["doc", "--quiet", "--workspace", "--no-deps"]);
    cargo.env("RUSTDOCFLAGS", "-D warnings");
    cargo
}
