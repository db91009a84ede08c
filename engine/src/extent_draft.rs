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

use nvme::Buffer;

use crate::content::{Committed, Content, Draft};
use crate::error::{Error, ErrorKind, Result};
use crate::extent_io::{ExtentIo, seek};
use crate::layout::{Extent, Layout, Piece};
use crate::ram_tier::FrameKey;
use crate::region_read::Source;
use crate::types::{Allocate, NodeId, Seek, Timestamp};
use crate::write_behind::{Permit, RunOwner, RunWrite};

mod extent_set;

use extent_set::ExtentSet;

/// Most bytes of a run.
const RUN_BYTES: u64 = 1 << 20;
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

#[derive(Debug)]
struct State {
    /// What is written, over what the draft began with. Its size is the draft's.
    layout: Layout,
    /// The content it began with, as long as no commit replaced it: what is unchanged of it is read through the RAM tier.
    base: Option<Arc<Layout>>,
    /// Extents that are ours to overwrite and to give back: all but what a commit returned.
    fresh: ExtentSet,
    /// Allocated for chunks that nobody wrote yet, by logical offset.
    reserved: BTreeMap<u64, Extent>,
    /// Gathered, by first chunk.
    dirty: BTreeMap<u64, Run>,
    /// On their way: first chunk -> where.
    in_flight: BTreeMap<u64, InFlight>,
    /// Last extent got of each member.
    after: Vec<Option<Extent>>,
    /// Where the last write ended, and how many bytes ended there in a row.
    last_end: u64,
    streak: u64,
    /// A write that failed: the content is not what was written, and no commit may say so.
    failed: Option<(ErrorKind, String)>,
    /// `failed` was told once.
    told: bool,
    /// Extents that a write which never came back may still change: never given back.
    lost: bool,
}

#[derive(Debug)]
struct Run {
    /// Space for as many chunks as `buffer` holds; `logical` is that of the first chunk.
    extent: Extent,
    buffer: Buffer,
    /// Chunks gathered so far, from the first.
    filled: u64,
    /// Its space was reserved by the user: what is not filled stays reserved.
    reserved: bool,
    permit: Permit,
}

#[derive(Debug)]
struct InFlight {
    chunks: u64,
    /// Bytes that count for the sums.
    valid: u64,
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

    /// Hands a run over to be written.
    fn send(self: &Arc<Self>, state: &mut State, first: u64) -> Result<()> {
        let Some(run) = state.dirty.remove(&first) else { return Ok(()) };
        let Run { extent, buffer, filled, reserved, permit } = run;
        let len = filled * self.chunk;
        let used = Extent { len, ..extent };
        // Allocated for more than came. In place of fresh chunks the rest is still named by the layout.
        if let Some(rest) =
            extent.cut(extent.logical + len..extent.logical_end()).filter(|rest| !state.names(rest))
        {
            if reserved {
                state.reserved.insert(rest.logical, rest);
            } else {
                let own = state.fresh.remove(&rest);
                self.give_back(&own);
            }
        }
        let displaced = state.layout.replace(used);
        let displaced: Vec<_> = displaced.into_iter().filter(|old| !same_place(old, &used)).collect();
        self.dropped(state, displaced);
        let valid = state.layout.size().saturating_sub(used.logical).min(len);
        let device = match self.io.stripes().device(&used) {
            Ok(device) => device,
            Err(error) => {
                state.failed.get_or_insert((error.kind(), error.chain()));
                return Err(error);
            }
        };
        state.in_flight.insert(first, InFlight { chunks: filled, valid });
        self.io.writes().submit(RunWrite {
            owner: self.clone(),
            first_chunk: first,
            chunk_size: self.chunk as usize,
            device,
            offset: used.offset,
            buffer,
            len: len as usize,
            valid: valid as usize,
            permit,
        });
        Ok(())
    }

    fn send_all(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let mut first = Ok(());
        while let Some((&run, _)) = state.dirty.first_key_value() {
            let sent = self.send(state, run);
            first = first.and(sent);
        }
        first
    }

