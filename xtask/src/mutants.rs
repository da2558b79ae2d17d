//! Do the tests notice when the engine is wrong? `cargo xtask mutants` breaks it on purpose, in one
//! way after another, and names the property that each is caught by.
//!
//! The engine's source stays clean: a copy of it gets every mutation of the [list](list::MUTATIONS)
//! at once, each as a choice between the original text and its replacement, and is built once. Which
//! mutation acts is said by an environment variable, so that each costs no more than a run of the
//! test that is to catch it.

mod list;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use serde::Deserialize;
use tabled::{
    Table, Tabled,
    settings::{Style, Width, object::Columns},
};

use crate::workspace::Workspace;
use list::MUTATIONS;

/// One way to break the engine.
#[derive(Debug, Clone, Copy)]
struct Mutation {
    /// Its name.
    name: &'static str,
    /// What it breaks, and the rule.
    breaks: &'static str,
    /// The file, under `crates/nvmx/src`.
    file: &'static str,
    /// What stands there, exactly once; white space does not count. Statements, or an expression.
    find: &'static str,
    /// What acts in its place. Where a choice between the two can't stand in the text's place, this
    /// is the text for both, with [`CHOICE`] as a condition in it.
    replace: &'static str,
    /// The test that catches it: the test program of `nvmx-testkit`, and the test in it.
    caught_by: (&'static str, &'static str),
}

/// In a replacement: whether the mutation is the one that acts.
const CHOICE: &str = "MUTANT";

/// Says which mutation acts, by its number; none where it is not set.
const VARIABLE: &str = "NVMX_MUTANT";

/// What the copy of the engine finds the choice by.
const CHOOSER: &str = r#"
extern crate std;

pub(crate) fn mutant(number: usize) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<usize>> = std::sync::OnceLock::new();
    let read = || std::env::var("NVMX_MUTANT").ok()?.parse().ok();
    *CHOSEN.get_or_init(read) == Some(number)
}
"#;

/// The crates that are copied.
const CRATES: [&str; 4] = ["vmx-defs", "nvmx", "vmx-model", "nvmx-testkit"];

/// How long one test may take.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Tests that run at once.
const WORKERS: usize = 2;

/// Breaks the engine in every way of the list, prints what caught each, and fails where nothing did.
/// Returns how many were caught.
pub(crate) fn mutants(workspace: &Workspace, only: Option<&str>) -> Result<usize> {
    let started = Instant::now();
    let copy = workspace.target.join("mutants");
    let chosen: Vec<_> = MUTATIONS
        .iter()
        .enumerate()
        .filter(|(_, mutation)| only.is_none_or(|only| mutation.name.contains(only)))
        .collect();
    ensure!(!chosen.is_empty(), "no mutation has such a name");
    write_copy(&workspace.root, &copy)?;
    let programs = build(workspace, &copy, &chosen)?;

    // First the engine as it is: each test that is to catch something, once.
    let mut catchers: Vec<_> = chosen.iter().map(|(_, mutation)| mutation.caught_by).collect();
    catchers.sort_unstable();
    catchers.dedup();
    let runs = catchers.iter().map(|catcher| (None, *catcher)).collect::<Vec<_>>();
    let mut faults = Vec::new();
    for ((_, catcher), run) in runs.iter().zip(run_all(&programs, &copy, &runs)) {
        let run = run?;
        if run.verdict != Verdict::Passed {
            let name = catcher.1;
            faults.push(format!("{name} fails without a mutation:\n{}", run.excerpt()));
        }
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));

    let runs = chosen
        .iter()
        .map(|(number, mutation)| (Some(*number), mutation.caught_by))
        .collect::<Vec<_>>();
    let mut rows = Vec::new();
    for ((_, mutation), run) in chosen.iter().zip(run_all(&programs, &copy, &runs)) {
        let run = run?;
        if run.verdict != Verdict::Failed {
            faults.push(format!("{} {}: {}", mutation.name, run.verdict.told(), mutation.breaks));
        }
        rows.push(Row::new(mutation, &run));
    }
    let mut table = Table::new(&rows);
    table.with(Style::blank()).modify(Columns::one(1), Width::wrap(64).keep_words(true));
    println!("{table}");
    println!(
        "{} of {} mutations caught, after {:.0} s",
        rows.len() - faults.len(),
        rows.len(),
        started.elapsed().as_secs_f64()
    );
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(rows.len())
}

