//! What handles read and write, and what of it is committed when.

use super::*;

#[test]
fn small_and_large_content_is_sealed_at_the_last_close() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    for (index, len) in [0usize, 1, 4095, 16_384, 16_385, 5 << 20, 40 << 20].into_iter().enumerate() {
        let at = format!("f{index}");
        let bytes = noise(len as u64, len);
        let attr = put(&pool, &at, &bytes);
        assert_eq!(attr.size, len as u64);
        assert!(attr.generation > 0);
        assert_eq!(get(&pool, &at), bytes);
    }
    assert_eq!(pool.stat().unsealed_regions, 0);
    pool.close().unwrap();
    let pool = open(&path);
    assert_eq!(get(&pool, "f6"), noise(40 << 20, 40 << 20));
    let report = pool.verify(None, &mut |_| {}).unwrap();
    assert!(report.is_clean());
    assert_eq!(report.regions, 7);
    let lens = [0u64, 1, 4095, 16_384, 16_385, 5 << 20, 40 << 20];
    assert_eq!(report.chunks, lens.iter().map(|len| len.div_ceil(16 << 10)).sum::<u64>());
}

#[test]
fn all_handles_see_one_content() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", &noise(1, 100_000));
    let reader = pool.open_region(attr.node, Access::Read, false).unwrap();
    let mut bytes = vec![0; 10];
    reader.read_at(0, &mut bytes).unwrap();
    let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    writer.write_at(3, b"xyz").unwrap();
    reader.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes[3..6], b"xyz");
    writer.set_len(50_000).unwrap();
    assert_eq!((reader.size(), pool.getattr(attr.node).unwrap().size), (50_000, 50_000));
    assert_eq!(reader.write_at(0, b"no").unwrap_err().kind(), ErrorKind::PermissionDenied);
    drop(writer);
    assert_eq!(reader.size(), 50_000);
    let now = pool.getattr(attr.node).unwrap();
    assert!(now.generation > attr.generation);
}

#[test]
fn a_backing_file_stays_the_same_while_it_is_handed_out() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", &noise(1, 100_000));
    pool.sync().unwrap();
    let reader = pool.open_region(attr.node, Access::Read, false).unwrap();
    let file = reader.backing().unwrap();
    let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    let same = writer.backing().unwrap();
    assert_eq!(file.metadata().unwrap().ino(), same.metadata().unwrap().ino());
    assert_eq!(pool.stat().unsealed_regions, 1);
    // As the kernel would, through the descriptor that it was given first.
    file.write_all_at(b"direct", 100_000).unwrap();
    assert_eq!(pool.getattr(attr.node).unwrap().size, 100_006);
    drop(writer);
    assert_eq!(file.metadata().unwrap().ino(), reader.backing().unwrap().metadata().unwrap().ino());
    drop(reader);
    let mut wanted = noise(1, 100_000);
    wanted.extend_from_slice(b"direct");
    assert_eq!(get(&pool, "a"), wanted);
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    // Nobody has it open: a writer gets a copy, so that the committed content stays until the commit.
    let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    assert_ne!(file.metadata().unwrap().ino(), writer.backing().unwrap().metadata().unwrap().ino());
}

#[test]
fn a_backing_file_that_is_emptied_goes_on_being_it() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", &noise(1, 10_000));
    let reader = pool.open_region(attr.node, Access::Read, false).unwrap();
    let file = reader.backing().unwrap();
    drop(pool.open_region(attr.node, Access::Write, true).unwrap());
    assert_eq!(pool.getattr(attr.node).unwrap().size, 0);
    let writer = pool.open_region(attr.node, Access::Write, false).unwrap();
    let same = writer.backing().unwrap();
    assert_eq!(file.metadata().unwrap().ino(), same.metadata().unwrap().ino());
    same.write_all_at(b"new", 0).unwrap();
    drop((writer, reader, same));
    assert_eq!(get(&pool, "a"), b"new");
    pool.sync().unwrap();
    assert_eq!(files_in(&path).len(), 1);
    // And an empty one leaves nothing.
    drop(pool.open_region(attr.node, Access::Write, true).unwrap());
    pool.sync().unwrap();
    assert_eq!(files_in(&path).len(), 0);
}

