//! Blocks of key-value caches in a pool: a cache that survives.
//!
//! ```text
//! Store                     index in memory (table.rs, state.rs, policy.rs), one a process
//!   View                    a namespace (fingerprint, size of blocks) and a tenant: what names mean
//!   Lane                    puts and gets in batches, a queue of its own; one a thread
//!
//! /.nvtier-kv/NAME/slab-*   slots; a block lies in one slot, byte for byte       (pool/slab.rs, state.rs)
//!                  log-a,-b which block is where, and its sum                    (record.rs, log.rs)
//! ```
//!
//! What is promised, and by what:
//!
//! - **Never wrong bytes.** The index has a sum of each block: over the fingerprint of its namespace, its tenant, its key, the put's own number and
//!   the bytes. Every read is compared; what does not fit (flipped bits, a lost or misdirected write, another block's bytes) is a miss, and
//!   is dropped. The index is a hint; nothing depends on its being right.
//! - **Durable after [`Store::flush`]**, and otherwise within [`StoreOptions::window`]. Data first, then the log's page that speaks of it. A slot is
//!   written again only when the log durably says that its block is gone.
//! - **No scan.** Opening reads the index and no block. An index that is lost is an empty cache.
//! - **No operation without a deadline**; one that fails is a miss, or a put that did not happen.
//!
//! One process at a time has a store: the owner of its pool. Others put and get through it, see [`Session::blocks`](crate::Session::blocks).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvme::Arena;

use crate::error::{Error, ErrorKind, Result};
use crate::pool::{Pool, lock};
use crate::types::{NodeId, NodeKind, ROOT};

pub mod admin;
pub(crate) mod fuzz;
mod key;
mod lane;
mod loads;
mod log;
mod options;
pub mod planner;
mod policy;
pub(crate) mod record;
mod room;
mod state;
mod table;
mod transfer;
mod view;
pub mod warm;

#[cfg(test)]
mod tests;

pub use key::Key;
pub use lane::{Get, GetDone, Lane, Miss, Put, PutDone, Refusal, Stored};
pub use options::{Admission, Clock, NamespaceInfo, Settings, StoreOptions, StoreStat, TenantInfo};
pub use record::{FINGERPRINT_MAX, TENANT_MAX};
pub use transfer::Moved;
pub use view::{BlockInfo, View};

use log::{Log, UnderWay};
use record::Record;
use state::State;

/// The directory of all stores, in the root of the pool.
pub const DIRECTORY: &str = ".nvtier-kv";
/// An empty region in a store that is no cache.
const LASTING: &str = "lasting";
/// Largest block.
pub const BLOCK_MAX: u32 = 256 << 20;

/// The name of a store, which is open once.
#[derive(Debug)]
struct Claim {
    pool: Arc<crate::pool::Shared>,
    name: String,
}

impl Claim {
    fn take(pool: &Pool, name: &str) -> Result<Claim> {
        let shared = pool.inner.shared.clone();
        let mut open = lock(&shared.kv_open);
        if open.contains_key(name) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("the KV store {name:?} of this pool is open already; share the one that is"),
            ));
        }
        open.insert(name.to_owned(), Weak::new());
        drop(open);
        Ok(Claim { pool: shared, name: name.to_owned() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.pool.kv_open).remove(&self.name);
    }
}

/// All of a store but its end.
#[derive(Debug)]
pub(crate) struct Shared {
    // Before the pool, which closes when nobody has it.
    _claim: Claim,
    pool: Pool,
    dir: NodeId,
    options: StoreOptions,
    budget: u64,
    slab_bytes: u64,
    state: Mutex<State>,
    /// A commit ended, or failed.
    committed: Condvar,
    /// Something waits to be committed, or the store ends.
    wake: Condvar,
    log: Mutex<Log>,
    /// Bytes of the logs.
    log_bytes: AtomicU64,
    /// Held by whoever makes or removes slabs.
    grow: Mutex<room::Growth>,
    stop: AtomicBool,
    /// Why nothing can be stored any more.
    failed: OnceLock<String>,
}

/// An open store; clones share it. The last one to go commits and closes it; [`close`](Self::close) reports what that comes to.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

/// What all clones of a store share.
#[derive(Debug)]
pub(crate) struct Inner {
    shared: Arc<Shared>,
    committer: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(error = %error.chain(), "closing a KV store failed");
        }
    }
}

