//! Writing a region's file from its start to its end, past the page cache, with the sums made on the way.
//!
//! ```text
//! push -> a run of 1 MiB -> writer threads: sums, O_DIRECT -> the file
//! ```
//!
//! For writers that bring all bytes in order (imports): the bytes are touched once, the drive works while the next ones come, and nothing
//! has to be read back for its sums. Anything else (a gap, a second write of the same bytes) ends the stream, and the file is written
//! like any other from there on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvme::{Arena, ArenaOptions, Buffer, Device, DeviceOptions, FileDevice};

use super::FileDraft;
use crate::content::Draft;
use crate::error::{Error, ErrorKind, Result};
use crate::types::NodeId;
use crate::write_behind::{RunOwner, RunWrite, WriteBehind};

/// Bytes of a run. A multiple of every chunk size up to it; larger chunks make larger runs.
const RUN_BYTES: usize = 1 << 20;
/// Runs gathered, waiting or under way, over all streams of a pool.
const RUNS: usize = 24;
const THREADS: usize = 2;
/// How far the file's length runs ahead where nobody said how long it will be: a write that extends a file excludes all others.
const AHEAD: u64 = 256 << 20;
/// Longer than any operation's own deadline.
const WAIT: Duration = Duration::from_secs(120);

/// Threads and memory for streams; there only while somebody streams.
#[derive(Debug)]
pub(crate) struct StreamWriters {
    writes: WriteBehind,
    arena: Arena,
}

impl StreamWriters {
    pub fn new() -> Result<StreamWriters> {
        // Huge pages: a run is one segment then, not 256, and neighbours merge on their way to the drive.
        let arena =
            Arena::new(RUNS * RUN_BYTES, ArenaOptions { prefault: false, ..ArenaOptions::default() })?;
        let writes = WriteBehind::new(THREADS, RUNS * RUN_BYTES, Some(&arena))?;
        Ok(StreamWriters { writes, arena })
    }
}

/// One file being written so.
#[derive(Debug)]
pub(crate) struct FileStream {
    writers: Arc<StreamWriters>,
    runs: Arc<Runs>,
    device: Arc<dyn Device>,
    chunk: usize,
    run: usize,
    /// The file reaches at least so far.
    len: u64,
    /// Where `buffer` goes: all before is handed over.
    start: u64,
    buffer: Option<Buffer>,
    filled: usize,
}

/// What became of the runs.
#[derive(Debug)]
struct Runs {
    node: NodeId,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    in_flight: usize,
    sums: Vec<u32>,
    failed: Option<Error>,
}

impl Runs {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until none is under way.
    fn wait(&self) -> Result<MutexGuard<'_, State>> {
        let deadline = Instant::now() + WAIT;
        let mut state = self.lock();
        while state.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!("{} writes of node {} did not come back", state.in_flight, self.node),
                ));
            }
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        Ok(state)
    }
}

impl RunOwner for Runs {
    fn written(&self, first_chunk: u64, sums: Vec<u32>, result: Result<()>) {
        let mut state = self.lock();
        let first = first_chunk as usize;
        if state.sums.len() < first + sums.len() {
            state.sums.resize(first + sums.len(), 0);
        }
        state.sums[first..first + sums.len()].copy_from_slice(&sums);
        if let Err(error) = result {
            tracing::error!(node = self.node, error = %error.chain(), "a write failed");
            state.failed.get_or_insert(error);
        }
        state.in_flight -= 1;
        drop(state);
        self.changed.notify_all();
    }

    /// A run is dirty only when it is handed over.
    fn hand_over(self: Arc<Self>) {}
}