#[test]
fn times_follow_the_content() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let long_ago = crate::Timestamp { secs: 1_000_000, nanos: 5 };
    let attr = put(&pool, "a", b"12345");
    pool.setattr(attr.node, &SetAttr { mtime: Some(long_ago), ..SetAttr::default() }).unwrap();
    let handle = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    assert_eq!(pool.getattr(attr.node).unwrap().mtime, long_ago, "opening is no change");
    drop(handle);
    assert_eq!(pool.getattr(attr.node).unwrap().mtime, long_ago);
    let handle = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    handle.write_at(0, b"x").unwrap();
    assert!(pool.getattr(attr.node).unwrap().mtime > long_ago);
    pool.setattr(attr.node, &SetAttr { mtime: Some(long_ago), ..SetAttr::default() }).unwrap();
    assert_eq!(pool.getattr(attr.node).unwrap().mtime, long_ago, "as cp -p sets it before close");
    drop(handle);
    assert_eq!(pool.getattr(attr.node).unwrap().mtime, long_ago);
    pool.setattr(attr.node, &SetAttr { size: Some(5), ..SetAttr::default() }).unwrap();
    assert!(pool.getattr(attr.node).unwrap().mtime > long_ago, "truncating to the same size is a change");
}

#[test]
fn truncation_without_a_handle() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "a", &noise(3, 70_000));
    for size in [50_000u64, 90_000, 0, 12] {
        let attr = pool.setattr(attr.node, &SetAttr { size: Some(size), ..SetAttr::default() }).unwrap();
        assert_eq!(attr.size, size);
        let bytes = get(&pool, "a");
        let kept = if size >= 90_000 { 50_000 } else { size as usize };
        match size {
            50_000 => assert_eq!(bytes, noise(3, 70_000)[..50_000]),
            90_000 => assert!(
                bytes[..kept] == noise(3, 70_000)[..kept] && bytes[kept..].iter().all(|byte| *byte == 0)
            ),
            _ => assert!(bytes.iter().all(|byte| *byte == 0)),
        }
    }
    assert_eq!(pool.stat().unsealed_regions, 0);
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
}

