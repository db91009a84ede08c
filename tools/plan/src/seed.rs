//! The sizing tables that the project started from, row by row: the formula that gives the published figure, what nvtier computes, and why the two
//! differ. `page` is docs/sizing.md: `cargo xtask docs` writes it, a test compares it.

use doctor::{cpus, gpus};

use crate::machine::dense_flops;
use crate::model::known;
use crate::precision::precision;

const MODELS: &str = include_str!("../data/seed/models.csv");
const DRIVES: &str = include_str!("../data/seed/drives_capacity.csv");
const DEVICES: &str = include_str!("../data/seed/cache_devices.csv");

/// A row of a table: what is published, what a formula gives, what nvtier computes, and why they differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Which row, and which of its figures.
    pub what: String,
    /// As published.
    pub published: String,
    /// By the formula that the table follows.
    pub formula: String,
    /// By nvtier.
    pub ours: String,
    /// Why they differ; empty where nothing does.
    pub reason: String,
}

impl Row {
    /// Whether the formula gives what is published.
    pub fn reproduced(&self) -> bool {
        self.published == self.formula
    }
}

fn rows(text: &'static str) -> impl Iterator<Item = Vec<&'static str>> {
    text.lines().skip(1).filter(|line| !line.is_empty()).map(|line| line.split(',').collect())
}

/// A number without zeros at its end.
fn short(number: f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn giga(number: f64) -> String {
    format!("{} GB", short(number))
}

/// The table's context: 128,000 tokens, not 131,072.
const CONTEXT: u64 = 128_000;

/// VRAM and KV cache of models, three figures a row.
pub fn models() -> Vec<Row> {
    let mut out = Vec::new();
    for row in rows(MODELS) {
        let [name, bits, weights, cache, total] = row[..] else { panic!("{row:?}") };
        let model = known(name).unwrap_or_else(|| panic!("{name} is not in the built-in table"));
        let nominal: f64 =
            name.rsplit('-').next().and_then(|size| size.strip_suffix('B')?.parse().ok()).expect("a size");
        let quarter = bits == "Q4";
        let precision = precision(if quarter { "q4" } else { "f16" }).expect("a precision");
        let share = if quarter { 4.0 } else { 1.0 };
        let formula_weights = nominal * 2.0 / share;
        let cache_bytes = 2 * model.cache_elements_of(CONTEXT, true);
        let formula_cache = (cache_bytes as f64 / f64::from(1 << 30) * 10.0).floor() / 10.0 / share;
        let our_weights = crate::precision::weight_bytes(&model, Some(&precision)).total() as f64 / 1e9;
        let our_cache = cache_bytes as f64 / 1e9 / share;
        let slip = cache != giga(formula_cache);
        let label = format!("{name} {bits}");
        out.push(Row {
            what: format!("{label}, weights"),
            published: weights.into(),
            formula: giga(formula_weights),
            ours: giga(our_weights),
            reason: format!("the table counts {nominal} x 10^9 parameters; there are {}", model.parameters()),
        });
        out.push(Row {
            what: format!("{label}, KV cache"),
            published: cache.into(),
            formula: giga(formula_cache),
            ours: giga(our_cache),
            reason: if slip {
                format!(
                    "the table is wrong: a quarter of its own {} is {}; and as below",
                    giga(formula_cache * share),
                    giga(formula_cache)
                )
            } else {
                "the table counts 128,000 tokens in GiB, cut to one digit, and writes GB".into()
            },
        });
        out.push(Row {
            what: format!("{label}, both"),
            published: total.into(),
            formula: giga(formula_weights + formula_cache),
            ours: giga(our_weights + our_cache),
            reason: if slip { "carries the wrong KV cache on".into() } else { "the sum of the two".into() },
        });
    }
    out
}

/// Sizes of models as their families had them.
const SIZES: [u64; 8] = [3, 7, 8, 13, 34, 70, 180, 405];

fn largest(capacity: f64, bytes_per_parameter: f64) -> String {
    let fits = |size: &&u64| **size as f64 * 1e9 * bytes_per_parameter <= capacity;
    SIZES.iter().rfind(fits).map_or("none".into(), |size| format!("Up to {size}B"))
}

/// The largest model of a drive's capacity, and the memory beside it.
pub fn drives() -> Vec<Row> {
    let mut out = Vec::new();
    for row in rows(DRIVES) {
        let [capacity, model, memory] = row[..] else { panic!("{row:?}") };
        let (number, unit) = capacity.split_once(' ').expect("a number and a unit");
        let bytes = number.parse::<f64>().expect("a number") * if unit == "TB" { 1e12 } else { 1e9 };
        let ours = largest(bytes, 28.0);
        let size: u64 = model.trim_start_matches("Up to ").trim_end_matches('B').parse().expect("a size");
        out.push(Row {
            what: format!("{capacity}, full fine-tuning"),
            published: model.into(),
            formula: largest(bytes, 20.0),
            reason: if ours == model {
                String::new()
            } else {
                "nvtier keeps two generations, to roll back to: 28 bytes a parameter; with --generations 1 it is 16".into()
            },
            ours,
        });
        out.push(Row {
            what: format!("{capacity}, RAM"),
            published: memory.into(),
            formula: format!("{} GB", size.next_power_of_two().max(64)),
            ours: "any".into(),
            reason: "a byte of RAM for each parameter, rounded up to a power of two, at least 64 GB; nvtier runs with less and tells what each byte saves".into(),
        });
    }
    out
}

/// GPUs: what the column of 16-bit rates is.
pub fn gpu_rows() -> Vec<Row> {
    gpus()
        .into_iter()
        .map(|row| {
            // Operations of a multiprocessor in a cycle, with sparsity.
            let per_cycle = if row.architecture == "Hopper" { 8192.0 } else { 2048.0 };
            let clock = row
                .fp16_tflops
                .zip(row.multiprocessors)
                .map(|(rate, count)| f64::from(rate) * 1e12 / (f64::from(count) * per_cycle) / 1e9);
            Row {
                what: row.name.into(),
                published: row.fp16_tflops.map_or("not given".into(), |rate| format!("{rate} TFLOPS")),
                formula: clock.map_or("-".into(), |clock| format!("{clock:.2} GHz")),
                ours: dense_flops(&row)
                    .map_or("not known".into(), |rate| format!("{:.0} TFLOPS", rate / 1e12)),
                reason: match (row.fp16_tflops, row.class) {
                    (None, _) => "give --tflops".into(),
                    (_, "professional") => "without sparsity: half".into(),
                    _ => "without sparsity, sums in 32 bits: a quarter".into(),
                },
            }
        })
        .collect()
}

/// CPUs against what the same vendor asks for: 8 cores, 24 lanes (a GPU of 16 and two drives of 4).
pub fn cpu_rows() -> Vec<Row> {
    cpus()
        .into_iter()
        .map(|row| {
            let drives = row.pcie_lanes.saturating_sub(16) / 4;
            Row {
                what: format!("{} {}", row.brand, row.model),
                published: format!("{} cores, {} lanes", row.cores, row.pcie_lanes),
                formula: if row.cores >= 8 && row.pcie_lanes >= 24 { "enough" } else { "too few lanes" }.into(),
                ours: format!("1 GPU and {drives} drives"),
                reason: if row.pcie_lanes < 24 {
                    "validated, but with fewer lanes than the vendor's own requirement: the second drive takes lanes of the GPU or the chipset's".into()
                } else {
                    String::new()
                },
            }
        })
        .collect()
}

fn table(head: [&str; 5], rows: &[Row]) -> String {
    let mut text = format!("| {} |\n|---|---|---|---|---|\n", head.join(" | "));
    for row in rows {
        text.push_str(&format!(
            "| {} | {} | {} | {} | {} |\n",
            row.what, row.published, row.formula, row.ours, row.reason
        ));
    }
    text
}

const INTRODUCTION: &str = "\
<!-- Made by `cargo xtask docs` from tools/plan/src/seed.rs and the tables it reads. Do not edit. -->

# Sizing: published tables, and what they are made of

`nvtier plan` computes what a model needs ([guide](guides/plan.md)). These are the sizing tables that the vendor of aiDAPTIV published in October 2025, row by row:
what was published, what the formula behind the table gives, what nvtier computes, and why the two differ.

The formulas: weights are parameters times bytes of a parameter. A token's keys and values are, summed over layers, `2 x key-value heads x head size`
elements (one latent vector where a model has latent attention; in a layer with a sliding window, no more tokens than the window). Full fine-tuning keeps 16
bytes a parameter (weight 2, lower half of the master 2, two moments of 4, gradient 4), and nvtier the 12 of them that are not gradient once more, to roll back to.

";

/// All of it: docs/sizing.md.
pub fn page() -> String {
    let devices = rows(DEVICES)
        .map(|row| format!("| {} | {}, {} | {} | any NVMe drive |\n", row[0], row[1], row[2], row[3]))
        .collect::<String>();
    format!(
        "{INTRODUCTION}## VRAM and KV cache of models\n\n{}\n## Largest model of a drive\n\n{}\n## GPUs\n\n{}\n## CPUs\n\n{}\n## Cache devices\n\n\
         | device | form, interface | published note | nvtier |\n|---|---|---|---|\n{devices}",
        table(["row", "published", "by its formula", "nvtier", "why they differ"], &models()),
        table(["row", "published", "by its formula", "nvtier", "why they differ"], &drives()),
        table(
            ["GPU", "published 16-bit rate", "clock that it implies", "peak that nvtier takes", "why"],
            &gpu_rows()
        ),
        table(["CPU", "published", "against the requirement", "room", "difference"], &cpu_rows()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_reproduced_or_its_difference_is_known() {
        let all: Vec<Row> = models().into_iter().chain(drives()).collect();
        // 6 rows of 3 figures, 4 rows of 2.
        assert_eq!(all.len(), 26);
        let others: Vec<&str> =
            all.iter().filter(|row| !row.reproduced()).map(|row| row.what.as_str()).collect();
        assert_eq!(others, ["Llama-3.1-8B Q4, KV cache", "Llama-3.1-8B Q4, both"]);
        for row in &all {
            assert!(row.ours == row.published || !row.reason.is_empty(), "{row:?} differs without a reason");
        }
    }

    #[test]
    fn the_rates_of_gpus_are_those_with_sparsity() {
        let rows = gpu_rows();
        assert_eq!(rows.len(), 28);
        assert_eq!(rows.iter().filter(|row| row.formula == "-").count(), 3);
        for row in rows.iter().filter(|row| row.formula != "-") {
            let clock: f64 = row.formula.trim_end_matches(" GHz").parse().unwrap();
            assert!((1.5..2.8).contains(&clock), "{row:?}: no GPU of these runs at that clock");
        }
    }

    #[test]
    fn cpus_that_miss_their_own_requirement() {
        let missing: Vec<String> =
            cpu_rows().into_iter().filter(|row| row.formula != "enough").map(|row| row.what).collect();
        assert_eq!(missing, ["Intel Core i9-13900", "Intel Core i9-12900E"]);
    }
}
