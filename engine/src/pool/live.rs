//! Open regions: from committed content to a draft and back.
//!
//! ```text
//!            open for writing                 last writer goes
//!   Stored ---------------------> Draft ---------------------------> Stored
//!     ^    copy, or in place        |  fsync, rename: commit unsealed  (sealed: sums made)
//!     |                             v
//!     +------- all handles see one of the two at a time --------
//! ```
//!
//! Transitions of one region are serialized by its `gate`; the tree is locked only for moments within, never the other way round,
//! and no data is read or written under the tree's lock.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, RwLock};

use super::commit::{Displaced, difference};
use super::stored::{FileContent, Stored};
use super::{Shared, Storage, lock, read, write};
use crate::content::{Committed, Content, Draft};
use crate::error::{Error, ErrorKind, Result};
use crate::extent_draft::ExtentDraft;
use crate::extent_io::ExtentContent;
use crate::file_draft::FileDraft;
use crate::layout::{Extent, Layout};
use crate::namespace::{Tree, no_node};
use crate::types::{Access, Attr, NodeId, Timestamp};

mod seal;

/// Nobody asked for a backing file yet.
const UNDECIDED: u8 = 0;
/// The kernel has the backing file: it must stay the same as long as anyone has the region open.
const PASSED: u8 = 1;
/// Somebody was told that there is none.
const SERVED: u8 = 2;

/// What handles read now.
#[derive(Clone, Debug)]
pub(crate) enum Current {
    Stored(Arc<Stored>),
    Draft(Arc<AnyDraft>),
}

/// A draft of either kind.
#[derive(Debug)]
pub(crate) enum AnyDraft {
    File(FileDraft),
    Extents(ExtentDraft),
}

impl AnyDraft {
    pub(crate) fn get(&self) -> &dyn Draft {
        match self {
            AnyDraft::File(draft) => draft,
            AnyDraft::Extents(draft) => draft,
        }
    }

    /// Whether it is a file that the catalog names, so that a snapshot of it needs no commit.
    pub(crate) fn is_known_in_place(&self) -> bool {
        matches!(self, AnyDraft::File(draft) if draft.is_adopted())
    }

    /// Bytes that it occupies and that nobody counted yet.
    pub(crate) fn uncounted(&self) -> u64 {
        match self {
            AnyDraft::File(draft) => draft.allocated().saturating_sub(draft.charged()),
            AnyDraft::Extents(_) => 0,
        }
    }

    /// Size and space of what is written so far, and when that was.
    pub(crate) fn stat(&self, live: &Live) -> (u64, u64, Option<Timestamp>) {
        match self {
            AnyDraft::File(draft) => match draft.stat() {
                Some(stat) => (stat.size, stat.allocated, stat.modified),
                None => (0, 0, None),
            },
            AnyDraft::Extents(draft) => (draft.size(), draft.allocated(), live.modified(self)),
        }
    }

    /// What the directory counts for its file, when that is the catalog's.
    fn adopted_charge(&self) -> Option<u64> {
        match self {
            AnyDraft::File(draft) => draft.is_adopted().then(|| draft.charged()),
            AnyDraft::Extents(_) => None,
        }
    }
}

impl Current {
    pub(crate) fn content(&self) -> &dyn Content {
        match self {
            Current::Stored(stored) => &**stored,
            Current::Draft(draft) => match &**draft {
                AnyDraft::File(draft) => draft,
                AnyDraft::Extents(draft) => draft,
            },
        }
    }
}

/// A region that is open.
#[derive(Debug)]
pub(crate) struct Live {
    pub node: NodeId,
    current: RwLock<Option<Current>>,
    gate: Mutex<Gate>,
    cancel_seal: AtomicBool,
    policy: AtomicU8,
    /// Nanoseconds since the epoch of the last write through a handle, 0 for none: for drafts that cannot tell.
    written_ns: AtomicU64,
    times_set: AtomicU64,
}

