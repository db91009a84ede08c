//! The background scrub, on real pools with real damage.
#![allow(missing_docs)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use engine::{Access, FormatOptions, NewNode, NodeKind, OpenOptions, Pool, ROOT, ScrubOptions, ScrubStat};

const LIMIT: Duration = Duration::from_secs(60);

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = nvme::SimRng::new(seed);
    let mut bytes: Vec<u8> = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(rng.next_u64().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn format(folder: &Path, raw: bool) -> PathBuf {
    let path = folder.join("pool");
    let size = raw.then_some(64 << 20);
    Pool::format(&path, &FormatOptions { size, raw, ..FormatOptions::default() }).unwrap();
    path
}

fn open(path: &Path) -> Pool {
    Pool::open(path, &OpenOptions { ram_bytes: 4 << 20, commit_interval_ms: 0, ..OpenOptions::default() })
        .unwrap()
}

fn put(pool: &Pool, name: &str, data: &[u8]) {
    let new = NewNode { kind: NodeKind::Region, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: None };
    let node = pool.create(ROOT, OsStr::new(name), &new).unwrap().node;
    let handle = pool.open_region(node, Access::Write, false).unwrap();
    let mut done = 0;
    while done < data.len() {
        done += handle.write_at(done as u64, &data[done..]).unwrap();
    }
}

fn wait_for(pool: &Pool, what: &str, until: impl Fn(&ScrubStat) -> bool) -> ScrubStat {
    let start = Instant::now();
    loop {
        let stat = pool.stat().scrub;
        if until(&stat) {
            return stat;
        }
        assert!(start.elapsed() < LIMIT, "{what}: {stat:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Flips one bit of the byte after `mark`, in whichever file of the pool holds it.
fn flip_after(path: &Path, mark: &[u8]) {
    let mut places = vec![path.to_path_buf()];
    while let Some(place) = places.pop() {
        if place.is_dir() {
            places.extend(fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let bytes = fs::read(&place).unwrap();
        if let Some(at) = bytes.windows(mark.len()).position(|window| window == mark) {
            let at = at + mark.len();
            let file = fs::File::options().write(true).open(&place).unwrap();
            file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
            file.sync_all().unwrap();
            return;
        }
    }
    panic!("the mark is nowhere");
}

fn fast() -> ScrubOptions {
    ScrubOptions { rate: 1 << 30, every: Duration::ZERO }
}

#[test]
fn it_finds_a_flipped_bit_while_reads_go_on() {
    for raw in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let path = format(folder.path(), raw);
        let pool = open(&path);
        let (read, rotten) = (noise(1, 2 << 20), noise(2, 5 << 20));
        put(&pool, "read", &read);
        put(&pool, "rotten", &rotten);
        pool.sync().unwrap();
        // In chunk 200 of 16 KiB.
        let at = 200 * (16 << 10) + 777;
        flip_after(&path, &rotten[at - 32..at]);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let node = pool.lookup(ROOT, OsStr::new("read")).unwrap().node;
                let handle = pool.open_region(node, Access::Read, false).unwrap();
                let mut rounds = 0u64;
                let mut bytes = vec![0; 100_000];
                while !stop.load(Relaxed) {
                    let offset = rounds * 70_001 % (read.len() - bytes.len()) as u64;
                    assert_eq!(handle.read_at(offset, &mut bytes).unwrap(), bytes.len());
                    assert!(bytes == read[offset as usize..offset as usize + bytes.len()]);
                    rounds += 1;
                    // Reads with pauses, so that the scrub has some air too.
                    std::thread::sleep(Duration::from_millis(300));
                }
                rounds
            });
            pool.start_scrub(&fast()).unwrap();
            let stat = wait_for(&pool, "the damage is not found", |stat| stat.last_finished != 0);
            stop.store(true, Relaxed);
            assert!(reader.join().unwrap() > 0);
            assert_eq!(stat.last_bad_chunks, 1, "{stat:?}");
            assert_eq!(stat.findings.len(), 1, "{stat:?}");
            for word in ["rotten", "chunk 200", "3276800..3293184", "member 0", "checksum"] {
                assert!(stat.findings[0].contains(word), "{word}: {stat:?}");
            }
        });
        assert!(pool.start_scrub(&fast()).is_err(), "one scrub a pool");
        pool.close().unwrap();
        // What it found is told after a restart too, and is nobody's attribute.
        let pool = open(&path);
        let stat = pool.stat().scrub;
        assert!(!stat.running && stat.passes >= 1 && stat.findings.len() == 1, "{stat:?}");
        assert!(pool.listxattr(ROOT).unwrap().is_empty());
        assert!(pool.getxattr(ROOT, OsStr::new("trusted.nvtier.scrub")).is_err());
        pool.close().unwrap();
    }
}

#[test]
fn it_goes_on_after_a_restart_and_keeps_its_rate() {
    let folder = tempfile::tempdir().unwrap();
    let path = format(folder.path(), true);
    let pool = open(&path);
    put(&pool, "a", &noise(1, 8 << 20));
    put(&pool, "b", &noise(2, 8 << 20));
    pool.close().unwrap();

    let slow = ScrubOptions { rate: 4 << 20, every: Duration::from_secs(1000) };
    let pool = open(&path);
    let start = Instant::now();
    pool.start_scrub(&slow).unwrap();
    let first = wait_for(&pool, "no progress", |stat| stat.done_bytes >= 3 << 20);
    // Three steps of 1 MiB are done; the third could begin half a second after the first at the earliest. No upper bound: only
    // that it is no faster than it was told.
    assert!(start.elapsed() >= Duration::from_millis(450), "{:?}", start.elapsed());
    assert_eq!((first.total_bytes, first.running, first.rate), (16 << 20, true, 4 << 20));
    pool.close().unwrap();

    let pool = open(&path);
    let noted = pool.stat().scrub;
    assert!(noted.done_bytes >= 3 << 20 && noted.started != 0 && !noted.running, "{noted:?}");
    pool.start_scrub(&ScrubOptions { rate: 1 << 30, ..slow }).unwrap();
    let stat = wait_for(&pool, "the pass does not end", |stat| stat.last_finished != 0);
    assert_eq!(stat.done_bytes, 16 << 20, "each byte once, over both runs");
    assert_eq!((stat.passes, stat.last_bad_chunks), (1, 0));
    assert!(pool.stat().verified_chunks * (16 << 10) < 14 << 20, "it did not begin anew");
    // The next pass is not due.
    assert_eq!(pool.stat().scrub.started, 0);
    pool.close().unwrap();
}

#[test]
fn it_waits_for_others_but_not_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let path = format(folder.path(), false);
    let pool = open(&path);
    put(&pool, "a", &noise(1, 4 << 20));
    pool.sync().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let node = pool.lookup(ROOT, OsStr::new("a")).unwrap().node;
            let handle = pool.open_region(node, Access::Read, false).unwrap();
            while !stop.load(Relaxed) {
                handle.read_at(0, &mut [0; 1000]).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        pool.start_scrub(&fast()).unwrap();
        wait_for(&pool, "it does not wait", |stat| stat.waiting);
        // Nothing but patience brings it on while the load lasts.
        wait_for(&pool, "it starves", |stat| stat.done_bytes > 0);
        stop.store(true, Relaxed);
        wait_for(&pool, "it does not end", |stat| stat.last_finished != 0);
    });
    pool.close().unwrap();
}
