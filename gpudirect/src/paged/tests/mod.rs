//! Moves against a plain model, and the kernel's text, interpreted, against both.

mod ptx;

use std::sync::Arc;

use nvme::{Arena, ArenaOptions};
use proptest::prelude::*;

use super::*;
use crate::driver::fake::{FakeDriver, FakeOptions};
use crate::driver::{Batch, Direction, Part};

/// A device with pinned memory to reach it by.
struct Bench {
    fake: FakeDriver,
    driver: Arc<dyn Driver>,
    arena: Arena,
}

impl Bench {
    fn new() -> Bench {
        let fake = FakeDriver::new(FakeOptions::default());
        let driver: Arc<dyn Driver> = Arc::new(fake.clone());
        let arena = Arena::new(8 << 20, ArenaOptions { huge: false, prefault: false, lock: false }).unwrap();
        driver.pin(&arena).unwrap();
        Bench { fake, driver, arena }
    }

    /// Writes `bytes` to an address, or reads them from there.
    fn copy(&self, direction: Direction, device: u64, bytes: &mut [u8]) {
        let mut stream = self.driver.stream().unwrap();
        let mut buffer = self.arena.alloc(bytes.len()).unwrap();
        buffer[..bytes.len()].copy_from_slice(bytes);
        let mut batch = Batch::new(direction);
        batch.buffers.push(buffer);
        batch.parts.push(Part { buffer: 0, offset: 0, device, len: bytes.len() });
        stream.copy(batch).unwrap();
        stream.finish(&mut |batch| bytes.copy_from_slice(&batch.buffers[0][..bytes.len()])).unwrap();
    }

    /// Takes memory with bytes in it.
    fn alloc(&self, bytes: &mut [u8]) -> u64 {
        let address = self.driver.alloc(bytes.len() as u64).unwrap();
        self.copy(Direction::ToDevice, address, bytes);
        address
    }

    fn run(&self, job: &Arc<Move>) {
        let mut stream = self.driver.stream().unwrap();
        stream.shuffle(job).unwrap();
        stream.finish(&mut drop).unwrap();
    }
}

/// What is moved, drawn by proptest.
#[derive(Clone, Debug)]
struct Case {
    planes: usize,
    shape: BlockShape,
    ids: Vec<u32>,
    order: Order,
    inner: Inner,
    way: Way,
    /// Bytes before each plane and before the staging in their allocations.
    shift: (u64, u64),
}

fn case() -> impl Strategy<Value = Case> {
    let rows = prop::sample::select(vec![1u64, 2, 3, 6, 8, 16, 24, 32, 100, 256, 4096]);
    let pads = prop::sample::select(vec![0u64, 0, 0, 1, 4, 16, 48]);
    let sizes = (1usize..5, 1u32..7, 1u32..6, 1u32..5, rows, pads);
    let ways = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let shift = prop::sample::select(vec![0u64, 0, 16, 8, 4, 2, 1]);
    (sizes, ways, (shift.clone(), shift), prop::collection::vec(any::<prop::sample::Index>(), 0..7)).prop_map(
        |(
            (planes, blocks, tokens, heads, row, pad),
            (head_major, layer_major, inner_heads, scatter),
            shift,
            picks,
        )| {
            let mut shape = match head_major {
                true => BlockShape::head_major(blocks, tokens, heads, row),
                false => BlockShape::token_major(blocks, tokens, heads, row),
            };
            // Gaps: as of K and V side by side, or of rows that are padded.
            match pad {
                1 => shape.block_stride *= 2,
                4 => shape.block_stride += 4,
                16 | 48 if !head_major => {
                    shape.head_stride += pad;
                    shape.token_stride = shape.head_stride * u64::from(heads);
                    shape.block_stride = shape.token_stride * u64::from(tokens);
                }
                _ => {}
            }
            let mut ids = Vec::new();
            for pick in picks {
                let id = pick.index(blocks as usize) as u32;
                if !scatter || !ids.contains(&id) {
                    ids.push(id);
                }
            }
            Case {
                planes,
                shape,
                ids,
                order: if layer_major { Order::LayerMajor } else { Order::BlockMajor },
                inner: if inner_heads { Inner::HeadMajor } else { Inner::TokenMajor },
                way: if scatter { Way::Scatter } else { Way::Gather },
                shift,
            }
        },
    )
}

