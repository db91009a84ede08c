//! What commands and bindings use of a pool: the same calls whether this process owns it or another one does.
//!
//! [`Session::open`] becomes the pool's owner when nobody is, and a client of the owner's control socket otherwise
//! (see [`crate::control`]). Paths are from the pool's root, with or without a leading `/`; names that are not UTF-8 can be
//! listed (with replacement characters) but not reached, the mount is the way to those.
//!
//! Regions are written whole or not at all: see [`RegionWriter`].

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::control::{Client, ControlServer};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics;
use crate::pool::{OpenOptions, Pool, PoolInfo, PoolStat};
use crate::repair::RepairReport;
use crate::tensors::{self, TensorIndex};
use crate::types::{NodeId, NodeKind};
use crate::verify::{VerifyProgress, VerifyReport};

mod blocks;
mod kv;
mod loads;
pub(crate) mod local;
pub(crate) mod partial;
mod reader;
mod writer;

pub use blocks::{Blocks, Puts};
pub use loads::Loads;
pub use reader::RegionReader;
pub use writer::RegionWriter;

/// How a session is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Change nothing; also refused as a client.
    pub read_only: bool,
    /// Budget of the RAM tier when this process becomes the owner. Default: 256 MiB.
    pub ram_bytes: u64,
    /// Let other processes in while this one owns the pool. Default: no, they wait for it to end.
    pub serve: bool,
    /// How long to wait for an owner that serves nobody. Default: 5 s.
    pub wait: Duration,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions {
            read_only: false,
            ram_bytes: OpenOptions::default().ram_bytes,
            serve: false,
            wait: Duration::from_secs(5),
        }
    }
}

/// A node of the pool as commands show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Path from the root, without a leading `/`; empty for the root.
    pub path: String,
    /// What it is.
    pub kind: NodeKind,
    /// Bytes.
    pub size: u64,
    /// Bytes that it occupies on the members.
    pub allocated: u64,
    /// Permission bits, `07777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that lead to it.
    pub nlink: u32,
    /// Last change of the content, seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds of `mtime`.
    pub mtime_nanos: u32,
    /// Its number.
    pub node: u64,
    /// Generation of its content.
    pub generation: u64,
    /// Target of a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// How a region is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterOptions {
    /// Permission bits. Default: 0644.
    pub mode: u32,
    /// Keep what was written when the writer ends without commit, and go on from there next time. Default: no.
    pub resume: bool,
    /// What the bytes come from, for example an ETag and a length: a resumed writer starts over when it is another one. Default: empty.
    pub resume_key: String,
}

impl Default for WriterOptions {
    fn default() -> WriterOptions {
        WriterOptions { mode: 0o644, resume: false, resume_key: String::new() }
    }
}

/// An open pool, here or in the process that owns it. May be shared by threads.
#[derive(Debug)]
pub struct Session {
    read_only: bool,
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    /// `server` stands first: it goes before the pool does.
    Embedded {
        server: Option<ControlServer>,
        pool: Pool,
    },
    Remote(Arc<Client>),
}

/// First pause between attempts to open a pool whose owner comes or goes.
const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_millis(100);

