//! The calls on names.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::generations::Dead;
use super::live::Live;
use super::{Pool, Shared, read, write};
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::namespace::{self, Node};
use crate::types::{
    Access, Attr, DirEntry, NewNode, NodeId, NodeKind, ROOT, RenameFlags, SetAttr, Timestamp, XattrSet,
};

/// The engine keeps notes of its own in attributes of this start: nobody else sees them.
fn not_ours(name: &OsStr, kind: ErrorKind) -> Result<()> {
    match name.as_encoded_bytes().starts_with(crate::scrub::OWN_XATTRS.as_bytes()) {
        true => Err(Error::new(kind, format!("attribute {name:?} is the pool's own"))),
        false => Ok(()),
    }
}

/// Attributes as they are now: what is being written knows its size and time best. Called without the tree's lock: this may
/// be a system call.
fn attr_now(shared: &Shared, (mut attr, live): (Attr, Option<Arc<Live>>)) -> Result<Attr> {
    let Some(live) = live else { return Ok(attr) };
    let Some(draft) = live.draft() else {
        // A draft that ended since has left what it knew with the node.
        return Ok(read(&shared.tree).get(attr.node)?.attr(attr.node));
    };
    let modified;
    (attr.size, attr.allocated, modified) = draft.stat(&live);
    if let Some(modified) = modified {
        attr.mtime = modified;
        attr.ctime = attr.ctime.max(modified);
    }
    Ok(attr)
}

fn snapshot(id: NodeId, node: &Node<Live>) -> (Attr, Option<Arc<Live>>) {
    (node.attr(id), node.region().and_then(|region| region.live.clone()))
}

impl Shared {
    /// Before a region changes its name: what is written so far gets one to change.
    pub(super) fn settle(self: &Arc<Self>, parent: NodeId, name: &OsStr) -> Result<()> {
        let live = {
            let tree = read(&self.tree);
            let Ok(entry) = tree.entry(parent, name) else { return Ok(()) };
            tree.get(entry.node)?.region().and_then(|region| region.live.clone())
        };
        match live.filter(|live| live.draft().is_some()) {
            Some(live) => self.commit_live(&live),
            None => Ok(()),
        }
    }

    /// A node that lost its last name and that nobody has open.
    fn bury_node(
        self: &Arc<Self>,
        tree: &mut namespace::Tree<Live>,
        gone: Option<namespace::Gone>,
    ) -> Option<(NodeId, Node<Live>)> {
        let gone = gone.filter(|gone| !gone.pinned)?;
        tree.forget(gone.node).map(|node| (gone.node, node))
    }
}

impl Pool {
    fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// The node of a name.
    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Attr> {
        let found = {
            let tree = read(&self.shared().tree);
            let entry = tree.entry(parent, name)?;
            snapshot(entry.node, tree.get(entry.node)?)
        };
        attr_now(self.shared(), found)
    }

    /// Attributes of a node.
    pub fn getattr(&self, node: NodeId) -> Result<Attr> {
        let found = snapshot(node, read(&self.shared().tree).get(node)?);
        attr_now(self.shared(), found)
    }

    /// Changes attributes. A new size is committed at once when nobody has the region open for writing.
    pub fn setattr(&self, node: NodeId, set: &SetAttr) -> Result<Attr> {
        let shared = self.shared();
        shared.check_writable()?;
        let now = Timestamp::now();
        let mut set = *set;
        if let Some(size) = set.size {
            let (attr, live) = {
                let tree = read(&shared.tree);
                tree.region(node)?;
                snapshot(node, tree.get(node)?)
            };
            let writing = live.is_some_and(|live| live.draft().is_some());
            if writing || attr.size != size {
                self.set_size(node, size)?;
            }
            // POSIX: ftruncate marks both times, also where the size stays.
            if !writing {
                set.mtime = set.mtime.or(Some(now));
            }
            set.ctime = set.ctime.or(Some(now));
        }
        // The draft first, then the node: see `Live::times_set`.
        if let Some(mtime) = set.mtime {
            let live = read(&shared.tree).get(node)?.region().and_then(|region| region.live.clone());
            if let Some(live) = live
                && let Some(draft) = live.draft()
            {
                live.set_modified(&draft, mtime)?;
            }
        }
        {
            let mut tree = write(&shared.tree);
            tree.setattr(node, &set, now)?;
            if set.mtime.is_some()
                && let Some(live) = tree.get(node)?.region().and_then(|region| region.live.as_ref())
            {
                live.note_time_set();
            }
        }
        self.getattr(node)
    }

