//! Reports in fio's shapes: text, JSON, terse.

mod json;
mod normal;
mod terse;

use std::sync::Arc;

pub use json::json;
pub use normal::{normal, starting};
pub use terse::terse;

use crate::ceiling::Bound;
use crate::runner::{RunReport, WorkerReport};
use crate::settings::Settings;
use crate::stats::{DepthMap, DirectionStats, Latency};
use crate::sys::{DiskStat, ThreadUsage};

/// Latency edges of fio's distribution lines, nanoseconds: `latency_ns`, `latency_us`, `latency_ms`.
const EDGES: [(&str, u64, &[u64]); 3] = [
    ("ns", 1, &[2, 4, 10, 20, 50, 100, 250, 500, 750, 1000]),
    ("us", 1_000, &[2, 4, 10, 20, 50, 100, 250, 500, 750, 1000]),
    ("ms", 1_000_000, &[2, 4, 10, 20, 50, 100, 250, 500, 750, 1000, 2000]),
];

/// What bound a group, for the last lines and the JSON.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Reporting group.
    pub group: u32,
    /// What bound.
    pub bound: Bound,
    /// Why.
    pub text: String,
    /// Drive's ceiling, bytes per second, when known.
    pub ceiling: Option<f64>,
    /// Operations in flight on average.
    pub in_flight: f64,
    /// CPU seconds of this process per 10^9 bytes moved.
    pub cpu_s_per_gb: f64,
}

/// One entry of a report: a worker, or all workers of a group with `group_reporting`.
#[derive(Debug)]
pub struct Entry {
    /// Options of the (first) job.
    pub settings: Arc<Settings>,
    /// Reporting group.
    pub group: u32,
    /// Workers in it.
    pub workers: u32,
    /// errno of what ended it, 0 for none.
    pub error: i32,
    /// The failure in words.
    pub failure: Option<String>,
    /// Seconds since the command began.
    pub elapsed_s: u64,
    /// Read and write.
    pub directions: [DirectionStats; 2],
    /// fsyncs.
    pub sync: Latency,
    /// In flight at submission.
    pub depth_level: DepthMap,
    /// Sizes of submits.
    pub depth_submit: DepthMap,
    /// Sizes of reaps.
    pub depth_complete: DepthMap,
    /// CPU, faults, switches.
    pub usage: ThreadUsage,
    /// Sum of the workers' measured time, nanoseconds: what CPU shares are shares of.
    pub cpu_wall_ns: u64,
    /// Longest measured time, nanoseconds.
    pub runtime_ns: u64,
}

impl Entry {
    fn of(worker: &WorkerReport) -> Entry {
        let outcome = &worker.outcome;
        Entry {
            settings: worker.settings.clone(),
            group: worker.group,
            workers: 1,
            error: outcome.error.as_ref().map_or(0, crate::error::Error::errno),
            failure: outcome.error.as_ref().map(ToString::to_string),
            elapsed_s: worker.elapsed_s,
            directions: outcome.directions.clone(),
            sync: outcome.sync.clone(),
            depth_level: outcome.depth_level,
            depth_submit: outcome.depth_submit,
            depth_complete: outcome.depth_complete,
            usage: outcome.usage,
            cpu_wall_ns: outcome.runtime_ns,
            runtime_ns: outcome.runtime_ns,
        }
    }

    fn merge(&mut self, worker: &WorkerReport) {
        let other = Entry::of(worker);
        self.workers += 1;
        if self.error == 0 {
            (self.error, self.failure) = (other.error, other.failure);
        }
        self.elapsed_s = self.elapsed_s.max(other.elapsed_s);
        for (mine, theirs) in self.directions.iter_mut().zip(&other.directions) {
            mine.merge(theirs);
        }
        self.sync.merge(&other.sync);
        self.depth_level.merge(&other.depth_level);
        self.depth_submit.merge(&other.depth_submit);
        self.depth_complete.merge(&other.depth_complete);
        self.usage.merge(&other.usage);
        self.cpu_wall_ns += other.cpu_wall_ns;
        self.runtime_ns = self.runtime_ns.max(other.runtime_ns);
    }

    /// User and system CPU time as percent of the time the workers ran.
    pub fn cpu_percent(&self) -> (f64, f64) {
        let (user, system) = self.usage.user_system_ns();
        let wall = self.cpu_wall_ns.max(1) as f64;
        (100.0 * user / wall, 100.0 * system / wall)
    }

    /// Bytes as a share of all that the entry's group moved in a direction, percent.
    fn share_of(&self, entries: &[Entry], direction: usize) -> f64 {
        let group: f64 = entries
            .iter()
            .filter(|entry| entry.group == self.group)
            .map(|entry| entry.directions[direction].bandwidth())
            .sum();
        if group > 0.0 { 100.0 * self.directions[direction].bandwidth() / group } else { 0.0 }
    }

    /// Completion latencies of both directions.
    fn completions(&self) -> Latency {
        let mut all = self.directions[0].clat.clone();
        all.merge(&self.directions[1].clat);
        all
    }

    /// fio's distribution: for each unit, `(label, percent)`; the last of `ms` is ">=2000".
    fn latency_shares(&self) -> Vec<(&'static str, Vec<(String, f64)>)> {
        let all = self.completions();
        let mut low = 0;
        let mut units = Vec::new();
        for (unit, scale, edges) in EDGES {
            let mut shares = Vec::new();
            for edge in edges {
                let high = edge * scale;
                // The first edge of a unit lies above the last of the unit below: nothing is counted twice.
                shares.push((edge.to_string(), all.share_between(low, high)));
                low = high.max(low);
            }
            if unit == "ms" {
                shares.push((">=2000".to_owned(), all.share_between(low, u64::MAX)));
            }
            units.push((unit, shares));
        }
        units
    }
}

/// Entries of a run: workers one by one, or joined where `group_reporting` asks for it.
pub fn entries(report: &RunReport) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for worker in &report.workers {
        let joined = worker.settings.group_reporting;
        match entries
            .iter_mut()
            .find(|entry| joined && entry.group == worker.group && entry.settings.group_reporting)
        {
            Some(entry) => entry.merge(worker),
            None => entries.push(Entry::of(worker)),
        }
    }
    entries
}

/// The disks that a run's files lie on, all phases together.
pub fn disks(report: &RunReport) -> Vec<(DiskStat, f64)> {
    let mut names: Vec<String> = Vec::new();
    for path in report.workers.iter().flat_map(|worker| &worker.paths) {
        if let Some(name) = crate::sys::disk_of(path)
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    let mut disks = Vec::new();
    for name in names {
        let mut sum = DiskStat { name: name.clone(), ..DiskStat::default() };
        let mut wall_ms = 0.0;
        for phase in &report.phases {
            wall_ms += phase.wall_ns as f64 / 1e6;
            for disk in phase.disks.iter().filter(|disk| disk.name == name) {
                for index in 0..4 {
                    sum.read[index] += disk.read[index];
                    sum.write[index] += disk.write[index];
                }
                sum.busy_ms += disk.busy_ms;
                sum.queue_ms += disk.queue_ms;
            }
        }
        let busy = if wall_ms > 0.0 { (100.0 * sum.busy_ms as f64 / wall_ms).min(100.0) } else { 0.0 };
        disks.push((sum, busy));
    }
    disks
}
