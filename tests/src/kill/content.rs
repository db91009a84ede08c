//! Content that says what it is: every 512 bytes name the version they belong to, its length and their offset.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that describe themselves.
pub const BLOCK: usize = 512;
/// Least length of a version: one whole head.
pub const LEN_MIN: u64 = 32;

/// One content that a file has, had or may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Round, client and a counter: never used twice.
    pub id: u64,
    /// Bytes.
    pub len: u64,
}

impl Version {
    /// The id of the `sequence`-th version that `client` makes in `round`.
    pub fn id(round: u64, client: u64, sequence: u64) -> u64 {
        (round + 1) << 32 | client << 24 | sequence
    }

    /// Fills `buf` with the bytes from `offset` on, a multiple of [`BLOCK`].
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        for (at, block) in (offset..).step_by(BLOCK).zip(buf.chunks_mut(BLOCK)) {
            let head = [self.id, self.len, at, check(self.id, self.len, at)];
            let mut state = mix(self.id ^ at.rotate_left(20));
            for (index, word) in block.chunks_mut(8).enumerate() {
                let value = head.get(index).copied().unwrap_or_else(|| {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                    state ^ (state >> 29)
                });
                word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
            }
        }
    }

    /// All its bytes.
    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.fill(0, &mut bytes);
        bytes
    }

    /// Compares bytes from `offset` (a multiple of [`BLOCK`]) on; says which block differs, and what is there.
    pub fn compare(self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let mut expected = [0; BLOCK];
        for (at, block) in (offset..).step_by(BLOCK).zip(bytes.chunks(BLOCK)) {
            let expected = &mut expected[..block.len()];
            self.fill(at, expected);
            if block != expected {
                return Err(format!("block at {at} of {self} is {}", describe(block)));
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "version {:x} of {} bytes", self.id, self.len)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn check(id: u64, len: u64, offset: u64) -> u64 {
    mix(mix(mix(id ^ 0x6e76_7469_6572) ^ len) ^ offset)
}

/// Which version a block says it is of, and at what offset it belongs.
pub fn head(block: &[u8]) -> Option<(Version, u64)> {
    let word = |index: usize| {
        block.get(index * 8..index * 8 + 8).and_then(|raw| raw.try_into().ok()).map(u64::from_le_bytes)
    };
    let (id, len, offset, sum) = (word(0)?, word(1)?, word(2)?, word(3)?);
    (sum == check(id, len, offset)).then_some((Version { id, len }, offset))
}

/// What a block that is not the right one is instead.
pub fn describe(block: &[u8]) -> String {
    match head(block) {
        Some((version, offset)) => {
            let mut whole = vec![0; block.len()];
            version.fill(offset, &mut whole);
            let state = if whole == block { "whole" } else { "damaged after its head" };
            format!("the block at {offset} of {version}, {state}")
        }
        None if block.iter().all(|byte| *byte == 0) => "zeros".into(),
        None => format!("no block of ours: {:02x?}...", &block[..block.len().min(16)]),
    }
}

/// Says which version `bytes` are, all of them.
pub fn identify(bytes: &[u8]) -> Result<Version, String> {
    let first = &bytes[..bytes.len().min(BLOCK)];
    let version = match head(first) {
        Some((version, 0)) => version,
        _ => return Err(format!("{} bytes that begin with {}", bytes.len(), describe(first))),
    };
    if version.len != bytes.len() as u64 {
        return Err(format!("{} bytes that begin as {version}", bytes.len()));
    }
    version.compare(0, bytes)?;
    Ok(version)
}

/// Whether every block is, at its place, a whole block of one of `versions`, and none reaches beyond the longest.
pub fn mixture_of(versions: &[Version], bytes: &[u8]) -> Result<(), String> {
    if bytes.len() as u64 > versions.iter().map(|version| version.len).max().unwrap_or(0) {
        return Err(format!("{} bytes, longer than every version that was written", bytes.len()));
    }
    let is = |version: Version, at: u64, block: &[u8], from: usize, to: usize| {
        let mut expected = [0; BLOCK];
        version.fill(at, &mut expected);
        block[from..to] == expected[from..to]
    };
    for (at, block) in (0..).step_by(BLOCK).zip(bytes.chunks(BLOCK)) {
        // A file cut short ends within a block; and where a version ends within one, a longer one may go on until the file is cut.
        let held = |version: Version| (version.len.saturating_sub(at) as usize).min(block.len());
        let matches = versions.iter().any(|version| {
            let end = held(*version);
            let rest = end == block.len()
                || versions
                    .iter()
                    .any(|other| held(*other) == block.len() && is(*other, at, block, end, block.len()));
            end > 0 && is(*version, at, block, 0, end) && rest
        });
        if !matches {
            return Err(format!("block at {at} is {}", describe(block)));
        }
    }
    Ok(())
}

/// Reads a file with `O_DIRECT` into memory that is aligned for it.
pub fn read_direct(file: &File, len: u64) -> io::Result<Vec<u8>> {
    const ALIGN: usize = 4096;
    let want = (len as usize).next_multiple_of(ALIGN);
    let mut memory = vec![0_u8; want + ALIGN];
    let skip = memory.as_ptr().align_offset(ALIGN);
    let buf = &mut memory[skip..skip + want];
    let mut done = 0;
    while (done as u64) < len {
        match file.read_at(&mut buf[done..], done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buf[..done.min(len as usize)].to_vec())
}

/// SplitMix64: seeded, the same on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that gives the same sequence for the same seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A length from [`LEN_MIN`] to 2^`bits`, short ones as likely as long ones.
    pub fn len(&mut self, bits: u64) -> u64 {
        let high = 1_u64 << (6 + self.below(bits - 5));
        LEN_MIN + self.below(high - LEN_MIN + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_knows_itself_and_what_was_done_to_it() {
        for len in [32, 511, 512, 513, 100_000] {
            let version = Version { id: Version::id(1, 2, 3), len };
            let bytes = version.bytes();
            assert_eq!(identify(&bytes), Ok(version));
            let mut parts = vec![0; bytes.len()];
            version.fill(0, &mut parts[..BLOCK.min(len as usize)]);
            if len > BLOCK as u64 {
                version.fill(BLOCK as u64, &mut parts[BLOCK..]);
            }
            assert_eq!(parts, bytes);
            let mut damaged = bytes.clone();
            *damaged.last_mut().unwrap() ^= 1;
            assert!(identify(&damaged).is_err());
            assert!(identify(&bytes[..bytes.len() - 1]).is_err());
        }
        let (old, new) = (Version { id: 7, len: 4000 }, Version { id: 8, len: 3000 });
        let mut mixed = old.bytes();
        mixed[512..1024].copy_from_slice(&new.bytes()[512..1024]);
        assert!(identify(&mixed).unwrap_err().contains("version 8"));
        mixture_of(&[old, new], &mixed).unwrap();
        mixture_of(&[old, new], &mixed[..700]).unwrap();
        // Written, and not yet cut to its length.
        let short = Version { id: 9, len: 700 };
        let mut uncut = old.bytes();
        uncut[..700].copy_from_slice(&short.bytes());
        mixture_of(&[old, short], &uncut).unwrap();
        mixture_of(&[new, short], &uncut).unwrap_err();
        uncut[701] ^= 1;
        mixture_of(&[old, short], &uncut).unwrap_err();
        mixed[1024..1536].fill(0);
        assert!(mixture_of(&[old, new], &mixed).unwrap_err().contains("zeros"));
    }

    #[test]
    fn direct_reads_give_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let version = Version { id: 5, len: 12_345 };
        std::fs::write(folder.path().join("f"), version.bytes()).unwrap();
        let file = File::open(folder.path().join("f")).unwrap();
        assert_eq!(identify(&read_direct(&file, version.len).unwrap()), Ok(version));
    }
}
