//! `nvtier kv` on pools of all kinds, with blocks that a process of ours stored before.

use std::process::Command;
use std::time::{Duration, Instant};

use engine::kv::{Get, Key, Miss, Put, Settings, Store, StoreOptions, Stored};
use engine::{FormatOptions, OpenOptions, Pool, Session, SessionOptions};
use nvtier_tests::{KINDS, Ran, format, nvtier_path, pattern, run, scratch};

fn kv(pool: &std::path::Path, args: &[&str]) -> Ran {
    run(Command::new(nvtier_path()).arg("kv").args(args).arg("--pool").arg(pool))
}

fn key(n: u8) -> Key {
    Key::new(&[n; 16]).unwrap()
}

fn fill(path: &std::path::Path, tenant: &str, numbers: std::ops::Range<u8>) {
    let pool = Pool::open(path, &OpenOptions::default()).unwrap();
    let store = Store::open(&pool, StoreOptions::default()).unwrap();
    let view = store.view(b"print", 10_000, tenant).unwrap();
    let puts = numbers.map(|n| {
        let mut buffer = nvme::Buffer::heap(view.slot_bytes()).unwrap();
        buffer[..10_000].copy_from_slice(&pattern(n.into(), 10_000));
        Put { key: key(n), buffer, start: 0 }
    });
    let done = store.lane(None).unwrap().put(&view, puts.collect()).unwrap();
    assert!(done.iter().all(|done| matches!(done.result, Stored::New)));
    view.pin(&[key(1)], true);
    store.close().unwrap();
    pool.close().unwrap();
}

#[test]
fn blocks_are_listed_moved_and_removed() {
    for kind in KINDS {
        let folder = scratch();
        let path = format(kind, folder.path());
        kv(&path, &["stat"]).refused(3, &["no KV store", "none"]);
        fill(&path, "", 0..10);
        fill(&path, "alice", 5..8);
        let stat = kv(&path, &["stat", "--json"]).json();
        assert_eq!(stat["stat"]["blocks"], 13);
        assert_eq!(stat["namespaces"][0]["blocks"], 13);
        assert_eq!(stat["tenants"][1]["name"], "alice");
        assert!(kv(&path, &["stat"]).ok().stdout.contains("alice"));
        let list = kv(&path, &["ls", "--json", "--tenant", ""]).json();
        assert_eq!(list.as_array().unwrap().len(), 10);
        assert_eq!(list[1]["block"]["pinned"], true);
        assert_eq!(kv(&path, &["ls", "--tenant", "alice"]).ok().stdout.lines().count(), 4);
        assert_eq!(kv(&path, &["verify", "--json"]).json()["blocks"], 13);
        // A prefix out, and into a store of another name.
        let file = folder.path().join("prefix.kv");
        let file = file.to_str().unwrap();
        kv(&path, &["export", file]).refused(2, &["--tenant"]);
        let keys = [key(2).to_string(), key(3).to_string(), key(77).to_string()];
        let args = ["export", file, &keys[0], &keys[1], &keys[2], "--tenant", "", "--json"];
        let moved = kv(&path, &args).json();
        assert_eq!((moved["written"].as_u64(), moved["skipped"].as_u64()), (Some(2), Some(1)));
        let moved = kv(&path, &["import", file, "--store", "other", "--tenant", "bob", "--json"]).json();
        assert_eq!(moved["stored"], 2);
        assert_eq!(kv(&path, &["stat", "--store", "other", "--json"]).json()["stat"]["blocks"], 2);
        std::fs::write(file, "something else entirely, and long enough").unwrap();
        kv(&path, &["import", file]).refused(1, &["no export", "something else"]);
        kv(&path, &["evict"]).refused(2, &["--all"]);
        kv(&path, &["evict", "zz"]).refused(2, &["no key"]);
        assert!(kv(&path, &["evict", "--tenant", "alice"]).ok().stdout.contains('3'));
        assert_eq!(kv(&path, &["evict", &keys[0], "--json"]).json()["removed"], 1);
        assert_eq!(kv(&path, &["stat", "--json"]).json()["stat"]["blocks"], 9);
        assert_eq!(kv(&path, &["evict", "--all", "--json"]).json()["removed"], 9);
    }
}

