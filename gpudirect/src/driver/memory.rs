//! Memory by address, for the devices that are none: allocations, and addresses that get their memory later.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme::{Arena, ArenaOptions, Buffer};

use super::mapped::MappedPiece;
use super::reserved::{Physical, Reserved};
use super::{Batch, DeviceCopy, Direction, Lent};
use crate::error::{Error, ErrorKind, Result};
use crate::paged::{Move, Way};

/// Granule of the simulated virtual memory. A GPU's is 2 MiB.
pub(super) const GRANULARITY: u64 = 64 << 10;
/// Bytes that a move copies at a time.
const MOVE_STEP: u64 = 256 << 10;

/// Memory by address. Each block is one mapping of huge pages where there are any.
#[derive(Debug, Default)]
pub(super) struct Memory {
    blocks: Mutex<BTreeMap<u64, Block>>,
    reserved: Mutex<BTreeMap<u64, Arc<Reserved>>>,
    physical: Mutex<HashMap<u64, Held>>,
    next: AtomicU64,
}

#[derive(Clone, Debug)]
struct Block {
    len: u64,
    bytes: Arc<Mutex<Buffer>>,
}

#[derive(Debug)]
struct Held {
    memory: Physical,
    mapped_at: Option<u64>,
}

/// Where a range is.
enum Place {
    Block(Arc<Mutex<Buffer>>, usize),
    Reserved(Arc<Reserved>, usize),
}

/// Copies out of a mapped file: piece, offset in it, where to.
pub(super) type FromMapped<'a> = &'a dyn Fn(&MappedPiece, usize, &mut [u8]) -> Result<()>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::Invalid, context)
}

