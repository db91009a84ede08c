//! Content being written on raw and striped pools: copy on write by chunk.
//!
//! ```text
//! write_at -> runs (gathered chunks, space already allocated) -> write-behind -> layout
//!             dirty                                              in flight       written
//! ```
//!
//! - A *run* is consecutive chunks in one aligned buffer, which lie together on one member. Its space is allocated when the run
//!   begins, so `NoSpace` shows at the write (or at `allocate`), never later. A run leaves when it is full and written to its end, when
//!   dirty memory is short, or at a flush; its chunks are summed on the way out.
//! - A chunk written in part is read first (and verified), so that whole chunks leave.
//! - Chunks that this draft wrote and no commit returned yet are *fresh*: they are overwritten in place. All others are replaced by
//!   new extents; what the committed layout names stays as it is until the pool frees it.
//! - Bytes of the last chunk beyond the size may be anything on the member: sums end at the size, and growth looks at them first.
//! - A chunk is in one state at a time (dirty, in flight, written); whoever wants to change or read it while it is in flight waits.
//!
//! `reserved` space (allocated, not written) reads as zeros, and goes back at the commit.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::content::{Committed, Content, Draft};
use crate::error::{Error, ErrorKind, Result};
use crate::extent_io::{ExtentIo, seek};
use crate::layout::{Extent, Layout, MAX_CHUNKS, Piece};
use crate::member::Hint;
use crate::region_read::Source;
use crate::types::{Allocate, NodeId, Seek, Timestamp};
use crate::write_behind::RunOwner;

mod extent_set;
mod shape;
mod state;
mod write;

use extent_set::ExtentSet;
use state::State;

/// Longer than any operation's own deadline.
const WAIT: Duration = Duration::from_secs(120);

/// A draft over extents; see the module documentation.
#[derive(Debug)]
pub struct ExtentDraft {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    io: Arc<ExtentIo>,
    node: NodeId,
    chunk: u64,
    /// Held by whoever changes the content, so that letting `state` go in the middle (to wait) lets in readers and completions only.
    /// Taken before `state`.
    writer: Mutex<()>,
    state: Mutex<State>,
    /// A run was written.
    changed: Condvar,
}

type Guard<'a> = MutexGuard<'a, State>;

impl ExtentDraft {
    /// A draft that begins with `base` (empty content: a layout without extents).
    pub fn new(io: &Arc<ExtentIo>, node: NodeId, base: Arc<Layout>) -> ExtentDraft {
        let members = io.stripes().members().len();
        let shared = Arc::new(Shared {
            io: io.clone(),
            node,
            chunk: base.chunk_size() as u64,
            writer: Mutex::default(),
            state: Mutex::new(State {
                layout: (*base).clone(),
                base: Some(base),
                fresh: ExtentSet::default(),
                reserved: BTreeMap::new(),
                dirty: BTreeMap::new(),
                in_flight: BTreeMap::new(),
                after: vec![None; members],
                last_end: u64::MAX,
                streak: 0,
                failed: None,
                told: false,
                lost: false,
            }),
            changed: Condvar::new(),
        });
        let owner: Arc<dyn RunOwner> = shared.clone();
        io.writes().register(Arc::downgrade(&owner));
        ExtentDraft { shared }
    }
}

