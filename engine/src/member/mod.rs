//! Members: where a pool's bytes lie. Everything above this trait sees extents only.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use nvme::Device;

use crate::error::Result;
use crate::layout::Extent;
use crate::pool::MemberKind;
use crate::types::NodeId;

pub mod directory;
pub mod extent_files;
pub mod raw;
pub mod striping;

/// What an allocation is for; members use it to keep together what is read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Region that gets the space.
    pub node: NodeId,
    /// Offset in the region that the space is for: becomes `logical` of the first extent.
    pub logical: u64,
    /// The extent on this member that the space continues, when there is one: a directory goes on in its file, a raw member
    /// allocates behind it where it can.
    pub after: Option<Extent>,
}

/// A member: a directory of a file system, or a raw device.
///
/// Space goes `free -> allocate -> in use -> free`. Who frees an extent that a durable catalog names must have made a newer
/// catalog durable first, and nobody may still read it: the pool sees to both, see `pool/commit.rs`.
pub trait Member: Send + Sync + fmt::Debug {
    /// Its index in the pool.
    fn index(&self) -> u16;
    /// What it is.
    fn kind(&self) -> MemberKind;
    /// Its path, also its name in messages.
    fn path(&self) -> &Path;
    /// Bytes it can hold in all.
    fn capacity(&self) -> u64;
    /// Bytes that can still be allocated.
    fn free_bytes(&self) -> u64;
    /// Bytes that are allocated.
    fn used_bytes(&self) -> u64;
    /// Takes space for `len` bytes, in whole chunks on raw members: all of it, or `NoSpace` and nothing.
    fn allocate(&self, len: u64, hint: &Hint) -> Result<Vec<Extent>>;
    /// Gives space back.
    fn free(&self, extents: &[Extent]) -> Result<()>;
    /// At open: marks extents of a stored layout as in use. `Corrupt` when they are already, or are out of bounds.
    fn take(&self, extents: &[Extent]) -> Result<()>;
    /// The device that holds an extent, and the offset of its first byte there.
    fn open(&self, extent: &Extent) -> Result<(Arc<dyn Device>, u64)>;
    /// Makes the bytes of `extents` durable (and the directory entries of their files).
    fn sync(&self, extents: &[Extent]) -> Result<()>;
    /// Gives back what lies in files that were there at open and is none of `named`. Returns the bytes.
    fn free_unnamed(&self, _named: &[Extent]) -> Result<u64> {
        Ok(0)
    }
    /// At open, after the last [`take`](Self::take): clears away what no layout names, which a crash left behind.
    fn taken_all(&self) -> Result<()> {
        Ok(())
    }
}
