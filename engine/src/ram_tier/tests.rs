use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::*;

const CHUNK: u32 = 16 << 10;
/// Chunks of a frame.
const WHOLE: u32 = FRAME_BYTES as u32 / CHUNK;
const FRAME: u64 = FRAME_BYTES as u64;

fn tier(budget_bytes: u64) -> Arc<RamTier> {
    RamTier::new(&RamTierOptions { budget_bytes, chunk_bytes: CHUNK, huge: false }).unwrap()
}

fn key(frame: u64) -> FrameKey {
    FrameKey { node: 7, generation: 1, frame }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Reads a frame as a caller would: returns whether it was there.
fn touch(tier: &Arc<RamTier>, key: FrameKey) -> bool {
    let mut parts = Vec::new();
    tier.claim(key, 0..WHOLE, &mut parts);
    let hit = matches!(parts[..], [Part::Hit { .. }]);
    for part in parts {
        if let Part::Fill(ticket) = part {
            let mut buffer = tier.buffer(ticket.chunks().len() * CHUNK as usize, &key).unwrap();
            buffer.fill(key.frame as u8);
            ticket.publish(buffer);
        }
    }
    hit
}

#[test]
fn pages_of_a_frame_fill_one_by_one() {
    let tier = tier(4 << 20);
    let mut parts = Vec::new();
    tier.claim(key(0), 3..4, &mut parts);
    let Some(Part::Fill(ticket)) = parts.pop() else { panic!("a miss") };
    assert_eq!(ticket.chunks(), 3..4);
    let mut buffer = tier.buffer(CHUNK as usize, &key(0)).unwrap();
    buffer.fill(3);
    ticket.publish(buffer);
    assert_eq!(tier.stats().used_bytes, CHUNK as u64, "one chunk, not a frame");
    tier.claim(key(0), 0..8, &mut parts);
    let shape: Vec<_> = parts
        .iter()
        .map(|part| match part {
            Part::Fill(ticket) => ('f', ticket.chunks()),
            Part::Hit { chunks, page } => {
                assert!(page.bytes().iter().all(|b| *b == 3));
                ('h', chunks.clone())
            }
            Part::Wait { chunks, .. } => ('w', chunks.clone()),
        })
        .collect();
    assert_eq!(shape, [('f', 0..3), ('h', 3..4), ('f', 4..8)]);
    let mut others = Vec::new();
    tier.claim(key(0), 2..6, &mut others);
    assert!(matches!(&others[..], [Part::Wait { .. }, Part::Hit { .. }, Part::Wait { .. }]));
    assert!(tier.claim_missing(key(0), 0..8).is_empty(), "read-ahead takes nothing that is under way");
}

#[test]
fn budget_is_never_exceeded_and_lent_pages_stay() {
    let tier = tier(8 * FRAME);
    assert!(!touch(&tier, key(0)));
    let mut lent = Vec::new();
    tier.claim(key(0), 0..WHOLE, &mut lent);
    for frame in 1..100 {
        assert!(!touch(&tier, key(frame)));
        assert!(tier.stats().used_bytes <= 8 * FRAME);
    }
    assert!(touch(&tier, key(0)), "a lent frame is not evicted");
    let stats = tier.stats();
    assert!(stats.evictions >= 100 - 8, "{stats:?}");
    assert_eq!(stats.bounces, 0);
    let Part::Hit { page, .. } = &lent[0] else { panic!("was there") };
    assert!(page.bytes().iter().all(|b| *b == 0));
}

#[test]
fn everything_lent_gives_bounce_buffers_that_are_not_kept() {
    let tier = tier(8 * FRAME);
    let mut held = Vec::new();
    for frame in 0..8 {
        touch(&tier, key(frame));
        tier.claim(key(frame), 0..WHOLE, &mut held);
    }
    assert!(!touch(&tier, key(100)));
    assert!(!touch(&tier, key(100)), "not kept");
    assert_eq!(tier.stats().bounces, 2);
    drop(held);
    assert!(!touch(&tier, key(100)));
    assert!(touch(&tier, key(100)));
}

#[test]
fn no_budget_means_bounce_only() {
    for budget in [0, 1, 200 << 10] {
        let tier = tier(budget);
        assert!(tier.arena().is_none());
        assert!(!touch(&tier, key(0)));
        assert!(!touch(&tier, key(0)));
        assert_eq!(tier.stats().used_bytes, 0);
    }
}

#[test]
fn a_stream_does_not_wash_out_what_is_used_again() {
    let tier = tier(64 * FRAME);
    for _ in 0..4 {
        for frame in 0..16 {
            touch(&tier, key(frame));
        }
    }
    for frame in 1000..2000 {
        touch(&tier, key(frame));
    }
    let kept = (0..16).filter(|frame| touch(&tier, key(*frame))).count();
    assert_eq!(kept, 16, "hot frames outlive a stream 15 times the budget");
}

/// Reads a frame as somebody who keeps it elsewhere.
fn copy(tier: &Arc<RamTier>, key: FrameKey) -> bool {
    let hit = touch(tier, key);
    tier.mark_cold(key, FRAME_BYTES);
    hit
}

#[test]
fn what_readers_keep_elsewhere_is_used_again_before_fresh_memory() {
    let tier = tier(32 * FRAME);
    for frame in 0..16 {
        touch(&tier, key(frame));
    }
    for frame in 100..10_000 {
        assert!(!copy(&tier, key(frame)));
        assert!(tier.stats().used_bytes <= 17 * FRAME, "of frame {frame}");
    }
    let stats = tier.stats();
    assert_eq!(stats.cold_evictions, stats.evictions);
    assert_eq!((0..16).filter(|frame| touch(&tier, key(*frame))).count(), 16, "the others stay");
    // Nothing of it is left over.
    for shard in &tier.shards {
        let shard = lock(shard);
        let most = 2 * shard.frames.len() + 65;
        assert!(shard.small.len() <= most && shard.main.len() <= most && shard.cold.len() <= most);
        assert!(shard.ghosts.len() <= 32);
    }
}

#[test]
fn cold_frames_that_come_back_are_kept() {
    let tier = tier(32 * FRAME);
    let stream = |from: u64| (from..from + 16).for_each(|frame| assert!(!copy(&tier, key(frame))));
    for frame in 0..8 {
        copy(&tier, key(frame));
    }
    stream(1000);
    // Their copies are gone, as it seems: they are asked for again.
    assert!((0..8).all(|frame| !copy(&tier, key(frame))), "they went first");
    stream(2000);
    assert!((0..8).all(|frame| copy(&tier, key(frame))), "and are kept now");
    stream(3000);
    assert!((0..8).all(|frame| touch(&tier, key(frame))));
}

#[test]
fn frames_that_others_ask_for_or_that_were_fetched_on_demand_are_kept() {
    let tier = tier(32 * FRAME);
    for frame in 0..8 {
        copy(&tier, key(frame));
        assert!(touch(&tier, key(frame)), "it is still there");
    }
    for frame in 50..54 {
        touch(&tier, key(frame));
        tier.keep(key(frame));
        tier.mark_cold(key(frame), FRAME_BYTES);
    }
    for frame in 1000..1000 + 16 {
        copy(&tier, key(frame));
    }
    assert!((0..8).chain(50..54).all(|frame| touch(&tier, key(frame))));
}

#[test]
fn frames_are_cold_when_all_that_they_hold_is_copied() {
    let tier = tier(32 * FRAME);
    for frame in 0..4 {
        touch(&tier, key(frame));
        tier.mark_cold(key(frame), FRAME_BYTES / 2);
    }
    assert_eq!(tier.cold.load(Relaxed), 0, "half of it is not copied");
    for frame in 0..4 {
        tier.mark_cold(key(frame), FRAME_BYTES / 2);
    }
    assert_eq!(tier.cold.load(Relaxed), 4);
    tier.forget(7, 1, 2);
    assert_eq!(tier.cold.load(Relaxed), 2);
    // A page more: read, and copied. Each takes the place of one that is cold.
    let late = FrameKey { frame: 50, ..key(0) };
    for (chunks, others) in [(0..4, 1), (4..WHOLE, 0)] {
        let mut parts = Vec::new();
        tier.claim(late, chunks.clone(), &mut parts);
        let Some(Part::Fill(ticket)) = parts.pop() else { panic!("a miss") };
        let bytes = chunks.len() * CHUNK as usize;
        tier.mark_cold(late, 0);
        ticket.publish(tier.buffer(bytes, &late).unwrap());
        assert_eq!(tier.cold.load(Relaxed), others, "what came is not copied yet");
        tier.mark_cold(late, bytes);
        assert_eq!(tier.cold.load(Relaxed), others + 1);
    }
    tier.mark_cold(key(99), FRAME_BYTES);
    assert_eq!(tier.cold.load(Relaxed), 1, "of what is not there");
}

#[test]
fn a_dropped_ticket_wakes_waiters_to_try_themselves() {
    let tier = tier(32 * FRAME);
    let mut parts = Vec::new();
    tier.claim(key(0), 0..WHOLE, &mut parts);
    let mut waiting = Vec::new();
    tier.claim(key(0), 0..WHOLE, &mut waiting);
    let Part::Wait { fill, .. } = &waiting[0] else { panic!("under way") };
    drop(parts);
    assert!(fill.wait(soon()).is_none());
    let mut again = Vec::new();
    tier.claim(key(0), 0..WHOLE, &mut again);
    assert!(matches!(again[..], [Part::Fill(_)]));
    let Part::Wait { fill, .. } = &waiting[0] else { unreachable!() };
    assert!(fill.wait(Instant::now()).is_none());
}

#[test]
fn one_of_many_reads() {
    let tier = tier(128 * FRAME);
    let reads = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for frame in 0..64 {
                    let mut parts = Vec::new();
                    tier.claim(key(frame), 0..WHOLE, &mut parts);
                    for part in parts {
                        let page = match part {
                            Part::Hit { page, .. } => page,
                            Part::Wait { fill, .. } => fill.wait(soon()).unwrap(),
                            Part::Fill(ticket) => {
                                reads.fetch_add(1, Relaxed);
                                let mut buffer = tier.buffer(FRAME_BYTES, &key(frame)).unwrap();
                                buffer.fill(frame as u8);
                                ticket.publish(buffer)
                            }
                        };
                        assert!(page.bytes().iter().all(|b| *b == frame as u8));
                    }
                }
            });
        }
    });
    assert_eq!(reads.into_inner(), 64, "each frame is read once");
}