impl Shared {
    fn lock(&self) -> Guard<'_> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for a run to come back.
    fn wait<'a>(&'a self, state: Guard<'a>, deadline: Instant) -> Result<Guard<'a>> {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            return Err(Error::new(
                ErrorKind::Timeout,
                format!("writes of node {} did not end in {} s", self.node, WAIT.as_secs()),
            ));
        };
        Ok(match self.changed.wait_timeout(state, left) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        })
    }

    /// Waits until no chunk of `chunks` is in flight.
    fn wait_for<'a>(&'a self, mut state: Guard<'a>, chunks: &Range<u64>) -> Result<Guard<'a>> {
        let deadline = Instant::now() + WAIT;
        while state.in_flight_within(chunks) {
            state = self.wait(state, deadline)?;
        }
        Ok(state)
    }

    fn chunk_range(&self, offset: u64, end: u64) -> Range<u64> {
        offset / self.chunk..end.div_ceil(self.chunk)
    }

    /// Frees extents that no commit returned. What cannot be freed is logged: the caller's own work is done.
    fn give_back(&self, extents: &[Extent]) {
        if let Err(error) = self.io.stripes().free(extents) {
            tracing::error!(node = self.node, error = %error.chain(), "cannot give space back");
        }
    }

    /// Drops extents that the layout let go: ours are free at once, committed ones are the pool's to free.
    fn dropped(&self, state: &mut State, extents: Vec<Extent>) {
        for extent in extents {
            let own = state.fresh.remove(&extent);
            self.give_back(&own);
        }
    }

    /// Reads a chunk that is neither dirty nor in flight, zeros beyond the size. Verified.
    fn load(&self, state: &State, chunk: u64, buf: &mut [u8]) -> Result<()> {
        let start = chunk * self.chunk;
        let size = state.layout.size();
        buf.fill(0);
        if start >= size {
            return Ok(());
        }
        self.read_written(state, start..(start + self.chunk).min(size), &mut |logical, bytes| {
            let at = (logical - start) as usize;
            buf[at..at + bytes.len()].copy_from_slice(bytes);
        })
    }

    /// Reads written chunks of `range`, cut to it. Holes are not told to `sink`.
    fn read_written(&self, state: &State, range: Range<u64>, sink: &mut dyn FnMut(u64, &[u8])) -> Result<()> {
        // The reader wants an `Arc`; sums are shared, so that this copies the extents in question only.
        let chunks = self.chunk_range(range.start, range.end);
        let aligned = chunks.start * self.chunk..chunks.end * self.chunk;
        let part = Arc::new(state.layout.part(aligned.clone()));
        let source = Source { node: self.node, layout: &part };
        self.io.reader().read_uncached(source, range.clone(), &mut |logical, bytes| {
            let start = logical.max(range.start);
            let end = (logical + bytes.len() as u64).min(range.end);
            if start < end {
                sink(start, &bytes[(start - logical) as usize..(end - logical) as usize]);
            }
        })
    }

    fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut state = self.lock();
        let size = state.layout.size();
        let end = size.min(offset.saturating_add(buf.len() as u64));
        if offset >= end {
            return Ok(0);
        }
        let buf = &mut buf[..(end - offset) as usize];
        state = self.wait_for(state, &self.chunk_range(offset, end))?;
        buf.fill(0);
        // What is as it was at the beginning goes through the RAM tier; what was written since is read past it.
        // Not what is gathered: the member holds something older there, or nothing.
        let mut old: Vec<Range<u64>> = Vec::new();
        let mut new: Vec<Range<u64>> = Vec::new();
        for gap in state.not_gathered(offset..end, self.chunk) {
            for piece in state.layout.lookup(gap.start, gap.end - gap.start) {
                let Piece::Data(extent) = piece else { continue };
                let list = if state.is_base(&extent) { &mut old } else { &mut new };
                list.push(extent.logical..extent.logical_end());
            }
        }
        for range in new {
            self.read_written(&state, range, &mut |logical, bytes| {
                let at = (logical - offset) as usize;
                buf[at..at + bytes.len()].copy_from_slice(bytes);
            })?;
        }
        if let Some(base) = state.base.clone().filter(|_| !old.is_empty()) {
            for range in old {
                let part = &mut buf[(range.start - offset) as usize..(range.end - offset) as usize];
                let source = Source { node: self.node, layout: &base };
                self.io.reader().read_at(source, range.start, part)?;
            }
        }
        for (first, run) in state.runs_within(&self.chunk_range(offset, end)) {
            let start = (first * self.chunk).max(offset);
            let stop = ((first + run.filled) * self.chunk).min(end);
            if start < stop {
                let from = (start - first * self.chunk) as usize;
                buf[(start - offset) as usize..(stop - offset) as usize]
                    .copy_from_slice(&run.buffer[from..from + (stop - start) as usize]);
            }
        }
        Ok(buf.len())
    }
}

impl Content for ExtentDraft {
    fn size(&self) -> u64 {
        self.shared.lock().layout.size()
    }

    fn allocated(&self) -> u64 {
        let state = self.shared.lock();
        let gathered: u64 =
            state.dirty.values().filter(|run| !state.names(&run.extent)).map(|run| run.extent.len).sum();
        state.layout.allocated() + state.reserved.values().map(|extent| extent.len).sum::<u64>() + gathered
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.shared.read(offset, buf)
    }

    fn seek(&self, offset: u64, what: Seek) -> Result<u64> {
        let shared = &self.shared;
        // Gathered chunks are data too: the simplest way to count them is to write them.
        let _writer = shared.writer();
        let state = shared.drain(shared.lock())?;
        seek(&state.layout, offset, what)
    }

    fn backing(&self) -> Option<Arc<File>> {
        None
    }
}

impl ExtentDraft {
    /// The end of a range that a region can have: the list of its sums is as long as its chunks are many, holes included.
    fn check_end(&self, offset: u64, len: u64) -> Result<u64> {
        let most = MAX_CHUNKS * self.shared.chunk;
        offset.checked_add(len).filter(|end| *end <= most).ok_or_else(|| {
            let context =
                format!("{len} bytes at {offset} end beyond the largest region of this pool, {most} bytes");
            Error::new(ErrorKind::TooLarge, context)
        })
    }
}

