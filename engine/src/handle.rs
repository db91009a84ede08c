//! An open region.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::content::Content;
use crate::error::{Error, ErrorKind, Result};
use crate::file_draft::{FileStream, StreamWriters};
use crate::layout::Layout;
use crate::pool::live::{AnyDraft, Current, Live};
use crate::pool::stored::Stored;
use crate::pool::{Inner as PoolInner, Shared, Storage, Verify, lock};
use crate::prefetch::{PrefetchTicket, Prefetcher, Priority};
use crate::types::{Access, Allocate, Borrower, NodeId, Seek};

/// An open region. Clones share it; the last one to go closes it. Keeps an unlinked region's content until then.
///
/// All handles of a node see one content. When the last handle that writes goes, the content is sealed: flushed, summed and
/// committed; errors of that are logged and counted in [`PoolStat::seal_errors`](crate::PoolStat::seal_errors).
#[derive(Clone, Debug)]
pub struct Handle {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    live: Arc<Live>,
    access: Access,
    /// Last: the pool must outlive the closing of the region.
    pool: Arc<PoolInner>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.pool.shared.close_live(&self.live, self.access);
    }
}

/// A prefetch that is done.
fn nothing(prefetcher: &Prefetcher) -> PrefetchTicket {
    prefetcher.extents(0, &Arc::new(Layout::new(4096)), &[], Priority::default(), None)
}

impl Handle {
    pub(crate) fn new(pool: Arc<PoolInner>, live: Arc<Live>, access: Access) -> Handle {
        Handle { inner: Arc::new(Inner { live, access, pool }) }
    }

    fn current(&self) -> Result<Current> {
        self.inner.live.current().ok_or_else(|| Error::new(ErrorKind::Stale, "the region has no content"))
    }

