//! Names: lookup, creation, removal, rename, listing, and the same read-only for the virtual trees.

use std::ffi::{OsStr, OsString};

use engine::{Attr, Handle, NewNode, NodeId, NodeKind, ROOT, RenameFlags, Timestamp};

use super::nodes::lock;
use super::views::{VNode, may_hold_tensors};
use super::{Caller, Entry, Fs, is_virtual};
use crate::error::{Errno, FsResult};

const TENSORS: &str = ".tensors";
const CONTROL: &str = ".nvtier";
const SET_GID: u32 = 0o2000;
/// Entries asked of the engine at a time while listing.
const BATCH: usize = 256;
/// Listing offsets 1 and 2 follow `.` and `..`; the engine's cookies come after them.
const DOTS: u64 = 2;

/// What to create.
#[derive(Debug, Clone)]
pub struct NewNodeRequest {
    /// Kind of node.
    pub kind: NodeKind,
    /// Permission bits, the caller's umask already applied.
    pub mode: u32,
    /// Device number, for device nodes.
    pub rdev: u64,
    /// Target, for symbolic links.
    pub target: Option<OsString>,
}

/// One name of a listing.
#[derive(Debug)]
pub struct DirectoryEntry<'a> {
    /// Inode number.
    pub ino: u64,
    /// Kind.
    pub kind: NodeKind,
    /// Name.
    pub name: &'a OsStr,
    /// Where the listing goes on after this entry.
    pub next: u64,
    /// Attributes, when asked for (`readdirplus`). Handing them over counts as a lookup, but for `.` and `..`.
    pub entry: Option<Entry>,
}

