//! Devices that do not do what they say: whoever looks after a power cut must notice.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nvme::{SimDecision, SimHook, SimIo, SimRng, Verb};

/// Acknowledges flushes without doing them.
#[derive(Debug)]
pub struct LyingFlushes {
    /// One in so many is a lie.
    pub one_in: u64,
}

impl SimHook for LyingFlushes {
    fn decide(&self, io: &SimIo, rng: &mut SimRng) -> SimDecision {
        match io.verb {
            Verb::Flush if rng.in_range(0..self.one_in) == 0 => SimDecision::Lose,
            _ => SimDecision::Proceed,
        }
    }
}

/// Acknowledges a write to a data area without doing it.
#[derive(Debug)]
pub struct LostWrite {
    /// Writes before it.
    left: AtomicU64,
}

impl LostWrite {
    /// The `nth` one (from 0).
    pub fn new(nth: u64) -> LostWrite {
        LostWrite { left: AtomicU64::new(nth + 1) }
    }
}

impl SimHook for LostWrite {
    fn decide(&self, io: &SimIo, _: &mut SimRng) -> SimDecision {
        // Behind head and catalog zone of member 0, which is the only one in the tests of this.
        let data = io.verb == Verb::Write && io.offset >= 17 << 20 && io.len < 4 << 20;
        if data && self.left.fetch_sub(1, Relaxed) == 1 { SimDecision::Lose } else { SimDecision::Proceed }
    }
}
