//! The hot loop: one worker, one engine, one queue of transfers.
//!
//! Each turn fills free slots, submits them together, waits for completions and books them. Nothing is allocated and
//! the clock is read once a batch where a batch shares a moment (submission, completion).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use crate::data;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{self, Done, Files, IoEngine, Queued, Transfer};
use crate::offsets::{Request, mix};
use crate::pace::{Flush, Pace};
use crate::settings::{Direction, Settings};
use crate::stats::{DepthMap, DirectionStats, Latency};
use crate::sys::ThreadUsage;
use crate::work::{Span, Work};

/// Counters the monitor reads while the worker runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes done, read and written.
    pub bytes: [AtomicU64; 2],
    /// Operations done.
    pub ios: [AtomicU64; 2],
    /// The worker has begun to measure (its ramp time is over).
    pub measuring: AtomicBool,
    /// The worker is through.
    pub finished: AtomicBool,
}

/// What a worker needs.
#[derive(Debug)]
pub struct Plan {
    /// The job.
    pub settings: Arc<Settings>,
    /// Which worker of the job, from 0.
    pub index: u32,
    /// Reporting group.
    pub group: u32,
    /// Files, laid out.
    pub files: Files,
    /// Part of the files.
    pub span: Span,
    /// Prepared list instead of a pattern.
    pub trace: Option<Arc<[Request]>>,
    /// Seen by the monitor.
    pub progress: Arc<Progress>,
    /// Set to end the workers of this phase (`exitall`).
    pub stop: Arc<AtomicBool>,
    /// Set to end everything (SIGINT).
    pub interrupted: Arc<AtomicBool>,
}

impl Plan {
    #[inline]
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.interrupted.load(Ordering::Relaxed)
    }
}

/// What a worker measured.
#[derive(Debug)]
pub struct Outcome {
    /// Read and write.
    pub directions: [DirectionStats; 2],
    /// fsyncs and fdatasyncs.
    pub sync: Latency,
    /// In flight at each submission.
    pub depth_level: DepthMap,
    /// Sizes of submits.
    pub depth_submit: DepthMap,
    /// Sizes of reaps.
    pub depth_complete: DepthMap,
    /// CPU time, faults, switches while measuring.
    pub usage: ThreadUsage,
    /// Measured time, nanoseconds.
    pub runtime_ns: u64,
    /// Time spent filling, sealing and checking buffers, nanoseconds.
    pub data_ns: u64,
    /// Time spent sleeping for `rate` and `thinktime`, nanoseconds.
    pub paused_ns: u64,
    /// What ended it early.
    pub error: Option<Error>,
    /// Bad blocks found by verification.
    pub bad_blocks: u64,
    /// The first bad block, in words.
    pub first_bad: Option<String>,
    /// The engine's note.
    pub note: Option<String>,
}

struct Slot {
    transfer: Transfer,
    begun_ns: u64,
    issued_ns: u64,
}

struct Worker<'a> {
    plan: &'a Plan,
    engine: Box<dyn IoEngine>,
    clock: Instant,
    slots: Vec<Slot>,
    free: Vec<u32>,
    queued: Vec<u32>,
    done: Vec<Done>,
    in_flight: usize,
    checking: bool,
    start_ns: u64,
    stamp: u64,
    written: Option<Vec<u64>>,
    totals: [[u64; 2]; 2],
    pace: Pace,
    out: Outcome,
}

/// Runs a worker; `start` lines all workers of a phase up. Never panics on I/O errors: they are in the outcome.
pub fn run(plan: &Plan, start: &Barrier) -> Outcome {
    let prepared = pin(&plan.settings).and_then(|()| io::open(&plan.settings, &plan.files));
    start.wait();
    let outcome = match prepared {
        Ok(engine) => Worker::new(plan, engine).run(),
        Err(error) => Outcome { error: Some(error), ..empty(&plan.settings) },
    };
    if plan.settings.exitall {
        plan.stop.store(true, Ordering::Relaxed);
    }
    plan.progress.finished.store(true, Ordering::Release);
    outcome
}

