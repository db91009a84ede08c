//! What runs when: operations of a unit one after the other, commits between them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use engine::state::Draft;
use nvme::Buffer;

use super::{Moved, Shared, Stage, Target, Ticket};
use crate::error::{Error, ErrorKind, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Pool or RAM share to tensor.
    Fetch,
    /// Tensor to RAM share, and to the pool.
    Store { write: bool },
    /// RAM share to pool.
    Flush,
}

/// One call.
#[derive(Debug)]
pub(super) struct Op {
    pub unit: u32,
    pub len: u64,
    pub kind: Kind,
    pub target: Option<Target>,
    /// Of the next commit when it was asked for.
    pub epoch: u64,
    /// What its tensor is copied from still: it begins when that has been copied.
    pub behind: Option<Arc<Ticket>>,
    pub ticket: Arc<Ticket>,
}

impl Op {
    fn writes(&self) -> bool {
        matches!(self.kind, Kind::Store { .. } | Kind::Flush)
    }

    fn may_begin(&self) -> bool {
        self.behind.as_ref().is_none_or(|ticket| ticket.progress().reached(Stage::Copied))
    }
}

/// An operation that has begun.
#[derive(Debug)]
pub(super) struct Running {
    pub op: Op,
    pub draft: Mutex<Option<Arc<Draft>>>,
    /// Whether its blocks are in the RAM share already.
    pub in_ram: bool,
    /// Whether the unit has buffers of its own.
    pub ram: bool,
    left: Mutex<Left>,
}

#[derive(Debug)]
struct Left {
    copies: usize,
    pieces: usize,
}

/// Some blocks of an operation.
#[derive(Debug)]
pub(super) struct Piece {
    pub running: Arc<Running>,
    pub first: u32,
    pub count: u32,
    /// Of the unit's own.
    pub buffers: Option<Vec<Buffer>>,
    /// What `buffers` had is the unit's, wherever it is now.
    pub own: bool,
}

/// Bytes of a block of a unit.
pub(super) fn block_len(unit_len: u64, block_bytes: u32, block: u32) -> usize {
    let before = u64::from(block) * u64::from(block_bytes);
    (unit_len - before).min(u64::from(block_bytes)) as usize
}

#[derive(Debug, Default)]
pub(super) struct UnitQueue {
    waiting: VecDeque<Op>,
    busy: bool,
    /// One buffer a block; taken while a piece uses it. Empty: the unit is not in the RAM share.
    pub ram: Vec<Option<Buffer>>,
    /// The buffers hold the unit's bytes.
    filled: bool,
    /// And the store does not.
    dirty: bool,
}

#[derive(Debug)]
struct Commit {
    epoch: u64,
    meta: Vec<u8>,
    ticket: Arc<Ticket>,
}

#[derive(Debug, Default)]
pub(super) struct Queues {
    units: Vec<UnitQueue>,
    /// From the drive, one block each.
    pub reads: VecDeque<Piece>,
    /// From the RAM share.
    pub copies: VecDeque<Piece>,
    /// To the RAM share.
    pub keeps: VecDeque<Piece>,
    pub writes: VecDeque<Piece>,
    commits: VecDeque<Commit>,
    epoch: u64,
    /// Stores that are not over, by epoch.
    unfinished: BTreeMap<u64, usize>,
    /// Written, but to be named by a later commit than the one that is made.
    held: Vec<Arc<Running>>,
    /// Units whose next operation waits for a tensor that is copied from.
    parked: Vec<u32>,
    failed: Option<(ErrorKind, String)>,
    pub stopped: bool,
    pub moved: Moved,
}

impl Queues {
    pub fn grow(&mut self, units: &[u64]) {
        self.units.resize_with(units.len(), UnitQueue::default);
    }

    pub fn unit(&mut self, unit: u32) -> &mut UnitQueue {
        &mut self.units[unit as usize]
    }

    pub fn submit(&mut self, shared: &Shared, mut op: Op) {
        op.epoch = self.epoch;
        if op.writes() {
            *self.unfinished.entry(op.epoch).or_default() += 1;
        }
        let unit = op.unit;
        self.unit(unit).waiting.push_back(op);
        self.next(shared, unit);
    }

