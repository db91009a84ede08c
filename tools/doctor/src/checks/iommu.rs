//! The IOMMU, and what it does to transfers.
//!
//! A translating IOMMU lets the kernel's NVMe driver send commands of at most 128 KiB (`max_hw_sectors_kb`), and makes peer-to-peer addresses wrong.

use std::path::Path;

use crate::{Finding, System};

/// What the driver clamps to, KiB.
const CLAMP: u64 = 128;

/// Whether some NVMe drive or GPU lies behind a translating IOMMU; `None` where there is no IOMMU in use.
pub(super) fn translating(system: &System) -> Option<bool> {
    if system.list("/sys/class/iommu").is_empty() {
        return None;
    }
    let groups = system.list("/sys/kernel/iommu_groups");
    let kinds =
        groups.iter().filter_map(|group| system.read(&format!("/sys/kernel/iommu_groups/{group}/type")));
    Some(kinds.into_iter().any(|kind| kind.starts_with("DMA")))
}

pub(super) fn check(system: &System, _path: &Path, out: &mut Vec<Finding>) {
    let finding = match translating(system) {
        None => {
            out.push(Finding::ok("iommu", "mode", "none in use").needs("off, or passing through (iommu=pt)"));
            return;
        }
        Some(false) => Finding::ok("iommu", "mode", "passing through"),
        Some(true) => Finding::ok("iommu", "mode", "translating"),
    };
    let finding = finding.needs("off, or passing through (iommu=pt)");
    let clamped: Vec<String> = system
        .list("/sys/block")
        .into_iter()
        .filter(|disk| disk.starts_with("nvme"))
        .filter(|disk| system.number(&format!("/sys/block/{disk}/queue/max_hw_sectors_kb")) == Some(CLAMP))
        .collect();
    out.push(match (translating(system), clamped.is_empty()) {
        (Some(true), false) => finding
            .degraded(
                format!("commands to {} are cut to 128 KiB (a fifth of the speed was measured), and no direct way from drive to GPU", clamped.join(", ")),
                "boot with iommu=pt",
            )
            .command("add iommu=pt to GRUB_CMDLINE_LINUX in /etc/default/grub, then sudo update-grub and reboot"),
        (Some(true), true) => finding
            .degraded("no direct way from drive to GPU: peer-to-peer addresses would be wrong", "boot with iommu=pt")
            .command("add iommu=pt to GRUB_CMDLINE_LINUX in /etc/default/grub, then sudo update-grub and reboot"),
        _ => finding,
    });
}
