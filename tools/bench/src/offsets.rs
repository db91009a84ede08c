//! Which block comes next: sequential, random without repetition, random, or a prepared list.

/// A small fast generator (SplitMix64, Steele et al. 2014): one multiply-xorshift chain a draw, any seed is good.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator; equal seeds give equal draws.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// 64 random bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `0..bound` (Lemire's multiply-high; the bias of at most bound / 2^64 does not matter here).
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }
}

/// SplitMix64's output function.
#[inline]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A Feistel round: one multiplication, high bits folded down.
#[inline]
fn mix_round(value: u64) -> u64 {
    let product = value.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    product ^ (product >> 32) ^ (product >> 47)
}

/// A pseudo-random permutation of `0..len` in constant memory: a four-round Feistel network on the next even number of
/// bits, walked along its cycle until the value is in range (fewer than four steps on average).
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    /// A permutation of `0..len`.
    pub fn new(len: u64, seed: u64) -> Permutation {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        let mut rng = Rng::new(seed);
        Permutation { len, half_bits: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| rng.next_u64()) }
    }

    /// Where `index` (below `len`) goes.
    #[inline]
    pub fn get(&self, index: u64) -> u64 {
        debug_assert!(index < self.len);
        let mask = (1u64 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix_round(right ^ key) & mask));
            }
            value = left << self.half_bits | right;
            if value < self.len {
                return value;
            }
        }
    }
}

/// One request of a prepared list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// Yields block numbers of one direction.
#[derive(Clone, Debug)]
pub enum Order {
    /// 0, 1, 2, ...
    Sequential,
    /// Every block once, then every block once in another order.
    Shuffled {
        /// The present order.
        permutation: Permutation,
        /// Seed of the first order; later ones derive from it.
        seed: u64,
        /// Orders used up.
        round: u64,
    },
    /// Any block at any time.
    Random(Rng),
}

impl Order {
    /// The order that `random` and `norandommap` ask for over `blocks` blocks.
    pub fn new(random: bool, norandommap: bool, blocks: u64, seed: u64) -> Order {
        match (random, norandommap) {
            (false, _) => Order::Sequential,
            (true, false) => Order::Shuffled { permutation: Permutation::new(blocks, seed), seed, round: 0 },
            (true, true) => Order::Random(Rng::new(seed)),
        }
    }

    /// The block of the `index`th operation over `blocks` blocks.
    #[inline]
    pub fn block(&mut self, index: u64, blocks: u64) -> u64 {
        match self {
            Order::Sequential => index % blocks,
            Order::Shuffled { permutation, seed, round } => {
                if index / blocks != *round {
                    *round = index / blocks;
                    *permutation = Permutation::new(blocks, mix(seed.wrapping_add(*round)));
                }
                permutation.get(index % blocks)
            }
            Order::Random(rng) => rng.below(blocks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_hits_everything_once() {
        for len in [1, 2, 3, 7, 64, 1000, 4097] {
            let permutation = Permutation::new(len, 42 + len);
            let mut seen = vec![false; len as usize];
            for index in 0..len {
                let at = permutation.get(index) as usize;
                assert!(!std::mem::replace(&mut seen[at], true), "len {len}: {at} twice");
            }
        }
    }

    #[test]
    fn a_permutation_is_not_the_identity_nor_a_stride() {
        let permutation = Permutation::new(4096, 7);
        let steps: std::collections::HashSet<u64> =
            (1..4096).map(|i| permutation.get(i).wrapping_sub(permutation.get(i - 1))).collect();
        assert!(steps.len() > 2000, "only {} different steps", steps.len());
    }

    #[test]
    fn shuffled_rounds_differ_and_repeat_with_the_seed() {
        let round = |seed, from: u64| {
            let mut order = Order::new(true, false, 100, seed);
            (from..from + 100).map(|index| order.block(index, 100)).collect::<Vec<_>>()
        };
        assert_eq!(round(1, 0), round(1, 0));
        assert_ne!(round(1, 0), round(2, 0));
        assert_ne!(round(1, 0), round(1, 100));
        let mut second = round(1, 100);
        second.sort_unstable();
        assert_eq!(second, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn random_draws_spread_over_the_range() {
        let mut rng = Rng::new(3);
        let mut counts = [0u32; 8];
        for _ in 0..8000 {
            counts[rng.below(8) as usize] += 1;
        }
        assert!(counts.iter().all(|&count| (800..1200).contains(&count)), "{counts:?}");
    }
}
