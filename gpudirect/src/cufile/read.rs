//! Sources -> staging slots on the device -> their places, by a few threads that each have one read in flight.
//!
//! ```text
//! drive -> staging slot (an aligned superset, registered) -> copies on the device -> tensors
//! ```
//!
//! Tensors start anywhere in a file; reads that are not aligned would be bounced inside cuFile. So whole blocks go to a slot,
//! and what is wanted of them is copied on at the speed of the device's own memory. Bytes that belong to no tensor never
//! touch one.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nvme::Target;
use rustix::fs::OFlags;

use super::{CuFile, CuFileOptions, FileHandle, Staging};
use crate::admission::Admission;
use crate::control::Control;
use crate::driver::{DeviceCopy, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::lane::pieces::{self, Piece, Pieces};
use crate::lane::{Run, Transfer};
use crate::source::Source;

/// How often the caller is asked whether to go on while no read ends.
const POLL: Duration = Duration::from_millis(50);

/// The files of a load, given to cuFile.
#[derive(Debug)]
pub(crate) struct Files(Vec<Vec<Box<dyn FileHandle>>>);

impl Files {
    /// Opens every extent of every source once more, past the page cache, and gives it to cuFile.
    pub fn open(cufile: &Arc<dyn CuFile>, sources: &[Source]) -> Result<Files> {
        let of_source = |source: &Source| {
            let extents = source.stored.iter();
            extents
                .map(|extent| {
                    let name = source.name();
                    let Target::Fd(fd) = extent.device.target() else {
                        let context = format!("read {name} by cuFile: it is not made of files");
                        return Err(Error::new(ErrorKind::Unsupported, context));
                    };
                    cufile.open_file(reopen(fd.as_raw_fd(), name)?, name)
                })
                .collect::<Result<Vec<_>>>()
        };
        sources.iter().map(of_source).collect::<Result<Vec<_>>>().map(Files)
    }
}

/// The same file by a descriptor of its own, with O_DIRECT.
pub(super) fn reopen(fd: i32, name: &str) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(format!("/proc/self/fd/{fd}"))
        .map_err(|error| Error::io(format!("open {name} with O_DIRECT for cuFile"), error))
}

struct Work<'a> {
    driver: &'a Arc<dyn Driver>,
    sources: &'a [Source],
    files: &'a Files,
    pieces: &'a Pieces,
    staging: &'a Staging,
    tensor: &'a (dyn Fn(u32) -> String + Sync),
    admission: &'a Admission,
    next: AtomicUsize,
    stop: AtomicBool,
}

