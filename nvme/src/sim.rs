//! A device in memory, seeded: the same seed gives the same latencies and the same faults.
//!
//! It replaces the device, not the logic: everything above runs unchanged. Storage is sparse, so a device of a
//! terabyte costs what was written to it. Faults come from a [`SimHook`], which sees every operation before it
//! happens and decides how it ends.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::device::{Device, DeviceKind, InlineIo, InlineOutcome, Target, check_range, check_writable};
use crate::error::{Error, ErrorKind, Result};
use crate::queue::Verb;

/// Granule of the sparse storage, bytes.
const PAGE: u64 = 16 << 10;

/// SplitMix64 (Steele, Lea, Flood 2014): tiny, seeded, the same on every machine.
#[derive(Debug, Clone)]
pub struct SimRng(u64);

impl SimRng {
    /// A generator that gives the same sequence for the same seed.
    pub fn new(seed: u64) -> SimRng {
        SimRng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `range`, which must not be empty. The bias of the modulus does not matter here.
    pub fn in_range(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next_u64() % (range.end - range.start)
    }
}

/// An operation about to happen, as a hook sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimIo {
    /// What it does.
    pub verb: Verb,
    /// Bytes from the start of the device.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Counts operations of this device from 0, in submit order.
    pub sequence: u64,
}

/// How an operation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SimDecision {
    /// As it should.
    #[default]
    Proceed,
    /// Nothing happens, and this errno is reported.
    Fail(i32),
    /// Only the first bytes are moved, and that many are reported.
    Short(u64),
    /// It never answers: the queue's deadline passes. Nothing is moved.
    Hang,
    /// It works, after this much more virtual time.
    Slow(Duration),
}

/// Decides how operations end. Called once an operation, in submit order, under the device's lock: it must not
/// call the device.
pub trait SimHook: Send + Sync + fmt::Debug {
    /// How `io` ends. `rng` is the device's own generator, so a decision by chance is repeated by the seed.
    fn decide(&self, io: &SimIo, rng: &mut SimRng) -> SimDecision;
}

/// What a [`SimDevice`] is like.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Of latencies and of the hook's chances. Default: 0.
    pub seed: u64,
    /// Logical block size, bytes: 512 or 4096. Default: 512.
    pub lba_size: u32,
    /// The most bytes per operation. Default: 1 MiB.
    pub max_transfer: u32,
    /// Virtual time of an operation, drawn evenly from this range of nanoseconds. Default: 10 to 100 us.
    pub latency_ns: Range<u64>,
    /// Writes are refused. Default: false.
    pub read_only: bool,
    /// Default: none, every operation succeeds.
    pub hook: Option<Arc<dyn SimHook>>,
}

impl Default for SimOptions {
    fn default() -> Self {
        SimOptions {
            seed: 0,
            lba_size: 512,
            max_transfer: 1 << 20,
            latency_ns: 10_000..100_000,
            read_only: false,
            hook: None,
        }
    }
}

struct State {
    pages: HashMap<u64, Box<[u8]>>,
    rng: SimRng,
    sequence: u64,
}

/// A device in memory. Cheap to make, whatever its length.
pub struct SimDevice {
    name: String,
    len: u64,
    options: SimOptions,
    state: Mutex<State>,
}

