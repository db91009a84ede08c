//! Checks on emulated NVMe drives, behind the kernel's own NVMe driver: a virtual machine that `run.sh` starts.
//!
//! ```text
//! nvtier-guest-check host RUN.SH SCRATCH TESTS PROGRAM...   here: boots machines and judges what they leave behind
//! nvtier-guest-check device [FILTER]                        in a guest: the drives, the command
//! nvtier-guest-check write POOL STEPS SEED                  in a guest: commits, and says after each that it is durable
//! nvtier-guest-check first TESTS [FILTER]                   in a guest with systemd: layouts, units
//! nvtier-guest-check second [FILTER]                        the same guest after a boot
//! ```
//!
//! It prints what a libtest program prints, so that `cargo xtask test` counts its cases.
#![forbid(unsafe_code)]

mod device;
mod host;
mod report;
mod system;
mod workload;
mod write_log;

use std::path::Path;
use std::process::ExitCode;

use report::Checked;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match &words[..] {
        ["host", run, scratch, tests, programs @ ..] => {
            host::run(Path::new(run), Path::new(scratch), tests, programs)
        }
        ["device", filter @ ..] => device::run(filter.first().copied()),
        ["first", tests, filter @ ..] => system::first(tests, filter.first().copied()),
        ["second", filter @ ..] => system::second(filter.first().copied()),
        ["write", pool, steps, seed] => write(pool, steps, seed).map(|()| true),
        _ => Err("usage: nvtier-guest-check host RUN.SH SCRATCH TESTS PROGRAM... | device [FILTER] | write POOL STEPS SEED | first TESTS [FILTER] | second [FILTER]".into()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("nvtier-guest-check: {}", report::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn write(pool: &str, steps: &str, seed: &str) -> Checked {
    workload::write(Path::new(pool), steps.parse()?, seed.parse()?)
}
