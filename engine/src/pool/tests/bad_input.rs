//! What is wrong with a pool's files, and what is said about it.

use std::os::unix::fs::FileExt;

use super::*;

fn refused(path: &Path, options: &FormatOptions) -> Error {
    Pool::format(path, options).unwrap_err()
}

#[test]
fn other_data_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    std::fs::write(&file, b"GGUF and more").unwrap();
    let error = refused(&file, &FormatOptions::default());
    assert_eq!(error.kind(), ErrorKind::ForeignData);
    assert!(error.to_string().contains("a GGUF model"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"GGUF and more");
    let error = refused(dir.path(), &FormatOptions::default());
    assert_eq!(error.kind(), ErrorKind::ForeignData);
    assert!(error.to_string().contains("model.gguf"), "{error}");
    // Forced, other files stay where they are.
    Pool::format(dir.path(), &FormatOptions { force: true, ..FormatOptions::default() }).unwrap();
    assert!(file.exists());
    let error = refused(dir.path(), &FormatOptions::default());
    assert!(error.to_string().contains("an nvtier pool"), "{error}");
    let pool = open(dir.path());
    put(&pool, "a", b"b");
    for force in [false, true] {
        let error = refused(dir.path(), &FormatOptions { force, ..FormatOptions::default() });
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    }
    pool.close().unwrap();
    Pool::format(dir.path(), &FormatOptions { force: true, ..FormatOptions::default() }).unwrap();
    assert_eq!(open(dir.path()).readdir(ROOT, 0, 10).unwrap().len(), 0);
    assert_eq!(files_in(dir.path()).len(), 0);
}

#[test]
fn impossible_options_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x/pool");
    let default = FormatOptions::default();
    for (options, kind) in [
        (FormatOptions { chunk_size: 5000, ..default.clone() }, ErrorKind::InvalidArgument),
        (FormatOptions { chunk_size: 2048, ..default.clone() }, ErrorKind::InvalidArgument),
        (FormatOptions { stripe_unit: 5000, ..default.clone() }, ErrorKind::InvalidArgument),
        (FormatOptions { size: Some(1 << 20), ..default.clone() }, ErrorKind::TooSmall),
        (FormatOptions { size: Some(1 << 20), raw: true, ..default.clone() }, ErrorKind::TooSmall),
        (FormatOptions { raw: true, ..default.clone() }, ErrorKind::InvalidArgument),
        (
            FormatOptions { members: vec![path.clone(), path.join("in")], ..default.clone() },
            ErrorKind::InvalidArgument,
        ),
        (
            FormatOptions { members: vec![path.clone(), path.clone()], ..default.clone() },
            ErrorKind::InvalidArgument,
        ),
        (FormatOptions { members: vec![path.clone(); 17], ..default.clone() }, ErrorKind::InvalidArgument),
    ] {
        assert_eq!(refused(&path, &options).kind(), kind, "{options:?}");
        assert!(!dir.path().join("x").exists(), "{options:?}");
    }
}

#[test]
fn no_pool_here() {
    let dir = tempfile::tempdir().unwrap();
    let kind = |path: &Path| Pool::open(path, &manual()).unwrap_err().kind();
    assert_eq!(kind(&dir.path().join("nothing")), ErrorKind::NotFound);
    assert_eq!(kind(dir.path()), ErrorKind::NotAPool);
    let file = dir.path().join("file");
    std::fs::write(&file, vec![7; 100_000]).unwrap();
    assert_eq!(kind(&file), ErrorKind::NotAPool);
    std::fs::write(&file, b"").unwrap();
    assert_eq!(kind(&file), ErrorKind::NotAPool);
    assert_eq!(kind(Path::new("/dev/null")), ErrorKind::NotAPool);
}

