//! A device in memory, seeded: the same seed gives the same latencies and the same faults.
//!
//! It replaces the device, not the logic: everything above runs unchanged. Storage is sparse, so a device of a
//! terabyte costs what was written to it, and copies share what they have in common. Faults come from a [`SimHook`], which
//! sees every operation before it happens and decides how it ends. Power cuts come from a [`SimPower`]: see `power.rs`.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::device::{Device, DeviceKind, InlineIo, InlineOutcome, Target, check_range, check_writable};
use crate::error::{Error, ErrorKind, Result};
use crate::queue::Verb;

mod pages;
mod power;
#[cfg(test)]
mod tests;

pub use power::{SimChange, SimPower, Survivors};

use pages::Pages;
use power::{Admitted, Cache};

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
    /// Nothing happens, and success is reported: a lost write, a flush that lies. Reads proceed.
    Lose,
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
    /// Its name. Default: `sim:SEED`.
    pub name: Option<String>,
    /// Writes are durable only after a flush: see [`SimDevice::survivors`]. Default: false, each is at once.
    pub volatile_cache: bool,
    /// What it gets its power from. Default: none, it never goes off.
    pub power: Option<Arc<SimPower>>,
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
            name: None,
            volatile_cache: false,
            power: None,
        }
    }
}

struct State {
    pages: Pages,
    /// Where writes are not durable at once.
    cache: Option<Cache>,
    rng: SimRng,
    sequence: u64,
}

/// What a device holds, to make others from. Copies share memory.
#[derive(Debug, Clone)]
pub struct SimImage {
    len: u64,
    pages: Pages,
}

impl SimImage {
    /// Length of the device it is of, bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a device has a length.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads as the device would.
    ///
    /// # Panics
    /// When the range is not within it.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        assert!(offset + buf.len() as u64 <= self.len, "within the image");
        self.pages.read(offset, buf);
    }

    /// Turns one bit over, as a drive that lost it would.
    ///
    /// # Panics
    /// When the byte is not within it, or `bit` is over 7.
    pub fn flip(&mut self, offset: u64, bit: u8) {
        assert!(offset < self.len && bit < 8, "a bit of the image");
        let mut byte = [0];
        self.pages.read(offset, &mut byte);
        self.pages.write(offset, &[byte[0] ^ (1 << bit)]);
    }
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
        SimDevice::from_image(&SimImage { len, pages: Pages::default() }, options)
    }

    /// A device that holds what `image` does. `options.lba_size` must divide its length.
    pub fn from_image(image: &SimImage, options: SimOptions) -> Result<SimDevice> {
        if !image.len.is_multiple_of(u64::from(options.lba_size)) {
            return Err(Error::new(
                ErrorKind::Misaligned,
                format!(
                    "an image of {} bytes has no whole number of {}-byte blocks",
                    image.len, options.lba_size
                ),
            ));
        }
        let cache = options.volatile_cache.then(|| Cache::new(options.lba_size));
        let state = State { pages: image.pages.clone(), cache, rng: SimRng::new(options.seed), sequence: 0 };
        let name = options.name.clone().unwrap_or_else(|| format!("sim:{}", options.seed));
        Ok(SimDevice { name, len: image.len, options, state: Mutex::new(state) })
    }

    /// What reads see now.
    pub fn image(&self) -> SimImage {
        SimImage { len: self.len, pages: self.state().pages.clone() }
    }

    /// Turns one bit over at rest, past the cache.
    ///
    /// # Panics
    /// When the byte is not within it, or `bit` is over 7.
    pub fn flip(&self, offset: u64, bit: u8) {
        let mut state = self.state();
        let mut image = SimImage { len: self.len, pages: std::mem::take(&mut state.pages) };
        image.flip(offset, bit);
        state.pages = image.pages;
    }

    /// Writes that no flush has made durable yet.
    pub fn unflushed(&self) -> usize {
        self.state().cache.as_ref().map_or(0, Cache::len)
    }

    /// What is on the medium if the power goes now (or went, with [`SimPower`]).
    pub fn survivors(&self, which: Survivors) -> SimImage {
        let state = self.state();
        let pages = match &state.cache {
            Some(cache) => cache.survivors(&state.pages, which),
            None => state.pages.clone(),
        };
        SimImage { len: self.len, pages }
    }

    /// Bytes of memory its contents take.
    pub fn resident_bytes(&self) -> u64 {
        self.state().pages.count() as u64 * pages::PAGE
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
        // Counted whatever the hook says, so that a fault does not move a cut.
        let admitted = match &self.options.power {
            None => Admitted::Yes,
            Some(power) if verb == Verb::Read && power.is_off() => Admitted::No,
            Some(_) if verb == Verb::Read => Admitted::Yes,
            Some(power) => power.admit(&self.name, verb, offset, len),
        };
        if admitted != Admitted::Yes {
            // The drive may have got to it; nobody is told.
            if admitted == Admitted::Dying && verb != Verb::Flush && decision == SimDecision::Proceed {
                act(&mut state, len);
            }
            let context =
                format!("{} {len} bytes at {offset} of {}: its power is off", verb.name(), self.name);
            return InlineOutcome { result: Err(Error::new(ErrorKind::Gone, context)), latency };
        }
        let moved = match decision {
            SimDecision::Lose if verb != Verb::Read => {
                return InlineOutcome { result: Ok(len as usize), latency };
            }
            SimDecision::Proceed | SimDecision::Lose => len,
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

impl InlineIo for SimDevice {
    fn inline_read(&self, offset: u64, buf: &mut [u8]) -> InlineOutcome {
        self.perform(Verb::Read, offset, buf.len() as u64, |state, moved| {
            state.pages.read(offset, &mut buf[..moved as usize]);
        })
    }

    fn inline_write(&self, offset: u64, buf: &[u8]) -> InlineOutcome {
        if let Err(error) = check_writable(self, "write") {
            return InlineOutcome { result: Err(error), latency: Duration::ZERO };
        }
        self.perform(Verb::Write, offset, buf.len() as u64, |state, moved| {
            let buf = &buf[..moved as usize];
            match &mut state.cache {
                Some(cache) => cache.write(&mut state.pages, offset, buf),
                None => state.pages.write(offset, buf),
            }
        })
    }

    fn inline_flush(&self) -> InlineOutcome {
        self.perform(Verb::Flush, 0, 0, |state, _| {
            if let Some(cache) = &mut state.cache {
                cache.flush();
            }
        })
    }

    fn inline_discard(&self, offset: u64, len: u64) -> InlineOutcome {
        if let Err(error) = check_writable(self, "discard") {
            return InlineOutcome { result: Err(error), latency: Duration::ZERO };
        }
        self.perform(Verb::Discard, offset, len, |state, moved| match &mut state.cache {
            Some(cache) => cache.discard(&mut state.pages, offset, moved),
            None => state.pages.zero(offset, moved),
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
