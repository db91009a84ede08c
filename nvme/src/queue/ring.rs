//! The io_uring backend.
//!
//! ```text
//! push      SQE into the ring's memory            no system call
//! submit    io_uring_enter(n, 0)                   one for all pushed
//! wait      io_uring_enter(n, min, GETEVENTS)      submits and waits in one
//! harvest   CQEs out of the ring's memory          no system call
//! ```
//!
//! **Who owns what.** Every SQE with an address (an NVMe command has its own within it) points into the buffer of the operation in the slab slot that its
//! `user_data` names. The slot keeps the operation until the CQE for it was seen, or it is leaked: closing a ring
//! does not stop transfers that the device has started.
//!
//! **Two widths.** NVMe commands need submission entries of 128 bytes, and the drive's whole answer completion entries of
//! 32. A ring has one width for all it carries, so a queue starts with the narrow one, which is the faster, and changes to a
//! wide one ([`WideRing`]) at the first operation on an NVMe character device.
//!
//! **Pulse.** One timeout operation is kept in the ring while something waits, which ends every quarter
//! deadline. It wakes the waiter and moves the slab's clock: deadlines cost nothing per operation.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, Fixed, FsyncFlags, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use nvme_sys::NVME_URING_CMD_IO;

use super::files::{self, FileTable};
use super::fixed::FixedBuffers;
use super::op::Verb;
use super::slab::{Slab, State, Step, TICKS};
use crate::buffer::Arena;
use crate::device::Target;
use crate::error::{Error, ErrorKind, Result};
use crate::passthrough::io::sqe_bytes;
use crate::passthrough::ioctl::Fault;

/// `user_data` of the pulse.
const PULSE: u64 = u64::MAX;
/// `user_data` of cancel requests.
const CANCEL: u64 = u64::MAX - 1;
/// Extra submission entries, for pulse and cancels.
const SPARE: u32 = 8;
/// How often a submit is retried that the kernel turns away for lack of memory while nothing is in flight.
const SUBMIT_RETRIES: u32 = 1000;

/// Submission entries of a width.
pub(super) trait Width: squeue::EntryMarker {
    /// The completion entries that go with it.
    type Completion: cqueue::EntryMarker;
    /// It can carry NVMe commands.
    const WIDE: bool;
    /// Such a command as an entry.
    fn command(entry: squeue::Entry128) -> Option<Self>;
}

impl Width for squeue::Entry {
    type Completion = cqueue::Entry;
    const WIDE: bool = false;
    fn command(_: squeue::Entry128) -> Option<Self> {
        None
    }
}

impl Width for squeue::Entry128 {
    type Completion = cqueue::Entry32;
    const WIDE: bool = true;
    fn command(entry: squeue::Entry128) -> Option<Self> {
        Some(entry)
    }
}

/// The ring that carries NVMe commands, too.
pub(super) type WideRing = Ring<squeue::Entry128>;

pub(super) struct Ring<S: Width = squeue::Entry> {
    /// Leaked, not closed, while the kernel holds operations.
    ring: ManuallyDrop<IoUring<S, S::Completion>>,
    enabled: bool,
    /// SQEs in the ring that the kernel has not taken.
    pending: u32,
    /// Of those, operations.
    pending_ops: usize,
    fixed: Option<FixedBuffers>,
    /// Why the arena is not registered.
    note: Option<String>,
    files: Option<FileTable>,
    pulse: Box<Timespec>,
    pulse_armed: bool,
    /// Polled rings know no timeout, fsync or fallocate operations.
    polled: bool,
    /// Flushes and discards of a polled ring, executed by submit.
    blocking: Vec<u32>,
    tick: Duration,
    /// For polled rings, which have no pulse.
    next_tick: Instant,
    /// Operations to issue again. Reused by `harvest`.
    again: Vec<u32>,
}