    /// Makes a node of any kind.
    pub fn create(&self, parent: NodeId, name: &OsStr, new: &NewNode) -> Result<Attr> {
        let shared = self.shared();
        shared.check_writable()?;
        let mut tree = write(&shared.tree);
        let node = tree.create(parent, name, new, Timestamp::now())?;
        Ok(tree.get(node)?.attr(node))
    }

    /// Makes a region and opens it for writing, as one step: no snapshot holds it empty before its writer came. It appears in snapshots with
    /// its first content that is committed, as any new region does.
    pub fn create_open(&self, parent: NodeId, name: &OsStr, new: &NewNode) -> Result<(Attr, Handle)> {
        let shared = self.shared();
        shared.check_writable()?;
        let attr = {
            let mut tree = write(&shared.tree);
            let node = tree.create(parent, name, new, Timestamp::now())?;
            let held = tree.get_mut(node)?;
            if let Some(region) = held.region_mut() {
                region.unborn = true;
            }
            held.attr(node)
        };
        match self.open_region(attr.node, Access::Write, false) {
            Ok(handle) => Ok((attr, handle)),
            Err(error) => {
                write(&shared.tree).mark_born(attr.node);
                Err(error)
            }
        }
    }

    /// Gives a node one more name.
    pub fn link(&self, node: NodeId, parent: NodeId, name: &OsStr) -> Result<Attr> {
        let shared = self.shared();
        shared.check_writable()?;
        write(&shared.tree).link(node, parent, name, Timestamp::now())?;
        self.getattr(node)
    }

    /// Takes away a name that is not a directory's.
    pub fn unlink(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        let shared = self.shared();
        shared.check_writable()?;
        let mut dead = Dead::new();
        {
            let mut tree = write(&shared.tree);
            let gone = tree.unlink(parent, name, Timestamp::now())?;
            if let Some(gone) = gone {
                shared.drop_generations(&mut tree, gone.node, &mut dead);
            }
            dead.extend(shared.bury_node(&mut tree, gone));
        }
        shared.purge_all(dead);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        let shared = self.shared();
        shared.check_writable()?;
        let mut tree = write(&shared.tree);
        let gone = tree.rmdir(parent, name, Timestamp::now())?;
        shared.bury_node(&mut tree, gone);
        Ok(())
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
        let shared = self.shared();
        shared.check_writable()?;
        shared.settle(parent, name)?;
        if flags.exchange {
            shared.settle(new_parent, new_name)?;
        }
        let mut dead = Dead::new();
        let done = {
            let mut tree = write(&shared.tree);
            let (now, target) = (Timestamp::now(), (new_parent, new_name));
            let aside = shared.set_aside(&mut tree, (parent, name), target, flags, now)?;
            match tree.rename(parent, name, new_parent, new_name, flags, now) {
                Ok(gone) => {
                    if let Some(gone) = gone.filter(|_| aside.is_none()) {
                        shared.drop_generations(&mut tree, gone.node, &mut dead);
                    }
                    dead.extend(shared.bury_node(&mut tree, gone));
                    match aside {
                        Some(aside) => tree.entry(new_parent, new_name).and_then(|new| {
                            shared.set_aside_done(&mut tree, aside, new.node, now, &mut dead)
                        }),
                        None => Ok(()),
                    }
                }
                Err(error) => {
                    if let Some(aside) = aside {
                        shared.bring_back(&mut tree, aside, target, now);
                    }
                    Err(error)
                }
            }
        };
        shared.purge_all(dead);
        done
    }

