//! Reads of a large catalog in large pieces while it is loaded.
//!
//! Loading reads every page, in the order of the keys, one page of 4 KiB at a time: a million small regions are a hundred thousand reads, each a
//! trip to the drive. So while a large catalog is loaded, the block of 1 MiB around a page is read with it and kept until the load ends.
//! A block whose bytes are written meanwhile is forgotten; one that cannot be read is left alone, and the page is read by itself.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

const BLOCK: u64 = 1 << 20;
/// Most blocks kept: 1 GiB. What lies in others is read page by page.
const MOST: usize = 1024;

/// What a catalog knows of its backend.
#[derive(Debug, Default)]
pub(crate) struct Window {
    len: AtomicU64,
    open: AtomicBool,
    blocks: Mutex<Blocks>,
}

#[derive(Debug, Default)]
struct Blocks {
    held: HashMap<u64, Arc<[u8]>>,
    /// Rises with every write: a block read while one went on is not kept.
    writes: u64,
}

impl Window {
    /// Length of the catalog in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Relaxed)
    }

    /// From now on reads are answered from blocks.
    pub(crate) fn open(&self) {
        self.open.store(true, Relaxed);
    }

    /// From now on every read goes to the drive.
    pub(crate) fn close(&self) {
        self.open.store(false, Relaxed);
        self.blocks().held = HashMap::new();
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, from: u64, to: u64) {
        let mut blocks = self.blocks();
        blocks.writes += 1;
        blocks.held.retain(|block, _| (block + 1) * BLOCK <= from || block * BLOCK >= to);
    }
}

/// A backend with a window.
#[derive(Debug)]
pub(crate) struct Ahead {
    inner: Box<dyn StorageBackend>,
    window: Arc<Window>,
}

impl Ahead {
    pub(crate) fn new(inner: Box<dyn StorageBackend>, window: Arc<Window>) -> io::Result<Ahead> {
        window.close();
        window.len.store(inner.len()?, Relaxed);
        Ok(Ahead { inner, window })
    }

    /// The block, read where it is not held; `None` where it cannot be had.
    fn block(&self, block: u64) -> Option<Arc<[u8]>> {
        let writes = {
            let blocks = self.window.blocks();
            if let Some(held) = blocks.held.get(&block) {
                return Some(held.clone());
            }
            if blocks.held.len() >= MOST {
                return None;
            }
            blocks.writes
        };
        let start = block * BLOCK;
        let len = self.window.len().saturating_sub(start).min(BLOCK) as usize;
        let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, len).collect();
        self.inner.read(start, Arc::get_mut(&mut bytes)?).ok()?;
        let mut blocks = self.window.blocks();
        if blocks.writes != writes || !self.window.open.load(Relaxed) {
            return None;
        }
        Some(blocks.held.entry(block).or_insert(bytes).clone())
    }

    /// Whether all of `out` came from blocks.
    fn read_blocks(&self, offset: u64, out: &mut [u8]) -> bool {
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let Some(block) = self.block(at / BLOCK) else { return false };
            let within = (at % BLOCK) as usize;
            let Some(there) = block.get(within..).filter(|there| !there.is_empty()) else { return false };
            let now = there.len().min(out.len() - done);
            out[done..done + now].copy_from_slice(&there[..now]);
            done += now;
        }
        true
    }
}

impl StorageBackend for Ahead {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if self.window.open.load(Relaxed) && self.read_blocks(offset, out) {
            return Ok(());
        }
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let before = self.window.len();
        self.window.forget(len.min(before), u64::MAX);
        let done = self.inner.set_len(len);
        self.window.len.store(self.inner.len()?, Relaxed);
        self.window.forget(len.min(before), u64::MAX);
        done
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        self.window.forget(offset, end);
        let done = self.inner.write(offset, data);
        // Also what was read while the write went on.
        self.window.forget(offset, end);
        done
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use redb::backends::InMemoryBackend;

    use super::*;

    proptest! {
        /// With the window open or closed it behaves as what lies beneath.
        #[test]
        fn it_shows_what_lies_beneath(ops in proptest::collection::vec((0u64..(3 << 20), 0usize..9000, any::<u8>(), 0u8..6), 0..40)) {
            let window = Arc::new(Window::default());
            let ahead = Ahead::new(Box::new(InMemoryBackend::new()), window.clone()).unwrap();
            let mut model: Vec<u8> = Vec::new();
            for (offset, len, byte, what) in ops {
                let offset_in = offset.min(model.len() as u64);
                match what {
                    0 => window.open(),
                    1 => window.close(),
                    2 => {
                        ahead.set_len(offset).unwrap();
                        model.resize(offset as usize, 0);
                    }
                    3 => {
                        let len = len.min(model.len() - offset_in as usize);
                        ahead.write(offset_in, &vec![byte; len]).unwrap();
                        model[offset_in as usize..offset_in as usize + len].fill(byte);
                    }
                    _ => {
                        let len = len.min(model.len() - offset_in as usize);
                        let mut bytes = vec![0; len];
                        ahead.read(offset_in, &mut bytes).unwrap();
                        prop_assert_eq!(&bytes[..], &model[offset_in as usize..offset_in as usize + len]);
                    }
                }
                prop_assert_eq!(window.len(), model.len() as u64);
            }
            prop_assert!(ahead.read(model.len() as u64, &mut [0]).is_err());
        }
    }
}
