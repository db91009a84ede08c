//! Where bytes come from: a file on any file system, or a region of a pool by its extents.
//!
//! A file is opened once; its header and its data come from that same open file. O_DIRECT where the file system has it; a
//! file that is in the page cache (or only exists there, on tmpfs) is read from there.
//!
//! A region of a pool that this process owns is read from the members by a lease; of a pool that another process owns, from
//! the region's file with the owner's checksums, or through the owner where the region is no file of its own.

use std::any::Any;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{RegionReader, Session};
use nvme::{Device, DeviceKind, FileDevice, InlineIo, InlineOutcome, Target, is_cached};
use rustix::fs::OFlags;

use crate::driver::mapped::Mapping;
use crate::error::{Error, ErrorKind, Result};

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Whether a file is read past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CachePolicy {
    /// Past it, unless the file is in it already or its file system knows no O_DIRECT.
    #[default]
    Auto,
    /// Past it, or an error.
    Direct,
    /// Through it.
    Buffered,
}

/// When checksums of a pool are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Verify {
    /// Before bytes go to the device.
    #[default]
    Always,
    /// Not: for measurements.
    Never,
}

/// Bytes of a source that lie in one piece.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub logical: u64,
    pub len: u64,
    pub device: Arc<dyn Device>,
    pub offset: u64,
    /// Equal for what is on the same drive, as far as is known.
    pub group: u64,
}

/// The checksums of a region.
pub(crate) struct Sums {
    pub chunk_size: u64,
    sum: SumOf,
    reader: RegionReader,
}

enum SumOf {
    Lease(Arc<engine::Lease>),
    Owner,
}

impl Sums {
    /// CRC-32 of a chunk.
    pub fn sum(&self, chunk: u64) -> Result<u32> {
        match (&self.sum, self.reader.as_remote()) {
            (SumOf::Lease(lease), _) => Ok(lease.sum(chunk)),
            (SumOf::Owner, Some(remote)) => Ok(remote.sum(chunk)?),
            (SumOf::Owner, None) => {
                Err(Error::new(ErrorKind::Invalid, "checksums of a region that has none"))
            }
        }
    }

    /// Reads once more through the engine, which checks, tries again, and knows whether the region was changed.
    pub fn reread(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        Ok(self.reader.read_exact_at(offset, out)?)
    }
}

/// What a file was when it was opened.
#[derive(Debug)]
struct Watch {
    path: PathBuf,
    file: File,
    seen: (u64, u64, u64, i64, i64),
}

