//! The same acts on every kind of pool.

use super::*;
use crate::pool::tests::crash::copy_tree;

const SIZE: u64 = 96 << 20;

/// A directory with pools in it: name of the kind, path, whether it is striped or raw.
fn kinds(dir: &Path) -> Vec<(&'static str, std::path::PathBuf, bool)> {
    let make = |kind: &'static str, options: FormatOptions| {
        let path = dir.join(kind).join("pool");
        std::fs::create_dir(dir.join(kind)).unwrap();
        let members = options.members.iter().map(|member| dir.join(kind).join(member)).collect();
        Pool::format(&path, &FormatOptions { members, ..options.clone() }).unwrap();
        (kind, path)
    };
    let default = FormatOptions::default();
    let raw = FormatOptions { raw: true, size: Some(SIZE), ..default.clone() };
    let striped = FormatOptions { members: vec!["m0".into(), "m1".into(), "m2".into()], ..default.clone() };
    let images = FormatOptions { members: vec!["i0".into(), "i1".into()], ..raw.clone() };
    let small = FormatOptions { chunk_size: 4096, stripe_unit: 8192, ..striped.clone() };
    [
        ("directory", default, false),
        ("image", raw, true),
        ("striped", striped, true),
        ("images", images, true),
        ("small", small, true),
    ]
    .into_iter()
    .map(|(kind, options, extents)| {
        let (kind, path) = make(kind, options);
        (kind, path, extents)
    })
    .collect()
}

#[test]
fn content_is_kept_changed_and_freed() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, path, _) in kinds(dir.path()) {
        let pool = open(&path);
        let free = pool.stat();
        let mut wanted = noise(1, 5_000_000);
        let attr = put(&pool, "a", &wanted);
        put(&pool, "b", &noise(2, 10));
        assert_eq!(get(&pool, "a"), wanted, "{kind}");
        pool.sync().unwrap();
        let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
        for (offset, len) in [(0usize, 10usize), (1_234_567, 700_000), (4_999_990, 100_000)] {
            let bytes = noise(offset as u64 + 7, len);
            writer.write_at(offset as u64, &bytes).unwrap();
            wanted.resize(wanted.len().max(offset + len), 0);
            wanted[offset..offset + len].copy_from_slice(&bytes);
        }
        let mut seen = vec![0; wanted.len()];
        assert_eq!(writer.read_at(0, &mut seen).unwrap(), wanted.len());
        assert!(seen == wanted, "{kind}: a draft reads what was written");
        writer.sync().unwrap();
        writer.write_at(77, b"after fsync").unwrap();
        wanted[77..88].copy_from_slice(b"after fsync");
        drop(writer);
        assert!(get(&pool, "a") == wanted, "{kind}");
        pool.close().unwrap();
        let pool = open(&path);
        assert!(get(&pool, "a") == wanted, "{kind}: after a reopen");
        let report = pool.verify(None, &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{kind}: {report:?}");
        assert_eq!((report.regions, report.skipped, report.resealed), (2, 0, 0), "{kind}");
        let used = pool.stat().used_bytes;
        assert!((5_000_000..7_000_000).contains(&used), "{kind}: {used} bytes in use");
        pool.setattr(attr.node, &SetAttr { size: Some(1_000_000), ..SetAttr::default() }).unwrap();
        assert!(get(&pool, "a") == wanted[..1_000_000], "{kind}");
        drop(pool.open_region(attr.node, Access::Write, true).unwrap());
        assert_eq!(get(&pool, "a"), b"", "{kind}");
        pool.unlink(ROOT, name("b")).unwrap();
        pool.sync().unwrap();
        let stat = pool.stat();
        assert_eq!(stat.used_bytes, free.used_bytes, "{kind}: {stat:?}");
        pool.close().unwrap();
        assert_eq!(open(&path).stat().used_bytes, free.used_bytes, "{kind}");
    }
}

#[test]
fn a_crash_leaves_the_last_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, path, _) in kinds(dir.path()) {
        let pool = open(&path);
        let changed = put(&pool, "changed", &noise(1, 2_000_000));
        put(&pool, "replaced", &noise(2, 2_000_000));
        pool.sync().unwrap();
        // From here on no snapshot: all of it is undone by the crash.
        put(&pool, "late", &noise(3, 100_000));
        let writer = pool.open_region(changed.node, Access::ReadWrite, false).unwrap();
        writer.write_at(100_000, &noise(4, 1_500_000)).unwrap();
        writer.flush().unwrap();
        let again = pool.lookup(ROOT, name("replaced")).unwrap();
        let again = pool.open_region(again.node, Access::Write, true).unwrap();
        again.write_at(0, &noise(5, 3_000_000)).unwrap();
        drop(again);
        pool.unlink(ROOT, name("replaced")).unwrap();
        put(&pool, "more", &noise(6, 4_000_000));
        let copies = dir.path().join(format!("{kind} killed"));
        copy_tree(path.parent().unwrap(), &copies);
        drop(writer);
        let crashed = open(&copies.join("pool"));
        assert!(get(&crashed, "changed") == noise(1, 2_000_000), "{kind}");
        assert!(get(&crashed, "replaced") == noise(2, 2_000_000), "{kind}");
        assert_eq!(crashed.readdir(ROOT, 0, 10).unwrap().len(), 2, "{kind}");
        let report = crashed.verify(None, &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{kind}: {report:?}");
        crashed.join_sweeper();
        let used = crashed.stat().used_bytes;
        assert!((4_000_000..5_000_000).contains(&used), "{kind}: {used} bytes in use after the crash");
        put(&crashed, "life goes on", &noise(7, 1_000_000));
        crashed.close().unwrap();
        assert!(get(&open(&copies.join("pool")), "life goes on") == noise(7, 1_000_000), "{kind}");
    }
}

