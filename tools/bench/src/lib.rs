//! `nvtier bench`: a benchmark that speaks fio's language.
//!
//! Options are data (`options`), a command line or job file becomes jobs (`parse`, `settings`), jobs become workers
//! (`runner`), a worker drives one engine (`worker`, `io`), and what it measured becomes fio's reports (`report`) and one
//! line on which ceiling bound (`ceiling`). docs/bench.md is the user's page.
#![forbid(unsafe_code)]

mod calendar;
mod ceiling;
mod data;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod help;
mod io;
mod layout;
mod offsets;
mod options;
mod pace;
mod parse;
mod profile;
mod report;
mod runner;
mod settings;
mod stats;
mod sys;
mod units;
mod work;
mod worker;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::ceiling::Evidence;
use crate::error::{Error, Result};
use crate::parse::{CeilingSource, Command, Eta, Format, Request};
use crate::report::Verdict;
use crate::runner::{Observer, RunReport, WorkerReport};

pub use crate::help::clap_command;

/// Version of this crate.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the reports put where fio puts its version: the release whose shapes they follow, so that fio's scripts,
/// some of which look for `fio-`, read them.
pub const FIO_VERSION: &str = "fio-3.33";

fn banner() -> String {
    format!("nvtier bench {VERSION} in fio's format")
}

/// Runs the benchmark on `args` (everything after `nvtier bench`) and says how it went.
///
/// Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 pool owned by another process, 5 bad data found, 6 no space,
/// 7 not supported here, 130 interrupted (after the report of what was measured until then).
pub fn run(args: Vec<OsString>) -> ExitCode {
    ExitCode::from(run_code(&args))
}

/// As [`run`], with the exit code as a number.
pub fn run_code(args: &[OsString]) -> u8 {
    let request = match parse::parse(args) {
        Ok(Command::Run(request)) => request,
        Ok(Command::Print(text)) => {
            print!("{text}");
            return 0;
        }
        Err(why) => {
            eprintln!("nvtier bench: {why}");
            return 2;
        }
    };
    match execute(&request) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nvtier bench: {error}");
            error.exit_code()
        }
    }
}

fn execute(request: &Request) -> Result<u8> {
    if request.parse_only {
        return Ok(0);
    }
    let mut out: Box<dyn Write> = match &request.output {
        Some(path) => Box::new(
            std::fs::File::create(path)
                .map_err(|error| Error::io(format!("cannot create {}", path.display()), error))?,
        ),
        None => Box::new(std::io::stdout()),
    };
    let normal = request.formats.contains(&Format::Normal);
    let mut write = |text: &str| {
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|error| Error::io("cannot write the report", error))
    };
    if normal {
        write(&report::starting(&request.jobs))?;
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // A second signal ends the process at once: whoever insists is obeyed.
        signal_hook::flag::register_conditional_default(signal, interrupted.clone())
            .and_then(|_| signal_hook::flag::register(signal, interrupted.clone()))
            .map_err(|error| Error::io("cannot catch signals", error))?;
    }
    let shown = match request.eta {
        Eta::Always => true,
        Eta::Never => false,
        Eta::Auto => normal && std::io::stderr().is_terminal(),
    };
    let mut observer = Terminal { shown, dirty: false };
    let result = runner::run(&request.jobs, &interrupted, &mut observer);
    observer.clear();
    let run = result?;
    for note in &run.notes {
        eprintln!("nvtier bench: {note}");
    }
    let entries = report::entries(&run);
    let disks = report::disks(&run);
    let verdicts = verdicts(request.ceiling, &run);
    for format in &request.formats {
        let text = match format {
            Format::Normal => report::normal(&entries, &disks, &verdicts),
            Format::Terse => report::terse(&entries, &disks),
            Format::Json { plus } => {
                let value = report::json(&entries, &request.global, &disks, &verdicts, *plus);
                format!("{value:#}\n")
            }
        };
        write(&text)?;
    }
    let failed = run.workers.iter().filter_map(|worker| worker.outcome.error.as_ref()).next();
    if let Some(error) = failed {
        if !normal {
            eprintln!("nvtier bench: {error}");
        }
        return Ok(error.exit_code());
    }
    Ok(if run.interrupted { 130 } else { 0 })
}

