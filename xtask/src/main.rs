//! `cargo xtask`: the project's own tasks. CI runs the same commands as a person does.
#![forbid(unsafe_code)]

mod bindgen;
mod docs;
mod exec;
mod external;
mod fuzz;
mod guest;
mod kill;
mod lint;
mod memory;
mod paths;
mod pyenv;
mod sim;
mod suites;
mod sweep;
mod tally;
mod wheel;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of the nvtier workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run every test that can run on this machine; what cannot run says why and counts as skipped.
    Test(suites::TestArgs),
    /// Formatting, clippy, documentation, licences of dependencies, drift of generated files.
    Lint,
    /// Prepare what the tests need (Python environment, model, POSIX suites) and stop.
    Setup,
    /// Make the committed bindings of NVMe structures anew; `--check`: fail if they have drifted.
    Bindgen(bindgen::Args),
    /// Make the pages that are made from data anew (docs/sizing.md, docs/tables.md); `--check`: fail if they have drifted.
    Docs(docs::Args),
    /// Simulated power cuts against a model, bit flips at rest; see docs/reliability.md.
    Sim(sim::Args),
    /// Kill daemons, importers and owners under load and look at what is left; see docs/reliability.md.
    Kill(kill::Args),
    /// Search for inputs that break a parser: libFuzzer over the targets of `fuzz/`.
    Fuzz(fuzz::FuzzArgs),
    /// NVMe drives of an emulated machine: passthrough, raw pools, removal, medium errors, kills, power cuts; see docs/hardware.md.
    Guest(guest::Args),
    /// Every interleaving of the threads of the RAM tier and write-behind; see docs/testing.md.
    Loom,
    /// Unit tests of buffers, queues and the engine under AddressSanitizer.
    Asan,
    /// Unit tests of buffers under Miri, where the toolchain has it.
    Miri,
    /// Build the Python package as a wheel, into `target/wheels`.
    Wheel(wheel::Args),
    /// Remove mounts, processes and loop devices that an interrupted test run left behind.
    Sweep,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().task {
        Task::Test(args) => suites::run(&args),
        Task::Lint => lint::run(),
        Task::Setup => suites::setup(),
        Task::Bindgen(args) => bindgen::run(&args),
        Task::Docs(args) => docs::run(&args),
        Task::Sim(args) => sim::run(&args),
        Task::Kill(args) => kill::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Guest(args) => guest::run(&args),
        Task::Loom => memory::loom(),
        Task::Asan => memory::asan(),
        Task::Miri => memory::miri(),
        Task::Wheel(args) => wheel::run(&args),
        Task::Sweep => sweep::abandoned().map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
