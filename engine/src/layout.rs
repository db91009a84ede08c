//! Where the bytes of a region lie: its *layout*.
//!
//! A layout is one generation of content: sorted extents, one CRC-32 a chunk, the size. Ranges without an
//! extent are holes and read as zeros. Extents are whole chunks long on raw and striped pools; the one extent of a
//! region that is a file of its own may end at any byte.
//!
//! Rule for sums: `sum(i) = crc32(bytes[i * chunk .. min((i + 1) * chunk, size)])`; unused (0) for chunks in holes.
//!
//! Sums are kept in segments shared by reference, so that a draft of a large region copies only what it changes, and a
//! commit writes only the catalog records that changed. The record encoding is in [`record`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

pub mod record;

/// Chunks whose sums share a segment (and a catalog record of 64 KiB).
pub const SEGMENT_CHUNKS: u64 = 16 << 10;

/// Most chunks of a region that lies in extents: with chunks of 16 KiB, 64 TiB.
pub const MAX_CHUNKS: u64 = 1 << 32;

/// `len` bytes of a region from `logical`, at `offset` of a file of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Extent {
    /// Offset in the region.
    pub logical: u64,
    /// Index of the member.
    pub member: u16,
    /// File of a directory member; 0 on raw members.
    pub file: u64,
    /// Offset in the file or the raw member.
    pub offset: u64,
    /// Length, never 0.
    pub len: u64,
}

impl Extent {
    /// One past the last byte, in the region.
    pub fn logical_end(&self) -> u64 {
        self.logical + self.len
    }

    /// The part of it within `range` (of the region), if any.
    pub fn cut(&self, range: Range<u64>) -> Option<Extent> {
        let start = self.logical.max(range.start);
        let end = self.logical_end().min(range.end);
        (start < end).then(|| Extent {
            logical: start,
            offset: self.offset + (start - self.logical),
            len: end - start,
            ..*self
        })
    }

    /// Whether `next` goes on where this ends, both in the region and on the member.
    fn continues(&self, next: &Extent) -> bool {
        self.member == next.member
            && self.file == next.file
            && self.logical_end() == next.logical
            && self.offset + self.len == next.offset
    }
}

/// A part of a looked-up range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Stored here.
    Data(Extent),
    /// Not stored: zeros.
    Hole {
        /// Offset in the region.
        logical: u64,
        /// Length in bytes.
        len: u64,
    },
}

impl Piece {
    /// Offset in the region.
    pub fn logical(&self) -> u64 {
        match self {
            Piece::Data(extent) => extent.logical,
            Piece::Hole { logical, .. } => *logical,
        }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        match self {
            Piece::Data(extent) => extent.len,
            Piece::Hole { len, .. } => *len,
        }
    }
}

/// One generation of content; see the module documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    generation: u64,
    chunk_size: u32,
    extents: BTreeMap<u64, Extent>,
    sums: Vec<Arc<Vec<u32>>>,
}

impl Layout {
    /// Empty content. `chunk_size` is a power of two.
    pub fn new(chunk_size: u32) -> Layout {
        Layout { size: 0, generation: 0, chunk_size, extents: BTreeMap::new(), sums: Vec::new() }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Generation: different for every committed content of a node.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Sets the generation, once, by the catalog at commit.
    pub fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// Chunks that the size covers.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk_size as u64)
    }

    /// Sets the size alone. What extents lie beyond stays: see [`truncate`](Self::truncate).
    pub fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// The same content with the extents of `range` only; sums are shared, not copied.
    pub(crate) fn part(&self, range: Range<u64>) -> Layout {
        let extents = self.overlapping(range).map(|extent| (extent.logical, extent)).collect();
        Layout {
            size: self.size,
            generation: self.generation,
            chunk_size: self.chunk_size,
            extents,
            sums: self.sums.clone(),
        }
    }

    /// All extents by logical offset.
    pub fn extents(&self) -> impl DoubleEndedIterator<Item = &Extent> {
        self.extents.values()
    }

    /// Number of extents.
    pub fn extent_count(&self) -> usize {
        self.extents.len()
    }

    /// Bytes of all extents.
    pub fn allocated(&self) -> u64 {
        self.extents.values().map(|extent| extent.len).sum()
    }

    /// The file that these bytes are one to one from offset 0, if it is one.
    pub fn single_file(&self) -> Option<(u16, u64)> {
        let mut extents = self.extents.values();
        let first = extents.next()?;
        let whole =
            first.logical == 0 && first.offset == 0 && first.len >= self.size && extents.next().is_none();
        whole.then_some((first.member, first.file))
    }

    /// The pieces that make up `len` bytes from `offset`: extents and holes, in order, without gaps; not cut at the size.
    pub fn lookup(&self, offset: u64, len: u64) -> Vec<Piece> {
        let end = offset.saturating_add(len);
        let mut pieces = Vec::new();
        let mut at = offset;
        for extent in self.overlapping(offset..end) {
            if extent.logical > at {
                pieces.push(Piece::Hole { logical: at, len: extent.logical - at });
            }
            at = extent.logical_end();
            pieces.push(Piece::Data(extent));
        }
        if at < end {
            pieces.push(Piece::Hole { logical: at, len: end - at });
        }
        pieces
    }

