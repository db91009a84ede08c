//! Pools whose regions are extents: one raw image, several, directories, and a mix, through the public API.
#![allow(missing_docs)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::{
    Access, Allocate, ErrorKind, FormatOptions, Handle, NewNode, NodeId, NodeKind, OpenOptions, Pool, ROOT,
    RenameFlags, Seek, Verify,
};

const MIB: u64 = 1 << 20;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    OneImage,
    ThreeImages,
    TwoDirectories,
    Mixed,
}

const SHAPES: [Shape; 4] = [Shape::OneImage, Shape::ThreeImages, Shape::TwoDirectories, Shape::Mixed];

struct Place {
    _folder: tempfile::TempDir,
    path: PathBuf,
    members: Vec<PathBuf>,
    quota: bool,
}

/// Formats a pool of this shape with about `mib` MiB a member.
fn format(shape: Shape, mib: u64) -> Place {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_path_buf();
    let image = |name: &str| {
        let path = root.join(name);
        fs::File::create(&path).unwrap().set_len(mib * MIB).unwrap();
        path
    };
    let directory = |name: &str| root.join(name);
    let (path, members, size) = match shape {
        Shape::OneImage => (root.join("pool.img"), Vec::new(), Some(mib * MIB)),
        Shape::ThreeImages => (root.join("pool"), vec![image("a"), image("b"), image("c")], None),
        Shape::TwoDirectories => {
            (root.join("pool"), vec![directory("a"), directory("b")], Some(2 * mib * MIB))
        }
        Shape::Mixed => (root.join("pool"), vec![directory("a"), image("b")], None),
    };
    let options = FormatOptions {
        size,
        members: members.clone(),
        stripe_unit: 256 << 10,
        raw: shape == Shape::OneImage,
        ..FormatOptions::default()
    };
    Pool::format(&path, &options).unwrap();
    let members = if members.is_empty() { vec![path.clone()] } else { members };
    let quota = shape != Shape::Mixed;
    Place { _folder: folder, path, members, quota }
}

fn options() -> OpenOptions {
    OpenOptions { ram_bytes: 4 * MIB, commit_interval_ms: 0, ..OpenOptions::default() }
}

fn open(place: &Place) -> Pool {
    Pool::open(&place.path, &options()).unwrap()
}

fn create(pool: &Pool, name: &str) -> NodeId {
    let new = NewNode { kind: NodeKind::Region, mode: 0o644, uid: 0, gid: 0, rdev: 0, target: None };
    pool.create(ROOT, OsStr::new(name), &new).unwrap().node
}

fn write(pool: &Pool, name: &str, data: &[u8]) -> NodeId {
    let node = create(pool, name);
    let handle = pool.open_region(node, Access::Write, false).unwrap();
    write_all(&handle, 0, data);
    node
}

fn write_all(handle: &Handle, offset: u64, data: &[u8]) {
    let mut done = 0;
    while done < data.len() {
        done += handle.write_at(offset + done as u64, &data[done..]).unwrap();
    }
}

fn read(pool: &Pool, node: NodeId) -> Vec<u8> {
    let handle = pool.open_region(node, Access::Read, false).unwrap();
    let mut bytes = vec![0xee; handle.size() as usize + 3];
    let n = handle.read_at(0, &mut bytes).unwrap();
    bytes.truncate(n);
    bytes
}

fn free(pool: &Pool) -> u64 {
    pool.sync().unwrap();
    pool.sync().unwrap();
    pool.stat().free_bytes
}

