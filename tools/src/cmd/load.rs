//! `nvtier load PATH...`: tensors into the memory of a device, with a report of how fast and by which way.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::{Session, SessionOptions};
use gpudirect::autotune::{Given, Origin, Tune, Tuner};
use gpudirect::paths::{self, PathState, Survey};
use gpudirect::{
    CachePolicy, CachedMode, Control, Error, ErrorKind, Lane, LaneOptions, Loaded, PathChoice, PathOptions,
    Paths, PinnedTier, Plan, PlanOptions, Report, SaveOptions, SaveReport, SaveTensor, Source, Verify,
};
use serde_json::json;

use crate::cli::{CacheMode, CachedHow, Global, Load, PathMode};
use crate::failure::{Failure, Outcome, code};
use crate::progress::Progress;
use crate::{ceiling, interrupt, names, output, size};

/// How long the ceiling of copies is measured.
const CEILING_TIME: Duration = Duration::from_millis(500);
/// Files from this length on tell how fast their drive reads.
const DRIVE_FILE: u64 = 64 << 20;
/// Bytes that are compared at a time.
const CHECK_BLOCK: usize = 8 << 20;

/// Loads, reports, and gives the memory back.
pub fn run(global: &Global, args: &Load) -> Outcome {
    let driver = gpudirect::driver::open(&args.device).map_err(|error| {
        let failure = failure(error);
        if args.device == "cpu" {
            failure
        } else {
            failure.hint("`--device cpu` loads into host memory, without CUDA")
        }
    })?;
    if args.explain {
        return explain(global, args, &driver.info().map_err(failure)?);
    }
    let pool = args.pool.as_deref().map(|path| open_pool(path, args.warm)).transpose()?;
    let listed = if pool.is_none() { files(&args.paths)? } else { Vec::new() };
    let sources = match &pool {
        Some(session) => regions(session, args)?,
        None => listed
            .iter()
            .map(|path| Source::file(path, policy(args.cache)).map_err(failure))
            .collect::<Outcome<_>>()?,
    };
    let options = PlanOptions { filters: args.filter.clone(), shard: None };
    let plan = Plan::new(sources, &options).map_err(failure)?;
    let given =
        Given { chunk: args.chunk.map(|size| size as usize), depth: args.depth, threads: args.threads };
    let defaults = LaneOptions::default();
    let lane = LaneOptions {
        chunk: given.chunk.unwrap_or(defaults.chunk),
        ring: args.ring.map_or(defaults.ring, |size| size as usize),
        depth: given.depth.unwrap_or(defaults.depth),
        threads: given.threads.unwrap_or(defaults.threads),
        origin: if given == Given::default() { Origin::Default } else { Origin::Given },
        cached: match args.cached {
            CachedHow::Auto => CachedMode::Auto,
            CachedHow::Map => CachedMode::Map,
            CachedHow::Copy => CachedMode::Copy,
        },
        ..defaults
    };
    let mut lane = Lane::new(driver, lane).map_err(failure)?;
    let warmed = match (&pool, args.warm) {
        (Some(session), Some(_)) => Some(warm(session, &plan)?),
        _ => None,
    };
    // Before the first look at the clock: a program that keeps its pool open pins the tier once.
    let tier = match pool.as_ref().and_then(Session::pool).and_then(|pool| pool.ram_arena()) {
        Some(arena) if plan.wants_tier() => {
            let tier = PinnedTier::new(lane.driver(), arena).map_err(failure)?;
            lane.use_tier(tier).map_err(failure)?;
            true
        }
        _ => false,
    };
    let mut poll = |_: u64, _: u64| !interrupt::requested();
    let mut control = Control { progress: Some(&mut poll), ..Control::default() };
    let tune = if args.tune { Tune::Now } else { Tune::FirstUse };
    let tuned = match args.no_tune {
        true => None,
        false => {
            Tuner::here().settle(&mut lane, plan.sources(), given, tune, &mut control).map_err(failure)?
        }
    };
    let total = plan.tensors().iter().map(|tensor| tensor.len).sum();
    let drive = args.pool.as_ref().or(args.paths.first()).and_then(|path| ceiling::of_path(path));
    let mut progress = Progress::new(global, format!("load to {}", args.device), total, drive);
    let loaded = {
        let mut watch = |done: u64, _: u64| {
            progress.set(done);
            !interrupt::requested()
        };
        let mut control = Control { progress: Some(&mut watch), ..Control::default() };
        gpudirect::load_by(&mut lane, &plan, &Paths::here(), &way(args), &mut control)
    };
    let mut loaded = loaded.map_err(failure)?;
    loaded.report.notes.extend(tuned);
    if let (Some(read), false) = (warmed, tier) {
        loaded.report.notes.push(format!(
            "--warm: {} were read, and there is no RAM tier that has them: a pool in one directory, or of another process, has none here \
             (the page cache is a directory's tier: load it twice)",
            size::human(read)
        ));
    }
    progress.finish();
    let checked = if args.check { Some(check(&lane, &plan, &loaded, pool.as_ref())?) } else { None };
    let saved = args.save.as_deref().map(|path| save(global, &mut lane, &loaded, path)).transpose()?;
    let copy_ceiling =
        if args.ceilings { Some(lane.copy_ceiling(CEILING_TIME).map_err(failure)?) } else { None };
    let measured = match args.ceilings && args.pool.is_none() {
        true => drive_now(&listed, &mut loaded.report.notes)?,
        false => None,
    };
    let ceilings = Ceilings { copy: copy_ceiling, drive: measured.or(drive), drive_now: measured.is_some() };
    if global.json {
        let rate = rate_of(&loaded.report);
        return output::json(&json!({
            "load": loaded.report,
            "checked_bytes": checked,
            "save": saved,
            "ceilings": {
                "copy_bytes_per_second": ceilings.copy,
                "drive_bytes_per_second": ceilings.drive,
                "drive_measured": ceilings.drive.map(|_| if ceilings.drive_now { "now" } else { "earlier" }),
                "binding": ceilings.binding().map(|(name, bytes)| {
                    json!({ "ceiling": name, "bytes_per_second": bytes, "share": rate / bytes.max(1.0) })
                }),
            },
        }));
    }
    output::line(&describe(&loaded.report, checked, saved.as_ref(), &ceilings))
}

