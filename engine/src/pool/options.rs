//! How pools are made and opened, and what they say about themselves.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nvme::Device;
use serde::{Deserialize, Serialize};

use crate::scrub::ScrubStat;

/// Smallest chunk: 4 KiB.
pub const MIN_CHUNK_SIZE: u32 = 4 << 10;
/// Largest chunk: 4 MiB.
pub const MAX_CHUNK_SIZE: u32 = 4 << 20;
/// Default chunk: 16 KiB.
pub const DEFAULT_CHUNK_SIZE: u32 = 16 << 10;
/// Default stripe unit: 1 MiB.
pub const DEFAULT_STRIPE_UNIT: u64 = 1 << 20;
/// Most members of a pool.
pub const MAX_MEMBERS: usize = 16;

/// How [`Pool::format`](crate::Pool::format) makes a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// Directory members: quota in bytes for the whole pool, shared equally by them. Image files: length of each.
    /// Default: what the file system has; an image that does not exist needs it.
    pub size: Option<u64>,
    /// Paths of the members: directories (made where missing), block devices, image files. Empty: the pool's path is its only member.
    /// Otherwise the pool's path, unless it is one of them, becomes a small directory that points to them.
    pub members: Vec<PathBuf>,
    /// Bytes under one checksum: a power of two from 4 KiB to 4 MiB. Default: 16 KiB.
    pub chunk_size: u32,
    /// Bytes on one member before the next one's turn: a multiple of the chunk size. Default: 1 MiB.
    pub stripe_unit: u64,
    /// Format even where other data is found.
    pub force: bool,
    /// Make an image file, not a directory, where nothing exists.
    pub raw: bool,
    /// The pool's id, for who has to know it before the first byte is written. Default: a new one.
    pub id: Option<[u8; 16]>,
}

impl Default for FormatOptions {
    fn default() -> FormatOptions {
        FormatOptions {
            size: None,
            members: Vec::new(),
            chunk_size: DEFAULT_CHUNK_SIZE,
            stripe_unit: DEFAULT_STRIPE_UNIT,
            force: false,
            raw: false,
            id: None,
        }
    }
}

/// When checksums are verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// On every read that the engine serves, and no kernel passthrough.
    Always,
    /// On every read that the engine serves; passed-through files by [`Pool::verify`](crate::Pool::verify) only.
    #[default]
    Scrub,
    /// On no read that the engine serves from extents: to see what verification costs, and for nothing else.
    Never,
}

/// How [`Pool::open`](crate::Pool::open) opens a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Write nothing, not even repairs. Several may share a pool so, but not with an owner.
    pub read_only: bool,
    /// Budget of the RAM tier in bytes. Default: 256 MiB.
    pub ram_bytes: u64,
    /// When checksums are verified.
    pub verify: Verify,
    /// Operations in flight per thread. Default: 64.
    pub queue_depth: u32,
    /// Where the file system under a directory has no reflinks, regions up to this size are copied when they are opened for writing,
    /// so that a crash leaves the old content; larger ones are written in place, with that file system's own promises. Default: 64 MiB.
    pub copy_limit_bytes: u64,
    /// Most time between a change and the snapshot that holds it, in milliseconds. 0: snapshots only when asked for. Default: 2000.
    pub commit_interval_ms: u64,
    /// Up to this size all pages of the catalog are checked at open; a larger one is committed so that a crash leaves it ready to be opened.
    /// Default: 64 MiB.
    #[doc(hidden)]
    pub catalog_check_bytes: u64,
    /// Tests put a device that fails between the pool and its raw members. Default: none.
    #[doc(hidden)]
    pub device_hook: Option<DeviceHook>,
}

/// Gives the device to use for a raw member, from its path and the device found there.
#[doc(hidden)]
#[derive(Clone)]
pub struct DeviceHook(Arc<Wrap>);

type Wrap = dyn Fn(&Path, Arc<dyn Device>) -> Arc<dyn Device> + Send + Sync;

