//! A store on simulated and on real devices.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nvme::{Buffer, Device, Fault, FaultDevice, FaultPlan, SimDevice, SimOptions, Verb};

use super::*;
use crate::pool::{FormatOptions, OpenOptions};

mod damage;
mod durable;
mod loads;
mod model;
mod room;
mod transfer;

pub(super) const BLOCK: u32 = 8192;
pub(super) const PRINT: &[u8] = b"weights and all that";

/// A pool on simulated devices that can go wrong.
pub(super) struct Rig {
    pub devices: Vec<Arc<dyn Device>>,
    pub plan: Arc<FaultPlan>,
    pub clock: Arc<AtomicU64>,
}

impl Rig {
    pub fn new(members: usize, data: u64) -> Rig {
        let plan = Arc::new(FaultPlan::new());
        let devices: Vec<Arc<dyn Device>> = (0..members)
            .map(|index| {
                let head = if index == 0 { 17 << 20 } else { 1 << 20 };
                let options = SimOptions { seed: index as u64, lba_size: 512, ..SimOptions::default() };
                let below: Arc<dyn Device> = Arc::new(SimDevice::new(head + data + 4096, options).unwrap());
                Arc::new(FaultDevice::new(below, plan.clone())) as Arc<dyn Device>
            })
            .collect();
        let format = FormatOptions { chunk_size: 4096, stripe_unit: 16 << 10, ..FormatOptions::default() };
        Pool::format_devices(&devices, &format).unwrap();
        Rig { devices, plan, clock: Arc::new(AtomicU64::new(1_000_000)) }
    }

    pub fn pool(&self) -> Pool {
        let options = OpenOptions { commit_interval_ms: 0, ram_bytes: 0, ..OpenOptions::default() };
        Pool::open_devices(&self.devices, &options).unwrap()
    }

    pub fn options(&self) -> StoreOptions {
        StoreOptions {
            window: Duration::ZERO,
            slab_bytes: Some(64 << 10),
            log_pages: 8,
            clock: Clock::Manual(self.clock.clone()),
            ..StoreOptions::default()
        }
    }

    pub fn store(&self) -> Store {
        Store::open(&self.pool(), self.options()).unwrap()
    }
}

pub(super) fn key(n: u64) -> Key {
    let mut bytes = [0x5a; 32];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Key::new(&bytes).unwrap()
}

/// Bytes that are unique per block and within it.
pub(super) fn content(n: u64, len: usize) -> Vec<u8> {
    let mut rng = nvme::SimRng::new(n ^ 0x6b76);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    bytes
}

pub(super) fn put(lane: &mut Lane, view: &View, numbers: impl IntoIterator<Item = u64>) -> Vec<Stored> {
    let puts = numbers.into_iter().map(|n| {
        let mut buffer = Buffer::heap(view.slot_bytes()).unwrap();
        buffer[..view.block_bytes() as usize].copy_from_slice(&content(n, view.block_bytes() as usize));
        Put { key: key(n), buffer, start: 0 }
    });
    lane.put(view, puts.collect()).unwrap().into_iter().map(|done| done.result).collect()
}

/// Loads; what comes must be right.
pub(super) fn get(
    lane: &mut Lane,
    view: &View,
    numbers: impl IntoIterator<Item = u64>,
) -> Vec<std::result::Result<(), Miss>> {
    let numbers: Vec<u64> = numbers.into_iter().collect();
    let gets = numbers.iter().map(|n| Get {
        key: key(*n),
        buffer: Buffer::heap(view.slot_bytes() + 4096).unwrap(),
        start: 4096,
    });
    let done = lane.get(view, gets.collect()).unwrap();
    let check = |(done, n): (GetDone, &u64)| {
        if done.result.is_ok() {
            let buffer = done.buffer.unwrap();
            let bytes = &buffer[4096..4096 + view.block_bytes() as usize];
            assert!(bytes == content(*n, bytes.len()), "wrong bytes of block {n}");
        }
        done.result
    };
    done.into_iter().zip(&numbers).map(check).collect()
}

