//! Slabs: space of a pool that somebody else in the engine manages, in place.
//!
//! A slab is a region of size 0 whose layout has extents *beyond* the size. They are allocated, owned by the region and freed with it,
//! as any region's are; but no sum covers them, no handle reads them, and no commit replaces them: whoever has the slab open writes them as
//! he likes, and makes sums of his own. The KV store keeps its blocks and its index so.

use std::ffi::OsStr;
use std::sync::Arc;

use nvme::{Device, DeviceOptions, FileDevice};

use super::live::{AnyDraft, Current, Live};
use super::stored::Stored;
use super::{Inner, Pool, Storage};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Extent;
use crate::lease::{LeasedExtent, Source};
use crate::types::{Access, NewNode, NodeId, NodeKind};

/// A part of a slab that lies in one piece.
#[derive(Clone, Debug)]
pub(crate) struct SlabPiece {
    /// Offset in the slab.
    pub logical: u64,
    /// Bytes.
    pub len: u64,
    /// What holds them.
    pub device: Arc<dyn Device>,
    /// Offset there.
    pub offset: u64,
}

/// An open slab. Its space stays where it is, and is nobody else's, until this is dropped, also when its region is removed.
#[derive(Debug)]
pub(crate) struct Slab {
    node: NodeId,
    len: u64,
    pieces: Vec<SlabPiece>,
    // In this order: the content goes before what holds its node, that before the pool.
    _content: Arc<Stored>,
    live: Arc<Live>,
    pool: Arc<Inner>,
}

impl Slab {
    /// Its region.
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// All of its pieces, in order and without gaps.
    pub(crate) fn pieces(&self) -> &[SlabPiece] {
        &self.pieces
    }

    /// The pieces of a range, which lies within.
    pub(crate) fn range(&self, offset: u64, len: u64) -> impl Iterator<Item = SlabPiece> + '_ {
        let first = self.pieces.partition_point(|piece| piece.logical + piece.len <= offset);
        let end = offset + len;
        self.pieces[first..].iter().take_while(move |piece| piece.logical < end).map(move |piece| {
            let start = piece.logical.max(offset);
            SlabPiece {
                logical: start,
                len: (piece.logical + piece.len).min(end) - start,
                device: piece.device.clone(),
                offset: piece.offset + (start - piece.logical),
            }
        })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        self.pool.shared.close_live(&self.live, Access::Read);
    }
}

impl Pool {
    /// Makes a region that is a slab of `len` bytes, on the member `first` where that has room. It is in the catalog from the next snapshot
    /// on; what is written to it before that may be lost with it.
    pub(crate) fn make_slab(
        &self,
        parent: NodeId,
        name: &OsStr,
        len: u64,
        first: usize,
        new: &NewNode,
    ) -> Result<NodeId> {
        let shared = &self.inner.shared;
        debug_assert_eq!(new.kind, NodeKind::Region);
        let (attr, handle) = self.create_open(parent, name, new)?;
        let made = handle.make_slab(shared, len, first);
        drop(handle);
        if let Err(error) = made {
            if let Err(again) = self.unlink(parent, name) {
                tracing::warn!(error = %again.chain(), "cannot remove a slab that was not made");
            }
            return Err(error.context(format!("making a slab of {len} bytes")));
        }
        Ok(attr.node)
    }

    /// Opens a slab. `Corrupt`: the region is none (any more).
    pub(crate) fn open_slab(&self, node: NodeId) -> Result<Slab> {
        let shared = &self.inner.shared;
        let live = shared.open_live(node, Access::Read, 0)?;
        match self.slab_pieces(&live) {
            Ok((content, pieces)) => {
                let len = pieces.iter().map(|piece| piece.len).sum();
                Ok(Slab { node, len, pieces, _content: content, live, pool: self.inner.clone() })
            }
            Err(error) => {
                shared.close_live(&live, Access::Read);
                Err(error)
            }
        }
    }

    /// Where a slab lies: for tests that look after the space of all regions.
    #[doc(hidden)]
    pub fn slab_extents(&self, node: NodeId) -> Result<Vec<LeasedExtent>> {
        let slab = self.open_slab(node)?;
        let extent = |piece: &SlabPiece| LeasedExtent {
            logical: piece.logical,
            len: piece.len,
            source: Source::Device(piece.device.clone()),
            offset: piece.offset,
        };
        Ok(slab.pieces().iter().map(extent).collect())
    }

    fn slab_pieces(&self, live: &Live) -> Result<(Arc<Stored>, Vec<SlabPiece>)> {
        let shared = &self.inner.shared;
        let no_slab = |why: &str| Error::new(ErrorKind::Corrupt, format!("node {}: {why}", live.node));
        let stored = match live.current() {
            Some(Current::Stored(stored)) if stored.sealed() => stored,
            _ => return Err(no_slab("a slab that somebody writes to as a file")),
        };
        let layout = stored.layout(shared.chunk_size)?;
        if layout.size() != 0 {
            return Err(no_slab("a slab that somebody wrote to as a file"));
        }
        let mut at = 0;
        let mut pieces = Vec::with_capacity(layout.extent_count());
        for extent in layout.extents() {
            if extent.logical != at {
                return Err(no_slab("a slab with a hole"));
            }
            at = extent.logical_end();
            let device = self.slab_device(&stored, extent)?;
            if extent.offset.checked_add(extent.len).is_none_or(|end| end > device.len()) {
                return Err(no_slab("a slab whose file was cut"));
            }
            pieces.push(SlabPiece {
                logical: extent.logical,
                len: extent.len,
                device,
                offset: extent.offset,
            });
        }
        if pieces.is_empty() {
            return Err(no_slab("a slab without space"));
        }
        Ok((stored, pieces))
    }

    fn slab_device(&self, stored: &Stored, extent: &Extent) -> Result<Arc<dyn Device>> {
        match (stored, &self.inner.shared.storage) {
            (Stored::File(content), Storage::Files { directory, .. }) => {
                let path = directory.file_path(content.file);
                let read_only = self.inner.shared.read_only;
                let open = |direct| FileDevice::open(&path, &DeviceOptions { direct, read_only });
                // File systems without O_DIRECT (tmpfs) have the page cache in between.
                Ok(Arc::new(open(true).or_else(|_| open(false)).map_err(Error::from)?))
            }
            (_, Storage::Extents(io)) => io.stripes().device(extent),
            _ => Err(Error::new(ErrorKind::Corrupt, "a slab without a file")),
        }
    }
}

impl Live {
    /// Makes the region, which is open for writing and empty, a slab.
    pub(crate) fn become_slab(
        self: &Arc<Self>,
        shared: &Arc<super::Shared>,
        len: u64,
        first: usize,
    ) -> Result<()> {
        let draft = self.draft().ok_or_else(|| {
            Error::new(ErrorKind::Stale, format!("node {} is not being written", self.node))
        })?;
        let committed = match &*draft {
            AnyDraft::File(draft) => draft.slab(len)?,
            AnyDraft::Extents(draft) => draft.slab(len, first)?,
        };
        shared.install_slab(self, &draft, committed)
    }
}
