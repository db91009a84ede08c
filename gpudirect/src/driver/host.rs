//! The machine's own memory as a device: for loads without a GPU, and so that everything above runs in any test.
//!
//! Copies run on a thread of the stream, in order, as a GPU's copy engine does them beside the I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme::{Arena, ArenaOptions, Buffer};

use super::{Batch, DeviceInfo, Direction, Driver, Move, Part, Stream};
use crate::driver::copier::Copier;
use crate::error::{Error, ErrorKind, Result};

/// Memory by address. Each block is one mapping of huge pages where there are any.
#[derive(Debug, Default)]
pub(super) struct Memory {
    blocks: Mutex<BTreeMap<u64, Block>>,
}

#[derive(Clone, Debug)]
struct Block {
    len: u64,
    bytes: Arc<Mutex<Buffer>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// Takes a block, filled with `poison` where one is given.
    pub(super) fn alloc(&self, len: u64, poison: Option<u8>) -> Result<u64> {
        let failed = |error: nvme::Error| {
            let context = format!("allocate {len} bytes of host memory for tensors");
            Error::new(ErrorKind::OutOfDeviceMemory, context).with_source(error)
        };
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        let arena =
            Arena::new(size, ArenaOptions { prefault: false, ..ArenaOptions::default() }).map_err(failed)?;
        let mut bytes = arena.alloc(size).ok_or_else(|| {
            failed(nvme::Error::new(nvme::ErrorKind::NoMemory, "an arena smaller than was asked for"))
        })?;
        if let Some(poison) = poison {
            bytes.fill(poison);
        }
        let address = bytes.as_ref().as_ptr() as u64;
        locked(&self.blocks).insert(address, Block { len, bytes: Arc::new(Mutex::new(bytes)) });
        Ok(address)
    }

    /// Gives a block back.
    pub(super) fn free(&self, address: u64) -> Result<u64> {
        let block = locked(&self.blocks).remove(&address);
        block.map(|block| block.len).ok_or_else(|| {
            let context = format!("free memory at {address:#x}: nothing is allocated there (freed twice?)");
            Error::new(ErrorKind::Invalid, context)
        })
    }

    /// Blocks that were not given back, and their bytes.
    pub(super) fn held(&self) -> (usize, u64) {
        let blocks = locked(&self.blocks);
        (blocks.len(), blocks.values().map(|block| block.len).sum())
    }

    /// Carries a batch out.
    pub(super) fn copy(&self, batch: &mut Batch) -> Result<()> {
        for part in &batch.parts {
            let (block, start) = self.find(part)?;
            let mut bytes = locked(&block);
            let device = &mut bytes[start..start + part.len];
            let host = &mut batch.buffers[part.buffer as usize][part.offset..part.offset + part.len];
            match batch.direction {
                Direction::ToDevice => device.copy_from_slice(host),
                Direction::ToHost => host.copy_from_slice(device),
            }
        }
        Ok(())
    }

    /// Copies bytes from place to place.
    pub(super) fn copy_within(&self, moves: &[Move]) -> Result<()> {
        let mut bytes = Vec::new();
        for one in moves {
            bytes.resize(one.len as usize, 0);
            self.peek(one.from, &mut bytes)?;
            self.poke(one.to, &bytes)?;
        }
        Ok(())
    }

    /// Reads bytes.
    pub(super) fn peek(&self, address: u64, out: &mut [u8]) -> Result<()> {
        let (block, start) = self.find(&Part { buffer: 0, offset: 0, device: address, len: out.len() })?;
        out.copy_from_slice(&locked(&block)[start..start + out.len()]);
        Ok(())
    }

    /// Writes bytes.
    pub(super) fn poke(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let (block, start) = self.find(&Part { buffer: 0, offset: 0, device: address, len: bytes.len() })?;
        locked(&block)[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn find(&self, part: &Part) -> Result<(Arc<Mutex<Buffer>>, usize)> {
        let blocks = locked(&self.blocks);
        let found = blocks.range(..=part.device).next_back().and_then(|(address, block)| {
            let start = part.device - address;
            let end = start.checked_add(part.len as u64)?;
            (end <= block.len).then(|| (block.bytes.clone(), start as usize))
        });
        found.ok_or_else(|| {
            let context =
                format!("copy {} bytes at {:#x}, which is outside every allocation", part.len, part.device);
            Error::new(ErrorKind::Device, context)
        })
    }
}

/// The machine's memory.
#[derive(Debug, Default)]
pub struct HostDriver {
    memory: Arc<Memory>,
}

impl HostDriver {
    /// Opens it.
    pub fn new() -> HostDriver {
        HostDriver::default()
    }
}

impl Driver for HostDriver {
    fn info(&self) -> Result<DeviceInfo> {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        Ok(DeviceInfo {
            id: "cpu".into(),
            name: "host memory".into(),
            pci: String::new(),
            memory_bytes: field("MemTotal:"),
            free_bytes: field("MemAvailable:"),
            driver: String::new(),
        })
    }

    fn pin(&self, _: &Arena) -> Result<()> {
        Ok(())
    }

    fn unpin(&self, _: &Arena) -> Result<()> {
        Ok(())
    }

    fn alloc(&self, len: u64) -> Result<u64> {
        let free = self.info()?.free_bytes;
        // The kernel would promise more than there is, and end some process for it later.
        if free > 0 && len > free {
            let context = format!("allocate {len} bytes of host memory for tensors: {free} are available");
            return Err(Error::new(ErrorKind::OutOfDeviceMemory, context));
        }
        self.memory.alloc(len, None)
    }

    fn free(&self, address: u64) -> Result<()> {
        self.memory.free(address).map(drop)
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        let memory = self.memory.clone();
        Ok(Box::new(Copier::start(0, move |batch| memory.copy(batch))?))
    }

    fn copy_within(&self, moves: &[Move]) -> Result<()> {
        self.memory.copy_within(moves)
    }
}
