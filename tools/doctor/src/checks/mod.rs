//! The checks, one file an area.

mod drive;
pub(crate) mod filesystem;
mod fuse;
pub(crate) mod gpu;
mod gpudirect;
mod health;
mod io;
mod iommu;
mod memory;
pub(crate) mod platform;

use std::path::Path;

use crate::{Finding, System};

/// Looks at one area.
pub(crate) type Check = fn(&System, &Path, &mut Vec<Finding>);

/// All of them, in the order in which they are shown.
pub(crate) const ALL: [Check; 9] = [
    platform::check,
    memory::check,
    io::check,
    fuse::check,
    filesystem::check,
    drive::check,
    iommu::check,
    gpu::check,
    gpudirect::check,
];
