//! Random acts and random crashes: what a copy of the directory shows is the last snapshot, whole.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::crash::copy_tree;
use super::*;

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

#[derive(Clone, Debug)]
enum Act {
    /// Name, offset, length, seed.
    Write(usize, u16, u16, u8),
    Truncate(usize, u16),
    Rewrite(usize, u16, u8),
    Rename(usize, usize),
    Unlink(usize),
    /// Leaves a writer open for so many acts.
    Hold(usize, u16, u8),
    Sync,
    Crash,
    Reopen,
}

fn act() -> impl Strategy<Value = Act> {
    let name = 0..NAMES.len();
    prop_oneof![
        4 => (name.clone(), 0u16..20_000, 1u16..20_000, any::<u8>()).prop_map(|(n, o, l, s)| Act::Write(n, o, l, s)),
        1 => (name.clone(), 0u16..40_000).prop_map(|(n, s)| Act::Truncate(n, s)),
        2 => (name.clone(), 0u16..30_000, any::<u8>()).prop_map(|(n, l, s)| Act::Rewrite(n, l, s)),
        2 => (name.clone(), name.clone()).prop_map(|(n, m)| Act::Rename(n, m)),
        1 => name.clone().prop_map(Act::Unlink),
        1 => (name, 1u16..5000, any::<u8>()).prop_map(|(n, l, s)| Act::Hold(n, l, s)),
        2 => Just(Act::Sync),
        1 => Just(Act::Crash),
        1 => Just(Act::Reopen),
    ]
}

type Files = BTreeMap<&'static str, Vec<u8>>;

fn shown(pool: &Pool) -> Files {
    let names = NAMES.into_iter().filter(|at| pool.lookup(ROOT, name(at)).is_ok());
    names.map(|at| (at, get(pool, at))).collect()
}

fn node(pool: &Pool, at: &str) -> u64 {
    match pool.lookup(ROOT, name(at)) {
        Ok(attr) => attr.node,
        Err(_) => pool.create(ROOT, name(at), &region(0o644)).unwrap().node,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_crash_shows_the_last_snapshot(acts in proptest::collection::vec(act(), 1..40)) {
        let (dir, path) = formatted();
        let mut pool = Some(open(&path));
        // What is written and closed; what the last snapshot holds.
        let (mut files, mut durable) = (Files::new(), Files::new());
        for (index, act) in acts.into_iter().enumerate() {
            let now = pool.as_ref().unwrap();
            match act {
                Act::Write(at, offset, len, seed) => {
                    let (offset, bytes) = (offset as usize, noise(seed.into(), len as usize));
                    let handle = now.open_region(node(now, NAMES[at]), Access::ReadWrite, false).unwrap();
                    handle.write_at(offset as u64, &bytes).unwrap();
                    let content = files.entry(NAMES[at]).or_default();
                    content.resize(content.len().max(offset + bytes.len()), 0);
                    content[offset..offset + bytes.len()].copy_from_slice(&bytes);
                }
                Act::Truncate(at, size) => {
                    if let Some(content) = files.get_mut(NAMES[at]) {
                        let set = SetAttr { size: Some(size.into()), ..SetAttr::default() };
                        now.setattr(node(now, NAMES[at]), &set).unwrap();
                        content.resize(size.into(), 0);
                    }
                }
                Act::Rewrite(at, len, seed) => {
                    let handle = now.open_region(node(now, NAMES[at]), Access::Write, true).unwrap();
                    let bytes = noise(seed.into(), len.into());
                    handle.write_at(0, &bytes).unwrap();
                    files.insert(NAMES[at], bytes);
                }
                Act::Rename(from, to) => {
                    let done = now.rename(ROOT, name(NAMES[from]), ROOT, name(NAMES[to]), RenameFlags::default());
                    prop_assert_eq!(done.is_ok(), files.contains_key(NAMES[from]));
                    if from != to && let Some(content) = files.remove(NAMES[from]) {
                        files.insert(NAMES[to], content);
                    }
                }
                Act::Unlink(at) => {
                    prop_assert_eq!(now.unlink(ROOT, name(NAMES[at])).is_ok(), files.remove(NAMES[at]).is_some());
                }
                Act::Hold(at, len, seed) => {
                    // A snapshot while somebody writes: the old content if there was any, else no file at all.
                    let new = !files.contains_key(NAMES[at]);
                    let held = now.open_region(node(now, NAMES[at]), Access::ReadWrite, false).unwrap();
                    let bytes = noise(seed.into(), len.into());
                    held.write_at(0, &bytes).unwrap();
                    now.sync().unwrap();
                    durable = files.clone();
                    let copy = dir.path().join(format!("held {index}"));
                    copy_tree(&path, &copy);
                    prop_assert_eq!(shown(&open(&copy)), durable.clone(), "while {} is written (new: {})", NAMES[at], new);
                    drop(held);
                    let content = files.entry(NAMES[at]).or_default();
                    content.resize(content.len().max(bytes.len()), 0);
                    content[..bytes.len()].copy_from_slice(&bytes);
                }
                Act::Sync => {
                    now.sync().unwrap();
                    durable = files.clone();
                }
                Act::Crash => {
                    let copy = dir.path().join(format!("killed {index}"));
                    copy_tree(&path, &copy);
                    let crashed = open(&copy);
                    prop_assert_eq!(shown(&crashed), durable.clone());
                    let clean = crashed.verify(None, &mut |_| {}).unwrap().is_clean();
                    prop_assert!(clean);
                    crashed.join_sweeper();
                    let kept = durable.values().filter(|content| !content.is_empty()).count();
                    prop_assert_eq!(files_in(&copy).len(), kept, "no file is left over, none is missing");
                }
                Act::Reopen => {
                    pool.take().unwrap().close().unwrap();
                    durable = files.clone();
                    pool = Some(open(&path));
                }
            }
            prop_assert_eq!(shown(pool.as_ref().unwrap()), files.clone());
        }
        let pool = pool.unwrap();
        let clean = pool.verify(None, &mut |_| {}).unwrap().is_clean();
        prop_assert!(clean);
        pool.sync().unwrap();
        prop_assert_eq!(files_in(&path).len(), files.values().filter(|content| !content.is_empty()).count());
        let used = pool.stat().used_bytes;
        let most: u64 = files.values().map(|content| content.len() as u64 + 4096).sum();
        prop_assert!(used <= most, "{} bytes in use for at most {}", used, most);
    }
}
