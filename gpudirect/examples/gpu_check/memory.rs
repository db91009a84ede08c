//! What lies in memory already: RAM-tier hits beside one plain pinned copy, and mapped beside copied files on tmpfs.

use std::path::Path;
use std::time::{Duration, Instant};

use engine::{FormatOptions, Pool, Session, SessionOptions, WriterOptions};
use gpudirect::driver::mapped::{MappedPiece, Mapping};
use gpudirect::{
    Batch, CachePolicy, CachedMode, Control, DeviceMemory, Direction, Lane, LaneOptions, Loaded, Part,
    PinnedTier, Plan, PlanOptions, Source, Verify,
};
use nvme::{Arena, ArenaOptions};
use nvtier_tests::pattern;
use serde_json::{Value, json};

use crate::{Bench, Check, median, rate};

const ROUNDS: usize = 5;
const TENSOR: u64 = 32 << 20;

/// A safetensors file of `bytes` in tensors of 32 MiB, piece by piece.
fn checkpoint(bytes: u64, mut write: impl FnMut(&[u8]) -> Check<()>) -> Check<()> {
    let entry = |i: u64| {
        let (start, end) = (i * TENSOR, (i + 1) * TENSOR);
        format!("\"t.{i:05}\":{{\"dtype\":\"U8\",\"shape\":[{TENSOR}],\"data_offsets\":[{start},{end}]}}")
    };
    let entries: Vec<String> = (0..bytes / TENSOR).map(entry).collect();
    let mut header = format!("{{{}}}", entries.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    write(&(header.len() as u64).to_le_bytes())?;
    write(header.as_bytes())?;
    for i in 0..bytes / TENSOR {
        write(&pattern(i + 1, TENSOR as usize))?;
    }
    Ok(())
}

/// Compares all tensors on the device with what was written.
fn compare(lane: &Lane, loaded: &Loaded) -> Check<()> {
    let mut seen = vec![0; TENSOR as usize];
    for tensor in &loaded.tensors {
        let number: u64 = tensor.name.trim_start_matches("t.").parse()?;
        lane.read_device(tensor.address, &mut seen)?;
        if seen != pattern(number + 1, TENSOR as usize) {
            return Err(format!("{} has other bytes on the device", tensor.name).into());
        }
    }
    Ok(())
}

fn load(lane: &mut Lane, plan: &Plan) -> Check<Loaded> {
    Ok(gpudirect::load(lane, plan, &mut Control::default())?)
}

/// A region that the RAM tier has, against one copy of as much pinned memory; alternated.
pub fn ram_tier(bench: &Bench) -> Check<Value> {
    let folder = tempfile::Builder::new().prefix("nvtier-check-").tempdir_in(&bench.folder)?;
    let path = folder.path().join("pool");
    let size = bench.bytes + bench.bytes / 4 + (256 << 20);
    Pool::format(&path, &FormatOptions { raw: true, size: Some(size), ..FormatOptions::default() })?;
    let ram_bytes = bench.bytes + bench.bytes / 4 + (64 << 20);
    let session = Session::open(&path, SessionOptions { ram_bytes, ..SessionOptions::default() })?;
    let mut writer = session.writer("m.safetensors", None, WriterOptions::default())?;
    checkpoint(bench.bytes, |bytes| Ok(writer.write_all(bytes)?))?;
    writer.commit()?;
    let reader = session.reader("m.safetensors")?;
    let mut piece = vec![0; 1 << 20];
    for _ in 0..2 {
        let mut at = 0;
        while at < reader.len() {
            let len = (reader.len() - at).min(piece.len() as u64) as usize;
            reader.read_exact_at(at, &mut piece[..len])?;
            at += len as u64;
        }
    }
    let arena = session.pool().and_then(|pool| pool.ram_arena()).ok_or("the pool has no RAM tier")?;
    let mut lane = bench.lane(LaneOptions::default())?;
    let started = Instant::now();
    lane.use_tier(PinnedTier::new(&bench.driver, arena)?)?;
    let pinning = started.elapsed();
    let plan =
        Plan::new(vec![Source::region(&session, "m.safetensors", Verify::Always)?], &PlanOptions::default())?;
    let plain = Arena::new(bench.bytes as usize, ArenaOptions::default())?;
    bench.driver.pin(&plain)?;
    let measured = alternate(bench, &mut lane, &plan, &plain);
    bench.driver.unpin(&plain)?;
    let (mut plain_rates, mut tier_rates, mut copy_rates, tier_bytes) = measured?;
    drop(plan);
    drop(lane);
    session.close()?;
    let (plain, tier) = (median(&mut plain_rates), median(&mut tier_rates));
    Ok(json!({
        "plain_pinned_gb_per_second": plain,
        "tier_gb_per_second": tier,
        "tier_gb_per_second_while_copying": median(&mut copy_rates),
        "share_of_plain": tier / plain,
        "bytes": bench.bytes,
        "bytes_from_tier": tier_bytes,
        "pin_seconds": pinning.as_secs_f64(),
    }))
}

type Rates = (Vec<f64>, Vec<f64>, Vec<f64>, u64);

fn alternate(bench: &Bench, lane: &mut Lane, plan: &Plan, plain: &Arena) -> Check<Rates> {
    let (mut plain_rates, mut tier_rates, mut copy_rates) = (Vec::new(), Vec::new(), Vec::new());
    let mut buffer = plain.alloc(plain.len());
    if let Some(buffer) = &mut buffer {
        let noise = pattern(77, 8 << 20);
        buffer.chunks_mut(noise.len()).for_each(|part| part.copy_from_slice(&noise[..part.len()]));
    }
    let mut tier_bytes = 0;
    for round in 0..ROUNDS {
        let loaded = load(lane, plan)?;
        let report = &loaded.report;
        tier_bytes = report.tier_bytes;
        if tier_bytes < report.bytes / 100 * 95 {
            return Err(format!("{tier_bytes} of {} bytes came from the RAM tier", report.bytes).into());
        }
        if round == 0 {
            compare(lane, &loaded)?;
        }
        tier_rates.push(report.gb_per_second);
        copy_rates.push(rate(report.bytes, Duration::from_secs_f64(report.copy_busy_seconds)));
        drop(loaded);
        // As long a way as the load's: memory is taken on the device, too.
        let started = Instant::now();
        let room = DeviceMemory::new(&bench.driver, bench.bytes)?;
        let mut stream = bench.driver.stream()?;
        let mut batch = Batch::new(Direction::ToDevice);
        batch.buffers.extend(buffer.take());
        batch.parts.push(Part { buffer: 0, offset: 0, device: room.address(), len: bench.bytes as usize });
        stream.copy(batch).map_err(|refused| refused.error)?;
        stream.finish(&mut |mut batch| buffer = batch.buffers.pop())?;
        plain_rates.push(rate(bench.bytes, started.elapsed()));
    }
    Ok((plain_rates, tier_rates, copy_rates, tier_bytes))
}

/// A file on tmpfs: copied by threads, and read by the device itself with several sizes of pieces.
pub fn mapped(bench: &Bench) -> Check<Value> {
    let folder = tempfile::Builder::new().prefix("nvtier-check-").tempdir_in(&bench.shm)?;
    let path = folder.path().join("m.safetensors");
    write_checkpoint(&path, bench.bytes)?;
    let plan = Plan::new(vec![Source::file(&path, CachePolicy::Auto)?], &PlanOptions::default())?;
    let defaults = LaneOptions::default();
    let map = |piece: usize, limit: usize, threads: u32| LaneOptions {
        cached: CachedMode::Map,
        map_piece: piece << 20,
        map_limit: limit << 20,
        threads,
        ..defaults.clone()
    };
    let copy = |chunk: usize, ring: usize, threads: u32| LaneOptions {
        cached: CachedMode::Copy,
        chunk: chunk << 20,
        ring: ring << 20,
        threads,
        ..defaults.clone()
    };
    let all = (bench.bytes >> 20) as usize + 64;
    let ways = [
        ("copy_2m", copy(2, 128, defaults.threads)),
        ("copy_8m", copy(8, 512, defaults.threads)),
        // Rings that stay in the processor's cache: what is copied into them need not go to memory and back.
        ("copy_1m_ring_32m", LaneOptions { copy_unit: 2 << 20, ..copy(1, 32, defaults.threads) }),
        (
            "copy_512k_ring_16m",
            LaneOptions { chunk: 512 << 10, copy_unit: 1 << 20, ..copy(1, 16, defaults.threads) },
        ),
        (
            "copy_256k_ring_8m",
            LaneOptions { chunk: 256 << 10, copy_unit: 1 << 20, ..copy(1, 8, defaults.threads) },
        ),
        ("map_8m", map(8, 1024, 8)),
        ("map_32m", map(32, 1024, 8)),
        ("map_128m", map(128, 1024, 8)),
        ("map_32m_4_threads", map(32, 1024, 4)),
        ("map_32m_16_threads", map(32, 1024, 16)),
        ("map_32m_unpinned_last", map(32, all, 8)),
        ("map_128m_unpinned_last", map(128, all, 8)),
    ];
    let mut found = serde_json::Map::new();
    let mut lanes = Vec::new();
    for (name, options) in &ways {
        lanes.push((*name, bench.lane(options.clone())?, Vec::new(), None));
    }
    for round in 0..3 {
        for (name, lane, rates, note) in &mut lanes {
            let loaded = load(lane, &plan)?;
            if round == 0 {
                compare(lane, &loaded)?;
            }
            rates.push(loaded.report.gb_per_second);
            let report = loaded.report;
            if name.starts_with("map") && report.mapped_bytes < report.bytes {
                *note = Some(report.notes.join("; "));
            }
        }
    }
    for (name, _, mut rates, note) in lanes {
        found.insert(name.into(), json!({"gb_per_second": median(&mut rates), "not_mapped": note}));
    }
    let lane = bench.lane(LaneOptions::default())?;
    found.insert("pinned_to_device".into(), json!(lane.copy_ceiling(Duration::from_millis(500))? / 1e9));
    Ok(Value::Object(found))
}

fn write_checkpoint(path: &Path, bytes: u64) -> Check<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(path)?;
    checkpoint(bytes, |bytes| Ok(file.write_all(bytes)?))
}

