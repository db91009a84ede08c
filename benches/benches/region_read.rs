//! Verified reads of a raw pool against `pread` of the same bytes, in turns (A B A B), medians. Not criterion: it wants CPU time, too.
//!
//! `REGION_READ_DIR` says where the images lie (default `/dev/shm`, where nothing but the code costs time),
//! `REGION_READ_MIB` how large the region is.
#![allow(missing_docs)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use engine::content::{Content, Draft};
use engine::extent_draft::ExtentDraft;
use engine::extent_io::{ExtentContent, ExtentIo, ExtentIoOptions};
use engine::layout::Layout;
use engine::member::Member;
use engine::member::raw::{RawGeometry, RawMember};
use nvme::{Device, DeviceOptions, FileDevice};
use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};

const CHUNK: u32 = 16 << 10;
const ROUNDS: usize = 5;

struct Pool {
    io: Arc<ExtentIo>,
    layout: Arc<Layout>,
}

fn pool(folder: &Path, members: u16, size: u64, ram: u64) -> Pool {
    let len = size / members as u64 + (64 << 20);
    let list: Vec<Arc<dyn Member>> = (0..members)
        .map(|index| {
            let path = folder.join(format!("image{index}"));
            let _ = std::fs::remove_file(&path);
            let device: Arc<dyn Device> =
                Arc::new(FileDevice::create(&path, len, &DeviceOptions::default()).expect("an image"));
            let geometry = RawGeometry::plan(len, CHUNK, index == 0).expect("room");
            Arc::new(RawMember::new(index, &path, device, geometry, CHUNK).expect("a member"))
                as Arc<dyn Member>
        })
        .collect();
    let options =
        ExtentIoOptions { chunk_size: CHUNK, stripe_unit: 1 << 20, ram_bytes: ram, verify: true, writers: 4 };
    let io = ExtentIo::new(list, &options).expect("memory");
    let draft = ExtentDraft::new(&io, 1, Arc::new(Layout::new(CHUNK)));
    let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let (start, cpu) = (Instant::now(), cpu());
    for at in (0..size).step_by(block.len()) {
        draft.write_at(at, &block).expect("a write");
    }
    let mut layout = draft.commit(true, &AtomicBool::new(false)).expect("a commit").expect("a layout").layout;
    report(
        &format!("write, {members} members, sums made"),
        size,
        start.elapsed().as_secs_f64(),
        self::cpu() - cpu,
    );
    layout.set_generation(1);
    Pool { io, layout: Arc::new(layout) }
}

fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn report(name: &str, bytes: u64, seconds: f64, cpu: f64) {
    println!(
        "{name:58} {:7.2} GB/s {:6.3} CPU s/GiB",
        bytes as f64 / seconds / 1e9,
        cpu / (bytes as f64 / (1u64 << 30) as f64)
    );
}

/// Runs `work` on so many threads; each takes the next block from a counter. Returns seconds and CPU seconds.
fn timed(threads: usize, blocks: u64, work: impl Fn(u64, &mut [u8]) + Sync, bs: usize) -> (f64, f64) {
    let next = AtomicU64::new(0);
    let (start, before) = (Instant::now(), cpu());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buf = nvme::Buffer::heap(bs).expect("memory");
                loop {
                    let block = next.fetch_add(1, Relaxed);
                    if block >= blocks {
                        break;
                    }
                    work(block, &mut buf);
                }
            });
        }
    });
    (start.elapsed().as_secs_f64(), cpu() - before)
}

fn median(mut values: Vec<(f64, f64)>) -> (f64, f64) {
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    values[values.len() / 2]
}

fn main() {
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let folder = std::env::var("REGION_READ_DIR").unwrap_or_else(|_| "/dev/shm".into());
    let mib: u64 = std::env::var("REGION_READ_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(512);
    let folder = tempfile::tempdir_in(folder).expect("a folder");
    let size = mib << 20;
    for members in [1u16, 2] {
        let pool = pool(folder.path(), members, size, 128 << 20);
        let native: Vec<File> = (0..members)
            .map(|index| {
                let path = folder.path().join(format!("image{index}"));
                OpenOptions::new()
                    .read(true)
                    .custom_flags(OFlags::DIRECT.bits() as i32)
                    .open(path)
                    .expect("an image")
            })
            .collect();
        for threads in [1usize, 2] {
            for (name, bs, blocks) in [
                ("1 MiB", 1usize << 20, size >> 20),
                ("128 KiB", 128 << 10, size >> 17),
                ("4 KiB random", 4 << 10, size >> 14),
            ] {
                let place = |block: u64| {
                    if bs == 4 << 10 {
                        (block.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (size >> 12)) << 12
                    } else {
                        block * bs as u64
                    }
                };
                let mut rows: Vec<(&str, Vec<(f64, f64)>)> =
                    vec![("pread", Vec::new()), ("read_at", Vec::new()), ("read_with", Vec::new())];
                for round in 0..ROUNDS {
                    // Another generation each time: nothing is in the RAM tier.
                    for (row, (_, times)) in rows.iter_mut().enumerate() {
                        let mut layout = (*pool.layout).clone();
                        layout.set_generation((bs * 1000 + threads * 100 + round * 10 + row) as u64);
                        let content = ExtentContent::new(&pool.io, 1, Arc::new(layout));
                        let seen = AtomicU64::new(0);
                        let done = timed(
                            threads,
                            blocks,
                            |block, buf| {
                                let at = place(block);
                                match row {
                                    0 => {
                                        let extent = pool.layout.extent_at(at).expect("an extent");
                                        let offset = extent.offset + at - extent.logical;
                                        native[extent.member as usize]
                                            .read_exact_at(buf, offset)
                                            .expect("pread");
                                    }
                                    1 => drop(content.read_at(at, buf).expect("a read")),
                                    _ => drop(content.read_with(
                                        at,
                                        bs,
                                        engine::Borrower::Program,
                                        &mut |slices| {
                                            // Touch them as a reply would: one copy.
                                            let mut to = 0;
                                            for slice in slices {
                                                buf[to..to + slice.len()].copy_from_slice(slice);
                                                to += slice.len();
                                            }
                                            seen.fetch_add(to as u64, Relaxed);
                                        },
                                    )),
                                }
                            },
                            bs,
                        );
                        times.push(done);
                    }
                }
                let bytes = blocks * bs as u64;
                let base = median(rows[0].1.clone()).0;
                for (row, times) in rows {
                    let (seconds, cpu) = median(times);
                    report(
                        &format!(
                            "{members} members, {threads} threads, {name}, {row} ({:.2} of pread)",
                            base / seconds
                        ),
                        bytes,
                        seconds,
                        cpu,
                    );
                }
            }
        }
    }
}
