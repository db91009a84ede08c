//! A raw block device.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::OFlags;

use super::{Device, DeviceKind, DeviceOptions, KERNEL_MAX_TRANSFER, Target};
use crate::error::{Error, ErrorKind, Result};

/// A raw block device: a drive, a partition, a loop device. Opened for writing it is claimed (O_EXCL), so that
/// neither a mount nor another pool can take it at the same time.
pub struct BlockDevice {
    file: File,
    name: String,
    len: u64,
    lba_size: u32,
    alignment: u32,
    optimal_transfer: u32,
    read_only: bool,
    /// Orders read-modify-writes.
    partial: Mutex<()>,
}

impl BlockDevice {
    /// Opens and measures it. [`ErrorKind::Busy`] when it is mounted or claimed by someone else.
    pub fn open(path: impl AsRef<Path>, options: &DeviceOptions) -> Result<BlockDevice> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let mut flags = OFlags::empty();
        flags.set(OFlags::DIRECT, options.direct);
        // open(2): O_EXCL without O_CREAT on a block device fails with EBUSY if it is in use.
        flags.set(OFlags::EXCL, !options.read_only);
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags.bits() as i32)
            .open(path)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => Error::os(
                    error,
                    format!("open {name}: it is mounted, part of another device, or held by another process"),
                ),
                _ => Error::os(error, format!("open {name}")),
            })?;
        let meta = file.metadata().map_err(|error| Error::os(error, format!("stat {name}")))?;
        if !meta.file_type().is_block_device() {
            return Err(Error::new(ErrorKind::Unsupported, format!("{name} is not a block device")));
        }
        let len = ioctl::size(&file, &name)?;
        let lba_size = ioctl::logical_block_size(&file, &name)?;
        if !(512..=4096).contains(&lba_size) || !lba_size.is_power_of_two() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{name} has {lba_size}-byte blocks; 512 to 4096 are supported"),
            ));
        }
        if len < u64::from(lba_size) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{name} is {len} bytes long: it holds no medium"),
            ));
        }
        // BLKROGET: a drive may be write-protected though the node is writable.
        if !options.read_only && ioctl::write_protected(&file, &name)? {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("open {name} for writing: the device is write-protected (blockdev --getro)"),
            ));
        }
        Ok(BlockDevice {
            file,
            len,
            lba_size,
            alignment: if options.direct { lba_size } else { 1 },
            optimal_transfer: max_sectors(meta.rdev()).unwrap_or(KERNEL_MAX_TRANSFER),
            read_only: options.read_only,
            partial: Mutex::new(()),
            name,
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `queue/max_sectors_kb` of the disk (for a partition: of the disk it is on), bytes.
fn max_sectors(rdev: u64) -> Option<u32> {
    let sys =
        PathBuf::from(format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)));
    let text = std::fs::read_to_string(sys.join("queue/max_sectors_kb"))
        .or_else(|_| std::fs::read_to_string(sys.join("../queue/max_sectors_kb")))
        .ok()?;
    text.trim().parse::<u32>().ok()?.checked_mul(1024).filter(|&bytes| bytes > 0)
}

mod ioctl {
    use super::*;

    /// BLKSSZGET of linux/fs.h: logical block size, an int.
    pub(super) fn logical_block_size(file: &File, name: &str) -> Result<u32> {
        let mut size: libc::c_int = 0;
        // SAFETY: BLKSSZGET writes one int through the pointer, which is valid for one.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &mut size) };
        checked(rc, "BLKSSZGET", name)?;
        u32::try_from(size)
            .map_err(|_| Error::new(ErrorKind::Io, format!("{name} reports a block size of {size}")))
    }

    /// BLKROGET (`_IO(0x12, 94)` of linux/fs.h): an int, non-zero when writes fail.
    pub(super) fn write_protected(file: &File, name: &str) -> Result<bool> {
        const BLKROGET: libc::Ioctl = 0x125e;
        let mut read_only: libc::c_int = 0;
        // SAFETY: BLKROGET writes one int through the pointer, which is valid for one.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &mut read_only) };
        checked(rc, "BLKROGET", name)?;
        Ok(read_only != 0)
    }

    /// BLKGETSIZE64 (`_IOR(0x12, 114, size_t)` of linux/fs.h): bytes, a u64.
    pub(super) fn size(file: &File, name: &str) -> Result<u64> {
        const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
        let mut bytes: u64 = 0;
        // SAFETY: BLKGETSIZE64 writes one u64 through the pointer, which is valid for one.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut bytes) };
        checked(rc, "BLKGETSIZE64", name)?;
        Ok(bytes)
    }

    fn checked(rc: libc::c_int, what: &str, name: &str) -> Result<()> {
        if rc == 0 {
            return Ok(());
        }
        Err(Error::os(std::io::Error::last_os_error(), format!("{what} on {name}")))
    }
}

impl Device for BlockDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn lba_size(&self) -> u32 {
        self.lba_size
    }
    fn alignment(&self) -> u32 {
        self.alignment
    }
    fn max_transfer(&self) -> u32 {
        KERNEL_MAX_TRANSFER
    }
    fn optimal_transfer(&self) -> u32 {
        self.optimal_transfer
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn target(&self) -> Target<'_> {
        Target::Fd(self.fd())
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        super::read_fd(self, self.fd(), offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        super::write_fd(self, self.fd(), &self.partial, offset, buf)
    }
    fn flush(&self) -> Result<()> {
        super::flush_fd(self, self.fd())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        super::discard_fd(self, self.fd(), offset, len)
    }
}

impl std::fmt::Debug for BlockDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockDevice")
            .field("name", &self.name)
            .field("len", &self.len)
            .field("lba_size", &self.lba_size)
            .field("read_only", &self.read_only)
            .finish()
    }
}
