//! From the tree in memory to a durable catalog, and what has to wait for that.
//!
//! A snapshot goes: take what is dirty (one short lock) -> make the bytes durable that it names -> one catalog transaction ->
//! free what only older catalogs named. A crash anywhere leaves the snapshot before or the one after.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::live::Live;
use super::stored::Stored;
use super::{Shared, Storage, lock, write};
use crate::catalog::{Batch, Meta};
use crate::error::{Error, ErrorKind, Result};
use crate::extent_io::ExtentContent;
use crate::layout::{Extent, Layout};
use crate::namespace::record::{encode_entry, encode_node, encode_xattr, name_key};
use crate::namespace::{Dirty, Node, Tree};
use crate::types::{NodeId, Timestamp};

/// File numbers reserved by an open: more than any process makes.
pub(crate) const FILE_RESERVE: u64 = 1 << 32;
/// Freeing this much at once is worth a snapshot of its own: somebody may wait for the space.
const KICK_BYTES: u64 = 64 << 20;
/// Between copies of the catalog.
const BACKUP_EVERY: Duration = Duration::from_secs(300);

/// Snapshots: one at a time, and a caller who waited for one that began after his call needs no other.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    turn: Mutex<Turn>,
    /// Number of the last snapshot that began.
    started: std::sync::atomic::AtomicU64,
}

#[derive(Debug, Default)]
struct Turn {
    /// Number of the last snapshot that is durable.
    done: u64,
    backed_up: Option<Instant>,
    backed_up_generation: u64,
}

/// Layouts that are not in a durable catalog yet.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Committed since the last snapshot was taken.
    pending: HashMap<NodeId, Pending>,
    /// In the snapshot that is being written.
    in_flight: HashMap<NodeId, Pending>,
}

#[derive(Clone, Debug)]
struct Pending {
    layout: Arc<Layout>,
    /// No catalog, durable or not, has ever named its file.
    fresh: bool,
    /// Extents: the layout that the catalog holds before this one goes in, where that is known.
    base: Option<Arc<Layout>>,
}

/// What new content takes the place of.
#[derive(Debug)]
pub(super) struct Displaced {
    /// Its file, or 0.
    pub file: u64,
    /// What that is charged.
    pub charged: u64,
    /// Extents that the new content does not share.
    pub extents: Vec<Extent>,
    /// The content: who reads it still holds it.
    pub stored: Arc<Stored>,
}

/// Space that no newer catalog names.
#[derive(Debug)]
pub(crate) struct Doomed {
    node: NodeId,
    /// Free once this snapshot is durable.
    after: u64,
    /// Free once nobody else holds this: readers and leases do.
    guard: Arc<Stored>,
    /// A region's file, or 0, and what it is charged.
    file: u64,
    charged: u64,
    extents: Vec<Extent>,
}

/// What a snapshot takes out of the tree.
struct Taken {
    batch: Batch,
    dirty: Dirty,
    contents: HashMap<NodeId, Pending>,
}

