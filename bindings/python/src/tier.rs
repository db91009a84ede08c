//! `nvtier._nvtier.KvTier`: jobs between blocks of memory, on the host or a GPU, and a KV store, done by threads of its own. Who asks never
//! waits: a question is answered when it is asked again, a job when its result is fetched. What inference engines' tiers and connectors
//! (`nvtier.vllm`) are made of.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::kv::Key;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use serde::Serialize;

use crate::error::{IntoPy, closed, deadline_of, invalid, to_py};
use crate::kv::{Got, Inside, KvStore, Maker, Outside, ShapeArgs};
use crate::pool::to_dict;
use crate::process::Mine;

/// Bytes of a job that one thread takes at a time.
const PART_BYTES: u64 = 16 << 20;
/// Blocks that could not be loaded and are kept in mind; the oldest are forgotten first.
const BAD_MAX: usize = 1 << 16;
/// How often who waits for all jobs looks for deadlines that are over.
const LOOK: Duration = Duration::from_millis(50);
/// Questions are not given up before.
const PATIENCE: Duration = Duration::from_secs(1);
/// Requests whose answers are kept, should nobody say that they are over.
const REQUESTS_MAX: usize = 1 << 16;

type Tenant = Arc<str>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A job that is begun.
struct Job {
    id: u64,
    load: bool,
    tenant: Tenant,
    keys: Vec<Key>,
    places: Vec<u32>,
    since: Instant,
    by: Instant,
    /// Parts that are not through.
    left: AtomicUsize,
    /// Blocks that were moved: what was there or was not to be stored costs the drive nothing.
    moved: AtomicUsize,
    /// Of each block, whether it is there.
    good: Mutex<Vec<bool>>,
}

/// Some blocks of a job.
struct Part {
    job: Arc<Job>,
    first: usize,
    len: usize,
}

/// A job that is over: its number, whether all went well, of each block whether it did, seconds, bytes that were moved.
type Finished = (u64, bool, Vec<bool>, f64, u64);

/// What happened since the tier was made.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Counts {
    stored: u64,
    present: u64,
    refused: u64,
    store_failed: u64,
    loaded: u64,
    lost: u64,
    corrupt: u64,
    load_failed: u64,
    stored_bytes: u64,
    loaded_bytes: u64,
    store_seconds: f64,
    load_seconds: f64,
    /// Questions answered with yes and no.
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    /// Parts of jobs that wait for a thread.
    pub(crate) queued: u64,
}

impl Counts {
    /// A block that was to be loaded or stored, and what came of it. Says whether that is well.
    pub(crate) fn add(&mut self, load: bool, what: &str, bytes: u64) -> bool {
        let (count, moved, good) = match (load, what) {
            (true, "memory" | "drive") => (&mut self.loaded, Some(&mut self.loaded_bytes), true),
            (true, "absent") => (&mut self.lost, None, false),
            (true, "corrupt") => (&mut self.corrupt, None, false),
            (true, _) => (&mut self.load_failed, None, false),
            (false, "new") => (&mut self.stored, Some(&mut self.stored_bytes), true),
            (false, "present") => (&mut self.present, None, true),
            (false, "failed") => (&mut self.store_failed, None, false),
            // By policy: nothing is wrong.
            (false, _) => (&mut self.refused, None, true),
        };
        *count += 1;
        if let Some(moved) = moved {
            *moved += bytes;
        }
        good
    }
}

/// What is known of a block that a request asked for.
#[derive(Clone, Copy)]
enum Answer {
    /// Not yet, since then.
    Asked(Instant),
    Is(bool),
}

#[derive(Default)]
struct State {
    loads: VecDeque<Part>,
    stores: VecDeque<Part>,
    running: usize,
    finished: Vec<Finished>,
    questions: Vec<(String, Tenant, Key)>,
    /// By request: what is known of its blocks.
    answers: HashMap<String, HashMap<Key, Answer>>,
    /// Blocks that the store has and that could not be loaded: not there until they are stored again, or nobody would ever compute them.
    bad: HashSet<(Tenant, Key)>,
    bad_order: VecDeque<(Tenant, Key)>,
    counts: Counts,
    trouble: Option<String>,
    stop: bool,
}

