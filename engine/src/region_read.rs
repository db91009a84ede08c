//! Verified reads of regions that are made of extents.
//!
//! ```text
//! range -> chunks -> layout: holes and extents -> frames -> RAM tier
//!                                                   hit:  a page                      --> slices
//!                                                   miss: one batch of O_DIRECT reads --> CRC of every chunk --> published
//!                                                   busy: somebody else reads it      --> wait, after our own batch
//! ```
//!
//! Nothing is handed out before its chunk's sum was right, however few of its bytes were asked for. A whole request is one
//! submit over all members. Sums are computed as completions come in, while the rest of the batch is still on its way and the
//! bytes are still in the cache.
//!
//! Who reads holds the `Arc<Layout>` meanwhile: extents of a replaced content are not reused before the last such holder is gone
//! (see [`crate::member::striping`]).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nvme::{Buffer, Op, Queue};

use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Extent, Layout, Piece};
use crate::member::striping::Stripes;
use crate::ram_tier::{Fill, FillTicket, FrameKey, Page, Part, RamTier};

/// How long a reader waits for another one's read before it gives up.
const WAIT: Duration = Duration::from_secs(60);
/// Bytes that [`RegionReader::read_at`] has in flight.
const WINDOW_BYTES: u64 = 4 << 20;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// One generation of a region's content, to read from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Node, for the RAM tier's keys and messages.
    pub node: u64,
    /// Where it lies.
    pub layout: &'a Arc<Layout>,
}

/// Counters of a reader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// Bytes read from members.
    pub read_bytes: u64,
    /// Chunks whose sum was checked.
    pub verified_chunks: u64,
    /// Chunks whose sum was wrong, twice.
    pub corrupt_chunks: u64,
    /// Reads that failed or did not fit their sums, and were made again.
    pub retried_reads: u64,
    /// Of those, the ones that were right the second time.
    pub repaired_reads: u64,
}

/// Reads extents through the RAM tier; see the module documentation.
#[derive(Debug)]
pub struct RegionReader {
    stripes: Arc<Stripes>,
    tier: Arc<RamTier>,
    verify: bool,
    read_bytes: AtomicU64,
    verified_chunks: AtomicU64,
    corrupt_chunks: AtomicU64,
    retried_reads: AtomicU64,
    repaired_reads: AtomicU64,
}

/// Distinguishes the completions of one batch from those that an earlier batch on this thread left behind when it timed out.
static BATCHES: AtomicU64 = AtomicU64::new(1);

/// A read that fills a run of chunks of one extent.
struct Miss {
    ticket: Option<FillTicket>,
    extent: Extent,
    /// It was read once, in vain.
    again: bool,
}

/// Verified bytes of a region in the RAM tier. They are neither evicted nor changed as long as this lives.
#[derive(Clone, Debug)]
pub struct Resident {
    /// First byte in the region.
    pub logical: u64,
    /// What holds them, and more.
    pub page: Arc<Page>,
    /// Which of the page's bytes.
    pub bytes: Range<usize>,
}

/// Bytes of a region, held.
enum Held {
    Page(Arc<Page>, Range<usize>),
    Zeros(usize),
}

impl RegionReader {
    /// Reads from `stripes` through `tier`. Without `verify` sums are not looked at (scrubbing does).
    pub fn new(stripes: Arc<Stripes>, tier: Arc<RamTier>, verify: bool) -> RegionReader {
        RegionReader {
            stripes,
            tier,
            verify,
            read_bytes: AtomicU64::new(0),
            verified_chunks: AtomicU64::new(0),
            corrupt_chunks: AtomicU64::new(0),
            retried_reads: AtomicU64::new(0),
            repaired_reads: AtomicU64::new(0),
        }
    }

    /// The RAM tier.
    pub fn tier(&self) -> &Arc<RamTier> {
        &self.tier
    }

    /// The members.
    pub fn stripes(&self) -> &Arc<Stripes> {
        &self.stripes
    }

