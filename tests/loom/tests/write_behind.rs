//! Permits, wake-ups and the end of write-behind.
#![forbid(unsafe_code)]

use std::sync::Arc;

use loom::thread;
use models::check;
use models::drafts::{Draft, RUN, assert_written};
use models::write_behind::WriteBehind;

/// Two drafts share room for one run: both get it in turn, never both at once, and are told of each run once.
fn two_drafts_with_room_for_one(threads: usize) {
    let device = Draft::device(4);
    let behind = Arc::new(WriteBehind::new(threads, RUN, None).unwrap());
    let (one, two) = (Draft::new(&behind, &device), Draft::new(&behind, &device));
    let other = {
        let (two, behind) = (two.clone(), behind.clone());
        thread::spawn(move || {
            two.gather(1);
            assert!(behind.dirty_bytes() <= RUN);
            two.finish();
            assert_eq!(two.told(), [1]);
        })
    };
    one.gather(0);
    assert!(behind.dirty_bytes() <= RUN);
    one.finish();
    assert_eq!(one.told(), [0]);
    other.join().unwrap();
    assert_eq!(behind.dirty_bytes(), 0);
    assert_written(&device, [0, 1]);
}

#[test]
fn two_drafts_share_room_for_one_run() {
    check("two drafts, one writer", 3, || two_drafts_with_room_for_one(1));
}

#[test]
fn two_drafts_share_room_for_one_run_in_step() {
    check("two drafts, in step", 3, || two_drafts_with_room_for_one(0));
}

/// A draft holds all room and writes no more: who waits gets it handed over, or would wait for ever.
#[test]
fn room_that_is_merely_held_is_handed_over() {
    check("room that is held", 3, || {
        let device = Draft::device(4);
        let behind = Arc::new(WriteBehind::new(1, RUN, None).unwrap());
        let (idle, busy) = (Draft::new(&behind, &device), Draft::new(&behind, &device));
        idle.gather(0);
        let waits = {
            let busy = busy.clone();
            thread::spawn(move || {
                busy.gather(1);
                busy.finish();
                assert_eq!(busy.told(), [1]);
            })
        };
        waits.join().unwrap();
        assert_eq!(idle.told(), [0]);
        assert_eq!(behind.dirty_bytes(), 0);
        assert_written(&device, [0, 1]);
    });
}

/// The end comes while runs are queued: all are written and told of first.
#[test]
fn dropping_it_writes_what_was_handed_over() {
    check("end with two writers", 3, || {
        let device = Draft::device(4);
        let behind = Arc::new(WriteBehind::new(2, 2 * RUN, None).unwrap());
        let draft = Draft::new(&behind, &device);
        draft.gather(0);
        draft.gather(1);
        draft.finish();
        drop(behind);
        // The last holder may now be this thread or, through the run it finishes, a writer.
        drop(draft);
    });
}

/// The same, seen by what is on the device once all threads have ended: the caller holds write-behind longest.
#[test]
fn nothing_handed_over_is_lost_at_the_end() {
    check("end after a draft", 3, || {
        let device = Draft::device(4);
        let behind = Arc::new(WriteBehind::new(1, 2 * RUN, None).unwrap());
        let draft = Draft::new(&behind, &device);
        draft.gather(0);
        draft.finish();
        drop(draft);
        match Arc::try_unwrap(behind) {
            Ok(behind) => {
                drop(behind);
                assert_written(&device, [0]);
            }
            // The draft lives on in its run; whoever is last ends the threads.
            Err(behind) => drop(behind),
        }
    });
}
