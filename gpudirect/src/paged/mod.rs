//! Blocks of a paged KV cache to contiguous staging on the device, and back.
//!
//! ```text
//! planes   K or V of one layer: a base address; [block][token, head in any order] of rows, each with a stride of its own
//! staging  one range: [block][plane] or [plane][block] of [token][head] or [head][token] of rows, without gaps
//! move     for all planes and a list of blocks: rows from one to the other, by bytes
//! ```
//!
//! The type of the elements is of no matter: a row is `head_dim` times their size. One launch of a kernel moves all planes of
//! many blocks; what it may touch is worked out here, by checked arithmetic, before anything starts. A [`Move`] exists only
//! once every byte of it was found to be inside its plane or the staging, and planes and staging to be memory of the device.
//! Whoever frees that memory ends the moves first.

pub(crate) mod kernel;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::driver::Driver;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a block in one plane: the kernel counts them in 32 bits, a launch's step included.
const MAX_BLOCK: u64 = 1 << 31;

/// K or V of one layer: addresses that its blocks lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// First byte of block 0.
    pub address: u64,
    /// Bytes from there to the end of its last block.
    pub len: u64,
}

/// How blocks lie in every plane. Strides are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Blocks in a plane.
    pub blocks: u32,
    /// From one block to the next.
    pub block_stride: u64,
    /// Tokens in a block.
    pub tokens: u32,
    /// From one token to the next.
    pub token_stride: u64,
    /// KV heads.
    pub heads: u32,
    /// From one head to the next.
    pub head_stride: u64,
    /// Bytes of one token of one head: elements times their size.
    pub row: u64,
}

impl BlockShape {
    /// `[block][token][head][row]` without gaps: what vLLM calls NHD.
    pub fn token_major(blocks: u32, tokens: u32, heads: u32, row: u64) -> BlockShape {
        let token_stride = row.saturating_mul(heads.into());
        let block_stride = token_stride.saturating_mul(tokens.into());
        BlockShape { blocks, block_stride, tokens, token_stride, heads, head_stride: row, row }
    }

    /// `[block][head][token][row]` without gaps: what vLLM calls HND.
    pub fn head_major(blocks: u32, tokens: u32, heads: u32, row: u64) -> BlockShape {
        let head_stride = row.saturating_mul(tokens.into());
        let block_stride = head_stride.saturating_mul(heads.into());
        BlockShape { blocks, block_stride, tokens, token_stride: row, heads, head_stride, row }
    }

    /// The same blocks with room for something else between them, as where K and V of a block are neighbours.
    pub fn with_block_stride(self, block_stride: u64) -> BlockShape {
        BlockShape { block_stride, ..self }
    }

    /// Bytes of one block of one plane.
    pub fn block_bytes(&self) -> Option<u64> {
        self.row.checked_mul(self.tokens.into())?.checked_mul(self.heads.into())
    }

    /// From the first byte of a block to behind its last.
    fn block_extent(&self) -> Option<u64> {
        let tokens = self.token_stride.checked_mul(u64::from(self.tokens).checked_sub(1)?)?;
        let heads = self.head_stride.checked_mul(u64::from(self.heads).checked_sub(1)?)?;
        tokens.checked_add(heads)?.checked_add(self.row)
    }

    /// From the first byte of a plane to behind its last.
    fn plane_extent(&self) -> Option<u64> {
        self.block_stride
            .checked_mul(u64::from(self.blocks).checked_sub(1)?)?
            .checked_add(self.block_extent()?)
    }
}

/// What comes first in staging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[block][plane]`: a block of all layers is one piece, as stores of KV blocks want it.
    BlockMajor,
    /// `[plane][block]`: a layer is one piece, for layer by layer.
    LayerMajor,
}

/// Order within a block of one plane in staging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inner {
    /// `[token][head][row]`.
    TokenMajor,
    /// `[head][token][row]`.
    HeadMajor,
}

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the planes to staging.
    Gather,
    /// From staging to the planes.
    Scatter,
}

/// Planes of one shape: a KV cache as an engine of inference holds it.
#[derive(Clone, Debug)]
pub struct Paged {
    planes: Arc<[Plane]>,
    shape: BlockShape,
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::Invalid, context)
}

