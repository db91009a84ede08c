//! `nvtier.Pool` and what it returns.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use engine::tensors::{TensorIndex, TensorInfo};
use engine::{ErrorKind, FormatOptions, NodeKind, RegionReader, Session, SessionOptions, WriterOptions};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use crate::error::{IntoPy, to_py};
use crate::load::pool_closed;
use crate::process::Mine;
use crate::region::Region;
use crate::tiers::Tiers;

/// Bytes that are moved between looks at pending signals: Ctrl-C works within a fraction of a second.
const STEP: usize = 8 << 20;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Pool>()?;
    module.add_class::<Entry>()?;
    module.add_class::<Tensor>()?;
    module.add_class::<Region>()?;
    module.add_function(wrap_pyfunction!(format, module)?)
}

/// Makes a pool.
#[pyfunction]
#[pyo3(signature = (path, *, size=None, members=Vec::new(), force=false, raw=false))]
fn format<'py>(
    py: Python<'py>,
    path: PathBuf,
    size: Option<u64>,
    members: Vec<PathBuf>,
    force: bool,
    raw: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let options = FormatOptions { size, members, force, raw, ..FormatOptions::default() };
    let info = py.detach(|| engine::Pool::format(&path, &options)).py()?;
    to_dict(py, &info)
}

/// Through JSON: these are small, and the names stay those of `nvtier --json`.
pub fn to_dict<'py>(py: Python<'py>, value: &impl serde::Serialize) -> PyResult<Bound<'py, PyAny>> {
    let text =
        serde_json::to_string(value).map_err(|e| pyo3::exceptions::PyRuntimeError::new_err(e.to_string()))?;
    py.import("json")?.getattr("loads")?.call1((text,))
}

/// A node of a pool.
#[pyclass(frozen, module = "nvtier")]
struct Entry(engine::Entry);

#[pymethods]
impl Entry {
    #[getter]
    fn path(&self) -> &str {
        &self.0.path
    }
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0.kind {
            NodeKind::Directory => "directory",
            NodeKind::Region => "region",
            NodeKind::Symlink => "symlink",
            NodeKind::Fifo => "fifo",
            NodeKind::Socket => "socket",
            NodeKind::CharDevice => "char_device",
            NodeKind::BlockDevice => "block_device",
        }
    }
    #[getter]
    fn size(&self) -> u64 {
        self.0.size
    }
    #[getter]
    fn allocated(&self) -> u64 {
        self.0.allocated
    }
    #[getter]
    fn mode(&self) -> u32 {
        self.0.mode
    }
    #[getter]
    fn uid(&self) -> u32 {
        self.0.uid
    }
    #[getter]
    fn gid(&self) -> u32 {
        self.0.gid
    }
    #[getter]
    fn mtime(&self) -> f64 {
        self.0.mtime as f64 + f64::from(self.0.mtime_nanos) * 1e-9
    }
    #[getter]
    fn generation(&self) -> u64 {
        self.0.generation
    }
    #[getter]
    fn target(&self) -> Option<&str> {
        self.0.target.as_deref()
    }
    fn __repr__(&self) -> String {
        format!("Entry(path={:?}, kind={:?}, size={})", self.0.path, self.kind(), self.0.size)
    }
}

/// A named slice of a region.
#[pyclass(frozen, module = "nvtier")]
pub struct Tensor(pub TensorInfo);

#[pymethods]
impl Tensor {
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }
    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype.name()
    }
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.shape)
    }
    #[getter]
    fn data_offsets(&self) -> (u64, u64) {
        self.0.data_offsets
    }
    #[getter]
    fn nbytes(&self) -> u64 {
        self.0.len()
    }
    fn __repr__(&self) -> String {
        let Tensor(info) = self;
        format!("Tensor(name={:?}, dtype={:?}, shape={:?})", info.name, info.dtype.name(), info.shape)
    }
}

/// An open pool.
#[pyclass(frozen, module = "nvtier")]
pub struct Pool {
    path: PathBuf,
    session: RwLock<Option<Arc<Mine<Session>>>>,
    tiers: Arc<Tiers>,
}

