//! What can go wrong in a run: kind, where, why.

use std::fmt;

/// Kind of a failure; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Options or job file (exit 2).
    Usage,
    /// A file or pool is not there (exit 3).
    NotFound,
    /// Owned by another process (exit 4).
    Busy,
    /// Verification found bad data (exit 5).
    Corrupt,
    /// No space (exit 6).
    NoSpace,
    /// This machine or file cannot do it (exit 7).
    NotSupported,
    /// Input or output failed (exit 1).
    Io,
}

/// A failure: kind, context (what was tried, on what), source.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    errno: Option<i32>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure without another error behind it.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), errno: None, source: None }
    }

    /// A failure of the operating system; the kind follows from the errno.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Error {
        let source = source.into();
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            std::io::ErrorKind::Unsupported => ErrorKind::NotSupported,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), errno: source.raw_os_error(), source: Some(Box::new(source)) }
    }

    /// A failure of the layer below.
    pub fn nvme(context: impl Into<String>, source: nvme::Error) -> Error {
        let kind = match source.kind() {
            nvme::ErrorKind::NotFound => ErrorKind::NotFound,
            nvme::ErrorKind::NoSpace => ErrorKind::NoSpace,
            nvme::ErrorKind::Busy => ErrorKind::Busy,
            nvme::ErrorKind::Unsupported => ErrorKind::NotSupported,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), errno: source.errno(), source: Some(Box::new(source)) }
    }

    /// A failure of the pool.
    pub fn engine(context: impl Into<String>, source: engine::Error) -> Error {
        let kind = match source.kind() {
            engine::ErrorKind::NotFound | engine::ErrorKind::NotAPool => ErrorKind::NotFound,
            engine::ErrorKind::NoSpace => ErrorKind::NoSpace,
            engine::ErrorKind::Busy => ErrorKind::Busy,
            engine::ErrorKind::Corrupt => ErrorKind::Corrupt,
            engine::ErrorKind::NotSupported => ErrorKind::NotSupported,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), errno: None, source: Some(Box::new(source)) }
    }

    /// A failure of the device, or of what is between it and the drive.
    pub fn gpu(context: impl Into<String>, source: gpudirect::Error) -> Error {
        use gpudirect::ErrorKind as K;
        let kind = match source.kind() {
            K::NotFound => ErrorKind::NotFound,
            K::NoSpace => ErrorKind::NoSpace,
            K::Busy => ErrorKind::Busy,
            K::Invalid => ErrorKind::Usage,
            K::NoDriver | K::OldDriver | K::NoDevice | K::Unsupported => ErrorKind::NotSupported,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), errno: None, source: Some(Box::new(source)) }
    }

    /// The number fio would put into `error`: an errno (EILSEQ for bad data, EIO where none is known).
    pub fn errno(&self) -> i32 {
        let known = match self.kind {
            ErrorKind::Corrupt => 84,
            ErrorKind::NotFound => 2,
            ErrorKind::NoSpace => 28,
            ErrorKind::NotSupported => 95,
            _ => 5,
        };
        self.errno.unwrap_or(known)
    }

    /// The command's exit code for it.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Usage => 2,
            ErrorKind::NotFound => 3,
            ErrorKind::Busy => 4,
            ErrorKind::Corrupt => 5,
            ErrorKind::NoSpace => 6,
            ErrorKind::NotSupported => 7,
            ErrorKind::Io => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn std::error::Error + 'static))
    }
}
