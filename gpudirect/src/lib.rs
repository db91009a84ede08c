//! Between drives and device memory: files and regions of pools to VRAM, and back.
//!
//! ```text
//! plan    names of tensors -> ranges of sources -> places in one device allocation
//! lane    drive -> pinned ring -> device: one thread, one io_uring, one copy stream; and the other way round
//! driver  what is asked of CUDA, as a trait: the real one, host memory, and a simulated device for tests
//! cufile  drive -> device without the host (GPUDirect Storage), behind a self-test
//! paths   which of the two a load takes, and why not the other
//! ```
//!
//! What a load promises: tensors are handed out when every byte of every tensor is on the device, in the source's order
//! and, from a pool, checked. A load that failed, was cancelled or ran out of time hands out nothing and keeps nothing.
//!
//! Everything here is built and tested without a GPU. CUDA is loaded at run time; that it is not there is an ordinary error.

pub mod admission;
pub mod autotune;
pub mod control;
pub mod cufile;
pub mod driver;
pub mod error;
pub mod lane;
pub mod load;
pub mod paged;
pub mod paths;
pub mod plan;
pub mod remembered;
pub mod report;
pub mod residency;
pub mod save;
pub mod source;
pub mod window;

pub use admission::Priority;
pub use control::{Cancel, Control};
pub use driver::{Batch, DeviceInfo, DeviceMemory, Direction, Driver, Part, Stream};
pub use error::{Error, ErrorKind, Result};
pub use lane::{CachedMode, Lane, LaneOptions, PinnedTier};
pub use load::{Loaded, LoadedTensor, load, load_by, load_into};
pub use paths::{PathChoice, PathOptions, Paths};
pub use plan::{Plan, PlanOptions, Shard};
pub use report::{Report, SaveReport};
pub use save::{SaveOptions, SaveTensor, save};
pub use source::{CachePolicy, Source, Verify};
pub use window::{Pin, Window, WindowStats};
