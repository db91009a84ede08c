//! What this machine was measured to reach (`nvtier doctor --measure`), kept in the user's state folder: `$XDG_STATE_HOME/nvtier`, or
//! `~/.local/state/nvtier`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use gpudirect::remembered::Remembered;
use serde::{Deserialize, Serialize};

use crate::System;
use crate::checks::filesystem::mount_of;

/// Type of the mounts of pools, as the kernel lists it.
const MOUNT: &str = "fuse.nvtier";

/// A GPU's part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceCeilings {
    /// Its name, as CUDA gives it.
    pub name: String,
    /// Pinned memory to the device, bytes a second.
    pub htod: f64,
    /// And back.
    pub dtoh: f64,
}

/// What was measured, bytes a second each. What could not be measured is not there, and `skipped` says why.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// When, seconds since 1970.
    pub measured_unix: u64,
    /// Below which path.
    pub path: PathBuf,
    /// Reads past the page cache.
    pub drive_read: Option<f64>,
    /// Writes past the page cache, flushed at the end.
    pub drive_write: Option<f64>,
    /// Reads of a pool through the engine, past the page cache, every checksum compared.
    #[serde(default)]
    pub pool_read: Option<f64>,
    /// Reads of a file of a mounted pool, not cached, through the kernel's passthrough or the daemon.
    pub mount_read: Option<f64>,
    /// Copies in host memory.
    pub memory_copy: Option<f64>,
    /// Copies into memory that was not used before: what is loaded into memory goes there, and the kernel, in a virtual machine also its host, has to
    /// find each page.
    #[serde(default)]
    pub memory_fresh: Option<f64>,
    /// The first GPU.
    pub device: Option<DeviceCeilings>,
    /// Bytes that were written to the drive for it.
    pub written_bytes: u64,
    /// What was not measured, and why.
    #[serde(default)]
    pub skipped: Vec<String>,
}

/// The file of all that were measured, by machine and drive.
#[derive(Clone, Debug)]
pub struct Store {
    kept: Remembered,
}

impl Store {
    /// The user's.
    pub fn of_user() -> Store {
        Store { kept: file().map_or_else(Remembered::nowhere, Remembered::at) }
    }

    /// This file.
    pub fn at(file: impl Into<PathBuf>) -> Store {
        Store { kept: Remembered::at(file) }
    }

    /// Of the drive below a path, on this machine; of a path in a mount, that of its pool. Figures that cannot be rates count as not measured.
    pub fn get(&self, path: &Path) -> Option<Ceilings> {
        let mut found: Ceilings = self.kept.get(&key(path)?)?;
        let sane = |rate: f64| rate.is_finite() && rate > 0.0;
        for rate in [
            &mut found.drive_read,
            &mut found.drive_write,
            &mut found.pool_read,
            &mut found.mount_read,
            &mut found.memory_copy,
            &mut found.memory_fresh,
        ] {
            *rate = rate.filter(|rate| sane(*rate));
        }
        found.device = found.device.filter(|device| sane(device.htod) && sane(device.dtoh));
        Some(found)
    }

    /// Keeps what was measured below a path. Whether it is there afterwards: the folder may not be to be written.
    pub fn put(&self, path: &Path, ceilings: &Ceilings) -> bool {
        let Some(key) = key(path) else { return false };
        self.kept.put(&key, ceilings);
        self.kept.get::<Ceilings>(&key).is_some_and(|kept| kept.measured_unix == ceilings.measured_unix)
    }
}

/// Where they are kept; `None` where the user has no home.
pub fn file() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base =
        absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(base.join("nvtier/ceilings.json"))
}

/// Machine and device number: of the block device itself, or of the file system that holds the path.
fn key(path: &Path) -> Option<String> {
    let path = crate::system::existing(path);
    // What lies in the mount of a pool lies where the pool does.
    let mount = mount_of(&System::here(), &path).filter(|mount| mount.kind == MOUNT);
    let path = mount.map_or(path, |mount| crate::disks::unescape(&mount.source).into());
    let metadata = std::fs::metadata(path).ok()?;
    let device = if metadata.rdev() != 0 { metadata.rdev() } else { metadata.dev() };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    Some(format!("{}|{major}:{minor}", gpudirect::paths::System::here().identity()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_found_by_any_path_on_the_drive() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path().join("state/ceilings.json"));
        assert_eq!(store.get(folder.path()), None);
        let mut ceilings = Ceilings { drive_read: Some(3e9), path: "/p".into(), ..Ceilings::default() };
        ceilings.device = Some(DeviceCeilings { name: "g".into(), htod: 1e9, dtoh: 2e9 });
        assert!(store.put(folder.path(), &ceilings));
        assert_eq!(store.get(&folder.path().join("not/yet/there")), Some(ceilings.clone()));
        assert_eq!(store.get(Path::new("/proc")), None, "another file system");
        // A damaged figure is none.
        ceilings.drive_read = Some(-1.0);
        store.put(folder.path(), &ceilings);
        assert_eq!(store.get(folder.path()).unwrap().drive_read, None);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told() {
        assert!(!Store::at("/proc/nvtier/ceilings.json").put(Path::new("/"), &Ceilings::default()));
    }
}
