//! Reads everything and checks every sum.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, mpsc};

use nvme::{Buffer, Device, DeviceOptions, FileDevice};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::layout::{Extent, Layout};
use crate::pool::live::{Current, Live};
use crate::pool::stored::Stored;
use crate::pool::{Shared, Storage, read};
use crate::types::{Access, NodeId, NodeKind};

/// How far [`Pool::verify`](crate::Pool::verify) is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyProgress {
    /// The region at hand.
    pub path: String,
    /// Bytes of all regions that are done.
    pub done_bytes: u64,
    /// Bytes of all regions.
    pub total_bytes: u64,
    /// Bad chunks so far.
    pub bad_chunks: u64,
}

/// A chunk that fails its checksum or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadChunk {
    /// The region's node.
    pub node: NodeId,
    /// One of its names.
    pub path: String,
    /// Index of the chunk in the region.
    pub chunk: u64,
    /// Member that holds it.
    pub member: u16,
    /// Path of that member.
    #[serde(default)]
    pub member_path: String,
    /// Where the chunk begins in the region, in bytes.
    #[serde(default)]
    pub offset: u64,
    /// Bytes of it that belong to the region; 0: the whole region is meant.
    #[serde(default)]
    pub len: u64,
    /// What is wrong.
    pub reason: String,
}

/// What [`Pool::verify`](crate::Pool::verify) found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Regions read.
    pub regions: u64,
    /// Chunks whose sums were compared.
    pub chunks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Regions open for writing: without sums now, not checked.
    pub skipped: u64,
    /// Regions that a crash left without sums and that got new ones.
    pub resealed: u64,
    /// Bad chunks, at most 1000 of them.
    pub bad: Vec<BadChunk>,
    /// How many bad chunks there are.
    pub bad_chunks: u64,
}

impl VerifyReport {
    /// Adds what a verification of other regions found.
    pub(crate) fn merge(&mut self, other: VerifyReport) {
        self.regions += other.regions;
        self.chunks += other.chunks;
        self.bytes += other.bytes;
        self.skipped += other.skipped;
        self.resealed += other.resealed;
        self.bad_chunks += other.bad_chunks;
        self.bad.extend(other.bad);
        self.bad.truncate(LISTED);
    }

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.bad_chunks == 0
    }
}

/// Bytes that a thread reads at a time: a multiple of every chunk size.
pub(crate) const PIECE: u64 = 4 << 20;
const THREADS: usize = 4;
/// Bad chunks that a report lists.
pub(crate) const LISTED: usize = 1000;

/// A stretch of a region that lies together on a member.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub extent: Extent,
    pub device: Arc<dyn Device>,
}

/// What a piece yielded: bad chunks with the reason.
type Outcome = (Piece, Vec<(u64, String)>);

pub(crate) fn regions(shared: &Shared) -> Vec<(NodeId, u64)> {
    let tree = read(&shared.tree);
    let mut nodes: Vec<(NodeId, u64)> = tree
        .iter()
        .filter(|(_, node)| node.kind == NodeKind::Region && node.nlink > 0)
        .map(|(id, node)| (id, node.size))
        .collect();
    nodes.sort_unstable();
    nodes
}

