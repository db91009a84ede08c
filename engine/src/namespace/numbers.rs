//! A hash for node numbers: one multiplication, with a seed of the process, since the numbers of a foreign catalog may have been chosen.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

/// Makes [`NumberHasher`]s, all alike in this process.
#[derive(Clone, Debug)]
pub(crate) struct Numbers {
    seed: u64,
    factor: u64,
}

impl Default for Numbers {
    fn default() -> Numbers {
        static SEEDS: OnceLock<(u64, u64)> = OnceLock::new();
        let (seed, factor) = *SEEDS.get_or_init(|| {
            let random = RandomState::new();
            (random.hash_one(0u8), random.hash_one(1u8) | 1)
        });
        Numbers { seed, factor }
    }
}

impl BuildHasher for Numbers {
    type Hasher = NumberHasher;

    fn build_hasher(&self) -> NumberHasher {
        NumberHasher { state: self.seed, factor: self.factor }
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct NumberHasher {
    state: u64,
    factor: u64,
}

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.state
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.state ^ number) * u128::from(self.factor);
        self.state = product as u64 ^ (product >> 64) as u64;
    }
}
