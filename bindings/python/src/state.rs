//! `nvtier._nvtier.State`: units of training state between a pool and tensors, below `nvtier.train`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use engine::state::{StateOptions, StateStore};
use gpudirect::Driver;
use gpudirect::residency::{Residency, ResidencyOptions, Stage, Target, Ticket};
use nvme::{Arena, ArenaOptions};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::{IntoPy, closed, deadline_of, invalid, to_py};
use crate::memory::Foreign;
use crate::pool::Pool;
use crate::process::{Born, Mine, may_use};

/// How often signals are looked for while a ticket is waited for.
const POLL: Duration = Duration::from_millis(50);

/// Units of a state.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct State {
    inner: RwLock<Option<Arc<Mine<Residency>>>>,
    devices: Mutex<HashMap<String, Arc<dyn Driver>>>,
    // Its session, so that a pool that is closed while state is under way stays until that is over.
    _pool: Py<Pool>,
}

/// An operation on a unit, or a commit.
#[pyclass(frozen, module = "nvtier._nvtier")]
pub struct StateTicket {
    ticket: Arc<Ticket>,
    born: Born,
}

impl State {
    fn inner(&self) -> PyResult<Arc<Mine<Residency>>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner).clone();
        let inner = inner.ok_or_else(|| closed("the state"))?;
        inner.check("the state")?;
        Ok(inner)
    }

    /// The memory of a tensor that `nvtier.train` hands over, with the tensor.
    fn target(
        &self,
        residency: &Residency,
        unit: u32,
        device: &str,
        address: u64,
        after: u64,
        keep: Py<PyAny>,
    ) -> PyResult<Target> {
        may_use(device)?;
        let driver: Arc<dyn Driver> = match device {
            "cpu" => {
                let len = residency.store().units().get(unit as usize).copied().unwrap_or_default();
                Arc::new(Foreign::writable(vec![(address, len)]))
            }
            _ => {
                let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
                match devices.get(device) {
                    Some(driver) => driver.clone(),
                    None => {
                        let driver = gpudirect::driver::open(device).py()?;
                        residency.use_device(&driver).py()?;
                        devices.insert(device.to_owned(), driver.clone());
                        driver
                    }
                }
            }
        };
        Ok(Target { driver, address, after, keep: Some(Arc::new(keep)) })
    }
}

fn ticket(ticket: Arc<Ticket>) -> StateTicket {
    StateTicket { ticket, born: Born::now() }
}

