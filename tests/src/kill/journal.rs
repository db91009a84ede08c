//! What a client did, written down before and after each step, and what the pool may hold after a kill because of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::content::{Version, mixture_of};

/// A directory: names and their contents.
pub type State = BTreeMap<String, Version>;

/// A step that changes one directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A new content under a name: of a new file through a mount, or in place of an old one through a session.
    Put(String, Version),
    /// A file is written anew in place.
    Rewrite(String, Version),
    /// `rename(2)`.
    Rename(String, String),
    /// `unlink(2)`.
    Remove(String),
}

impl Op {
    fn apply(&self, state: &mut State) {
        match self {
            Op::Put(name, version) | Op::Rewrite(name, version) => {
                state.insert(name.clone(), *version);
            }
            Op::Rename(from, to) => {
                if let Some(version) = state.remove(from) {
                    state.insert(to.clone(), version);
                }
            }
            Op::Remove(name) => {
                state.remove(name);
            }
        }
    }
}

/// A line of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Step number so-and-so begins.
    Begin(u64, Op),
    /// It was answered.
    End(u64),
    /// A call that promises durability returned: all steps up to this one are safe.
    Synced(u64),
    /// A call failed, and the client ends.
    Failed(String),
    /// How often a reader compared bytes after it had met the end of the owner.
    Survived(u64),
}

/// A journal being written, outside of the pool. Each line is one `write(2)`: it outlives its process however that ends.
#[derive(Debug)]
pub struct Journal {
    file: File,
    last: u64,
}

impl Journal {
    /// Starts one.
    pub fn create(path: &Path) -> io::Result<Journal> {
        Ok(Journal { file: File::options().create(true).append(true).open(path)?, last: 0 })
    }

    fn line(&mut self, text: &str) {
        self.file.write_all(format!("{} {text}\n", now_ns()).as_bytes()).expect("write a journal");
    }

    /// A step begins.
    pub fn begin(&mut self, op: &Op) {
        self.last += 1;
        let seq = self.last;
        match op {
            Op::Put(name, v) => self.line(&format!("begin {seq} put {name} {} {}", v.id, v.len)),
            Op::Rewrite(name, v) => self.line(&format!("begin {seq} rewrite {name} {} {}", v.id, v.len)),
            Op::Rename(from, to) => self.line(&format!("begin {seq} rename {from} {to}")),
            Op::Remove(name) => self.line(&format!("begin {seq} remove {name}")),
        }
    }

    /// The last step is done.
    pub fn end(&mut self) {
        self.line(&format!("end {}", self.last));
    }

    /// Everything up to the last step is durable.
    pub fn synced(&mut self) {
        self.line(&format!("synced {}", self.last));
    }

    /// A call failed.
    pub fn failed(&mut self, what: &str) {
        self.line(&format!("failed {}", what.replace('\n', " ")));
    }

    /// A reader went on.
    pub fn survived(&mut self, count: u64) {
        self.line(&format!("survived {count}"));
    }
}

/// Nanoseconds of the clock that all processes share.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Reads a journal: times and lines. A missing one is empty: its client never came so far.
pub fn load(path: &Path) -> Vec<(u64, Line)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    // A line is being written just now: its end is not there yet.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| parse(line).unwrap_or_else(|| panic!("no line of a journal: {line:?}")))
        .collect()
}

fn parse(line: &str) -> Option<(u64, Line)> {
    let (time, rest) = line.split_once(' ')?;
    let (word, rest) = rest.split_once(' ')?;
    let line = match word {
        "begin" => {
            let words: Vec<_> = rest.split(' ').collect();
            let version = |at: usize| {
                Some(Version { id: words.get(at)?.parse().ok()?, len: words.get(at + 1)?.parse().ok()? })
            };
            let name = (*words.get(2)?).to_owned();
            let op = match *words.get(1)? {
                "put" => Op::Put(name, version(3)?),
                "rewrite" => Op::Rewrite(name, version(3)?),
                "rename" => Op::Rename(name, (*words.get(3)?).to_owned()),
                "remove" => Op::Remove(name),
                _ => return None,
            };
            Line::Begin(words.first()?.parse().ok()?, op)
        }
        "end" => Line::End(rest.parse().ok()?),
        "synced" => Line::Synced(rest.parse().ok()?),
        "failed" => Line::Failed(rest.to_owned()),
        "survived" => Line::Survived(rest.parse().ok()?),
        _ => return None,
    };
    Some((time.parse().ok()?, line))
}

