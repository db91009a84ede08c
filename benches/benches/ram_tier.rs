//! The RAM tier alone: what a hit costs, and a miss with its eviction.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use engine::ram_tier::{FrameKey, Part, RamTier, RamTierOptions};

const CHUNK: u32 = 16 << 10;

fn touch(tier: &Arc<RamTier>, frame: u64, parts: &mut Vec<Part>) {
    let key = FrameKey { node: 1, generation: 1, frame };
    tier.claim(key, 0..8, parts);
    for part in parts.drain(..) {
        match part {
            Part::Fill(ticket) => {
                drop(ticket.publish(tier.buffer(8 * CHUNK as usize, &key).expect("memory")))
            }
            other => drop(black_box(other)),
        }
    }
}

fn tier(c: &mut Criterion) {
    let options = RamTierOptions { budget_bytes: 64 << 20, chunk_bytes: CHUNK, huge: true };
    let tier = RamTier::new(&options).expect("memory");
    let mut parts = Vec::new();
    let mut group = c.benchmark_group("ram_tier");
    (0..256).for_each(|frame| touch(&tier, frame, &mut parts));
    let mut frame = 0u64;
    group.bench_function("hit", |b| {
        b.iter(|| {
            frame = (frame + 1) % 256;
            touch(&tier, frame, &mut parts);
        });
    });
    group.bench_function("hit_while_another_thread_hits", |b| {
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut parts = Vec::new();
                let mut frame = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    frame = (frame + 7) % 256;
                    touch(&tier, frame, &mut parts);
                }
            });
            b.iter(|| {
                frame = (frame + 1) % 256;
                touch(&tier, frame, &mut parts);
            });
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    });
    let mut next = 1000u64;
    group.bench_function("miss_and_evict", |b| {
        b.iter(|| {
            next += 1;
            touch(&tier, next, &mut parts);
        });
    });
    group.finish();
}

criterion_group!(benches, tier);
criterion_main!(benches);
