//! Puts and gets of a KV store beside fio on the same file system, in turns.
//!
//!     cargo bench -p nvtier-benches --bench kv -- [--dir DIR] [--mib MIB] [--rounds N] [--index BLOCKS]
//!
//! One thread, 32 operations in flight, past the page cache, into space that was just reserved; puts with the flush at their end, as fio's
//! `end_fsync`. Gets in random order. `--index` measures the index instead, of so many blocks:
//! lookups by one thread, memory, and the time to open it. It puts real blocks of 4 KiB and gives their space back as it goes; `--dir /dev/shm` spares
//! the drive that.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use engine::kv::{Get, Key, Put, Store, StoreOptions, Stored};
use engine::{FormatOptions, OpenOptions, Pool};
use nvme::{Arena, ArenaOptions, SimRng};

const BATCH: usize = 32;

struct Args {
    dir: PathBuf,
    mib: u64,
    rounds: usize,
    index: Option<u64>,
}

fn args() -> Args {
    let mut args = Args { dir: "/var/tmp".into(), mib: 1024, rounds: 3, index: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().expect("a value");
        match word.as_str() {
            "--dir" => args.dir = value().into(),
            "--mib" => args.mib = value().parse().expect("a number"),
            "--rounds" => args.rounds = value().parse().expect("a number"),
            "--index" => args.index = Some(value().parse().expect("a number")),
            // What cargo adds.
            "--bench" => {}
            other => panic!("{other}: see the top of benches/benches/kv.rs"),
        }
    }
    args
}

/// User and system time of this process so far, seconds.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15, in hundredths of a second on Linux.
    (ticks(11) + ticks(12)) / 100.0
}

fn key(n: u64) -> Key {
    let mut rng = SimRng::new(n);
    let bytes: Vec<u8> = (0..4).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    Key::new(&bytes).expect("32 bytes")
}

fn shuffled(count: u64) -> Vec<u64> {
    let mut rng = SimRng::new(7);
    let mut order: Vec<u64> = (0..count).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, rng.in_range(0..last as u64 + 1) as usize);
    }
    order
}

