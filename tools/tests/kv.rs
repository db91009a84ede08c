//! `nvtier kv` on pools of all kinds, with blocks that a process of ours stored before.

use std::process::Command;

use engine::kv::{Key, Put, Store, StoreOptions, Stored};
use engine::{OpenOptions, Pool};
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
