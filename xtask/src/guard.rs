//! Who ends Bochs when xtask is gone? A guard process between the two.
//!
//! xtask may die in ways that run none of its code (SIGKILL, an abort). So it never starts Bochs
//! itself: it starts this same program as `xtask guard`, leader of a process group of its own, with
//! a pipe as its standard input. Only xtask holds the pipe's other end; when that closes, for
//! whatever reason, the guard kills its whole group, Bochs and itself included.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result};
use nix::{
    sys::{
        prctl,
        signal::{Signal, killpg},
    },
    unistd::{Pid, getpid, getppid},
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

/// The groups that live at this moment, for the signal handler.
static LIVE: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// A running program that cannot outlive xtask.
#[derive(Debug)]
pub(crate) struct Guarded {
    guard: Child,
    group: Pid,
}

impl Guarded {
    /// Starts `program` in `folder` under a guard, its output going to `output` there.
    pub(crate) fn start(
        program: &Path,
        arguments: &[OsString],
        folder: &Path,
        output: &str,
    ) -> Result<Self> {
        let log = File::create(folder.join(output))
            .with_context(|| format!("cannot make {output} in {}", folder.display()))?;
        // Our own file, even if a rebuild has meanwhile replaced it under its name.
        let guard = Command::new("/proc/self/exe")
            .arg0("xtask")
            .args(["guard", "--"])
            .arg(program)
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start the guard process")?;
        let group = Pid::from_raw(guard.id().cast_signed());
        live().push(group);
        Ok(Self { guard, group })
    }

    /// The program's end, if it has ended.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.guard.try_wait().context("cannot ask for the guard's state")
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // The guard is still our unreaped child, so its group's number can't belong to others.
        if matches!(self.guard.try_wait(), Ok(None)) {
            let _ = killpg(self.group, Signal::SIGKILL);
            let _ = self.guard.wait();
        }
        live().retain(|group| *group != self.group);
    }
}

fn live() -> std::sync::MutexGuard<'static, Vec<Pid>> {
    // The list is whole after each single operation, so a panic elsewhere did not break it.
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes Ctrl-C, SIGTERM and SIGHUP end everything at once and with the usual exit status.
///
/// The guards alone would do it too, a moment later.
pub(crate) fn end_with_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot catch signals")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            for group in live().iter() {
                let _ = killpg(*group, Signal::SIGKILL);
            }
            eprintln!("xtask: ended by signal {signal}; nothing is left running");
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// The guard's own main function: runs the command, ends with its status or with our caller.
pub(crate) fn guard(command: &[OsString]) -> Result<ExitCode> {
    let (program, arguments) = command.split_first().context("no program to guard")?;
    thread::spawn(|| {
        // Nothing is ever written: the read returns when the other end is closed.
        let _ = io::stdin().read(&mut [0; 1]);
        let _ = killpg(Pid::from_raw(0), Signal::SIGKILL);
    });
    let mut child = Command::new(program);
    child.args(arguments).stdin(Stdio::null());
    let guard = getpid();
    // SAFETY: the closure runs in the forked child before its exec, where only calls that are safe
    // after a fork are allowed: prctl and getppid are plain system calls, and the closure neither
    // allocates nor takes locks (`io::Error::from_raw_os_error` stores a number).
    unsafe {
        child.pre_exec(move || {
            // Should the guard alone be killed, its program goes with it. The signal is tied to
            // the thread that forks: the guard's main thread, which does nothing but wait.
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != guard {
                return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
            }
            Ok(())
        });
    }
    let status =
        child.status().with_context(|| format!("cannot run {}", program.to_string_lossy()))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
