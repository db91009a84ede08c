//! Files that the kernel writes in our place grow in its page cache, and are written out when somebody syncs them: first all of the copying, then all
//! of the drive's work. A thread looks at such files now and then and starts writing out what they grew by, so that the two go on side by side.

use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::nodes::lock;

/// Between two looks, while any file is open for writing.
const PAUSE: Duration = Duration::from_millis(20);
/// Growth that is worth a request; small files are left to the kernel.
const STEP: u64 = 8 << 20;

#[derive(Debug, Default)]
struct State {
    files: Vec<Growing>,
    stop: bool,
}

#[derive(Debug)]
struct Growing {
    file: Weak<File>,
    /// All below is being written out.
    started: u64,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The thread and what it looks at. Without a thread (there can be none) it does nothing.
#[derive(Debug)]
pub(crate) struct EarlyWriteback {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl EarlyWriteback {
    pub fn new() -> EarlyWriteback {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let thread =
            thread::Builder::new().name("nvtier-writeout".to_owned()).spawn(move || run(&of_thread)).ok();
        EarlyWriteback { shared, thread: Mutex::new(thread) }
    }

    /// Looks after a file from its present length on, until the last holder of the `Arc` lets go.
    pub fn watch(&self, file: &Arc<File>) {
        let started = file.metadata().map_or(0, |meta| meta.len());
        let mut state = lock(&self.shared.state);
        let watched = state.files.iter().any(|other| std::ptr::eq(other.file.as_ptr(), Arc::as_ptr(file)));
        if !watched {
            state.files.push(Growing { file: Arc::downgrade(file), started });
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for EarlyWriteback {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    let mut state = lock(&shared.state);
    loop {
        state.files.retain(|growing| growing.file.strong_count() > 0);
        if state.stop {
            return;
        }
        let waited = if state.files.is_empty() {
            shared.changed.wait(state)
        } else {
            shared
                .changed
                .wait_timeout(state, PAUSE)
                .map(|(state, _)| state)
                .map_err(|poisoned| std::sync::PoisonError::new(poisoned.into_inner().0))
        };
        state = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        let due: Vec<_> = state.files.iter_mut().filter_map(Growing::due).collect();
        drop(state);
        for (file, offset, len) in due {
            if let Err(error) = nvme::start_writeback(&file, offset, len) {
                // Whoever syncs the file hears of it.
                tracing::debug!(%error, "cannot start writing out a file");
            }
        }
        state = lock(&shared.state);
    }
}

impl Growing {
    /// The part that the file grew by, when that is enough. The last pages may be filled still: they wait for the next look.
    fn due(&mut self) -> Option<(Arc<File>, u64, u64)> {
        let file = self.file.upgrade()?;
        let len = file.metadata().ok()?.len() / STEP * STEP;
        let start = std::mem::replace(&mut self.started, len);
        // A file that was cut short is looked at from there on.
        (len > start).then(|| (file, start, len - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_grew_by_is_due_once() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut growing = Growing { file: Arc::downgrade(&file), started: 0 };
        assert!(growing.due().is_none());
        file.set_len(STEP - 1).unwrap();
        assert!(growing.due().is_none());
        file.set_len(3 * STEP + 5).unwrap();
        let (_, start, len) = growing.due().unwrap();
        assert_eq!((start, len), (0, 3 * STEP));
        assert!(growing.due().is_none());
        file.set_len(STEP).unwrap();
        assert!(growing.due().is_none());
        file.set_len(2 * STEP).unwrap();
        let (_, start, len) = growing.due().unwrap();
        assert_eq!((start, len), (STEP, STEP));
        drop(file);
        assert!(growing.due().is_none());
    }

    #[test]
    fn it_ends_with_files_under_watch_and_forgets_those_that_went() {
        let watcher = EarlyWriteback::new();
        let (kept, gone) = (Arc::new(tempfile::tempfile().unwrap()), Arc::new(tempfile::tempfile().unwrap()));
        watcher.watch(&kept);
        watcher.watch(&kept);
        watcher.watch(&gone);
        assert_eq!(lock(&watcher.shared.state).files.len(), 2);
        drop(gone);
        while lock(&watcher.shared.state).files.len() != 1 {
            thread::yield_now();
        }
        drop(watcher);
    }
}