/// The definition, byte by byte: planes and staging as they are afterwards.
fn model(case: &Case, planes: &mut [Vec<u8>], staging: &mut [u8]) {
    let shape = case.shape;
    let (tokens, heads, row) = (shape.tokens as usize, shape.heads as usize, shape.row as usize);
    let block = tokens * heads * row;
    for (p, plane) in planes.iter_mut().enumerate() {
        for (b, id) in case.ids.iter().enumerate() {
            let at = match case.order {
                Order::BlockMajor => (b * case.planes + p) * block,
                Order::LayerMajor => (p * case.ids.len() + b) * block,
            };
            for (t, h, x) in
                (0..tokens).flat_map(|t| (0..heads).flat_map(move |h| (0..row).map(move |x| (t, h, x))))
            {
                let inner = match case.inner {
                    Inner::TokenMajor => (t * heads + h) * row + x,
                    Inner::HeadMajor => (h * tokens + t) * row + x,
                };
                let staged = case.shift.1 as usize + at + inner;
                let paged = case.shift.0 as usize
                    + *id as usize * shape.block_stride as usize
                    + t * shape.token_stride as usize
                    + h * shape.head_stride as usize
                    + x;
                match case.way {
                    Way::Gather => staging[staged] = plane[paged],
                    Way::Scatter => plane[paged] = staging[staged],
                }
            }
        }
    }
}

/// Runs a case on the simulated device and, by its text, as the kernel; both must be what the model says.
fn check(case: &Case) -> std::result::Result<(), TestCaseError> {
    let bench = Bench::new();
    let plane_len = (case.shift.0 + case.shape.plane_extent().unwrap()) as usize;
    let staged = case.shape.block_bytes().unwrap() as usize * case.planes * case.ids.len();
    let mut planes: Vec<Vec<u8>> =
        (0..case.planes).map(|p| nvtier_tests::pattern(p as u64 + 1, plane_len)).collect();
    let mut staging = nvtier_tests::pattern(99, case.shift.1 as usize + staged.max(1));
    let addresses: Vec<u64> = planes.iter_mut().map(|plane| bench.alloc(plane)).collect();
    let staging_address = bench.alloc(&mut staging);
    let list: Vec<Plane> = addresses
        .iter()
        .map(|address| Plane { address: address + case.shift.0, len: plane_len as u64 - case.shift.0 })
        .collect();
    let paged = Paged::new(&*bench.driver, &list, case.shape).unwrap();
    let place = Staging {
        address: staging_address + case.shift.1,
        len: staging.len() as u64 - case.shift.1,
        order: case.order,
        inner: case.inner,
    };
    let job = Arc::new(Move::new(&*bench.driver, &paged, &place, &case.ids, case.way).unwrap());
    prop_assert_eq!(job.bytes(), staged as u64);

    // The kernel gets memory at the same addresses, and only that.
    let mut memory = ptx::Memory::default();
    for (address, plane) in addresses.iter().zip(&planes) {
        memory.insert(*address, plane.clone());
    }
    memory.insert(staging_address, staging.clone());
    ptx::run(&job, &mut memory, if case.planes.is_multiple_of(2) { 1 } else { u32::MAX });

    bench.run(&job);
    model(case, &mut planes, &mut staging);
    let mut seen = vec![0; staging.len()];
    bench.copy(Direction::ToHost, staging_address, &mut seen);
    prop_assert!(seen == staging, "staging");
    prop_assert!(memory.at(staging_address) == staging, "staging, by the kernel, width {}", job.width());
    for (p, (address, plane)) in addresses.iter().zip(&planes).enumerate() {
        let mut seen = vec![0; plane.len()];
        bench.copy(Direction::ToHost, *address, &mut seen);
        prop_assert!(seen == *plane, "plane {}", p);
        prop_assert!(memory.at(*address) == *plane, "plane {}, by the kernel, width {}", p, job.width());
        bench.driver.free(*address).unwrap();
    }
    bench.driver.free(staging_address).unwrap();
    bench.driver.unpin(&bench.arena).unwrap();
    prop_assert_eq!(bench.fake.leaks(), Vec::<String>::new());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn host_and_kernel_move_what_the_model_says(case in case()) {
        check(&case)?;
    }
}

