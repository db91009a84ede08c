//! Loads of what is in memory already: pages of a pool's RAM tier, and files in the page cache that the device reads itself.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{contents, fake, load, pattern, plan, small, two_files};
use engine::{FormatOptions, Pool, Session, SessionOptions, WriterOptions};
use gpudirect::driver::fake::{FakeDriver, FakeOptions};
use gpudirect::driver::host::HostDriver;
use gpudirect::{
    CachePolicy, CachedMode, Cancel, Control, Driver, ErrorKind, Lane, LaneOptions, PinnedTier, Plan,
    PlanOptions, Source, Verify,
};

/// A raw or striped pool with the two files as regions, open with a RAM tier, and what is in them.
fn pool(striped: bool, folder: &Path) -> (Session, Vec<String>, std::collections::HashMap<String, Vec<u8>>) {
    let path = folder.join("pool");
    let mut options = FormatOptions { stripe_unit: 128 << 10, ..FormatOptions::default() };
    if striped {
        options.members = vec![folder.join("a"), folder.join("b")];
    } else {
        (options.raw, options.size) = (true, Some(128 << 20));
    }
    Pool::format(&path, &options).unwrap();
    let (files, expected) = two_files(folder);
    let session =
        Session::open(&path, SessionOptions { ram_bytes: 32 << 20, ..SessionOptions::default() }).unwrap();
    let mut names = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        let bytes = std::fs::read(&file).unwrap();
        let mut writer = session.writer(&name, Some(bytes.len() as u64), WriterOptions::default()).unwrap();
        writer.write_all(&bytes).unwrap();
        writer.commit().unwrap();
        std::fs::remove_file(file).unwrap();
        names.push(name);
    }
    (session, names, expected)
}

/// Reads a range through the engine, so that its RAM tier has it.
fn warm(session: &Session, name: &str, range: std::ops::Range<u64>) {
    let reader = session.reader(name).unwrap();
    let end = range.end.min(reader.len());
    reader.read_exact_at(range.start, &mut vec![0; (end - range.start) as usize]).unwrap();
}

fn regions(session: &Session, names: &[String], verify: Verify) -> Plan {
    let sources = names.iter().map(|name| Source::region(session, name, verify).unwrap()).collect();
    Plan::new(sources, &PlanOptions::default()).unwrap()
}