impl Inner {
    fn end(&self) -> Result<()> {
        if self.shared.stop.swap(true, Relaxed) {
            return Ok(());
        }
        {
            // Under the lock, so that the committer cannot miss it between looking and waiting.
            let _state = self.shared.state();
            self.shared.wake.notify_all();
        }
        if let Some(thread) = lock(&self.committer).take() {
            let _ = thread.join();
        }
        self.shared.commit()
    }
}

fn check_name(name: &str) -> Result<()> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.bytes().all(fine) {
        return Err(Error::new(
            ErrorKind::InvalidName,
            format!("{name:?} names no KV store: letters, digits, '-', '_' and '.', at most 100 of them"),
        ));
    }
    Ok(())
}

fn check_tenant(name: &str) -> Result<()> {
    if name.len() <= TENANT_MAX {
        return Ok(());
    }
    let context = format!("a tenant's name of {} bytes: at most {TENANT_MAX} are taken", name.len());
    Err(Error::new(ErrorKind::TooLarge, context))
}

/// Refuses what cannot be a namespace; here and before a client asks the owner for it.
pub(crate) fn check_view(fingerprint: &[u8], block_bytes: u32, tenant: &str) -> Result<()> {
    check_tenant(tenant)?;
    if fingerprint.len() > FINGERPRINT_MAX {
        return Err(Error::new(
            ErrorKind::TooLarge,
            format!("a fingerprint of {} bytes: at most {FINGERPRINT_MAX} are taken", fingerprint.len()),
        ));
    }
    if block_bytes == 0 || block_bytes > BLOCK_MAX {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("blocks of {block_bytes} bytes: 1 to {BLOCK_MAX} are taken"),
        ));
    }
    Ok(())
}

fn make_directory(pool: &Pool, parent: NodeId, name: &str) -> Result<NodeId> {
    match pool.lookup(parent, OsStr::new(name)) {
        Ok(attr) => Ok(attr.node),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Ok(pool.create(parent, OsStr::new(name), &log::private(NodeKind::Directory))?.node)
        }
        Err(error) => Err(error),
    }
}

/// A slab's name tells its number and the size of its slots.
fn slab_name(number: u32, slot_bytes: u64) -> String {
    format!("slab-{number:08x}-{slot_bytes:x}")
}

fn parse_slab_name(name: &str) -> Option<(u32, u64)> {
    let (number, bytes) = name.strip_prefix("slab-")?.split_once('-')?;
    let (number, bytes) = (u32::from_str_radix(number, 16).ok()?, u64::from_str_radix(bytes, 16).ok()?);
    let fits =
        number < record::SLAB_MAX && bytes > 0 && bytes.is_multiple_of(4096) && bytes <= u64::from(BLOCK_MAX);
    (fits && slab_name(number, bytes) == name).then_some((number, bytes))
}

impl Store {
    /// Names of the stores of a pool.
    pub fn names(pool: &Pool) -> Result<Vec<String>> {
        let dir = match pool.lookup(ROOT, OsStr::new(DIRECTORY)) {
            Ok(attr) => attr.node,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = children(pool, dir)?;
        names.retain(|name| check_name(name).is_ok());
        names.sort();
        Ok(names)
    }

    /// Opens the store of that name, which is made where there is none.
    ///
    /// `Busy`: this process has it open. `ReadOnly`: the pool is. `NewerFormat`: a newer program made it.
    pub fn open(pool: &Pool, options: StoreOptions) -> Result<Store> {
        check_name(&options.name)?;
        let doing = format!("opening the KV store {:?}", options.name);
        Store::open_inner(pool, options).map_err(|error| error.context(doing))
    }

    /// As [`open`](Self::open), but gives the store that this process has open already, where there is one: its options stay as they are.
    ///
    /// `Busy`: it is being closed, for longer than `wait`.
    pub fn share(pool: &Pool, options: StoreOptions, wait: Duration) -> Result<Store> {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(store) = Store::opened(pool, &options.name) {
                return Ok(store);
            }
            match Store::open(pool, options.clone()) {
                // Somebody is opening or closing it; both end.
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => return other,
            }
        }
    }

    /// The store of that name that this process has open, if it has.
    fn opened(pool: &Pool, name: &str) -> Option<Store> {
        let open = lock(&pool.inner.shared.kv_open).get(name).and_then(Weak::upgrade);
        open.filter(|inner| !inner.shared.stop.load(Relaxed)).map(|inner| Store { inner })
    }

