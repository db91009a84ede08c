//! What content on raw and striped pools shares, and committed content there.

use std::fmt;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use crate::content::Content;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::member::Member;
use crate::member::striping::Stripes;
use crate::prefetch::Prefetcher;
use crate::ram_tier::{RamTier, RamTierOptions};
use crate::region_read::{RegionReader, Source};
use crate::types::{Borrower, NodeId, Seek};
use crate::write_behind::WriteBehind;

/// How an [`ExtentIo`] is made.
#[derive(Clone, Debug)]
pub struct ExtentIoOptions {
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Bytes on one member before the next one's turn.
    pub stripe_unit: u64,
    /// Budget of the RAM tier; dirty memory is part of it.
    pub ram_bytes: u64,
    /// Verify sums on every read.
    pub verify: bool,
    /// Threads that write; 0: in step, see [`WriteBehind::new`].
    pub writers: usize,
}

/// Members, RAM tier, writers and read-ahead of a pool with extents.
pub struct ExtentIo {
    stripes: Arc<Stripes>,
    reader: Arc<RegionReader>,
    prefetcher: Prefetcher,
    writes: WriteBehind,
    reclaim: OnceLock<Reclaim>,
}

type Reclaim = Box<dyn Fn() -> Result<bool> + Send + Sync>;

impl fmt::Debug for ExtentIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExtentIo")
            .field("stripes", &self.stripes)
            .field("reader", &self.reader)
            .finish_non_exhaustive()
    }
}

impl ExtentIo {
    /// Maps the RAM tier and starts the threads.
    pub fn new(members: Vec<Arc<dyn Member>>, options: &ExtentIoOptions) -> Result<Arc<ExtentIo>> {
        let threads = members.len().clamp(2, 4);
        let stripes = Arc::new(Stripes::new(members, options.chunk_size, options.stripe_unit)?);
        let tier = RamTier::new(&RamTierOptions {
            budget_bytes: options.ram_bytes,
            chunk_bytes: options.chunk_size,
            huge: true,
        })?;
        // A quarter of the tier may be dirty; without a tier, a little heap.
        let dirty = (tier.budget_bytes() / 4).clamp(8 << 20, 256 << 20).max(2 * options.chunk_size as usize);
        let writes = WriteBehind::new(options.writers, dirty, tier.arena())?;
        let reader = Arc::new(RegionReader::new(stripes.clone(), tier, options.verify));
        let prefetcher = Prefetcher::new(threads, Some(reader.clone()))?;
        Ok(Arc::new(ExtentIo { stripes, reader, prefetcher, writes, reclaim: OnceLock::new() }))
    }

    /// The members as one space.
    pub fn stripes(&self) -> &Arc<Stripes> {
        &self.stripes
    }

    /// Reads, verified, through the RAM tier.
    pub fn reader(&self) -> &Arc<RegionReader> {
        &self.reader
    }

    /// The RAM tier.
    pub fn tier(&self) -> &Arc<RamTier> {
        self.reader.tier()
    }

    /// Read-ahead and explicit lists.
    pub fn prefetcher(&self) -> &Prefetcher {
        &self.prefetcher
    }

    pub(crate) fn writes(&self) -> &WriteBehind {
        &self.writes
    }

    /// What a writer calls when space is short: makes a commit if that frees something, and says whether it did. Called without
    /// any lock of a draft held. Set once, by the pool.
    pub fn set_reclaim(&self, reclaim: impl Fn() -> Result<bool> + Send + Sync + 'static) {
        // A second setting would be a bug of the pool; the first one stays.
        let _ = self.reclaim.set(Box::new(reclaim));
    }

    pub(crate) fn reclaim(&self) -> Result<bool> {
        self.reclaim.get().map_or(Ok(false), |reclaim| reclaim())
    }
}

/// `lseek(2)` SEEK_DATA and SEEK_HOLE over a layout.
pub fn seek(layout: &Layout, offset: u64, what: Seek) -> Result<u64> {
    let size = layout.size();
    let found = match what {
        _ if offset >= size => None,
        Seek::Data => layout.next_data(offset).filter(|at| *at < size),
        Seek::Hole => Some(layout.next_hole(offset).min(size)),
    };
    found.ok_or_else(|| {
        Error::new(ErrorKind::OutOfRange, format!("no {what:?} at or after {offset} of {size} bytes"))
    })
}

