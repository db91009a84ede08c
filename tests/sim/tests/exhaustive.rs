//! A power cut after every write and flush of short workloads.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use sim_tests::config::Config;
use sim_tests::exhaustive::{format, run, workloads};

#[test]
fn a_cut_after_every_write_leaves_a_moment_that_was() {
    let workloads = workloads();
    assert!(workloads.len() >= 20);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let worker = || {
            while let Some(workload) = workloads.get(next.fetch_add(1, Relaxed)) {
                let count = run(workload, false).unwrap_or_else(|violation| panic!("{violation}"));
                println!("{}: {} places, {} cuts", workload.name, count.points, count.cuts);
                assert!(count.points > 10, "{}: {count:?}", workload.name);
            }
        };
        scope.spawn(worker);
        worker();
    });
}

#[test]
fn a_cut_while_a_pool_is_made_leaves_none_or_an_empty_one() {
    let two = Config { members: 2, lba: 4096, ..Config::SMALL };
    for config in [Config::SMALL, two] {
        let count = format(&config).unwrap_or_else(|violation| panic!("{violation}"));
        println!("{} places, {} cuts", count.points, count.cuts);
    }
}
