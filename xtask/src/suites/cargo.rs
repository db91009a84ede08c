//! Suites that plain `cargo test` runs, and how its output is read.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Shared;
use crate::exec::{self, run};
use crate::pyenv::PyEnv;
use crate::tally::{Outcome, Tally};

const LIMIT: Duration = Duration::from_secs(40 * 60);

/// Environment variables by which tests find what the harness prepared. `tests/src/lib.rs` and
/// `tests/python/conftest.py` read them.
pub fn environment(command: &mut Command, shared: &Shared, python: Option<&PyEnv>) -> Result<()> {
    command
        .env("NVTIER_BIN", &shared.nvtier)
        .env("NVTIER_SCRATCH", shared.folder("tests")?)
        // Temporary folders of any test lie where the sweep looks for what it left.
        .env("TMPDIR", shared.folder("tmp")?)
        .env("RUST_BACKTRACE", "1");
    if let Some(python) = python {
        command.env("NVTIER_PYTHON", &python.python).env("NVTIER_MODEL", &python.model);
        // Tests that call plain `python3` get the one with numpy.
        let mut path = python.python.parent().context("folder of the interpreter")?.as_os_str().to_owned();
        if let Some(old) = std::env::var_os("PATH") {
            path.push(":");
            path.push(old);
        }
        command.env("PATH", path);
    }
    Ok(())
}

/// Builds the command and, with `tests`, all test programs, so that time limits of tests are not spent on compiling.
pub fn build(shared: &Shared, tests: bool) -> Result<()> {
    let mut bin = Command::new("cargo");
    bin.args(["build", "--package", "nvtier", "--bins"]);
    exec::step(bin, &shared.log("build"), LIMIT)?;
    if !tests {
        return Ok(());
    }
    let mut tests = Command::new("cargo");
    tests.args(["test", "--workspace", "--no-run"]);
    exec::step(tests, &shared.log("build"), LIMIT)
}

/// Every crate but the system tests: unit, integration and documentation tests.
pub fn crates(shared: &Shared, python: Option<&PyEnv>) -> Result<Outcome> {
    cargo_test(shared, "crates", &["--workspace", "--exclude", "nvtier-tests"], python)
}

/// The workspace member `nvtier-tests`: the command and the mount as a whole.
pub fn system(shared: &Shared, python: Option<&PyEnv>) -> Result<Outcome> {
    let all = ["--package", "nvtier-tests"];
    let Some(reason) = &shared.no_fuse else { return cargo_test(shared, "system", &all, python) };
    let mut outcome = cargo_test(shared, "system", &[&all[..], &["--test", "bad_pools"]].concat(), python)?;
    outcome.skip(format!("all system tests but bad_pools: {reason}"));
    Ok(outcome)
}

fn cargo_test(shared: &Shared, name: &str, packages: &[&str], python: Option<&PyEnv>) -> Result<Outcome> {
    let mut command = Command::new("cargo");
    command.arg("test").args(packages).arg("--no-fail-fast");
    if let Some(filter) = &shared.filter {
        command.arg(filter);
    }
    // Shows the lines by which a passing test says that it skipped.
    command.args(["--", "--show-output"]);
    environment(&mut command, shared, python)?;
    if shared.quick {
        command.env("NVTIER_QUICK", "1");
    }
    let mut reader = LibtestReader::default();
    let ended = run(command, &shared.log(name), LIMIT, |line| reader.line(line))?;
    let mut outcome = reader.finish();
    if !ended.success() && outcome.tally.failed == 0 {
        outcome
            .fail(format!("{name}: cargo test ended badly without naming a test: {}", ended.describe(LIMIT)));
    }
    Ok(outcome)
}

/// Reads the output of libtest programs.
#[derive(Default)]
pub struct LibtestReader {
    outcome: Outcome,
    /// Test program that is running, for messages.
    program: String,
    /// Test whose captured output is being shown.
    shown: String,
    /// A test program has started and not yet given its result line.
    open: bool,
    skipped_at_run_time: u64,
}

impl LibtestReader {
    /// Takes one line.
    pub fn line(&mut self, line: &str) {
        let text = line.trim();
        if let Some(program) = text.strip_prefix("Running ").or_else(|| text.strip_prefix("Doc-tests ")) {
            self.crashed();
            self.program = program.split(" (").next().unwrap_or(program).to_owned();
            self.open = true;
        } else if let Some(name) = text.strip_prefix("---- ").and_then(|t| t.strip_suffix(" stdout ----")) {
            self.shown = name.to_owned();
        } else if let Some(result) = text.strip_prefix("test result: ") {
            self.outcome.tally += counts(result);
            self.open = false;
        } else if let Some((name, ignored)) =
            text.strip_prefix("test ").and_then(|t| t.split_once(" ... ignored"))
        {
            let why = ignored.trim_start_matches([',', ' ']);
            self.outcome.skips.push(format!("{name}: {}", if why.is_empty() { "ignored" } else { why }));
        } else if let Some(name) = text.strip_prefix("test ").and_then(|t| t.strip_suffix(" ... FAILED")) {
            self.outcome.failures.push(format!("{name} ({})", self.program));
        } else if let Some(reason) = skip_reason(text) {
            // libtest knows no skipping at run time: such a test has passed in its eyes.
            self.skipped_at_run_time += 1;
            self.outcome.skip(format!("{}: {reason}", self.shown));
        }
    }

    /// Counts a test program that ended without a result line.
    fn crashed(&mut self) {
        if std::mem::take(&mut self.open) {
            self.outcome.fail(format!("{} ended without a result (crashed?)", self.program));
        }
    }

    /// The sums.
    pub fn finish(mut self) -> Outcome {
        self.crashed();
        self.outcome.tally.passed = self.outcome.tally.passed.saturating_sub(self.skipped_at_run_time);
        self.outcome
    }
}

/// A test that cannot run here prints one line `skipped: REASON`.
pub fn skip_reason(line: &str) -> Option<&str> {
    let word = line.get(..8)?;
    word.eq_ignore_ascii_case("skipped:").then(|| line[8..].trim())
}

/// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s`
fn counts(result: &str) -> Tally {
    let mut tally = Tally::default();
    for part in result.split([';', '.']) {
        let mut words = part.split_whitespace();
        if let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse), words.next()) {
            match what {
                "passed" => tally.passed = count,
                "failed" => tally.failed = count,
                "ignored" => tally.skipped = count,
                _ => {}
            }
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Outcome {
        let mut reader = LibtestReader::default();
        text.lines().for_each(|line| reader.line(line));
        reader.finish()
    }

    #[test]
    fn sums_failures_and_run_time_skips() {
        let outcome = read(
            "\
     Running unittests src/lib.rs (target/debug/deps/engine-1)
test pool::a ... ok
test pool::b ... ok
test pool::c ... FAILED
test pool::d ... ignored, needs an NVMe drive

successes:

---- pool::b stdout ----
skipped: no fusermount3 here

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s
   Doc-tests engine
test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.10s
",
        );
        assert_eq!(outcome.tally, Tally { passed: 6, failed: 1, skipped: 2 });
        assert_eq!(outcome.failures, ["pool::c (unittests src/lib.rs)"]);
        assert_eq!(outcome.skips, ["pool::d: needs an NVMe drive", "pool::b: no fusermount3 here"]);
    }

    #[test]
    fn a_crashed_program_is_a_failure() {
        let outcome = read(
            "     Running tests/a.rs (x)\ntest one ... ok\n     Running tests/b.rs (y)\n\
                            test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        assert_eq!(outcome.tally, Tally { passed: 1, failed: 1, skipped: 0 });
    }
}
