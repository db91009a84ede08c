//! Loads from files to the simulated device and to host memory: every byte, every way to fail.

mod common;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{checkpoint, contents, fake, load, pattern, plan, small, two_files};
use gpudirect::driver::fake::{FakeOptions, POISON};
use gpudirect::driver::host::HostDriver;
use gpudirect::{
    CachePolicy, Cancel, Control, DeviceMemory, Driver, ErrorKind, Lane, LaneOptions, PathOptions, Paths,
    PlanOptions, Priority, Shard,
};
use nvme::Backend;
use safetensors::tensor::{Dtype, TensorView};

#[test]
fn every_byte_of_every_tensor_arrives_in_every_way() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    for policy in [CachePolicy::Auto, CachePolicy::Direct, CachePolicy::Buffered] {
        for (chunk, depth, gap, backend, lag) in [
            (64 << 10, 1, 0, Backend::Auto, 0),
            (64 << 10, 4, 4 << 10, Backend::Auto, 100),
            (1 << 20, 8, 1 << 20, Backend::Threads, 3),
        ] {
            let what = format!("{policy:?}, chunk {chunk}, depth {depth}, gap {gap}, {backend}, lag {lag}");
            let (device, driver) = fake(FakeOptions { lag, ..FakeOptions::default() });
            let options = LaneOptions { chunk, depth, gap, backend, ring: 8 * chunk, ..small() };
            let mut lane = Lane::new(driver, options).unwrap();
            let plan = match plan(&paths, policy, &PlanOptions::default()) {
                Ok(plan) => plan,
                Err(error) if policy == CachePolicy::Direct => {
                    println!("skipped: direct I/O on {}: {error}", folder.path().display());
                    continue;
                }
                Err(error) => panic!("{what}: {error}"),
            };
            let loaded = load(&mut lane, &plan).unwrap();
            assert!(contents(&lane, &loaded) == expected, "{what}: other bytes");
            let report = &loaded.report;
            let bytes: usize = expected.values().map(Vec::len).sum();
            assert_eq!(
                (report.bytes, report.tensors, report.sources),
                (bytes as u64, expected.len(), 2),
                "{what}"
            );
            assert!(
                report.read_bytes >= report.bytes && report.device_extra_bytes < 256 * report.tensors as u64
            );
            assert!(loaded.tensors.iter().all(|tensor| tensor.address % 256 == 0), "{what}: not aligned");
            drop((loaded, lane));
            assert_eq!(device.leaks(), [""; 0], "{what}");
        }
    }
}

#[test]
fn host_memory_is_a_device_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let mut lane = Lane::new(Arc::new(HostDriver::new()), small()).unwrap();
    let plan = plan(&paths, CachePolicy::Auto, &PlanOptions::default()).unwrap();
    for _ in 0..2 {
        let loaded = load(&mut lane, &plan).unwrap();
        assert!(contents(&lane, &loaded) == expected);
    }
}

#[test]
fn filters_choose_and_parts_are_those_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let shape = [6usize, 10, 32];
    let bytes = pattern(3, shape.iter().product::<usize>() * 2);
    let view = || TensorView::new(Dtype::BF16, shape.to_vec(), &bytes).unwrap();
    let views = vec![("a.proj", view()), ("b.norm", view())];
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let (_, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, small()).unwrap();
    for (dim, world) in [(0, 3u32), (1, 5), (2, 4), (1, 1)] {
        for rank in 0..world {
            let shard = Shard { rank, world, rules: vec![("*.proj".into(), dim)] };
            let options = PlanOptions { filters: vec!["a.*".into()], shard: Some(shard) };
            let plan = plan(std::slice::from_ref(&path), CachePolicy::Auto, &options).unwrap();
            let loaded = load(&mut lane, &plan).unwrap();
            assert_eq!(loaded.tensors.len(), 1);
            let part = shape[dim] / world as usize;
            let outer: usize = shape[..dim].iter().product();
            let inner: usize = shape[dim + 1..].iter().product::<usize>() * 2;
            let expected: Vec<u8> = (0..outer)
                .flat_map(|row| {
                    let start = (row * shape[dim] + rank as usize * part) * inner;
                    bytes[start..start + part * inner].to_vec()
                })
                .collect();
            assert!(
                contents(&lane, &loaded)["a.proj"] == expected,
                "dimension {dim}, rank {rank} of {world}"
            );
        }
    }
    let none = plan(
        std::slice::from_ref(&path),
        CachePolicy::Auto,
        &PlanOptions { filters: vec!["c*".into()], shard: None },
    )
    .unwrap_err();
    assert_eq!(none.kind(), ErrorKind::NotFound);
    let twice = plan(&[path.clone(), path], CachePolicy::Auto, &PlanOptions::default()).unwrap_err();
    assert!(twice.to_string().contains("is both in"), "{twice}");
}

