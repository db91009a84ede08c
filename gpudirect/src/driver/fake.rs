//! A simulated device for tests: it does what a GPU may do at its worst.
//!
//! Memory is full of poison when it is allocated. Copies are held back for as long as nobody waits for them, so that
//! whoever reports bytes too early reports poison. Host memory that was not pinned is refused. Memory that is mapped anew is
//! poison, whatever it held elsewhere, and addresses without memory are an error. A piece of a mapped file is what it was when
//! it was pinned. Any call can be made to fail once. [`FakeDriver::leaks`] says what was not given back.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use nvme::Arena;

use super::copier::{Copier, Work};
use super::mapped::Mapping;
use super::memory::{GRANULARITY, Memory};
use super::{Batch, DeviceCopy, DeviceInfo, Driver, Lent, Refused, Stream, VirtualMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::paged::Move;

/// What fresh memory holds.
pub const POISON: u8 = 0xa5;

/// How the device behaves.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Batches that are held back while nobody waits.
    pub lag: usize,
    /// The call of this number fails, counted from 1 over all calls that can fail; 0: none.
    pub fail_call: u64,
    /// The batch of this number fails while it runs, counted from 1; 0: none.
    pub fail_batch: u64,
    /// Pieces of mapped files that are taken, the rest is refused.
    pub mapped_pieces: u64,
}

impl Default for FakeOptions {
    fn default() -> FakeOptions {
        FakeOptions { memory_bytes: 1 << 30, lag: 4, fail_call: 0, fail_batch: 0, mapped_pieces: u64::MAX }
    }
}

/// The device. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct FakeDriver(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: Mutex<FakeOptions>,
    memory: Arc<Memory>,
    calls: AtomicU64,
    batches: Arc<AtomicU64>,
    pinned: Arc<Mutex<Vec<Arena>>>,
    /// Pieces of mapped files by their address, with what they held when they were pinned.
    mapped: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
    /// Pieces so far.
    pieces: AtomicU64,
    streams: Arc<AtomicU64>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeDriver {
    /// A device with nothing on it.
    pub fn new(options: FakeOptions) -> FakeDriver {
        FakeDriver(Arc::new(Inner {
            options: Mutex::new(options),
            memory: Arc::default(),
            calls: AtomicU64::new(0),
            batches: Arc::default(),
            pinned: Arc::default(),
            mapped: Arc::default(),
            pieces: AtomicU64::new(0),
            streams: Arc::default(),
        }))
    }

    /// Calls so far that could have been made to fail.
    pub fn calls(&self) -> u64 {
        self.0.calls.load(Ordering::SeqCst)
    }

    /// Behaves differently from now on; counting starts anew.
    pub fn set(&self, options: FakeOptions) {
        *locked(&self.0.options) = options;
        self.0.calls.store(0, Ordering::SeqCst);
        self.0.batches.store(0, Ordering::SeqCst);
        self.0.pieces.store(0, Ordering::SeqCst);
    }

    /// Pieces of mapped files that were pinned, since it was made or [`set`](Self::set).
    pub fn mapped_pieces(&self) -> u64 {
        self.0.pieces.load(Ordering::SeqCst)
    }

    /// Bytes of physical memory that are taken for addresses that were reserved.
    pub fn physical_bytes(&self) -> u64 {
        self.0.memory.held_virtual().1
    }

    fn free_bytes(&self) -> u64 {
        let taken = self.0.memory.held().1 + self.physical_bytes();
        self.options().memory_bytes.saturating_sub(taken)
    }

    fn take(&self, what: &str, len: u64) -> Result<()> {
        self.call(what)?;
        let free = self.free_bytes();
        if len > free {
            let context = format!("allocate {len} bytes on the simulated device, which has {free} free");
            return Err(Error::new(ErrorKind::OutOfDeviceMemory, context));
        }
        Ok(())
    }

    /// What was not given back: memory, pinned arenas, streams. Empty when all was.
    pub fn leaks(&self) -> Vec<String> {
        let mut found = Vec::new();
        let (blocks, bytes) = self.0.memory.held();
        if blocks > 0 {
            found.push(format!("{blocks} allocations of {bytes} bytes"));
        }
        let (physical, bytes, reserved) = self.0.memory.held_virtual();
        if physical > 0 || reserved > 0 {
            found.push(format!("{physical} physical memories of {bytes} bytes, {reserved} reservations"));
        }
        let pinned = locked(&self.0.pinned).len();
        if pinned > 0 {
            found.push(format!("{pinned} pinned arenas"));
        }
        let mapped = locked(&self.0.mapped).len();
        if mapped > 0 {
            found.push(format!("{mapped} pinned pieces of files"));
        }
        let streams = self.0.streams.load(Ordering::SeqCst);
        if streams > 0 {
            found.push(format!("{streams} streams"));
        }
        found
    }

    /// What a drive does that writes to the device's memory by itself.
    pub(crate) fn poke(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.0.memory.write(address, bytes)
    }

    /// What a drive does that reads the device's memory by itself.
    pub(crate) fn peek(&self, address: u64, out: &mut [u8]) -> Result<()> {
        self.0.memory.read(address, out)
    }

    fn options(&self) -> FakeOptions {
        locked(&self.0.options).clone()
    }

    fn call(&self, what: &str) -> Result<()> {
        let number = self.0.calls.fetch_add(1, Ordering::SeqCst) + 1;
        if number == self.options().fail_call {
            let context = format!("{what}: call {number} of the simulated device was told to fail");
            return Err(Error::new(ErrorKind::Device, context));
        }
        Ok(())
    }
}

