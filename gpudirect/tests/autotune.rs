//! Settings of a lane: measured, remembered, given.

mod common;

use std::collections::HashMap;

use common::{checkpoint, contents, fake, load, pattern, plan};
use gpudirect::autotune::{Given, Origin, Tune, Tuner};
use gpudirect::driver::fake::FakeOptions;
use gpudirect::paths::System;
use gpudirect::remembered::Remembered;
use gpudirect::{CachePolicy, Cancel, Control, ErrorKind, Lane, LaneOptions, PlanOptions};

fn tuner(folder: &std::path::Path) -> Tuner {
    Tuner::of(System::here(), Remembered::at(folder.join("cache/tuning.json")))
}

#[test]
fn a_measurement_changes_settings_not_bytes_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let bytes = pattern(1, 65 << 20);
    checkpoint(&path, &[("a", bytes.clone())]);
    let expected = HashMap::from([("a".to_owned(), bytes)]);
    for policy in [CachePolicy::Auto, CachePolicy::Direct] {
        let Ok(plan) = plan(std::slice::from_ref(&path), policy, &PlanOptions::default()) else {
            println!("skipped: direct I/O on {}", folder.path().display());
            continue;
        };
        let (device, driver) = fake(FakeOptions::default());
        let mut lane = Lane::new(driver, LaneOptions { ring: 32 << 20, ..LaneOptions::default() }).unwrap();
        let tuner = tuner(&folder.path().join(format!("{policy:?}")));
        let settle = |lane: &mut Lane, given, tune| {
            tuner.settle(lane, plan.sources(), given, tune, &mut Control::default()).unwrap()
        };
        // Too small a load to measure for by itself; nothing is known yet.
        assert_eq!(settle(&mut lane, Given::default(), Tune::FirstUse), None);
        assert_eq!(settle(&mut lane, Given::default(), Tune::Never), None);
        assert_eq!(lane.options().origin, Origin::Default);
        let note = settle(&mut lane, Given::default(), Tune::Now).unwrap();
        assert!(note.contains("GB/s"), "{note}");
        let measured = lane.options().clone();
        assert_eq!((measured.origin, measured.ring), (Origin::Measured, 32 << 20));
        assert_eq!(settle(&mut lane, Given::default(), Tune::FirstUse), None);
        assert_eq!(*lane.options(), LaneOptions { origin: Origin::Remembered, ..measured });
        let loaded = load(&mut lane, &plan).unwrap();
        assert_eq!(loaded.report.settings.origin, Origin::Remembered);
        assert!(contents(&lane, &loaded) == expected);
        drop((loaded, lane));
        assert_eq!(device.leaks(), [""; 0]);
    }
}

#[test]
fn a_measurement_that_cannot_be_made_leaves_the_settings_and_is_given_up_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    checkpoint(&path, &[("a", pattern(1, 65 << 20))]);
    let small = folder.path().join("s.safetensors");
    checkpoint(&small, &[("b", pattern(1, 1000))]);
    let large = plan(&[path], CachePolicy::Auto, &PlanOptions::default()).unwrap();
    let few = plan(&[small], CachePolicy::Auto, &PlanOptions::default()).unwrap();
    let (device, driver) = fake(FakeOptions { memory_bytes: 1 << 20, ..FakeOptions::default() });
    let mut lane = Lane::new(driver, LaneOptions { ring: 32 << 20, ..LaneOptions::default() }).unwrap();
    let before = lane.options().clone();
    let tuner = tuner(folder.path());
    let none = Given::default();
    let note = tuner.settle(&mut lane, large.sources(), none, Tune::Now, &mut Control::default()).unwrap();
    assert!(note.unwrap().contains("bytes on the simulated device"));
    let note = tuner.settle(&mut lane, few.sources(), none, Tune::Now, &mut Control::default()).unwrap();
    assert!(note.unwrap().contains("too small"));
    device.set(FakeOptions::default());
    let cancel = Cancel::new();
    cancel.cancel();
    let mut control = Control { cancel, ..Control::default() };
    let error = tuner.settle(&mut lane, large.sources(), none, Tune::Now, &mut control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    let given = Given { chunk: Some(1 << 20), depth: Some(3), threads: Some(5) };
    let note = tuner.settle(&mut lane, large.sources(), given, Tune::Now, &mut Control::default()).unwrap();
    assert!(note.unwrap().contains("given"));
    assert_eq!(*lane.options(), before);
    drop(lane);
    assert_eq!(device.leaks(), [""; 0]);
}
