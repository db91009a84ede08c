//! `nvtier.Region`: one generation of a region's content, held in place.

use std::sync::{Arc, PoisonError, RwLock};

use engine::{Lease, RegionReader, Session};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use crate::error::{IntoPy, closed};
use crate::pool::{Pool, read_bytes, tensors_of};
use crate::process::Mine;

/// An open region. Until it is closed its bytes stay where and what they are, whatever is written to or done with its name.
#[pyclass(frozen, module = "nvtier")]
pub struct Region {
    pool: Py<Pool>,
    name: String,
    size: u64,
    generation: u64,
    held: RwLock<Option<Arc<Mine<Held>>>>,
}

// In this order: what reads goes before the session.
struct Held {
    lease: Option<Lease>,
    reader: RegionReader,
    session: Arc<Mine<Session>>,
}

impl Region {
    /// Opens the region of that name.
    pub fn open(py: Python<'_>, pool: &Bound<'_, Pool>, name: &str) -> PyResult<Region> {
        let session = pool.get().session()?;
        let (held, size, generation) = py
            .detach(|| {
                let reader = session.reader(name)?;
                let entry = session.stat_path(name)?;
                let lease = match session.pool().map(|pool| pool.lease(entry.node, 0, u64::MAX)) {
                    Some(Ok(lease)) => Some(lease),
                    // Being written: its reader still reads what there is.
                    Some(Err(error)) if error.kind() == engine::ErrorKind::Busy => None,
                    Some(Err(error)) => return Err(error),
                    None => None,
                };
                let generation = lease.as_ref().map_or(entry.generation, Lease::generation);
                let size = lease.as_ref().map_or_else(|| reader.len(), Lease::size);
                Ok((Held { lease, reader, session: session.clone() }, size, generation))
            })
            .py()?;
        Ok(Region {
            pool: pool.clone().unbind(),
            name: name.trim_matches('/').to_owned(),
            size,
            generation,
            held: RwLock::new(Some(Arc::new(Mine::new(held)))),
        })
    }

    fn held(&self) -> PyResult<Arc<Mine<Held>>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner).clone();
        let held = held.ok_or_else(|| closed(&format!("the region {:?}", self.name)))?;
        held.check(&format!("the region {:?}", self.name))?;
        Ok(held)
    }
}

#[pymethods]
impl Region {
    #[getter]
    fn pool(&self, py: Python<'_>) -> Py<Pool> {
        self.pool.clone_ref(py)
    }
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }
    #[getter]
    fn size(&self) -> u64 {
        self.size
    }
    #[getter]
    fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether extents are leased here. In another process than the owner, the owner holds them for the open reader.
    #[getter]
    fn is_leased(&self) -> PyResult<bool> {
        Ok(self.held()?.lease.is_some())
    }

    #[getter]
    fn closed(&self) -> bool {
        self.held.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let held = self.held()?;
        let index = py.detach(|| {
            let reader = &held.reader;
            engine::tensors::parse(&self.name, reader.len(), &mut |at, out| reader.read_exact_at(at, out))
        });
        tensors_of(py, &self.name, index.py()?)
    }

    #[pyo3(signature = (offset=0, length=None))]
    fn read<'py>(&self, py: Python<'py>, offset: u64, length: Option<u64>) -> PyResult<Bound<'py, PyBytes>> {
        let held = self.held()?;
        read_bytes(py, &held.reader, offset, length)
    }

    /// As `nvtier.load`, of this region. `Changed` when its name has other content by now.
    #[pyo3(signature = (**options))]
    fn load<'py>(
        &self,
        py: Python<'py>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let held = self.held()?;
        let same = || -> PyResult<()> {
            let entry = py.detach(|| held.session.stat_path(&self.name)).py()?;
            if entry.generation == self.generation {
                return Ok(());
            }
            let context = format!("load {:?}: its name has another generation of content by now", self.name);
            Err(crate::error::load_to_py(gpudirect::Error::new(gpudirect::ErrorKind::Changed, context)))
        };
        same()?;
        let loaded =
            self.pool.bind(py).get().load_by_name(py, self.pool.bind(py), self.name.as_str(), options)?;
        same()?;
        Ok(loaded)
    }

    /// Lets go of the content.
    fn close(&self, py: Python<'_>) {
        let held = self.held.write().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(held));
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) -> bool {
        self.close(py);
        false
    }

    fn __repr__(&self) -> String {
        format!("Region(name={:?}, size={}, generation={})", self.name, self.size, self.generation)
    }
}