    fn open_inner(pool: &Pool, mut options: StoreOptions) -> Result<Store> {
        pool.inner.shared.check_writable()?;
        options.quotas.iter().try_for_each(|(tenant, _)| check_tenant(tenant))?;
        let claim = Claim::take(pool, &options.name)?;
        let dir = make_directory(pool, ROOT, DIRECTORY)?;
        let dir = make_directory(pool, dir, &options.name)?;
        // Whoever opens it next as a cache, to look at it say, must not make it one.
        match pool.lookup(dir, OsStr::new(LASTING)) {
            Ok(_) => options.lasting = true,
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            // Durable with the first slab.
            Err(_) if options.lasting => {
                pool.create(dir, OsStr::new(LASTING), &log::private(NodeKind::Region))?;
            }
            Err(_) => {}
        }
        let (mut log, found) = Log::open(pool, dir, options.log_pages)?;
        let mut state = State::default();
        state.table.now = options.clock.now();
        state.new_quota = options.tenant_quota;
        state.stat.bad_index_pages = found.bad_pages;
        // Where an index was lost, its slabs are there still.
        for name in children(pool, dir)? {
            let Some((number, slot_bytes)) = parse_slab_name(&name) else { continue };
            let slab = pool.lookup(dir, OsStr::new(&name)).and_then(|attr| pool.open_slab(attr.node));
            match slab {
                Ok(slab) => state.add_slab(number, slot_bytes, Arc::new(slab), false),
                Err(error) if options.lasting => {
                    return Err(error.context(format!("open {name} of {:?}", options.name)));
                }
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "{name} of a KV store is lost");
                    pool.unlink(dir, OsStr::new(&name))?;
                }
            }
        }
        // Number 0 is who gave no name.
        state.tenants.push(state::Tenant::default());
        if let Some(header) = &found.header {
            state.next_generation = header.next_generation;
            state.next_slab = state.next_slab.max(header.next_slab);
            state.table.reserve((header.checkpoint_pages as usize).min(1 << 24) * 63);
        }
        let bad = log.replay(&mut |record| state.replay(record))?;
        state.stat.bad_index_pages += bad;
        state.replayed();
        let damaged = state.stat.bad_index_pages > 0;
        let slabs: u64 = state.slabs.values().map(|slab| slab.slab.len()).sum();
        let own = slabs + log.allocated();
        let budget = options.budget_bytes.unwrap_or_else(|| own + pool.stat().free_bytes / 2);
        let budget = if options.lasting { budget.max(own) } else { budget };
        let slab_bytes = options.slab_bytes.unwrap_or((budget / 64).clamp(8 << 20, 1 << 30));
        let shared = Arc::new(Shared {
            pool: pool.clone(),
            dir,
            budget,
            slab_bytes,
            state: Mutex::new(state),
            committed: Condvar::new(),
            wake: Condvar::new(),
            log_bytes: AtomicU64::new(log.allocated()),
            log: Mutex::new(log),
            grow: Mutex::default(),
            stop: AtomicBool::new(false),
            failed: OnceLock::new(),
            options,
            _claim: claim,
        });
        for (tenant, quota_bytes) in &shared.options.quotas {
            shared.set_quota(tenant, *quota_bytes)?;
        }
        shared.shrink()?;
        {
            let mut log = lock(&shared.log);
            if found.header.is_none() || damaged {
                // What was found is written whole before anything builds on it.
                shared.checkpoint(&mut log, &Default::default())?;
            }
            // Later there may be no space for it.
            log.prepare(pool, dir, 0)?;
            shared.log_bytes.store(log.allocated(), Relaxed);
        }
        let committer = (!shared.options.window.is_zero()).then(|| {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("nvtier-kv".into())
                .spawn(move || shared.run())
                .map_err(|error| Error::io("start the thread nvtier-kv", error))
        });
        let committer = Mutex::new(committer.transpose()?);
        let inner = Arc::new(Inner { shared, committer });
        let name = &inner.shared.options.name;
        lock(&pool.inner.shared.kv_open).insert(name.clone(), Arc::downgrade(&inner));
        Ok(Store { inner })
    }

    /// Removes a store that is not open, with all of its blocks.
    pub fn remove(pool: &Pool, name: &str) -> Result<()> {
        check_name(name)?;
        let _claim = Claim::take(pool, name)?;
        let above = pool.lookup(ROOT, OsStr::new(DIRECTORY))?.node;
        let dir = pool.lookup(above, OsStr::new(name))?.node;
        for child in children(pool, dir)? {
            pool.unlink(dir, OsStr::new(&child))?;
        }
        pool.rmdir(above, OsStr::new(name))?;
        pool.sync()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// The namespace of a fingerprint and a size of blocks, for one tenant (`""`: who gives no name). It is made where there is none.
    ///
    /// The fingerprint says all that the bytes depend on besides the key: weights, tokenizer, adapters, type and layout. Blocks of another
    /// fingerprint, size or tenant are never found.
    pub fn view(&self, fingerprint: &[u8], block_bytes: u32, tenant: &str) -> Result<View> {
        check_view(fingerprint, block_bytes, tenant)?;
        let mut state = self.shared().state();
        let namespace = state.namespace(fingerprint, block_bytes)?;
        let tenant_id = state.tenant(tenant.as_bytes())?;
        drop(state);
        Ok(View::new(self.shared().clone(), namespace, tenant_id, block_bytes, fingerprint, tenant))
    }

    /// Limits the bytes of slots that a tenant's blocks may have (0: no limit); beyond, his oldest go, at once and as he puts more. Pinned ones stay,
    /// and he stores nothing while they leave no room. Durable after the next flush.
    pub fn set_quota(&self, tenant: &str, quota_bytes: u64) -> Result<()> {
        self.shared().set_quota(tenant, quota_bytes)
    }

    /// Puts and gets for one thread. `arena`: where its buffers come from, to be registered with the kernel once.
    pub fn lane(&self, arena: Option<&Arena>) -> Result<Lane> {
        Lane::new(self.shared().clone(), arena)
    }

    /// Makes every put that was acknowledged durable.
    pub fn flush(&self) -> Result<()> {
        self.shared().commit()
    }

    /// Writes the index whole: the next open has no changes to go through.
    pub fn checkpoint(&self) -> Result<()> {
        self.shared().commit_with(true)
    }

    /// Writes some of a checkpoint that is under way, or begins one where it is due; says whether there is more to do. Commits go on in between. A
    /// store with a window does so by itself.
    pub fn checkpoint_some(&self) -> Result<bool> {
        self.shared().go_on_with_checkpoint()
    }

    /// What it holds, and what happened since it was opened.
    pub fn stat(&self) -> StoreStat {
        self.shared().stat()
    }

    /// Its namespaces.
    pub fn namespaces(&self) -> Vec<NamespaceInfo> {
        let state = self.shared().state();
        (0..)
            .zip(&state.namespaces)
            .map(|(id, namespace)| NamespaceInfo {
                id,
                block_bytes: namespace.block_bytes,
                fingerprint: namespace.fingerprint.clone(),
                blocks: namespace.blocks,
            })
            .collect()
    }

    /// Its tenants; the first is who gave no name.
    pub fn tenants(&self) -> Vec<TenantInfo> {
        let state = self.shared().state();
        let info = |tenant: &state::Tenant| TenantInfo {
            name: String::from_utf8_lossy(&tenant.name).into_owned(),
            quota_bytes: tenant.quota,
            used_bytes: tenant.used,
        };
        state.tenants.iter().map(info).collect()
    }

    /// Commits, closes, and reports what dropping it would only log. Lanes and views that are left can read, and no longer store.
    pub fn close(self) -> Result<()> {
        self.inner.end()
    }
}