impl DeviceHook {
    /// `wrap` is called whenever a member is opened, for its superblock and for its data.
    pub fn new(
        wrap: impl Fn(&Path, Arc<dyn Device>) -> Arc<dyn Device> + Send + Sync + 'static,
    ) -> DeviceHook {
        DeviceHook(Arc::new(wrap))
    }

    pub(crate) fn wrap(&self, path: &Path, device: Arc<dyn Device>) -> Arc<dyn Device> {
        (self.0)(path, device)
    }
}

impl PartialEq for DeviceHook {
    fn eq(&self, other: &DeviceHook) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for DeviceHook {}

impl fmt::Debug for DeviceHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceHook")
    }
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            ram_bytes: 256 << 20,
            verify: Verify::default(),
            queue_depth: 64,
            copy_limit_bytes: 64 << 20,
            commit_interval_ms: 2000,
            catalog_check_bytes: crate::catalog::CHECK_BYTES,
            device_hook: None,
        }
    }
}

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberKind {
    /// A directory of a file system: each region a file.
    Directory,
    /// A block device.
    Block,
    /// One preallocated file.
    Image,
}

impl MemberKind {
    /// Whether extents are ours to place: no file system in between.
    pub fn is_raw(self) -> bool {
        !matches!(self, MemberKind::Directory)
    }
}

/// A member, as the superblock tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberInfo {
    /// Index: 0 holds the catalog.
    pub index: u16,
    /// What it is.
    pub kind: MemberKind,
    /// Its path.
    pub path: PathBuf,
    /// Its id, a UUID.
    pub id: String,
    /// Bytes for data: quota of a directory (0: none), data area of a raw member.
    pub bytes: u64,
}

/// A pool, as its superblocks tell it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolInfo {
    /// Its id, a UUID.
    pub id: String,
    /// Version of the format.
    pub version: u32,
    /// Its members by index.
    pub members: Vec<MemberInfo>,
    /// Bytes under one checksum.
    pub chunk_size: u32,
    /// Bytes on one member before the next one's turn.
    pub stripe_unit: u64,
    /// When it was made, seconds since the epoch.
    pub created: i64,
    /// The path it was opened by.
    pub path: PathBuf,
    /// Process that owns it now, where one does.
    pub owner_pid: Option<u32>,
    /// Whether it was opened read-only.
    pub read_only: bool,
}

/// What a pool holds and did since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStat {
    /// Bytes that it can hold: the quota, or what it uses and the file system still has.
    pub capacity_bytes: u64,
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// Bytes that its regions occupy.
    pub used_bytes: u64,
    /// Nodes of all kinds.
    pub nodes: u64,
    /// Regions among them.
    pub regions: u64,
    /// Generation of the last durable catalog.
    pub generation: u64,
    /// Changed nodes that no durable catalog holds yet.
    pub dirty_nodes: u64,
    /// Open regions.
    pub open_regions: u64,
    /// The RAM tier.
    pub ram: RamStat,
    /// Bytes read through handles; passed-through reads are not seen.
    pub read_bytes: u64,
    /// Bytes written through handles; passed-through writes are not seen.
    pub written_bytes: u64,
    /// Chunks whose checksum was verified.
    pub verified_chunks: u64,
    /// Chunks whose checksum did not match, also not when they were read again.
    pub corrupt_chunks: u64,
    /// Reads that failed, or whose checksum did not match, and were made again.
    pub retried_reads: u64,
    /// Of those, the ones that were right the second time.
    pub repaired_reads: u64,
    /// Snapshots made durable.
    pub commits: u64,
    /// Regions whose checksums could not be made at their last close.
    pub seal_errors: u64,
    /// Regions without valid checksums: open for writing, or not closed before a crash.
    pub unsealed_regions: u64,
    /// Why the last background snapshot failed; empty: it did not.
    pub commit_error: String,
    /// The background scrub.
    #[serde(default)]
    pub scrub: ScrubStat,
}

/// The RAM tier's budget and hits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamStat {
    /// Bytes it may hold.
    pub budget_bytes: u64,
    /// Bytes it holds.
    pub used_bytes: u64,
    /// Chunks found.
    pub hits: u64,
    /// Chunks read from a member.
    pub misses: u64,
}
