//! The bounce lane: drive -> pinned ring -> device, and back.
//!
//! ```text
//!          one thread                                   the device's copy engine
//! pieces -> SQEs (O_DIRECT, registered buffers) -> checked -> batches on a copy stream -> buffers free again
//! ```
//!
//! What lies in memory already may go without a read and without the ring: pages of a pool's RAM tier
//! ([`Lane::use_tier`]), and files in the page cache ([`CachedMode::Map`]).
//!
//! The ring is one arena of huge pages, known to io_uring (its pages are pinned once) and to the device (so that copies
//! need no staging). A buffer is the drive's, then this thread's, then the copy engine's: ownership says whose turn it is.

mod lend;
mod numa;
pub(crate) mod pieces;
mod read;
mod tier;
pub(crate) mod write;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme::{Arena, ArenaOptions, Backend, Buffer, Queue};

use crate::autotune::Origin;
use crate::driver::{Batch, Direction, Driver, Part, Refused, Stream};
use crate::error::{Error, ErrorKind, Result};

pub use pieces::Run;
pub(crate) use read::Transfer;
pub use tier::PinnedTier;

/// How files are read that are in memory already (page cache, tmpfs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CachedMode {
    /// The one that is faster as far as was measured: [`CachedMode::Copy`].
    #[default]
    Auto,
    /// The device reads the page cache: the file is mapped, and pinned piece by piece by several threads. A file whose pages
    /// cannot be pinned, or whose checksums are compared, is copied.
    Map,
    /// Threads copy them into the ring.
    Copy,
}

/// Settings of a [`Lane`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneOptions {
    /// Bytes of one read or write: a power of two from 64 KiB to 64 MiB. Default: 2 MiB.
    pub chunk: usize,
    /// Reads or writes in flight. Default: 32.
    pub depth: u32,
    /// Bytes of pinned memory, at least four chunks. Default: 128 MiB.
    pub ring: usize,
    /// Bytes that are gathered for one batch of copies while the copy engine is busy. Default: 8 MiB.
    pub copy_unit: usize,
    /// Unwanted bytes between two wanted ranges that are read rather than left out. Default: 64 KiB.
    pub gap: u64,
    /// How long one read or write may take. Default: 30 s.
    pub io_deadline: Duration,
    /// Threads that read what is in memory already (page cache, tmpfs). Default: as many as there are cores for this process
    /// (its affinity and cgroup limits count), at most 32: more than the bus takes.
    pub threads: u32,
    /// Who executes reads and writes. Default: io_uring, or threads for what is in memory.
    pub backend: Backend,
    /// Where chunk, depth and threads come from, for reports.
    pub origin: Origin,
    /// How files are read that are in memory already.
    pub cached: CachedMode,
    /// Bytes of a mapped file that are pinned by one call, a multiple of 4096. Default: 32 MiB.
    pub map_piece: usize,
    /// Bytes of mapped files that are pinned at once. Default: 1 GiB.
    pub map_limit: usize,
}

/// The cores that this process may use.
pub(crate) fn cores() -> u32 {
    std::thread::available_parallelism().map_or(2, |n| n.get()).min(1024) as u32
}

impl Default for LaneOptions {
    fn default() -> LaneOptions {
        LaneOptions {
            chunk: 2 << 20,
            depth: 32,
            ring: 128 << 20,
            copy_unit: 8 << 20,
            gap: 64 << 10,
            io_deadline: Duration::from_secs(30),
            threads: cores().clamp(2, 32),
            backend: Backend::Auto,
            origin: Origin::Default,
            cached: CachedMode::Auto,
            map_piece: 32 << 20,
            map_limit: 1 << 30,
        }
    }
}

/// A pinned ring and a copy stream of one device, used by one load or save after the other.
pub struct Lane {
    driver: Arc<dyn Driver>,
    options: LaneOptions,
    arena: Arena,
    pinned: bool,
    /// RAM tiers whose pages are copied from where they are.
    tiers: Vec<Arc<PinnedTier>>,
    setup: Duration,
}

