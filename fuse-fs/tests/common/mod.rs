//! Real mounts for tests. A mount goes away with its guard, also when a test panics.
#![allow(dead_code)] // each test program uses a part of it

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::{FormatOptions, OpenOptions, Pool, Verify};
use fuse_fs::{MountOptions, Mounted, Passthrough};

/// How long anything may take before a test calls it a hang.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Kernel passthrough.
    Passed,
    /// The daemon, checking every byte.
    Served,
}

/// A pool of its own, mounted. Unmounts and removes everything on drop.
pub struct Mount {
    mounted: Option<Mounted>,
    folder: Option<tempfile::TempDir>,
    pub way: Way,
}

/// Why mounts cannot be tested here, if so.
pub fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("mounting needs root".to_owned());
    }
    File::options().read(true).write(true).open("/dev/fuse").err().map(|error| format!("/dev/fuse: {error}"))
}

/// Says that the running test cannot run here. `cargo xtask test` counts it as skipped by this line.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
}

/// A new scratch folder that other users may enter.
pub fn scratch() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("nvtier-fuse-").permissions(fs::Permissions::from_mode(0o755));
    match std::env::var_os("NVTIER_SCRATCH") {
        Some(base) => builder.tempdir_in(base),
        None => builder.tempdir(),
    }
    .expect("scratch folder")
}

pub fn open_options(way: Way) -> OpenOptions {
    OpenOptions {
        ram_bytes: 32 << 20,
        verify: if way == Way::Served { Verify::Always } else { Verify::Scrub },
        ..OpenOptions::default()
    }
}

/// Opens a pool that this process has closed before. Another test may just be starting a program: between its fork and its exec
/// the child holds a copy of every descriptor, the lock of the pool's owner among them.
pub fn open_pool(path: &Path, way: Way) -> Pool {
    let opened = wait_for(|| match Pool::open(path, &open_options(way)) {
        Err(error) if error.kind() == engine::ErrorKind::Busy => None,
        result => Some(result),
    });
    opened.expect("the pool stays owned").expect("open the pool")
}

pub fn mount_options(way: Way, mountpoint: &Path) -> MountOptions {
    MountOptions { allow_other: true, verify_always: way == Way::Served, ..MountOptions::new(mountpoint) }
}

impl Mount {
    /// A new directory pool. `None`, said aloud, where mounts are impossible.
    pub fn new(way: Way) -> Option<Mount> {
        Mount::with(way, &FormatOptions::default())
    }

    /// The same with other format options (a quota).
    pub fn with(way: Way, format: &FormatOptions) -> Option<Mount> {
        if let Some(reason) = obstacle() {
            skip(&reason);
            return None;
        }
        let folder = scratch();
        fs::create_dir(folder.path().join("mnt")).expect("mount point");
        Pool::format(&folder.path().join("pool"), format).expect("format");
        let mut mount = Mount { mounted: None, folder: Some(folder), way };
        mount.mount();
        if way == Way::Passed {
            let state = mount.mounted.as_ref().expect("mounted").passthrough();
            if let Passthrough::Off(reason) = state {
                skip(&format!("no passthrough: {reason}"));
                return None;
            }
        }
        Some(mount)
    }

    /// Mounts (again).
    pub fn mount(&mut self) {
        let pool = open_pool(&self.pool_path(), self.way);
        let mounted = fuse_fs::mount(pool, &mount_options(self.way, &self.root())).expect("mount");
        self.mounted = Some(mounted);
    }

    /// Unmounts; the pool is closed when this returns.
    pub fn unmount(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            mounted.unmounter().unmount().expect("unmount");
            mounted.wait().expect("end of the session");
        }
    }

    /// Root of the mounted tree.
    pub fn root(&self) -> PathBuf {
        self.folder().join("mnt")
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root().join(name)
    }

    pub fn pool_path(&self) -> PathBuf {
        self.folder().join("pool")
    }

    /// A folder beside the mount, on the native file system.
    pub fn folder(&self) -> &Path {
        self.folder.as_ref().expect("until drop").path()
    }

    pub fn mounted(&self) -> &Mounted {
        self.mounted.as_ref().expect("mounted")
    }

    pub fn stats(&self) -> serde_json::Value {
        let text = fs::read_to_string(self.path(".nvtier/stats.json")).expect("stats.json");
        serde_json::from_str(&text).expect("JSON")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // `Mounted` unmounts on drop, lazily in the end; only then may the folder be removed.
        drop(self.mounted.take());
        let root = self.root();
        if fuse_fs::find_mount(&root).is_ok_and(|entry| entry.is_some()) {
            let _ = rustix::mount::unmount(&root, rustix::mount::UnmountFlags::DETACH);
            // Never remove a folder under which something may still be mounted.
            if let Some(folder) = self.folder.take() {
                let _ = folder.keep();
            }
        }
    }
}

/// Asks again and again until there is an answer; `None` after [`LIMIT`]. The interval only paces the asking.
pub fn wait_for<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if start.elapsed() > LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The errno of a failed call.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> rustix::io::Errno {
    let error = result.expect_err("the call should have failed");
    rustix::io::Errno::from_io_error(&error).expect("an error of the operating system")
}

/// Bytes that differ at every place and between seeds.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Makes two tests of a function that takes a [`Mount`]: passed through and served.
#[macro_export]
macro_rules! both_ways {
    ($($(#[$attribute:meta])* fn $name:ident($mount:ident: Mount) $body:block)*) => {
        $(
            mod $name {
                #[allow(unused_imports)]
                use super::*;

                #[allow(unused_mut)]
                $(#[$attribute])*
                fn check(mut $mount: Mount) $body

                #[test]
                fn passed() {
                    if let Some(mount) = Mount::new(Way::Passed) {
                        check(mount);
                    }
                }

                #[test]
                fn served() {
                    if let Some(mount) = Mount::new(Way::Served) {
                        check(mount);
                    }
                }
            }
        )*
    };
}
