//! Named regions on devices: pools, catalogs, drafts, the RAM tier. Knows no CUDA and no kernel file system.
#![forbid(unsafe_code)]

pub mod allocator;
mod catalog;
pub mod content;
pub mod control;
pub mod error;
pub mod extent_draft;
pub mod extent_io;
mod file_draft;
pub mod format;
#[doc(hidden)]
pub mod fuzzing;
pub mod handle;
pub mod kv;
pub mod layout;
pub mod lease;
pub mod member;
pub mod metrics;
mod namespace;
mod owner;
pub mod pool;
pub mod prefetch;
pub mod ram_tier;
pub mod region_read;
pub mod repair;
pub mod scrub;
pub mod session;
pub mod state;
mod sync;
pub mod tensors;
pub mod types;
pub mod verify;
pub mod write_behind;

pub use error::{Error, ErrorKind, Result};
pub use handle::Handle;
pub use lease::{Lease, LeasedExtent, Source};
pub use pool::{
    FormatOptions, Generation, MemberInfo, MemberKind, OpenOptions, Pool, PoolInfo, PoolStat, RamStat, Verify,
};
pub use region_read::Resident;
pub use repair::{RepairReport, RepairedChunk};
pub use scrub::{ScrubOptions, ScrubStat};
pub use session::{
    Blocks, Entry, Loads, Puts, RegionReader, RegionWriter, Session, SessionOptions, WriterOptions,
};
pub use types::{
    Access, Allocate, Attr, Borrower, DirEntry, NewNode, NodeId, NodeKind, ROOT, RenameFlags, Seek, SetAttr,
    Timestamp, XattrSet,
};
pub use verify::{BadChunk, VerifyProgress, VerifyReport};
