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
        let mut need = |key: u32, part: u8| -> Result<Vec<u8>> {
            let value = get(key)?.ok_or_else(|| corrupt(format!("layout record {key:#x} is missing")))?;
            open(key, part, value)
        };
        let head = need(0, HEAD)?;
        if head.len() != 28 {
            return Err(corrupt(format!("layout head has {} bytes, not 28", head.len())));
        }
        let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap_or_default());
        let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap_or_default());
        let mut layout = Layout {
            size: u64_at(0),
            generation: u64_at(8),
            chunk_size: u32_at(16),
            extents: BTreeMap::new(),
            sums: Vec::new(),
        };
        if !layout.chunk_size.is_power_of_two() {
            return Err(corrupt(format!("layout has a chunk size of {}", layout.chunk_size)));
        }
        let (extents, segments) = (u32_at(20) as usize, u32_at(24));
        let mut at = 0u64;
        for index in 0..extents.div_ceil(EXTENTS_PER_RECORD) {
            let body = need(EXTENTS_KEY + index as u32, EXTENTS)?;
            let mut body = body.as_slice();
            while !body.is_empty() {
                let mut next =
                    || varint(&mut body).ok_or_else(|| corrupt("layout extents end in the middle"));
                let (gap, len, member, file, offset) = (next()?, next()?, next()?, next()?, next()?);
                let logical = at.checked_add(gap).ok_or_else(|| corrupt("extent beyond 2^64"))?;
                let member =
                    u16::try_from(member).map_err(|_| corrupt(format!("extent on member {member}")))?;
                at = logical
                    .checked_add(len)
                    .filter(|_| len > 0)
                    .ok_or_else(|| corrupt("extent of impossible length"))?;
                layout.extents.insert(logical, Extent { logical, member, file, offset, len });
            }
        }
        if layout.extents.len() != extents {
            return Err(corrupt(format!(
                "layout has {} extents, its head says {extents}",
                layout.extents.len()
            )));
        }
        for index in 0..segments {
            let body = need(SUMS_KEY + index, SUMS)?;
            if body.len() % 4 != 0 || body.len() as u64 / 4 > SEGMENT_CHUNKS {
                return Err(corrupt(format!("layout sums have {} bytes", body.len())));
            }
            let sums = body
                .chunks_exact(4)
                .map(|sum| u32::from_le_bytes(sum.try_into().unwrap_or_default()))
                .collect();
            layout.sums.push(Arc::new(sums));
        }
        Ok(layout)
    }
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

fn open(key: u32, part: u8, mut value: Vec<u8>) -> Result<Vec<u8>> {
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
    value.truncate(value.len() - 4);
    value.drain(..2);
    Ok(value)
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
