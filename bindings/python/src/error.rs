//! Errors of the engine and the loader as Python exceptions. The classes are Python's (`nvtier/_errors.py`), so that they can
//! derive from `FileNotFoundError` and friends as well.

use std::error::Error as _;
use std::time::Duration;

use engine::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::PyType;

/// The class for a kind.
fn class_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound | ErrorKind::MissingMember => "NotFound",
        ErrorKind::Exists => "Exists",
        ErrorKind::NotDirectory => "NotADirectory",
        ErrorKind::IsDirectory => "IsADirectory",
        ErrorKind::NotEmpty => "NotEmpty",
        ErrorKind::NoSpace => "NoSpace",
        ErrorKind::ReadOnly => "ReadOnly",
        ErrorKind::PermissionDenied => "PermissionDenied",
        ErrorKind::Busy => "PoolBusy",
        ErrorKind::Corrupt => "Corrupt",
        ErrorKind::Malformed => "Malformed",
        ErrorKind::NotAPool | ErrorKind::ForeignData | ErrorKind::NewerFormat | ErrorKind::WrongMember => {
            "NotAPool"
        }
        ErrorKind::NotSupported => "NotSupported",
        ErrorKind::Timeout => "Timeout",
        ErrorKind::InvalidArgument
        | ErrorKind::InvalidName
        | ErrorKind::NameTooLong
        | ErrorKind::OutOfRange
        | ErrorKind::TooSmall
        | ErrorKind::TooLarge => "InvalidArgument",
        _ => "Error",
    }
}

/// The class for a kind of the loader's.
fn load_class_name(kind: gpudirect::ErrorKind) -> &'static str {
    use gpudirect::ErrorKind as K;
    match kind {
        K::NoDriver => "NoDriver",
        K::OldDriver => "OldDriver",
        K::NoDevice => "NoDevice",
        K::OutOfDeviceMemory => "OutOfDeviceMemory",
        K::OutOfHostMemory => "OutOfHostMemory",
        K::Device => "DeviceError",
        K::Changed => "Changed",
        K::Malformed => "Malformed",
        K::Corrupt => "Corrupt",
        K::Cancelled => "Cancelled",
        K::Timeout => "Timeout",
        K::Invalid => "InvalidArgument",
        K::NotFound => "NotFound",
        K::PermissionDenied => "PermissionDenied",
        K::Busy => "PoolBusy",
        K::NoSpace => "NoSpace",
        K::Unsupported => "NotSupported",
        K::Io => "DriveError",
        _ => "Error",
    }
}

/// An exception of a class of `nvtier._errors`.
fn raise(class: &str, text: String) -> PyErr {
    Python::attach(|py| {
        let class = py
            .import("nvtier._errors")
            .and_then(|module| module.getattr(class))
            .and_then(|class| Ok(class.cast_into::<PyType>()?));
        match class {
            // One text argument: OSError's classes take more to be errno and file name, and then show them differently.
            Ok(class) => PyErr::from_type(class, (text,)),
            Err(other) => other,
        }
    })
}

/// An engine's error as the exception to raise.
pub fn to_py(error: Error) -> PyErr {
    raise(class_name(error.kind()), error.chain())
}

/// A loader's error as the exception to raise.
pub fn load_to_py(error: gpudirect::Error) -> PyErr {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(source) = below {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        below = source.source();
    }
    if error.kind() == gpudirect::ErrorKind::OutOfHostMemory {
        text.push_str("; take a smaller ring, or raise RLIMIT_MEMLOCK: ulimit -l unlimited");
    }
    raise(load_class_name(error.kind()), text)
}

/// Something that was made before a fork is used after it.
pub fn forked(what: &str, parent: u32) -> PyErr {
    let text = format!(
        "{what} was made by process {parent} and is used in its child {}: threads, rings and CUDA do not survive a fork; open \
         it again in the child, or start children with multiprocessing's \"spawn\"",
        std::process::id()
    );
    raise("Forked", text)
}

/// Something that was closed is used.
pub fn closed(what: &str) -> PyErr {
    raise("Closed", format!("{what} is closed"))
}

/// A wrong argument.
pub fn invalid(text: String) -> PyErr {
    raise("InvalidArgument", text)
}

/// A deadline in seconds, more than 0.
pub fn deadline_of(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|deadline| !deadline.is_zero())
        .ok_or_else(|| invalid(format!("deadline={seconds}: seconds, more than 0")))
}

/// What this version, type or machine cannot do.
pub fn unsupported(text: String) -> PyErr {
    raise("NotSupported", text)
}

/// No such tensor.
pub fn no_tensor(text: String) -> PyErr {
    raise("NoTensor", text)
}

/// What `?` needs: `session.stat().py()?`.
pub trait IntoPy<T> {
    fn py(self) -> PyResult<T>;
}

impl<T> IntoPy<T> for engine::Result<T> {
    fn py(self) -> PyResult<T> {
        self.map_err(to_py)
    }
}

impl<T> IntoPy<T> for gpudirect::Result<T> {
    fn py(self) -> PyResult<T> {
        self.map_err(load_to_py)
    }
}
