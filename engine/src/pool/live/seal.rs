//! From a draft to committed content: seals at the last close, commits in between, and seals that had to wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use super::*;

/// How long to wait, time after time, for the kernel to let go of a file whose close it has told us of already.
const CLOSING_US: [u64; 5] = [50, 100, 200, 400, 800];

impl Shared {
    /// The last writer went: seals the draft. The gate is held.
    pub(super) fn finish(self: &Arc<Self>, live: &Arc<Live>, gate: &mut Gate) {
        let Some(draft) = live.draft() else { return };
        let Ok((nlink, pins)) = read(&self.tree).get(live.node).map(|node| (node.nlink, node.pins)) else {
            return;
        };
        if nlink == 0 {
            return; // nobody will ever find it: it stays as it is until the last reader goes
        }
        let mapped = self.is_mapped(live.node, &draft);
        if let (AnyDraft::File(file), Some(stored)) = (&*draft, &gate.committed)
            && file.is_unchanged()
            && !mapped
            && (!live.is_passed() || pins == 1)
            && stored.sealed()
        {
            // Opened for writing, and closed: the old content is the content.
            live.set(Current::Stored(stored.clone()));
            gate.committed = None;
            file.discard();
            let mut tree = write(&self.tree);
            if tree.region(live.node).is_ok_and(|region| region.unborn) {
                tree.mark_born(live.node);
            }
            return;
        }
        let times_set = live.times_set();
        let committed = match draft.get().commit(!mapped, &live.cancel_seal) {
            Ok(Some(committed)) => committed,
            Ok(None) => return, // a writer came: it goes on with this draft
            Err(error) => {
                self.counters.seal_errors.fetch_add(1, Relaxed);
                tracing::error!(node = live.node, error = %error.chain(), "a region could not be sealed; it stays without checksums");
                match draft.get().commit(false, &live.cancel_seal) {
                    Ok(Some(committed)) => committed,
                    _ => return,
                }
            }
        };
        let mut committed = committed;
        if let AnyDraft::File(draft) = &*draft
            && committed.layout.size() == 0
            && live.is_passed()
            && pins > 1
        {
            // An empty region needs no file, but the kernel still holds this one for others: it stays the region's.
            committed.layout.replace(Extent {
                logical: 0,
                member: 0,
                file: draft.number(),
                offset: 0,
                len: 1,
            });
        }
        let sealed = committed.sealed;
        match self.install(live, gate, &draft, committed, times_set) {
            Ok(stored) if sealed => {
                live.set(Current::Stored(stored));
                gate.committed = None;
                draft.get().discard();
            }
            Ok(_) => {}
            Err(error) => {
                self.counters.seal_errors.fetch_add(1, Relaxed);
                tracing::error!(node = live.node, error = %error.chain(), "a region's new content could not be committed");
            }
        }
    }

    /// Whether somebody may still change a draft's file without the kernel telling us: a shared mapping outlives its descriptor, and a
    /// file that was passed through is then no longer known to be open. Such a region is sealed later, see `seal_mapped`.
    fn is_mapped(&self, node: NodeId, draft: &AnyDraft) -> bool {
        let AnyDraft::File(draft) = draft else { return false };
        let Some(file) = draft.backing() else { return false };
        for wait in CLOSING_US {
            match nvme::is_open_elsewhere(&file) {
                Some(true) => std::thread::sleep(Duration::from_micros(wait)),
                _ => return false,
            }
        }
        lock(&self.mapped).insert(node);
        true
    }

    /// Tries again to seal what was mapped when it should have been sealed.
    pub(in crate::pool) fn seal_mapped(self: &Arc<Self>) {
        let nodes = std::mem::take(&mut *lock(&self.mapped));
        for node in nodes {
            let Ok(live) = self.open_live(node, Access::Read, u64::MAX) else { continue };
            if let Err(error) = self.reseal_live(&live) {
                tracing::warn!(node, error = %error.chain(), "cannot make checksums of a region");
            }
            // Where a reader holds the draft, this seals it.
            self.close_live(&live, Access::Read);
        }
    }

    /// Commits what a draft holds so far, without sums where that needs reading. The draft goes on.
    pub(crate) fn commit_live(self: &Arc<Self>, live: &Arc<Live>) -> Result<()> {
        let mut gate = lock(&live.gate);
        let Some(draft) = live.draft() else { return Ok(()) };
        let times_set = live.times_set();
        if let Some(committed) = draft.get().commit(false, &AtomicBool::new(false))? {
            self.install(live, &mut gate, &draft, committed, times_set)?;
        }
        Ok(())
    }

    /// Makes space that a draft got the region's own, see `slab.rs`. The draft ends.
    pub(in crate::pool) fn install_slab(
        self: &Arc<Self>,
        live: &Arc<Live>,
        draft: &Arc<AnyDraft>,
        committed: Committed,
    ) -> Result<()> {
        let mut gate = lock(&live.gate);
        let extents: Vec<Extent> = committed.layout.extents().copied().collect();
        // A slab knows no time of its own.
        match self.install(live, &mut gate, draft, committed, live.times_set()) {
            Ok(stored) => {
                live.set(Current::Stored(stored));
                gate.committed = None;
                draft.get().discard();
                Ok(())
            }
            Err(error) => {
                // The node is gone: nobody owns the space.
                if let Storage::Extents(io) = &self.storage {
                    io.stripes().free(&extents)?;
                }
                Err(error)
            }
        }
    }

