//! Doors for the fuzz targets (`fuzz/`) to parsers that are private otherwise. Not part of the crate's interface: anything here
//! may change at any time.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nvme::Device;
use redb::StorageBackend;

use crate::catalog::backend::FileStore;
use crate::catalog::zone::ZoneBackend;
use crate::catalog::{Batch, Catalog, Meta};
use crate::control::frame::Connection;
use crate::control::protocol::{REPLY_MAX, REQUEST_MAX, Reply, Request};
use crate::error::Result;
use crate::format::{self, Found};
use crate::layout::record::Changes;
use crate::namespace::record::{
    Entries, decode_node, encode_entry, encode_node, encode_xattr, name_key, node_key,
};
use crate::namespace::{Body, Tree};
use crate::session::partial;
use crate::types::{Attr, NodeId};

/// A key and its value, sealed.
pub type Record = (Vec<u8>, Vec<u8>);

/// The superblock that the two copies of a member yield.
pub fn superblock(copies: &[&[u8]]) -> Result<Found> {
    format::from_copies(Path::new("fuzzed"), copies)
}

/// What the first bytes of a device that is not ours are.
pub fn foreign(head: &[u8], len: u64) -> Option<&'static str> {
    format::foreign::name_head(head, len)
}

/// Records as a catalog holds them.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// The pool of the meta record.
    pub pool: [u8; 16],
    /// Node numbers from here on were never given out.
    pub next_node: NodeId,
    /// File numbers likewise.
    pub next_file: u64,
    /// Generation of the snapshot.
    pub generation: u64,
    /// Table `nodes`.
    pub nodes: Vec<Record>,
    /// Table `entries`.
    pub entries: Vec<Record>,
    /// Table `xattrs`.
    pub xattrs: Vec<Record>,
    /// Table `layouts`: node, part, value.
    pub layouts: Vec<(NodeId, u32, Vec<u8>)>,
}

/// A node as it was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedNode {
    /// Its attributes.
    pub attr: Attr,
    /// The record that would be stored for it.
    pub record: Record,
    /// The records of its extended attributes.
    pub xattrs: Vec<Record>,
    /// The records of its entries, in the order of a listing, and the nodes they lead to.
    pub entries: Vec<(Record, NodeId)>,
    /// One of its paths.
    pub path: OsString,
    /// Target of a symbolic link.
    pub target: Option<OsString>,
}

/// Loads a tree from records and checks it, as opening a catalog does; its nodes by number.
pub fn tree(records: &Records) -> Result<Vec<LoadedNode>> {
    let mut tree: Tree<()> = Tree::empty(records.next_node);
    for (key, value) in &records.nodes {
        let (id, node) = decode_node(key, value)?;
        tree.add_node(id, node)?;
    }
    let mut entries = Entries::default();
    for (key, value) in &records.entries {
        entries.record(key, value)?;
    }
    tree.add_entries(entries)?;
    for (key, value) in &records.xattrs {
        tree.load_xattr(key, value)?;
    }
    tree.check()?;
    let mut ids: Vec<NodeId> = tree.iter().map(|(id, _)| id).collect();
    ids.sort_unstable();
    ids.into_iter().map(|id| loaded(&tree, id)).collect()
}

fn loaded(tree: &Tree<()>, id: NodeId) -> Result<LoadedNode> {
    let node = tree.get(id)?;
    let mut entries = Vec::new();
    if matches!(node.body, Body::Directory(_)) {
        for (_, entry) in tree.readdir(id, 0, usize::MAX)? {
            let key = name_key(id, &entry.name);
            let value = encode_entry(&key, entry.node, entry.kind);
            entries.push(((key, value), entry.node));
        }
    }
    let mut xattrs = Vec::new();
    for name in tree.listxattr(id)? {
        let key = name_key(id, &name);
        let value = encode_xattr(&key, &tree.getxattr(id, &name)?);
        xattrs.push((key, value));
    }
    Ok(LoadedNode {
        attr: node.attr(id),
        record: (node_key(id).to_vec(), encode_node(id, node)),
        xattrs,
        entries,
        path: tree.path_of(id)?,
        target: tree.readlink(id).ok(),
    })
}

/// The sealed meta record of a catalog.
pub fn meta(records: &Records) -> Vec<u8> {
    meta_of(records).encode()
}

/// What a meta record says, encoded again.
pub fn meta_again(value: &[u8]) -> Result<Vec<u8>> {
    Meta::decode(value).map(|meta| meta.encode())
}

fn meta_of(records: &Records) -> Meta {
    Meta {
        pool: records.pool,
        next_node: records.next_node,
        next_file: records.next_file,
        generation: records.generation,
        saved: 0,
    }
}

