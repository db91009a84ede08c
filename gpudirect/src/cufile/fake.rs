//! A simulated libcufile for tests: it reads files into the memory of the simulated device, and does what the real one may do
//! at its worst.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{CuFile, FileHandle, Properties, ReadCounts, names};
use crate::driver::fake::FakeDriver;
use crate::error::{Error, ErrorKind, Result};

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FakeMode {
    /// By nvidia-fs.
    #[default]
    NvidiaFs,
    /// By the kernel's peer-to-peer DMA.
    PeerToPeer,
    /// By compatibility mode, whatever the properties say.
    Compat,
}

/// How it behaves.
#[derive(Clone, Debug)]
pub struct FakeCuFileOptions {
    /// Which way the bytes go.
    pub mode: FakeMode,
    /// What the properties say of compatibility mode.
    pub compat_allowed: bool,
    /// The call of this number (registering, opening, reading) fails with `code`, counted from 1; 0: none.
    pub fail_call: u64,
    /// The error of that call.
    pub code: i32,
    /// No read moves more bytes than this; 0: no limit.
    pub short: usize,
    /// One byte of the read of this number is wrong, counted from 1; 0: none.
    pub wrong: u64,
    /// The read of this number says that it moved bytes, and moved none; 0: none.
    pub lost: u64,
    /// How long a read takes.
    pub delay: Duration,
    /// Whether it can count its reads.
    pub counts: bool,
    /// The root of the system that the test made up: reads in compatibility mode are counted in its `proc/self/io`. Empty: they
    /// leave no trace there.
    pub system: PathBuf,
}

impl Default for FakeCuFileOptions {
    fn default() -> FakeCuFileOptions {
        FakeCuFileOptions {
            mode: FakeMode::NvidiaFs,
            compat_allowed: false,
            fail_call: 0,
            code: 5030,
            short: 0,
            wrong: 0,
            lost: 0,
            delay: Duration::ZERO,
            counts: true,
            system: PathBuf::new(),
        }
    }
}

/// The library. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct FakeCuFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    device: FakeDriver,
    options: Mutex<FakeCuFileOptions>,
    calls: AtomicU64,
    reads: AtomicU64,
    files: AtomicU64,
    registered: Mutex<BTreeMap<u64, u64>>,
    compat: Mutex<()>,
    /// While it counts.
    counting: Mutex<Option<ReadCounts>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeCuFile {
    /// A library that reads into this device's memory.
    pub fn new(device: &FakeDriver, options: FakeCuFileOptions) -> FakeCuFile {
        FakeCuFile(Arc::new(Inner {
            device: device.clone(),
            options: Mutex::new(options),
            calls: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            files: AtomicU64::new(0),
            registered: Mutex::default(),
            compat: Mutex::default(),
            counting: Mutex::default(),
        }))
    }

    /// Behaves differently from now on; counting starts anew.
    pub fn set(&self, options: FakeCuFileOptions) {
        *locked(&self.0.options) = options;
        self.0.calls.store(0, Ordering::SeqCst);
        self.0.reads.store(0, Ordering::SeqCst);
    }

    /// Calls so far that could have been made to fail.
    pub fn calls(&self) -> u64 {
        self.0.calls.load(Ordering::SeqCst)
    }

    /// Reads so far.
    pub fn reads(&self) -> u64 {
        self.0.reads.load(Ordering::SeqCst)
    }

    /// What was not given back: files and registered memory. Empty when all was.
    pub fn leaks(&self) -> Vec<String> {
        let mut found = Vec::new();
        let files = self.0.files.load(Ordering::SeqCst);
        if files > 0 {
            found.push(format!("{files} files"));
        }
        let registered = locked(&self.0.registered).len();
        if registered > 0 {
            found.push(format!("{registered} ranges of memory"));
        }
        found
    }

    fn options(&self) -> FakeCuFileOptions {
        locked(&self.0.options).clone()
    }

    fn call(&self, what: &str) -> Result<()> {
        let number = self.0.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let options = self.options();
        if number == options.fail_call {
            return Err(names::error(&format!("{what}, told to fail"), options.code, 0));
        }
        Ok(())
    }

    /// What a `pread` leaves in the counters of the process.
    fn count_read(&self, len: usize) -> Result<()> {
        let _one = locked(&self.0.compat);
        let path = self.options().system.join("proc/self/io");
        if path.is_relative() {
            return Ok(());
        }
        let failed = |error| Error::io(format!("count in {}", path.display()), error);
        let text = std::fs::read_to_string(&path).map_err(failed)?;
        let before: u64 = text.trim().trim_start_matches("rchar:").trim().parse().unwrap_or(0);
        std::fs::write(&path, format!("rchar: {}\n", before + len as u64)).map_err(failed)
    }
}

