//! Faults one by one, with what exactly becomes of each.

use std::sync::Arc;
use std::time::Duration;

use engine::{Access, Error, ErrorKind, Handle, OpenOptions, Pool, ROOT};
use nvme::{Device, Fault, FaultIo, FaultPlan, Verb};

use crate::lab::*;

const EIO: i32 = 5;
const ENODATA: i32 = 61;

/// A pool with one region, `r`, on a device that goes wrong as the plan says.
struct Bench {
    lab: Lab,
    below: Arc<dyn Device>,
    plan: Arc<FaultPlan>,
    options: OpenOptions,
}

fn content() -> Vec<u8> {
    noise(11, 3 * CHUNK as usize)
}

impl Bench {
    fn new() -> Bench {
        let lab = Lab::new(|pool| put(pool, "r", &content()).unwrap());
        let (below, plan) = (lab.device(), Arc::new(FaultPlan::new()));
        // Without a RAM tier, so that each read is one of the device.
        let options = OpenOptions { ram_bytes: 0, ..faulty(&below, &plan) };
        Bench { lab, below, plan, options }
    }

    fn open(&self) -> Pool {
        Pool::open(&self.lab.path, &self.options).unwrap()
    }

    /// The next `times` operations of this kind go wrong.
    fn next(&self, mut times: u32, wanted: impl Fn(&FaultIo) -> bool + Send + 'static, fault: Fault) {
        self.plan.choose(move |io| {
            let hit = times > 0 && wanted(io);
            times -= u32::from(hit);
            hit.then_some(fault)
        });
    }
}

fn data(verb: Verb) -> impl Fn(&FaultIo) -> bool + Send + 'static {
    move |io| io.verb == verb && io.offset >= DATA
}

fn catalog(verb: Verb) -> impl Fn(&FaultIo) -> bool + Send + 'static {
    move |io| io.verb == verb && (ZONE..DATA).contains(&io.offset)
}

fn open_region(pool: &Pool, at: &str, access: Access) -> Handle {
    let node = pool.lookup(ROOT, name(at)).unwrap().node;
    pool.open_region(node, access, false).unwrap()
}

/// A chunk of `r`, or what is wrong with it.
fn chunk(pool: &Pool, at: &str, index: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; CHUNK as usize];
    open_region(pool, at, Access::Read).read_at(index * CHUNK, &mut bytes).map(|_| bytes)
}

fn part(index: u64) -> Vec<u8> {
    content()[(index * CHUNK) as usize..((index + 1) * CHUNK) as usize].to_vec()
}

#[test]
fn a_read_that_fails_once_is_repaired_and_counted() {
    let bench = Bench::new();
    let pool = bench.open();
    let faults = [
        Fault::FlipBit(12_345),
        Fault::Misdirected(DATA + 5 * MIB / 2),
        Fault::Errno(EIO),
        Fault::Errno(ENODATA),
        Fault::Short(4096),
        Fault::Slow(Duration::from_secs(5)),
    ];
    for (index, fault) in faults.into_iter().enumerate() {
        bench.next(1, data(Verb::Read), fault);
        assert_eq!(chunk(&pool, "r", 1).unwrap(), part(1), "{fault:?}");
        // What is short is gone on with, and what is slow is waited for: the read itself never failed.
        let repaired = (index as u64 + 1).min(4);
        let stat = pool.stat();
        assert_eq!((stat.retried_reads, stat.repaired_reads, stat.corrupt_chunks), (repaired, repaired, 0));
    }
    pool.close().unwrap();
}

