//! The threads: pieces of operations, between tensors, buffers and the store.

use std::sync::{Arc, PoisonError};

use nvme::Buffer;

use super::Shared;
use super::queue::{Kind, Piece, Running};
use crate::driver::{Batch, Direction, Driver, Part, Stream};
use crate::error::{Error, ErrorKind, Result};

/// Streams that a thread keeps.
const STREAMS: usize = 4;

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
}

/// Takes pieces until the end.
pub(super) fn run(shared: &Shared, side: Side, ring: Vec<Buffer>) {
    let mut worker = Worker { shared, ring, streams: Vec::new() };
    let mut queues = shared.queues();
    loop {
        if queues.stopped {
            return;
        }
        let piece = match side {
            Side::Read => queues.reads.pop_front(),
            Side::Write => queues.writes.pop_front(),
        };
        let Some(mut piece) = piece else {
            queues = shared.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let failed = queues.has_failed();
        drop(queues);
        let own = piece.buffers.take();
        let is_own = own.is_some();
        let buffers = own.unwrap_or_else(|| match failed {
            // What it had may have gone with the failure; pieces are answered all the same.
            true => Vec::new(),
            false => worker.ring.drain(..piece.count as usize).collect(),
        });
        let done = if failed { Ok(buffers) } else { worker.carry_out(&piece, buffers) };
        queues = shared.queues();
        let buffers = done.unwrap_or_else(|error| {
            queues.fail(&error);
            Vec::new()
        });
        match is_own {
            true => queues.done(shared, &piece.running, piece.first, buffers),
            false => {
                worker.ring.extend(buffers);
                queues.done(shared, &piece.running, piece.first, Vec::new());
            }
        }
        shared.changed.notify_all();
    }
}

impl Worker<'_> {
    fn carry_out(&mut self, piece: &Piece, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let running = &piece.running;
        let op = &running.op;
        match op.kind {
            Kind::Fetch => {
                let buffers = match running.in_ram {
                    true => buffers,
                    false => self.shared.store.read(op.unit, piece.first, buffers)?,
                };
                let buffers = self.copy(Direction::ToDevice, piece, buffers)?;
                self.shared.queues().copied(running);
                Ok(buffers)
            }
            Kind::Store { write } => {
                let buffers = self.copy(Direction::ToHost, piece, buffers)?;
                self.shared.queues().copied(running);
                self.shared.changed.notify_all();
                match write || !running.ram {
                    true => self.write(piece, buffers),
                    false => Ok(buffers),
                }
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

    /// Copies a piece between its buffers and its tensor, and waits for it.
    fn copy(&mut self, direction: Direction, piece: &Piece, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let running = &piece.running;
        let Some(target) = &running.op.target else {
            return Err(Error::new(ErrorKind::Invalid, "a copy without a tensor"));
        };
        if target.after != 0 {
            target.driver.wait_event(target.after)?;
        }
        let block = self.shared.store.block_bytes() as usize;
        let mut batch = Batch { buffers, ..Batch::new(direction) };
        for index in 0..piece.count {
            let number = piece.first + index;
            let device = target.address + u64::from(number) * block as u64;
            let len = block_len(running, block, number);
            batch.parts.push(Part { buffer: index, offset: 0, device, len });
        }
        let driver = target.driver.clone();
        let stream = self.stream(&driver)?;
        let mut back = Vec::new();
        let copied = match stream.copy(batch) {
            Ok(()) => stream.finish(&mut |batch| back.extend(batch.buffers)),
            Err(refused) => Err(refused.error),
        };
        if copied.is_err() {
            // Its memory is waited for by whoever drops the stream.
            self.streams.retain(|(known, _)| !Arc::ptr_eq(known, &driver));
        }
        copied.map(|()| back)
    }
}

fn block_len(running: &Running, block: usize, number: u32) -> usize {
    let before = u64::from(number) * block as u64;
    (running.op.len - before).min(block as u64) as usize
}
