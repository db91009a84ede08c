//! Python binding of nvtier: the module `nvtier._nvtier`, which the package `nvtier` re-exports.
//!
//! Glue only: it turns arguments and results; what moves and checks bytes is the engine's.
#![forbid(unsafe_code)]

use pyo3::prelude::*;

mod error;
mod pool;

/// Pools on NVMe, tensor files and control of them.
#[pymodule]
fn _nvtier(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    pool::register(module)
}
