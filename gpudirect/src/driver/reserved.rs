//! Addresses before their memory, on the host: what CUDA's virtual memory management is on a GPU.
//!
//! A reservation is a mapping without access; physical memory is an anonymous file that is mapped over a part of it. Bytes
//! are only copied in and out, under a lock and after a look at what is mapped, so that no copy meets a part without memory.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::{Error, ErrorKind, Result};

/// Memory without an address.
#[derive(Debug)]
pub(super) struct Physical {
    file: OwnedFd,
    len: usize,
}

impl Physical {
    /// Takes `len` bytes, zeroed.
    pub fn new(len: usize) -> Result<Physical> {
        let fail = |error: rustix::io::Errno| Error::io(format!("take {len} bytes of host memory"), error);
        let file = rustix::fs::memfd_create("nvtier-physical", MemfdFlags::CLOEXEC).map_err(fail)?;
        rustix::fs::ftruncate(&file, len as u64).map_err(fail)?;
        Ok(Physical { file, len })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }
}

/// A range of addresses.
#[derive(Debug)]
pub(super) struct Reserved {
    start: NonNull<c_void>,
    len: usize,
    /// Offset and length of what is mapped.
    mapped: Mutex<BTreeMap<usize, usize>>,
}

// SAFETY: the mapping belongs to the process; its bytes are touched under the mutex only, by copies.
unsafe impl Send for Reserved {}
// SAFETY: see Send.
unsafe impl Sync for Reserved {}

impl Reserved {
    /// Takes addresses; `len` is not 0.
    pub fn new(len: usize) -> Result<Reserved> {
        let fail = |error: rustix::io::Errno| Error::io(format!("reserve {len} bytes of addresses"), error);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), flags) };
        let start = NonNull::new(start.map_err(fail)?).ok_or_else(|| fail(rustix::io::Errno::NOMEM))?;
        Ok(Reserved { start, len, mapped: Mutex::default() })
    }

    /// Where it starts.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no memory is mapped.
    pub fn is_bare(&self) -> bool {
        self.mapped().is_empty()
    }

    fn mapped(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a range, which is refused where it is not inside.
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            let context = format!("{len} bytes at {offset} of a reservation of {}", self.len);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        // SAFETY: offset <= self.len, so the sum stays inside the one mapping.
        Ok(unsafe { self.start.as_ptr().cast::<u8>().add(offset) })
    }

    /// Maps memory, where none is.
    pub fn map(&self, offset: usize, physical: &Physical) -> Result<()> {
        let len = physical.len;
        let address = self.at(offset, len)?;
        let mut mapped = self.mapped();
        let before = mapped.range(..offset + len).next_back();
        if before.is_some_and(|(start, other)| start + other > offset) {
            let context = format!("map {len} bytes at {offset}, where memory is mapped already");
            return Err(Error::new(ErrorKind::Device, context));
        }
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: replaces a part of our own reservation (checked by `at`) in which nothing is mapped, and which nobody reads
        // or writes meanwhile, as that needs the lock.
        unsafe { rustix::mm::mmap(address.cast(), len, access, flags, &physical.file, 0) }
            .map_err(|error| Error::io(format!("map {len} bytes"), error))?;
        mapped.insert(offset, len);
        Ok(())
    }

    /// Takes memory away that was mapped by one call.
    pub fn unmap(&self, offset: usize, len: usize) -> Result<()> {
        let address = self.at(offset, len)?;
        let mut mapped = self.mapped();
        if mapped.get(&offset) != Some(&len) {
            let context = format!("unmap {len} bytes at {offset}, where no such memory is mapped");
            return Err(Error::new(ErrorKind::Device, context));
        }
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: replaces a part of our own reservation, as in `map`; no reference to its bytes exists.
        unsafe { rustix::mm::mmap_anonymous(address.cast(), len, ProtFlags::empty(), flags) }
            .map_err(|error| Error::io(format!("unmap {len} bytes"), error))?;
        mapped.remove(&offset);
        Ok(())
    }

    /// Refuses a range that is not mapped from its first byte to its last.
    fn check(&self, mapped: &BTreeMap<usize, usize>, offset: usize, len: usize) -> Result<*mut u8> {
        let address = self.at(offset, len)?;
        let mut at = offset;
        while at < offset + len {
            match mapped.range(..=at).next_back() {
                Some((start, other)) if start + other > at => at = start + other,
                _ => {
                    let context = format!("use {len} bytes at {offset}: nothing is mapped at {at}");
                    return Err(Error::new(ErrorKind::Device, context));
                }
            }
        }
        Ok(address)
    }

    /// Whether memory is mapped from a range's first byte to its last.
    pub fn check_range(&self, offset: usize, len: usize) -> Result<()> {
        self.check(&self.mapped(), offset, len).map(drop)
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        let mapped = self.mapped();
        let from = self.check(&mapped, offset, out.len())?;
        // SAFETY: `check` found the range inside the reservation and backed by memory; the lock keeps it so, and keeps other
        // copies away. `out` is a reference of ours and cannot overlap memory that only this type has a pointer to.
        unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let mapped = self.mapped();
        let to = self.check(&mapped, offset, bytes.len())?;
        // SAFETY: as in `read`, with the reservation as target; it was mapped for writing.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, with whatever was mapped over it; no pointer into it outlives a call.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.len) } {
            tracing::error!("give {} bytes of addresses back: {error}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_and_goes_at_addresses_that_stay() {
        let reserved = Reserved::new(64 << 10).unwrap();
        let address = reserved.address();
        let (one, two) = (Physical::new(8192).unwrap(), Physical::new(8192).unwrap());
        reserved.map(4096, &one).unwrap();
        reserved.map(12_288, &two).unwrap();
        reserved.write(10_000, &[7; 4000]).unwrap();
        let mut seen = [0; 4000];
        reserved.read(10_000, &mut seen).unwrap();
        assert_eq!(seen, [7; 4000]);
        reserved.unmap(12_288, 8192).unwrap();
        assert!(
            reserved.read(10_000, &mut seen).unwrap_err().to_string().contains("nothing is mapped at 12288")
        );
        assert!(reserved.write(0, &[1]).is_err());
        // What was in the physical memory is there wherever it is mapped.
        reserved.map(40_960, &two).unwrap();
        reserved.read(40_960, &mut seen[..1]).unwrap();
        assert_eq!((seen[0], reserved.address()), (7, address));
        for misuse in [
            reserved.map(8192, &two),
            reserved.map(60 << 10, &two),
            reserved.unmap(4096, 4096),
            reserved.unmap(20_480, 8192),
            reserved.read(usize::MAX, &mut [0]),
        ] {
            assert!(misuse.is_err());
        }
    }
}
