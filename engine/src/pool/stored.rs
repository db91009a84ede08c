//! Committed content of a region.

use std::fs::File;
use std::num::NonZeroU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock, Weak};

use super::Shared;
use crate::content::{Content, lend_copy};
use crate::error::{Error, ErrorKind, Result};
use crate::extent_io::ExtentContent;
use crate::file_draft::{read_file, seek_file};
use crate::layout::Layout;
use crate::types::{Attr, Borrower, NodeId, Seek};

/// Content that a commit made: nobody changes it any more (but see [`FileContent`]).
#[derive(Debug)]
pub(crate) enum Stored {
    /// No bytes.
    Empty,
    /// One file of a directory pool.
    File(FileContent),
    /// Extents on raw or striped members.
    Extents(ExtentContent),
}

/// A region's file. It is changed in place only as an unsealed draft, and no sums are looked at then.
#[derive(Debug)]
pub(crate) struct FileContent {
    pool: Weak<Shared>,
    node: NodeId,
    /// Its number.
    pub file: u64,
    size: u64,
    generation: u64,
    /// Bytes it occupies.
    pub allocated: u64,
    /// Whether there are sums to compare with.
    pub sealed: bool,
    open: OnceLock<Arc<File>>,
    layout: OnceLock<Arc<Layout>>,
}

impl FileContent {
    pub fn new(pool: &Arc<Shared>, attr: &Attr, file: u64, sealed: bool) -> FileContent {
        FileContent {
            pool: Arc::downgrade(pool),
            node: attr.node,
            file,
            size: attr.size,
            generation: attr.generation,
            allocated: attr.allocated,
            sealed,
            open: OnceLock::new(),
            layout: OnceLock::new(),
        }
    }

    fn pool(&self) -> Result<Arc<Shared>> {
        self.pool.upgrade().ok_or_else(|| Error::new(ErrorKind::Stale, "the pool is closed"))
    }

    /// Goes on using a descriptor that is open already.
    pub fn with_open(self, file: Arc<File>) -> FileContent {
        let _ = self.open.set(file);
        self
    }

    /// The file, opened for writing as well where the pool is: it may serve as kernel backing of a writer that comes later.
    pub fn open(&self) -> Result<&Arc<File>> {
        if let Some(file) = self.open.get() {
            return Ok(file);
        }
        let pool = self.pool()?;
        let file = pool.files()?.open_file(self.file, true)?;
        Ok(self.open.get_or_init(|| Arc::new(file)))
    }

    /// The layout with its sums, read from the catalog when it is first needed. `Stale`: that has another one already.
    pub fn layout(&self) -> Result<&Arc<Layout>> {
        if let Some(layout) = self.layout.get() {
            return Ok(layout);
        }
        let layout = self.pool()?.load_layout(self.node)?;
        if layout.generation() != self.generation {
            let text = format!("node {} has newer content than generation {}", self.node, self.generation);
            return Err(Error::new(ErrorKind::Stale, text));
        }
        Ok(self.layout.get_or_init(|| layout))
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        if !self.sealed {
            let file = self.open()?;
            return read_file(file, offset, buf)
                .map_err(|error| Error::io(format!("read node {}", self.node), error));
        }
        let end = offset.saturating_add(buf.len() as u64).min(self.size);
        if offset >= end {
            return Ok(0);
        }
        let len = (end - offset) as usize;
        let layout = self.layout()?;
        let chunk = layout.chunk_size() as u64;
        let (first, last) = (offset / chunk * chunk, end.next_multiple_of(chunk).min(self.size));
        let file = self.open()?;
        let whole = first == offset && last == end;
        let mut around = Vec::new();
        let bytes: &mut [u8] = if whole {
            &mut buf[..len]
        } else {
            around.resize((last - first) as usize, 0);
            &mut around
        };
        // Where that fails, each chunk is read by itself below.
        let read = read_file(file, first, bytes).unwrap_or(0);
        let pool = self.pool()?;
        let mut wrong = None;
        for (index, piece) in (first / chunk..).zip(bytes.chunks_mut(chunk as usize)) {
            let start = (index * chunk - first) as usize;
            pool.counters.verified_chunks.fetch_add(1, Relaxed);
            let good = start + piece.len() <= read && crc32fast::hash(piece) == layout.sum(index);
            if !good && let Err(error) = self.read_again(&pool, file, index, layout, piece) {
                wrong = Some(error);
                break;
            }
        }
        if let Some(error) = wrong {
            bytes.fill(0);
            return Err(error);
        }
        if !whole {
            let from = (offset - first) as usize;
            buf[..len].copy_from_slice(&around[from..from + len]);
        }
        Ok(len)
    }
}

