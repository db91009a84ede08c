//! Power cuts among real threads, and whether the checks would notice if something were wrong.

use std::sync::Arc;

use sim_tests::sabotage::LyingFlushes;
use sim_tests::threads::run;

const SEEDS: u64 = 120;

#[test]
fn what_is_durable_survives_power_cuts_among_threads() {
    let (mut cuts, mut acts, mut blocks) = (0, 0, 0);
    for seed in 0..SEEDS {
        let outcome = run(seed, 3, None);
        assert_eq!(
            outcome.violation, None,
            "seed {seed}; again, if the threads meet again: cargo xtask sim --threads 3 --seeds 1000 --first-seed {seed}"
        );
        (cuts, acts, blocks) = (cuts + outcome.cuts, acts + outcome.acts, blocks + outcome.kv_blocks);
    }
    println!(
        "{SEEDS} seeds, {cuts} power cuts after {acts} acts, {blocks} KV blocks that had to outlive one"
    );
    assert!(cuts >= 2 * SEEDS && acts > 10 * SEEDS && blocks > 0);
}

#[test]
fn a_flush_that_lies_is_noticed_among_threads() {
    let noticed = |seed: &u64| run(*seed, 3, Some(Arc::new(LyingFlushes::one_in(1)))).violation.is_some();
    let noticed = (0..20).filter(noticed).count();
    assert!(noticed >= 5, "{noticed} of 20 seeds noticed it");
}