struct Ceilings {
    /// Pinned memory to the device, measured now.
    copy: Option<f64>,
    /// The drive's, measured now, or else as it was measured last by `doctor --measure` or the demo.
    drive: Option<f64>,
    drive_now: bool,
}

impl Ceilings {
    /// The lowest of those that are known: a load cannot be faster.
    fn binding(&self) -> Option<(&'static str, f64)> {
        let known = [("drive", self.drive), ("copies", self.copy)];
        let known = known.into_iter().filter_map(|(name, rate)| Some((name, rate?)));
        known.min_by(|(_, a), (_, b)| a.total_cmp(b))
    }
}

fn rate_of(report: &Report) -> f64 {
    report.bytes as f64 / report.seconds.max(1e-9)
}

/// Bytes a second that the drive of the first file that is long enough reads now, past the page cache. Why there is none is noted.
fn drive_now(listed: &[PathBuf], notes: &mut Vec<String>) -> Outcome<Option<f64>> {
    let long = |path: &&PathBuf| std::fs::metadata(path).is_ok_and(|file| file.len() >= DRIVE_FILE);
    let Some(path) = listed.iter().find(long) else {
        notes.push(format!(
            "the drive was not measured: no file has {} or more to read",
            size::human(DRIVE_FILE)
        ));
        return Ok(None);
    };
    let options = ["--rw=read", "--bs=1m", "--ioengine=io_uring", "--iodepth=32", "--direct=1"];
    let time = ["--runtime=1", "--time_based"];
    match super::measure::bench(path, "read", &[&options[..], &time].concat()) {
        Ok(rate) => Ok(Some(rate)),
        Err(failure) if failure.code == code::INTERRUPTED => Err(failure),
        Err(failure) => {
            notes.push(format!("the drive was not measured: {}", failure.message));
            Ok(None)
        }
    }
}

