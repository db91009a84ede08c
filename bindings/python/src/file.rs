//! `TensorFile`: open tensor files whose tensors are loaded when they are asked for. `nvtier.torch.safe_open` is made of it.
//!
//! Frameworks ask for one tensor after the other, and a load of one small tensor costs as much as a load of many. So a tensor that
//! is asked for in the order of the file brings those after it along, up to a growing window; out of order nothing is.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::Session;
use engine::tensors::TensorInfo;
use gpudirect::plan::Part;
use gpudirect::{
    Control, ErrorKind, LoadedTensor, PathChoice, PathOptions, Paths, Plan, PlanOptions, Priority, Report,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{IntoPy, no_tensor};
use crate::lanes;
use crate::load::{plan, policy, session};
use crate::memory::Hold;
use crate::pool::{Pool, Tensor, to_dict};
use crate::process::{Mine, may_use};
use crate::tensor::DeviceTensor;
use crate::tiers::Tiers;
use crate::watch::watched;

/// Bytes that the first tensor in order brings along.
const FIRST: u64 = 64 << 20;
/// The most that is loaded ahead and not asked for yet.
const MOST: u64 = 512 << 20;
/// Threads of a framework ask for neighbours in almost the order of the file.
const NEAR: usize = 8;

/// One or several open files.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct TensorFile(Mine<Inner>);

struct Inner {
    plan: Plan,
    by_name: HashMap<String, usize>,
    state: Mutex<State>,
    // After the plan: its sources need it.
    session: Option<Arc<Mine<Session>>>,
    tiers: Option<Arc<Tiers>>,
}

#[derive(Default)]
struct State {
    device: String,
    ready: HashMap<usize, (LoadedTensor, Arc<Hold>)>,
    /// Bytes in `ready`.
    waiting: u64,
    given: Vec<bool>,
    last: Option<usize>,
    window: u64,
    loads: u64,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self, name: &str) -> PyResult<usize> {
        self.by_name.get(name).copied().ok_or_else(|| {
            let files: Vec<&str> = self.plan.sources().iter().map(|source| source.name()).collect();
            no_tensor(format!("there is no tensor {name:?} in {}", files.join(", ")))
        })
    }

    fn load(
        &self,
        parts: &[Part],
        device: &str,
        control: &mut Control<'_>,
    ) -> gpudirect::Result<gpudirect::Loaded> {
        let plan = self.plan.part(parts)?;
        let mut lane = lanes::borrow(device, plan.device_bytes())?;
        let lent = match (&self.session, &self.tiers) {
            (Some(session), Some(tiers)) => tiers.lend(session, &plan, &mut lane, device),
            _ => None,
        };
        // For a little the choice of a way costs more than the way.
        let choice = if plan.device_bytes() > lanes::SMALL { PathChoice::Auto } else { PathChoice::Bounce };
        let options = PathOptions { choice, ..PathOptions::default() };
        let result = gpudirect::load_by(&mut lane, &plan, &Paths::here(), &options, control);
        let mut loaded = lane.settle(result)?;
        loaded.report.notes.extend(lent);
        Ok(loaded)
    }

    /// A tensor, and its share of its load.
    fn get(
        &self,
        part: Part,
        device: &str,
        control: &mut Control<'_>,
    ) -> gpudirect::Result<(LoadedTensor, Arc<Hold>)> {
        let index = part.index;
        let mut state = self.state();
        let state = &mut *state;
        if state.device != device {
            *state = State { device: device.to_owned(), ..State::default() };
            state.given = vec![false; self.plan.tensors().len()];
        }
        if part.cut.is_none()
            && let Some(ready) = state.ready.remove(&index)
        {
            state.waiting -= ready.0.len;
            state.last = Some(index);
            return Ok(ready);
        }
        let mut parts = vec![part];
        if parts[0].cut.is_none() {
            state.given[index] = true;
            let in_order = state.last.is_some_and(|last| index > last && index - last <= NEAR);
            state.window = if in_order { (state.window * 2).clamp(FIRST, MOST) } else { 0 };
            state.last = Some(index);
            let mut bytes = self.plan.tensors()[index].len;
            for next in index + 1..self.plan.tensors().len() {
                let len = self.plan.tensors()[next].len;
                if bytes + len > state.window || state.waiting + bytes + len > MOST || state.given[next] {
                    break;
                }
                bytes += len;
                parts.push(Part { index: next, cut: None });
            }
        }
        let mut loaded = self.load(&parts, device, control);
        if parts.len() > 1 && loaded.as_ref().is_err_and(|error| error.kind() == ErrorKind::OutOfDeviceMemory)
        {
            parts.truncate(1);
            state.window = 0;
            loaded = self.load(&parts, device, control);
        }
        state.loads += 1;
        let mut tensors = loaded?.tensors.into_iter();
        let Some(first) = tensors.next() else {
            return Err(gpudirect::Error::new(ErrorKind::NotFound, "a load of a tensor gave none"));
        };
        let hold = Arc::new(Hold::new(first.memory().clone(), device));
        for (part, tensor) in parts[1..].iter().zip(tensors) {
            state.given[part.index] = true;
            state.waiting += tensor.len;
            state.ready.insert(part.index, (tensor, hold.clone()));
        }
        Ok((first, hold))
    }
}

