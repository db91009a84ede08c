//! fio's text report (`--output-format=normal`), and the line that names the binding ceiling.

use std::fmt::Write;

use super::{Entry, Verdict};
use crate::settings::Settings;
use crate::stats::{DepthMap, DirectionStats, Latency, summary};
use crate::sys::DiskStat;
use crate::units::{binary, count, decimal};

/// What is printed before the run: one line a job, the version, how many workers.
pub fn starting(jobs: &[Settings]) -> String {
    let mut text = String::new();
    for (index, job) in jobs.iter().enumerate() {
        let group = jobs[..=index].iter().skip(1).filter(|job| job.stonewall || job.new_group).count();
        let [read, write] = job.block_bytes.map(fio_bytes);
        let _ = writeln!(
            text,
            "{}: (g={group}): rw={}, bs=(R) {read}-{read}, (W) {write}-{write}, ioengine={}, iodepth={}",
            job.name,
            job.pattern.name(),
            job.engine.name(),
            job.iodepth
        );
        if job.numjobs > 1 {
            let _ = writeln!(text, "...");
        }
    }
    let workers: u32 = jobs.iter().map(|job| job.numjobs).sum();
    let _ = writeln!(text, "{} ({})", crate::FIO_VERSION, crate::banner());
    let _ = writeln!(text, "Starting {workers} thread{}", if workers == 1 { "" } else { "s" });
    text
}

fn fio_bytes(bytes: u64) -> String {
    if bytes.is_multiple_of(1024) { format!("{}KiB", bytes / 1024) } else { format!("{bytes}B") }
}

/// The report after the run.
pub fn normal(entries: &[Entry], disks: &[(DiskStat, f64)], verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    for entry in entries {
        job(&mut text, entry, entries);
    }
    let mut groups: Vec<u32> = entries.iter().map(|entry| entry.group).collect();
    groups.dedup();
    for group in groups {
        status(&mut text, group, entries);
    }
    if !disks.is_empty() {
        text.push_str("\nDisk stats (read/write):\n");
        for (disk, busy) in disks {
            let _ = writeln!(
                text,
                "  {}: ios={}/{}, merge={}/{}, ticks={}/{}, in_queue={}, util={busy:.2}%",
                disk.name,
                disk.read[0],
                disk.write[0],
                disk.read[1],
                disk.write[1],
                disk.read[3],
                disk.write[3],
                disk.queue_ms
            );
        }
    }
    text.push('\n');
    for verdict in verdicts {
        let _ = writeln!(
            text,
            "CPU: {:.4} s/GB over the whole process (group {})",
            verdict.cpu_s_per_gb, verdict.group
        );
        let _ = writeln!(text, "Ceiling: bound by {}", verdict.text);
    }
    text
}

fn job(out: &mut String, entry: &Entry, entries: &[Entry]) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let settings = &entry.settings;
    let _ = writeln!(
        out,
        "\n{}: (groupid={}, jobs={}): err={:2}{}: pid={}: {}",
        settings.name,
        entry.group,
        entry.workers,
        entry.error,
        entry.failure.as_ref().map_or(String::new(), |failure| format!(" ({failure})")),
        std::process::id(),
        crate::calendar::utc(now.as_secs())
    );
    if let Some(description) = &settings.description {
        let _ = writeln!(out, "  Description  : [{description}]");
    }
    for (index, name) in ["read", "write"].iter().enumerate() {
        if entry.directions[index].ios > 0 {
            direction(out, name, entry, &entry.directions[index], entry.share_of(entries, index));
        }
    }
    if entry.sync.count > 0 {
        out.push_str("  fsync/fdatasync:\n");
        figures(out, "sync", &entry.sync);
        percentiles(out, "sync", &entry.sync, &settings.percentiles);
    }
    for (unit, shares) in entry.latency_shares() {
        let label = match unit {
            "ns" => "nsec",
            "us" => "usec",
            _ => "msec",
        };
        let shown: Vec<String> = shares
            .iter()
            .filter(|(_, share)| *share > 0.0)
            .map(|(edge, share)| {
                let sign = if edge.starts_with('>') { "" } else { "=" };
                if *share < 0.01 { format!("{edge}{sign}0.01%") } else { format!("{edge}{sign}{share:.2}%") }
            })
            .collect();
        for part in shown.chunks(5) {
            let _ = writeln!(out, "  lat ({label})   : {}", part.join(", "));
        }
    }
    let (user, system) = entry.cpu_percent();
    let usage = &entry.usage;
    let _ = writeln!(
        out,
        "  cpu          : usr={user:.2}%, sys={system:.2}%, ctx={}, majf={}, minf={}",
        usage.switches, usage.major_faults, usage.minor_faults
    );
    depths(out, "  IO depths    ", &entry.depth_level, ["1", "2", "4", "8", "16", "32", ">=64"]);
    depths(out, "     submit    ", &entry.depth_submit, ["0", "4", "8", "16", "32", "64", ">=64"]);
    depths(out, "     complete  ", &entry.depth_complete, ["0", "4", "8", "16", "32", "64", ">=64"]);
    let [read, write] = &entry.directions;
    let _ = writeln!(
        out,
        "     issued rwts: total={},{},0,{} short={},{},0,0 dropped=0,0,0,0",
        read.ios, write.ios, entry.sync.count, read.short_ios, write.short_ios
    );
    let _ =
        writeln!(out, "     latency   : target=0, window=0, percentile=100.00%, depth={}", settings.iodepth);
}

