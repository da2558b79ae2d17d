//! How does one run go, and what is its verdict? Boots an image in Bochs, shows COM1 as it grows,
//! and ends the machine as soon as the outcome is known.

use std::{
    fs::{self, File},
    io::{self, Read, Write as _},
    path::{Path, PathBuf},
    process::ExitStatus,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use regex::bytes::{Regex, RegexBuilder};

use crate::{
    bochs::{Bochs, Machine},
    boot::Boot,
    serial::Counts,
    workspace::Workspace,
};

/// How often a run is begun while Bochs finds no port for its display.
const DISPLAY_TRIES: u32 = 4;
/// The pause between two of these.
const DISPLAY_PAUSE: Duration = Duration::from_secs(2);

/// How often COM1 is looked at.
const POLL: Duration = Duration::from_millis(20);

/// How long a guest may take from its closing line to the machine's end. A Bochs without debugger
/// does not end by itself.
const GRACE: Duration = Duration::from_secs(2);

/// Where a search for the awaited text begins again, before what was already searched.
const OVERLAP: usize = 4096;

/// How many lines of COM1 tell what a failed run was at, if it was not shown.
const TAIL: usize = 6;

/// What ends a run well.
#[derive(Debug, Clone)]
pub(crate) enum Until {
    /// This appears on COM1.
    Appears(Regex),
    /// Our guests' protocol says so: a closing line (of a suite without failures, or `demo: done`
    /// or `bench: done`), and the machine ended as passed.
    Verdict,
    /// The machine ends as failed, after this appeared: for images that must not run.
    Refuses(Regex),
}

/// Compiles `--until`: `^` and `$` match at lines, whatever ends them.
pub(crate) fn until_regex(text: &str) -> Result<Regex> {
    RegexBuilder::new(text)
        .multi_line(true)
        .crlf(true)
        .build()
        .with_context(|| format!("not a regular expression: {text}"))
}

/// A run to make.
#[derive(Debug, Clone)]
pub(crate) struct Run<'a> {
    /// Names the run's folder.
    pub(crate) name: &'a str,
    /// What to boot.
    pub(crate) boot: Boot,
    /// The machine.
    pub(crate) machine: Machine,
    /// When it is over.
    pub(crate) until: Until,
    /// When to give up.
    pub(crate) timeout: Duration,
    /// Whether COM1 is shown on standard output.
    pub(crate) show: bool,
}

/// A run that was made.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The folder with everything kept.
    pub(crate) folder: PathBuf,
    /// All of COM1.
    pub(crate) serial: String,
    /// Why it failed, if it did.
    pub(crate) failure: Option<String>,
    /// Whether COM1 was shown already.
    shown: bool,
}

impl Outcome {
    /// Whether Bochs gave up before the machine started, since its display found no port to listen
    /// on: that says nothing about what was to be run.
    fn had_no_display(&self) -> bool {
        self.failure.is_some()
            && self.serial.is_empty()
            && fs::read_to_string(self.folder.join("bochs.log"))
                .is_ok_and(|log| log.contains("RFB could not bind"))
    }

    /// The run's COM1 if it ended well; else an error that gives the reason and the kept logs.
    pub(crate) fn into_result(self) -> Result<String> {
        match self.failure {
            None => Ok(self.serial),
            Some(reason) => {
                let tail = if self.shown { "" } else { last_lines(&self.serial) };
                let said = if tail.is_empty() { "" } else { "COM1 ended with:\n" };
                let gap = if tail.is_empty() || tail.ends_with('\n') { "" } else { "\n" };
                bail!("{reason}\n{said}{tail}{gap}logs kept in {}", self.folder.display())
            }
        }
    }
}

