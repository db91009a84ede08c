//! Batches of puts, between the caller's buffers and slots; what gets share with them. Gets: `loads.rs`.

use std::sync::Arc;
use std::time::Instant;

use nvme::{Arena, Buffer, Op, Queue, Refused};

use super::loads::Loads;
use super::record::{Block, PINNED};
use super::state::{No, Reserved};
use super::table::Name;
use super::{Key, Shared, View, sum_of};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::slab::{Slab, SlabPiece};

/// A block to store: `view.slot_bytes()` bytes of `buffer` from `start` on, of which the first `view.block_bytes()` count.
#[derive(Debug)]
pub struct Put {
    /// Its key.
    pub key: Key,
    /// Holds it; comes back with the answer.
    pub buffer: Buffer,
    /// Where in the buffer, bytes: a multiple of 4096.
    pub start: usize,
}

/// A block to load, to the same place of a buffer.
#[derive(Debug)]
pub struct Get {
    /// Its key.
    pub key: Key,
    /// To load it into; comes back with the answer.
    pub buffer: Buffer,
    /// Where in the buffer, bytes: a multiple of 4096.
    pub start: usize,
}

/// Why a block was not stored, though nothing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It was not offered before, see [`Admission`](super::Admission).
    Admission,
    /// The day's write budget is spent.
    Budget,
    /// The tenant's quota has no room.
    Quota,
    /// There is no room, and nothing can go.
    Space,
}

/// What became of a put.
#[derive(Debug)]
pub enum Stored {
    /// It is there now.
    New,
    /// It was there already, or somebody else is storing it.
    Present,
    /// It is not there, by policy.
    Refused(Refusal),
    /// It is not there: an error.
    Failed(Error),
}

/// What became of a put, and its buffer. `None`: the drive did not answer and may still read it; it goes back to its arena by itself.
#[derive(Debug)]
pub struct PutDone {
    /// Its key.
    pub key: Key,
    /// What became of it.
    pub result: Stored,
    /// The caller's.
    pub buffer: Option<Buffer>,
}

/// Why a block is not there.
#[derive(Debug)]
pub enum Miss {
    /// Nobody stored it, or it made room, or its time was over.
    Absent,
    /// What the drive has is not what was stored. It is dropped.
    Corrupt,
    /// The drive failed, or was too slow. It is dropped.
    Failed(Error),
}

/// What became of a get, and its buffer. After a miss the buffer's bytes are of no meaning.
#[derive(Debug)]
pub struct GetDone {
    /// Its key.
    pub key: Key,
    /// The block is in the buffer, or why not.
    pub result: std::result::Result<(), Miss>,
    /// The caller's; `None`: see [`PutDone::buffer`].
    pub buffer: Option<Buffer>,
}

/// Puts and gets of one thread: see [`Store::lane`](super::Store::lane).
#[derive(Debug)]
pub struct Lane {
    pub(super) shared: Arc<Shared>,
    pub(super) queue: Queue,
    arena: Option<Arena>,
    pub(super) loads: Loads,
}

/// A transfer of one block, piece after piece.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) buffer: Option<Buffer>,
    pub(super) start: usize,
    pieces: Vec<SlabPiece>,
    /// The next piece.
    next: usize,
    /// Bytes done.
    done: usize,
    pub(super) error: Option<Error>,
    // Its space stays where it is until the transfer is over.
    slab: Arc<Slab>,
}

/// Which way a job's bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    In,
    Out,
}

impl Job {
    pub(super) fn new(slab: &Arc<Slab>, slot: u32, slot_bytes: u64, buffer: Buffer, start: usize) -> Job {
        let pieces = slab.range(u64::from(slot) * slot_bytes, slot_bytes).collect();
        Job { buffer: Some(buffer), start, pieces, next: 0, done: 0, error: None, slab: slab.clone() }
    }

    /// The next piece; `None`: there is none, or no buffer.
    pub(super) fn op(&mut self, way: Way, tag: u64) -> Option<Op> {
        let piece = self.pieces.get(self.next)?;
        let buffer = self.buffer.take()?;
        let from = self.start + self.done;
        let range = from..from + piece.len as usize;
        let op = match way {
            Way::In => Op::read(piece.device.clone(), piece.offset, buffer),
            Way::Out => Op::write(piece.device.clone(), piece.offset, buffer),
        };
        self.next += 1;
        self.done += piece.len as usize;
        Some(op.range(range).tag(tag))
    }

    /// Whether all of it was handed out.
    pub(super) fn is_done(&self) -> bool {
        self.next == self.pieces.len()
    }

    /// Begins once more.
    pub(super) fn again(&mut self) {
        (self.next, self.done, self.error) = (0, 0, None);
    }
}

