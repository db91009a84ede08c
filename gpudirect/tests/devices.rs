//! Several devices at once: a lane each, on threads of their own.

mod common;

use common::{contents, fake, load, plan, small, two_files};
use gpudirect::driver::fake::FakeOptions;
use gpudirect::{CachePolicy, Lane, PlanOptions, Shard};

/// Each rank loads its part of every tensor that is cut, from the same files at the same time.
#[test]
fn ranks_load_their_parts_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let world = 4;
    // Of 1 MiB; the others have lengths that do not divide.
    let rules = vec![("model.?.8.weight".to_owned(), 0)];
    let loads = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (paths, rules) = (&paths, rules.clone());
                scope.spawn(move || {
                    let (device, driver) = fake(FakeOptions::default());
                    let mut lane = Lane::new(driver, small()).unwrap();
                    let options =
                        PlanOptions { shard: Some(Shard { rank, world, rules }), ..PlanOptions::default() };
                    let plan = plan(paths, CachePolicy::Auto, &options).unwrap();
                    let loaded = load(&mut lane, &plan).unwrap();
                    let found = contents(&lane, &loaded);
                    drop((loaded, lane));
                    assert_eq!(device.leaks(), [""; 0]);
                    found
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    for (name, bytes) in &expected {
        if name.contains(".8.") {
            let whole: Vec<u8> = loads.iter().flat_map(|rank| rank[name].clone()).collect();
            assert!(whole == *bytes, "{name}");
        } else {
            assert!(loads.iter().all(|rank| rank[name] == *bytes), "{name}");
        }
    }
}

/// One plan, shared by the lanes of two devices.
#[test]
fn two_devices_load_one_plan() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let plan = plan(&paths, CachePolicy::Auto, &PlanOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (_, driver) = fake(FakeOptions::default());
                let mut lane = Lane::new(driver, small()).unwrap();
                let loaded = load(&mut lane, &plan).unwrap();
                assert!(contents(&lane, &loaded) == expected);
            });
        }
    });
}
