//! The tree of names, whole in memory: nodes, directory entries, extended attributes. No I/O, no clock, no locks.
//!
//! Every change marks what it touched in [`Dirty`]; the committer turns that into one catalog transaction
//! (see `pool/commit.rs`). Invariants, checked by [`Tree::check`]:
//!
//! - `nlink` of a directory is 2 + its subdirectories; of anything else the number of entries that lead to it.
//! - A node with `nlink` 0 stays while it is pinned (open), under no name, and goes with the last pin.
//! - A region that never had content committed is *unborn*: it and its names are in no snapshot.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::types::{Attr, DirEntry, NewNode, NodeId, NodeKind, ROOT, SetAttr, Timestamp};

mod attributes;
mod links;
mod numbers;
pub(crate) use links::Gone;
pub(crate) mod record;
use numbers::Numbers;

#[cfg(test)]
mod model_test;
#[cfg(test)]
mod tests;

/// Longest name in bytes.
pub const MAX_NAME: usize = 255;
/// Longest symbolic link target in bytes (`PATH_MAX` less the NUL).
pub const MAX_TARGET: usize = 4095;
/// Longest path that [`Tree::resolve`] takes, in bytes.
pub const MAX_PATH: usize = 4096;
/// Most hard links of a node, as on ext4.
pub const MAX_LINKS: u32 = 65_000;
/// Largest extended attribute value in bytes (`XATTR_SIZE_MAX`).
pub const MAX_XATTR: usize = 64 << 10;
/// Most bytes of names and values of a node's extended attributes together.
pub const MAX_XATTRS: usize = 1 << 20;
const SET_GID: u32 = 0o2000;

/// A name, shared by the maps that hold it.
pub(crate) type Name = Arc<OsStr>;

/// The tree; `L` is what an open region carries.
#[derive(Debug)]
pub(crate) struct Tree<L> {
    nodes: HashMap<NodeId, Node<L>, Numbers>,
    next_node: NodeId,
    regions: u64,
    unsealed: u64,
    pub(crate) dirty: Dirty,
}

/// What changed since the last snapshot was taken.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    /// Nodes whose record changed.
    pub nodes: HashSet<NodeId>,
    /// Entries that came, changed or went.
    pub entries: HashSet<(NodeId, Name)>,
    /// Nodes whose extended attributes changed.
    pub xattrs: HashSet<NodeId>,
    /// Nodes that went and that a catalog may hold.
    pub removed: HashSet<NodeId>,
}

impl Dirty {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.entries.is_empty() && self.xattrs.is_empty() && self.removed.is_empty()
    }

    /// Puts back what a failed snapshot took.
    pub fn merge(&mut self, other: Dirty) {
        self.nodes.extend(other.nodes);
        self.entries.extend(other.entries);
        self.xattrs.extend(other.xattrs);
        self.removed.extend(other.removed);
    }
}

/// A node.
#[derive(Debug)]
pub(crate) struct Node<L> {
    pub kind: NodeKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u64,
    pub size: u64,
    pub allocated: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub crtime: Timestamp,
    pub generation: u64,
    pub body: Body<L>,
    /// Boxed: most nodes have none, and there are many nodes.
    #[allow(clippy::box_collection)]
    pub xattrs: Option<Box<BTreeMap<OsString, Vec<u8>>>>,
    /// Names that lead here.
    pub links: Vec<(NodeId, Name)>,
    /// Whether a catalog may hold a record of it.
    pub stored: bool,
    /// Open handles and pins: the node outlives its names until they are gone.
    pub pins: u32,
}

/// What only some kinds have.
#[derive(Debug)]
pub(crate) enum Body<L> {
    Directory(Box<Directory>),
    Region(Region<L>),
    Symlink(OsString),
    Special,
}

/// Entries of a directory. Cookies rise with every insertion and are never reused, which is what makes `readdir` stable.
#[derive(Debug)]
pub(crate) struct Directory {
    pub parent: NodeId,
    entries: HashMap<Name, Entry>,
    order: BTreeMap<u64, Name>,
    next_cookie: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub node: NodeId,
    pub kind: NodeKind,
    cookie: u64,
}