    /// Counters now.
    pub fn stats(&self) -> ReadStats {
        ReadStats {
            read_bytes: self.read_bytes.load(Relaxed),
            verified_chunks: self.verified_chunks.load(Relaxed),
            corrupt_chunks: self.corrupt_chunks.load(Relaxed),
            retried_reads: self.retried_reads.load(Relaxed),
            repaired_reads: self.repaired_reads.load(Relaxed),
        }
    }

    /// Fills `buf` from `offset`, as far as the region goes. Returns the bytes read.
    pub fn read_at(&self, source: Source<'_>, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let _span =
            tracing::trace_span!("region_read", node = source.node, offset, len = buf.len()).entered();
        let end = source.layout.size().min(offset.saturating_add(buf.len() as u64));
        let mut at = offset;
        while at < end {
            let window_end = end.min(at + WINDOW_BYTES);
            self.fetch(source, at..window_end, &mut |logical, held| {
                let start = (logical - offset) as usize;
                match held {
                    Held::Page(page, range) => {
                        buf[start..start + range.len()].copy_from_slice(&page.bytes()[range])
                    }
                    Held::Zeros(len) => buf[start..start + len].fill(0),
                }
            })?;
            at = window_end;
        }
        Ok(end.saturating_sub(offset) as usize)
    }

    /// Lends `len` bytes from `offset`, as far as the region goes, to `f` without a copy: slices in order. `f` keeps what it wants of them
    /// elsewhere: see [`RamTier::mark_cold`]. Returns the bytes lent.
    pub fn read_with(
        &self,
        source: Source<'_>,
        offset: u64,
        len: usize,
        f: &mut dyn FnMut(&[&[u8]]),
    ) -> Result<usize> {
        let _span = tracing::trace_span!("region_read", node = source.node, offset, len).entered();
        let end = source.layout.size().min(offset.saturating_add(len as u64));
        if offset >= end {
            f(&[]);
            return Ok(0);
        }
        let mut held = Vec::with_capacity(((end - offset) as usize / self.tier.frame_bytes()) + 2);
        self.fetch(source, offset..end, &mut |logical, bytes| held.push((logical, bytes)))?;
        held.sort_unstable_by_key(|(logical, _)| *logical);
        let mut slices: Vec<&[u8]> = Vec::with_capacity(held.len());
        for (_, bytes) in &held {
            match bytes {
                Held::Page(page, range) => slices.push(&page.bytes()[range.clone()]),
                Held::Zeros(len) => {
                    let mut left = *len;
                    while left > 0 {
                        let n = left.min(ZEROS.len());
                        slices.push(&ZEROS[..n]);
                        left -= n;
                    }
                }
            }
        }
        f(&slices);
        drop(slices);
        drop(held);
        self.mark_cold(source, offset..end);
        Ok((end - offset) as usize)
    }

    /// Reads what of `range` nobody has or reads yet into the RAM tier; `keep`: for more than one reader. Returns the bytes read.
    pub fn prefetch(&self, source: Source<'_>, range: Range<u64>, keep: bool) -> Result<u64> {
        if self.tier.arena().is_none() {
            return Ok(0);
        }
        let mut misses = Vec::new();
        self.for_frames(source, &range, |key, chunks, extent| {
            for ticket in self.tier.claim_missing(key, chunks) {
                misses.extend(self.miss(source, ticket, &extent));
            }
        });
        let bytes = misses.iter().map(|miss| miss.extent.len).sum();
        self.run(source, misses, &mut |_, _| {})?;
        if keep {
            self.for_frames(source, &range, |key, _, _| self.tier.keep(key));
        }
        Ok(bytes)
    }

