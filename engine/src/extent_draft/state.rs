//! What a draft knows of its chunks: the lookups. Nothing here waits or does I/O.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use nvme::Buffer;

use super::extent_set::ExtentSet;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Extent, Layout, Piece};
use crate::write_behind::Permit;

#[derive(Debug)]
pub(super) struct State {
    /// What is written, over what the draft began with. Its size is the draft's.
    pub layout: Layout,
    /// The content it began with, as long as no commit replaced it: what is unchanged of it is read through the RAM tier.
    pub base: Option<Arc<Layout>>,
    /// Extents that are ours to overwrite and to give back: all but what a commit returned.
    pub fresh: ExtentSet,
    /// Allocated for chunks that nobody wrote yet, by logical offset.
    pub reserved: BTreeMap<u64, Extent>,
    /// Gathered, by first chunk.
    pub dirty: BTreeMap<u64, Run>,
    /// On their way: first chunk -> where.
    pub in_flight: BTreeMap<u64, InFlight>,
    /// Last extent got of each member.
    pub after: Vec<Option<Extent>>,
    /// Where the last write ended, and how many bytes ended there in a row.
    pub last_end: u64,
    pub streak: u64,
    /// A write that failed: the content is not what was written, and no commit may say so.
    pub failed: Option<(ErrorKind, String)>,
    /// `failed` was told once.
    pub told: bool,
    /// Extents that a write which never came back may still change: never given back.
    pub lost: bool,
}

#[derive(Debug)]
pub(super) struct Run {
    /// Space for as many chunks as `buffer` holds; `logical` is that of the first chunk.
    pub extent: Extent,
    pub buffer: Buffer,
    /// Chunks gathered so far, from the first.
    pub filled: u64,
    /// Its space was reserved by the user: what is not filled stays reserved.
    pub reserved: bool,
    pub permit: Permit,
}

#[derive(Debug)]
pub(super) struct InFlight {
    pub chunks: u64,
    /// Bytes that count for the sums.
    pub valid: u64,
}

impl State {
    pub(super) fn check_failed(&self) -> Result<()> {
        match &self.failed {
            Some((kind, text)) => Err(Error::new(*kind, format!("an earlier write failed: {text}"))),
            None => Ok(()),
        }
    }

    pub(super) fn in_flight_within(&self, chunks: &Range<u64>) -> bool {
        self.in_flight
            .range(..chunks.end)
            .next_back()
            .is_some_and(|(first, run)| first + run.chunks > chunks.start)
    }

    /// First chunks of the runs that touch `chunks`.
    pub(super) fn dirty_within(&self, chunks: &Range<u64>) -> Vec<u64> {
        self.runs_within(chunks).map(|(first, _)| first).collect()
    }

    pub(super) fn runs_within(&self, chunks: &Range<u64>) -> impl Iterator<Item = (u64, &Run)> {
        let start = self.dirty.range(..=chunks.start).next_back().map_or(chunks.start, |(first, _)| *first);
        let wanted = chunks.clone();
        self.dirty
            .range(start..chunks.end.max(start))
            .map(|(first, run)| (*first, run))
            .filter(move |(first, run)| first + run.filled > wanted.start)
    }

    /// The parts of `range` that no run has gathered.
    pub(super) fn not_gathered(&self, range: Range<u64>, chunk: u64) -> Vec<Range<u64>> {
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
    pub(super) fn run_of(&self, chunk: u64) -> Option<u64> {
        self.dirty
            .range(..=chunk)
            .next_back()
            .filter(|(first, run)| *first + run.filled > chunk)
            .map(|(first, _)| *first)
    }

    /// The run that would take `chunk` next, with room for it.
    pub(super) fn run_ending_at(&self, chunk: u64) -> Option<u64> {
        let chunk_size = self.layout.chunk_size() as u64;
        self.dirty
            .range(..=chunk)
            .next_back()
            .filter(|(first, run)| *first + run.filled == chunk && run.filled * chunk_size < run.extent.len)
            .map(|(first, _)| *first)
    }

    pub(super) fn reserved_at(&self, logical: u64) -> bool {
        self.reserved.range(..=logical).next_back().is_some_and(|(_, extent)| extent.logical_end() > logical)
    }

    /// Takes up to `want` bytes from `logical` out of the reserved space.
    pub(super) fn take_reserved(&mut self, logical: u64, want: u64) -> Option<Extent> {
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
    pub(super) fn names(&self, extent: &Extent) -> bool {
        self.layout.extent_at(extent.logical).is_some_and(|named| same_place(&named, extent))
    }

    /// The layout's fresh extent from `logical` on, as far as it is fresh.
    pub(super) fn fresh_at(&self, logical: u64) -> Option<Extent> {
        let extent = self.layout.extent_at(logical)?;
        let extent = extent.cut(logical..u64::MAX)?;
        self.fresh.starts(&extent)
    }

    /// The first fresh byte of the layout within `len` bytes after `logical`.
    pub(super) fn next_fresh(&self, logical: u64, len: u64) -> Option<u64> {
        let chunk = self.layout.chunk_size() as u64;
        self.layout.lookup(logical, len).into_iter().find_map(|piece| {
            let Piece::Data(extent) = piece else { return None };
            (0..extent.len / chunk)
                .map(|index| extent.logical + index * chunk)
                .find(|at| self.fresh_at(*at).is_some())
        })
    }

    /// Whether this extent is one of the base's: unchanged since the draft began.
    pub(super) fn is_base(&self, extent: &Extent) -> bool {
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
    pub(super) fn occupied_until(&self, at: u64, chunk: u64) -> Option<u64> {
        if let Some(extent) = self.layout.extent_at(at) {
            return Some(extent.logical_end());
        }
        let reserved = self.reserved.range(..=at).next_back().map(|(_, extent)| extent.logical_end());
        let dirty = self.dirty.range(..=at / chunk).next_back().map(|(_, run)| run.extent.logical_end());
        reserved.into_iter().chain(dirty).find(|end| *end > at)
    }

    /// Where the next space after `at` begins.
    pub(super) fn next_occupied(&self, at: u64, chunk: u64) -> u64 {
        let layout = self.layout.next_data(at).unwrap_or(u64::MAX);
        let reserved = self.reserved.range(at..).next().map_or(u64::MAX, |(logical, _)| *logical);
        let dirty = self.dirty.range(at / chunk..).next().map_or(u64::MAX, |(first, _)| first * chunk);
        layout.min(reserved).min(dirty)
    }
}

/// Whether the two put the same byte of the region at the same place.
pub(super) fn same_place(a: &Extent, b: &Extent) -> bool {
    a.member == b.member
        && a.file == b.file
        && a.offset.wrapping_sub(a.logical) == b.offset.wrapping_sub(b.logical)
}
