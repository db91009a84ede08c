//! Many operations in flight, one thread.
//!
//! [`Queue::push`] takes operations, [`Queue::submit`] or [`Queue::wait`] gives all pushed ones to the kernel in
//! one system call, [`Queue::reap`] hands completions out. An operation owns its buffer from push to completion.
//!
//! What this is not: a scheduler. Operations are independent and may complete in any order.
//!
//! **Deadline.** Every operation gets one (default 30 s). It is counted in *ticks* of a quarter deadline that pass
//! while somebody waits on the queue, so that no clock is read per operation; an operation is cancelled between
//! one and one and a quarter deadlines after it was pushed. If the device does not give it up even then, it
//! completes as [`ErrorKind::Timeout`] *without* its buffer, which returns to its arena when the device answers.

#![allow(unsafe_code)]

mod files;
mod fixed;
mod op;
mod ring;
mod slab;
mod threads;

pub use op::{Backend, Completion, Op, Refused, Verb};

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::Arena;
use crate::device::{Device, InlineIo, InlineOutcome, Target};
use crate::error::{Error, ErrorKind, Result};
use ring::{Ring, WideRing};
use slab::Slab;
use threads::Threads;

/// Deadline of an operation unless told otherwise: what the Linux NVMe driver allows a command before it resets
/// the controller (nvme_core.io_timeout).
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(30);

/// The deepest queue, operations.
pub const DEPTH_MAX: u32 = 16 << 10;

// One per queue, so the difference in size costs nothing.
#[allow(clippy::large_enum_variant)]
enum Engine {
    Ring(Ring),
    /// Carries NVMe commands, too.
    Wide(WideRing),
    Threads(Threads),
}

/// One ring, one thread. It may be built on one thread and used on another, but from its first submit on it
/// belongs to that thread.
pub struct Queue {
    slab: Slab,
    engine: Engine,
    /// Pushed operations of inline devices, in order.
    inline: Vec<u32>,
    deadline: Duration,
    /// For a wide ring, should one be needed.
    builder: QueueBuilder,
    /// Why something slower than asked for is used.
    note: Option<String>,
    /// Send, not Sync.
    not_sync: PhantomData<std::cell::Cell<()>>,
}

/// Settings of a [`Queue`].
#[derive(Debug, Clone)]
pub struct QueueBuilder {
    depth: u32,
    arena: Option<Arena>,
    deadline: Duration,
    backend: Backend,
    iopoll: bool,
    measure_latency: bool,
    register_files: bool,
    passthrough: bool,
}

impl Queue {
    /// Starts with the defaults named at each setting.
    pub fn builder() -> QueueBuilder {
        QueueBuilder {
            depth: 64,
            arena: None,
            deadline: DEADLINE_DEFAULT,
            backend: Backend::Auto,
            iopoll: false,
            measure_latency: true,
            register_files: true,
            passthrough: false,
        }
    }
}

impl QueueBuilder {
    /// Operations in flight at most, 1 to [`DEPTH_MAX`]. Default: 64.
    pub fn depth(mut self, depth: u32) -> Self {
        self.depth = depth;
        self
    }

    /// Registers this arena with the kernel, so that its pages are pinned once and not per operation: a prefaulted
    /// one whole and now, another by parts of 32 MiB as operations first touch them. Buffers from elsewhere work
    /// too. Default: none.
    pub fn arena(mut self, arena: Option<&Arena>) -> Self {
        self.arena = arena.cloned();
        self
    }

    /// How long an operation may take, at least 1 ms. Default: [`DEADLINE_DEFAULT`].
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Who executes. Default: [`Backend::Auto`].
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Polls for completions instead of taking interrupts: for devices with poll queues
    /// (`nvme.poll_queues`), small random reads, and a CPU to burn. Default: false.
    pub fn iopoll(mut self, iopoll: bool) -> Self {
        self.iopoll = iopoll;
        self
    }

    /// Fill [`Completion::latency`]: a clock reading per operation. Default: true.
    pub fn measure_latency(mut self, measure: bool) -> Self {
        self.measure_latency = measure;
        self
    }

    /// Registers devices' descriptors with the ring at first use, which saves a little CPU on each later
    /// operation, but keeps a file open (and an unlinked file's space taken) until the queue notices that its
    /// device is gone, or is dropped, or is told by [`Queue::forget`]. Default: true.
    pub fn register_files(mut self, register: bool) -> Self {
        self.register_files = register;
        self
    }

    /// Starts with the wider entries that NVMe commands need ([`NvmeCharDevice`](crate::NvmeCharDevice)), instead of changing to
    /// them at the first such operation, which waits for what is in flight. Default: false.
    pub fn passthrough(mut self, passthrough: bool) -> Self {
        self.passthrough = passthrough;
        self
    }

