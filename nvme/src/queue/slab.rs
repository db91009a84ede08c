//! Operations in flight, and completions that nobody reaped yet. No allocation after construction.
//!
//! ```text
//!   insert          issue              finish              reap
//! Free ----> Pushed ----> (kernel) ----> Done ----> (Completion) ----> Free
//!                            | deadline                ^
//!                            v                         | CQE in time
//!                        Cancelling -------------------+
//!                            | no CQE in time
//!                            v           reap                CQE
//!                         Zombie ----> (Completion without buffer) ----> Free
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::op::{Completion, Op, Verb};
use crate::device::DeviceKind;
use crate::error::{Error, ErrorKind, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Free,
    /// Accepted, or given to the backend.
    Active,
    /// Past its deadline; the backend was asked to cancel it.
    Cancelling,
    /// Reported (or about to be) as timed out; the backend still holds its memory.
    Zombie,
    /// Answered, waits to be reaped.
    Done,
}

/// What a backend does after the device moved some bytes.
pub(super) enum Step {
    /// Report this.
    Finish(Result<usize>),
    /// Issue the rest.
    Continue,
}

pub(super) struct Entry {
    /// Some unless Free (or, with the threads backend, while a worker owns it).
    pub(super) op: Option<Op>,
    /// Bytes moved so far.
    pub(super) done: usize,
    /// Bytes asked for.
    pub(super) len: usize,
    /// The tick at which it was pushed, or cancelled.
    epoch: u32,
    pub(super) state: State,
    /// Slot in the table of registered files.
    pub(super) file: u32,
    started: Option<Instant>,
    latency: Duration,
}

struct Ready {
    index: u32,
    result: Result<usize>,
}

pub(super) struct Slab {
    entries: Box<[Entry]>,
    free: Vec<u32>,
    ready: VecDeque<Ready>,
    /// Active or Cancelling.
    active: usize,
    zombies: usize,
    epoch: u32,
    measure: bool,
    /// Reused by `tick`.
    expired: Vec<u32>,
}

/// A deadline is this many ticks; an operation is expired one tick later, since its first may have been short.
pub(super) const TICKS: u32 = 4;

impl Slab {
    pub(super) fn new(depth: u32, measure: bool) -> Slab {
        let entry = || Entry {
            op: None,
            done: 0,
            len: 0,
            epoch: 0,
            state: State::Free,
            file: u32::MAX,
            started: None,
            latency: Duration::ZERO,
        };
        Slab {
            entries: (0..depth).map(|_| entry()).collect(),
            free: (0..depth).rev().collect(),
            ready: VecDeque::with_capacity(depth as usize),
            active: 0,
            zombies: 0,
            epoch: 0,
            measure,
            expired: Vec::with_capacity(depth as usize),
        }
    }

    /// Takes the operation, or hands it back when every slot is taken.
    #[allow(clippy::result_large_err)] // the operation itself is what comes back
    pub(super) fn insert(&mut self, op: Op) -> std::result::Result<u32, Op> {
        let Some(index) = self.free.pop() else { return Err(op) };
        let started = self.measure.then(Instant::now);
        let entry = &mut self.entries[index as usize];
        entry.done = 0;
        entry.len = if op.verb == Verb::Flush { 0 } else { op.range.len() };
        entry.op = Some(op);
        entry.epoch = self.epoch;
        entry.state = State::Active;
        entry.file = u32::MAX;
        entry.started = started;
        entry.latency = Duration::ZERO;
        self.active += 1;
        Ok(index)
    }

    pub(super) fn entry(&mut self, index: u32) -> &mut Entry {
        &mut self.entries[index as usize]
    }

    fn release(&mut self, index: u32) {
        self.entries[index as usize].state = State::Free;
        self.free.push(index);
    }

    /// In the hands of a backend, zombies not counted.
    pub(super) fn active(&self) -> usize {
        self.active
    }

    pub(super) fn zombies(&self) -> usize {
        self.zombies
    }

    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    pub(super) fn depth(&self) -> usize {
        self.entries.len()
    }

    /// One clock reading for a batch of completions; None when not measuring.
    pub(super) fn now(&self) -> Option<Instant> {
        self.measure.then(Instant::now)
    }

