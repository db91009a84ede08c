//! The RAM tier: verified bytes of regions, kept in one arena under a hard budget.
//!
//! - The budget is the arena: what does not fit is evicted first, and when everything left is lent out the caller
//!   gets a *bounce* buffer from the heap that is never kept. A budget of 0 means bounce buffers only.
//! - A *frame* is an aligned MiB of one generation of one node (one chunk, where chunks are larger). It holds
//!   *pages*: runs of chunks that were read together. A random 4 KiB read therefore costs one chunk of RAM,
//!   not a frame. Pages are immutable once published, so lending one is a reference count.
//! - Eviction is S3-FIFO (Yang et al., SOSP 2023): new frames enter a small queue (a tenth of the budget) and reach
//!   the main queue only when they are asked for again, so that one long stream does not wash out the rest.
//! - What its reader keeps elsewhere (the kernel in its page cache, a program that reads past that in memory of its own) is *cold*
//!   ([`RamTier::mark_cold`]): such frames are the first to go, before memory is taken that was never used. Filling fresh memory takes longer
//!   than the read itself where the kernel has to clear it and a host to find it. A frame that comes back although its last stay
//!   ended so is kept like any other: the copy is gone. So is what was fetched ahead on demand ([`RamTier::keep`]).
//! - One reader fills, the others wait (with a deadline): [`RamTier::claim`] hands out each missing run once.
//! - Content never changes under a key: every commit makes a new generation. Nothing is ever overwritten here.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use nvme::{Arena, ArenaOptions, Buffer};

use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Bytes of a frame where chunks are not larger. As much as the largest request of a mount: such a read is one operation, one page, and one slice to
/// reply with.
pub const FRAME_BYTES: usize = 1 << 20;
/// Bytes of the arena that are backed with memory before anybody reads ([`RamTier::populate`]): what a few streams need, where their memory is used again.
const READY_BYTES: usize = 32 << 20;

/// How a [`RamTier`] is made.
#[derive(Clone, Debug)]
pub struct RamTierOptions {
    /// Bytes of the arena, cut down to a multiple of 4096 and never rounded up. 0: nothing is kept.
    pub budget_bytes: u64,
    /// Chunk size of the pool in bytes.
    pub chunk_bytes: u32,
    /// Ask for huge pages. Default: true.
    pub huge: bool,
}

/// Which frame: `frame` counts in [`RamTier::frame_bytes`] from the start of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameKey {
    /// Node of the region.
    pub node: u64,
    /// Generation of its content.
    pub generation: u64,
    /// Index of the frame.
    pub frame: u64,
}

