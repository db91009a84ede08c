//! A device that goes wrong on order: put between a real device and whoever uses it.
//!
//! [`FaultDevice`] passes every operation on to the device below, unless its [`FaultPlan`] says how this one fails. A plan
//! counts the operations of all devices that share it, also of those that are opened again later, so that "the 17th
//! operation fails" means the same in every run of a workload, and a test can go through all of them.
//!
//! ```
//! use std::sync::Arc;
//! use nvme::{Device, Fault, FaultDevice, FaultPlan, SimDevice, SimOptions};
//!
//! let below: Arc<dyn Device> = Arc::new(SimDevice::new(1 << 20, SimOptions::default())?);
//! let plan = Arc::new(FaultPlan::new());
//! let device = FaultDevice::new(below, plan.clone());
//!
//! plan.at(1, Fault::Lost);
//! device.write_at(0, b"kept")?; // operation 0
//! device.write_at(0, b"lost")?; // operation 1: acknowledged, never done
//! let mut back = [0; 4];
//! device.read_at(0, &mut back)?;
//! assert_eq!(&back, b"kept");
//! assert_eq!(plan.fired().len(), 1);
//! # Ok::<(), nvme::Error>(())
//! ```
//!
//! Queues reach it by calling it ([`Target::Inline`]), whatever is below: what is tested is the logic above, not the ring.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::device::{Device, DeviceKind, InlineIo, InlineOutcome, Target};
use crate::error::{Error, ErrorKind, Result};
use crate::queue::{DEADLINE_DEFAULT, Verb};

/// How an operation goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// Nothing happens, and this errno is reported.
    Errno(i32),
    /// Only the first bytes are moved, and that many are reported. Of a flush or discard: nothing is wrong.
    Short(u64),
    /// One bit is another one in what the operation moves: a read hands it out so, a write puts it on the medium so. Counted from
    /// the operation's first bit, modulo its length.
    FlipBit(u64),
    /// A write, flush or discard that is acknowledged and never done. Of a read: nothing is wrong.
    Lost,
    /// A write lands here instead, and is acknowledged; a read gives the bytes from here. Bytes from the start of the device,
    /// cut so that it stays on the device.
    Misdirected(u64),
    /// It works, after this much more virtual time: nobody sleeps, but deadlines count it.
    Slow(Duration),
    /// It works, after a real sleep.
    Sleep(Duration),
    /// It never answers: the deadline passes. Nothing is moved.
    Hang,
    /// The device is gone, from this operation on: all that follow on any device of the plan fail with ENODEV.
    Vanish,
}

/// An operation about to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultIo {
    /// What it does.
    pub verb: Verb,
    /// Bytes from the start of the device.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Counts the operations of the plan from 0.
    pub sequence: u64,
}

type Chooser = Box<dyn FnMut(&FaultIo) -> Option<Fault> + Send>;

#[derive(Default)]
struct State {
    sequence: u64,
    at: BTreeMap<u64, Fault>,
    choose: Option<Chooser>,
    vanished: bool,
    fired: Vec<(FaultIo, Fault)>,
    log: Option<Vec<FaultIo>>,
}

/// Which operations go wrong, and how. Shared by the devices it is for; see the module documentation.
#[derive(Default)]
pub struct FaultPlan {
    state: Mutex<State>,
}

