//! Runs inputs through a target, as the plain test does, with nothing in between: `replay TARGET FILE...`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(target) = args.next().and_then(|name| nvtier_fuzz::target(&name)) else {
        let names: Vec<&str> = nvtier_fuzz::TARGETS.iter().map(|target| target.name).collect();
        eprintln!("usage: replay TARGET FILE...\ntargets: {}", names.join(", "));
        return ExitCode::from(2);
    };
    for path in args {
        match std::fs::read(&path) {
            Ok(input) => nvtier_fuzz::execute(target, &input),
            Err(error) => {
                eprintln!("cannot read {path}: {error}");
                return ExitCode::FAILURE;
            }
        }
        println!("{path}: ok");
    }
    ExitCode::SUCCESS
}