impl SimDevice {
    /// `len` bytes of zeros; `len` must be a multiple of the LBA size, and not zero.
    pub fn new(len: u64, options: SimOptions) -> Result<SimDevice> {
        let lba = options.lba_size;
        if lba != 512 && lba != 4096 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("a simulated device with {lba}-byte blocks: 512 or 4096"),
            ));
        }
        if len == 0 || !len.is_multiple_of(u64::from(lba)) {
            return Err(Error::new(
                ErrorKind::Misaligned,
                format!(
                    "a simulated device of {len} bytes with {lba}-byte blocks: the length must be a multiple, and not 0"
                ),
            ));
        }
        if options.max_transfer < lba
            || !options.max_transfer.is_multiple_of(lba)
            || options.latency_ns.is_empty()
        {
            return Err(Error::new(
                ErrorKind::Invalid,
                "a simulated device needs a max_transfer of whole blocks and a latency range that is not empty",
            ));
        }
        let state = State { pages: HashMap::new(), rng: SimRng::new(options.seed), sequence: 0 };
        Ok(SimDevice { name: format!("sim:{}", options.seed), len, options, state: Mutex::new(state) })
    }

    /// Bytes of memory its contents take.
    pub fn resident_bytes(&self) -> u64 {
        self.state().pages.len() as u64 * PAGE
    }

    /// Operations so far, submitted through a queue or by the blocking helpers.
    pub fn operations(&self) -> u64 {
        self.state().sequence
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the hook, then lets `act` move at most the decided number of bytes.
    fn perform(&self, verb: Verb, offset: u64, len: u64, act: impl FnOnce(&mut State, u64)) -> InlineOutcome {
        if let Err(error) = check_range(self, verb.name(), offset, len) {
            return InlineOutcome { result: Err(error), latency: Duration::ZERO };
        }
        let mut state = self.state();
        let io = SimIo { verb, offset, len, sequence: state.sequence };
        state.sequence += 1;
        let range = self.options.latency_ns.clone();
        let mut latency = Duration::from_nanos(state.rng.in_range(range));
        let decision = match &self.options.hook {
            Some(hook) => hook.decide(&io, &mut state.rng),
            None => SimDecision::Proceed,
        };
        let moved = match decision {
            SimDecision::Proceed => len,
            SimDecision::Short(n) => n.min(len),
            SimDecision::Slow(more) => {
                latency = latency.saturating_add(more);
                len
            }
            SimDecision::Hang => return InlineOutcome { result: Ok(0), latency: Duration::MAX },
            SimDecision::Fail(errno) => {
                let error = std::io::Error::from_raw_os_error(errno);
                let context = format!("{} {len} bytes at {offset} of {} (injected)", verb.name(), self.name);
                return InlineOutcome { result: Err(Error::os(error, context)), latency };
            }
        };
        act(&mut state, moved);
        InlineOutcome { result: Ok(moved as usize), latency }
    }

    /// For the blocking helpers: whole, or an error.
    fn whole(
        &self,
        verb: Verb,
        offset: u64,
        mut step: impl FnMut(usize) -> InlineOutcome,
        len: usize,
    ) -> Result<()> {
        let mut done = 0;
        loop {
            let outcome = step(done);
            let context = || format!("{} {len} bytes at {offset} of {}", verb.name(), self.name);
            if outcome.latency == Duration::MAX {
                return Err(Error::new(ErrorKind::Timeout, context()));
            }
            let n = outcome.result?;
            done += n;
            if done >= len {
                return Ok(());
            }
            if n == 0 {
                return Err(Error::new(ErrorKind::ShortTransfer, context()));
            }
        }
    }
}

/// Calls `each(page, range in page, range in buffer)` for every page the range touches.
fn for_pages(offset: u64, len: u64, mut each: impl FnMut(u64, Range<usize>, Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let start = at % PAGE;
        let part = (PAGE - start).min(len - done);
        each(at / PAGE, start as usize..(start + part) as usize, done as usize..(done + part) as usize);
        done += part;
    }
}

impl InlineIo for SimDevice {
    fn inline_read(&self, offset: u64, buf: &mut [u8]) -> InlineOutcome {
        self.perform(Verb::Read, offset, buf.len() as u64, |state, moved| {
            for_pages(offset, moved, |page, inside, outside| match state.pages.get(&page) {
                Some(bytes) => buf[outside].copy_from_slice(&bytes[inside]),
                None => buf[outside].fill(0),
            });
        })
    }

    fn inline_write(&self, offset: u64, buf: &[u8]) -> InlineOutcome {
        if let Err(error) = check_writable(self, "write") {
            return InlineOutcome { result: Err(error), latency: Duration::ZERO };
        }
        self.perform(Verb::Write, offset, buf.len() as u64, |state, moved| {
            for_pages(offset, moved, |page, inside, outside| {
                let bytes =
                    state.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
                bytes[inside].copy_from_slice(&buf[outside]);
            });
        })
    }

    fn inline_flush(&self) -> InlineOutcome {
        self.perform(Verb::Flush, 0, 0, |_, _| {})
    }

    fn inline_discard(&self, offset: u64, len: u64) -> InlineOutcome {
        if let Err(error) = check_writable(self, "discard") {
            return InlineOutcome { result: Err(error), latency: Duration::ZERO };
        }
        self.perform(Verb::Discard, offset, len, |state, moved| {
            // By what is stored, not by what is named: a range may span petabytes of holes.
            let end = offset + moved;
            state.pages.retain(|&page, bytes| {
                let start = page * PAGE;
                let from = offset.max(start);
                let to = end.min(start + PAGE);
                if from < to {
                    bytes[(from - start) as usize..(to - start) as usize].fill(0);
                }
                !(from == start && to == start + PAGE)
            });
        })
    }
}

