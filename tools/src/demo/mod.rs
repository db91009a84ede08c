//! `nvtier demo`.

mod checkpoint;

use crate::cli::{Demo, Global};
use crate::failure::{Failure, Outcome};

/// Not there yet.
pub fn run(_global: &Global, _args: &Demo) -> Outcome {
    let _ = checkpoint::write;
    Err(Failure::unsupported("not supported yet in this build"))
}
