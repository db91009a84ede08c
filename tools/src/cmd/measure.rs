//! `nvtier doctor --measure`: what this machine reaches, saved for `plan`, `load` and progress bars.
//!
//! One file is written past the page cache, read back, imported into a pool and read through its mount: at most twice
//! its length is written. `nvtier bench`, as its own process, does it, so that each figure is what a user would get by typing it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use doctor::ceilings::{Ceilings, DeviceCeilings, Store};
use gpudirect::{Direction, Lane, LaneOptions};
use serde_json::Value;

use crate::cli::{Global, ProgressMode};
use crate::demo::Workspace;
use crate::failure::{Failure, Outcome, code};
use crate::{interrupt, output, size};

/// A shorter file is no measure.
const FILE_LEAST: u64 = 64 << 20;
/// Reads of it; the best counts, since a ceiling is asked for.
const RUNS: usize = 3;
/// How long copies are measured.
const COPY_TIME: Duration = Duration::from_millis(700);
/// Length of a copy in host memory: larger than caches.
const COPY_BYTES: usize = 256 << 20;

/// Measures with a file of so many bytes (fewer where there is little room), saves, and says whether that could be done.
pub fn measure(global: &Global, path: &Path, wanted: u64) -> Outcome<Ceilings> {
    if wanted < FILE_LEAST {
        return Err(Failure::usage(format!(
            "--measure-bytes is at least {}: less is no measure",
            size::human(FILE_LEAST)
        )));
    }
    let base = existing(path)?;
    let free = rustix::fs::statvfs(&base).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize)).map_err(
        |error| Failure::io(format!("look at the file system of {}", base.display()), &error.into()),
    )?;
    let bytes = wanted.min(free / 4) / (1 << 20) * (1 << 20);
    if bytes < FILE_LEAST {
        let message = format!(
            "measure below {}: {} are free, {} are needed",
            base.display(),
            size::human(free),
            size::human(4 * FILE_LEAST)
        );
        return Err(Failure::new(code::NO_SPACE, "NoSpace", message).hint("make room, or name another path"));
    }
    say(
        global,
        &format!(
            "measuring below {}: at most {} are written, and removed",
            base.display(),
            size::human(2 * bytes)
        ),
    );
    let mut workspace = Workspace::create(Some(&base), false, bytes)?;
    let mut found = Ceilings {
        measured_unix: SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| time.as_secs()),
        path: base.clone(),
        ..Ceilings::default()
    };
    if workspace.is_memory() {
        found.skipped.push("drive: the path is in memory, not on a drive; its rates are memory's".into());
    }
    let outcome = all(global, &mut workspace, bytes, &mut found);
    let cleaned = workspace.close();
    outcome?;
    cleaned?;
    if !Store::of_user().put(path, &found) {
        found.skipped.push(
            "saving: the user's state folder cannot be written, so nothing remembers these figures".into(),
        );
    }
    Ok(found)
}

fn say(global: &Global, text: &str) {
    if !global.json && global.progress != ProgressMode::None {
        output::note(text);
    }
}

fn existing(path: &Path) -> Outcome<PathBuf> {
    let mut base = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    while !base.exists() && base.pop() {}
    if base.is_dir() {
        return Ok(base);
    }
    Err(Failure::usage(format!("measure below {}: it is no directory", path.display()))
        .hint("name a directory on the drive; a block device is measured by `nvtier bench`"))
}

fn all(global: &Global, workspace: &mut Workspace, bytes: u64, found: &mut Ceilings) -> Outcome {
    found.memory_copy = Some(copies());
    found.memory_fresh = Some(fresh());
    interrupt::check()?;
    match device() {
        Ok(device) => found.device = Some(device),
        Err(why) => found.skipped.push(format!("copies to and from a GPU: {why}")),
    }
    interrupt::check()?;
    let file = workspace.path().join("file");
    let length = format!("--size={bytes}");
    let direct = ["--bs=1m", "--ioengine=io_uring", "--direct=1", "--iodepth=32"];
    let write = [&direct[..], &["--rw=write", "--end_fsync=1", &length]].concat();
    found.drive_write = Some(bench(&file, "write", &write)?);
    found.written_bytes += bytes;
    let read = [&direct[..], &["--rw=read"]].concat();
    found.drive_read = Some(best(|| bench(&file, "read", &read))?);
    say(global, "the drive is measured; now a pool, and its mount");
    let pool = workspace.path().join("pool");
    own(&[OsStr::new("format"), pool.as_os_str()])?;
    own(&[OsStr::new("import"), file.as_os_str(), "file".as_ref(), "--pool".as_ref(), pool.as_os_str()])?;
    found.written_bytes += bytes;
    let of_pool = format!("--pool={}", pool.display());
    let read = ["--rw=read", "--bs=1m", "--ioengine=pool", "--iodepth=16", "--pool_ram=0", &of_pool];
    found.pool_read = Some(best(|| bench(Path::new("file"), "read", &read))?);
    match mount(workspace, &pool) {
        Ok(rate) => found.mount_read = Some(rate),
        Err(failure) if failure.code == code::UNSUPPORTED || failure.kind == "PermissionDenied" => {
            found.skipped.push(format!("mount: {}", failure.message));
        }
        Err(failure) => return Err(failure),
    }
    Ok(())
}

