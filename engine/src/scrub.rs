//! The background scrub: reads every region and compares its sums, slowly and out of the way.
//!
//! One thread reads a step at a time, past all caches, at most so fast as it was told. It waits while others read or write through
//! the pool (what the kernel does on files that were passed through is not seen), but never for good: under constant load it still
//! makes a step every few seconds. Where it is, and what the last pass found, is kept in the catalog as an attribute of the root, so that
//! a pass goes on after a restart.
//!
//! What it finds is logged, counted, and listed in [`ScrubStat`]; it changes nothing. `nvtier verify --repair` mends.

use std::ffi::OsStr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use nvme::Buffer;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::pool::live::{Current, Live};
use crate::pool::stored::Stored;
use crate::pool::{Shared, lock, read, write};
use crate::types::{Access, NodeId, ROOT, Timestamp, XattrSet};
use crate::verify::{bad_chunk, check_piece, confirmed, pieces_of, regions};

/// Attributes of this start are the engine's own: nobody else sees or sets them.
pub(crate) const OWN_XATTRS: &str = "trusted.nvtier.";
const XATTR: &str = "trusted.nvtier.scrub";
/// Read at a time, where chunks are not larger.
const STEP: u64 = 1 << 20;
/// Others are out of the way when nothing was read or written for so long.
const QUIET: Duration = Duration::from_millis(100);
/// Others are waited for at most so long, a step.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the place is noted while a pass goes on.
const NOTE_EVERY: Duration = Duration::from_secs(60);
/// Findings that are listed.
const LISTED: usize = 50;

/// How a pool is scrubbed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubOptions {
    /// Bytes a second at most.
    pub rate: u64,
    /// From the start of one pass to the start of the next, at least. Default: a day.
    pub every: Duration,
}

impl ScrubOptions {
    /// At most `rate` bytes a second, once a day.
    pub fn new(rate: u64) -> ScrubOptions {
        ScrubOptions { rate, every: Duration::from_secs(24 * 3600) }
    }
}

/// How far the scrub is, and what it found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScrubStat {
    /// The pool's owner scrubs it.
    pub running: bool,
    /// Bytes a second at most.
    pub rate: u64,
    /// It waits for others at the moment.
    pub waiting: bool,
    /// Passes that were finished, ever.
    pub passes: u64,
    /// When this pass began, seconds since the epoch; 0: none is under way.
    pub started: i64,
    /// Bytes that this pass has read, before a restart included.
    pub done_bytes: u64,
    /// Bytes of all regions when it began.
    pub total_bytes: u64,
    /// Bad chunks that this pass has found.
    pub bad_chunks: u64,
    /// When the last pass ended, seconds since the epoch; 0: there was none.
    pub last_finished: i64,
    /// When that one began.
    pub last_started: i64,
    /// Bad chunks that it found.
    pub last_bad_chunks: u64,
    /// The newest findings, each with region, chunk, bytes, member and reason.
    pub findings: Vec<String>,
}

/// What is kept over restarts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Noted {
    stat: ScrubStat,
    /// Where the pass goes on.
    node: NodeId,
    offset: u64,
}

impl Noted {
    pub(crate) fn stat(&self) -> ScrubStat {
        self.stat.clone()
    }
}

/// What an earlier owner of the pool noted. Nothing, where there is none or it cannot be read: a pass then begins anew.
pub(crate) fn load(value: Option<Vec<u8>>) -> Noted {
    let noted = value.and_then(|value| serde_json::from_slice::<Noted>(&value).ok()).unwrap_or_default();
    let stat = ScrubStat { running: false, waiting: false, rate: 0, ..noted.stat };
    Noted { stat, ..noted }
}

/// The name under which [`load`]'s value is kept at the root.
pub(crate) fn attribute() -> &'static OsStr {
    OsStr::new(XATTR)
}

/// Notes that somebody scrubs; false where somebody does already.
pub(crate) fn begin(noted: &mut Noted, options: &ScrubOptions) -> bool {
    noted.stat.rate = options.rate;
    !std::mem::replace(&mut noted.stat.running, true)
}

/// Starts the thread's work; returns when the pool ends.
pub(crate) fn run(shared: &Arc<Shared>, options: &ScrubOptions) {
    let mut scrubber = Scrubber {
        shared,
        options,
        next_step: Instant::now(),
        noted_at: Instant::now(),
        seen: 0,
        open: None,
        buffer: None,
    };
    while !scrubber.pass() {}
    scrubber.leave();
    lock(&shared.scrub).stat.running = false;
    scrubber.note();
}

