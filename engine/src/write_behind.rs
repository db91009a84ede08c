//! Write-behind: gathered chunks on their way to the members.
//!
//! Drafts hand over *runs*: consecutive chunks that lie together on a member, in one aligned buffer. A few threads, each
//! with a queue of its own, sum the chunks and write the run while the writer gathers the next one. What is gathered or under way
//! is *dirty*; its bytes are bounded over all drafts, so a writer that is faster than the drives waits here, and makes others hand over
//! what they merely hold.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nvme::{Arena, Buffer, Device, Op, Queue};

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Condvar, Mutex, MutexGuard, thread};

/// How long a writer waits for room. Every operation ends by its own deadline, so room comes or a device is gone.
const WAIT: Duration = Duration::from_secs(120);
const QUEUE_DEPTH: u32 = 64;

/// Who hands over runs and hears what became of them.
pub(crate) trait RunOwner: Send + Sync + fmt::Debug {
    /// A run was written (or not). Its buffer is free again.
    fn written(&self, first_chunk: u64, sums: Vec<u32>, result: Result<()>);
    /// Hand over what is merely held, unless busy.
    fn hand_over(self: Arc<Self>);
}

/// Consecutive chunks to write at one place.
#[derive(Debug)]
pub(crate) struct RunWrite {
    pub owner: Arc<dyn RunOwner>,
    pub first_chunk: u64,
    pub chunk_size: usize,
    pub device: Arc<dyn Device>,
    pub offset: u64,
    pub buffer: Buffer,
    /// Bytes to write, whole chunks.
    pub len: usize,
    /// Bytes of them that count for sums: the rest lies beyond the size.
    pub valid: usize,
    /// Dirty bytes that end with it.
    pub permit: Permit,
}

/// Dirty bytes; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.lock().dirty -= self.bytes;
        self.shared.room.notify_all();
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Work came, or the end.
    work: Condvar,
    /// Dirty bytes went.
    room: Condvar,
    limit: usize,
    arena: Option<Arena>,
    /// See [`WriteBehind::new`].
    in_step: bool,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<RunWrite>,
    /// In step: what was written already, and its owner not told yet.
    written: VecDeque<(Written, Result<()>)>,
    dirty: usize,
    stop: bool,
    owners: VecDeque<Weak<dyn RunOwner>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The threads and their bound; see the module documentation. Dropping it writes what was handed over, then ends the threads.
#[derive(Debug)]
pub struct WriteBehind {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl WriteBehind {
    /// `threads` writers and at most `limit` dirty bytes. Buffers of `arena` are registered with their queues.
    ///
    /// Without threads it writes *in step*: who hands a run over has it written when the call returns, and one thread only tells the
    /// owners. Simulated devices want that: the same acts then make the same writes in the same order.
    pub fn new(threads: usize, limit: usize, arena: Option<&Arena>) -> Result<WriteBehind> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            limit,
            arena: arena.cloned(),
            in_step: threads == 0,
        });
        let mut writers = WriteBehind { shared: shared.clone(), threads: Vec::new() };
        for index in 0..threads.max(1) {
            let shared = shared.clone();
            let handle = thread::Builder::new()
                .name(format!("nvtier-write-{index}"))
                .spawn(move || if shared.in_step { teller(&shared) } else { writer(&shared) })
                .map_err(|e| Error::io("starting a writer thread", e))?;
            writers.threads.push(handle);
        }
        Ok(writers)
    }

    /// Dirty bytes now.
    pub fn dirty_bytes(&self) -> usize {
        self.shared.lock().dirty
    }

    /// Lets others ask `owner` to hand over what it holds.
    pub(crate) fn register(&self, owner: Weak<dyn RunOwner>) {
        let mut state = self.shared.lock();
        state.owners.retain(|other| other.strong_count() > 0);
        state.owners.push_back(owner);
    }

    /// The right to `bytes` more dirty bytes, if they fit now. One that is larger than the limit fits when nothing else is dirty.
    pub(crate) fn try_permit(&self, bytes: usize) -> Option<Permit> {
        let mut state = self.shared.lock();
        let fits = state.dirty + bytes <= self.shared.limit || state.dirty == 0;
        fits.then(|| {
            state.dirty += bytes;
            Permit { shared: self.shared.clone(), bytes }
        })
    }

    /// Waits until `bytes` more would fit. The caller has handed over its own runs and holds no lock.
    pub(crate) fn wait_for_room(&self, bytes: usize) -> Result<()> {
        let deadline = Instant::now() + WAIT;
        loop {
            // Others may hold all of it without ever writing again: ask each once a round.
            let owners: Vec<_> = self.shared.lock().owners.iter().filter_map(Weak::upgrade).collect();
            for owner in owners {
                if self.fits(bytes) {
                    break;
                }
                owner.hand_over();
            }
            let state = self.shared.lock();
            if state.dirty + bytes <= self.shared.limit || state.dirty == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!(
                        "{} bytes wait to be written, and none were in {} s",
                        state.dirty,
                        WAIT.as_secs()
                    ),
                ));
            }
            // A short nap: an owner that was busy is asked again.
            let _ = self.shared.room.wait_timeout(state, Duration::from_millis(50));
        }
    }

    fn fits(&self, bytes: usize) -> bool {
        let state = self.shared.lock();
        state.dirty + bytes <= self.shared.limit || state.dirty == 0
    }

    pub(crate) fn submit(&self, run: RunWrite) {
        if self.shared.in_step {
            // The caller holds its own lock, so that somebody else has to tell it.
            let written = write_now(&self.shared, run);
            self.shared.lock().written.push_back(written);
        } else {
            self.shared.lock().queue.push_back(run);
        }
        self.shared.work.notify_one();
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for handle in self.threads.drain(..) {
            // The last holder of all this may be a draft that a writer thread lets go: that thread ends by itself.
            if handle.thread().id() != thread::current().id() && handle.join().is_err() {
                tracing::error!("a writer thread panicked");
            }
        }
    }
}