/// Finds bytes of a tensor in the pool's image, and overwrites them there.
fn spoil(image: &Path, wanted: &[u8]) {
    use std::os::unix::fs::FileExt;
    let bytes = std::fs::read(image).unwrap();
    let at =
        bytes.windows(64).position(|window| window == &wanted[..64]).expect("the bytes are in the image");
    let file = std::fs::File::options().write(true).open(image).unwrap();
    file.write_all_at(&[0x5a; 4096], at as u64).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn what_the_ram_tier_has_is_copied_from_there_without_a_read() {
    for striped in [false, true] {
        for verify in [Verify::Always, Verify::Never] {
            let folder = tempfile::tempdir().unwrap();
            let (session, names, expected) = pool(striped, folder.path());
            let pool = session.pool().unwrap();
            let (device, driver) = fake(FakeOptions::default());
            let mut lane = Lane::new(driver.clone(), small()).unwrap();
            lane.use_tier(PinnedTier::new(&driver, pool.ram_arena().unwrap()).unwrap()).unwrap();
            let plan = regions(&session, &names, verify);
            for name in &names {
                warm(&session, name, 0..u64::MAX);
            }
            let loaded = load(&mut lane, &plan).unwrap();
            let what = format!("striped {striped}, {verify:?}");
            assert!(contents(&lane, &loaded) == expected, "{what}");
            let report = &loaded.report;
            assert_eq!((report.tier_bytes, report.reads, report.read_bytes), (report.bytes, 0, 0), "{what}");
            assert_eq!(report.backend, "none", "{what}");
            // Nobody but the tier holds a page any more: it may be evicted.
            for name in &names {
                let lease = pool.lease(session.stat_path(name).unwrap().node, 0, u64::MAX).unwrap();
                let resident = lease.resident(0..u64::MAX);
                assert!(!resident.is_empty());
                let mut pages: Vec<_> = resident.iter().map(|r| r.page.clone()).collect();
                pages.dedup_by(|a, b| Arc::ptr_eq(a, b));
                drop(resident);
                assert!(pages.iter().all(|page| Arc::strong_count(page) == 2), "{what}: a page is held");
            }
            drop((loaded, lane, plan));
            assert_eq!(device.leaks(), [""; 0], "{what}");
            session.close().unwrap();
        }
    }
}

#[test]
fn hits_and_reads_mix_at_any_border() {
    for striped in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (session, names, expected) = pool(striped, folder.path());
        let (device, driver) = fake(FakeOptions::default());
        let mut lane = Lane::new(driver.clone(), small()).unwrap();
        let arena = session.pool().unwrap().ram_arena().unwrap();
        lane.use_tier(PinnedTier::new(&driver, arena).unwrap()).unwrap();
        let plan = regions(&session, &names, Verify::Always);
        for range in [5000..5001, 70_000..300_000, (1 << 20) + 1..(2 << 20) + 9] {
            warm(&session, &names[0], range);
        }
        warm(&session, &names[1], (3 << 20)..u64::MAX);
        let loaded = load(&mut lane, &plan).unwrap();
        assert!(contents(&lane, &loaded) == expected, "striped {striped}");
        let report = &loaded.report;
        assert!(report.tier_bytes > 1 << 20 && report.tier_bytes < report.bytes - (1 << 20), "{report:?}");
        assert!(report.reads > 0);
        drop((loaded, plan));
        // Without the tier everything is read.
        let mut other = Lane::new(driver.clone(), small()).unwrap();
        let loaded = load(&mut other, &regions(&session, &names, Verify::Always)).unwrap();
        assert_eq!(loaded.report.tier_bytes, 0);
        drop((loaded, other, lane));
        assert_eq!(device.leaks(), [""; 0]);
        session.close().unwrap();
    }
}

