//! `nvtier.DeviceTensor`: a loaded tensor, for every library that speaks DLPack or an array interface.

use std::sync::Arc;

use engine::tensors::Dtype;
use gpudirect::LoadedTensor;
use pyo3::exceptions::{PyAttributeError, PyBufferError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::memory::{CPU, CUDA, Export, Hold, dl_type};

/// A tensor on a device. Its memory is given back when the last tensor of its load, and the last view of one, is gone.
#[pyclass(frozen, module = "nvtier")]
pub struct DeviceTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    address: u64,
    len: u64,
    device: (i32, i32),
    hold: Arc<Hold>,
}

/// A device's name as DLPack has it.
pub fn dl_device(name: &str) -> (i32, i32) {
    match name.strip_prefix("cuda") {
        Some(rest) => (CUDA, rest.strip_prefix(':').and_then(|n| n.parse().ok()).unwrap_or(0)),
        None => (CPU, 0),
    }
}

impl DeviceTensor {
    /// A tensor of a load, on the device of that name.
    pub fn new(tensor: LoadedTensor, device: &str, hold: Arc<Hold>) -> DeviceTensor {
        let LoadedTensor { name, dtype, shape, address, len, .. } = tensor;
        DeviceTensor { name, dtype, shape, address, len, device: dl_device(device), hold }
    }

    /// Tensors of one load share its memory.
    pub fn all(tensors: Vec<LoadedTensor>, device: &str) -> Vec<DeviceTensor> {
        let hold = tensors.first().map(|tensor| Arc::new(Hold::new(tensor.memory().clone(), device)));
        match hold {
            Some(hold) => {
                tensors.into_iter().map(|tensor| DeviceTensor::new(tensor, device, hold.clone())).collect()
            }
            None => Vec::new(),
        }
    }

    /// As bytes: rows, where a row of elements is whole bytes.
    fn byte_shape(&self) -> Vec<u64> {
        let row = self.shape.last().and_then(|&last| self.dtype.tensor_bytes(&[last]));
        match (row, self.shape.split_last()) {
            (Some(row), Some((_, outer))) => outer.iter().copied().chain([row]).collect(),
            _ => vec![self.len],
        }
    }

    fn view(&self, dtype: Dtype, shape: Vec<u64>) -> DeviceTensor {
        DeviceTensor {
            name: self.name.clone(),
            dtype,
            shape,
            address: self.address,
            len: self.len,
            device: self.device,
            hold: self.hold.clone(),
        }
    }

    fn array_interface<'py>(&self, py: Python<'py>, version: u32) -> PyResult<Bound<'py, PyDict>> {
        let shape = match self.dtype.bits() {
            Some(bits) if bits % 8 == 0 => self.shape.clone(),
            _ => self.byte_shape(),
        };
        let dict = PyDict::new(py);
        dict.set_item("version", version)?;
        dict.set_item("shape", PyTuple::new(py, shape)?)?;
        dict.set_item("typestr", self.dtype.npy_descr().unwrap_or("|u1"))?;
        dict.set_item("data", (if self.len == 0 { 0 } else { self.address }, false))?;
        dict.set_item("strides", py.None())?;
        Ok(dict)
    }
}

#[pymethods]
impl DeviceTensor {
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }
    #[getter]
    fn nbytes(&self) -> u64 {
        self.len
    }
    #[getter]
    fn device(&self) -> String {
        if self.device.0 == CUDA { format!("cuda:{}", self.device.1) } else { "cpu".into() }
    }
    #[getter]
    fn data_ptr(&self) -> u64 {
        self.address
    }

    /// The same memory as `U8`: one dimension, or rows.
    #[pyo3(signature = (rows=false))]
    fn as_bytes(&self, rows: bool) -> DeviceTensor {
        self.view(Dtype::U8, if rows { self.byte_shape() } else { vec![self.len] })
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // Every byte was on the device before the tensor existed: no stream has to wait.
        let _ = stream;
        if dl_device.is_some_and(|device| device != self.device) || copy == Some(true) {
            return Err(PyBufferError::new_err(format!(
                "{} is on {}, and is not copied",
                self.name,
                self.device()
            )));
        }
        let (dtype, shape) = match dl_type(self.dtype) {
            Some(dtype) => (dtype, self.shape.clone()),
            None => ((1, 8), self.byte_shape()),
        };
        let shape = shape
            .into_iter()
            .map(|n| i64::try_from(n).map_err(|error| PyBufferError::new_err(error.to_string())))
            .collect::<PyResult<_>>()?;
        let export =
            Export { address: self.address, device: self.device, dtype, shape, hold: self.hold.clone() };
        export.capsule(py, max_version.is_some_and(|(major, _)| major >= 1))
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        self.device
    }

    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        if self.device.0 != CPU {
            return Err(PyAttributeError::new_err(format!("{} is on {}", self.name, self.device())));
        }
        self.array_interface(py, 3)
    }

    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        if self.device.0 != CUDA {
            return Err(PyAttributeError::new_err(format!("{} is on {}", self.name, self.device())));
        }
        self.array_interface(py, 3)
    }

    fn __repr__(&self) -> String {
        let (dtype, device) = (self.dtype.name(), self.device());
        format!(
            "DeviceTensor(name={:?}, dtype={dtype:?}, shape={:?}, device={device:?})",
            self.name, self.shape
        )
    }
}
