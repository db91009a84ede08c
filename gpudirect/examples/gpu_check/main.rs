//! What tests without a GPU cannot show, on one: kernels against the host, windows, and what moves how fast.
//!
//!     cargo build --release -p nvtier-gpudirect --example gpu_check
//!     gpu_check [--device cuda:0|cpu|fake] [--gb 2] [--shm /dev/shm] [--folder FOLDER] [--only NAME] [--out FILE]
//!
//! (`--cut` is what the check of files that are cut short starts as a process of its own.)
//!
//! A line for each check, and at the end one line of JSON. The exit code is 1 when a check failed. `cpu` and `fake` try the
//! program itself; their rates mean nothing.

mod memory;
mod paged;
mod window;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gpudirect::driver::cuda::CudaDriver;
use gpudirect::driver::fake::{FakeDriver, FakeOptions};
use gpudirect::{Batch, Direction, Driver, Lane, LaneOptions, Part};
use nvme::{Arena, ArenaOptions};
use serde_json::{Map, Value, json};

/// Errors of all kinds, as text.
pub type Check<T> = Result<T, Box<dyn std::error::Error>>;

/// What the checks share.
pub struct Bench {
    /// Its name, as it was asked for.
    pub name: String,
    /// The device.
    pub driver: Arc<dyn Driver>,
    /// The same, where it is a GPU.
    pub cuda: Option<Arc<CudaDriver>>,
    /// Bytes that large checks move.
    pub bytes: u64,
    /// A folder in memory.
    pub shm: PathBuf,
    /// A folder on a drive.
    pub folder: PathBuf,
    arena: Arena,
}

impl Bench {
    /// Writes bytes to the device.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Check<()> {
        let mut stream = self.driver.stream()?;
        let step = self.arena.len();
        for (i, part) in bytes.chunks(step).enumerate() {
            let mut buffer = self.arena.alloc(step).ok_or("the arena is in use")?;
            buffer[..part.len()].copy_from_slice(part);
            let mut batch = Batch::new(Direction::ToDevice);
            batch.buffers.push(buffer);
            batch.parts.push(Part {
                buffer: 0,
                offset: 0,
                device: address + (i * step) as u64,
                len: part.len(),
            });
            stream.copy(batch).map_err(|refused| refused.error)?;
            stream.finish(&mut drop)?;
        }
        Ok(())
    }

    /// A lane with the default settings.
    pub fn lane(&self, options: LaneOptions) -> Check<Lane> {
        Ok(Lane::new(self.driver.clone(), options)?)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.driver.unpin(&self.arena);
    }
}

/// 10^9 bytes a second.
pub fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64().max(1e-9) / 1e9
}

/// The middle one.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

struct Arguments {
    device: String,
    gb: f64,
    shm: PathBuf,
    folder: PathBuf,
    only: Option<String>,
    out: Option<PathBuf>,
    cut: bool,
}

fn arguments() -> Check<Arguments> {
    let mut found = Arguments {
        device: "cuda:0".into(),
        gb: 2.0,
        shm: "/dev/shm".into(),
        folder: std::env::temp_dir(),
        only: None,
        out: None,
        cut: false,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let mut value = || given.next().ok_or(format!("{name} needs a value"));
        match name.as_str() {
            "--device" => found.device = value()?,
            "--gb" => found.gb = value()?.parse()?,
            "--shm" => found.shm = value()?.into(),
            "--folder" => found.folder = value()?.into(),
            "--cut" => found.cut = true,
            "--only" => found.only = Some(value()?),
            "--out" => found.out = Some(value()?.into()),
            _ => return Err(format!("{name}: see the top of examples/gpu_check/main.rs").into()),
        }
    }
    Ok(found)
}

fn open(arguments: &Arguments) -> Check<Bench> {
    let fail = |what: &dyn Display| format!("open {}: {what}", arguments.device);
    let number =
        |name: &str| name.strip_prefix("cuda").map(|rest| rest.trim_start_matches(':').parse().unwrap_or(0));
    let (driver, cuda): (Arc<dyn Driver>, _) = match (arguments.device.as_str(), number(&arguments.device)) {
        ("fake", _) => {
            let options = FakeOptions { memory_bytes: 16 << 30, ..FakeOptions::default() };
            (Arc::new(FakeDriver::new(options)), None)
        }
        (_, Some(ordinal)) => {
            let cuda = Arc::new(CudaDriver::open(ordinal).map_err(|error| fail(&error))?);
            (cuda.clone(), Some(cuda))
        }
        (other, None) => (gpudirect::driver::open(other).map_err(|error| fail(&error))?, None),
    };
    let arena = Arena::new(8 << 20, ArenaOptions::default())?;
    driver.pin(&arena)?;
    let bytes = (arguments.gb * 1e9) as u64 / (64 << 20) * (64 << 20);
    let bench = Bench {
        name: arguments.device.clone(),
        driver,
        cuda,
        bytes: bytes.max(64 << 20),
        shm: arguments.shm.clone(),
        folder: arguments.folder.clone(),
        arena,
    };
    Ok(bench)
}

/// Where the ring of a lane lies, as the kernel says (`N0=` and so on: pages of each node).
fn numa(bench: &Bench) -> Check<Value> {
    let lane = bench.lane(LaneOptions::default())?;
    let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
    let ring = format!("{:x} ", lane.ring_address());
    let found = maps.lines().find(|line| line.starts_with(&ring)).map(str::to_owned);
    let pci = bench.driver.info()?.pci;
    let node = std::fs::read_to_string(format!("/sys/bus/pci/devices/{pci}/numa_node")).unwrap_or_default();
    Ok(json!({"device_node": node.trim(), "ring": found}))
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let bench = match open(&arguments) {
        Ok(bench) => bench,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.cut {
        return match memory::cut_file(&bench) {
            Ok(text) => {
                println!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    type Step = (&'static str, fn(&Bench) -> Check<Value>);
    let steps: [Step; 8] = [
        ("paged-bytes", paged::bytes),
        ("paged-rate", paged::rates),
        ("window", window::check),
        ("ram-tier", memory::ram_tier),
        ("mapped", memory::mapped),
        ("host-registered", memory::register_cost),
        ("mapped-cut", memory::cut),
        ("numa", numa),
    ];
    let mut results = Map::new();
    let mut failed = 0;
    match bench.driver.info() {
        Ok(info) => {
            println!("device {} ({}), driver {}", info.id, info.name, info.driver);
            results.insert("device".into(), json!(info));
        }
        Err(error) => println!("device: {error}"),
    }
    for (name, step) in steps {
        if arguments.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let started = Instant::now();
        let result = step(&bench);
        let seconds = started.elapsed().as_secs_f64();
        let value = match result {
            Ok(value) => {
                println!("ok     {name} ({seconds:.1} s): {value}");
                json!({"ok": true, "seconds": seconds, "result": value})
            }
            Err(error) => {
                failed += 1;
                println!("FAILED {name} ({seconds:.1} s): {error}");
                json!({"ok": false, "seconds": seconds, "error": error.to_string()})
            }
        };
        results.insert(name.into(), value);
    }
    results.insert("failed".into(), json!(failed));
    let text = Value::Object(results).to_string();
    println!("{text}");
    if let Some(path) = &arguments.out
        && let Err(error) = std::fs::write(path, text)
    {
        eprintln!("write {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