#[test]
fn all_of_it_works_while_another_process_owns_the_pool() {
    let folder = scratch();
    let path = folder.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    fill(&path, "", 0..10);
    fill(&path, "alice", 5..8);
    // This process is the owner, and has the store open, as an inference server would.
    let options = SessionOptions { serve: true, ..SessionOptions::default() };
    let owner = Session::open(&path, options).unwrap();
    let blocks = owner.blocks(&Settings::default(), b"print", 10_000, "", None).unwrap();
    kv(&path, &["stat", "--store", "none"]).refused(3, &["no KV store", "default"]);
    let stat = kv(&path, &["stat", "--json"]).json();
    assert_eq!((stat["stat"]["blocks"].as_u64(), stat["stat"]["pinned"].as_u64()), (Some(13), Some(1)));
    assert_eq!(kv(&path, &["ls", "--json"]).json().as_array().unwrap().len(), 13);
    assert_eq!(kv(&path, &["verify", "--json"]).json()["blocks"], 13);
    let text = |n: u8| key(n).to_string();
    assert_eq!(kv(&path, &["pin", &text(2), &text(3), "--tenant", "", "--json"]).json()["pinned"], 2);
    assert_eq!(blocks.stat().unwrap().pinned, 3);
    assert_eq!(kv(&path, &["unpin", "--tenant", "", "--json"]).json()["unpinned"], 10);
    assert_eq!(blocks.stat().unwrap().pinned, 0);
    kv(&path, &["pin"]).refused(2, &["--all"]);
    let file = folder.path().join("prefix.kv");
    let file = file.to_str().unwrap();
    kv(&path, &["export", file]).refused(2, &["--tenant"]);
    kv(&path, &["export", file, "--tenant", "eve"]).refused(3, &["no namespace and tenant"]);
    assert!(std::fs::read_dir(folder.path()).unwrap().flatten().all(|e| e.file_name() == "pool"));
    assert_eq!(kv(&path, &["export", file, "--tenant", "", "--json"]).json()["written"], 10);
    assert_eq!(kv(&path, &["evict", &text(4), "--tenant", "", "--json"]).json()["removed"], 1);
    assert_eq!(kv(&path, &["import", file, "--json"]).json()["stored"], 1);
    // What came back is what it was.
    let get = |n: u8| Get { key: key(n), buffer: nvme::Buffer::heap(12_288).unwrap(), start: 0 };
    let by = Instant::now() + Duration::from_secs(30);
    let got = blocks.get(vec![get(4), get(11)], by);
    assert!(got[0].result.is_ok() && matches!(got[1].result, Err(Miss::Absent)));
    assert!(got[0].buffer.as_ref().unwrap()[..10_000] == pattern(4, 10_000));
    std::fs::write(file, "something else entirely, and long enough").unwrap();
    kv(&path, &["import", file]).refused(1, &["no export", "something else"]);
    kv(&path, &["import", "/dev/zero"]).refused(2, &["regular file"]);
    kv(&path, &["drop"]).refused(4, &["open"]);
    drop(blocks);
    kv(&path, &["drop"]).ok();
    kv(&path, &["stat"]).refused(3, &["no KV store"]);
    owner.close().unwrap();
}

