//! Mends what can be mended: superblocks, the catalog's copy, files and space that nobody owns, damaged chunks.
//!
//! A chunk is damaged when its bytes are not those that its sum in the catalog was made of. The sum stays: repair looks for the bytes.
//! It never makes a sum for bytes that it found, and it writes nothing whose sum is not the committed one. So writing in place is safe
//! at any moment: the chunk is damaged before, and after a crash in the middle it is damaged still.
//!
//! Where bytes are looked for, in this order: the RAM tier or the page cache; a copy, that is another region of the same size with
//! the same sum for this chunk and for another one too (a CRC-32 alone says too little among millions of chunks); and what the
//! caller brings ([`Pool::replace_chunk`](crate::Pool::replace_chunk)).

use std::collections::{BTreeMap, HashSet};
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::content::Draft;
use crate::error::{Error, ErrorKind, Result};
use crate::file_draft::read_file;
use crate::format;
use crate::layout::Layout;
use crate::member::directory::private_directories;
use crate::pool::live::{Current, Live};
use crate::pool::stored::Stored;
use crate::pool::{Shared, Storage, lock, read};
use crate::types::{Access, NodeId, NodeKind};
use crate::verify::{BadChunk, VerifyProgress, VerifyReport, bad_chunk, check_piece, pieces_of, verify_all};

/// Chunks that a report lists of each kind.
const LISTED: usize = 20_000;
/// Chunks that one run tries to mend: each is held in memory with its names.
const MENDED: usize = 200_000;

/// A chunk that is right again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairedChunk {
    /// The region's node.
    pub node: NodeId,
    /// One of its names.
    pub path: String,
    /// Index of the chunk.
    pub chunk: u64,
    /// Where the bytes came from.
    pub from: String,
}

/// What [`Pool::repair`](crate::Pool::repair) found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairReport {
    /// What a verification found before chunks were mended; its list of bad chunks is empty here, see `left`.
    pub verify: VerifyReport,
    /// What was done to superblocks and catalog since the pool was opened, in sentences.
    pub done: Vec<String>,
    /// Files without an owner that were removed since the pool was opened.
    pub orphans: u64,
    /// Bytes that nobody owned and that are free again.
    pub leaked_bytes: u64,
    /// Chunks that are right again, at most 20,000 of them.
    pub repaired: Vec<RepairedChunk>,
    /// How many there are.
    pub repaired_chunks: u64,
    /// Damaged chunks that no bytes were found for, at most 20,000 of them.
    pub left: Vec<BadChunk>,
    /// How many there are.
    pub left_chunks: u64,
}

impl RepairReport {
    /// Whether nothing is wrong any more.
    pub fn is_clean(&self) -> bool {
        self.left_chunks == 0
    }

    /// Notes a chunk that is right again.
    pub fn add_repaired(&mut self, chunk: RepairedChunk) {
        self.repaired_chunks += 1;
        if self.repaired.len() < LISTED {
            self.repaired.push(chunk);
        }
    }

    fn add_left(&mut self, bad: BadChunk) {
        self.left_chunks += 1;
        if self.left.len() < LISTED {
            self.left.push(bad);
        }
    }

    /// Adds what another part of the same repair did.
    pub(crate) fn merge(&mut self, other: RepairReport) {
        self.verify.merge(other.verify);
        self.done.extend(other.done);
        self.orphans += other.orphans;
        self.leaked_bytes += other.leaked_bytes;
        self.repaired_chunks += other.repaired_chunks;
        self.repaired.extend(other.repaired);
        self.repaired.truncate(LISTED);
        self.left_chunks += other.left_chunks;
        self.left.extend(other.left);
        self.left.truncate(LISTED);
    }
}

/// Everything that is not a region's bytes.
pub(crate) fn repair_structures(shared: &Arc<Shared>) -> Result<RepairReport> {
    shared.check_writable()?;
    let mut report =
        RepairReport { done: std::mem::take(&mut *lock(&shared.mended)), ..RepairReport::default() };
    superblocks(shared, &mut report)?;
    if let Some(done) = shared.mend_catalog_copy()? {
        report.done.push(done);
    }
    remove_orphans(shared)?;
    report.orphans = shared.counters.orphans.swap(0, std::sync::atomic::Ordering::Relaxed);
    report.leaked_bytes = free_leaks(shared)?;
    Ok(report)
}

fn superblocks(shared: &Shared, report: &mut RepairReport) -> Result<()> {
    let hook = shared.options.device_hook.as_ref();
    for member in &shared.info.members {
        let found = format::read_through(&member.path, member.kind, hook)
            .map_err(|error| error.context(format!("member {}", member.index)))?;
        if let Some(why) = found.damaged {
            format::write_through(&member.path, member.kind, &found.superblock, hook)?;
            report.done.push(format!("{}: {why}; written again from the good copy", member.path.display()));
        }
    }
    Ok(())
}