    /// The backend answered. Its memory is the caller's again.
    pub(super) fn finish(&mut self, index: u32, result: Result<usize>, now: Option<Instant>) {
        let entry = &mut self.entries[index as usize];
        match entry.state {
            State::Zombie => {
                // Reported long ago, or not yet reaped. Either way its buffer can go back now; a completion that
                // still waits in `ready` finds the operation without it.
                self.zombies -= 1;
                if self.ready.iter().any(|ready| ready.index == index) {
                    entry.state = State::Done;
                } else {
                    entry.op = None;
                    self.release(index);
                }
            }
            State::Active | State::Cancelling => {
                if let (Some(started), Some(now)) = (entry.started, now) {
                    entry.latency = now.saturating_duration_since(started);
                }
                entry.state = State::Done;
                self.active -= 1;
                self.ready.push_back(Ready { index, result });
            }
            State::Free | State::Done => {
                debug_assert!(false, "slot {index} answered twice");
                tracing::error!(index, "a completion for a slot that waits for none");
            }
        }
    }

    /// As `finish`, with a latency that the device named itself.
    pub(super) fn finish_virtual(&mut self, index: u32, result: Result<usize>, latency: Duration) {
        self.finish(index, result, None);
        self.entries[index as usize].latency = latency;
    }

    /// A tick passed: a quarter of the deadline. Appends what must be cancelled to the result; what was cancelled
    /// a tick ago and did not answer is reported without its buffer.
    pub(super) fn tick(&mut self) -> &[u32] {
        self.epoch = self.epoch.wrapping_add(1);
        self.expired.clear();
        if self.active == 0 {
            return &[];
        }
        for index in 0..self.entries.len() as u32 {
            let entry = &mut self.entries[index as usize];
            let age = self.epoch.wrapping_sub(entry.epoch);
            match entry.state {
                State::Active if age > TICKS => {
                    entry.state = State::Cancelling;
                    entry.epoch = self.epoch;
                    self.expired.push(index);
                }
                State::Cancelling if age > 1 => {
                    entry.state = State::Zombie;
                    self.active -= 1;
                    self.zombies += 1;
                    let what = entry.op.as_ref().map_or_else(String::new, Op::describe);
                    tracing::error!(
                        "{what}: no answer within the deadline, and the kernel could not cancel it"
                    );
                    let error = Error::new(ErrorKind::Timeout, format!("{what}: the device does not answer"));
                    self.ready.push_back(Ready { index, result: Err(error) });
                }
                _ => {}
            }
        }
        &self.expired
    }

    /// The next completion, in the order of answers.
    pub(super) fn pop(&mut self) -> Option<Completion> {
        let Ready { index, result } = self.ready.pop_front()?;
        let entry = &mut self.entries[index as usize];
        let latency = entry.latency;
        let op = if entry.state == State::Zombie {
            entry.op.as_ref().map(Op::without_buffer)?
        } else {
            let op = entry.op.take()?;
            self.release(index);
            op
        };
        Some(Completion { tag: op.tag, op, result, latency })
    }

    /// Operations that a backend still holds, to be leaked.
    pub(super) fn take_held(&mut self) -> Vec<Op> {
        let held = |entry: &Entry| matches!(entry.state, State::Active | State::Cancelling | State::Zombie);
        self.entries.iter_mut().filter(|entry| held(entry)).filter_map(|entry| entry.op.take()).collect()
    }
}

impl Entry {
    /// How many bytes the next command of an NVMe namespace carries, when its data starts at `address` in memory.
    pub(super) fn command_span(&self, address: usize) -> usize {
        let left = self.len - self.done;
        let device = self.op.as_ref().map(|op| &op.device);
        device.map_or(left, |device| {
            crate::passthrough::io::span(
                address,
                left,
                device.max_transfer() as usize,
                device.lba_size() as usize,
            )
        })
    }

    /// The device moved `got` more bytes: is that all, is there a rest to issue, or is it the end?
    pub(super) fn advance(&mut self, got: usize) -> Step {
        let before = self.done;
        self.done += got;
        if self.done >= self.len {
            return Step::Finish(Ok(self.len));
        }
        let Some(op) = &self.op else {
            return Step::Finish(Err(Error::new(ErrorKind::Invalid, "a transfer without its operation")));
        };
        match advance_short(op, before, self.done) {
            Ok(Short::End(total)) => Step::Finish(Ok(total)),
            Ok(Short::Resume(done)) => {
                self.done = done;
                Step::Continue
            }
            Err(error) => Step::Finish(Err(error)),
        }
    }
}

/// What follows a short transfer.
pub(super) enum Short {
    /// The file ends here, inside the last block asked for: so many bytes in all.
    End(usize),
    /// Go on from here, counted from the start of the operation.
    Resume(usize),
}

