//! The index of a KV store: its records alone, and a store that is opened over them and used.

use engine::fuzzing;

use crate::digest;

/// Records, and back.
pub fn records(input: &[u8]) -> u64 {
    digest(&fuzzing::kv_records(input).map_err(|error| error.kind()))
}

/// A store: it opens, serves nothing wrong, takes blocks, and comes back as it was.
pub fn store(input: &[u8]) -> u64 {
    digest(&fuzzing::kv_store(input).map_err(|error| error.kind()))
}
