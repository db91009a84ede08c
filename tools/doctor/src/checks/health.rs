//! What an NVMe drive says of itself, asked by admin commands, which takes root; and what it is rated for.

use std::path::Path;

use nvme::passthrough::{Drive, LbaFormat, Namespace, SmartLog};

use crate::system::human;
use crate::wear::{self, Rated, Wear};
use crate::{Finding, Status, System};

/// Share of the rated endurance that is used, in percent, from which on we warn.
const WORN: u8 = 80;
const TERA: f64 = 1e12;

/// `name`: of the controller; `blocks`: its namespaces, as /sys/block names them.
pub(super) fn check(system: &System, name: &str, blocks: &[String], out: &mut Vec<Finding>) {
    let drive = system.is_live().then(|| Drive::open(Path::new(&format!("/dev/{name}"))));
    for block in blocks {
        let bytes = system.number(&format!("/sys/block/{block}/size")).unwrap_or(0).saturating_mul(512);
        let lba = system.number(&format!("/sys/block/{block}/queue/logical_block_size")).unwrap_or(0);
        let told = drive.as_ref().and_then(|drive| drive.as_ref().ok()).and_then(|drive| {
            let id = system.number(&format!("/sys/block/{block}/nsid"))?;
            drive.identify_namespace(u32::try_from(id).ok()?).ok()
        });
        out.push(formats(block, bytes, lba, told.as_ref()));
    }
    match drive.map(|drive| drive.and_then(|drive| Ok((drive.smart()?, drive.controller()?)))) {
        Some(Ok((smart, controller))) => {
            let most = controller.max_transfer_bytes().map_or("no limit".into(), human);
            out.push(
                Finding::info("drive", format!("{name} largest command (MDTS)"), most)
                    .needs("any: what is longer is sent in parts"),
            );
            out.push(health(name, &smart));
        }
        Some(Err(error)) => out.push(
            Finding::unknown("drive", format!("{name} health"), format!("cannot be asked: {error}"))
                .needs(HEALTHY)
                .root_adds("SMART health, wear, MDTS and LBA formats"),
        ),
        None => {}
    }
    out.extend(blocks.iter().map(|block| endurance(&wear::of_drive(system, block, None))));
}

fn performance(format: &LbaFormat) -> &'static str {
    ["best", "better", "good", "degraded"][usize::from(format.relative_performance & 3)]
}

fn shown(format: &LbaFormat) -> Option<String> {
    let metadata = match format.metadata_bytes {
        0 => String::new(),
        bytes => format!(" with {bytes} of metadata"),
    };
    Some(format!("{}: {} bytes{metadata}, {}", format.index, format.lba_bytes?, performance(format)))
}

/// The LBA format in use, and all that there are where the drive could be asked.
fn formats(block: &str, bytes: u64, lba: u64, told: Option<&Namespace>) -> Finding {
    let mut found = format!("{}, logical blocks of {lba} bytes", human(bytes));
    if let Some(told) = told {
        let all: Vec<String> = told.formats.iter().filter_map(shown).collect();
        found += &format!(" (format {} in use; {})", told.format_index, all.join("; "));
    }
    let finding = Finding::info("drive", block, found)
        .needs("the format that the drive calls its best; pools take all that have no metadata");
    let Some((told, used)) = told.and_then(|told| Some((told, told.format()?))) else { return finding };
    if used.metadata_bytes != 0 {
        return finding.degraded(
            "blocks with metadata: no raw pool on its character device",
            format!("a format without metadata, which erases the drive: nvme format /dev/{block} --lbaf=N"),
        );
    }
    let better = told
        .formats
        .iter()
        .filter(|format| format.lba_bytes.is_some() && format.metadata_bytes == 0)
        .min_by_key(|format| format.relative_performance)
        .filter(|format| format.relative_performance < used.relative_performance);
    match better {
        // No fault: what nvtier sends is 4 KiB and more in any format, and another one costs all that is on the drive.
        Some(better) => Finding {
            effect: format!(
                "the drive calls format {} its {} and this one {}: small requests gain most",
                better.index,
                performance(better),
                performance(used)
            ),
            remedy: format!(
                "before a pool is made, for it erases the drive: nvme format /dev/{block} --lbaf={}",
                better.index
            ),
            ..finding
        },
        None => Finding { status: Status::Ok, ..finding },
    }
}

const HEALTHY: &str = "no warning, and wear below 80%";

fn health(name: &str, smart: &SmartLog) -> Finding {
    let written = u64::try_from(smart.written_bytes()).unwrap_or(u64::MAX);
    let found = format!(
        "{}% of its rated endurance used, {} written, spare {}%, {} °C, {} media errors",
        smart.percentage_used,
        human(written),
        smart.available_spare_percent,
        smart.temperature_c(),
        smart.media_errors
    );
    let finding = Finding::ok("drive", format!("{name} health"), found).needs(HEALTHY);
    let warnings = smart.warnings();
    if !warnings.is_empty() {
        return finding.degraded(
            format!("the drive warns: {}", warnings.join(", ")),
            "copy what matters, and replace it",
        );
    }
    if smart.percentage_used >= WORN {
        return finding.degraded(NEAR_ITS_END, REPLACE);
    }
    finding
}

const NEAR_ITS_END: &str = "it is near the end of its rated endurance";
const REPLACE: &str = "plan its replacement; keep training state elsewhere";

