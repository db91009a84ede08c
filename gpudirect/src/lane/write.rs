//! Device -> ring -> file: the way back, with the same ring, queue and kind of stream.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use nvme::{Buffer, Device, Op, Queue, Verb};

use super::read::Transfer;
use super::{Busy, Lane, start};
use crate::control::Control;
use crate::driver::{Batch, Direction, Part, Stream};
use crate::error::{Error, ErrorKind, Result};

/// A range of the file: of the head's bytes, or of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Offset in the file.
    pub at: u64,
    /// Where it is on the device; `None`: in the head, at the same offset.
    pub device: Option<u64>,
    /// Bytes, not 0.
    pub len: u64,
}

struct Work<'a> {
    target: &'a Arc<dyn Device>,
    head: &'a [u8],
    spans: &'a [Span],
    len: u64,
    chunk: u64,
    queue: Queue,
    stream: Box<dyn Stream>,
    free: Vec<Buffer>,
    /// Filled buffers with their offsets, to be written.
    ready: VecDeque<(u64, Buffer)>,
    /// First byte that no copy was started for.
    next: u64,
    /// The span that `next` is in.
    span: usize,
    done: u64,
}

impl Lane {
    /// Writes `len` bytes that are laid out by `spans`, in order and without gaps, to the start of `target`. The last block
    /// is written whole. Nothing is flushed.
    pub(crate) fn write(
        &mut self,
        target: &Arc<dyn Device>,
        head: &[u8],
        spans: &[Span],
        len: u64,
        control: &mut Control<'_>,
    ) -> Result<Transfer> {
        let started = Instant::now();
        control.check(0, len)?;
        let mut work = Work {
            target,
            head,
            spans,
            len,
            chunk: self.options.chunk as u64,
            queue: self.write_queue(target.alignment() == 1)?,
            stream: self.driver.stream()?,
            free: self.buffers(self.options.chunk)?,
            ready: VecDeque::new(),
            next: 0,
            span: 0,
            done: 0,
        };
        let mut out = Transfer { bytes: len, ..Transfer::default() };
        let result = work.run(control, &mut out);
        let drained = work.drain();
        result.and(drained)?;
        out.elapsed = started.elapsed();
        out.backend = work.queue.backend().to_string();
        out.fixed_buffers = work.queue.has_fixed_buffers();
        out.note = work.queue.note().map(str::to_owned);
        Ok(out)
    }
}

impl Work<'_> {
    fn run(&mut self, control: &mut Control<'_>, out: &mut Transfer) -> Result<()> {
        let (mut io, mut copies) = (Busy::default(), Busy::default());
        while self.done < self.len {
            control.check(self.done, self.len)?;
            self.copy()?;
            self.reap_copies(false)?;
            self.issue()?;
            self.queue.wait(0)?;
            self.reap_writes()?;
            let now = Instant::now();
            io.set(self.queue.in_flight() > 0, now);
            copies.set(self.stream.in_flight() > 0, now);
            if self.done >= self.len {
                break;
            }
            // The drive is the slow one: only when it has nothing to do is a copy waited for.
            if self.stream.in_flight() > 0
                && self.queue.in_flight() < self.queue.depth()
                && self.ready.is_empty()
            {
                self.reap_copies(true)?;
                out.copy_wait += now.elapsed();
            } else if self.queue.in_flight() > 0 {
                self.queue.wait(1)?;
                out.io_wait += now.elapsed();
            }
        }
        let now = Instant::now();
        io.set(false, now);
        copies.set(false, now);
        (out.io_busy, out.copy_busy) = (io.total, copies.total);
        Ok(())
    }

    /// Starts copies of the next chunks from the device.
    fn copy(&mut self) -> Result<()> {
        while self.next < self.len {
            let Some(mut buffer) = self.free.pop() else { break };
            let (at, end) = (self.next, (self.next + self.chunk).min(self.len));
            let mut parts = Vec::new();
            while let Some(span) = self.spans.get(self.span) {
                let (from, to) = (span.at.max(at), (span.at + span.len).min(end));
                if from < to {
                    let offset = (from - at) as usize;
                    let len = (to - from) as usize;
                    match span.device {
                        Some(device) => {
                            parts.push(Part { buffer: 0, offset, device: device + (from - span.at), len })
                        }
                        None => buffer[offset..offset + len]
                            .copy_from_slice(&self.head[from as usize..to as usize]),
                    }
                }
                if span.at + span.len > end {
                    break;
                }
                self.span += 1;
            }
            // Nobody's old bytes behind the end.
            let used = (end - at) as usize;
            let padded = used.next_multiple_of(4096).min(buffer.len());
            buffer[used..padded].fill(0);
            self.next = end;
            if parts.is_empty() {
                self.ready.push_back((at, buffer));
                continue;
            }
            let batch = Batch {
                direction: Direction::ToHost,
                buffers: vec![buffer],
                lent: Vec::new(),
                parts,
                tag: at,
            };
            start(&mut self.stream, batch, &mut self.free)?;
        }
        Ok(())
    }

    fn reap_copies(&mut self, wait: bool) -> Result<()> {
        let ready = &mut self.ready;
        self.stream.reap(wait, &mut |mut batch| {
            ready.extend(batch.buffers.pop().map(|buffer| (batch.tag, buffer)))
        })?;
        Ok(())
    }

    /// Starts writes of what is filled.
    fn issue(&mut self) -> Result<()> {
        let align = u64::from(self.target.alignment());
        while self.queue.in_flight() < self.queue.depth() {
            let Some((at, buffer)) = self.ready.pop_front() else { break };
            let used = self.chunk.min(self.len - at).next_multiple_of(align) as usize;
            let op = Op {
                verb: Verb::Write,
                device: self.target.clone(),
                offset: at,
                buffer: Some(buffer),
                range: 0..used,
                tag: at,
            };
            if let Err(refused) = self.queue.push(op) {
                let full = refused.error.kind().is_queue_full();
                if let Some(buffer) = refused.op.buffer {
                    self.ready.push_front((at, buffer));
                }
                if full {
                    break;
                }
                return Err(refused.error.into());
            }
        }
        Ok(())
    }

    fn reap_writes(&mut self) -> Result<()> {
        let mut failed = None;
        let (free, done, chunk, len) = (&mut self.free, &mut self.done, self.chunk, self.len);
        self.queue.reap(|completion| {
            free.extend(completion.op.buffer);
            let wanted = completion.op.range.len();
            match completion.result {
                Ok(count) if count == wanted => *done += chunk.min(len - completion.tag),
                Ok(count) => {
                    let context = format!("wrote {count} of {wanted} bytes at {}", completion.tag);
                    failed.get_or_insert(Error::new(ErrorKind::Io, context));
                }
                Err(error) => {
                    failed.get_or_insert(error.into());
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }

    fn drain(&mut self) -> Result<()> {
        while self.queue.in_flight() > 0 {
            self.queue.wait(1)?;
            self.queue.reap(drop);
        }
        while self.stream.in_flight() > 0 {
            self.stream.reap(true, &mut drop)?;
        }
        Ok(())
    }
}
