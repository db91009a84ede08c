//! Which reads a load makes: pure arithmetic.
//!
//! ```text
//! runs      what is wanted of a source, and where on the device it goes
//! windows   runs that are neighbours, with gaps that are cheaper to read than to leave out
//! pieces    windows cut at extents and at multiples of the chunk: one read each, an aligned superset
//! parts     what of a piece is copied; copies that are contiguous on both sides are one
//! ```

use std::collections::VecDeque;

use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// Alignment of direct reads: no drive asks for more.
const PAGE: u64 = 4096;

/// A range that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which source.
    pub source: u32,
    /// First byte in it.
    pub offset: u64,
    /// Bytes, not 0.
    pub len: u64,
    /// Where it goes.
    pub device: u64,
    /// Which tensor it is of, for messages.
    pub tensor: u32,
}

/// A copy out of a piece's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PiecePart {
    pub offset: u32,
    pub len: u32,
    pub device: u64,
}

/// One read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub source: u32,
    /// Which of the source's extents; `None`: a hole, nothing is read.
    pub stored: Option<u32>,
    /// Where the read starts on the extent's device.
    pub device_offset: u64,
    /// Bytes asked for.
    pub read_len: usize,
    /// Bytes that must come: a file may end inside the last block.
    pub needed: usize,
    /// Offset in the source of the buffer's byte `skip`.
    pub logical: u64,
    /// Where in the buffer the bytes of `logical` are.
    pub skip: usize,
    /// The tensor of the first part.
    pub tensor: u32,
    /// Copies, a range of [`Pieces::parts`].
    pub parts: std::ops::Range<usize>,
}

/// All reads of a load.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    pub order: Vec<Piece>,
    pub parts: Vec<PiecePart>,
    /// Bytes that a buffer must hold.
    pub buffer_len: usize,
    /// Bytes to read.
    pub read_bytes: u64,
    /// Bytes to copy.
    pub copy_bytes: u64,
}

impl Pieces {
    /// Adds reads that were planned later.
    pub fn append(&mut self, mut other: Pieces) {
        let first = self.parts.len();
        for piece in &mut other.order {
            piece.parts = piece.parts.start + first..piece.parts.end + first;
        }
        self.order.append(&mut other.order);
        self.parts.append(&mut other.parts);
        self.read_bytes += other.read_bytes;
        self.copy_bytes += other.copy_bytes;
    }
}

