//! A KV store in the pool, and what it promises: everything that was there at a flush is there after a power cut, unless it made room or
//! was taken out since; nothing that is found is wrong; and no block is ever found that is not what was stored (a slot is used again only
//! when its old block is durably gone).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use engine::kv::{Clock, Get, Key, Lane, Miss, Put, Refusal, Store, StoreOptions, Stored, View};
use engine::{ErrorKind, Pool};
use nvme::Buffer;

use crate::config::Config;
use crate::content::noise;
use crate::world::{Done, Stop, violation};

/// Bytes of a block in each namespace: of another size, and no whole pages.
const BLOCKS: [u32; 3] = [8192, 8192, 6000];
/// The directory of all stores.
pub const DIRECTORY: &str = ".nvtier-kv";

/// Which block: namespace and number.
pub type Id = (usize, u64);

/// What must hold after a power cut.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    /// Blocks that were ever stored.
    ever: BTreeSet<Id>,
    /// Blocks that are durable, and the put that made them.
    durable: BTreeMap<Id, u64>,
}

impl Promise {
    /// Nothing has to be there.
    pub fn is_empty(&self) -> bool {
        self.durable.is_empty()
    }
}

/// An open store.
pub struct Kv {
    store: Store,
    views: Vec<View>,
    lane: Lane,
}

fn options(config: &Config) -> StoreOptions {
    StoreOptions {
        // A few slabs of a few slots, and logs that are full soon: everything happens often.
        budget_bytes: Some(config.capacity().min(1 << 20) / 4),
        slab_bytes: Some(32 << 10),
        log_pages: 4,
        checkpoint_step: 3,
        window: Duration::ZERO,
        clock: Clock::Manual(Default::default()),
        ..StoreOptions::default()
    }
}

fn key(id: Id) -> Key {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&id.1.to_le_bytes());
    Key::new(&bytes).expect("32 bytes are a key")
}

fn bytes(id: Id) -> Vec<u8> {
    noise(id.1 * 8 + id.0 as u64, BLOCKS[id.0] as usize)
}

/// An error of the pool or the store: want of space is none.
fn excused(what: &str, error: &engine::Error) -> Done {
    match error.kind() {
        ErrorKind::NoSpace => Ok(()),
        _ => violation(format!("{what} fails: {}", error.chain())),
    }
}

impl Kv {
    /// Opens the store, which is made where there is none. `None`: there is no space.
    pub fn open(pool: &Pool, config: &Config) -> Result<Option<Kv>, Stop> {
        match Kv::open_engine(pool, config) {
            Ok(kv) => Ok(Some(kv)),
            Err(error) => excused("opening the KV store", &error).map(|()| None),
        }
    }

    /// As [`open`](Self::open), with the engine's own error.
    pub fn open_engine(pool: &Pool, config: &Config) -> engine::Result<Kv> {
        let store = Store::open(pool, options(config))?;
        let views = [("weights", ""), ("other weights", ""), ("weights", "tenant")];
        let view = |(index, (print, tenant)): (usize, &(&str, &str))| {
            store.view(print.as_bytes(), BLOCKS[index], tenant)
        };
        let views = views.iter().enumerate().map(view).collect::<engine::Result<_>>()?;
        let lane = store.lane(None)?;
        Ok(Kv { store, views, lane })
    }

    /// What is there, and which put made it.
    fn blocks(&self) -> BTreeMap<Id, u64> {
        let number = |key: &Key| {
            let mut word = [0; 8];
            word.copy_from_slice(&key.as_bytes()[..8]);
            u64::from_le_bytes(word)
        };
        let of = |(index, view): (usize, &View)| {
            let blocks = view.blocks().into_iter();
            blocks.map(move |(key, info)| ((index, number(&key)), info.generation))
        };
        self.views.iter().enumerate().flat_map(of).collect()
    }

    /// Stores blocks.
    pub fn put(&mut self, space: usize, first: u64, count: u64, promise: &mut Promise) -> Done {
        let view = &self.views[space];
        let mut puts = Vec::new();
        for number in first..first + count {
            let mut buffer = match Buffer::heap(view.slot_bytes()) {
                Ok(buffer) => buffer,
                Err(error) => return violation(format!("a buffer: {error}")),
            };
            let bytes = bytes((space, number));
            buffer[..bytes.len()].copy_from_slice(&bytes);
            puts.push(Put { key: key((space, number)), buffer, start: 0 });
        }
        let done = match self.lane.put(view, puts) {
            Ok(done) => done,
            Err(error) => return violation(format!("a KV put fails: {}", error.chain())),
        };
        for (number, done) in (first..).zip(done) {
            match done.result {
                Stored::New => drop(promise.ever.insert((space, number))),
                Stored::Present | Stored::Refused(Refusal::Space) => {}
                Stored::Refused(why) => return violation(format!("a KV put is refused: {why:?}")),
                Stored::Failed(error) => excused("a KV put", &error)?,
            }
        }
        Ok(())
    }

