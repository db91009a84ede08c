//! Source -> ring -> device.

use std::time::{Duration, Instant};

use nvme::{Buffer, Op, Queue, Verb};

use super::pieces::{Piece, Pieces};
use super::{Busy, Lane, Run, pieces, start};
use crate::control::Control;
use crate::driver::{Batch, Direction, Part, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// How a transfer went.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transfer {
    pub bytes: u64,
    pub read_bytes: u64,
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
    queue: Queue,
    stream: Box<dyn Stream>,
    free: Vec<Buffer>,
    ready: Vec<Ready>,
    next: usize,
    done: u64,
    out: Transfer,
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
        let pieces = pieces::plan(sources, runs, self.options.chunk, self.options.gap)?;
        control.check(0, pieces.copy_bytes)?;
        if pieces.order.is_empty() {
            return Ok(Transfer::default());
        }
        let used = |i: usize| pieces.order.iter().any(|piece| piece.source as usize == i);
        let cached =
            sources.iter().enumerate().filter(|(i, _)| used(*i)).all(|(_, source)| source.is_cached());
        let queue = self.queue(cached)?;
        let stream = self.driver.stream()?;
        let free = self.buffers(pieces.buffer_len.max(self.options.chunk))?;
        let mut work = Work {
            sources,
            pieces,
            tensor,
            queue,
            stream,
            free,
            ready: Vec::new(),
            next: 0,
            done: 0,
            out: Transfer::default(),
        };
        let result = work.run(self.options.copy_unit, control);
        // Whatever happened, nothing may be under way when the caller frees the memory on the device.
        let drained = work.drain();
        result.and(drained)?;
        let Work { mut out, queue, .. } = work;
        out.elapsed = started.elapsed();
        out.backend = queue.backend().to_string();
        out.fixed_buffers = queue.has_fixed_buffers();
        out.note = queue.note().map(str::to_owned);
        Ok(out)
    }
}

impl Work<'_> {
    fn run(&mut self, copy_unit: usize, control: &mut Control<'_>) -> Result<()> {
        let total = self.pieces.copy_bytes;
        (self.out.bytes, self.out.read_bytes) = (total, self.pieces.read_bytes);
        let (mut io, mut copies) = (Busy::default(), Busy::default());
        while self.done < total {
            control.check(self.done, total)?;
            self.issue()?;
            self.queue.wait(0)?;
            self.reap_reads()?;
            self.reap_copies(false)?;
            let gathered: usize = self.ready.iter().map(|ready| ready.buffer.len()).sum();
            let idle = self.stream.in_flight() == 0;
            if gathered > 0 && (idle || gathered >= copy_unit || self.queue.in_flight() == 0) {
                self.copy(copy_unit)?;
            }
            let now = Instant::now();
            io.set(self.queue.in_flight() > 0, now);
            copies.set(self.stream.in_flight() > 0, now);
            if self.done >= total {
                break;
            }
            let starved = self.free.is_empty() && self.next < self.pieces.order.len();
            if self.stream.in_flight() > 0 && (starved || self.queue.in_flight() == 0) {
                self.reap_copies(true)?;
                self.out.copy_wait += now.elapsed();
            } else if self.queue.in_flight() > 0 {
                self.queue.wait(1)?;
                self.out.io_wait += now.elapsed();
            } else if self.ready.is_empty()
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

    /// Starts reads while there are buffers and room in the queue.
    fn issue(&mut self) -> Result<()> {
        while self.next < self.pieces.order.len() && self.queue.in_flight() < self.queue.depth() {
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
            if let Err(refused) = self.queue.push(op) {
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
        self.queue.reap(|completion| {
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
            let mut batch =
                Batch::new(Direction::ToDevice);
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
        let (free, done) = (&mut self.free, &mut self.done);
        self.stream.reap(wait, &mut |mut batch| {
            *done += batch.len();
            free.append(&mut batch.buffers);
        })?;
        Ok(())
    }

    /// Waits until nothing is under way.
    fn drain(&mut self) -> Result<()> {
        let mut failed = None;
        while self.queue.in_flight() > 0 {
            if let Err(error) = self.queue.wait(1) {
                failed = Some(Error::from(error));
                break;
            }
            self.queue.reap(drop);
        }
        self.queue.reap(drop);
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
