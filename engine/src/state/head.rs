//! Heads: what a commit says, as bytes.
//!
//! ```text
//! NVTSTATE | bytes in all u64 | sequence u64 | block bytes u32 | units u32 | meta bytes u64 | crc32 u32 | 0 u32
//! length u64 | version u8, 255: none | 0 7                                      for each unit
//! meta
//! ```
//!
//! All numbers are little-endian; the sum is over all bytes, with itself as zeros.

use super::{META_MAX, UNITS_MAX, VERSIONS};
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"NVTSTATE";
const FIXED: usize = 48;
const UNIT: usize = 16;
const SUM: std::ops::Range<usize> = 40..44;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub sequence: u64,
    pub block_bytes: u32,
    /// Length, and the version that is committed.
    pub units: Vec<(u64, Option<u8>)>,
    pub meta: Vec<u8>,
}

fn bad(why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the head of a state {why}"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u64_at(bytes, at) as u32
}

/// Bytes in all, as its first bytes say; checked to be possible.
pub(super) fn encoded_len(first: &[u8]) -> Result<usize> {
    if first.len() < FIXED || &first[..8] != MAGIC {
        return Err(bad("is none"));
    }
    let len = u64_at(first, 8);
    if !(FIXED as u64..=(META_MAX + UNITS_MAX * UNIT + FIXED) as u64).contains(&len) {
        return Err(bad("says that it has an impossible length"));
    }
    Ok(len as usize)
}

impl Head {
    pub(super) fn encode(&self) -> Vec<u8> {
        let len = FIXED + self.units.len() * UNIT + self.meta.len();
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(len as u64).to_le_bytes());
        bytes.extend_from_slice(&self.sequence.to_le_bytes());
        bytes.extend_from_slice(&self.block_bytes.to_le_bytes());
        bytes.extend_from_slice(&(self.units.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.meta.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        for (len, version) in &self.units {
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&[version.unwrap_or(u8::MAX), 0, 0, 0, 0, 0, 0, 0]);
        }
        bytes.extend_from_slice(&self.meta);
        let sum = crc32fast::hash(&bytes);
        bytes[SUM].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Head> {
        if encoded_len(bytes)? != bytes.len() {
            return Err(bad("is not of the length that it says"));
        }
        let mut zeroed = bytes.to_vec();
        zeroed[SUM].fill(0);
        if crc32fast::hash(&zeroed) != u32_at(bytes, SUM.start) {
            return Err(bad("fails its checksum"));
        }
        let count = u32_at(bytes, 28) as usize;
        let meta = FIXED + count * UNIT;
        if count > UNITS_MAX || (meta as u64).checked_add(u64_at(bytes, 32)) != Some(bytes.len() as u64) {
            return Err(bad("says that it has an impossible number of units"));
        }
        let unit = |at: usize| -> Result<(u64, Option<u8>)> {
            match bytes[at + 8] {
                u8::MAX => Ok((u64_at(bytes, at), None)),
                version if version < VERSIONS => Ok((u64_at(bytes, at), Some(version))),
                _ => Err(bad("names an impossible version")),
            }
        };
        Ok(Head {
            sequence: u64_at(bytes, 16),
            block_bytes: u32_at(bytes, 24),
            units: (0..count).map(|index| unit(FIXED + index * UNIT)).collect::<Result<_>>()?,
            meta: bytes[meta..].to_vec(),
        })
    }
}
