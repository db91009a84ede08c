//! The conditions of a direct way from drive to GPU, one by one. Whether it really works, `nvtier load` tells, which tests it with real bytes.

use std::path::Path;

use super::filesystem::{disk_of, mount_of};
use super::iommu::translating;
use crate::{Finding, System};

const AREA: &str = "gpudirect";
const EFFECT: &str = "bytes go through pinned host memory (the bounce ring)";

pub(super) fn check(system: &System, path: &Path, out: &mut Vec<Finding>) {
    if !system.exists("/proc/driver/nvidia/version") {
        out.push(Finding::info(AREA, "conditions", "no NVIDIA driver is loaded: none of them is looked at"));
        return;
    }
    let condition = |item: &str, holds: bool, found: String, needed: &str, remedy: &str| {
        let finding = Finding { found, ..Finding::ok(AREA, item, "") }.needs(needed);
        // Not a fault of the machine: the bounce ring is the main road.
        match holds {
            true => finding,
            false => Finding {
                status: crate::Status::Info,
                effect: EFFECT.into(),
                remedy: remedy.into(),
                ..finding
            },
        }
    };
    let nvidia_fs = system.exists("/proc/driver/nvidia-fs");
    out.push(condition(
        "nvidia-fs",
        nvidia_fs,
        if nvidia_fs { "loaded".into() } else { "not loaded".into() },
        "loaded, for cuFile's first mode",
        "install nvidia-gds, or meet the conditions of the second mode below",
    ));
    let version = system.read("/proc/driver/nvidia/version").unwrap_or_default();
    let open = version.contains("Open Kernel Module");
    out.push(condition(
        "open kernel module",
        open,
        version.lines().next().unwrap_or_default().to_owned(),
        "the open variant, for peer-to-peer",
        "install the open variant of the driver",
    ));
    let parameters = system.read("/proc/driver/nvidia/params").unwrap_or_default();
    let bar = parameters.contains("RMForceStaticBar1=1");
    out.push(condition(
        "static BAR1",
        bar,
        if bar { "RMForceStaticBar1=1".into() } else { "RMForceStaticBar1 is not set".into() },
        "RMForceStaticBar1=1;RmForceDisableIomapWC=1 in NVreg_RegistryDwords",
        "options nvidia NVreg_RegistryDwords=\"RMForceStaticBar1=1;RmForceDisableIomapWC=1\" in /etc/modprobe.d",
    ));
    let new = system.kernel().is_some_and(|version| version >= (6, 2));
    out.push(condition(
        "kernel 6.2",
        new,
        system.read("/proc/sys/kernel/osrelease").unwrap_or_default(),
        "6.2 or newer",
        "a newer kernel",
    ));
    let iommu = translating(system) != Some(true);
    out.push(condition(
        "IOMMU",
        iommu,
        if iommu { "off or passing through".into() } else { "translating".into() },
        "off or passing through",
        "boot with iommu=pt",
    ));
    if let Some(multipath) = system.read("/sys/module/nvme_core/parameters/multipath") {
        out.push(condition(
            "NVMe multipath",
            multipath == "N",
            multipath.clone(),
            "N",
            "options nvme_core multipath=N in /etc/modprobe.d",
        ));
    }
    if let Some(mount) = mount_of(system, path) {
        let disk = disk_of(system, &mount);
        let plain = disk.as_ref().is_some_and(|(disk, stacked)| disk.starts_with("nvme") && !stacked);
        let shown = disk.map_or_else(|| mount.source.clone(), |(disk, _)| disk);
        out.push(condition(
            "drive below the path",
            plain && matches!(mount.kind.as_str(), "ext4" | "xfs"),
            format!("{} on {shown}", mount.kind),
            "ext4 or XFS on an NVMe drive, no md and no device mapper",
            "a member on a drive of its own",
        ));
    }
}
