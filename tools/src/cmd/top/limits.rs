//! What limits the pool: how near it runs to what was measured, and what writing costs its drives.

use std::collections::BTreeMap;
use std::path::Path;

use doctor::ceilings::{self, Ceilings};
use doctor::wear::{self, Rated, Wear};
use engine::kv::admin::Watched;
use serde::Serialize;

use crate::size;

/// From this share of a ceiling on, that is what binds.
const BINDS: f64 = 0.8;
const DAY_SECONDS: f64 = 86_400.0;
const YEAR_DAYS: f64 = 365.25;

/// A rate beside what `nvtier doctor --measure` found to be the most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limit {
    /// `drive vda, reads`, `mount, reads`, `memory`.
    pub what: String,
    pub bytes_per_second: f64,
    pub ceiling_bytes_per_second: f64,
    pub share: f64,
}

/// Writes to a drive, and its life.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WearView {
    #[serde(flatten)]
    pub wear: Wear,
    /// Of all programs, between the two samples, for a whole day; `None` where the kernel does not count them.
    pub written_bytes_per_day: Option<f64>,
    /// Until what it is rated for is written at that rate.
    pub years_left: Option<f64>,
}

/// A KV store's budget of writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Budget {
    pub store: String,
    pub written_today_bytes: u64,
    /// `None`: there is no limit.
    pub write_bytes_per_day: Option<u64>,
    pub left_bytes: Option<u64>,
}

/// What is known when watching begins: figures that change rarely or never.
pub struct Known {
    /// By name of the device that is counted, in order of the members.
    ceilings: BTreeMap<String, Ceilings>,
    /// By name of the device that is counted: wear of the drives below it.
    drives: BTreeMap<String, Vec<Wear>>,
}

impl Known {
    /// `members`: name, device (`major:minor`) and path of each. `tbw`: what the user says that each drive is rated for.
    pub fn look(members: &[(String, String, &Path)], tbw: Option<u64>) -> Self {
        let system = doctor::System::here();
        let store = ceilings::Store::of_user();
        let mut known = Self { ceilings: BTreeMap::new(), drives: BTreeMap::new() };
        for (name, device, path) in members {
            if let Some(found) = store.get(path) {
                known.ceilings.insert(name.clone(), found);
            }
            let below = wear::drives_below(&system, device);
            known.drives.insert(
                name.clone(),
                below.iter().map(|drive| wear::of_drive(&system, drive, tbw)).collect(),
            );
        }
        known
    }

    /// Rates beside their ceilings, the nearest first. `rate`: of a tier and a purpose, as the throughput names them.
    pub fn limits(&self, rate: impl Fn(&str, &str) -> Option<f64>) -> Vec<Limit> {
        let mut limits = Vec::new();
        let mut limit = |what: String, rate: Option<f64>, ceiling: Option<f64>| {
            if let (Some(rate), Some(ceiling)) = (rate, ceiling) {
                limits.push(Limit {
                    what,
                    bytes_per_second: rate,
                    ceiling_bytes_per_second: ceiling,
                    share: rate / ceiling,
                });
            }
        };
        for (name, found) in &self.ceilings {
            limit(format!("drive {name}, reads"), rate(name, "reads of all programs"), found.drive_read);
            limit(format!("drive {name}, writes"), rate(name, "writes of all programs"), found.drive_write);
        }
        if let Some(found) = self.ceilings.values().next() {
            limit("pool, reads checked".into(), rate("pool", "reads"), found.pool_read);
            limit("mount, reads served".into(), rate("mount", "reads served"), found.mount_read);
            limit("copies in memory".into(), rate("RAM", "chunks found"), found.memory_copy);
        }
        limits.sort_by(|a, b| b.share.total_cmp(&a.share));
        limits
    }

    /// Wear of every drive. `written`: bytes a second that are written to a device that is counted.
    pub fn wear(&self, written: impl Fn(&str) -> Option<f64>) -> Vec<WearView> {
        let mut found: Vec<WearView> = Vec::new();
        for (name, drives) in &self.drives {
            // What several drives share is striped over them.
            let per_day = written(name).map(|rate| rate * DAY_SECONDS / drives.len().max(1) as f64);
            for wear in drives {
                // Two members on partitions of one drive.
                if let Some(other) = found.iter_mut().find(|other| other.wear.drive == wear.drive) {
                    let sum = other.written_bytes_per_day.zip(per_day).map(|(a, b)| a + b);
                    other.written_bytes_per_day = sum.or(other.written_bytes_per_day).or(per_day);
                    continue;
                }
                found.push(WearView { wear: wear.clone(), written_bytes_per_day: per_day, years_left: None });
            }
        }
        for view in &mut found {
            let left =
                view.wear.rated.map(|(rated, _)| rated.saturating_sub(view.wear.written_bytes.unwrap_or(0)));
            let years = left.zip(view.written_bytes_per_day.filter(|bytes| *bytes > 0.0));
            view.years_left = years.map(|(left, per_day)| left as f64 / per_day / YEAR_DAYS);
        }
        found
    }
}

