//! What a person does with the stores of a pool: one order at a time, the same whether this process owns the pool or another one does (see
//! [`Session::kv`](crate::Session::kv)).

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{BlockInfo, Key, Moved, NamespaceInfo, Store, StoreOptions, StoreStat, TenantInfo, View};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Pool;

/// How long a store that is being closed is waited for.
const OPEN_WAIT: Duration = Duration::from_secs(5);
/// Bytes of a file that are read or written at a time.
const FILE_BUFFER: usize = 1 << 20;

/// Which blocks of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Select {
    /// Of the namespace with this number; `None`: of any.
    pub namespace: Option<u16>,
    /// Of this tenant; `None`: of any.
    pub tenant: Option<String>,
}

/// What to do with a store. Where it takes keys and none are given, it means all that are selected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Say what the pool's stores are called.
    Names,
    /// Say what is known of every store of the pool, without opening one.
    Watch,
    /// Say what it holds.
    Stat,
    /// List its blocks, in the order in which they came.
    List(Select),
    /// Read every block and compare it with its sum; what is bad is dropped.
    Verify,
    /// Pin blocks, or unpin them. Takes keys.
    Pin {
        /// Which.
        select: Select,
        /// `false`: unpin.
        pinned: bool,
    },
    /// Take blocks out, pinned ones too. Takes keys.
    Remove(Select),
    /// Limit the bytes that a tenant's blocks may have, see [`Store::set_quota`].
    Quota {
        /// Whose.
        tenant: String,
        /// 0: no limit.
        bytes: u64,
    },
    /// Write blocks of one namespace and tenant to a file, see [`Store::export`]. Takes keys.
    Export(Select),
    /// Store the blocks of a file, see [`Store::import`]; the store is made where there is none.
    Import {
        /// Whose they are to be.
        tenant: String,
    },
    /// Remove the store with all of its blocks. `Busy`: somebody has it open.
    Drop,
}

/// A block in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Number of its namespace.
    pub namespace: u16,
    /// Whose it is.
    pub tenant: String,
    /// What is known of it.
    pub block: BlockInfo,
}

/// A store, as who watches sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    /// Its name.
    pub name: String,
    /// What it holds; `None` where nobody has it open: its index is read by whoever opens it.
    pub open: Option<Box<Contents>>,
}

/// What a store holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// All of it.
    pub stat: StoreStat,
    /// Its namespaces.
    pub namespaces: Vec<NamespaceInfo>,
    /// Its tenants.
    pub tenants: Vec<TenantInfo>,
}

/// What an [`Order`] came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// Of [`Order::Names`].
    Names(Vec<String>),
    /// Of [`Order::Watch`].
    Watched(Vec<Watched>),
    /// Of [`Order::Stat`].
    Stat {
        /// The store.
        stat: Box<StoreStat>,
        /// Its namespaces.
        namespaces: Vec<NamespaceInfo>,
        /// Its tenants.
        tenants: Vec<TenantInfo>,
    },
    /// Of [`Order::List`].
    Listed(Vec<Listed>),
    /// Of [`Order::Pin`] and [`Order::Remove`]: blocks that it was done to.
    Count(u64),
    /// Of [`Order::Quota`]: the tenant as he is now.
    Tenant(TenantInfo),
    /// Of [`Order::Verify`], [`Order::Export`] and [`Order::Import`].
    Moved(Moved),
    /// Of [`Order::Drop`].
    Dropped,
}

/// The stores of a pool that this process owns. Opens none, and reads nothing of blocks.
pub fn watch(pool: &Pool) -> Result<Vec<Watched>> {
    let watched = |name: String| Watched {
        open: Store::opened(pool, &name).map(|store| {
            let (stat, namespaces, tenants) = (store.stat(), store.namespaces(), store.tenants());
            Box::new(Contents { stat, namespaces, tenants })
        }),
        name,
    };
    Ok(Store::names(pool)?.into_iter().map(watched).collect())
}