#[test]
fn a_read_that_fails_twice_names_the_place() {
    let bench = Bench::new();
    let pool = bench.open();
    let expected = [
        (Fault::FlipBit(77), ErrorKind::Corrupt, 2),
        (Fault::Errno(EIO), ErrorKind::Io, 2),
        // Not waited for twice, and not asked twice when it is gone.
        (Fault::Hang, ErrorKind::Timeout, 1),
        (Fault::Slow(Duration::from_secs(31)), ErrorKind::Timeout, 1),
        (Fault::Errno(19), ErrorKind::Io, 1),
    ];
    for (fault, kind, reads) in expected {
        let before = bench.plan.fired().len();
        bench.next(2, data(Verb::Read), fault);
        let error = chunk(&pool, "r", 1).unwrap_err();
        assert_eq!(error.kind(), kind, "{fault:?}: {}", error.chain());
        assert_eq!(bench.plan.fired().len() - before, reads, "{fault:?}");
        bench.plan.lift();
        let text = error.chain();
        assert!(text.contains("pool.img") && text.contains("node "), "{fault:?}: {text}");
        assert!(text.contains(&(DATA + CHUNK).to_string()), "{fault:?}: the offset on the member: {text}");
        // The others, and the same one later, are as they were.
        for index in 0..3 {
            assert_eq!(chunk(&pool, "r", index).unwrap(), part(index), "{fault:?}");
        }
    }
    assert_eq!(pool.stat().corrupt_chunks, 1);
    pool.close().unwrap();
}

#[test]
fn verify_reads_twice_before_it_reports() {
    let bench = Bench::new();
    let pool = bench.open();
    for (times, bad) in [(1, 0), (2, 1)] {
        for fault in [Fault::FlipBit(5), Fault::Errno(EIO)] {
            bench.next(times, data(Verb::Read), fault);
            let report = pool.verify(None, &mut |_| {}).unwrap();
            assert_eq!(report.bad_chunks, bad, "{fault:?} {times} times: {report:?}");
            if let Some(bad) = report.bad.first() {
                assert_eq!((bad.path.as_str(), bad.chunk, bad.offset, bad.len), ("r", 0, 0, CHUNK));
                assert!(bad.member_path.ends_with("pool.img"), "{bad:?}");
            }
            bench.plan.lift();
        }
    }
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    pool.close().unwrap();
}

#[test]
fn a_lost_write_over_the_same_place_is_found() {
    // Within one draft a chunk is written over where it is. The second write is acknowledged and never done: the medium holds
    // the first one's bytes, whole, at the right place. The sum in the catalog is the second one's.
    let bench = Bench::new();
    let pool = bench.open();
    let (first, second) = (noise(21, CHUNK as usize), noise(22, CHUNK as usize));
    let node = create(&pool, "twice").unwrap();
    let handle = pool.open_region(node, Access::Write, false).unwrap();
    write_all(&handle, 0, &first).unwrap();
    handle.flush().unwrap();
    bench.next(1, data(Verb::Write), Fault::Lost);
    write_all(&handle, 0, &second).unwrap();
    handle.flush().unwrap();
    drop(handle);
    assert_eq!(bench.plan.fired().len(), 1);
    let place = bench.plan.fired()[0].0.offset;
    let mut there = vec![0; CHUNK as usize];
    bench.below.read_at(place, &mut there).unwrap();
    assert_eq!(there, first, "the test is about an old generation at the same place");
    assert_eq!(chunk(&pool, "twice", 0).unwrap_err().kind(), ErrorKind::Corrupt);
    pool.close().unwrap();
    // And after everything in memory is gone.
    let pool = bench.open();
    let error = chunk(&pool, "twice", 0).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Corrupt && error.chain().contains(&place.to_string()),
        "{}",
        error.chain()
    );
    assert_eq!(pool.verify(None, &mut |_| {}).unwrap().bad_chunks, 1);
    pool.close().unwrap();
}