fn seen(metadata: &std::fs::Metadata) -> (u64, u64, u64, i64, i64) {
    (metadata.dev(), metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

/// Something to load from.
pub struct Source {
    name: String,
    len: u64,
    pub(crate) stored: Vec<Stored>,
    pub(crate) sums: Option<Sums>,
    watch: Option<Watch>,
    /// What holds the extents of a region of a pool of this process.
    lease: Option<Arc<engine::Lease>>,
    /// Read from memory, not from a drive.
    cached: bool,
    /// What is not as fast as it might be.
    note: Option<String>,
    _keep: Option<Box<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("name", &self.name).field("len", &self.len).finish()
    }
}

impl Source {
    /// A file.
    pub fn file(path: impl AsRef<Path>, policy: CachePolicy) -> Result<Source> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| Error::io(format!("open {name}"), error))?;
        let metadata = file.metadata().map_err(|error| Error::io(format!("stat {name}"), error))?;
        if !metadata.is_file() {
            let what = if metadata.is_dir() { "a directory" } else { "no regular file" };
            return Err(Error::new(ErrorKind::Invalid, format!("load {name}: it is {what}")));
        }
        let len = metadata.len();
        let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|stat| IN_MEMORY.contains(&stat.f_type));
        let cached = match policy {
            CachePolicy::Auto => in_memory || is_cached(&file, len),
            CachePolicy::Buffered => true,
            CachePolicy::Direct => false,
        };
        let mut note = None;
        let direct = if cached { None } else { direct(&file, &name, policy, &mut note)? };
        let device = match direct {
            Some(device) => device,
            None => {
                let copy = file.try_clone().map_err(|error| Error::io(format!("open {name}"), error))?;
                FileDevice::from_file(copy, name.clone(), false)?
            }
        };
        let cached = device.alignment() == 1;
        let group = metadata.dev();
        let watch = Some(Watch { path: path.to_owned(), file, seen: seen(&metadata) });
        let stored = vec![Stored { logical: 0, len, device: Arc::new(device), offset: 0, group }];
        Ok(Source { name, len, stored, sums: None, watch, lease: None, cached, note, _keep: None })
    }

    /// A region of a pool. The session must be kept open until the source is gone.
    pub fn region(session: &Session, path: &str, verify: Verify) -> Result<Source> {
        let reader = session.reader(path)?;
        let name = path.to_owned();
        let source = match session.pool() {
            Some(pool) => match pool.lease(session.stat_path(path)?.node, 0, u64::MAX) {
                Ok(lease) => Source::leased(name, Arc::new(lease), reader)?,
                Err(error) if error.kind() == engine::ErrorKind::Busy => Source::through_engine(name, reader),
                Err(error) => return Err(error.into()),
            },
            None => match reader
                .as_remote()
                .and_then(|remote| remote.file().map(|file| (remote.chunk_size(), file)))
            {
                Some((chunk_size, file)) => {
                    let device = reopen(file, &name)?;
                    let (len, cached) = (reader.len(), device.alignment() == 1);
                    let stored =
                        vec![Stored { logical: 0, len, device: Arc::new(device), offset: 0, group: 0 }];
                    let sums = Some(Sums { chunk_size, sum: SumOf::Owner, reader });
                    Source {
                        name,
                        len,
                        stored,
                        sums,
                        watch: None,
                        lease: None,
                        cached,
                        note: None,
                        _keep: None,
                    }
                }
                None => Source::through_engine(name, reader),
            },
        };
        Ok(match verify {
            Verify::Always => source,
            // What held the extents in place must go on doing so.
            Verify::Never => {
                let Source { sums, .. } = source;
                Source { sums: None, _keep: sums.map(|sums| Box::new(sums) as _), ..source }
            }
        })
    }

    fn leased(name: String, lease: Arc<engine::Lease>, reader: RegionReader) -> Result<Source> {
        let mut stored = Vec::with_capacity(lease.extents().len());
        let mut whole: Option<Arc<dyn Device>> = None;
        for extent in lease.extents() {
            let (device, group): (Arc<dyn Device>, u64) = match &extent.source {
                engine::Source::Device(device) => (device.clone(), Arc::as_ptr(device).cast::<u8>() as u64),
                engine::Source::File(file) => match &whole {
                    Some(device) => (device.clone(), 0),
                    None => {
                        let device: Arc<dyn Device> = Arc::new(reopen(file, &name)?);
                        whole = Some(device.clone());
                        (device, 0)
                    }
                },
            };
            stored.push(Stored {
                logical: extent.logical,
                len: extent.len,
                device,
                offset: extent.offset,
                group,
            });
        }
        let cached = !stored.is_empty() && stored.iter().all(|extent| extent.device.alignment() == 1);
        let (len, chunk_size) = (lease.size(), u64::from(lease.chunk_size()));
        let sums = Some(Sums { chunk_size, sum: SumOf::Lease(lease.clone()), reader });
        let lease = Some(lease);
        Ok(Source { name, len, stored, sums, watch: None, lease, cached, note: None, _keep: None })
    }

    /// Every byte by the engine, or by the process that owns the pool: checked there.
    fn through_engine(name: String, reader: RegionReader) -> Source {
        let len = reader.len();
        let note = Some(format!(
            "{name} is read through the pool's owner, which costs copies: its bytes are not one file"
        ));
        let device = Arc::new(ReaderDevice { name: name.clone(), reader });
        let stored = vec![Stored { logical: 0, len, device, offset: 0, group: 0 }];
        Source { name, len, stored, sums: None, watch: None, lease: None, cached: false, note, _keep: None }
    }

    /// For messages: the file's path, the region's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it is read from memory (the page cache) and not from a drive.
    pub fn is_cached(&self) -> bool {
        self.cached
    }

    /// Whether checksums are compared on the way.
    pub fn is_verified(&self) -> bool {
        self.sums.is_some()
    }

    /// What keeps it from being read in the fastest way.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Bytes of a range of it that the RAM tier of its pool has now. None of a file, nor of a pool that another process owns.
    pub fn resident_bytes(&self, range: Range<u64>) -> u64 {
        let resident = self.lease.iter().flat_map(|lease| lease.resident(range.clone()));
        resident.map(|part| part.bytes.len() as u64).sum()
    }

    /// The lease of a region of a pool that this process owns.
    pub(crate) fn lease(&self) -> Option<&engine::Lease> {
        self.lease.as_deref()
    }

    /// Maps the file, where it is one in the page cache whose bytes need no look on the way.
    pub(crate) fn map(&self) -> Option<Result<Arc<Mapping>>> {
        let watch = self.watch.as_ref().filter(|_| self.cached && self.sums.is_none() && self.len > 0)?;
        let mapped = Mapping::new(&watch.file).and_then(|mapping| match mapping.len() == self.len {
            true => Ok(Arc::new(mapping)),
            false => Err(Error::new(ErrorKind::Changed, format!("map {}: its length changed", self.name))),
        });
        Some(mapped)
    }

    /// Reads a few bytes, of any alignment: for headers.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if let Some(watch) = &self.watch {
            // Headers are read again by the next load; the page cache is the place for them.
            return watch.file.read_exact_at(out, offset).map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Error::new(
                    ErrorKind::Changed,
                    format!("read {} bytes at {offset} of {}: it became shorter", out.len(), self.name),
                ),
                _ => Error::io(format!("read {} bytes at {offset} of {}", out.len(), self.name), error),
            });
        }
        if let Some(sums) = &self.sums {
            return sums.reread(offset, out);
        }
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let found = self.stored.iter().find(|e| e.logical <= at && at < e.logical + e.len);
            let next = self.stored.iter().map(|e| e.logical).filter(|&start| start > at).min();
            match found {
                Some(extent) => {
                    let part = (extent.logical + extent.len - at).min((out.len() - done) as u64) as usize;
                    extent
                        .device
                        .read_at(extent.offset + (at - extent.logical), &mut out[done..done + part])?;
                    done += part;
                }
                None => {
                    let end = next.unwrap_or(self.len).min(self.len).min(offset + out.len() as u64);
                    if end <= at {
                        let context = format!("read {} bytes at {offset} of {}", out.len(), self.name);
                        return Err(Error::new(ErrorKind::Changed, context));
                    }
                    let part = (end - at) as usize;
                    out[done..done + part].fill(0);
                    done += part;
                }
            }
        }
        Ok(())
    }

    /// Fails when the file is not what it was when it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let Some(watch) = &self.watch else { return Ok(()) };
        let name = &self.name;
        let changed = |what: &str| {
            let context = format!("load {name}: it was {what} meanwhile; load it again when it is complete");
            Err(Error::new(ErrorKind::Changed, context))
        };
        let now = watch.file.metadata().map_err(|error| Error::io(format!("stat {name}"), error))?;
        if now.len() < watch.seen.2 {
            return changed("truncated");
        }
        if seen(&now) != watch.seen {
            return changed("written to");
        }
        match std::fs::metadata(&watch.path) {
            Ok(there) if (there.dev(), there.ino()) == (watch.seen.0, watch.seen.1) => Ok(()),
            Ok(_) => changed("replaced by another file"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => changed("removed"),
            Err(error) => Err(Error::io(format!("stat {name}"), error)),
        }
    }
}

