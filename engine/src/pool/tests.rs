//! A pool from format to reopen, on real directories.

use std::ffi::OsStr;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::types::{Allocate, Attr, NewNode, NodeKind, ROOT, RenameFlags, Seek, SetAttr};

mod bad_input;
mod content;
mod crash;
mod full;
mod generations;
mod kinds;
mod random;

fn region(mode: u32) -> NewNode {
    NewNode { kind: NodeKind::Region, mode, uid: 0, gid: 0, rdev: 0, target: None }
}

fn name(name: &str) -> &OsStr {
    OsStr::new(name)
}

fn manual() -> OpenOptions {
    // No background snapshots: tests say when.
    OpenOptions { commit_interval_ms: 0, ram_bytes: 16 << 20, ..OpenOptions::default() }
}

fn formatted() -> (TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    (dir, path)
}

fn open(path: &Path) -> Pool {
    Pool::open(path, &manual()).unwrap()
}

/// Makes a region with this content, and closes it.
fn put(pool: &Pool, at: &str, bytes: &[u8]) -> Attr {
    let attr = pool.create(ROOT, name(at), &region(0o644)).unwrap();
    let handle = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    assert_eq!(handle.write_at(0, bytes).unwrap(), bytes.len());
    handle.flush().unwrap();
    drop(handle);
    pool.getattr(attr.node).unwrap()
}

fn get(pool: &Pool, at: &str) -> Vec<u8> {
    let attr = pool.lookup(ROOT, name(at)).unwrap();
    let handle = pool.open_region(attr.node, Access::Read, false).unwrap();
    let mut bytes = vec![0; attr.size as usize + 100];
    let read = handle.read_at(0, &mut bytes).unwrap();
    assert_eq!(read as u64, attr.size);
    bytes.truncate(read);
    bytes
}

/// Bytes that differ everywhere and are the same for a seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect()
}

fn files_in(pool: &Path) -> Vec<String> {
    let mut names: Vec<String> = walk(&pool.join("regions"));
    names.sort();
    names
}

fn walk(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    entries
        .flatten()
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path()),
            _ => vec![entry.file_name().to_string_lossy().into_owned()],
        })
        .collect()
}

#[test]
fn the_tree_comes_back() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let dir = pool.create_dirs("a/b/c", 7, 8).unwrap();
    let file = put(&pool, "model.bin", &noise(1, 100_000));
    pool.link(file.node, dir.node, name("again")).unwrap();
    let link = NewNode { kind: NodeKind::Symlink, target: Some("a/b".into()), ..region(0o777) };
    let link = pool.create(ROOT, name("link"), &link).unwrap();
    let device = NewNode { kind: NodeKind::CharDevice, rdev: 0x103, ..region(0o600) };
    let device = pool.create(dir.node, name("null"), &device).unwrap();
    pool.setxattr(file.node, name("user.a"), b"value", crate::XattrSet::Any).unwrap();
    let set = SetAttr {
        mode: Some(0o4711),
        uid: Some(5),
        gid: Some(6),
        mtime: Some(crate::Timestamp { secs: -5, nanos: 7 }),
        ..SetAttr::default()
    };
    let file = pool.setattr(file.node, &set).unwrap();
    assert_eq!((file.mode, file.uid, file.gid, file.nlink), (0o4711, 5, 6, 2));
    pool.close().unwrap();

    let pool = open(&path);
    assert_eq!(pool.getattr(file.node).unwrap(), file);
    assert_eq!(pool.resolve("a/b/c/again").unwrap(), file);
    assert_eq!(pool.resolve("/a//b/c/null").unwrap(), device);
    assert_eq!(pool.getattr(link.node).unwrap(), link);
    assert_eq!(pool.readlink(link.node).unwrap(), "a/b");
    assert_eq!(pool.getxattr(file.node, name("user.a")).unwrap(), b"value");
    assert_eq!(get(&pool, "model.bin"), noise(1, 100_000));
    let verified = pool.verify(None, &mut |_| {}).unwrap();
    assert!(verified.is_clean());
    assert_eq!((verified.regions, verified.chunks), (1, 7));
}

#[test]
fn an_unlinked_region_lives_while_it_is_open() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", b"hello");
    let handle = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    pool.unlink(ROOT, name("a")).unwrap();
    assert_eq!(pool.lookup(ROOT, name("a")).unwrap_err().kind(), ErrorKind::NotFound);
    handle.write_at(5, b" world").unwrap();
    let mut bytes = [0; 20];
    assert_eq!(handle.read_at(0, &mut bytes).unwrap(), 11);
    assert_eq!(pool.getattr(attr.node).unwrap().nlink, 0);
    pool.sync().unwrap();
    handle.sync().unwrap();
    drop(handle);
    assert_eq!(pool.getattr(attr.node).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(pool.open_region(attr.node, Access::Read, false).unwrap_err().kind(), ErrorKind::NotFound);
    pool.sync().unwrap();
    assert_eq!(files_in(&path), Vec::<String>::new());
    assert_eq!(pool.stat().used_bytes, 0);
}

