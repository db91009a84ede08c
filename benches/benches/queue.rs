//! The queue where no drive hides its cost: a file in `/dev/shm`, O_DIRECT.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nvme::{Arena, ArenaOptions, Device, DeviceOptions, FileDevice, Op, Queue};

fn queue(c: &mut Criterion) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("/dev/shm");
    let len = 64u64 << 20;
    let device: Arc<dyn Device> = Arc::new(
        FileDevice::create(folder.path().join("image"), len, &DeviceOptions::default()).expect("an image"),
    );
    let arena =
        Arena::new(64 << 20, ArenaOptions { huge: true, prefault: true, lock: false }).expect("an arena");
    let mut queue = Queue::builder().depth(64).arena(Some(&arena)).build().expect("a queue");
    for (bs, depth) in [(4usize << 10, 1usize), (4 << 10, 64), (128 << 10, 8), (1 << 20, 8)] {
        let mut group = c.benchmark_group("queue");
        group.throughput(Throughput::Bytes((bs * depth) as u64));
        let mut at = 0u64;
        group.bench_function(format!("read_{}k_qd{depth}", bs >> 10), |b| {
            b.iter(|| {
                let ops = (0..depth)
                    .map(|_| {
                        at = (at + bs as u64) % len;
                        Op::read(device.clone(), at / bs as u64 * bs as u64, arena.alloc(bs).expect("room"))
                    })
                    .collect();
                for done in queue.run(ops).expect("reads") {
                    black_box(done.result.expect("a read"));
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, queue);
criterion_main!(benches);
