//! Where things lie: the workspace, the cache between runs, the scratch folder of this run.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Root of the workspace (the folder above `xtask/`).
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// `$NVTIER_CACHE`, else `$HOME/.cache/nvtier`: downloads and builds worth keeping between runs.
pub fn cache() -> Result<PathBuf> {
    let path = match env::var_os("NVTIER_CACHE") {
        Some(path) if !path.is_empty() => PathBuf::from(path),
        _ => PathBuf::from(env::var_os("HOME").context("neither NVTIER_CACHE nor HOME is set")?)
            .join(".cache/nvtier"),
    };
    fs::create_dir_all(&path).with_context(|| format!("cannot create the cache {}", path.display()))?;
    path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Where the scratch folders of all runs of this user lie. Not under `$HOME` or the clone, because ordinary
/// users of the POSIX suites must be able to walk to it; not under `/tmp`, because that may be tmpfs.
pub fn scratch_base() -> PathBuf {
    env::var_os("NVTIER_TEST_DIR").map_or_else(
        || PathBuf::from(format!("/var/tmp/nvtier-test-{}", rustix::process::getuid().as_raw())),
        PathBuf::from,
    )
}

/// The scratch folder of this run; its name carries our pid so that a later run can tell whether it is abandoned.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Creates `<base>/run-<pid>`.
    pub fn create() -> Result<Self> {
        let base = scratch_base();
        let path = base.join(format!("run-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        for dir in [&base, &path] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("cannot set the mode of {}", dir.display()))?;
        }
        Ok(Self { path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        crate::sweep::directory(&self.path);
        // Only after the sweep: never walk into a mount that is still there.
        if crate::sweep::mounts_under(&self.path).is_empty() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
