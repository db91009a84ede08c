//! What a pool holds after a round, compared with what its clients wrote down.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use engine::{NodeKind, Session, SessionOptions};

use super::content::{Version, identify};
use super::journal::{Found, Line, Loss, State, one_moment, rewritten};
use crate::Kind;

/// The files of a directory: their bytes, or why these cannot be read.
pub type Files = BTreeMap<String, Result<Vec<u8>, String>>;
/// Directories.
pub type Seen = BTreeMap<String, Files>;

/// Where imports lie that did not end (engine/src/session/partial.rs).
pub const PARTIAL: &str = ".nvtier-partial";

/// Reads everything through a mount.
pub fn through_mount(point: &Path) -> Result<Seen, String> {
    let failed =
        |path: &Path, error: std::io::Error| format!("read {} in the mount: {error}", path.display());
    let mut seen = Seen::new();
    for entry in fs::read_dir(point).map_err(|e| failed(point, e))? {
        let entry = entry.map_err(|e| failed(point, e))?;
        let directory = entry.file_name().to_string_lossy().into_owned();
        if directory.starts_with('.') {
            continue; // the mount's own, and what is not complete
        }
        let files: &mut Files = seen.entry(directory).or_default();
        for file in fs::read_dir(entry.path()).map_err(|e| failed(&entry.path(), e))? {
            let file = file.map_err(|e| failed(&entry.path(), e))?;
            let bytes = fs::read(file.path()).map_err(|e| failed(&file.path(), e));
            files.insert(file.file_name().to_string_lossy().into_owned(), bytes);
        }
    }
    Ok(seen)
}

/// Reads everything through a session of this process, which owns the pool then. Nothing else is in the pool, its space is exactly that
/// of its regions, and of a directory pool no file is without a region.
pub fn through_session(pool: &Path, kind: Kind) -> Result<Seen, String> {
    let options = SessionOptions { ram_bytes: 32 << 20, wait: Duration::from_secs(10), ..Default::default() };
    let failed = |what: &str, error: engine::Error| format!("{what}: {}", error.chain());
    let session = Session::open(pool, options).map_err(|e| failed("open the pool", e))?;
    if session.is_remote() {
        return Err(format!("process {} still owns the pool", session.owner_pid()));
    }
    // Opening it has swept what cannot be gone on with. The rest may be there, and is of no more use.
    if let Ok(left) = session.list(PARTIAL, true) {
        if let Some(entry) = left.iter().find(|entry| entry.path[PARTIAL.len()..].contains('-')) {
            return Err(format!("{} is left of a writer that was killed", entry.path));
        }
        session.remove(PARTIAL, true).map_err(|e| failed("remove parked imports", e))?;
    }
    let mut seen = Seen::new();
    let (mut allocated, mut regions) = (0, 0);
    for entry in session.list("", true).map_err(|e| failed("list", e))? {
        match entry.kind {
            NodeKind::Directory => {
                seen.entry(entry.path).or_default();
            }
            NodeKind::Region => {
                allocated += entry.allocated;
                regions += 1;
                let Some((directory, name)) = entry.path.split_once('/') else {
                    return Err(format!("nobody made {}", entry.path));
                };
                let what = || format!("read {}", entry.path);
                let read = |reader: engine::RegionReader| {
                    let mut bytes = vec![0; reader.len() as usize];
                    reader.read_exact_at(0, &mut bytes).map(|()| bytes)
                };
                let bytes = session.reader(&entry.path).and_then(read).map_err(|e| failed(&what(), e));
                seen.entry(directory.to_owned()).or_default().insert(name.to_owned(), bytes);
            }
            other => return Err(format!("nobody made {}, a {other:?}", entry.path)),
        }
    }
    session.sync().map_err(|e| failed("sync", e))?;
    let stat = session.stat().map_err(|e| failed("stat", e))?;
    session.close().map_err(|e| failed("close the pool", e))?;
    if stat.used_bytes != allocated {
        return Err(format!("{} bytes are used, the regions occupy {allocated}", stat.used_bytes));
    }
    if stat.regions != regions {
        return Err(format!("{} regions are counted, {regions} are listed", stat.regions));
    }
    if kind == Kind::Directory {
        let files = count_files(&pool.join("regions")).map_err(|e| format!("list the pool's files: {e}"))?;
        if files != regions {
            return Err(format!("{files} files for {regions} regions"));
        }
    }
    Ok(seen)
}

fn count_files(directory: &Path) -> std::io::Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { count_files(&entry.path())? } else { 1 };
    }
    Ok(count)
}