impl State {
    /// What a request's question is answered with; one that is new is put down. One that nobody could answer for so long is a miss: who has the store
    /// may hang.
    fn ask(&mut self, request: &str, tenant: &Tenant, key: Key, patience: Duration) -> Option<bool> {
        if !self.answers.contains_key(request) {
            if self.answers.len() >= REQUESTS_MAX {
                self.answers.clear();
            }
            self.answers.insert(request.to_owned(), HashMap::new());
        }
        let answers = self.answers.get_mut(request)?;
        match answers.get(&key).copied() {
            Some(Answer::Is(there)) => return Some(there),
            Some(Answer::Asked(since)) if since.elapsed() < patience => return None,
            Some(Answer::Asked(_)) => {
                answers.insert(key, Answer::Is(false));
                self.counts.misses += 1;
                return Some(false);
            }
            None => {}
        }
        answers.insert(key, Answer::Asked(Instant::now()));
        self.questions.push((request.to_owned(), tenant.clone(), key));
        None
    }
}

struct Tier {
    maker: Maker,
    fingerprint: Vec<u8>,
    outside: Outside,
    block_bytes: u32,
    spaces: Mutex<HashMap<Tenant, Arc<Inside>>>,
    state: Mutex<State>,
    /// There is something to do, or nothing more will be.
    work: Condvar,
    asked: Condvar,
    /// A part is through.
    through: Condvar,
}

impl Tier {
    /// The tenant's namespace.
    fn space(&self, tenant: &Tenant) -> engine::Result<Arc<Inside>> {
        let mut spaces = lock(&self.spaces);
        if let Some(space) = spaces.get(tenant) {
            return Ok(space.clone());
        }
        let space = Arc::new(self.maker.make(&self.fingerprint, self.block_bytes, tenant)?);
        spaces.insert(tenant.clone(), space.clone());
        Ok(space)
    }

