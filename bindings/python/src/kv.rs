//! `nvtier._nvtier.KvStore` and `KvBlocks`, below their Python faces in `nvtier/kv.py`; keys and digests; the planner.
//!
//! Blocks go between a store and tensors that a caller holds: planes (K or V of a layer, each with strides) and a place in them for each
//! block. A block in the store is `[plane][head][token][row]`, wherever its planes are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use engine::kv::admin;
use engine::kv::planner::{self, Planner, RestoreOptions, Step};
use engine::kv::warm::{Space, Warm};
use engine::kv::{Get, GetDone, Key, Miss, Put, Refusal, Settings, Stored};
use engine::{Blocks, Puts, Session};
use gpudirect::driver::Lent;
use gpudirect::paged::{BlockShape, Inner, Move, Order, Paged, Plane, Staging, Way};
use gpudirect::{Batch, DeviceMemory, Direction, Driver, Part, PinnedTier, Stream};
use nvme::{Arena, ArenaOptions, Buffer};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict};

use crate::error::{IntoPy, closed, deadline_of, invalid, to_py};
use crate::lanes;
use crate::memory::{self, Foreign, HostPlanes};
use crate::pool::{Pool, to_dict};
use crate::process::{Mine, may_use};

/// Lanes that load from the store for one call, each with a thread that compares sums,
const LANES: usize = 2;
/// where there is more to load than this.
const ONE_LANE_BYTES: usize = 4 << 20;
/// Of the memory for blocks, what one step of a call takes at most.
const STEP_SHARE: usize = 8;
/// Calls to a GPU that can be prepared at once and are kept.
const GPUS: usize = 4;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keys(keys: &[Vec<u8>]) -> PyResult<Vec<Key>> {
    keys.iter().map(|key| Key::new(key).map_err(to_py)).collect()
}

/// A store of a pool, and the memory above it.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct KvStore {
    pool: Py<Pool>,
    settings: Settings,
    warm: Arc<Mine<Warm>>,
    /// By device: the memory, known to it.
    pinned: Arc<Mutex<HashMap<String, Mine<Arc<PinnedTier>>>>>,
}

#[pymethods]
impl KvStore {
    #[new]
    #[pyo3(signature = (pool, *, name, budget, ram, keep, ttl, write_bytes_per_day, second_offer, quotas, tenant_quota, deadline))]
    #[allow(clippy::too_many_arguments)] // keyword arguments of a private class
    fn new(
        py: Python<'_>,
        pool: &Bound<'_, Pool>,
        name: String,
        budget: Option<u64>,
        ram: usize,
        keep: bool,
        ttl: Option<u64>,
        write_bytes_per_day: Option<u64>,
        second_offer: Option<usize>,
        quotas: Vec<(String, u64)>,
        tenant_quota: u64,
        deadline: f64,
    ) -> PyResult<KvStore> {
        let deadline = deadline_of(deadline)?;
        let settings = Settings {
            name,
            budget_bytes: budget,
            ttl_secs: ttl,
            write_bytes_per_day,
            second_offer,
            quotas,
            tenant_quota,
            deadline_ms: (deadline.as_millis() as u64).max(1),
            lasting: false,
        };
        // Fails here rather than at the first block.
        pool.get().session()?;
        let arena = py.detach(|| Arena::new(ram, ArenaOptions::default())).map_err(|error| {
            to_py(engine::Error::from(error).context(format!("take {ram} bytes for KV blocks")))
        })?;
        Ok(KvStore {
            pool: pool.clone().unbind(),
            settings,
            warm: Arc::new(Mine::new(Warm::new(arena, keep))),
            pinned: Arc::default(),
        })
    }

    #[getter]
    fn name(&self) -> &str {
        &self.settings.name
    }

    /// The namespace of a fingerprint, a size of blocks and a tenant.
    fn namespace(
        &self,
        py: Python<'_>,
        fingerprint: &[u8],
        block_bytes: u32,
        tenant: &str,
    ) -> PyResult<KvBlocks> {
        let maker = self.maker()?;
        let inner = py.detach(|| maker.make(fingerprint, block_bytes, tenant)).py()?;
        Ok(KvBlocks { inner: RwLock::new(Some(Arc::new(Mine::new(inner)))) })
    }

    /// What the memory above the store holds.
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.warm.check("the KV store")?;
        to_dict(py, &self.warm.stat())
    }
}

