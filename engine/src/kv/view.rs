//! A namespace and a tenant: what keys mean there.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::record::{PINNED, Record};
use super::state::slot_bytes;
use super::table::Name;
use super::{Key, Shared, seed_of};

/// A namespace of a store, as one tenant sees it. Cheap to clone; may be shared by threads.
#[derive(Clone, Debug)]
pub struct View {
    pub(super) shared: Arc<Shared>,
    namespace: u16,
    tenant: u16,
    tenant_name: Arc<str>,
    block_bytes: u32,
    pub(super) seed: u32,
}

/// A block, as lists show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockInfo {
    /// Its key, in hexadecimal digits.
    pub key: String,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Another one for each put.
    pub generation: u64,
    /// When it goes by itself, seconds since the epoch; 0: it does not.
    pub expires: u32,
}

impl View {
    pub(super) fn new(
        shared: Arc<Shared>,
        namespace: u16,
        tenant: u16,
        block_bytes: u32,
        fingerprint: &[u8],
        tenant_name: &str,
    ) -> View {
        let seed = seed_of(fingerprint, block_bytes, tenant_name.as_bytes());
        View { shared, namespace, tenant, tenant_name: tenant_name.into(), block_bytes, seed }
    }

    /// The tenant's name.
    pub fn tenant(&self) -> &str {
        &self.tenant_name
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Bytes that a buffer needs for a block: whole pages.
    pub fn slot_bytes(&self) -> usize {
        slot_bytes(self.block_bytes) as usize
    }

    pub(super) fn name(&self, key: &Key) -> Name {
        Name { namespace: self.namespace, tenant: self.tenant, key: *key }
    }

    /// How many blocks from the first on are there: the longest prefix that can be loaded. They count as asked for.
    pub fn lookup(&self, chain: &[Key]) -> usize {
        let mut state = self.shared.state();
        state.table.now = self.shared.options.clock.now();
        for (index, key) in chain.iter().enumerate() {
            match state.find(&self.name(key)) {
                Some((entry, _)) => state.table.touch(entry),
                None => return index,
            }
        }
        chain.len()
    }

    /// Which of them are there. They do not count as asked for.
    pub fn contains(&self, keys: &[Key]) -> Vec<bool> {
        let mut state = self.shared.state();
        state.table.now = self.shared.options.clock.now();
        keys.iter().map(|key| state.find(&self.name(key)).is_some()).collect()
    }

    /// Keeps blocks whatever else has to go, or no longer. Returns how many of them are there. Durable after the next flush.
    pub fn pin(&self, keys: &[Key], pinned: bool) -> usize {
        let mut state = self.shared.state();
        state.table.now = self.shared.options.clock.now();
        let mut there = 0;
        for key in keys {
            let Some((entry, _)) = state.find(&self.name(key)) else { continue };
            there += 1;
            if let Some(block) = state.table.pin(entry, pinned) {
                state.stat.pinned = match pinned {
                    true => state.stat.pinned + 1,
                    false => state.stat.pinned.saturating_sub(1),
                };
                state.log(Record::Put(block));
            }
        }
        self.shared.wake.notify_one();
        there
    }

    /// Takes blocks out. Returns how many were there. Durable after the next flush; a crash before that may bring them back.
    pub fn remove(&self, keys: &[Key]) -> usize {
        let mut state = self.shared.state();
        state.table.now = self.shared.options.clock.now();
        let found: Vec<u32> = keys.iter().filter_map(|key| state.table.find(&self.name(key))).collect();
        let removed = found.into_iter().filter(|entry| state.remove(*entry).is_some()).count();
        self.shared.wake.notify_one();
        removed
    }

    /// Its blocks, in no order.
    pub fn blocks(&self) -> Vec<(Key, BlockInfo)> {
        let state = self.shared.state();
        let ours = state
            .table
            .iter()
            .filter(|(_, block)| (block.namespace, block.tenant) == (self.namespace, self.tenant));
        ours.map(|(_, block)| {
            let info = BlockInfo {
                key: block.key.to_string(),
                pinned: block.flags & PINNED != 0,
                generation: block.generation,
                expires: block.expires,
            };
            (block.key, info)
        })
        .collect()
    }
}
