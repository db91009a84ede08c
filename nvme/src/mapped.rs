//! A file in the address space, for those who measure or serve by mapping.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, MsyncFlags, ProtFlags};

use crate::error::{Error, ErrorKind, Result};

/// A shared mapping of a whole file. Bytes are copied in and out; no reference into the mapping ever exists, because
/// other processes may change the file at any time.
///
/// If the file is truncated below an offset that is then touched, the kernel sends SIGBUS (mmap(2)): that ends the
/// process and is no memory error.
#[derive(Debug)]
pub struct MappedFile {
    start: NonNull<c_void>,
    len: usize,
    writable: bool,
    _file: File,
}

// SAFETY: the mapping belongs to the process, not to a thread; the pointer is only used for copies that are bounds
// checked against `len`, which never changes.
unsafe impl Send for MappedFile {}

impl MappedFile {
    /// Maps the whole file; a writable mapping needs a file opened for reading and writing.
    pub fn new(file: File, writable: bool) -> Result<MappedFile> {
        let metadata = file.metadata().map_err(|error| Error::os(error, "stat a file to map"))?;
        let len = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        if len == 0 || len > isize::MAX as usize {
            return Err(Error::new(ErrorKind::Invalid, format!("map a file of {} bytes", metadata.len())));
        }
        let mut protection = ProtFlags::READ;
        protection.set(ProtFlags::WRITE, writable);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours; `len` is not 0.
        // The file is kept open beside it, and the mapping is undone in `Drop` only.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, &file, 0) }
            .map_err(|error| Error::os(error, format!("map {len} bytes")))?;
        let start =
            NonNull::new(start).ok_or_else(|| Error::new(ErrorKind::Invalid, "mapped at address 0"))?;
        Ok(MappedFile { start, len, writable, _file: file })
    }

    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never: an empty file cannot be mapped.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte, for a driver that reads the pages itself. Valid for `len()` bytes while this lives; to touch it by the
    /// processor would raise SIGBUS where the file was truncated.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Tells the kernel that reads go forward: large readahead.
    pub fn advise_sequential(&self) -> Result<()> {
        self.advise(Advice::Sequential)
    }

    /// Tells the kernel that reads jump: no readahead.
    pub fn advise_random(&self) -> Result<()> {
        self.advise(Advice::Random)
    }

    fn advise(&self, advice: Advice) -> Result<()> {
        // SAFETY: the range is exactly the mapping made in `new`; these advices change neither content nor layout.
        unsafe { rustix::mm::madvise(self.start.as_ptr(), self.len, advice) }
            .map_err(|error| Error::os(error, format!("advise {advice:?} on a mapping")))
    }

    /// Copies bytes out of the mapping.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let from = self.at(offset, buf.len())?;
        // SAFETY: `at` made sure that `from` and the next `buf.len()` bytes lie in the mapping, which lives as long as
        // `self`; `buf` is ours alone and cannot overlap memory that only this type has a pointer to. A concurrent change
        // of the file tears the copied bytes, as with read(2); no reference to them exists.
        unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    /// Copies bytes into the mapping; the kernel writes them back in its own time, or at [`MappedFile::sync`].
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        if !self.writable {
            return Err(Error::new(ErrorKind::PermissionDenied, "write to a read-only mapping"));
        }
        let to = self.at(offset, buf.len())?;
        // SAFETY: as in `read_at`, with the mapping as target; it was made writable (checked above).
        unsafe { ptr::copy_nonoverlapping(buf.as_ptr(), to, buf.len()) };
        Ok(())
    }

    /// Writes changed pages back and waits for them (msync(2), MS_SYNC).
    pub fn sync(&self) -> Result<()> {
        // SAFETY: the range is exactly the mapping made in `new`.
        unsafe { rustix::mm::msync(self.start.as_ptr(), self.len, MsyncFlags::SYNC) }
            .map_err(|error| Error::os(error, "msync a mapping"))
    }

    fn at(&self, offset: u64, len: usize) -> Result<*mut u8> {
        let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(len));
        match end {
            Some(end) if end <= self.len => {
                // SAFETY: end - len <= end <= self.len <= isize::MAX: inside the one mapped object.
                Ok(unsafe { self.start.as_ptr().cast::<u8>().add(end - len) })
            }
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("{len} bytes at {offset} of a mapping of {} bytes", self.len),
            )),
        }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, unmapped once; no pointer into it outlives a call.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.len) } {
            tracing::error!("unmap {} bytes: {error}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn bytes_go_in_and_out_and_reach_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        let mapped = MappedFile::new(file.reopen().unwrap(), true).unwrap();
        mapped.advise_sequential().unwrap();
        let mut back = [0; 4];
        mapped.read_at(9_996, &mut back).unwrap();
        assert_eq!(back, [1; 4]);
        mapped.write_at(5_000, &[7; 3]).unwrap();
        mapped.sync().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[4_999..5_004], [1, 7, 7, 7, 1]);
    }

    #[test]
    fn the_ends_are_guarded() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(MappedFile::new(file.reopen().unwrap(), false).unwrap_err().kind(), ErrorKind::Invalid);
        file.write_all(&[1; 100]).unwrap();
        let mapped = MappedFile::new(file.reopen().unwrap(), false).unwrap();
        for (offset, len) in [(97, 4), (u64::MAX, 1), (101, 0)] {
            assert_eq!(mapped.read_at(offset, &mut vec![0; len]).unwrap_err().kind(), ErrorKind::OutOfRange);
        }
        assert_eq!(mapped.write_at(0, &[0]).unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
}
