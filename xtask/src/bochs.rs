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

/// Bochs's own debugger. It stops at a prompt unless told to go on; only with it does the exit
/// status tell how the guest ended the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Debugger {
    /// Not built in.
    Absent,
    /// Built in, and always on (2.7).
    Always,
    /// Built in, and on if asked for (3.0).
    OnRequest,
}

/// A Bochs that can be started.
#[derive(Debug, Clone)]
pub(crate) struct Bochs {
    program: PathBuf,
    /// Its version, for example `2.7`.
    pub(crate) version: String,
    debugger: Debugger,
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
        Ok(Self { program, version, debugger })
    }

    /// Whether the exit status tells how the guest ended the machine.
    pub(crate) fn has_verdict(&self) -> bool {
        self.debugger != Debugger::Absent
    }

    /// Starts the machine in `folder`, which holds its image; COM1 goes to `serial.log` there.
    pub(crate) fn start(&self, machine: &Machine, folder: &Path) -> Result<Guarded> {
        fs::write(folder.join("bochsrc"), Self::bochsrc(machine))?;
        let mut arguments: Vec<OsString> = ["-q", "-f", "bochsrc"].map(OsString::from).to_vec();
        if self.debugger == Debugger::OnRequest {
            arguments.push("-debugger".into());
        }
        if self.debugger != Debugger::Absent {
            fs::write(folder.join("debugger.rc"), "c\nq\n")?;
            arguments.extend(["-rc", "debugger.rc"].map(OsString::from));
        }
        Guarded::start(&self.program, &arguments, folder, "bochs.out")
    }

    fn bochsrc(machine: &Machine) -> String {
        let Machine { cpus, mem_mib } = machine;
        // Bochs needs only a part of the guest's memory resident, and accepts no more than 2048.
        let host = mem_mib.min(&2048);
        let mut text = String::new();
        // Bochs knows where its BIOS images are, and calls it BXSHARE if nobody else did.
        // A low `ips` shortens the waiting loops of BIOS and GRUB, which count time and not
        // instructions. Debian's build has no display without a window but `rfb`. Without a dummy
        // sound driver the ALSA library may kill Bochs on machines that have no sound card.
        let _ = write!(
            text,
            "config_interface: textconfig\n\
             display_library: rfb, options=\"timeout=0\"\n\
             cpu: model=corei7_skylake_x, count={cpus}, ips=4000000, reset_on_triple_fault=0\n\
             memory: guest={mem_mib}, host={host}\n\
             romimage: file=$BXSHARE/BIOS-bochs-latest\n\
             vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest\n\
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
fn parse_help(text: &str) -> Option<(String, Debugger)> {
    let version = Regex::new(r"Bochs x86 Emulator (\d[\w.]*)").ok()?;
    let version = version.captures(text)?.get(1)?.as_str().to_owned();
    let offers = |option| text.lines().any(|line| line.trim_start().starts_with(option));
    let debugger = match (offers("-debugger "), offers("-rc ")) {
        (true, _) => Debugger::OnRequest,
        (false, true) => Debugger::Always,
        (false, false) => Debugger::Absent,
    };
    Some((version, debugger))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_tells_version_and_debugger() {
        let banner = "====\n          Bochs x86 Emulator 2.7\n  Built from SVN\n";
        let always = "  -log filename    specify\n  -rc filename     execute\n";
        let on_request = "  -debugger        start\n  -rc filename     execute\n";
        let parse = |options: &str| parse_help(&format!("{options}{banner}"));
        assert_eq!(parse(""), Some(("2.7".into(), Debugger::Absent)));
        assert_eq!(parse(always), Some(("2.7".into(), Debugger::Always)));
        assert_eq!(parse(on_request), Some(("2.7".into(), Debugger::OnRequest)));
        assert_eq!(parse_help("Usage: qemu"), None);
    }

    #[test]
    fn the_machine_is_as_asked() {
        let text = Bochs::bochsrc(&Machine { cpus: 2, mem_mib: 4096 });
        assert!(text.contains("count=2,"));
        assert!(text.contains("memory: guest=4096, host=2048\n"));
        assert!(text.contains("romimage: file=$BXSHARE/BIOS-bochs-latest\n"));
    }
}
