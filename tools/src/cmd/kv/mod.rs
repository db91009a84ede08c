//! `nvtier kv`: the KV stores of a pool, whether this process owns it or a mount or an inference server does.

mod top;

use std::fs::{self, File};
use std::path::Path;

use engine::ErrorKind;
use engine::kv::admin::{Listed, Order, Report, Select};
use engine::kv::{Key, Moved, NamespaceInfo, StoreStat, TenantInfo};
use serde_json::json;

use crate::cli::{Global, Kv, KvBlocks, KvCommand, KvQuota, KvSelect};
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Align, Table};
use crate::store::Store as Pool;
use crate::{interrupt, size, time};

/// Opens the pool and does what is asked.
pub fn run(global: &Global, config: &Config, args: &Kv) -> Outcome {
    let path = config.pool(args.pool.pool.as_ref())?;
    if let KvCommand::Top(top) = &args.command {
        return top::run(global, &path, args.store.as_deref(), top);
    }
    let pool = Pool::open(&path, false)?;
    let done = carry_out(global, &pool, args);
    pool.close()?;
    done
}

fn carry_out(global: &Global, pool: &Pool, args: &Kv) -> Outcome {
    let store = args.store.as_deref().unwrap_or("default");
    let ask = |order: Order, keys: &[Key], file: Option<&File>| -> Outcome<Report> {
        let watch = &mut |_| {
            if interrupt::requested() {
                // Nothing is half done: blocks are looked at, dropped and stored one by one. An owner finishes what was begun.
                output::note("nvtier: error: interrupted");
                std::process::exit(code::INTERRUPTED.into());
            }
        };
        let report = pool.session().kv(store, &order, keys, file, watch);
        report.map_err(|error| match error.kind() {
            ErrorKind::InvalidArgument => Failure::usage(error.chain()),
            _ => error.into(),
        })
    };
    match &args.command {
        KvCommand::Stat => match ask(Order::Stat, &[], None)? {
            Report::Stat { stat, namespaces, tenants } => tell_stat(global, &stat, &namespaces, &tenants),
            other => Err(odd(&other)),
        },
        KvCommand::Ls(select) => match ask(Order::List(selected(select)), &[], None)? {
            Report::Listed(blocks) => tell_blocks(global, &blocks),
            other => Err(odd(&other)),
        },
        KvCommand::Verify => match ask(Order::Verify, &[], None)? {
            Report::Moved(moved) => tell_verified(global, &moved),
            other => Err(odd(&other)),
        },
        KvCommand::Evict(blocks) => {
            let keys = named("evict", blocks)?;
            tell_count(global, "removed", ask(Order::Remove(selected(&blocks.select)), &keys, None)?)
        }
        KvCommand::Pin(blocks) => {
            let (keys, select) = (named("pin", blocks)?, selected(&blocks.select));
            tell_count(global, "pinned", ask(Order::Pin { select, pinned: true }, &keys, None)?)
        }
        KvCommand::Unpin(blocks) => {
            let (keys, select) = (named("unpin", blocks)?, selected(&blocks.select));
            tell_count(global, "unpinned", ask(Order::Pin { select, pinned: false }, &keys, None)?)
        }
        KvCommand::Quota(KvQuota { tenant: Some(tenant), size, clear }) if *clear || size.is_some() => {
            let order = Order::Quota { tenant: tenant.clone(), bytes: size.unwrap_or(0) };
            match ask(order, &[], None)? {
                Report::Tenant(tenant) => tell_tenants(global, &[tenant]),
                other => Err(odd(&other)),
            }
        }
        KvCommand::Quota(KvQuota { tenant, .. }) => match ask(Order::Stat, &[], None)? {
            Report::Stat { mut tenants, .. } => {
                tenants.retain(|info| tenant.as_ref().is_none_or(|wanted| *wanted == info.name));
                match (tenants.is_empty(), tenant) {
                    (true, Some(name)) => Err(Failure::not_found(format!(
                        "the store has no tenant {}",
                        output::printable(name)
                    ))
                    .hint("`nvtier kv quota` lists them; one may be limited before his first block: nvtier kv quota NAME SIZE")),
                    _ => tell_tenants(global, &tenants),
                }
            }
            other => Err(odd(&other)),
        },
        KvCommand::Export(export) => {
            let keys = keys(&export.keys)?;
            let order = Order::Export(selected(&export.select));
            let moved = written(&export.file, |file| match ask(order, &keys, Some(file))? {
                Report::Moved(moved) => Ok(moved),
                other => Err(odd(&other)),
            })?;
            told(global, "written", &moved)
        }
        KvCommand::Import(import) => {
            let tried = || format!("read {}", import.file.display());
            let file = File::open(&import.file).map_err(|error| Failure::io(tried(), &error))?;
            let tenant = import.tenant.clone().unwrap_or_default();
            match ask(Order::Import { tenant }, &[], Some(&file)).map_err(|e| e.while_doing(tried()))? {
                Report::Moved(moved) => told(global, "stored", &moved),
                other => Err(odd(&other)),
            }
        }
        KvCommand::Top(_) => unreachable!("done by `run`"),
        KvCommand::Drop => {
            ask(Order::Drop, &[], None)?;
            match global.json {
                true => output::json(&json!({ "dropped": store })),
                false => output::line(&format!("KV store {} is dropped", output::printable(store))),
            }
        }
    }
}

