//! `cargo xtask fuzz`: runs random cases, or one again.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use nvmx_testkit::Case;
use nvmx_testkit::fuzz::{Plan, fuzz};

/// Runs random programs on the engine over a model of the processor, and compares them with the
/// bare model.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask fuzz", bin_name = "cargo xtask fuzz")]
struct Options {
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    minutes: f64,
    /// Names the run: the same seed, the same programs in the same order
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Runs one program alone, by the seed that a failure printed
    #[arg(long, value_name = "SEED", conflicts_with_all = ["minutes", "seed"])]
    program: Option<u64>,
    /// On how many threads; by default on all processors
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(seed) = options.program {
        return match Case::of_seed(seed).check() {
            Ok(ran) => {
                println!("program {seed} holds: {ran:?}");
                ExitCode::SUCCESS
            }
            Err(report) => {
                println!("{report}");
                ExitCode::FAILURE
            }
        };
    }
    let available = thread::available_parallelism().map_or(1, Into::into);
    let plan = Plan {
        seed: options.seed,
        time: Duration::try_from_secs_f64(options.minutes * 60.0).unwrap_or(Duration::MAX),
        threads: options.threads.unwrap_or(available).max(1),
    };
    println!("fuzz: seed {}, {} threads", plan.seed, plan.threads);
    let (sum, failure) = fuzz(plan, |sum| println!("fuzz: {sum}"));
    println!("fuzz: {sum}");
    match failure {
        None => {
            println!("fuzz: nothing found");
            ExitCode::SUCCESS
        }
        Some(report) => {
            println!("{report}");
            println!("fuzz: FAILED. Again: cargo xtask fuzz --program {}", report.case.seed);
            ExitCode::FAILURE
        }
    }
}