/// More planes and blocks than fit the arguments of a launch.
#[test]
fn many_planes_and_blocks_take_several_launches() {
    let case = Case {
        planes: 250,
        shape: BlockShape::token_major(700, 1, 1, 2),
        ids: (0..700).rev().collect(),
        order: Order::BlockMajor,
        inner: Inner::TokenMajor,
        way: Way::Scatter,
        shift: (0, 0),
    };
    let bench = Bench::new();
    let address = bench.driver.alloc(250 * 1400).unwrap();
    let planes: Vec<Plane> = (0..250).map(|p| Plane { address: address + p * 1400, len: 1400 }).collect();
    let paged = Paged::new(&*bench.driver, &planes, case.shape).unwrap();
    let mut staging = nvtier_tests::pattern(5, 250 * 1400);
    let place =
        Staging { address: bench.alloc(&mut staging), len: 350_000, order: case.order, inner: case.inner };
    let job = Arc::new(Move::new(&*bench.driver, &paged, &place, &case.ids, case.way).unwrap());
    let mut launches = Vec::new();
    job.launches(&mut |launch| -> std::result::Result<(), ()> {
        launches.push(launch.grid);
        Ok(())
    })
    .unwrap();
    // 240 planes leave room for 480 blocks, the other 10 for all.
    assert_eq!(launches, [(240 * 480, 1), (240 * 220, 1), (10 * 700, 1)]);
    bench.run(&job);
    let mut seen = vec![0; 350_000];
    bench.copy(Direction::ToHost, address, &mut seen);
    let mut expected = vec![vec![0; 1400]; 250];
    model(&case, &mut expected, &mut staging);
    assert!(seen == expected.concat());
}

/// The widths of real layouts: a 16-token block of Llama-3-8B is one run of 32 KiB a plane, in one launch.
#[test]
fn a_block_of_llama_is_one_run_of_wide_accesses() {
    let bench = Bench::new();
    let shape = BlockShape::token_major(4, 16, 8, 256);
    let base = bench.driver.alloc(64 * 4 * (32 << 10)).unwrap();
    let plane = |p: u64| Plane { address: base + p * 4 * (32 << 10), len: 4 * (32 << 10) };
    let paged = Paged::new(&*bench.driver, &(0..64).map(plane).collect::<Vec<_>>(), shape).unwrap();
    assert_eq!(paged.staged_block_bytes().unwrap(), 2 << 20);
    let staging = bench.driver.alloc(4 << 20).unwrap();
    let place =
        Staging { address: staging, len: 4 << 20, order: Order::BlockMajor, inner: Inner::TokenMajor };
    let job = Move::new(&*bench.driver, &paged, &place, &[3, 1], Way::Gather).unwrap();
    assert_eq!((job.run_len(), job.width(), job.bytes()), (32 << 10, 16, 4 << 20));
    let transposed = Staging { inner: Inner::HeadMajor, ..place };
    let job = Move::new(&*bench.driver, &paged, &transposed, &[3, 1], Way::Gather).unwrap();
    assert_eq!((job.run_len(), job.width()), (256, 16));
}

#[test]
fn what_would_leave_its_memory_is_refused() {
    let bench = Bench::new();
    let shape = BlockShape::token_major(4, 2, 2, 8);
    let base = bench.driver.alloc(4096).unwrap();
    let new = |planes: &[Plane], shape| {
        Paged::new(&*bench.driver, planes, shape).map_err(|error| error.to_string())
    };
    let whole = [Plane { address: base, len: 128 }];
    let refused = |result: std::result::Result<Paged, String>, words: &str| {
        let text = result.map(|_| ()).unwrap_err();
        assert!(text.contains(words), "{text}");
    };
    refused(new(&[], shape), "without planes");
    refused(new(&[Plane { address: base, len: 127 }], shape), "its blocks need 128");
    refused(new(&[Plane { address: base + 4000, len: 128 }], shape), "outside every allocation");
    refused(new(&[Plane { address: u64::MAX - 64, len: 128 }], shape), "its blocks need");
    refused(new(&whole, BlockShape { row: 0, ..shape }), "no bytes");
    refused(new(&whole, BlockShape { tokens: 0, ..shape }), "no bytes");
    refused(new(&whole, BlockShape { token_stride: 15, ..shape }), "share bytes");
    refused(new(&whole, BlockShape { block_stride: 16, ..shape }), "share bytes");
    refused(new(&whole, BlockShape { block_stride: u64::MAX / 2, ..shape }), "too many");
    refused(new(&whole, BlockShape::token_major(u32::MAX, u32::MAX, u32::MAX, 1 << 40)), "too many");
    let joined = Paged::joined(&*bench.driver, &whole, 200, shape).unwrap_err();
    assert!(joined.to_string().contains("behind K"), "{joined}");
    let paged = new(&whole, shape).unwrap();
    let at = |address, len| Staging { address, len, order: Order::BlockMajor, inner: Inner::TokenMajor };
    for (staging, blocks, way, words) in [
        (at(base + 1024, 64), &[0, 4][..], Way::Gather, "block 4 of 4"),
        (at(base + 1024, 63), &[0, 1][..], Way::Gather, "take fewer"),
        (at(base + 1024, 4096), &[1, 1][..], Way::Scatter, "twice"),
        (at(base + 4080, 4096), &[1][..], Way::Scatter, "staging"),
        (at(base + 120, 4096), &[1][..], Way::Gather, "is in a plane"),
        (at(u64::MAX - 10, 4096), &[1][..], Way::Gather, "blocks of"),
    ] {
        let error = Move::new(&*bench.driver, &paged, &staging, blocks, way).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.kind(), if words == "staging" { ErrorKind::Device } else { ErrorKind::Invalid });
    }
    // Twice the same block is fine where it is read.
    Move::new(&*bench.driver, &paged, &at(base + 1024, 64), &[1, 1], Way::Gather).unwrap();
}

