//! The model: what a pool should hold, by the rules of docs/semantics.md, in plain maps.
//!
//! A region has the content that handles see (`live`) and the one that a snapshot takes (`committed`): a draft becomes committed
//! when its last writer closes it, at an fsync, and when it is renamed. A region that never had content committed is in no snapshot,
//! nor are its names.

use std::collections::BTreeMap;

use crate::content::Content;

/// A node of the model. Not the pool's number.
pub type Id = u64;

/// The root.
pub const ROOT: Id = 1;

/// Why a call must fail. The kinds are the engine's business; that it fails is what counts here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

type Result<T> = std::result::Result<T, Refused>;

/// What a node is.
#[derive(Clone, Debug)]
pub enum Body {
    /// Entries by name.
    Directory(BTreeMap<String, Id>),
    /// Bytes.
    Region(Region),
    /// A target.
    Symlink(String),
}

/// A region.
#[derive(Clone, Debug, Default)]
pub struct Region {
    /// What handles see.
    pub live: Content,
    /// What a snapshot takes; `None`: it is in none.
    pub committed: Option<Content>,
    /// Handles that write.
    pub writers: u32,
    /// A snapshot may hold it.
    stored: bool,
    /// Content was committed once.
    had_content: bool,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Permission bits.
    pub mode: u32,
    /// What it is.
    pub body: Body,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    names: u32,
    pins: u32,
    /// Generations that it keeps when it is replaced.
    keep: u32,
    /// Those that are there, the oldest first.
    kept: Vec<Id>,
}

/// A node as a snapshot shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Names with the same number lead to the same node.
    pub node: Id,
    /// Permission bits.
    pub mode: u32,
    /// Of a region its names, of a directory 2 and its subdirectories.
    pub nlink: u32,
    /// Of a region.
    pub content: Option<Content>,
    /// Of a symbolic link.
    pub target: Option<String>,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// How many generations it keeps.
    pub keep: u32,
    /// Those that are there, the oldest first.
    pub kept: Vec<Kept>,
}

/// A generation that is kept, which may come back as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// As in [`Seen`].
    pub node: Id,
    /// Permission bits.
    pub mode: u32,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Its bytes.
    pub content: Content,
}

/// A whole tree at one moment, by path from the root (without a leading `/`; the root itself is not in it).
pub type State = BTreeMap<String, Seen>;

/// The tree.
#[derive(Clone, Debug)]
pub struct Model {
    nodes: BTreeMap<Id, Node>,
    next: Id,
    /// Bytes of a chunk.
    pub chunk: usize,
}

impl Node {
    fn new(mode: u32, body: Body) -> Node {
        Node { mode, body, xattrs: BTreeMap::new(), names: 1, pins: 0, keep: 0, kept: Vec::new() }
    }
}

/// Directory and last name of a path.
pub fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

impl Model {
    /// Nothing but a root.
    pub fn new(chunk: usize) -> Model {
        let root = Node::new(0o755, Body::Directory(BTreeMap::new()));
        Model { nodes: BTreeMap::from([(ROOT, root)]), next: ROOT + 1, chunk }
    }