impl FrameKey {
    /// splitmix64 over the three numbers: picks the shard and marks ghosts.
    fn mix(&self) -> u64 {
        let mut x = self.node.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ self.generation.rotate_left(32)
            ^ self.frame.wrapping_mul(0xd1b5_4a32_d192_ed03);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// Verified bytes of a run of chunks of one frame. Lent as `Arc<Page>`; its memory goes back when the last holder lets go.
#[derive(Debug)]
pub struct Page {
    buffer: Buffer,
    chunks: Range<u32>,
}

impl Page {
    /// The bytes, `chunks().len()` whole chunks.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// Which chunks of the frame.
    pub fn chunks(&self) -> Range<u32> {
        self.chunks.clone()
    }

    /// Whether its bytes lie in this arena.
    pub fn is_in(&self, arena: &Arena) -> bool {
        self.buffer.is_in(arena)
    }
}

/// What [`RamTier::claim`] found for a run of chunks of a frame.
#[derive(Debug)]
pub enum Part {
    /// Here.
    Hit {
        /// The asked chunks that the page has.
        chunks: Range<u32>,
        /// The page, which may hold more than that.
        page: Arc<Page>,
    },
    /// Absent, and the caller is the one to read it.
    Fill(FillTicket),
    /// Absent, and somebody else is reading it.
    Wait {
        /// The asked chunks.
        chunks: Range<u32>,
        /// Wait on this.
        fill: Arc<Fill>,
    },
}

/// A read in progress that others wait for.
#[derive(Debug)]
pub struct Fill {
    chunks: Range<u32>,
    state: Mutex<FillState>,
    changed: Condvar,
}

#[derive(Debug)]
enum FillState {
    Pending,
    Ready(Arc<Page>),
    Failed,
}

impl Fill {
    /// The page, once its reader has it. `None`: the reader gave up (claim again, to get its error at first hand) or the
    /// deadline passed.
    pub fn wait(&self, deadline: Instant) -> Option<Arc<Page>> {
        let mut state = lock(&self.state);
        loop {
            match &*state {
                FillState::Ready(page) => return Some(page.clone()),
                FillState::Failed => return None,
                FillState::Pending => {}
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn finish(&self, state: FillState) {
        *lock(&self.state) = state;
        self.changed.notify_all();
    }
}

/// The right and the duty to fill a run of chunks. Dropped without [`publish`](Self::publish), it wakes the waiters empty-handed.
#[derive(Debug)]
pub struct FillTicket {
    tier: Arc<RamTier>,
    key: FrameKey,
    fill: Arc<Fill>,
    done: bool,
}

impl FillTicket {
    /// Which chunks of the frame to read.
    pub fn chunks(&self) -> Range<u32> {
        self.fill.chunks.clone()
    }

    /// The frame it belongs to.
    pub fn key(&self) -> FrameKey {
        self.key
    }

    /// Hands over the verified bytes: kept when `buffer` comes from the tier's arena, and given to whoever waits in any case.
    pub fn publish(mut self, buffer: Buffer) -> Arc<Page> {
        self.done = true;
        let page = Arc::new(Page { buffer, chunks: self.fill.chunks.clone() });
        self.tier.finish(&self.key, &self.fill, Some(&page));
        self.fill.finish(FillState::Ready(page.clone()));
        page
    }
}

impl Drop for FillTicket {
    fn drop(&mut self) {
        if !self.done {
            self.tier.finish(&self.key, &self.fill, None);
            self.fill.finish(FillState::Failed);
        }
    }
}

/// Counters of a tier; `hits` and `misses` count chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamTierStats {
    /// Bytes of the arena.
    pub budget_bytes: u64,
    /// Bytes of it that hold pages.
    pub used_bytes: u64,
    /// Chunks found.
    pub hits: u64,
    /// Chunks read from a member.
    pub misses: u64,
    /// Chunks that another reader was already reading.
    pub waits: u64,
    /// Frames evicted.
    pub evictions: u64,
    /// Of those, the cold ones.
    pub cold_evictions: u64,
    /// Buffers that came from the heap because the budget was lent out (or is 0).
    pub bounces: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Small,
    Main,
}

#[derive(Debug)]
struct Frame {
    pages: Vec<Arc<Page>>,
    fills: Vec<Arc<Fill>>,
    bytes: usize,
    /// Times asked for since it entered its queue, up to 3.
    frequency: u8,
    queue: Queue,
    /// Tells this stay in a queue from an earlier one under the same key. 0: not queued yet.
    stay: u64,
    /// Bytes that readers keep elsewhere.
    copied: usize,
    /// It is never cold.
    kept: bool,
    /// Its number in the shard's queue of cold frames. 0: it is not cold.
    cold: u64,
}

#[derive(Debug, Default)]
struct Shard {
    frames: HashMap<FrameKey, Frame>,
    small: VecDeque<(FrameKey, u64)>,
    main: VecDeque<(FrameKey, u64)>,
    small_bytes: usize,
    main_bytes: usize,
    /// Frames that go first.
    cold: VecDeque<(FrameKey, u64)>,
    ghosts: VecDeque<u64>,
    ghost_set: HashSet<u64>,
    stays: u64,
}

/// The tier; see the module documentation.
#[derive(Debug)]
pub struct RamTier {
    arena: Option<Arena>,
    budget: usize,
    frame_bytes: usize,
    chunk_bytes: usize,
    shards: Vec<Mutex<Shard>>,
    used: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    waits: AtomicU64,
    evictions: AtomicU64,
    cold_evictions: AtomicU64,
    bounces: AtomicU64,
    /// Frames that are cold now.
    cold: AtomicUsize,
}

/// Whether somebody reads a frame or fills it.
fn is_lent(frame: &Frame) -> bool {
    !frame.fills.is_empty() || frame.pages.iter().any(|page| Arc::strong_count(page) > 1)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves these structures consistent: every change is made of infallible steps.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl RamTier {
    /// Maps the arena. Fails when the memory is not there.
    pub fn new(options: &RamTierOptions) -> Result<Arc<RamTier>> {
        let chunk_bytes = options.chunk_bytes as usize;
        let frame_bytes = FRAME_BYTES.max(chunk_bytes);
        let budget = (options.budget_bytes.min(usize::MAX as u64) as usize) & !4095;
        // Less than two frames cannot hold a read and the next one: bounce instead.
        let budget = if budget < 2 * frame_bytes { 0 } else { budget };
        let arena = match budget {
            0 => None,
            bytes => Some(
                Arena::new(bytes, ArenaOptions { huge: options.huge, prefault: false, lock: false })
                    .map_err(|e| Error::from(e).context(format!("making a RAM tier of {bytes} bytes")))?,
            ),
        };
        // A shard needs room for a few frames of its own, else its queues mean nothing.
        let shards = (budget / (64 * frame_bytes)).clamp(1, 16);
        Ok(Arc::new(RamTier {
            arena,
            budget,
            frame_bytes,
            chunk_bytes,
            shards: (0..shards).map(|_| Mutex::new(Shard::default())).collect(),
            used: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            cold_evictions: AtomicU64::new(0),
            bounces: AtomicU64::new(0),
            cold: AtomicUsize::new(0),
        }))
    }

    /// The arena, for registering it with a queue. `None` with a budget of 0.
    pub fn arena(&self) -> Option<&Arena> {
        self.arena.as_ref()
    }

    /// Backs what reads begin with by memory, so that the first of them does not wait until the kernel has cleared it and a host has found it.
    pub fn populate(&self) {
        if let Some(arena) = &self.arena {
            arena.populate(READY_BYTES.min(self.budget / 4));
        }
    }

    /// Bytes of a frame.
    pub fn frame_bytes(&self) -> usize {
        self.frame_bytes
    }

    /// Bytes of the budget in use by the tier.
    pub fn budget_bytes(&self) -> usize {
        self.budget
    }

    /// Counters now.
    pub fn stats(&self) -> RamTierStats {
        RamTierStats {
            budget_bytes: self.budget as u64,
            used_bytes: self.used.load(Relaxed),
            hits: self.hits.load(Relaxed),
            misses: self.misses.load(Relaxed),
            waits: self.waits.load(Relaxed),
            evictions: self.evictions.load(Relaxed),
            cold_evictions: self.cold_evictions.load(Relaxed),
            bounces: self.bounces.load(Relaxed),
        }
    }

    /// Memory for `len` bytes to read into or to gather writes in: from the arena, evicting what is not lent, else from the heap.
    pub fn buffer(&self, len: usize, key: &FrameKey) -> Result<Buffer> {
        match self.arena_buffer(len, key) {
            Some(buffer) => Ok(buffer),
            None => {
                self.bounces.fetch_add(1, Relaxed);
                Buffer::heap(len).map_err(|e| Error::from(e).context("getting a bounce buffer"))
            }
        }
    }

    /// As [`buffer`](Self::buffer), but `None` where that would go to the heap.
    pub fn arena_buffer(&self, len: usize, key: &FrameKey) -> Option<Buffer> {
        let arena = self.arena.as_ref()?;
        let first = key.mix() as usize % self.shards.len();
        let shards = || (first..self.shards.len()).chain(0..first).map(|index| &self.shards[index]);
        // A drive delivers fastest into the memory that was used last.
        if self.cold.load(Relaxed) > 0 {
            shards().any(|shard| self.evict_cold(&mut lock(shard)));
        }
        if let Some(buffer) = arena.alloc(len) {
            return Some(buffer);
        }
        // Evicting as much as is asked for may leave it in pieces: a few times as much is tried before giving up.
        let mut allowance = (4 * len).max(1 << 20);
        for shard in shards() {
            loop {
                let freed = self.evict_one(&mut lock(shard));
                if freed == 0 {
                    break;
                }
                if let Some(buffer) = arena.alloc(len) {
                    return Some(buffer);
                }
                allowance = allowance.saturating_sub(freed);
                if allowance == 0 {
                    return None;
                }
            }
        }
        None
    }

    /// Finds the chunks of `wanted` in a frame. Appends to `parts`, in order and without gaps: what is here, what the caller must
    /// read, and what others are reading.
    pub fn claim(self: &Arc<Self>, key: FrameKey, wanted: Range<u32>, parts: &mut Vec<Part>) {
        self.claim_inner(key, wanted, parts, true);
    }

    /// What of `wanted` is here, in order: nothing is handed out to be read, and nobody is waited for. It counts as asked for.
    pub fn resident(&self, key: FrameKey, wanted: Range<u32>) -> Vec<(Range<u32>, Arc<Page>)> {
        let mut found: Vec<(Range<u32>, Arc<Page>)> = Vec::new();
        let mut shard = lock(self.shard(&key));
        let Some(frame) = shard.frames.get_mut(&key) else { return found };
        for page in &frame.pages {
            let chunks = page.chunks.start.max(wanted.start)..page.chunks.end.min(wanted.end);
            if !chunks.is_empty() {
                found.push((chunks, page.clone()));
            }
        }
        if !found.is_empty() {
            self.ask(frame);
            let hits = found.iter().map(|(chunks, _)| chunks.len() as u64).sum();
            self.hits.fetch_add(hits, Relaxed);
        }
        drop(shard);
        found.sort_unstable_by_key(|(chunks, _)| chunks.start);
        found
    }

    /// As [`claim`](Self::claim) for read-ahead: gives only what nobody has or reads yet, and counts no hits.
    pub fn claim_missing(self: &Arc<Self>, key: FrameKey, wanted: Range<u32>) -> Vec<FillTicket> {
        let mut parts = Vec::new();
        self.claim_inner(key, wanted, &mut parts, false);
        parts
            .into_iter()
            .filter_map(|part| if let Part::Fill(ticket) = part { Some(ticket) } else { None })
            .collect()
    }

    fn claim_inner(self: &Arc<Self>, key: FrameKey, wanted: Range<u32>, parts: &mut Vec<Part>, asked: bool) {
        let mut shard = lock(self.shard(&key));
        let frame = shard.frames.entry(key).or_insert_with(|| Frame {
            pages: Vec::new(),
            fills: Vec::new(),
            bytes: 0,
            frequency: 0,
            queue: Queue::Small,
            stay: 0,
            copied: 0,
            kept: false,
            cold: 0,
        });
        let (mut hits, mut waits, mut misses) = (0u64, 0u64, 0u64);
        let mut at = wanted.start;
        while at < wanted.end {
            if let Some(page) = frame.pages.iter().find(|page| page.chunks.contains(&at)) {
                let end = page.chunks.end.min(wanted.end);
                hits += (end - at) as u64;
                parts.push(Part::Hit { chunks: at..end, page: page.clone() });
                at = end;
                continue;
            }
            if let Some(fill) = frame.fills.iter().find(|fill| fill.chunks.contains(&at)) {
                let end = fill.chunks.end.min(wanted.end);
                waits += (end - at) as u64;
                parts.push(Part::Wait { chunks: at..end, fill: fill.clone() });
                at = end;
                continue;
            }
            let next = |start: u32| if start > at { start } else { u32::MAX };
            let end = frame
                .pages
                .iter()
                .map(|page| next(page.chunks.start))
                .chain(frame.fills.iter().map(|fill| next(fill.chunks.start)))
                .fold(wanted.end, u32::min);
            misses += (end - at) as u64;
            let fill = Arc::new(Fill {
                chunks: at..end,
                state: Mutex::new(FillState::Pending),
                changed: Condvar::new(),
            });
            frame.fills.push(fill.clone());
            parts.push(Part::Fill(FillTicket { tier: self.clone(), key, fill, done: false }));
            at = end;
        }
        if asked {
            if hits > 0 {
                self.ask(frame);
                self.hits.fetch_add(hits, Relaxed);
            }
            self.waits.fetch_add(waits, Relaxed);
            self.misses.fetch_add(misses, Relaxed);
        }
        if frame.pages.is_empty() && frame.fills.is_empty() {
            shard.frames.remove(&key);
        }
    }

    /// The reader of `bytes` bytes of a frame keeps them elsewhere: once that is so of all that the frame holds, it goes first. Being asked for,
    /// or filled further, ends that.
    pub fn mark_cold(&self, key: FrameKey, bytes: usize) {
        let mut guard = lock(self.shard(&key));
        let shard = &mut *guard;
        let Some(frame) = shard.frames.get_mut(&key) else { return };
        frame.copied = frame.copied.saturating_add(bytes);
        // What has a place in the main queue was asked for again although somebody had it.
        let stays = frame.kept || frame.queue == Queue::Main || !frame.fills.is_empty();
        if frame.cold == 0 && !stays && frame.copied >= frame.bytes {
            shard.stays += 1;
            frame.cold = shard.stays;
            shard.cold.push_back((key, frame.cold));
            self.cold.fetch_add(1, Relaxed);
        }
    }

    /// Somebody wants a frame here for more than one reader: it is not cold, whoever reads it.
    pub fn keep(&self, key: FrameKey) {
        if let Some(frame) = lock(self.shard(&key)).frames.get_mut(&key) {
            frame.kept = true;
            self.unmark(frame);
        }
    }

    /// A frame is asked for.
    fn ask(&self, frame: &mut Frame) {
        frame.frequency = (frame.frequency + 1).min(3);
        self.unmark(frame);
    }

    fn unmark(&self, frame: &mut Frame) {
        if std::mem::take(&mut frame.cold) > 0 {
            self.cold.fetch_sub(1, Relaxed);
        }
    }

    /// Forgets the frames `0..frames` of a generation that nobody will ask for again.
    pub fn forget(&self, node: u64, generation: u64, frames: u64) {
        if self.arena.is_none() {
            return;
        }
        let held: usize = self.shards.iter().map(|shard| lock(shard).frames.len()).sum();
        if frames <= held as u64 {
            for frame in 0..frames {
                let key = FrameKey { node, generation, frame };
                self.remove(&mut lock(self.shard(&key)), &key);
            }
            return;
        }
        for shard in &self.shards {
            let mut shard = lock(shard);
            let keys: Vec<_> = shard
                .frames
                .keys()
                .filter(|key| key.node == node && key.generation == generation)
                .copied()
                .collect();
            for key in keys {
                self.remove(&mut shard, &key);
            }
        }
    }

    fn shard(&self, key: &FrameKey) -> &Mutex<Shard> {
        &self.shards[key.mix() as usize % self.shards.len()]
    }

    /// Takes the fill off the frame and, where there is a page worth keeping, keeps it.
    fn finish(&self, key: &FrameKey, fill: &Arc<Fill>, page: Option<&Arc<Page>>) {
        let mut guard = lock(self.shard(key));
        let shard = &mut *guard;
        // Forgotten meanwhile: then nobody wants the page kept either.
        let Some(frame) = shard.frames.get_mut(key) else { return };
        let before = frame.fills.len();
        frame.fills.retain(|other| !Arc::ptr_eq(other, fill));
        let known = frame.fills.len() < before;
        if let Some(page) = page.filter(|page| known && page.buffer.arena_offset().is_some()) {
            let bytes = page.buffer.len();
            frame.pages.push((*page).clone());
            frame.bytes += bytes;
            self.unmark(frame);
            self.used.fetch_add(bytes as u64, Relaxed);
            if frame.stay == 0 {
                let hash = key.mix();
                frame.queue = if shard.ghost_set.remove(&hash) { Queue::Main } else { Queue::Small };
                shard.stays += 1;
                frame.stay = shard.stays;
                let stay = frame.stay;
                match frame.queue {
                    Queue::Small => shard.small.push_back((*key, stay)),
                    Queue::Main => shard.main.push_back((*key, stay)),
                }
            }
            match frame.queue {
                Queue::Small => shard.small_bytes += bytes,
                Queue::Main => shard.main_bytes += bytes,
            }
        }
        if frame.pages.is_empty() && frame.fills.is_empty() {
            shard.frames.remove(key);
        }
    }

    fn remove(&self, shard: &mut Shard, key: &FrameKey) -> usize {
        let Some(mut frame) = shard.frames.remove(key) else { return 0 };
        self.unmark(&mut frame);
        match frame.queue {
            Queue::Small => shard.small_bytes -= frame.bytes,
            Queue::Main => shard.main_bytes -= frame.bytes,
        }
        self.used.fetch_sub(frame.bytes as u64, Relaxed);
        // What is gone is dropped from a queue as it comes up; what never comes up must not pile up.
        let Shard { frames, small, main, cold, .. } = shard;
        let most = 2 * frames.len() + 64;
        for queue in [small, main] {
            if queue.len() > most {
                queue.retain(|(key, stay)| frames.get(key).is_some_and(|frame| frame.stay == *stay));
            }
        }
        if cold.len() > most {
            cold.retain(|(key, number)| frames.get(key).is_some_and(|frame| frame.cold == *number));
        }
        frame.bytes
    }

    /// Leaves a ghost of a frame that goes, so that it is kept if it comes back soon.
    fn remember(&self, shard: &mut Shard, key: &FrameKey) {
        // As many as the shard has room for frames, also where cold ones leave most of it unused.
        let room = (self.budget / self.frame_bytes / self.shards.len()).max(16);
        while shard.ghosts.len() >= shard.frames.len().max(room) {
            if let Some(old) = shard.ghosts.pop_front() {
                shard.ghost_set.remove(&old);
            }
        }
        let hash = key.mix();
        if shard.ghost_set.insert(hash) {
            shard.ghosts.push_back(hash);
        }
    }

    /// Evicts the cold frame that waits longest. Returns whether there was one that is not lent.
    fn evict_cold(&self, shard: &mut Shard) -> bool {
        for _ in 0..shard.cold.len() {
            let Some((key, number)) = shard.cold.pop_front() else { break };
            let Some(frame) = shard.frames.get(&key).filter(|frame| frame.cold == number) else { continue };
            if is_lent(frame) {
                shard.cold.push_back((key, number));
                continue;
            }
            self.remember(shard, &key);
            self.cold_evictions.fetch_add(1, Relaxed);
            self.evictions.fetch_add(1, Relaxed);
            self.remove(shard, &key);
            return true;
        }
        false
    }

    /// Evicts one frame that is not lent. Returns its bytes, 0 when there is none.
    fn evict_one(&self, shard: &mut Shard) -> usize {
        // Each entry is looked at no more than a few times: once to demote its frequency per step, once to move queues.
        let mut looks = 5 * (shard.small.len() + shard.main.len());
        while looks > 0 {
            looks -= 1;
            let from_small = !shard.small.is_empty()
                && (shard.main.is_empty() || shard.small_bytes * 9 > shard.main_bytes);
            let popped = if from_small { shard.small.pop_front() } else { shard.main.pop_front() };
            let Some((key, stay)) = popped else { return 0 };
            let Some(frame) = shard.frames.get_mut(&key).filter(|frame| frame.stay == stay) else { continue };
            let lent = is_lent(frame);
            if from_small {
                if frame.frequency > 1 {
                    frame.frequency = 0;
                    frame.queue = Queue::Main;
                    shard.small_bytes -= frame.bytes;
                    shard.main_bytes += frame.bytes;
                    shard.main.push_back((key, stay));
                    continue;
                }
                if lent {
                    shard.small.push_back((key, stay));
                    continue;
                }
                self.remember(shard, &key);
            } else if frame.frequency > 0 || lent {
                frame.frequency = frame.frequency.saturating_sub(1);
                shard.main.push_back((key, stay));
                continue;
            }
            self.evictions.fetch_add(1, Relaxed);
            return self.remove(shard, &key);
        }
        0
    }

    /// Chunks in a frame.
    pub fn chunks_per_frame(&self) -> u32 {
        (self.frame_bytes / self.chunk_bytes) as u32
    }
}

#[cfg(test)]
#[path = "ram_tier/tests.rs"] // said, because tests/loom takes this file by its path
mod tests;
