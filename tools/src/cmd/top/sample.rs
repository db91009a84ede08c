//! What `nvtier top` sees at a moment, and what two moments make.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::control::Client;
use engine::kv::admin::{Order, Report, Watched as WatchedStore};
use engine::{NodeKind, PoolInfo, PoolStat};
use serde::Serialize;
use serde_json::Value;

use super::limits::{self, Budget, Known, Limit, WearView};
use crate::failure::Outcome;
use crate::runtime::MountRecord;

/// A moment.
pub struct Sample {
    at: Instant,
    stat: PoolStat,
    /// `mount` of a mount's stats.json, when the owner is a mount of this user.
    mount: Option<Value>,
    drives: BTreeMap<String, Drive>,
    stores: Vec<WatchedStore>,
}

/// Counts of the kernel since boot, `/sys/dev/block/*/stat` (Documentation/block/stat.rst).
struct Drive {
    reads: u64,
    read_bytes: u64,
    read_ms: u64,
    writes: u64,
    written_bytes: u64,
    write_ms: u64,
    in_flight: u64,
    busy_ms: u64,
}

/// Where samples come from.
pub struct Watched {
    client: Client,
    info: PoolInfo,
    mountpoint: Option<PathBuf>,
    /// Names of drives below the members, and their files of counts.
    drives: BTreeMap<String, PathBuf>,
    known: Known,
}

impl Watched {
    /// Connects to the owner of a pool. `tbw`: what each drive is rated to be written, where the user says so.
    pub fn open(path: &Path, tbw: Option<u64>) -> Outcome<Self> {
        let client = Client::connect(path)?;
        let info = client.info()?;
        let mountpoint = MountRecord::all()
            .into_iter()
            .find(|record| record.pid == client.owner_pid() && record.is_running())
            .map(|record| record.mountpoint);
        let mut members = Vec::new();
        let mut drives = BTreeMap::new();
        for member in &info.members {
            let Some(Below { name, device, counts }) = drive_of(&member.path) else { continue };
            members.push((name.clone(), device, member.path.as_path()));
            drives.insert(name, counts);
        }
        let known = Known::look(&members, tbw);
        Ok(Self { client, info, mountpoint, drives, known })
    }

    /// Looks once.
    pub fn sample(&self) -> Outcome<Sample> {
        let stat = self.client.stat()?;
        let mount = self.mountpoint.as_ref().and_then(|point| {
            let text = fs::read(point.join(".nvtier/stats.json")).ok()?;
            Some(serde_json::from_slice::<Value>(&text).ok()?["mount"].take())
        });
        let drives =
            self.drives.iter().filter_map(|(name, path)| Some((name.clone(), Drive::read(path)?))).collect();
        // An owner of an older version does not know the question.
        let stores = match self.client.kv("", &Order::Watch, &[], None, &mut |_| {}) {
            Ok(Report::Watched(stores)) => stores,
            _ => Vec::new(),
        };
        Ok(Sample { at: Instant::now(), stat, mount, drives, stores })
    }

    /// Top-level names with the regions and bytes below them, the largest first.
    pub fn holdings(&self) -> Outcome<Vec<Holding>> {
        let mut found: BTreeMap<String, Holding> = BTreeMap::new();
        for entry in self.client.list("", true)? {
            if entry.kind != NodeKind::Region {
                continue;
            }
            let name = entry.path.split('/').next().unwrap_or_default().to_owned();
            let holding = found.entry(name.clone()).or_insert(Holding { name, regions: 0, bytes: 0 });
            holding.regions += 1;
            holding.bytes += entry.allocated;
        }
        let mut all: Vec<Holding> = found.into_values().collect();
        all.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
        Ok(all)
    }