    pub fn commit(&mut self, shared: &Shared, meta: Vec<u8>, ticket: Arc<Ticket>) {
        for unit in 0..self.units.len() as u32 {
            // What the caller has stored by now, also where it is not carried out yet.
            let queue = self.unit(unit);
            let will_be = queue.waiting.iter().any(|op| op.kind == Kind::Store { write: false });
            if queue.dirty || queue.busy && !queue.ram.is_empty() || will_be {
                let op = Op {
                    unit,
                    len: shared.store.units()[unit as usize],
                    kind: Kind::Flush,
                    target: None,
                    epoch: 0,
                    behind: None,
                    ticket: Arc::default(),
                };
                self.submit(shared, op);
            }
        }
        self.commits.push_back(Commit { epoch: self.epoch, meta, ticket });
        self.epoch += 1;
    }

    /// Begins what the unit has to do next.
    fn next(&mut self, shared: &Shared, unit: u32) {
        loop {
            let failed = self.failed.clone();
            let queue = self.unit(unit);
            if queue.busy {
                return;
            }
            if failed.is_none() && queue.waiting.front().is_some_and(|op| !op.may_begin()) {
                if !self.parked.contains(&unit) {
                    self.parked.push(unit);
                }
                return;
            }
            let Some(op) = queue.waiting.pop_front() else { return };
            if let Some(error) = failed {
                self.over(&op);
                op.ticket.set(|progress| (progress.done, progress.error) = (true, Some(error)));
                self.unpark(shared);
                continue;
            }
            let (ram, in_ram) = (!queue.ram.is_empty(), queue.filled);
            if op.kind == Kind::Flush && !queue.dirty {
                self.over(&op);
                continue;
            }
            queue.busy = true;
            if matches!(op.kind, Kind::Store { .. }) {
                queue.filled = false;
            }
            let blocks = op.len.div_ceil(u64::from(shared.store.block_bytes())) as u32;
            let reads = op.kind == Kind::Fetch && !in_ram;
            let batch = match op.kind {
                Kind::Fetch if reads => 1,
                Kind::Fetch => shared.options.copies,
                Kind::Store { write: false } if ram => shared.options.copies,
                _ => shared.options.batch,
            } as u32;
            let pieces = blocks.div_ceil(batch) as usize;
            let left = Mutex::new(Left { copies: pieces, pieces });
            let running = Arc::new(Running { op, draft: Mutex::default(), in_ram, ram, left });
            let mut first = 0;
            while first < blocks {
                let count = (blocks - first).min(batch);
                let buffers = ram.then(|| {
                    let own = &mut self.unit(unit).ram[first as usize..(first + count) as usize];
                    own.iter_mut().filter_map(Option::take).collect()
                });
                let piece = Piece { running: running.clone(), first, count, buffers, own: ram };
                match running.op.kind {
                    Kind::Fetch if reads => self.reads.push_back(piece),
                    Kind::Fetch => self.copies.push_back(piece),
                    Kind::Store { write: false } if ram => self.keeps.push_back(piece),
                    _ => self.writes.push_back(piece),
                }
                first += count;
            }
            return;
        }
    }

    /// The tensor's part of a piece is over.
    pub fn copied(&mut self, shared: &Shared, running: &Running) {
        let last = {
            let mut left = running.left.lock().unwrap_or_else(PoisonError::into_inner);
            left.copies -= 1;
            left.copies == 0
        };
        if last {
            running.op.ticket.set(|progress| progress.copied = true);
            self.unpark(shared);
        }
    }

    /// A tensor is free, or nothing is done any more: who waited for it looks again.
    fn unpark(&mut self, shared: &Shared) {
        for unit in std::mem::take(&mut self.parked) {
            self.next(shared, unit);
        }
    }

    /// A piece is over; its buffers come back where they are the unit's.
    pub fn done(&mut self, shared: &Shared, running: &Arc<Running>, first: u32, buffers: Vec<Buffer>) {
        if running.ram {
            let own = &mut self.unit(running.op.unit).ram[first as usize..];
            own.iter_mut().zip(buffers).for_each(|(place, buffer)| *place = Some(buffer));
        }
        let last = {
            let mut left = running.left.lock().unwrap_or_else(PoisonError::into_inner);
            left.pieces -= 1;
            left.pieces == 0
        };
        if !last {
            return;
        }
        let waits = self.commits.front().is_some_and(|commit| running.op.epoch > commit.epoch);
        match running.op.writes() && waits {
            true => self.held.push(running.clone()),
            false => self.finish(shared, running),
        }
    }

