//! Loads that go on while others are used, on drives that go wrong meanwhile.

use super::*;

fn ask(view: &View, n: u64) -> (u64, Get) {
    (n, Get { key: key(n), buffer: Buffer::heap(view.slot_bytes()).unwrap(), start: 0 })
}

/// Whatever goes wrong on the way, each block comes once: right, or as a miss.
#[test]
fn every_load_has_one_answer() {
    for seed in 0..40 {
        println!("seed {seed}");
        let mut rng = nvme::SimRng::new(seed);
        let rig = Rig::new(1 + (seed % 3) as usize, 4 << 20);
        let store = rig.store();
        let view = store.view(PRINT, BLOCK, "").unwrap();
        let mut lane = store.lane(None).unwrap();
        assert!(all_new(&put(&mut lane, &view, 0..40)));
        store.flush().unwrap();
        let mut faults = nvme::SimRng::new(seed ^ 0xf0);
        rig.plan.choose(move |io| match faults.in_range(0..12) {
            0 if io.verb == Verb::Read => Some(Fault::Errno(5)),
            1 if io.verb == Verb::Read => Some(Fault::FlipBit(faults.in_range(0..4096))),
            2 if io.verb == Verb::Read && faults.in_range(0..8) == 0 => Some(Fault::Hang),
            _ => None,
        });
        let (mut next, mut good, mut bad) = (0, 0, 0);
        loop {
            for _ in 0..rng.in_range(0..6) {
                if next < 45 {
                    lane.begin_gets(&view, vec![ask(&view, next)]).unwrap();
                    next += 1;
                }
            }
            match lane.next_get().unwrap() {
                Some((n, done)) if done.result.is_ok() => {
                    good += 1;
                    assert!(
                        done.buffer.unwrap()[..BLOCK as usize] == content(n, BLOCK as usize),
                        "block {n}"
                    );
                }
                Some(_) => bad += 1,
                None if next == 45 => break,
                None => {}
            }
        }
        rig.plan.lift();
        assert!(good > 0 && bad >= 5 && good + bad == 45, "{good} came, {bad} did not");
        let stat = store.stat();
        assert_eq!((stat.hits, stat.misses), (good, bad));
        // The lane is as good as new.
        assert!(all_new(&put(&mut lane, &view, 100..104)));
        assert_eq!(hits(&mut lane, &view, 100..104), [true; 4]);
    }
}

#[test]
fn nothing_else_is_done_on_a_lane_while_it_loads() {
    let rig = Rig::new(1, 4 << 20);
    let store = rig.store();
    let view = store.view(PRINT, BLOCK, "").unwrap();
    let mut lane = store.lane(None).unwrap();
    assert!(all_new(&put(&mut lane, &view, 0..4)));
    lane.begin_gets(&view, vec![ask(&view, 1), ask(&view, 9)]).unwrap();
    assert_eq!(lane.gets_under_way(), 2);
    assert_eq!(lane.put(&view, vec![]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(lane.get(&view, vec![]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let mut came: Vec<(u64, bool)> =
        std::iter::from_fn(|| lane.next_get().unwrap()).map(|(n, done)| (n, done.result.is_ok())).collect();
    came.sort_unstable();
    assert_eq!(came, [(1, true), (9, false)]);
    assert_eq!((lane.gets_under_way(), hits(&mut lane, &view, 0..4)), (0, vec![true; 4]));
}
