//! Does everything hold that must hold? `cargo xtask test`, step by step, with one sum at the end.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use regex::Regex;

use crate::{
    bench,
    bochs::{Bochs, Machine},
    boot::{Boot, L0},
    demo,
    deviations::{self, Deviations, Place},
    fixtures,
    foreign::Told,
    images, lint, mutants,
    run::{Run, Until, last_lines, until_regex},
    serial::{Counts, Report},
    workspace::Workspace,
};

/// How many cases the conformance suite has at least.
const CASES: usize = 1190;

/// How many there are at least for several processors, in each run of them.
const SHARED_CASES: usize = 10;

/// How long one conformance run may take.
const CONFORMANCE_TIMEOUT: Duration = Duration::from_secs(400);

/// How long any short run may take.
const SHORT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a killed xtask's Bochs may live on.
const CLEANUP: Duration = Duration::from_secs(3);

/// What the hypervisor answers to an image that it can't boot.
const REFUSAL: &str = "^nvmx: .*(L1|module|image|multiboot|ELF)";

const ONE_PASSED: Counts = Counts { passed: 1, failed: 0, skipped: 0, known: 0 };

/// Runs everything that must pass.
pub(crate) fn test(workspace: &Workspace, bochs: Option<&Path>) -> Result<ExitCode> {
    let started = Instant::now();
    let mut tally = Tally::default();

    println!("== packages");
    let found = crate::prepare(bochs)?;
    println!("Bochs {}", found.version);

    for (name, command) in lint::CHECKS {
        tally.step(name, || lint::check(&mut command(workspace)).map(|()| ONE_PASSED));
    }
    tally.step("host tests", || host_tests(workspace));
    tally.step("every order of a shootdown", || shootdown_orders(workspace));
    tally.step("mutations of the engine", || {
        let passed = mutants::mutants(workspace, None)?;
        Ok(Counts { passed, ..Counts::default() })
    });
    let before = tally.failures.len();
    tally.step("images", || images::build_all(workspace).map(|()| ONE_PASSED));
    if tally.failures.len() > before {
        println!("the rest needs images: not run");
        return Ok(tally.close(started));
    }

    let with = Tests { workspace, bochs: &found, path: bochs };
    conformance(&with, &mut tally);
    tally.step("a foreign kernel", || with.foreign_kernel());
    tally.step("several processors", || with.several_processors());
    tally.step("several processors that run L2s", || with.several_l2s());
    tally.step("images that L0 must refuse", || with.refusals());
    tally.step("nothing is left behind", || with.cleanup());
    tally.step("the demo", || {
        demo::demo(workspace, &found, Machine::default(), CONFORMANCE_TIMEOUT).map(|()| ONE_PASSED)
    });
    tally.step("the benchmark's bounds", || {
        none(&bench::bench(workspace, &found, bench::Suite::All)?)?;
        Ok(ONE_PASSED)
    });
    Ok(tally.close(started))
}

/// What has been counted, and what failed.
#[derive(Debug, Default)]
struct Tally {
    counts: Counts,
    failures: Vec<String>,
}

impl Tally {
    /// Makes one step: its title, then its outcome.
    fn step(&mut self, title: &str, step: impl FnOnce() -> Result<Counts>) {
        println!("\n== {title}");
        let started = Instant::now();
        let outcome = step();
        self.note(title, started, outcome);
    }