#[test]
fn a_pool_has_one_owner() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let error = Pool::open(&path, &manual()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    assert_eq!(Pool::probe(&path).unwrap().owner_pid, Some(std::process::id()));
    let handle = {
        let attr = put(&pool, "a", b"x");
        pool.open_region(attr.node, Access::Read, false).unwrap()
    };
    pool.close().unwrap();
    assert_eq!(Pool::open(&path, &manual()).unwrap_err().kind(), ErrorKind::Busy, "a handle keeps the pool");
    drop(handle);
    open(&path);
}

#[test]
fn superblocks_have_a_second_copy() {
    let (_dir, path) = formatted();
    let file = path.join("superblock");
    let good = std::fs::read(&file).unwrap();
    for (at, what) in [(0usize, "magic"), (9, "version"), (20, "id"), (4000, "padding")] {
        for copy in [0usize, 4096] {
            let mut bytes = good.clone();
            bytes[copy + at] ^= 1;
            std::fs::write(&file, &bytes).unwrap();
            let read_only = Pool::open(&path, &OpenOptions { read_only: true, ..manual() });
            read_only.unwrap_or_else(|error| panic!("{what} of {copy}: {error}")).close().unwrap();
            assert_eq!(std::fs::read(&file).unwrap(), bytes, "read-only repairs nothing");
            open(&path).close().unwrap();
            assert_eq!(std::fs::read(&file).unwrap(), good, "{what} of copy {copy} is repaired");
        }
    }
    for len in [100, 4096, 5000] {
        std::fs::write(&file, &good[..len]).unwrap();
        match len {
            100 => assert_eq!(Pool::open(&path, &manual()).unwrap_err().kind(), ErrorKind::Corrupt),
            _ => {
                open(&path).close().unwrap();
                assert_eq!(std::fs::read(&file).unwrap(), good);
            }
        }
    }
    let mut bytes = good.clone();
    bytes[20] ^= 1;
    bytes[4096 + 30] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let error = Pool::open(&path, &manual()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("both copies"), "{error}");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(Pool::open(&path, &manual()).unwrap_err().kind(), ErrorKind::NotAPool);
}

#[test]
fn a_newer_format_is_refused() {
    let (_dir, path) = formatted();
    let file = path.join("superblock");
    let mut bytes = std::fs::read(&file).unwrap();
    for copy in bytes.chunks_mut(4096) {
        copy[8..12].copy_from_slice(&2u32.to_le_bytes());
        copy[12..16].fill(0);
        let sum = crc32fast::hash(copy);
        copy[12..16].copy_from_slice(&sum.to_le_bytes());
    }
    std::fs::write(&file, &bytes).unwrap();
    let error = Pool::open(&path, &manual()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NewerFormat);
    assert!(error.to_string().contains("version 2"), "{error}");
}

/// Flips bits all over the catalog: either it opens, with everything right, or the copy is used, or it is refused. Nothing panics.
#[test]
fn a_damaged_catalog_is_found() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    for index in 0..50 {
        put(&pool, &format!("file {index}"), &noise(index, 3000));
    }
    pool.close().unwrap();
    let file = path.join("catalog.redb");
    let copy = path.join("catalog.bak");
    let good = std::fs::read(&file).unwrap();
    let good_copy = std::fs::read(&copy).unwrap();
    let (mut whole, mut restored) = (0, 0);
    let step = good.len() / 60;
    for index in 0..60 {
        let at = index * step + (index * 37) % 512;
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&file, &bytes).unwrap();
        let pool = open(&path);
        assert_eq!(get(&pool, "file 7"), noise(7, 3000), "flip at {at}");
        assert_eq!(pool.readdir(ROOT, 0, 100).unwrap().len(), 50);
        pool.close().unwrap();
        let damaged = path.join("catalog.damaged");
        if damaged.exists() {
            std::fs::remove_file(&damaged).unwrap();
            restored += 1;
        } else {
            whole += 1;
        }
        std::fs::write(&copy, &good_copy).unwrap();
    }
    assert!(restored > 0, "{whole} flips hit nothing in use, {restored} made the copy be used");
    for len in [0, 1, 4096, good.len() / 2] {
        std::fs::write(&file, &good[..len]).unwrap();
        std::fs::write(&copy, &good_copy).unwrap();
        let pool = open(&path);
        assert_eq!(get(&pool, "file 9"), noise(9, 3000), "cut at {len}");
        pool.close().unwrap();
    }
    std::fs::write(&file, &good[..5000]).unwrap();
    std::fs::write(&copy, b"not a catalog").unwrap();
    let error = Pool::open(&path, &manual()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&copy, &good_copy).unwrap();
    open(&path).close().unwrap();
}

