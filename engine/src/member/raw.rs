//! A raw member: a block device or one image file, all of it ours.
//!
//! ```text
//! 0            1 MiB                     data start (a multiple of 1 MiB)      last 4096 bytes
//! +------------+-------------------------+----------------------------+--------+------------+
//! | superblock | catalog zone            | chunks                     | unused | superblock |
//! | copy 0     | (member 0 only)         |                            |        | copy 1     |
//! +------------+-------------------------+----------------------------+--------+------------+
//! ```
//!
//! The catalog zone holds two databases of half its size each: the catalog, and room for its copy. Offsets of extents count
//! from the start of the device, so that a lease names what any process can read. Which chunks are taken is known from the
//! layouts alone ([`crate::allocator`]).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nvme::Device;

use super::{Hint, Member};
use crate::allocator::{ChunkAllocator, Run};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Extent;
use crate::pool::MemberKind;

/// Bytes before the catalog zone: the first superblock copy, and room.
pub const HEAD_BYTES: u64 = 1 << 20;
/// Bytes at the end, in whole blocks of this size, that are the second superblock copy's.
const TAIL_BYTES: u64 = 4096;
const ZONE_BYTES_MIN: u64 = 16 << 20;
const ZONE_BYTES_MAX: u64 = 4 << 30;

/// Which part of a raw member is what. All offsets and lengths in bytes from the start of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawGeometry {
    /// Start of the catalog zone.
    pub zone_offset: u64,
    /// Length of the catalog zone; 0 on members other than 0.
    pub zone_len: u64,
    /// Start of the chunks.
    pub data_offset: u64,
    /// Length of the chunks: a multiple of the chunk size.
    pub data_len: u64,
}

impl RawGeometry {
    /// Divides a member of `len` bytes. The zone is 1/256 of it, at least 16 MiB and at most 4 GiB.
    pub fn plan(len: u64, chunk_size: u32, with_catalog: bool) -> Result<RawGeometry> {
        let zone_len = match with_catalog {
            true => (len / 256).clamp(ZONE_BYTES_MIN, ZONE_BYTES_MAX).next_multiple_of(2 << 20),
            false => 0,
        };
        let chunk = chunk_size as u64;
        let data_offset = (HEAD_BYTES + zone_len).next_multiple_of(chunk.max(1 << 20));
        let data_end = (len / TAIL_BYTES * TAIL_BYTES).saturating_sub(TAIL_BYTES);
        let data_len = data_end.saturating_sub(data_offset) / chunk * chunk;
        if data_len < chunk.max(1 << 20) {
            return Err(Error::new(
                ErrorKind::TooSmall,
                format!(
                    "a raw member of {len} bytes has no room: {data_offset} bytes go to its head and catalog; make it at least {} bytes",
                    data_offset + chunk.max(1 << 20) + 2 * TAIL_BYTES
                ),
            ));
        }
        Ok(RawGeometry { zone_offset: HEAD_BYTES, zone_len, data_offset, data_len })
    }

    /// Start and length of the two databases of the catalog zone: the catalog and its copy.
    pub fn zone_halves(&self) -> [(u64, u64); 2] {
        let half = self.zone_len / 2;
        [(self.zone_offset, half), (self.zone_offset + half, half)]
    }
}

/// A raw member: its device, and which chunks are taken. See the module documentation.
#[derive(Debug)]
pub struct RawMember {
    index: u16,
    path: PathBuf,
    device: Arc<dyn Device>,
    geometry: RawGeometry,
    chunk: u64,
    allocator: Mutex<ChunkAllocator>,
}

impl RawMember {
    /// With all chunks free; what layouts name is then taken with [`Member::take`].
    pub fn new(
        index: u16,
        path: &Path,
        device: Arc<dyn Device>,
        geometry: RawGeometry,
        chunk_size: u32,
    ) -> Result<RawMember> {
        let chunk = chunk_size as u64;
        let end = geometry.data_offset.checked_add(geometry.data_len);
        if end.is_none_or(|end| end > device.len()) || !geometry.data_offset.is_multiple_of(chunk) {
            return Err(Error::new(
                ErrorKind::TooSmall,
                format!(
                    "{} has {} bytes, its superblock speaks of {:?}: it was cut or copied in part",
                    device.name(),
                    device.len(),
                    end
                ),
            ));
        }
        let allocator = Mutex::new(ChunkAllocator::new(geometry.data_len / chunk));
        Ok(RawMember { index, path: path.to_owned(), device, geometry, chunk, allocator })
    }

    /// Which part is what.
    pub fn geometry(&self) -> &RawGeometry {
        &self.geometry
    }

