//! A pool: a tree of named regions on one or several members, with one owner process.
//!
//! - `names.rs`: the calls on names, each a moment under the tree's lock.
//! - `live.rs`: open regions, their drafts and seals. `stored.rs`: committed content.
//! - `commit.rs`: snapshots into the catalog, and freeing what they leave behind.
//! - `format.rs`, `open.rs`: making and opening pools. `slab.rs`: space that the KV store manages itself.
//! - `generations.rs`: what a region was before it was replaced.
//!
//! Locks, in the order they are taken: a region's gate, the snapshot turn, the tree, then `contents`, `graveyard`, `open`.
//!
//! `Pool::tensors` is in `tensors/cache.rs`.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};
use std::thread::JoinHandle;

use nvme::Device;

use crate::catalog::Catalog;
use crate::catalog::store::CatalogStore;
use crate::error::{Error, ErrorKind, Result};
use crate::extent_io::ExtentIo;
use crate::file_draft::StreamWriters;
use crate::handle::Handle;
use crate::member::directory::FileDirectory;
use crate::namespace::Tree;
use crate::owner::Owner;
use crate::prefetch::Prefetcher;
use crate::repair::RepairReport;
use crate::scrub::ScrubOptions;
use crate::types::{Access, NodeId};
use crate::verify::{VerifyProgress, VerifyReport};

mod commit;
mod format;
pub(crate) mod generations;
pub(crate) mod live;
mod names;
mod open;
mod options;
pub(crate) mod slab;
pub(crate) mod stored;

#[cfg(test)]
mod tests;

pub use generations::{GENERATIONS_MAX, Generation};
pub use options::*;

use live::Live;

/// An open pool; clones share it. The last one to go closes it, see [`Pool::close`].
#[derive(Clone, Debug)]
pub struct Pool {
    pub(crate) inner: Arc<Inner>,
}

/// Ends the pool when the last `Pool` or `Handle` goes.
#[derive(Debug)]
pub(crate) struct Inner {
    pub shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    closed: AtomicBool,
}

/// Where regions have their bytes.
#[derive(Debug)]
pub(crate) enum Storage {
    /// The only member is a directory: every region a file.
    Files {
        directory: Arc<FileDirectory>,
        prefetcher: Prefetcher,
        /// For whoever streams, as long as anybody does.
        streams: Mutex<Weak<StreamWriters>>,
    },
    /// Raw or several members: extents.
    Extents(Arc<ExtentIo>),
}

/// What happened since the pool was opened.
#[derive(Debug, Default)]
pub(crate) struct PoolCounters {
    pub read_bytes: AtomicU64,
    pub written_bytes: AtomicU64,
    pub verified_chunks: AtomicU64,
    pub corrupt_chunks: AtomicU64,
    pub retried_reads: AtomicU64,
    pub repaired_reads: AtomicU64,
    pub commits: AtomicU64,
    pub seal_errors: AtomicU64,
    /// Files without an owner that were removed.
    pub orphans: AtomicU64,
}

/// All of a pool but its end.
#[derive(Debug)]
pub(crate) struct Shared {
    pub info: PoolInfo,
    pub options: OpenOptions,
    pub pool_id: [u8; 16],
    pub read_only: bool,
    pub chunk_size: u32,
    pub tree: RwLock<Tree<Live>>,
    pub storage: Storage,
    pub catalog: Catalog,
    store: CatalogStore,
    snapshots: commit::Snapshots,
    contents: Mutex<commit::Contents>,
    graveyard: Mutex<Vec<commit::Doomed>>,
    /// Regions that had to stay unsealed because somebody still maps their file.
    mapped: Mutex<HashSet<NodeId>>,
    /// Regions that are open, as the tree has them too.
    pub(crate) open: Mutex<HashMap<NodeId, Arc<Live>>>,
    /// Source of generations, of contents and snapshots alike.
    generation: AtomicU64,
    durable_generation: AtomicU64,
    /// What the catalog says files are numbered below.
    reserved_file: u64,
    pub counters: PoolCounters,
    commit_error: Mutex<String>,
    /// What opening had to mend, for [`Pool::repair`].
    pub(crate) mended: Mutex<Vec<String>>,
    pub(crate) scrub: Mutex<crate::scrub::Noted>,
    /// A flush of data failed: what it was for may be lost although a later flush succeeds. No snapshot is made any more.
    flush_failed: OnceLock<String>,
    /// KV stores that are open, by name; of one that is being opened, nothing yet.
    pub(crate) kv_open: Mutex<HashMap<String, Weak<crate::kv::Inner>>>,
    pub(crate) stop: Mutex<bool>,
    pub(crate) wake: Condvar,
    kick: AtomicBool,
    _owner: Owner,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("pool {} was opened read-only", self.info.path.display()),
            ));
        }
        self.check_flushed()
    }

    /// After a failed flush the drive or the kernel may have dropped what it was for, and a second flush would succeed all the same:
    /// nothing that hangs on it may be committed. Reads go on; the pool as of its last snapshot comes back when it is opened again.
    pub(crate) fn check_flushed(&self) -> Result<()> {
        match self.flush_failed.get() {
            None => Ok(()),
            Some(why) => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "pool {} takes no changes any more, since data could not be made durable: {why}; look at the drive, then close the pool and open it again: it is then as of its last commit",
                    self.info.path.display()
                ),
            )),
        }
    }

    /// The directory of a directory pool.
    pub(crate) fn files(&self) -> Result<&Arc<FileDirectory>> {
        match &self.storage {
            Storage::Files { directory, .. } => Ok(directory),
            Storage::Extents(_) => Err(Error::new(ErrorKind::NotSupported, "this pool has no region files")),
        }
    }

    /// A chunk that fails its sum.
    pub(crate) fn corrupt(&self, node: NodeId, chunk: u64, member: u16) -> Error {
        let path = read(&self.tree).path_of(node).map(|path| path.to_string_lossy().into_owned());
        let offset = chunk * self.chunk_size as u64;
        let place = self.info.members.get(member as usize).map(|member| member.path.display().to_string());
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "region {:?} (node {node}): chunk {chunk} (bytes from {offset}) on member {member} ({}) fails its checksum",
                path.unwrap_or_default(),
                place.unwrap_or_default()
            ),
        )
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(error = %error.chain(), "closing the pool failed");
        }
    }
}

