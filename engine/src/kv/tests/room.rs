//! Budgets, eviction, admission, expiry, quotas.

use super::*;

fn budgeted(rig: &Rig, slots: u64) -> StoreOptions {
    // Two logs of some pages, and whole slabs of eight blocks.
    StoreOptions { budget_bytes: Some(2 * 16 * 4096 + slots * u64::from(BLOCK)), ..rig.options() }
}

#[test]
fn a_store_that_is_full_makes_room_and_stays_in_its_budget() {
    let rig = Rig::new(1, 8 << 20);
    let store = Store::open(&rig.pool(), budgeted(&rig, 64)).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    for first in (0..600).step_by(10) {
        assert!(all_new(&put(&mut lane, &view, first..first + 10)));
        let stat = store.stat();
        assert!(stat.allocated_bytes <= stat.budget_bytes, "{stat:?}");
        // The last ones are there, whatever went for them.
        assert_eq!(hits(&mut lane, &view, first..first + 10), [true; 10]);
    }
    let stat = store.stat();
    assert!(stat.blocks >= 60 && stat.evictions >= 500, "{stat:?}");
    assert_eq!(stat.corrupt, 0);
}

#[test]
fn a_full_pool_is_no_error() {
    let rig = Rig::new(1, 1 << 20);
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    // Somebody else fills the pool.
    let pool = store.shared().pool.clone();
    let attr = pool.create(ROOT, OsStr::new("big"), &log::private(NodeKind::Region)).unwrap();
    let handle = pool.open_region(attr.node, crate::Access::Write, false).unwrap();
    put(&mut lane, &view, 0..8);
    let mut at = 0;
    while handle.write_at(at, &[7; 65536]).is_ok() {
        at += 65536;
    }
    drop(handle);
    for first in (10..200).step_by(5) {
        assert!(all_new(&put(&mut lane, &view, first..first + 5)), "{:?}", store.stat());
    }
    store.flush().unwrap();
    assert_eq!(hits(&mut lane, &view, 195..200), [true; 5]);
}

#[test]
fn blocks_of_another_size_get_room() {
    let rig = Rig::new(1, 8 << 20);
    let store = Store::open(&rig.pool(), budgeted(&rig, 32)).unwrap();
    let small = store.view(PRINT, BLOCK, "").unwrap();
    let large = store.view(PRINT, 4 * BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert!(all_new(&put(&mut lane, &small, 0..20)));
    assert!(all_new(&put(&mut lane, &small, 20..40)));
    assert!(all_new(&put(&mut lane, &large, 0..4)));
    assert_eq!(hits(&mut lane, &large, 0..4), [true; 4]);
    let stat = store.stat();
    assert!(stat.allocated_bytes <= stat.budget_bytes);
    drop((lane, small, large));
    store.close().unwrap();
    let store = Store::open(&rig.pool(), budgeted(&rig, 32)).unwrap();
    assert_eq!(store.stat().blocks, stat.blocks);
}

#[test]
fn pinned_blocks_stay() {
    let rig = Rig::new(1, 8 << 20);
    let store = Store::open(&rig.pool(), budgeted(&rig, 32)).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..10);
    let chain: Vec<Key> = (0..20).map(key).collect();
    assert_eq!(view.pin(&chain, true), 10);
    for first in (100..400).step_by(10) {
        put(&mut lane, &view, first..first + 10);
    }
    assert_eq!(hits(&mut lane, &view, 0..10), [true; 10]);
    assert_eq!(store.stat().pinned, 10);
    drop((lane, view));
    store.close().unwrap();
    let store = Store::open(&rig.pool(), budgeted(&rig, 32)).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert_eq!(store.stat().pinned, 10);
    // When everything is pinned, puts are refused and nothing hangs.
    let all: Vec<Key> = view.blocks().into_iter().map(|(key, _)| key).collect();
    view.pin(&all, true);
    let mut refused = 0;
    for n in 1000..1100 {
        refused += usize::from(matches!(put(&mut lane, &view, [n])[0], Stored::Refused(Refusal::Space)));
        view.pin(&[key(n)], true);
    }
    assert!(refused >= 60, "{refused}");
    assert_eq!(hits(&mut lane, &view, 0..10), [true; 10]);
    assert_eq!(view.pin(&chain, false), 10);
    assert!(all_new(&put(&mut lane, &view, 2000..2010)));
}

