//! The catalog: everything but the bytes, in one redb database (<https://docs.rs/redb>) that only ever moves from one whole
//! snapshot of the tree to the next.
//!
//! redb lies in a file of member 0, or in its catalog zone when that is raw; [`open`](Catalog::open) takes any
//! [`StorageBackend`]. Tables (keys and values are drawn in `docs/format.md`):
//!
//! ```text
//! meta     "pool"                 counters, generation
//! nodes    node                   attributes, link target, where the content is when it is one file
//! entries  directory . name       node, kind
//! xattrs   node . name            value
//! layouts  node . part            extents and checksums, see layout/record.rs
//! ```
//!
//! redb does its own page checksums, but looks at them only when it is told to, and may panic on pages that were changed behind
//! its back. So: small catalogs are checked whole at open, every record has a sum of its own, and each call is [`guard`]ed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableError};

use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::layout::record::Changes;
use crate::namespace::record::{node_key, split_key};
use crate::types::NodeId;

mod ahead;
pub(crate) mod backend;
mod checked;
pub(crate) mod load;
pub(crate) mod store;
pub(crate) mod zone;

#[cfg(test)]
mod tests;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const NODES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("nodes");
const ENTRIES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("entries");
const XATTRS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("xattrs");
const LAYOUTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("layouts");
const META_KEY: &str = "pool";
const META_VERSION: u8 = 1;
/// No pool ever comes to it, counting nodes, files or generations.
const NUMBER_LIMIT: u64 = 1 << 62;
const META_LEN: usize = 1 + 16 + 8 + 8 + 8 + 8;
/// Up to this size redb checks every page at open, unless told otherwise. A larger catalog is committed with what redb calls quick repair: in two
/// phases, and with the state of its page allocator, so that opening it after a crash needs no walk over all pages.
pub(crate) const CHECK_BYTES: u64 = 64 << 20;
/// redb's page cache in bytes: the tree is in memory, so only layouts and commits read pages.
const CACHE_BYTES: usize = 16 << 20;

/// What the catalog says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    /// The pool it belongs to.
    pub pool: [u8; 16],
    /// Next node number.
    pub next_node: NodeId,
    /// Files with this number or a higher one were made after this snapshot.
    pub next_file: u64,
    /// Rises with every snapshot; also the source of content generations.
    pub generation: u64,
    /// When the snapshot was made, seconds since the epoch.
    pub saved: i64,
}

impl Meta {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(META_LEN + 4);
        value.push(META_VERSION);
        value.extend_from_slice(&self.pool);
        for field in [self.next_node, self.next_file, self.generation, self.saved as u64] {
            value.extend_from_slice(&field.to_le_bytes());
        }
        let sum = crc32fast::hash(&value);
        value.extend_from_slice(&sum.to_le_bytes());
        value
    }

    pub(crate) fn decode(value: &[u8]) -> Result<Meta> {
        let (body, sum) =
            value.split_last_chunk::<4>().ok_or_else(|| corrupt("the catalog's meta record is too short"))?;
        if crc32fast::hash(body).to_le_bytes() != *sum {
            return Err(corrupt("the catalog's meta record fails its checksum"));
        }
        match body.first() {
            Some(&META_VERSION) if body.len() == META_LEN => {}
            Some(&version) if version > META_VERSION => {
                return Err(Error::new(
                    ErrorKind::NewerFormat,
                    format!(
                        "the catalog has version {version}, this program knows {META_VERSION}: use a newer nvtier"
                    ),
                ));
            }
            _ => return Err(corrupt("the catalog's meta record has no known version")),
        }
        let field = |index: usize| {
            u64::from_le_bytes(body[17 + index * 8..25 + index * 8].try_into().unwrap_or_default())
        };
        // One is added to each of them for as long as the pool is used.
        if let Some(absurd) = (0..3).map(field).find(|number| *number >= NUMBER_LIMIT) {
            return Err(corrupt(format!("the catalog's meta record counts to {absurd}")));
        }
        Ok(Meta {
            pool: body[1..17].try_into().unwrap_or_default(),
            next_node: field(0),
            next_file: field(1),
            generation: field(2),
            saved: field(3) as i64,
        })
    }
}

/// A key and its value.
pub(crate) type Record = (Vec<u8>, Vec<u8>);

