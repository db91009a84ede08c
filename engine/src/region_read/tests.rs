use std::path::Path;
use std::sync::atomic::AtomicBool;

use nvme::{Device, DeviceOptions, FileDevice};

use super::*;
use crate::content::{Content, Draft};
use crate::extent_draft::ExtentDraft;
use crate::extent_io::{ExtentContent, ExtentIo, ExtentIoOptions};
use crate::member::Member;
use crate::member::raw::{RawGeometry, RawMember};
use crate::prefetch::Priority;
use crate::types::Borrower;

const CHUNK: u32 = 16 << 10;

/// Real files with O_DIRECT where the file system of the temporary folder takes it.
fn images(folder: &Path, count: u16, ram_bytes: u64) -> Arc<ExtentIo> {
    let len = 24 << 20;
    let members = (0..count)
        .map(|index| {
            let path = folder.join(format!("image{index}"));
            let direct = DeviceOptions { direct: true, read_only: false };
            let device = FileDevice::create(&path, len, &direct).or_else(|refused| {
                println!("no O_DIRECT here: {refused}");
                FileDevice::create(&path, len, &DeviceOptions { direct: false, ..direct })
            });
            let device: Arc<dyn Device> = Arc::new(device.unwrap());
            let geometry = RawGeometry::plan(len, CHUNK, false).unwrap();
            Arc::new(RawMember::new(index, &path, device, geometry, CHUNK).unwrap()) as Arc<dyn Member>
        })
        .collect();
    let options =
        ExtentIoOptions { chunk_size: CHUNK, stripe_unit: 1 << 20, ram_bytes, verify: true, writers: 2 };
    ExtentIo::new(members, &options).unwrap()
}

fn region(io: &Arc<ExtentIo>, node: u64, data: &[u8]) -> Arc<Layout> {
    let draft = ExtentDraft::new(io, node, Arc::new(Layout::new(CHUNK)));
    assert_eq!(draft.write_at(0, data).unwrap(), data.len());
    let mut layout = draft.commit(true, &AtomicBool::new(false)).unwrap().unwrap().layout;
    layout.set_generation(1);
    Arc::new(layout)
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32).map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 17) as u8).collect()
}

#[test]
fn image_files_of_all_counts_and_odd_sizes() {
    for members in 1..=4u16 {
        for size in [1usize, 4095, 16_384, 16_385, 1_048_577, 5_000_003] {
            let folder = tempfile::tempdir().unwrap();
            let io = images(folder.path(), members, 2 << 20);
            let data = pattern(size, members as u32);
            let layout = region(&io, 9, &data);
            let used: std::collections::BTreeSet<u16> =
                layout.extents().map(|extent| extent.member).collect();
            assert_eq!(used.len(), (size.div_ceil(1 << 20)).min(members as usize), "units go round");
            let content = ExtentContent::new(&io, 9, layout);
            let mut buf = vec![0; size + 5];
            assert_eq!(content.read_at(0, &mut buf).unwrap(), size);
            assert!(buf[..size] == data);
            for at in (0..size).step_by(77_777) {
                let mut lent = Vec::new();
                let n = content
                    .read_with(at as u64, 100_001, Borrower::Program, &mut |slices| lent = slices.concat())
                    .unwrap();
                assert_eq!(n, lent.len());
                assert!(lent == data[at..size.min(at + 100_001)]);
            }
            assert_eq!(content.read_at(size as u64, &mut buf).unwrap(), 0);
            assert_eq!(content.read_at(u64::MAX, &mut buf).unwrap(), 0);
            assert_eq!(
                content
                    .read_with(size as u64 + 1, 10, Borrower::PageCache, &mut |slices| assert!(
                        slices.is_empty()
                    ))
                    .unwrap(),
                0
            );
        }
    }
}

#[test]
fn a_small_read_reads_one_chunk_and_a_second_one_none() {
    let folder = tempfile::tempdir().unwrap();
    let io = images(folder.path(), 1, 4 << 20);
    let data = pattern(3 << 20, 1);
    let layout = region(&io, 9, &data);
    let content = ExtentContent::new(&io, 9, layout);
    let before = io.reader().stats();
    let mut buf = [0; 4096];
    content.read_at(40_960, &mut buf).unwrap();
    assert!(buf == data[40_960..45_056]);
    let after = io.reader().stats();
    assert_eq!(
        (after.read_bytes - before.read_bytes, after.verified_chunks - before.verified_chunks),
        (CHUNK as u64, 1)
    );
    content.read_at(32_768, &mut buf).unwrap();
    assert_eq!(io.reader().stats(), after, "the second one comes from the RAM tier");
    assert_eq!((io.tier().stats().misses, io.tier().stats().hits), (1, 1));
}

