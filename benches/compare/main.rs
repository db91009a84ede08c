//! Side-by-side figures: one row at a time, A B B A, medians and ratio, as a Markdown table.
//!
//! ```text
//! cargo build --release
//! cargo run --release -p nvtier-bench --bin compare -- --dir /mnt/nvme0/tmp --rows bench,mount-dir --out results.md
//! ```
//! Rows are groups of docs/bench.md, "Side by side". Everything is made under `--dir` (and `--shm`) and removed at the end.
#![forbid(unsafe_code)]

mod machine;
mod metadata;
mod pools;
mod process;
mod rows;
mod table;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// What can go wrong, in words.
pub type Result<T> = std::result::Result<T, String>;

/// Compares nvtier with fio, ext4 and cp on this machine.
#[derive(Debug, Parser)]
pub struct Options {
    /// Groups to run: bench, pool, mount-dir, mount-raw, mount-shm, checksums, metadata, import, rss; all when left out
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Only rows whose name contains this, of those groups
    #[arg(long)]
    only: Option<String>,
    /// Runs of each side of a row
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Bytes of the file on the disk, in MiB
    #[arg(long, default_value_t = 4096)]
    size_mib: u64,
    /// Bytes of the file in memory, in MiB
    #[arg(long, default_value_t = 2048)]
    shm_size_mib: u64,
    /// Seconds of each random-read run
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Directory on the drive that is measured
    #[arg(long, default_value = "compare.tmp")]
    dir: PathBuf,
    /// Directory on tmpfs, where no drive hides what the code costs
    #[arg(long, default_value = "/dev/shm/nvtier-compare")]
    shm: PathBuf,
    /// The nvtier command; default: beside this one
    #[arg(long)]
    nvtier: Option<PathBuf>,
    /// Do cold runs once only, also where they have to wait for the memory that the host of a virtual machine took back
    #[arg(long)]
    no_rehearsal: bool,
    /// RAM tier of mounts, MiB
    #[arg(long, default_value_t = 1024)]
    ram_mib: u64,
    /// Append the tables to this file as well
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("compare: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let context = rows::Context::new(options)?;
    let mut text = machine::describe(&options.dir, options.rounds, !options.no_rehearsal);
    let (mut failures, mut measured) = (Vec::new(), 0);
    for (name, group) in rows::GROUPS {
        if !options.rows.is_empty() && !options.rows.iter().any(|row| row == name) {
            continue;
        }
        eprintln!("== {name}");
        match group(&context) {
            Ok(mut rows) => {
                rows.retain(|row| !row.sides[0].is_empty());
                measured += rows.len();
                if !rows.is_empty() {
                    text.push_str(&table::markdown(name, &rows));
                }
            }
            Err(why) => {
                eprintln!("compare: {name}: {why}");
                text.push_str(&format!("\n## {name}\n\nNot measured: {why}\n"));
                failures.push((*name).to_owned());
            }
        }
    }
    drop(context);
    if measured == 0 && failures.is_empty() {
        let groups: Vec<&str> = rows::GROUPS.iter().map(|(name, _)| *name).collect();
        return Err(format!(
            "--rows, --only and --rounds leave no row to measure; the groups are {}, the names of their rows are in docs/results",
            groups.join(", ")
        ));
    }
    print!("{text}");
    if let Some(path) = &options.out {
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|error| format!("cannot open {}: {error}", path.display()))?;
        file.write_all(text.as_bytes())
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    if failures.is_empty() { Ok(()) } else { Err(format!("not measured: {}", failures.join(", "))) }
}
