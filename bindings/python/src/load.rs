//! `nvtier.load` and `nvtier.save`, below their Python faces in `nvtier/_load.py`.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use engine::Session;
use engine::tensors::Dtype;
use gpudirect::autotune::{Given, Tune, Tuner};
use gpudirect::plan::Part;
use gpudirect::{
    CachePolicy, CachedMode, LaneOptions, Loaded, PathChoice, PathOptions, Paths, Plan, PlanOptions,
    Priority, SaveOptions, SaveTensor, Shard, Source, Verify,
};
use pyo3::prelude::*;

use crate::error::{IntoPy, closed, invalid, no_tensor, unsupported};
use crate::interface::is_type;
use crate::lanes;
use crate::memory::{self, Foreign};
use crate::pool::{Pool, to_dict};
use crate::process::{Mine, may_use};
use crate::tensor::{DeviceTensor, dl_device};
use crate::watch::{deadline, watched};

/// How sources are opened.
pub fn policy(name: &str) -> PyResult<CachePolicy> {
    match name {
        "auto" => Ok(CachePolicy::Auto),
        "direct" => Ok(CachePolicy::Direct),
        "buffered" => Ok(CachePolicy::Buffered),
        _ => Err(invalid(format!("cache={name:?}: write \"auto\", \"direct\" or \"buffered\""))),
    }
}

/// Which way bytes go.
fn choice(name: &str) -> PyResult<PathChoice> {
    match name {
        "auto" => Ok(PathChoice::Auto),
        "bounce" => Ok(PathChoice::Bounce),
        "cufile" => Ok(PathChoice::CuFile),
        _ => Err(invalid(format!("path={name:?}: write \"auto\", \"bounce\" or \"cufile\""))),
    }
}

/// How files are read that are in memory already.
fn cached_mode(name: &str) -> PyResult<CachedMode> {
    match name {
        "auto" => Ok(CachedMode::Auto),
        "map" => Ok(CachedMode::Map),
        "copy" => Ok(CachedMode::Copy),
        _ => Err(invalid(format!("cached={name:?}: write \"auto\", \"map\" or \"copy\""))),
    }
}

/// Opens sources and reads their headers.
pub fn plan(
    paths: &[PathBuf],
    session: Option<&Session>,
    verify: bool,
    policy: CachePolicy,
    options: &PlanOptions,
) -> gpudirect::Result<Plan> {
    let verify = if verify { Verify::Always } else { Verify::Never };
    let sources = paths.iter().map(|path| match session {
        Some(session) => Source::region(session, path.to_string_lossy().trim_matches('/'), verify),
        None => Source::file(path, policy),
    });
    Plan::new(sources.collect::<gpudirect::Result<_>>()?, options)
}

/// The session of a pool object.
pub fn session(pool: Option<&Bound<'_, Pool>>) -> PyResult<Option<Arc<Mine<Session>>>> {
    pool.map(|pool| pool.get().session()).transpose()
}

/// `rank, world, [(pattern, dimension)]`.
type ShardArgs = (u32, u32, Vec<(String, usize)>);

