//! Saves from the simulated device: bytes equal to the reference library's, whole or not at all.

mod common;

use std::collections::BTreeMap;

use common::{contents, fake, load, pattern, plan, small, two_files};
use gpudirect::driver::fake::FakeOptions;
use gpudirect::{
    CachePolicy, Control, ErrorKind, Lane, LaneOptions, Loaded, PlanOptions, SaveOptions, SaveTensor,
};
use safetensors::tensor::{Dtype, TensorView};

fn tensors(loaded: &Loaded) -> Vec<SaveTensor> {
    let of = |t: &gpudirect::LoadedTensor| SaveTensor {
        name: t.name.clone(),
        dtype: t.dtype,
        shape: t.shape.clone(),
        address: t.address,
        len: t.len,
    };
    loaded.tensors.iter().map(of).collect()
}

fn options() -> SaveOptions {
    SaveOptions { metadata: BTreeMap::from([("format".to_owned(), "pt".to_owned())]) }
}

#[test]
fn a_saved_file_is_byte_for_byte_the_reference_librarys() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.safetensors");
    let shapes: [(Dtype, &[usize]); 6] = [
        (Dtype::BF16, &[300, 511]),
        (Dtype::F32, &[1]),
        (Dtype::U8, &[3]),
        (Dtype::F64, &[77, 1000]),
        (Dtype::I16, &[0, 5]),
        (Dtype::F8_E4M3, &[65_537]),
    ];
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .enumerate()
        .map(|(i, (dtype, shape))| pattern(i as u64, shape.iter().product::<usize>() * dtype.bitsize() / 8))
        .collect();
    let views = || {
        let each = shapes.iter().zip(&bytes).enumerate();
        each.map(|(i, ((dtype, shape), bytes))| {
            (format!("t{}", 9 - i), TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
        })
    };
    let info = || Some(std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]));
    std::fs::write(&path, safetensors::serialize(views(), info()).unwrap()).unwrap();
    let reference = safetensors::serialize(views(), info()).unwrap();
    for (lag, chunk) in [(0, 64 << 10), (50, 64 << 10), (2, 1 << 20)] {
        let (device, driver) = fake(FakeOptions { lag, ..FakeOptions::default() });
        let mut lane = Lane::new(driver, LaneOptions { chunk, ring: 8 * chunk, ..small() }).unwrap();
        let plan = plan(std::slice::from_ref(&path), CachePolicy::Auto, &PlanOptions::default()).unwrap();
        let loaded = load(&mut lane, &plan).unwrap();
        let out = folder.path().join("out.safetensors");
        let report =
            gpudirect::save(&mut lane, &out, &tensors(&loaded), &options(), &mut Control::default()).unwrap();
        assert!(std::fs::read(&out).unwrap() == reference, "lag {lag}, chunk {chunk}: other bytes");
        assert_eq!(report.bytes, reference.len() as u64);
        drop((loaded, lane));
        assert_eq!(device.leaks(), [""; 0]);
    }
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn no_tensors_make_the_empty_file_of_the_reference_library() {
    let folder = tempfile::tempdir().unwrap();
    let (_, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, small()).unwrap();
    let out = folder.path().join("out.safetensors");
    gpudirect::save(&mut lane, &out, &[], &SaveOptions::default(), &mut Control::default()).unwrap();
    let none: Vec<(&str, TensorView)> = Vec::new();
    assert_eq!(std::fs::read(&out).unwrap(), safetensors::serialize(none, None).unwrap());
}

/// Whatever ends a save early, the file that was there is there, and nothing else is.
#[test]
fn a_save_that_fails_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, expected) = two_files(folder.path());
    let (device, driver) = fake(FakeOptions::default());
    let mut lane = Lane::new(driver, small()).unwrap();
    let plan = plan(&paths, CachePolicy::Auto, &PlanOptions::default()).unwrap();
    let loaded = load(&mut lane, &plan).unwrap();
    let place = folder.path().join("saved");
    std::fs::create_dir(&place).unwrap();
    let out = place.join("out.safetensors");
    std::fs::write(&out, b"what was there").unwrap();
    let intact = |what: &str| {
        assert_eq!(std::fs::read(&out).unwrap(), b"what was there", "{what}");
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 1, "{what} left something");
    };
    let mut failures = 0;
    for fail in 1..12 {
        device.set(FakeOptions { fail_batch: fail, ..FakeOptions::default() });
        let result = gpudirect::save(&mut lane, &out, &tensors(&loaded), &options(), &mut Control::default());
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Device);
        intact("a batch that failed");
        failures += 1;
    }
    assert_eq!(failures, 11);
    device.set(FakeOptions::default());
    let mut stop = |done: u64, total: u64| done < total / 2;
    let mut control = Control { progress: Some(&mut stop), ..Control::default() };
    let cancelled =
        gpudirect::save(&mut lane, &out, &tensors(&loaded), &options(), &mut control).unwrap_err();
    assert_eq!(cancelled.kind(), ErrorKind::Cancelled);
    intact("a cancelled save");
    let nowhere = folder.path().join("no/such/out.safetensors");
    let error = gpudirect::save(&mut lane, &nowhere, &tensors(&loaded), &options(), &mut Control::default())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    gpudirect::save(&mut lane, &out, &tensors(&loaded), &options(), &mut Control::default()).unwrap();
    let plan = common::plan(&[out], CachePolicy::Auto, &PlanOptions::default()).unwrap();
    let again = load(&mut lane, &plan).unwrap();
    assert!(contents(&lane, &again) == expected);
}
