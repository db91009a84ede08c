//! The engine's RAM tier and write-behind under [loom](https://docs.rs/loom): every interleaving of a few threads.
//!
//! The modules are those of the engine, the same files, compiled here with loom's locks, condition variables and threads. Loom's
//! `wait_timeout` never times out, so that a wake-up that is lost is a deadlock and fails, where the product would
//! only be late. What lies below (arena, queue, simulated device) is the real thing and one step to loom.
#![forbid(unsafe_code)]

#[path = "../../../engine/src/error.rs"]
#[allow(dead_code)]
pub mod error;
#[path = "../../../engine/src/ram_tier.rs"]
pub mod ram_tier;
#[path = "../../../engine/src/write_behind.rs"]
#[allow(dead_code)]
pub mod write_behind;

pub mod drafts;

/// In the place of the engine's `sync`.
mod sync {
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use loom::thread;
}

/// Runs `model` in every interleaving with at most `preemptions` switches away from a thread that could go on, and prints how many
/// those were. All switches that threads make by waiting are explored in any case.
pub fn check(name: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = runs.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    builder.check(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!(
        "{name}: {} interleavings, up to {preemptions} preemptions",
        runs.load(std::sync::atomic::Ordering::Relaxed)
    );
}
