//! Which failures and skips are expected? The two tables of `docs/deviations.md`.
//!
//! The first lists what an emulator gets wrong (`emulator | version | case | where | rule | what
//! happens`), the second what nvmx does not offer (`case | why`). Both are read by name of column.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    bochs::Bochs,
    serial::{Report, Verdict},
    workspace::Workspace,
};

/// Where a case runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// On the bare machine.
    Native,
    /// Under nvmx.
    Nvmx,
}

/// One line of the first table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Deviation {
    emulator: String,
    versions: Vec<String>,
    case: String,
    native: bool,
    nvmx: bool,
}

/// Both tables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Deviations {
    deviations: Vec<Deviation>,
    /// Cases of what nvmx does not offer; a trailing `*` stands for any end.
    not_offered: Vec<String>,
}

impl Deviations {
    /// Reads the repository's own file.
    pub(crate) fn read(workspace: &Workspace) -> Result<Self> {
        let file = workspace.root.join("docs/deviations.md");
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", file.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut tables = Self::default();
        for row in rows(text) {
            let cell = |name: &str| {
                row.get(name).cloned().with_context(|| format!("a row without {name}: {row:?}"))
            };
            if row.contains_key("emulator") {
                let (native, nvmx) = match cell("where")?.as_str() {
                    "native" => (true, false),
                    "nvmx" => (false, true),
                    "both" => (true, true),
                    other => bail!("where is native, nvmx or both, not {other}"),
                };
                ensure!(!cell("rule")?.is_empty(), "a deviation needs the rule: {row:?}");
                tables.deviations.push(Deviation {
                    emulator: cell("emulator")?,
                    versions: cell("version")?.split(", ").map(str::to_owned).collect(),
                    case: cell("case")?,
                    native,
                    nvmx,
                });
            } else if row.contains_key("why") {
                ensure!(!cell("why")?.is_empty(), "a case not offered needs a reason: {row:?}");
                tables.not_offered.push(cell("case")?);
            }
        }
        Ok(tables)
    }

    /// The cases that deviate on this Bochs.
    pub(crate) fn known(&self, bochs: &Bochs, place: Place) -> BTreeSet<&str> {
        self.known_on("Bochs", &bochs.version, place)
    }

    fn known_on(&self, emulator: &str, version: &str, place: Place) -> BTreeSet<&str> {
        let there = |deviation: &&Deviation| match place {
            Place::Native => deviation.native,
            Place::Nvmx => deviation.nvmx,
        };
        self.deviations
            .iter()
            .filter(there)
            .filter(|deviation| deviation.emulator == emulator)
            .filter(|deviation| deviation.versions.iter().any(|listed| listed == version))
            .map(|deviation| deviation.case.as_str())
            .collect()
    }

    /// What is wrong with a skipped set under nvmx, if compared with the native one: nothing, or
    /// a line for each fault.
    pub(crate) fn compare_skipped(&self, native: &Report, nvmx: &Report) -> Vec<String> {
        let mut faults = Vec::new();
        let skipped_native = native.skipped();
        let skipped_nvmx = nvmx.skipped();
        let mut used = BTreeSet::new();
        for (case, reason) in &skipped_nvmx {
            if skipped_native.contains_key(case) {
                continue;
            }
            match self.not_offered.iter().find(|pattern| matches(pattern, case)) {
                Some(pattern) => {
                    used.insert(pattern);
                }
                None => faults.push(format!("{case} is skipped under nvmx only: {reason}")),
            }
        }
        for case in skipped_native.keys().filter(|case| !skipped_nvmx.contains_key(*case)) {
            faults.push(format!("{case} is skipped natively only"));
        }
        for pattern in self.not_offered.iter().filter(|pattern| !used.contains(pattern)) {
            faults
                .push(format!("{pattern} is listed as not offered, but nvmx alone skips no such"));
        }
        for case in native.cases.keys().filter(|case| !nvmx.cases.contains_key(*case)) {
            faults.push(format!("{case} ran natively only"));
        }
        for case in nvmx.cases.keys().filter(|case| !native.cases.contains_key(*case)) {
            faults.push(format!("{case} ran under nvmx only"));
        }
        faults
    }
}

