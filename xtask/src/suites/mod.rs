//! `cargo xtask test`: all suites, what they need, and the sum of their results.

mod bindings;
mod cargo;
mod frameworks;
mod guest;
mod posix;
mod pytest;
mod user;
mod vllm;

pub use cargo::LibtestReader;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::paths::{self, Scratch};
use crate::pyenv::{self, PyEnv};
use crate::tally::{Outcome, Tally};
use crate::{exec, external, sweep};

/// Options of `cargo xtask test`.
#[derive(Args, Default)]
pub struct TestArgs {
    /// Fewer operations in the long suites and no large models; a few minutes instead of twenty.
    #[arg(long)]
    quick: bool,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Run the remaining suites after one has failed.
    #[arg(long)]
    keep_going: bool,
    /// Only these suites (repeat or separate by commas).
    #[arg(long, value_enum, value_delimiter = ',')]
    suite: Vec<Suite>,
}

/// Parts of the run, in order.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
enum Suite {
    /// Unit, integration and documentation tests of every crate.
    Crates,
    /// The command and the mount as a whole: kill, signals, bad input, memory.
    System,
    /// The tests of the lower crates and the command as an ordinary user.
    User,
    /// The Python package.
    Bindings,
    /// transformers, torch, numpy, llama.cpp, coreutils, fio, git on a mount.
    Frameworks,
    /// pjdfstest and fsx.
    Posix,
    /// Emulated NVMe drives in a virtual machine: the kernel's driver, passthrough, faults, crashes.
    Guest,
    /// vLLM and LMCache over nvtier's KV stores, and models that vLLM runs. Only where it is asked for: these packages are 1.7 GB.
    Vllm,
}

/// What the suites share.
pub struct Shared {
    quick: bool,
    filter: Option<String>,
    scratch: PathBuf,
    logs: PathBuf,
    nvtier: PathBuf,
    /// Why nothing can be mounted on this machine.
    no_fuse: Option<String>,
}

impl Shared {
    /// Log file of a suite.
    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// A folder of its own for a suite, removed with the run's scratch folder.
    fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }
}

/// Console output and sums, from several threads.
struct Report {
    verbose_skips: bool,
    tally: Mutex<Tally>,
}

impl Report {
    fn suite(&self, name: &str, started: Instant, outcome: &Outcome, log: &Path) {
        let mut tally = self.tally.lock().expect("no panic holds this lock");
        for skip in outcome.skips.iter().filter(|_| self.verbose_skips) {
            println!("  skipped: {skip}");
        }
        for failure in &outcome.failures {
            println!("  FAILED: {failure}");
        }
        println!("{name}: {} ({} s)", outcome.tally, started.elapsed().as_secs());
        if outcome.tally.failed > 0 {
            println!("  the whole output is in {}", log.display());
        }
        *tally += outcome.tally;
    }

    fn failed(&self) -> bool {
        self.tally.lock().expect("no panic holds this lock").failed > 0
    }
}

/// Prepares the Python environment, the model and the POSIX suites.
pub fn setup() -> Result<bool> {
    let logs = log_folder()?;
    let log = logs.join("setup.log");
    let python = pyenv::ensure(&log)?;
    println!("Python: {}\nmodel: {}", python.python.display(), python.model.display());
    for path in posix::programs(&log)? {
        println!("program: {}", path.display());
    }
    Ok(true)
}

