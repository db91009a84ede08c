//! Which ranges of an arena are free. Pure bookkeeping: knows no memory.
//!
//! Sizes are not rounded to powers of two: a frame of 5 MiB costs 5 MiB. Free ranges are kept twice, by offset
//! (to join neighbours) and by length (to find the smallest that fits, lowest offset first), so both calls are
//! O(log n) however fragmented the arena is. In front of that stands one stack of free ranges per size in use,
//! since most callers ask for frames of one or two sizes: taking and giving back a frame is then a push or a
//! pop. Stacked ranges are given back and joined when an allocation would otherwise fail.

use std::collections::{BTreeMap, BTreeSet};

/// How many different sizes have a stack.
const STACKS: usize = 4;

struct Stack {
    len: usize,
    offsets: Vec<usize>,
}

/// Free ranges of `[0, capacity)`. All offsets and lengths are multiples of the caller's granule.
pub(super) struct Allocator {
    by_offset: BTreeMap<usize, usize>,
    by_len: BTreeSet<(usize, usize)>,
    stacks: Vec<Stack>,
    /// The next stack to be given another size when all are taken.
    evict: usize,
    free_bytes: usize,
}

impl Allocator {
    pub(super) fn new(capacity: usize) -> Allocator {
        let mut allocator = Allocator {
            by_offset: BTreeMap::new(),
            by_len: BTreeSet::new(),
            stacks: Vec::with_capacity(STACKS),
            evict: 0,
            free_bytes: capacity,
        };
        if capacity > 0 {
            allocator.insert(0, capacity);
        }
        allocator
    }

    pub(super) fn free_bytes(&self) -> usize {
        self.free_bytes
    }

    /// Offset of `len` free bytes, now taken.
    pub(super) fn alloc(&mut self, len: usize) -> Option<usize> {
        debug_assert!(len > 0);
        if let Some(stack) = self.stacks.iter_mut().find(|stack| stack.len == len)
            && let Some(offset) = stack.offsets.pop()
        {
            self.free_bytes -= len;
            return Some(offset);
        }
        if len > self.free_bytes {
            return None;
        }
        let offset = match self.take(len) {
            Some(offset) => offset,
            None => {
                self.join_stacked();
                self.take(len)?
            }
        };
        self.free_bytes -= len;
        Some(offset)
    }

    /// Gives `len` bytes at `offset` back. They must be a range that `alloc` returned.
    pub(super) fn free(&mut self, offset: usize, len: usize) {
        self.free_bytes += len;
        if let Some(stack) = self.stacks.iter_mut().find(|stack| stack.len == len) {
            stack.offsets.push(offset);
            return;
        }
        if self.stacks.len() < STACKS {
            self.stacks.push(Stack { len, offsets: vec![offset] });
            return;
        }
        // Sizes come and go; the stacks are handed round so that an old size cannot keep one for ever.
        let index = self.evict % STACKS;
        self.evict = self.evict.wrapping_add(1);
        let old = std::mem::replace(&mut self.stacks[index], Stack { len, offsets: vec![offset] });
        for offset in old.offsets {
            self.insert(offset, old.len);
        }
    }

    /// Moves every stacked range to the trees, where neighbours join.
    fn join_stacked(&mut self) {
        for stack in std::mem::take(&mut self.stacks) {
            for offset in stack.offsets {
                self.insert(offset, stack.len);
            }
        }
    }

    fn take(&mut self, len: usize) -> Option<usize> {
        let &(found, offset) = self.by_len.range((len, 0)..).next()?;
        self.by_len.remove(&(found, offset));
        self.by_offset.remove(&offset);
        if found > len {
            self.by_offset.insert(offset + len, found - len);
            self.by_len.insert((found - len, offset + len));
        }
        Some(offset)
    }