/// Makes a ring, with the best flags that this kernel takes.
fn setup<S: Width>(entries: u32, polled: bool) -> io::Result<IoUring<S, S::Completion>> {
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for attempt in 0..3 {
        let mut builder = IoUring::<S, S::Completion>::builder();
        // A child must not write into this ring's memory.
        builder.dontfork();
        if polled {
            builder.setup_iopoll();
        }
        match attempt {
            // 6.1: completions run when this thread asks, never as an interruption. R_DISABLED: the thread that
            // submits first, not the one that builds, becomes the owner.
            0 => builder.setup_single_issuer().setup_defer_taskrun().setup_r_disabled(),
            // 5.19: no inter-processor interrupts for completions.
            1 => builder.setup_coop_taskrun().setup_taskrun_flag(),
            _ => &mut builder,
        };
        match builder.build(entries) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

impl<S: Width> Ring<S> {
    pub(super) fn build(
        depth: u32,
        deadline: Duration,
        arena: Option<&Arena>,
        polled: bool,
        register_files: bool,
    ) -> Result<Ring<S>> {
        let entries = (depth + SPARE).next_power_of_two();
        let ring = setup(entries, polled).map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => {
                    ": refused by a seccomp profile (containers) or by sysctl kernel.io_uring_disabled"
                }
                Some(libc::ENOSYS) => ": this kernel has no io_uring",
                Some(libc::ENOMEM) => ": no memory, or RLIMIT_MEMLOCK is too small",
                _ => "",
            };
            Error::os(error, format!("io_uring_setup with {entries} entries{hint}"))
        })?;
        let enabled = !ring.params().is_setup_single_issuer();
        let tick = (deadline / TICKS).max(Duration::from_micros(250));
        let mut ring = Ring {
            ring: ManuallyDrop::new(ring),
            enabled,
            pending: 0,
            pending_ops: 0,
            fixed: None,
            note: None,
            files: None,
            pulse: Box::new(Timespec::from(tick)),
            pulse_armed: false,
            polled,
            blocking: Vec::new(),
            tick,
            next_tick: Instant::now() + tick,
            again: Vec::with_capacity(depth as usize),
        };
        if register_files && ring.ring.submitter().register_files_sparse(files::SLOTS).is_ok() {
            ring.files = Some(FileTable::default());
        }
        match arena.map(|arena| FixedBuffers::register(&ring.ring.submitter(), arena)) {
            Some(Ok(fixed)) => ring.fixed = Some(fixed),
            Some(Err(error)) => ring.go_without_fixed(&error),
            None => {}
        }
        Ok(ring)
    }

    #[cold]
    fn go_without_fixed(&mut self, error: &Error) {
        let cause = std::error::Error::source(error).map_or(String::new(), |source| format!(": {source}"));
        let note = format!("{error}{cause}");
        tracing::warn!("{note}");
        self.note = Some(note);
        // Operations in flight hold their own references to what was registered so far.
        self.fixed = None;
    }

    /// The arena's pages are pinned once, not per operation.
    pub(super) fn has_fixed_buffers(&self) -> bool {
        self.fixed.is_some()
    }

    /// Why the arena is not registered.
    pub(super) fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Puts the operation of this slot into the ring's memory.
    #[inline]
    pub(super) fn push(&mut self, slab: &mut Slab, index: u32) {
        if let Some(files) = &mut self.files {
            let entry = slab.entry(index);
            let slot = entry.op.as_ref().and_then(|op| files.find(&op.device));
            match slot {
                Some(slot) => entry.file = slot,
                None => slab.entry(index).file = self.register_file(slab, index),
            }
        }
        self.issue(slab, index);
    }

    /// Gives the device of this operation a slot. On any trouble the operation goes by its descriptor.
    #[cold]
    fn register_file(&mut self, slab: &mut Slab, index: u32) -> u32 {
        self.sweep_files();
        let (Some(files), Some(op)) = (&mut self.files, &slab.entry(index).op) else { return files::NONE };
        let fd = match op.device.target() {
            Target::Fd(fd) => fd,
            Target::Nvme(namespace) => namespace.fd,
            Target::Inline(_) => return files::NONE,
        };
        let Some(slot) = files.vacancy() else { return files::NONE };
        if let Err(error) = self.ring.submitter().register_files_update(slot, &[fd.as_raw_fd()]) {
            tracing::debug!("register {} with io_uring: {error}", op.device.name());
            return files::NONE;
        }
        files.assign(slot, &op.device);
        files.find(&op.device).unwrap_or(files::NONE)
    }

    /// Closes the ring's hold on files whose devices are gone.
    fn sweep_files(&mut self) {
        let Some(files) = &mut self.files else { return };
        while let Some(slot) = files.next_dead() {
            if let Err(error) = self.ring.submitter().register_files_update(slot, &[-1]) {
                tracing::debug!("unregister a file from io_uring: {error}");
                return;
            }
            files.vacate(slot);
        }
    }

    pub(super) fn forget(&mut self, device: &std::sync::Arc<dyn crate::device::Device>) {
        if let Some(files) = &mut self.files {
            files.doom(device);
        }
        self.sweep_files();
    }

    /// Builds the SQE for what is left to do of this slot's operation.
    fn issue(&mut self, slab: &mut Slab, index: u32) {
        let entry = slab.entry(index);
        let Some(op) = &entry.op else { return };
        let fd = match op.device.target() {
            Target::Fd(fd) => fd.as_raw_fd(),
            Target::Nvme(_) => return self.issue_command(slab, index),
            Target::Inline(_) => return,
        };
        if self.polled && matches!(op.verb, Verb::Flush | Verb::Discard) {
            self.blocking.push(index);
            return;
        }
        let mut refused = None;
        let sqe = match op.verb {
            Verb::Read | Verb::Write => {
                let Some(buffer) = &op.buffer else { return };
                let start = op.range.start + entry.done;
                let left = (entry.len - entry.done).min(op.device.max_transfer() as usize);
                let address = buffer.as_ptr().wrapping_add(start);
                let fixed = match &mut self.fixed {
                    Some(fixed) if fixed.id() == buffer.arena_id() => {
                        fixed.index(&self.ring.submitter(), address as usize, left)
                    }
                    _ => Ok(None),
                };
                let fixed = fixed.unwrap_or_else(|error| {
                    refused = Some(error);
                    None
                });
                let offset = op.offset + entry.done as u64;
                transfer(op.verb, fd, entry.file, address, left as u32, fixed, offset)
            }
            Verb::Flush => match entry.file {
                files::NONE => opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build(),
                slot => opcode::Fsync::new(Fixed(slot)).flags(FsyncFlags::DATASYNC).build(),
            },
            Verb::Discard => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let (offset, len) = (op.offset, entry.len as u64);
                match entry.file {
                    files::NONE => opcode::Fallocate::new(Fd(fd), len).offset(offset).mode(mode).build(),
                    slot => opcode::Fallocate::new(Fixed(slot), len).offset(offset).mode(mode).build(),
                }
            }
        };
        if let Some(error) = refused {
            self.go_without_fixed(&error);
        }
        self.enqueue_op(slab, index, &sqe.user_data(u64::from(index)).into());
    }

    fn enqueue_op(&mut self, slab: &mut Slab, index: u32, sqe: &S) {
        if self.enqueue(sqe) {
            self.pending_ops += 1;
        } else {
            // Only a kernel that takes nothing leaves the ring full after a submit.
            let error = Error::new(ErrorKind::Gone, "io_uring takes no more operations");
            self.finish(slab, index, Err(error), None);
        }
    }

    /// As `issue`, for an NVMe namespace: the drive's own commands.
    fn issue_command(&mut self, slab: &mut Slab, index: u32) {
        let entry = slab.entry(index);
        let Some(op) = &entry.op else { return };
        let Target::Nvme(namespace) = op.device.target() else { return };
        // A list of ranges would need memory of its own, and polled rings take no command without data.
        if op.verb == Verb::Discard || (self.polled && op.verb == Verb::Flush) {
            self.blocking.push(index);
            return;
        }
        let mut refused = None;
        let mut fixed = None;
        let (command, address, len) = match (op.verb, &op.buffer) {
            (Verb::Read | Verb::Write, Some(buffer)) => {
                let address = buffer.as_ptr().wrapping_add(op.range.start + entry.done) as usize;
                let len = entry.command_span(address);
                if let Some(arena) = self.fixed.as_mut().filter(|arena| arena.id() == buffer.arena_id()) {
                    match arena.index(&self.ring.submitter(), address, len) {
                        Ok(index) => fixed = index,
                        Err(error) => refused = Some(error),
                    }
                }
                let offset = op.offset + entry.done as u64;
                let command = match op.verb {
                    Verb::Read => namespace.read(offset, len),
                    _ => namespace.write(offset, len),
                };
                (command, address as u64, len as u32)
            }
            _ => (namespace.flush(), 0, 0),
        };
        let bytes = sqe_bytes(command, address, len);
        let entry = match entry.file {
            files::NONE => opcode::UringCmd80::new(Fd(namespace.fd.as_raw_fd()), NVME_URING_CMD_IO),
            slot => opcode::UringCmd80::new(Fixed(slot), NVME_URING_CMD_IO),
        };
        let sqe = entry.cmd(bytes).buf_index(fixed).build().user_data(u64::from(index));
        if let Some(error) = refused {
            self.go_without_fixed(&error);
        }
        match S::command(sqe) {
            Some(sqe) => self.enqueue_op(slab, index, &sqe),
            // The queue widens before it pushes.
            None => {
                let error = Error::new(ErrorKind::Unsupported, "an NVMe command on a ring that carries none");
                self.finish(slab, index, Err(error), None);
            }
        }
    }

    /// Room for one more SQE is made by submitting, should the ring be full.
    fn enqueue(&mut self, sqe: &S) -> bool {
        for _ in 0..2 {
            // SAFETY: an address in the SQE points into a buffer owned by a slab slot until its CQE is seen (see the
            // head of this file), or to `self.pulse`, which is boxed and lives as long as the ring.
            if unsafe { self.ring.submission().push(sqe) }.is_ok() {
                self.pending += 1;
                return true;
            }
            if self.flush(0).is_err() {
                return false;
            }
        }
        false
    }

    /// Gives the kernel every pending SQE.
    fn flush(&mut self, flags: u32) -> io::Result<()> {
        let mut retries = 0;
        while self.pending > 0 {
            match self.enter(0, flags) {
                Ok(0) | Err(Enter::Full) => {
                    // CQEs must be taken out, or memory must come back, before more goes in.
                    retries += 1;
                    if retries > SUBMIT_RETRIES {
                        return Err(io::Error::from_raw_os_error(libc::EAGAIN));
                    }
                    std::thread::yield_now();
                }
                Ok(_) | Err(Enter::Interrupted) => {}
                Err(Enter::Failed(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// io_uring_enter(2).
    fn enter(&mut self, min: u32, flags: u32) -> std::result::Result<u32, Enter> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings().map_err(Enter::Failed)?;
            self.enabled = true;
        }
        let fd: RawFd = self.ring.as_raw_fd();
        // SAFETY: the arguments are those of io_uring_enter(2) without an argument pointer; the SQEs the kernel reads
        // were checked in by `enqueue`.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                fd,
                self.pending,
                min,
                flags,
                std::ptr::null::<libc::c_void>(),
                0usize,
            )
        };
        if rc >= 0 {
            let taken = rc as u32;
            self.pending = self.pending.saturating_sub(taken);
            return Ok(taken);
        }
        let error = io::Error::last_os_error();
        Err(match error.raw_os_error() {
            Some(libc::EINTR) => Enter::Interrupted,
            Some(libc::EAGAIN | libc::EBUSY) => Enter::Full,
            _ => Enter::Failed(error),
        })
    }

    pub(super) fn submit(&mut self, slab: &mut Slab) -> Result<usize> {
        let count = self.take_pending_count() + self.run_blocking(slab);
        // GETEVENTS: what has finished meanwhile arrives, so that a caller who only submits and reaps gets on.
        match self.pending {
            0 if slab.active() > 0 => self.get_events(0)?,
            _ => self.flush(IORING_ENTER_GETEVENTS).map_err(enter_error)?,
        }
        Ok(count)
    }

    fn take_pending_count(&mut self) -> usize {
        std::mem::take(&mut self.pending_ops)
    }

    /// Flushes and discards of a polled ring.
    fn run_blocking(&mut self, slab: &mut Slab) -> usize {
        let blocking = std::mem::take(&mut self.blocking);
        for &index in &blocking {
            let result = match &mut slab.entry(index).op {
                Some(op) => super::threads::execute(op),
                None => continue,
            };
            let now = slab.now();
            self.finish(slab, index, result, now);
        }
        blocking.len()
    }

    /// Submits, and waits until `min` completions are ready or nothing is in flight any more.
    pub(super) fn wait(&mut self, slab: &mut Slab, min: usize) -> Result<()> {
        self.take_pending_count();
        self.run_blocking(slab);
        self.harvest(slab);
        if min == 0 {
            // Let finished operations arrive: with DEFER_TASKRUN that happens only on request.
            self.flush(0).map_err(enter_error)?;
            if slab.active() + slab.zombies() > 0 {
                self.get_events(0)?;
                self.harvest(slab);
            }
            return Ok(());
        }
        loop {
            let ready = slab.ready();
            // Looked at anew each time: an operation can end without an answer.
            let goal = min.min(ready + slab.active());
            if ready >= goal {
                return self.flush(0).map_err(enter_error);
            }
            self.arm_pulse();
            self.get_events((goal - ready) as u32)?;
            self.harvest(slab);
        }
    }

    /// One io_uring_enter that submits and waits.
    fn get_events(&mut self, min: u32) -> Result<()> {
        // A polled ring spins in the kernel: one completion at a time, so that the clock is looked at.
        let min = if self.polled { min.min(1) } else { min };
        match self.enter(min, IORING_ENTER_GETEVENTS) {
            Ok(_) | Err(Enter::Interrupted) => Ok(()),
            Err(Enter::Full) => {
                // Nothing could be submitted for now; what is in flight makes room.
                let pending = std::mem::take(&mut self.pending);
                let waited = self.enter(u32::from(min > 0 && self.pulse_armed), IORING_ENTER_GETEVENTS);
                self.pending = pending;
                match waited {
                    Err(Enter::Failed(error)) => Err(enter_error(error)),
                    _ => Ok(()),
                }
            }
            Err(Enter::Failed(error)) => Err(enter_error(error)),
        }
    }

    fn arm_pulse(&mut self) {
        if self.pulse_armed || self.polled {
            return;
        }
        let sqe = opcode::Timeout::new(&*self.pulse).build().user_data(PULSE);
        self.pulse_armed = self.enqueue(&sqe.into());
    }

    /// Moves answers from the ring to the slab. No system call unless something must be issued again.
    #[inline]
    pub(super) fn harvest(&mut self, slab: &mut Slab) {
        let mut ticked = false;
        let mut now = None;
        let mut read_clock = true;
        let Ring { ring, files, again, pulse_armed, .. } = self;
        for cqe in ring.completion() {
            let cqe: cqueue::Entry = cqe.into();
            match cqe.user_data() {
                PULSE => {
                    *pulse_armed = false;
                    ticked = true;
                }
                CANCEL => {}
                data => {
                    if read_clock {
                        now = slab.now();
                        read_clock = false;
                    }
                    let index = data as u32;
                    match judge::<S>(slab, index, cqe.result()) {
                        Step::Continue => again.push(index),
                        Step::Finish(result) => {
                            if let Some(files) = files {
                                files.release(slab.entry(index).file);
                            }
                            slab.finish(index, result, now);
                        }
                    }
                }
            }
        }
        if !self.again.is_empty() {
            let mut again = std::mem::take(&mut self.again);
            for index in again.drain(..) {
                self.issue(slab, index);
            }
            self.again = again;
        }
        if self.polled && Instant::now() >= self.next_tick {
            self.next_tick = Instant::now() + self.tick;
            ticked = true;
        }
        if ticked {
            self.tick(slab);
        }
    }

    #[cold]
    fn tick(&mut self, slab: &mut Slab) {
        let expired = slab.tick().to_vec();
        for index in expired {
            // Not to be found any more is fine (its CQE is on the way), and so is a transfer that cannot be cancelled:
            // the slab reports it a tick later.
            let sqe = opcode::AsyncCancel2::new(CancelBuilder::user_data(u64::from(index)))
                .build()
                .user_data(CANCEL);
            self.enqueue(&sqe.into());
        }
        self.sweep_files();
    }

    fn finish(&mut self, slab: &mut Slab, index: u32, result: Result<usize>, now: Option<Instant>) {
        if let Some(files) = &mut self.files {
            files.release(slab.entry(index).file);
        }
        slab.finish(index, result, now);
    }

    /// Closes the ring. Only while the kernel holds no operation.
    pub(super) fn close(&mut self) {
        // SAFETY: called once, from the queue's drop, which does not use the ring afterwards.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
    }
}

