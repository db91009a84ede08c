//! docs/semantics.md, paragraph by paragraph, on real mounts: once with the kernel on the bytes, once with the daemon.

#[path = "../common/mod.rs"]
mod common;

mod bytes;
mod names;
mod safety;
mod tensors;
mod ways;