impl FaultPlan {
    /// Nothing goes wrong.
    pub fn new() -> FaultPlan {
        FaultPlan::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operation with this sequence number goes wrong so.
    pub fn at(&self, sequence: u64, fault: Fault) {
        self.state().at.insert(sequence, fault);
    }

    /// Asked of every operation that [`at`](Self::at) does not name, in order, under the plan's lock: it must not use a device.
    pub fn choose(&self, choose: impl FnMut(&FaultIo) -> Option<Fault> + Send + 'static) {
        self.state().choose = Some(Box::new(choose));
    }

    /// Nothing goes wrong any more; a device that vanished is there again. What went wrong on the medium stays so.
    pub fn lift(&self) {
        let mut state = self.state();
        state.at.clear();
        state.choose = None;
        state.vanished = false;
    }

    /// From now on every operation is remembered, for [`log`](Self::log).
    pub fn keep_log(&self) {
        self.state().log.get_or_insert_default();
    }

    /// The operations since [`keep_log`](Self::keep_log).
    pub fn log(&self) -> Vec<FaultIo> {
        self.state().log.clone().unwrap_or_default()
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.state().sequence
    }

    /// What went wrong so far. Of a device that vanished only the first operation.
    pub fn fired(&self) -> Vec<(FaultIo, Fault)> {
        self.state().fired.clone()
    }

    /// Counts an operation; how it goes wrong.
    fn next(&self, verb: Verb, offset: u64, len: u64) -> Option<Fault> {
        let mut guard = self.state();
        let state = &mut *guard;
        let io = FaultIo { verb, offset, len, sequence: state.sequence };
        state.sequence += 1;
        if let Some(log) = &mut state.log {
            log.push(io);
        }
        if state.vanished {
            return Some(Fault::Vanish);
        }
        let fault = match state.at.remove(&io.sequence) {
            Some(fault) => fault,
            None => state.choose.as_mut()?(&io)?,
        };
        state.vanished |= fault == Fault::Vanish;
        state.fired.push((io, fault));
        Some(fault)
    }
}

impl fmt::Debug for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("FaultPlan")
            .field("operations", &state.sequence)
            .field("at", &state.at)
            .field("fired", &state.fired)
            .finish_non_exhaustive()
    }
}

/// A device whose operations go wrong as its plan says; see the module documentation.
#[derive(Debug)]
pub struct FaultDevice {
    below: Arc<dyn Device>,
    plan: Arc<FaultPlan>,
}

impl FaultDevice {
    /// Over `below`.
    pub fn new(below: Arc<dyn Device>, plan: Arc<FaultPlan>) -> FaultDevice {
        FaultDevice { below, plan }
    }

    /// The device below, which nothing goes wrong on.
    pub fn below(&self) -> &Arc<dyn Device> {
        &self.below
    }

    fn failed(&self, verb: Verb, offset: u64, len: u64, errno: i32) -> Error {
        let context = format!("{} {len} bytes at {offset} of {} (injected)", verb.name(), self.below.name());
        Error::os(std::io::Error::from_raw_os_error(errno), context)
    }

    /// `offset`, pulled back so that `len` bytes from there are on the device.
    fn inside(&self, offset: u64, len: u64) -> u64 {
        offset.min(self.below.len().saturating_sub(len))
    }

    /// One operation: `act(offset, bytes)` does it below, `damage` is called with a bit that is to be another one. Returns what it
    /// moved and how long that took.
    fn perform(
        &self,
        verb: Verb,
        offset: u64,
        len: u64,
        act: &mut dyn FnMut(u64, u64, Option<u64>) -> Result<()>,
    ) -> InlineOutcome {
        let fault = self.plan.next(verb, offset, len);
        let mut latency = Duration::ZERO;
        let whole =
            |done: Result<()>, latency| InlineOutcome { result: done.map(|()| len as usize), latency };
        match fault {
            Some(Fault::Errno(errno)) => whole(Err(self.failed(verb, offset, len, errno)), latency),
            Some(Fault::Vanish) => whole(Err(self.failed(verb, offset, len, libc::ENODEV)), latency),
            Some(Fault::Hang) => InlineOutcome { result: Ok(0), latency: Duration::MAX },
            Some(Fault::Short(most)) if len > 0 => {
                let moved = most.min(len);
                let done = if moved == 0 { Ok(()) } else { act(offset, moved, None) };
                InlineOutcome { result: done.map(|()| moved as usize), latency }
            }
            Some(Fault::Lost) if verb != Verb::Read => whole(Ok(()), latency),
            Some(Fault::Misdirected(to)) => whole(act(self.inside(to, len), len, None), latency),
            Some(Fault::FlipBit(bit)) if len > 0 => whole(act(offset, len, Some(bit % (len * 8))), latency),
            Some(Fault::Slow(more)) => {
                latency = more;
                whole(act(offset, len, None), latency)
            }
            Some(Fault::Sleep(pause)) => {
                std::thread::sleep(pause);
                whole(act(offset, len, None), latency)
            }
            _ => whole(act(offset, len, None), latency),
        }
    }