impl<B: Send + Sync + 'static> Fs<B> {
    /// Finds a name and counts one lookup of what it finds.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> FsResult<Entry> {
        self.check_alive()?;
        if is_virtual(parent) {
            return self.lookup_virtual(parent, name);
        }
        if let Some(node) = reserved(parent, name) {
            return self.remember_virtual(node);
        }
        let attr = self.pool.lookup(parent, name)?;
        Ok(self.remember(attr))
    }

    /// Takes back `count` lookups.
    pub fn forget(&self, ino: u64, count: u64) {
        if is_virtual(ino) {
            self.virtual_nodes.forget(ino, count);
        } else {
            self.nodes.forget(ino, count);
        }
    }

    fn remember(&self, attr: Attr) -> Entry {
        self.nodes.remember(attr.node);
        self.entry(attr)
    }

    fn remember_virtual(&self, node: VNode) -> FsResult<Entry> {
        let ino = self.virtual_nodes.remember(node);
        self.virtual_entry(node, ino).inspect_err(|_| self.virtual_nodes.forget(ino, 1))
    }

    fn lookup_virtual(&self, parent: u64, name: &OsStr) -> FsResult<Entry> {
        match self.virtual_nodes.get(parent)? {
            VNode::Control => {
                let node = control_files().find(|(known, _)| *known == name).ok_or(Errno::ENOENT)?.1;
                self.remember_virtual(node)
            }
            VNode::Tensors(directory) => {
                let attr = self.pool.lookup(directory, name)?;
                match attr.kind {
                    NodeKind::Directory => self.remember_virtual(VNode::Tensors(attr.node)),
                    NodeKind::Region if may_hold_tensors(name) => {
                        self.remember_virtual(VNode::TensorFile { region: attr.node, parent: directory })
                    }
                    // A relative link means the same here as in the tree that this one mirrors.
                    NodeKind::Symlink => Ok(self.remember(attr)),
                    _ => Err(Errno::ENOENT),
                }
            }
            VNode::TensorFile { region, .. } => {
                let listing = self.listings.get(&self.pool, region).map_err(|_| Errno::ENOENT)?;
                let index = listing.find(name).ok_or(Errno::ENOENT)?;
                self.remember_virtual(VNode::View { region, epoch: listing.epoch, index })
            }
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// Creates a node; like a lookup it counts one reference.
    pub fn make_node(
        &self,
        parent: u64,
        name: &OsStr,
        request: NewNodeRequest,
        caller: Caller,
    ) -> FsResult<Entry> {
        let node = self.new_node(parent, name, request, caller)?;
        let attr = self.pool.create(parent, name, &node)?;
        Ok(self.remember(attr))
    }

    /// Creates a file for somebody who is going to write it. What is returned beside it keeps it out of snapshots until he has opened it.
    pub fn make_file(
        &self,
        parent: u64,
        name: &OsStr,
        request: NewNodeRequest,
        caller: Caller,
    ) -> FsResult<(Entry, Handle)> {
        let node = self.new_node(parent, name, request, caller)?;
        let (attr, created) = self.pool.create_open(parent, name, &node)?;
        Ok((self.remember(attr), created))
    }

    fn new_node(
        &self,
        parent: u64,
        name: &OsStr,
        request: NewNodeRequest,
        caller: Caller,
    ) -> FsResult<NewNode> {
        self.check_writable(parent)?;
        if reserved(parent, name).is_some() {
            return Err(Errno::EEXIST);
        }
        // A set-group-id directory hands its group on, and itself to directories (inode_init_owner in the kernel).
        let above = self.pool.getattr(parent)?;
        let inherits = above.mode & SET_GID != 0;
        let gid = if inherits { above.gid } else { caller.gid };
        let mut mode = request.mode & 0o7777;
        if inherits && request.kind == NodeKind::Directory {
            mode |= SET_GID;
        }
        Ok(NewNode {
            kind: request.kind,
            mode,
            uid: caller.uid,
            gid,
            rdev: request.rdev,
            target: request.target,
        })
    }

    /// Gives a node one more name.
    pub fn link(&self, ino: u64, parent: u64, name: &OsStr) -> FsResult<Entry> {
        self.check_writable(ino)?;
        self.check_writable(parent)?;
        if reserved(parent, name).is_some() {
            return Err(Errno::EEXIST);
        }
        let attr = self.pool.link(ino, parent, name)?;
        Ok(self.remember(attr))
    }

    /// Removes a name that is no directory.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> FsResult<()> {
        self.check_writable(parent)?;
        if reserved(parent, name).is_some() {
            return Err(Errno::EISDIR);
        }
        let victim = self.pool.lookup(parent, name).ok();
        self.pool.unlink(parent, name)?;
        self.keep_orphan(victim);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: u64, name: &OsStr) -> FsResult<()> {
        self.check_writable(parent)?;
        if reserved(parent, name).is_some() {
            return Err(Errno::EBUSY);
        }
        let victim = self.pool.lookup(parent, name).ok();
        self.pool.rmdir(parent, name)?;
        self.keep_orphan(victim);
        Ok(())
    }

    /// Moves a name, replacing, refusing or exchanging what is at the new place.
    pub fn rename(
        &self,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: RenameFlags,
    ) -> FsResult<()> {
        self.check_writable(parent)?;
        self.check_writable(new_parent)?;
        if reserved(parent, name).is_some() || reserved(new_parent, new_name).is_some() {
            return Err(Errno::EBUSY);
        }
        let victim = if flags.exchange { None } else { self.pool.lookup(new_parent, new_name).ok() };
        let moved = self.pool.lookup(parent, name)?;
        self.pool.rename(parent, name, new_parent, new_name, flags)?;
        // Renaming one of two names of a node onto the other removes nothing.
        self.keep_orphan(victim.filter(|victim| victim.node != moved.node));
        Ok(())
    }

    /// Remembers the attributes of a node that lost its last name while the kernel still refers to it.
    fn keep_orphan(&self, victim: Option<Attr>) {
        let Some(attr) = victim else { return };
        let last = attr.kind == NodeKind::Directory || attr.nlink <= 1;
        if let (true, Some(node)) = (last, self.nodes.get(attr.node)) {
            *lock(&node.orphan) = Some(Attr { nlink: 0, ctime: Timestamp::now(), ..attr });
        }
    }

    /// Target of a symbolic link.
    pub fn readlink(&self, ino: u64) -> FsResult<OsString> {
        self.check_alive()?;
        if is_virtual(ino) { Err(Errno::EINVAL) } else { Ok(self.pool.readlink(ino)?) }
    }

    /// Lists a directory from `offset` (0 or the `next` of an earlier entry) until `emit` returns true for "full". An entry that
    /// did not fit is not counted as looked up.
    pub fn read_dir(
        &self,
        ino: u64,
        offset: u64,
        with_attributes: bool,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> bool,
    ) -> FsResult<()> {
        self.check_alive()?;
        if offset < DOTS {
            let this = Entry { ..self.getattr(ino)? };
            let above = self.parent_ino(ino)?;
            for (position, name, ino) in [(0, ".", ino), (1, "..", above)] {
                let entry = with_attributes
                    .then_some(Entry { attr: Attr { node: ino, ..this.attr }, validity: this.validity });
                let name = OsStr::new(name);
                let dot = DirectoryEntry { ino, kind: NodeKind::Directory, name, next: position + 1, entry };
                if position >= offset && emit(&dot) {
                    return Ok(());
                }
            }
        }
        let cookie = offset.saturating_sub(DOTS);
        if !is_virtual(ino) {
            return self.read_real(ino, cookie, with_attributes, emit);
        }
        match self.virtual_nodes.get(ino)? {
            VNode::Control => {
                let files = control_files().map(|(name, node)| (OsString::from(name), node));
                self.read_virtual(files, cookie, with_attributes, emit)
            }
            VNode::TensorFile { region, .. } => {
                // A damaged header shows as an empty directory; user.nvtier.error of it says what is wrong.
                let Ok(listing) = self.listings.get(&self.pool, region) else { return Ok(()) };
                let epoch = listing.epoch;
                let views = listing
                    .entries
                    .iter()
                    .map(|(name, index)| (name.clone(), VNode::View { region, epoch, index: *index }));
                self.read_virtual(views, cookie, with_attributes, emit)
            }
            VNode::Tensors(directory) => self.read_mirror(directory, cookie, with_attributes, emit),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn read_real(
        &self,
        directory: NodeId,
        mut cookie: u64,
        with_attributes: bool,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> bool,
    ) -> FsResult<()> {
        loop {
            let batch = self.pool.readdir(directory, cookie, BATCH)?;
            let Some((last, _)) = batch.last() else { return Ok(()) };
            cookie = *last;
            for (next, found) in batch {
                if reserved(directory, &found.name).is_some() {
                    continue;
                }
                let entry = if with_attributes {
                    // Gone since the batch was read: POSIX leaves open whether it is listed.
                    let Ok(attr) = self.pool.getattr(found.node) else { continue };
                    Some(self.entry(attr))
                } else {
                    None
                };
                let out = DirectoryEntry {
                    ino: found.node,
                    kind: found.kind,
                    name: &found.name,
                    next: next + DOTS,
                    entry,
                };
                if emit(&out) {
                    return Ok(());
                }
                if with_attributes {
                    self.nodes.remember(found.node);
                }
            }
        }
    }

    fn read_mirror(
        &self,
        directory: NodeId,
        mut cookie: u64,
        with_attributes: bool,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> bool,
    ) -> FsResult<()> {
        loop {
            let batch = self.pool.readdir(directory, cookie, BATCH)?;
            let Some((last, _)) = batch.last() else { return Ok(()) };
            cookie = *last;
            for (next, found) in batch {
                let node = match found.kind {
                    _ if reserved(directory, &found.name).is_some() => continue,
                    NodeKind::Directory => Some(VNode::Tensors(found.node)),
                    NodeKind::Region if may_hold_tensors(&found.name) => {
                        Some(VNode::TensorFile { region: found.node, parent: directory })
                    }
                    NodeKind::Symlink if may_hold_tensors(&found.name) => None,
                    _ => continue,
                };
                let next = next + DOTS;
                let full = match node {
                    Some(node) => self.emit_virtual(node, &found.name, next, with_attributes, emit),
                    None => {
                        let entry = match with_attributes.then(|| self.pool.getattr(found.node)) {
                            Some(Ok(attr)) => Some(self.entry(attr)),
                            Some(Err(_)) => continue,
                            None => None,
                        };
                        let name = &found.name;
                        let (ino, kind) = (found.node, found.kind);
                        let full = emit(&DirectoryEntry { ino, kind, name, next, entry });
                        if !full && with_attributes {
                            self.nodes.remember(ino);
                        }
                        full
                    }
                };
                if full {
                    return Ok(());
                }
            }
        }
    }

    fn read_virtual(
        &self,
        nodes: impl Iterator<Item = (OsString, VNode)>,
        cookie: u64,
        with_attributes: bool,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> bool,
    ) -> FsResult<()> {
        for (position, (name, node)) in nodes.enumerate().skip(cookie as usize) {
            let next = position as u64 + 1 + DOTS;
            if self.emit_virtual(node, &name, next, with_attributes, emit) {
                break;
            }
        }
        Ok(())
    }

    fn emit_virtual(
        &self,
        node: VNode,
        name: &OsStr,
        next: u64,
        with_attributes: bool,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> bool,
    ) -> bool {
        let kind = if node.is_directory() { NodeKind::Directory } else { NodeKind::Region };
        if !with_attributes {
            return emit(&DirectoryEntry { ino: node.ino(), kind, name, next, entry: None });
        }
        let Ok(entry) = self.remember_virtual(node) else { return false };
        let ino = entry.attr.node;
        let full = emit(&DirectoryEntry { ino, kind, name, next, entry: Some(entry) });
        if full {
            self.virtual_nodes.forget(ino, 1);
        }
        full
    }

    fn parent_ino(&self, ino: u64) -> FsResult<u64> {
        if !is_virtual(ino) {
            return Ok(self.pool.parent(ino).unwrap_or(ROOT));
        }
        Ok(match self.virtual_nodes.get(ino)? {
            VNode::Tensors(ROOT) | VNode::Control => ROOT,
            VNode::Tensors(directory) => VNode::Tensors(self.pool.parent(directory)?).ino(),
            VNode::TensorFile { parent, .. } => VNode::Tensors(parent).ino(),
            _ => return Err(Errno::ENOTDIR),
        })
    }
}

/// The virtual trees of the root. Their names cannot be created, and listings of the root leave them out so that `cp -r` and
/// `rsync` of a pool copy the pool's files only.
fn reserved(parent: u64, name: &OsStr) -> Option<VNode> {
    match name.to_str() {
        Some(TENSORS) if parent == ROOT => Some(VNode::Tensors(ROOT)),
        Some(CONTROL) if parent == ROOT => Some(VNode::Control),
        _ => None,
    }
}

fn control_files() -> impl Iterator<Item = (&'static str, VNode)> {
    [("metrics", VNode::Metrics), ("stats.json", VNode::Stats), ("version", VNode::Version)].into_iter()
}