fn way(args: &Load) -> PathOptions {
    let choice = match args.path {
        PathMode::Auto => PathChoice::Auto,
        PathMode::Bounce => PathChoice::Bounce,
        PathMode::Cufile => PathChoice::CuFile,
    };
    PathOptions { choice, retest: args.retest, ..PathOptions::default() }
}

/// Says which ways there are, and loads nothing.
fn explain(global: &Global, args: &Load, device: &gpudirect::DeviceInfo) -> Outcome {
    let place = args.pool.as_ref().unwrap_or(&args.paths[0]);
    std::fs::metadata(place).map_err(|error| Failure::io(format!("look at {}", place.display()), &error))?;
    let survey = paths::survey(device, place);
    if global.json {
        return output::json(&json!(survey));
    }
    let mut text = describe_survey(&survey);
    if args.pool.is_some() && !args.no_verify {
        text.push_str("\nThe pool's checksums are compared on the way (no --no-verify): by bounce, whatever else is usable.");
    }
    output::line(&text)
}

fn describe_survey(survey: &Survey) -> String {
    let Survey { device, place, cufile, paths } = survey;
    let model = if place.model.is_empty() { String::new() } else { format!(" ({})", place.model) };
    let mut lines = vec![
        format!("device      {} ({})", device.id, device.name),
        format!("source      {}{model}", output::printable(&place.describe())),
    ];
    if let Some(cufile) = cufile {
        let (major, minor) = cufile.nvidia_fs;
        lines.push(format!("cuFile      {}, nvidia-fs {major}.{minor}", cufile.library));
    }
    // The first that is usable is the one that a load takes.
    let taken = paths.iter().position(|state| state.usable == Some(true));
    for (index, PathState { path, usable, why, conditions, .. }) in paths.iter().enumerate() {
        let state = match usable {
            Some(true)
                if Some(index) == taken && paths[..index].iter().any(|better| better.usable.is_none()) =>
            {
                "taken where the test fails"
            }
            Some(true) if Some(index) == taken => "taken",
            Some(true) => "usable, not the best",
            Some(false) => "not taken",
            None => "to be tested",
        };
        let why = if why.is_empty() { String::new() } else { format!(": {}", output::printable(why)) };
        lines.push(format!("{path}: {state}{why}"));
        for condition in conditions {
            let mark = match condition.met {
                Some(true) => "yes",
                Some(false) => "NO ",
                None => "?  ",
            };
            lines.push(format!("  {mark} {}: {}", condition.needs, output::printable(&condition.found)));
        }
    }
    lines.join("\n")
}

fn policy(mode: CacheMode) -> CachePolicy {
    match mode {
        CacheMode::Auto => CachePolicy::Auto,
        CacheMode::Direct => CachePolicy::Direct,
        CacheMode::Buffered => CachePolicy::Buffered,
    }
}

fn open_pool(path: &Path, warm: Option<u64>) -> Outcome<Session> {
    let ram_bytes = warm.unwrap_or(64 << 20);
    let options = SessionOptions { read_only: true, ram_bytes, ..SessionOptions::default() };
    Session::open(path, options)
        .map_err(|error| Failure::from(error).while_doing(format!("open the pool {}", path.display())))
}

/// Reads the sources through the engine, whose RAM tier keeps what it has room for. Returns the bytes read.
fn warm(session: &Session, plan: &Plan) -> Outcome<u64> {
    let mut buffer = vec![0; CHECK_BLOCK];
    let mut done = 0;
    for source in plan.sources() {
        let reader = session.reader(source.name())?;
        let mut at = 0;
        while at < reader.len() {
            interrupt::check()?;
            let len = (reader.len() - at).min(CHECK_BLOCK as u64) as usize;
            reader.read_exact_at(at, &mut buffer[..len])?;
            at += len as u64;
        }
        done += at;
    }
    Ok(done)
}