#[test]
fn readers_of_the_same_bytes_read_them_once() {
    let folder = tempfile::tempdir().unwrap();
    let io = images(folder.path(), 2, 16 << 20);
    let data = pattern(8 << 20, 1);
    let layout = region(&io, 9, &data);
    let before = io.reader().stats().read_bytes;
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let mut buf = vec![0; 300_000];
                for at in (0..data.len()).step_by(buf.len()) {
                    let n = io
                        .reader()
                        .read_at(Source { node: 9, layout: &layout }, at as u64, &mut buf)
                        .unwrap();
                    assert!(buf[..n] == data[at..at + n]);
                }
            });
        }
    });
    assert_eq!(io.reader().stats().read_bytes - before, 8 << 20);
}

#[test]
fn lent_pages_outlive_their_eviction() {
    let folder = tempfile::tempdir().unwrap();
    let io = images(folder.path(), 1, 1 << 20);
    let data = pattern(8 << 20, 1);
    let layout = region(&io, 9, &data);
    let source = Source { node: 9, layout: &layout };
    io.reader()
        .read_with(source, 100, 500_000, &mut |slices| {
            // Washes the tier while the first pages are lent.
            let mut buf = vec![0; 8 << 20];
            io.reader().read_at(source, 0, &mut buf).unwrap();
            assert!(buf == data);
            assert!(slices.concat() == data[100..500_100]);
        })
        .unwrap();
    assert!(io.tier().stats().used_bytes <= 1 << 20);
}

#[test]
fn explicit_prefetch_fills_the_tier_in_order_and_stops_when_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let io = images(folder.path(), 2, 8 << 20);
    let data = pattern(8 << 20, 1);
    let layout = region(&io, 9, &data);
    let ticket = io.prefetcher().extents(
        9,
        &layout,
        &[(5 << 20, 1 << 20), (100, 200_000), (u64::MAX, 5)],
        Priority::Normal,
        None,
    );
    let soon = Instant::now() + Duration::from_secs(30);
    assert!(ticket.wait(soon).unwrap());
    assert_eq!(ticket.done_bytes(), (1 << 20) + 200_000);
    let before = io.reader().stats().read_bytes;
    let mut buf = vec![0; 1 << 20];
    io.reader().read_at(Source { node: 9, layout: &layout }, 5 << 20, &mut buf).unwrap();
    assert!(buf == data[5 << 20..6 << 20]);
    assert_eq!(io.reader().stats().read_bytes, before, "it was there already");
    // More than fits is cut off; past deadlines bring nothing.
    let ticket = io.prefetcher().extents(9, &layout, &[(0, u64::MAX)], Priority::Low, None);
    assert!(ticket.wait(soon).unwrap());
    assert_eq!(ticket.done_bytes(), 6 << 20);
    let late = io.prefetcher().extents(9, &layout, &[(0, u64::MAX)], Priority::High, Some(Instant::now()));
    assert!(late.wait(soon).unwrap());
    assert_eq!(late.done_bytes(), 0);
    // A file's ranges go to the page cache.
    let file = Arc::new(std::fs::File::open(folder.path().join("image0")).unwrap());
    let ticket = io.prefetcher().file(&file, &[(0, 3 << 20)], Priority::Normal, None);
    assert!(ticket.wait(soon).unwrap());
    assert_eq!(ticket.done_bytes(), 3 << 20);
}

#[test]
fn what_was_lent_is_not_kept_and_what_was_fetched_on_demand_is() {
    const SIZE: usize = (36 << 20) + 12_345;
    let folder = tempfile::tempdir().unwrap();
    // An eighth of it is read ahead.
    let io = images(folder.path(), 2, 64 << 20);
    let data = pattern(SIZE, 1);
    let layout = region(&io, 9, &data);
    let stream = |content: &ExtentContent, reader: Borrower| {
        for at in (0..SIZE).step_by(300_000) {
            let mut lent = Vec::new();
            content.read_with(at as u64, 300_000, reader, &mut |slices| lent = slices.concat()).unwrap();
            assert!(lent == data[at..SIZE.min(at + 300_000)]);
            let used = io.tier().stats().used_bytes;
            assert!(used <= (4 + 8 + 2 * 4 + 2) << 20, "{used} bytes are kept at {at}, {reader:?}");
        }
    };
    let mut generation = 1;
    for reader in [Borrower::PageCache, Borrower::Program] {
        // Under another number nothing of it is there, nor was.
        let [content, other] = [(); 2].map(|()| {
            generation += 1;
            let mut layout = (*layout).clone();
            layout.set_generation(generation);
            ExtentContent::new(&io, 9, Arc::new(layout))
        });
        let ticket = io.prefetcher().extents(9, content.layout(), &[(0, 4 << 20)], Priority::Normal, None);
        assert!(ticket.wait(Instant::now() + Duration::from_secs(30)).unwrap());
        stream(&content, reader);
        stream(&other, reader);
        let before = io.tier().stats().hits;
        let mut buf = vec![0; 4 << 20];
        content.read_at(0, &mut buf).unwrap();
        assert!(buf == data[..4 << 20]);
        assert_eq!(io.tier().stats().hits - before, 4 << 20 >> 14, "all of it is still there");
        content.forget();
        other.forget();
    }
}

