//! A region of a pool, through the engine: what a client of the engine gets, checksums verified.
//!
//! The engine's calls block, so depth comes from threads: one for each operation in flight, each with a ring of its own
//! inside the engine.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use engine::{Access, Attr, Handle, MemberKind, NewNode, NodeKind, OpenOptions, Pool};
use nvme::Buffer;

use super::{Done, Files, IoEngine, Queued, Transfer, slot_buffers};
use crate::data;
use crate::error::{Error, ErrorKind, Result};
use crate::settings::{Direction, Settings};

/// A pool opened once for all workers of a phase.
#[derive(Debug)]
pub struct PoolSource {
    pool: Pool,
    path: PathBuf,
}

impl PoolSource {
    /// Opens the pool: this process becomes its owner.
    pub fn open(settings: &Settings, path: &Path) -> Result<PoolSource> {
        let options = OpenOptions {
            ram_bytes: settings.pool_ram_bytes,
            verify: if settings.pool_verify { engine::Verify::Always } else { engine::Verify::Never },
            ..OpenOptions::default()
        };
        let pool = Pool::open(path, &options)
            .map_err(|error| Error::engine(format!("cannot open the pool {}", path.display()), error))?;
        Ok(PoolSource { pool, path: path.to_path_buf() })
    }

    fn find(&self, region: &Path) -> Result<Option<Attr>> {
        match self.pool.resolve(name(region)?) {
            Ok(attr) => Ok(Some(attr)),
            Err(error) if error.kind() == engine::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error("cannot look up", region, error)),
        }
    }

    fn error(&self, what: &str, region: &Path, error: engine::Error) -> Error {
        Error::engine(format!("{what} {} in {}", region.display(), self.path.display()), error)
    }

    /// Length of a region, if it is there.
    pub fn len_of(&self, region: &Path) -> Result<Option<u64>> {
        Ok(self.find(region)?.map(|attr| attr.size))
    }

    /// Makes a region at least `len` bytes long, with incompressible content. Returns the bytes written.
    pub fn lay_out(&self, settings: &Settings, region: &Path, len: u64) -> Result<u64> {
        let fail = |error| self.error("cannot lay out", region, error);
        let attr = match self.find(region)? {
            Some(attr) if attr.size >= len => return Ok(0),
            Some(attr) => attr,
            None => self.create(region)?,
        };
        let handle = self.pool.open_region(attr.node, Access::Write, false).map_err(fail)?;
        let mut block = vec![0; 4 << 20];
        data::fill_random(&mut block, settings.randseed ^ len);
        let mut at = attr.size;
        while at < len {
            data::scramble(&mut block, at ^ settings.randseed);
            let part = (len - at).min(block.len() as u64) as usize;
            at += handle.write_at(at, &block[..part]).map_err(fail)? as u64;
        }
        handle.sync().map_err(fail)?;
        Ok(len - attr.size)
    }

    fn create(&self, region: &Path) -> Result<Attr> {
        let fail = |error| self.error("cannot create", region, error);
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let directory = match region.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => {
                self.pool.create_dirs(name(parent)?, uid, gid).map_err(fail)?.node
            }
            _ => engine::ROOT,
        };
        let file = region
            .file_name()
            .ok_or_else(|| Error::new(ErrorKind::Usage, format!("{} names no region", region.display())))?;
        let new = NewNode { kind: NodeKind::Region, mode: 0o644, uid, gid, rdev: 0, target: None };
        self.pool.create(directory, file, &new).map_err(fail)
    }

    fn handle(&self, region: &Path, access: Access) -> Result<Handle> {
        let attr = self.find(region)?.ok_or_else(|| {
            let text = format!("there is no region {} in {}", region.display(), self.path.display());
            Error::new(ErrorKind::NotFound, text)
        })?;
        self.pool
            .open_region(attr.node, access, false)
            .map_err(|error| self.error("cannot open", region, error))
    }

    /// Length of a region and a way to read it.
    pub fn reader(&self, region: &Path) -> Result<(u64, Box<crate::profile::ReadAt<'static>>)> {
        let handle = self.handle(region, Access::Read)?;
        let len = handle.size();
        let read_at = move |offset: u64, buffer: &mut [u8]| match handle.read_at(offset, buffer)? {
            read if read == buffer.len() => Ok(()),
            read => {
                let text = format!("{read} of {} bytes at {offset}", buffer.len());
                Err(engine::Error::new(engine::ErrorKind::OutOfRange, text))
            }
        };
        Ok((len, Box::new(read_at)))
    }

    /// A file or device on the pool's drive, at least 64 MiB long, for the sweep that finds the drive's ceiling.
    pub fn drive_path(&self) -> Option<PathBuf> {
        let info = self.pool.info();
        let path = info.members.iter().find_map(|member| match member.kind {
            MemberKind::Directory => largest_file(&member.path, 4),
            _ => Some((0, member.path.clone())),
        });
        path.map(|(_, path)| path).filter(|path| crate::layout::len_of(path).is_ok_and(|len| len >= 64 << 20))
    }
}

fn largest_file(directory: &Path, depth: u32) -> Option<(u64, PathBuf)> {
    let entries = std::fs::read_dir(directory).ok()?;
    entries
        .flatten()
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            if metadata.is_dir() && depth > 0 {
                return largest_file(&entry.path(), depth - 1);
            }
            metadata.is_file().then(|| (metadata.len(), entry.path()))
        })
        .max()
}

