//! What can a person do with this repository? `cargo xtask`, the only entry point: build, run,
//! test, fuzz, break, bench, iso and lint.

mod bench;
mod bochs;
mod boot;
mod demo;
mod deviations;
mod exact;
mod fixtures;
mod foreign;
mod fuzz;
mod guard;
mod images;
mod lint;
mod mutants;
mod packages;
mod run;
mod serial;
mod suite;
mod workspace;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};

use crate::{
    bochs::{Bochs, Machine},
    boot::{Boot, L0, Module},
    packages::Need,
    run::{Run, Until, until_regex},
    workspace::Workspace,
};

/// Builds, runs and tests nvmx: nested VT-x for Rust hypervisors.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Build the freestanding images into `target/images`
    ///
    /// The hypervisor `nvmx-hv` and the L1 guests `l1-conformance`, `l1-bench` and `l1-demo`.
    /// Needs nothing but stable Rust.
    Build,
    /// Boot in Bochs: the demo, or an L1 of your choice
    ///
    /// Without --l1: installs the Debian packages it needs, builds everything, boots the demo
    /// natively and under nvmx, and prints what the guest's guest saw and what it cost.
    ///
    /// With --l1: boots that kernel under nvmx, or with --native on the bare machine.
    /// COM1 is shown on standard output. The run ends by itself: well when --until appears, or
    /// when the guest says that it passed; else with the reason and the path of the kept logs.
    /// Everything about a run is kept in a folder of its own under `target/runs`.
    Run(RunArgs),
    /// Run everything that must pass
    ///
    /// Lints, host tests, mutations of the engine, the conformance suite natively and under nvmx, a
    /// foreign kernel, several processors, images that must be refused, the demo, the benchmark's
    /// bounds, and that no Bochs is left behind.
    /// Closes with `N passed, N failed, N skipped`.
    Test {
        #[command(flatten)]
        emulator: EmulatorArgs,
    },
    /// Measure in instructions, natively and under nvmx
    ///
    /// Prints a table for each suite and writes it to `target/bench/SUITE.json`.
    Bench {
        /// What to measure
        #[arg(long, value_enum, default_value = "all")]
        suite: bench::Suite,
        #[command(flatten)]
        emulator: EmulatorArgs,
    },
    /// Look for programs that can tell the engine from a processor
    ///
    /// Runs random programs on the engine over the model of a processor, and compares what L1 sees
    /// with the bare model. `--minutes N --seed S` says for how long, and which ones; a failure
    /// prints the program, made as small as it can be, and the command that runs it again
    /// (`--program SEED`). `fuzz --help` tells the rest.
    #[command(disable_help_flag = true)]
    Fuzz {
        /// What the fuzzer is told
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Write a bootable CD or USB image for a real machine
    ///
    /// Boots what `run` with the same arguments would boot: the demo under nvmx, if none.
    Iso(IsoArgs),
    /// Break the engine on purpose, in one way after another, and see that a test catches each
    ///
    /// Prints the mutations, what each breaks, and which property has caught it.
    Mutants {
        /// Only those whose names contain this
        only: Option<String>,
    },
    /// Check formatting, clippy and the documentation
    Lint,
    /// Run a program that ends when our caller does
    #[command(hide = true)]
    Guard {
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

/// What to boot.
#[derive(Debug, Args)]
struct BootArgs {
    /// The L1 to boot: a multiboot (version 1) kernel
    #[arg(long, value_name = "FILE")]
    l1: Option<PathBuf>,
    /// L1's command line, given to it exactly as written
    #[arg(
        long,
        value_name = "ARGS",
        requires = "l1",
        default_value = "",
        allow_hyphen_values = true
    )]
    cmdline: String,
    /// A module for L1, in order; text after the file's name and a space is the module's string
    #[arg(long = "module", value_name = "FILE", requires = "l1")]
    modules: Vec<String>,
    /// Boot L1 on the bare machine, without the hypervisor
    #[arg(long, requires = "l1", conflicts_with = "l0")]
    native: bool,
    /// The hypervisor's options, such as "vmfunc=emulated log=exits"
    #[arg(long, value_name = "OPTIONS", requires = "l1", default_value = "")]
    l0: String,
}

impl BootArgs {
    /// The boot that was asked for; `default_l1` where no L1 was named.
    fn boot(&self, workspace: &Workspace, default_l1: &str) -> Result<Boot> {
        let l1 = self.l1.clone().unwrap_or_else(|| workspace.image(default_l1));
        ensure_file(&l1)?;
        let modules: Vec<Module> = self.modules.iter().map(|text| Module::parse(text)).collect();
        for module in &modules {
            ensure_file(&module.file)?;
        }
        Ok(Boot {
            l0: (!self.native).then(|| L0 {
                image: workspace.image(images::HYPERVISOR),
                options: self.l0.clone(),
            }),
            l1: Some(l1),
            cmdline: self.cmdline.clone(),
            modules,
        })
    }
}