    /// For the blocking helpers: continues short transfers, as a system call's caller would.
    fn blocking(
        &self,
        verb: Verb,
        offset: u64,
        len: u64,
        mut step: impl FnMut(u64) -> InlineOutcome,
    ) -> Result<()> {
        let context = || format!("{} {len} bytes at {offset} of {}", verb.name(), self.below.name());
        let mut done = 0;
        let mut latency = Duration::ZERO;
        loop {
            let outcome = step(done);
            latency = latency.saturating_add(outcome.latency);
            if latency > DEADLINE_DEFAULT {
                return Err(Error::new(ErrorKind::Timeout, context()));
            }
            let moved = outcome.result? as u64;
            done += moved;
            if done >= len {
                return Ok(());
            }
            if moved == 0 {
                return Err(Error::new(ErrorKind::ShortTransfer, format!("{}: got {done}", context())));
            }
        }
    }
}

fn flip(bytes: &mut [u8], bit: u64) {
    bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
}

impl InlineIo for FaultDevice {
    fn inline_read(&self, offset: u64, buf: &mut [u8]) -> InlineOutcome {
        self.perform(Verb::Read, offset, buf.len() as u64, &mut |at, len, bit| {
            let part = &mut buf[..len as usize];
            self.below.read_at(at, part)?;
            if let Some(bit) = bit {
                flip(part, bit);
            }
            Ok(())
        })
    }

    fn inline_write(&self, offset: u64, buf: &[u8]) -> InlineOutcome {
        self.perform(Verb::Write, offset, buf.len() as u64, &mut |at, len, bit| {
            let part = &buf[..len as usize];
            match bit {
                None => self.below.write_at(at, part),
                Some(bit) => {
                    let mut damaged = part.to_vec();
                    flip(&mut damaged, bit);
                    self.below.write_at(at, &damaged)
                }
            }
        })
    }

    fn inline_flush(&self) -> InlineOutcome {
        self.perform(Verb::Flush, 0, 0, &mut |_, _, _| self.below.flush())
    }

    fn inline_discard(&self, offset: u64, len: u64) -> InlineOutcome {
        self.perform(Verb::Discard, offset, len, &mut |at, len, _| self.below.discard(at, len))
    }
}

