//! What a handle reads and writes: committed content, or a draft.

use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::error::Result;
use crate::layout::Layout;
use crate::member::Member;
use crate::pool::Verify;
use crate::types::{Allocate, Borrower, Seek, Timestamp};

/// What content of all nodes shares: the members and how to reach them.
#[derive(Debug)]
pub struct PoolIo {
    /// The members by index.
    pub members: Vec<Arc<dyn Member>>,
    /// Bytes under one checksum.
    pub chunk_size: u32,
    /// Bytes on one member before the next one's turn.
    pub stripe_unit: u64,
    /// When checksums are verified.
    pub verify: Verify,
    /// Operations in flight per thread.
    pub queue_depth: u32,
    /// Counters for [`PoolStat`](crate::PoolStat).
    pub counters: Counters,
}

/// Counters that content keeps.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes read through handles.
    pub read_bytes: AtomicU64,
    /// Bytes written through handles.
    pub written_bytes: AtomicU64,
    /// Chunks whose checksum was verified.
    pub verified_chunks: AtomicU64,
    /// Chunks whose checksum did not match.
    pub corrupt_chunks: AtomicU64,
}

/// Something that can be read: the current bytes of a region.
pub trait Content: Send + Sync + fmt::Debug {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Bytes it occupies on the members.
    fn allocated(&self) -> u64;
    /// Reads up to the end; returns how many bytes.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize>;
    /// Lends the bytes, in order, in one call of `f`, which keeps what it wants of them elsewhere; returns how many they are.
    /// Where nothing can be lent, that is a copy.
    fn read_with(&self, offset: u64, len: usize, to: Borrower, f: &mut dyn FnMut(&[&[u8]])) -> Result<usize> {
        let _ = to;
        lend_copy(self, offset, len, f)
    }
    /// The next data or hole from `offset`; `OutOfRange` where `lseek(2)` says ENXIO.
    fn seek(&self, offset: u64, what: Seek) -> Result<u64>;
    /// The file that holds exactly these bytes, if one does.
    fn backing(&self) -> Option<Arc<File>>;
}

/// Lends a copy of bytes, see [`Content::read_with`].
pub(crate) fn lend_copy<C: Content + ?Sized>(
    content: &C,
    offset: u64,
    len: usize,
    f: &mut dyn FnMut(&[&[u8]]),
) -> Result<usize> {
    let mut bytes = vec![0; content.size().saturating_sub(offset).min(len as u64) as usize];
    let read = content.read_at(offset, &mut bytes)?;
    f(&[&bytes[..read]]);
    Ok(read)
}

/// What a commit of a draft yields.
#[derive(Debug)]
pub struct Committed {
    /// Where the bytes are; its generation is set by the pool.
    pub layout: Layout,
    /// Whether its sums are valid.
    pub sealed: bool,
    /// Bytes it occupies on the members.
    pub allocated: u64,
    /// Last change of the bytes, where the draft knows better than the pool.
    pub modified: Option<Timestamp>,
}

/// Content that is being written. All methods may be called from several threads at once.
pub trait Draft: Content {
    /// Writes all of `data`, extending the size where needed.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize>;
    /// Sets the size; new bytes are zeros.
    fn set_len(&self, len: u64) -> Result<()>;
    /// `fallocate(2)`.
    fn allocate(&self, offset: u64, len: u64, mode: Allocate) -> Result<()>;
    /// Reports write errors that came late, once each.
    fn flush(&self) -> Result<()>;
    /// Last change of the bytes, where the draft knows better than the pool (a file that the kernel writes).
    fn modified(&self) -> Option<Timestamp>;
    /// Sets what [`modified`](Self::modified) says, as `utimensat(2)` does.
    fn set_modified(&self, time: Timestamp) -> Result<()>;
    /// Freezes what was written so far as a layout whose extents hold the bytes (handed to the device or file; not yet durable:
    /// the pool calls [`Member::sync`]). The draft goes on from there: later writes go to new extents, or, for a file, are in
    /// place when `seal` was false. With `seal`, nobody writes any more and sums are made; `cancel` turning true stops that
    /// early with `None`, and the draft goes on as if nothing had been asked.
    fn commit(&self, seal: bool, cancel: &AtomicBool) -> Result<Option<Committed>>;
    /// Gives back all space that no commit returned. Called once, last, when the draft is given up or was sealed.
    fn discard(&self);
}
