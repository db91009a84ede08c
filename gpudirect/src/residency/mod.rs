//! Units of a [`StateStore`] between a pool and tensors: fetched ahead, written back behind, committed in order.
//!
//! ```text
//! caller       fetch, store, commit: returns at once with a ticket
//! queue.rs     operations on one unit run in the order of the calls, one at a time; on different units side by side
//! reads.rs     threads: drive -> buffer -> tensor
//! work.rs      a thread: RAM share -> tensor; a thread: tensor -> RAM share; threads: tensor -> buffer -> drive. Units of the RAM share keep their buffers
//! flights.rs   copies that a thread has under way
//! commits      a commit names what was stored before it was asked for, and nothing that was stored after
//! ```
//!
//! The RAM share is static: a unit has buffers of its own, of its exact size, or it has none. What is fetched in a cycle gains nothing from
//! keeping what was used last.
//!
//! After a failure nothing more is done: every ticket gets it, and what counts is the last commit.

use std::any::Any;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use engine::state::{StateStat, StateStore};
use nvme::Arena;

use crate::driver::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::lane::PinnedTier;

mod flights;
mod queue;
mod reads;
#[cfg(test)]
mod tests;
mod work;

use queue::{Kind, Op, Queues};

/// How a [`Residency`] works.
#[derive(Clone, Copy, Debug)]
pub struct ResidencyOptions {
    /// Threads that fetch from the drive. Default: 2.
    pub readers: usize,
    /// Blocks that such a thread has on their way, being checked and being copied. Default: 8.
    pub ahead: usize,
    /// Blocks that are copied at a time between the RAM share and tensors. Default: 4.
    pub copies: usize,
    /// Threads that write back. Default: 4.
    pub writers: usize,
    /// Blocks that a thread writes back at a time. Default: 2.
    pub batch: usize,
}

impl Default for ResidencyOptions {
    fn default() -> ResidencyOptions {
        ResidencyOptions { readers: 2, ahead: 8, copies: 4, writers: 4, batch: 2 }
    }
}

impl ResidencyOptions {
    /// Bytes of buffers that the threads have, with blocks of `slot_bytes`.
    pub fn ring_bytes(&self, slot_bytes: usize) -> usize {
        (self.readers * self.ahead + self.writers * self.batch) * slot_bytes
    }
}

/// Memory of a tensor.
#[derive(Clone)]
pub struct Target {
    /// Whose memory it is.
    pub driver: Arc<dyn Driver>,
    /// First byte; as many as the unit has.
    pub address: u64,
    /// An event of the device after which it may be used ([`Stream::wait_event`](crate::driver::Stream::wait_event)); 0: at once.
    pub after: u64,
    /// What keeps the memory and the event; let go when the operation is over.
    pub keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("driver", &self.driver)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// What becomes of an operation.
#[derive(Debug, Default)]
pub struct Ticket {
    state: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    copied: bool,
    done: bool,
    error: Option<(ErrorKind, String)>,
}

impl Progress {
    fn reached(&self, stage: Stage) -> bool {
        self.done || stage == Stage::Copied && self.copied
    }
}

/// How far an operation must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its tensor is not used any more.
    Copied,
    /// All of it.
    Done,
}

impl Ticket {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress());
        self.changed.notify_all();
    }

    /// Waits for a stage for at most `time`; `false`: it is not there yet.
    pub fn wait(&self, stage: Stage, time: Duration) -> Result<bool> {
        let state = self.progress();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, time, |state| !state.reached(stage))
            .unwrap_or_else(PoisonError::into_inner);
        if !state.reached(stage) {
            return Ok(false);
        }
        match &state.error {
            Some((kind, why)) => Err(Error::new(*kind, why.clone())),
            None => Ok(true),
        }
    }
}

/// Bytes that were moved, by tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// To tensors.
    pub fetched_bytes: u64,
    /// Of these, out of the RAM share.
    pub ram_bytes: u64,
    /// From tensors.
    pub stored_bytes: u64,
    /// What went to and from the drive.
    pub drive: StateStat,
}

struct Shared {
    store: StateStore,
    options: ResidencyOptions,
    queues: Mutex<Queues>,
    sleepers: Sleepers,
}

/// Where threads sleep until there is something for them: one is woken for what it does, and not for all that happens.
#[derive(Default)]
struct Sleepers {
    reads: Condvar,
    copies: Condvar,
    keeps: Condvar,
    writes: Condvar,
    commits: Condvar,
}

impl Shared {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called after every change of the queues, before they are let go.
    fn wake(&self, queues: &Queues) {
        let Sleepers { reads, copies, keeps, writes, commits } = &self.sleepers;
        // After a failure, and in the end, all of them look.
        let all = queues.stopped || queues.has_failed();
        let waiting = [
            (reads, !queues.reads.is_empty()),
            (copies, !queues.copies.is_empty()),
            (keeps, !queues.keeps.is_empty()),
            (writes, !queues.writes.is_empty()),
            (commits, queues.may_commit()),
        ];
        waiting.iter().filter(|(_, there)| all || *there).for_each(|(sleepers, _)| sleepers.notify_all());
    }
}

/// Units of a state, moved by threads of its own.
pub struct Residency {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    // After the threads; before the arena that they pin.
    pinned: Mutex<Vec<Arc<PinnedTier>>>,
    arena: Arena,
}

