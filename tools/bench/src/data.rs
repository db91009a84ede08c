//! What is written into blocks, and how it is checked when read back.
//!
//! With `verify=`, every block starts with a header (all little-endian):
//! ```text
//!  0  magic   "NVBV" 0x5642564e   4
//!  4  kind    1 crc32, 2 crc32c, 3 xxh32   4
//!  8  offset  of the block in its file     8
//! 16  len     of the block                 4
//! 20  sum     of bytes 24..len             4
//! ```
//! A block therefore tells a flipped bit (sum), a misplaced block (offset) and a block never written (magic) apart.

use crate::offsets::Rng;
use crate::settings::Verify;

const MAGIC: u32 = u32::from_le_bytes(*b"NVBV");
/// Bytes of the header `verify=` puts in front of every block.
pub const HEADER_BYTES: usize = 24;

/// Fills with incompressible bytes, eight at a time.
pub fn fill_random(buffer: &mut [u8], seed: u64) {
    let mut rng = Rng::new(seed);
    let mut words = buffer.chunks_exact_mut(8);
    for word in &mut words {
        word.copy_from_slice(&rng.next_u64().to_le_bytes());
    }
    for byte in words.into_remainder() {
        *byte = rng.next_u64() as u8;
    }
}

/// Stamps every 4 KiB so that no two writes are equal; costs one store per 4 KiB.
#[inline]
pub fn scramble(buffer: &mut [u8], stamp: u64) {
    for page in buffer.chunks_mut(4096) {
        if let Some(word) = page.get_mut(..8) {
            word.copy_from_slice(&stamp.to_le_bytes());
        }
    }
}

/// Seals a block that will be written at `offset`.
pub fn seal(kind: Verify, block: &mut [u8], offset: u64) {
    let sum = sum(kind, &block[HEADER_BYTES..]);
    block[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    block[4..8].copy_from_slice(&code(kind).to_le_bytes());
    block[8..16].copy_from_slice(&offset.to_le_bytes());
    let len = u32::try_from(block.len()).expect("blocks are at most 64 MiB");
    block[16..20].copy_from_slice(&len.to_le_bytes());
    block[20..24].copy_from_slice(&sum.to_le_bytes());
}

/// Checks a block read from `offset`; the error says what is wrong with it.
pub fn check(kind: Verify, block: &[u8], offset: u64) -> Result<(), String> {
    let word = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"));
    if word(0) != MAGIC {
        return Err(format!(
            "verify: no header at offset {offset}: never written with verify, or overwritten"
        ));
    }
    if word(4) != code(kind) {
        return Err(format!("verify: the block at offset {offset} was written with another checksum"));
    }
    let written_for = u64::from_le_bytes(block[8..16].try_into().expect("eight bytes"));
    if written_for != offset {
        return Err(format!("verify: the block at offset {offset} belongs at offset {written_for}"));
    }
    if word(16) as usize != block.len() {
        return Err(format!(
            "verify: the block at offset {offset} was written with {} bytes, read with {}",
            word(16),
            block.len()
        ));
    }
    let found = sum(kind, &block[HEADER_BYTES..]);
    if found != word(20) {
        return Err(format!(
            "verify: bad checksum at offset {offset}: expected {:08x}, got {found:08x}",
            word(20)
        ));
    }
    Ok(())
}

fn sum(kind: Verify, bytes: &[u8]) -> u32 {
    match kind {
        Verify::Crc32 => crc32fast::hash(bytes),
        Verify::Crc32c => crc32c::crc32c(bytes),
        Verify::XxHash => xxhash_rust::xxh32::xxh32(bytes, 0),
    }
}

fn code(kind: Verify) -> u32 {
    match kind {
        Verify::Crc32 => 1,
        Verify::Crc32c => 2,
        Verify::XxHash => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Verify; 3] = [Verify::Crc32, Verify::Crc32c, Verify::XxHash];

    #[test]
    fn any_flipped_bit_is_found() {
        for kind in KINDS {
            let mut block = vec![0; 512];
            fill_random(&mut block, 1);
            seal(kind, &mut block, 8192);
            assert_eq!(check(kind, &block, 8192), Ok(()));
            for at in 0..block.len() {
                block[at] ^= 1 << (at % 8);
                assert!(check(kind, &block, 8192).is_err(), "{kind:?}: byte {at}");
                block[at] ^= 1 << (at % 8);
            }
        }
    }

    #[test]
    fn misplaced_and_unwritten_blocks_are_named() {
        let mut block = vec![7; 4096];
        seal(Verify::Crc32c, &mut block, 4096);
        assert!(check(Verify::Crc32c, &block, 0).unwrap_err().contains("belongs at offset 4096"));
        assert!(check(Verify::Crc32, &block, 4096).unwrap_err().contains("another checksum"));
        assert!(check(Verify::Crc32c, &[0; 4096], 0).unwrap_err().contains("no header"));
        assert!(
            check(Verify::Crc32c, &block[..2048], 4096).unwrap_err().contains("4096 bytes, read with 2048")
        );
    }

    #[test]
    fn random_fill_does_not_compress() {
        let mut buffer = vec![0; 1 << 16];
        fill_random(&mut buffer, 9);
        let mut counts = [0u32; 256];
        buffer.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
        assert!(counts.iter().all(|&count| (150..370).contains(&count)));
        let mut again = vec![0; 1 << 16];
        fill_random(&mut again, 9);
        assert_eq!(buffer, again);
    }

    #[test]
    fn scrambling_changes_every_page() {
        let mut buffer = vec![0; 3 * 4096];
        scramble(&mut buffer, 5);
        assert!(buffer.chunks(4096).all(|page| page[0] == 5));
    }
}