impl TensorFile {
    fn inner(&self) -> PyResult<&Inner> {
        self.0.check("the open tensor file")?;
        Ok(&self.0)
    }
}

#[pymethods]
impl TensorFile {
    #[new]
    #[pyo3(signature = (paths, *, pool=None, verify=true, cache="auto"))]
    fn new(
        py: Python<'_>,
        paths: Vec<PathBuf>,
        pool: Option<Bound<'_, Pool>>,
        verify: bool,
        cache: &str,
    ) -> PyResult<TensorFile> {
        let session = session(pool.as_ref())?;
        let policy = policy(cache)?;
        let plan = py
            .detach(|| {
                let session = session.as_deref().map(|session| &**session);
                plan(&paths, session, verify, policy, &PlanOptions::default())
            })
            .py()?;
        let by_name = plan.tensors().iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let state = Mutex::new(State::default());
        let tiers = pool.map(|pool| pool.get().tiers());
        Ok(TensorFile(Mine::new(Inner { plan, by_name, state, session, tiers })))
    }

    /// Names in the order of their data.
    fn keys(&self) -> PyResult<Vec<String>> {
        Ok(self.inner()?.plan.tensors().iter().map(|tensor| tensor.name.clone()).collect())
    }

    /// Of all files; the first one's where several have a key.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for metadata in self.inner()?.plan.metadata().iter().rev() {
            for (key, value) in metadata {
                dict.set_item(key, value)?;
            }
        }
        Ok(dict)
    }

    fn info(&self, name: &str) -> PyResult<Tensor> {
        let inner = self.inner()?;
        let tensor = &inner.plan.tensors()[inner.index(name)?];
        let start = tensor.ranges().next().map_or(0, |(start, _)| start);
        Ok(Tensor(TensorInfo {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (start, start + tensor.len),
        }))
    }

    /// A tensor, or `cut`: (dimension, first, end) of it.
    #[pyo3(signature = (name, device, cut=None))]
    fn get(
        &self,
        py: Python<'_>,
        name: &str,
        device: &str,
        cut: Option<(usize, u64, u64)>,
    ) -> PyResult<DeviceTensor> {
        let inner = self.inner()?;
        may_use(device)?;
        let part = Part { index: inner.index(name)?, cut: cut.map(|(dim, start, end)| (dim, start..end)) };
        let (tensor, hold) =
            watched(py, None, None, Priority::Foreground, |control| inner.get(part, device, control))?;
        Ok(DeviceTensor::new(tensor, device, hold))
    }

    /// All tensors in one load, and its report.
    #[pyo3(signature = (device))]
    fn get_all<'py>(
        &self,
        py: Python<'py>,
        device: &str,
    ) -> PyResult<(Vec<DeviceTensor>, Bound<'py, PyAny>)> {
        let inner = self.inner()?;
        may_use(device)?;
        let parts: Vec<Part> =
            (0..inner.plan.tensors().len()).map(|index| Part { index, cut: None }).collect();
        let loaded =
            watched(py, None, None, Priority::Foreground, |control| inner.load(&parts, device, control))?;
        let report: &Report = &loaded.report;
        let report = to_dict(py, report)?;
        Ok((DeviceTensor::all(loaded.tensors, device), report))
    }

    /// Loads that `get` made, and bytes loaded ahead that nobody asked for yet.
    fn ahead(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        let inner = self.inner()?;
        Ok(py.detach(|| {
            let state = inner.state();
            (state.loads, state.waiting)
        }))
    }

    /// Gives back what was loaded ahead.
    fn forget(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner()?;
        py.detach(|| *inner.state() = State::default());
        Ok(())
    }
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<TensorFile>()
}
