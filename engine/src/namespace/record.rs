//! Catalog records of nodes, entries and extended attributes.
//!
//! Little-endian, except keys, which are big-endian so that they sort. Every value starts with a version byte and ends with a
//! CRC-32 over its key and all bytes before the sum: a record under a wrong key is found as well. `docs/format.md` draws them.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::{Body, Directory, MAX_TARGET, Name, Node, Region, Tree, check_name};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{NodeId, NodeKind, ROOT, Timestamp};

/// Version of all three encodings.
pub(crate) const VERSION: u8 = 1;
const SEALED: u8 = 1;

/// Key of a node: its number, big-endian.
pub(crate) fn node_key(node: NodeId) -> [u8; 8] {
    node.to_be_bytes()
}

/// Key of an entry (`node`: the directory) or of an extended attribute: the number, big-endian, then the name.
pub(crate) fn name_key(node: NodeId, name: &OsStr) -> Vec<u8> {
    let mut key = Vec::with_capacity(8 + name.len());
    key.extend_from_slice(&node.to_be_bytes());
    key.extend_from_slice(name.as_bytes());
    key
}

/// The number in a key, and the name after it.
pub(crate) fn split_key(key: &[u8]) -> Result<(NodeId, &OsStr)> {
    match key.split_first_chunk::<8>() {
        Some((node, name)) => Ok((NodeId::from_be_bytes(*node), OsStr::from_bytes(name))),
        None => Err(corrupt(format!("a key of {} bytes", key.len()))),
    }
}

fn corrupt(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

fn sum(key: &[u8], body: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(body);
    hasher.finalize().to_le_bytes()
}

fn seal(key: &[u8], mut value: Vec<u8>) -> Vec<u8> {
    let sum = sum(key, &value);
    value.extend_from_slice(&sum);
    value
}

/// Checks sum and version; returns what is between them.
fn open<'a>(what: &dyn Display, key: &[u8], value: &'a [u8]) -> Result<&'a [u8]> {
    let Some((body, stored)) = value.split_last_chunk::<4>() else {
        return Err(corrupt(format!("{what} has {} bytes", value.len())));
    };
    if sum(key, body) != *stored {
        return Err(corrupt(format!("{what} fails its checksum")));
    }
    match body.split_first() {
        Some((&VERSION, rest)) => Ok(rest),
        Some((&version, _)) if version > VERSION => Err(Error::new(
            ErrorKind::NewerFormat,
            format!("{what} has version {version}, this program knows {VERSION}: use a newer nvtier"),
        )),
        _ => Err(corrupt(format!("{what} has no known version"))),
    }
}

/// Reads integers off a slice.
struct Reader<'a> {
    bytes: &'a [u8],
    what: &'a dyn Display,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (first, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or_else(|| corrupt(format!("{} is cut short", self.what)))?;
        self.bytes = rest;
        Ok(*first)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.take::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn time(&mut self) -> Result<Timestamp> {
        let (secs, nanos) = (self.u64()? as i64, self.u32()?);
        if nanos >= 1_000_000_000 {
            return Err(corrupt(format!("{} holds a time with {nanos} nanoseconds", self.what)));
        }
        Ok(Timestamp { secs, nanos })
    }
}

/// The record of a node.
pub(crate) fn encode_node<L>(id: NodeId, node: &Node<L>) -> Vec<u8> {
    let mut value = Vec::with_capacity(128);
    let (flags, file) = match &node.body {
        Body::Region(region) => (if region.sealed { SEALED } else { 0 }, region.file),
        _ => (0, 0),
    };
    value.extend_from_slice(&[VERSION, node.kind as u8, flags, 0]);
    for field in [node.mode, node.uid, node.gid, node.nlink] {
        value.extend_from_slice(&field.to_le_bytes());
    }
    for field in [node.rdev, node.size, node.allocated, node.generation, file] {
        value.extend_from_slice(&field.to_le_bytes());
    }
    for time in [node.atime, node.mtime, node.ctime, node.crtime] {
        value.extend_from_slice(&time.secs.to_le_bytes());
        value.extend_from_slice(&time.nanos.to_le_bytes());
    }
    if let Body::Symlink(target) = &node.body {
        value.extend_from_slice(target.as_bytes());
    }
    seal(&node_key(id), value)
}

