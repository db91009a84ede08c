//! Named regions on devices: pools, catalogs, drafts, the RAM tier. Knows no CUDA and no kernel file system.
#![forbid(unsafe_code)]

pub mod error;
pub mod types;

pub use error::{Error, ErrorKind, Result};
pub use types::{
    Access, Allocate, Attr, DirEntry, NewNode, NodeId, NodeKind, ROOT, RenameFlags, Seek, SetAttr, Timestamp, XattrSet,
};
