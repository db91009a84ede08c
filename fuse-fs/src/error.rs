//! Errors: the one table from engine errors to errno, and the error of mounting.

use std::fmt;
use std::io;

use engine::ErrorKind as Engine;

/// An errno value as the kernel knows it (`errno(3)`), always positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident = $rustix:ident),* $(,)?) => {
        impl Errno {
            $(
                #[doc = concat!("`", stringify!($name), "`, see `errno(3)`.")]
                pub const $name: Errno = Errno(rustix::io::Errno::$rustix.raw_os_error());
            )*

            /// The symbol, for messages; `None` for a value that only passes through from the operating system.
            pub fn name(self) -> Option<&'static str> {
                $(if self == Self::$name { return Some(stringify!($name)); })*
                None
            }
        }
    };
}

errnos! {
    EPERM = PERM, ENOENT = NOENT, EIO = IO, ENXIO = NXIO, EBADF = BADF, ENOMEM = NOMEM, EACCES = ACCESS,
    EBUSY = BUSY, EEXIST = EXIST, EXDEV = XDEV, ENOTDIR = NOTDIR, EISDIR = ISDIR, EINVAL = INVAL,
    EMFILE = MFILE, ENFILE = NFILE, ENOTTY = NOTTY, EFBIG = FBIG, ENOSPC = NOSPC, EROFS = ROFS,
    EMLINK = MLINK, ERANGE = RANGE, ENAMETOOLONG = NAMETOOLONG, ENOTEMPTY = NOTEMPTY, ENODATA = NODATA,
    ETIMEDOUT = TIMEDOUT, EOPNOTSUPP = OPNOTSUPP, ESTALE = STALE, EDQUOT = DQUOT, ENOTCONN = NOTCONN,
    E2BIG = TOOBIG,
}

impl Errno {
    /// The number.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

/// What every operation of [`crate::fs::Fs`] returns.
pub type FsResult<T> = std::result::Result<T, Errno>;

/// The table. One line a kind, so that a reader can check it against `errno(3)` and docs/semantics.md.
pub fn errno_of(kind: Engine) -> Errno {
    match kind {
        Engine::NotFound => Errno::ENOENT,
        Engine::Exists => Errno::EEXIST,
        Engine::NotDirectory => Errno::ENOTDIR,
        Engine::IsDirectory => Errno::EISDIR,
        Engine::NotEmpty => Errno::ENOTEMPTY,
        Engine::NameTooLong => Errno::ENAMETOOLONG,
        Engine::InvalidName | Engine::InvalidArgument => Errno::EINVAL,
        Engine::OutOfRange => Errno::ENXIO,
        Engine::NoSpace => Errno::ENOSPC,
        Engine::ReadOnly => Errno::EROFS,
        Engine::PermissionDenied => Errno::EACCES,
        Engine::Busy => Errno::EBUSY,
        Engine::TooManyLinks => Errno::EMLINK,
        Engine::TooLarge => Errno::EFBIG,
        Engine::NoAttribute => Errno::ENODATA,
        Engine::RangeTooSmall => Errno::ERANGE,
        Engine::CrossDevice => Errno::EXDEV,
        Engine::NotSupported => Errno::EOPNOTSUPP,
        Engine::Stale => Errno::ESTALE,
        Engine::Timeout => Errno::ETIMEDOUT,
        // Bad bytes, a damaged pool and a failing drive look alike to a program that reads a file.
        _ => Errno::EIO,
    }
}

/// Translates an engine error. An operating system error that says more than `EIO` about space or handles is passed on.
pub fn errno(error: &engine::Error) -> Errno {
    if error.kind() == Engine::Io
        && let Some(errno) = raw_cause(error)
        && [Errno::ENOSPC, Errno::EDQUOT, Errno::EFBIG, Errno::ENOMEM, Errno::EMFILE, Errno::ENFILE]
            .contains(&errno)
    {
        return errno;
    }
    errno_of(error.kind())
}

fn raw_cause(error: &engine::Error) -> Option<Errno> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && let Some(raw) = error.raw_os_error()
        {
            return Some(Errno(raw));
        }
        if let Some(error) = error.downcast_ref::<rustix::io::Errno>() {
            return Some(Errno(error.raw_os_error()));
        }
        cause = error.source();
    }
    None
}

impl From<engine::Error> for Errno {
    fn from(error: engine::Error) -> Errno {
        let errno = errno(&error);
        if errno == Errno::EIO {
            // The only kind whose reason a user cannot guess from the errno.
            tracing::warn!(error = %error, "answering EIO");
        } else {
            tracing::trace!(error = %error, %errno);
        }
        errno
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Errno {
        error.raw_os_error().map_or(Errno::EIO, Errno)
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(error: rustix::io::Errno) -> Errno {
        Errno(error.raw_os_error())
    }
}

/// What kind of failure stopped a mount or unmount; maps to exit codes of the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The mount point is missing, no directory, not empty, or is a mount point already.
    Mountpoint,
    /// Something still uses the mount.
    Busy,
    /// The caller may not mount or unmount here.
    PermissionDenied,
    /// The kernel or the machine lacks what is needed (for example `/dev/fuse`).
    NotSupported,
    /// Any other failure of the operating system.
    Io,
    /// The pool refused.
    Engine,
}

/// Failure to mount or unmount: kind, what was tried and what to do, and the cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of mounting operations.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), source: None }
    }

    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        self.source = Some(source.into());
        self
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
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
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<engine::Error> for Error {
    fn from(error: engine::Error) -> Error {
        Error::new(ErrorKind::Engine, "the pool failed").with_source(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_promised_kind_has_its_errno() {
        let table = [
            (Engine::NotFound, Errno::ENOENT),
            (Engine::Exists, Errno::EEXIST),
            (Engine::NotDirectory, Errno::ENOTDIR),
            (Engine::IsDirectory, Errno::EISDIR),
            (Engine::NotEmpty, Errno::ENOTEMPTY),
            (Engine::NameTooLong, Errno::ENAMETOOLONG),
            (Engine::NoSpace, Errno::ENOSPC),
            (Engine::ReadOnly, Errno::EROFS),
            (Engine::TooManyLinks, Errno::EMLINK),
            (Engine::TooLarge, Errno::EFBIG),
            (Engine::NoAttribute, Errno::ENODATA),
            (Engine::Corrupt, Errno::EIO),
            (Engine::Stale, Errno::ESTALE),
        ];
        for (kind, expected) in table {
            assert_eq!(errno_of(kind), expected, "{kind:?}");
        }
    }

    #[test]
    fn an_operating_system_error_about_space_is_not_flattened_to_eio() {
        assert_eq!(Errno::from(io::Error::from_raw_os_error(Errno::ENOSPC.raw())), Errno::ENOSPC);
        assert_eq!(Errno::ENOSPC.to_string(), "ENOSPC");
        assert_eq!(Errno::from(io::Error::other("no number")), Errno::EIO);
    }
}