/// What copies to and from one GPU need.
struct Gpu {
    device: String,
    // Before what its copies use.
    stream: Box<dyn Stream>,
    staging: DeviceMemory,
    driver: Arc<dyn Driver>,
    _tier: Arc<PinnedTier>,
}

/// What namespaces of a store are made of, on any thread.
#[derive(Clone)]
pub(crate) struct Maker {
    session: Arc<Mine<Session>>,
    settings: Settings,
    warm: Arc<Mine<Warm>>,
    pinned: Arc<Mutex<HashMap<String, Mine<Arc<PinnedTier>>>>>,
}

impl Maker {
    pub(crate) fn make(&self, fingerprint: &[u8], block_bytes: u32, tenant: &str) -> engine::Result<Inside> {
        let arena = Some(self.warm.arena());
        let blocks = self.session.blocks(&self.settings, fingerprint, block_bytes, tenant, arena)?;
        Ok(Inside {
            blocks,
            space: self.warm.space(fingerprint, block_bytes, tenant),
            warm: self.warm.clone(),
            pinned: self.pinned.clone(),
            gpus: Mutex::default(),
            deadline: Duration::from_millis(self.settings.deadline_ms),
        })
    }

    /// The sizes of blocks that the store has, or had, by what they depend on.
    pub(crate) fn sizes(&self) -> engine::Result<Vec<(Vec<u8>, u32)>> {
        let report = self.session.kv(&self.settings.name, &admin::Order::Stat, &[], None, &mut |_| {})?;
        let namespaces = match report {
            admin::Report::Stat { namespaces, .. } => namespaces,
            _ => Vec::new(),
        };
        Ok(namespaces.into_iter().map(|info| (info.fingerprint, info.block_bytes)).collect())
    }
}

impl KvStore {
    pub(crate) fn maker(&self) -> PyResult<Maker> {
        self.warm.check("the KV store")?;
        Ok(Maker {
            session: self.pool.get().session()?,
            settings: self.settings.clone(),
            warm: self.warm.clone(),
            pinned: self.pinned.clone(),
        })
    }
}

/// A namespace of a store, and all that its calls need.
pub(crate) struct Inside {
    gpus: Mutex<Vec<Gpu>>,
    blocks: Blocks,
    space: Space,
    warm: Arc<Mine<Warm>>,
    pinned: Arc<Mutex<HashMap<String, Mine<Arc<PinnedTier>>>>>,
    deadline: Duration,
}

/// Where blocks are outside.
pub(crate) struct Outside {
    device: String,
    planes: Vec<Plane>,
    shape: BlockShape,
    /// Whether each plane is a block of its own, and not a part of each.
    apart: bool,
}

/// `blocks, block_stride, tokens, token_stride, heads, head_stride, row`, bytes.
pub(crate) type ShapeArgs = (u32, u64, u32, u64, u32, u64, u64);

impl Outside {
    pub(crate) fn new(device: String, planes: Vec<(u64, u64)>, shape: ShapeArgs) -> PyResult<Outside> {
        may_use(&device)?;
        let (blocks, block_stride, tokens, token_stride, heads, head_stride, row) = shape;
        let shape = BlockShape { blocks, block_stride, tokens, token_stride, heads, head_stride, row };
        let planes = planes.into_iter().map(|(address, len)| Plane { address, len }).collect();
        Ok(Outside { device, planes, shape, apart: false })
    }

    /// Blocks of `len` bytes at these addresses of the host.
    pub(crate) fn apart(addresses: Vec<u64>, len: u64) -> Outside {
        let shape = BlockShape {
            blocks: 1,
            block_stride: len,
            tokens: 1,
            token_stride: len,
            heads: 1,
            head_stride: len,
            row: len,
        };
        let planes = addresses.into_iter().map(|address| Plane { address, len }).collect();
        Outside { device: "cpu".into(), planes, shape, apart: true }
    }

    /// Refuses blocks of another size.
    pub(crate) fn must_have(&self, block_bytes: u32) -> engine::Result<()> {
        let bytes = self.shape.block_bytes().and_then(|bytes| bytes.checked_mul(self.planes.len() as u64));
        if bytes == Some(u64::from(block_bytes)) {
            return Ok(());
        }
        let context = format!("planes with blocks of {bytes:?} bytes, and not of {block_bytes}");
        Err(engine::Error::new(engine::ErrorKind::InvalidArgument, context))
    }

    fn is_host(&self) -> bool {
        self.device == "cpu"
    }