/// The members hold something else by now: only who reads nothing gets the bytes. What must be read is found damaged.
#[test]
fn hits_do_not_touch_the_members() {
    let folder = tempfile::tempdir().unwrap();
    let (session, names, expected) = pool(false, folder.path());
    let (_, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    let arena = session.pool().unwrap().ram_arena().unwrap();
    lane.use_tier(PinnedTier::new(&driver, arena).unwrap()).unwrap();
    let plan = regions(&session, &names, Verify::Always);
    for name in &names {
        warm(&session, name, 0..u64::MAX);
    }
    for tensor in ["model.0.9.weight", "model.1.8.weight"] {
        spoil(&folder.path().join("pool"), &expected[tensor][100_000..]);
    }
    let loaded = load(&mut lane, &plan).unwrap();
    assert!(contents(&lane, &loaded) == expected);
    // A lane that does not use the tier, and looks at no checksums, gets what is there now.
    let (_, other) = fake(FakeOptions::default());
    let mut plain = Lane::new(other, small()).unwrap();
    let unchecked = load(&mut plain, &regions(&session, &names, Verify::Never)).unwrap();
    assert!(contents(&plain, &unchecked) != expected, "the members were not spoiled");
    drop((loaded, unchecked));
    let _ = session.close();
}

/// Pages that are lent to copies are not evicted, however much else is read meanwhile.
#[test]
fn pages_stay_while_the_device_copies_them() {
    let folder = tempfile::tempdir().unwrap();
    let (session, names, expected) = pool(false, folder.path());
    for i in 0..4 {
        let mut writer = session.writer(&format!("other{i}"), None, WriterOptions::default()).unwrap();
        writer.write_all(&pattern(50 + i, 12 << 20)).unwrap();
        writer.commit().unwrap();
    }
    let (device, driver) = fake(FakeOptions { lag: 32, ..FakeOptions::default() });
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    let arena = session.pool().unwrap().ram_arena().unwrap();
    lane.use_tier(PinnedTier::new(&driver, arena).unwrap()).unwrap();
    let plan = regions(&session, &names, Verify::Always);
    for _ in 0..3 {
        for name in &names {
            warm(&session, name, 0..u64::MAX);
        }
        let mut washed = 0;
        let mut wash = |_: u64, _: u64| {
            // Called between batches: more than the tier holds goes through it.
            if washed < 4 {
                warm(&session, &format!("other{washed}"), 0..u64::MAX);
                washed += 1;
            }
            true
        };
        let mut control = Control { progress: Some(&mut wash), ..Control::default() };
        let loaded = gpudirect::load(&mut lane, &plan, &mut control).unwrap();
        assert!(contents(&lane, &loaded) == expected);
        assert!(loaded.report.tier_bytes > 0);
    }
    drop((lane, plan));
    assert_eq!(device.leaks(), [""; 0]);
    session.close().unwrap();
}

/// One lane after the other, as a process with a few pools has them: the tier is pinned as long as somebody uses it, and no longer.
#[test]
fn a_lane_that_left_its_tiers_reads_again_and_holds_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (session, names, expected) = pool(false, folder.path());
    let (device, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    let own = device.leaks();
    let plan = regions(&session, &names, Verify::Always);
    // Headers are there always, and are no reason to pin anything.
    assert!(plan.resident_bytes() < 1 << 20 && !plan.wants_tier());
    for name in &names {
        warm(&session, name, 0..u64::MAX);
    }
    let wanted: u64 = plan.tensors().iter().map(|tensor| tensor.len).sum();
    assert!((wanted..wanted + (1 << 20)).contains(&plan.resident_bytes()) && plan.wants_tier());
    for round in 0..2 {
        let arena = session.pool().unwrap().ram_arena().unwrap();
        lane.use_tier(PinnedTier::new(&driver, arena).unwrap()).unwrap();
        let loaded = load(&mut lane, &plan).unwrap();
        assert_eq!(loaded.report.tier_bytes, loaded.report.bytes, "round {round}");
        assert!(contents(&lane, &loaded) == expected, "round {round}");
        lane.leave_tiers();
        drop(loaded);
        assert_eq!(device.leaks(), own, "round {round}: the tier is still pinned");
        let loaded = load(&mut lane, &plan).unwrap();
        assert_eq!(loaded.report.tier_bytes, 0);
        assert!(contents(&lane, &loaded) == expected, "round {round}");
    }
    drop((plan, lane));
    session.close().unwrap();
}

#[test]
fn a_tier_of_another_device_is_refused_and_a_directory_has_none() {
    let folder = tempfile::tempdir().unwrap();
    let (session, ..) = pool(false, folder.path());
    let (_, driver) = fake(FakeOptions::default());
    let (_, other) = fake(FakeOptions::default());
    let arena = session.pool().unwrap().ram_arena().unwrap();
    let tier = PinnedTier::new(&other, arena).unwrap();
    let mut lane = Lane::new(driver, small()).unwrap();
    assert_eq!(lane.use_tier(tier).unwrap_err().kind(), ErrorKind::Invalid);
    session.close().unwrap();
    let path = folder.path().join("directory");
    Pool::format(&path, &FormatOptions::default()).unwrap();
    let session = Session::open(&path, SessionOptions::default()).unwrap();
    assert!(session.pool().unwrap().ram_arena().is_none());
    session.close().unwrap();
}

fn mapping() -> LaneOptions {
    LaneOptions { cached: CachedMode::Map, map_piece: 64 << 10, map_limit: 256 << 10, ..small() }
}

#[test]
fn mapped_files_are_copied_by_the_device_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    for (map_piece, map_limit, threads) in
        [(64 << 10, 256 << 10, 3), (4096, 4096, 2), (32 << 20, 1 << 30, 16), (1 << 20, 4096, 4)]
    {
        let (device, driver) = fake(FakeOptions::default());
        let options = LaneOptions { map_piece, map_limit, threads, ..mapping() };
        let mut lane = Lane::new(driver, options).unwrap();
        let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
        let loaded = load(&mut lane, &plan).unwrap();
        assert!(contents(&lane, &loaded) == expected, "pieces of {map_piece}");
        let report = &loaded.report;
        assert_eq!((report.mapped_bytes, report.reads), (report.bytes, 0), "{report:?}");
        assert!(report.notes.is_empty());
        assert!(device.mapped_pieces() >= 2);
        drop((loaded, lane));
        assert_eq!(device.leaks(), [""; 0]);
    }
}