/// One snapshot's changes, applied in one transaction.
#[derive(Debug)]
pub(crate) struct Batch {
    pub meta: Meta,
    /// Nodes to store.
    pub nodes: Vec<(NodeId, Vec<u8>)>,
    /// Nodes to remove with their extended attributes and layouts.
    pub removed: Vec<NodeId>,
    /// Entries to store or remove, by key.
    pub entries: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// Extended attributes of a node: all there are, by key.
    pub xattrs: Vec<(NodeId, Vec<Record>)>,
    /// Layout records to store and remove.
    pub layouts: Vec<(NodeId, Changes)>,
    /// Nodes whose layout records are removed first.
    pub clear_layouts: Vec<NodeId>,
}

impl Batch {
    pub(crate) fn new(meta: Meta) -> Batch {
        Batch {
            meta,
            nodes: Vec::new(),
            removed: Vec::new(),
            entries: Vec::new(),
            xattrs: Vec::new(),
            layouts: Vec::new(),
            clear_layouts: Vec::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
            && self.removed.is_empty()
            && self.entries.is_empty()
            && self.xattrs.is_empty()
            && self.layouts.is_empty()
            && self.clear_layouts.is_empty()
    }
}

/// An open catalog.
#[derive(Debug)]
pub(crate) struct Catalog {
    /// `None` once closed, and where it could not be opened again after a failure.
    db: RwLock<Option<Database>>,
    closed: AtomicBool,
    /// It could be opened again for reading only: what is written to it stays in memory.
    reads_only: AtomicBool,
    check_bytes: u64,
    window: Arc<ahead::Window>,
}

/// Says how long the parts of an open take.
#[derive(Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(Instant::now())
    }

    pub(crate) fn lap(&mut self, what: &str) {
        tracing::debug!(target: "nvtier::open", micros = self.0.elapsed().as_micros() as u64, "{what}");
        self.0 = Instant::now();
    }
}

fn corrupt(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, context)
}

/// Runs redb code: its errors become ours, and a panic in it becomes `Corrupt`.
fn guard<T>(what: &str, run: impl FnOnce() -> std::result::Result<T, redb::Error>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(convert(what, error)),
        Err(panic) => {
            let said = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            Err(corrupt(format!("{what}: the catalog is damaged ({})", said.unwrap_or("the store gave up"))))
        }
    }
}

fn convert(what: &str, error: redb::Error) -> Error {
    use std::io::ErrorKind as Os;
    let kind = match &error {
        redb::Error::Corrupted(_) | redb::Error::TableTypeMismatch { .. } => ErrorKind::Corrupt,
        redb::Error::UpgradeRequired(_) => ErrorKind::NewerFormat,
        redb::Error::DatabaseAlreadyOpen => ErrorKind::Busy,
        redb::Error::Io(io) => match io.kind() {
            Os::StorageFull | Os::QuotaExceeded => ErrorKind::NoSpace,
            Os::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            Os::InvalidData | Os::UnexpectedEof => ErrorKind::Corrupt,
            _ => ErrorKind::Io,
        },
        _ => ErrorKind::Io,
    };
    Error::with_source(kind, what.to_string(), error)
}

impl Catalog {
    /// Makes a catalog in an empty backend.
    pub(crate) fn create(backend: Box<dyn StorageBackend>, first: &Batch) -> Result<Catalog> {
        let window = Arc::new(ahead::Window::default());
        let watched = ahead::Ahead::new(backend, window.clone())
            .map_err(|error| Error::io("make the catalog", error))?;
        let db = guard("make the catalog", || {
            let db = Database::builder()
                .set_cache_size(CACHE_BYTES)
                .create_with_backend(backend::Boxed(Box::new(watched)))?;
            let txn = db.begin_write()?;
            txn.open_table(META)?;
            txn.open_table(NODES)?;
            txn.open_table(ENTRIES)?;
            txn.open_table(XATTRS)?;
            txn.open_table(LAYOUTS)?;
            txn.commit()?;
            Ok(db)
        })?;
        let catalog = Catalog::over(db, window, CHECK_BYTES);
        catalog.apply(first)?;
        Ok(catalog)
    }

    /// Opens a catalog; redb repairs it first where a crash left it open. `read_only` keeps every write in memory.
    pub(crate) fn open(backend: Box<dyn StorageBackend>, read_only: bool) -> Result<Catalog> {
        Catalog::open_checked(backend, read_only, CHECK_BYTES)
    }