#[pymethods]
impl State {
    #[new]
    #[pyo3(signature = (pool, *, name, budget, block_bytes, ram, deadline, hold=false, at=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        pool: &Bound<'_, Pool>,
        name: String,
        budget: u64,
        block_bytes: u32,
        ram: usize,
        deadline: f64,
        hold: bool,
        at: Option<u64>,
    ) -> PyResult<State> {
        let deadline = deadline_of(deadline)?;
        let session = pool.get().session()?;
        let options = StateOptions { name, budget_bytes: budget, block_bytes, deadline };
        let residency = py.detach(|| -> PyResult<Residency> {
            let moves = ResidencyOptions::default();
            let slot = (block_bytes as usize).next_multiple_of(4096);
            let bytes = moves.ring_bytes(slot) + ram;
            let arena = Arena::new(bytes, ArenaOptions::default()).map_err(|error| {
                to_py(
                    engine::Error::from(error)
                        .context(format!("take {bytes} bytes of memory for training state")),
                )
            })?;
            let store = match hold {
                true => StateStore::open_held(&session, &options, Some(&arena), at),
                false => StateStore::open(&session, &options, Some(&arena)),
            };
            let store = store.map_err(to_py)?;
            Residency::new(store, arena, moves).py()
        })?;
        Ok(State {
            inner: RwLock::new(Some(Arc::new(Mine::new(residency)))),
            devices: Mutex::default(),
            _pool: pool.clone().unbind(),
        })
    }

    /// The size of blocks and the bytes of the last commit of a state, or None.
    #[staticmethod]
    fn look<'py>(
        py: Python<'py>,
        pool: &Bound<'py, Pool>,
        name: &str,
    ) -> PyResult<Option<(u32, Bound<'py, PyBytes>)>> {
        let session = pool.get().session()?;
        let found = py.detach(|| StateStore::look(&session, name)).map_err(to_py)?;
        Ok(found.map(|(block, meta)| (block, PyBytes::new(py, &meta))))
    }

    /// Of a state that nobody has open, the number, the size of blocks and the bytes of the last commit, and of the one before where the state
    /// still has it.
    #[staticmethod]
    fn commits<'py>(
        py: Python<'py>,
        pool: &Bound<'py, Pool>,
        name: &str,
    ) -> PyResult<Vec<(u64, u32, Bound<'py, PyBytes>)>> {
        let session = pool.get().session()?;
        let found = py.detach(|| StateStore::commits(&session, name)).map_err(to_py)?;
        Ok(found
            .into_iter()
            .map(|commit| (commit.sequence, commit.block_bytes, PyBytes::new(py, &commit.meta)))
            .collect())
    }

    /// Removes a state that nobody has open, with all of its bytes. False: there is none.
    #[staticmethod]
    fn remove(py: Python<'_>, pool: &Bound<'_, Pool>, name: &str) -> PyResult<bool> {
        let session = pool.get().session()?;
        py.detach(|| StateStore::remove(&session, name)).map_err(to_py)
    }

    /// Bytes of a pool that a state needs.
    #[staticmethod]
    fn room_for(lens: Vec<u64>, extra: u64, block_bytes: u32) -> PyResult<u64> {
        if block_bytes == 0 {
            return Err(invalid("blocks of 0 bytes".into()));
        }
        Ok(StateStore::room_for(lens, extra, block_bytes))
    }

    fn units(&self) -> PyResult<Vec<u64>> {
        Ok(self.inner()?.store().units())
    }

    fn has(&self, unit: u32) -> PyResult<bool> {
        Ok(self.inner()?.store().has(unit))
    }

    fn add(&self, lens: Vec<u64>) -> PyResult<u32> {
        self.inner()?.add(&lens).py()
    }

    fn keep_in_ram(&self, unit: u32) -> PyResult<()> {
        self.inner()?.keep_in_ram(unit).py()
    }

    /// The address is taken on the word of `nvtier.train`: it is memory of `keep`, of the unit's length, which nobody else uses until the ticket
    /// is done.
    fn fetch(
        &self,
        py: Python<'_>,
        unit: u32,
        device: &str,
        address: u64,
        after: u64,
        keep: Py<PyAny>,
    ) -> PyResult<StateTicket> {
        let inner = self.inner()?;
        let target = self.target(&inner, unit, device, address, after, keep)?;
        py.detach(|| inner.fetch(unit, target)).map(ticket).py()
    }

    /// As `fetch`, the other way.
    #[pyo3(signature = (unit, device, address, after, keep, write))]
    #[allow(clippy::too_many_arguments)]
    fn store(
        &self,
        py: Python<'_>,
        unit: u32,
        device: &str,
        address: u64,
        after: u64,
        keep: Py<PyAny>,
        write: bool,
    ) -> PyResult<StateTicket> {
        let inner = self.inner()?;
        let target = self.target(&inner, unit, device, address, after, keep)?;
        py.detach(|| inner.store_unit(unit, target, write)).map(ticket).py()
    }

    fn commit(&self, py: Python<'_>, meta: Vec<u8>) -> PyResult<StateTicket> {
        let inner = self.inner()?;
        Ok(ticket(py.detach(|| inner.commit(meta))))
    }

    /// With `hold`: all states that are committed together have made the last commit; the one before goes.
    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner()?;
        py.detach(|| inner.store().settle()).map_err(to_py)
    }

    fn moved<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let moved = self.inner()?.moved();
        let dict = PyDict::new(py);
        dict.set_item("fetched_bytes", moved.fetched_bytes)?;
        dict.set_item("ram_bytes", moved.ram_bytes)?;
        dict.set_item("stored_bytes", moved.stored_bytes)?;
        dict.set_item("drive_read_bytes", moved.drive.read_bytes)?;
        dict.set_item("drive_written_bytes", moved.drive.written_bytes)?;
        dict.set_item("commits", moved.drive.sequence)?;
        Ok(dict)
    }

    /// Ends what is under way; what was not committed is lost. Once more is fine.
    fn close(&self, py: Python<'_>) {
        let inner = self.inner.write().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(inner));
    }
}

#[pymethods]
impl StateTicket {
    /// Waits until the operation is done, or with `copied` until its tensor is free again. Ctrl-C ends the waiting, not the operation.
    #[pyo3(signature = (copied=false))]
    fn wait(&self, py: Python<'_>, copied: bool) -> PyResult<()> {
        self.born.check("an operation on state")?;
        let stage = if copied { Stage::Copied } else { Stage::Done };
        while !py.detach(|| self.ticket.wait(stage, POLL)).py()? {
            py.check_signals()?;
        }
        Ok(())
    }

    /// Whether it is done, or with `copied` whether its tensor is free again; raises what it failed with.
    #[pyo3(signature = (copied=false))]
    fn is_done(&self, copied: bool) -> PyResult<bool> {
        self.born.check("an operation on state")?;
        let stage = if copied { Stage::Copied } else { Stage::Done };
        self.ticket.wait(stage, Duration::ZERO).py()
    }
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<State>()?;
    module.add_class::<StateTicket>()
}
