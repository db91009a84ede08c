//! Wear of the drives below a device: what they are rated for, and how much of that is used.

use std::path::Path;

use nvme::passthrough::Drive;
use serde::Serialize;

use crate::{System, tables};

/// Where a rating comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rated {
    /// The user says so.
    Given,
    /// Its maker's, of the table of drives.
    Table,
    /// What the drive says it has written, over the share of its life that it says is used.
    Smart,
}

/// A drive's wear. What could not be seen is not there, and `unknown` says why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Wear {
    /// As /sys names it.
    pub drive: String,
    /// As the drive says.
    pub model: String,
    /// Its length.
    pub bytes: u64,
    /// Bytes that it is rated to be written in its life, and who says so.
    pub rated: Option<(u64, Rated)>,
    /// Bytes written to it ever, as it counts them.
    pub written_bytes: Option<u64>,
    /// Percent of its life that are used, as it says; may pass 100.
    pub percentage_used: Option<u8>,
    /// Why something is not known; empty: all is.
    pub unknown: String,
}

/// A share of a life that is smaller says too little about the whole: it is given in whole percents.
const SMART_LEAST: u8 = 5;
/// Devices below devices: deeper is a loop.
const DEPTH_MAX: usize = 8;

/// Whole drives below a block device (`major:minor`): of a partition its drive, of md and device mapper what they are made of.
pub fn drives_below(system: &System, device: &str) -> Vec<String> {
    let Some(name) = system.link_name(&format!("/sys/dev/block/{device}")) else { return Vec::new() };
    let mut found = Vec::new();
    collect(system, &name, DEPTH_MAX, &mut found);
    found
}

fn collect(system: &System, name: &str, depth: usize, found: &mut Vec<String>) {
    let whole = if system.exists(&format!("/sys/block/{name}")) {
        name.to_owned()
    } else {
        // A partition lies in its drive's directory.
        let disks = system.list("/sys/block");
        let Some(disk) = disks.into_iter().find(|disk| system.exists(&format!("/sys/block/{disk}/{name}")))
        else {
            return;
        };
        disk
    };
    let below = system.list(&format!("/sys/block/{whole}/slaves"));
    if below.is_empty() && !found.contains(&whole) {
        found.push(whole);
        return;
    }
    for one in below.iter().filter(|_| depth > 0) {
        collect(system, one, depth - 1, found);
    }
}

/// Of one whole drive. `given`: what the user says it is rated for. Its health is asked of the drive itself, which takes root.
pub fn of_drive(system: &System, name: &str, given: Option<u64>) -> Wear {
    let model = system.read(&format!("/sys/block/{name}/device/model")).unwrap_or_default();
    let bytes = system.number(&format!("/sys/block/{name}/size")).unwrap_or(0).saturating_mul(512);
    let smart = match (name.starts_with("nvme"), system.is_live()) {
        (false, _) => Err("it is no NVMe drive, so that its health cannot be asked".to_owned()),
        (true, false) => Err("it is not here".to_owned()),
        (true, true) => {
            let node = format!("/dev/{name}");
            let asked = Drive::open(Path::new(&node)).and_then(|drive| drive.smart());
            let told = asked.map(|smart| {
                (u64::try_from(smart.written_bytes()).unwrap_or(u64::MAX), smart.percentage_used)
            });
            told.map_err(|error| format!("its health cannot be asked: {error}"))
        }
    };
    judge(name, model, bytes, given, smart)
}

/// `told`: bytes written ever and percent of life used, as the drive says.
fn judge(name: &str, model: String, bytes: u64, given: Option<u64>, told: Result<(u64, u8), String>) -> Wear {
    let (written_bytes, percentage_used, mut unknown) = match told {
        Ok((written, used)) => (Some(written), Some(used), String::new()),
        Err(why) => (None, None, why),
    };
    let of_smart = || match (written_bytes, percentage_used) {
        (Some(written), Some(used)) if used >= SMART_LEAST && written > 0 => {
            Some((written / u64::from(used)).saturating_mul(100))
        }
        _ => None,
    };
    let rated = given
        .map(|bytes| (bytes, Rated::Given))
        .or_else(|| Some((tables::rated_bytes(&model, bytes)?, Rated::Table)))
        .or_else(|| Some((of_smart()?, Rated::Smart)));
    if rated.is_none() && unknown.is_empty() {
        unknown = format!(
            "the table of drives has no `{model}` of this size, and too little of its life is used to tell from that"
        );
    }
    Wear { drive: name.to_owned(), model, bytes, rated, written_bytes, percentage_used, unknown }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TB: u64 = 1_000_000_000_000;

    #[test]
    fn who_knows_best_is_believed() {
        let wear = |model: &str, given, told| judge("nvme0n1", model.into(), 2 * TB, given, told);
        let known = "Samsung SSD 990 PRO 2TB";
        assert_eq!(wear(known, Some(7), Ok((TB, 50))).rated, Some((7, Rated::Given)));
        assert_eq!(wear(known, None, Ok((TB, 50))).rated, Some((1200 * TB, Rated::Table)));
        let found = wear("other", None, Ok((50 * TB, 10)));
        assert_eq!(found.rated, Some((500 * TB, Rated::Smart)));
        assert_eq!((found.written_bytes, found.percentage_used), (Some(50 * TB), Some(10)));
        assert_eq!(found.unknown, "");
        let young = wear("other", None, Ok((TB, 1)));
        assert_eq!(young.rated, None);
        assert!(young.unknown.contains("`other`"), "{young:?}");
        let mute = wear("other", None, Err("no".into()));
        assert_eq!((mute.rated, mute.written_bytes, mute.unknown.as_str()), (None, None, "no"));
    }
}
