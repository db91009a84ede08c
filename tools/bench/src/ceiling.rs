//! Which ceiling bound a run. Everything here is computed from what was measured; docs/bench.md explains the rules.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use doctor::ceilings::Ceilings;

use crate::io::Files;
use crate::layout;
use crate::parse::CeilingSource;
use crate::runner::{PhaseUsage, WorkerReport};
use crate::settings::{Direction, EngineKind, Pattern, Settings};
use crate::sys;
use crate::units;
use crate::work::Span;
use crate::worker::{self, Plan};

/// From this share of a ceiling on, it is the one that binds.
const REACHED: f64 = 0.90;
/// How long each point of the sweep is measured, microseconds.
const POINT_US: u64 = 300_000;

/// The best the drive does with this block size and direction.
#[derive(Clone, Debug, PartialEq)]
pub struct DriveCeiling {
    /// Bytes per second.
    pub bandwidth: f64,
    /// How it is known, for the line: "measured at depth 64".
    pub how: String,
    /// Operations in flight at which it was measured.
    pub depth: Option<u32>,
}

/// What was measured of one reporting group.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Bytes per second, both directions.
    pub bandwidth: f64,
    /// Operations per second, both directions.
    pub iops: f64,
    /// Mean latency, nanoseconds.
    pub latency_ns: f64,
    /// Operations the options allow in flight, over all workers.
    pub depth: f64,
    /// CPU share of the busiest worker, 0..=1.
    pub worker_cpu: f64,
    /// Share of that worker's time spent ready to run while other threads had the CPUs, 0..=1.
    pub worker_waiting: f64,
    /// CPU time of the process as a share of all CPUs it may use, 0..=1.
    pub process_share: f64,
    /// Busy share of all CPUs of the machine, 0..=1.
    pub machine_busy: Option<f64>,
    /// Share of the busiest worker's time spent filling, sealing and checking buffers.
    pub data_share: f64,
    /// Share of the least paused worker's time spent asleep for rate or thinktime.
    pub paused_share: f64,
    /// Disk that moved the bytes, its busy share, and the share of the bytes it moved.
    pub disk: Option<(String, f64, f64)>,
    /// The drive's ceiling.
    pub ceiling: Option<DriveCeiling>,
    /// Bytes per second of copies to the device (or from it) alone, measured now.
    pub copies: Option<f64>,
    /// What reads of a mount or a pool were measured to reach by `nvtier doctor --measure`, bytes per second.
    pub above: Option<(Bound, f64)>,
    /// What copies in memory were measured to reach by it, bytes per second.
    pub memory: Option<f64>,
    /// Bytes per second of each direction.
    pub rates: [f64; 2],
    /// No drive at all (`ioengine=null`).
    pub null: bool,
}

/// What bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// `rate`, `rate_iops` or `thinktime`.
    Option,
    /// The drive.
    Drive,
    /// Copies to or from the device.
    Device,
    /// The mount of a pool, which was measured to give no more.
    Mount,
    /// The engine of a pool, likewise.
    Pool,
    /// Too few operations in flight.
    QueueDepth,
    /// CPU time of submission, completion and the kernel.
    Cpu,
    /// CPU time of copies and checksums.
    Data,
    /// The page cache answered: memory.
    Memory,
    /// Time spent above the drive: it serves as many in flight faster.
    Software,
    /// None of the ceilings was reached.
    Unknown,
}

impl Bound {
    /// Name in the JSON report.
    pub fn name(self) -> &'static str {
        match self {
            Bound::Option => "option",
            Bound::Drive => "drive",
            Bound::Device => "device copies",
            Bound::Mount => "mount",
            Bound::Pool => "pool",
            Bound::QueueDepth => "queue depth",
            Bound::Cpu => "cpu",
            Bound::Data => "copy and checksum",
            Bound::Memory => "memory",
            Bound::Software => "software",
            Bound::Unknown => "unknown",
        }
    }
}

impl Evidence {
    /// Operations in flight on average, by Little's law: rate times latency.
    pub fn in_flight(&self) -> f64 {
        self.iops * self.latency_ns / 1e9
    }