#[test]
fn a_gguf_file_is_loaded_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    // Version 3, two tensors, no key-values; dimensions are written innermost first.
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(2u64.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    let tensors = [("q", 2u32, vec![64u64, 10], 64 * 10 / 32 * 18), ("f", 0, vec![7], 28)];
    let mut data: Vec<u8> = Vec::new();
    let mut expected = HashMap::new();
    for (i, (name, kind, dims, len)) in tensors.iter().enumerate() {
        file.extend((name.len() as u64).to_le_bytes());
        file.extend(name.as_bytes());
        file.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
        file.extend(kind.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        let bytes = pattern(i as u64, *len);
        data.extend(&bytes);
        data.resize(data.len().next_multiple_of(32), 0);
        expected.insert((*name).to_owned(), bytes);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    std::fs::write(&path, file).unwrap();
    let (_, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, small()).unwrap();
    let loaded =
        load(&mut lane, &plan(&[path], CachePolicy::Auto, &PlanOptions::default()).unwrap()).unwrap();
    assert!(contents(&lane, &loaded) == expected);
    assert_eq!(loaded.tensors.iter().find(|t| t.name == "q").unwrap().shape, [10, 64]);
}

/// 20,000 tensors of 4 KiB: neighbours in the file are neighbours on the device, so copies are few.
#[test]
fn small_tensors_share_reads_and_copies() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let bytes = pattern(1, 4096 * 20_000);
    let names: Vec<String> = (0..20_000).map(|i| format!("t{i:05}")).collect();
    let views: Vec<_> = names
        .iter()
        .zip(bytes.chunks(4096))
        .map(|(name, part)| (name, TensorView::new(Dtype::U8, vec![4096], part).unwrap()))
        .collect();
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let (_, driver) = fake(FakeOptions::default());
    let options = LaneOptions { chunk: 1 << 20, ring: 16 << 20, ..LaneOptions::default() };
    let mut lane = Lane::new(driver, options).unwrap();
    let loaded =
        load(&mut lane, &plan(&[path], CachePolicy::Auto, &PlanOptions::default()).unwrap()).unwrap();
    assert!(loaded.report.copies < 200, "{:?}", loaded.report);
    assert_eq!(loaded.report.device_extra_bytes, 0);
    let mut all = vec![0; bytes.len()];
    lane.read_device(loaded.tensors[0].address, &mut all).unwrap();
    assert!(all == bytes);
}

/// Each call that the device can refuse is refused once: the load fails, nothing stays taken, and the next load is right.
#[test]
fn a_device_that_fails_anywhere_leaks_nothing_and_loads_the_next_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    checkpoint(&path, &[("a", pattern(1, 700_000)), ("b", pattern(2, 333))]);
    let expected = HashMap::from([("a".to_owned(), pattern(1, 700_000)), ("b".to_owned(), pattern(2, 333))]);
    let (device, driver) = fake(FakeOptions::default());
    let attempt = || {
        let mut lane = Lane::new(driver.clone(), small())?;
        let loaded =
            load(&mut lane, &plan(std::slice::from_ref(&path), CachePolicy::Auto, &PlanOptions::default())?)?;
        Ok::<_, gpudirect::Error>((contents(&lane, &loaded), loaded.tensors.len()))
    };
    attempt().unwrap();
    let mut calls = 0;
    let mut batches = 0;
    for fail in 1.. {
        device.set(FakeOptions { fail_call: fail, ..FakeOptions::default() });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt));
        assert_eq!(device.leaks(), [""; 0], "after call {fail} failed");
        match result {
            // `contents` reads the device to compare, and panics where that fails: that is the test's own call.
            Ok(Ok(_)) if device.calls() < fail => break,
            Ok(Ok(_)) => panic!("call {fail} failed, and nobody said so"),
            Ok(Err(error)) => assert_eq!(error.kind(), ErrorKind::Device, "{error}"),
            Err(_) => {}
        }
        calls = fail;
    }
    for fail in 1.. {
        device.set(FakeOptions { fail_batch: fail, ..FakeOptions::default() });
        let mut lane = Lane::new(driver.clone(), small()).unwrap();
        let result = load(
            &mut lane,
            &plan(std::slice::from_ref(&path), CachePolicy::Auto, &PlanOptions::default()).unwrap(),
        );
        let failed = result.map(drop);
        drop(lane);
        assert_eq!(device.leaks(), [""; 0], "after batch {fail} failed");
        match failed {
            Ok(()) => break,
            Err(error) => assert!(error.to_string().contains("told to fail"), "{error}"),
        }
        batches = fail;
    }
    assert!(calls > 8 && batches > 1, "{calls} calls and {batches} batches were made to fail");
    device.set(FakeOptions::default());
    assert!(attempt().unwrap().0 == expected);
}

