//! Messages of the control socket.
//!
//! ```text
//! | json length u32 LE | payload length u32 LE | JSON | payload |      a file may ride along (SCM_RIGHTS)
//! ```
//!
//! The client sends a [`Request`], the owner answers with [`Reply`] frames: any number of [`Reply::Working`] and
//! [`Reply::Entries`] with `more` and [`Reply::KvListed`], then one that ends the answer. The first request is [`Request::Hello`]; a version that the owner does
//! not speak is refused with both numbers. Unknown requests are refused, unknown fields are passed over.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};
use crate::kv::admin::{Listed, Order, Report};
use crate::kv::{Settings, StoreStat};
use crate::pool::{PoolInfo, PoolStat};
use crate::repair::RepairReport;
use crate::session::{Entry, WriterOptions};
use crate::verify::{VerifyProgress, VerifyReport};

/// Version of the protocol.
pub const VERSION: u32 = 1;
/// Longest JSON of a request: paths are at most 4 KiB.
pub const REQUEST_MAX: u32 = 1 << 20;
/// Longest JSON of a reply.
pub const REPLY_MAX: u32 = 16 << 20;
/// Longest payload.
pub const PAYLOAD_MAX: u32 = 4 << 20;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
#[allow(missing_docs)] // the calls of Session, by name
pub enum Request {
    Hello {
        version: u32,
    },
    Info,
    Stat,
    List {
        path: String,
        recursive: bool,
    },
    StatPath {
        path: String,
    },
    Mkdirs {
        path: String,
    },
    Remove {
        path: String,
        recursive: bool,
    },
    Rename {
        from: String,
        to: String,
    },
    Verify {
        path: String,
    },
    Repair {
        path: String,
    },
    /// With the chunk's bytes as payload.
    ReplaceChunk {
        node: u64,
        chunk: u64,
    },
    Sync,
    /// Opens this connection's region to read.
    OpenReader {
        path: String,
    },
    /// Answered with a payload, shorter at the end only.
    Read {
        offset: u64,
        len: u32,
    },
    /// Checksums of that many chunks, as little-endian u32 in a payload; fewer at the end.
    Sums {
        first: u64,
        count: u32,
    },
    /// Closes it.
    CloseReader,
    /// Opens this connection's region to write.
    OpenWriter {
        path: String,
        size_hint: Option<u64>,
        options: WriterOptions,
    },
    /// With a payload.
    Write {
        offset: u64,
    },
    /// The client wrote to the draft's file itself.
    Wrote {
        offset: u64,
        len: u64,
    },
    Checkpoint,
    Commit,
    Abort,
    /// Opens this connection's namespace of a KV store. The fingerprint is the payload; the file that blocks are exchanged through rides
    /// along: block `i` of a batch lies in it at `i` times [`Reply::KvOpen`]'s `slot_bytes`.
    KvOpen {
        settings: Settings,
        block_bytes: u32,
        tenant: String,
    },
    /// Keys as payload, in this and the following: 33 bytes each, a length and the key padded to 32. Answered with a count.
    KvLookup,
    /// Answered with a byte for each key, 1: it is there.
    KvContains,
    /// Answered with a byte for each key, see `kv`.
    KvGet,
    /// Answered with a byte for each key, see `kv`.
    KvPut,
    /// Answered with a count.
    KvPin {
        pinned: bool,
    },
    /// Answered with a count.
    KvRemove,
    KvQuota {
        bytes: u64,
    },
    KvFlush,
    KvStat,
    /// Does something to a store of the pool; keys as payload, a regular file rides along where it takes one.
    Kv {
        store: String,
        order: Order,
    },
}

/// What the owner answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "re", content = "v", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Reply {
    Hello {
        version: u32,
        pid: u32,
        pool: String,
    },
    Done,
    Info(PoolInfo),
    Stat(PoolStat),
    Entries {
        entries: Vec<Entry>,
        more: bool,
    },
    Entry(Entry),
    /// It takes long and goes on; of a verification, how far it is.
    Working(Option<VerifyProgress>),
    Verified(VerifyReport),
    Repaired(Box<RepairReport>),
    /// `false`: it was right as it was.
    Replaced(bool),
    /// `direct`: the region is leased and its file rides along, bytes from offset 0; what is read there is checked with
    /// [`Request::Sums`].
    Reader {
        size: u64,
        chunk_size: u32,
        direct: bool,
    },
    /// With a payload.
    Data,
    /// `direct`: the draft's file rides along.
    Writer {
        resume_offset: u64,
        direct: bool,
    },
    KvOpen {
        slot_bytes: u64,
    },
    Count(u64),
    KvStat(Box<StoreStat>),
    /// Blocks of a list; [`Reply::Kv`] ends it.
    KvListed(Vec<Listed>),
    Kv(Box<Report>),
    Error {
        kind: ErrorKind,
        message: String,
    },
}

impl Reply {
    /// An error as it goes over the wire: its kind and the whole chain as text.
    pub fn error(error: &Error) -> Reply {
        Reply::Error { kind: error.kind(), message: error.chain() }
    }
}