    /// Refuses blocks of another size than the namespace's.
    fn check(&self, paged: &Paged, block_bytes: u32) -> gpudirect::Result<()> {
        let bytes = paged.staged_block_bytes()?;
        if bytes == u64::from(block_bytes) {
            return Ok(());
        }
        let context =
            format!("blocks of {bytes} bytes in the tensors, the namespace's are of {block_bytes} bytes");
        Err(gpudirect::Error::new(gpudirect::ErrorKind::Invalid, context))
    }
}

/// What became of a block that was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Got {
    Memory,
    Drive,
    Absent,
    Corrupt,
    Failed,
}

impl Got {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Got::Memory => "memory",
            Got::Drive => "drive",
            Got::Absent => "absent",
            Got::Corrupt => "corrupt",
            Got::Failed => "failed",
        }
    }
}

/// Takes blocks out of planes or puts them there, on the host or on a GPU.
enum Mover<'a> {
    Host(HostPlanes),
    Apart(Vec<HostPlanes>),
    Gpu { gpu: Gpu, paged: Paged, half: bool, room: usize, home: &'a Mutex<Vec<Gpu>> },
}

impl Inside {
    /// Blocks in one step of a call.
    fn step(&self) -> usize {
        (self.warm.arena().len() / STEP_SHARE / self.blocks.slot_bytes()).max(1)
    }

    fn buffer(&self) -> engine::Result<Buffer> {
        match self.warm.buffer(self.blocks.slot_bytes()) {
            Some(buffer) => Ok(buffer),
            // All is in use by other calls: of the heap then.
            None => Ok(Buffer::heap(self.blocks.slot_bytes())?),
        }
    }

    fn gpu(&self, device: &str, staging: u64) -> gpudirect::Result<Gpu> {
        let mut kept = lock(&self.gpus);
        let fits = |gpu: &Gpu| gpu.device == device && gpu.staging.len() >= staging;
        if let Some(at) = kept.iter().position(fits) {
            return Ok(kept.swap_remove(at));
        }
        drop(kept);
        let mut pinned = lock(&self.pinned);
        let tier = match pinned.get(device) {
            Some(tier) => (**tier).clone(),
            None => {
                let driver = gpudirect::driver::open(device)?;
                let tier = PinnedTier::new(&driver, self.warm.arena())?;
                pinned.insert(device.to_owned(), Mine::new(tier.clone()));
                tier
            }
        };
        drop(pinned);
        let driver = tier.driver().clone();
        let staging = DeviceMemory::new(&driver, staging)?;
        let stream = driver.stream()?;
        Ok(Gpu { device: device.to_owned(), stream, staging, driver, _tier: tier })
    }