/// A state as a file, for the client of the next round.
pub fn save_state(path: &Path, state: &State) -> io::Result<()> {
    let text: String = state.iter().map(|(name, v)| format!("{name} {} {}\n", v.id, v.len)).collect();
    fs::write(path, text)
}

/// Reads it.
pub fn load_state(path: &Path) -> State {
    let text = fs::read_to_string(path).unwrap_or_default();
    let entry = |line: &str| {
        let mut words = line.split(' ');
        let name = words.next()?.to_owned();
        Some((name, Version { id: words.next()?.parse().ok()?, len: words.next()?.parse().ok()? }))
    };
    text.lines().filter_map(entry).collect()
}

/// What is wrong, and how many committed bytes are lost by it.
#[derive(Clone, Debug, Default)]
pub struct Loss {
    /// In words.
    pub what: String,
    /// Bytes whose durability had been promised.
    pub bytes: u64,
}

/// What a file was found to be.
pub type Found = BTreeMap<String, Result<Version, String>>;

/// Whether `found` is what the directory was after one of the steps, and not before the last one that was made durable. A new file that was
/// closed without an `fsync` of its own or a later one of the directory may be missing: its close takes a while in the background, and until
/// that is through the file is in no snapshot.
pub fn one_moment(base: &State, lines: &[(u64, Line)], found: &Found) -> Result<State, Loss> {
    let synced = lines.iter().filter_map(|(_, line)| match line {
        Line::Synced(seq) => Some(*seq),
        _ => None,
    });
    let synced = synced.max().unwrap_or(0);
    let mut state = base.clone();
    let mut promised = state.clone();
    let mut candidates = Vec::new();
    if synced == 0 {
        candidates.push(state.clone());
    }
    // A directory's `fsync`, or one within a session, comes after the end of a step; a file's own before it.
    let (mut ended, mut all_synced) = (0, 0);
    for (_, line) in lines {
        match line {
            Line::End(seq) => ended = *seq,
            Line::Synced(seq) if *seq == ended => all_synced = *seq,
            _ => {}
        }
    }
    let own = |seq: u64| lines.iter().any(|(_, line)| *line == Line::Synced(seq));
    let mut closing: Vec<(&String, Version)> = Vec::new();
    for (_, line) in lines {
        let Line::Begin(seq, op) = line else { continue };
        if let Op::Put(name, version) = op
            && *seq > all_synced
            && !own(*seq)
            && !state.contains_key(name)
        {
            closing.push((name, *version));
        }
        op.apply(&mut state);
        if *seq >= synced {
            candidates.push(state.clone());
        }
        if *seq == synced {
            promised = state.clone();
        }
    }
    let seen: Option<State> = found
        .iter()
        .map(|(name, version)| version.as_ref().ok().map(|version| (name.clone(), *version)))
        .collect();
    let may_be = |candidate: &State, seen: &State| {
        seen.iter().all(|(name, version)| candidate.get(name) == Some(version))
            && candidate.iter().all(|(name, version)| {
                seen.contains_key(name) || closing.iter().any(|(put, new)| *put == name && new == version)
            })
    };
    if let Some(seen) = &seen
        && candidates.iter().any(|candidate| may_be(candidate, seen))
    {
        return Ok(seen.clone());
    }
    // Of what was promised, only what no later step touched is lost for certain.
    let mut loss = Loss::default();
    let touched = |name: &str| {
        lines.iter().any(|(_, line)| match line {
            Line::Begin(seq, op) if *seq > synced => match op {
                Op::Put(at, _) | Op::Rewrite(at, _) | Op::Remove(at) => at == name,
                Op::Rename(from, to) => from == name || to == name,
            },
            _ => false,
        })
    };
    for (name, version) in &promised {
        match found.get(name) {
            Some(Ok(same)) if same == version => {}
            _ if touched(name) => {}
            None if closing.iter().any(|(put, new)| *put == name && new == version) => {}
            other => {
                loss.bytes += version.len;
                loss.what += &format!("{name}: {version} was promised, found: {}; ", shown(other));
            }
        }
    }
    for (name, version) in found {
        let known = |state: &State| version.as_ref().is_ok_and(|version| state.get(name) == Some(version));
        if !candidates.iter().any(known) {
            let closest: Vec<_> =
                candidates.iter().filter_map(|state| state.get(name)).map(ToString::to_string).collect();
            loss.what += &format!("{name}: found {}, never so (but {closest:?}); ", shown(Some(version)));
        }
    }
    if loss.what.is_empty() {
        loss.what = format!(
            "no single moment after step {synced} had these names: {:?}; steps: {:?}",
            found.keys().collect::<Vec<_>>(),
            lines.iter().rev().take(12).map(|(_, line)| line).collect::<Vec<_>>()
        );
    }
    Err(loss)
}

