//! Source -> ring -> device.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use nvme::{Buffer, Op, Queue, Verb};
use tracing::field::Empty;

use super::lend::{IN_FLIGHT, Loan, Pinned, Pinner};
use super::pieces::{Piece, Pieces};
use super::{Busy, CachedMode, Lane, LaneOptions, Run, lend, pieces, start, tier};
use crate::admission::Admission;
use crate::control::Control;
use crate::driver::{Batch, Direction, Lent, Part, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// The most threads that pin pieces of mapped files: kernel and driver lock, so that many more could not help.
const PIN_THREADS: u32 = 16;
/// How long a piece is waited for before copies are looked at.
const PIN_WAIT: Duration = Duration::from_micros(500);
/// The same, while none runs.
const PIN_WAIT_IDLE: Duration = Duration::from_millis(50);

/// How a transfer went.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transfer {
    pub bytes: u64,
    pub read_bytes: u64,
    /// Copied from pages of a RAM tier, and from mapped files: neither read nor copied on the host.
    pub tier_bytes: u64,
    pub mapped_bytes: u64,
    pub elapsed: Duration,
    /// While at least one read (or write) was in flight.
    pub io_busy: Duration,
    /// While at least one batch of copies was.
    pub copy_busy: Duration,
    /// The thread slept until a read (or write) ended.
    pub io_wait: Duration,
    /// The thread slept until a copy ended.
    pub copy_wait: Duration,
    /// Spent on checksums.
    pub verify: Duration,
    pub reads: u64,
    pub batches: u64,
    pub copies: u64,
    pub backend: String,
    pub fixed_buffers: bool,
    pub note: Option<String>,
}

impl Transfer {
    /// How it went, for who traces it.
    pub(super) fn record(&self, span: &tracing::Span) {
        span.record("reads", self.reads)
            .record("copies", self.copies)
            .record("backend", self.backend.as_str())
            .record("io_wait_us", self.io_wait.as_micros() as u64)
            .record("copy_wait_us", self.copy_wait.as_micros() as u64)
            .record("verify_us", self.verify.as_micros() as u64);
    }
}

/// A buffer with bytes for the device.
struct Ready {
    piece: usize,
    buffer: Buffer,
}

struct Work<'a> {
    sources: &'a [Source],
    pieces: Pieces,
    /// Names a tensor by its number.
    tensor: &'a dyn Fn(u32) -> String,
    lane: &'a Lane,
    /// All sources are in memory.
    cached: bool,
    /// Made when there is something to read: it costs more than a few copies do.
    queue: Option<Queue>,
    stream: Box<dyn Stream>,
    free: Vec<Buffer>,
    ready: Vec<Ready>,
    next: usize,
    /// Copies that need no read, to be started.
    loans: VecDeque<Loan>,
    /// What pins pieces of mapped files.
    pinner: Option<Pinner>,
    done: u64,
    out: Transfer,
}

/// What is copied without being read, and what is left to read.
struct Sorted {
    read: Vec<Run>,
    loans: Vec<Loan>,
    wishes: Vec<lend::Wish>,
    note: Option<String>,
}

impl Lane {
    /// Copies all runs to the device. On an error nothing is under way any more when it returns.
    pub(crate) fn read(
        &mut self,
        sources: &[Source],
        runs: &[Run],
        tensor: &dyn Fn(u32) -> String,
        control: &mut Control<'_>,
    ) -> Result<Transfer> {
        let started = Instant::now();
        let total: u64 = runs.iter().map(|run| run.len).sum();
        let span = tracing::debug_span!(
            "lane_read",
            bytes = total,
            reads = Empty,
            copies = Empty,
            backend = Empty,
            io_wait_us = Empty,
            copy_wait_us = Empty,
            verify_us = Empty
        )
        .entered();
        let sorted = self.sort(sources, runs)?;
        let pieces = pieces::plan(sources, &sorted.read, self.options.chunk, self.options.gap)?;
        // From here on, also while somebody who watches thinks: a load that is not through is one that others may have to wait for.
        let admission = Admission::enter(control.priority);
        control.check(0, total)?;
        if total == 0 {
            return Ok(Transfer::default());
        }
        let used = |i: usize| runs.iter().any(|run| run.source as usize == i && run.len > 0);
        let cached =
            sources.iter().enumerate().filter(|(i, _)| used(*i)).all(|(_, source)| source.is_cached());
        let stream = self.driver.stream()?;
        let free = self.buffers(pieces.buffer_len.max(self.options.chunk))?;
        let options = &self.options;
        let pinner = match sorted.wishes.is_empty() {
            true => None,
            false => Some(Pinner::start(
                &self.driver,
                sorted.wishes,
                options.threads.min(PIN_THREADS),
                options.map_limit,
            )?),
        };
        let mut work = Work {
            sources,
            pieces,
            tensor,
            lane: self,
            cached,
            queue: None,
            stream,
            free,
            ready: Vec::new(),
            next: 0,
            loans: sorted.loans.into(),
            pinner,
            done: 0,
            out: Transfer { note: sorted.note, ..Transfer::default() },
        };
        let result = work.run(total, &admission, control);
        // Whatever happened, nothing may be under way when the caller frees the memory on the device.
        let drained = work.drain();
        result.and(drained)?;
        // Unpins.
        drop(work.pinner.take());
        let Work { mut out, queue, pieces, .. } = work;
        out.elapsed = started.elapsed();
        out.read_bytes = pieces.read_bytes;
        match queue {
            Some(queue) => {
                out.backend = queue.backend().to_string();
                out.fixed_buffers = queue.has_fixed_buffers();
                out.note = out.note.or(queue.note().map(str::to_owned));
            }
            None => out.backend = "none".into(),
        }
        out.record(&span);
        Ok(out)
    }

