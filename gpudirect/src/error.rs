//! The one error of this crate: kind + context + source.

use std::fmt;

/// What went wrong, coarse enough to decide by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no CUDA driver library here.
    NoDriver,
    /// The CUDA driver lacks what is needed.
    OldDriver,
    /// There is no such device.
    NoDevice,
    /// The device has not enough memory free.
    OutOfDeviceMemory,
    /// The host has not enough memory, or a limit such as RLIMIT_MEMLOCK was hit.
    OutOfHostMemory,
    /// The device or its driver failed.
    Device,
    /// A file or region was truncated, replaced or written to while it was loaded.
    Changed,
    /// A tensor file whose header lies, or no tensor file.
    Malformed,
    /// Bytes that do not fit their checksum.
    Corrupt,
    /// The caller cancelled.
    Cancelled,
    /// The caller's deadline passed, or the drive's.
    Timeout,
    /// A wrong argument.
    Invalid,
    /// No such file, region or tensor.
    NotFound,
    /// Not allowed.
    PermissionDenied,
    /// Somebody else has it.
    Busy,
    /// The file system is full.
    NoSpace,
    /// This file system or kernel cannot do it.
    Unsupported,
    /// A drive, file system or pool failed.
    Io,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::NoDriver => "no CUDA driver",
            ErrorKind::OldDriver => "CUDA driver too old",
            ErrorKind::NoDevice => "no such device",
            ErrorKind::OutOfDeviceMemory => "out of device memory",
            ErrorKind::OutOfHostMemory => "out of memory",
            ErrorKind::Device => "device error",
            ErrorKind::Changed => "changed while it was loaded",
            ErrorKind::Malformed => "malformed",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::Timeout => "deadline passed",
            ErrorKind::Invalid => "invalid argument",
            ErrorKind::NotFound => "not found",
            ErrorKind::PermissionDenied => "permission denied",
            ErrorKind::Busy => "busy",
            ErrorKind::NoSpace => "no space",
            ErrorKind::Unsupported => "not supported",
            ErrorKind::Io => "I/O error",
        })
    }
}

type Source = Box<dyn std::error::Error + Send + Sync>;

/// An error of this crate: what was tried, what is wrong, what to do; the lower error is its source.
pub struct Error(Box<(ErrorKind, String, Option<Source>)>);

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a lower one.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error(Box::new((kind, context.into(), None)))
    }

    /// The same, caused by `source`.
    pub fn with_source(mut self, source: impl Into<Source>) -> Error {
        self.0.2 = Some(source.into());
        self
    }

    /// The same, with what was tried in front.
    pub fn context(mut self, tried: impl fmt::Display) -> Error {
        self.0.1 = format!("{tried}: {}", self.0.1);
        self
    }

    /// What to decide by.
    pub fn kind(&self) -> ErrorKind {
        self.0.0
    }

    /// The error of a system call.
    pub fn io(context: impl Into<String>, error: impl Into<std::io::Error>) -> Error {
        Error::from(nvme::Error::os(error, context))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, context, source) = &*self.0;
        match source {
            // A lower error of ours says its own kind.
            Some(_) => f.write_str(context),
            None => write!(f, "{context}: {kind}"),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.0)
            .field("context", &self.0.1)
            .field("source", &self.0.2)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.2.as_deref().map(|source| source as _)
    }
}

impl From<nvme::Error> for Error {
    fn from(error: nvme::Error) -> Error {
        use nvme::ErrorKind as K;
        let kind = match error.kind() {
            K::NotFound => ErrorKind::NotFound,
            K::PermissionDenied => ErrorKind::PermissionDenied,
            K::Busy => ErrorKind::Busy,
            K::NoSpace => ErrorKind::NoSpace,
            K::NoMemory => ErrorKind::OutOfHostMemory,
            K::Timeout => ErrorKind::Timeout,
            K::ShortTransfer | K::OutOfRange => ErrorKind::Changed,
            K::Unsupported => ErrorKind::Unsupported,
            K::Invalid | K::Misaligned => ErrorKind::Invalid,
            _ => ErrorKind::Io,
        };
        let text = error.to_string();
        Error::new(kind, text).with_source(error)
    }
}

impl From<engine::Error> for Error {
    fn from(error: engine::Error) -> Error {
        use engine::ErrorKind as K;
        let kind = match error.kind() {
            K::NotFound => ErrorKind::NotFound,
            K::Corrupt => ErrorKind::Corrupt,
            K::Malformed => ErrorKind::Malformed,
            K::Busy => ErrorKind::Busy,
            K::NoSpace => ErrorKind::NoSpace,
            K::PermissionDenied => ErrorKind::PermissionDenied,
            K::NotSupported => ErrorKind::Unsupported,
            K::Timeout => ErrorKind::Timeout,
            K::InvalidArgument | K::InvalidName => ErrorKind::Invalid,
            _ => ErrorKind::Io,
        };
        let text = error.to_string();
        Error::new(kind, text).with_source(error)
    }
}