impl FileContent {
    /// A chunk that could not be read or fails its sum, read once more and past what the page cache holds of it.
    #[cold]
    fn read_again(
        &self,
        pool: &Shared,
        file: &File,
        index: u64,
        layout: &Layout,
        piece: &mut [u8],
    ) -> Result<()> {
        let offset = index * layout.chunk_size() as u64;
        let counters = &pool.counters;
        counters.retried_reads.fetch_add(1, Relaxed);
        // Whole pages: those at the ends of an odd chunk are shared with its neighbours.
        let len = NonZeroU64::new((piece.len() as u64).next_multiple_of(4096));
        let _ = rustix::fs::fadvise(file, offset, len, rustix::fs::Advice::DontNeed);
        let read =
            read_file(file, offset, piece).map_err(|error| Error::io(what_of(self.node, offset), error))?;
        if read == piece.len() && crc32fast::hash(piece) == layout.sum(index) {
            counters.repaired_reads.fetch_add(1, Relaxed);
            tracing::warn!(node = self.node, chunk = index, "a second read was right");
            return Ok(());
        }
        counters.corrupt_chunks.fetch_add(1, Relaxed);
        Err(pool.corrupt(self.node, index, 0))
    }
}

fn what_of(node: NodeId, offset: u64) -> String {
    format!("read node {node} at {offset}")
}

impl Stored {
    /// Whether its sums are valid.
    pub(crate) fn sealed(&self) -> bool {
        match self {
            Stored::File(file) => file.sealed,
            _ => true,
        }
    }

    /// Its layout, loaded where it is not at hand.
    pub(crate) fn layout(&self, chunk_size: u32) -> Result<Arc<Layout>> {
        match self {
            Stored::Empty => Ok(Arc::new(Layout::new(chunk_size))),
            Stored::File(file) => file.layout().cloned(),
            Stored::Extents(content) => Ok(content.layout().clone()),
        }
    }

    /// Whether nobody but the one who asks holds this content, or its layout.
    pub(crate) fn is_free(this: &Arc<Stored>) -> bool {
        Arc::strong_count(this) == 1
            && match &**this {
                Stored::Extents(content) => Arc::strong_count(content.layout()) == 1,
                _ => true,
            }
    }
}

impl Content for Stored {
    fn size(&self) -> u64 {
        match self {
            Stored::Empty => 0,
            Stored::File(file) => file.size,
            Stored::Extents(content) => content.size(),
        }
    }

    fn allocated(&self) -> u64 {
        match self {
            Stored::Empty => 0,
            Stored::File(file) => file.allocated,
            Stored::Extents(content) => content.allocated(),
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match self {
            Stored::Empty => Ok(0),
            Stored::File(file) => file.read(offset, buf),
            Stored::Extents(content) => content.read_at(offset, buf),
        }
    }

    fn read_with(&self, offset: u64, len: usize, to: Borrower, f: &mut dyn FnMut(&[&[u8]])) -> Result<usize> {
        match self {
            Stored::Empty => {
                f(&[]);
                Ok(0)
            }
            Stored::File(_) => lend_copy(self, offset, len, f),
            Stored::Extents(content) => content.read_with(offset, len, to, f),
        }
    }

    fn seek(&self, offset: u64, what: Seek) -> Result<u64> {
        match self {
            Stored::Empty => {
                Err(Error::new(ErrorKind::OutOfRange, format!("no {what:?} at or after {offset}")))
            }
            Stored::File(file) => seek_file(file.open()?, offset, what),
            Stored::Extents(content) => content.seek(offset, what),
        }
    }

    fn backing(&self) -> Option<Arc<File>> {
        match self {
            Stored::Empty | Stored::Extents(_) => None,
            Stored::File(file) => file
                .open()
                .inspect_err(|error| tracing::warn!(error = %error.chain(), "no backing file"))
                .ok()
                .cloned(),
        }
    }
}