    /// Writes what is gathered of `chunks`, and waits for all of them.
    fn settle<'a>(self: &'a Arc<Self>, mut state: Guard<'a>, chunks: &Range<u64>) -> Result<Guard<'a>> {
        for run in state.dirty_within(chunks) {
            self.send(&mut state, run)?;
        }
        self.wait_for(state, chunks)
    }

    /// Writes everything and waits for it.
    fn drain<'a>(self: &'a Arc<Self>, mut state: Guard<'a>) -> Result<Guard<'a>> {
        let sent = self.send_all(&mut state);
        let state = self.wait_for(state, &(0..u64::MAX))?;
        sent.map(|()| state)
    }

    /// Space for `chunk`, and for as many after it as lie together, up to `want` bytes: of reserved space, else new. Says which.
    fn space(&self, state: &mut State, chunk: u64, want: u64) -> Result<(Extent, bool)> {
        let logical = chunk * self.chunk;
        let reserved = state.reserved_at(logical);
        if !reserved {
            // Not over what is reserved already further on.
            let until = state.reserved.range(logical..).next().map_or(u64::MAX, |(next, _)| *next);
            let extents = self.io.stripes().allocate(
                self.node,
                &mut state.after,
                logical,
                want.min(until - logical),
            )?;
            for extent in extents {
                state.fresh.insert(&extent);
                state.reserved.insert(extent.logical, extent);
            }
        }
        let extent = state.take_reserved(logical, want);
        extent.map(|extent| (extent, reserved)).ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("no space at {logical} although it was allocated"))
        })
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

    /// Before something is put beyond the size: makes the last chunk's bytes from the old size on zeros. The size may grow by that, to
    /// the chunk's end at most.
    fn extend_tail<'a>(self: &'a Arc<Self>, mut state: Guard<'a>, new_size: u64) -> Result<Guard<'a>> {
        let size = state.layout.size();
        if new_size <= size || size.is_multiple_of(self.chunk) {
            return Ok(state);
        }
        let chunk = size / self.chunk;
        state = self.wait_for(state, &(chunk..chunk + 1))?;
        if state.run_of(chunk).is_some() {
            // A gathered chunk has zeros there already.
            return Ok(state);
        }
        let logical = chunk * self.chunk;
        if state.layout.extent_at(logical).is_none() {
            return Ok(state);
        }
        // Look at what lies beyond: read the chunk past its size.
        let mut whole = Buffer::heap(self.chunk as usize)?;
        let Some(extent) =
            state.layout.extent_at(logical).and_then(|extent| extent.cut(logical..logical + self.chunk))
        else {
            return Ok(state);
        };
        self.io.stripes().device(&extent)?.read_at(extent.offset, &mut whole)?;
        let (kept, beyond) = whole.split_at((size - logical) as usize);
        let found = crc32fast::hash(kept);
        if found != state.layout.sum(chunk) {
            // Let the reader say it, with all names.
            self.load(&state, chunk, &mut vec![0; self.chunk as usize])?;
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("node {}: chunk {chunk} fails its checksum", self.node),
            ));
        }
        if beyond.iter().all(|byte| *byte == 0) {
            // Sum and size change together: readers come in between.
            let size = new_size.min(logical + self.chunk);
            state.layout.set_sum(chunk, crc32fast::hash(&whole[..(size - logical) as usize]));
            state.layout.set_size(size);
            return Ok(state);
        }
        // Somebody cut it short earlier: write it anew, with zeros.
        let zeros = vec![0u8; (new_size.min(logical + self.chunk) - size) as usize];
        self.put(state, size, &zeros, true, &mut 0)
    }

    /// Copies `data` into runs at `offset`. Grows the size unless `grow` is false. Chunks that are partly covered are loaded.
    /// `done` tells how many bytes are in, also after an error.
    fn put<'a>(
        self: &'a Arc<Self>,
        mut state: Guard<'a>,
        offset: u64,
        data: &[u8],
        grow: bool,
        done: &mut usize,
    ) -> Result<Guard<'a>> {
        let end = offset + data.len() as u64;
        let mut at = offset;
        let sequential = state.last_end == offset;
        state.streak = if sequential { state.streak + data.len() as u64 } else { 0 };
        while at < end {
            let chunk = at / self.chunk;
            if state.in_flight_within(&(chunk..chunk + 1)) {
                state = self.wait_for(state, &(chunk..chunk + 1))?;
                continue;
            }
            let piece_end = end.min((chunk + 1) * self.chunk);
            let whole = at == chunk * self.chunk
                && (piece_end == (chunk + 1) * self.chunk || piece_end >= state.layout.size());
            let first = match state.run_of(chunk) {
                Some(first) => first,
                None => {
                    // Loaded before the run takes shape, so that a failure leaves nothing half done.
                    let mut old = None;
                    if !whole {
                        let mut bytes = vec![0u8; self.chunk as usize];
                        self.load(&state, chunk, &mut bytes)?;
                        old = Some(bytes);
                    }
                    let (next, first) = self.open_run(state, chunk, end)?;
                    state = next;
                    // The lock may have been let go: look again.
                    let Some(first) = first else { continue };
                    let Some(run) = state.dirty.get_mut(&first) else { continue };
                    let from = ((chunk - first) * self.chunk) as usize;
                    let slot = &mut run.buffer[from..from + self.chunk as usize];
                    match old {
                        Some(bytes) => slot.copy_from_slice(&bytes),
                        None => slot[(piece_end - at) as usize..].fill(0),
                    }
                    run.filled = chunk - first + 1;
                    first
                }
            };
            let Some(run) = state.dirty.get_mut(&first) else { continue };
            let from = (at - first * self.chunk) as usize;
            let n = (piece_end - at) as usize;
            run.buffer[from..from + n].copy_from_slice(&data[(at - offset) as usize..][..n]);
            let full = run.filled * self.chunk == run.extent.len && piece_end == run.extent.logical_end();
            at = piece_end;
            *done = (at - offset) as usize;
            if grow && at > state.layout.size() {
                state.layout.set_size(at);
            }
            if full {
                self.send(&mut state, first)?;
            }
        }
        state.last_end = end;
        Ok(state)
    }

    /// The run that `chunk` may be appended to, or a new one for it. `None`: the lock was let go, look again.
    fn open_run<'a>(
        self: &'a Arc<Self>,
        mut state: Guard<'a>,
        chunk: u64,
        write_end: u64,
    ) -> Result<(Guard<'a>, Option<u64>)> {
        if let Some(first) = state.run_ending_at(chunk) {
            return Ok((state, Some(first)));
        }
        let logical = chunk * self.chunk;
        // As much as this write brings; more where it is one of a series.
        let brought = write_end.next_multiple_of(self.chunk) - logical;
        let wanted = brought.max(state.streak / self.chunk * self.chunk);
        let unit = self.io.stripes().unit();
        let window = RUN_BYTES.max(self.chunk);
        let window_end = (logical / unit + 1) * unit;
        let window_end = window_end.min((logical / window + 1) * window).max(logical + self.chunk);
        let mut want = wanted.min(window_end - logical);
        if let Some((next, _)) = state.dirty.range(chunk..).next() {
            want = want.min((next - chunk) * self.chunk);
        }
        // Fresh chunks are overwritten where they are.
        let place = match state.fresh_at(logical) {
            Some(extent) => Some(extent.cut(logical..logical + want).unwrap_or(extent)),
            None => {
                if let Some(next) = state.next_fresh(logical, want) {
                    want = next - logical;
                }
                None
            }
        };
        let bytes = place.map_or(want, |extent| extent.len) as usize;
        let Some(permit) = self.io.writes().try_permit(bytes) else {
            self.send_all(&mut state)?;
            drop(state);
            self.io.writes().wait_for_room(bytes)?;
            return Ok((self.lock(), None));
        };
        let (extent, reserved) = match place {
            Some(extent) => (extent, false),
            None => self.space(&mut state, chunk, want)?,
        };
        let key = FrameKey { node: self.node, generation: u64::MAX, frame: chunk };
        let buffer = match self.io.tier().buffer(extent.len as usize, &key) {
            Ok(buffer) => buffer,
            Err(error) => {
                if place.is_none() {
                    state.reserved.insert(extent.logical, extent);
                }
                return Err(error);
            }
        };
        state.dirty.insert(chunk, Run { extent, buffer, filled: 0, reserved, permit });
        Ok((state, Some(chunk)))
    }

    /// Writes, making room where the pool is full but could free something. A short count means that it is full.
    fn write(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<usize> {
        let mut tries = 0;
        let mut done = 0;
        loop {
            let mut more = 0;
            let result = self.try_write(offset + done as u64, &data[done..], &mut more);
            done += more;
            match result {
                Ok(()) => return Ok(done),
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    let room = tries < 2 && self.make_room(tries > 0)?;
                    tries += 1;
                    if !room {
                        return if done > 0 { Ok(done) } else { Err(error) };
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Space that runs hold beyond what came goes back when they leave; with `commit`, also what a commit frees. Holds no lock
    /// during that: a commit of another thread may be waiting for us. `false`: nothing came of it.
    fn make_room(self: &Arc<Self>, commit: bool) -> Result<bool> {
        {
            let _writer = self.writer();
            self.drain(self.lock()).map(drop)?;
        }
        if commit { self.io.reclaim() } else { Ok(true) }
    }

    fn try_write(self: &Arc<Self>, offset: u64, data: &[u8], done: &mut usize) -> Result<()> {
        let _writer = self.writer();
        let mut state = self.lock();
        state.check_failed()?;
        // Only where a gap begins within the last chunk; an append covers the tail itself.
        let size = state.layout.size();
        state = self.extend_tail(state, offset)?;
        let result = self.put(state, offset, data, true, done).map(drop);
        if result.is_err() && *done == 0 {
            // Not even the gap stays.
            let state = self.lock();
            if state.layout.size() > size {
                self.set_len_locked(state, size)?;
            }
        }
        result
    }

    /// Makes zeros of `offset..end`, which lies within the size: holes where whole chunks go.
    fn clear<'a>(self: &'a Arc<Self>, mut state: Guard<'a>, offset: u64, end: u64) -> Result<Guard<'a>> {
        let size = state.layout.size();
        let end = end.min(size);
        if offset >= end {
            return Ok(state);
        }
        // Chunks that go whole; the last one of the region goes whole when it is cleared to the size.
        let first = offset.div_ceil(self.chunk);
        let last = if end == size { end.div_ceil(self.chunk) } else { end / self.chunk };
        state = self.settle(state, &self.chunk_range(offset, end))?;
        let mut edges = Vec::new();
        if first < last {
            let removed = state.layout.remove(first * self.chunk, (last - first) * self.chunk);
            self.dropped(&mut state, removed);
            self.unreserve(&mut state, first * self.chunk, last * self.chunk);
            edges.push(offset..first * self.chunk);
            edges.push((last * self.chunk).min(end)..end);
        } else {
            let middle = (offset / self.chunk + 1) * self.chunk;
            edges.push(offset..end.min(middle));
            edges.push(end.min(middle)..end);
        }
        for edge in edges {
            if edge.is_empty() || state.layout.extent_at(edge.start / self.chunk * self.chunk).is_none() {
                continue;
            }
            let zeros = vec![0u8; (edge.end - edge.start) as usize];
            state = self.put(state, edge.start, &zeros, false, &mut 0)?;
        }
        state.last_end = u64::MAX;
        Ok(state)
    }

    fn set_len(self: &Arc<Self>, len: u64) -> Result<()> {
        let _writer = self.writer();
        let state = self.lock();
        state.check_failed()?;
        self.set_len_locked(state, len)
    }

    fn set_len_locked<'a>(self: &'a Arc<Self>, mut state: Guard<'a>, len: u64) -> Result<()> {
        let size = state.layout.size();
        if len >= size {
            state = self.extend_tail(state, len)?;
            state.layout.set_size(len);
            return Ok(());
        }
        let keep = len.div_ceil(self.chunk);
        // Gathered chunks that go are not written first.
        let beyond: Vec<u64> = state.dirty.range(keep..).map(|(first, _)| *first).collect();
        for first in beyond {
            if let Some(run) = state.dirty.remove(&first)
                && !state.names(&run.extent)
            {
                let own = state.fresh.remove(&run.extent);
                self.give_back(&own);
            }
        }
        let tail = (len / self.chunk).min(keep)..u64::MAX;
        state = self.settle(state, &tail)?;
        if !len.is_multiple_of(self.chunk) {
            let chunk = len / self.chunk;
            if state.layout.extent_at(chunk * self.chunk).is_some() {
                let mut bytes = vec![0u8; self.chunk as usize];
                self.load(&state, chunk, &mut bytes)?;
                let sum = crc32fast::hash(&bytes[..(len % self.chunk) as usize]);
                state.layout.set_sum(chunk, sum);
            }
        }
        let removed = state.layout.truncate(len);
        self.dropped(&mut state, removed);
        self.unreserve(&mut state, keep * self.chunk, u64::MAX);
        state.last_end = u64::MAX;
        Ok(())
    }

    /// Gives back what is reserved within `start..end`.
    fn unreserve(&self, state: &mut State, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            let next = state.reserved.range(at..).next().map_or(u64::MAX, |(logical, _)| *logical);
            if !state.reserved_at(at) {
                at = next;
                continue;
            }
            let Some(extent) = state.take_reserved(at, end - at) else { break };
            at = extent.logical_end();
            let own = state.fresh.remove(&extent);
            self.give_back(&own);
        }
    }

    /// Reserves space for what has none within `offset..end`: all of it, or nothing.
    fn reserve(&self, state: &mut State, offset: u64, end: u64) -> Result<()> {
        let mut got: Vec<Extent> = Vec::new();
        let mut at = offset / self.chunk * self.chunk;
        let end = end.next_multiple_of(self.chunk);
        while at < end {
            // Skip what has space: written, gathered, in flight or reserved.
            if let Some(next) = state.occupied_until(at, self.chunk) {
                at = next;
                continue;
            }
            let until = state.next_occupied(at, self.chunk).min(end);
            match self.io.stripes().allocate(self.node, &mut state.after, at, until - at) {
                Ok(extents) => {
                    for extent in extents {
                        at = extent.logical_end();
                        state.fresh.insert(&extent);
                        state.reserved.insert(extent.logical, extent);
                        got.push(extent);
                    }
                }
                Err(error) => {
                    // All or nothing, as ext4 does for one extent; whole is kinder.
                    for extent in &got {
                        if state.reserved.remove(&extent.logical).is_some() {
                            state.fresh.remove(extent);
                        }
                    }
                    self.give_back(&got);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn allocate(self: &Arc<Self>, offset: u64, end: u64, mode: Allocate) -> Result<()> {
        let _writer = self.writer();
        let mut state = self.lock();
        state.check_failed()?;
        let grow = match mode {
            Allocate::Reserve { keep_size } => {
                // Runs hold space that goes back when they are not filled: it must not count as reserved.
                state = self.settle(state, &self.chunk_range(offset, end))?;
                self.reserve(&mut state, offset, end)?;
                !keep_size
            }
            Allocate::PunchHole => {
                state = self.clear(state, offset, end)?;
                false
            }
            Allocate::ZeroRange { keep_size } => {
                state = self.clear(state, offset, end)?;
                self.reserve(&mut state, offset, end)?;
                !keep_size
            }
        };
        if grow && end > state.layout.size() {
            state = self.extend_tail(state, end)?;
            state.layout.set_size(end);
        }
        Ok(())
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

impl State {
    fn check_failed(&self) -> Result<()> {
        match &self.failed {
            Some((kind, text)) => Err(Error::new(*kind, format!("an earlier write failed: {text}"))),
            None => Ok(()),
        }
    }

    fn in_flight_within(&self, chunks: &Range<u64>) -> bool {
        self.in_flight
            .range(..chunks.end)
            .next_back()
            .is_some_and(|(first, run)| first + run.chunks > chunks.start)
    }

    /// First chunks of the runs that touch `chunks`.
    fn dirty_within(&self, chunks: &Range<u64>) -> Vec<u64> {
        self.runs_within(chunks).map(|(first, _)| first).collect()
    }

    fn runs_within(&self, chunks: &Range<u64>) -> impl Iterator<Item = (u64, &Run)> {
        let start = self.dirty.range(..=chunks.start).next_back().map_or(chunks.start, |(first, _)| *first);
        let wanted = chunks.clone();
        self.dirty
            .range(start..chunks.end.max(start))
            .map(|(first, run)| (*first, run))
            .filter(move |(first, run)| first + run.filled > wanted.start)
    }

    /// The parts of `range` that no run has gathered.
    fn not_gathered(&self, range: Range<u64>, chunk: u64) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for (first, run) in self.runs_within(&(range.start / chunk..range.end.div_ceil(chunk))) {
            if first * chunk > at {
                gaps.push(at..first * chunk);
            }
            at = at.max((first + run.filled) * chunk);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// The run that has gathered `chunk`.
    fn run_of(&self, chunk: u64) -> Option<u64> {
        self.dirty
            .range(..=chunk)
            .next_back()
            .filter(|(first, run)| *first + run.filled > chunk)
            .map(|(first, _)| *first)
    }

    /// The run that would take `chunk` next, with room for it.
    fn run_ending_at(&self, chunk: u64) -> Option<u64> {
        let chunk_size = self.layout.chunk_size() as u64;
        self.dirty
            .range(..=chunk)
            .next_back()
            .filter(|(first, run)| *first + run.filled == chunk && run.filled * chunk_size < run.extent.len)
            .map(|(first, _)| *first)
    }

    fn reserved_at(&self, logical: u64) -> bool {
        self.reserved.range(..=logical).next_back().is_some_and(|(_, extent)| extent.logical_end() > logical)
    }

    /// Takes up to `want` bytes from `logical` out of the reserved space.
    fn take_reserved(&mut self, logical: u64, want: u64) -> Option<Extent> {
        let (&start, &extent) = self.reserved.range(..=logical).next_back()?;
        let taken = extent.cut(logical..logical.saturating_add(want))?;
        self.reserved.remove(&start);
        for rest in
            [extent.cut(0..taken.logical), extent.cut(taken.logical_end()..u64::MAX)].into_iter().flatten()
        {
            self.reserved.insert(rest.logical, rest);
        }
        Some(taken)
    }

    /// Whether the layout names exactly this place for these bytes: then it is in use.
    fn names(&self, extent: &Extent) -> bool {
        self.layout.extent_at(extent.logical).is_some_and(|named| same_place(&named, extent))
    }

    /// The layout's fresh extent from `logical` on, as far as it is fresh.
    fn fresh_at(&self, logical: u64) -> Option<Extent> {
        let extent = self.layout.extent_at(logical)?;
        let extent = extent.cut(logical..u64::MAX)?;
        self.fresh.starts(&extent)
    }

    /// The first fresh byte of the layout within `len` bytes after `logical`.
    fn next_fresh(&self, logical: u64, len: u64) -> Option<u64> {
        let chunk = self.layout.chunk_size() as u64;
        self.layout.lookup(logical, len).into_iter().find_map(|piece| {
            let Piece::Data(extent) = piece else { return None };
            (0..extent.len / chunk)
                .map(|index| extent.logical + index * chunk)
                .find(|at| self.fresh_at(*at).is_some())
        })
    }

    /// Whether this extent is one of the base's: unchanged since the draft began.
    fn is_base(&self, extent: &Extent) -> bool {
        let Some(base) = &self.base else { return false };
        // The last chunk's sum may have changed with the size: then the base's reader would not know it.
        let chunk = self.layout.chunk_size() as u64;
        let whole = extent.logical_end() <= base.size() / chunk * chunk || base.size() == self.layout.size();
        whole
            && base
                .extent_at(extent.logical)
                .is_some_and(|old| same_place(&old, extent) && old.logical_end() >= extent.logical_end())
    }

    /// Where the space at `at` ends, when there is some.
    fn occupied_until(&self, at: u64, chunk: u64) -> Option<u64> {
        if let Some(extent) = self.layout.extent_at(at) {
            return Some(extent.logical_end());
        }
        let reserved = self.reserved.range(..=at).next_back().map(|(_, extent)| extent.logical_end());
        let dirty = self.dirty.range(..=at / chunk).next_back().map(|(_, run)| run.extent.logical_end());
        reserved.into_iter().chain(dirty).find(|end| *end > at)
    }

    /// Where the next space after `at` begins.
    fn next_occupied(&self, at: u64, chunk: u64) -> u64 {
        let layout = self.layout.next_data(at).unwrap_or(u64::MAX);
        let reserved = self.reserved.range(at..).next().map_or(u64::MAX, |(logical, _)| *logical);
        let dirty = self.dirty.range(at / chunk..).next().map_or(u64::MAX, |(first, _)| first * chunk);
        layout.min(reserved).min(dirty)
    }
}

/// Whether the two put the same byte of the region at the same place.
fn same_place(a: &Extent, b: &Extent) -> bool {
    a.member == b.member
        && a.file == b.file
        && a.offset.wrapping_sub(a.logical) == b.offset.wrapping_sub(b.logical)
}

impl RunOwner for Shared {
    fn written(&self, first_chunk: u64, sums: Vec<u32>, result: Result<()>) {
        let mut state = self.lock();
        let Some(run) = state.in_flight.remove(&first_chunk) else { return };
        debug_assert_eq!(run.chunks as usize, sums.len());
        // Who changes the size waits for the chunk it lies in: the sums are of the bytes that count still.
        debug_assert!(run.valid > 0 || state.layout.size() <= first_chunk * self.chunk);
        state.layout.set_sums(first_chunk, &sums);
        if let Err(error) = result {
            tracing::error!(node = self.node, error = %error.chain(), "a write failed");
            state.lost |= error.kind() == ErrorKind::Timeout;
            if state.failed.is_none() {
                state.failed = Some((error.kind(), error.chain()));
                state.told = false;
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn hand_over(self: Arc<Self>) {
        // Never waits: a draft that is busy moves its runs itself.
        if let Ok(mut state) = self.state.try_lock()
            && let Err(error) = self.send_all(&mut state)
        {
            tracing::error!(node = self.node, error = %error.chain(), "cannot write what is gathered");
        }
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

    fn read_with(&self, offset: u64, len: usize, f: &mut dyn FnMut(&[&[u8]])) -> Result<usize> {
        let len = (self.size().saturating_sub(offset)).min(len as u64) as usize;
        let mut bytes = vec![0u8; len];
        let n = self.shared.read(offset, &mut bytes)?;
        f(&[&bytes[..n]]);
        Ok(n)
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

impl Draft for ExtentDraft {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("{} bytes at {offset} end beyond 2^63", data.len()),
            ));
        }
        self.shared.write(offset, data)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if len > i64::MAX as u64 {
            return Err(Error::new(ErrorKind::TooLarge, format!("a size of {len} bytes is beyond 2^63")));
        }
        self.shared.set_len(len)
    }

    fn allocate(&self, offset: u64, len: u64, mode: Allocate) -> Result<()> {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64) else {
            return Err(Error::new(ErrorKind::TooLarge, format!("{len} bytes at {offset} end beyond 2^63")));
        };
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
        drop(runs);
        state = match shared.wait_for(state, &(0..u64::MAX)) {
            Ok(state) => state,
            Err(error) => {
                tracing::error!(node = shared.node, error = %error.chain(), "space of a draft is lost until the pool is opened again");
                return;
            }
        };
        state.reserved.clear();
        let own = std::mem::take(&mut state.fresh);
        let lost = state.lost;
        state.layout = Layout::new(shared.chunk as u32);
        state.base = None;
        drop(state);
        if !lost {
            shared.give_back(&own.extents());
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