    /// Gathers what the workers of a group and their phase measured.
    pub fn of(workers: &[&WorkerReport], phase: &PhaseUsage, ceiling: Option<DriveCeiling>) -> Evidence {
        let mut evidence = Evidence { ceiling, paused_share: 1.0, ..Evidence::default() };
        let (mut latency_sum, mut ios, mut bytes) = (0.0, 0u64, [0u64; 2]);
        for worker in workers {
            let outcome = &worker.outcome;
            let wall = outcome.runtime_ns.max(1) as f64;
            for (rate, direction) in evidence.rates.iter_mut().zip(&outcome.directions) {
                *rate += direction.bandwidth();
                evidence.bandwidth += direction.bandwidth();
                evidence.iops += direction.iops();
                latency_sum += direction.lat.sum();
                ios += direction.ios;
            }
            for (sum, direction) in bytes.iter_mut().zip(&outcome.directions) {
                *sum += direction.bytes;
            }
            evidence.depth += depth(&worker.settings);
            let (cpu, waiting) = (outcome.usage.cpu_ns as f64 / wall, outcome.usage.waited_ns as f64 / wall);
            if cpu + waiting > evidence.worker_cpu + evidence.worker_waiting {
                (evidence.worker_cpu, evidence.worker_waiting) = (cpu, waiting);
            }
            evidence.data_share = evidence.data_share.max(outcome.data_ns as f64 / wall);
            evidence.paused_share = evidence.paused_share.min(outcome.paused_ns as f64 / wall);
            evidence.null |= worker.settings.engine == EngineKind::Null;
        }
        evidence.latency_ns = if ios == 0 { 0.0 } else { latency_sum / ios as f64 };
        let cpus = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        evidence.process_share = phase.process_cpu_ns as f64 / phase.wall_ns.max(1) as f64 / cpus;
        evidence.machine_busy = phase.machine_busy;
        evidence.disk = busiest(workers, phase, bytes);
        evidence
    }

    /// Takes what `nvtier doctor --measure` saved for what this run could not find out itself.
    pub fn complete(&mut self, engine: EngineKind, saved: &Ceilings) {
        let reads_only = self.rates[Direction::Write as usize] == 0.0;
        self.above = match engine {
            EngineKind::Mount => saved.mount_read.map(|rate| (Bound::Mount, rate)),
            EngineKind::Pool => saved.pool_read.map(|rate| (Bound::Pool, rate)),
            _ => None,
        }
        .filter(|_| reads_only);
        self.memory = saved.memory_copy.filter(|_| reads_only);
        if self.ceiling.is_some() || matches!(engine, EngineKind::Null) {
            return;
        }
        // The share of each second that each direction alone would need.
        let needed =
            self.rates.iter().zip([saved.drive_read, saved.drive_write]).map(|(rate, best)| match best {
                _ if *rate == 0.0 => Some(0.0),
                best => best.map(|best| rate / best),
            });
        let Some(needed) = needed.sum::<Option<f64>>().filter(|needed| *needed > 0.0) else { return };
        self.ceiling = Some(DriveCeiling {
            bandwidth: self.bandwidth / needed,
            how: "saved by nvtier doctor --measure, blocks of 1 MiB".into(),
            depth: None,
        });
    }