    /// What happened between two samples.
    pub fn view(&self, before: &Sample, now: &Sample, holdings: &[Holding]) -> View {
        let seconds = now.at.duration_since(before.at).as_secs_f64().max(1e-9);
        let rate = |from: u64, to: u64| to.saturating_sub(from) as f64 / seconds;
        let mut throughput = Vec::new();
        let mut flow = |tier: &str, purpose: &str, bytes_per_second: f64| {
            throughput.push(Flow { tier: tier.to_owned(), purpose: purpose.to_owned(), bytes_per_second });
        };
        let mut latency = Vec::new();
        let mut queues = Vec::new();
        if let (Some(old), Some(new)) = (&before.mount, &now.mount) {
            let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(0);
            for (key, purpose) in
                [("served_read_bytes", "reads served"), ("served_write_bytes", "writes served")]
            {
                flow("mount", purpose, rate(number(old, key), number(new, key)));
            }
            for what in ["read", "write", "fsync"] {
                let (old, new) = (&old["times"][what], &new["times"][what]);
                queues.push(Queue { what: format!("mount {what}"), in_flight: number(new, "in_flight") });
                latency.push(Latency::between(what, old, new));
            }
        }
        let (old, new) = (&before.stat, &now.stat);
        let chunk = u64::from(self.info.chunk_size);
        let hits = new.ram.hits.saturating_sub(old.ram.hits);
        let misses = new.ram.misses.saturating_sub(old.ram.misses);
        flow("RAM", "chunks found", rate(0, hits.saturating_mul(chunk)));
        flow("pool", "reads", rate(old.read_bytes, new.read_bytes));
        flow("pool", "writes", rate(old.written_bytes, new.written_bytes));
        let mut drives = Vec::new();
        for (name, new) in &now.drives {
            let Some(old) = before.drives.get(name) else { continue };
            flow(name, "reads of all programs", rate(old.read_bytes, new.read_bytes));
            flow(name, "writes of all programs", rate(old.written_bytes, new.written_bytes));
            queues.push(Queue { what: name.clone(), in_flight: new.in_flight });
            let mean = |ms: u64, count: u64| (count > 0).then(|| ms as f64 / count as f64 / 1e3);
            drives.push(DriveView {
                name: name.clone(),
                busy: (rate(old.busy_ms, new.busy_ms) / 1e3).min(1.0),
                read_mean_seconds: mean(
                    new.read_ms.saturating_sub(old.read_ms),
                    new.reads.saturating_sub(old.reads),
                ),
                write_mean_seconds: mean(
                    new.write_ms.saturating_sub(old.write_ms),
                    new.writes.saturating_sub(old.writes),
                ),
            });
        }
        let of = |tier: &str, purpose: &str| {
            let found = throughput.iter().find(|flow: &&Flow| flow.tier == tier && flow.purpose == purpose);
            found.map(|flow| flow.bytes_per_second)
        };
        let limits = self.known.limits(of);
        let wear = self.known.wear(|device| of(device, "writes of all programs"));
        let share =
            |hits: u64, misses: u64| (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64);
        View {
            pool: self.info.path.clone(),
            owner_pid: self.client.owner_pid(),
            mountpoint: self.mountpoint.clone(),
            seconds,
            throughput,
            queues,
            latency,
            drives,
            ram: Ram {
                budget_bytes: new.ram.budget_bytes,
                used_bytes: new.ram.used_bytes,
                hit_rate: share(hits, misses),
                hit_rate_since_open: share(new.ram.hits, new.ram.misses),
            },
            capacity_bytes: new.capacity_bytes,
            used_bytes: new.used_bytes,
            corrupt_chunks: new.corrupt_chunks,
            limits,
            wear,
            write_budgets: limits::budgets(&now.stores),
            holdings: holdings.to_vec(),
        }
    }
}

impl Drive {
    fn read(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let fields: Vec<u64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let [reads, _, read_sectors, read_ms, writes, _, written_sectors, write_ms, in_flight, busy_ms, ..] =
            fields[..]
        else {
            return None;
        };
        // Sectors of 512 bytes, whatever the drive's own are.
        let bytes = |sectors: u64| sectors.saturating_mul(512);
        let (read_bytes, written_bytes) = (bytes(read_sectors), bytes(written_sectors));
        Some(Self { reads, read_bytes, read_ms, writes, written_bytes, write_ms, in_flight, busy_ms })
    }
}

/// What a member lies on.
struct Below {
    /// As /sys names it.
    name: String,
    /// `major:minor`.
    device: String,
    /// The file of its counts.
    counts: PathBuf,
}

/// The block device that a member lies on; `None` where the kernel names none (network and overlay file systems).
fn drive_of(member: &Path) -> Option<Below> {
    let metadata = fs::metadata(member).ok()?;
    let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let folder = Path::new("/sys/dev/block").join(&device);
    let name = fs::read_link(&folder).ok()?.file_name()?.to_str()?.to_owned();
    Some(Below { name, device, counts: folder.join("stat") })
}