/// What pinning and unpinning a mapped file costs by itself, by one thread.
pub fn register_cost(bench: &Bench) -> Check<Value> {
    let folder = tempfile::Builder::new().prefix("nvtier-check-").tempdir_in(&bench.shm)?;
    let path = folder.path().join("m.safetensors");
    let bytes = bench.bytes.min(1 << 30);
    write_checkpoint(&path, bytes)?;
    let file = std::fs::File::open(&path)?;
    let mut found = serde_json::Map::new();
    for piece in [8u64 << 20, 64 << 20] {
        let mapping = std::sync::Arc::new(Mapping::new(&file)?);
        let started = Instant::now();
        let mut pieces = Vec::new();
        let mut at = 0;
        while at + piece <= bytes {
            match MappedPiece::pin(&bench.driver, &mapping, at, piece as usize) {
                Ok(pinned) => pieces.push(pinned),
                Err(error) => return Ok(json!({"refused": error.to_string()})),
            }
            at += piece;
        }
        let pinned = started.elapsed();
        let started = Instant::now();
        drop(pieces);
        let unpinned = started.elapsed();
        found.insert(
            format!("piece_{}m", piece >> 20),
            json!({"pin_gb_per_second": rate(at, pinned), "unpin_gb_per_second": rate(at, unpinned)}),
        );
    }
    Ok(Value::Object(found))
}