pub(super) fn hits(lane: &mut Lane, view: &View, numbers: impl IntoIterator<Item = u64>) -> Vec<bool> {
    get(lane, view, numbers).into_iter().map(|result| result.is_ok()).collect()
}

/// Ends a store as a kill of its process does: nothing of what it would do at its end.
pub(super) fn kill<T>(store: &Store, others: T) {
    std::mem::forget((store.clone(), others));
}

fn all_new(results: &[Stored]) -> bool {
    results.iter().all(|result| matches!(result, Stored::New))
}

#[test]
fn blocks_come_back_and_outlive_the_process() {
    for members in [1, 3] {
        let rig = Rig::new(members, 4 << 20);
        let store = rig.store();
        let view = store.view(PRINT, BLOCK, "").unwrap();
        let mut lane = store.lane(None).unwrap();
        assert!(all_new(&put(&mut lane, &view, 0..40)));
        assert!(put(&mut lane, &view, [7]).iter().all(|result| matches!(result, Stored::Present)));
        assert_eq!(hits(&mut lane, &view, 0..41), [vec![true; 40], vec![false]].concat());
        let chain: Vec<Key> = (0..50).map(key).collect();
        assert_eq!(view.lookup(&chain), 40);
        assert_eq!(view.lookup(&chain[41..]), 0);
        store.flush().unwrap();
        // As after a kill: nothing of what the store would do at its end.
        kill(&store, (lane, view));
        let store = rig.store();
        let stat = store.stat();
        assert_eq!((stat.blocks, stat.bad_index_pages), (40, 0));
        let view = store.view(PRINT, BLOCK, "").unwrap();
        let mut lane = store.lane(None).unwrap();
        assert_eq!(hits(&mut lane, &view, 0..40), [true; 40]);
        assert_eq!(store.stat().corrupt, 0);
    }
}

#[test]
fn what_is_not_flushed_is_lost_at_most() {
    let rig = Rig::new(1, 4 << 20);
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..10);
    store.flush().unwrap();
    put(&mut lane, &view, 10..20);
    kill(&store, (lane, view));
    let store = rig.store();
    assert_eq!(store.stat().blocks, 10);
    // Closing is a flush.
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 10..20);
    drop((lane, view));
    store.close().unwrap();
    assert_eq!(rig.store().stat().blocks, 20);
}

#[test]
fn namespaces_and_tenants_never_see_each_other() {
    let rig = Rig::new(1, 4 << 20);
    let store = rig.store();
    let views = [
        store.view(PRINT, BLOCK, "").unwrap(),
        store.view(b"other weights", BLOCK, "").unwrap(),
        store.view(PRINT, BLOCK * 2, "").unwrap(),
        store.view(PRINT, BLOCK, "alice").unwrap(),
        store.view(PRINT, BLOCK, "bob").unwrap(),
    ];
    let mut lane = store.lane(None).unwrap();
    for (mine, view) in views.iter().enumerate() {
        assert!(all_new(&put(&mut lane, view, [mine as u64])));
        for (theirs, other) in views.iter().enumerate() {
            assert_eq!(hits(&mut lane, other, [mine as u64]), [theirs == mine]);
        }
        view.remove(&[key(mine as u64)]);
    }
    // The same key in each of them is a block of its own.
    for view in &views {
        assert!(all_new(&put(&mut lane, view, [99])));
    }
    assert_eq!(store.stat().blocks, 5);
    drop((lane, views));
    store.close().unwrap();
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "alice").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert_eq!(hits(&mut lane, &view, [99]), [true]);
    let stranger = store.view(PRINT, BLOCK, "eve").unwrap();
    assert_eq!(hits(&mut lane, &stranger, [99]), [false]);
    assert_eq!(store.namespaces().len(), 3);
}