impl Driver for FakeDriver {
    fn info(&self) -> Result<DeviceInfo> {
        self.call("info")?;
        let memory_bytes = self.options().memory_bytes;
        Ok(DeviceInfo {
            id: "fake:0".into(),
            name: "simulated device".into(),
            pci: "0000:00:00.0".into(),
            memory_bytes,
            free_bytes: self.free_bytes(),
            driver: "0.0".into(),
        })
    }

    fn pin(&self, arena: &Arena) -> Result<()> {
        self.call("pin")?;
        locked(&self.0.pinned).push(arena.clone());
        Ok(())
    }

    fn unpin(&self, arena: &Arena) -> Result<()> {
        let mut pinned = locked(&self.0.pinned);
        match pinned.iter().position(|other| other.as_ptr() == arena.as_ptr()) {
            Some(at) => {
                pinned.swap_remove(at);
                Ok(())
            }
            None => Err(Error::new(ErrorKind::Invalid, "unpin an arena that is not pinned")),
        }
    }

    fn alloc(&self, len: u64) -> Result<u64> {
        self.take("alloc", len)?;
        self.0.memory.alloc(len, Some(POISON))
    }

    fn free(&self, address: u64) -> Result<()> {
        self.0.memory.free(address).map(drop)
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        self.call("stream")?;
        let (memory, batches, driver) = (self.0.memory.clone(), self.0.batches.clone(), self.clone());
        let copier = Copier::start(self.options().lag, move |work| {
            let batch = match work {
                Work::Copy(batch) => batch,
                Work::Move(job) => return memory.shuffle(job),
            };
            let number = batches.fetch_add(1, Ordering::SeqCst) + 1;
            if number == driver.options().fail_batch {
                let context = format!("batch {number} of the simulated device was told to fail");
                return Err(Error::new(ErrorKind::Device, context));
            }
            memory.copy(batch, &|piece, offset, out| {
                let pieces = locked(&driver.0.mapped);
                let bytes =
                    pieces.get(&piece.address()).and_then(|bytes| bytes.get(offset..offset + out.len()));
                let bytes = bytes
                    .ok_or_else(|| Error::new(ErrorKind::Device, "copy from a file that is not pinned"))?;
                out.copy_from_slice(bytes);
                Ok(())
            })
        })?;
        self.0.streams.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeStream { copier, driver: self.clone() }))
    }

    fn copy_within(&self, moves: &[DeviceCopy]) -> Result<()> {
        self.call("copy_within")?;
        self.0.memory.copy_within(moves)
    }

    fn check_range(&self, address: u64, len: u64) -> Result<()> {
        self.0.memory.check_range(address, len)
    }

    fn pin_mapped(&self, mapping: &Mapping, offset: u64, len: usize) -> Result<()> {
        self.call("pin_mapped")?;
        mapping.check(offset, len)?;
        if self.0.pieces.fetch_add(1, Ordering::SeqCst) >= self.options().mapped_pieces {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the simulated device takes no more of mapped files",
            ));
        }
        // What a device would see: the pages as they are now, and nothing behind the end of the file.
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match mapping.file().read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) => return Err(Error::io("pin a piece of a file", error)),
            }
        }
        let start = mapping.address() + offset;
        let mut pieces = locked(&self.0.mapped);
        let before = pieces.range(..start + len as u64).next_back();
        if before.is_some_and(|(other, bytes)| other + bytes.len() as u64 > start) {
            return Err(Error::new(ErrorKind::Device, "pin a piece of a file that is pinned already"));
        }
        pieces.insert(start, bytes);
        Ok(())
    }

    fn unpin_mapped(&self, mapping: &Mapping, offset: u64, len: usize) -> Result<()> {
        match locked(&self.0.mapped).remove(&(mapping.address() + offset)) {
            Some(bytes) if bytes.len() == len => Ok(()),
            _ => Err(Error::new(ErrorKind::Invalid, "unpin a piece of a file that is not pinned so")),
        }
    }

    fn virtual_memory(&self) -> Option<&dyn VirtualMemory> {
        Some(self)
    }
}

