//! Reading a region through a session.

use std::io::{self, SeekFrom};

use crate::control::RemoteReader;
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;

/// An open region. `read_at` may be called by several threads; as [`io::Read`] and [`io::Seek`] it has one position.
#[derive(Debug)]
pub struct RegionReader {
    source: Source,
    position: u64,
}

#[derive(Debug)]
enum Source {
    Local(Handle),
    Remote(RemoteReader),
}

impl RegionReader {
    pub(crate) fn local(handle: Handle) -> RegionReader {
        RegionReader { source: Source::Local(handle), position: 0 }
    }

    pub(crate) fn remote(reader: RemoteReader) -> RegionReader {
        RegionReader { source: Source::Remote(reader), position: 0 }
    }

    /// Bytes of the region; of a remote one, when it was opened.
    pub fn len(&self) -> u64 {
        match &self.source {
            Source::Local(handle) => handle.size(),
            Source::Remote(reader) => reader.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The lease behind it, where another process owns the pool.
    pub fn as_remote(&self) -> Option<&RemoteReader> {
        match &self.source {
            Source::Local(_) => None,
            Source::Remote(reader) => Some(reader),
        }
    }

    /// Reads up to the end; returns how many bytes. `Corrupt` where a checksum does not match.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match &self.source {
            Source::Local(handle) => handle.read_at(offset, buf),
            Source::Remote(reader) => reader.read_at(offset, buf),
        }
    }

    /// Fills `buf`; an end before that is an error.
    pub fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.read_at(offset + done as u64, &mut buf[done..])? {
                0 => {
                    let context = format!(
                        "the region ends at {}, before {} bytes from {offset}",
                        self.len(),
                        buf.len()
                    );
                    return Err(Error::new(ErrorKind::OutOfRange, context));
                }
                n => done += n,
            }
        }
        Ok(())
    }
}

impl io::Read for RegionReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.read_at(self.position, buf).map_err(io_error)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl io::Seek for RegionReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::End(by) => (self.len(), by),
            SeekFrom::Current(by) => (self.position, by),
        };
        let at = base.checked_add_signed(by);
        self.position =
            at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek before the start"))?;
        Ok(self.position)
    }
}

/// As an [`io::Error`] that keeps ours as its source.
pub(crate) fn io_error(error: Error) -> io::Error {
    let kind = match error.kind() {
        ErrorKind::NotFound => io::ErrorKind::NotFound,
        ErrorKind::NoSpace => io::ErrorKind::StorageFull,
        ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
        ErrorKind::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
        ErrorKind::Corrupt | ErrorKind::Malformed => io::ErrorKind::InvalidData,
        ErrorKind::Timeout => io::ErrorKind::TimedOut,
        ErrorKind::InvalidArgument | ErrorKind::InvalidName => io::ErrorKind::InvalidInput,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}
