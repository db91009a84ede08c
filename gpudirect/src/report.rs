//! What a load or save did, in numbers, and what kept it from being faster.

use serde::Serialize;

use crate::autotune::Origin;
use crate::driver::DeviceInfo;
use crate::lane::{LaneOptions, Transfer};

/// A way that was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotTaken {
    /// Its name.
    pub path: &'static str,
    /// Why.
    pub why: String,
}

/// Settings of the bounce path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// Bytes of one read.
    pub chunk: usize,
    /// Reads in flight.
    pub depth: u32,
    /// Threads that read what is in memory already.
    pub threads: u32,
    /// Where these come from.
    pub origin: Origin,
}

impl From<&LaneOptions> for Settings {
    fn from(options: &LaneOptions) -> Settings {
        let LaneOptions { chunk, depth, threads, origin, .. } = *options;
        Settings { chunk, depth, threads, origin }
    }
}

/// What a load did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where to.
    pub device: DeviceInfo,
    /// Which way the bytes went: `bounce` (drive, pinned memory, device), or one of cuFile's ([`crate::paths`]).
    pub path: &'static str,
    /// Better ways, and why they were not taken.
    pub not_taken: Vec<NotTaken>,
    /// Files or regions.
    pub sources: usize,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
    /// Bytes that were read for them: aligned, with gaps.
    pub read_bytes: u64,
    /// Choosing the way, with its self-test where one was made now, seconds; before the load, and not in `seconds`.
    pub path_seconds: f64,
    /// Bytes that a pool's RAM tier had, copied from there.
    pub tier_bytes: u64,
    /// Bytes that the device read from the page cache itself.
    pub mapped_bytes: u64,
    /// From the first look at the plan to the last byte on the device, seconds. Opening files and reading headers is before.
    pub seconds: f64,
    /// `bytes` over `seconds`, 10^9 bytes.
    pub gb_per_second: f64,
    /// Taking and pinning the ring, seconds; before the load, and once for all loads of a lane.
    pub setup_seconds: f64,
    /// While at least one read was in flight.
    pub read_busy_seconds: f64,
    /// While at least one batch of copies was.
    pub copy_busy_seconds: f64,
    /// The thread slept until a read ended.
    pub read_wait_seconds: f64,
    /// The thread slept until a copy ended.
    pub copy_wait_seconds: f64,
    /// Comparing checksums.
    pub verify_seconds: f64,
    /// Processor time of the whole process meanwhile, seconds.
    pub cpu_seconds: f64,
    /// Settings of the bounce path, and where they come from.
    pub settings: Settings,
    /// What bound: `source`, `device` (its bus), or `cpu`.
    pub bound_by: &'static str,
    /// Reads, batches of copies, copies.
    pub reads: u64,
    /// Batches of copies.
    pub batches: u64,
    /// Copies in them.
    pub copies: u64,
    /// Pinned memory, at its most.
    pub pinned_bytes: u64,
    /// Memory taken on the device.
    pub device_bytes: u64,
    /// Of that, more than the tensors' own bytes.
    pub device_extra_bytes: u64,
    /// Memory that was taken there besides while cuFile read.
    pub staging_bytes: u64,
    /// Sources that were read from the page cache (or tmpfs), not from a drive.
    pub cached_sources: usize,
    /// Sources whose checksums were compared; none by cuFile, whose bytes never pass the host.
    pub verified_sources: usize,
    /// `io_uring`, or `threads`; `none` where nothing had to be read.
    pub backend: String,
    /// Whether the ring is registered with io_uring.
    pub fixed_buffers: bool,
    /// What was slower than it might be, for people.
    pub notes: Vec<String>,
}

/// What a save did.
#[derive(Clone, Debug, Serialize)]
pub struct SaveReport {
    /// Where from.
    pub device: DeviceInfo,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// From the first copy until the file was flushed and had its name, seconds.
    pub seconds: f64,
    /// `bytes` over `seconds`, 10^9 bytes.
    pub gb_per_second: f64,
    /// Of `seconds`, waiting for the drive to make it durable.
    pub flush_seconds: f64,
    /// While at least one write was in flight.
    pub write_busy_seconds: f64,
    /// While at least one batch of copies was.
    pub copy_busy_seconds: f64,
    /// Whether it was written past the page cache.
    pub direct: bool,
    /// `io_uring`, or `threads`.
    pub backend: String,
    /// What was slower than it might be, for people.
    pub notes: Vec<String>,
}

/// What kept a transfer from being faster: whatever the thread waited for, or its own work.
pub(crate) fn bound_by(transfer: &Transfer) -> &'static str {
    let waited = transfer.io_wait + transfer.copy_wait;
    if transfer.elapsed > 2 * waited {
        "cpu"
    } else if transfer.copy_wait > transfer.io_wait {
        "device"
    } else {
        "source"
    }
}