impl Session {
    /// Opens the pool at `path`: as its owner, or through its owner.
    ///
    /// `Busy`: somebody owns it and does not let others in within [`SessionOptions::wait`].
    pub fn open(path: &Path, options: SessionOptions) -> Result<Session> {
        let deadline = Instant::now() + options.wait;
        let mut pause = RETRY_FIRST;
        loop {
            let open = OpenOptions {
                read_only: options.read_only,
                ram_bytes: options.ram_bytes,
                ..OpenOptions::default()
            };
            let busy = match Pool::open(path, &open) {
                Ok(pool) => return Ok(Session::embedded(pool, &options)),
                Err(error) if error.kind() == ErrorKind::Busy => error,
                Err(error) => return Err(error),
            };
            // The owner may be on its way in (no socket yet) or out (no socket any more): both pass.
            let refused = match Client::connect(path) {
                Ok(client) => {
                    return Ok(Session {
                        read_only: options.read_only,
                        inner: Inner::Remote(Arc::new(client)),
                    });
                }
                Err(error) if error.kind() == ErrorKind::Stale => error,
                Err(error) => {
                    return Err(error.context("the pool is owned, and its owner does not let us in"));
                }
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let context =
                    format!("{busy}; it takes no requests ({refused}): try again when it has ended");
                return Err(Error::with_source(ErrorKind::Busy, context, busy));
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// A session on a pool that this process opened already. Of the options, `serve` and `read_only` count.
    pub fn over(pool: Pool, options: &SessionOptions) -> Session {
        Session::embedded(pool, options)
    }

    fn embedded(pool: Pool, options: &SessionOptions) -> Session {
        if !options.read_only {
            partial::sweep(&pool);
        }
        if !options.read_only && !options.serve {
            crate::control::location::sweep(&pool.info());
        }
        let server = options.serve.then(|| crate::control::serve(pool.clone()));
        let server = match server.transpose() {
            Ok(server) => server,
            Err(error) => {
                tracing::warn!("other processes cannot use the pool meanwhile: {}", error.chain());
                None
            }
        };
        Session { read_only: options.read_only, inner: Inner::Embedded { server, pool } }
    }

    /// Whether another process owns the pool.
    pub fn is_remote(&self) -> bool {
        matches!(self.inner, Inner::Remote(_))
    }

    /// The process that owns the pool.
    pub fn owner_pid(&self) -> u32 {
        match &self.inner {
            Inner::Embedded { .. } => std::process::id(),
            Inner::Remote(client) => client.owner_pid(),
        }
    }

    /// The pool itself, when this process owns it.
    pub fn pool(&self) -> Option<&Pool> {
        match &self.inner {
            Inner::Embedded { pool, .. } => Some(pool),
            Inner::Remote(_) => None,
        }
    }

    /// Answers scrapes with metrics of the pool, which this process has to own: `Busy` where another one does. What it returns is to be dropped
    /// before the session is closed: it holds the pool open.
    pub fn serve_metrics(&self, bound: metrics::Bound) -> Result<metrics::Server> {
        let Some(pool) = self.pool().cloned() else {
            let context = format!(
                "serve metrics on {}: process {} owns the pool, and is the one that can (`nvtier mount --metrics`)",
                bound.address(),
                self.owner_pid()
            );
            return Err(Error::new(ErrorKind::Busy, context));
        };
        bound.serve(Arc::new(move || Some(metrics::build() + &metrics::owner(&pool))))
    }

    fn writable(&self, doing: &str) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{doing}: the session is read-only")));
        }
        Ok(())
    }

    /// What the superblocks say.
    pub fn info(&self) -> Result<PoolInfo> {
        match &self.inner {
            Inner::Embedded { pool, .. } => Ok(pool.info()),
            Inner::Remote(client) => client.info(),
        }
    }

    /// What the pool holds and did.
    pub fn stat(&self) -> Result<PoolStat> {
        match &self.inner {
            Inner::Embedded { pool, .. } => Ok(pool.stat()),
            Inner::Remote(client) => client.stat(),
        }
    }

    /// What lies at `path`: itself when it is no directory, else its entries in order of names, and with `recursive` theirs after each.
    /// Parked imports (`/.nvtier-partial`) are left out unless asked for by name.
    pub fn list(&self, path: &str, recursive: bool) -> Result<Vec<Entry>> {
        match &self.inner {
            Inner::Embedded { pool, .. } => {
                let mut entries = Vec::new();
                local::walk(pool, path, recursive, &mut |entry| {
                    entries.push(entry);
                    Ok(())
                })?;
                Ok(entries)
            }
            Inner::Remote(client) => client.list(path, recursive),
        }
    }

    /// The node at `path`.
    pub fn stat_path(&self, path: &str) -> Result<Entry> {
        match &self.inner {
            Inner::Embedded { pool, .. } => local::stat_path(pool, path),
            Inner::Remote(client) => client.stat_path(path),
        }
    }

    /// Makes a directory and those above it; one that exists is fine.
    pub fn mkdirs(&self, path: &str) -> Result<()> {
        self.writable("mkdir")?;
        match &self.inner {
            Inner::Embedded { pool, .. } => local::mkdirs(pool, path, local::Who::me()),
            Inner::Remote(client) => client.mkdirs(path),
        }
    }

    /// Removes a region or an empty directory, or with `recursive` all below it.
    pub fn remove(&self, path: &str, recursive: bool) -> Result<()> {
        self.writable("remove")?;
        match &self.inner {
            Inner::Embedded { pool, .. } => local::remove(pool, path, recursive),
            Inner::Remote(client) => client.remove(path, recursive),
        }
    }

    /// Moves a name, replacing what is at `to` as `rename(2)` does.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.writable("rename")?;
        match &self.inner {
            Inner::Embedded { pool, .. } => local::rename(pool, from, to),
            Inner::Remote(client) => client.rename(from, to),
        }
    }

