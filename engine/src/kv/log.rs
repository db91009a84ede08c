//! The index on the members: two logs that take turns.
//!
//! ```text
//! log-a:  header | checkpoint ...            | changes since ... | free
//! log-b:  header | an older checkpoint ...   | older changes ... |
//! ```
//!
//! A log that is full, or that has more changes than checkpoint, is followed by a checkpoint into the other one. That begins to count with
//! its header, which is written last, after everything that it speaks of is durable. A crash leaves the old log or the new one.

use std::ffi::OsStr;
use std::sync::Arc;

use nvme::{Buffer, Device, Op, with_thread_queue};

use super::record::{Header, PAGE, PAGE_ROOM, PageWriter, Record, read_page};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Pool;
use crate::pool::slab::Slab;
use crate::types::{NewNode, NodeId, NodeKind, RenameFlags};

/// Names of the two logs.
pub(crate) const NAMES: [&str; 2] = ["log-a", "log-b"];
/// A log that is to become one of them.
pub(crate) const NEW: &str = "log-new";
/// Read and written at once.
const STEP: usize = 4 << 20;
/// Pages between two flushes at most, so that a crash leaves no hole that is longer, and no page behind a longer one that would count when
/// the log has grown up to it. This many pages in a row that are none of the log: it has ended.
const GAP: u64 = 256;

/// A log and its free half.
#[derive(Debug, Default)]
pub(crate) struct Log {
    regions: [Option<Arc<Slab>>; 2],
    current: usize,
    epoch: u64,
    /// A log without a header may have been of a later epoch than any that is known: that one's number is passed over.
    skip: u64,
    nonce: u64,
    checkpoint_pages: u64,
    next: u64,
    /// Pages that a new log has for changes at least.
    pub spare: u64,
    /// The checkpoint that is written beside commits.
    pub under_way: Option<UnderWay>,
    /// The epoch in which there was no space for one beside the changes.
    pub no_space: u64,
}

/// A checkpoint that is written a step at a time, with commits between the steps. What they change counts after what it has.
#[derive(Debug)]
pub(crate) struct UnderWay {
    pub checkpoint: Checkpoint,
    /// The entry to go on with.
    pub next: u32,
    /// What was committed since it began.
    pub since: Vec<Record>,
}

/// A region of the pool that nobody else is meant to look into.
pub(crate) fn private(kind: NodeKind) -> NewNode {
    let mode = if kind == NodeKind::Directory { 0o700 } else { 0o600 };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    NewNode { kind, mode, uid, gid, rdev: 0, target: None }
}

/// Runs operations on this thread's queue; the first error counts, and all of them are over.
fn run(ops: Vec<Op>, doing: &str) -> Result<Vec<Buffer>> {
    let done = with_thread_queue(None, |queue| queue.run(ops))
        .and_then(|done| done)
        .map_err(|error| Error::from(error).context(doing))?;
    let mut buffers = Vec::with_capacity(done.len());
    for completion in done {
        completion.result.map_err(|error| Error::from(error).context(doing))?;
        buffers.extend(completion.op.buffer);
    }
    Ok(buffers)
}

/// Makes what was written to slabs durable.
pub(crate) fn flush(slabs: &[Arc<Slab>]) -> Result<()> {
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for device in slabs.iter().flat_map(|slab| slab.pieces()).map(|piece| &piece.device) {
        if !devices.iter().any(|known| Arc::ptr_eq(known, device)) {
            devices.push(device.clone());
        }
    }
    run(devices.into_iter().map(Op::flush).collect(), "flushing the KV store").map(drop)
}

fn write(slab: &Slab, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut ops = Vec::new();
    for piece in slab.range(offset, bytes.len() as u64) {
        let from = (piece.logical - offset) as usize;
        let part = &bytes[from..from + piece.len as usize];
        let mut buffer = Buffer::heap(part.len()).map_err(Error::from)?;
        buffer[..part.len()].copy_from_slice(part);
        ops.push(Op::write(piece.device, piece.offset, buffer).range(0..part.len()));
    }
    run(ops, "writing the KV store's index").map(drop)
}

fn read(slab: &Slab, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    let mut ops = Vec::new();
    let mut lens = Vec::new();
    for piece in slab.range(offset, len as u64) {
        let buffer = Buffer::heap(piece.len as usize).map_err(Error::from)?;
        lens.push(piece.len as usize);
        ops.push(Op::read(piece.device, piece.offset, buffer).range(0..piece.len as usize));
    }
    for (buffer, len) in run(ops, "reading the KV store's index")?.iter().zip(lens) {
        bytes.extend_from_slice(&buffer[..len]);
    }
    Ok(bytes)
}

/// What was found of the index.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub header: Option<Header>,
    /// Pages that should be there and cannot be used.
    pub bad_pages: u64,
}

fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Log {
    /// Opens both logs and chooses the newer one that can be read.
    pub(crate) fn open(pool: &Pool, dir: NodeId, spare: u64) -> Result<(Log, Found)> {
        let mut log = Log { spare: spare.max(1), ..Log::default() };
        let mut found = Found::default();
        for (index, name) in NAMES.iter().enumerate() {
            let node = match pool.lookup(dir, OsStr::new(name)) {
                Ok(attr) => attr.node,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let slab = match pool.open_slab(node) {
                Ok(slab) => Arc::new(slab),
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    tracing::warn!(error = %error.chain(), "a log of the KV store is lost");
                    found.bad_pages += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let page = read(&slab, 0, PAGE);
            log.regions[index] = Some(slab);
            let page = match page {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "the header of a log of the KV store cannot be read");
                    found.bad_pages += 1;
                    log.skip += 1;
                    continue;
                }
            };
            let Some(mut header) = Header::decode(&page)? else {
                log.skip += 1;
                continue;
            };
            if header.pool != pool.inner.shared.pool_id {
                continue;
            }
            let pages = log.regions[index].as_ref().map_or(0, |slab| slab.len() / PAGE as u64);
            header.checkpoint_pages = header.checkpoint_pages.min(pages.saturating_sub(1));
            if found.header.is_none_or(|other| other.epoch < header.epoch) {
                found.header = Some(header);
                log.current = index;
            }
        }
        if let Some(header) = &found.header {
            log.epoch = header.epoch;
            log.nonce = header.nonce;
            log.checkpoint_pages = header.checkpoint_pages;
        }
        Ok((log, found))
    }

    /// Gives every record of the log to `each`, in order. Returns the pages that should be there and cannot be used.
    pub(crate) fn replay(&mut self, each: &mut dyn FnMut(Record)) -> Result<u64> {
        let Some(region) = self.regions[self.current].clone().filter(|_| self.epoch > 0) else {
            return Ok(0);
        };
        let pages = region.len() / PAGE as u64;
        let certain = (1 + self.checkpoint_pages).min(pages);
        let (mut at, mut last_good, mut bad) = (1, certain.saturating_sub(1), 0);
        'log: while at < pages {
            let count = (STEP / PAGE).min((pages - at) as usize);
            // The end of the log is looked for in smaller steps.
            let count =
                if at < certain { count.min((certain - at) as usize) } else { count.min(GAP as usize) };
            let bytes = match read(&region, at * PAGE as u64, count * PAGE) {
                Ok(bytes) => bytes,
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "pages of the KV store's index cannot be read");
                    vec![0; count * PAGE]
                }
            };
            for page in bytes.chunks(PAGE) {
                if read_page(page, self.nonce, at, each) {
                    if at >= certain {
                        bad += at - last_good - 1;
                    }
                    last_good = last_good.max(at);
                } else if at < certain {
                    bad += 1;
                } else if at - last_good > GAP {
                    break 'log;
                }
                at += 1;
            }
        }
        self.next = last_good + 1;
        Ok(bad)
    }

    /// Counts checkpoints; 0: there was none.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Which of the two is in use.
    pub(crate) fn current(&self) -> usize {
        self.current
    }

    /// Bytes of both logs.
    pub(crate) fn allocated(&self) -> u64 {
        self.regions.iter().flatten().map(|slab| slab.len()).sum()
    }

    fn next_epoch(&self) -> u64 {
        self.epoch + 1 + self.skip
    }

    fn pages_of(records: &[Record]) -> u64 {
        let (mut pages, mut used) = (0, PAGE_ROOM);
        for record in records {
            if used + record.len() > PAGE_ROOM {
                (pages, used) = (pages + 1, 0);
            }
            used += record.len();
        }
        pages
    }

    /// Whether the next records go to this log, rather than into a checkpoint.
    pub(crate) fn has_room(&self, records: &[Record]) -> bool {
        let Some(region) = self.regions[self.current].as_ref().filter(|_| self.epoch > 0) else {
            return false;
        };
        let pages = Log::pages_of(records);
        self.next + pages <= region.len() / PAGE as u64
            && (self.under_way.is_some() || self.changes() + pages <= self.checkpoint_pages.max(self.spare))
    }

    /// Pages of changes.
    fn changes(&self) -> u64 {
        self.next.saturating_sub(1 + self.checkpoint_pages)
    }

    /// Whether a checkpoint is due that can be written while there is room for changes still.
    pub(crate) fn wants_checkpoint(&self) -> bool {
        let limit = self.checkpoint_pages.max(self.spare);
        self.epoch > self.no_space && self.under_way.is_none() && self.changes() >= limit - limit / 4
    }

    /// Adds records, durably.
    pub(crate) fn append(&mut self, records: &[Record]) -> Result<()> {
        let region = self.regions[self.current]
            .clone()
            .ok_or_else(|| Error::new(ErrorKind::Stale, "the KV store has no log"))?;
        let mut pages = PageWriter::new(self.nonce, self.next);
        records.iter().for_each(|record| pages.push(record));
        let bytes = pages.finish();
        for step in bytes.chunks(GAP as usize * PAGE) {
            write(&region, self.next * PAGE as u64, step)?;
            flush(std::slice::from_ref(&region))?;
            self.next += (step.len() / PAGE) as u64;
        }
        Ok(())
    }

    /// Pages of a log that has room for checkpoints of `pages` and as many changes.
    pub(crate) fn size_for(&self, pages: u64) -> u64 {
        1 + pages + self.spare.max(pages)
    }

    /// Whether both logs are as large as that.
    pub(crate) fn fits(&self, pages: u64) -> bool {
        let least = self.size_for(pages) * PAGE as u64;
        self.regions.iter().all(|region| region.as_ref().is_some_and(|region| region.len() >= least))
    }

    fn other(&self) -> usize {
        if self.epoch == 0 { 0 } else { 1 - self.current }
    }

    /// Sees to it that the log that is not in use has room for checkpoints of `pages`.
    pub(crate) fn prepare(&mut self, pool: &Pool, dir: NodeId, pages: u64) -> Result<()> {
        let target = self.other();
        let wanted = self.size_for(pages) * PAGE as u64;
        if self.regions[target].as_ref().is_some_and(|region| region.len() >= wanted) {
            return Ok(());
        }
        // The old one goes when the new one is there: where there is no space for both, it stays.
        let (new, name) = (OsStr::new(NEW), OsStr::new(NAMES[target]));
        match pool.unlink(dir, new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let node = pool.make_slab(dir, new, wanted, target, &private(NodeKind::Region))?;
        pool.rename(dir, new, dir, name, RenameFlags::default())?;
        pool.sync()?;
        self.regions[target] = Some(Arc::new(pool.open_slab(node)?));
        Ok(())
    }

    /// Makes the other log ready for a checkpoint of `pages`; it does not count before [`finish`](Self::finish).
    pub(crate) fn begin(&mut self, pool: &Pool, dir: NodeId, pages: u64) -> Result<Checkpoint> {
        let target = self.other();
        let least = (1 + pages + self.spare / 2) * PAGE as u64;
        if self.regions[target].as_ref().is_none_or(|region| region.len() < least) {
            self.prepare(pool, dir, pages)?;
        }
        let region = self.regions[target]
            .clone()
            .ok_or_else(|| Error::new(ErrorKind::Stale, "the KV store has no log"))?;
        // Pages of an earlier life in the same place must not be taken for this one's: node numbers are never used twice.
        let nonce = mix(mix(region.node()) ^ self.next_epoch());
        Ok(Checkpoint { target, region, nonce, next: 1, writer: PageWriter::new(nonce, 1), buffered: 0 })
    }

    /// The checkpoint is the log from here on, with the changes `since`. `before_header` makes durable what it speaks of.
    pub(crate) fn finish(
        &mut self,
        mut checkpoint: Checkpoint,
        since: &[Record],
        header: impl FnOnce() -> (u64, u32),
        before_header: impl FnOnce() -> Result<()>,
        pool: [u8; 16],
    ) -> Result<()> {
        checkpoint.write_out()?;
        let checkpoint_pages = checkpoint.next - 1;
        for record in since {
            checkpoint.push(record)?;
        }
        checkpoint.write_out()?;
        let (next_generation, next_slab) = header();
        before_header()?;
        flush(&[checkpoint.region.clone()])?;
        let header = Header {
            pool,
            epoch: self.next_epoch(),
            nonce: checkpoint.nonce,
            checkpoint_pages,
            next_generation,
            next_slab,
        };
        write(&checkpoint.region, 0, &header.encode())?;
        flush(&[checkpoint.region])?;
        self.current = checkpoint.target;
        self.epoch = header.epoch;
        self.skip = 0;
        self.nonce = header.nonce;
        self.checkpoint_pages = header.checkpoint_pages;
        self.next = checkpoint.next;
        Ok(())
    }
}

/// A checkpoint being written.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    target: usize,
    region: Arc<Slab>,
    nonce: u64,
    next: u64,
    writer: PageWriter,
    buffered: usize,
}

impl Checkpoint {
    /// The next record.
    pub(crate) fn push(&mut self, record: &Record) -> Result<()> {
        self.writer.push(record);
        self.buffered += record.len();
        if self.buffered >= STEP { self.write_out() } else { Ok(()) }
    }

    fn write_out(&mut self) -> Result<()> {
        let pages = std::mem::replace(&mut self.writer, PageWriter::new(self.nonce, 0)).finish();
        if (self.next * PAGE as u64).saturating_add(pages.len() as u64) > self.region.len() {
            return Err(Error::new(ErrorKind::NoSpace, "the KV store's log is too small for its index"));
        }
        if !pages.is_empty() {
            write(&self.region, self.next * PAGE as u64, &pages)?;
        }
        self.next += (pages.len() / PAGE) as u64;
        self.writer = PageWriter::new(self.nonce, self.next);
        self.buffered = 0;
        Ok(())
    }
}
