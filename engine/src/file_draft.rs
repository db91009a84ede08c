//! Content of pools that are one directory: a region is one file, byte for byte, so that the kernel can read and write it in our
//! place (FUSE passthrough) and cuFile can open it.
//!
//! Nothing here sees what the kernel writes. Size and time of change come from the file itself, sums from reading it back.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::content::{Committed, Content, Draft};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Extent, Layout};
use crate::member::directory::{FileDirectory, allocated};
use crate::types::{Allocate, NodeId, Seek, Timestamp};

mod stream;
mod sums;

pub(crate) use stream::{FileStream, StreamWriters};
pub(crate) use sums::file_sums;

/// A file being written.
#[derive(Debug)]
pub struct FileDraft {
    node: NodeId,
    directory: Arc<FileDirectory>,
    number: u64,
    file: Arc<File>,
    chunk_size: u32,
    /// Bytes that the directory counts for it.
    charged: AtomicU64,
    times: Mutex<Times>,
    /// The catalog names this file, or is about to: it is no longer the draft's to remove.
    adopted: AtomicBool,
    /// Size and sums of all of it, from whoever wrote it, until anybody changes a byte.
    known_sums: Mutex<Option<(u64, Vec<u32>)>>,
}

#[derive(Debug, Default)]
struct Times {
    /// The file's time of change and size when nothing was written yet; others mean that something was.
    untouched: Option<(Timestamp, u64)>,
    /// Files get their times from a coarser clock than the pool: what they say counts from here on.
    floor: Option<Timestamp>,
    /// Known to differ from what it began with.
    changed: bool,
}

/// What a file says of a draft in one look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DraftStat {
    pub size: u64,
    pub allocated: u64,
    pub modified: Option<Timestamp>,
}

fn io_error(what: impl Into<String>, error: Errno) -> Error {
    Error::io(what, io::Error::from(error))
}

/// `lseek(2)` SEEK_DATA or SEEK_HOLE on a descriptor whose position nobody else uses.
pub(crate) fn seek_file(file: &File, offset: u64, what: Seek) -> Result<u64> {
    let from = match what {
        Seek::Data => SeekFrom::Data(offset),
        Seek::Hole => SeekFrom::Hole(offset),
    };
    rustix::fs::seek(file, from).map_err(|error| match error {
        Errno::NXIO => Error::new(ErrorKind::OutOfRange, format!("no {what:?} at or after {offset}")),
        error => io_error(format!("seek {what:?} from {offset}"), error),
    })
}

