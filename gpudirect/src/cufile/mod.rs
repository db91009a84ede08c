//! NVIDIA's cuFile (GPUDirect Storage): reads from a drive straight into device memory, where kernel, driver, file system and
//! drive allow it.
//!
//! ```text
//! CuFile     what is asked of libcufile, as a trait: `library` is the real one, `fake` a simulated one for tests
//! staging    registered device memory that reads land in; parts are copied on to their places on the device
//! selftest   reads into memory that holds the complement of what must come, compared byte for byte
//! ```
//!
//! cuFile has a compatibility mode: `pread` into host memory and a copy. That is no GPUDirect, it is slower than our own
//! ring, and it is refused here wherever it can be told ([`Properties::compat_allowed`], and the self-test).
//!
//! **What cuFile cannot do.** A read that was started cannot be given up: cancelling and deadlines take effect between reads
//! of one chunk. The bytes never pass the host, so no checksum is compared.

pub mod fake;
mod library;
mod names;
mod read;
mod selftest;
mod staging;

use std::fmt;
use std::fs::File;

use crate::error::Result;

pub use library::{Library, open};
pub use names::describe;
pub(crate) use read::{Files, read};
pub(crate) use selftest::{FILE_MIN, Subject, self_test};
pub use selftest::{SelfTest, Verdict};
pub use staging::Staging;

/// What the driver says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Properties {
    /// Version of the library, `1.14`; empty where it cannot say.
    pub library: String,
    /// Version of the kernel module nvidia-fs that it talks to; 0.0 where there is none.
    pub nvidia_fs: (u32, u32),
    /// NVMe drives are served by nvidia-fs.
    pub nvme: bool,
    /// NVMe drives are served by the kernel's PCI peer-to-peer DMA.
    pub nvme_p2p: bool,
    /// What cannot be read directly would be read through host memory, without a word.
    pub compat_allowed: bool,
    /// Bytes of the largest direct transfer.
    pub max_direct_io_bytes: u64,
    /// Bytes of device memory that may be registered.
    pub max_pinned_bytes: u64,
}

/// Reads by the way that the library says they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadCounts {
    /// All.
    pub total: u64,
    /// By the kernel's peer-to-peer DMA.
    pub peer_to_peer: u64,
    /// By nvidia-fs.
    pub nvidia_fs: u64,
    /// By `pread`: compatibility mode.
    pub posix: u64,
}

/// libcufile, opened.
pub trait CuFile: Send + Sync + fmt::Debug {
    /// What the driver says of itself.
    fn properties(&self) -> Result<Properties>;
    /// Makes a file known; it is forgotten when the handle is dropped.
    fn open_file(&self, file: File, name: &str) -> Result<Box<dyn FileHandle>>;
    /// Makes device memory known. Who calls keeps it allocated until [`deregister`](Self::deregister).
    fn register(&self, address: u64, len: u64) -> Result<()>;
    /// Takes [`register`](Self::register) back. No read may use the memory any more.
    fn deregister(&self, address: u64) -> Result<()>;
    /// Starts or stops counting reads, which may cost a little.
    fn count_reads(&self, on: bool);
    /// The reads that were counted, of all files and devices of this process; `None` where this release cannot tell.
    fn counted(&self) -> Option<ReadCounts>;
}

/// A file that cuFile knows. Calls wait until the transfer has ended; several threads may call at once.
pub trait FileHandle: Send + Sync + fmt::Debug {
    /// Reads `len` bytes at `offset` of the file to byte `at` of the memory that was registered at `base`. Fewer bytes than asked
    /// for may come; 0 at the end of the file.
    fn read(&self, base: u64, at: u64, len: usize, offset: u64) -> Result<usize>;
    /// The other way round.
    fn write(&self, base: u64, at: u64, len: usize, offset: u64) -> Result<usize>;
}

/// Settings of reads by cuFile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CuFileOptions {
    /// Bytes of one read. Default: 8 MiB.
    pub chunk: usize,
    /// Threads, each with one read in flight. Default: 8. Chunk times threads is taken on the device meanwhile.
    pub threads: u32,
}

impl Default for CuFileOptions {
    fn default() -> CuFileOptions {
        CuFileOptions { chunk: 8 << 20, threads: 8 }
    }
}
