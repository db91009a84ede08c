//! When the next transfer may start: `rate`, `rate_iops`, `fsync` and `fdatasync`.

use crate::io::Transfer;
use crate::settings::{Direction, Settings};

/// A stall is caught up with for at most this long, so that it does not become a burst.
const CATCH_UP_NS: u64 = 100_000_000;

/// Which kind of flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// fsync.
    All,
    /// fdatasync.
    Data,
}

/// Times and counts that hold transfers back.
#[derive(Clone, Debug)]
pub struct Pace {
    rate: [Option<u64>; 2],
    rate_iops: [Option<u64>; 2],
    due_ns: [u64; 2],
    sync_every: [u64; 2],
    unsynced: [u64; 2],
}

impl Pace {
    /// The pace `settings` ask for.
    pub fn new(settings: &Settings) -> Pace {
        Pace {
            rate: settings.rate,
            rate_iops: settings.rate_iops,
            due_ns: [0; 2],
            sync_every: [settings.fsync, settings.fdatasync],
            unsynced: [0; 2],
        }
    }

    /// Begins at `now_ns`: nothing is owed.
    pub fn begin(&mut self, now_ns: u64) {
        self.due_ns = [now_ns; 2];
    }

    /// When this transfer may start; not after `now_ns` when it may start now.
    #[inline]
    pub fn due(&self, transfer: &Transfer, now_ns: u64) -> u64 {
        let d = transfer.direction as usize;
        if self.rate[d].is_none() && self.rate_iops[d].is_none() { now_ns } else { self.due_ns[d] }
    }

    /// Books a transfer that starts at `now_ns`.
    #[inline]
    pub fn charge(&mut self, transfer: &Transfer, now_ns: u64) {
        let d = transfer.direction as usize;
        let cost = |amount: u64, rate: Option<u64>| {
            rate.map_or(0, |rate| (u128::from(amount) * 1_000_000_000 / u128::from(rate.max(1))) as u64)
        };
        let spent = cost(u64::from(transfer.len), self.rate[d]).max(cost(1, self.rate_iops[d]));
        if spent > 0 {
            self.due_ns[d] = self.due_ns[d].max(now_ns.saturating_sub(CATCH_UP_NS)) + spent;
        }
        if transfer.direction == Direction::Write {
            self.unsynced[0] += 1;
            self.unsynced[1] += 1;
        }
    }

    /// The flush that must come before anything else starts.
    #[inline]
    pub fn flush_due(&self) -> Option<Flush> {
        let due = |index: usize| self.sync_every[index] > 0 && self.unsynced[index] >= self.sync_every[index];
        if due(0) {
            Some(Flush::All)
        } else if due(1) {
            Some(Flush::Data)
        } else {
            None
        }
    }

    /// Books a flush; an fsync serves as fdatasync too.
    pub fn flushed(&mut self, flush: Flush) {
        self.unsynced[1] = 0;
        if flush == Flush::All {
            self.unsynced[0] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    fn pace(options: &[(&str, &str)]) -> Pace {
        let mut settings = Settings::default();
        options.iter().for_each(|(name, value)| options::apply(&mut settings, name, Some(value)).unwrap());
        let mut pace = Pace::new(&settings);
        pace.begin(1_000_000_000);
        pace
    }

    fn transfer(direction: Direction) -> Transfer {
        Transfer { direction, file: 0, offset: 0, len: 1 << 20 }
    }

    #[test]
    fn rates_space_transfers_per_direction() {
        let mut pace = pace(&[("rate", "10m,"), ("rate_iops", ",4")]);
        let (read, write) = (transfer(Direction::Read), transfer(Direction::Write));
        let now = 1_000_000_000;
        assert_eq!(pace.due(&read, now), now);
        pace.charge(&read, now);
        assert_eq!(pace.due(&read, now), now + 100_000_000);
        pace.charge(&write, now);
        assert_eq!(pace.due(&write, now), now + 250_000_000);
        // Ten seconds of stall are not made up for.
        let later = now + 10_000_000_000;
        pace.charge(&read, later);
        assert_eq!(pace.due(&read, later), later - CATCH_UP_NS + 100_000_000);
    }

    #[test]
    fn flushes_come_every_so_many_writes() {
        let mut pace = pace(&[("fsync", "3"), ("fdatasync", "2")]);
        let write = transfer(Direction::Write);
        pace.charge(&transfer(Direction::Read), 0);
        pace.charge(&write, 0);
        assert_eq!(pace.flush_due(), None);
        pace.charge(&write, 0);
        assert_eq!(pace.flush_due(), Some(Flush::Data));
        pace.flushed(Flush::Data);
        pace.charge(&write, 0);
        assert_eq!(pace.flush_due(), Some(Flush::All));
        pace.flushed(Flush::All);
        assert_eq!(pace.flush_due(), None);
    }
}
