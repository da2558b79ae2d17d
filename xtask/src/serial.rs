//! What did the guest say? The lines that our guests print on COM1, read back.
//!
//! ```text
//! case NAME: passed
//! case NAME: failed: REASON
//! case NAME: skipped: REASON
//! case NAME: known deviation: REASON
//! N passed, N failed, N skipped[, N known deviations]
//! bench: NAME VALUE
//! demo: view N read 0xVALUE expected 0xVALUE
//! demo: switch_instructions N
//! demo: done
//! ```

use std::{collections::BTreeMap, fmt};

/// How one conformance case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The machine did what the SDM says.
    Passed,
    /// It did not, and why.
    Failed(String),
    /// The case needs a capability that is not there.
    Skipped(String),
    /// It did not, as `docs/deviations.md` says of this emulator.
    Known(String),
}

/// Cases counted by verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    /// Cases that passed.
    pub(crate) passed: usize,
    /// Cases that failed.
    pub(crate) failed: usize,
    /// Cases not run.
    pub(crate) skipped: usize,
    /// Cases in which the emulator, not we, is known to be wrong.
    pub(crate) known: usize,
}

impl Counts {
    /// All cases, whatever their verdict.
    pub(crate) fn total(self) -> usize {
        self.passed + self.failed + self.skipped + self.known
    }

    /// Both counts together.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
            known: self.known + other.known,
        }
    }

    /// Reads a closing line, if `line` is one.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut parts = line.trim().split(", ");
        let mut part = |word: &str| {
            let (number, said) = parts.next()?.split_once(' ')?;
            (said.strip_suffix('s').unwrap_or(said) == word).then(|| number.parse().ok())?
        };
        let mut counts = Self {
            passed: part("passed")?,
            failed: part("failed")?,
            skipped: part("skipped")?,
            known: 0,
        };
        match parts.next() {
            None => Some(counts),
            Some(known) => {
                let number = known
                    .strip_suffix(" known deviations")
                    .or_else(|| known.strip_suffix(" known deviation"))?;
                counts.known = number.parse().ok()?;
                parts.next().is_none().then_some(counts)
            }
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)?;
        if self.known > 0 {
            write!(f, ", {} known deviations", self.known)?;
        }
        Ok(())
    }
}

/// One conformance case as the guest reported it: name and verdict.
pub(crate) fn parse_case(line: &str) -> Option<(String, Verdict)> {
    let (name, verdict) = line.trim_end().strip_prefix("case ")?.split_once(": ")?;
    let verdict = match verdict.split_once(": ").unwrap_or((verdict, "")) {
        ("passed", "") => Verdict::Passed,
        ("failed", reason) => Verdict::Failed(reason.to_owned()),
        ("skipped", reason) => Verdict::Skipped(reason.to_owned()),
        ("known deviation", reason) => Verdict::Known(reason.to_owned()),
        _ => return None,
    };
    Some((name.to_owned(), verdict))
}

/// Everything that a conformance run said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Report {
    /// Each case by its name.
    pub(crate) cases: BTreeMap<String, Verdict>,
    /// The closing line.
    pub(crate) closing: Option<Counts>,
}

impl Report {
    /// Reads a whole run. Fails, saying why, if the report contradicts itself or is cut short.
    pub(crate) fn parse(serial: &str) -> Result<Self, String> {
        let mut report = Self::default();
        for line in serial.lines() {
            if let Some((name, verdict)) = parse_case(line) {
                if report.cases.insert(name.clone(), verdict).is_some() {
                    return Err(format!("case {name} was reported twice"));
                }
            } else if let Some(counts) = Counts::parse(line) {
                report.closing = Some(counts);
            }
        }
        let counted = report.counts();
        match report.closing {
            None => Err(format!("no closing line (after {counted})")),
            Some(closing) if closing != counted => {
                Err(format!("the closing line says {closing}, but the cases are {counted}"))
            }
            Some(_) => Ok(report),
        }
    }

    /// The cases counted.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for verdict in self.cases.values() {
            match verdict {
                Verdict::Passed => counts.passed += 1,
                Verdict::Failed(_) => counts.failed += 1,
                Verdict::Skipped(_) => counts.skipped += 1,
                Verdict::Known(_) => counts.known += 1,
            }
        }
        counts
    }

    /// The failed cases with their reasons.
    pub(crate) fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.cases.iter().filter_map(|(name, verdict)| match verdict {
            Verdict::Failed(reason) => Some((name.as_str(), reason.as_str())),
            _ => None,
        })
    }

    /// The skipped cases with their reasons.
    pub(crate) fn skipped(&self) -> BTreeMap<&str, &str> {
        self.cases
            .iter()
            .filter_map(|(name, verdict)| match verdict {
                Verdict::Skipped(reason) => Some((name.as_str(), reason.as_str())),
                _ => None,
            })
            .collect()
    }
}