    /// Builds it. Fails on senseless settings, and when an explicitly named backend is refused.
    pub fn build(self) -> Result<Queue> {
        if self.depth == 0 || self.depth > DEPTH_MAX {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("a queue of depth {}: it must be 1 to {DEPTH_MAX}", self.depth),
            ));
        }
        if self.deadline < Duration::from_millis(1) {
            return Err(Error::new(ErrorKind::Invalid, "a queue with a deadline below 1 ms"));
        }
        let (engine, note) = self.engine()?;
        Ok(Queue {
            slab: Slab::new(self.depth, self.measure_latency),
            engine,
            inline: Vec::with_capacity(self.depth as usize),
            deadline: self.deadline,
            builder: self,
            note,
            not_sync: PhantomData,
        })
    }

    fn engine(&self) -> Result<(Engine, Option<String>)> {
        let threads = || Engine::Threads(Threads::new(self.depth, self.deadline));
        if self.backend == Backend::Threads {
            return Ok((threads(), None));
        }
        let (depth, deadline, arena) = (self.depth, self.deadline, self.arena.as_ref());
        let built = match self.passthrough {
            true => {
                WideRing::build(depth, deadline, arena, self.iopoll, self.register_files).map(Engine::Wide)
            }
            false => Ring::build(depth, deadline, arena, self.iopoll, self.register_files).map(Engine::Ring),
        };
        match built {
            Ok(engine) => Ok((engine, None)),
            Err(error) if self.backend == Backend::IoUring => Err(error),
            Err(error) => {
                tracing::warn!("{error}: using threads with blocking calls, which costs more CPU");
                Ok((threads(), Some(error.to_string())))
            }
        }
    }
}

impl Queue {
    /// Takes an operation, without a system call. Refused ones come back: on [`ErrorKind::QueueFull`], reap and
    /// push again.
    #[allow(clippy::result_large_err)] // the operation itself is what comes back
    pub fn push(&mut self, op: Op) -> std::result::Result<(), Refused> {
        if let Err(error) = op.check() {
            return Err(Refused { op, error });
        }
        let (is_inline, is_command) = match op.device.target() {
            Target::Fd(_) => (false, false),
            Target::Nvme(_) => (false, true),
            Target::Inline(_) => (true, false),
        };
        if is_command
            && matches!(self.engine, Engine::Ring(_))
            && let Err(error) = self.widen()
        {
            return Err(Refused { op, error });
        }
        let index = match self.slab.insert(op) {
            Ok(index) => index,
            Err(op) => return Err(Refused { op, error: self.full() }),
        };
        if is_inline {
            self.inline.push(index);
            return Ok(());
        }
        match &mut self.engine {
            Engine::Ring(ring) => ring.push(&mut self.slab, index),
            Engine::Wide(ring) => ring.push(&mut self.slab, index),
            Engine::Threads(threads) => threads.push(index),
        }
        Ok(())
    }

    /// Changes to a ring that carries NVMe commands, once everything in flight has been answered.
    #[cold]
    fn widen(&mut self) -> Result<()> {
        while self.slab.active() > 0 {
            self.wait(usize::MAX)?;
        }
        if self.slab.zombies() > 0 {
            return Err(Error::new(
                ErrorKind::Gone,
                "this queue cannot take NVMe commands: a device still holds earlier operations without an answer",
            ));
        }
        self.builder.passthrough = true;
        let (engine, note) = self.builder.engine()?;
        if let Engine::Ring(ring) = &mut self.engine {
            ring.close();
        }
        self.engine = engine;
        self.note = note.or(self.note.take());
        Ok(())
    }

    #[cold]
    fn full(&self) -> Error {
        let depth = self.slab.depth();
        if self.slab.zombies() == depth {
            return Error::new(
                ErrorKind::Gone,
                format!("all {depth} operations of this queue are held by a device that does not answer"),
            );
        }
        Error::new(ErrorKind::QueueFull, format!("{depth} operations are in flight already: reap some"))
    }

    /// Gives everything pushed to the kernel. Returns how many operations that were.
    pub fn submit(&mut self) -> Result<usize> {
        let inline = self.run_inline();
        let submitted = match &mut self.engine {
            Engine::Ring(ring) => ring.submit(&mut self.slab)?,
            Engine::Wide(ring) => ring.submit(&mut self.slab)?,
            Engine::Threads(threads) => threads.submit(&mut self.slab)?,
        };
        Ok(inline + submitted)
    }