    /// Checks every sum at and below `path` (`""`: of the whole pool).
    pub fn verify(&self, path: &str, progress: &mut dyn FnMut(VerifyProgress)) -> Result<VerifyReport> {
        match &self.inner {
            Inner::Embedded { pool, .. } => local::verify(pool, path, progress),
            Inner::Remote(client) => client.verify(path, progress),
        }
    }

    /// Mends what can be mended: superblocks, the catalog's copy, space that nobody owns, and the damaged chunks at and below `path`; see
    /// [`crate::repair`].
    pub fn repair(&self, path: &str, progress: &mut dyn FnMut(VerifyProgress)) -> Result<RepairReport> {
        self.writable("repair")?;
        match &self.inner {
            Inner::Embedded { pool, .. } => local::repair(pool, path, progress),
            Inner::Remote(client) => client.repair(path, progress),
        }
    }

    /// Puts `bytes` in the place of a damaged chunk; see [`Pool::replace_chunk`].
    pub fn replace_chunk(&self, node: NodeId, chunk: u64, bytes: &[u8]) -> Result<bool> {
        self.writable("repair")?;
        match &self.inner {
            Inner::Embedded { pool, .. } => pool.replace_chunk(node, chunk, bytes),
            Inner::Remote(client) => client.replace_chunk(node, chunk, bytes),
        }
    }

    /// Makes everything that is committed durable.
    pub fn sync(&self) -> Result<()> {
        match &self.inner {
            Inner::Embedded { pool, .. } => pool.sync(),
            Inner::Remote(client) => client.sync(),
        }
    }

    /// Opens a region for reading.
    pub fn reader(&self, path: &str) -> Result<RegionReader> {
        match &self.inner {
            Inner::Embedded { pool, .. } => Ok(RegionReader::local(local::open_read(pool, path)?)),
            Inner::Remote(client) => Ok(RegionReader::remote(client.reader(path)?)),
        }
    }

    /// Opens a region for writing; it appears at `path` at [`RegionWriter::commit`], replacing what is there. Missing
    /// directories are made. With `size_hint` the space is reserved, so that a full pool is told at once.
    pub fn writer(&self, path: &str, size_hint: Option<u64>, options: WriterOptions) -> Result<RegionWriter> {
        self.writable("write")?;
        match &self.inner {
            Inner::Embedded { pool, .. } => {
                let mut writer =
                    partial::PartialWriter::open(pool, path, size_hint, &options, local::Who::me())?;
                writer.stream(size_hint)?;
                Ok(RegionWriter::local(writer, options.resume))
            }
            Inner::Remote(client) => {
                Ok(RegionWriter::remote(client.writer(path, size_hint, &options)?, options.resume))
            }
        }
    }

    /// The tensors of a region; `None` when it is no tensor file. `Malformed` when its header lies.
    pub fn tensors(&self, path: &str) -> Result<Option<TensorIndex>> {
        let reader = self.reader(path)?;
        tensors::parse(path, reader.len(), &mut |offset, out| reader.read_exact_at(offset, out))
    }

    /// Ends the session and reports what dropping it would only log. Open readers and writers of an owned pool keep it open.
    pub fn close(self) -> Result<()> {
        match self.inner {
            Inner::Embedded { server, pool } => {
                drop(server);
                pool.close()
            }
            Inner::Remote(_) => Ok(()),
        }
    }
}