/// What the tree knows of a region's content.
#[derive(Debug)]
pub(crate) struct Region<L> {
    /// No content was ever committed: not in snapshots.
    pub unborn: bool,
    /// The committed content has valid sums.
    pub sealed: bool,
    /// The one file that is the content, 0 when there is none.
    pub file: u64,
    /// Set while the region is open.
    pub live: Option<Arc<L>>,
}

impl Directory {
    fn new(parent: NodeId) -> Directory {
        Directory { parent, entries: HashMap::new(), order: BTreeMap::new(), next_cookie: 1 }
    }

    pub(crate) fn get(&self, name: &OsStr) -> Option<Entry> {
        self.entries.get(name).copied()
    }

    fn insert(&mut self, name: Name, node: NodeId, kind: NodeKind) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.order.insert(cookie, name.clone());
        self.entries.insert(name, Entry { node, kind, cookie });
    }

    /// Inserts many; `false`: one of the names was there, and which entry it leads to now is open.
    fn extend(&mut self, entries: Vec<(Name, NodeId, NodeKind)>) -> bool {
        let (first, all) = (self.next_cookie, self.entries.len() + entries.len());
        self.next_cookie += entries.len() as u64;
        // Rising keys: made in one go where the directory was empty.
        let mut order = (first..).zip(entries.iter().map(|(name, ..)| name.clone())).collect();
        self.order.append(&mut order);
        self.entries.extend(
            (first..).zip(entries).map(|(cookie, (name, node, kind))| (name, Entry { node, kind, cookie })),
        );
        self.entries.len() == all
    }

    fn remove(&mut self, name: &OsStr) -> Option<(Name, Entry)> {
        let (name, entry) = self.entries.remove_entry(name)?;
        self.order.remove(&entry.cookie);
        Some((name, entry))
    }

    /// Lets an existing name lead elsewhere, at the same place in the order.
    fn redirect(&mut self, name: &OsStr, node: NodeId, kind: NodeKind) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.node = node;
            entry.kind = kind;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl<L> Node<L> {
    fn new(kind: NodeKind, mode: u32, uid: u32, gid: u32, now: Timestamp, body: Body<L>) -> Node<L> {
        Node {
            kind,
            mode: mode & 0o7777,
            uid,
            gid,
            nlink: 0,
            rdev: 0,
            size: 0,
            allocated: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            generation: 0,
            body,
            xattrs: None,
            links: Vec::new(),
            stored: false,
            pins: 0,
        }
    }

    pub(crate) fn attr(&self, node: NodeId) -> Attr {
        Attr {
            node,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            size: self.size,
            allocated: self.allocated,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            crtime: self.crtime,
            rdev: self.rdev,
            generation: self.generation,
        }
    }

    pub(crate) fn region(&self) -> Option<&Region<L>> {
        match &self.body {
            Body::Region(region) => Some(region),
            _ => None,
        }
    }

    pub(crate) fn region_mut(&mut self) -> Option<&mut Region<L>> {
        match &mut self.body {
            Body::Region(region) => Some(region),
            _ => None,
        }
    }
}

pub(crate) fn no_node(node: NodeId) -> Error {
    Error::new(ErrorKind::NotFound, format!("node {node} does not exist"))
}

fn no_name(name: &OsStr) -> Error {
    Error::new(ErrorKind::NotFound, format!("{name:?} does not exist"))
}

/// Refuses what cannot be a name. All bytes but `/` and NUL are fine, newlines too.
pub(crate) fn check_name(name: &OsStr) -> Result<()> {
    let bytes = name.as_encoded_bytes();
    if bytes.len() > MAX_NAME {
        return Err(Error::new(
            ErrorKind::NameTooLong,
            format!("a name of {} bytes; at most {MAX_NAME} are possible", bytes.len()),
        ));
    }
    let why = match bytes {
        [] => "it is empty",
        b"." | b".." => "it is reserved",
        _ if bytes.contains(&b'/') => "it holds a '/'",
        _ if bytes.contains(&0) => "it holds a NUL",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::InvalidName, format!("{name:?} cannot be a name: {why}")))
}