#[test]
fn the_tail_of_a_prefix_goes_before_its_head() {
    let rig = Rig::new(1, 8 << 20);
    let store = Store::open(&rig.pool(), budgeted(&rig, 32)).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..16);
    // Until some of it had to go.
    let chain: Vec<Key> = (0..16).map(key).collect();
    let mut next = 1000;
    while view.contains(&chain).iter().all(|there| *there) {
        put(&mut lane, &view, [next]);
        next += 1;
    }
    let there = view.contains(&chain);
    let first_gone = there.iter().position(|there| !there).unwrap();
    assert!(first_gone > 0 && !there[first_gone..].contains(&true), "{there:?}");
}

#[test]
fn a_stream_does_not_wash_out_what_is_asked_for() {
    let rig = Rig::new(1, 8 << 20);
    let store = Store::open(&rig.pool(), budgeted(&rig, 64)).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..20);
    for n in 0..300 {
        if n % 10 == 0 {
            hits(&mut lane, &view, 0..20);
        }
        put(&mut lane, &view, [1000 + n]);
    }
    assert_eq!(hits(&mut lane, &view, 0..20), [true; 20]);
}

#[test]
fn a_block_that_nobody_comes_back_for_is_not_written() {
    let rig = Rig::new(1, 8 << 20);
    let options = StoreOptions { admission: Admission::SecondOffer { remember: 1000 }, ..rig.options() };
    let store = Store::open(&rig.pool(), options).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    let first = put(&mut lane, &view, 0..10);
    assert!(first.iter().all(|result| matches!(result, Stored::Refused(Refusal::Admission))));
    assert_eq!(store.stat().written_bytes, 0);
    assert!(all_new(&put(&mut lane, &view, 0..10)));
    assert_eq!(store.stat().refused_admission, 10);
}

#[test]
fn a_spent_write_budget_stops_puts_until_the_next_day_also_after_a_restart() {
    let rig = Rig::new(1, 8 << 20);
    let options = || StoreOptions { write_bytes_per_day: Some(10 * u64::from(BLOCK)), ..rig.options() };
    let store = Store::open(&rig.pool(), options()).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    let stored = |lane: &mut Lane, view: &View, from: u64| {
        put(lane, view, from..from + 8).iter().filter(|result| matches!(result, Stored::New)).count()
    };
    assert_eq!(stored(&mut lane, &view, 0), 8);
    drop((lane, view));
    store.close().unwrap();
    let store = Store::open(&rig.pool(), options()).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert_eq!(stored(&mut lane, &view, 10), 2);
    assert_eq!((store.stat().refused_budget, store.stat().written_today_bytes), (6, 10 * u64::from(BLOCK)));
    rig.clock.fetch_add(86_400, Relaxed);
    assert_eq!(stored(&mut lane, &view, 20), 8);
    assert_eq!(store.stat().written_bytes, 18 * u64::from(BLOCK));
}

#[test]
fn a_block_whose_time_is_over_is_gone() {
    let rig = Rig::new(1, 8 << 20);
    let options = || StoreOptions { ttl: Some(Duration::from_secs(100)), ..rig.options() };
    let store = Store::open(&rig.pool(), options()).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..3);
    rig.clock.fetch_add(60, Relaxed);
    put(&mut lane, &view, 3..5);
    assert_eq!(hits(&mut lane, &view, 0..5), [true; 5]);
    drop((lane, view));
    store.close().unwrap();
    let store = Store::open(&rig.pool(), options()).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    rig.clock.fetch_add(50, Relaxed);
    assert_eq!(hits(&mut store.lane(None).unwrap(), &view, 0..5), [false, false, false, true, true]);
    assert_eq!((store.stat().expired, store.stat().blocks), (3, 2));
}