impl VirtualMemory for FakeDriver {
    fn granularity(&self) -> Result<u64> {
        self.call("granularity")?;
        Ok(GRANULARITY)
    }

    fn reserve(&self, len: u64) -> Result<u64> {
        self.call("reserve")?;
        self.0.memory.reserve(len)
    }

    fn unreserve(&self, address: u64, len: u64) -> Result<()> {
        self.0.memory.unreserve(address, len)
    }

    fn create(&self, len: u64) -> Result<u64> {
        self.take("create", len)?;
        self.0.memory.create(len)
    }

    fn release(&self, physical: u64) -> Result<()> {
        self.0.memory.release(physical)
    }

    fn map(&self, address: u64, len: u64, physical: u64) -> Result<()> {
        self.call("map")?;
        self.0.memory.map(address, len, physical, Some(POISON))
    }

    fn unmap(&self, address: u64, len: u64) -> Result<()> {
        self.0.memory.unmap(address, len)
    }
}

struct FakeStream {
    copier: Copier,
    driver: FakeDriver,
}

impl Stream for FakeStream {
    fn copy(&mut self, batch: Batch) -> std::result::Result<(), Refused> {
        if let Err(error) = self.driver.call("copy") {
            return Err(Refused { batch, error });
        }
        let pinned = locked(&self.driver.0.pinned);
        let stray = batch.buffers.iter().any(|buffer| !pinned.iter().any(|arena| buffer.is_in(arena)))
            || batch.lent.iter().any(|lent| match lent {
                Lent::Page(page) => !pinned.iter().any(|arena| page.is_in(arena)),
                Lent::Buffer(buffer) => !pinned.iter().any(|arena| buffer.is_in(arena)),
                Lent::Mapped(piece) => !locked(&self.driver.0.mapped).contains_key(&piece.address()),
            });
        drop(pinned);
        if stray {
            let error = Error::new(ErrorKind::Invalid, "copy from host memory that is not pinned");
            return Err(Refused { batch, error });
        }
        self.copier.copy(batch)
    }

    fn reap(&mut self, wait: bool, each: &mut dyn FnMut(Batch)) -> Result<usize> {
        if wait {
            self.driver.call("wait")?;
        }
        self.copier.reap(wait, each)
    }

    fn in_flight(&self) -> usize {
        self.copier.in_flight()
    }

    fn shuffle(&mut self, job: &Arc<Move>) -> Result<()> {
        self.driver.call("shuffle")?;
        self.copier.shuffle(job)
    }

