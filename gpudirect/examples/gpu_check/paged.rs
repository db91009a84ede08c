//! Gather and scatter: the device's bytes against those of host memory, and rates.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gpudirect::driver::host::HostDriver;
use gpudirect::paged::{BlockShape, Inner, Move, Order, Paged, Plane, Staging, Way};
use gpudirect::{DeviceMemory, Driver, LaneOptions};
use nvme::SimRng;
use nvtier_tests::pattern;
use serde_json::{Value, json};

use crate::{Bench, Check, rate};

/// Random layouts, besides real ones.
const SHAPES: u64 = 300;

struct Case {
    planes: usize,
    shape: BlockShape,
    ids: Vec<u32>,
    order: Order,
    inner: Inner,
    way: Way,
    /// Bytes before planes and staging.
    shift: u64,
}

/// Everything on a device after a case: planes, then staging.
fn run(bench: &Bench, driver: &Arc<dyn Driver>, case: &Case, host: bool) -> Check<Vec<Vec<u8>>> {
    let shape = case.shape;
    let plane_len = shape.block_stride * u64::from(shape.blocks) + 64 + case.shift;
    let staging_len =
        shape.block_bytes().ok_or("too large")? * (case.planes * case.ids.len()) as u64 + 64 + case.shift;
    let put = |bytes: &[u8]| -> Check<DeviceMemory> {
        let memory = DeviceMemory::new(driver, bytes.len() as u64)?;
        match host {
            true => host_write(driver, memory.address(), bytes)?,
            false => bench.write(memory.address(), bytes)?,
        }
        Ok(memory)
    };
    let mut memories = Vec::new();
    for p in 0..case.planes {
        memories.push(put(&pattern(p as u64 + 1, plane_len as usize))?);
    }
    let planes: Vec<Plane> = memories
        .iter()
        .map(|memory| Plane { address: memory.address() + case.shift, len: plane_len - case.shift })
        .collect();
    let staged = put(&pattern(1000, staging_len as usize))?;
    let place = Staging {
        address: staged.address() + case.shift,
        len: staging_len - case.shift,
        order: case.order,
        inner: case.inner,
    };
    memories.push(staged);
    let paged = Paged::new(&**driver, &planes, shape)?;
    let job = Arc::new(Move::new(&**driver, &paged, &place, &case.ids, case.way)?);
    let mut stream = driver.stream()?;
    stream.shuffle(&job)?;
    stream.finish(&mut drop)?;
    drop(stream);
    let lane = gpudirect::Lane::new(driver.clone(), small())?;
    let mut seen = Vec::new();
    for memory in &memories {
        let mut bytes = vec![0; memory.len() as usize];
        lane.read_device(memory.address(), &mut bytes)?;
        seen.push(bytes);
    }
    Ok(seen)
}

fn small() -> LaneOptions {
    LaneOptions { chunk: 1 << 20, ring: 4 << 20, ..LaneOptions::default() }
}

fn host_write(driver: &Arc<dyn Driver>, address: u64, bytes: &[u8]) -> Check<()> {
    use gpudirect::{Batch, Direction, Part};
    let mut stream = driver.stream()?;
    let mut buffer = nvme::Buffer::heap(bytes.len())?;
    buffer[..bytes.len()].copy_from_slice(bytes);
    let mut batch = Batch::new(Direction::ToDevice);
    batch.buffers.push(buffer);
    batch.parts.push(Part { buffer: 0, offset: 0, device: address, len: bytes.len() });
    stream.copy(batch).map_err(|refused| refused.error)?;
    Ok(stream.finish(&mut drop)?)
}

fn random(seed: u64) -> Case {
    let mut rng = SimRng::new(seed);
    let mut below = |n: u64| rng.in_range(0..n);
    let (blocks, tokens, heads) = (1 + below(9) as u32, 1 + below(20) as u32, 1 + below(9) as u32);
    let rows = [1, 2, 3, 6, 8, 16, 24, 32, 64, 100, 128, 192, 256, 512, 1152];
    let row = rows[below(rows.len() as u64) as usize];
    let mut shape = match below(2) {
        0 => BlockShape::token_major(blocks, tokens, heads, row),
        _ => BlockShape::head_major(blocks, tokens, heads, row),
    };
    match below(4) {
        0 => shape.block_stride *= 2,
        1 => shape.block_stride += 4,
        _ => {}
    }
    let way = if below(2) == 0 { Way::Gather } else { Way::Scatter };
    let mut ids: Vec<u32> = (0..blocks).collect();
    for i in (1..ids.len()).rev() {
        ids.swap(i, below(i as u64 + 1) as usize);
    }
    ids.truncate(1 + below(blocks.into()) as usize);
    Case {
        planes: 1 + below(6) as usize,
        shape,
        ids,
        order: if below(2) == 0 { Order::BlockMajor } else { Order::LayerMajor },
        inner: if below(2) == 0 { Inner::TokenMajor } else { Inner::HeadMajor },
        way,
        shift: [0, 0, 16, 8, 4, 2, 1][below(7) as usize],
    }
}

