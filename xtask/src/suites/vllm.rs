//! What inference servers do with nvtier's KV stores, without a GPU: vLLM's own manager of tiers, of two versions, over nvtier's tier; whole
//! engines of vLLM with its connector and a real model; LMCache's adapter and benchmark over its client.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::{Shared, bindings, pytest};
use crate::paths;
use crate::pyenv::{self, PyEnv};
use crate::tally::Outcome;

const LIMIT: Duration = Duration::from_secs(60 * 60);

/// What is tested with what: a name, the packages beside the common ones, and the files.
const PARTS: [(&str, &str, &[&str]); 3] = [
    ("vllm", "requirements-vllm.txt", &["test_vllm_tier.py", "test_vllm_connector.py"]),
    (
        "vllm026",
        "requirements-vllm026.txt",
        &["test_vllm_tier.py", "test_vllm_names.py", "test_vllm_connector.py", "test_vllm.py"],
    ),
    ("lmcache", "requirements-lmcache.txt", &["test_lmcache.py"]),
];

/// Why the default run has nothing of this.
pub const NOT_BY_DEFAULT: &str =
    "vllm: vLLM 0.33, vLLM 0.26 and LMCache are 1.7 GB: only where it is asked for, by --suite vllm";

/// Runs the suite, or says why it cannot.
pub fn run(shared: &Shared, python: Option<&Result<PyEnv, String>>) -> Result<Outcome> {
    let python = match python {
        Some(Ok(python)) => python,
        Some(Err(reason)) => return Ok(Outcome::skipped(format!("vllm: no Python environment: {reason}"))),
        None => return Ok(Outcome::default()),
    };
    let log = shared.log("vllm");
    let tests = paths::workspace().join("bindings/python/tests");
    let common = tests.join("requirements-vllm-common.txt");
    let common = match pyenv::packages(python, "vllm-common", &common, &log) {
        Ok(folder) => folder,
        Err(error) => return Ok(Outcome::skipped(format!("vllm: {error:#}"))),
    };
    let site = bindings::site(shared, python, &log)?;
    let mut all = Outcome::default();
    for (name, requirements, files) in PARTS {
        let packages = match pyenv::packages(python, name, &tests.join(requirements), &log) {
            Ok(folder) => folder,
            Err(error) => {
                all.absorb(Outcome::skipped(format!("{name}: {error:#}")));
                continue;
            }
        };
        let files: Vec<_> = files.iter().map(|file| tests.join(file)).collect();
        let files: Vec<&Path> = files.iter().map(AsRef::as_ref).collect();
        all.absorb(pytest::pytest_files(shared, name, python, &files, &[&site, &packages, &common], LIMIT)?);
    }
    Ok(all)
}