    /// Which ceiling bound, and the line that says why.
    pub fn verdict(&self) -> (Bound, String) {
        let rate = format!("{}/s ({} IOPS)", units::binary(self.bandwidth), units::count(self.iops));
        let busy = format!("busiest worker {:.0} % of a CPU", 100.0 * self.worker_cpu);
        let flight = format!("{:.1} of {:.0} in flight", self.in_flight(), self.depth);
        let of_ceiling =
            self.ceiling.as_ref().map(|ceiling| (self.bandwidth / ceiling.bandwidth.max(1.0), ceiling));
        // Running or waiting for a CPU nearly all the time; or, where other threads of ours do the work, all CPUs full
        // and mostly with us.
        let full = self.machine_busy.is_some_and(|busy| busy >= 0.95) && self.process_share >= 0.5;
        let cpu_bound =
            self.worker_cpu + self.worker_waiting >= REACHED || self.process_share >= REACHED || full;
        if self.iops == 0.0 {
            return (Bound::Unknown, "nothing was moved".into());
        }
        if self.paused_share >= 0.10 {
            let slept = 100.0 * self.paused_share;
            return (
                Bound::Option,
                format!("the rate or thinktime option: {rate}; workers slept {slept:.0} % of the time"),
            );
        }
        if self.null {
            return (Bound::Cpu, format!("CPU, the harness alone (no drive): {rate}; {busy}"));
        }
        if let Some((share, ceiling)) = of_ceiling
            && share >= REACHED
            && !self.memory_answered()
        {
            let (best, how) = (units::binary(ceiling.bandwidth), &ceiling.how);
            let copies = self.copies.map_or(String::new(), |copies| {
                format!("; copies to or from the device alone reach {}/s", units::binary(copies))
            });
            let text = format!(
                "drive: {rate} is {:.0} % of its {best}/s ({how}); {flight}, {busy}{copies}",
                100.0 * share
            );
            return (Bound::Drive, text);
        }
        if let Some(copies) = self.copies
            && self.bandwidth >= REACHED * copies
        {
            let text = format!(
                "copies to or from the device: {rate} is {:.0} % of their {}/s (measured now); {flight}, {busy}",
                100.0 * self.bandwidth / copies.max(1.0),
                units::binary(copies)
            );
            return (Bound::Device, text);
        }
        if let Some((bound, best)) = self.above
            && self.bandwidth >= REACHED * best
            && !self.memory_answered()
        {
            let text = format!(
                "{}: {rate} is {:.0} % of the {}/s that it was measured to give (saved by nvtier doctor --measure); {flight}, {busy}",
                bound.name(),
                100.0 * self.bandwidth / best.max(1.0),
                units::binary(best)
            );
            return (bound, text);
        }
        if self.data_share >= 0.5 {
            let text = format!(
                "memory copy and checksum: {:.0} % of the busiest worker's time fills and checks buffers; {rate}",
                100.0 * self.data_share
            );
            return (Bound::Data, text);
        }
        if cpu_bound {
            let machine = format!(
                ", {:.0} % of its time waiting for one, this process {:.0} % of all CPUs{}",
                100.0 * self.worker_waiting,
                100.0 * self.process_share,
                self.machine_busy
                    .map_or(String::new(), |busy| format!(", all together {:.0} %", 100.0 * busy))
            );
            let memory =
                if self.memory_answered() { "; the disk moved next to nothing: memory answered" } else { "" };
            return (Bound::Cpu, format!("CPU: {busy}{machine}; {rate}, {flight}{memory}"));
        }
        if self.memory_answered() {
            let copies = self.memory.map_or(String::new(), |best| {
                let share = 100.0 * self.bandwidth / best.max(1.0);
                format!(
                    ", {share:.0} % of the {}/s of copies in memory (saved by nvtier doctor --measure)",
                    units::binary(best)
                )
            });
            let text = format!("memory: the page cache or a RAM tier answered; {rate}{copies}, {busy}");
            return (Bound::Memory, text);
        }
        if let Some((share, ceiling)) = of_ceiling
            && let Some(depth) = ceiling.depth.map(f64::from)
            && depth <= 1.25 * self.in_flight()
        {
            let alone = self.latency_ns * share * depth / self.in_flight().max(1.0);
            let text = format!(
                "software above the drive: {flight} take {:.0} us each and give {rate}, {:.0} % of the drive's {}/s ({}), which alone needs {:.0} us for each of {depth:.0}; {busy}, this process {:.0} % of all CPUs",
                self.latency_ns / 1000.0,
                100.0 * share,
                units::binary(ceiling.bandwidth),
                ceiling.how,
                alone / 1000.0,
                100.0 * self.process_share
            );
            return (Bound::Software, text);
        }
        if self.in_flight() >= 0.75 * self.depth
            && let Some((share, ceiling)) = of_ceiling
        {
            let wanted = self.in_flight() / share.max(0.01);
            let text = format!(
                "queue depth: {flight} at {:.0} us each give {rate}, {:.0} % of the drive's {}/s ({}); about {:.0} in flight would reach it if latency stayed",
                self.latency_ns / 1000.0,
                100.0 * share,
                units::binary(ceiling.bandwidth),
                ceiling.how,
                wanted.ceil()
            );
            return (Bound::QueueDepth, text);
        }
        let disk = self.disk.as_ref().map_or("no disk seen".to_owned(), |(name, busy, _)| {
            format!("{name} busy {:.0} % of the time", 100.0 * busy)
        });
        let share = of_ceiling.map_or("drive's ceiling not measured".to_owned(), |(share, ceiling)| {
            format!(
                "{:.0} % of the drive's {}/s ({})",
                100.0 * share,
                units::binary(ceiling.bandwidth),
                ceiling.how
            )
        });
        (Bound::Unknown, format!("no ceiling reached: {rate}; {share}; {flight}; {busy}; {disk}"))
    }

