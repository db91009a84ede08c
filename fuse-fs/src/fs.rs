//! The file system without a kernel: nodes, open files, virtual trees. Nothing here knows `fuser`, so that tests can drive it
//! directly and the adapter stays one `match` per operation.
//!
//! `B` stands for the kernel's name of a backing file. [`Fs::open`] gets a closure that registers a file and returns it; the
//! file system keeps it alive for as long as the kernel may use it and decides which opens share it.

mod attributes;
mod closer;
mod content;
mod counters;
mod early_writeback;
mod handles;
mod namespace;
mod nodes;
mod report;
mod views;
mod xattr;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use engine::{Attr, Pool};

use self::closer::Closer;
pub use self::content::{Access, IoPath, Opened};
pub use self::counters::{Counters, Operation, Running, Timed, Times};
use self::early_writeback::EarlyWriteback;
use self::handles::{HandleTable, OpenFile};
pub use self::namespace::{DirectoryEntry, NewNodeRequest};
use self::nodes::NodeTable;
use self::views::{Listings, VIRTUAL, VirtualTable};
use crate::error::{Errno, FsResult};

/// How long the kernel may believe a name or an attribute. Changes through the mount itself are seen at once, because the kernel
/// makes them; this bounds how late changes by other processes (through the control socket of the pool) become visible.
pub const VALIDITY: Duration = Duration::from_secs(1);

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

impl Caller {
    /// Whether writing clears the set-user-id bit. The kernel asks for `CAP_FSETID`; the user id is what a request carries.
    fn must_drop_privileges(self) -> bool {
        self.uid != 0
    }
}

/// A node as the kernel wants to hear of it.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Attributes; `attr.node` is the inode number.
    pub attr: Attr,
    /// How long the attributes may be cached.
    pub validity: Duration,
}

/// Whether files are handed to the kernel, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Passthrough {
    /// Offered by the kernel and wanted.
    On,
    /// Not used; the text says why, for people.
    Off(String),
}

/// What of the mount's options the file system itself has to know.
#[derive(Debug, Clone)]
pub struct FsOptions {
    /// User and group that virtual nodes belong to.
    pub owner: Caller,
    /// Refuse every change with `EROFS`.
    pub read_only: bool,
    /// Where the pool is mounted, for `stats.json`.
    pub mountpoint: String,
}

/// The file system.
#[derive(Debug)]
pub struct Fs<B> {
    pool: Pool,
    options: FsOptions,
    /// Whether the pool has a size of its own: then the kernel must not write to it behind the engine's back.
    quota: bool,
    nodes: NodeTable<B>,
    handles: HandleTable<B>,
    virtual_nodes: VirtualTable,
    listings: Listings,
    closer: Closer<B>,
    early_writeback: EarlyWriteback,
    passthrough: Mutex<Passthrough>,
    writes_around_cache: AtomicBool,
    counters: Counters,
    started: engine::Timestamp,
    ended: AtomicBool,
}

impl<B: Send + Sync + 'static> Fs<B> {
    /// A file system over an open pool. Passthrough is off until [`Fs::set_passthrough`].
    pub fn new(pool: Pool, options: FsOptions) -> Fs<B> {
        let is_quota =
            |member: &engine::MemberInfo| member.kind == engine::MemberKind::Directory && member.bytes > 0;
        let quota = pool.info().members.iter().any(is_quota);
        Fs {
            pool,
            options,
            quota,
            nodes: NodeTable::new(),
            handles: HandleTable::new(),
            virtual_nodes: VirtualTable::default(),
            listings: Listings::default(),
            closer: Closer::new(),
            early_writeback: EarlyWriteback::new(),
            passthrough: Mutex::new(Passthrough::Off("the kernel has not been asked yet".to_owned())),
            writes_around_cache: AtomicBool::new(false),
            counters: Counters::default(),
            started: engine::Timestamp::now(),
            ended: AtomicBool::new(false),
        }
    }

    /// The pool below.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Counts since the mount.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn count_gathered(&self) {
        counters::add(&self.counters.gathered_reads, 1);
    }

    /// Whether files are handed to the kernel.
    pub fn passthrough(&self) -> Passthrough {
        nodes::lock(&self.passthrough).clone()
    }

    /// Turns handing over on or off for files opened from now on.
    pub fn set_passthrough(&self, passthrough: Passthrough) {
        *nodes::lock(&self.passthrough) = passthrough;
    }

    /// Whether files that are served and opened for writing alone bypass the page cache.
    pub fn writes_around_cache(&self) -> bool {
        self.writes_around_cache.load(Ordering::Relaxed)
    }

    /// Turns that on or off for files opened from now on. Off at first: the kernel must drop what it caches of a file after each such write.
    pub fn set_writes_around_cache(&self, around: bool) {
        self.writes_around_cache.store(around, Ordering::Relaxed);
    }

    /// Space of the pool.
    pub fn stat(&self) -> FsResult<engine::PoolStat> {
        self.check_alive()?;
        Ok(self.pool.stat())
    }

    /// Drops every open file as if its last descriptor had been closed and refuses all further requests with `ENOTCONN`. For the
    /// end of a session, when the kernel will not send the releases any more.
    pub fn shut_down(&self) {
        self.ended.store(true, Ordering::SeqCst);
        for file in self.handles.drain() {
            self.release_file(&file);
        }
        self.closer.finish();
        self.nodes.clear();
    }

    fn check_alive(&self) -> FsResult<()> {
        if self.ended.load(Ordering::Relaxed) { Err(Errno::ENOTCONN) } else { Ok(()) }
    }

    /// Guard of every operation that changes something.
    fn check_writable(&self, ino: u64) -> FsResult<()> {
        self.check_alive()?;
        if self.options.read_only || is_virtual(ino) { Err(Errno::EROFS) } else { Ok(()) }
    }
}

fn is_virtual(ino: u64) -> bool {
    ino & VIRTUAL != 0
}