impl Shared {
    /// See [`Pool::sync`](crate::Pool::sync).
    pub(crate) fn sync(self: &Arc<Self>) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let before = self.snapshots.started.load(Relaxed);
        let mut turn = lock(&self.snapshots.turn);
        if turn.done > before {
            return Ok(());
        }
        let result = self.check_flushed().and_then(|()| self.snapshot(&mut turn));
        *lock(&self.commit_error) = result.as_ref().err().map(Error::chain).unwrap_or_default();
        result
    }

    fn snapshot(self: &Arc<Self>, turn: &mut Turn) -> Result<()> {
        let taken = self.take();
        let id = self.snapshots.started.load(Relaxed);
        // What the snapshot holds must not keep old content from being freed below: it goes before that.
        let taken = (!taken.batch.is_empty()).then_some(taken);
        if let Some(taken) = taken {
            if let Err(error) = self.make_durable(&taken) {
                self.put_back(taken);
                return Err(error);
            }
            self.counters.commits.fetch_add(1, Relaxed);
            self.durable_generation.store(taken.batch.meta.generation, Relaxed);
        }
        lock(&self.contents).in_flight.clear();
        turn.done = id;
        self.free_doomed(id);
        // Where it was given up: from what was just freed.
        self.store.keep_reserve();
        Ok(())
    }

    /// As [`sync`](Self::sync), where there may be nothing to do.
    pub(crate) fn sync_if_dirty(self: &Arc<Self>) -> Result<()> {
        if self.is_clean() {
            // What a running snapshot has taken is not dirty any more, and not durable yet. If it fails, all is dirty again.
            drop(lock(&self.snapshots.turn));
        }
        if self.is_clean() { Ok(()) } else { self.sync() }
    }

    fn is_clean(&self) -> bool {
        super::read(&self.tree).dirty.is_empty()
            && lock(&self.contents).pending.is_empty()
            && lock(&self.graveyard).is_empty()
    }

    fn back_up_if_due(&self) {
        let mut turn = lock(&self.snapshots.turn);
        let generation = self.durable_generation.load(Relaxed);
        let due = turn.backed_up.is_none_or(|at| at.elapsed() >= BACKUP_EVERY)
            && turn.backed_up_generation != generation;
        if !due {
            return;
        }
        turn.backed_up = Some(Instant::now());
        match self.store.back_up() {
            Ok(()) => turn.backed_up_generation = generation,
            Err(error) => tracing::warn!(error = %error.chain(), "cannot copy the catalog"),
        }
    }

    /// Last of all: a whole catalog on the drive, its copy beside it.
    pub(super) fn close_catalog(self: &Arc<Self>) -> Result<()> {
        let synced = self.sync();
        let closed = self.catalog.close();
        if !self.read_only && synced.is_ok() && closed.is_ok() {
            self.store.back_up()?;
        }
        synced.and(closed)
    }

    /// Notes that data was not made durable; see [`check_flushed`](Self::check_flushed).
    fn not_flushed(&self, error: Error) -> Error {
        tracing::error!(error = %error.chain(), "a flush failed; no more changes until the pool is opened again");
        let _ = self.flush_failed.set(error.chain());
        error
    }

    fn make_durable(&self, taken: &Taken) -> Result<()> {
        match &self.storage {
            Storage::Files { directory, .. } => {
                let files: Vec<u64> = taken
                    .contents
                    .values()
                    .filter_map(|pending| pending.layout.single_file())
                    .map(|(_, file)| file)
                    .collect();
                let open = directory.open_to_sync(&files)?;
                directory.sync_open(open).map_err(|error| self.not_flushed(error))?;
            }
            Storage::Extents(io) => {
                let mut of_member: Vec<Vec<Extent>> = vec![Vec::new(); io.stripes().members().len()];
                for pending in taken.contents.values() {
                    let known = pending.base.as_deref();
                    // What the catalog holds already was made durable then.
                    let new = known.map_or_else(
                        || pending.layout.extents().copied().collect(),
                        |known| difference(&pending.layout, known),
                    );
                    for extent in new {
                        of_member[extent.member as usize].push(extent);
                    }
                }
                for (member, extents) in io.stripes().members().iter().zip(&of_member) {
                    if !extents.is_empty() {
                        member.sync(extents).map_err(|error| self.not_flushed(error))?;
                    }
                }
            }
        }
        let error = match self.catalog.apply(&taken.batch) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        // After a failed write the database takes no other until it is opened anew. What is removed gives space back, but noting
        // that needs some first.
        if error.kind() == ErrorKind::NoSpace && self.store.spend_reserve() {
            tracing::warn!(
                "the file system under the pool is full; the catalog goes on with the space set aside"
            );
        }
        let named = |error: Error| error.context(self.store.name(false));
        self.catalog
            .reopen(|read_only| self.store.again(read_only))
            .map_err(|again| named(again.context(error.chain())))?;
        self.catalog.apply(&taken.batch).map_err(named)
    }

    /// Takes everything dirty, under one lock of the tree.
    fn take(&self) -> Taken {
        let mut tree = write(&self.tree);
        self.snapshots.started.fetch_add(1, Relaxed);
        let dirty = std::mem::take(&mut tree.dirty);
        let generation = self.generation.fetch_add(1, Relaxed) + 1;
        let mut batch = Batch::new(Meta {
            pool: self.pool_id,
            next_node: tree.next_node(),
            next_file: self.reserved_file,
            generation,
            saved: Timestamp::now().secs,
        });
        let contents = {
            let mut contents = lock(&self.contents);
            let pending = std::mem::take(&mut contents.pending);
            contents.in_flight = pending.clone();
            pending
        };
        // In the order of their keys, as the tables are: neighbours share pages, and the same changes make the same writes.
        batch.removed = dirty.removed.iter().copied().collect();
        batch.removed.sort_unstable();
        let mut changed: Vec<(&NodeId, &Pending)> = contents.iter().collect();
        changed.sort_unstable_by_key(|(node, _)| **node);
        for (node, pending) in changed {
            let Ok(held) = tree.get(*node) else { continue };
            if held.nlink == 0 {
                continue;
            }
            if held.stored && pending.base.is_none() {
                batch.clear_layouts.push(*node);
            }
            batch.layouts.push((*node, pending.layout.changes(pending.base.as_deref())));
        }
        let in_catalog = |tree: &Tree<Live>, node: NodeId| {
            tree.get(node)
                .is_ok_and(|held| held.nlink > 0 && held.region().is_none_or(|region| !region.unborn))
        };
        for (parent, name) in &dirty.entries {
            let key = name_key(*parent, name);
            let entry = tree.directory(*parent).ok().and_then(|directory| directory.get(name));
            let value = entry
                .filter(|entry| in_catalog(&tree, entry.node))
                .map(|entry| encode_entry(&key, entry.node, entry.kind));
            batch.entries.push((key, value));
        }
        batch.entries.sort_unstable();
        for node in dirty.xattrs.iter().filter(|node| in_catalog(&tree, **node)) {
            let Ok(held) = tree.get(*node) else { continue };
            let values = held.xattrs.iter().flat_map(|xattrs| xattrs.iter()).map(|(name, value)| {
                let key = name_key(*node, name);
                let value = encode_xattr(&key, value);
                (key, value)
            });
            batch.xattrs.push((*node, values.collect()));
        }
        batch.xattrs.sort_unstable();
        for node in &dirty.nodes {
            if !in_catalog(&tree, *node) {
                continue;
            }
            let Ok(held) = tree.get_mut(*node) else { continue };
            held.stored = true;
            batch.nodes.push((*node, encode_node(*node, held)));
        }
        batch.nodes.sort_unstable();
        Taken { batch, dirty, contents }
    }

    /// A snapshot failed: everything is dirty again.
    fn put_back(&self, taken: Taken) {
        let mut tree = write(&self.tree);
        tree.dirty.merge(taken.dirty);
        let mut contents = lock(&self.contents);
        for (node, pending) in taken.contents {
            // It may have reached the drive all the same: what the catalog holds is not known, so that the next one stores it whole.
            let again = Pending { fresh: false, base: None, ..pending };
            contents.pending.entry(node).and_modify(|newer| newer.base = None).or_insert(again);
        }
        contents.in_flight.clear();
    }

    /// Remembers a node's new layout until a catalog holds it (`None`: the node has no name, no catalog ever will). Returns what that
    /// displaces. The tree is locked, so that no snapshot is taken in between.
    pub(super) fn replace_content(
        &self,
        node: NodeId,
        layout: Option<Arc<Layout>>,
        new_file: u64,
        displaced: Displaced,
    ) -> Option<Doomed> {
        let mut contents = lock(&self.contents);
        let old = contents.pending.remove(&node);
        let old_is_fresh = old.as_ref().is_some_and(|old| old.fresh);
        if let Some(layout) = layout {
            let fresh = displaced.file != new_file || old_is_fresh;
            let base = match (old, contents.in_flight.get(&node), &*displaced.stored) {
                (Some(old), _, _) => old.base,
                (None, Some(flying), _) => Some(flying.layout.clone()),
                (None, None, Stored::Extents(content)) => Some(content.layout().clone()),
                _ => None,
            };
            contents.pending.insert(node, Pending { layout, fresh, base });
        }
        let file = if displaced.file == new_file { 0 } else { displaced.file };
        if file == 0 && displaced.extents.is_empty() {
            return None;
        }
        // Extents that a pending layout shares with an older one are in a catalog, however new the layout is.
        let after = if old_is_fresh && displaced.extents.is_empty() { 0 } else { self.next_snapshot() };
        let Displaced { charged, extents, stored, .. } = displaced;
        Some(Doomed { node, after, guard: stored, file, charged, extents })
    }

    fn next_snapshot(&self) -> u64 {
        self.snapshots.started.load(Relaxed) + 1
    }

    /// The committed layout of a region, wherever it is.
    pub(crate) fn load_layout(&self, node: NodeId) -> Result<Arc<Layout>> {
        let waiting = {
            let contents = lock(&self.contents);
            contents
                .pending
                .get(&node)
                .or_else(|| contents.in_flight.get(&node))
                .map(|pending| pending.layout.clone())
        };
        match waiting {
            Some(layout) => Ok(layout),
            None => Ok(Arc::new(self.stored_layout(node)?.unwrap_or_else(|| Layout::new(self.chunk_size)))),
        }
    }

    /// The catalog's layout of a node. After a failed read the database refuses all others until it is opened anew: a fault that
    /// passed must not be one for good.
    fn stored_layout(&self, node: NodeId) -> Result<Option<Layout>> {
        let error = match self.catalog.layout(node) {
            Err(error) if error.kind() == ErrorKind::Io && !self.read_only => error,
            done => return done,
        };
        tracing::warn!(node, error = %error.chain(), "opening the catalog again");
        // Where it can be opened for reading only, that is enough here.
        let again = self.catalog.reopen(|read_only| self.store.again(read_only));
        self.catalog.layout(node).map_err(|still| {
            again.err().unwrap_or(still).context(error.chain()).context(self.store.name(false))
        })
    }

    /// Frees space as soon as no durable catalog names it (at once where none ever did) and nobody reads it.
    pub(super) fn bury(&self, doomed: Doomed) {
        if doomed.after == 0 && Stored::is_free(&doomed.guard) {
            self.free_now(doomed);
            return;
        }
        let bytes = doomed.charged + doomed.extents.iter().map(|extent| extent.len).sum::<u64>();
        lock(&self.graveyard).push(doomed);
        if bytes >= KICK_BYTES {
            self.kick.store(true, Relaxed);
            self.wake.notify_all();
        }
    }

    /// Files made since this process opened the pool have this number or a higher one.
    pub(crate) fn first_new_file(&self) -> u64 {
        self.reserved_file - FILE_RESERVE
    }

    /// Files of old content that wait to be removed.
    pub(crate) fn doomed_files(&self) -> Vec<u64> {
        lock(&self.graveyard).iter().map(|doomed| doomed.file).filter(|file| *file != 0).collect()
    }

    /// Extents of old content that wait to be freed, and those that its readers may still use.
    pub(crate) fn doomed_extents(&self) -> Vec<Extent> {
        let graveyard = lock(&self.graveyard);
        let mut extents: Vec<Extent> =
            graveyard.iter().flat_map(|doomed| doomed.extents.iter().copied()).collect();
        for doomed in graveyard.iter() {
            if let Stored::Extents(content) = &*doomed.guard {
                extents.extend(content.layout().extents().copied());
            }
        }
        extents
    }

    /// Makes the catalog's copy anew where it cannot be read. What was done, in a sentence.
    pub(crate) fn mend_catalog_copy(self: &Arc<Self>) -> Result<Option<String>> {
        self.sync()?;
        let mut turn = lock(&self.snapshots.turn);
        let Err(error) = self.store.check_copy(&self.pool_id) else { return Ok(None) };
        self.store.back_up()?;
        turn.backed_up = Some(Instant::now());
        turn.backed_up_generation = self.durable_generation.load(Relaxed);
        self.store.check_copy(&self.pool_id)?;
        Ok(Some(format!("the catalog's copy was damaged ({}); made again from the catalog", error.chain())))
    }

    fn free_doomed(&self, done: u64) {
        let mut ready = Vec::new();
        {
            let mut graveyard = lock(&self.graveyard);
            // Who holds an old layout may read extents that it shares with newer ones: of one node, in order.
            let mut held = HashSet::new();
            for doomed in std::mem::take(&mut *graveyard) {
                if doomed.after <= done && Stored::is_free(&doomed.guard) && !held.contains(&doomed.node) {
                    ready.push(doomed);
                } else {
                    held.insert(doomed.node);
                    graveyard.push(doomed);
                }
            }
        }
        for doomed in ready {
            self.free_now(doomed);
        }
    }

    fn free_now(&self, doomed: Doomed) {
        let freed = match &self.storage {
            Storage::Files { directory, .. } if doomed.file != 0 => {
                directory.remove_file(doomed.file, doomed.charged)
            }
            Storage::Files { .. } => Ok(()),
            Storage::Extents(io) => {
                if let Stored::Extents(content) = &*doomed.guard {
                    content.forget();
                }
                io.stripes().free(&doomed.extents)
            }
        };
        if let Err(error) = freed {
            tracing::warn!(node = doomed.node, error = %error.chain(), "cannot free the space of old content");
        }
    }

    /// Frees what can be freed with a snapshot; whether there was anything.
    pub(crate) fn reclaim(self: &Arc<Self>) -> Result<bool> {
        if lock(&self.graveyard).is_empty() {
            return Ok(false);
        }
        self.sync()?;
        Ok(true)
    }

    /// Gives up the content of a node that is gone for good. `charged`: what its file counts for, where a draft knows better;
    /// `stored`: its committed content, where that is open.
    pub(crate) fn purge(
        self: &Arc<Self>,
        id: NodeId,
        node: &Node<Live>,
        charged: Option<u64>,
        stored: Option<Arc<Stored>>,
    ) {
        let Some(region) = node.region() else { return };
        let fresh = {
            let mut contents = lock(&self.contents);
            // Extents: the layout is still needed below, and the catalog may not have it.
            match &self.storage {
                Storage::Files { .. } => contents.pending.remove(&id).is_some_and(|pending| pending.fresh),
                Storage::Extents(_) => false,
            }
        };
        let mut extents = Vec::new();
        let mut guard = stored.unwrap_or_else(|| Arc::new(Stored::Empty));
        if let Storage::Extents(io) = &self.storage
            && node.generation > 0
        {
            if !matches!(*guard, Stored::Extents(_)) {
                match self.load_layout(id) {
                    Ok(layout) => guard = Arc::new(Stored::Extents(ExtentContent::new(io, id, layout))),
                    Err(error) => {
                        tracing::error!(node = id, error = %error.chain(), "the space of a removed region is lost until the pool is opened again")
                    }
                }
            }
            if let Stored::Extents(content) = &*guard {
                extents = content.layout().extents().copied().collect();
            }
            lock(&self.contents).pending.remove(&id);
        }
        if region.file == 0 && extents.is_empty() {
            return;
        }
        let after = if fresh { 0 } else { self.next_snapshot() };
        self.bury(Doomed {
            node: id,
            after,
            guard,
            file: region.file,
            charged: charged.unwrap_or(node.allocated),
            extents,
        });
    }
}