#[test]
fn regions_come_back_after_reopening() {
    for shape in SHAPES {
        let place = format(shape, 64);
        let mut random = Random(shape as u64 + 77);
        let data: Vec<Vec<u8>> = [0, 1, 16_384, 16_385, 3_000_001].map(|len| random.bytes(len)).into();
        let pool = open(&place);
        assert!(!pool.info().members.is_empty());
        for (index, bytes) in data.iter().enumerate() {
            let node = write(&pool, &index.to_string(), bytes);
            assert!(read(&pool, node) == *bytes, "{shape:?}: {index} before the reopening");
        }
        pool.close().unwrap();
        let pool = open(&place);
        for (index, bytes) in data.iter().enumerate() {
            let attr = pool.lookup(ROOT, OsStr::new(&index.to_string())).unwrap();
            assert_eq!(attr.size, bytes.len() as u64);
            assert!(read(&pool, attr.node) == *bytes, "{shape:?}: {index} after it");
        }
        let report = pool.verify(None, &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{shape:?}: {report:?}");
        assert_eq!(report.bytes, data.iter().map(|bytes| bytes.len() as u64).sum::<u64>());
        pool.close().unwrap();
    }
}

#[test]
fn no_file_backs_a_region_of_extents() {
    for shape in SHAPES {
        let place = format(shape, 64);
        let pool = open(&place);
        let node = write(&pool, "x", &[1; 5000]);
        assert!(pool.open_region(node, Access::Read, false).unwrap().backing().is_none(), "{shape:?}");
    }
}

#[test]
fn one_changed_byte_on_a_member_is_found_and_named() {
    for shape in [Shape::OneImage, Shape::ThreeImages] {
        let place = format(shape, 64);
        let pool = open(&place);
        let mut random = Random(5);
        let data = random.bytes(2_000_000);
        let node = write(&pool, "model", &data);
        pool.close().unwrap();
        // The bytes are looked for on the members: nothing of the layout is known here.
        let needle = &data[1_000_000..1_000_064];
        let mut damaged = 0;
        for member in &place.members {
            let bytes = fs::read(member).unwrap();
            if let Some(at) = bytes.windows(64).position(|window| window == needle) {
                let file = fs::OpenOptions::new().write(true).open(member).unwrap();
                file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
                damaged += 1;
            }
        }
        assert_eq!(damaged, 1, "{shape:?}");
        let pool = open(&place);
        let handle = pool.open_region(node, Access::Read, false).unwrap();
        let error = handle.read_at(1_000_000, &mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.chain().contains("chunk 61"), "{}", error.chain());
        let mut rest = vec![0; 900_000];
        assert_eq!(handle.read_at(0, &mut rest).unwrap(), 900_000);
        assert!(rest == data[..900_000]);
        let report = pool.verify(None, &mut |_| {}).unwrap();
        assert_eq!((report.bad_chunks, report.bad.len()), (1, 1), "{report:?}");
        assert_eq!((report.bad[0].chunk, report.bad[0].path.as_str()), (61, "model"));
    }
}

#[test]
fn a_full_pool_keeps_the_old_content_and_gets_all_space_back() {
    for shape in [Shape::OneImage, Shape::ThreeImages, Shape::TwoDirectories] {
        let place = format(shape, 40);
        let pool = open(&place);
        let mut random = Random(9);
        let old = random.bytes(5_000_000);
        let node = write(&pool, "kept", &old);
        let before = free(&pool);
        assert!(before > 8 * MIB);
        let block = random.bytes(MIB as usize);
        // A new region that does not fit.
        let big = create(&pool, "big");
        let handle = pool.open_region(big, Access::Write, false).unwrap();
        let mut written = 0;
        let error = loop {
            match handle.write_at(written, &block) {
                Ok(n) => written += n as u64,
                Err(error) => break error,
            }
            assert!(written < 1 << 30);
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{shape:?}: {}", error.chain());
        assert!(written >= before - MIB, "{shape:?}: {written} of {before} bytes were used");
        // An overwrite that does not fit either: the old content must survive it.
        let over = pool.open_region(node, Access::ReadWrite, false).unwrap();
        let mut at = 0;
        let refused = loop {
            match over.write_at(at, &block) {
                Ok(n) => at += n as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::NoSpace, "{shape:?}");
        drop(handle);
        drop(over);
        pool.unlink(ROOT, OsStr::new("big")).unwrap();
        let mut want = old.clone();
        let at = at as usize;
        for start in (0..at.min(old.len())).step_by(block.len()) {
            let n = (at - start).min(block.len());
            want[start..(start + n).min(old.len())].copy_from_slice(&block[..n.min(old.len() - start)]);
        }
        assert!(
            read(&pool, node) == want,
            "{shape:?}: what was written before the refusal, and the rest as it was"
        );
        assert_eq!(free(&pool), before, "{shape:?}: every byte came back");
        pool.unlink(ROOT, OsStr::new("kept")).unwrap();
        let empty = free(&pool);
        assert_eq!(empty, before + 306 * 16_384, "{shape:?}: 5,000,000 bytes are 306 chunks");
        pool.close().unwrap();
        assert_eq!(free(&open(&place)), empty, "{shape:?}: also after reopening");
        assert!(place.quota);
    }
}

#[test]
fn removed_and_rewritten_space_can_be_used_at_once() {
    for shape in [Shape::OneImage, Shape::TwoDirectories] {
        let place = format(shape, 40);
        let pool = open(&place);
        let total = free(&pool);
        let data = Random(3).bytes(total as usize / 2);
        // Each round needs the space of the round before, which no commit has freed yet.
        for round in 0..4 {
            write(&pool, "big", &data);
            pool.unlink(ROOT, OsStr::new("big")).unwrap();
            let node = write(&pool, "other", &data);
            assert!(read(&pool, node) == data, "{shape:?} round {round}");
            pool.unlink(ROOT, OsStr::new("other")).unwrap();
        }
        assert_eq!(free(&pool), total, "{shape:?}");
    }
}

/// What a crash leaves: the files of the members as they are now.
fn crash(place: &Place, pool: Pool) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("pool.img");
    fs::copy(&place.path, &copy).unwrap();
    pool.close().unwrap();
    (folder, copy)
}

#[test]
fn after_a_crash_the_last_snapshot_is_there_whole() {
    let place = format(Shape::OneImage, 64);
    let pool = open(&place);
    let mut random = Random(21);
    let old = random.bytes(1_500_000);
    let node = write(&pool, "a", &old);
    let total = free(&pool);
    // Written and closed, but in no snapshot; and one that is still being written.
    let new = random.bytes(1_500_000);
    let handle = pool.open_region(node, Access::Write, true).unwrap();
    write_all(&handle, 0, &new);
    drop(handle);
    let other = create(&pool, "b");
    let open_still = pool.open_region(other, Access::Write, false).unwrap();
    write_all(&open_still, 0, &new);
    assert!(read(&pool, node) == new);
    drop(open_still);
    let (_folder, copy) = crash(&place, pool);
    let pool = Pool::open(&copy, &options()).unwrap();
    assert!(read(&pool, node) == old, "the snapshot's content, not a mix");
    assert_eq!(pool.lookup(ROOT, OsStr::new("b")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(free(&pool), total, "space of what was lost is free");
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
}

#[test]
fn fsync_survives_a_crash() {
    let place = format(Shape::OneImage, 64);
    let pool = open(&place);
    let data = Random(22).bytes(700_001);
    let node = create(&pool, "a");
    let handle = pool.open_region(node, Access::ReadWrite, false).unwrap();
    write_all(&handle, 0, &data);
    handle.sync().unwrap();
    write_all(&handle, 100, &[0xaa; 400_000]);
    handle.sync().unwrap();
    write_all(&handle, 0, &[0xbb; 100]);
    let (_folder, copy) = crash(&place, pool.clone());
    drop(handle);
    let pool = Pool::open(&copy, &options()).unwrap();
    let mut want = data;
    want[100..400_100].fill(0xaa);
    assert!(read(&pool, node) == want);
}

#[test]
fn an_unlinked_region_lives_until_it_is_closed() {
    for shape in SHAPES {
        let place = format(shape, 64);
        let pool = open(&place);
        let before = free(&pool);
        let data = Random(8).bytes(900_000);
        let node = write(&pool, "gone", &data);
        let reader = pool.open_region(node, Access::Read, false).unwrap();
        let writer = pool.open_region(node, Access::ReadWrite, false).unwrap();
        pool.unlink(ROOT, OsStr::new("gone")).unwrap();
        pool.sync().unwrap();
        write_all(&writer, 10, b"still");
        let mut buf = vec![0; data.len()];
        assert_eq!(reader.read_at(0, &mut buf).unwrap(), data.len());
        assert!(buf[10..15] == *b"still" && buf[15..] == data[15..]);
        drop(reader);
        drop(writer);
        if place.quota {
            assert_eq!(free(&pool), before, "{shape:?}");
        }
        pool.close().unwrap();
    }
}

#[test]
fn a_reader_sees_whole_generations_while_writers_replace_them() {
    let place = format(Shape::ThreeImages, 64);
    let pool = open(&place);
    let len = 1_000_000;
    let node = write(&pool, "x", &vec![1; len]);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            // Opened anew each time, and committed all the time: no chunk may fail its sum, no bytes of others may show.
            for _ in 0..60 {
                let bytes = read(&pool, node);
                assert!(bytes.iter().all(|byte| (1..=20).contains(byte)));
            }
        });
        let noise = scope.spawn(|| {
            for round in 0..20 {
                let other = write(&pool, "noise", &vec![0xf0; len]);
                pool.unlink(ROOT, OsStr::new("noise")).unwrap();
                pool.sync().unwrap();
                let _ = (other, round);
            }
        });
        for round in 2..=20u8 {
            let handle = pool.open_region(node, Access::Write, false).unwrap();
            write_all(&handle, 0, &vec![round; len]);
            drop(handle);
            pool.sync().unwrap();
        }
        reader.join().unwrap();
        noise.join().unwrap();
    });
    assert!(read(&pool, node) == vec![20; len]);
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
}