const IORING_ENTER_GETEVENTS: u32 = 1;

/// How io_uring_enter failed.
enum Enter {
    /// EINTR: again.
    Interrupted,
    /// EAGAIN or EBUSY: for want of memory, or because CQEs must be taken out first.
    Full,
    Failed(io::Error),
}

#[cold]
fn enter_error(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EEXIST) => {
            Error::os(error, "use a queue on another thread than the one that submitted first")
                .with_kind(ErrorKind::Invalid)
        }
        _ => Error::os(error, "io_uring_enter"),
    }
}

#[inline]
fn transfer(
    verb: Verb,
    fd: RawFd,
    slot: u32,
    address: *mut u8,
    len: u32,
    fixed: Option<u16>,
    offset: u64,
) -> squeue::Entry {
    match (verb, slot, fixed) {
        (Verb::Read, files::NONE, None) => opcode::Read::new(Fd(fd), address, len).offset(offset).build(),
        (Verb::Read, files::NONE, Some(b)) => {
            opcode::ReadFixed::new(Fd(fd), address, len, b).offset(offset).build()
        }
        (Verb::Read, _, None) => opcode::Read::new(Fixed(slot), address, len).offset(offset).build(),
        (Verb::Read, _, Some(b)) => {
            opcode::ReadFixed::new(Fixed(slot), address, len, b).offset(offset).build()
        }
        (_, files::NONE, None) => opcode::Write::new(Fd(fd), address, len).offset(offset).build(),
        (_, files::NONE, Some(b)) => opcode::WriteFixed::new(Fd(fd), address, len, b).offset(offset).build(),
        (_, _, None) => opcode::Write::new(Fixed(slot), address, len).offset(offset).build(),
        (_, _, Some(b)) => opcode::WriteFixed::new(Fixed(slot), address, len, b).offset(offset).build(),
    }
}

