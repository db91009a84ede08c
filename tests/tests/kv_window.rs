//! What a KV store loses to `kill -9`: at most the puts of its window, and none that were flushed (docs/guides/kv.md).

use std::path::Path;
use std::time::Duration;

use nvtier_tests::kill::window::{Pace, Seen, rounds};
use nvtier_tests::{scratch, skip};

const ROUNDS: u64 = 3;
const TOO_SLOW: &str = "a flush takes too long on this drive to say what a window of 50 ms loses";

fn lives(least: u64, most: u64) -> (Duration, Duration) {
    (Duration::from_millis(least), Duration::from_millis(most))
}

fn kills(pace: &Pace, seed: u64) -> Seen {
    let folder = scratch();
    println!("{pace:?}, seed {seed}");
    let seen = rounds(Path::new(env!("CARGO_BIN_EXE_kill-rounds")), folder.path(), pace, ROUNDS, seed);
    let seen = seen.unwrap_or_else(|why| panic!("{why}"));
    println!("{seen:?}");
    assert!(seen.acknowledged >= ROUNDS, "{seen:?}");
    seen
}

#[test]
fn what_was_acknowledged_a_window_ago_survives_a_kill() {
    let pace =
        |pause, threads, lives| Pace { pause: Duration::from_millis(pause), threads, flush_every: 0, lives };
    // The slow one sleeps between two commits, so that each put has to wake the committer.
    let paces = [
        pace(20, 1, lives(400, 700)),
        pace(300, 1, lives(700, 1000)),
        pace(0, 1, lives(400, 700)),
        pace(0, 2, lives(400, 700)),
    ];
    for (pace, seed) in paces.iter().zip(1..) {
        let seen = kills(pace, seed);
        if seen.slow == ROUNDS {
            return skip(TOO_SLOW);
        }
        assert!(seen.in_time > 0, "no block was old enough for a verdict: {seen:?}");
    }
}

#[test]
fn what_was_acknowledged_before_a_flush_survives_a_kill() {
    for (threads, seed) in [(1, 11), (2, 12)] {
        let pace = Pace { pause: Duration::ZERO, threads, flush_every: 5, lives: lives(200, 300) };
        let seen = kills(&pace, seed);
        if seen.slow == ROUNDS {
            return skip(TOO_SLOW);
        }
        // Younger than the window: there by the flush alone.
        assert!(seen.flushed > 0, "{seen:?}");
    }
}
