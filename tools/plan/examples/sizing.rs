//! Prints docs/sizing.md; `cargo xtask docs` runs it.

fn main() {
    print!("{}", plan::seed::page());
}
