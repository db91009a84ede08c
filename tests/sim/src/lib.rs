//! Simulated power cuts: random workloads on a real engine pool over simulated devices, and a model that knows what must be
//! there when the power comes back.
//!
//! ```text
//! plan (from a seed)          pool on sim devices      model
//!   acts  ------------------> happen to both; every difference is a violation
//!   power cut at the n-th write or flush of any device
//!   survivors: of what was not flushed any subset, in any order, torn between blocks
//!   power cuts while the pool is opened again
//!   open, examine, compare --> the tree is one that a snapshot had: the last that is known to be durable, or one begun since
//!   ... again ...
//! ```
//!
//! - `act.rs`: what a workload does. `plan.rs`: a seed's workload. `world.rs`: acts on pool and model.
//! - `model.rs`: what is promised. `check.rs`: what is looked at after a cut.
//! - `driver.rs`: a plan from beginning to end; `shrink.rs`: the smallest plan that still fails.
//! - `kv.rs`: a KV store in the pool, and what it promises.
//! - `exhaustive.rs`: short workloads with a cut after every write. `flips.rs`: bits that turn over at rest.
//! - `large.rs`: the time to open a large pool after a crash.
//!
//! Several actors have handles open at a time and their acts interleave as the seed says; they all run on one thread, so that a seed
//! repeats itself to the last write. `threads.rs` is the other way: real threads, each with a smaller model of its own.
//!
//! What cannot be simulated so: pools with a directory member, whose bytes go through a file system,
//! nor the catalog in a file.
#![forbid(unsafe_code)]

pub mod act;
pub mod check;
pub mod config;
pub mod content;
pub mod driver;
pub mod exhaustive;
pub mod flips;
pub mod kv;
pub mod large;
pub mod model;
pub mod plan;
pub mod sabotage;
pub mod shrink;
pub mod threads;
pub mod world;