impl Inner {
    fn end(&self) -> Result<()> {
        if self.closed.swap(true, Relaxed) {
            return Ok(());
        }
        *lock(&self.shared.stop) = true;
        self.shared.wake.notify_all();
        for thread in lock(&self.threads).drain(..) {
            // A thread of ours may hold the last reference and run this itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
        if !self.shared.read_only {
            self.shared.seal_mapped();
        }
        self.shared.close_catalog()
    }
}

impl Pool {
    /// Makes a pool at `path`. Refuses with `ForeignData` where other data is found, naming it, unless forced.
    pub fn format(path: &Path, options: &FormatOptions) -> Result<PoolInfo> {
        format::format(path, options)
    }

    /// Opens a pool and becomes its owner; `Busy` names the process that is. `path` is the pool's or any of its members'.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Pool> {
        open::open(path, options)
    }

    /// Makes a pool of raw members that are open already, where they have no path: simulated devices. Of the options only the chunk
    /// size and the stripe unit count. Nothing is asked about what they hold.
    pub fn format_devices(devices: &[Arc<dyn Device>], options: &FormatOptions) -> Result<PoolInfo> {
        format::format_devices(devices, options)
    }

    /// Opens a pool of raw members that are open already, all of them in order of their index. Their holder is the owner; no lock
    /// keeps others out.
    pub fn open_devices(devices: &[Arc<dyn Device>], options: &OpenOptions) -> Result<Pool> {
        open::open_devices(devices, options)
    }

    /// Reads the superblocks only; needs no ownership.
    pub fn probe(path: &Path) -> Result<PoolInfo> {
        open::probe(path)
    }

    /// What the superblocks say.
    pub fn info(&self) -> PoolInfo {
        self.inner.shared.info.clone()
    }

    /// What it holds and did.
    pub fn stat(&self) -> PoolStat {
        let shared = &self.inner.shared;
        let counters = &shared.counters;
        let mut stat = PoolStat {
            generation: shared.durable_generation.load(Relaxed),
            read_bytes: counters.read_bytes.load(Relaxed),
            written_bytes: counters.written_bytes.load(Relaxed),
            verified_chunks: counters.verified_chunks.load(Relaxed),
            corrupt_chunks: counters.corrupt_chunks.load(Relaxed),
            retried_reads: counters.retried_reads.load(Relaxed),
            repaired_reads: counters.repaired_reads.load(Relaxed),
            commits: counters.commits.load(Relaxed),
            seal_errors: counters.seal_errors.load(Relaxed),
            commit_error: lock(&shared.commit_error).clone(),
            scrub: lock(&shared.scrub).stat(),
            ..PoolStat::default()
        };
        {
            let tree = read(&shared.tree);
            stat.nodes = tree.node_count();
            stat.regions = tree.region_count();
            stat.dirty_nodes = tree.dirty.nodes.len() as u64;
            stat.unsealed_regions = tree.unsealed_count();
        }
        let open: Vec<Arc<Live>> = lock(&shared.open).values().cloned().collect();
        stat.open_regions = open.len() as u64;
        let drafts: Vec<_> = open.iter().filter_map(|live| live.draft()).collect();
        stat.unsealed_regions += drafts.iter().filter(|draft| !draft.is_known_in_place()).count() as u64;
        match &shared.storage {
            Storage::Files { directory, .. } => {
                // What the kernel writes for us is counted when it settles: look at open files now.
                let growing: u64 = drafts.iter().map(|draft| draft.uncounted()).sum();
                stat.used_bytes = directory.used_bytes() + growing;
                stat.free_bytes = directory.free_bytes().unwrap_or(0);
                if let Some(quota) = directory.quota() {
                    stat.free_bytes = stat.free_bytes.min(quota.saturating_sub(stat.used_bytes));
                }
                stat.capacity_bytes = stat.used_bytes + stat.free_bytes;
            }
            Storage::Extents(io) => {
                for member in io.stripes().members() {
                    stat.used_bytes += member.used_bytes();
                    stat.free_bytes += member.free_bytes();
                }
                stat.free_bytes = stat.free_bytes.min(open::shared_space(io.stripes().members()));
                stat.capacity_bytes = stat.used_bytes + stat.free_bytes;
                let tier = io.tier().stats();
                stat.ram = RamStat {
                    budget_bytes: tier.budget_bytes,
                    used_bytes: tier.used_bytes,
                    hits: tier.hits,
                    misses: tier.misses,
                };
                let reads = io.reader().stats();
                stat.verified_chunks += reads.verified_chunks;
                stat.corrupt_chunks += reads.corrupt_chunks;
                stat.retried_reads += reads.retried_reads;
                stat.repaired_reads += reads.repaired_reads;
            }
        }
        stat
    }

