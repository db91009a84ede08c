//! What can be known to be wrong with a source before its first byte is copied.

use std::collections::BTreeSet;

use engine::ErrorKind;

use crate::failure::{Failure, Outcome, code};
use crate::names;
use crate::output::printable;
use crate::source::{Item, Listing, Source};

/// Larger shard indexes are not read; those of real models have a few MB.
const INDEX_MAX: u64 = 64 << 20;

/// Parses every tensor header and shard index. A file that lies would only fail later, in the framework that opens it.
pub fn check(source: &Source, listing: &Listing) -> Outcome {
    let mut names = BTreeSet::new();
    for directory in &listing.directories {
        names::normalize_entry(directory)?;
    }
    for item in &listing.items {
        crate::interrupt::check()?;
        if !item.name.is_empty() {
            names::normalize_entry(&item.name)?;
        }
        names.insert(item.name.as_str());
        check_tensors(source, item)?;
    }
    for item in
        listing.items.iter().filter(|item| item.name.ends_with(".index.json") && item.len <= INDEX_MAX)
    {
        check_index(source, item, &names)?;
    }
    Ok(())
}

/// The name that decides what kind of file it is: of a single file, that of the source.
fn file_name(item: &Item) -> String {
    if item.name.is_empty() { item.origin.describe() } else { item.name.clone() }
}

fn check_tensors(source: &Source, item: &Item) -> Outcome {
    let mut failed = None;
    let parsed = engine::tensors::parse(&file_name(item), item.len, &mut |offset, buffer| {
        source.read_at(item, offset, buffer).map_err(|failure| {
            let error = engine::Error::new(ErrorKind::Io, failure.message.clone());
            failed = Some(failure);
            error
        })
    });
    match (parsed, failed) {
        // The source could not be read: that is not the header's fault.
        (_, Some(failure)) => Err(failure),
        (Ok(_), None) => Ok(()),
        (Err(error), None) => {
            let message = format!("{}: {}", item.origin.describe(), crate::failure::describe(&error));
            Err(Failure::new(code::CORRUPT, "Malformed", message).hint(
                "was the download complete? Nothing was imported; --no-check imports the bytes as they are",
            ))
        }
    }
}

/// A snapshot whose download was interrupted has an index that names shards which are not there.
fn check_index(source: &Source, item: &Item, names: &BTreeSet<&str>) -> Outcome {
    let mut text = vec![0; item.len as usize];
    source.read_at(item, 0, &mut text)?;
    let Ok(index) = serde_json::from_slice::<serde_json::Value>(&text) else {
        return Ok(());
    };
    let Some(map) = index.get("weight_map").and_then(|map| map.as_object()) else {
        return Ok(());
    };
    let directory = item.name.rsplit_once('/').map_or("", |(directory, _)| directory);
    let missing: BTreeSet<&str> = map
        .values()
        .filter_map(|shard| shard.as_str())
        .filter(|shard| !names.contains(names::join(directory, shard).as_str()))
        .collect();
    // A single index file, imported alone, names shards that nobody claimed to be here.
    let (Some(first), false) = (missing.first(), item.name.is_empty()) else {
        return Ok(());
    };
    let message = format!(
        "{} names {} shards that are not there, the first is {}",
        item.origin.describe(),
        missing.len(),
        printable(first)
    );
    Err(Failure::new(code::CORRUPT, "Malformed", message)
        .hint("was the download complete? Nothing was imported; --no-check imports what is there"))
}