/// Cases that are listed as deviating but were not reported so.
pub(crate) fn unseen<'a>(known: &BTreeSet<&'a str>, report: &Report) -> Vec<&'a str> {
    known
        .iter()
        .copied()
        .filter(|case| !matches!(report.cases.get(*case), Some(Verdict::Known(_))))
        .collect()
}

fn matches(pattern: &str, case: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => case.starts_with(start),
        None => pattern == case,
    }
}

/// All rows of all Markdown tables, each cell by the name of its column.
fn rows(text: &str) -> Vec<BTreeMap<String, String>> {
    let mut rows = Vec::new();
    let mut header: Option<Vec<String>> = None;
    for line in text.lines() {
        let Some(cells) = cells(line) else {
            header = None;
            continue;
        };
        match &header {
            None => header = Some(cells),
            Some(_) if cells.iter().all(|cell| cell.trim_matches([':', '-']).is_empty()) => {}
            Some(names) => rows.push(names.iter().cloned().zip(cells).collect()),
        }
    }
    rows
}

/// The cells of a table's line, without code marks; `None` if it is no such line.
fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    // A bar within a cell is written with a backslash.
    let inner = inner.replace(r"\|", "\0");
    Some(inner.split('|').map(|cell| cell.trim().trim_matches('`').replace('\0', "|")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# Deviations

| emulator | version | case | where | rule | what happens |
| --- | --- | --- | --- | --- | --- |
| Bochs | 2.7 | `ve.index` | both | the index is loaded | a \\| b |
| Bochs | 2.7, 3.0 | `ept.walk` | native | read and write | write only |

Some text.

| case | why |
| --- | --- |
| `pml.*` | not offered |
";

    fn report(lines: &[&str]) -> Report {
        let mut report = Report::default();
        for line in lines {
            let (name, verdict) = crate::serial::parse_case(line).expect("a case line");
            report.cases.insert(name, verdict);
        }
        report
    }

    #[test]
    fn deviations_are_keyed_by_emulator_version_and_place() {
        let tables = Deviations::parse(TEXT).expect("parses");
        let known = |version, place| {
            tables.known_on("Bochs", version, place).into_iter().collect::<Vec<_>>()
        };
        assert_eq!(known("2.7", Place::Native), ["ept.walk", "ve.index"]);
        assert_eq!(known("2.7", Place::Nvmx), ["ve.index"]);
        assert_eq!(known("3.0", Place::Native), ["ept.walk"]);
        assert!(tables.known_on("QEMU", "2.7", Place::Native).is_empty());
    }

    #[test]
    fn bad_tables_are_refused() {
        assert!(Deviations::parse(&TEXT.replace("both", "here")).is_err());
        assert!(Deviations::parse(&TEXT.replace("| not offered |", "| |")).is_err());
    }

    #[test]
    fn only_listed_cases_may_be_skipped_under_nvmx_alone() {
        let tables = Deviations::parse(TEXT).expect("parses");
        let native = report(&["case a: skipped: no", "case pml.full: passed", "case b: passed"]);
        let good = report(&["case a: skipped: no", "case pml.full: skipped: x", "case b: passed"]);
        assert_eq!(tables.compare_skipped(&native, &good), Vec::<String>::new());
        let bad = report(&["case a: passed", "case pml.full: passed", "case b: skipped: x"]);
        assert_eq!(tables.compare_skipped(&native, &bad).len(), 3);
        let fewer = report(&["case a: skipped: no", "case pml.full: skipped: x"]);
        assert_eq!(tables.compare_skipped(&native, &fewer), ["b ran natively only"]);
    }

    #[test]
    fn a_listed_case_must_deviate() {
        let known = BTreeSet::from(["a", "b", "c"]);
        let report = report(&["case a: known deviation: x", "case b: passed"]);
        assert_eq!(unseen(&known, &report), ["b", "c"]);
    }

    #[test]
    fn the_repository_s_own_tables_parse() {
        let text = include_str!("../../docs/deviations.md");
        assert!(Deviations::parse(text).is_ok());
        assert!(rows(text).iter().all(|row| row.contains_key("case")));
    }
}
