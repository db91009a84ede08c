//! pjdfstest (each system call's rules) and fsx (random operations, content checked) on mounts.
//!
//! pjdfstest also runs on the native file system under the scratch folder: a case that fails there says nothing about
//! us. What is known to be unsupported is written down in `tests/posix/pjdfstest.toml` and `docs/posix.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Shared;
use crate::exec::{run as run_child, step};
use crate::external::from_crate;
use crate::paths;
use crate::tally::Outcome;

const LIMIT: Duration = Duration::from_secs(15 * 60);
/// Seed of fsx; `NVTIER_SEED` replaces it.
const SEED: u64 = 20_261_124;

/// pjdfstest and fsx, built into the cache.
pub fn programs(log: &Path) -> Result<[PathBuf; 2]> {
    Ok([from_crate("pjdfstest", "0.2.2", log)?, from_crate("fsx", "0.3.2", log)?])
}

/// Runs both suites on each kind of pool.
pub fn run(shared: &Shared, programs: Result<[PathBuf; 2]>) -> Result<Outcome> {
    if let Some(reason) = &shared.no_fuse {
        return Ok(Outcome::skipped(format!("posix: {reason}")));
    }
    let [pjdfstest, fsx] = match programs {
        Ok(programs) => programs,
        Err(error) => return Ok(Outcome::skipped(format!("posix: the suites cannot be built: {error:#}"))),
    };
    let mut outcome = Outcome::default();
    for kind in [Kind::Directory, Kind::Raw] {
        let mount = Mount::create(shared, kind)?;
        outcome.absorb(compliance(shared, &pjdfstest, &mount)?);
        for mode in ["buffered", "mmap"] {
            outcome.absorb(exerciser(shared, &fsx, &mount, mode)?);
        }
        outcome.absorb(mount.finish(shared)?);
    }
    Ok(outcome)
}

#[derive(Clone, Copy)]
enum Kind {
    /// Reads go through the kernel (passthrough) where it can.
    Directory,
    /// An image file: every byte is served by the daemon, sums verified.
    Raw,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Raw => "raw",
        }
    }
}

/// A mounted pool.
struct Mount {
    kind: Kind,
    pool: PathBuf,
    point: PathBuf,
}

impl Mount {
    fn create(shared: &Shared, kind: Kind) -> Result<Self> {
        // Short names: pjdfstest binds sockets deep below, and a socket's path has room for 107 bytes.
        let folder = shared.folder(&format!("px/{}", &kind.name()[..1]))?;
        let (pool, point) = (folder.join("p"), folder.join("m"));
        fs::create_dir_all(&point)?;
        let log = shared.log("posix");
        let mut format = Command::new(&shared.nvtier);
        format.arg("format").arg(&pool);
        if matches!(kind, Kind::Raw) {
            format.args(["--raw", "--size", "2GiB"]);
        }
        step(format, &log, LIMIT).context("nvtier format")?;
        let mut mount = Command::new(&shared.nvtier);
        // Other users: pjdfstest acts as several.
        mount.arg("mount").arg(&pool).arg(&point).args(["--ram", "256MiB", "--allow-other"]);
        step(mount, &log, LIMIT).context("nvtier mount")?;
        Ok(Self { kind, pool, point })
    }

    /// Unmounts; then every byte in the pool must still fit its sum.
    fn finish(self, shared: &Shared) -> Result<Outcome> {
        let log = shared.log("posix");
        let mut umount = Command::new(&shared.nvtier);
        umount.arg("umount").arg(&self.point);
        step(umount, &log, LIMIT).context("nvtier umount")?;
        let mut verify = Command::new(&shared.nvtier);
        verify.arg("verify").arg("--pool").arg(&self.pool);
        let mut outcome = Outcome::default();
        match step(verify, &log, LIMIT) {
            Ok(()) => outcome.tally.passed += 1,
            Err(error) => outcome.fail(format!("verify of the {} pool: {error:#}", self.kind.name())),
        }
        Ok(outcome)
    }
}

/// How a case of pjdfstest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Case {
    Passed,
    /// With the first line of explanation.
    Failed(String),
    Skipped(String),
    ExpectedFailure,
    UnexpectedPass,
}

fn compliance(shared: &Shared, program: &Path, mount: &Mount) -> Result<Outcome> {
    let native = shared.folder("px/n")?;
    let baseline = cases(shared, program, &native, &mount.point)?;
    let mounted = cases(shared, program, &mount.point, &native)?;
    let kind = mount.kind.name();
    let mut outcome = Outcome::default();
    if mounted.is_empty() && shared.filter.is_none() {
        outcome.fail(format!("pjdfstest ({kind}): it ran no case"));
    }
    let mut skips: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (name, case) in &mounted {
        let native_fails = matches!(baseline.get(name), Some(Case::Failed(_)));
        match case {
            Case::Passed => outcome.tally.passed += 1,
            Case::Skipped(why) => skips.entry(why.clone()).or_default().push(name),
            Case::ExpectedFailure => {
                skips.entry("unsupported, see docs/posix.md".into()).or_default().push(name);
            }
            Case::Failed(_) if native_fails => {
                skips.entry("fails on the native file system as well".into()).or_default().push(name);
            }
            Case::Failed(why) => outcome.fail(format!("pjdfstest ({kind}) {name}: {why}")),
            Case::UnexpectedPass => outcome.fail(format!(
                "pjdfstest ({kind}) {name}: passes, so take it off the list in tests/posix/pjdfstest.toml"
            )),
        }
    }
    // One line for each reason, not for each case.
    for (why, names) in skips {
        outcome.tally.skipped += names.len() as u64;
        outcome.skips.push(format!("pjdfstest ({kind}), {} cases: {why}: {}", names.len(), names.join(" ")));
    }
    Ok(outcome)
}

