//! The tree against a model that is nothing but paths, with saving and loading in between.

use std::collections::BTreeMap;
use std::ffi::OsStr;

use proptest::prelude::*;

use super::record::{Entries, decode_node, encode_entry, encode_node, encode_xattr, name_key, node_key};
use super::*;
use crate::types::{NewNode, RenameFlags, XattrSet};

/// Names that are used: few, so that they meet.
const NAMES: [&str; 4] = ["a", "b", "c", "d\n"];

#[derive(Clone, Debug)]
enum Op {
    Create(usize, usize, NodeKind),
    Link(usize, usize, usize),
    Unlink(usize, usize),
    Rmdir(usize, usize),
    Rename(usize, usize, usize, usize, u8),
    Xattr(usize, usize, u8),
    Reload,
}

fn op() -> impl Strategy<Value = Op> {
    let dir = 0usize..6;
    let name = 0usize..NAMES.len();
    prop_oneof![
        4 => (dir.clone(), name.clone(), prop_oneof![Just(NodeKind::Region), Just(NodeKind::Directory), Just(NodeKind::Fifo)]).prop_map(|(d, n, k)| Op::Create(d, n, k)),
        1 => (0usize..12, dir.clone(), name.clone()).prop_map(|(f, d, n)| Op::Link(f, d, n)),
        2 => (dir.clone(), name.clone()).prop_map(|(d, n)| Op::Unlink(d, n)),
        2 => (dir.clone(), name.clone()).prop_map(|(d, n)| Op::Rmdir(d, n)),
        4 => (dir.clone(), name.clone(), dir.clone(), name.clone(), 0u8..3).prop_map(|(d, n, e, m, f)| Op::Rename(d, n, e, m, f)),
        1 => (0usize..12, name, any::<u8>()).prop_map(|(f, n, v)| Op::Xattr(f, n, v)),
        1 => Just(Op::Reload),
    ]
}

/// The model: every path with its node; nodes with their kind and attributes.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    paths: BTreeMap<String, NodeId>,
    kinds: BTreeMap<NodeId, NodeKind>,
    xattrs: BTreeMap<NodeId, BTreeMap<String, Vec<u8>>>,
}

fn join(dir: &str, name: &str) -> String {
    format!("{dir}/{name}")
}

impl Model {
    fn dirs(&self) -> Vec<String> {
        let mut dirs = vec![String::new()];
        dirs.extend(
            self.paths
                .iter()
                .filter(|(_, id)| self.kinds[id] == NodeKind::Directory)
                .map(|(path, _)| path.clone()),
        );
        dirs
    }

    fn node(&self, path: &str) -> NodeId {
        if path.is_empty() { ROOT } else { self.paths[path] }
    }

    fn children(&self, dir: &str) -> usize {
        let prefix = join(dir, "");
        self.paths.keys().filter(|path| path.starts_with(&prefix)).count()
    }

    fn is_dir(&self, path: &str) -> bool {
        self.kinds[&self.paths[path]] == NodeKind::Directory
    }

    fn drop_unnamed(&mut self) {
        let named: Vec<NodeId> = self.paths.values().copied().collect();
        self.kinds.retain(|id, _| named.contains(id));
        self.xattrs.retain(|id, _| named.contains(id));
    }

    /// Moves a path and all below it.
    fn shift(&mut self, from: &str, to: &str) {
        let below = join(from, "");
        let moved: Vec<String> =
            self.paths.keys().filter(|path| **path == from || path.starts_with(&below)).cloned().collect();
        let moved: Vec<(String, NodeId)> = moved
            .into_iter()
            .map(|path| {
                let id = self.paths.remove(&path).unwrap();
                (format!("{to}{}", &path[from.len()..]), id)
            })
            .collect();
        self.paths.extend(moved);
    }

    fn rename(&mut self, from: &str, to: &str, flags: RenameFlags) -> std::result::Result<(), ErrorKind> {
        if !self.paths.contains_key(from) {
            return Err(ErrorKind::NotFound);
        }
        let within = |inner: &str, outer: &str| inner.starts_with(&join(outer, ""));
        if self.is_dir(from) && within(to, from) {
            return Err(ErrorKind::InvalidArgument);
        }
        let Some(target) = self.paths.get(to).copied() else {
            if flags.exchange {
                return Err(ErrorKind::NotFound);
            }
            self.shift(from, to);
            return Ok(());
        };
        if flags.no_replace {
            return Err(ErrorKind::Exists);
        }
        if flags.exchange {
            if self.is_dir(to) && within(from, to) {
                return Err(ErrorKind::InvalidArgument);
            }
            if target != self.paths[from] {
                self.shift(from, "*");
                self.shift(to, from);
                self.shift("*", to);
            }
            return Ok(());
        }
        if target == self.paths[from] {
            return Ok(());
        }
        match (self.is_dir(from), self.is_dir(to)) {
            (true, true) if self.children(to) > 0 => return Err(ErrorKind::NotEmpty),
            (true, false) => return Err(ErrorKind::NotDirectory),
            (false, true) => return Err(ErrorKind::IsDirectory),
            _ => {}
        }
        self.paths.remove(to);
        self.shift(from, to);
        self.drop_unnamed();
        Ok(())
    }
}

