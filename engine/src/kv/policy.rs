//! Which block goes when room is needed: S3-FIFO (Yang et al., SOSP 2023), as in the RAM tier, over numbers of entries.
//!
//! New blocks enter a small queue (a tenth of all) and reach the main queue only when they were asked for since; what leaves the small queue
//! unasked is remembered as a *ghost*, and goes to the main queue at once if it comes back. Queues hold (entry, stay) pairs; a pair whose entry
//! has another stay by now is passed over, so that removal costs nothing.

use std::collections::{HashSet, VecDeque};

/// Times asked for that count.
pub(crate) const FREQUENCY_MAX: u8 = 3;
/// Ghosts at most.
const GHOSTS_MAX: usize = 1 << 20;

/// Which queue an entry is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    Small,
    Main,
}

/// What the policy asks about an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// Of this stay, see the module documentation.
    pub stay: u32,
    pub frequency: u8,
    /// Must stay.
    pub pinned: bool,
    /// Must go.
    pub expired: bool,
    /// What it is known by when it is gone.
    pub hash: u64,
}

/// The entries, as the policy needs them.
pub(crate) trait Entries {
    /// `None`: there is no such entry.
    fn view(&self, entry: u32) -> Option<View>;
    fn set(&mut self, entry: u32, queue: Queue, frequency: u8);
}

/// A bounded set of what was seen lately, oldest out first.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    order: VecDeque<u32>,
    set: HashSet<u32>,
}

impl Seen {
    fn mark(hash: u64) -> u32 {
        (hash ^ (hash >> 32)) as u32
    }

    /// Adds it; forgets the oldest beyond `limit`.
    pub(crate) fn insert(&mut self, hash: u64, limit: usize) {
        let mark = Seen::mark(hash);
        if self.set.insert(mark) {
            self.order.push_back(mark);
        }
        while self.order.len() > limit {
            if let Some(oldest) = self.order.pop_front() {
                self.set.remove(&oldest);
            }
        }
    }

    /// Whether it was seen; it is forgotten if so.
    pub(crate) fn take(&mut self, hash: u64) -> bool {
        // Its place in the order stays until its turn comes: a mark that came twice goes a little early.
        self.set.remove(&Seen::mark(hash))
    }

    pub(crate) fn contains(&self, hash: u64) -> bool {
        self.set.contains(&Seen::mark(hash))
    }
}

/// The queues of one class of slots.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    small: VecDeque<(u32, u32)>,
    main: VecDeque<(u32, u32)>,
    /// Entries that are really in them.
    small_live: usize,
    main_live: usize,
    ghosts: Seen,
}

impl Policy {
    /// A new entry; returns the queue it went to.
    pub(crate) fn insert(&mut self, entry: u32, stay: u32, hash: u64) -> Queue {
        if self.ghosts.take(hash) {
            self.push(entry, stay, Queue::Main);
            Queue::Main
        } else {
            self.push(entry, stay, Queue::Small);
            Queue::Small
        }
    }

    fn push(&mut self, entry: u32, stay: u32, queue: Queue) {
        match queue {
            Queue::Small => {
                self.small.push_back((entry, stay));
                self.small_live += 1;
            }
            Queue::Main => {
                self.main.push_back((entry, stay));
                self.main_live += 1;
            }
        }
    }

    /// As [`insert`](Self::insert), to a queue that is known: what a checkpoint held.
    pub(crate) fn restore(&mut self, entry: u32, stay: u32) {
        self.push(entry, stay, Queue::Main);
    }

    /// An entry was removed by somebody else.
    pub(crate) fn removed(&mut self, queue: Queue, entries: &dyn Entries) {
        match queue {
            Queue::Small => self.small_live = self.small_live.saturating_sub(1),
            Queue::Main => self.main_live = self.main_live.saturating_sub(1),
        }
        // Stale pairs must not pile up.
        for (list, live) in [(&mut self.small, self.small_live), (&mut self.main, self.main_live)] {
            if list.len() > 2 * live + 1024 {
                list.retain(|(entry, stay)| entries.view(*entry).is_some_and(|view| view.stay == *stay));
            }
        }
    }