    fn mover(&self, outside: &Outside, blocks: usize) -> gpudirect::Result<Mover<'_>> {
        let block_bytes = self.blocks.block_bytes();
        if outside.apart {
            let all = outside.planes.iter().map(|plane| {
                let memory = Foreign::new(vec![(plane.address, plane.len)]);
                let paged = Paged::new(&memory, std::slice::from_ref(plane), outside.shape)?;
                outside.check(&paged, block_bytes)?;
                Ok(HostPlanes::new(&paged))
            });
            return all.collect::<gpudirect::Result<_>>().map(Mover::Apart);
        }
        if outside.is_host() {
            let ranges = outside.planes.iter().map(|plane| (plane.address, plane.len)).collect();
            let paged = Paged::new(&Foreign::new(ranges), &outside.planes, outside.shape)?;
            outside.check(&paged, block_bytes)?;
            return Ok(Mover::Host(HostPlanes::new(&paged)));
        }
        let room = self.step().min(blocks.max(1));
        let gpu = self.gpu(&outside.device, 2 * room as u64 * u64::from(block_bytes))?;
        let paged = Paged::new(gpu.driver.as_ref(), &outside.planes, outside.shape)?;
        outside.check(&paged, block_bytes)?;
        Ok(Mover::Gpu { gpu, paged, half: false, room, home: &self.gpus })
    }

    pub(crate) fn get(
        &self,
        outside: &Outside,
        places: &[u32],
        keys: &[Key],
        by: Instant,
    ) -> gpudirect::Result<(Vec<Got>, Option<String>)> {
        let block_bytes = self.blocks.block_bytes() as usize;
        let mut mover = self.mover(outside, keys.len())?;
        let mut got = vec![Got::Absent; keys.len()];
        let mut trouble = None;
        // What others took out of the store is not to be served from here.
        let mut memory = self.warm.contains(self.space, keys);
        if memory.contains(&true) {
            match self.blocks.contains(keys) {
                Ok(there) => memory.iter_mut().zip(there).for_each(|(memory, there)| *memory &= there),
                Err(error) => {
                    trouble = Some(error.chain());
                    memory.fill(false);
                }
            }
        }
        let mut far = Vec::new();
        let mut near: Vec<(usize, Arc<Buffer>)> = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            match self.warm.get(self.space, key).filter(|_| memory[index]) {
                Some(buffer) => near.push((index, buffer)),
                None => far.push(index),
            }
        }
        let step = self.step();
        let far_bytes = far.len() * self.blocks.slot_bytes();
        let lanes = if far_bytes > ONE_LANE_BYTES { LANES } else { 1 };
        let mut loads = match far.is_empty() {
            true => None,
            false => Some(self.blocks.loads(lanes).map_err(gpudirect::Error::from)?),
        };
        let mut near = Some(near);
        let mut waiting = far.into_iter().peekable();
        loop {
            let room = loads.as_ref().map_or(0, |loads| (lanes * step).saturating_sub(loads.under_way()));
            let mut begun = Vec::new();
            for index in waiting.by_ref().take(room) {
                match self.buffer() {
                    Ok(buffer) => begun.push((index as u64, Get { key: keys[index], buffer, start: 0 })),
                    Err(error) => {
                        got[index] = Got::Failed;
                        trouble = Some(error.chain());
                    }
                }
            }
            if let Some(loads) = &mut loads {
                let share = begun.len().div_ceil(lanes).max(1);
                while !begun.is_empty() {
                    let rest = begun.split_off(share.min(begun.len()));
                    loads.begin(std::mem::replace(&mut begun, rest), by);
                }
            }
            // Copied while the others come.
            for batch in near.take().unwrap_or_default().chunks(step) {
                let parts: Vec<(u32, &Arc<Buffer>)> =
                    batch.iter().map(|(index, buffer)| (places[*index], buffer)).collect();
                mover.scatter(&parts, block_bytes)?;
                batch.iter().for_each(|(index, _)| got[*index] = Got::Memory);
            }
            let Some(loads) = &mut loads else { break };
            let mut came: Vec<(u64, GetDone)> = loads.wait().into_iter().collect();
            while !came.is_empty()
                && came.len() < step
                && let Some(more) = loads.poll()
            {
                came.push(more);
            }
            if came.is_empty() && waiting.peek().is_none() {
                break;
            }
            let mut good: Vec<(u32, Arc<Buffer>)> = Vec::new();
            // The last of a prefix are the first to make room.
            came.sort_unstable_by_key(|(index, _)| std::cmp::Reverse(*index));
            for (index, done) in came {
                let index = index as usize;
                got[index] = match (done.result, done.buffer) {
                    (Ok(()), Some(buffer)) => {
                        good.push((places[index], self.warm.insert(self.space, keys[index], buffer)));
                        Got::Drive
                    }
                    (Err(Miss::Absent), _) => Got::Absent,
                    (Err(Miss::Corrupt), _) => Got::Corrupt,
                    (Err(Miss::Failed(error)), _) => {
                        trouble = Some(error.chain());
                        Got::Failed
                    }
                    (Ok(()), None) => Got::Failed,
                };
            }
            let parts: Vec<(u32, &Arc<Buffer>)> =
                good.iter().map(|(place, buffer)| (*place, buffer)).collect();
            mover.scatter(&parts, block_bytes)?;
        }
        drop(loads);
        mover.finish()?;
        Ok((got, trouble))
    }

    /// Takes blocks out. Returns how many were there.
    pub(crate) fn remove(&self, keys: &[Key]) -> engine::Result<usize> {
        self.warm.remove(self.space, keys);
        self.blocks.remove(keys)
    }

    /// Which blocks are there, in the store.
    pub(crate) fn contains(&self, keys: &[Key]) -> engine::Result<Vec<bool>> {
        self.blocks.contains(keys)
    }

    pub(crate) fn put(
        &self,
        outside: &Outside,
        places: &[u32],
        keys: &[Key],
        by: Instant,
    ) -> gpudirect::Result<(Vec<&'static str>, Option<String>)> {
        let block_bytes = self.blocks.block_bytes() as usize;
        let mut mover = self.mover(outside, keys.len())?;
        let mut trouble = None;
        let mut stored = vec!["failed"; keys.len()];
        let there = self.blocks.contains(keys).unwrap_or_else(|_| vec![false; keys.len()]);
        let wanted: Vec<usize> = (0..keys.len()).filter(|index| !there[*index]).collect();
        (0..keys.len()).filter(|index| there[*index]).for_each(|index| stored[index] = "present");
        // Taken out of the tensors while the batch before is on its way.
        let mut before: Option<(&[usize], Puts<'_>)> = None;
        let mut end = |(batch, puts): (&[usize], Puts<'_>)| {
            for (index, done) in batch.iter().zip(puts.wait()).rev() {
                stored[*index] = match done.result {
                    Stored::New | Stored::Present => {
                        if let Some(buffer) = done.buffer {
                            self.warm.insert(self.space, keys[*index], buffer);
                        }
                        "new"
                    }
                    Stored::Refused(Refusal::Admission) => "admission",
                    Stored::Refused(Refusal::Budget) => "budget",
                    Stored::Refused(Refusal::Quota) => "quota",
                    Stored::Refused(Refusal::Space) => "space",
                    Stored::Failed(error) => {
                        trouble = Some(error.chain());
                        "failed"
                    }
                };
            }
        };
        let mut lacking = None;
        'steps: for batch in wanted.chunks(self.step()) {
            let mut buffers = Vec::with_capacity(batch.len());
            for _ in batch {
                match self.buffer() {
                    Ok(buffer) => buffers.push(buffer),
                    Err(error) => {
                        lacking = Some(error.chain());
                        break 'steps;
                    }
                }
            }
            let at: Vec<u32> = batch.iter().map(|index| places[*index]).collect();
            let buffers = mover.gather(&at, buffers, block_bytes)?;
            let puts = batch.iter().zip(buffers);
            let puts = puts.map(|(index, mut buffer)| {
                buffer[block_bytes..].fill(0);
                Put { key: keys[*index], buffer, start: 0 }
            });
            let begun = self.blocks.begin_put(puts.collect(), by);
            before.replace((batch, begun)).into_iter().for_each(&mut end);
        }
        before.into_iter().for_each(end);
        mover.finish()?;
        Ok((stored, lacking.or(trouble)))
    }
}

