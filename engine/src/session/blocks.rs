//! Blocks of a KV store, whether this process owns the pool or another one does.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvme::Arena;

use super::{Inner, Session};
use crate::control::RemoteBlocks;
use crate::error::{Error, ErrorKind, Result};
use crate::kv::{
    Get, GetDone, Key, Lane, Miss, Put, PutDone, Settings, Store, StoreOptions, StoreStat, Stored, View,
};

/// How long a store that is being closed is waited for.
const OPEN_WAIT: Duration = Duration::from_secs(5);
/// Lanes that are kept for the next call.
const IDLE: usize = 16;

/// A namespace of a KV store and a tenant. May be shared by threads. Keeps a pool that this process owns open.
#[derive(Debug)]
pub struct Blocks {
    pub(super) inner: Which,
}

#[derive(Debug)]
pub(super) enum Which {
    Local(Local),
    Remote(Arc<RemoteBlocks>),
}

#[derive(Debug)]
pub(super) struct Local {
    // They go before the store does.
    workers: Mutex<Vec<Worker>>,
    pub(super) view: View,
    store: Store,
    arena: Option<Arena>,
}

impl Session {
    /// Opens a namespace of a KV store, which is made where there is none; see [`Store::view`] for what the arguments mean. `arena`: where
    /// buffers come from, to be registered with the kernel once.
    ///
    /// Processes that share a pool share its stores: where another process owns the pool, blocks go through it.
    pub fn blocks(
        &self,
        settings: &Settings,
        fingerprint: &[u8],
        block_bytes: u32,
        tenant: &str,
        arena: Option<&Arena>,
    ) -> Result<Blocks> {
        self.writable("open a KV store")?;
        let inner = match &self.inner {
            Inner::Embedded { pool, .. } => {
                let store = Store::share(pool, StoreOptions::from(settings), OPEN_WAIT)?;
                let view = store.view(fingerprint, block_bytes, tenant)?;
                Which::Local(Local { workers: Mutex::default(), view, store, arena: arena.cloned() })
            }
            Inner::Remote(client) => {
                Which::Remote(Arc::new(client.blocks(settings, fingerprint, block_bytes, tenant)?))
            }
        };
        Ok(Blocks { inner })
    }
}

type Job = Box<dyn FnOnce(&mut Lane) + Send>;

/// A thread with a lane: the kernel takes operations of a lane from one thread only, and callers come from many.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(store: &Store, arena: Option<Arena>) -> Result<Worker> {
        let (jobs, inbox) = channel::<Job>();
        let (ready, made) = channel();
        let store = store.clone();
        let work = move || {
            let lane = store.lane(arena.as_ref());
            // The lane knows the store's inside; a store whose last owner is a worker could not be closed by it.
            drop(store);
            match lane {
                Err(error) => drop(ready.send(Err(error))),
                Ok(mut lane) => {
                    let _ = ready.send(Ok(()));
                    inbox.into_iter().for_each(|job| job(&mut lane));
                }
            }
        };
        let thread = std::thread::Builder::new().name("nvtier-kv-lane".into()).spawn(work);
        let thread = thread.map_err(|error| Error::io("start a thread for a lane of a KV store", error))?;
        let worker = Worker { jobs: Some(jobs), thread: Some(thread) };
        made.recv().unwrap_or_else(|_| Err(died()))?;
        Ok(worker)
    }

    /// Gives it something to do.
    pub(super) fn run(&self, job: impl FnOnce(&mut Lane) + Send + 'static) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(Box::new(job)).is_ok());
        if sent { Ok(()) } else { Err(died()) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(super) fn died() -> Error {
    Error::new(ErrorKind::Io, "a lane of a KV store ended; the log says why")
}

impl Local {
    fn lane<T: Send + 'static>(
        &self,
        run: impl FnOnce(&mut Lane, &View) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.end(self.begin(run)?)
    }

    /// As [`lane`](Self::lane), until [`end`](Self::end) waits for it.
    fn begin<T: Send + 'static>(
        &self,
        run: impl FnOnce(&mut Lane, &View) -> Result<T> + Send + 'static,
    ) -> Result<Begun<T>> {
        let worker = self.worker()?;
        let view = self.view.clone();
        let (reply, answer) = channel();
        worker.run(move |lane| drop(reply.send(run(lane, &view))))?;
        Ok(Begun { worker, answer })
    }

    fn end<T>(&self, begun: Begun<T>) -> Result<T> {
        let value = begun.answer.recv().unwrap_or_else(|_| Err(died()))?;
        self.keep(begun.worker);
        Ok(value)
    }

    /// A thread with a lane; it goes back by [`keep`](Self::keep).
    pub(super) fn worker(&self) -> Result<Worker> {
        let kept = self.workers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.map_or_else(|| Worker::start(&self.store, self.arena.clone()), Ok)
    }

    /// For the next call. What it was given to do it does before.
    pub(super) fn keep(&self, worker: Worker) {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        if workers.len() < IDLE {
            workers.push(worker);
        }
    }
}

/// Something that a lane does.
#[derive(Debug)]
struct Begun<T> {
    worker: Worker,
    answer: Receiver<Result<T>>,
}

fn too_late() -> Error {
    Error::new(ErrorKind::Timeout, "the deadline passed before the block's turn")
}

/// A put that there is no time for.
fn put_late(put: Put) -> PutDone {
    PutDone { key: put.key, result: Stored::Failed(too_late()), buffer: Some(put.buffer) }
}