/// What a CQE means for its operation. The one place where `res` is decoded: negative is an errno.
#[inline]
fn judge<S: Width>(slab: &mut Slab, index: u32, res: i32) -> Step {
    let entry = slab.entry(index);
    if S::WIDE && res >= 0 && matches!(entry.op.as_ref().map(|op| op.device.target()), Some(Target::Nvme(_)))
    {
        return judge_command(entry, res);
    }
    if res >= 0 && entry.state == State::Active {
        let is_transfer = matches!(entry.op.as_ref().map(|op| op.verb), Some(Verb::Read | Verb::Write));
        return if is_transfer { entry.advance(res as usize) } else { Step::Finish(Ok(entry.len)) };
    }
    judge_odd(entry, res)
}

/// What a drive answered: 0, or its status (nvme_uring_cmd_end_io of Linux).
fn judge_command(entry: &mut super::slab::Entry, res: i32) -> Step {
    let Some(op) = &entry.op else {
        return Step::Finish(Err(Error::new(ErrorKind::Invalid, "an answer to no operation")));
    };
    if let Err(fault) = Fault::check(res) {
        return Step::Finish(Err(fault.error(op.describe())));
    }
    let (Verb::Read | Verb::Write, Some(buffer)) = (op.verb, &op.buffer) else {
        return Step::Finish(Ok(entry.len));
    };
    // A command is executed whole or not at all: what it moved is what was asked for.
    let address = buffer.as_ptr().wrapping_add(op.range.start + entry.done) as usize;
    entry.done += entry.command_span(address);
    if entry.done >= entry.len {
        return Step::Finish(Ok(entry.len));
    }
    if entry.state == State::Active {
        return Step::Continue;
    }
    let late = format!("{}: cancelled at its deadline", op.describe());
    Step::Finish(Err(Error::new(ErrorKind::Timeout, late)))
}

#[cold]
fn judge_odd(entry: &mut super::slab::Entry, res: i32) -> Step {
    let Some(op) = &entry.op else {
        return Step::Finish(Err(Error::new(ErrorKind::Invalid, "an answer to no operation")));
    };
    let late = || Error::new(ErrorKind::Timeout, format!("{}: cancelled at its deadline", op.describe()));
    if res < 0 {
        return match (-res, entry.state) {
            (libc::EAGAIN | libc::EINTR, State::Active) => Step::Continue,
            (libc::EAGAIN | libc::EINTR | libc::ECANCELED, _) if entry.state != State::Active => {
                Step::Finish(Err(late()))
            }
            // As the blocking helper: not every file system and drive can discard.
            (libc::EOPNOTSUPP, _) if op.verb == Verb::Discard => Step::Finish(Ok(entry.len)),
            (errno, _) => Step::Finish(Err(op.failed(io::Error::from_raw_os_error(errno)))),
        };
    }
    // Answered while it was being cancelled: whole is whole, anything less is late.
    let whole = !matches!(op.verb, Verb::Read | Verb::Write) || entry.done + res as usize >= entry.len;
    Step::Finish(if whole { Ok(entry.len) } else { Err(late()) })
}