    fn note(&mut self, title: &str, started: Instant, outcome: Result<Counts>) {
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Ok(counts) => {
                println!("{title}: ok, {counts} ({seconds:.1} s)");
                self.counts = self.counts.plus(counts);
            }
            Err(error) => {
                println!("{title}: FAILED ({seconds:.1} s): {error:#}");
                self.failures.push(format!("{title}: {error:#}"));
                self.counts.failed += 1;
            }
        }
    }

    /// Prints the summary; the closing line is plain.
    fn close(&self, started: Instant) -> ExitCode {
        println!("\n== summary after {:.0} s", started.elapsed().as_secs_f64());
        for failure in &self.failures {
            println!("FAILED {failure}");
        }
        let Counts { passed, failed, mut skipped, known } = self.counts;
        if known > 0 {
            println!("{known} of the skipped are known deviations (docs/deviations.md)");
            skipped += known;
        }
        println!("{}", Counts { passed, failed, skipped, known: 0 });
        if failed == 0 && self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// An error that has all of `faults`, a line each, if there are any.
fn none(faults: &[String]) -> Result<()> {
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// The unit and documentation tests of all that can run on the host: only the guests' images can't.
fn host_tests(workspace: &Workspace) -> Result<Counts> {
    let packages = ["--workspace", "--exclude=nvmx-guests"];
    let nextest = workspace
        .cargo()
        .args(["nextest", "--version"])
        .output()
        .is_ok_and(|output| output.status.success());
    let mut cargo = workspace.cargo();
    let mut counts = if nextest {
        cargo.args(["nextest", "run", "--status-level=fail"]).args(packages);
        let text = show_while_reading(&mut cargo)?;
        nextest_counts(&text).context("nextest gave no summary")?
    } else {
        cargo.args(["test", "--quiet", "--all-targets"]).args(packages);
        libtest_counts(&show_while_reading(&mut cargo)?)
    };
    let mut doc = workspace.cargo();
    doc.args(["test", "--quiet", "--doc"]).args(packages);
    counts = counts.plus(libtest_counts(&show_while_reading(&mut doc)?));
    ensure!(counts.failed == 0, "{counts}");
    Ok(counts)
}

/// The engine's shootdown protocol under loom, which needs the engine built with loom's atomics:
/// in a target folder of its own, or every other build would begin anew.
fn shootdown_orders(workspace: &Workspace) -> Result<Counts> {
    let mut cargo = workspace.cargo();
    cargo
        .args(["test", "--quiet", "--release", "--package=nvmx", "--test=shootdown"])
        .env("RUSTFLAGS", "--cfg loom")
        .env("CARGO_TARGET_DIR", workspace.target.join("loom"));
    let counts = libtest_counts(&show_while_reading(&mut cargo)?);
    ensure!(counts.passed > 0, "no test ran");
    Ok(counts)
}

/// Runs a command, shows its standard output and error, and returns both.
fn show_while_reading(command: &mut Command) -> Result<String> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let forward = |from: Box<dyn std::io::Read + Send>| {
        let mut text = String::new();
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            println!("{line}");
            text += &line;
            text.push('\n');
        }
        text
    };
    let text = thread::scope(|scope| {
        let err = scope.spawn(move || err.map_or_else(String::new, |err| forward(Box::new(err))));
        let out = out.map_or_else(String::new, |out| forward(Box::new(out)));
        out + &err.join().unwrap_or_default()
    });
    let status = child.wait()?;
    ensure!(status.success(), "{command:?} failed ({status})");
    Ok(text)
}

/// Reads `Summary [...] 20 tests run: 20 passed, 1 skipped`.
fn nextest_counts(text: &str) -> Option<Counts> {
    let line = text.lines().rev().find(|line| line.trim_start().starts_with("Summary ["))?;
    let number = |word: &str| {
        let regex = Regex::new(&format!(r"(\d+) {word}")).ok()?;
        regex.captures(line)?.get(1)?.as_str().parse().ok()
    };
    Some(Counts {
        passed: number("passed")?,
        failed: number("failed").unwrap_or(0),
        skipped: number("skipped").unwrap_or(0),
        known: 0,
    })
}

/// Adds up all lines `test result: ok. 20 passed; 0 failed; 1 ignored; ...`.
fn libtest_counts(text: &str) -> Counts {
    let mut counts = Counts::default();
    for line in text.lines().filter_map(|line| line.strip_prefix("test result: ")) {
        let number = |word: &str| {
            line.split([';', '.'])
                .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
                .unwrap_or(0)
        };
        counts.passed += number("passed");
        counts.failed += number("failed");
        counts.skipped += number("ignored");
    }
    counts
}