/// Every byte of planes and staging, on the device and in host memory.
pub fn bytes(bench: &Bench) -> Check<Value> {
    let host: Arc<dyn Driver> = Arc::new(HostDriver::new());
    let mut cases: Vec<(String, Case)> =
        (0..SHAPES).map(|seed| (format!("seed {seed}"), random(seed))).collect();
    for (name, planes, tokens, heads, row) in [
        ("Llama-3-8B bf16", 64, 16, 8, 256),
        ("Llama-3-70B fp8", 160, 16, 8, 128),
        ("MLA bf16", 61, 64, 1, 1152),
        ("fp32", 8, 16, 4, 512),
    ] {
        for way in [Way::Gather, Way::Scatter] {
            for inner in [Inner::TokenMajor, Inner::HeadMajor] {
                let shape = BlockShape::token_major(6, tokens, heads, row);
                let case = Case {
                    planes,
                    shape,
                    ids: vec![4, 1, 5],
                    order: Order::BlockMajor,
                    inner,
                    way,
                    shift: 0,
                };
                cases.push((format!("{name}, {way:?}, {inner:?}"), case));
            }
        }
    }
    // More than fits one launch.
    for way in [Way::Gather, Way::Scatter] {
        let shape = BlockShape::token_major(700, 1, 1, 2);
        let ids = (0..700).rev().collect();
        let case = Case {
            planes: 250,
            shape,
            ids,
            order: Order::LayerMajor,
            inner: Inner::TokenMajor,
            way,
            shift: 0,
        };
        cases.push((format!("250 planes of 700 blocks, {way:?}"), case));
    }
    let mut compared = 0;
    for (name, case) in &cases {
        let tried = |error: Box<dyn std::error::Error>| format!("{name}: {error}");
        let expected = run(bench, &host, case, true).map_err(tried)?;
        let seen = run(bench, &bench.driver, case, false).map_err(tried)?;
        for (i, (expected, seen)) in expected.iter().zip(&seen).enumerate() {
            if let Some(at) = (0..expected.len()).find(|at| expected[*at] != seen[*at]) {
                let what = if i == case.planes { "staging".into() } else { format!("plane {i}") };
                return Err(
                    format!("{name}: byte {at} of {what} is {}, not {}", seen[at], expected[at]).into()
                );
            }
            compared += expected.len();
        }
    }
    Ok(json!({"layouts": cases.len(), "bytes_compared": compared}))
}

/// Blocks of 16 tokens of Llama-3-8B in bf16.
pub fn rates(bench: &Bench) -> Check<Value> {
    let (layers, tokens, heads, row) = (32u64, 16u32, 8u32, 256u64);
    let block = 2 * layers * u64::from(tokens) * u64::from(heads) * row;
    let moved = (bench.bytes / block / 2).max(8);
    // Twice as many blocks as are moved, scattered over all.
    let blocks = (moved * 2) as u32;
    let plane = block / (2 * layers) * u64::from(blocks);
    let cache = DeviceMemory::new(&bench.driver, plane * 2 * layers)?;
    let staging = DeviceMemory::new(&bench.driver, moved * block)?;
    let mut rng = SimRng::new(1);
    let mut ids: Vec<u32> = (0..blocks).collect();
    for i in (1..ids.len()).rev() {
        ids.swap(i, rng.in_range(0..i as u64 + 1) as usize);
    }
    ids.truncate(moved as usize);
    let mut found = serde_json::Map::new();
    // Real bytes: zeros may be special to some part of the way.
    let noise = pattern(5, 8 << 20);
    for memory in [&cache, &staging] {
        let mut at = 0;
        while at < memory.len() {
            let len = (memory.len() - at).min(noise.len() as u64);
            bench.write(memory.address() + at, &noise[..len as usize])?;
            at += len;
        }
    }
    let planes: Vec<Plane> =
        (0..2 * layers).map(|p| Plane { address: cache.address() + p * plane, len: plane }).collect();
    for (layout, shape) in [
        ("token_major", BlockShape::token_major(blocks, tokens, heads, row)),
        ("head_major", BlockShape::head_major(blocks, tokens, heads, row)),
    ] {
        let paged = Paged::new(&*bench.driver, &planes, shape)?;
        for (way, name) in [(Way::Gather, "gather"), (Way::Scatter, "scatter")] {
            for count in [1, 16, moved] {
                let ids = &ids[..count as usize];
                let place = Staging {
                    address: staging.address(),
                    len: staging.len(),
                    order: Order::BlockMajor,
                    inner: Inner::TokenMajor,
                };
                let job = Arc::new(Move::new(&*bench.driver, &paged, &place, ids, way)?);
                let gbps = time(bench, &job)?;
                found.insert(format!("{layout}_{name}_{count}_blocks"), json!(gbps));
            }
        }
    }
    if let Some(cuda) = &bench.cuda {
        let half = staging.len() / 2;
        let took = cuda.time_device_copy(staging.address(), staging.address() + half, half, 20)?;
        found.insert("device_copy".into(), json!(rate(half * 20, took)));
    }
    let lane = bench.lane(LaneOptions::default())?;
    found.insert("pinned_to_device".into(), json!(lane.copy_ceiling(Duration::from_millis(500))? / 1e9));
    found.insert("block_bytes".into(), json!(block));
    Ok(Value::Object(found))
}

fn time(bench: &Bench, job: &Arc<Move>) -> Check<f64> {
    let mut stream = bench.driver.stream()?;
    stream.shuffle(job)?;
    stream.finish(&mut drop)?;
    let times = (20u64 << 30).div_ceil(job.bytes()).clamp(3, 200) as u32;
    let times = if bench.cuda.is_some() { times } else { 1 };
    let started = Instant::now();
    for _ in 0..times {
        stream.shuffle(job)?;
    }
    stream.finish(&mut drop)?;
    Ok(rate(job.bytes() * u64::from(times), started.elapsed()))
}
