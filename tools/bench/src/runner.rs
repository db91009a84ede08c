//! Runs jobs: files first, then phase by phase (`stonewall` separates phases) all workers at once, sampled twice a second.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Files, PoolSource};
use crate::layout;
use crate::settings::{EngineKind, Settings};
use crate::sys::{self, DiskStat};
use crate::work::{Span, Work};
use crate::worker::{self, Outcome, Plan, Progress};

/// How often bandwidth is sampled: fio's `bwavgtime`.
const SAMPLE: Duration = Duration::from_millis(500);

/// One worker's result with what the report needs to know of it.
#[derive(Debug)]
pub struct WorkerReport {
    /// The job it ran.
    pub settings: Arc<Settings>,
    /// Reporting group.
    pub group: u32,
    /// What it measured.
    pub outcome: Outcome,
    /// Files it used.
    pub paths: Vec<PathBuf>,
    /// Part of them.
    pub span: Span,
    /// For `ioengine=pool`: a file on the pool's drive.
    pub pool_file: Option<PathBuf>,
    /// Seconds since the command started, when it ended.
    pub elapsed_s: u64,
}

/// What the machine did while a phase ran.
#[derive(Clone, Debug, Default)]
pub struct PhaseUsage {
    /// Reporting groups of the phase, first and last.
    pub groups: (u32, u32),
    /// Wall time, nanoseconds.
    pub wall_ns: u64,
    /// CPU time of this process, nanoseconds.
    pub process_cpu_ns: u64,
    /// Busy share of all CPUs, 0..=1; `None` when too short to tell.
    pub machine_busy: Option<f64>,
    /// What each disk did.
    pub disks: Vec<DiskStat>,
}

/// Everything a run yields.
#[derive(Debug, Default)]
pub struct RunReport {
    /// Workers, in order of jobs.
    pub workers: Vec<WorkerReport>,
    /// One a phase.
    pub phases: Vec<PhaseUsage>,
    /// Lines worth printing: what was laid out, fallbacks, profiles.
    pub notes: Vec<String>,
    /// Ended by SIGINT or SIGTERM.
    pub interrupted: bool,
}

/// Told about what happens meanwhile.
pub trait Observer {
    /// Something worth a line, at once.
    fn note(&mut self, line: &str);
    /// Twice a second: bytes and operations done, read and written, since the phase began, and its planned bytes.
    fn progress(
        &mut self,
        elapsed: Duration,
        bytes: [u64; 2],
        ios: [u64; 2],
        planned: Option<u64>,
        jobs: usize,
    );
}

/// Runs all jobs. Errors of a job are in its outcome; the `Err` is for what kept jobs from starting.
pub fn run(
    jobs: &[Settings],
    interrupted: &Arc<AtomicBool>,
    observer: &mut dyn Observer,
) -> Result<RunReport> {
    let started = Instant::now();
    let mut report = RunReport::default();
    let mut phase: Vec<(u32, Settings)> = Vec::new();
    let mut group = 0;
    for (index, job) in jobs.iter().enumerate() {
        let first = index == 0;
        if !first && job.stonewall {
            run_phase(std::mem::take(&mut phase), started, interrupted, observer, &mut report)?;
        }
        // As in fio: groups end at stonewalls and new_group; group_reporting decides how they are shown.
        if !first && (job.stonewall || job.new_group) {
            group += 1;
        }
        phase.push((group, job.clone()));
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
    }
    run_phase(phase, started, interrupted, observer, &mut report)?;
    report.interrupted = interrupted.load(Ordering::Relaxed);
    Ok(report)
}

