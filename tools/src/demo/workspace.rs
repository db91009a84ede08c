//! The directory that a demo works in, its mount, and how both go away again.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cmd::{mount, umount};
use crate::failure::{Failure, Outcome, code};
use crate::{mountpoint, output, size};

/// `f_type` of tmpfs and ramfs (statfs(2)).
const MEMORY_TYPES: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Removed on drop, mount first.
pub struct Workspace {
    path: PathBuf,
    keep: bool,
    memory: bool,
    mountpoint: Option<PathBuf>,
    closed: bool,
}

impl Workspace {
    /// Makes a directory in `given`, or in the first fitting place: a real drive, writable, with room for twice the
    /// checkpoint and some more.
    pub fn create(given: Option<&Path>, keep: bool, checkpoint_bytes: u64) -> Outcome<Self> {
        let needed = 2 * checkpoint_bytes + (64 << 20);
        let base = match given {
            Some(given) => given
                .canonicalize()
                .map_err(|error| Failure::io(format!("work in {}", given.display()), &error))?,
            None => choose(needed)?,
        };
        let free = free_bytes(&base).unwrap_or(u64::MAX);
        if free < needed {
            let (needed, free) = (size::human(needed), size::human(free));
            let message = format!("{} has {free} free, the demo needs {needed}", base.display());
            return Err(Failure::new(code::NO_SPACE, "NoSpace", message)
                .hint("choose another place with --dir, or a smaller --size"));
        }
        let path = base.join(format!("nvtier-demo-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| Failure::io(format!("make {}", path.display()), &error))?;
        Ok(Self { memory: is_memory(&path), path, keep, mountpoint: None, closed: false })
    }

    /// Where everything is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True where there is no drive under it.
    pub fn is_memory(&self) -> bool {
        self.memory
    }

    /// Mounts the pool as `nvtier mount` does.
    pub fn mount(&mut self, pool: &Path) -> Outcome<PathBuf> {
        let mountpoint = self.path.join("mnt");
        fs::create_dir_all(&mountpoint)
            .map_err(|error| Failure::io(format!("make {}", mountpoint.display()), &error))?;
        // Noted before it is done: an interrupt in between must find it.
        self.mountpoint = Some(mountpoint.clone());
        mount::mount_in_background(pool, &mountpoint)?;
        Ok(mountpoint)
    }

    /// Unmounts and waits for the daemon.
    pub fn unmount(&mut self) -> Outcome {
        let Some(path) = self.mountpoint.take() else { return Ok(()) };
        if mountpoint::mounted_at(&path)?.is_none() {
            return Ok(());
        }
        umount::unmount(&path, || Ok(())).map(drop)
    }

    /// Unmounts and removes everything, or says where it is.
    pub fn close(mut self) -> Outcome {
        self.closed = true;
        self.clean()
    }

    fn clean(&mut self) -> Outcome {
        self.unmount()?;
        if self.keep {
            output::note(&format!("kept: {}", self.path.display()));
            return Ok(());
        }
        fs::remove_dir_all(&self.path)
            .map_err(|error| Failure::io(format!("remove {}", self.path.display()), &error))
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.closed
            && let Err(failure) = self.clean()
        {
            output::note(&format!("nvtier: {failure}"));
        }
    }
}

/// The first place on a drive; else the first place at all.
fn choose(needed: u64) -> Outcome<PathBuf> {
    let candidates = [Some(PathBuf::from(".")), Some(std::env::temp_dir()), Some(PathBuf::from("/var/tmp"))];
    let fitting: Vec<PathBuf> = candidates
        .into_iter()
        .flatten()
        .filter_map(|path| path.canonicalize().ok())
        .filter(|path| {
            rustix::fs::access(path, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok()
        })
        .filter(|path| free_bytes(path).is_none_or(|free| free >= needed))
        .collect();
    let on_a_drive = fitting.iter().find(|path| !is_memory(path));
    on_a_drive.or(fitting.first()).cloned().ok_or_else(|| {
        let message = format!("no place to work in: neither ., nor the temporary directory, nor /var/tmp is writable with {} free", size::human(needed));
        Failure::new(code::NO_SPACE, "NoSpace", message).hint("choose one with --dir, or a smaller --size")
    })
}

fn free_bytes(path: &Path) -> Option<u64> {
    let statvfs = rustix::fs::statvfs(path).ok()?;
    Some(statvfs.f_bavail * statvfs.f_frsize)
}

fn is_memory(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|statfs| MEMORY_TYPES.contains(&(statfs.f_type as u64)))
}
