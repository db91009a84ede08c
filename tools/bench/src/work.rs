//! What a worker is to do: the sequence of transfers that `rw`, `bs`, `size`, `offset` and a profile ask for.

use std::sync::Arc;

use crate::io::Transfer;
use crate::offsets::{Order, Request, Rng, mix};
use crate::settings::{Amount, Direction, Settings};

/// The part of the files one worker uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Number of files.
    pub files: u64,
    /// First byte used in each.
    pub offset: u64,
    /// Bytes used of each.
    pub len: u64,
}

impl Span {
    /// The part that worker `index` uses of files that are `file_len` bytes now (the shortest; 0 when there is none yet).
    ///
    /// With several files, `size` is shared among them, as in fio.
    pub fn of(settings: &Settings, index: u32, files: u64, file_len: u64) -> Result<Span, String> {
        let block = settings.max_block_bytes();
        let step = settings.offset_increment.of(file_len, block);
        let offset = step
            .checked_mul(u64::from(index))
            .and_then(|added| settings.offset.of(file_len, block).checked_add(added))
            .ok_or("offset does not fit 64 bits")?;
        let len = match settings.size {
            Some(Amount::Percent(_)) | None if file_len == 0 => {
                return Err("the file is not there yet: give its size with size=".into());
            }
            Some(Amount::Bytes(bytes)) => bytes / files,
            Some(share) => share.of(file_len, block).min(file_len.saturating_sub(offset)),
            None => file_len.saturating_sub(offset),
        };
        if len < block && settings.profile.is_none() {
            return Err(format!("{len} bytes from offset {offset} do not hold one block of {block} bytes"));
        }
        Ok(Span { files, offset, len })
    }

    /// The block that a transfer of `block_bytes` covers: the inverse of [`Work::at`].
    #[inline]
    pub fn block_of(&self, transfer: &Transfer, block_bytes: u64) -> u64 {
        (transfer.offset - self.offset) / block_bytes * self.files + u64::from(transfer.file)
    }
}

/// Yields a worker's transfers.
#[derive(Clone, Debug)]
pub struct Work {
    span: Span,
    block: [u64; 2],
    blocks: [u64; 2],
    orders: [Order; 2],
    made: [u64; 2],
    mix: Mix,
    bytes_left: u64,
    ios_left: u64,
    endless: bool,
    trace: Option<Arc<[Request]>>,
}

#[derive(Clone, Debug)]
enum Mix {
    Only(Direction),
    Reads { percent: u64, rng: Rng },
}

impl Work {
    /// The transfers of worker `index`; `trace` replaces the pattern by a prepared list.
    pub fn new(settings: &Settings, index: u32, span: Span, trace: Option<Arc<[Request]>>) -> Work {
        let mut seed = mix(settings.randseed ^ mix(u64::from(index) + 1));
        if !settings.randrepeat {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            seed ^= mix(now.as_nanos() as u64);
        }
        let block = settings.block_bytes;
        let blocks = block.map(|bytes| (span.len / bytes).max(1) * span.files);
        let order =
            |d: usize| Order::new(settings.pattern.random, settings.norandommap, blocks[d], seed ^ d as u64);
        let mix = match (settings.pattern.read, settings.pattern.write) {
            (true, true) => {
                Mix::Reads { percent: u64::from(settings.rwmixread), rng: Rng::new(seed.rotate_left(17)) }
            }
            (false, true) => Mix::Only(Direction::Write),
            _ => Mix::Only(Direction::Read),
        };
        let once = match (&trace, settings.io_bytes) {
            (_, Some(limit)) => limit.of(span.len * span.files, 1),
            (Some(trace), None) => trace.iter().map(|request| u64::from(request.len)).sum(),
            (None, None) => {
                // Whole blocks only; a mix counts in the smaller of its blocks.
                let unit = if settings.pattern.read && settings.pattern.write {
                    block[0].min(block[1])
                } else {
                    settings.max_block_bytes()
                };
                span.len / unit * unit * span.files
            }
        };
        Work {
            span,
            block,
            blocks,
            orders: [order(0), order(1)],
            made: [0; 2],
            mix,
            bytes_left: once.saturating_mul(settings.loops),
            ios_left: settings.number_ios.unwrap_or(u64::MAX),
            endless: settings.time_based,
            trace,
        }
    }

    /// Bytes that will be moved in all; `None` when only time ends it.
    pub fn total_bytes(&self) -> Option<u64> {
        (!self.endless).then_some(self.bytes_left)
    }

    /// The next transfer, or `None` when all is done.
    #[inline]
    pub fn next(&mut self) -> Option<Transfer> {
        if self.ios_left == 0 || self.bytes_left == 0 && !self.endless {
            return None;
        }
        let transfer = match &self.trace {
            Some(trace) => {
                let request = trace[(self.made[0] % trace.len() as u64) as usize];
                self.made[0] += 1;
                Transfer { direction: Direction::Read, file: 0, offset: request.offset, len: request.len }
            }
            None => {
                let direction = match &mut self.mix {
                    Mix::Only(direction) => *direction,
                    Mix::Reads { percent, rng } => {
                        if rng.below(100) < *percent {
                            Direction::Read
                        } else {
                            Direction::Write
                        }
                    }
                };
                let d = direction as usize;
                let block = self.orders[d].block(self.made[d], self.blocks[d]);
                self.made[d] += 1;
                self.at(direction, block)
            }
        };
        self.ios_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(u64::from(transfer.len));
        Some(transfer)
    }

