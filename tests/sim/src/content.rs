//! What a region should hold, and which of its chunks take space.

use std::sync::Arc;

use nvme::SimRng;

/// Bytes that differ everywhere and are the same for a seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = SimRng::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&rng.next_u64().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Content of a region. Copies share memory until one changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// All of it.
    pub bytes: Arc<Vec<u8>>,
    /// Which chunks take space on a member; the others are holes.
    pub stored: Arc<Vec<bool>>,
    /// That is not known: a call failed halfway for want of space.
    pub unsure: bool,
}

impl Content {
    /// Writes, extending where needed.
    pub fn write(&mut self, chunk: usize, offset: usize, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = offset + data.len();
        if end > self.bytes.len() {
            self.set_len(chunk, end);
        }
        Arc::make_mut(&mut self.bytes)[offset..end].copy_from_slice(data);
        Arc::make_mut(&mut self.stored)[offset / chunk..end.div_ceil(chunk)].fill(true);
    }

    /// Sets the size; new bytes are zeros.
    pub fn set_len(&mut self, chunk: usize, len: usize) {
        Arc::make_mut(&mut self.bytes).resize(len, 0);
        Arc::make_mut(&mut self.stored).resize(len.div_ceil(chunk), false);
    }

    /// Makes zeros of a range within the size: holes where whole chunks go.
    pub fn clear(&mut self, chunk: usize, offset: usize, end: usize) {
        let size = self.bytes.len();
        let end = end.min(size);
        if offset >= end {
            return;
        }
        Arc::make_mut(&mut self.bytes)[offset..end].fill(0);
        let first = offset.div_ceil(chunk);
        let last = if end == size { end.div_ceil(chunk) } else { end / chunk };
        if first < last {
            Arc::make_mut(&mut self.stored)[first..last].fill(false);
        }
    }

    /// Chunks that take space.
    pub fn chunks(&self) -> u64 {
        self.stored.iter().filter(|stored| **stored).count() as u64
    }
}
