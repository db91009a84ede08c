//! A session's calls on a pool that this process owns; the control server answers with the same functions.

use std::ffi::OsStr;

use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::pool::Pool;
use crate::repair::RepairReport;
use crate::session::{Entry, partial};
use crate::types::{Access, Attr, NodeId, NodeKind, ROOT, RenameFlags};
use crate::verify::{VerifyProgress, VerifyReport};

/// In whose name something is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Who {
    pub uid: u32,
    pub gid: u32,
}

impl Who {
    /// This process.
    pub fn me() -> Who {
        Who { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }
}

/// Entries that one `readdir` asks for.
const PAGE: usize = 1000;

/// The parts of a path. `InvalidName` for `.` and `..`: a pool has no current directory to be relative to.
pub(crate) fn parts(path: &str) -> Result<Vec<&str>> {
    let parts: Vec<_> = path.split('/').filter(|p| !p.is_empty()).collect();
    match parts.iter().find(|p| matches!(**p, "." | "..")) {
        Some(part) => {
            let context = format!("{path:?}: {part:?} is no name; paths of a pool start at its root");
            Err(Error::new(ErrorKind::InvalidName, context))
        }
        None => Ok(parts),
    }
}

/// The directory that holds `path`, which must exist, and the last name.
pub(crate) fn parent<'a>(pool: &Pool, path: &'a str) -> Result<(Attr, &'a OsStr)> {
    let parts = parts(path)?;
    let Some((name, above)) = parts.split_last() else {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "the root of the pool cannot be removed, moved or replaced",
        ));
    };
    Ok((resolve(pool, &above.join("/"))?, OsStr::new(*name)))
}

fn resolve(pool: &Pool, path: &str) -> Result<Attr> {
    pool.resolve(&parts(path)?.join("/"))
}

fn entry(pool: &Pool, path: String, attr: &Attr) -> Result<Entry> {
    let target = match attr.kind {
        NodeKind::Symlink => Some(pool.readlink(attr.node)?.to_string_lossy().into_owned()),
        _ => None,
    };
    Ok(Entry {
        path,
        kind: attr.kind,
        size: attr.size,
        allocated: attr.allocated,
        mode: attr.mode,
        uid: attr.uid,
        gid: attr.gid,
        nlink: attr.nlink,
        mtime: attr.mtime.secs,
        mtime_nanos: attr.mtime.nanos,
        node: attr.node,
        generation: attr.generation,
        target,
    })
}

pub(crate) fn stat_path(pool: &Pool, path: &str) -> Result<Entry> {
    let attr = resolve(pool, path)?;
    entry(pool, parts(path)?.join("/"), &attr)
}

