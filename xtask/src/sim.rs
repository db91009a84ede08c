//! `cargo xtask sim`: simulated power cuts, bit flips, and the time to open a large pool. The work is in `tests/sim`.

use std::process::Command;

use anyhow::{Context, Result};

use crate::paths;

/// Options of `cargo xtask sim`; all but `--dev` are those of the program, which knows `--help`.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// Build quickly, run slowly, with the engine's own assertions. Default: a release build.
    #[arg(long)]
    dev: bool,
    /// See `cargo xtask sim --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    rest: Vec<String>,
}

/// Builds the program and runs it; `Ok(false)` when it found a violation.
pub fn run(args: &Args) -> Result<bool> {
    let mut cargo = Command::new("cargo");
    cargo.args(["run", "--quiet", "--package", "nvtier-sim-tests", "--bin", "nvtier-sim"]);
    if !args.dev {
        cargo.arg("--release");
    }
    cargo.arg("--").args(&args.rest).current_dir(paths::workspace());
    Ok(cargo.status().context("cannot run cargo")?.success())
}