#[test]
fn a_tenant_keeps_to_his_quota_and_hurts_nobody_else() {
    let rig = Rig::new(1, 8 << 20);
    let store = rig.store();
    store.set_quota("alice", 5 * u64::from(BLOCK)).unwrap();
    let alice = store.view(PRINT, BLOCK, "alice").unwrap();
    let bob = store.view(PRINT, BLOCK, "bob").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &bob, 0..20);
    for n in 0..30 {
        assert!(all_new(&put(&mut lane, &alice, [n])));
        assert!(
            store
                .tenants()
                .iter()
                .all(|tenant| tenant.quota_bytes == 0 || tenant.used_bytes <= tenant.quota_bytes)
        );
    }
    assert_eq!(hits(&mut lane, &alice, 25..30), [true; 5]);
    assert_eq!(hits(&mut lane, &bob, 0..20), [true; 20]);
    // More than his quota in one batch.
    let results = put(&mut lane, &alice, 100..110);
    assert_eq!(results.iter().filter(|result| matches!(result, Stored::New)).count(), 5);
    drop((lane, alice, bob));
    store.close().unwrap();
    let store = rig.store();
    let tenant = store.tenants().into_iter().find(|tenant| tenant.name == "alice").unwrap();
    assert_eq!((tenant.quota_bytes, tenant.used_bytes), (5 * u64::from(BLOCK), 5 * u64::from(BLOCK)));
    let alice = store.view(PRINT, BLOCK, "alice").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert!(all_new(&put(&mut lane, &alice, 200..203)));
    assert_eq!(
        store.tenants().iter().find(|tenant| tenant.name == "alice").unwrap().used_bytes,
        5 * u64::from(BLOCK)
    );
}

#[test]
fn a_quota_that_shrinks_lets_the_oldest_blocks_go_at_once_and_pinned_ones_stay() {
    let rig = Rig::new(1, 8 << 20);
    let store = rig.store();
    let alice = store.view(PRINT, BLOCK, "alice").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert!(all_new(&put(&mut lane, &alice, 0..10)));
    alice.pin(&[key(0), key(1)], true);
    let used = |store: &Store| store.tenants()[1].used_bytes / u64::from(BLOCK);
    store.set_quota("alice", 4 * u64::from(BLOCK)).unwrap();
    assert_eq!(used(&store), 4);
    assert_eq!(alice.contains(&[0, 1, 7, 8, 9].map(key)), [true, true, false, true, true]);
    // Pinned blocks alone are more than he may have: he stores nothing.
    store.set_quota("alice", u64::from(BLOCK)).unwrap();
    assert_eq!(used(&store), 2);
    let refused = put(&mut lane, &alice, 20..22);
    assert!(refused.iter().all(|done| matches!(done, Stored::Refused(Refusal::Quota))), "{refused:?}");
    store.set_quota("alice", 0).unwrap();
    assert!(all_new(&put(&mut lane, &alice, 20..30)));
    drop((lane, alice));
    store.close().unwrap();
    assert_eq!(rig.store().tenants()[1].quota_bytes, 0);
}

#[test]
fn quotas_of_the_options_are_those_of_old_and_new_tenants() {
    let rig = Rig::new(1, 8 << 20);
    let store = rig.store();
    let mut lane = store.lane(None).unwrap();
    for tenant in ["alice", "bob"] {
        assert!(all_new(&put(&mut lane, &store.view(PRINT, BLOCK, tenant).unwrap(), 0..10)));
    }
    drop(lane);
    store.close().unwrap();
    let quotas = vec![("alice".to_owned(), 3 * u64::from(BLOCK)), ("eve".to_owned(), 0)];
    let options = StoreOptions { quotas, tenant_quota: 5 * u64::from(BLOCK), ..rig.options() };
    let store = Store::open(&rig.pool(), options).unwrap();
    let mut lane = store.lane(None).unwrap();
    for tenant in ["", "carol", "eve"] {
        put(&mut lane, &store.view(PRINT, BLOCK, tenant).unwrap(), (0..10).chain(10..20));
    }
    let told = |store: &Store| -> Vec<(String, u64, u64)> {
        let blocks = |bytes: u64| bytes / u64::from(BLOCK);
        let tenants = store.tenants().into_iter();
        tenants.map(|info| (info.name, blocks(info.quota_bytes), blocks(info.used_bytes))).collect()
    };
    let wanted = [("", 0, 20), ("alice", 3, 3), ("bob", 0, 10), ("eve", 0, 20), ("carol", 5, 5)];
    let wanted = wanted.map(|(name, quota, used)| (name.to_owned(), quota, used));
    assert_eq!(told(&store), wanted);
    drop(lane);
    store.close().unwrap();
    // They are in the store.
    assert_eq!(told(&rig.store()), wanted);
    let long = StoreOptions { quotas: vec![("x".repeat(TENANT_MAX + 1), 1)], ..rig.options() };
    assert_eq!(Store::open(&rig.pool(), long).unwrap_err().kind(), ErrorKind::TooLarge);
}