impl Mover<'_> {
    /// Puts blocks into their places. On a GPU it only starts.
    fn scatter(&mut self, blocks: &[(u32, &Arc<Buffer>)], block_bytes: usize) -> gpudirect::Result<()> {
        match self {
            Mover::Host(planes) => {
                blocks.iter().try_for_each(|(place, buffer)| planes.scatter(*place, &buffer[..block_bytes]))
            }
            Mover::Apart(all) => blocks
                .iter()
                .try_for_each(|(place, buffer)| place_of(all, *place)?.scatter(0, &buffer[..block_bytes])),
            Mover::Gpu { gpu, paged, half, room, .. } => {
                for blocks in blocks.chunks(*room) {
                    // Two halves: copies of the next step need not wait for this step's kernel. What is in a half is read by kernels
                    // that stand before the copies of the step after the next in the stream.
                    let base = gpu.staging.address() + u64::from(*half) * (*room * block_bytes) as u64;
                    *half = !*half;
                    let mut batch = Batch::new(Direction::ToDevice);
                    for (i, (_, buffer)) in blocks.iter().enumerate() {
                        let device = base + (i * block_bytes) as u64;
                        batch.parts.push(Part { buffer: i as u32, offset: 0, device, len: block_bytes });
                        batch.lent.push(Lent::Buffer((*buffer).clone()));
                    }
                    gpu.stream.copy(batch).map_err(|refused| refused.error)?;
                    let places: Vec<u32> = blocks.iter().map(|(place, _)| *place).collect();
                    let staging = staging_of(base, (*room * block_bytes) as u64);
                    let job = Move::new(gpu.driver.as_ref(), paged, &staging, &places, Way::Scatter)?;
                    gpu.stream.shuffle(&Arc::new(job))?;
                    gpu.stream.reap(false, &mut |_| {})?;
                }
                Ok(())
            }
        }
    }

    /// Takes blocks from their places into buffers, and waits for it.
    fn gather(
        &mut self,
        places: &[u32],
        mut buffers: Vec<Buffer>,
        block_bytes: usize,
    ) -> gpudirect::Result<Vec<Buffer>> {
        match self {
            Mover::Host(planes) => {
                for (place, buffer) in places.iter().zip(&mut buffers) {
                    planes.gather(*place, &mut buffer[..block_bytes])?;
                }
                Ok(buffers)
            }
            Mover::Apart(all) => {
                for (place, buffer) in places.iter().zip(&mut buffers) {
                    place_of(all, *place)?.gather(0, &mut buffer[..block_bytes])?;
                }
                Ok(buffers)
            }
            Mover::Gpu { gpu, paged, room, .. } => {
                let mut all = Vec::with_capacity(buffers.len());
                let mut buffers = buffers.into_iter();
                for places in places.chunks(*room) {
                    let base = gpu.staging.address();
                    let staging = staging_of(base, (*room * block_bytes) as u64);
                    let job = Move::new(gpu.driver.as_ref(), paged, &staging, places, Way::Gather)?;
                    gpu.stream.shuffle(&Arc::new(job))?;
                    let mut batch = Batch::new(Direction::ToHost);
                    for (i, buffer) in buffers.by_ref().take(places.len()).enumerate() {
                        let device = base + (i * block_bytes) as u64;
                        batch.parts.push(Part { buffer: i as u32, offset: 0, device, len: block_bytes });
                        batch.buffers.push(buffer);
                    }
                    gpu.stream.copy(batch).map_err(|refused| refused.error)?;
                    gpu.stream.finish(&mut |batch| all.extend(batch.buffers))?;
                }
                Ok(all)
            }
        }
    }

    /// Waits for all of it.
    fn finish(mut self) -> gpudirect::Result<()> {
        if let Mover::Gpu { gpu, .. } = &mut self {
            gpu.stream.finish(&mut |_| {})?;
        }
        if let Mover::Gpu { gpu, home, .. } = self {
            let mut kept = lock(home);
            if kept.len() < GPUS {
                kept.push(gpu);
            }
        }
        Ok(())
    }
}