    fn lock(&self) -> MutexGuard<'_, ChunkAllocator> {
        self.allocator.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn run(&self, extent: &Extent) -> Result<Run> {
        let start = extent.offset.checked_sub(self.geometry.data_offset);
        match start {
            Some(start)
                if extent.file == 0
                    && start.is_multiple_of(self.chunk)
                    && extent.len.is_multiple_of(self.chunk)
                    && extent.len > 0 =>
            {
                Ok(Run { start: start / self.chunk, count: extent.len / self.chunk })
            }
            _ => Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}: {extent:?} is not whole chunks of the data area", self.path.display()),
            )),
        }
    }

    fn each(
        &self,
        extents: &[Extent],
        mut f: impl FnMut(&mut ChunkAllocator, Run) -> Result<()>,
    ) -> Result<()> {
        let mut allocator = self.lock();
        let mut first = Ok(());
        for extent in extents {
            let done = self
                .run(extent)
                .and_then(|run| f(&mut allocator, run))
                .map_err(|e| e.context(self.path.display()));
            first = first.and(done);
        }
        first
    }
}

impl Member for RawMember {
    fn index(&self) -> u16 {
        self.index
    }

    fn kind(&self) -> MemberKind {
        match self.device.kind() {
            nvme::DeviceKind::Block | nvme::DeviceKind::NvmeChar => MemberKind::Block,
            _ => MemberKind::Image,
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn capacity(&self) -> u64 {
        self.geometry.data_len
    }

    fn free_bytes(&self) -> u64 {
        self.lock().free() * self.chunk
    }

    fn used_bytes(&self) -> u64 {
        let allocator = self.lock();
        (allocator.chunks() - allocator.free()) * self.chunk
    }

    fn allocate(&self, len: u64, hint: &Hint) -> Result<Vec<Extent>> {
        let count = len.div_ceil(self.chunk);
        let mut allocator = self.lock();
        let mut runs = Vec::new();
        // Behind what it continues, as far as that is free: then the extents merge.
        if let Some(after) = hint.after
            && let Ok(before) = self.run(&after)
            && allocator.free() >= count
            && before.end() < allocator.chunks()
        {
            let grown = allocator.extend(before.end(), count);
            if grown > 0 {
                runs.push(Run { start: before.end(), count: grown });
            }
        }
        let left = count - runs.iter().map(|run| run.count).sum::<u64>();
        match allocator.alloc(left, usize::MAX) {
            Ok(more) => runs.extend(more),
            Err(error) => {
                for run in runs {
                    allocator.release(run)?;
                }
                return Err(error.context(format!("{} is full", self.path.display())));
            }
        }
        let mut logical = hint.logical;
        Ok(runs
            .into_iter()
            .map(|run| {
                let len = run.count * self.chunk;
                let extent = Extent {
                    logical,
                    member: self.index,
                    file: 0,
                    offset: self.geometry.data_offset + run.start * self.chunk,
                    len,
                };
                logical += len;
                extent
            })
            .collect())
    }

    fn free(&self, extents: &[Extent]) -> Result<()> {
        self.each(extents, |allocator, run| allocator.release(run))
    }

    fn take(&self, extents: &[Extent]) -> Result<()> {
        self.each(extents, |allocator, run| allocator.take(run))
    }

    fn sync(&self, _extents: &[Extent]) -> Result<()> {
        self.device.flush().map_err(|e| Error::from(e).context(format!("flushing {}", self.path.display())))
    }

    fn open(&self, extent: &Extent) -> Result<(Arc<dyn Device>, u64)> {
        Ok((self.device.clone(), extent.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_is_aligned_and_inside() {
        for len in [32u64 << 20, (64 << 20) + 12345, 1 << 30, (3 << 40) + 4096 * 7] {
            for chunk in [4096u32, 16 << 10, 4 << 20] {
                for with_catalog in [true, false] {
                    let g = RawGeometry::plan(len, chunk, with_catalog).unwrap();
                    assert!(
                        g.data_offset.is_multiple_of(1 << 20) && g.data_offset.is_multiple_of(chunk as u64)
                    );
                    assert!(
                        g.data_len.is_multiple_of(chunk as u64)
                            && g.data_offset + g.data_len <= len / 4096 * 4096 - 4096
                    );
                    assert!(g.data_offset >= g.zone_offset + g.zone_len);
                    assert_eq!(g.zone_len > 0, with_catalog);
                    let [(a, n), (b, m)] = g.zone_halves();
                    assert!(a + n == b && b + m <= g.data_offset && b.is_multiple_of(4096));
                }
            }
        }
        assert_eq!(RawGeometry::plan(1 << 40, 16 << 10, true).unwrap().zone_len, 4 << 30);
        assert_eq!(RawGeometry::plan(17 << 20, 16 << 10, true).unwrap_err().kind(), ErrorKind::TooSmall);
        assert_eq!(RawGeometry::plan(0, 16 << 10, false).unwrap_err().kind(), ErrorKind::TooSmall);
    }
}
