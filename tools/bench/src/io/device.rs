//! `bounce` and `vram-write`: between a file and a device's memory by pinned buffers, as `nvtier load` and `--save` go.
//!
//! A transfer is a read and a copy to the device, or a copy from it and a write; it is done when both are. Both halves run
//! beside those of other slots.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use gpudirect::{Batch, DeviceMemory, Direction as Way, Driver, Lane, LaneOptions, Part, Stream};
use nvme::{Arena, ArenaOptions, Backend, Buffer, Device, DeviceOptions, Op, Queue, Verb};

use super::{Done, Files, IoEngine, Queued, Transfer};
use crate::data;
use crate::error::{Error, ErrorKind, Result};
use crate::settings::{Direction, Settings};

/// A drive that has not answered for this long counts as failed.
const DEADLINE: Duration = Duration::from_secs(60);

/// Opens the device that `device=` names.
pub fn open_driver(settings: &Settings) -> Result<Arc<dyn Driver>> {
    gpudirect::driver::open(&settings.device)
        .map_err(|error| Error::gpu(format!("ioengine={}", settings.engine.name()), error))
}

/// Memory of the device for all slots, filled with bytes that no drive can shorten.
pub fn device_memory(settings: &Settings, driver: &Arc<dyn Driver>, block: u64) -> Result<DeviceMemory> {
    let bytes = block * u64::from(settings.iodepth);
    let failed = |error| {
        Error::gpu(format!("cannot take {bytes} bytes of {} for iodepth x bs", settings.device), error)
    };
    let memory = DeviceMemory::new(driver, bytes).map_err(failed)?;
    let options = LaneOptions { chunk: 256 << 10, ring: 1 << 20, ..LaneOptions::default() };
    let lane = Lane::new(driver.clone(), options).map_err(failed)?;
    let mut random = vec![0; block as usize];
    data::fill_random(&mut random, settings.randseed ^ bytes);
    for slot in 0..u64::from(settings.iodepth) {
        data::scramble(&mut random, slot ^ settings.randseed);
        lane.write_device(memory.address() + slot * block, &random).map_err(failed)?;
    }
    Ok(memory)
}

pub struct DeviceEngine {
    driver: Arc<dyn Driver>,
    memory: DeviceMemory,
    arena: Arena,
    devices: Vec<(Arc<dyn Device>, PathBuf)>,
    queue: Queue,
    /// None only while the engine is dropped.
    stream: Option<Box<dyn Stream>>,
    block: u64,
    buffers: Vec<Option<Buffer>>,
    transfers: Vec<Transfer>,
    queued: Vec<u32>,
    note: Option<String>,
}

impl DeviceEngine {
    pub fn open(settings: &Settings, files: &Files) -> Result<DeviceEngine> {
        let driver = open_driver(settings)?;
        let options = DeviceOptions { direct: settings.direct, read_only: !settings.pattern.write };
        let open = |path: &PathBuf| {
            let device = nvme::open(path, &options)
                .map_err(|error| Error::nvme(format!("cannot open {}", path.display()), error))?;
            Ok((device, path.clone()))
        };
        let devices = files.paths.iter().map(open).collect::<Result<Vec<_>>>()?;
        let block = settings.max_block_bytes().next_multiple_of(4096);
        let bytes = block as usize * settings.iodepth as usize;
        let failed = |error| Error::nvme(format!("cannot allocate {bytes} bytes of buffers"), error);
        let arena =
            Arena::new(bytes, ArenaOptions { huge: true, prefault: true, lock: false }).map_err(failed)?;
        let mut builder = Queue::builder().depth(settings.iodepth).deadline(DEADLINE).measure_latency(false);
        if settings.fixedbufs {
            builder = builder.arena(Some(&arena));
        }
        let queue = builder.build().map_err(|error| Error::nvme("cannot set up io_uring", error))?;
        let memory = device_memory(settings, &driver, block)?;
        let pinned = |error| Error::gpu(format!("cannot pin {bytes} bytes of buffers"), error);
        driver.pin(&arena).map_err(pinned)?;
        let note = (queue.backend() != Backend::IoUring).then(|| {
            "io_uring is refused here (container or old kernel): a pool of threads does the I/O".to_owned()
        });
        // From here on Drop unpins.
        let mut engine = DeviceEngine {
            driver,
            memory,
            arena,
            devices,
            queue,
            stream: None,
            block,
            buffers: Vec::new(),
            transfers: vec![
                Transfer { direction: Direction::Read, file: 0, offset: 0, len: 0 };
                settings.iodepth as usize
            ],
            queued: Vec::with_capacity(settings.iodepth as usize),
            note,
        };
        engine.stream = Some(engine.driver.stream().map_err(pinned)?);
        for _ in 0..settings.iodepth {
            let buffer = engine.arena.alloc(settings.max_block_bytes() as usize).ok_or_else(|| {
                Error::new(ErrorKind::Io, format!("arena of {bytes} bytes has no room for {block} more"))
            })?;
            engine.buffers.push(Some(buffer));
        }
        Ok(engine)
    }

    fn stream(&mut self) -> &mut Box<dyn Stream> {
        self.stream.as_mut().expect("open until dropped")
    }

    /// Starts a slot's copy of `len` bytes.
    fn copy(&mut self, slot: u32, buffer: Buffer, direction: Way, len: usize) -> Result<()> {
        let device = self.memory.address() + u64::from(slot) * self.block;
        let part = Part { buffer: 0, offset: 0, device, len };
        let batch =
            Batch { buffers: vec![buffer], parts: vec![part], tag: u64::from(slot), ..Batch::new(direction) };
        self.stream().copy(batch).map_err(|refused| Error::gpu("cannot start a copy", refused.error))
    }