    /// What of `range` the RAM tier has, in order; reads nothing and waits for nobody. Nothing where sums are not looked at.
    pub fn resident(&self, source: Source<'_>, range: Range<u64>) -> Vec<Resident> {
        let range = range.start..range.end.min(source.layout.size());
        let mut found = Vec::new();
        if !self.verify || range.start >= range.end {
            return found;
        }
        self.for_frames(source, &range, |key, chunks, _| {
            for (chunks, page) in self.tier.resident(key, chunks) {
                let part = self.logical_range(source, key, chunks);
                let (start, end) = (part.start.max(range.start), part.end.min(range.end));
                let page_start = self.logical_range(source, key, page.chunks()).start;
                if start < end {
                    let bytes = (start - page_start) as usize..(end - page_start) as usize;
                    found.push(Resident { logical: start, page, bytes });
                }
            }
        });
        found
    }

    /// Who read `range` keeps it elsewhere.
    fn mark_cold(&self, source: Source<'_>, range: Range<u64>) {
        if self.tier.arena().is_none() {
            return;
        }
        // Beyond the end nobody reads: a last chunk is had whole.
        let end = if range.end < source.layout.size() { range.end } else { u64::MAX };
        self.for_frames(source, &range, |key, chunks, _| {
            let part = self.logical_range(source, key, chunks);
            let bytes = part.end.min(end).saturating_sub(part.start.max(range.start));
            self.tier.mark_cold(key, bytes as usize);
        });
    }

    /// Fills `buf` with a chunk if the RAM tier has it; reads nothing.
    pub(crate) fn cached(&self, source: Source<'_>, chunk: u64, buf: &mut [u8]) -> bool {
        let start = chunk * source.layout.chunk_size() as u64;
        let mut parts = Vec::new();
        let mut found = false;
        self.for_frames(source, &(start..start + buf.len() as u64), |key, chunks, _| {
            self.tier.claim(key, chunks, &mut parts);
            // What it hands out to be filled goes back unfilled.
            for part in parts.drain(..) {
                if let Part::Hit { chunks, page } = part {
                    let from = (start - self.logical_range(source, key, page.chunks()).start) as usize;
                    buf.copy_from_slice(&page.bytes()[from..from + buf.len()]);
                    found = chunks.len() == 1;
                }
            }
        });
        found
    }

