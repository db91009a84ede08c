//! Bits that turn over at rest: in content, where a read must say so and name the chunk, and in superblocks and catalogs, where the
//! pool must open as it was (repaired from the other copy, or the bit did not matter) or refuse.

use engine::{Access, ErrorKind, OpenOptions, Pool, Session, SessionOptions, lease::Source};
use nvme::{SimImage, SimRng};

use crate::act::{Act, Memory, Taste, draw};
use crate::check;
use crate::config::{Config, Machine};
use crate::driver::identify;
use crate::model::State;
use crate::world::{Stop, World};

/// What came of the flips.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Bits of content, each noticed by the read of its chunk.
    pub content: u64,
    /// Bits of superblocks and catalogs.
    pub metadata: u64,
    /// Of these, how often the pool opened and held what it should.
    pub whole: u64,
    /// And how often it refused to open.
    pub refused: u64,
}

/// A stored chunk.
struct Chunk {
    path: String,
    node: u64,
    index: u64,
    member: usize,
    /// Bytes on the member, from here on, that are content.
    offset: u64,
    len: u64,
}

fn said(stop: Stop) -> String {
    match stop {
        Stop::Violation(text) => text,
        Stop::Power => "the power went off by itself".into(),
    }
}

/// Pools of some kinds, with regions of all lengths, closed properly.
fn filled(config: &Config, seed: u64) -> Result<(Vec<SimImage>, State), String> {
    let mut rng = SimRng::new(seed);
    let taste = Taste { chunk: config.chunk as usize, most: 200_000, slots: 0, kv: false, keep: false };
    let mut memory = Memory::default();
    let mut world = World::fresh(config, None).map_err(said)?;
    for _ in 0..60 {
        world.act(&draw(&mut rng, &taste, &mut memory)).map_err(said)?;
    }
    for (path, len) in [("one", 1), ("chunk", config.chunk as usize), ("many", 300_000)] {
        world
            .act(&Act::Import { path: path.into(), len, fill: seed, reserve: false, commit: true })
            .map_err(said)?;
    }
    world.act(&Act::Sync).map_err(said)?;
    let state = world.candidates[0].clone();
    let machine = world.finish().map_err(said)?;
    Ok((machine.images(), state))
}

fn open(config: &Config, images: &[SimImage]) -> (Machine, engine::Result<Pool>) {
    let machine = Machine::new(config, images, None);
    // A small catalog, treated as one: all its pages are checked.
    let options = OpenOptions {
        catalog_check_bytes: OpenOptions::default().catalog_check_bytes,
        ..config.open_options()
    };
    let pool = Pool::open_devices(&machine.as_devices(), &options);
    (machine, pool)
}

fn chunks(pool: &Pool, state: &State, chunk: u64) -> engine::Result<Vec<Chunk>> {
    let mut chunks = Vec::new();
    for path in state.iter().filter(|(_, seen)| seen.content.is_some()).map(|(path, _)| path) {
        let node = pool.resolve(path)?.node;
        let lease = pool.lease(node, 0, u64::MAX)?;
        for extent in lease.extents() {
            let Source::Device(device) = &extent.source else { continue };
            let member = device.name().trim_start_matches("sim").parse().unwrap_or(0);
            for start in (0..extent.len).step_by(chunk as usize) {
                let index = (extent.logical + start) / chunk;
                let len = chunk.min(extent.len - start);
                chunks.push(Chunk {
                    path: path.clone(),
                    node,
                    index,
                    member,
                    offset: extent.offset + start,
                    len,
                });
            }
        }
    }
    Ok(chunks)
}

/// Kinds of pools that bits are flipped in. Without a RAM tier: it would answer from what it read while that was good.
fn kinds() -> [Config; 3] {
    let two = Config { members: 2, lba: 4096, chunk: 16 << 10, stripe: 16 << 10, data: 4 << 20, ram: 0 };
    [Config { data: 4 << 20, ..Config::SMALL }, two, Config { members: 3, ..Config::SMALL }]
}

