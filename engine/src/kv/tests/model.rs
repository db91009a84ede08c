//! Any sequence of calls against a plain map.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Call {
    Put(u8, Vec<u8>),
    Get(u8, Vec<u8>),
    Remove(u8, Vec<u8>),
    Pin(u8, Vec<u8>, bool),
    Flush,
    Checkpoint,
    Reopen,
    /// Ends without a commit.
    Kill,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let keys = || proptest::collection::vec(0u8..60, 1..12);
    let call = prop_oneof![
        6 => (0u8..3, keys()).prop_map(|(view, keys)| Call::Put(view, keys)),
        4 => (0u8..3, keys()).prop_map(|(view, keys)| Call::Get(view, keys)),
        1 => (0u8..3, keys()).prop_map(|(view, keys)| Call::Remove(view, keys)),
        1 => (0u8..3, keys(), any::<bool>()).prop_map(|(view, keys, pinned)| Call::Pin(view, keys, pinned)),
        2 => Just(Call::Flush),
        1 => Just(Call::Checkpoint),
        1 => Just(Call::Reopen),
        1 => Just(Call::Kill),
    ];
    proptest::collection::vec(call, 1..60)
}

fn views(store: &Store) -> [View; 3] {
    [
        store.view(PRINT, BLOCK, "").unwrap(),
        store.view(b"other", BLOCK, "").unwrap(),
        store.view(PRINT, BLOCK, "tenant").unwrap(),
    ]
}

/// Blocks that the store itself says are there, which puts made them, and whether they are pinned.
fn there(views: &[View; 3]) -> HashMap<(u8, u64), (u64, bool)> {
    let of = |(index, view): (u8, &View)| {
        view.blocks().into_iter().map(move |(key, info)| {
            let n = u64::from_le_bytes(key.as_bytes()[..8].try_into().unwrap());
            ((index, n), (info.generation, info.pinned))
        })
    };
    (0..).zip(views).flat_map(of).collect()
}

fn check(calls: Vec<Call>, roomy: bool) {
    let rig = Rig::new(2, 4 << 20);
    let budget = if roomy { 4 << 20 } else { 2 * 40 * 4096 + 24 * u64::from(BLOCK) };
    let options = || StoreOptions { budget_bytes: Some(budget), ..rig.options() };
    let mut store = Store::open(&rig.pool(), options()).unwrap();
    let mut now = views(&store);
    let mut lane = store.lane(None).unwrap();
    // What was there when everything was last made durable.
    let mut durable = HashMap::new();
    // Blocks of which each view may have some.
    let mut known: HashMap<(u8, u64), ()> = HashMap::new();
    for call in calls {
        match call {
            Call::Put(view, mut keys) => {
                keys.sort_unstable();
                keys.dedup();
                let numbers: Vec<u64> = keys.iter().map(|n| u64::from(*n) + 1000 * u64::from(view)).collect();
                let results = put(&mut lane, &now[usize::from(view)], numbers.clone());
                for (n, result) in numbers.iter().zip(&results) {
                    match result {
                        Stored::New | Stored::Present => drop(known.insert((view, *n), ())),
                        Stored::Refused(Refusal::Space) if !roomy => {}
                        other => panic!("{other:?}"),
                    }
                }
                if roomy {
                    assert!(
                        now[usize::from(view)]
                            .contains(&numbers.iter().map(|n| key(*n)).collect::<Vec<_>>())
                            .iter()
                            .all(|there| *there)
                    );
                }
            }
            Call::Get(view, keys) => {
                let numbers: Vec<u64> = keys.iter().map(|n| u64::from(*n) + 1000 * u64::from(view)).collect();
                let is = there(&now);
                let found = hits(&mut lane, &now[usize::from(view)], numbers.clone());
                for (n, hit) in numbers.iter().zip(found) {
                    assert_eq!(hit, is.contains_key(&(view, *n)));
                    assert!(!hit || known.contains_key(&(view, *n)));
                }
                // Nobody else's.
                let other = (view + 1) % 3;
                assert!(!hits(&mut lane, &now[usize::from(other)], numbers).contains(&true));
            }
            Call::Remove(view, keys) => {
                let numbers: Vec<u64> = keys.iter().map(|n| u64::from(*n) + 1000 * u64::from(view)).collect();
                let keys: Vec<Key> = numbers.iter().map(|n| key(*n)).collect();
                now[usize::from(view)].remove(&keys);
                assert!(!now[usize::from(view)].contains(&keys).contains(&true));
            }
            Call::Pin(view, keys, pinned) => {
                let keys: Vec<Key> =
                    keys.iter().map(|n| key(u64::from(*n) + 1000 * u64::from(view))).collect();
                now[usize::from(view)].pin(&keys, pinned);
            }
            Call::Flush => {
                store.flush().unwrap();
                durable = there(&now);
            }
            Call::Checkpoint => {
                store.checkpoint().unwrap();
                durable = there(&now);
            }
            Call::Reopen | Call::Kill => {
                let before = there(&now);
                let killed = matches!(call, Call::Kill);
                if killed {
                    kill(&store, (lane, now));
                } else {
                    drop((lane, now));
                    store.close().unwrap();
                }
                store = Store::open(&rig.pool(), options()).unwrap();
                now = views(&store);
                lane = store.lane(None).unwrap();
                let after = there(&now);
                if killed {
                    // What was durable and not taken out since is there.
                    for (name, (generation, _)) in &durable {
                        if before.get(name).is_some_and(|(now, _)| now == generation) {
                            assert!(after.contains_key(name), "{name:?} is lost");
                        }
                    }
                } else {
                    assert_eq!(after, before);
                }
                durable = after;
                for view in 0..3u8 {
                    let numbers: Vec<u64> =
                        durable.keys().filter(|name| name.0 == view).map(|name| name.1).collect();
                    assert!(hits(&mut lane, &now[usize::from(view)], numbers).iter().all(|hit| *hit));
                }
                assert_eq!(store.stat().corrupt, 0);
            }
        }
        let stat = store.stat();
        assert!(stat.allocated_bytes <= stat.budget_bytes, "{stat:?}");
        assert_eq!(stat.corrupt, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_roomy_store_is_a_map(calls in calls()) {
        check(calls, true);
    }

    #[test]
    fn a_full_store_is_a_map_that_forgets(calls in calls()) {
        check(calls, false);
    }
}