/// What bound each group.
fn verdicts(source: CeilingSource, run: &RunReport) -> Vec<Verdict> {
    let mut groups: Vec<u32> = run.workers.iter().map(|worker| worker.group).collect();
    groups.dedup();
    let mut verdicts = Vec::new();
    for group in groups {
        let workers: Vec<&WorkerReport> = run.workers.iter().filter(|worker| worker.group == group).collect();
        let Some(phase) = run.phases.iter().find(|phase| (phase.groups.0..=phase.groups.1).contains(&group))
        else {
            continue;
        };
        let settings = &workers[0].settings;
        let moved: u64 = workers.iter().flat_map(|worker| &worker.outcome.directions).map(|d| d.bytes).sum();
        // Nothing to explain, or nobody waits for it any more.
        let source = if moved == 0 || run.interrupted { CeilingSource::Off } else { source };
        let target = workers[0].calibration_path();
        let ceiling = ceiling::find(source, settings, target.as_deref(), workers[0].span);
        let mut evidence = Evidence::of(&workers, phase, ceiling);
        evidence.copies = ceiling::find_copies(source, settings);
        if matches!(source, CeilingSource::Measure)
            && let Some(saved) =
                workers[0].place().and_then(|path| doctor::ceilings::Store::of_user().get(path))
        {
            evidence.complete(settings.engine, &saved);
        }
        let (bound, text) = evidence.verdict();
        verdicts.push(Verdict {
            group,
            bound,
            text,
            ceiling: evidence.ceiling.as_ref().map(|ceiling| ceiling.bandwidth),
            in_flight: evidence.in_flight(),
            cpu_s_per_gb: phase.process_cpu_ns as f64 / moved.max(1) as f64,
        });
    }
    verdicts
}

impl WorkerReport {
    /// What it read or wrote lies there.
    fn place(&self) -> Option<&Path> {
        match &self.settings.pool {
            Some(pool) if self.settings.engine == settings::EngineKind::Pool => Some(pool),
            _ => self.paths.first().map(PathBuf::as_path),
        }
    }

    /// A file on the drive that the bytes came from, for the sweep that finds the drive's ceiling.
    fn calibration_path(&self) -> Option<PathBuf> {
        match &self.pool_file {
            Some(path) => Some(path.clone()),
            None if self.settings.engine == settings::EngineKind::Pool => None,
            None => self.paths.first().filter(|path| path.exists()).map(|path| Path::to_path_buf(path)),
        }
    }
}

/// Progress on standard error.
struct Terminal {
    shown: bool,
    dirty: bool,
}

impl Terminal {
    fn clear(&mut self) {
        if std::mem::take(&mut self.dirty) {
            eprint!("\r\x1b[K");
        }
    }
}

impl Observer for Terminal {
    fn note(&mut self, line: &str) {
        self.clear();
        eprintln!("{line}");
    }

    fn progress(
        &mut self,
        elapsed: Duration,
        bytes: [u64; 2],
        ios: [u64; 2],
        planned: Option<u64>,
        jobs: usize,
    ) {
        if !self.shown {
            return;
        }
        let seconds = elapsed.as_secs_f64();
        let done = bytes[0] + bytes[1];
        let share = match planned {
            Some(planned) if planned > 0 => {
                let share = (done as f64 / planned as f64).min(1.0);
                let left = if share > 0.0 { seconds / share - seconds } else { 0.0 };
                format!("[{:.1}%][eta {left:.0}s]", 100.0 * share)
            }
            _ => format!("[{seconds:.0}s]"),
        };
        let rates: Vec<String> = ["r", "w"]
            .iter()
            .enumerate()
            .filter(|(d, _)| ios[*d] > 0)
            .map(|(d, name)| {
                let (bw, iops) = (bytes[d] as f64 / seconds, ios[d] as f64 / seconds);
                format!("[{name}={}/s, {} IOPS]", units::binary(bw), units::count(iops))
            })
            .collect();
        eprint!("\r\x1b[KJobs: {jobs} {share}{}", rates.concat());
        let _ = std::io::stderr().flush();
        self.dirty = true;
    }
}
