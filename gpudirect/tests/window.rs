//! Windows: addresses that stay while memory comes and goes, on host memory and on the simulated device.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::{fake, pattern, small};
use gpudirect::driver::fake::FakeOptions;
use gpudirect::driver::host::HostDriver;
use gpudirect::{CachePolicy, Control, Driver, ErrorKind, Lane, Pin, Source, Window};
use proptest::prelude::*;

/// A page of host memory and of the simulated device.
const PAGE: u64 = 64 << 10;

fn source(folder: &tempfile::TempDir, bytes: &[u8]) -> Source {
    let path = folder.path().join("region");
    std::fs::write(&path, bytes).unwrap();
    Source::file(path, CachePolicy::Auto).unwrap()
}

fn ensure(
    window: &Window,
    lane: &mut Lane,
    source: &Source,
    range: std::ops::Range<u64>,
) -> gpudirect::Result<Pin> {
    window.ensure(lane, source, 0, range, &mut Control::default())
}

fn seen(window: &Window, lane: &Lane, range: std::ops::Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    lane.read_device(window.address() + range.start, &mut bytes).unwrap();
    bytes
}

#[test]
fn bytes_come_and_go_and_come_again_at_the_same_addresses() {
    for device in ["fake", "cpu"] {
        let (fake, driver) = match device {
            "fake" => {
                let (fake, driver) = fake(FakeOptions::default());
                (Some(fake), driver)
            }
            _ => (None, Arc::new(HostDriver::new()) as Arc<dyn Driver>),
        };
        let folder = tempfile::tempdir().unwrap();
        // The last page is not whole.
        let bytes = pattern(1, 10 * PAGE as usize - 1000);
        let source = source(&folder, &bytes);
        let mut lane = Lane::new(driver.clone(), small()).unwrap();
        let window = Window::new(&driver, bytes.len() as u64, 3 * PAGE + 5).unwrap();
        assert_eq!((window.page_bytes(), window.budget_bytes()), (PAGE, 3 * PAGE));
        let address = window.address();
        for round in 0..3 {
            for page in 0..10u64 {
                let range = page * PAGE..((page + 1) * PAGE).min(bytes.len() as u64);
                let pin = ensure(&window, &mut lane, &source, range.clone()).unwrap();
                assert!(
                    seen(&window, &lane, range.clone()) == bytes[range.start as usize..range.end as usize],
                    "{device}, round {round}, page {page}"
                );
                drop(pin);
                assert!(window.stats().physical_bytes <= 3 * PAGE);
            }
        }
        assert_eq!(window.address(), address);
        let stats = window.stats();
        assert_eq!((stats.fills, stats.evictions, stats.resident_bytes), (30, 27, 3 * PAGE), "{device}");
        drop((window, lane));
        if let Some(fake) = fake {
            assert_eq!(fake.leaks(), [""; 0]);
        }
    }
}

#[test]
fn what_is_pinned_stays_and_what_cannot_fit_changes_nothing() {
    let (device, driver) = fake(FakeOptions::default());
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(2, 8 * PAGE as usize);
    let source = source(&folder, &bytes);
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    let window = Window::new(&driver, bytes.len() as u64, 4 * PAGE).unwrap();
    let first = ensure(&window, &mut lane, &source, 10..PAGE + 10).unwrap();
    let other = ensure(&window, &mut lane, &source, 4 * PAGE..5 * PAGE).unwrap();
    drop(ensure(&window, &mut lane, &source, 7 * PAGE..8 * PAGE).unwrap());
    // Three are pinned, one more is there: two more do not fit, and nothing is evicted for the attempt.
    let error = ensure(&window, &mut lane, &source, 5 * PAGE..7 * PAGE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory, "{error}");
    assert!(error.to_string().contains("196608 bytes of its budget of 262144 are pinned"), "{error}");
    assert!(window.is_resident(7 * PAGE..8 * PAGE));
    // One does, in the place of the one that is not pinned.
    let third = ensure(&window, &mut lane, &source, 5 * PAGE..6 * PAGE).unwrap();
    assert!(!window.is_resident(7 * PAGE..8 * PAGE));
    assert!(seen(&window, &lane, 0..2 * PAGE) == bytes[..2 * PAGE as usize]);
    // More than the budget never fits.
    drop((first, other, third));
    assert!(ensure(&window, &mut lane, &source, 0..5 * PAGE).is_err());
    assert_eq!(window.stats().resident_bytes, 4 * PAGE);
    // Released by whole pages that nobody holds.
    let held = ensure(&window, &mut lane, &source, 0..1).unwrap();
    assert_eq!(window.release(0..bytes.len() as u64).unwrap(), 3 * PAGE);
    assert!(window.is_resident(0..1) && !window.is_resident(PAGE..PAGE + 1));
    drop(held);
    assert_eq!(window.release(1..bytes.len() as u64).unwrap(), 0, "a page is released whole or not at all");
    assert_eq!(window.release(0..PAGE).unwrap(), PAGE);
    // Nothing at all is fine.
    drop(ensure(&window, &mut lane, &source, 5..5).unwrap());
    assert!(ensure(&window, &mut lane, &source, 0..bytes.len() as u64 + 1).is_err());
    let mut there = [0];
    assert!(lane.read_device(window.address(), &mut there).is_err(), "no memory, no bytes");
    drop((window, lane));
    assert_eq!(device.leaks(), [""; 0]);
}

