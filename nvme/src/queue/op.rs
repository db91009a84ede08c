//! What goes into a queue and what comes out.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::Buffer;
use crate::device::{Device, transfer_failed};
use crate::error::{Error, ErrorKind, Result};

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Device to buffer.
    Read,
    /// Buffer to device.
    Write,
    /// Makes completed writes durable. Orders nothing: submit it after the completions of what it shall cover.
    Flush,
    /// Tells the device that a range holds nothing any more.
    Discard,
}

impl Verb {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Read => "read",
            Verb::Write => "write",
            Verb::Flush => "flush",
            Verb::Discard => "discard",
        }
    }
}

/// One operation. It owns its buffer until its [`Completion`] gives it back.
#[derive(Debug)]
pub struct Op {
    /// What to do.
    pub verb: Verb,
    /// On which device.
    pub device: Arc<dyn Device>,
    /// Bytes from the start of the device.
    pub offset: u64,
    /// The memory, for reads and writes.
    pub buffer: Option<Buffer>,
    /// Which part of the buffer, bytes. For a discard: its length is the length to discard.
    pub range: Range<usize>,
    /// The caller's own: comes back with the completion.
    pub tag: u64,
}

impl Op {
    /// Fills the whole buffer from `offset`.
    pub fn read(device: Arc<dyn Device>, offset: u64, buffer: Buffer) -> Op {
        let range = 0..buffer.len();
        Op { verb: Verb::Read, device, offset, buffer: Some(buffer), range, tag: 0 }
    }

    /// Writes the whole buffer at `offset`.
    pub fn write(device: Arc<dyn Device>, offset: u64, buffer: Buffer) -> Op {
        let range = 0..buffer.len();
        Op { verb: Verb::Write, device, offset, buffer: Some(buffer), range, tag: 0 }
    }

    /// Makes completed writes durable.
    pub fn flush(device: Arc<dyn Device>) -> Op {
        Op { verb: Verb::Flush, device, offset: 0, buffer: None, range: 0..0, tag: 0 }
    }

    /// Forgets `len` bytes at `offset`.
    pub fn discard(device: Arc<dyn Device>, offset: u64, len: usize) -> Op {
        Op { verb: Verb::Discard, device, offset, buffer: None, range: 0..len, tag: 0 }
    }

    /// The same, with the caller's tag.
    pub fn tag(mut self, tag: u64) -> Op {
        self.tag = tag;
        self
    }

    /// The same, moving only this part of the buffer.
    pub fn range(mut self, range: Range<usize>) -> Op {
        self.range = range;
        self
    }

    /// "read 4096 bytes at 0 of /x".
    pub(super) fn describe(&self) -> String {
        match self.verb {
            Verb::Flush => format!("flush {}", self.device.name()),
            verb => {
                format!(
                    "{} {} bytes at {} of {}",
                    verb.name(),
                    self.range.len(),
                    self.offset,
                    self.device.name()
                )
            }
        }
    }

    /// The error of this operation, which the kernel refused.
    pub(super) fn failed(&self, error: std::io::Error) -> Error {
        let end = self.offset.saturating_add(self.range.len() as u64);
        transfer_failed(&*self.device, end, error, self.describe())
    }

    /// Everything but the buffer, for a completion whose memory the kernel still holds.
    pub(super) fn without_buffer(&self) -> Op {
        Op {
            verb: self.verb,
            device: self.device.clone(),
            offset: self.offset,
            buffer: None,
            range: self.range.clone(),
            tag: self.tag,
        }
    }

    /// Refuses what cannot work, before the kernel sees it. The hot path of `push`: comparisons only.
    pub(super) fn check(&self) -> Result<()> {
        let device = &*self.device;
        if self.verb == Verb::Flush {
            return Ok(());
        }
        let len = self.range.end.wrapping_sub(self.range.start);
        if self.range.start >= self.range.end {
            return Err(self.refuse(ErrorKind::Invalid, "the range is empty"));
        }
        let align = device.alignment() as usize;
        if self.verb != Verb::Read && device.read_only() {
            return Err(self.refuse(ErrorKind::PermissionDenied, "the device was opened read-only"));
        }
        let mut bits = self.offset as usize | len;
        if self.verb != Verb::Discard {
            let Some(buffer) = &self.buffer else {
                return Err(self.refuse(ErrorKind::Invalid, "it has no buffer"));
            };
            if self.range.end > buffer.len() {
                let why = format!("its range {:?} exceeds its buffer of {} bytes", self.range, buffer.len());
                return Err(self.refuse(ErrorKind::Invalid, &why));
            }
            bits |= buffer.as_ptr() as usize + self.range.start;
        }
        if bits & (align - 1) != 0 {
            let why = format!("offset, length and memory must be multiples of {align}");
            return Err(self.refuse(ErrorKind::Misaligned, &why));
        }
        let end = self.offset.checked_add(len as u64);
        if end.is_none_or(|end| end > device.known_len()) {
            self.check_end(end, device.len())?;
        }
        Ok(())
    }

    /// A read may cross the end of a file inside its last block: direct I/O carries whole blocks, and gives what
    /// there is.
    fn check_end(&self, end: Option<u64>, device_len: u64) -> Result<()> {
        let lba = u64::from(self.device.lba_size());
        let limit = match self.verb {
            Verb::Read if self.offset < device_len => device_len.next_multiple_of(lba),
            _ => device_len,
        };
        match end {
            Some(end) if end <= limit => Ok(()),
            _ => Err(self.refuse(ErrorKind::OutOfRange, &format!("the device is {device_len} bytes long"))),
        }
    }

    #[cold]
    fn refuse(&self, kind: ErrorKind, why: &str) -> Error {
        Error::new(kind, format!("{}: {why}", self.describe()))
    }
}

/// An operation that a queue did not take, handed back.
pub struct Refused {
    /// Untouched.
    pub op: Op,
    /// Why. [`ErrorKind::QueueFull`] means: reap, then push it again.
    pub error: Error,
}

impl fmt::Debug for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused").field("op", &self.op).field("error", &self.error).finish()
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        refused.error
    }
}

/// How an operation ended.
#[derive(Debug)]
pub struct Completion {
    /// The operation's tag.
    pub tag: u64,
    /// The operation; ownership returns. Its buffer is None only after a [`ErrorKind::Timeout`] of a transfer
    /// that the kernel could not cancel: that memory is the kernel's until the device answers, and goes back to
    /// its arena then.
    pub op: Op,
    /// Bytes moved. Less than asked for only when a read crossed the end of a file inside its last block.
    pub result: Result<usize>,
    /// From push to the moment the queue saw the answer; zero where the queue was built not to measure. Of a
    /// simulated device: virtual.
    pub latency: Duration,
}

/// Who executes the operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// io_uring, or threads where the kernel refuses it.
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// A pool of threads that call pread and pwrite.
    Threads,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Auto => "auto",
            Backend::IoUring => "io_uring",
            Backend::Threads => "threads",
        })
    }
}
