//! Copies from memory that is pinned where it lies: no read, no buffer of the ring.
//!
//! Pages of a RAM tier are ready at once. Pieces of mapped files are pinned by threads, in the order of the files, while
//! earlier ones are copied; a piece that is refused is read like any other source.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::pieces::Run;
use crate::driver::mapped::{MappedPiece, Mapping, PAGE};
use crate::driver::{Driver, Lent};
use crate::error::{Error, Result};

/// Batches of lent memory in flight: enough that the copy engine never waits for this thread, few enough that cancelling is quick.
pub(super) const IN_FLIGHT: usize = 8;

/// A copy out of lent memory.
#[derive(Clone, Debug)]
pub(super) struct Loan {
    pub lent: Lent,
    /// First byte in it.
    pub offset: usize,
    pub device: u64,
    pub len: usize,
}

/// What is wanted of a piece of a mapped file.
#[derive(Debug)]
pub(super) struct Wish {
    mapping: Arc<Mapping>,
    /// Whole pages.
    offset: u64,
    len: usize,
    /// All within; not empty.
    runs: Vec<Run>,
}

impl Wish {
    /// The copies, once it is pinned.
    fn loans(&self, piece: &Arc<MappedPiece>) -> Vec<Loan> {
        let loan = |run: &Run| Loan {
            lent: Lent::Mapped(piece.clone()),
            offset: (run.offset - self.offset) as usize,
            device: run.device,
            len: run.len as usize,
        };
        self.runs.iter().map(loan).collect()
    }
}

/// Cuts runs of one source, in order, at multiples of `piece`; neighbours on both sides become one.
pub(super) fn wishes(mapping: &Arc<Mapping>, runs: Vec<Run>, piece: u64) -> Vec<Wish> {
    let mut all: Vec<Wish> = Vec::new();
    let mut last_piece = None;
    for run in runs {
        let (mut at, end) = (run.offset, run.offset + run.len);
        while at < end {
            let until = end.min((at / piece + 1) * piece);
            let part = Run { offset: at, len: until - at, device: run.device + (at - run.offset), ..run };
            match all.last_mut() {
                Some(wish) if last_piece == Some(at / piece) => match wish.runs.last_mut() {
                    Some(last) if last.offset + last.len == at && last.device + last.len == part.device => {
                        last.len += part.len;
                    }
                    _ => wish.runs.push(part),
                },
                _ => all.push(Wish { mapping: mapping.clone(), offset: 0, len: 0, runs: vec![part] }),
            }
            last_piece = Some(at / piece);
            at = until;
        }
    }
    for wish in &mut all {
        let (Some(first), Some(last)) = (wish.runs.first(), wish.runs.last()) else { continue };
        wish.offset = first.offset / PAGE * PAGE;
        wish.len = ((last.offset + last.len).next_multiple_of(PAGE) - wish.offset) as usize;
    }
    all
}

/// What became of a wish.
pub(super) enum Pinned {
    Loans(Vec<Loan>),
    /// Not pinned: to be read.
    Refused(Vec<Run>, Error),
}

struct State {
    wishes: VecDeque<Wish>,
    results: VecDeque<Pinned>,
    /// To be unpinned.
    old: Vec<Lent>,
    /// Pieces that a thread works on.
    busy: usize,
    /// Bytes that are pinned or about to be.
    bytes: usize,
    /// After the first refusal nothing more is tried.
    refused: bool,
    closed: bool,
}

impl State {
    /// Whether the next piece may be pinned. One that is larger than the limit goes alone.
    fn fits(&self, limit: usize) -> bool {
        self.wishes.front().is_some_and(|wish| self.bytes + wish.len <= limit || self.bytes == 0)
    }
}

struct Shared {
    driver: Arc<dyn Driver>,
    limit: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if state.closed && state.old.is_empty() {
                return;
            }
            if state.fits(self.limit) && !state.closed {
                let Some(wish) = state.wishes.pop_front() else { continue };
                if state.refused {
                    let error = Error::new(crate::ErrorKind::Unsupported, "an earlier piece was refused");
                    state.results.push_back(Pinned::Refused(wish.runs, error));
                    self.changed.notify_all();
                    continue;
                }
                (state.busy, state.bytes) = (state.busy + 1, state.bytes + wish.len);
                drop(state);
                let pinned = MappedPiece::pin(&self.driver, &wish.mapping, wish.offset, wish.len);
                state = self.state();
                state.busy -= 1;
                let result = match pinned {
                    Ok(piece) => Pinned::Loans(wish.loans(&Arc::new(piece))),
                    Err(error) => {
                        state.bytes -= wish.len;
                        state.refused = true;
                        Pinned::Refused(wish.runs, error)
                    }
                };
                state.results.push_back(result);
                self.changed.notify_all();
            } else if let Some(old) = state.old.pop() {
                let bytes = old.len();
                // The last holder unpins; a piece of several copies comes here once for each batch it was in.
                let last = match old {
                    Lent::Mapped(piece) => Arc::into_inner(piece),
                    Lent::Page(_) | Lent::Buffer(_) => None,
                };
                if last.is_some() {
                    drop(state);
                    drop(last);
                    state = self.state();
                    state.bytes -= bytes;
                    self.changed.notify_all();
                }
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Threads that pin and unpin pieces of mapped files. Dropped when no copy uses any.
pub(super) struct Pinner {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pinner {
    /// Starts them. `limit`: bytes that are pinned at once.
    pub fn start(driver: &Arc<dyn Driver>, wishes: Vec<Wish>, threads: u32, limit: usize) -> Result<Pinner> {
        let count = (threads as usize).clamp(1, wishes.len().max(1));
        let state = State {
            wishes: wishes.into(),
            results: VecDeque::new(),
            old: Vec::new(),
            busy: 0,
            bytes: 0,
            refused: false,
            closed: false,
        };
        let shared = Arc::new(Shared {
            driver: driver.clone(),
            limit,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let mut pinner = Pinner { shared, threads: Vec::new() };
        for _ in 0..count {
            let shared = pinner.shared.clone();
            let thread = std::thread::Builder::new().name("nvtier-pin".into()).spawn(move || shared.work());
            pinner.threads.push(thread.map_err(|error| Error::io("start a thread that pins", error))?);
        }
        Ok(pinner)
    }

    /// What was pinned or refused since.
    pub fn results(&self) -> VecDeque<Pinned> {
        std::mem::take(&mut self.shared.state().results)
    }

    /// Whether there will be more.
    pub fn is_open(&self) -> bool {
        let state = self.shared.state();
        state.busy > 0 || !state.wishes.is_empty() || !state.results.is_empty()
    }

    /// Whether there will be more soon, without any copy having ended before.
    pub fn is_working(&self) -> bool {
        let state = self.shared.state();
        let unpinning = !state.old.is_empty();
        state.busy > 0 || !state.results.is_empty() || state.fits(self.shared.limit) || unpinning
    }

    /// Sleeps until there is something, or for a while.
    pub fn wait(&self, time: Duration) {
        let state = self.shared.state();
        if state.results.is_empty() {
            // What woke it is looked at by the caller.
            drop(self.shared.changed.wait_timeout(state, time));
        }
    }

    /// Takes back what was copied.
    pub fn give_back(&self, lent: Vec<Lent>) {
        if !lent.is_empty() {
            self.shared.state().old.extend(lent);
            self.shared.changed.notify_all();
        }
    }
}

impl Drop for Pinner {
    fn drop(&mut self) {
        let left = {
            let mut state = self.shared.state();
            state.closed = true;
            std::mem::take(&mut state.results)
        };
        drop(left);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
