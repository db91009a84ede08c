//! Pools and mounts made for a comparison, taken down when dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Result;
use crate::process::CommandLine;

/// A mounted pool; the daemon is our child, so that its CPU time and memory can be read.
#[derive(Debug)]
pub struct Mount {
    /// Where.
    pub point: PathBuf,
    nvtier: PathBuf,
    pool: PathBuf,
    ram_mib: u64,
    daemon: Child,
}

impl Mount {
    /// Mounts `pool` at `point` and waits until it answers.
    pub fn new(nvtier: &Path, pool: &Path, point: &Path, ram_mib: u64) -> Result<Mount> {
        fs::create_dir_all(point).map_err(|error| format!("cannot make {}: {error}", point.display()))?;
        let daemon = start(nvtier, pool, point, ram_mib)?;
        let (point, pool, nvtier) = (point.to_path_buf(), pool.to_path_buf(), nvtier.to_path_buf());
        let mut mount = Mount { point, nvtier, pool, ram_mib, daemon };
        mount.wait_until_mounted()?;
        Ok(mount)
    }

    /// A fresh daemon: its RAM tier is empty again, which dropping the kernel's caches does not do.
    pub fn remount(&mut self) -> Result<()> {
        self.take_down();
        self.daemon = start(&self.nvtier, &self.pool, &self.point, self.ram_mib)?;
        self.wait_until_mounted()
    }

    fn wait_until_mounted(&mut self) -> Result<()> {
        let begun = Instant::now();
        while !mounted(&self.point) {
            if let Ok(Some(status)) = self.daemon.try_wait() {
                return Err(format!("nvtier mount {} ended: {status}", self.pool.display()));
            }
            if begun.elapsed() > Duration::from_secs(30) {
                return Err(format!("nvtier mount {} did not answer within 30 s", self.pool.display()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn take_down(&mut self) {
        let mut umount = Command::new(&self.nvtier);
        let left = umount.arg("umount").arg(&self.point).stdout(Stdio::null()).status();
        if !left.is_ok_and(|status| status.success()) {
            eprintln!("compare: nvtier umount {} failed; ending its daemon", self.point.display());
            let _ = self.daemon.kill();
        }
        let _ = self.daemon.wait();
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }
}

fn mounted(point: &Path) -> bool {
    let Ok(point) = point.canonicalize() else { return false };
    let text = format!(" {} ", point.display());
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
        .any(|line| line.contains(&text) && line.contains(" fuse"))
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.take_down();
    }
}

fn start(nvtier: &Path, pool: &Path, point: &Path, ram_mib: u64) -> Result<Child> {
    Command::new(nvtier)
        .arg("mount")
        .arg(pool)
        .arg(point)
        .args(["--foreground", "--ram", &format!("{ram_mib}MiB")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot start {}: {error}", nvtier.display()))
}

/// Formats a pool.
pub fn format(nvtier: &Path, scratch: &Path, pool: &Path, more: &[String]) -> Result<()> {
    let mut words =
        vec![nvtier.display().to_string(), "format".into(), pool.display().to_string(), "--force".into()];
    words.extend_from_slice(more);
    CommandLine(words).run(scratch).map(drop)
}

/// Imports a file as region `name`; returns the command and its seconds.
pub fn import(
    nvtier: &Path,
    scratch: &Path,
    source: &Path,
    name: &str,
    pool: &Path,
) -> Result<(CommandLine, f64, f64)> {
    let line = CommandLine(vec![
        nvtier.display().to_string(),
        "import".into(),
        "--force".into(),
        "--no-resume".into(),
        source.display().to_string(),
        name.into(),
        "--pool".into(),
        pool.display().to_string(),
    ]);
    let (wall, cpu, _) = line.run(scratch)?;
    Ok((line, wall, cpu))
}
