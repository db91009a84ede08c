//! `nvtier stat NAME`: everything about one region.

use engine::tensors::TensorIndex;
use serde_json::{Value, json};

use crate::cli::{Global, Stat};
use crate::config::Config;
use crate::failure::Outcome;
use crate::output::{self, Align, Table};
use crate::store::{Entry, Store};
use crate::{names, size, time};

/// Prints it.
pub fn run(global: &Global, config: &Config, args: &Stat) -> Outcome {
    let name = names::normalize(&args.name)?;
    let store = Store::open(&config.pool(args.pool.pool.as_ref())?, true)?;
    let entry = store.entry(&name)?;
    let tensors = if entry.is_region() { store.tensors(&name) } else { Ok(None) };
    // A region whose header lies is still a region: its attributes are shown, and why there are no tensors.
    let (index, malformed) = match tensors {
        Ok(index) => (index, None),
        Err(failure) if failure.kind == "Malformed" => (None, Some(failure.message)),
        Err(failure) => return Err(failure),
    };
    if global.json {
        return output::json(&as_json(&entry, index.as_ref(), malformed.as_deref()));
    }
    let mut text = describe(&entry);
    if let Some(reason) = &malformed {
        text.push_str(&format!("\ntensors     none: {}", output::printable(reason)));
    }
    if let Some(index) = &index {
        text.push_str(&format!("\ntensors     {} ({})", index.tensors.len(), index.format.name()));
        for (key, value) in &index.metadata {
            let value: String = value.chars().take(100).collect();
            text.push_str(&format!("\n  {}: {}", output::printable(key), output::printable(&value)));
        }
        text.push('\n');
        text.push_str(&table(index));
    }
    output::line(&text)
}

fn as_json(entry: &Entry, index: Option<&TensorIndex>, malformed: Option<&str>) -> Value {
    let tensors = index.map(|index| {
        let tensors: Vec<Value> = index
            .tensors
            .iter()
            .map(|tensor| {
                json!({
                    "name": tensor.name,
                    "dtype": tensor.dtype.name(),
                    "shape": tensor.shape,
                    "data_offsets": [tensor.data_offsets.0, tensor.data_offsets.1],
                })
            })
            .collect();
        json!({ "format": index.format, "metadata": index.metadata, "tensors": tensors })
    });
    json!({ "entry": entry, "tensors": tensors, "malformed": malformed })
}

fn describe(entry: &Entry) -> String {
    let mut lines = vec![
        format!("name        {}", output::printable(&entry.path)),
        format!("kind        {}", entry.kind),
        format!("size        {} ({} bytes)", size::human(entry.size), entry.size),
        format!("allocated   {}", size::human(entry.allocated)),
        format!("mode        {} uid {} gid {}", entry.mode_text(), entry.uid, entry.gid),
        format!("modified    {} UTC", time::utc(entry.modified)),
        format!("generation  {}", entry.generation),
    ];
    if let Some(target) = &entry.target {
        lines.push(format!("target      {}", output::printable(target)));
    }
    lines.join("\n")
}

fn table(index: &TensorIndex) -> String {
    let mut table = Table::new(&[
        ("offset", Align::Right),
        ("bytes", Align::Right),
        ("dtype", Align::Left),
        ("shape", Align::Left),
        ("tensor", Align::Left),
    ]);
    for tensor in &index.tensors {
        table.row(vec![
            tensor.data_offsets.0.to_string(),
            tensor.len().to_string(),
            tensor.dtype.name().to_owned(),
            format!("{:?}", tensor.shape),
            output::printable(&tensor.name),
        ]);
    }
    table.render()
}