/// Judges a transfer that stopped at `done` of `op`'s length, having started this time at `before`.
pub(super) fn advance_short(op: &Op, before: usize, done: usize) -> Result<Short> {
    let device = &*op.device;
    let align = device.alignment() as usize;
    // Direct I/O goes on at a block boundary; the part of a block that was moved is moved again.
    let resume = done / align * align;
    if done == before && device.kind() == DeviceKind::Block {
        // Inside its length a block device moves nothing only after it was removed: the kernel then counts it as empty.
        return Err(Error::new(
            ErrorKind::Gone,
            format!("{}: the drive was removed, or became shorter, while it was in use", op.describe()),
        ));
    }
    if op.verb == Verb::Read && (done == before || resume != done) {
        let end = op.offset + done as u64;
        let rest = op.range.len() - done;
        if end == device.len() && rest < device.lba_size() as usize {
            return Ok(Short::End(done));
        }
    }
    if resume > before {
        return Ok(Short::Resume(resume));
    }
    Err(Error::new(
        ErrorKind::ShortTransfer,
        format!("{}: only {done} bytes were moved; the device is {} bytes long", op.describe(), device.len()),
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::buffer::{Arena, ArenaOptions};
    use crate::sim::{SimDevice, SimOptions};

    fn slab_with_one_read(arena: &Arena) -> (Slab, u32) {
        let device = Arc::new(SimDevice::new(1 << 20, SimOptions::default()).unwrap());
        let mut slab = Slab::new(2, true);
        let op = Op::read(device, 0, arena.alloc(8192).unwrap()).tag(5);
        let index = slab.insert(op).map_err(drop).unwrap();
        (slab, index)
    }

    fn arena() -> Arena {
        Arena::new(64 << 10, ArenaOptions::default()).unwrap()
    }

    /// Ticks until the slab asks for a cancel; how many that took.
    fn ticks_to_cancel(slab: &mut Slab, index: u32) -> u32 {
        (1..100).find(|_| slab.tick() == [index]).unwrap()
    }

    #[test]
    fn an_operation_gets_its_whole_deadline_though_its_first_tick_is_short() {
        let arena = arena();
        let (mut slab, index) = slab_with_one_read(&arena);
        assert_eq!(ticks_to_cancel(&mut slab, index), TICKS + 1);
        assert_eq!((slab.active(), slab.ready()), (1, 0), "cancelled, not yet given up");
        slab.finish(index, Err(Error::new(ErrorKind::Timeout, "late")), None);
        let done = slab.pop().unwrap();
        assert!(done.op.buffer.is_some(), "the device gave the memory back");
        assert_eq!((slab.active(), slab.zombies()), (0, 0));
    }

    #[test]
    fn memory_of_an_operation_that_cannot_be_cancelled_comes_back_with_its_answer() {
        let arena = arena();
        for reaped_first in [true, false] {
            let (mut slab, index) = slab_with_one_read(&arena);
            ticks_to_cancel(&mut slab, index);
            slab.tick();
            slab.tick();
            assert_eq!((slab.active(), slab.zombies(), slab.ready()), (0, 1, 1));
            if reaped_first {
                let done = slab.pop().unwrap();
                assert_eq!((done.tag, done.result.unwrap_err().kind()), (5, ErrorKind::Timeout));
                assert!(done.op.buffer.is_none());
                assert_eq!(arena.free_bytes(), arena.len() - 8192, "the device may still write there");
                slab.finish(index, Ok(8192), None);
            } else {
                slab.finish(index, Ok(8192), None);
                let done = slab.pop().unwrap();
                assert_eq!(done.result.unwrap_err().kind(), ErrorKind::Timeout);
                assert!(done.op.buffer.is_some(), "answered before anybody looked");
            }
            assert_eq!((slab.zombies(), arena.free_bytes()), (0, arena.len()));
            // Both slots can be used again.
            let device = Arc::new(SimDevice::new(4096, SimOptions::default()).unwrap());
            for _ in 0..2 {
                slab.insert(Op::flush(device.clone())).map_err(drop).unwrap();
            }
            assert!(slab.insert(Op::flush(device)).is_err());
        }
    }

    #[test]
    fn a_short_transfer_goes_on_at_a_block_boundary_and_only_with_progress() {
        let arena = arena();
        let (mut slab, index) = slab_with_one_read(&arena);
        let entry = slab.entry(index);
        assert!(matches!(entry.advance(1000), Step::Continue));
        assert_eq!(entry.done, 512, "the part of a block is read once more");
        assert!(matches!(entry.advance(3584), Step::Continue));
        assert_eq!(entry.done, 4096);
        match entry.advance(511) {
            Step::Finish(Err(error)) => assert_eq!(error.kind(), ErrorKind::ShortTransfer),
            _ => panic!("less than a block of progress must not go on for ever"),
        }
    }
}