/// A catalog that is three maps, fed by what the tree says is dirty.
#[derive(Debug, Default)]
struct Disk {
    nodes: BTreeMap<Vec<u8>, Vec<u8>>,
    entries: BTreeMap<Vec<u8>, Vec<u8>>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Disk {
    fn save(&mut self, tree: &mut Tree<()>) {
        let dirty = std::mem::take(&mut tree.dirty);
        for id in dirty.removed {
            self.nodes.remove(node_key(id).as_slice());
            self.xattrs.retain(|key, _| key[..8] != node_key(id));
        }
        for (parent, name) in dirty.entries {
            let key = name_key(parent, &name);
            match tree.directory(parent).ok().and_then(|dir| dir.get(&name)) {
                Some(entry) => self.entries.insert(key.clone(), encode_entry(&key, entry.node, entry.kind)),
                None => self.entries.remove(&key),
            };
        }
        for id in dirty.nodes {
            if let Ok(node) = tree.get_mut(id) {
                node.stored = true;
                self.nodes.insert(node_key(id).to_vec(), encode_node(id, node));
            }
        }
        for id in dirty.xattrs {
            self.xattrs.retain(|key, _| key[..8] != node_key(id));
            let Ok(node) = tree.get(id) else { continue };
            for (name, value) in node.xattrs.iter().flat_map(|xattrs| xattrs.iter()) {
                let key = name_key(id, name);
                self.xattrs.insert(key.clone(), encode_xattr(&key, value));
            }
        }
    }

    fn load(&self, next_node: NodeId) -> Tree<()> {
        let mut tree = Tree::empty(next_node);
        for (key, value) in &self.nodes {
            let (id, node) = decode_node(key, value).unwrap();
            tree.add_node(id, node).unwrap();
        }
        let mut entries = Entries::default();
        self.entries.iter().for_each(|(key, value)| entries.record(key, value).unwrap());
        tree.add_entries(entries).unwrap();
        self.xattrs.iter().for_each(|(key, value)| tree.load_xattr(key, value).unwrap());
        tree.check().unwrap();
        tree
    }
}

/// All that can be seen of a tree, as a model.
fn seen(tree: &Tree<()>) -> Model {
    let mut model = Model::default();
    let mut todo = vec![(String::new(), ROOT)];
    while let Some((path, dir)) = todo.pop() {
        for (_, entry) in tree.readdir(dir, 0, usize::MAX).unwrap() {
            let path = join(&path, entry.name.to_str().unwrap());
            model.paths.insert(path.clone(), entry.node);
            model.kinds.insert(entry.node, entry.kind);
            assert_eq!(tree.resolve(OsStr::new(&path)).unwrap(), entry.node);
            for name in tree.listxattr(entry.node).unwrap() {
                let value = tree.getxattr(entry.node, &name).unwrap();
                model.xattrs.entry(entry.node).or_default().insert(name.into_string().unwrap(), value);
            }
            if entry.kind == NodeKind::Directory {
                assert_eq!(tree.directory(entry.node).unwrap().parent, dir);
                assert_eq!(tree.path_of(entry.node).unwrap().to_str().unwrap(), &path[1..]);
                todo.push((path, entry.node));
            }
        }
    }
    model
}

fn forget(tree: &mut Tree<()>, gone: Option<Gone>) {
    if let Some(gone) = gone {
        assert!(!gone.pinned);
        tree.forget(gone.node).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_tree_is_its_model(ops in proptest::collection::vec(op(), 1..80)) {
        let mut tree: Tree<()> = Tree::new(0, 0, Timestamp::default());
        let mut model = Model::default();
        let mut disk = Disk::default();
        let pick_dir = |model: &Model, index: usize| { let dirs = model.dirs(); dirs[index % dirs.len()].clone() };
        for (clock, op) in ops.into_iter().enumerate() {
            let now = Timestamp { secs: clock as i64 + 1, nanos: 0 };
            match op {
                Op::Create(dir, name, kind) => {
                    let dir = pick_dir(&model, dir);
                    let path = join(&dir, NAMES[name]);
                    let new = NewNode { kind, mode: 0o755, uid: 1, gid: 2, rdev: 0, target: None };
                    let made = tree.create(model.node(&dir), OsStr::new(NAMES[name]), &new, now);
                    if model.paths.contains_key(&path) {
                        prop_assert_eq!(made.unwrap_err().kind(), ErrorKind::Exists);
                    } else {
                        let id = made.unwrap();
                        prop_assert!(model.kinds.insert(id, kind).is_none());
                        model.paths.insert(path, id);
                        prop_assert_eq!(tree.get(model.node(&dir)).unwrap().mtime, now);
                    }
                }
                Op::Link(file, dir, name) => {
                    let Some((_, id)) = model.paths.iter().nth(file % model.paths.len().max(1)) else { continue };
                    let (id, dir) = (*id, pick_dir(&model, dir));
                    let path = join(&dir, NAMES[name]);
                    let linked = tree.link(id, model.node(&dir), OsStr::new(NAMES[name]), now);
                    let expected = match model.kinds[&id] {
                        _ if model.paths.contains_key(&path) => Some(ErrorKind::Exists),
                        NodeKind::Directory => Some(ErrorKind::PermissionDenied),
                        _ => None,
                    };
                    prop_assert_eq!(linked.as_ref().err().map(Error::kind), expected);
                    if expected.is_none() {
                        model.paths.insert(path, id);
                    }
                }
                Op::Unlink(dir, name) | Op::Rmdir(dir, name) => {
                    let directory = matches!(op, Op::Rmdir(..));
                    let dir = pick_dir(&model, dir);
                    let path = join(&dir, NAMES[name]);
                    let result = match directory {
                        true => tree.rmdir(model.node(&dir), OsStr::new(NAMES[name]), now),
                        false => tree.unlink(model.node(&dir), OsStr::new(NAMES[name]), now),
                    };
                    let expected = match model.paths.get(&path) {
                        None => Some(ErrorKind::NotFound),
                        Some(_) if directory && !model.is_dir(&path) => Some(ErrorKind::NotDirectory),
                        Some(_) if directory && model.children(&path) > 0 => Some(ErrorKind::NotEmpty),
                        Some(_) if !directory && model.is_dir(&path) => Some(ErrorKind::IsDirectory),
                        Some(_) => None,
                    };
                    prop_assert_eq!(result.as_ref().err().map(Error::kind), expected);
                    if let Ok(gone) = result {
                        forget(&mut tree, gone);
                        model.paths.remove(&path);
                        model.drop_unnamed();
                    }
                }
                Op::Rename(dir, name, new_dir, new_name, flags) => {
                    let (dir, new_dir) = (pick_dir(&model, dir), pick_dir(&model, new_dir));
                    let flags = RenameFlags { no_replace: flags == 1, exchange: flags == 2 };
                    let (from, to) = (model.node(&dir), model.node(&new_dir));
                    let result = tree.rename(from, OsStr::new(NAMES[name]), to, OsStr::new(NAMES[new_name]), flags, now);
                    let expected = model.rename(&join(&dir, NAMES[name]), &join(&new_dir, NAMES[new_name]), flags);
                    prop_assert_eq!(result.as_ref().err().map(Error::kind), expected.err());
                    if let Ok(gone) = result {
                        forget(&mut tree, gone);
                    }
                }
                Op::Xattr(file, name, value) => {
                    let Some((_, id)) = model.paths.iter().nth(file % model.paths.len().max(1)) else { continue };
                    let xattrs = model.xattrs.entry(*id).or_default();
                    let there = xattrs.contains_key(NAMES[name]);
                    if value % 3 == 0 {
                        prop_assert_eq!(tree.removexattr(*id, OsStr::new(NAMES[name]), now).is_ok(), there);
                        xattrs.remove(NAMES[name]);
                    } else {
                        tree.setxattr(*id, OsStr::new(NAMES[name]), &[value], XattrSet::Any, now).unwrap();
                        xattrs.insert(NAMES[name].into(), vec![value]);
                    }
                    model.xattrs.retain(|_, xattrs| !xattrs.is_empty());
                }
                Op::Reload => {
                    disk.save(&mut tree);
                    let loaded = disk.load(tree.next_node());
                    for (id, node) in tree.iter() {
                        prop_assert_eq!(loaded.get(id).unwrap().attr(id), node.attr(id));
                    }
                    prop_assert_eq!(loaded.node_count(), tree.node_count());
                    prop_assert_eq!(loaded.region_count(), tree.region_count());
                    tree = loaded;
                }
            }
            tree.check().unwrap();
            prop_assert_eq!(&seen(&tree), &model);
            prop_assert_eq!(tree.node_count() as usize, model.kinds.len() + 1);
        }
    }
}