    /// Loads blocks; returns which are there. None may be wrong.
    pub fn get(&mut self, space: usize, numbers: &[u64], promise: &Promise) -> Result<Vec<bool>, Stop> {
        let view = &self.views[space];
        let mut gets = Vec::new();
        for number in numbers {
            match Buffer::heap(view.slot_bytes()) {
                Ok(buffer) => gets.push(Get { key: key((space, *number)), buffer, start: 0 }),
                Err(error) => return violation(format!("a buffer: {error}")),
            }
        }
        let done = match self.lane.get(view, gets) {
            Ok(done) => done,
            Err(error) => return violation(format!("a KV get fails: {}", error.chain())),
        };
        let mut there = Vec::new();
        for (number, done) in numbers.iter().zip(done) {
            let id = (space, *number);
            match (done.result, done.buffer) {
                (Ok(()), Some(buffer)) => {
                    let wanted = bytes(id);
                    if buffer[..wanted.len()] != wanted[..] {
                        return violation(format!("KV block {id:?} is served with wrong bytes"));
                    }
                    if !promise.ever.contains(&id) {
                        return violation(format!("KV block {id:?} is there, and nobody stored it"));
                    }
                    there.push(true);
                }
                (Err(Miss::Absent), _) => there.push(false),
                (Err(miss), _) => return violation(format!("KV block {id:?} is damaged: {miss:?}")),
                (Ok(()), None) => return violation("a KV block without a buffer"),
            }
        }
        Ok(there)
    }

    /// Takes blocks out.
    pub fn remove(&mut self, space: usize, first: u64, count: u64) -> Done {
        let keys: Vec<Key> = (first..first + count).map(|number| key((space, number))).collect();
        self.views[space].remove(&keys);
        match self.views[space].lookup(&keys) {
            0 => Ok(()),
            _ => violation("a KV block that was taken out is there"),
        }
    }

    /// Some of a checkpoint that is written beside everything else.
    pub fn step(&mut self) -> Done {
        match self.store.checkpoint_some() {
            Ok(_) => Ok(()),
            Err(error) => violation(format!("a step of a KV checkpoint fails: {}", error.chain())),
        }
    }

    /// Makes all of it durable.
    pub fn flush(&mut self, whole: bool, promise: &mut Promise) -> Done {
        let done = if whole { self.store.checkpoint() } else { self.store.flush() };
        match done {
            Ok(()) => promise.durable = self.blocks(),
            Err(error) => return violation(format!("a KV flush fails: {}", error.chain())),
        }
        Ok(())
    }

    /// Everything that the store has, and that it should have. Returns how many blocks had to be there.
    pub fn check(&mut self, promise: &mut Promise) -> Result<u64, Stop> {
        let mut found: BTreeSet<Id> = BTreeSet::new();
        for space in 0..BLOCKS.len() {
            let numbers: Vec<u64> = promise.ever.iter().filter(|id| id.0 == space).map(|id| id.1).collect();
            let there = self.get(space, &numbers, promise)?;
            found.extend(
                numbers.iter().zip(there).filter(|(_, there)| *there).map(|(number, _)| (space, *number)),
            );
        }
        if let Some(lost) = promise.durable.keys().find(|id| !found.contains(id)) {
            return violation(format!("KV block {lost:?} was durable, and is lost"));
        }
        let must = promise.durable.len() as u64;
        let stat = self.store.stat();
        if stat.corrupt > 0 || stat.io_errors > 0 {
            return violation(format!("the KV store found damage: {stat:?}"));
        }
        if stat.allocated_bytes > stat.budget_bytes {
            return violation(format!("the KV store is over its budget: {stat:?}"));
        }
        promise.durable = self.blocks();
        Ok(must)
    }

    /// The power goes: what of the promise still holds.
    pub fn crash(&self, promise: &mut Promise) {
        let now = self.blocks();
        promise.durable.retain(|id, put| now.get(id) == Some(put));
    }

    /// Closes it.
    pub fn close(self, promise: &mut Promise) -> Done {
        let blocks = self.blocks();
        let Kv { store, views, lane } = self;
        drop((views, lane));
        match store.close() {
            Ok(()) => promise.durable = blocks,
            Err(error) => return violation(format!("closing the KV store fails: {}", error.chain())),
        }
        Ok(())
    }
}

/// Chunks that a store's regions take.
pub fn chunks(pool: &Pool, config: &Config) -> engine::Result<u64> {
    let mut bytes = 0;
    let Ok(top) = pool.resolve(DIRECTORY) else { return Ok(0) };
    for (_, store) in pool.readdir(top.node, 0, 1000)? {
        for (_, region) in pool.readdir(store.node, 0, 1000)? {
            bytes += pool.getattr(region.node)?.allocated;
        }
    }
    Ok(bytes / u64::from(config.chunk))
}