    /// The entry that should go; it is out of the queues. `None`: all that are left are pinned.
    pub(crate) fn evict(&mut self, entries: &mut dyn Entries) -> Option<u32> {
        // Each round lowers a frequency, moves a pair from small to main, or passes a pinned one: enough rounds see all of them.
        let mut rounds = (self.small.len() + self.main.len()) * (2 + FREQUENCY_MAX as usize) + 8;
        while rounds > 0 && self.small_live + self.main_live > 0 {
            rounds -= 1;
            let target = ((self.small_live + self.main_live) / 10).max(1);
            if self.small_live >= target || self.main_live == 0 {
                let Some((entry, stay)) = self.small.pop_front() else {
                    self.small_live = 0;
                    continue;
                };
                let Some(view) = entries.view(entry).filter(|view| view.stay == stay) else { continue };
                self.small_live = self.small_live.saturating_sub(1);
                if !view.expired && (view.pinned || view.frequency > 0) {
                    self.push(entry, stay, Queue::Main);
                    entries.set(entry, Queue::Main, 0);
                    continue;
                }
                let limit = (self.small_live + self.main_live).clamp(16, GHOSTS_MAX);
                self.ghosts.insert(view.hash, limit);
                return Some(entry);
            }
            let Some((entry, stay)) = self.main.pop_front() else {
                self.main_live = 0;
                continue;
            };
            let Some(view) = entries.view(entry).filter(|view| view.stay == stay) else { continue };
            if !view.expired && (view.pinned || view.frequency > 0) {
                self.main.push_back((entry, stay));
                entries.set(entry, Queue::Main, view.frequency.saturating_sub(1));
                continue;
            }
            self.main_live = self.main_live.saturating_sub(1);
            return Some(entry);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Table(Vec<Option<View>>, Vec<Queue>);

    impl Entries for Table {
        fn view(&self, entry: u32) -> Option<View> {
            self.0.get(entry as usize).copied().flatten()
        }

        fn set(&mut self, entry: u32, queue: Queue, frequency: u8) {
            if let Some(Some(view)) = self.0.get_mut(entry as usize) {
                view.frequency = frequency;
                self.1[entry as usize] = queue;
            }
        }
    }

    fn add(policy: &mut Policy, table: &mut Table, hash: u64) -> u32 {
        let entry = table.0.len() as u32;
        let queue = policy.insert(entry, entry, hash);
        table.1.push(queue);
        table.0.push(Some(View { stay: entry, frequency: 0, pinned: false, expired: false, hash }));
        entry
    }

    fn evict(policy: &mut Policy, table: &mut Table) -> Option<u32> {
        let entry = policy.evict(table)?;
        table.0[entry as usize] = None;
        Some(entry)
    }

    #[test]
    fn a_stream_does_not_wash_out_what_is_asked_for() {
        let (mut policy, mut table) = (Policy::default(), Table::default());
        let hot: Vec<u32> = (0..50).map(|n| add(&mut policy, &mut table, n)).collect();
        for round in 0..1000u64 {
            for entry in &hot {
                if let Some(view) = &mut table.0[*entry as usize] {
                    view.frequency = (view.frequency + 1).min(FREQUENCY_MAX);
                }
            }
            add(&mut policy, &mut table, 1000 + round);
            if round >= 50 {
                evict(&mut policy, &mut table).unwrap();
            }
        }
        let left = hot.iter().filter(|entry| table.0[**entry as usize].is_some()).count();
        assert_eq!(left, hot.len());
    }

    #[test]
    fn what_comes_back_soon_goes_to_the_main_queue() {
        let (mut policy, mut table) = (Policy::default(), Table::default());
        for n in 0..20 {
            add(&mut policy, &mut table, n);
        }
        let gone = evict(&mut policy, &mut table).unwrap();
        assert_eq!(gone, 0);
        let again = add(&mut policy, &mut table, 0);
        assert_eq!(table.1[again as usize], Queue::Main);
        let new = add(&mut policy, &mut table, 999);
        assert_eq!(table.1[new as usize], Queue::Small);
    }

    #[test]
    fn pinned_entries_stay_and_expired_ones_go() {
        let (mut policy, mut table) = (Policy::default(), Table::default());
        for n in 0..30 {
            let entry = add(&mut policy, &mut table, n);
            let view = table.0[entry as usize].as_mut().unwrap();
            view.pinned = n < 10;
            view.expired = n >= 20;
            view.frequency = 3;
        }
        let mut gone = Vec::new();
        while let Some(entry) = evict(&mut policy, &mut table) {
            gone.push(entry);
        }
        assert_eq!(gone.len(), 20);
        assert!((0..10).all(|n| table.view(n).is_some()));
    }
}
