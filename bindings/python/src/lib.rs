//! Python binding of nvtier: the module `nvtier._nvtier`, which the package `nvtier` re-exports.
//!
//! Glue only: it turns arguments and results; what moves and checks bytes is the engine's and the loader's. Unsafe code is in
//! `memory.rs` alone.

use pyo3::prelude::*;

mod error;
mod file;
mod interface;
mod jobs;
mod kv;
mod lanes;
mod load;
mod memory;
mod pool;
mod process;
mod region;
mod state;
mod tensor;
mod tier;
mod tiers;
mod watch;

/// Pools on NVMe, tensor files and control of them.
#[pymodule]
fn _nvtier(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    pool::register(module)?;
    load::register(module)?;
    interface::register(module)?;
    kv::register(module)?;
    tier::register(module)?;
    jobs::register(module)?;
    state::register(module)?;
    file::register(module)
}
