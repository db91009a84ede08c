//! The threads that copy to and from the RAM share and write to the drive.

use std::sync::{Arc, PoisonError};

use nvme::Buffer;

use super::Shared;
use super::flights::Flights;
use super::queue::{Kind, Piece, block_len};
use crate::driver::Direction;
use crate::error::{Error, ErrorKind, Result};

/// Copies between tensors and the RAM share that a thread has under way: the bus never waits for the host. One thread each way has one stream, where
/// copies end in their order: of streams that always have something to do, a device serves one for milliseconds before it looks at the next.
const FLYING: usize = 8;

/// Which pieces a thread takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// RAM share to tensor.
    Copy,
    /// Tensor to RAM share.
    Keep,
    /// Tensor or RAM share to the drive.
    Write,
}

/// A thread's own.
struct Worker<'a> {
    shared: &'a Shared,
    ring: Vec<Buffer>,
    flights: Flights,
}

/// Takes pieces until the end. `ring`: as many buffers as a piece has blocks at most, where units have none of their own.
pub(super) fn run(shared: &Shared, side: Side, ring: Vec<Buffer>) {
    let mut worker = Worker { shared, ring, flights: Flights::default() };
    let sleepers = match side {
        Side::Copy => &shared.sleepers.copies,
        Side::Keep => &shared.sleepers.keeps,
        Side::Write => &shared.sleepers.writes,
    };
    let mut queues = shared.queues();
    loop {
        if queues.stopped {
            drop(queues);
            worker.land(0);
            return;
        }
        let piece = match side {
            Side::Copy => queues.copies.pop_front(),
            Side::Keep => queues.keeps.pop_front(),
            Side::Write => queues.writes.pop_front(),
        };
        let failed = queues.has_failed();
        if piece.is_none() && worker.flights.len() == 0 {
            queues = sleepers.wait(queues).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        drop(queues);
        match piece {
            Some(piece) => worker.take(piece, failed),
            None => worker.land(worker.flights.len() - 1),
        }
        queues = shared.queues();
    }
}

impl Worker<'_> {
    fn take(&mut self, mut piece: Piece, failed: bool) {
        let own = piece.buffers.take();
        if failed {
            // What it had may have gone with the failure; pieces are answered all the same.
            self.over(&piece, Ok(own.unwrap_or_default()), false);
            return self.land(0);
        }
        match (piece.running.op.kind, own) {
            (Kind::Fetch, Some(buffers)) => self.fly(Direction::ToDevice, piece, buffers),
            (Kind::Store { write: false }, Some(buffers)) => self.fly(Direction::ToHost, piece, buffers),
            (_, own) => {
                self.land(0);
                let buffers = own.unwrap_or_else(|| self.ring.drain(..piece.count as usize).collect());
                let done = self.write_back(&piece, buffers);
                self.over(&piece, done, false);
            }
        }
    }

    /// A piece is over; its buffers go back to whom they belong to.
    fn over(&mut self, piece: &Piece, buffers: Result<Vec<Buffer>>, copied: bool) {
        let mut queues = self.shared.queues();
        self.ring.extend(queues.over_with(self.shared, piece, buffers, copied));
        self.shared.wake(&queues);
    }

    /// Starts a copy between a tensor and the unit's own buffers; it is over when it [`land`](Self::land)s.
    fn fly(&mut self, direction: Direction, piece: Piece, buffers: Vec<Buffer>) {
        self.land(FLYING - 1);
        let mut ended = Vec::new();
        self.flights.start(direction, piece, self.shared.store.block_bytes(), buffers, &mut ended);
        self.landed(ended);
    }

    /// Waits until at most so many copies are under way, and says that the others are over.
    fn land(&mut self, most: usize) {
        while self.flights.len() > most {
            let mut ended = Vec::new();
            self.flights.land(true, &mut ended);
            self.landed(ended);
        }
    }

    fn landed(&mut self, ended: Vec<(Piece, Result<Vec<Buffer>>)>) {
        for (piece, buffers) in ended {
            self.over(&piece, buffers, true);
        }
    }

    /// Copies a piece from its tensor, unless the RAM share has it, and writes it.
    fn write_back(&mut self, piece: &Piece, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let running = &piece.running;
        let buffers = match running.op.kind {
            Kind::Flush => buffers,
            _ => self.take_out(piece, buffers)?,
        };
        let mut queues = self.shared.queues();
        queues.copied(self.shared, running);
        self.shared.wake(&queues);
        drop(queues);
        self.write(piece, buffers)
    }

    /// Copies a piece from its tensor, and waits for it. Nothing else is under way.
    fn take_out(&mut self, piece: &Piece, buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let copied = Piece { running: piece.running.clone(), buffers: None, ..*piece };
        let mut ended = Vec::new();
        let block = self.shared.store.block_bytes();
        self.flights.start(Direction::ToHost, copied, block, buffers, &mut ended);
        self.flights.land(true, &mut ended);
        let (_, buffers) =
            ended.pop().ok_or_else(|| Error::new(ErrorKind::Device, "a copy that nobody knows of"))?;
        buffers
    }

    fn write(&self, piece: &Piece, mut buffers: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let (store, running) = (&self.shared.store, &piece.running);
        for (block, buffer) in (piece.first..).zip(&mut buffers) {
            let len = block_len(running.op.len, store.block_bytes(), block);
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
}