/// A file that is cut short while its pages are pinned, in a process of its own: SIGBUS would end that.
pub fn cut(bench: &Bench) -> Check<Value> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command
        .args(["--cut", "--device", &bench.name, "--shm"])
        .arg(&bench.shm)
        .arg("--folder")
        .arg(&bench.folder);
    let done = command.output()?;
    let said = String::from_utf8_lossy(&done.stdout).trim().to_owned();
    if !done.status.success() {
        let words = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{}: {said} {}", done.status, words.trim()).into());
    }
    Ok(json!(said))
}

/// Pins pieces of files, cuts the files to nothing, and copies: small and large, on tmpfs and on a drive.
pub fn cut_file(bench: &Bench) -> Check<String> {
    let mut said = Vec::new();
    for place in [&bench.shm, &bench.folder] {
        let folder = tempfile::Builder::new().prefix("nvtier-check-").tempdir_in(place)?;
        let path = folder.path().join("file");
        let len = 4usize << 20;
        let bytes = pattern(9, len);
        std::fs::write(&path, &bytes)?;
        let file = std::fs::File::options().read(true).write(true).open(&path)?;
        file.sync_all()?;
        let mapping = std::sync::Arc::new(Mapping::new(&file)?);
        let piece = match MappedPiece::pin(&bench.driver, &mapping, 0, len) {
            Ok(piece) => std::sync::Arc::new(piece),
            Err(error) => {
                said.push(format!("{}: not pinned: {error}", place.display()));
                continue;
            }
        };
        file.set_len(0)?;
        let room = DeviceMemory::new(&bench.driver, len as u64)?;
        let mut stream = bench.driver.stream()?;
        // Small copies may go another way through the driver than large ones.
        let sizes = [16, 4096, 65_536, len];
        let mut same = true;
        for size in sizes {
            let mut batch = Batch::new(Direction::ToDevice);
            batch.lent.push(gpudirect::driver::Lent::Mapped(piece.clone()));
            batch.parts.push(Part { buffer: 0, offset: 0, device: room.address(), len: size });
            stream.copy(batch).map_err(|refused| refused.error)?;
            stream.finish(&mut drop)?;
            let lane = bench.lane(LaneOptions { ring: 8 << 20, ..LaneOptions::default() })?;
            let mut seen = vec![0; size];
            lane.read_device(room.address(), &mut seen)?;
            same &= seen == bytes[..size];
        }
        said.push(format!(
            "{}: {} copies of a file that is gone, bytes {}",
            place.display(),
            sizes.len(),
            if same { "as they were" } else { "others" }
        ));
    }
    Ok(said.join("; "))
}