    /// A thread that moves blocks, until the end. `loads`: only those that somebody waits for: a drive that does not take what is stored must not keep
    /// them from their deadlines.
    fn move_blocks(&self, loads: bool) {
        loop {
            let part = {
                let mut state = lock(&self.state);
                loop {
                    if state.stop {
                        return;
                    }
                    // Somebody waits for a load; nobody for a store.
                    let next = state.loads.pop_front();
                    if let Some(part) = next.or_else(|| if loads { None } else { state.stores.pop_front() }) {
                        state.running += 1;
                        break part;
                    }
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let done = self.part(&part);
            let mut state = lock(&self.state);
            state.running -= 1;
            self.end_part(&mut state, &part, &done);
            drop(state);
            self.through.notify_all();
        }
    }

    /// Moves the blocks of a part; says of each what came of it.
    fn part(&self, part: &Part) -> Result<Vec<&'static str>, String> {
        let (job, range) = (&part.job, part.first..part.first + part.len);
        let space = self.space(&job.tenant).map_err(|error| error.chain())?;
        let (keys, places) = (&job.keys[range.clone()], &job.places[range]);
        let (done, trouble) = match job.load {
            true => space
                .get(&self.outside, places, keys, job.by)
                .map(|(got, trouble)| (got.into_iter().map(Got::name).collect(), trouble)),
            false => space.put(&self.outside, places, keys, job.by),
        }
        .map_err(|error| error.to_string())?;
        if trouble.is_some() {
            lock(&self.state).trouble = trouble;
        }
        Ok(done)
    }

    fn end_part(&self, state: &mut State, part: &Part, done: &Result<Vec<&'static str>, String>) {
        let job = &part.job;
        let bytes = u64::from(self.block_bytes);
        for index in 0..part.len {
            let key = job.keys[part.first + index];
            let what = done.as_ref().map_or("failed", |done| done[index]);
            let good = state.counts.add(job.load, what, bytes);
            if job.load && !good {
                self.lost(state, &job.tenant, key);
            }
            if matches!(what, "memory" | "drive" | "new") {
                job.moved.fetch_add(1, AcqRel);
            }
            if !job.load && good {
                state.bad.remove(&(job.tenant.clone(), key));
            }
            lock(&job.good)[part.first + index] = good;
        }
        if let Err(error) = done {
            state.trouble = Some(error.clone());
        }
        if job.left.fetch_sub(1, AcqRel) == 1 {
            let good = std::mem::take(&mut *lock(&job.good));
            let seconds = job.since.elapsed().as_secs_f64();
            match job.load {
                true => state.counts.load_seconds += seconds,
                false => state.counts.store_seconds += seconds,
            }
            let moved = job.moved.load(Acquire) as u64 * bytes;
            state.finished.push((job.id, good.iter().all(|good| *good), good, seconds, moved));
        }
    }

    /// A block that a load did not find, or not as it was: whoever asks again is told that it is not there.
    fn lost(&self, state: &mut State, tenant: &Tenant, key: Key) {
        for answers in state.answers.values_mut() {
            if let Some(answer) = answers.get_mut(&key) {
                *answer = Answer::Is(false);
            }
        }
        if state.bad.insert((tenant.clone(), key)) {
            state.bad_order.push_back((tenant.clone(), key));
            while state.bad_order.len() > BAD_MAX {
                if let Some(oldest) = state.bad_order.pop_front() {
                    state.bad.remove(&oldest);
                }
            }
        }
    }

    /// The thread that answers questions, all that came meanwhile at once.
    fn answer(&self) {
        loop {
            let questions = {
                let mut state = lock(&self.state);
                while state.questions.is_empty() && !state.stop {
                    state = self.asked.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.stop {
                    return;
                }
                std::mem::take(&mut state.questions)
            };
            let mut by_tenant: HashMap<Tenant, (Vec<String>, Vec<Key>)> = HashMap::new();
            for (request, tenant, key) in questions {
                let (requests, keys) = by_tenant.entry(tenant).or_default();
                requests.push(request);
                keys.push(key);
            }
            for (tenant, (requests, keys)) in by_tenant {
                let there = self.space(&tenant).and_then(|space| space.contains(&keys));
                let mut state = lock(&self.state);
                // Not knowing is a miss.
                let there = there.unwrap_or_else(|error| {
                    state.trouble = Some(error.chain());
                    vec![false; keys.len()]
                });
                for ((request, key), there) in requests.into_iter().zip(keys).zip(there) {
                    let there = there && !state.bad.contains(&(tenant.clone(), key));
                    // A request that is over asks no more, and one that was answered meanwhile goes by that.
                    let asked = state.answers.get_mut(&request).and_then(|answers| answers.get_mut(&key));
                    let Some(answer @ Answer::Asked(_)) = asked else { continue };
                    *answer = Answer::Is(there);
                    match there {
                        true => state.counts.hits += 1,
                        false => state.counts.misses += 1,
                    }
                }
            }
            self.through.notify_all();
        }
    }

    /// Ends what waited for a thread until its deadline was over.
    fn expire(&self, state: &mut State) {
        let now = Instant::now();
        // Their deadlines are in the order in which they came.
        let late = |parts: &mut VecDeque<Part>| match parts.front() {
            Some(part) if part.job.by <= now => parts.pop_front(),
            _ => None,
        };
        while let Some(part) = late(&mut state.loads).or_else(|| late(&mut state.stores)) {
            self.end_part(
                state,
                &part,
                &Err("no thread was free for it in time: the drive is slow, or does not answer".into()),
            );
        }
    }

    /// Ends all that waits. What is being moved is waited for by whoever joins the threads.
    fn stop(&self) {
        let mut state = lock(&self.state);
        state.stop = true;
        let waiting: Vec<Part> = {
            let state = &mut *state;
            state.loads.drain(..).chain(state.stores.drain(..)).collect()
        };
        for part in waiting {
            self.end_part(&mut state, &part, &Err("the tier was shut down".into()));
        }
        drop(state);
        self.work.notify_all();
        self.asked.notify_all();
        self.through.notify_all();
    }
}

/// The key of a block in the store, of whatever bytes an engine calls it by.
pub(crate) fn key_of(bytes: &[u8]) -> PyResult<Key> {
    Key::new(blake3::hash(bytes).as_bytes()).map_err(to_py)
}

/// A tier and its threads.
struct Running {
    tier: Arc<Tier>,
    threads: Vec<JoinHandle<()>>,
    /// Owns the memory of the blocks: longer than any thread that writes to it.
    _memory: Py<PyAny>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tier.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// See the module.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct KvTier {
    running: Mutex<Option<Mine<Running>>>,
    deadline: Duration,
}

impl KvTier {
    /// How long a question may stay without an answer. One takes longer than a deadline that only tests have.
    fn patience(&self) -> Duration {
        self.deadline.max(PATIENCE)
    }

    fn tier(&self) -> PyResult<Arc<Tier>> {
        let running = lock(&self.running);
        let running = running.as_ref().ok_or_else(|| closed("the tier"))?;
        running.check("the tier")?;
        Ok(running.tier.clone())
    }

    fn submit(
        &self,
        id: u64,
        load: bool,
        tenant: &str,
        keys: &[PyBackedBytes],
        places: Vec<u32>,
    ) -> PyResult<()> {
        if places.len() != keys.len() {
            return Err(invalid(format!("{} keys for {} places", keys.len(), places.len())));
        }
        let tier = self.tier()?;
        let since = Instant::now();
        let keys = keys.iter().map(|key| key_of(key)).collect::<PyResult<Vec<_>>>()?;
        let size = (PART_BYTES / u64::from(tier.block_bytes)).max(1) as usize;
        let job = Arc::new(Job {
            id,
            load,
            tenant: tenant.into(),
            left: AtomicUsize::new(keys.len().div_ceil(size)),
            moved: AtomicUsize::new(0),
            good: Mutex::new(vec![false; keys.len()]),
            keys,
            places,
            since,
            by: since + self.deadline,
        });
        let mut state = lock(&tier.state);
        if job.keys.is_empty() {
            state.finished.push((id, true, Vec::new(), 0.0, 0));
            return Ok(());
        }
        for first in (0..job.keys.len()).step_by(size) {
            let part = Part { job: job.clone(), first, len: size.min(job.keys.len() - first) };
            match load {
                true => state.loads.push_back(part),
                false => state.stores.push_back(part),
            }
        }
        drop(state);
        tier.work.notify_all();
        Ok(())
    }
}

#[pymethods]
impl KvTier {
    /// `planes` and `shape` on `device`, see `KvBlocks.put`: where `memory`, which is kept, has its blocks. They are taken on the word of
    /// `nvtier.vllm`. Without planes and threads it answers questions only.
    #[new]
    #[pyo3(signature = (store, memory, device, planes, shape, block_bytes, fingerprint, threads, deadline))]
    #[allow(clippy::too_many_arguments)] // of a private class
    fn new(
        store: &KvStore,
        memory: Py<PyAny>,
        device: String,
        planes: Vec<(u64, u64)>,
        shape: ShapeArgs,
        block_bytes: u32,
        fingerprint: Vec<u8>,
        threads: usize,
        deadline: f64,
    ) -> PyResult<KvTier> {
        let deadline = deadline_of(deadline)?;
        if threads > 64 || (threads == 0) != planes.is_empty() || block_bytes == 0 {
            return Err(invalid(format!(
                "threads={threads}, {} planes, blocks of {block_bytes} bytes: 1 to 64 threads, and some memory",
                planes.len()
            )));
        }
        let outside = Outside::new(device, planes, shape)?;
        if threads > 0 {
            outside.must_have(block_bytes).py()?;
        }
        let tier = Arc::new(Tier {
            maker: store.maker()?,
            fingerprint,
            outside,
            block_bytes,
            spaces: Mutex::default(),
            state: Mutex::default(),
            work: Condvar::new(),
            asked: Condvar::new(),
            through: Condvar::new(),
        });
        // What cannot be a namespace is refused here and not by every job.
        tier.space(&"".into()).py()?;
        let mut running = Running { tier: tier.clone(), threads: Vec::new(), _memory: memory };
        let spawn = |name: &str, run: fn(&Tier)| {
            let tier = tier.clone();
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&tier));
            thread.map_err(|error| to_py(engine::Error::io("start a thread of a KV tier", error)))
        };
        running.threads.push(spawn("nvtier-kv-ask", Tier::answer)?);
        for number in 0..threads {
            // Of several one is for loads.
            let run = if number == 0 && threads > 1 {
                |tier: &Tier| tier.move_blocks(true)
            } else {
                |tier: &Tier| tier.move_blocks(false)
            };
            running.threads.push(spawn("nvtier-kv-move", run)?);
        }
        Ok(KvTier { running: Mutex::new(Some(Mine::new(running))), deadline })
    }

