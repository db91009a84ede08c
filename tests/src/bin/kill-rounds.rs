//! `cargo xtask kill`: rounds of `kill -9` under load. Its clients are this program again.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use nvtier_tests::kill::{self, clients, window};

const USAGE: &str = "usage: kill-rounds [--rounds N] [--first-seed S] [--keep]\n\
    --keep: stop at the first round that finds something, and leave its pools";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("client", rest)) = words.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return match clients::Args::parse(rest) {
            Some(args) => clients::run(&args),
            None => usage(),
        };
    }
    if let Some(("kv-window", rest)) = words.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return window::victim(rest);
    }
    let Ok(program) = std::env::current_exe() else { return usage() };
    let mut options = kill::Options { rounds: 200, first_seed: 1, clients: program, keep: false };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let number = match word.as_str() {
            "--rounds" => &mut options.rounds,
            "--first-seed" => &mut options.first_seed,
            "--keep" => {
                options.keep = true;
                continue;
            }
            _ => return usage(),
        };
        match words.next().and_then(|text| text.parse().ok()) {
            Some(value) => *number = value,
            None => return usage(),
        }
    }
    let totals = kill::run(&options);
    println!("{}", totals.line());
    if totals.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}