    /// Submits what is pushed and waits until at least `min` completions can be reaped (fewer when fewer are in
    /// flight), in one system call where possible. `wait(0)` does not block: it lets finished operations arrive.
    /// Never waits much longer than the deadline.
    pub fn wait(&mut self, min: usize) -> Result<()> {
        self.run_inline();
        let threads = match &mut self.engine {
            Engine::Ring(ring) => return ring.wait(&mut self.slab, min),
            Engine::Wide(ring) => return ring.wait(&mut self.slab, min),
            Engine::Threads(threads) => threads,
        };
        threads.submit(&mut self.slab)?;
        loop {
            threads.harvest(&mut self.slab);
            // Operations can end without an answer (zombies), so the goal is looked at anew each time.
            if self.slab.ready() >= min.min(self.slab.ready() + self.slab.active()) {
                return Ok(());
            }
            threads.wait();
        }
    }

    /// Hands out every completion that is there, without a system call. Returns how many.
    pub fn reap(&mut self, mut each: impl FnMut(Completion)) -> usize {
        match &mut self.engine {
            Engine::Ring(ring) => ring.harvest(&mut self.slab),
            Engine::Wide(ring) => ring.harvest(&mut self.slab),
            Engine::Threads(threads) => threads.harvest(&mut self.slab),
        }
        let mut count = 0;
        while let Some(completion) = self.slab.pop() {
            count += 1;
            each(completion);
        }
        count
    }

    /// Pushes all, however many, waits for all, and returns the completions in the order of `ops`. An operation
    /// that is refused completes with that error: none is lost. Nothing else may be in flight.
    pub fn run(&mut self, ops: Vec<Op>) -> Result<Vec<Completion>> {
        if self.in_flight() != 0 || self.slab.ready() != 0 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "run a batch while {} other operations are in the queue: reap them first",
                    self.in_flight()
                ),
            ));
        }
        let mut done: Vec<Option<Completion>> = Vec::new();
        done.resize_with(ops.len(), || None);
        let total = ops.len();
        let mut tags = Vec::with_capacity(total);
        let mut todo = ops.into_iter().enumerate();
        let mut next = todo.next();
        let mut finished = 0;
        while finished < total {
            while let Some((index, mut op)) = next.take() {
                if tags.len() == index {
                    tags.push(op.tag);
                }
                op.tag = index as u64;
                match self.push(op) {
                    Ok(()) => next = todo.next(),
                    Err(Refused { op, error }) if error.kind().is_queue_full() => {
                        next = Some((index, op));
                        break;
                    }
                    Err(Refused { op, error }) => {
                        let completion =
                            Completion { tag: op.tag, op, result: Err(error), latency: Duration::ZERO };
                        done[index] = Some(completion);
                        finished += 1;
                        next = todo.next();
                    }
                }
            }
            if finished == total {
                break;
            }
            self.wait(1)?;
            finished += self.reap(|completion| {
                let index = completion.tag as usize;
                done[index] = Some(completion);
            });
        }
        let restore = |(completion, tag): (Option<Completion>, u64)| {
            completion.map(|mut completion| {
                completion.tag = tag;
                completion.op.tag = tag;
                completion
            })
        };
        Ok(done.into_iter().zip(tags).filter_map(restore).collect())
    }

    /// Who executes: [`Backend::IoUring`] or [`Backend::Threads`].
    pub fn backend(&self) -> Backend {
        match &self.engine {
            Engine::Ring(_) | Engine::Wide(_) => Backend::IoUring,
            Engine::Threads(_) => Backend::Threads,
        }
    }

    /// Why something slower than asked for is used: io_uring refused, or the arena not registered. For people.
    pub fn note(&self) -> Option<&str> {
        let later = match &self.engine {
            Engine::Ring(ring) => ring.note(),
            Engine::Wide(ring) => ring.note(),
            Engine::Threads(_) => None,
        };
        self.note.as_deref().or(later)
    }

    /// The arena is registered with the kernel.
    pub fn has_fixed_buffers(&self) -> bool {
        match &self.engine {
            Engine::Ring(ring) => ring.has_fixed_buffers(),
            Engine::Wide(ring) => ring.has_fixed_buffers(),
            Engine::Threads(_) => false,
        }
    }

    /// Lets go of a device's registered descriptor once nothing is in flight on it, so that the file can be closed
    /// (and the space of an unlinked one returned) before the queue is dropped.
    pub fn forget(&mut self, device: &Arc<dyn Device>) {
        match &mut self.engine {
            Engine::Ring(ring) => ring.forget(device),
            Engine::Wide(ring) => ring.forget(device),
            Engine::Threads(_) => {}
        }
    }

    /// Operations pushed and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.slab.active()
    }

    /// Operations at most.
    pub fn depth(&self) -> usize {
        self.slab.depth()
    }

    /// Executes pushed operations of inline devices.
    fn run_inline(&mut self) -> usize {
        let count = self.inline.len();
        for at in 0..count {
            let index = self.inline[at];
            if let Some(op) = self.slab.entry(index).op.take() {
                let (op, result, latency) = self.execute_inline(op);
                self.slab.entry(index).op = Some(op);
                self.slab.finish_virtual(index, result, latency);
            }
        }
        self.inline.clear();
        count
    }

    /// One inline operation, split and continued as the kernel's are, held against the deadline in virtual time.
    fn execute_inline(&self, mut op: Op) -> (Op, Result<usize>, Duration) {
        let device = op.device.clone();
        let Target::Inline(io) = device.target() else {
            let error = Error::new(ErrorKind::Invalid, format!("{}: not an inline device", op.describe()));
            return (op, Err(error), Duration::ZERO);
        };
        let mut latency = Duration::ZERO;
        let mut done = 0;
        loop {
            let (before, outcome) = (done, step_inline(&mut op, io, done, device.max_transfer() as usize));
            latency = latency.saturating_add(outcome.latency);
            if latency > self.deadline {
                let error = Error::new(
                    ErrorKind::Timeout,
                    format!("{}: no answer within {} ms", op.describe(), self.deadline.as_millis()),
                );
                return (op, Err(error), latency);
            }
            let got = match outcome.result {
                Ok(got) => got,
                Err(error) => return (op, Err(error), latency),
            };
            done += got;
            let len = if op.verb == Verb::Flush { 0 } else { op.range.len() };
            if done >= len {
                return (op, Ok(len), latency);
            }
            match slab::advance_short(&op, before, done) {
                Ok(slab::Short::End(total)) => return (op, Ok(total), latency),
                Ok(slab::Short::Resume(at)) => done = at,
                Err(error) => return (op, Err(error), latency),
            }
        }
    }
}