/// The same open file with O_DIRECT. None where its file system has none.
fn direct(
    file: &File,
    name: &str,
    policy: CachePolicy,
    note: &mut Option<String>,
) -> Result<Option<FileDevice>> {
    let again = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let opened = match again {
        Ok(file) => FileDevice::from_file(file, name, true).and_then(|device| {
            // Some file systems take the flag and refuse the reads.
            let mut probe = [0u8; 1];
            if device.len() > 0 { device.read_at(0, &mut probe).map(|()| device) } else { Ok(device) }
        }),
        Err(error) => Err(nvme::Error::os(error, format!("open {name} with O_DIRECT"))),
    };
    match opened {
        Ok(device) => Ok(Some(device)),
        Err(error) if policy == CachePolicy::Direct => Err(error.into()),
        Err(error) => {
            *note = Some(format!("{name} is read through the page cache: {error}"));
            Ok(None)
        }
    }
}

/// A region's own file as a device, past the page cache where that can be had without changing the owner's descriptor.
fn reopen(file: &File, name: &str) -> Result<FileDevice> {
    if let Some(device) = direct(file, name, CachePolicy::Auto, &mut None)? {
        return Ok(device);
    }
    let copy = file.try_clone().map_err(|error| Error::io(format!("open the file of {name}"), error))?;
    let flags = rustix::fs::fcntl_getfl(&copy)
        .map_err(|error| Error::io(format!("open the file of {name}"), error))?;
    Ok(FileDevice::from_file(copy, name, flags.contains(OFlags::DIRECT))?)
}