pub(super) fn check_buffer(view: &View, buffer: &Buffer, start: usize) -> Result<()> {
    let end = start.checked_add(view.slot_bytes());
    if !start.is_multiple_of(4096) || end.is_none_or(|end| end > buffer.len()) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "a block of {} bytes at {start} of a buffer of {}: whole pages at a multiple of 4096 are needed",
                view.block_bytes(),
                buffer.len()
            ),
        ));
    }
    Ok(())
}

impl Lane {
    pub(super) fn new(shared: Arc<Shared>, arena: Option<&Arena>) -> Result<Lane> {
        let queue = Lane::queue(&shared, arena)?;
        Ok(Lane { shared, queue, arena: arena.cloned(), loads: Loads::default() })
    }

    pub(super) fn queue(shared: &Shared, arena: Option<&Arena>) -> Result<Queue> {
        Queue::builder()
            .depth(shared.options.depth)
            .deadline(shared.options.deadline)
            .arena(arena)
            .measure_latency(false)
            .register_files(false)
            .build()
            .map_err(|error| Error::from(error).context("a lane of a KV store"))
    }

    pub(super) fn arena(&self) -> Option<&Arena> {
        self.arena.as_ref()
    }

    pub(super) fn check_view(&self, view: &View) -> Result<()> {
        if Arc::ptr_eq(&view.shared, &self.shared) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidArgument, "a view of another store than the lane's"))
    }

    /// As [`run_jobs`](Self::run_jobs). A queue that failed as a whole is replaced: what it still holds must not answer to later jobs.
    fn transfer(&mut self, jobs: &mut [Job], each: impl FnMut(usize, &mut Job, bool)) -> Result<()> {
        let done = self.run_jobs(jobs, each);
        if done.is_err() {
            self.loads.fail();
            self.mend()?;
        }
        done
    }

    /// Runs jobs to their ends, as many at a time as the queue takes. `each` is called when one is about to begin and, with `true`, when it
    /// is over.
    fn run_jobs(&mut self, jobs: &mut [Job], mut each: impl FnMut(usize, &mut Job, bool)) -> Result<()> {
        let (mut next, mut running) = (0, 0);
        let mut again: Vec<usize> = Vec::new();
        while next < jobs.len() || running > 0 || !again.is_empty() {
            loop {
                let (index, first) = match again.pop() {
                    Some(index) => (index, false),
                    None if next < jobs.len() => (next, true),
                    None => break,
                };
                if self.queue.in_flight() >= self.queue.depth() {
                    if !first {
                        again.push(index);
                    }
                    break;
                }
                if first {
                    next += 1;
                    running += 1;
                    each(index, &mut jobs[index], false);
                }
                let job = &mut jobs[index];
                let Some(op) = job.op(Way::Out, index as u64) else {
                    running -= 1;
                    each(index, &mut jobs[index], true);
                    continue;
                };
                if let Err(Refused { op, error }) = self.queue.push(op) {
                    job.buffer = op.buffer;
                    job.error = Some(error.into());
                    running -= 1;
                    each(index, &mut jobs[index], true);
                }
            }
            if self.queue.in_flight() == 0 {
                // Refused ones are over already.
                if again.is_empty() && running > 0 {
                    return Err(Error::new(
                        ErrorKind::Io,
                        "operations of a KV store were lost by their queue",
                    ));
                }
                continue;
            }
            self.queue.wait(1)?;
            let again = &mut again;
            let running = &mut running;
            self.queue.reap(|completion| {
                let index = completion.tag as usize;
                let job = &mut jobs[index];
                job.buffer = completion.op.buffer;
                if let Err(error) = completion.result {
                    job.error = Some(error.into());
                } else if job.next < job.pieces.len() {
                    again.push(index);
                    return;
                }
                *running -= 1;
                each(index, job, true);
            });
        }
        Ok(())
    }

    /// Stores blocks. Answers come in the order of `puts`. What is [`Stored::New`] is acknowledged: see [`StoreOptions::window`] for when it is
    /// durable. Blocks of a prefix are best given in their order: the last ones make room first.
    ///
    /// [`StoreOptions::window`]: super::StoreOptions::window
    pub fn put(&mut self, view: &View, puts: Vec<Put>) -> Result<Vec<PutDone>> {
        let _span = tracing::debug_span!("kv_put", blocks = puts.len()).entered();
        self.check_view(view)?;
        self.check_idle()?;
        for put in &puts {
            check_buffer(view, &put.buffer, put.start)?;
        }
        let shared = self.shared.clone();
        let deadline = Instant::now() + shared.options.deadline;
        let slot_bytes = view.slot_bytes() as u64;
        let mut done: Vec<Option<PutDone>> = Vec::new();
        done.resize_with(puts.len(), || None);
        let mut jobs = Vec::new();
        let mut plans: Vec<(usize, Name, Reserved)> = Vec::new();
        let total = puts.len();
        let mut wait = false;
        for (index, put) in puts.into_iter().enumerate() {
            let name = view.name(&put.key);
            match self.reserve(&name, slot_bytes, total - index) {
                Ok((reserved, slab)) => {
                    jobs.push(Job::new(&slab, reserved.slot, slot_bytes, put.buffer, put.start));
                    plans.push((index, name, reserved));
                }
                Err(result) => {
                    // Its being there is an acknowledgement, too.
                    wait |= matches!(result, Stored::Present);
                    done[index] = Some(PutDone { key: put.key, result, buffer: Some(put.buffer) });
                }
            }
        }
        let expires = shared.options.ttl.map_or(0, |ttl| {
            let at = shared.options.clock.now().saturating_add(ttl.as_secs().max(1));
            u32::try_from(at).unwrap_or(0)
        });
        let mut sums = vec![0; jobs.len()];
        let block_bytes = view.block_bytes() as usize;
        let moved = self.transfer(&mut jobs, |index, job, over| {
            // Summed while the blocks before it are on their way.
            if let (false, Some(buffer)) = (over, &job.buffer) {
                let (_, name, reserved) = &plans[index];
                let bytes = &buffer[job.start..job.start + block_bytes];
                sums[index] = sum_of(view.seed, &name.key, reserved.generation, bytes);
            }
        });
        if let Err(error) = &moved {
            tracing::error!(error = %error.chain(), "a queue of the KV store failed");
        }
        let flags = if shared.options.lasting { PINNED } else { 0 };
        let mut state = shared.state();
        // The last block of a prefix is the first that may go.
        for (index, job) in jobs.into_iter().enumerate().rev() {
            let (at, name, reserved) = plans[index];
            let error = job.error.or_else(|| {
                let short = moved.is_err() || job.next < job.pieces.len();
                short.then(|| Error::new(ErrorKind::Io, "the block was not written"))
            });
            drop(job.slab);
            let result = match error {
                None => {
                    let block = Block {
                        key: name.key,
                        flags,
                        namespace: name.namespace,
                        tenant: name.tenant,
                        slab: reserved.slab,
                        slot: reserved.slot,
                        generation: reserved.generation,
                        sum: sums[index],
                        expires,
                    };
                    match state.publish(block, slot_bytes) {
                        true => Stored::New,
                        false => Stored::Refused(Refusal::Space),
                    }
                }
                Some(error) => {
                    state.stat.io_errors += 1;
                    state.stat.timeouts += u64::from(error.kind() == ErrorKind::Timeout);
                    // A write that was not answered may still come.
                    let lost = error.kind() == ErrorKind::Timeout || job.buffer.is_none();
                    state.give_up(&name, reserved, lost);
                    Stored::Failed(error)
                }
            };
            wait |= matches!(result, Stored::New);
            done[at] = Some(PutDone { key: name.key, result, buffer: job.buffer });
        }
        drop(state);
        shared.wake.notify_one();
        let mut done: Vec<PutDone> = done.into_iter().flatten().collect();
        if wait && let Err(error) = shared.wait_for_window(deadline) {
            let why = error.chain();
            for put in done.iter_mut().filter(|put| matches!(put.result, Stored::New | Stored::Present)) {
                put.result = Stored::Failed(Error::new(error.kind(), why.clone()));
            }
        }
        Ok(done)
    }

    fn reserve(
        &self,
        name: &Name,
        slot_bytes: u64,
        want: usize,
    ) -> std::result::Result<(Reserved, Arc<Slab>), Stored> {
        let shared = &self.shared;
        let options = &shared.options;
        let now = options.clock.now();
        let mut looked = false;
        loop {
            shared.check_failed().map_err(Stored::Failed)?;
            if shared.stop.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(Stored::Failed(Error::new(ErrorKind::Stale, "the KV store is closed")));
            }
            let mut state = shared.state();
            state.table.now = now;
            let no = match state.reserve(name, slot_bytes, options.admission, options.write_bytes_per_day) {
                Ok(reserved) => match state.slabs.get(&reserved.slab) {
                    Some(slab) => return Ok((reserved, slab.slab.clone())),
                    None => No::Space,
                },
                Err(no) => no,
            };
            let refusal = match no {
                No::Present => {
                    state.stat.present += 1;
                    return Err(Stored::Present);
                }
                No::Admission => {
                    state.stat.refused_admission += 1;
                    Refusal::Admission
                }
                No::Budget => {
                    state.stat.refused_budget += 1;
                    Refusal::Budget
                }
                No::Quota => {
                    state.stat.refused_quota += 1;
                    Refusal::Quota
                }
                No::Space if looked => {
                    state.stat.refused_space += 1;
                    Refusal::Space
                }
                No::Space => {
                    drop(state);
                    looked = true;
                    match shared.make_room(slot_bytes, want) {
                        Ok(_) => continue,
                        Err(error) => return Err(Stored::Failed(error)),
                    }
                }
            };
            return Err(Stored::Refused(refusal));
        }
    }
}
