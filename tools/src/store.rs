//! The pool as the commands see it: a thin layer over the engine's session, with this program's errors and JSON names.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use engine::metrics;
use engine::tensors::TensorIndex;
use engine::{
    ErrorKind, NodeKind, PoolInfo, PoolStat, RegionReader, RegionWriter, RepairReport, Session,
    SessionOptions, VerifyProgress, VerifyReport, WriterOptions,
};
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::{names, output};

/// RAM tier of a command that owns the pool for a moment: it streams, and a cache would only cost time.
const COMMAND_RAM_BYTES: u64 = 64 << 20;

/// Takes the address of `--metrics`, before anything is opened.
pub fn bind_metrics(address: Option<SocketAddr>) -> Outcome<Option<metrics::Bound>> {
    let bound = address.map(metrics::Bound::new).transpose();
    bound.map_err(|error| match error.kind() {
        ErrorKind::InvalidArgument => Failure::usage(error.to_string()),
        _ => Failure::from(error),
    })
}

/// An open pool: owned by this process, or reached through its owner (a running mount).
pub struct Store {
    path: PathBuf,
    session: Session,
}

/// A node of the pool's tree. The field names are those of `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Path from the root.
    pub path: String,
    /// `directory`, `region`, `symlink`, ...
    pub kind: &'static str,
    /// Bytes.
    pub size: u64,
    /// Bytes on the members.
    pub allocated: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that lead to it.
    pub nlink: u32,
    /// Last change of the content, seconds since the epoch.
    pub modified: i64,
    /// Another one after each commit of the content.
    pub generation: u64,
    /// Target of a symbolic link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

impl From<engine::Entry> for Entry {
    fn from(entry: engine::Entry) -> Self {
        Self {
            path: entry.path,
            kind: kind_word(entry.kind),
            size: entry.size,
            allocated: entry.allocated,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            nlink: entry.nlink,
            modified: entry.mtime,
            generation: entry.generation,
            target: entry.target,
        }
    }
}

fn kind_word(kind: NodeKind) -> &'static str {
    match kind {
        NodeKind::Directory => "directory",
        NodeKind::Region => "region",
        NodeKind::Symlink => "symlink",
        NodeKind::Fifo => "fifo",
        NodeKind::Socket => "socket",
        NodeKind::CharDevice => "char_device",
        NodeKind::BlockDevice => "block_device",
    }
}

impl Entry {
    /// Last component.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// True for a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == "directory"
    }

    /// True for a region.
    pub fn is_region(&self) -> bool {
        self.kind == "region"
    }

    /// `drwxr-xr-x`.
    pub fn mode_text(&self) -> String {
        let kind = match self.kind {
            "directory" => 'd',
            "symlink" => 'l',
            "fifo" => 'p',
            "socket" => 's',
            "char_device" => 'c',
            "block_device" => 'b',
            _ => '-',
        };
        let bits =
            (0..9).rev().map(|bit| if self.mode >> bit & 1 == 0 { '-' } else { ['x', 'w', 'r'][bit % 3] });
        std::iter::once(kind).chain(bits).collect()
    }
}

impl Store {
    /// Opens the pool.
    pub fn open(path: &Path, read_only: bool) -> Outcome<Self> {
        let options = SessionOptions { read_only, ram_bytes: COMMAND_RAM_BYTES, ..SessionOptions::default() };
        let session = Session::open(path, options)
            .map_err(|error| Failure::from(error).while_doing(format!("open the pool {}", path.display())))?;
        Ok(Self { path: path.to_owned(), session })
    }

    /// The pool's path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process that owns the pool, when it is another one.
    pub fn other_owner(&self) -> Option<u32> {
        self.session.is_remote().then(|| self.session.owner_pid())
    }

    /// The session itself.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Serves metrics of the pool that this process owns. What it returns is dropped before the pool is closed.
    pub fn serve_metrics(&self, bound: Option<metrics::Bound>) -> Outcome<Option<metrics::Server>> {
        let Some(bound) = bound else { return Ok(None) };
        let server = self.session.serve_metrics(bound)?;
        output::note(&format!("metrics are at http://{}/metrics", server.address()));
        Ok(Some(server))
    }

    /// What the superblocks say.
    pub fn info(&self) -> Outcome<PoolInfo> {
        Ok(self.session.info()?)
    }