/// A region that is read by calling its reader.
struct ReaderDevice {
    name: String,
    reader: RegionReader,
}

impl fmt::Debug for ReaderDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReaderDevice").field("name", &self.name).finish()
    }
}

fn refused(name: &str) -> nvme::Error {
    nvme::Error::new(nvme::ErrorKind::PermissionDenied, format!("write to {name}, which is open for reading"))
}

impl ReaderDevice {
    fn read(&self, offset: u64, out: &mut [u8]) -> nvme::Result<()> {
        self.reader.read_exact_at(offset, out).map_err(|error| {
            let kind = match error.kind() {
                engine::ErrorKind::Corrupt => nvme::ErrorKind::Media,
                engine::ErrorKind::OutOfRange => nvme::ErrorKind::ShortTransfer,
                engine::ErrorKind::Timeout => nvme::ErrorKind::Timeout,
                _ => nvme::ErrorKind::Io,
            };
            nvme::Error::new(kind, format!("read {} bytes at {offset} of {}", out.len(), self.name))
                .with_source(error)
        })
    }
}

impl Device for ReaderDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::File
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn len(&self) -> u64 {
        self.reader.len()
    }
    fn lba_size(&self) -> u32 {
        512
    }
    fn alignment(&self) -> u32 {
        1
    }
    fn max_transfer(&self) -> u32 {
        1 << 30
    }
    fn read_only(&self) -> bool {
        true
    }
    fn target(&self) -> Target<'_> {
        Target::Inline(self)
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> nvme::Result<()> {
        self.read(offset, out)
    }
    fn write_at(&self, _: u64, _: &[u8]) -> nvme::Result<()> {
        Err(refused(&self.name))
    }
    fn flush(&self) -> nvme::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> nvme::Result<()> {
        Err(refused(&self.name))
    }
}

impl InlineIo for ReaderDevice {
    fn inline_read(&self, offset: u64, out: &mut [u8]) -> InlineOutcome {
        let len = out.len();
        InlineOutcome { result: self.read(offset, out).map(|()| len), latency: Default::default() }
    }
    fn inline_write(&self, _: u64, _: &[u8]) -> InlineOutcome {
        InlineOutcome { result: Err(refused(&self.name)), latency: Default::default() }
    }
    fn inline_flush(&self) -> InlineOutcome {
        InlineOutcome { result: Ok(0), latency: Default::default() }
    }
    fn inline_discard(&self, _: u64, _: u64) -> InlineOutcome {
        InlineOutcome { result: Err(refused(&self.name)), latency: Default::default() }
    }
}
