//! `nvtier.load` and `nvtier.save`, below their Python faces in `nvtier/_load.py`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use engine::Session;
use engine::tensors::Dtype;
use gpudirect::{CachePolicy, Plan, PlanOptions, SaveOptions, SaveTensor, Shard, Source, Verify};
use pyo3::prelude::*;

use crate::error::{IntoPy, closed, invalid, unsupported};
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
#[pyo3(signature = (paths, *, device, filters, shard, pool, verify, cache, progress, deadline))]
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
    progress: Option<Py<PyAny>>,
    deadline: Option<f64>,
) -> PyResult<(Vec<DeviceTensor>, Bound<'py, PyAny>)> {
    let until = self::deadline(deadline)?;
    may_use(device)?;
    let policy = policy(cache)?;
    let session = session(pool.as_ref())?;
    let shard = shard.map(|(rank, world, rules)| Shard { rank, world, rules });
    let options = PlanOptions { filters, shard };
    let loaded = watched(py, progress.as_ref(), until, |control| {
        let plan = plan(&paths, session.as_deref().map(|session| &**session), verify, policy, &options)?;
        let mut lane = lanes::borrow(device, plan.device_bytes())?;
        let result = gpudirect::load(&mut lane, &plan, control);
        lane.settle(result)
    })?;
    Ok((DeviceTensor::all(loaded.tensors, device), to_dict(py, &loaded.report)?))
}

/// Name, type, shape, address, bytes.
type SaveArgs = (String, String, Vec<u64>, u64, u64);

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
    let report = watched(py, progress.as_ref(), until, |control| {
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

/// What `__dlpack__` of another library's tensor says: address, device, type (safetensors' name), shape, bytes.
#[pyfunction]
fn look_at_dlpack(capsule: &Bound<'_, PyAny>) -> PyResult<(u64, String, String, Vec<u64>, u64)> {
    let seen = memory::import(capsule)?;
    if !seen.contiguous {
        return Err(invalid(
            "the tensor is not contiguous: its elements do not lie one after the other".into(),
        ));
    }
    let device = match seen.device {
        (memory::CPU, _) | (3, _) => "cpu".to_owned(),
        (memory::CUDA, id) => format!("cuda:{id}"),
        (kind, _) => return Err(unsupported(format!("tensors on DLPack's device type {kind}"))),
    };
    const NAMES: [&str; 20] = [
        "BOOL",
        "U8",
        "I8",
        "U16",
        "I16",
        "U32",
        "I32",
        "U64",
        "I64",
        "F16",
        "BF16",
        "F32",
        "F64",
        "C64",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "F4",
    ];
    let dtype = NAMES
        .iter()
        .filter_map(|name| Dtype::from_safetensors(name))
        .find(|dtype| memory::dl_type(*dtype) == Some(seen.dtype))
        .ok_or_else(|| {
            unsupported(format!(
                "safetensors has no type for DLPack's code {} of {} bits",
                seen.dtype.0, seen.dtype.1
            ))
        })?;
    let len =
        dtype.tensor_bytes(&seen.shape).ok_or_else(|| invalid(format!("a shape of {:?}", seen.shape)))?;
    Ok((seen.address, device, dtype.name().to_owned(), seen.shape, len))
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
    module.add_function(wrap_pyfunction!(look_at_dlpack, module)?)?;
    module.add_function(wrap_pyfunction!(trim, module)?)?;
    module.add_function(wrap_pyfunction!(device_info, module)?)
}

/// For `nvtier.Pool`.
pub fn pool_closed(path: &std::path::Path) -> PyErr {
    closed(&format!("the pool {}", path.display()))
}
