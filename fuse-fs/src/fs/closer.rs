//! Closing takes long: the last writer of a region makes its checksums. That happens on a thread of its own, because the kernel does not
//! wait for RELEASE but does wait for every other request that the serving threads could not take meanwhile.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use super::handles::OpenFile;
use super::nodes::lock;

/// Files that may wait; each keeps a descriptor open. Beyond this the serving thread closes by itself, which slows the writers down.
const WAITING: usize = 128;

#[derive(Debug)]
pub(crate) struct Closer<B> {
    queue: Mutex<Option<SyncSender<Arc<OpenFile<B>>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<B: Send + Sync + 'static> Closer<B> {
    /// Without a thread (there can be none) every file is closed where it is released.
    pub fn new() -> Closer<B> {
        let (sender, receiver) = sync_channel::<Arc<OpenFile<B>>>(WAITING);
        let thread = thread::Builder::new().name("nvtier-close".to_owned()).spawn(move || {
            for file in receiver {
                drop(file);
            }
        });
        let queue = thread.is_ok().then_some(sender);
        Closer { queue: Mutex::new(queue), thread: Mutex::new(thread.ok()) }
    }

    /// Drops a file, soon.
    pub fn close(&self, file: Arc<OpenFile<B>>) {
        let refused = match &*lock(&self.queue) {
            Some(queue) => match queue.try_send(file) {
                Ok(()) => None,
                Err(TrySendError::Full(file) | TrySendError::Disconnected(file)) => Some(file),
            },
            None => Some(file),
        };
        // Outside of the lock.
        drop(refused);
    }

    /// Waits until everything that was handed over is closed.
    pub fn finish(&self) {
        drop(lock(&self.queue).take());
        if let Some(thread) = lock(&self.thread).take() {
            // It only ends by itself; a panic of the engine in there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
