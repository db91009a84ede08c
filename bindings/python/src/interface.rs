//! Memory of other libraries that say where it is: DLPack's capsules, `__cuda_array_interface__` and numpy's `__array_interface__`.

use engine::tensors::Dtype;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{IntoPy, invalid, unsupported};
use crate::memory;
use crate::process::may_use;

/// Address, device, type, shape, bytes, whether it may be written to. A type is safetensors' name, or an array interface's `typestr` where
/// that stands for none alone.
type Seen = (u64, String, String, Vec<u64>, u64, bool);

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

fn types() -> impl Iterator<Item = Dtype> {
    NAMES.iter().filter_map(|name| Dtype::from_safetensors(name))
}

fn not_contiguous() -> PyErr {
    invalid("the tensor is not contiguous: its elements do not lie one after the other".into())
}

/// What `__dlpack__` of another library's tensor says.
#[pyfunction]
fn look_at_dlpack(capsule: &Bound<'_, PyAny>) -> PyResult<Seen> {
    let seen = memory::import(capsule)?;
    if !seen.contiguous {
        return Err(not_contiguous());
    }
    let device = match seen.device {
        (memory::CPU, _) | (3, _) => "cpu".to_owned(),
        (memory::CUDA, id) => format!("cuda:{id}"),
        (kind, _) => return Err(unsupported(format!("tensors on DLPack's device type {kind}"))),
    };
    let dtype = types().find(|dtype| memory::dl_type(*dtype) == Some(seen.dtype)).ok_or_else(|| {
        unsupported(format!(
            "safetensors has no type for DLPack's code {} of {} bits",
            seen.dtype.0, seen.dtype.1
        ))
    })?;
    let len =
        dtype.tensor_bytes(&seen.shape).ok_or_else(|| invalid(format!("a shape of {:?}", seen.shape)))?;
    Ok((seen.address, device, dtype.name().to_owned(), seen.shape, len, seen.writable))
}

/// Bytes of an element: the number of a `typestr` such as `<f4`.
fn item_bytes(typestr: &str) -> Option<u64> {
    typestr.get(2..)?.parse().ok().filter(|bytes| *bytes > 0)
}

/// Whether a type of a file is what a `typestr` or a type's name says.
pub fn is_type(dtype: Dtype, said: &str) -> bool {
    // Of a single byte, or bytes without a meaning, there is one order only.
    let plain = |descr: &str| -> String {
        let opaque = descr.get(1..2) == Some("V") || item_bytes(descr) == Some(1);
        format!("{}{}", if opaque { "|" } else { &descr[..1] }, &descr[1..])
    };
    dtype.name() == said
        || said.is_ascii()
            && said.len() > 2
            && dtype.npy_descr().is_some_and(|descr| plain(descr) == plain(said))
}

/// What an array interface says; `cuda`: `__cuda_array_interface__`, whose stream is waited for.
#[pyfunction]
fn look_at_interface(py: Python<'_>, interface: &Bound<'_, PyDict>, cuda: bool) -> PyResult<Seen> {
    let part = |name: &str| -> PyResult<Option<Bound<'_, PyAny>>> {
        Ok(interface.get_item(name)?.filter(|value| !value.is_none()))
    };
    let needed =
        |name: &str| part(name)?.ok_or_else(|| invalid(format!("an array interface without {name:?}")));
    if part("mask")?.is_some() {
        return Err(unsupported("an array with a mask".into()));
    }
    let typestr: String = needed("typestr")?.extract()?;
    let shape: Vec<u64> = needed("shape")?.extract()?;
    let (address, read_only): (u64, bool) = needed("data")?.extract()?;
    let Some(item) = item_bytes(&typestr).filter(|_| typestr.is_ascii()) else {
        return Err(unsupported(format!("an array of type {typestr:?}")));
    };
    let len = shape
        .iter()
        .try_fold(item, |len, n| len.checked_mul(*n))
        .ok_or_else(|| invalid(format!("a shape of {shape:?}")))?;
    if let Some(strides) = part("strides")?
        && len > 0
    {
        let strides: Vec<i64> = strides.extract()?;
        let mut expected = item as i64;
        let fits = strides.len() == shape.len()
            && shape.iter().zip(&strides).rev().all(|(n, stride)| {
                let fits = *n == 1 || *stride == expected;
                expected = expected.saturating_mul(*n as i64);
                fits
            });
        if !fits {
            return Err(not_contiguous());
        }
    }
    let mut device = "cpu".to_owned();
    if cuda {
        may_use("cuda")?;
        let stream: Option<u64> = part("stream")?.map(|stream| stream.extract()).transpose()?;
        if stream == Some(0) {
            return Err(invalid(
                "an array interface with a stream of 0, which stands for none: 1 and 2 are the default ones"
                    .into(),
            ));
        }
        // Empty arrays have no memory to ask about.
        let ordinal = match len {
            0 => 0,
            _ => py.detach(|| gpudirect::driver::cuda::device_of(address, stream)).py()?,
        };
        device = format!("cuda:{ordinal}");
    }
    let named = types().find(|dtype| !typestr.contains('V') && is_type(*dtype, &typestr));
    let dtype = named.map_or(typestr, |dtype| dtype.name().to_owned());
    Ok((address, device, dtype, shape, len, !read_only))
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(look_at_dlpack, module)?)?;
    module.add_function(wrap_pyfunction!(look_at_interface, module)?)
}