impl Device for FaultDevice {
    fn kind(&self) -> DeviceKind {
        self.below.kind()
    }
    fn name(&self) -> &str {
        self.below.name()
    }
    fn len(&self) -> u64 {
        self.below.len()
    }
    fn known_len(&self) -> u64 {
        self.below.known_len()
    }
    fn lba_size(&self) -> u32 {
        self.below.lba_size()
    }
    fn alignment(&self) -> u32 {
        self.below.alignment()
    }
    fn max_transfer(&self) -> u32 {
        self.below.max_transfer()
    }
    fn optimal_transfer(&self) -> u32 {
        self.below.optimal_transfer()
    }
    fn read_only(&self) -> bool {
        self.below.read_only()
    }
    fn target(&self) -> Target<'_> {
        Target::Inline(self)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.blocking(Verb::Read, offset, len, |done| {
            self.inline_read(offset + done, &mut buf[done as usize..])
        })
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let step = |done: u64| self.inline_write(offset + done, &buf[done as usize..]);
        self.blocking(Verb::Write, offset, buf.len() as u64, step)
    }
    fn flush(&self) -> Result<()> {
        self.blocking(Verb::Flush, 0, 0, |_| self.inline_flush())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.blocking(Verb::Discard, offset, 0, |_| self.inline_discard(offset, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Op, Queue, SimDevice, SimOptions};

    fn device() -> (Arc<dyn Device>, Arc<FaultPlan>, Arc<FaultDevice>) {
        let below: Arc<dyn Device> = Arc::new(SimDevice::new(1 << 20, SimOptions::default()).unwrap());
        let plan = Arc::new(FaultPlan::new());
        let device = Arc::new(FaultDevice::new(below.clone(), plan.clone()));
        (below, plan, device)
    }

    fn read(device: &dyn Device, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        device.read_at(offset, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_fault_does_what_it_says() {
        let (below, plan, device) = device();
        plan.at(0, Fault::Errno(libc::EIO));
        assert_eq!(device.write_at(0, b"abcd").unwrap_err().errno(), Some(libc::EIO));
        assert_eq!(read(&*below, 0, 4), [0; 4]);

        // A short write is gone on with: the next operation brings the rest.
        plan.at(1, Fault::Short(1));
        device.write_at(0, b"abcd").unwrap();
        assert_eq!((read(&*below, 0, 4).as_slice(), plan.operations()), (&b"abcd"[..], 3));

        plan.at(3, Fault::FlipBit(8));
        assert_eq!(read(&*device, 0, 4), b"accd");
        assert_eq!(read(&*device, 0, 4), b"abcd", "in transfer only");
        plan.at(5, Fault::FlipBit(0));
        device.write_at(0, b"abcd").unwrap();
        assert_eq!(read(&*below, 0, 4), b"`bcd", "on the medium");

        plan.at(6, Fault::Misdirected(u64::MAX));
        device.write_at(0, b"efgh").unwrap();
        assert_eq!(read(&*below, 0, 4), b"`bcd");
        assert_eq!(read(&*below, (1 << 20) - 4, 4), b"efgh");
        plan.at(7, Fault::Misdirected((1 << 20) - 4));
        assert_eq!(read(&*device, 0, 4), b"efgh");

        plan.at(8, Fault::Hang);
        assert_eq!(device.flush().unwrap_err().kind(), ErrorKind::Timeout);
        plan.at(9, Fault::Slow(Duration::from_secs(29)));
        device.flush().unwrap();
        plan.at(10, Fault::Slow(Duration::from_secs(31)));
        assert_eq!(device.flush().unwrap_err().kind(), ErrorKind::Timeout);

        plan.at(11, Fault::Vanish);
        for _ in 0..3 {
            assert_eq!(device.read_at(0, &mut [0]).unwrap_err().kind(), ErrorKind::Gone);
        }
        plan.lift();
        assert_eq!(read(&*device, 0, 4), b"`bcd");
        assert_eq!(plan.fired().len(), 10);
    }

    #[test]
    fn a_queue_meets_the_same_faults() {
        let (below, plan, device) = device();
        let mut queue = Queue::builder().depth(4).build().unwrap();
        let page = || {
            let mut page = Buffer::heap(4096).unwrap();
            page.fill(7);
            page
        };
        let device: Arc<dyn Device> = device;
        plan.keep_log();
        plan.choose(|io| (io.verb == Verb::Write && io.offset == 4096).then_some(Fault::Lost));
        plan.at(2, Fault::Short(512));
        plan.at(4, Fault::Hang);
        let ops = [0, 4096, 8192, 12288].map(|at| Op::write(device.clone(), at, page()));
        let done = queue.run(ops.into()).unwrap();
        let kinds: Vec<_> =
            done.iter().map(|done| done.result.as_ref().map_err(|error| error.kind())).collect();
        assert_eq!(kinds, [Ok(&4096), Ok(&4096), Ok(&4096), Err(ErrorKind::Timeout)]);
        for (at, byte) in [(0, 7), (4096, 0), (8192, 7), (12287, 7), (12288, 0)] {
            assert_eq!(read(&*below, at, 1), [byte], "at {at}");
        }
        // 8192 came in two operations.
        let log = plan.log();
        assert_eq!(
            log.iter().map(|io| (io.offset, io.len)).collect::<Vec<_>>()[2..4],
            [(8192, 4096), (8704, 3584)]
        );
    }
}