    /// The disk moved less than a tenth of the bytes: they came from, or stayed in, memory.
    fn memory_answered(&self) -> bool {
        self.disk.as_ref().is_some_and(|(_, _, moved)| *moved < 0.1)
    }
}

/// Operations in flight that the options allow one worker.
fn depth(settings: &Settings) -> f64 {
    match settings.engine {
        EngineKind::Pread | EngineKind::Mmap => 1.0,
        _ => f64::from(settings.iodepth),
    }
}

/// The disk under the files: the one they lie on, else (mounts, pools) the one that moved the most.
fn busiest(workers: &[&WorkerReport], phase: &PhaseUsage, bytes: [u64; 2]) -> Option<(String, f64, f64)> {
    let known = workers.iter().flat_map(|worker| &worker.paths).find_map(|path| sys::disk_of(path));
    let wanted = (bytes[0] + bytes[1]).max(1) as f64;
    let disk = match known {
        Some(name) => phase.disks.iter().find(|disk| disk.name == name)?,
        None => phase
            .disks
            .iter()
            .max_by_key(|disk| disk.bytes().iter().sum::<u64>())
            .filter(|disk| disk.bytes().iter().sum::<u64>() > 0)?,
    };
    let moved = disk.bytes().iter().sum::<u64>() as f64 / wanted;
    let busy = (disk.busy_ms as f64 * 1e6 / phase.wall_ns.max(1) as f64).min(1.0);
    Some((disk.name.clone(), busy, moved))
}

/// Finds the drive's ceiling for what a group did: given, or measured by a short sweep over queue depths on `path`.
///
/// `None` where that cannot be: mixed directions, no O_DIRECT, a mount (its drive is not reachable through it),
/// writes whose content must stay (verify). [`Evidence::complete`] may know one.
pub fn find(
    source: CeilingSource,
    settings: &Settings,
    path: Option<&Path>,
    span: Span,
) -> Option<DriveCeiling> {
    let path = match source {
        CeilingSource::Off => return None,
        CeilingSource::Given(bandwidth) => {
            return Some(DriveCeiling { bandwidth: bandwidth as f64, how: "given".into(), depth: None });
        }
        CeilingSource::Measure => path?,
    };
    let mixed = settings.pattern.read && settings.pattern.write;
    if mixed || matches!(settings.engine, EngineKind::Null | EngineKind::Mount) {
        return None;
    }
    if settings.pattern.write && (settings.verify.is_some() || settings.engine == EngineKind::Pool) {
        return None;
    }
    let direction = if settings.pattern.write { Direction::Write } else { Direction::Read };
    let block = settings.block_bytes[direction as usize].next_multiple_of(4096);
    let most = ((64 << 20) / block).clamp(8, 256) as u32;
    // Writing costs the drive's life: one point, and the deepest.
    let depths = if direction == Direction::Write { vec![most] } else { vec![most / 4, most] };
    let mut best: Option<DriveCeiling> = None;
    for depth in depths {
        let bandwidth = measure(settings, direction, block, depth, path, span)?;
        if best.as_ref().is_none_or(|best| best.bandwidth < bandwidth) {
            best = Some(DriveCeiling {
                bandwidth,
                how: format!("measured at depth {depth}"),
                depth: Some(depth),
            });
        }
    }
    best
}

/// Bytes per second of copies between pinned memory and the job's device, for engines that make such copies.
pub fn find_copies(source: CeilingSource, settings: &Settings) -> Option<f64> {
    let direction = match settings.engine {
        EngineKind::Bounce => gpudirect::Direction::ToDevice,
        EngineKind::VramWrite => gpudirect::Direction::ToHost,
        _ => return None,
    };
    if matches!(source, CeilingSource::Off) {
        return None;
    }
    let driver = crate::io::device::open_driver(settings).ok()?;
    let options = gpudirect::LaneOptions { ring: 64 << 20, ..gpudirect::LaneOptions::default() };
    let lane = gpudirect::Lane::new(driver, options).ok()?;
    lane.copy_ceiling_of(direction, Duration::from_micros(POINT_US)).ok()
}