/// Reads a node back. A directory has no entries yet and no parent.
pub(crate) fn decode_node<L>(key: &[u8], value: &[u8]) -> Result<(NodeId, Node<L>)> {
    let (id, _) = split_key(key)?;
    let what = format_args!("record of node {id}");
    let mut reader = Reader { bytes: open(&what, key, value)?, what: &what };
    let kind = reader.u8()?;
    let kind = NodeKind::from_u8(kind).ok_or_else(|| corrupt(format!("{what} has kind {kind}")))?;
    let flags = reader.u8()?;
    reader.u8()?;
    let (mode, uid, gid, nlink) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
    let (rdev, size, allocated, generation, file) =
        (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
    let (atime, mtime, ctime, crtime) = (reader.time()?, reader.time()?, reader.time()?, reader.time()?);
    let body = match kind {
        NodeKind::Directory => Body::Directory(Box::new(Directory::new(ROOT))),
        NodeKind::Region => {
            Body::Region(Region { unborn: false, sealed: flags & SEALED != 0, file, live: None })
        }
        NodeKind::Symlink if !(1..=MAX_TARGET).contains(&reader.bytes.len()) || reader.bytes.contains(&0) => {
            return Err(corrupt(format!("{what} is a symbolic link to {} bytes", reader.bytes.len())));
        }
        NodeKind::Symlink => Body::Symlink(OsString::from_vec(reader.bytes.to_vec())),
        _ => Body::Special,
    };
    let node = Node {
        kind,
        mode,
        uid,
        gid,
        nlink,
        rdev,
        size,
        allocated,
        atime,
        mtime,
        ctime,
        crtime,
        generation,
        body,
        xattrs: None,
        links: Vec::new(),
        stored: true,
        pins: 0,
    };
    Ok((id, node))
}

/// The record of an entry.
pub(crate) fn encode_entry(key: &[u8], node: NodeId, kind: NodeKind) -> Vec<u8> {
    let mut value = Vec::with_capacity(14);
    value.extend_from_slice(&[VERSION, kind as u8]);
    value.extend_from_slice(&node.to_le_bytes());
    seal(key, value)
}

/// The record of an extended attribute.
pub(crate) fn encode_xattr(key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(data.len() + 5);
    value.push(VERSION);
    value.extend_from_slice(data);
    seal(key, value)
}

/// Names of one directory, as they are loaded.
#[derive(Debug)]
struct Listing {
    parent: NodeId,
    entries: Vec<(Name, NodeId, NodeKind)>,
}

/// Entries that were read and checked one by one, but are in no tree yet.
#[derive(Debug, Default)]
pub(crate) struct Entries(Vec<Listing>);

impl Entries {
    /// Takes a record; those of a directory come one after another.
    pub(crate) fn record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let (parent, name) = split_key(key)?;
        let what = format_args!("entry {name:?} of directory {parent}");
        check_name(name).map_err(|error| Error::with_source(ErrorKind::Corrupt, what.to_string(), error))?;
        let mut reader = Reader { bytes: open(&what, key, value)?, what: &what };
        let kind = reader.u8()?;
        let kind = NodeKind::from_u8(kind).ok_or_else(|| corrupt(format!("{what} has kind {kind}")))?;
        let entry = (Name::from(name), reader.u64()?, kind);
        match self.0.last_mut() {
            Some(listing) if listing.parent == parent => listing.entries.push(entry),
            _ => self.0.push(Listing { parent, entries: vec![entry] }),
        }
        Ok(())
    }
}

impl<L> Tree<L> {
    /// Loading, step 1: a node.
    pub(crate) fn add_node(&mut self, id: NodeId, node: Node<L>) -> Result<()> {
        if id == 0 || id >= self.next_node {
            return Err(corrupt(format!(
                "node {id} was never given out: the next number is {}",
                self.next_node
            )));
        }
        self.regions += u64::from(node.kind == NodeKind::Region);
        self.unsealed += u64::from(node.region().is_some_and(|region| !region.sealed));
        self.nodes.insert(id, node);
        Ok(())
    }

