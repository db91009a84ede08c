//! What is looked at when a pool comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use engine::{Access, NodeKind, Pool, Session, lease::Source};

use crate::config::Config;
use crate::content::Content;
use crate::model::{Kept, ROOT, Seen, State};
use crate::world::{Done, Stop, violation};

/// The directory of generations that are kept.
const GENERATIONS: &str = ".nvtier-generations";

/// How one text of bytes differs from another, for people.
pub fn difference(found: &[u8], wanted: &[u8]) -> String {
    if found.len() != wanted.len() {
        return format!("{} bytes, not {}", found.len(), wanted.len());
    }
    let first = found.iter().zip(wanted).position(|(a, b)| a != b).unwrap_or(0);
    let count = found.iter().zip(wanted).filter(|(a, b)| a != b).count();
    format!("{} bytes of which {count} are wrong, the first at {first}", found.len())
}

/// All of a region, through a handle.
pub fn read_region(pool: &Pool, node: u64) -> engine::Result<Vec<u8>> {
    let handle = pool.open_region(node, Access::Read, false)?;
    let mut bytes = vec![0; handle.size() as usize];
    let read = handle.read_at(0, &mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Everything that a pool shows, read and verified; and what can be said of it without a model: every sum is right, no chunk
/// belongs to two extents, every extent lies in the data area, and the bytes there are those that are read.
pub fn examine(session: &Session, config: &Config) -> Result<State, Stop> {
    let pool = session.pool().expect("this process owns it");
    let failed = |error: engine::Error| Stop::Violation(format!("looking at the pool: {}", error.chain()));
    let report = pool.verify(None, &mut |_| {}).map_err(failed)?;
    if !report.is_clean() || report.skipped > 0 || report.resealed > 0 {
        return violation(format!("verify: {report:?}"));
    }
    let mut state = State::new();
    let mut owned = Owned::default();
    let mut families = BTreeSet::new();
    walk(pool, ROOT, "", config, &mut state, &mut owned, &mut families).map_err(failed)??;
    no_strangers(pool, &families).map_err(failed)??;
    owned.check(config)?;
    Ok(state)
}

/// Extents of all regions.
#[derive(Default)]
struct Owned {
    seen: std::collections::HashSet<u64>,
    /// Device and offset: end, path.
    extents: BTreeMap<(usize, u64), (u64, String)>,
}

impl Owned {
    fn check(&self, config: &Config) -> Done {
        let mut before: Option<(usize, u64, &str)> = None;
        for ((device, offset), (end, path)) in &self.extents {
            if let Some((_, stop, other)) = before.filter(|(same, stop, _)| same == device && stop > offset) {
                return violation(format!(
                    "{other} and {path} both own bytes {offset}..{stop} of member {device}"
                ));
            }
            let area = match device {
                0 => 17 << 20..(17 << 20) + config.data,
                _ => 1 << 20..(1 << 20) + config.data,
            };
            if !area.contains(offset) || *end > area.end {
                return violation(format!(
                    "{path} lies at {offset}..{end} of member {device}, outside its data area"
                ));
            }
            before = Some((*device, *end, path));
        }
        Ok(())
    }
}

fn walk(
    pool: &Pool,
    node: u64,
    path: &str,
    config: &Config,
    state: &mut State,
    owned: &mut Owned,
    families: &mut BTreeSet<String>,
) -> engine::Result<Done> {
    let mut cookie = 0;
    loop {
        let page = pool.readdir(node, cookie, 100)?;
        let Some((next, _)) = page.last() else { return Ok(Ok(())) };
        cookie = *next;
        for (_, entry) in page {
            let name = entry.name.to_string_lossy();
            if path.is_empty() && name == crate::kv::DIRECTORY {
                if let Err(stop) = slabs(pool, entry.node, owned)? {
                    return Ok(Err(stop));
                }
                continue;
            }
            if path.is_empty() && name == GENERATIONS {
                continue; // looked at with the region whose they are
            }
            let path = if path.is_empty() { name.into_owned() } else { format!("{path}/{name}") };
            let attr = pool.getattr(entry.node)?;
            let mut seen = Seen {
                node: entry.node,
                mode: attr.mode,
                nlink: attr.nlink,
                content: None,
                target: None,
                xattrs: xattrs(pool, entry.node)?,
                keep: 0,
                kept: Vec::new(),
            };
            match attr.kind {
                NodeKind::Directory => {
                    if let Err(stop) = walk(pool, entry.node, &path, config, state, owned, families)? {
                        return Ok(Err(stop));
                    }
                }
                NodeKind::Region => match region(pool, entry.node, &path, attr.size, config, owned)? {
                    Ok(content) => {
                        seen.content = Some(content);
                        seen.keep = pool.kept_generations(entry.node)?;
                        for kept in pool.generations(entry.node)? {
                            families.insert(format!("{:016x}", entry.node));
                            let path = format!("{path}, generation {}", kept.generation);
                            match region(pool, kept.node, &path, kept.size, config, owned)? {
                                Ok(content) => {
                                    let (node, mode) = (kept.node, pool.getattr(kept.node)?.mode);
                                    seen.kept.push(Kept { node, mode, xattrs: xattrs(pool, node)?, content });
                                }
                                Err(stop) => return Ok(Err(stop)),
                            }
                        }
                    }
                    Err(stop) => return Ok(Err(stop)),
                },
                NodeKind::Symlink => {
                    seen.target = Some(pool.readlink(entry.node)?.to_string_lossy().into_owned());
                }
                kind => return Ok(violation(format!("{path} is a {kind:?}"))),
            }
            let looked_up = pool.lookup(node, OsStr::new(&entry.name))?;
            if looked_up.node != entry.node {
                return Ok(violation(format!(
                    "{path} is listed as node {}, found as {}",
                    entry.node, looked_up.node
                )));
            }
            state.insert(path, seen);
        }
    }
}

fn xattrs(pool: &Pool, node: u64) -> engine::Result<BTreeMap<String, Vec<u8>>> {
    let value = |name: OsString| {
        let value = pool.getxattr(node, &name)?;
        Ok((name.to_string_lossy().into_owned(), value))
    };
    pool.listxattr(node)?.into_iter().map(value).collect()
}

/// Generations are kept of regions that are there, and of no others.
fn no_strangers(pool: &Pool, families: &BTreeSet<String>) -> engine::Result<Done> {
    let Ok(top) = pool.lookup(ROOT, OsStr::new(GENERATIONS)) else { return Ok(Ok(())) };
    for (_, family) in pool.readdir(top.node, 0, 10_000)? {
        if !families.contains(&*family.name.to_string_lossy()) {
            return Ok(violation(format!("generations of region {:?}, which is not there", family.name)));
        }
    }
    Ok(Ok(()))
}

/// The regions of KV stores: no file shows them, but their space is theirs alone.
fn slabs(pool: &Pool, top: u64, owned: &mut Owned) -> engine::Result<Done> {
    for (_, store) in pool.readdir(top, 0, 1000)? {
        for (_, region) in pool.readdir(store.node, 0, 1000)? {
            let path = format!("KV region {}", region.name.to_string_lossy());
            for extent in pool.slab_extents(region.node)? {
                let Source::Device(device) = &extent.source else {
                    return Ok(violation(format!("{path} is a file, in a pool of devices")));
                };
                let member = device.name().trim_start_matches("sim").parse().unwrap_or(usize::MAX);
                let end = extent.offset + extent.len;
                if owned.extents.insert((member, extent.offset), (end, path.clone())).is_some() {
                    return Ok(violation(format!(
                        "{path} and another own byte {} of member {member}",
                        extent.offset
                    )));
                }
            }
        }
    }
    Ok(Ok(()))
}

/// Content and holes of a region; its extents go to `owned`.
fn region(
    pool: &Pool,
    node: u64,
    path: &str,
    size: u64,
    config: &Config,
    owned: &mut Owned,
) -> engine::Result<Result<Content, Stop>> {
    let bytes = read_region(pool, node)?;
    if bytes.len() as u64 != size {
        return Ok(violation(format!("{path} has {size} bytes, {} can be read", bytes.len())));
    }
    let chunk = config.chunk as usize;
    let mut stored = vec![false; bytes.len().div_ceil(chunk)];
    let lease = pool.lease(node, 0, u64::MAX)?;
    let first_time = owned.seen.insert(node);
    let mut raw = vec![0; bytes.len()];
    for extent in lease.extents() {
        let Source::Device(device) = &extent.source else {
            return Ok(violation(format!("{path} is a file, in a pool of devices")));
        };
        let member = device.name().trim_start_matches("sim").parse().unwrap_or(usize::MAX);
        let end = extent.offset + extent.len.next_multiple_of(chunk as u64);
        if first_time && owned.extents.insert((member, extent.offset), (end, path.to_owned())).is_some() {
            return Ok(violation(format!(
                "{path} and another own byte {} of member {member}",
                extent.offset
            )));
        }
        let range = extent.logical as usize..(extent.logical + extent.len).min(size) as usize;
        device.read_at(extent.offset, &mut raw[range])?;
        let chunks =
            extent.logical as usize / chunk..(extent.logical + extent.len).div_ceil(chunk as u64) as usize;
        let last = stored.len();
        stored[chunks.start..chunks.end.min(last)].fill(true);
    }
    if raw != bytes {
        return Ok(violation(format!("{path}: its extents hold {}", difference(&raw, &bytes))));
    }
    Ok(Ok(Content { bytes: Arc::new(bytes), stored: Arc::new(stored), unsure: false }))
}

/// The first difference between two trees, if there is one. Which nodes names lead to counts, their numbers do not.
pub fn compare(found: &State, wanted: &State) -> Option<String> {
    for path in found.keys() {
        if !wanted.contains_key(path) {
            return Some(format!("{path} is there, and should not be"));
        }
    }
    let (mut there, mut back) = (BTreeMap::new(), BTreeMap::new());
    for (path, wanted) in wanted {
        let Some(found) = found.get(path) else { return Some(format!("{path} is missing")) };
        let says = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
            Some(format!("{path} has {what} {a:?}, not {b:?}"))
        };
        if found.mode != wanted.mode {
            return says("mode", &found.mode, &wanted.mode);
        }
        if found.nlink != wanted.nlink {
            return says("names", &found.nlink, &wanted.nlink);
        }
        if found.target != wanted.target {
            return says("target", &found.target, &wanted.target);
        }
        if found.keep != wanted.keep || found.kept.len() != wanted.kept.len() {
            let says = |seen: &Seen| format!("{} generations of {}", seen.kept.len(), seen.keep);
            return Some(format!("{path} has {}, not {}", says(found), says(wanted)));
        }
        for (found, wanted) in found.kept.iter().zip(&wanted.kept) {
            if found.content.bytes != wanted.content.bytes {
                return Some(format!(
                    "a generation of {path} holds {}",
                    difference(&found.content.bytes, &wanted.content.bytes)
                ));
            }
            if found.mode != wanted.mode || found.xattrs != wanted.xattrs {
                return Some(format!("a generation of {path} has another mode or other extended attributes"));
            }
            if *there.entry(wanted.node).or_insert(found.node) != found.node
                || *back.entry(found.node).or_insert(wanted.node) != wanted.node
            {
                return Some(format!("a generation of {path} is another node"));
            }
        }
        if found.xattrs != wanted.xattrs {
            return Some(format!("{path} has other extended attributes"));
        }
        match (&found.content, &wanted.content) {
            (Some(found), Some(wanted)) if found.bytes != wanted.bytes => {
                return Some(format!("{path} holds {}", difference(&found.bytes, &wanted.bytes)));
            }
            (Some(_), Some(_)) | (None, None) => {}
            _ => return Some(format!("{path} is of another kind")),
        }
        if *there.entry(wanted.node).or_insert(found.node) != found.node
            || *back.entry(found.node).or_insert(wanted.node) != wanted.node
        {
            return Some(format!("{path} leads to another node than its other names do"));
        }
    }
    None
}

/// Bytes in use and free are exactly those of so many chunks.
pub fn space(pool: &Pool, config: &Config, chunks: u64) -> Done {
    let stat = pool.stat();
    let used = chunks * u64::from(config.chunk);
    let free = config.capacity() - used;
    if (stat.used_bytes, stat.free_bytes) != (used, free) {
        return violation(format!(
            "{} bytes are in use and {} free; the regions take {used}, which leaves {free}",
            stat.used_bytes, stat.free_bytes
        ));
    }
    Ok(())
}
