//! `nvtier plan`: what a model needs of a machine, where each part of it will live, and how fast it can be at best.
//!
//! ```text
//! model      config.json, safetensors, GGUF, a name -> parameters by kind, elements of the KV cache by layer
//! precision  parameters -> bytes
//! machine    GPU, memory, drives, and how fast each is: measured, given, from the table, or nominal
//! place      parts -> VRAM, RAM, NVMe
//! infer      times of loading, of the first token, of each further one
//! train      time of a step, and what it writes
//! buy        the same plan with something better in the machine, ranked by effect
//! seed       the sizing tables that the project started from, by formula
//! ```
//!
//! Nothing here looks at the machine it runs on: what is known of it comes in as figures with their origin. Times are floors, made of
//! ceilings; the one that binds is named.
#![forbid(unsafe_code)]

pub mod buy;
pub mod infer;
pub mod machine;
pub mod model;
pub mod place;
pub mod precision;
pub mod seed;
pub mod train;

mod make;

pub use machine::{Drive, Figure, Gpu, Machine, Origin};
pub use make::{Plan, Request, Task, make};
pub use model::Model;