    fn finish(&mut self, each: &mut dyn FnMut(Batch)) -> Result<()> {
        self.driver.call("finish")?;
        self.copier.finish(each)
    }
}

impl Drop for FakeStream {
    fn drop(&mut self) {
        self.driver.0.streams.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use nvme::{ArenaOptions, Buffer};

    use super::*;
    use crate::driver::{Direction, Part};

    fn device(options: FakeOptions) -> (FakeDriver, Arena) {
        let driver = FakeDriver::new(options);
        let arena = Arena::new(1 << 20, ArenaOptions { huge: false, ..ArenaOptions::default() }).unwrap();
        driver.pin(&arena).unwrap();
        (driver, arena)
    }

    fn batch(direction: Direction, buffer: Buffer, device: u64, len: usize) -> Batch {
        Batch {
            direction,
            buffers: vec![buffer],
            lent: Vec::new(),
            parts: vec![Part { buffer: 0, offset: 0, device, len }],
            tag: 0,
        }
    }

    #[test]
    fn memory_is_poison_until_a_copy_was_waited_for() {
        let (driver, arena) = device(FakeOptions::default());
        let address = driver.alloc(8192).unwrap();
        let (mut to, mut from) = (driver.stream().unwrap(), driver.stream().unwrap());
        let seen = |from: &mut Box<dyn Stream>| {
            from.copy(batch(Direction::ToHost, arena.alloc(4096).unwrap(), address, 4096)).unwrap();
            let mut first = None;
            from.reap(true, &mut |batch| first = Some(batch.buffers[0][0])).unwrap();
            first.unwrap()
        };
        let mut buffer = arena.alloc(4096).unwrap();
        buffer.fill(7);
        to.copy(batch(Direction::ToDevice, buffer, address, 4096)).unwrap();
        assert_eq!(to.reap(false, &mut drop).unwrap(), 0);
        assert_eq!(seen(&mut from), POISON, "a copy that nobody waited for must not be there");
        assert_eq!(to.reap(true, &mut drop).unwrap(), 1);
        assert_eq!(seen(&mut from), 7);
        drop((to, from));
        driver.free(address).unwrap();
        driver.unpin(&arena).unwrap();
        assert!(driver.leaks().is_empty());
    }

    #[test]
    fn misuse_is_refused() {
        let (driver, arena) = device(FakeOptions { memory_bytes: 1 << 20, ..FakeOptions::default() });
        let address = driver.alloc(4096).unwrap();
        assert_eq!(driver.alloc(1 << 20).unwrap_err().kind(), ErrorKind::OutOfDeviceMemory);
        let mut stream = driver.stream().unwrap();
        let stray = batch(Direction::ToDevice, Buffer::heap(4096).unwrap(), address, 4096);
        assert!(stream.copy(stray).unwrap_err().error.to_string().contains("not pinned"));
        let long = batch(Direction::ToDevice, arena.alloc(4096).unwrap(), address, 4097);
        assert_eq!(stream.copy(long).unwrap_err().error.kind(), ErrorKind::Invalid);
        let outside = batch(Direction::ToDevice, arena.alloc(4096).unwrap(), address + 1, 4096);
        stream.copy(outside).unwrap();
        assert_eq!(stream.reap(true, &mut drop).unwrap_err().kind(), ErrorKind::Device);
        assert_eq!(driver.leaks().len(), 3);
        drop(stream);
        driver.free(address).unwrap();
        assert!(driver.free(address).unwrap_err().to_string().contains("freed twice"));
        driver.unpin(&arena).unwrap();
        assert!(driver.unpin(&arena).is_err());
    }

    #[test]
    fn the_call_that_shall_fail_fails_and_no_other() {
        let (driver, _arena) = device(FakeOptions { fail_call: 3, ..FakeOptions::default() });
        let address = driver.alloc(1).unwrap();
        assert!(driver.alloc(1).is_err());
        let other = driver.alloc(1).unwrap();
        driver.free(address).unwrap();
        driver.free(other).unwrap();
    }
}
