//! Chunk allocator of a raw member: which chunks of its data area are taken.
//!
//! One bit a chunk in 64-bit words, and over every [`GROUP_CHUNKS`] chunks a count of the free ones, so that
//! full stretches are skipped without looking at their words. A search starts where the last one ended
//! (next fit), which keeps a stream of writes in one sweep over the drive, and prefers one contiguous run.
//!
//! Space that the last durable catalog names must not be released before a newer catalog is durable, else a crash
//! would bring back a catalog whose extents hold somebody else's bytes. The pool keeps such extents until then; here
//! they stay taken.
//!
//! The bitmap is not stored. [`ChunkAllocator::take`] rebuilds it at open from the layouts, which are the only
//! truth; two layouts that claim the same chunk are found by that.

use crate::error::{Error, ErrorKind, Result};

/// Chunks over which one free count is kept.
pub const GROUP_CHUNKS: u64 = 4096;
const WORDS_PER_GROUP: usize = (GROUP_CHUNKS / 64) as usize;

/// A run of chunks: `count` of them from `start` (both in chunks of the data area).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// First chunk.
    pub start: u64,
    /// Number of chunks, never 0.
    pub count: u64,
}

impl Run {
    /// One past the last chunk.
    pub fn end(&self) -> u64 {
        self.start + self.count
    }
}

/// Bitmap of taken chunks with free counts; see the module documentation.
#[derive(Debug)]
pub struct ChunkAllocator {
    /// Bit set: taken. Bits past `chunks` in the last word are set for good.
    taken: Vec<u64>,
    /// Free chunks of each group.
    group_free: Vec<u32>,
    chunks: u64,
    free: u64,
    hint: u64,
}

impl ChunkAllocator {
    /// An allocator over `chunks` chunks, all of them free.
    pub fn new(chunks: u64) -> ChunkAllocator {
        let groups = chunks.div_ceil(GROUP_CHUNKS) as usize;
        let words = groups * WORDS_PER_GROUP;
        let mut taken = vec![0u64; words];
        let mut group_free = vec![GROUP_CHUNKS as u32; groups];
        // What lies past the end is taken for good, so that no search needs a special last word.
        for chunk in chunks..(groups as u64 * GROUP_CHUNKS) {
            taken[(chunk / 64) as usize] |= 1 << (chunk % 64);
        }
        if let Some(last) = group_free.last_mut() {
            *last = (chunks - (groups as u64 - 1) * GROUP_CHUNKS) as u32;
        }
        ChunkAllocator { taken, group_free, chunks, free: chunks, hint: 0 }
    }

    /// Chunks in all.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Chunks that [`alloc`](Self::alloc) can still give.
    pub fn free(&self) -> u64 {
        self.free
    }