fn run_phase(
    jobs: Vec<(u32, Settings)>,
    started: Instant,
    interrupted: &Arc<AtomicBool>,
    observer: &mut dyn Observer,
    report: &mut RunReport,
) -> Result<()> {
    if interrupted.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut plans = Vec::new();
    let mut shared = Shared { pools: Vec::new(), stop: Arc::default(), interrupted: interrupted.clone() };
    for (group, settings) in &jobs {
        plans.extend(plan(settings, *group, &mut shared, observer, report)?);
    }
    drop(shared);
    plans.retain(|plan| !plan.settings.create_only);
    if plans.is_empty() {
        return Ok(());
    }
    let groups = (plans[0].group, plans[plans.len() - 1].group);
    let planned: Option<u64> = plans
        .iter()
        .map(|plan| Work::new(&plan.settings, plan.index, plan.span, plan.trace.clone()).total_bytes())
        .sum();
    let barrier = Barrier::new(plans.len() + 1);
    let mut samples = Vec::new();
    let mut usage = PhaseUsage { groups, ..PhaseUsage::default() };
    let outcomes = std::thread::scope(|scope| {
        let workers: Vec<_> = plans
            .iter()
            .map(|plan| {
                let name = format!("bench-{}", plan.index);
                let run = || {
                    let outcome = worker::run(plan, &barrier);
                    (outcome, started.elapsed().as_secs())
                };
                std::thread::Builder::new().name(name).spawn_scoped(scope, run)
            })
            .collect();
        if let Some(error) = workers.iter().find_map(|worker| worker.as_ref().err()) {
            // The barrier would wait for ever for the thread that is not there.
            eprintln!("nvtier bench: cannot start {} threads: {error}", plans.len());
            std::process::exit(1);
        }
        let disks = sys::disk_stats();
        let ticks = sys::machine_ticks();
        let cpu = sys::process_cpu_ns();
        barrier.wait();
        let begun = Instant::now();
        samples = monitor(&plans, begun, planned, observer);
        usage.wall_ns = begun.elapsed().as_nanos() as u64;
        usage.process_cpu_ns = sys::process_cpu_ns() - cpu;
        let (busy, idle) = sys::machine_ticks();
        let (busy, idle) = (busy - ticks.0, idle - ticks.1);
        usage.machine_busy = (busy + idle >= 20).then(|| busy as f64 / (busy + idle) as f64);
        let after = sys::disk_stats();
        usage.disks = after
            .iter()
            .filter_map(|now| disks.iter().find(|then| then.name == now.name).map(|then| now.since(then)))
            .collect();
        workers.into_iter().map(|worker| worker.expect("checked above").join()).collect::<Vec<_>>()
    });
    for ((plan, outcome), samples) in plans.iter().zip(outcomes).zip(samples) {
        let (mut outcome, elapsed_s) = outcome
            .map_err(|_| Error::new(ErrorKind::Io, format!("a worker of {} panicked", plan.settings.name)))?;
        for (direction, samples) in outcome.directions.iter_mut().zip(&samples) {
            if direction.ios > 0 {
                direction.bw_samples = samples.iter().map(|sample| sample.0).collect();
                direction.iops_samples = samples.iter().map(|sample| sample.1).collect();
            }
        }
        if let Some(note) = outcome.note.take()
            && !report.notes.contains(&note)
        {
            report.notes.push(note);
        }
        report.workers.push(WorkerReport {
            settings: plan.settings.clone(),
            group: plan.group,
            outcome,
            paths: plan.files.paths.clone(),
            span: plan.span,
            pool_file: plan.files.pool.as_ref().and_then(|pool| pool.drive_path()),
            elapsed_s,
        });
    }
    report.phases.push(usage);
    for plan in plans.iter().filter(|plan| plan.settings.unlink && plan.files.pool.is_none()) {
        for path in &plan.files.paths {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("cannot remove {}", path.display()), error));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Samples of one worker: per direction, (bytes/s, operations/s).
type Samples = [Vec<(f64, f64)>; 2];

/// Samples every worker twice a second until all are through.
fn monitor(
    plans: &[Plan],
    begun: Instant,
    planned: Option<u64>,
    observer: &mut dyn Observer,
) -> Vec<Samples> {
    let mut samples: Vec<Samples> = plans.iter().map(|_| Samples::default()).collect();
    let mut last: Vec<([u64; 2], [u64; 2])> = vec![([0; 2], [0; 2]); plans.len()];
    let mut last_at = Instant::now();
    loop {
        let mut waited = Duration::ZERO;
        while waited < SAMPLE && !plans.iter().all(|plan| plan.progress.finished.load(Ordering::Acquire)) {
            // Short naps, so that a run of milliseconds is not held up.
            let nap = Duration::from_millis(if begun.elapsed() < SAMPLE { 2 } else { 20 });
            std::thread::sleep(nap);
            waited = last_at.elapsed();
        }
        if plans.iter().all(|plan| plan.progress.finished.load(Ordering::Acquire)) {
            return samples;
        }
        let seconds = last_at.elapsed().as_secs_f64();
        last_at = Instant::now();
        let (mut all_bytes, mut all_ios) = ([0; 2], [0; 2]);
        for ((plan, samples), last) in plans.iter().zip(&mut samples).zip(&mut last) {
            let bytes: [u64; 2] = std::array::from_fn(|d| plan.progress.bytes[d].load(Ordering::Relaxed));
            let ios: [u64; 2] = std::array::from_fn(|d| plan.progress.ios[d].load(Ordering::Relaxed));
            for d in 0..2 {
                let moved = (bytes[d] - last.0[d], ios[d] - last.1[d]);
                if plan.progress.measuring.load(Ordering::Relaxed) && moved.1 > 0 {
                    samples[d].push((moved.0 as f64 / seconds, moved.1 as f64 / seconds));
                }
                all_bytes[d] += bytes[d];
                all_ios[d] += ios[d];
            }
            *last = (bytes, ios);
        }
        observer.progress(begun.elapsed(), all_bytes, all_ios, planned, plans.len());
    }
}

/// What the workers of a phase share.
struct Shared {
    pools: Vec<(PathBuf, Arc<PoolSource>)>,
    stop: Arc<AtomicBool>,
    interrupted: Arc<AtomicBool>,
}

/// The workers of one job: names its files, lays them out, opens its pool, prepares its profile.
fn plan(
    settings: &Settings,
    group: u32,
    shared: &mut Shared,
    observer: &mut dyn Observer,
    report: &mut RunReport,
) -> Result<Vec<Plan>> {
    let usage = |why: String| Error::new(ErrorKind::Usage, format!("job '{}': {why}", settings.name));
    let own = Arc::new(settings.clone());
    let mut plans = Vec::new();
    for index in 0..settings.numjobs {
        let paths = layout::paths(settings, index);
        let pool = match (settings.engine, &settings.pool) {
            (EngineKind::Pool, Some(path)) => Some(open_pool(settings, path, &mut shared.pools)?),
            _ => None,
        };
        let mut shortest = u64::MAX;
        for path in &paths {
            layout::check_mount(settings, path)?;
            layout::check_namespace(settings, path)?;
            let present = match (&pool, settings.engine) {
                (_, EngineKind::Null) => settings.size.map_or(0, |size| size.of(1 << 30, 4096)),
                (Some(pool), _) => pool.len_of(path)?.unwrap_or(0),
                (None, _) if path.exists() => layout::len_of(path)?,
                (None, _) => 0,
            };
            shortest = shortest.min(present);
        }
        let span = Span::of(settings, index, paths.len() as u64, shortest).map_err(usage)?;
        for path in &paths {
            let needed = span.offset + span.len;
            let made = match (&pool, settings.engine) {
                (_, EngineKind::Null) => 0,
                (Some(pool), _) => pool.lay_out(settings, path, needed)?,
                (None, _) if settings.profile.is_some() => 0,
                (None, _) => layout::lay_out(settings, path, needed)?,
            };
            if made > 0 {
                let mib = made.div_ceil(1 << 20);
                observer.note(&format!("{}: Laying out IO file (1 file / {mib}MiB)", settings.name));
            }
            if settings.invalidate && pool.is_none() && settings.engine != EngineKind::Null {
                layout::invalidate(path)?;
            }
        }
        let trace = match settings.profile {
            Some(profile) => {
                let opened = Instant::now();
                let (trace, note) = read_trace(settings, profile, index, &paths[0], pool.as_deref())?;
                if index == 0 {
                    let micros = opened.elapsed().as_micros();
                    report.notes.push(format!("{note}; {} reads, opened in {micros} us", trace.len()));
                }
                Some(trace)
            }
            None => None,
        };
        plans.push(Plan {
            settings: own.clone(),
            index,
            group,
            files: Files { paths, pool },
            span,
            trace,
            progress: Arc::new(Progress::default()),
            stop: shared.stop.clone(),
            interrupted: shared.interrupted.clone(),
        });
    }
    Ok(plans)
}

fn open_pool(
    settings: &Settings,
    path: &Path,
    pools: &mut Vec<(PathBuf, Arc<PoolSource>)>,
) -> Result<Arc<PoolSource>> {
    if let Some((_, pool)) = pools.iter().find(|(known, _)| known == path) {
        return Ok(pool.clone());
    }
    let pool = Arc::new(PoolSource::open(settings, path)?);
    pools.push((path.to_path_buf(), pool.clone()));
    Ok(pool)
}

fn read_trace(
    settings: &Settings,
    profile: crate::settings::Profile,
    index: u32,
    path: &Path,
    pool: Option<&PoolSource>,
) -> Result<(Arc<[crate::offsets::Request]>, String)> {
    use std::os::unix::fs::FileExt;
    let name = path.display().to_string();
    if let Some(pool) = pool {
        let (len, mut read_at) = pool.reader(path)?;
        return crate::profile::trace(settings, profile, index, &name, len, &mut read_at);
    }
    let len = layout::len_of(path)?;
    let file = layout::open_file(path, false, false)?;
    let mut read_at = |offset: u64, buffer: &mut [u8]| {
        file.read_exact_at(buffer, offset).map_err(|error| {
            engine::Error::new(engine::ErrorKind::Io, format!("{error} at {offset} of {name}"))
        })
    };
    crate::profile::trace(settings, profile, index, &name, len, &mut read_at)
}
