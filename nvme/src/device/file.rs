//! A regular file as a device.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FallocateFlags, OFlags, StatxFlags};

use super::{Device, DeviceKind, DeviceOptions, KERNEL_MAX_TRANSFER, Target};
use crate::error::{Error, ErrorKind, Result};

/// A regular file, preallocated as a rule. Its length follows the file: what others append becomes readable.
pub struct FileDevice {
    file: File,
    name: String,
    /// What fstat said last.
    len: AtomicU64,
    lba_size: u32,
    alignment: u32,
    read_only: bool,
    /// Orders read-modify-writes.
    partial: Mutex<()>,
}

impl FileDevice {
    /// Opens an existing file.
    pub fn open(path: impl AsRef<Path>, options: &DeviceOptions) -> Result<FileDevice> {
        let path = path.as_ref();
        let file =
            Self::open_flags(options).open(path).map_err(|error| open_error(error, "open", path, options))?;
        Self::new(file, path.display().to_string(), options)
    }

    /// Makes a new file of `len` bytes with its space allocated, so that later writes cannot find the disk full.
    /// Refuses one that exists. Only its owner may read and write it, whatever the umask says. Where the file system cannot preallocate, the file is sparse.
    pub fn create(path: impl AsRef<Path>, len: u64, options: &DeviceOptions) -> Result<FileDevice> {
        let path = path.as_ref();
        if options.read_only {
            return Err(Error::new(ErrorKind::Invalid, format!("create {} read-only", path.display())));
        }
        let file = Self::open_flags(options)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| open_error(error, "create", path, options))?;
        let made = Self::new(file, path.display().to_string(), options).and_then(|device| {
            device.allocate(len)?;
            Ok(device)
        });
        if made.is_err() {
            // Not half a file: it was made here, so nobody else's bytes go.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Takes over an open file. `direct` says whether it was opened with O_DIRECT; when that is not so, the flag
    /// is set on the descriptor here (fcntl(2) F_SETFL), and cleared when `direct` is false.
    pub fn from_file(file: File, name: impl Into<String>, direct: bool) -> Result<FileDevice> {
        let name = name.into();
        let fail = |error: rustix::io::Errno| Error::os(error, format!("use {name} as a device"));
        let flags = rustix::fs::fcntl_getfl(&file).map_err(fail)?;
        if flags.contains(OFlags::DIRECT) != direct {
            let mut wanted = flags;
            wanted.set(OFlags::DIRECT, direct);
            rustix::fs::fcntl_setfl(&file, wanted).map_err(fail)?;
        }
        let read_only = flags & OFlags::RWMODE == OFlags::RDONLY;
        Self::new(file, name, &DeviceOptions { direct, read_only })
    }

    fn open_flags(options: &DeviceOptions) -> OpenOptions {
        let mut open = OpenOptions::new();
        open.read(true).write(!options.read_only);
        if options.direct {
            open.custom_flags(OFlags::DIRECT.bits() as i32);
        }
        open
    }

    fn new(file: File, name: String, options: &DeviceOptions) -> Result<FileDevice> {
        let meta = file.metadata().map_err(|error| Error::os(error, format!("stat {name}")))?;
        if !meta.is_file() {
            let hint = if meta.file_type().is_block_device() { ": open it as a block device" } else { "" };
            return Err(Error::new(ErrorKind::Unsupported, format!("{name} is not a regular file{hint}")));
        }
        let lba_size = if options.direct { direct_alignment(&file, &name)? } else { 512 };
        Ok(FileDevice {
            file,
            name,
            len: AtomicU64::new(meta.len()),
            lba_size,
            alignment: if options.direct { lba_size } else { 1 },
            read_only: options.read_only,
            partial: Mutex::new(()),
        })
    }

    /// Grows the file to `len` bytes with its space allocated. Never shrinks it.
    pub fn allocate(&self, len: u64) -> Result<()> {
        super::check_writable(self, "allocate")?;
        let fail = |error: rustix::io::Errno| {
            let context = format!("allocate {len} bytes for {}", self.name);
            match error {
                rustix::io::Errno::NOSPC => Error::os(error, format!("{context}: the file system is full")),
                _ => Error::os(error, context),
            }
        };
        if len > 0 {
            match retry(|| rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len)) {
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                    if self.len() < len {
                        retry(|| rustix::fs::ftruncate(&self.file, len)).map_err(fail)?;
                    }
                }
                other => other.map_err(fail)?,
            }
        }
        self.len();
        Ok(())
    }

    /// Sets the length, cutting off or adding a hole.
    pub fn set_len(&self, len: u64) -> Result<()> {
        super::check_writable(self, "set the length")?;
        let _guard = self.partial.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        retry(|| rustix::fs::ftruncate(&self.file, len))
            .map_err(|error| Error::os(error, format!("set the length of {} to {len}", self.name)))?;
        self.len.store(len, Ordering::Relaxed);
        Ok(())
    }

    /// The file below.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}

fn open_error(error: std::io::Error, verb: &str, path: &Path, options: &DeviceOptions) -> Error {
    let path = path.display();
    match error.raw_os_error() {
        // open(2): EINVAL is how a file system without O_DIRECT refuses.
        Some(libc::EINVAL) if options.direct => {
            Error::os(error, format!("{verb} {path} with O_DIRECT: its file system does not do direct I/O"))
                .with_kind(ErrorKind::Unsupported)
        }
        _ => Error::os(error, format!("{verb} {path}")),
    }
}

/// Block size of direct I/O on this file: statx(2) STATX_DIOALIGN where the kernel (6.1) and file system tell,
/// else the block size of the file system, at most 4096.
fn direct_alignment(file: &File, name: &str) -> Result<u32> {
    const DIOALIGN: StatxFlags = StatxFlags::DIOALIGN;
    let told = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | DIOALIGN);
    if let Ok(stat) = told
        && stat.stx_mask & DIOALIGN.bits() != 0
        && stat.stx_dio_offset_align != 0
    {
        let align = stat.stx_dio_offset_align.max(stat.stx_dio_mem_align).max(512);
        if align.is_power_of_two() && align <= 4096 {
            return Ok(align);
        }
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("direct I/O on {name} needs {align}-byte blocks; at most 4096 are supported"),
        ));
    }
    Ok(4096)
}

impl Device for FileDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::File
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn len(&self) -> u64 {
        // fstat on an open regular file fails only for a broken file system; the last known length then serves.
        if let Ok(meta) = self.file.metadata() {
            self.len.store(meta.len(), Ordering::Relaxed);
        }
        self.len.load(Ordering::Relaxed)
    }
    fn known_len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
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

impl std::fmt::Debug for FileDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileDevice")
            .field("name", &self.name)
            .field("len", &self.known_len())
            .field("lba_size", &self.lba_size)
            .field("read_only", &self.read_only)
            .finish()
    }
}
