//! What is asked of a device's driver, and nothing more.
//!
//! A [`Driver`] stands for one device: [`cuda`] is the real one, [`host`] takes the machine's own memory for a device, and
//! [`fake`] is a simulated device for tests. Copies are owned operations, as those of [`nvme::Queue`] are: a [`Batch`] owns
//! its pinned buffers from [`Stream::copy`] until [`Stream::reap`] hands them back, so that nobody can write to memory that
//! a copy engine still reads. Nothing is said to be on the device before `reap` gave its batch back.

mod copier;
pub mod cuda;
pub mod fake;
pub mod host;
pub mod mapped;
mod memory;
mod reserved;

use std::fmt;
use std::sync::Arc;

use engine::ram_tier::Page;
use nvme::{Arena, Buffer};

use crate::error::{Error, ErrorKind, Result};
use crate::halves::Halves;
use crate::paged::Move;
use mapped::{MappedPiece, Mapping};

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeviceInfo {
    /// `cuda:0`, `cpu`.
    pub id: String,
    /// The vendor's name for it.
    pub name: String,
    /// Where it is, `0000:3b:00.0`; empty where it is on no bus.
    pub pci: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of memory that were free when it was asked.
    pub free_bytes: u64,
    /// The version of the driver, `13.0`; empty where there is none.
    pub driver: String,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From pinned memory to the device.
    ToDevice,
    /// From the device to pinned memory.
    ToHost,
}

/// Pinned memory that a batch only reads, and that somebody else holds as well. It stays as it is until the last holder
/// lets go.
#[derive(Clone, Debug)]
pub enum Lent {
    /// Verified bytes in the RAM tier of a pool, whose arena is pinned.
    Page(Arc<Page>),
    /// A piece of a file in the page cache.
    Mapped(Arc<MappedPiece>),
    /// A buffer of a pinned arena.
    Buffer(Arc<Buffer>),
}

impl Lent {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Lent::Page(page) => page.bytes().len(),
            Lent::Mapped(piece) => piece.len(),
            Lent::Buffer(buffer) => buffer.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address on the host.
    pub(crate) fn address(&self) -> u64 {
        match self {
            Lent::Page(page) => page.bytes().as_ptr() as u64,
            Lent::Mapped(piece) => piece.address(),
            Lent::Buffer(buffer) => buffer.as_ptr() as u64,
        }
    }
}

/// One contiguous copy of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which of the batch's buffers, and after those which of what it was lent.
    pub buffer: u32,
    /// First byte in that buffer.
    pub offset: usize,
    /// Address on the device.
    pub device: u64,
    /// Bytes, not 0.
    pub len: usize,
}

/// One contiguous copy from device memory to device memory; the ranges do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceCopy {
    /// Where from.
    pub from: u64,
    /// Where to.
    pub to: u64,
    /// Bytes, not 0.
    pub len: u64,
}

/// Copies that start and end together, with the memory they use.
#[derive(Debug)]
pub struct Batch {
    /// Which way.
    pub direction: Direction,
    /// Pinned memory.
    pub buffers: Vec<Buffer>,
    /// Pinned memory of others, which is only read: for copies to the device. Counted on from `buffers` in [`Part::buffer`].
    pub lent: Vec<Lent>,
    /// What goes where.
    pub parts: Vec<Part>,
    /// The caller's own.
    pub tag: u64,
}

impl Batch {
    /// Nothing to copy yet.
    pub fn new(direction: Direction) -> Batch {
        Batch { direction, buffers: Vec::new(), lent: Vec::new(), parts: Vec::new(), tag: 0 }
    }

