//! The one error of this crate: kind + context + source.
//!
//! ```text
//! kind      small, stable, what a program decides by
//! context   what was tried, on what, at which offset, what to do about it; for people
//! source    the lower error (an errno), never repeated by Display
//! ```

use std::fmt;
use std::io;

use crate::passthrough::Status;

/// What went wrong, coarse enough to decide by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No such file or device.
    NotFound,
    /// Not allowed, or opened or mounted read-only.
    PermissionDenied,
    /// Somebody else holds it exclusively.
    Busy,
    /// Offset, length or memory address is not a multiple of the device's alignment.
    Misaligned,
    /// Beyond the end of the device.
    OutOfRange,
    /// The file system or device is full, or over its quota.
    NoSpace,
    /// No memory, or a limit such as RLIMIT_MEMLOCK was hit.
    NoMemory,
    /// The queue has no free slot: reap, then push again.
    QueueFull,
    /// The deadline passed.
    Timeout,
    /// Fewer bytes than asked for, at the end of the file.
    ShortTransfer,
    /// The device or file system reported a failed transfer.
    Io,
    /// The kernel, file system or device does not know this operation.
    Unsupported,
    /// A wrong argument or a wrong use of the interface.
    Invalid,
    /// The medium lost the data: unrecoverable read error or failed protection check.
    Media,
    /// The device went away, or this queue can no longer be used.
    Gone,
}

impl ErrorKind {
    /// The kind that an errno stands for. The same table serves system calls and completion entries.
    pub fn from_errno(errno: i32) -> ErrorKind {
        match errno {
            libc::ENOENT | libc::ENOTDIR => ErrorKind::NotFound,
            libc::EACCES | libc::EPERM | libc::EROFS => ErrorKind::PermissionDenied,
            libc::EBUSY | libc::ETXTBSY => ErrorKind::Busy,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::NoSpace,
            libc::ENOMEM => ErrorKind::NoMemory,
            libc::ETIMEDOUT | libc::ETIME => ErrorKind::Timeout,
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY => ErrorKind::Unsupported,
            libc::EINVAL | libc::EBADF | libc::EFAULT | libc::EISDIR | libc::ENAMETOOLONG | libc::ELOOP => {
                ErrorKind::Invalid
            }
            // blk_status_to_errno: BLK_STS_MEDIUM is ENODATA, BLK_STS_PROTECTION is EILSEQ.
            libc::ENODATA | libc::EILSEQ | libc::EBADMSG => ErrorKind::Media,
            libc::ENODEV | libc::ENXIO | libc::ESHUTDOWN => ErrorKind::Gone,
            _ => ErrorKind::Io,
        }
    }

    /// True for [`ErrorKind::QueueFull`]: reap completions and push the same operation again.
    pub fn is_queue_full(self) -> bool {
        self == ErrorKind::QueueFull
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::NotFound => "not found",
            ErrorKind::PermissionDenied => "permission denied",
            ErrorKind::Busy => "busy",
            ErrorKind::Misaligned => "misaligned",
            ErrorKind::OutOfRange => "out of range",
            ErrorKind::NoSpace => "no space",
            ErrorKind::NoMemory => "no memory",
            ErrorKind::QueueFull => "queue full",
            ErrorKind::Timeout => "deadline passed",
            ErrorKind::ShortTransfer => "short transfer",
            ErrorKind::Io => "I/O error",
            ErrorKind::Unsupported => "not supported",
            ErrorKind::Invalid => "invalid argument",
            ErrorKind::Media => "data lost on the medium",
            ErrorKind::Gone => "device gone",
        })
    }
}

type Source = Box<dyn std::error::Error + Send + Sync>;

struct Inner {
    kind: ErrorKind,
    context: String,
    source: Option<Source>,
}

/// An error of this crate. One pointer wide, so that results on the hot path stay small.
pub struct Error(Box<Inner>);

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a lower one.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error(Box::new(Inner { kind, context: context.into(), source: None }))
    }

    /// The same error, caused by `source`.
    pub fn with_source(mut self, source: impl Into<Source>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// An error of the operating system; the kind follows from the errno.
    pub fn os(error: impl Into<io::Error>, context: impl Into<String>) -> Error {
        let error = error.into();
        let kind = match error.raw_os_error() {
            Some(errno) => ErrorKind::from_errno(errno),
            None => match error.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                io::ErrorKind::UnexpectedEof => ErrorKind::ShortTransfer,
                io::ErrorKind::TimedOut => ErrorKind::Timeout,
                io::ErrorKind::InvalidInput => ErrorKind::Invalid,
                _ => ErrorKind::Io,
            },
        };
        Error::new(kind, context).with_source(error)
    }

    /// The same error with another kind (an EINVAL of which the cause is known, for example).
    pub fn with_kind(mut self, kind: ErrorKind) -> Error {
        self.0.kind = kind;
        self
    }

    /// What to decide by.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was tried, without the source.
    pub fn context(&self) -> &str {
        &self.0.context
    }

    /// The drive's own status below, when there is one: of commands by passthrough.
    pub fn nvme_status(&self) -> Option<Status> {
        let source = self.0.source.as_deref()?;
        if let Some(status) = source.downcast_ref::<Status>() {
            return Some(*status);
        }
        source.downcast_ref::<Error>().and_then(Error::nvme_status)
    }

    /// The errno below, when there is one.
    pub fn errno(&self) -> Option<i32> {
        let source = self.0.source.as_deref()?;
        if let Some(error) = source.downcast_ref::<io::Error>() {
            return error.raw_os_error();
        }
        source.downcast_ref::<Error>().and_then(Error::errno)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.context, self.0.kind)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Error");
        out.field("kind", &self.0.kind).field("context", &self.0.context);
        if let Some(source) = &self.0.source {
            out.field("source", source);
        }
        out.finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_decides_the_kind_and_stays_readable() {
        let error = Error::os(io::Error::from_raw_os_error(libc::ENOSPC), "write 4096 bytes at 0 of /x");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.errno(), Some(libc::ENOSPC));
        assert_eq!(error.to_string(), "write 4096 bytes at 0 of /x: no space");
        let outer = Error::new(ErrorKind::Io, "load").with_source(error);
        assert_eq!(outer.errno(), Some(libc::ENOSPC));
        assert_eq!(
            std::error::Error::source(&outer).unwrap().to_string(),
            "write 4096 bytes at 0 of /x: no space"
        );
    }

    #[test]
    fn media_errors_are_told_apart_from_transport_errors() {
        assert_eq!(ErrorKind::from_errno(libc::ENODATA), ErrorKind::Media);
        assert_eq!(ErrorKind::from_errno(libc::EILSEQ), ErrorKind::Media);
        assert_eq!(ErrorKind::from_errno(libc::EIO), ErrorKind::Io);
        assert_eq!(ErrorKind::from_errno(libc::ENODEV), ErrorKind::Gone);
    }
}
