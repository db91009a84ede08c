//! Where the mount daemon keeps its log and says what it has mounted: a directory that only its user can write.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};

/// `$XDG_RUNTIME_DIR/nvtier`, else `/run/nvtier` for root, else `nvtier-UID` in the temporary directory.
pub fn directory() -> Outcome<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let given = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute() && path.is_dir());
    let path = match given {
        Some(base) => base.join("nvtier"),
        None if uid == 0 && Path::new("/run").is_dir() => PathBuf::from("/run/nvtier"),
        None => std::env::temp_dir().join(format!("nvtier-{uid}")),
    };
    let tried = || format!("make the runtime directory {}", path.display());
    match DirBuilder::new().mode(0o700).create(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Failure::io(tried(), &error)),
    }
    // In a shared temporary directory somebody else may have made it first, to read or forge what is in it.
    let metadata = fs::symlink_metadata(&path).map_err(|error| Failure::io(tried(), &error))?;
    if !metadata.is_dir() || metadata.uid() != uid || metadata.permissions().mode() & 0o022 != 0 {
        let message =
            format!("{}: it is not a directory of user {uid} that only this user can write", tried());
        return Err(
            Failure::failed(message).hint("remove it, or set XDG_RUNTIME_DIR to a directory of your own")
        );
    }
    Ok(path)
}

/// One running mount daemon.
#[derive(Debug, Deserialize, Serialize)]
pub struct MountRecord {
    /// Process id of the daemon.
    pub pid: u32,
    /// Its start time in clock ticks since boot (proc_pid_stat(5), field 22): tells it from a later process of that id.
    pub start_ticks: u64,
    /// The pool.
    pub pool: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Where its log is, unless it runs in the foreground.
    pub log: Option<PathBuf>,
}

impl MountRecord {
    /// The record of this process.
    pub fn of_this_process(pool: &Path, mountpoint: &Path, log: Option<PathBuf>) -> Self {
        let pid = std::process::id();
        Self {
            pid,
            start_ticks: start_ticks(pid).unwrap_or(0),
            pool: pool.to_owned(),
            mountpoint: mountpoint.to_owned(),
            log,
        }
    }

    /// Writes the record; it is found by its mount point.
    pub fn save(&self) -> Outcome<PathBuf> {
        let path = record_path(&self.mountpoint)?;
        let text = serde_json::to_vec(self).map_err(|error| Failure::failed(error.to_string()))?;
        fs::write(&path, text).map_err(|error| Failure::io(format!("write {}", path.display()), &error))?;
        Ok(path)
    }

    /// The record of a mount point, when there is a readable one.
    pub fn load(mountpoint: &Path) -> Option<Self> {
        let record: Self = serde_json::from_slice(&fs::read(record_path(mountpoint).ok()?).ok()?).ok()?;
        (record.mountpoint == mountpoint).then_some(record)
    }

    /// Every record of this user, also of daemons that are gone.
    pub fn all() -> Vec<Self> {
        let entries = directory().ok().and_then(|path| fs::read_dir(path).ok()).into_iter().flatten();
        entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| path.to_string_lossy().ends_with(".mount.json"))
            .filter_map(|path| serde_json::from_slice(&fs::read(path).ok()?).ok())
            .collect()
    }

    /// True while the daemon is there.
    pub fn is_running(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }
}

fn record_path(mountpoint: &Path) -> Outcome<PathBuf> {
    Ok(directory()?.join(format!("{}.mount.json", slug(mountpoint))))
}

/// Opens the log of the mount at `mountpoint`, empty.
pub fn create_log(mountpoint: &Path) -> Outcome<(PathBuf, File)> {
    let path = directory()?.join(format!("{}.log", slug(mountpoint)));
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| Failure::io(format!("open the log {}", path.display()), &error))?;
    Ok((path, file))
}

/// A file name for a path: readable, and different for different paths.
fn slug(path: &Path) -> String {
    let text = path.to_string_lossy();
    let readable: String = text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let tail: String = readable.chars().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect();
    // FNV-1a, 64 bits: only has to keep different paths apart.
    let hash = path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{}-{hash:016x}", tail.trim_matches('-'))
}

/// Start time of a process in clock ticks since boot; `None` when there is none, or only a zombie.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the fields after it start with number 3. A zombie is gone for us.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs() {
        let record = MountRecord::of_this_process(Path::new("/p"), Path::new("/m"), None);
        assert!(record.start_ticks > 0);
        assert!(record.is_running());
        assert!(!MountRecord { start_ticks: record.start_ticks + 1, ..record }.is_running());
    }

    #[test]
    fn slugs_differ_where_paths_do() {
        assert_ne!(slug(Path::new("/mnt/a-b")), slug(Path::new("/mnt/a/b")));
        assert!(slug(Path::new("/mnt/a")).starts_with("mnt-a-"));
        assert!(slug(Path::new(&format!("/{}", "x".repeat(4000)))).len() < 100);
    }
}
