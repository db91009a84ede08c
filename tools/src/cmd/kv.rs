//! `nvtier kv`: the KV stores of a pool that this process owns while it runs.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;

use engine::kv::{Key, Moved, StoreOptions, View};
use serde_json::{Value, json};

use crate::cli::{Global, Kv, KvCommand, KvSelect};
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Align, Table};
use crate::store::Store as Pool;
use crate::{interrupt, size, time};

/// Opens the store and does what is asked.
pub fn run(global: &Global, config: &Config, args: &Kv) -> Outcome {
    let pool = Pool::open(&config.pool(args.pool.pool.as_ref())?, false)?;
    let Some(engine) = pool.pool().cloned() else {
        let pid = pool.other_owner().unwrap_or(0);
        let message =
            format!("{} is owned by process {pid}: its KV stores are that process's", pool.path().display());
        return Err(
            Failure::new(code::BUSY, "Busy", message).hint("unmount the pool, or wait for its owner to end")
        );
    };
    let makes = matches!(args.command, KvCommand::Import(_));
    if !makes && !engine::kv::Store::names(&engine)?.contains(&args.store) {
        let message = format!(
            "there is no KV store `{}` in the pool {}",
            output::printable(&args.store),
            pool.path().display()
        );
        return Err(Failure::not_found(message).hint(format!("there are: {}", names(&engine)?)));
    }
    let options = StoreOptions { name: args.store.clone(), ..StoreOptions::default() };
    let store = engine::kv::Store::open(&engine, options)?;
    let done = match &args.command {
        KvCommand::Stat => stat(global, &store),
        KvCommand::Ls(select) => ls(global, &store, select),
        KvCommand::Verify => verify(global, &store),
        KvCommand::Evict(evict) => {
            let views = chosen(&store, &evict.select)?;
            let keys = keys(&evict.keys)?;
            if keys.is_empty()
                && !evict.all
                && evict.select.namespace.is_none()
                && evict.select.tenant.is_none()
            {
                return Err(Failure::usage(
                    "evict what? name keys, a --namespace or a --tenant, or say --all",
                ));
            }
            let mut removed = 0;
            for (_, _, view) in &views {
                let all = || view.blocks().into_iter().map(|(key, _)| key).collect();
                removed += view.remove(&if keys.is_empty() { all() } else { keys.clone() });
            }
            store.flush()?;
            match global.json {
                true => output::json(&json!({ "removed": removed })),
                false => output::line(&format!("{removed} blocks removed")),
            }
        }
        KvCommand::Export(export) => {
            let view = one(&store, &export.select)?;
            write_out(global, &store, &view, &keys(&export.keys)?, &export.file)
        }
        KvCommand::Import(import) => {
            let tried = || format!("read {}", import.file.display());
            let file = File::open(&import.file).map_err(|error| Failure::io(tried(), &error))?;
            let tenant = import.tenant.as_deref().unwrap_or_default();
            let moved = store.import(&mut BufReader::with_capacity(1 << 20, file), tenant);
            let moved = moved.map_err(|error| Failure::from(error).while_doing(tried()))?;
            told(global, "stored", &moved)
        }
    };
    store.close()?;
    drop(engine);
    pool.close()?;
    done
}

fn names(pool: &engine::Pool) -> Outcome<String> {
    let names = engine::kv::Store::names(pool)?;
    Ok(if names.is_empty() { "none".to_owned() } else { names.join(", ") })
}

fn keys(words: &[String]) -> Outcome<Vec<Key>> {
    let key = |word: &String| Key::from_hex(word).map_err(|error| Failure::usage(error.to_string()));
    words.iter().map(key).collect()
}

/// Namespaces and tenants that have blocks and are asked for.
fn chosen(store: &engine::kv::Store, select: &KvSelect) -> Outcome<Vec<(u16, String, View)>> {
    let mut views = store.views()?;
    views.retain(|(namespace, tenant, _)| {
        select.namespace.is_none_or(|wanted| wanted == *namespace)
            && select.tenant.as_ref().is_none_or(|wanted| wanted == tenant)
    });
    Ok(views)
}

/// The one that is asked for.
fn one(store: &engine::kv::Store, select: &KvSelect) -> Outcome<(u16, View)> {
    let mut views = chosen(store, select)?;
    match (views.pop(), views.len()) {
        (Some((namespace, _, view)), 0) => Ok((namespace, view)),
        (None, _) => Err(Failure::not_found("no namespace and tenant of the store has such blocks")),
        (Some(_), more) => Err(Failure::usage(format!("blocks of {} namespaces and tenants fit", more + 1))
            .hint("choose with --namespace and --tenant; `nvtier kv stat` lists them")),
    }
}

