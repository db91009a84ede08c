//! An open region.

use std::fs::File;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::types::{Allocate, NodeId, Seek};

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
    node: NodeId,
}

fn todo<T>(what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::NotSupported, format!("{what} is not built yet")))
}

impl Handle {
    /// The region's node.
    pub fn node(&self) -> NodeId {
        self.inner.node
    }

    /// Current size in bytes.
    pub fn size(&self) -> u64 {
        0
    }

    /// Reads up to the end; returns how many bytes. `Corrupt` where a checksum does not match: such bytes are never handed out.
    pub fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> Result<usize> {
        todo("read_at")
    }

    /// Lends up to `len` bytes, in order, in one call of `f`, without copying where the RAM tier holds them.
    pub fn read_with(&self, _offset: u64, _len: usize, _f: &mut dyn FnMut(&[&[u8]])) -> Result<usize> {
        todo("read_with")
    }

    /// Writes all of `data`, extending the region where needed.
    pub fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<usize> {
        todo("write_at")
    }

    /// Sets the size; new bytes are zeros.
    pub fn set_len(&self, _len: u64) -> Result<()> {
        todo("set_len")
    }

    /// `fallocate(2)`.
    pub fn allocate(&self, _offset: u64, _len: u64, _mode: Allocate) -> Result<()> {
        todo("allocate")
    }

    /// The next data or hole; `OutOfRange` where `lseek(2)` says ENXIO.
    pub fn seek(&self, _offset: u64, _what: Seek) -> Result<u64> {
        todo("seek")
    }

    /// Reports write errors that came late (`close(2)`); makes nothing durable.
    pub fn flush(&self) -> Result<()> {
        todo("flush")
    }

    /// Makes content and namespace durable (`fsync(2)`). Content still open for writing is committed as it is.
    pub fn sync(&self) -> Result<()> {
        todo("sync")
    }

    /// The file that holds exactly the region's bytes from offset 0, for the kernel to read and write in our place.
    ///
    /// The answer is the same for all handles of a node as long as any of them is open: always that file, or always `None`.
    pub fn backing(&self) -> Option<Arc<File>> {
        None
    }
}
