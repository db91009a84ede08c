//! What bytes live on: a trait, and the kinds that the kernel serves.
//!
//! A [`Device`] says how long it is and how it must be addressed, and gives blocking helpers for superblocks
//! and tools. Bulk data goes through a [`Queue`](crate::Queue), which asks [`Device::target`] how to reach it.

#![allow(unsafe_code)]

mod block;
mod file;
mod nvme_char;
mod sync;

pub use block::BlockDevice;
pub use file::FileDevice;
pub use nvme_char::NvmeCharDevice;
pub(crate) use sync::{discard_fd, flush_fd, read_fd, transfer_failed, write_fd};

use std::fmt;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::passthrough::NvmeTarget;

/// The largest transfer the kernel does in one system call, MAX_RW_COUNT (read(2)), rounded down to 1 GiB: the
/// kernel itself splits it to what the drive takes.
pub(crate) const KERNEL_MAX_TRANSFER: u32 = 1 << 30;

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// A raw block device (`/dev/nvme0n1`, a partition, a loop device).
    Block,
    /// A regular file.
    File,
    /// In memory, see [`SimDevice`](crate::SimDevice).
    Sim,
    /// An NVMe generic character device (`/dev/ng0n1`), reached by passthrough.
    NvmeChar,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Block => "block device",
            DeviceKind::File => "file",
            DeviceKind::Sim => "simulated device",
            DeviceKind::NvmeChar => "NVMe character device",
        })
    }
}

/// How to open one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOptions {
    /// O_DIRECT: past the page cache. Default: true.
    pub direct: bool,
    /// No writes. A block device opened so is not claimed exclusively. Default: false.
    pub read_only: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions { direct: true, read_only: false }
    }
}

/// Bytes at offsets. Object safe. The blocking helpers handle short transfers and EINTR.
pub trait Device: Send + Sync + fmt::Debug {
    /// What it is.
    fn kind(&self) -> DeviceKind;
    /// For messages: a path, or `sim:SEED`.
    fn name(&self) -> &str;
    /// Length now, bytes. May be a system call: see [`Device::known_len`].
    fn len(&self) -> u64;
    /// Its length is zero.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// A length that was true a short while ago, without a system call. Only a hint: files change.
    fn known_len(&self) -> u64 {
        self.len()
    }
    /// Logical block size, bytes: 512 or 4096.
    fn lba_size(&self) -> u32;
    /// What offsets, lengths and memory addresses of queued operations must be multiples of, bytes: the LBA
    /// size, or 1 where the page cache is in between. The blocking helpers take anything.
    fn alignment(&self) -> u32 {
        self.lba_size()
    }
    /// The most bytes one operation may carry to it; a queue splits above.
    fn max_transfer(&self) -> u32;
    /// The most bytes that reach the drive as one command, where known: going above costs nothing, but gains
    /// nothing.
    fn optimal_transfer(&self) -> u32 {
        self.max_transfer()
    }
    /// Writes are refused.
    fn read_only(&self) -> bool;
    /// How a queue reaches it.
    fn target(&self) -> Target<'_>;
    /// Fills `buf` from `offset`. Any alignment: bounces inside where it must.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// Writes `buf` at `offset`. Any alignment: partial blocks are read, changed and written under a lock, which
    /// guards against other `write_at` calls on the same value, not against a queue.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()>;
    /// Makes what was written durable: fdatasync(2), on a block device a FLUSH to the drive.
    fn flush(&self) -> Result<()>;
    /// Tells the device that the range holds nothing any more; reads there give zeros or old data. A device that
    /// cannot discard does nothing and succeeds.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;
}

/// How a queue reaches a device.
#[non_exhaustive]
pub enum Target<'a> {
    /// By read, write, fsync and fallocate on this descriptor.
    Fd(BorrowedFd<'a>),
    /// By NVMe commands to this namespace.
    Nvme(NvmeTarget<'a>),
    /// By calling it: executed by the queue itself, in submit order.
    Inline(&'a dyn InlineIo),
}

/// What an inline device answers.
#[derive(Debug)]
pub struct InlineOutcome {
    /// Bytes moved; fewer than asked for is a short transfer, which the queue continues as it would a kernel's.
    pub result: Result<usize>,
    /// How long it would have taken. Virtual: nobody sleeps; the queue holds it against the deadline.
    pub latency: Duration,
}

/// A device that is executed by calling it (simulation).
pub trait InlineIo: Send + Sync {
    /// Reads into `buf` from `offset`.
    fn inline_read(&self, offset: u64, buf: &mut [u8]) -> InlineOutcome;
    /// Writes `buf` at `offset`.
    fn inline_write(&self, offset: u64, buf: &[u8]) -> InlineOutcome;
    /// Makes earlier writes durable.
    fn inline_flush(&self) -> InlineOutcome;
    /// Forgets a range.
    fn inline_discard(&self, offset: u64, len: u64) -> InlineOutcome;
}

/// Opens a regular file as [`FileDevice`], a block device as [`BlockDevice`] and an NVMe generic character device as
/// [`NvmeCharDevice`].
pub fn open(path: impl AsRef<Path>, options: &DeviceOptions) -> Result<Arc<dyn Device>> {
    let path = path.as_ref();
    let kind = std::fs::metadata(path)
        .map_err(|error| Error::os(error, format!("open {}", path.display())))?
        .file_type();
    if kind.is_block_device() {
        Ok(Arc::new(BlockDevice::open(path, options)?))
    } else if kind.is_file() {
        Ok(Arc::new(FileDevice::open(path, options)?))
    } else if kind.is_char_device() {
        Ok(Arc::new(NvmeCharDevice::open(path, options)?))
    } else {
        let what = if kind.is_dir() { "a directory" } else { "neither a regular file nor a block device" };
        Err(Error::new(ErrorKind::Unsupported, format!("open {} as a device: it is {what}", path.display())))
    }
}

/// Refuses a range that is not on the device, naming both.
pub(crate) fn check_range(device: &dyn Device, verb: &str, offset: u64, len: u64) -> Result<()> {
    let end = offset.checked_add(len);
    if end.is_some_and(|end| end <= device.known_len()) {
        return Ok(());
    }
    let device_len = device.len();
    if end.is_some_and(|end| end <= device_len) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::OutOfRange,
        format!("{verb} {len} bytes at {offset} of {}, which is {device_len} bytes long", device.name()),
    ))
}

/// Refuses a change of a device opened for reading.
pub(crate) fn check_writable(device: &dyn Device, verb: &str) -> Result<()> {
    if device.read_only() {
        return Err(Error::new(
            ErrorKind::PermissionDenied,
            format!("{verb} on {}, which was opened read-only", device.name()),
        ));
    }
    Ok(())
}