    /// Takes out of what is wanted what need not be read.
    fn sort(&self, sources: &[Source], runs: &[Run]) -> Result<Sorted> {
        let mut sorted = Sorted { read: Vec::new(), loans: Vec::new(), wishes: Vec::new(), note: None };
        for (index, runs) in pieces::by_source(sources, runs)? {
            let source = &sources[index as usize];
            if let Some(lease) = source.lease()
                && lease.ram_arena().is_some_and(|arena| self.tiers.iter().any(|tier| tier.is(arena)))
                && let (Some(first), Some(last)) = (runs.first(), runs.last())
            {
                let resident = lease.resident(first.offset..last.offset + last.len);
                tier::split(runs, &resident, &mut sorted.read, &mut sorted.loans);
                continue;
            }
            let mapped = match self.options.cached {
                CachedMode::Map => source.map(),
                CachedMode::Auto | CachedMode::Copy => None,
            };
            match mapped {
                Some(Ok(mapping)) => {
                    let piece = self.options.map_piece as u64;
                    sorted.wishes.append(&mut lend::wishes(&mapping, runs, piece));
                }
                Some(Err(error)) => {
                    sorted.note = Some(format!("{} is copied by threads: {error}", source.name()));
                    sorted.read.extend(runs);
                }
                None => sorted.read.extend(runs),
            }
        }
        Ok(sorted)
    }
}