impl Lane {
    /// Takes and pins the ring.
    pub fn new(driver: Arc<dyn Driver>, options: LaneOptions) -> Result<Lane> {
        let started = Instant::now();
        check(&options, options.ring)?;
        let take = || Arena::new(options.ring, ArenaOptions::default());
        let arena = match numa::processors_near(&driver.info()?.pci) {
            Some(processors) => numa::on(&processors, take)?,
            None => take()?,
        };
        driver.pin(&arena)?;
        Ok(Lane { driver, options, arena, pinned: true, tiers: Vec::new(), setup: started.elapsed() })
    }

    /// Other settings for what comes next; the ring stays as it is.
    pub fn adjust(&mut self, options: LaneOptions) -> Result<()> {
        check(&options, self.arena.len())?;
        self.options = LaneOptions { ring: self.options.ring, ..options };
        Ok(())
    }

    /// The device.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Bytes of pinned memory.
    pub fn pinned_bytes(&self) -> u64 {
        self.arena.len() as u64
    }

    /// Where the ring lies in this process: to look it up in `/proc/self/numa_maps`.
    pub fn ring_address(&self) -> usize {
        self.arena.as_ptr() as usize
    }

    /// How long it took to take and pin the ring.
    pub fn setup(&self) -> Duration {
        self.setup
    }

    /// The settings.
    pub fn options(&self) -> &LaneOptions {
        &self.options
    }

