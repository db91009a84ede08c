//! The pool as the commands see it: a thin layer over the engine's session, with this program's errors and JSON names.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::failure::{Failure, Outcome};

/// An open pool: owned by this process, or reached through its owner (a running mount).
pub struct Store {
    path: PathBuf,
}

/// A node of the pool's tree. The field names are those of `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Path from the root.
    pub path: String,
    /// `directory`, `region`, `symlink`, ...
    pub kind: &'static str,
    /// Bytes.
    pub size: u64,
    /// Bytes on the members.
    pub allocated: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content, seconds since the epoch.
    pub modified: i64,
    /// Counts the commits of the content.
    pub generation: u64,
}

impl Entry {
    /// Last component.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// True for a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == "directory"
    }

    /// `drwxr-xr-x`.
    pub fn mode_text(&self) -> String {
        let kind = match self.kind {
            "directory" => 'd',
            "symlink" => 'l',
            "fifo" => 'p',
            "socket" => 's',
            "char_device" => 'c',
            "block_device" => 'b',
            _ => '-',
        };
        let bits =
            (0..9).rev().map(|bit| if self.mode >> bit & 1 == 0 { '-' } else { ['x', 'w', 'r'][bit % 3] });
        std::iter::once(kind).chain(bits).collect()
    }
}

impl Store {
    /// Opens the pool.
    pub fn open(path: &Path, _read_only: bool) -> Outcome<Self> {
        Err(Failure::unsupported(format!(
            "open the pool {}: not supported yet in this build",
            path.display()
        )))
    }

    /// The pool's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory's entries, or a region itself; in order of their paths.
    pub fn list(&self, _name: &str, _recursive: bool) -> Outcome<Vec<Entry>> {
        Ok(Vec::new())
    }
}
