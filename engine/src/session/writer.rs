//! Writing a region through a session.

use std::io;

use crate::control::RemoteWriter;
use crate::error::Result;
use crate::session::Entry;
use crate::session::partial::PartialWriter;
use crate::session::reader::io_error;

/// A region being written. Nothing of it can be seen before [`commit`](Self::commit), and then all of it.
///
/// Dropped without commit, it leaves nothing behind, unless it was opened with
/// [`WriterOptions::resume`](crate::WriterOptions::resume): then a later writer of the same path and key finds the bytes from the start
/// up to its [`resume_offset`](Self::resume_offset).
#[derive(Debug)]
pub struct RegionWriter {
    sink: Sink,
    position: u64,
    resume: bool,
}

#[derive(Debug)]
enum Sink {
    Local(Box<PartialWriter>),
    Remote(RemoteWriter),
}

impl RegionWriter {
    pub(crate) fn local(writer: PartialWriter, resume: bool) -> RegionWriter {
        RegionWriter { position: writer.resume_offset(), sink: Sink::Local(Box::new(writer)), resume }
    }

    pub(crate) fn remote(writer: RemoteWriter, resume: bool) -> RegionWriter {
        RegionWriter { position: writer.resume_offset(), sink: Sink::Remote(writer), resume }
    }

    /// Bytes from the start that an earlier writer left, durable; go on from here. 0 without `resume`.
    pub fn resume_offset(&self) -> u64 {
        match &self.sink {
            Sink::Local(writer) => writer.resume_offset(),
            Sink::Remote(writer) => writer.resume_offset(),
        }
    }

    /// Whether it can be resumed when it ends without commit.
    pub fn is_resumable(&self) -> bool {
        self.resume
    }

    /// One past the last byte written.
    pub fn len(&self) -> u64 {
        match &self.sink {
            Sink::Local(writer) => writer.len(),
            Sink::Remote(writer) => writer.len(),
        }
    }

    /// Whether nothing is written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes all of `data` at an offset. May be called by several threads. Gaps read as zeros after the commit.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        match &self.sink {
            Sink::Local(writer) => writer.write_at(offset, data),
            Sink::Remote(writer) => writer.write_at(offset, data),
        }
    }

    /// Writes all of `data` behind what this call wrote before, from [`resume_offset`](Self::resume_offset) on.
    pub fn write_all(&mut self, data: &[u8]) -> Result<()> {
        self.write_at(self.position, data)?;
        self.position += data.len() as u64;
        Ok(())
    }

    /// Makes durable what was written, so that a resumed writer finds it even after a crash. Also done every GiB.
    /// Without `resume` it does nothing.
    pub fn checkpoint(&self) -> Result<()> {
        match &self.sink {
            Sink::Local(writer) => writer.checkpoint(),
            Sink::Remote(writer) => writer.checkpoint(),
        }
    }

    /// Makes the region appear at its path, durable, with its checksums, in place of what was there.
    pub fn commit(self) -> Result<Entry> {
        match self.sink {
            Sink::Local(writer) => writer.commit(),
            Sink::Remote(writer) => writer.commit(),
        }
    }

    /// Gives up, and leaves nothing to resume either.
    pub fn abort(self) -> Result<()> {
        match self.sink {
            Sink::Local(writer) => writer.abort(),
            Sink::Remote(writer) => writer.abort(),
        }
    }
}

impl io::Write for RegionWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_all(data).map_err(io_error)?;
        Ok(data.len())
    }

    /// Nothing is buffered here; [`checkpoint`](RegionWriter::checkpoint) and [`commit`](RegionWriter::commit) make durable.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