    /// Opens a region.
    pub fn open_region(&self, node: NodeId, access: Access, truncate: bool) -> Result<Handle> {
        let shared = &self.inner.shared;
        if truncate && !access.writes() {
            self.set_size(node, 0)?;
        }
        let keep = if truncate && access.writes() { 0 } else { u64::MAX };
        let live = shared.open_live(node, access, keep)?;
        Ok(Handle::new(self.inner.clone(), live, access))
    }

    /// Sets a region's size, as a writer that comes and goes at once.
    fn set_size(&self, node: NodeId, size: u64) -> Result<()> {
        let shared = &self.inner.shared;
        shared.check_writable()?;
        let live = shared.open_live(node, Access::Write, size)?;
        let grown = match live.draft() {
            Some(draft) => {
                let set = draft.get().set_len(size);
                live.note_write();
                set
            }
            None => Ok(()),
        };
        shared.close_live(&live, Access::Write);
        grown
    }

    /// Whether a region's content has checksums: nobody writes to it, and its last writer has been closed properly.
    pub fn is_sealed(&self, node: NodeId) -> Result<bool> {
        let tree = read(&self.inner.shared.tree);
        let region = tree.region(node)?;
        Ok(region.sealed && region.live.as_ref().is_none_or(|live| live.draft().is_none()))
    }

    /// Checks every sum of a region, or of all.
    pub fn verify(
        &self,
        node: Option<NodeId>,
        progress: &mut dyn FnMut(VerifyProgress),
    ) -> Result<VerifyReport> {
        crate::verify::verify(&self.inner.shared, node, progress)
    }

    /// Reads everything in the background and compares its sums, until the pool is closed; see [`crate::scrub`]. Once a pool.
    pub fn start_scrub(&self, options: &ScrubOptions) -> Result<()> {
        crate::scrub::check(options)?;
        let mut threads = lock(&self.inner.threads);
        if !crate::scrub::begin(&mut lock(&self.inner.shared.scrub), options) {
            return Err(Error::new(ErrorKind::Busy, "the pool is being scrubbed already"));
        }
        let (shared, options) = (self.inner.shared.clone(), options.clone());
        let thread = std::thread::Builder::new()
            .name("nvtier-scrub".into())
            .spawn(move || crate::scrub::run(&shared, &options))
            .map_err(|error| Error::io("start the thread nvtier-scrub", error))?;
        threads.push(thread);
        Ok(())
    }

    /// Mends superblocks, the catalog's copy, and space that nobody owns.
    pub fn repair_structures(&self) -> Result<RepairReport> {
        crate::repair::repair_structures(&self.inner.shared)
    }

    /// Verifies a region, or all, and mends damaged chunks from what the pool itself still has of them; see [`crate::repair`].
    pub fn repair(
        &self,
        node: Option<NodeId>,
        progress: &mut dyn FnMut(VerifyProgress),
    ) -> Result<RepairReport> {
        crate::repair::repair_region(&self.inner.shared, node, progress)
    }

    /// Puts `bytes` in the place of a damaged chunk; they must be the committed ones, by their sum. `false`: the chunk is right as it is.
    pub fn replace_chunk(&self, node: NodeId, chunk: u64, bytes: &[u8]) -> Result<bool> {
        crate::repair::replace_chunk(&self.inner.shared, node, chunk, bytes)
    }

    /// Makes everything that is committed durable, in one snapshot.
    pub fn sync(&self) -> Result<()> {
        self.inner.shared.sync()
    }

    /// Syncs, gives up ownership, and reports what dropping would only log. Handles that are still open keep the pool open.
    pub fn close(self) -> Result<()> {
        match Arc::try_unwrap(self.inner) {
            Ok(inner) => inner.end(),
            Err(inner) => inner.shared.sync(),
        }
    }

    /// Whether closing it would close the pool.
    #[cfg(test)]
    pub(crate) fn is_last(&self) -> bool {
        Arc::strong_count(&self.inner) == 1
    }

    /// Waits until what a crash left is cleared away.
    #[cfg(test)]
    fn join_sweeper(&self) {
        if let Some(sweeper) = lock(&self.inner.threads).pop() {
            sweeper.join().unwrap();
        }
    }
}
