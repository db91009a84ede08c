//! `cargo xtask loom`, `asan` and `miri`: concurrent code in every interleaving, unsafe code under checkers of memory.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::exec::{output, run as run_child};
use crate::fuzz::host;
use crate::paths;
use crate::suites::LibtestReader;

const LIMIT: Duration = Duration::from_secs(60 * 60);
/// Crates with unsafe code, or with buffers that it lends out.
const CHECKED: [&str; 4] = ["--package", "nvtier-nvme", "--package", "nvtier-engine"];

/// The models of `tests/loom`; each says how many interleavings it ran.
pub fn loom() -> Result<bool> {
    let mut command = Command::new("cargo");
    command.args(["test", "--package", "nvtier-loom", "--", "--nocapture"]);
    tests("loom", command, |line| line.contains(" interleavings, "))
}

/// Unit tests under AddressSanitizer, in a target folder of their own.
///
/// The sanitizer is behind the compiler's nightly features, which are unlocked for this build. The standard library is the ordinary
/// one: what it does itself is not watched, but every allocation is.
pub fn asan() -> Result<bool> {
    let mut command = Command::new("cargo");
    command
        .args(["test", "--locked", "--lib", "--target", &host()?])
        .args(CHECKED)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("CARGO_TARGET_DIR", paths::target().join("asan"))
        .env("CARGO_INCREMENTAL", "0");
    tests("asan", command, |_| false)
}

/// Unit tests of the buffers under Miri, where the toolchain has it.
pub fn miri() -> Result<bool> {
    if output("cargo", &["miri", "--version"]).is_none() {
        println!(
            "skipped: this toolchain has no Miri (rustup +nightly component add miri rust-src); `cargo xtask asan` watches the same tests"
        );
        println!("miri: 0 passed, 0 failed, 1 skipped");
        return Ok(true);
    }
    let mut command = Command::new("cargo");
    command
        .args(["miri", "test", "--package", "nvtier-nvme", "--lib", "buffer::"])
        .env("CARGO_TARGET_DIR", paths::target().join("miri"));
    tests("miri", command, |_| false)
}

/// Runs them, prints the lines that `shown` picks, what failed, and the sums.
fn tests(name: &str, mut command: Command, shown: impl Fn(&str) -> bool) -> Result<bool> {
    let folder = paths::target().join("test-logs");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let log = folder.join(format!("{name}.log"));
    command.current_dir(paths::workspace());
    let mut reader = LibtestReader::default();
    let ended = run_child(command, &log, LIMIT, |line| {
        if shown(line) {
            println!("{line}");
        }
        reader.line(line);
    })?;
    let outcome = reader.finish();
    outcome.skips.iter().for_each(|skip| println!("  skipped: {skip}"));
    outcome.failures.iter().for_each(|failure| println!("  FAILED: {failure}"));
    println!("{name}: {}", outcome.tally);
    if !ended.success() {
        println!("  {}; the whole output is in {}", ended.describe(LIMIT), log.display());
    }
    Ok(ended.success() && outcome.tally.failed == 0)
}