/// Refuses options that make no sense.
pub(crate) fn check(options: &ScrubOptions) -> Result<()> {
    match options.rate {
        0 => Err(Error::new(ErrorKind::InvalidArgument, "scrub at 0 bytes a second: it would never end")),
        _ => Ok(()),
    }
}

/// A region at hand.
struct Open {
    live: Arc<Live>,
    stored: Arc<Stored>,
    layout: Arc<Layout>,
}

struct Scrubber<'a> {
    shared: &'a Arc<Shared>,
    options: &'a ScrubOptions,
    /// Not before then, for the rate's sake.
    next_step: Instant,
    noted_at: Instant,
    /// Bytes that others had moved when they were looked at last.
    seen: u64,
    open: Option<Open>,
    buffer: Option<Buffer>,
}

impl Scrubber<'_> {
    /// Sleeps, unless the pool ends: then true.
    fn sleep(&self, until: Instant) -> bool {
        let mut stop = lock(&self.shared.stop);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if *stop || left.is_zero() {
                return *stop;
            }
            stop = match self.shared.wake.wait_timeout(stop, left) {
                Ok((stop, _)) => stop,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Goes on with a pass to its end, or begins one when it is time. True when the pool ends.
    fn pass(&mut self) -> bool {
        let all = regions(self.shared);
        let total = all.iter().map(|(_, size)| size).sum();
        let (mut node, mut offset) = {
            let mut noted = lock(&self.shared.scrub);
            let now = Timestamp::now().secs;
            if noted.stat.started == 0 {
                let due = noted.stat.last_started.saturating_add(self.options.every.as_secs() as i64);
                if noted.stat.last_finished != 0 && now < due {
                    drop(noted);
                    // A minute at a time: clocks are set, and lists of regions change.
                    return self.sleep(Instant::now() + Duration::from_secs(60));
                }
                let old = noted.stat.clone();
                *noted = Noted {
                    stat: ScrubStat { started: now, done_bytes: 0, bad_chunks: 0, ..old },
                    node: 0,
                    offset: 0,
                };
            }
            noted.stat.total_bytes = total;
            (noted.node, noted.offset)
        };
        for (next, size) in all.into_iter().filter(|(id, _)| *id >= node).collect::<Vec<_>>() {
            if next != node {
                (node, offset) = (next, 0);
            }
            while offset < size {
                if self.wait_for_turn() {
                    return true;
                }
                let step = STEP.max(self.shared.chunk_size as u64);
                let end = (offset / step + 1) * step;
                let bytes = self.step(node, offset..end);
                self.next_step = self.next_step.max(Instant::now())
                    + Duration::from_secs_f64(bytes as f64 / self.options.rate as f64);
                offset = match bytes {
                    0 => size, // gone, or being written: another time
                    _ => end,
                };
                let mut noted = lock(&self.shared.scrub);
                noted.stat.done_bytes += bytes;
                (noted.node, noted.offset) = (node, offset);
                drop(noted);
                if self.noted_at.elapsed() >= NOTE_EVERY {
                    self.note();
                }
            }
        }
        self.leave();
        {
            let mut noted = lock(&self.shared.scrub);
            let stat = &mut noted.stat;
            stat.passes += 1;
            (stat.last_started, stat.last_finished) = (stat.started, Timestamp::now().secs.max(1));
            stat.last_bad_chunks = stat.bad_chunks;
            stat.started = 0;
            tracing::info!(
                bytes = stat.done_bytes,
                bad_chunks = stat.bad_chunks,
                "a scrub of the pool ended"
            );
            (noted.node, noted.offset) = (0, 0);
        }
        self.note();
        // A pool without regions must not make this a loop without end.
        self.sleep(Instant::now() + QUIET)
    }

    /// Waits for the rate, and for others to be out of the way. True when the pool ends.
    fn wait_for_turn(&mut self) -> bool {
        if self.sleep(self.next_step) {
            return true;
        }
        let patience = Instant::now() + PATIENCE;
        loop {
            let moved = self.moved();
            if moved == std::mem::replace(&mut self.seen, moved) || Instant::now() >= patience {
                lock(&self.shared.scrub).stat.waiting = false;
                return *lock(&self.shared.stop);
            }
            lock(&self.shared.scrub).stat.waiting = true;
            if self.sleep(Instant::now() + QUIET) {
                return true;
            }
        }
    }

    /// Bytes that others have read and written.
    fn moved(&self) -> u64 {
        let counters = &self.shared.counters;
        counters.read_bytes.load(Relaxed).wrapping_add(counters.written_bytes.load(Relaxed))
    }

    fn leave(&mut self) {
        if let Some(open) = self.open.take() {
            self.shared.close_live(&open.live, Access::Read);
        }
    }

    /// Opens a region, unless it is. False: there is nothing to compare.
    fn enter(&mut self, node: NodeId) -> bool {
        let same = |open: &Open| {
            open.live.node == node
                && matches!(open.live.current(), Some(Current::Stored(now)) if Arc::ptr_eq(&now, &open.stored))
        };
        if self.open.as_ref().is_some_and(same) {
            return true;
        }
        // Old content is let go at once: its space is wanted.
        self.leave();
        let Ok(live) = self.shared.open_live(node, Access::Read, u64::MAX) else { return false };
        let stored = match live.current() {
            Some(Current::Stored(stored)) if stored.sealed() => stored,
            _ => {
                self.shared.close_live(&live, Access::Read);
                return false;
            }
        };
        match stored.layout(self.shared.chunk_size) {
            Ok(layout) => {
                self.open = Some(Open { live, stored, layout });
                true
            }
            Err(error) => {
                self.found(node, None, 0, error.chain());
                self.shared.close_live(&live, Access::Read);
                false
            }
        }
    }

    /// Reads a part of a region. Returns the bytes; 0 where there are no more, or none to compare.
    fn step(&mut self, node: NodeId, range: Range<u64>) -> u64 {
        if !self.enter(node) {
            return 0;
        }
        let Some(Open { live, stored, layout }) = &self.open else { return 0 };
        let (live, stored, layout) = (live.clone(), stored.clone(), layout.clone());
        let len = layout.size().min(range.end).saturating_sub(range.start);
        let pieces = match pieces_of(self.shared, &stored, &layout, range) {
            Ok(pieces) => pieces,
            Err(error) => {
                self.found(node, None, 0, error.chain());
                return 0;
            }
        };
        for piece in pieces {
            let wrong = check_piece(self.shared, &layout, &piece, &mut self.buffer);
            let chunks = piece.extent.len.div_ceil(layout.chunk_size() as u64);
            self.shared.counters.verified_chunks.fetch_add(chunks, Relaxed);
            for (chunk, reason) in confirmed(self.shared, &live, &stored, &layout, &piece, wrong) {
                self.shared.counters.corrupt_chunks.fetch_add(1, Relaxed);
                self.found(node, Some((&layout, chunk)), piece.extent.member, reason);
            }
        }
        len
    }

    fn found(&self, node: NodeId, chunk: Option<(&Layout, u64)>, member: u16, reason: String) {
        let bad = bad_chunk(self.shared, node, chunk, member, reason);
        let text = format!(
            "{}: chunk {} (bytes {}..{}) on member {} ({}): {}",
            bad.path,
            bad.chunk,
            bad.offset,
            bad.offset + bad.len,
            bad.member,
            bad.member_path,
            bad.reason
        );
        tracing::error!("scrub: {text}; `nvtier verify --repair` mends what can be mended");
        let mut noted = lock(&self.shared.scrub);
        noted.stat.bad_chunks += 1;
        noted.stat.findings.retain(|known| *known != text);
        if noted.stat.findings.len() >= LISTED {
            noted.stat.findings.remove(0);
        }
        noted.stat.findings.push(text);
    }

    /// Notes the place in the tree; the next snapshot carries it.
    fn note(&mut self) {
        self.noted_at = Instant::now();
        if self.shared.read_only {
            return;
        }
        let noted = lock(&self.shared.scrub).clone();
        let Ok(value) = serde_json::to_vec(&noted) else { return };
        let Ok(ctime) = read(&self.shared.tree).get(ROOT).map(|root| root.ctime) else { return };
        let set = write(&self.shared.tree).setxattr(ROOT, attribute(), &value, XattrSet::Any, ctime);
        if let Err(error) = set {
            tracing::warn!(error = %error.chain(), "the scrub's place cannot be noted");
        }
    }
}