/// What the transitions need to know.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    writers: u32,
    /// The content that was committed last, while `current` is a draft.
    committed: Option<Arc<Stored>>,
}

impl Live {
    pub(crate) fn new(node: NodeId) -> Live {
        Live {
            node,
            current: RwLock::new(None),
            gate: Mutex::default(),
            cancel_seal: AtomicBool::new(false),
            policy: AtomicU8::new(UNDECIDED),
            written_ns: AtomicU64::new(0),
            times_set: AtomicU64::new(0),
        }
    }

    /// What handles read now. `None` only before the first open is done.
    pub(crate) fn current(&self) -> Option<Current> {
        read(&self.current).clone()
    }

    pub(crate) fn draft(&self) -> Option<Arc<AnyDraft>> {
        match &*read(&self.current) {
            Some(Current::Draft(draft)) => Some(draft.clone()),
            _ => None,
        }
    }

    fn set(&self, current: Current) {
        *write(&self.current) = Some(current);
    }

    pub(crate) fn note_write(&self) {
        let now = Timestamp::now();
        self.written_ns
            .store((now.secs.max(0) as u64).wrapping_mul(1_000_000_000) + u64::from(now.nanos), Relaxed);
    }

    /// When the draft was last written to, as far as anybody knows.
    pub(crate) fn modified(&self, draft: &AnyDraft) -> Option<Timestamp> {
        draft.get().modified().or_else(|| match (draft, self.written_ns.load(Relaxed)) {
            (AnyDraft::File(_), _) | (_, 0) => None,
            (_, ns) => {
                Some(Timestamp { secs: (ns / 1_000_000_000) as i64, nanos: (ns % 1_000_000_000) as u32 })
            }
        })
    }

    /// How often somebody has set the time of change. Who commits a draft takes this before it asks the draft for its time, and leaves the
    /// node's time alone where it is another one by then: `rsync`, `cp -p` and `tar` set the time while the region that they just closed is
    /// still being sealed.
    pub(crate) fn times_set(&self) -> u64 {
        self.times_set.load(Acquire)
    }

    /// Called with the tree's lock held for writing, as is the comparison.
    pub(crate) fn note_time_set(&self) {
        self.times_set.fetch_add(1, Release);
    }

    pub(crate) fn set_modified(&self, draft: &AnyDraft, time: Timestamp) -> Result<()> {
        self.written_ns.store(0, Relaxed);
        draft.get().set_modified(time)
    }

    /// See [`Handle::backing`](crate::Handle::backing).
    pub(crate) fn backing(&self, allowed: impl FnOnce(&Current) -> bool) -> Option<Arc<std::fs::File>> {
        let current = self.current()?;
        let file = match self.policy.load(Relaxed) {
            SERVED => None,
            PASSED => current.content().backing(),
            _ if !allowed(&current) => None,
            _ => current.content().backing(),
        };
        let decided = if file.is_some() { PASSED } else { SERVED };
        match self.policy.compare_exchange(UNDECIDED, decided, Relaxed, Relaxed) {
            Ok(_) => file,
            Err(PASSED) => file,
            Err(_) => None,
        }
    }

    fn is_passed(&self) -> bool {
        self.policy.load(Relaxed) == PASSED
    }
}

fn held_attr(tree: &Tree<Live>, node: NodeId) -> Result<Attr> {
    tree.get(node).map(|held| held.attr(node))
}

impl Shared {
    /// Opens a region: pins its node and brings its content up. `keep`: for a writer, how many bytes of the old content it wants.
    pub(crate) fn open_live(self: &Arc<Self>, node: NodeId, access: Access, keep: u64) -> Result<Arc<Live>> {
        if access.writes() {
            self.check_writable()?;
        }
        let live = {
            let mut tree = write(&self.tree);
            tree.region(node)?;
            let held = tree.get_mut(node)?;
            if held.nlink == 0 && held.pins == 0 {
                return Err(no_node(node));
            }
            held.pins += 1;
            let region = held.region_mut().ok_or_else(|| no_node(node))?;
            let live = region.live.get_or_insert_with(|| Arc::new(Live::new(node))).clone();
            lock(&self.open).insert(node, live.clone());
            live
        };
        match self.bring_up(&live, access, keep) {
            Ok(()) => Ok(live),
            Err(error) => {
                self.unpin(&live);
                Err(error)
            }
        }
    }