fn empty(settings: &Settings) -> Outcome {
    let direction = || DirectionStats::new(settings.slat_percentiles, settings.lat_percentiles);
    Outcome {
        directions: [direction(), direction()],
        sync: Latency::new(true),
        depth_level: DepthMap::default(),
        depth_submit: DepthMap::default(),
        depth_complete: DepthMap::default(),
        usage: ThreadUsage::default(),
        runtime_ns: 0,
        data_ns: 0,
        paused_ns: 0,
        error: None,
        bad_blocks: 0,
        first_bad: None,
        note: None,
    }
}

fn pin(settings: &Settings) -> Result<()> {
    if settings.cpus_allowed.is_empty() {
        return Ok(());
    }
    let mut set = rustix::thread::CpuSet::new();
    settings.cpus_allowed.iter().for_each(|&cpu| set.set(cpu));
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|error| Error::io(format!("cannot run on CPUs {:?}", settings.cpus_allowed), error))
}

impl<'a> Worker<'a> {
    fn new(plan: &'a Plan, engine: Box<dyn IoEngine>) -> Worker<'a> {
        let settings = &plan.settings;
        let depth = if engine.is_synchronous() { 1 } else { settings.iodepth };
        let idle = Transfer { direction: Direction::Read, file: 0, offset: 0, len: 0 };
        let note = engine.note();
        let mut worker = Worker {
            plan,
            engine,
            clock: Instant::now(),
            slots: (0..depth).map(|_| Slot { transfer: idle, begun_ns: 0, issued_ns: 0 }).collect(),
            free: (0..depth).rev().collect(),
            queued: Vec::with_capacity(depth as usize),
            done: Vec::with_capacity(depth as usize),
            in_flight: 0,
            checking: settings.verify.is_some() && !settings.pattern.write,
            start_ns: 0,
            stamp: mix(settings.randseed ^ u64::from(plan.index)),
            written: None,
            totals: [[0; 2]; 2],
            pace: Pace::new(settings),
            out: Outcome { note, ..empty(settings) },
        };
        for slot in 0..depth {
            let buffer = worker.engine.buffer(slot);
            if settings.pattern.write && !settings.zero_buffers {
                data::fill_random(buffer, worker.stamp ^ u64::from(slot));
            }
        }
        worker
    }

    #[inline]
    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    fn run(mut self) -> Outcome {
        let settings = self.plan.settings.clone();
        self.sleep_until(self.now() + settings.startdelay_us * 1000);
        let mut work = Work::new(&settings, self.plan.index, self.plan.span, self.plan.trace.clone());
        if settings.verify.is_some() && settings.do_verify && settings.pattern.write {
            self.written = Some(vec![0; work.write_blocks().div_ceil(64) as usize]);
        }
        self.begin();
        let usage = ThreadUsage::now();
        let ramp_end = self.start_ns + settings.ramp_us * 1000;
        let mut usage = usage;
        if settings.ramp_us > 0 {
            if let Err(error) = self.drive(&mut || work.next(), ramp_end) {
                self.out.error = Some(error);
            }
            self.forget();
            usage = ThreadUsage::now();
        }
        self.plan.progress.measuring.store(true, Ordering::Relaxed);
        let deadline =
            if settings.runtime_us > 0 { self.start_ns + settings.runtime_us * 1000 } else { u64::MAX };
        if self.out.error.is_none()
            && let Err(error) =
                self.drive(&mut || work.next(), deadline).and_then(|()| self.finish_writes(&settings))
        {
            self.out.error = Some(error);
        }
        let end = self.now();
        // As in fio, all of it counts: the drain at the end and end_fsync, too.
        for direction in self.out.directions.iter_mut().filter(|direction| direction.ios > 0) {
            direction.runtime_ns = end - self.start_ns;
        }
        self.out.runtime_ns = end - self.start_ns;
        self.out.usage = ThreadUsage::now().since(&usage);
        if let Some(written) = self.written.take()
            && self.out.error.is_none()
            && let Err(error) = self.read_back(&work, &written)
        {
            self.out.error = Some(error);
        }
        if self.out.error.is_none() && self.out.bad_blocks > 0 {
            let first = self.out.first_bad.clone().unwrap_or_default();
            let text = format!("{} bad blocks; the first: {first}", self.out.bad_blocks);
            self.out.error = Some(Error::new(ErrorKind::Corrupt, text));
        }
        self.out
    }

    fn begin(&mut self) {
        self.start_ns = self.now();
        self.pace.begin(self.start_ns);
    }

    /// End of the ramp time: measuring begins afresh.
    fn forget(&mut self) {
        self.out.directions.iter_mut().for_each(DirectionStats::clear);
        self.out.sync.clear();
        (self.out.depth_level, self.out.depth_submit) = Default::default();
        self.out.depth_complete = DepthMap::default();
        (self.out.data_ns, self.out.paused_ns) = (0, 0);
        self.begin();
    }

    fn finish_writes(&mut self, settings: &Settings) -> Result<()> {
        if settings.end_fsync && settings.pattern.write { self.sync(false) } else { Ok(()) }
    }

    /// Reads back every block that was written and checks it; counts as reads.
    fn read_back(&mut self, work: &Work, written: &[u64]) -> Result<()> {
        for path in &self.plan.files.paths {
            if self.plan.settings.invalidate && self.plan.files.pool.is_none() && path.exists() {
                self.engine.sync(true)?;
                crate::layout::invalidate(path)?;
            }
        }
        let mut word = 0;
        let mut bits = written.first().copied().unwrap_or(0);
        let mut next = move || {
            while bits == 0 {
                word += 1;
                bits = *written.get(word)?;
            }
            let block = word as u64 * 64 + u64::from(bits.trailing_zeros());
            bits &= bits - 1;
            Some(Transfer { direction: Direction::Read, ..work.at(Direction::Write, block) })
        };
        self.checking = true;
        let reads_before = self.out.directions[0].runtime_ns;
        let start = self.now();
        self.drive(&mut next, u64::MAX)?;
        self.out.directions[0].runtime_ns = reads_before + (self.now() - start);
        Ok(())
    }

    /// Runs transfers from `next` until there are none, `deadline_ns` is over, or all are told to stop.
    fn drive(&mut self, next: &mut dyn FnMut() -> Option<Transfer>, deadline_ns: u64) -> Result<()> {
        let settings = self.plan.settings.clone();
        let depth = self.slots.len();
        let cap = match settings.batch_submit {
            _ if settings.thinktime_us > 0 => 1,
            0 => depth,
            batch => batch as usize,
        };
        let combined = settings.disable_slat;
        let mut held: Option<Transfer> = None;
        let mut more = true;
        let outcome = loop {
            let begun = self.now();
            if more && (begun >= deadline_ns || self.plan.stopped()) {
                more = false;
            }
            let mut wait_ns = 0;
            while more && self.queued.len() < cap && self.pace.flush_due().is_none() {
                let Some(&slot) = self.free.last() else { break };
                let Some(transfer) = held.take().or_else(&mut *next) else {
                    more = false;
                    break;
                };
                let due = self.pace.due(&transfer, begun);
                if due > begun {
                    held = Some(transfer);
                    wait_ns = due;
                    break;
                }
                self.pace.charge(&transfer, begun);
                self.free.pop();
                if let Err(error) = self.start(&settings, slot, transfer, begun) {
                    return self.drain().and(Err(error));
                }
                if self.engine.is_synchronous() {
                    break;
                }
            }
            let flush = self.pace.flush_due();
            if self.in_flight == 0 {
                if let Some(flush) = flush {
                    self.sync(flush == Flush::Data)?;
                    self.pace.flushed(flush);
                } else if wait_ns > 0 {
                    self.sleep_until(wait_ns.min(deadline_ns));
                } else if !more {
                    break Ok(());
                }
                self.pause(&settings);
                continue;
            }
            let min = if !more || held.is_some() || flush.is_some() {
                1
            } else if self.free.is_empty() {
                (settings.batch_complete_min as usize).min(self.in_flight)
            } else {
                // Only the batch is full, not the queue: take what is there and go on submitting.
                0
            };
            if let Err(error) = self.submit_and_reap(combined, min.max(usize::from(self.queued.is_empty()))) {
                break Err(error);
            }
            if let Err(error) = self.book() {
                break Err(error);
            }
            self.pause(&settings);
        };
        match outcome {
            Ok(()) => Ok(()),
            Err(error) => self.drain().and(Err(error)),
        }
    }

    fn start(&mut self, settings: &Settings, slot: u32, transfer: Transfer, begun: u64) -> Result<()> {
        if transfer.direction == Direction::Write {
            self.fill(settings, slot, &transfer);
        }
        // Buffers took a while to fill: this one's latency begins after that.
        let begun = if settings.verify.is_some() || settings.refill_buffers { self.now() } else { begun };
        self.slots[slot as usize] = Slot { transfer, begun_ns: begun, issued_ns: begun };
        match self.engine.queue(slot, transfer)? {
            Queued::Started => {
                self.queued.push(slot);
                self.in_flight += 1;
                self.out.depth_level.record_level(self.in_flight);
                Ok(())
            }
            Queued::Finished(result) => {
                self.out.depth_level.record_level(1);
                self.out.depth_submit.record_batch(1);
                self.out.depth_complete.record_batch(1);
                let now = self.now();
                self.complete(slot, result, now)?;
                self.publish();
                Ok(())
            }
        }
    }

    fn fill(&mut self, settings: &Settings, slot: u32, transfer: &Transfer) {
        self.stamp = self.stamp.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let stamp = self.stamp;
        let heavy = settings.refill_buffers || settings.verify.is_some();
        let before = if heavy { self.now() } else { 0 };
        let buffer = &mut self.engine.buffer(slot)[..transfer.len as usize];
        if settings.refill_buffers && !settings.zero_buffers {
            data::fill_random(buffer, stamp);
        } else if settings.scramble_buffers && !settings.zero_buffers {
            data::scramble(buffer, stamp);
        }
        if let Some(kind) = settings.verify {
            data::seal(kind, buffer, transfer.offset);
        }
        if heavy {
            self.out.data_ns += self.now() - before;
        }
    }

    fn submit_and_reap(&mut self, combined: bool, min: usize) -> Result<()> {
        if self.queued.is_empty() {
            return self.engine.reap(min, &mut self.done);
        }
        self.out.depth_submit.record_batch(self.queued.len());
        if combined {
            let issued = self.now();
            self.queued.drain(..).for_each(|slot| self.slots[slot as usize].issued_ns = issued);
            return self.engine.commit_and_reap(min, &mut self.done);
        }
        self.engine.commit()?;
        let issued = self.now();
        for slot in self.queued.drain(..) {
            let slot = &mut self.slots[slot as usize];
            slot.issued_ns = issued;
            self.out.directions[slot.transfer.direction as usize].slat.record(issued - slot.begun_ns);
        }
        self.engine.reap(min, &mut self.done)
    }

    /// Books everything reaped.
    fn book(&mut self) -> Result<()> {
        if self.done.is_empty() {
            return Ok(());
        }
        let now = self.now();
        self.out.depth_complete.record_batch(self.done.len());
        let mut first_error = None;
        let mut done = std::mem::take(&mut self.done);
        for Done { slot, result } in done.drain(..) {
            self.in_flight -= 1;
            if let Err(error) = self.complete(slot, result, now) {
                first_error.get_or_insert(error);
            }
        }
        self.done = done;
        self.publish();
        first_error.map_or(Ok(()), Err)
    }

    #[inline]
    fn complete(&mut self, slot: u32, result: Result<u32>, now: u64) -> Result<()> {
        self.free.push(slot);
        let Slot { transfer, begun_ns, issued_ns } = self.slots[slot as usize];
        let moved = result?;
        let d = transfer.direction as usize;
        let stats = &mut self.out.directions[d];
        stats.ios += 1;
        stats.bytes += u64::from(moved);
        stats.short_ios += u64::from(moved < transfer.len);
        stats.clat.record(now - issued_ns);
        stats.lat.record(now - begun_ns);
        self.totals[d][0] += u64::from(moved);
        self.totals[d][1] += 1;
        if moved == 0 {
            let path = self.plan.files.paths[transfer.file as usize].display();
            return Err(Error::new(ErrorKind::Io, format!("{path} ends before offset {}", transfer.offset)));
        }
        match transfer.direction {
            Direction::Read if self.checking => self.check(slot, &transfer, moved),
            Direction::Read => Ok(()),
            Direction::Write => {
                if self.written.is_some() {
                    self.note_written(&transfer);
                }
                Ok(())
            }
        }
    }

    fn note_written(&mut self, transfer: &Transfer) {
        let index = self.plan.span.block_of(transfer, self.plan.settings.block_bytes[1]);
        if let Some(word) = self.written.as_mut().and_then(|written| written.get_mut((index / 64) as usize)) {
            *word |= 1 << (index % 64);
        }
    }

    fn check(&mut self, slot: u32, transfer: &Transfer, moved: u32) -> Result<()> {
        let Some(kind) = self.plan.settings.verify else { return Ok(()) };
        let before = self.now();
        let block = &self.engine.buffer(slot)[..moved as usize];
        let verdict = if block.len() < data::HEADER_BYTES {
            Err(format!("verify: only {moved} bytes at offset {}", transfer.offset))
        } else {
            data::check(kind, block, transfer.offset)
        };
        self.out.data_ns += self.now() - before;
        let Err(why) = verdict else { return Ok(()) };
        let why = format!("{}: {why}", self.plan.files.paths[transfer.file as usize].display());
        self.out.bad_blocks += 1;
        self.out.first_bad.get_or_insert_with(|| why.clone());
        if self.plan.settings.verify_fatal { Err(Error::new(ErrorKind::Corrupt, why)) } else { Ok(()) }
    }

    fn sync(&mut self, data_only: bool) -> Result<()> {
        let before = self.now();
        self.engine.sync(data_only)?;
        let took = self.now() - before;
        self.out.sync.record(took);
        Ok(())
    }

    fn pause(&mut self, settings: &Settings) {
        if settings.thinktime_us > 0 {
            self.sleep_until(self.now() + settings.thinktime_us * 1000);
        }
    }

    /// Sleeps, waking ten times a second to see whether all are told to stop.
    fn sleep_until(&mut self, until_ns: u64) {
        let before = self.now();
        let mut now = before;
        while now < until_ns && !self.plan.stopped() {
            std::thread::sleep(Duration::from_nanos((until_ns - now).min(100_000_000)));
            now = self.now();
        }
        self.out.paused_ns += now - before;
    }

    fn publish(&self) {
        for d in 0..2 {
            self.plan.progress.bytes[d].store(self.totals[d][0], Ordering::Relaxed);
            self.plan.progress.ios[d].store(self.totals[d][1], Ordering::Relaxed);
        }
    }

    /// Waits for everything in flight after a failure; what it yields is not booked.
    fn drain(&mut self) -> Result<()> {
        self.engine.commit()?;
        self.queued.clear();
        while self.in_flight > 0 {
            self.engine.reap(1, &mut self.done)?;
            self.in_flight -= self.done.len().min(self.in_flight);
            self.free.extend(self.done.drain(..).map(|done| done.slot));
        }
        Ok(())
    }
}