/// Children of a directory in order of names. A name that goes while they are read is left out.
fn children(pool: &Pool, dir: NodeId) -> Result<Vec<(String, Attr)>> {
    let mut found = Vec::new();
    let mut cookie = 0;
    loop {
        let page = pool.readdir(dir, cookie, PAGE)?;
        let Some((next, _)) = page.last() else { break };
        cookie = *next;
        for (_, child) in page {
            match pool.getattr(child.node) {
                Ok(attr) => found.push((child.name.to_string_lossy().into_owned(), attr)),
                Err(error) if gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

fn gone(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Stale)
}

fn join(above: &str, name: &str) -> String {
    if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") }
}

/// Calls `each` with what [`Session::list`](crate::Session::list) lists.
pub(crate) fn walk(
    pool: &Pool,
    path: &str,
    recursive: bool,
    each: &mut dyn FnMut(Entry) -> Result<()>,
) -> Result<()> {
    let attr = resolve(pool, path)?;
    let path = parts(path)?.join("/");
    if attr.kind != NodeKind::Directory {
        return each(entry(pool, path, &attr)?);
    }
    // A stack of what is still to be told, the next one last: a deep tree must not be a deep recursion.
    let mut stack = Vec::new();
    push_children(pool, attr.node, &path, &mut stack)?;
    while let Some((path, attr)) = stack.pop() {
        match entry(pool, path.clone(), &attr) {
            Ok(entry) => each(entry)?,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(error),
        }
        if recursive && attr.kind == NodeKind::Directory {
            match push_children(pool, attr.node, &path, &mut stack) {
                Err(error) if gone(&error) => {}
                other => other?,
            }
        }
    }
    Ok(())
}

fn push_children(pool: &Pool, dir: NodeId, path: &str, stack: &mut Vec<(String, Attr)>) -> Result<()> {
    let children = children(pool, dir)?;
    stack.extend(
        children
            .into_iter()
            .rev()
            .filter(|(name, _)| dir != ROOT || name != partial::DIRECTORY)
            .map(|(name, attr)| (join(path, &name), attr)),
    );
    Ok(())
}

pub(crate) fn mkdirs(pool: &Pool, path: &str, who: Who) -> Result<()> {
    pool.create_dirs(&parts(path)?.join("/"), who.uid, who.gid).map(drop)
}

pub(crate) fn remove(pool: &Pool, path: &str, recursive: bool) -> Result<()> {
    let (above, name) = parent(pool, path)?;
    let attr = pool.lookup(above.node, name)?;
    if attr.kind != NodeKind::Directory {
        return pool.unlink(above.node, name);
    }
    if recursive {
        empty(pool, attr.node)?;
    }
    pool.rmdir(above.node, name)
}

/// Removes all below a directory. Depth first with a stack of our own, by nodes, so that names of any bytes go too.
fn empty(pool: &Pool, top: NodeId) -> Result<()> {
    let mut stack = vec![top];
    while let Some(&dir) = stack.last() {
        // Always the first page: what was removed is no longer in it.
        let page = pool.readdir(dir, 0, PAGE)?;
        let mut deeper = None;
        for (_, child) in &page {
            let removed = match child.kind {
                NodeKind::Directory => match pool.rmdir(dir, &child.name) {
                    Err(error) if error.kind() == ErrorKind::NotEmpty => {
                        deeper = Some(child.node);
                        break;
                    }
                    other => other,
                },
                _ => pool.unlink(dir, &child.name),
            };
            match removed {
                Err(error) if gone(&error) => {}
                other => other?,
            }
        }
        match deeper {
            Some(node) => stack.push(node),
            None if page.is_empty() => drop(stack.pop()),
            None => {}
        }
    }
    Ok(())
}

pub(crate) fn rename(pool: &Pool, from: &str, to: &str) -> Result<()> {
    let (from_dir, from_name) = parent(pool, from)?;
    let (to_dir, to_name) = parent(pool, to)?;
    pool.rename(from_dir.node, from_name, to_dir.node, to_name, RenameFlags::default())
}

pub(crate) fn open_read(pool: &Pool, path: &str) -> Result<Handle> {
    let attr = resolve(pool, path)?;
    match attr.kind {
        NodeKind::Region => pool.open_region(attr.node, Access::Read, false),
        NodeKind::Directory => Err(Error::new(ErrorKind::IsDirectory, format!("{path:?} is a directory"))),
        kind => Err(Error::new(ErrorKind::InvalidArgument, format!("{path:?} is no region but a {kind:?}"))),
    }
}

/// The regions at and below a path, by node, with their sizes; `None`: the whole pool.
fn regions(pool: &Pool, path: &str) -> Result<Option<Vec<(NodeId, u64)>>> {
    let top = resolve(pool, path)?;
    if top.node == ROOT {
        return Ok(None);
    }
    let mut regions = Vec::new();
    walk(pool, path, true, &mut |entry| {
        if entry.kind == NodeKind::Region {
            regions.push((entry.node, entry.size));
        }
        Ok(())
    })?;
    if top.kind != NodeKind::Directory && regions.is_empty() {
        regions.push((top.node, top.size)); // no region: let the call say so
    }
    regions.sort_by_key(|r| r.0);
    regions.dedup_by_key(|r| r.0); // hard links
    Ok(Some(regions))
}

/// Checks or mends one region, or with `None` all of the pool, and tells how far it is.
type OnRegion<'a, T> = &'a dyn Fn(Option<NodeId>, &mut dyn FnMut(VerifyProgress)) -> Result<T>;

/// Runs `one` on each region at and below a path, and hands what it yields to `add`.
fn each_region<T>(
    pool: &Pool,
    path: &str,
    progress: &mut dyn FnMut(VerifyProgress),
    one: OnRegion<'_, T>,
    add: &mut dyn FnMut(T) -> u64,
) -> Result<()> {
    let Some(regions) = regions(pool, path)? else {
        add(one(None, progress)?);
        return Ok(());
    };
    let total: u64 = regions.iter().map(|r| r.1).sum();
    let (mut done, mut bad) = (0, 0);
    let single = regions.len() == 1;
    for (node, size) in regions {
        let yielded = one(Some(node), &mut |p| {
            progress(VerifyProgress {
                done_bytes: done + p.done_bytes,
                total_bytes: total,
                bad_chunks: bad + p.bad_chunks,
                ..p
            });
        });
        match yielded {
            // Removed since the list was made.
            Err(error) if gone(&error) && !single => continue,
            yielded => bad = add(yielded?),
        }
        done += size;
    }
    Ok(())
}

pub(crate) fn verify(
    pool: &Pool,
    path: &str,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport> {
    let mut all = VerifyReport::default();
    each_region(pool, path, progress, &|node, progress| pool.verify(node, progress), &mut |one| {
        all.merge(one);
        all.bad_chunks
    })?;
    Ok(all)
}

pub(crate) fn repair(
    pool: &Pool,
    path: &str,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<RepairReport> {
    let mut all = pool.repair_structures()?;
    each_region(pool, path, progress, &|node, progress| pool.repair(node, progress), &mut |one| {
        all.merge(one);
        all.verify.bad_chunks
    })?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(parts("/a//b/").unwrap(), ["a", "b"]);
        assert!(parts("").unwrap().is_empty());
        for bad in ["a/../b", ".", "/.."] {
            assert_eq!(parts(bad).unwrap_err().kind(), ErrorKind::InvalidName, "{bad}");
        }
        assert_eq!(join("", "a"), "a");
        assert_eq!(join("a", "b"), "a/b");
    }
}
