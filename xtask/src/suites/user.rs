//! The tests of the lower crates and of the command once more, as an ordinary user: nothing may need root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Shared;
use super::cargo::LibtestReader;
use crate::exec::{on_path, output, run as run_child};
use crate::paths;
use crate::tally::Outcome;

const LIMIT: Duration = Duration::from_secs(10 * 60);
const PACKAGES: [&str; 3] = ["nvtier-nvme", "nvtier-engine", "nvtier-tests"];
/// Test programs of `nvtier-tests` that make sense without root.
const SYSTEM_PROGRAMS: [&str; 1] = ["ordinary_user"];

/// Runs the suite, or says why it cannot.
pub fn run(shared: &Shared) -> Result<Outcome> {
    if !rustix::process::getuid().is_root() {
        return Ok(Outcome::skipped("user: everything already ran as an ordinary user"));
    }
    if !on_path("setpriv") {
        return Ok(Outcome::skipped("user: no setpriv here to become an ordinary user with"));
    }
    let folder = shared.folder("user")?;
    let home = shared.folder("user/home")?;
    fs::set_permissions(&home, fs::Permissions::from_mode(0o777))?;
    let command = folder.join("nvtier");
    copy_program(&shared.nvtier, &command)?;

    let fuse = open_fuse_node(&folder);
    let mut outcome = Outcome::default();
    for (index, program) in programs()?.iter().enumerate() {
        let local = folder.join(format!("test-{index}"));
        copy_program(&program.path, &local)?;
        let readable =
            output("setpriv", &["--reuid=nobody", "--clear-groups", "test", "-r", &program.manifest_dir]);
        let directory = if readable.is_some() { Path::new(&program.manifest_dir) } else { home.as_path() };
        let mut child = as_nobody(fuse.as_deref());
        child.arg(&local).arg("--show-output");
        if let Some(filter) = &shared.filter {
            child.arg(filter);
        }
        child
            .current_dir(directory)
            .env("HOME", &home)
            .env("TMPDIR", &home)
            .env("NVTIER_SCRATCH", &home)
            .env("NVTIER_BIN", &command)
            .env_remove("NVTIER_CACHE");
        let mut reader = LibtestReader::default();
        reader.line(&format!("Running {} (as nobody)", program.name));
        let ended = run_child(child, &shared.log("user"), LIMIT, |line| reader.line(line))?;
        let mut part = reader.finish();
        if !ended.success() && part.tally.failed == 0 {
            part.fail(format!("{} as an ordinary user: {}", program.name, ended.describe(LIMIT)));
        }
        outcome.absorb(part);
        fs::remove_file(&local)?;
    }
    Ok(outcome)
}

/// A command line that becomes `nobody`. With `fuse`, first puts that node over `/dev/fuse`, in a mount namespace of its
/// own: nothing changes for the rest of the machine.
fn as_nobody(fuse: Option<&Path>) -> Command {
    const DROP: [&str; 5] =
        ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--inh-caps=-all"];
    let mut command;
    match fuse {
        Some(node) => {
            command = Command::new("unshare");
            command
                .args(["--mount", "sh", "-c", r#"mount --bind "$0" /dev/fuse && exec "$@""#])
                .arg(node)
                .args(DROP);
        }
        None => {
            command = Command::new(DROP[0]);
            command.args(&DROP[1..]);
        }
    }
    command
}

/// Usual systems let every user open `/dev/fuse`; some containers do not. Then a node of our own that does, if it can
/// be made.
fn open_fuse_node(folder: &Path) -> Option<PathBuf> {
    let mode = fs::metadata("/dev/fuse").ok()?.permissions().mode();
    if mode & 0o006 == 0o006 || !on_path("unshare") {
        return None;
    }
    let node = folder.join("fuse");
    let path = node.to_str()?;
    output("mknod", &["-m", "666", path, "c", "10", "229"])?;
    Some(node)
}

struct Program {
    name: String,
    path: PathBuf,
    manifest_dir: String,
}

/// Test programs of the packages, as cargo built them.
fn programs() -> Result<Vec<Program>> {
    let mut list = Command::new("cargo");
    list.args(["test", "--no-run", "--message-format=json", "--quiet"]);
    for package in PACKAGES {
        list.args(["--package", package]);
    }
    let out = list.output().context("cargo test --no-run")?;
    let text = String::from_utf8_lossy(&out.stdout);
    let mut programs = Vec::new();
    for line in text.lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let (Some(path), Some(true)) = (message["executable"].as_str(), message["profile"]["test"].as_bool())
        else {
            continue;
        };
        let manifest = Path::new(message["manifest_path"].as_str().unwrap_or_default());
        let name = message["target"]["name"].as_str().unwrap_or_default().to_owned();
        let system = manifest.parent().is_some_and(|dir| dir == paths::workspace().join("tests"));
        if system && !SYSTEM_PROGRAMS.contains(&name.as_str()) {
            continue;
        }
        programs.push(Program {
            name,
            path: path.into(),
            manifest_dir: manifest.parent().unwrap_or(manifest).display().to_string(),
        });
    }
    Ok(programs)
}

/// Copies a program to where an ordinary user can run it.
fn copy_program(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
