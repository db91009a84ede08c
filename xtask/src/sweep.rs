//! Cleaning up after tests that died: FUSE mounts, daemons and loop devices of a scratch folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// Sweeps the scratch folders of runs whose process is gone.
pub fn abandoned() -> Result<()> {
    let Ok(entries) = fs::read_dir(crate::paths::scratch_base()) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.strip_prefix("run-")).and_then(|n| n.parse().ok())
        else {
            continue;
        };
        let alive = Pid::from_raw(pid).is_some_and(|pid| test_kill_process(pid).is_ok());
        if alive {
            continue;
        }
        directory(&entry.path());
        if mounts_under(&entry.path()).is_empty() {
            println!("swept {}, left by an interrupted run", entry.path().display());
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Unmounts, kills and detaches everything that belongs to `scratch`. Returns what it found.
pub fn directory(scratch: &Path) -> Vec<String> {
    let mut found = Vec::new();
    // Daemons first: a mount whose daemon is gone comes off without waiting for it.
    let daemons = processes_naming(scratch);
    for (pid, command) in &daemons {
        found.push(format!("process {} ({command})", pid.as_raw_nonzero()));
        let _ = kill_process(*pid, Signal::KILL);
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while daemons.iter().any(|(pid, _)| test_kill_process(*pid).is_ok()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Deepest first, so that a mount inside a mount does not keep the outer one.
    for mount in mounts_under(scratch).into_iter().rev() {
        found.push(format!("mount {}", mount.display()));
        if unmount(&mount, UnmountFlags::DETACH).is_err() {
            let _ = Command::new("fusermount3").args(["-u", "-z"]).arg(&mount).status();
        }
    }
    for device in loops_under(scratch) {
        found.push(format!("loop device {}", device.display()));
        let _ = Command::new("losetup").arg("-d").arg(&device).status();
    }
    found
}

/// Mount points at or below `dir`, in the order in which they were mounted.
pub fn mounts_under(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .filter(|path| path.starts_with(dir))
        .collect()
}

/// `/proc/self/mountinfo` writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &str) -> String {
    let mut out = String::new();
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        match rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// Processes with an argument that is a path under `dir` (daemons name their pool and mount point).
fn processes_naming(dir: &Path) -> Vec<(Pid, String)> {
    let me = std::process::id();
    let Some(prefix) = dir.to_str() else { return Vec::new() };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let raw = fs::read(entry.path().join("cmdline")).ok()?;
            let words: Vec<_> = raw.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
            let ours = words.iter().skip(1).any(|word| Path::new(word.as_ref()).starts_with(prefix));
            (ours && pid != me).then(|| Some((Pid::from_raw(pid.cast_signed())?, words.join(" "))))?
        })
        .collect()
}

/// Loop devices whose backing file lies under `dir`.
fn loops_under(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| {
            fs::read_to_string(entry.path().join("loop/backing_file"))
                .is_ok_and(|file| Path::new(file.trim()).starts_with(dir))
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn mountinfo_escapes_are_undone() {
        assert_eq!(super::unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(super::unescape(r"/plain\"), r"/plain\");
    }
}