/// Runs pjdfstest in `folder`; `other` is a folder on another file system.
fn cases(shared: &Shared, program: &Path, folder: &Path, other: &Path) -> Result<BTreeMap<String, Case>> {
    let mut command = Command::new(program);
    command
        .arg("--configuration-file")
        .arg(paths::workspace().join("tests/posix/pjdfstest.toml"))
        .arg("--path")
        .arg(folder)
        .arg("--secondary-fs")
        .arg(other)
        .env("NO_COLOR", "1")
        .env("RUST_BACKTRACE", "0");
    if let Some(filter) = &shared.filter {
        command.arg(filter);
    }
    let mut cases = BTreeMap::new();
    let mut last = None;
    // The exit status only repeats what the lines say.
    let ended = run_child(command, &shared.log("posix"), LIMIT, |line| {
        read_case(line, &mut cases, &mut last);
    })?;
    anyhow::ensure!(!ended.timed_out, "pjdfstest in {} ran past its limit", folder.display());
    Ok(cases)
}

fn read_case(line: &str, cases: &mut BTreeMap<String, Case>, last: &mut Option<String>) {
    const ENDINGS: [(&str, Case); 5] = [
        (" ok", Case::Passed),
        (" skipped", Case::Skipped(String::new())),
        (" FAILED", Case::Failed(String::new())),
        (" failed as expected", Case::ExpectedFailure),
        (" PASSED UNEXPECTEDLY", Case::UnexpectedPass),
    ];
    if let Some(note) = line.strip_prefix('\t') {
        let case = last.as_ref().and_then(|name| cases.get_mut(name));
        if let Some(Case::Failed(why) | Case::Skipped(why)) = case
            && why.is_empty()
        {
            note.trim().clone_into(why);
        }
        return;
    }
    for (ending, case) in ENDINGS {
        if let Some(name) = line.strip_suffix(ending).map(str::trim)
            && name.contains("::")
            && !name.contains(' ')
        {
            cases.insert(name.to_owned(), case);
            *last = Some(name.to_owned());
            return;
        }
    }
}

fn exerciser(shared: &Shared, program: &Path, mount: &Mount, mode: &str) -> Result<Outcome> {
    let name = format!("fsx {mode} ({})", mount.kind.name());
    let mut outcome = Outcome::default();
    if shared.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
        return Ok(outcome);
    }
    let seed = std::env::var("NVTIER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(SEED);
    let operations = if shared.quick { 5_000 } else { 100_000 };
    let mut command = Command::new(program);
    command
        .arg("-f")
        .arg(paths::workspace().join(format!("tests/posix/fsx-{mode}.toml")))
        .args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-P"])
        .arg(&shared.logs)
        .arg(mount.point.join(format!("fsx-{mode}")));
    let started = Instant::now();
    let mut fine = false;
    let mut tail = String::new();
    let ended = run_child(command, &shared.log("posix"), LIMIT, |line| {
        fine |= line.contains("All operations completed A-OK!");
        line.clone_into(&mut tail);
    })?;
    println!("  {name}: {operations} operations, seed {seed}, {} s", started.elapsed().as_secs());
    if ended.success() && fine {
        outcome.tally.passed += 1;
    } else {
        outcome.fail(format!("{name}, seed {seed}: {}; last line: {tail}", ended.describe(LIMIT)));
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_lines_of_pjdfstest() {
        let text = "unlink::remove_type::symlink                       ok\n\
                    unlink::erofs_named                           skipped\n\tRemounts are not allowed\n\
                    mkfifo::changed_time                           FAILED\n\tTimestamps did not change\n\tmore\n\
                    rename::a                          failed as expected\n\
                    rename::b                         PASSED UNEXPECTEDLY\n\n\
                    Summary: 1 failed, 1 skipped, 1 passed\n";
        let (mut cases, mut last) = (BTreeMap::new(), None);
        text.lines().for_each(|line| read_case(line, &mut cases, &mut last));
        let got: Vec<_> = cases.iter().map(|(name, case)| (name.as_str(), case.clone())).collect();
        assert_eq!(
            got,
            [
                ("mkfifo::changed_time", Case::Failed("Timestamps did not change".into())),
                ("rename::a", Case::ExpectedFailure),
                ("rename::b", Case::UnexpectedPass),
                ("unlink::erofs_named", Case::Skipped("Remounts are not allowed".into())),
                ("unlink::remove_type::symlink", Case::Passed),
            ]
        );
    }
}