/// A get that there is no time for.
pub(super) fn late(get: Get) -> GetDone {
    GetDone { key: get.key, result: Err(Miss::Failed(too_late())), buffer: Some(get.buffer) }
}

impl Blocks {
    /// Whether another process owns the pool.
    pub fn is_remote(&self) -> bool {
        matches!(self.inner, Which::Remote(_))
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u32 {
        match &self.inner {
            Which::Local(local) => local.view.block_bytes(),
            Which::Remote(remote) => remote.block_bytes(),
        }
    }

    /// Bytes that a buffer needs for a block: whole pages.
    pub fn slot_bytes(&self) -> usize {
        match &self.inner {
            Which::Local(local) => local.view.slot_bytes(),
            Which::Remote(remote) => remote.slot_bytes(),
        }
    }

    /// See [`View::lookup`].
    pub fn lookup(&self, chain: &[Key]) -> Result<usize> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.lookup(chain)),
            Which::Remote(remote) => remote.lookup(chain),
        }
    }

    /// See [`View::contains`].
    pub fn contains(&self, keys: &[Key]) -> Result<Vec<bool>> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.contains(keys)),
            Which::Remote(remote) => remote.contains(keys),
        }
    }

    /// See [`View::pin`].
    pub fn pin(&self, keys: &[Key], pinned: bool) -> Result<usize> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.pin(keys, pinned)),
            Which::Remote(remote) => remote.pin(keys, pinned),
        }
    }

    /// See [`View::remove`].
    pub fn remove(&self, keys: &[Key]) -> Result<usize> {
        match &self.inner {
            Which::Local(local) => Ok(local.view.remove(keys)),
            Which::Remote(remote) => remote.remove(keys),
        }
    }

    /// Limits the bytes that the tenant's blocks may have, see [`Store::set_quota`].
    pub fn set_quota(&self, bytes: u64) -> Result<()> {
        match &self.inner {
            Which::Local(local) => local.store.set_quota(local.view.tenant(), bytes),
            Which::Remote(remote) => remote.set_quota(bytes),
        }
    }

    /// See [`Store::flush`].
    pub fn flush(&self) -> Result<()> {
        match &self.inner {
            Which::Local(local) => local.store.flush(),
            Which::Remote(remote) => remote.flush(),
        }
    }

    /// See [`Store::stat`].
    pub fn stat(&self) -> Result<StoreStat> {
        match &self.inner {
            Which::Local(local) => Ok(local.store.stat()),
            Which::Remote(remote) => remote.stat(),
        }
    }

    /// Loads blocks, see [`Lane::get`]. `by`: what has not begun by then is a miss, and so is what another process does not deliver.
    /// Whatever goes wrong is a miss of its blocks.
    pub fn get(&self, gets: Vec<Get>, by: Instant) -> Vec<GetDone> {
        if Instant::now() >= by {
            return gets.into_iter().map(late).collect();
        }
        match &self.inner {
            Which::Remote(remote) => remote.get(gets, by),
            Which::Local(local) => {
                let keys: Vec<Key> = gets.iter().map(|get| get.key).collect();
                local.lane(|lane, view| lane.get(view, gets)).unwrap_or_else(|error| {
                    let (kind, text) = (error.kind(), error.chain());
                    let failed = |key| GetDone {
                        key,
                        result: Err(Miss::Failed(Error::new(kind, text.clone()))),
                        buffer: None,
                    };
                    keys.into_iter().map(failed).collect()
                })
            }
        }
    }

    /// Stores blocks, see [`Lane::put`]. Whatever goes wrong is a put that failed.
    pub fn put(&self, puts: Vec<Put>, by: Instant) -> Vec<PutDone> {
        self.begin_put(puts, by).wait()
    }

    /// As [`put`](Self::put), while the caller does something else: where the pool is this process's own, other puts and gets go on beside it. Where
    /// another process owns it, it is over on return.
    pub fn begin_put(&self, puts: Vec<Put>, by: Instant) -> Puts<'_> {
        let answer = match &self.inner {
            _ if Instant::now() >= by => Answer::Here(puts.into_iter().map(put_late).collect()),
            Which::Remote(remote) => Answer::Here(remote.put(puts, by)),
            Which::Local(local) => {
                let keys: Vec<Key> = puts.iter().map(|put| put.key).collect();
                match local.begin(|lane, view| lane.put(view, puts)) {
                    Ok(begun) => Answer::Begun(local, begun, keys),
                    Err(error) => Answer::Here(failed(keys, &error)),
                }
            }
        };
        Puts { answer }
    }
}

/// Puts under way, see [`Blocks::begin_put`]. Dropped, it waits for them.
#[derive(Debug)]
#[must_use = "nobody knows what was stored before `wait` says so"]
pub struct Puts<'a> {
    answer: Answer<'a>,
}

#[derive(Debug)]
enum Answer<'a> {
    Here(Vec<PutDone>),
    Begun(&'a Local, Begun<Vec<PutDone>>, Vec<Key>),
}

impl Puts<'_> {
    /// Waits for all of them; answers come in the order of the puts.
    pub fn wait(self) -> Vec<PutDone> {
        match self.answer {
            Answer::Here(done) => done,
            Answer::Begun(local, begun, keys) => {
                local.end(begun).unwrap_or_else(|error| failed(keys, &error))
            }
        }
    }
}

fn failed(keys: Vec<Key>, error: &Error) -> Vec<PutDone> {
    let (kind, text) = (error.kind(), error.chain());
    let failed = |key| PutDone { key, result: Stored::Failed(Error::new(kind, text.clone())), buffer: None };
    keys.into_iter().map(failed).collect()
}