    /// Takes `count` chunks in at most `max_pieces` runs: one run where there is one, else the longest runs.
    /// Takes all or nothing. `NoSpace` says whether space or only contiguity lacks.
    pub fn alloc(&mut self, count: u64, max_pieces: usize) -> Result<Vec<Run>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        if count > self.free {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("{count} chunks asked for, {} of {} are free", self.free, self.chunks),
            ));
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut left = count;
        while left > 0 {
            let found = if runs.len() < max_pieces { self.find_run(left) } else { None };
            let Some(run) = found else {
                for run in &runs {
                    self.clear(*run);
                }
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!(
                        "{count} chunks asked for in at most {max_pieces} pieces; {} are free but scattered",
                        self.free
                    ),
                ));
            };
            self.set(run);
            left -= run.count;
            runs.push(run);
        }
        if let Some(last) = runs.last() {
            self.hint = if last.end() >= self.chunks { 0 } else { last.end() };
        }
        runs.sort_unstable();
        Ok(runs)
    }

    /// Takes one contiguous run of up to `count` chunks: the whole of it where possible, else the longest there is.
    /// `None` when nothing is free.
    pub fn alloc_up_to(&mut self, count: u64) -> Option<Run> {
        if count == 0 || self.free == 0 {
            return None;
        }
        let run = self.find_run(count)?;
        self.set(run);
        self.hint = if run.end() >= self.chunks { 0 } else { run.end() };
        Some(run)
    }

    /// Tries to take exactly the chunks from `start`, up to `count`, as far as they are free: lets an extent grow in place.
    pub fn extend(&mut self, start: u64, count: u64) -> u64 {
        let end = self.chunks.min(start.saturating_add(count));
        let mut at = start;
        while at < end && !self.is_taken(at) {
            at += 1;
        }
        if at > start {
            self.set(Run { start, count: at - start });
            if self.hint >= start && self.hint < at {
                self.hint = if at >= self.chunks { 0 } else { at };
            }
        }
        at.saturating_sub(start)
    }

    /// Takes a run that a layout names, when the pool is opened. `Corrupt` when it lies outside or is taken already.
    pub fn take(&mut self, run: Run) -> Result<()> {
        self.check_bounds(run)?;
        if let Some(chunk) = (run.start..run.end()).find(|chunk| self.is_taken(*chunk)) {
            return Err(Error::new(ErrorKind::Corrupt, format!("chunk {chunk} belongs to two extents")));
        }
        self.set(run);
        Ok(())
    }

    /// Gives back a run. Freeing what is free is refused and changes nothing.
    pub fn release(&mut self, run: Run) -> Result<()> {
        self.check_taken(run)?;
        self.clear(run);
        Ok(())
    }

    /// Whether the chunk is taken.
    pub fn is_taken(&self, chunk: u64) -> bool {
        self.taken[(chunk / 64) as usize] >> (chunk % 64) & 1 == 1
    }

    fn check_bounds(&self, run: Run) -> Result<()> {
        let end = run.start.checked_add(run.count);
        if run.count == 0 || end.is_none_or(|end| end > self.chunks) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "extent of {} chunks at chunk {} lies outside the {} chunks of the data area",
                    run.count, run.start, self.chunks
                ),
            ));
        }
        Ok(())
    }

    fn check_taken(&self, run: Run) -> Result<()> {
        self.check_bounds(run)?;
        match (run.start..run.end()).find(|chunk| !self.is_taken(*chunk)) {
            Some(chunk) => Err(Error::new(ErrorKind::Corrupt, format!("chunk {chunk} is freed twice"))),
            None => Ok(()),
        }
    }

    fn set(&mut self, run: Run) {
        self.for_words(run, |words, groups, word, mask| {
            words[word] |= mask;
            groups[word / WORDS_PER_GROUP] -= mask.count_ones();
        });
        self.free -= run.count;
    }

    fn clear(&mut self, run: Run) {
        self.for_words(run, |words, groups, word, mask| {
            words[word] &= !mask;
            groups[word / WORDS_PER_GROUP] += mask.count_ones();
        });
        self.free += run.count;
    }

    fn for_words(&mut self, run: Run, mut f: impl FnMut(&mut [u64], &mut [u32], usize, u64)) {
        let mut at = run.start;
        while at < run.end() {
            let bit = at % 64;
            let n = (64 - bit).min(run.end() - at);
            let mask = if n == 64 { u64::MAX } else { ((1u64 << n) - 1) << bit };
            f(&mut self.taken, &mut self.group_free, (at / 64) as usize, mask);
            at += n;
        }
    }

    /// The first free run of `want` chunks at or after the hint (cut to `want`), else the longest free run.
    fn find_run(&self, want: u64) -> Option<Run> {
        let mut best: Option<Run> = None;
        // From the hint to the end, then from the start to where a run that straddles the hint may end.
        let wrap_end = self.chunks.min(self.hint.saturating_add(want));
        for (from, to) in [(self.hint, self.chunks), (0, wrap_end)] {
            let mut at = from;
            while let Some(run) = self.next_free(at, to, want) {
                if run.count >= want {
                    return Some(Run { start: run.start, count: want });
                }
                if best.is_none_or(|best| run.count > best.count) {
                    best = Some(run);
                }
                at = run.end();
            }
        }
        best
    }

    /// The first free run in `from..to`, measured up to `enough` chunks.
    fn next_free(&self, from: u64, to: u64, enough: u64) -> Option<Run> {
        let mut at = from;
        // Find the start.
        loop {
            if at >= to {
                return None;
            }
            if at.is_multiple_of(GROUP_CHUNKS) && self.group_free[(at / GROUP_CHUNKS) as usize] == 0 {
                at += GROUP_CHUNKS;
                continue;
            }
            let free = !self.taken[(at / 64) as usize] >> (at % 64);
            if free != 0 {
                at += free.trailing_zeros() as u64;
                break;
            }
            at = (at / 64 + 1) * 64;
        }
        if at >= to {
            return None;
        }
        // Find the end.
        let start = at;
        let limit = to.min(start.saturating_add(enough));
        while at < limit {
            if at.is_multiple_of(GROUP_CHUNKS)
                && self.group_free[(at / GROUP_CHUNKS) as usize] as u64 == GROUP_CHUNKS
            {
                at += GROUP_CHUNKS;
                continue;
            }
            let taken = self.taken[(at / 64) as usize] >> (at % 64);
            if taken != 0 {
                at += taken.trailing_zeros() as u64;
                break;
            }
            at = (at / 64 + 1) * 64;
        }
        Some(Run { start, count: at.min(limit) - start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prefers_one_run_and_moves_on() {
        let mut a = ChunkAllocator::new(10_000);
        assert_eq!(a.alloc(64, 1).unwrap(), [Run { start: 0, count: 64 }]);
        assert_eq!(a.alloc(64, 1).unwrap(), [Run { start: 64, count: 64 }]);
        a.release(Run { start: 0, count: 64 }).unwrap();
        assert_eq!(
            a.alloc(9_000, 1).unwrap(),
            [Run { start: 128, count: 9_000 }],
            "next fit passes the hole it left"
        );
        assert_eq!(a.free(), 10_000 - 64 - 9_000);
    }

    #[test]
    fn takes_scattered_chunks_when_pieces_allow() {
        let mut a = ChunkAllocator::new(100);
        a.alloc(100, 1).unwrap();
        for chunk in (0..100).step_by(2) {
            a.release(Run { start: chunk, count: 1 }).unwrap();
        }
        assert_eq!(a.alloc(2, 1).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(a.free(), 50, "a refused allocation takes nothing");
        assert_eq!(a.alloc(50, 50).unwrap().len(), 50);
        assert_eq!(a.free(), 0);
        assert!(a.alloc_up_to(1).is_none());
    }

    #[test]
    fn freeing_twice_is_refused_and_changes_nothing() {
        let mut a = ChunkAllocator::new(10);
        let run = a.alloc(10, 1).unwrap()[0];
        a.release(Run { start: 2, count: 3 }).unwrap();
        assert_eq!(a.release(run).unwrap_err().kind(), ErrorKind::Corrupt, "a part of it is free");
        assert_eq!(a.free(), 3);
        assert_eq!(
            a.release(Run { start: 8, count: 3 }).unwrap_err().kind(),
            ErrorKind::Corrupt,
            "past the end"
        );
    }

    #[test]
    fn open_finds_overlapping_and_outlying_extents() {
        let mut a = ChunkAllocator::new(100);
        a.take(Run { start: 10, count: 10 }).unwrap();
        assert_eq!(a.take(Run { start: 19, count: 2 }).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(a.take(Run { start: 99, count: 2 }).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(a.take(Run { start: u64::MAX, count: 2 }).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(a.take(Run { start: 5, count: 0 }).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(a.free(), 90);
    }

    #[test]
    fn grows_in_place_up_to_the_next_taken_chunk() {
        let mut a = ChunkAllocator::new(100);
        a.take(Run { start: 0, count: 10 }).unwrap();
        a.take(Run { start: 30, count: 1 }).unwrap();
        assert_eq!(a.extend(10, 5), 5);
        assert_eq!(a.extend(15, 50), 15);
        assert_eq!(a.extend(30, 1), 0);
        assert_eq!(a.extend(98, 10), 2);
        assert_eq!(a.extend(100, 10), 0);
    }

    #[test]
    fn empty_area_has_nothing() {
        let mut a = ChunkAllocator::new(0);
        assert_eq!(a.free(), 0);
        assert_eq!(a.alloc(1, 1).unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(a.alloc_up_to(1).is_none());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Alloc(u64, usize),
        UpTo(u64),
        Extend(u64, u64),
        Release(usize),
        /// Of chunks that may be free, taken or both: refused unless all are taken.
        ReleaseAny(u64, u64),
        /// As when a pool is opened: refused unless all are free.
        Take(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            2 => (1u64..600, 1usize..8).prop_map(|(n, p)| Step::Alloc(n, p)),
            2 => (1u64..5000).prop_map(Step::UpTo),
            2 => (0u64..9000, 1u64..100).prop_map(|(s, n)| Step::Extend(s, n)),
            2 => any::<usize>().prop_map(Step::Release),
            1 => (0u64..9100, 0u64..100).prop_map(|(s, n)| Step::ReleaseAny(s, n)),
            1 => (0u64..9100, 0u64..100).prop_map(|(s, n)| Step::Take(s, n)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Against a plain vector of states: never two owners, exact counts, all or nothing, longest run found.
        #[test]
        fn agrees_with_a_vector(chunks in 1u64..9000, steps in prop::collection::vec(step(), 1..120)) {
            let mut a = ChunkAllocator::new(chunks);
            let mut model = vec![0u8; chunks as usize];
            let mut owned: Vec<Run> = Vec::new();
            let longest = |model: &[u8]| model.split(|s| *s != 0).map(<[u8]>::len).max().unwrap_or(0) as u64;
            for step in steps {
                match step {
                    Step::Alloc(n, pieces) => match a.alloc(n, pieces) {
                        Ok(runs) => {
                            prop_assert!(runs.len() <= pieces);
                            prop_assert_eq!(runs.iter().map(|r| r.count).sum::<u64>(), n);
                            for r in &runs {
                                for c in r.start..r.end() {
                                    prop_assert_eq!(model[c as usize], 0);
                                    model[c as usize] = 1;
                                }
                            }
                            owned.extend(runs);
                        }
                        Err(e) => {
                            prop_assert_eq!(e.kind(), ErrorKind::NoSpace);
                            prop_assert!(longest(&model) < n, "a run of {} was there", n);
                        }
                    },
                    Step::UpTo(n) => match a.alloc_up_to(n) {
                        Some(r) => {
                            prop_assert_eq!(r.count, n.min(longest(&model)));
                            for c in r.start..r.end() {
                                prop_assert_eq!(model[c as usize], 0);
                                model[c as usize] = 1;
                            }
                            owned.push(r);
                        }
                        None => prop_assert_eq!(longest(&model), 0),
                    },
                    Step::Extend(start, n) => {
                        let got = a.extend(start, n);
                        for c in start..start + got {
                            prop_assert_eq!(model[c as usize], 0);
                            model[c as usize] = 1;
                        }
                        if got > 0 {
                            owned.push(Run { start, count: got });
                        }
                        if got < n && start + got < chunks {
                            prop_assert!(model[(start + got) as usize] != 0);
                        }
                    }
                    Step::Release(i) if !owned.is_empty() => {
                        let r = owned.swap_remove(i % owned.len());
                        a.release(r).unwrap();
                        model[r.start as usize..r.end() as usize].fill(0);
                    }
                    Step::Release(_) => {}
                    Step::ReleaseAny(start, count) => {
                        let inside = count > 0 && start + count <= chunks;
                        if inside && model[start as usize..(start + count) as usize].iter().all(|s| *s == 1) {
                            // Somebody's: not given back under the owner here, else the steps above would free it twice.
                            prop_assert!((start..start + count).all(|c| a.is_taken(c)));
                        } else {
                            let error = a.release(Run { start, count }).unwrap_err();
                            prop_assert_eq!(error.kind(), ErrorKind::Corrupt, "freed what was free");
                        }
                    }
                    Step::Take(start, count) => {
                        let inside = count > 0 && start + count <= chunks;
                        let free = inside && model[start as usize..(start + count) as usize].iter().all(|s| *s == 0);
                        match a.take(Run { start, count }) {
                            Ok(()) => {
                                prop_assert!(free, "took what has an owner");
                                model[start as usize..(start + count) as usize].fill(1);
                                owned.push(Run { start, count });
                            }
                            Err(error) => {
                                prop_assert!(!free);
                                prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
                            }
                        }
                    }
                }
                prop_assert_eq!(a.free(), model.iter().filter(|s| **s == 0).count() as u64);
            }
            // Chunk by chunk, and then everything back: the whole area is one run again.
            prop_assert!((0..chunks).all(|c| a.is_taken(c) == (model[c as usize] == 1)));
            for run in owned {
                a.release(run).unwrap();
            }
            prop_assert_eq!(a.alloc(chunks, 1).unwrap(), [Run { start: 0, count: chunks }]);
        }
    }
}
