//! The first command of the README.

use std::fs;

use nvtier_tests::{nvtier, scratch};

#[test]
fn the_demo_runs_and_leaves_nothing() {
    let folder = scratch();
    let ran = nvtier(["demo", "--dir", folder.path().to_str().unwrap(), "--size", "48MiB"]).ok();
    assert!(!ran.stdout.is_empty(), "the demo said nothing: {ran:#?}");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "the demo left {left:?}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(folder.path().to_str().unwrap()), "the demo left a mount");
}
