//! Leases: the bytes of a generation stay where they are until the lease goes, on every kind of pool.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::control::{Client, serve};
use engine::lease::{Lease, Source};
use engine::{Access, ErrorKind, FormatOptions, Pool, Session, SessionOptions, WriterOptions};

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn pools() -> Vec<(&'static str, tempfile::TempDir, PathBuf)> {
    let make = |kind| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool");
        let mut format = FormatOptions::default();
        match kind {
            "striped" => format.members = vec![dir.path().join("m0"), dir.path().join("m1")],
            "image" => (format.size, format.raw) = (Some(96 << 20), true),
            _ => {}
        }
        Pool::format(&path, &format).unwrap_or_else(|e| panic!("{kind}: {}", e.chain()));
        (kind, dir, path)
    };
    ["directory", "striped", "image"].into_iter().map(make).collect()
}

fn session(path: &Path) -> Session {
    Session::open(path, SessionOptions { ram_bytes: 16 << 20, ..SessionOptions::default() }).unwrap()
}

fn put(session: &Session, path: &str, bytes: &[u8]) {
    let mut writer = session.writer(path, None, WriterOptions::default()).unwrap();
    writer.write_all(bytes).unwrap();
    writer.commit().unwrap();
}

/// The leased bytes, read from where the lease says they are.
fn read(lease: &Lease) -> Vec<u8> {
    let range = lease.range();
    let mut bytes = vec![0; (range.end - range.start) as usize];
    for extent in lease.extents() {
        let at = (extent.logical - range.start) as usize;
        let len = (extent.len as usize).min(bytes.len() - at); // an extent is whole chunks, the region may end before
        let part = &mut bytes[at..at + len];
        match &extent.source {
            Source::File(file) => file.read_exact_at(part, extent.offset).unwrap(),
            Source::Device(device) => device.read_at(extent.offset, part).unwrap(),
        }
    }
    bytes
}

#[test]
fn leased_bytes_outlive_overwrites_and_removal() {
    for (kind, _dir, path) in pools() {
        let session = session(&path);
        let pool = session.pool().unwrap();
        let len = (5 << 20) + 777;
        let old = pattern(1, len);
        put(&session, "r", &old);
        let node = pool.resolve("r").unwrap().node;
        let lease = pool.lease(node, 0, u64::MAX).unwrap();
        assert_eq!((lease.range(), lease.size()), (0..len as u64, len as u64), "{kind}");
        assert!(read(&lease) == old, "{kind}");
        for (chunk, bytes) in old.chunks(lease.chunk_size() as usize).enumerate() {
            assert_eq!(lease.sum(chunk as u64), crc32fast::hash(bytes), "{kind}, chunk {chunk}");
        }
        let inside = pool.lease(node, 3_000_001, 1000).unwrap();
        assert!(read(&inside) == old[3_000_001..3_001_001], "{kind}");
        let beyond = pool.lease(node, len as u64 + 5, 10).unwrap();
        assert!(beyond.extents().is_empty() && read(&beyond).is_empty());

        // Ten times the region: extents that were given back would be taken again. A region of its own name, and the same one.
        for seed in 2..7 {
            put(&session, "r", &pattern(seed, len));
            put(&session, &format!("other{seed}"), &pattern(seed + 100, len));
            pool.sync().unwrap();
        }
        assert!(read(&lease) == old && read(&inside) == old[3_000_001..3_001_001], "{kind}: overwritten");
        session.remove("r", false).unwrap();
        pool.sync().unwrap();
        put(&session, "another", &pattern(9, len));
        pool.sync().unwrap();
        assert!(read(&lease) == old, "{kind}: removed and used again");
        let held = pool.stat().used_bytes;
        drop((lease, inside, beyond));
        pool.sync().unwrap();
        pool.sync().unwrap();
        if kind != "directory" {
            assert!(pool.stat().used_bytes < held, "{kind}: the space did not come back");
        }
        assert!(session.verify("", &mut |_| ()).unwrap().is_clean());
        session.close().unwrap();
    }
}

