//! Reads everything and checks every sum.

use serde::{Deserialize, Serialize};

use crate::types::NodeId;

/// How far [`Pool::verify`](crate::Pool::verify) is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyProgress {
    /// The region at hand.
    pub path: String,
    /// Bytes of all regions that are done.
    pub done_bytes: u64,
    /// Bytes of all regions.
    pub total_bytes: u64,
    /// Bad chunks so far.
    pub bad_chunks: u64,
}

/// A chunk that fails its checksum or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadChunk {
    /// The region's node.
    pub node: NodeId,
    /// One of its names.
    pub path: String,
    /// Index of the chunk in the region.
    pub chunk: u64,
    /// Member that holds it.
    pub member: u16,
    /// What is wrong.
    pub reason: String,
}

/// What [`Pool::verify`](crate::Pool::verify) found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Regions read.
    pub regions: u64,
    /// Chunks whose sums were compared.
    pub chunks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Regions open for writing: without sums now, not checked.
    pub skipped: u64,
    /// Regions that a crash left without sums and that got new ones.
    pub resealed: u64,
    /// Bad chunks, at most 1000 of them.
    pub bad: Vec<BadChunk>,
    /// How many bad chunks there are.
    pub bad_chunks: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.bad_chunks == 0
    }
}
