//! `nvme::Queue`: the same ring the pool uses, with registered files and buffers and one submit a batch.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nvme::{Arena, ArenaOptions, Backend, Buffer, Device, DeviceOptions, Op, Queue, Verb};

use super::{Done, Files, IoEngine, Queued, Transfer};
use crate::error::{Error, ErrorKind, Result};
use crate::settings::{Direction, EngineKind, Settings};

/// A drive that has not answered for this long counts as failed.
const DEADLINE: Duration = Duration::from_secs(60);

pub struct UringEngine {
    devices: Vec<(Arc<dyn Device>, PathBuf)>,
    queue: Queue,
    slots: Vec<Option<Op>>,
    arena_note: Option<String>,
}

impl UringEngine {
    pub fn open(settings: &Settings, files: &Files) -> Result<UringEngine> {
        let options = DeviceOptions { direct: settings.direct, read_only: !settings.pattern.write };
        let open = |path: &PathBuf| {
            let device = nvme::open(path, &options)
                .map_err(|error| Error::nvme(format!("cannot open {}", path.display()), error))?;
            Ok((device, path.clone()))
        };
        let devices = files.paths.iter().map(open).collect::<Result<Vec<_>>>()?;
        let block = settings.max_block_bytes() as usize;
        let bytes = block.next_multiple_of(4096) * settings.iodepth as usize;
        let arena = Arena::new(bytes, ArenaOptions { huge: true, prefault: true, lock: false })
            .map_err(|error| Error::nvme(format!("cannot allocate {bytes} bytes of buffers"), error))?;
        let mut builder = Queue::builder()
            .depth(settings.iodepth)
            .deadline(DEADLINE)
            .passthrough(settings.engine == EngineKind::IoUringCmd)
            .iopoll(settings.hipri)
            .measure_latency(false);
        if settings.fixedbufs {
            builder = builder.arena(Some(&arena));
        }
        let queue = builder.build().map_err(|error| Error::nvme("cannot set up io_uring", error))?;
        let slots = (0..settings.iodepth)
            .map(|slot| {
                let buffer = arena.alloc(block).ok_or_else(|| {
                    Error::new(ErrorKind::Io, format!("arena of {bytes} bytes has no room for {block} more"))
                })?;
                Ok(Some(Op {
                    verb: Verb::Read,
                    device: devices[0].0.clone(),
                    offset: 0,
                    buffer: Some(buffer),
                    range: 0..block,
                    tag: u64::from(slot),
                }))
            })
            .collect::<Result<_>>()?;
        let arena_note = (queue.backend() != Backend::IoUring).then(|| {
            "io_uring is refused here (container or old kernel): a pool of threads does the I/O".to_owned()
        });
        Ok(UringEngine { devices, queue, slots, arena_note })
    }

    fn collect(&mut self, done: &mut Vec<Done>) {
        let (slots, devices) = (&mut self.slots, &self.devices);
        self.queue.reap(|completion| {
            let slot = completion.tag as u32;
            let op = completion.op;
            let result = completion.result.map(|moved| moved as u32).map_err(|error| {
                let path =
                    devices.iter().find(|(device, _)| Arc::ptr_eq(device, &op.device)).map(|(_, path)| path);
                let path =
                    path.map_or_else(|| op.device.name().to_owned(), |path| path.display().to_string());
                Error::nvme(format!("cannot {:?} {path} at {}", op.verb, op.offset).to_lowercase(), error)
            });
            slots[slot as usize] = Some(op);
            done.push(Done { slot, result });
        });
    }
}

impl IoEngine for UringEngine {
    fn buffer(&mut self, slot: u32) -> &mut [u8] {
        let op = self.slots[slot as usize].as_mut().expect("the slot is not in flight");
        let buffer: &mut Buffer = op.buffer.as_mut().expect("every slot has a buffer");
        buffer
    }

    fn queue(&mut self, slot: u32, transfer: Transfer) -> Result<Queued> {
        let mut op = self.slots[slot as usize].take().expect("the slot is not in flight");
        op.verb = match transfer.direction {
            Direction::Read => Verb::Read,
            Direction::Write => Verb::Write,
        };
        let device = &self.devices[transfer.file as usize].0;
        if !Arc::ptr_eq(&op.device, device) {
            op.device = device.clone();
        }
        op.offset = transfer.offset;
        op.range = 0..transfer.len as usize;
        if transfer.offset + u64::from(transfer.len) > device.known_len() && op.verb == Verb::Read {
            // The last block of a file may be cut short: ask for no more than the queue takes there.
            let end = device.len().next_multiple_of(u64::from(device.lba_size()));
            op.range.end = op.range.end.min(end.saturating_sub(transfer.offset) as usize);
        }
        match self.queue.push(op) {
            Ok(()) => Ok(Queued::Started),
            Err(refused) => {
                self.slots[slot as usize] = Some(refused.op);
                Ok(Queued::Finished(Err(Error::nvme(
                    format!("the queue refused {} bytes at {}", transfer.len, transfer.offset),
                    refused.error,
                ))))
            }
        }
    }

    fn commit(&mut self) -> Result<()> {
        self.queue.submit().map(drop).map_err(|error| Error::nvme("cannot submit", error))
    }

    fn reap(&mut self, min: usize, done: &mut Vec<Done>) -> Result<()> {
        if min > 0 {
            self.queue.wait(min).map_err(|error| Error::nvme("cannot wait for completions", error))?;
        }
        self.collect(done);
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
        self.arena_note.clone()
    }
}
