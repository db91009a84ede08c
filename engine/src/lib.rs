//! Named regions on devices: pools, catalogs, drafts, the RAM tier. Knows no CUDA and no kernel file system.
#![forbid(unsafe_code)]