impl<L> Tree<L> {
    /// A tree of nothing but its root.
    pub(crate) fn new(uid: u32, gid: u32, now: Timestamp) -> Tree<L> {
        let mut tree = Tree::empty(ROOT + 1);
        let mut root = Node::new(
            NodeKind::Directory,
            0o755,
            uid,
            gid,
            now,
            Body::Directory(Box::new(Directory::new(ROOT))),
        );
        root.nlink = 2;
        tree.nodes.insert(ROOT, root);
        tree.dirty.nodes.insert(ROOT);
        tree
    }

    /// A tree without even a root, for loading.
    pub(crate) fn empty(next_node: NodeId) -> Tree<L> {
        Tree { nodes: HashMap::default(), next_node, regions: 0, unsealed: 0, dirty: Dirty::default() }
    }

    /// Makes room for so many nodes.
    pub(crate) fn reserve(&mut self, nodes: usize) {
        self.nodes.reserve(nodes);
    }

    pub(crate) fn next_node(&self) -> NodeId {
        self.next_node
    }

    pub(crate) fn node_count(&self) -> u64 {
        self.nodes.len() as u64
    }

    pub(crate) fn region_count(&self) -> u64 {
        self.regions
    }

    /// Regions whose committed content has no valid sums.
    pub(crate) fn unsealed_count(&self) -> u64 {
        self.unsealed
    }

    /// Notes whether a region's committed content has valid sums.
    pub(crate) fn set_sealed(&mut self, id: NodeId, sealed: bool) {
        let Some(region) = self.nodes.get_mut(&id).and_then(Node::region_mut) else { return };
        match (region.sealed, sealed) {
            (true, false) => self.unsealed += 1,
            (false, true) => self.unsealed -= 1,
            _ => {}
        }
        region.sealed = sealed;
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, &Node<L>)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    pub(crate) fn get(&self, node: NodeId) -> Result<&Node<L>> {
        self.nodes.get(&node).ok_or_else(|| no_node(node))
    }

    pub(crate) fn get_mut(&mut self, node: NodeId) -> Result<&mut Node<L>> {
        self.nodes.get_mut(&node).ok_or_else(|| no_node(node))
    }

    pub(crate) fn region(&self, node: NodeId) -> Result<&Region<L>> {
        match &self.get(node)?.body {
            Body::Region(region) => Ok(region),
            Body::Directory(_) => {
                Err(Error::new(ErrorKind::IsDirectory, format!("node {node} is a directory")))
            }
            _ => Err(Error::new(ErrorKind::InvalidArgument, format!("node {node} is not a region"))),
        }
    }