#[pyfunction]
#[pyo3(signature = (paths, *, device, filters, shard, pool, verify, cache, path, cached, progress, deadline, priority, out))]
#[allow(clippy::too_many_arguments)] // keyword arguments of one private function
fn load<'py>(
    py: Python<'py>,
    paths: Vec<PathBuf>,
    device: &str,
    filters: Vec<String>,
    shard: Option<ShardArgs>,
    pool: Option<Bound<'py, Pool>>,
    verify: bool,
    cache: &str,
    path: &str,
    cached: &str,
    progress: Option<Py<PyAny>>,
    deadline: Option<f64>,
    priority: &str,
    out: Option<Vec<SaveArgs>>,
) -> PyResult<(Vec<DeviceTensor>, Bound<'py, PyAny>)> {
    let until = self::deadline(deadline)?;
    let priority = self::priority(priority)?;
    may_use(device)?;
    let policy = policy(cache)?;
    let (way, cached) =
        (PathOptions { choice: choice(path)?, ..PathOptions::default() }, cached_mode(cached)?);
    let session = session(pool.as_ref())?;
    let shard = shard.map(|(rank, world, rules)| Shard { rank, world, rules });
    let options = PlanOptions { filters, shard };
    let tiers = pool.as_ref().map(|pool| pool.get().tiers());
    let loaded = watched(py, progress.as_ref(), until, priority, |control| {
        let plan = plan(&paths, session.as_deref().map(|session| &**session), verify, policy, &options)?;
        let (plan, places) = match &out {
            None => (plan, None),
            Some(out) => match chosen(&plan, out)? {
                Ok((plan, places)) => (plan, Some(places)),
                Err(missing) => return Ok(Err(missing)),
            },
        };
        if let (Some(places), Some(out), memory::CPU) = (&places, &out, dl_device(device).0) {
            let ranges = out.iter().map(|(.., address, len)| (*address, *len)).collect();
            let mut lane = lanes::own(Arc::new(Foreign::writable(ranges)), plan.device_bytes())?;
            let report = gpudirect::load_into(&mut lane, &plan, places, &Paths::here(), &way, control)?;
            return Ok(Ok(Loaded { tensors: Vec::new(), report }));
        }
        let mut lane = lanes::borrow(device, plan.device_bytes())?;
        let lent = match (&session, &tiers) {
            (Some(session), Some(tiers)) => tiers.lend(session, &plan, &mut lane, device),
            _ => None,
        };
        let settings = LaneOptions { cached, ..lane.options().clone() };
        lane.adjust(settings)?;
        let mut note = None;
        if plan.device_bytes() > lanes::SMALL {
            // What `nvtier load` found out on this machine; a library does not stop to measure.
            note = Tuner::here().settle(&mut lane, plan.sources(), Given::default(), Tune::Never, control)?;
        }
        let result = match &places {
            None => gpudirect::load_by(&mut lane, &plan, &Paths::here(), &way, control),
            Some(places) => gpudirect::load_into(&mut lane, &plan, places, &Paths::here(), &way, control)
                .map(|report| Loaded { tensors: Vec::new(), report }),
        };
        let mut loaded = lane.settle(result)?;
        loaded.report.notes.extend(note.into_iter().chain(lent));
        Ok(Ok(loaded))
    })?;
    let loaded = loaded.map_err(no_tensor)?;
    Ok((DeviceTensor::all(loaded.tensors, device), to_dict(py, &loaded.report)?))
}

/// Name, type, shape, address, bytes.
type SaveArgs = (String, String, Vec<u64>, u64, u64);

/// The tensors of a plan that go to memory that is there, and where each goes; or why one is not in the files.
fn chosen(plan: &Plan, out: &[SaveArgs]) -> gpudirect::Result<Result<(Plan, Vec<u64>), String>> {
    let refuse = |context: String| gpudirect::Error::new(gpudirect::ErrorKind::Invalid, context);
    let by_name: HashMap<&str, usize> =
        plan.tensors().iter().enumerate().map(|(index, tensor)| (tensor.name.as_str(), index)).collect();
    let mut parts = Vec::with_capacity(out.len());
    for (name, dtype, shape, _, len) in out {
        let Some(index) = by_name.get(name.as_str()) else {
            let files: Vec<&str> = plan.sources().iter().map(Source::name).collect();
            return Ok(Err(format!("there is no tensor {name:?} in {}", files.join(", "))));
        };
        let tensor = &plan.tensors()[*index];
        if tensor.shape != *shape || tensor.len != *len || !is_type(tensor.dtype, dtype) {
            return Err(refuse(format!(
                "load tensor {name:?}, {} of shape {:?}, into one of {dtype} and shape {shape:?}: they must be alike",
                tensor.dtype.name(),
                tensor.shape
            )));
        }
        parts.push(Part { index: *index, cut: None });
    }
    let mut ranges: Vec<_> =
        out.iter().filter(|(.., len)| *len > 0).map(|(name, _, _, at, len)| (*at, *len, name)).collect();
    ranges.sort_unstable();
    if let Some(pair) = ranges.windows(2).find(|pair| pair[0].0.saturating_add(pair[0].1) > pair[1].0) {
        return Err(refuse(format!("load tensors {:?} and {:?} into the same memory", pair[0].2, pair[1].2)));
    }
    let plan = plan.part(&parts)?;
    let places: HashMap<&str, u64> =
        out.iter().map(|(name, .., address, _)| (name.as_str(), *address)).collect();
    let places = plan.tensors().iter().map(|tensor| places[tensor.name.as_str()]).collect();
    Ok(Ok((plan, places)))
}

