//! A copy of the pool's directory, taken while the pool is open, is what a killed process leaves.

use super::*;

pub(super) fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    // The catalog last: a real crash has no order, but here the catalog must not name what was copied before it was written.
    let mut entries: Vec<_> = std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort_by_key(|path| !path.ends_with("catalog.redb"));
    for entry in entries {
        let target = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            copy_tree(&entry, &target);
        } else {
            std::fs::copy(&entry, &target).unwrap();
        }
    }
}

#[test]
fn committed_content_is_whole_and_the_rest_invisible() {
    let (dir, path) = formatted();
    let pool = open(&path);
    put(&pool, "synced", &noise(1, 300_000));
    let overwritten = put(&pool, "overwritten", &noise(2, 100_000));
    pool.sync().unwrap();
    put(&pool, "sealed later", &noise(3, 1000));
    let writer = pool.open_region(overwritten.node, Access::ReadWrite, false).unwrap();
    writer.write_at(0, &noise(4, 100_000)).unwrap();
    let first = pool.create(ROOT, name("first time"), &region(0o644)).unwrap();
    let first = pool.open_region(first.node, Access::ReadWrite, false).unwrap();
    first.write_at(0, &noise(5, 5000)).unwrap();
    let copy = dir.path().join("killed before");
    copy_tree(&path, &copy);
    pool.sync().unwrap();
    let after = dir.path().join("killed after");
    copy_tree(&path, &after);
    drop((writer, first));

    let crashed = open(&copy);
    assert_eq!(get(&crashed, "synced"), noise(1, 300_000));
    assert_eq!(get(&crashed, "overwritten"), noise(2, 100_000), "the old content, whole");
    for invisible in ["sealed later", "first time"] {
        assert_eq!(crashed.lookup(ROOT, name(invisible)).unwrap_err().kind(), ErrorKind::NotFound);
    }
    crashed.join_sweeper();
    crashed.close().unwrap();
    assert_eq!(files_in(&copy).len(), 2, "what the killed process was writing is gone");

    let crashed = open(&after);
    assert_eq!(get(&crashed, "sealed later"), noise(3, 1000));
    assert_eq!(get(&crashed, "overwritten"), noise(2, 100_000));
    assert_eq!(crashed.lookup(ROOT, name("first time")).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(crashed.verify(None, &mut |_| {}).unwrap().is_clean());
}

#[test]
fn a_snapshot_between_creation_and_writing_holds_no_empty_file() {
    let dir = tempfile::tempdir().unwrap();
    let raw = FormatOptions { raw: true, size: Some(64 << 20), ..FormatOptions::default() };
    for (kind, options) in [("directory", FormatOptions::default()), ("image", raw)] {
        let path = dir.path().join(kind);
        Pool::format(&path, &options).unwrap();
        let killed = |at: &str| {
            let to = dir.path().join(format!("{kind} {at}"));
            if path.is_dir() {
                copy_tree(&path, &to)
            } else {
                assert!(std::fs::copy(&path, &to).unwrap() > 0)
            }
            open(&to)
        };
        let pool = open(&path);
        let (attr, created) = pool.create_open(ROOT, name("new"), &region(0o644)).unwrap();
        pool.sync().unwrap();
        let gone = |pool: &Pool| pool.lookup(ROOT, name("new")).unwrap_err().kind();
        assert_eq!(gone(&killed("before it is opened")), ErrorKind::NotFound, "{kind}");
        // Its writer comes before that one goes, as in a mount.
        let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
        drop(created);
        pool.sync().unwrap();
        assert_eq!(gone(&killed("before it is written")), ErrorKind::NotFound, "{kind}");
        writer.write_at(0, &noise(1, 5000)).unwrap();
        drop(writer);
        pool.sync().unwrap();
        assert_eq!(get(&killed("after it is closed"), "new"), noise(1, 5000), "{kind}");
        // An empty file is one, once it is closed.
        drop(pool.create_open(ROOT, name("empty"), &region(0o644)).unwrap());
        pool.sync().unwrap();
        assert_eq!(get(&killed("with an empty one"), "empty"), [0; 0], "{kind}");
    }
}

#[test]
fn fsync_keeps_what_is_still_open() {
    let (dir, path) = formatted();
    let pool = open(&path);
    let attr = pool.create(ROOT, name("log"), &region(0o644)).unwrap();
    let log = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    log.write_at(0, &noise(1, 70_000)).unwrap();
    log.sync().unwrap();
    let copy = dir.path().join("killed");
    copy_tree(&path, &copy);
    // The second one goes without a snapshot: the catalog knows the file.
    let commits = pool.stat().commits;
    log.write_at(70_000, &noise(2, 1000)).unwrap();
    log.sync().unwrap();
    assert_eq!(pool.stat().commits, commits);
    let later = dir.path().join("killed later");
    copy_tree(&path, &later);
    for (copy, len) in [(copy, 70_000u64), (later, 71_000)] {
        let crashed = open(&copy);
        let attr = crashed.lookup(ROOT, name("log")).unwrap();
        assert_eq!(attr.size, len);
        assert_eq!(get(&crashed, "log")[..70_000], noise(1, 70_000));
        let report = crashed.verify(None, &mut |_| {}).unwrap();
        assert!(report.is_clean());
        assert_eq!(crashed.stat().unsealed_regions, 0, "it has sums again");
        crashed.close().unwrap();
        let again = open(&copy);
        assert_eq!(again.verify(None, &mut |_| {}).unwrap().resealed, 0);
    }
}

#[test]
fn a_renamed_draft_is_found_under_its_new_name() {
    let (dir, path) = formatted();
    let pool = open(&path);
    put(&pool, "target", b"old");
    pool.sync().unwrap();
    let attr = pool.create(ROOT, name("tmp"), &region(0o644)).unwrap();
    let tmp = pool.open_region(attr.node, Access::Write, false).unwrap();
    tmp.write_at(0, b"new content").unwrap();
    pool.rename(ROOT, name("tmp"), ROOT, name("target"), RenameFlags::default()).unwrap();
    pool.sync().unwrap();
    let copy = dir.path().join("killed");
    copy_tree(&path, &copy);
    let crashed = open(&copy);
    assert_eq!(get(&crashed, "target"), b"new content");
    drop(tmp);
    assert_eq!(get(&pool, "target"), b"new content");
}

#[test]
fn a_changed_file_in_place_is_known_to_be_unsealed() {
    let (dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", &noise(1, 100_000));
    pool.sync().unwrap();
    let reader = pool.open_region(attr.node, Access::Read, false).unwrap();
    assert!(reader.backing().is_some());
    let writer = pool.open_region(attr.node, Access::Write, false).unwrap();
    writer.write_at(50_000, &noise(2, 60_000)).unwrap();
    let copy = dir.path().join("killed");
    copy_tree(&path, &copy);
    let crashed = open(&copy);
    assert_eq!(crashed.lookup(ROOT, name("a")).unwrap().size, 110_000);
    let mut wanted = noise(1, 100_000)[..50_000].to_vec();
    wanted.extend(noise(2, 60_000));
    assert_eq!(get(&crashed, "a"), wanted);
    assert!(crashed.verify(None, &mut |_| {}).unwrap().is_clean());
}
