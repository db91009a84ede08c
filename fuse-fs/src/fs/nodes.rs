//! What the kernel knows of each node: how often it looked it up, and in which mode its files are open.
//!
//! The kernel allows one mode per inode at a time: while any file of an inode is open with passthrough, every other open
//! must use passthrough too and name the same backing id; while one is open through the page cache of the mount, none may
//! use passthrough (`fs/fuse/iomode.c`). A violation is answered with `EIO` to the application, so the mode is decided by
//! the first open of a node and kept until its last release.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{Attr, NodeId, Timestamp};

const SHARDS: usize = 16;

/// How the kernel reaches the bytes of an open node. `B` is the kernel's name of a backing file (an opaque token here).
#[derive(Debug)]
pub(crate) enum IoMode<B> {
    /// Reads, writes and mappings go to `file` without the daemon. The token must live until the last release.
    Passthrough { token: Arc<B>, file: Arc<File> },
    /// Every page comes from the daemon.
    Served,
}

/// Tells contents of a node apart. The generation alone does not: it stays while a draft is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentVersion {
    generation: u64,
    modified: Timestamp,
    size: u64,
}

impl From<Attr> for ContentVersion {
    fn from(attr: Attr) -> ContentVersion {
        ContentVersion { generation: attr.generation, modified: attr.mtime, size: attr.size }
    }
}

#[derive(Debug)]
pub(crate) struct OpenState<B> {
    /// Open files, counted from our answer to OPEN until we see RELEASE.
    pub opens: u32,
    /// `Some` exactly while `opens > 0`.
    pub mode: Option<IoMode<B>>,
    /// Which content the kernel's page cache may hold.
    pub cached: Option<ContentVersion>,
}

/// One node the kernel refers to.
#[derive(Debug)]
pub(crate) struct Node<B> {
    lookups: Mutex<u64>,
    /// Held while an open decides about the mode, which can take as long as the engine's open does.
    pub open: Mutex<OpenState<B>>,
    /// Files open for writing; outside the lock because every getattr reads it.
    pub writers: AtomicU32,
    /// Last attributes of a node whose last name is gone: `fstat` of an `O_PATH` file or of a removed working directory.
    pub orphan: Mutex<Option<Attr>>,
}

impl<B> Node<B> {
    fn new() -> Node<B> {
        Node {
            lookups: Mutex::new(0),
            open: Mutex::new(OpenState { opens: 0, mode: None, cached: None }),
            writers: AtomicU32::new(0),
            orphan: Mutex::new(None),
        }
    }

    pub fn has_writer(&self) -> bool {
        self.writers.load(Ordering::Relaxed) > 0
    }
}

/// All nodes with a lookup count, sharded because every lookup and every forget comes here.
#[derive(Debug)]
pub(crate) struct NodeTable<B> {
    shards: [Mutex<HashMap<NodeId, Arc<Node<B>>>>; SHARDS],
}

impl<B> NodeTable<B> {
    pub fn new() -> NodeTable<B> {
        NodeTable { shards: std::array::from_fn(|_| Mutex::new(HashMap::new())) }
    }

    fn shard(&self, node: NodeId) -> MutexGuard<'_, HashMap<NodeId, Arc<Node<B>>>> {
        lock(&self.shards[node as usize % SHARDS])
    }

    /// Counts one more reference that the kernel will return with FORGET.
    pub fn remember(&self, node: NodeId) -> Arc<Node<B>> {
        let mut shard = self.shard(node);
        let entry = shard.entry(node).or_insert_with(|| Arc::new(Node::new()));
        *lock(&entry.lookups) += 1;
        entry.clone()
    }

    /// The entry of a node, made when the kernel never looked it up (the root).
    pub fn get_or_insert(&self, node: NodeId) -> Arc<Node<B>> {
        self.shard(node).entry(node).or_insert_with(|| Arc::new(Node::new())).clone()
    }

    pub fn get(&self, node: NodeId) -> Option<Arc<Node<B>>> {
        self.shard(node).get(&node).cloned()
    }

    /// Gives back `count` references; the entry goes with the last one.
    pub fn forget(&self, node: NodeId, count: u64) {
        let mut shard = self.shard(node);
        let Some(entry) = shard.get(&node) else { return };
        let left = {
            let mut lookups = lock(&entry.lookups);
            *lookups = lookups.saturating_sub(count);
            *lookups
        };
        // An entry with open files must stay: its mode binds the next open. `try_lock` fails only while an open is under way.
        if left == 0 && entry.open.try_lock().is_ok_and(|open| open.opens == 0) {
            shard.remove(&node);
        }
    }

    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    pub fn clear(&self) {
        for shard in &self.shards {
            lock(shard).clear();
        }
    }
}

/// Locks and goes on after a panic of another thread: every critical section here leaves the data whole.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_lives_as_long_as_its_lookups() {
        let table = NodeTable::<()>::new();
        table.remember(7);
        table.remember(7);
        table.forget(7, 1);
        assert_eq!(table.len(), 1);
        table.forget(7, 1);
        assert_eq!(table.len(), 0);
        table.forget(7, 1); // a forget too many is harmless
    }

    #[test]
    fn an_open_node_outlives_its_last_lookup() {
        let table = NodeTable::<()>::new();
        let node = table.remember(7);
        lock(&node.open).opens = 1;
        table.forget(7, 1);
        assert!(table.get(7).is_some());
    }
}