/// GB/s of one fio run.
fn fio(file: &Path, rw: &str, block: u64, bytes: u64) -> f64 {
    let output = Command::new("fio")
        .args(["--name=kv", "--direct=1", "--ioengine=io_uring", "--iodepth=32", "--end_fsync=1"])
        .args(["--fallocate=native", "--output-format=json", "--random_generator=tausworthe64"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={rw}"))
        .arg(format!("--bs={block}"))
        .arg(format!("--size={bytes}"))
        .output()
        .expect("fio runs");
    let text = String::from_utf8_lossy(&output.stdout);
    // Of the part that moved bytes: total bytes over run time, as fio has them.
    let part =
        text.split(if rw.contains("read") { "\"read\" : {" } else { "\"write\" : {" }).nth(1).unwrap_or("");
    let field = |name: &str| {
        let rest = part.split(&format!("\"{name}\" : ")).nth(1).unwrap_or("0");
        rest.split([',', '\n']).next().and_then(|number| number.trim().parse::<f64>().ok()).unwrap_or(0.0)
    };
    field("io_bytes") / (field("runtime") / 1000.0) / 1e9
}

#[derive(Default)]
struct Figures {
    gbps: Vec<f64>,
    cpu_per_gb: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn store_round(dir: &Path, block: u64, bytes: u64, put: &mut Figures, get: &mut Figures) {
    let path = dir.join("pool");
    let _ = std::fs::remove_dir_all(&path);
    Pool::format(&path, &FormatOptions::default()).expect("a pool");
    let pool = Pool::open(&path, &OpenOptions { ram_bytes: 0, ..OpenOptions::default() }).expect("a pool");
    let options = StoreOptions {
        budget_bytes: Some(bytes + bytes / 4 + (256 << 20)),
        slab_bytes: Some(256 << 20),
        ..StoreOptions::default()
    };
    let store = Store::open(&pool, options).expect("a store");
    let view = store.view(b"bench", block as u32, "").expect("a view");
    let arena = Arena::new(2 * BATCH * block as usize, ArenaOptions::default()).expect("memory");
    let mut lane = store.lane(Some(&arena)).expect("a lane");
    let count = bytes / block;
    let mut rng = SimRng::new(block);
    let mut buffers: Vec<_> = (0..BATCH)
        .map(|_| {
            let mut buffer = arena.alloc(block as usize).expect("room");
            buffer.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&rng.next_u64().to_le_bytes()));
            buffer
        })
        .collect();
    let (start, before) = (Instant::now(), cpu());
    for first in (0..count).step_by(BATCH) {
        let numbers = first..(first + BATCH as u64).min(count);
        let puts = numbers.zip(buffers.drain(..)).map(|(n, buffer)| Put { key: key(n), buffer, start: 0 });
        for done in lane.put(&view, puts.collect()).expect("puts") {
            assert!(matches!(done.result, Stored::New), "{:?}", done.result);
            buffers.extend(done.buffer);
        }
    }
    store.flush().expect("a flush");
    let gb = (count * block) as f64 / 1e9;
    put.gbps.push(gb / start.elapsed().as_secs_f64());
    put.cpu_per_gb.push((cpu() - before) / gb);
    let order = shuffled(count);
    let (start, before) = (Instant::now(), cpu());
    for numbers in order.chunks(BATCH) {
        let gets =
            numbers.iter().zip(buffers.drain(..)).map(|(n, buffer)| Get { key: key(*n), buffer, start: 0 });
        for done in lane.get(&view, gets.collect()).expect("gets") {
            assert!(done.result.is_ok(), "{:?}", done.result);
            buffers.extend(done.buffer);
        }
    }
    get.gbps.push(gb / start.elapsed().as_secs_f64());
    get.cpu_per_gb.push((cpu() - before) / gb);
    drop((lane, view));
    store.close().expect("closed");
    drop(pool);
    let _ = std::fs::remove_dir_all(&path);
}

/// Bytes of a slab while the index is measured.
const INDEX_SLAB: u64 = 256 << 20;
/// Lookups of a run.
const LOOKUPS: usize = 2_000_000;

/// Gives the space of all slabs back, and leaves their lengths: what blocks hold is never looked at when the index is measured, and millions
/// of them would fill any drive.
fn forget(folder: &Path) {
    for entry in std::fs::read_dir(folder).expect("a directory").flatten() {
        let kind = entry.file_type().expect("a kind");
        if kind.is_dir() {
            forget(&entry.path());
        } else if entry.metadata().is_ok_and(|metadata| metadata.len() == INDEX_SLAB) {
            let file = std::fs::File::options().write(true).open(entry.path()).expect("a slab");
            let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, hole, 0, INDEX_SLAB).expect("a hole");
        }
    }
}

/// Millions of lookups a second, and a second of this thread's CPU time: on a machine that others use, too, the second is what the code costs.
fn rate(keys: &[Key], wanted: usize, run: impl FnOnce(&[Key]) -> usize) -> String {
    let spent = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let (start, before) = (Instant::now(), spent());
    assert_eq!(run(keys), wanted);
    let millions = keys.len() as f64 / 1e6;
    let (wall, cpu) = (start.elapsed().as_secs_f64(), spent() - before);
    format!("{:.2} million lookups/s ({:.2} million a CPU second)", millions / wall, millions / cpu)
}