impl Memory {
    /// Takes a block, filled with `poison` where one is given.
    pub fn alloc(&self, len: u64, poison: Option<u8>) -> Result<u64> {
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
    pub fn free(&self, address: u64) -> Result<u64> {
        let block = locked(&self.blocks).remove(&address);
        block.map(|block| block.len).ok_or_else(|| {
            invalid(format!("free memory at {address:#x}: nothing is allocated there (freed twice?)"))
        })
    }

    /// Blocks that were not given back, and their bytes.
    pub fn held(&self) -> (usize, u64) {
        let blocks = locked(&self.blocks);
        (blocks.len(), blocks.values().map(|block| block.len).sum())
    }

    /// Physical memories that were not given back, their bytes, and reservations.
    pub fn held_virtual(&self) -> (usize, u64, usize) {
        let physical = locked(&self.physical);
        let bytes = physical.values().map(|held| held.memory.len() as u64).sum();
        (physical.len(), bytes, locked(&self.reserved).len())
    }

    /// Takes addresses.
    pub fn reserve(&self, len: u64) -> Result<u64> {
        check_granule(len)?;
        let reserved = Reserved::new(usize::try_from(len).unwrap_or(usize::MAX))?;
        let address = reserved.address();
        locked(&self.reserved).insert(address, Arc::new(reserved));
        Ok(address)
    }

    /// Gives addresses back.
    pub fn unreserve(&self, address: u64, len: u64) -> Result<()> {
        let mut all = locked(&self.reserved);
        match all.get(&address) {
            Some(reserved) if reserved.len() as u64 == len && reserved.is_bare() => {
                all.remove(&address);
                Ok(())
            }
            _ => Err(invalid(format!(
                "give {len} bytes of addresses at {address:#x} back: they are not reserved so, or have memory"
            ))),
        }
    }

    /// Takes physical memory.
    pub fn create(&self, len: u64) -> Result<u64> {
        check_granule(len)?;
        let memory = Physical::new(usize::try_from(len).unwrap_or(usize::MAX))?;
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        locked(&self.physical).insert(number, Held { memory, mapped_at: None });
        Ok(number)
    }

    /// Gives physical memory back.
    pub fn release(&self, physical: u64) -> Result<()> {
        let mut all = locked(&self.physical);
        match all.get(&physical) {
            Some(held) if held.mapped_at.is_none() => {
                all.remove(&physical);
                Ok(())
            }
            Some(_) => Err(invalid(format!("release physical memory {physical}, which is mapped"))),
            None => Err(invalid(format!("release physical memory {physical}, which there is not"))),
        }
    }

    /// Maps physical memory.
    pub fn map(&self, address: u64, len: u64, physical: u64, poison: Option<u8>) -> Result<()> {
        let (reserved, offset) = self
            .find_reserved(address, len)
            .ok_or_else(|| invalid(format!("map {len} bytes at {address:#x}, which is not reserved")))?;
        check_granule(offset as u64 + GRANULARITY)?;
        let mut all = locked(&self.physical);
        let held = all
            .get_mut(&physical)
            .filter(|held| held.mapped_at.is_none() && held.memory.len() as u64 == len)
            .ok_or_else(|| {
                invalid(format!("map physical memory {physical}, which is mapped or of another length"))
            })?;
        reserved.map(offset, &held.memory)?;
        held.mapped_at = Some(address);
        if let Some(poison) = poison {
            reserved.write(offset, &vec![poison; len as usize])?;
        }
        Ok(())
    }

    /// Unmaps physical memory.
    pub fn unmap(&self, address: u64, len: u64) -> Result<()> {
        let (reserved, offset) = self
            .find_reserved(address, len)
            .ok_or_else(|| invalid(format!("unmap {len} bytes at {address:#x}, which is not reserved")))?;
        reserved.unmap(offset, len as usize)?;
        for held in locked(&self.physical).values_mut().filter(|held| held.mapped_at == Some(address)) {
            held.mapped_at = None;
        }
        Ok(())
    }

    fn find_reserved(&self, address: u64, len: u64) -> Option<(Arc<Reserved>, usize)> {
        let all = locked(&self.reserved);
        let (start, reserved) = all.range(..=address).next_back()?;
        let offset = address - start;
        (offset.checked_add(len)? <= reserved.len() as u64).then(|| (reserved.clone(), offset as usize))
    }

    fn find(&self, address: u64, len: u64) -> Result<Place> {
        let blocks = locked(&self.blocks);
        let found = blocks.range(..=address).next_back().and_then(|(start, block)| {
            let offset = address - start;
            (offset.checked_add(len)? <= block.len)
                .then(|| Place::Block(block.bytes.clone(), offset as usize))
        });
        drop(blocks);
        found
            .or_else(|| self.find_reserved(address, len).map(|(reserved, at)| Place::Reserved(reserved, at)))
            .ok_or_else(|| {
                let context = format!("copy {len} bytes at {address:#x}, which is outside every allocation");
                Error::new(ErrorKind::Device, context)
            })
    }

    /// Refuses a range that is not memory.
    pub fn check_range(&self, address: u64, len: u64) -> Result<()> {
        match self.find(address, len)? {
            Place::Block(..) => Ok(()),
            Place::Reserved(reserved, at) => reserved.check_range(at, len as usize),
        }
    }

    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        match self.find(address, out.len() as u64)? {
            Place::Block(bytes, at) => out.copy_from_slice(&locked(&bytes)[at..at + out.len()]),
            Place::Reserved(reserved, at) => reserved.read(at, out)?,
        }
        Ok(())
    }

    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        match self.find(address, bytes.len() as u64)? {
            Place::Block(block, at) => locked(&block)[at..at + bytes.len()].copy_from_slice(bytes),
            Place::Reserved(reserved, at) => reserved.write(at, bytes)?,
        }
        Ok(())
    }

    /// Copies bytes from place to place.
    pub fn copy_within(&self, moves: &[DeviceCopy]) -> Result<()> {
        let mut bytes = Vec::new();
        for one in moves {
            bytes.resize(one.len as usize, 0);
            self.read(one.from, &mut bytes)?;
            self.write(one.to, &bytes)?;
        }
        Ok(())
    }

    /// Carries a batch out.
    pub fn copy(&self, batch: &mut Batch, mapped: FromMapped<'_>) -> Result<()> {
        for part in &batch.parts {
            let index = part.buffer as usize;
            let range = part.offset..part.offset + part.len;
            if index < batch.buffers.len() {
                let host = &mut batch.buffers[index][range];
                match batch.direction {
                    Direction::ToDevice => self.write(part.device, host)?,
                    Direction::ToHost => self.read(part.device, host)?,
                }
                continue;
            }
            // Only to the device: the batch was checked.
            match &batch.lent[index - batch.buffers.len()] {
                Lent::Page(page) => self.write(part.device, &page.bytes()[range])?,
                Lent::Buffer(buffer) => self.write(part.device, &buffer[range])?,
                Lent::Mapped(piece) => {
                    let mut bytes = vec![0; part.len];
                    mapped(piece, part.offset, &mut bytes)?;
                    self.write(part.device, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Carries a gather or scatter out, run by run: what the kernel of a GPU does at once.
    pub fn shuffle(&self, job: &Move) -> Result<()> {
        let mut bytes = vec![0; job.run_len().min(MOVE_STEP) as usize];
        job.for_each_run(&mut |paged, staging, len| {
            let (from, to) = match job.way() {
                Way::Gather => (paged, staging),
                Way::Scatter => (staging, paged),
            };
            let mut done = 0;
            while done < len {
                let part = &mut bytes[..(len - done).min(MOVE_STEP) as usize];
                self.read(from + done, part)?;
                self.write(to + done, part)?;
                done += part.len() as u64;
            }
            Ok(())
        })
    }
}

fn check_granule(len: u64) -> Result<()> {
    if len == 0 || !len.is_multiple_of(GRANULARITY) {
        return Err(invalid(format!("{len} bytes of virtual memory: no multiple of {GRANULARITY}")));
    }
    Ok(())
}