#[test]
fn a_full_pool_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, path, extents) in kinds(dir.path()) {
        // Directories without a quota have all of the file system: too much to fill here.
        if !extents || !kind.starts_with("image") {
            continue;
        }
        let pool = open(&path);
        put(&pool, "old", &noise(1, 1_000_000));
        pool.sync().unwrap();
        let free = pool.stat().free_bytes;
        let attr = pool.create(ROOT, name("new"), &region(0o644)).unwrap();
        let writer = pool.open_region(attr.node, Access::Write, false).unwrap();
        let piece = noise(2, 4 << 20);
        let mut at = 0;
        let error = loop {
            match writer.write_at(at, &piece) {
                Ok(len) => at += len as u64,
                Err(error) => break error,
            }
            assert!(at <= free, "{kind}: wrote {at} of {free} free bytes");
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{kind}: {}", error.chain());
        assert!(at + (8 << 20) > free, "{kind}: only {at} of {free} bytes could be written");
        drop(writer);
        pool.unlink(ROOT, name("new")).unwrap();
        pool.sync().unwrap();
        assert_eq!(pool.stat().free_bytes, free, "{kind}");
        assert!(get(&pool, "old") == noise(1, 1_000_000), "{kind}");
        assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    }
}

#[test]
fn space_that_is_read_is_not_given_away() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, path, _) in kinds(dir.path()) {
        let pool = open(&path);
        let attr = put(&pool, "a", &noise(1, 3_000_000));
        pool.sync().unwrap();
        let live = pool.inner.shared.open_live(attr.node, Access::Read, u64::MAX).unwrap();
        let live::Current::Stored(held) = live.current().unwrap() else { panic!("{kind}: not stored") };
        held.layout(pool.info().chunk_size).unwrap();
        // Two generations on, and the name gone.
        for round in 0..2 {
            let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
            writer.write_at(0, &noise(2 + round, 2_000_000)).unwrap();
            drop(writer);
            pool.sync().unwrap();
        }
        pool.unlink(ROOT, name("a")).unwrap();
        pool.sync().unwrap();
        put(&pool, "b", &noise(9, 9_000_000));
        let mut bytes = vec![0; 3_000_000];
        use crate::content::Content;
        assert_eq!(held.read_at(0, &mut bytes).unwrap(), bytes.len(), "{kind}");
        assert!(bytes == noise(1, 3_000_000), "{kind}");
        drop(held);
        pool.inner.shared.close_live(&live, Access::Read);
        drop(live);
        pool.unlink(ROOT, name("b")).unwrap();
        pool.sync().unwrap();
        assert_eq!(pool.stat().used_bytes, 0, "{kind}");
    }
}

/// As `rsync` does it over a mount, where the last close is told to nobody: the time is set while the region is being sealed.
#[test]
fn a_time_that_is_set_during_the_last_close_stays() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, path, _) in kinds(dir.path()) {
        let pool = open(&path);
        let long_ago = crate::Timestamp { secs: 1_000_000, nanos: 5 };
        let bytes = noise(1, 600_000);
        for round in 0..60 {
            let at = format!("f{round}");
            let (attr, handle) = pool.create_open(ROOT, name(&at), &region(0o644)).unwrap();
            handle.write_at(0, &bytes).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| drop(handle));
                if round % 2 == 0 {
                    std::thread::yield_now();
                }
                let told = pool
                    .setattr(attr.node, &SetAttr { mtime: Some(long_ago), ..SetAttr::default() })
                    .unwrap();
                assert_eq!((told.mtime, told.size), (long_ago, bytes.len() as u64), "{kind}, round {round}");
                while pool.stat().unsealed_regions > 0 {
                    let seen = pool.getattr(attr.node).unwrap();
                    assert_eq!(
                        (seen.mtime, seen.size),
                        (long_ago, bytes.len() as u64),
                        "{kind}, round {round}"
                    );
                }
            });
            let after = pool.getattr(attr.node).unwrap();
            assert_eq!((after.mtime, after.size), (long_ago, bytes.len() as u64), "{kind}, round {round}");
        }
    }
}