#[test]
fn out_of_device_memory_leaks_nothing_and_a_smaller_load_works() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let (device, driver) = fake(FakeOptions { memory_bytes: 1 << 20, ..FakeOptions::default() });
    let mut lane = Lane::new(driver, small()).unwrap();
    let error =
        load(&mut lane, &plan(&paths, CachePolicy::Auto, &PlanOptions::default()).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory);
    assert!(error.to_string().contains("bytes"), "{error}");
    let few = PlanOptions { filters: vec!["*.7.weight".into()], shard: None };
    let loaded = load(&mut lane, &plan(&paths, CachePolicy::Auto, &few).unwrap()).unwrap();
    let there = contents(&lane, &loaded);
    assert_eq!(there.len(), 2);
    assert!(there.iter().all(|(name, bytes)| expected[name] == *bytes));
    // The last tensor keeps the allocation, whatever became of the rest.
    let last = loaded.tensors[1].clone();
    drop((loaded, lane));
    assert_eq!(device.leaks().len(), 1);
    drop(last);
    assert_eq!(device.leaks(), [""; 0]);
}

#[test]
fn a_cancelled_or_late_load_gives_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let (device, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, small()).unwrap();
    let plan = plan(&paths, CachePolicy::Auto, &PlanOptions::default()).unwrap();
    let held = device.leaks();
    let mut seen = Vec::new();
    let mut half = |done: u64, total: u64| {
        seen.push(done);
        done < total / 2
    };
    let mut control = Control { progress: Some(&mut half), ..Control::default() };
    assert_eq!(gpudirect::load(&mut lane, &plan, &mut control).unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(seen.len() > 2 && seen.is_sorted(), "{seen:?}");
    assert_eq!(device.leaks(), held);
    let cancel = Cancel::new();
    cancel.cancel();
    let mut control = Control { cancel, ..Control::default() };
    assert_eq!(gpudirect::load(&mut lane, &plan, &mut control).unwrap_err().kind(), ErrorKind::Cancelled);
    let mut control = Control { deadline: Some(Instant::now()), ..Control::default() };
    assert_eq!(gpudirect::load(&mut lane, &plan, &mut control).unwrap_err().kind(), ErrorKind::Timeout);
    let mut control =
        Control { deadline: Some(Instant::now() + Duration::from_secs(600)), ..Control::default() };
    let loaded = gpudirect::load(&mut lane, &plan, &mut control).unwrap();
    assert!(contents(&lane, &loaded) == expected);
}

