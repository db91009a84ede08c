//! fio's JSON (`--output-format=json` and `json+`): the same keys at the same places, plus one of ours, `nvtier`.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::{Entry, Verdict};
use crate::stats::{DepthMap, DirectionStats, Latency, summary};
use crate::sys::DiskStat;

/// The report. `plus` adds latency bins, as json+ does.
pub fn json(
    entries: &[Entry],
    global: &[(String, String)],
    disks: &[(DiskStat, f64)],
    verdicts: &[Verdict],
    plus: bool,
) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut report = Map::new();
    report.insert("fio version".into(), json!(crate::FIO_VERSION));
    report.insert("timestamp".into(), json!(now.as_secs()));
    report.insert("timestamp_ms".into(), json!(now.as_millis() as u64));
    report.insert("time".into(), json!(crate::calendar::utc(now.as_secs())));
    if !global.is_empty() {
        report.insert("global options".into(), options(global));
    }
    report.insert("jobs".into(), entries.iter().map(|entry| job(entry, plus)).collect());
    report.insert("disk_util".into(), disks.iter().map(disk).collect());
    report.insert("nvtier".into(), ours(verdicts));
    Value::Object(report)
}

fn ours(verdicts: &[Verdict]) -> Value {
    let groups: Vec<Value> = verdicts
        .iter()
        .map(|verdict| {
            json!({
                "groupid": verdict.group,
                "bound": verdict.bound.name(),
                "explanation": verdict.text,
                "drive_ceiling_bytes_per_second": verdict.ceiling,
                "in_flight_mean": verdict.in_flight,
                "cpu_seconds_per_gb": verdict.cpu_s_per_gb,
            })
        })
        .collect();
    json!({ "version": crate::VERSION, "groups": groups })
}

fn options(list: &[(String, String)]) -> Value {
    Value::Object(list.iter().map(|(name, value)| (name.clone(), json!(value))).collect())
}

fn job(entry: &Entry, plus: bool) -> Value {
    let settings = &entry.settings;
    let (user, system) = entry.cpu_percent();
    let mut job = Map::new();
    let mut put = |name: &str, value: Value| {
        job.insert(name.to_owned(), value);
    };
    put("jobname", json!(settings.name));
    put("groupid", json!(entry.group));
    put("error", json!(entry.error));
    put("eta", json!(0));
    put("elapsed", json!(entry.elapsed_s + 1));
    put("job options", options(&settings.given));
    put("read", direction(entry, &entry.directions[0], plus));
    put("write", direction(entry, &entry.directions[1], plus));
    put("trim", direction(entry, &DirectionStats::new(false, false), plus));
    put("sync", json!({ "total_ios": entry.sync.count, "lat_ns": latency(&entry.sync, None, false) }));
    put("job_runtime", json!(entry.cpu_wall_ns / 1_000_000));
    put("usr_cpu", json!(user));
    put("sys_cpu", json!(system));
    put("ctx", json!(entry.usage.switches));
    put("majf", json!(entry.usage.major_faults));
    put("minf", json!(entry.usage.minor_faults));
    put("iodepth_level", depths(&entry.depth_level, ["1", "2", "4", "8", "16", "32", ">=64"]));
    put("iodepth_submit", depths(&entry.depth_submit, ["0", "4", "8", "16", "32", "64", ">=64"]));
    put("iodepth_complete", depths(&entry.depth_complete, ["0", "4", "8", "16", "32", "64", ">=64"]));
    for (unit, shares) in entry.latency_shares() {
        let shares = shares.into_iter().map(|(label, share)| (label, json!(share))).collect();
        put(&format!("latency_{unit}"), Value::Object(shares));
    }
    put("latency_depth", json!(settings.iodepth));
    put("latency_target", json!(0));
    put("latency_percentile", json!(100.0));
    put("latency_window", json!(0));
    if let Some(description) = &settings.description {
        put("desc", json!(description));
    }
    Value::Object(job)
}

fn direction(entry: &Entry, stats: &DirectionStats, plus: bool) -> Value {
    let settings = &entry.settings;
    let list = &settings.percentiles;
    let (bw_min, bw_max, bw_mean, bw_dev) = summary(&kib(&stats.bw_samples));
    let (iops_min, iops_max, iops_mean, iops_dev) = summary(&stats.iops_samples);
    let total = stats.bandwidth() / 1024.0;
    let percentiles = |wanted: bool| wanted.then_some(list.as_slice());
    json!({
        "io_bytes": stats.bytes,
        "io_kbytes": stats.bytes / 1024,
        "bw_bytes": stats.bandwidth() as u64,
        "bw": total as u64,
        "iops": stats.iops(),
        "runtime": stats.runtime_ns / 1_000_000,
        "total_ios": stats.ios,
        "short_ios": stats.short_ios,
        "drop_ios": 0,
        "slat_ns": latency(&stats.slat, percentiles(settings.slat_percentiles), plus),
        "clat_ns": latency(&stats.clat, percentiles(settings.clat_percentiles), plus),
        "lat_ns": latency(&stats.lat, percentiles(settings.lat_percentiles), plus),
        "bw_min": bw_min as u64,
        "bw_max": bw_max as u64,
        "bw_agg": if bw_mean > 0.0 { (100.0 * bw_mean / total).min(100.0) } else { 0.0 },
        "bw_mean": bw_mean,
        "bw_dev": bw_dev,
        "bw_samples": stats.bw_samples.len(),
        "iops_min": iops_min as u64,
        "iops_max": iops_max as u64,
        "iops_mean": iops_mean,
        "iops_stddev": iops_dev,
        "iops_samples": stats.iops_samples.len(),
    })
}

fn kib(samples: &[f64]) -> Vec<f64> {
    samples.iter().map(|bytes| bytes / 1024.0).collect()
}

fn latency(latency: &Latency, percentiles: Option<&[f64]>, plus: bool) -> Value {
    let mut object = Map::new();
    object.insert("min".into(), json!(latency.min()));
    object.insert("max".into(), json!(latency.max()));
    object.insert("mean".into(), json!(latency.mean()));
    object.insert("stddev".into(), json!(latency.stddev()));
    object.insert("N".into(), json!(latency.count));
    if let Some(list) = percentiles
        && latency.count > 0
        && latency.has_percentiles()
    {
        let values = list.iter().map(|&p| (format!("{p:.6}"), json!(latency.percentile(p)))).collect();
        object.insert("percentile".into(), Value::Object(values));
        if plus {
            let bins =
                latency.bins().into_iter().map(|(bin, count)| (bin.to_string(), json!(count))).collect();
            object.insert("bins".into(), Value::Object(bins));
        }
    }
    Value::Object(object)
}

fn depths(map: &DepthMap, labels: [&str; 7]) -> Value {
    Value::Object(
        labels.iter().zip(map.percents()).map(|(label, share)| (label.to_string(), json!(share))).collect(),
    )
}

fn disk((disk, busy): &(DiskStat, f64)) -> Value {
    json!({
        "name": disk.name,
        "read_ios": disk.read[0],
        "write_ios": disk.write[0],
        "read_merges": disk.read[1],
        "write_merges": disk.write[1],
        "read_ticks": disk.read[3],
        "write_ticks": disk.write[3],
        "in_queue": disk.queue_ms,
        "util": busy,
    })
}