    /// The same, where catalogs of up to `check_bytes` are checked whole.
    pub(crate) fn open_checked(
        backend: Box<dyn StorageBackend>,
        read_only: bool,
        check_bytes: u64,
    ) -> Result<Catalog> {
        let what = "open the catalog";
        let io = |error| Error::io(what, error);
        let len = backend.len().map_err(io)?;
        if len == 0 {
            return Err(corrupt("the catalog is empty"));
        }
        let backend: Box<dyn StorageBackend> =
            if read_only { Box::new(backend::Overlay::new(backend).map_err(io)?) } else { backend };
        let mut clock = Clock::start();
        let window = Arc::new(ahead::Window::default());
        let backend = ahead::Ahead::new(backend, window.clone()).map_err(io)?;
        if len > CHECK_BYTES {
            // Until all is loaded.
            window.open();
        }
        let db = guard(what, || {
            Ok(Database::builder()
                .set_cache_size(CACHE_BYTES)
                .set_check_integrity_on_open(len <= check_bytes)
                .create_with_backend(backend::Boxed(Box::new(backend)))?)
        })?;
        clock.lap("catalog opened");
        Ok(Catalog::over(db, window, check_bytes))
    }

    fn over(db: Database, window: Arc<ahead::Window>, check_bytes: u64) -> Catalog {
        Catalog {
            window,
            check_bytes,
            db: RwLock::new(Some(db)),
            closed: AtomicBool::new(false),
            reads_only: AtomicBool::new(false),
        }
    }