/// Flips `count` bits of content, one at a time, and reads each through the engine.
pub fn content(count: u64, seed: u64) -> Result<Count, String> {
    let mut rng = SimRng::new(seed);
    let mut done = Count::default();
    while done.content < count {
        let config = kinds()[(done.content / 500 % 3) as usize];
        let (images, state) = filled(&config, rng.next_u64())?;
        let (machine, pool) = open(&config, &images);
        let pool = pool.map_err(|error| error.chain())?;
        let chunk_size = u64::from(config.chunk);
        let chunks = chunks(&pool, &state, chunk_size).map_err(|error| error.chain())?;
        for _ in 0..500.min(count - done.content) {
            let chunk = &chunks[rng.in_range(0..chunks.len() as u64) as usize];
            let (at, bit) = (chunk.offset + rng.in_range(0..chunk.len), rng.in_range(0..8) as u8);
            machine.devices[chunk.member].flip(at, bit);
            one(&pool, chunk, chunk_size, &mut rng)
                .map_err(|text| format!("bit {bit} of byte {at} of member {}: {text}", chunk.member))?;
            // Back again: then the same read is right, and nothing bad was kept.
            machine.devices[chunk.member].flip(at, bit);
            let content = state[&chunk.path].content.as_ref().ok_or("a region")?;
            let bytes = check::read_region(&pool, chunk.node).map_err(|error| error.chain())?;
            if bytes != *content.bytes {
                return Err(format!("{} reads {}", chunk.path, check::difference(&bytes, &content.bytes)));
            }
            done.content += 1;
        }
    }
    Ok(done)
}

/// Reads a part of a chunk with one bad bit in it.
fn one(pool: &Pool, chunk: &Chunk, chunk_size: u64, rng: &mut SimRng) -> Result<(), String> {
    let handle = pool.open_region(chunk.node, Access::Read, false).map_err(|error| error.chain())?;
    let start = chunk.index * chunk_size;
    let from = start + rng.in_range(0..chunk.len);
    let mut bytes = vec![0; rng.in_range(1..start + chunk.len - from + 1) as usize];
    match handle.read_at(from, &mut bytes) {
        Ok(_) => return Err(format!("chunk {} of {} was read", chunk.index, chunk.path)),
        Err(error) => {
            let text = error.chain();
            let names = text.contains(&format!("chunk {}", chunk.index));
            if error.kind() != ErrorKind::Corrupt || !names || bytes.iter().any(|byte| *byte != 0) {
                return Err(format!("chunk {} of {}: the error is {text}", chunk.index, chunk.path));
            }
        }
    }
    let report = pool.verify(Some(chunk.node), &mut |_| {}).map_err(|error| error.chain())?;
    let found: Vec<u64> = report.bad.iter().map(|bad| bad.chunk).collect();
    if found != [chunk.index] {
        return Err(format!("verify finds chunks {found:?} of {}, not {}", chunk.path, chunk.index));
    }
    Ok(())
}

/// Flips `count` bits of superblocks and catalogs, one at a time, and opens the pool.
pub fn metadata(count: u64, seed: u64) -> Result<Count, String> {
    let mut rng = SimRng::new(seed);
    let mut done = Count::default();
    while done.metadata < count {
        let config = kinds()[(done.metadata / 100 % 3) as usize];
        let (images, state) = filled(&config, rng.next_u64())?;
        for _ in 0..100.min(count - done.metadata) {
            let member = rng.in_range(0..config.members as u64) as usize;
            let end = images[member].len();
            // Half of a zone: 8 MiB, of which the start is used.
            let half = (1 << 20) + (8 << 20) * rng.in_range(0..2);
            let at = match rng.in_range(0..8) {
                0 => rng.in_range(0..4096),
                1 => end - 4096 + rng.in_range(0..4096),
                _ if member > 0 => rng.in_range(0..512),
                2 => half + rng.in_range(0..2) * 4096 + rng.in_range(0..40),
                3 => half + (64 << 10) + rng.in_range(0..320),
                _ => half + (64 << 10) + rng.in_range(0..100 << 10),
            };
            let bit = rng.in_range(0..8) as u8;
            let mut damaged = images.clone();
            damaged[member].flip(at, bit);
            let place = format!("bit {bit} of byte {at} of member {member}");
            done.metadata += 1;
            match open(&config, &damaged) {
                (_machine, Ok(pool)) => {
                    let session = Session::over(pool, &SessionOptions::default());
                    identify(&config, &session, std::slice::from_ref(&state))
                        .map_err(|stop| format!("{place}: {}", said(stop)))?;
                    done.whole += 1;
                }
                (_machine, Err(error)) if error.kind() == ErrorKind::Corrupt => done.refused += 1,
                (_machine, Err(error)) => return Err(format!("{place}: {}", error.chain())),
            }
        }
    }
    Ok(done)
}