/// See [`Pool::verify`](crate::Pool::verify).
pub(crate) fn verify(
    shared: &Arc<Shared>,
    node: Option<NodeId>,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport> {
    verify_all(shared, node, LISTED, progress)
}

/// The same, listing at most `listed` bad chunks.
pub(crate) fn verify_all(
    shared: &Arc<Shared>,
    node: Option<NodeId>,
    listed: usize,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport> {
    let nodes = match node {
        Some(node) => {
            let tree = read(&shared.tree);
            tree.region(node)?;
            vec![(node, tree.get(node)?.size)]
        }
        None => regions(shared),
    };
    let mut report = VerifyReport::default();
    let mut told =
        VerifyProgress { total_bytes: nodes.iter().map(|(_, size)| size).sum(), ..VerifyProgress::default() };
    for (id, size) in nodes {
        let before = told.done_bytes;
        let live = match shared.open_live(id, Access::Read, u64::MAX) {
            Ok(live) => live,
            // Removed since the list was made.
            Err(error) if error.kind() == crate::error::ErrorKind::NotFound && node.is_none() => continue,
            Err(error) => return Err(error),
        };
        told.path = read(&shared.tree)
            .path_of(id)
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default();
        let checked = verify_live(shared, &live, listed, &mut report, &mut told, progress);
        shared.close_live(&live, Access::Read);
        checked?;
        told.done_bytes = before + size;
        told.bad_chunks = report.bad_chunks;
        progress(told.clone());
    }
    Ok(report)
}

fn verify_live(
    shared: &Arc<Shared>,
    live: &Arc<Live>,
    listed: usize,
    report: &mut VerifyReport,
    told: &mut VerifyProgress,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<()> {
    let mut stored = match live.current() {
        Some(Current::Stored(stored)) => stored,
        _ => {
            report.skipped += 1;
            return Ok(());
        }
    };
    if !stored.sealed() {
        if shared.read_only {
            report.skipped += 1;
            return Ok(());
        }
        shared.reseal_live(live)?;
        report.resealed += 1;
        match live.current() {
            Some(Current::Stored(now)) => stored = now,
            _ => return Ok(()),
        }
    }
    report.regions += 1;
    let bad = |report: &mut VerifyReport, bad: BadChunk| {
        tracing::error!(
            path = bad.path,
            chunk = bad.chunk,
            offset = bad.offset,
            member = bad.member_path,
            "verify: {}",
            bad.reason
        );
        report.bad_chunks += 1;
        if report.bad.len() < listed {
            report.bad.push(bad);
        }
    };
    let layout = stored.layout(shared.chunk_size);
    let pieces = layout.and_then(|layout| Ok((pieces_of(shared, &stored, &layout, 0..u64::MAX)?, layout)));
    let (pieces, layout) = match pieces {
        Ok(found) => found,
        Err(error) => {
            bad(report, bad_chunk(shared, live.node, None, 0, error.chain()));
            return Ok(());
        }
    };
    let before = told.done_bytes;
    each_piece(shared, &layout, pieces, &mut |(piece, wrong)| {
        let chunk = layout.chunk_size() as u64;
        let wrong = confirmed(shared, live, &stored, &layout, &piece, wrong);
        report.chunks += piece.extent.len.div_ceil(chunk);
        report.bytes += piece.extent.len;
        shared.counters.verified_chunks.fetch_add(piece.extent.len.div_ceil(chunk), Relaxed);
        shared.counters.corrupt_chunks.fetch_add(wrong.len() as u64, Relaxed);
        for (chunk, reason) in wrong {
            bad(report, bad_chunk(shared, live.node, Some((&layout, chunk)), piece.extent.member, reason));
        }
        told.done_bytes += piece.extent.len;
        told.bad_chunks = report.bad_chunks;
        progress(told.clone());
    });
    told.done_bytes = before;
    Ok(())
}

fn told_path(shared: &Shared, node: NodeId) -> String {
    read(&shared.tree).path_of(node).map(|path| path.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A bad chunk with all its names; `None`: the whole region.
pub(crate) fn bad_chunk(
    shared: &Shared,
    node: NodeId,
    chunk: Option<(&Layout, u64)>,
    member: u16,
    reason: String,
) -> BadChunk {
    let (index, offset, len) = match chunk {
        Some((layout, index)) => {
            let offset = index * layout.chunk_size() as u64;
            (index, offset, layout.size().saturating_sub(offset).min(layout.chunk_size() as u64))
        }
        None => (0, 0, 0),
    };
    let member_path = shared.info.members.get(member as usize);
    BadChunk {
        node,
        path: told_path(shared, node),
        chunk: index,
        member,
        member_path: member_path.map(|member| member.path.display().to_string()).unwrap_or_default(),
        offset,
        len,
        reason,
    }
}

/// What is still wrong while nobody can begin to write: a file that is rewritten in place differs from sums that no longer count.
pub(crate) fn confirmed(
    shared: &Arc<Shared>,
    live: &Arc<Live>,
    stored: &Arc<Stored>,
    layout: &Layout,
    piece: &Piece,
    wrong: Vec<(u64, String)>,
) -> Vec<(u64, String)> {
    if wrong.is_empty() || !matches!(**stored, Stored::File(_)) {
        return wrong;
    }
    let again = shared.with_committed(live, stored, || check_piece(shared, layout, piece, &mut None));
    again.unwrap_or_default()
}

/// Where the bytes of `range` are, past every cache where that is possible.
pub(crate) fn pieces_of(
    shared: &Arc<Shared>,
    stored: &Stored,
    layout: &Arc<Layout>,
    range: Range<u64>,
) -> Result<Vec<Piece>> {
    let size = layout.size();
    let mut pieces = Vec::new();
    let mut cut = |extent: Extent, device: Arc<dyn Device>| {
        let Some(extent) = extent.cut(range.clone()) else { return };
        let mut at = extent.logical;
        let end = extent.logical_end().min(size);
        while at < end {
            let next = ((at / PIECE + 1) * PIECE).min(end);
            if let Some(part) = extent.cut(Range { start: at, end: next }) {
                pieces.push(Piece { extent: part, device: device.clone() });
            }
            at = next;
        }
    };
    match (stored, &shared.storage) {
        (Stored::File(content), Storage::Files { directory, .. }) => {
            let path = directory.file_path(content.file);
            // What the kernel still has to write must be there to be read past it.
            content
                .open()?
                .sync_data()
                .map_err(|error| Error::io(format!("sync {}", path.display()), error))?;
            let open = |direct| FileDevice::open(&path, &DeviceOptions { direct, read_only: true });
            let device = open(true).or_else(|_| open(false)).map_err(Error::from)?;
            cut(
                Extent { logical: 0, member: 0, file: content.file, offset: 0, len: size.max(1) },
                Arc::new(device),
            );
        }
        (Stored::Extents(_), Storage::Extents(io)) => {
            for extent in layout.extents() {
                cut(*extent, io.stripes().device(extent)?);
            }
        }
        _ => {}
    }
    Ok(pieces)
}

/// Checks pieces by several threads where there are many; `done` runs on this one.
fn each_piece(shared: &Shared, layout: &Arc<Layout>, pieces: Vec<Piece>, done: &mut dyn FnMut(Outcome)) {
    let threads =
        std::thread::available_parallelism().map_or(1, |count| count.get()).min(THREADS).min(pieces.len());
    if threads < 2 {
        let mut buffer = None;
        for piece in pieces {
            let wrong = check_piece(shared, layout, &piece, &mut buffer);
            done((piece, wrong));
        }
        return;
    }
    let next = AtomicU64::new(0);
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let send = send.clone();
            let (next, pieces) = (&next, &pieces);
            scope.spawn(move || {
                let mut buffer = None;
                while let Some(piece) = pieces.get(next.fetch_add(1, Relaxed) as usize) {
                    let wrong = check_piece(shared, layout, piece, &mut buffer);
                    if send.send((piece.clone(), wrong)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(send);
        for outcome in receive {
            done(outcome);
        }
    });
}

/// The chunks of a piece that fail their sums or cannot be read, each of them twice.
pub(crate) fn check_piece(
    shared: &Shared,
    layout: &Layout,
    piece: &Piece,
    buffer: &mut Option<Buffer>,
) -> Vec<(u64, String)> {
    let chunk_size = layout.chunk_size() as u64;
    let extent = &piece.extent;
    let first = extent.logical / chunk_size;
    if buffer.is_none() {
        match Buffer::heap(PIECE as usize) {
            Ok(made) => *buffer = Some(made),
            Err(error) => return vec![(first, Error::from(error).chain())],
        }
    }
    let Some(buffer) = buffer else { return Vec::new() };
    let bytes = &mut buffer[..extent.len as usize];
    let read = piece.device.read_at(extent.offset, bytes).is_ok();
    let mut wrong = Vec::new();
    for (chunk, data) in (first..).zip(bytes.chunks_mut(chunk_size as usize)) {
        if read && crc32fast::hash(data) == layout.sum(chunk) {
            continue;
        }
        // By itself: to tell which chunk cannot be read, and because a bit may have flipped on its way.
        shared.counters.retried_reads.fetch_add(1, Relaxed);
        let offset = extent.offset + (chunk - first) * chunk_size;
        match piece.device.read_at(offset, data) {
            Ok(()) if crc32fast::hash(data) == layout.sum(chunk) => {
                shared.counters.repaired_reads.fetch_add(1, Relaxed);
            }
            Ok(()) => wrong.push((chunk, "its checksum does not match".into())),
            Err(error) => wrong.push((chunk, Error::from(error).chain())),
        }
    }
    wrong
}

/// Makes new sums for regions that a crash left without.
pub(crate) fn reseal(shared: &Arc<Shared>, stop: &dyn Fn() -> bool) -> Result<u64> {
    let unsealed: Vec<NodeId> = {
        let tree = read(&shared.tree);
        tree.iter()
            .filter(|(_, node)| node.region().is_some_and(|region| !region.sealed))
            .map(|(id, _)| id)
            .collect()
    };
    let mut count = 0;
    for node in unsealed {
        if stop() {
            break;
        }
        let Ok(live) = shared.open_live(node, Access::Read, u64::MAX) else { continue };
        let resealed = shared.reseal_live(&live);
        shared.close_live(&live, Access::Read);
        match resealed {
            Ok(()) => count += 1,
            Err(error) => tracing::warn!(node, error = %error.chain(), "cannot make checksums of a region"),
        }
    }
    Ok(count)
}