impl FileStream {
    /// A stream from the start of `draft`'s file, which nobody else writes. `None` where the file system knows no O_DIRECT. `size_hint`: how
    /// long it will be.
    pub fn new(
        draft: &FileDraft,
        writers: Arc<StreamWriters>,
        size_hint: Option<u64>,
    ) -> Result<Option<FileStream>> {
        let path = draft.directory.file_path(draft.number);
        let Ok(device) = FileDevice::open(&path, &DeviceOptions { direct: true, read_only: false }) else {
            return Ok(None);
        };
        let chunk = draft.chunk_size as usize;
        let mut stream = FileStream {
            writers,
            runs: Arc::new(Runs { node: draft.node, state: Mutex::default(), changed: Condvar::new() }),
            device: Arc::new(device),
            chunk,
            run: RUN_BYTES.next_multiple_of(chunk),
            len: 0,
            start: 0,
            buffer: None,
            filled: 0,
        };
        if let Some(size) = size_hint {
            stream.reach(draft, size)?;
        }
        Ok(Some(stream))
    }

    /// Where the next byte goes.
    pub fn position(&self) -> u64 {
        self.start + self.filled as u64
    }

    /// Makes the file at least `len` bytes long.
    fn reach(&mut self, draft: &FileDraft, len: u64) -> Result<()> {
        if len > self.len {
            draft.set_len(len)?;
            self.len = len;
        }
        Ok(())
    }

    /// Sees to it that a quota has room for the next `len` bytes.
    pub fn reserve(&self, draft: &FileDraft, len: u64) -> Result<()> {
        draft.charge_write(self.position(), len)
    }

    /// Takes the next bytes, which were [reserved](Self::reserve). Errors of earlier ones may show here.
    pub fn push(&mut self, draft: &FileDraft, mut data: &[u8]) -> Result<()> {
        self.check()?;
        while !data.is_empty() {
            let mut buffer = match self.buffer.take() {
                Some(buffer) => buffer,
                None => self.writers.arena.alloc(self.run).map_or_else(|| Buffer::heap(self.run), Ok)?,
            };
            let count = data.len().min(self.run - self.filled);
            buffer[self.filled..self.filled + count].copy_from_slice(&data[..count]);
            self.filled += count;
            data = &data[count..];
            if self.filled < self.run {
                self.buffer = Some(buffer);
            } else {
                self.send(draft, buffer)?;
            }
        }
        Ok(())
    }

    /// Hands the gathered bytes over. A last part that is no whole block is filled up with zeros, which the file's length cuts off later.
    fn send(&mut self, draft: &FileDraft, mut buffer: Buffer) -> Result<()> {
        let valid = std::mem::take(&mut self.filled);
        let len = valid.next_multiple_of(self.device.lba_size() as usize);
        buffer[valid..len].fill(0);
        let end = self.start + len as u64;
        if end > self.len {
            let ahead = if valid == self.run { AHEAD } else { 0 };
            self.reach(draft, end + ahead)?;
        }
        let permit = loop {
            match self.writers.writes.try_permit(len) {
                Some(permit) => break permit,
                None => self.writers.writes.wait_for_room(len)?,
            }
        };
        self.runs.lock().in_flight += 1;
        self.writers.writes.submit(RunWrite {
            owner: self.runs.clone(),
            first_chunk: self.start / self.chunk as u64,
            chunk_size: self.chunk,
            device: self.device.clone(),
            offset: self.start,
            buffer,
            len,
            valid,
            permit,
        });
        self.start += valid as u64;
        Ok(())
    }

    fn check(&self) -> Result<()> {
        match &self.runs.lock().failed {
            Some(error) => Err(Error::new(error.kind(), error.chain())),
            None => Ok(()),
        }
    }

    /// Waits for what was handed over: that many bytes from the start are in the file. What is gathered stays so.
    pub fn settle(&mut self) -> Result<u64> {
        drop(self.runs.wait()?);
        self.check()?;
        Ok(self.start)
    }

    /// Writes what is gathered and waits for all of it. Afterwards [`position`](Self::position) bytes are in the file, which may be longer, and
    /// their sums are returned. A part of a block ends the stream: whoever goes on writes the file itself.
    pub fn finish(mut self, draft: &FileDraft) -> Result<Vec<u32>> {
        if let Some(buffer) = self.buffer.take() {
            self.send(draft, buffer)?;
        }
        let mut state = self.runs.wait()?;
        match state.failed.take() {
            Some(error) => Err(error),
            None => Ok(std::mem::take(&mut state.sums)),
        }
    }
}