/// What a run needs after its write.
#[derive(Debug)]
struct Written {
    owner: Arc<dyn RunOwner>,
    first_chunk: u64,
    sums: Vec<u32>,
    permit: Permit,
}

impl Written {
    fn finish(self, result: Result<()>) {
        drop(self.permit);
        self.owner.written(self.first_chunk, self.sums, result);
    }
}

/// Writes a run by this thread's own queue.
fn write_now(shared: &Shared, run: RunWrite) -> (Written, Result<()>) {
    let sums = sums(&run);
    let RunWrite { owner, first_chunk, device, offset, buffer, len, permit, .. } = run;
    let op = Op::write(device, offset, buffer).range(0..len);
    let done =
        nvme::with_thread_queue(shared.arena.as_ref(), |queue| queue.run(vec![op])).and_then(|done| done);
    let result = done.and_then(|completions| {
        completions.into_iter().try_for_each(|completion| completion.result.map(drop))
    });
    (Written { owner, first_chunk, sums, permit }, result.map_err(Error::from))
}

/// In step: tells owners that their runs are written.
fn teller(shared: &Arc<Shared>) {
    let mut state = shared.lock();
    loop {
        if let Some((written, result)) = state.written.pop_front() {
            drop(state);
            written.finish(result);
            state = shared.lock();
        } else if state.stop {
            return;
        } else {
            state = match shared.work.wait(state) {
                Ok(state) => state,
                Err(poisoned) => poisoned.into_inner(),
            };
        }
    }
}

fn build_queue(shared: &Shared) -> nvme::Result<Queue> {
    // Files are not registered: an idle thread would keep the space of one that was removed.
    Queue::builder()
        .depth(QUEUE_DEPTH)
        .arena(shared.arena.as_ref())
        .measure_latency(false)
        .register_files(false)
        .build()
}

fn writer(shared: &Arc<Shared>) {
    let mut queue = match build_queue(shared) {
        Ok(queue) => Some(queue),
        Err(error) => {
            tracing::error!(%error, "no queue for a writer thread: writing one run at a time");
            None
        }
    };
    let mut under_way: Vec<Option<Written>> = Vec::new();
    let mut open = 0usize;
    loop {
        let run = {
            let mut state = shared.lock();
            loop {
                if let Some(run) = state.queue.pop_front() {
                    break Some(run);
                }
                if open > 0 {
                    break None;
                }
                if state.stop {
                    return;
                }
                state = match shared.work.wait(state) {
                    Ok(state) => state,
                    Err(poisoned) => poisoned.into_inner(),
                };
            }
        };
        if let Some(run) = run {
            let sums = sums(&run);
            let RunWrite { owner, first_chunk, device, offset, buffer, len, permit, .. } = run;
            let written = Written { owner, first_chunk, sums, permit };
            let Some(queue) = &mut queue else {
                written.finish(device.write_at(offset, &buffer[..len]).map_err(Error::from));
                continue;
            };
            let slot = under_way.iter().position(Option::is_none).unwrap_or_else(|| {
                under_way.push(None);
                under_way.len() - 1
            });
            let mut op = Op::write(device, offset, buffer);
            op.range = 0..len;
            op.tag = slot as u64;
            match queue.push(op) {
                Ok(()) => {
                    under_way[slot] = Some(written);
                    open += 1;
                }
                Err(refused) => {
                    // Full cannot be: it is reaped below before. Anything else is the run's own fault.
                    written.finish(Err(refused.error.into()));
                }
            }
        }
        let Some(queue) = &mut queue else { continue };
        if open == 0 {
            continue;
        }
        // Wait only when there is nothing to add, or no room for it.
        let idle = shared.lock().queue.is_empty() || open as u32 >= QUEUE_DEPTH / 2;
        let waited = queue.submit().and_then(|_| if idle { queue.wait(1) } else { Ok(()) });
        queue.reap(|completion| {
            let Some(written) = under_way.get_mut(completion.tag as usize).and_then(Option::take) else {
                return;
            };
            open -= 1;
            drop(completion.op);
            written.finish(completion.result.map(|_| ()).map_err(Error::from));
        });
        if let Err(error) = waited {
            // The queue is of no more use: what is under way may or may not arrive, its buffers stay with it.
            tracing::error!(%error, "a writer's queue failed");
            for written in under_way.drain(..).flatten() {
                written.finish(Err(Error::new(
                    ErrorKind::Timeout,
                    format!("a write did not come back: {error}"),
                )));
            }
            open = 0;
        }
    }
}

fn sums(run: &RunWrite) -> Vec<u32> {
    let bytes = &run.buffer[..run.len];
    bytes
        .chunks(run.chunk_size)
        .enumerate()
        .map(|(index, chunk)| {
            let valid = run.valid.saturating_sub(index * run.chunk_size).min(chunk.len());
            crc32fast::hash(&chunk[..valid])
        })
        .collect()
}
