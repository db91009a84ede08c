//! Room for blocks: slabs that are made while the budget allows it, blocks that go when it does not.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::state::Batch;
use super::{Shared, log, record, slab_name};
use crate::error::{ErrorKind, Result};
use crate::pool::lock;
use crate::types::NodeKind;

/// Blocks that go at once where room is needed: each such time costs a commit.
const EVICT_MIN: usize = 1;
const EVICT_MAX: usize = 256;
/// Times that a put looks for room before it is refused.
const TRIES: usize = 8;
/// After the pool had no space for a slab, so many other puts go by before it is asked again.
const PATIENCE: u32 = 64;

/// What whoever makes slabs knows.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    /// Puts to go by before the pool is asked for space again.
    wait: u32,
}

impl Shared {
    /// Sees to it that slots of this size can be had, about `want` of them. `false`: there are none.
    pub(super) fn make_room(&self, slot_bytes: u64, want: usize) -> Result<bool> {
        for _ in 0..TRIES {
            if self.free_slots(slot_bytes) > 0 {
                return Ok(true);
            }
            if self.grow(slot_bytes)? {
                continue;
            }
            let waiting = {
                let mut state = self.state();
                state.table.now = self.options.clock.now();
                let (slots, limbo) = state.classes.get(&slot_bytes).map_or((0, 0), |class| {
                    let slots = class
                        .slabs
                        .iter()
                        .filter_map(|number| state.slabs.get(number))
                        .map(|slab| slab.slots());
                    (slots.sum::<usize>(), class.limbo)
                });
                let count = want.max(slots / 64).clamp(EVICT_MIN, EVICT_MAX);
                let evicted = match self.options.lasting {
                    true => 0,
                    false => state.evict(slot_bytes, count.saturating_sub(limbo)),
                };
                evicted + limbo
            };
            if waiting > 0 {
                self.commit()?;
            } else if self.options.lasting || !self.take_from_others(slot_bytes)? {
                return Ok(self.free_slots(slot_bytes) > 0);
            }
        }
        Ok(self.free_slots(slot_bytes) > 0)
    }

    fn free_slots(&self, slot_bytes: u64) -> usize {
        self.state().classes.get(&slot_bytes).map_or(0, |class| class.free)
    }

    fn allocated(&self) -> u64 {
        self.log_bytes.load(Relaxed) + self.state().slabs.values().map(|slab| slab.slab.len()).sum::<u64>()
    }

    /// Makes a slab, where budget and pool have room for one. `false`: they do not.
    fn grow(&self, slot_bytes: u64) -> Result<bool> {
        let mut growth = lock(&self.grow);
        if self.free_slots(slot_bytes) > 0 {
            return Ok(true); // somebody else did
        }
        let chunk = u64::from(self.pool.inner.shared.chunk_size);
        // Whole slots in whole chunks.
        let unit = slot_bytes.next_multiple_of(chunk);
        let room = |log: u64| {
            let slabs = self.allocated() - self.log_bytes.load(Relaxed);
            let left = self.budget.saturating_sub(slabs + log.max(self.log_bytes.load(Relaxed)));
            self.slab_bytes.max(unit).min(left) / unit * unit
        };
        // The index must have room for what the slab will hold, also when the pool is full by then.
        let most = room(0) / slot_bytes;
        if most == 0 {
            return Ok(false);
        }
        let pages = {
            let state = self.state();
            state.pages_for(state.slots() + most)
        };
        let log_bytes = 2 * lock(&self.log).size_for(pages) * record::PAGE as u64;
        let len = room(log_bytes);
        if len < slot_bytes {
            return Ok(false);
        }
        if growth.wait > 0 {
            growth.wait -= 1;
            return Ok(false);
        }
        match self.grow_log(pages) {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                growth.wait = PATIENCE;
                return Ok(false);
            }
            other => other?,
        }
        let number = self.state().next_slab;
        let name = slab_name(number, slot_bytes);
        let name = OsStr::new(&name);
        let made = self.pool.make_slab(self.dir, name, len, number as usize, &log::private(NodeKind::Region));
        let node = match made {
            Ok(node) => node,
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                growth.wait = PATIENCE;
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        // Before anything points into it.
        self.pool.sync()?;
        let slab = Arc::new(self.pool.open_slab(node)?);
        self.state().add_slab(number, slot_bytes, slab, true);
        Ok(true)
    }

