//! `cargo xtask wheel`: the Python package as a wheel that any CPython from 3.9 on can install.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::exec::{on_path, step};
use crate::{paths, pyenv};

const LIMIT: Duration = Duration::from_secs(60 * 60);

/// Arguments of `cargo xtask wheel`.
#[derive(clap::Args)]
pub struct Args {
    /// Unoptimised: quick to build.
    #[arg(long)]
    dev: bool,
    /// Where to. Default: `wheels` in cargo's target directory.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Builds it, with the maturin that is there, or else the one of the tests' Python environment.
pub fn run(args: &Args) -> Result<bool> {
    let out = args.out.clone().unwrap_or_else(|| paths::target().join("wheels"));
    let logs = paths::target().join("test-logs");
    for folder in [&out, &logs] {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let log = logs.join("wheel.log");
    let mut command = if on_path("maturin") {
        Command::new("maturin")
    } else {
        let mut command = Command::new(pyenv::ensure(&log)?.python);
        command.args(["-m", "maturin"]);
        command
    };
    command.args(["build", "--locked", "--profile", if args.dev { "dev" } else { "release" }]);
    command.arg("--out").arg(&out).current_dir(paths::workspace().join("bindings/python"));
    step(command, &log, LIMIT).context("maturin build")?;
    for wheel in wheels(&out)? {
        println!("{}", wheel.display());
    }
    Ok(true)
}

/// The wheels in a folder, the newest last.
pub fn wheels(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut wheels: Vec<_> = std::fs::read_dir(folder)?
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "whl"))
        .map(|entry| (entry.metadata().and_then(|metadata| metadata.modified()).ok(), entry.path()))
        .collect();
    wheels.sort();
    Ok(wheels.into_iter().map(|(_, path)| path).collect())
}