fn place_of(all: &[HostPlanes], place: u32) -> gpudirect::Result<&HostPlanes> {
    all.get(place as usize).ok_or_else(|| {
        let context = format!("block {place} of {}", all.len());
        gpudirect::Error::new(gpudirect::ErrorKind::Invalid, context)
    })
}

fn staging_of(address: u64, len: u64) -> Staging {
    Staging { address, len, order: Order::BlockMajor, inner: Inner::HeadMajor }
}

/// Blocks of one namespace and tenant.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct KvBlocks {
    inner: RwLock<Option<Arc<Mine<Inside>>>>,
}

impl KvBlocks {
    fn inside(&self) -> PyResult<Arc<Mine<Inside>>> {
        let inside = self.inner.read().unwrap_or_else(PoisonError::into_inner).clone();
        let inside = inside.ok_or_else(|| closed("the namespace of a KV store"))?;
        inside.check("the namespace of a KV store")?;
        Ok(inside)
    }

    fn until(inside: &Inside, deadline: Option<f64>) -> PyResult<Instant> {
        let by = match deadline {
            None => Instant::now() + inside.deadline,
            Some(_) => crate::watch::deadline(deadline)?.unwrap_or_else(Instant::now),
        };
        Ok(by)
    }
}

fn check_lengths(places: &[u32], keys: &[Vec<u8>]) -> PyResult<()> {
    if places.len() == keys.len() {
        return Ok(());
    }
    Err(invalid(format!("{} keys for {} places", keys.len(), places.len())))
}

#[pymethods]
impl KvBlocks {
    #[getter]
    fn is_remote(&self) -> PyResult<bool> {
        Ok(self.inside()?.blocks.is_remote())
    }

    #[getter]
    fn block_bytes(&self) -> PyResult<u32> {
        Ok(self.inside()?.blocks.block_bytes())
    }

    fn lookup(&self, py: Python<'_>, keys: Vec<Vec<u8>>) -> PyResult<usize> {
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        py.detach(|| inside.blocks.lookup(&keys)).py()
    }

    fn contains(&self, py: Python<'_>, keys: Vec<Vec<u8>>) -> PyResult<Vec<bool>> {
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        py.detach(|| inside.blocks.contains(&keys)).py()
    }

    fn in_memory(&self, keys: Vec<Vec<u8>>) -> PyResult<Vec<bool>> {
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        Ok(inside.warm.contains(inside.space, &keys))
    }

    /// Drops blocks from memory; they stay in the store.
    fn forget(&self, keys: Vec<Vec<u8>>) -> PyResult<()> {
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        inside.warm.remove(inside.space, &keys);
        Ok(())
    }