impl Pool {
    /// Its RAM tier, for loads.
    pub fn tiers(&self) -> Arc<Tiers> {
        self.tiers.clone()
    }

    /// The open session. The lock is held for a moment, with the interpreter: at a fork nobody holds it.
    pub fn session(&self) -> PyResult<Arc<Mine<Session>>> {
        let session = self.session.read().unwrap_or_else(PoisonError::into_inner).clone();
        let session = session.ok_or_else(|| pool_closed(&self.path))?;
        session.check(&format!("the pool {}", self.path.display()))?;
        Ok(session)
    }

    /// `nvtier.load` of a region, or of several.
    pub fn load_by_name<'py>(
        &self,
        py: Python<'py>,
        this: &Bound<'py, Pool>,
        names: impl IntoPyObject<'py>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let options = match options {
            Some(options) => options.copy()?,
            None => PyDict::new(py),
        };
        options.set_item("pool", this)?;
        py.import("nvtier._load")?.getattr("load")?.call((names,), Some(&options))
    }

    fn call<T: Send>(
        &self,
        py: Python<'_>,
        run: impl FnOnce(&Session) -> engine::Result<T> + Send,
    ) -> PyResult<T> {
        let session = self.session()?;
        py.detach(|| run(&session)).py()
    }
}

#[pymethods]
impl Pool {
    #[new]
    #[pyo3(signature = (path, *, read_only=false, ram=None, wait=5.0))]
    fn new(py: Python<'_>, path: PathBuf, read_only: bool, ram: Option<u64>, wait: f64) -> PyResult<Pool> {
        let wait = Duration::try_from_secs_f64(wait)
            .map_err(|e| pyo3::exceptions::PyValueError::new_err(format!("wait={wait}: {e}")))?;
        let defaults = SessionOptions::default();
        let options =
            SessionOptions { read_only, ram_bytes: ram.unwrap_or(defaults.ram_bytes), serve: true, wait };
        let session = py.detach(|| Session::open(&path, options)).py()?;
        Ok(Pool { path, session: RwLock::new(Some(Arc::new(Mine::new(session)))), tiers: Arc::default() })
    }

    #[getter]
    fn path(&self) -> &Path {
        &self.path
    }

    #[getter]
    fn is_remote(&self) -> PyResult<bool> {
        Ok(self.session()?.is_remote())
    }

    #[getter]
    fn owner_pid(&self) -> PyResult<u32> {
        Ok(self.session()?.owner_pid())
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let info = self.call(py, |s| s.info())?;
        to_dict(py, &info)
    }

