//! Counts of what the mount did, for `.nvtier/stats.json` and `.nvtier/metrics`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

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

/// Requests whose time is taken: those that wait for the drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Timed {
    Read,
    Write,
    FSync,
}

impl Timed {
    /// All of them, in the order of the enum.
    pub const ALL: &'static [Timed] = &[Timed::Read, Timed::Write, Timed::FSync];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Timed::Read => "read",
            Timed::Write => "write",
            Timed::FSync => "fsync",
        }
    }
}

/// Buckets of times: the first ends at 8 us, each next one at twice the one before, the last at a second.
const BUCKETS: usize = 18;
const FIRST_NANOS: u64 = 8_000;

#[derive(Debug, Default)]
struct Clock {
    in_flight: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
    longer: AtomicU64,
    sum_nanos: AtomicU64,
}

/// A request that is being served.
#[derive(Debug)]
pub struct Running<'a> {
    clock: &'a Clock,
    start: Instant,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let nanos = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let bucket = (0..BUCKETS).find(|index| nanos <= FIRST_NANOS << index);
        let count = bucket.map_or(&self.clock.longer, |index| &self.clock.buckets[index]);
        add(count, 1);
        add(&self.clock.sum_nanos, nanos);
        self.clock.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long requests of a kind took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// Being served now.
    pub in_flight: u64,
    /// All that were served.
    pub count: u64,
    /// By time; see [`Times::limits_seconds`].
    pub buckets: [u64; BUCKETS],
    /// Time of all.
    pub sum_nanos: u64,
}

impl Times {
    /// Upper ends of the buckets.
    pub fn limits_seconds(&self) -> impl Iterator<Item = f64> + use<> {
        (0..BUCKETS).map(|index| (FIRST_NANOS << index) as f64 / 1e9)
    }

    /// For stats.json.
    pub(crate) fn json(&self) -> Value {
        json!({
            "in_flight": self.in_flight,
            "count": self.count,
            "sum_nanos": self.sum_nanos,
            "bucket_limits_seconds": self.limits_seconds().collect::<Vec<_>>(),
            "buckets": self.buckets,
        })
    }
}

/// Monotonic counts since the mount; each is read and written without ordering because only sums are shown.
#[derive(Debug)]
pub struct Counters {
    requests: [AtomicU64; OPERATIONS],
    errors: [AtomicU64; OPERATIONS],
    times: [Clock; Timed::ALL.len()],
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
            times: Default::default(),
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

    /// The clock of a request that begins now; it stops when what is returned is dropped.
    pub fn time(&self, what: Timed) -> Running<'_> {
        let clock = &self.times[what as usize];
        clock.in_flight.fetch_add(1, Ordering::Relaxed);
        Running { clock, start: Instant::now() }
    }

    /// How long requests took so far.
    pub fn times(&self, what: Timed) -> Times {
        let clock = &self.times[what as usize];
        let buckets = std::array::from_fn(|index| clock.buckets[index].load(Ordering::Relaxed));
        let longer = clock.longer.load(Ordering::Relaxed);
        Times {
            in_flight: clock.in_flight.load(Ordering::Relaxed),
            count: buckets.iter().sum::<u64>() + longer,
            buckets,
            sum_nanos: clock.sum_nanos.load(Ordering::Relaxed),
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