/// The parts of `old`'s extents that `new` has no part in.
pub(super) fn difference(old: &Layout, new: &Layout) -> Vec<Extent> {
    let mut kept: HashMap<(u16, u64), BTreeMap<u64, u64>> = HashMap::new();
    for extent in new.extents() {
        kept.entry((extent.member, extent.file))
            .or_default()
            .insert(extent.offset, extent.offset + extent.len);
    }
    let mut unused = Vec::new();
    for extent in old.extents() {
        let part = |from: u64, to: u64| Extent {
            logical: extent.logical + (from - extent.offset),
            offset: from,
            len: to - from,
            ..*extent
        };
        let (mut at, end) = (extent.offset, extent.offset + extent.len);
        if let Some(ranges) = kept.get(&(extent.member, extent.file)) {
            let before = ranges.range(..=at).next_back().map_or(at, |(start, _)| *start);
            for (start, stop) in ranges.range(before..end) {
                if *start > at {
                    unused.push(part(at, *start));
                }
                at = at.max(*stop);
            }
        }
        if at < end {
            unused.push(part(at, end));
        }
    }
    unused
}

/// The committer: a snapshot every now and then, a copy of the catalog more rarely.
pub(super) fn run(shared: &Arc<Shared>) {
    let interval = match shared.options.commit_interval_ms {
        0 => Duration::from_secs(3600),
        ms => Duration::from_millis(ms),
    };
    loop {
        {
            let stop = lock(&shared.stop);
            if *stop {
                return;
            }
            if !shared.kick.swap(false, Relaxed) {
                let _ = shared.wake.wait_timeout(stop, interval);
            }
        }
        if *lock(&shared.stop) {
            return;
        }
        if shared.options.commit_interval_ms == 0 {
            continue;
        }
        if let Err(error) = shared.sync_if_dirty() {
            tracing::error!(error = %error.chain(), "a snapshot of the catalog failed; it will be tried again");
        }
        shared.seal_mapped();
        shared.back_up_if_due();
    }
}
