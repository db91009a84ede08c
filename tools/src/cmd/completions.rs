//! `nvtier completions SHELL`.

use crate::cli::{Completions, full_command};
use crate::failure::Outcome;
use crate::output;

/// Prints the script.
pub fn run(args: &Completions) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut full_command(), "nvtier", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}