/// Threads bring it without being waited for: waits for what must come.
fn wait_for_reads(io: &ExtentIo, bytes: u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while io.reader().stats().read_bytes < bytes {
        let came = io.reader().stats().read_bytes;
        assert!(Instant::now() < deadline, "read-ahead never came: {came} of {bytes} bytes");
        std::thread::yield_now();
    }
}

#[test]
fn a_sequential_reader_is_read_ahead_of_and_a_random_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let io = images(folder.path(), 1, 16 << 20);
    let data = pattern(16 << 20, 1);
    let layout = region(&io, 9, &data);
    let content = ExtentContent::new(&io, 9, layout.clone());
    let mut buf = vec![0; 64 << 10];
    let mut at = 1u64;
    for _ in 0..100 {
        at = at * 7919 % 255;
        content.read_at(at << 16, &mut buf).unwrap();
    }
    let stats = io.reader().stats();
    assert!(stats.read_bytes <= 100 * (64 << 10), "random reads bring no more than they ask for");
    let content = ExtentContent::new(&io, 10, layout);
    for block in 0..16u64 {
        content.read_at(block << 16, &mut buf).unwrap();
        assert!(buf == data[(block << 16) as usize..][..64 << 10]);
    }
    wait_for_reads(&io, stats.read_bytes + (2 << 20));
}

#[test]
fn read_ahead_leaves_out_what_its_reader_asked_for_and_what_the_kernel_reads_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let io = images(folder.path(), 1, 64 << 20);
    let data = pattern(16 << 20, 1);
    let layout = region(&io, 9, &data);
    // Jobs of less priority begin after those before them; of these, a unit may still be under way.
    let settle = |bytes: u64| {
        let last = io.prefetcher().extents(9, &layout, &[(0, 1)], Priority::Low, None);
        assert!(last.wait(Instant::now() + Duration::from_secs(30)).unwrap());
        wait_for_reads(&io, bytes);
        assert_eq!(io.reader().stats().read_bytes, bytes);
    };
    let chunk = layout.chunk_size() as u64;
    settle(chunk);
    io.prefetcher().read_ahead(9, &layout, 1 << 20..4 << 20, Arc::new(AtomicU64::new(3 << 20)));
    settle(chunk + (1 << 20));
    io.prefetcher().read_ahead(9, &layout, 4 << 20..6 << 20, Arc::new(AtomicU64::new(6 << 20)));
    settle(chunk + (1 << 20));
    // The kernel's own read-ahead is one that asks for much at a time.
    let content = ExtentContent::new(&io, 9, layout.clone());
    for at in 6..14u64 {
        content.read_with(at << 20, 1 << 20, Borrower::PageCache, &mut |_| {}).unwrap();
    }
    settle(chunk + (9 << 20));
    // Where it asks for little, it is read ahead of.
    let mut again = (*layout).clone();
    again.set_generation(7);
    let content = ExtentContent::new(&io, 9, Arc::new(again));
    for at in 0..16u64 {
        content.read_with(at << 17, 128 << 10, Borrower::PageCache, &mut |_| {}).unwrap();
    }
    wait_for_reads(&io, chunk + (9 << 20) + (3 << 20));
}

#[test]
fn a_missing_device_is_an_error_for_everybody_who_waits() {
    let folder = tempfile::tempdir().unwrap();
    let io = images(folder.path(), 1, 4 << 20);
    let data = pattern(1 << 20, 1);
    let layout = region(&io, 9, &data);
    // Cut the image short under the pool.
    std::fs::OpenOptions::new()
        .write(true)
        .open(folder.path().join("image0"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut buf = vec![0; 1 << 20];
                let error =
                    io.reader().read_at(Source { node: 9, layout: &layout }, 0, &mut buf).unwrap_err();
                assert!(error.chain().contains("image0"), "{}", error.chain());
            });
        }
    });
    assert_eq!(io.tier().stats().used_bytes, 0);
}
