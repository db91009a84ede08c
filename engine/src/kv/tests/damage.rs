//! What was stored is damaged, lost, or cannot be read: never a hit with other bytes, and never a neighbour's fault.

use super::*;

/// A store with these blocks, flushed.
fn filled(rig: &Rig, numbers: std::ops::Range<u64>) -> (Store, View, Lane) {
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert!(all_new(&put(&mut lane, &view, numbers)));
    store.flush().unwrap();
    (store, view, lane)
}

/// Where a block is: device and offset.
fn place(store: &Store, view: &View, n: u64) -> (Arc<dyn Device>, u64) {
    let mut state = store.shared().state();
    let (_, block) = state.find(&view.name(&key(n))).unwrap();
    let slab = &state.slabs[&block.slab];
    let piece = slab.slab.range(u64::from(block.slot) * slab.slot_bytes, slab.slot_bytes).next().unwrap();
    (piece.device, piece.offset)
}

/// Damages block 3 of 8 and looks at all of them, in the store as it is and in one that was opened anew.
fn only_block_3_goes(damage: impl Fn(&dyn Device, u64, &dyn Fn(u64) -> u64)) {
    for reopen in [false, true] {
        let rig = Rig::new(1, 4 << 20);
        let (mut store, mut view, mut lane) = filled(&rig, 0..8);
        let (device, offset) = place(&store, &view, 3);
        damage(&*device, offset, &|n| place(&store, &view, n).1);
        if reopen {
            drop((lane, view));
            store.close().unwrap();
            store = rig.store();
            view = store.view(PRINT, BLOCK, "").unwrap();
            lane = store.lane(None).unwrap();
        }
        // All in one batch: one bad block must not fail its neighbours.
        let results = get(&mut lane, &view, 0..8);
        for (n, result) in results.iter().enumerate() {
            assert_eq!(result.is_ok(), n != 3, "block {n}: {result:?}");
        }
        assert!(matches!(results[3], Err(Miss::Corrupt)));
        assert_eq!((store.stat().corrupt, store.stat().blocks), (1, 7));
        assert_eq!(view.lookup(&(0..8).map(key).collect::<Vec<_>>()), 3);
        // It can be stored again, and is whole then.
        assert!(all_new(&put(&mut lane, &view, [3])));
        assert_eq!(hits(&mut lane, &view, 0..8), [true; 8]);
    }
}

#[test]
fn bit_rot_is_a_miss() {
    only_block_3_goes(|device, offset, _| device.write_at(offset + 4000, &[0xa5; 64]).unwrap());
}

#[test]
fn zeros_are_a_miss() {
    only_block_3_goes(|device, offset, _| device.write_at(offset, &[0; BLOCK as usize]).unwrap());
}

#[test]
fn another_blocks_bytes_are_a_miss() {
    only_block_3_goes(|device, offset, of| {
        let mut other = vec![0; BLOCK as usize];
        device.read_at(of(5), &mut other).unwrap();
        device.write_at(offset, &other).unwrap();
    });
}

#[test]
fn a_half_written_block_is_a_miss() {
    only_block_3_goes(|device, offset, _| device.write_at(offset + 4096, &[0; 4096]).unwrap());
}

#[test]
fn the_same_bytes_under_another_key_or_put_have_another_sum() {
    let bytes = content(1, 100);
    let seed = seed_of(PRINT, BLOCK, b"");
    let sum = sum_of(seed, &key(1), 5, &bytes);
    assert_ne!(sum, sum_of(seed, &key(2), 5, &bytes));
    assert_ne!(sum, sum_of(seed, &key(1), 6, &bytes));
    assert_ne!(sum, sum_of(seed_of(b"other", BLOCK, b""), &key(1), 5, &bytes));
    assert_ne!(sum, sum_of(seed_of(PRINT, BLOCK * 2, b""), &key(1), 5, &bytes));
    assert_ne!(sum, sum_of(seed_of(PRINT, BLOCK, b"alice"), &key(1), 5, &bytes));
    // No way to move bytes between fingerprint and tenant.
    assert_ne!(seed_of(b"ab", BLOCK, b"c"), seed_of(b"a", BLOCK, b"bc"));
}