impl Residency {
    /// Over a store. `arena`: what buffers are taken from: [`ResidencyOptions::ring_bytes`], and the RAM share.
    pub fn new(store: StateStore, arena: Arena, options: ResidencyOptions) -> Result<Residency> {
        let ResidencyOptions { readers, ahead, copies, writers, batch } = options;
        if [readers, ahead, copies, writers, batch].contains(&0) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "a residency without threads, or with batches of nothing",
            ));
        }
        let mut queues = Queues::default();
        queues.grow(&store.units());
        let shared =
            Arc::new(Shared { store, options, queues: Mutex::new(queues), sleepers: Sleepers::default() });
        let mut residency = Residency { shared, threads: Vec::new(), pinned: Mutex::default(), arena };
        for _ in 0..readers {
            let ring = residency.buffers(ahead)?;
            residency.start(move |shared| reads::run(shared, ring))?;
        }
        for side in [work::Side::Copy, work::Side::Keep] {
            residency.start(move |shared| work::run(shared, side, Vec::new()))?;
        }
        for _ in 0..writers {
            let ring = residency.buffers(batch)?;
            residency.start(move |shared| work::run(shared, work::Side::Write, ring))?;
        }
        residency.start(queue::commits)?;
        Ok(residency)
    }

    fn start(&mut self, run: impl FnOnce(&Shared) + Send + 'static) -> Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("nvtier-state".into()).spawn(move || run(&shared));
        self.threads.push(thread.map_err(|error| Error::io("start a thread that moves state", error))?);
        Ok(())
    }

    fn buffers(&self, count: usize) -> Result<Vec<nvme::Buffer>> {
        let bytes = self.shared.store.slot_bytes();
        let buffers: Option<Vec<_>> = (0..count).map(|_| self.arena.alloc(bytes)).collect();
        buffers.ok_or_else(|| {
            let context = format!(
                "{count} buffers of {bytes} bytes: {} of the {} bytes of host memory are left",
                self.arena.free_bytes(),
                self.arena.len()
            );
            Error::new(ErrorKind::OutOfHostMemory, context)
        })
    }

    /// The store.
    pub fn store(&self) -> &StateStore {
        &self.shared.store
    }

    /// Makes the memory of buffers known to a device, once, so that copies run at the bus's speed.
    pub fn use_device(&self, driver: &Arc<dyn Driver>) -> Result<()> {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        if !pinned.iter().any(|tier| Arc::ptr_eq(tier.driver(), driver)) {
            pinned.push(PinnedTier::new(driver, &self.arena)?);
        }
        Ok(())
    }

    /// Adds units of these lengths; the number of the first.
    pub fn add(&self, lens: &[u64]) -> Result<u32> {
        let first = self.shared.store.add(lens)?;
        self.shared.queues().grow(&self.shared.store.units());
        Ok(first)
    }

    /// Gives a unit buffers of its own: it is read from there from its first fetch or store on.
    pub fn keep_in_ram(&self, unit: u32) -> Result<()> {
        let len = self.check(unit)?;
        let blocks = len.div_ceil(u64::from(self.shared.store.block_bytes())) as usize;
        let buffers = self.buffers(blocks)?;
        let mut queues = self.shared.queues();
        let queue = queues.unit(unit);
        if queue.ram.is_empty() {
            queue.ram = buffers.into_iter().map(Some).collect();
        }
        Ok(())
    }

    fn check(&self, unit: u32) -> Result<u64> {
        let units = self.shared.store.units();
        units.get(unit as usize).copied().ok_or_else(|| {
            Error::new(ErrorKind::Invalid, format!("there is no unit {unit}: {} were added", units.len()))
        })
    }

    fn submit(
        &self,
        unit: u32,
        kind: Kind,
        target: Option<Target>,
        behind: Option<Arc<Ticket>>,
    ) -> Result<Arc<Ticket>> {
        let len = self.check(unit)?;
        if let Some(target) = &target {
            target.driver.check_range(target.address, len)?;
        }
        let ticket = Arc::new(Ticket::default());
        let mut queues = self.shared.queues();
        queues.submit(&self.shared, Op { unit, len, kind, target, epoch: 0, behind, ticket: ticket.clone() });
        self.shared.wake(&queues);
        Ok(ticket)
    }

    /// Copies a unit to a tensor, which nobody else may use until the ticket is done. `behind`: a store of this residency that copies from that
    /// tensor; it is left to end first.
    pub fn fetch(&self, unit: u32, target: Target, behind: Option<Arc<Ticket>>) -> Result<Arc<Ticket>> {
        self.submit(unit, Kind::Fetch, Some(target), behind)
    }

    /// Makes what a tensor holds the unit's bytes. It must stay as it is until the ticket says `Copied`. `write`: to the drive at once;
    /// otherwise, where the unit is in the RAM share, with the next commit.
    pub fn store_unit(&self, unit: u32, target: Target, write: bool) -> Result<Arc<Ticket>> {
        self.submit(unit, Kind::Store { write }, Some(target), None)
    }

    /// Commits all that was stored before this call, with bytes of the caller's.
    pub fn commit(&self, meta: Vec<u8>) -> Arc<Ticket> {
        let ticket = Arc::new(Ticket::default());
        let mut queues = self.shared.queues();
        queues.commit(&self.shared, meta, ticket.clone());
        self.shared.wake(&queues);
        ticket
    }

    /// Bytes moved so far.
    pub fn moved(&self) -> Moved {
        Moved { drive: self.shared.store.stat(), ..self.shared.queues().moved }
    }
}

impl Drop for Residency {
    fn drop(&mut self) {
        {
            let mut queues = self.shared.queues();
            queues.stop();
            self.shared.wake(&queues);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // Buffers that the queues hold go before the memory is unpinned.
        *self.shared.queues() = Queues::default();
    }
}

impl std::fmt::Debug for Residency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Residency").field("options", &self.shared.options).finish_non_exhaustive()
    }
}
