//! Are the Debian packages there that a run in Bochs needs? If not, who installs them?

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// What boots and emulates the machine.
const PACKAGES: [&str; 7] =
    ["bochs", "bochsbios", "vgabios", "grub-pc-bin", "grub-common", "xorriso", "mtools"];

/// Packages that only make the image: all but the emulator and its firmware.
const IMAGE_PACKAGES: [&str; 4] = ["grub-pc-bin", "grub-common", "xorriso", "mtools"];

/// What a command is about to do, and so which packages it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Boot in the emulator found on the path.
    Emulator,
    /// Make a bootable image; the emulator is none or another one.
    Image,
}

/// Installs what is missing, or tells which command would.
pub(crate) fn ensure_installed(need: Need) -> Result<()> {
    let wanted: &[&str] = match need {
        Need::Emulator => &PACKAGES,
        Need::Image => &IMAGE_PACKAGES,
    };
    let missing = missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let install = install_line(&missing);
    if !nix::unistd::geteuid().is_root() {
        bail!("Debian packages are missing; as root, run\n{install}");
    }
    eprintln!("installing Debian packages: {}", missing.join(" "));
    let status = Command::new("sh")
        .args(["-c", &install])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(std::process::Stdio::null())
        .status()
        .context("cannot run sh")?;
    ensure!(status.success(), "installing failed ({status}): {install}");
    Ok(())
}

/// The exact command that installs `packages`.
fn install_line(packages: &[&str]) -> String {
    format!("apt-get update && apt-get install -y --no-install-recommends {}", packages.join(" "))
}

/// Those of `packages` that dpkg does not know as installed.
fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages.iter().copied().filter(|package| !installed(package)).collect()
}

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .output()
        .is_ok_and(|output| output.stdout == b"installed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_install_line_can_be_pasted() {
        assert_eq!(
            install_line(&["bochs", "mtools"]),
            "apt-get update && apt-get install -y --no-install-recommends bochs mtools"
        );
    }

    #[test]
    fn the_image_packages_are_among_all() {
        assert!(IMAGE_PACKAGES.iter().all(|package| PACKAGES.contains(package)));
    }
}
