//! Which process an object is of: what was made before a fork is of no use after it.

use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};

use pyo3::PyResult;

use crate::error::forked;

/// The process that made something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Born(u32);

impl Born {
    /// Made here and now.
    pub fn now() -> Born {
        Born(std::process::id())
    }

    /// Whether this still is that process.
    pub fn here(self) -> bool {
        self.0 == std::process::id()
    }

    /// Fails in a child of that process.
    pub fn check(self, what: &str) -> PyResult<()> {
        if self.here() { Ok(()) } else { Err(forked(what, self.0)) }
    }
}

/// The process that used CUDA through this package first; 0 before.
static CUDA: AtomicU32 = AtomicU32::new(0);

/// Fails for a CUDA device in a child of a process that used CUDA.
pub fn may_use(device: &str) -> PyResult<()> {
    if !device.starts_with("cuda") {
        return Ok(());
    }
    let here = std::process::id();
    match CUDA.compare_exchange(0, here, Ordering::Relaxed, Ordering::Relaxed) {
        Err(other) if other != here => Err(forked("CUDA", other)),
        _ => Ok(()),
    }
}

/// A value of one process. A forked child must not even drop it: the threads that it would wait for are not there, locks may be
/// held for ever, CUDA must not be called, and what it would close on disk is the parent's.
#[derive(Debug)]
pub struct Mine<T> {
    value: Option<T>,
    born: Born,
}

impl<T> Mine<T> {
    /// A value of this process.
    pub fn new(value: T) -> Mine<T> {
        Mine { value: Some(value), born: Born::now() }
    }

    /// Fails in a child; to be called before anything else is done with the value.
    pub fn check(&self, what: &str) -> PyResult<()> {
        self.born.check(what)
    }

    /// Whether this is the process that made it.
    pub fn is_here(&self) -> bool {
        self.born.here()
    }

    /// Takes it out.
    pub fn into_inner(mut self) -> Option<T> {
        if self.born.here() { self.value.take() } else { None }
    }
}

impl<T> Deref for Mine<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.value {
            Some(value) => value,
            None => unreachable!("only into_inner takes the value, and it takes `self`"),
        }
    }
}

impl<T> Drop for Mine<T> {
    fn drop(&mut self) {
        if !self.born.here() {
            std::mem::forget(self.value.take());
        }
    }
}
