//! `nvtier train`: finds a Python that has what training needs, and becomes `python -m nvtier.train.cli` in it.
//!
//! The process is replaced, not watched: signals, the terminal and the exit code are the training's own.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::cli::{Global, ProgressMode, Train};
use crate::failure::{Failure, Outcome};
use crate::interrupt;

/// Looks for packages without importing them, which takes seconds for torch. Old enough syntax for any Python 3.
const PROBE: &str = r#"
import json, os, sys
from importlib.util import find_spec
missing = [name for name in ("nvtier", "torch", "transformers", "yaml") if find_spec(name) is None]
if "nvtier" not in missing:
    places = find_spec("nvtier").submodule_search_locations or []
    if not any(os.path.exists(os.path.join(place, "train", "cli.py")) for place in places):
        missing.append("nvtier.train")
print(json.dumps({"version": list(sys.version_info[:2]), "executable": sys.executable, "missing": missing}))
"#;
/// The oldest Python that the package is for.
const OLDEST: (u32, u32) = (3, 9);

#[derive(Deserialize)]
struct Probe {
    version: (u32, u32),
    executable: String,
    missing: Vec<String>,
}

/// Replaces this process by the training; returns only where that is not possible.
pub fn run(global: &Global, args: &Train) -> Outcome {
    let python = args.python.as_deref().unwrap_or(Path::new("python3"));
    check(python, args.python.is_some())?;
    interrupt::check()?;
    let error = Command::new(python).args(["-m", "nvtier.train.cli"]).args(arguments(global, args)).exec();
    Err(Failure::io(format!("start {}", python.display()), &error))
}

/// Fails, with what to install, where the training could not start.
fn check(python: &Path, named: bool) -> Outcome {
    let shown = python.display();
    let output = Command::new(python).args(["-c", PROBE]).stdin(Stdio::null()).output();
    interrupt::check()?;
    let output = output.map_err(|error| {
        let what = format!("start Python as {shown}: {error}");
        match named {
            true => Failure::usage(what)
                .hint("--python and NVTIER_PYTHON name the program, such as venv/bin/python"),
            false => Failure::unsupported(what)
                .hint("install Python 3.9 or newer, or name one with --python or NVTIER_PYTHON"),
        }
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    // Whatever a site's own start-up prints comes before.
    let probe: Option<Probe> = text
        .lines()
        .next_back()
        .and_then(|line| serde_json::from_str(line).ok())
        .filter(|_| output.status.success());
    let Some(probe) = probe else {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().next_back().unwrap_or("it said nothing").trim().to_owned();
        return Err(Failure::unsupported(format!(
            "look for packages with {shown}: {}: {last}",
            output.status
        ))
        .hint("name a Python 3.9 or newer with --python or NVTIER_PYTHON"));
    };
    if probe.version < OLDEST {
        let (major, minor) = probe.version;
        return Err(Failure::unsupported(format!(
            "{} is Python {major}.{minor}; training needs 3.9 or newer",
            probe.executable
        ))
        .hint("name another one with --python or NVTIER_PYTHON"));
    }
    match install(&probe.missing) {
        None => Ok(()),
        Some(install) => Err(Failure::unsupported(format!(
            "train with {}: it has no {}",
            probe.executable,
            probe.missing.join(" and no ")
        ))
        .hint(format!("{install}, or name a Python that has them with --python or NVTIER_PYTHON"))),
    }
}

/// How to get what is missing.
fn install(missing: &[String]) -> Option<String> {
    let has = |name: &str| missing.iter().any(|package| package == name);
    let mut steps = Vec::new();
    if has("nvtier.train") {
        steps.push("install a newer nvtier package".to_owned());
    } else if has("nvtier") {
        steps.push(
            "install the nvtier package (`cargo xtask wheel` builds target/wheels/nvtier-*.whl)".to_owned(),
        );
    }
    let names = [("torch", "torch"), ("transformers", "transformers"), ("yaml", "PyYAML")];
    let packages: Vec<_> = names.iter().filter(|(name, _)| has(name)).map(|(_, package)| *package).collect();
    if !packages.is_empty() {
        steps.push(format!("pip install {}", packages.join(" ")));
    }
    (!steps.is_empty()).then(|| steps.join("; "))
}

/// The options, as the Python side spells them.
fn arguments(global: &Global, args: &Train) -> Vec<OsString> {
    let mut line: Vec<OsString> = Vec::new();
    let mut give = |name: &str, value: Option<OsString>| {
        if let Some(value) = value {
            // One word, so that a value may begin with a dash.
            let mut word = OsString::from(format!("{name}="));
            word.push(value);
            line.push(word);
        }
    };
    give("--env_config", Some(args.env_config.clone().into()));
    give("--exp_config", Some(args.exp_config.clone().into()));
    give("--pool", args.pool.clone().map(Into::into));
    give("--run", args.run.clone().map(Into::into));
    give("--vram", args.vram.map(|bytes| bytes.to_string().into()));
    give("--ram", args.ram.map(|bytes| bytes.to_string().into()));
    give("--seed", args.seed.map(|seed| seed.to_string().into()));
    give("--clip-grad-norm", args.clip_grad_norm.map(|norm| norm.to_string().into()));
    give("--commit-every", args.commit_every.map(|updates| updates.to_string().into()));
    let flags = [
        (args.plain, "--plain"),
        (args.lazy, "--lazy"),
        (args.resume, "--resume"),
        (args.fresh, "--fresh"),
        (args.check, "--check"),
        (global.json, "--json"),
        (global.progress == ProgressMode::None, "--quiet"),
        (global.verbose > 0, "--debug"),
    ];
    line.extend(flags.into_iter().filter(|(given, _)| *given).map(|(_, name)| name.into()));
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::code;

    #[test]
    fn what_is_missing_is_named_with_how_to_get_it() {
        let missing =
            |names: &[&str]| install(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(missing(&[]), None);
        assert_eq!(missing(&["yaml", "torch"]).as_deref(), Some("pip install torch PyYAML"));
        assert!(
            missing(&["nvtier", "torch"])
                .is_some_and(|text| text.contains("wheel") && text.contains("torch"))
        );
        assert!(missing(&["nvtier.train"]).is_some_and(|text| text.contains("newer")));
    }

    #[test]
    fn codes_of_a_missing_python() {
        let absent = Path::new("/nonexistent/python3");
        assert_eq!(check(absent, true).unwrap_err().code, code::USAGE);
        assert_eq!(check(absent, false).unwrap_err().code, code::UNSUPPORTED);
    }
}