/// Does it, in the process that owns the pool. `progress` gets the blocks looked at so far.
pub(crate) fn carry_out(
    pool: &Pool,
    name: &str,
    order: &Order,
    keys: &[Key],
    file: Option<&File>,
    progress: &mut dyn FnMut(u64),
) -> Result<Report> {
    if *order == Order::Names {
        return Store::names(pool).map(Report::Names);
    }
    if *order == Order::Watch {
        return watch(pool).map(Report::Watched);
    }
    super::check_name(name)?;
    let names = Store::names(pool)?;
    if !matches!(order, Order::Import { .. }) && !names.iter().any(|there| there == name) {
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let context = format!("there is no KV store {name:?} in this pool; there are: {there}");
        return Err(Error::new(ErrorKind::NotFound, context));
    }
    if *order == Order::Drop {
        return Store::remove(pool, name).map(|()| Report::Dropped);
    }
    let file = || file.ok_or_else(|| Error::new(ErrorKind::Protocol, "a file is missing"));
    // Whoever has it open goes on using it; its options stay as they are.
    let options = StoreOptions { name: name.to_owned(), ..StoreOptions::default() };
    let store = Store::share(pool, options, OPEN_WAIT)?;
    Ok(match order {
        Order::Names | Order::Watch | Order::Drop => unreachable!("done above"),
        Order::Stat => Report::Stat {
            stat: Box::new(store.stat()),
            namespaces: store.namespaces(),
            tenants: store.tenants(),
        },
        Order::List(select) => {
            let mut listed = Vec::new();
            for (namespace, tenant, view) in chosen(&store, select)? {
                let list = |(_, block)| Listed { namespace, tenant: tenant.clone(), block };
                listed.extend(in_order(&view).into_iter().map(list));
            }
            Report::Listed(listed)
        }
        Order::Verify => {
            let moved = store.verify(progress)?;
            store.flush()?;
            Report::Moved(moved)
        }
        Order::Pin { select, pinned } => {
            let count = on_each(&store, select, keys, &mut |view, keys| view.pin(keys, *pinned))?;
            Report::Count(count)
        }
        Order::Remove(select) => {
            Report::Count(on_each(&store, select, keys, &mut |view, keys| view.remove(keys))?)
        }
        Order::Quota { tenant, bytes } => {
            store.set_quota(tenant, *bytes)?;
            store.flush()?;
            let found = store.tenants().into_iter().find(|info| info.name == *tenant);
            Report::Tenant(found.ok_or_else(|| Error::new(ErrorKind::NotFound, "the tenant is gone"))?)
        }
        Order::Export(select) => {
            let (print, view) = one(&store, select)?;
            let keys = match keys {
                [] => in_order(&view).into_iter().map(|(key, _)| key).collect(),
                keys => keys.to_vec(),
            };
            let mut out = BufWriter::with_capacity(FILE_BUFFER, file()?);
            let moved = store.export(&view, &print, &keys, &mut out)?;
            out.flush().map_err(|e| Error::io("write an export of a KV store", e))?;
            Report::Moved(moved)
        }
        Order::Import { tenant } => {
            Report::Moved(store.import(&mut BufReader::with_capacity(FILE_BUFFER, file()?), tenant)?)
        }
    })
}

fn in_order(view: &View) -> Vec<(Key, BlockInfo)> {
    let mut blocks = view.blocks();
    blocks.sort_by_key(|(_, info)| info.generation);
    blocks
}

/// Namespaces and tenants that have blocks and are asked for.
fn chosen(store: &Store, select: &Select) -> Result<Vec<(u16, String, View)>> {
    let mut views = store.views()?;
    views.retain(|(namespace, tenant, _)| {
        select.namespace.is_none_or(|wanted| wanted == *namespace)
            && select.tenant.as_ref().is_none_or(|wanted| wanted == tenant)
    });
    Ok(views)
}

/// The one that is asked for, and its fingerprint.
fn one(store: &Store, select: &Select) -> Result<(Vec<u8>, View)> {
    let mut views = chosen(store, select)?;
    let (namespace, view) = match (views.pop(), views.len()) {
        (Some((namespace, _, view)), 0) => (namespace, view),
        (None, _) => {
            let context = "no namespace and tenant of the store has such blocks";
            return Err(Error::new(ErrorKind::NotFound, context));
        }
        (Some(_), more) => {
            let context = format!(
                "blocks of {} namespaces and tenants fit, and one is wanted: choose with --namespace and --tenant (`nvtier kv stat` lists them)",
                more + 1
            );
            return Err(Error::new(ErrorKind::InvalidArgument, context));
        }
    };
    let mut namespaces = store.namespaces();
    let at = namespaces.iter().position(|info| info.id == namespace);
    let info = at.map(|at| namespaces.swap_remove(at));
    let info = info.ok_or_else(|| Error::new(ErrorKind::NotFound, "the namespace is gone"))?;
    Ok((info.fingerprint, view))
}

/// Does something to the blocks that are asked for, durably. Returns to how many.
fn on_each(
    store: &Store,
    select: &Select,
    keys: &[Key],
    run: &mut dyn FnMut(&View, &[Key]) -> usize,
) -> Result<u64> {
    let mut count = 0;
    for (_, _, view) in chosen(store, select)? {
        let all: Vec<Key>;
        let keys = match keys {
            [] => {
                all = view.blocks().into_iter().map(|(key, _)| key).collect();
                &all
            }
            keys => keys,
        };
        count += run(&view, keys) as u64;
    }
    store.flush()?;
    Ok(count)
}
