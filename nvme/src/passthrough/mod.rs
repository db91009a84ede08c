//! Talking to an NVMe drive in its own commands, past the block layer.
//!
//! ```text
//! admin commands   identify, health, error log    NVME_IOCTL_ADMIN_CMD           [`Drive`]
//! I/O commands     read, write, flush             IORING_OP_URING_CMD            [`Queue`](crate::Queue)
//!                                                 NVME_IOCTL_IO_CMD              where io_uring is refused
//! ```
//!
//! Structures and numbers come from `nvme-sys`; what is decoded here follows the NVM Express Base Specification 2.0 and
//! the NVM Command Set Specification 1.0, of which the comments name the figures.

mod drive;
mod error_log;
mod identify;
pub(crate) mod io;
pub(crate) mod ioctl;
mod smart;
mod status;
pub(crate) mod sysfs;

pub use drive::{Drive, NodeKind};
pub use error_log::ErrorLogEntry;
pub use identify::{Controller, LbaFormat, Namespace, Version};
pub use io::NvmeTarget;
pub use smart::SmartLog;
pub use status::Status;
pub use sysfs::{is_controller, is_nvme_char, namespace_nodes};
