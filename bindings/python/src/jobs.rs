//! `nvtier._nvtier.KvClient`: batches of blocks at any addresses of the host and of any sizes, done by threads of its own, with an eventfd that
//! tells when one is through. What `nvtier.lmcache` is made of.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::kv::Key;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use rustix::event::{EventfdFlags, eventfd};

use crate::error::{IntoPy, closed, deadline_of, invalid, to_py};
use crate::kv::{Got, Inside, KvStore, Maker, Outside};
use crate::pool::to_dict;
use crate::process::Mine;
use crate::tier::{Counts, key_of};

/// Bytes of a batch that one thread takes at a time.
const PART_BYTES: u64 = 16 << 20;
/// Sizes that others stored are looked up again no sooner.
const SIZES_AGE: Duration = Duration::from_secs(1);
/// Keeps the store open with this client's settings; holds no blocks.
const ANCHOR: &[u8] = b"nvtier kv client";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Get,
    Set,
    Exists,
    Delete,
}

/// What blocks depend on, and whose they are.
type Owner = (Vec<u8>, String);

/// Namespaces by owner and size.
type Spaces = HashMap<(Arc<Owner>, u32), Arc<Inside>>;

/// A batch that is begun.
struct Job {
    id: u64,
    op: Op,
    by: Instant,
    /// Parts that are not through.
    left: AtomicUsize,
    outcome: Mutex<Outcome>,
}

struct Outcome {
    /// Of each block: whether it came, is there, was there.
    good: Vec<bool>,
    /// Whether all went as it was meant to.
    fine: bool,
    trouble: Option<String>,
    /// Owns the memory of the blocks; goes with the interpreter at hand, when the batch is fetched.
    memory: Option<Py<PyAny>>,
}

/// Some blocks of a batch: of one owner, and of one size where there is one.
struct Part {
    job: Arc<Job>,
    owner: Arc<Owner>,
    at: Vec<usize>,
    keys: Vec<Key>,
    addresses: Vec<u64>,
    len: u32,
}

/// A batch that is over: number, whether all went well, why not, and of each block whether it did.
type Done = (u64, bool, String, Option<Vec<bool>>);

#[derive(Default)]
struct State {
    /// Somebody waits for these.
    first: VecDeque<Part>,
    later: VecDeque<Part>,
    running: usize,
    finished: Vec<Arc<Job>>,
    counts: Counts,
    next: u64,
    stop: bool,
}

#[derive(Default)]
struct Sizes {
    known: HashMap<Vec<u8>, Vec<u32>>,
    looked: Option<Instant>,
}

struct Client {
    maker: Maker,
    _anchor: Inside,
    spaces: Mutex<Spaces>,
    sizes: Mutex<Sizes>,
    state: Mutex<State>,
    /// There is something to do, or nothing more will be.
    work: Condvar,
    event: OwnedFd,
}

impl Client {
    fn space(&self, owner: &Arc<Owner>, len: u32) -> engine::Result<Arc<Inside>> {
        let mut spaces = lock(&self.spaces);
        if let Some(space) = spaces.get(&(owner.clone(), len)) {
            return Ok(space.clone());
        }
        let space = Arc::new(self.maker.make(&owner.0, len, &owner.1)?);
        spaces.insert((owner.clone(), len), space.clone());
        drop(spaces);
        let mut sizes = lock(&self.sizes);
        let known = sizes.known.entry(owner.0.clone()).or_default();
        if !known.contains(&len) {
            known.push(len);
        }
        Ok(space)
    }

    /// Sizes of blocks that there may be. `again`: those that others stored meanwhile, too.
    fn sizes(&self, fingerprint: &[u8], again: bool) -> engine::Result<Vec<u32>> {
        let mut sizes = lock(&self.sizes);
        let due = match sizes.looked {
            None => true,
            Some(looked) => again && looked.elapsed() >= SIZES_AGE,
        };
        if due {
            for (fingerprint, len) in self.maker.sizes()? {
                let known = sizes.known.entry(fingerprint).or_default();
                if !known.contains(&len) {
                    known.push(len);
                }
            }
            sizes.looked = Some(Instant::now());
        }
        Ok(sizes.known.get(fingerprint).cloned().unwrap_or_default())
    }

