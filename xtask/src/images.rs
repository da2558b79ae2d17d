//! How do the freestanding images come to be? The stock toolchain, with flags of their own.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// A package and its images, named as its binaries.
///
/// Each package is built by a Cargo of its own: built together they would share one set of
/// features for their common dependencies, and the guests would get the engine and its allocator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Package {
    name: &'static str,
    images: &'static [&'static str],
}

/// The hypervisor.
pub(crate) const L0: Package = Package { name: "nvmx-hv", images: &[HYPERVISOR] };

/// The test hypervisors that run natively or under any L0.
pub(crate) const L1S: Package =
    Package { name: "nvmx-guests", images: &[CONFORMANCE, BENCH, DEMO] };

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
    build(workspace, L0)?;
    build(workspace, L1S)
}

/// A Cargo command on a package's images, with their flags.
pub(crate) fn cargo(workspace: &Workspace, command: &str, package: Package) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args([command, "--profile=image", "--target", TARGET, "--package", package.name]);
    for image in package.images {
        cargo.args(["--bin", image]);
    }
    // One variable with separators, which beats every other place where flags may be set.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"));
    cargo
}

/// Builds one package's images into the images folder.
pub(crate) fn build(workspace: &Workspace, package: Package) -> Result<()> {
    let status = cargo(workspace, "build", package).status().context("cannot run cargo")?;
    ensure!(status.success(), "building the images of {} failed", package.name);

    let folder = workspace.images();
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let built: PathBuf = workspace.target.join(TARGET).join("image");
    for image in package.images {
        let from = built.join(image);
        let to = workspace.image(image);
        // Renamed into place, so that a run that reads the old image meanwhile reads it whole.
        let new = folder.join(format!(".{image}.{}", std::process::id()));
        fs::copy(&from, &new).with_context(|| format!("no image {}", from.display()))?;
        fs::rename(&new, &to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(())
}
