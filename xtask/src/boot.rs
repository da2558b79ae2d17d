//! What does GRUB load, and with which words? From an L1 with its command line and modules to a
//! `grub.cfg` and a bootable image.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::exact;

/// A module for L1: a file, and the string that L1 sees with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// The file whose bytes L1 gets.
    pub(crate) file: PathBuf,
    /// The module's string.
    pub(crate) string: String,
}

impl Module {
    /// Reads `FILE` or `FILE STRING`; a file whose name has spaces is taken whole.
    pub(crate) fn parse(text: &str) -> Self {
        match text.split_once(' ') {
            Some((file, string)) if !Path::new(text).exists() => {
                Self { file: file.into(), string: string.to_owned() }
            }
            _ => Self { file: text.into(), string: String::new() },
        }
    }
}

/// The hypervisor under L1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct L0 {
    /// Its image.
    pub(crate) image: PathBuf,
    /// Its options, as written after the image's name.
    pub(crate) options: String,
}

/// Everything that a machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Boot {
    /// The hypervisor; `None` boots L1 on the bare machine.
    pub(crate) l0: Option<L0>,
    /// L1's image; `None` (an error that L0 must report) only under L0.
    pub(crate) l1: Option<PathBuf>,
    /// L1's command line, exactly.
    pub(crate) cmdline: String,
    /// L1's modules, in order.
    pub(crate) modules: Vec<Module>,
}

/// How L1 wants to be booted on the bare machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// Multiboot, version 1.
    Multiboot,
    /// The Linux boot protocol.
    Linux,
}

impl Boot {
    /// Writes the bootable image `iso` with `config` as its `grub.cfg`; `scratch` is a folder for
    /// its parts, where `grub.cfg` is kept.
    ///
    /// `platform` restricts the image to one folder of GRUB's; `None` takes all that are installed.
    pub(crate) fn write_image(
        &self,
        config: &str,
        scratch: &Path,
        iso: &Path,
        platform: Option<&Path>,
    ) -> Result<()> {
        let tree = scratch.join("iso");
        let boot = tree.join("boot");
        let grub = boot.join("grub");
        fs::create_dir_all(&grub).with_context(|| format!("cannot make {}", grub.display()))?;
        fs::write(scratch.join("grub.cfg"), config)?;
        fs::write(grub.join("grub.cfg"), config)?;
        if let Some(l0) = &self.l0 {
            copy(&l0.image, &boot.join("nvmx-hv"))?;
        }
        if let Some(l1) = &self.l1 {
            if self.l0.is_none() && self.strings().any(exact::changed_by_grub) {
                let image =
                    fs::read(l1).with_context(|| format!("cannot read {}", l1.display()))?;
                fs::write(boot.join("l1"), exact::with_unquoting(&image)?)?;
            } else {
                copy(l1, &boot.join("l1"))?;
            }
        }
        for (n, module) in self.modules.iter().enumerate() {
            copy(&module.file, &boot.join(format!("module{n}")))?;
        }

        let mut mkrescue = Command::new("grub-mkrescue");
        if let Some(platform) = platform {
            mkrescue.arg("--directory").arg(platform);
        }
        let output = mkrescue
            .args(["--fonts=", "--locales=", "--themes="])
            .arg("--output")
            .arg(iso)
            .arg(&tree)
            .output()
            .context("cannot run grub-mkrescue")?;
        fs::write(scratch.join("grub-mkrescue.log"), [output.stdout, output.stderr].concat())?;
        ensure!(
            output.status.success(),
            "grub-mkrescue failed ({}): see {}",
            output.status,
            scratch.join("grub-mkrescue.log").display()
        );
        // The image has it all; the parts would only double the size of every kept folder.
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
    }

    /// All strings that L1 is to get.
    fn strings(&self) -> impl Iterator<Item = &str> {
        let modules = self.modules.iter().map(|module| module.string.as_str());
        std::iter::once(self.cmdline.as_str()).chain(modules)
    }