    fn stat<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stat = self.call(py, |s| s.stat())?;
        to_dict(py, &stat)
    }

    #[pyo3(signature = (path="", recursive=false))]
    fn ls(&self, py: Python<'_>, path: &str, recursive: bool) -> PyResult<Vec<Entry>> {
        let entries = self.call(py, |s| s.list(path, recursive))?;
        Ok(entries.into_iter().map(Entry).collect())
    }

    fn stat_path(&self, py: Python<'_>, path: &str) -> PyResult<Entry> {
        self.call(py, |s| s.stat_path(path)).map(Entry)
    }

    fn exists(&self, py: Python<'_>, path: &str) -> PyResult<bool> {
        self.call(py, |s| match s.stat_path(path) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotDirectory) => Ok(false),
            Err(error) => Err(error),
        })
    }

    fn mkdirs(&self, py: Python<'_>, path: &str) -> PyResult<()> {
        self.call(py, |s| s.mkdirs(path))
    }

    #[pyo3(signature = (path, recursive=false))]
    fn rm(&self, py: Python<'_>, path: &str, recursive: bool) -> PyResult<()> {
        self.call(py, |s| s.remove(path, recursive))
    }

    fn rename(&self, py: Python<'_>, source: &str, target: &str) -> PyResult<()> {
        self.call(py, |s| s.rename(source, target))
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |s| s.sync())
    }

    #[pyo3(signature = (src, name, *, resume=false))]
    fn import_file(&self, py: Python<'_>, src: PathBuf, name: &str, resume: bool) -> PyResult<Entry> {
        let io = |what: &str, error: std::io::Error| {
            to_py(engine::Error::io(format!("import {}: {what}", src.display()), error))
        };
        let mut file = File::open(&src).map_err(|e| io("open", e))?;
        let metadata = file.metadata().map_err(|e| io("stat", e))?;
        if !metadata.is_file() {
            return Err(to_py(engine::Error::new(
                ErrorKind::InvalidArgument,
                format!("{} is no file", src.display()),
            )));
        }
        // Which file it was: another size or time is another file, and nothing is kept of the old one.
        let key = format!("{}:{:?}", metadata.len(), metadata.modified().ok());
        let options = WriterOptions {
            resume,
            resume_key: if resume { key } else { String::new() },
            ..Default::default()
        };
        let session = self.session()?;
        let mut writer = py.detach(|| session.writer(name, Some(metadata.len()), options)).py()?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(writer.resume_offset()))
            .map_err(|e| io("seek", e))?;
        let mut buffer = vec![0; STEP.min(metadata.len() as usize + 1)];
        loop {
            py.check_signals()?;
            let read = py.detach(|| file.read(&mut buffer)).map_err(|e| io("read", e))?;
            if read == 0 {
                break;
            }
            py.detach(|| writer.write_all(&buffer[..read])).py()?;
        }
        py.detach(|| writer.commit()).py().map(Entry)
    }

    fn write(&self, py: Python<'_>, name: &str, data: &[u8]) -> PyResult<Entry> {
        let entry = self.call(py, |s| {
            let mut writer = s.writer(name, Some(data.len() as u64), WriterOptions::default())?;
            writer.write_all(data)?;
            writer.commit()
        })?;
        Ok(Entry(entry))
    }

    fn export_file(&self, py: Python<'_>, name: &str, dest: PathBuf) -> PyResult<u64> {
        let reader = self.call(py, |s| s.reader(name))?;
        let io = |what: &str, error: std::io::Error| {
            to_py(engine::Error::io(format!("export to {}: {what}", dest.display()), error))
        };
        // Beside the target, so that the last step is a rename: the target is the old file or the whole new one.
        let mut beside = dest.clone().into_os_string();
        beside.push(format!(".nvtier-{}", std::process::id()));
        let beside = Scratch(Some(PathBuf::from(beside)));
        let path = beside.0.as_deref().unwrap_or(&dest);
        let mut file = File::create(path).map_err(|e| io("create", e))?;
        let mut buffer = vec![0; STEP];
        let mut done = 0;
        loop {
            py.check_signals()?;
            let read = py.detach(|| reader.read_at(done, &mut buffer)).py()?;
            if read == 0 {
                break;
            }
            py.detach(|| file.write_all(&buffer[..read])).map_err(|e| io("write", e))?;
            done += read as u64;
        }
        if done != reader.len() {
            let context =
                format!("export {name}: {done} of {} bytes could be read; it changes", reader.len());
            return Err(to_py(engine::Error::new(ErrorKind::Stale, context)));
        }
        py.detach(|| file.sync_all()).map_err(|e| io("sync", e))?;
        beside.keep(&dest).map_err(|e| io("rename", e))?;
        Ok(done)
    }

    #[pyo3(signature = (name, offset=0, length=None))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        offset: u64,
        length: Option<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let reader = self.call(py, |s| s.reader(name))?;
        read_bytes(py, &reader, offset, length)
    }

    fn tensors<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        let index = self.call(py, |s| s.tensors(name))?;
        tensors_of(py, name, index)
    }

    /// Brings a region into the RAM tier, as far as there is room. Returns the bytes that are there then: none where the pool has no tier here.
    fn warm(&self, py: Python<'_>, name: &str) -> PyResult<u64> {
        let session = self.session()?;
        if session.pool().and_then(engine::Pool::ram_arena).is_none() {
            return Ok(0);
        }
        let reader = py.detach(|| session.reader(name)).py()?;
        let mut buffer = vec![0; STEP.min(reader.len() as usize)];
        for at in (0..reader.len()).step_by(STEP) {
            py.check_signals()?;
            let part = &mut buffer[..STEP.min((reader.len() - at) as usize)];
            py.detach(|| reader.read_exact_at(at, part)).py()?;
        }
        py.detach(|| gpudirect::Source::region(&session, name.trim_matches('/'), gpudirect::Verify::Always))
            .py()
            .map(|source| source.resident_bytes(0..u64::MAX))
    }

    /// A handle on the present content of a region.
    fn region(slf: &Bound<'_, Self>, name: &str) -> PyResult<Region> {
        Region::open(slf.py(), slf, name)
    }

    /// As `nvtier.load`, of regions by name.
    #[pyo3(signature = (names, **options))]
    fn load<'py>(
        slf: &Bound<'py, Self>,
        names: Bound<'py, PyAny>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        slf.get().load_by_name(slf.py(), slf, names, options)
    }

    #[pyo3(signature = (path="", progress=None))]
    fn verify<'py>(
        &self,
        py: Python<'py>,
        path: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut raised = None;
        let report = self.call(py, |s| {
            s.verify(path, &mut |p| {
                let Some(callback) = progress.as_ref().filter(|_| raised.is_none()) else { return };
                let told = Python::attach(|py| {
                    callback.call1(py, (p.done_bytes, p.total_bytes, p.bad_chunks)).map(drop)
                });
                raised = told.err();
            })
        })?;
        match raised {
            Some(error) => Err(error),
            None => to_dict(py, &report),
        }
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let session = self.session.write().unwrap_or_else(PoisonError::into_inner).take();
        let Some(session) = session else { return Ok(()) };
        if session.is_here() {
            py.detach(|| self.tiers.clear());
        }
        // Another thread in a call keeps it open until it is through.
        match Arc::try_unwrap(session) {
            Ok(session) => match session.into_inner() {
                Some(session) => py.detach(|| session.close()).py(),
                None => Ok(()),
            },
            Err(_) => Ok(()),
        }
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) -> PyResult<bool> {
        self.close(py)?;
        Ok(false)
    }

    fn __repr__(&self) -> String {
        format!("Pool({:?})", self.path.display().to_string())
    }
}

