//! Micro-benches of the lower crates: `cargo bench -p nvtier-benches --bench NAME`.
//!
//! - `queue`: operations and bytes a second of `nvme::Queue` on a file without a drive under it (`/dev/shm`).
//! - `ram_tier`: hits, and misses with eviction, by 1 and 2 threads.
//! - `region_read`: verified reads of a raw pool on `/dev/shm` against `pread` of the same bytes: GB/s, CPU seconds a GiB, ratios.
