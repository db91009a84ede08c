//! Emulated NVMe drives in a virtual machine: `cargo xtask guest`, and the suite `guest` of `cargo xtask test`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::exec::{run as run_child, step};
use crate::paths::{self, Scratch};
use crate::suites::LibtestReader;
use crate::tally::Outcome;
use crate::{exec, sweep};

/// Packages come over the network.
const SETUP_LIMIT: Duration = Duration::from_secs(10 * 60);
const LIMIT: Duration = Duration::from_secs(25 * 60);

/// Arguments of `cargo xtask guest`.
#[derive(clap::Args)]
pub struct Args {
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// How often a machine is killed during its writes.
    #[arg(long, value_name = "N", default_value_t = 3)]
    kills: u32,
    /// Seed of the writes and of the cuts of the power.
    #[arg(long)]
    seed: Option<u64>,
}

/// `cargo xtask guest`; `Ok(false)` when a case failed.
pub fn run(args: &Args) -> Result<bool> {
    sweep::abandoned()?;
    let scratch = Scratch::create()?;
    exec::on_interrupt(scratch.path())?;
    let logs = paths::target().join("test-logs");
    std::fs::create_dir_all(&logs)?;
    let log = logs.join("guest.log");
    let _ = std::fs::remove_file(&log);
    let nvtier = paths::target().join("debug/nvtier");
    let mut build = Command::new("cargo");
    build.args(["build", "--package", "nvtier", "--bins"]);
    step(build, &log, LIMIT)?;
    let mut variables = vec![("NVTIER_GUEST_KILLS", args.kills.to_string())];
    variables.extend(args.seed.map(|seed| ("NVTIER_SEED", seed.to_string())));
    let started = Instant::now();
    let outcome = checks(scratch.path(), &nvtier, args.filter.as_deref(), &variables, &log, &mut |line| {
        println!("{line}");
    })?;
    for skip in &outcome.skips {
        println!("skipped: {skip}");
    }
    for failure in &outcome.failures {
        println!("FAILED: {failure}");
    }
    println!(
        "{} ({} s); the whole output is in {}",
        outcome.tally,
        started.elapsed().as_secs(),
        log.display()
    );
    Ok(outcome.tally.failed == 0)
}

/// Prepares the emulator, builds the programs for the guest, and runs the checks in it. Where the emulator cannot be had, one
/// skipped case says why.
pub fn checks(
    scratch: &Path,
    nvtier: &Path,
    filter: Option<&str>,
    variables: &[(&str, String)],
    log: &Path,
    on_line: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    let script = paths::workspace().join("tests/guest/run.sh");
    let cache = paths::cache()?;
    let (mut setup, mut last) = (Command::new(&script), String::new());
    setup.arg("--setup").env("NVTIER_CACHE", &cache);
    let ended = run_child(setup, log, SETUP_LIMIT, |line| line.clone_into(&mut last))?;
    if !ended.success() {
        let why = last.trim_start_matches("guest: ");
        return Ok(Outcome::skipped(format!(
            "guest: no virtual machine with NVMe drives here: {why} ({})",
            ended.describe(SETUP_LIMIT)
        )));
    }
    on_line(&last);
    let (check, tests, example) = build(log)?;
    let mut command = Command::new(&check);
    command.arg("host").arg(&script).arg(scratch).arg(&tests).arg(nvtier).arg(&example);
    command.env("NVTIER_CACHE", &cache).env_remove("NVTIER_FILTER");
    command.envs(filter.map(|filter| ("NVTIER_FILTER", filter)));
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    let mut reader = LibtestReader::default();
    let ended = run_child(command, log, LIMIT, |line| {
        reader.line(line);
        on_line(line);
    })?;
    let mut outcome = reader.finish();
    if !ended.success() && outcome.tally.failed == 0 {
        outcome.fail(format!("guest: {}", ended.describe(LIMIT)));
    }
    Ok(outcome)
}

/// The program with the checks, tests that run on its drives, too, and the example that is one of them.
fn build(log: &Path) -> Result<(PathBuf, PathBuf, PathBuf)> {
    let mut check = Command::new("cargo");
    check.args(["build", "--package", "nvtier-guest"]);
    step(check, log, LIMIT)?;
    let mut example = Command::new("cargo");
    example.args(["build", "--package", "nvtier-nvme", "--example", "passthrough"]);
    step(example, log, LIMIT)?;
    let mut tests = Command::new("cargo");
    tests.args(["test", "--package", "nvtier-tests", "--test", "disk_layouts", "--no-run"]);
    tests.arg("--message-format=json-render-diagnostics");
    // The name of a test program has a hash in it, which only cargo knows.
    let mut program = None;
    let ended = run_child(tests, log, LIMIT, |line| program = program.take().or_else(|| executable(line)))?;
    let program = program.filter(|_| ended.success()).context("the tests of layouts were not built")?;
    let debug = paths::target().join("debug");
    Ok((debug.join("nvtier-guest-check"), program, debug.join("examples/passthrough")))
}

/// The tests of layouts, where it is their program that a message of cargo tells of.
fn executable(line: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let program = message["executable"].as_str().filter(|_| message["target"]["name"] == "disk_layouts");
    program.map(PathBuf::from)
}