/// Bytes of a region, fewer at its end.
pub fn read_bytes<'py>(
    py: Python<'py>,
    reader: &RegionReader,
    offset: u64,
    length: Option<u64>,
) -> PyResult<Bound<'py, PyBytes>> {
    let left = reader.len().saturating_sub(offset);
    let len = length.unwrap_or(left).min(left);
    let len = usize::try_from(len).map_err(|e| pyo3::exceptions::PyOverflowError::new_err(e.to_string()))?;
    PyBytes::new_with(py, len, |buf| {
        for (part, at) in buf.chunks_mut(STEP).zip((offset..).step_by(STEP)) {
            py.check_signals()?;
            py.detach(|| reader.read_exact_at(at, part)).py()?;
        }
        Ok(())
    })
}

/// The tensors of a region by name.
pub fn tensors_of<'py>(
    py: Python<'py>,
    name: &str,
    index: Option<TensorIndex>,
) -> PyResult<Bound<'py, PyDict>> {
    let Some(index) = index else {
        let context = format!("{name:?} is no tensor file (.safetensors, .gguf, .npy)");
        return Err(to_py(engine::Error::new(ErrorKind::NotSupported, context)));
    };
    let dict = PyDict::new(py);
    for info in index.tensors {
        let name = info.name.clone();
        dict.set_item(name, Tensor(info))?;
    }
    Ok(dict)
}

/// A file that is removed unless it is kept.
struct Scratch(Option<PathBuf>);

impl Scratch {
    fn keep(mut self, at: &Path) -> std::io::Result<()> {
        if let Some(path) = &self.0 {
            std::fs::rename(path, at)?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}
