//! Devices that do not do what they say: whoever looks after a power cut must notice.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nvme::{SimDecision, SimHook, SimIo, SimRng, Verb};

/// Acknowledges flushes without doing them.
#[derive(Debug)]
pub struct LyingFlushes {
    one_in: u64,
    /// Flushes before the first lie.
    left: AtomicU64,
}

impl LyingFlushes {
    /// One in so many is a lie.
    pub fn one_in(one_in: u64) -> LyingFlushes {
        LyingFlushes { one_in, left: AtomicU64::new(0) }
    }

    /// All are lies, after so many that are none.
    pub fn after(flushes: u64) -> LyingFlushes {
        LyingFlushes { one_in: 1, left: AtomicU64::new(flushes) }
    }
}

impl SimHook for LyingFlushes {
    fn decide(&self, io: &SimIo, rng: &mut SimRng) -> SimDecision {
        if io.verb != Verb::Flush {
            return SimDecision::Proceed;
        }
        let early = self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok();
        if !early && rng.in_range(0..self.one_in) == 0 { SimDecision::Lose } else { SimDecision::Proceed }
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