    /// A tree as a snapshot left it.
    pub fn from_state(state: &State, chunk: usize) -> Model {
        let mut model = Model::new(chunk);
        let mut known: BTreeMap<Id, Id> = BTreeMap::new();
        // In the order of paths, directories come before what they hold.
        for (path, seen) in state {
            let (above, name) = split(path);
            let Ok(parent) = model.resolve(above) else { continue };
            let id = *known.entry(seen.node).or_insert_with(|| {
                let id = model.next;
                model.next += 1;
                id
            });
            if let Some(node) = model.nodes.get_mut(&id) {
                node.names += 1;
            } else {
                let body = match (&seen.content, &seen.target) {
                    (Some(content), _) => Body::Region(Region {
                        live: content.clone(),
                        committed: Some(content.clone()),
                        stored: true,
                        had_content: true,
                        ..Region::default()
                    }),
                    (None, Some(target)) => Body::Symlink(target.clone()),
                    (None, None) => Body::Directory(BTreeMap::new()),
                };
                let node =
                    Node { xattrs: seen.xattrs.clone(), keep: seen.keep, ..Node::new(seen.mode, body) };
                model.nodes.insert(id, node);
                for kept in &seen.kept {
                    let content = &kept.content;
                    let old = *known.entry(kept.node).or_insert_with(|| {
                        model.next += 1;
                        model.next - 1
                    });
                    // It may have a name in the tree as well.
                    match model.nodes.get_mut(&old) {
                        Some(node) => node.names += 1,
                        None => {
                            let body = Body::Region(Region {
                                live: content.clone(),
                                committed: Some(content.clone()),
                                stored: true,
                                had_content: true,
                                ..Region::default()
                            });
                            let node = Node { xattrs: kept.xattrs.clone(), ..Node::new(kept.mode, body) };
                            model.nodes.insert(old, node);
                        }
                    }
                    if let Some(node) = model.nodes.get_mut(&id) {
                        node.kept.push(old);
                    }
                }
            }
            if let Ok(entries) = model.entries_mut(parent) {
                entries.insert(name.to_owned(), id);
            }
        }
        model
    }

