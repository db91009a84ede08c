//! `cufile`: between a file and a device's memory by NVIDIA's cuFile, one thread for each operation in flight.
//!
//! Its calls block. It runs only where the self-test of `nvtier load` found every byte right; compatibility mode is refused.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use gpudirect::cufile::{FileHandle, Staging};
use gpudirect::{CachePolicy, Control, Driver, Lane, LaneOptions, PathOptions, Paths, Source};

use super::device::open_driver;
use super::{Done, Files, IoEngine, Queued, Transfer, slot_buffers};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::open_file;
use crate::settings::{Direction, Settings};

/// The most threads, and so operations in flight.
const DEPTH_MAX: u32 = 64;

struct Shared {
    driver: Arc<dyn Driver>,
    files: Vec<(Box<dyn FileHandle>, PathBuf)>,
    staging: Staging,
}

impl Shared {
    fn transfer(&self, slot: u32, transfer: &Transfer) -> Result<u32> {
        let (file, path) = &self.files[transfer.file as usize];
        let (base, at, len) = (self.staging.base(), self.staging.at(slot), transfer.len as usize);
        let (verb, moved) = match transfer.direction {
            Direction::Read => ("read", file.read(base, at, len, transfer.offset)),
            Direction::Write => ("write", file.write(base, at, len, transfer.offset)),
        };
        moved.map(|moved| moved as u32).map_err(|error| {
            Error::gpu(format!("cannot {verb} {} at {}", path.display(), transfer.offset), error)
        })
    }
}

pub struct CuFileEngine {
    shared: Arc<Shared>,
    paths: Vec<PathBuf>,
    /// Not what is transferred: for whoever asks for a slot's buffer.
    buffers: Vec<nvme::Buffer>,
    queued: Vec<(u32, Transfer)>,
    jobs: Option<Sender<(u32, Transfer)>>,
    finished: Receiver<Done>,
    threads: Vec<JoinHandle<()>>,
    note: String,
}

impl CuFileEngine {
    pub fn open(settings: &Settings, files: &Files) -> Result<CuFileEngine> {
        if settings.iodepth > DEPTH_MAX {
            let text =
                format!("ioengine=cufile needs a thread for each in flight: iodepth is at most {DEPTH_MAX}");
            return Err(Error::new(ErrorKind::Usage, text));
        }
        let driver = open_driver(settings)?;
        let failed = |error| Error::gpu("ioengine=cufile", error);
        let sources = files
            .paths
            .iter()
            .map(|path| Source::file(path, CachePolicy::Direct))
            .collect::<gpudirect::Result<Vec<_>>>()
            .map_err(failed)?;
        let options = LaneOptions { ring: 64 << 20, ..LaneOptions::default() };
        let mut lane = Lane::new(driver.clone(), options).map_err(failed)?;
        let (cufile, way) = Paths::here()
            .cufile(&mut lane, &sources, &PathOptions::default(), &mut Control::default())
            .map_err(failed)?;
        let mut opened = Vec::new();
        for path in &files.paths {
            let file = open_file(path, settings.pattern.write, true)?;
            opened.push((cufile.open_file(file, &path.display().to_string()).map_err(failed)?, path.clone()));
        }
        let staging =
            Staging::new(&driver, &cufile, settings.max_block_bytes(), settings.iodepth).map_err(failed)?;
        let shared = Arc::new(Shared { driver, files: opened, staging });
        let (jobs, taken) = channel::<(u32, Transfer)>();
        let taken = Arc::new(Mutex::new(taken));
        let (done, finished) = channel();
        let mut threads = Vec::new();
        for index in 0..settings.iodepth {
            let (shared, taken, done) = (shared.clone(), taken.clone(), done.clone());
            let thread = std::thread::Builder::new()
                .name(format!("bench-cufile-{index}"))
                .spawn(move || serve(&shared, &taken, &done))
                .map_err(|error| Error::io(format!("cannot start {} threads", settings.iodepth), error))?;
            threads.push(thread);
        }
        Ok(CuFileEngine {
            shared,
            paths: files.paths.clone(),
            buffers: slot_buffers(settings, settings.iodepth)?,
            queued: Vec::with_capacity(settings.iodepth as usize),
            jobs: Some(jobs),
            finished,
            threads,
            note: format!("the way is {way}"),
        })
    }
}

fn serve(shared: &Shared, jobs: &Mutex<Receiver<(u32, Transfer)>>, done: &Sender<Done>) {
    let entered = shared.driver.enter().map_err(|error| error.to_string());
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((slot, transfer)) = job else { return };
        let result = match &entered {
            Ok(()) => shared.transfer(slot, &transfer),
            Err(error) => Err(Error::new(ErrorKind::Io, error.clone())),
        };
        if done.send(Done { slot, result }).is_err() {
            return;
        }
    }
}

impl IoEngine for CuFileEngine {
    fn buffer(&mut self, slot: u32) -> &mut [u8] {
        &mut self.buffers[slot as usize]
    }

    fn queue(&mut self, slot: u32, transfer: Transfer) -> Result<Queued> {
        self.queued.push((slot, transfer));
        Ok(Queued::Started)
    }

    fn commit(&mut self) -> Result<()> {
        let jobs = self.jobs.as_ref().expect("open until dropped");
        for job in self.queued.drain(..) {
            jobs.send(job).map_err(|_| Error::new(ErrorKind::Io, "cuFile's threads are gone"))?;
        }
        Ok(())
    }

    fn reap(&mut self, min: usize, done: &mut Vec<Done>) -> Result<()> {
        let before = done.len();
        while done.len() - before < min {
            let one =
                self.finished.recv().map_err(|_| Error::new(ErrorKind::Io, "cuFile's threads are gone"))?;
            done.push(one);
        }
        done.extend(self.finished.try_iter());
        Ok(())
    }

    fn sync(&mut self, data_only: bool) -> Result<()> {
        for path in &self.paths {
            let file = open_file(path, true, false)?;
            let synced = if data_only { file.sync_data() } else { file.sync_all() };
            synced.map_err(|error| Error::io(format!("cannot sync {}", path.display()), error))?;
        }
        Ok(())
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn note(&self) -> Option<String> {
        Some(self.note.clone())
    }
}

impl Drop for CuFileEngine {
    fn drop(&mut self) {
        // Closing the channel ends the threads; they must be gone before the memory is.
        self.jobs = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("nvtier bench: a thread of the cufile engine panicked");
            }
        }
        debug_assert_eq!(Arc::strong_count(&self.shared), 1);
    }
}