/// A line of the table.
#[derive(Debug, Tabled)]
struct Row {
    #[tabled(rename = "mutation")]
    name: &'static str,
    #[tabled(rename = "what it breaks")]
    breaks: &'static str,
    #[tabled(rename = "caught by")]
    caught_by: String,
    case: String,
    seconds: String,
}

impl Row {
    fn new(mutation: &Mutation, run: &Finished) -> Self {
        let (program, test) = mutation.caught_by;
        Self {
            name: mutation.name,
            breaks: mutation.breaks,
            caught_by: match run.verdict {
                Verdict::Failed => format!("{program}::{test}"),
                verdict => format!("{} ({program}::{test})", verdict.told()),
            },
            case: run.case(),
            seconds: format!("{:.1}", run.time.as_secs_f64()),
        }
    }
}

/// Writes the workspace of the mutants: the host crates with the list's choices in the engine.
/// Leaves alone what stands there already, so that Cargo builds only what changed.
fn write_copy(root: &Path, copy: &Path) -> Result<()> {
    let manifest = fs::read_to_string(root.join("Cargo.toml"))?;
    let (mut kept, mut skipping) = (String::new(), false);
    for line in manifest.lines() {
        // The copy has only some of the members.
        skipping |= line.starts_with("members") || line.starts_with("default-members");
        if !skipping {
            kept += line;
            kept.push('\n');
        }
        skipping &= !line.ends_with(']');
        if line == "[workspace]" {
            kept += "members = [\"crates/*\"]\n";
        }
    }
    update(&copy.join("Cargo.toml"), kept.as_bytes())?;
    if !copy.join("Cargo.lock").exists() {
        fs::copy(root.join("Cargo.lock"), copy.join("Cargo.lock"))?;
    }
    let engine = root.join("crates/nvmx/src");
    let sources = mutate(&engine, MUTATIONS)?;
    for name in CRATES {
        let at = Path::new("crates").join(name);
        let mut files = Vec::new();
        list_files(&root.join(&at), &mut files)?;
        let mut kept = Vec::new();
        for file in files {
            let to = copy.join(file.strip_prefix(root)?);
            match sources.get(&file) {
                Some(text) => update(&to, text.as_bytes())?,
                None => update(&to, &fs::read(&file)?)?,
            }
            kept.push(to);
        }
        let mut old = Vec::new();
        list_files(&copy.join(&at), &mut old)?;
        for file in old.iter().filter(|file| !kept.contains(file)) {
            fs::remove_file(file)?;
        }
    }
    Ok(())
}

