//! The time to open a large pool after a crash: `cargo xtask sim --open-benchmark`.
//!
//! The pool is an image file of 1 TiB, sparse, through the real raw member. One process fills it with small regions and is killed
//! with SIGKILL, some regions after its last sync. Then one process after another opens it and is killed as well, so that every
//! open is one after a crash. What is timed is `Pool::open`, by the clock of the process that calls it.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use engine::{Access, FormatOptions, NewNode, NodeId, NodeKind, OpenOptions, Pool, ROOT};

/// Regions in a directory.
const PER_DIRECTORY: u64 = 1000;
/// Regions made after the last sync.
const UNSYNCED: u64 = 500;
/// Bytes of a region.
const BYTES: usize = 4096;
const POOL_BYTES: u64 = 1 << 40;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Regions in the pool.
    pub regions: u64,
    /// How many times to open it.
    pub rounds: usize,
    /// Directory of the image; removed from it afterwards.
    pub dir: PathBuf,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Time of each open, in order.
    pub opens: Vec<Duration>,
    /// Regions that each open found.
    pub regions: u64,
}

type Result<T> = std::result::Result<T, String>;

/// The image, gone when dropped.
struct Image(PathBuf);

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A process that is killed when dropped.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `part` on the image in another process up to its first line, which is returned, and kills it.
fn run_and_kill(part: &str, image: &Path, regions: u64) -> Result<String> {
    let program = std::env::current_exe().map_err(|error| format!("where is this program: {error}"))?;
    let child = Command::new(program)
        .args(["--large-part", part, "--regions", &regions.to_string(), "--dir"])
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut victim = Victim(child.map_err(|error| format!("cannot start a process: {error}"))?);
    let mut line = String::new();
    let output = victim.0.stdout.take().ok_or("a process without an output")?;
    BufReader::new(output).read_line(&mut line).map_err(|error| format!("{part}: {error}"))?;
    if line.is_empty() {
        return Err(format!("{part}: the process ended without a word"));
    }
    drop(victim);
    Ok(line.trim_end().to_owned())
}

/// Fills, crashes, and opens.
pub fn run(options: &Options) -> Result<Outcome> {
    std::fs::create_dir_all(&options.dir).map_err(|error| format!("{}: {error}", options.dir.display()))?;
    let image = Image(options.dir.join(format!("nvtier-large-{}.img", std::process::id())));
    println!("{}", run_and_kill("fill", &image.0, options.regions)?);
    let mut outcome = Outcome { opens: Vec::new(), regions: 0 };
    for _ in 0..options.rounds {
        let line = run_and_kill("open", &image.0, options.regions)?;
        println!("{line}");
        let mut words = line.split(' ').filter_map(|word| word.parse::<u64>().ok());
        let (Some(micros), Some(regions)) = (words.next(), words.next()) else {
            return Err(format!("not understood: {line}"));
        };
        if regions < options.regions || regions > options.regions + UNSYNCED {
            return Err(format!("{regions} regions were found, {} were synced", options.regions));
        }
        outcome.opens.push(Duration::from_micros(micros));
        outcome.regions = regions;
    }
    Ok(outcome)
}

/// What the other processes do: one line, then nothing until they are killed.
pub fn part(part: &str, image: &Path, regions: u64) -> Result<()> {
    let fail = |error: engine::Error| error.chain();
    let line = match part {
        "fill" => {
            let began = Instant::now();
            // Made here, since `format` would allocate what it makes.
            let file = std::fs::File::create(image).and_then(|file| file.set_len(POOL_BYTES));
            file.map_err(|error| format!("make {}: {error}", image.display()))?;
            Pool::format(image, &FormatOptions::default()).map_err(fail)?;
            let pool = Pool::open(image, &OpenOptions::default()).map_err(fail)?;
            fill(&pool, 0..regions).map_err(fail)?;
            pool.sync().map_err(fail)?;
            let took = began.elapsed().as_secs_f64();
            fill(&pool, regions..regions + UNSYNCED).map_err(fail)?;
            std::mem::forget(pool);
            format!("filled with {regions} regions in {took:.1} s")
        }
        _ => {
            // Where the time goes, to the other output.
            tracing_subscriber::fmt()
                .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
                .with_writer(io::stderr)
                .init();
            let began = Instant::now();
            let pool = Pool::open(image, &OpenOptions::default()).map_err(fail)?;
            let took = began.elapsed();
            let regions = pool.stat().regions;
            std::mem::forget(pool);
            format!("opened in {} us with {regions} regions", took.as_micros())
        }
    };
    println!("{line}");
    io::stdout().flush().map_err(|error| error.to_string())?;
    // Until the other end goes, or this process does.
    io::stdin().read_line(&mut String::new()).map(drop).map_err(|error| error.to_string())
}

fn fill(pool: &Pool, numbers: std::ops::Range<u64>) -> engine::Result<()> {
    let new = |kind| NewNode { kind, mode: 0o755, uid: 0, gid: 0, rdev: 0, target: None };
    let mut bytes = [0; BYTES];
    let mut directory: NodeId = ROOT;
    for number in numbers.clone() {
        if number % PER_DIRECTORY == 0 || number == numbers.start {
            let name = format!("dir {:06}", number / PER_DIRECTORY);
            directory = match pool.lookup(ROOT, OsStr::new(&name)) {
                Ok(attr) => attr.node,
                Err(_) => pool.create(ROOT, OsStr::new(&name), &new(NodeKind::Directory))?.node,
            };
        }
        let name = format!("model-{number:08}.safetensors");
        let (attr, handle) = pool.create_open(directory, OsStr::new(&name), &new(NodeKind::Region))?;
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        handle.write_at(0, &bytes)?;
        handle.flush()?;
        drop(handle);
        if number == numbers.start {
            // A handle opens what was made, or the figures mean nothing.
            let handle = pool.open_region(attr.node, Access::Read, false)?;
            let mut back = [0; BYTES];
            assert_eq!((handle.read_at(0, &mut back)?, back), (BYTES, bytes), "what was written");
        }
    }
    Ok(())
}
