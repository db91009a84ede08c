//! Writing: gathering chunks into runs, and sending them off.

use std::ops::Range;
use std::sync::Arc;

use nvme::Buffer;

use super::state::{InFlight, Run, State, same_place};
use super::{Guard, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Extent;
use crate::ram_tier::FrameKey;
use crate::write_behind::{RunOwner, RunWrite};

/// Most bytes of a run.
const RUN_BYTES: u64 = 1 << 20;

impl Shared {
    /// Hands a run over to be written.
    pub(super) fn send(self: &Arc<Self>, state: &mut State, first: u64) -> Result<()> {
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

    pub(super) fn send_all(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let mut first = Ok(());
        while let Some((&run, _)) = state.dirty.first_key_value() {
            let sent = self.send(state, run);
            first = first.and(sent);
        }
        first
    }

    /// Writes what is gathered of `chunks`, and waits for all of them.
    pub(super) fn settle<'a>(
        self: &'a Arc<Self>,
        mut state: Guard<'a>,
        chunks: &Range<u64>,
    ) -> Result<Guard<'a>> {
        for run in state.dirty_within(chunks) {
            self.send(&mut state, run)?;
        }
        self.wait_for(state, chunks)
    }

    /// Writes everything and waits for it.
    pub(super) fn drain<'a>(self: &'a Arc<Self>, mut state: Guard<'a>) -> Result<Guard<'a>> {
        let sent = self.send_all(&mut state);
        let state = self.wait_for(state, &(0..u64::MAX))?;
        sent.map(|()| state)
    }

    /// Space for `chunk`, and for as many after it as lie together, up to `want` bytes: of reserved space, else new. Says which.
    pub(super) fn space(&self, state: &mut State, chunk: u64, want: u64) -> Result<(Extent, bool)> {
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

    /// Before something is put beyond the size: makes the last chunk's bytes from the old size on zeros. The size may grow by that, to
    /// the chunk's end at most.
    pub(super) fn extend_tail<'a>(
        self: &'a Arc<Self>,
        mut state: Guard<'a>,
        new_size: u64,
    ) -> Result<Guard<'a>> {
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
    pub(super) fn put<'a>(
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
    pub(super) fn open_run<'a>(
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
    pub(super) fn write(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<usize> {
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
    pub(super) fn make_room(self: &Arc<Self>, commit: bool) -> Result<bool> {
        {
            let _writer = self.writer();
            self.drain(self.lock()).map(drop)?;
        }
        if commit { self.io.reclaim() } else { Ok(true) }
    }

    pub(super) fn try_write(self: &Arc<Self>, offset: u64, data: &[u8], done: &mut usize) -> Result<()> {
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