    /// Loading, step 2, after all nodes: entries.
    pub(crate) fn add_entries(&mut self, entries: Entries) -> Result<()> {
        for Listing { parent, entries } in entries.0 {
            let what = |name: &Name| format!("entry {name:?} of directory {parent}");
            for (name, id, kind) in &entries {
                match self.nodes.get_mut(id) {
                    Some(node) if node.kind == *kind => {
                        if let Body::Directory(directory) = &mut node.body {
                            directory.parent = parent;
                        }
                        if node.links.is_empty() {
                            node.links.reserve_exact(1); // most nodes have no other name
                        }
                        node.links.push((parent, name.clone()));
                    }
                    Some(node) => {
                        let context = format!("{} says {kind:?}, node {id} is {:?}", what(name), node.kind);
                        return Err(corrupt(context));
                    }
                    None => {
                        let context = format!("{} leads to node {id}, which does not exist", what(name));
                        return Err(corrupt(context));
                    }
                }
            }
            let Some((first, ..)) = entries.first() else { continue };
            let first = what(first);
            let directory = self
                .directory_mut(parent)
                .map_err(|error| Error::with_source(ErrorKind::Corrupt, first.clone(), error))?;
            if !directory.extend(entries) {
                return Err(corrupt(format!("directory {parent} holds a name twice")));
            }
        }
        Ok(())
    }

    /// Loading, step 3: an extended attribute.
    pub(crate) fn load_xattr(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let (id, name) = split_key(key)?;
        let what = format_args!("extended attribute {name:?} of node {id}");
        let data = open(&what, key, value)?;
        let node =
            self.nodes.get_mut(&id).ok_or_else(|| corrupt(format!("{what}: there is no such node")))?;
        node.xattrs.get_or_insert_default().insert(name.to_os_string(), data.to_vec());
        Ok(())
    }

    /// Loading, last: what no single record can tell.
    pub(crate) fn check(&self) -> Result<()> {
        match self.nodes.get(&ROOT) {
            Some(root) if root.kind == NodeKind::Directory && root.links.is_empty() => {}
            // Else a walk of the tree would never end.
            Some(root) if root.kind == NodeKind::Directory => {
                return Err(corrupt("an entry leads to the root"));
            }
            Some(_) => return Err(corrupt("the root is not a directory")),
            None => return Err(corrupt("there is no root")),
        }
        let mut subdirectories = std::collections::HashMap::<NodeId, u32>::new();
        for (id, node) in &self.nodes {
            if node.kind != NodeKind::Directory {
                if node.nlink as usize != node.links.len() {
                    return Err(corrupt(format!(
                        "node {id} has {} names, its record says {}",
                        node.links.len(),
                        node.nlink
                    )));
                }
                continue;
            }
            if *id == ROOT {
                continue;
            }
            let [(parent, _)] = node.links.as_slice() else {
                return Err(corrupt(format!("directory {id} has {} names", node.links.len())));
            };
            *subdirectories.entry(*parent).or_default() += 1;
        }
        for (id, node) in &self.nodes {
            if node.kind == NodeKind::Directory
                && node.nlink != 2 + subdirectories.get(id).copied().unwrap_or(0)
            {
                return Err(corrupt(format!(
                    "directory {id} holds {} directories, its record says {}",
                    subdirectories.get(id).copied().unwrap_or(0),
                    node.nlink as i64 - 2
                )));
            }
        }
        self.check_no_cycle()
    }

    /// Every directory leads up to the root.
    fn check_no_cycle(&self) -> Result<()> {
        let mut good = std::collections::HashSet::from([ROOT]);
        for (id, node) in &self.nodes {
            let Body::Directory(_) = &node.body else { continue };
            let mut trail = Vec::new();
            let mut at = *id;
            while !good.contains(&at) {
                trail.push(at);
                at = self.directory(at)?.parent;
                if trail.len() > self.nodes.len() {
                    return Err(corrupt(format!("directory {id} does not lead up to the root")));
                }
            }
            good.extend(trail);
        }
        Ok(())
    }
}
