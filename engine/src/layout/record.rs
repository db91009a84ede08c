//! Catalog records of a layout.
//!
//! A layout is stored as several values, so that the sums of a 1 TB region (256 MiB of them) are not one value and a
//! commit rewrites only what changed:
//!
//! ```text
//! key (u32)              value
//! 0                      head
//! 0x1000_0000 + i        extents i * 4096 ..
//! 0x2000_0000 + i        sums of chunks i * 16384 ..
//!
//! every value:
//! 0        1        2                               len - 4
//! +--------+--------+------------ ... -------------+----------+
//! | version| part   | body                         | crc32 LE |   crc over all bytes before it
//! +--------+--------+------------ ... -------------+----------+
//!
//! head body, little-endian:   size u64 | generation u64 | chunk_size u32 | extents u32 | sum segments u32
//! extents body, LEB128 u64s:  per extent: gap since the end of the one before | len | member | file | offset
//! sums body, little-endian:   u32 each
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Extent, Layout, SEGMENT_CHUNKS};
use crate::error::{Error, ErrorKind, Result};

/// Version of the encoding, the first byte of each value.
pub const VERSION: u8 = 1;
const HEAD: u8 = 0;
const EXTENTS: u8 = 1;
const SUMS: u8 = 2;
const EXTENTS_KEY: u32 = 0x1000_0000;
const SUMS_KEY: u32 = 0x2000_0000;
const EXTENTS_PER_RECORD: usize = 4096;

/// Difference between what is stored of a layout and what should be.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Values to store, by key.
    pub put: Vec<(u32, Vec<u8>)>,
    /// Keys to remove.
    pub delete: Vec<u32>,
}

impl Layout {
    /// All records of it.
    pub fn records(&self) -> Vec<(u32, Vec<u8>)> {
        self.changes(None).put
    }

    /// What to store when the records of `stored` are there already.
    pub fn changes(&self, stored: Option<&Layout>) -> Changes {
        let mut changes = Changes::default();
        let mut head = Vec::with_capacity(28);
        head.extend_from_slice(&self.size.to_le_bytes());
        head.extend_from_slice(&self.generation.to_le_bytes());
        head.extend_from_slice(&self.chunk_size.to_le_bytes());
        head.extend_from_slice(&(self.extents.len() as u32).to_le_bytes());
        head.extend_from_slice(&(self.sums.len() as u32).to_le_bytes());
        changes.put.push((0, seal(HEAD, head)));

        let mine = extent_records(self);
        let theirs = stored.map(extent_records).unwrap_or_default();
        let (mine_count, theirs_count) = (mine.len() as u32, theirs.len() as u32);
        for (index, record) in mine.into_iter().enumerate() {
            if theirs.get(index) != Some(&record) {
                changes.put.push((EXTENTS_KEY + index as u32, record));
            }
        }
        changes.delete.extend((mine_count..theirs_count).map(|index| EXTENTS_KEY + index));

        let stored_sums = stored.map(Layout::sum_segments).unwrap_or_default();
        for (index, segment) in self.sums.iter().enumerate() {
            if stored_sums.get(index).is_some_and(|old| Arc::ptr_eq(old, segment) || old == segment) {
                continue;
            }
            let body = segment.iter().flat_map(|sum| sum.to_le_bytes()).collect();
            changes.put.push((SUMS_KEY + index as u32, seal(SUMS, body)));
        }
        changes.delete.extend((self.sums.len()..stored_sums.len()).map(|index| SUMS_KEY + index as u32));
        changes
    }

    /// Reads a layout back; `get` gives the value of a key.
    pub fn from_records(mut get: impl FnMut(u32) -> Result<Option<Vec<u8>>>) -> Result<Layout> {
        let mut need = |key: u32| -> Result<Vec<u8>> { get(key)?.ok_or_else(|| missing(key)) };
        let head = Head::decode(&need(0)?)?;
        let mut layout = Layout {
            size: head.size,
            generation: head.generation,
            chunk_size: head.chunk_size,
            extents: BTreeMap::new(),
            sums: Vec::new(),
        };
        let mut at = 0u64;
        for index in 0..head.extent_records() {
            let key = EXTENTS_KEY + index;
            each_extent(key, &need(key)?, &mut at, &mut |extent| {
                layout.extents.insert(extent.logical, extent);
            })?;
        }
        head.check_count(layout.extents.len())?;
        for index in 0..head.segments {
            let key = SUMS_KEY + index;
            let value = need(key)?;
            let sums = sums(key, &value)?
                .chunks_exact(4)
                .map(|sum| u32::from_le_bytes(sum.try_into().unwrap_or_default()))
                .collect();
            layout.sums.push(Arc::new(sums));
        }
        Ok(layout)
    }
}

#[derive(Debug)]
struct Head {
    size: u64,
    generation: u64,
    chunk_size: u32,
    extents: usize,
    segments: u32,
}