impl Device for SimDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Sim
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn lba_size(&self) -> u32 {
        self.options.lba_size
    }
    fn max_transfer(&self) -> u32 {
        self.options.max_transfer
    }
    fn read_only(&self) -> bool {
        self.options.read_only
    }
    fn target(&self) -> Target<'_> {
        Target::Inline(self)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len();
        self.whole(
            Verb::Read,
            offset,
            |done| InlineIo::inline_read(self, offset + done as u64, &mut buf[done..]),
            len,
        )
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.whole(
            Verb::Write,
            offset,
            |done| InlineIo::inline_write(self, offset + done as u64, &buf[done..]),
            buf.len(),
        )
    }
    fn flush(&self) -> Result<()> {
        self.whole(Verb::Flush, 0, |_| InlineIo::inline_flush(self), 0)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.whole(Verb::Discard, offset, |_| InlineIo::inline_discard(self, offset, len), 0)
    }
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDevice").field("name", &self.name).field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_big_device_costs_what_was_written() {
        let device = SimDevice::new(1 << 40, SimOptions::default()).unwrap();
        device.write_at((1 << 40) - 3, b"end").unwrap();
        device.write_at(PAGE - 1, b"ab").unwrap();
        assert_eq!(device.resident_bytes(), 3 * PAGE);
        let mut back = [9; 4];
        device.read_at(PAGE - 2, &mut back).unwrap();
        assert_eq!(&back, b"\0ab\0");
        device.discard(0, 1 << 40).unwrap();
        assert_eq!(device.resident_bytes(), 0);
        device.read_at(PAGE - 2, &mut back).unwrap();
        assert_eq!(back, [0; 4]);
    }

    #[test]
    fn a_partial_discard_zeroes_exactly_its_range() {
        let device = SimDevice::new(1 << 20, SimOptions::default()).unwrap();
        device.write_at(0, &[1; 3 * PAGE as usize]).unwrap();
        device.discard(100, 2 * PAGE).unwrap();
        let mut back = vec![0; 3 * PAGE as usize];
        device.read_at(0, &mut back).unwrap();
        for (i, &b) in back.iter().enumerate() {
            let gone = (100..100 + 2 * PAGE).contains(&(i as u64));
            assert_eq!(b, u8::from(!gone), "byte {i}");
        }
    }

    #[derive(Debug)]
    struct FailSecond;
    impl SimHook for FailSecond {
        fn decide(&self, io: &SimIo, _: &mut SimRng) -> SimDecision {
            match io.sequence {
                1 => SimDecision::Fail(libc::EIO),
                2 => SimDecision::Short(1),
                3 => SimDecision::Hang,
                _ => SimDecision::Proceed,
            }
        }
    }

    #[test]
    fn a_hook_decides_how_operations_end() {
        let options = SimOptions { hook: Some(Arc::new(FailSecond)), ..Default::default() };
        let device = SimDevice::new(4096, options).unwrap();
        device.write_at(0, b"abc").unwrap();
        let mut back = [0; 3];
        assert_eq!(device.read_at(0, &mut back).unwrap_err().errno(), Some(libc::EIO));
        // One byte arrives, the rest hangs: a deadline, never a success.
        assert_eq!(device.read_at(0, &mut back).unwrap_err().kind(), ErrorKind::Timeout);
        device.read_at(0, &mut back).unwrap();
        assert_eq!(&back, b"abc");
        assert_eq!(device.operations(), 5);
    }

    #[test]
    fn bad_lengths_and_ranges_are_refused() {
        let kind = |len, lba_size| {
            SimDevice::new(len, SimOptions { lba_size, ..Default::default() }).unwrap_err().kind()
        };
        assert_eq!(kind(0, 512), ErrorKind::Misaligned);
        assert_eq!(kind(513, 512), ErrorKind::Misaligned);
        assert_eq!(kind(4096, 520), ErrorKind::Invalid);
        let device = SimDevice::new(4096, SimOptions { read_only: true, ..Default::default() }).unwrap();
        assert_eq!(device.read_at(4096, &mut [0]).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(device.read_at(u64::MAX, &mut [0]).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(device.write_at(0, &[0]).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}
