//! Leases: where the bytes of a region lie, for who reads the drive himself.
//!
//! A lease pins one generation of a region's content. Whatever is written, renamed or removed meanwhile, its extents hold the same
//! bytes, and are not reused, until the lease is dropped. The one exception is a region that the kernel passes through to a
//! writer: its file is changed in place, see docs/semantics.md; who reads it checks [`Lease::sum`] and asks again.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use nvme::{Arena, Device};

use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Extent, Layout, Piece};
use crate::pool::live::{Current, Live};
use crate::pool::stored::Stored;
use crate::pool::{Inner, Pool, Storage};
use crate::region_read::Resident;
use crate::types::{Access, NodeId};

/// What holds an extent's bytes.
#[derive(Clone, Debug)]
pub enum Source {
    /// The region's file: its offsets are the region's.
    File(Arc<File>),
    /// A raw member, or a file of a directory member, as a device.
    Device(Arc<dyn Device>),
}

/// A part of a leased range that is stored in one piece. Ranges between such parts are holes and read as zeros.
#[derive(Clone, Debug)]
pub struct LeasedExtent {
    /// Offset in the region.
    pub logical: u64,
    /// Bytes.
    pub len: u64,
    /// Where they are.
    pub source: Source,
    /// Offset in the source.
    pub offset: u64,
}

/// A range of a region whose extents neither move nor get reused until this is dropped.
#[derive(Debug)]
pub struct Lease {
    range: Range<u64>,
    extents: Vec<LeasedExtent>,
    layout: Arc<Layout>,
    // In this order: the content goes before what holds its node, that before the pool.
    content: Arc<Stored>,
    live: Arc<Live>,
    pool: Arc<Inner>,
}

impl Lease {
    /// The range, cut at the region's end.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// The stored parts, in order.
    pub fn extents(&self) -> &[LeasedExtent] {
        &self.extents
    }

    /// Bytes of the whole region.
    pub fn size(&self) -> u64 {
        self.layout.size()
    }

    /// Which generation of the content it is.
    pub fn generation(&self) -> u64 {
        self.layout.generation()
    }

    /// Bytes under one checksum.
    pub fn chunk_size(&self) -> u32 {
        self.layout.chunk_size()
    }

    /// CRC-32 of a chunk: of its bytes up to the end of the region. Of no meaning for a chunk that is all hole.
    pub fn sum(&self, chunk: u64) -> u32 {
        self.layout.sum(chunk)
    }

    /// What of a range the RAM tier of the pool has, verified and in order. Reads nothing.
    pub fn resident(&self, range: Range<u64>) -> Vec<Resident> {
        match (&*self.content, &self.pool.shared.storage) {
            (Stored::Extents(content), Storage::Extents(io)) => io.reader().resident(content.source(), range),
            _ => Vec::new(),
        }
    }

    /// Where the RAM tier's bytes lie, if the pool has a tier: to be made known to devices.
    pub fn ram_arena(&self) -> Option<&Arena> {
        match &self.pool.shared.storage {
            Storage::Extents(io) => io.tier().arena(),
            Storage::Files { .. } => None,
        }
    }

    /// The region's file, when its bytes are exactly that file's.
    pub fn file(&self) -> Option<&Arc<File>> {
        match self.extents.first().map(|e| &e.source) {
            Some(Source::File(file)) => Some(file),
            _ => None,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.shared.close_live(&self.live, Access::Read);
    }
}

impl Pool {
    /// The arena of the RAM tier, if the pool has one. A pool in one directory has none: the page cache is its tier.
    pub fn ram_arena(&self) -> Option<&Arena> {
        match &self.inner.shared.storage {
            Storage::Extents(io) => io.tier().arena(),
            Storage::Files { .. } => None,
        }
    }

    /// Leases a range of a region's committed content. `Busy` while it is being written or has no checksums: read it through a
    /// [`Handle`](crate::Handle) then.
    pub fn lease(&self, node: NodeId, offset: u64, len: u64) -> Result<Lease> {
        let shared = &self.inner.shared;
        let live = shared.open_live(node, Access::Read, 0)?;
        let leased = content(self, &live).and_then(|content| {
            let layout = content.layout(shared.chunk_size)?;
            let range = offset.min(layout.size())..offset.saturating_add(len).min(layout.size());
            let extents = extents(self, &content, &layout, &range)?;
            Ok((range, extents, layout, content))
        });
        match leased {
            Ok((range, extents, layout, content)) => {
                Ok(Lease { range, extents, layout, content, live, pool: self.inner.clone() })
            }
            Err(error) => {
                shared.close_live(&live, Access::Read);
                Err(error)
            }
        }
    }
}

fn content(pool: &Pool, live: &Live) -> Result<Arc<Stored>> {
    match live.current() {
        Some(Current::Stored(stored)) if stored.sealed() => Ok(stored),
        _ => {
            let path = pool.path_of(live.node).unwrap_or_default();
            Err(Error::new(ErrorKind::Busy, format!("{path:?} is being written, or was when its owner died")))
        }
    }
}

fn extents(pool: &Pool, content: &Stored, layout: &Layout, range: &Range<u64>) -> Result<Vec<LeasedExtent>> {
    match (content, &pool.inner.shared.storage) {
        (Stored::File(file), _) => {
            let source = Source::File(file.open()?.clone());
            let len = range.end - range.start;
            let whole = LeasedExtent { logical: range.start, len, source, offset: range.start };
            Ok(if len == 0 { Vec::new() } else { vec![whole] })
        }
        (Stored::Extents(_), Storage::Extents(io)) => {
            let placed = |extent: &Extent| {
                let source = Source::Device(io.stripes().device(extent)?);
                Ok(LeasedExtent { logical: extent.logical, len: extent.len, source, offset: extent.offset })
            };
            let pieces = layout.lookup(range.start, range.end - range.start);
            let stored = pieces.iter().filter_map(|piece| match piece {
                Piece::Data(extent) => Some(extent),
                Piece::Hole { .. } => None,
            });
            stored.map(placed).collect()
        }
        _ => Ok(Vec::new()),
    }
}
