//! Prometheus text, format 0.0.4: `NAME{labels} VALUE` below `# HELP` and `# TYPE`, one family after the other.
//!
//! Names follow Prometheus's conventions: `nvtier_` first, units in full and last but for `_total`, which counters end with.

use std::fmt::Write;

use engine::PoolStat;

/// What a family's samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets, sum and count.
    Histogram,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// Adds a family. A sample is what stands behind the family's name (suffix, labels), and its value.
pub(crate) fn family(
    out: &mut String,
    name: &str,
    kind: Kind,
    help: &str,
    samples: impl IntoIterator<Item = (String, f64)>,
) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {}", kind.name());
    for (labels, value) in samples {
        let _ = writeln!(out, "{name}{labels} {value}");
    }
}

/// State of a pool, for whoever owns it: the same families with and without a mount.
pub fn pool(stat: &PoolStat) -> String {
    use Kind::{Counter, Gauge};
    let flag = u64::from;
    let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
    let (ram, scrub) = (&stat.ram, &stat.scrub);
    let families: [(&str, Kind, u64, &str); 29] = [
        ("capacity_bytes", Gauge, stat.capacity_bytes, "Bytes that the pool can hold."),
        ("free_bytes", Gauge, stat.free_bytes, "Bytes that can still be written."),
        ("used_bytes", Gauge, stat.used_bytes, "Bytes that regions occupy."),
        ("nodes", Gauge, stat.nodes, "Nodes of all kinds."),
        ("regions", Gauge, stat.regions, "Regions among them."),
        ("open_regions", Gauge, stat.open_regions, "Open regions."),
        ("unsealed_regions", Gauge, stat.unsealed_regions, "Regions without valid checksums."),
        ("dirty_nodes", Gauge, stat.dirty_nodes, "Changed nodes that no durable catalog holds yet."),
        ("generation", Gauge, stat.generation, "Generation of the last durable catalog."),
        (
            "commit_failing",
            Gauge,
            flag(!stat.commit_error.is_empty()),
            "1 while snapshots cannot be made durable.",
        ),
        (
            "read_bytes_total",
            Counter,
            stat.read_bytes,
            "Bytes read through handles; passed-through reads are not seen.",
        ),
        (
            "written_bytes_total",
            Counter,
            stat.written_bytes,
            "Bytes written through handles; passed-through writes are not seen.",
        ),
        ("verified_chunks_total", Counter, stat.verified_chunks, "Chunks whose checksum was verified."),
        (
            "corrupt_chunks_total",
            Counter,
            stat.corrupt_chunks,
            "Chunks whose checksum did not match, read twice.",
        ),
        (
            "retried_reads_total",
            Counter,
            stat.retried_reads,
            "Reads that failed or did not match and were made again.",
        ),
        (
            "repaired_reads_total",
            Counter,
            stat.repaired_reads,
            "Of those, the ones that were right the second time.",
        ),
        ("commits_total", Counter, stat.commits, "Snapshots made durable."),
        (
            "seal_errors_total",
            Counter,
            stat.seal_errors,
            "Regions whose checksums could not be made at their last close.",
        ),
        ("ram_budget_bytes", Gauge, ram.budget_bytes, "Bytes that the RAM tier may hold."),
        ("ram_used_bytes", Gauge, ram.used_bytes, "Bytes that the RAM tier holds."),
        ("ram_hits_total", Counter, ram.hits, "Chunks found in the RAM tier."),
        ("ram_misses_total", Counter, ram.misses, "Chunks read from a member."),
        ("scrub_running", Gauge, flag(scrub.running), "1 where the owner scrubs the pool."),
        ("scrub_limit_bytes_per_second", Gauge, scrub.rate, "Bytes a second that the scrub reads at most."),
        ("scrub_passes_total", Counter, scrub.passes, "Passes of the scrub that were finished, ever."),
        ("scrub_pass_done_bytes", Gauge, scrub.done_bytes, "Bytes that this pass has read."),
        ("scrub_pass_bytes", Gauge, scrub.total_bytes, "Bytes of all regions when this pass began."),
        (
            "scrub_last_finished_timestamp_seconds",
            Gauge,
            seconds(scrub.last_finished),
            "When the last pass ended, since the epoch; 0: there was none.",
        ),
        ("scrub_last_bad_chunks", Gauge, scrub.last_bad_chunks, "Bad chunks that the last pass found."),
    ];
    let mut out = String::new();
    for (name, kind, value, help) in families {
        family(&mut out, &format!("nvtier_pool_{name}"), kind, help, [(String::new(), value as f64)]);
    }
    out
}

/// Which nvtier this is.
pub fn build() -> String {
    let mut out = String::new();
    let label = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    family(
        &mut out,
        "nvtier_build_info",
        Kind::Gauge,
        "Always 1; the label says the version.",
        [(label, 1.0)],
    );
    out
}