    /// The whole `grub.cfg`; an error if GRUB can't boot what is asked for.
    pub(crate) fn grub_config(&self) -> Result<String> {
        let mut commands = Vec::new();
        if let Some(l0) = &self.l0 {
            // These are words for L0 to read one by one, not a string to keep as it is.
            let options: Vec<&str> = l0.options.split_whitespace().collect();
            commands.push(load("multiboot2", "nvmx-hv", &options.join(" "))?);
            if self.l1.is_some() {
                commands.push(load("module2 --nounzip", "l1", &self.cmdline)?);
            }
            for (n, module) in self.modules.iter().enumerate() {
                commands.push(load("module2 --nounzip", &format!("module{n}"), &module.string)?);
            }
        } else {
            let l1 = self.l1.as_deref().context("a bare machine needs an L1 to boot")?;
            match protocol(l1)? {
                Protocol::Multiboot => {
                    commands.push(load("multiboot", "l1", &self.cmdline)?);
                    for (n, module) in self.modules.iter().enumerate() {
                        let file = format!("module{n}");
                        commands.push(load("module --nounzip", &file, &module.string)?);
                    }
                }
                Protocol::Linux => {
                    if exact::changed_by_grub(&self.cmdline) {
                        bail!("GRUB can't give Linux this exactly: {}", self.cmdline);
                    }
                    commands.push(load("linux", "l1", &self.cmdline)?);
                    if self.modules.len() > 1 {
                        bail!("Linux takes one module, its initrd");
                    }
                    if !self.modules.is_empty() {
                        commands.push(load("initrd", "module0", "")?);
                    }
                }
            }
        }
        // While it loads, GRUB speaks on COM1 only if something is wrong, and then the machine ends.
        // Its command language has no `&&`.
        let open: String = commands.iter().map(|command| format!("if {command}; then\n")).collect();
        let close = "fi\n".repeat(commands.len());
        Ok(format!(
            "set timeout=0\nset pager=0\n\
             {open}boot\n{close}\
             serial --unit=0 --speed=115200\nterminal_output serial\necho\n\
             echo \"xtask: GRUB cannot boot this:\"\n{again}\n\
             {shutdown}sleep 10\nhalt\n",
            again = commands.join("\n"),
            // The word that ends a Bochs run as failed; a real machine has nothing at that port.
            shutdown = "Shutdown"
                .bytes()
                .map(|byte| format!("outb 0x8900 {byte:#x}\n"))
                .collect::<String>(),
        ))
    }
}

/// One loading command with its arguments.
fn load(command: &str, file: &str, arguments: &str) -> Result<String> {
    let quoted = quote_arguments(arguments)?;
    let space = if quoted.is_empty() { "" } else { " " };
    Ok(format!("{command} /boot/{file}{space}{quoted}"))
}

/// Quotes a string for GRUB's command language so that GRUB's loaders join it again as written.
///
/// The loaders join their arguments with single spaces, and put an argument that contains a space
/// in double quotes. So every space must separate two arguments, which may be empty. Within single
/// quotes GRUB's language has no special character but the closing quote.
fn quote_arguments(text: &str) -> Result<String> {
    if let Some(control) = text.chars().find(|c| c.is_control() && *c != '\t') {
        bail!("a command line can't contain the control character {control:?}");
    }
    if text.is_empty() {
        return Ok(String::new());
    }
    let quote = |argument: &str| format!("'{}'", argument.replace('\'', r"'\''"));
    Ok(text.split(' ').map(quote).collect::<Vec<_>>().join(" "))
}

/// Recognises L1's boot protocol by content.
fn protocol(file: &Path) -> Result<Protocol> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    if bytes.get(0x202..0x206) == Some(b"HdrS") && bytes.get(0x1FE..0x200) == Some(&[0x55, 0xAA]) {
        return Ok(Protocol::Linux);
    }
    Ok(Protocol::Multiboot)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_space_separates_two_arguments() {
        assert_eq!(quote_arguments("").expect("fine"), "");
        assert_eq!(quote_arguments("a b").expect("fine"), "'a' 'b'");
        assert_eq!(quote_arguments("a  b ").expect("fine"), "'a' '' 'b' ''");
        assert_eq!(quote_arguments(" ").expect("fine"), "'' ''");
    }

    #[test]
    fn special_characters_are_quoted() {
        assert_eq!(quote_arguments("$x;y|\"z\"\\").expect("fine"), "'$x;y|\"z\"\\'");
        assert_eq!(quote_arguments("it's").expect("fine"), r"'it'\''s'");
        assert!(quote_arguments("a\nb").is_err());
    }

    #[test]
    fn modules_with_and_without_a_string() {
        assert_eq!(
            Module::parse("no-such-file its string"),
            Module { file: "no-such-file".into(), string: "its string".into() }
        );
        assert_eq!(
            Module::parse("no-such-file"),
            Module { file: "no-such-file".into(), string: String::new() }
        );
    }

    #[test]
    fn l1_is_the_first_module_of_l0() {
        let boot = Boot {
            l0: Some(L0 { image: "hv".into(), options: "vmfunc=emulated  log=exits".into() }),
            l1: Some("kernel".into()),
            cmdline: "a b".into(),
            modules: vec![Module { file: "m".into(), string: "s".into() }],
        };
        let config = boot.grub_config().expect("fine");
        let at = |text: &str| config.find(text).unwrap_or_else(|| panic!("{text} in {config}"));
        let l0 = at("multiboot2 /boot/nvmx-hv 'vmfunc=emulated' 'log=exits'");
        let l1 = at("module2 --nounzip /boot/l1 'a' 'b'");
        let module = at("module2 --nounzip /boot/module0 's'");
        assert!(l0 < l1 && l1 < module);
    }
}