/// Which loads of this process go first.
fn priority(name: &str) -> PyResult<Priority> {
    match name {
        "foreground" => Ok(Priority::Foreground),
        "background" => Ok(Priority::Background),
        _ => Err(invalid(format!("priority={name:?}: write \"foreground\" or \"background\""))),
    }
}

#[pyfunction]
#[pyo3(signature = (path, tensors, *, metadata, device, progress, deadline))]
fn save<'py>(
    py: Python<'py>,
    path: PathBuf,
    tensors: Vec<SaveArgs>,
    metadata: Option<BTreeMap<String, String>>,
    device: &str,
    progress: Option<Py<PyAny>>,
    deadline: Option<f64>,
) -> PyResult<Bound<'py, PyAny>> {
    let until = self::deadline(deadline)?;
    may_use(device)?;
    let mut list = Vec::with_capacity(tensors.len());
    for (name, dtype, shape, address, len) in tensors {
        let Some(dtype) = Dtype::from_safetensors(&dtype) else {
            return Err(unsupported(format!("save tensor {name:?}: safetensors has no type {dtype:?}")));
        };
        list.push(SaveTensor { name, dtype, shape, address, len });
    }
    let total = list.iter().map(|tensor| tensor.len).sum();
    let options = SaveOptions { metadata: metadata.unwrap_or_default() };
    let report = watched(py, progress.as_ref(), until, Priority::Foreground, |control| {
        if dl_device(device).0 == memory::CPU {
            let ranges = list.iter().map(|tensor| (tensor.address, tensor.len)).collect();
            let mut lane = lanes::own(Arc::new(Foreign::new(ranges)), total)?;
            return gpudirect::save(&mut lane, &path, &list, &options, control);
        }
        let mut lane = lanes::borrow(device, total)?;
        let result = gpudirect::save(&mut lane, &path, &list, &options, control);
        lane.settle(result)
    })?;
    to_dict(py, &report)
}

/// Gives back the rings that are kept for the next load.
#[pyfunction]
fn trim(py: Python<'_>) {
    py.detach(|| memory::aside(lanes::trim));
}

/// What a device is, and how much of its memory is free.
#[pyfunction]
fn device_info<'py>(py: Python<'py>, device: &str) -> PyResult<Bound<'py, PyAny>> {
    may_use(device)?;
    let info = py.detach(|| gpudirect::driver::open(device).and_then(|driver| driver.info())).py()?;
    to_dict(py, &info)
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<DeviceTensor>()?;
    module.add_function(wrap_pyfunction!(load, module)?)?;
    module.add_function(wrap_pyfunction!(save, module)?)?;
    module.add_function(wrap_pyfunction!(trim, module)?)?;
    module.add_function(wrap_pyfunction!(device_info, module)?)
}

/// For `nvtier.Pool`.
pub fn pool_closed(path: &std::path::Path) -> PyErr {
    closed(&format!("the pool {}", path.display()))
}