#[test]
fn the_page_that_was_asked_for_longest_ago_gives_way() {
    let (_, driver) = fake(FakeOptions::default());
    let window = Window::new(&driver, 8 * PAGE, 3 * PAGE).unwrap();
    let touch = |page: u64| {
        let mut filled = Vec::new();
        drop(
            window
                .ensure_with(page * PAGE..page * PAGE + 1, &mut |missing| {
                    filled.extend_from_slice(missing);
                    Ok(())
                })
                .unwrap(),
        );
        filled
    };
    let first = touch(0);
    assert_eq!((first.len(), first[0].clone()), (1, 0..PAGE));
    touch(1);
    touch(2);
    assert!(touch(0).is_empty());
    touch(3);
    assert!(window.is_resident(0..1) && !window.is_resident(PAGE..PAGE + 1));
    // Neighbours that are missing come as one range.
    let mut filled = Vec::new();
    let fill = &mut |missing: &[std::ops::Range<u64>]| {
        filled.extend_from_slice(missing);
        Ok(())
    };
    drop(window.ensure_with(4 * PAGE..6 * PAGE + 1, fill).unwrap());
    assert_eq!(filled.len(), 1);
    assert_eq!(filled[0], 4 * PAGE..7 * PAGE);
}

#[test]
fn after_an_error_of_any_call_the_window_is_whole_and_can_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(3, 6 * PAGE as usize);
    let mut failures = 0;
    for fail_call in 1.. {
        let (device, driver) = fake(FakeOptions::default());
        let source = source(&folder, &bytes);
        let mut lane = Lane::new(driver.clone(), small()).unwrap();
        let window = Window::new(&driver, bytes.len() as u64, 3 * PAGE).unwrap();
        let held = ensure(&window, &mut lane, &source, 0..PAGE).unwrap();
        drop(ensure(&window, &mut lane, &source, PAGE..3 * PAGE).unwrap());
        device.set(FakeOptions { fail_call, ..FakeOptions::default() });
        let result = ensure(&window, &mut lane, &source, 3 * PAGE..5 * PAGE);
        let calls = device.calls();
        device.set(FakeOptions::default());
        let failed = result.is_err();
        if failed {
            failures += 1;
            assert!(!window.is_resident(3 * PAGE..3 * PAGE + 1) && !window.is_resident(4 * PAGE..5 * PAGE));
        }
        drop(result);
        assert!(window.stats().physical_bytes <= 3 * PAGE);
        assert!(seen(&window, &lane, 0..PAGE) == bytes[..PAGE as usize], "what is pinned, call {fail_call}");
        let pin = ensure(&window, &mut lane, &source, 4 * PAGE..6 * PAGE).unwrap();
        assert!(seen(&window, &lane, 4 * PAGE..6 * PAGE) == bytes[4 * PAGE as usize..], "call {fail_call}");
        drop((pin, held, window, lane));
        assert_eq!(device.leaks(), [""; 0]);
        if !failed && fail_call > calls {
            break;
        }
    }
    assert!(failures >= 4, "{failures}");
}

#[test]
fn a_fill_that_panics_leaves_nothing_that_was_not_filled() {
    let (device, driver) = fake(FakeOptions::default());
    let window = Window::new(&driver, 4 * PAGE, 2 * PAGE).unwrap();
    let other = window.clone();
    let died =
        std::thread::spawn(move || other.ensure_with(0..PAGE, &mut |_| panic!("on purpose")).map(drop))
            .join();
    assert!(died.is_err());
    assert!(!window.is_resident(0..1));
    let mut asked = 0;
    drop(
        window
            .ensure_with(0..2 * PAGE, &mut |missing| {
                asked = missing[0].end;
                Ok(())
            })
            .unwrap(),
    );
    assert_eq!(asked, 2 * PAGE);
    drop(window);
    assert_eq!(device.leaks(), [""; 0]);
}

