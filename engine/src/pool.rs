//! A pool: a tree of named regions on one or several members, with one owner process.
//!
//! `Pool::tensors` is in `tensors/mod.rs`, `Pool::lease` in `lease.rs`.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::types::{Access, Attr, DirEntry, NewNode, NodeId, RenameFlags, SetAttr, XattrSet};
use crate::verify::{VerifyProgress, VerifyReport};

mod options;

pub use options::*;

/// An open pool; clones share it. The last one to go closes it, see [`Pool::close`].
#[derive(Clone, Debug)]
pub struct Pool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {}

fn todo<T>(what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::NotSupported, format!("{what} is not built yet")))
}

#[allow(unused_variables)]
impl Pool {
    /// Makes a pool at `path`. Refuses with `ForeignData` where other data is found, naming it, unless forced.
    pub fn format(path: &Path, options: &FormatOptions) -> Result<PoolInfo> {
        todo("format")
    }

    /// Opens a pool and becomes its owner; `Busy` names the process that is. `path` is the pool's or any of its members'.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Pool> {
        todo("open")
    }

    /// Reads the superblocks only; needs no ownership.
    pub fn probe(path: &Path) -> Result<PoolInfo> {
        todo("probe")
    }

    /// What the superblocks say.
    pub fn info(&self) -> PoolInfo {
        unreachable!("no pool can be opened yet")
    }

    /// What it holds and did.
    pub fn stat(&self) -> PoolStat {
        PoolStat::default()
    }

    /// The node of a name.
    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Attr> {
        todo("lookup")
    }

    /// Attributes of a node.
    pub fn getattr(&self, node: NodeId) -> Result<Attr> {
        todo("getattr")
    }

    /// Changes attributes. A new size is committed at once when nobody has the region open for writing.
    pub fn setattr(&self, node: NodeId, set: &SetAttr) -> Result<Attr> {
        todo("setattr")
    }

    /// Makes a node of any kind.
    pub fn create(&self, parent: NodeId, name: &OsStr, new: &NewNode) -> Result<Attr> {
        todo("create")
    }

    /// Gives a node one more name.
    pub fn link(&self, node: NodeId, parent: NodeId, name: &OsStr) -> Result<Attr> {
        todo("link")
    }

    /// Takes away a name that is not a directory's.
    pub fn unlink(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        todo("unlink")
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        todo("rmdir")
    }

    /// `renameat2(2)`.
    pub fn rename(
        &self,
        parent: NodeId,
        name: &OsStr,
        new_parent: NodeId,
        new_name: &OsStr,
        flags: RenameFlags,
    ) -> Result<()> {
        todo("rename")
    }

    /// Up to `max` entries after `cookie` (0: from the start), each with the cookie that follows it; without `.` and `..`.
    /// An entry that stays is seen exactly once by a reader, whatever is made and removed meanwhile.
    pub fn readdir(&self, node: NodeId, cookie: u64, max: usize) -> Result<Vec<(u64, DirEntry)>> {
        todo("readdir")
    }

    /// The directory that holds a directory; the root's is the root.
    pub fn parent(&self, dir: NodeId) -> Result<NodeId> {
        todo("parent")
    }

    /// Target of a symbolic link.
    pub fn readlink(&self, node: NodeId) -> Result<OsString> {
        todo("readlink")
    }

    /// Value of an extended attribute.
    pub fn getxattr(&self, node: NodeId, name: &OsStr) -> Result<Vec<u8>> {
        todo("getxattr")
    }

    /// Sets an extended attribute (value at most 64 KiB, all of a node at most 1 MiB).
    pub fn setxattr(&self, node: NodeId, name: &OsStr, value: &[u8], flags: XattrSet) -> Result<()> {
        todo("setxattr")
    }

    /// Names of the extended attributes.
    pub fn listxattr(&self, node: NodeId) -> Result<Vec<OsString>> {
        todo("listxattr")
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, node: NodeId, name: &OsStr) -> Result<()> {
        todo("removexattr")
    }

    /// The node of `a/b/c`, from the root; symbolic links are not followed. Empty parts are skipped, so `""` and `/` are the root.
    pub fn resolve(&self, path: &str) -> Result<Attr> {
        todo("resolve")
    }

    /// Makes the directories of `a/b/c` that are missing (mode 0755); returns the last.
    pub fn create_dirs(&self, path: &str, uid: u32, gid: u32) -> Result<Attr> {
        todo("create_dirs")
    }

    /// One of a node's names, as a path from the root without a leading `/`; for messages.
    pub fn path_of(&self, node: NodeId) -> Result<String> {
        todo("path_of")
    }

    /// Opens a region.
    pub fn open_region(&self, node: NodeId, access: Access, truncate: bool) -> Result<Handle> {
        todo("open_region")
    }

    /// Checks every sum of a region, or of all.
    pub fn verify(
        &self,
        node: Option<NodeId>,
        progress: &mut dyn FnMut(VerifyProgress),
    ) -> Result<VerifyReport> {
        todo("verify")
    }

    /// Makes everything that is committed durable, in one snapshot.
    pub fn sync(&self) -> Result<()> {
        todo("sync")
    }

    /// Syncs, gives up ownership, and reports what dropping would only log. Handles that are still open keep the pool open.
    pub fn close(self) -> Result<()> {
        todo("close")
    }
}
