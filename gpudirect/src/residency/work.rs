//! The threads: pieces of operations, between tensors, buffers and the store.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use nvme::Buffer;

use super::Shared;
use super::queue::{Kind, Piece, Running};
use crate::driver::{Batch, Direction, Driver, Part, Stream};
use crate::error::{Error, ErrorKind, Result};

/// Streams that a thread keeps.
const STREAMS: usize = 4;
/// Copies between tensors and the RAM share that a thread has under way: the bus never waits for the host.
const FLYING: usize = 3;

/// Which pieces a thread takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Read,
    Write,
}

/// A thread's own.
struct Worker<'a> {
    shared: &'a Shared,
    ring: Vec<Buffer>,
    streams: Vec<(Arc<dyn Driver>, Box<dyn Stream>)>,
    /// Copies that are under way, all in the stream of one device, in order.
    flying: VecDeque<Piece>,
}

/// Takes pieces until the end.
pub(super) fn run(shared: &Shared, side: Side, ring: Vec<Buffer>) {
    let mut worker = Worker { shared, ring, streams: Vec::new(), flying: VecDeque::new() };
    let mut queues = shared.queues();
    loop {
        if queues.stopped {
            drop(queues);
            let _ = worker.land(0);
            return;
        }
        let piece = match side {
            Side::Read => queues.reads.pop_front(),
            Side::Write => queues.writes.pop_front(),
        };
        let failed = queues.has_failed();
        if piece.is_none() && worker.flying.is_empty() {
            queues = shared.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        drop(queues);
        let done = match piece {
            Some(piece) => worker.take(piece, failed),
            None => worker.land(worker.flying.len() - 1),
        };
        queues = shared.queues();
        if let Err(error) = done {
            queues.fail(&error);
        }
        shared.changed.notify_all();
    }
}

impl Worker<'_> {
    fn take(&mut self, mut piece: Piece, failed: bool) -> Result<()> {
        let own = piece.buffers.take();
        if failed {
            // What it had may have gone with the failure; pieces are answered all the same.
            self.over(&piece, own.unwrap_or_default());
            return self.land(0);
        }
        let running = piece.running.clone();
        match (running.op.kind, own) {
            (Kind::Fetch, Some(buffers)) if running.in_ram => self.fly(Direction::ToDevice, piece, buffers),
            (Kind::Store { write: false }, Some(buffers)) => self.fly(Direction::ToHost, piece, buffers),
            (_, own) => {
                let landed = self.land(0);
                let is_own = own.is_some();
                let buffers = own.unwrap_or_else(|| self.ring.drain(..piece.count as usize).collect());
                let done = landed.and_then(|()| self.carry_out(&piece, buffers));
                let (buffers, done) = match done {
                    Ok(buffers) => (buffers, Ok(())),
                    Err(error) => (Vec::new(), Err(error)),
                };
                let own = if is_own { buffers } else { self.keep(buffers) };
                if let Err(error) = &done {
                    self.shared.queues().fail(error);
                }
                self.over(&piece, own);
                done
            }
        }
    }

    /// Buffers of the thread come back.
    fn keep(&mut self, buffers: Vec<Buffer>) -> Vec<Buffer> {
        self.ring.extend(buffers);
        Vec::new()
    }

    fn over(&self, piece: &Piece, own: Vec<Buffer>) {
        self.shared.queues().done(self.shared, &piece.running, piece.first, own);
    }

    /// Starts a copy between a tensor and the unit's own buffers; it is over when it [`land`](Self::land)s.
    fn fly(&mut self, direction: Direction, piece: Piece, buffers: Vec<Buffer>) -> Result<()> {
        let other = |flying: &Piece| match (&flying.running.op.target, &piece.running.op.target) {
            (Some(one), Some(two)) => !Arc::ptr_eq(&one.driver, &two.driver),
            _ => true,
        };
        let before = match self.flying.front().is_some_and(other) {
            true => self.land(0),
            false => self.land(FLYING - 1),
        };
        let started = before.and_then(|()| self.start(direction, &piece, buffers));
        if let Err(error) = started {
            self.shared.queues().fail(&error);
            self.over(&piece, Vec::new());
            return Err(error);
        }
        self.flying.push_back(piece);
        Ok(())
    }

    /// Waits until at most so many copies are under way, and says that the others are over.
    fn land(&mut self, most: usize) -> Result<()> {
        let mut done = Ok(());
        while self.flying.len() > most {
            let target = self.flying.front().and_then(|piece| piece.running.op.target.as_ref());
            let driver = target.map(|target| target.driver.clone());
            let stream = self
                .streams
                .iter_mut()
                .find(|(known, _)| driver.as_ref().is_some_and(|driver| Arc::ptr_eq(known, driver)));
            let mut back = Vec::new();
            if let (Some((_, stream)), Ok(())) = (stream, &done) {
                done = stream.reap(true, &mut |batch| back.push(batch.buffers)).map(drop);
            }
            if back.is_empty() {
                // Nothing that flies can be relied on; its memory is waited for by whoever drops the stream.
                done = done.and_then(|()| Err(Error::new(ErrorKind::Device, "a copy that nobody knows of")));
                self.streams.clear();
                back = self.flying.iter().map(|_| Vec::new()).collect();
                if let Err(error) = &done {
                    self.shared.queues().fail(error);
                }
            }
            let mut queues = self.shared.queues();
            for buffers in back {
                let Some(piece) = self.flying.pop_front() else { break };
                queues.copied(&piece.running);
                queues.done(self.shared, &piece.running, piece.first, buffers);
            }
            drop(queues);
            self.shared.changed.notify_all();
        }
        done
    }

    fn carry_out(&mut self, piece: &Piece, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let running = &piece.running;
        let op = &running.op;
        match op.kind {
            Kind::Fetch => {
                let buffers = self.shared.store.read(op.unit, piece.first, buffers)?;
                let buffers = self.copy(Direction::ToDevice, piece, buffers)?;
                self.shared.queues().copied(running);
                Ok(buffers)
            }
            Kind::Store { .. } => {
                let buffers = self.copy(Direction::ToHost, piece, buffers)?;
                self.shared.queues().copied(running);
                self.shared.changed.notify_all();
                self.write(piece, buffers)
            }
            Kind::Flush => {
                self.shared.queues().copied(running);
                self.write(piece, buffers)
            }
        }
    }

    fn write(&self, piece: &Piece, mut buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let (store, running) = (&self.shared.store, &piece.running);
        let block = store.block_bytes() as usize;
        for (index, buffer) in buffers.iter_mut().enumerate() {
            let len = block_len(running, block, piece.first + index as u32);
            buffer[len..].fill(0);
        }
        // Its first piece begins it; the store is written to beside, without the lock.
        let mut draft = running.draft.lock().unwrap_or_else(PoisonError::into_inner);
        if draft.is_none() {
            *draft = Some(Arc::new(store.begin(running.op.unit)?));
        }
        let begun = draft.clone();
        drop(draft);
        match begun {
            Some(draft) => Ok(store.write(&draft, piece.first, buffers)?),
            None => Err(Error::new(ErrorKind::Invalid, "a version that was not begun")),
        }
    }

    fn stream(&mut self, driver: &Arc<dyn Driver>) -> Result<&mut Box<dyn Stream>> {
        let at = match self.streams.iter().position(|(known, _)| Arc::ptr_eq(known, driver)) {
            Some(at) => at,
            None => {
                if self.streams.len() >= STREAMS {
                    self.streams.remove(0);
                }
                self.streams.push((driver.clone(), driver.stream()?));
                self.streams.len() - 1
            }
        };
        Ok(&mut self.streams[at].1)
    }

    /// Starts to copy a piece between its buffers and its tensor.
    fn start(&mut self, direction: Direction, piece: &Piece, buffers: Vec<Buffer>) -> Result<()> {
        let running = &piece.running;
        let Some(target) = &running.op.target else {
            return Err(Error::new(ErrorKind::Invalid, "a copy without a tensor"));
        };
        let block = self.shared.store.block_bytes() as usize;
        let mut batch = Batch { buffers, ..Batch::new(direction) };
        for index in 0..piece.count {
            let number = piece.first + index;
            let device = target.address + u64::from(number) * block as u64;
            let len = block_len(running, block, number);
            batch.parts.push(Part { buffer: index, offset: 0, device, len });
        }
        let stream = self.stream(&target.driver)?;
        stream.wait_event(target.after)?;
        stream.copy(batch).map_err(|refused| refused.error)
    }

    /// Copies a piece, and waits for it. Nothing else is under way.
    fn copy(&mut self, direction: Direction, piece: &Piece, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let mut back = Vec::new();
        let copied = self.start(direction, piece, buffers).and_then(|()| match &piece.running.op.target {
            Some(target) => self.stream(&target.driver)?.finish(&mut |batch| back.extend(batch.buffers)),
            None => Ok(()),
        });
        if copied.is_err() {
            // Its memory is waited for by whoever drops the stream.
            self.streams.clear();
        }
        copied.map(|()| back)
    }
}

fn block_len(running: &Running, block: usize, number: u32) -> usize {
    let before = u64::from(number) * block as u64;
    (running.op.len - before).min(block as u64) as usize
}
