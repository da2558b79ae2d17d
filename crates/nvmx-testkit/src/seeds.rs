//! Which cases does a property run, and which one broke it?
//!
//! A case follows from its number alone. A test that fails says the number, and the same number runs
//! that case again: with `NVMX_SEED` in the environment, each property runs it alone. `NVMX_CASES`
//! is for longer runs: that many times the cases.

/// Says, if the case panics, which it was.
struct Case<'a> {
    property: &'a str,
    seed: u64,
}

impl Drop for Case<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { property, seed } = self;
            eprintln!("{property}: seed {seed} (NVMX_SEED={seed} runs it alone)");
        }
    }
}

/// Runs the cases of a property.
pub fn each(property: &str, count: u64, mut case: impl FnMut(u64)) {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let count = count * number("NVMX_CASES").unwrap_or(1);
    let seeds = number("NVMX_SEED").map_or(0..count, |seed| seed..seed + 1);
    for seed in seeds {
        let _case = Case { property, seed };
        case(seed);
    }
}