    /// A node, known to exist.
    ///
    /// # Panics
    /// When it does not.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[&id]
    }

    fn node_mut(&mut self, id: Id) -> Result<&mut Node> {
        self.nodes.get_mut(&id).ok_or(Refused)
    }

    fn entries(&self, id: Id) -> Result<&BTreeMap<String, Id>> {
        match self.nodes.get(&id).map(|node| &node.body) {
            Some(Body::Directory(entries)) => Ok(entries),
            _ => Err(Refused),
        }
    }

    fn entries_mut(&mut self, id: Id) -> Result<&mut BTreeMap<String, Id>> {
        match self.nodes.get_mut(&id).map(|node| &mut node.body) {
            Some(Body::Directory(entries)) => Ok(entries),
            _ => Err(Refused),
        }
    }

    /// A region.
    pub fn region(&self, id: Id) -> Result<&Region> {
        match self.nodes.get(&id).map(|node| &node.body) {
            Some(Body::Region(region)) => Ok(region),
            _ => Err(Refused),
        }
    }

    /// A region, to change.
    pub fn region_mut(&mut self, id: Id) -> Result<&mut Region> {
        match self.nodes.get_mut(&id).map(|node| &mut node.body) {
            Some(Body::Region(region)) => Ok(region),
            _ => Err(Refused),
        }
    }

    /// The node of a path.
    pub fn resolve(&self, path: &str) -> Result<Id> {
        let mut at = ROOT;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            at = *self.entries(at)?.get(part).ok_or(Refused)?;
        }
        Ok(at)
    }

    /// Makes a node.
    pub fn create(&mut self, path: &str, mode: u32, body: Body) -> Result<Id> {
        let (above, name) = split(path);
        let parent = self.resolve(above)?;
        if self.entries(parent)?.contains_key(name) {
            return Err(Refused);
        }
        let id = self.next;
        self.next += 1;
        self.nodes.insert(id, Node::new(mode, body));
        self.entries_mut(parent)?.insert(name.to_owned(), id);
        Ok(id)
    }

    /// An empty region: it is in snapshots at once, until somebody writes to it.
    pub fn empty_region() -> Body {
        Body::Region(Region { committed: Some(Content::default()), ..Region::default() })
    }

    /// Makes the directories of a path that are missing.
    pub fn create_dirs(&mut self, path: &str) -> Result<Id> {
        let mut at = ROOT;
        let mut so_far = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            so_far = if so_far.is_empty() { part.to_owned() } else { format!("{so_far}/{part}") };
            at = match self.entries(at)?.get(part) {
                Some(id) => *id,
                None => self.create(&so_far, 0o755, Body::Directory(BTreeMap::new()))?,
            };
            self.entries(at)?;
        }
        Ok(at)
    }

    fn drop_name(&mut self, id: Id) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.names -= 1;
        let family = if node.names == 0 { std::mem::take(&mut node.kept) } else { Vec::new() };
        if node.names == 0 && node.pins == 0 {
            self.nodes.remove(&id);
        }
        for old in family {
            self.drop_name(old);
        }
    }

    fn prune(&mut self, id: Id, keep: u32) {
        while let Some(node) = self.nodes.get_mut(&id).filter(|node| node.kept.len() > keep as usize) {
            let oldest = node.kept.remove(0);
            self.drop_name(oldest);
        }
    }

    /// Another region took the name of `old`: that goes, or is kept.
    fn replaced(&mut self, old: Id, new: Id) {
        let keeps = |model: &Model, id: Id| model.nodes.get(&id).map_or(0, |node| node.keep);
        let keep = keeps(self, old);
        if keep == 0 || keeps(self, new) > 0 || self.region(old).is_err() || self.region(new).is_err() {
            return self.drop_name(old);
        }
        let has_bytes =
            |region: &Region| region.committed.as_ref().is_some_and(|content| !content.bytes.is_empty());
        let mut family =
            self.nodes.get_mut(&old).map(|node| std::mem::take(&mut node.kept)).unwrap_or_default();
        if self.region(old).is_ok_and(has_bytes) {
            family.push(old);
            if let Some(node) = self.nodes.get_mut(&old) {
                node.keep = 0;
            }
        } else {
            self.drop_name(old);
        }
        if let Some(node) = self.nodes.get_mut(&new) {
            (node.keep, node.kept) = (keep, family);
        }
        self.prune(new, keep);
    }

    /// Keeps generations of a region from now on.
    pub fn keep(&mut self, path: &str, count: u32) -> Result<()> {
        let id = self.resolve(path)?;
        self.region(id)?;
        self.node_mut(id)?.keep = count;
        self.prune(id, count);
        Ok(())
    }

    /// Generations of a region that are there.
    pub fn generations(&self, path: &str) -> Result<usize> {
        let id = self.resolve(path)?;
        self.region(id)?;
        Ok(self.node(id).kept.len())
    }

    /// Puts one back; what is being written is committed first.
    pub fn roll_back(&mut self, path: &str, which: usize) -> Result<()> {
        let (above, name) = split(path);
        let (parent, current) = (self.resolve(above)?, self.resolve(path)?);
        if self.region(current)?.writers > 0 {
            self.commit(current)?;
        }
        let has_bytes =
            self.region(current)?.committed.as_ref().is_some_and(|content| !content.bytes.is_empty());
        let node = self.node_mut(current)?;
        let keep = std::mem::take(&mut node.keep);
        let mut family = std::mem::take(&mut node.kept);
        let back = family.remove(which);
        if has_bytes {
            family.push(current);
        }
        self.entries_mut(parent)?.insert(name.to_owned(), back);
        if !has_bytes {
            self.drop_name(current);
        }
        let node = self.node_mut(back)?;
        (node.keep, node.kept) = (keep, family);
        self.prune(back, keep);
        Ok(())
    }

    /// Takes a name away that is not a directory's.
    pub fn unlink(&mut self, path: &str) -> Result<()> {
        let (above, name) = split(path);
        let parent = self.resolve(above)?;
        let id = *self.entries(parent)?.get(name).ok_or(Refused)?;
        if self.entries(id).is_ok() {
            return Err(Refused);
        }
        self.entries_mut(parent)?.remove(name);
        self.drop_name(id);
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&mut self, path: &str) -> Result<()> {
        let (above, name) = split(path);
        let parent = self.resolve(above)?;
        let id = *self.entries(parent)?.get(name).ok_or(Refused)?;
        if !self.entries(id)?.is_empty() {
            return Err(Refused);
        }
        self.entries_mut(parent)?.remove(name);
        self.nodes.remove(&id);
        Ok(())
    }

    /// One more name.
    pub fn link(&mut self, from: &str, to: &str) -> Result<()> {
        let id = self.resolve(from)?;
        let (above, name) = split(to);
        let parent = self.resolve(above)?;
        if self.entries(parent)?.contains_key(name) || self.entries(id).is_ok() {
            return Err(Refused);
        }
        self.entries_mut(parent)?.insert(name.to_owned(), id);
        self.node_mut(id)?.names += 1;
        Ok(())
    }

    fn is_within(&self, id: Id, above: Id) -> bool {
        let Ok(entries) = self.entries(above) else { return id == above };
        id == above
            || entries.values().any(|child| self.entries(*child).is_ok() && self.is_within(id, *child))
    }

    /// `renameat2(2)`; what is being written gets committed by it.
    pub fn rename(&mut self, from: &str, to: &str, exchange: bool) -> Result<()> {
        let ((from_above, from_name), (to_above, to_name)) = (split(from), split(to));
        let (from_parent, to_parent) = (self.resolve(from_above)?, self.resolve(to_above)?);
        for (wanted, parent, name) in [(true, from_parent, from_name), (exchange, to_parent, to_name)] {
            if let (true, Some(id)) = (wanted, self.entries(parent)?.get(name).copied())
                && self.region(id).is_ok_and(|region| region.writers > 0)
            {
                self.commit(id)?;
            }
        }
        let source = *self.entries(from_parent)?.get(from_name).ok_or(Refused)?;
        let target = self.entries(to_parent)?.get(to_name).copied();
        let source_is_dir = self.entries(source).is_ok();
        if source_is_dir && self.is_within(to_parent, source) {
            return Err(Refused);
        }
        let Some(target) = target else {
            if exchange {
                return Err(Refused);
            }
            self.entries_mut(from_parent)?.remove(from_name);
            self.entries_mut(to_parent)?.insert(to_name.to_owned(), source);
            return Ok(());
        };
        let target_is_dir = self.entries(target).is_ok();
        if exchange {
            if target_is_dir && self.is_within(from_parent, target) {
                return Err(Refused);
            }
            self.entries_mut(from_parent)?.insert(from_name.to_owned(), target);
            self.entries_mut(to_parent)?.insert(to_name.to_owned(), source);
            return Ok(());
        }
        if target == source {
            return Ok(());
        }
        if source_is_dir != target_is_dir || (target_is_dir && !self.entries(target)?.is_empty()) {
            return Err(Refused);
        }
        self.entries_mut(from_parent)?.remove(from_name);
        self.entries_mut(to_parent)?.insert(to_name.to_owned(), source);
        match target_is_dir {
            true => drop(self.nodes.remove(&target)),
            false => self.replaced(target, source),
        }
        Ok(())
    }

    /// Puts a new region with this content at a path, in place of what is there: the commit of an import.
    pub fn import(&mut self, path: &str, content: Content) -> Result<()> {
        let (above, name) = split(path);
        let parent = self.resolve(above)?;
        let old = self.entries(parent)?.get(name).copied();
        if let Some(old) = old {
            if self.entries(old).is_ok() {
                return Err(Refused);
            }
            self.entries_mut(parent)?.remove(name);
        }
        let id = self.create(path, 0o644, Model::empty_region())?;
        let region = self.region_mut(id)?;
        region.live = content;
        self.commit(id)?;
        if let Some(old) = old {
            self.replaced(old, id);
        }
        Ok(())
    }

    /// Opens a region for writing.
    pub fn open(&mut self, id: Id, truncate: bool) -> Result<()> {
        let chunk = self.chunk;
        let region = self.region_mut(id)?;
        if region.writers == 0 && !region.stored && !region.had_content {
            region.committed = None;
        }
        region.writers += 1;
        if truncate {
            region.live.set_len(chunk, 0);
        }
        self.node_mut(id)?.pins += 1;
        Ok(())
    }

    /// Closes a handle that writes; the last one commits.
    pub fn close(&mut self, id: Id) -> Result<()> {
        let node = self.node_mut(id)?;
        node.pins -= 1;
        let (named, pinned) = (node.names > 0, node.pins > 0);
        let region = self.region_mut(id)?;
        region.writers -= 1;
        if region.writers == 0 && named {
            self.commit(id)?;
        }
        if !named && !pinned {
            self.nodes.remove(&id);
        }
        Ok(())
    }

    /// What is written so far is what a snapshot takes.
    pub fn commit(&mut self, id: Id) -> Result<()> {
        let region = self.region_mut(id)?;
        region.committed = Some(region.live.clone());
        region.had_content = true;
        Ok(())
    }

    /// Whether a node has a name.
    pub fn is_named(&self, id: Id) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.names > 0)
    }

    /// `truncate(2)`.
    pub fn truncate(&mut self, path: &str, len: usize) -> Result<()> {
        let id = self.resolve(path)?;
        let chunk = self.chunk;
        let region = self.region_mut(id)?;
        if region.writers == 0 && region.live.bytes.len() == len {
            return Ok(()); // nothing to commit: a region that never had content still has none
        }
        region.live.set_len(chunk, len);
        if region.writers == 0 { self.commit(id) } else { Ok(()) }
    }

    /// Permission bits.
    pub fn chmod(&mut self, path: &str, mode: u32) -> Result<()> {
        let id = self.resolve(path)?;
        self.node_mut(id)?.mode = mode;
        Ok(())
    }

    /// Sets an extended attribute, or removes it.
    pub fn xattr(&mut self, path: &str, name: &str, value: Option<Vec<u8>>) -> Result<()> {
        let id = self.resolve(path)?;
        let xattrs = &mut self.node_mut(id)?.xattrs;
        match value {
            Some(value) => drop(xattrs.insert(name.to_owned(), value)),
            None => drop(xattrs.remove(name).ok_or(Refused)?),
        }
        Ok(())
    }

    /// A snapshot was taken: what it holds may be in a catalog from now on.
    pub fn snapshot(&mut self) {
        for node in self.nodes.values_mut() {
            if let Body::Region(region) = &mut node.body
                && node.names > 0
                && region.committed.is_some()
            {
                region.stored = true;
            }
        }
    }

    /// Chunks that all regions take together, nothing being open; `None` where that is not known.
    pub fn chunks(&self) -> Option<u64> {
        let mut chunks = 0;
        for node in self.nodes.values() {
            let Body::Region(region) = &node.body else { continue };
            let Some(content) = &region.committed else { continue };
            if content.unsure {
                return None;
            }
            chunks += content.chunks();
        }
        Some(chunks)
    }

    /// What a snapshot taken now would show.
    pub fn visible(&self) -> State {
        let mut state = State::new();
        self.show(ROOT, "", &mut state);
        state
    }

    fn show(&self, id: Id, path: &str, state: &mut State) {
        let Ok(entries) = self.entries(id) else { return };
        for (name, child) in entries {
            let node = &self.nodes[child];
            let path = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            let mut seen = Seen {
                node: *child,
                mode: node.mode,
                nlink: node.names,
                content: None,
                target: None,
                xattrs: node.xattrs.clone(),
                keep: node.keep,
                kept: Vec::new(),
            };
            match &node.body {
                Body::Region(region) => match &region.committed {
                    Some(content) => {
                        seen.content = Some(content.clone());
                        let kept = |old: &Id| {
                            let content = self.region(*old).ok()?.committed.clone()?;
                            let node = &self.nodes[old];
                            Some(Kept { node: *old, mode: node.mode, xattrs: node.xattrs.clone(), content })
                        };
                        seen.kept = node.kept.iter().filter_map(kept).collect();
                    }
                    None => continue,
                },
                Body::Symlink(target) => seen.target = Some(target.clone()),
                Body::Directory(entries) => {
                    let subdirectories =
                        entries.values().filter(|child| self.entries(**child).is_ok()).count();
                    seen.nlink = 2 + subdirectories as u32;
                    self.show(*child, &path, state);
                }
            }
            state.insert(path, seen);
        }
    }
}
