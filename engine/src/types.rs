//! Nodes of the pool's tree and their attributes, in POSIX' terms (`inode(7)`).

use std::ffi::OsString;
use std::time::{SystemTime, UNIX_EPOCH};

/// Number of a node: never reused within a pool, never 0.
pub type NodeId = u64;

/// The root directory.
pub const ROOT: NodeId = 1;

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum NodeKind {
    /// A directory.
    Directory = 1,
    /// Bytes: a regular file of the mount.
    Region = 2,
    /// A symbolic link.
    Symlink = 3,
    /// A named pipe; the kernel does the rest.
    Fifo = 4,
    /// A Unix socket's name.
    Socket = 5,
    /// A character device's number.
    CharDevice = 6,
    /// A block device's number.
    BlockDevice = 7,
}

impl NodeKind {
    /// From its number in the catalog.
    pub fn from_u8(value: u8) -> Option<NodeKind> {
        Some(match value {
            1 => NodeKind::Directory,
            2 => NodeKind::Region,
            3 => NodeKind::Symlink,
            4 => NodeKind::Fifo,
            5 => NodeKind::Socket,
            6 => NodeKind::CharDevice,
            7 => NodeKind::BlockDevice,
            _ => return None,
        })
    }
}

/// Time since the epoch; `nanos` is below 1e9 also before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds.
    pub nanos: u32,
}

impl Timestamp {
    /// The clock's time (`CLOCK_REALTIME`).
    pub fn now() -> Timestamp {
        SystemTime::now().into()
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Timestamp {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Timestamp { secs: since.as_secs() as i64, nanos: since.subsec_nanos() },
            Err(before) => {
                let before = before.duration();
                match before.subsec_nanos() {
                    0 => Timestamp { secs: -(before.as_secs() as i64), nanos: 0 },
                    nanos => Timestamp { secs: -(before.as_secs() as i64) - 1, nanos: 1_000_000_000 - nanos },
                }
            }
        }
    }
}

/// Attributes of a node (`stat(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Its number.
    pub node: NodeId,
    /// What it is.
    pub kind: NodeKind,
    /// Permission bits, `07777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that lead to it; 2 + subdirectories for a directory.
    pub nlink: u32,
    /// Bytes; length of the target for a symbolic link; 0 for a directory.
    pub size: u64,
    /// Bytes that it occupies on the members.
    pub allocated: u64,
    /// Last read, as `relatime` keeps it.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the content or of these attributes.
    pub ctime: Timestamp,
    /// Creation.
    pub crtime: Timestamp,
    /// Device number of a device node.
    pub rdev: u64,
    /// Generation of the content: another one after each commit.
    pub generation: u64,
}

/// Attributes to change; `None` leaves one as it is. `ctime` is set to now unless it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits, `07777`.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes: truncates or extends a region (with a hole).
    pub size: Option<u64>,
    /// Last read.
    pub atime: Option<Timestamp>,
    /// Last change of the content.
    pub mtime: Option<Timestamp>,
    /// Last change of anything.
    pub ctime: Option<Timestamp>,
}

/// A node to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewNode {
    /// What it is.
    pub kind: NodeKind,
    /// Permission bits, `07777`, with the umask applied.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group; a set-group-id parent directory overrides it.
    pub gid: u32,
    /// Device number of a device node, else 0.
    pub rdev: u64,
    /// Target of a symbolic link, else `None`.
    pub target: Option<OsString>,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name: any bytes but `/` and NUL.
    pub name: OsString,
    /// The node.
    pub node: NodeId,
    /// What that is.
    pub kind: NodeKind,
}

/// Who bytes are lent to, see [`Handle::read_with`](crate::Handle::read_with).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Borrower {
    /// A program, with as many reads under way as it sees fit.
    Program,
    /// The kernel, for its page cache, whose readers take one page after the other.
    PageCache,
}

/// How a handle may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    /// Whether it writes.
    pub fn writes(self) -> bool {
        !matches!(self, Access::Read)
    }
}

/// `rename(2)` flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameFlags {
    /// Fail with `Exists` rather than replace.
    pub no_replace: bool,
    /// Swap the two.
    pub exchange: bool,
}

/// `fallocate(2)` modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Reserve space, so that writes there cannot fail for want of it.
    Reserve {
        /// Do not extend the size.
        keep_size: bool,
    },
    /// Give space back; reads yield zeros. Never extends.
    PunchHole,
    /// Zeros.
    ZeroRange {
        /// Do not extend the size.
        keep_size: bool,
    },
}

/// `lseek(2)` SEEK_DATA, SEEK_HOLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next stored byte.
    Data,
    /// The next hole, at the latest the end.
    Hole,
}

/// `setxattr(2)` flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrSet {
    /// Create or replace.
    Any,
    /// Fail with `Exists` when there is one.
    Create,
    /// Fail with `NoAttribute` when there is none.
    Replace,
}