    fn db(&self) -> Result<Open<'_>> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        if db.is_none() {
            return Err(match self.closed.load(Relaxed) {
                true => Error::new(ErrorKind::Stale, "the catalog is closed"),
                false => Error::new(ErrorKind::Io, "the catalog could not be opened again after a failure"),
            });
        }
        Ok(Open(db))
    }

    /// Opens the database anew: after a failed write redb refuses all others. What that write left is rolled back. `again` gives the
    /// backend, for writing or, where that fails too, for reading only: what is committed can be read all the same.
    pub(crate) fn reopen(&self, again: impl Fn(bool) -> Result<Box<dyn StorageBackend>>) -> Result<()> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        if self.closed.load(Relaxed) {
            return Err(Error::new(ErrorKind::Stale, "the catalog is closed"));
        }
        drop(db.take()); // the old one ends before the new one begins
        let open = |read_only| {
            let backend = again(read_only)?;
            let backend: Box<dyn StorageBackend> = match read_only {
                true => {
                    let overlay = backend::Overlay::new(backend);
                    Box::new(overlay.map_err(|error| Error::io("open the catalog again", error))?)
                }
                false => backend,
            };
            let backend = ahead::Ahead::new(backend, self.window.clone())
                .map_err(|error| Error::io("open the catalog again", error))?;
            guard("open the catalog again", || {
                Ok(Database::builder()
                    .set_cache_size(CACHE_BYTES)
                    .create_with_backend(backend::Boxed(Box::new(backend)))?)
            })
        };
        let opened = open(false);
        self.reads_only.store(opened.is_err(), Relaxed);
        match opened {
            Ok(opened) => *db = Some(opened),
            Err(error) => {
                *db = open(true).ok();
                return Err(error);
            }
        }
        Ok(())
    }

    /// The meta record.
    pub(crate) fn meta(&self) -> Result<Meta> {
        let db = self.db()?;
        let value = guard("read the catalog", || {
            let txn = db.begin_read()?;
            let table = match txn.open_table(META) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(None),
                table => table?,
            };
            Ok(table.get(META_KEY)?.map(|value| value.value().to_vec()))
        })?;
        Meta::decode(&value.ok_or_else(|| corrupt("the catalog has no meta record"))?)
    }

    /// The stored layout of a region; `None`: it has no content.
    pub(crate) fn layout(&self, node: NodeId) -> Result<Option<Layout>> {
        let db = self.db()?;
        let what = format!("read the layout of node {node}");
        let records = guard(&what, || {
            let txn = db.begin_read()?;
            let table = txn.open_table(LAYOUTS)?;
            let mut records = std::collections::HashMap::new();
            for record in
                table.range(layout_key(node, 0).as_slice()..=layout_key(node, u32::MAX).as_slice())?
            {
                let (key, value) = record?;
                let part: [u8; 4] = key.value()[8..].try_into().unwrap_or_default();
                records.insert(u32::from_be_bytes(part), value.value().to_vec());
            }
            Ok(records)
        })?;
        if records.is_empty() {
            return Ok(None);
        }
        let mut records = records;
        Layout::from_records(|part| Ok(records.remove(&part))).map(Some).map_err(|error| error.context(what))
    }

    /// Nodes that have a layout, in order.
    pub(crate) fn layout_nodes(&self) -> Result<Vec<NodeId>> {
        let db = self.db()?;
        let mut bad = None;
        let nodes = guard("read the catalog", || {
            let txn = db.begin_read()?;
            let mut nodes = Vec::new();
            for record in txn.open_table(LAYOUTS)?.iter()? {
                let (key, _) = record?;
                match split_key(key.value()) {
                    Ok((node, _)) if nodes.last() != Some(&node) => nodes.push(node),
                    Ok(_) => {}
                    Err(error) => bad = Some(error),
                }
            }
            Ok(nodes)
        })?;
        bad.map_or(Ok(nodes), Err)
    }

    /// Applies a batch: durable when this returns, or not there at all.
    pub(crate) fn apply(&self, batch: &Batch) -> Result<()> {
        let db = self.db()?;
        if self.reads_only.load(Relaxed) {
            return Err(Error::new(
                ErrorKind::Io,
                "the catalog cannot be written since a write of it failed",
            ));
        }
        guard("write the catalog", || {
            let mut txn = db.begin_write()?;
            txn.set_quick_repair(self.window.len() > self.check_bytes);
            {
                txn.open_table(META)?.insert(META_KEY, batch.meta.encode().as_slice())?;
                let mut nodes = txn.open_table(NODES)?;
                let mut entries = txn.open_table(ENTRIES)?;
                let mut xattrs = txn.open_table(XATTRS)?;
                let mut layouts = txn.open_table(LAYOUTS)?;
                for node in &batch.removed {
                    nodes.remove(node_key(*node).as_slice())?;
                    remove_prefix(&mut xattrs, *node)?;
                    remove_prefix(&mut layouts, *node)?;
                }
                for node in &batch.clear_layouts {
                    remove_prefix(&mut layouts, *node)?;
                }
                for (node, value) in &batch.nodes {
                    nodes.insert(node_key(*node).as_slice(), value.as_slice())?;
                }
                for (key, value) in &batch.entries {
                    match value {
                        Some(value) => entries.insert(key.as_slice(), value.as_slice())?,
                        None => entries.remove(key.as_slice())?,
                    };
                }
                for (node, values) in &batch.xattrs {
                    remove_prefix(&mut xattrs, *node)?;
                    for (key, value) in values {
                        xattrs.insert(key.as_slice(), value.as_slice())?;
                    }
                }
                for (node, changes) in &batch.layouts {
                    for part in &changes.delete {
                        layouts.remove(layout_key(*node, *part).as_slice())?;
                    }
                    for (part, value) in &changes.put {
                        layouts.insert(layout_key(*node, *part).as_slice(), value.as_slice())?;
                    }
                }
            }
            txn.commit()?;
            Ok(())
        })
    }

    /// Closes it, so that the next open has nothing to repair.
    pub(crate) fn close(&self) -> Result<()> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Relaxed);
        match db.take() {
            Some(db) => guard("close the catalog", || Ok(db.close()?)),
            None => Ok(()),
        }
    }
}

/// The database, known to be open.
struct Open<'a>(RwLockReadGuard<'a, Option<Database>>);

impl std::ops::Deref for Open<'_> {
    type Target = Database;

    fn deref(&self) -> &Database {
        match self.0.as_ref() {
            Some(db) => db,
            // `Catalog::db` looked, and holds the lock since.
            None => unreachable!("the catalog was closed under its lock"),
        }
    }
}

fn layout_key(node: NodeId, part: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&node.to_be_bytes());
    key[8..].copy_from_slice(&part.to_be_bytes());
    key
}

fn remove_prefix(
    table: &mut redb::Table<&[u8], &[u8]>,
    node: NodeId,
) -> std::result::Result<(), redb::Error> {
    let start = node_key(node);
    match node.checked_add(1).map(node_key) {
        Some(end) => table.retain_in(start.as_slice()..end.as_slice(), |_, _| false)?,
        None => table.retain_in(start.as_slice().., |_, _| false)?,
    }
    Ok(())
}