    /// The extent that holds the byte at `offset`, whole.
    pub fn extent_at(&self, offset: u64) -> Option<Extent> {
        self.extents
            .range(..=offset)
            .next_back()
            .map(|(_, extent)| *extent)
            .filter(|extent| extent.logical_end() > offset)
    }

    /// First byte at or after `offset` that is stored.
    pub fn next_data(&self, offset: u64) -> Option<u64> {
        if self.extent_at(offset).is_some() {
            return Some(offset);
        }
        self.extents.range(offset..).next().map(|(logical, _)| *logical)
    }

    /// First byte at or after `offset` that is not stored (may lie beyond the size).
    pub fn next_hole(&self, offset: u64) -> u64 {
        let mut at = offset;
        while let Some(extent) = self.extent_at(at) {
            at = extent.logical_end();
        }
        at
    }

    /// The extents within `range`, cut to it.
    fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = Extent> {
        let first =
            self.extents.range(..=range.start).next_back().map_or(range.start, |(logical, _)| *logical);
        let range_end = range.end;
        self.extents
            .range(first..range_end.max(first))
            .filter_map(move |(_, extent)| extent.cut(range.clone()))
    }

    /// Puts an extent in, over whatever was there. Returns what it displaced. Sums are set by the caller.
    pub fn replace(&mut self, extent: Extent) -> Vec<Extent> {
        let displaced = self.remove(extent.logical, extent.len);
        let mut extent = extent;
        if let Some((_, before)) = self.extents.range(..extent.logical).next_back()
            && before.continues(&extent)
        {
            extent = Extent { len: before.len + extent.len, ..*before };
        }
        if let Some(after) = self.extents.get(&extent.logical_end()).copied()
            && extent.continues(&after)
        {
            self.extents.remove(&after.logical);
            extent.len += after.len;
        }
        self.extents.insert(extent.logical, extent);
        displaced
    }

    /// Makes a hole. Returns the extents that were there, cut to the range.
    pub fn remove(&mut self, offset: u64, len: u64) -> Vec<Extent> {
        let end = offset.saturating_add(len);
        let removed: Vec<Extent> = self.overlapping(offset..end).collect();
        for cut in &removed {
            let Some(whole) = self.extent_at(cut.logical) else { continue };
            self.extents.remove(&whole.logical);
            if let Some(left) = whole.cut(0..cut.logical) {
                self.extents.insert(left.logical, left);
            }
            if let Some(right) = whole.cut(cut.logical_end()..u64::MAX) {
                self.extents.insert(right.logical, right);
            }
        }
        removed
    }

    /// Sets the size and drops the chunks wholly beyond it. Returns the extents dropped.
    pub fn truncate(&mut self, size: u64) -> Vec<Extent> {
        self.size = size;
        let chunk = self.chunk_size as u64;
        let keep = size.div_ceil(chunk).saturating_mul(chunk);
        let removed = self.remove(keep, u64::MAX - keep);
        let chunks = size.div_ceil(chunk);
        self.sums.truncate(chunks.div_ceil(SEGMENT_CHUNKS) as usize);
        // Sums past the end would come back when the region grows again; they are unused then, but records should not carry them.
        if let Some(last) = self.sums.last_mut() {
            let in_last = (chunks - (chunks - 1) / SEGMENT_CHUNKS * SEGMENT_CHUNKS) as usize;
            if last.len() > in_last {
                Arc::make_mut(last).truncate(in_last);
            }
        }
        removed
    }

    /// The sum of a chunk; 0 where none was set.
    pub fn sum(&self, chunk: u64) -> u32 {
        self.sums
            .get((chunk / SEGMENT_CHUNKS) as usize)
            .and_then(|segment| segment.get((chunk % SEGMENT_CHUNKS) as usize))
            .copied()
            .unwrap_or(0)
    }

    /// Sets the sum of a chunk.
    pub fn set_sum(&mut self, chunk: u64, sum: u32) {
        let (index, within) = ((chunk / SEGMENT_CHUNKS) as usize, (chunk % SEGMENT_CHUNKS) as usize);
        while self.sums.len() <= index {
            self.sums.push(Arc::new(Vec::new()));
        }
        let segment = Arc::make_mut(&mut self.sums[index]);
        if segment.len() <= within {
            segment.resize(within + 1, 0);
        }
        segment[within] = sum;
    }

    /// Sets the sums of consecutive chunks.
    pub fn set_sums(&mut self, first: u64, sums: &[u32]) {
        for (chunk, sum) in (first..).zip(sums) {
            self.set_sum(chunk, *sum);
        }
    }

    /// Segments of sums, for the record encoding.
    pub(crate) fn sum_segments(&self) -> &[Arc<Vec<u32>>] {
        &self.sums
    }

    /// Checks what decoding cannot know: extents in order, within the region's chunks, on members that exist.
    pub fn validate(&self, members: u16) -> Result<()> {
        let mut at = 0;
        for extent in self.extents.values() {
            let fits = extent.len > 0
                && extent.logical >= at
                && extent.logical.checked_add(extent.len).is_some()
                && extent.offset.checked_add(extent.len).is_some();
            if !fits || extent.member >= members {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("layout holds an impossible extent: {extent:?}"),
                ));
            }
            at = extent.logical_end();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
