//! One reader fills, the others wait: the RAM tier's claims.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use loom::thread;
use models::check;
use models::ram_tier::{FRAME_BYTES, FrameKey, Part, RamTier, RamTierOptions};

const CHUNK: usize = 4096;

fn tier(budget_bytes: u64, chunk: usize) -> Arc<RamTier> {
    RamTier::new(&RamTierOptions { budget_bytes, chunk_bytes: chunk as u32, huge: false }).unwrap()
}

fn key(frame: u64) -> FrameKey {
    FrameKey { node: 7, generation: 1, frame }
}

/// Reads chunks as a caller does and returns how many of them it filled itself; with `give_up` it stops at the first it should fill.
fn read(tier: &Arc<RamTier>, key: FrameKey, wanted: Range<u32>, chunk: usize, give_up: bool) -> usize {
    let mut filled = 0;
    let mut at = wanted.start;
    'claim: while at < wanted.end {
        let mut parts = Vec::new();
        tier.claim(key, at..wanted.end, &mut parts);
        for part in parts {
            let (page, chunks) = match part {
                Part::Hit { chunks, page } => (page, chunks),
                Part::Fill(ticket) if give_up => {
                    drop(ticket);
                    return filled;
                }
                Part::Fill(ticket) => {
                    let chunks = ticket.chunks();
                    let mut buffer = tier.buffer(chunks.len() * chunk, &key).unwrap();
                    for (number, bytes) in chunks.clone().zip(buffer.chunks_mut(chunk)) {
                        bytes[0] = 1 + (key.frame * 16) as u8 + number as u8;
                    }
                    filled += chunks.len();
                    (ticket.publish(buffer), chunks)
                }
                // Loom lets no time pass: what returns here was woken.
                Part::Wait { chunks, fill } => match fill.wait(Instant::now() + Duration::from_secs(60)) {
                    Some(page) => (page, chunks),
                    None => continue 'claim,
                },
            };
            assert_eq!(chunks.start, at, "parts are in order and without gaps");
            for number in chunks.clone() {
                let byte = page.bytes()[(number - page.chunks().start) as usize * chunk];
                assert_eq!(byte, 1 + (key.frame * 16) as u8 + number as u8, "wrong bytes of chunk {number}");
            }
            at = chunks.end;
        }
    }
    filled
}

#[test]
fn every_chunk_is_filled_once_and_all_get_it() {
    check("overlapping readers", 4, || {
        let tier = tier(2 << 20, CHUNK);
        let fills = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = [0..2, 1..3]
            .into_iter()
            .map(|wanted| {
                let (tier, fills) = (tier.clone(), fills.clone());
                thread::spawn(move || {
                    fills.fetch_add(read(&tier, key(0), wanted, CHUNK, false), Relaxed);
                })
            })
            .collect();
        fills.fetch_add(read(&tier, key(0), 0..3, CHUNK, false), Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(fills.load(Relaxed), 3, "each of three chunks is read once");
        assert_eq!(tier.stats().used_bytes, 3 * CHUNK as u64);
    });
}

#[test]
fn a_reader_that_gives_up_leaves_the_fill_to_a_waiter() {
    check("a reader gives up", 4, || {
        let tier = tier(2 << 20, CHUNK);
        let threads: Vec<_> = [true, false]
            .into_iter()
            .map(|give_up| {
                let tier = tier.clone();
                thread::spawn(move || read(&tier, key(0), 0..1, CHUNK, give_up))
            })
            .collect();
        let mut fills = read(&tier, key(0), 0..1, CHUNK, false);
        fills += threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>();
        assert_eq!(fills, 1, "who waited tries again, and one of them reads");
    });
}

#[test]
fn forgetting_during_a_fill_keeps_nothing_and_strands_nobody() {
    check("forget during a fill", 5, || {
        let tier = tier(2 << 20, CHUNK);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let tier = tier.clone();
                thread::spawn(move || read(&tier, key(0), 0..1, CHUNK, false))
            })
            .collect();
        tier.forget(7, 1, 1);
        let fills: usize = readers.into_iter().map(|thread| thread.join().unwrap()).sum();
        assert!((1..=2).contains(&fills));
        tier.forget(7, 1, 1);
        assert_eq!(tier.stats().used_bytes, 0, "no page is counted twice or left");
        assert_eq!(tier.arena().unwrap().free_bytes(), 2 << 20, "all memory came back");
    });
}

#[test]
fn a_fill_from_before_a_forget_does_not_come_back_beside_a_new_one() {
    check("a fill outlives its frame", 4, || {
        let tier = tier(2 << 20, CHUNK);
        let mut parts = Vec::new();
        tier.claim(key(0), 0..1, &mut parts);
        let Some(Part::Fill(old)) = parts.pop() else { panic!("nobody else reads") };
        let others: Vec<_> = [true, false]
            .into_iter()
            .map(|forgets| {
                let tier = tier.clone();
                thread::spawn(move || {
                    if forgets {
                        tier.forget(7, 1, 1);
                    }
                    read(&tier, key(0), 0..1, CHUNK, false)
                })
            })
            .collect();
        let mut buffer = tier.buffer(CHUNK, &key(0)).unwrap();
        buffer[0] = 1;
        drop(old.publish(buffer));
        let fills: usize = others.into_iter().map(|thread| thread.join().unwrap()).sum();
        assert!(fills <= 1, "the chunk was read {fills} times after one forget");
        assert!(tier.stats().used_bytes <= CHUNK as u64, "the chunk is kept twice");
        tier.forget(7, 1, 1);
        assert_eq!(tier.arena().unwrap().free_bytes(), 2 << 20, "all memory came back");
    });
}

#[test]
fn eviction_under_readers_gives_right_bytes_and_all_memory_back() {
    check("eviction", 4, || {
        // Room for two frames and two readers of three frames.
        let tier = tier(2 * FRAME_BYTES as u64, FRAME_BYTES);
        let readers: Vec<_> = [[0, 1], [2, 0]]
            .into_iter()
            .map(|frames| {
                let tier = tier.clone();
                thread::spawn(move || {
                    for frame in frames {
                        read(&tier, key(frame), 0..1, FRAME_BYTES, false);
                    }
                })
            })
            .collect();
        readers.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(tier.stats().used_bytes <= 2 * FRAME_BYTES as u64);
        tier.forget(7, 1, 4);
        assert_eq!(tier.stats().used_bytes, 0);
        assert_eq!(tier.arena().unwrap().free_bytes(), 2 * FRAME_BYTES);
    });
}
