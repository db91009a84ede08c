//! Generations that are kept on request: what a region was before it was replaced.
//!
//! A region that keeps generations (an attribute of the engine's own says how many) does not go when another one takes its name: it moves, as it
//! is, to the directory `/.nvtier-generations/<node of the one that took it>`, in the same moment. So a generation is a region like any other: its space
//! is counted, its sums are verified, a crash leaves it or the region under its old name, and removing it frees it.
//!
//! Kept is what is *replaced*: by a commit of a [`RegionWriter`](crate::RegionWriter), an import, or a rename over it. What is written in place through
//! a handle changes the region itself.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use super::live::Live;
use super::{Pool, Shared, read, write};
use crate::error::{Error, ErrorKind, Result};
use crate::namespace::{Gone, Node, Tree};
use crate::types::{Attr, NewNode, NodeId, NodeKind, ROOT, RenameFlags, Timestamp, XattrSet};

/// The directory of all kept generations.
pub(crate) const DIRECTORY: &str = ".nvtier-generations";
/// How many a region keeps, u32.
const KEEP: &str = "trusted.nvtier.keep";
/// Most that a region keeps.
pub const GENERATIONS_MAX: u32 = 1000;

/// A generation of a region that was kept when another one took its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Its generation, see [`Attr::generation`].
    pub generation: u64,
    /// Its node: it can be opened and read as any region.
    pub node: NodeId,
    /// Bytes.
    pub size: u64,
    /// Last change of its content.
    pub mtime: Timestamp,
}

/// Nodes that are gone for good, to be purged when the tree is not locked any more.
pub(super) type Dead = Vec<(NodeId, Node<Live>)>;

/// A region that makes way for another one.
pub(super) struct SetAside {
    family: NodeId,
    old: NodeId,
    keep: u32,
    /// Under which name, if it is kept itself: an empty one is not.
    moved: Option<OsString>,
}

fn family_name(node: NodeId) -> OsString {
    format!("{node:016x}").into()
}

/// The directory of a region's generations.
fn family_of(tree: &Tree<Live>, node: NodeId) -> Option<NodeId> {
    let top = tree.directory(ROOT).ok()?.get(OsStr::new(DIRECTORY))?;
    let family = tree.directory(top.node).ok()?.get(&family_name(node))?;
    tree.directory(family.node).is_ok().then_some(family.node)
}

fn keep_of(tree: &Tree<Live>, node: NodeId) -> u32 {
    let value = tree.getxattr(node, OsStr::new(KEEP)).ok();
    value.and_then(|value| value.try_into().ok()).map_or(0, u32::from_le_bytes).min(GENERATIONS_MAX)
}

fn set_keep(tree: &mut Tree<Live>, node: NodeId, keep: u32, now: Timestamp) -> Result<()> {
    let name = OsStr::new(KEEP);
    match keep {
        0 if tree.getxattr(node, name).is_err() => Ok(()),
        0 => tree.removexattr(node, name, now),
        keep => tree.setxattr(node, name, &keep.to_le_bytes(), XattrSet::Any, now),
    }
}

/// Names of a family: which came in which order, and of what generation.
fn parse(name: &OsStr) -> Option<(u64, u64)> {
    let (order, generation) = name.to_str()?.split_once('-')?;
    Some((u64::from_str_radix(order, 16).ok()?, u64::from_str_radix(generation, 16).ok()?))
}

/// A family's regions, the oldest first: order, generation, name, node.
fn members(tree: &Tree<Live>, family: NodeId) -> Vec<(u64, u64, OsString, NodeId)> {
    let entries = tree.readdir(family, 0, usize::MAX).unwrap_or_default();
    let member = |(_, entry): (u64, crate::types::DirEntry)| {
        let (order, generation) = parse(&entry.name)?;
        Some((order, generation, entry.name, entry.node))
    };
    let mut members: Vec<_> = entries.into_iter().filter_map(member).collect();
    members.sort();
    members
}

fn next_name(tree: &Tree<Live>, family: NodeId, node: NodeId) -> Result<OsString> {
    let order = members(tree, family).last().map_or(0, |(order, ..)| order + 1);
    Ok(format!("{order:016x}-{:016x}", tree.get(node)?.generation).into())
}

