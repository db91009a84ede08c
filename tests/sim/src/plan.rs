//! What a seed stands for.

use std::fmt;

use nvme::SimRng;

use crate::act::{Act, Memory, SLOTS, Taste, draw};
use crate::config::Config;

/// Acts, then a power cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// In order.
    pub acts: Vec<Act>,
    /// The cut comes after this many writes and flushes, or after the last act.
    pub cut: u64,
    /// Which writes survive it.
    pub survivors: u64,
    /// Cuts while the pool is opened again: after how many writes and flushes, and what survives.
    pub recovery: Vec<(u64, u64)>,
}

/// A whole workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The pool.
    pub config: Config,
    /// One after the other on what the one before left.
    pub rounds: Vec<Round>,
}

impl Plan {
    /// The workload of a seed.
    pub fn of_seed(seed: u64) -> Plan {
        let mut rng = SimRng::new(seed ^ 0x6e76_7469_6572);
        let config = Config::draw(&mut rng);
        let most = [40 << 10, 200 << 10, config.data as usize * 3 / 4][rng.in_range(0..3) as usize];
        let slots = rng.in_range(0..SLOTS as u64 + 1) as usize;
        // Drawn apart, so that what the other seeds stand for stays.
        let kv = SimRng::new(seed ^ 0x6b76).in_range(0..3) == 0;
        let keep = SimRng::new(seed ^ 0x6765_6e73).in_range(0..3) == 0;
        let taste = Taste { chunk: config.chunk as usize, most, slots, kv, keep };
        let mut memory = Memory::default();
        let rounds = (0..rng.in_range(2..6)).map(|_| {
            let acts: Vec<Act> =
                (0..rng.in_range(2..25)).map(|_| draw(&mut rng, &taste, &mut memory)).collect();
            memory.crashed();
            let cut = rng.in_range(0..acts.len() as u64 * 6);
            let recovery = match rng.in_range(0..4) {
                0 => (0..rng.in_range(1..4)).map(|_| (rng.in_range(0..12), rng.next_u64())).collect(),
                _ => Vec::new(),
            };
            Round { acts, cut, survivors: rng.next_u64(), recovery }
        });
        let rounds = rounds.collect();
        Plan { config, rounds }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config { members, lba, chunk, stripe, data, ram } = self.config;
        writeln!(
            f,
            "pool: {members} members of {data} bytes, blocks of {lba}, chunks of {chunk}, stripe unit {stripe}, RAM tier {ram}"
        )?;
        for (index, round) in self.rounds.iter().enumerate() {
            writeln!(f, "round {index}:")?;
            for act in &round.acts {
                writeln!(f, "  {act}")?;
            }
            writeln!(
                f,
                "  power cut after {} writes and flushes, survivors {:#x}",
                round.cut, round.survivors
            )?;
            for (cut, survivors) in &round.recovery {
                writeln!(f, "  power cut after {cut} more while opening, survivors {survivors:#x}")?;
            }
        }
        Ok(())
    }
}