fn direction(out: &mut String, name: &str, entry: &Entry, stats: &DirectionStats, share: f64) {
    let _ = writeln!(
        out,
        "  {name}: IOPS={}, BW={}/s ({}/s)({}/{}msec)",
        count(stats.iops()),
        binary(stats.bandwidth()),
        decimal(stats.bandwidth()),
        binary(stats.bytes as f64),
        stats.runtime_ns / 1_000_000
    );
    let list = &entry.settings.percentiles;
    let wanted = [
        ("slat", &stats.slat, entry.settings.slat_percentiles),
        ("clat", &stats.clat, entry.settings.clat_percentiles),
        ("lat", &stats.lat, entry.settings.lat_percentiles),
    ];
    for (label, latency, _) in wanted.iter().filter(|(_, latency, _)| latency.count > 0) {
        figures(out, label, latency);
    }
    for (label, latency, _) in wanted.iter().filter(|(_, latency, wanted)| *wanted && latency.count > 0) {
        percentiles(out, label, latency, list);
    }
    if !stats.bw_samples.is_empty() {
        let (scale, unit) = if stats.bandwidth() >= 1e9 { (1048576.0, "MiB") } else { (1024.0, "KiB") };
        let samples: Vec<f64> = stats.bw_samples.iter().map(|bytes| bytes / scale).collect();
        let (min, max, mean, deviation) = summary(&samples);
        let n = samples.len();
        let _ = writeln!(
            out,
            "   bw ({unit:>5}/s): min={min:5.0}, max={max:5.0}, per={share:.2}%, avg={mean:.2}, stdev={deviation:.2}, samples={n}"
        );
        let (min, max, mean, deviation) = summary(&stats.iops_samples);
        let _ = writeln!(
            out,
            "   iops        : min={min:5.0}, max={max:5.0}, avg={mean:.2}, stdev={deviation:.2}, samples={n}"
        );
    }
}

/// Divisor and name of the unit fio would choose for a latency.
fn unit(nanos: f64) -> (f64, &'static str) {
    if nanos >= 2_000_000.0 {
        (1e6, "msec")
    } else if nanos >= 2_000.0 {
        (1e3, "usec")
    } else {
        (1.0, "nsec")
    }
}

fn figures(out: &mut String, name: &str, latency: &Latency) {
    let (scale, unit) = unit(latency.mean().min(latency.max() as f64).max(latency.min() as f64));
    let _ = writeln!(
        out,
        "    {name:>4} ({unit}): min={:.0}, max={}, avg={:.2}, stdev={:.2}",
        latency.min() as f64 / scale,
        count(latency.max() as f64 / scale),
        latency.mean() / scale,
        latency.stddev() / scale
    );
}

fn percentiles(out: &mut String, name: &str, latency: &Latency, list: &[f64]) {
    let lowest = list.first().map_or(0, |&p| latency.percentile(p));
    let (scale, unit) = unit(lowest as f64);
    let _ = writeln!(out, "    {name} percentiles ({unit}):");
    for (row, part) in list.chunks(4).enumerate() {
        let cells: Vec<String> = part
            .iter()
            .map(|&p| format!("{p:5.2}th=[{:5.0}]", latency.percentile(p) as f64 / scale))
            .collect();
        let end = if (row + 1) * 4 < list.len() { "," } else { "" };
        let _ = writeln!(out, "     | {}{end}", cells.join(", "));
    }
}

fn status(out: &mut String, group: u32, entries: &[Entry]) {
    let _ = writeln!(out, "\nRun status group {group} (all jobs):");
    for (index, name) in ["READ", "WRITE"].iter().enumerate() {
        let all: Vec<&DirectionStats> = entries
            .iter()
            .filter(|e| e.group == group)
            .map(|e| &e.directions[index])
            .filter(|d| d.ios > 0)
            .collect();
        let bytes: u64 = all.iter().map(|stats| stats.bytes).sum();
        if bytes == 0 {
            continue;
        }
        let run = |pick: fn(u64, u64) -> u64| all.iter().map(|s| s.runtime_ns).reduce(pick).unwrap_or(0);
        let (longest, shortest) = (run(u64::max), run(u64::min));
        let total = bytes as f64 * 1e9 / longest.max(1) as f64;
        let rates = all.iter().map(|stats| stats.bandwidth());
        let (low, high) = rates.fold((f64::INFINITY, 0.0f64), |(l, h), rate| (l.min(rate), h.max(rate)));
        let _ = writeln!(
            out,
            "{name:>7}: bw={}/s ({}/s), {}/s-{}/s ({}/s-{}/s), io={} ({}), run={}-{}msec",
            binary(total),
            decimal(total),
            binary(low),
            binary(high),
            decimal(low),
            decimal(high),
            binary(bytes as f64),
            decimal(bytes as f64),
            shortest / 1_000_000,
            longest / 1_000_000
        );
    }
}

fn depths(out: &mut String, label: &str, map: &DepthMap, names: [&str; 7]) {
    let cells: Vec<String> = names
        .iter()
        .zip(map.percents())
        .map(|(name, share)| {
            let share = if share > 0.0 && share < 0.1 { 0.1 } else { share };
            format!("{name}={share:.1}%")
        })
        .collect();
    let _ = writeln!(out, "{label}: {}", cells.join(", "));
}
