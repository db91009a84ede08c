//! vLLM's own manager of KV tiers, without a GPU and without a model, over the tier of the Python package.

use std::time::Duration;

use anyhow::Result;

use super::{Shared, bindings, pytest};
use crate::paths;
use crate::pyenv::{self, PyEnv};
use crate::tally::Outcome;

const LIMIT: Duration = Duration::from_secs(10 * 60);

/// Runs the suite, or says why it cannot.
pub fn run(shared: &Shared, python: Option<&Result<PyEnv, String>>) -> Result<Outcome> {
    let python = match python {
        Some(Ok(python)) => python,
        Some(Err(reason)) => return Ok(Outcome::skipped(format!("vllm: no Python environment: {reason}"))),
        None => return Ok(Outcome::default()),
    };
    let log = shared.log("vllm");
    let tests = paths::workspace().join("bindings/python/tests");
    let vllm = match pyenv::packages(python, "vllm", &tests.join("requirements-vllm.txt"), &log) {
        Ok(folder) => folder,
        Err(error) => return Ok(Outcome::skipped(format!("vllm: {error:#}"))),
    };
    let site = bindings::site(shared, python, &log)?;
    pytest::pytest(shared, "vllm", python, &tests.join("test_vllm_tier.py"), &[&site, &vllm], LIMIT)
}
