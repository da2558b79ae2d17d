//! Where do the kernels and files that only tests boot come from? Assembled or written, when they
//! are needed, into a folder of their own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// The kernel that tells what its loader gave it.
pub(crate) const FOREIGN: &str = "foreign";

/// The kernel that starts the other processors.
pub(crate) const SMP: &str = "smp";

/// Assembles the kernel `xtask/fixtures/NAME.S` into the target folder.
pub(crate) fn assemble(workspace: &Workspace, name: &str) -> Result<PathBuf> {
    let folder = workspace.target.join("fixtures");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let source = workspace.root.join("xtask/fixtures").join(name).with_extension("S");
    let object = folder.join(name).with_extension("o");
    let kernel = folder.join(name);
    // The assembler and linker come with the C compiler that Rust links with.
    let mut assemble = Command::new("as");
    assemble.arg("--32").arg("-o").arg(&object).arg(source);
    let mut link = Command::new("ld");
    link.args(["-m", "elf_i386", "-Ttext", "0x100000", "-o"]).arg(&kernel).arg(&object);
    for command in [&mut assemble, &mut link] {
        let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
        ensure!(status.success(), "failed: {command:?}");
    }
    Ok(kernel)
}

/// Writes a file beside the kernels.
pub(crate) fn write_file(workspace: &Workspace, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let folder: &Path = &workspace.target.join("fixtures");
    fs::create_dir_all(folder)?;
    let file = folder.join(name);
    fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}
