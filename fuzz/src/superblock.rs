//! Superblocks, and what is on a device that is not ours.

use engine::format::{MAGIC, SUPERBLOCK_BYTES, Superblock};
use engine::{MemberKind, fuzzing};

use crate::digest;

/// Input: two copies, the second one perhaps missing or short.
pub fn run(input: &[u8]) -> u64 {
    let len = input.len() as u64;
    let foreign = fuzzing::foreign(input, len);
    assert_eq!(foreign.is_none(), input.iter().all(|byte| *byte == 0));
    let (first, second) = input.split_at(input.len().min(SUPERBLOCK_BYTES));
    let raw = fuzzing::superblock(&[first, second]);
    let sealed = fuzzing::superblock(&[&seal(first), &seal(second)]);
    for found in [&raw, &sealed].into_iter().flatten() {
        check(&found.superblock);
    }
    let shown = |found: &engine::Result<engine::format::Found>| match found {
        Ok(found) => format!("{:?} {:?}", found.superblock, found.damaged),
        Err(error) => error.chain(),
    };
    digest(&(shown(&raw), shown(&sealed), foreign))
}

/// A whole copy with the right magic number and sum, so that what is behind them is met.
fn seal(bytes: &[u8]) -> Vec<u8> {
    if bytes.is_empty() {
        return Vec::new();
    }
    let mut block = bytes.to_vec();
    block.resize(SUPERBLOCK_BYTES, 0);
    block[..8].copy_from_slice(&MAGIC);
    block[12..16].fill(0);
    let sum = crc32fast::hash(&block);
    block[12..16].copy_from_slice(&sum.to_le_bytes());
    block
}

/// What the rest of the engine takes for granted.
fn check(superblock: &Superblock) {
    assert!((1..=16).contains(&superblock.members.len()));
    assert!(superblock.index == u16::MAX || (superblock.index as usize) < superblock.members.len());
    assert!(superblock.chunk_size.is_power_of_two() && superblock.chunk_size >= 4096);
    let catalog = superblock.catalog_offset..superblock.catalog_offset + superblock.catalog_len;
    let data = superblock.data_offset..superblock.data_offset + superblock.data_len;
    let kind = superblock.members.get(superblock.index as usize).map(|member| member.kind);
    if kind.is_some_and(MemberKind::is_raw) {
        let block = SUPERBLOCK_BYTES as u64;
        assert!(catalog.is_empty() || catalog.start >= block, "the catalog lies over the superblock");
        assert!(data.is_empty() || data.start >= block, "the data lies over the superblock");
        let apart =
            catalog.is_empty() || data.is_empty() || catalog.end <= data.start || data.end <= catalog.start;
        assert!(apart, "catalog {catalog:?} and data {data:?} overlap");
    }
    let again = superblock.encode().expect("what was read can be written");
    let found = fuzzing::superblock(&[&again]).expect("what was written can be read");
    assert_eq!(found.superblock, *superblock);
}