impl Head {
    fn decode(value: &[u8]) -> Result<Head> {
        let head = open(0, HEAD, value)?;
        if head.len() != 28 {
            return Err(corrupt(format!("layout head has {} bytes, not 28", head.len())));
        }
        let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap_or_default());
        let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap_or_default());
        let head = Head {
            size: u64_at(0),
            generation: u64_at(8),
            chunk_size: u32_at(16),
            extents: u32_at(20) as usize,
            segments: u32_at(24),
        };
        if !head.chunk_size.is_power_of_two() {
            return Err(corrupt(format!("layout has a chunk size of {}", head.chunk_size)));
        }
        Ok(head)
    }

    fn extent_records(&self) -> u32 {
        self.extents.div_ceil(EXTENTS_PER_RECORD) as u32
    }

    fn check_count(&self, found: usize) -> Result<()> {
        if found != self.extents {
            return Err(corrupt(format!("layout has {found} extents, its head says {}", self.extents)));
        }
        Ok(())
    }
}

fn each_extent(key: u32, value: &[u8], at: &mut u64, each: &mut dyn FnMut(Extent)) -> Result<()> {
    let mut body = open(key, EXTENTS, value)?;
    while !body.is_empty() {
        let mut next = || varint(&mut body).ok_or_else(|| corrupt("layout extents end in the middle"));
        let (gap, len, member, file, offset) = (next()?, next()?, next()?, next()?, next()?);
        let logical = at.checked_add(gap).ok_or_else(|| corrupt("extent beyond 2^64"))?;
        let member = u16::try_from(member).map_err(|_| corrupt(format!("extent on member {member}")))?;
        *at = logical
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or_else(|| corrupt("extent of impossible length"))?;
        each(Extent { logical, member, file, offset, len });
    }
    Ok(())
}

fn sums(key: u32, value: &[u8]) -> Result<&[u8]> {
    let body = open(key, SUMS, value)?;
    if body.len() % 4 != 0 || body.len() as u64 / 4 > SEGMENT_CHUNKS {
        return Err(corrupt(format!("layout sums have {} bytes", body.len())));
    }
    Ok(body)
}

/// Takes the records of one layout in order of their keys and gives its extents, without building the layout. What
/// [`Layout::from_records`] refuses is refused.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    head: Option<Head>,
    at: u64,
    found: usize,
    extent_records: u32,
    segments: u32,
}

impl Scan {
    /// The next record.
    pub(crate) fn record(&mut self, key: u32, value: &[u8], each: &mut dyn FnMut(Extent)) -> Result<()> {
        if key == 0 {
            self.head = Some(Head::decode(value)?);
            return Ok(());
        }
        let Some(head) = &self.head else { return Err(missing(0)) };
        if key == EXTENTS_KEY + self.extent_records && self.extent_records < head.extent_records() {
            self.extent_records += 1;
            let found = &mut self.found;
            each_extent(key, value, &mut self.at, &mut |extent| {
                *found += 1;
                each(extent);
            })
        } else if key == SUMS_KEY + self.segments && self.segments < head.segments {
            self.segments += 1;
            sums(key, value).map(drop)
        } else {
            // Of no use to anyone, or after a gap that the end finds.
            Ok(())
        }
    }

    /// That was the last one.
    pub(crate) fn finish(self) -> Result<()> {
        let head = self.head.ok_or_else(|| missing(0))?;
        if self.extent_records < head.extent_records() {
            return Err(missing(EXTENTS_KEY + self.extent_records));
        }
        head.check_count(self.found)?;
        if self.segments < head.segments {
            return Err(missing(SUMS_KEY + self.segments));
        }
        Ok(())
    }
}

fn missing(key: u32) -> Error {
    corrupt(format!("layout record {key:#x} is missing"))
}

fn extent_records(layout: &Layout) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    let mut body = Vec::new();
    let mut at = 0;
    for (index, extent) in layout.extents().enumerate() {
        for value in [extent.logical - at, extent.len, extent.member as u64, extent.file, extent.offset] {
            put_varint(&mut body, value);
        }
        at = extent.logical_end();
        if (index + 1) % EXTENTS_PER_RECORD == 0 {
            records.push(seal(EXTENTS, std::mem::take(&mut body)));
        }
    }
    if !body.is_empty() {
        records.push(seal(EXTENTS, body));
    }
    records
}

fn seal(part: u8, body: Vec<u8>) -> Vec<u8> {
    let mut value = Vec::with_capacity(body.len() + 6);
    value.extend_from_slice(&[VERSION, part]);
    value.extend_from_slice(&body);
    let crc = crc32fast::hash(&value);
    value.extend_from_slice(&crc.to_le_bytes());
    value
}

fn open(key: u32, part: u8, value: &[u8]) -> Result<&[u8]> {
    if value.len() < 6 {
        return Err(corrupt(format!("layout record {key:#x} has {} bytes", value.len())));
    }
    let (bytes, crc) = value.split_at(value.len() - 4);
    if crc32fast::hash(bytes).to_le_bytes() != crc {
        return Err(corrupt(format!("layout record {key:#x} fails its checksum")));
    }
    if bytes[0] > VERSION {
        return Err(Error::new(
            ErrorKind::NewerFormat,
            format!("layout record {key:#x} has version {}, this program knows {VERSION}", bytes[0]),
        ));
    }
    if bytes[1] != part {
        return Err(corrupt(format!("layout record {key:#x} is of part {}, not {part}", bytes[1])));
    }
    Ok(&bytes[2..])
}

fn corrupt(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = (first & 0x7f) as u64;
        if shift == 63 && bits > 1 {
            return None;
        }
        value |= bits << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
