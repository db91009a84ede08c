//! The fallback where io_uring is refused: threads that call pread and pwrite. Same promises, more CPU.
//!
//! A worker owns the operation while it executes it, so an operation that hangs keeps its memory for as long as
//! the system call lasts, whatever became of the queue.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::op::{Op, Verb};
use super::slab::{Short, Slab, TICKS, advance_short};
use crate::device::Target;
use crate::error::{Error, ErrorKind, Result};
use crate::passthrough::{NvmeTarget, io, ioctl};

/// More threads than this gain nothing on one device, and cost stacks.
const THREADS_MAX: usize = 64;

struct Job {
    index: u32,
    op: Op,
}

struct Answer {
    index: u32,
    op: Op,
    result: Result<usize>,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    more: Condvar,
    answers: Mutex<Vec<Answer>>,
    answered: Condvar,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Threads {
    shared: Arc<Shared>,
    /// Pushed, not yet submitted.
    pushed: Vec<u32>,
    /// Reused by `harvest`.
    inbox: Vec<Answer>,
    started: usize,
    max: usize,
    tick: Duration,
    next_tick: Instant,
}

impl Threads {
    pub(super) fn new(depth: u32, deadline: Duration) -> Threads {
        let tick = deadline / TICKS;
        Threads {
            shared: Arc::default(),
            pushed: Vec::with_capacity(depth as usize),
            inbox: Vec::with_capacity(depth as usize),
            started: 0,
            max: (depth as usize).min(THREADS_MAX),
            tick,
            next_tick: Instant::now() + tick,
        }
    }

    pub(super) fn push(&mut self, index: u32) {
        self.pushed.push(index);
    }

    pub(super) fn submit(&mut self, slab: &mut Slab) -> Result<usize> {
        let count = self.pushed.len();
        if count == 0 {
            return Ok(0);
        }
        let mut jobs = locked(&self.shared.jobs);
        for index in self.pushed.drain(..) {
            let entry = slab.entry(index);
            if let Some(op) = entry.op.take() {
                // What a timeout without an answer is reported with, should it come to that.
                entry.op = Some(op.without_buffer());
                jobs.waiting.push_back(Job { index, op });
            }
        }
        let missing = jobs.waiting.len().saturating_sub(jobs.idle).min(self.max - self.started);
        drop(jobs);
        self.shared.more.notify_all();
        for _ in 0..missing {
            let shared = self.shared.clone();
            let spawned = std::thread::Builder::new()
                .name("nvtier-io".into())
                .stack_size(256 << 10)
                .spawn(move || work(&shared));
            match spawned {
                Ok(_) => self.started += 1,
                Err(error) if self.started == 0 => {
                    self.withdraw_all(slab);
                    return Err(Error::os(error, "start a thread for I/O; the process limit may be reached"));
                }
                Err(_) => break,
            }
        }
        Ok(count)
    }

    /// Moves answers to the slab. Never blocks.
    pub(super) fn harvest(&mut self, slab: &mut Slab) {
        std::mem::swap(&mut self.inbox, &mut *locked(&self.shared.answers));
        if !self.inbox.is_empty() {
            let now = slab.now();
            for Answer { index, op, result } in self.inbox.drain(..) {
                slab.entry(index).op = Some(op);
                slab.finish(index, result, now);
            }
        }
        let now = Instant::now();
        if now >= self.next_tick {
            self.next_tick = now + self.tick;
            let expired: Vec<u32> = slab.tick().to_vec();
            for index in expired {
                self.cancel(slab, index);
            }
        }
    }

    /// Waits for an answer, or a tick.
    pub(super) fn wait(&mut self) {
        let answers = locked(&self.shared.answers);
        if !answers.is_empty() {
            return;
        }
        let left = self.next_tick.saturating_duration_since(Instant::now());
        drop(self.shared.answered.wait_timeout(answers, left).unwrap_or_else(PoisonError::into_inner));
    }

    /// What no worker took yet can be had back; what one executes cannot be interrupted.
    fn cancel(&self, slab: &mut Slab, index: u32) {
        let mut jobs = locked(&self.shared.jobs);
        let Some(at) = jobs.waiting.iter().position(|job| job.index == index) else { return };
        if let Some(Job { op, .. }) = jobs.waiting.remove(at) {
            drop(jobs);
            let error =
                Error::new(ErrorKind::Timeout, format!("{}: not started before the deadline", op.describe()));
            slab.entry(index).op = Some(op);
            slab.finish(index, Err(error), slab.now());
        }
    }

