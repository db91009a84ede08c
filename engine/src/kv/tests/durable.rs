//! What is held back while a commit is late, and what an open reads.

use std::ops::Range;

use nvme::FaultIo;

use super::*;

/// A store with the window that stores have by default; its next flush takes `pause`.
fn late(rig: &Rig, pause: Duration, deadline: Duration) -> (Store, View, Lane) {
    let options = StoreOptions { window: StoreOptions::default().window, deadline, ..rig.options() };
    let store = Store::open(&rig.pool(), options).unwrap();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    // The first slab is made, and nothing is under way.
    put(&mut lane, &view, [0]);
    store.flush().unwrap();
    let mut first = true;
    rig.plan.choose(move |io| {
        let slow = io.verb == Verb::Flush && std::mem::take(&mut first);
        slow.then_some(Fault::Sleep(pause))
    });
    (store, view, lane)
}

/// Waits until a commit has been under way for longer than the window.
fn until_it_is_late(store: &Store) {
    let window = store.shared().options.window;
    while store.shared().state().committing_since.is_none_or(|since| since.elapsed() <= window) {
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn nothing_is_acknowledged_while_a_commit_is_late() {
    let rig = Rig::new(1, 4 << 20);
    let (store, view, mut lane) = late(&rig, Duration::from_millis(600), Duration::from_secs(30));
    let commits = store.stat().commits;
    assert!(all_new(&put(&mut lane, &view, [1])));
    until_it_is_late(&store);
    assert!(all_new(&put(&mut lane, &view, [2])));
    assert!(store.stat().commits > commits, "acknowledged while an older block was late");
    assert_eq!(rig.plan.fired().len(), 1);
    kill(&store, (lane, view));
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    assert!(view.contains(&[key(1)])[0]);
}

#[test]
fn a_put_that_is_held_back_ends_at_its_deadline() {
    let rig = Rig::new(1, 4 << 20);
    let (store, view, mut lane) = late(&rig, Duration::from_secs(2), Duration::from_millis(100));
    assert!(all_new(&put(&mut lane, &view, [1])));
    until_it_is_late(&store);
    // What is new and what is there already: that it is there is an acknowledgement, too.
    for n in [2, 1] {
        let stored = put(&mut lane, &view, [n]).pop().unwrap();
        let timeout = matches!(&stored, Stored::Failed(error) if error.kind() == ErrorKind::Timeout);
        assert!(timeout, "block {n}: {stored:?}");
    }
    // The drive answers at last, and all is well.
    drop((lane, view));
    store.flush().unwrap();
    assert_eq!(store.stat().failed, "");
    store.close().unwrap();
}

/// Where the blocks of a store lie on its only member.
fn data(store: &Store) -> Vec<Range<u64>> {
    let state = store.shared().state();
    let pieces = |slab: &Arc<crate::pool::slab::Slab>| -> Vec<Range<u64>> {
        slab.range(0, slab.len()).map(|piece| piece.offset..piece.offset + piece.len).collect()
    };
    state.slabs.values().flat_map(|slab| pieces(&slab.slab)).collect()
}

fn reads(log: &[FaultIo]) -> impl Iterator<Item = &FaultIo> {
    log.iter().filter(|io| io.verb == Verb::Read)
}

fn touches(log: &[FaultIo], data: &[Range<u64>]) -> bool {
    reads(log).any(|io| data.iter().any(|range| io.offset < range.end && range.start < io.offset + io.len))
}

/// Blocks that are put before each flush.
const BATCH: u64 = 256;
/// Entries of a page of the index, and pages after which a log has ended: docs/format.md.
const ENTRIES: u64 = (4096 - 40) / 64;
const GAP: u64 = 256;

/// Bytes that opening a store of so many blocks reads. `whole`: its index is a checkpoint; otherwise changes since an early one.
fn opening(blocks: u64, whole: bool) -> u64 {
    const SMALL: u32 = 4096;
    let rig = Rig::new(1, blocks * 4096 + (64 << 20));
    let budget_bytes = Some(blocks * 4096 + (32 << 20));
    let slab_bytes = Some(4 << 20);
    let options = || StoreOptions { budget_bytes, slab_bytes, log_pages: 1024, ..rig.options() };
    let store = Store::open(&rig.pool(), options()).unwrap();
    let view = store.view(PRINT, SMALL, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    for first in (0..blocks).step_by(BATCH as usize) {
        assert!(all_new(&put(&mut lane, &view, first..first + BATCH)));
        store.flush().unwrap();
    }
    if whole {
        store.checkpoint().unwrap();
        drop((lane, view));
        store.close().unwrap();
    } else {
        kill(&store, (lane, view));
    }
    let pool = rig.pool();
    rig.plan.keep_log();
    let store = Store::open(&pool, options()).unwrap();
    let opened = rig.plan.log();
    let data = data(&store);
    assert_eq!(store.stat().blocks, blocks);
    assert!(data.iter().map(|range| range.end - range.start).sum::<u64>() >= blocks * 4096);
    assert!(!touches(&opened, &data), "an open reads blocks");
    // What would have shown it.
    let view = store.view(PRINT, SMALL, "").unwrap();
    assert_eq!(hits(&mut store.lane(None).unwrap(), &view, [0, blocks - 1]), [true; 2]);
    assert!(touches(&rig.plan.log(), &data));
    reads(&opened).map(|io| io.len).sum()
}

#[test]
fn an_open_reads_the_index_and_no_block() {
    const N: u64 = 8 * BATCH;
    for whole in [true, false] {
        for blocks in [N, 4 * N] {
            let bytes = opening(blocks, whole);
            let pages = match whole {
                true => blocks.div_ceil(ENTRIES),
                // Each commit begins a page.
                false => blocks / BATCH * BATCH.div_ceil(ENTRIES),
            };
            println!("{blocks} blocks, whole: {whole}: {bytes} bytes are read for {pages} pages");
            // The headers of both logs, records of other kinds, and the end of the log, which is read in steps.
            let most = (pages + 4 + 2 * GAP) * 4096;
            assert!((pages * 4096..=most).contains(&bytes), "{bytes} bytes for {pages} pages");
        }
    }
}