impl CuFile for FakeCuFile {
    fn properties(&self) -> Result<Properties> {
        let options = self.options();
        Ok(Properties {
            library: "1.20".into(),
            nvidia_fs: (2, 30),
            nvme: true,
            nvme_p2p: options.mode == FakeMode::PeerToPeer,
            compat_allowed: options.compat_allowed,
            max_direct_io_bytes: 16 << 20,
            max_pinned_bytes: 32 << 30,
        })
    }

    fn open_file(&self, file: File, name: &str) -> Result<Box<dyn FileHandle>> {
        self.call(&format!("open {name}"))?;
        self.0.files.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeFile { library: self.clone(), file, name: name.to_owned() }))
    }

    fn register(&self, address: u64, len: u64) -> Result<()> {
        self.call("register")?;
        // Memory that is not there is refused.
        self.0.device.peek(address + len - 1, &mut [0])?;
        locked(&self.0.registered).insert(address, len);
        Ok(())
    }

    fn deregister(&self, address: u64) -> Result<()> {
        // The real one may hang for ever where the memory was freed before.
        self.0.device.peek(address, &mut [0])?;
        match locked(&self.0.registered).remove(&address) {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::Invalid, "deregister memory that is not registered")),
        }
    }

    fn count_reads(&self, on: bool) {
        *locked(&self.0.counting) = on.then(ReadCounts::default);
    }

    fn counted(&self) -> Option<ReadCounts> {
        if self.options().counts { *locked(&self.0.counting) } else { None }
    }
}

#[derive(Debug)]
struct FakeFile {
    library: FakeCuFile,
    file: File,
    name: String,
}

impl FakeFile {
    fn place(&self, base: u64, at: u64, len: usize) -> Result<u64> {
        let room = locked(&self.library.0.registered).get(&base).copied().unwrap_or(0);
        match at + len as u64 <= room && len > 0 {
            true => Ok(base + at),
            false => Err(Error::new(ErrorKind::Invalid, format!("{len} bytes at {at} of {room} registered"))),
        }
    }
}

impl FileHandle for FakeFile {
    fn read(&self, base: u64, at: u64, len: usize, offset: u64) -> Result<usize> {
        let library = &self.library;
        library.call(&format!("read {len} bytes at {offset} of {}", self.name))?;
        let (number, options) = (library.0.reads.fetch_add(1, Ordering::SeqCst) + 1, library.options());
        let place = self.place(base, at, len)?;
        std::thread::sleep(options.delay);
        let len = if options.short > 0 { len.min(options.short) } else { len };
        // The descriptor may be O_DIRECT, which wants an aligned buffer; the drive of a simulation need not.
        let file = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file)))
            .map_err(|error| Error::io(format!("open {}", self.name), error))?;
        let mut bytes = vec![0; len];
        let mut count = 0;
        while count < len {
            match file.read_at(&mut bytes[count..], offset + count as u64) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(error) => return Err(Error::io(format!("read {}", self.name), error)),
            }
        }
        if let Some(counts) = &mut *locked(&library.0.counting) {
            counts.total += 1;
            match options.mode {
                FakeMode::NvidiaFs => counts.nvidia_fs += 1,
                FakeMode::PeerToPeer => counts.peer_to_peer += 1,
                FakeMode::Compat => counts.posix += 1,
            }
        }
        if options.mode == FakeMode::Compat {
            library.count_read(count)?;
        }
        if number == options.wrong
            && let Some(byte) = bytes[..count].last_mut()
        {
            *byte ^= 1;
        }
        if number != options.lost {
            library.0.device.poke(place, &bytes[..count])?;
        }
        Ok(count)
    }

    fn write(&self, base: u64, at: u64, len: usize, offset: u64) -> Result<usize> {
        self.library.call(&format!("write {len} bytes at {offset} of {}", self.name))?;
        let place = self.place(base, at, len)?;
        let mut bytes = vec![0; len];
        self.library.0.device.peek(place, &mut bytes)?;
        let failed = |error| Error::io(format!("write {}", self.name), error);
        self.file.write_all_at(&bytes, offset).map_err(failed)?;
        Ok(len)
    }
}

impl Drop for FakeFile {
    fn drop(&mut self) {
        self.library.0.files.fetch_sub(1, Ordering::SeqCst);
    }
}
