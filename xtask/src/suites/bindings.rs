//! The Python package: its wheel is built, installed into a folder of this run and tested.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Shared, pytest};
use crate::exec::step;
use crate::paths;
use crate::pyenv::PyEnv;
use crate::tally::Outcome;

const LIMIT: Duration = Duration::from_secs(40 * 60);

/// Runs the suite, or says why it cannot.
pub fn run(shared: &Shared, python: Option<&Result<PyEnv, String>>) -> Result<Outcome> {
    let python = match python {
        Some(Ok(python)) => python,
        Some(Err(reason)) => {
            return Ok(Outcome::skipped(format!("bindings: no Python environment: {reason}")));
        }
        None => return Ok(Outcome::default()),
    };
    let log = shared.log("bindings");
    let site = site(shared, python, &log)?;
    let tests = paths::workspace().join("bindings/python/tests");
    pytest::pytest(shared, "bindings", python, &tests, &[&site], LIMIT)
}

/// Builds the wheel and installs it into a folder of this run.
pub fn site(shared: &Shared, python: &PyEnv, log: &Path) -> Result<PathBuf> {
    let package = paths::workspace().join("bindings/python");
    let wheels = shared.folder("wheels")?;
    let mut build = Command::new(&python.python);
    build
        .args(["-m", "maturin", "build", "--profile", "dev", "--out"])
        .arg(&wheels)
        .arg("--interpreter")
        .arg(&python.python)
        .current_dir(&package);
    step(build, log, LIMIT).context("maturin build")?;
    let wheel = fs::read_dir(&wheels)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("maturin left no wheel")?;
    let site = shared.folder("site")?;
    let mut install = Command::new(&python.python);
    install
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"])
        .arg(&site)
        .arg(&wheel);
    step(install, log, LIMIT).context("pip install of the wheel")?;
    Ok(site)
}
