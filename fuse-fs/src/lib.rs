//! The pool as a file system.
//!
//! Two halves: [`fs::Fs`] is the file system itself and knows no kernel; a thin adapter turns FUSE requests into its calls. A region
//! that is one file of a directory member is handed to the kernel (FUSE passthrough), which then reads, writes and maps it without
//! this process; every other region is served from here. docs/semantics.md states what a mount promises.
#![forbid(unsafe_code)]

mod adapter;
pub mod error;
pub mod fs;
#[doc(hidden)]
pub mod fuzzing {
    //! Doors for the fuzz targets (`fuzz/`); not part of the interface.
    pub use crate::mountinfo::parse as mountinfo;
}
mod mount;
mod mountinfo;

pub use error::{Errno, Error, ErrorKind, Result};
pub use fs::Passthrough;
pub use mount::{MountOptions, Mounted, Unmounter, mount, repair_stale, unmount};
pub use mountinfo::{MountEntry, find_mount};