/// Seeds from `first` on: as many as the test says, or `NVTIER_TEST_SEEDS`.
fn seeds(first: u64, count: u64) -> std::ops::Range<u64> {
    let more = std::env::var("NVTIER_TEST_SEEDS").ok().and_then(|text| text.parse().ok());
    first..first + more.unwrap_or(count)
}

/// Files of random operations against vectors, with closing, renaming, syncing and reopening.
fn model(shape: Shape, seed: u64, steps: usize) {
    println!("{shape:?}, seed {seed}");
    let place = format(shape, 96);
    let mut random = Random(seed | 1);
    let mut pool = open(&place);
    let before = free(&pool);
    let max = 1_500_000;
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut held: Option<(usize, Handle)> = None;
    for step in 0..steps {
        let note = || format!("{shape:?}, seed {seed}, step {step}");
        if files.is_empty() || (files.len() < 6 && random.below(20) == 0) {
            let name = format!("f{step}");
            create(&pool, &name);
            files.push((name, Vec::new()));
        }
        let which = random.below(files.len() as u64) as usize;
        let node = pool.lookup(ROOT, OsStr::new(&files[which].0)).unwrap().node;
        let at = random.below(max);
        let len = if random.below(3) == 0 {
            random.below(max - at) + 1
        } else {
            (random.below(50_000) + 1).min(max - at)
        };
        let end = (at + len) as usize;
        let kind = random.below(16);
        if kind < 9 {
            let other = held.as_ref().filter(|(index, _)| *index == which).map(|(_, handle)| handle.clone());
            let handle = other.unwrap_or_else(|| pool.open_region(node, Access::ReadWrite, false).unwrap());
            let now = &mut files[which].1;
            match kind {
                0..=3 => {
                    let data = random.bytes(len as usize);
                    write_all(&handle, at, &data);
                    if now.len() < end {
                        now.resize(end, 0);
                    }
                    now[at as usize..end].copy_from_slice(&data);
                }
                4 => {
                    handle.set_len(at).unwrap();
                    now.resize(at as usize, 0);
                }
                5 => {
                    handle.allocate(at, len, Allocate::PunchHole).unwrap();
                    let size = now.len();
                    now[size.min(at as usize)..size.min(end)].fill(0);
                }
                6 => {
                    handle.allocate(at, len, Allocate::ZeroRange { keep_size: false }).unwrap();
                    if now.len() < end {
                        now.resize(end, 0);
                    }
                    now[at as usize..end].fill(0);
                }
                7 => handle.sync().unwrap(),
                _ => {
                    let data = handle.seek(0, Seek::Data).ok();
                    let first = now.iter().position(|byte| *byte != 0);
                    assert!(
                        data.is_none_or(|data| first.is_none_or(|first| data <= first as u64)),
                        "{}",
                        note()
                    );
                    assert!(first.is_none() || data.is_some(), "{}", note());
                }
            }
            assert_eq!(handle.size(), now.len() as u64, "{}", note());
            if random.below(3) == 0 {
                held = Some((which, handle));
            }
        } else {
            match kind {
                9 => held = None,
                10 => pool.sync().unwrap(),
                11 => {
                    held = None;
                    pool.close().unwrap();
                    pool = open(&place);
                }
                12 => {
                    let to = format!("r{step}");
                    pool.rename(
                        ROOT,
                        OsStr::new(&files[which].0),
                        ROOT,
                        OsStr::new(&to),
                        RenameFlags::default(),
                    )
                    .unwrap();
                    files[which].0 = to;
                }
                13 if files.len() > 1 => {
                    pool.unlink(ROOT, OsStr::new(&files[which].0)).unwrap();
                    files.remove(which);
                    held = None;
                }
                14 => {
                    let handle = pool.open_region(node, Access::Write, true).unwrap();
                    let data = random.bytes(len as usize);
                    write_all(&handle, 0, &data);
                    files[which].1 = data;
                }
                _ => assert!(read(&pool, node) == files[which].1, "{}", note()),
            }
        }
    }
    drop(held);
    for (name, bytes) in &files {
        let attr = pool.lookup(ROOT, OsStr::new(name)).unwrap();
        assert!(read(&pool, attr.node) == *bytes, "{shape:?}, seed {seed}: {name}");
    }
    let report = pool.verify(None, &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{shape:?}, seed {seed}: {report:?}");
    for (name, _) in &files {
        pool.unlink(ROOT, OsStr::new(name)).unwrap();
    }
    if place.quota {
        assert_eq!(free(&pool), before, "{shape:?}, seed {seed}: space");
    }
    pool.close().unwrap();
}

#[test]
fn one_image_agrees_with_vectors() {
    seeds(1, 4).for_each(|seed| model(Shape::OneImage, seed, 120));
}

#[test]
fn three_images_agree_with_vectors() {
    seeds(1001, 4).for_each(|seed| model(Shape::ThreeImages, seed, 120));
}

#[test]
fn two_directories_agree_with_vectors() {
    seeds(2001, 3).for_each(|seed| model(Shape::TwoDirectories, seed, 120));
}

#[test]
fn a_mix_agrees_with_vectors() {
    seeds(3001, 3).for_each(|seed| model(Shape::Mixed, seed, 120));
}

#[test]
fn pools_without_ram_or_without_verifying_on_passthrough_work_too() {
    let place = format(Shape::ThreeImages, 64);
    for verify in [Verify::Always, Verify::Scrub] {
        let pool = Pool::open(&place.path, &OpenOptions { ram_bytes: 0, verify, ..options() }).unwrap();
        let data = Random(1).bytes(3_333_333);
        let name = format!("{verify:?}");
        let node = write(&pool, &name, &data);
        assert!(read(&pool, node) == data);
        pool.close().unwrap();
    }
}

#[test]
fn a_read_only_pool_reads_and_refuses_the_rest() {
    for shape in SHAPES {
        let place = format(shape, 64);
        let pool = open(&place);
        let data = Random(1).bytes(1_000_000);
        let node = write(&pool, "x", &data);
        pool.close().unwrap();
        let before: Vec<_> = place.members.iter().map(|member| digest(member)).collect();
        let pool = Pool::open(&place.path, &OpenOptions { read_only: true, ..options() }).unwrap();
        assert!(read(&pool, node) == data, "{shape:?}");
        let refused = pool.open_region(node, Access::Write, false).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{shape:?}");
        pool.close().unwrap();
        let after: Vec<_> = place.members.iter().map(|member| digest(member)).collect();
        assert_eq!(after, before, "{shape:?}: not a byte changed");
    }
}

/// Sum of an image's bytes; names and sums of a directory's files.
fn digest(path: &Path) -> Vec<(PathBuf, u32)> {
    if path.is_file() {
        return vec![(path.to_path_buf(), crc32fast::hash(&fs::read(path).unwrap()))];
    }
    let mut list: Vec<_> =
        fs::read_dir(path).unwrap().flat_map(|entry| digest(&entry.unwrap().path())).collect();
    list.sort();
    list
}

#[test]
fn removed_content_leaves_the_ram_tier() {
    let place = format(Shape::OneImage, 64);
    let pool = open(&place);
    let node = write(&pool, "x", &vec![7; 2_000_000]);
    read(&pool, node);
    assert!(pool.stat().ram.used_bytes >= 2_000_000);
    pool.unlink(ROOT, OsStr::new("x")).unwrap();
    pool.sync().unwrap();
    pool.sync().unwrap();
    assert_eq!(pool.stat().ram.used_bytes, 0);
}
