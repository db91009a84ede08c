//! Loads from regions of pools: by extents, by the owner's file, through the owner; checksums before the copy.

mod common;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{contents, fake, load, small, two_files};
use engine::{FormatOptions, OpenOptions, Pool, Session, SessionOptions, WriterOptions};
use gpudirect::driver::fake::FakeOptions;
use gpudirect::{ErrorKind, Lane, LaneOptions, Plan, PlanOptions, Result, Source, Verify};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Directory,
    Raw,
    Striped,
}

const KINDS: [Kind; 3] = [Kind::Directory, Kind::Raw, Kind::Striped];

/// A pool with the two files of [`two_files`] as regions, and what is in them.
fn pool(kind: Kind, folder: &Path) -> (PathBuf, Vec<String>, HashMap<String, Vec<u8>>) {
    let path = folder.join("pool");
    let mut options = FormatOptions { stripe_unit: 128 << 10, ..FormatOptions::default() };
    match kind {
        Kind::Directory => {}
        Kind::Raw => (options.raw, options.size) = (true, Some(128 << 20)),
        Kind::Striped => options.members = vec![folder.join("a"), folder.join("b")],
    }
    Pool::format(&path, &options).unwrap();
    let (files, expected) = two_files(folder);
    let session = Session::open(&path, SessionOptions::default()).unwrap();
    let mut names = Vec::new();
    for file in files {
        let name = format!("models/{}", file.file_name().unwrap().to_str().unwrap());
        let bytes = std::fs::read(&file).unwrap();
        let mut writer = session.writer(&name, Some(bytes.len() as u64), WriterOptions::default()).unwrap();
        writer.write_all(&bytes).unwrap();
        writer.commit().unwrap();
        names.push(name);
    }
    session.close().unwrap();
    (path, names, expected)
}

fn plan(session: &Session, names: &[String], verify: Verify) -> Result<Plan> {
    let sources =
        names.iter().map(|name| Source::region(session, name, verify)).collect::<Result<Vec<_>>>()?;
    Plan::new(sources, &PlanOptions::default())
}

#[test]
fn regions_arrive_whole_from_every_kind_of_pool_owned_here_or_elsewhere() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let (path, names, expected) = pool(kind, folder.path());
        let serve = SessionOptions { serve: true, ram_bytes: 16 << 20, ..SessionOptions::default() };
        let owner = Session::open(&path, serve).unwrap();
        let client = Session::open(&path, SessionOptions::default()).unwrap();
        assert!(client.is_remote() && !owner.is_remote());
        for (who, session) in [("owner", &owner), ("client", &client)] {
            for verify in [Verify::Always, Verify::Never] {
                for chunk in [64 << 10, 1 << 20] {
                    let what = format!("{kind:?}, {who}, {verify:?}, chunk {chunk}");
                    let (device, driver) = fake(FakeOptions::default());
                    let options = LaneOptions { chunk, ring: 8 * chunk, ..small() };
                    let mut lane = Lane::new(driver, options).unwrap();
                    let plan = plan(session, &names, verify).unwrap();
                    let loaded = load(&mut lane, &plan).unwrap();
                    assert!(contents(&lane, &loaded) == expected, "{what}: other bytes");
                    // Regions that are no file are read through the owner by others, and checked there.
                    let through = who == "client" && kind != Kind::Directory;
                    let here = verify == Verify::Always && !through;
                    assert_eq!(loaded.report.verified_sources, if here { 2 } else { 0 }, "{what}");
                    assert_eq!(
                        loaded.report.notes.iter().any(|note| note.contains("owner")),
                        through,
                        "{what}"
                    );
                    drop((loaded, lane));
                    assert_eq!(device.leaks(), [""; 0], "{what}");
                }
            }
        }
        client.close().unwrap();
        owner.close().unwrap();
    }
}

/// cuFile's bytes never pass the host: a pool whose checksums are compared is not read by it, and the report says why.
#[test]
fn checksums_and_cufile_exclude_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let (path, names, _) = pool(Kind::Directory, folder.path());
    let session = Session::open(&path, SessionOptions::default()).unwrap();
    let (_, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, small()).unwrap();
    let checked = plan(&session, &names, Verify::Always).unwrap();
    let report = load(&mut lane, &checked).unwrap().report;
    assert_eq!(report.verified_sources, 2);
    assert_eq!(report.not_taken.len(), 3);
    for way in &report.not_taken[..2] {
        assert!(way.path.contains("cuFile") && way.why.contains("verify=always"), "{way:?}");
    }
    let unchecked = plan(&session, &names, Verify::Never).unwrap();
    let report = load(&mut lane, &unchecked).unwrap().report;
    assert_eq!(report.verified_sources, 0);
    assert!(report.not_taken.iter().all(|way| !way.why.contains("verify=always")), "{:?}", report.not_taken);
    session.close().unwrap();
}

/// Finds bytes in the files below a folder, and changes one of them.
fn damage(folder: &Path, wanted: &[u8]) {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            if let Some(at) = bytes.windows(wanted.len()).position(|window| window == wanted) {
                let file = File::options().write(true).open(&path).unwrap();
                file.write_all_at(&[!wanted[0]], at as u64).unwrap();
                file.sync_all().unwrap();
                return;
            }
        }
    }
    panic!("the bytes are in no file");
}

#[test]
fn a_damaged_chunk_never_reaches_the_device_unsaid() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let (path, names, expected) = pool(kind, folder.path());
        // Only the pool's copy.
        for name in &names {
            std::fs::remove_file(folder.path().join(name.strip_prefix("models/").unwrap())).unwrap();
        }
        damage(folder.path(), &expected["model.1.9.weight"][100_000..100_064]);
        let session = Session::open(&path, SessionOptions::default()).unwrap();
        let (device, driver) = fake(FakeOptions::default());
        let mut lane = Lane::new(driver, small()).unwrap();
        let plan = plan(&session, &names, Verify::Always).unwrap();
        let error = load(&mut lane, &plan).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{kind:?}: {error}");
        assert!(error.to_string().contains("model-1.safetensors"), "{error}");
        let good = self::plan(&session, &names[..1], Verify::Always).unwrap();
        let loaded = load(&mut lane, &good).unwrap();
        assert!(contents(&lane, &loaded).iter().all(|(name, bytes)| expected[name] == *bytes));
        drop((loaded, lane, plan, good));
        assert_eq!(device.leaks(), [""; 0]);
    }
}

/// A region that is replaced and removed while a plan holds its lease is loaded as it was.
#[test]
fn a_lease_keeps_the_bytes_that_were_planned() {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let (path, names, expected) = pool(kind, folder.path());
        let options = SessionOptions::default();
        let opened =
            Pool::open(&path, &OpenOptions { ram_bytes: 16 << 20, ..OpenOptions::default() }).unwrap();
        let session = Session::over(opened, &options);
        let plan = plan(&session, &names, Verify::Always).unwrap();
        session.remove(&names[0], false).unwrap();
        let mut writer = session.writer(&names[1], None, WriterOptions::default()).unwrap();
        writer.write_all(&common::pattern(77, 6 << 20)).unwrap();
        writer.commit().unwrap();
        session.sync().unwrap();
        let (_, driver) = fake(FakeOptions::default());
        let mut lane = Lane::new(driver, small()).unwrap();
        let loaded = load(&mut lane, &plan).unwrap();
        assert!(contents(&lane, &loaded) == expected, "{kind:?}");
        drop(plan);
        session.close().unwrap();
    }
}