/// Whether a name is of a tensor file that a directory stands for, by the extension: safetensors first.
fn is_tensor_file(name: &str, extension: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(stem, end)| !stem.is_empty() && end.eq_ignore_ascii_case(extension))
}

/// The files that are meant: a directory stands for its safetensors files, or else its GGUF files, in order of their names.
fn files(paths: &[PathBuf]) -> Outcome<Vec<PathBuf>> {
    let mut all = Vec::new();
    for path in paths {
        if !path.is_dir() {
            all.push(path.clone());
            continue;
        }
        let tried = || format!("list {}", path.display());
        let mut inside = Vec::new();
        for entry in path.read_dir().map_err(|error| Failure::io(tried(), &error))? {
            inside.push(entry.map_err(|error| Failure::io(tried(), &error))?.path());
        }
        inside.sort();
        let of = |extension: &str| -> Vec<PathBuf> {
            inside.iter().filter(|path| is_tensor_file(&path.to_string_lossy(), extension)).cloned().collect()
        };
        all.extend(choose(of("safetensors"), of("gguf"), &path.display().to_string())?);
    }
    Ok(all)
}

fn choose<T>(safetensors: Vec<T>, gguf: Vec<T>, place: &str) -> Outcome<Vec<T>> {
    let found = if safetensors.is_empty() { gguf } else { safetensors };
    if found.is_empty() {
        return Err(Failure::not_found(format!(
            "load {place}: there is no .safetensors and no .gguf file in it"
        )));
    }
    Ok(found)
}

fn regions(session: &Session, args: &Load) -> Outcome<Vec<Source>> {
    let verify = if args.no_verify { Verify::Never } else { Verify::Always };
    let mut sources = Vec::new();
    for path in &args.paths {
        let name = names::normalize(&path.to_string_lossy())?;
        let tried = |error: engine::Error| {
            Failure::from(error).while_doing(format!("load `{}`", output::printable(&name)))
        };
        let entry = session.stat_path(&name).map_err(tried)?;
        let list = match entry.kind {
            engine::NodeKind::Directory => {
                let inside = session.list(&name, false).map_err(tried)?;
                let of = |extension: &str| -> Vec<String> {
                    let regions = inside.iter().filter(|entry| entry.kind == engine::NodeKind::Region);
                    regions
                        .filter(|entry| is_tensor_file(&entry.path, extension))
                        .map(|entry| entry.path.clone())
                        .collect()
                };
                choose(of("safetensors"), of("gguf"), &format!("`{}`", output::printable(&name)))?
            }
            _ => vec![name.clone()],
        };
        for region in list {
            sources.push(Source::region(session, &region, verify).map_err(failure)?);
        }
    }
    Ok(sources)
}