#[test]
fn lost_and_misdirected_writes_are_found() {
    for fault in [Fault::Lost, Fault::Misdirected(20 << 20), Fault::FlipBit(12_345)] {
        let rig = Rig::new(1, 8 << 20);
        let (store, view, mut lane) = filled(&rig, 0..8);
        let mut count = 0;
        rig.plan.choose(move |io| {
            let block = io.verb == Verb::Write && io.len == u64::from(BLOCK);
            count += u32::from(block);
            (block && count == 3).then_some(fault)
        });
        put(&mut lane, &view, 100..108);
        rig.plan.lift();
        store.flush().unwrap();
        let found = hits(&mut lane, &view, 100..108);
        assert_eq!(found.iter().filter(|hit| !**hit).count(), 1, "{fault:?}");
        assert_eq!(hits(&mut lane, &view, 0..8), [true; 8]);
        assert_eq!(store.stat().corrupt, 1);
    }
}

#[test]
fn a_slot_that_is_used_again_does_not_answer_for_its_old_block() {
    // A lost write to a slot that held another block leaves that one's bytes: they are right for its key, and not for this one.
    let rig = Rig::new(1, 4 << 20);
    let options = StoreOptions { budget_bytes: Some((9 * 4096 * 2) + (64 << 10)), ..rig.options() };
    let store = Store::open(&rig.pool(), options).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..8);
    store.flush().unwrap();
    rig.plan.choose(|io| (io.verb == Verb::Write && io.len == u64::from(BLOCK)).then_some(Fault::Lost));
    put(&mut lane, &view, 50..58);
    rig.plan.lift();
    store.flush().unwrap();
    assert!(!hits(&mut lane, &view, 50..58).contains(&true));
}

#[test]
fn a_read_that_fails_is_a_miss_and_is_counted() {
    for (fault, timeout) in
        [(Fault::Errno(5), false), (Fault::Hang, true), (Fault::Slow(Duration::from_secs(60)), true)]
    {
        let rig = Rig::new(1, 4 << 20);
        let (store, view, mut lane) = filled(&rig, 0..8);
        let bad = place(&store, &view, 3).1;
        rig.plan.choose(move |io| (io.verb == Verb::Read && io.offset == bad).then_some(fault));
        let results = get(&mut lane, &view, 0..8);
        rig.plan.lift();
        for (n, result) in results.iter().enumerate() {
            assert_eq!(result.is_ok(), n != 3, "{fault:?}, block {n}: {result:?}");
        }
        assert!(matches!(results[3], Err(Miss::Failed(_))));
        let stat = store.stat();
        assert_eq!((stat.io_errors, stat.timeouts, stat.bad_slots), (1, timeout.into(), 1));
        // Later lookups miss at once: nobody tries for ever.
        assert_eq!(view.lookup(&[key(3)]), 0);
        assert!(all_new(&put(&mut lane, &view, [3])));
        assert_eq!(hits(&mut lane, &view, [3]), [true]);
        assert_ne!(place(&store, &view, 3).1, bad);
    }
}

#[test]
fn a_read_that_is_right_the_second_time_is_a_hit() {
    for fault in [Fault::FlipBit(77), Fault::Errno(5)] {
        let rig = Rig::new(1, 4 << 20);
        let (store, view, mut lane) = filled(&rig, 0..4);
        rig.plan.at(rig.plan.operations(), fault);
        assert_eq!(hits(&mut lane, &view, 0..4), [true; 4]);
        let stat = store.stat();
        assert_eq!((stat.retried, stat.corrupt, stat.io_errors), (1, 0, 0));
    }
}

#[test]
fn a_write_that_fails_is_no_block() {
    for fault in [Fault::Errno(5), Fault::Errno(28), Fault::Hang] {
        let rig = Rig::new(1, 4 << 20);
        let (store, view, mut lane) = filled(&rig, 0..4);
        let mut first = true;
        rig.plan.choose(move |io| (io.verb == Verb::Write && std::mem::take(&mut first)).then_some(fault));
        let results = put(&mut lane, &view, 10..14);
        rig.plan.lift();
        assert!(matches!(results[0], Stored::Failed(_)) && all_new(&results[1..]), "{results:?}");
        assert_eq!(hits(&mut lane, &view, 10..14), [false, true, true, true]);
        store.flush().unwrap();
        assert!(all_new(&put(&mut lane, &view, [10])));
    }
}