/// Reads until `buf` is full or the file ends.
pub(crate) fn read_file(file: &File, mut offset: u64, mut buf: &mut [u8]) -> io::Result<usize> {
    let wanted = buf.len();
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => break,
            Ok(read) => {
                offset += read as u64;
                buf = &mut buf[read..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(wanted - buf.len())
}

fn modified_of(meta: &std::fs::Metadata) -> Timestamp {
    Timestamp { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 }
}

impl FileDraft {
    /// A draft in a new, empty file. Its time of change is not before `floor`; `changed`: being empty is a change already.
    pub(crate) fn create(
        node: NodeId,
        directory: &Arc<FileDirectory>,
        chunk_size: u32,
        floor: Timestamp,
        changed: bool,
    ) -> Result<FileDraft> {
        let (number, file) = directory.create_file()?;
        let draft = FileDraft::over(node, directory, chunk_size, number, file, 0);
        let untouched =
            if changed { None } else { draft.file.metadata().ok().map(|meta| (modified_of(&meta), 0)) };
        *draft.times() = Times { untouched, floor: Some(floor), changed };
        Ok(draft)
    }

    fn times(&self) -> std::sync::MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the catalog decides when the file goes.
    pub(crate) fn adopt(&self) {
        self.adopted.store(true, Relaxed);
    }

    /// Whether the catalog names the file.
    pub(crate) fn is_adopted(&self) -> bool {
        self.adopted.load(Relaxed)
    }

    /// Makes the bytes durable (`fdatasync(2)`).
    pub(crate) fn sync_data(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|error| Error::io(format!("sync the file of node {}", self.node), error))
    }

    /// A draft that begins as a copy of the first `len` bytes of `from`: shared blocks where the file system can, else copied when
    /// they are at most `copy_limit`. `None`: too large for that.
    pub(crate) fn copy_of(
        node: NodeId,
        directory: &Arc<FileDirectory>,
        chunk_size: u32,
        modified: Timestamp,
        from: &File,
        len: u64,
        copy_limit: u64,
    ) -> Result<Option<FileDraft>> {
        let what = || format!("copy the content of node {node} before it is changed");
        let draft = FileDraft::create(node, directory, chunk_size, modified, true)?;
        let shared = match directory.reflink(from, &draft.file) {
            Ok(shared) => shared,
            Err(error) => {
                draft.discard();
                return Err(error.context(what()));
            }
        };
        let done = if shared {
            draft.file.set_len(len).map_err(|error| Error::io(what(), error))
        } else if len > copy_limit {
            draft.discard();
            return Ok(None);
        } else {
            draft
                .charge_to(len)
                .and_then(|()| copy_data(from, &draft.file, len).map_err(|error| Error::io(what(), error)))
        };
        // The time of change as it was: any write from here on changes it.
        if let Err(error) =
            done.and_then(|()| draft.settle_charge()).and_then(|()| draft.set_modified(modified))
        {
            draft.discard();
            return Err(error);
        }
        // Written to within the clock's tick of the last change, a file would look as it did: only an old one can tell.
        let mut times = draft.times();
        times.changed = Timestamp::now().secs - modified.secs < 2 || keep_of(from) != Some(len);
        drop(times);
        Ok(Some(draft))
    }

    /// Whether nothing was written since it was made as a copy. `false` where that is not known for sure.
    pub(crate) fn is_unchanged(&self) -> bool {
        !self.is_adopted() && self.modified().is_none() && !self.times().changed
    }

    /// Size, space and time of change.
    pub(crate) fn stat(&self) -> Option<DraftStat> {
        let meta = self.file.metadata().ok()?;
        Some(DraftStat { size: meta.len(), allocated: allocated(&meta), modified: self.modified_in(&meta) })
    }

    fn modified_in(&self, meta: &std::fs::Metadata) -> Option<Timestamp> {
        let now = modified_of(meta);
        let times = self.times();
        if times.untouched == Some((now, meta.len())) {
            return None;
        }
        Some(times.floor.map_or(now, |floor| now.max(floor)))
    }

    /// A draft that changes a committed file in place. `charged`: what the directory counts for it.
    pub(crate) fn in_place(
        node: NodeId,
        directory: &Arc<FileDirectory>,
        chunk_size: u32,
        number: u64,
        file: File,
        charged: u64,
    ) -> FileDraft {
        let draft = FileDraft::over(node, directory, chunk_size, number, file, charged);
        draft.adopt();
        if let Ok(meta) = draft.file.metadata() {
            draft.times().untouched = Some((modified_of(&meta), meta.len()));
        }
        draft
    }

    fn over(
        node: NodeId,
        directory: &Arc<FileDirectory>,
        chunk_size: u32,
        number: u64,
        file: File,
        charged: u64,
    ) -> FileDraft {
        FileDraft {
            node,
            directory: directory.clone(),
            number,
            file: Arc::new(file),
            chunk_size,
            charged: AtomicU64::new(charged),
            times: Mutex::default(),
            adopted: AtomicBool::new(false),
            known_sums: Mutex::default(),
        }
    }

    /// Sums of all `size` bytes, so that the seal need not read them back. For a writer that alone has the file. Any later change through the
    /// draft drops them.
    pub(crate) fn offer_sums(&self, size: u64, sums: Vec<u32>) {
        if sums.len() as u64 == size.div_ceil(u64::from(self.chunk_size)) {
            *self.known_sums() = Some((size, sums));
        }
    }

    fn known_sums(&self) -> std::sync::MutexGuard<'_, Option<(u64, Vec<u32>)>> {
        self.known_sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A byte, or the size, is about to change.
    fn changes(&self) {
        self.times().changed = true;
        *self.known_sums() = None;
    }

    /// Reserves `len` bytes in the empty file and gives them as space beyond a size of 0, see `pool/slab.rs`.
    pub(crate) fn slab(&self, len: u64) -> Result<Committed> {
        self.allocate(0, len, Allocate::Reserve { keep_size: false })?;
        self.settle_charge()?;
        let mut layout = Layout::new(self.chunk_size);
        layout.replace(Extent { logical: 0, member: 0, file: self.number, offset: 0, len });
        Ok(Committed { layout, sealed: true, allocated: self.charged(), modified: None })
    }

    /// Its file's number.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// What the directory counts for it now.
    pub(crate) fn charged(&self) -> u64 {
        self.charged.load(Relaxed)
    }

    fn meta(&self) -> Result<std::fs::Metadata> {
        self.file.metadata().map_err(|error| Error::io(format!("stat the file of node {}", self.node), error))
    }

    /// Sees to it that the quota covers `bytes` of this file.
    fn charge_to(&self, bytes: u64) -> Result<()> {
        let charged = self.charged.load(Relaxed);
        if bytes <= charged {
            return Ok(());
        }
        if self.directory.quota().is_none() {
            return Ok(()); // counted when it settles
        }
        self.directory.charge(bytes - charged)?;
        self.charged.fetch_add(bytes - charged, Relaxed);
        Ok(())
    }

    /// Counts what the file really occupies.
    fn settle_charge(&self) -> Result<()> {
        let now = allocated(&self.meta()?);
        let before = self.charged.swap(now, Relaxed);
        if now > before {
            self.directory.charge_fact(now - before);
        } else {
            self.directory.release(before - now);
        }
        Ok(())
    }

    /// Before a write of `len` bytes at `offset`: as long as everything from 0 would fit, no more is asked; else what is really
    /// occupied counts, so that sparse files are not charged for their holes.
    fn charge_write(&self, offset: u64, len: u64) -> Result<()> {
        if self.directory.quota().is_none() {
            return Ok(());
        }
        let end = offset.saturating_add(len).next_multiple_of(4096);
        if end <= self.charged.load(Relaxed) {
            return Ok(());
        }
        self.settle_charge()?;
        let most = (self.charged.load(Relaxed) + len.next_multiple_of(4096) + 4096).min(end);
        self.charge_to(most)
    }
}

/// Size of the file that a copy was made of: a shorter copy is a change.
fn keep_of(from: &File) -> Option<u64> {
    from.metadata().ok().map(|meta| meta.len())
}

/// Copies the data of the first `len` bytes, leaving holes. `copy_file_range(2)` where it works.
fn copy_data(from: &File, to: &File, len: u64) -> io::Result<()> {
    to.set_len(len)?;
    let mut at = 0;
    while at < len {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data)).unwrap_or(len).min(len);
        if data >= len {
            break;
        }
        copy_range(from, to, data, hole)?;
        at = hole;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let (mut source, mut target) = (at, at);
        match rustix::fs::copy_file_range(
            from,
            Some(&mut source),
            to,
            Some(&mut target),
            (end - at).min(1 << 30) as usize,
        ) {
            Ok(0) => break,
            Ok(copied) => at += copied as u64,
            Err(Errno::INTR) => {}
            Err(Errno::NOSYS | Errno::XDEV | Errno::INVAL | Errno::NOTSUP) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let mut buffer = vec![0; if at < end { 1 << 20 } else { 0 }];
    while at < end {
        let want = buffer.len().min((end - at) as usize);
        let read = read_file(from, at, &mut buffer[..want])?;
        if read == 0 {
            break;
        }
        to.write_all_at(&buffer[..read], at)?;
        at += read as u64;
    }
    Ok(())
}

impl Content for FileDraft {
    fn size(&self) -> u64 {
        self.file.metadata().map_or(0, |meta| meta.len())
    }

    fn allocated(&self) -> u64 {
        self.file.metadata().map_or(0, |meta| allocated(&meta))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        read_file(&self.file, offset, buf).map_err(|error| {
            Error::io(format!("read {} bytes at {offset} of node {}", buf.len(), self.node), error)
        })
    }

    fn seek(&self, offset: u64, what: Seek) -> Result<u64> {
        seek_file(&self.file, offset, what)
    }

    fn backing(&self) -> Option<Arc<File>> {
        Some(self.file.clone())
    }
}

impl Draft for FileDraft {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        self.changes();
        self.charge_write(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset).map_err(|error| {
            Error::io(format!("write {} bytes at {offset} of node {}", data.len(), self.node), error)
        })?;
        Ok(data.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.changes();
        self.file
            .set_len(len)
            .map_err(|error| Error::io(format!("set the size of node {} to {len}", self.node), error))?;
        if self.directory.quota().is_some() { self.settle_charge() } else { Ok(()) }
    }

    fn allocate(&self, offset: u64, len: u64, mode: Allocate) -> Result<()> {
        self.changes();
        let flags = match mode {
            Allocate::Reserve { keep_size: false } => FallocateFlags::empty(),
            Allocate::Reserve { keep_size: true } => FallocateFlags::KEEP_SIZE,
            Allocate::PunchHole => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Allocate::ZeroRange { keep_size: false } => FallocateFlags::ZERO_RANGE,
            Allocate::ZeroRange { keep_size: true } => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        if !matches!(mode, Allocate::PunchHole) {
            self.charge_write(offset, len)?;
        }
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, len) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(io_error(
                        format!("allocate {len} bytes at {offset} of node {}", self.node),
                        error,
                    ));
                }
            }
        }
        if self.directory.quota().is_some() { self.settle_charge() } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn modified(&self) -> Option<Timestamp> {
        self.modified_in(&self.file.metadata().ok()?)
    }

    fn set_modified(&self, time: Timestamp) -> Result<()> {
        use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, futimens};
        let changed = self.modified().is_some() || self.times().changed;
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() },
        };
        futimens(&self.file, &times)
            .map_err(|error| io_error(format!("set the time of node {}", self.node), error))?;
        // Read back: the file system may keep fewer digits.
        let meta = self.meta()?;
        *self.times() = Times { untouched: Some((modified_of(&meta), meta.len())), floor: None, changed };
        Ok(())
    }

    fn commit(&self, seal: bool, cancel: &AtomicBool) -> Result<Option<Committed>> {
        let meta = self.meta()?;
        let modified = self.modified_in(&meta);
        let size = meta.len();
        let mut layout = Layout::new(self.chunk_size);
        layout.set_size(size);
        if size > 0 || !seal {
            // Not yet sealed: the file may grow any time, and it is the region's whatever its size.
            let len = size.max(1);
            layout.replace(Extent { logical: 0, member: 0, file: self.number, offset: 0, len });
        }
        let known = if seal { self.known_sums().take().filter(|(len, _)| *len == size) } else { None };
        if let Some((_, sums)) = known {
            layout.set_sums(0, &sums);
        } else if seal && size > 0 {
            match file_sums(&self.file, size, self.chunk_size, cancel) {
                Ok(Some(sums)) => layout.set_sums(0, &sums),
                Ok(None) => return Ok(None),
                Err(error) => {
                    return Err(Error::io(format!("read node {} back for its checksums", self.node), error));
                }
            }
        }
        self.settle_charge()?;
        Ok(Some(Committed { layout, sealed: seal, allocated: self.charged(), modified }))
    }

    fn discard(&self) {
        if self.is_adopted() {
            return;
        }
        if let Err(error) = self.directory.remove_file(self.number, self.charged.swap(0, Relaxed)) {
            tracing::warn!(node = self.node, error = %error.chain(), "cannot remove the file of a draft");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(scratch: &std::path::Path) -> FileDraft {
        let directory = Arc::new(FileDirectory::open(scratch, None, 1, false).unwrap());
        FileDraft::create(1, &directory, 4096, Timestamp::default(), false).unwrap()
    }

    fn sealed(draft: &FileDraft) -> Vec<u32> {
        let layout = draft.commit(true, &AtomicBool::new(false)).unwrap().unwrap().layout;
        (0..layout.chunks()).map(|chunk| layout.sum(chunk)).collect()
    }

    #[test]
    fn sums_that_the_writer_knows_are_not_made_again() {
        let scratch = tempfile::tempdir().unwrap();
        let draft = draft(scratch.path());
        draft.write_at(0, &[7; 5000]).unwrap();
        // No sums of these bytes: only so it can be told whether they were read back.
        draft.offer_sums(5000, vec![1, 2]);
        // A commit in between, as a sync makes one, leaves them.
        draft.commit(false, &AtomicBool::new(false)).unwrap().unwrap();
        assert_eq!(sealed(&draft), [1, 2]);
    }

    #[test]
    fn any_change_makes_them_worthless() {
        let scratch = tempfile::tempdir().unwrap();
        // The last one is of another length.
        let changes: [&dyn Fn(&FileDraft); 4] = [
            &|draft| assert_eq!(draft.write_at(10, &[7]).unwrap(), 1),
            &|draft| draft.set_len(5000).unwrap(),
            &|draft| draft.allocate(0, 4096, Allocate::ZeroRange { keep_size: true }).unwrap(),
            &|draft| draft.offer_sums(5000, vec![1, 2, 3]),
        ];
        for (index, change) in changes.iter().enumerate() {
            let draft = draft(scratch.path());
            draft.write_at(0, &[7; 5000]).unwrap();
            if index < 3 {
                draft.offer_sums(5000, vec![1, 2]);
            }
            change(&draft);
            let mut bytes = vec![0; 5000];
            draft.read_at(0, &mut bytes).unwrap();
            assert_eq!(
                sealed(&draft),
                bytes.chunks(4096).map(crc32fast::hash).collect::<Vec<_>>(),
                "{index}"
            );
        }
    }
}