    /// Sees to it that both logs have room for checkpoints of so many pages.
    fn grow_log(&self, pages: u64) -> Result<()> {
        let mut log = lock(&self.log);
        if log.fits(pages) {
            return Ok(());
        }
        let done = (|| {
            log.prepare(&self.pool, self.dir, pages)?;
            self.commit_to(&mut log, true)?;
            log.prepare(&self.pool, self.dir, pages)
        })();
        self.log_bytes.store(log.allocated(), Relaxed);
        done
    }

    /// Takes a slab away from blocks of another size, where these have less than their share.
    fn take_from_others(&self, slot_bytes: u64) -> Result<bool> {
        {
            let state = self.state();
            let bytes_of = |bytes: &u64| -> u64 {
                let slabs = state.classes.get(bytes).into_iter().flat_map(|class| &class.slabs);
                slabs.filter_map(|number| state.slabs.get(number)).map(|slab| slab.slab.len()).sum()
            };
            let classes = state.classes.len() as u64 + u64::from(!state.classes.contains_key(&slot_bytes));
            let all: u64 = state.classes.keys().map(bytes_of).sum();
            if bytes_of(&slot_bytes) * classes >= all {
                return Ok(false);
            }
        }
        let growth = lock(&self.grow);
        let taken = self.state().take_slab(slot_bytes);
        let Some((number, bytes)) = taken else { return Ok(false) };
        drop(growth);
        self.commit()?;
        self.remove_slab_region(number, bytes)?;
        lock(&self.grow).wait = 0;
        Ok(true)
    }

    fn remove_slab_region(&self, number: u32, slot_bytes: u64) -> Result<()> {
        self.pool.unlink(self.dir, OsStr::new(&slab_name(number, slot_bytes)))?;
        // The space is free for others when no durable catalog names it.
        self.pool.sync()
    }

    /// The pool has no space for a log: a slab goes.
    pub(super) fn make_room_for_log(&self) -> Result<()> {
        if self.options.lasting {
            return Ok(());
        }
        let Some((number, bytes)) = self.state().take_slab(0) else { return Ok(()) };
        tracing::warn!(
            "the pool is full: the KV store {:?} gives up a slab for its index",
            self.options.name
        );
        self.remove_slab_region(number, bytes)
    }

    /// At open: a smaller budget than last time takes slabs away.
    pub(super) fn shrink(&self) -> Result<()> {
        let mut any = false;
        while self.allocated() > self.budget {
            let Some((number, bytes)) = self.state().take_slab(0) else { break };
            any = true;
            // The log may still speak of its blocks: of a slab that is not there.
            self.remove_slab_region(number, bytes)?;
        }
        if any {
            let batch: Batch = self.state().take_batch();
            self.checkpoint(&mut lock(&self.log), &batch)?;
            self.state().committed(batch);
        }
        Ok(())
    }

    /// Where the budget is used up, some blocks go before anybody waits for their slots.
    pub(super) fn evict_ahead(&self) {
        let allocated = self.allocated();
        let mut state = self.state();
        if allocated + self.slab_bytes <= self.budget {
            return;
        }
        state.table.now = self.options.clock.now();
        let short: Vec<(u64, usize)> = state
            .classes
            .iter()
            .filter_map(|(bytes, class)| {
                let slots: usize = class
                    .slabs
                    .iter()
                    .filter_map(|number| state.slabs.get(number))
                    .map(|slab| slab.slots())
                    .sum();
                let wanted = (slots / 64).clamp(EVICT_MIN, EVICT_MAX);
                // A small class has no slots to spare: there a put makes room for itself.
                (slots >= 64 && class.free + class.limbo < wanted)
                    .then(|| (*bytes, wanted - class.free - class.limbo))
            })
            .collect();
        for (bytes, count) in short {
            state.evict(bytes, count);
        }
    }
}
