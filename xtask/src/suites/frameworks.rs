//! Frameworks and everyday programs on a real mount (`tests/python`).

use std::time::Duration;

use anyhow::Result;

use super::{Shared, pytest};
use crate::paths;
use crate::pyenv::PyEnv;
use crate::tally::Outcome;

const LIMIT: Duration = Duration::from_secs(25 * 60);

/// Runs the suite, or says why it cannot.
pub fn run(shared: &Shared, python: Option<&Result<PyEnv, String>>) -> Result<Outcome> {
    if let Some(reason) = &shared.no_fuse {
        return Ok(Outcome::skipped(format!("frameworks: {reason}")));
    }
    match python {
        Some(Ok(python)) => {
            let tests = paths::workspace().join("tests/python");
            pytest::pytest(shared, "frameworks", python, &tests, &[], LIMIT)
        }
        Some(Err(reason)) => Ok(Outcome::skipped(format!("frameworks: no Python environment: {reason}"))),
        None => Ok(Outcome::default()),
    }
}