fn ensure_file(path: &Path) -> Result<()> {
    ensure!(path.is_file(), "no such file: {}", path.display());
    Ok(())
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    boot: BootArgs,
    #[command(flatten)]
    machine: MachineArgs,
    /// End well as soon as this regular expression matches on COM1; ^ and $ match at lines
    #[arg(long, value_name = "REGEX", requires = "l1")]
    until: Option<String>,
}

/// The emulated machine.
#[derive(Debug, Args)]
struct MachineArgs {
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u32).range(32..=4096))]
    mem: u32,
    /// Give up after so many seconds
    #[arg(long, value_name = "SECS", default_value_t = 300)]
    timeout: u64,
    #[command(flatten)]
    emulator: EmulatorArgs,
}

impl MachineArgs {
    fn machine(&self) -> Machine {
        Machine { cpus: self.cpus, mem_mib: self.mem }
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// The emulator.
#[derive(Debug, Args)]
struct EmulatorArgs {
    /// Another Bochs than the one on the path
    #[arg(long, value_name = "PATH")]
    bochs: Option<PathBuf>,
}

impl EmulatorArgs {
    fn prepare(&self) -> Result<Bochs> {
        prepare(self.bochs.as_deref())
    }
}

/// Sees to it that everything a run needs is there; `None` is the emulator on the path.
fn prepare(bochs: Option<&Path>) -> Result<Bochs> {
    packages::ensure_installed(if bochs.is_some() { Need::Image } else { Need::Emulator })?;
    Bochs::detect(bochs)
}

#[derive(Debug, Args)]
struct IsoArgs {
    #[command(flatten)]
    boot: BootArgs,
    /// The image to write
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match perform(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(cli: Cli) -> Result<ExitCode> {
    if let Task::Guard { command } = &cli.command {
        return guard::guard(command);
    }
    guard::end_with_signals()?;
    let workspace = Workspace::find()?;
    match &cli.command {
        Task::Guard { .. } => {}
        Task::Build => {
            images::build_all(&workspace)?;
            println!("images are in {}", workspace.images().display());
        }
        Task::Run(args) if args.boot.l1.is_some() => run_l1(&workspace, args)?,
        Task::Run(args) => run_demo(&workspace, &args.machine)?,
        Task::Test { emulator } => return suite::test(&workspace, emulator.bochs.as_deref()),
        Task::Bench { suite, emulator } => {
            let bochs = emulator.prepare()?;
            images::build_all(&workspace)?;
            bench::bench(&workspace, &bochs, *suite)?;
        }
        Task::Iso(args) => iso(&workspace, args)?,
        Task::Fuzz { arguments } => match fuzz::fuzz(&workspace, arguments)? {},
        Task::Mutants { only } => {
            mutants::mutants(&workspace, only.as_deref())?;
        }
        Task::Lint => lint::lint(&workspace)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Boots the demo, each way.
fn run_demo(workspace: &Workspace, args: &MachineArgs) -> Result<()> {
    let bochs = args.emulator.prepare()?;
    println!("building the images");
    images::build_all(workspace)?;
    demo::demo(workspace, &bochs, args.machine(), args.timeout())
}

/// Boots the L1 that the user named.
fn run_l1(workspace: &Workspace, args: &RunArgs) -> Result<()> {
    let until = match &args.until {
        Some(text) => Until::Appears(until_regex(text)?),
        None => Until::Verdict,
    };
    let bochs = args.machine.emulator.prepare()?;
    if !args.boot.native {
        images::build(workspace, images::L0)?;
    }
    let run = Run {
        name: if args.boot.native { "native" } else { "nvmx" },
        boot: args.boot.boot(workspace, images::DEMO)?,
        machine: args.machine.machine(),
        until,
        timeout: args.machine.timeout(),
        show: true,
    };
    run.make(workspace, &bochs)?.into_result()?;
    Ok(())
}

/// Writes the bootable image that the user asked for.
fn iso(workspace: &Workspace, args: &IsoArgs) -> Result<()> {
    packages::ensure_installed(Need::Image)?;
    images::build_all(workspace)?;
    let boot = args.boot.boot(workspace, images::DEMO)?;
    let config = boot.grub_config()?;
    let scratch = workspace.new_run("iso")?;
    boot.write_image(&config, &scratch, &args.out, None)
        .with_context(|| format!("cannot write {}", args.out.display()))?;
    println!("wrote {}", args.out.display());
    Ok(())
}
