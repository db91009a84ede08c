//! Truncation, holes and reservations.

use std::sync::Arc;

use super::state::State;
use super::{Guard, Shared};
use crate::error::Result;
use crate::layout::Extent;
use crate::types::Allocate;

impl Shared {
    /// Makes zeros of `offset..end`, which lies within the size: holes where whole chunks go.
    pub(super) fn clear<'a>(
        self: &'a Arc<Self>,
        mut state: Guard<'a>,
        offset: u64,
        end: u64,
    ) -> Result<Guard<'a>> {
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

    pub(super) fn set_len(self: &Arc<Self>, len: u64) -> Result<()> {
        let _writer = self.writer();
        let state = self.lock();
        state.check_failed()?;
        self.set_len_locked(state, len)
    }

    pub(super) fn set_len_locked<'a>(self: &'a Arc<Self>, mut state: Guard<'a>, len: u64) -> Result<()> {
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
    pub(super) fn unreserve(&self, state: &mut State, start: u64, end: u64) {
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
    pub(super) fn reserve(&self, state: &mut State, offset: u64, end: u64) -> Result<()> {
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

    pub(super) fn allocate(self: &Arc<Self>, offset: u64, end: u64, mode: Allocate) -> Result<()> {
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
}
