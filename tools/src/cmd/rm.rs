//! `nvtier rm NAME...`.

use serde_json::json;

use crate::cli::{Global, Rm};
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::store::Store;
use crate::{interrupt, names, output};

/// Removes them. All names are looked at before the first one goes.
pub fn run(global: &Global, config: &Config, args: &Rm) -> Outcome {
    let names: Vec<String> =
        args.names.iter().map(|name| names::normalize_entry(name)).collect::<Outcome<_>>()?;
    let store = Store::open(&config.pool(args.pool.pool.as_ref())?, false)?;
    let mut found = Vec::new();
    for name in names {
        let entry = match store.entry(&name) {
            Err(failure) if args.force && failure.code == code::NOT_FOUND => continue,
            entry => entry?,
        };
        if entry.is_directory() && !args.recursive && !store.list(&name, false)?.is_empty() {
            let message =
                format!("remove `{}`: it is a directory that is not empty", output::printable(&name));
            return Err(
                Failure::new(code::FAILED, "NotEmpty", message).hint("add -r to remove all that is in it")
            );
        }
        found.push(name);
    }
    for name in &found {
        interrupt::check()?;
        store.remove(name, args.recursive)?;
    }
    let path = store.path().to_owned();
    store.close()?;
    if global.json {
        return output::json(&json!({ "pool": path, "removed": found }));
    }
    Ok(())
}
