//! Which emulator is there, and how is it told to be our machine?

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use regex::Regex;

use crate::guard::Guarded;

/// A Bochs that can be started.
#[derive(Debug, Clone)]
pub(crate) struct Bochs {
    program: PathBuf,
    /// Its version, for example `2.7`.
    pub(crate) version: String,
    /// Whether it was built with its debugger, which stops at a prompt unless told to go on.
    debugger: bool,
    /// The folder of the BIOS images.
    share: PathBuf,
}

impl Bochs {
    /// Asks the program about itself; `None` is the `bochs` on the path.
    pub(crate) fn detect(program: Option<&Path>) -> Result<Self> {
        let program = match program {
            // Every run has its own working folder.
            Some(path) if path.components().count() > 1 => std::path::absolute(path)?,
            Some(path) => path.to_owned(),
            None => "bochs".into(),
        };
        let output = Command::new(&program)
            .arg("--help")
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let Some((version, debugger)) = parse_help(&text) else {
            bail!("{} does not say that it is Bochs:\n{text}", program.display());
        };
        let share = std::env::var_os("BXSHARE").map(PathBuf::from);
        Ok(Self {
            share: share.or_else(|| share_beside(&program)).unwrap_or("/usr/share/bochs".into()),
            program,
            version,
            debugger,
        })
    }

    /// Whether the exit status tells how the guest ended the machine.
    pub(crate) fn has_verdict(&self) -> bool {
        self.debugger
    }

    /// Starts the machine in `folder`, which holds its image; COM1 goes to `serial.log` there.
    pub(crate) fn start(&self, machine: &Machine, folder: &Path) -> Result<Guarded> {
        fs::write(folder.join("bochsrc"), self.bochsrc(machine))?;
        let mut arguments: Vec<OsString> = ["-q", "-f", "bochsrc"].map(OsString::from).to_vec();
        if self.debugger {
            fs::write(folder.join("debugger.rc"), "c\nq\n")?;
            arguments.extend(["-rc", "debugger.rc"].map(OsString::from));
        }
        Guarded::start(&self.program, &arguments, folder, "bochs.out")
    }

    fn bochsrc(&self, machine: &Machine) -> String {
        let Machine { cpus, mem_mib } = machine;
        let share = self.share.display();
        // Bochs needs only a part of the guest's memory resident, and accepts no more than 2048.
        let host = mem_mib.min(&2048);
        let mut text = String::new();
        // A low `ips` shortens the waiting loops of BIOS and GRUB, which count time and not
        // instructions. Debian's build has no display without a window but `rfb`. Without a dummy
        // sound driver the ALSA library may kill Bochs on machines that have no sound card.
        let _ = write!(
            text,
            "config_interface: textconfig\n\
             display_library: rfb, options=\"timeout=0\"\n\
             cpu: model=corei7_skylake_x, count={cpus}, ips=4000000, reset_on_triple_fault=0\n\
             memory: guest={mem_mib}, host={host}\n\
             romimage: file={share}/BIOS-bochs-latest\n\
             vgaromimage: file={share}/VGABIOS-lgpl-latest\n\
             ata0-master: type=cdrom, path=boot.iso, status=inserted\n\
             boot: cdrom\n\
             sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\n\
             com1: enabled=1, mode=file, dev=serial.log\n\
             log: bochs.log\n\
             clock: sync=none\n\
             panic: action=fatal\n\
             error: action=report\n\
             info: action=ignore\n\
             debug: action=ignore\n"
        );
        text
    }
}

/// The machine to emulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Processors.
    pub(crate) cpus: u32,
    /// Memory in MiB.
    pub(crate) mem_mib: u32,
}

impl Default for Machine {
    fn default() -> Self {
        Self { cpus: 1, mem_mib: 512 }
    }
}

/// Version, and whether there is a debugger.
fn parse_help(text: &str) -> Option<(String, bool)> {
    let version = Regex::new(r"Bochs x86 Emulator (\d[\w.]*)").ok()?;
    let version = version.captures(text)?.get(1)?.as_str().to_owned();
    let debugger = text.lines().any(|line| line.trim_start().starts_with("-rc "));
    Some((version, debugger))
}

/// `PREFIX/share/bochs` for `PREFIX/bin/bochs`, if the BIOS is there.
fn share_beside(program: &Path) -> Option<PathBuf> {
    let share = program.parent()?.parent()?.join("share/bochs");
    share.join("BIOS-bochs-latest").exists().then_some(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_tells_version_and_debugger() {
        let banner = "====\n          Bochs x86 Emulator 2.7\n  Built from SVN\n";
        let debugger = "  -log filename    specify\n  -rc filename     execute\n";
        assert_eq!(parse_help(banner), Some(("2.7".into(), false)));
        assert_eq!(parse_help(&format!("{debugger}{banner}")), Some(("2.7".into(), true)));
        assert_eq!(parse_help("Usage: qemu"), None);
    }

    #[test]
    fn the_machine_is_as_asked() {
        let bochs = Bochs {
            program: "bochs".into(),
            version: "2.7".into(),
            debugger: true,
            share: "/share".into(),
        };
        let text = bochs.bochsrc(&Machine { cpus: 2, mem_mib: 4096 });
        assert!(text.contains("count=2,"));
        assert!(text.contains("memory: guest=4096, host=2048\n"));
        assert!(text.contains("romimage: file=/share/BIOS-bochs-latest\n"));
    }
}
