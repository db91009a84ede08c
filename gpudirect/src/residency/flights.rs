//! Copies of a thread that are under way, in the streams of the devices that it copies to and from.

use std::collections::VecDeque;
use std::sync::Arc;

use nvme::Buffer;

use super::queue::{Piece, block_len};
use crate::driver::{Batch, Direction, Driver, Part, Stream};
use crate::error::{Error, ErrorKind, Result};

/// Streams that a thread keeps.
const STREAMS: usize = 4;

/// Copies, in order within each device.
#[derive(Default)]
pub(super) struct Flights {
    streams: Vec<Flight>,
}

struct Flight {
    driver: Arc<dyn Driver>,
    stream: Box<dyn Stream>,
    flying: VecDeque<Piece>,
}

/// A copy that ended: its piece and its buffers, or why they are not to be relied on.
pub(super) type Landed = (Piece, Result<Vec<Buffer>>);

impl Flights {
    /// Copies that are under way.
    pub fn len(&self) -> usize {
        self.streams.iter().map(|flight| flight.flying.len()).sum()
    }

    /// Starts a copy between the tensor of a piece and buffers, one for each of its blocks. What it comes to, and what had to end before it, goes
    /// to `ended`.
    pub fn start(
        &mut self,
        direction: Direction,
        piece: Piece,
        block_bytes: u32,
        buffers: Vec<Buffer>,
        ended: &mut Vec<Landed>,
    ) {
        let running = piece.running.clone();
        let Some(target) = &running.op.target else {
            let error = Error::new(ErrorKind::Invalid, "a copy without a tensor");
            return ended.push((piece, Err(error)));
        };
        let mut batch = Batch { buffers, ..Batch::new(direction) };
        for index in 0..piece.count {
            let number = piece.first + index;
            let device = target.address + u64::from(number) * u64::from(block_bytes);
            let len = block_len(running.op.len, block_bytes, number);
            batch.parts.push(Part { buffer: index, offset: 0, device, len });
        }
        let flight = match self.flight(&target.driver, ended) {
            Ok(flight) => flight,
            Err(error) => return ended.push((piece, Err(error))),
        };
        let started = flight
            .stream
            .wait_event(target.after)
            .and_then(|()| flight.stream.copy(batch).map_err(|refused| refused.error));
        match started {
            Ok(()) => flight.flying.push_back(piece),
            Err(error) => ended.push((piece, Err(error))),
        }
    }

    fn flight(&mut self, driver: &Arc<dyn Driver>, ended: &mut Vec<Landed>) -> Result<&mut Flight> {
        let at = match self.streams.iter().position(|flight| Arc::ptr_eq(&flight.driver, driver)) {
            Some(at) => at,
            None => {
                if self.streams.len() >= STREAMS {
                    while !self.streams[0].flying.is_empty() {
                        self.reap(0, true, ended);
                    }
                    self.streams.remove(0);
                }
                let stream = driver.stream()?;
                self.streams.push(Flight { driver: driver.clone(), stream, flying: VecDeque::new() });
                self.streams.len() - 1
            }
        };
        Ok(&mut self.streams[at])
    }

    /// Takes what ended; with `wait`, where copies are under way, waits for one at least.
    pub fn land(&mut self, wait: bool, ended: &mut Vec<Landed>) {
        let before = ended.len();
        for at in 0..self.streams.len() {
            self.reap(at, false, ended);
        }
        let first = self.streams.iter().position(|flight| !flight.flying.is_empty());
        if let (true, Some(at)) = (wait && ended.len() == before, first) {
            self.reap(at, true, ended);
        }
    }

    fn reap(&mut self, at: usize, wait: bool, ended: &mut Vec<Landed>) {
        let flight = &mut self.streams[at];
        if flight.flying.is_empty() {
            return;
        }
        let flying = &mut flight.flying;
        let before = flying.len();
        let done = flight.stream.reap(wait, &mut |batch| {
            ended.extend(flying.pop_front().map(|piece| (piece, Ok(batch.buffers))));
        });
        let lost = wait && flying.len() == before;
        let error = done.err().or_else(|| lost.then(|| Error::new(ErrorKind::Device, "a copy was lost")));
        if let Some(error) = error {
            // Nothing that flies can be relied on; its memory is waited for by whoever drops the stream.
            let kind = error.kind();
            let why = error.to_string();
            ended.extend(flying.drain(..).map(|piece| (piece, Err(Error::new(kind, why.clone())))));
            if let Ok(stream) = flight.driver.stream() {
                flight.stream = stream;
            }
        }
    }
}
