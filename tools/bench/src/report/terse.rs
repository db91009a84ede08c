//! fio's terse line, version 3: fields between semicolons, in fio's order (HOWTO, "Terse output").

use std::fmt::Write;

use super::Entry;
use crate::stats::{DirectionStats, Latency, summary};
use crate::sys::DiskStat;

/// Percentile fields of a direction; unused ones are `0%=0`.
const PERCENTILES: usize = 20;

/// One line an entry.
pub fn terse(entries: &[Entry], disks: &[(DiskStat, f64)]) -> String {
    let mut text = String::new();
    for entry in entries {
        line(&mut text, entry, entries, disks);
        text.push('\n');
    }
    text
}

fn line(out: &mut String, entry: &Entry, entries: &[Entry], disks: &[(DiskStat, f64)]) {
    let name = entry.settings.name.replace(';', "_");
    let _ = write!(out, "3;{};{name};{};{}", crate::FIO_VERSION, entry.group, entry.error);
    for (index, stats) in entry.directions.iter().enumerate() {
        direction(out, entry, stats, entry.share_of(entries, index));
    }
    let (user, system) = entry.cpu_percent();
    let usage = &entry.usage;
    let _ = write!(
        out,
        ";{user:.6}%;{system:.6}%;{};{};{}",
        usage.switches, usage.major_faults, usage.minor_faults
    );
    for share in entry.depth_level.percents() {
        let _ = write!(out, ";{share:.1}%");
    }
    // Microseconds (with everything below two in the first), then milliseconds.
    let shares = entry.latency_shares();
    let below: f64 = shares[0].1.iter().map(|(_, share)| share).sum();
    for (unit, shares) in &shares[1..] {
        for (index, (_, share)) in shares.iter().enumerate() {
            let share = if *unit == "us" && index == 0 { share + below } else { *share };
            let _ = write!(out, ";{share:.2}%");
        }
    }
    for (disk, busy) in disks {
        let _ = write!(
            out,
            ";{};{};{};{};{};{};{};{};{busy:.2}%",
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
    if let Some(description) = &entry.settings.description {
        let _ = write!(out, ";{}", description.replace(';', "_"));
    }
}

fn direction(out: &mut String, entry: &Entry, stats: &DirectionStats, share: f64) {
    let _ = write!(
        out,
        ";{};{};{};{}",
        stats.bytes / 1024,
        (stats.bandwidth() / 1024.0) as u64,
        stats.iops() as u64,
        stats.runtime_ns / 1_000_000
    );
    figures(out, &stats.slat);
    figures(out, &stats.clat);
    let wanted = if entry.settings.clat_percentiles { entry.settings.percentiles.as_slice() } else { &[] };
    for index in 0..PERCENTILES {
        match wanted.get(index) {
            Some(&percentile) => {
                let _ = write!(out, ";{percentile:.6}%={}", stats.clat.percentile(percentile) / 1000);
            }
            None => out.push_str(";0%=0"),
        }
    }
    figures(out, &stats.lat);
    let samples: Vec<f64> = stats.bw_samples.iter().map(|bytes| bytes / 1024.0).collect();
    let (min, max, mean, deviation) = summary(&samples);
    let share = if samples.is_empty() { 0.0 } else { share };
    let _ = write!(out, ";{};{};{share:.6}%;{mean:.6};{deviation:.6}", min as u64, max as u64);
}

/// Min, max, mean, deviation in microseconds.
fn figures(out: &mut String, latency: &Latency) {
    let _ = write!(
        out,
        ";{};{};{:.6};{:.6}",
        latency.min() / 1000,
        latency.max() / 1000,
        latency.mean() / 1000.0,
        latency.stddev() / 1000.0
    );
}