/// The index: real puts of the smallest blocks there are, whose bytes are forgotten now and then; then lookups by one thread, and opening.
fn index(dir: &Path, blocks: u64, rounds: usize) {
    let path = dir.join("pool");
    Pool::format(&path, &FormatOptions::default()).expect("a pool");
    let pool = Pool::open(&path, &OpenOptions { ram_bytes: 0, ..OpenOptions::default() }).expect("a pool");
    let options = || StoreOptions {
        budget_bytes: Some(blocks * 4096 + blocks * 280 + (512 << 20)),
        slab_bytes: Some(INDEX_SLAB),
        // A checkpoint writes hundreds of megabytes, and puts wait for it: on a busy machine longer than the default.
        deadline: std::time::Duration::from_secs(120),
        ..StoreOptions::default()
    };
    let store = Store::open(&pool, options()).expect("a store");
    let view = store.view(b"bench", 4096, "").expect("a view");
    let arena =
        Arena::new(1024 * 4096, ArenaOptions { prefault: true, ..ArenaOptions::default() }).expect("memory");
    let mut lane = store.lane(Some(&arena)).expect("a lane");
    let before = resident();
    let start = Instant::now();
    for (turn, first) in (0..blocks).step_by(1024).enumerate() {
        let numbers = first..(first + 1024).min(blocks);
        let puts = numbers.map(|n| Put { key: key(n), buffer: arena.alloc(4096).expect("room"), start: 0 });
        for done in lane.put(&view, puts.collect()).expect("puts") {
            assert!(matches!(done.result, Stored::New), "{:?}", done.result);
        }
        if turn % 128 == 127 {
            forget(&path);
        }
    }
    store.flush().expect("a flush");
    forget(&path);
    let seconds = start.elapsed().as_secs_f64();
    println!("index: {blocks} blocks put in {seconds:.1} s, {} are there", store.stat().blocks);
    println!(
        "index: {:.1} bytes of resident memory a block",
        resident().saturating_sub(before) as f64 / blocks as f64
    );
    // Keys are made before, in random order: neither their making nor their order helps.
    let order = shuffled(blocks);
    let there: Vec<Key> = order.iter().take(LOOKUPS).map(|n| key(*n)).collect();
    let absent: Vec<Key> = (0..LOOKUPS as u64).map(|n| key(blocks + n)).collect();
    drop(order);
    for round in 0..rounds {
        for (what, keys) in [("hits", &there), ("misses", &absent)] {
            let wanted = if what == "hits" { keys.len() } else { 0 };
            let one = rate(keys, wanted, |keys| keys.chunks(1).map(|one| view.lookup(one)).sum());
            let many = rate(keys, wanted, |keys| {
                let found = |some: &[Key]| view.contains(some).into_iter().filter(|there| *there).count();
                keys.chunks(64).map(found).sum()
            });
            println!("index: round {round}: {what}: {one} one at a time, {many} by 64");
        }
    }
    drop((lane, view));
    store.close().expect("closed");
    for _ in 0..rounds {
        let start = Instant::now();
        let store = Store::open(&pool, options()).expect("a store");
        println!(
            "index: opened in {:.3} s with {} blocks",
            start.elapsed().as_secs_f64(),
            store.stat().blocks
        );
        store.close().expect("closed");
    }
    drop(pool);
    let _ = std::fs::remove_dir_all(&path);
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

fn main() {
    let args = args();
    let scratch =
        tempfile::Builder::new().prefix("nvtier-test-kv-bench-").tempdir_in(&args.dir).expect("a directory");
    if let Some(blocks) = args.index {
        return index(scratch.path(), blocks, args.rounds);
    }
    let bytes = args.mib << 20;
    let file = scratch.path().join("fio");
    println!("{} MiB, {} rounds in turns, medians; GB/s, and seconds of CPU for a GB", args.mib, args.rounds);
    for block in [2 << 20, 128 << 10, 64 << 10] {
        let (mut put, mut get) = (Figures::default(), Figures::default());
        let (mut write, mut read) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            let _ = std::fs::remove_file(&file);
            write.push(fio(&file, "write", block, bytes));
            read.push(fio(&file, "randread", block, bytes));
            let _ = std::fs::remove_file(&file);
            store_round(scratch.path(), block, bytes, &mut put, &mut get);
        }
        let line = |what: &str, ours: &Figures, fio: &[f64]| {
            println!(
                "{:5} KiB {what}: store {:.2} (CPU {:.2}), fio {:.2}: {:.2} of it   {:?} {:?}",
                block >> 10,
                median(&ours.gbps),
                median(&ours.cpu_per_gb),
                median(fio),
                median(&ours.gbps) / median(fio),
                ours.gbps.iter().map(|x| (x * 100.0).round() / 100.0).collect::<Vec<_>>(),
                fio.iter().map(|x| (x * 100.0).round() / 100.0).collect::<Vec<_>>(),
            );
        };
        line("put", &put, &write);
        line("get", &get, &read);
    }
}
