//! The engines: what `ioengine=` chooses.
//!
//! An engine owns one buffer for each *slot* (0..iodepth). The worker fills a slot's buffer, queues the slot, commits,
//! and reaps slots; so a buffer is never touched while the kernel has it, and nothing is allocated in the loop.

mod cufile;
pub(crate) mod device;
mod mapped;
mod null;
mod pool;
mod pread;
mod uring;

use std::path::PathBuf;
use std::sync::Arc;

pub use pool::PoolSource;

use crate::error::{Error, ErrorKind, Result};
use crate::settings::{Direction, EngineKind, Settings};

/// One transfer.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Direction.
    pub direction: Direction,
    /// Index of the file among the job's.
    pub file: u32,
    /// Bytes into the file.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// A finished transfer.
#[derive(Debug)]
pub struct Done {
    /// Its slot.
    pub slot: u32,
    /// Bytes moved, or what went wrong.
    pub result: Result<u32>,
}

/// What became of a queued transfer (fio's FIO_Q_QUEUED and FIO_Q_COMPLETED).
#[derive(Debug)]
pub enum Queued {
    /// It is on its way; `reap` will yield it.
    Started,
    /// It is done.
    Finished(Result<u32>),
}

/// Moves bytes between slots' buffers and files.
pub trait IoEngine {
    /// The slot's buffer, `max_block_bytes` long. Only between reap and queue.
    fn buffer(&mut self, slot: u32) -> &mut [u8];
    /// Takes the transfer; asynchronous engines start it at the next `commit`.
    fn queue(&mut self, slot: u32, transfer: Transfer) -> Result<Queued>;
    /// Starts everything queued since the last commit.
    fn commit(&mut self) -> Result<()>;
    /// Waits until at least `min` transfers are done (0: takes what there is) and appends all that are.
    fn reap(&mut self, min: usize, done: &mut Vec<Done>) -> Result<()>;
    /// Both of the above with one system call where the engine can.
    fn commit_and_reap(&mut self, min: usize, done: &mut Vec<Done>) -> Result<()> {
        self.commit()?;
        self.reap(min, done)
    }
    /// Makes what was written durable; nothing is in flight. `data_only`: fdatasync.
    fn sync(&mut self, data_only: bool) -> Result<()>;
    /// Whether transfers finish inside `queue`, so that more than one in flight cannot be.
    fn is_synchronous(&self) -> bool;
    /// What is worth saying about how it works here, such as a fallback.
    fn note(&self) -> Option<String> {
        None
    }
}

/// The files of a job, laid out and ready to be opened by each worker.
#[derive(Clone, Debug)]
pub struct Files {
    /// Paths, or names of regions for `ioengine=pool`.
    pub paths: Vec<PathBuf>,
    /// The pool, opened once for all workers.
    pub pool: Option<Arc<PoolSource>>,
}

/// Opens the engine that `settings` names, for one worker.
pub fn open(settings: &Settings, files: &Files) -> Result<Box<dyn IoEngine>> {
    Ok(match settings.engine {
        EngineKind::Null => Box::new(null::NullEngine::new(settings)),
        EngineKind::Pread => Box::new(pread::PreadEngine::open(settings, files)?),
        EngineKind::Mmap => Box::new(mapped::MmapEngine::open(settings, files)?),
        EngineKind::IoUring | EngineKind::IoUringCmd => Box::new(uring::UringEngine::open(settings, files)?),
        EngineKind::Bounce | EngineKind::VramWrite => Box::new(device::DeviceEngine::open(settings, files)?),
        EngineKind::CuFile => Box::new(cufile::CuFileEngine::open(settings, files)?),
        EngineKind::Mount if settings.iodepth > 1 => Box::new(uring::UringEngine::open(settings, files)?),
        EngineKind::Mount => Box::new(pread::PreadEngine::open(settings, files)?),
        EngineKind::Pool => {
            let pool = files
                .pool
                .clone()
                .ok_or_else(|| Error::new(ErrorKind::Usage, "ioengine=pool without a pool"))?;
            Box::new(pool::PoolEngine::open(settings, files, pool)?)
        }
    })
}

/// A heap buffer a slot, page aligned so that O_DIRECT takes it.
fn slot_buffers(settings: &Settings, slots: u32) -> Result<Vec<nvme::Buffer>> {
    let bytes = settings.max_block_bytes() as usize;
    (0..slots)
        .map(|_| {
            nvme::Buffer::heap(bytes).map_err(|error| {
                Error::nvme(format!("cannot allocate {slots} buffers of {bytes} bytes"), error)
            })
        })
        .collect()
}