    /// A piece is over, with its buffers or why it failed; `copied`: its tensor's part is over by that, too. Returns the buffers that are the thread's.
    pub fn over_with(
        &mut self,
        shared: &Shared,
        piece: &Piece,
        buffers: Result<Vec<Buffer>>,
        copied: bool,
    ) -> Vec<Buffer> {
        // Before anybody is told of an end: it ended badly.
        let buffers = buffers.unwrap_or_else(|error| {
            self.fail(&error);
            Vec::new()
        });
        if copied {
            self.copied(shared, &piece.running);
        }
        let (own, threads) = if piece.own { (buffers, Vec::new()) } else { (Vec::new(), buffers) };
        self.done(shared, &piece.running, piece.first, own);
        threads
    }

    /// All pieces are over, and no commit is in the way.
    fn finish(&mut self, shared: &Shared, running: &Arc<Running>) {
        let op = &running.op;
        let draft = running.draft.lock().unwrap_or_else(PoisonError::into_inner).take();
        if self.failed.is_none()
            && let Some(draft) = draft
            && let Err(error) = shared.store.publish(&draft)
        {
            self.fail(&error.into());
        }
        let failed = self.failed.clone();
        let queue = self.unit(op.unit);
        queue.busy = false;
        queue.filled = running.ram && failed.is_none();
        match op.kind {
            Kind::Store { write } => {
                queue.dirty = running.ram && !write;
                self.moved.stored_bytes += op.len;
            }
            Kind::Flush => queue.dirty = false,
            Kind::Fetch => {
                self.moved.fetched_bytes += op.len;
                self.moved.ram_bytes += if running.in_ram { op.len } else { 0 };
            }
        }
        self.over(op);
        op.ticket.set(|progress| (progress.copied, progress.done, progress.error) = (true, true, failed));
        self.next(shared, op.unit);
        self.unpark(shared);
    }

    fn over(&mut self, op: &Op) {
        if op.writes()
            && let Some(count) = self.unfinished.get_mut(&op.epoch)
        {
            *count -= 1;
            if *count == 0 {
                self.unfinished.remove(&op.epoch);
            }
        }
    }

    /// From here on nothing succeeds.
    pub fn fail(&mut self, error: &Error) {
        let why = (error.kind(), error.to_string());
        self.failed.get_or_insert(why);
    }

    /// Whether there is a commit, and what it names is stored.
    pub fn may_commit(&self) -> bool {
        self.commits.front().is_some_and(|commit| {
            let first = self.unfinished.keys().next();
            first.is_none_or(|first| *first > commit.epoch)
        })
    }

    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    pub fn stop(&mut self) {
        self.stopped = true;
        let closed = Error::new(ErrorKind::Cancelled, "the state was closed before this was done");
        self.fail(&closed);
        let error = self.failed.clone();
        let mut tickets: Vec<Arc<Ticket>> = self.commits.iter().map(|commit| commit.ticket.clone()).collect();
        tickets.extend(self.units.iter().flat_map(|unit| unit.waiting.iter().map(|op| op.ticket.clone())));
        let pieces = self
            .reads
            .iter()
            .chain(&self.copies)
            .chain(&self.keeps)
            .chain(&self.writes)
            .map(|piece| piece.running.op.ticket.clone());
        tickets.extend(pieces.chain(self.held.iter().map(|running| running.op.ticket.clone())));
        for ticket in tickets {
            ticket.set(|progress| (progress.done, progress.error) = (true, error.clone()));
        }
    }
}

/// The thread that commits.
pub(super) fn commits(shared: &Shared) {
    let mut queues = shared.queues();
    loop {
        if queues.stopped {
            return;
        }
        if !queues.may_commit() {
            queues = shared.sleepers.commits.wait(queues).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let meta =
            queues.commits.front_mut().map(|commit| std::mem::take(&mut commit.meta)).unwrap_or_default();
        let failed = queues.has_failed();
        drop(queues);
        let done = if failed { Ok(()) } else { shared.store.commit(&meta) };
        queues = shared.queues();
        if let Err(error) = done {
            queues.fail(&error.into());
        }
        let error = queues.failed.clone();
        if let Some(commit) = queues.commits.pop_front() {
            commit.ticket.set(|progress| (progress.done, progress.error) = (true, error));
        }
        let until = queues.commits.front().map_or(u64::MAX, |commit| commit.epoch);
        let held = std::mem::take(&mut queues.held);
        for running in held {
            match running.op.epoch <= until {
                true => queues.finish(shared, &running),
                false => queues.held.push(running),
            }
        }
        shared.wake(&queues);
    }
}