    /// Up to `max` entries after `cookie` (0: from the start), each with the cookie that follows it; without `.` and `..`.
    /// An entry that stays is seen exactly once by a reader, whatever is made and removed meanwhile.
    pub fn readdir(&self, node: NodeId, cookie: u64, max: usize) -> Result<Vec<(u64, DirEntry)>> {
        read(&self.shared().tree).readdir(node, cookie, max)
    }

    /// The directory that holds a directory; the root's is the root.
    pub fn parent(&self, dir: NodeId) -> Result<NodeId> {
        Ok(read(&self.shared().tree).directory(dir)?.parent)
    }

    /// Target of a symbolic link.
    pub fn readlink(&self, node: NodeId) -> Result<OsString> {
        read(&self.shared().tree).readlink(node)
    }

    /// Value of an extended attribute.
    pub fn getxattr(&self, node: NodeId, name: &OsStr) -> Result<Vec<u8>> {
        not_ours(name, ErrorKind::NoAttribute)?;
        read(&self.shared().tree).getxattr(node, name)
    }

    /// Sets an extended attribute (value at most 64 KiB, all of a node at most 1 MiB).
    pub fn setxattr(&self, node: NodeId, name: &OsStr, value: &[u8], flags: XattrSet) -> Result<()> {
        let shared = self.shared();
        shared.check_writable()?;
        not_ours(name, ErrorKind::PermissionDenied)?;
        write(&shared.tree).setxattr(node, name, value, flags, Timestamp::now())
    }

    /// Names of the extended attributes.
    pub fn listxattr(&self, node: NodeId) -> Result<Vec<OsString>> {
        let mut names = read(&self.shared().tree).listxattr(node)?;
        names.retain(|name| not_ours(name, ErrorKind::NoAttribute).is_ok());
        Ok(names)
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, node: NodeId, name: &OsStr) -> Result<()> {
        let shared = self.shared();
        shared.check_writable()?;
        not_ours(name, ErrorKind::NoAttribute)?;
        write(&shared.tree).removexattr(node, name, Timestamp::now())
    }

    /// The node of `a/b/c`, from the root; symbolic links are not followed. Empty parts are skipped, so `""` and `/` are the root.
    pub fn resolve(&self, path: &str) -> Result<Attr> {
        let found = {
            let tree = read(&self.shared().tree);
            let node = tree.resolve(OsStr::new(path))?;
            snapshot(node, tree.get(node)?)
        };
        attr_now(self.shared(), found)
    }

    /// Makes the directories of `a/b/c` that are missing (mode 0755); returns the last.
    pub fn create_dirs(&self, path: &str, uid: u32, gid: u32) -> Result<Attr> {
        if path.len() > namespace::MAX_PATH {
            let text =
                format!("a path of {} bytes; at most {} are possible", path.len(), namespace::MAX_PATH);
            return Err(Error::new(ErrorKind::NameTooLong, text));
        }
        let new = NewNode { kind: NodeKind::Directory, mode: 0o755, uid, gid, rdev: 0, target: None };
        let mut at = self.getattr(ROOT)?;
        for part in namespace::parts(OsStr::new(path)) {
            at = match self.lookup(at.node, part) {
                Err(error) if error.kind() == ErrorKind::NotFound => match self.create(at.node, part, &new) {
                    // Somebody else was faster.
                    Err(error) if error.kind() == ErrorKind::Exists => self.lookup(at.node, part)?,
                    made => made?,
                },
                found => found?,
            };
            if at.kind != NodeKind::Directory {
                return Err(Error::new(
                    ErrorKind::NotDirectory,
                    format!("{part:?} in {path:?} is not a directory"),
                ));
            }
        }
        Ok(at)
    }

    /// One of a node's names, as a path from the root without a leading `/`; for messages.
    pub fn path_of(&self, node: NodeId) -> Result<String> {
        Ok(read(&self.shared().tree).path_of(node)?.to_string_lossy().into_owned())
    }
}
