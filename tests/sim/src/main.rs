//! `nvtier-sim`: what `cargo xtask sim` runs.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use clap::Parser;
use sim_tests::driver::{Options, run};
use sim_tests::exhaustive::{self, workloads};
use sim_tests::flips;
use sim_tests::large;
use sim_tests::plan::Plan;
use sim_tests::shrink::shrink;
use sim_tests::threads;

/// Simulated power cuts and other damage.
#[derive(Parser)]
#[command(name = "cargo xtask sim", no_binary_name = false)]
struct Cli {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000, value_name = "COUNT")]
    seeds: u64,
    /// The first one.
    #[arg(long, default_value_t = 0, value_name = "N")]
    first_seed: u64,
    /// Threads. Default: as many as there are processors.
    #[arg(long, value_name = "J")]
    jobs: Option<usize>,
    /// So many real threads on each pool instead: a seed then fixes what they do, and not how they interleave.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=16))]
    threads: Option<u32>,
    /// Print what happens, act by act.
    #[arg(long)]
    trace: bool,
    /// Look for the smallest workload that still fails. Always done, but when many seeds fail, for the first only.
    #[arg(long)]
    shrink: bool,
    /// Cut after every write and flush of each short workload instead.
    #[arg(long)]
    exhaustive: bool,
    /// Flip so many bits of content, and a tenth of that of metadata, instead.
    #[arg(long, value_name = "COUNT")]
    bit_flips: Option<u64>,
    /// Go on after a violation.
    #[arg(long)]
    keep_going: bool,
    /// Measure the time to open a pool of 1 TiB after a crash instead.
    #[arg(long)]
    open_benchmark: bool,
    /// Regions in that pool.
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    regions: u64,
    /// How many times to open it.
    #[arg(long, default_value_t = 5, value_name = "COUNT")]
    rounds: usize,
    /// Directory of its image file.
    #[arg(long, default_value = "/var/tmp", value_name = "DIR")]
    dir: PathBuf,
    /// What the benchmark's other processes do.
    #[arg(long, hide = true)]
    large_part: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(part) = &cli.large_part {
        return told(large::part(part, &cli.dir, cli.regions));
    }
    if cli.open_benchmark {
        return told(open_benchmark(&cli));
    }
    // A panic within is a violation, and told with it.
    std::panic::set_hook(Box::new(|_| {}));
    let violations = match cli.bit_flips {
        Some(count) => bit_flips(count, cli.first_seed),
        None if cli.exhaustive => exhaustive(),
        None => match cli.threads {
            Some(threads) => threaded(&cli, threads as usize),
            None => seeds(&cli),
        },
    };
    match violations {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn told(done: Result<(), String>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("sim: {why}");
            ExitCode::FAILURE
        }
    }
}

fn open_benchmark(cli: &Cli) -> Result<(), String> {
    let options = large::Options { regions: cli.regions, rounds: cli.rounds.max(1), dir: cli.dir.clone() };
    let outcome = large::run(&options)?;
    let mut seconds: Vec<f64> = outcome.opens.iter().map(|open| open.as_secs_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    println!(
        "sim: open after a crash, 1 TiB, {} regions: median {:.3} s ({:.3} to {:.3} s, {} opens)",
        outcome.regions,
        seconds[seconds.len() / 2],
        seconds[0],
        seconds[seconds.len() - 1],
        seconds.len()
    );
    Ok(())
}

fn exhaustive() -> u64 {
    let (mut points, mut cuts, mut violations) = (0, 0, 0);
    let workloads = workloads();
    for workload in &workloads {
        match exhaustive::run(workload, true) {
            Ok(count) => {
                println!("{}: {} places, {} power cuts", workload.name, count.points, count.cuts);
                points += count.points;
                cuts += count.cuts;
            }
            Err(violation) => {
                println!("{violation}");
                violations += 1;
            }
        }
    }
    println!(
        "exhaustive: {} workloads, {points} places, {cuts} power cuts, {violations} violations",
        workloads.len()
    );
    violations
}

fn bit_flips(count: u64, seed: u64) -> u64 {
    let mut violations = 0;
    match flips::content(count, seed) {
        Ok(done) => println!("bit flips: {} of {count} bits of content detected on read", done.content),
        Err(violation) => {
            println!("{violation}");
            violations += 1;
        }
    }
    match flips::metadata(count.div_ceil(10), seed) {
        Ok(done) => println!(
            "bit flips: {} bits of metadata, {} times the pool opened whole, {} times it refused",
            done.metadata, done.whole, done.refused
        ),
        Err(violation) => {
            println!("{violation}");
            violations += 1;
        }
    }
    println!("sim: bit flips, {violations} violations");
    violations
}

fn threaded(cli: &Cli, threads: usize) -> u64 {
    let (mut cuts, mut acts, mut blocks, mut violations) = (0, 0, 0, 0);
    let mut done = 0;
    for seed in cli.first_seed..cli.first_seed + cli.seeds {
        let outcome = threads::run(seed, threads, None);
        (cuts, acts, blocks) = (cuts + outcome.cuts, acts + outcome.acts, blocks + outcome.kv_blocks);
        done += 1;
        if let Some(violation) = outcome.violation {
            println!(
                "seed {seed}: {violation}\n  again, if the threads meet again: cargo xtask sim --threads {threads} --seeds 1000 --first-seed {seed}"
            );
            violations += 1;
            if !cli.keep_going {
                break;
            }
        }
        if done % 1000 == 0 {
            println!("{done} seeds, {cuts} power cuts");
        }
    }
    println!(
        "sim: {threads} threads, {done} seeds, {cuts} power cuts after {acts} acts, {blocks} KV blocks that had to outlive one, {violations} violations"
    );
    violations
}

fn seeds(cli: &Cli) -> u64 {
    let jobs =
        cli.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |count| count.get()));
    let next = AtomicU64::new(0);
    let (done, cuts, violations) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Relaxed);
                    if index >= cli.seeds || stop.load(Relaxed) {
                        return;
                    }
                    let seed = cli.first_seed + index;
                    let plan = Plan::of_seed(seed);
                    let outcome = run(&plan, &Options::default());
                    cuts.fetch_add(outcome.cuts, Relaxed);
                    let count = done.fetch_add(1, Relaxed) + 1;
                    if cli.trace {
                        println!("{plan}\n{}", outcome.trace.join("\n"));
                    }
                    if count.is_multiple_of(1000) {
                        println!("{count} seeds, {} power cuts", cuts.load(Relaxed));
                    }
                    let Some(violation) = outcome.violation else { continue };
                    let first = violations.fetch_add(1, Relaxed) == 0;
                    println!("seed {seed}: {violation}\n  again: cargo xtask sim --seeds 1 --first-seed {seed} --trace");
                    if first || cli.shrink {
                        let (small, outcome) = shrink(&plan, &Options::default());
                        println!("  shrunk:\n{small}{}", outcome.trace.join("\n"));
                    }
                    if !cli.keep_going {
                        stop.store(true, Relaxed);
                    }
                }
            });
        }
    });
    let violations = violations.load(Relaxed);
    println!("sim: {} seeds, {} power cuts, {violations} violations", done.load(Relaxed), cuts.load(Relaxed));
    violations
}