fn stat(global: &Global, store: &engine::kv::Store) -> Outcome {
    let (stat, namespaces, tenants) = (store.stat(), store.namespaces(), store.tenants());
    if global.json {
        return output::json(&json!({ "stat": stat, "namespaces": namespaces, "tenants": tenants }));
    }
    let mut text = format!(
        "blocks      {} ({}), {} pinned\nallocated   {} of {}\nwritten     {} today (UTC), {} ever",
        stat.blocks,
        size::human(stat.used_bytes),
        stat.pinned,
        size::human(stat.allocated_bytes),
        size::human(stat.budget_bytes),
        size::human(stat.written_today_bytes),
        size::human(stat.written_bytes),
    );
    if stat.bad_index_pages > 0 {
        text.push_str(&format!("\nindex       {} pages could not be read", stat.bad_index_pages));
    }
    let mut table = Table::new(&[
        ("namespace", Align::Right),
        ("block", Align::Right),
        ("blocks", Align::Right),
        ("fingerprint", Align::Left),
    ]);
    for namespace in namespaces {
        let print: String = namespace.fingerprint.iter().take(24).map(|byte| format!("{byte:02x}")).collect();
        let block = size::human(namespace.block_bytes.into());
        table.row(vec![namespace.id.to_string(), block, namespace.blocks.to_string(), print]);
    }
    text.push_str(&format!("\n\n{}", table.render()));
    let named: Vec<_> = tenants.into_iter().filter(|tenant| !tenant.name.is_empty()).collect();
    if !named.is_empty() {
        let mut table =
            Table::new(&[("tenant", Align::Left), ("used", Align::Right), ("quota", Align::Right)]);
        for tenant in named {
            let quota = match tenant.quota_bytes {
                0 => "none".to_owned(),
                bytes => size::human(bytes),
            };
            table.row(vec![output::printable(&tenant.name), size::human(tenant.used_bytes), quota]);
        }
        text.push_str(&format!("\n\n{}", table.render()));
    }
    output::line(&text)
}

fn ls(global: &Global, store: &engine::kv::Store, select: &KvSelect) -> Outcome {
    let mut listed: Vec<Value> = Vec::new();
    let mut table = Table::new(&[
        ("namespace", Align::Right),
        ("tenant", Align::Left),
        ("key", Align::Left),
        ("pinned", Align::Left),
        ("expires", Align::Left),
    ]);
    for (namespace, tenant, view) in chosen(store, select)? {
        let mut blocks = view.blocks();
        // As they came.
        blocks.sort_by_key(|(_, info)| info.generation);
        for (_, info) in blocks {
            interrupt::check()?;
            if global.json {
                listed.push(json!({ "namespace": namespace, "tenant": tenant, "block": info }));
                continue;
            }
            let expires = match info.expires {
                0 => "never".to_owned(),
                at => time::utc(at.into()),
            };
            let pinned = if info.pinned { "yes" } else { "no" };
            let name = output::printable(&tenant);
            table.row(vec![namespace.to_string(), name, info.key, pinned.to_owned(), expires]);
        }
    }
    if global.json { output::json(&listed) } else { output::line(&table.render()) }
}

fn verify(global: &Global, store: &engine::kv::Store) -> Outcome {
    let moved = store.verify(&mut |_| {
        if interrupt::requested() {
            // Nothing is half done: what is bad is dropped block by block.
            output::note("nvtier: error: interrupted");
            std::process::exit(code::INTERRUPTED.into());
        }
    })?;
    match global.json {
        true => output::json(&json!({ "blocks": moved.blocks, "bad": moved.bad }))?,
        false => output::line(&format!(
            "{} blocks are good, {} were bad and are dropped",
            moved.blocks, moved.bad
        ))?,
    }
    match moved.bad {
        0 => Ok(()),
        bad => Err(Failure::corrupt(format!("{bad} blocks were not what was stored"))
            .hint("they are dropped: whoever misses them computes and stores them again")),
    }
}

fn write_out(
    global: &Global,
    store: &engine::kv::Store,
    (namespace, view): &(u16, View),
    keys: &[Key],
    path: &Path,
) -> Outcome {
    let namespaces = store.namespaces();
    let print = namespaces.get(usize::from(*namespace)).map(|namespace| namespace.fingerprint.clone());
    let print = print.ok_or_else(|| Failure::not_found("the namespace is gone"))?;
    let keys = match keys {
        [] => {
            let mut blocks = view.blocks();
            blocks.sort_by_key(|(_, info)| info.generation);
            blocks.into_iter().map(|(key, _)| key).collect()
        }
        keys => keys.to_vec(),
    };
    // Whole or not at all: under another name until it is.
    let mut part = path.as_os_str().to_owned();
    part.push(".nvtier-part");
    let failed = |error: std::io::Error| Failure::io(format!("write {}", path.display()), &error);
    let done = (|| {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&part).map_err(failed)?);
        let moved = store.export(view, &print, &keys, &mut file)?;
        file.flush().map_err(failed)?;
        file.get_ref().sync_all().map_err(failed)?;
        fs::rename(&part, path).map_err(failed)?;
        Ok(moved)
    })();
    match done {
        Ok(moved) => told(global, "written", &moved),
        Err(failure) => {
            let _ = fs::remove_file(&part);
            Err(failure)
        }
    }
}

fn told(global: &Global, what: &str, moved: &Moved) -> Outcome {
    let Moved { blocks, skipped, refused, bad } = *moved;
    if global.json {
        return output::json(&json!({ what: blocks, "skipped": skipped, "refused": refused, "bad": bad }));
    }
    let mut text = format!("{blocks} blocks {what}");
    for (count, why) in
        [(skipped, "passed over"), (refused, "refused: no room"), (bad, "damaged and dropped")]
    {
        if count > 0 {
            text.push_str(&format!(", {count} {why}"));
        }
    }
    output::line(&text)
}