fn name(region: &Path) -> Result<&str> {
    region.to_str().ok_or_else(|| Error::new(ErrorKind::Usage, format!("{} is not UTF-8", region.display())))
}

struct Job {
    slot: u32,
    transfer: Transfer,
    buffer: Buffer,
}

type Finished = (u32, Buffer, Result<u32>);

pub struct PoolEngine {
    source: Arc<PoolSource>,
    handles: Arc<Vec<(Handle, PathBuf)>>,
    buffers: Vec<Option<Buffer>>,
    queued: Vec<Job>,
    jobs: Option<Sender<Job>>,
    finished: Receiver<Finished>,
    threads: Vec<JoinHandle<()>>,
}

impl PoolEngine {
    pub fn open(settings: &Settings, files: &Files, source: Arc<PoolSource>) -> Result<PoolEngine> {
        let access = if settings.pattern.write { Access::ReadWrite } else { Access::Read };
        let open = |path: &PathBuf| Ok((source.handle(path, access)?, path.clone()));
        let handles = Arc::new(files.paths.iter().map(open).collect::<Result<Vec<_>>>()?);
        let (jobs, taken) = channel::<Job>();
        let taken = Arc::new(Mutex::new(taken));
        let (done, finished) = channel();
        let mut threads = Vec::new();
        // One in flight needs no thread but this one.
        let count = if settings.iodepth == 1 { 0 } else { settings.iodepth };
        for index in 0..count {
            let (handles, taken, done) = (handles.clone(), taken.clone(), done.clone());
            let thread = std::thread::Builder::new()
                .name(format!("bench-pool-{index}"))
                .spawn(move || serve(&handles, &taken, &done))
                .map_err(|error| Error::io(format!("cannot start {count} threads"), error))?;
            threads.push(thread);
        }
        Ok(PoolEngine {
            source,
            handles,
            buffers: slot_buffers(settings, settings.iodepth)?.into_iter().map(Some).collect(),
            queued: Vec::with_capacity(settings.iodepth as usize),
            jobs: Some(jobs),
            finished,
            threads,
        })
    }

    fn take(&mut self, (slot, buffer, result): Finished, done: &mut Vec<Done>) {
        self.buffers[slot as usize] = Some(buffer);
        done.push(Done { slot, result });
    }
}

fn serve(handles: &[(Handle, PathBuf)], jobs: &Mutex<Receiver<Job>>, done: &Sender<Finished>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut job) = job else { return };
        let result = transfer(handles, &job.transfer, &mut job.buffer);
        if done.send((job.slot, job.buffer, result)).is_err() {
            return;
        }
    }
}

fn transfer(handles: &[(Handle, PathBuf)], transfer: &Transfer, buffer: &mut [u8]) -> Result<u32> {
    let (handle, path) = &handles[transfer.file as usize];
    let bytes = &mut buffer[..transfer.len as usize];
    let (verb, moved) = match transfer.direction {
        Direction::Read => ("read", handle.read_at(transfer.offset, bytes)),
        Direction::Write => ("write", handle.write_at(transfer.offset, bytes)),
    };
    moved.map(|moved| moved as u32).map_err(|error| {
        Error::engine(format!("cannot {verb} {} at {}", path.display(), transfer.offset), error)
    })
}

impl IoEngine for PoolEngine {
    fn buffer(&mut self, slot: u32) -> &mut [u8] {
        self.buffers[slot as usize].as_mut().expect("the slot is not in flight")
    }

    fn queue(&mut self, slot: u32, io: Transfer) -> Result<Queued> {
        let mut buffer = self.buffers[slot as usize].take().expect("the slot is not in flight");
        if self.threads.is_empty() {
            let result = transfer(&self.handles, &io, &mut buffer);
            self.buffers[slot as usize] = Some(buffer);
            return Ok(Queued::Finished(result));
        }
        self.queued.push(Job { slot, transfer: io, buffer });
        Ok(Queued::Started)
    }

    fn commit(&mut self) -> Result<()> {
        let jobs = self.jobs.as_ref().expect("open until dropped");
        for job in self.queued.drain(..) {
            jobs.send(job).map_err(|_| Error::new(ErrorKind::Io, "the pool's threads are gone"))?;
        }
        Ok(())
    }

    fn reap(&mut self, min: usize, done: &mut Vec<Done>) -> Result<()> {
        let before = done.len();
        while done.len() - before < min {
            let finished =
                self.finished.recv().map_err(|_| Error::new(ErrorKind::Io, "the pool's threads are gone"))?;
            self.take(finished, done);
        }
        while let Ok(finished) = self.finished.try_recv() {
            self.take(finished, done);
        }
        Ok(())
    }

    fn sync(&mut self, _data_only: bool) -> Result<()> {
        for (handle, path) in self.handles.iter() {
            handle.sync().map_err(|error| self.source.error("cannot sync", path, error))?;
        }
        Ok(())
    }

    fn is_synchronous(&self) -> bool {
        self.threads.is_empty()
    }
}

impl Drop for PoolEngine {
    fn drop(&mut self) {
        // Closing the channel ends the threads; they must be gone before the pool is closed.
        self.jobs = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("nvtier bench: a thread of the pool engine panicked");
            }
        }
    }
}