    pub(crate) fn directory(&self, node: NodeId) -> Result<&Directory> {
        match &self.get(node)?.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(Error::new(ErrorKind::NotDirectory, format!("node {node} is not a directory"))),
        }
    }

    fn directory_mut(&mut self, node: NodeId) -> Result<&mut Directory> {
        match &mut self.get_mut(node)?.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(Error::new(ErrorKind::NotDirectory, format!("node {node} is not a directory"))),
        }
    }

    pub(crate) fn entry(&self, parent: NodeId, name: &OsStr) -> Result<Entry> {
        let directory = self.directory(parent)?;
        if name.len() > MAX_NAME {
            check_name(name)?;
        }
        directory.get(name).ok_or_else(|| no_name(name))
    }

    /// The node of a path from the root; empty parts are skipped.
    pub(crate) fn resolve(&self, path: &OsStr) -> Result<NodeId> {
        if path.len() > MAX_PATH {
            return Err(Error::new(
                ErrorKind::NameTooLong,
                format!("a path of {} bytes; at most {MAX_PATH} are possible", path.len()),
            ));
        }
        let mut node = ROOT;
        for part in parts(path) {
            check_name(part)?;
            node = self.entry(node, part).map_err(|error| error.context(format!("path {path:?}")))?.node;
        }
        Ok(node)
    }

    /// One of the paths of a node from the root.
    pub(crate) fn path_of(&self, node: NodeId) -> Result<OsString> {
        let mut names: Vec<Name> = Vec::new();
        let mut at = node;
        while at != ROOT {
            match self.get(at)?.links.first() {
                Some((parent, name)) => {
                    names.push(name.clone());
                    at = *parent;
                }
                None => {
                    names.push(Name::from(OsStr::new("(deleted)")));
                    break;
                }
            }
        }
        let mut path = OsString::new();
        for name in names.iter().rev() {
            if !path.is_empty() {
                path.push("/");
            }
            path.push(name);
        }
        Ok(path)
    }

    /// Up to `max` entries after `cookie`.
    pub(crate) fn readdir(&self, node: NodeId, cookie: u64, max: usize) -> Result<Vec<(u64, DirEntry)>> {
        let directory = self.directory(node)?;
        let after = directory.order.range(cookie.saturating_add(1)..);
        Ok(after
            .take(max)
            .filter_map(|(cookie, name)| {
                let entry = directory.entries.get(name)?;
                Some((*cookie, DirEntry { name: name.to_os_string(), node: entry.node, kind: entry.kind }))
            })
            .collect())
    }

    /// Makes a node. A set-group-id parent hands down its group, and to directories the bit.
    pub(crate) fn create(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        new: &NewNode,
        now: Timestamp,
    ) -> Result<NodeId> {
        check_name(name)?;
        if self.directory(parent)?.get(name).is_some() {
            return Err(Error::new(ErrorKind::Exists, format!("{name:?} exists already")));
        }
        let holder = self.get(parent)?;
        if holder.nlink == 0 {
            return Err(Error::new(ErrorKind::NotFound, format!("directory {parent} was removed")));
        }
        let (mut mode, mut gid) = (new.mode, new.gid);
        if holder.mode & SET_GID != 0 {
            gid = holder.gid;
            if new.kind == NodeKind::Directory {
                mode |= SET_GID;
            }
        }
        let body = match new.kind {
            NodeKind::Directory => Body::Directory(Box::new(Directory::new(parent))),
            NodeKind::Region => Body::Region(Region { unborn: false, sealed: true, file: 0, live: None }),
            NodeKind::Symlink => {
                let target = new.target.clone().unwrap_or_default();
                if target.is_empty() || target.as_encoded_bytes().contains(&0) {
                    return Err(Error::new(
                        ErrorKind::InvalidArgument,
                        format!("symbolic link {name:?} needs a target"),
                    ));
                }
                if target.len() > MAX_TARGET {
                    return Err(Error::new(
                        ErrorKind::NameTooLong,
                        format!("a link target of {} bytes; at most {MAX_TARGET} are possible", target.len()),
                    ));
                }
                Body::Symlink(target)
            }
            _ => Body::Special,
        };
        let mut node = Node::new(new.kind, mode, new.uid, gid, now, body);
        node.nlink = if new.kind == NodeKind::Directory { 2 } else { 1 };
        if let Body::Symlink(target) = &node.body {
            node.size = target.len() as u64;
        }
        if matches!(new.kind, NodeKind::CharDevice | NodeKind::BlockDevice) {
            node.rdev = new.rdev;
        }
        let id = self.next_node;
        self.next_node += 1;
        let name = Name::from(name);
        node.links.push((parent, name.clone()));
        self.regions += u64::from(new.kind == NodeKind::Region);
        self.nodes.insert(id, node);
        self.dirty.nodes.insert(id);
        self.add_entry(parent, name, id, new.kind, now)?;
        Ok(id)
    }

    fn add_entry(
        &mut self,
        parent: NodeId,
        name: Name,
        node: NodeId,
        kind: NodeKind,
        now: Timestamp,
    ) -> Result<()> {
        self.directory_mut(parent)?.insert(name.clone(), node, kind);
        let holder = self.get_mut(parent)?;
        holder.mtime = now;
        holder.ctime = now;
        if kind == NodeKind::Directory {
            holder.nlink += 1;
        }
        self.dirty.nodes.insert(parent);
        self.dirty.entries.insert((parent, name));
        Ok(())
    }

    /// Takes an entry away; the node keeps its count.
    fn take_entry(&mut self, parent: NodeId, name: &OsStr, now: Timestamp) -> Result<Entry> {
        let (name, entry) = self.directory_mut(parent)?.remove(name).ok_or_else(|| no_name(name))?;
        let holder = self.get_mut(parent)?;
        holder.mtime = now;
        holder.ctime = now;
        if entry.kind == NodeKind::Directory {
            holder.nlink -= 1;
        }
        self.dirty.nodes.insert(parent);
        self.dirty.entries.insert((parent, name));
        Ok(entry)
    }

    /// Changes attributes, all but the size.
    pub(crate) fn setattr(&mut self, id: NodeId, set: &SetAttr, now: Timestamp) -> Result<()> {
        let node = self.get_mut(id)?;
        let mut changed = set.ctime.is_some();
        let mut apply = |slot: &mut u32, value: Option<u32>| {
            if let Some(value) = value {
                *slot = value;
                changed = true;
            }
        };
        apply(&mut node.mode, set.mode.map(|mode| mode & 0o7777));
        apply(&mut node.uid, set.uid);
        apply(&mut node.gid, set.gid);
        for (slot, value) in [(&mut node.atime, set.atime), (&mut node.mtime, set.mtime)] {
            if let Some(value) = value {
                *slot = value;
                changed = true;
            }
        }
        if changed {
            node.ctime = set.ctime.unwrap_or(now);
            self.dirty.nodes.insert(id);
        }
        Ok(())
    }

    pub(crate) fn readlink(&self, node: NodeId) -> Result<OsString> {
        match &self.get(node)?.body {
            Body::Symlink(target) => Ok(target.clone()),
            _ => Err(Error::new(ErrorKind::InvalidArgument, format!("node {node} is not a symbolic link"))),
        }
    }

    /// Lets go of a pin. `true`: that was the last hold on the node, which is now gone from the tree: see [`forget`](Self::forget).
    pub(crate) fn unpin(&mut self, node: NodeId) -> bool {
        let Some(held) = self.nodes.get_mut(&node) else { return false };
        held.pins = held.pins.saturating_sub(1);
        held.pins == 0 && held.nlink == 0
    }

    /// Removes a node that has no name and no pin.
    pub(crate) fn forget(&mut self, id: NodeId) -> Option<Node<L>> {
        let node = self.nodes.remove(&id)?;
        self.regions -= u64::from(node.kind == NodeKind::Region);
        self.unsealed -= u64::from(node.region().is_some_and(|region| !region.sealed));
        self.dirty.nodes.remove(&id);
        self.dirty.xattrs.remove(&id);
        if node.stored {
            self.dirty.removed.insert(id);
        }
        Some(node)
    }

    /// Marks a region's record and all its names, for when it is born.
    pub(crate) fn mark_born(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if let Body::Region(region) = &mut node.body {
            region.unborn = false;
        }
        if node.nlink == 0 {
            return;
        }
        for link in &node.links {
            self.dirty.entries.insert(link.clone());
        }
        if node.xattrs.is_some() {
            self.dirty.xattrs.insert(id);
        }
        self.dirty.nodes.insert(id);
    }
}

/// The parts of a path that are names.
pub(crate) fn parts(path: &OsStr) -> impl Iterator<Item = &OsStr> {
    use std::os::unix::ffi::OsStrExt;
    path.as_bytes().split(|byte| *byte == b'/').filter(|part| !part.is_empty()).map(OsStr::from_bytes)
}
