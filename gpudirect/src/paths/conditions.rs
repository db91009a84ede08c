//! What each better way needs, one by one, and whether it is so here.

use serde::Serialize;

use super::system::{DriveKind, Place, System};
use crate::cufile::Properties;
use crate::driver::DeviceInfo;

/// One thing that a way needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// What is needed.
    pub needs: &'static str,
    /// Whether it is so; `None`: it cannot be found out here.
    pub met: Option<bool>,
    /// What was found.
    pub found: String,
}

fn condition(needs: &'static str, met: impl Into<Option<bool>>, found: impl Into<String>) -> Condition {
    Condition { needs, met: met.into(), found: found.into() }
}

/// cuFile by the kernel module nvidia-fs.
pub(super) fn nvidia_fs(system: &System, place: &Place) -> Vec<Condition> {
    let version = system.read("proc/driver/nvidia-fs/version");
    let module = match &version {
        Some(version) => condition("nvidia-fs is loaded", true, version.lines().next().unwrap_or_default()),
        None => {
            condition("nvidia-fs is loaded", false, "nvidia-fs is not loaded (no /proc/driver/nvidia-fs)")
        }
    };
    vec![module, file_system(place), drive(place, true)]
}

/// cuFile by the kernel's PCI peer-to-peer DMA.
pub(super) fn peer_to_peer(system: &System, place: &Place, device: &DeviceInfo) -> Vec<Condition> {
    let kernel = system.kernel_version();
    let mut all = vec![condition(
        "Linux 6.2 or newer",
        kernel.map(|version| version >= (6, 2)),
        format!("the kernel is {}", system.kernel()),
    )];
    let config = system.kernel_config("CONFIG_PCI_P2PDMA");
    all.push(condition(
        "CONFIG_PCI_P2PDMA",
        config.as_deref().map(|value| value == "y"),
        match &config {
            Some(value) => format!("the kernel has CONFIG_PCI_P2PDMA={value}"),
            None => "the kernel's configuration is not readable".into(),
        },
    ));
    let driver = system.read("proc/driver/nvidia/version");
    all.push(condition(
        "NVIDIA's open kernel driver",
        driver.as_deref().map(|text| text.contains("Open Kernel Module")),
        match &driver {
            Some(text) if text.contains("Open Kernel Module") => "the open kernel driver is loaded",
            Some(_) => "the proprietary kernel driver is loaded",
            None => "NVIDIA's kernel driver cannot be asked (no /proc/driver/nvidia)",
        },
    ));
    let parameters = system.read("proc/driver/nvidia/params");
    for (needs, name) in [
        ("the driver's option RMForceStaticBar1=1", "RMForceStaticBar1=1"),
        ("the driver's option RmForceDisableIomapWC=1", "RmForceDisableIomapWC=1"),
    ] {
        let set = parameters.as_deref().map(|text| text.contains(name));
        let found = match set {
            Some(true) => format!("{name} is set"),
            Some(false) => format!("{name} is not among the driver's NVreg_RegistryDwords"),
            None => "the driver's options are not readable".into(),
        };
        all.push(condition(needs, set, found));
    }
    let pci = format!("sys/bus/pci/devices/{}", device.pci);
    let here = !device.pci.is_empty() && system.exists(&pci);
    all.push(condition(
        "the GPU's memory is known to the kernel as peer-to-peer memory",
        here.then(|| system.exists(&format!("{pci}/p2pmem"))),
        match (here, system.exists(&format!("{pci}/p2pmem"))) {
            (true, true) => format!("{} has p2pmem", device.pci),
            (true, false) => format!("{} has no p2pmem in /sys", device.pci),
            (false, _) => format!("the GPU {} is not in /sys", device.pci),
        },
    ));
    let group = system.read(&format!("{pci}/iommu_group/type"));
    all.push(condition(
        "the IOMMU is off or passes through",
        here.then_some(group.as_deref().is_none_or(|kind| kind == "identity")),
        match &group {
            None => "no IOMMU translates for the GPU".to_owned(),
            Some(kind) if kind == "identity" => "the IOMMU passes through".to_owned(),
            Some(kind) => {
                format!("the IOMMU translates for the GPU (domain type {kind}); boot with iommu=pt")
            }
        },
    ));
    all.push(file_system(place));
    all.push(drive(place, false));
    all
}

/// What the library says, once it was opened.
pub(super) fn library(properties: &Properties, peer_to_peer: bool) -> Vec<Condition> {
    let version = match properties.library.as_str() {
        "" => "a library that does not say its version",
        version => version,
    };
    let nvme = if peer_to_peer { properties.nvme_p2p } else { properties.nvme };
    let needs = if peer_to_peer {
        "cuFile says that NVMe works by peer-to-peer DMA"
    } else {
        "cuFile says that NVMe works by nvidia-fs"
    };
    let found = match nvme {
        true => format!("cuFile {version} says so"),
        false => format!("cuFile {version} says that it does not"),
    };
    let compat = match properties.compat_allowed {
        false => "it is off",
        true => {
            "it is on, and what runs then cannot be told from it: set properties.allow_compat_mode to false in cufile.json"
        }
    };
    vec![
        condition(needs, nvme, found),
        condition(
            "compatibility mode is off",
            !properties.compat_allowed,
            format!("compatibility mode: {compat}"),
        ),
    ]
}

fn file_system(place: &Place) -> Condition {
    let needs = "ext4 with data=ordered, or XFS";
    let journal =
        place.options.split(',').find(|option| option.starts_with("data=") && *option != "data=ordered");
    match place.file_system.as_str() {
        "" => condition(needs, None, "the file system is not known"),
        "ext4" if journal.is_some() => {
            condition(needs, false, format!("ext4 is mounted with {}", journal.unwrap_or_default()))
        }
        "ext4" | "xfs" => condition(needs, true, format!("it is {}", place.file_system)),
        other => condition(needs, false, format!("it is {other}")),
    }
}

fn drive(place: &Place, stacked: bool) -> Condition {
    let needs = if stacked {
        "a local NVMe drive, or md RAID 0 of such"
    } else {
        "a local NVMe drive, no md, no multipath"
    };
    let name = if place.drive.is_empty() { "there is no block device under it" } else { &place.drive };
    match &place.kind {
        DriveKind::Nvme => condition(needs, true, name),
        DriveKind::Stacked if stacked => condition(needs, None, format!("{name} is made of other devices")),
        DriveKind::Stacked => {
            condition(needs, false, format!("{name} is made of other devices (md or device mapper)"))
        }
        DriveKind::NvmeMultipath => {
            let found = format!("{name} is behind NVMe multipath; boot with nvme_core.multipath=N");
            condition(needs, if stacked { None } else { Some(false) }, found)
        }
        DriveKind::NvmeFabrics(transport) => {
            condition(needs, false, format!("{name} is reached by {transport}"))
        }
        DriveKind::Other if place.drive.is_empty() => condition(needs, false, name),
        DriveKind::Other => condition(needs, false, format!("{name} is no NVMe drive")),
    }
}
