//! What threads of the RAM tier and of write-behind meet at: locks, condition variables, threads.
//!
//! `tests/loom` compiles those modules a second time with loom's types in this module's place, and runs them through every
//! interleaving. Counters stay plain atomics: nothing waits for them or decides by them.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
pub(crate) use std::thread;
