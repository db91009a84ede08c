//! `nvtier rm`.

use crate::cli::{Global, Rm};
use crate::config::Config;
use crate::failure::{Failure, Outcome};

/// Not there yet.
pub fn run(_global: &Global, _config: &Config, _args: &Rm) -> Outcome {
    Err(Failure::unsupported("not supported yet in this build"))
}
