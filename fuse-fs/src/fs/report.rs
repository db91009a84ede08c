//! `.nvtier/stats.json`, `.nvtier/metrics` (Prometheus text format 0.0.4) and `.nvtier/version`.

use engine::metrics::{self, Kind, family};
use serde_json::{Map, Value, json};

use super::counters::{Operation, Timed, get};
use super::views::VNode;
use super::{Fs, Passthrough};
use crate::error::{Errno, FsResult};

impl<B: Send + Sync + 'static> Fs<B> {
    pub(crate) fn text_of(&self, node: VNode) -> FsResult<String> {
        match node {
            VNode::Stats => {
                let mut text = serde_json::to_string_pretty(&self.stats()).map_err(|_| Errno::EIO)?;
                text.push('\n');
                Ok(text)
            }
            VNode::Metrics => Ok(self.metrics()),
            VNode::Version => Ok(format!("{}\n", env!("CARGO_PKG_VERSION"))),
            _ => Err(Errno::EISDIR),
        }
    }

    /// State of pool and mount as one JSON object.
    pub fn stats(&self) -> Value {
        let counters = &self.counters;
        let mut requests = Map::new();
        let mut errors = Map::new();
        for &operation in Operation::ALL {
            let (count, failed) = counters.of(operation);
            requests.insert(operation.name().to_owned(), count.into());
            errors.insert(operation.name().to_owned(), failed.into());
        }
        let times: Map<String, Value> =
            Timed::ALL.iter().map(|&what| (what.name().to_owned(), counters.times(what).json())).collect();
        let (on, reason) = match self.passthrough() {
            Passthrough::On => (true, Value::Null),
            Passthrough::Off(reason) => (false, reason.into()),
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "mountpoint": self.options.mountpoint,
            "started": self.started.secs,
            "pool": serde_json::to_value(self.pool.info()).unwrap_or(Value::Null),
            "stat": serde_json::to_value(self.pool.stat()).unwrap_or(Value::Null),
            "mount": {
                "read_only": self.options.read_only,
                "passthrough": on,
                "passthrough_off_because": reason,
                "open_files": self.handles.len(),
                "known_nodes": self.nodes.len(),
                "opens": {
                    "passthrough": get(&counters.passthrough_opens),
                    "served": get(&counters.served_opens),
                },
                "served_read_bytes": get(&counters.served_read_bytes),
                "served_write_bytes": get(&counters.served_write_bytes),
                "gathered_reads": get(&counters.gathered_reads),
                "times": times,
                "requests": requests,
                "errors": errors,
            },
        })
    }

    /// The same as Prometheus text.
    pub fn metrics(&self) -> String {
        let counters = &self.counters;
        let mut out = metrics::build();
        let by_operation = |of: fn((u64, u64)) -> u64| {
            Operation::ALL
                .iter()
                .map(move |&o| (format!("{{op=\"{}\"}}", o.name()), of(counters.of(o)) as f64))
        };
        family(
            &mut out,
            "nvtier_fuse_requests_total",
            Kind::Counter,
            "Requests of the kernel by operation.",
            by_operation(|(count, _)| count),
        );
        family(
            &mut out,
            "nvtier_fuse_errors_total",
            Kind::Counter,
            "Requests answered with an error, ordinary ones such as ENOENT included.",
            by_operation(|(_, failed)| failed),
        );
        family(
            &mut out,
            "nvtier_fuse_opens_total",
            Kind::Counter,
            "Opens by how their bytes are reached.",
            [("passthrough", &counters.passthrough_opens), ("served", &counters.served_opens)]
                .into_iter()
                .map(|(path, count)| (format!("{{path=\"{path}\"}}"), get(count) as f64)),
        );
        family(
            &mut out,
            "nvtier_fuse_served_bytes_total",
            Kind::Counter,
            "Bytes moved by the daemon; passed-through bytes are not seen by it.",
            [("read", &counters.served_read_bytes), ("write", &counters.served_write_bytes)]
                .into_iter()
                .map(|(direction, bytes)| (format!("{{direction=\"{direction}\"}}"), get(bytes) as f64)),
        );
        let single = |value: f64| std::iter::once((String::new(), value));
        family(
            &mut out,
            "nvtier_fuse_open_files",
            Kind::Gauge,
            "Files open in the mount.",
            single(self.handles.len() as f64),
        );
        family(
            &mut out,
            "nvtier_fuse_passthrough",
            Kind::Gauge,
            "1 while files are handed to the kernel.",
            single(f64::from(u8::from(self.passthrough() == Passthrough::On))),
        );
        let timed = || Timed::ALL.iter().map(|&what| (what, counters.times(what)));
        family(
            &mut out,
            "nvtier_fuse_in_flight_requests",
            Kind::Gauge,
            "Requests that the daemon is serving at this moment.",
            timed().map(|(what, times)| (format!("{{op=\"{}\"}}", what.name()), times.in_flight as f64)),
        );
        family(
            &mut out,
            "nvtier_fuse_request_duration_seconds",
            Kind::Histogram,
            "How long requests took that the daemon served.",
            timed().flat_map(|(what, times)| {
                let op = format!("op=\"{}\"", what.name());
                let mut sum = 0;
                let mut samples = Vec::new();
                for (limit, count) in times.limits_seconds().zip(times.buckets) {
                    sum += count;
                    samples.push((format!("_bucket{{{op},le=\"{limit}\"}}"), sum as f64));
                }
                samples.push((format!("_bucket{{{op},le=\"+Inf\"}}"), times.count as f64));
                samples.push((format!("_sum{{{op}}}"), times.sum_nanos as f64 / 1e9));
                samples.push((format!("_count{{{op}}}"), times.count as f64));
                samples
            }),
        );
        out.push_str(&metrics::owner(&self.pool));
        out
    }
}
