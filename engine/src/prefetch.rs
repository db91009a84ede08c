//! Prefetch: explicit lists of ranges, and read-ahead of sequential readers.
//!
//! A job is a list of ranges in the order they will be wanted. Background threads take units of 1 MiB from the job that is
//! first by priority, then by deadline, then by age; several threads serve one job. Extents go into the RAM tier (verified);
//! a region that is a file of its own goes into the page cache by `posix_fadvise(2)`. What was asked for by list stays there for any
//! number of readers; read-ahead is for the one that it is ahead of, and brings nothing that this one asked for by itself meanwhile. Dropping the ticket cancels what was not
//! begun; units whose deadline passed are skipped, since they would only push out what is wanted now.
//!
//! A job brings at most three quarters of the RAM tier's budget: more would push its own first ranges out before they are read.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::region_read::{RegionReader, Source};
use crate::types::NodeId;

/// What a thread brings at a time of a job: little, so that threads share jobs, and a program's own reads find their place between.
const UNIT_BYTES: u64 = 1 << 20;
/// Read-ahead jobs that wait at most; further ones are dropped, since readers are faster then than read-ahead.
const READ_AHEAD_JOBS: usize = 64;

/// Which jobs go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// When nothing else is to do.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Before others: wanted at once.
    High,
}

/// A job under way. Dropping it cancels what was not begun.
#[derive(Debug)]
#[must_use = "dropping the ticket cancels the prefetch"]
pub struct PrefetchTicket {
    job: Arc<Job>,
}

impl PrefetchTicket {
    /// Bytes that were brought or found there already.
    pub fn done_bytes(&self) -> u64 {
        lock(&self.job.state).done_bytes
    }

    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        lock(&self.job.state).is_done()
    }

    /// Waits until nothing is left to do, or the deadline. The first error of a unit, if there was one; the reader will meet it too.
    pub fn wait(&self, deadline: Instant) -> Result<bool> {
        let mut state = lock(&self.job.state);
        while !state.is_done() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return Ok(false) };
            state = match self.job.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        state.error.take().map_or(Ok(true), Err)
    }

    /// Lets it go on without a ticket.
    pub fn detach(self) {
        self.job.detached.store(true, Relaxed);
    }
}

impl Drop for PrefetchTicket {
    fn drop(&mut self) {
        if !self.job.detached.load(Relaxed) {
            self.job.cancelled.store(true, Relaxed);
        }
    }
}

#[derive(Debug)]
struct Job {
    what: What,
    priority: Priority,
    deadline: Option<Instant>,
    state: Mutex<JobState>,
    changed: Condvar,
    cancelled: AtomicBool,
    detached: AtomicBool,
}

#[derive(Debug)]
enum What {
    /// `ahead_of`: read-ahead for one reader, and where what that one asked for ends. Without, they stay for any number.
    Extents {
        node: NodeId,
        layout: Arc<Layout>,
        ahead_of: Option<Arc<AtomicU64>>,
    },
    File(Arc<File>),
}

impl What {
    /// What is before this byte needs nobody to bring it: its reader does so, or has it already.
    fn asked(&self) -> u64 {
        match self {
            What::Extents { ahead_of: Some(asked), .. } => asked.load(Relaxed),
            _ => 0,
        }
    }
}

#[derive(Debug)]
struct JobState {
    ranges: VecDeque<Range<u64>>,
    /// Bytes that may still be brought.
    allowance: u64,
    active: usize,
    done_bytes: u64,
    error: Option<Error>,
}

impl JobState {
    fn is_done(&self) -> bool {
        self.ranges.is_empty() && self.active == 0
    }

    fn next_unit(&mut self, what: &What) -> Option<Range<u64>> {
        if self.allowance == 0 {
            self.ranges.clear();
        }
        let asked = what.asked();
        while self.ranges.front().is_some_and(|range| range.end <= asked) {
            self.ranges.pop_front();
        }
        let range = self.ranges.front_mut()?;
        range.start = range.start.max(asked);
        let end = range.end.min((range.start / UNIT_BYTES + 1) * UNIT_BYTES);
        let unit = range.start..end;
        range.start = end;
        if range.is_empty() {
            self.ranges.pop_front();
        }
        self.allowance = self.allowance.saturating_sub(unit.end - unit.start);
        self.active += 1;
        Some(unit)
    }
}

struct Queued {
    job: Arc<Job>,
    age: u64,
}

