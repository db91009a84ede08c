//! NVMe drives: who they are, how they are connected, and what the kernel sends to them. What they say of themselves is in `health`.

use std::path::Path;

use super::filesystem::{disk_of, mount_of};
use super::health;
use crate::{Finding, System};

pub(super) fn check(system: &System, path: &Path, out: &mut Vec<Finding>) {
    let controllers: Vec<String> = system
        .list("/sys/class/nvme")
        .into_iter()
        .filter(|name| name.strip_prefix("nvme").is_some_and(|n| n.parse::<u32>().is_ok()))
        .collect();
    if controllers.is_empty() {
        let finding = Finding::ok("drive", "NVMe", "no NVMe drive is seen").needs("an NVMe drive");
        out.push(finding.degraded(
            "a virtual disk or another kind of drive does: its speed is what `nvtier bench` measures, health and firmware cannot be told",
            "an NVMe drive; in a virtual machine, one that is passed through",
        ));
    }
    for controller in &controllers {
        one(system, controller, out);
    }
    let below = mount_of(system, path).and_then(|mount| disk_of(system, &mount));
    if let Some((disk, _)) = below {
        out.push(queue(system, &disk, path));
    }
}

fn one(system: &System, name: &str, out: &mut Vec<Finding>) {
    let attribute =
        |attribute: &str| system.read(&format!("/sys/class/nvme/{name}/{attribute}")).unwrap_or_default();
    let (model, firmware, transport) =
        (attribute("model"), attribute("firmware_rev"), attribute("transport"));
    out.push(
        Finding::ok("drive", name, format!("{model}, firmware {firmware}, {transport}"))
            .needs("any NVMe drive: none is refused"),
    );
    out.extend(link(system, name, &format!("/sys/class/nvme/{name}/device"), "drive", 4));
    let blocks = system.list("/sys/block").into_iter().filter(|block| is_namespace_of(block, name));
    health::check(system, name, &blocks.collect::<Vec<_>>(), out);
}

/// `nvme0n1` is one of `nvme0`'s, also as `nvme0c0n1`; `nvme0n1p1` is a partition.
fn is_namespace_of(block: &str, controller: &str) -> bool {
    let Some(rest) = block.strip_prefix(controller) else { return false };
    let Some(rest) = rest.strip_prefix('n') else { return false };
    rest.parse::<u32>().is_ok()
}

/// The PCIe link of a device, now and at best. `wanted`: lanes that it should have.
pub(super) fn link(
    system: &System,
    name: &str,
    device: &str,
    area: &'static str,
    wanted: u32,
) -> Option<Finding> {
    let read = |what: &str| system.read(&format!("{device}/{what}"));
    let (speed, width) = (read("current_link_speed")?, read("current_link_width")?);
    let (best_speed, best_width) = (read("max_link_speed")?, read("max_link_width")?);
    let (now, best) = (generation(&speed), generation(&best_speed));
    let lanes: u32 = width.parse().ok()?;
    let best_lanes: u32 = best_width.parse().ok()?;
    let found = format!("PCIe {now} x{lanes} now, {best} x{best_lanes} at best ({speed})");
    let finding =
        Finding::ok(area, format!("{name} link"), found).needs(format!("PCIe 4 x{wanted} or better"));
    if lanes < best_lanes.min(wanted) {
        return Some(finding.degraded(
            format!("{lanes} of {} lanes: the bus binds, not the device", best_lanes.min(wanted)),
            "another slot (lanes may be shared with a second slot: see the board's manual), or reseat it",
        ));
    }
    if now < best && area == "gpu" {
        // Power saving lowers the link of an idle GPU; it comes up with the first copy.
        return Some(Finding { status: crate::Status::Info, ..finding });
    }
    Some(match now {
        0..4 => finding.degraded(
            format!("PCIe {now} halves the speed of PCIe 4, or worse"),
            "a slot of a newer generation, where the board has one",
        ),
        _ => finding,
    })
}

/// `16.0 GT/s PCIe` is generation 4.
fn generation(speed: &str) -> u32 {
    match speed.split(' ').next().and_then(|number| number.parse::<f64>().ok()).unwrap_or(0.0) {
        speed if speed >= 64.0 => 6,
        speed if speed >= 32.0 => 5,
        speed if speed >= 16.0 => 4,
        speed if speed >= 8.0 => 3,
        speed if speed >= 5.0 => 2,
        _ => 1,
    }
}

/// What the queue should take.
const COMMAND: &str = "512 KiB or more";

/// What the kernel sends to the disk below the pool.
fn queue(system: &System, disk: &str, path: &Path) -> Finding {
    let read = |what: &str| system.number(&format!("/sys/block/{disk}/queue/{what}"));
    let (Some(limit), Some(now)) = (read("max_hw_sectors_kb"), read("max_sectors_kb")) else {
        return Finding::unknown(
            "drive",
            format!("{disk} queue"),
            format!("/sys/block/{disk}/queue says nothing"),
        )
        .needs(COMMAND);
    };
    let spins = read("rotational") == Some(1);
    let kind = if disk.starts_with("nvme") {
        "NVMe"
    } else if spins {
        "no NVMe drive (said to spin)"
    } else {
        "no NVMe drive"
    };
    // A driver that sets no limit.
    let most = if limit >= 1 << 20 { "no limit".to_owned() } else { format!("{limit} KiB possible") };
    let found = format!("{kind}; commands of up to {now} KiB, {most} (below {})", path.display());
    let finding = Finding::ok("drive", format!("{disk} queue"), found).needs(COMMAND);
    match now {
        0..128 => finding.degraded(
            "each read is cut into small commands",
            format!("raise /sys/block/{disk}/queue/max_sectors_kb"),
        ),
        _ => Finding {
            status: if disk.starts_with("nvme") { crate::Status::Ok } else { crate::Status::Info },
            ..finding
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_speeds() {
        assert!(is_namespace_of("nvme0n1", "nvme0") && !is_namespace_of("nvme0n1p1", "nvme0"));
        assert!(!is_namespace_of("nvme10n1", "nvme1") && !is_namespace_of("nvme0c0n1", "nvme0"));
        assert_eq!(
            ["2.5 GT/s PCIe", "8.0 GT/s PCIe", "16.0 GT/s PCIe", "32.0 GT/s PCIe"].map(generation),
            [1, 3, 4, 5]
        );
    }
}
