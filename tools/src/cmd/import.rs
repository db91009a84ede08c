//! `nvtier import SRC NAME`: the command. The work is in [`crate::transfer`].

use serde_json::json;

use crate::cli::{Global, Import};
use crate::config::Config;
use crate::failure::Outcome;
use crate::source::{ObjectOptions, Source};
use crate::store::Store;
use crate::transfer::{self, ImportOptions};
use crate::{names, output, size};

/// Range requests at a time, where neither the command line nor the configuration says.
const CONNECTIONS: u32 = 8;

/// Imports.
pub fn run(global: &Global, config: &Config, args: &Import) -> Outcome {
    let name = names::normalize_new(&args.name)?;
    let pool = config.pool(args.pool.pool.as_ref())?;
    let connections = args.connections.or(config.import.connections).unwrap_or(CONNECTIONS) as usize;
    let source = Source::parse(&args.src, &ObjectOptions { connections, part_size: args.part_size })?;
    let options = ImportOptions { replace: args.force, check: !args.no_check, resume: !args.no_resume };

    let tried = |failure: crate::failure::Failure| {
        failure.while_doing(format!("import {} as `{}`", args.src, output::printable(&name)))
    };
    let listing = source.list(args.recursive).map_err(tried)?;
    if options.check {
        transfer::check(&source, &listing).map_err(tried)?;
    }
    let metrics = crate::store::bind_metrics(args.metrics)?;
    let store = Store::open(&pool, false)?;
    let scraped = store.serve_metrics(metrics)?;
    let done = transfer::import(global, &store, &source, &listing, &name, &options).map_err(tried)?;
    drop(scraped);
    store.close()?;
    if global.json {
        return output::json(&json!({
            "pool": pool,
            "name": name,
            "source": args.src,
            "regions": listing.items.len(),
            "bytes": listing.len(),
            "resumed_bytes": done.resumed_bytes,
            "seconds": done.seconds,
            "bytes_per_second": done.rate(),
        }));
    }
    let resumed = match done.resumed_bytes {
        0 => String::new(),
        bytes => format!(", {} of it by an earlier run", size::human(bytes)),
    };
    output::line(&format!(
        "{}: {} in {} ({}, {}{resumed})",
        output::printable(&name),
        size::human(listing.len()),
        if listing.items.len() == 1 {
            "1 region".to_owned()
        } else {
            format!("{} regions", listing.items.len())
        },
        size::duration(done.seconds),
        size::rate(done.rate()),
    ))
}
