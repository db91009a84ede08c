//! One error for the crate: a kind to match on, a context to read, and the error below it.

use std::fmt;

/// What went wrong, for code. Stable; new kinds may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// No such name, node, region or member path.
    NotFound,
    /// The name is taken.
    Exists,
    /// A directory was needed.
    NotDirectory,
    /// A directory cannot be used so.
    IsDirectory,
    /// The directory holds entries.
    NotEmpty,
    /// A name over 255 bytes or a path over 4096.
    NameTooLong,
    /// An empty name, `.`, `..`, or one with `/` or NUL.
    InvalidName,
    /// An argument that no call of this kind takes.
    InvalidArgument,
    /// An offset beyond the end, or no data or hole there (`lseek(2)` ENXIO).
    OutOfRange,
    /// The pool, its quota, or the file system under a member is full.
    NoSpace,
    /// The pool was opened read-only.
    ReadOnly,
    /// The operating system or the owner refused.
    PermissionDenied,
    /// Somebody else owns the pool; the context names the process id.
    Busy,
    /// Bytes fail their checksum, or a record cannot be what it claims; the context names where.
    Corrupt,
    /// There is no pool at that path.
    NotAPool,
    /// The path holds other data; the context names what was found.
    ForeignData,
    /// Written by a newer version of the format.
    NewerFormat,
    /// A member of the pool is not there.
    MissingMember,
    /// A member is there, but is of another pool or at another's place.
    WrongMember,
    /// Too small for a pool.
    TooSmall,
    /// Over the limit of hard links.
    TooManyLinks,
    /// Over the largest size that is supported.
    TooLarge,
    /// No such extended attribute.
    NoAttribute,
    /// The caller's buffer is too small.
    RangeTooSmall,
    /// Across pools or devices.
    CrossDevice,
    /// Not supported by this pool, member or platform.
    NotSupported,
    /// The handle or lease is of something that is gone.
    Stale,
    /// A deadline passed.
    Timeout,
    /// A tensor file's header breaks its format; the source is a `tensors::Malformed` that says how.
    Malformed,
    /// The peer on the control socket broke the protocol.
    Protocol,
    /// The drive or the file system under it failed. Last, because a kind that a newer owner sends is read as this one.
    #[serde(other)]
    Io,
}

/// An error of the engine. `Display` shows the context; the source is apart, see [`std::error::Error::source`].
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Results of the engine.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that starts here.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), source: None }
    }

    /// An error that another caused.
    pub fn with_source(
        kind: ErrorKind,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// An error of the operating system; the kind follows from it. `context` says what was tried, on what.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Error {
        Error { kind: kind_of(&source), context: context.into(), source: Some(Box::new(source)) }
    }

    /// What went wrong, for code.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Puts what the caller was doing before the context.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Error {
        self.context = format!("{doing}: {}", self.context);
        self
    }

    /// The context and every source, joined by `: `, for a person.
    pub fn chain(&self) -> String {
        let mut text = self.context.clone();
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            text.push_str(": ");
            text.push_str(&error.to_string());
            next = error.source();
        }
        text
    }
}

fn kind_of(error: &std::io::Error) -> ErrorKind {
    use std::io::ErrorKind as Os;
    match error.kind() {
        Os::NotFound => ErrorKind::NotFound,
        Os::AlreadyExists => ErrorKind::Exists,
        Os::PermissionDenied => ErrorKind::PermissionDenied,
        Os::StorageFull | Os::QuotaExceeded => ErrorKind::NoSpace,
        Os::ReadOnlyFilesystem => ErrorKind::ReadOnly,
        Os::NotADirectory => ErrorKind::NotDirectory,
        Os::IsADirectory => ErrorKind::IsDirectory,
        Os::DirectoryNotEmpty => ErrorKind::NotEmpty,
        Os::FileTooLarge => ErrorKind::TooLarge,
        Os::CrossesDevices => ErrorKind::CrossDevice,
        Os::TimedOut => ErrorKind::Timeout,
        Os::Unsupported => ErrorKind::NotSupported,
        Os::InvalidInput => ErrorKind::InvalidArgument,
        Os::ResourceBusy => ErrorKind::Busy,
        _ => ErrorKind::Io,
    }
}

impl From<nvme::Error> for Error {
    /// An error of a device: what it was doing is in its own context, here is the kind.
    fn from(source: nvme::Error) -> Error {
        use nvme::ErrorKind as Device;
        let kind = match source.kind() {
            Device::NotFound => ErrorKind::NotFound,
            Device::PermissionDenied => ErrorKind::PermissionDenied,
            Device::Busy => ErrorKind::Busy,
            Device::NoSpace => ErrorKind::NoSpace,
            Device::Timeout => ErrorKind::Timeout,
            Device::Unsupported => ErrorKind::NotSupported,
            Device::Misaligned | Device::Invalid => ErrorKind::InvalidArgument,
            _ => ErrorKind::Io,
        };
        Error { kind, context: "a device failed".into(), source: Some(Box::new(source)) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
