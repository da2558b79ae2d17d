//! How do the freestanding images come to be? The stock toolchain, with flags of their own.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// The images, named as their binaries (the hypervisor, then the L1s), each with its package.
const IMAGES: [(&str, &str); 4] = [
    (HYPERVISOR, "nvmx-hv"),
    (CONFORMANCE, "nvmx-guests"),
    (BENCH, "nvmx-guests"),
    (DEMO, "nvmx-guests"),
];

/// The hypervisor's image.
pub(crate) const HYPERVISOR: &str = "nvmx-hv";

/// The L1 that checks, case by case, that the machine is what the SDM says.
pub(crate) const CONFORMANCE: &str = "l1-conformance";

/// The L1 that measures.
pub(crate) const BENCH: &str = "l1-bench";

/// The L1 that shows what nvmx does.
pub(crate) const DEMO: &str = "l1-demo";

/// The images' target. It is the host's own, but naming it keeps the flags from build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What code needs that runs without a system under it: fixed addresses, and a stack that an
/// interrupt may use. The link arguments come from each image's build script.
const RUSTFLAGS: [&str; 4] = ["-C", "relocation-model=static", "-C", "no-redzone=yes"];

/// Builds all images into the images folder.
pub(crate) fn build_all(workspace: &Workspace) -> Result<()> {
    build(workspace, &IMAGES)
}

/// Builds the hypervisor only, for an L1 that comes from elsewhere.
pub(crate) fn build_hypervisor(workspace: &Workspace) -> Result<()> {
    build(workspace, &IMAGES[..1])
}

/// A Cargo command on all images, with their flags.
pub(crate) fn cargo(workspace: &Workspace, command: &str) -> Command {
    cargo_for(workspace, command, &IMAGES)
}

fn cargo_for(workspace: &Workspace, command: &str, images: &[(&str, &str)]) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args([command, "--profile=image", "--target", TARGET]);
    for (image, package) in images {
        cargo.args(["--package", package, "--bin", image]);
    }
    // One variable with separators, which beats every other place where flags may be set.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"));
    cargo
}

fn build(workspace: &Workspace, images: &[(&str, &str)]) -> Result<()> {
    let status = cargo_for(workspace, "build", images).status().context("cannot run cargo")?;
    ensure!(status.success(), "building the images failed");

    let folder = workspace.images();
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let built: PathBuf = workspace.target.join(TARGET).join("image");
    for (image, _) in images {
        let from = built.join(image);
        let to = workspace.image(image);
        // Renamed into place, so that a run that reads the old image meanwhile reads it whole.
        let new = folder.join(format!(".{image}.new"));
        fs::copy(&from, &new).with_context(|| format!("no image {}", from.display()))?;
        fs::rename(&new, &to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(())
}