#[test]
fn what_the_copy_does_not_know_is_kept() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    put(&pool, "old", b"in the copy");
    pool.close().unwrap();
    let copy = std::fs::read(path.join("catalog.bak")).unwrap();
    let pool = open(&path);
    put(&pool, "new", b"only in the catalog");
    pool.close().unwrap();
    std::fs::write(path.join("catalog.bak"), copy).unwrap();
    std::fs::write(path.join("catalog.redb"), b"gone").unwrap();
    let pool = open(&path);
    assert_eq!(get(&pool, "old"), b"in the copy");
    assert_eq!(pool.lookup(ROOT, name("new")).unwrap_err().kind(), ErrorKind::NotFound);
    pool.close().unwrap();
    let lost = walk(&path.join("lost"));
    assert_eq!(lost.len(), 1);
    assert_eq!(std::fs::read(path.join("lost").join(&lost[0])).unwrap(), b"only in the catalog");
}

#[test]
fn names_are_checked() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let long = "n".repeat(256);
    for (bad, kind) in [
        ("", ErrorKind::InvalidName),
        (".", ErrorKind::InvalidName),
        ("..", ErrorKind::InvalidName),
        ("a/b", ErrorKind::InvalidName),
        ("a\0b", ErrorKind::InvalidName),
        (long.as_str(), ErrorKind::NameTooLong),
    ] {
        assert_eq!(pool.create(ROOT, name(bad), &region(0)).unwrap_err().kind(), kind, "{bad:?}");
    }
    let fine = ["new\nline", "\u{1f980}", "-rf", " ", &long[..255]];
    for good in fine {
        pool.create(ROOT, name(good), &region(0o600)).unwrap();
    }
    use std::os::unix::ffi::OsStrExt;
    pool.create(ROOT, OsStr::from_bytes(b"\xff\xfe"), &region(0o600)).unwrap();
    pool.close().unwrap();
    let pool = open(&path);
    for good in fine {
        pool.lookup(ROOT, name(good)).unwrap();
    }
    assert_eq!(pool.resolve(&"a/".repeat(3000)).unwrap_err().kind(), ErrorKind::NameTooLong);
    assert_eq!(pool.lookup(ROOT, name(&long)).unwrap_err().kind(), ErrorKind::NameTooLong);
    assert_eq!(pool.resolve("a/../b").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn read_only_writes_nothing() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", &noise(1, 50_000));
    pool.close().unwrap();
    let before: Vec<_> = walk(&path).into_iter().collect();
    let stamp = |file: &str| std::fs::metadata(path.join(file)).unwrap().modified().unwrap();
    let stamps = (stamp("catalog.redb"), stamp("catalog.bak"), stamp("superblock"));
    let pool = Pool::open(&path, &OpenOptions { read_only: true, ..manual() }).unwrap();
    let other = Pool::open(&path, &OpenOptions { read_only: true, ..manual() }).unwrap();
    assert_eq!(get(&pool, "a"), noise(1, 50_000));
    assert_eq!(get(&other, "a"), noise(1, 50_000));
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(pool.unlink(ROOT, name("a"))), ErrorKind::ReadOnly);
    assert_eq!(kind(pool.create(ROOT, name("b"), &region(0)).map(drop)), ErrorKind::ReadOnly);
    assert_eq!(
        kind(pool.setattr(attr.node, &SetAttr { mode: Some(0), ..SetAttr::default() }).map(drop)),
        ErrorKind::ReadOnly
    );
    assert_eq!(kind(pool.open_region(attr.node, Access::Write, false).map(drop)), ErrorKind::ReadOnly);
    assert_eq!(kind(pool.open_region(attr.node, Access::Read, true).map(drop)), ErrorKind::ReadOnly);
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    pool.sync().unwrap();
    assert_eq!(Pool::open(&path, &manual()).unwrap_err().kind(), ErrorKind::Busy);
    pool.close().unwrap();
    other.close().unwrap();
    assert_eq!(walk(&path), before);
    assert_eq!((stamp("catalog.redb"), stamp("catalog.bak"), stamp("superblock")), stamps);
}