#[test]
fn a_file_that_is_cut_short_is_no_page() {
    let (_, driver) = fake(FakeOptions::default());
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(4, 4 * PAGE as usize);
    let source = source(&folder, &bytes);
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    let window = Window::new(&driver, bytes.len() as u64, 4 * PAGE).unwrap();
    drop(ensure(&window, &mut lane, &source, 0..PAGE).unwrap());
    let file = std::fs::File::options().write(true).open(folder.path().join("region")).unwrap();
    file.set_len(2 * PAGE + 1).unwrap();
    let error = ensure(&window, &mut lane, &source, PAGE..3 * PAGE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
    assert!(window.is_resident(0..PAGE) && !window.is_resident(PAGE..2 * PAGE));
}

#[test]
fn changed_bytes_can_be_written_back() {
    let (_, driver) = fake(FakeOptions::default());
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(5, 4 * PAGE as usize);
    let source = source(&folder, &bytes);
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    let window = Window::new(&driver, bytes.len() as u64, 2 * PAGE).unwrap();
    let pin = ensure(&window, &mut lane, &source, PAGE..3 * PAGE).unwrap();
    let target = folder.path().join("target");
    std::fs::write(&target, vec![0; 4 * PAGE as usize]).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&target).unwrap();
    let device = nvme::FileDevice::from_file(file, "target", false).unwrap();
    let range = PAGE + 7..2 * PAGE + 9;
    window.write_back(&lane, &pin, range.clone(), &device, 100).unwrap();
    let there = std::fs::read(&target).unwrap();
    assert!(there[100..100 + PAGE as usize + 2] == bytes[range.start as usize..range.end as usize]);
    assert!(window.write_back(&lane, &pin, 0..PAGE, &device, 0).is_err(), "not pinned");
}

#[test]
fn senseless_windows_are_refused() {
    let (device, driver) = fake(FakeOptions { memory_bytes: 2 * PAGE, ..FakeOptions::default() });
    assert_eq!(Window::new(&driver, 10 * PAGE, PAGE - 1).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(Window::new(&driver, u64::MAX, PAGE).unwrap_err().kind(), ErrorKind::Invalid);
    // A device that has less than the budget says so when it is used up, and what was there stays.
    let window = Window::with_page(&driver, 10 * PAGE, 4 * PAGE, 3000).unwrap();
    let fill = &mut |_: &[std::ops::Range<u64>]| Ok(());
    let pin = window.ensure_with(0..2 * PAGE, fill).unwrap();
    let error = window.ensure_with(2 * PAGE..3 * PAGE, fill).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory, "{error}");
    assert!(window.is_resident(0..2 * PAGE));
    drop(pin);
    drop(window);
    assert_eq!(device.leaks(), [""; 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is asked for, held and let go of: the budget holds, what is pinned has its bytes, the rest is there or not.
    #[test]
    fn any_order_of_calls_keeps_budget_and_bytes(
        steps in prop::collection::vec((0u8..5, 0u64..12, 1u64..4, any::<prop::sample::Index>()), 1..40),
        budget in 2u64..6,
    ) {
        let (device, driver) = fake(FakeOptions::default());
        let folder = tempfile::tempdir().unwrap();
        let bytes = pattern(6, 12 * PAGE as usize);
        let source = source(&folder, &bytes);
        let mut lane = Lane::new(driver.clone(), small()).unwrap();
        let window = Window::new(&driver, bytes.len() as u64, budget * PAGE).unwrap();
        let mut pins: Vec<(Pin, std::ops::Range<u64>)> = Vec::new();
        for (what, page, count, which) in steps {
            let range = page * PAGE..(page + count).min(12) * PAGE;
            match what {
                0..3 => {
                    let needed: BTreeSet<u64> = pins
                        .iter()
                        .flat_map(|(_, range)| range.start / PAGE..range.end / PAGE)
                        .chain(range.start / PAGE..range.end / PAGE)
                        .collect();
                    match ensure(&window, &mut lane, &source, range.clone()) {
                        Ok(pin) => {
                            prop_assert!(needed.len() as u64 <= budget);
                            pins.push((pin, range));
                        }
                        Err(_) => prop_assert!(needed.len() as u64 > budget),
                    }
                }
                3 if !pins.is_empty() => drop(pins.swap_remove(which.index(pins.len()))),
                _ => {
                    window.release(range).unwrap();
                }
            }
            prop_assert!(window.stats().physical_bytes <= budget * PAGE);
            prop_assert!(device.physical_bytes() == window.stats().physical_bytes);
            for (_, range) in &pins {
                prop_assert!(window.is_resident(range.clone()));
                prop_assert!(seen(&window, &lane, range.clone()) == bytes[range.start as usize..range.end as usize]);
            }
        }
        drop((pins, window, lane));
        prop_assert_eq!(device.leaks(), Vec::<String>::new());
    }
}