/// A background load that was started while a foreground load runs moves nothing before that has ended, and everything after it.
#[test]
fn a_background_load_lets_a_foreground_load_go_first() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let (_, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    let front = plan(&paths, CachePolicy::Auto, &PlanOptions::default()).unwrap();
    let back = plan(&paths, CachePolicy::Auto, &PlanOptions::default()).unwrap();
    // How often the background load was asked whether to go on, and how far it was.
    let asked = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let mut thread = None;
    let (mut back, mut seen) = (Some(back), 0);
    let mut watch = |done: u64, total: u64| {
        if done == 0 || done >= total || seen > 3 {
            return true;
        }
        seen += 1;
        if let Some(back) = back.take() {
            let (driver, asked) = (driver.clone(), asked.clone());
            thread = Some(std::thread::spawn(move || {
                let mut lane = Lane::new(driver, small()).unwrap();
                let mut progress = |done: u64, _: u64| {
                    asked.1.store(done, Ordering::SeqCst);
                    asked.0.fetch_add(1, Ordering::SeqCst);
                    true
                };
                let priority = Priority::Background;
                let mut control = Control { priority, progress: Some(&mut progress), ..Control::default() };
                let loaded = gpudirect::load(&mut lane, &back, &mut control).unwrap();
                contents(&lane, &loaded)
            }));
        }
        // It was asked a few times more, and was as far as before: nowhere.
        let before = asked.0.load(Ordering::SeqCst);
        nvtier_tests::wait_for(|| (asked.0.load(Ordering::SeqCst) >= before + 3).then_some(())).unwrap();
        assert_eq!(asked.1.load(Ordering::SeqCst), 0, "the background load did not wait");
        true
    };
    let mut control = Control { progress: Some(&mut watch), ..Control::default() };
    let loaded = gpudirect::load(&mut lane, &front, &mut control).unwrap();
    assert!(contents(&lane, &loaded) == expected);
    assert!(seen > 0);
    assert!(thread.unwrap().join().unwrap() == expected);
}

/// Tensors go to memory that somebody has already, each to its own place; what lies around it stays as it is.
#[test]
fn a_load_goes_to_memory_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (files, expected) = two_files(folder.path());
    let plan = plan(&files, CachePolicy::Auto, &PlanOptions::default()).unwrap();
    let (device, driver) = fake(FakeOptions { lag: 8, ..FakeOptions::default() });
    let mut lane = Lane::new(driver.clone(), small()).unwrap();
    // In the reverse order, at odd addresses, with gaps of poison between them.
    let gap = 33u64;
    let room =
        DeviceMemory::new(&driver, plan.tensors().iter().map(|t| t.len + gap).sum::<u64>() + gap).unwrap();
    let mut places = vec![0; plan.tensors().len()];
    let mut end = room.address() + gap;
    for (number, tensor) in plan.tensors().iter().enumerate().rev() {
        places[number] = end;
        end += tensor.len + gap;
    }
    let run = |lane: &mut Lane, places: &[u64]| {
        gpudirect::load_into(
            lane,
            &plan,
            places,
            &Paths::here(),
            &PathOptions::default(),
            &mut Control::default(),
        )
    };
    // Places that are no memory, or too few, or where the last byte is beyond its end: refused, and nothing is written.
    let mut beyond = places.clone();
    let last = plan.tensors().iter().position(|tensor| tensor.len > 1 << 20).unwrap();
    beyond[last] = room.address() + room.len() - plan.tensors()[last].len + 1;
    let mut nowhere = places.clone();
    nowhere[last] = 64;
    for bad in [&beyond[..], &nowhere[..]] {
        let error = run(&mut lane, bad).unwrap_err().to_string();
        assert!(error.contains(&plan.tensors()[last].name), "{error}");
    }
    assert_eq!(run(&mut lane, &places[1..]).unwrap_err().kind(), ErrorKind::Invalid);
    let all = |lane: &Lane| {
        let mut bytes = vec![0; room.len() as usize];
        lane.read_device(room.address(), &mut bytes).unwrap();
        bytes
    };
    assert!(all(&lane).iter().all(|byte| *byte == POISON));
    let report = run(&mut lane, &places).unwrap();
    assert_eq!((report.device_bytes, report.device_extra_bytes), (0, 0));
    assert_eq!(report.bytes, plan.tensors().iter().map(|tensor| tensor.len).sum::<u64>());
    let mut wanted = vec![POISON; room.len() as usize];
    for (tensor, place) in plan.tensors().iter().zip(&places) {
        let at = (place - room.address()) as usize;
        wanted[at..at + tensor.len as usize].copy_from_slice(&expected[&tensor.name]);
    }
    assert!(all(&lane) == wanted);
    drop((room, lane));
    assert_eq!(device.leaks(), [""; 0]);
}

