//! Programs from outside: Debian packages, POSIX suites from the crate registry.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec::{on_path, step};
use crate::paths;

const LIMIT: Duration = Duration::from_secs(15 * 60);

/// Installs Debian packages; only root can, and only where there is apt.
pub fn apt(packages: &[&str], log: &Path) -> Result<()> {
    static ONE_AT_A_TIME: Mutex<bool> = Mutex::new(false);
    if !rustix::process::getuid().is_root() {
        bail!("needs {packages:?} installed, and only root can install packages");
    }
    if !on_path("apt-get") {
        bail!("needs {packages:?} installed, and there is no apt-get here");
    }
    let mut updated = ONE_AT_A_TIME.lock().expect("no panic holds this lock");
    if !*updated {
        let mut update = Command::new("apt-get");
        update.args(["update", "-q"]);
        step(update, log, LIMIT).context("apt-get update")?;
        *updated = true;
    }
    let mut install = Command::new("apt-get");
    install
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["install", "-q", "-y", "--no-install-recommends"])
        .args(packages);
    step(install, log, LIMIT).with_context(|| format!("apt-get install {packages:?}"))
}

/// Makes sure that a program is on `PATH`, installing its package where that is possible.
pub fn program(name: &str, package: &str, log: &Path) -> Result<()> {
    if on_path(name) {
        return Ok(());
    }
    println!("  installing {package} (for {name})");
    apt(&[package], log)
}

/// A program from the crate registry at a fixed version, built once into the cache.
pub fn from_crate(name: &str, version: &str, log: &Path) -> Result<PathBuf> {
    let root = paths::cache()?.join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    let _lock = crate::pyenv::lock(&paths::cache()?.join(format!("{name}.lock")))?;
    if !program.exists() {
        println!("  building {name} {version} into {} (once)", root.display());
        let mut install = Command::new("cargo");
        install
            .args(["install", "--locked", "--quiet", "--root"])
            .arg(&root)
            .args([name, "--version", &format!("={version}")])
            // Its own target folder, so that it neither waits for nor disturbs the workspace's builds.
            .env("CARGO_TARGET_DIR", root.join("target"));
        step(install, log, LIMIT).with_context(|| format!("cargo install {name}"))?;
        let _ = std::fs::remove_dir_all(root.join("target"));
    }
    Ok(program)
}
