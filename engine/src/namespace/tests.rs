//! Records, limits, and what the model test does not reach.

use super::record::{Entries, decode_node, encode_entry, encode_node, encode_xattr, name_key, node_key};
use super::*;
use crate::types::{NewNode, RenameFlags, XattrSet};

const NOW: Timestamp = Timestamp { secs: 1, nanos: 2 };

fn tree() -> Tree<()> {
    Tree::new(1, 2, NOW)
}

fn new(kind: NodeKind) -> NewNode {
    NewNode { kind, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: None }
}

fn add(tree: &mut Tree<()>, parent: NodeId, name: &str, kind: NodeKind) -> NodeId {
    tree.create(parent, OsStr::new(name), &new(kind), NOW).unwrap()
}

#[test]
fn a_flipped_bit_in_any_record_is_found() {
    let mut tree = tree();
    let id = add(&mut tree, ROOT, "f", NodeKind::Region);
    let key = node_key(id);
    let node = encode_node(id, tree.get(id).unwrap());
    let entry_key = name_key(ROOT, OsStr::new("f"));
    let entry = encode_entry(&entry_key, id, NodeKind::Region);
    let xattr = encode_xattr(&entry_key, b"value");
    let loads = |key: &[u8], entry_key: &[u8], node: &[u8], entry: &[u8], xattr: &[u8]| {
        let mut loaded: Tree<()> = Tree::empty(10);
        let (root_key, root) = (node_key(ROOT), encode_node(ROOT, tree.get(ROOT).unwrap()));
        for (key, node) in [(root_key.as_slice(), root.as_slice()), (key, node)] {
            let (id, node) = decode_node(key, node)?;
            loaded.add_node(id, node)?;
        }
        let mut entries = Entries::default();
        entries.record(entry_key, entry)?;
        loaded.add_entries(entries)?;
        loaded.load_xattr(
            &name_key(id, OsStr::new("f")),
            &encode_xattr(&name_key(id, OsStr::new("f")), b"ok"),
        )?;
        loaded.load_xattr(entry_key, xattr)?;
        loaded.check()
    };
    loads(&key, &entry_key, &node, &entry, &xattr).unwrap();
    for (which, record) in [&node, &entry, &xattr].into_iter().enumerate() {
        for bit in 0..record.len() * 8 {
            let mut bad = record.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut all = [node.as_slice(), entry.as_slice(), xattr.as_slice()];
            all[which] = &bad;
            let error = loads(&key, &entry_key, all[0], all[1], all[2]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "record {which}, bit {bit}");
        }
        for len in 0..record.len() {
            let mut all = [node.as_slice(), entry.as_slice(), xattr.as_slice()];
            all[which] = &record[..len];
            loads(&key, &entry_key, all[0], all[1], all[2]).unwrap_err();
        }
    }
    // Under another key.
    assert_eq!(
        loads(&node_key(id + 1), &entry_key, &node, &entry, &xattr).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    let moved = name_key(ROOT, OsStr::new("g"));
    assert_eq!(loads(&key, &moved, &node, &entry, &xattr).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_newer_record_is_refused_as_such() {
    let tree = tree();
    let key = node_key(ROOT);
    let mut value = encode_node(ROOT, tree.get(ROOT).unwrap());
    value[0] = record::VERSION + 1;
    value.truncate(value.len() - 4);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&key);
    hasher.update(&value);
    value.extend(hasher.finalize().to_le_bytes());
    assert_eq!(decode_node::<()>(&key, &value).unwrap_err().kind(), ErrorKind::NewerFormat);
}

#[test]
fn what_does_not_fit_together_is_not_loaded() {
    let node = |id: NodeId, tree: &Tree<()>| (node_key(id), encode_node(id, tree.get(id).unwrap()));
    let entry = |parent, name: &str, id, kind| {
        let key = name_key(parent, OsStr::new(name));
        let value = encode_entry(&key, id, kind);
        (key, value)
    };
    let mut source = tree();
    let dir = add(&mut source, ROOT, "d", NodeKind::Directory);
    let file = add(&mut source, dir, "f", NodeKind::Region);
    let load = |nodes: &[NodeId], entries: &[(Vec<u8>, Vec<u8>)]| -> Result<()> {
        let mut loaded: Tree<()> = Tree::empty(source.next_node());
        for id in nodes {
            let (key, value) = node(*id, &source);
            let (id, node) = decode_node(&key, &value)?;
            loaded.add_node(id, node)?;
        }
        let mut records = Entries::default();
        for (key, value) in entries {
            records.record(key, value)?;
        }
        loaded.add_entries(records)?;
        loaded.check()
    };
    let d = entry(ROOT, "d", dir, NodeKind::Directory);
    let f = entry(dir, "f", file, NodeKind::Region);
    load(&[ROOT, dir, file], &[d.clone(), f.clone()]).unwrap();
    let bad: [(&[NodeId], Vec<_>); 8] = [
        (&[dir, file], vec![d.clone(), f.clone()]),
        (&[ROOT, dir], vec![d.clone(), f.clone()]),
        (&[ROOT, dir, file], vec![d.clone()]),
        (&[ROOT, dir, file], vec![f.clone()]),
        (&[ROOT, dir, file], vec![d.clone(), entry(dir, "f", file, NodeKind::Fifo)]),
        (&[ROOT, dir, file], vec![d.clone(), f.clone(), entry(file, "x", file, NodeKind::Region)]),
        (&[ROOT, dir, file], vec![f.clone(), d.clone(), f.clone()]),
        (&[ROOT, dir, file], vec![entry(dir, "d", dir, NodeKind::Directory), f.clone()]),
    ];
    for (index, (nodes, entries)) in bad.iter().enumerate() {
        assert_eq!(load(nodes, entries).unwrap_err().kind(), ErrorKind::Corrupt, "case {index}");
    }
}

#[test]
fn limits() {
    let mut tree = tree();
    let file = add(&mut tree, ROOT, "f", NodeKind::Region);
    tree.get_mut(file).unwrap().nlink = MAX_LINKS;
    assert_eq!(tree.link(file, ROOT, OsStr::new("g"), NOW).unwrap_err().kind(), ErrorKind::TooManyLinks);
    tree.get_mut(file).unwrap().nlink = 1;
    let a = OsStr::new("user.a");
    let big = vec![0; MAX_XATTR + 1];
    assert_eq!(tree.setxattr(file, a, &big, XattrSet::Any, NOW).unwrap_err().kind(), ErrorKind::TooLarge);
    assert_eq!(
        tree.setxattr(file, a, b"", XattrSet::Replace, NOW).unwrap_err().kind(),
        ErrorKind::NoAttribute
    );
    tree.setxattr(file, a, &big[1..], XattrSet::Create, NOW).unwrap();
    assert_eq!(tree.setxattr(file, a, b"", XattrSet::Create, NOW).unwrap_err().kind(), ErrorKind::Exists);
    let full = (0..20).find_map(|index| {
        tree.setxattr(file, OsStr::new(&format!("user.{index}")), &big[1..], XattrSet::Any, NOW).err()
    });
    assert_eq!(full.unwrap().kind(), ErrorKind::NoSpace);
    let link = |target: String| NewNode { target: Some(target.into()), ..new(NodeKind::Symlink) };
    let long = tree.create(ROOT, OsStr::new("l"), &link("t".repeat(MAX_TARGET + 1)), NOW);
    assert_eq!(long.unwrap_err().kind(), ErrorKind::NameTooLong);
    tree.create(ROOT, OsStr::new("l"), &link("t".repeat(MAX_TARGET)), NOW).unwrap();
    let none = tree.create(ROOT, OsStr::new("m"), &link(String::new()), NOW);
    assert_eq!(none.unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn a_pinned_node_outlives_its_names() {
    let mut tree = tree();
    let file = add(&mut tree, ROOT, "f", NodeKind::Region);
    tree.get_mut(file).unwrap().pins = 2;
    let gone = tree.unlink(ROOT, OsStr::new("f"), NOW).unwrap().unwrap();
    assert!(gone.pinned);
    assert_eq!(tree.get(file).unwrap().nlink, 0);
    assert!(!tree.unpin(file));
    assert!(tree.unpin(file));
    tree.forget(file).unwrap();
    assert!(tree.get(file).is_err());
    tree.check().unwrap();
}

#[test]
fn exchange_of_a_directory_and_a_file_counts_subdirectories() {
    let mut tree = tree();
    let one = add(&mut tree, ROOT, "one", NodeKind::Directory);
    let sub = add(&mut tree, one, "sub", NodeKind::Directory);
    let file = add(&mut tree, ROOT, "file", NodeKind::Region);
    let later = Timestamp { secs: 9, nanos: 0 };
    let flags = RenameFlags { exchange: true, no_replace: false };
    tree.rename(one, OsStr::new("sub"), ROOT, OsStr::new("file"), flags, later).unwrap();
    assert_eq!(tree.get(one).unwrap().nlink, 2);
    assert_eq!(tree.get(ROOT).unwrap().nlink, 4);
    assert_eq!(tree.directory(sub).unwrap().parent, ROOT);
    assert_eq!(tree.path_of(file).unwrap(), "one/sub");
    for id in [one, sub, file, ROOT] {
        assert_eq!(tree.get(id).unwrap().ctime, later);
    }
    tree.check().unwrap();
}