/// Runs the suite natively and under nvmx side by side, and compares.
fn conformance(tests: &Tests<'_>, tally: &mut Tally) {
    println!("\n== the conformance suite, natively and under nvmx");
    let started = Instant::now();
    let deviations = match Deviations::read(tests.workspace) {
        Ok(deviations) => deviations,
        Err(error) => return tally.note("deviations", started, Err(error)),
    };
    let (native, nvmx) = thread::scope(|scope| {
        let native = scope.spawn(|| tests.conformance(&deviations, Place::Native));
        let nvmx = tests.conformance(&deviations, Place::Nvmx);
        (native.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), nvmx)
    });
    let compared = match (&native, &nvmx) {
        (Ok(native), Ok(nvmx)) => Some(none(&deviations.compare_skipped(native, nvmx))),
        _ => None,
    };
    for (title, report) in [("conformance, native", native), ("conformance, nvmx", nvmx)] {
        tally.note(title, started, report.map(|report| report.counts()));
    }
    if let Some(compared) = compared {
        tally.note("the same cases skipped", started, compared.map(|()| ONE_PASSED));
    }
}

/// Everything the steps need.
#[derive(Debug, Clone, Copy)]
struct Tests<'a> {
    workspace: &'a Workspace,
    bochs: &'a Bochs,
    /// The Bochs that was asked for.
    path: Option<&'a Path>,
}