/// All files below a folder.
fn list_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("cannot read {}", folder.display()))?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            list_files(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Writes a file, unless it is already like this.
fn update(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// The engine's sources with the choices in them, by their paths: those files that have any, and the
/// crate's root with the chooser.
fn mutate(engine: &Path, mutations: &[Mutation]) -> Result<BTreeMap<PathBuf, String>> {
    let mut sources = BTreeMap::new();
    let mut faults = Vec::new();
    let mut places: BTreeMap<PathBuf, Vec<(Range<usize>, usize)>> = BTreeMap::new();
    for (number, mutation) in mutations.iter().enumerate() {
        let path = engine.join(mutation.file);
        if !sources.contains_key(&path) {
            let Ok(text) = fs::read_to_string(&path) else {
                faults.push(format!("{}: there is no {}", mutation.name, mutation.file));
                continue;
            };
            sources.insert(path.clone(), text);
        }
        let pattern = mutation.find.split_whitespace().map(regex::escape).collect::<Vec<_>>();
        let pattern = Regex::new(&pattern.join(r"\s+"))?;
        let found: Vec<_> = pattern.find_iter(&sources[&path]).map(|found| found.range()).collect();
        match <[_; 1]>::try_from(found) {
            Ok([range]) => places.entry(path).or_default().push((range, number)),
            Err(found) => faults.push(format!(
                "{}: its text stands {} times in {}, not once",
                mutation.name,
                found.len(),
                mutation.file
            )),
        }
    }
    for (path, mut places) in places {
        let Some(text) = sources.get_mut(&path) else { continue };
        places.sort_by_key(|(range, _)| (range.start, range.end));
        for pair in places.windows(2) {
            if let [(first, a), (second, b)] = pair
                && first != second
                && first.end > second.start
            {
                faults.push(format!("{} and {} overlap", mutations[*a].name, mutations[*b].name));
            }
        }
        // From the end, so that the places before it stay where they are.
        for alike in places.chunk_by(|(a, _), (b, _)| a == b).rev() {
            let range = alike[0].0.clone();
            let numbers: Vec<_> = alike.iter().map(|(_, number)| *number).collect();
            let choice = choice(mutations, &numbers, &text[range.clone()]);
            text.replace_range(range, &choice);
        }
    }
    ensure!(faults.is_empty(), "the list does not fit the engine:\n{}", faults.join("\n"));
    let root = engine.join("lib.rs");
    let text = match sources.remove(&root) {
        Some(text) => text,
        None => fs::read_to_string(&root)?,
    };
    sources.insert(root, text + CHOOSER);
    Ok(sources)
}

/// The text that stands for `original`, which some mutations replace.
fn choice(mutations: &[Mutation], numbers: &[usize], original: &str) -> String {
    let condition = |number: usize| format!("crate::mutant({number})");
    if let [number] = numbers
        && mutations[*number].replace.contains(CHOICE)
    {
        return mutations[*number].replace.replace(CHOICE, &condition(*number));
    }
    let branch =
        |number: &usize| format!("if {} {{ {} }}", condition(*number), mutations[*number].replace);
    let branches: Vec<_> = numbers.iter().map(branch).collect();
    let choice = format!("{} else {{ {original} }}", branches.join(" else "));
    // An expression may be an operand.
    if original.ends_with([';', '}']) { choice } else { format!("({choice})") }
}

/// Builds the test programs that are to catch something; each by its name.
fn build(
    workspace: &Workspace,
    copy: &Path,
    chosen: &[(usize, &Mutation)],
) -> Result<BTreeMap<String, PathBuf>> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        target: Option<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    let mut cargo = workspace.cargo();
    cargo.current_dir(copy).env("CARGO_TARGET_DIR", copy.join("target"));
    // A choice is no pretty code. Debug information costs more time than it saves here.
    cargo.env("RUSTFLAGS", "-Awarnings").env("CARGO_PROFILE_DEV_DEBUG", "false");
    cargo.args(["test", "--quiet", "--no-run", "--message-format=json", "--package=nvmx-testkit"]);
    let mut tests: Vec<_> = chosen.iter().map(|(_, mutation)| mutation.caught_by.0).collect();
    tests.sort_unstable();
    tests.dedup();
    cargo.args(tests.iter().flat_map(|test| ["--test", test]));
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the copy in {} does not build", copy.display());
    let mut programs = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Message>(line) else { continue };
        if let (Some(path), Some(target)) = (message.executable, message.target) {
            programs.insert(target.name, path);
        }
    }
    Ok(programs)
}

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Endless,
}

impl Verdict {
    fn told(self) -> &'static str {
        match self {
            Self::Passed => "SURVIVES",
            Self::Failed => "is caught",
            Self::Endless => "DOES NOT END",
        }
    }
}

/// A test that was run.
#[derive(Debug)]
struct Finished {
    verdict: Verdict,
    time: Duration,
    output: String,
}

impl Finished {
    /// The case that showed it: the seed of a random program, or the test itself.
    fn case(&self) -> String {
        let seed = Regex::new(r"(?m)^seed \d+").ok();
        let found = seed.and_then(|seed| Some(seed.find(&self.output)?.as_str().to_owned()));
        found.unwrap_or_else(|| "directed".to_owned())
    }