    fn withdraw_all(&self, slab: &mut Slab) {
        let jobs: Vec<Job> = locked(&self.shared.jobs).waiting.drain(..).collect();
        for Job { index, op } in jobs {
            let error =
                Error::new(ErrorKind::NoMemory, format!("{}: no thread to execute it", op.describe()));
            slab.entry(index).op = Some(op);
            slab.finish(index, Err(error), slab.now());
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Not joined: one may hang in the kernel. Each ends when its system call does, and frees what it owns.
        locked(&self.shared.jobs).closed = true;
        self.shared.more.notify_all();
    }
}

fn work(shared: &Shared) {
    loop {
        let mut jobs = locked(&shared.jobs);
        let job = loop {
            if let Some(job) = jobs.waiting.pop_front() {
                break job;
            }
            if jobs.closed {
                return;
            }
            jobs.idle += 1;
            jobs = shared.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            jobs.idle -= 1;
        };
        drop(jobs);
        let Job { index, mut op } = job;
        let result = execute(&mut op);
        locked(&shared.answers).push(Answer { index, op, result });
        shared.answered.notify_one();
    }
}

/// The whole operation, on this thread.
pub(super) fn execute(op: &mut Op) -> Result<usize> {
    match op.verb {
        Verb::Flush => return op.device.flush().map(|()| 0),
        Verb::Discard => return op.device.discard(op.offset, op.range.len() as u64).map(|()| op.range.len()),
        Verb::Read | Verb::Write => {}
    }
    let device = op.device.clone();
    if let Target::Nvme(namespace) = device.target() {
        return execute_commands(op, namespace, device.max_transfer() as usize, device.lba_size() as usize);
    }
    let Target::Fd(fd) = device.target() else {
        return Err(Error::new(ErrorKind::Invalid, format!("{}: not a descriptor", op.describe())));
    };
    let mut done = 0;
    while done < op.range.len() {
        let before = done;
        let got = transfer(op, fd, done, device.max_transfer() as usize)?;
        done += got;
        if done < op.range.len() && (got == 0 || done % device.alignment() as usize != 0) {
            match advance_short(op, before, done)? {
                Short::End(total) => return Ok(total),
                Short::Resume(at) => done = at,
            }
        }
    }
    Ok(done)
}

/// The whole operation in the drive's own commands.
fn execute_commands(op: &mut Op, namespace: NvmeTarget<'_>, max: usize, lba: usize) -> Result<usize> {
    let mut done = 0;
    while done < op.range.len() {
        let (start, offset, verb) = (op.range.start + done, op.offset + done as u64, op.verb);
        let end = op.range.end;
        let Some(buffer) = op.buffer.as_mut() else {
            return Err(Error::new(ErrorKind::Invalid, format!("{}: it has no buffer", op.describe())));
        };
        let len = io::span(buffer.as_ptr() as usize + start, end - start, max, lba);
        let part = &mut buffer[start..start + len];
        match verb {
            Verb::Read => ioctl::io_read(namespace.fd, namespace.read(offset, len), part),
            _ => ioctl::io_write(namespace.fd, namespace.write(offset, len), part),
        }
        .map_err(|fault| fault.error(op.describe()))?;
        done += len;
    }
    Ok(done)
}

fn transfer(op: &mut Op, fd: BorrowedFd<'_>, done: usize, max: usize) -> Result<usize> {
    let start = op.range.start + done;
    let end = op.range.end.min(start.saturating_add(max));
    let offset = op.offset + done as u64;
    loop {
        let Some(buffer) = op.buffer.as_mut() else {
            return Err(Error::new(ErrorKind::Invalid, format!("{}: it has no buffer", op.describe())));
        };
        let result = match op.verb {
            Verb::Read => rustix::io::pread(fd, &mut buffer[start..end], offset),
            _ => rustix::io::pwrite(fd, &buffer[start..end], offset),
        };
        match result {
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(op.failed(error.into())),
            Ok(got) => return Ok(got),
        }
    }
}