/// Streams that are watched for being sequential, per content.
const STREAMS: usize = 4;
const READ_AHEAD_MIN: u64 = 1 << 20;
const READ_AHEAD_MAX: u64 = 8 << 20;

/// A reader that goes on where it was.
#[derive(Debug, Default)]
struct Stream {
    /// Where its last read ended; shared with read-ahead under way.
    end: Arc<AtomicU64>,
    /// How far read-ahead was asked for.
    ahead: u64,
    window: u64,
    /// Reads that continued it.
    runs: u32,
    /// For replacing the stalest.
    used: u64,
}

/// Committed content of a region: one layout, never changed.
#[derive(Debug)]
pub struct ExtentContent {
    io: Arc<ExtentIo>,
    node: NodeId,
    layout: Arc<Layout>,
    streams: Mutex<([Stream; STREAMS], u64)>,
}

impl ExtentContent {
    /// The content that `layout` describes. Its extents must stay as they are as long as this (or another holder of the layout) lives.
    pub fn new(io: &Arc<ExtentIo>, node: NodeId, layout: Arc<Layout>) -> ExtentContent {
        ExtentContent { io: io.clone(), node, layout, streams: Mutex::default() }
    }

    /// Its layout.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Takes what the RAM tier has of it out: nobody will ask for this generation again.
    pub(crate) fn forget(&self) {
        let frames = self.layout.size().div_ceil(self.io.tier().frame_bytes() as u64);
        self.io.tier().forget(self.node, self.layout.generation(), frames);
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source { node: self.node, layout: &self.layout }
    }

    /// Notes a read; asks for more where it continues an earlier one.
    fn note(&self, offset: u64, len: usize, to: Borrower) {
        let end = offset.saturating_add(len as u64);
        let budget = self.io.tier().budget_bytes() as u64;
        // The kernel's own read-ahead, where its requests are large: several of them are here at once, and more would only take turns with them.
        let is_ahead = to == Borrower::PageCache && len as u64 >= READ_AHEAD_MIN;
        if is_ahead || end >= self.layout.size() || budget < 4 * READ_AHEAD_MIN {
            return;
        }
        let most = READ_AHEAD_MAX.min(budget / 8);
        let ask = {
            let mut guard = self.streams.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let (streams, clock) = &mut *guard;
            *clock += 1;
            // Reads of one stream may arrive a little out of order, from several threads.
            let slack = 2 * len as u64;
            let known = streams.iter_mut().find(|stream| {
                let end = stream.end.load(Relaxed);
                stream.used > 0 && offset + slack >= end && offset <= end + slack
            });
            match known {
                Some(stream) => {
                    stream.used = *clock;
                    let end = stream.end.fetch_max(end, Relaxed).max(end);
                    stream.runs += 1;
                    if stream.runs < 2 {
                        // Twice may be chance.
                        return;
                    }
                    if stream.window == 0 {
                        stream.window = READ_AHEAD_MIN;
                        stream.ahead = end;
                    }
                    // When half of the window is used up, the next window goes out.
                    if stream.ahead < end + stream.window / 2 {
                        let from = stream.ahead.max(end);
                        let to = (end + stream.window).min(self.layout.size());
                        stream.ahead = to;
                        stream.window = (stream.window * 2).min(most);
                        (from < to).then(|| (from..to, stream.end.clone()))
                    } else {
                        None
                    }
                }
                None => {
                    if let Some(stalest) = streams.iter_mut().min_by_key(|stream| stream.used) {
                        *stalest = Stream { end: Arc::new(end.into()), used: *clock, ..Stream::default() };
                    }
                    None
                }
            }
        };
        if let Some((range, asked)) = ask {
            self.io.prefetcher().read_ahead(self.node, &self.layout, range, asked);
        }
    }
}

impl Content for ExtentContent {
    fn size(&self) -> u64 {
        self.layout.size()
    }

    fn allocated(&self) -> u64 {
        self.layout.allocated()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.note(offset, buf.len(), Borrower::Program);
        self.io.reader().read_at(self.source(), offset, buf)
    }

    fn read_with(&self, offset: u64, len: usize, to: Borrower, f: &mut dyn FnMut(&[&[u8]])) -> Result<usize> {
        self.note(offset, len, to);
        self.io.reader().read_with(self.source(), offset, len, f)
    }

    fn seek(&self, offset: u64, what: Seek) -> Result<u64> {
        seek(&self.layout, offset, what)
    }

    fn backing(&self) -> Option<Arc<File>> {
        None
    }
}