#[test]
fn a_quota_is_shown_set_kept_and_taken_away() {
    const SLOT: u64 = 12_288;
    let folder = scratch();
    let path = folder.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    fill(&path, "alice", 0..5);
    fill(&path, "", 0..3);
    let quota = |args: &[&str]| kv(&path, &[&["quota", "--json"], args].concat()).json();
    let (used, limit) = (
        |told: &serde_json::Value| told[0]["used_bytes"].as_u64().unwrap() / SLOT,
        |told: &serde_json::Value| told[0]["quota_bytes"].as_u64().unwrap(),
    );
    assert_eq!(quota(&[]).as_array().unwrap().len(), 2);
    assert_eq!((used(&quota(&["alice"])), limit(&quota(&["alice"]))), (5, 0));
    // His oldest blocks go, but for the one that is pinned, and nobody else's.
    let told = quota(&["alice", "24KiB"]);
    assert_eq!((used(&told), limit(&told)), (2, 24 << 10));
    let left = kv(&path, &["ls", "--tenant", "alice", "--json"]).json();
    let left: Vec<_> = left.as_array().unwrap().iter().map(|listed| &listed["block"]["key"]).collect();
    assert_eq!(left, [&key(1).to_string(), &key(4).to_string()]);
    assert_eq!(used(&quota(&[""])), 3);
    // It is in the store: whoever opens it keeps to it.
    for n in 10..14 {
        fill(&path, "alice", n..n + 1);
        assert_eq!(used(&quota(&["alice"])), 2);
    }
    let text = kv(&path, &["quota"]).ok().stdout;
    assert!(text.contains("(no name)") && text.contains("none") && text.contains("24.0 KiB"), "{text}");
    // So does an owner that has the store open.
    let owner = Session::open(&path, SessionOptions { serve: true, ..SessionOptions::default() }).unwrap();
    let blocks = owner.blocks(&Settings::default(), b"print", 10_000, "alice", None).unwrap();
    let put = |numbers: std::ops::Range<u8>| {
        let one = |n| {
            let put = Put { key: key(n), buffer: nvme::Buffer::heap(12_288).unwrap(), start: 0 };
            blocks.put(vec![put], Instant::now() + Duration::from_secs(30)).remove(0).result
        };
        numbers.map(one).filter(|result| matches!(result, Stored::New)).count()
    };
    assert_eq!((put(20..24), used(&quota(&["alice"]))), (4, 2));
    assert_eq!(limit(&quota(&["alice", "60KiB"])), 60 << 10);
    assert_eq!((put(30..40), used(&quota(&["alice"]))), (10, 5));
    assert_eq!(limit(&quota(&["alice", "--clear"])), 0);
    assert_eq!((put(40..50), used(&quota(&["alice"]))), (10, 15));
    // One may be limited before his first block.
    assert_eq!(limit(&quota(&["eve", "1MiB"])), 1 << 20);
    drop(blocks);
    owner.close().unwrap();
    assert_eq!((limit(&quota(&["eve"])), limit(&quota(&["alice"]))), (1 << 20, 0));
    kv(&path, &["quota", "mallory"]).refused(3, &["no tenant mallory", "nvtier kv quota NAME SIZE"]);
    kv(&path, &["quota", "alice", "0"]).refused(2, &["0"]);
    kv(&path, &["quota", "alice", "much"]).refused(2, &["much"]);
    kv(&path, &["quota", "--clear"]).refused(2, &["TENANT"]);
    kv(&path, &["quota", "alice", "1GiB", "--clear"]).refused(2, &["--clear"]);
    kv(&path, &["quota", &"x".repeat(2000), "1GiB"]).refused(1, &["tenant's name"]);
}

#[test]
fn damage_is_found_while_another_process_owns_the_pool() {
    let folder = scratch();
    let path = folder.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    fill(&path, "", 0..4);
    let wanted = pattern(2, 10_000);
    let mut flipped = 0;
    for file in files_below(&path) {
        let mut bytes = std::fs::read(&file).unwrap();
        if let Some(at) = bytes.windows(wanted.len()).step_by(4096).position(|part| part == wanted) {
            bytes[at * 4096 + 5000] ^= 1;
            std::fs::write(&file, bytes).unwrap();
            flipped += 1;
        }
    }
    assert_eq!(flipped, 1, "one file has the block");
    let owner = Session::open(&path, SessionOptions { serve: true, ..SessionOptions::default() }).unwrap();
    kv(&path, &["verify"]).refused(5, &["1 blocks were not what was stored"]);
    assert_eq!(kv(&path, &["verify", "--json"]).json()["blocks"], 3);
    owner.close().unwrap();
}

fn files_below(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => found.extend(files_below(&entry.path())),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}