/// Copies all runs to the device. On an error nothing is under way any more when it returns.
#[allow(clippy::too_many_arguments)] // one caller
pub(crate) fn read(
    driver: &Arc<dyn Driver>,
    cufile: &Arc<dyn CuFile>,
    options: CuFileOptions,
    sources: &[Source],
    files: &Files,
    runs: &[Run],
    gap: u64,
    tensor: &(dyn Fn(u32) -> String + Sync),
    control: &mut Control<'_>,
) -> Result<(Transfer, u64)> {
    let started = Instant::now();
    let pieces = pieces::plan(sources, runs, options.chunk, gap)?;
    control.check(0, pieces.copy_bytes)?;
    if pieces.order.is_empty() {
        return Ok((Transfer::default(), 0));
    }
    let threads = options.threads.clamp(1, pieces.order.len().min(64) as u32);
    let slot = pieces.buffer_len.max(1) as u64;
    let staging = Staging::new(driver, cufile, slot, threads)?;
    let admission = Admission::enter(control.priority);
    let work = Work {
        driver,
        sources,
        files,
        pieces: &pieces,
        staging: &staging,
        tensor,
        admission: &admission,
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
    };
    let mut out = Transfer {
        bytes: pieces.copy_bytes,
        read_bytes: pieces.read_bytes,
        reads: pieces.order.len() as u64,
        batches: pieces.order.len() as u64,
        copies: pieces.parts.len() as u64,
        backend: format!("cuFile, {threads} threads"),
        ..Transfer::default()
    };
    let (mut done, total) = (0u64, pieces.copy_bytes);
    let mut result = Ok(());
    std::thread::scope(|scope| {
        let (sender, receiver) = channel::<Result<Step>>();
        let mut started = 0;
        for slot in 0..threads {
            let (work, sender) = (&work, sender.clone());
            let thread = std::thread::Builder::new()
                .name(format!("nvtier-cufile-{slot}"))
                .spawn_scoped(scope, move || work.run(slot, &sender));
            match thread {
                Ok(_) => started += 1,
                Err(error) if started == 0 => result = Err(Error::io("start a thread for reads", error)),
                // Fewer are slower, not wrong.
                Err(_) => break,
            }
        }
        drop(sender);
        loop {
            match receiver.recv_timeout(POLL) {
                Ok(Ok(step)) => {
                    done += step.bytes;
                    out.io_busy += step.read;
                    out.copy_busy += step.copy;
                }
                Ok(Err(error)) => {
                    work.stop.store(true, Ordering::Relaxed);
                    // The first error is the cause.
                    result = std::mem::replace(&mut result, Ok(())).and(Err(error));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if result.is_ok()
                && let Err(error) = control.check(done, total)
            {
                work.stop.store(true, Ordering::Relaxed);
                result = Err(error);
            }
        }
    });
    result?;
    if done != total {
        let context = format!("{done} of {total} bytes were copied, and nothing is left to do");
        return Err(Error::new(ErrorKind::Device, context));
    }
    control.check(done, total)?;
    // Threads wait for one thing at a time: their sums, spread over them, are what this thread waited for.
    out.io_busy /= threads;
    out.copy_busy /= threads;
    (out.io_wait, out.copy_wait) = (out.io_busy, out.copy_busy);
    out.elapsed = started.elapsed();
    Ok((out, staging.len()))
}

/// A piece that arrived.
struct Step {
    bytes: u64,
    read: Duration,
    copy: Duration,
}

impl Work<'_> {
    fn run(&self, slot: u32, sender: &Sender<Result<Step>>) {
        if let Err(error) = self.driver.enter() {
            let _ = sender.send(Err(error));
            return;
        }
        while !self.stop.load(Ordering::Relaxed) {
            if self.admission.paused() {
                self.admission.wait();
                continue;
            }
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = self.pieces.order.get(index) else { return };
            let step = self.piece(piece, slot).map_err(|error| self.failed(piece, error));
            let failed = step.is_err();
            if sender.send(step).is_err() || failed {
                return;
            }
        }
    }

    fn piece(&self, piece: &Piece, slot: u32) -> Result<Step> {
        let started = Instant::now();
        let Some(stored) = piece.stored else {
            return Err(Error::new(ErrorKind::Unsupported, "it has a hole, which cuFile cannot read"));
        };
        let file = &self.files.0[piece.source as usize][stored as usize];
        let (base, at) = (self.staging.base(), self.staging.at(slot));
        let mut came = 0;
        while came < piece.needed {
            let offset = piece.device_offset + came as u64;
            match file.read(base, at + came as u64, piece.read_len - came, offset)? {
                0 => {
                    let context = format!("{came} bytes came, {} were needed", piece.needed);
                    return Err(Error::new(ErrorKind::Changed, context));
                }
                count => came += count,
            }
        }
        let read = started.elapsed();
        let parts = &self.pieces.parts[piece.parts.clone()];
        let moves: Vec<DeviceCopy> = parts
            .iter()
            .map(|part| DeviceCopy {
                from: base + at + u64::from(part.offset),
                to: part.device,
                len: u64::from(part.len),
            })
            .collect();
        self.driver.copy_within(&moves)?;
        let bytes = moves.iter().map(|one| one.len).sum();
        Ok(Step { bytes, read, copy: started.elapsed() - read })
    }

    fn failed(&self, piece: &Piece, error: Error) -> Error {
        let source = &self.sources[piece.source as usize];
        let shrank =
            if error.kind() == ErrorKind::Changed { ": it became shorter while it was loaded" } else { "" };
        let end = piece.logical + (piece.needed - piece.skip) as u64;
        let name = (self.tensor)(piece.tensor);
        error.context(format!("load {name} from {}, bytes {}..{end}{shrank}", source.name(), piece.logical))
    }
}