/// Where K and V are neighbours in a block, or all K comes before all V.
#[test]
fn joined_layouts_are_planes_in_turn() {
    let bench = Bench::new();
    let mut bytes = nvtier_tests::pattern(3, 2 * 4 * 32);
    let base = bench.alloc(&mut bytes);
    let staging = bench.driver.alloc(64).unwrap();
    let layer = [Plane { address: base, len: 256 }];
    let shape = BlockShape::token_major(4, 2, 1, 16);
    for (kv_stride, shape, v) in [(32, shape.with_block_stride(64), 2 * 64 + 32), (128, shape, 128 + 2 * 32)]
    {
        let paged = Paged::joined(&*bench.driver, &layer, kv_stride, shape).unwrap();
        let place = Staging { address: staging, len: 64, order: Order::BlockMajor, inner: Inner::TokenMajor };
        bench.run(&Arc::new(Move::new(&*bench.driver, &paged, &place, &[2], Way::Gather).unwrap()));
        let mut seen = vec![0; 64];
        bench.copy(Direction::ToHost, staging, &mut seen);
        let k = 2 * shape.block_stride as usize;
        assert!(seen == [&bytes[k..k + 32], &bytes[v..v + 32]].concat(), "kv_stride {kv_stride}");
    }
}

/// Ordered with copies: what a copy behind a gather brings is what the gather made, however late both run.
#[test]
fn a_copy_behind_a_gather_sees_it() {
    let bench = Bench::new();
    let shape = BlockShape::token_major(2, 4, 2, 64);
    let mut bytes = nvtier_tests::pattern(8, 1024);
    let base = bench.alloc(&mut bytes);
    let staging = bench.driver.alloc(512).unwrap();
    let paged = Paged::new(&*bench.driver, &[Plane { address: base, len: 1024 }], shape).unwrap();
    let place = Staging { address: staging, len: 512, order: Order::BlockMajor, inner: Inner::TokenMajor };
    let job = Arc::new(Move::new(&*bench.driver, &paged, &place, &[1], Way::Gather).unwrap());
    let mut stream = bench.driver.stream().unwrap();
    stream.shuffle(&job).unwrap();
    let mut batch = Batch::new(Direction::ToHost);
    batch.buffers.push(bench.arena.alloc(512).unwrap());
    batch.parts.push(Part { buffer: 0, offset: 0, device: staging, len: 512 });
    stream.copy(batch).unwrap();
    assert_eq!(stream.in_flight(), 2);
    let mut seen = Vec::new();
    stream.finish(&mut |batch| seen = batch.buffers[0][..512].to_vec()).unwrap();
    assert!(seen == bytes[512..]);
    assert_eq!(stream.in_flight(), 0);
}

/// For tools such as ptxas: `NVTIER_PTX=file cargo test -p nvtier-gpudirect the_module`.
#[test]
fn the_module_is_plain_text() {
    let text = kernel::ptx();
    assert!(text.is_ascii() && !text.contains('\0'));
    if let Some(path) = std::env::var_os("NVTIER_PTX") {
        std::fs::write(path, text).unwrap();
    }
}