#[test]
fn a_store_is_open_once_and_its_name_is_a_name() {
    let rig = Rig::new(1, 4 << 20);
    let pool = rig.pool();
    let store = Store::open(&pool, rig.options()).unwrap();
    assert_eq!(Store::open(&pool, rig.options()).unwrap_err().kind(), ErrorKind::Busy);
    let other = StoreOptions { name: "other".into(), ..rig.options() };
    let other = Store::open(&pool, other).unwrap();
    assert_eq!(Store::names(&pool).unwrap(), ["default", "other"]);
    assert_eq!(Store::remove(&pool, "other").unwrap_err().kind(), ErrorKind::Busy);
    other.close().unwrap();
    Store::remove(&pool, "other").unwrap();
    assert_eq!(Store::names(&pool).unwrap(), ["default"]);
    for bad in ["", "a/b", ".", "..", "a b", &"x".repeat(101)] {
        let options = StoreOptions { name: bad.into(), ..rig.options() };
        assert_eq!(Store::open(&pool, options).unwrap_err().kind(), ErrorKind::InvalidName, "{bad:?}");
    }
    store.close().unwrap();
}

#[test]
fn bad_arguments_are_errors() {
    let rig = Rig::new(1, 4 << 20);
    let store = rig.store();
    assert_eq!(store.view(PRINT, 0, "").unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(store.view(PRINT, BLOCK_MAX + 1, "").unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(store.view(&[0; FINGERPRINT_MAX + 1], BLOCK, "").unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(Key::new(&[0; 15]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(Key::new(&[0; 33]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(Key::from_hex(&key(7).to_string()).unwrap(), key(7));
    assert!(Key::from_hex("zz").is_err() && Key::from_hex("é".repeat(20).as_str()).is_err());
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    for (len, start) in [(4096, 0), (12288, 8192), (12288, 100), (12288, usize::MAX - 4095)] {
        let buffer = Buffer::heap(len).unwrap();
        let error = lane.put(&view, vec![Put { key: key(1), buffer, start }]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    let other = StoreOptions { name: "other".into(), ..rig.options() };
    let other = Store::open(&store.shared().pool, other).unwrap();
    assert_eq!(other.lane(None).unwrap().get(&view, vec![]).unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn a_pool_that_was_a_directory_and_threads() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let pool = Pool::open(&path, &OpenOptions::default()).unwrap();
    let options = || StoreOptions {
        budget_bytes: Some(64 << 20),
        slab_bytes: Some(4 << 20),
        ..StoreOptions::default()
    };
    let store = Store::open(&pool, options()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let store = &store;
            scope.spawn(move || {
                let view = store.view(PRINT, 64 << 10, "").unwrap();
                let mut lane = store.lane(None).unwrap();
                for round in 0..8 {
                    let first = thread * 1000 + round * 8;
                    assert!(all_new(&put(&mut lane, &view, first..first + 8)));
                    assert_eq!(hits(&mut lane, &view, first..first + 8), [true; 8]);
                }
                // And all of them at once for the same blocks.
                for n in 0..50 {
                    put(&mut lane, &view, [90_000 + n]);
                    hits(&mut lane, &view, [90_000 + n]);
                }
            });
        }
    });
    assert_eq!(store.stat().blocks, 4 * 64 + 50);
    store.close().unwrap();
    pool.close().unwrap();
    // Sums of the pool have nothing to say about slabs.
    let pool = Pool::open(&path, &OpenOptions::default()).unwrap();
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    let store = Store::open(&pool, options()).unwrap();
    let view = store.view(PRINT, 64 << 10, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert_eq!(store.stat().blocks, 4 * 64 + 50);
    assert!(hits(&mut lane, &view, (0..4).flat_map(|t| t * 1000..t * 1000 + 64)).iter().all(|hit| *hit));
    let used = pool.stat().used_bytes;
    drop((lane, view));
    store.close().unwrap();
    Store::remove(&pool, "default").unwrap();
    pool.sync().unwrap();
    assert!(pool.stat().used_bytes < used && pool.stat().used_bytes < 1 << 20, "{}", pool.stat().used_bytes);
}