    /// Bytes of all parts.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len as u64).sum()
    }

    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Refuses parts that are not inside their buffers, and copies to what was lent.
    pub(crate) fn check(&self) -> Result<()> {
        if self.direction == Direction::ToHost && !self.lent.is_empty() {
            return Err(Error::new(
                ErrorKind::Invalid,
                "copy from the device to memory that is lent for reading",
            ));
        }
        for part in &self.parts {
            let index = part.buffer as usize;
            let len = match self.buffers.get(index) {
                Some(buffer) => buffer.len(),
                None => self.lent.get(index - self.buffers.len()).map_or(0, Lent::len),
            };
            if part.len == 0 || part.offset.checked_add(part.len).is_none_or(|end| end > len) {
                let context = format!("copy {} bytes at {} of a buffer of {len}", part.len, part.offset);
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
        Ok(())
    }
}

/// One device.
pub trait Driver: Send + Sync + fmt::Debug {
    /// What it is, and how much memory is free now.
    fn info(&self) -> Result<DeviceInfo>;
    /// Makes an arena known to the device, so that copies run at the bus's speed and without waiting. It may be
    /// pinned several times, and is unpinned as often.
    fn pin(&self, arena: &Arena) -> Result<()>;
    /// Takes [`pin`](Self::pin) back. No copy may use the arena any more.
    fn unpin(&self, arena: &Arena) -> Result<()>;
    /// Takes memory on the device, aligned to 256 bytes at least. Its bytes are anything. `len` is not 0.
    fn alloc(&self, len: u64) -> Result<u64>;
    /// Gives memory back.
    fn free(&self, address: u64) -> Result<()>;
    /// A queue of copies, which run in order and beside what the host does.
    fn stream(&self) -> Result<Box<dyn Stream>>;
    /// Makes the device known to this thread, for libraries that look at a thread's context.
    fn enter(&self) -> Result<()> {
        Ok(())
    }
    /// Copies ranges of the device's memory to other places there, and waits for it.
    fn copy_within(&self, moves: &[DeviceCopy]) -> Result<()>;
    /// Joins or splits weights, in order with what else is in a stream that somebody else made there: a `cudaStream_t`, taken on the caller's word, as
    /// is that the memory stays until the stream has gone on.
    fn halves(&self, job: &Halves, stream: u64) -> Result<()> {
        let _ = (job, stream);
        Err(Error::new(ErrorKind::Unsupported, "this device runs no kernels"))
    }
    /// Refuses a range that is not memory of this device from its first byte to its last.
    fn check_range(&self, address: u64, len: u64) -> Result<()>;
    /// Makes a piece of a mapped file known to the device, so that it reads the page cache itself; the pages stay where they
    /// are, whatever becomes of the file, until [`unpin_mapped`](Self::unpin_mapped). `offset` and `len` are multiples of 4096
    /// within the mapping. May be called by several threads. `Unsupported` where the device or the kernel will not.
    fn pin_mapped(&self, mapping: &Mapping, offset: u64, len: usize) -> Result<()> {
        let _ = (mapping, offset, len);
        Err(Error::new(ErrorKind::Unsupported, "this device reads no mapped files"))
    }
    /// Takes [`pin_mapped`](Self::pin_mapped) back. No copy may use the piece any more.
    fn unpin_mapped(&self, mapping: &Mapping, offset: u64, len: usize) -> Result<()> {
        let _ = (mapping, offset, len);
        Err(Error::new(ErrorKind::Unsupported, "this device reads no mapped files"))
    }
    /// Addresses that come before their memory; `None` where the device has no such thing.
    fn virtual_memory(&self) -> Option<&dyn VirtualMemory> {
        None
    }
}

/// Addresses and memory of a device, taken apart: a range of addresses is reserved once, and physical memory is mapped into it
/// and out of it.
pub trait VirtualMemory: Send + Sync {
    /// Lengths and places of physical memory are multiples of this.
    fn granularity(&self) -> Result<u64>;
    /// Takes addresses without memory.
    fn reserve(&self, len: u64) -> Result<u64>;
    /// Gives addresses back, whole, with nothing mapped.
    fn unreserve(&self, address: u64, len: u64) -> Result<()>;
    /// Takes physical memory. Its bytes are anything.
    fn create(&self, len: u64) -> Result<u64>;
    /// Gives physical memory back that is mapped nowhere.
    fn release(&self, physical: u64) -> Result<()>;
    /// Puts physical memory, all of it, at an address within a reservation, where nothing is.
    fn map(&self, address: u64, len: u64, physical: u64) -> Result<()>;
    /// Takes it away from there. Nothing on the device may use it any more.
    fn unmap(&self, address: u64, len: u64) -> Result<()>;
}

/// A batch that did not start, handed back.
#[derive(Debug)]
pub struct Refused {
    /// Untouched.
    pub batch: Batch,
    /// Why.
    pub error: Error,
}

/// Copies in order. Dropping it waits for them.
pub trait Stream: Send {
    /// Starts a batch.
    #[allow(clippy::result_large_err)] // the batch itself is what comes back
    fn copy(&mut self, batch: Batch) -> std::result::Result<(), Refused>;
    /// Hands out batches that are done, in order; with `wait` it sleeps until something ended, where anything is in flight.
    /// Returns how much ended. An error means that no
    /// copy in flight can be relied on; their memory comes back when the stream is dropped.
    fn reap(&mut self, wait: bool, each: &mut dyn FnMut(Batch)) -> Result<usize>;
    /// Batches started and not handed out, and moves that are not seen to have ended.
    fn in_flight(&self) -> usize;
    /// Lets what is started from here on wait, on the device, for an event that somebody else recorded there : a `cudaEvent_t`; 0 is none, which has
    /// happened. The event may be gone as soon as this returns.
    fn wait_event(&mut self, event: u64) -> Result<()> {
        match event {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::Unsupported, "wait for an event of a device that has none")),
        }
    }
    /// Starts a gather or scatter, in order with the copies. Its memory must stay until [`finish`](Self::finish), or until a
    /// copy that was started after it came back.
    fn shuffle(&mut self, job: &Arc<Move>) -> Result<()>;
    /// Waits for everything that was started; batches are handed out as by [`reap`](Self::reap).
    fn finish(&mut self, each: &mut dyn FnMut(Batch)) -> Result<()>;
}

/// Memory of a device, given back when the last owner is gone.
pub struct DeviceMemory {
    driver: Arc<dyn Driver>,
    address: u64,
    len: u64,
}

impl DeviceMemory {
    /// Takes `len` bytes; none is fine and takes nothing.
    pub fn new(driver: &Arc<dyn Driver>, len: u64) -> Result<DeviceMemory> {
        let address = if len == 0 { 0 } else { driver.alloc(len)? };
        Ok(DeviceMemory { driver: driver.clone(), address, len })
    }

    /// Where it starts; 0 when it is empty.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whose it is.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.len > 0
            && let Err(error) = self.driver.free(self.address)
        {
            tracing::warn!("free {} bytes of device memory: {error}", self.len);
        }
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory").field("address", &self.address).field("len", &self.len).finish()
    }
}

/// Opens a device by its name as frameworks write it: `cpu`, `cuda`, `cuda:1`.
pub fn open(name: &str) -> Result<Arc<dyn Driver>> {
    match name {
        "cpu" => Ok(Arc::new(host::HostDriver::new())),
        "cuda" => Ok(Arc::new(cuda::CudaDriver::open(0)?)),
        _ => match name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
            Some(ordinal) => Ok(Arc::new(cuda::CudaDriver::open(ordinal)?)),
            None => {
                let context = format!("there is no device {name:?}: write cpu, cuda or cuda:N");
                Err(Error::new(ErrorKind::Invalid, context))
            }
        },
    }
}
