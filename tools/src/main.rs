//! The `nvtier` command.
#![forbid(unsafe_code)]
fn main() {}