impl ExtentDraft {
    /// Takes `len` bytes, from the member `first` on of one that has them, else of all, and gives them as space beyond a size of 0, see
    /// `pool/slab.rs`. All or nothing.
    pub(crate) fn slab(&self, len: u64, first: usize) -> Result<Committed> {
        let shared = &self.shared;
        let len = self.check_end(0, len)?.next_multiple_of(shared.chunk);
        let members = shared.io.stripes().members();
        let hint = Hint { node: shared.node, logical: 0, after: None };
        let mut extents = None;
        for index in 0..members.len() {
            match members[(first + index) % members.len()].allocate(len, &hint) {
                Ok(got) => {
                    extents = Some(got);
                    break;
                }
                Err(error) if error.kind() == ErrorKind::NoSpace => {}
                Err(error) => return Err(error),
            }
        }
        let extents = match extents {
            Some(extents) => extents,
            None => self.pieces_of_all(len)?,
        };
        let mut layout = Layout::new(shared.chunk as u32);
        for extent in extents {
            layout.replace(extent);
        }
        let allocated = layout.allocated();
        Ok(Committed { layout, sealed: true, allocated, modified: None })
    }

    fn pieces_of_all(&self, len: u64) -> Result<Vec<Extent>> {
        let shared = &self.shared;
        let mut after = vec![None; shared.io.stripes().members().len()];
        let mut got: Vec<Extent> = Vec::new();
        let mut at = 0;
        while at < len {
            match shared.io.stripes().allocate(shared.node, &mut after, at, len - at) {
                Ok(extents) => {
                    at = extents.last().map_or(len, Extent::logical_end);
                    got.extend(extents);
                }
                Err(error) => {
                    shared.give_back(&got);
                    return Err(error);
                }
            }
        }
        Ok(got)
    }
}

impl Draft for ExtentDraft {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        self.check_end(offset, data.len() as u64)?;
        self.shared.write(offset, data)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check_end(0, len)?;
        self.shared.set_len(len)
    }

    fn allocate(&self, offset: u64, len: u64, mode: Allocate) -> Result<()> {
        let end = self.check_end(offset, len)?;
        if len == 0 {
            return Err(Error::new(ErrorKind::InvalidArgument, "fallocate of no bytes"));
        }
        let mut tries = 0;
        loop {
            match self.shared.allocate(offset, end, mode) {
                Err(error) if error.kind() == ErrorKind::NoSpace && tries < 2 => {
                    if !self.shared.make_room(tries > 0)? {
                        return Err(error);
                    }
                    tries += 1;
                }
                other => return other,
            }
        }
    }

    fn flush(&self) -> Result<()> {
        let shared = &self.shared;
        let _writer = shared.writer();
        let mut state = shared.drain(shared.lock())?;
        if state.failed.is_some() && !state.told {
            state.told = true;
            return state.check_failed();
        }
        Ok(())
    }

    fn modified(&self) -> Option<Timestamp> {
        None
    }

    fn set_modified(&self, _time: Timestamp) -> Result<()> {
        Ok(())
    }

    fn commit(&self, _seal: bool, _cancel: &AtomicBool) -> Result<Option<Committed>> {
        let shared = &self.shared;
        let _writer = shared.writer();
        let mut state = shared.drain(shared.lock())?;
        state.check_failed()?;
        let reserved: Vec<Extent> = std::mem::take(&mut state.reserved).into_values().collect();
        for extent in &reserved {
            state.fresh.remove(extent);
        }
        shared.give_back(&reserved);
        // From here on what was written is the pool's.
        state.fresh = ExtentSet::default();
        state.base = None;
        let layout = state.layout.clone();
        let allocated = layout.allocated();
        Ok(Some(Committed { layout, sealed: true, allocated, modified: None }))
    }

    fn discard(&self) {
        let shared = &self.shared;
        let _writer = shared.writer();
        let mut state = shared.lock();
        let runs = std::mem::take(&mut state.dirty);
        let unwritten = !runs.is_empty();
        drop(runs);
        state = match shared.wait_for(state, &(0..u64::MAX)) {
            Ok(state) => state,
            Err(error) => {
                tracing::error!(node = shared.node, error = %error.chain(), "space of a draft is lost until the pool is opened again");
                return;
            }
        };
        state.reserved.clear();
        let own = std::mem::take(&mut state.fresh).extents();
        let lost = state.lost;
        // After a commit nothing is this draft's alone. Whoever took hold of it just before (a reader, `stat`) must then go on seeing what
        // was committed; an empty layout would tell them of an empty region.
        if unwritten || !own.is_empty() {
            state.layout = Layout::new(shared.chunk as u32);
            state.base = None;
        }
        drop(state);
        if !lost {
            shared.give_back(&own);
        }
    }
}

impl Drop for ExtentDraft {
    fn drop(&mut self) {
        self.discard();
    }
}

#[cfg(test)]
mod tests;