    /// Whether a block is there; `None`: ask again. A request gets one answer for a block, but a block that could not be loaded is not there, nor is one
    /// that nothing was found out about by the deadline.
    fn lookup(&self, request: &str, tenant: &str, key: &[u8]) -> PyResult<Option<bool>> {
        let tier = self.tier()?;
        let key = key_of(key)?;
        let mut state = lock(&tier.state);
        let answer = state.ask(request, &tenant.into(), key, self.patience());
        let asks = !state.questions.is_empty();
        drop(state);
        if asks {
            tier.asked.notify_one();
        }
        Ok(answer)
    }

    /// How many of these blocks, from the first on, are there; `None`: ask again. See `lookup`.
    fn prefix(&self, request: &str, tenant: &str, keys: Vec<PyBackedBytes>) -> PyResult<Option<usize>> {
        let tier = self.tier()?;
        let keys = keys.iter().map(|key| key_of(key)).collect::<PyResult<Vec<_>>>()?;
        let tenant: Tenant = tenant.into();
        let mut state = lock(&tier.state);
        let answers: Vec<Option<bool>> =
            keys.iter().map(|key| state.ask(request, &tenant, *key, self.patience())).collect();
        let asks = !state.questions.is_empty();
        drop(state);
        if asks {
            tier.asked.notify_one();
        }
        let end = answers.iter().position(|answer| *answer != Some(true)).unwrap_or(answers.len());
        Ok(match answers.get(end) {
            Some(None) => None,
            _ => Some(end),
        })
    }

