//! Does a kernel that is not ours see what its specification promises? Checks what the fixture
//! told: command line, modules and memory map.

use anyhow::{Context, Result, bail, ensure};

/// A range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    base: u64,
    length: u64,
    /// 1 is RAM that the kernel may use.
    kind: u64,
}

impl Range {
    fn end(self) -> u64 {
        self.base.saturating_add(self.length)
    }
}

/// What the kernel told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Told {
    cmdline: Option<String>,
    /// String and bytes of each module.
    modules: Vec<(String, String)>,
    mem_upper_kib: u64,
    memory: Vec<Range>,
    done: bool,
}

impl Told {
    /// Reads the kernel's lines.
    pub(crate) fn parse(serial: &str) -> Self {
        let mut told = Self::default();
        let hex = |word: &str| u64::from_str_radix(word, 16).ok();
        for line in serial.lines() {
            let Some(line) = line.trim_end_matches('\r').strip_prefix("foreign: ") else {
                continue;
            };
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let bracketed = rest.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            match word {
                "cmdline" => told.cmdline = bracketed.map(str::to_owned),
                "module" => {
                    if let Some((string, bytes)) =
                        bracketed.and_then(|inside| inside.split_once("] ["))
                    {
                        told.modules.push((string.to_owned(), bytes.to_owned()));
                    }
                }
                "mem_upper" => told.mem_upper_kib = hex(rest).unwrap_or(0),
                "memory" => {
                    let numbers: Vec<u64> = rest.split(' ').filter_map(hex).collect();
                    if let [base, length, kind] = numbers[..] {
                        told.memory.push(Range { base, length, kind });
                    }
                }
                "done" => told.done = true,
                _ => {}
            }
        }
        told
    }

    /// Checks command line and modules, and that the memory map makes sense in itself.
    pub(crate) fn check(&self, cmdline: &str, modules: &[(&str, &str)]) -> Result<()> {
        ensure!(self.done, "the kernel did not come to its end");
        ensure!(
            self.cmdline.as_deref() == Some(cmdline),
            "its command line is {:?}, not {cmdline:?}",
            self.cmdline
        );
        let seen: Vec<(&str, &str)> =
            self.modules.iter().map(|(string, bytes)| (&**string, &**bytes)).collect();
        ensure!(seen == modules, "its modules are {seen:?}, not {modules:?}");
        for (at, range) in self.memory.iter().enumerate() {
            for other in &self.memory[..at] {
                let apart = range.end() <= other.base || other.end() <= range.base;
                ensure!(apart, "in its memory map {range:x?} and {other:x?} overlap");
            }
        }
        let upper = self.ram_from_1m()?;
        let end = 0x10_0000 + self.mem_upper_kib * 1024;
        ensure!(
            self.mem_upper_kib > 0 && end <= upper.end(),
            "its mem_upper ends at {end:#x}, its memory at {:#x}",
            upper.end()
        );
        Ok(())
    }

    /// Checks, against what the bare machine told, that L0 keeps its memory to itself: RAM is
    /// shown only where there is RAM, less of it, and what is missing is shown as reserved.
    pub(crate) fn check_hidden(&self, bare: &Self) -> Result<()> {
        for range in self.ram() {
            let within =
                bare.ram().any(|native| native.base <= range.base && range.end() <= native.end());
            ensure!(within, "{range:x?} is shown as RAM, but is none on the bare machine");
        }
        let size = |told: &Self| told.ram().map(|range| range.length).sum::<u64>();
        ensure!(size(self) < size(bare), "L0's own memory is shown to L1");
        let visible = self.ram_from_1m()?.end();
        let end = bare.ram_from_1m()?.end();
        ensure!(visible < end, "L0 is not at the top of the memory");
        let mut at = visible;
        while at < end {
            let Some(range) = self.memory.iter().find(|range| range.base <= at && at < range.end())
            else {
                bail!("{at:#x} is L0's, but the memory map does not show it as reserved");
            };
            ensure!(range.kind != 1 || at >= end, "{at:#x} is L0's, but is shown as RAM");
            at = range.end();
        }
        Ok(())
    }

    fn ram(&self) -> impl Iterator<Item = Range> + '_ {
        self.memory.iter().copied().filter(|range| range.kind == 1)
    }

    fn ram_from_1m(&self) -> Result<Range> {
        self.ram()
            .find(|range| range.base <= 0x10_0000 && 0x10_0000 < range.end())
            .context("its memory map has no RAM at 1 MiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: &str = "\
foreign: cmdline [a b]
foreign: module [its string] [hello]
foreign: mem_upper 000000000007fbc0
foreign: memory 0000000000000000 000000000009f000 0000000000000001
foreign: memory 0000000000100000 000000001fef0000 0000000000000001
foreign: memory 000000001fff0000 0000000000010000 0000000000000003
foreign: done
";

    fn under_l0() -> String {
        BARE.replace(
            "foreign: memory 0000000000100000 000000001fef0000 0000000000000001",
            "foreign: memory 0000000000100000 000000001eef0000 0000000000000001\n\
             foreign: memory 000000001eff0000 0000000001000000 0000000000000002",
        )
        .replace("7fbc0", "7bbc0")
    }

    #[test]
    fn what_was_told_is_checked() {
        let told = Told::parse(BARE);
        assert!(told.check("a b", &[("its string", "hello")]).is_ok());
        assert!(told.check("a", &[("its string", "hello")]).is_err());
        assert!(told.check("a b", &[]).is_err());
        assert!(Told::parse("").check("", &[]).is_err());
    }

    #[test]
    fn l0_must_hide_its_memory() {
        let bare = Told::parse(BARE);
        let hidden = Told::parse(&under_l0());
        assert!(hidden.check("a b", &[("its string", "hello")]).is_ok());
        assert!(hidden.check_hidden(&bare).is_ok());
        assert!(bare.check_hidden(&bare).is_err());
        let hole = under_l0()
            .replace("foreign: memory 000000001eff0000 0000000001000000 0000000000000002\n", "");
        assert!(Told::parse(&hole).check_hidden(&bare).is_err());
    }

    #[test]
    fn mem_upper_must_agree_with_the_map() {
        let told = Told::parse(&under_l0().replace("7bbc0", "7fbc0"));
        assert!(told.check("a b", &[("its string", "hello")]).is_err());
    }
}