/// The highest of a few runs.
fn best(mut run: impl FnMut() -> Outcome<f64>) -> Outcome<f64> {
    let mut best = 0.0f64;
    for _ in 0..RUNS {
        best = best.max(run()?);
    }
    Ok(best)
}

/// Reads of the pool's file through a mount, not cached.
fn mount(workspace: &mut Workspace, pool: &Path) -> Outcome<f64> {
    let mountpoint = workspace.mount(pool)?;
    let rate = best(|| {
        crate::demo::drop_below(pool)
            .map_err(|error| Failure::io("drop the pool's files from the page cache", &error))?;
        bench(&mountpoint.join("file"), "read", &["--rw=read", "--bs=1m", "--ioengine=pread"])
    });
    workspace.unmount()?;
    rate
}

/// Runs this program again.
fn own(args: &[&OsStr]) -> Outcome<Vec<u8>> {
    interrupt::check()?;
    let program = std::env::current_exe().map_err(|error| Failure::io("find this program", &error))?;
    let name = args[0].to_string_lossy().into_owned();
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure::io(format!("run nvtier {name}"), &error))?;
    interrupt::check()?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::failed(format!("measure: nvtier {name} failed: {}", message.trim())));
    }
    Ok(output.stdout)
}

/// Bytes per second of a run of `nvtier bench` on a file.
pub fn bench(file: &Path, direction: &str, options: &[&str]) -> Outcome<f64> {
    let mut filename = std::ffi::OsString::from("--filename=");
    filename.push(file.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:"));
    let mut args: Vec<&OsStr> =
        ["bench", "--name=measure", "--output-format=json", "--ceiling=off"].map(OsStr::new).to_vec();
    args.push(&filename);
    args.extend(options.iter().map(OsStr::new));
    let report: Value = serde_json::from_slice(&own(&args)?)
        .map_err(|error| Failure::failed(format!("measure: nvtier bench wrote no JSON: {error}")))?;
    let rate = report["jobs"][0][direction]["bw_bytes"].as_f64().filter(|rate| *rate > 0.0);
    rate.ok_or_else(|| Failure::failed(format!("measure: nvtier bench moved nothing ({direction})")))
}

/// Copies in host memory by one thread, bytes per second.
fn copies() -> f64 {
    // Written before, so that no copy waits for pages.
    let source = vec![0x5au8; COPY_BYTES];
    let mut target = vec![0xa5u8; COPY_BYTES];
    let mut best = 0.0f64;
    let start = Instant::now();
    while start.elapsed() < COPY_TIME {
        let before = Instant::now();
        target.copy_from_slice(&source);
        std::hint::black_box(&mut target);
        best = best.max(COPY_BYTES as f64 / before.elapsed().as_secs_f64().max(1e-9));
    }
    best
}

/// Copies into new memory by one thread, bytes per second. One long allocation: what the allocator keeps of it is not counted twice.
fn fresh() -> f64 {
    let source = vec![0x5au8; COPY_BYTES / 16];
    let mut target = Vec::with_capacity(COPY_BYTES);
    let before = Instant::now();
    for _ in 0..16 {
        target.extend_from_slice(&source);
    }
    std::hint::black_box(&mut target);
    COPY_BYTES as f64 / before.elapsed().as_secs_f64().max(1e-9)
}

/// Copies between pinned memory and the first GPU.
fn device() -> Result<DeviceCeilings, String> {
    let driver = gpudirect::driver::open("cuda:0").map_err(|error| error.to_string())?;
    let name = driver.info().map_err(|error| error.to_string())?.name;
    let options = LaneOptions { ring: 64 << 20, ..LaneOptions::default() };
    let lane = Lane::new(driver, options).map_err(|error| error.to_string())?;
    let rate = |direction| lane.copy_ceiling_of(direction, COPY_TIME).map_err(|error| error.to_string());
    Ok(DeviceCeilings { name, htod: rate(Direction::ToDevice)?, dtoh: rate(Direction::ToHost)? })
}

/// For people.
pub fn text(found: &Ceilings) -> String {
    let mut lines = vec![format!(
        "measured below {} ({} written)",
        found.path.display(),
        size::human(found.written_bytes)
    )];
    let mut line = |what: &str, rate: Option<f64>| {
        if let Some(rate) = rate {
            lines.push(format!("  {what:<22} {}", size::rate(rate)));
        }
    };
    line("drive, reads", found.drive_read);
    line("drive, writes", found.drive_write);
    line("pool, reads, checked", found.pool_read);
    line("mount, reads, cold", found.mount_read);
    line("copies in memory", found.memory_copy);
    line("into fresh memory", found.memory_fresh);
    if let Some(device) = &found.device {
        line("to the GPU", Some(device.htod));
        line("from the GPU", Some(device.dtoh));
    }
    lines.extend(found.skipped.iter().map(|why| format!("  not measured: {}", output::printable(why))));
    lines.join("\n")
}