#[test]
fn what_is_being_written_is_not_leased() {
    for (kind, _dir, path) in pools() {
        let session = session(&path);
        let pool = session.pool().unwrap();
        put(&session, "r", b"committed");
        let node = pool.resolve("r").unwrap().node;
        let writer = pool.open_region(node, Access::Write, false).unwrap();
        writer.write_at(0, b"draft").unwrap();
        assert_eq!(pool.lease(node, 0, 9).unwrap_err().kind(), ErrorKind::Busy, "{kind}");
        drop(writer);
        assert_eq!(read(&pool.lease(node, 0, 9).unwrap()), b"drafttted");
        put(&session, "empty", b"");
        let node = pool.resolve("empty").unwrap().node;
        assert!(pool.lease(node, 0, u64::MAX).unwrap().extents().is_empty());
        assert_eq!(pool.lease(1, 0, 1).unwrap_err().kind(), ErrorKind::IsDirectory);
        assert_eq!(pool.lease(999_999, 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
fn a_client_checks_what_it_reads_from_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let owner = session(&path);
    let pool = owner.pool().unwrap();
    let _server = serve(pool.clone()).unwrap();
    let bytes = pattern(3, (2 << 20) + 100);
    put(&owner, "r", &bytes);
    let reader = Client::connect(&path).unwrap().reader("r").unwrap();
    assert!(reader.file().is_some());
    let mut back = vec![0; bytes.len()];
    // Any offset and length gives the same as memory does.
    for (offset, len) in [
        (0, bytes.len()),
        (1, 5),
        (16_000, 1000),
        (16_383, 2),
        (16_384, 16_384),
        (5, 2 << 20),
        (2 << 20, 100),
    ] {
        assert_eq!(reader.read_at(offset as u64, &mut back[..len]).unwrap(), len);
        assert!(back[..len] == bytes[offset..offset + len], "{len} bytes at {offset}");
    }

    // A bit of the region's only file flips.
    let node = pool.resolve("r").unwrap().node;
    let lease = pool.lease(node, 0, u64::MAX).unwrap();
    let mut bit = [0];
    lease.file().unwrap().read_exact_at(&mut bit, 100_000).unwrap();
    lease.file().unwrap().write_all_at(&[bit[0] ^ 4], 100_000).unwrap();
    let error = reader.read_at(99_999, &mut back[..3]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
    assert_eq!(reader.read_at(0, &mut back[..50_000]).unwrap(), 50_000);
    assert!(back[..50_000] == bytes[..50_000]);
}

#[test]
fn a_reader_does_not_make_writers_write_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let owner = session(&path);
    let pool = owner.pool().unwrap();
    let _server = serve(pool.clone()).unwrap();
    let old = pattern(4, 100_000);
    put(&owner, "r", &old);
    let client = Client::connect(&path).unwrap();
    let reader = client.reader("r").unwrap();
    let writer = pool.open_region(pool.resolve("r").unwrap().node, Access::Write, false).unwrap();
    writer.write_at(50_000, b"new").unwrap();
    drop(writer);
    let mut back = vec![0; old.len()];
    reader.read_at(0, &mut back).unwrap();
    assert!(back == old, "the leased generation changed");
    client.reader("r").unwrap().read_at(50_000, &mut back[..3]).unwrap();
    assert_eq!(&back[..3], b"new");
}

/// What the RAM tier has of a region is lent verified and in order, costs no read, and is not evicted while it is held.
#[test]
fn resident_bytes_are_lent_and_stay() {
    for (kind, _dir, path) in pools() {
        let session = session(&path);
        let pool = session.pool().unwrap();
        let len = (3 << 20) + 777;
        let bytes = pattern(3, len);
        put(&session, "r", &bytes);
        let lease = pool.lease(pool.resolve("r").unwrap().node, 0, u64::MAX).unwrap();
        let reader = session.reader("r").unwrap();
        if kind == "directory" {
            reader.read_exact_at(0, &mut vec![0; len]).unwrap();
            assert!(lease.ram_arena().is_none() && lease.resident(0..u64::MAX).is_empty());
            continue;
        }
        assert!(pool.ram_arena().is_some() && lease.ram_arena().is_some());
        // A part in the middle, and the end.
        for range in [(1 << 20) + 5..(1 << 20) + 40_000, len - 10..len] {
            reader.read_exact_at(range.start as u64, &mut vec![0; range.len()]).unwrap();
        }
        let hits = pool.stat().ram.hits;
        let resident = lease.resident(0..u64::MAX);
        assert!(pool.stat().ram.hits > hits, "{kind}: being lent is being asked for");
        let covered = |offset: u64| {
            resident.iter().any(|r| r.logical <= offset && offset < r.logical + r.bytes.len() as u64)
        };
        assert!(covered((1 << 20) + 5) && covered(len as u64 - 1) && !covered(5), "{kind}");
        let mut end = 0;
        for part in &resident {
            assert!(part.logical >= end, "{kind}: out of order");
            end = part.logical + part.bytes.len() as u64;
            assert!(end <= len as u64, "{kind}: behind the end");
            assert!(part.page.is_in(pool.ram_arena().unwrap()));
            let at = part.logical as usize;
            assert!(part.page.bytes()[part.bytes.clone()] == bytes[at..at + part.bytes.len()], "{kind}");
        }
        // Cut where it was asked to be.
        let cut = lease.resident((1 << 20) + 6..(1 << 20) + 100);
        assert_eq!((cut.len(), cut[0].logical, cut[0].bytes.len()), (1, (1 << 20) + 6, 94), "{kind}");
        assert!(lease.resident(7..7).is_empty() && lease.resident(u64::MAX - 1..u64::MAX).is_empty());
        drop(cut);
        // Twice the tier goes through it: what is held stays what it was.
        for i in 0..4 {
            put(&session, &format!("other{i}"), &pattern(40 + i, 8 << 20));
            session.reader(&format!("other{i}")).unwrap().read_exact_at(0, &mut vec![0; 8 << 20]).unwrap();
        }
        for part in &resident {
            let at = part.logical as usize;
            assert!(
                part.page.bytes()[part.bytes.clone()] == bytes[at..at + part.bytes.len()],
                "{kind}: evicted"
            );
        }
        drop((resident, lease, reader));
        session.close().unwrap();
    }
}