#[test]
fn what_cannot_be_pinned_is_copied_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    for pieces in [0, 1, 7] {
        let (device, driver) = fake(FakeOptions { mapped_pieces: pieces, ..FakeOptions::default() });
        let mut lane = Lane::new(driver, mapping()).unwrap();
        let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
        let loaded = load(&mut lane, &plan).unwrap();
        assert!(contents(&lane, &loaded) == expected, "after {pieces} pieces");
        let report = &loaded.report;
        assert_eq!(report.mapped_bytes == 0, pieces == 0, "{report:?}");
        assert!(
            report.reads > 0 && report.notes.iter().any(|note| note.contains("takes no more")),
            "{report:?}"
        );
        drop((loaded, lane));
        assert_eq!(device.leaks(), [""; 0]);
    }
    // Host memory: here it would be the processor that reads, and SIGBUS where the file is cut short.
    let driver: Arc<dyn Driver> = Arc::new(HostDriver::new());
    let mut lane = Lane::new(driver, mapping()).unwrap();
    let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
    let loaded = load(&mut lane, &plan).unwrap();
    assert!(contents(&lane, &loaded) == expected);
    assert_eq!(loaded.report.mapped_bytes, 0);
    assert!(loaded.report.notes[0].contains("copied by threads"), "{:?}", loaded.report.notes);
}

#[test]
fn only_what_is_asked_for_and_may_go_unchecked_is_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let used = |device: &FakeDriver| device.mapped_pieces();
    for cached in [CachedMode::Auto, CachedMode::Copy] {
        let (device, driver) = fake(FakeOptions::default());
        let mut lane = Lane::new(driver, LaneOptions { cached, ..mapping() }).unwrap();
        let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
        load(&mut lane, &plan).unwrap();
        assert_eq!(used(&device), 0, "{cached:?}");
    }
    // Some tensors only: pieces without any are not pinned.
    let (device, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, mapping()).unwrap();
    let options = PlanOptions { filters: vec!["model.0.9.*".into()], ..PlanOptions::default() };
    let plan = plan(&paths, CachePolicy::Buffered, &options).unwrap();
    let loaded = load(&mut lane, &plan).unwrap();
    assert!(contents(&lane, &loaded)["model.0.9.weight"] == expected["model.0.9.weight"]);
    assert!((49..=50).contains(&used(&device)), "{}", used(&device));
    drop((loaded, lane));
    assert_eq!(device.leaks(), [""; 0]);
}

#[test]
fn a_file_that_changes_while_it_is_mapped_is_no_load() {
    for cut in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (paths, _) = two_files(folder.path());
        let (device, driver) = fake(FakeOptions::default());
        let mut lane = Lane::new(driver, mapping()).unwrap();
        let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
        let mut calls = 0;
        let mut change = |_: u64, _: u64| {
            calls += 1;
            if calls == 3 {
                let file = std::fs::File::options().write(true).open(&paths[1]).unwrap();
                if cut {
                    file.set_len(100_000).unwrap();
                } else {
                    use std::os::unix::fs::FileExt;
                    file.write_all_at(&[1; 100], 50_000).unwrap();
                }
            }
            true
        };
        let mut control = Control { progress: Some(&mut change), ..Control::default() };
        let error = gpudirect::load(&mut lane, &plan, &mut control).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
        drop(lane);
        assert_eq!(device.leaks(), [""; 0]);
    }
}

