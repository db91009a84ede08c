//! What a command says and returns when it fails: what was tried, what is wrong, what to do.

use std::error::Error as StdError;
use std::fmt;

/// Exit codes, a promise to scripts (README, `nvtier --help`).
pub mod code {
    /// Something failed that has no code of its own.
    pub const FAILED: u8 = 1;
    /// The command line, the configuration or a name is wrong.
    pub const USAGE: u8 = 2;
    /// The pool, region or source does not exist.
    pub const NOT_FOUND: u8 = 3;
    /// Owned by another process, or in use.
    pub const BUSY: u8 = 4;
    /// Bytes that fail their checksum, or a structure that cannot be right.
    pub const CORRUPT: u8 = 5;
    /// Pool, drive or budget is full.
    pub const NO_SPACE: u8 = 6;
    /// This kernel, machine or user cannot do it.
    pub const UNSUPPORTED: u8 = 7;
    /// Something is slower or missing (`nvtier doctor`).
    pub const DEGRADED: u8 = 8;
    /// SIGINT or SIGTERM.
    pub const INTERRUPTED: u8 = 130;
}

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    /// Exit code, one of [`code`].
    pub code: u8,
    /// Stable word for scripts (`--json`).
    pub kind: String,
    /// What was tried and what is wrong, outermost first.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// What commands return.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure with exit code `code`; `kind` is the word scripts see.
    pub fn new(code: u8, kind: &str, message: impl Into<String>) -> Self {
        Self { code, kind: kind.to_owned(), message: message.into(), hint: None }
    }

    /// Exit code 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(code::FAILED, "Failed", message)
    }

    /// Exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(code::USAGE, "Usage", message)
    }

    /// Exit code 3.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(code::NOT_FOUND, "NotFound", message)
    }

    /// Exit code 5.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(code::CORRUPT, "Corrupt", message)
    }

    /// Exit code 7.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(code::UNSUPPORTED, "NotSupported", message)
    }

    /// Exit code 130.
    pub fn interrupted() -> Self {
        Self::new(code::INTERRUPTED, "Interrupted", "interrupted")
    }

    /// An I/O error of an operation named by `tried`.
    pub fn io(tried: impl fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let (code, kind) = match error.kind() {
            K::NotFound => (code::NOT_FOUND, "NotFound"),
            K::StorageFull | K::QuotaExceeded => (code::NO_SPACE, "NoSpace"),
            K::ResourceBusy => (code::BUSY, "Busy"),
            K::Unsupported => (code::UNSUPPORTED, "NotSupported"),
            K::PermissionDenied => (code::FAILED, "PermissionDenied"),
            _ => (code::FAILED, "Io"),
        };
        Self::new(code, kind, format!("{tried}: {}", describe(error)))
    }

    /// Puts what was tried in front.
    pub fn while_doing(mut self, tried: impl fmt::Display) -> Self {
        self.message = format!("{tried}: {}", self.message);
        self
    }

    /// Adds what to do; a hint that is there already stays.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  {hint}"),
            None => Ok(()),
        }
    }
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&engine::Error> for Failure {
    fn from(error: &engine::Error) -> Self {
        use engine::ErrorKind as K;
        let kind = error.kind();
        let code = match kind {
            K::NotFound | K::MissingMember => code::NOT_FOUND,
            K::InvalidName | K::NameTooLong => code::USAGE,
            K::Busy => code::BUSY,
            K::Corrupt => code::CORRUPT,
            K::NoSpace => code::NO_SPACE,
            K::NotSupported | K::NewerFormat => code::UNSUPPORTED,
            _ => code::FAILED,
        };
        let hint = match kind {
            K::NoSpace => Some("remove regions with `nvtier rm`, or give the pool more space"),
            K::NewerFormat => Some("use the nvtier release that made this pool, or a newer one"),
            K::ForeignData => Some("choose another place, or add --force to destroy what is there"),
            K::NotAPool => Some("make a pool there with `nvtier format`"),
            K::Corrupt => Some(
                "import the region again from its source; `nvtier verify` lists everything that is damaged",
            ),
            _ => None,
        };
        let failure = Self::new(code, &format!("{kind:?}"), describe(error));
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<fuse_fs::Error> for Failure {
    fn from(error: fuse_fs::Error) -> Self {
        use fuse_fs::ErrorKind as K;
        let (code, kind) = match error.kind() {
            K::Engine => return engine_failure(&error),
            K::Busy => (code::BUSY, "Busy"),
            K::NotSupported => (code::UNSUPPORTED, "NotSupported"),
            K::PermissionDenied => (code::FAILED, "PermissionDenied"),
            K::Mountpoint => (code::FAILED, "Mountpoint"),
            _ => (code::FAILED, "Io"),
        };
        Self::new(code, kind, describe(&error))
    }
}

/// The pool's own error inside an error of mounting.
fn engine_failure(error: &fuse_fs::Error) -> Failure {
    use std::error::Error as _;
    match error.source().and_then(|source| source.downcast_ref::<engine::Error>()) {
        Some(inner) => Failure::from(inner),
        None => Failure::failed(describe(error)),
    }
}

impl From<nvme::Error> for Failure {
    fn from(error: nvme::Error) -> Self {
        use nvme::ErrorKind as K;
        let kind = error.kind();
        let code = match kind {
            K::NotFound => code::NOT_FOUND,
            K::Busy => code::BUSY,
            K::NoSpace => code::NO_SPACE,
            K::Unsupported => code::UNSUPPORTED,
            _ => code::FAILED,
        };
        Self::new(code, &format!("{kind:?}"), describe(&error))
    }
}

/// The error and its sources, joined by colons, each said once.
pub fn describe(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_errors_keep_their_meaning() {
        let full = std::io::Error::from_raw_os_error(28);
        let failure = Failure::io("write x", &full);
        assert_eq!(failure.code, code::NO_SPACE);
        assert!(failure.to_string().starts_with("write x: "), "{failure}");
    }

    #[test]
    fn context_goes_in_front_and_the_first_hint_wins() {
        let failure =
            Failure::not_found("no region `m`").while_doing("export m").hint("first").hint("second");
        assert_eq!(failure.to_string(), "export m: no region `m`\n  first");
    }
}