    /// As many buffers of a length as the ring has.
    fn buffers(&self, len: usize) -> Result<Vec<Buffer>> {
        let buffers: Vec<Buffer> = std::iter::from_fn(|| self.arena.alloc(len)).collect();
        if buffers.len() < 2 {
            let context = format!("a ring of {} bytes is too small for buffers of {len}", self.arena.len());
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(buffers)
    }

    /// A queue for this lane's I/O. What is in memory is copied by threads: one alone would be slower than a bus.
    fn queue(&self, cached: bool) -> Result<Queue> {
        self.queue_of(cached, self.options.depth)
    }

    /// A queue for writes. The more of them are in flight the better, as measured: all of the ring, unless somebody chose.
    fn write_queue(&self, cached: bool) -> Result<Queue> {
        let most = (self.options.ring / self.options.chunk).min(nvme::queue::DEPTH_MAX as usize) as u32;
        match self.options.origin {
            Origin::Given => self.queue(cached),
            _ => self.queue_of(cached, self.options.depth.max(most)),
        }
    }

    fn queue_of(&self, cached: bool, depth: u32) -> Result<Queue> {
        let backend = match self.options.backend {
            Backend::Auto if cached => Backend::Threads,
            backend => backend,
        };
        let depth = if cached { self.options.threads.max(1) } else { depth };
        let builder = Queue::builder().depth(depth).deadline(self.options.io_deadline).backend(backend);
        Ok(builder.measure_latency(false).arena(Some(&self.arena)).build()?)
    }

    /// Copies bytes of the device to host memory: for comparisons, not for speed.
    pub fn read_device(&self, address: u64, out: &mut [u8]) -> Result<()> {
        let mut stream = self.driver.stream()?;
        let len = self.options.chunk;
        let mut buffer =
            Some(self.arena.alloc(len).ok_or_else(|| Error::new(ErrorKind::Invalid, "the ring is in use"))?);
        for (i, part) in out.chunks_mut(len).enumerate() {
            let one = Part { buffer: 0, offset: 0, device: address + (i * len) as u64, len: part.len() };
            let batch = Batch {
                direction: Direction::ToHost,
                buffers: buffer.take().into_iter().collect(),
                lent: Vec::new(),
                parts: vec![one],
                tag: 0,
            };
            stream.copy(batch).map_err(|refused| refused.error)?;
            stream.reap(true, &mut |mut batch| buffer = batch.buffers.pop())?;
            match &buffer {
                Some(buffer) => part.copy_from_slice(&buffer[..part.len()]),
                None => return Err(Error::new(ErrorKind::Device, "a copy did not end")),
            }
        }
        Ok(())
    }

    /// Copies bytes of host memory to the device: for self-tests, not for speed.
    pub fn write_device(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let mut stream = self.driver.stream()?;
        let len = self.options.chunk;
        let mut buffer =
            Some(self.arena.alloc(len).ok_or_else(|| Error::new(ErrorKind::Invalid, "the ring is in use"))?);
        for (i, part) in bytes.chunks(len).enumerate() {
            let Some(mut one) = buffer.take() else {
                return Err(Error::new(ErrorKind::Device, "a copy did not end"));
            };
            one[..part.len()].copy_from_slice(part);
            let place = Part { buffer: 0, offset: 0, device: address + (i * len) as u64, len: part.len() };
            let batch = Batch { buffers: vec![one], parts: vec![place], ..Batch::new(Direction::ToDevice) };
            stream.copy(batch).map_err(|refused| refused.error)?;
            stream.reap(true, &mut |mut batch| buffer = batch.buffers.pop())?;
        }
        Ok(())
    }

    /// Copies the ring to the device again and again for about `time`, and says how fast that was, bytes per second: the
    /// ceiling of the bus, measured now with this lane's own settings.
    pub fn copy_ceiling(&self, time: Duration) -> Result<f64> {
        self.copy_ceiling_of(Direction::ToDevice, time)
    }

    /// As [`copy_ceiling`](Self::copy_ceiling), in either direction.
    pub fn copy_ceiling_of(&self, direction: Direction, time: Duration) -> Result<f64> {
        let len = self.options.chunk;
        let mut free = self.buffers(len)?;
        let room = crate::driver::DeviceMemory::new(&self.driver, len as u64 * free.len() as u64)?;
        // Real bytes in real pages: zeros may be special to some part of the way.
        for (i, buffer) in free.iter_mut().enumerate() {
            buffer
                .iter_mut()
                .enumerate()
                .for_each(|(at, byte)| *byte = (at.wrapping_mul(31) ^ (at >> 8) ^ i) as u8);
        }
        let mut stream = self.driver.stream()?;
        let (mut bytes, mut place) = (0u64, 0u64);
        // The first round warms up.
        let mut started = Instant::now();
        let mut warm = false;
        loop {
            while let Some(buffer) = free.pop() {
                let part = Part { buffer: 0, offset: 0, device: room.address() + place, len };
                place = (place + len as u64) % room.len();
                let batch =
                    Batch { direction, buffers: vec![buffer], lent: Vec::new(), parts: vec![part], tag: 0 };
                stream.copy(batch).map_err(|refused| refused.error)?;
            }
            stream.reap(true, &mut |mut batch| {
                bytes += batch.len();
                free.append(&mut batch.buffers);
            })?;
            if !warm && bytes >= room.len() {
                (warm, bytes, started) = (true, 0, Instant::now());
            }
            if warm && started.elapsed() >= time {
                return Ok(bytes as f64 / started.elapsed().as_secs_f64());
            }
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.pinned
            && let Err(error) = self.driver.unpin(&self.arena)
        {
            // The device may still know these pages: they must not become somebody else's.
            tracing::error!("{error}; its {} bytes stay mapped", self.arena.len());
            std::mem::forget(self.arena.clone());
        }
    }
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("driver", &self.driver).field("options", &self.options).finish()
    }
}

/// Refuses settings that cannot work.
fn check(options: &LaneOptions, ring: usize) -> Result<()> {
    let LaneOptions { chunk, depth, .. } = *options;
    if !chunk.is_power_of_two() || !((64 << 10)..=(64 << 20)).contains(&chunk) {
        let context = format!("a chunk of {chunk} bytes: it must be a power of two from 64 KiB to 64 MiB");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    if ring < 4 * chunk || depth == 0 || depth > nvme::queue::DEPTH_MAX {
        let context =
            format!("a ring of {ring} bytes and a depth of {depth}: at least four chunks and 1 are needed");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    if options.map_piece == 0 || !options.map_piece.is_multiple_of(4096) {
        let context = format!("pieces of mapped files of {} bytes: no multiple of 4096", options.map_piece);
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    Ok(())
}

/// Starts a batch; what was refused gives its buffers to `free`.
fn start(stream: &mut Box<dyn Stream>, batch: Batch, free: &mut Vec<Buffer>) -> Result<()> {
    stream.copy(batch).map_err(|Refused { mut batch, error }| {
        free.append(&mut batch.buffers);
        error
    })
}

/// Adds up how long something was under way.
#[derive(Debug, Default)]
struct Busy {
    total: Duration,
    since: Option<Instant>,
}

impl Busy {
    /// Says whether it is under way now.
    fn set(&mut self, busy: bool, now: Instant) {
        match (self.since, busy) {
            (None, true) => self.since = Some(now),
            (Some(since), false) => {
                self.total += now - since;
                self.since = None;
            }
            _ => {}
        }
    }
}