    fn pin(&self, py: Python<'_>, keys: Vec<Vec<u8>>, pinned: bool) -> PyResult<usize> {
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        py.detach(|| inside.blocks.pin(&keys, pinned)).py()
    }

    fn remove(&self, py: Python<'_>, keys: Vec<Vec<u8>>) -> PyResult<usize> {
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        py.detach(|| inside.remove(&keys)).py()
    }

    fn set_quota(&self, py: Python<'_>, quota: u64) -> PyResult<()> {
        let inside = self.inside()?;
        py.detach(|| inside.blocks.set_quota(quota)).py()
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        let inside = self.inside()?;
        py.detach(|| inside.blocks.flush()).py()
    }

    fn stat<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let inside = self.inside()?;
        let stat = py.detach(|| inside.blocks.stat()).py()?;
        to_dict(py, &stat)
    }

    /// The addresses are taken on the word of `nvtier.kv`: they are memory of tensors that it holds until this returns, and what works on
    /// them on a GPU has ended.
    #[pyo3(signature = (device, planes, shape, places, keys, deadline))]
    #[allow(clippy::too_many_arguments)]
    fn put(
        &self,
        py: Python<'_>,
        device: String,
        planes: Vec<(u64, u64)>,
        shape: ShapeArgs,
        places: Vec<u32>,
        keys: Vec<Vec<u8>>,
        deadline: Option<f64>,
    ) -> PyResult<(Vec<&'static str>, Option<String>)> {
        check_lengths(&places, &keys)?;
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        let by = KvBlocks::until(&inside, deadline)?;
        let outside = Outside::new(device, planes, shape)?;
        py.detach(|| inside.put(&outside, &places, &keys, by)).py()
    }

    /// See `put`.
    #[pyo3(signature = (device, planes, shape, places, keys, deadline))]
    #[allow(clippy::too_many_arguments)]
    fn get(
        &self,
        py: Python<'_>,
        device: String,
        planes: Vec<(u64, u64)>,
        shape: ShapeArgs,
        places: Vec<u32>,
        keys: Vec<Vec<u8>>,
        deadline: Option<f64>,
    ) -> PyResult<(Vec<&'static str>, Option<String>)> {
        check_lengths(&places, &keys)?;
        let (inside, keys) = (self.inside()?, self::keys(&keys)?);
        let by = KvBlocks::until(&inside, deadline)?;
        let outside = Outside::new(device, planes, shape)?;
        let (got, trouble) = py.detach(|| inside.get(&outside, &places, &keys, by)).py()?;
        Ok((got.into_iter().map(Got::name).collect(), trouble))
    }

    fn close(&self, py: Python<'_>) {
        let inside = self.inner.write().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(inside));
    }
}

/// Hashes of prefixes: of each block, one of all tokens up to its end. `seed`: what they follow from besides. `extras`: of each block, what stands in
/// the place of some of its tokens; empty for none.
#[pyfunction]
#[pyo3(signature = (seed, tokens, block_tokens, extras=None))]
fn kv_chain<'py>(
    py: Python<'py>,
    seed: &[u8],
    tokens: Vec<i64>,
    block_tokens: usize,
    extras: Option<Vec<PyBackedBytes>>,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    if block_tokens == 0 {
        return Err(invalid("blocks of 0 tokens".into()));
    }
    let extras = extras.unwrap_or_default();
    let count = tokens.len() / block_tokens;
    if !extras.is_empty() && extras.len() != count {
        return Err(invalid(format!("{} extras for {count} blocks", extras.len())));
    }
    let mut above = *blake3::hash(seed).as_bytes();
    let blocks = tokens.chunks_exact(block_tokens).enumerate().map(|(index, block)| {
        let mut hasher = blake3::Hasher::new_keyed(&above);
        block.iter().for_each(|token| {
            hasher.update(&token.to_le_bytes());
        });
        // Behind tokens, whose bytes are as many in every block: nothing else can read so.
        if let Some(extra) = extras.get(index) {
            hasher.update(extra);
        }
        above = *hasher.finalize().as_bytes();
        PyBytes::new(py, &above)
    });
    Ok(blocks.collect())
}

/// The digest of bytes.
#[pyfunction]
fn kv_digest<'py>(py: Python<'py>, bytes: &[u8]) -> Bound<'py, PyBytes> {
    PyBytes::new(py, blake3::hash(bytes).as_bytes())
}