    /// Reads chunks past the RAM tier, verified: for content that has no generation yet. `sink` gets them in any order.
    pub(crate) fn read_uncached(
        &self,
        source: Source<'_>,
        range: Range<u64>,
        sink: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<()> {
        let chunk = source.layout.chunk_size() as u64;
        let range = range.start / chunk * chunk..range.end.next_multiple_of(chunk);
        let mut misses = Vec::new();
        for piece in source.layout.lookup(range.start, range.end - range.start) {
            let Piece::Data(extent) = piece else { continue };
            let step = (self.tier.frame_bytes() as u64).max(chunk);
            let mut at = extent.logical;
            while at < extent.logical_end() {
                let end = extent.logical_end().min(at + step);
                misses.extend(extent.cut(at..end).map(|extent| Miss { ticket: None, extent, again: false }));
                at = end;
            }
        }
        self.run(source, misses, &mut |extent, done| {
            if let Done::Loose(buffer) = done {
                sink(extent.logical, &buffer);
            }
        })
    }

    /// Calls `f` for every run of stored chunks within one frame that `range` touches.
    fn for_frames(
        &self,
        source: Source<'_>,
        range: &Range<u64>,
        mut f: impl FnMut(FrameKey, Range<u32>, Extent),
    ) {
        let chunk = source.layout.chunk_size() as u64;
        let frame = self.tier.frame_bytes() as u64;
        let start = range.start / chunk * chunk;
        let end = range.end.min(source.layout.size()).next_multiple_of(chunk);
        if start >= end {
            return;
        }
        for piece in source.layout.lookup(start, end - start) {
            let Piece::Data(extent) = piece else { continue };
            let mut at = extent.logical;
            while at < extent.logical_end() {
                let frame_start = at / frame * frame;
                let cut_end = extent.logical_end().min(frame_start + frame);
                let key =
                    FrameKey { node: source.node, generation: source.layout.generation(), frame: at / frame };
                let chunks = ((at - frame_start) / chunk) as u32..((cut_end - frame_start) / chunk) as u32;
                if let Some(cut) = extent.cut(at..cut_end) {
                    f(key, chunks, cut);
                }
                at = cut_end;
            }
        }
    }

    fn miss(&self, source: Source<'_>, ticket: FillTicket, extent: &Extent) -> Option<Miss> {
        let range = self.logical_range(source, ticket.key(), ticket.chunks());
        let extent = extent.cut(range)?;
        Some(Miss { ticket: Some(ticket), extent, again: false })
    }

    fn logical_range(&self, source: Source<'_>, key: FrameKey, chunks: Range<u32>) -> Range<u64> {
        let chunk = source.layout.chunk_size() as u64;
        let start = key.frame * self.tier.frame_bytes() as u64;
        start + chunks.start as u64 * chunk..start + chunks.end as u64 * chunk
    }

    /// Gives every byte of `range` (which lies within the size) to `sink`, verified, in any order.
    fn fetch(&self, source: Source<'_>, range: Range<u64>, sink: &mut dyn FnMut(u64, Held)) -> Result<()> {
        // Holes first: they cost nothing.
        for piece in source.layout.lookup(range.start, range.end - range.start) {
            if let Piece::Hole { logical, len } = piece {
                sink(logical, Held::Zeros(len as usize));
            }
        }
        let give = |page: &Arc<Page>, key: FrameKey, part: Range<u64>, sink: &mut dyn FnMut(u64, Held)| {
            let start = part.start.max(range.start);
            let end = part.end.min(range.end);
            if start < end {
                let page_start = self.logical_range(source, key, page.chunks()).start;
                sink(
                    start,
                    Held::Page(page.clone(), (start - page_start) as usize..(end - page_start) as usize),
                );
            }
        };
        let mut misses = Vec::new();
        let mut waits: Vec<(FrameKey, Range<u32>, Extent, Arc<Fill>)> = Vec::new();
        let mut parts = Vec::new();
        self.for_frames(source, &range, |key, chunks, extent| {
            self.tier.claim(key, chunks, &mut parts);
            for part in parts.drain(..) {
                match part {
                    Part::Hit { chunks, page } => {
                        give(&page, key, self.logical_range(source, key, chunks), sink)
                    }
                    Part::Fill(ticket) => misses.extend(self.miss(source, ticket, &extent)),
                    Part::Wait { chunks, fill } => waits.push((key, chunks, extent, fill)),
                }
            }
        });
        let deadline = Instant::now() + WAIT;
        loop {
            // Our own first: waiting while others wait for us would be a deadlock.
            let frame_bytes = self.tier.frame_bytes() as u64;
            let (node, generation) = (source.node, source.layout.generation());
            self.run(source, std::mem::take(&mut misses), &mut |extent, done| {
                if let Done::Page(page) = done {
                    let key = FrameKey { node, generation, frame: extent.logical / frame_bytes };
                    give(&page, key, extent.logical..extent.logical_end(), sink);
                }
            })?;
            if waits.is_empty() {
                return Ok(());
            }
            for (key, chunks, extent, fill) in std::mem::take(&mut waits) {
                if let Some(page) = fill.wait(deadline) {
                    give(&page, key, self.logical_range(source, key, chunks), sink);
                    continue;
                }
                if Instant::now() >= deadline {
                    return Err(Error::new(
                        ErrorKind::Timeout,
                        format!(
                            "waited {} s for another reader's read of node {}",
                            WAIT.as_secs(),
                            source.node
                        ),
                    ));
                }
                // That reader failed: try ourselves, to learn why.
                self.tier.claim(key, chunks, &mut parts);
                for part in parts.drain(..) {
                    match part {
                        Part::Hit { chunks, page } => {
                            give(&page, key, self.logical_range(source, key, chunks), sink)
                        }
                        Part::Fill(ticket) => misses.extend(self.miss(source, ticket, &extent)),
                        Part::Wait { chunks, fill } => waits.push((key, chunks, extent, fill)),
                    }
                }
            }
        }
    }

    /// Reads all misses in one batch, checks them, publishes them, and tells `done` of each. On an error the rest still completes, and
    /// the first error returns.
    fn run(&self, source: Source<'_>, misses: Vec<Miss>, done: &mut dyn FnMut(&Extent, Done)) -> Result<()> {
        if misses.is_empty() {
            return Ok(());
        }
        let batch = BATCHES.fetch_add(1, Relaxed) << 20;
        let mut misses: Vec<Option<Miss>> = misses.into_iter().map(Some).collect();
        let mut failed = None;
        let ran = nvme::with_thread_queue(self.tier.arena(), |queue| {
            self.run_on(queue, source, batch, &mut misses, &mut failed, done)
        })
        .map_err(Error::from);
        match (ran, failed) {
            (_, Some(error)) => Err(error),
            (Ok(result), None) => result,
            (Err(error), None) => Err(error),
        }
    }

    fn run_on(
        &self,
        queue: &mut Queue,
        source: Source<'_>,
        batch: u64,
        misses: &mut [Option<Miss>],
        failed: &mut Option<Error>,
        done: &mut dyn FnMut(&Extent, Done),
    ) -> Result<()> {
        let mut next = 0;
        let mut open = 0usize;
        let mut again = Vec::new();
        loop {
            let mut full = false;
            open += self.read_again(queue, source, batch, misses, &mut again, failed);
            while next < misses.len() && failed.is_none() && !full {
                let Some(miss) = &misses[next] else { break };
                let op = match self.op(source, batch | next as u64, &miss.extent) {
                    Ok(op) => op,
                    Err(error) => {
                        failed.get_or_insert(error);
                        break;
                    }
                };
                match queue.push(op) {
                    Ok(()) => {
                        next += 1;
                        open += 1;
                    }
                    Err(refused) if refused.error.kind() == nvme::ErrorKind::QueueFull && open > 0 => {
                        full = true
                    }
                    Err(refused) => {
                        failed.get_or_insert(Error::from(refused.error));
                    }
                }
            }
            if open == 0 && again.is_empty() {
                return Ok(());
            }
            // Submits what was pushed, and waits, in one system call.
            queue.wait(1)?;
            queue.reap(|completion| {
                if completion.tag >> 20 != batch >> 20 {
                    return; // of a batch that timed out earlier: its buffer goes back here
                }
                open -= 1;
                let index = (completion.tag & 0xf_ffff) as usize;
                let Some(mut miss) = misses.get_mut(index).and_then(Option::take) else { return };
                let read = match (completion.result, completion.op.buffer) {
                    (Ok(_), Some(buffer)) => self.check(source, &miss.extent, &buffer).map(|()| buffer),
                    (Err(error), _) => Err(Error::from(error).context(format!(
                        "reading {} bytes at {} of {} (node {}, offset {})",
                        miss.extent.len,
                        miss.extent.offset,
                        self.stripes.member_name(miss.extent.member),
                        source.node,
                        miss.extent.logical
                    ))),
                    (Ok(_), None) => Err(Error::new(ErrorKind::Io, "a read came back without its buffer")),
                };
                match read {
                    Ok(buffer) => {
                        if miss.again {
                            self.repaired(source, &miss.extent);
                        }
                        match miss.ticket {
                            Some(ticket) => done(&miss.extent, Done::Page(ticket.publish(buffer))),
                            None => done(&miss.extent, Done::Loose(buffer)),
                        }
                    }
                    Err(error) if !miss.again && is_worth_another_read(&error) => {
                        tracing::warn!(node = source.node, error = %error.chain(), "reading it again");
                        miss.again = true;
                        misses[index] = Some(miss);
                        again.push(index);
                    }
                    Err(error) => {
                        if error.kind() == ErrorKind::Corrupt {
                            self.corrupt_chunks.fetch_add(1, Relaxed);
                        }
                        failed.get_or_insert(error);
                    }
                }
            });
        }
    }

    /// Gives the queue the reads of `again` once more, as far as it takes them. Returns how many it took.
    fn read_again(
        &self,
        queue: &mut Queue,
        source: Source<'_>,
        batch: u64,
        misses: &[Option<Miss>],
        again: &mut Vec<usize>,
        failed: &mut Option<Error>,
    ) -> usize {
        let mut taken = 0;
        while let Some(&index) = again.last() {
            let Some(miss) = &misses[index] else { break };
            let pushed = self
                .op(source, batch | index as u64, &miss.extent)
                .map(|op| queue.push(op).map_err(|refused| refused.error));
            match pushed {
                Ok(Ok(())) => taken += 1,
                // Something is in flight then: it makes room.
                Ok(Err(error)) if error.kind() == nvme::ErrorKind::QueueFull => break,
                Ok(Err(error)) => drop(failed.get_or_insert(error.into())),
                Err(error) => drop(failed.get_or_insert(error)),
            }
            self.retried_reads.fetch_add(1, Relaxed);
            again.pop();
        }
        taken
    }

    /// A read was right the second time.
    #[cold]
    fn repaired(&self, source: Source<'_>, extent: &Extent) {
        self.repaired_reads.fetch_add(1, Relaxed);
        tracing::warn!(
            node = source.node,
            member = self.stripes.member_name(extent.member),
            offset = extent.offset,
            "a second read was right"
        );
    }

    fn op(&self, source: Source<'_>, tag: u64, extent: &Extent) -> Result<Op> {
        let device = self.stripes.device(extent)?;
        let key = FrameKey {
            node: source.node,
            generation: source.layout.generation(),
            frame: extent.logical / self.tier.frame_bytes() as u64,
        };
        let buffer = self.tier.buffer(extent.len as usize, &key)?;
        let mut op = Op::read(device, extent.offset, buffer);
        op.tag = tag;
        Ok(op)
    }

    /// Checks the sums of whole chunks read from `extent`.
    fn check(&self, source: Source<'_>, extent: &Extent, bytes: &Buffer) -> Result<()> {
        self.read_bytes.fetch_add(extent.len, Relaxed);
        if !self.verify {
            return Ok(());
        }
        let chunk_size = source.layout.chunk_size() as usize;
        let first = extent.logical / chunk_size as u64;
        let mut checked = 0;
        for (index, chunk) in (first..).zip(bytes[..extent.len as usize].chunks(chunk_size)) {
            let logical = index * chunk_size as u64;
            let valid = source.layout.size().saturating_sub(logical).min(chunk.len() as u64) as usize;
            checked += 1;
            let found = crc32fast::hash(&chunk[..valid]);
            let expected = source.layout.sum(index);
            if found != expected {
                self.verified_chunks.fetch_add(checked, Relaxed);
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "node {}: chunk {index} (bytes {logical}..{}) fails its checksum: {found:08x}, not {expected:08x}; it lies on member {} ({}), file {}, offset {}",
                        source.node,
                        logical + valid as u64,
                        extent.member,
                        self.stripes.member_name(extent.member),
                        extent.file,
                        extent.offset + (logical - extent.logical)
                    ),
                ));
            }
        }
        self.verified_chunks.fetch_add(checked, Relaxed);
        Ok(())
    }
}

/// Whether a read that failed so is made once more.
///
/// A sum that does not match may be a bit that flipped on its way, and an I/O error a path that hiccuped: both cost one more command to
/// find out. A deadline is not waited for twice, and a device that is gone stays gone.
#[cold]
fn is_worth_another_read(error: &Error) -> bool {
    let device = std::error::Error::source(error).and_then(|source| source.downcast_ref::<nvme::Error>());
    match (error.kind(), device.map(nvme::Error::kind)) {
        (ErrorKind::Corrupt, _) => true,
        (ErrorKind::Io, Some(kind)) => matches!(kind, nvme::ErrorKind::Io | nvme::ErrorKind::Media),
        _ => false,
    }
}

enum Done {
    Page(Arc<Page>),
    Loose(Buffer),
}

#[cfg(test)]
mod tests;