/// Compares every byte on the device with a plain read of its source.
fn check(lane: &Lane, plan: &Plan, loaded: &Loaded, pool: Option<&Session>) -> Outcome<u64> {
    let mut compared = 0;
    let (mut expected, mut there) = (vec![0; CHECK_BLOCK], vec![0; CHECK_BLOCK]);
    for (index, source) in plan.sources().iter().enumerate() {
        let tried = |error: std::io::Error| Failure::io(format!("read {} to compare", source.name()), &error);
        let reader = match pool {
            Some(session) => Plain::Region(session.reader(source.name())?),
            None => Plain::File(File::open(source.name()).map_err(tried)?),
        };
        for (planned, tensor) in plan.tensors().iter().zip(&loaded.tensors) {
            if planned.source as usize != index {
                continue;
            }
            let mut done = 0;
            for (offset, len) in planned.ranges() {
                let mut at = 0;
                while at < len {
                    interrupt::check()?;
                    let part = (len - at).min(CHECK_BLOCK as u64) as usize;
                    match &reader {
                        Plain::Region(reader) => reader.read_exact_at(offset + at, &mut expected[..part])?,
                        Plain::File(file) => {
                            file.read_exact_at(&mut expected[..part], offset + at).map_err(tried)?
                        }
                    }
                    lane.read_device(tensor.address + done, &mut there[..part]).map_err(failure)?;
                    // Whole first: that is as fast as memory, and nearly always the end of it.
                    if expected[..part] != there[..part]
                        && let Some(bad) = (0..part).find(|&i| expected[i] != there[i])
                    {
                        return Err(Failure::corrupt(format!(
                            "byte {} of tensor `{}` on the device is {:#04x}, in {} it is {:#04x}",
                            done + bad as u64,
                            output::printable(&tensor.name),
                            there[bad],
                            source.name(),
                            expected[bad]
                        )));
                    }
                    at += part as u64;
                    done += part as u64;
                }
            }
            compared += done;
        }
    }
    Ok(compared)
}

enum Plain {
    File(File),
    Region(engine::RegionReader),
}

fn save(global: &Global, lane: &mut Lane, loaded: &Loaded, path: &Path) -> Outcome<SaveReport> {
    let tensors: Vec<SaveTensor> = loaded
        .tensors
        .iter()
        .map(|tensor| SaveTensor {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            address: tensor.address,
            len: tensor.len,
        })
        .collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    let mut progress = Progress::new(global, format!("save {}", path.display()), loaded.report.bytes, None);
    let result = {
        let mut watch = |done: u64, _: u64| {
            progress.set(done);
            !interrupt::requested()
        };
        let mut control = Control { progress: Some(&mut watch), ..Control::default() };
        gpudirect::save(lane, path, &tensors, &SaveOptions { metadata }, &mut control)
    };
    let report = result.map_err(|error| failure(error).while_doing(format!("save {}", path.display())))?;
    progress.set_total(report.bytes);
    progress.set(report.bytes);
    progress.finish();
    Ok(report)
}