#[test]
fn a_file_that_changes_while_it_is_loaded_is_an_error_that_says_how() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(9, 4 << 20);
    type Change = fn(&std::path::Path);
    let changes: [(&str, Change); 4] = [
        ("truncated", |path| File::options().write(true).open(path).unwrap().set_len(1 << 20).unwrap()),
        ("replaced by another file", |path| {
            let other = path.with_extension("new");
            std::fs::copy(path, &other).unwrap();
            std::fs::rename(other, path).unwrap();
        }),
        ("written to", |path| {
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(&[0; 4096], 2 << 20).unwrap();
            file.set_modified(std::time::SystemTime::now() + Duration::from_secs(1)).unwrap();
        }),
        ("removed", |path| std::fs::remove_file(path).unwrap()),
    ];
    for (how, change) in changes {
        for policy in [CachePolicy::Auto, CachePolicy::Buffered] {
            let path = folder.path().join("m.safetensors");
            checkpoint(&path, &[("a", bytes.clone())]);
            let (device, driver) = fake(FakeOptions::default());
            let mut lane = Lane::new(driver, small()).unwrap();
            let plan = plan(std::slice::from_ref(&path), policy, &PlanOptions::default()).unwrap();
            // Once some of it is there.
            let mut todo = Some(change);
            let mut progress = |done: u64, _| {
                if done > 0
                    && let Some(change) = todo.take()
                {
                    change(&path);
                }
                true
            };
            let mut control = Control { progress: Some(&mut progress), ..Control::default() };
            let error = gpudirect::load(&mut lane, &plan, &mut control).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Changed, "{how}: {error}");
            assert!(error.to_string().contains(how), "{how}: {error}");
            assert!(error.to_string().contains("m.safetensors"), "{error}");
            drop(lane);
            assert_eq!(device.leaks(), [""; 0]);
        }
    }
}

#[test]
fn files_that_are_no_tensor_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (_, driver) = fake(FakeOptions::default());
    let path = folder.path().join("m.safetensors");
    checkpoint(&path, &[("a", pattern(1, 100_000))]);
    let whole = std::fs::read(&path).unwrap();
    for cut in [1, 7, 9, 50, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error =
            plan(std::slice::from_ref(&path), CachePolicy::Auto, &PlanOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{cut} bytes: {error}");
    }
    std::fs::write(&path, b"").unwrap();
    assert!(
        plan(&[path], CachePolicy::Auto, &PlanOptions::default()).unwrap_err().to_string().contains("empty")
    );
    let other = folder.path().join("m.bin");
    std::fs::write(&other, b"x").unwrap();
    assert_eq!(
        plan(&[other], CachePolicy::Auto, &PlanOptions::default()).unwrap_err().kind(),
        ErrorKind::Malformed
    );
    let directory =
        plan(&[folder.path().to_owned()], CachePolicy::Auto, &PlanOptions::default()).unwrap_err();
    assert!(directory.to_string().contains("directory"), "{directory}");
    let missing =
        plan(&[folder.path().join("x.gguf")], CachePolicy::Auto, &PlanOptions::default()).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    for options in [
        LaneOptions { chunk: 3 << 20, ..small() },
        LaneOptions { ring: 4096, ..small() },
        LaneOptions { depth: 0, ..small() },
    ] {
        assert_eq!(Lane::new(driver.clone(), options).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[test]
fn the_ceiling_of_copies_is_measured_and_leaves_nothing() {
    let (device, driver) = fake(FakeOptions::default());
    let driver: Arc<dyn Driver> = driver;
    let lane = Lane::new(driver, small()).unwrap();
    assert!(lane.copy_ceiling(Duration::from_millis(20)).unwrap() > 0.0);
    drop(lane);
    assert_eq!(device.leaks(), [""; 0]);
}
