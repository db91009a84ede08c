//! The virtual trees: `.tensors` (each tensor of the pool as a `.npy` file) and `.nvtier` (state of the mount).
//!
//! Virtual nodes have inode numbers with the top bit set, derived from what they show, so that `d_ino` of a listing equals
//! `st_ino` of the file without remembering every listed entry.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use engine::tensors::{Format, TensorIndex, TensorInfo, npy_header, view_name};
use engine::{NodeId, Pool};

use super::nodes::lock;
use crate::error::{Errno, FsResult};

/// Top bit of the inode numbers of virtual nodes; the engine counts its nodes up from 1.
pub(crate) const VIRTUAL: u64 = 1 << 63;

/// Listings kept parsed; more files than this in use at once are parsed again when they come up.
const CACHED_LISTINGS: usize = 256;

/// A node that exists in the mount only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum VNode {
    /// `.nvtier`
    Control,
    /// `.nvtier/stats.json`
    Stats,
    /// `.nvtier/metrics`
    Metrics,
    /// `.nvtier/version`
    Version,
    /// `.tensors` (of the root) or the mirror of another directory below it.
    Tensors(NodeId),
    /// A tensor file in `parent`, shown as a directory of its tensors. The parent is part of it because a directory may have one
    /// place only, while a file may have names in several directories.
    TensorFile { region: NodeId, parent: NodeId },
    /// One tensor of a region, as a `.npy` file. `epoch` tells contents of the region apart.
    View { region: NodeId, epoch: u64, index: u32 },
}

impl VNode {
    pub fn is_directory(self) -> bool {
        matches!(self, VNode::Control | VNode::Tensors(_) | VNode::TensorFile { .. })
    }

    /// Inode number shown in listings; the table below uses it too unless two nodes collide.
    pub fn ino(self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        VIRTUAL | (hasher.finish() >> 1)
    }
}

/// Virtual nodes that the kernel refers to.
#[derive(Debug, Default)]
pub(crate) struct VirtualTable {
    nodes: Mutex<HashMap<u64, (VNode, u64)>>,
}

impl VirtualTable {
    /// Inode number of a node, counting one more reference of the kernel.
    pub fn remember(&self, node: VNode) -> u64 {
        let mut nodes = lock(&self.nodes);
        let mut ino = node.ino();
        loop {
            let entry = nodes.entry(ino).or_insert((node, 0));
            if entry.0 == node {
                entry.1 += 1;
                return ino;
            }
            ino = VIRTUAL | ino.wrapping_add(1);
        }
    }

    pub fn get(&self, ino: u64) -> FsResult<VNode> {
        lock(&self.nodes).get(&ino).map(|(node, _)| *node).ok_or(Errno::ESTALE)
    }

    pub fn forget(&self, ino: u64, count: u64) {
        let mut nodes = lock(&self.nodes);
        if let Some((_, lookups)) = nodes.get_mut(&ino) {
            *lookups = lookups.saturating_sub(count);
            if *lookups == 0 {
                nodes.remove(&ino);
            }
        }
    }
}

/// One tensor as a `.npy` file: `header`, then bytes `start..end` of the region.
#[derive(Debug)]
pub(crate) struct View {
    pub header: Vec<u8>,
    pub start: u64,
    pub end: u64,
    /// Which content of the region the offsets belong to.
    pub index: Arc<TensorIndex>,
}

impl View {
    fn new(index: &Arc<TensorIndex>, tensor: &TensorInfo) -> Option<View> {
        let (start, end) = tensor.data_offsets;
        let header = npy_header(tensor)?;
        (start <= end).then(|| View { header, start, end, index: index.clone() })
    }

    /// Length of the whole file in bytes.
    pub fn len(&self) -> u64 {
        self.header.len() as u64 + (self.end - self.start)
    }
}

/// The tensors of one region as directory entries.
#[derive(Debug)]
pub(crate) struct Listing {
    pub epoch: u64,
    pub index: Arc<TensorIndex>,
    /// File name and position in `index.tensors`, in the order of the file.
    pub entries: Vec<(OsString, u32)>,
    by_name: HashMap<OsString, u32>,
}

impl Listing {
    fn new(epoch: u64, index: Arc<TensorIndex>) -> Listing {
        let mut entries = Vec::with_capacity(index.tensors.len());
        let mut by_name = HashMap::with_capacity(index.tensors.len());
        for (position, tensor) in index.tensors.iter().enumerate() {
            // A type that numpy has no header for is not shown rather than shown wrongly.
            if npy_header(tensor).is_none() {
                continue;
            }
            let name = file_name(tensor);
            if by_name.insert(name.clone(), position as u32).is_none() {
                entries.push((name, position as u32));
            }
        }
        Listing { epoch, index, entries, by_name }
    }

    pub fn find(&self, name: &OsStr) -> Option<u32> {
        self.by_name.get(name).copied()
    }
}

/// Parsed listings by region. An entry is valid as long as the engine hands out the same index.
#[derive(Debug, Default)]
pub(crate) struct Listings {
    state: Mutex<ListingState>,
}

#[derive(Debug, Default)]
struct ListingState {
    next_epoch: u64,
    by_region: HashMap<NodeId, Arc<Listing>>,
}

impl Listings {
    /// Tensors of the region's current content. The error is the parser's, for `user.nvtier.error`.
    pub fn get(&self, pool: &Pool, region: NodeId) -> Result<Arc<Listing>, engine::Error> {
        let index = pool.tensors(region)?;
        let mut state = lock(&self.state);
        if let Some(listing) = state.by_region.get(&region)
            && Arc::ptr_eq(&listing.index, &index)
        {
            return Ok(listing.clone());
        }
        if state.by_region.len() >= CACHED_LISTINGS {
            state.by_region.clear();
        }
        state.next_epoch += 1;
        let listing = Arc::new(Listing::new(state.next_epoch, index));
        state.by_region.insert(region, listing.clone());
        Ok(listing)
    }

    /// The view behind an inode number; `ESTALE` when the region's content is another one by now.
    pub fn view(&self, pool: &Pool, region: NodeId, epoch: u64, index: u32) -> FsResult<View> {
        let listing = self.get(pool, region).map_err(|_| Errno::ESTALE)?;
        if listing.epoch != epoch {
            return Err(Errno::ESTALE);
        }
        let tensor = listing.index.tensors.get(index as usize).ok_or(Errno::ESTALE)?;
        View::new(&listing.index, tensor).ok_or(Errno::EIO)
    }
}

/// Whether a file of this name may hold tensors; decides without reading it.
pub(crate) fn may_hold_tensors(name: &OsStr) -> bool {
    name.to_str().and_then(Format::of_name).is_some()
}

fn file_name(tensor: &TensorInfo) -> OsString {
    format!("{}.npy", view_name(&tensor.name)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_decide() {
        assert!(may_hold_tensors(OsStr::new("model-00001.SafeTensors")));
        assert!(may_hold_tensors(OsStr::new("x.npy")));
        assert!(!may_hold_tensors(OsStr::new("npy")));
        assert!(!may_hold_tensors(OsStr::new("config.json")));
    }

    #[test]
    fn virtual_numbers_are_stable_and_counted() {
        let table = VirtualTable::default();
        let ino = table.remember(VNode::Tensors(1));
        assert_eq!(ino, VNode::Tensors(1).ino());
        assert_eq!(table.remember(VNode::Tensors(1)), ino);
        assert_eq!(table.get(ino), Ok(VNode::Tensors(1)));
        table.forget(ino, 2);
        assert_eq!(table.get(ino), Err(Errno::ESTALE));
    }
}