    /// The end of what it printed.
    fn excerpt(&self) -> String {
        let lines: Vec<_> = self.output.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// A mutation to act, or none, and the test to run.
type Order = (Option<usize>, (&'static str, &'static str));

/// Runs tests, some at once; the results in the order of the orders.
fn run_all(
    programs: &BTreeMap<String, PathBuf>,
    folder: &Path,
    orders: &[Order],
) -> Vec<Result<Finished>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(order) = orders.get(number) else { return done };
            done.push((number, run_one(programs, folder, *order)));
        }
    };
    let mut done: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined
            .flat_map(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

fn run_one(
    programs: &BTreeMap<String, PathBuf>,
    folder: &Path,
    (mutation, (program, test)): Order,
) -> Result<Finished> {
    let path = programs.get(program).with_context(|| format!("there is no test {program}"))?;
    let number = mutation.map_or("none".to_owned(), |number| number.to_string());
    let logs = folder.join("logs");
    fs::create_dir_all(&logs)?;
    let log = logs.join(format!("{program}-{test}-{number}.log"));
    let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let started = Instant::now();
    let mut child = Command::new(path)
        .args(["--exact", test, "--test-threads=1"])
        .env(VARIABLE, number)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot run {}", path.display()))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if started.elapsed() > TIMEOUT {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(10));
    };
    let time = started.elapsed();
    let output = fs::read_to_string(&log).unwrap_or_default();
    let verdict = match status {
        None => Verdict::Endless,
        Some(status) if status.success() => Verdict::Passed,
        Some(_) => Verdict::Failed,
    };
    let finished = Finished { verdict, time, output };
    if status.is_some() && !finished.output.contains(&format!("test {test} ")) {
        bail!("{program} did not run {test}:\n{}", finished.excerpt());
    }
    Ok(finished)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/nvmx/src")
    }

    #[test]
    fn the_list_fits_the_engine() {
        let sources = mutate(&engine(), MUTATIONS).unwrap();
        let choices: usize =
            sources.values().map(|text| text.matches("crate::mutant(").count()).sum();
        assert!(choices >= MUTATIONS.len());
        for (number, mutation) in MUTATIONS.iter().enumerate() {
            let text = &sources[&engine().join(mutation.file)];
            assert!(text.contains(&format!("crate::mutant({number})")), "{}", mutation.name);
        }
    }

    #[test]
    fn each_mutation_has_its_own_name() {
        let names: std::collections::BTreeSet<_> =
            MUTATIONS.iter().map(|mutation| mutation.name).collect();
        assert_eq!(names.len(), MUTATIONS.len());
    }

    /// A test of a rule that nothing makes fail may be no test of it.
    #[test]
    fn each_test_of_a_rule_of_the_seed_catches_something() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/nvmx-testkit/tests/seed.rs");
        let text = fs::read_to_string(path).unwrap();
        let rule = Regex::new(r"(?m)^fn (s([1-9])_\w+)").unwrap();
        let mut rules = std::collections::BTreeSet::new();
        for found in rule.captures_iter(&text) {
            let test = &found[1];
            rules.insert(found[2].to_owned());
            let catches = |mutation: &Mutation| mutation.caught_by == ("seed", test);
            assert!(MUTATIONS.iter().any(catches), "{test} catches nothing");
        }
        assert_eq!(rules.len(), 9);
    }

    fn mutation(name: &'static str, find: &'static str, replace: &'static str) -> Mutation {
        let caught_by = ("", "");
        Mutation { name, breaks: "", file: "lib.rs", find, replace, caught_by }
    }

    #[test]
    fn a_text_that_is_not_there_once_is_an_error() {
        let refused = |mutations: &[Mutation]| {
            mutate(&engine(), mutations).map(|_| ()).unwrap_err().to_string()
        };
        let told = refused(&[mutation("a", "no such text", "")]);
        assert!(told.contains("a: its text stands 0 times in lib.rs"), "{told}");
        let told = refused(&[mutation("b", "mod", "")]);
        assert!(told.contains("b: its text stands"), "{told}");
        let told = refused(&[
            mutation("c", "extern crate alloc;", ""),
            mutation("d", "alloc; mod cache;", ""),
        ]);
        assert!(told.contains("c and d overlap"), "{told}");
    }

    #[test]
    fn a_choice_stands_where_its_text_stood() {
        let list = [
            mutation("e", "f(x)", "0"),
            mutation("f", "f(x)", "1"),
            mutation("g", "g;", ""),
            mutation("h", "let a = b;", "let a = b || MUTANT;"),
        ];
        let expression = "(if crate::mutant(0) { 0 } else if crate::mutant(1) { 1 } else { f(x) })";
        assert_eq!(choice(&list, &[0, 1], "f(x)"), expression);
        assert_eq!(choice(&list, &[2], "g;"), "if crate::mutant(2) {  } else { g; }");
        assert_eq!(choice(&list, &[3], "let a = b;"), "let a = b || crate::mutant(3);");
    }
}