#[test]
fn after_a_failed_flush_nothing_is_stored_and_everything_can_be_read() {
    let rig = Rig::new(1, 4 << 20);
    let (store, view, mut lane) = filled(&rig, 0..4);
    put(&mut lane, &view, 10..12);
    rig.plan.choose(|io| (io.verb == Verb::Flush).then_some(Fault::Errno(5)));
    assert_eq!(store.flush().unwrap_err().kind(), ErrorKind::Io);
    rig.plan.lift();
    assert!(store.flush().is_err());
    assert!(put(&mut lane, &view, [20]).iter().all(|result| matches!(result, Stored::Failed(_))));
    assert_eq!(hits(&mut lane, &view, [0, 1, 2, 3, 10, 11]), [true; 6]);
    assert!(!store.stat().failed.is_empty());
    drop((lane, view));
    assert!(store.close().is_err());
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert_eq!(hits(&mut lane, &view, 0..4), [true; 4]);
    assert!(all_new(&put(&mut lane, &view, [20])));
}

/// All bytes of the index, wherever they are.
fn log_pieces(store: &Store) -> Vec<(Arc<dyn Device>, u64, u64)> {
    let shared = store.shared();
    let mut pieces = Vec::new();
    for name in super::super::log::NAMES {
        let Ok(attr) = shared.pool.lookup(shared.dir, OsStr::new(name)) else { continue };
        let slab = shared.pool.open_slab(attr.node).unwrap();
        pieces.extend(slab.pieces().iter().map(|piece| (piece.device.clone(), piece.offset, piece.len)));
    }
    pieces
}

#[test]
fn a_damaged_index_loses_blocks_and_never_mixes_them_up() {
    let mut rng = nvme::SimRng::new(0x1d8);
    println!("seed 0x1d8");
    for round in 0..120 {
        let rig = Rig::new(1, 8 << 20);
        let (store, view, mut lane) = filled(&rig, 0..100);
        // Some of them in a checkpoint, some in the log behind it.
        if round % 2 == 0 {
            store.checkpoint().unwrap();
        }
        put(&mut lane, &view, 100..150);
        let pieces = log_pieces(&store);
        drop((lane, view));
        store.close().unwrap();
        let (device, offset, len) = &pieces[rng.in_range(0..pieces.len() as u64) as usize];
        for _ in 0..rng.in_range(1..4) {
            let len_of = [1, 64, 4096, 20_000][rng.in_range(0..4) as usize];
            let at = rng.in_range(0..(*len).min(64 << 10));
            let damage: Vec<u8> = (0..len_of.min(len - at)).map(|_| rng.next_u64() as u8).collect();
            device.write_at(offset + at, &damage).unwrap();
        }
        // `hits` compares every byte of what is found.
        let store = rig.store();
        let view = store.view(PRINT, BLOCK, "").unwrap();
        let mut lane = store.lane(None).unwrap();
        hits(&mut lane, &view, 0..150);
        assert!(all_new(&put(&mut lane, &view, 1000..1010)));
        store.flush().unwrap();
        drop((lane, view));
        store.close().unwrap();
        let store = rig.store();
        assert_eq!(
            store.stat().bad_index_pages,
            0,
            "round {round}: damage was not healed by writing the index anew"
        );
        let view = store.view(PRINT, BLOCK, "").unwrap();
        assert_eq!(hits(&mut store.lane(None).unwrap(), &view, 1000..1010), [true; 10]);
    }
}

#[test]
fn slabs_that_are_gone_are_misses() {
    let rig = Rig::new(1, 8 << 20);
    let (store, view, lane) = filled(&rig, 0..100);
    drop((lane, view));
    store.close().unwrap();
    let pool = rig.pool();
    let dir = pool.resolve(".nvtier-kv/default").unwrap().node;
    let slab = children(&pool, dir).unwrap().into_iter().find(|name| name.starts_with("slab-")).unwrap();
    pool.unlink(dir, OsStr::new(&slab)).unwrap();
    pool.close().unwrap();
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let found = hits(&mut store.lane(None).unwrap(), &view, 0..100).iter().filter(|hit| **hit).count();
    assert_eq!(found, 92);
}
