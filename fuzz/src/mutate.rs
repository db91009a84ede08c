//! Mutations for the plain test: far less clever than libFuzzer's, but seeded, so that a failure is met again.

/// SplitMix64, the same on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The same seed gives the same mutations.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, 0 where that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.next().checked_rem(limit as u64).unwrap_or(0) as usize
    }
}

/// Values at which counters, signs and lengths turn.
const EDGES: [u64; 12] =
    [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, i64::MAX as u64, u64::MAX];

/// One of `corpus`, changed a few times; at most `max_len` bytes.
pub fn mutate(rng: &mut Rng, corpus: &[Vec<u8>], max_len: usize) -> Vec<u8> {
    let mut bytes = corpus.get(rng.below(corpus.len())).cloned().unwrap_or_default();
    for _ in 0..1 + rng.below(5) {
        let at = rng.below(bytes.len() + 1);
        match rng.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            1 if at < bytes.len() => bytes[at] = rng.next() as u8,
            2 => bytes.insert(at, rng.next() as u8),
            3 => drop(bytes.drain(at..(at + rng.below(8)).min(bytes.len()))),
            4 => {
                let width = 1 << rng.below(4);
                let edge = EDGES[rng.below(EDGES.len())].to_le_bytes();
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&edge[..end - at]);
            }
            5 => {
                let end = (at + rng.below(32)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                let to = rng.below(bytes.len() + 1);
                bytes.splice(to..to, part);
            }
            _ => {
                // The front of this one, the back of another.
                let other = &corpus[rng.below(corpus.len())];
                bytes.truncate(at);
                bytes.extend(&other[rng.below(other.len() + 1)..]);
            }
        }
    }
    bytes.truncate(max_len);
    bytes
}
