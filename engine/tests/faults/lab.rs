//! A small raw pool that is made once and copied into a simulated device for each run, behind a device that fails on order.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use engine::pool::DeviceHook;
use engine::{
    Access, Error, ErrorKind, FormatOptions, Handle, NewNode, NodeKind, OpenOptions, Pool, ROOT, Result,
};
use nvme::{Device, FaultDevice, FaultPlan, SimDevice, SimOptions};

pub const MIB: u64 = 1 << 20;
pub const CHUNK: u64 = 16 << 10;
/// Length of the image: 1 MiB of head, 16 MiB of catalog, the rest for data.
pub const LEN: u64 = 20 * MIB;
pub const ZONE: u64 = MIB;
pub const DATA: u64 = 17 * MIB;
const PAGE: u64 = 16 << 10;
/// Longer than anything a run may take: every wait has a deadline, and devices here answer in virtual time.
const LIMIT: Duration = Duration::from_secs(90);

/// Bytes that differ everywhere and are the same for a seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = nvme::SimRng::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(rng.next_u64().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn name(name: &str) -> &OsStr {
    OsStr::new(name)
}

pub fn create(pool: &Pool, at: &str) -> Result<u64> {
    let new = NewNode { kind: NodeKind::Region, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: None };
    Ok(pool.create(ROOT, name(at), &new)?.node)
}

pub fn write_all(handle: &Handle, offset: u64, data: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < data.len() {
        done += handle.write_at(offset + done as u64, &data[done..])?;
    }
    Ok(())
}

/// Makes or replaces a region; what `flush` tells is what `close(2)` would.
pub fn put(pool: &Pool, at: &str, data: &[u8]) -> Result<()> {
    let node = match pool.lookup(ROOT, name(at)) {
        Ok(attr) => attr.node,
        Err(_) => create(pool, at)?,
    };
    let handle = pool.open_region(node, Access::Write, true)?;
    write_all(&handle, 0, data)?;
    handle.flush()
}

/// All of a region; `None` where there is no such name.
pub fn get(pool: &Pool, at: &str) -> Result<Option<Vec<u8>>> {
    let attr = match pool.lookup(ROOT, name(at)) {
        Ok(attr) => attr,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let handle = pool.open_region(attr.node, Access::Read, false)?;
    let mut bytes = vec![0xee; handle.size() as usize];
    let mut done = 0;
    while done < bytes.len() {
        match handle.read_at(done as u64, &mut bytes[done..])? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(Some(bytes))
}

/// An image, as the pages of it that hold something.
pub struct Lab {
    _folder: tempfile::TempDir,
    pub path: PathBuf,
    pages: Vec<(u64, Vec<u8>)>,
}

impl Lab {
    /// Formats a pool, lets `fill` put something into it, and closes it.
    pub fn new(fill: impl FnOnce(&Pool)) -> Lab {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pool.img");
        let format = FormatOptions { size: Some(LEN), raw: true, ..FormatOptions::default() };
        Pool::format(&path, &format).unwrap();
        let pool = Pool::open(&path, &options()).unwrap();
        fill(&pool);
        pool.close().unwrap();
        let mut lab = Lab { _folder: folder, path, pages: Vec::new() };
        lab.capture();
        lab
    }

    fn capture(&mut self) {
        let bytes = fs::read(&self.path).unwrap();
        self.pages = (0..)
            .step_by(PAGE as usize)
            .zip(bytes.chunks(PAGE as usize))
            .filter(|(_, page)| page.iter().any(|byte| *byte != 0))
            .map(|(at, page)| (at, page.to_vec()))
            .collect();
    }

    /// Flips a bit of the image for all runs to come.
    pub fn scar(&mut self, offset: u64) {
        let page = self.pages.iter_mut().find(|(at, _)| *at == offset / PAGE * PAGE).unwrap();
        page.1[(offset % PAGE) as usize] ^= 1;
    }

    /// A device in memory with the image's bytes.
    pub fn device(&self) -> Arc<dyn Device> {
        let device = SimDevice::new(LEN, SimOptions { lba_size: 4096, ..SimOptions::default() }).unwrap();
        for (at, page) in &self.pages {
            device.write_at(*at, page).unwrap();
        }
        Arc::new(device)
    }
}

pub fn options() -> OpenOptions {
    OpenOptions { ram_bytes: MIB, commit_interval_ms: 0, ..OpenOptions::default() }
}

/// The pool's device is `below`, and goes wrong as `plan` says.
pub fn faulty(below: &Arc<dyn Device>, plan: &Arc<FaultPlan>) -> OpenOptions {
    let (below, plan) = (below.clone(), plan.clone());
    let hook =
        move |_: &Path, _| -> Arc<dyn Device> { Arc::new(FaultDevice::new(below.clone(), plan.clone())) };
    OpenOptions { device_hook: Some(DeviceHook::new(hook)), ..options() }
}

/// The same over the image file itself.
pub fn faulty_file(plan: &Arc<FaultPlan>) -> OpenOptions {
    let plan = plan.clone();
    let hook =
        move |_: &Path, device| -> Arc<dyn Device> { Arc::new(FaultDevice::new(device, plan.clone())) };
    OpenOptions { device_hook: Some(DeviceHook::new(hook)), ..options() }
}

/// An error that tells a person where to look: a device or a pool, and where on it or in what.
pub fn check_names_the_place(error: &Error, case: &str) {
    let text = error.chain();
    let place = ["sim:", "pool.img", "node "].iter().any(|word| text.contains(word));
    assert!(place, "{case}: an error that names no place: {:?} {text}", error.kind());
}

/// Ends the test program where a run does not end: a hang is a failure, and a thread cannot be stopped.
pub struct Watchdog(Sender<String>);

impl Watchdog {
    pub fn new() -> Watchdog {
        let (send, receive): (_, Receiver<String>) = channel();
        std::thread::spawn(move || {
            let mut case = String::from("the start");
            loop {
                match receive.recv_timeout(LIMIT) {
                    Ok(next) => case = next,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        eprintln!("hung: nothing happened for {} s in {case}", LIMIT.as_secs());
                        std::process::abort();
                    }
                }
            }
        });
        Watchdog(send)
    }

    pub fn begins(&self, case: &str) {
        self.0.send(case.to_owned()).unwrap();
    }
}