#[test]
fn replaced_and_removed_content_gives_its_space_back() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    for round in 0..3 {
        put(&pool, "a", &noise(round, 50_000));
        pool.sync().unwrap();
        put(&pool, "b", &noise(round + 10, 60_000));
        pool.rename(ROOT, name("b"), ROOT, name("a"), RenameFlags::default()).unwrap();
        pool.sync().unwrap();
        assert_eq!(files_in(&path).len(), 1);
        pool.unlink(ROOT, name("a")).unwrap();
        pool.sync().unwrap();
        assert_eq!(files_in(&path).len(), 0);
    }
    // Never in any snapshot: gone at once.
    put(&pool, "a", &noise(9, 50_000));
    assert_eq!(files_in(&path).len(), 1);
    pool.unlink(ROOT, name("a")).unwrap();
    assert_eq!(files_in(&path).len(), 0);
    assert_eq!(pool.stat().used_bytes, 0);
}

#[test]
fn directories_keep_their_rules() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let dir = NewNode { kind: NodeKind::Directory, ..region(0o2775) };
    let parent = pool.create(ROOT, name("d"), &NewNode { gid: 42, ..dir.clone() }).unwrap();
    let child = pool.create(parent.node, name("e"), &NewNode { mode: 0o755, gid: 1, ..dir.clone() }).unwrap();
    assert_eq!((child.gid, child.mode & 0o2000), (42, 0o2000), "a set-group-id directory hands both down");
    let file = pool.create(child.node, name("f"), &region(0o644)).unwrap();
    assert_eq!((file.gid, file.mode & 0o2000), (42, 0));
    assert_eq!(pool.getattr(parent.node).unwrap().nlink, 3);
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(pool.rmdir(ROOT, name("d"))), ErrorKind::NotEmpty);
    assert_eq!(kind(pool.unlink(ROOT, name("d"))), ErrorKind::IsDirectory);
    assert_eq!(kind(pool.rmdir(child.node, name("f"))), ErrorKind::NotDirectory);
    let into_itself = pool.rename(ROOT, name("d"), child.node, name("x"), RenameFlags::default());
    assert_eq!(kind(into_itself), ErrorKind::InvalidArgument);
    assert_eq!(kind(pool.link(parent.node, ROOT, name("x")).map(drop)), ErrorKind::PermissionDenied);
    pool.unlink(child.node, name("f")).unwrap();
    pool.rename(parent.node, name("e"), ROOT, name("e"), RenameFlags::default()).unwrap();
    assert_eq!(pool.parent(child.node).unwrap(), ROOT);
    assert_eq!(pool.getattr(parent.node).unwrap().nlink, 2);
    pool.rename(ROOT, name("e"), ROOT, name("d"), RenameFlags::default()).unwrap();
    assert_eq!(pool.lookup(ROOT, name("d")).unwrap().node, child.node);
    assert_eq!(pool.getattr(ROOT).unwrap().nlink, 3);
    assert_eq!(kind(pool.create(parent.node, name("late"), &region(0)).map(drop)), ErrorKind::NotFound);
}

#[test]
fn readdir_is_stable() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    for index in 0..20 {
        pool.create(ROOT, name(&format!("f{index}")), &region(0o644)).unwrap();
    }
    let mut seen = Vec::new();
    let mut cookie = 0;
    let mut round = 0;
    loop {
        let page = pool.readdir(ROOT, cookie, 3).unwrap();
        let Some((next, _)) = page.last() else { break };
        cookie = *next;
        seen.extend(page.iter().map(|(_, entry)| entry.name.clone().into_string().unwrap()));
        // Behind and before the reader.
        let _ = pool.unlink(ROOT, name("f0"));
        let _ = pool.unlink(ROOT, name("f19"));
        pool.create(ROOT, name(&format!("new{round}")), &region(0o644)).unwrap();
        round += 1;
        if round > 20 {
            break;
        }
    }
    for index in 1..19 {
        let wanted = format!("f{index}");
        assert_eq!(seen.iter().filter(|name| **name == wanted).count(), 1, "{wanted} in {seen:?}");
    }
    assert!(!seen.contains(&"f19".to_string()));
}
