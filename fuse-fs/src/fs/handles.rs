//! Open files by the number that the kernel carries for us.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use engine::{Borrower, Handle, NodeId};

use super::nodes::Node;
use super::views::View;
use crate::error::{Errno, FsResult};

const SHARDS: usize = 16;

/// What an open file reads from.
#[derive(Debug)]
pub(crate) enum OpenFile<B> {
    /// A region of the pool.
    Region(RegionFile<B>),
    /// A tensor as a `.npy` file: header, then a slice of a region.
    View { view: Arc<View>, handle: Handle },
    /// A text made when it was opened (`.nvtier/*`), so that one reader sees one state.
    Text(Arc<[u8]>),
}

/// An open region with what its release has to undo.
#[derive(Debug)]
pub(crate) struct RegionFile<B> {
    pub id: NodeId,
    pub handle: Handle,
    pub node: Arc<Node<B>>,
    pub writable: bool,
    /// Who has what is read from it.
    pub reader: Borrower,
    /// The backing file, when the kernel reads and writes it by itself.
    pub passed: Option<Arc<File>>,
}

/// The table of open files. Reads take the read lock of one shard only.
#[derive(Debug)]
pub(crate) struct HandleTable<B> {
    next: AtomicU64,
    shards: [RwLock<HashMap<u64, Arc<OpenFile<B>>>>; SHARDS],
}

impl<B> HandleTable<B> {
    pub fn new() -> HandleTable<B> {
        HandleTable {
            // 0 means "no handle" in our answers to opendir.
            next: AtomicU64::new(1),
            shards: std::array::from_fn(|_| RwLock::new(HashMap::new())),
        }
    }

    pub fn insert(&self, file: OpenFile<B>) -> u64 {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        let mut shard = self.shards[fh as usize % SHARDS].write().unwrap_or_else(PoisonError::into_inner);
        shard.insert(fh, Arc::new(file));
        fh
    }

    pub fn get(&self, fh: u64) -> FsResult<Arc<OpenFile<B>>> {
        let shard = self.shards[fh as usize % SHARDS].read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&fh).cloned().ok_or(Errno::EBADF)
    }

    pub fn remove(&self, fh: u64) -> Option<Arc<OpenFile<B>>> {
        self.shards[fh as usize % SHARDS].write().unwrap_or_else(PoisonError::into_inner).remove(&fh)
    }

    pub fn len(&self) -> usize {
        self.shards.iter().map(|s| s.read().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// Takes every open file out, for the end of the session.
    pub fn drain(&self) -> Vec<Arc<OpenFile<B>>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.drain().map(|(_, file)| file));
        }
        all
    }
}