    fn insert(&mut self, mut offset: usize, mut len: usize) {
        if let Some((&before, &before_len)) = self.by_offset.range(..offset).next_back() {
            debug_assert!(before + before_len <= offset, "range at {offset} freed twice");
            if before + before_len == offset {
                self.by_offset.remove(&before);
                self.by_len.remove(&(before_len, before));
                offset = before;
                len += before_len;
            }
        }
        if let Some(&after_len) = self.by_offset.get(&(offset + len)) {
            self.by_offset.remove(&(offset + len));
            self.by_len.remove(&(after_len, offset + len));
            len += after_len;
        }
        self.by_offset.insert(offset, len);
        self.by_len.insert((len, offset));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_join_so_that_a_larger_range_fits_again() {
        let mut allocator = Allocator::new(12);
        let parts: Vec<usize> = (0..4).map(|_| allocator.alloc(3).unwrap()).collect();
        assert_eq!(allocator.alloc(1), None);
        for offset in parts {
            allocator.free(offset, 3);
        }
        assert_eq!(allocator.alloc(12), Some(0));
    }

    #[test]
    fn sizes_are_not_rounded_to_powers_of_two() {
        let mut allocator = Allocator::new(15);
        assert!((0..3).all(|_| allocator.alloc(5).is_some()));
        assert_eq!(allocator.free_bytes(), 0);
    }

    /// Miri is a thousand times slower, and shows it no files to keep seeds in.
    fn config() -> ProptestConfig {
        if cfg!(miri) {
            ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() }
        } else {
            ProptestConfig::default()
        }
    }

    proptest! {
        #![proptest_config(config())]

        /// Against a model that marks every granule: no overlap, nothing lost, and a refusal only when no
        /// contiguous range is free.
        #[test]
        fn behaves_like_a_map_of_granules(steps in prop::collection::vec((any::<bool>(), 1usize..24, any::<prop::sample::Index>()), 1..300)) {
            const CAPACITY: usize = 96;
            let mut allocator = Allocator::new(CAPACITY);
            let mut taken = [false; CAPACITY];
            let mut live: Vec<(usize, usize)> = Vec::new();
            for (wants, len, which) in steps {
                if wants || live.is_empty() {
                    let longest = taken.split(|&t| t).map(<[bool]>::len).max().unwrap_or(0);
                    match allocator.alloc(len) {
                        Some(offset) => {
                            prop_assert!(offset + len <= CAPACITY);
                            prop_assert!(taken[offset..offset + len].iter().all(|&t| !t), "overlap at {}", offset);
                            taken[offset..offset + len].fill(true);
                            live.push((offset, len));
                        }
                        None => prop_assert!(longest < len, "refused {} though {} are free in a row", len, longest),
                    }
                } else {
                    let (offset, len) = live.swap_remove(which.index(live.len()));
                    taken[offset..offset + len].fill(false);
                    allocator.free(offset, len);
                }
                prop_assert_eq!(allocator.free_bytes(), taken.iter().filter(|&&t| !t).count());
            }
            for (offset, len) in live {
                allocator.free(offset, len);
            }
            prop_assert_eq!(allocator.alloc(CAPACITY), Some(0));
        }

        /// Nearly full and in pieces: whatever order ranges of a few sizes come back in, what is free in a row can be had, at
        /// multiples of the granule, and a full arena gives nothing.
        #[test]
        fn a_full_arena_in_pieces_gives_exactly_what_comes_back(
            sizes in prop::collection::vec(prop::sample::select(vec![1usize, 2, 3, 5, 8, 13]), 1..60),
            order in prop::collection::vec(any::<prop::sample::Index>(), 60),
        ) {
            const GRANULE: usize = 4096;
            let capacity = sizes.iter().sum::<usize>() * GRANULE;
            let mut allocator = Allocator::new(capacity);
            let mut live = Vec::new();
            for size in &sizes {
                let offset = allocator.alloc(size * GRANULE);
                prop_assert!(offset.is_some_and(|offset| offset % GRANULE == 0), "the whole arena can be cut up");
                live.extend(offset.map(|offset| (offset, size * GRANULE)));
            }
            prop_assert_eq!(allocator.free_bytes(), 0);
            prop_assert_eq!(allocator.alloc(GRANULE), None);
            for index in order {
                if live.is_empty() {
                    break;
                }
                let (offset, len) = live.swap_remove(index.index(live.len()));
                allocator.free(offset, len);
                // All of it is free in a row, and nothing else is: it comes back at the same place.
                prop_assert_eq!(allocator.alloc(len), Some(offset));
                prop_assert_eq!(allocator.alloc(GRANULE), None);
                // Cut in two and joined again.
                allocator.free(offset, len);
                if len > GRANULE {
                    let first = allocator.alloc(len - GRANULE);
                    let second = allocator.alloc(GRANULE);
                    prop_assert!(first.is_some() && second.is_some());
                    prop_assert_eq!(allocator.free_bytes(), 0);
                    for (offset, len) in [(first, len - GRANULE), (second, GRANULE)] {
                        allocator.free(offset.unwrap_or_default(), len);
                    }
                }
                prop_assert_eq!(allocator.alloc(len), Some(offset), "neighbours did not join");
            }
        }
    }
}