/// Runs the suites; `Ok(false)` when a case failed.
pub fn run(args: &TestArgs) -> Result<bool> {
    sweep::abandoned()?;
    let scratch = Scratch::create()?;
    exec::on_interrupt(scratch.path())?;
    let shared = Shared {
        quick: args.quick,
        filter: args.filter.clone(),
        scratch: scratch.path().to_path_buf(),
        logs: log_folder()?,
        nvtier: std::env::var_os("NVTIER_BIN")
            .map_or_else(|| paths::target().join("debug/nvtier"), PathBuf::from),
        no_fuse: no_fuse(),
    };
    let report = Report { verbose_skips: true, tally: Mutex::default() };
    let wanted = |suite| args.suite.is_empty() || args.suite.contains(&suite);
    let stop = || report.failed() && !args.keep_going;

    thread::scope(|scope| -> Result<()> {
        // Downloads and builds of the outer tools overlap with the build and tests of the crates.
        let needs_python =
            args.suite.iter().any(|suite| !matches!(suite, Suite::User | Suite::Posix | Suite::Guest))
                || args.suite.is_empty();
        let python = scope.spawn({
            let log = shared.log("setup-python");
            move || if needs_python { Some(pyenv::ensure(&log)) } else { None }
        });
        let programs = scope.spawn({
            let log = shared.log("setup-programs");
            let posix = wanted(Suite::Posix);
            move || {
                let missing = optional_programs(&log);
                (missing, posix.then(|| posix::programs(&log)))
            }
        });

        let rust_tests = [Suite::Crates, Suite::System, Suite::User].into_iter().any(wanted);
        cargo::build(&shared, rust_tests)?;
        let python = python.join().expect("setup thread");
        if let Some(Err(error)) = &python {
            println!("  no Python environment: {error:#}");
        }
        let python: Option<Result<PyEnv, String>> = python.map(|p| p.map_err(|e| format!("{e:#}")));
        let env = python.as_ref().and_then(|p| p.as_ref().ok());
        if wanted(Suite::Crates) {
            timed(&report, &shared, "crates", || cargo::crates(&shared, env));
        }
        let (missing, posix_programs) = programs.join().expect("setup thread");
        for reason in missing {
            println!("  note: {reason}");
        }
        if stop() {
            return Ok(());
        }

        // The POSIX suites mostly wait for the kernel; the rest runs beside them.
        let posix = posix_programs.map(|programs| {
            let (report, shared) = (&report, &shared);
            scope.spawn(move || timed(report, shared, "posix", || posix::run(shared, programs)))
        });
        if wanted(Suite::System) && !stop() {
            timed(&report, &shared, "system", || cargo::system(&shared, env));
        }
        if wanted(Suite::User) && !stop() {
            timed(&report, &shared, "user", || user::run(&shared));
        }
        if wanted(Suite::Bindings) && !stop() {
            timed(&report, &shared, "bindings", || bindings::run(&shared, python.as_ref()));
        }
        if wanted(Suite::Frameworks) && !stop() {
            timed(&report, &shared, "frameworks", || frameworks::run(&shared, python.as_ref()));
        }
        if wanted(Suite::Guest) && !stop() {
            timed(&report, &shared, "guest", || guest::run(&shared));
        }
        if wanted(Suite::Vllm) && !stop() {
            timed(&report, &shared, "vllm", || match args.suite.contains(&Suite::Vllm) {
                true => vllm::run(&shared, python.as_ref()),
                false => Ok(Outcome::skipped(vllm::NOT_BY_DEFAULT)),
            });
        }
        if let Some(posix) = posix {
            posix.join().expect("posix suite");
        }
        Ok(())
    })?;

    let left = sweep::directory(scratch.path());
    for what in &left {
        println!("  note: a test left behind: {what}");
    }
    drop(scratch);
    let tally = *report.tally.lock().expect("no panic holds this lock");
    println!("{tally}");
    Ok(tally.failed == 0)
}

/// Runs one suite and reports it; an error of the suite itself is a failure.
fn timed(report: &Report, shared: &Shared, name: &str, suite: impl FnOnce() -> Result<Outcome>) {
    println!("{name} ...");
    let started = Instant::now();
    let outcome = suite().unwrap_or_else(|error| Outcome::broken(format!("{name}: {error:#}")));
    report.suite(name, started, &outcome, &shared.log(name));
}

/// Why this process cannot mount, if it cannot.
fn no_fuse() -> Option<String> {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .err()
        .map(|error| format!("nothing can be mounted here: /dev/fuse: {error}"))
}

/// Programs that some cases use and skip without.
fn optional_programs(log: &Path) -> Vec<String> {
    [
        ("fio", "fio"),
        ("rsync", "rsync"),
        ("git", "git"),
        ("fusermount3", "fuse3"),
        ("setpriv", "util-linux"),
        ("tmux", "tmux"),
    ]
    .into_iter()
    .filter_map(|(program, package)| {
        external::program(program, package, log).err().map(|e| format!("no {program}: {e:#}"))
    })
    .collect()
}

fn log_folder() -> Result<PathBuf> {
    let logs = paths::target().join("test-logs");
    let _ = fs::remove_dir_all(&logs);
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    Ok(logs)
}