/// Bytes per second of a short O_DIRECT run on the file.
fn measure(
    job: &Settings,
    direction: Direction,
    block: u64,
    depth: u32,
    path: &Path,
    span: Span,
) -> Option<f64> {
    let write = direction == Direction::Write;
    let settings = Settings {
        name: "ceiling".into(),
        pattern: Pattern { read: !write, write, random: job.pattern.random },
        block_bytes: [block; 2],
        iodepth: depth,
        direct: true,
        engine: EngineKind::IoUring,
        time_based: true,
        runtime_us: POINT_US,
        norandommap: true,
        randseed: job.randseed ^ 0x6365_696c,
        disable_slat: true,
        ..Settings::default()
    };
    let len = span.len.min(layout::len_of(path).ok()?.saturating_sub(span.offset)) / block * block;
    if len == 0 {
        return None;
    }
    let plan = Plan {
        settings: Arc::new(settings),
        index: 0,
        group: 0,
        files: Files { paths: vec![PathBuf::from(path)], pool: None },
        span: Span { files: 1, offset: span.offset.next_multiple_of(4096), len },
        trace: None,
        progress: Arc::default(),
        stop: Arc::default(),
        interrupted: Arc::default(),
    };
    let outcome = worker::run(&plan, &Barrier::new(1));
    outcome.error.is_none().then(|| outcome.directions[direction as usize].bandwidth()).filter(|&bw| bw > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 32 in flight at 10 ms: 3200 operations of 1 MiB a second.
    fn evidence() -> Evidence {
        Evidence {
            bandwidth: 3200.0 * 1048576.0,
            iops: 3200.0,
            latency_ns: 10e6,
            depth: 32.0,
            worker_cpu: 0.1,
            process_share: 0.05,
            machine_busy: Some(0.1),
            disk: Some(("nvme0n1".into(), 0.98, 1.0)),
            ceiling: Some(DriveCeiling {
                bandwidth: 3300.0 * 1048576.0,
                how: "measured at depth 64".into(),
                depth: Some(64),
            }),
            ..Evidence::default()
        }
    }

    fn bound(change: impl FnOnce(&mut Evidence)) -> (Bound, String) {
        let mut evidence = evidence();
        change(&mut evidence);
        evidence.verdict()
    }

    #[test]
    fn each_ceiling_is_told_from_the_others() {
        assert_eq!(bound(|_| ()).0, Bound::Drive);
        let (kind, text) = bound(|e| e.ceiling.as_mut().unwrap().bandwidth *= 2.0);
        assert_eq!(kind, Bound::QueueDepth);
        assert!(text.contains("32.0 of 32 in flight") && text.contains("about 66 in flight"), "{text}");
        let slow = |e: &mut Evidence| {
            let ceiling = e.ceiling.as_mut().unwrap();
            (ceiling.bandwidth, ceiling.depth) = (ceiling.bandwidth * 2.0, Some(32));
        };
        let (kind, text) = bound(slow);
        assert_eq!(kind, Bound::Software);
        assert!(
            text.contains("take 10000 us each") && text.contains("needs 4848 us for each of 32"),
            "{text}"
        );
        let (kind, text) = bound(|e| (e.ceiling, e.copies) = (None, Some(e.bandwidth * 1.05)));
        assert_eq!(kind, Bound::Device);
        assert!(text.contains("95 % of their"), "{text}");
        let (kind, text) = bound(|e| e.copies = Some(e.bandwidth * 9.0));
        assert_eq!(kind, Bound::Drive);
        assert!(text.contains("alone reach"), "{text}");
        assert_eq!(bound(|e| (e.ceiling, e.worker_cpu) = (None, 0.97)).0, Bound::Cpu);
        assert_eq!(bound(|e| (e.ceiling, e.data_share) = (None, 0.7)).0, Bound::Data);
        assert_eq!(bound(|e| e.paused_share = 0.4).0, Bound::Option);
        assert_eq!(bound(|e| e.disk = Some(("vda".into(), 0.0, 0.0))).0, Bound::Memory);
        assert_eq!(bound(|e| (e.ceiling, e.worker_waiting) = (None, 0.85)).0, Bound::Cpu);
        let full = |e: &mut Evidence| (e.ceiling, e.machine_busy, e.process_share) = (None, Some(0.99), 0.6);
        assert_eq!(bound(full).0, Bound::Cpu);
        // Others filling the CPUs is no bound while our worker sleeps.
        assert_eq!(bound(|e| (e.ceiling, e.machine_busy) = (None, Some(0.99))).0, Bound::Unknown);
        assert_eq!(bound(|e| e.iops = 0.0).0, Bound::Unknown);
    }

    #[test]
    fn without_a_ceiling_nothing_is_guessed() {
        let (kind, text) = bound(|e| e.ceiling = None);
        assert_eq!(kind, Bound::Unknown);
        assert!(text.contains("not measured") && text.contains("nvme0n1 busy 98 %"), "{text}");
    }

    #[test]
    fn a_given_ceiling_is_taken() {
        let span = Span { files: 1, offset: 0, len: 1 << 20 };
        let found = find(CeilingSource::Given(1000), &Settings::default(), None, span).unwrap();
        assert_eq!((found.bandwidth, found.how.as_str()), (1000.0, "given"));
        assert_eq!(find(CeilingSource::Off, &Settings::default(), None, span), None);
    }

    fn saved() -> Ceilings {
        Ceilings {
            drive_read: Some(4000.0 * 1048576.0),
            drive_write: Some(2000.0 * 1048576.0),
            mount_read: Some(3300.0 * 1048576.0),
            pool_read: Some(6000.0 * 1048576.0),
            memory_copy: Some(9600.0 * 1048576.0),
            ..Ceilings::default()
        }
    }

    /// What a run without a sweep says: bytes of these rates, in MiB a second.
    fn completed(engine: EngineKind, rates: [f64; 2], change: impl FnOnce(&mut Evidence)) -> (Bound, String) {
        let mut evidence = Evidence { ceiling: None, ..evidence() };
        evidence.rates = rates.map(|rate| rate * 1048576.0);
        evidence.bandwidth = evidence.rates.iter().sum();
        change(&mut evidence);
        evidence.complete(engine, &saved());
        evidence.verdict()
    }

    #[test]
    fn what_a_run_cannot_measure_is_what_was_saved() {
        // Half of what reads could reach, and half of what writes could: together all that the drive has.
        let (kind, text) = completed(EngineKind::IoUring, [2000.0, 1000.0], |_| ());
        assert_eq!(kind, Bound::Drive, "{text}");
        assert!(text.contains("100 % of its 3000MiB/s (saved by nvtier doctor --measure"), "{text}");
        assert_eq!(completed(EngineKind::Mount, [3900.0, 0.0], |_| ()).0, Bound::Drive);
        let (kind, text) = completed(EngineKind::Mount, [3200.0, 0.0], |_| ());
        assert_eq!(kind, Bound::Mount, "{text}");
        assert!(text.starts_with("mount: ") && text.contains("97 % of the 3300MiB/s"), "{text}");
        assert_eq!(completed(EngineKind::Pool, [0.0, 1900.0], |_| ()).0, Bound::Drive);
        assert_eq!(completed(EngineKind::Pread, [3200.0, 0.0], |_| ()).0, Bound::QueueDepth);
        // Its own sweep is better than what was saved, and a drive that moved nothing is not what bound.
        let (_, text) = completed(EngineKind::IoUring, [2000.0, 0.0], |e| e.ceiling = evidence().ceiling);
        assert!(text.contains("measured at depth 64") && !text.contains("saved"), "{text}");
        let cached = |e: &mut Evidence| e.disk = Some(("sda".into(), 0.0, 0.0));
        let (kind, text) = completed(EngineKind::Mount, [4800.0, 0.0], cached);
        assert!(kind == Bound::Memory && text.contains("50 % of the 9600MiB/s"), "{text}");
    }

    #[test]
    fn a_direction_of_which_nothing_was_saved_has_no_ceiling() {
        let mut evidence = Evidence { ceiling: None, rates: [1.0, 1.0], bandwidth: 2.0, ..evidence() };
        evidence.complete(EngineKind::IoUring, &Ceilings { drive_read: Some(1.0), ..Ceilings::default() });
        assert_eq!(evidence.ceiling, None);
    }
}
