//! Seeded power cuts, and whether the checks would notice if something were wrong.

use std::sync::Arc;

use sim_tests::act::Act;
use sim_tests::config::Config;
use sim_tests::driver::{Options, run};
use sim_tests::plan::{Plan, Round};
use sim_tests::sabotage::{LostWrite, LyingFlushes};
use sim_tests::shrink::shrink;

const SEEDS: u64 = 400;

#[test]
fn what_is_durable_survives_power_cuts() {
    let (mut cuts, mut blocks) = (0, 0);
    for seed in 0..SEEDS {
        let outcome = run(&Plan::of_seed(seed), &Options::default());
        assert_eq!(
            outcome.violation,
            None,
            "seed {seed}; again: cargo xtask sim --seeds 1 --first-seed {seed} --trace\n{}",
            outcome.trace.join("\n")
        );
        cuts += outcome.cuts;
        blocks += outcome.kv_blocks;
    }
    println!("{SEEDS} seeds, {cuts} power cuts, {blocks} KV blocks that had to outlive one");
    assert!(cuts >= 2 * SEEDS);
    assert!(blocks >= 300, "{blocks} KV blocks only");
}

#[test]
fn a_seed_repeats_itself_to_the_last_write() {
    let options = Options { record: true, ..Options::default() };
    let mut changes = 0;
    for seed in [1, 2, 3, 1000, 1001, 1002, 1003, 123_456_789] {
        let plan = Plan::of_seed(seed);
        assert_eq!(plan, Plan::of_seed(seed));
        let (one, other) = (run(&plan, &options), run(&plan, &options));
        assert_eq!(one.trace, other.trace, "seed {seed}");
        assert_eq!(
            one.changes, other.changes,
            "seed {seed}: the devices saw the same writes in the same order"
        );
        changes += one.changes.len();
    }
    assert!(changes > 1000, "{changes} writes and flushes");
}

/// A workload that has something to lose.
fn plan(acts: Vec<Act>) -> Plan {
    let round = |acts| Round { acts, cut: 10_000, survivors: 5, recovery: Vec::new() };
    Plan { config: Config::SMALL, rounds: vec![round(acts)] }
}

#[test]
fn a_flush_that_lies_is_noticed() {
    let options = Options { hook: Some(Arc::new(LyingFlushes::one_in(1))), ..Options::default() };
    let mut noticed = 0;
    for seed in 0..40 {
        noticed += u32::from(run(&Plan::of_seed(seed), &options).violation.is_some());
    }
    println!("noticed with {noticed} of 40 seeds");
    assert!(noticed >= 25, "noticed with {noticed} of 40 seeds only");
}

#[test]
fn a_lying_flush_is_noticed_in_a_kv_store_alone() {
    // The pool's own snapshots lie before the lie: what is lost is the store's.
    let acts = |last: &[Act]| {
        let first = [Act::KvPut { space: 0, first: 0, count: 8 }, Act::KvFlush { whole: false }];
        [&first, last].concat()
    };
    let more = acts(&[Act::KvPut { space: 0, first: 8, count: 4 }, Act::KvFlush { whole: false }]);
    let recorded = run(&plan(more.clone()), &Options { record: true, ..Options::default() });
    assert_eq!(recorded.violation, None, "{}", recorded.trace.join("\n"));
    assert!(recorded.kv_blocks >= 12, "{recorded:?}");
    let (mut noticed, mut runs) = (0, 0);
    for after in 0..60 {
        let options = Options { hook: Some(Arc::new(LyingFlushes::after(after))), ..Options::default() };
        let outcome = run(&plan(more.clone()), &options);
        runs += u32::from(outcome.violation.is_some());
        noticed += u32::from(outcome.violation.is_some_and(|violation| violation.contains("KV")));
    }
    println!(
        "of 60 places where flushes begin to lie {runs} were noticed, {noticed} as KV blocks that are lost"
    );
    assert!(noticed >= 4, "{noticed} only");
}

#[test]
fn a_flush_that_lies_now_and_then_is_noticed() {
    let mut noticed = 0;
    for seed in 0..100 {
        let options = Options { hook: Some(Arc::new(LyingFlushes::one_in(10))), ..Options::default() };
        noticed += u32::from(run(&Plan::of_seed(seed), &options).violation.is_some());
    }
    println!("noticed with {noticed} of 100 seeds");
    assert!(noticed >= 10, "noticed with {noticed} of 100 seeds only");
}

#[test]
fn a_committed_write_that_is_lost_is_noticed() {
    let put = |name: &str, len| Act::Put { path: name.into(), len, fill: 3 };
    for nth in 0..3 {
        let options = Options { hook: Some(Arc::new(LostWrite::new(nth))), ..Options::default() };
        let plan = plan(vec![put("a", 5000), put("b", 30_000), put("c", 100), Act::Sync]);
        let outcome = run(&plan, &options);
        let violation = outcome.violation.expect("a lost write is a violation");
        assert!(violation.contains("checksum"), "{violation}");
    }
    // Without the fault all is well.
    let outcome = run(&plan(vec![put("a", 5000), Act::Sync]), &Options::default());
    assert_eq!(outcome.violation, None, "{}", outcome.trace.join("\n"));
}

#[test]
fn a_violation_is_shrunk_to_what_matters() {
    let options = Options { hook: Some(Arc::new(LyingFlushes::one_in(1))), ..Options::default() };
    let plan = (0..).map(Plan::of_seed).find(|plan| run(plan, &options).violation.is_some()).unwrap();
    let (small, outcome) = shrink(&plan, &options);
    assert!(outcome.violation.is_some(), "the small plan fails too");
    let acts = |plan: &Plan| plan.rounds.iter().map(|round| round.acts.len()).sum::<usize>();
    println!(
        "{} rounds, {} acts shrunk to {} rounds, {} acts:\n{small}",
        plan.rounds.len(),
        acts(&plan),
        small.rounds.len(),
        acts(&small)
    );
    assert!(small.rounds.len() <= 2 && acts(&small) <= 4 && acts(&small) <= acts(&plan));
    assert_eq!(run(&small, &options).violation, outcome.violation, "and fails the same way again");
}
