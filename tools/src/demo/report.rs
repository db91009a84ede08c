//! The demo's result: a table for people, JSON for programs.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::cli::Global;
use crate::failure::Outcome;
use crate::output::{self, Align, Table};
use crate::size;

use super::check::Compared;
use super::measure::{Measured, Row};

/// Everything that the demo found out.
pub struct Report {
    pub directory: PathBuf,
    pub kept: bool,
    pub memory: bool,
    pub checkpoint_bytes: u64,
    pub tensors: usize,
    pub seed: u64,
    pub import_bytes_per_second: f64,
    pub ceiling_bytes_per_second: f64,
    /// Why there was no mount.
    pub mount_refused: Option<String>,
    pub checked: Option<Compared>,
    pub rows: Vec<Measured>,
    pub seconds: f64,
}

impl Report {
    /// Prints it on standard output.
    pub fn print(&self, global: &Global) -> Outcome {
        if global.json {
            return output::json(&self.as_json());
        }
        let mut table = Table::new(&[
            ("read of the checkpoint by", Align::Left),
            ("GB/s", Align::Right),
            ("of drive", Align::Right),
            ("of plain", Align::Right),
            ("bound by", Align::Left),
        ]);
        for measured in &self.rows {
            table.row(vec![
                measured.row.title().to_owned(),
                format!("{:.2}", measured.bytes_per_second / 1e9),
                percent(self.share(measured)),
                percent(self.share_of_plain(measured)),
                self.bound(measured),
            ]);
        }
        output::line(&table.render())?;
        output::line(&format!(
            "\nimport with checksums: {}; everything: {}{}",
            size::rate(self.import_bytes_per_second),
            size::duration(self.seconds),
            match &self.mount_refused {
                Some(reason) => format!("\nthe mount was left out: {reason}"),
                None => String::new(),
            }
        ))
    }

    /// Against the drive; a warm read does not ask it.
    fn share(&self, measured: &Measured) -> Option<f64> {
        (!measured.row.is_warm() && self.ceiling_bytes_per_second > 0.0)
            .then(|| measured.bytes_per_second / self.ceiling_bytes_per_second)
    }

    /// Against the same act on plain files.
    fn share_of_plain(&self, measured: &Measured) -> Option<f64> {
        let plain = measured.row.plain()?;
        let plain = self.rows.iter().find(|other| other.row == plain)?;
        Some(measured.bytes_per_second / plain.bytes_per_second).filter(|share| share.is_finite())
    }

    fn bound(&self, measured: &Measured) -> String {
        match measured.row {
            Row::Drive if self.memory => "memory (no drive here)".to_owned(),
            Row::Drive => "drive (this is the ceiling)".to_owned(),
            Row::FileCold | Row::FileMmap => "kernel's read-ahead, drive".to_owned(),
            row if row.is_warm() => "memory".to_owned(),
            Row::MountCold | Row::MountMmap
                if self.share_of_plain(measured).is_some_and(|share| share >= 0.9) =>
            {
                "kernel's read-ahead, drive".to_owned()
            }
            _ if self.share(measured).is_some_and(|share| share >= 0.9) => "drive".to_owned(),
            _ => measured.bound.clone(),
        }
    }

    fn as_json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|measured| {
                json!({
                    "row": measured.row,
                    "title": measured.row.title(),
                    "bytes_per_second": measured.bytes_per_second,
                    "share_of_ceiling": self.share(measured),
                    "share_of_plain_files": self.share_of_plain(measured),
                    "bound": self.bound(measured),
                })
            })
            .collect();
        json!({
            "directory": self.directory,
            "kept": self.kept,
            "memory": self.memory,
            "checkpoint_bytes": self.checkpoint_bytes,
            "tensors": self.tensors,
            "seed": self.seed,
            "import_bytes_per_second": self.import_bytes_per_second,
            "ceiling_bytes_per_second": self.ceiling_bytes_per_second,
            "mounted": self.mount_refused.is_none(),
            "mount_refused": self.mount_refused,
            "compared": self.checked,
            "rows": rows,
            "seconds": self.seconds,
        })
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.0}%", 100.0 * share))
}