fn shown(found: Option<&Result<Version, String>>) -> String {
    match found {
        None => "nothing".into(),
        Some(Ok(version)) => version.to_string(),
        Some(Err(what)) => what.clone(),
    }
}

/// What a file that is rewritten in place may be: the last version whose own `fsync` returned or one begun since, or a mixture of these.
/// (An `fsync` of another file promises nothing about it: its close may still be on its way through the kernel.)
/// Gives what it is now, if it is one version.
pub fn rewritten(
    base: Option<Version>,
    name: &str,
    lines: &[(u64, Line)],
    bytes: Option<&[u8]>,
) -> Result<Option<Version>, Loss> {
    let synced = |seq: u64| lines.iter().any(|(_, line)| *line == Line::Synced(seq));
    let mut versions: Vec<Version> = base.into_iter().collect();
    let mut promised = base;
    for (_, line) in lines {
        let Line::Begin(seq, Op::Rewrite(at, version)) = line else { continue };
        if at != name {
            continue;
        }
        if synced(*seq) {
            versions.clear();
            promised = Some(*version);
        }
        versions.push(*version);
    }
    let lost = |what: String| {
        Err(Loss { what: format!("{name}: {what}"), bytes: promised.map_or(0, |version| version.len) })
    };
    let Some(bytes) = bytes else {
        return if promised.is_none() { Ok(None) } else { lost("it is gone".into()) };
    };
    if let Ok(version) = super::content::identify(bytes)
        && versions.contains(&version)
    {
        return Ok(Some(version));
    }
    if let [only] = versions[..]
        && promised.is_some()
    {
        return lost(format!("{only} was promised: {}", shown(Some(&super::content::identify(bytes)))));
    }
    match mixture_of(&versions, bytes) {
        Ok(()) => Ok(None),
        Err(what) => lost(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(id: u64) -> Version {
        Version { id, len: 1000 }
    }

    fn lines(ops: Vec<Line>) -> Vec<(u64, Line)> {
        ops.into_iter().map(|line| (0, line)).collect()
    }

    #[test]
    fn moments_are_told_from_mixtures() {
        let put = |seq, name: &str, id| Line::Begin(seq, Op::Put(name.into(), v(id)));
        let done = lines(vec![
            put(1, "t", 1),
            Line::End(1),
            Line::Begin(2, Op::Rename("t".into(), "s".into())),
            Line::End(2),
            Line::Synced(2),
            put(3, "u", 2),
            Line::End(3),
            Line::Begin(4, Op::Remove("s".into())),
        ]);
        let found = |pairs: &[(&str, u64)]| -> Found {
            pairs.iter().map(|(name, id)| ((*name).to_owned(), Ok(v(*id)))).collect()
        };
        let check = |pairs: &[(&str, u64)]| one_moment(&State::new(), &done, &found(pairs));
        check(&[("s", 1)]).unwrap();
        check(&[("s", 1), ("u", 2)]).unwrap();
        check(&[("u", 2)]).unwrap();
        assert_eq!(check(&[("t", 1)]).unwrap_err().bytes, 0, "a step after it may have taken s away");
        let loss = one_moment(&State::new(), &done[..7], &found(&[("u", 2)])).unwrap_err();
        assert_eq!(loss.bytes, 1000, "{loss:?}");
        // A put whose close is still under way is not there, later steps are; what was promised is.
        let removed = lines(vec![
            put(1, "a", 1),
            Line::Synced(1),
            put(2, "b", 2),
            Line::Begin(3, Op::Remove("a".into())),
        ]);
        one_moment(&State::new(), &removed, &found(&[])).unwrap();
        one_moment(&State::new(), &removed[..3], &found(&[("b", 2)])).unwrap_err();
        let moved =
            lines(vec![put(1, "a", 1), Line::Begin(2, Op::Rename("a".into(), "s".into())), put(3, "x", 3)]);
        let old: State = [("s".to_owned(), v(9))].into();
        one_moment(&old, &moved, &found(&[("s", 1)])).unwrap();
        one_moment(&old, &moved, &found(&[("s", 9)])).unwrap();
        one_moment(&old, &moved, &found(&[("x", 3)])).unwrap_err();
        let torn: Found = [("s".to_owned(), Err("zeros".to_owned()))].into();
        assert_eq!(one_moment(&State::new(), &done[..7], &torn).unwrap_err().bytes, 1000);
        check(&[("s", 1), ("x", 9)]).unwrap_err();
    }

    #[test]
    fn what_is_rewritten_may_be_a_mixture_only_while_it_is() {
        let write = |seq, id| Line::Begin(seq, Op::Rewrite("r".into(), v(id)));
        let done = lines(vec![write(1, 1), Line::Synced(1), Line::End(1), write(2, 2)]);
        let mut mixed = v(1).bytes();
        mixed[..512].copy_from_slice(&v(2).bytes()[..512]);
        assert_eq!(rewritten(None, "r", &done, Some(&mixed)).unwrap(), None);
        assert_eq!(rewritten(None, "r", &done, Some(&v(2).bytes())).unwrap(), Some(v(2)));
        assert_eq!(rewritten(None, "r", &done[..3], Some(&mixed)).unwrap_err().bytes, 1000);
        assert_eq!(rewritten(None, "r", &done[..3], None).unwrap_err().bytes, 1000);
        rewritten(None, "r", &[], None).unwrap();
        rewritten(Some(v(3)), "r", &[], Some(&mixed)).unwrap_err();
    }

    #[test]
    fn journals_and_states_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("j");
        let mut journal = Journal::create(&path).unwrap();
        let ops = [
            Op::Put("a".into(), v(1)),
            Op::Rename("a".into(), "b".into()),
            Op::Rewrite("b".into(), v(2)),
            Op::Remove("b".into()),
        ];
        for op in &ops {
            journal.begin(op);
            journal.end();
        }
        journal.synced();
        journal.failed("two\nlines");
        let read: Vec<_> = load(&path).into_iter().map(|(_, line)| line).collect();
        assert_eq!(read[0], Line::Begin(1, ops[0].clone()));
        assert_eq!(read[6], Line::Begin(4, ops[3].clone()));
        assert_eq!(read[8..], [Line::Synced(4), Line::Failed("two lines".into())]);
        let state: State = [("x".to_owned(), v(4))].into();
        save_state(&path, &state).unwrap();
        assert_eq!(load_state(&path), state);
    }
}
