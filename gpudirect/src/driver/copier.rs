//! A stream that a thread of ours carries out: batches and moves in order, one at a time.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{Batch, Refused, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::paged::Move;

/// What the thread does.
pub(super) enum Work {
    /// A batch of copies.
    Copy(Batch),
    /// A gather or scatter.
    Move(Arc<Move>),
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Work>,
    done: VecDeque<Work>,
    /// The first failure; it stays, as a GPU's does.
    failed: Option<(ErrorKind, String)>,
    busy: bool,
    /// Somebody wants the oldest batch now.
    wanted: bool,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// The stream.
pub(super) struct Copier {
    shared: Arc<Shared>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl Copier {
    /// Starts the thread. `lag`: how many batches are held back while nobody waits, so that copies end as late as they may.
    pub(super) fn start(
        lag: usize,
        mut carry_out: impl FnMut(&mut Work) -> Result<()> + Send + 'static,
    ) -> Result<Copier> {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("nvtier-copy".into()).spawn(move || {
            let shared = of_thread;
            let mut state = shared.state();
            loop {
                let due = state.waiting.len() > lag || state.wanted || state.closed;
                let next = if due { state.waiting.pop_front() } else { None };
                let Some(mut work) = next else {
                    if state.closed {
                        return;
                    }
                    state = shared.wait(state);
                    continue;
                };
                state.busy = true;
                let skip = state.failed.is_some();
                drop(state);
                let result = if skip { Ok(()) } else { carry_out(&mut work) };
                state = shared.state();
                state.busy = false;
                state.wanted = false;
                if let Err(error) = result {
                    state.failed.get_or_insert((error.kind(), error.to_string()));
                }
                state.done.push_back(work);
                shared.changed.notify_all();
            }
        });
        let thread = thread.map_err(|error| Error::io("start a thread for copies", error))?;
        Ok(Copier { shared, in_flight: 0, thread: Some(thread) })
    }

    fn push(&mut self, work: Work) {
        self.shared.state().waiting.push_back(work);
        self.shared.changed.notify_all();
        self.in_flight += 1;
    }
}

impl Stream for Copier {
    fn copy(&mut self, batch: Batch) -> std::result::Result<(), Refused> {
        if let Err(error) = batch.check() {
            return Err(Refused { batch, error });
        }
        self.push(Work::Copy(batch));
        Ok(())
    }

    fn reap(&mut self, wait: bool, each: &mut dyn FnMut(Batch)) -> Result<usize> {
        let mut state = self.shared.state();
        while wait && self.in_flight > 0 && state.done.is_empty() && state.failed.is_none() {
            state.wanted = true;
            self.shared.changed.notify_all();
            state = self.shared.wait(state);
        }
        if let Some((kind, text)) = &state.failed {
            return Err(Error::new(*kind, text.clone()));
        }
        let done = std::mem::take(&mut state.done);
        drop(state);
        let count = done.len();
        self.in_flight -= count;
        for work in done {
            match work {
                Work::Copy(batch) => each(batch),
                Work::Move(_) => {}
            }
        }
        Ok(count)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn shuffle(&mut self, job: &Arc<Move>) -> Result<()> {
        self.push(Work::Move(job.clone()));
        Ok(())
    }

    fn finish(&mut self, each: &mut dyn FnMut(Batch)) -> Result<()> {
        while self.in_flight > 0 {
            self.reap(true, each)?;
        }
        Ok(())
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
