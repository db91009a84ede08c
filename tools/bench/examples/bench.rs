//! `nvtier bench` without the rest of the command: `cargo run --release -p nvtier-bench --example bench -- --name=...`.

fn main() -> std::process::ExitCode {
    bench::run(std::env::args_os().skip(1).collect())
}
