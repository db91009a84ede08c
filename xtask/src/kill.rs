//! `cargo xtask kill`: rounds of `kill -9` under load. The work is in `tests/src/kill`.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::paths::{self, Scratch};
use crate::{exec, sweep};

/// Options of `cargo xtask kill`.
#[derive(clap::Args)]
pub struct Args {
    /// How many daemons, importers and owners to kill, one after the other
    #[arg(long, default_value_t = 200)]
    rounds: u64,
    /// Seed of the first round; each has the next one
    #[arg(long, default_value_t = 1)]
    first_seed: u64,
    /// Stop at the first round that finds something, and leave its pools
    #[arg(long)]
    keep: bool,
    /// Quick to build and slow to run, with the engine's own assertions. Default: a release build.
    #[arg(long)]
    dev: bool,
}

/// Builds the command and the clients, and runs the rounds; `Ok(false)` when something was lost, hung or unclean.
pub fn run(args: &Args) -> Result<bool> {
    let profile: &[&str] = if args.dev { &[] } else { &["--release"] };
    let mut build = Command::new("cargo");
    build
        .args(["build", "--package", "nvtier", "--package", "nvtier-tests", "--bins"])
        .args(profile)
        .current_dir(paths::workspace());
    ensure!(build.status().context("cannot run cargo")?.success(), "the build failed");
    let programs = paths::target().join(if args.dev { "debug" } else { "release" });

    sweep::abandoned()?;
    let scratch = Scratch::create()?;
    exec::on_interrupt(scratch.path())?;
    let mut rounds = Command::new(programs.join("kill-rounds"));
    rounds
        .args(["--rounds", &args.rounds.to_string(), "--first-seed", &args.first_seed.to_string()])
        .args(args.keep.then_some("--keep"))
        .env("NVTIER_BIN", programs.join("nvtier"))
        .env("NVTIER_SCRATCH", scratch.path());
    let passed = rounds.status().context("cannot run the rounds")?.success();
    if args.keep && !passed {
        std::mem::forget(scratch); // the next run sweeps it
    }
    Ok(passed)
}
