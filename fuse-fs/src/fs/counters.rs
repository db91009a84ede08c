//! Counts of what the mount did, for `.nvtier/stats.json` and `.nvtier/metrics`.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! operations {
    ($($variant:ident = $name:literal),* $(,)?) => {
        /// Requests of the kernel, named as in `fuse(4)`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Operation { $($variant),* }

        impl Operation {
            /// All of them, in the order of the enum.
            pub const ALL: &'static [Operation] = &[$(Operation::$variant),*];

            /// Lower-case name.
            pub fn name(self) -> &'static str {
                match self { $(Operation::$variant => $name),* }
            }
        }
    };
}

operations! {
    Lookup = "lookup", Forget = "forget", GetAttr = "getattr", SetAttr = "setattr", ReadLink = "readlink",
    MkNod = "mknod", MkDir = "mkdir", Unlink = "unlink", RmDir = "rmdir", SymLink = "symlink",
    Rename = "rename", Link = "link", Open = "open", Create = "create", Read = "read", Write = "write",
    Flush = "flush", Release = "release", FSync = "fsync", OpenDir = "opendir", ReadDir = "readdir",
    ReadDirPlus = "readdirplus", FSyncDir = "fsyncdir", StatFs = "statfs", SetXAttr = "setxattr",
    GetXAttr = "getxattr", ListXAttr = "listxattr", RemoveXAttr = "removexattr", FAllocate = "fallocate",
    LSeek = "lseek", CopyFileRange = "copy_file_range", IoCtl = "ioctl",
}

const OPERATIONS: usize = Operation::ALL.len();

/// Monotonic counts since the mount; each is read and written without ordering because only sums are shown.
#[derive(Debug)]
pub struct Counters {
    requests: [AtomicU64; OPERATIONS],
    errors: [AtomicU64; OPERATIONS],
    /// Bytes the daemon itself answered reads with; passed-through reads are not seen by it.
    pub served_read_bytes: AtomicU64,
    /// Bytes the daemon itself took from writes.
    pub served_write_bytes: AtomicU64,
    /// Opens answered with kernel passthrough.
    pub passthrough_opens: AtomicU64,
    /// Opens answered with the served path.
    pub served_opens: AtomicU64,
    /// Reads that had to gather several slices into one reply.
    pub gathered_reads: AtomicU64,
}

impl Default for Counters {
    fn default() -> Counters {
        Counters {
            requests: std::array::from_fn(|_| AtomicU64::new(0)),
            errors: std::array::from_fn(|_| AtomicU64::new(0)),
            served_read_bytes: AtomicU64::new(0),
            served_write_bytes: AtomicU64::new(0),
            passthrough_opens: AtomicU64::new(0),
            served_opens: AtomicU64::new(0),
            gathered_reads: AtomicU64::new(0),
        }
    }
}

impl Counters {
    /// Counts a request; errors that are ordinary answers (`ENOENT` of a lookup) count too.
    pub fn count<T, E>(&self, operation: Operation, result: &Result<T, E>) {
        self.requests[operation as usize].fetch_add(1, Ordering::Relaxed);
        if result.is_err() {
            self.errors[operation as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Requests and errors of one operation so far.
    pub fn of(&self, operation: Operation) -> (u64, u64) {
        (
            self.requests[operation as usize].load(Ordering::Relaxed),
            self.errors[operation as usize].load(Ordering::Relaxed),
        )
    }
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