/// Writes a catalog that holds these records into an empty file.
pub fn write_catalog(file: File, records: &Records) -> Result<()> {
    let mut batch = Batch::new(meta_of(records));
    for (key, value) in &records.nodes {
        if let Some(id) = key.first_chunk::<8>() {
            batch.nodes.push((NodeId::from_be_bytes(*id), value.clone()));
        }
    }
    batch.entries = records.entries.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
    for (key, value) in &records.xattrs {
        // As entries: by key, whatever is in it.
        if let Some(id) = key.first_chunk::<8>() {
            let node = NodeId::from_be_bytes(*id);
            match batch.xattrs.iter_mut().find(|(other, _)| *other == node) {
                Some((_, all)) => all.push((key.clone(), value.clone())),
                None => batch.xattrs.push((node, vec![(key.clone(), value.clone())])),
            }
        }
    }
    for (node, part, value) in &records.layouts {
        let put = vec![(*part, value.clone())];
        batch.layouts.push((*node, Changes { put, delete: Vec::new() }));
    }
    let catalog = Catalog::create(Box::new(FileStore(file)), &batch)?;
    catalog.close()
}

/// Opens the catalog in a file as a pool does and reads all of it: how many nodes, how many layouts.
pub fn read_catalog(file: File, read_only: bool) -> Result<(usize, usize)> {
    read_all(Box::new(FileStore(file)), read_only)
}

/// Opens the catalog in a zone of a device and reads all of it.
pub fn read_catalog_zone(
    device: Arc<dyn Device>,
    start: u64,
    len: u64,
    read_only: bool,
) -> Result<(usize, usize)> {
    read_all(Box::new(ZoneBackend::open(device, start, len)?), read_only)
}

/// Makes a zone on a device and copies the database in a file into it.
pub fn write_catalog_zone(device: Arc<dyn Device>, start: u64, len: u64, database: &[u8]) -> Result<()> {
    let zone = ZoneBackend::create(device, start, len)?;
    let io = |error| crate::Error::io("fill the zone", error);
    zone.set_len(database.len() as u64).map_err(io)?;
    zone.write(0, database).map_err(io)?;
    zone.sync_data().map_err(io)
}

fn read_all(backend: Box<dyn StorageBackend>, read_only: bool) -> Result<(usize, usize)> {
    let catalog = Catalog::open(backend, read_only)?;
    let (_, tree, _) = catalog.load::<()>(false)?;
    let nodes = catalog.layout_nodes()?;
    let mut layouts = 0;
    for node in &nodes {
        layouts += usize::from(catalog.layout(*node)?.is_some());
    }
    Ok((tree.iter().count(), layouts))
}

const SOON: Option<Duration> = Some(Duration::from_secs(10));

/// Receives requests as the owner does, until the stream ends or a frame is bad: message, payload length, whether a file came along.
pub fn requests(stream: UnixStream) -> (Vec<(Request, usize, bool)>, Result<()>) {
    let connection = Connection::new(stream, REQUEST_MAX);
    let mut all = Vec::new();
    loop {
        match connection.receive::<Request>(SOON) {
            Ok(Some(frame)) => all.push((frame.message, frame.payload.len(), frame.fd.is_some())),
            Ok(None) => return (all, Ok(())),
            Err(error) => return (all, Err(error)),
        }
    }
}

/// Receives replies as a client does.
pub fn replies(stream: UnixStream) -> (Vec<(Reply, usize, bool)>, Result<()>) {
    let connection = Connection::new(stream, REPLY_MAX);
    let mut all = Vec::new();
    loop {
        match connection.receive::<Reply>(SOON) {
            Ok(Some(frame)) => all.push((frame.message, frame.payload.len(), frame.fd.is_some())),
            Ok(None) => return (all, Ok(())),
            Err(error) => return (all, Err(error)),
        }
    }
}

/// Whether a name can be that of a node.
pub fn check_name(name: &OsStr) -> Result<()> {
    crate::namespace::check_name(name)
}

/// The parts of a path that a session takes.
pub fn path_parts(path: &str) -> Result<Vec<&str>> {
    crate::session::local::parts(path)
}

/// Bytes that the note of an interrupted import keeps.
pub fn kept(note: &[u8], key: &str, size: u64) -> u64 {
    partial::kept_by(note, key, size)
}

/// How far a region is written without gaps after these writes (offset, length), and where the last one ends.
pub fn progress(writes: &[(u64, u64)]) -> (u64, u64) {
    partial::progress_of(writes)
}

/// Records of a KV store's index, see [`crate::kv`]; what they show.
pub fn kv_records(input: &[u8]) -> Result<String> {
    crate::kv::fuzz::records(input)
}

/// A KV store whose index holds these bytes, opened and used; what it came to.
pub fn kv_store(input: &[u8]) -> Result<String> {
    crate::kv::fuzz::store(input)
}

/// Records of a KV store's index, as seeds: a block, one that is gone, a namespace, a tenant, the ledger.
pub fn kv_seed() -> Vec<u8> {
    crate::kv::fuzz::seed()
}