/// All that is shown, and what `--json` prints.
#[derive(Debug, Serialize)]
pub struct View {
    /// The pool.
    pub pool: PathBuf,
    /// Who owns it.
    pub owner_pid: u32,
    /// Where it is mounted, when the owner is a mount of this user.
    pub mountpoint: Option<PathBuf>,
    /// Between the two samples.
    pub seconds: f64,
    /// Bytes a second by tier and purpose.
    pub throughput: Vec<Flow>,
    /// What waits.
    pub queues: Vec<Queue>,
    /// Times of requests of the kernel that ended between the samples.
    pub latency: Vec<Latency>,
    /// Drives below the members.
    pub drives: Vec<DriveView>,
    /// The RAM tier.
    pub ram: Ram,
    /// Bytes that the pool can hold.
    pub capacity_bytes: u64,
    /// Bytes that it holds.
    pub used_bytes: u64,
    /// Chunks that did not match their checksum since the pool was opened.
    pub corrupt_chunks: u64,
    /// Rates beside the ceilings that `nvtier doctor --measure` saved, the nearest first; empty where none were measured.
    pub limits: Vec<Limit>,
    /// Drives below the members.
    pub wear: Vec<WearView>,
    /// KV stores that somebody has open.
    pub write_budgets: Vec<Budget>,
    /// Top-level names.
    pub holdings: Vec<Holding>,
}

#[derive(Debug, Serialize)]
pub struct Flow {
    pub tier: String,
    pub purpose: String,
    pub bytes_per_second: f64,
}

#[derive(Debug, Serialize)]
pub struct Queue {
    pub what: String,
    pub in_flight: u64,
}

#[derive(Debug, Serialize)]
pub struct DriveView {
    pub name: String,
    /// Share of the time in which it had something to do.
    pub busy: f64,
    pub read_mean_seconds: Option<f64>,
    pub write_mean_seconds: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct Ram {
    pub budget_bytes: u64,
    pub used_bytes: u64,
    pub hit_rate: Option<f64>,
    pub hit_rate_since_open: Option<f64>,
}

/// A top-level name of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holding {
    pub name: String,
    pub regions: u64,
    pub bytes: u64,
}

/// Percentiles are upper ends of buckets: at most so long. `None`: nothing was served, or longer than the last bucket.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    pub what: String,
    pub requests: u64,
    pub p50_seconds: Option<f64>,
    pub p95_seconds: Option<f64>,
    pub p99_seconds: Option<f64>,
}

impl Latency {
    fn between(what: &str, old: &Value, new: &Value) -> Self {
        let list = |value: &Value| -> Vec<u64> {
            value["buckets"]
                .as_array()
                .map_or_else(Vec::new, |all| all.iter().filter_map(Value::as_u64).collect())
        };
        let (old_buckets, new_buckets) = (list(old), list(new));
        let count = |value: &Value| value["count"].as_u64().unwrap_or(0);
        let requests = count(new).saturating_sub(count(old));
        let limits: Vec<f64> = new["bucket_limits_seconds"]
            .as_array()
            .map_or_else(Vec::new, |all| all.iter().filter_map(Value::as_f64).collect());
        let percentile = |share: f64| {
            let wanted = ((requests as f64 * share).ceil() as u64).max(1);
            let mut sum = 0;
            limits.iter().enumerate().find_map(|(index, limit)| {
                let new = new_buckets.get(index).copied().unwrap_or(0);
                sum += new.saturating_sub(old_buckets.get(index).copied().unwrap_or(0));
                (requests > 0 && sum >= wanted).then_some(*limit)
            })
        };
        Self {
            what: what.to_owned(),
            requests,
            p50_seconds: percentile(0.5),
            p95_seconds: percentile(0.95),
            p99_seconds: percentile(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn percentiles_are_of_what_came_between() {
        let at = |buckets: [u64; 3], longer: u64| json!({ "count": buckets.iter().sum::<u64>() + longer, "buckets": buckets, "bucket_limits_seconds": [0.001, 0.002, 0.004] });
        let latency = Latency::between("read", &at([100, 0, 0], 0), &at([150, 45, 4], 1));
        assert_eq!(latency.requests, 100);
        let found = [latency.p50_seconds, latency.p95_seconds, latency.p99_seconds];
        assert_eq!(found, [Some(0.001), Some(0.002), Some(0.004)]);
        assert_eq!(
            Latency::between("read", &at([0, 0, 0], 0), &at([0, 0, 0], 9)).p50_seconds,
            None,
            "longer than any"
        );
        assert_eq!(
            Latency::between("read", &at([1, 0, 0], 0), &at([1, 0, 0], 0)).p50_seconds,
            None,
            "nothing came"
        );
    }
}