    /// Makes committed content the node's. The gate is held. `times_set`: [`Live::times_set`] from before the content was committed.
    fn install(
        self: &Arc<Self>,
        live: &Arc<Live>,
        gate: &mut Gate,
        draft: &Arc<AnyDraft>,
        committed: Committed,
        times_set: u64,
    ) -> Result<Arc<Stored>> {
        let Committed { mut layout, sealed, allocated, modified } = committed;
        let modified = modified.or_else(|| live.modified(draft));
        let node = live.node;
        let generation = self.generation.fetch_add(1, Relaxed) + 1;
        layout.set_generation(generation);
        let size = layout.size();
        let file = match &**draft {
            AnyDraft::File(_) => layout.single_file().map_or(0, |(_, file)| file),
            AnyDraft::Extents(_) => 0,
        };
        let layout = Arc::new(layout);
        let old = gate.committed.clone().unwrap_or_else(|| Arc::new(Stored::Empty));
        let unused = match (&**draft, &*old) {
            (AnyDraft::Extents(_), Stored::Extents(old)) => difference(old.layout(), &layout),
            _ => Vec::new(),
        };
        let mut tree = write(&self.tree);
        let held = tree.get_mut(node)?;
        let named = held.nlink > 0;
        held.size = size;
        let old_allocated = std::mem::replace(&mut held.allocated, allocated);
        held.generation = generation;
        if let Some(modified) = modified.filter(|_| live.times_set() == times_set) {
            held.mtime = modified;
            held.ctime = held.ctime.max(modified);
        }
        let Some(region) = held.region_mut() else { return Err(no_node(node)) };
        let old_file = std::mem::replace(&mut region.file, file);
        let was_unborn = region.unborn;
        tree.set_sealed(node, sealed);
        if named {
            tree.dirty.nodes.insert(node);
            if was_unborn {
                tree.mark_born(node);
            }
        }
        let attr = held_attr(&tree, node)?;
        let displaced = Displaced { file: old_file, charged: old_allocated, extents: unused, stored: old };
        let doomed = self.replace_content(node, named.then(|| layout.clone()), file, displaced);
        drop(tree);
        let stored = match &**draft {
            AnyDraft::Extents(_) => {
                let Storage::Extents(io) = &self.storage else { return Err(no_node(node)) };
                Arc::new(Stored::Extents(ExtentContent::new(io, node, layout)))
            }
            AnyDraft::File(draft) => {
                if file != 0 {
                    draft.adopt();
                    let content = FileContent::new(self, &attr, file, sealed);
                    let content = match draft.backing() {
                        Some(open) => content.with_open(open),
                        None => content,
                    };
                    Arc::new(Stored::File(content))
                } else {
                    Arc::new(Stored::Empty)
                }
            }
        };
        gate.committed = Some(stored.clone());
        if let Some(doomed) = doomed {
            self.bury(doomed);
        }
        Ok(stored)
    }

    /// See [`Handle::sync`](crate::Handle::sync).
    pub(crate) fn sync_live(self: &Arc<Self>, live: &Arc<Live>) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let named = read(&self.tree).get(live.node).is_ok_and(|node| node.nlink > 0);
        match live.draft() {
            // No catalog will name it: only its own bytes count.
            Some(draft) if !named => match &*draft {
                AnyDraft::File(draft) => return draft.sync_data(),
                AnyDraft::Extents(draft) => return draft.flush(),
            },
            // The catalog knows the file, and that size and time are to be asked of it.
            Some(draft) if draft.is_known_in_place() => {
                let AnyDraft::File(draft) = &*draft else { return self.sync() };
                draft.sync_data()?;
            }
            Some(_) => self.commit_live(live)?,
            None => {}
        }
        self.sync_if_dirty()
    }

    /// Makes sums for content that a crash left without.
    pub(crate) fn reseal_live(self: &Arc<Self>, live: &Arc<Live>) -> Result<()> {
        let mut gate = lock(&live.gate);
        let stored = match live.current() {
            Some(Current::Stored(stored)) => stored,
            _ => return Ok(()),
        };
        let (Stored::File(file), Storage::Files { directory, .. }) = (&*stored, &self.storage) else {
            return Ok(());
        };
        if file.sealed {
            return Ok(());
        }
        let open =
            file.open()?.try_clone().map_err(|error| Error::io(format!("open node {}", live.node), error))?;
        let draft =
            FileDraft::in_place(live.node, directory, self.chunk_size, file.file, open, file.allocated);
        gate.committed = Some(stored.clone());
        live.set(Current::Draft(Arc::new(AnyDraft::File(draft))));
        self.finish(live, &mut gate);
        Ok(())
    }
}