fn directory(tree: &mut Tree<Live>, parent: NodeId, name: &OsStr, now: Timestamp) -> Result<NodeId> {
    if let Some(entry) = tree.directory(parent)?.get(name) {
        return tree.directory(entry.node).map(|_| entry.node);
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let new = NewNode { kind: NodeKind::Directory, mode: 0o700, uid, gid, rdev: 0, target: None };
    tree.create(parent, name, &new, now)
}

fn make_family(tree: &mut Tree<Live>, node: NodeId, now: Timestamp) -> Result<NodeId> {
    let top = directory(tree, ROOT, OsStr::new(DIRECTORY), now)?;
    directory(tree, top, &family_name(node), now)
}

/// A family belongs to another node from now on.
fn hand_over(tree: &mut Tree<Live>, from: NodeId, to: NodeId, now: Timestamp) -> Result<()> {
    let top = tree.entry(ROOT, OsStr::new(DIRECTORY))?.node;
    tree.rename(top, &family_name(from), top, &family_name(to), RenameFlags::default(), now).map(drop)
}

impl Shared {
    fn bury_gone(&self, tree: &mut Tree<Live>, gone: Option<Gone>, dead: &mut Dead) {
        if let Some(gone) = gone.filter(|gone| !gone.pinned)
            && let Some(node) = tree.forget(gone.node)
        {
            dead.push((gone.node, node));
        }
    }

    /// Removes the oldest generations beyond `keep`; the directory with the last one.
    fn prune(
        &self,
        tree: &mut Tree<Live>,
        node: NodeId,
        keep: u32,
        now: Timestamp,
        dead: &mut Dead,
    ) -> Result<()> {
        let Some(family) = family_of(tree, node) else { return Ok(()) };
        let members = members(tree, family);
        let surplus = members.len().saturating_sub(keep as usize);
        for (_, _, name, _) in members.into_iter().take(surplus) {
            let gone = tree.unlink(family, &name, now)?;
            self.bury_gone(tree, gone, dead);
        }
        if tree.directory(family)?.is_empty() {
            let top = tree.entry(ROOT, OsStr::new(DIRECTORY))?.node;
            let gone = tree.rmdir(top, &family_name(node), now)?;
            self.bury_gone(tree, gone, dead);
            if tree.directory(top)?.is_empty() {
                let gone = tree.rmdir(ROOT, OsStr::new(DIRECTORY), now)?;
                self.bury_gone(tree, gone, dead);
            }
        }
        Ok(())
    }

    /// A region lost its last name: its generations go with it.
    pub(super) fn drop_generations(&self, tree: &mut Tree<Live>, node: NodeId, dead: &mut Dead) {
        if let Err(error) = self.prune(tree, node, 0, Timestamp::now(), dead) {
            tracing::error!(node, error = %error.chain(), "generations of a removed region stay behind in {DIRECTORY}");
        }
    }

    /// Before a region is renamed over another one: the other one moves away where it keeps generations.
    pub(super) fn set_aside(
        &self,
        tree: &mut Tree<Live>,
        source: (NodeId, &OsStr),
        target: (NodeId, &OsStr),
        flags: RenameFlags,
        now: Timestamp,
    ) -> Result<Option<SetAside>> {
        if flags.exchange || flags.no_replace {
            return Ok(None);
        }
        let Some(old) = tree.directory(target.0)?.get(target.1) else { return Ok(None) };
        let keep = keep_of(tree, old.node);
        let new = tree.entry(source.0, source.1)?;
        let regions = old.kind == NodeKind::Region && new.kind == NodeKind::Region;
        if keep == 0 || !regions || new.node == old.node || keep_of(tree, new.node) > 0 {
            return Ok(None);
        }
        let family = make_family(tree, old.node, now)?;
        let mut moved = None;
        // Nothing is lost with an empty one.
        if tree.get(old.node)?.size > 0 {
            let name = next_name(tree, family, old.node)?;
            tree.rename(target.0, target.1, family, &name, RenameFlags::default(), now)?;
            moved = Some(name);
        }
        Ok(Some(SetAside { family, old: old.node, keep, moved }))
    }

    /// The rename did not happen.
    pub(super) fn bring_back(
        &self,
        tree: &mut Tree<Live>,
        aside: SetAside,
        target: (NodeId, &OsStr),
        now: Timestamp,
    ) {
        if let Some(name) = aside.moved
            && let Err(error) =
                tree.rename(aside.family, &name, target.0, target.1, RenameFlags::default(), now)
        {
            tracing::error!(error = %error.chain(), "a region that was to be replaced stays in {DIRECTORY}");
        }
    }

    /// The rename happened: the new region has the generations of the old one.
    pub(super) fn set_aside_done(
        &self,
        tree: &mut Tree<Live>,
        aside: SetAside,
        new: NodeId,
        now: Timestamp,
        dead: &mut Dead,
    ) -> Result<()> {
        hand_over(tree, aside.old, new, now)?;
        set_keep(tree, new, aside.keep, now)?;
        if aside.moved.is_some() {
            set_keep(tree, aside.old, 0, now)?;
        }
        self.prune(tree, new, aside.keep, now, dead)
    }

    pub(super) fn purge_all(self: &Arc<Self>, dead: Dead) {
        for (id, node) in dead {
            self.purge(id, &node, None, None);
        }
    }
}

impl Pool {
    /// Keeps up to `count` generations of a region from now on (0: none): what it was before another region took its name, by a commit of a
    /// [`RegionWriter`](crate::RegionWriter), an import or a rename. The newer region keeps as many. More than that go, the oldest first.
    pub fn keep_generations(&self, node: NodeId, count: u32) -> Result<()> {
        let shared = &self.inner.shared;
        shared.check_writable()?;
        if count > GENERATIONS_MAX {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("keep {count} generations of node {node}: at most {GENERATIONS_MAX} are kept"),
            ));
        }
        let mut dead = Dead::new();
        let done = {
            let mut tree = write(&shared.tree);
            let now = Timestamp::now();
            tree.region(node).map(drop).and_then(|()| set_keep(&mut tree, node, count, now))?;
            shared.prune(&mut tree, node, count, now, &mut dead)
        };
        shared.purge_all(dead);
        done
    }

    /// How many generations a region keeps.
    pub fn kept_generations(&self, node: NodeId) -> Result<u32> {
        let tree = read(&self.inner.shared.tree);
        tree.region(node)?;
        Ok(keep_of(&tree, node))
    }

    /// The generations of a region that are there besides the current one, in the order in which they were replaced.
    pub fn generations(&self, node: NodeId) -> Result<Vec<Generation>> {
        let tree = read(&self.inner.shared.tree);
        tree.region(node)?;
        let Some(family) = family_of(&tree, node) else { return Ok(Vec::new()) };
        let generation = |(_, generation, _, node): (u64, u64, OsString, NodeId)| {
            let held = tree.get(node)?;
            Ok(Generation { generation, node, size: held.size, mtime: held.mtime })
        };
        members(&tree, family).into_iter().map(generation).collect()
    }

    /// Puts a kept generation back in its place: its region has the name again, and what had it is the newest kept generation. One
    /// moment: a crash leaves all as it was, or as it is then. Durable after the next sync.
    pub fn roll_back(&self, parent: NodeId, name: &OsStr, generation: u64) -> Result<Attr> {
        let shared = &self.inner.shared;
        shared.check_writable()?;
        shared.settle(parent, name)?;
        let mut dead = Dead::new();
        let back = {
            let mut tree = write(&shared.tree);
            self.roll_back_in(&mut tree, parent, name, generation, &mut dead)
        };
        shared.purge_all(dead);
        self.getattr(back?)
    }

    fn roll_back_in(
        &self,
        tree: &mut Tree<Live>,
        parent: NodeId,
        name: &OsStr,
        generation: u64,
        dead: &mut Dead,
    ) -> Result<NodeId> {
        let (shared, now) = (&self.inner.shared, Timestamp::now());
        let current = tree.entry(parent, name)?.node;
        tree.region(current)?;
        let keep = keep_of(tree, current);
        let family = family_of(tree, current);
        let found = family.and_then(|family| {
            let mut members = members(tree, family).into_iter();
            members.find(|(_, held, ..)| *held == generation).map(|(_, _, kept, node)| (family, kept, node))
        });
        let Some((family, kept, node)) = found else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("{name:?} has no generation {generation}; it keeps {keep}"),
            ));
        };
        if tree.get(current)?.size > 0 {
            let aside = next_name(tree, family, current)?;
            tree.rename(family, &kept, parent, name, RenameFlags { exchange: true, no_replace: false }, now)?;
            tree.rename(family, &kept, family, &aside, RenameFlags::default(), now)?;
        } else {
            // It is empty: there is nothing to keep.
            let gone = tree.rename(family, &kept, parent, name, RenameFlags::default(), now)?;
            shared.bury_gone(tree, gone, dead);
        }
        hand_over(tree, current, node, now)?;
        set_keep(tree, node, keep, now)?;
        if tree.get(current).is_ok() {
            set_keep(tree, current, 0, now)?;
        }
        shared.prune(tree, node, keep, now, dead)?;
        Ok(node)
    }
}
