//! `nvtier bench`: a benchmark that speaks fio's language.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the benchmark on `args` (everything after `nvtier bench`) and says how it went.
pub fn run(args: Vec<OsString>) -> ExitCode {
    let _ = args;
    eprintln!("nvtier bench: error: not supported yet in this build");
    ExitCode::from(7)
}

/// The options as a clap command, for completions and man pages; parsing itself follows fio (see [`run`]).
pub fn clap_command() -> clap::Command {
    clap::Command::new("bench").about("Measure drives, files, pools and mounts in fio's language")
}