    /// A request asks no more.
    fn forget(&self, request: &str) -> PyResult<()> {
        lock(&self.tier()?.state).answers.remove(request);
        Ok(())
    }

    /// Stores rows. The result is among `finished` some time, whatever happens.
    fn store(&self, job: u64, tenant: &str, keys: Vec<PyBackedBytes>, places: Vec<u32>) -> PyResult<()> {
        self.submit(job, false, tenant, &keys, places)
    }

    /// Loads rows.
    fn load(&self, job: u64, tenant: &str, keys: Vec<PyBackedBytes>, places: Vec<u32>) -> PyResult<()> {
        self.submit(job, true, tenant, &keys, places)
    }

    /// Jobs that are over and were not fetched yet.
    fn finished(&self) -> PyResult<Vec<Finished>> {
        let tier = self.tier()?;
        let mut state = lock(&tier.state);
        tier.expire(&mut state);
        Ok(std::mem::take(&mut state.finished))
    }

    /// Whether a job or an answer is still to come.
    fn is_busy(&self) -> PyResult<bool> {
        let tier = self.tier()?;
        let state = lock(&tier.state);
        Ok(state.running > 0
            || !state.loads.is_empty()
            || !state.stores.is_empty()
            || !state.finished.is_empty())
    }

    /// Waits until every job is over. Each of them has its deadline, and what the drive has begun by then its own.
    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        let tier = self.tier()?;
        py.detach(|| {
            let mut state = lock(&tier.state);
            while !state.stop && (state.running > 0 || !state.loads.is_empty() || !state.stores.is_empty()) {
                state = tier
                    .through
                    .wait_timeout(state, LOOK)
                    .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
                tier.expire(&mut state);
            }
        });
        Ok(())
    }

    /// What happened since it was made.
    fn stat<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let tier = self.tier()?;
        let counts = {
            let state = lock(&tier.state);
            let queued = (state.loads.len() + state.stores.len() + state.running) as u64;
            Counts { queued, ..state.counts.clone() }
        };
        to_dict(py, &counts)
    }

    /// Why something did not go well, the last time, for a person; the next call says `None`.
    fn trouble(&self) -> PyResult<Option<String>> {
        Ok(lock(&self.tier()?.state).trouble.take())
    }

    /// Ends it. Jobs that wait have failed; what is being moved is waited for. Returns the jobs that were not fetched.
    fn close(&self, py: Python<'_>) -> PyResult<Vec<Finished>> {
        let Some(running) = lock(&self.running).take() else { return Ok(Vec::new()) };
        running.check("the tier")?;
        let tier = running.tier.clone();
        py.detach(|| drop(running));
        let finished = std::mem::take(&mut lock(&tier.state).finished);
        Ok(finished)
    }
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<KvTier>()
}