/// What it is rated to be written in its life, and how much of that is gone.
fn endurance(wear: &Wear) -> Finding {
    let item = format!("{} rated endurance", wear.drive);
    let root = "what was written to it, and of a drive that no table has what its own wear lets expect";
    let needed = "more than is left of its life in what you will write (`nvtier plan` counts it)";
    let Some((rated, by)) = wear.rated else {
        if wear.written_bytes.is_some() {
            return Finding::unknown("drive", item, format!("not known: {}", wear.unknown)).needs(needed);
        }
        let why =
            format!("not known: no table has `{}` of {}; {}", wear.model, human(wear.bytes), wear.unknown);
        return Finding::unknown("drive", item, why).needs(needed).root_adds(root);
    };
    let by = match by {
        Rated::Given => "given",
        Rated::Table => "by its maker",
        Rated::Smart => "by what its own log says",
    };
    let mut found = format!("{:.0} TB to be written in its life ({by})", rated as f64 / TERA);
    let Some(written) = wear.written_bytes else {
        return Finding::ok("drive", item, found).needs(needed).root_adds(root);
    };
    let share = written as f64 / rated.max(1) as f64;
    found += &format!(", {:.1} TB were ({:.0}%)", written as f64 / TERA, 100.0 * share);
    let finding = Finding::ok("drive", item, found).needs(needed);
    match 100.0 * share >= f64::from(WORN) {
        true => finding.degraded(NEAR_ITS_END, REPLACE),
        false => finding,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(index: u8, lba: u32, metadata_bytes: u16, relative_performance: u8) -> LbaFormat {
        LbaFormat {
            index,
            lba_bytes: (lba != 0).then_some(lba),
            lba_shift: lba.checked_ilog2().unwrap_or(0) as u8,
            metadata_bytes,
            relative_performance,
        }
    }

    fn namespace(format_index: u8, formats: Vec<LbaFormat>) -> Namespace {
        Namespace {
            id: 1,
            size_blocks: 1 << 20,
            capacity_blocks: 1 << 20,
            used_blocks: 0,
            features: 0,
            format_index,
            metadata_inline: false,
            protection: 0,
            formats,
            nvm_capacity_bytes: 0,
            optimal_boundary_blocks: 0,
            preferred_write_blocks: 0,
            preferred_alignment_blocks: 0,
            nguid: [0; 16],
            eui64: [0; 8],
        }
    }

    #[test]
    fn formats_are_listed_and_a_better_one_is_named() {
        let all =
            || vec![format(0, 512, 0, 2), format(1, 4096, 0, 0), format(2, 4096, 8, 0), format(3, 0, 0, 0)];
        let tell = |index| formats("nvme0n1", 1 << 40, 512, Some(&namespace(index, all())));
        let slow = tell(0);
        assert_eq!(slow.status, Status::Info, "{slow:#?}");
        for part in [
            "format 0 in use",
            "0: 512 bytes, good",
            "1: 4096 bytes, best",
            "2: 4096 bytes with 8 of metadata",
        ] {
            assert!(slow.found.contains(part), "{part}: {slow:#?}");
        }
        assert!(!slow.found.contains("3: "), "one that cannot be had is listed: {slow:#?}");
        assert!(slow.effect.contains("format 1") && slow.remedy.contains("--lbaf=1"), "{slow:#?}");
        let best = tell(1);
        assert_eq!((best.status, best.effect.as_str()), (Status::Ok, ""), "{best:#?}");
        let metadata = tell(2);
        assert_eq!(metadata.status, Status::Degraded, "{metadata:#?}");
        // What names a format that is not there, and a drive that was not asked.
        assert_eq!(tell(9).status, Status::Info);
        let mute = formats("nvme0n1", 1 << 40, 512, None);
        assert_eq!(
            (mute.status, mute.found.as_str()),
            (Status::Info, "1.0 TiB, logical blocks of 512 bytes")
        );
    }

    #[test]
    fn ratings_are_told_with_their_origin_and_what_is_used() {
        let wear = |rated, written_bytes, unknown: &str| Wear {
            drive: "nvme0n1".into(),
            model: "M".into(),
            bytes: 1 << 40,
            rated,
            written_bytes,
            percentage_used: None,
            unknown: unknown.into(),
        };
        let known = Some((1_200_000_000_000_000, Rated::Table));
        let young = endurance(&wear(known, Some(12_000_000_000_000), ""));
        assert_eq!(young.found, "1200 TB to be written in its life (by its maker), 12.0 TB were (1%)");
        assert_eq!((young.status, young.root_adds.as_str()), (Status::Ok, ""));
        let old = endurance(&wear(known, Some(1_000_000_000_000_000), ""));
        assert!(old.status == Status::Degraded && old.remedy.contains("replacement"), "{old:#?}");
        let mute = endurance(&wear(known, None, "no"));
        assert!(mute.status == Status::Ok && mute.root_adds.contains("written"), "{mute:#?}");
        let stranger = endurance(&wear(None, None, "its health cannot be asked: no"));
        assert!(stranger.status == Status::Unknown && !stranger.root_adds.is_empty(), "{stranger:#?}");
        assert!(
            stranger.found.contains("`M`") && stranger.found.contains("cannot be asked"),
            "{stranger:#?}"
        );
        let young = endurance(&wear(None, Some(1), "too little of its life is used"));
        assert_eq!(
            (young.found.as_str(), young.root_adds.as_str()),
            ("not known: too little of its life is used", "")
        );
    }
}