    fn draft(&self, what: &str) -> Result<Arc<AnyDraft>> {
        if !self.inner.access.writes() {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("{what} node {}: the handle was opened for reading only", self.node()),
            ));
        }
        self.inner.live.draft().ok_or_else(|| {
            Error::new(ErrorKind::Stale, format!("{what} node {}: it is not open for writing", self.node()))
        })
    }

    /// Runs what may lack space; frees what waits to be freed and tries once more.
    fn with_space<T>(&self, mut run: impl FnMut() -> Result<T>) -> Result<T> {
        match run() {
            Err(error)
                if error.kind() == ErrorKind::NoSpace
                    && self.inner.pool.shared.reclaim().unwrap_or(false) =>
            {
                run()
            }
            done => done,
        }
    }

    /// Reads what is current. New content may take its place between looking and reading: then that is read.
    fn read(&self, run: &mut dyn FnMut(&dyn Content) -> Result<usize>) -> Result<usize> {
        let mut tries = 0;
        let read = loop {
            match run(self.current()?.content()) {
                Err(error) if error.kind() == ErrorKind::Stale && tries < 100 => tries += 1,
                done => break done?,
            }
        };
        self.inner.pool.shared.counters.read_bytes.fetch_add(read as u64, Relaxed);
        Ok(read)
    }

    /// See [`Pool::make_slab`](crate::Pool::make_slab).
    pub(crate) fn make_slab(&self, shared: &Arc<Shared>, len: u64, first: usize) -> Result<()> {
        self.with_space(|| self.inner.live.become_slab(shared, len, first))
    }

    /// The region's node.
    pub fn node(&self) -> NodeId {
        self.inner.live.node
    }

    /// How it was opened.
    pub fn access(&self) -> Access {
        self.inner.access
    }

    /// Current size in bytes.
    pub fn size(&self) -> u64 {
        self.inner.live.current().map_or(0, |current| current.content().size())
    }

    /// Reads up to the end; returns how many bytes. `Corrupt` where a checksum does not match: such bytes are never handed out.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.read(&mut |content| content.read_at(offset, buf))
    }

    /// Lends up to `len` bytes, in order, in one call of `f`, without copying where the RAM tier holds them. `f` keeps what it wants of them
    /// elsewhere (the kernel does, in its page cache): the RAM tier uses their memory for others before it takes more.
    pub fn read_with(
        &self,
        offset: u64,
        len: usize,
        to: Borrower,
        f: &mut dyn FnMut(&[&[u8]]),
    ) -> Result<usize> {
        self.read(&mut |content| content.read_with(offset, len, to, f))
    }

    /// Writes all of `data`, extending the region where needed.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        let draft = self.draft("write to")?;
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("write {} bytes at {offset}: beyond 2^63", data.len()),
            ));
        }
        let written = self.with_space(|| draft.get().write_at(offset, data))?;
        self.inner.live.note_write();
        self.inner.pool.shared.counters.written_bytes.fetch_add(written as u64, Relaxed);
        Ok(written)
    }

    /// A stream of all bytes of a region from its start, past the page cache; `None` where the pool or the file system has no use for one, or
    /// where others may have the region's file. `size_hint`: how many bytes will come.
    pub(crate) fn stream(&self, size_hint: Option<u64>) -> Result<Option<FileStream>> {
        let Storage::Files { streams, .. } = &self.inner.pool.shared.storage else { return Ok(None) };
        let draft = self.draft("stream to")?;
        let AnyDraft::File(file) = &*draft else { return Ok(None) };
        // From here on nobody is given the file.
        if self.inner.live.backing(|_| false).is_some() {
            return Ok(None);
        }
        let writers = {
            let mut streams = lock(streams);
            match streams.upgrade() {
                Some(writers) => writers,
                None => {
                    let writers = Arc::new(StreamWriters::new()?);
                    *streams = Arc::downgrade(&writers);
                    writers
                }
            }
        };
        FileStream::new(file, writers, size_hint)
    }

    /// The next bytes of a stream of this handle's.
    pub(crate) fn push(&self, stream: &mut FileStream, data: &[u8]) -> Result<()> {
        let draft = self.draft("stream to")?;
        let AnyDraft::File(file) = &*draft else {
            return Err(Error::new(ErrorKind::Stale, "the region is no file any more"));
        };
        self.with_space(|| stream.reserve(file, data.len() as u64))?;
        stream.push(file, data)?;
        self.inner.live.note_write();
        self.inner.pool.shared.counters.written_bytes.fetch_add(data.len() as u64, Relaxed);
        Ok(())
    }

    /// Waits until all bytes of a stream are in the file; returns their sums.
    pub(crate) fn finish(&self, stream: FileStream) -> Result<Vec<u32>> {
        let draft = self.draft("stream to")?;
        match &*draft {
            AnyDraft::File(file) => stream.finish(file),
            AnyDraft::Extents(_) => Err(Error::new(ErrorKind::Stale, "the region is no file any more")),
        }
    }

    /// Sums of all `size` bytes, by whoever wrote them; any later change drops them.
    pub(crate) fn offer_sums(&self, size: u64, sums: Vec<u32>) {
        if let Some(draft) = self.inner.live.draft()
            && let AnyDraft::File(file) = &*draft
        {
            file.offer_sums(size, sums);
        }
    }

    /// Sets the size; new bytes are zeros.
    pub fn set_len(&self, len: u64) -> Result<()> {
        let draft = self.draft("set the size of")?;
        if len > i64::MAX as u64 {
            return Err(Error::new(ErrorKind::TooLarge, format!("a size of {len} bytes is beyond 2^63")));
        }
        self.with_space(|| draft.get().set_len(len))?;
        self.inner.live.note_write();
        Ok(())
    }

    /// `fallocate(2)`.
    pub fn allocate(&self, offset: u64, len: u64, mode: Allocate) -> Result<()> {
        let draft = self.draft("allocate space of")?;
        let end = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64);
        if len == 0 || end.is_none() {
            let kind = if len == 0 { ErrorKind::InvalidArgument } else { ErrorKind::TooLarge };
            return Err(Error::new(kind, format!("allocate {len} bytes at {offset}")));
        }
        self.with_space(|| draft.get().allocate(offset, len, mode))?;
        self.inner.live.note_write();
        Ok(())
    }

    /// The next data or hole; `OutOfRange` where `lseek(2)` says ENXIO.
    pub fn seek(&self, offset: u64, what: Seek) -> Result<u64> {
        self.current()?.content().seek(offset, what)
    }

    /// Reports write errors that came late (`close(2)`); makes nothing durable.
    pub fn flush(&self) -> Result<()> {
        match self.inner.live.draft() {
            Some(draft) if self.inner.access.writes() => draft.get().flush(),
            _ => Ok(()),
        }
    }

    /// Makes content and namespace durable (`fsync(2)`). Content still open for writing is committed as it is.
    pub fn sync(&self) -> Result<()> {
        self.inner.pool.shared.sync_live(&self.inner.live)
    }

    /// The file that holds exactly the region's bytes from offset 0, for the kernel to read and write in our place.
    ///
    /// The answer is the same for all handles of a node as long as any of them is open: always that file, or always `None`. `None` where
    /// the pool is raw or striped, where sums are verified always, and, for regions being written, where a quota has to be kept.
    pub fn backing(&self) -> Option<Arc<File>> {
        let shared = &self.inner.pool.shared;
        self.inner.live.backing(|current| {
            let quota = match &shared.storage {
                Storage::Files { directory, .. } => directory.quota().is_some(),
                Storage::Extents(_) => return false,
            };
            shared.options.verify != Verify::Always && !(quota && matches!(current, Current::Draft(_)))
        })
    }

    /// Reads ranges (offset, length) ahead of their use, into the RAM tier or the page cache. Dropping the ticket cancels what is left.
    pub fn prefetch(&self, ranges: &[(u64, u64)], priority: Priority) -> PrefetchTicket {
        let shared = &self.inner.pool.shared;
        let current = self.inner.live.current();
        match (&shared.storage, &current) {
            (Storage::Extents(io), Some(Current::Stored(stored))) => match &**stored {
                Stored::Extents(content) => {
                    io.prefetcher().extents(self.node(), content.layout(), ranges, priority, None)
                }
                _ => nothing(io.prefetcher()),
            },
            // What is being written is in memory, or was not long ago.
            (Storage::Extents(io), _) => nothing(io.prefetcher()),
            (Storage::Files { prefetcher, .. }, current) => {
                match current.as_ref().and_then(|current| current.content().backing()) {
                    Some(file) => prefetcher.file(&file, ranges, priority, None),
                    None => nothing(prefetcher),
                }
            }
        }
    }
}