/// The figures of a benchmark run, in instructions, by name.
pub(crate) fn parse_bench(serial: &str) -> BTreeMap<String, f64> {
    serial
        .lines()
        .filter_map(|line| {
            let (name, value) = line.trim_end().strip_prefix("bench: ")?.split_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// What L2 read through one view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct View {
    /// The view's number in L1's EPTP list.
    pub(crate) number: u32,
    /// What L2 read.
    pub(crate) read: u64,
    /// What L1 had put there.
    pub(crate) expected: u64,
}

/// What a demo run said.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Demo {
    /// Every view that L2 switched to.
    pub(crate) views: Vec<View>,
    /// Instructions that one switch and one load took.
    pub(crate) switch_instructions: Option<f64>,
    /// Whether the guest came to its end.
    pub(crate) done: bool,
}

impl Demo {
    /// Reads a whole demo run.
    pub(crate) fn parse(serial: &str) -> Self {
        let mut demo = Self::default();
        for line in serial.lines() {
            let Some(said) = line.trim_end().strip_prefix("demo: ") else { continue };
            let words: Vec<&str> = said.split(' ').collect();
            match words[..] {
                ["view", number, "read", read, "expected", expected] => {
                    if let (Ok(number), Some(read), Some(expected)) =
                        (number.parse(), parse_hex(read), parse_hex(expected))
                    {
                        demo.views.push(View { number, read, expected });
                    }
                }
                ["switch_instructions", number] => demo.switch_instructions = number.parse().ok(),
                ["done"] => demo.done = true,
                _ => {}
            }
        }
        demo
    }
}

fn parse_hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines() {
        let counts = |passed, failed, skipped, known| Counts { passed, failed, skipped, known };
        assert_eq!(Counts::parse("3 passed, 0 failed, 1 skipped"), Some(counts(3, 0, 1, 0)));
        assert_eq!(
            Counts::parse("3 passed, 0 failed, 1 skipped, 2 known deviations\r"),
            Some(counts(3, 0, 1, 2))
        );
        assert_eq!(
            Counts::parse("3 passed, 0 failed, 1 skipped, 1 known deviation"),
            Some(counts(3, 0, 1, 1))
        );
        for not in [
            "",
            "3 passed",
            "3 passed, 0 failed",
            "x passed, 0 failed, 1 skipped",
            "case a: 3 passed, 0 failed, 1 skipped",
            "3 passed, 0 failed, 1 skipped, 2 others",
            "3 passed, 0 failed, 1 skipped, 2 known deviations, 1 more",
            "0 failed, 3 passed, 1 skipped",
        ] {
            assert_eq!(Counts::parse(not), None, "{not}");
        }
    }

    #[test]
    fn counts_print_as_they_parse() {
        for text in
            ["1 passed, 2 failed, 3 skipped", "1 passed, 2 failed, 3 skipped, 4 known deviations"]
        {
            assert_eq!(Counts::parse(text).expect("parses").to_string(), text);
        }
    }

    #[test]
    fn cases() {
        assert_eq!(parse_case("case s1.a: passed"), Some(("s1.a".into(), Verdict::Passed)));
        assert_eq!(
            parse_case("case s1 vpid: failed: got 3: not 4\r"),
            Some(("s1 vpid".into(), Verdict::Failed("got 3: not 4".into())))
        );
        assert_eq!(
            parse_case("case x: skipped: no #VE"),
            Some(("x".into(), Verdict::Skipped("no #VE".into())))
        );
        assert_eq!(
            parse_case("case x: known deviation: index kept"),
            Some(("x".into(), Verdict::Known("index kept".into())))
        );
        assert_eq!(parse_case("case x: odd"), None);
        assert_eq!(parse_case("nvmx: case x: passed"), None);
    }

    #[test]
    fn reports() {
        let report = Report::parse(
            "hello\ncase a: passed\ncase b: failed: no\ncase c: skipped: none\n\
             1 passed, 1 failed, 1 skipped\n",
        )
        .expect("a whole report");
        assert_eq!(report.counts().total(), 3);
        assert_eq!(report.failures().collect::<Vec<_>>(), [("b", "no")]);
        assert_eq!(report.skipped().into_iter().collect::<Vec<_>>(), [("c", "none")]);
        assert!(Report::parse("case a: passed\n").is_err(), "no closing line");
        assert!(Report::parse("case a: passed\n2 passed, 0 failed, 0 skipped\n").is_err());
        assert!(
            Report::parse("case a: passed\ncase a: passed\n2 passed, 0 failed, 0 skipped\n")
                .is_err()
        );
    }

    #[test]
    fn bench_lines() {
        let figures = parse_bench("bench: switch_2 5\nbench: vmcall_round_trip 312.5\nbench: x\n");
        assert_eq!(figures.len(), 2);
        assert_eq!(figures.get("vmcall_round_trip"), Some(&312.5));
    }

    #[test]
    fn demo_lines() {
        let demo = Demo::parse(
            "demo: hello\r\ndemo: view 1 read 0xab expected 0xAB\r\n\
             demo: switch_instructions 5\r\ndemo: done\r\n",
        );
        assert_eq!(demo.views, [View { number: 1, read: 0xAB, expected: 0xAB }]);
        assert_eq!(demo.switch_instructions, Some(5.0));
        assert!(demo.done);
    }
}