/// The owner answered another question.
fn odd(report: &Report) -> Failure {
    let text: String = format!("{report:?}").chars().take(100).collect();
    Failure::new(code::FAILED, "Protocol", format!("the pool's owner answered with something else: {text}"))
}

fn keys(words: &[String]) -> Outcome<Vec<Key>> {
    let key = |word: &String| Key::from_hex(word).map_err(|error| Failure::usage(error.to_string()));
    words.iter().map(key).collect()
}

fn selected(select: &KvSelect) -> Select {
    Select { namespace: select.namespace, tenant: select.tenant.clone() }
}

/// Keys of a command that changes blocks; all of them only where that is said.
fn named(doing: &str, blocks: &KvBlocks) -> Outcome<Vec<Key>> {
    let keys = keys(&blocks.keys)?;
    let select = &blocks.select;
    if keys.is_empty() && !blocks.all && select.namespace.is_none() && select.tenant.is_none() {
        return Err(Failure::usage(format!(
            "{doing} what? name keys, a --namespace or a --tenant, or say --all"
        )));
    }
    Ok(keys)
}

fn tell_count(global: &Global, what: &str, report: Report) -> Outcome {
    match report {
        Report::Count(count) if global.json => output::json(&json!({ what: count })),
        Report::Count(count) => output::line(&format!("{count} blocks {what}")),
        other => Err(odd(&other)),
    }
}

fn tell_stat(
    global: &Global,
    stat: &StoreStat,
    namespaces: &[NamespaceInfo],
    tenants: &[TenantInfo],
) -> Outcome {
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
    if tenants.len() > 1 {
        text.push_str(&format!("\n\n{}", tenant_table(tenants)));
    }
    output::line(&text)
}

fn tell_tenants(global: &Global, tenants: &[TenantInfo]) -> Outcome {
    match global.json {
        true => output::json(&tenants),
        false => output::line(&tenant_table(tenants)),
    }
}

fn tenant_table(tenants: &[TenantInfo]) -> String {
    let mut table = Table::new(&[("tenant", Align::Left), ("used", Align::Right), ("quota", Align::Right)]);
    for tenant in tenants {
        let name = match tenant.name.as_str() {
            "" => "(no name)".to_owned(),
            name => output::printable(name),
        };
        let quota = match tenant.quota_bytes {
            0 => "none".to_owned(),
            bytes => size::human(bytes),
        };
        table.row(vec![name, size::human(tenant.used_bytes), quota]);
    }
    table.render()
}

fn tell_blocks(global: &Global, blocks: &[Listed]) -> Outcome {
    if global.json {
        return output::json(&blocks);
    }
    let mut table = Table::new(&[
        ("namespace", Align::Right),
        ("tenant", Align::Left),
        ("key", Align::Left),
        ("pinned", Align::Left),
        ("expires", Align::Left),
    ]);
    for Listed { namespace, tenant, block } in blocks {
        interrupt::check()?;
        let expires = match block.expires {
            0 => "never".to_owned(),
            at => time::utc(at.into()),
        };
        let pinned = if block.pinned { "yes" } else { "no" };
        let name = output::printable(tenant);
        table.row(vec![namespace.to_string(), name, block.key.clone(), pinned.to_owned(), expires]);
    }
    output::line(&table.render())
}

fn tell_verified(global: &Global, moved: &Moved) -> Outcome {
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

/// Makes a file, whole or not at all: it has another name until it is.
fn written(path: &Path, write: impl FnOnce(&File) -> Outcome<Moved>) -> Outcome<Moved> {
    let mut part = path.as_os_str().to_owned();
    part.push(".nvtier-part");
    let failed = |error: std::io::Error| Failure::io(format!("write {}", path.display()), &error);
    let done = (|| {
        let file = File::create(&part).map_err(failed)?;
        let moved = write(&file)?;
        file.sync_all().map_err(failed)?;
        fs::rename(&part, path).map_err(failed)?;
        Ok(moved)
    })();
    if done.is_err() {
        let _ = fs::remove_file(&part);
    }
    done
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