    /// What the pool holds.
    pub fn stat(&self) -> Outcome<PoolStat> {
        Ok(self.session.stat()?)
    }

    /// A directory's entries, or a region itself; in order of their paths.
    pub fn list(&self, name: &str, recursive: bool) -> Outcome<Vec<Entry>> {
        let entries =
            self.session.list(name, recursive).map_err(|error| self.failure("list", name, error))?;
        Ok(entries.into_iter().map(Entry::from).collect())
    }

    /// The node of a name.
    pub fn entry(&self, name: &str) -> Outcome<Entry> {
        self.find(name)?.ok_or_else(|| {
            Failure::not_found(format!(
                "there is no `{}` in the pool {}",
                crate::output::printable(name),
                self.path.display()
            ))
            .hint("`nvtier ls -r` lists what there is")
        })
    }

    /// The node of a name, if there is one.
    pub fn find(&self, name: &str) -> Outcome<Option<Entry>> {
        match self.session.stat_path(name) {
            Ok(entry) => Ok(Some(entry.into())),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotDirectory) => Ok(None),
            Err(error) => Err(self.failure("look at", name, error)),
        }
    }

    /// The tensors of a region; `None` when it is no tensor file.
    pub fn tensors(&self, name: &str) -> Outcome<Option<TensorIndex>> {
        self.session.tensors(name).map_err(|error| self.failure("read the tensors of", name, error))
    }

    /// Makes a directory and those above it.
    pub fn make_directories(&self, name: &str) -> Outcome {
        self.session.mkdirs(name).map_err(|error| self.failure("make the directory", name, error))
    }

    /// Removes a region or a directory.
    pub fn remove(&self, name: &str, recursive: bool) -> Outcome {
        self.session.remove(name, recursive).map_err(|error| self.failure("remove", name, error))
    }

    /// Moves a name.
    pub fn rename(&self, from: &str, to: &str) -> Outcome {
        self.session.rename(from, to).map_err(|error| self.failure("make", to, error))
    }

    /// Reads everything below a name (`""`: the pool) and compares it with its sums.
    pub fn verify(&self, name: &str, progress: &mut dyn FnMut(VerifyProgress)) -> Outcome<VerifyReport> {
        self.session.verify(name, progress).map_err(|error| self.failure("verify", name, error))
    }

    /// Mends what the pool can mend by itself; see [`Session::repair`].
    pub fn repair(&self, name: &str, progress: &mut dyn FnMut(VerifyProgress)) -> Outcome<RepairReport> {
        self.session.repair(name, progress).map_err(|error| self.failure("repair", name, error))
    }

    /// Puts the committed bytes in the place of a damaged chunk; see [`Session::replace_chunk`].
    pub fn replace_chunk(&self, node: u64, chunk: u64, bytes: &[u8]) -> Outcome<bool> {
        Ok(self.session.replace_chunk(node, chunk, bytes)?)
    }

    /// Opens a region for reading.
    pub fn reader(&self, name: &str) -> Outcome<RegionReader> {
        self.session.reader(name).map_err(|error| self.failure("open", name, error))
    }

    /// Opens a region for writing; see [`Session::writer`].
    pub fn writer(&self, name: &str, len: u64, options: WriterOptions) -> Outcome<RegionWriter> {
        self.session.writer(name, Some(len), options).map_err(|error| self.failure("make", name, error))
    }

    /// Ends the session; what dropping it would only log is an error here.
    pub fn close(self) -> Outcome {
        let Self { path, session } = self;
        session
            .close()
            .map_err(|error| Failure::from(error).while_doing(format!("close the pool {}", path.display())))
    }

    /// An error of the engine, with what was tried on which name.
    pub fn failure(&self, tried: &str, name: &str, error: engine::Error) -> Failure {
        let shown = if name.is_empty() {
            "the root".to_owned()
        } else {
            format!("`{}`", crate::output::printable(name))
        };
        Failure::from(error).while_doing(format!("{tried} {shown} in the pool {}", self.path.display()))
    }
}

/// A path below [`PARTIAL`] for what is not complete yet. Listings leave it out.
pub fn staging_path(name: &str) -> String {
    names::join(PARTIAL, name)
}

pub use names::PARTIAL;