#[test]
fn holes_and_reserves() {
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = pool.create(ROOT, name("a"), &region(0o644)).unwrap();
    let handle = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    handle.write_at(64 << 20, b"end").unwrap();
    handle.allocate(0, 1 << 20, Allocate::Reserve { keep_size: false }).unwrap();
    handle.write_at(4096, &noise(1, 8192)).unwrap();
    handle.allocate(4096, 4096, Allocate::PunchHole).unwrap();
    assert!(handle.seek(0, Seek::Hole).is_ok());
    assert_eq!(handle.seek(65 << 20, Seek::Data).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(handle.allocate(0, 0, Allocate::PunchHole).unwrap_err().kind(), ErrorKind::InvalidArgument);
    drop(handle);
    let attr = pool.getattr(attr.node).unwrap();
    assert_eq!(attr.size, (64 << 20) + 3);
    assert!(attr.allocated < 8 << 20, "{} bytes for a sparse file", attr.allocated);
    let bytes = get(&pool, "a");
    assert!(bytes[4096..8192].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[8192..12288], noise(1, 8192)[4096..]);
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
}

#[test]
fn changed_bytes_are_found_and_never_handed_out() {
    use std::os::unix::fs::FileExt;
    let (_dir, path) = formatted();
    let pool = open(&path);
    let attr = put(&pool, "dir ectory\nfile", &noise(5, 200_000));
    pool.sync().unwrap();
    let [file] = files_in(&path).try_into().unwrap();
    let file = path
        .join("regions")
        .join(format!("{:02x}", (u64::from_str_radix(&file, 16).unwrap() >> 8) & 0xff))
        .join(file);
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(b"?", 100_000).unwrap();
    let report = pool.verify(None, &mut |_| {}).unwrap();
    assert_eq!((report.bad_chunks, report.bad[0].chunk, report.bad[0].node), (1, 6, attr.node));
    let handle = pool.open_region(attr.node, Access::Read, false).unwrap();
    let mut bytes = vec![1; 4096];
    let error = handle.read_at(99_000, &mut bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("chunk 6"), "{error}");
    assert_eq!(handle.read_at(0, &mut bytes).unwrap(), 4096, "the other chunks are fine");
    assert!(pool.stat().corrupt_chunks >= 2);
}

#[test]
fn a_quota_is_kept_and_space_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    Pool::format(&path, &FormatOptions { size: Some(8 << 20), ..FormatOptions::default() }).unwrap();
    let pool = open(&path);
    let stat = pool.stat();
    assert_eq!((stat.capacity_bytes, stat.free_bytes), (8 << 20, 8 << 20));
    put(&pool, "old", &noise(1, 3 << 20));
    let attr = pool.create(ROOT, name("new"), &region(0o644)).unwrap();
    let handle = pool.open_region(attr.node, Access::Write, false).unwrap();
    assert!(handle.backing().is_none(), "nobody could keep a quota that the kernel writes past");
    let piece = noise(2, 1 << 20);
    let mut written = 0;
    let error = loop {
        match handle.write_at(written, &piece) {
            Ok(len) => written += len as u64,
            Err(error) => break error,
        }
        assert!(written < 16 << 20);
    };
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!((4 << 20..=5 << 20).contains(&written), "{written}");
    assert!(pool.stat().free_bytes < 1 << 20);
    drop(handle);
    pool.unlink(ROOT, name("new")).unwrap();
    pool.sync().unwrap();
    assert_eq!(pool.stat().free_bytes, 5 << 20);
    assert_eq!(get(&pool, "old"), noise(1, 3 << 20));
    // A sparse file is not charged for its holes.
    let attr = pool.create(ROOT, name("sparse"), &region(0o644)).unwrap();
    let handle = pool.open_region(attr.node, Access::Write, false).unwrap();
    handle.write_at(1 << 30, b"x").unwrap();
    handle.set_len(1 << 31).unwrap();
    drop(handle);
    assert!(pool.stat().free_bytes > 4 << 20);
    // Space that only waits for a snapshot is found when it is needed.
    let attr = pool.create(ROOT, name("big"), &region(0o644)).unwrap();
    let handle = pool.open_region(attr.node, Access::Write, false).unwrap();
    pool.sync().unwrap();
    pool.unlink(ROOT, name("old")).unwrap();
    handle.write_at(0, &noise(4, 7 << 20)).unwrap();
    drop(handle);
    pool.close().unwrap();
    let pool = open(&path);
    assert_eq!(get(&pool, "big"), noise(4, 7 << 20));
    assert!(pool.stat().free_bytes < 1 << 20);
}

#[test]
fn large_regions_without_reflinks_are_written_in_place() {
    let (_dir, path) = formatted();
    let pool = Pool::open(&path, &OpenOptions { copy_limit_bytes: 1 << 20, ..manual() }).unwrap();
    let attr = put(&pool, "a", &noise(1, 2 << 20));
    pool.sync().unwrap();
    let before = files_in(&path);
    let writer = pool.open_region(attr.node, Access::ReadWrite, false).unwrap();
    writer.write_at(7, b"inside").unwrap();
    drop(writer);
    let mut wanted = noise(1, 2 << 20);
    wanted[7..13].copy_from_slice(b"inside");
    assert_eq!(get(&pool, "a"), wanted);
    pool.sync().unwrap();
    if pool.inner.shared.files().unwrap().has_reflinks() {
        eprintln!("skipped: {} has reflinks", path.display());
    } else {
        assert_eq!(files_in(&path), before);
    }
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
}
