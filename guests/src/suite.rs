//! Answers: what is a case, and how are cases run and reported?
//!
//! Each case runs inside [`catch`] with pages of its own, and starts and ends
//! outside VMX operation, so that one that goes wrong fails alone.

use core::fmt;

use arrayvec::ArrayString;

use crate::{
    machine,
    memory::Arena,
    multiboot,
    single::Single,
    traps::{self, Fault, catch},
};

/// The text of the latest failure or skip; what does not fit is cut off.
///
/// There is one text, kept apart, so that a [`Verdict`] is small: a case has one reason to stop.
#[derive(Debug)]
pub struct Reason(());

static TEXT: Single<ArrayString<240>> = Single::new(ArrayString::new_const());

impl fmt::Display for Reason {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: the text is changed by `reason` only, which is not running.
        out.write_str(unsafe { (*TEXT.get()).as_str() })
    }
}

/// Why a case did not pass.
#[derive(Debug)]
pub enum Stop {
    /// The machine did what it must not.
    Failed(Reason),
    /// A capability that the case needs is absent.
    Skipped(Reason),
}

/// What a case gives back: `Ok` is passed.
pub type Verdict = Result<(), Stop>;

/// Makes a formatted text the [`Reason`].
pub fn reason(text: fmt::Arguments<'_>) -> Reason {
    struct Cut(ArrayString<240>);
    impl fmt::Write for Cut {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for letter in text.chars() {
                if self.0.try_push(letter).is_err() {
                    break;
                }
            }
            Ok(())
        }
    }
    let mut cut = Cut(ArrayString::new());
    let _ = fmt::Write::write_fmt(&mut cut, text);
    // SAFETY: nobody is reading the text now; a Display of an older reason was only in `cut`.
    unsafe { *TEXT.get() = cut.0 };
    Reason(())
}

/// Ends the case as failed with a formatted reason.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)+) => {
        return Err($crate::suite::Stop::Failed($crate::suite::reason(format_args!($($arg)+))))
    };
}

/// Ends the case as skipped with a formatted reason.
#[macro_export]
macro_rules! skip {
    ($($arg:tt)+) => {
        return Err($crate::suite::Stop::Skipped($crate::suite::reason(format_args!($($arg)+))))
    };
}

/// Fails the case with a formatted reason unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($arg:tt)+) => {
        if !$condition {
            $crate::fail!($($arg)+);
        }
    };
}

/// Fails the case unless both values are equal; the text says what they are.
#[macro_export]
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($arg:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) => {
                if *found != *expected {
                    $crate::fail!(
                        "{}: found {:#x?}, expected {:#x?}",
                        format_args!($($arg)+),
                        found,
                        expected
                    );
                }
            }
        }
    };
}

/// One case.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name, dots between the parts: `vmxon.misaligned`.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&mut Ctx<'_>) -> Verdict,
}

/// What a case gets.
pub struct Ctx<'a> {
    /// Free pages; those a case takes are given back after it.
    pub arena: &'a mut Arena,
    /// What the boot loader said.
    pub info: &'a multiboot::Info,
}

/// How many cases ended how.
#[derive(Default)]
struct Tally {
    passed: u32,
    failed: u32,
    skipped: u32,
    known: u32,
}

/// The value of the option `key=` on the command line, empty if there is none. The last one counts.
pub fn option<'a>(command_line: &'a str, key: &str) -> &'a str {
    command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .next_back()
        .unwrap_or("")
}

/// Runs every case whose name begins with one of `only=`'s prefixes (all without that option),
/// prints a line for each and the sum, and tells whether none failed.
pub fn run(info: &multiboot::Info, files: &[&[Case]]) -> bool {
    let only = option(&info.command_line, "only");
    let known = option(&info.command_line, "known");
    let mut arena = Arena::new(info);
    let mut tally = Tally::default();
    let wanted =
        |name: &str| only.is_empty() || only.split(',').any(|start| name.starts_with(start));
    let cases = files.iter().flat_map(|file| file.iter()).filter(|case| wanted(case.name));
    for case in cases {
        let mark = arena.mark();
        let verdict = run_one(case, &mut Ctx { arena: &mut arena, info });
        arena.reset(mark);
        let name = case.name;
        let deviates = known.split(',').any(|listed| listed == name);
        match verdict {
            Ok(()) if deviates => {
                tally.failed += 1;
                crate::println!("case {name}: failed: listed deviation passes");
            }
            Ok(()) => {
                tally.passed += 1;
                crate::println!("case {name}: passed");
            }
            Err(Stop::Failed(reason)) if deviates => {
                tally.known += 1;
                crate::println!("case {name}: known deviation: {reason}");
            }
            Err(Stop::Failed(reason)) => {
                tally.failed += 1;
                crate::println!("case {name}: failed: {reason}");
            }
            Err(Stop::Skipped(reason)) => {
                tally.skipped += 1;
                crate::println!("case {name}: skipped: {reason}");
            }
        }
    }
    let Tally { passed, failed, skipped, known } = tally;
    if known == 0 {
        crate::println!("{passed} passed, {failed} failed, {skipped} skipped");
    } else {
        crate::println!(
            "{passed} passed, {failed} failed, {skipped} skipped, {known} known deviations"
        );
    }
    failed == 0
}

/// Runs one program of another kind (the demonstration, the benchmark) as a case is run, prints
/// `NAME: done` or `NAME: failed: REASON` at its end, and tells whether it passed.
pub fn run_program(
    info: &multiboot::Info,
    name: &'static str,
    run: fn(&mut Ctx<'_>) -> Verdict,
) -> bool {
    let mut arena = Arena::new(info);
    match run_one(&Case { name, run }, &mut Ctx { arena: &mut arena, info }) {
        Ok(()) => crate::println!("{name}: done"),
        Err(Stop::Failed(reason) | Stop::Skipped(reason)) => {
            crate::println!("{name}: failed: {reason}");
            return false;
        }
    }
    true
}

fn run_one(case: &Case, ctx: &mut Ctx<'_>) -> Verdict {
    let state = machine::State::save();
    let caught = catch(|| (case.run)(ctx));
    // A case that stopped half-way may have left the processor in VMX operation.
    let restored = catch(|| state.restore());
    match caught {
        Err(Fault { vector: Fault::PANIC, .. }) => fail!("panic: {}", traps::panic_text()),
        Err(Fault { vector, error_code, cr2, rip }) => fail!(
            "unexpected exception {vector} (error code {error_code:#x}) at {rip:#x}, CR2 {cr2:#x}"
        ),
        Ok(Ok(())) if restored.is_err() => fail!("the machine's state can't be put back"),
        Ok(verdict) => verdict,
    }
}