impl Ord for Queued {
    /// The greatest goes first.
    fn cmp(&self, other: &Queued) -> Ordering {
        let by_deadline = match (self.job.deadline, other.job.deadline) {
            (Some(mine), Some(theirs)) => theirs.cmp(&mine),
            (Some(_), None) => Ordering::Greater,
            (None, Some(_)) => Ordering::Less,
            (None, None) => Ordering::Equal,
        };
        self.job.priority.cmp(&other.job.priority).then(by_deadline).then(other.age.cmp(&self.age))
    }
}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Queued {
    fn eq(&self, other: &Queued) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Queued {}

#[derive(Default)]
struct Jobs {
    heap: BinaryHeap<Queued>,
    ages: u64,
    stop: bool,
}

struct Shared {
    jobs: Mutex<Jobs>,
    work: Condvar,
    reader: Option<Arc<RegionReader>>,
}

/// The threads; see the module documentation.
pub struct Prefetcher {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Prefetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefetcher").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Prefetcher {
    /// Starts the threads. Without a `reader` (a pool of files) only files can be prefetched.
    pub fn new(threads: usize, reader: Option<Arc<RegionReader>>) -> Result<Prefetcher> {
        let shared = Arc::new(Shared { jobs: Mutex::default(), work: Condvar::new(), reader });
        let mut prefetcher = Prefetcher { shared: shared.clone(), threads: Vec::new() };
        for index in 0..threads.max(1) {
            let shared = shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("nvtier-fetch-{index}"))
                .spawn(move || {
                    if index == 0
                        && let Some(reader) = &shared.reader
                    {
                        reader.tier().populate();
                    }
                    worker(&shared)
                })
                .map_err(|e| Error::io("starting a prefetch thread", e))?;
            prefetcher.threads.push(thread);
        }
        Ok(prefetcher)
    }

    /// Brings ranges (offset, length) of committed content into the RAM tier, in this order.
    pub fn extents(
        &self,
        node: NodeId,
        layout: &Arc<Layout>,
        ranges: &[(u64, u64)],
        priority: Priority,
        deadline: Option<Instant>,
    ) -> PrefetchTicket {
        let what = What::Extents { node, layout: layout.clone(), ahead_of: None };
        self.start(what, ranges, layout.size(), self.allowance(), priority, deadline)
    }

    /// Bytes that a job may bring into the RAM tier.
    fn allowance(&self) -> u64 {
        self.shared.reader.as_ref().map_or(0, |reader| reader.tier().budget_bytes() as u64) / 4 * 3
    }

    /// Brings ranges (offset, length) of a file into the page cache, in this order.
    pub fn file(
        &self,
        file: &Arc<File>,
        ranges: &[(u64, u64)],
        priority: Priority,
        deadline: Option<Instant>,
    ) -> PrefetchTicket {
        let size = file.metadata().map_or(0, |meta| meta.len());
        self.start(What::File(file.clone()), ranges, size, u64::MAX, priority, deadline)
    }

    /// As [`extents`](Self::extents), for a sequential reader: at once, without a ticket, dropped when too many wait. `asked`: where what it asked for ends, as a
    /// byte of the region, from now on.
    pub(crate) fn read_ahead(
        &self,
        node: NodeId,
        layout: &Arc<Layout>,
        range: Range<u64>,
        asked: Arc<AtomicU64>,
    ) {
        if lock(&self.shared.jobs).heap.len() < READ_AHEAD_JOBS {
            let ranges = [(range.start, range.end - range.start)];
            let what = What::Extents { node, layout: layout.clone(), ahead_of: Some(asked) };
            let size = layout.size();
            self.start(what, &ranges, size, self.allowance(), Priority::High, None).detach();
        }
    }

    fn start(
        &self,
        what: What,
        ranges: &[(u64, u64)],
        size: u64,
        allowance: u64,
        priority: Priority,
        deadline: Option<Instant>,
    ) -> PrefetchTicket {
        let ranges: VecDeque<_> = ranges
            .iter()
            .map(|(offset, len)| (*offset).min(size)..offset.saturating_add(*len).min(size))
            .filter(|range| !range.is_empty())
            .collect();
        let job = Arc::new(Job {
            what,
            priority,
            deadline,
            state: Mutex::new(JobState { ranges, allowance, active: 0, done_bytes: 0, error: None }),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            detached: AtomicBool::new(false),
        });
        if !lock(&job.state).is_done() {
            let mut jobs = lock(&self.shared.jobs);
            jobs.ages += 1;
            let age = jobs.ages;
            jobs.heap.push(Queued { job: job.clone(), age });
            drop(jobs);
            self.shared.work.notify_one();
        }
        PrefetchTicket { job }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        lock(&self.shared.jobs).stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a prefetch thread panicked");
            }
        }
    }
}

fn worker(shared: &Shared) {
    loop {
        let queued = {
            let mut jobs = lock(&shared.jobs);
            loop {
                if jobs.stop {
                    // Whoever waits on a ticket must not wait for ever.
                    for queued in jobs.heap.drain() {
                        lock(&queued.job.state).ranges.clear();
                        queued.job.changed.notify_all();
                    }
                    return;
                }
                if let Some(queued) = jobs.heap.pop() {
                    break queued;
                }
                jobs = match shared.work.wait(jobs) {
                    Ok(jobs) => jobs,
                    Err(poisoned) => poisoned.into_inner(),
                };
            }
        };
        let job = queued.job.clone();
        let unit = {
            let mut state = lock(&job.state);
            if job.cancelled.load(Relaxed) || job.deadline.is_some_and(|deadline| Instant::now() >= deadline)
            {
                state.ranges.clear();
            }
            let unit = state.next_unit(&job.what);
            if !state.ranges.is_empty() {
                // For the next thread, which may begin it while this one reads.
                lock(&shared.jobs).heap.push(queued);
                shared.work.notify_one();
            }
            unit
        };
        let Some(unit) = unit else {
            job.changed.notify_all();
            continue;
        };
        let done = fetch(shared, &job.what, unit.clone());
        let mut state = lock(&job.state);
        state.active -= 1;
        match done {
            Ok(()) => state.done_bytes += unit.end - unit.start,
            Err(error) => {
                // The reader will meet it and report it; here it only ends the job.
                tracing::debug!(error = %error.chain(), "prefetch failed");
                state.ranges.clear();
                state.error.get_or_insert(error);
            }
        }
        drop(state);
        job.changed.notify_all();
    }
}

fn fetch(shared: &Shared, what: &What, unit: Range<u64>) -> Result<()> {
    match what {
        What::Extents { node, layout, ahead_of } => match &shared.reader {
            Some(reader) => {
                reader.prefetch(Source { node: *node, layout }, unit, ahead_of.is_none()).map(drop)
            }
            None => Ok(()),
        },
        What::File(file) => {
            let len = std::num::NonZeroU64::new(unit.end - unit.start);
            rustix::fs::fadvise(&**file, unit.start, len, rustix::fs::Advice::WillNeed)
                .map_err(|e| Error::io("posix_fadvise", e.into()))
        }
    }
}