#[test]
fn forgotten_generations_give_their_memory_back() {
    let tier = tier(32 * FRAME);
    for frame in 0..16 {
        touch(&tier, key(frame));
    }
    let other = FrameKey { node: 8, generation: 1, frame: 0 };
    touch(&tier, other);
    let mut parts = Vec::new();
    tier.claim(key(100), 0..WHOLE, &mut parts);
    tier.forget(7, 1, 5);
    assert_eq!(tier.stats().used_bytes, 12 * FRAME_BYTES as u64);
    tier.forget(7, 1, u64::MAX);
    assert_eq!(tier.stats().used_bytes, FRAME_BYTES as u64);
    let Some(Part::Fill(ticket)) = parts.pop() else { panic!("a miss") };
    ticket.publish(tier.buffer(FRAME_BYTES, &key(100)).unwrap());
    assert_eq!(tier.stats().used_bytes, FRAME_BYTES as u64, "a fill that was under way is not kept either");
    assert!(touch(&tier, other));
}

#[test]
fn large_chunks_make_large_frames() {
    let tier =
        RamTier::new(&RamTierOptions { budget_bytes: 8 << 20, chunk_bytes: 1 << 20, huge: false }).unwrap();
    assert_eq!((tier.frame_bytes(), tier.chunks_per_frame()), (1 << 20, 1));
    let mut parts = Vec::new();
    tier.claim(key(0), 0..1, &mut parts);
    assert!(matches!(parts[..], [Part::Fill(_)]));
}