fn describe(
    report: &Report,
    checked: Option<u64>,
    saved: Option<&SaveReport>,
    ceilings: &Ceilings,
) -> String {
    let device = &report.device;
    let place = if device.pci.is_empty() {
        String::new()
    } else {
        format!(", {}, driver {}", device.pci, device.driver)
    };
    let rate = rate_of(report);
    let share = |ceiling: f64| format!("{} ({:.0}%)", size::rate(ceiling), 100.0 * rate / ceiling.max(1.0));
    let mut lines = vec![
        format!("device      {} ({}{place})", device.id, device.name),
        format!(
            "loaded      {} tensors of {} files, {} in {} ({})",
            report.tensors,
            report.sources,
            size::human(report.bytes),
            size::duration(report.seconds),
            size::rate(rate)
        ),
        match report.path {
            paths::BOUNCE => format!("path        {}: drive, pinned memory, device", report.path),
            path => format!(
                "path        {path}: drive, device; no byte passed the host, no checksum was compared"
            ),
        },
    ];
    for other in &report.not_taken {
        lines.push(format!("  not       {}: {}", other.path, other.why));
    }
    for (bytes, from) in
        [(report.tier_bytes, "the RAM tier"), (report.mapped_bytes, "the page cache, by the device itself")]
    {
        if bytes > 0 {
            lines.push(format!("  of that   {} from {from}", size::human(bytes)));
        }
    }
    let what = match report.bound_by {
        "source" if report.mapped_bytes == report.bytes => "pinning pages of the page cache",
        "source" if report.cached_sources == report.sources => "copies out of the page cache",
        "source" => "the drive",
        "device" => "copies to the device",
        _ => "this thread's own work",
    };
    lines.push(format!("bound by    {what}"));
    lines.push(format!(
        "time        reads under way {:.2} s (waited for {:.2} s), copies {:.2} s (waited for {:.2} s), checksums {:.2} s",
        report.read_busy_seconds,
        report.read_wait_seconds,
        report.copy_busy_seconds,
        report.copy_wait_seconds,
        report.verify_seconds
    ));
    let settings = &report.settings;
    let origin = match settings.origin {
        Origin::Default => "the default ones",
        Origin::Given => "as given",
        Origin::Measured => "measured now",
        Origin::Remembered => "measured earlier on this machine, drive and device",
    };
    lines.push(format!(
        "settings    reads of {}, {} in flight, {} threads for what is in memory: {origin}",
        size::human(settings.chunk as u64),
        settings.depth,
        settings.threads
    ));
    if report.path_seconds >= 0.05 {
        lines.push(format!(
            "self-test   {:.2} s, before the load; its result is remembered",
            report.path_seconds
        ));
    }
    if let Some(copy) = ceilings.copy {
        lines.push(format!("ceiling     copies to the device, measured now: {}", share(copy)));
    }
    if let Some(drive) = ceilings.drive {
        let when = if ceilings.drive_now { "now" } else { "earlier" };
        lines.push(format!("ceiling     the drive, measured {when}: {}", share(drive)));
    }
    if let Some((name, bytes)) = ceilings.binding().filter(|_| ceilings.copy.is_some()) {
        let name = if name == "drive" { "the drive" } else { name };
        lines.push(format!(
            "binding     {name}, of whose rate {:.0}% was reached",
            100.0 * rate / bytes.max(1.0)
        ));
    }
    lines.push(format!(
        "memory      {} pinned (set up in {:.2} s), {} on the device, {} more than the tensors",
        size::human(report.pinned_bytes),
        report.setup_seconds,
        size::human(report.device_bytes),
        size::human(report.device_extra_bytes)
    ));
    if report.staging_bytes > 0 {
        lines.push(format!("staging     {} on the device meanwhile", size::human(report.staging_bytes)));
    }
    if let Some(bytes) = checked {
        lines.push(format!("checked     {} bytes equal those of a plain read", bytes));
    }
    if let Some(saved) = saved {
        lines.push(format!(
            "saved       {} in {} ({}), of that {:.2} s until it was flushed",
            size::human(saved.bytes),
            size::duration(saved.seconds),
            size::rate(saved.bytes as f64 / saved.seconds.max(1e-9)),
            saved.flush_seconds
        ));
    }
    for note in report.notes.iter().chain(saved.iter().flat_map(|saved| &saved.notes)) {
        lines.push(format!("note        {}", output::printable(note)));
    }
    lines.join("\n")
}

/// An error of the loader as this program's.
fn failure(error: Error) -> Failure {
    let kind = error.kind();
    let code = match kind {
        ErrorKind::NotFound => code::NOT_FOUND,
        ErrorKind::Invalid => code::USAGE,
        ErrorKind::Busy => code::BUSY,
        ErrorKind::Corrupt => code::CORRUPT,
        ErrorKind::NoSpace => code::NO_SPACE,
        ErrorKind::NoDriver | ErrorKind::OldDriver | ErrorKind::NoDevice | ErrorKind::Unsupported => {
            code::UNSUPPORTED
        }
        ErrorKind::Cancelled => code::INTERRUPTED,
        _ => code::FAILED,
    };
    let hint = match kind {
        ErrorKind::OutOfDeviceMemory => Some("load fewer tensors (--filter), or free memory on the device"),
        ErrorKind::OutOfHostMemory => {
            Some("take a smaller --ring, or raise RLIMIT_MEMLOCK: ulimit -l unlimited")
        }
        ErrorKind::Corrupt => Some("`nvtier verify` lists everything that is damaged"),
        _ => None,
    };
    let failure = Failure::new(code, &format!("{kind:?}"), crate::failure::describe(&error));
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}