    fn bring_up(self: &Arc<Self>, live: &Arc<Live>, access: Access, keep: u64) -> Result<()> {
        if access.writes() {
            live.cancel_seal.store(true, Relaxed);
        }
        let mut gate = lock(&live.gate);
        live.cancel_seal.store(false, Relaxed);
        if live.current().is_none() {
            live.set(Current::Stored(Arc::new(self.load_stored(live.node)?)));
        }
        if access.writes() {
            let started = self.start_draft(live, &mut gate, keep);
            if let Err(error) = started {
                if gate.writers == 0 {
                    self.finish(live, &mut gate);
                }
                return Err(error);
            }
            gate.writers += 1;
        }
        Ok(())
    }

    /// What the tree and the catalog know of a region's content.
    fn load_stored(self: &Arc<Self>, node: NodeId) -> Result<Stored> {
        let (file, attr, sealed) = {
            let tree = read(&self.tree);
            let (held, region) = (tree.get(node)?, tree.region(node)?);
            (region.file, held.attr(node), region.sealed)
        };
        Ok(match &self.storage {
            Storage::Files { .. } if file == 0 => Stored::Empty,
            Storage::Files { .. } => Stored::File(FileContent::new(self, &attr, file, sealed)),
            Storage::Extents(_) if attr.generation == 0 => Stored::Empty,
            Storage::Extents(io) => Stored::Extents(ExtentContent::new(io, node, self.load_layout(node)?)),
        })
    }

    /// Lets a writer in; the gate is held.
    fn start_draft(self: &Arc<Self>, live: &Arc<Live>, gate: &mut Gate, keep: u64) -> Result<()> {
        let stored = match live.current() {
            Some(Current::Stored(stored)) => stored,
            Some(Current::Draft(draft)) => {
                if keep < draft.get().size() {
                    draft.get().set_len(keep)?;
                    live.note_write();
                }
                return Ok(());
            }
            None => return Err(Error::new(ErrorKind::Stale, format!("node {} has no content", live.node))),
        };
        let draft = match (&self.storage, &*stored) {
            (Storage::Files { directory, .. }, stored) => {
                self.start_file_draft(directory, live, stored, keep)?
            }
            (Storage::Extents(io), stored) => {
                let base = match stored {
                    Stored::Extents(content) if keep > 0 => content.layout().clone(),
                    _ => Arc::new(Layout::new(self.chunk_size)),
                };
                let draft = ExtentDraft::new(io, live.node, base);
                if keep < draft.size() {
                    draft.set_len(keep)?;
                }
                AnyDraft::Extents(draft)
            }
        };
        let changed = keep < stored.size();
        gate.committed = Some(stored);
        {
            let mut tree = write(&self.tree);
            let held = tree.get_mut(live.node)?;
            let first = !held.stored && held.generation == 0;
            if let Some(region) = held.region_mut().filter(|_| first) {
                region.unborn = true;
            }
        }
        live.written_ns.store(0, Relaxed);
        if changed {
            live.note_write();
        }
        live.set(Current::Draft(Arc::new(draft)));
        Ok(())
    }

