//! Twenty rounds of `kill -9` under load: ten of the mount daemon, four of an importer, six of an embedded owner, half of them on a
//! directory pool and half on an image. `cargo xtask kill` runs more of them.

use std::fs::File;
use std::path::PathBuf;

use nvtier_tests::{kill, skip};

#[test]
fn nothing_that_was_promised_is_lost_to_kills_under_load() {
    if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
        return skip(&format!("nothing can be mounted here: /dev/fuse: {error}"));
    }
    let clients = PathBuf::from(env!("CARGO_BIN_EXE_kill-rounds"));
    let totals = kill::run(&kill::Options { rounds: 20, first_seed: 1, clients, keep: false });
    println!("{}", totals.line());
    assert!(totals.is_clean(), "{:#?}", totals.findings);
    assert_eq!(totals.victims.values().sum::<u64>(), 20);
    assert!(totals.steps >= 20, "there was no load: {} steps", totals.steps);
}
