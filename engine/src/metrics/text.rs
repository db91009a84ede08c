//! Prometheus text, format 0.0.4: `NAME{labels} VALUE` below `# HELP` and `# TYPE`, one family after the other.
//!
//! Names follow Prometheus's conventions: `nvtier_` first, units in full and last but for `_total`, which counters end with.

use std::fmt::Write;

use crate::kv::admin::{self, Watched};
use crate::kv::{StoreStat, TenantInfo};
use crate::{Pool, PoolStat};

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
pub fn family(
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

/// State of a pool and of the KV stores in it, for whoever owns it: the same families with and without a mount.
pub fn owner(pool: &Pool) -> String {
    // A list of stores that cannot be had leaves them out: the rest is true all the same, and says what is wrong.
    let stores = admin::watch(pool).unwrap_or_default();
    self::pool(&pool.stat()) + &kv(&stores)
}

/// State of a pool.
fn pool(stat: &PoolStat) -> String {
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

/// State of the KV stores that somebody has open.
fn kv(stores: &[Watched]) -> String {
    use Kind::{Counter, Gauge};
    let open: Vec<_> =
        stores.iter().filter_map(|store| Some((&store.name, store.open.as_deref()?))).collect();
    type Value = fn(&StoreStat) -> u64;
    let families: [(&str, Kind, Value, &str); 17] = [
        ("blocks", Gauge, |stat| stat.blocks, "Blocks that the store holds."),
        ("pinned_blocks", Gauge, |stat| stat.pinned, "Of those, pinned ones."),
        ("used_bytes", Gauge, |stat| stat.used_bytes, "Bytes of the slots of its blocks."),
        ("allocated_bytes", Gauge, |stat| stat.allocated_bytes, "Bytes of its slabs and its index."),
        ("budget_bytes", Gauge, |stat| stat.budget_bytes, "Bytes that it may occupy."),
        ("hits_total", Counter, |stat| stat.hits, "Blocks that were asked for and delivered."),
        ("misses_total", Counter, |stat| stat.misses, "Blocks that were asked for and not delivered."),
        ("puts_total", Counter, |stat| stat.puts, "Blocks that were stored."),
        ("evictions_total", Counter, |stat| stat.evictions, "Blocks that made room."),
        ("expired_blocks_total", Counter, |stat| stat.expired, "Blocks whose time was over."),
        (
            "corrupt_blocks_total",
            Counter,
            |stat| stat.corrupt,
            "Blocks that were not as they were put; a miss.",
        ),
        ("retried_reads_total", Counter, |stat| stat.retried, "Reads that were made again."),
        ("errors_total", Counter, |stat| stat.io_errors, "Operations that failed; a miss, or no put."),
        ("timeouts_total", Counter, |stat| stat.timeouts, "Of those, by their deadline."),
        ("bad_slots", Gauge, |stat| stat.bad_slots, "Slots out of use until it is opened again."),
        ("written_bytes_total", Counter, |stat| stat.written_bytes, "Bytes of blocks written, ever."),
        (
            "failed",
            Gauge,
            |stat| u64::from(!stat.failed.is_empty()),
            "1 where nothing can be stored any more.",
        ),
    ];
    let mut out = String::new();
    for (name, kind, value, help) in families {
        let samples =
            open.iter().map(|(store, contents)| (labels(&[("store", store)]), value(&contents.stat) as f64));
        family(&mut out, &format!("nvtier_kv_{name}"), kind, help, samples);
    }
    let refused = open.iter().flat_map(|(store, contents)| {
        let stat = &contents.stat;
        [
            ("admission", stat.refused_admission),
            ("write_budget", stat.refused_budget),
            ("quota", stat.refused_quota),
            ("space", stat.refused_space),
        ]
        .map(|(reason, count)| (labels(&[("store", store), ("reason", reason)]), count as f64))
    });
    family(&mut out, "nvtier_kv_refused_puts_total", Counter, "Puts refused, by the reason.", refused);
    type OfTenant = fn(&TenantInfo) -> u64;
    let of_tenants: [(&str, OfTenant, &str); 2] = [
        ("used", |tenant| tenant.used_bytes, "Bytes of slots that a tenant's blocks have."),
        ("quota", |tenant| tenant.quota_bytes, "Bytes of slots that they may have; 0: no limit."),
    ];
    for (name, value, help) in of_tenants {
        let samples = open.iter().flat_map(|(store, contents)| {
            let one = |tenant: &TenantInfo| {
                (labels(&[("store", store), ("tenant", &tenant.name)]), value(tenant) as f64)
            };
            contents.tenants.iter().map(one)
        });
        family(&mut out, &format!("nvtier_kv_tenant_{name}_bytes"), Gauge, help, samples);
    }
    out
}

/// `{name="value",...}`, values escaped as the text format wants it.
fn labels(pairs: &[(&str, &str)]) -> String {
    let escape = |value: &str| value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
    let pairs: Vec<String> =
        pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    format!("{{{}}}", pairs.join(","))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_end_a_label_is_escaped() {
        let text = labels(&[("store", "a\\b"), ("tenant", "say \"hi\"\nto")]);
        assert_eq!(text, r#"{store="a\\b",tenant="say \"hi\"\nto"}"#);
        assert_eq!(labels(&[]), "{}");
    }
}
