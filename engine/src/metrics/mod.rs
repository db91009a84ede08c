//! Metrics of a pool for Prometheus: the text, and a listener that answers scrapes with it, for whoever owns the pool, with and without a mount.

mod serve;
mod text;

pub use serve::{Bound, Server, Source, parse_address};
pub use text::{Kind, build, family, owner};
