//! Errors of the engine as Python exceptions. The classes are Python's (`nvtier/_errors.py`), so that they can derive from
//! `FileNotFoundError` and friends as well.

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

/// An engine's error as the exception to raise.
pub fn to_py(error: Error) -> PyErr {
    Python::attach(|py| {
        let class = py
            .import("nvtier._errors")
            .and_then(|module| module.getattr(class_name(error.kind())))
            .and_then(|class| Ok(class.cast_into::<PyType>()?));
        match class {
            // One text argument: OSError's classes take more to be errno and file name, and then show them differently.
            Ok(class) => PyErr::from_type(class, (error.chain(),)),
            Err(other) => other,
        }
    })
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