/// The digest of each range of memory, on one device. The addresses are taken on the word of `nvtier.kv`.
#[pyfunction]
fn kv_digest_memory<'py>(
    py: Python<'py>,
    device: &str,
    ranges: Vec<(u64, u64)>,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    may_use(device)?;
    let digests = py.detach(|| digests_on(device, &ranges)).py()?;
    Ok(digests.iter().map(|digest| PyBytes::new(py, digest)).collect())
}

fn digests_on(device: &str, ranges: &[(u64, u64)]) -> gpudirect::Result<Vec<[u8; 32]>> {
    if device == "cpu" {
        return Ok(memory::digests(ranges));
    }
    let lane = lanes::borrow(device, 0)?;
    let mut bytes = vec![0; lane.options().chunk];
    let mut digests = Vec::with_capacity(ranges.len());
    for (address, len) in ranges {
        let mut hasher = blake3::Hasher::new();
        let mut done = 0;
        while done < *len {
            let part = (len - done).min(bytes.len() as u64);
            lane.driver().check_range(address + done, part)?;
            lane.read_device(address + done, &mut bytes[..part as usize])?;
            hasher.update(&bytes[..part as usize]);
            done += part;
        }
        digests.push(*hasher.finalize().as_bytes());
    }
    Ok(digests)
}

/// What computing and loading cost, as measured.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct KvPlanner(Arc<Planner>);

#[pymethods]
impl KvPlanner {
    #[new]
    fn new() -> KvPlanner {
        KvPlanner(Arc::new(Planner::new()))
    }

    fn computed(&self, start: u64, end: u64, seconds: f64) {
        self.0.computed(start..end, seconds);
    }

    #[pyo3(signature = (bytes, seconds, memory=false))]
    fn loaded(&self, bytes: u64, seconds: f64, memory: bool) {
        self.0.loaded(if memory { planner::From::Memory } else { planner::From::Drive }, bytes, seconds);
    }

    fn compute_seconds(&self, start: u64, end: u64) -> Option<f64> {
        self.0.compute_seconds(start..end)
    }

    #[pyo3(signature = (bytes, memory=false))]
    fn load_seconds(&self, bytes: u64, memory: bool) -> Option<f64> {
        self.0.load_seconds(if memory { planner::From::Memory } else { planner::From::Drive }, bytes)
    }
}

/// A prefix on its way: who computes and who loads ask it what is next.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct KvRestore(planner::Restore);

fn step(step: Step) -> (&'static str, usize, usize) {
    match step {
        Step::Blocks(blocks) => ("blocks", blocks.start, blocks.end),
        Step::Wait => ("wait", 0, 0),
        Step::Done => ("done", 0, 0),
    }
}

#[pymethods]
impl KvRestore {
    #[new]
    #[pyo3(signature = (planner, memory, *, block_tokens, block_bytes, compute, load, chunk_tokens, load_blocks))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        planner: &KvPlanner,
        memory: Vec<bool>,
        block_tokens: u32,
        block_bytes: u64,
        compute: bool,
        load: bool,
        chunk_tokens: u32,
        load_blocks: usize,
    ) -> KvRestore {
        let options = RestoreOptions { block_tokens, block_bytes, compute, load, chunk_tokens, load_blocks };
        KvRestore(planner::Restore::new(planner.0.clone(), options, memory))
    }

    fn next_compute(&self, now: f64) -> (&'static str, usize, usize) {
        step(self.0.next_compute(now))
    }

    fn computed(&self, seconds: f64) {
        self.0.computed(seconds);
    }

    fn next_load(&self, now: f64) -> (&'static str, usize, usize) {
        step(self.0.next_load(now))
    }

    /// The load that began with block `first` is over.
    fn loaded(&self, first: usize, good: Vec<bool>, now: f64) {
        self.0.loaded(first, &good, now);
    }

    /// Blocks that are there, and of those loaded and computed ones.
    fn restored<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let restored = self.0.restored();
        let dict = PyDict::new(py);
        dict.set_item("blocks", restored.blocks)?;
        dict.set_item("loaded", restored.loaded)?;
        dict.set_item("computed", restored.computed)?;
        Ok(dict)
    }
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<KvStore>()?;
    module.add_class::<KvBlocks>()?;
    module.add_class::<KvPlanner>()?;
    module.add_class::<KvRestore>()?;
    module.add_function(wrap_pyfunction!(kv_chain, module)?)?;
    module.add_function(wrap_pyfunction!(kv_digest, module)?)?;
    module.add_function(wrap_pyfunction!(kv_digest_memory, module)?)
}
