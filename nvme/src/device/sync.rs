//! Blocking transfers on a descriptor: whole or an error, any alignment.
//!
//! ```text
//!        |<------------- the caller's range ------------->|
//! |......####|##########|##########|##########|###........|   blocks
//!   head      middle: straight from the caller's memory     tail
//!             where that is aligned, else by a bounce buffer
//! ```

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{Device, DeviceKind, Target};
use crate::buffer::{Buffer, PAGE};
use crate::error::{Error, ErrorKind, Result};

/// Bounce buffers are at most this long, bytes.
const BOUNCE: usize = 1 << 20;

/// Reads until `buf` is full. Returns how much was read before the end of the file. Address, length and offset
/// are as aligned as the descriptor needs.
fn pread_full(fd: BorrowedFd<'_>, offset: u64, buf: &mut [u8], align: usize) -> rustix::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(fd, &mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            // A direct read must go on at a block boundary; what lies before it is read once more.
            Ok(n) if (done + n) % align != 0 && done + n < buf.len() => {
                let aligned = (done + n) / align * align;
                if aligned == done {
                    return Ok(done + n);
                }
                done = aligned;
            }
            Ok(n) => done += n,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn pwrite_full(fd: BorrowedFd<'_>, offset: u64, buf: &[u8], align: usize) -> rustix::io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pwrite(fd, &buf[done..], offset + done as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) if done + n == buf.len() => break,
            // As for reads; a write of less than a block that leaves a rest cannot go on.
            Ok(n) if n / align == 0 => return Err(Errno::IO),
            Ok(n) => done += n / align * align,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn failed(device: &dyn Device, verb: &str, offset: u64, len: usize, error: Errno) -> Error {
    let doing = format!("{verb} {len} bytes at {offset} of {}", device.name());
    transfer_failed(device, offset + len as u64, error.into(), doing)
}

/// Of a transfer up to `end` that the kernel refused. A write to a block device that was removed is told "no space", because the
/// kernel then counts the device as empty: a pool must not take that for a full one.
pub(crate) fn transfer_failed(device: &dyn Device, end: u64, error: std::io::Error, doing: String) -> Error {
    if device.kind() == DeviceKind::Block
        && error.raw_os_error() == Some(Errno::NOSPC.raw_os_error())
        && let Target::Fd(fd) = device.target()
        && rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0)).is_ok_and(|len| len < end)
    {
        let context = format!("{doing}: the drive was removed, or became shorter, while it was in use");
        return Error::new(ErrorKind::Gone, context).with_source(error);
    }
    Error::os(error, doing)
}

/// `Device::read_at` for a descriptor.
pub(crate) fn read_fd(device: &dyn Device, fd: BorrowedFd<'_>, offset: u64, buf: &mut [u8]) -> Result<()> {
    super::check_range(device, "read", offset, buf.len() as u64)?;
    let align = device.alignment() as usize;
    let len = buf.len();
    let err = |error| failed(device, "read", offset, len, error);
    let short = |got: usize| {
        if device.kind() == DeviceKind::Block {
            return Error::new(
                ErrorKind::Gone,
                format!(
                    "read {len} bytes at {offset} of {}: the drive was removed, or became shorter, while it was in use",
                    device.name()
                ),
            );
        }
        Error::new(
            ErrorKind::ShortTransfer,
            format!("read {len} bytes at {offset} of {}: got {got}", device.name()),
        )
    };
    if is_aligned(offset, buf, align) {
        let got = pread_full(fd, offset, buf, align).map_err(err)?;
        return if got == buf.len() { Ok(()) } else { Err(short(got)) };
    }
    let mut bounce = Buffer::heap((buf.len() + 2 * align).min(BOUNCE).next_multiple_of(PAGE))?;
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let start = at / align as u64 * align as u64;
        let skip = (at - start) as usize;
        let want = (skip + buf.len() - done).next_multiple_of(align).min(bounce.len());
        let got = pread_full(fd, start, &mut bounce[..want], align).map_err(err)?;
        let usable = got.saturating_sub(skip).min(buf.len() - done);
        if usable == 0 {
            return Err(short(done));
        }
        buf[done..done + usable].copy_from_slice(&bounce[skip..skip + usable]);
        done += usable;
    }
    Ok(())
}

/// `Device::write_at` for a descriptor. `lock` orders read-modify-writes of one device.
pub(crate) fn write_fd(
    device: &dyn Device,
    fd: BorrowedFd<'_>,
    lock: &Mutex<()>,
    offset: u64,
    buf: &[u8],
) -> Result<()> {
    super::check_writable(device, "write")?;
    super::check_range(device, "write", offset, buf.len() as u64)?;
    let align = device.alignment() as usize;
    let err = |error| failed(device, "write", offset, buf.len(), error);
    if is_aligned(offset, buf, align) {
        // Also under the lock: a whole-block write must not slip between another's read and write.
        let _guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        return pwrite_full(fd, offset, buf, align).map_err(err);
    }
    let _guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
    let device_len = device.len();
    let mut bounce = Buffer::heap((buf.len() + 2 * align).min(BOUNCE).next_multiple_of(PAGE))?;
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let start = at / align as u64 * align as u64;
        let skip = (at - start) as usize;
        let part = (buf.len() - done).min(bounce.len() - skip);
        let span = (skip + part).next_multiple_of(align);
        if skip != 0 {
            read_block(fd, start, &mut bounce[..align], align).map_err(err)?;
        }
        let tail_is_partial = !(skip + part).is_multiple_of(align);
        let head_was_tail = skip != 0 && span == align;
        if tail_is_partial && !head_was_tail {
            let last = span - align;
            read_block(fd, start + last as u64, &mut bounce[last..span], align).map_err(err)?;
        }
        bounce[skip..skip + part].copy_from_slice(&buf[done..done + part]);
        pwrite_full(fd, start, &bounce[..span], align).map_err(err)?;
        if start + span as u64 > device_len {
            // The file ends inside its last block, and a direct write carries whole blocks only.
            rustix::fs::ftruncate(fd, device_len).map_err(err)?;
        }
        done += part;
    }
    Ok(())
}

/// One block, zero-filled beyond the end of the file.
fn read_block(fd: BorrowedFd<'_>, offset: u64, block: &mut [u8], align: usize) -> rustix::io::Result<()> {
    let got = pread_full(fd, offset, block, align)?;
    block[got..].fill(0);
    Ok(())
}

fn is_aligned(offset: u64, buf: &[u8], align: usize) -> bool {
    offset.is_multiple_of(align as u64)
        && buf.len().is_multiple_of(align)
        && (buf.as_ptr() as usize).is_multiple_of(align)
}

/// `Device::flush` for a descriptor.
pub(crate) fn flush_fd(device: &dyn Device, fd: BorrowedFd<'_>) -> Result<()> {
    loop {
        match rustix::fs::fdatasync(fd) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::os(error, format!("flush {}", device.name()))),
            Ok(()) => return Ok(()),
        }
    }
}

/// `Device::discard` for a descriptor: deallocates in a file, write-zeroes with unmap on a block device.
pub(crate) fn discard_fd(device: &dyn Device, fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
    super::check_writable(device, "discard")?;
    super::check_range(device, "discard", offset, len)?;
    if len == 0 {
        return Ok(());
    }
    loop {
        match rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::INTR) => {}
            // Not every file system and drive can; the promise is only that the caller does not care.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) | Ok(()) => return Ok(()),
            Err(error) => {
                return Err(Error::os(
                    error,
                    format!("discard {len} bytes at {offset} of {}", device.name()),
                ));
            }
        }
    }
}
