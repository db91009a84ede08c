//! Files in the page cache, as memory that a device reads itself.
//!
//! The processor never touches the mapping: it is only an address for the driver to find the pages by. So a file that is
//! truncated meanwhile raises no SIGBUS; the pinned pages stay, with what they held, and that the file was changed is found
//! afterwards, as for every other way.

use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex};

use nvme::MappedFile;

use super::Driver;
use crate::error::{Error, ErrorKind, Result};

/// Granule of pinning.
pub const PAGE: u64 = 4096;

/// A whole file in the address space, for reading.
pub struct Mapping {
    /// Locked only so that threads may share it: nothing is read through it.
    _map: Mutex<MappedFile>,
    file: File,
    address: u64,
    len: u64,
}

impl Mapping {
    /// Maps a file that is not empty.
    pub fn new(file: &File) -> Result<Mapping> {
        let again = || file.try_clone().map_err(|error| Error::io("map a file", error));
        let map = MappedFile::new(again()?, false)?;
        let (address, len) = (map.address() as u64, map.len());
        Ok(Mapping { _map: Mutex::new(map), file: again()?, address, len })
    }

    /// Where it starts in this process.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes of the file when it was mapped.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Refuses what is not whole pages of the mapping.
    pub(super) fn check(&self, offset: u64, len: usize) -> Result<()> {
        let end = offset.checked_add(len as u64);
        let whole = offset.is_multiple_of(PAGE) && (len as u64).is_multiple_of(PAGE) && len > 0;
        if !whole || end.is_none_or(|end| end > self.len.next_multiple_of(PAGE)) {
            let context = format!("pin {len} bytes at {offset} of a mapping of {} bytes", self.len);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(())
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("len", &self.len).finish()
    }
}

/// Pages of a mapping that a device knows, until this is dropped.
pub struct MappedPiece {
    driver: Arc<dyn Driver>,
    mapping: Arc<Mapping>,
    offset: u64,
    len: usize,
}

impl MappedPiece {
    /// Pins pages.
    pub fn pin(
        driver: &Arc<dyn Driver>,
        mapping: &Arc<Mapping>,
        offset: u64,
        len: usize,
    ) -> Result<MappedPiece> {
        mapping.check(offset, len)?;
        driver.pin_mapped(mapping, offset, len)?;
        Ok(MappedPiece { driver: driver.clone(), mapping: mapping.clone(), offset, len })
    }

    /// First byte in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts in this process.
    pub fn address(&self) -> u64 {
        self.mapping.address + self.offset
    }
}

impl Drop for MappedPiece {
    fn drop(&mut self) {
        if let Err(error) = self.driver.unpin_mapped(&self.mapping, self.offset, self.len) {
            // The device may still know these addresses: nothing else may come there.
            tracing::error!("{error}; {} bytes of a file stay mapped", self.mapping.len);
            std::mem::forget(self.mapping.clone());
        }
    }
}

impl fmt::Debug for MappedPiece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedPiece").field("offset", &self.offset).field("len", &self.len).finish()
    }
}