/// What a directory may be after the steps in `lines`: the new state, and files that are of no version and may be so.
pub fn judge(
    name: &str,
    base: &State,
    lines: &[(u64, Line)],
    files: &Files,
) -> Result<(State, Vec<String>), Loss> {
    let at = |loss: Loss| Loss { what: format!("{name}/ {}", loss.what), ..loss };
    if !name.starts_with('r') {
        let found: Found = files.iter().map(|(name, bytes)| (name.clone(), known(bytes))).collect();
        return one_moment(base, lines, &found).map(|state| (state, Vec::new())).map_err(at);
    }
    let (mut state, mut mixed) = (State::new(), Vec::new());
    let mut names: Vec<_> = base.keys().chain(files.keys()).cloned().collect();
    for (_, line) in lines {
        if let Line::Begin(_, super::journal::Op::Rewrite(name, _)) = line {
            names.push(name.clone());
        }
    }
    names.sort();
    names.dedup();
    for file in names {
        // What cannot be read is not there.
        let bytes = files.get(&file).and_then(|bytes| bytes.as_deref().ok());
        match rewritten(base.get(&file).copied(), &file, lines, bytes).map_err(at)? {
            Some(version) => {
                state.insert(file, version);
            }
            None if bytes.is_some() => mixed.push(file),
            None => {}
        }
    }
    Ok((state, mixed))
}

fn known(bytes: &Result<Vec<u8>, String>) -> Result<Version, String> {
    identify(bytes.as_deref().map_err(Clone::clone)?)
}

/// Says where the bytes of a pool are others than `states` says.
pub fn differs(states: &BTreeMap<String, State>, seen: &Seen) -> Option<String> {
    let empty = (State::new(), BTreeMap::new());
    let names: std::collections::BTreeSet<_> = states.keys().chain(seen.keys()).collect();
    for name in names {
        let state = states.get(name).unwrap_or(&empty.0);
        let files = seen.get(name).unwrap_or(&empty.1);
        if let Some(extra) = files.keys().find(|file| !state.contains_key(*file)) {
            return Some(format!("{name}/{extra} came up again"));
        }
        for (file, version) in state {
            let found = files.get(file).map(known);
            if found != Some(Ok(*version)) {
                return Some(format!("{name}/{file} was {version}, is {found:?}"));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::journal::Op;
    use super::*;

    #[test]
    fn losses_are_noticed() {
        let version = |id| Version { id, len: 2000 };
        let files = |files: &[(&str, u64)]| -> Files {
            files.iter().map(|(name, id)| ((*name).to_owned(), Ok(version(*id).bytes()))).collect()
        };
        let base: State = [("s0".to_owned(), version(1))].into();
        let put = (0, Line::Begin(1, Op::Put("s1".into(), version(2))));
        let synced = [put.clone(), (0, Line::Synced(1))];
        let whole = files(&[("s0", 1), ("s1", 2)]);
        assert_eq!(judge("w1", &base, &synced, &whole).unwrap().0.len(), 2);
        assert_eq!(judge("w1", &base, &[put], &files(&[("s0", 1)])).unwrap().0, base);
        assert_eq!(judge("w1", &base, &synced, &files(&[("s0", 1)])).unwrap_err().bytes, 2000);
        assert_eq!(judge("w1", &base, &synced, &files(&[])).unwrap_err().bytes, 4000);
        let mut torn = whole.clone();
        torn.get_mut("s1").unwrap().as_mut().unwrap()[1000] ^= 1;
        assert_eq!(judge("w1", &base, &synced, &torn).unwrap_err().bytes, 2000);
        torn.insert("s1".into(), Err("EIO".into()));
        assert_eq!(judge("w1", &base, &synced, &torn).unwrap_err().bytes, 2000);
        torn.insert("s1".into(), Ok(vec![7; 100]));
        assert_eq!(judge("r", &base, &[], &torn).unwrap_err().bytes, 0, "nobody wrote s1");
        assert_eq!(judge("r", &base, &[], &files(&[])).unwrap_err().bytes, 2000);

        let states: BTreeMap<String, State> = [("w1".to_owned(), base)].into();
        let seen = |found: &[(&str, u64)]| -> Seen { [("w1".to_owned(), files(found))].into() };
        assert_eq!(differs(&states, &seen(&[("s0", 1)])), None);
        assert!(differs(&states, &seen(&[("s0", 2)])).is_some());
        assert!(differs(&states, &seen(&[("s0", 1), ("s1", 2)])).is_some());
        assert!(differs(&states, &Seen::new()).is_some());
    }
}