impl Run<'_> {
    /// Makes the run. An error means that the machine could not even be started.
    pub(crate) fn make(&self, workspace: &Workspace, bochs: &Bochs) -> Result<Outcome> {
        for _ in 1..DISPLAY_TRIES {
            let outcome = self.attempt(workspace, bochs)?;
            if !outcome.had_no_display() {
                return Ok(outcome);
            }
            thread::sleep(DISPLAY_PAUSE);
        }
        self.attempt(workspace, bochs)
    }

    fn attempt(&self, workspace: &Workspace, bochs: &Bochs) -> Result<Outcome> {
        let config = self.boot.grub_config()?;
        let folder = workspace.new_run(self.name)?;
        let iso = folder.join("boot.iso");
        // Bochs has a PC BIOS, whatever else this machine's GRUB could boot.
        let platform = Path::new("/usr/lib/grub/i386-pc");
        self.boot
            .write_image(&config, &folder, &iso, platform.exists().then_some(platform))
            .with_context(|| format!("logs kept in {}", folder.display()))?;

        let mut machine = bochs.start(&self.machine, &folder)?;
        let mut com1 = Com1::new(&folder, self.show);
        let mut watch = Watch { until: &self.until, searched: 0, closing: None };
        let started = Instant::now();
        let failure = loop {
            // Asked before COM1 is read, so that nothing said before the end is missed.
            let ended = machine.ended()?;
            com1.read()?;
            if let Some(verdict) = watch.look(&com1.bytes, ended, bochs.has_verdict()) {
                break verdict.err();
            }
            if started.elapsed() > self.timeout {
                let seconds = self.timeout.as_secs();
                break Some(format!("timeout: not over after {seconds} s; {}", watch.missing()));
            }
            thread::sleep(POLL);
        };
        drop(machine);
        com1.finish_line();
        if failure.is_none() {
            // The image can be made again from what is kept, and is large.
            fs::remove_file(&iso).context("cannot remove the boot image")?;
        }
        let serial = String::from_utf8_lossy(&com1.bytes).into_owned();
        Ok(Outcome { folder, serial, failure, shown: self.show })
    }
}

/// COM1's file as it grows.
struct Com1 {
    path: PathBuf,
    file: Option<File>,
    bytes: Vec<u8>,
    show: bool,
}

impl Com1 {
    fn new(folder: &Path, show: bool) -> Self {
        Self { path: folder.join("serial.log"), file: None, bytes: Vec::new(), show }
    }

    fn read(&mut self) -> Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => match File::open(&self.path) {
                Ok(file) => self.file.insert(file),
                // Bochs makes it with the first byte.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error).context("cannot read COM1"),
            },
        };
        let before = self.bytes.len();
        file.read_to_end(&mut self.bytes).context("cannot read COM1")?;
        if self.show && self.bytes.len() > before {
            let mut out = io::stdout().lock();
            out.write_all(&self.bytes[before..])?;
            out.flush()?;
        }
        Ok(())
    }

    /// Whatever we print next begins on a line of its own.
    fn finish_line(&self) {
        if self.show && self.bytes.last().is_some_and(|byte| *byte != b'\n') {
            println!();
        }
    }
}

/// Decides when a run is over.
struct Watch<'a> {
    until: &'a Until,
    /// How much of COM1 has been searched already.
    searched: usize,
    /// The guest's closing line, and when it was seen.
    closing: Option<(Counts, Instant)>,
}

impl Watch<'_> {
    /// The verdict, once there is one.
    fn look(
        &mut self,
        com1: &[u8],
        ended: Option<ExitStatus>,
        status_counts: bool,
    ) -> Option<Result<(), String>> {
        match self.until {
            Until::Appears(regex) => {
                if self.appears(regex, com1) {
                    return Some(Ok(()));
                }
                ended.map(|_| Err(format!("the machine ended, but {}", self.missing())))
            }
            Until::Refuses(regex) => {
                let status = ended?;
                Some(if !self.appears(regex, com1) {
                    Err(format!("the machine ended, but {}", self.missing()))
                } else if status.success() && status_counts {
                    Err("the machine ended as passed".to_owned())
                } else {
                    Ok(())
                })
            }
            Until::Verdict => {
                self.find_closing(com1, ended.is_some());
                let graced = self.closing.is_some_and(|(_, seen)| seen.elapsed() > GRACE);
                if ended.is_none() && !graced {
                    return None;
                }
                let passed = ended.is_some_and(|status| status.success());
                Some(match self.closing {
                    Some((counts, _)) if counts.failed > 0 => Err(counts.to_string()),
                    Some(_) if ended.is_some() && !passed && status_counts => {
                        Err("the guest ended the machine as failed, after its closing line".into())
                    }
                    Some(_) => Ok(()),
                    None if passed && status_counts => Ok(()),
                    None => Err("the machine ended as failed, without a closing line".to_owned()),
                })
            }
        }
    }

    fn appears(&mut self, regex: &Regex, com1: &[u8]) -> bool {
        if com1.len() == self.searched {
            return false;
        }
        let from = line_start(com1, self.searched.saturating_sub(OVERLAP));
        self.searched = com1.len();
        regex.is_match(&com1[from..])
    }

    fn find_closing(&mut self, com1: &[u8], ended: bool) {
        if self.closing.is_some() {
            return;
        }
        let from = line_start(com1, self.searched);
        // Only whole lines: the last one may still grow.
        let to = com1.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let to = if ended { com1.len() } else { to };
        let Some(new) = com1.get(from..to) else { return };
        self.searched = to;
        self.closing = String::from_utf8_lossy(new)
            .lines()
            .find_map(parse_closing)
            .map(|counts| (counts, Instant::now()));
    }

    /// What has not been seen.
    fn missing(&self) -> String {
        match self.until {
            Until::Appears(regex) | Until::Refuses(regex) => {
                format!("COM1 has not shown {}", regex.as_str())
            }
            Until::Verdict => "no closing line".to_owned(),
        }
    }
}