#[test]
fn errors_and_cancelling_leave_nothing_pinned() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let (device, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, mapping()).unwrap();
    let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
    let mut failed = 0;
    for fail_call in (1..60).chain([100, 150]) {
        device.set(FakeOptions { fail_call, ..FakeOptions::default() });
        // A piece that cannot be pinned is copied instead; any other call ends the load.
        match load(&mut lane, &plan) {
            Ok(loaded) => {
                device.set(FakeOptions::default());
                assert!(contents(&lane, &loaded) == expected, "call {fail_call}");
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Device, "{error}");
                failed += 1;
            }
        }
        device.set(FakeOptions::default());
        // The ring, and nothing else.
        assert_eq!(device.leaks(), ["1 pinned arenas"], "call {fail_call}");
    }
    assert!(failed > 3, "{failed}");
    for fail_batch in [1, 5] {
        device.set(FakeOptions { fail_batch, ..FakeOptions::default() });
        assert_eq!(load(&mut lane, &plan).unwrap_err().kind(), ErrorKind::Device);
        assert_eq!(device.leaks(), ["1 pinned arenas"]);
    }
    device.set(FakeOptions::default());
    let cancel = Cancel::new();
    let mut calls = 0;
    let mut stop = |_: u64, _: u64| {
        calls += 1;
        calls < 4
    };
    let mut control = Control { cancel, progress: Some(&mut stop), ..Control::default() };
    let error = gpudirect::load(&mut lane, &plan, &mut control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(device.leaks(), ["1 pinned arenas"]);
    let loaded = load(&mut lane, &plan).unwrap();
    assert!(contents(&lane, &loaded) == expected);
}

/// What needs no read waits as well where others go first, and goes on when they are done.
#[test]
fn a_background_load_of_what_is_in_memory_lets_others_go_first() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    /// Whatever becomes of the background load, nobody waits for it for ever.
    struct LetsGo<'a>(&'a AtomicU64);
    impl Drop for LetsGo<'_> {
        fn drop(&mut self) {
            self.0.store(1 << 20, Ordering::SeqCst);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    for cached in [CachedMode::Map, CachedMode::Copy] {
        let (background_calls, foreground_runs, released) =
            (AtomicU64::new(0), AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let foreground = scope.spawn(|| {
                let (_, driver) = fake(FakeOptions::default());
                let mut lane = Lane::new(driver, small()).unwrap();
                let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
                // By its third call it is admitted: there it stays until the other one has looked a few times, or ended.
                let mut calls = 0;
                let mut hold = |_: u64, _: u64| {
                    calls += 1;
                    if calls == 3 {
                        foreground_runs.store(true, Ordering::SeqCst);
                        while background_calls.load(Ordering::SeqCst) < 10 {
                            std::thread::yield_now();
                        }
                        released.store(true, Ordering::SeqCst);
                    }
                    true
                };
                let mut control = Control { progress: Some(&mut hold), ..Control::default() };
                gpudirect::load(&mut lane, &plan, &mut control).unwrap();
            });
            let background = scope.spawn(|| {
                while !foreground_runs.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                let _lets_go = LetsGo(&background_calls);
                let (device, driver) = fake(FakeOptions::default());
                let mut lane = Lane::new(driver, LaneOptions { cached, ..mapping() }).unwrap();
                let plan = plan(&paths, CachePolicy::Buffered, &PlanOptions::default()).unwrap();
                let mut early = 0;
                let mut watch = |done: u64, _: u64| {
                    if !released.load(Ordering::SeqCst) {
                        early = early.max(done);
                    }
                    background_calls.fetch_add(1, Ordering::SeqCst);
                    true
                };
                let priority = gpudirect::Priority::Background;
                let mut control = Control { priority, progress: Some(&mut watch), ..Control::default() };
                let loaded = gpudirect::load(&mut lane, &plan, &mut control).unwrap();
                assert!(contents(&lane, &loaded) == expected, "{cached:?}");
                assert_eq!(early, 0, "{cached:?}: bytes were copied while another load went first");
                assert_eq!(loaded.report.mapped_bytes > 0, cached == CachedMode::Map);
                drop((loaded, lane));
                assert_eq!(device.leaks(), [""; 0]);
            });
            background.join().unwrap();
            foreground.join().unwrap();
        });
    }
}