/// Files of a directory pool that neither the tree, nor the durable catalog, nor a reader of old content knows.
fn remove_orphans(shared: &Arc<Shared>) -> Result<()> {
    let Storage::Files { directory, .. } = &shared.storage else { return Ok(()) };
    // Before and after a snapshot: what is on its way from the tree to the list of what is to be freed is in one of the looks.
    let mut named = named_files(shared);
    shared.sync()?;
    named.extend(named_files(shared));
    let never = || false;
    let count = directory.remove_orphans(&named, shared.first_new_file(), false, &never)?;
    shared.counters.orphans.fetch_add(count, std::sync::atomic::Ordering::Relaxed);
    Ok(())
}

fn named_files(shared: &Shared) -> HashSet<u64> {
    let mut named: HashSet<u64> = read(&shared.tree)
        .iter()
        .filter_map(|(_, node)| node.region().map(|region| region.file))
        .filter(|file| *file != 0)
        .collect();
    named.extend(shared.doomed_files());
    named
}

/// Space of extent files that no layout names, committed or still read: what a draft left that a crash ended halfway.
fn free_leaks(shared: &Arc<Shared>) -> Result<u64> {
    let Storage::Extents(io) = &shared.storage else { return Ok(0) };
    if !io.stripes().members().iter().any(|member| !member.kind().is_raw()) {
        return Ok(0); // what no layout names is free there
    }
    shared.sync()?;
    let mut named = shared.doomed_extents();
    let nodes: Vec<NodeId> = read(&shared.tree)
        .iter()
        .filter(|(_, node)| node.kind == NodeKind::Region)
        .map(|(id, _)| id)
        .collect();
    for node in nodes {
        named.extend(shared.load_layout(node)?.extents().copied());
    }
    for live in lock(&shared.open).values() {
        if let Some(Current::Stored(stored)) = live.current()
            && let Stored::Extents(content) = &*stored
        {
            named.extend(content.layout().extents().copied());
        }
    }
    let mut freed = 0;
    for member in io.stripes().members() {
        let of_member: Vec<_> =
            named.iter().filter(|extent| extent.member == member.index()).copied().collect();
        freed += member.free_unnamed(&of_member)?;
    }
    Ok(freed)
}