/// Budgets of the stores that somebody has open.
pub fn budgets(stores: &[Watched]) -> Vec<Budget> {
    let budget = |store: &Watched| {
        let stat = &store.open.as_ref()?.stat;
        Some(Budget {
            store: store.name.clone(),
            written_today_bytes: stat.written_today_bytes,
            write_bytes_per_day: stat.write_bytes_per_day,
            left_bytes: stat.write_bytes_per_day.map(|limit| limit.saturating_sub(stat.written_today_bytes)),
        })
    };
    stores.iter().filter_map(budget).collect()
}

/// Which ceiling binds.
pub fn binding(limits: &[Limit]) -> String {
    match limits.first() {
        None => {
            "no ceilings measured: `nvtier doctor --measure POOL` does, and this line then says which binds"
                .into()
        }
        Some(limit) => format!(
            "{} {}: {} of {} ({:.0} %)",
            if limit.share >= BINDS { "bound by" } else { "no ceiling binds; nearest is" },
            limit.what,
            size::rate(limit.bytes_per_second),
            size::rate(limit.ceiling_bytes_per_second),
            limit.share * 100.0
        ),
    }
}

/// A line of a drive.
pub fn wear_line(view: &WearView) -> String {
    let wear = &view.wear;
    let per_day = view.written_bytes_per_day.map_or("unknown".into(), terabytes);
    let rated = match wear.rated {
        Some((bytes, who)) => {
            let who = match who {
                Rated::Given => "--tbw",
                Rated::Table => "its maker",
                Rated::Smart => "SMART: bytes written over life used",
            };
            let used = wear.percentage_used.map_or(String::new(), |used| format!(", {used} % of it used"));
            format!("rated {} ({who}){used}", terabytes(bytes as f64))
        }
        None => format!("rating unknown ({})", wear.unknown),
    };
    let left = view.years_left.map_or(String::new(), |years| match years {
        years if years > 100.0 => ", lasts more than 100 years so".into(),
        years if years < 1.0 => format!(", lasts {:.0} days so", years * YEAR_DAYS),
        years => format!(", lasts {years:.1} years so"),
    });
    format!("{:<10} writes {per_day} a day as now, {rated}{left}", wear.drive)
}

/// A line of a store.
pub fn budget_line(budget: &Budget) -> String {
    let written = size::human(budget.written_today_bytes);
    match (budget.write_bytes_per_day, budget.left_bytes) {
        (Some(limit), Some(left)) => format!(
            "KV {}: {} of {} left today (UTC), {written} written",
            budget.store,
            size::human(left),
            size::human(limit)
        ),
        _ => format!("KV {}: {written} written today (UTC), no write budget", budget.store),
    }
}

/// Powers of 1000, as drives are rated.
fn terabytes(bytes: f64) -> String {
    match bytes {
        b if b >= 1e15 => format!("{:.2} PB", b / 1e15),
        b if b >= 1e12 => format!("{:.2} TB", b / 1e12),
        b => format!("{:.2} GB", b / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        let ceilings = Ceilings {
            drive_read: Some(4e9),
            drive_write: Some(2e9),
            mount_read: Some(3e9),
            ..Ceilings::default()
        };
        let wear = Wear {
            drive: "nvme0n1".into(),
            model: "m".into(),
            bytes: 1,
            rated: Some((600_000_000_000_000, Rated::Table)),
            written_bytes: Some(100_000_000_000_000),
            percentage_used: Some(16),
            unknown: String::new(),
        };
        Known {
            ceilings: [("nvme0n1p1".to_owned(), ceilings)].into(),
            drives: [("nvme0n1p1".to_owned(), vec![wear])].into(),
        }
    }

    #[test]
    fn the_nearest_ceiling_is_the_one_that_binds() {
        let rates = |tier: &str, purpose: &str| match (tier, purpose) {
            ("nvme0n1p1", "reads of all programs") => Some(1e9),
            ("nvme0n1p1", "writes of all programs") => Some(1.8e9),
            _ => None,
        };
        let limits = known().limits(rates);
        assert_eq!(limits.len(), 2, "no rate of a mount, no limit of a mount");
        assert_eq!(binding(&limits), "bound by drive nvme0n1p1, writes: 1.80 GB/s of 2.00 GB/s (90 %)");
        let idle = known().limits(|_, _| Some(1e6));
        assert!(binding(&idle).starts_with("no ceiling binds; nearest is"), "{idle:?}");
        assert!(binding(&[]).starts_with("no ceilings measured"));
    }

    #[test]
    fn a_life_is_what_is_left_of_the_rating() {
        // 500 TB are left; 5 TB a day.
        let found = known().wear(|_| Some(5e12 / DAY_SECONDS));
        let days = found[0].years_left.unwrap() * YEAR_DAYS;
        assert!((days - 100.0).abs() < 1e-6, "{days}");
        let line = wear_line(&found[0]);
        assert!(
            line.contains(
                "5.00 TB a day as now, rated 600.00 TB (its maker), 16 % of it used, lasts 100 days so"
            ),
            "{line}"
        );
        let idle = known().wear(|_| Some(0.0));
        assert_eq!(idle[0].years_left, None);
        let mut unknown = idle[0].clone();
        unknown.wear.rated = None;
        unknown.wear.unknown = "no NVMe drive".into();
        assert!(wear_line(&unknown).contains("rating unknown (no NVMe drive)"));
    }
}