/// What is wanted, source by source and in order. Refuses runs that share bytes or leave their source.
pub(super) fn by_source(sources: &[Source], runs: &[Run]) -> Result<Vec<(u32, Vec<Run>)>> {
    let mut sorted: Vec<Run> = runs.iter().filter(|run| run.len > 0).copied().collect();
    sorted.sort_by_key(|run| (run.source, run.offset));
    let mut groups = Vec::new();
    for list in sorted.chunk_by(|a, b| a.source == b.source) {
        let index = list[0].source;
        let source = sources.get(index as usize).ok_or_else(|| {
            let context = format!("a run of source {index}, of which there are {}", sources.len());
            Error::new(ErrorKind::Invalid, context)
        })?;
        for pair in list.windows(2) {
            if pair[0].offset.saturating_add(pair[0].len) > pair[1].offset {
                let context = format!("two tensors share bytes at {} of {}", pair[1].offset, source.name());
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
        let last = list.last().map_or(0, |run| run.offset.saturating_add(run.len));
        if last > source.len() {
            let context = format!("{} ends at {}, before {last}", source.name(), source.len());
            return Err(Error::new(ErrorKind::Changed, context));
        }
        groups.push((index, list.to_vec()));
    }
    Ok(groups)
}

/// Cuts up what is wanted. `chunk`: bytes of a read, a power of two of at least 64 KiB; `gap`: bytes between two runs that are
/// read along.
pub(crate) fn plan(sources: &[Source], runs: &[Run], chunk: usize, gap: u64) -> Result<Pieces> {
    let mut pieces = Pieces::default();
    let mut groups: Vec<(u64, VecDeque<Piece>)> = Vec::new();
    for (index, list) in by_source(sources, runs)? {
        let source = &sources[index as usize];
        let list: Vec<&Run> = list.iter().collect();
        for (group, piece) in of_source(source, index, &list, chunk, gap, &mut pieces) {
            match groups.iter_mut().find(|(other, _)| *other == group) {
                Some((_, list)) => list.push_back(piece),
                None => groups.push((group, VecDeque::from([piece]))),
            }
        }
    }
    // Drives in turn, each in its own order.
    while !groups.is_empty() {
        groups.retain_mut(|(_, list)| {
            pieces.order.extend(list.pop_front());
            !list.is_empty()
        });
    }
    Ok(pieces)
}

fn of_source(
    source: &Source,
    index: u32,
    runs: &[&Run],
    chunk: usize,
    gap: u64,
    pieces: &mut Pieces,
) -> Vec<(u64, Piece)> {
    let unit = source.sums.as_ref().map_or(1, |sums| sums.chunk_size.max(1));
    let chunk = (chunk as u64).max(unit.next_power_of_two());
    let mut found = Vec::new();
    let mut next_run = 0;
    let mut at = 0;
    while at < runs.len() {
        let mut until = at + 1;
        let mut end = runs[at].offset + runs[at].len;
        while until < runs.len() && runs[until].offset - end <= gap {
            end = runs[until].offset + runs[until].len;
            until += 1;
        }
        // Whole checksummed chunks, so that they can be compared. A window never starts inside the one before it.
        let start = (runs[at].offset / unit * unit).max(found.last().map_or(0, |(_, piece)| end_of(piece)));
        let end = end.div_ceil(unit).saturating_mul(unit).min(source.len());
        window(source, index, runs, &mut next_run, start..end, chunk, pieces, &mut found);
        at = until;
    }
    found
}

fn end_of(piece: &Piece) -> u64 {
    piece.logical + (piece.needed - piece.skip) as u64
}

#[allow(clippy::too_many_arguments)] // private, one caller
fn window(
    source: &Source,
    index: u32,
    runs: &[&Run],
    next_run: &mut usize,
    window: std::ops::Range<u64>,
    chunk: u64,
    pieces: &mut Pieces,
    found: &mut Vec<(u64, Piece)>,
) {
    let mut at = window.start;
    let first = source.stored.partition_point(|extent| extent.logical + extent.len <= at);
    let mut extents = source.stored.iter().enumerate().skip(first).peekable();
    while at < window.end {
        while extents.next_if(|(_, extent)| extent.logical + extent.len <= at).is_some() {}
        let (stored, until, from) = match extents.peek() {
            Some((i, extent)) if extent.logical <= at => {
                (Some((*i, *extent)), extent.logical + extent.len, extent.logical)
            }
            Some((_, extent)) => (None, extent.logical, at),
            None => (None, window.end, at),
        };
        let align = stored.map_or(1, |(_, extent)| if extent.device.alignment() > 1 { PAGE } else { 1 });
        // Where places in the source and on the device differ by less than a block, supersets are up to a block longer.
        let grid = match stored {
            Some((_, extent)) if extent.logical.abs_diff(extent.offset) % PAGE != 0 => chunk / 2,
            _ => chunk,
        };
        let end = until.min(window.end).min((at / grid + 1).saturating_mul(grid));
        let parts = parts(runs, next_run, at..end, pieces);
        if !parts.1.is_empty() {
            let tensor = parts.0;
            let (range, mut piece) = (
                parts.1,
                Piece {
                    source: index,
                    stored: None,
                    device_offset: 0,
                    read_len: (end - at) as usize,
                    needed: (end - at) as usize,
                    logical: at,
                    skip: 0,
                    tensor,
                    parts: 0..0,
                },
            );
            let mut group = 0;
            if let Some((i, extent)) = stored {
                let place = extent.offset + (at - from);
                let low = place / align * align;
                let skip = (place - low) as usize;
                let needed = skip + (end - at) as usize;
                let high = (low + needed as u64).next_multiple_of(align);
                // A file may end inside its last block; direct reads go to the end of that.
                let limit = extent.device.known_len().next_multiple_of(u64::from(extent.device.alignment()));
                piece = Piece {
                    stored: Some(i as u32),
                    device_offset: low,
                    read_len: (high.min(limit).max(low + needed as u64) - low) as usize,
                    needed,
                    skip,
                    ..piece
                };
                group = extent.group;
                pieces.read_bytes += piece.read_len as u64;
                for part in &mut pieces.parts[range.clone()] {
                    part.offset += skip as u32;
                }
            }
            piece.parts = range;
            pieces.buffer_len = pieces.buffer_len.max(piece.read_len);
            found.push((group, piece));
        }
        at = end;
    }
}

/// The copies of the runs within a range, offsets counted from its start. Runs are met in order, so the place is kept.
fn parts(
    runs: &[&Run],
    next_run: &mut usize,
    range: std::ops::Range<u64>,
    pieces: &mut Pieces,
) -> (u32, std::ops::Range<usize>) {
    let first = pieces.parts.len();
    let mut tensor = 0;
    while *next_run < runs.len() {
        let run = runs[*next_run];
        let start = run.offset.max(range.start);
        let end = (run.offset + run.len).min(range.end);
        if start >= range.end {
            break;
        }
        if start < end {
            let part = PiecePart {
                offset: (start - range.start) as u32,
                len: (end - start) as u32,
                device: run.device + (start - run.offset),
            };
            pieces.copy_bytes += u64::from(part.len);
            match pieces.parts[first..].last_mut() {
                Some(last)
                    if last.offset + last.len == part.offset
                        && last.device + u64::from(last.len) == part.device =>
                {
                    last.len += part.len;
                }
                Some(_) => pieces.parts.push(part),
                None => {
                    tensor = run.tensor;
                    pieces.parts.push(part);
                }
            }
        }
        if run.offset + run.len > range.end {
            break;
        }
        *next_run += 1;
    }
    (tensor, first..pieces.parts.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::source::CachePolicy;

    fn file(len: usize) -> (tempfile::TempDir, Source) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, vec![1; len]).unwrap();
        let source = Source::file(&path, CachePolicy::Auto).unwrap();
        (folder, source)
    }

    #[test]
    fn neighbours_become_one_read_and_one_copy() {
        let (_folder, source) = file(1 << 20);
        let runs: Vec<Run> = (0..100)
            .map(|i| Run {
                source: 0,
                offset: 8 + i * 4096,
                len: 4096,
                device: 256 + i * 4096,
                tensor: i as u32,
            })
            .collect();
        let pieces = plan(&[source], &runs, 256 << 10, 64 << 10).unwrap();
        assert_eq!(pieces.order.len(), 2);
        assert_eq!(pieces.parts.len(), 2);
        assert_eq!(pieces.copy_bytes, 100 * 4096);
    }

    #[test]
    fn what_is_shared_or_beyond_the_end_is_refused() {
        let (_folder, source) = file(10_000);
        let sources = [source];
        let run = |offset, len| Run { source: 0, offset, len, device: 0, tensor: 0 };
        let shared = plan(&sources, &[run(0, 100), run(99, 5)], 1 << 20, 0).unwrap_err();
        assert_eq!(shared.kind(), ErrorKind::Invalid);
        let beyond = plan(&sources, &[run(9_999, 2)], 1 << 20, 0).unwrap_err();
        assert_eq!(beyond.kind(), ErrorKind::Changed);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever is wanted, each byte is copied once, from its place to its place, and out of the read it is in.
        #[test]
        fn every_byte_is_copied_once_to_its_place(
            lens in prop::collection::vec((0u64..5000, 1u64..70_000), 1..40),
            gap in 0u64..10_000,
            chunk_log in 16u32..20,
        ) {
            let total: u64 = lens.iter().map(|(before, len)| before + len).sum();
            let (_folder, source) = file(total as usize);
            let mut runs = Vec::new();
            let mut offset = 0;
            let mut device = 0x1000u64;
            for (i, (before, len)) in lens.iter().enumerate() {
                offset += before;
                runs.push(Run { source: 0, offset, len: *len, device, tensor: i as u32 });
                offset += len;
                device = (device + len).next_multiple_of(256);
            }
            let pieces = plan(&[source], &runs, 1 << chunk_log, gap).unwrap();
            // Device ranges with the places in the source that they come from.
            let mut copied = Vec::new();
            for piece in &pieces.order {
                prop_assert!(piece.read_len <= pieces.buffer_len);
                prop_assert!(piece.needed <= piece.read_len);
                for part in &pieces.parts[piece.parts.clone()] {
                    let start = part.offset as usize;
                    prop_assert!(start >= piece.skip && start + part.len as usize <= piece.needed);
                    let logical = piece.logical + (start - piece.skip) as u64;
                    copied.push((part.device, logical, u64::from(part.len)));
                }
            }
            copied.sort_unstable();
            let mut copied = copied.into_iter();
            let mut part = copied.next();
            for run in &runs {
                let mut at = 0;
                while at < run.len {
                    let Some((device, logical, len)) = part else { return Err(TestCaseError::fail("bytes are missing")) };
                    prop_assert_eq!((device, logical), (run.device + at, run.offset + at));
                    // A part may go on into the next run where both sides do.
                    let step = len.min(run.len - at);
                    at += step;
                    part = if step < len { Some((device + step, logical + step, len - step)) } else { copied.next() };
                }
            }
            prop_assert!(part.is_none());
        }
    }
}