/// Verifies a region and mends its damaged chunks from what the pool itself has.
pub(crate) fn repair_region(
    shared: &Arc<Shared>,
    node: Option<NodeId>,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<RepairReport> {
    shared.check_writable()?;
    let mut verify = verify_all(shared, node, MENDED, progress)?;
    // Beyond the limit another run goes on.
    let left_chunks = verify.bad_chunks - verify.bad.len() as u64;
    let mut report = RepairReport { left_chunks, ..RepairReport::default() };
    let mut of_node: BTreeMap<NodeId, Vec<BadChunk>> = BTreeMap::new();
    for bad in std::mem::take(&mut verify.bad) {
        of_node.entry(bad.node).or_default().push(bad);
    }
    for (node, all) in of_node {
        let live = match shared.open_live(node, Access::Read, u64::MAX) {
            Ok(live) => live,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        mend_region(shared, &live, all, &mut report);
        shared.close_live(&live, Access::Read);
    }
    report.verify = verify;
    Ok(report)
}

fn mend_region(shared: &Arc<Shared>, live: &Arc<Live>, all: Vec<BadChunk>, report: &mut RepairReport) {
    let stored = match live.current() {
        Some(Current::Stored(stored)) => stored,
        _ => return, // somebody writes to it: it gets new content, and new sums
    };
    let Ok(layout) = stored.layout(shared.chunk_size) else {
        all.into_iter().for_each(|bad| report.add_left(bad));
        return;
    };
    let mut copies = None;
    for bad in all {
        if bad.len == 0 {
            // The region as a whole: each of its chunks may be found somewhere.
            for chunk in 0..layout.chunks() {
                let bad =
                    bad_chunk(shared, live.node, Some((&layout, chunk)), bad.member, bad.reason.clone());
                mend_chunk(shared, live, &stored, &layout, bad, &mut copies, report);
            }
        } else {
            mend_chunk(shared, live, &stored, &layout, bad, &mut copies, report);
        }
    }
}

fn mend_chunk(
    shared: &Arc<Shared>,
    live: &Arc<Live>,
    stored: &Arc<Stored>,
    layout: &Arc<Layout>,
    bad: BadChunk,
    copies: &mut Option<Vec<NodeId>>,
    report: &mut RepairReport,
) {
    let fits = |bytes: &Vec<u8>| crc32fast::hash(bytes) == layout.sum(bad.chunk);
    let mut offers = vec![(cached(shared, stored, layout, bad.chunk), "memory".to_string())];
    if !offers[0].0.as_ref().is_some_and(fits) {
        let same = copies.get_or_insert_with(|| same_size(shared, live.node, layout.size()));
        offers = same
            .iter()
            .filter_map(|other| copy_of(shared, *other, layout, bad.chunk))
            .map(|(bytes, name)| (Some(bytes), format!("the same chunk of {name}")))
            .collect();
    }
    for (bytes, from) in offers {
        let Some(bytes) = bytes.filter(fits) else { continue };
        match replace_live(shared, live, bad.chunk, &bytes) {
            Ok(_) => {
                tracing::info!(path = bad.path, chunk = bad.chunk, "repaired from {from}");
                report.add_repaired(RepairedChunk { node: bad.node, path: bad.path, chunk: bad.chunk, from });
                return;
            }
            Err(error) => {
                let reason = format!("{}; {}", bad.reason, error.chain());
                return report.add_left(BadChunk { reason, ..bad });
            }
        }
    }
    report.add_left(bad);
}

/// What memory has of a chunk.
fn cached(shared: &Shared, stored: &Stored, layout: &Arc<Layout>, chunk: u64) -> Option<Vec<u8>> {
    let offset = chunk * layout.chunk_size() as u64;
    let len = layout.size().saturating_sub(offset).min(layout.chunk_size() as u64) as usize;
    let mut bytes = vec![0; len];
    match (stored, &shared.storage) {
        (Stored::File(content), _) => {
            let read = read_file(content.open().ok()?, offset, &mut bytes).ok()?;
            (read == len).then_some(bytes)
        }
        (Stored::Extents(content), Storage::Extents(io)) => {
            io.reader().cached(content.source(), chunk, &mut bytes).then_some(bytes)
        }
        _ => None,
    }
}

/// Other regions of this size.
fn same_size(shared: &Shared, node: NodeId, size: u64) -> Vec<NodeId> {
    let tree = read(&shared.tree);
    tree.iter()
        .filter(|(id, other)| {
            *id != node && other.size == size && other.nlink > 0 && other.kind == NodeKind::Region
        })
        .map(|(id, _)| id)
        .collect()
}

/// A chunk of another region, where that looks like a copy and the bytes are right; with the region's name.
fn copy_of(shared: &Arc<Shared>, other: NodeId, wanted: &Layout, chunk: u64) -> Option<(Vec<u8>, String)> {
    let live = shared.open_live(other, Access::Read, u64::MAX).ok()?;
    let found = (|| {
        let Some(Current::Stored(stored)) = live.current() else { return None };
        let layout = stored.layout(shared.chunk_size).ok().filter(|_| stored.sealed())?;
        let equal = |index: u64| layout.sum(index) == wanted.sum(index);
        // Of a long region the first thousand chunks are enough to know it by.
        let others = (0..wanted.chunks()).filter(|index| *index != chunk).take(1000);
        if layout.chunk_size() != wanted.chunk_size() || !equal(chunk) || !{ others }.any(equal) {
            return None;
        }
        let offset = chunk * layout.chunk_size() as u64;
        let len = layout.size().saturating_sub(offset).min(layout.chunk_size() as u64);
        let mut bytes = vec![0; len as usize];
        for piece in pieces_of(shared, &stored, &layout, offset..offset + len).ok()? {
            let from = (piece.extent.logical - offset) as usize;
            let part = &mut bytes[from..from + piece.extent.len as usize];
            piece.device.read_at(piece.extent.offset, part).ok()?;
        }
        let path = read(&shared.tree).path_of(other).map(|path| path.to_string_lossy().into_owned());
        Some((bytes, path.unwrap_or_default()))
    })();
    shared.close_live(&live, Access::Read);
    found
}

/// See [`Pool::replace_chunk`](crate::Pool::replace_chunk).
pub(crate) fn replace_chunk(shared: &Arc<Shared>, node: NodeId, chunk: u64, bytes: &[u8]) -> Result<bool> {
    shared.check_writable()?;
    let live = shared.open_live(node, Access::Read, u64::MAX)?;
    let done = replace_live(shared, &live, chunk, bytes);
    shared.close_live(&live, Access::Read);
    done
}

/// What became of a write in place.
enum Place {
    WasRight,
    Written,
    /// The medium does not take it there.
    Refused(Error),
}

fn replace_live(shared: &Arc<Shared>, live: &Arc<Live>, chunk: u64, bytes: &[u8]) -> Result<bool> {
    let node = live.node;
    let busy = || {
        let text = format!("chunk {chunk} of node {node} cannot be replaced: the region is being written");
        Error::new(ErrorKind::Busy, text)
    };
    let stored = match live.current() {
        Some(Current::Stored(stored)) if stored.sealed() => stored,
        _ => return Err(busy()),
    };
    let layout = stored.layout(shared.chunk_size)?;
    let offset = chunk.checked_mul(layout.chunk_size() as u64).filter(|offset| *offset < layout.size());
    let Some(offset) = offset else {
        let text = format!("node {node} of {} bytes has no chunk {chunk}", layout.size());
        return Err(Error::new(ErrorKind::OutOfRange, text));
    };
    let len = (layout.size() - offset).min(layout.chunk_size() as u64);
    if bytes.len() as u64 != len || crc32fast::hash(bytes) != layout.sum(chunk) {
        let text = format!(
            "the bytes offered for chunk {chunk} of node {node} are not those that were committed: their checksum is another one"
        );
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    // Nobody begins to write meanwhile: their bytes would be written over.
    let placed = shared.with_committed(live, &stored, || {
        if is_right(shared, &stored, &layout, offset, len) {
            return Place::WasRight;
        }
        match write_in_place(shared, &stored, &layout, offset, bytes) {
            Ok(()) if is_right(shared, &stored, &layout, offset, len) => Place::Written,
            Ok(()) => Place::Refused(Error::new(ErrorKind::Io, "it reads back wrong after it was written")),
            Err(error) => Place::Refused(error),
        }
    });
    match placed.ok_or_else(busy)? {
        Place::WasRight => Ok(false),
        Place::Written => Ok(true),
        Place::Refused(error) if matches!(*stored, Stored::Extents(_)) => {
            tracing::warn!(node, chunk, error = %error.chain(), "a chunk moves to other space");
            move_chunk(shared, node, offset, bytes).map(|()| true)
        }
        Place::Refused(error) => Err(error.context(format!("writing chunk {chunk} of node {node} again"))),
    }
}

fn is_right(shared: &Arc<Shared>, stored: &Stored, layout: &Arc<Layout>, offset: u64, len: u64) -> bool {
    // A hole of extents has no pieces, and nothing that could be wrong.
    pieces_of(shared, stored, layout, offset..offset + len).is_ok_and(|pieces| {
        pieces.iter().all(|piece| check_piece(shared, layout, piece, &mut None).is_empty())
    })
}

/// Durable when it returns.
fn write_in_place(
    shared: &Shared,
    stored: &Stored,
    layout: &Layout,
    offset: u64,
    bytes: &[u8],
) -> Result<()> {
    match (stored, &shared.storage) {
        (Stored::File(content), Storage::Files { directory, .. }) => {
            let path = directory.file_path(content.file);
            let io = |error| {
                Error::io(format!("write {} bytes at {offset} of {}", bytes.len(), path.display()), error)
            };
            let open = || OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
            let file = match open() {
                // The file is gone, and with it maybe its directory: both come back.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    path.parent().map_or(Ok(()), private_directories).and_then(|()| open())
                }
                opened => opened,
            };
            let file = file.map_err(io)?;
            file.write_all_at(bytes, offset).and_then(|()| file.sync_all()).map_err(io)?;
            directory.sync_open(directory.open_to_sync(&[content.file])?)
        }
        (Stored::Extents(_), Storage::Extents(io)) => {
            let chunk = layout.chunk_size() as u64;
            let extent = layout.extent_at(offset).and_then(|extent| extent.cut(offset..offset + chunk));
            let Some(extent) = extent else {
                return Err(Error::new(ErrorKind::Corrupt, format!("nothing is stored at {offset}")));
            };
            // The whole chunk, so that nothing damaged has to be read for it; beyond the size anything may be.
            let mut whole = bytes.to_vec();
            whole.resize(extent.len as usize, 0);
            let device = io.stripes().device(&extent)?;
            device.write_at(extent.offset, &whole).and_then(|()| device.flush()).map_err(Error::from)
        }
        _ => Err(Error::new(ErrorKind::NotSupported, "an empty region has no chunks")),
    }
}

/// Writes a chunk as a writer of the region would: to fresh space, committed with the next snapshot.
fn move_chunk(shared: &Arc<Shared>, node: NodeId, offset: u64, bytes: &[u8]) -> Result<()> {
    let (mtime, ctime) = {
        let tree = read(&shared.tree);
        let held = tree.get(node)?;
        (held.mtime, held.ctime)
    };
    let live = shared.open_live(node, Access::Write, u64::MAX)?;
    let written = match live.draft() {
        Some(draft) => put(draft.get(), offset, bytes),
        None => Err(Error::new(ErrorKind::Stale, format!("node {node} is not open for writing"))),
    };
    shared.close_live(&live, Access::Write);
    written?;
    if let Ok(held) = crate::pool::write(&shared.tree).get_mut(node) {
        (held.mtime, held.ctime) = (mtime, ctime);
    }
    shared.sync()
}

fn put(draft: &dyn Draft, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        done += draft.write_at(offset + done as u64, &bytes[done..])?;
    }
    draft.flush()
}