#[test]
fn a_smaller_budget_takes_slabs_away() {
    let rig = Rig::new(1, 8 << 20);
    let store = Store::open(&rig.pool(), budgeted(&rig, 128)).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    put(&mut lane, &view, 0..128);
    drop((lane, view));
    store.close().unwrap();
    let store = Store::open(&rig.pool(), budgeted(&rig, 32)).unwrap();
    let stat = store.stat();
    assert!(stat.allocated_bytes <= stat.budget_bytes && stat.blocks >= 24, "{stat:?}");
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let found = hits(&mut store.lane(None).unwrap(), &view, 0..128).iter().filter(|hit| **hit).count();
    assert_eq!((found as u64, store.stat().corrupt), (stat.blocks, 0));
    drop(view);
    store.close().unwrap();
    assert_eq!(Store::open(&rig.pool(), budgeted(&rig, 32)).unwrap().stat().blocks, stat.blocks);
}

#[test]
fn checkpoints_and_logs_take_turns() {
    let rig = Rig::new(1, 8 << 20);
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    for n in 0..200 {
        put(&mut lane, &view, [n]);
        store.flush().unwrap();
    }
    let stat = store.stat();
    assert!(stat.checkpoints > 5 && stat.commits >= 200, "{stat:?}");
    drop((lane, view));
    store.close().unwrap();
    let store = rig.store();
    assert_eq!((store.stat().blocks, store.stat().bad_index_pages), (200, 0));
    let view = store.view(PRINT, BLOCK, "").unwrap();
    assert_eq!(hits(&mut store.lane(None).unwrap(), &view, 0..200), [true; 200]);
}

/// Commits go on while a checkpoint is written beside them, and what they made durable is there whether or not it came to its end.
#[test]
fn commits_do_not_wait_for_a_checkpoint() {
    for finish in [false, true] {
        let rig = Rig::new(1, 16 << 20);
        let options = || StoreOptions { log_pages: 64, checkpoint_step: 4, ..rig.options() };
        let store = Store::open(&rig.pool(), options()).unwrap();
        let view = store.view(PRINT, BLOCK, "").unwrap();
        let mut lane = store.lane(None).unwrap();
        let mut next = 0;
        while !store.checkpoint_some().unwrap() {
            assert!(next < 400, "none is ever due");
            assert!(all_new(&put(&mut lane, &view, [next])));
            store.flush().unwrap();
            next += 1;
        }
        let before = store.stat().checkpoints;
        // Blocks that it has written already go, their slots are used again, and more come, commit after commit.
        for n in 0..3 {
            view.remove(&[key(n)]);
            store.flush().unwrap();
            assert!(all_new(&put(&mut lane, &view, [1000 + n])));
            store.flush().unwrap();
            assert!(store.checkpoint_some().unwrap(), "it came to its end too soon to show anything");
        }
        assert_eq!(store.stat().checkpoints, before);
        while finish && store.checkpoint_some().unwrap() {}
        assert_eq!(store.stat().checkpoints, before + u64::from(finish));
        assert!(all_new(&put(&mut lane, &view, [2000])));
        store.flush().unwrap();
        kill(&store, (view, lane));
        let store = Store::open(&rig.pool(), options()).unwrap();
        let view = store.view(PRINT, BLOCK, "").unwrap();
        let mut lane = store.lane(None).unwrap();
        assert_eq!(hits(&mut lane, &view, 0..3), [false; 3]);
        assert!(!hits(&mut lane, &view, (3..next).chain(1000..1003).chain([2000])).contains(&false));
        assert_eq!((store.stat().blocks, store.stat().bad_index_pages), (next - 3 + 4, 0));
    }
}
