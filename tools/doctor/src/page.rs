//! docs/tables.md: the tables of hardware, as a page.

use crate::checks::gpu::{FINE_TUNE, INFER};
use crate::checks::platform::{CORES, LANES};
use crate::tables::{CPUS, DRIVES, RUN, gpus, rows};

const INTRODUCTION: &str = "\
<!-- Made by `cargo xtask docs` from tools/doctor/data. Do not edit. -->

# GPUs, processors and drives

What `nvtier doctor` and `nvtier plan` know by name ([doctor](guides/doctor.md), [plan](guides/plan.md)). Nothing else is refused: doctor says that it is not in the table, and looks at what the machine
itself tells. What was run on what, and what never, is in [hardware](hardware.md).

";

fn table<const N: usize>(head: [&str; N], lines: impl Iterator<Item = [String; N]>) -> String {
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = row(&head.map(str::to_owned));
    text += &row(&[const { "---" }; N].map(str::to_owned));
    lines.for_each(|line| text += &row(&line));
    text
}

/// Whether so much memory is the least that is asked for.
fn enough(bytes: u64, least: u64) -> String {
    if bytes >= least { "yes" } else { "smaller models only" }.to_owned()
}

fn gpu_table() -> String {
    let ran: Vec<&str> = rows(RUN).map(|row| row[0]).collect();
    let lines = gpus().into_iter().map(|row| {
        [
            row.name.to_owned(),
            row.class.to_owned(),
            row.architecture.to_owned(),
            format!("{} GB {}", row.memory_bytes / 1_000_000_000, row.memory_type),
            enough(row.memory_bytes, INFER),
            enough(row.memory_bytes, FINE_TUNE),
            "yes".to_owned(),
            if ran.contains(&row.name) { "yes" } else { "no" }.to_owned(),
        ]
    });
    table(
        [
            "GPU",
            "class",
            "architecture",
            "VRAM",
            "inference of 8B models",
            "fine-tuning",
            "validated by the list's publisher",
            "nvtier ran on it",
        ],
        lines,
    )
}

fn run_table() -> String {
    let lines = rows(RUN).map(|row| {
        let what = row[4].replace(';', ",");
        [row[0].to_owned(), row[1].to_owned(), row[2].to_owned(), row[3].to_owned(), what, link(row[5])]
    });
    table(["GPU", "architecture", "VRAM", "at once, at most", "what", "results"], lines)
}

fn link(page: &str) -> String {
    format!("[{}](results/{page})", page.trim_end_matches(".md"))
}

fn cpu_table() -> String {
    let lines = rows(CPUS).map(|row| {
        let lanes: u32 = row[5].parse().unwrap_or(0);
        let room = match lanes.checked_sub(16) {
            Some(left) if lanes >= LANES => format!("a GPU at x16 and {} drives at x4", left / 4),
            Some(left) => format!("a GPU at x16 and {} drive at x4: doctor warns", left / 4),
            None => "no GPU at x16: doctor warns".to_owned(),
        };
        [format!("{} {}", row[0], row[1]), row[2].to_owned(), row[3].to_owned(), row[5].to_owned(), room]
    });
    table(["processor", "sockets", "cores of one", "PCIe lanes", "room of one"], lines)
}

fn drive_table() -> String {
    let lines = rows(DRIVES).map(|row| {
        let capacity: f64 = row[1].parse().unwrap_or(0.0);
        let rated: f64 = row[2].parse().unwrap_or(0.0);
        // Five years, as the makers' warranties are.
        let daily = rated * 1000.0 / capacity / (5.0 * 365.0);
        [
            row[0].to_owned(),
            format!("{} GB", row[1]),
            format!("{} TB", row[2]),
            format!("{daily:.2}"),
            format!("PCIe {}", row[3]),
        ]
    });
    table(
        ["drive", "capacity", "rated to be written", "times its size a day, for five years", "link at best"],
        lines,
    )
}

/// All of it: docs/tables.md.
pub fn page() -> String {
    let giga = |bytes: u64| (bytes + 500_000_000) / 1_000_000_000;
    format!(
        "{INTRODUCTION}## GPUs\n\n\
         The list is the one that the vendor of aiDAPTIV published as validated in October 2025, and so is what it asks for: {} GB to infer with 8B models, {} GB to fine-tune with a tier of NVMe. \
         *nvtier ran on it* is about that very card; what nvtier did run on is the second table. `nvtier plan MODEL --gpu NAME` counts for a model. Rates of these cards are in [sizing](sizing.md).\n\n{}\n\
         GPUs that nvtier ran on:\n\n{}\n## Processors\n\n\
         Of the same publication, as is what it asks for: {CORES} cores, {LANES} PCIe lanes (16 for a GPU and 4 for each of two drives).\n\n{}\n## Drives\n\n\
         By their makers' data sheets; `nvtier doctor` and `nvtier top` reckon with what is rated. Any NVMe drive will do; `--tbw` tells what one that is not here is rated for. How large a model a drive of a size holds is in [sizing](sizing.md). None of these was run on.\n\n{}",
        giga(INFER),
        giga(FINE_TUNE),
        gpu_table(),
        run_table(),
        cpu_table(),
        drive_table(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_data_is_a_row_and_every_result_is_a_page() {
        let page = page();
        for row in rows(CPUS).chain(rows(DRIVES)).chain(rows(RUN)) {
            assert!(page.lines().any(|line| line.starts_with("| ") && line.contains(row[1])), "{row:?}");
        }
        for gpu in gpus() {
            assert!(page.contains(&format!("| {} |", gpu.name)), "{gpu:?}");
        }
        let results = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/results");
        for row in rows(RUN) {
            assert!(results.join(row[5]).is_file(), "{row:?}");
        }
    }

    #[test]
    fn small_cards_and_few_lanes_are_told() {
        let page = page();
        let line = |name: &str| page.lines().find(|line| line.contains(name)).unwrap_or_default();
        assert!(
            line("GeForce RTX 5080 |").contains("| smaller models only | yes |"),
            "{}",
            line("RTX 5080 |")
        );
        assert!(line("Core i9-13900").contains("doctor warns"), "{}", line("Core i9-13900"));
        assert!(line("EPYC 7713P").contains("and 28 drives"), "{}", line("EPYC 7713P"));
    }
}