fn step_inline(op: &mut Op, io: &dyn InlineIo, done: usize, max: usize) -> InlineOutcome {
    let offset = op.offset + done as u64;
    let start = op.range.start + done;
    let end = op.range.end.min(start.saturating_add(max));
    match (op.verb, op.buffer.as_mut()) {
        (Verb::Read, Some(buffer)) => io.inline_read(offset, &mut buffer[start..end]),
        (Verb::Write, Some(buffer)) => io.inline_write(offset, &buffer[start..end]),
        (Verb::Flush, _) => io.inline_flush(),
        (Verb::Discard, _) => io.inline_discard(offset, (op.range.end - start) as u64),
        (Verb::Read | Verb::Write, None) => InlineOutcome {
            result: Err(Error::new(ErrorKind::Invalid, format!("{}: it has no buffer", op.describe()))),
            latency: Duration::ZERO,
        },
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // Everything pushed still happens. Ends for sure: each operation is answered or expires.
        while self.slab.active() > 0 {
            if let Err(error) = self.wait(1) {
                tracing::error!("drain a queue of {} operations: {error}", self.slab.active());
                break;
            }
            while self.slab.pop().is_some() {}
        }
        let held = self.slab.active() + self.slab.zombies();
        if held > 0 {
            tracing::error!("{held} operations did not end within the deadline: their memory stays theirs");
        }
        match &mut self.engine {
            Engine::Ring(_) | Engine::Wide(_) if held > 0 => std::mem::forget(self.slab.take_held()),
            Engine::Ring(ring) => ring.close(),
            Engine::Wide(ring) => ring.close(),
            // A worker owns what it executes, so nothing has to be leaked here.
            Engine::Threads(_) => {}
        }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("backend", &self.backend())
            .field("depth", &self.depth())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

/// Queue depth of [`with_thread_queue`].
const THREAD_QUEUE_DEPTH: u32 = 64;

thread_local! {
    static THREAD_QUEUE: RefCell<Option<(Queue, usize)>> = const { RefCell::new(None) };
}

/// Runs `f` with this thread's own queue (depth 64, latencies not measured, files not registered), made at first
/// use and made anew when `arena` is another one than last time. What `f` leaves in flight is drained. A call
/// inside a call gets a queue of its own.
pub fn with_thread_queue<R>(arena: Option<&Arena>, f: impl FnOnce(&mut Queue) -> R) -> Result<R> {
    let id = arena.map_or(0, Arena::id);
    let kept = THREAD_QUEUE.with(|slot| slot.borrow_mut().take()).filter(|(_, kept_id)| *kept_id == id);
    let mut queue = match kept {
        Some((queue, _)) => queue,
        None => Queue::builder()
            .depth(THREAD_QUEUE_DEPTH)
            .arena(arena)
            .measure_latency(false)
            .register_files(false)
            .build()?,
    };
    // Taken out while in use: a panic in `f` drops (and so drains) the queue instead of leaving it half used.
    let result = f(&mut queue);
    while queue.in_flight() > 0 {
        queue.wait(1)?;
        queue.reap(drop);
    }
    queue.reap(drop);
    if queue.slab.zombies() == 0 {
        THREAD_QUEUE.with(|slot| *slot.borrow_mut() = Some((queue, id)));
    }
    Ok(result)
}