#[test]
fn a_region_whose_file_is_gone_is_reported() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", &noise(1, 50_000));
    pool.close().unwrap();
    std::fs::remove_dir_all(path.join("regions")).unwrap();
    let pool = open(&path);
    let handle = pool.open_region(attr.node, Access::Read, false).unwrap();
    assert_eq!(handle.read_at(0, &mut [0; 10]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(pool.verify(None, &mut |_| {}).unwrap().bad_chunks, 1);
    drop(handle);
    pool.unlink(ROOT, name("a")).unwrap();
    pool.sync().unwrap();
}

fn three_members(dir: &Path) -> (std::path::PathBuf, Vec<std::path::PathBuf>) {
    let members: Vec<_> = (0..3).map(|index| dir.join(format!("m{index}"))).collect();
    let path = dir.join("pool");
    Pool::format(&path, &FormatOptions { members: members.clone(), ..FormatOptions::default() }).unwrap();
    (path, members)
}

#[test]
fn members_are_missed_and_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (path, members) = three_members(&dir.path().join("one"));
    let (_, others) = three_members(&dir.path().join("two"));
    for way_in in [&path, &members[2]] {
        let info = Pool::probe(way_in).unwrap();
        assert_eq!(info.members.len(), 3);
        assert_eq!(info.members[1].path.canonicalize().unwrap(), members[1].canonicalize().unwrap());
    }
    let aside = dir.path().join("aside");
    let kind = || Pool::open(&path, &manual()).unwrap_err();
    std::fs::rename(&members[1], &aside).unwrap();
    let error = kind();
    assert_eq!(error.kind(), ErrorKind::MissingMember);
    assert!(error.to_string().contains("m1"), "{error}");
    std::fs::create_dir(&members[1]).unwrap();
    assert_eq!(kind().kind(), ErrorKind::MissingMember);
    std::fs::remove_dir(&members[1]).unwrap();
    std::fs::rename(&others[1], &members[1]).unwrap();
    assert_eq!(kind().kind(), ErrorKind::WrongMember);
    std::fs::rename(&members[1], &others[1]).unwrap();
    std::fs::rename(&members[2], &members[1]).unwrap();
    std::fs::rename(&aside, &members[2]).unwrap();
    let error = kind();
    assert_eq!(error.kind(), ErrorKind::WrongMember);
    assert!(error.to_string().contains("swapped"), "{error}");
}

#[test]
fn an_image_with_flipped_superblock_is_read_from_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    Pool::format(&path, &FormatOptions { size: Some(64 << 20), raw: true, ..FormatOptions::default() })
        .unwrap();
    let pool = open(&path);
    put(&pool, "a", &noise(1, 100_000));
    pool.close().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 4096], 0).unwrap();
    let pool = open(&path);
    assert_eq!(get(&pool, "a"), noise(1, 100_000));
    pool.close().unwrap();
    file.write_all_at(&[9; 4096], (64 << 20) - 4096).unwrap();
    let pool = open(&path);
    assert_eq!(get(&pool, "a"), noise(1, 100_000));
    pool.close().unwrap();
    // And the catalog zone from its copy.
    file.write_all_at(&[9; 200_000], 1 << 20).unwrap();
    let pool = open(&path);
    assert_eq!(get(&pool, "a"), noise(1, 100_000));
}
