//! `nvtier ls [NAME]`.

use serde_json::json;

use crate::cli::{Global, Ls};
use crate::config::Config;
use crate::failure::Outcome;
use crate::output::{self, Align, Table};
use crate::store::{Entry, Store};
use crate::{names, size, time};

/// Lists a directory; a region lists itself.
pub fn run(global: &Global, config: &Config, args: &Ls) -> Outcome {
    let name = names::normalize(&args.name)?;
    let store = Store::open(&config.pool(args.pool.pool.as_ref())?, true)?;
    store.entry(&name)?;
    let entries = store.list(&name, args.recursive)?;
    if global.json {
        return output::json(&json!({ "pool": store.path(), "name": name, "entries": entries }));
    }
    if entries.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&[
        ("mode", Align::Left),
        ("size", Align::Right),
        ("modified", Align::Left),
        ("name", Align::Left),
    ]);
    for entry in &entries {
        let size = if entry.is_directory() { "-".to_owned() } else { size::human(entry.size) };
        table.row(vec![entry.mode_text(), size, time::utc(entry.modified), shown_name(entry, &name)]);
    }
    output::line(&table.render())
}

/// The path below the listed directory, with a mark for what is no region.
fn shown_name(entry: &Entry, listed: &str) -> String {
    let below =
        entry.path.strip_prefix(listed).map_or(entry.path.as_str(), |rest| rest.trim_start_matches('/'));
    let below = output::printable(if below.is_empty() { entry.name() } else { below });
    match &entry.target {
        Some(target) => format!("{below} -> {}", output::printable(target)),
        None if entry.is_directory() => format!("{below}/"),
        None => below,
    }
}
