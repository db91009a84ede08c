//! Prints docs/tables.md; `cargo xtask docs` runs it.

fn main() {
    print!("{}", doctor::page::page());
}
