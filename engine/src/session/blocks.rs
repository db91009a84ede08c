//! Blocks of a KV store, whether this process owns the pool or another one does.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nvme::Arena;

use super::{Inner, Session};
use crate::control::RemoteBlocks;
use crate::error::{Error, ErrorKind, Result};
use crate::kv::{
    Get, GetDone, Key, Lane, Miss, Put, PutDone, Settings, Store, StoreOptions, StoreStat, Stored, View,
};

/// How long a store that is being closed is waited for.
const OPEN_WAIT: Duration = Duration::from_secs(5);
/// Lanes that are kept for the next call.
const IDLE: usize = 8;

/// A namespace of a KV store and a tenant. May be shared by threads. Keeps a pool that this process owns open.
#[derive(Debug)]
pub struct Blocks {
    inner: Which,
}

#[derive(Debug)]
enum Which {
    Local(Local),
    Remote(RemoteBlocks),
}

#[derive(Debug)]
struct Local {
    // The last lane goes before the store does.
    lanes: Mutex<Vec<Lane>>,
    view: View,
    store: Store,
    arena: Option<Arena>,
}

impl Session {
    /// Opens a namespace of a KV store, which is made where there is none; see [`Store::view`] for what the arguments mean. `arena`: where
    /// buffers come from, to be registered with the kernel once.
    ///
    /// Processes that share a pool share its stores: where another process owns the pool, blocks go through it.
    pub fn blocks(
        &self,
        settings: &Settings,
        fingerprint: &[u8],
        block_bytes: u32,
        tenant: &str,
        arena: Option<&Arena>,
    ) -> Result<Blocks> {
        self.writable("open a KV store")?;
        let inner = match &self.inner {
            Inner::Embedded { pool, .. } => {
                let store = Store::share(pool, StoreOptions::from(settings), OPEN_WAIT)?;
                let view = store.view(fingerprint, block_bytes, tenant)?;
                Which::Local(Local { lanes: Mutex::default(), view, store, arena: arena.cloned() })
            }
            Inner::Remote(client) => {
                let path = client.path().to_owned();
                Which::Remote(RemoteBlocks::open(path, settings.clone(), fingerprint, block_bytes, tenant)?)
            }
        };
        Ok(Blocks { inner })
    }
}

impl Local {
    fn lane<T>(&self, run: impl FnOnce(&mut Lane) -> Result<T>) -> Result<T> {
        let kept = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut lane = match kept {
            Some(lane) => lane,
            None => self.store.lane(self.arena.as_ref())?,
        };
        let value = run(&mut lane)?;
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if lanes.len() < IDLE {
            lanes.push(lane);
        }
        Ok(value)
    }
}

impl Blocks {
    /// Whether another process owns the pool.
    pub fn is_remote(&self) -> bool {
        matches!(self.inner, Which::Remote(_))
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        match &self.inner {
            Which::Local(local) => local.view.block_bytes(),
            Which::Remote(remote) => remote.block_bytes(),
        }
    }

    /// Bytes that a buffer needs for a block: whole pages.
    pub fn slot_bytes(&self) -> usize {
        match &self.inner {
            Which::Local(local) => local.view.slot_bytes(),
            Which::Remote(remote) => remote.slot_bytes(),
        }
    }

    /// See [`View::lookup`].
    pub fn lookup(&self, chain: &[Key]) -> Result<usize> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.lookup(chain)),
            Which::Remote(remote) => remote.lookup(chain),
        }
    }

    /// See [`View::contains`].
    pub fn contains(&self, keys: &[Key]) -> Result<Vec<bool>> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.contains(keys)),
            Which::Remote(remote) => remote.contains(keys),
        }
    }

    /// See [`View::pin`].
    pub fn pin(&self, keys: &[Key], pinned: bool) -> Result<usize> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.pin(keys, pinned)),
            Which::Remote(remote) => remote.pin(keys, pinned),
        }
    }

    /// See [`View::remove`].
    pub fn remove(&self, keys: &[Key]) -> Result<usize> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.remove(keys)),
            Which::Remote(remote) => remote.remove(keys),
        }
    }

    /// Limits the bytes that the tenant's blocks may have, see [`Store::set_quota`].
    pub fn set_quota(&self, bytes: u64) -> Result<()> {
        match &self.inner {
            Which::Local(local) => local.store.set_quota(local.view.tenant(), bytes),
            Which::Remote(remote) => remote.set_quota(bytes),
        }
    }

    /// See [`Store::flush`].
    pub fn flush(&self) -> Result<()> {
        match &self.inner {
            Which::Local(local) => local.store.flush(),
            Which::Remote(remote) => remote.flush(),
        }
    }

    /// See [`Store::stat`].
    pub fn stat(&self) -> Result<StoreStat> {
        match &self.inner {
            Which::Local(local) => Ok(local.store.stat()),
            Which::Remote(remote) => remote.stat(),
        }
    }

    /// Loads blocks, see [`Lane::get`]. `by`: what has not begun by then is a miss, and so is what another process does not deliver.
    /// Whatever goes wrong is a miss of its blocks.
    pub fn get(&self, gets: Vec<Get>, by: Instant) -> Vec<GetDone> {
        if Instant::now() >= by {
            let late = |get: Get| GetDone {
                key: get.key,
                result: Err(Miss::Failed(Error::new(
                    ErrorKind::Timeout,
                    "the deadline passed before the block's turn",
                ))),
                buffer: Some(get.buffer),
            };
            return gets.into_iter().map(late).collect();
        }
        match &self.inner {
            Which::Remote(remote) => remote.get(gets, by),
            Which::Local(local) => {
                let keys: Vec<Key> = gets.iter().map(|get| get.key).collect();
                local.lane(|lane| lane.get(&local.view, gets)).unwrap_or_else(|error| {
                    let (kind, text) = (error.kind(), error.chain());
                    let failed = |key| GetDone {
                        key,
                        result: Err(Miss::Failed(Error::new(kind, text.clone()))),
                        buffer: None,
                    };
                    keys.into_iter().map(failed).collect()
                })
            }
        }
    }

    /// Stores blocks, see [`Lane::put`]. Whatever goes wrong is a put that failed.
    pub fn put(&self, puts: Vec<Put>, by: Instant) -> Vec<PutDone> {
        if Instant::now() >= by {
            let late = |put: Put| PutDone {
                key: put.key,
                result: Stored::Failed(Error::new(
                    ErrorKind::Timeout,
                    "the deadline passed before the block's turn",
                )),
                buffer: Some(put.buffer),
            };
            return puts.into_iter().map(late).collect();
        }
        match &self.inner {
            Which::Remote(remote) => remote.put(puts, by),
            Which::Local(local) => {
                let keys: Vec<Key> = puts.iter().map(|put| put.key).collect();
                local.lane(|lane| lane.put(&local.view, puts)).unwrap_or_else(|error| {
                    let (kind, text) = (error.kind(), error.chain());
                    let failed = |key| PutDone {
                        key,
                        result: Stored::Failed(Error::new(kind, text.clone())),
                        buffer: None,
                    };
                    keys.into_iter().map(failed).collect()
                })
            }
        }
    }
}