impl Tests<'_> {
    fn l0(&self, options: &str) -> L0 {
        L0 { image: self.workspace.image(images::HYPERVISOR), options: options.to_owned() }
    }

    /// One run of the whole suite, with no failure in it.
    fn conformance(&self, deviations: &Deviations, place: Place) -> Result<Report> {
        let known = deviations.known(self.bochs, place);
        let listed = known.iter().copied().collect::<Vec<_>>().join(",");
        let run = Run {
            name: match place {
                Place::Native => "conformance-native",
                Place::Nvmx => "conformance-nvmx",
            },
            boot: Boot {
                l0: (place == Place::Nvmx).then(|| self.l0("vmfunc=emulated")),
                l1: Some(self.workspace.image(images::CONFORMANCE)),
                cmdline: if known.is_empty() { listed } else { format!("known={listed}") },
                modules: Vec::new(),
            },
            machine: Machine::default(),
            until: Until::Verdict,
            timeout: CONFORMANCE_TIMEOUT,
            show: false,
        };
        let outcome = run.make(self.workspace, self.bochs)?;
        let report = Report::parse(&outcome.serial);
        let mut faults: Vec<String> = outcome.failure.into_iter().collect();
        match &report {
            Ok(report) => {
                let failures = report.failures();
                faults.extend(failures.map(|(name, reason)| format!("{name}: {reason}")));
                let unseen = deviations::unseen(&known, report);
                faults.extend(unseen.iter().map(|name| {
                    format!("{name} is listed as a known deviation, but was not reported as one")
                }));
                let total = report.counts().total();
                if total < CASES {
                    faults.push(format!("only {total} cases, not {CASES}"));
                }
            }
            Err(reason) => {
                faults.push(reason.clone());
                faults.push(format!("COM1 ended with:\n{}", last_lines(&outcome.serial)));
            }
        }
        if !faults.is_empty() {
            faults.push(format!("logs kept in {}", outcome.folder.display()));
        }
        none(&faults)?;
        report.map_err(anyhow::Error::msg)
    }

    /// This program's own `run`, as a user calls it.
    fn xtask_run(&self, arguments: &[&str]) -> Command {
        // The file that runs, even if a rebuild has replaced it under its name.
        let mut command = Command::new("/proc/self/exe");
        command.arg("run").args(arguments).env("CARGO_TARGET_DIR", &self.workspace.target);
        if let Some(bochs) = self.path {
            command.arg("--bochs").arg(bochs);
        }
        command
    }

    /// A kernel that knows nothing of us gets what it was promised.
    fn foreign_kernel(&self) -> Result<Counts> {
        let kernel = fixtures::assemble(self.workspace, fixtures::FOREIGN)?;
        let kernel = kernel.to_str().context("a folder's name is not UTF-8")?;
        let module = fixtures::write_file(self.workspace, "module", b"bytes of a module")?;
        let module = module.to_str().context("a folder's name is not UTF-8")?;
        let with_string = format!("{module} its  string");
        let boot = |cmdline: &str, more: &[&str]| -> Result<Told> {
            let mut command = self.xtask_run(&["--l1", kernel, "--cmdline", cmdline]);
            command.args(["--module", module, "--module", &with_string]);
            command.args(["--until", "^foreign: done$", "--timeout=60"]).args(more);
            let output = command.output().context("cannot run xtask")?;
            ensure!(
                output.status.success(),
                "{command:?} failed:\n{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            let told = Told::parse(&String::from_utf8_lossy(&output.stdout));
            let modules = [("", "bytes of a module"), ("its  string", "bytes of a module")];
            told.check(cmdline, &modules).with_context(|| format!("{command:?}"))?;
            Ok(told)
        };
        let mut counts = Counts::default();
        for cmdline in [
            "a b",
            "",
            " two  spaces; $HOME {x} #no comment ",
            r#"quotes: 'one' "two three" back\slash \x41 "#,
        ] {
            let bare = boot(cmdline, &["--native"])?;
            boot(cmdline, &[])?.check_hidden(&bare)?;
            counts = counts.plus(ONE_PASSED).plus(ONE_PASSED);
        }

        // A text that never comes is a failure with a reason.
        let mut command = self.xtask_run(&["--l1", kernel, "--native", "--until=never"]);
        let output = command.arg("--timeout=60").output().context("cannot run xtask")?;
        ensure!(!output.status.success(), "a text that never came was taken as seen");
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains("logs kept in "), "no path of the kept logs in: {said}");
        Ok(counts.plus(ONE_PASSED))
    }

    /// L1 starts and resets the other processors, and each can become a hypervisor.
    fn several_processors(&self) -> Result<Counts> {
        let kernel = fixtures::assemble(self.workspace, fixtures::SMP)?;
        let mut counts = Counts::default();
        for (place, cpus) in [(Place::Native, 2), (Place::Nvmx, 2), (Place::Nvmx, 4)] {
            let run = Run {
                name: match place {
                    Place::Native => "smp-native",
                    Place::Nvmx => "smp-nvmx",
                },
                boot: Boot {
                    l0: (place == Place::Nvmx).then(|| self.l0("")),
                    l1: Some(kernel.clone()),
                    cmdline: cpus.to_string(),
                    modules: Vec::new(),
                },
                machine: Machine { cpus, ..Machine::default() },
                until: Until::Verdict,
                timeout: SHORT_TIMEOUT,
                show: false,
            };
            let serial = run.make(self.workspace, self.bochs)?.into_result();
            let report = serial.and_then(|serial| {
                let came = format!("processors started: {}", cpus - 1);
                let rounds = serial.lines().filter(|line| line.trim_end() == came).count();
                let report = Report::parse(&serial).map_err(anyhow::Error::msg)?;
                // Each round reports three cases.
                let ran = report.counts().passed;
                ensure!(ran > 0 && ran == 3 * rounds, "{ran} cases passed in {rounds} rounds");
                Ok(report)
            });
            let report = report.with_context(|| format!("{cpus} processors, {place:?}"))?;
            println!("{cpus} processors, {place:?}: {}", report.counts());
            counts = counts.plus(report.counts());
        }
        Ok(counts.plus(self.tracked_local_apic()?))
    }

    /// With several processors L2's writes to the local APIC's page exit to L0, which carries them
    /// out: the cases in which L2 sends itself an NMI.
    fn tracked_local_apic(&self) -> Result<Counts> {
        let report = self.l2s(Place::Nvmx, 2, "only=behaviour.nmi")?;
        let counts = report.counts();
        ensure!(counts.passed >= 3, "L2 and the local APIC: {counts}");
        println!("L2 and the local APIC, 2 processors: {counts}");
        Ok(counts)
    }

    /// The suite's cases for several processors: what one changes of L2's EPT, others see.
    fn several_l2s(&self) -> Result<Counts> {
        // With more than two processors, what concerns all of them.
        let machines =
            [(Place::Native, 2, "smp."), (Place::Nvmx, 2, "smp."), (Place::Nvmx, 4, "smp.invept.")];
        let reports = thread::scope(|scope| {
            let runs = machines.map(|(place, cpus, only)| {
                scope.spawn(move || self.l2s(place, cpus, &format!("cpus={cpus} only={only}")))
            });
            runs.map(|run| run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let mut counts = Counts::default();
        for ((place, cpus, _), report) in machines.into_iter().zip(reports) {
            let report = report.with_context(|| format!("{cpus} processors, {place:?}"))?;
            let passed = report.counts().passed;
            ensure!(passed >= SHARED_CASES, "only {passed} cases, not {SHARED_CASES}");
            println!("{cpus} processors, {place:?}: {}", report.counts());
            counts = counts.plus(report.counts());
        }
        Ok(counts)
    }

    fn l2s(&self, place: Place, cpus: u32, cmdline: &str) -> Result<Report> {
        let run = Run {
            name: &match place {
                Place::Native => format!("l2s-native-{cpus}"),
                Place::Nvmx => format!("l2s-nvmx-{cpus}"),
            },
            boot: Boot {
                l0: (place == Place::Nvmx).then(|| self.l0("vmfunc=emulated")),
                l1: Some(self.workspace.image(images::CONFORMANCE)),
                cmdline: cmdline.to_owned(),
                modules: Vec::new(),
            },
            machine: Machine { cpus, ..Machine::default() },
            until: Until::Verdict,
            timeout: CONFORMANCE_TIMEOUT,
            show: false,
        };
        let outcome = run.make(self.workspace, self.bochs)?;
        let report = Report::parse(&outcome.serial);
        if let Ok(report) = &report {
            let failures = report.failures().map(|(name, reason)| format!("{name}: {reason}"));
            none(&failures.collect::<Vec<_>>())?;
        }
        outcome.into_result()?;
        report.map_err(anyhow::Error::msg)
    }

    /// Images that can't be booted are refused in words, and the machine ends as failed.
    fn refusals(&self) -> Result<Counts> {
        let kernel = fs::read(fixtures::assemble(self.workspace, fixtures::FOREIGN)?)?;
        let header = |flags: u32| {
            let magic = 0x1BAD_B002_u32;
            let checksum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
            let mut image = vec![0; 4096];
            for (at, word) in [magic, flags, checksum].into_iter().enumerate() {
                image[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
            }
            image
        };
        let images: [(&str, Option<Vec<u8>>); 6] = [
            ("missing", None),
            ("empty of meaning", Some(b"This is no kernel.\n".repeat(100))),
            ("a header without a file to load", Some(header(3))),
            ("a mandatory flag that nobody knows", Some(header(1 << 5))),
            ("a video mode wanted", Some(header(1 << 2))),
            ("cut short", Some(kernel[..kernel.len() / 2].to_vec())),
        ];
        let mut counts = Counts::default();
        for (what, bytes) in images {
            let name = format!("bad-{}", what.replace(' ', "-"));
            let l1 = match bytes {
                Some(bytes) => Some(fixtures::write_file(self.workspace, &name, &bytes)?),
                None => None,
            };
            let run = Run {
                name: "refused",
                boot: Boot { l0: Some(self.l0("")), l1, cmdline: String::new(), modules: vec![] },
                machine: Machine::default(),
                until: Until::Refuses(until_regex(REFUSAL)?),
                timeout: SHORT_TIMEOUT,
                show: false,
            };
            let serial =
                run.make(self.workspace, self.bochs)?.into_result().context(what.to_owned())?;
            let last = serial.lines().rev().find(|line| line.starts_with("nvmx: ")).unwrap_or("");
            println!("{what}: {last}");
            counts = counts.plus(ONE_PASSED);
        }
        Ok(counts)
    }

    /// However xtask is ended, its Bochs ends too.
    fn cleanup(&self) -> Result<Counts> {
        let kernel = fixtures::assemble(self.workspace, fixtures::FOREIGN)?;
        let kernel = kernel.to_str().context("a folder's name is not UTF-8")?;
        let mut counts = Counts::default();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
            let mark = format!("{}-{signal}", std::process::id());
            let mut child = self
                .xtask_run(&["--l1", kernel, "--native", "--cmdline=stay", "--until=never"])
                .env(MARK, &mark)
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .context("cannot run xtask")?;
            let outcome = kill_and_look(&mut child, signal, &mark);
            // Whatever went wrong above, this test leaves nothing behind itself.
            let _ = child.kill();
            let _ = child.wait();
            outcome.with_context(|| format!("after {signal}"))?;
            counts = counts.plus(ONE_PASSED);
        }
        Ok(counts)
    }
}

/// Marks all that a child starts, by their environment.
const MARK: &str = "NVMX_CLEANUP_TEST";

fn kill_and_look(child: &mut Child, signal: Signal, mark: &str) -> Result<()> {
    let out = child.stdout.take().context("no standard output")?;
    let seen = BufReader::new(out)
        .lines()
        .map_while(Result::ok)
        .any(|line| line.trim_end() == "foreign: done");
    ensure!(seen, "the kernel did not come up");
    ensure!(marked(mark).len() > 1, "no Bochs to be found, so nothing would be proved");
    kill(Pid::from_raw(child.id().cast_signed()), signal)?;
    let status = child.wait()?;
    ensure!(!status.success(), "xtask ended as if nothing had happened");
    let killed = Instant::now();
    loop {
        let left = marked(mark);
        if left.is_empty() {
            return Ok(());
        }
        if killed.elapsed() > CLEANUP {
            for process in &left {
                let _ = kill(*process, Signal::SIGKILL);
            }
            bail!("processes left behind: {left:?}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The processes whose environment has the mark.
fn marked(mark: &str) -> Vec<Pid> {
    let wanted = format!("{MARK}={mark}");
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| {
            let path: PathBuf = entry.ok()?.path();
            let id = path.file_name()?.to_str()?.parse().ok()?;
            let environment = fs::read(path.join("environ")).ok()?;
            environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == wanted.as_bytes())
                .then(|| Pid::from_raw(id))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nextest_summaries() {
        let text = "  Summary [   0.058s] 21 tests run: 19 passed, 2 failed, 3 skipped\n";
        let counts = Counts { passed: 19, failed: 2, skipped: 3, known: 0 };
        assert_eq!(nextest_counts(text), Some(counts));
        assert_eq!(nextest_counts("nothing"), None);
    }

    #[test]
    fn libtest_results_add_up() {
        let text = "test result: ok. 20 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
                    x\ntest result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured\n";
        let counts = Counts { passed: 22, failed: 1, skipped: 1, known: 0 };
        assert_eq!(libtest_counts(text), counts);
    }

    #[test]
    fn a_failed_step_counts_and_is_remembered() {
        let mut tally = Tally::default();
        tally.step("good", || Ok(ONE_PASSED));
        tally.step("bad", || bail!("because"));
        assert_eq!(tally.counts, Counts { passed: 1, failed: 1, skipped: 0, known: 0 });
        assert_eq!(tally.failures, ["bad: because"]);
    }
}