    /// The transfer of one block; blocks go round robin over the files.
    #[inline]
    pub fn at(&self, direction: Direction, block: u64) -> Transfer {
        let bytes = self.block[direction as usize];
        let (file, index) = match self.span.files {
            1 => (0, block),
            files => (block % files, block / files),
        };
        Transfer { direction, file: file as u32, offset: self.span.offset + index * bytes, len: bytes as u32 }
    }

    /// Number of blocks that writes may touch.
    pub fn write_blocks(&self) -> u64 {
        self.blocks[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    fn settings(options: &[(&str, &str)]) -> Settings {
        let mut settings = Settings::default();
        for (name, value) in options {
            options::apply(&mut settings, name, Some(value)).unwrap();
        }
        settings
    }

    fn offsets(
        settings: &Settings,
        index: u32,
        files: u64,
        file_len: u64,
    ) -> Vec<(u32, u64, u32, Direction)> {
        let span = Span::of(settings, index, files, file_len).unwrap();
        let mut work = Work::new(settings, index, span, None);
        std::iter::from_fn(|| work.next())
            .map(|t| (t.file, t.offset, t.len, t.direction))
            .take(10_000)
            .collect()
    }

    #[test]
    fn sequential_reads_cover_size_from_offset() {
        let job = settings(&[("bs", "4k"), ("size", "16k"), ("offset", "8k"), ("offset_increment", "1m")]);
        let list = offsets(&job, 1, 1, 0);
        let base = 8192 + (1 << 20);
        assert_eq!(list.iter().map(|t| t.1 - base).collect::<Vec<_>>(), [0, 4096, 8192, 12288]);
    }

    #[test]
    fn io_size_wraps_and_loops_repeat() {
        let job = settings(&[("bs", "4k"), ("size", "8k"), ("io_size", "20k")]);
        assert_eq!(offsets(&job, 0, 1, 0).iter().map(|t| t.1).collect::<Vec<_>>(), [0, 4096, 0, 4096, 0]);
        let job = settings(&[("bs", "4k"), ("size", "8k"), ("loops", "3")]);
        assert_eq!(offsets(&job, 0, 1, 0).len(), 6);
        let job = settings(&[("bs", "4k"), ("size", "1m"), ("number_ios", "7")]);
        assert_eq!(offsets(&job, 0, 1, 0).len(), 7);
    }

    #[test]
    fn random_covers_every_block_of_every_file_once() {
        let job = settings(&[("rw", "randwrite"), ("bs", "4k"), ("size", "400k")]);
        let mut list = offsets(&job, 0, 2, 0);
        assert_eq!(list.len(), 100);
        list.sort_unstable_by_key(|t| (t.0, t.1));
        list.dedup();
        assert_eq!(list.len(), 100);
        assert!(list.iter().all(|t| t.1 < 200 << 10));
    }

    #[test]
    fn workers_take_different_random_paths_and_repeat_them() {
        let job = settings(&[("rw", "randread"), ("size", "1m"), ("randseed", "5")]);
        assert_eq!(offsets(&job, 0, 1, 0), offsets(&job, 0, 1, 0));
        assert_ne!(offsets(&job, 0, 1, 0), offsets(&job, 1, 1, 0));
    }

    #[test]
    fn mixes_follow_rwmixread() {
        let job = settings(&[("rw", "randrw"), ("rwmixread", "70"), ("size", "16m"), ("randseed", "1")]);
        let list = offsets(&job, 0, 1, 0);
        let reads = list.iter().filter(|t| t.3 == Direction::Read).count() as f64 / list.len() as f64;
        assert!((0.66..0.74).contains(&reads), "{reads}");
    }

    #[test]
    fn shares_of_a_file_and_missing_sizes() {
        let job = settings(&[("bs", "4k"), ("size", "50%"), ("offset", "25%")]);
        assert_eq!(Span::of(&job, 0, 1, 64 << 10), Ok(Span { files: 1, offset: 16 << 10, len: 32 << 10 }));
        assert!(Span::of(&job, 0, 1, 0).unwrap_err().contains("size="));
        let job = settings(&[("bs", "4k"), ("offset", "1m")]);
        assert!(Span::of(&job, 0, 1, 1 << 20).unwrap_err().contains("do not hold one block"));
    }

    #[test]
    fn blocks_and_transfers_are_inverse() {
        let job = settings(&[("rw", "write"), ("bs", "4k"), ("size", "1m"), ("offset", "8k")]);
        let span = Span::of(&job, 0, 3, 0).unwrap();
        let work = Work::new(&job, 0, span, None);
        for block in 0..work.write_blocks() {
            assert_eq!(span.block_of(&work.at(Direction::Write, block), 4096), block);
        }
    }
}
