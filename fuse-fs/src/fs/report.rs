//! `.nvtier/stats.json`, `.nvtier/metrics` (Prometheus text format 0.0.4) and `.nvtier/version`.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::counters::{Operation, get};
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
                "requests": requests,
                "errors": errors,
            },
        })
    }

    /// The same as Prometheus text.
    pub fn metrics(&self) -> String {
        let counters = &self.counters;
        let mut out = String::new();
        let by_operation = |of: fn((u64, u64)) -> u64| {
            Operation::ALL
                .iter()
                .map(move |&o| (format!("{{op=\"{}\"}}", o.name()), of(counters.of(o)) as f64))
        };
        family(
            &mut out,
            "nvtier_fuse_requests_total",
            "counter",
            "Requests of the kernel by operation.",
            by_operation(|(count, _)| count),
        );
        family(
            &mut out,
            "nvtier_fuse_errors_total",
            "counter",
            "Requests answered with an error, ordinary ones such as ENOENT included.",
            by_operation(|(_, failed)| failed),
        );
        family(
            &mut out,
            "nvtier_fuse_opens_total",
            "counter",
            "Opens by how their bytes are reached.",
            [("passthrough", &counters.passthrough_opens), ("served", &counters.served_opens)]
                .into_iter()
                .map(|(path, count)| (format!("{{path=\"{path}\"}}"), get(count) as f64)),
        );
        family(
            &mut out,
            "nvtier_fuse_served_bytes_total",
            "counter",
            "Bytes moved by the daemon; passed-through bytes are not seen by it.",
            [("read", &counters.served_read_bytes), ("write", &counters.served_write_bytes)]
                .into_iter()
                .map(|(direction, bytes)| (format!("{{direction=\"{direction}\"}}"), get(bytes) as f64)),
        );
        let single = |value: f64| std::iter::once((String::new(), value));
        family(
            &mut out,
            "nvtier_fuse_open_files",
            "gauge",
            "Files open in the mount.",
            single(self.handles.len() as f64),
        );
        family(
            &mut out,
            "nvtier_fuse_passthrough",
            "gauge",
            "1 while files are handed to the kernel.",
            single(f64::from(u8::from(self.passthrough() == Passthrough::On))),
        );
        if let Ok(Value::Object(stat)) = serde_json::to_value(self.pool.stat()) {
            pool_families(&mut out, "nvtier_pool", &stat);
        }
        out
    }
}

/// Every number of the pool's statistics under its own name; nested objects add their name with `_`.
fn pool_families(out: &mut String, prefix: &str, object: &Map<String, Value>) {
    for (key, value) in object {
        let name = format!("{prefix}_{}", metric_name(key));
        let number = match value {
            Value::Number(number) => number.as_f64(),
            Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
            Value::Object(inner) => {
                pool_families(out, &name, inner);
                None
            }
            _ => None,
        };
        if let Some(number) = number {
            let help = format!("{} of the pool.", key.replace('_', " "));
            family(out, &name, "gauge", &help, std::iter::once((String::new(), number)));
        }
    }
}

fn metric_name(key: &str) -> String {
    key.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect()
}

fn family(
    out: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    samples: impl Iterator<Item = (String, f64)>,
) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(out, "{name}{labels} {value}");
    }
}