impl Paged {
    /// Planes in the order that staging has them in: layer by layer, K before V. Refuses planes that a block would leave, that are
    /// not memory of the device, and strides that make two rows share bytes.
    pub fn new(driver: &dyn Driver, planes: &[Plane], shape: BlockShape) -> Result<Paged> {
        let needed = shape.plane_extent().filter(|_| shape.row > 0);
        let needed =
            needed.ok_or_else(|| invalid(format!("a paged layout of no bytes, or too many: {shape:?}")))?;
        let dims = [
            (u64::from(shape.tokens), shape.token_stride),
            (u64::from(shape.heads), shape.head_stride),
            (u64::from(shape.blocks), shape.block_stride),
        ];
        apart(dims, shape.row)
            .ok_or_else(|| invalid(format!("a paged layout whose rows share bytes: {shape:?}")))?;
        for (i, plane) in planes.iter().enumerate() {
            if plane.len < needed || plane.address.checked_add(plane.len).is_none() {
                let context = format!(
                    "plane {i} of a paged layout has {} bytes at {:#x}, its blocks need {needed}",
                    plane.len, plane.address
                );
                return Err(invalid(context));
            }
            // Of the plane only what blocks may touch: where K and V are neighbours, a view may say it is longer.
            driver
                .check_range(plane.address, needed)
                .map_err(|error| error.context(format!("use plane {i} of a paged layout")))?;
        }
        if planes.is_empty() {
            return Err(invalid("a paged layout without planes".into()));
        }
        Ok(Paged { planes: planes.into(), shape })
    }

    /// One tensor a layer, `[2][block]...`: all K, then all V. `kv_stride`: bytes from one to the other.
    pub fn joined(driver: &dyn Driver, layers: &[Plane], kv_stride: u64, shape: BlockShape) -> Result<Paged> {
        let mut planes = Vec::with_capacity(layers.len() * 2);
        for layer in layers {
            let rest = layer.len.checked_sub(kv_stride);
            let second = layer.address.checked_add(kv_stride);
            let (Some(len), Some(address)) = (rest, second) else {
                return Err(invalid(format!("V is {kv_stride} bytes behind K in a layer of {}", layer.len)));
            };
            planes.extend([*layer, Plane { address, len }]);
        }
        Paged::new(driver, &planes, shape)
    }

    /// The planes.
    pub fn planes(&self) -> &[Plane] {
        &self.planes
    }

    /// How blocks lie in them.
    pub fn shape(&self) -> &BlockShape {
        &self.shape
    }

    /// Bytes of a block of all planes, which is what it takes in staging.
    pub fn staged_block_bytes(&self) -> Result<u64> {
        let bytes = self.shape.block_bytes().and_then(|bytes| bytes.checked_mul(self.planes.len() as u64));
        bytes.ok_or_else(|| invalid("a block of more than 2^64 bytes".into()))
    }
}

/// Whether strides keep all rows apart: sorted, each is at least what lies within it. Stricter than need be.
fn apart<const N: usize>(mut dims: [(u64, u64); N], row: u64) -> Option<()> {
    dims.sort_unstable_by_key(|(_, stride)| *stride);
    let mut extent = row;
    for (count, stride) in dims {
        if count > 1 {
            if stride < extent {
                return None;
            }
            extent = stride.checked_mul(count - 1)?.checked_add(extent)?;
        }
    }
    Some(())
}

/// One range on the device, without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staging {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// What comes first.
    pub order: Order,
    /// Order within a block of one plane.
    pub inner: Inner,
}

/// A dimension of a block, on both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Dim {
    pub count: u64,
    pub paged: u64,
    pub staging: u64,
}

/// A gather or scatter, checked.
#[derive(Clone, Debug)]
pub struct Move {
    way: Way,
    planes: Arc<[Plane]>,
    blocks: Vec<u32>,
    block_stride: u64,
    /// Outer dimensions of a block, slower first; contiguous ones are joined with the run.
    dims: [Dim; 2],
    /// Bytes that are contiguous on both sides.
    run: u64,
    staging: u64,
    staging_plane: u64,
    staging_block: u64,
    bytes: u64,
}

