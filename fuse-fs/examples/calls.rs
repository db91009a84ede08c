//! Calls per second on the names of a directory: create, stat, open/close, readdir with stat, unlink.
//!
//! `cargo run --release -p nvtier-fuse-fs --example calls -- DIR [FILES] [THREADS]`

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

fn main() {
    let mut words = std::env::args().skip(1);
    let directory = PathBuf::from(words.next().expect("usage: calls DIR [FILES] [THREADS]"));
    let files: usize = words.next().map_or(5000, |word| word.parse().expect("FILES"));
    let threads: usize = words.next().map_or(1, |word| word.parse().expect("THREADS"));
    let root = directory.join(format!("metadata-{}", std::process::id()));
    fs::create_dir(&root).expect("directory");
    let rate = |what: &str, each: &(dyn Fn(&Path) + Sync)| {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let root = &root;
                scope.spawn(move || {
                    for file in (thread..files).step_by(threads) {
                        each(&root.join(format!("file-{file}")));
                    }
                });
            }
        });
        println!("{what:12} {:10.0} /s", files as f64 / start.elapsed().as_secs_f64());
    };
    rate("create", &|path| drop(File::create_new(path).expect("create")));
    rate("stat", &|path| assert!(fs::metadata(path).is_ok()));
    rate("open/close", &|path| drop(File::open(path).expect("open")));
    let start = Instant::now();
    let listed =
        fs::read_dir(&root).expect("list").filter(|entry| entry.as_ref().is_ok_and(|e| e.metadata().is_ok()));
    assert_eq!(listed.count(), files);
    println!("{:12} {:10.0} /s", "list+stat", files as f64 / start.elapsed().as_secs_f64());
    rate("unlink", &|path| fs::remove_file(path).expect("unlink"));
    fs::remove_dir(&root).expect("remove");
}