/// The last few lines of a text, each with its end.
pub(crate) fn last_lines(text: &str) -> &str {
    let start = text.trim_end().rmatch_indices('\n').nth(TAIL - 1).map_or(0, |(at, _)| at + 1);
    &text[start..]
}

/// Reads a closing line; those of the demo and the benchmark count no cases.
fn parse_closing(line: &str) -> Option<Counts> {
    match line.trim_end() {
        "demo: done" | "bench: done" => Some(Counts::default()),
        other => Counts::parse(other),
    }
}

/// The beginning of the line that holds `at`.
fn line_start(bytes: &[u8], at: usize) -> usize {
    bytes[..at].iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    const CLOSING: &[u8] = b"case a: passed\n1 passed, 0 failed, 0 skipped\n";

    fn status(code: i32) -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(code << 8))
    }

    fn watch(until: &Until) -> Watch<'_> {
        Watch { until, searched: 0, closing: None }
    }

    #[test]
    fn the_awaited_text_ends_a_run() {
        let until = Until::Appears(until_regex("^ok \\d+$").expect("a regex"));
        let mut watch = watch(&until);
        assert_eq!(watch.look(b"not ok 1\r\n", None, true), None);
        assert_eq!(watch.look(b"not ok 1\r\nok", None, true), None);
        assert_eq!(watch.look(b"not ok 1\r\nok 12\r\n", None, true), Some(Ok(())));
    }

    #[test]
    fn an_end_without_the_awaited_text_is_a_failure() {
        let until = Until::Appears(until_regex("ok").expect("a regex"));
        assert!(watch(&until).look(b"no\n", status(0), true).is_some_and(|v| v.is_err()));
        assert_eq!(watch(&until).look(b"ok\n", status(1), true), Some(Ok(())));
    }

    #[test]
    fn no_message_is_a_failure_unless_the_status_says_passed() {
        let look = |com1, ended, counts| watch(&Until::Verdict).look(com1, ended, counts);
        assert_eq!(look(b"", None, true), None);
        assert_eq!(look(CLOSING, None, true), None, "the end may still tell otherwise");
        assert_eq!(look(CLOSING, status(0), true), Some(Ok(())));
        assert_eq!(look(b"", status(0), true), Some(Ok(())));
        assert!(look(CLOSING, status(1), true).is_some_and(|v| v.is_err()));
        assert!(look(b"", status(1), true).is_some_and(|v| v.is_err()));
        assert!(look(b"", status(0), false).is_some_and(|v| v.is_err()), "no verdict in it");
        assert!(
            look(b"0 passed, 1 failed, 0 skipped\n", status(0), true).is_some_and(|v| v.is_err())
        );
    }

    #[test]
    fn refusing_needs_both_the_text_and_a_failure() {
        let until = Until::Refuses(until_regex("^nvmx: ").expect("a regex"));
        let look = |com1, ended| watch(&until).look(com1, ended, true);
        assert_eq!(look(b"nvmx: no image\n", None), None);
        assert_eq!(look(b"nvmx: no image\n", status(1)), Some(Ok(())));
        assert!(look(b"nvmx: no image\n", status(0)).is_some_and(|v| v.is_err()));
        assert!(look(b"", status(1)).is_some_and(|v| v.is_err()));
    }

    #[test]
    fn the_last_lines() {
        assert_eq!(last_lines(""), "");
        assert_eq!(last_lines("a\nb\n"), "a\nb\n");
        let text = "a line\n".repeat(2 * TAIL);
        assert_eq!(last_lines(&text), "a line\n".repeat(TAIL));
    }

    #[test]
    fn a_closing_line_may_arrive_in_pieces() {
        let mut watch = watch(&Until::Verdict);
        for length in 0..CLOSING.len() {
            assert_eq!(watch.look(&CLOSING[..length], None, true), None);
        }
        assert_eq!(watch.look(CLOSING, status(0), true), Some(Ok(())));
        assert_eq!(watch.closing.map(|(counts, _)| counts.passed), Some(1));
    }
}