#[test]
fn a_lost_write_into_space_used_before_is_found() {
    // The space of an old generation is free again, and gets the new generation of the same chunk of the same region: lost.
    let bench = Bench::new();
    let pool = bench.open();
    bench.next(1, |io| io.verb == Verb::Write && io.offset == DATA && io.len == 3 * CHUNK, Fault::Lost);
    for seed in 0..200 {
        put(&pool, "r", &noise(3100 + seed, 3 * CHUNK as usize)).unwrap();
        pool.sync().unwrap(); // what was replaced is free from here on
        if !bench.plan.fired().is_empty() {
            break;
        }
    }
    assert_eq!(bench.plan.fired().len(), 1, "the first content's place was never used again");
    let mut there = vec![0; content().len()];
    bench.below.read_at(DATA, &mut there).unwrap();
    assert_eq!(there, content(), "the medium holds the oldest generation, whole");
    for index in 0..3 {
        assert_eq!(chunk(&pool, "r", index).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    pool.close().unwrap();
}

#[test]
fn a_lost_write_of_identical_bytes_is_no_loss() {
    // The one case that sums cannot tell: the bytes that are there are the bytes that were to be there.
    let bench = Bench::new();
    let pool = bench.open();
    let bytes = noise(41, CHUNK as usize);
    let node = create(&pool, "same").unwrap();
    let handle = pool.open_region(node, Access::Write, false).unwrap();
    write_all(&handle, 0, &bytes).unwrap();
    handle.flush().unwrap();
    bench.next(1, data(Verb::Write), Fault::Lost);
    write_all(&handle, 0, &bytes).unwrap();
    handle.flush().unwrap();
    drop(handle);
    assert_eq!(bench.plan.fired().len(), 1);
    assert_eq!(chunk(&pool, "same", 0).unwrap(), bytes);
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    pool.close().unwrap();
}

#[test]
fn a_misdirected_write_is_found_where_it_went_and_where_it_is_missing() {
    let bench = Bench::new();
    let pool = bench.open();
    bench.next(1, data(Verb::Write), Fault::Misdirected(DATA + CHUNK));
    put(&pool, "astray", &noise(51, CHUNK as usize)).unwrap();
    pool.sync().unwrap();
    assert_eq!(bench.plan.fired().len(), 1);
    assert_eq!(chunk(&pool, "astray", 0).unwrap_err().kind(), ErrorKind::Corrupt);
    let error = chunk(&pool, "r", 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.chain().contains("chunk 1"), "{}", error.chain());
    for index in [0, 2] {
        assert_eq!(chunk(&pool, "r", index).unwrap(), part(index), "its neighbours are whole");
    }
    let report = pool.verify(None, &mut |_| {}).unwrap();
    let mut bad: Vec<_> = report.bad.iter().map(|bad| (bad.path.as_str(), bad.chunk)).collect();
    bad.sort_unstable();
    assert_eq!(bad, [("astray", 0), ("r", 1)]);
    pool.close().unwrap();
}

#[test]
fn a_failed_data_write_fails_the_draft_and_never_the_pool() {
    for fault in [Fault::Errno(EIO), Fault::Errno(28), Fault::Short(0), Fault::Hang] {
        let bench = Bench::new();
        let pool = bench.open();
        let handle = open_region(&pool, "r", Access::Write);
        bench.next(1, data(Verb::Write), fault);
        let wrote = write_all(&handle, 0, &noise(61, 2 * CHUNK as usize)).and_then(|()| handle.flush());
        let error = wrote.unwrap_err();
        check_names_the_place(&error, "flush");
        assert_eq!(error.kind() == ErrorKind::NoSpace, fault == Fault::Errno(28), "{}", error.chain());
        // A later fsync does not make it good.
        assert!(handle.sync().is_err(), "{fault:?}");
        drop(handle);
        assert_eq!(pool.stat().seal_errors, 1);
        assert_eq!(get(&pool, "r").unwrap(), Some(content()), "{fault:?}: the old content is the content");
        put(&pool, "other", &noise(62, 50_000)).unwrap();
        put(&pool, "r", &noise(63, 50_000)).unwrap();
        pool.sync().unwrap();
        pool.close().unwrap();
        let pool = bench.open();
        assert_eq!(get(&pool, "r").unwrap(), Some(noise(63, 50_000)));
        assert_eq!(get(&pool, "other").unwrap(), Some(noise(62, 50_000)));
        pool.close().unwrap();
    }
}

#[test]
fn a_failed_catalog_write_is_tried_again_and_never_half_committed() {
    for fault in [Fault::Errno(EIO), Fault::Errno(28), Fault::Short(0), Fault::Hang] {
        let bench = Bench::new();
        let pool = bench.open();
        put(&pool, "first", &noise(71, 20_000)).unwrap();
        pool.sync().unwrap();
        // Once: opened again and written again within the same call.
        bench.next(1, catalog(Verb::Write), fault);
        put(&pool, "second", &noise(72, 20_000)).unwrap();
        pool.sync().unwrap();
        // As long as it lasts, every sync says so; reads go on, and changes are kept in memory.
        bench.next(u32::MAX, catalog(Verb::Write), fault);
        put(&pool, "third", &noise(73, 20_000)).unwrap();
        pool.unlink(ROOT, name("first")).unwrap();
        for _ in 0..3 {
            check_names_the_place(&pool.sync().unwrap_err(), "sync");
            assert!(!pool.stat().commit_error.is_empty());
            assert_eq!(get(&pool, "third").unwrap(), Some(noise(73, 20_000)), "{fault:?}");
            assert_eq!(get(&pool, "r").unwrap(), Some(content()), "{fault:?}");
        }
        // A crash now, and the commit before is what there is: none of the two changes.
        let after_crash = {
            let copy = bench.lab.device();
            let mut bytes = vec![0; LEN as usize];
            bench.below.read_at(0, &mut bytes).unwrap();
            copy.write_at(0, &bytes).unwrap();
            copy
        };
        bench.plan.lift();
        pool.sync().unwrap();
        assert_eq!(pool.stat().commit_error, "");
        pool.close().unwrap();
        let pool = bench.open();
        assert_eq!(get(&pool, "third").unwrap(), Some(noise(73, 20_000)), "{fault:?}");
        assert_eq!(get(&pool, "first").unwrap(), None, "{fault:?}");
        pool.close().unwrap();
        let pool = Pool::open(&bench.lab.path, &faulty(&after_crash, &bench.plan)).unwrap();
        assert_eq!(get(&pool, "first").unwrap(), Some(noise(71, 20_000)), "{fault:?}");
        assert_eq!(get(&pool, "second").unwrap(), Some(noise(72, 20_000)), "{fault:?}");
        assert_eq!(get(&pool, "third").unwrap(), None, "{fault:?}");
        pool.close().unwrap();
    }
}

#[test]
fn after_a_failed_flush_nothing_is_committed_until_the_pool_is_opened_again() {
    let bench = Bench::new();
    let pool = bench.open();
    put(&pool, "before", &noise(81, 20_000)).unwrap();
    pool.sync().unwrap();
    put(&pool, "new", &noise(82, 20_000)).unwrap();
    bench.next(1, |io| io.verb == Verb::Flush, Fault::Errno(EIO));
    check_names_the_place(&pool.sync().unwrap_err(), "sync");
    // The next flush would succeed, although the drive may have dropped what the first one was for.
    for _ in 0..2 {
        let error = pool.sync().unwrap_err();
        assert!(error.chain().contains("open it again"), "{}", error.chain());
    }
    assert!(put(&pool, "more", b"x").is_err(), "it takes no changes");
    assert_eq!(get(&pool, "before").unwrap(), Some(noise(81, 20_000)), "reads go on");
    assert!(!pool.stat().commit_error.is_empty());
    assert!(pool.close().is_err(), "closing says that something was not committed");
    let pool = bench.open();
    assert_eq!(get(&pool, "before").unwrap(), Some(noise(81, 20_000)));
    assert_eq!(get(&pool, "new").unwrap(), None);
    put(&pool, "new", &noise(82, 20_000)).unwrap();
    pool.sync().unwrap();
    pool.close().unwrap();
}

#[test]
fn a_member_that_vanishes_and_comes_back() {
    let bench = Bench::new();
    let pool = bench.open();
    let handle = open_region(&pool, "r", Access::Read);
    put(&pool, "new", &noise(91, 50_000)).unwrap();
    pool.sync().unwrap();
    bench.next(1, |_| true, Fault::Vanish);
    for _ in 0..2 {
        let error = handle.read_at(0, &mut [0; 100]).unwrap_err();
        check_names_the_place(&error, "read");
        assert!(put(&pool, "late", &noise(92, 100)).and_then(|()| pool.sync()).is_err());
        assert!(!pool.verify(None, &mut |_| {}).unwrap().is_clean());
    }
    drop(handle);
    assert!(pool.close().is_err());
    check_names_the_place(&Pool::open(&bench.lab.path, &bench.options).unwrap_err(), "open");
    bench.plan.lift();
    let pool = bench.open();
    assert_eq!(get(&pool, "r").unwrap(), Some(content()));
    assert_eq!(get(&pool, "new").unwrap(), Some(noise(91, 50_000)));
    assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean());
    pool.close().unwrap();
}

#[test]
fn a_damaged_superblock_is_written_again_whatever_fails_meanwhile() {
    for copy in [200, LEN - 4096 + 200] {
        let mut lab = Lab::new(|pool| put(pool, "r", &content()).unwrap());
        lab.scar(copy);
        for at in 0..6 {
            for fault in [
                Fault::Errno(EIO),
                Fault::Short(512),
                Fault::FlipBit(999),
                Fault::Lost,
                Fault::Hang,
                Fault::Vanish,
            ] {
                let (below, plan) = (lab.device(), Arc::new(FaultPlan::new()));
                let options = faulty(&below, &plan);
                plan.at(at, fault);
                drop(Pool::open(&lab.path, &options));
                plan.lift();
                let case = format!("copy at {copy}, {fault:?} at operation {at}");
                for _ in 0..2 {
                    let pool =
                        Pool::open(&lab.path, &options).unwrap_or_else(|e| panic!("{case}: {}", e.chain()));
                    assert_eq!(get(&pool, "r").unwrap(), Some(content()), "{case}");
                    pool.close().unwrap();
                }
                // By now both are good.
                let mut copies = [vec![0; 4096], vec![0; 4096]];
                for (bytes, offset) in copies.iter_mut().zip([0, LEN - 4096]) {
                    below.read_at(offset, bytes).unwrap();
                }
                assert!(copies[0] == copies[1], "{case}: the copies differ");
            }
        }
    }
}

#[test]
fn real_images_meet_the_same_faults() {
    // Over the image file itself, O_DIRECT and all; the rest of this file is in memory for speed.
    let watchdog = Watchdog::new();
    let lab = Lab::new(|pool| put(pool, "r", &content()).unwrap());
    for (seed, fault) in
        [Fault::Errno(EIO), Fault::Short(4096), Fault::FlipBit(3), Fault::Hang, Fault::Vanish]
            .into_iter()
            .enumerate()
    {
        for at in [0, 5, 20, 40, 60] {
            let case = format!("{fault:?} at {at}");
            watchdog.begins(&case);
            let plan = Arc::new(FaultPlan::new());
            // A flip in what is written would be damage for good: of those only reads here.
            plan.choose(move |io| {
                let hit = io.sequence == at && (io.verb == Verb::Read || !matches!(fault, Fault::FlipBit(_)));
                hit.then_some(fault)
            });
            let bytes = noise(1000 * seed as u64 + at, 100_000);
            let write = || {
                let pool = Pool::open(&lab.path, &faulty_file(&plan))?;
                assert!(get(&pool, "r").map_or(true, |read| read == Some(content())), "{case}");
                put(&pool, "w", &bytes).and_then(|()| pool.sync())?;
                pool.close()
            };
            let wrote = write();
            plan.lift();
            let pool = Pool::open(&lab.path, &faulty_file(&plan)).unwrap();
            assert_eq!(get(&pool, "r").unwrap(), Some(content()), "{case}");
            if wrote.is_ok() {
                assert_eq!(get(&pool, "w").unwrap(), Some(bytes), "{case}");
            }
            assert!(pool.verify(None, &mut |_| {}).unwrap().is_clean(), "{case}");
            pool.close().unwrap();
        }
    }
}
