//! Closing takes long: the last writer of a region makes its checksums. That happens on a thread of its own, because the kernel does not
//! wait for RELEASE but does wait for every other request that the serving threads could not take meanwhile.

use std::collections::BTreeSet;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::handles::OpenFile;
use super::nodes::lock;

/// Files that may wait; each keeps a descriptor open. Beyond this the serving thread closes by itself, which slows the writers down.
const WAITING: usize = 128;

#[derive(Debug)]
pub(crate) struct Closer<B> {
    queue: Mutex<Option<SyncSender<Closing<B>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    under_way: Arc<UnderWay>,
}

/// What is being closed, in the order in which that began.
#[derive(Debug, Default)]
struct UnderWay {
    tickets: Mutex<Tickets>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Tickets {
    next: u64,
    out: BTreeSet<u64>,
}

/// A file that is closed when this is dropped.
#[derive(Debug)]
struct Closing<B> {
    /// Dropped before the ticket is given back.
    file: Option<Arc<OpenFile<B>>>,
    ticket: u64,
    under_way: Arc<UnderWay>,
}

impl<B> Drop for Closing<B> {
    fn drop(&mut self) {
        drop(self.file.take());
        lock(&self.under_way.tickets).out.remove(&self.ticket);
        self.under_way.ended.notify_all();
    }
}

impl<B: Send + Sync + 'static> Closer<B> {
    /// Without a thread (there can be none) every file is closed where it is released.
    pub fn new() -> Closer<B> {
        let (sender, receiver) = sync_channel::<Closing<B>>(WAITING);
        let thread = thread::Builder::new().name("nvtier-close".to_owned()).spawn(move || {
            for closing in receiver {
                drop(closing);
            }
        });
        let queue = thread.is_ok().then_some(sender);
        Closer { queue: Mutex::new(queue), thread: Mutex::new(thread.ok()), under_way: Arc::default() }
    }

    /// Drops a file, soon.
    pub fn close(&self, file: Arc<OpenFile<B>>) {
        let ticket = {
            let mut tickets = lock(&self.under_way.tickets);
            tickets.next += 1;
            let ticket = tickets.next;
            tickets.out.insert(ticket);
            ticket
        };
        let closing = Closing { file: Some(file), ticket, under_way: self.under_way.clone() };
        let refused = match &*lock(&self.queue) {
            Some(queue) => match queue.try_send(closing) {
                Ok(()) => None,
                Err(TrySendError::Full(closing) | TrySendError::Disconnected(closing)) => Some(closing),
            },
            None => Some(closing),
        };
        // Outside of the lock.
        drop(refused);
    }

    /// Waits until everything that was handed over before is closed.
    pub fn settle(&self) {
        let mut tickets = lock(&self.under_way.tickets);
        let last = tickets.next;
        while tickets.out.first().is_some_and(|first| *first <= last) {
            tickets = self.under_way.ended.wait(tickets).unwrap_or_else(PoisonError::into_inner);
        }
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