    fn start_file_draft(
        self: &Arc<Self>,
        directory: &Arc<crate::member::directory::FileDirectory>,
        live: &Arc<Live>,
        stored: &Stored,
        keep: u64,
    ) -> Result<AnyDraft> {
        let node = live.node;
        let chunk_size = self.chunk_size;
        let modified = read(&self.tree).get(node)?.mtime;
        let file = match stored {
            Stored::File(file) => file,
            _ => return FileDraft::create(node, directory, chunk_size, modified, false).map(AnyDraft::File),
        };
        // What has no sums may be mapped by somebody who stores into it: a copy would part them.
        let alone = file.sealed || keep == 0;
        if !live.is_passed() && alone {
            let keep = keep.min(stored.size());
            if keep == 0 {
                let draft = FileDraft::create(node, directory, chunk_size, Timestamp::now(), true)?;
                return Ok(AnyDraft::File(draft));
            }
            let limit = self.options.copy_limit_bytes;
            match FileDraft::copy_of(node, directory, chunk_size, modified, file.open()?, keep, limit) {
                Ok(Some(draft)) => return Ok(AnyDraft::File(draft)),
                Ok(None) => {}
                // No room for a copy: what fits without one still can be written.
                Err(error) if error.kind() == ErrorKind::NoSpace => {}
                Err(error) => return Err(error),
            }
        }
        // In place. Its sums are void from here on, and whoever opens the pool after a crash must know.
        self.mark_unsealed(node)?;
        let open = file
            .open()?
            .try_clone()
            .map_err(|error| Error::io(format!("open node {node} for writing"), error))?;
        let draft = FileDraft::in_place(node, directory, chunk_size, file.file, open, file.allocated);
        if keep < draft.size() {
            draft.set_len(keep)?;
        }
        Ok(AnyDraft::File(draft))
    }

    fn mark_unsealed(self: &Arc<Self>, node: NodeId) -> Result<()> {
        {
            let mut tree = write(&self.tree);
            let held = tree.get_mut(node)?;
            let gone = held.nlink == 0;
            match held.region_mut() {
                Some(region) if region.sealed => {}
                _ => return Ok(()),
            }
            tree.set_sealed(node, false);
            if gone {
                return Ok(());
            }
            tree.dirty.nodes.insert(node);
        }
        self.sync()
    }

    /// Runs `f` while nobody can begin to write to the region. `None`: somebody does, or its content is another one than `stored` by now.
    pub(crate) fn with_committed<T>(
        &self,
        live: &Live,
        stored: &Arc<Stored>,
        f: impl FnOnce() -> T,
    ) -> Option<T> {
        let _gate = lock(&live.gate);
        match live.current() {
            Some(Current::Stored(current)) if Arc::ptr_eq(&current, stored) && current.sealed() => Some(f()),
            _ => None,
        }
    }

    /// One more use of a handle's content ends; the last one seals or gives up.
    pub(crate) fn close_live(self: &Arc<Self>, live: &Arc<Live>, access: Access) {
        // A reader has something to finish only where `finish` left it so.
        if access.writes() || live.draft().is_some() {
            let mut gate = lock(&live.gate);
            if access.writes() {
                gate.writers = gate.writers.saturating_sub(1);
            }
            if gate.writers == 0 {
                self.finish(live, &mut gate);
            }
        }
        self.unpin(live);
    }

    /// Lets go of a pin; the last one of an unlinked node takes its content along.
    pub(crate) fn unpin(self: &Arc<Self>, live: &Arc<Live>) {
        let (closed, gone) = {
            let mut tree = write(&self.tree);
            let last = tree.unpin(live.node);
            let closed = match tree.get_mut(live.node) {
                Ok(held) if held.pins == 0 => {
                    held.region_mut().is_some_and(|region| region.live.take().is_some())
                }
                _ => false,
            };
            if closed {
                lock(&self.open).remove(&live.node);
            }
            (closed, if last { tree.forget(live.node) } else { None })
        };
        let draft = live.draft().filter(|_| closed || gone.is_some());
        if let Some(node) = gone {
            let charged = draft.as_ref().and_then(|draft| draft.adopted_charge());
            let stored = match live.current() {
                Some(Current::Stored(stored)) => Some(stored),
                _ => lock(&live.gate).committed.clone(),
            };
            live.set(Current::Stored(Arc::new(Stored::Empty)));
            lock(&live.gate).committed = None;
            self.purge(live.node, &node, charged, stored);
        }
        if let Some(draft) = draft {
            // What no commit took.
            draft.get().discard();
        }
    }
}
