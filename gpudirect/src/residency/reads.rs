//! A thread that fetches from the drive: several blocks are on their way while those that came are checked and copied to their tensors.
//!
//! The queue of the drive is filled before anything else is done. Threads that each read some blocks, check them, copy them and read again end up
//! doing the same thing at the same time, and the drive idles meanwhile.

use std::sync::PoisonError;

use engine::state::Reads;
use nvme::Buffer;

use super::Shared;
use super::flights::Flights;
use super::queue::Piece;
use crate::driver::Direction;
use crate::error::{Error, Result};

/// Takes pieces until the end. `ring`: buffers for blocks that are under way.
pub(super) fn run(shared: &Shared, ring: Vec<Buffer>) {
    let most = ring.len();
    let mut reader = Reader { shared, ring, most, flights: Flights::default() };
    match shared.store.reads() {
        Ok(mut reads) => reader.run(&mut reads),
        Err(error) => reader.refuse(&error.into()),
    }
}

struct Reader<'a> {
    shared: &'a Shared,
    ring: Vec<Buffer>,
    /// Blocks under way at most.
    most: usize,
    flights: Flights,
}

impl Reader<'_> {
    fn run(&mut self, reads: &mut Reads<'_, Piece>) {
        let mut queues = self.shared.queues();
        loop {
            let failed = queues.has_failed();
            let mut begun = Vec::new();
            while reads.under_way() + begun.len() < self.most {
                // The oldest one that there is a buffer for: its unit's own, or one of the thread's.
                let takes = queues
                    .reads
                    .front()
                    .is_some_and(|piece| failed || piece.buffers.is_some() || begun.len() < self.ring.len());
                let Some(piece) = takes.then(|| queues.reads.pop_front()).flatten() else { break };
                match failed {
                    true => drop(queues.over_with(self.shared, &piece, Ok(Vec::new()), true)),
                    false => begun.push(piece),
                }
            }
            if failed {
                self.shared.wake(&queues);
            }
            let idle = begun.is_empty() && reads.under_way() == 0 && self.flights.len() == 0;
            if idle && queues.stopped {
                return;
            }
            if idle {
                queues = self.shared.sleepers.reads.wait(queues).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(queues);
            begun.into_iter().for_each(|piece| self.begin(reads, piece));
            self.land(false);
            match reads.wait() {
                Some((piece, Ok(buffer))) => self.copy(piece, buffer),
                Some((piece, Err(error))) => self.end(&piece, Err(error.into())),
                None => self.land(true),
            }
            queues = self.shared.queues();
        }
    }

    fn begin(&mut self, reads: &mut Reads<'_, Piece>, mut piece: Piece) {
        let own = piece.buffers.take().and_then(|mut own| own.pop());
        let Some(buffer) = own.or_else(|| self.ring.pop()) else { return };
        let (unit, block) = (piece.running.op.unit, piece.first);
        if let Err((piece, error)) = reads.begin(unit, block, buffer, piece) {
            self.end(&piece, Err(error.into()));
        }
    }

    fn copy(&mut self, piece: Piece, buffer: Buffer) {
        if self.shared.queues().has_failed() {
            return self.end(&piece, Ok(vec![buffer]));
        }
        let mut ended = Vec::new();
        let block = self.shared.store.block_bytes();
        self.flights.start(Direction::ToDevice, piece, block, vec![buffer], &mut ended);
        ended.into_iter().for_each(|(piece, buffers)| self.end(&piece, buffers));
    }

    fn land(&mut self, wait: bool) {
        let mut ended = Vec::new();
        self.flights.land(wait, &mut ended);
        ended.into_iter().for_each(|(piece, buffers)| self.end(&piece, buffers));
    }

    /// A piece is over; the buffer goes back to whom it belongs to.
    fn end(&mut self, piece: &Piece, buffers: Result<Vec<Buffer>>) {
        let mut queues = self.shared.queues();
        self.ring.extend(queues.over_with(self.shared, piece, buffers, true));
        self.shared.wake(&queues);
    }

    /// There is nothing to read with: whatever is asked for fails.
    fn refuse(&mut self, error: &Error) {
        let mut queues = self.shared.queues();
        queues.fail(error);
        while !queues.stopped {
            while let Some(piece) = queues.reads.pop_front() {
                drop(queues.over_with(self.shared, &piece, Ok(Vec::new()), true));
            }
            self.shared.wake(&queues);
            queues = self.shared.sleepers.reads.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