fn children(pool: &Pool, dir: NodeId) -> Result<Vec<String>> {
    let (mut names, mut cookie) = (Vec::new(), 0);
    loop {
        let page = pool.readdir(dir, cookie, 1000)?;
        let Some((next, _)) = page.last() else { return Ok(names) };
        cookie = *next;
        names.extend(page.iter().filter_map(|(_, entry)| entry.name.to_str().map(str::to_owned)));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn set_quota(&self, tenant: &str, quota_bytes: u64) -> Result<()> {
        check_tenant(tenant)?;
        let mut state = self.state();
        let id = state.tenant(tenant.as_bytes())?;
        state.set_quota(id, quota_bytes);
        Ok(())
    }

    fn fail(&self, error: Error) -> Error {
        tracing::error!(error = %error.chain(), "the KV store takes no more blocks until it is opened again");
        let _ = self.failed.set(error.chain());
        let _state = self.state();
        self.committed.notify_all();
        error
    }

    /// After a failed flush nobody knows what is durable: nothing is built on it any more. Reads go on, since they are checked.
    fn check_failed(&self) -> Result<()> {
        match self.failed.get() {
            None => Ok(()),
            Some(why) => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "the KV store {:?} takes no more blocks: {why}; look at the drive, then open the store again",
                    self.options.name
                ),
            )),
        }
    }

    fn commit(&self) -> Result<()> {
        self.commit_with(false)
    }

    /// One commit: data, then the log.
    fn commit_with(&self, whole: bool) -> Result<()> {
        self.commit_to(&mut lock(&self.log), whole)
    }

    fn commit_to(&self, log: &mut Log, whole: bool) -> Result<()> {
        self.check_failed()?;
        let batch = {
            let mut state = self.state();
            if state.is_clean() && !whole {
                return Ok(());
            }
            state.take_batch()
        };
        let done = if whole || !log.has_room(&batch.records) {
            self.checkpoint(log, &batch)
        } else {
            self.flush_data(&batch).and_then(|()| log.append(&batch.records)).map(|()| {
                if let Some(under_way) = &mut log.under_way {
                    under_way.since.extend(batch.records.iter().cloned());
                }
            })
        };
        match done {
            Ok(()) => {
                self.state().committed(batch);
                self.committed.notify_all();
                Ok(())
            }
            Err(error) => Err(self.fail(error.context("making the KV store durable"))),
        }
    }

    fn flush_data(&self, batch: &state::Batch) -> Result<()> {
        let slabs = self.state().slabs_of(&batch.dirty);
        log::flush(&slabs)
    }

    /// Writes the index whole into the other log, or the rest of it where that has begun. What changes meanwhile is in the next batch, and is durable
    /// when that is.
    fn checkpoint(&self, log: &mut Log, batch: &state::Batch) -> Result<()> {
        let mut under_way = match log.under_way.take() {
            Some(mut under_way) => {
                under_way.since.extend(batch.records.iter().cloned());
                under_way
            }
            None => self.begin_checkpoint(log, true)?,
        };
        while self.checkpoint_step(&mut under_way)? {}
        self.finish_checkpoint(log, under_way, &batch.dirty)
    }

    /// `make_room`: blocks go where there is no space for it.
    fn begin_checkpoint(&self, log: &mut Log, make_room: bool) -> Result<UnderWay> {
        let (described, pages) = {
            let state = self.state();
            // Blocks that come while it is written go to slots that are there now.
            (state.describe(), state.pages_for(state.slots()))
        };
        let mut checkpoint = match log.begin(&self.pool, self.dir, pages) {
            Err(error) if make_room && error.kind() == ErrorKind::NoSpace => {
                self.make_room_for_log()?;
                log.begin(&self.pool, self.dir, pages)?
            }
            other => other?,
        };
        self.log_bytes.store(log.allocated(), Relaxed);
        for record in &described {
            checkpoint.push(record)?;
        }
        Ok(UnderWay { checkpoint, next: 0, since: Vec::new() })
    }

    /// Writes some more entries; `false`: there are none.
    fn checkpoint_step(&self, under_way: &mut UnderWay) -> Result<bool> {
        let step: Vec<Record> = {
            let state = self.state();
            let end =
                state.table.bound().min(under_way.next.saturating_add(self.options.checkpoint_step.max(1)));
            if under_way.next >= end {
                return Ok(false);
            }
            let blocks = (under_way.next..end).filter_map(|entry| state.table.get(entry));
            let step = blocks.map(|block| Record::Put(table::Table::stored(block))).collect();
            under_way.next = end;
            step
        };
        for record in &step {
            under_way.checkpoint.push(record)?;
        }
        Ok(true)
    }

    fn finish_checkpoint(&self, log: &mut Log, under_way: UnderWay, dirty: &BTreeSet<u32>) -> Result<()> {
        let header = || {
            let state = self.state();
            (state.next_generation, state.next_slab)
        };
        let everything = || {
            let slabs = {
                let state = self.state();
                let mut dirty = dirty.clone();
                dirty.extend(state.dirty_now());
                state.slabs_of(&dirty)
            };
            log::flush(&slabs)
        };
        let UnderWay { checkpoint, since, .. } = under_way;
        log.finish(checkpoint, &since, header, everything, self.pool.inner.shared.pool_id)?;
        self.state().stat.checkpoints += 1;
        Ok(())
    }

    /// Does something for a checkpoint that is under way or due, beside commits: puts wait for those, and an index of millions of blocks takes seconds.
    /// Says whether there is more to do.
    fn go_on_with_checkpoint(&self) -> Result<bool> {
        let log = &mut *lock(&self.log);
        self.check_failed()?;
        let mut under_way = match log.under_way.take() {
            Some(under_way) => under_way,
            None if log.wants_checkpoint() => match self.begin_checkpoint(log, false) {
                Ok(under_way) => under_way,
                // Space is made when there is no other way.
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    log.no_space = log.epoch();
                    return Ok(false);
                }
                Err(error) => return Err(self.fail(error.context("writing the KV store's index"))),
            },
            None => return Ok(false),
        };
        let done = match self.checkpoint_step(&mut under_way) {
            Ok(true) => {
                log.under_way = Some(under_way);
                return Ok(true);
            }
            Ok(false) => self.finish_checkpoint(log, under_way, &Default::default()),
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => Ok(false),
            // More came meanwhile than the log that was made ready has room for.
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                log.no_space = log.epoch();
                Ok(false)
            }
            Err(error) => Err(self.fail(error.context("writing the KV store's index"))),
        }
    }

    /// The committer.
    fn run(&self) {
        let half = (self.options.window / 2).max(Duration::from_millis(1));
        let mut busy = false;
        loop {
            let due = {
                let mut state = self.state();
                while !busy && state.is_clean() && !self.stop.load(Relaxed) {
                    state = match self.wake.wait_timeout(state, Duration::from_secs(3600)) {
                        Ok((state, _)) => state,
                        Err(poisoned) => poisoned.into_inner().0,
                    };
                }
                if self.stop.load(Relaxed) {
                    return;
                }
                let due = state.pending_since.map_or(half, |since| half.saturating_sub(since.elapsed()));
                if !busy && !due.is_zero() {
                    state = match self.wake.wait_timeout_while(state, due, |_| !self.stop.load(Relaxed)) {
                        Ok((state, _)) => state,
                        Err(poisoned) => poisoned.into_inner().0,
                    };
                }
                let due = !busy || due.is_zero();
                drop(state);
                due
            };
            if due {
                self.evict_ahead();
                if self.commit().is_err() {
                    return;
                }
            }
            match self.go_on_with_checkpoint() {
                Ok(more) => busy = more,
                Err(_) => return,
            }
        }
    }

    /// Holds an acknowledgement back while an older one is not durable for longer than the window.
    fn wait_for_window(&self, deadline: Instant) -> Result<()> {
        let window = self.options.window;
        if window.is_zero() {
            return Ok(());
        }
        let mut state = self.state();
        loop {
            self.check_failed()?;
            let oldest = state.committing_since.or(state.pending_since);
            if oldest.is_none_or(|since| since.elapsed() <= window) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Timeout, "the KV store's index was not durable in time"));
            }
            state = self
                .committed
                .wait_timeout(state, left)
                .map_or_else(|poisoned: PoisonError<_>| poisoned.into_inner().0, |(state, _)| state);
        }
    }

    fn stat(&self) -> StoreStat {
        let log_bytes = self.log_bytes.load(Relaxed);
        let state = self.state();
        StoreStat {
            name: self.options.name.clone(),
            blocks: state.table.len() as u64,
            allocated_bytes: log_bytes + state.slabs.values().map(|slab| slab.slab.len()).sum::<u64>(),
            budget_bytes: self.budget,
            namespaces: state.namespaces.len() as u64,
            failed: self.failed.get().cloned().unwrap_or_default(),
            written_today_bytes: state.written_on_the_day_of(self.options.clock.now()),
            write_bytes_per_day: self.options.write_bytes_per_day,
            ..state.stat.clone()
        }
    }
}

/// The sum of a block: what its bytes are continued from this. A block of another namespace, tenant, key or put has another one.
pub(crate) fn seed_of(fingerprint: &[u8], block_bytes: u32, tenant: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(fingerprint.len() as u32).to_le_bytes());
    hasher.update(fingerprint);
    hasher.update(&block_bytes.to_le_bytes());
    hasher.update(tenant);
    hasher.finalize()
}

/// See [`seed_of`].
pub(crate) fn sum_of(seed: u32, key: &Key, generation: u64, bytes: &[u8]) -> u32 {
    let mut head = [0u8; 45];
    head[..4].copy_from_slice(&seed.to_le_bytes());
    head[4..36].copy_from_slice(key.padded());
    head[36] = key.len() as u8;
    head[37..].copy_from_slice(&generation.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    hasher.update(bytes);
    hasher.finalize()
}
