//! Local files at the drive's speed: O_DIRECT reads through a ring, several in flight, handed on in order.
//!
//! A file that is in the page cache already is read from there: the drive would only be slower.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nvme::{Arena, ArenaOptions, Buffer, Device, DeviceOptions, FileDevice, Op, Queue, Verb, is_cached};

use crate::failure::{Failure, Outcome};

/// Bytes of one read: where the rate of NVMe drives levels off.
pub const BLOCK: usize = 1 << 20;
/// Reads in flight during an import; the writes need the drive, too.
pub const IMPORT_DEPTH: usize = 8;

/// Bytes of a file, in order.
pub struct DirectReader {
    queue: Queue,
    device: Arc<dyn Device>,
    /// For the unaligned tail, which O_DIRECT cannot read.
    file: File,
    name: String,
    len: u64,
    next_submit: u64,
    next_block: u64,
    waiting: VecDeque<Block>,
    free: Vec<Buffer>,
}

/// Some bytes of the file.
pub struct Block {
    offset: u64,
    start: usize,
    end: usize,
    buffer: Buffer,
}

impl Block {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }
}

impl DirectReader {
    /// Reads `path` from `offset` on with up to `depth` reads in flight.
    pub fn open(path: &Path, offset: u64, depth: usize) -> Outcome<Self> {
        let tried = || format!("open {}", path.display());
        let file = File::open(path).map_err(|error| Failure::io(tried(), &error))?;
        let len = file.metadata().map_err(|error| Failure::io(tried(), &error))?.len();
        let direct = DeviceOptions { direct: true, read_only: true };
        let buffered = DeviceOptions { direct: false, read_only: true };
        let device = if is_cached(&file, len) {
            FileDevice::open(path, &buffered)
        } else {
            // Some file systems know no O_DIRECT: then the page cache has to do.
            FileDevice::open(path, &direct).or_else(|_| FileDevice::open(path, &buffered))
        };
        let device: Arc<dyn Device> =
            Arc::new(device.map_err(|error| Failure::from(error).while_doing(tried()))?);
        // Huge pages where there are any: a block is one segment for the drive then, not 256.
        let arena = Arena::new(depth * BLOCK, ArenaOptions { prefault: false, ..ArenaOptions::default() })?;
        let queue = Queue::builder()
            .depth(depth.next_power_of_two() as u32)
            .arena(Some(&arena))
            .build()
            .map_err(|error| Failure::from(error).while_doing("set up a queue to read with"))?;
        let mut free = Vec::with_capacity(depth);
        for _ in 0..depth {
            free.push(arena.alloc(BLOCK).map_or_else(|| Buffer::heap(BLOCK), Ok)?);
        }
        let first = offset / BLOCK as u64 * BLOCK as u64;
        Ok(Self {
            queue,
            device,
            file,
            name: path.display().to_string(),
            len,
            next_submit: first,
            next_block: offset,
            waiting: VecDeque::new(),
            free,
        })
    }

    /// The next bytes; `None` at the end. Hand the block back to [`Self::recycle`], or memory is used up block by block.
    pub fn next(&mut self) -> Outcome<Option<Block>> {
        if self.next_block >= self.len {
            return Ok(None);
        }
        self.fill()?;
        let offset = self.next_block / BLOCK as u64 * BLOCK as u64;
        let index = loop {
            if let Some(index) = self.waiting.iter().position(|block| block.offset == offset) {
                break index;
            }
            self.queue.wait(1).map_err(|error| self.failure(error))?;
            self.reap()?;
            crate::interrupt::check()?;
        };
        let Some(mut block) = self.waiting.swap_remove_back(index) else {
            return Err(Failure::failed(format!("read {}: a block went missing", self.name)));
        };
        block.start = (self.next_block - offset) as usize;
        self.next_block = offset + block.end as u64;
        Ok(Some(block))
    }

    /// Takes a block's memory back.
    pub fn recycle(&mut self, block: Block) {
        self.free.push(block.buffer);
    }

    /// Submits as many reads as there are buffers.
    fn fill(&mut self) -> Outcome {
        let align = u64::from(self.device.lba_size());
        let mut pushed = false;
        while self.next_submit < self.len {
            let Some(mut buffer) = self.free.pop() else { break };
            let offset = self.next_submit;
            let len = (self.len - offset).min(BLOCK as u64);
            let aligned = len / align * align;
            self.next_submit += len;
            if aligned < len {
                // The last block: its tail is less than the drive's unit, so it goes through the page cache.
                self.file
                    .read_exact_at(&mut buffer[..len as usize], offset)
                    .map_err(|error| Failure::io(format!("read {}", self.name), &error))?;
                self.waiting.push_back(Block { offset, start: 0, end: len as usize, buffer });
                continue;
            }
            let op = Op {
                verb: Verb::Read,
                device: Arc::clone(&self.device),
                offset,
                buffer: Some(buffer),
                range: 0..len as usize,
                tag: offset,
            };
            if let Err(refused) = self.queue.push(op) {
                self.free.extend(refused.op.buffer);
                self.next_submit = offset;
                if refused.error.kind() == nvme::ErrorKind::QueueFull {
                    break;
                }
                return Err(self.failure(refused.error));
            }
            pushed = true;
        }
        if pushed {
            self.queue.submit().map_err(|error| self.failure(error))?;
            self.reap()?;
        }
        Ok(())
    }

    fn reap(&mut self) -> Outcome {
        let mut failed = None;
        let (waiting, free) = (&mut self.waiting, &mut self.free);
        self.queue.reap(|completion| {
            let end = completion.op.range.end;
            let Some(buffer) = completion.op.buffer else { return };
            match completion.result {
                Ok(count) if count == end => {
                    waiting.push_back(Block { offset: completion.tag, start: 0, end, buffer });
                }
                Ok(count) => {
                    free.push(buffer);
                    failed.get_or_insert(nvme::Error::new(
                        nvme::ErrorKind::ShortTransfer,
                        format!("{count} bytes of {end} at {}: did the file shrink?", completion.tag),
                    ));
                }
                Err(error) => {
                    free.push(buffer);
                    failed.get_or_insert(error);
                }
            }
        });
        match failed {
            Some(error) => Err(self.failure(error)),
            None => Ok(()),
        }
    }

    fn failure(&self, error: nvme::Error) -> Failure {
        Failure::from(error).while_doing(format!("read {}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|index| (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect()
    }

    fn read(path: &Path, offset: u64, depth: usize) -> Vec<u8> {
        let mut reader = DirectReader::open(path, offset, depth).unwrap();
        let mut all = Vec::new();
        while let Some(block) = reader.next().unwrap() {
            all.extend_from_slice(block.bytes());
            reader.recycle(block);
        }
        all
    }

    #[test]
    fn every_length_and_start_gives_the_bytes_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for len in [0, 1, 511, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5000] {
            let bytes = pattern(len);
            std::fs::write(&path, &bytes).unwrap();
            for offset in [0, 1.min(len), len / 2, len.saturating_sub(1), len] {
                for depth in [1, 3] {
                    assert!(
                        read(&path, offset as u64, depth) == bytes[offset..],
                        "{len} from {offset}, depth {depth}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_file_that_is_not_cached_is_read_directly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bytes = pattern(5 * BLOCK + 77);
        let file = File::create(&path).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(read(&path, 0, 4) == bytes);
    }
}