impl Move {
    /// Refuses blocks that there are not, a block twice where it is written, staging that is too small, no memory of the device,
    /// or a part of a plane.
    pub fn new(
        driver: &dyn Driver,
        paged: &Paged,
        staging: &Staging,
        blocks: &[u32],
        way: Way,
    ) -> Result<Move> {
        let shape = &paged.shape;
        if let Some(block) = blocks.iter().find(|block| **block >= shape.blocks) {
            return Err(invalid(format!("block {block} of {} blocks", shape.blocks)));
        }
        if way == Way::Scatter {
            let mut sorted = blocks.to_vec();
            sorted.sort_unstable();
            if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(invalid(format!("scatter to block {} twice", pair[0])));
            }
        }
        let block_all = paged.staged_block_bytes()?;
        let needed = block_all.checked_mul(blocks.len() as u64);
        let end = needed.and_then(|needed| staging.address.checked_add(needed));
        let (Some(needed), Some(end)) = (needed, end) else {
            return Err(invalid(format!("{} blocks of {block_all} bytes", blocks.len())));
        };
        if needed > staging.len {
            let context = format!(
                "{} blocks of {block_all} bytes in staging of {} bytes: take fewer at a time",
                blocks.len(),
                staging.len
            );
            return Err(invalid(context));
        }
        let plane_bytes = shape.plane_extent().unwrap_or(u64::MAX);
        if needed > 0 {
            driver
                .check_range(staging.address, needed)
                .map_err(|error| error.context("use the staging of a paged layout"))?;
            let meets = |plane: &&Plane| plane.address < end && staging.address < plane.address + plane_bytes;
            if let Some(plane) = paged.planes.iter().find(meets) {
                let context =
                    format!("the staging at {:#x} is in a plane at {:#x}", staging.address, plane.address);
                return Err(invalid(context));
            }
        }
        // No overflow below: `staged_block_bytes` and `needed` are products of the same factors.
        let block = block_all / paged.planes.len() as u64;
        let (staging_plane, staging_block) = match staging.order {
            Order::BlockMajor => (block, block_all),
            Order::LayerMajor => (block * blocks.len() as u64, block),
        };
        let (tokens, heads, row) = (u64::from(shape.tokens), u64::from(shape.heads), shape.row);
        let (token, head) = match staging.inner {
            Inner::TokenMajor => (row * heads, row),
            Inner::HeadMajor => (row, row * tokens),
        };
        let dims = [
            Dim { count: tokens, paged: shape.token_stride, staging: token },
            Dim { count: heads, paged: shape.head_stride, staging: head },
        ];
        let (dims, run) = join(dims, row);
        if block > MAX_BLOCK {
            return Err(invalid(format!("a block of {block} bytes in one plane: {MAX_BLOCK} are the most")));
        }
        Ok(Move {
            way,
            planes: paged.planes.clone(),
            blocks: blocks.to_vec(),
            block_stride: shape.block_stride,
            dims,
            run,
            staging: staging.address,
            staging_plane,
            staging_block,
            bytes: needed,
        })
    }

    /// Which way.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Bytes that it moves.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that lie in one piece on both sides.
    pub fn run_len(&self) -> u64 {
        self.run
    }

    /// Calls `f` for every run: where it is in its plane, where in staging, and its bytes.
    pub fn for_each_run(&self, f: &mut dyn FnMut(u64, u64, u64) -> Result<()>) -> Result<()> {
        let [slow, fast] = self.dims;
        for (p, plane) in self.planes.iter().enumerate() {
            for (b, block) in self.blocks.iter().enumerate() {
                let paged = plane.address + u64::from(*block) * self.block_stride;
                let staging = self.staging + p as u64 * self.staging_plane + b as u64 * self.staging_block;
                for i in 0..slow.count {
                    for j in 0..fast.count {
                        f(
                            paged + i * slow.paged + j * fast.paged,
                            staging + i * slow.staging + j * fast.staging,
                            self.run,
                        )?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Joins dimensions that are contiguous on both sides with the run, and puts the faster one of what is left behind.
fn join(dims: [Dim; 2], row: u64) -> ([Dim; 2], u64) {
    let one = Dim { count: 1, paged: 0, staging: 0 };
    let mut left: Vec<Dim> = dims.into_iter().filter(|dim| dim.count > 1).collect();
    let mut run = row;
    while let Some(at) = left.iter().position(|dim| dim.paged == run && dim.staging == run) {
        run *= left.remove(at).count;
    }
    // Neighbouring threads write neighbouring bytes of staging, or nearly so.
    left.sort_unstable_by_key(|dim| std::cmp::Reverse(dim.staging));
    let fast = left.pop().unwrap_or(one);
    ([left.pop().unwrap_or(one), fast], run)
}