    /// Starts a slot's transfer of the file.
    fn transfer(&mut self, slot: u32, buffer: Buffer, done: &mut Vec<Done>) {
        let transfer = self.transfers[slot as usize];
        let (device, _) = &self.devices[transfer.file as usize];
        let verb = if transfer.direction == Direction::Read { Verb::Read } else { Verb::Write };
        let mut len = transfer.len as usize;
        if verb == Verb::Read && transfer.offset + u64::from(transfer.len) > device.known_len() {
            // The last block of a file may be cut short.
            let end = device.len().next_multiple_of(u64::from(device.lba_size()));
            len = len.min(end.saturating_sub(transfer.offset) as usize);
        }
        let op = Op {
            verb,
            device: device.clone(),
            offset: transfer.offset,
            buffer: Some(buffer),
            range: 0..len,
            tag: u64::from(slot),
        };
        if let Err(refused) = self.queue.push(op) {
            self.buffers[slot as usize] = refused.op.buffer;
            let what = format!("the queue refused {len} bytes at {}", transfer.offset);
            done.push(Done { slot, result: Err(Error::nvme(what, refused.error)) });
        }
    }

    /// Takes what has ended, and starts second halves.
    fn step(&mut self, wait_for_copy: bool, done: &mut Vec<Done>) -> Result<()> {
        let mut ended = Vec::new();
        self.queue.reap(|completion| ended.push(completion));
        for completion in ended {
            let slot = completion.tag as u32;
            let transfer = self.transfers[slot as usize];
            let Some(buffer) = completion.op.buffer else { continue };
            match completion.result {
                Ok(moved) if transfer.direction == Direction::Read && moved > 0 => {
                    self.copy(slot, buffer, Way::ToDevice, moved)?;
                }
                result => {
                    self.buffers[slot as usize] = Some(buffer);
                    let path = &self.devices[transfer.file as usize].1;
                    let result = result.map(|moved| moved as u32).map_err(|error| {
                        let what = format!(
                            "cannot {:?} {} at {}",
                            completion.op.verb,
                            path.display(),
                            transfer.offset
                        );
                        Error::nvme(what.to_lowercase(), error)
                    });
                    done.push(Done { slot, result });
                }
            }
        }
        let mut copied = Vec::new();
        let reaped = self.stream().reap(wait_for_copy, &mut |batch| copied.push(batch));
        for mut batch in copied {
            let slot = batch.tag as u32;
            let Some(buffer) = batch.buffers.pop() else { continue };
            match batch.direction {
                Way::ToDevice => {
                    self.buffers[slot as usize] = Some(buffer);
                    done.push(Done { slot, result: Ok(batch.len() as u32) });
                }
                Way::ToHost => self.transfer(slot, buffer, done),
            }
        }
        reaped.map_err(|error| Error::gpu("cannot copy", error))?;
        self.queue.submit().map(drop).map_err(|error| Error::nvme("cannot submit", error))
    }
}

impl IoEngine for DeviceEngine {
    fn buffer(&mut self, slot: u32) -> &mut [u8] {
        self.buffers[slot as usize].as_mut().expect("the slot is not in flight")
    }

    fn queue(&mut self, slot: u32, transfer: Transfer) -> Result<Queued> {
        self.transfers[slot as usize] = transfer;
        self.queued.push(slot);
        Ok(Queued::Started)
    }

    fn commit(&mut self) -> Result<()> {
        let mut refused = Vec::new();
        for slot in std::mem::take(&mut self.queued) {
            let buffer = self.buffers[slot as usize].take().expect("the slot is not in flight");
            let transfer = self.transfers[slot as usize];
            match transfer.direction {
                Direction::Read => self.transfer(slot, buffer, &mut refused),
                Direction::Write => self.copy(slot, buffer, Way::ToHost, transfer.len as usize)?,
            }
        }
        if let Some(Done { result: Err(error), .. }) = refused.pop() {
            return Err(error);
        }
        self.queue.submit().map(drop).map_err(|error| Error::nvme("cannot submit", error))
    }

    fn reap(&mut self, min: usize, done: &mut Vec<Done>) -> Result<()> {
        let before = done.len();
        self.step(false, done)?;
        while done.len() - before < min {
            let copies = self.stream().in_flight() > 0;
            if !copies {
                if self.queue.in_flight() == 0 {
                    return Err(Error::new(ErrorKind::Io, "nothing is in flight, and more was waited for"));
                }
                self.queue.wait(1).map_err(|error| Error::nvme("cannot wait for completions", error))?;
            }
            // Copies are short beside transfers: while there are any, they are what is waited for.
            self.step(copies, done)?;
        }
        Ok(())
    }

    fn sync(&mut self, _data_only: bool) -> Result<()> {
        for (device, path) in &self.devices {
            device.flush().map_err(|error| Error::nvme(format!("cannot sync {}", path.display()), error))?;
        }
        Ok(())
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn note(&self) -> Option<String> {
        self.note.clone()
    }
}

impl Drop for DeviceEngine {
    fn drop(&mut self) {
        // Waits for copies: the buffers they use must not be unpinned under them.
        self.stream = None;
        if let Err(error) = self.driver.unpin(&self.arena) {
            eprintln!("nvtier bench: {error}");
            std::mem::forget(self.arena.clone());
        }
    }
}