    /// A thread that does parts, until the end. `first`: only those that somebody waits for.
    fn run(&self, first: bool) {
        loop {
            let part = {
                let mut state = lock(&self.state);
                loop {
                    if state.stop {
                        return;
                    }
                    let next = state.first.pop_front();
                    if let Some(part) = next.or_else(|| if first { None } else { state.later.pop_front() }) {
                        state.running += 1;
                        break part;
                    }
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let done = self.part(&part);
            lock(&self.state).running -= 1;
            self.end(&part, done);
        }
    }

    /// Does a part; of each block, what came of it, and why something did not go well.
    fn part(&self, part: &Part) -> Result<(Vec<&'static str>, Option<String>), String> {
        match part.job.op {
            Op::Get | Op::Set => self.transfer(part),
            Op::Exists => self.exists(part),
            Op::Delete => self.delete(part),
        }
    }

    fn transfer(&self, part: &Part) -> Result<(Vec<&'static str>, Option<String>), String> {
        let space = self.space(&part.owner, part.len).map_err(|error| error.chain())?;
        let outside = Outside::apart(part.addresses.clone(), u64::from(part.len));
        let places: Vec<u32> = (0..).take(part.keys.len()).collect();
        match part.job.op {
            Op::Get => space
                .get(&outside, &places, &part.keys, part.job.by)
                .map(|(got, trouble)| (got.into_iter().map(Got::name).collect(), trouble)),
            _ => space.put(&outside, &places, &part.keys, part.job.by),
        }
        .map_err(|error| error.to_string())
    }

    fn exists(&self, part: &Part) -> Result<(Vec<&'static str>, Option<String>), String> {
        let mut there = vec![false; part.keys.len()];
        let mut tried: Vec<u32> = Vec::new();
        for again in [false, true] {
            for len in self.sizes(&part.owner.0, again).map_err(|error| error.chain())? {
                if tried.contains(&len) {
                    continue;
                }
                tried.push(len);
                let space = self.space(&part.owner, len).map_err(|error| error.chain())?;
                let here = space.contains(&part.keys).map_err(|error| error.chain())?;
                there.iter_mut().zip(here).for_each(|(there, here)| *there |= here);
            }
            if !there.contains(&false) {
                break;
            }
        }
        Ok((there.into_iter().map(|there| if there { "yes" } else { "no" }).collect(), None))
    }

    fn delete(&self, part: &Part) -> Result<(Vec<&'static str>, Option<String>), String> {
        let (done, trouble) = self.exists(part)?;
        for len in self.sizes(&part.owner.0, false).map_err(|error| error.chain())? {
            let space = self.space(&part.owner, len).map_err(|error| error.chain())?;
            space.remove(&part.keys).map_err(|error| error.chain())?;
        }
        Ok((done, trouble))
    }

    fn end(&self, part: &Part, done: Result<(Vec<&'static str>, Option<String>), String>) {
        let job = &part.job;
        let mut state = lock(&self.state);
        let mut outcome = lock(&job.outcome);
        for (index, at) in part.at.iter().enumerate() {
            let what = done.as_ref().map_or("failed", |(done, _)| done[index]);
            let (good, fine) = match job.op {
                Op::Get | Op::Set => {
                    let fine = state.counts.add(job.op == Op::Get, what, u64::from(part.len));
                    (matches!(what, "memory" | "drive" | "new" | "present"), fine)
                }
                Op::Exists => {
                    match what {
                        "yes" => state.counts.hits += 1,
                        _ => state.counts.misses += 1,
                    }
                    (what == "yes", what != "failed")
                }
                Op::Delete => (what == "yes", what != "failed"),
            };
            outcome.good[*at] = good;
            // What is not stored, for whatever reason, must not be counted as stored.
            outcome.fine &= fine && (good || job.op != Op::Set);
            if job.op == Op::Set && !good && what != "failed" && outcome.trouble.is_none() {
                outcome.trouble = Some(format!("not stored: {what}"));
            }
        }
        match done {
            Ok((_, Some(trouble))) | Err(trouble) => outcome.trouble = Some(trouble),
            Ok((_, None)) => {}
        }
        drop(outcome);
        if job.left.fetch_sub(1, AcqRel) == 1 {
            state.finished.push(job.clone());
            drop(state);
            self.tell();
        }
    }

    fn tell(&self) {
        // The counter is full only if nobody fetches anything: he is told already then.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Ends all that waits. What is being done is waited for by whoever joins the threads.
    fn stop(&self) {
        let waiting: Vec<Part> = {
            let mut state = lock(&self.state);
            state.stop = true;
            let state = &mut *state;
            state.first.drain(..).chain(state.later.drain(..)).collect()
        };
        self.work.notify_all();
        for part in waiting {
            self.end(&part, Err("the client was closed".into()));
        }
    }
}

/// A client and its threads.
struct Running {
    client: Arc<Client>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.client.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// See the module.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct KvClient {
    running: Mutex<Option<Mine<Running>>>,
    deadline: Duration,
}

impl KvClient {
    fn client(&self) -> PyResult<Arc<Client>> {
        let running = lock(&self.running);
        let running = running.as_ref().ok_or_else(|| closed("the client of a KV store"))?;
        running.check("the client of a KV store")?;
        Ok(running.client.clone())
    }
}

/// Blocks of one owner: fingerprint, tenant, which of the batch.
type OwnerArgs = (Vec<u8>, String, Vec<usize>);

#[pymethods]
impl KvClient {
    #[new]
    fn new(py: Python<'_>, store: &KvStore, threads: usize, deadline: f64) -> PyResult<KvClient> {
        let deadline = deadline_of(deadline)?;
        if !(1..=64).contains(&threads) {
            return Err(invalid(format!("threads={threads}: 1 to 64")));
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| to_py(engine::Error::io("make an eventfd", error.into())))?;
        let maker = store.maker()?;
        let anchor = py.detach(|| maker.make(ANCHOR, 4096, "")).py()?;
        let client = Arc::new(Client {
            maker,
            _anchor: anchor,
            spaces: Mutex::default(),
            sizes: Mutex::default(),
            state: Mutex::default(),
            work: Condvar::new(),
            event,
        });
        let mut running = Running { client: client.clone(), threads: Vec::new() };
        for number in 0..threads {
            // Of several one is for those that somebody waits for: a drive that does not take what is stored must not keep them.
            let client = client.clone();
            let thread = std::thread::Builder::new()
                .name("nvtier-kv-job".into())
                .spawn(move || client.run(number == 0 && threads > 1));
            let thread =
                thread.map_err(|error| to_py(engine::Error::io("start a thread of a KV client", error)))?;
            running.threads.push(thread);
        }
        Ok(KvClient { running: Mutex::new(Some(Mine::new(running))), deadline })
    }

    /// Readable while a batch is through and was not fetched.
    fn event_fd(&self) -> PyResult<i32> {
        Ok(self.client()?.event.as_raw_fd())
    }

    /// Begins a batch: `op` is `get`, `set`, `exists` or `delete`; `views` are address and length of each block (of the first two), in memory
    /// that `memory` owns, on the word of `nvtier.lmcache`. Returns the batch's number.
    #[pyo3(signature = (op, owners, keys, views, memory))]
    fn submit(
        &self,
        op: &str,
        owners: Vec<OwnerArgs>,
        keys: Vec<PyBackedBytes>,
        views: Vec<(u64, u32)>,
        memory: Option<Py<PyAny>>,
    ) -> PyResult<u64> {
        let op = match op {
            "get" => Op::Get,
            "set" => Op::Set,
            "exists" => Op::Exists,
            "delete" => Op::Delete,
            other => return Err(invalid(format!("op={other:?}"))),
        };
        let moves = matches!(op, Op::Get | Op::Set);
        let all: usize = owners.iter().map(|(_, _, at)| at.len()).sum();
        let fits = owners.iter().flat_map(|(_, _, at)| at).all(|at| *at < keys.len());
        if all != keys.len() || !fits || moves && views.len() != keys.len() {
            return Err(invalid(format!("{} keys, {} buffers, {all} owners", keys.len(), views.len())));
        }
        if moves && views.iter().any(|(_, len)| *len == 0) {
            return Err(invalid("a block of no bytes".into()));
        }
        let keys = keys.iter().map(|key| key_of(key)).collect::<PyResult<Vec<_>>>()?;
        let client = self.client()?;
        let mut state = lock(&client.state);
        state.next += 1;
        let id = state.next;
        let mut split: Vec<(Arc<Owner>, Vec<usize>, u32)> = Vec::new();
        for (fingerprint, tenant, at) in owners {
            let owner = Arc::new((fingerprint, tenant));
            let mut by_len: HashMap<u32, Vec<usize>> = HashMap::new();
            for index in at {
                let len = views.get(index).map_or(0, |(_, len)| *len);
                by_len.entry(len).or_default().push(index);
            }
            for (len, at) in by_len {
                let most = (PART_BYTES / u64::from(len.max(1))).max(1) as usize;
                let most = if moves { most } else { at.len().max(1) };
                split.extend(at.chunks(most).map(|at| (owner.clone(), at.to_vec(), len)));
            }
        }
        let outcome = Outcome { good: vec![false; keys.len()], fine: true, trouble: None, memory };
        let job = Arc::new(Job {
            id,
            op,
            by: Instant::now() + self.deadline,
            left: AtomicUsize::new(split.len()),
            outcome: Mutex::new(outcome),
        });
        if split.is_empty() {
            state.finished.push(job);
            drop(state);
            client.tell();
            return Ok(id);
        }
        for (owner, at, len) in split {
            let part = Part {
                job: job.clone(),
                owner,
                keys: at.iter().map(|index| keys[*index]).collect(),
                addresses: at.iter().filter(|_| moves).map(|index| views[*index].0).collect(),
                at,
                len,
            };
            match op {
                Op::Get | Op::Exists => state.first.push_back(part),
                Op::Set | Op::Delete => state.later.push_back(part),
            }
        }
        drop(state);
        client.work.notify_all();
        Ok(id)
    }

    /// Batches that are over and were not fetched yet: number, whether all went well, why not, and of each block whether it came, is there,
    /// was there.
    fn finished(&self) -> PyResult<Vec<Done>> {
        let client = self.client()?;
        let mut counter = [0; 8];
        // Before what is finished is taken: what ends meanwhile tells again.
        let _ = rustix::io::read(&client.event, &mut counter);
        let finished = std::mem::take(&mut lock(&client.state).finished);
        let done = finished.into_iter().map(|job| {
            let mut outcome = lock(&job.outcome);
            outcome.memory = None;
            let good = std::mem::take(&mut outcome.good);
            (job.id, outcome.fine, outcome.trouble.take().unwrap_or_default(), Some(good))
        });
        Ok(done.collect())
    }

    /// What happened since it was made.
    fn stat<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let client = self.client()?;
        let counts = {
            let state = lock(&client.state);
            let mut counts = state.counts.clone();
            counts.queued = (state.first.len() + state.later.len() + state.running) as u64;
            counts
        };
        to_dict(py, &counts)
    }

    /// Ends it. Batches that wait have failed; what is being moved is waited for.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(running) = lock(&self.running).take() else { return Ok(()) };
        running.check("the client of a KV store")?;
        let client = running.client.clone();
        py.detach(|| drop(running));
        lock(&client.state).finished.clear();
        Ok(())
    }
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<KvClient>()
}
