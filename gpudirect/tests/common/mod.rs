//! Files and loads that several tests use.
#![allow(dead_code)] // each test program uses a part

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gpudirect::driver::fake::{FakeDriver, FakeOptions};
use gpudirect::{CachePolicy, Control, Driver, Lane, LaneOptions, Loaded, Plan, PlanOptions, Result, Source};
pub use nvtier_tests::pattern;
use safetensors::tensor::{Dtype, TensorView};

/// A safetensors file of U8 tensors, written by the reference library.
pub fn checkpoint(path: &Path, tensors: &[(&str, Vec<u8>)]) {
    let views = tensors
        .iter()
        .map(|(name, bytes)| (*name, TensorView::new(Dtype::U8, vec![bytes.len()], bytes).unwrap()));
    let info = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    std::fs::write(path, safetensors::serialize(views, Some(info)).unwrap()).unwrap();
    // Clean pages, so that direct reads and dropping them from the cache do what they say.
    std::fs::File::open(path).unwrap().sync_all().unwrap();
}

/// Two files of tensors of awkward lengths, and what is in them.
pub fn two_files(folder: &Path) -> (Vec<PathBuf>, HashMap<String, Vec<u8>>) {
    let lens = [1, 0, 255, 256, 257, 4095, 4097, 70_001, 1 << 20, (3 << 20) + 13, 5];
    let mut all = HashMap::new();
    let mut paths = Vec::new();
    for file in 0..2 {
        let tensors: Vec<(String, Vec<u8>)> = lens
            .iter()
            .enumerate()
            .map(|(i, len)| (format!("model.{file}.{i}.weight"), pattern((file * 100 + i) as u64, *len)))
            .collect();
        let path = folder.join(format!("model-{file}.safetensors"));
        let list: Vec<(&str, Vec<u8>)> =
            tensors.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
        checkpoint(&path, &list);
        paths.push(path);
        all.extend(tensors);
    }
    (paths, all)
}

/// Small rings make every path of the lane run.
pub fn small() -> LaneOptions {
    LaneOptions {
        chunk: 64 << 10,
        depth: 4,
        ring: 512 << 10,
        copy_unit: 128 << 10,
        gap: 4 << 10,
        ..LaneOptions::default()
    }
}

pub fn fake(options: FakeOptions) -> (FakeDriver, Arc<dyn Driver>) {
    let driver = FakeDriver::new(options);
    (driver.clone(), Arc::new(driver))
}

pub fn plan(paths: &[PathBuf], policy: CachePolicy, options: &PlanOptions) -> Result<Plan> {
    let sources = paths.iter().map(|path| Source::file(path, policy)).collect::<Result<Vec<_>>>()?;
    Plan::new(sources, options)
}

pub fn load(lane: &mut Lane, plan: &Plan) -> Result<Loaded> {
    gpudirect::load(lane, plan, &mut Control::default())
}

/// What is on the device, by name.
pub fn contents(lane: &Lane, loaded: &Loaded) -> HashMap<String, Vec<u8>> {
    let read = |tensor: &gpudirect::LoadedTensor| {
        let mut bytes = vec![0; tensor.len as usize];
        lane.read_device(tensor.address, &mut bytes).unwrap();
        (tensor.name.clone(), bytes)
    };
    loaded.tensors.iter().map(read).collect()
}
