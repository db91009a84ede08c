//! Running pytest and reading its summary.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Shared, cargo};
use crate::exec::run;
use crate::pyenv::PyEnv;
use crate::tally::Outcome;

/// Runs pytest on `tests` with the environment that the harness prepared, and packages from the folders of `site` before its own.
pub fn pytest(
    shared: &Shared,
    name: &str,
    python: &PyEnv,
    tests: &Path,
    site: &[&Path],
    limit: Duration,
) -> Result<Outcome> {
    pytest_files(shared, name, python, &[tests], site, limit)
}

/// As [`pytest`], on several files.
pub fn pytest_files(
    shared: &Shared,
    name: &str,
    python: &PyEnv,
    tests: &[&Path],
    site: &[&Path],
    limit: Duration,
) -> Result<Outcome> {
    let mut command = Command::new(&python.python);
    command
        .args(["-m", "pytest", "-p", "no:cacheprovider", "-rsfE", "--color=no", "--tb=short", "-q"])
        // A test's pools go with it, unless it failed: of all tests they are 20 GB.
        .args(["-o", "tmp_path_retention_policy=failed"])
        .arg("--basetemp")
        .arg(shared.folder("pytest")?.join(name))
        .args(tests)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env("NVTIER_SUITE", name);
    if !site.is_empty() {
        command.env("PYTHONPATH", std::env::join_paths(site).context("a path with a colon")?);
    }
    if let Some(filter) = &shared.filter {
        command.args(["-k", filter]);
    }
    if shared.quick {
        command.env("NVTIER_QUICK", "1");
    }
    cargo::environment(&mut command, shared, Some(python))?;
    let mut outcome = Outcome::default();
    let mut summary = false;
    let ended = run(command, &shared.log(name), limit, |line| summary |= read(&mut outcome, line))?;
    // 5: no test collected, which a filter makes normal.
    let empty = ended.status.code() == Some(5) && shared.filter.is_some();
    if !empty && !summary {
        outcome.fail(format!("{name}: pytest gave no summary: {}", ended.describe(limit)));
    }
    Ok(outcome)
}

/// Takes one line of output; true for the last one, which has the sums.
fn read(outcome: &mut Outcome, line: &str) -> bool {
    if let Some(rest) = line.strip_prefix("SKIPPED [") {
        outcome.skips.push(rest.split_once("] ").map_or(rest, |(_, why)| why).to_owned());
    } else if let Some(rest) = line.strip_prefix("FAILED ").or_else(|| line.strip_prefix("ERROR ")) {
        if rest.contains("::") || rest.contains(".py") {
            outcome.failures.push(rest.to_owned());
        }
    } else if line.contains(" in ") && line.trim_matches('=').trim().ends_with(['s', ')']) {
        return sums(outcome, line.trim_matches('=').trim());
    }
    false
}

/// `1 failed, 20 passed, 2 skipped, 1 error in 3.21s`
fn sums(outcome: &mut Outcome, line: &str) -> bool {
    let Some((counts, _)) = line.split_once(" in ") else { return false };
    let mut any = false;
    for part in counts.split(", ") {
        let Some((Ok(count), what)) = part.split_once(' ').map(|(n, what)| (n.parse::<u64>(), what)) else {
            return any;
        };
        match what {
            "passed" | "xpassed" => outcome.tally.passed += count,
            "failed" | "error" | "errors" => outcome.tally.failed += count,
            "skipped" | "xfailed" => outcome.tally.skipped += count,
            "deselected" | "warning" | "warnings" => {}
            _ => return any,
        }
        any = true;
    }
    any
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::Tally;

    #[test]
    fn summary_of_pytest() {
        let mut outcome = Outcome::default();
        let lines = [
            "..F..s                                                                   [100%]",
            "SKIPPED [1] tests/python/test_a.py:3: no fio here",
            "FAILED tests/python/test_a.py::test_b[raw] - AssertionError: 1 != 2",
            "1 failed, 4 passed, 1 skipped, 2 warnings in 63.21s (0:01:03)",
        ];
        let last: Vec<_> = lines.iter().map(|line| read(&mut outcome, line)).collect();
        assert_eq!(last, [false, false, false, true]);
        assert_eq!(outcome.tally, Tally { passed: 4, failed: 1, skipped: 1 });
        assert_eq!(outcome.skips, ["tests/python/test_a.py:3: no fio here"]);
        assert_eq!(outcome.failures.len(), 1);
    }
}
