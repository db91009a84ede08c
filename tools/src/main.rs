//! The `nvtier` command.
#![forbid(unsafe_code)]

mod ceiling;
mod cli;
mod cmd;
mod config;
mod demo;
mod failure;
mod interrupt;
mod mountpoint;
mod names;
mod notify;
mod output;
mod progress;
mod runtime;
mod size;
mod source;
mod store;
mod time;
mod transfer;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command, Global};
use config::Config;
use failure::{Failure, Outcome};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // `bench` speaks fio's language, which clap does not: everything after the word is its own.
    if args.get(1).is_some_and(|word| word == "bench") {
        return bench::run(args[2..].to_vec());
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, args.iter().any(|arg| arg == "--json")),
    };
    let global = cli.global.clone();
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            report(&failure, global.json);
            ExitCode::from(failure.code)
        }
    }
}

fn run(cli: Cli) -> Outcome<ExitCode> {
    interrupt::install().map_err(|error| Failure::io("install signal handlers", &error))?;
    let global = &cli.global;
    // The one global choice that rustls asks for; it fails only where something chose before, which nothing does.
    let _ = rustls::crypto::ring::default_provider().install_default();
    init_log(global, &cli.command)?;
    match &cli.command {
        Command::Bench(args) => return Ok(bench::run(args.args.clone())),
        Command::Doctor(args) => return cmd::doctor::run(global, args),
        Command::Plan(args) => return cmd::plan::run(global, args),
        Command::Version => cmd::version::run(global)?,
        Command::Completions(args) => cmd::completions::run(args)?,
        Command::Man(args) => cmd::man::run(args)?,
        Command::Umount(args) => cmd::umount::run(global, args)?,
        Command::Format(args) => cmd::format::run(global, args)?,
        Command::Disk(args) => cmd::disk::run(global, args)?,
        Command::Demo(args) => demo::run(global, args)?,
        Command::Load(args) => cmd::load::run(global, args)?,
        Command::Train(args) => cmd::train::run(global, args)?,
        Command::Mount(args) => cmd::mount::run(global, &Config::load()?, args)?,
        Command::Info(args) => cmd::info::run(global, &Config::load()?, args)?,
        Command::Import(args) => cmd::import::run(global, &Config::load()?, args)?,
        Command::Export(args) => cmd::export::run(global, &Config::load()?, args)?,
        Command::Ls(args) => cmd::ls::run(global, &Config::load()?, args)?,
        Command::Stat(args) => cmd::stat::run(global, &Config::load()?, args)?,
        Command::Verify(args) => cmd::verify::run(global, &Config::load()?, args)?,
        Command::Top(args) => cmd::top::run(global, &Config::load()?, args)?,
        Command::Kv(args) => cmd::kv::run(global, &Config::load()?, args)?,
        Command::Report(args) => cmd::report::run(global, args)?,
        Command::Rm(args) => cmd::rm::run(global, &Config::load()?, args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Logs go to standard error. `NVTIER_LOG` wins over `RUST_LOG`, and that over `-v`; both are a level or directives
/// (`fuse_fs=trace,info`). The mount daemon says a little more than other commands. A span that is let through is logged when it ends,
/// with how long it took.
fn init_log(global: &Global, command: &Command) -> Outcome {
    use tracing::Level;
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::fmt::format::FmtSpan;
    let floor = if matches!(command, Command::Mount(_)) { Level::INFO } else { Level::WARN };
    let level = match global.verbose {
        0 => floor,
        1 => Level::INFO,
        _ => Level::DEBUG,
    };
    let set = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    let filter = match (set("NVTIER_LOG"), set("RUST_LOG")) {
        (Some(text), _) => EnvFilter::builder().parse(&text).map_err(|error| {
            Failure::usage(format!("NVTIER_LOG is `{text}`: {error}"))
                .hint("it is a level (error, warn, info, debug, trace) or directives: fuse_fs=trace,info")
        })?,
        // It is there for all Rust programs: one that we cannot read is no reason to end.
        (None, Some(text)) => EnvFilter::builder().parse(&text).unwrap_or_else(|error| {
            output::note(&format!("RUST_LOG is `{text}`, which is left out: {error}"));
            EnvFilter::default().add_directive(level.into())
        }),
        (None, None) => EnvFilter::default().add_directive(level.into()),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::CLOSE)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    Ok(())
}

/// Prints what clap has to say: help on standard output (code 0), mistakes on standard error (code 2).
fn usage(error: &clap::Error, json: bool) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that went away (`nvtier --help | head -1`) is no error.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        _ if json => {
            let text = error.render().to_string();
            report(&Failure::usage(text.trim_start_matches("error: ").trim_end()), true);
            ExitCode::from(failure::code::USAGE)
        }
        _ => {
            let _ = error.print();
            ExitCode::from(failure::code::USAGE)
        }
    }
}

/// Says on standard error what failed.
fn report(failure: &Failure, json: bool) {
    let text = if json {
        let Failure { code, kind, message, hint } = failure;
        serde_json::json!({ "error": { "code": code, "kind": kind, "message": message, "hint": hint } })
            .to_string()
    } else {
        format!("nvtier: error: {failure}")
    };
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
