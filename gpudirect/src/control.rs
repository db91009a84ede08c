//! How a caller watches and ends a load or save that runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::admission::Priority;
use crate::error::{Error, ErrorKind, Result};

/// Ends work from another thread or a signal handler. Clones share the flag.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Not cancelled yet.
    pub fn new() -> Cancel {
        Cancel::default()
    }

    /// Asks for the end. Takes effect when the next transfer ends; what was loaded by then is given up.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether somebody asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What a running load or save looks at. The default watches nothing.
#[derive(Default)]
pub struct Control<'a> {
    /// Ends it early.
    pub cancel: Cancel,
    /// When it must be done.
    pub deadline: Option<Instant>,
    /// Whether it lets other loads of this process go first.
    pub priority: Priority,
    /// Told the bytes that are done and all that are to do, now and then; also the place to poll for signals: `false` cancels.
    pub progress: Option<&'a mut dyn FnMut(u64, u64) -> bool>,
}

impl Control<'_> {
    /// Fails once the work is to end.
    pub(crate) fn check(&mut self, done: u64, total: u64) -> Result<()> {
        if let Some(progress) = &mut self.progress
            && !progress(done, total)
        {
            self.cancel.cancel();
        }
        if self.cancel.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, format!("given up after {done} of {total} bytes")));
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let context = format!("the deadline passed after {done} of {total} bytes");
            return Err(Error::new(ErrorKind::Timeout, context));
        }
        Ok(())
    }
}

impl std::fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("cancel", &self.cancel).field("deadline", &self.deadline).finish()
    }
}