impl Work<'_> {
    fn run(&mut self, total: u64, admission: &Admission, control: &mut Control<'_>) -> Result<()> {
        let copy_unit = self.lane.options.copy_unit;
        self.out.bytes = total;
        let (mut io, mut copies) = (Busy::default(), Busy::default());
        while self.done < total {
            control.check(self.done, total)?;
            let paused = admission.paused();
            if !paused {
                self.issue()?;
            }
            self.submit()?;
            self.reap_reads()?;
            self.reap_copies(false)?;
            self.lend(paused)?;
            let gathered: usize = self.ready.iter().map(|ready| ready.buffer.len()).sum();
            let idle = self.stream.in_flight() == 0;
            if gathered > 0 && (idle || gathered >= copy_unit || self.reading() == 0) {
                self.copy(copy_unit)?;
            }
            let now = Instant::now();
            io.set(self.reading() > 0, now);
            let copying = self.stream.in_flight() > 0;
            copies.set(copying, now);
            if self.done >= total {
                break;
            }
            let starved = self.free.is_empty() && self.next < self.pieces.order.len();
            let pinning = self.pinner.as_ref().is_some_and(Pinner::is_working);
            let few = self.stream.in_flight() < IN_FLIGHT / 2;
            if pinning && few && self.reading() == 0 {
                // Copies are looked at again soon: they end while pieces come.
                self.wait_for_pieces(if copying { PIN_WAIT } else { PIN_WAIT_IDLE });
            } else if self.stream.in_flight() > 0 && (starved || self.reading() == 0) {
                self.reap_copies(true)?;
                self.out.copy_wait += now.elapsed();
            } else if let Some(queue) = self.queue.as_mut().filter(|queue| queue.in_flight() > 0) {
                queue.wait(1)?;
                self.out.io_wait += now.elapsed();
            } else if paused {
                admission.wait();
            } else if self.pinner.as_ref().is_some_and(Pinner::is_open) {
                self.wait_for_pieces(PIN_WAIT_IDLE);
            } else if self.ready.is_empty()
                && self.loans.is_empty()
                && self.next >= self.pieces.order.len()
                && self.stream.in_flight() == 0
            {
                let context =
                    format!("{} of {total} bytes were copied, and nothing is left to do", self.done);
                return Err(Error::new(ErrorKind::Device, context));
            }
        }
        let now = Instant::now();
        io.set(false, now);
        copies.set(false, now);
        (self.out.io_busy, self.out.copy_busy) = (io.total, copies.total);
        control.check(self.done, total)
    }

    fn wait_for_pieces(&mut self, time: Duration) {
        let started = Instant::now();
        if let Some(pinner) = &self.pinner {
            pinner.wait(time);
        }
        self.out.io_wait += started.elapsed();
    }

    /// Starts copies of what needs no read, about a `copy_unit` to a batch; none while others go first.
    fn lend(&mut self, paused: bool) -> Result<()> {
        for result in self.pinner.as_ref().map(Pinner::results).unwrap_or_default() {
            match result {
                Pinned::Loans(loans) => self.loans.extend(loans),
                Pinned::Refused(runs, error) => {
                    let LaneOptions { chunk, gap, .. } = self.lane.options;
                    self.pieces.append(pieces::plan(self.sources, &runs, chunk, gap)?);
                    self.out
                        .note
                        .get_or_insert_with(|| format!("a file in memory is copied by threads: {error}"));
                }
            }
        }
        while !paused && !self.loans.is_empty() && self.stream.in_flight() < IN_FLIGHT {
            let mut batch = Batch::new(Direction::ToDevice);
            let (mut bytes, mut tier, mut mapped) = (0, 0, 0);
            while bytes < self.lane.options.copy_unit {
                let Some(Loan { lent, offset, device, len }) = self.loans.pop_front() else { break };
                match &lent {
                    Lent::Page(_) | Lent::Buffer(_) => tier += len as u64,
                    Lent::Mapped(_) => mapped += len as u64,
                }
                bytes += len;
                batch.parts.push(Part { buffer: batch.lent.len() as u32, offset, device, len });
                batch.lent.push(lent);
            }
            (self.out.batches, self.out.copies) =
                (self.out.batches + 1, self.out.copies + batch.parts.len() as u64);
            (self.out.tier_bytes, self.out.mapped_bytes) =
                (self.out.tier_bytes + tier, self.out.mapped_bytes + mapped);
            start(&mut self.stream, batch, &mut self.free)?;
        }
        Ok(())
    }

    /// Reads in flight.
    fn reading(&self) -> usize {
        self.queue.as_ref().map_or(0, Queue::in_flight)
    }

    fn submit(&mut self) -> Result<()> {
        if let Some(queue) = &mut self.queue {
            queue.wait(0)?;
        }
        Ok(())
    }

    /// Starts reads while there are buffers and room in the queue.
    fn issue(&mut self) -> Result<()> {
        if self.next >= self.pieces.order.len() {
            return Ok(());
        }
        let queue = match &mut self.queue {
            Some(queue) => queue,
            none => none.insert(self.lane.queue(self.cached)?),
        };
        while self.next < self.pieces.order.len() && queue.in_flight() < queue.depth() {
            let Some(mut buffer) = self.free.pop() else { break };
            let index = self.next;
            let piece = &self.pieces.order[index];
            let Some(stored) = piece.stored else {
                buffer[..piece.read_len].fill(0);
                self.ready.push(Ready { piece: index, buffer });
                self.next += 1;
                continue;
            };
            let extent = &self.sources[piece.source as usize].stored[stored as usize];
            let op = Op {
                verb: Verb::Read,
                device: extent.device.clone(),
                offset: piece.device_offset,
                buffer: Some(buffer),
                range: 0..piece.read_len,
                tag: index as u64,
            };
            if let Err(refused) = queue.push(op) {
                self.free.extend(refused.op.buffer);
                if refused.error.kind().is_queue_full() {
                    break;
                }
                return Err(self.failed(index, refused.error));
            }
            self.out.reads += 1;
            self.next += 1;
        }
        Ok(())
    }

    fn reap_reads(&mut self) -> Result<()> {
        let mut failed = None;
        let mut came = Vec::new();
        let (pieces, free) = (&self.pieces.order, &mut self.free);
        let Some(queue) = &mut self.queue else { return Ok(()) };
        queue.reap(|completion| {
            let index = completion.tag as usize;
            let Some(buffer) = completion.op.buffer else {
                if let Err(error) = completion.result {
                    failed.get_or_insert((index, error));
                }
                return;
            };
            let needed = pieces[index].needed;
            match completion.result {
                Ok(count) if count >= needed => came.push(Ready { piece: index, buffer }),
                Ok(count) => {
                    free.push(buffer);
                    let context = format!("{count} bytes came, {needed} were needed");
                    failed.get_or_insert((index, nvme::Error::new(nvme::ErrorKind::ShortTransfer, context)));
                }
                Err(error) => {
                    free.push(buffer);
                    failed.get_or_insert((index, error));
                }
            }
        });
        if let Some((index, error)) = failed {
            self.free.extend(came.into_iter().map(|ready| ready.buffer));
            return Err(self.failed(index, error));
        }
        for mut ready in came {
            let checked = self.verify(&self.pieces.order[ready.piece].clone(), &mut ready.buffer);
            self.ready.push(ready);
            checked?;
        }
        Ok(())
    }

    /// Compares the checksums of a piece.
    fn verify(&mut self, piece: &Piece, buffer: &mut Buffer) -> Result<()> {
        let source = &self.sources[piece.source as usize];
        let (Some(sums), Some(_)) = (&source.sums, piece.stored) else { return Ok(()) };
        let started = Instant::now();
        let end = piece.logical + (piece.needed - piece.skip) as u64;
        let mut at = piece.logical;
        while at < end {
            let chunk = at / sums.chunk_size;
            let (first, last) = (chunk * sums.chunk_size, ((chunk + 1) * sums.chunk_size).min(source.len()));
            let until = last.min(end);
            let from = piece.skip + (at - piece.logical) as usize;
            let bytes = &mut buffer[from..from + (until - at) as usize];
            let whole = at == first && until == last;
            if !whole || crc32fast::hash(bytes) != sums.sum(chunk)? {
                // The engine reads twice, knows whether it was changed, and says what is damaged.
                sums.reread(at, bytes).map_err(|error| {
                    let tensor = (self.tensor)(piece.tensor);
                    error.context(format!("load {tensor}: bytes {at}..{until} of {}", source.name()))
                })?;
            }
            at = until;
        }
        self.out.verify += started.elapsed();
        Ok(())
    }

    /// Starts copies of what is ready, about `unit` bytes to a batch.
    fn copy(&mut self, unit: usize) -> Result<()> {
        while !self.ready.is_empty() {
            let mut batch = Batch::new(Direction::ToDevice);
            let mut bytes = 0;
            while bytes < unit {
                let Some(Ready { piece, buffer }) = self.ready.pop() else { break };
                bytes += buffer.len();
                let number = batch.buffers.len() as u32;
                batch.parts.extend(self.pieces.parts[self.pieces.order[piece].parts.clone()].iter().map(
                    |part| Part {
                        buffer: number,
                        offset: part.offset as usize,
                        device: part.device,
                        len: part.len as usize,
                    },
                ));
                batch.buffers.push(buffer);
            }
            self.out.batches += 1;
            self.out.copies += batch.parts.len() as u64;
            start(&mut self.stream, batch, &mut self.free)?;
        }
        Ok(())
    }

    fn reap_copies(&mut self, wait: bool) -> Result<()> {
        let (free, done, pinner) = (&mut self.free, &mut self.done, &self.pinner);
        self.stream.reap(wait, &mut |mut batch| {
            *done += batch.len();
            free.append(&mut batch.buffers);
            if let Some(pinner) = pinner {
                pinner.give_back(std::mem::take(&mut batch.lent));
            }
        })?;
        Ok(())
    }

    /// Waits until nothing is under way.
    fn drain(&mut self) -> Result<()> {
        let mut failed = None;
        if let Some(queue) = &mut self.queue {
            while queue.in_flight() > 0 {
                if let Err(error) = queue.wait(1) {
                    failed = Some(Error::from(error));
                    break;
                }
                queue.reap(drop);
            }
            queue.reap(drop);
        }
        while self.stream.in_flight() > 0 {
            if let Err(error) = self.stream.reap(true, &mut drop) {
                // Dropping the stream waits for what it can.
                failed = failed.or(Some(error));
                break;
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// An error of a read, with the source, the place and the tensor.
    fn failed(&self, index: usize, error: nvme::Error) -> Error {
        let piece = &self.pieces.order[index];
        let source = &self.sources[piece.source as usize];
        let shrank = matches!(error.kind(), nvme::ErrorKind::ShortTransfer | nvme::ErrorKind::OutOfRange);
        let what = if shrank { "it became shorter while it was loaded: " } else { "" };
        let context = format!(
            "load {} from {}, bytes {}..{}: {what}{error}",
            (self.tensor)(piece.tensor),
            source.name(),
            piece.logical,
            piece.logical + (piece.needed - piece.skip) as u64,
        );
        let kind = Error::from(nvme::Error::new(error.kind(), "")).kind();
        let kind = if error.kind() == nvme::ErrorKind::Media { ErrorKind::Io } else { kind };
        Error::new(kind, context).with_source(error)
    }
}
